"""What a checkpoint says is a stranger's word until each of its types is known: a few types, and a look at a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
from torch import Tensor

from lightning_prune.errors import IncompatibleCheckpoint

Fields = Mapping[str, Any]
"""Key -> what stands there: ``int``, ``float``, ``bool``, ``str``, ``Tensor``, ``None``, ``Any``, a union of these,
``list[X]``, ``dict[str, X]``, ``tuple[X, Y]`` for a list of just so many, again fields, or a tuple of alternatives. A
key that ends in ``?`` may be missing."""

_LARGEST = 2**63


def check_fields(where: str, state: object, fields: Fields) -> None:
    """Refuse a state that is not of these fields; what else stands in it is left alone.

    Args:
        where: whose state it is, for the error.
        state: as it was read.
        fields: what has to be in it.

    Raises:
        IncompatibleCheckpoint: naming the first entry that is missing or of another type.
    """
    if (wrong := _wrong("", state, fields)) is not None:
        raise IncompatibleCheckpoint(f"{where} is not in the checkpoint as it was written: {wrong}")


@contextmanager
def reading(where: str) -> Iterator[None]:
    """For the time of a look at values: say of a bad one whose it is.

    Raises:
        IncompatibleCheckpoint: instead of a ``ValueError``.
    """
    try:
        yield
    except (ValueError, IncompatibleCheckpoint) as error:
        raise IncompatibleCheckpoint(f"{where} is not in the checkpoint as it was written: {error}") from error


def _wrong(place: str, value: object, kind: Any) -> str | None:
    """What is wrong with a value; None if it is of its kind."""
    origin: Any = get_origin(kind)
    arguments = get_args(kind)
    if kind is Any:
        return None
    if isinstance(kind, Mapping):
        return _wrong_fields(place, value, kind)
    if isinstance(kind, tuple) or origin in (Union, UnionType):
        found = [_wrong(place, value, each) for each in (arguments or kind)]
        told = [each for each in found if each is not None]
        return None if len(told) < len(found) else max(told, key=len)  # the one that looked deepest
    if origin is dict:
        if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
            return f"{place} must be a mapping from names, got {_said(value)}"
        return _first(_wrong(f"{place}[{key!r:.60}]", item, arguments[1]) for key, item in value.items())
    if origin in (list, tuple):
        if not isinstance(value, list | tuple) or (origin is tuple and len(value) != len(arguments)):
            size = f"{len(arguments)} entries" if origin is tuple else "any length"
            return f"{place} must be a list of {size}, got {_said(value)}"
        kinds = arguments if origin is tuple else arguments * len(value)
        each = zip(range(len(value)), value, kinds, strict=True)
        return _first(_wrong(f"{place}[{number}]", item, its) for number, item, its in each)
    return None if _is_a(value, kind) else f"{place} must be {_NAMES.get(kind or NoneType, kind)}, got {_said(value)}"


def _wrong_fields(place: str, value: object, fields: Fields) -> str | None:
    if not isinstance(value, Mapping):
        return f"{place or 'it'} must be a mapping, got {_said(value)}"
    missing = (key for key in fields if key not in value and not key.endswith("?"))
    if (key := next(missing, None)) is not None:
        return f"{_place(place, key)} is missing"
    present = {key.removesuffix("?"): kind for key, kind in fields.items() if key.removesuffix("?") in value}
    return _first(_wrong(_place(place, key), value[key], kind) for key, kind in present.items())


def _place(outer: str, key: str) -> str:
    return f"{outer}[{key!r:.60}]" if outer else repr(key)


def _first(found: Iterator[str | None]) -> str | None:
    return next((each for each in found if each is not None), None)


def _is_a(value: object, kind: Any) -> bool:
    if kind in (None, NoneType):
        return value is None
    if kind is Tensor:
        return isinstance(value, Tensor) and _is_there(value)
    if kind is float:
        return type(value) in (int, float) and (isinstance(value, float) or _is_a(value, int))
    if kind is int:
        return type(value) is int and -_LARGEST <= value < _LARGEST
    return type(value) is kind


def _is_there(tensor: Tensor) -> bool:
    """Whether each entry lies in memory; one that repeats itself by strides may claim any size."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _said(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "meta" if value.is_meta else str(value.layout).rpartition(".")[2]
        return f"a {layout} tensor of {value.dtype} and shape {tuple(value.shape)}"
    return repr(value)[:40] if isinstance(value, int | float | str | None) else type(value).__name__


_NAMES: dict[Any, str] = {
    int: "an int of 64 bits",
    float: "a number",
    bool: "a bool",
    str: "a text",
    Tensor: "a dense tensor in memory",
    NoneType: "None",
}
