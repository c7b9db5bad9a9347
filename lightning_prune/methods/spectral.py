"""Spectral pruning: neurons go that cost little, and among these first those that flatten the loss.

Ebrahimi and Klabjan, 2021. A *reconstruction*, following the published description: only the abstract and the start of
the introduction were at hand (neurons go while a network trains from its start, curvature from Kronecker factors,
towards flatter regions by the spectral radius of the Hessian). How these make a score, a schedule and guards is our
reading, and no number of the paper is claimed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import surgery
from lightning_prune.batches import samples_in
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.curvature import (
    CURVATURE,
    Factors,
    RunningFactors,
    Spectrum,
    factor_layer,
    hessian_product,
    power_iteration,
)
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.graph.groups import ChannelGraph, Group, Producer
from lightning_prune.graph.views import LayerView
from lightning_prune.loop import loss_scale
from lightning_prune.pruner import Paper, named
from lightning_prune.ranking import top_mask
from lightning_prune.schedule import Gradual, Schedule
from lightning_prune.state import Fields

_PARTS = (0.5, 0.25, 0.125, 0.0)  # what an event does of its part when trials of more went wrong
_SUMS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__"])


def loss_increase(weights: Tensor, gradient: Tensor, a: Tensor, g: Tensor, units: Tensor) -> Tensor:
    """What removing each unit of a layer adds to the loss to second order, curvature from Kronecker factors.

    ``|<dL/dw, w>| + 1/2 w^T (A kron G) w`` over the weights w of the unit, bias included; for a unit of a single row j
    the second term is ``1/2 G_jj w_j^T A w_j``.

    Args:
        weights: (O, F), a row for each output, its bias at the end.
        gradient: (O, F) of the loss, the mean of several batches.
        a: (F, F) second moment of inputs.
        g: (O, O) second moment of gradients by outputs.
        units: (C, M) rows that each unit stands for.

    Returns:
        (C,) float64, at least 0, in the unit of the loss.

    Example:
        >>> a, g = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[2.0]])
        >>> loss_increase(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), a, g, torch.tensor([[0]]))
        tensor([6.], dtype=torch.float64)
    """
    weights, a, g = weights.double(), a.double(), g.double()
    slopes = (weights * gradient.double()).sum(dim=1)
    bends = (weights @ a @ weights.T) * g  # (O, O)
    rows = units.to(bends.device)
    return slopes[rows].sum(dim=1).abs() + 0.5 * bends[rows[:, :, None], rows[:, None, :]].sum(dim=(1, 2))


def spectral_score(increase: Tensor, ratios: Tensor, mu: float = 1.0) -> Tensor:
    """``D q^mu``: units that cost little go first, and of such the ones whose removal flattens most.

    Args:
        increase: (C,) D of `loss_increase`.
        ratios: (C,) q, the parts of the largest eigenvalues that are left without the unit, multiplied.
        mu: weight of flatness, at least 0.
    """
    return increase * ratios**mu


class Spectral(ChannelPruner):
    """Cut neurons and filters by Kronecker-factored curvature, towards a smaller spectral radius of the Hessian.

    Args:
        budget: see `ChannelPruner`.
        mu: weight of the spectral radius; 0 scores by the increase of the loss alone.
        decay: of the running averages of factors and gradients, per update.
        every: optimizer steps between updates; closer in short fits, five before the first event where there is room.
        most: part of a group's channels that may go at one event, while its part of the budget can be met so.
        residual: whether channels of residual streams may go as well.
        loss_growth: an event does less if a trial removal raises the loss by a larger part; None for no trial.
        radius_growth: the same for the spectral radius.
        samples: calibration samples of the trials and of the measured spectral radius.
        iterations: most Hessian-vector products of one measured spectral radius.
        min_channels: fewest channels a group keeps.
        **shared: see `ChannelPruner`.
    """

    paper = Paper("Ebrahimi and Klabjan", 2021, "https://arxiv.org/abs/2111.08577")
    own_fields: ClassVar[Fields] = {"radii": dict[str, float], "curvature": CURVATURE}
    needs = "gradients of training"
    default_schedule: ClassVar[Schedule] = Gradual(start=0.1, end=0.7)
    default_scope = "global"
    first_step = 1

    def __init__(
        self,
        budget: Budget | float,
        *,
        mu: float = 1.0,
        decay: float = 0.95,
        every: int = 10,
        most: float = 0.1,
        residual: bool = False,
        loss_growth: float | None = 0.05,
        radius_growth: float | None = 0.05,
        samples: int = 128,
        iterations: int = 20,
        min_channels: int = 2,
        **shared: Any,
    ) -> None:
        super().__init__(budget, min_channels=min_channels, **shared)
        if not 0 <= mu < math.inf:
            raise ValueError(f"mu must be at least 0 and finite, got {mu!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")
        if not 0 < most <= 1:
            raise ValueError(f"most must be in (0, 1], got {most!r}")
        for name, count in (("every", every), ("samples", samples), ("iterations", iterations)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {count!r}")
        for name, growth in (("loss_growth", loss_growth), ("radius_growth", radius_growth)):
            if growth is not None and not growth >= 0:
                raise ValueError(f"{name} must be at least 0, or None for no trial, got {growth!r}")
        self.mu = mu
        self.decay = decay
        self.every = every
        self.most = most
        self.residual = residual
        self.loss_growth = loss_growth
        self.radius_growth = radius_growth
        self.samples = samples
        self.iterations = iterations
        self._running = RunningFactors(decay)
        self._radii: dict[str, float] = {}  # of the last event, as they are logged
        self._found: dict[str, float] = {}  # of the event that runs
        self._share = 1.0  # of a group's channels that may go now
        self._batches: list[Any] = []  # of an event
        self._ratios: dict[str, Tensor] = {}
        self._before: ChannelGraph | None = None  # the graph as an event found it
        self._top: dict[str, Tensor] = {}  # the Hessian's top eigenvector then

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Kronecker factors by the name of the layer's weight, as they are now; empty once the last event is done."""
        return dict(self._running.factors)

    @override
    def initialise(self) -> None:
        self._radii = {}
        self._running.clear(surgery.applied(self.model))

    @override
    def own_state(self) -> dict[str, Any]:
        return {"radii": dict(self._radii), "curvature": self._running.state_dict()}

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        if state:
            self._radii = dict(state["radii"])
            self._running.load_state_dict(state["curvature"], next(self.model.parameters()).device)

    @override
    def _prepare(self, model: nn.Module) -> None:
        super()._prepare(model)
        self._know()

    @override
    def _catch_up(self, model: pl.LightningModule) -> None:
        super()._catch_up(model)
        if self._graph is not None and self._running.follow(surgery.applied(model)):
            self._know()

    def _know(self) -> None:
        made = [p.weight for group in self._groups for p in group.producers]
        read = [c.weight for group in self._groups for c in group.consumers]
        self._running.know(self.graph, [*made, *read])

    @override
    def _refusal(self, group: Group) -> str | None:
        reasons = [factor_layer(self.graph, p.weight) for p in _scored(self.graph, group)]
        missing = next((reason for reason in reasons if isinstance(reason, str)), None)
        if missing is None and not reasons:
            return "its channels come from embeddings alone, which have no Kronecker factors"
        if missing is None and not self.residual and _is_added(self.graph, group.name):
            return "it is a residual stream, of which Spectral leaves all channels unless residual=True"
        return missing

    @property
    def interval(self) -> int:
        """Optimizer steps between two updates of the factors."""
        return max(1, min(self.every, self._events[0].step // 5)) if self._events else self.every

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the samples of a step in some; batches that are accumulated belong to one step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        wanted = self._done < len(self._events) and self._steps % self.interval == 0
        if wanted and not self._running.looking:
            self._catch_up(pl_module)
            self._running.begin(pl_module)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self._running.expect(
            loss_scale(trainer) / (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        )

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        self._running.settle()

    @override
    def before_step(self, optimizer: Optimizer, held: Mapping[str, nn.Parameter]) -> None:
        self._running.note({name: parameter.grad for name, parameter in held.items()})

    @override
    def after_step(self) -> None:
        if self._running.looking:
            self._running.update(self.total)

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        alone = self._at_event is None or self._at_event[0] is None
        if alone:
            self._learn_alone()
        groups = {name: group[0].group for name, group in views.items()}
        self._check_seen(groups.values())
        if not alone:
            self._batches = list(self.calibrate(self.samples))
            self._before = self.graph
            self._found["before"], self._top = self._radius({}, self._staying(self._all()))
            if not math.isfinite(self._found["before"]):
                raise NonFiniteScore(
                    f"{type(self).__name__}: the Hessian of the loss on calibration data is not finite; look at the "
                    "loss and at the weights"
                )
        increase, self._ratios, kfac = self._by_layer(groups)
        self._found |= {"kfac": max(kfac.values()), **{f"kfac/{name}": radius for name, radius in kfac.items()}}
        return {name: spectral_score(value, self._ratios[name], self.mu) for name, value in increase.items()}

    def _by_layer(self, groups: Mapping[str, Group]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """group -> D and q, layer -> K-FAC radius; one layer after the other, as some factors are large."""
        increase = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in groups.items()}
        ratios, kfac = {name: torch.ones_like(zeros) for name, zeros in increase.items()}, {}
        parameters = dict(self.model.named_parameters())
        makes = [(name, p) for name, group in groups.items() for p in _scored(self.graph, group)]
        reads = [(name, c) for name, group in groups.items() for c in group.consumers]
        for weight, found in self._running.factors.items():
            layer = self._running.layers[weight]
            a, g = found.a, found.g
            inputs, outputs = Spectrum(a), Spectrum(g)
            kfac[weight.removesuffix(".weight")] = float(inputs.radius * outputs.radius)
            rows = layer.rows_of(parameters[weight], None if layer.bias is None else parameters[layer.bias])
            for name, p in makes:
                if p.weight == weight:
                    increase[name] += loss_increase(rows, found.mean_gradient, a, g, p.indices).cpu()
                    ratios[name] *= outputs.share_without(p.indices).cpu()
            for name, c in reads:
                if c.weight == weight:
                    ratios[name] *= inputs.share_without(layer.inputs_at(c.indices)).cpu()
        return increase, ratios, kfac

    def _check_seen(self, groups: Iterable[Group]) -> None:
        weights = [p.weight for group in groups for p in _scored(self.graph, group)]
        if missing := [name for name in weights if name not in self._running.factors]:
            raise NonFiniteScore(
                f"{type(self).__name__} has no Kronecker factors of {', '.join(missing[:3])}: a training batch with "
                "finite gradients must run first, and these layers must be trained and called with their own weight; "
                "move the event later or ignore= them"
            )

    def _learn_alone(self) -> None:
        """Factors from all calibration batches in eval mode, without a Trainer; ``.grad`` is left alone."""
        self._know()
        self._running.clear(surgery.applied(self.model))
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        try:
            self._running.begin(self.model)
            with self.evaluating(grad=True):
                for batch in self.calibrate(sys.maxsize):
                    self._running.expect(1.0)
                    found = torch.autograd.grad(self.loss(batch), list(trained.values()), allow_unused=True)
                    self._running.settle()
                    self._running.note(dict(zip(trained, found, strict=True)))
            self._running.update(self.total)
        finally:
            self._running.end()

    @override
    def _floor(self, group: str) -> int:
        size = int(self._alive[group].sum())
        least = min(size - 1, math.ceil((1 - self._share) * size - 1e-9))
        return max(self.min_channels, least - least % self.round_to)

    @override
    def select(self, scores: Mapping[str, Tensor], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, Tensor]:
        due = [i for i, event in enumerate(self._events) if i >= self._done and event.step <= self._steps]
        keep = self._gently(scores, fits)
        if due and due[-1] + 1 < len(self._events):  # the last event has to meet the budget, whatever it costs
            before = self._events[due[-1] - 1].progress if due[-1] else 0.0
            keep = self._guarded(scores, keep, before, self._events[due[-1]].progress)
        chosen: dict[str, Tensor] = self.same(keep)
        return chosen

    def _gently(self, scores: Mapping[str, Tensor], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, Tensor]:
        """Rank, with at most a part of each group going; with the least larger part that the budget can be met by."""
        share = self.most
        try:
            while True:
                self._share = min(1.0, share)
                try:
                    return super().select(scores, fits)
                except UnmeetableBudget:
                    if share >= 1:
                        raise
                    share *= 2
        finally:
            self._share = 1.0

    def _guarded(
        self, scores: Mapping[str, Tensor], keep: dict[str, Tensor], before: float, now: float
    ) -> dict[str, Tensor]:
        """Do less of an event if a trial of it goes wrong, but never less than what was due at the event before."""

        def fitting(progress: float) -> Callable[[Mapping[str, int]], bool]:
            budget, dense = self._budget_at(progress), self._dense_measure()
            return lambda counts: budget.fits(self._measured_cost(counts), dense)

        def within(progress: float) -> dict[str, Tensor]:
            fits = fitting(progress)
            if fits({name: len(score) for name, score in scores.items()}):
                return self._all()
            return self._gently(scores, fits)

        if self.loss_growth is not None:
            loss = self._loss()
            most = loss + self.loss_growth * abs(loss)
            for part in _PARTS:
                with self._trial(keep):
                    if self._loss() <= most:
                        break
                keep = within(before + part * (now - before))
        if self.radius_growth is not None and self.round_to == 1:
            radius = self._radius_of_trial(keep)
            if radius > (1 + self.radius_growth) * abs(self._found["before"]):
                flatter = self._flatter(keep)
                counts = {name: int(mask.sum()) for name, mask in flatter.items()}
                if fitting(before)(counts) and self._radius_of_trial(flatter) < radius:
                    keep = flatter
        return keep

    def _flatter(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give back half of the units that go: those whose removal flattens least."""
        gone = torch.cat([~mask for mask in keep.values()])
        ratios = torch.cat([self._ratios[name][self._alive[name]] for name in keep])
        back = torch.zeros_like(gone)
        back[gone] = top_mask(ratios[gone], (int(gone.sum()) + 1) // 2)
        parts = torch.split(back, [len(mask) for mask in keep.values()])
        return {name: mask | part for (name, mask), part in zip(keep.items(), parts, strict=True)}

    def _all(self) -> dict[str, Tensor]:
        """All channels that are there now."""
        return {name: torch.ones(int(mask.sum()), dtype=torch.bool) for name, mask in self._alive.items()}

    def _staying(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter -> what of it stays, 1 or 0, if only these of the channels that are there now do; group -> bool."""
        whole = {name: mask.clone() for name, mask in self._alive.items()}
        for name, mask in keep.items():
            whole[name][self._alive[name]] = mask.cpu()
        parameters = dict(self.model.named_parameters())
        out = {}
        for name, dims in self.graph.plan(whole).kept.items():
            out[name] = torch.ones_like(parameters[name])
            for dim, kept in dims.items():
                gone = torch.ones(out[name].shape[dim], dtype=torch.bool)
                gone[kept] = False
                out[name].index_fill_(dim, gone.nonzero().flatten().to(out[name].device), 0)
        return out

    @contextmanager
    def _trial(self, keep: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Zeros where channels would go, inside of the context."""
        stays = self._staying(keep)
        parameters = named(self.model, stays)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.masked_fill_(stays[name] == 0, 0)
            yield stays
        finally:
            for name, p in parameters.items():
                p.copy_(before[name])

    def _loss(self) -> float:
        """Mean loss of the event's batches, over all processes."""
        device = next(self.model.parameters()).device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        with self.evaluating():
            for batch in self._batches:
                count = samples_in(batch)
                sums += torch.stack([count * self.loss(batch).double(), sums.new_tensor(count)])
        sums = self.total(sums)
        return float(sums[0] / sums[1])

    def _radius_of_trial(self, keep: Mapping[str, Tensor]) -> float:
        with self._trial(keep) as stays:
            return abs(self._radius(self._top, stays)[0])

    def _radius(
        self, start: Mapping[str, Tensor], stays: Mapping[str, Tensor] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """The Hessian's eigenvalue of largest magnitude, with its sign, and its vector.

        Args:
            start: where power iteration begins, by parameter; chance is added, so that it may be anything.
            stays: what of the parameters is there, 1 or 0; all, of those that are not named.
        """
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        values = list(parameters.values())
        generator = self.generator("spectral radius")
        chance = torch.cat([torch.randn(p.numel(), generator=generator) for p in values]).to(values[0])
        known = torch.cat([start.get(name, torch.zeros_like(p)).flatten() for name, p in parameters.items()])
        there = torch.cat([(stays or {}).get(name, torch.ones_like(p)).flatten() for name, p in parameters.items()])
        sizes = [samples_in(batch) for batch in self._batches]
        samples = self.total(chance.new_tensor(float(sum(sizes))))

        def product(vector: Tensor) -> Tensor:
            out = torch.zeros_like(vector)
            for size, gradient in zip(sizes, gradients, strict=True):
                out += size * hessian_product(gradient, values, vector)
            return self.total(out) / samples * there

        with self.evaluating(grad=True), sdpa_kernel(SDPBackend.MATH), _plain_recurrence(self.model):
            gradients = [
                torch.autograd.grad(self.loss(batch), values, create_graph=True, allow_unused=True)
                for batch in self._batches
            ]
            radius, vector = power_iteration(product, (known + 0.1 * chance / chance.norm()) * there, self.iterations)
        parts = torch.split(vector, [p.numel() for p in values])
        return radius, {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}

    @override
    def after_prune(self, keep: Mapping[str, Tensor]) -> None:
        assert self._before is not None
        plan = self._before.plan(dict(keep))
        after = self._found["before"]
        if not plan.kept:
            pass
        elif self.cuts:
            for name, dims in plan.kept.items():
                for dim, kept in dims.items() if name in self._top else ():
                    self._top[name] = self._top[name].index_select(dim, kept.to(self._top[name].device))
            self._running.follow(surgery.applied(self.model))
            after = self._radius(self._top)[0]
        else:
            self._running.blank(plan)
            after = self._radius(self._top, self._staying(self._all()))[0]
        self._radii = {**self._found, "after": after}
        self._batches, self._top, self._before, self._ratios, self._found = [], {}, None, {}, {}
        if self._events[-1].step <= self._steps:
            self._running.clear(surgery.applied(self.model))

    @override
    def _row(self) -> dict[str, float]:
        return super()._row() | {f"prune/spectral_radius/{name}": radius for name, radius in self._radii.items()}

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._running.end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._running.end()


@contextmanager
def _plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers run without cuDNN, whose own cannot be differentiated twice."""
    enabled = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = enabled and not any(isinstance(m, nn.RNNBase) for m in model.modules())
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _scored(graph: ChannelGraph, group: Group) -> list[Producer]:
    """The producers that a group is scored by: embeddings have no factors, and are left out."""
    flow = graph.flow
    assert flow is not None
    scored = []
    for p in group.producers:
        made = [record for number in flow.layers.get(p.weight, ()) for record in flow.made[number]]
        if {record.kind for record in made if record.weight == p.weight} != {"embedding"}:
            scored.append(p)
    return scored


def _is_added(graph: ChannelGraph, group: str) -> bool:
    """Whether two tensors with a group's channels are added anywhere: a residual stream."""
    flow = graph.flow
    assert flow is not None
    for record in flow.calls:
        carrying = [s for s in record.sources if record.name in _SUMS and s is not None and flow.tap(*s, group)]
        if len(carrying) > 1:
            return True
    return False
