"""SOSP: drop the channels whose removal changes the loss least to second order, all pairs of channels counted.

Nonnenmacher, Pfeil, Steinwart and Reeb, 2022. A reconstruction: the authors published no code, and which parameters a
channel behind a norm stands for, and how coupled layers are treated, is our reading (``structure=`` of `SOSP`). Differs
from the paper: the target is a budget of flops instead of a number of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten
from typing_extensions import override

from lightning_prune import widening
from lightning_prune.batches import samples_in
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.errors import NonFiniteScore
from lightning_prune.graph.flow import Tap
from lightning_prune.graph.groups import ChannelGraph, Group
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper, one_of
from lightning_prune.ranking import greedy_order
from lightning_prune.schedule import OneShot
from lightning_prune.statistics import SampleSums
from lightning_prune.taps import SampleGradients, watching

OutputsFn = Callable[[Any, Any], Tensor]
Structure = Literal["gate", "filter", "all"]
Slice = tuple[str, int, Tensor]  # parameter, dimension, and (C, M) indices of each channel on it

_MOST_PAIRS = 2**24  # float64 entries of a matrix over pairs of channels, of which a few are held: 128 MiB each
_MOST_GRADIENTS = 2**20  # outputs times channels: entries of one sample's Jacobian


def sosp_h_score(first: Tensor, second: Tensor) -> Tensor:
    """Score channels by SOSP-H, where the sum over all pairs is taken inside the absolute value (eq. 7).

    Args:
        first: (S,) signed inner products of each channel's parameters with the gradient.
        second: (S,) those with the Hessian times the parameters of all channels.

    Returns:
        (S,), at least 0, in the unit of the loss.

    Example:
        >>> sosp_h_score(torch.tensor([1.0, 0.5, -0.1]), torch.tensor([2.0, 3.0, 0.0]))
        tensor([2.0000, 2.0000, 0.1000])
    """
    return first.abs() + 0.5 * second.abs()


def sosp_i_matrix(first: Tensor, pairs: Tensor) -> Tensor:
    """The matrix Q of SOSP-I: the change of the loss of removing a set is bounded by the sum of Q over it (eq. 5).

    Args:
        first: (S,) as in `sosp_h_score`.
        pairs: (S, S) signed inner products of channels' parameters through the Gauss-Newton matrix.

    Returns:
        (S, S), at least 0.
    """
    return torch.diag(first.abs()) + 0.5 * pairs.abs()


def gradient_and_product(
    loss: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradient, and the exact Hessian times a direction, by differentiating twice.

    Args:
        loss: scalar.
        parameters: what it is differentiated by.
        direction: a tensor for each of them, of its shape.

    Returns:
        One tensor per parameter of each; None where the parameter has no part in it.
    """
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    reached = [(g, d) for g, d in zip(gradient, direction, strict=True) if g is not None and g.requires_grad]
    if not reached:
        return [None if g is None else g.detach() for g in gradient], [None] * len(parameters)
    product = torch.autograd.grad(
        [g for g, _ in reached], parameters, grad_outputs=[d for _, d in reached], allow_unused=True
    )
    return [None if g is None else g.detach() for g in gradient], list(product)


