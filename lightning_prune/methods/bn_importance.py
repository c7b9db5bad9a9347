"""BN importance: drop the channels that batch norm says are small behind their activation, without any data.

Oh, Kim, Baik, Hong and Lee, 2022. The score, the ranking and the schedule are a *reconstruction*: the paper's abstract
says that batch norm's parameters give the distribution of what an activation puts out, and that importance is computed
from it; which functional of the distribution it is, and how layers are compared, is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.absorb import absorbable
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.compensation import Compensation
from lightning_prune.errors import UnmeetableBudget
from lightning_prune.graph.flow import Activation, Flow
from lightning_prune.graph.groups import ChannelGraph, Consumer, Group
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper, one_of
from lightning_prune.schedule import OneShot

Functional = Literal["mean_abs", "second_moment", "std"]

_CLAMPS = frozenset(["identity", "relu", "relu6", "hardtanh", "clamp", "clamp_min"])
_SUMS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__"])
_JOINS = frozenset(["cat", "concat", "concatenate"])
IDENTITY = Activation("identity", lambda x: x)


class Moments(NamedTuple):
    """Expectations of a, |a| and a^2, of the same shape, float64."""

    mean: Tensor
    magnitude: Tensor
    square: Tensor

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of a."""
        return (self.square - self.mean.square()).clamp_min(0).sqrt()


