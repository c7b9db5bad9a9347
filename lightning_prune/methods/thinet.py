"""ThiNet: drop the channels that the next layer can best do without, and rescale what it reads of the others.

Luo, Wu and Lin, 2017. Differs from the paper: how many channels each layer keeps is one common fraction, solved for the
budget; channels that several layers make are pruned too (``streams=False`` leaves them alone, as the paper does), and
several readers decide together; the least squares is drawn weakly towards no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.batches import samples_in
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.compensation import Compensation
from lightning_prune.errors import NonFiniteScore
from lightning_prune.graph.flow import Call, Flow
from lightning_prune.graph.groups import Consumer, Group
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper, one_of
from lightning_prune.ranking import greedy_order, rank_uniform, top_mask
from lightning_prune.schedule import Event, Iterative
from lightning_prune.statistics import SampleSums
from lightning_prune.taps import Seen, watching
from lightning_prune.terms import ARGUMENTS, channel_terms, random_places

_ENOUGH = 10  # rows per channel; with fewer the scales fit the sample
_LARGE = 10.0  # a change of scale that is worth a warning


def backward_score(gram: Tensor) -> Tensor:
    """Score channels by when the greedy search removes them, the first one 0 (algorithm 1).

    Each time that channel goes which leaves the smallest sum over rows of the squared sum of all removed terms (eq. 6).
    The sets are nested: the n largest scores are what the search keeps when it stops at n.

    Args:
        gram: (C, C), X^T X of rows X (m, C): the terms that each channel adds to an output of the next layer.

    Returns:
        (C,) float64, 0 to C - 1.

    Example:
        >>> rows = torch.tensor([[1.0, -1, 1], [1, 1, 0], [2, -2, 2], [0, 1, 0]])
        >>> backward_score(rows.T @ rows)
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    return greedy_order(gram).argsort().double()


def pursuit_score(gram: Tensor) -> Tensor:
    """Score channels by when orthogonal matching pursuit adds them, the first one C - 1 (the authors' later code).

    Each time that channel is added which, with a scale of its own, explains most of what is left of the output; then
    the scales of all that were added are fitted again.

    Args:
        gram: as in `backward_score`.

    Returns:
        (C,) float64, 0 to C - 1; of equal channels the one with the higher index is added first.
    """
    q = gram.detach().double().cpu().numpy()
    size, energy = len(q), q.diagonal()
    left = q.sum(axis=1)  # product of each channel with what is left of y
    basis = np.zeros_like(q)  # products of all channels with an orthonormal basis of those added
    added = np.zeros(size, dtype=bool)
    order = []
    for step in range(size):
        gain = np.divide(left**2, energy, out=np.zeros(size), where=energy > 0)
        gain[added] = -1
        best = size - 1 - int(gain[::-1].argmax())
        order.append(best)
        added[best] = True
        rest = q[best] - basis[:step].T @ basis[:step, best]
        if rest[best] > 1e-12 * energy[best]:  # else it is a sum of those added before
            basis[step] = rest / math.sqrt(rest[best])
            left -= basis[step] * (left[best] / math.sqrt(rest[best]))
    return torch.tensor(order[::-1]).argsort().double()


def rescaling(gram: Tensor, keep: Tensor) -> Tensor:
    """Factors on the channels that stay with which they add up best to what all of them did (eq. 7).

    Least squares with a millionth of the mean energy as penalty on the squared distance from 1: a channel that says
    nothing stays as it is, channels that say the same share a change, and the error never grows.

    Args:
        gram: as in `backward_score`.
        keep: (C,) bool, True = stays.

    Returns:
        (K,) float64, of either sign; 1 where nothing goes.

    Example:
        >>> rows = torch.tensor([[1.0, -1, 1], [1, 1, 0], [2, -2, 2], [0, 1, 0]])
        >>> round(rescaling(rows.T @ rows, torch.tensor([True, False, False])).item(), 4)
        1.1667
    """
    q, keep = gram.detach().double().cpu(), keep.cpu()
    ridge = 1e-6 * q.diagonal().mean()
    if not ridge > 0:
        return torch.ones(int(keep.sum()), dtype=torch.float64)
    kept = q[keep]
    change: Tensor = torch.linalg.solve(
        kept[:, keep] + ridge * torch.eye(len(kept), dtype=torch.float64), kept[:, ~keep].sum(dim=1)
    )
    return 1 + change


