"""Histograms of scores that are small enough to stay in a checkpoint: what was kept and what went, in a few bins."""

from types import GenericAlias
from typing import Any

from torch import Tensor

from lightning_prune.state import Fields

BINS = 24
HISTOGRAM: Fields = {"low": float, "high": float, "kept": list[int], "gone": list[int]}
"""What one holds: the range of the scores, and how many units of each bin stayed and went."""
BY_NAME: Any = GenericAlias(dict, (str, HISTOGRAM))


def histogram(scores: Tensor, kept: Tensor) -> dict[str, Any]:
    """Count scores in `BINS` bins of equal width, apart for units that stay and units that go.

    Args:
        scores: of any shape; what is not finite is left out.
        kept: bool, of the same shape, True = keep.

    Returns:
        ``low`` and ``high``, the smallest and largest score; ``kept`` and ``gone``, a count for each bin from low to
        high. Empty if no score is finite. If all are equal they stand in the first bin.

    Example:
        >>> import torch
        >>> found = histogram(torch.tensor([0.0, 1.0, 3.0, 24.0]), torch.tensor([False, True, True, True]))
        >>> found["low"], found["high"], found["gone"][:4], found["kept"][:4], found["kept"][-1]
        (0.0, 24.0, [1, 0, 0, 0], [0, 1, 0, 1], 1)
    """
    finite = scores.isfinite()
    values, stays = scores[finite].detach().double().cpu(), kept.to(scores.device)[finite].cpu()
    if not values.numel():
        return {}
    low, high = float(values.min()), float(values.max())
    width = (high / BINS - low / BINS) or 1.0  # the difference itself may be too large for a float
    bins = values.sub_(low).div_(width).long().clamp_(0, BINS - 1).add_(BINS * stays)
    gone, left = bins.bincount(minlength=2 * BINS).view(2, BINS).tolist()
    return {"low": low, "high": high, "kept": left, "gone": gone}