class SOSP(ChannelPruner):
    """Cut the channels whose removal changes the loss least to second order, with all correlations between layers.

    Args:
        budget: see `ChannelPruner`.
        variant: "H" differentiates the loss twice, once for all channels; "I" sums over pairs of channels with the
            Gauss-Newton matrix, for small networks with few outputs, and removes them greedily.
        structure: which parameters a channel stands for: "gate", scale and shift of the norm that follows a layer,
            filter and bias where none does; "filter", filter and bias everywhere; "all", all that goes with the channel
            but its readers' weights.
        samples: how many calibration samples are looked at, where there are as many.
        outputs_fn: with ``variant="I"``, ``(pl_module, batch) -> (B, O)`` outputs that the loss is made from; by
            default the module called with the batch, or with its first entry.
        curvature: with ``variant="I"``, what that loss is: "cross_entropy" of the softmax of the outputs, or
            "squared_error", the mean over outputs of the squared difference, as ``mse_loss`` has it.
        **shared: see `ChannelPruner`; one global ranking, as in the paper.
    """

    paper = Paper("Nonnenmacher et al.", 2022, "https://arxiv.org/abs/2110.11395")
    needs = "gradients of calibration data"
    default_schedule = OneShot(0.5)
    default_scope = "global"

    def __init__(
        self,
        budget: Budget | float,
        *,
        variant: Literal["H", "I"] = "H",
        structure: Structure = "gate",
        samples: int = 1000,
        outputs_fn: OutputsFn | None = None,
        curvature: Literal["cross_entropy", "squared_error"] = "cross_entropy",
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        one_of("variant", variant, ("H", "I"))
        one_of("structure", structure, ("gate", "filter", "all"))
        one_of("curvature", curvature, ("cross_entropy", "squared_error"))
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples must be an int of at least 1, got {samples!r}")
        if variant == "H" and outputs_fn is not None:
            raise ValueError("outputs_fn= is for variant='I'; variant='H' differentiates the loss itself")
        self.variant = variant
        self.structure = structure
        self.samples = samples
        self.outputs_fn = outputs_fn
        self.curvature = curvature

    def bottlenecks(self, threshold: float = 0.5, factor: float = 2.0) -> dict[str, float]:
        """Groups that this run hardly pruned, with a factor to widen each by; see `lightning_prune.bottlenecks`."""
        return widening.bottlenecks(self.plan, threshold, factor)

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        slices = {name: slices_of(self.graph, views[name][0].group, self.structure) for name in views}
        parameters = {name: named[name] for name in dict.fromkeys(n for part in slices.values() for n, _, _ in part)}
        with differentiable(parameters.values()):
            if self.variant == "H":
                sums = self._curvature(parameters, slices)
                return {n: sosp_h_score(sums[f"{n}/first"], sums[f"{n}/second"]) for n in slices}
            first, pairs = self._pairs(parameters, slices)
        place = greedy_order(sosp_i_matrix(first, pairs)).argsort().double()  # the last to go scores highest
        sizes = [len(part[0][2]) for part in slices.values()]
        return dict(zip(slices, torch.split(place, sizes), strict=True))

    def _curvature(self, parameters: Mapping[str, Tensor], slices: Mapping[str, list[Slice]]) -> dict[str, Tensor]:
        """SOSP-H: group/first and group/second -> (C,) signed inner products, means over samples."""
        sizes = {name: (len(part[0][2]),) for name, part in slices.items()}
        sums = SampleSums({f"{n}/{k}": s for n, s in sizes.items() for k in ("first", "second")}, self._device)
        reached = torch.zeros(len(parameters), device=self._device)
        values = list(parameters.values())
        direction = all_channels(parameters, slices)
        for batch in self.calibrate(self.samples):
            count = samples_in(batch)
            # fused attention can be differentiated only once
            with self.evaluating(grad=True), sdpa_kernel(SDPBackend.MATH):
                gradient, product = gradient_and_product(self.loss(batch), values, direction)
            reached += torch.tensor([g is not None for g in gradient], device=self._device)
            first = by_channel(parameters, gradient, slices)
            second = by_channel(parameters, product, slices)
            of_batch = {f"{n}/first": count * v for n, v in first.items()}
            sums.add(of_batch | {f"{n}/second": count * v for n, v in second.items()}, count)
        means = sums.means(self.total)
        self._check_reached(parameters, reached)
        return means

    def _pairs(self, parameters: Mapping[str, Tensor], slices: Mapping[str, list[Slice]]) -> tuple[Tensor, Tensor]:
        """SOSP-I: (S,) signed inner products with the gradient, (S, S) through the Gauss-Newton matrix; means."""
        channels = sum(len(part[0][2]) for part in slices.values())
        if channels**2 > _MOST_PAIRS:
            raise ValueError(
                f"SOSP(variant='I') holds a matrix over all pairs of {channels} channels; {int(_MOST_PAIRS**0.5)} "
                "channels are the most it takes: use variant='H', or ignore= layers"
            )
        sums = SampleSums({"first": (channels,), "pairs": (channels, channels)}, self._device)
        reached = torch.zeros(len(parameters), device=self._device)
        gradients = SampleGradients({name: taps_of(self.graph, name, part) for name, part in slices.items()})
        values = list(parameters.values())
        for batch in self.calibrate(self.samples):
            count = samples_in(batch)
            with self.evaluating(grad=True):
                gradient = torch.autograd.grad(self.loss(batch), values, allow_unused=True)
                reached += torch.tensor([g is not None for g in gradient], device=self._device)
                with watching(self.model, gradients.looks):
                    outputs = checked(self._outputs(batch), count, channels)
                pairs = torch.zeros(channels, channels, dtype=torch.float64, device=self._device)
                mean = torch.zeros(count, channels, dtype=torch.float64, device=self._device)
                weights = outputs.detach().double().softmax(dim=1)  # (B, O), p of each class
                if self.curvature == "squared_error":
                    weights = torch.full_like(weights, 2 / outputs.shape[1])
                for output in range(outputs.shape[1]):
                    found = torch.autograd.grad(
                        outputs[:, output].sum() / count, values, retain_graph=True, allow_unused=True
                    )
                    rows = self._by_sample(gradients.take(), by_channel(parameters, found, slices), count)
                    weighted = weights[:, output, None] * rows  # (B, S)
                    pairs += weighted.T @ rows
                    mean += weighted
                if self.curvature == "cross_entropy":  # R = diag(p) - p p^T
                    pairs -= mean.T @ mean
            first = torch.cat(list(by_channel(parameters, gradient, slices).values()))
            sums.add({"first": count * first, "pairs": pairs}, count)
        means = sums.means(self.total)
        self._check_reached(parameters, reached)
        return means["first"], means["pairs"]

    def _by_sample(self, found: Mapping[str, Tensor], means: Mapping[str, Tensor], count: int) -> Tensor:
        """(B, S) derivatives of an output by a factor on each channel, held against the means from parameters."""
        rows = []
        for name, mean in means.items():
            of_group = torch.zeros(count, len(mean), device=self._device)
            tolerance = torch.finfo(found[name].dtype).eps ** 0.5 if name in found else 0.0
            of_group = found.get(name, of_group).double()
            size = float(of_group.abs().mean())
            if len(of_group) != count or bool(((of_group.mean(dim=0) - mean).abs() > tolerance * size).any()):
                raise ValueError(
                    f"SOSP(variant='I') cannot tell sample by sample what group {name!r} adds to the outputs: not all "
                    "of its parameters act through a layer or norm that is linear in them; use variant='H', or "
                    "list the group in ignore="
                )
            rows.append(of_group)
        return torch.cat(rows, dim=1)

    def _outputs(self, batch: Any) -> Tensor:
        if self.outputs_fn is not None:
            return self.outputs_fn(self.model, batch)
        out: Tensor = self.model(batch if isinstance(batch, Tensor) else tree_flatten(batch)[0][0])
        return out

    def _check_reached(self, parameters: Mapping[str, Tensor], reached: Tensor) -> None:
        missing = [n for n, k in zip(parameters, self.total(reached).tolist(), strict=True) if not k]
        if missing:
            raise NonFiniteScore(
                f"{type(self).__name__}: no gradient of the loss in eval mode reached {', '.join(missing[:3])}; list "
                "these layers in ignore=, or give a loss_fn= that depends on them"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @override
    def _taps(self, group: Group) -> Sequence[Any]:
        flow = self.graph.flow
        assert flow is not None
        return [number for p in group.producers for number in flow.layers.get(p.weight, ())]


def slices_of(graph: ChannelGraph, group: Group, structure: Structure) -> list[Slice]:
    """The parameters that a group's channels stand for (theta_s), each once: those of all its coupled members.

    Weights that only read the channels are no part of it.
    """
    flow = graph.flow
    assert flow is not None
    reads = {(c.weight, c.dim) for c in group.consumers}
    made: dict[str, Slice] = {p.weight: (p.weight, p.dim, p.indices) for p in group.producers}
    for m in group.members:
        if not m.is_buffer and (m.name, m.dim) not in reads:
            made.setdefault(m.name, (m.name, m.dim, m.indices))
    if structure == "all":
        return list(made.values())

    def with_shift(weight: str) -> list[str]:
        """A weight, and the bias or the shift beside it."""
        owner = weight.rpartition(".")[0]
        beside = [n for n in made if n.rpartition(".")[0] == owner and len(graph.shapes[n]) == 1 and n != weight]
        return [weight, *(n for n in beside if n not in flow.layers)]

    producers = {p.weight: p for p in group.producers}
    layers = [n for n in made if n in producers or (len(graph.shapes[n]) > 1 and n in flow.layers)]
    scales = [n for n in made if n not in layers and n in flow.layers]
    names: list[str] = []
    for weight in layers:
        producer = producers.get(weight)
        if producer is not None:
            norms, gated = [n.gamma for n in producer.norms], producer.gated
        else:  # a depthwise layer, whose channels are those of the layer before it
            norms, gated = [n for n in scales if _follows(graph, n, weight)], False
        if structure == "filter" or not (norms or gated):
            names += with_shift(weight)
        else:
            names += [name for gamma in norms for name in with_shift(gamma)]
    return [made[name] for name in dict.fromkeys(names)]


def _follows(graph: ChannelGraph, weight: str, before: str) -> bool:
    """Whether a call with this weight works directly on what a call with another one made."""
    assert graph.flow is not None
    layers, calls = graph.flow.layers, graph.flow.calls
    return any(s is not None and s[0] in layers[before] for n in layers[weight] for s in calls[n].sources[:1])


def taps_of(graph: ChannelGraph, group: str, slices: Sequence[Slice]) -> list[Tap]:
    """What the layers and norms with these parameters return: linear in each one's weight and bias together."""
    assert graph.flow is not None
    return [tap for name, _, _ in slices for tap in graph.flow.made_by(name, group)]


def all_channels(parameters: Mapping[str, Tensor], slices: Mapping[str, Sequence[Slice]]) -> list[Tensor]:
    """The parameters of all channels at their places, 0 elsewhere (theta_struc), each once whatever groups it is of."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for part in slices.values():
        for name, dim, indices in part:
            masks[name].index_fill_(dim, indices.reshape(-1).to(masks[name].device), True)
    return [p.detach() * masks[name] for name, p in parameters.items()]


def by_channel(
    parameters: Mapping[str, Tensor], values: Sequence[Tensor | None], slices: Mapping[str, Sequence[Slice]]
) -> dict[str, Tensor]:
    """group -> (C,) float64 signed inner products of its channels' parameters with these values, a tensor for each."""
    given = dict(zip(parameters, values, strict=True))
    out = {}
    for group, part in slices.items():
        parts = []
        for name, dim, indices in part:
            parameter, value = parameters[name].detach(), given[name]
            if value is None:
                parts.append(torch.zeros(len(indices), dtype=torch.float64, device=parameter.device))
                continue
            product = (parameter * value.to(torch.promote_types(value.dtype, torch.float32))).movedim(dim, 0)
            each = product.reshape(len(product), -1).sum(dim=1, dtype=torch.float64)
            parts.append(each[indices.to(each.device)].sum(dim=1))
        out[group] = torch.stack(parts).sum(dim=0)
    return out


def checked(outputs: Any, samples: int, channels: int) -> Tensor:
    """Refuse outputs that SOSP-I cannot be computed from, with a ``ValueError`` that says what was given."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[0] != samples:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"SOSP(variant='I') needs outputs of shape ({samples}, O), one row per sample, got {got}; give "
            "outputs_fn=lambda pl_module, batch: ..., or use variant='H'"
        )
    if outputs.shape[1] * channels > _MOST_GRADIENTS:
        raise ValueError(
            f"SOSP(variant='I') differentiates {outputs.shape[1]} outputs by {channels} channels for every sample, "
            f"more than the {_MOST_GRADIENTS} derivatives it takes; use variant='H', or ignore= layers"
        )
    return outputs


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Frozen parameters require a gradient inside."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
