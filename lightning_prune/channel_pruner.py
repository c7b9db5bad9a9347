"""What methods that remove channels share: measure, score, rank, then cut or mask, and the optimizers follow."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import checkpoint as _checkpoint
from lightning_prune import surgery
from lightning_prune.absorb import Absorbed, checked, for_cut
from lightning_prune.batches import own_precision
from lightning_prune.budget import Budget
from lightning_prune.compensation import Compensation, restore
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, NonFiniteScore, NothingToPrune, UnmeetableBudget, UnsafeCut
from lightning_prune.graph.groups import ChannelGraph, Group
from lightning_prune.graph.views import LayerView
from lightning_prune.ignore import matching
from lightning_prune.latency_table import STEPS, LatencyTable, Prediction, latency_table, measured_ms, unpaid
from lightning_prune.loop import forget_compiled, loss_scale
from lightning_prune.masks import Masks
from lightning_prune.optimizers import clear
from lightning_prune.pruner import Pruner, named, one_of, zero_copies
from lightning_prune.ranking import check_finite, check_finite_weights, rank_global, rank_uniform
from lightning_prune.state import Fields, reading
from lightning_prune.statistics import STATE, Statistics
from lightning_prune.taps import SampleGradients, Watch, watching

Join = Literal["sum", "mean", "min", "first"]
Scope = Literal["global", "uniform"]
Application = Literal["cut", "mask"]
Verify = Literal["first", "always", "never"]
Spot = Literal["weights", "maps", "gates"]  # where a method looks: groups without one are frozen for it


class ChannelPruner(Pruner):
    """A method that removes channels.

    It says how good each channel is: `measure` per batch and `score` per layer, or `scores` for the whole model.

    Args:
        budget: fraction of the dense flops (or params, units, or latency) that may be kept; met from below.
        apply: "cut" shrinks the network; "mask" holds channels at zero, shapes stay.
        round_to: channel counts become multiples of it where the group allows.
        min_channels: fewest channels a group keeps.
        scope: "global", one ranking of all groups, or "uniform", one common fraction solved for the budget.
        keep: group -> fraction of its own, with ``scope="uniform"``.
        verify: prove the "first" cut of each group, "always", or "never".
        absorb: add the constants of channels that go to what their readers make; a number takes near-constant channels
            as well, up to that tolerance (see `lightning_prune.absorb`), for which ``example_input`` has to be data.
        latency_table: a `lightning_prune.latency_table.LatencyTable`, or the path of one that was saved, to predict the
            time by; with a budget of latency and without one it is made before the first step, for batch 1.
        **shared: see `Pruner`.
    """

    kind = "channels"
    default_of = "flops"
    state_fields: ClassVar[Fields] = {
        **Pruner.state_fields,
        "apply?": str,
        "alive": dict[str, Tensor],
        "statistics?": STATE,
        "latency?": {"table": dict[str, Any], "measured_ms": float | None},
    }
    default_scope: ClassVar[Scope] = "global"
    looks_at: ClassVar[Spot] = "weights"
    join: Join = "sum"

    def __init__(
        self,
        budget: Budget | float,
        *,
        apply: Application = "cut",
        round_to: int = 1,
        min_channels: int = 1,
        scope: Scope | None = None,
        keep: Mapping[str, float] | None = None,
        verify: Verify = "first",
        absorb: bool | float = True,
        latency_table: Any = None,
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        one_of("apply", apply, ("cut", "mask"))
        one_of("verify", verify, ("first", "always", "never"))
        self.scope: Scope = self.default_scope if scope is None else scope
        one_of("scope", self.scope, ("global", "uniform"))
        for name, value in (("round_to", round_to), ("min_channels", min_channels)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if keep and self.scope != "uniform":
            raise ValueError("keep= gives groups fractions of their own, which needs scope='uniform'")
        for name, fraction in (keep or {}).items():
            if not 0 < fraction <= 1:
                raise ValueError(f"keep of group {name!r} must be in (0, 1], got {fraction!r}")
        self.apply: Application = apply
        self.round_to = round_to
        self.min_channels = min_channels
        self.keep = dict(keep or {})
        self.verify = verify
        self.absorb = absorb if isinstance(absorb, bool) else checked(absorb)
        self.latency_table = latency_table
        self._table = None if latency_table is None else LatencyTable.of_any(latency_table)
        self._prediction: Prediction | None = None
        self._measured_ms: float | None = None
        self._statistics: Statistics | None = None
        self._views: dict[str, list[LayerView]] = {}
        self._anchors: dict[str, int] = {}
        self._seen = Plan()
        self._alive: dict[str, Tensor] = {}
        self._spent: dict[str, Tensor] = {}
        self._dense_sizes: dict[str, int] = {}
        self._saved_statistics: dict[str, Any] | None = None
        self._watching: Watch | None = None
        self._gradients: SampleGradients | None = None

    @property
    @override
    def cuts(self) -> bool:
        return self.apply == "cut"

    def measure(self, view: LayerView) -> Tensor | None:
        """(C,) of one batch, read before the optimizer step; summed over the window. None: nothing to measure."""
        return None

    def measure_all(self, views: Mapping[str, Sequence[LayerView]]) -> dict[str, Tensor]:
        """group -> (C,) of one batch, joined over its producers; by default from `measure`, layer by layer."""
        found = {name: [self.measure(view) for view in group] for name, group in views.items()}
        known = {name: [part for part in parts if part is not None] for name, parts in found.items()}
        return {name: self._joined(parts) for name, parts in known.items() if parts}

    def combine(self, joined: Tensor) -> Tensor:
        """Of one batch, joined over each group's producers, on its way into the sum; squares belong here.

        Args:
            joined: (C,), each channel by itself: all groups come side by side.
        """
        return joined

    def observe(self, gate_gradients: Tensor) -> Tensor:
        """(C,) of one backward pass of training, summed over its samples; with ``looks_at`` not "weights".

        Args:
            gate_gradients: (B, C), for each sample's own loss its derivative by a gate on each channel, divided by
                the number of positions: the mean over positions of map times its gradient, signed, summed over the
                group's taps. Each channel by itself: all groups come side by side.
        """
        raise RuntimeError(f"{type(self).__name__} has no observe()")

    def compensate(self, keep: Mapping[str, Tensor]) -> Compensation:
        """New values for weights that stay, applied with the cut and taken back with it: group -> (C,) bool."""
        return Compensation()

    def score(self, view: LayerView) -> Tensor:
        """(C,) scores, larger = keep.

        A method that measures is asked once a group, with ``view.measured``; else once a producer, and the results are
        joined the method's way.
        """
        raise RuntimeError(f"{type(self).__name__} has neither score() nor scores()")

    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        """Scores of the whole model at once: group -> (C,). By default from `score`, group by group."""
        if not self._measures:
            return {name: self._joined([self.score(view) for view in group]) for name, group in views.items()}
        out = {}
        for name, group in views.items():
            out[name] = self.score(group[0])
        return out

    def select(self, scores: Mapping[str, Tensor], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, Tensor]:
        """Scores -> group -> (C,) bool, True = keep; by default ranking by exact count."""
        floors = {name: self._floor(name) for name in scores}
        if self.scope == "global":
            return rank_global(scores, fits, floors=floors, round_to=self.round_to)
        return rank_uniform(
            scores, fits, dense=self._dense_sizes, keep=self.keep, floors=floors, round_to=self.round_to
        )

    def after_prune(self, keep: Mapping[str, Tensor]) -> None:
        """Something a method does once channels are gone: group -> (C,) bool of what stayed."""

    def check(self, graph: ChannelGraph) -> None:
        """Say of a traced model, before anything is trained, whether there is something to prune and the budget is met.

        Raises:
            NothingToPrune: if no channel may go.
            UnmeetableBudget: if the budget is out of reach; the message says the smallest reachable value.
        """
        self._graph, self._frozen, self._dense_cost, self._plan = graph, graph.frozen, graph.cost(), Plan()
        self._statistics = None
        self._warned.clear()
        self._prepare(graph.model)

    def plan_for(self, graph: ChannelGraph) -> Plan:
        """What this method would keep of a traced model, all the way to the budget; nothing is cut.

        Raises:
            NothingToPrune: if no channel may go.
            UnmeetableBudget: if the budget is out of reach.
            ValueError: if the method learns while the model trains, or looks at data, and was given no ``calibration``.
        """
        scores = self.scores_for(graph)
        with torch.no_grad(), self._event(None, graph.model):
            return graph.plan(self._choose(scores, self.budget))

    def scores_for(self, graph: ChannelGraph) -> dict[str, Tensor]:
        """group -> (C,) scores of a traced model, without a Trainer; larger = keep. Raises as `plan_for`.

        A method that learns while the model trains sees the ``calibration`` batches instead, in eval mode.
        """
        if self._measures and (self.calibration is None or isinstance(self.calibration, int)):
            raise ValueError(
                f"{type(self).__name__} needs {self.needs}; add it to a Trainer, give it calibration= batches, or take "
                "a channel method that does not learn while the model trains, such as L1Filter"
            )
        self.check(graph)
        with torch.no_grad(), self._event(None, graph.model):
            if self._measures:
                self._learn()
            scores = self._score_all()
            check_finite(scores)
            return scores

    def _learn(self) -> None:
        """Fill the window from all calibration batches in eval mode, as training fills it; gradients are put back."""
        model = self.model
        before = {parameter: parameter.grad for parameter in model.parameters()}
        taps = {g.name: self._taps(g) for g in self._groups} if self._observes else {}
        gradients = SampleGradients(taps, mean=True)
        try:
            with self.evaluating(grad=True), watching(model, gradients.looks) if self._observes else nullcontext():
                for batch in self.calibrate(sys.maxsize):
                    model.zero_grad()
                    self.loss(batch).backward()  # type: ignore[no-untyped-call]
                    if self._observes:
                        self._observe(gradients.take())
                    else:
                        self._measure(self._views)
        finally:
            for parameter, gradient in before.items():
                parameter.grad = gradient

    @property
    def _measures(self) -> bool:
        """Whether it learns while the model trains."""
        return type(self).measure is not ChannelPruner.measure or self._observes

    @property
    def _observes(self) -> bool:
        return type(self).observe is not ChannelPruner.observe

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1 or self.join == "first":
            return parts[0]
        stacked = torch.stack(list(parts))
        if self.join == "sum":
            return stacked.sum(dim=0)
        return stacked.mean(dim=0) if self.join == "mean" else stacked.amin(dim=0)

    @override
    def _prepare(self, model: nn.Module) -> None:
        graph = self.graph
        ignored = matching(model, self.ignore) if self.ignore else set()
        self._groups: list[Group] = [g for g in graph.groups if g.producers and not _is_ignored(g, ignored)]
        if refused := {g.name: why for g in self._groups if (why := self._refusal(g))}:
            self._frozen = {**self._frozen, **refused}
            self._groups = [g for g in self._groups if g.name not in refused]
        if not self._groups:
            reasons = [f"{name}: {why}" for name, why in list(self._frozen.items())[:8]]
            left = [g for g in graph.groups if g.name not in self._frozen]
            reasons += [f"{g.name}: ignored" if g.producers else f"{g.name}: no layer makes it" for g in left]
            raise NothingToPrune(f"no channel of {type(model).__name__} may go: " + "; ".join(reasons))
        for name in self.keep:
            if name not in {g.name for g in self._groups}:
                raise ValueError(f"keep= names group {name!r}; groups are {', '.join(g.name for g in self._groups)}")
        state = self._restored or {}
        if (before := state.get("apply", self.apply)) != self.apply:
            raise IncompatibleCheckpoint(
                f"the checkpoint was written by {type(self).__name__} with apply={before!r}, this one has "
                f"apply={self.apply!r}, which cannot go on with what the other has done; use apply={before!r}"
            )
        alive = {name: mask.bool() for name, mask in state.get("alive", {}).items()}
        if alive:  # a group that a trial cut had frozen in the run that goes on stays so
            self._groups = [g for g in self._groups if g.name in alive]
        names = {g.name for g in self._groups}
        # a trace does not follow a lone channel, so groups that are down to one are not in it
        self._spent = {name: mask for name, mask in alive.items() if name not in names}
        self._check_alive(alive)
        self._dense_sizes = {g.name: self._plan.groups.get(g.name, (0, g.size))[1] for g in self._groups}
        self._alive = {g.name: alive.get(g.name, torch.ones(g.size, dtype=torch.bool)) for g in self._groups}
        self._total_units = sum(self._dense_sizes.values()) + sum(self._plan.groups[name][1] for name in self._spent)
        self._prepare_latency(state.get("latency"))
        self._seen = surgery.applied(model)
        self._look(model)
        if "statistics" in state and self._statistics is not None:
            with reading(f"the state of {type(self).__name__}"):
                self._statistics.load_state_dict(state["statistics"], without=self._spent)
        if self._plan.masks:
            masks = self._planned_masks({name: tuple(p.shape) for name, p in model.named_parameters()})
            self._masks = Masks(named(model, masks), masks)
            self._masks.zero()
        self._check_reachable()

    def _prepare_latency(self, saved: Mapping[str, Any] | None) -> None:
        """The table of a fit that goes on is the one it began with; all processes have that of the first."""
        self._prediction, self._measured_ms = None, None
        if saved is not None:
            with reading(f"the latency table of {type(self).__name__}"):
                self._table = LatencyTable.from_dict(saved["table"])
            self._measured_ms = saved["measured_ms"]
        elif self.latency_table is not None:
            self._table = LatencyTable.of_any(self.latency_table)
        elif self.budget.of == "latency":
            with own_precision(self.graph.model):
                mine = latency_table(self.graph).to_dict() if self._is_first else None
            self._table = LatencyTable.from_dict(self.same(mine))
        if self._table is not None:
            self._table.on(self.graph)

    @property
    def _is_first(self) -> bool:
        trainer = None if self._at_event is None else self._at_event[0]
        return trainer is None or trainer.is_global_zero

    @property
    def table(self) -> LatencyTable | None:
        """Measured times that a budget of latency is solved by; None before a fit, and without such a budget."""
        return self._table

    def _predicted_ms(self, counts: Any) -> float:
        """Milliseconds for (G,) channels kept per group of the graph as it is now."""
        assert self._table is not None
        if self._prediction is None or self._prediction.graph is not self.graph:
            self._prediction = self._table.on(self.graph)
        return self._prediction.milliseconds(counts)

    def _check_alive(self, alive: Mapping[str, Tensor]) -> None:
        """Refuse what a checkpoint says of groups that are not so."""
        sizes = {g.name: g.size for g in self._groups}
        for name, mask in alive.items():
            if name not in sizes and name not in self._plan.groups:
                raise IncompatibleCheckpoint(
                    f"the state of {type(self).__name__} names a group {name!r} that is not there"
                )
            if mask.ndim != 1 or len(mask) != sizes.get(name, len(mask)) or not bool(mask.any()):
                raise IncompatibleCheckpoint(
                    f"the state of {type(self).__name__} has alive[{name!r}] of shape {tuple(mask.shape)} with "
                    f"{int(mask.count_nonzero())} channels, in a group of {sizes.get(name, 'any size')}"
                )

    def _taps(self, group: Group) -> Sequence[Any]:
        """Where this method looks at a group."""
        if self.looks_at == "weights":
            return group.producers
        return self.graph.maps(group) if self.looks_at == "maps" else self.graph.gates(group)

    def _refusal(self, group: Group) -> str | None:
        """Why this method leaves a group whole; None if it does not."""
        if self._taps(group):
            return None
        return f"no tensor carries its channels where {type(self).__name__} looks, in a forward in eval mode"

    def _floor(self, group: str) -> int:
        """Fewest channels that a group keeps."""
        return self.min_channels

    @override
    def _catch_up(self, model: pl.LightningModule) -> None:
        seen = surgery.applied(model)
        if seen is self._seen or self._graph is None or self._statistics is None:
            return
        self._seen = seen
        before = {group.name: group.size for group in self._groups}
        with own_precision(model):
            self._graph = surgery.trace(model, self.graph.example_inputs)
        self._groups = [group for group in self.graph.groups if group.name in before and group.producers]
        same = {group.name for group in self._groups if group.size == before[group.name]}
        self._statistics.drop(before.keys() - same)
        self._statistics.join({group.name: group.size for group in self._groups})
        self._alive = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self._groups}
        self._look(model)
        if self._watching is not None:
            self._watch(model)
        self._cost_now = self._current_cost()

    def _look(self, model: nn.Module) -> None:
        """Views of the network as it is now."""
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._views = {g.name: [LayerView(g, p, parameters, self.graph) for p in g.producers] for g in self._groups}
        if self._statistics is None:
            device = next(iter(parameters.values())).device
            self._statistics = Statistics({g.name: g.size for g in self._groups}, device)
        self._anchors = {name: _anchor(views[0], parameters) for name, views in self._views.items()}
        for name, views in self._views.items():
            for view in views:
                view.kept = self._statistics.kept[name]

    @override
    def _start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        super()._start(trainer, model)
        if self._observes:
            if not trainer.is_global_zero and self._statistics is not None:
                self._statistics.cut({})  # the first process takes up what `on_save_checkpoint` wrote of all of them
            self._watch(model)

    def _watch(self, model: nn.Module) -> None:
        """Look at the maps of ordinary training batches from now on."""
        self._stop_watching()
        self._gradients = SampleGradients({g.name: self._taps(g) for g in self._groups}, mean=True)
        self._watching = Watch(model, self._gradients.looks)
        self._watching.begin()

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.end()
        self._watching = self._gradients = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See maps as they are now, also where a callback after this one has cut the model."""
        if self._watching is not None:
            self._catch_up(pl_module)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Gradients that were taken until here, of a penalty or in validation, are not the loss's."""
        if self._gradients is not None:
            self._gradients.clear()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients of maps are whole here."""
        if self._watching is None or self._gradients is None:
            return
        if self._done == len(self._events):
            self._stop_watching()
            return
        self._watching.settle()
        scale = loss_scale(trainer) / (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        self._observe(self._gradients.take(), scale)

    def _observe(self, found: Mapping[str, Tensor], scale: Tensor | float = 1.0) -> None:
        """Add what a backward pass says to the window."""
        assert self._statistics is not None
        if found:
            values: dict[str, Tensor] = {}
            whole = isinstance(scale, float) and scale == 1  # a tensor would have to be waited for
            with torch.no_grad():
                for rows in {len(gradients) for gradients in found.values()}:
                    alike = {name: gradients for name, gradients in found.items() if len(gradients) == rows}
                    values |= _side_by_side(alike, lambda every: self.observe(every if whole else every / scale))
            self._statistics.add(values, weight=max(len(gradients) for gradients in found.values()))

    def _counts(self, counts: Mapping[str, int]) -> Any:
        graph = self.graph
        kept = graph.costs.dense.copy()
        kept[[graph._by_name[name] for name in counts]] = list(counts.values())
        return kept

    def _measured_cost(self, counts: Mapping[str, int]) -> int:
        """What the budget bounds, for channel counts."""
        if self.budget.of == "units":
            return len(self._spent) + sum(counts.get(name, int(mask.sum())) for name, mask in self._alive.items())
        costs, kept = self.graph.costs, self._counts(counts)
        if self.budget.of == "latency":
            return round(1e6 * self._predicted_ms(kept))  # whole nanoseconds
        return int(costs.flop_terms(kept).sum()) if self.budget.of == "flops" else costs.params(kept)

    def _dense_measure(self) -> int:
        assert self._dense_cost is not None
        of = self.budget.of
        if of == "latency":
            assert self._table is not None
            return round(1e6 * self._table.dense_ms)
        return (
            self._total_units if of == "units" else self._dense_cost.flops if of == "flops" else self._dense_cost.params
        )

    def _check_reachable(self) -> None:
        """Say now, not at the last event, that the budget is out of reach."""
        fewest = {
            name: min(int(self._alive[name].sum()), max(1, self._floor(name)), self._dense_sizes[name])
            for name in self._views
        }
        if self.round_to > 1:
            fewest = {n: min(int(self._alive[n].sum()), max(k, self.round_to)) for n, k in fewest.items()}
        least, dense = self._measured_cost(fewest), max(1, self._dense_measure())
        if not self.budget.fits(least, dense):
            smallest = math.ceil(1e4 * least / dense) / 1e4  # not rounded down: it has to be met if asked for
            raise UnmeetableBudget(
                f"{type(self).__name__}: a budget of {self.budget.keep:g} of the {self.budget.of} cannot be met: with "
                f"the fewest channels allowed {smallest:.4f} are left; raise keep, lower min_channels or round_to"
                + (", or ignore fewer layers" if self.ignore else "")
            )

    @property
    @override
    def _gathers(self) -> bool:
        measured = self._measures and not self._observes
        return measured and self._statistics is not None and self._done < len(self._events)

    @override
    def _gather(self, optimizer: Optimizer) -> None:
        if self._gathers:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            # the others are measured when the optimizer that trains them steps
            self._measure({name: views for name, views in self._views.items() if self._anchors[name] in held})

    def _measure(self, views: Mapping[str, Sequence[LayerView]]) -> None:
        """Add what a batch's gradients say of these groups to the window."""
        assert self._statistics is not None
        with torch.no_grad():
            if joined := self.measure_all(views):
                self._statistics.add(_side_by_side(joined, self.combine))

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        # else only the proof of a cut finds out; what is not trained may be infinite on purpose, as masks of attention
        check_finite_weights({name: p for name, p in model.named_parameters() if p.requires_grad})
        scores = self._score_all()
        check_finite(scores)
        keep = self._choose(scores, self._budget_at(progress))
        if self._table is not None:
            self._warn_unpaid(keep)
        changed = self._apply(trainer, model, keep, scores, progress)
        if self._table is not None and progress == 1 and self.cuts:
            self._compare_latency()
        return changed

    def _warn_unpaid(self, keep: Mapping[str, Tensor]) -> None:
        """Name groups whose channel counts lie just where more of them would take no longer."""
        counts = self._counts({name: int(mask.sum()) for name, mask in keep.items()})
        self._predicted_ms(counts)
        assert self._prediction is not None
        if found := unpaid(self._prediction, counts):
            first = ", ".join(f"{name} {n} instead of {more}" for name, (n, more) in list(found.items())[:4])
            step = max(step for step in STEPS if any(more % step == 0 for _, more in found.values()))
            self.warn_once(
                "unpaid",
                f"{type(self).__name__}: the cut of {len(found)} of {len(counts)} groups does not pay ({self._table}): "
                f"{first} channels take as long; round_to={step} keeps to counts that do pay",
            )

    def _compare_latency(self) -> None:
        """Time the network as it is, by the first process, and say it beside the prediction."""
        table, graph = self._table, self.graph
        assert table is not None
        predicted = self._predicted_ms(graph.costs.dense)
        self._measured_ms = self.same(measured_ms(graph, table) if self._is_first else None)
        if self._measured_ms is None:
            rank_zero_info(
                f"{type(self).__name__}: {predicted:.3f} ms predicted; the table is of another device ({table})"
            )
            return
        rank_zero_info(
            f"{type(self).__name__}: {predicted:.3f} ms predicted, {self._measured_ms:.3f} ms measured, "
            f"{table.dense_ms:.3f} ms dense ({table})"
        )

    def _score_all(self) -> dict[str, Tensor]:
        assert self._statistics is not None
        if self._measures:
            if missing := self._statistics.unmeasured(self.total):
                device = next(self.model.parameters()).device
                seen = int(self.total(torch.tensor(float(self._statistics.skipped), device=device)))
                raise NonFiniteScore(
                    f"{type(self).__name__} has no finite batch to score by: {seen} batches were not finite; "
                    "look at the loss and its gradients"
                    if seen
                    else f"{type(self).__name__} has no gradient to score {', '.join(missing[:3])} by: a training "
                    "batch must run first, and these layers must be trained; move the event later or ignore= them"
                )
            for name, mean in self._statistics.means().items():
                for view in self._views[name]:
                    view.measured = mean
        return self.scores(self._views)

    def _choose(self, scores: Mapping[str, Tensor], budget: Budget) -> dict[str, Tensor]:
        """Scores -> group -> (C,) bool over the channels the network has now."""
        dense = self._dense_measure()
        alive = {name: score[self._alive[name].to(score.device)] for name, score in scores.items()}
        sizes = {name: len(score) for name, score in alive.items()}
        if budget.fits(self._measured_cost(sizes), dense) and self.scope == "global":
            return {name: self._alive[name].clone() for name in scores}
        try:
            chosen = self.select(alive, lambda counts: budget.fits(self._measured_cost(counts), dense))
        except UnmeetableBudget as error:
            raise UnmeetableBudget(
                f"{type(self).__name__}: {budget.keep:g} of the {budget.of} cannot be met now: {error}"
            ) from error
        out = {}
        for name, mask in chosen.items():
            whole = self._alive[name].clone()
            whole[self._alive[name]] = mask.cpu()
            out[name] = whole
        return out

    def _apply(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        keep: dict[str, Tensor],
        scores: Mapping[str, Tensor],
        progress: float,
    ) -> bool:
        assert self._statistics is not None
        chosen = keep
        changed = any(not torch.equal(mask, self._alive[name]) for name, mask in keep.items())
        if self.apply == "mask":
            self._mask(trainer, model, keep)
        elif changed:
            keep = self._cut(trainer, model, keep, scores, progress)
        else:
            self._statistics.cut({name: torch.ones(len(m), dtype=torch.bool) for name, m in keep.items()})
        self._log_scores(trainer, scores, chosen)
        self.after_prune(keep)
        return changed

    def _cut(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        keep: dict[str, Tensor],
        scores: Mapping[str, Tensor],
        progress: float,
    ) -> dict[str, Tensor]:
        graph, statistics = self.graph, self._statistics
        assert statistics is not None
        self._stop_watching()
        step = graph.plan(keep)
        since = surgery.applied(model)
        plan = surgery.compose(since, step)
        compensation = self.compensate(keep)
        before = compensation.apply(model)
        if model.automatic_optimization:  # they are of the step that was made; the next one starts without
            model.zero_grad()
        try:
            surgery.cut(
                model,
                plan,
                trainer.optimizers,
                graph=graph,
                since=since,
                absorb=self._absorbed(trainer, model, plan, since),
                verify="always" if self._to_be_proved(keep) else "never",
            )
        except UnsafeCut as error:
            restore(model, before)
            settled = surgery.settle(graph, [g.name for g in self._groups], keep)
            if len(settled.groups) == len(graph.groups):
                raise
            gone = sorted(set(settled.frozen) - set(graph.frozen))
            warnings.warn(f"{type(self).__name__} freezes {', '.join(gone)}: {error}", stacklevel=2)
            self._graph, self._frozen = settled, {**self._frozen, **settled.frozen}
            self._groups = [g for g in self._groups if g.name not in gone]
            for name in gone:
                del self._views[name], self._alive[name], self._dense_sizes[name]
            self._total_units = sum(self._dense_sizes.values())
            statistics.drop(gone)
            if not self._groups:
                raise NothingToPrune(
                    f"no channel of {type(model).__name__} may go, as trial cuts showed: {error}"
                ) from error
            kept_scores = {name: score for name, score in scores.items() if name not in gone}
            again = self._choose(kept_scores, self._budget_at(progress))
            return self._cut(trainer, model, again, kept_scores, progress)
        new = [p for name, p in model.named_parameters() if name in before]
        clear(trainer.optimizers, {p: torch.zeros_like(p, dtype=torch.bool) for p in new})
        for copy in _checkpoint.copies(trainer, model):
            compensation.apply(copy)
            own = self._absorbed(trainer, copy, plan, since)
            surgery.cut(copy, plan, since=since, verify="never", absorb=own)
        self._plan, self._seen = plan, surgery.applied(model)
        self._graph = graph.after(step)
        names = {g.name for g in self._groups}
        self._groups = [g for g in self.graph.groups if g.name in names]
        self._alive = {g.name: torch.ones(g.size, dtype=torch.bool) for g in self._groups}
        statistics.cut(keep)
        self._look(model)
        if self._observes:
            self._watch(model)
        _checkpoint.wrap_again(trainer, model)
        forget_compiled(model)
        return keep

    def _to_be_proved(self, keep: Mapping[str, Tensor]) -> bool:
        """With "first": whether a group is cut that has not been before, so that nothing is proved of it yet."""
        if self.verify != "first":
            return self.verify == "always"
        cut = {name for name, (left, size) in self._plan.groups.items() if left < size}
        return any(not bool(mask.all()) and name not in cut for name, mask in keep.items())

    def _absorbed(self, trainer: pl.Trainer, model: nn.Module, plan: Plan, since: Plan) -> Absorbed:
        """What a cut of the module, or of a copy of it, is to absorb; the same on all processes."""
        found: Absorbed = trainer.strategy.broadcast(for_cut(model, plan, self.graph, self.absorb, since=since))
        return found

    def _mask(self, trainer: pl.Trainer, model: pl.LightningModule, keep: dict[str, Tensor]) -> None:
        assert self._statistics is not None
        plan = self.graph.plan(keep)
        parameters = named(model, plan.kept)
        masks = {name: _outer(parameters[name].shape, dims) for name, dims in plan.kept.items()}
        self._plan = Plan(masks=masks, shapes={n: tuple(m.shape) for n, m in masks.items()}, groups=plan.groups)
        self._masks = Masks(parameters, masks)
        compensation = self.compensate(keep)
        for held in (model, *_checkpoint.copies(trainer, model)):
            compensation.apply(held)
            self._absorbed(trainer, held, plan, Plan()).add_to(held)
        self._masks.zero()
        zero_copies(trainer, model, masks)
        clear(trainer.optimizers, {parameters[name]: mask for name, mask in masks.items()})
        self._alive = keep
        self._statistics.cut({name: torch.ones(len(mask), dtype=torch.bool) for name, mask in keep.items()})

    @override
    def _current_cost(self) -> Cost:
        return self.graph.costs.cost(self._counts({name: int(mask.sum()) for name, mask in self._alive.items()}))

    @override
    def _row(self) -> dict[str, float]:
        assert self._dense_cost is not None
        cost = self._cost_now or self._dense_cost
        kept = {name: int(mask.sum()) for name, mask in {**self._alive, **self._spent}.items()}
        row = {
            "prune/flops": float(cost.flops),
            "prune/flops_kept": cost.flops / max(1, self._dense_cost.flops),
            "prune/params": float(cost.params),
            "prune/params_kept": cost.params / max(1, self._dense_cost.params),
            "prune/density": sum(kept.values()) / max(1, self._total_units),
            "prune/flops_sparse": float(cost.flops),
        }
        if self._table is not None:
            alive = {name: int(mask.sum()) for name, mask in self._alive.items()}
            row["prune/latency_ms"] = self._predicted_ms(self._counts(alive))
            row["prune/latency_kept"] = row["prune/latency_ms"] / self._table.dense_ms
            if self._measured_ms is not None:
                row["prune/latency_measured_ms"] = self._measured_ms
        row.update({f"prune/channels/{name}": float(n) for name, n in kept.items()})
        return row

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Also of what other processes saw: this is called on all of them, and the first writes."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.world_size > 1 and self._observes and self._statistics is not None and state is not None:
            with self._event(trainer, pl_module):
                state["statistics"] = self._statistics.state_dict(self.total)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["apply"] = self.apply
        state["alive"] = {name: mask.to(torch.uint8) for name, mask in {**self._alive, **self._spent}.items()}
        statistics = self._saved_statistics if self._statistics is None else self._statistics.state_dict()
        if statistics is not None:
            state["statistics"] = statistics
        if self._table is not None:
            state["latency"] = {"table": self._table.to_dict(), "measured_ms": self._measured_ms}
        return state

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._stop_watching()
        if stage == "fit":
            self._saved_statistics = None if self._statistics is None else self._statistics.state_dict()
            self._views, self._statistics, self._masks, self._prediction = {}, None, None, None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop_watching()


def _side_by_side(parts: Mapping[str, Tensor], each: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """group -> (..., C): what a function makes of all groups at once, in a few operations however many there are."""
    sizes = [part.shape[-1] for part in parts.values()]
    whole = torch.cat(list(parts.values()), dim=-1) if len(parts) > 1 else next(iter(parts.values()))
    return dict(zip(parts, torch.split(each(whole), sizes, dim=-1), strict=True))


def _anchor(view: LayerView, parameters: Mapping[str, Tensor]) -> int:
    """Identity of the parameter whose optimizer's turn is the group's: the first that is trained."""
    names = [view.weight_name, *view.gate_names]
    return id(parameters[next((n for n in names if parameters[n].requires_grad), names[0])])


def _is_ignored(group: Group, ignored: set[str]) -> bool:
    return any(p.weight in ignored for p in group.producers)


def _outer(shape: Sequence[int], dims: Mapping[int, Tensor]) -> Tensor:
    mask = torch.ones(tuple(shape), dtype=torch.bool)
    for dim, kept in dims.items():
        alive = torch.zeros(shape[dim], dtype=torch.bool)
        alive[kept] = True
        mask &= alive.reshape([-1 if i == dim else 1 for i in range(len(shape))])
    return mask
