"""Magnitude pruning: drop the weights with the smallest absolute value, at once, in rounds, or gradually.

Han, Pool, Tran and Dally, 2015; the gradual schedule is of Zhu and Gupta, 2017. Differs from the papers: the budget is
met by exact count, so that thresholds are solved for, not given; a weight that went never returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.pruner import Paper
from lightning_prune.schedule import Gradual
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


class Magnitude(WeightPruner):
    """Mask the weights with the smallest absolute value; no data needed.

    Gradual by default (cubic); ``schedule=OneShot(...)`` prunes once, ``Iterative(...)`` in rounds of pruning and
    retraining.

    Args:
        budget: see `WeightPruner`.
        scope: "layer" gives every layer the same density (Han, Zhu and Gupta); "global" ranks all together.
        **shared: see `WeightPruner`.
    """

    paper = Paper("Han et al.", 2015, "https://arxiv.org/abs/1506.02626")
    default_schedule = Gradual(start=0.1, end=0.7, events=20)
    default_scope = "layer"

    def __init__(self, budget: Budget | float, **shared: Any) -> None:
        super().__init__(budget, **shared)

    @override
    def score(self, name: str, weight: nn.Parameter) -> Tensor:
        score = magnitude_score(weight)
        gone = ~self.alive(name)
        return score.masked_fill(gone, -torch.inf)  # what went stays away, also where others are at zero
