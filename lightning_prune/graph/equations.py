"""Whether the sizes in a model's code follow a cut, as far as they were read from tensors or from its modules.

An *equation* says that a dimension, whose size after a cut its labels tell, has the size that an expression in the
model's code gives. An attribute that sizes dimensions is rewritten with the cut. Where an expression would come out
otherwise, the two dimensions are joined, if they are of one width, and else what breaks the equation is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.labels import Dim, Ids, full, ids_of, is_tracked, merge, size_of, untracked
from lightning_prune.graph.sizes import Attribute, Node, Read, describe, evaluate, leaves
from lightning_prune.graph.trace import Equation, Records


def held(records: Records) -> dict[Attribute, Dim]:
    """Attributes of modules that size a dimension -> that dimension, preferably one that can shrink."""
    out: dict[Attribute, Dim] = {}
    for equation in records.equations:
        form = equation.form
        if isinstance(form, Attribute) and (form not in out or not is_tracked(out[form])):
            out[form] = equation.dim
    for equation in records.equations:  # width // parts, say: the width is as many parts as before
        free = [leaf for leaf in leaves(equation.form) if isinstance(leaf, Attribute) and leaf not in out]
        if isinstance(equation.form, Node) and is_tracked(equation.dim):
            size = size_of(equation.dim)
            for attribute in [a for a in free if a.value % size == 0][:1]:
                out[attribute] = merge([equation.dim, untracked(attribute.value // size)])
    return out


class Sizes:
    """Sizes of dimensions when some channels of one group are gone.

    Args:
        holders: see `held`.
        component: (N,) of each coordinate.
        unit_group: group of each component, or -1.
        components: per group its components.
    """

    def __init__(
        self,
        holders: Mapping[Attribute, Dim],
        component: Ids,
        unit_group: NDArray[np.int64],
        components: Sequence[NDArray[np.int64]],
    ) -> None:
        self.holders = holders
        self._component = component
        self._unit_group = unit_group
        self._components = components
        self._rows: dict[int, dict[int, int]] = {}
        self._alive: list[Ids] = []

    def breaks(self, equation: Equation) -> list[int]:
        """Groups by which an equation ceases to hold, when one channel or half of them goes."""
        dims = [equation.dim]
        for leaf in leaves(equation.form):
            dims.append(leaf.dim if isinstance(leaf, Read) else self.holders.get(leaf, ()))
        groups = {g for dim in dims for ids in ids_of(dim) for g in self._row(ids)}
        return [g for g in sorted(groups) if not all(self._holds(equation, g, n) for n in self._fewer(g))]

    def _fewer(self, g: int) -> set[int]:
        return {1, len(self._components[g]) // 2}

    def _holds(self, equation: Equation, g: int, gone: int) -> bool:
        size, value = partial(self._size, g=g, gone=gone), partial(self._value, g=g, gone=gone)
        return bool(evaluate(equation.form, size, value) == size(equation.dim))

    def _row(self, ids: Ids) -> dict[int, int]:
        """Group -> how many of these labels are of each of its channels."""
        if id(ids) not in self._rows:
            self._alive.append(ids)
            groups, counts = np.unique(self._unit_group[self._component[ids[ids >= 0]]], return_counts=True)
            self._rows[id(ids)] = {
                int(g): int(n) // len(self._components[g]) for g, n in zip(groups, counts, strict=True) if g >= 0
            }
        return self._rows[id(ids)]

    def _size(self, dim: Dim, g: int, gone: int) -> int:
        total = 1
        for n, ids in dim:
            total *= n if ids is None else n - self._row(ids).get(g, 0) * gone
        return total

    def _value(self, attribute: Attribute, g: int, gone: int) -> int:
        dim = self.holders.get(attribute)
        return attribute.value if dim is None else self._size(dim, g, gone)


def joined(records: Records, sizes: Sizes) -> list[tuple[Ids, Ids]]:
    """Edges between dimensions that the model's code takes for equally wide and that are not the same channels.

    Where ``x.reshape(B, C, -1)`` lays out the result of one layer by the width of another, index i of the one goes with
    index i of the other.
    """
    holders = sizes.holders
    edges: list[tuple[Ids, Ids]] = []
    for equation in records.equations:
        form = equation.form
        other = form.dim if isinstance(form, Read) else holders.get(form) if isinstance(form, Attribute) else None
        if other is None or not is_tracked(equation.dim) or not is_tracked(other) or not sizes.breaks(equation):
            continue
        left, right = full(equation.dim), full(other)
        if left is not None and right is not None and len(left) == len(right) and min(left.min(), right.min()) >= 0:
            edges.append((left, right))
    return edges


def broken(records: Records, sizes: Sizes) -> dict[int, str]:
    """Groups that would break an equation -> the reason they are frozen for."""
    out: dict[int, str] = {}
    for equation in records.equations:
        for g in sizes.breaks(equation):
            out.setdefault(g, f"{describe(equation.form)} has to stay as wide as it is{equation.where}")
    return out


def inexact(records: Records, holders: Mapping[Attribute, Dim]) -> list[tuple[Ids, str]]:
    """What a model computes with a size of its channels changes with their number."""
    out = []
    for form, why in records.scalars:
        for leaf in leaves(form):
            dim = leaf.dim if isinstance(leaf, Read) else holders.get(leaf, ())
            out += [(ids[ids >= 0], why) for ids in ids_of(dim)]
    return out