def rectified(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moment of max(z, 0) for Gaussian z.

    Args:
        mean: of z, float64.
        deviation: of z, at least 0, of the same shape.

    Example:
        >>> rectified(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
        (tensor(1.0833, dtype=torch.float64), tensor(1.9247, dtype=torch.float64))
    """
    t = mean / deviation.clamp_min(torch.finfo(mean.dtype).tiny)
    above = 0.5 * torch.erfc(-t / math.sqrt(2))
    density = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    first = mean * above + deviation * density
    second = (mean.square() + deviation.square()) * above + mean * deviation * density
    return first.clamp_min(0), second.clamp_min(0)


def moments(mean: Tensor, deviation: Tensor, activation: Activation = IDENTITY) -> Moments:
    """Moments of f(z) for Gaussian z: in closed form where f is piecewise linear, else by 2001 trapezoids.

    Args:
        mean: of z.
        deviation: of z, at least 0, of the same shape.
        activation: f.
    """
    mean, deviation = mean.detach().double(), deviation.detach().double()
    if activation.name == "leaky_relu":
        slope = -float(activation.function(torch.tensor(-1.0)))
        (first, second), (below, squared) = rectified(mean, deviation), rectified(-mean, deviation)
        return Moments(first - slope * below, first + abs(slope) * below, second + slope**2 * squared)
    if activation.name in _CLAMPS:
        ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
        low, high = activation.function(ends).tolist()
        first, second = _clamped(mean, deviation, max(low, 0.0), max(high, 0.0))
        below, squared = _clamped(-mean, deviation, max(-high, 0.0), max(-low, 0.0))
        return Moments(first - below, first + below, second + squared)
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64, device=mean.device)
    weights = torch.exp(-0.5 * x.square())
    a = activation.function(mean[..., None] + deviation[..., None] * x)
    mean, magnitude, square = ((v @ weights) / weights.sum() for v in (a, a.abs(), a.square()))
    return Moments(mean, magnitude, square)


def _clamped(mean: Tensor, deviation: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """First and second moment of z between two bounds, of which the lower is at least 0 and finite."""
    first, second = rectified(mean - low, deviation)
    if high < math.inf:
        over, squared = rectified(mean - high, deviation)
        first, second = first - over, second - squared - 2 * (high - low) * over
    return low + first, low**2 + 2 * low * first + second


def bn_importance_score(
    gamma: Tensor, beta: Tensor, activation: Activation = IDENTITY, functional: Functional = "mean_abs"
) -> Tensor:
    """Score each channel by a functional of f(z), z Gaussian with mean beta and standard deviation |gamma|.

    Args:
        gamma, beta: (C,), of the batch norm.
        activation: f.
        functional: "mean_abs" for E|f|, "second_moment" for E f^2, or "std" for the standard deviation of f.

    Returns:
        (C,) float64, at least 0.

    Example:
        >>> bn_importance_score(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 0.0]))
        tensor([0.7979, 1.5958], dtype=torch.float64)
    """
    return _value(moments(beta, gamma.abs(), activation), functional)


def _value(found: Moments, functional: Functional) -> Tensor:
    return {"mean_abs": found.magnitude, "second_moment": found.square, "std": found.deviation}[functional]


class BNImportance(ChannelPruner):
    """Cut the channels that are small behind their activation, told from batch norm's scale and shift; no data needed.

    Args:
        budget: see `ChannelPruner`.
        functional: of the distribution: "mean_abs", its expected magnitude; "second_moment"; or "std", by which a
            channel that is always on but never changes goes first.
        normalize: None, or "layer_mean": scores are divided by their group's mean.
        coupled: "skip" leaves streams that several layers are added up in whole; "sum" scores them as sums of
            independent Gaussians.
        floor: fraction of its channels that each group keeps at least.
        absorb_means: add what removed channels are expected to say to the bias of their readers, or take it off the
            running mean of the batch norm behind them; in place of ``absorb``.
        **shared: see `ChannelPruner`; the scope is "global" by default.
    """

    paper = Paper("Oh et al.", 2022, "https://arxiv.org/abs/2112.01155")
    default_schedule = OneShot(0.5)
    default_scope = "global"

    def __init__(
        self,
        budget: Budget | float,
        *,
        functional: Functional = "mean_abs",
        normalize: Literal["layer_mean"] | None = None,
        coupled: Literal["skip", "sum"] = "skip",
        floor: float = 0.1,
        absorb_means: bool = False,
        **shared: Any,
    ) -> None:
        if absorb_means and shared.setdefault("absorb", False) is not False:
            raise ValueError("absorb_means=True adds the constants that absorb= would add: leave absorb= out")
        super().__init__(budget, **shared)
        one_of("functional", functional, ("mean_abs", "second_moment", "std"))
        one_of("coupled", coupled, ("skip", "sum"))
        if normalize not in (None, "layer_mean"):
            raise ValueError(f"normalize must be None or 'layer_mean', got {normalize!r}")
        if not 0 <= floor < 1:
            raise ValueError(f"floor must be a fraction in [0, 1), got {floor!r}")
        self.functional: Functional = functional
        self.normalize = normalize
        self.coupled = coupled
        self.floor = floor
        self.absorb_means = absorb_means

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        found = _Distributions(self.graph)
        out = {name: self._score(found, group[0].group) for name, group in views.items()}
        if self.normalize is not None:
            out = {name: score / score.mean().clamp_min(torch.finfo(score.dtype).tiny) for name, score in out.items()}
        return out

    def _score(self, found: _Distributions, group: Group) -> Tensor:
        read = [_value(m, self.functional).mean(dim=1) for m in found.read(group) if m is not None]
        score = torch.stack(read).mean(dim=0)  # of a stream that is read in several places
        for before in found.before_followers(group):  # a channel that is dead in front of a depthwise layer is dead
            score = torch.minimum(score, _value(before, self.functional).mean(dim=1))
        return score

    @override
    def _floor(self, group: str) -> int:
        return max(super()._floor(group), int(self.floor * self._dense_sizes[group] + 1e-9))

    @override
    def _check_reachable(self) -> None:
        try:
            super()._check_reachable()
        except UnmeetableBudget as error:
            streams = ", or let streams go as well with coupled='sum'" if self.coupled == "skip" else ""
            raise UnmeetableBudget(f"{error}; here also lower floor={self.floor:g}{streams}") from error

    @override
    def _refusal(self, group: Group) -> str | None:
        found = _Distributions(self.graph)
        known = [m for m in found.read(group) if m is not None]
        found.before_followers(group)
        if self.coupled == "skip" and found.summed:
            return "its channels are sums of what several layers make; coupled='sum' scores them"
        if not known:
            return "no batch norm says how its channels are distributed where they are read"
        return super()._refusal(group)

    @override
    def compensate(self, keep: Mapping[str, Tensor]) -> Compensation:
        if not self.absorb_means:
            return Compensation()
        found = _Distributions(self.graph)
        constants: dict[tuple[str, int], Tensor] = {}
        for name, mask in keep.items():
            group = self.graph.group(name)
            for reader in group.consumers:
                said = found.read(group, reader)
                if len(said) == 1 and said[0] is not None:
                    key, size = (reader.weight, reader.dim), self.graph.shapes[reader.weight][reader.dim]
                    groups = found.groups(reader)
                    table = constants.setdefault(key, torch.zeros(groups, size, dtype=torch.float64))
                    _put(table, reader.indices[~mask.cpu()], said[0].mean.cpu()[~mask.cpu()])
        plan = self.graph.plan(keep)
        return Compensation(shifts=absorbable(self.model, plan, self.graph, constants=constants).shifts)


def _put(table: Tensor, places: Tensor, means: Tensor) -> None:
    """Write what removed channels are expected to say to where a reader reads them.

    Args:
        table: (G, I), written to; a row for each group of a grouped convolution.
        places: (C, M) of removed channels on the axis of length I.
        means: (C, K), for K places of each channel in its norm.
    """
    if places.shape[1] == 1 and means.shape[1] == len(table):
        table[:, places[:, 0]] = means.T
    else:
        table[:, places] = means if means.shape[1] == places.shape[1] else means.mean(dim=1, keepdim=True)


class _Distributions:
    """What batch norms say of the tensors of a forward: each is Gaussian with their shift and scale.

    Behind an activation it is the activation of that; a sum is one of independent Gaussians. Pooling and the like
    change nothing. Behind anything else, such as a gate that multiplies (squeeze and excite), nothing is known.

    Args:
        graph: of the model as it is.

    Attributes:
        summed: whether a tensor asked for so far is a sum of what several layers make.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        assert graph.flow is not None
        self.summed = False
        self._graph = graph
        self._flow: Flow = graph.flow
        self._parameters: dict[str, nn.Parameter] = dict(graph.model.named_parameters())
        self._numbers = {self._flow.call(number): number for number in range(len(self._flow.calls))}

    def read(self, group: Group, reader: Consumer | None = None) -> list[Moments | None]:
        """Each tensor of a group that is read, or that one reader reads; None where batch norm does not say."""
        readers = group.consumers if reader is None else [reader]
        taps = self._flow.maps(group.name, [r.weight for r in readers])
        return [self._of(self._numbers[tap.call], group) for tap in taps]

    def before_followers(self, group: Group) -> list[Moments]:
        """What goes into layers that take each channel from one of theirs (depthwise), where batch norm says it."""
        found = []
        for weight in dict.fromkeys(member.name for member in group.members):
            for number in self._flow.layers.get(weight, ()):
                if any(layer.depthwise and layer.weight == weight for layer in self._flow.made[number]):
                    found += self._of_all(self._flow.calls[number].sources[:1], group)
        return found

    def groups(self, reader: Consumer) -> int:
        """How many groups a convolution has; 1 of another layer."""
        made = (layer for number in self._flow.layers[reader.weight] for layer in self._flow.made[number])
        return next(layer.groups for layer in made if layer.weight == reader.weight)

    def _of(self, number: int, group: Group) -> Moments | None:
        """Moments (C, M) of what a call makes of a group; None where they are not known."""
        record = self._flow.calls[number]
        if record.name == "batch_norm":
            return self._normal(number, group)
        sources = [source for source in record.sources if source is not None]
        if record.name in _SUMS and len(record.sources) == 2:
            self.summed |= len(sources) == 2
            parts = self._of_all(record.sources, group)
            if len(parts) < 2:
                return None
            variance = parts[0].deviation.square() + parts[1].deviation.square()
            return moments(parts[0].mean + parts[1].mean, variance.sqrt())
        if record.name in _JOINS:
            parts = self._of_all(record.sources, group)
            return Moments(*(torch.cat(of_parts, dim=1) for of_parts in zip(*parts, strict=True))) if parts else None
        activation = self._flow.entrywise(number)
        before = None if activation is None else next(iter(self._of_all(record.sources[:1], group)), None)
        if before is None or activation is None or activation.name == "identity":
            return before
        return moments(before.mean, before.deviation, activation)

    def _of_all(self, sources: Sequence[tuple[int, int] | None], group: Group) -> list[Moments]:
        found = [None if source is None else self._of(source[0], group) for source in sources]
        return [m for m in found if m is not None]

    def _normal(self, number: int, group: Group) -> Moments | None:
        """Moments of what a batch norm with scale and shift returns."""
        for layer in self._flow.made.get(number, ()):
            places = next((m.indices for m in group.members if m.name == layer.weight), None)
            if layer.weight is not None and layer.bias is not None and places is not None:
                gamma, beta = (self._parameters[name].detach() for name in (layer.weight, layer.bias))
                places = places.to(gamma.device)
                return moments(beta[places], gamma[places].abs())
        return None
