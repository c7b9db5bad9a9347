"""Iterative importance: in rounds, keep for each neuron the few connections that carry most of its signal.

Dekhovich, Tax, Sluiter and Bessa, 2024 (NNrelief). Differs from the paper: the share of the signal is solved for a
budget, met by exact count, unless ``alpha=`` gives the paper's own rule; shortcuts are not gated, as a gate is no
weight; layers other than linear ones and convolutions stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.errors import NonFiniteScore
from lightning_prune.graph.flow import Call, Flow
from lightning_prune.graph.groups import Group
from lightning_prune.pruner import NotYet, Paper, one_of
from lightning_prune.rewind import SNAPSHOT
from lightning_prune.schedule import Iterative
from lightning_prune.state import Fields
from lightning_prune.taps import Look, Seen, watching
from lightning_prune.terms import ARGUMENTS
from lightning_prune.weight_pruner import WeightPruner

_ADDITIONS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
_AT_ONCE = 2**24  # entries of maps computed together
_BELOW = 4.0  # farther than any two scores are apart

Masks = dict[str, Tensor]


def signal_score(importance: Tensor) -> Tensor:
    """Score the connections of each unit by the share of its signal that stronger ones do not carry.

    The fewest connections that carry a share alpha of the signal are those with a score above 1 - alpha.

    Args:
        importance: (U, N), at least 0: one row per unit, one column per incoming connection.

    Returns:
        (U, N) float64: 1 - (sum of what is stronger / sum of the row), in [0, 1); 0 for a connection without a signal.
        A unit's strongest connection has 1 + its share, in (1, 2], so that every alpha keeps it. Of equal ones that
        with the lower index is the weaker.

    Example:
        >>> signal_score(torch.tensor([[5.0, 3.0, 1.5, 0.5]]))
        tensor([[1.5000, 0.5000, 0.2000, 0.0500]], dtype=torch.float64)
    """
    values, order = torch.sort(importance.double().flip(1), dim=1, descending=True, stable=True)
    running = values.cumsum(dim=1)
    total = running[:, -1:]
    scores = 1 - F.pad(running, (1, -1)) / total
    scores[:, :1] = 1 + values[:, :1] / total
    scores = torch.where(values > 0, scores, 0.0)
    return torch.empty_like(scores).scatter_(1, order, scores).flip(1)


def linear_importance(weight: Tensor, activity: Tensor) -> Tensor:
    """Mean absolute signal of each connection of a linear layer: ``|w| * mean |x|`` (eq. 1).

    Args:
        weight: (out, in).
        activity: (in,) mean of the absolute inputs.

    Returns:
        (out, in).
    """
    return weight.abs() * activity


def kernel_importance(kernels: Tensor, activity: Tensor, convolution: str, power: int, **settings: Any) -> Tensor:
    """Sum over positions of a power of each kernel's signal: the mean absolute map convolved with the absolute kernel.

    Such a map is a sum of the kernel's taps times shifts of the input map, so that products of shifts say it all, and
    the maps of all kernels are never made.

    Args:
        kernels: (out, in / groups, *kernel), one slice per connection; also of a transposed convolution.
        activity: (in, *size) mean over samples of the absolute input maps.
        convolution: torch function that convolves, such as "conv2d".
        power: 2 for the square of a Frobenius norm, 1 for a sum.
        **settings: groups; stride, padding, dilation, output_padding.

    Returns:
        (out, in / groups).
    """
    groups, window = settings.pop("groups", 1), kernels.shape[2:]
    made, read, taps = kernels.shape[0] // groups, kernels.shape[1], math.prod(window)
    of_channel = kernels.abs().reshape(groups, made, read, taps).transpose(1, 2).reshape(-1, made, taps)
    each = torch.eye(taps, dtype=kernels.dtype, device=kernels.device).reshape(taps, 1, *window)
    if "transpose" in convolution:
        each = each.transpose(0, 1)
    at_once = max(1, _AT_ONCE // (taps * (taps + activity[0].numel())))
    found = []
    for w, maps in zip(torch.split(of_channel, at_once), torch.split(activity, at_once), strict=True):
        shifts = getattr(F, convolution)(maps.unsqueeze(1), each, **settings).flatten(2)  # (c, taps, positions)
        if power == 1:
            found.append((w * shifts.sum(dim=2).unsqueeze(1)).sum(dim=2))
        else:
            found.append(((w @ (shifts @ shifts.mT)) * w).sum(dim=2))
    return torch.cat(found).reshape(groups, read, made).transpose(1, 2).reshape(-1, read)


@dataclass
class _Activity:
    """Absolute values, summed over samples in float64.

    Attributes:
        sums: what is summed, by key.
        counts: of how many samples.
        calls: how a layer was called, by the key of its input: numbers and names only.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, key: str, values: Tensor, batch: int) -> None:
        """Add (N, ...) values of a forward, N a multiple of its samples or not: their mean counts for each sample."""
        self._sum(key, values.detach().double().abs().mean(dim=0) * batch, batch)

    def join(self, other: _Activity) -> bool:
        """Add what another one has summed if all of that is finite; returns whether it is."""
        if not all(bool(torch.isfinite(value).all()) for value in other.sums.values()):
            return False
        for key, value in other.sums.items():
            self._sum(key, value, other.counts[key])
        self.calls.update(other.calls)
        return True

    def _sum(self, key: str, value: Tensor, samples: int) -> None:
        before = self.sums.get(key)
        if before is not None and before.shape != value.shape:
            raise ValueError(
                f"what goes into {key.partition(' ')[0]!r} is {tuple(before.shape)} at one time and "
                f"{tuple(value.shape)} at another, which has no mean map; give calibration= of one size"
            )
        self.sums[key] = value if before is None else before + value
        self.counts[key] = self.counts.get(key, 0) + samples

    def means(
        self, total: Callable[[Tensor], Tensor], same: Callable[[Any], Any], device: torch.device
    ) -> dict[str, Tensor]:
        """Means over the samples of all processes; the first one, which has the first batch, says of what."""
        shapes: dict[str, tuple[int, ...]] = same({key: tuple(value.shape) for key, value in self.sums.items()})
        self.calls = same(self.calls)
        out = {}
        for key, shape in shapes.items():
            value = self.sums.get(key, torch.zeros(shape, dtype=torch.float64, device=device))
            count = torch.tensor(float(self.counts.get(key, 0)), dtype=torch.float64, device=value.device)
            out[key] = total(value) / total(count)
        return out


