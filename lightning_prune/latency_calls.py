"""What a forward calls, and the same calls at other widths: the layers of a network timed one by one.

A call is timed by itself if its channels may be cut: convolutions, linear layers, batch and layer norms, whose widths
are sizes of their own parameters, and what follows them element by element or pools, whose width is that of the layer
whose channels it carries. All else (attention products, recurrent cells, layouts) is time that no cut changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.trace import Calls, as_call, place, samples

Axis = tuple[str, int]
"""A dimension of a parameter or buffer, whose size is a width of the calls that use it."""

_CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d"])
_TRANSPOSED = frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
_POOLING = frozenset(
    f"{name}{dim}d" for name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool") for dim in (1, 2, 3)
)
_ELEMENTWISE = frozenset(
    [
        *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "silu", "gelu", "hardswish", "tanh"),
        *("hardsigmoid", "sigmoid", "sigmoid_", "tanh_", "leaky_relu", "leaky_relu_", "elu", "mish", "softplus"),
        *("add", "add_", "sub", "mul", "mul_", "div", "__add__", "__iadd__", "__radd__", "__sub__", "__mul__"),
        *("__imul__", "__rmul__", "__truediv__"),
    ]
)
_TRANSPARENT = frozenset(["dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "group_norm"])
_SHORTEST_MS = 0.5  # of one reading of the clock: shorter calls are repeated within it
_GROUPS_AT, _NORMALIZED_AT = 6, 1  # positions of these arguments


@dataclass(frozen=True)
class _Scaled:
    """A number that follows a width."""

    value: int
    width: int


@dataclass(frozen=True)
class _Shape:
    """A tensor argument: its shape, and which of its dimensions follow which width."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    follows: tuple[tuple[int, int], ...]
    channels_last: bool


@dataclass(frozen=True)
class TimedCall:
    """One call of a forward, that can be made again at other widths.

    Attributes:
        function: what is called, by name.
        axes: at most two dimensions of parameters whose sizes are its widths.
        dense: those sizes when recorded.
        units: widths are multiples of these (channels per group of a grouped convolution).
        index: its place among all calls of the forward.
    """

    function: str
    axes: tuple[Axis, ...]
    dense: tuple[int, ...]
    units: tuple[int, ...]
    index: int
    call: Callable[..., Any] = field(repr=False, compare=False)
    leaves: tuple[Any, ...] = field(repr=False)
    spec: Any = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """Equal for calls that are the same work, whatever the layer."""
        return f"{self.function} {self.dense} {self.units} {self.leaves} {self.spec}"

    def milliseconds(self, widths: Sequence[int], device: torch.device, repeats: int) -> float:
        """The least time of one such call at these widths, of ``repeats`` readings after one that is not timed."""
        arguments, keywords = tree_unflatten(self.arguments(widths, device), self.spec)

        def run(times: int) -> float:
            synchronise(device)
            start = time.perf_counter()
            for _ in range(times):
                self.call(*arguments, **keywords)
            synchronise(device)
            return 1000 * (time.perf_counter() - start) / times

        run(1)
        times = max(1, min(100, int(_SHORTEST_MS / max(run(1), 1e-3))))
        return min(run(times) for _ in range(repeats))

    def arguments(self, widths: Sequence[int], device: torch.device) -> list[Any]:
        """What the function gets at these widths, tensors and all else, flattened."""
        return [self._at(leaf, widths, device) for leaf in self.leaves]

    def _at(self, leaf: Any, widths: Sequence[int], device: torch.device) -> Any:
        if isinstance(leaf, _Scaled):
            return leaf.value * widths[leaf.width] // self.dense[leaf.width]
        if not isinstance(leaf, _Shape):
            return leaf
        sizes = list(leaf.sizes)
        for dim, width in leaf.follows:
            sizes[dim] = sizes[dim] * widths[width] // self.dense[width]
        # no zeros, which some devices compute with less power, and no random state that a run depends on
        tensor = torch.full(sizes, 0.5 if leaf.dtype.is_floating_point else 0, dtype=leaf.dtype, device=device)
        return tensor.contiguous(memory_format=torch.channels_last) if leaf.channels_last else tensor


@dataclass(frozen=True)
class Recording:
    """A forward, call by call.

    Attributes:
        calls: those that can be made again at other widths.
        milliseconds: of each of them, within the forward.
        rest_ms: of everything else.
    """

    calls: tuple[TimedCall, ...]
    milliseconds: tuple[float, ...]
    rest_ms: float


