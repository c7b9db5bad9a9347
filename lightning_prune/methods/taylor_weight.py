"""Taylor pruning on weights and gates: drop the units whose removal changes the loss least, to first order.

Molchanov, Mallya, Tyree, Frosio and Kautz, 2019. Differs from the paper: the target is a budget of flops instead of a
number of units, so that each event removes as many as its part of the budget wants; a coupled group's score is not
divided by the number of its members.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper
from lightning_prune.schedule import Iterative


def taylor_weight_score(weights: Tensor, grads: Tensor) -> Tensor:
    """Score each unit by the squared first-order change of the loss when all its weights go at once (eq. 8).

    Args:
        weights: (C, F), one row per unit.
        grads: (C, F), gradients of the mini-batch mean loss.

    Returns:
        (C,), at least 0, in the unit of the loss squared: the sum over a row is signed, then squared.

    Example:
        >>> import torch
        >>> taylor_weight_score(torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, 1.0]]))
        tensor([0.])
    """
    return (weights * grads).sum(dim=1).square()


def moving_average(average: Tensor | None, value: Tensor, momentum: float) -> Tensor:
    """Average over events: the first value as it is, then ``momentum * average + (1 - momentum) * value``.

    Args:
        average: (C,), or None before the first event.
        value: (C,).
        momentum: in [0, 1).
    """
    return value if average is None else momentum * average + (1 - momentum) * value


class TaylorWeight(ChannelPruner):
    """Cut the channels whose removal is estimated to change the loss least, from gradients of training itself.

    Args:
        budget: see `ChannelPruner`.
        order: of the expansion; 1 is what this version has.
        on: "gate" reads the gradient of a gate behind each channel's norm (the paper's best), "weight" that of the
            filter itself, which in front of a norm in train mode is noise, and warns.
        momentum: of the average over events (0.9 in the paper), 0 for none.
        **shared: see `ChannelPruner`; one global ranking, as in the paper.
    """

    paper = Paper("Molchanov et al.", 2019, "https://arxiv.org/abs/1906.10771")
    needs = "gradients of training"
    default_schedule = Iterative(start=0.1, end=0.6, events=15)
    default_scope = "global"
    first_step = 1
    join = "sum"

    def __init__(
        self,
        budget: Budget | float,
        *,
        order: Literal[1] = 1,
        on: Literal["gate", "weight"] = "gate",
        momentum: float = 0.9,
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        if order != 1:
            raise ValueError(f"order must be 1 in this version, got {order!r}")
        if on not in ("gate", "weight"):
            raise ValueError(f"on must be 'gate' or 'weight', got {on!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        self.order = order
        self.on = on
        self.momentum = momentum

    @override
    def measure(self, view: LayerView) -> Tensor | None:
        return view.gate_gradient if self.on == "gate" else view.weight_gradient

    @override
    def combine(self, joined: Tensor) -> Tensor:
        return joined.square()  # once a batch, after the signed sum over the group's members

    @override
    def score(self, view: LayerView) -> Tensor:
        assert view.measured is not None
        view.kept["average"] = moving_average(view.kept.get("average"), view.measured, self.momentum)
        return view.kept["average"]

    @override
    def _prepare(self, model: Any) -> None:
        super()._prepare(model)
        blind = [name for name, views in self._views.items() if all(view.scale_free for view in views)]
        if blind:
            warnings.warn(
                f"{', '.join(blind[:3])} stand in front of a norm without a scale, where the loss does not depend on a "
                "filter's length and the score is noise; list them in ignore=, or give the norm affine=True",
                stacklevel=2,
            )
        if self.on == "weight":
            behind = [name for name, views in self._views.items() if any(view.has_norm for view in views)]
            if behind:
                warnings.warn(
                    f"on='weight' scores {len(behind)} groups in front of a norm ({', '.join(behind[:3])}...), where "
                    "the loss does not depend on a filter's length and the score is noise; use on='gate'",
                    stacklevel=2,
                )
