"""Hierarchical pruning: how much of each layer is redundant, then how many of its filters go, then which.

Zhou, Lian, Yin and Wang, 2022. A *reconstruction*: the paper's formulas were not at hand, only what its abstract and a
summary of it say (a gradient matrix whose singular values bound what may go, a Taylor expansion of a layer's error,
layers first and filters second). What stands here fits that, and agrees with no number of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.compensation import Compensation
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.graph.flow import Call, Tap
from lightning_prune.graph.groups import ChannelGraph, Group
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import LossFn, Paper
from lightning_prune.ranking import round_count
from lightning_prune.report import markdown_table
from lightning_prune.schedule import OneShot
from lightning_prune.state import Fields
from lightning_prune.statistics import SampleSums, samples_in
from lightning_prune.taps import Look, SampleGradients, Seen, tensor_of, watching

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
_LARGEST_GATE = 3.0
_STEPS = 64


def effective_rank(fisher: Tensor, tolerance: float = 0.01) -> int:
    """How many directions of gate space hold all but a tolerance of the curvature: k of a layer.

    Args:
        fisher: (C, C), mean over samples of g g^T, g the gradient of a sample's loss by the gates.
        tolerance: share of the trace that may be left out, in (0, 1).

    Returns:
        From 1 to C: the least k whose k largest eigenvalues sum to (1 - tolerance) of the trace.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([4.0, 1.0, 0.0])))
        2
    """
    values = torch.linalg.eigvalsh(fisher.double()).clamp(min=0).flip(0)
    sums = values.cumsum(0)
    wanted = (1 - tolerance) * sums[-1] * (1 - 1e-12)  # the last is for rounding
    return min(len(values), int((sums < wanted).sum()) + 1)


def removal_order(fisher: Tensor, damping: float = 1e-4, rescale: bool = True) -> tuple[Tensor, Tensor]:
    """Remove filter after filter, the one that costs least each time.

    With P the inverse of F + mu I over those that stay and z the gates, removing i costs ``z_i^2 / (2 P_ii)`` once the
    other gates move by ``-z_i P_ji / P_ii``. Without rescaling it costs ``F_ii / 2`` plus the sum of F_ij over those
    that went before.

    Args:
        fisher: (C, C).
        damping: mu over the mean of F's diagonal.
        rescale: whether the gates of those that stay make up for those that go.

    Returns:
        (C,) channels, the first to go first, and (C,) what each costs then, in the unit of the loss.

    Example:
        >>> order, costs = removal_order(torch.tensor([[2.0, 1, 0], [1, 2.5, 0], [0, 0, 3]]), damping=0)
        >>> order.tolist(), [round(cost, 6) for cost in costs.tolist()]
        ([0, 2, 1], [0.8, 1.5, 2.45])
    """
    fisher = fisher.double()
    size = len(fisher)
    order, costs = torch.arange(size), torch.zeros(size, dtype=torch.float64)
    if not bool(fisher.any()):
        return order, costs
    gone = torch.zeros(size, dtype=torch.bool)
    gates = torch.ones(size, dtype=torch.float64)
    price = fisher.diagonal() / 2
    inverse = _damped_inverse(fisher, damping) if rescale else fisher
    diagonal = inverse.diagonal().clone()
    # what the inverse has yet to lose is factor^T factor: one column gets its rank-one updates at a time, all of them
    # some steps at once
    factor = torch.zeros(_STEPS, size, dtype=torch.float64)
    for step in range(size):
        salience = gates.square() / (2 * diagonal) if rescale else price
        i = int(salience.masked_fill(gone, torch.inf).argmin())
        order[step], costs[step], gone[i] = i, salience[i], True
        if not rescale:
            price = price + fisher[i]
            continue
        row = step % _STEPS
        if not row:
            inverse.addmm_(factor.T, factor, alpha=-1)
        column = inverse[i] - factor[:row, i] @ factor[:row]
        gates = gates - gates[i] * column / column[i]
        factor[row] = column / column[i].sqrt()
        diagonal -= factor[row].square()
    return order, costs


def salience(fisher: Tensor, damping: float = 1e-4, rescale: bool = True) -> Tensor:
    """(C,) what removing each filter on its own costs: the first cost of `removal_order`, of every filter.

    Example:
        >>> salience(torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 3]]), damping=0).round(decimals=6)
        tensor([0.7500, 0.7500, 1.5000], dtype=torch.float64)
    """
    fisher = fisher.double()
    if not rescale or not bool(fisher.any()):
        return fisher.diagonal() / 2
    return 1 / (2 * _damped_inverse(fisher, damping).diagonal())


def rescaled_gates(fisher: Tensor, keep: Tensor, damping: float = 1e-4) -> Tensor:
    """(C,) gates that cost least once some are 0: what the steps of `removal_order` lead to, solved at once.

    Args:
        fisher: (C, C).
        keep: (C,) bool, True = keep.
        damping: mu over the mean of F's diagonal.

    Example:
        >>> rescaled_gates(torch.ones(2, 2), torch.tensor([False, True]), 1e-9).round(decimals=6)
        tensor([0., 2.], dtype=torch.float64)
    """
    fisher = fisher.double()
    gates = keep.double()
    if bool(fisher.any()) and bool(keep.any()):
        gates[keep] += torch.cholesky_solve(
            fisher[keep][:, ~keep].sum(dim=1, keepdim=True),
            torch.linalg.cholesky(_damped(fisher, damping)[keep][:, keep]),
        ).squeeze(1)
    return gates


def _damped(fisher: Tensor, damping: float) -> Tensor:
    return fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype)


def _damped_inverse(fisher: Tensor, damping: float) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(_damped(fisher, damping)))


def allocate(
    increases: Mapping[str, Sequence[float]], bounds: Mapping[str, int], limits: Mapping[str, int], total: int
) -> dict[str, int]:
    """How many filters each layer loses.

    Each gets the part of the total that its bound is of all bounds, rounded down; the rest goes one filter at a time to
    the layer whose error rises least. Beyond the sum of the bounds it goes on so, up to the limits.

    Args:
        increases: layer -> by how much each further removal raises its error, relative to the trace of its F.
        bounds: layer -> most removals while there is a choice.
        limits: layer -> most removals ever, at least its bound.
        total: removals wanted, at most the sum of the limits.

    Example:
        >>> rises = {"a": [0.1, 0.1, 0.5, 0.9], "b": [0.0, 0.3, 0.4, 0.9]}
        >>> bounds, limits = {"a": 2, "b": 1}, {"a": 3, "b": 3}
        >>> allocate(rises, bounds, limits, 2), allocate(rises, bounds, limits, 4)
        ({'a': 1, 'b': 1}, {'a': 2, 'b': 2})
    """
    room = sum(bounds.values())
    within = total <= room
    given = {name: total * bound // max(1, room) if within else bound for name, bound in bounds.items()}
    most = bounds if within else limits
    heap = [(increases[name][n], i, name) for i, (name, n) in enumerate(given.items()) if n < most[name]]
    heapify(heap)
    for _ in range(total - sum(given.values())):
        _, i, name = heappop(heap)
        given[name] += 1
        if given[name] < most[name]:
            heappush(heap, (increases[name][given[name]], i, name))
    return given


REDUNDANCY: Fields = {
    "ranks": dict[str, tuple[int, int]],
    "channels": float,
    "params": float,
    "flops": float,
    "samples": int,
}
"""What `Redundancy.to_dict` returns."""


@dataclass(frozen=True)
class Redundancy:
    """How much of a network is redundant, and where.

    Attributes:
        ranks: group -> (k, C): filters that are needed, of those there are.
        channels: fraction of the channels of these groups that may go, the network's maximum rate R.
        params, flops: fraction of the network's parameters and flops that goes with them.
        samples: how many the gradients are of.
    """

    ranks: Mapping[str, tuple[int, int]]
    channels: float
    params: float
    flops: float
    samples: int

    def rate(self, group: str) -> float:
        """R of a group: the fraction of its channels that is redundant."""
        needed, size = self.ranks[group]
        return 1 - needed / size

    @property
    def unreliable(self) -> tuple[str, ...]:
        """Groups with more than a fourth as many channels as there were samples: too few samples feign redundancy."""
        return tuple(name for name, (_, size) in self.ranks.items() if self.samples < 4 * size)

    def to_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists and numbers."""
        return {**asdict(self), "ranks": {name: list(rank) for name, rank in self.ranks.items()}}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Redundancy:
        """What `to_dict` gave."""
        values = {key: state[key] for key in REDUNDANCY}
        return cls(**{**values, "ranks": {name: (int(k), int(c)) for name, (k, c) in state["ranks"].items()}})

    def __str__(self) -> str:
        rows: list[dict[str, object]] = [
            {"group": name, "channels": size, "needed": k, "redundant": f"{self.rate(name):.4f}"}
            for name, (k, size) in self.ranks.items()
        ]
        few = f", too few for {', '.join(self.unreliable)}" if self.unreliable else ""
        return (
            f"{markdown_table(rows)}\nRedundant: {self.channels:.4f} of the channels, and with them {self.params:.4f} "
            f"of the parameters and {self.flops:.4f} of the flops. From {self.samples} samples{few}."
        )


