"""What methods that remove single weights share: score, rank by exact count, and hold what went at zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import surgery
from lightning_prune.batches import own_precision
from lightning_prune.budget import Budget
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, NothingToPrune, UnmeetableBudget
from lightning_prune.ignore import matching
from lightning_prune.masks import Masks
from lightning_prune.optimizers import clear
from lightning_prune.pruner import Pruner, named, one_of, zero_copies
from lightning_prune.ranking import check_finite_weights, rank_weights
from lightning_prune.state import Fields


class WeightPruner(Pruner):
    """A method that removes single weights: they are held at zero, shapes stay.

    It says how good each weight is: `score` per parameter, or `scores` for the whole model.

    Args:
        budget: fraction kept; of "units" (the default) it is of all weights with more than one dimension, those of
            ignored layers included and counted as kept; of "params" of all parameters; of "flops" it bounds the
            theoretical sparse flops.
        scope: "global", one ranking over all layers, or "layer", the same fraction of each.
        include: glob patterns of biases, norms or embeddings that are pruned as well; else they stay whole.
        **shared: see `Pruner`.

    Attributes:
        weights: name -> parameter that may be masked, while a fit runs.
        kept: quantity -> parameter's name -> tensor with the parameter's dims, or 1 in some of them: what a method
            keeps from step to step. It goes into checkpoints, and is cut as its parameter is.
        regrown: how many entries were turned on again so far.
    """

    kind = "weights"
    default_of = "units"
    state_fields: ClassVar[Fields] = {
        **Pruner.state_fields,
        "kept": dict[str, dict[str, Tensor]],
        "regrown": int,
    }
    default_scope: ClassVar[Literal["global", "layer"]] = "global"
    _against_empty = "raise keep"

    def __init__(
        self,
        budget: Budget | float,
        *,
        scope: Literal["global", "layer"] | None = None,
        include: Sequence[str] = (),
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        self.scope = self.default_scope if scope is None else scope
        one_of("scope", self.scope, ("global", "layer"))
        self.include = [include] if isinstance(include, str) else list(include)
        self.weights: dict[str, nn.Parameter] = {}
        self.kept: dict[str, dict[str, Tensor]] = {}
        self._regrown: int | Tensor = 0
        self._exempt: dict[str, nn.Parameter] = {}
        self._flops: dict[str, int] = {}
        self._dense_sizes: dict[str, int] = {}  # entries in the dense model of every parameter that counts
        self._dense_shapes: dict[str, tuple[int, ...]] = {}
        self._seen = Plan()  # what other callbacks have cut
        self._plan_is_old = False

    @property
    def regrown(self) -> int:
        """How many entries were turned on again so far."""
        return int(self._regrown)

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

    @property
    @override
    def plan(self) -> Plan:
        """All that was decided so far, in indices of the dense model."""
        if self._plan_is_old and self._masks is not None:
            masks = {name: self._dense_mask(name, mask.cpu()) for name, mask in self._masks.as_bool().items()}
            self._plan = Plan(masks=masks, shapes={name: tuple(mask.shape) for name, mask in masks.items()})
            self._plan_is_old = False
        return self._plan

    def _dense_mask(self, name: str, mask: Tensor) -> Tensor:
        """A mask of the parameter as it is now -> of the dense one; what was cut is not kept."""
        cut, shape = self._seen.kept.get(name, {}), self._dense_shapes[name]
        if not cut:
            return mask
        left = torch.zeros(1, dtype=torch.long)
        for dim, size in enumerate(shape):  # flat positions in the dense parameter of what is left of it
            left = (left.unsqueeze(-1) * size + cut.get(dim, torch.arange(size))).flatten()
        dense = torch.zeros(math.prod(shape), dtype=torch.bool)
        dense[left] = mask.flatten()
        return dense.reshape(shape)

    def _mask_now(self, name: str, dense: Tensor) -> Tensor:
        for dim, index in self._seen.kept.get(name, {}).items():
            dense = dense.index_select(dim, index)
        return dense

    @override
    def _prepare(self, model: nn.Module) -> None:
        ignored, included = matching(model, self.ignore), matching(model, self.include, "include")
        parameters = dict(model.named_parameters())
        prunable = {*self.graph.weights, *included} - ignored
        self.weights = {name: p for name, p in parameters.items() if name in prunable}
        if not self.weights:
            raise NothingToPrune(
                f"no weight of {type(model).__name__} may go: no layer multiplies with one, or all are ignored"
            )
        self._exempt = {n: p for n, p in parameters.items() if p.ndim > 1 and n not in self.weights}
        self._flops = self.graph.weight_flops()
        self._seen = surgery.applied(model)
        every = {**self.weights, **self._exempt}
        self._dense_shapes = {n: self._seen.shapes.get(n, tuple(p.shape)) for n, p in every.items()}
        self._dense_sizes = {name: math.prod(shape) for name, shape in self._dense_shapes.items()}
        self._mask_as_planned(model)
        self._refuse_shared()
        allowance, price = self._allowance(self.budget)
        if allowance < min(price.values()):
            self._refuse_budget(ignored)

    def _mask_as_planned(self, model: nn.Module) -> None:
        """Masks of a fit that goes on, or of ones."""
        masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in self.weights.items()}
        if self._restored is None:
            self.kept, self._regrown, self._plan_is_old = {}, 0, False
        else:
            planned = self._planned_masks({name: self._dense_shapes[name] for name in self.weights})
            masks |= {name: self._mask_now(name, mask) for name, mask in planned.items()}
            self._check_kept()
            for values in self.kept.values():
                values.update({n: t.to(self.weights[n].device) for n, t in values.items()})
        self._masks = Masks(named(model, masks), masks)
        self._masks.zero()

    def _check_kept(self) -> None:
        for key, values in self.kept.items():
            for name, tensor in values.items():
                shape = tuple(self.weights[name].shape) if name in self.weights else None
                if (
                    shape is None
                    or len(shape) != tensor.ndim
                    or any(size not in (1, whole) for size, whole in zip(tensor.shape, shape, strict=True))
                ):
                    raise IncompatibleCheckpoint(
                        f"the state of {type(self).__name__} has kept[{key!r}] of {name!r} with shape "
                        f"{tuple(tensor.shape)}, which in this fit "
                        + ("is nothing to mask" if shape is None else f"has shape {shape}")
                    )

    def _refuse_shared(self) -> None:
        for other in self._company:
            if isinstance(other, WeightPruner) and (both := sorted(self.weights.keys() & other.weights.keys())):
                raise RuntimeError(
                    f"{type(self).__name__} and {type(other).__name__} would both mask {both[0]!r}"
                    f"{f' and {len(both) - 1} more' if len(both) > 1 else ''}; share the layers out with ignore="
                )

    def _refuse_budget(self, ignored: set[str]) -> None:
        largest = sorted(self._exempt, key=lambda name: -self._exempt[name].numel())[:3]
        why = {n: "ignored" if n in ignored else self._frozen.get(n, "no layer multiplies with it") for n in largest}
        most = f" (mostly {'; '.join(f'{n}: {reason}' for n, reason in why.items())})" if why else ""
        raise UnmeetableBudget(
            f"{type(self).__name__}: a budget of {self.budget.keep:g} of the {self.budget.of} cannot be met with even "
            f"one of the {sum(w.numel() for w in self.weights.values())} weights that may go: what is never pruned is "
            f"{self._fixed() / max(1, self._dense_measure()):.4f} of them{most}; raise keep, or ignore fewer layers"
        )

    @override
    def _clash(self, other: Pruner) -> str | None:
        if other.cuts and (why := self._cannot_follow()):
            return why
        return super()._clash(other)

    def _cannot_follow(self) -> str | None:
        """Why this method cannot go on once another has cut channels; None if it can."""
        return None

    @override
    def _catch_up(self, model: pl.LightningModule) -> None:
        seen = surgery.applied(model)
        if seen is self._seen or self._masks is None or self._graph is None:
            return
        positions = seen.relative_to(self._seen)
        before = {name: tuple(mask.shape) for name, mask in self._masks.as_it_was().items()}
        self._seen, self._plan_is_old = seen, True
        with own_precision(model):
            self._graph = surgery.trace(model, self.graph.example_inputs)
        self._flops = self.graph.weight_flops()
        self._masks.cut(positions)
        for values in self.kept.values():
            for name, tensor in values.items():
                values[name] = _cut(tensor, before[name], positions.get(name, {}))
        self._cost_now = self._current_cost()

    def _dense_measure(self) -> int:
        assert self._dense_cost is not None
        if self.budget.of == "units":
            return sum(self._dense_sizes.values())
        return self._dense_cost.params if self.budget.of == "params" else self._dense_cost.flops

    def _price(self) -> dict[str, float]:
        if self.budget.of == "flops":
            return {name: self._flops.get(name, 0) / w.numel() for name, w in self.weights.items()}
        return dict.fromkeys(self.weights, 1.0)

    def _fixed(self) -> float:
        """What the budget bounds of everything in the network that is never pruned."""
        if self.budget.of == "units":
            return sum(p.numel() for p in self._exempt.values())
        cost, price = self.graph.cost(), self._price()
        now = cost.params if self.budget.of == "params" else cost.flops
        return now - sum(price[name] * w.numel() for name, w in self.weights.items())

    def _allowance(self, budget: Budget) -> tuple[float, dict[str, float]]:
        return budget.limit(self._dense_measure()) - self._fixed(), self._price()

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        assert self._masks is not None
        budget = self._budget_at(progress)
        allowance, price = self._allowance(budget)
        if allowance < 0:
            raise UnmeetableBudget(f"{type(self).__name__}: {budget.keep:g} cannot be met now")
        check_finite_weights(self.weights)
        scores = self.scores(self.weights)
        masks = self.select(scores, allowance, price)
        self._warn_of_empty(masks)
        changed = self.set_masks(masks)
        self._log_scores(trainer, scores, masks)
        return changed

    def _warn_of_empty(self, masks: Mapping[str, Tensor]) -> None:
        """Say which layers lose the last of their weights at this event."""
        assert self._masks is not None
        before, new = self._masks.counts(), [name for name, mask in masks.items() if not bool(mask.any())]
        if empty := [name for name in new if before[name]]:
            rank_zero_warn(
                f"{type(self).__name__} leaves no weight of {', '.join(empty[:3])}"
                f"{f' and {len(empty) - 3} more' if len(empty) > 3 else ''}, so that nothing flows through; "
                f"{self._against_empty}, or list what has to stay in ignore="
            )

    def set_masks(self, masks: Mapping[str, Tensor]) -> bool:
        """Hold other weights at zero from now on; optimizer state under zeros is cleared. Returns whether any changed.

        A weight that is turned on again has the value zero and no momentum; a method may give it another one.

        Args:
            masks: parameter -> bool, True = keep; those that are not named stay as they are.
        """
        assert self._masks is not None
        assert self._at_event is not None
        trainer, model = self._at_event
        current = self._masks.as_bool()
        new = {**current, **{name: mask.to(current[name].device) for name, mask in masks.items()}}
        different = {name: mask for name, mask in new.items() if not torch.equal(mask, current[name])}
        self._regrown += sum(int((mask & ~current[name]).count_nonzero()) for name, mask in different.items())
        self._masks.update(new)
        self._plan_is_old = True
        if different and trainer is not None:
            assert isinstance(model, pl.LightningModule)
            zero_copies(trainer, model, new)
            clear(trainer.optimizers, {self.weights[name]: mask for name, mask in different.items()})
        return bool(different)

    def switch_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Hold other weights at zero from now on, as `set_masks`, but between events: the device is asked nothing.

        Args:
            masks: parameter -> bool, True = keep, of all that is masked; the method has put zeros under them.
        """
        assert self._masks is not None
        assert self._at_event is not None
        trainer, model = self._at_event
        current = self._masks.as_bool()
        back = [(mask & ~current[name]).count_nonzero() for name, mask in masks.items()]
        self._regrown = torch.stack(back).sum() + self._regrown
        self._masks.switch(masks)
        self._plan_is_old = True
        if trainer is not None:
            assert isinstance(model, pl.LightningModule)
            zero_copies(trainer, model, masks)
            clear(trainer.optimizers, {self.weights[name]: mask for name, mask in masks.items()})

    @override
    def _current_cost(self) -> Cost:
        """Dense kernels cost what they cost; parameters at zero are not counted."""
        cost = self.graph.cost()
        return Cost(cost.flops, cost.params - self._removed(), cost.by_layer)

    def _removed(self) -> int:
        """Entries at zero in the network as it is, those of other methods included."""
        every = [self, *(other for other in self._company if isinstance(other, WeightPruner))]
        return sum(pruner._masks.removed() for pruner in every if pruner._masks is not None)

    def _saved(self) -> float:
        """Flops that densities save, by this method and others."""
        every = [self, *(other for other in self._company if isinstance(other, WeightPruner))]
        masks = [pruner._masks for pruner in every if pruner._masks is not None]
        return sum(self._flops.get(n, 0) * (1 - d) for each in masks for n, d in each.densities().items())

    @override
    def _row(self) -> dict[str, float]:
        assert self._dense_cost is not None
        cost = self._dense_cost if self._graph is None else self._current_cost()
        now = sum(p.numel() for p in (*self.weights.values(), *self._exempt.values())) - self._removed()
        row = {
            "prune/flops": float(cost.flops),
            "prune/flops_kept": cost.flops / max(1, self._dense_cost.flops),
            "prune/params": float(cost.params),
            "prune/params_kept": cost.params / max(1, self._dense_cost.params),
            "prune/density": now / max(1, sum(self._dense_sizes.values())),
            "prune/flops_sparse": float(cost.flops - self._saved()),
            "prune/regrown": float(self.regrown),
        }
        if self._masks is not None:
            kept = self._masks.counts()
            row.update({f"prune/density/{name}": n / max(1, self._dense_sizes[name]) for name, n in kept.items()})
        return row

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {key: {name: t.cpu().clone() for name, t in values.items()} for key, values in self.kept.items()}
        return {**super().state_dict(), "kept": kept, "regrown": self.regrown}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.kept = {key: dict(values) for key, values in state_dict["kept"].items()}
        self._regrown = int(state_dict["regrown"])
        self._plan_is_old = False

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._plan = self.plan  # of the masks that go now
            self._masks, self.weights, self._exempt = None, {}, {}


def _cut(tensor: Tensor, before: tuple[int, ...], positions: Mapping[int, Tensor]) -> Tensor:
    """What is kept of a parameter, cut as it was; a dim of size 1 is common to all of the parameter's slices."""
    for dim, index in positions.items():
        if tensor.shape[dim] == before[dim]:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