def record(graph: ChannelGraph, forward: Callable[[], Any], device: torch.device, repeats: int) -> Recording:
    """Run a forward and time each call where it happens, the least of ``repeats`` runs.

    Args:
        graph: of the model, for what may be cut.
        forward: runs the model; nothing of it may depend on chance.
        device: where it runs.
        repeats: at least 1.
    """
    forward()
    recorder = _Recorder(graph, device)
    every, gaps = [], []
    for _ in range(repeats):
        recorder.elapsed = []
        start = time.perf_counter()
        with recorder:
            forward()
        synchronise(device)
        recorder.learning = False
        every.append(recorder.elapsed)
        gaps.append(1000 * (time.perf_counter() - start) - sum(recorder.elapsed))
    if len({len(elapsed) for elapsed in every}) > 1:
        raise ValueError(
            f"{type(graph.model).__name__} makes another number of calls each time it runs on the same input, so its "
            "layers cannot be timed one by one; give a budget of flops or params"
        )
    least = [min(column) for column in zip(*every, strict=True)]
    milliseconds = tuple(least[call.index] for call in recorder.calls)
    return Recording(tuple(recorder.calls), milliseconds, max(0.0, sum(least) + min(gaps) - sum(milliseconds)))


class _Recorder(TorchFunctionMode):
    """Notes the calls that channels flow through, and times all."""

    def __init__(self, graph: ChannelGraph, device: torch.device) -> None:
        super().__init__()
        model = graph.model
        self.device = device
        self.learning = True
        self.calls: list[TimedCall] = []
        self.elapsed: list[float] = []
        self._names = {id(t): name for ts in (model.named_parameters(), model.named_buffers()) for name, t in ts}
        self._shapes = graph.shapes
        self._units: dict[Axis, int] = {}
        self._cut = {(m.name, m.dim) for group in graph.groups for m in group.members}
        self._whole_groups = {r.module for r in graph.resized if r.attribute == "groups"}
        self._carried: Any = (
            WeakTensorKeyDictionary()
        )  # tensor -> (its channel dimension, the axis it has the width of)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call, as the model does."""
        kwargs = kwargs or {}
        noted = self._noted(func, args, kwargs) if self.learning else None
        synchronise(self.device)
        start = time.perf_counter()
        out = func(*args, **kwargs)
        synchronise(self.device)
        self.elapsed.append(1000 * (time.perf_counter() - start))
        if noted is not None and isinstance(out, Tensor):
            self._carried[out] = noted
        return out

    def _noted(self, func: Any, args: Any, kwargs: Any) -> tuple[int, Axis] | None:
        """Note a call; returns what its output carries: (channel dimension, axis)."""
        name = getattr(func, "__name__", "")
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if name in _CONVOLUTIONS or name in _TRANSPOSED:
            return self._convolution(func, name in _TRANSPOSED, args, kwargs)
        if name == "linear" and (weight := self._parameter(args, kwargs, 1, "weight")):
            axes = ((weight, 0), (weight, 1))
            marks = {0: ((given[0].ndim - 1, 1),), 1: ((0, 0), (1, 1)), 2: ((0, 0),)}
            self._add(func, args, kwargs, axes, (1, 1), given, marks)
            return given[0].ndim - 1, axes[0]
        if name in ("batch_norm", "layer_norm"):
            return self._norm(func, name, args, kwargs, given)
        if name in _ELEMENTWISE or name in _POOLING or name in _TRANSPARENT:
            return self._follower(func, name, args, kwargs, given)
        return None

    def _convolution(self, func: Any, transposed: bool, args: Any, kwargs: Any) -> tuple[int, Axis] | None:
        weight = self._parameter(args, kwargs, 1, "weight")
        if weight is None:
            return None
        args = list(args)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        groups = args[_GROUPS_AT] if len(args) > _GROUPS_AT else kwargs.get("groups", 1)
        shape, made, read = given[1].shape, int(transposed), 1 - int(transposed)
        channels = given[0].ndim - given[1].ndim + 1  # 0 without a batch
        axes: tuple[Axis, ...] = ((weight, made), (weight, read))
        # the dimension that holds all groups one after the other has as many channels of each
        units: tuple[int, ...] = (1, groups) if transposed else (groups, 1)
        if groups > 1 and weight.rpartition(".")[0] in self._whole_groups:
            axes, units = ((weight, 0),), (shape[0] // groups,)
            marks: dict[int, tuple[tuple[int, int], ...]] = {0: ((channels, 0),), 1: ((0, 0),), 2: ((0, 0),)}
            if len(args) > _GROUPS_AT:
                args[_GROUPS_AT] = _Scaled(groups, 0)
            else:
                kwargs = {**kwargs, "groups": _Scaled(groups, 0)}
        else:
            marks = {0: ((channels, 1),), 1: ((made, 0), (read, 1)), 2: ((0, 0),)}
        self._add(func, args, kwargs, axes, units, given, marks)
        return channels, axes[0]

    def _norm(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> tuple[int, Axis] | None:
        owned = next((self._names[id(t)] for t in given[1:] if id(t) in self._names), None)
        if owned is None:
            return None
        axes, marks = ((owned, 0),), dict.fromkeys(range(1, len(given)), ((0, 0),))
        channels = 1 if name == "batch_norm" else given[0].ndim - 1
        size = given[0].shape[channels]
        if name == "layer_norm":
            shape = args[_NORMALIZED_AT] if len(args) > _NORMALIZED_AT else kwargs["normalized_shape"]
            if len(shape) != 1:
                return None
            scaled = (_Scaled(size, 0),)
            if len(args) > _NORMALIZED_AT:
                args = [*args[:_NORMALIZED_AT], scaled, *args[_NORMALIZED_AT + 1 :]]
            else:
                kwargs = {**kwargs, "normalized_shape": scaled}
        self._add(func, args, kwargs, axes, (1,), given, {0: ((channels, 0),), **marks})
        return channels, axes[0]

    def _follower(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> tuple[int, Axis] | None:
        carried = [self._carried.get(tensor) for tensor in given]
        found = next((i for i, at in enumerate(carried) if at is not None), None)
        if found is None or any(t.shape[:1] == (0,) for t in given):
            return None
        first = carried[found]
        size = given[found].shape[first[0]]
        marks = {
            i: ((at[0], 0),)
            for i, (at, tensor) in enumerate(zip(carried, given, strict=True))
            if at is not None and tensor.shape[at[0]] == size
        }
        whole = [t for i, t in enumerate(given) if i not in marks and t.ndim > first[0] and t.shape[first[0]] == size]
        if whole:
            return None  # a tensor of the same width that nothing is known of: it would not follow
        if name not in _TRANSPARENT:
            self._add(func, args, kwargs, (first[1],), (self._units.get(first[1], 1),), given, marks)
        return int(first[0]), first[1]

    def _parameter(self, args: Any, kwargs: Any, position: int, keyword: str) -> str | None:
        tensor = args[position] if len(args) > position else kwargs.get(keyword)
        return self._names.get(id(tensor))

    def _add(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        axes: Sequence[Axis],
        units: Sequence[int],
        given: Sequence[Tensor],
        marks: Mapping[int, tuple[tuple[int, int], ...]],
    ) -> None:
        """Note a call with those of its axes that a cut changes."""
        number = {old: new for new, old in enumerate(i for i, axis in enumerate(axes) if axis in self._cut)}
        if not number:
            return
        follows = {
            id(t): tuple((dim, number[k]) for dim, k in marks.get(i, ()) if k in number) for i, t in enumerate(given)
        }
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        described = tuple(_described(leaf, follows, number) for leaf in leaves)
        own = tuple(axes[i] for i in number)
        dense = tuple(self._shapes[name][dim] for name, dim in own)
        multiples = tuple(units[i] for i in number)
        self._units.update(zip(own, multiples, strict=True))
        name = getattr(func, "__name__", "")
        self.calls.append(TimedCall(name, own, dense, multiples, len(self.elapsed), func, described, spec))


def _described(leaf: Any, follows: Mapping[int, tuple[tuple[int, int], ...]], number: Mapping[int, int]) -> Any:
    if isinstance(leaf, Tensor):
        last = leaf.ndim == 4 and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last)
        return _Shape(tuple(leaf.shape), leaf.dtype, follows[id(leaf)], last)
    if isinstance(leaf, _Scaled):
        return _Scaled(leaf.value, number[leaf.width]) if leaf.width in number else leaf.value
    return leaf


def forward_of(model: nn.Module, example_inputs: Any, batch: int) -> Callable[[], Any]:
    """A forward on the first sample, ``batch`` times over, with its inputs in place beforehand."""
    if not isinstance(example_inputs, Calls):
        args, kwargs = as_call(samples(place(example_inputs, model), batch))
        return lambda: model(*args, **kwargs)
    calls = [(module, *samples(place((a, k), model), batch)) for module, a, k in example_inputs.calls]
    return lambda: [module(*a, **k) for module, a, k in calls]


def synchronise(device: torch.device) -> None:
    """Wait for what was given to a device to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
