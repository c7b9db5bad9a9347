"""The walk from a batch to a smaller network: what every method shares. Read this first.

    batch      -> on_before_optimizer_step   gradients are whole here: `measure` them, mask them
    statistics -> statistics.py              sums over batches and processes of what `measure` returned
    scores     -> `score` or `scores`        the method's paper
    ranking    -> `select`                   ranking.py, asked with the budget about the cost
    plan       -> decision.py                one frozen value
    mask | cut -> `apply_plan`               masks.py | surgery.py
    optimizer  -> optimizers.py              follows
    log        -> `log_row`                  one row an event and an epoch

Events run in one place: at progress 0 in `on_train_start`, every other one in `on_train_batch_end` of the first batch
whose optimizer step reaches it, before validation and before checkpoints are written.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import checkpoint as _checkpoint
from lightning_prune import figures, surgery
from lightning_prune.batches import example_from_batch, quiet_loss, second_iterator
from lightning_prune.budget import Budget, Of
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import NoEvent, NonFiniteScore, NothingToPrune, UnmeetableBudget, UnsafeCut
from lightning_prune.graph.groups import ChannelGraph, Group
from lightning_prune.graph.views import LayerView
from lightning_prune.ignore import matching
from lightning_prune.masks import Masks
from lightning_prune.optimizers import check, clear
from lightning_prune.ranking import check_finite, rank_global, rank_uniform, rank_weights
from lightning_prune.report import Report
from lightning_prune.schedule import Event, OneShot, Schedule
from lightning_prune.statistics import Statistics

Join = Literal["sum", "mean", "min", "first"]
Scope = Literal["global", "uniform"]
Application = Literal["cut", "mask"]
Verify = Literal["first", "always", "never"]
OnNonfinite = Literal["raise", "postpone"]
LossFn = Callable[[pl.LightningModule, Any], Tensor]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    year: int
    url: str


class Pruner(Callback):
    """What all methods share: events, example input, budget, logging, checkpoints. Use a method, not this class.

    Args:
        budget: what may be kept in the end: a `Budget`, or a fraction of what the kind of method prunes.
        schedule: when to prune, and how far on the way each time.
        ignore: glob patterns of module or parameter names that stay whole; one that matches nothing is an error.
        example_input: what to trace on; default ``pl_module.example_input_array``, else what the modules get from the
            first training batch.
        calibration: loader, or number of samples, for methods that look at data at an event; default the training
            loader, iterated a second time with a random state of its own.
        loss_fn: ``(pl_module, batch) -> loss`` for methods that need one at an event; default ``training_step`` with
            logging switched off.
        on_nonfinite: at an event without a finite batch, or with NaN scores: "raise", or "postpone" to the next step.

    Attributes:
        plan: all that was decided so far, in indices of the dense model.
        report: dense against now, with one row per event.
        dense_cost: cost of the model at fit start; None before the first fit.
        events: when this fit prunes.
        events_done: how many of them are done.
        steps: optimizer steps so far, by our own count.
    """

    kind: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    needs: ClassVar[str] = "nothing"
    default_of: ClassVar[Of] = "flops"
    default_schedule: ClassVar[Schedule] = OneShot(0.5)
    first_step: ClassVar[int] = 0  # 1 for a method that needs a gradient before its first event

    def __init__(
        self,
        budget: Budget | float,
        *,
        schedule: Schedule | None = None,
        ignore: Sequence[str] = (),
        example_input: Any = None,
        calibration: Any = None,
        loss_fn: LossFn | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        self.budget = Budget.of_any(budget).resolved(self.default_of)
        if self.budget.of == "latency":
            raise ValueError(
                "Budget(of='latency') needs a measured latency table, which this version does not have yet"
            )
        self.schedule = self.default_schedule if schedule is None else schedule
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"schedule must be OneShot, Iterative, Gradual or another Schedule, got {schedule!r}")
        self.ignore = [ignore] if isinstance(ignore, str) else list(ignore)
        self.example_input = example_input
        self.calibration = calibration
        self.loss_fn = loss_fn
        if on_nonfinite not in ("raise", "postpone"):
            raise ValueError(f"on_nonfinite must be 'raise' or 'postpone', got {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self._plan = Plan()
        self._dense_cost: Cost | None = None
        self._events: tuple[Event, ...] = ()
        self._done = 0
        self._steps = 0
        self._missed = 0  # steps that a dense run had done, in a fit that goes on from its checkpoint
        self._total_steps: int | None = None
        self._rows: list[dict[str, float]] = []
        self._seconds = 0.0
        self._seed: str | None = None
        self._restored: dict[str, Any] | None = None
        self._graph: ChannelGraph | None = None
        self._handles: list[Any] = []
        self._started = False
        self._stepped = False

    @property
    def plan(self) -> Plan:
        """All that was decided so far, in indices of the dense model."""
        return self._plan

    @property
    def dense_cost(self) -> Cost | None:
        """Cost of the model at fit start; None before the first fit."""
        return self._dense_cost

    @property
    def events(self) -> tuple[Event, ...]:
        """When this fit prunes, by optimizer step."""
        return self._events

    @property
    def events_done(self) -> int:
        """How many of the events are done."""
        return self._done

    @property
    def steps(self) -> int:
        """Optimizer steps so far, by our own count."""
        return self._steps

    @property
    def graph(self) -> ChannelGraph:
        """The channel graph of the network as it is now; for methods, while a fit runs.

        Raises:
            RuntimeError: outside of a fit.
        """
        if self._graph is None:
            raise RuntimeError(f"{type(self).__name__} has a channel graph only while a fit runs")
        return self._graph

    @property
    def report(self) -> Report:
        """Dense against now, with one row per event.

        Raises:
            RuntimeError: before the first fit.
        """
        if self._dense_cost is None:
            raise RuntimeError(f"{type(self).__name__} has no report before a fit has started")
        return Report(
            before=self._dense_cost,
            after=self._cost_now or self._dense_cost,
            groups=dict(self._plan.groups),
            removed=_removed(self._plan),
            frozen=dict(self._frozen),
            rows=tuple(self._rows),
            seconds=self._seconds,
        )

    _cost_now: Cost | None = None
    _shown: float | None = None
    _frozen: Mapping[str, str] = {}

    @abstractmethod
    def _prepare(self, model: nn.Module) -> None:
        """Look at the traced model once: what may go, and whether the budget can be met."""

    @abstractmethod
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        """One event; returns whether anything went."""

    @abstractmethod
    def _row(self) -> dict[str, float]:
        """What is logged: the common metrics."""

    def _gather(self, optimizer: Optimizer) -> None:
        """Look at whole gradients, before the optimizer step."""

    def _after_step(self) -> None:
        """After every optimizer step."""

    def _catch_up(self, model: pl.LightningModule) -> None:
        """Look again, if another callback has cut the model."""

    def loss(self, model: pl.LightningModule, batch: Any) -> Tensor:
        """The training loss of a batch, without logging and without a trace on trainer, metrics, norms or RNG.

        Raises:
            RuntimeError: under manual optimization without ``loss_fn``, or if ``training_step`` returns no loss.
        """
        return quiet_loss(model, batch, self.loss_fn)

    def calibrate(self, trainer: pl.Trainer, model: pl.LightningModule, samples: int) -> Iterator[Any]:
        """Batches for calibration, on the module's device, at least ``samples`` samples where there are as many."""
        yield from second_iterator(trainer, model, self.calibration, samples, seed=self.seed("calibration"))

    def generator(self, event: str, layer: str = "") -> torch.Generator:
        """A CPU generator that is equal on all processes, for a random choice at an event in a layer."""
        return torch.Generator().manual_seed(self.seed(f"{event}/{layer}/{self._done}"))

    def seed(self, purpose: str) -> int:
        """A seed from the run's own (``seed_everything``), the class and a purpose; equal on all processes."""
        run = _global_seed() if self._seed is None else self._seed
        text = f"{run}/{type(self).__name__}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    @property
    @override
    def state_key(self) -> str:
        scope = f"{sorted(self.ignore)}/{self.budget}/{self.schedule}"
        return f"{type(self).__name__}-{hashlib.sha256(scope.encode()).hexdigest()[:8]}"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything changes; make checkpoints of a cut model load."""
        if not isinstance(trainer, pl.Trainer) or not isinstance(pl_module, pl.LightningModule):
            wrong = trainer if not isinstance(trainer, pl.Trainer) else pl_module
            raise RuntimeError(
                f"lightning_prune builds on 'lightning', but {type(wrong).__name__} comes from "
                f"'{type(wrong).__module__.partition('.')[0]}'; import Trainer and LightningModule from "
                "lightning.pytorch, not pytorch_lightning"
            )
        if stage == "fit":
            matching(pl_module, self.ignore)
            _refuse_sharding(trainer)
            _refuse_cut_under_masks(trainer)
            self._started = False
        self._handles.append(_checkpoint.conform_on_load(trainer, pl_module))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if stage == "fit":
            self._graph = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace the model, fix the events, and run one that is due at the start."""
        for callback in _pruners(trainer):  # all of them before one cuts: keep is of the dense model
            if not callback._started:
                callback._start(trainer, pl_module)
        self._run_due(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are whole and unscaled here: measure, then mask."""
        self._stepped = True
        self._catch_up(pl_module)
        self._gather(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and run what is due."""
        if self._stepped:
            self._stepped = False
            self._steps += 1
            self._after_step()
            self._catch_up(pl_module)
            self._run_due(trainer, pl_module)
        self._show(pl_module, first=batch_idx == 0)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the metrics known to checkpoints that are written after validation."""
        if not trainer.sanity_checking and self._dense_cost is not None and self._graph is not None:
            self._catch_up(pl_module)
            self._monitor(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One row an epoch."""
        self._catch_up(pl_module)
        self._monitor(trainer, pl_module)
        self.log_row(trainer, ended=True)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the plan where a load finds it before the weights."""
        _checkpoint.add_plan(checkpoint, self.state_key, self._plan)

    @override
    def state_dict(self) -> dict[str, Any]:
        cost = self._dense_cost
        return {
            "version": 1,
            "plan": self._plan.state_dict(),
            "dense": None if cost is None else {"flops": cost.flops, "params": cost.params},
            "dense_by_layer": {} if cost is None else {k: dict(v) for k, v in cost.by_layer.items()},
            "events": [[event.step, event.progress] for event in self._events],
            "done": self._done,
            "steps": self._steps,
            "missed": self._missed,
            "total_steps": self._total_steps,
            "seconds": self._seconds,
            "seed": self._seed,
            "rows": [dict(row) for row in self._rows],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        self._plan = Plan.from_state_dict(state_dict["plan"])
        dense = state_dict["dense"]
        self._dense_cost = (
            None if dense is None else Cost(dense["flops"], dense["params"], state_dict["dense_by_layer"])
        )
        self._events = tuple(Event(int(step), float(progress)) for step, progress in state_dict["events"])
        self._done = int(state_dict["done"])
        self._steps = int(state_dict["steps"])
        self._missed = int(state_dict["missed"])
        self._total_steps = state_dict["total_steps"]
        self._seconds = float(state_dict["seconds"])
        self._seed = state_dict["seed"]
        self._rows = [dict(row) for row in state_dict["rows"]]

    def _start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        resumed = self._restored is not None
        self._started, self._stepped = True, False
        if not resumed:
            surgery.call_dense(model)
            self._plan, self._done, self._steps, self._rows, self._seconds = Plan(), 0, 0, [], 0.0
            self._seed, self._cost_now = _global_seed(), None
            self._missed = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._fix_events(trainer, resumed)
        self._graph = self._trace(trainer, model)
        self._frozen = self.graph.frozen
        if not resumed or self._dense_cost is None:
            self._dense_cost = self.graph.cost()
        self._prepare(model)
        check(trainer.optimizers, self._changing(model))
        self._restored = None
        if resumed:
            self._cost_now = self._current_cost()

    def _changing(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters whose optimizer state will have to follow."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _current_cost(self) -> Cost:
        return self.graph.cost()

    def _fix_events(self, trainer: pl.Trainer, resumed: bool) -> None:
        total = trainer.estimated_stepping_batches
        steps = int(total) - self._missed if total != float("inf") else None
        if resumed and steps == self._total_steps:
            return
        batches = trainer.num_training_batches
        per_epoch = None if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)
        events = self.schedule.resolve(steps, per_epoch)
        if self.first_step and self.schedule.unit == "fit":  # in a very short fit a fraction of it rounds to the start
            moved = {max(e.step, self.first_step): e for e in events}
            events = tuple(Event(step, e.progress) for step, e in moved.items())
        if not events:
            raise NoEvent(f"{type(self).__name__}: {self.schedule} has no event in a fit of {steps} steps")
        if resumed:  # a longer fit moves only what is not done yet
            left = events[self._done :]
            events = (*self._events[: self._done], *(Event(max(e.step, self._steps + 1), e.progress) for e in left))
        self._events, self._total_steps = events, steps

    def _trace(self, trainer: pl.Trainer, model: pl.LightningModule) -> ChannelGraph:
        example = self.example_input
        if example is None:
            example = model.example_input_array
        if example is None:
            example = example_from_batch(trainer, model, self.loss_fn, self.seed("example"))
        return surgery.trace(model, example)

    def _run_due(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Run the last of the events that are due; the earlier ones are contained in it."""
        due = [i for i in range(self._done, len(self._events)) if self._events[i].step <= self._steps]
        if not due:
            return
        started = time.perf_counter()
        try:
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                changed = self._decide_and_apply(trainer, model, self._events[due[-1]].progress)
        except NonFiniteScore as error:
            if self.on_nonfinite == "raise":
                raise
            rank_zero_warn(f"{type(self).__name__} postpones its event at step {self._steps}: {error}")
            return
        self._done = due[-1] + 1
        self._seconds += time.perf_counter() - started
        if not changed:
            rank_zero_warn(f"{type(self).__name__}: the event at step {self._steps} changed nothing")
        self._cost_now = self._current_cost()
        row = self.log_row(trainer)
        self._rows.append({"step": float(self._steps), **row})
        self._log_pictures(trainer)
        rank_zero_info(
            f"{type(self).__name__}: event {self._done} of {len(self._events)} at step {self._steps}, "
            f"flops kept {row['prune/flops_kept']:.4f}, density {row['prune/density']:.4f}"
        )

    def log_row(self, trainer: pl.Trainer, ended: bool = False) -> dict[str, float]:
        """Write one row to every logger, at Lightning's step (at an epoch's end its last batch's); returns it."""
        row = self._row()
        row["prune/event"] = float(self._done)
        row["prune/seconds"] = self._seconds
        step = max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - ended)
        for logger in trainer.loggers:
            logger.log_metrics(row, step)
        return row

    def _monitor(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        row = self._row()
        for key in ("prune/flops_kept", "prune/density", "prune/params_kept"):
            several = trainer.world_size > 1
            model.log(key, row[key], on_step=False, on_epoch=True, logger=False, sync_dist=several)

    def _show(self, model: pl.LightningModule, first: bool) -> None:
        """In the progress bar, where it changed or an epoch began; the bar keeps it."""
        if self._cost_now is None or self._dense_cost is None:
            return
        kept = self._cost_now.flops / max(1, self._dense_cost.flops)
        if first or kept != self._shown:
            self._shown = kept
            model.log("flops_kept", kept, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def _log_pictures(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._plan.groups:
            before = {name: of for name, (_, of) in self._plan.groups.items()}
            after = {name: kept for name, (kept, _) in self._plan.groups.items()}
            figures.log_figure(
                trainer.loggers, "prune/architecture", lambda: figures.architecture_figure(before, after), step
            )
        figures.log_figure(
            trainer.loggers, "prune/curve", lambda: figures.curve_figure([_plain(row) for row in self._rows]), step
        )


def _global_seed() -> str:
    return os.environ.get("PL_GLOBAL_SEED", "0")


def _plain(row: Mapping[str, float]) -> dict[str, object]:
    return dict(row)


def _removed(plan: Plan) -> dict[str, dict[int, int]]:
    return {
        name: {dim: plan.shapes[name][dim] - len(kept) for dim, kept in dims.items()}
        for name, dims in plan.kept.items()
    }


def _pruners(trainer: pl.Trainer) -> list[Pruner]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Pruner)]  # type: ignore[attr-defined]


def _refuse_cut_under_masks(trainer: pl.Trainer) -> None:
    cutting = [type(c).__name__ for c in _pruners(trainer) if isinstance(c, ChannelPruner) and c.apply == "cut"]
    masking = [type(c).__name__ for c in _pruners(trainer) if not isinstance(c, ChannelPruner) or c.apply == "mask"]
    if cutting and masking:
        raise RuntimeError(
            f"{cutting[0]} cuts weights that {masking[0]} holds masks on; prune channels first, and weights in a fit "
            'of the smaller network, or let both mask (apply="mask")'
        )


def _refuse_sharding(trainer: pl.Trainer) -> None:
    name = type(trainer.strategy).__name__
    if any(word in name for word in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise RuntimeError(
            f"{name} shards parameters, which cannot be cut or masked by channel; prune under DDP or on one device, or "
            "plan and cut with lightning_prune.plan and lightning_prune.cut before the model is sharded"
        )


class ChannelPruner(Pruner):
    """A method that removes channels.

    It says how good each channel is: `measure` per batch and `score` per layer, or `scores` for the whole model.

    Args:
        budget: fraction of the dense flops (or params, or units) that may be kept; met from below.
        apply: "cut" shrinks the network; "mask" holds channels at zero, shapes stay.
        round_to: channel counts become multiples of it where the group allows.
        min_channels: fewest channels a group keeps.
        scope: "global", one ranking of all groups, or "uniform", one common fraction solved for the budget.
        keep: group -> fraction of its own, with ``scope="uniform"``.
        verify: prove the "first" cut, "always", or "never".
        **shared: see `Pruner`.
    """

    kind = "channels"
    default_of = "flops"
    default_scope: ClassVar[Scope] = "global"
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
        schedule: Schedule | None = None,
        ignore: Sequence[str] = (),
        example_input: Any = None,
        calibration: Any = None,
        loss_fn: LossFn | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        super().__init__(
            budget,
            schedule=schedule,
            ignore=ignore,
            example_input=example_input,
            calibration=calibration,
            loss_fn=loss_fn,
            on_nonfinite=on_nonfinite,
        )
        _choice("apply", apply, ("cut", "mask"))
        _choice("verify", verify, ("first", "always", "never"))
        self.scope: Scope = self.default_scope if scope is None else scope
        _choice("scope", self.scope, ("global", "uniform"))
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
        self._statistics: Statistics | None = None
        self._views: dict[str, list[LayerView]] = {}
        self._anchors: dict[str, int] = {}
        self._seen = Plan()
        self._alive: dict[str, Tensor] = {}
        self._dense_sizes: dict[str, int] = {}
        self._masks: Masks | None = None
        self._saved_statistics: dict[str, Any] | None = None

    def measure(self, view: LayerView) -> Tensor | None:
        """(C,) of one batch, read before the optimizer step; summed over the window. None: nothing to measure."""
        return None

    def combine(self, joined: Tensor) -> Tensor:
        """(C,) of one batch, joined over a group's producers, on its way into the sum; squares belong here."""
        return joined

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
        floors = dict.fromkeys(scores, self.min_channels)
        if self.scope == "global":
            return rank_global(scores, fits, floors=floors, round_to=self.round_to)
        return rank_uniform(
            scores, fits, dense=self._dense_sizes, keep=self.keep, floors=floors, round_to=self.round_to
        )

    def after_prune(self, keep: Mapping[str, Tensor]) -> None:
        """Something a method does once channels are gone: group -> (C,) bool of what stayed."""

    def plan_for(self, graph: ChannelGraph) -> Plan:
        """What this method would keep of a traced model, all the way to the budget; nothing is cut.

        Raises:
            NothingToPrune: if no channel may go.
            UnmeetableBudget: if the budget is out of reach.
        """
        self._graph, self._frozen, self._dense_cost, self._plan = graph, graph.frozen, graph.cost(), Plan()
        self._statistics = None
        self._prepare(graph.model)
        with torch.no_grad():
            scores = self._score_all()
            check_finite(scores)
            return graph.plan(self._choose(scores, self.budget))

    @property
    def _measures(self) -> bool:
        return type(self).measure is not ChannelPruner.measure

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
        ignored = matching(model, self.ignore)
        self._groups: list[Group] = [g for g in graph.groups if not _is_ignored(g, ignored)]
        if not self._groups:
            reasons = [f"{name}: {why}" for name, why in list(graph.frozen.items())[:8]]
            reasons += [f"{g.name}: ignored" for g in graph.groups]
            raise NothingToPrune(f"no channel of {type(model).__name__} may go: " + "; ".join(reasons))
        for name in self.keep:
            if name not in {g.name for g in self._groups}:
                raise ValueError(f"keep= names group {name!r}; groups are {', '.join(g.name for g in self._groups)}")
        state = self._restored or {}
        self._dense_sizes = {g.name: self._plan.groups.get(g.name, (0, g.size))[1] for g in self._groups}
        self._alive = {name: mask.bool() for name, mask in state.get("alive", {}).items()} or {
            g.name: torch.ones(g.size, dtype=torch.bool) for g in self._groups
        }
        self._total_units = sum(self._dense_sizes.values())
        self._seen = surgery.applied(model)
        self._look(model)
        if "statistics" in state and self._statistics is not None:
            self._statistics.load_state_dict(state["statistics"])
        if self._plan.masks:
            self._masks = Masks(_named(model, self._plan.masks), self._plan.masks)
            self._masks.zero()
        self._check_reachable()

    @override
    def _catch_up(self, model: pl.LightningModule) -> None:
        seen = surgery.applied(model)
        if seen is self._seen or self._graph is None or self._statistics is None:
            return
        self._seen = seen
        before = {group.name: group.size for group in self._groups}
        self._graph = surgery.trace(model, self.graph.example_inputs)
        self._groups = [group for group in self.graph.groups if group.name in before]
        same = {group.name for group in self._groups if group.size == before[group.name]}
        self._statistics.drop(before.keys() - same)
        self._statistics.join({group.name: group.size for group in self._groups})
        self._alive = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self._groups}
        self._look(model)
        self._cost_now = self._current_cost()

    def _look(self, model: nn.Module) -> None:
        """Views of the network as it is now."""
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._views = {g.name: [LayerView(g, p, parameters) for p in g.producers] for g in self._groups}
        empty = [name for name, views in self._views.items() if not views]
        for name in empty:  # no layer makes these channels alone: nothing a method could score
            del self._views[name]
        self._groups = [g for g in self._groups if g.name in self._views]
        if not self._groups:
            raise NothingToPrune(f"no layer of {type(model).__name__} makes channels that may go")
        if self._statistics is None:
            device = next(iter(parameters.values())).device
            self._statistics = Statistics({g.name: g.size for g in self._groups}, device)
        self._anchors = {name: _anchor(views[0], parameters) for name, views in self._views.items()}
        for name, views in self._views.items():
            for view in views:
                view.kept = self._statistics.kept[name]

    def _counts(self, counts: Mapping[str, int]) -> Any:
        kept = self.graph.costs.dense.copy()
        for name, n in counts.items():
            kept[self.graph._by_name[name]] = n
        return kept

    def _measured_cost(self, counts: Mapping[str, int]) -> int:
        """What the budget bounds, for channel counts."""
        if self.budget.of == "units":
            return sum(counts.get(name, int(mask.sum())) for name, mask in self._alive.items() if name in self._views)
        flops, params = self.graph.costs.flops_and_params(self._counts(counts))
        return flops if self.budget.of == "flops" else params

    def _dense_measure(self) -> int:
        assert self._dense_cost is not None
        of = self.budget.of
        return (
            self._total_units if of == "units" else self._dense_cost.flops if of == "flops" else self._dense_cost.params
        )

    def _check_reachable(self) -> None:
        """Say now, not at the last event, that the budget is out of reach."""
        fewest = {
            name: min(int(self._alive[name].sum()), max(1, self.min_channels), self._dense_sizes[name])
            for name in self._views
        }
        if self.round_to > 1:
            fewest = {n: min(int(self._alive[n].sum()), max(k, self.round_to)) for n, k in fewest.items()}
        least, dense = self._measured_cost(fewest), max(1, self._dense_measure())
        if not self.budget.fits(least, dense):
            smallest = math.ceil(1e4 * least / dense) / 1e4  # not rounded down: it has to be met if asked for
            raise UnmeetableBudget(
                f"{type(self).__name__}: a budget of {self.budget.keep:g} of the {self.budget.of} cannot be met: with "
                f"the fewest channels allowed {smallest:.4f} are left; raise keep, lower min_channels or round_to, or "
                "ignore fewer layers"
            )

    @override
    def _gather(self, optimizer: Optimizer) -> None:
        if self._measures and self._statistics is not None and self._done < len(self._events):
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            values = {}
            with torch.no_grad():
                for name, views in self._views.items():
                    if self._anchors[name] not in held:
                        continue  # measured when the optimizer that trains it steps
                    parts = [part for part in (self.measure(view) for view in views) if part is not None]
                    if parts:
                        values[name] = self.combine(self._joined(parts))
            if values:
                self._statistics.add(values)
        if self._masks is not None:
            self._masks.mask_gradients()

    @override
    def _after_step(self) -> None:
        if self._masks is not None:
            self._masks.hold()

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        scores = self._score_all()
        check_finite(scores)
        keep = self._choose(scores, self.budget.at(progress))
        return self._apply(trainer, model, keep, scores, progress)

    def _score_all(self) -> dict[str, Tensor]:
        assert self._statistics is not None
        if self._measures:
            if missing := self._statistics.unmeasured():
                seen = self._statistics.skipped
                raise NonFiniteScore(
                    f"{type(self).__name__} has no finite batch to score by: {seen} batches were not finite"
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
        changed = any(not torch.equal(mask, self._alive[name]) for name, mask in keep.items())
        if self.apply == "mask":
            self._mask(trainer, model, keep)
        elif changed:
            step = self._cut(trainer, model, keep, scores, progress)
            if step is None:
                return True
            keep = step
        else:
            self._statistics.cut({name: torch.ones(len(m), dtype=torch.bool) for name, m in keep.items()})
        self._log_scores(trainer, scores)
        self.after_prune(keep)
        return changed

    def _cut(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        keep: dict[str, Tensor],
        scores: Mapping[str, Tensor],
        progress: float,
    ) -> dict[str, Tensor] | None:
        graph, statistics = self.graph, self._statistics
        assert statistics is not None
        step = graph.plan(keep)
        since = surgery.applied(model)
        plan = surgery.compose(since, step)
        try:
            surgery.cut(
                model,
                plan,
                trainer.optimizers,
                graph=graph,
                since=since,
                verify="always" if self.verify == "first" and not self._plan.kept else _rest(self.verify),
            )
        except UnsafeCut as error:
            settled = surgery.settle(graph, [g.name for g in self._groups])
            if len(settled.groups) == len(graph.groups):
                raise
            gone = sorted(set(settled.frozen) - set(graph.frozen))
            warnings.warn(f"{type(self).__name__} freezes {', '.join(gone)}: {error}", stacklevel=2)
            self._graph, self._frozen = settled, settled.frozen
            self._groups = [g for g in self._groups if g.name not in gone]
            for name in gone:
                del self._views[name], self._alive[name], self._dense_sizes[name]
            statistics.drop(gone)
            kept_scores = {name: score for name, score in scores.items() if name not in gone}
            again = self._choose(kept_scores, self.budget.at(progress))
            return self._cut(trainer, model, again, kept_scores, progress)
        for copy in _checkpoint.copies(trainer, model):
            surgery.cut(copy, plan, since=since, verify="never")
        self._plan, self._seen = plan, surgery.applied(model)
        self._graph = graph.after(step)
        names = {g.name for g in self._groups}
        self._groups = [g for g in self.graph.groups if g.name in names]
        self._alive = {g.name: torch.ones(g.size, dtype=torch.bool) for g in self._groups}
        statistics.cut(keep)
        self._look(model)
        _checkpoint.wrap_again(trainer, model)
        return keep

    def _mask(self, trainer: pl.Trainer, model: pl.LightningModule, keep: dict[str, Tensor]) -> None:
        assert self._statistics is not None
        plan = self.graph.plan(keep)
        named = _named(model, plan.kept)
        masks = {name: _outer(named[name].shape, dims) for name, dims in plan.kept.items()}
        self._plan = Plan(masks=masks, shapes={n: tuple(m.shape) for n, m in masks.items()}, groups=plan.groups)
        self._masks = Masks(named, masks)
        self._masks.zero()
        _zero_copies(trainer, model, masks)
        clear(trainer.optimizers, {named[name]: mask for name, mask in masks.items()})
        self._alive = keep
        self._statistics.cut({name: torch.ones(len(mask), dtype=torch.bool) for name, mask in keep.items()})

    @override
    def _current_cost(self) -> Cost:
        return self.graph.costs.cost(self._counts({name: int(mask.sum()) for name, mask in self._alive.items()}))

    @override
    def _row(self) -> dict[str, float]:
        assert self._dense_cost is not None
        cost = self._cost_now or self._dense_cost
        kept = {name: int(mask.sum()) for name, mask in self._alive.items()}
        row = {
            "prune/flops": float(cost.flops),
            "prune/flops_kept": cost.flops / max(1, self._dense_cost.flops),
            "prune/params": float(cost.params),
            "prune/params_kept": cost.params / max(1, self._dense_cost.params),
            "prune/density": sum(kept.values()) / max(1, self._total_units),
            "prune/flops_sparse": float(cost.flops),
        }
        row.update({f"prune/channels/{name}": float(n) for name, n in kept.items()})
        return row

    def _log_scores(self, trainer: pl.Trainer, scores: Mapping[str, Tensor]) -> None:
        if trainer.is_global_zero:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for name, score in scores.items():
                figures.log_histogram(trainer.loggers, f"prune/score/{name}", score, step)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["alive"] = {name: mask.to(torch.uint8) for name, mask in self._alive.items()}
        statistics = self._saved_statistics if self._statistics is None else self._statistics.state_dict()
        if statistics is not None:
            state["statistics"] = statistics
        return state

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._saved_statistics = None if self._statistics is None else self._statistics.state_dict()
            self._views, self._statistics, self._masks = {}, None, None


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _rest(verify: str) -> str:
    return "always" if verify == "always" else "never"


def _anchor(view: LayerView, parameters: Mapping[str, Tensor]) -> int:
    """Identity of the parameter whose optimizer's turn is the group's: the first that is trained."""
    names = [view.weight_name, *view.gate_names]
    return id(parameters[next((n for n in names if parameters[n].requires_grad), names[0])])


def _is_ignored(group: Group, ignored: set[str]) -> bool:
    return any(p.weight in ignored for p in group.producers)


def _named(model: nn.Module, names: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names}


def _zero_copies(trainer: pl.Trainer, model: pl.LightningModule, masks: Mapping[str, Tensor]) -> None:
    """Averages of the weights forget what went: else they would bring it back."""
    for copy in _checkpoint.copies(trainer, model):
        Masks(_named(copy, masks), masks).zero()


def _outer(shape: Sequence[int], dims: Mapping[int, Tensor]) -> Tensor:
    mask = torch.ones(tuple(shape), dtype=torch.bool)
    for dim, kept in dims.items():
        alive = torch.zeros(shape[dim], dtype=torch.bool)
        alive[kept] = True
        mask &= alive.reshape([-1 if i == dim else 1 for i in range(len(shape))])
    return mask


class WeightPruner(Pruner):
    """A method that removes single weights: they are held at zero, shapes stay.

    It says how good each weight is: `score` per parameter, or `scores` for the whole model.

    Args:
        budget: fraction kept; of "units" (the default) it is of all weights with more than one dimension, those of
            ignored layers included and counted as kept; of "params" of all parameters; of "flops" it bounds the
            theoretical sparse flops.
        scope: "global", one ranking over all layers, or "layer", the same fraction of each.
        **shared: see `Pruner`.
    """

    kind = "weights"
    default_of = "units"
    default_scope: ClassVar[Literal["global", "layer"]] = "global"

    def __init__(
        self,
        budget: Budget | float,
        *,
        scope: Literal["global", "layer"] | None = None,
        schedule: Schedule | None = None,
        ignore: Sequence[str] = (),
        example_input: Any = None,
        calibration: Any = None,
        loss_fn: LossFn | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        super().__init__(
            budget,
            schedule=schedule,
            ignore=ignore,
            example_input=example_input,
            calibration=calibration,
            loss_fn=loss_fn,
            on_nonfinite=on_nonfinite,
        )
        self.scope = self.default_scope if scope is None else scope
        _choice("scope", self.scope, ("global", "layer"))
        self._masks: Masks | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._exempt: dict[str, int] = {}
        self._flops: dict[str, int] = {}

    def score(self, name: str, weight: nn.Parameter) -> Tensor:
        """Scores in the shape of one weight, larger = keep."""
        raise RuntimeError(f"{type(self).__name__} has neither score() nor scores()")

    def scores(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Scores of the whole model at once; by default from `score`, weight by weight."""
        return {name: self.score(name, weight) for name, weight in weights.items()}

    def select(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        """Scores -> parameter -> bool mask, True = keep; by default ranking by exact count."""
        return rank_weights(scores, allowance, price=price, scope=self.scope)

    def alive(self, name: str) -> Tensor:
        """The mask of a weight before this event: bool, its shape, True = kept so far."""
        assert self._masks is not None
        return self._masks.as_bool()[name]

    @override
    def _prepare(self, model: nn.Module) -> None:
        ignored = matching(model, self.ignore)
        parameters = dict(model.named_parameters())
        self._weights = {name: parameters[name] for name in self.graph.weights if name not in ignored}
        if not self._weights:
            raise NothingToPrune(
                f"no weight of {type(model).__name__} may go: no layer multiplies with one, or all are ignored"
            )
        self._exempt = {n: p.numel() for n, p in parameters.items() if p.ndim > 1 and n not in self._weights}
        self._flops = self.graph.weight_flops()
        masks = self._plan.masks or {n: torch.ones(w.shape, dtype=torch.bool) for n, w in self._weights.items()}
        self._masks = Masks(_named(model, masks), masks)
        self._masks.hold()
        allowance, _ = self._allowance(self.budget)
        if allowance < 0:
            fixed = self._fixed()
            raise UnmeetableBudget(
                f"{type(self).__name__}: a budget of {self.budget.keep:g} of the {self.budget.of} cannot be met: what "
                f"is never pruned is {fixed / max(1, self._dense_measure()):.4f} of them; raise keep, or ignore "
                "fewer layers"
            )

    def _dense_measure(self) -> int:
        assert self._dense_cost is not None
        if self.budget.of == "units":
            return sum(w.numel() for w in self._weights.values()) + sum(self._exempt.values())
        return self._dense_cost.params if self.budget.of == "params" else self._dense_cost.flops

    def _price(self) -> dict[str, float]:
        if self.budget.of == "flops":
            return {name: self._flops[name] / w.numel() for name, w in self._weights.items()}
        return dict.fromkeys(self._weights, 1.0)

    def _fixed(self) -> float:
        """What the budget bounds of everything that is never pruned."""
        price = self._price()
        return self._dense_measure() - sum(price[name] * w.numel() for name, w in self._weights.items())

    def _allowance(self, budget: Budget) -> tuple[float, dict[str, float]]:
        return budget.limit(self._dense_measure()) - self._fixed(), self._price()

    @override
    def _gather(self, optimizer: Optimizer) -> None:
        if self._masks is not None:
            self._masks.mask_gradients()

    @override
    def _after_step(self) -> None:
        if self._masks is not None:
            self._masks.hold()

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        assert self._masks is not None
        scores = self.scores(self._weights)
        current = self._masks.as_bool()
        allowance, price = self._allowance(self.budget.at(progress))
        if allowance < 0:
            raise UnmeetableBudget(f"{type(self).__name__}: {self.budget.at(progress).keep:g} cannot be met now")
        masks = self.select(scores, allowance, price)
        changed = any(not torch.equal(mask.cpu(), current[name].cpu()) for name, mask in masks.items())
        self._masks.update(masks)
        _zero_copies(trainer, model, masks)
        clear(trainer.optimizers, {self._weights[name]: mask for name, mask in masks.items()})
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        self._plan = Plan(masks={name: mask.cpu() for name, mask in masks.items()}, shapes=shapes)
        if trainer.is_global_zero:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for name, score in scores.items():
                figures.log_histogram(trainer.loggers, f"prune/score/{name}", score[torch.isfinite(score)], step)
        return changed

    @override
    def _current_cost(self) -> Cost:
        """Dense kernels cost what they cost; parameters at zero are not counted."""
        assert self._dense_cost is not None
        return Cost(self._dense_cost.flops, self._params_left(), self._dense_cost.by_layer)

    def _params_left(self) -> int:
        assert self._dense_cost is not None
        gone = 0 if self._masks is None else sum(int((~m).sum()) for m in self._masks.as_bool().values())
        return self._dense_cost.params - gone

    @override
    def _row(self) -> dict[str, float]:
        assert self._dense_cost is not None
        densities = self._masks.densities() if self._masks is not None else {}
        kept = sum(densities.get(n, 1.0) * w.numel() for n, w in self._weights.items())
        exempt = sum(self._exempt.values())
        total = sum(w.numel() for w in self._weights.values()) + exempt
        saved = sum(self._flops.get(n, 0) * (1 - d) for n, d in densities.items())
        params = self._params_left()
        row = {
            "prune/flops": float(self._dense_cost.flops),
            "prune/flops_kept": 1.0,
            "prune/params": float(params),
            "prune/params_kept": params / max(1, self._dense_cost.params),
            "prune/density": (kept + exempt) / max(1, total),
            "prune/flops_sparse": float(self._dense_cost.flops - saved),
        }
        row.update({f"prune/density/{name}": float(d) for name, d in densities.items()})
        return row

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._masks, self._weights = None, {}