@dataclass(frozen=True)
class _Layer:
    """What an event knows of a group: F of its channels, their rank, their order of removal and what each adds."""

    fisher: Tensor
    rank: int
    order: Tensor
    increases: Sequence[float]
    rescale: bool


class Hierarchical(ChannelPruner):
    """Cut within each layer's maximum redundancy, and let the filters that stay make up for those that go.

    Args:
        budget: what may be kept; None with ``max_rate``.
        tolerance: share of a layer's curvature that may be lost, which says how many of its filters are redundant.
        damping: of the curvature before it is inverted, relative to its mean diagonal.
        rescale: fold gates that make up for what goes into norms, or into weights and biases where there is none.
        max_rate: instead of a budget: remove what is redundant and stop. With several events each takes its part.
        samples: calibration samples; four times the channels of the largest group are needed for a sound rank.
        **shared: see `ChannelPruner`; there is no ``scope``, as layers are compared by their relative error.
    """

    paper = Paper("Zhou et al.", 2022, "https://arxiv.org/abs/2206.03596")
    state_fields: ClassVar[Fields] = {
        **ChannelPruner.state_fields,
        "redundancy?": REDUNDANCY,
        "clipped?": dict[str, int],
    }
    needs = "gradients of calibration data"
    default_schedule = OneShot(0.5)
    default_scope = "uniform"
    looks_at = "gates"

    def __init__(
        self,
        budget: Budget | float | None = None,
        *,
        tolerance: float = 0.01,
        damping: float = 1e-4,
        rescale: bool = True,
        max_rate: bool = False,
        samples: int = 2048,
        **shared: Any,
    ) -> None:
        if max_rate == (budget is not None):
            raise ValueError(
                "Hierarchical wants a budget, or max_rate=True to stop at the maximum redundancy it finds; got "
                f"budget={budget!r} and max_rate={max_rate!r}"
            )
        super().__init__(1.0 if budget is None else budget, **shared)
        if self.scope != "uniform":
            raise ValueError(
                f"scope={self.scope!r} has no meaning for Hierarchical, which ranks filters within their layer and "
                "layers by their relative error; leave it out"
            )
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {tolerance!r}")
        if not 0 < damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {damping!r}")
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples must be an int of at least 1, got {samples!r}")
        self.tolerance = tolerance
        self.damping = damping
        self.rescale = rescale
        self.max_rate = max_rate
        self.samples = samples
        self._layers: dict[str, _Layer] = {}  # of one event
        self._redundancy: Redundancy | None = None
        self._clipped: dict[str, int] = {}

    @property
    def redundancy(self) -> Redundancy:
        """The maximum redundancy that the last event found in the network as it was.

        Raises:
            RuntimeError: before the first event.
        """
        if self._redundancy is None:
            raise RuntimeError("Hierarchical knows the redundancy of a network once its first event is done")
        return self._redundancy

    @property
    def clipped(self) -> Mapping[str, int]:
        """group -> how many gates the last event clipped to [0, 3]; many say that the fit is bad."""
        return dict(self._clipped)

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        fishers, foldable, samples = self._fishers()
        self._layers, out = {}, {}
        for name, whole in fishers.items():
            alive = self._alive[name]
            fisher = whole[alive][:, alive]
            trace = float(fisher.trace())
            rescale = self.rescale and name in foldable
            order, costs = removal_order(fisher, self.damping, rescale)
            increases = (costs / (trace or 1.0)).tolist()
            rank = effective_rank(fisher, self.tolerance)
            self._layers[name] = _Layer(fisher, rank, order, increases, rescale)
            out[name] = torch.zeros(len(alive), dtype=torch.float64)
            out[name][alive] = salience(fisher, self.damping, rescale)
        self._redundancy = self._found(samples)
        return out

    def _fishers(self) -> tuple[dict[str, Tensor], set[str], int]:
        """Group -> (C, C) F on the CPU; groups whose gates can be folded; number of samples."""
        taps = {group.name: self.graph.gates(group) for group in self._groups}
        gradients = SampleGradients(taps)
        device = next(self.model.parameters()).device
        anchor = torch.zeros((), device=device, requires_grad=True)
        direct: set[int] = set()  # ids of parameters that functions multiply with as they are
        looks: dict[Call, list[Look]] = {}
        for tap in (tap for of_group in taps.values() for tap in of_group):
            looks.setdefault(tap.call, []).append(_anchored(tap, anchor, direct))
        for call, found in gradients.looks.items():
            looks[call] += found
        shapes: dict[str, tuple[int, ...]] = {g.name: (g.size, g.size) for g in self._groups}
        sums = SampleSums({**shapes, **{_rows(name): () for name in shapes}}, device)
        with self.evaluating(grad=True), watching(self.model, looks, replacing=True):
            for batch in self.calibrate(self.samples):
                loss = self.loss(batch)
                torch.autograd.grad(loss, anchor, allow_unused=True)  # down to the gates, and not to the weights
                values = {name: found.double() for name, found in gradients.take().items()}
                products = {name: found.T @ found for name, found in values.items()}
                counts = {_rows(name): torch.tensor(len(found), device=device) for name, found in values.items()}
                sums.add({**products, **counts}, samples_in(batch))
        means = {name: value.cpu() for name, value in sums.means(self.total).items()}
        if missing := [name for name in shapes if means[_rows(name)] == 0]:
            raise NonFiniteScore(
                f"Hierarchical has no gradient to score {', '.join(missing[:3])} by: the loss of the calibration "
                "batches does not depend on these layers; give a loss_fn= that does, or ignore= them"
            )
        # of all processes: one that had no batch has seen no function
        found_out = [float(sums.samples), *(float(self._foldable(group, direct)) for group in self._groups)]
        samples, *seen = self.total(torch.tensor(found_out, dtype=torch.float64, device=device)).tolist()
        foldable = {group.name for group, processes in zip(self._groups, seen, strict=True) if processes}
        return {name: means[name] for name in shapes}, foldable, int(samples)

    def _foldable(self, group: Group, direct: set[int]) -> bool:
        """Whether a gate on each channel can be multiplied into parameters: the same function would come out."""
        if any(producer.scale_free for producer in group.producers):
            return False  # a norm without a scale would undo it in training
        parameters = dict(self.model.named_parameters())
        return all(id(parameters[gate.weight]) in direct for gate in self.graph.gate_parameters(group))

    def _found(self, samples: int) -> Redundancy:
        ranks = {name: (layer.rank, len(layer.order)) for name, layer in self._layers.items()}
        now = self._current_cost()
        then = self.graph.costs.cost(self._counts({name: rank for name, (rank, _) in ranks.items()}))
        total = sum(size for _, size in ranks.values())
        out = Redundancy(
            ranks,
            sum(size - rank for rank, size in ranks.values()) / total,
            1 - then.params / max(1, now.params),
            1 - then.flops / max(1, now.flops),
            samples,
        )
        if out.unreliable:
            largest = max(ranks[name][1] for name in out.unreliable)
            self.warn_once(
                "unreliable",
                f"Hierarchical: the redundancy of {len(out.unreliable)} groups is unreliable ("
                f"{', '.join(out.unreliable[:3])}): {samples} samples, {4 * largest} wanted for {largest} channels; "
                f"calibrate with more (samples={4 * largest}) where there are more",
            )
        return out

    @override
    def select(self, scores: Mapping[str, Tensor], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, Tensor]:
        sizes = {name: len(score) for name, score in scores.items()}
        least = {name: max(1, min(size, self._floor(name))) for name, size in sizes.items()}
        own = {
            name: self._rounded(int(fraction * self._dense_sizes[name] + 1e-9), name, sizes, least)
            for name, fraction in self.keep.items()
            if name in sizes
        }
        free = [name for name in sizes if name not in own]
        increases = {name: self._layers[name].increases for name in free}
        needed = {name: max(self._layers[name].rank, least[name]) for name in free}
        bounds = {name: max(0, sizes[name] - -(-needed[name] // self.round_to) * self.round_to) for name in free}
        limits = {name: sizes[name] - least[name] for name in free}

        def counts(total: int) -> dict[str, int]:
            gone = allocate(increases, bounds, limits, total)
            return {
                name: own.get(name) or self._rounded(sizes[name] - gone[name], name, sizes, least) for name in sizes
            }

        room = sum(bounds.values())
        if self.max_rate:
            kept = counts(round(self._part() * room))
        else:
            low, high = 0, sum(limits.values())
            if not fits(counts(high)):
                raise UnmeetableBudget("even the fewest channels allowed do not fit")
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if fits(counts(middle)) else (middle + 1, high)
            kept = counts(low)
            if low > room:
                self._warn_beyond(counts(room), sum(sizes.values()) - sum(kept.values()))
            _give_back(kept, {name: sizes[name] for name in free}, increases, self.round_to, fits)
        keep = {}
        for name, size in sizes.items():
            keep[name] = torch.ones(size, dtype=torch.bool)
            keep[name][self._layers[name].order[: size - kept[name]]] = False
        return keep

    def _rounded(self, count: int, name: str, sizes: Mapping[str, int], least: Mapping[str, int]) -> int:
        return max(least[name], round_count(min(count, sizes[name]), sizes[name], self.round_to))

    def _part(self) -> float:
        """How much of what is redundant now goes at this event."""
        done, due = (
            self.events[: self.events_done],
            [e for e in self.events[self.events_done :] if e.step <= self.steps],
        )
        before = done[-1].progress if done else 0.0
        return (due[-1].progress - before) / (1 - before) if due and before < 1 else 1.0

    def _warn_beyond(self, at_most: Mapping[str, int], removed: int) -> None:
        share = self._measured_cost(at_most) / max(1, self._dense_measure())
        self.warn_once(
            "beyond",
            "Hierarchical: the budget asks for more than the maximum redundancy of the network, "
            f"{self.redundancy.channels:.4f} of its channels, which would keep {share:.4f} of the {self.budget.of}; "
            f"{removed} channels go, those beyond it in the order of relative error; raise keep, or take max_rate=True",
        )

    @override
    def compensate(self, keep: Mapping[str, Tensor]) -> Compensation:
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        factors: dict[str, dict[int, Tensor]] = {}
        self._clipped = {}
        for name, mask in keep.items():
            layer, alive = self._layers[name], self._alive[name]
            stays = mask.cpu()[alive]
            if stays.all() or not layer.rescale:
                continue
            gates = rescaled_gates(layer.fisher, stays, self.damping)
            if beyond := int(((gates < 0) | (gates > _LARGEST_GATE)).sum()):
                self._clipped[name] = beyond
            whole = torch.ones(len(mask), dtype=torch.float64)
            whole[alive] = torch.where(stays, gates.clamp(0, _LARGEST_GATE), 1.0)  # what goes is left as it is
            group = self.graph.group(name)
            places = {(member.name, member.dim): member.indices for member in group.members}
            for gate in self.graph.gate_parameters(group):
                for parameter, dim in ((gate.weight, gate.dim), (gate.bias, 0)):
                    if parameter is not None:
                        ones = torch.ones(shapes[parameter][dim], dtype=torch.float64)
                        factor = factors.setdefault(parameter, {}).setdefault(dim, ones)
                        indices = gate.of(places[parameter, dim])
                        factor[indices] = whole[:, None].expand(indices.shape)
        return Compensation(factors)

    @override
    def after_prune(self, keep: Mapping[str, Tensor]) -> None:
        self._layers = {}
        if self._clipped:
            clips = ", ".join(f"{n} of {name}" for name, n in self._clipped.items())
            rank_zero_info(f"Hierarchical: gates clipped to [0, {_LARGEST_GATE:g}]: {clips}")

    @override
    def _row(self) -> dict[str, float]:
        row = super()._row()
        if self._redundancy is not None:
            found = self._redundancy
            row["prune/redundancy"] = found.channels
            row["prune/redundancy_params"], row["prune/redundancy_flops"] = found.params, found.flops
            row["prune/clipped"] = float(sum(self._clipped.values()))
            row.update({f"prune/redundancy/{name}": found.rate(name) for name in found.ranks})
        return row

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._redundancy is not None:
            state["redundancy"], state["clipped"] = self._redundancy.to_dict(), dict(self._clipped)
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "redundancy" in state_dict:
            self._redundancy = Redundancy.from_dict(state_dict["redundancy"])
            self._clipped = dict(state_dict.get("clipped", {}))


def redundancy(
    graph: ChannelGraph,
    calibration: Any,
    loss_fn: LossFn | None = None,
    *,
    tolerance: float = 0.01,
    samples: int = 2048,
    ignore: Sequence[str] = (),
) -> Redundancy:
    """How much of a traced network is redundant; nothing of it changes.

    Args:
        graph: of the model, from `lightning_prune.trace`.
        calibration: a loader, or a list of batches.
        loss_fn: ``(model, batch) -> loss``, a mean over samples; a LightningModule's own by default.
        tolerance, samples, ignore: as of `Hierarchical`.

    Raises:
        NothingToPrune: if no channel may go.
        ValueError: if ``calibration`` is no loader.
    """
    method = Hierarchical(
        max_rate=True, tolerance=tolerance, samples=samples, ignore=ignore, calibration=calibration, loss_fn=loss_fn
    )
    method.scores_for(graph)
    return method.redundancy


def _rows(name: str) -> str:
    return f"{name} rows"


def _anchored(tap: Tap, anchor: Tensor, direct: set[int]) -> Look:
    """Hang a tensor that requires gradients to a tap's, frozen layers or not, and note what its call works with."""

    def look(seen: Seen) -> Any:
        if seen.call.name not in _RECURRENT:
            direct.update(id(x) for x in tree_flatten((seen.args, seen.kwargs))[0] if isinstance(x, Tensor))
        wanted = tensor_of(tap, seen.out)
        leaves, structure = tree_flatten(seen.out)
        return tree_unflatten([x + anchor.to(x) if x is wanted else x for x in leaves], structure)

    return look


def _give_back(
    kept: dict[str, int],
    sizes: Mapping[str, int],
    increases: Mapping[str, Sequence[float]],
    step: int,
    fits: Callable[[Mapping[str, int]], bool],
) -> None:
    """Take back removals that the budget does not need, the dearest first, in place."""

    def last(name: str) -> float:
        return -increases[name][sizes[name] - kept[name] - 1]

    heap = [(last(name), i, name) for i, name in enumerate(sizes) if kept[name] < sizes[name]]
    heapify(heap)
    while heap:
        _, i, name = heappop(heap)
        more = min(sizes[name], (kept[name] // step + 1) * step)
        if fits({**kept, name: more}):
            kept[name] = more
            if more < sizes[name]:
                heappush(heap, (last(name), i, name))
