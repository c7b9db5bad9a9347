"""Labels: which coordinate of which parameter each index of a traced tensor comes from.

A *coordinate* is one index of one dimension of one parameter or buffer, numbered through the whole model. A traced
tensor carries one `Dim` per dimension: a product of *factors*, outermost first, each a size and, where it is tracked,
an array of coordinate numbers. ``flatten`` of (C, H, W) so becomes ``((C, ids), (H*W, None))`` without repeating a
label H*W times. A position without a coordinate has the number -1. Dimensions of size 1 are never tracked: there is
nothing to remove from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]
Factor: TypeAlias = "tuple[int, Ids | None]"
Dim: TypeAlias = "tuple[Factor, ...]"


@dataclass(slots=True)
class Info:
    """What is known of one traced tensor.

    Attributes:
        dims: one `Dim` per dimension.
        source: number of the layer record whose output this tensor is, unchanged; None after any other operator.
        param: qualified name, when the tensor is a parameter, or a cast or transpose of one.
    """

    dims: list[Dim]
    source: int | None = None
    param: str | None = None


def untracked(size: int) -> Dim:
    """A dimension without labels."""
    return () if size == 1 else ((size, None),)


def tracked(ids: Ids) -> Dim:
    """A dimension that carries these coordinates; -1 marks positions without one."""
    if len(ids) == 1:
        return ()
    if (ids < 0).all():
        return ((len(ids), None),)
    return ((len(ids), ids),)


def size_of(dim: Dim) -> int:
    """Number of indices of a dimension."""
    size = 1
    for n, _ in dim:
        size *= n
    return size


def ids_of(dim: Dim) -> list[Ids]:
    """All label arrays of a dimension."""
    return [ids for _, ids in dim if ids is not None]


def is_tracked(dim: Dim) -> bool:
    """Whether any factor carries labels."""
    return any(ids is not None for _, ids in dim)


def full(dim: Dim) -> Ids | None:
    """The labels index by index, (size,), or None when two factors are tracked at once and no one label says it."""
    labels = ids_of(dim)
    if not labels:
        return np.full(size_of(dim), -1, dtype=np.int64)
    if len(labels) > 1:
        return None
    at = next(i for i, (_, ids) in enumerate(dim) if ids is not None)
    return np.tile(np.repeat(labels[0], size_of(dim[at + 1 :])), size_of(dim[:at]))


def merge(dims: Iterable[Dim]) -> Dim:
    """Dimensions flattened into one; neighbouring untracked factors become one."""
    out: list[Factor] = []
    for dim in dims:
        for n, ids in dim:
            if out and ids is None and out[-1][1] is None:
                out[-1] = (out[-1][0] * n, None)
            else:
                out.append((n, ids))
    return tuple(out)


class Unsplittable(Exception):
    """A view cuts a dimension in a way that no product of factors describes."""


Chooser: TypeAlias = "Callable[[Ids, list[tuple[int, int]]], int]"


def innermost(ids: Ids, parts: Sequence[tuple[int, int]]) -> int:
    """A `Chooser`: the last part keeps the labels, as the same index of every equal part."""
    return len(parts) - 1


def reshape(
    dims: Sequence[Dim], shape: Sequence[int], choose: Chooser = innermost
) -> tuple[list[Dim], list[tuple[Ids, int]]]:
    """Lay the factors of a tensor out anew.

    A tracked factor that is split into parts, (heads, width) say, keeps its labels on one of them: whole heads go, or
    the same index of every head, because whatever code made the split lays the rest out evenly again after a cut.

    Args:
        dims: dimensions of the tensor before the view.
        shape: its shape after the view.
        choose: which part keeps the labels, from the labels and, per part, the dimension after the view it lies in and
            its size.

    Returns:
        The dimensions after the view, and for every split the labels as a grid of its parts with the axis that keeps
        them.

    Raises:
        Unsplittable: if a factor does not divide evenly, or the factors do not align with the shape.
    """
    queue: list[Factor] = [factor for dim in dims for factor in dim][::-1]
    out: list[Dim] = []
    splits: list[tuple[Ids, int]] = []
    for at, size in enumerate(shape):
        taken: list[Factor] = []
        need = size
        while need > 1:
            if not queue:
                raise Unsplittable
            n, ids = queue.pop()
            if need % n == 0:
                taken.append((n, ids))
                need //= n
            elif ids is None and n % need == 0:
                queue.append((n // need, None))
                taken.append((need, None))
                need = 1
            elif ids is None and queue and queue[-1][1] is None:
                queue.append((n * queue.pop()[0], None))
            elif ids is None:
                raise Unsplittable
            else:
                parts = _parts(n, need, at, shape)
                grid = ids.reshape([p for _, p in parts])
                axis = choose(ids, parts)
                splits.append((grid, axis))
                kept = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0].copy()
                queue.extend((p, kept if i == axis else None) for i, (_, p) in reversed(list(enumerate(parts))))
        out.append(merge([tuple(taken)]))
    if any(n > 1 for n, _ in queue):
        raise Unsplittable
    return out, splits


def _parts(n: int, need: int, at: int, shape: Sequence[int]) -> list[tuple[int, int]]:
    """How a factor of size ``n`` falls on dimension ``at``, of which ``need`` is open, and on those after it."""
    parts: list[tuple[int, int]] = []
    while n > 1:
        if n % need == 0:
            parts.append((at, need))
            n //= need
        elif need % n == 0:
            parts.append((at, n))
            n = 1
        else:
            raise Unsplittable
        at += 1
        while n > 1 and at < len(shape) and shape[at] == 1:
            at += 1
        if n > 1:
            if at >= len(shape):
                raise Unsplittable
            need = shape[at]
    return parts
