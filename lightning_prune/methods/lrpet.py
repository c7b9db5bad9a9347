"""LRPET: project weight matrices onto a low rank again and again while they train, and give the energy to what stays.

Guo, Lin, Chen, Xing, Liu and Xu, 2022 (IEEE TNNLS 2024). Differs from the paper: ranks are solved for the budget; the
norm behind a layer is found by data flow; a layer stays whole where two would cost as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.factorise import spectrum
from lightning_prune.pruner import Paper, one_of
from lightning_prune.rank_pruner import RankPruner, RankView
from lightning_prune.schedule import Updates

_SOFT = 1e-5  # added to squares of gains before they are divided by
_DEAD = 1e-4  # largest singular value below which a merged matrix is not decided by


def energy_transfer(matrix: Tensor, rank: int, tail: float = 0.0) -> tuple[Tensor, Tensor]:
    """Project a matrix onto a rank, and scale what stays so that its Frobenius norm is what it was.

    With E the sum of all squared singular values, the first ``rank`` of them are multiplied by
    ``sqrt((E - tail^2 E_tail) / E_head)``, the others by ``tail``.

    Args:
        matrix: (N, K).
        rank: singular values that stay, from 1 to min(N, K).
        tail: what the others are multiplied by, in [0, 1].

    Returns:
        (N, K) float64, and the (n,) singular values from before, falling.

    Example:
        >>> new, values = energy_transfer(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), 2)
        >>> new.diagonal().round(decimals=6)
        tensor([3.1132, 2.0755, 0.0000], dtype=torch.float64)
    """
    values, vectors = spectrum(matrix)
    exact = matrix.detach().to(vectors)
    leading = vectors[:, :rank]
    wide = matrix.shape[0] <= matrix.shape[1]
    head = leading @ (leading.T @ exact) if wide else (exact @ leading) @ leading.T
    energy, kept = exact.square().sum(), head.square().sum()
    if not kept:
        return torch.zeros_like(exact), values
    lost = (energy - kept).clamp(min=0)
    scale = ((energy - tail**2 * lost) / kept).sqrt()
    return scale * head + tail * (exact - head), values


def softened_inverse(gain: Tensor) -> Tensor:
    """One over each gain, as ``gain / (gain^2 + 1e-5)``: near zero where the gain is, and of its sign.

    Args:
        gain: any shape.

    Example:
        >>> softened_inverse(torch.tensor([0.0, 0.001, -1.0], dtype=torch.float64))
        tensor([ 0.0000, 90.9091, -1.0000], dtype=torch.float64)
    """
    return gain / (gain.square() + _SOFT)


def rectified_transfer(matrix: Tensor, gain: Tensor, rank: int, tail: float = 0.0) -> tuple[Tensor, Tensor]:
    """`energy_transfer` of the matrix that inference uses, each row times its norm's gain; then undone row by row.

    Args:
        matrix: (N, K).
        gain: (N,) ``gamma / sqrt(variance + eps)``, signed.
        rank: see `energy_transfer`.
        tail: see `energy_transfer`.

    Returns:
        (N, K) float64 of at most that rank if ``tail`` is 0, and the (n,) singular values of the merged matrix. Where
        all of these are below 1e-4, as behind scales that start at zero, the matrix is projected as if there were no
        norm: undoing would leave nothing of it.
    """
    exact = matrix.detach().double()
    gain = gain.detach().to(exact)
    merged, values = energy_transfer(gain[:, None] * exact, rank, tail)
    if values[0] < _DEAD:
        return energy_transfer(exact, rank, tail)[0], values
    return softened_inverse(gain)[:, None].to(merged) * merged, values


class LRPET(RankPruner):
    """Project each layer's weights onto a low rank after every epoch, with energy transfer; factorise after the fit.

    No data is needed. In a fit of fewer than ten epochs it projects within them as well, ten times at least.

    Args:
        budget: see `RankPruner`.
        rectify: whether a layer is projected as the norm behind it scales it (BN rectification).
        tail: what is left of the smaller singular values between events, in [0, 1); after the last step it is nothing.
        ranks: see `RankPruner`.
        keep: see `RankPruner`.
        **shared: see `RankPruner`.
    """

    start = "initial"
    paper = Paper("Guo et al.", 2022, "https://arxiv.org/abs/2204.05566")

    def __init__(
        self,
        budget: Budget | float | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
        keep: Mapping[str, float] | None = None,
        rectify: bool = True,
        tail: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(budget, ranks=ranks, keep=keep, **shared)
        if isinstance(tail, bool) or not isinstance(tail, int | float) or not (math.isfinite(tail) and 0 <= tail < 1):
            raise ValueError(f"tail must be in [0, 1), got {tail!r}")
        self.rectify = rectify
        self.tail = float(tail)

    @staticmethod
    def paper_schedule(data: Literal["cifar", "imagenet"] = "cifar") -> Updates:
        """When the paper projects: after every epoch (CIFAR), or every 250 steps (ImageNet)."""
        one_of("data", data, ("cifar", "imagenet"))
        if data == "cifar":
            return Updates(every=1, unit="epoch", end=1.0, least=1, closing=True)
        return Updates(every=250, unit="step", end=1.0, least=1, closing=True)

    @override
    def project(self, view: RankView, rank: int) -> tuple[Tensor, Tensor]:
        tail = 0.0 if view.closing else self.tail
        if view.gain is None or not self.rectify:
            return energy_transfer(view.matrix, rank, tail)
        return rectified_transfer(view.matrix, view.gain, rank, tail)
