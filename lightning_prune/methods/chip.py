"""CHIP: drop the channels whose maps are nearly spanned by the others of their layer.

Sui, Yin, Xie, Phan, Zonouz and Yuan, 2021. Differs from the paper: one common fraction of channels is solved for the
budget (or ``keep=`` per group, as the paper's lists); all layers see the same samples, and maps are not rounded to four
decimals; a residual stream has one score, so that all of its layers lose the same channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.batches import samples_in
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.flow import Tap
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper
from lightning_prune.schedule import OneShot
from lightning_prune.statistics import SampleSums
from lightning_prune.taps import Seen, looks_at, tensor_of, watching

# The integral is a trapezoid sum over log t: its error falls as exp(-pi^2 / step), here 1e-10. Beyond its ends, at 1e-8
# and 1e3 of the largest singular value, the terms are geometric series.
_STEP = 0.4
_LOWEST, _HIGHEST = 1e-8, 1e3
_ON_CPU, _ELSEWHERE = 2**18, 2**26  # entries worked on at a time: on the CPU they stay in its cache


def channel_independence(maps: Tensor) -> Tensor:
    """By how much the nuclear norm of each sample's maps falls when one channel is set to zero (eq. 4).

    With G the Gram matrix of the rows of a sample's map A, and s(G) the sum of the roots of its eigenvalues,

        CI_i = s(G) - s(G without i) = 1/pi int_0^inf t w_i'(t) / w_i(t) dt,   w_i(t) = t^2 [(G + t^2)^-1]_ii,

    since det(G without i + t^2) = det(G + t^2) [(G + t^2)^-1]_ii and int log(1 + x / t^2) dt = pi sqrt(x). So one
    eigendecomposition of the smaller Gram matrix serves all channels of a sample.

    Args:
        maps: (B, C, P), P positions of C channels; any floating dtype.

    Returns:
        (B, C) float64, from 0 to the norm of the channel's row. Of what a direct computation gives it differs by 1e-9
        of it, and by 1e-8 of the largest singular value. NaN for a sample whose maps are not finite.

    Example:
        >>> channel_independence(torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]]]))
        tensor([[3.0000, 2.0000],
                [0.4142, 0.4142]], dtype=torch.float64)
    """
    width = max(maps.shape[2], round(math.log(_HIGHEST / _LOWEST) / _STEP))
    at_once = max(1, (_ON_CPU if maps.is_cpu else _ELSEWHERE) // (maps.shape[1] * width))
    return torch.cat([_independence(part.double()) for part in torch.split(maps, at_once)])


def _independence(maps: Tensor) -> Tensor:
    """`channel_independence` of a few samples, in float64."""
    wide = maps.shape[1] <= maps.shape[2]
    gram = maps @ maps.mT if wide else maps.mT @ maps  # (B, K, K)
    finite = torch.isfinite(gram).all(dim=2).all(dim=1)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], gram, 0.0))
    top = eigenvalues[:, -1:].clamp_min(torch.finfo(maps.dtype).tiny)
    rounding = torch.finfo(maps.dtype).eps * max(maps.shape[1:])
    squares = torch.where(eigenvalues > rounding * top, eigenvalues / top, 0.0)  # of singular values, the largest is 1
    if wide:
        shares = vectors.square()  # (B, C, K) of each channel in each left singular vector
    else:
        inverse = torch.where(squares > 0, 1 / (squares * top), 0.0)
        shares = (maps @ vectors).square() * inverse[:, None]
    nodes = torch.arange(math.log(_LOWEST), math.log(_HIGHEST), _STEP, dtype=maps.dtype, device=maps.device).exp()
    weights = nodes * (2 * _STEP / math.pi)
    weights[[0, -1]] /= 1 - math.exp(-_STEP)  # the geometric series beyond
    kernel = nodes.square() / (squares[:, :, None] + nodes.square())  # (B, K, N)
    values = shares @ kernel  # (B, C, N): w
    slopes = shares @ (kernel * (1 - kernel))  # t w' / 2
    if not wide:  # left singular vectors of singular value 0 have the rest of each channel
        values += (1 - shares.sum(dim=2, keepdim=True)).clamp_min(0)
    independence = (slopes / values) @ weights * top.sqrt()
    return torch.where(finite[:, None], independence, torch.nan)


class CHIP(ChannelPruner):
    """Cut the channels whose maps the other channels of their layer nearly span, from maps of some training samples.

    Args:
        budget: see `ChannelPruner`.
        samples: looked at by each event (640 in the paper), in eval mode, without gradients; labels do not count.
        **shared: see `ChannelPruner`; the scope is "uniform" by default, as nuclear norms of different layers do not
            compare, and ``keep=`` gives groups fractions of their own.
    """

    paper = Paper("Sui et al.", 2021, "https://arxiv.org/abs/2110.13981")
    needs = "calibration data"
    default_schedule = OneShot(0.5)
    default_scope = "uniform"
    looks_at = "maps"

    def __init__(self, budget: Budget | float, *, samples: int = 640, **shared: Any) -> None:
        super().__init__(budget, **shared)
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples must be an int of at least 1, got {samples!r}")
        self.samples = samples

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        taps = {name: self.graph.maps(group[0].group) for name, group in views.items()}
        device = next(iter(self.model.parameters())).device
        sums = SampleSums({name: (group[0].group.size,) for name, group in views.items()}, device)
        found: dict[str, Tensor] = {}

        def look(name: str, tap: Tap, seen: Seen) -> None:
            together = tap.indices.shape[1]  # maps that go with one choice (grouped convolution): a row for each
            maps = torch.unflatten(tap.maps(tensor_of(tap, seen.out), seen.batch), 2, (-1, together))
            independence = channel_independence(maps.movedim(3, 2).flatten(1, 2)).sum(dim=0)
            independence = torch.unflatten(independence, 0, (-1, together)).mean(dim=1)
            found[name] = found.get(name, 0) + independence / len(taps[name])  # of a stream: the mean over its tensors

        with self.evaluating(), watching(self.model, looks_at(taps, look)):
            for batch in self.calibrate(self.samples):
                self.loss(batch)
                sums.add(found, samples_in(batch))
                found.clear()
        return sums.means(self.total)
