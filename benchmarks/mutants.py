"""Plans, checkpoints and states that strangers may have written: one change, or a few, to what is sound."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

HUGE = 10**12
NESTED: Any = []
for _ in range(60):  # deep, and still to be copied when it stands in another
    NESTED = [NESTED]

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, HUGE, -HUGE, 2**63, 2**200),
    *(float("nan"), float("inf"), -0.5, 1.5, 1e300),
    *("", "x", "weight", "\0", "0", "9" * 5000),
    *([], [1], [-1], [HUGE, HUGE], [[]], [None], NESTED),
    *({}, {"0": 1}, {"x": {}}, {1: 2}, {None: None}, {"weight": [0]}),
)
TENSORS: tuple[Callable[[], Tensor], ...] = (
    lambda: torch.zeros(0),
    lambda: torch.zeros(0, dtype=torch.long),
    lambda: torch.tensor([-1]),
    lambda: torch.tensor([HUGE]),
    lambda: torch.tensor([1, 0]),
    lambda: torch.tensor([0, 0]),
    lambda: torch.tensor(3),
    lambda: torch.tensor([float("nan")]),
    lambda: torch.ones(3, 3, dtype=torch.bool),
    lambda: torch.ones(2, dtype=torch.complex64),
    lambda: torch.zeros(1, dtype=torch.long).expand(HUGE),
    lambda: torch.zeros(1, dtype=torch.uint8).expand(HUGE),
    lambda: torch.zeros(1).expand(10**6, 10**6),
    lambda: torch.zeros(HUGE, dtype=torch.long, device="meta"),
    lambda: torch.eye(3).to_sparse(),
)

Place = tuple[Any, Any]  # a dict or list, and a key or index of it


def mutants(sound: Any, count: int, seed: int = 0, tensors: bool = True) -> Iterator[tuple[Any, str]]:
    """Copies of a tree of dicts and lists with one to three changes each, and what was done to them.

    Args:
        sound: the tree.
        count: how many.
        seed: the same ones each time.
        tensors: whether tensors may stand in it, as in a checkpoint; else it is for JSON.
    """
    rng = random.Random(seed)
    for _ in range(count):
        tree = copy.deepcopy(sound)
        changes = [_change(tree, rng, tensors) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        yield tree, "; ".join(changes)


def torn(data: bytes, count: int, seed: int = 0) -> Iterator[tuple[bytes, str]]:
    """Copies of a file's bytes: cut off, with bytes or spans exchanged, doubled or left out."""
    rng = random.Random(seed)
    for _ in range(count):
        at, size = rng.randrange(len(data)), rng.choice((1, 2, 16, 200))
        how = rng.choice(("end", "bytes", "without", "twice", "zeros"))
        noise = rng.randbytes(size)
        new = {
            "end": data[:at],
            "bytes": data[:at] + noise + data[at + size :],
            "without": data[:at] + data[at + size :],
            "twice": data[: at + size] + data[at:],
            "zeros": data[:at] + bytes(size) + data[at + size :],
        }[how]
        yield new, f"{how} at byte {at}, {size}"


def _places(tree: Any) -> list[Place]:
    """All entries of all dicts and lists; what is common, such as shapes, not more often than what is rare."""
    found: list[Place] = []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree[:6]) if isinstance(tree, list) else ()
    for key, value in pairs:
        found.append((tree, key))
        found += _places(value)
    return found


def _change(tree: Any, rng: random.Random, tensors: bool) -> str:
    section = rng.choice(list(tree)) if rng.random() < 0.8 and isinstance(tree, dict) and tree else None
    places = [] if section is None else _places(tree[section])
    holder, key = rng.choice(places or _places(tree) or [([None], 0)])
    how = rng.choice(("junk", "junk", "near", "near", "drop", "rename", "swap", "tensor"))
    if how == "near":
        holder[key] = _near(holder[key], rng, tensors)
    elif how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        new = rng.choice((f"{key}x", str(key)[:-1], 3, "", None, "fc.weight", "weight", "forward", "training"))
        holder[new] = holder.pop(key)
    elif how == "swap":
        other, where = rng.choice(_places(tree))
        first, second = copy.deepcopy(holder[key]), copy.deepcopy(other[where])
        holder[key] = second
        if where in other if isinstance(other, dict) else where < len(other):
            other[where] = first
    elif how == "tensor" and tensors:
        holder[key] = rng.choice(TENSORS)()
    else:
        how, holder[key] = "junk", copy.deepcopy(rng.choice(JUNK))
    return f"{how} {section!r} .. {str(key)[:40]!r}"


def _near(value: Any, rng: random.Random, tensors: bool) -> Any:
    """Almost the same: what only a look at the values tells."""
    if isinstance(value, Tensor):
        return _near_tensor(value, rng) if tensors else value
    if isinstance(value, bool) or value is None:
        return rng.choice((1, None, "yes"))
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, -value, value + 0.5 if abs(value) < HUGE else 1.5, str(value)[:20], value * 10**9)
        )
    if isinstance(value, float):
        return rng.choice((-value, float("nan"), float("inf"), str(value), 1, value * 1e30))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "A", value[::-1], "\u00e9" + value[1:], value.encode()))
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value, value[::-1], [value], dict(enumerate(value)), tuple(value)))
    if isinstance(value, dict):
        return rng.choice((list(value.items()), {"": value}, {**value, "extra": 1}, list(value)))
    return [value]


def _near_tensor(value: Tensor, rng: random.Random) -> Any:
    if value.layout != torch.strided or value.is_meta or value.numel() > 10**6:  # changed before
        return None
    how = rng.randrange(9)
    if how == 0:
        return value.double() if value.dtype != torch.float64 else value.long()
    if how == 1:
        return value.flatten()[:-1].clone()
    if how == 2:
        return torch.cat([value.flatten(), value.flatten()])
    if how == 3:
        return value.flip(0) if value.ndim else value[None]
    if how == 4:
        return value.clone().fill_(-1 if value.is_signed() else 255)
    if how == 5:
        return value[None]
    if how == 6:
        return value.tolist()
    if how == 7:
        return value.int() if value.dtype != torch.int else value.short()
    return value.flatten()[:1].expand(HUGE) if value.numel() else value
