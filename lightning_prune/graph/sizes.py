"""Integers that remember where they were read from, so that a size in a model's code is told from a mere number.

``x.view(B, 512, -1)`` and ``x.view(B, x.size(1), -1)`` call the same operator. While a model is traced, the sizes read
from its tensors and the integers its modules hold are `Size`: integers that carry a *form*, which says how they would
come out after a cut. Arithmetic on them gives more of them; what loses the form (``int(n)``, NumPy) is a number again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from lightning_prune.graph.labels import Dim, merge, untracked


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer that a module holds.

    Attributes:
        module: path of the module.
        name: of the attribute.
        position: which entry, where the attribute is a tuple or a list; else None.
        value: when traced.
    """

    module: str
    name: str
    position: int | None
    value: int

    def __str__(self) -> str:
        entry = "" if self.position is None else f"[{self.position}]"
        return f"{self.module or 'the model'}.{self.name}{entry}"


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """The size of a dimension of a traced tensor."""

    dim: Dim


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Arithmetic on two forms, or on a form and a number."""

    symbol: str
    left: Form | float
    right: Form | float


Form: TypeAlias = "Attribute | Read | Node"

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "/": operator.truediv,
    "**": operator.pow,
}


def leaves(form: Form | float) -> Iterator[Attribute | Read]:
    """What a form is made of."""
    if isinstance(form, Node):
        yield from leaves(form.left)
        yield from leaves(form.right)
    elif isinstance(form, (Attribute, Read)):
        yield form


def evaluate(form: Form | float, size: Callable[[Dim], int], held: Callable[[Attribute], int]) -> Any:
    """The value of a form.

    Args:
        form: or a number, which is its own value.
        size: of a dimension.
        held: value of a module's attribute.
    """
    if isinstance(form, Node):
        return _OPERATIONS[form.symbol](evaluate(form.left, size, held), evaluate(form.right, size, held))
    if isinstance(form, Read):
        return size(form.dim)
    if isinstance(form, Attribute):
        return held(form)
    return form


def describe(form: Form | float) -> str:
    """A form as a reader of the model's code would write it."""
    if isinstance(form, Node):
        return f"{describe(form.left)} {form.symbol} {describe(form.right)}"
    if isinstance(form, Read):
        return "a size read from a tensor"
    return str(form)


def _form(value: Any, trace: object) -> Form | float | None:
    """The form of an operand; None if it is of another trace, or no number."""
    if isinstance(value, (Size, Ratio)):
        return value.form if value.trace is trace else None
    if type(value) in (int, float, bool):
        return float(value) if isinstance(value, float) else int(value)
    return None


def _simple(symbol: str, left: Form | float, right: Form | float) -> Form:
    """A product of dimensions is a dimension; all else is a node."""
    if symbol == "*":
        dims = [f.dim if isinstance(f, Read) else untracked(f) for f in (left, right) if isinstance(f, (Read, int))]
        if len(dims) == 2 and all(not isinstance(f, int) or f > 0 for f in (left, right)):
            return Read(merge(dims))
    return Node(symbol, left, right)


def _result(symbol: str, left: Any, right: Any, trace: object) -> Any:
    """The result of an operation, with its form if both operands have one."""
    plain_left = _bare(left)
    plain_right = _bare(right)
    if plain_left is None or plain_right is None:
        return NotImplemented
    value = _OPERATIONS[symbol](plain_left, plain_right)
    a, b = _form(left, trace), _form(right, trace)
    if a is None or b is None:
        return value
    if type(value) is int:
        return Size(value, _simple(symbol, a, b), trace)
    return Ratio(value, Node(symbol, a, b), trace) if type(value) is float else value


def _bare(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else None


class _Arithmetic:
    """The operators of both kinds of numbers."""

    trace: object

    def __add__(self, other: Any) -> Any:
        return _result("+", self, other, self.trace)

    def __radd__(self, other: Any) -> Any:
        return _result("+", other, self, self.trace)

    def __sub__(self, other: Any) -> Any:
        return _result("-", self, other, self.trace)

    def __rsub__(self, other: Any) -> Any:
        return _result("-", other, self, self.trace)

    def __mul__(self, other: Any) -> Any:
        return _result("*", self, other, self.trace)

    def __rmul__(self, other: Any) -> Any:
        return _result("*", other, self, self.trace)

    def __floordiv__(self, other: Any) -> Any:
        return _result("//", self, other, self.trace)

    def __rfloordiv__(self, other: Any) -> Any:
        return _result("//", other, self, self.trace)

    def __mod__(self, other: Any) -> Any:
        return _result("%", self, other, self.trace)

    def __rmod__(self, other: Any) -> Any:
        return _result("%", other, self, self.trace)

    def __neg__(self) -> Any:
        return _result("-", 0, self, self.trace)

    def __truediv__(self, other: Any) -> Any:
        return _result("/", self, other, self.trace)

    def __rtruediv__(self, other: Any) -> Any:
        return _result("/", other, self, self.trace)

    def __pow__(self, other: Any) -> Any:
        return _result("**", self, other, self.trace)


class Size(_Arithmetic, int):  # type: ignore[misc]
    """An integer with a form. It copies, pickles and compares as the plain integer it is."""

    form: Form

    def __new__(cls, value: int, form: Form, trace: object) -> Size:
        """A plain integer with where it comes from, and which trace it is of."""
        self = int.__new__(cls, value)
        self.form = form
        self.trace = trace
        return self

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        self._compared(other)
        return int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        self._compared(other)
        return int.__ne__(self, other)

    def _compared(self, other: object) -> None:
        """Code that compares a size with an attribute wants them equal after a cut, too."""
        if isinstance(other, Size) and self.trace is other.trace and int(self) == int(other):
            for read, held in ((self.form, other.form), (other.form, self.form)):
                if isinstance(read, Read) and isinstance(held, Attribute) and hasattr(self.trace, "equate"):
                    self.trace.equate(read.dim, held)

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


class Ratio(_Arithmetic, float):  # type: ignore[misc]
    """A float with a form, such as a softmax scale derived from a width."""

    form: Form

    def __new__(cls, value: float, form: Form, trace: object) -> Ratio:
        """A plain float with where it comes from, and which trace it is of."""
        self = float.__new__(cls, value)
        self.form = form
        self.trace = trace
        return self

    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return float.__eq__(self, other)

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)


def plain(value: Any) -> Any:
    """A value with plain numbers in place of those that remember, inside of lists, tuples and dicts as well."""
    if isinstance(value, Size):
        return int(value)
    if isinstance(value, Ratio):
        return float(value)
    if type(value) in (list, tuple, torch.Size):
        new = [plain(v) for v in value]
        return value if all(a is b for a, b in zip(new, value, strict=True)) else type(value)(new)
    if type(value) is dict:
        changed = {k: p for k, v in value.items() if (p := plain(v)) is not v}
        return {**value, **changed} if changed else value
    return value


def form_of(value: Any, trace: object) -> Form | None:
    """The form of a number, if it has one and it is of this trace."""
    return value.form if isinstance(value, (Size, Ratio)) and value.trace is trace else None
