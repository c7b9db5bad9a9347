"""Run a cut network beside the notes of the zeroed one, so that only errors make a difference between them.

The zeroed network runs as it is (`Record`), while notes are taken of what a cut may change with good reason, or would
change by the smallest rounding. The cut network then follows these notes, module call by module call (`Replay`):

- A statistic that had more entries to run over (the mean of a norm, a softmax) is computed as if zeros were there.
- A choice (a comparison, a top-k, a non-maximum suppression, a value read into Python) is made as it was made before.
  What it was made from is kept to be compared, as a *witness*.
- A number that differs (a scale the code derives from a width) is the one of before, and is said in `Replay.inexact`.

Where the operators of a module get out of step with the notes, the rest of its call runs as it stands.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.trace import around_modules

_WITNESSED = 2**16  # entries looked at of what a choice was made from

_Place = tuple[str, int]  # module, and how often it was called before


@dataclass(slots=True)
class _Note:
    """What one call of an operator was.

    Attributes:
        name: of the operator.
        shapes: of the tensors it got.
        numbers: what it got as Python numbers, by position or name.
        choice: what it returned, if it is a choice.
        witnesses: what the choice was made from.
    """

    name: str
    shapes: list[tuple[int, ...]]
    numbers: dict[int | str, float]
    choice: list[Any] | None = None
    witnesses: list[Tensor] = field(default_factory=list)


@dataclass
class Notes:
    """What was noted of a run.

    Attributes:
        calls: calls of operators, by place.
        lengths: of the outputs of layers, by place.
        reads: path of a module with layers -> whether any of them got anything but zeros.
    """

    calls: dict[_Place, list[_Note]] = field(default_factory=lambda: defaultdict(list))
    lengths: dict[_Place, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    reads: dict[str, bool] = field(default_factory=dict)

    @property
    def is_dead(self) -> bool:
        """Whether the layers of some module get nothing but zeros (a recurrent layer's start state alone does not)."""
        return not all(self.reads.values())

    def layer(self, place: _Place, x: Tensor, out: Tensor) -> None:
        """Note a layer. Zeros do not count in a length, so it is that of the cut layer."""
        corner = x
        while corner.ndim > 2:
            corner = corner[..., 0]
        some = corner[:1]  # they usually say it, at less cost
        self.reads[place[0]] = self.reads.get(place[0], False) or bool(some.any()) or bool(x.any())
        self.lengths[place].append(torch.linalg.vector_norm(out.float() if out.dtype.itemsize < 4 else out))


class Aligned(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator call of a model, and where in the model it is made."""

    def __init__(self, model: nn.Module, notes: Notes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes = notes
        self._paths = {module: name for name, module in model.named_modules()}
        self._called: Counter[str] = Counter()
        self._places: list[_Place] = [("", -1)]

    @property
    def place(self) -> _Place:
        """Path of the innermost module that runs, and how often it was called before."""
        return self._places[-1]

    @contextmanager
    def places(self) -> Iterator[None]:
        """Know which module runs: global hooks for the time of the run, so that no module is touched."""

        def enter(module: nn.Module, _: Any) -> None:
            path = self._paths.get(module)
            self._places.append(self.place if path is None else (path, self._called[path]))
            if path is not None:
                self._called[path] += 1

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if len(self._places) > 1:
                self._places.pop()

        with around_modules(enter, leave):
            yield


class Record(Aligned):  # type: ignore[no-untyped-call]
    """Takes notes of a run that it leaves alone.

    But for norms across channels: what reaches one at a removed channel is taken for zero, though code between may
    have made something of the zero (a bias across positions, say), as the cut network's norm never sees it.

    Args:
        model: what runs.
        notes: where notes go.
        gone: id of a norm's weight or bias -> indices of the channels that go.
    """

    def __init__(self, model: nn.Module, notes: Notes, gone: Mapping[int, Tensor] | None = None) -> None:
        super().__init__(model, notes)
        self._gone = gone or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = _operator(func)
        if operator.name in _NORMS and len(args) > 2:
            args = self._without_gone(operator.name, args)
        numbers = operator.numbers(args, kwargs)
        out = func(*args, **kwargs)
        chooses = operator.chooses(args, out)
        if numbers or operator.over is not None or chooses:
            note = _Note(operator.name, _shapes(args), numbers)
            if chooses:
                note.choice = [_kept(leaf) for leaf in _leaves(out)]
                note.witnesses = _witnesses(args)
            self.notes.calls[self.place].append(note)
        if operator.is_layer:
            self.notes.layer(self.place, operator.read(args), out)
        return out

    def _without_gone(self, name: str, args: Any) -> Any:
        x, *rest = args
        affine, dim = (rest[:2], 1) if name == "native_group_norm" else (rest[1:3], -1)
        for tensor in affine:
            gone = self._gone.get(id(tensor))
            if gone is not None and tensor.ndim == 1 and x.shape[dim] == len(tensor):
                return x.index_fill(dim, gone.to(x.device), 0.0), *rest
        return args


_NORMS = frozenset(["native_layer_norm", "_fused_rms_norm", "rms_norm", "native_group_norm"])


class Replay(Aligned):  # type: ignore[no-untyped-call]
    """Makes a run follow the notes of another one."""

    def __init__(self, model: nn.Module, seen: Notes) -> None:
        super().__init__(model, Notes())
        self.inexact: list[str] = []
        self.witnesses: list[tuple[Tensor, Tensor, str]] = []
        self._left = {place: iter(notes) for place, notes in seen.calls.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = _operator(func)
        numbers = operator.numbers(args, kwargs)
        noted = bool(numbers) or operator.over is not None
        note = self._next(operator.name) if noted else None
        if note is not None and note.numbers.keys() == numbers.keys():
            args, kwargs = self._as_before(note, numbers, args, kwargs)
        out = func(*args, **kwargs)  # also where it is replaced: its checks belong to the proof
        if note is not None and operator.over is not None and args[0].ndim == len(note.shapes[0]):
            replaced = operator.over(func, args, kwargs, note.shapes)
            out = out if replaced is None else replaced
        if operator.chooses(args, out):
            note = note if noted else self._next(operator.name)
            if note is not None:
                out = self._chosen(note, args, out)
        if operator.is_layer:
            self.notes.layer(self.place, operator.read(args), out)
        return out

    def _next(self, name: str) -> _Note | None:
        note = next(self._left.get(self.place, iter(())), None)
        if note is None or note.name != name:
            self._left.pop(self.place, None)  # out of step: what is left of this call runs as it stands
            return None
        return note

    def _as_before(self, note: _Note, numbers: dict[int | str, float], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with the numbers of the note; those that differ by more than rounding are said."""
        args, kwargs = list(args), dict(kwargs)
        for key, now in numbers.items():
            before = note.numbers[key]
            if before == now or (math.isnan(before) and math.isnan(now)):
                continue
            if not math.isclose(before, now, rel_tol=1e-5):
                where = self.place[0] or "the model"
                self.inexact.append(f"'{note.name}' computes with {now:g}, and with {before:g} before (in {where})")
            if isinstance(key, str):
                kwargs[key] = before
            else:
                args[key] = torch.full_like(args[key], before) if isinstance(args[key], Tensor) else before
        return tuple(args), kwargs

    def _chosen(self, note: _Note, args: Any, out: Any) -> Any:
        leaves = _leaves(out)
        if note.choice is None or len(note.choice) != len(leaves) or note.shapes != _shapes(args):
            return out
        if any(isinstance(a, torch.Size) and a != b.shape for a, b in zip(note.choice, leaves, strict=True)):
            return out
        what = f"'{note.name}' in {self.place[0] or 'the model'}"
        self.witnesses += [(a, b, what) for a, b in zip(note.witnesses, _witnesses(args), strict=True)]
        chosen = [_choose(a, b) for a, b in zip(note.choice, leaves, strict=True)]
        return type(out)(chosen) if isinstance(out, tuple | list) else chosen[0]


def _leaves(out: Any) -> list[Any]:
    return list(out) if isinstance(out, tuple | list) else [out]


def _shapes(args: Any) -> list[tuple[int, ...]]:
    return [tuple(a.shape) for a in args if isinstance(a, Tensor)]


def _kept(leaf: Any) -> Any:
    """What is kept of a choice: indices and flags as a copy, of values (which stay the cut network's own) the shape."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape if leaf.is_floating_point() else leaf.clone()


def _choose(before: Any, now: Any) -> Any:
    if isinstance(before, torch.Size):
        return now
    if isinstance(now, Tensor) and isinstance(before, Tensor) and now.shape == before.shape:
        return now.copy_(before)  # also right for an operator in place
    return before


def _witnesses(args: Any) -> list[Tensor]:
    """Evenly spaced entries of the floating inputs, copied."""
    out = []
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            out.append(tensor.reshape(-1)[:: max(1, tensor.numel() // _WITNESSED)].clone())
    return out


_Over = Callable[[Any, Any, Any, list[tuple[int, ...]]], Any]


@dataclass(frozen=True)
class _Operator:
    """What the proof has to know of an operator.

    Attributes:
        name: without namespace and overload.
        over: computes it as if zeros were there, if it runs over dimensions: (operator, its arguments, its keyword
            arguments, shapes of the tensors it got before) -> result, or None if nothing is missing.
        pointwise: whether it treats every entry by itself.
        may_choose: whether integers and flags that it makes of floating values are of interest.
        is_layer: whether it multiplies with a weight.
    """

    name: str
    over: _Over | None
    pointwise: bool
    may_choose: bool
    is_layer: bool

    def numbers(self, args: Any, kwargs: Any) -> dict[int | str, float]:
        """The Python numbers among the arguments that may come from a size: in index arithmetic none do."""
        found: dict[int | str, float] = {}
        ints = self.pointwise and any(isinstance(a, Tensor) and a.is_floating_point() for a in args)
        for key, value in (*enumerate(args), *kwargs.items()):
            if type(value) is float or (ints and type(value) is int):
                found[key] = value
        if self.name.startswith("_scaled_dot_product") and kwargs.get("scale") is None:
            found["scale"] = args[0].shape[-1] ** -0.5
        elif self.name in ("lift_fresh", "lift_fresh_copy") and args[0].ndim == 0 and args[0].is_floating_point():
            found[0] = float(args[0])  # torch.tensor(0.125)
        return found

    def chooses(self, args: Any, out: Any) -> bool:
        """Whether integers, flags or Python numbers were made of floating values."""
        if not self.may_choose or all(isinstance(x, Tensor) and x.is_floating_point() for x in _leaves(out)):
            return False
        made = any((isinstance(x, Tensor) and not x.dtype.is_floating_point) or isinstance(x, int | float)
                   for x in _leaves(out))  # fmt: skip
        return made and any(isinstance(a, Tensor) and a.is_floating_point() for a in args)

    def read(self, args: Any) -> Tensor:
        """What a layer reads."""
        x: Tensor = args[1] if self.name == "addmm" else args[0]
        return x


# They make integers of floating values without a choice that the model goes on with, or are told from shapes alone.
_NO_CHOICE = ("_scaled_dot_product", "cudnn", "_cudnn", "miopen", "mkldnn", "native_batch_norm", "_batch_norm",
              "_native_batch_norm", "max_pool", "adaptive_max_pool", "fractional_max_pool", "native_dropout", "empty",
              "new_", "sym_", "is_same_size", "is_pinned", "_has_same_storage_numel")  # fmt: skip


@cache
def _operator(func: Any) -> _Operator:
    name = func._schema.name.rpartition("::")[2]
    pointwise = torch.Tag.pointwise in func.tags
    return _Operator(
        name,
        None if pointwise or any(a.is_out for a in func._schema.arguments) else _OVER.get(name),
        pointwise,
        not name.startswith(_NO_CHOICE) and not name.endswith("_like"),
        name in ("convolution", "addmm", "mm", "linear"),
    )


def _grown(x: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor | None:
    """``x`` with zeros behind, to the sizes that ``shape`` has in ``dims``; None if nothing is missing."""
    sizes = [max(n, shape[i]) if i in dims else n for i, n in enumerate(x.shape)]
    if sizes == list(x.shape):
        return None
    grown = x.new_zeros(sizes)
    _within(grown, x.shape).copy_(x)
    return grown


def _within(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x[tuple(slice(0, n) for n in shape)]


def _dims(func: Any, args: Any, kwargs: Any) -> list[int]:
    """The dimensions of its first argument that an operator runs over, by the argument it calls ``dim``."""
    ndim = args[0].ndim
    dim = None
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            dim = kwargs.get("dim", args[i] if i < len(args) else argument.default_value)
    if dim is None or dim == []:
        return list(range(ndim))
    return [d % ndim for d in ([dim] if isinstance(dim, int) else dim)] if ndim else []


def _reduced(func: Any, args: Any, kwargs: Any, shapes: Any) -> Any:
    grown = _grown(args[0], shapes[0], _dims(func, args, kwargs))
    return None if grown is None else func(grown, *args[1:], **kwargs)


def _softmax(func: Any, args: Any, kwargs: Any, shapes: Any) -> Any:
    out = _reduced(func, args, kwargs, shapes)
    return None if out is None else _within(out, args[0].shape)


def _layer_norm(func: Any, args: Any, kwargs: Any, shapes: Any) -> Any:
    x, wide, shape = args[0], len(args[1]), shapes[0]
    grown = _grown(x, shape, range(x.ndim - wide, x.ndim))
    if grown is None:
        return None
    sizes = grown.shape[x.ndim - wide :]
    affine = [_filled(a, sizes) if isinstance(a, Tensor) else a for a in args[2:]]
    out = func(grown, list(sizes), *affine, **kwargs)
    return _within(out[0], x.shape), *out[1:]


def _filled(weight: Tensor, sizes: Sequence[int]) -> Tensor:
    grown = _grown(weight, sizes, range(weight.ndim))
    return weight if grown is None else grown


def _group_norm(func: Any, args: Any, kwargs: Any, shapes: Any) -> Any:
    x, weight, bias, n, c, area, groups, eps = args
    before = shapes[0][1]
    if before <= c or before % groups:
        return None

    def spread(tensor: Tensor, dim: int) -> Tensor:
        """Zeros behind the channels of each group."""
        apart = tensor.reshape(*tensor.shape[:dim], groups, c // groups, *tensor.shape[dim + 1 :])
        sizes = [*apart.shape[: dim + 1], before // groups, *apart.shape[dim + 2 :]]
        return _filled(apart, sizes).flatten(dim, dim + 1)

    affine = [t if t is None else spread(t, 0) for t in (weight, bias)]
    out = func(spread(x, 1).contiguous(), *affine, n, before, area, groups, eps, **kwargs)
    y = out[0].reshape(n, groups, before // groups, *x.shape[2:])[:, :, : c // groups]
    return y.flatten(1, 2), *out[1:]


def _batch_norm(func: Any, args: Any, kwargs: Any, shapes: Any) -> Any:
    """Statistics of the batch run over everything but channels; a standardised weight is written so."""
    x = args[0]
    of_batch = any(a is True for a in args) or func._schema.name.endswith("_batch_norm_with_update")
    grown = _grown(x, shapes[0], [d for d in range(x.ndim) if d != 1]) if of_batch else None
    if grown is None:
        return None
    out = func(grown, *args[1:], **kwargs)
    return _within(out[0], x.shape), *out[1:]


def _attention(func: Any, args: Any, kwargs: Any, shapes: Any) -> Any:
    """Zeros as further keys, which the softmax runs over."""
    q, k, v, *rest = args
    k_more, v_more = _grown(k, shapes[1], [k.ndim - 2]), _grown(v, shapes[2], [v.ndim - 2])
    if k_more is None or v_more is None:
        return None
    mask = kwargs.get("attn_mask")
    if mask is not None:
        kwargs = {**kwargs, "attn_mask": _filled(mask, [*mask.shape[:-1], k_more.shape[-2]])}
    return func(q, k_more, v_more, *rest, **kwargs)


_OVER: dict[str, _Over] = {
    **dict.fromkeys(
        ("mean", "var", "std", "var_mean", "std_mean", "logsumexp", "amax", "amin", "aminmax", "max", "min", "prod",
         "median", "mode", "kthvalue"), _reduced
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    "native_group_norm": _group_norm,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
         "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_with_update_functional"), _batch_norm
    ),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"), _attention
    ),
}  # fmt: skip
