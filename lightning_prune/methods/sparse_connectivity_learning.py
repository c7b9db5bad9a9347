"""Sparse connectivity learning (SCL): which connections exist is learned with the weights, by gradient descent.

Tang, Luo, Xie, Zhu, Zhao, Bi and Lu, 2022. This follows the published description; what that leaves open, and how it
is settled here, is in docs/methods/sparse_connectivity_learning.md. Differs from the paper: masks freeze at a point of
the fit, by exact count, and the pressure on them ends where the budget is met.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.errors import NonFiniteScore
from lightning_prune.masks import clear_off
from lightning_prune.pruner import Paper, one_of
from lightning_prune.schedule import OneShot
from lightning_prune.state import Fields
from lightning_prune.weight_pruner import WeightPruner

AtBudget = Literal["release", "press", "freeze"]
Granularity = Literal["weight", "kernel", "filter"]
Norm = Literal["rms", "l2", "none"]

REACH = 0.125  # fraction of the steps up to the freezing point after which pressure alone switches a weight off,
FEWEST = 4  # and in a very short fit no earlier than after so many, so that each of them says little


def mask_gradient(gradient: Tensor, weight: Tensor, size: Iterable[int]) -> Tensor:
    """The task's gradient by mask variables, straight through the unit step: ``g = dL/dW * V``.

    Args:
        gradient: dense gradient by the weight, also where it is switched off.
        weight: V, of the gradient's shape; switched-off entries have the value they would come back with.
        size: shape of the mask variables, 1 in each dim along which entries share one.

    Returns:
        float32 of that shape, summed over the entries that share a variable.

    Example:
        >>> mask_gradient(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[2.0, -1.0, 0.5]]), (1, 3))
        tensor([[ 2., -1.,  1.]])
    """
    return (gradient.float() * weight.float()).sum_to_size(*size)


def normalised(gradient: Tensor, dim: int = 0, norm: Norm = "rms", eps: float = 1e-12) -> Tensor:
    """Divide the gradient by each feature's mask variables by its size, so that all features learn at one pace.

    Args:
        gradient: by the mask variables of a layer.
        dim: along which features, output channels, lie. Where a feature has only one variable, the layer is taken as
            one feature: its own size would leave nothing but the sign.
        norm: the size: "rms", "l2", or "none" for a gradient as it is.
        eps: added to the size, so that a gradient of zero stays zero.

    Example:
        >>> normalised(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), norm="l2")
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000]])
    """
    if norm == "none" or not gradient.numel():
        return gradient
    single = gradient.shape[dim] == gradient.numel()
    over = [d for d in range(gradient.ndim) if single or d != dim]
    size: Tensor = torch.linalg.vector_norm(gradient, dim=over, keepdim=True)
    if norm == "rms":
        size = size * math.sqrt(size.numel() / gradient.numel())
    return gradient / (size + eps)


def decay(step: int, steps: int) -> float:
    """Half a cosine: 1 at step 0, 0 from ``steps`` on."""
    return (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


@lru_cache(maxsize=8)  # asked for at every step
def solved_mask_lr(lam: float, mask_init: float, steps: int) -> float:
    """The learning rate with which pressure alone brings a mask variable to zero after an eighth of the steps.

    Of fewer than 32 steps it takes four.

    Args:
        lam: pressure, above 0.
        mask_init: where the variable starts.
        steps: optimizer steps up to the freezing point, at least 1; the rate decays over them.

    Returns:
        ``mask_init / (lam * sum over t < steps / 8 of decay(t, steps))``.
    """
    return mask_init / (lam * sum(decay(step, steps) for step in range(max(FEWEST, round(REACH * steps)))))


class SparseConnectivityLearning(WeightPruner):
    """Learn which weights are on: each has a mask variable M, and is on while M is above zero.

    Every optimizer step moves M by plain gradient descent, ``M -= mask_lr * (ghat + lam)``: ``ghat`` is the task's
    gradient, straight through the step function and normalised by output channel, ``lam`` the pressure of the
    number of connections. A weight that is switched off keeps its value aside, and has it again when it comes back.
    At the schedule's one event masks freeze: exactly the budget's count stays, of the largest M.

    Args:
        budget: see `WeightPruner`; None takes the connectivity as it is learned, however many weights that are.
        lam: pressure per connection, in units of a feature's root mean square task gradient.
        at_budget: once no more is on than the budget allows: "release" the pressure for as long as that is so,
            "press" on, or "freeze" all masks at once until the event.
        granularity: what shares a mask variable: nothing ("weight"), a convolution's "kernel" of one input and one
            output channel, or a "filter" of one output channel.
        norm: how mask gradients are normalised: "rms", "l2" or "none".
        mask_init: where mask variables start, above 0.
        mask_lr: learning rate of the mask variables, which decays to 0 along half a cosine; by default solved so that
            pressure alone switches a weight off after an eighth of the steps before the event.
        **shared: see `WeightPruner`; the schedule must have one event.

    Raises:
        ValueError: for a value out of range, more than one event, or ``at_budget`` without a budget.
    """

    paper = Paper("Tang et al.", 2022, "https://arxiv.org/abs/2201.05020")
    own_fields: ClassVar[Fields] = {"learned": list[str], "met": bool}
    needs = "gradients of training"
    start = "initial"
    default_schedule = OneShot(0.85)
    first_step = 1
    alters_training = True

    def __init__(
        self,
        budget: Budget | float | None,
        *,
        lam: float = 0.5,
        at_budget: AtBudget | None = None,
        granularity: Granularity = "weight",
        norm: Norm = "rms",
        mask_init: float = 0.5,
        mask_lr: float | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(1.0 if budget is None else budget, **shared)
        self.as_learned = budget is None
        self.lam = lam
        self.at_budget = at_budget or ("press" if self.as_learned else "release")
        self.granularity = granularity
        self.norm = norm
        self.mask_init = mask_init
        self.mask_lr = mask_lr
        self._check()
        self._features: dict[str, int] = {}  # parameter -> dim of its output channels
        # what steps find out stays on the device, which no step waits for
        self._learned: dict[str, bool | Tensor] = {}  # whether a parameter had a gradient that was finite
        self._met: bool | Tensor = False  # no more is on than the budget allows
        self._left_out: int | Tensor = 0  # steps with a gradient that was not finite

    def _check(self) -> None:
        for name, value, allowed in (
            ("at_budget", self.at_budget, AtBudget),
            ("granularity", self.granularity, Granularity),
            ("norm", self.norm, Norm),
        ):
            one_of(name, value, get_args(allowed))
        if self.as_learned and self.at_budget != "press":
            raise ValueError(f"at_budget={self.at_budget!r} needs a budget, got budget=None")
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam must be at least 0, got {self.lam!r}")
        for name, number in (("mask_init", self.mask_init), ("mask_lr", self.mask_lr)):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} must be above 0, got {number!r}")
        if self.mask_lr is None and self.lam == 0:
            raise ValueError("without pressure (lam=0) no mask learning rate can be solved for; give mask_lr=")
        if len(self.schedule.points()) > 1:
            raise ValueError(f"masks freeze once, but {self.schedule} has several events; use OneShot")

    @override
    def initialise(self) -> None:
        self._learned, self._left_out = {}, 0
        if self.budget.keep < 1 or self.as_learned:
            self._begin()
            self.kept["mask"] = {name: self._variables(name, weight) for name, weight in self.weights.items()}
            self.kept["parked"] = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
            self._warn_of_frozen()

    @override
    def own_state(self) -> dict[str, Any]:
        return {"learned": sorted(name for name, had in self._learned.items() if had), "met": bool(self._met)}

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._begin()
        self._learned, self._met = dict.fromkeys(state["learned"], True), state["met"]

    def _begin(self) -> None:
        modules = self.model.named_modules()
        transposed = {f"{name}.weight": 1 for name, module in modules if getattr(module, "transposed", False)}
        makers = {p.weight: p.dim for group in self.graph.groups for p in group.producers}
        self._features = {name: {**transposed, **makers}.get(name, 0) for name in self.weights}
        self._met = False

    def _variables(self, name: str, weight: nn.Parameter) -> Tensor:
        """Mask variables of a weight, at their start: its dims, 1 in each that shares them."""
        if self.granularity == "weight":
            return torch.full_like(weight, self.mask_init, dtype=torch.float32, requires_grad=False)
        own = range(2) if self.granularity == "kernel" else (self._features[name],)
        size = [n if dim in own else 1 for dim, n in enumerate(weight.shape)]
        return torch.full(size, self.mask_init, dtype=torch.float32, device=weight.device)

    def _warn_of_frozen(self) -> None:
        if frozen := [name for name, weight in self.weights.items() if not weight.requires_grad]:
            rank_zero_warn(
                f"SparseConnectivityLearning: {frozen[0]!r}{f' and {len(frozen) - 1} more' if len(frozen) > 1 else ''} "
                "does not train (requires_grad=False); unless it does before the freezing point, list it in ignore="
            )

    @override
    def before_step(self, optimizer: Optimizer, held: Mapping[str, nn.Parameter]) -> None:
        gradients = {name: p.grad for name, p in held.items() if p.grad is not None}
        if "mask" not in self.kept or not gradients:
            return
        finite = _finite(gradients.values())  # 16-bit precision leaves a step out that is not
        self._left_out = ~finite + self._left_out
        moves = finite & ~self._met_on(finite) if self.at_budget == "freeze" else finite
        rate, pressures, presses = self._rate(), self._pressures(), self._presses(finite)
        for name, variables in self.kept["mask"].items():
            if name not in gradients:
                continue
            value = held[name] + self.kept["parked"][name]  # one of the two is zero
            task = mask_gradient(gradients[name], value, variables.shape)
            step = normalised(task, self._features[name], self.norm).add_(presses, alpha=pressures[name])
            variables.sub_(step.masked_fill_(~moves, 0), alpha=rate)
            self._learned[name] = finite | self._learned.get(name, False)

    def _met_on(self, other: Tensor) -> Tensor:
        """Whether the budget is met, 0-d bool, beside another tensor."""
        return torch.full_like(other, self._met) if isinstance(self._met, bool) else self._met

    def _presses(self, other: Tensor) -> Tensor:
        """1 while the pressure is on, else 0: 0-d float32, beside another tensor."""
        if self.at_budget == "release":
            return (~self._met_on(other)).float()
        return torch.ones_like(other, dtype=torch.float32)

    def _rate(self) -> float:
        steps = self.events[-1].step
        full = solved_mask_lr(self.lam, self.mask_init, steps) if self.mask_lr is None else self.mask_lr
        return full * decay(self.steps, steps)

    def _pressures(self) -> dict[str, float]:
        """Parameter -> lam, times how many weights one of its variables switches, by how many one does on average."""
        variables = sum(tensor.numel() for tensor in self.kept["mask"].values())
        average = sum(weight.numel() for weight in self.weights.values()) / variables
        return {name: self.lam * self._switched(name) / average for name in self.weights}

    def _switched(self, name: str) -> float:
        return self.weights[name].numel() / max(1, self.kept["mask"][name].numel())

    @override
    def after_step(self) -> None:
        if "mask" not in self.kept:
            return
        masks = self._connected()
        self._exchange(masks)
        self.switch_masks(masks)
        self._met = self._affordable()

    def _connected(self) -> dict[str, Tensor]:
        """What is on: H(M), in the shapes of the weights."""
        return {name: (m > 0).expand_as(self.weights[name]) for name, m in self.kept["mask"].items()}

    def _exchange(self, masks: Mapping[str, Tensor]) -> None:
        """Put what goes off aside and what comes on back, so that each value is in one place and zero in the other.

        What comes back has no momentum: that was cleared, and no gradient has reached it since.
        """
        parked = self.kept["parked"]
        for name, mask in masks.items():
            parked[name].copy_(self.weights[name].add_(parked[name]))
            clear_off(self.weights[name], mask)
            clear_off(parked[name], ~mask)
            parked[name].nan_to_num_(0, 0, 0)  # it would stay for good, and spoil mask variables

    def _affordable(self) -> Tensor:
        """Whether what is on fits the budget: 0-d bool, on the device."""
        assert self._masks is not None
        allowance, price = self._allowance(self.budget)
        spent = [kept.double() * price[name] for name, kept in self._masks.counted().items()]
        return torch.stack(spent).sum() <= allowance * (1 + 1e-12)

    @override
    def scores(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        if "mask" not in self.kept:  # all of it is to be kept
            return {name: torch.zeros_like(weight) for name, weight in weights.items()}
        untouched = sorted(name for name in weights if not self._learned.get(name, False))
        if untouched and self._left_out:
            raise NonFiniteScore(
                f"SparseConnectivityLearning has learned nothing of {untouched[0]!r}: in {int(self._left_out)} steps a "
                "gradient was NaN or infinite; look at the loss"
            )
        if untouched:
            raise RuntimeError(
                f"SparseConnectivityLearning: {untouched[0]!r}"
                f"{f' and {len(untouched) - 1} more' if len(untouched) > 1 else ''} had no gradient before the "
                f"freezing point at step {self.steps}, so nothing was learned of its connections; list it in ignore="
            )
        return dict(self.kept["mask"])

    @override
    def select(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        if "mask" not in self.kept:
            return super().select(scores, allowance, price)
        if self.as_learned:
            masks = self._connected()
        else:  # by mask variables, each as dear as all that it switches
            units = super().select(scores, allowance, {name: price[name] * self._switched(name) for name in scores})
            masks = {name: mask.expand_as(self.weights[name]) for name, mask in units.items()}
        self._exchange(masks)
        self.kept.clear()  # frozen: what was learned is in the masks
        return masks


def _finite(gradients: Iterable[Tensor]) -> Tensor:
    """Whether all of them are: 0-d bool, on the device."""
    sums = [gradient.sum(dtype=torch.float32) for gradient in gradients]  # what is not finite stays so in a sum
    return torch.stack(sums).isfinite().all()
