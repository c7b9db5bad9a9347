"""What methods that remove single weights share: score, rank by exact count, and hold what went at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import figures
from lightning_prune.budget import Budget
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import NothingToPrune, UnmeetableBudget
from lightning_prune.ignore import matching
from lightning_prune.masks import Masks
from lightning_prune.optimizers import clear
from lightning_prune.pruner import Pruner, named, one_of, zero_copies
from lightning_prune.ranking import rank_weights


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
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        self.scope = self.default_scope if scope is None else scope
        one_of("scope", self.scope, ("global", "layer"))
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
        return self._masks.of(name)

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
        self._masks = Masks(named(model, masks), masks)
        self._masks.hold()
        allowance, _ = self._allowance(self.budget)
        if allowance < 0:
            fixed = self._fixed()
            largest = sorted(self._exempt, key=lambda name: -self._exempt[name])[:3]
            why = {
                n: "ignored" if n in ignored else self._frozen.get(n, "no layer multiplies with it") for n in largest
            }
            most = f" (mostly {'; '.join(f'{n}: {reason}' for n, reason in why.items())})" if why else ""
            raise UnmeetableBudget(
                f"{type(self).__name__}: a budget of {self.budget.keep:g} of the {self.budget.of} cannot be met: what "
                f"is never pruned is {fixed / max(1, self._dense_measure()):.4f} of them{most}; raise keep, or ignore "
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
        zero_copies(trainer, model, masks)
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
        return self._dense_cost.params - (0 if self._masks is None else self._masks.removed())

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