class ThiNet(ChannelPruner):
    """Cut the channels that the next layer misses least, layer by layer, with training in between.

    Args:
        budget: see `ChannelPruner`.
        search: "backward" removes one channel at a time (the paper), "omp" adds them by orthogonal matching pursuit
            (the authors' later code).
        rows: random outputs looked at per sample, of each layer that reads the channels.
        samples: calibration samples looked at, where there are as many; more where these would not make ten rows for
            each channel of a layer.
        streams: whether channels that several layers make together go as well (residual streams, gates); the paper
            leaves them alone.
        absorb: False; the least squares makes up for constants already.
        **shared: see `ChannelPruner`; the scope is "uniform". Events of the schedule share the layers in data-flow
            order: each layer is cut once, all the way.
    """

    paper = Paper("Luo et al.", 2017, "https://arxiv.org/abs/1707.06342")
    needs = "calibration data"
    default_schedule = Iterative(start=0.2, end=0.7, events=40)
    default_scope = "uniform"

    def __init__(
        self,
        budget: Budget | float,
        *,
        search: Literal["backward", "omp"] = "backward",
        rows: int = 10,
        samples: int = 1000,
        streams: bool = True,
        absorb: bool | float = False,
        **shared: Any,
    ) -> None:
        super().__init__(budget, absorb=absorb, **shared)
        one_of("search", search, ("backward", "omp"))
        for name, value in (("rows", rows), ("samples", samples)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.scope != "uniform":
            raise ValueError(
                f"ThiNet orders the channels of one layer only; scope must be 'uniform', got {self.scope!r}"
            )
        if absorb is not False:
            raise ValueError(
                f"absorb must be False, got {absorb!r}: ThiNet's least squares makes up for constants of removed "
                "channels, and absorbing them would do so twice"
            )
        self.search = search
        self.rows = rows
        self.samples = samples
        self.streams = streams
        self._grams: dict[str, dict[str, Tensor]] = {}  # of the event that runs

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        groups = [views[name][0].group for name in self._due()]
        self._grams = self._collect(groups) if groups else {}
        search = backward_score if self.search == "backward" else pursuit_score
        # layers of other events have no order yet, or need none any more
        out = {name: torch.zeros(view[0].group.size, dtype=torch.float64) for name, view in views.items()}
        return out | {name: search(torch.stack(list(of.values())).sum(dim=0)) for name, of in self._grams.items()}

    @override
    def select(self, scores: Mapping[str, Tensor], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, Tensor]:
        """The layers of this event go all the way at once: the fraction is solved for the final budget, and kept."""
        due, sizes = self._due(), {name: len(score) for name, score in scores.items()}
        counts = {**sizes, **{name: count for name, count in self._wanted(scores).items() if name in due}}
        return {name: top_mask(score.cpu(), counts[name]) for name, score in scores.items()}

    def _wanted(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Channels that the groups not yet cut will keep; solved anew only if others turned out to stay."""
        sizes, dense = {name: len(score) for name, score in scores.items()}, self._dense_measure()
        left = {name: score for name, score in scores.items() if not self._is_cut(name)}
        kept = {name: self._views[name][0].kept for name in left}

        def fits(counts: Mapping[str, int]) -> bool:
            return self.budget.fits(self._measured_cost({**sizes, **counts}), dense)

        wanted = {name: int(tensors["wanted"][0]) for name, tensors in kept.items() if "wanted" in tensors}
        if len(wanted) == len(left) and fits(wanted):
            return wanted
        chosen = rank_uniform(
            left,
            fits,
            dense=self._dense_sizes,
            keep=self.keep,
            floors=dict.fromkeys(left, self.min_channels),
            round_to=self.round_to,
        )
        for name, mask in chosen.items():
            kept[name]["wanted"] = torch.full((self._views[name][0].group.size,), int(mask.sum()))
        return {name: int(mask.sum()) for name, mask in chosen.items()}

    @override
    def compensate(self, keep: Mapping[str, Tensor]) -> Compensation:
        factors: dict[str, dict[int, Tensor]] = {}
        for name, grams in self._grams.items():
            if name not in keep or bool(keep[name].all()):
                continue
            group, mask = self._views[name][0].group, keep[name].cpu()
            for consumer, _ in self._readers(group):
                scale = torch.ones(group.size, dtype=torch.float64)
                scale[mask] = rescaling(grams[consumer.weight], mask)
                if (change := float((scale - 1).abs().max())) > _LARGE:
                    self.warn_once(
                        f"scale of {consumer.name}",
                        f"ThiNet changes the scale of what {consumer.name!r} reads of {name!r} by up to {change:.0f}: "
                        "channels say nearly the same, or there is too little calibration data",
                    )
                size = self.graph.shapes[consumer.weight][consumer.dim]
                of_weight = factors.setdefault(consumer.weight, {})
                factor = of_weight.setdefault(consumer.dim, torch.ones(size, dtype=torch.float64))
                factor[consumer.indices] *= scale[:, None]
        return Compensation(factors)

    @override
    def after_prune(self, keep: Mapping[str, Tensor]) -> None:
        self._grams = {}

    @override
    def _log_scores(self, trainer: pl.Trainer, scores: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> None:
        super()._log_scores(trainer, {name: scores[name] for name in self._grams if name in scores}, keep)

    def _collect(self, groups: Sequence[Group]) -> dict[str, dict[str, Tensor]]:
        """group -> weight that reads it -> X^T X, mean over samples."""
        assert self._at_event is not None
        trainer, model = self._at_event
        rank, processes = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        device = next(model.parameters()).device
        readers = [(i, group, *reader) for i, group in enumerate(groups) for reader in self._readers(group)]
        shapes = {_key(group, consumer): (group.size, group.size) for _, group, consumer, _ in readers}
        sums = SampleSums({"runs": (len(groups),), **shapes}, device)
        of_call: dict[Call, list[tuple[int, Group, Consumer]]] = {}
        for i, group, consumer, calls in readers:
            for number in calls:
                of_call.setdefault(self._flow.call(number), []).append((i, group, consumer))
        found: dict[str, Tensor] = {}
        first = full = 0

        def look(seen: Seen) -> None:
            weight = of_call[seen.call][0][2].weight
            places = random_places(seen.out.shape, seen.batch, self.rows, self.seed(f"rows of {weight}"), first)
            terms = channel_terms(seen.call.name, seen.args, seen.kwargs, seen.out, places.to(seen.out.device)).double()
            for i, group, consumer in of_call[seen.call]:
                indices = consumer.indices.to(terms.device)
                x = terms[:, indices.reshape(-1)].reshape(-1, *indices.shape).sum(dim=2)  # (m, C)
                key = _key(group, consumer)
                found[key] = found[key] + x.T @ x if key in found else x.T @ x
                found["runs"][i] += 1

        widest = max(group.size for group in groups)
        for number, batch in enumerate(self.calibrate(max(self.samples, -(-_ENOUGH * widest // self.rows)))):
            count = samples_in(batch)
            full = max(full, count)
            first = (number * processes + rank) * full  # as a single process would number the samples
            found = {"runs": torch.zeros(len(groups), device=device)}
            with self.evaluating(), watching(model, {call: [look] for call in of_call}):
                self.loss(batch)
            sums.add(found, count)
        means = sums.means(self.total)
        self._check(groups, means["runs"], int(self.total(torch.tensor(float(sums.samples), device=device))))
        out: dict[str, dict[str, Tensor]] = {group.name: {} for group in groups}
        for _, group, consumer, _ in readers:
            out[group.name][consumer.weight] = means[_key(group, consumer)]
        return out

    def _check(self, groups: Sequence[Group], runs: Tensor, samples: int) -> None:
        """Refuse groups whose readers never ran, and say so where there are few rows.

        Raises:
            NonFiniteScore: naming groups that nothing was seen of.
        """
        if unseen := [group.name for group, count in zip(groups, runs.tolist(), strict=True) if not count]:
            raise NonFiniteScore(
                f"ThiNet: no layer that reads {', '.join(unseen[:3])} ran on the calibration data; list it in ignore=, "
                "or give a loss_fn= that runs these layers"
            )
        rows, widest = self.rows * samples, max(group.size for group in groups)
        if rows < _ENOUGH * widest:
            self.warn_once(
                "rows",
                f"ThiNet looks at {rows} rows to scale {widest} channels by, and wants {_ENOUGH} for each; give it "
                "more calibration data, or raise rows=",
            )

    def _due(self) -> list[str]:
        """Groups to be cut by the event that runs."""
        names = list(self._views)
        return [name for name in names[: _count(self._progress, len(names))] if not self._is_cut(name)]

    def _is_cut(self, name: str) -> bool:
        kept = self._views[name][0].kept
        return "wanted" in kept and int(self._alive[name].sum()) <= int(kept["wanted"][0])

    @property
    def _progress(self) -> float:
        """How much of the way there is to be gone after the event that runs."""
        assert self._at_event is not None
        if self._at_event[0] is None:
            return 1.0
        return max((event.progress for event in self.events if event.step <= self.steps), default=1.0)

    @property
    def _flow(self) -> Flow:
        assert self.graph.flow is not None
        return self.graph.flow

    def _readers(self, group: Group) -> list[tuple[Consumer, tuple[int, ...]]]:
        """Layers that read a group's channels in eval mode, with the numbers of their calls."""
        layers = self._flow.layers
        return [(consumer, layers[consumer.weight]) for consumer in group.consumers if consumer.weight in layers]

    @override
    def _taps(self, group: Group) -> Sequence[Any]:
        return self._readers(group)

    @override
    def _refusal(self, group: Group) -> str | None:
        if len(group.producers) > 1 and not self.streams:
            return f"{len(group.producers)} layers make its channels together, which streams=False leaves alone"
        for consumer, calls in self._readers(group):
            for record in (self._flow.calls[number] for number in calls):
                if record.name not in ARGUMENTS:
                    return f"{consumer.name!r} reads it in {record.name}(), where its terms cannot be told apart"
                if record.sources[1] is not None:
                    return f"{consumer.name!r} computes its weight anew in each forward, so that no scale stays in it"
        return super()._refusal(group)

    @override
    def _prepare(self, model: nn.Module) -> None:
        super()._prepare(model)
        events: list[Event] = []
        for number, event in enumerate(self._events):  # those that a layer falls to
            reached = _count(events[-1].progress, len(self._groups)) if events else 0
            if number < self._done or _count(event.progress, len(self._groups)) > reached:
                events.append(event)
        self._events = tuple(events)


def _key(group: Group, consumer: Consumer) -> str:
    return f"{group.name}/{consumer.weight}"


def _count(progress: float, groups: int) -> int:
    """How many of the groups are cut once that much of the way is gone."""
    return math.floor(progress * groups + 1e-9)
