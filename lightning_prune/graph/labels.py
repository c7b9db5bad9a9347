"""Labels: which coordinate of which parameter each index of a traced tensor comes from.

A *coordinate* is one index of one dimension of one parameter or buffer, numbered through the whole model. A traced
tensor carries one `Dim` per dimension: a product of *factors*, outermost first, each a size and, where it is tracked,
an array of coordinate numbers. ``flatten`` of (C, H, W) so becomes ``((C, ids), (H*W, None))`` without repeating a
label H*W times. A position without a coordinate has the number -1. Dimensions of size 1 are never tracked: there is
nothing to remove from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def reshape(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[list[Dim], list[tuple[int, Ids]]]:
    """Lay the factors of a tensor out anew.

    A tracked factor that is split into equal parts keeps its labels on the inner part: the same index of every part
    is one channel from then on, because whatever code made the split divides the size evenly again after a cut.

    Args:
        dims: dimensions of the tensor before the view.
        shape: its shape after the view.

    Returns:
        The dimensions after the view, and for every split the number of parts with the labels that were split.

    Raises:
        Unsplittable: if a factor does not divide evenly, or the factors do not align with the shape.
    """
    queue: list[Factor] = [factor for dim in dims for factor in dim][::-1]
    out: list[Dim] = []
    splits: list[tuple[int, Ids]] = []
    for size in shape:
        taken: list[Factor] = []
        need = size
        while need > 1:
            if not queue:
                raise Unsplittable
            n, ids = queue.pop()
            if need % n == 0:
                taken.append((n, ids))
                need //= n
            elif n % need == 0:
                inner = n // need
                if ids is None:
                    queue.append((inner, None))
                else:
                    splits.append((need, ids))
                    queue.append((inner, ids[:inner]))
                taken.append((need, None))
                need = 1
            elif ids is None and queue and queue[-1][1] is None:
                queue.append((n * queue.pop()[0], None))
            else:
                raise Unsplittable
        out.append(merge([tuple(taken)]))
    if any(n > 1 for n, _ in queue):
        raise Unsplittable
    return out, splits
