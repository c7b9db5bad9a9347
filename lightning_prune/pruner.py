"""The walk from a batch to a smaller network: what every method shares. Read this first.

    batch      -> on_before_optimizer_step   gradients are whole here: `measure` them, mask them
    statistics -> statistics.py              sums over batches and processes of what `measure` returned
    scores     -> `score` or `scores`        the method's paper
    ranking    -> `select`                   ranking.py, asked with the budget about the cost
    plan       -> decision.py                one frozen value
    mask | cut -> `_decide_and_apply`        masks.py | surgery.py
    optimizer  -> optimizers.py              follows
    log        -> `log_row`                  one row an event and an epoch

Events run in one place: at progress 0 in `on_train_start`, every other one in `on_train_batch_end` of the first batch
whose optimizer step reaches it, before validation and before checkpoints are written. Here are hooks and events; the
two kinds of methods, `channel_pruner.py` and `weight_pruner.py`, hold the arrows from statistics to optimizer.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_prune import checkpoint as _checkpoint
from lightning_prune import figures, surgery
from lightning_prune.batches import (
    evaluating,
    example_from_batch,
    own_precision,
    quiet_loss,
    second_iterator,
    share,
    without_trainer,
)
from lightning_prune.budget import Budget, Of
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, NoEvent, NonFiniteScore
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.histograms import BY_NAME, histogram
from lightning_prune.ignore import matching
from lightning_prune.loop import expected_steps, unscaled
from lightning_prune.masks import Masks, clear_off
from lightning_prune.optimizers import check, check_states, clear
from lightning_prune.report import Report
from lightning_prune.rewind import put_back, take_snapshot
from lightning_prune.schedule import Event, OneShot, Schedule
from lightning_prune.state import Fields, check_fields, reading

OnNonfinite = Literal["raise", "postpone"]
LossFn = Callable[[Any, Any], Tensor]
_NO_LATENCY = {
    "weights": "kernels of dense layers take the same time whatever is zero; give it a budget of units, or take a "
    "channel method",
    "ranks": "a latency table knows channel counts, and no times of pairs of factors; give it a budget of flops, or "
    "take a channel method",
}
_TOLD = 20  # events of a fit that are printed and drawn, if it has more


class NotYet(Exception):
    """Raised by a method at an event that has to wait: it is tried again after the next step, without a word."""


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
    start: ClassVar[Literal["trained", "initial"]] = "trained"  # the weights its paper begins with
    alters_training: ClassVar[bool] = False  # whether training is another one before the first event already
    own_fields: ClassVar[Fields] = {}  # what `own_state` returns: a checkpoint that says another thing is refused
    state_fields: ClassVar[Fields] = {
        "version": int,
        "plan": dict[str, Any],
        "dense": ({"flops": int, "params": int}, None),
        "dense_by_layer": dict[str, dict[str, int]],
        "events": list[tuple[int, float]],
        "done": int,
        "steps": int,
        "missed": int,
        "total_steps": int | None,
        "seconds": float,
        "seed": str | None,
        "rows": list[dict[str, float]],
        "arguments?": dict[str, str],
        "scores?": BY_NAME,
    }

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
        if self.budget.of == "latency" and (why := _NO_LATENCY.get(self.kind)):
            raise ValueError(f"{type(self).__name__} takes no Budget(of='latency'): {why}")
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
        self._warned: set[str] = set()  # what was warned of in this fit
        self._missed = 0  # steps that a dense run had done, in a fit that goes on from its checkpoint
        self._total_steps: int | None = None
        self._rows: list[dict[str, float]] = []
        self._scored: dict[str, dict[str, Any]] = {}  # histograms of the last event
        self._seconds = 0.0
        self._seed: str | None = None
        self._restored: dict[str, Any] | None = None
        self._graph: ChannelGraph | None = None
        self._handles: list[Any] = []
        self._started = False
        self._stepped = False
        self._at_event: tuple[pl.Trainer | None, nn.Module] | None = None
        self._masks: Masks | None = None  # what is held at zero, of either kind
        self._names: dict[int, str] = {}  # id -> name of every parameter
        self._company: list[Pruner] = []  # other methods in the Trainer

    @property
    def cuts(self) -> bool:
        """Whether shapes shrink, instead of weights being held at zero."""
        return False

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
            groups=dict(self.plan.groups),
            removed=_removed(self.plan),
            frozen=dict(self._frozen),
            rows=tuple(self._rows),
            seconds=self._seconds,
        )

    _cost_now: Cost | None = None
    _postponed = False
    _keeps_scores = False
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

    @property
    def _gathers(self) -> bool:
        """Whether `_gather` looks at the gradients of this step."""
        return False

    def _gather(self, optimizer: Optimizer) -> None:
        """Look at whole gradients, before the optimizer step."""

    def _catch_up(self, model: pl.LightningModule) -> None:
        """Look again, if another callback has cut the model."""

    def _clash(self, other: Pruner) -> str | None:
        """Why this method cannot be in one Trainer with another; None if it can."""
        if "ranks" in (self.kind, other.kind):
            return "one projects whole matrices, which the other cuts or masks; use one fit after the other"
        masks = {p.kind for p in (self, other) if not p.cuts}
        if "channels" in masks and (self.cuts or other.cuts or "weights" in masks):
            return 'apply="mask" holds whole channels at zero, which the other would cut or let grow; use apply="cut"'
        return None

    def initialise(self) -> None:
        """Something a method does once, before the first step of a fresh fit: new initial values, say."""

    def before_step(self, optimizer: Optimizer, held: Mapping[str, nn.Parameter]) -> None:
        """Look at gradients, or add to them, before a step: whole, unscaled, of all processes, not yet masked.

        Args:
            optimizer: the one that steps; with several this is called once for each.
            held: name -> parameter that this optimizer steps.
        """

    @property
    def _idle(self) -> tuple[Callable[..., None], ...]:
        """Which of a method's own `before_step` and `after_step` would do nothing in this fit: they are not called."""
        return ()

    def _acts(self, hook: str) -> bool:
        """Whether a hook of a step has something to do; what a subclass puts in its place is not idle."""
        own = getattr(type(self), hook)
        return own is not getattr(Pruner, hook) and own not in self._idle

    def after_step(self) -> None:
        """Something a method does after each optimizer step, once zeros are in place and before a due event."""

    def own_state(self) -> dict[str, Any]:
        """What a method has to find again when a fit goes on: numbers, strings, lists, dicts, tensors."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up `own_state`, before the first step of a fit that goes on."""

    @property
    def due(self) -> bool:
        """Whether the optimizer step that is being made reaches the next event."""
        return self._done < len(self._events) and self._events[self._done].step <= self._steps + 1

    def skip_step(self, optimizer: Optimizer) -> None:
        """Let an optimizer do nothing this time, in `before_step`: no step, no momentum, no decay; schedulers go on.

        Raises:
            RuntimeError: if a fused optimizer unscales its gradients itself, which it cannot without any.
        """
        if self._at_event is not None and self._at_event[0] is not None:
            self._refuse_unscaling(self._at_event[0], optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @property
    def _skips(self) -> bool:
        """Whether this method will call `skip_step`, which is refused at the start then rather than at an event."""
        return False

    def _refuse_unscaling(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise RuntimeError(
                f"{type(self).__name__} leaves out optimizer steps, which a fused {type(optimizer).__name__} under "
                "16-mixed precision cannot; give the optimizer fused=False"
            )

    def snapshot(self) -> dict[str, Any]:
        """Copies, on the CPU, of the module's parameters and buffers, of optimizers, schedulers and random states."""
        model, trainer = self.model, None if self._at_event is None else self._at_event[0]
        assert trainer is not None
        return take_snapshot(trainer, model)

    def rewind(self, snapshot: Mapping[str, Any], *, random_state: bool = False) -> None:
        """Put what `snapshot` copied back; weights that are masked stay zero, and so does their optimizer state.

        Args:
            snapshot: of this fit.
            random_state: also draw the same numbers again from here.
        """
        model, trainer = self.model, None if self._at_event is None else self._at_event[0]
        assert trainer is not None
        put_back(trainer, model, snapshot, random_state)
        if self._masks is not None:
            self._masks.zero()
            clear(trainer.optimizers, {model.get_parameter(n): mask for n, mask in self._masks.as_bool().items()})

    def warn_once(self, about: str, text: str) -> None:
        """Warn of something once a fit, however many events find it again.

        Args:
            about: what it is of; a warning of the same is left out.
            text: of the warning, whose numbers may be others each time.
        """
        if about not in self._warned:
            self._warned.add(about)
            rank_zero_warn(text)

    def same(self, value: Any) -> Any:
        """The value of the first process, on all processes."""
        trainer = None if self._at_event is None else self._at_event[0]
        return value if trainer is None or trainer.world_size == 1 else trainer.strategy.broadcast(value)

    def _budget_at(self, progress: float) -> Budget:
        """What may be kept at an event."""
        return self.budget.at(progress)

    @property
    def model(self) -> nn.Module:
        """What is pruned; for methods, at an event.

        Raises:
            RuntimeError: at any other time.
        """
        if self._at_event is None:
            raise RuntimeError(f"{type(self).__name__} looks at its model only at an event")
        return self._at_event[1]

    def loss(self, batch: Any) -> Tensor:
        """The training loss of a batch at an event, without logging and without a trace on trainer, metrics or RNG.

        Raises:
            RuntimeError: under manual optimization without ``loss_fn``, or if ``training_step`` returns no loss.
        """
        return quiet_loss(self.model, batch, self.loss_fn)

    def evaluating(self, grad: bool = False) -> AbstractContextManager[None]:
        """Look at the model as it would be shipped, at an event; see `lightning_prune.batches.evaluating`."""
        return evaluating(self.model, grad)

    def calibrate(self, samples: int) -> Iterator[Any]:
        """This process' share of the batches for calibration at an event, on the module's device.

        Together the processes look at ``samples`` samples at least, where there are as many: the same ones as a single
        process would.

        Raises:
            ValueError: without a Trainer, if ``calibration`` is no loader.
        """
        model, trainer = self.model, None if self._at_event is None else self._at_event[0]
        if trainer is None:
            batches = without_trainer(model, self.calibration, samples)
        else:
            assert isinstance(model, pl.LightningModule)
            seed = self.seed("calibration")
            every = second_iterator(trainer, model, self.calibration, samples, seed)
            batches = share(every, trainer.global_rank, trainer.world_size)
        shown = trainer is not None and trainer.is_global_zero and trainer.progress_bar_callback is not None
        yield from tqdm(batches, desc=f"{type(self).__name__}: calibration", leave=False, disable=not shown)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over processes, at an event."""
        trainer = None if self._at_event is None else self._at_event[0]
        if trainer is None or trainer.world_size == 1:
            return value
        out = trainer.strategy.reduce(value.clone(), reduce_op="sum")
        assert isinstance(out, Tensor)
        return out

    @contextmanager
    def _event(self, trainer: pl.Trainer | None, model: nn.Module) -> Iterator[None]:
        """The time in which `model`, `loss` and `calibrate` can be asked."""
        self._at_event = trainer, model
        try:
            yield
        finally:
            self._at_event = None

    def generator(self, event: str, layer: str = "") -> torch.Generator:
        """A CPU generator that is equal on all processes, for a random choice at an event in a layer."""
        return torch.Generator().manual_seed(self.seed(f"{event}/{layer}/{self._done}"))

    def seed(self, purpose: str) -> int:
        """A seed from the run's own (``seed_everything``), the class and a purpose; equal on all processes."""
        run = _global_seed() if self._seed is None else self._seed
        text = f"{run}/{type(self).__name__}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    @cached_property
    @override
    def state_key(self) -> str:  # the Trainer asks for it at every hook, a dozen times a step
        return f"{type(self).__name__}-{hashlib.sha256(self._scope().encode()).hexdigest()[:8]}"

    def _scope(self) -> str:
        """What tells this callback from others of its class in a checkpoint."""
        return f"{sorted(self.ignore)}/{self.budget}/{self.schedule}"

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
            self._refuse_spawning(trainer)
            _refuse_clashes(trainer)
            self._started = False
        self._handles += [_checkpoint.conform_on_load(trainer, pl_module), _checkpoint.name_on_load(trainer)]

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
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a checkpoint of another optimizer: its state is loaded next."""
        check_states(trainer.optimizers, _checkpoint.being_loaded(trainer).get("optimizer_states", ()))

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
        acts = self._acts("before_step")
        held = self._held(optimizer) if acts or len(trainer.optimizers) > 1 else {}
        if acts or self._gathers:
            with unscaled(trainer, optimizer):
                self._gather(optimizer)
                if acts:
                    with torch.no_grad(), self._event(trainer, pl_module):
                        self.before_step(optimizer, held)
        if self._masks is not None:
            self._masks.mask_gradients(held if len(trainer.optimizers) > 1 else None)

    def _refuse_spawning(self, trainer: pl.Trainer) -> None:
        """Only weights come back from processes that the launcher starts by fork or spawn, into the dense network."""
        launcher = trainer.strategy.launcher
        if not isinstance(launcher, _MultiProcessingLauncher):
            return
        how = f"{type(self).__name__} prunes in processes that end with the fit ({launcher._start_method})"
        if self.cuts or self.kind == "ranks":
            raise RuntimeError(
                f"{how}, and the network they leave behind here is the dense one, which their weights do not fit; run "
                "a script with strategy='ddp', or prune on one device"
            )
        rank_zero_warn(f"{how}: its plan and report end with them, only weights come back; load them from a checkpoint")

    def _held(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        return {self._names[id(p)]: p for p in every if id(p) in self._names}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and run what is due."""
        if self._stepped:
            self._stepped = False
            self._steps += 1
            self._catch_up(pl_module)
            if self._masks is not None:
                self._masks.hold()
            if self._acts("after_step"):
                with torch.no_grad(), self._event(trainer, pl_module):
                    self.after_step()
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
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it if training ended before pruning did."""
        if self._done < len(self._events) and not getattr(trainer, "fast_dev_run", False):
            key, what = ("flops_kept", "flops") if self.kind == "channels" else ("density", "weights")
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {self._steps} after {self._done} of "
                f"{len(self._events)} events, the next is due at step {self._events[self._done].step}; "
                f"{self._row()[f'prune/{key}']:.4f} of the {what} are kept, the budget is {self.budget.keep:g} of the "
                f"{self.budget.of}"
            )

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say it if this checkpoint was written with other arguments, so that pruning begins anew."""
        written = _checkpoint.written_by(checkpoint)
        own = [key for key in written if key.rpartition("-")[0] == type(self).__name__]
        if own and self.state_key not in written:
            rank_zero_warn(
                f"the checkpoint was written by {type(self).__name__} with another budget, schedule or ignore=: "
                "pruning begins anew, and keep is of the network as the checkpoint left it; to go on, use the same ones"
            )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the plan where a load finds it before the weights."""
        _checkpoint.add_plan(checkpoint, self.state_key, self.plan)

    @override
    def state_dict(self) -> dict[str, Any]:
        cost = self._dense_cost
        return {
            "version": 1,
            "plan": self.plan.state_dict(),
            "own": self.own_state(),
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
            "arguments": _arguments(self),
            "scores": {name: dict(found) for name, found in self._scored.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        where = f"the state of {type(self).__name__}"
        check_fields(where, state_dict, {**self.state_fields, "own": self.own_fields})
        with reading(where):
            if state_dict["version"] != 1:
                raise ValueError(f"wanted format version 1, got {state_dict['version']}")
            plan = Plan.from_state_dict(state_dict["plan"])
            events = tuple(Event(step, progress) for step, progress in state_dict["events"])
            if not 0 <= state_dict["done"] <= len(events) or min(state_dict["steps"], state_dict["missed"]) < 0:
                raise ValueError(f"{state_dict['done']} of {len(events)} events done at step {state_dict['steps']}")
        dense = state_dict["dense"]
        self._restored, self._plan, self._events = state_dict, plan, events
        self._dense_cost = (
            None if dense is None else Cost(dense["flops"], dense["params"], state_dict["dense_by_layer"])
        )
        self._done, self._steps, self._missed = (state_dict[key] for key in ("done", "steps", "missed"))
        self._total_steps = state_dict["total_steps"]
        self._seconds = float(state_dict["seconds"])
        self._seed = state_dict["seed"]
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._scored = {name: dict(found) for name, found in state_dict.get("scores", {}).items()}

    def _planned_masks(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The masks of the plan, of a fit that goes on; ``shapes`` are the dense ones of what may be masked.

        Raises:
            IncompatibleCheckpoint: if they are not of these parameters.
        """
        for name, mask in self._plan.masks.items():
            if tuple(mask.shape) != shapes.get(name):
                raise IncompatibleCheckpoint(
                    f"the state of {type(self).__name__} has a mask of {name!r} with shape {tuple(mask.shape)}, which "
                    f"in this fit {f'has shape {shapes[name]}' if name in shapes else 'is nothing to mask'}"
                )
        return dict(self._plan.masks)

    def _start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        resumed = self._restored is not None
        self._started, self._stepped = True, False
        self._warned.clear()
        if not resumed:
            surgery.call_dense(model)
            self._plan, self._done, self._steps, self._rows, self._seconds = Plan(), 0, 0, [], 0.0
            self._seed = trainer.strategy.broadcast(_global_seed())  # processes may have seeds of their own
            self._cost_now, self._postponed, self._scored = None, False, {}
            self._missed = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._fix_events(trainer, resumed)
        self._graph = self._trace(trainer, model)
        self._frozen = self.graph.frozen
        if not resumed or self._dense_cost is None:
            self._dense_cost = self.graph.cost()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._company = [other for other in _pruners(trainer) if other is not self]
        with self._event(trainer, model):
            self._prepare(model)
        check(trainer.optimizers, self._changing(model))
        for optimizer in trainer.optimizers if self._skips else ():
            self._refuse_unscaling(trainer, optimizer)
        with torch.no_grad(), self._event(trainer, model):
            if resumed:
                self.load_own_state((self._restored or {}).get("own", {}))
            else:
                self.initialise()
        self._restored = None
        if resumed:
            self._cost_now = self._current_cost()

    def _changing(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters whose optimizer state will have to follow."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _current_cost(self) -> Cost:
        return self.graph.cost()

    def _fix_events(self, trainer: pl.Trainer, resumed: bool) -> None:
        total, per_epoch = expected_steps(trainer)
        steps = None if total is None else total - self._missed
        if resumed and steps == self._total_steps:
            return
        try:
            events = self.schedule.resolve(steps, per_epoch)
        except NoEvent as error:
            if steps is not None or trainer.max_epochs == -1:
                raise
            raise NoEvent(f"{type(self).__name__}: {error} (the training data has no length)") from error
        if self.first_step and self.schedule.unit == "fit":  # in a very short fit a fraction of it rounds to the start
            moved = {max(e.step, self.first_step): e for e in events}
            events = tuple(Event(step, e.progress) for step, e in moved.items())
        if not events:
            raise NoEvent(f"{type(self).__name__}: {self.schedule} has no event in a fit of {steps} steps")
        if resumed:
            events = self._events_on_resume(events)
        self._events, self._total_steps = events, steps

    def _events_on_resume(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        """In a fit of another length what is done stays, and what is left of the way has the new places.

        A longer fit may have more events, or fewer, so that their numbers say nothing; their progress does. Updates,
        which go all the way each time, have none: of them those come that are later.
        """
        done = self._events[: self._done]
        if all(event.progress == 1 for event in events) and len(events) > 1:
            left = [event for event in events if event.step > self._steps]
        else:
            reached = done[-1].progress if done else 0.0
            left = [event for event in events if event.progress > reached]
        later = {max(event.step, self._steps + 1): event.progress for event in left}
        return (*done, *(Event(step, progress) for step, progress in later.items()))

    def _trace(self, trainer: pl.Trainer, model: pl.LightningModule) -> ChannelGraph:
        example = self.example_input
        if example is None:
            example = model.example_input_array
        if example is None:
            example = example_from_batch(trainer, model, self.loss_fn, self.seed("example"))
        with own_precision(model):
            return surgery.trace(model, example)

    def _run_due(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Run the last of the events that are due; the earlier ones are contained in it."""
        if self._done == len(self._events) or self._events[self._done].step > self._steps:
            return
        due = [i for i in range(self._done, len(self._events)) if self._events[i].step <= self._steps]
        started, tells = time.perf_counter(), self._tells(due[-1] + 1)
        self._keeps_scores = tells
        try:
            with torch.no_grad(), own_precision(model), self._event(trainer, model):
                changed = self._decide_and_apply(trainer, model, self._events[due[-1]].progress)
        except NotYet:
            return
        except NonFiniteScore as error:
            if self.on_nonfinite == "raise":
                raise
            if not self._postponed:  # said once, not at every step that it waits, nor for each event that joins it
                self._postponed = True
                rank_zero_warn(f"{type(self).__name__} postpones its event at step {self._steps}: {error}")
            return
        self._agree(trainer)
        self._done, self._postponed = due[-1] + 1, False
        self._seconds += time.perf_counter() - started
        self._cost_now = self._current_cost()
        row = self.log_row(trainer)
        self._rows.append({"step": float(self._steps), **row})
        if not changed and row["prune/density"] == 1:  # else a fine schedule is ahead of this step
            self.warn_once("idle", f"{type(self).__name__}: the event at step {self._steps} changed nothing")
        if tells:
            self._log_pictures(trainer)
            rank_zero_info(
                f"{type(self).__name__}: event {self._done} of {len(self._events)} at step {self._steps}"
                f"{'' if changed else ' changed nothing'}, "
                f"flops kept {row['prune/flops_kept']:.4f}, density {row['prune/density']:.4f}"
            )

    def _tells(self, done: int) -> bool:
        """Whether an event, after which so many are done, is printed and drawn: the first, the last, and about 20."""
        return not self._done or _TOLD * done // len(self._events) > _TOLD * self._done // len(self._events)

    def _agree(self, trainer: pl.Trainer) -> None:
        """Stop if processes decided differently: from here on they would train different networks."""
        if trainer.world_size == 1:
            return
        whole = torch.tensor(int(self.plan.digest()[:15], 16), device=trainer.strategy.root_device)
        every = trainer.strategy.all_gather(whole)
        if bool((every == every.flatten()[0]).all()):
            return
        said: list[dict[str, int]] = [{} for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(said, self.plan.digests())  # names, too, may differ
        first = next(n for other in said[1:] for n in {**said[0], **other} if said[0].get(n) != other.get(n))
        group = next((g.name for g in self.graph.groups if any(p.weight == first for p in g.producers)), None)
        raise RuntimeError(
            f"{type(self).__name__}: at step {self._steps} processes decided differently about "
            f"{first!r}{'' if group in (None, first) else f' (group {group!r})'}; scores have to be equal on all "
            "of them: sum what each process saw with total(), and draw random numbers from generator()"
        )

    def log_row(self, trainer: pl.Trainer, ended: bool = False) -> dict[str, float]:
        """Write one row to every logger, at Lightning's step (at an epoch's end its last batch's); returns it."""
        row = self._row()
        row["prune/event"] = float(self._done)
        row["prune/seconds"] = self._seconds
        row = {sys.intern(key): value for key, value in row.items()}  # rows of hundreds of events share their keys
        shown = row if self._speaks else self._aside(row, trainer.lightning_module, ended)
        step = max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - ended)
        for logger in trainer.loggers:
            logger.log_metrics(shown, step)
        return row

    @property
    def _speaker(self) -> Pruner:
        """Who says what is common to all methods in the Trainer: one that masks weights, if there is one."""
        every = [self, *self._company]
        return min([p for p in every if p.kind == "weights"] or every, key=lambda pruner: pruner.state_key)

    @property
    def _speaks(self) -> bool:
        return self._speaker is self

    def _aside(self, row: Mapping[str, float], model: pl.LightningModule, ended: bool) -> dict[str, float]:
        """What is this method's own; at an event also what is common to all, as the one says it that does."""
        named = {f"{key}/{type(self).__name__}": row[key] for key in ("prune/event", "prune/seconds")}
        own = {key: value for key, value in row.items() if key.count("/") > 1}
        if ended:
            return {**own, **named}
        self._speaker._catch_up(model)
        common = {key: value for key, value in self._speaker._row().items() if key.count("/") == 1}
        return {**common, **own, **named}

    def _monitor(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        if not self._speaks:
            return
        row = self._row()
        for key in ("prune/flops_kept", "prune/density", "prune/params_kept"):
            several = trainer.world_size > 1
            model.log(key, row[key], on_step=False, on_epoch=True, logger=False, sync_dist=several)

    def _show(self, model: pl.LightningModule, first: bool) -> None:
        """In the progress bar, where it changed or an epoch began; the bar keeps it."""
        if self._cost_now is None or self._dense_cost is None or not self._speaks:
            return
        kept = self._cost_now.flops / max(1, self._dense_cost.flops)
        if first or kept != self._shown:
            self._shown = kept
            on_host = torch.full((), kept)  # the bar reads it there without waiting for a device
            model.log("flops_kept", on_host, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def _log_scores(self, trainer: pl.Trainer, scores: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> None:
        """Hand scores to the loggers, and keep their histograms, of what stays and what goes, for checkpoints."""
        if not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for name, score in scores.items():
            figures.log_histogram(trainer.loggers, f"prune/score/{name}", score, step)
        if not self._keeps_scores:  # they take a tenth of a second for a few million weights
            return
        # several weights may have one score
        found = {n: histogram(score.expand_as(keep[n]), keep[n]) for n, score in scores.items() if n in keep}
        self._scored = {name: each for name, each in found.items() if each}

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
        end = float(self._total_steps or 0)
        figures.log_figure(
            trainer.loggers, "prune/curve", lambda: figures.curve_figure([_plain(row) for row in self._rows], end), step
        )


def _global_seed() -> str:
    return os.environ.get("PL_GLOBAL_SEED", "0")


def _plain(row: Mapping[str, float]) -> dict[str, object]:
    return dict(row)


def _arguments(callback: Pruner) -> dict[str, str]:
    """What a callback was made with, as text; of an object only its type, as it may print as an address."""
    every: dict[str, str] = {}
    given = vars(callback)
    for cls in reversed(type(callback).__mro__[: type(callback).__mro__.index(Pruner) + 1]):
        for name, argument in inspect.signature(vars(cls).get("__init__", Pruner.__init__)).parameters.items():
            held = name if name in given else f"{name}s"  # finalize= is also what a method is called
            if held in given and argument.kind is not argument.VAR_KEYWORD:
                value = given[held]
                simple = isinstance(value, bool | int | float | str | list | tuple | dict | None) or is_dataclass(value)
                text = repr(value) if simple else ""
                every[name] = (
                    text if simple and " at 0x" not in text and len(text) < 500 else f"a {type(value).__name__}"
                )
    return every


def _removed(plan: Plan) -> dict[str, dict[int, int]]:
    return {
        name: {dim: plan.shapes[name][dim] - len(kept) for dim, kept in dims.items()}
        for name, dims in plan.kept.items()
    }


def _pruners(trainer: pl.Trainer) -> list[Pruner]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Pruner)]  # type: ignore[attr-defined]


def _refuse_clashes(trainer: pl.Trainer) -> None:
    for first, second in combinations(_pruners(trainer), 2):
        why = first._clash(second) or second._clash(first)
        if why is not None:
            raise RuntimeError(f"{type(first).__name__} and {type(second).__name__} cannot go together: {why}")


def _refuse_sharding(trainer: pl.Trainer) -> None:
    name = type(trainer.strategy).__name__
    bases = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    if any(word in base for base in bases for word in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise RuntimeError(
            f"{name} shards parameters, which cannot be cut or masked by channel; prune under DDP or on one device, or "
            "plan and cut with lightning_prune.plan and lightning_prune.cut before the model is sharded"
        )


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an argument that is none of the words allowed, with a ``ValueError`` that lists them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def named(model: nn.Module, names: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The model's parameters of these names, in the order given."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names}


def zero_copies(trainer: pl.Trainer, model: pl.LightningModule, masks: Mapping[str, Tensor]) -> None:
    """Averages of the weights forget what went: else they would bring it back."""
    for copy in _checkpoint.copies(trainer, model):
        for name, parameter in named(copy, masks).items():
            clear_off(parameter, masks[name].to(parameter.device))
