"""What a layer's outputs are made of: the term that each channel it reads adds, at some places of its output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

# Torch functions that are followed, and what their arguments are called.
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    **{f"conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
}


def channel_terms(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, places: Tensor) -> Tensor:
    """What each channel that a layer reads adds to some of its outputs, the bias aside.

    Only the windows under these outputs are gathered, so that the input is never unfolded.

    Args:
        name: of the torch function, one of `ARGUMENTS`.
        args, kwargs: what it was called with.
        out: what it returned.
        places: (m,) of the outputs, in ``out`` flattened.

    Returns:
        (m, I), at least float32, one column per index of the weight's input axis: a row's sum is output minus bias.
    """
    given = dict(zip(ARGUMENTS[name], args, strict=False)) | dict(kwargs)
    x: Tensor = given["input"]
    weight: Tensor = given["weight"]
    kind = torch.promote_types(x.dtype, torch.float32)
    if name == "linear":
        width = out.shape[-1]
        return x.reshape(-1, x.shape[-1])[places // width].to(kind) * weight[places % width].to(kind)
    if x.ndim < weight.ndim:  # one sample, without an axis of its own
        x, out = x[None], out[None]
    transposed, groups = name.startswith("conv_transpose"), given.get("groups", 1)
    sample, made, *at = torch.unravel_index(places, tuple(out.shape))
    per_group = x.shape[1] // groups
    first = made // (out.shape[1] // groups) * per_group
    channel = first[:, None] + torch.arange(per_group, device=x.device)  # (m, I / groups)
    kernel = weight[channel, made[:, None] % weight.shape[1]] if transposed else weight[made]
    index = [_along(sample, 0, kernel.ndim), _along(channel, 1, kernel.ndim)]
    inside = torch.ones([len(places)] + [1] * (kernel.ndim - 1), dtype=torch.bool, device=x.device)
    for axis, position in enumerate(at):
        read, is_inside = _window(axis, position, given, weight.shape[axis + 2], x.shape[axis + 2], transposed)
        index.append(_along(read, axis + 2, kernel.ndim))
        inside = inside & _along(is_inside, axis + 2, kernel.ndim)
    window = x[tuple(index)].to(kind) * inside  # (m, I / groups, *kernel)
    terms = (window * kernel.to(kind)).flatten(2).sum(dim=2)
    if transposed and groups > 1:  # its weight's input axis holds the channels of all groups
        return terms.new_zeros(len(places), x.shape[1]).scatter(1, channel, terms)
    return terms


def _window(
    axis: int, position: Tensor, given: Mapping[str, Any], kernel: int, size: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """(m, kernel) places along an axis of the input that outputs at a position read, and whether they are inside."""
    stride, dilation = (_entry(given.get(key, 1), axis) for key in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        padding = dilation * (kernel - 1) // 2 if padding == "same" else 0
    padding = _entry(padding, axis)
    tap = torch.arange(kernel, device=position.device)
    if transposed:
        at = position[:, None] + padding - tap * dilation
        inside = at % stride == 0
        at = at // stride
    else:
        at = position[:, None] * stride - padding + tap * dilation
        inside = torch.ones_like(at, dtype=torch.bool)
    return at.clamp(0, size - 1), inside & (at >= 0) & (at < size)


def _entry(value: Any, axis: int) -> int:
    """A setting of a convolution along an axis."""
    return int(value if isinstance(value, int) else value[axis % len(value)])


def _along(tensor: Tensor, axis: int, ndim: int) -> Tensor:
    """(m,) or (m, n) as one that broadcasts, n on an axis of its own."""
    return tensor.reshape([-1, *(tensor.shape[1] if d == axis else 1 for d in range(1, ndim))])


def random_places(shape: Sequence[int], batch: int, rows: int, seed: int, first: int) -> Tensor:
    """Random places of an output, for each sample as many, which its number and the seed alone decide.

    Args:
        shape: of the output; where its first axis is no multiple of the batch, places are drawn from all of it.
        batch: number of samples.
        rows: places for each.
        seed: of the draws.
        first: number of the batch's first sample.

    Returns:
        (batch * rows,) int64, in the output flattened.
    """
    total = math.prod(shape)
    each, step = (total // batch,) * 2 if shape[0] % batch == 0 else (total, 0)
    blocks = -(-rows // 4)  # the generator counts blocks of four numbers, so that it can begin at any sample
    raw = np.random.Philox(key=seed, counter=first * blocks).random_raw(4 * blocks * batch).reshape(batch, -1)
    drawn = torch.from_numpy((raw[:, :rows] % np.uint64(each)).astype(np.int64))
    return (drawn + step * torch.arange(batch)[:, None]).reshape(-1)
