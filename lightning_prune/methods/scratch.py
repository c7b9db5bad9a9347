"""Scratch: the control experiment of every method. Its plan, trained from new initial weights.

Liu, Sun, Zhou, Huang and Darrell, 2019. Differs from the paper: where weights are not masked they are drawn as the
layers themselves draw them; masked linear layers are drawn so too, and scaled to their density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import factorise, surgery
from lightning_prune.checkpoint import plan_of, wrap_again
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.masks import Masks
from lightning_prune.pruner import Paper, Pruner, named
from lightning_prune.schedule import OneShot

Reset = Callable[[nn.Module], None]


def scratch_epochs(epochs: int, dense_flops: float, flops: float, cap: float | None = 2.0) -> int:
    """Epochs of Scratch-B: as many as a small network can be trained for at the price of a large one's training.

    Args:
        epochs: of the large network.
        dense_flops: of one forward of it.
        flops: of one forward of the small one; where weights are masked, those of weights that are not zero.
        cap: at most this many times the epochs; None for no bound.

    Returns:
        ``int(epochs * min(dense_flops / flops, cap))``, and never fewer than ``epochs``.

    Raises:
        ValueError: if a number is not above 0, or the cap is below 1.

    Example:
        >>> scratch_epochs(160, 3.13e8, 2.06e8), scratch_epochs(90, 3.0, 1.0)
        (243, 180)
    """
    if epochs < 1 or dense_flops <= 0 or flops <= 0 or (cap is not None and cap < 1):
        raise ValueError(
            f"scratch_epochs wants epochs and flops above 0 and a cap of at least 1, got epochs={epochs}, "
            f"dense_flops={dense_flops}, flops={flops}, cap={cap}"
        )
    longer = Fraction(dense_flops) / Fraction(flops)
    if cap is not None:
        longer = min(longer, Fraction(cap))
    return max(epochs, int(epochs * longer))


def sparse_std(mask: Tensor, inputs: int) -> float:
    """Standard deviation of the weights of a masked convolution: ``sqrt(2 / n)``, n connections going out of a channel.

    n is the mean over input channels of the connections that survive; with all of them it is He's fan-out.

    Args:
        mask: bool, of the weight's shape, True = keep.
        inputs: input channels of the layer, over all its groups.

    Returns:
        0 where nothing survives.

    Example:
        >>> sparse_std(torch.ones(64, 64, 3, 3, dtype=torch.bool), 64) == math.sqrt(2 / (64 * 9))
        True
    """
    kept = int(mask.count_nonzero())
    return math.sqrt(2 * inputs / kept) if kept else 0.0


class Scratch(Pruner):
    """Train the network that a plan leaves from new initial weights; the plan is all it takes from another run.

    At the fit's start channels are cut, ranks become two layers, masks are held for the whole fit, and every value is
    drawn anew. Is the pruned network no better than this one, its weights were worth nothing beyond its architecture.

    Args:
        plan: what is kept: a `Plan`, the JSON file of one, or a checkpoint of a pruned network. The module is dense, or
            has the shapes of the plan already.
        seed: of the new weights; by default the run's own.
        reset: ``(pl_module) -> None`` that draws every value anew; by default each layer's ``reset_parameters()``.
        sparse_init: draw what is masked by its surviving connections; else as the dense layer is drawn.
        example_input: as for `Pruner`.

    Raises:
        ValueError: if the plan is none or keeps everything, or the seed is no whole number from 0.
    """

    kind = "control"
    paper = Paper("Liu et al.", 2019, "https://arxiv.org/abs/1810.05270")
    needs = "a plan"
    default_schedule = OneShot(0.0)
    alters_training = True

    def __init__(
        self,
        plan: str | Path | Plan,
        *,
        seed: int | None = None,
        reset: Reset | None = None,
        sparse_init: bool = True,
        example_input: Any = None,
    ) -> None:
        super().__init__(1.0, example_input=example_input)
        if not isinstance(plan, str | Path | Plan):
            raise ValueError(f"Scratch wants a Plan, or the path of a plan or checkpoint, got {type(plan).__name__}")
        if isinstance(plan, Plan) and plan.is_empty:
            raise ValueError("Scratch was given a plan that keeps everything; train the module itself for that")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
        self.source = plan
        self.init_seed = seed
        self.reset = reset
        self.sparse_init = sparse_init
        self._wanted = plan if isinstance(plan, Plan) else Plan()

    @property
    @override
    def plan(self) -> Plan:
        """What the network is cut, masked or factorised to, in indices of the dense model."""
        return self._wanted

    @property
    @override
    def cuts(self) -> bool:
        return bool(self._wanted.kept or self._wanted.ranks)

    @override
    def _clash(self, other: Pruner) -> str | None:
        return "Scratch trains what a plan leaves, and nothing else may prune it; use one fit after the other"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the plan, before anything changes."""
        if not isinstance(self.source, Plan):
            self._wanted = read_plan(self.source)
        super().setup(trainer, pl_module, stage)

    @override
    def _prepare(self, model: nn.Module) -> None:
        if self._restored is not None and self._plan != self._wanted:
            raise IncompatibleCheckpoint(
                "the checkpoint was written by Scratch with another plan; give it the same one to go on"
            )
        self._plan, self._masks = self._wanted, None
        if self._restored is not None:
            self._hold(model)

    @override
    def _decide_and_apply(self, trainer: pl.Trainer, model: pl.LightningModule, progress: float) -> bool:
        if cut := self._is_to_be_cut(model):
            surgery.cut(model, self._without_masks(), trainer.optimizers, graph=self.graph, since=Plan(), absorb=False)
        whole = {n: r for n, r in self._wanted.ranks.items() if not factorise.is_pair_of(model, n, r)}
        replaced = factorise.factorise(model, whole)
        factorise.follow(trainer.optimizers, replaced)
        if cut or replaced:
            wrap_again(trainer, model)
            self._graph = surgery.trace(model, self.graph.example_inputs)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._draw(model)
        self._hold(model)
        return True

    def _without_masks(self) -> Plan:
        plan = self._wanted
        return Plan(plan.kept, {}, plan.buffers, plan.shapes, plan.attributes, plan.groups)

    def _is_to_be_cut(self, model: nn.Module) -> bool:
        """Whether the module is dense where the plan cuts; not if it has the plan's shapes already."""
        plan = self._wanted
        now = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        for name in {**plan.kept, **plan.buffers, **plan.masks}:
            if now.get(name) not in (plan.shapes[name], plan.current_shape(name)):
                raise IncompatibleCheckpoint(
                    f"the plan is not of this {type(model).__name__}: of {name!r} it keeps {plan.current_shape(name)} "
                    f"of {plan.shapes[name]}, and the module has {now.get(name, 'none')}"
                )
        return any(now[name] != plan.current_shape(name) for name in {**plan.kept, **plan.buffers})

    def _draw(self, model: nn.Module) -> None:
        """New values for everything, equal on all processes."""
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        with isolate_rng(), torch.enable_grad():
            torch.manual_seed(self.seed("weights") if self.init_seed is None else self.init_seed)
            if self.reset is None:
                _reset(model)
            else:
                self.reset(model)
            if same := _untouched(model, before, self.reset is None):
                raise RuntimeError(
                    f"Scratch knows no way to draw {', '.join(same[:3])}{' ...' if len(same) > 3 else ''} anew: no "
                    "reset_parameters() of a module reaches it; pass reset=, a function that draws every value of the "
                    "module"
                )
            if self.sparse_init:
                self._draw_sparse(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.copy_(self.same(tensor.data))

    @torch.no_grad()
    def _draw_sparse(self, model: nn.Module) -> None:
        for name in self._wanted.masks:
            mask, weight = self._wanted.mask_now(name), model.get_parameter(name)
            if weight.ndim < 2 or not bool(mask.any()):
                continue
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            if weight.ndim > 2:
                weight.normal_(0, sparse_std(mask, getattr(layer, "in_channels", weight.shape[1])))
            else:  # fan-out would make the logits of a classifier of few classes huge
                weight.mul_(math.sqrt(mask.numel() / int(mask.count_nonzero())))

    def _hold(self, model: nn.Module) -> None:
        """Zeros under the masks, from now on."""
        masks = {name: self._wanted.mask_now(name) for name in self._wanted.masks}
        self._masks = Masks(named(model, masks), masks)
        self._masks.zero()

    @override
    def _current_cost(self) -> Cost:
        cost = self.graph.cost()
        return Cost(cost.flops, cost.params - (self._masks.removed() if self._masks else 0), cost.by_layer)

    @override
    def _row(self) -> dict[str, float]:
        assert self._dense_cost is not None
        cost = self._cost_now or self._dense_cost
        densities = self._masks.densities() if self._masks is not None else {}
        flops = self.graph.weight_flops() if self._graph is not None else {}
        saved = sum(flops.get(name, 0) * (1 - density) for name, density in densities.items())
        kept = cost.params / max(1, self._dense_cost.params)
        return {
            "prune/flops": float(cost.flops),
            "prune/flops_kept": cost.flops / max(1, self._dense_cost.flops),
            "prune/params": float(cost.params),
            "prune/params_kept": kept,
            "prune/density": kept if self._wanted.ranks else self._wanted.density,
            "prune/flops_sparse": cost.flops - saved,
        }

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._masks = None


def read_plan(path: str | Path) -> Plan:
    """The plan in a JSON file that `Plan.save` wrote, or in a checkpoint of a pruned network.

    Raises:
        IncompatibleCheckpoint: if there is none in it.
        FileNotFoundError: if there is no such file.
    """
    if Path(path).suffix == ".json":
        return Plan.load(path)
    plan = plan_of(torch.load(path, map_location="cpu", weights_only=True))
    if plan is None or plan.is_empty:
        raise IncompatibleCheckpoint(f"{str(path)!r} holds no plan; give Scratch a checkpoint of a pruned network")
    return plan


def _reset(model: nn.Module) -> None:
    for module in reversed(list(model.modules())):  # a parent may set what its children do not know
        own = _own_reset(module)
        if own is not None:
            own()


def _own_reset(module: nn.Module) -> Callable[[], Any] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # the second is that of attention and transformers
        if callable(found := getattr(module, name, None)):
            return found  # type: ignore[no-any-return]
    return None


def _untouched(model: nn.Module, before: dict[str, Tensor], by_layers: bool) -> list[str]:
    """Parameters that still have the values they had; vectors that a layer sets to constants may well have."""
    same = []
    for name, value in before.items():
        parameter = model.get_parameter(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        constant = value.ndim < 2 and (not by_layers or _own_reset(owner) is not None)
        if torch.equal(parameter, value) and not constant:
            same.append(name)
    return same
