"""Magnitude pruning: drop the weights with the smallest absolute value, at once, in rounds, or gradually.

Han, Pool, Tran and Dally, 2015; the gradual schedule is of Zhu and Gupta, 2017. Differs from the papers: with a budget
the count is exact, so that thresholds are solved for; a weight that went never returns; the L1 penalty, which is worse
than L2 once the survivors are retrained, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.absorb import Absorbed
from lightning_prune.budget import Budget
from lightning_prune.checkpoint import copies
from lightning_prune.dead import DeadUnits, find_dead, joined, silent_constants, weaker_half, without
from lightning_prune.errors import UnmeetableBudget
from lightning_prune.graph.flow import Flow
from lightning_prune.ignore import matching
from lightning_prune.pruner import Paper, one_of
from lightning_prune.ranking import rank_weights, top_mask
from lightning_prune.schedule import Gradual, OneShot
from lightning_prune.sensitivity import deviations
from lightning_prune.state import Fields
from lightning_prune.weight_pruner import WeightPruner


def magnitude_score(weight: Tensor) -> Tensor:
    """Score each weight by its absolute value.

    Args:
        weight: any shape.

    Returns:
        The same shape, at least 0.

    Example:
        >>> magnitude_score(torch.tensor([0.5, -2.0]))
        tensor([0.5000, 2.0000])
    """
    return weight.detach().abs()


def han_threshold(weight: Tensor, quality: float, mask: Tensor | None = None) -> float:
    """The threshold of a layer: quality factor times the standard deviation of the weights that survive.

    Args:
        weight: any shape.
        quality: factor q, at least 0; 0.25 to 1.5 in use.
        mask: bool, the shape of the weight, True = survives; all by default. Zeros of earlier rounds would make the
            deviation smaller, and iteration stall.

    Returns:
        ``q * std`` with the population's standard deviation; weights below it in absolute value go.

    Raises:
        ValueError: if quality is negative, or nothing survives.

    Example:
        >>> round(han_threshold(torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, 0.6]), 1.05), 5)
        0.37737
    """
    if quality < 0:
        raise ValueError(f"the quality factor must be at least 0, got {quality}")
    alive = weight.detach() if mask is None else weight.detach()[mask]
    if not alive.numel():
        raise ValueError(f"no weight of the {tuple(weight.shape)} tensor survives, so it has no standard deviation")
    return float(quality * alive.double().std(correction=0))


def lowered_dropout(dropout: float, kept: int, dense: int) -> float:
    """Dropout for a layer that has lost connections: ``D_o sqrt(C_r / C_o)``, as fewer are left to overfit with.

    Args:
        dropout: probability in the dense network, in [0, 1]; not that of an earlier round.
        kept, dense: connections of the layer now and in the dense network.

    Example:
        >>> round(lowered_dropout(0.5, 9, 100), 6)
        0.15
    """
    return dropout * math.sqrt(kept / max(1, dense))


class Magnitude(WeightPruner):
    """Mask the weights with the smallest absolute value; no data needed.

    Gradual by default (cubic); ``schedule=OneShot(...)`` prunes once, ``Iterative(...)`` in rounds of pruning and
    retraining. Give a budget, or the densities or the quality factors of layers, as a sensitivity scan finds them.

    Args:
        budget: see `WeightPruner`; None with ``quality``, or with ``keep`` alone.
        scope: "layer" gives every layer the same density (Han, Zhu and Gupta); "global" ranks all together.
        threshold: "density" counts in each layer, or ranks absolute values, as ``scope`` says; "quality" is Han's rule,
            a threshold of q standard deviations of each layer's survivors, with one q solved for the budget.
        keep: glob pattern of a layer -> its own density; the first that matches counts. Other layers share what is left
            of the budget; without a budget they stay whole.
        quality: instead of a budget: Han's q for all layers, or pattern -> q, where layers without one stay whole.
            Every event removes what is below the threshold of the survivors then; by default there is one.
        dropout: lower the dropout in front of pruned layers. True finds ``nn.Dropout`` modules by data flow; or the
            name of each -> pattern of the layers that it feeds.
        remove_dead: units that are left without inputs, or without outputs, lose all other weights; the count stays.
        freeze: patterns of what does not train any more from the first event on (Han's local retraining).
        **shared: see `WeightPruner`.
    """

    paper = Paper("Han et al.", 2015, "https://arxiv.org/abs/1506.02626")
    own_fields: ClassVar[Fields] = {"quality_factor": float | None, "dead": int, "dropouts": dict[str, float]}
    default_schedule = Gradual(start=0.1, end=0.7, events=20)
    default_scope = "layer"
    _against_empty = "raise keep, or lower quality="

    def __init__(
        self,
        budget: Budget | float | None = None,
        *,
        scope: Literal["global", "layer"] | None = None,
        threshold: Literal["density", "quality"] = "density",
        keep: Mapping[str, float] | None = None,
        quality: float | Mapping[str, float] | None = None,
        dropout: bool | Mapping[str, str] = False,
        remove_dead: bool = False,
        freeze: Sequence[str] = (),
        **shared: Any,
    ) -> None:
        one_of("threshold", threshold, ("density", "quality"))
        _refuse_contradictions(budget, scope, threshold, keep, quality)
        by_quality = threshold == "quality" or quality is not None
        if quality is not None and shared.get("schedule") is None:
            shared["schedule"] = OneShot(0.5)
        super().__init__(1.0 if budget is None else budget, scope="global" if by_quality else scope, **shared)
        self.threshold = threshold
        self.keep = {pattern: Budget(value, "units").keep for pattern, value in (keep or {}).items()}
        self.quality = dict(quality) if isinstance(quality, Mapping) else quality
        for factor in _factors(quality).values():
            if isinstance(factor, bool) or not 0 <= factor < math.inf:
                raise ValueError(f"a quality factor must be a finite number of at least 0, got {factor!r}")
        self.dropout = dict(dropout) if isinstance(dropout, Mapping) else dropout
        self.remove_dead = remove_dead
        self.freeze = [freeze] if isinstance(freeze, str) else list(freeze)
        self._by_quality = by_quality
        self._own: dict[str, float] = {}  # weight -> its own density or quality factor
        self._counts: dict[str, int] = {}  # weight with its own density -> how many of it stay at this event
        self._feeds: dict[str, list[str]] = {}  # dropout -> weights that it feeds
        self._dropouts: dict[str, float] = {}  # dropout -> its probability in the dense network
        self._dropouts_now: dict[str, float] = {}
        self._frozen_weights: set[str] = set()
        self._quality_factor: float | None = None
        self._dead = 0
        self._absorbed = Absorbed()  # what units that die at this event said

    @property
    def quality_factor(self) -> float | None:
        """With ``threshold="quality"``: the q that the budget came to at the last event; None before the first."""
        return self._quality_factor

    @property
    def dead(self) -> int:
        """How many units had neither inputs nor outputs after the last event, with ``remove_dead``."""
        return self._dead

    @override
    def initialise(self) -> None:
        self._quality_factor, self._dead = None, 0
        self._find_layers()
        modules = dict(self.model.named_modules())
        self._dropouts = {name: float(modules[name].p) for name in self._feeds}
        self._dropouts_now = dict(self._dropouts)
        self._budget_at(1.0)
        self._left(*self._allowance(self.budget), self._counts)

    @override
    def own_state(self) -> dict[str, Any]:
        return {"quality_factor": self._quality_factor, "dead": self._dead, "dropouts": dict(self._dropouts)}

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._quality_factor, self._dead = state["quality_factor"], int(state["dead"])
        self._find_layers()
        self._dropouts = {name: float(p) for name, p in state["dropouts"].items()}
        self._lower_dropout()  # a module's dropout is not in its checkpoint

    def _find_layers(self) -> None:
        """Patterns -> weights and modules of this network."""
        self._frozen_weights = matching(self.model, self.freeze, "freeze")
        self._own = {}
        if isinstance(self.quality, float | int):
            self._own = dict.fromkeys(self.weights, float(self.quality))
        for argument, values in (("keep", self.keep), ("quality", self.quality)):
            for pattern, value in values.items() if isinstance(values, Mapping) else ():
                for name in self._matching(pattern, argument):
                    self._own.setdefault(name, float(value))
        if self.keep and self.budget.keep < 1 and self._own.keys() == self.weights.keys():
            raise ValueError("keep= gives every layer its own density, which leaves nothing to a budget; leave it out")
        if self.dropout is True:
            assert self.graph.flow is not None
            self._feeds = _fed_by_dropout(self.model, self.graph.flow, self.weights)
            if not self._feeds:
                raise ValueError(
                    f"dropout=True found no nn.Dropout in front of a pruned layer of {type(self.model).__name__}; say "
                    "which feeds which, dropout={'drop1': 'fc1'}, or leave it out (F.dropout is not a module)"
                )
        elif self.dropout:
            modules = dict(self.model.named_modules())
            if wrong := [n for n in self.dropout if not isinstance(getattr(modules.get(n), "p", None), float | int)]:
                raise ValueError(f"dropout= names {wrong[0]!r}, which is no module with a dropout probability p")
            self._feeds = {name: self._matching(pattern, "dropout") for name, pattern in self.dropout.items()}

    def _matching(self, pattern: str, argument: str) -> list[str]:
        """Weights that may be masked and that a pattern means."""
        found = matching(self.model, [pattern], argument)
        names = [name for name in self.weights if name in found]
        if not names:
            raise ValueError(
                f"{argument} pattern {pattern!r} means no weight that is pruned: {', '.join(sorted(found))}"
            )
        return names

    @property
    @override
    def _idle(self) -> tuple[Callable[..., None], ...]:
        return () if self._frozen_weights or self._feeds else (Magnitude.before_step, Magnitude.after_step)

    @override
    def before_step(self, optimizer: Optimizer, held: Mapping[str, nn.Parameter]) -> None:
        if self.events_done:
            for name in self._frozen_weights & held.keys():
                held[name].grad = None  # not even decay or momentum moves it

    @override
    def after_step(self) -> None:
        self._lower_dropout()  # another callback may have cut channels

    @override
    def _budget_at(self, progress: float) -> Budget:
        if self.keep:
            self._counts = {
                name: Budget(value, "units").at(progress).limit(self._dense_sizes[name])
                for name, value in self._own.items()
            }
        return super()._budget_at(progress)

    @override
    def score(self, name: str, weight: nn.Parameter) -> Tensor:
        alive = self.alive(name)
        score = deviations(weight, alive) if self._by_quality else magnitude_score(weight)
        return score.masked_fill(~alive, -torch.inf)  # what went stays away, also where others are at zero

    @override
    def select(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        masks = self._chosen(scores, allowance, price)
        if self.remove_dead:
            masks = self._without_dead(scores, masks, allowance, price)
        if self._by_quality and self.quality is None:
            kept = [score[masks[name]].min() for name, score in scores.items() if bool(masks[name].any())]
            self._quality_factor = float(min(kept)) if kept else None
        return masks

    def _chosen(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        """What a rule keeps: thresholds as given, layers with their own density, the others by rank."""
        if self.quality is not None:
            return {name: score >= self._own.get(name, -1.0) for name, score in scores.items()}
        own = {name: top_mask(scores[name], min(n, _finite(scores[name]))) for name, n in self._counts.items()}
        others = {name: score for name, score in scores.items() if name not in own}
        left = self._left(allowance, price, {name: int(mask.sum()) for name, mask in own.items()})
        return {**own, **(rank_weights(others, left, price=price, scope=self.scope) if others else {})}

    def _left(self, allowance: float, price: Mapping[str, float], own: Mapping[str, int]) -> float:
        """What layers with their own density, and so many weights, leave of an allowance to the others."""
        left = allowance - sum(price[name] * count for name, count in own.items())
        if left < 0:
            raise UnmeetableBudget(
                f"Magnitude: the layers in keep= alone cost {-left:.4g} more than a budget of {self.budget.keep:g} of "
                f"the {self.budget.of} pays for; lower their densities, or raise the budget"
            )
        return left

    def _without_dead(
        self, scores: Mapping[str, Tensor], first: dict[str, Tensor], allowance: float, price: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Masks without dead units, of the same count; silent ones whose constant nothing can take stay as they are."""
        spared: dict[str, Tensor] = {}
        while True:
            masks, dead = self._ranked_again(scores, first, spared, allowance, price)
            found, stuck = self.same(silent_constants(self.model, self.graph, dead, masks))
            if not stuck:
                self._dead, self._absorbed = len(dead), found
                return masks
            spared = joined(spared, stuck)

    def _ranked_again(
        self,
        scores: Mapping[str, Tensor],
        masks: dict[str, Tensor],
        spared: Mapping[str, Tensor],
        allowance: float,
        price: Mapping[str, float],
    ) -> tuple[dict[str, Tensor], DeadUnits]:
        """What dead units lose goes to the next best weights, until no unit is dead or there are no weights left."""
        there = {name: torch.isfinite(score) for name, score in scores.items()}
        known = DeadUnits.none(self.graph)
        dead = find_dead(self.graph, masks, spared)
        while len(dead) > len(known):
            left = without(there, self.graph, dead)
            fewer = {name: score.masked_fill(~left[name], -torch.inf) for name, score in scores.items()}
            again = self._chosen(fewer, allowance, price)
            if self.quality is None and self._falls_short(masks, again, left, price):
                dead = weaker_half(self.graph, dead, known, scores)  # others may live again with what these lose
                continue
            masks, known = again, dead
            dead = find_dead(self.graph, masks, spared, known)
        return masks, known  # a last unit stays if there is no other weight to take: the count comes first

    def _falls_short(
        self,
        before: Mapping[str, Tensor],
        now: Mapping[str, Tensor],
        left: Mapping[str, Tensor],
        price: Mapping[str, float],
    ) -> bool:
        """Whether fewer weights stay than before as there are no others to take."""
        if any(int(now[name].sum()) < int(before[name].sum()) for name in self._counts):
            return True
        paid = [sum(price[name] * int(mask.sum()) for name, mask in masks.items()) for masks in (before, now)]
        return paid[1] < paid[0] and all(torch.equal(now[n], left[n]) for n in now if n not in self._counts)

    @override
    def set_masks(self, masks: Mapping[str, Tensor]) -> bool:
        changed = super().set_masks(masks)
        if self._absorbed and self._at_event is not None:
            trainer, model = self._at_event
            assert isinstance(model, pl.LightningModule)
            for each in (model, *(copies(trainer, model) if trainer is not None else ())):
                self._absorbed.add_to(each)
        self._absorbed = Absorbed()
        self._lower_dropout()
        return changed

    def _lower_dropout(self) -> None:
        if not self._feeds or self._masks is None:
            return
        counts, modules = self._masks.counts(), dict(self.model.named_modules())
        for name, weights in self._feeds.items():
            dense = sum(self._dense_sizes[n] for n in weights)
            new = lowered_dropout(self._dropouts[name], sum(counts[n] for n in weights), dense)
            old, self._dropouts_now[name] = float(modules[name].p), new
            if new != old:
                modules[name].p = new
                rank_zero_info(f"Magnitude: dropout {name!r} from {old:.4f} to {new:.4f}, for {', '.join(weights)}")

    @property
    def dropouts(self) -> dict[str, tuple[float, float]]:
        """Dropout module -> its probability in the dense network, and now."""
        return {name: (p, self._dropouts_now.get(name, p)) for name, p in self._dropouts.items()}

    def restore_dropout(self, model: nn.Module) -> None:
        """Give a model's dropouts the probabilities they had in the dense network."""
        modules = dict(model.named_modules())
        for name, (dense, _) in self.dropouts.items():
            modules[name].p = dense

    @override
    def _row(self) -> dict[str, float]:
        row = super()._row()
        if self._quality_factor is not None:
            row["prune/quality"] = self._quality_factor
        if self.remove_dead:
            row["prune/dead"] = float(self._dead)
        row.update({f"prune/dropout/{name}": now for name, (_, now) in self.dropouts.items()})
        return row


def _refuse_contradictions(
    budget: Any, scope: str | None, threshold: str, keep: Mapping[str, float] | None, quality: Any
) -> None:
    """A budget or what stands in its place, and one rule."""
    if quality is not None and (budget is not None or keep is not None or scope is not None):
        raise ValueError(
            "quality= is the paper's own rule, whose outcome is not known beforehand: it goes without budget=, keep= "
            f"and scope=, got budget={budget!r}, keep={keep!r}, scope={scope!r}; for a q that meets a budget leave "
            "quality= out and give threshold='quality'"
        )
    if budget is None and quality is None and (not keep or threshold == "quality"):
        raise ValueError("Magnitude wants a budget, or keep= with densities, or quality= with factors of layers")
    if threshold == "quality" and (scope is not None or keep is not None):
        raise ValueError(
            f"threshold='quality' has one quality factor for all layers, got scope={scope!r} and keep={keep!r}; leave "
            "them out"
        )


def _factors(quality: Any) -> Mapping[str, Any]:
    if quality is None:
        return {}
    return quality if isinstance(quality, Mapping) else {"": quality}


def _finite(score: Tensor) -> int:
    return int(torch.isfinite(score).sum())


def _fed_by_dropout(model: nn.Module, flow: Flow, weights: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Dropout module -> weights that read what it returns, at most reshaped or through an activation."""
    modules = dict(model.named_modules())
    feeds: dict[str, list[str]] = {}
    for weight in weights:
        for number in flow.layers.get(weight, ()):
            at = next(iter(flow.calls[number].sources), None)
            while at is not None:
                record = flow.calls[at[0]]
                if isinstance(modules.get(record.module), nn.modules.dropout._DropoutNd):
                    fed = feeds.setdefault(record.module, [])
                    fed += [weight] if weight not in fed else []
                    break
                at = next(iter(record.sources), None) if flow.entrywise(at[0]) is not None else None
    return feeds
