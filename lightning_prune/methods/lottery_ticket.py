"""The lottery ticket: prune by magnitude after a whole training, set the survivors back to early values, train again.

Frankle and Carbin, 2019; rewinding to a later step than the first is of Frankle, Dziugaite, Roy and Carbin, 2019 and
2020, learning-rate rewinding of Renda, Frankle and Carbin, 2020. Differs from the papers: the trainings are phases of
one fit; the budget is met by exact count, so that the fraction that goes per round is solved for, not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.pruner import Paper, Pruner, one_of, zero_copies
from lightning_prune.rewind import SNAPSHOT, positions, run_schedulers
from lightning_prune.schedule import Rounds, Schedule
from lightning_prune.state import Fields
from lightning_prune.weight_pruner import WeightPruner

DROP = 0.2
"""What goes per round of what is left, in the paper."""


def ticket_score(weight: Tensor, alive: Tensor) -> Tensor:
    """Score each weight by its absolute value at the end of a training.

    Args:
        weight: any shape.
        alive: bool, its shape; what went in an earlier round stays away.

    Returns:
        The same shape, at least 0, and minus infinity where ``alive`` is False.

    Example:
        >>> ticket_score(torch.tensor([0.5, -2.0, 3.0]), torch.tensor([True, True, False]))
        tensor([0.5000, 2.0000,   -inf])
    """
    return weight.detach().abs().masked_fill(~alive, -torch.inf)


def survivors(count: int, rounds: int, drop: float = DROP) -> int:
    """How many weights the paper's own rule leaves: each round takes ``ceil(drop * left)`` of them.

    For comparing with tables that give the fraction per round; here it is solved for.

    Raises:
        ValueError: if ``drop`` is not in [0, 1), or a count negative.

    Example:
        >>> [survivors(10, rounds) for rounds in range(6)]
        [10, 8, 6, 4, 3, 2]
    """
    if not 0 <= drop < 1 or count < 0 or rounds < 0:
        raise ValueError(f"wanted counts and a drop in [0, 1), got {count} weights, {rounds} rounds, drop {drop}")
    for _ in range(rounds):
        count -= math.ceil(round(drop * count, 9))  # 0.07 * 100 is 7.000000000000001
    return count


def rounds_for(keep: float, drop: float = DROP) -> int:
    """How many rounds the paper takes to keep so much: the least n with ``(1 - drop) ** n <= keep``, at least 1.

    Example:
        >>> rounds_for(0.1), rounds_for(0.512), rounds_for(1.0)
        (11, 3, 1)
    """
    return max(1, math.ceil(math.log(keep) / math.log(1 - drop) - 1e-9))


def cycled(values: Tensor, generator: torch.Generator) -> Tensor:
    """Move every value to another place, along a random cycle through all of them.

    Where values are independent draws, what comes out is another draw of the same distribution, whatever it is; unlike
    in a plain shuffle none stays where it was.

    Args:
        values: any shape, on the CPU.
        generator: which cycle.
    """
    order = torch.randperm(values.numel(), generator=generator)
    moved = torch.empty_like(values).flatten()
    moved[order] = values.flatten()[order.roll(1)]
    return moved.reshape(values.shape)


class LotteryTicket(WeightPruner):
    """Find a sparse network that trains well from early on; no data needed.

    The fit is divided into phases. At the end of each but the last the smallest weights go, and weights, buffers,
    optimizers and schedulers go back to where they were at an early step of the first phase. The last phase trains the
    ticket, and nothing happens to it any more. A fit has to be as long as all its phases.

    Args:
        budget: see `WeightPruner`. What is kept falls by the same factor in each round.
        schedule: ends of phases; default `Rounds`, with as many rounds as the paper's 20 % each would take where they
            fit. ``OneShot()`` is the one-shot ticket.
        rewind_to: where the survivors go back to, in ``rewind_unit``; 0 is before the first step.
        rewind_unit: "phase", a fraction of the first one, below 1; "step" or "epoch".
        variant: "weights"; "learning_rate" keeps the weights trained and sets back schedulers alone, with a fresh
            optimizer; "finetune" sets back nothing.
        control: for the last phase, to compare with: "reinit", the ticket's mask on other initial values, from step 0;
            "random_ticket", the mask shuffled within each layer.
        schedulers: "per_phase" runs each learning-rate scheduler through its whole course in every phase, by stepping
            it more often; "as_is" leaves it to count single steps or epochs, for one that was written for a phase.
        random_state: set back random number generators as well; in a single process.
        **shared: see `WeightPruner`.

    Attributes:
        rewind_step: the step that is gone back to, once a fit has started.
        rewinds: how many times that happened.
    """

    paper = Paper("Frankle and Carbin", 2019, "https://arxiv.org/abs/1803.03635")
    own_fields: ClassVar[Fields] = {
        "snapshots": {"rewind?": SNAPSHOT, "start?": SNAPSHOT},
        "rewind_step": int,
        "rewinds": int,
        "phase_start": int,
        "positions": list[tuple[str, int]],
    }
    start = "initial"
    default_schedule = Rounds()
    default_scope: ClassVar[Literal["global", "layer"]] = "global"
    alters_training = True  # by running schedulers faster

    def __init__(
        self,
        budget: Budget | float,
        *,
        schedule: Schedule | None = None,
        rewind_to: float = 0.05,
        rewind_unit: Literal["phase", "step", "epoch"] = "phase",
        variant: Literal["weights", "learning_rate", "finetune"] = "weights",
        control: Literal["reinit", "random_ticket"] | None = None,
        schedulers: Literal["per_phase", "as_is"] = "per_phase",
        random_state: bool = False,
        **shared: Any,
    ) -> None:
        rounds = rounds_for(Budget.of_any(budget).keep)
        super().__init__(budget, schedule=Rounds(rounds) if schedule is None else schedule, **shared)
        one_of("rewind_unit", rewind_unit, ("phase", "step", "epoch"))
        one_of("variant", variant, ("weights", "learning_rate", "finetune"))
        one_of("schedulers", schedulers, ("per_phase", "as_is"))
        if control is not None:
            one_of("control", control, ("reinit", "random_ticket"))
            if variant != "weights":
                raise ValueError(
                    f"control={control!r} needs variant='weights', as it is of early values; got {variant!r}"
                )
        _check_rewind_to(rewind_to, rewind_unit)
        self.rewind_to = rewind_to
        self.rewind_unit = rewind_unit
        self.variant = variant
        self.control = control
        self.schedulers = schedulers
        self.random_state = random_state
        self.rewind_step = 0
        self.rewinds = 0
        self._snapshots: dict[str, dict[str, Any]] = {}
        self._phase_start = 0
        self._positions: list[list[Any]] = []  # of schedulers, at the start of this phase
        self._last = False
        self._rewinds = False

    @property
    def phase_lengths(self) -> tuple[int, ...]:
        """Optimizer steps of each phase, once a fit has started; without the last one if the fit has no end."""
        ends = [0, *(event.step for event in self.events)]
        if self.events and self._total_steps is not None:
            ends.append(self._total_steps)
        return tuple(end - start for start, end in pairwise(ends))

    @property
    def _trainer(self) -> pl.Trainer:
        assert isinstance(self.model, pl.LightningModule)
        return self.model.trainer

    def _anything_goes_back(self) -> bool:
        allowance, price = self._allowance(self.budget)
        all_stay = allowance >= sum(price[name] * weight.numel() for name, weight in self.weights.items())
        return self.variant != "finetune" and not all_stay

    @override
    def initialise(self) -> None:
        self.rewinds, self._snapshots, self._phase_start = 0, {}, 0
        self.rewind_step = self._resolved_rewind_step()
        self._positions, self._rewinds = positions(self._trainer), self._anything_goes_back()
        if not self._rewinds:
            return
        self._refuse_impossible()
        if self.rewind_step == 0:
            self._snapshots["rewind"] = self._snapshot()
        elif self.control == "reinit":
            self._snapshots["start"] = self._snapshot()
        lengths = ", ".join(map(str, self.phase_lengths))
        how = "through their whole course in each" if self.schedulers == "per_phase" else "as they are"
        rank_zero_info(
            f"LotteryTicket: phases of {lengths} steps, back to step {self.rewind_step} after each but the last; "
            f"learning-rate schedulers run {how}"
        )

    def _refuse_impossible(self) -> None:
        if self.random_state and self._trainer.world_size > 1:
            raise RuntimeError(
                "LotteryTicket(random_state=True) draws the same numbers again in one process only, not in "
                f"{self._trainer.world_size}; leave it out, and seed the data by epoch"
            )
        if self.schedulers == "per_phase" and self._total_steps is None and any(n >= 0 for _, n in self._positions):
            raise RuntimeError(
                "LotteryTicket(schedulers='per_phase') runs learning-rate schedulers to the end of each phase, but the "
                "last phase of this fit has no end; set max_steps, or use schedulers='as_is'"
            )

    def _resolved_rewind_step(self) -> int:
        first = self.events[0].step
        if self.rewind_unit == "phase":
            return min(round(self.rewind_to * first) or int(self.rewind_to > 0), max(0, first - 1))
        length: float = 1
        if self.rewind_unit == "epoch":
            length = self._trainer.num_training_batches / self._trainer.accumulate_grad_batches
        if length == math.inf:
            raise ValueError("LotteryTicket: an epoch of this fit has no known number of steps; use rewind_unit='step'")
        step = round(self.rewind_to * math.ceil(length))
        if step >= max(first, 1):
            raise ValueError(
                f"LotteryTicket goes back to step {step} ({self.rewind_to:g} {self.rewind_unit}s), but first prunes "
                f"after step {first}; rewind_to has to be less than a phase"
            )
        return step

    def _snapshot(self) -> dict[str, Any]:
        """What goes back: equal on all processes, but for their random numbers."""
        now = self.snapshot()
        if self.variant == "learning_rate":  # momentum of this step is of other weights than will be there then
            fresh = [[name, {**state, "state": {}}] for name, state in now["optimizers"]]
            return {"optimizers": fresh, "schedulers": now["schedulers"], "random": now["random"]}
        return {**self.same({**now, "random": None}), "random": now["random"]}

    @override
    def after_step(self) -> None:
        if not self._rewinds:
            return
        if self.schedulers == "per_phase" and self._total_steps is not None:
            end = self.events[self._done].step if self._done < len(self.events) else self._total_steps
            way = (self._steps - self._phase_start) / max(1, end - self._phase_start)
            run_schedulers(self._trainer, self._positions, min(1.0, way), self._missed + self._total_steps)
        if self._steps == self.rewind_step and not self._done:
            self._snapshots["rewind"] = self._snapshot()

    @override
    def score(self, name: str, weight: nn.Parameter) -> Tensor:
        return ticket_score(weight, self.alive(name))

    @override
    def select(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        masks = super().select(scores, allowance, price)
        if not self._last or self.control != "random_ticket":
            return masks
        return {name: cycled(mask.cpu(), self.generator("ticket", name)) for name, mask in masks.items()}

    @override
    def _budget_at(self, progress: float) -> Budget:
        """Every round keeps the same fraction of what the one before left: ``keep ** progress`` of all."""
        if progress == 1:
            return self.budget
        return replace(self.budget, keep=round(self.budget.keep**progress, 12))  # 0.81 is 0.81, not 0.80999...

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        self._last = progress == 1
        changed = super()._decide_and_apply(trainer, model, progress)
        if self._rewinds:
            self.rewind(self._destination(model), random_state=self.random_state)
            assert self._masks is not None
            zero_copies(trainer, model, self._masks.as_bool())
            self.rewinds += 1
            self._positions, self._phase_start = positions(trainer), self._steps
        if self._last:
            self._snapshots = {}  # a checkpoint of the last phase does without
        return changed

    def _destination(self, model: nn.Module) -> dict[str, Any]:
        """What is put back now."""
        there = self._snapshots["rewind"]
        if self._last and self.control == "reinit":
            start = self._snapshots.get("start", there)
            return {**start, "model": {**start["model"], **self._other_values(model, start["model"])}}
        return there

    def _other_values(self, model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {id(weight): name for name, weight in self.weights.items()}
        tied = {key: names.get(id(value)) for key, value in model.state_dict(keep_vars=True).items()}
        return {key: cycled(values[key], self.generator("reinit", name)) for key, name in tied.items() if name}

    @override
    def _row(self) -> dict[str, float]:
        row = {**super()._row(), "prune/rewinds": float(self.rewinds)}
        if self.rewinds:
            row["prune/rewound_to"] = float(self.rewind_step)
        return row

    @override
    def _clash(self, other: Pruner) -> str | None:
        return self._cannot_follow()

    @override
    def _cannot_follow(self) -> str | None:
        return "rewinding would bring back what the other has cut or masked; prune in one fit after the other"

    @override
    def own_state(self) -> dict[str, Any]:
        return {
            "snapshots": dict(self._snapshots),
            "rewind_step": self.rewind_step,
            "rewinds": self.rewinds,
            "phase_start": self._phase_start,
            "positions": [list(each) for each in self._positions],
        }

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._snapshots, self._rewinds = dict(state["snapshots"]), self._anything_goes_back()
        self.rewind_step, self.rewinds = int(state["rewind_step"]), int(state["rewinds"])
        self._phase_start, self._positions = int(state["phase_start"]), [list(each) for each in state["positions"]]


def _check_rewind_to(rewind_to: float, unit: str) -> None:
    if isinstance(rewind_to, bool) or not isinstance(rewind_to, int | float) or not 0 <= rewind_to < math.inf:
        raise ValueError(f"rewind_to must be a number of at least 0, got {rewind_to!r}")
    if unit == "phase" and rewind_to >= 1:
        raise ValueError(
            f"rewind_to must be below 1, a fraction of the first phase, got {rewind_to!r}; for a count give "
            "rewind_unit='step' or 'epoch'"
        )
    if unit == "step" and rewind_to != round(rewind_to):
        raise ValueError(f"rewind_to must be a whole number of steps, got {rewind_to!r}")
