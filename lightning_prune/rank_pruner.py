"""What methods that remove ranks share: solve ranks, project weights onto them, and put two thin layers in the end.

The ranks follow from the budget before training starts. Each event replaces the weights by what the method projects
them to; shapes stay, and optimizers know nothing of it. After the fit each layer becomes two.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import checkpoint as _checkpoint
from lightning_prune import factorise
from lightning_prune.batches import own_precision
from lightning_prune.budget import Budget
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import NonFiniteScore, NothingToPrune, UnmeetableBudget
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.ignore import matching
from lightning_prune.pruner import Pruner, one_of
from lightning_prune.ranking import rank_uniform
from lightning_prune.schedule import Schedule, Updates
from lightning_prune.state import Fields
from lightning_prune.wiring import NormBehind, wiring

_UNTRAINED = "its weight is not trained"


@dataclass(frozen=True)
class MatrixSize:
    """What a layer costs, whole or as two.

    Attributes:
        outs: N, rows of its weight matrix: output channels.
        fan_in: K, its columns: weights of one output.
        places: how often one sample goes through the matrix: positions of the output, over all calls.
    """

    outs: int
    fan_in: int
    places: int

    @property
    def values(self) -> int:
        """Singular values of the matrix, its full rank."""
        return min(self.outs, self.fan_in)

    def left(self, rank: int) -> int:
        """Weights at a rank, as two layers, or as one where two would have as many: at that rank the layer is whole."""
        return min(rank * (self.outs + self.fan_in), self.outs * self.fan_in)

    def pays(self, rank: int) -> bool:
        """Whether two layers of that rank are cheaper than the one."""
        return rank * (self.outs + self.fan_in) < self.outs * self.fan_in


@dataclass(frozen=True)
class RankView:
    """What a method sees of a layer.

    Attributes:
        name: its module path.
        matrix: (N, K), float64: its weight, one row per output channel.
        gain: (N,), float64, signed: what the norm with running statistics that alone reads the layer multiplies each
            output channel with, in eval mode; None where there is none.
        closing: whether no optimizer step follows, so that the rank has to hold.
    """

    name: str
    matrix: Tensor
    gain: Tensor | None
    closing: bool


class RankPruner(Pruner):
    """A method that removes ranks: it projects weight matrices during the fit, and factorises them after it.

    It says what a layer's matrix becomes: `project`.

    Args:
        budget: fraction of the dense flops (or params, or units: singular values) that may be kept; met from below, as
            if factorised. Layers keep one common fraction of their singular values, solved for it.
        goal: instead of a budget, the fraction p of its n singular values that each layer loses: it keeps the whole
            part of ``n - n p``, at least 1.
        ranks: instead of a budget, layer -> rank by hand; layers that are not named stay whole.
        keep: layer -> fraction of its singular values, instead of the common one.
        scope: "uniform", one common fraction of all layers; singular values of two layers do not compare.
        min_rank: smallest rank a layer gets.
        classifier: whether a linear layer that makes the model's output, alone, is projected as well.
        finalize: whether each layer becomes two in ``on_fit_end``; else `finalize` does it when asked.
        **shared: see `Pruner`.
    """

    kind = "ranks"
    default_of = "flops"
    own_fields: ClassVar[Fields] = {
        "sizes": dict[str, tuple[int, int, int]],
        "factorised": bool,
        "projected_at?": int,
    }
    default_schedule: ClassVar[Schedule] = Updates(every=1, unit="epoch", end=1.0, least=10, closing=True)

    def __init__(
        self,
        budget: Budget | float | None = None,
        *,
        goal: float | None = None,
        ranks: Mapping[str, int] | None = None,
        keep: Mapping[str, float] | None = None,
        scope: Literal["uniform"] = "uniform",
        min_rank: int = 1,
        classifier: bool = False,
        finalize: bool = True,
        **shared: Any,
    ) -> None:
        given = {"a budget": budget, "goal=": goal, "ranks=": ranks}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f"{type(self).__name__} needs one of a budget, which ranks are solved for, goal= or ranks=, got "
                + (" and ".join(named) or "none")
            )
        super().__init__(Budget(1.0) if budget is None else budget, **shared)
        if budget is None and (keep or min_rank != 1):
            raise ValueError(
                f"keep= and min_rank= say how ranks are solved for a budget, and {named[0]} needs no budget"
            )
        if goal is not None:
            rank_of(goal, 1)
        if type(min_rank) is not int or min_rank < 1:
            raise ValueError(f"min_rank must be an int of at least 1, got {min_rank!r}")
        for name, rank in (ranks or {}).items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"rank of layer {name!r} must be an int of at least 1, got {rank!r}")
        for name, fraction in (keep or {}).items():
            if not 0 < fraction <= 1:
                raise ValueError(f"keep of layer {name!r} must be in (0, 1], got {fraction!r}")
        one_of("scope", scope, ("uniform",))
        self.scope = scope
        self.goal = goal
        self.ranks = None if ranks is None else dict(ranks)
        self.keep = dict(keep or {})
        self.min_rank = min_rank
        self.classifier = classifier
        self.finalizes = finalize
        self._sizes: dict[str, MatrixSize] = {}
        self._norms: Mapping[str, NormBehind] = {}
        self._factorised = False
        self._projected_at = -1
        self._said_behind = False
        self._fitted: weakref.ref[nn.Module] | None = None

    @abstractmethod
    def project(self, view: RankView, rank: int) -> tuple[Tensor, Tensor]:
        """What a layer's matrix becomes at an event.

        Returns:
            (N, K), of that rank where ``view.closing``, and the (n,) singular values it was decided by, falling.
        """

    @override
    def _scope(self) -> str:
        return f"{super()._scope()}/{self.goal}/{self.ranks}/{self.keep}/{self.min_rank}/{self.classifier}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fitted": None}  # a weak reference cannot travel

    def finalize(self, model: nn.Module | None = None) -> nn.Module:
        """Put two thin layers in place of each projected one, in place; equal to rounding to the projected network.

        Args:
            model: with the weights of the fit's end, or of a checkpoint of it; by default the module that was fitted
                last. A layer that is two already stays so.

        Returns:
            The same model.

        Raises:
            RuntimeError: before an event, or if the fitted module is gone.
            ValueError: if a layer cannot become two any more.
        """
        model = model if model is not None or self._fitted is None else self._fitted()
        if model is None or not self._plan.ranks:
            raise RuntimeError(f"{type(self).__name__} factorises what it has projected; fit first, or pass the model")
        self._two_for_one(model)
        return model

    def _two_for_one(self, model: nn.Module) -> list[factorise.Replaced]:
        still = {n: r for n, r in self._plan.ranks.items() if not factorise.is_pair_of(model, n, r)}
        return factorise.factorise(model, still)

    def plan_for(self, graph: ChannelGraph) -> Plan:
        """The ranks this method would give a traced model; nothing is changed.

        Raises:
            NothingToPrune: if no layer may become two.
            UnmeetableBudget: if the budget is out of reach.
        """
        self._graph, self._dense_cost, self._plan, self._restored = graph, graph.cost(), Plan(), None
        self._prepare(graph.model)
        return Plan(ranks=self._ranks_within(self.budget))

    @override
    def _changing(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {}  # optimizer state stays as it is

    @override
    def _prepare(self, model: nn.Module) -> None:
        self._said_behind = False
        self._fitted = weakref.ref(model)
        state = (self._restored or {}).get("own", {})
        self._projected_at = int(state.get("projected_at", -1))
        self._factorised = bool(state.get("factorised", False))
        if self._factorised:  # two layers that train on, like any others
            self._frozen = {}
            return
        layers, frozen = self._layers(model)
        self._frozen = frozen
        self._check_names(layers)
        if not layers:
            reasons = [f"{name}: {why}" for name, why in list(frozen.items())[:8]]
            raise NothingToPrune(
                f"no layer of {type(model).__name__} may become two: " + ("; ".join(reasons) or "it has none")
            )
        self._ranks_within(self.budget)  # say now, not at the last event, that it cannot be met

    def _layers(self, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """Layers that may become two, with their sizes and norms noted; and why the others may not."""
        graph = self.graph
        layers, frozen = factorise.candidates(model)
        wired = wiring(model, graph.example_inputs, layers)
        flops, ignored = graph.weight_flops(), matching(model, self.ignore)
        for name, layer in layers.items():
            weight: Any = layer.weight
            key = f"{name}.weight"
            size = MatrixSize(len(weight), weight[0].numel(), flops.get(key, 0) // weight.numel())
            why = None
            if key in ignored:
                why = "it is ignored"
            elif not size.places:
                why = "the example input does not reach it"
            elif not weight.requires_grad:
                why = _UNTRAINED
            elif name in wired.bypassed:
                why = "its weight is read by what does not call the layer"
            elif name in wired.last and isinstance(layer, nn.Linear) and not self.classifier:
                why = "it makes the model's output (classifier=True takes it)"
            elif not size.pays(1):
                why = "two layers would cost as much at any rank"
            if why is None:
                self._sizes[name] = size
            else:
                frozen[name] = why
                self._sizes.pop(name, None)
        left = {name: layer for name, layer in layers.items() if name not in frozen}
        frozen |= factorise.trial(model, graph.example_inputs, left)
        left = {name: layer for name, layer in left.items() if name not in frozen}
        self._sizes = {name: self._sizes[name] for name in left}
        self._norms = {name: norm for name, norm in wired.norms.items() if name in left}
        return left, frozen

    def _check_names(self, layers: Mapping[str, nn.Module]) -> None:
        for argument, named in (("ranks", self.ranks or {}), ("keep", self.keep)):
            for name in named:
                if name not in layers:
                    why = self._frozen.get(name, f"layers are {', '.join(layers)}")
                    raise ValueError(f"{argument}= names layer {name!r}, which cannot become two: {why}")
        for name, rank in (self.ranks or {}).items():
            size = self._sizes[name]
            if not size.pays(rank):
                most = (size.outs * size.fan_in - 1) // (size.outs + size.fan_in)
                raise ValueError(
                    f"ranks= gives layer {name!r} rank {rank}, at which two layers cost as much as its "
                    f"{size.outs} x {size.fan_in} matrix; give it at most {most}, or leave it out"
                )

    def _ranks_within(self, budget: Budget) -> dict[str, int]:
        """Rank of each layer that becomes two, within a budget: from below, as closely as whole ranks allow."""
        values = {name: size.values for name, size in self._sizes.items()}
        if self.goal is not None:
            return self._paying({name: rank_of(self.goal, n) for name, n in values.items()})
        if self.ranks is not None:
            return dict(self.ranks)
        dense = self._measured(values)

        def fits(ranks: Mapping[str, int]) -> bool:
            return budget.fits(self._measured(ranks), dense)

        ramp = {name: torch.arange(n, 0, -1, dtype=torch.float64) for name, n in values.items()}
        floors = dict.fromkeys(values, self.min_rank)
        try:
            masks = rank_uniform(ramp, fits, dense=values, keep=self.keep, floors=floors)
        except UnmeetableBudget as error:
            least = {n: max(self.min_rank, int(self.keep.get(n, 0) * size + 1e-9)) for n, size in values.items()}
            smallest = math.ceil(1e4 * self._measured(least) / max(1, dense)) / 1e4  # met if asked for
            untrained = [name for name, why in self._frozen.items() if why == _UNTRAINED]
            raise UnmeetableBudget(
                f"{type(self).__name__}: a budget of {budget.keep:g} of the {budget.of} cannot be met: with the "
                f"smallest ranks allowed {smallest:.4f} are left; raise keep"
                + (", lower min_rank" if self.min_rank > 1 else "")
                + (", or give fewer layers a keep= of their own" if self.keep else "")
                + (", or ignore fewer layers" if self.ignore else "")
                + (f", or train {', '.join(untrained)} from the start" if untrained else "")
            ) from error
        ranks = {name: int(mask.sum()) for name, mask in masks.items()}
        open_to_more = [name for name in ranks if name not in self.keep]
        while name := next((n for n in self._poorest(open_to_more, ranks) if fits({**ranks, n: ranks[n] + 1})), None):
            ranks[name] += 1  # single ranks that still fit, where least is kept
        return self._paying(ranks)

    def _poorest(self, names: Iterable[str], ranks: Mapping[str, int]) -> list[str]:
        """Those that have less than all their singular values, least first."""
        left = {name: ranks[name] / self._sizes[name].values for name in names}
        return sorted((name for name in left if left[name] < 1), key=left.__getitem__)

    def _paying(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The ranks at which two layers are cheaper than one."""
        return {name: rank for name, rank in ranks.items() if self._sizes[name].pays(rank)}

    def _measured(self, ranks: Mapping[str, int]) -> int:
        """What the budget bounds, at a rank of each layer; a layer whose pair does not pay is whole."""
        assert self._dense_cost is not None
        if self.budget.of == "units":
            return sum(self._units(name, ranks.get(name)) for name in self._sizes)
        flops = self.budget.of == "flops"
        saved = 0
        for name, rank in ranks.items():
            size = self._sizes[name]
            saved += (size.outs * size.fan_in - size.left(rank)) * (size.places if flops else 1)
        return (self._dense_cost.flops if flops else self._dense_cost.params) - saved

    def _units(self, name: str, rank: int | None) -> int:
        size = self._sizes[name]
        return size.values if rank is None or not size.pays(rank) else rank

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        if self._factorised:
            return False
        ranks = self._ranks_within(self._budget_at(progress))
        closing = self._total_steps is not None and self._steps >= self._total_steps
        found = self._project(trainer, model, ranks, closing)
        kept = {name: torch.arange(len(values)) < ranks[name] for name, values in found.items()}  # they fall
        self._log_scores(trainer, found, kept)
        self._plan, self._projected_at = Plan(ranks=ranks), self._steps
        return bool(ranks)

    def _project(
        self, trainer: pl.Trainer, model: nn.Module, ranks: Mapping[str, int], closing: bool
    ) -> dict[str, Tensor]:
        """Project weights in place, on the first process for all: processes may round, and normalise, differently."""
        found: dict[str, Tensor] = {}
        projected: dict[str, Tensor | None] = {}
        for name, rank in ranks.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            new: Tensor | None = None
            if trainer.is_global_zero:
                view = self._view(model, name, closing)
                finite = bool(torch.isfinite(view.matrix).all())
                if finite and (view.gain is None or bool(torch.isfinite(view.gain).all())):
                    matrix, found[name] = self.project(view, rank)
                    new = matrix.to(weight).reshape(weight.shape)
            projected[name] = self.same(new)
        if bad := [name for name, new in projected.items() if new is None]:
            raise NonFiniteScore(
                f"{type(self).__name__} cannot project {', '.join(bad[:3])}: the weight, or the norm behind it, is not "
                "finite; look at the loss and its gradients"
            )
        with torch.no_grad():
            for name, new in projected.items():
                weight = model.get_submodule(name).weight
                assert isinstance(weight, nn.Parameter)
                assert new is not None
                weight.copy_(new)
        return found

    def _view(self, model: nn.Module, name: str, closing: bool) -> RankView:
        matrix = factorise.matrix_of(model.get_submodule(name))
        # Apple's GPUs know no double precision
        matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
        norm = self._norms.get(name)
        gain = None
        if norm is not None:
            gain = (model.get_buffer(norm.variance).to(matrix) + norm.eps).rsqrt()
            if norm.weight is not None:
                gain = gain * model.get_parameter(norm.weight).detach().to(matrix)
        return RankView(name, matrix, gain, closing)

    def _off(self, model: nn.Module) -> dict[str, int]:
        """Layers of the plan whose weights have left their rank, by more than rounding."""
        off = {}
        for name, rank in self._plan.ranks.items():
            layer = model.get_submodule(name)
            if factorise.is_pair(layer):
                continue
            matrix = factorise.matrix_of(layer)
            values, _ = factorise.spectrum(matrix)
            rounding = max(1e-6, 8 * torch.finfo(matrix.dtype).eps)
            if rank < len(values) and bool(values[rank] > rounding * values[0]):
                off[name] = rank
        return off

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it once if what is validated is not what was projected."""
        behind = self._graph is not None and self._plan.ranks and not (self._factorised or self._said_behind)
        if behind and 0 <= self._projected_at < self._steps and not trainer.sanity_checking:
            self._said_behind = True
            rank_zero_info(
                f"{type(self).__name__}: what is validated at step {self._steps} has trained on since the projection "
                f"at step {self._projected_at}, and has its full rank"
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Project once more if training went on, or ended, after the last event."""
        if not self._started or self._factorised:
            return
        left = len(self._events) - self._done
        if left:
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {self._steps} after {self._done} of "
                f"{len(self._events)} events; it projects once more"
            )
        ranks = dict(self._plan.ranks) if self._done else self._ranks_within(self.budget)
        if self._steps == self._projected_at or not ranks:
            return
        try:
            with torch.no_grad(), own_precision(pl_module), self._event(trainer, pl_module):
                self._project(trainer, pl_module, ranks, closing=True)
        except NonFiniteScore as error:
            if self.on_nonfinite == "raise":
                raise
            self._plan = Plan()
            self._cost_now = self._current_cost()
            self._rows.append({"step": float(self._steps), **self.log_row(trainer, ended=True)})
            rank_zero_warn(f"{type(self).__name__} leaves every layer whole, and the budget is not met: {error}")
            return
        self._plan, self._projected_at = Plan(ranks=ranks), self._steps
        self._cost_now = self._current_cost()
        self._rows.append({"step": float(self._steps), **self.log_row(trainer, ended=True)})

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put two layers in place of each; averages of the weights, which training ends with, are projected first."""
        if not self.finalizes or not self._plan.ranks:
            return
        for each in (pl_module, *_checkpoint.copies(trainer, pl_module)):
            if off := self._off(each):
                rank_zero_info(f"{type(self).__name__}: weights have changed since the last projection: once more")
                with torch.no_grad(), self._event(trainer, pl_module):
                    self._project(trainer, each, off, closing=True)
            try:
                replaced = self._two_for_one(each)
            except ValueError as error:  # a hook that came during the fit: hours of training are not lost for it
                rank_zero_warn(f"{type(self).__name__} leaves layers projected, but whole: {error}")
                return
            if each is pl_module:
                factorise.follow(trainer.optimizers, replaced)
        self._factorised = True
        _checkpoint.wrap_again(trainer, pl_module)

    @override
    def _current_cost(self) -> Cost:
        """As if factorised, to the unit what is counted then."""
        assert self._dense_cost is not None
        flops, params = self._dense_cost.flops, self._dense_cost.params
        by_layer: dict[str, Mapping[str, int]] = {}
        ranks = self._plan.ranks
        for name, row in self._dense_cost.by_layer.items():
            if name not in ranks:
                by_layer[name] = row
                continue
            size, rank = self._sizes[name], ranks[name]
            operator = next(op for op in ("conv", "linear") if op in row)
            by_layer[f"{name}.0"] = {operator: rank * size.fan_in * size.places}
            by_layer[f"{name}.1"] = {operator: rank * size.outs * size.places}
            saved = size.outs * size.fan_in - size.left(rank)
            flops, params = flops - saved * size.places, params - saved
        return Cost(flops, params, by_layer)

    @property
    def ranks_kept(self) -> dict[str, tuple[int, int]]:
        """Layer -> (rank kept, full rank), of every layer that may lose some."""
        return {name: (self._plan.ranks.get(name, size.values), size.values) for name, size in self._sizes.items()}

    @override
    def _row(self) -> dict[str, float]:
        assert self._dense_cost is not None
        cost = self._cost_now or self._dense_cost
        kept = {name: self._plan.ranks.get(name, size.values) for name, size in self._sizes.items()}
        total = sum(size.values for size in self._sizes.values())
        row = {
            "prune/flops": float(cost.flops),
            "prune/flops_kept": cost.flops / max(1, self._dense_cost.flops),
            "prune/params": float(cost.params),
            "prune/params_kept": cost.params / max(1, self._dense_cost.params),
            "prune/density": sum(kept.values()) / max(1, total),
            "prune/flops_sparse": float(cost.flops),
        }
        row.update({f"prune/rank/{name}": float(rank) for name, rank in kept.items()})
        return row

    @override
    def own_state(self) -> dict[str, Any]:
        sizes = {name: [size.outs, size.fan_in, size.places] for name, size in self._sizes.items()}
        return {"sizes": sizes, "factorised": self._factorised, "projected_at": self._projected_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        own = state_dict["own"]
        self._sizes = {name: MatrixSize(*size) for name, size in own["sizes"].items()}
        self._factorised = bool(own["factorised"])
        self._projected_at = -1
        if self._dense_cost is not None:
            self._cost_now = self._current_cost()


def rank_of(goal: float, values: int) -> int:
    """The rank that is left of so many singular values n at a prune goal p: the whole part of ``n - n p``, at least 1.

    Raises:
        ValueError: if the goal is outside [0, 1).

    Example:
        >>> [rank_of(0.8, n) for n in (3, 16, 32, 64)]
        [1, 3, 6, 12]
    """
    if isinstance(goal, bool) or not isinstance(goal, int | float) or not 0 <= goal < 1:
        raise ValueError(f"goal must be in [0, 1), the fraction of singular values that go, got {goal!r}")
    return max(1, int(values - values * goal))
