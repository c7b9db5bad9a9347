"""RigL: sparse from the first step to the last, while weights that do little make room for ones that could do more.

Evci, Gale, Menick, Castro and Elsen, 2020. SET (Mocanu et al., 2018) and a static random mask are the same callback
with another `grow`. Differs from the paper: the whole network has the asked count exactly, exempt layers included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.densities import Distribution, layer_counts, layer_densities
from lightning_prune.errors import NonFiniteScore
from lightning_prune.pruner import NotYet, Paper, one_of
from lightning_prune.ranking import top_mask
from lightning_prune.schedule import OneShot, Schedule, Updates
from lightning_prune.state import Fields
from lightning_prune.weight_pruner import WeightPruner

Grow = Literal["gradient", "random", "none"]


def drop_fraction(step: float, end: float, alpha: float = 0.3) -> float:
    """Which fraction of a layer's active weights is dropped at an update (eq. 1).

    Args:
        step: optimizer steps before it.
        end: T_end, where updates stop.
        alpha: fraction at step 0.

    Returns:
        ``alpha / 2 * (1 + cos(pi * step / end))``, which falls to 0.

    Example:
        >>> [round(drop_fraction(step, 1000), 6) for step in (0, 250, 500, 1000)]
        [0.3, 0.256066, 0.15, 0.0]
    """
    return alpha / 2 * (1 + math.cos(math.pi * min(1.0, step / end)))


def drop_and_grow(weight: Tensor, mask: Tensor, growth: Tensor, fraction: float, count: int | None = None) -> Tensor:
    """One update of a layer: the smallest active weights go, as many others come.

    Args:
        weight: any shape.
        mask: bool, its shape, True = active.
        growth: its shape; the largest grow, among all entries that are not kept, those just dropped included.
        fraction: of the active weights that are dropped, rounded down.
        count: active weights afterwards; as many as before by default.

    Returns:
        bool, the shape of the weight, exactly ``count`` entries True; of equal ones the higher index stays, or grows.

    Example:
        >>> weight, mask = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
        >>> drop_and_grow(weight, mask, torch.tensor([9.0, 1.0, 2.0, 3.0]), 0.5)
        tensor([ True, False, False,  True])
    """
    active = int(mask.sum())
    count = active if count is None else count
    kept = min(count, active - math.floor(fraction * active + 1e-9))
    stays = top_mask(weight.detach().abs().masked_fill(~mask, -torch.inf), kept)
    return stays | top_mask(growth.masked_fill(stays, -torch.inf), count - kept)


def training_flops(sparse: float, dense: float, every: float | None = None) -> float:
    """Flops of training on one sample, averaged over steps; a backward pass counts as two forward passes.

    Args:
        sparse: flops of the sparse forward pass.
        dense: of the dense one, in the same unit.
        every: steps between two updates that need the dense gradient of the weights; None if none does (SET, static).

    Example:
        >>> round(training_flops(0.2, 1.0, every=100), 6), round(training_flops(0.2, 1.0), 6)
        (0.607921, 0.6)
    """
    if every is None:
        return 3 * sparse
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)


class RigL(WeightPruner):
    """Train with random masks of a fixed count, which drop small weights and grow others again and again.

    The first event draws the masks; the others update them. Where the gradient says what grows, an update takes the
    place of an optimizer step, as in the paper.

    Args:
        budget: see `WeightPruner`. The count of weights is the same from the first event on.
        distribution: densities of layers: "erk", "er", or "uniform", which leaves the network's first layer dense.
        grow: "gradient" (RigL), "random" (SET), or "none" (static: what was drawn stays).
        alpha: fraction of each layer's weights that is dropped at first; it falls to 0 along a cosine.
        schedule: `Updates`; the default's distance is the paper's 100 steps, or less where that gives fewer than 20
            updates. With ``grow="none"`` the default is a single event at the start.
        **shared: see `WeightPruner`.
    """

    paper = Paper("Evci et al.", 2020, "https://arxiv.org/abs/1911.11134")
    own_fields: ClassVar[Fields] = {"spent": float, "revised_at": int}
    needs = "gradients of training"
    start = "initial"
    default_schedule: ClassVar[Schedule] = Updates(every=100, start=0.0, end=0.75, least=21)
    default_scope = "layer"

    def __init__(
        self,
        budget: Budget | float,
        *,
        distribution: Distribution = "erk",
        grow: Grow = "gradient",
        alpha: float = 0.3,
        schedule: Schedule | None = None,
        **shared: Any,
    ) -> None:
        one_of("distribution", distribution, get_args(Distribution))
        one_of("grow", grow, get_args(Grow))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be a fraction from 0 to 1 of the weights of a layer, got {alpha!r}")
        if schedule is None and grow == "none":
            schedule = OneShot(0.0)
        super().__init__(budget, schedule=schedule, **shared)
        if self.scope != "layer":
            raise ValueError(
                f"RigL shares weights out over layers by distribution=, so scope={self.scope!r} means nothing"
            )
        if any(progress != 1 for _, progress in self.schedule.points()):
            raise ValueError(
                f"RigL keeps the same count of weights all along, but {type(self.schedule).__name__} nears it event by "
                "event; use Updates(...), or OneShot(...) for masks that stay"
            )
        self.distribution: Distribution = distribution
        self.grow: Grow = grow
        self.alpha = alpha
        self._spent = 0.0  # flops of training so far on one sample of each batch
        self._reads_dense = False  # whether this step's backward pass needs dense gradients of the weights
        self._revised_at = 0
        self._broken: str | None = None

    @staticmethod
    def paper_schedule() -> Updates:
        """Every 100 steps of the first three quarters, however short the fit is."""
        return Updates(every=100, start=0.0, end=0.75, least=1)

    @override
    def initialise(self) -> None:
        self._spent, self._revised_at, self._reads_dense, self._broken = 0.0, 0, False, None

    @override
    def own_state(self) -> dict[str, Any]:
        return {"spent": self._spent, "revised_at": self._revised_at}

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self.initialise()
        self._spent, self._revised_at = float(state["spent"]), int(state["revised_at"])

    @property
    @override
    def _skips(self) -> bool:
        return self.grow == "gradient" and len(self._events) > 1

    @override
    def before_step(self, optimizer: Optimizer, held: Mapping[str, nn.Parameter]) -> None:
        """Read dense gradients where an update follows, which takes the place of this step.

        Before the draw all weights are dense, so that none is open.
        """
        if self.grow != "gradient" or not self.due:
            return
        seen = self.kept.setdefault("gradient", {})
        found = {name: _size_of_gradient(held[name]) for name in self._open() if name in held and name not in seen}
        self._reads_dense |= bool(found)
        self._broken = next((name for name, size in found.items() if not torch.isfinite(size).all()), None)
        if not found or self._broken is not None:
            return
        seen.update(found)
        # updates that follow each other step by step, in a fit of a few steps, would let nothing be trained
        if self.steps > self._revised_at:
            self.skip_step(optimizer)

    @override
    def after_step(self) -> None:
        """Count what the step cost, with the masks it was made with."""
        cost = self._cost_now or self.dense_cost
        assert cost is not None
        sparse = cost.flops - self._saved()
        self._spent += 3 * sparse + self._reads_dense * (cost.flops - sparse)
        self._reads_dense = False

    @override
    def scores(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What is dropped by: the absolute value of active weights."""
        return {n: w.detach().abs().masked_fill(~self.alive(n), -torch.inf) for n, w in weights.items()}

    @override
    def select(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        """Draw masks at the first event, and update them at the others."""
        shapes = {name: tuple(score.shape) for name, score in scores.items()}
        densities = layer_densities(shapes, allowance, self.distribution, price=price, whole=self._whole())
        counts = layer_counts(shapes, densities, allowance, price=price)
        if not self.events_done:
            masks = {name: self._drawn(name, shape, counts[name]) for name, shape in shapes.items()}
        elif self.grow == "none":
            masks = {}
        else:
            masks = self._updated(scores, counts)
        self._revised_at = self.steps
        return masks

    @override
    def _budget_at(self, progress: float) -> Budget:
        return self.budget

    def _whole(self) -> set[str]:
        """The weight that the network meets first, which a uniform distribution leaves dense."""
        if self.distribution != "uniform":
            return set()
        flow = self.graph.flow
        assert flow is not None
        calls = {name: flow.layers[name][0] for name in self.graph.weights if name in flow.layers}
        return {min(calls, key=lambda name: calls[name])} & self.weights.keys() if calls else set()

    def _drawn(self, name: str, shape: tuple[int, ...], count: int) -> Tensor:
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[torch.randperm(len(mask), generator=self.generator("draw", name))[:count]] = True
        return mask.reshape(shape)

    def _updated(self, scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
        """New masks of the weights that are open; where no gradient says what could grow, a mask stays."""
        growth = self._growth()
        fraction = drop_fraction(self.steps, self._end(), self.alpha)
        return {
            name: drop_and_grow(self.weights[name], self.alive(name), size, fraction, counts[name])
            for name, size in growth.items()
            if size.any()
        }

    def _growth(self) -> dict[str, Tensor]:
        """Open weight -> what its entries grow by.

        Raises:
            NotYet: until every optimizer that holds an open weight was about to step.
            NonFiniteScore: if a gradient is NaN or infinite; where a scaler of the loss looks for the scale, NotYet.
        """
        assert isinstance(self.model, pl.LightningModule)
        trainer = self.model.trainer
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        names = [name for name in self._open() if id(self.weights[name]) in held]
        if self.grow == "random":
            return {n: self._random(n).to(self.weights[n].device) for n in names}
        name, self._broken = self._broken, None
        if name is not None:
            if getattr(trainer.precision_plugin, "scaler", None) is not None:
                raise NotYet(f"the gradient of {name!r} is beyond the scale of the loss")
            raise NonFiniteScore(
                f"the gradient of {name!r}, by which RigL grows weights, is NaN or infinite; look at the loss of this "
                "batch, or wait for another one with on_nonfinite='postpone'"
            )
        seen = self.kept.get("gradient", {})
        if any(name not in seen for name in names):
            raise NotYet("gradients of other optimizers")
        self.kept.pop("gradient", None)
        return {name: seen[name] for name in names}

    def _random(self, name: str) -> Tensor:
        return torch.rand(tuple(self.weights[name].shape), generator=self.generator("grow", name))

    def _end(self) -> float:
        """T_end: a distance behind the last update, where the next one would drop nothing."""
        first, last = self.events[0].step, self.events[-1].step
        return last + (last - first) / (len(self.events) - 1)

    def _open(self) -> list[str]:
        """Weights that an update may change: trained, and neither dense nor empty."""
        assert self._masks is not None
        kept = self._masks.counts()
        return [n for n, w in self.weights.items() if w.requires_grad and 0 < kept[n] < w.numel()]

    @override
    def _row(self) -> dict[str, float]:
        row = super()._row()
        assert self.dense_cost is not None
        mean = self._spent / self.steps if self.steps else 3 * row["prune/flops_sparse"]
        kept = mean / max(1, 3 * self.dense_cost.flops)
        return {**row, "prune/training_flops": mean, "prune/training_flops_kept": kept}


def _size_of_gradient(weight: nn.Parameter) -> Tensor:
    """The absolute value of a dense gradient; zeros where there is none."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.abs()