def _kernels(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A convolution's weight as (out, in / groups, *kernel)."""
    if not transposed:
        return weight
    read, made = weight.shape[0] // groups, weight.shape[1]
    apart = weight.reshape(groups, read, made, *weight.shape[2:])
    return apart.transpose(1, 2).reshape(groups * made, read, *weight.shape[2:])


def _spread(table: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """(out, in / groups) numbers of kernels, or of single weights, in the shape of the weight."""
    if transposed:
        table = table.reshape(groups, -1, table.shape[1]).transpose(1, 2).flatten(0, 1)
    return table.reshape(*table.shape, *(1 for _ in weight.shape[2:])).expand(weight.shape)


class IterativeImportance(WeightPruner):
    """Mask the connections that carry least of their neuron's signal on calibration data; train on; again.

    Connections are single weights of linear layers and whole kernels of convolutions.

    Args:
        budget: see `WeightPruner`; the share of the signal that is kept is solved for it. None with ``alpha``.
        alpha: instead of a budget: the share of its signal that each unit keeps at each event; how many weights are
            left is an outcome.
        alpha_linear: the share in linear layers, if it is another one than in convolutions.
        tolerance: with ``alpha``: stop once ``monitor`` is worse by more than this than it was before the first event,
            and go back to the network before the event that did it. In the monitored metric's own unit.
        monitor: metric of validation that ``tolerance`` is about.
        mode: whether a larger ("max") or a smaller ("min") one is better.
        samples: calibration samples that activity is a mean over, at least; in eval mode, without gradients.
        spatial: how a kernel's map becomes a number: "frobenius" norm, or "sum" over positions.
        rewind_to: "init" sets all that stays back to its values at the start of the fit after each event, with fresh
            optimizer state; None trains on.
        **shared: see `WeightPruner`; the scope is "global": one share for all units.
    """

    paper = Paper("Dekhovich et al.", 2024, "https://arxiv.org/abs/2109.10795")
    own_fields: ClassVar[Fields] = {
        "initial": (SNAPSHOT, None),
        "dense_metric": float | None,
        "metric": list[float] | None,
        "before": ({"state": SNAPSHOT, "masks": dict[str, Tensor], "step": int}, None),
        "stopped": bool,
    }
    needs = "calibration data"
    default_schedule = Iterative(start=0.1, end=0.7, events=10)
    default_scope = "global"

    def __init__(
        self,
        budget: Budget | float | None = None,
        *,
        alpha: float | None = None,
        alpha_linear: float | None = None,
        tolerance: float | None = None,
        monitor: str = "val/acc",
        mode: Literal["max", "min"] = "max",
        samples: int = 1000,
        spatial: Literal["frobenius", "sum"] = "frobenius",
        rewind_to: Literal["init"] | None = None,
        **shared: Any,
    ) -> None:
        if (budget is None) == (alpha is None):
            raise ValueError("give either a budget, or alpha= for the paper's own rule, whose outcome is no budget")
        super().__init__(1.0 if budget is None else budget, **shared)
        for name, value in (("alpha", alpha), ("alpha_linear", alpha_linear)):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value!r}")
        if alpha is None and (alpha_linear is not None or tolerance is not None):
            raise ValueError("alpha_linear= and tolerance= go with alpha=; a budget is met whatever they say")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples must be an int of at least 1, got {samples!r}")
        one_of("mode", mode, ("max", "min"))
        one_of("spatial", spatial, ("frobenius", "sum"))
        if rewind_to is not None:
            one_of("rewind_to", rewind_to, ("init",))
        self.alpha = alpha
        self.alpha_linear = alpha if alpha_linear is None else alpha_linear
        self.tolerance = tolerance
        self.monitor = monitor
        self.mode = mode
        self.samples = samples
        self.spatial = spatial
        self.rewind_to = rewind_to
        self._now = _Activity()  # of the batch that runs
        self._guarded: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._initial: dict[str, Any] | None = None  # what rewind_to="init" goes back to
        self._dense_metric: float | None = None
        self._metric: list[float] | None = None  # the last of validation, and the step it was taken at
        self._before: dict[str, Any] | None = None  # state and masks in front of the last event
        self._stopped = False

    # what is pruned

    @override
    def _prepare(self, model: nn.Module) -> None:
        whole = {name: why for name in self.graph.weights if (why := self._why_whole(name)) is not None}
        scored = tuple(name for name in self.graph.weights if name not in whole)
        self._graph = replace(self.graph, weights=scored, frozen={**self.graph.frozen, **whole})
        self._frozen = self.graph.frozen
        super()._prepare(model)
        known = {*scored, *(bias for bias, weight in self._biases().items() if weight in self.weights)}
        if odd := [name for name in self.weights if name not in known]:
            raise ValueError(
                f"IterativeImportance scores connections and biases of linear layers and convolutions that it prunes; "
                f"{odd[0]!r} is none, take it out of include="
            )
        self._guarded = set(scored) - {p.weight for group in self.graph.groups for p in group.producers}

    def _why_whole(self, weight: str) -> str | None:
        """Why a weight is not scored; None if it is."""
        records = [self._flow.calls[number] for number in self._flow.layers.get(weight, ())]
        if not records:
            return "no call that reads it could be followed"
        for record in records:
            if record.name not in ARGUMENTS:
                return f"{record.name}() reads it, whose connections the method does not know"
            if len(record.sources) > 1 and record.sources[1] is not None:
                return "it is computed anew in each forward"
        return None

    @property
    def _flow(self) -> Flow:
        assert self.graph.flow is not None
        return self.graph.flow

    def _biases(self) -> dict[str, str]:
        """Name of a bias -> the weight whose layer it is of."""
        made = [layer for number in self._flow.made for layer in self._flow.made[number]]
        return {m.bias: m.weight for m in made if m.kind != "norm" and m.bias is not None and m.weight is not None}

    # scores

    @override
    def scores(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        activity = self._look()
        means, biases = activity.sums, {weight: bias for bias, weight in self._biases().items()}
        out: Masks = {}
        for name in self._matrices():
            weight, calls = weights[name].detach(), {k: c for k, c in activity.calls.items() if c["weight"] == name}
            table, bias = self._importance(weight, means, calls)
            joined = table if bias is None else torch.cat([table, bias.unsqueeze(1)], dim=1)
            ranks = torch.minimum(signal_score(joined), self._share_of_sum(name, means, len(table)).to(table.device))
            if name in self._guarded:
                ranks = torch.where(ranks > 1, ranks + _BELOW, ranks)
            first = next(iter(calls.values()))
            out[name] = _spread(ranks[:, : table.shape[1]], weight, "transpose" in first["name"], first["groups"])
            if bias is not None and biases.get(name) in weights:
                out[biases[name]] = ranks[:, -1]
        return {name: score.masked_fill(~self.alive(name), -torch.inf) for name, score in out.items()}

    def _importance(
        self, weight: Tensor, means: Mapping[str, Tensor], calls: Mapping[str, Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor | None]:
        """(U, N) of a layer's connections and (U,) of its biases, over all its calls."""
        first = next(iter(calls.values()))
        bias = None if first["bias"] is None else self.model.get_parameter(first["bias"]).detach().double().abs()
        if first["name"] == "linear":
            return linear_importance(weight.double(), torch.stack([means[key] for key in calls]).mean(dim=0)), bias
        kernels = _kernels(weight.double(), "transpose" in first["name"], first["groups"])
        power, total = (2 if self.spatial == "frobenius" else 1), torch.zeros((), dtype=torch.float64)
        for key, call in calls.items():
            found = kernel_importance(
                kernels, means[key], call["name"], power, groups=call["groups"], **call["settings"]
            )
            total = total.to(found) + found
        places = sum(call["places"] for call in calls.values())
        return total ** (1 / power), None if bias is None else bias * places ** (1 / power)

    def _share_of_sum(self, weight: str, means: Mapping[str, Tensor], units: int) -> Tensor:
        """(U, 1) share of each unit in a residual sum where it is the smaller side; infinite where it is not."""
        limit = torch.full((units, 1), torch.inf, dtype=torch.float64)
        for number, side in self._sides(weight):
            if f"sum {number} {side}" in means:
                own, other = (means[f"sum {number} {s}"].flatten(1).norm(dim=1).cpu() for s in (side, 1 - side))
                share = torch.where(own < other, own / (own + other), torch.inf)
                limit = torch.minimum(limit, share.unsqueeze(1)) if len(share) == units else limit
        return limit

    def _sides(self, weight: str) -> list[tuple[int, int]]:
        """Sums of two maps that a layer's output, or that of the norm behind it, is a side of: call, and which side."""
        return [
            (number, side)
            for number, record in enumerate(self._flow.calls)
            if record.name in _ADDITIONS and len(record.sources) == 2 and None not in record.sources
            for side, source in enumerate(record.sources)
            if weight in self._made_by(source)
        ]

    def _made_by(self, source: tuple[int, int] | None) -> list[str | None]:
        """Weights of the layers that made a tensor, a norm in between aside."""
        while source is not None:
            made = self._flow.made.get(source[0], ())
            if not made or any(layer.kind != "norm" for layer in made):
                return [layer.weight for layer in made]
            source = next(iter(self._flow.calls[source[0]].sources), None)
        return []

    # activity

    def _look(self) -> _Activity:
        """Means of absolute inputs of layers, and of sides of residual sums, over calibration samples.

        Raises:
            NonFiniteScore: if there is no finite batch, or a layer never ran.
        """
        every, looks, batches, left_out = _Activity(), self._looks(), 0, 0
        with self.evaluating(), watching(self.model, looks):
            for batch in self.calibrate(self.samples):
                self._now = _Activity()
                self.loss(batch)
                batches += 1
                left_out += not every.join(self._now)
        device = next(iter(self.weights.values())).device
        counts = self.total(torch.tensor([batches, left_out], dtype=torch.float64, device=device)).tolist()
        every.sums = every.means(self.total, self.same, device)
        if unseen := set(self._matrices()) - {call["weight"] for call in every.calls.values()}:
            raise NonFiniteScore(
                f"IterativeImportance: of {int(counts[0])} calibration batches {int(counts[1])} were not finite, "
                f"and none of the others runs {min(unseen)!r}; look at the weights, list the layer in ignore=, or give "
                "a loss_fn= that runs it"
            )
        if counts[1]:
            rank_zero_warn(f"IterativeImportance left {int(counts[1])} calibration batches out that were not finite")
        return every

    def _looks(self) -> dict[Call, list[Look]]:
        out: dict[Call, list[Look]] = {}
        axes: dict[int, int] = {}
        for name in self._matrices():
            for number in self._flow.layers[name]:
                out.setdefault(self._flow.call(number), []).append(partial(self._look_at_layer, name, number))
            axes.update({number: -1 if self._is_linear(name) else 1 for number, _ in self._sides(name)})
        for number, axis in axes.items():
            out.setdefault(self._flow.call(number), []).append(partial(self._look_at_sum, number, axis))
        return out

    def _look_at_layer(self, weight: str, number: int, seen: Seen) -> None:
        given = dict(zip(ARGUMENTS[seen.call.name], seen.args, strict=False)) | dict(seen.kwargs)
        x, key = given["input"], f"{weight} {number}"
        if seen.call.name == "linear":
            x = x.reshape(-1, x.shape[-1])  # further dimensions are so many samples
        elif x.ndim < self.weights[weight].ndim:
            x = x.unsqueeze(0)  # a single one, without an axis of its own
        self._now.add(key, x, seen.batch)
        self._now.calls[key] = {
            "weight": weight,
            "name": seen.call.name,
            "groups": int(given.get("groups", 1)),
            "settings": {k: given[k] for k in ("stride", "padding", "dilation", "output_padding") if k in given},
            "bias": self._names.get(id(given.get("bias"))),
            "places": math.prod(seen.out.shape[2 - (seen.out.ndim < self.weights[weight].ndim) :]),
        }

    def _look_at_sum(self, number: int, axis: int, seen: Seen) -> None:
        sides = [x for x in seen.args if isinstance(x, Tensor)]
        if len(sides) != 2 or seen.kwargs or sides[0].shape != sides[1].shape or seen.out.ndim < 2:
            return  # one is repeated, or scaled
        if seen.out.data_ptr() == sides[0].data_ptr():  # written to in place: what it was before
            sides[0] = seen.out - sides[1]
        for side, map_ in enumerate(sides):
            self._now.add(f"sum {number} {side}", map_.movedim(axis, 1), seen.batch)

    def _is_linear(self, weight: str) -> bool:
        return self._flow.calls[self._flow.layers[weight][0]].name == "linear"

    def _matrices(self) -> list[str]:
        return [name for name in self.weights if name in self._flow.layers and name not in self._biases()]

    # units that nobody hears

    def _units(self) -> Iterator[Group]:
        """Groups of units whose removal changes nothing else than what is read of them."""
        return (group for group in self.graph.groups if group.exact and group.consumers)

    def _unread(self, masks: Mapping[str, Tensor]) -> Masks:
        """Group -> (C,) bool: channels without an outgoing connection."""
        out = {}
        for group in self._units():
            unread = torch.ones(group.size, dtype=torch.bool)
            for reader in group.consumers:
                mask = masks.get(reader.weight)
                if mask is None:
                    unread[:] = False
                else:
                    unread &= ~mask.movedim(reader.dim, 0).flatten(1).any(dim=1).cpu()[reader.indices].any(dim=1)
            out[group.name] = unread
        return out

    def _lowered(self, scores: Mapping[str, Tensor], units: Mapping[str, Tensor]) -> Masks:
        """Scores with all connections, and named biases, of some units below those of all others."""
        out = dict(scores)
        for group in self._units():
            places = [(p.weight, p.dim, p.indices) for p in group.producers]
            places += [(p.bias, 0, p.indices) for p in group.producers if p.bias is not None]
            places += [(c.weight, c.dim, c.indices) for c in group.consumers]
            for name, dim, indices in places:
                if name in out and bool(units[group.name].any()):
                    lower = torch.zeros(out[name].shape[dim], dtype=torch.float64)
                    lower[indices[units[group.name]].flatten()] = _BELOW
                    shape = [-1 if d == dim else 1 for d in range(out[name].ndim)]
                    out[name] = out[name] - lower.reshape(shape).to(out[name].device)
        return out

    # choice

    @override
    def select(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        if self.alpha is not None:
            least = {name: 1 - self._alpha_of(name) for name in scores}
            return self._cleaned(scores, lambda now: {name: score > least[name] for name, score in now.items()})
        ranked = super().select
        return self._cleaned(scores, lambda now: ranked(_kernel_by_kernel(now, self.weights), allowance, price))

    def _alpha_of(self, name: str) -> float:
        weight = self._biases().get(name, name)
        alpha = self.alpha_linear if self._is_linear(weight) else self.alpha
        assert alpha is not None
        return alpha

    def _cleaned(self, scores: Mapping[str, Tensor], choose: Callable[[Mapping[str, Tensor]], Masks]) -> Masks:
        """Choose again, without the units that nothing reads any more, until there are no others."""
        gone = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in self._units()}
        while True:
            masks = choose(scores)
            unread = self._unread(masks)
            # a group that nothing reads at all is waiting for its readers: without it the network would fall apart
            new = {name: units & ~gone[name] for name, units in unread.items() if not (units | gone[name]).all()}
            if not any(bool(units.any()) for units in new.values()):
                return masks
            none = {name: torch.zeros_like(units) for name, units in gone.items()}
            scores = self._lowered(scores, none | new)
            gone |= {name: gone[name] | units for name, units in new.items()}

    # rounds

    @override
    def initialise(self) -> None:
        self._forget()
        if self.rewind_to is not None:
            self._initial = {key: values for key, values in self.snapshot().items() if key in ("model", "averages")}

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        if self._stopped:
            return False
        if self.tolerance is not None:
            if not self._is_judged():
                raise NotYet(f"no validation since the last event says {self.monitor}")
            if self._gave_way():
                return True
            masks = {name: self.alive(name).cpu() for name in self.weights}
            state = {key: value for key, value in self.snapshot().items() if key in ("model", "averages", "optimizers")}
            self._before = {"state": state, "masks": masks, "step": self._steps}
        changed = super()._decide_and_apply(trainer, model, progress)
        if changed and self._initial is not None:
            self.rewind({**self._initial, "optimizers": self._optimizers(lambda number, state: {**state, "state": {}})})
        return changed

    @override
    def after_step(self) -> None:
        """The last event is judged as long after it as events are apart."""
        if self._before is None or self._stopped or self._done < len(self._events):
            return
        steps = [0, *(event.step for event in self._events)]
        if self._steps >= self._before["step"] + steps[-1] - steps[-2] and self._is_judged() and not self._gave_way():
            self._before = None

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.tolerance is None or trainer.sanity_checking or self._graph is None:
            return
        if self.monitor not in trainer.callback_metrics:
            raise RuntimeError(
                f"monitor={self.monitor!r} is not among the metrics of validation; there are "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        self._metric = [float(trainer.callback_metrics[self.monitor]), float(self._steps)]

    def _is_judged(self) -> bool:
        """Whether validation has looked at the network since it trained on after the last event.

        A step later at the earliest, also where a fit goes on from a checkpoint that was written after it.
        """
        since = -1 if self._before is None else self._before["step"]
        return self._metric is not None and since < self._metric[1] < self._steps

    def _gave_way(self) -> bool:
        """Go back to the network before the last event, for good, if that event cost more than the tolerance."""
        assert self._metric is not None
        value = float(self.same(self._metric[0]))
        if self._dense_metric is None:
            self._dense_metric = value
        if not self._is_worse(value):
            return False
        assert self._before is not None
        rank_zero_info(
            f"IterativeImportance stops at step {self._steps}: {self.monitor} is {value:.4f}, was "
            f"{self._dense_metric:.4f} dense, and may lose {self.tolerance:g}; back to before the event at step "
            f"{self._before['step']}"
        )
        self.set_masks(self._before["masks"])
        before = self._before["state"]
        # the learning rate goes on
        held = self._optimizers(lambda number, state: {**state, "state": before["optimizers"][number][1]["state"]})
        self.rewind({**before, "optimizers": held})
        self._stopped, self._before = True, None
        self._events = tuple(event for event in self._events if event.step <= self._steps)
        return True

    def _optimizers(self, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> list[Any]:
        """The optimizers of a snapshot of now, with other states."""
        now = self.snapshot()["optimizers"]
        return [[kind, change(number, state)] for number, (kind, state) in enumerate(now)]

    def _is_worse(self, value: float) -> bool:
        assert self.tolerance is not None
        assert self._dense_metric is not None
        lost = self._dense_metric - value if self.mode == "max" else value - self._dense_metric
        return not lost <= self.tolerance

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._before is None or self._metric is None or self._metric[1] <= self._before["step"]:
            return
        if self._is_worse(self._metric[0]):
            rank_zero_warn(
                f"IterativeImportance: {self.monitor} ends at {self._metric[0]:.4f}, more than {self.tolerance:g} "
                f"worse than {self._dense_metric:.4f} before the first event, too late to go back; let events end "
                "earlier"
            )

    @override
    def _cannot_follow(self) -> str | None:
        if self.rewind_to is None and self.tolerance is None:
            return None
        return "rewind_to= and tolerance= go back to earlier weights, which would have to be cut as well"

    @override
    def own_state(self) -> dict[str, Any]:
        return {
            "initial": self._initial,
            "dense_metric": self._dense_metric,
            "metric": self._metric,
            "before": self._before,
            "stopped": self._stopped,
        }

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._initial, self._before = state["initial"], state["before"]
        self._dense_metric, self._metric = state["dense_metric"], state["metric"]
        self._stopped = state["stopped"]


def _kernel_by_kernel(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Masks:
    """Other scores of the same order, without ties: kernel after kernel, and in each its largest weights first.

    So one kernel at most is paid for in part.
    """
    whole = {name: score.flatten(2).amax(dim=2) if score.ndim > 2 else score for name, score in scores.items()}
    order = torch.sort(torch.cat([score.reshape(-1) for score in whole.values()]), stable=True).indices
    places = torch.empty(len(order), dtype=torch.float64, device=order.device)
    places[order] = torch.arange(len(order), dtype=torch.float64, device=order.device)
    out = {}
    parts = torch.split(places, [score.numel() for score in whole.values()])
    for (name, score), part in zip(scores.items(), parts, strict=True):
        place, size = part.reshape(whole[name].shape), weights[name].detach().double().abs()
        if score.ndim > 2:
            shape = [*place.shape, *(1 for _ in score.shape[2:])]
            largest = size.flatten(2).amax(dim=2).clamp_min(torch.finfo(torch.float64).tiny)
            place = place.reshape(shape) + 0.5 * size / largest.reshape(shape)
        out[name] = place.masked_fill(score.isneginf(), -torch.inf)
    return out
