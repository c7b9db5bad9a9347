"""Absorb constants: what a removed channel always said goes into the bias of the layers that heard it.

A channel whose batch norm has weight 0, or that is dead behind its activation, gives its readers the same value at
every position of every sample. Cut, it leaves a constant missing in each of their outputs; added to their bias, or
taken off the running mean of the batch norm behind them, the function of the network is the same. Where a convolution
pads with zeros a border remains: at the rim part of its kernel never saw the constant, but its bias now says it all.

What is constant is measured, not derived: the model runs in eval mode on its example input, and on noise of the same
mean and deviation, and the input of each reader is looked at where its operator gets it. So a constant may have come
through pooling, a residual sum or a depthwise convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.decision import Plan
from lightning_prune.errors import TraceError
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.trace import Calls, as_call, output_tensors, place, samples, undisturbed

_Key = tuple[str, int]  # a weight, and its dimension that meets the channels read

# How far values apart are still the same but for rounding, relative to the larger.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_CONVOLUTIONS = frozenset(["convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution"])
_PRODUCTS = {"mm": ("mat2", 0), "addmm": ("mat2", 0), "_addmm_activation": ("mat2", 0), "linear": ("weight", 1)}
_VIEWS = frozenset(["view", "_unsafe_view", "alias", "detach"])  # of a linear layer's output, its last axis in place
_ENOUGH = 64  # weights of a filter that are looked at to tell whether its bias could outweigh it


@dataclass(frozen=True)
class Absorbed:
    """What constants of removed channels became.

    Attributes:
        shifts: bias or running mean -> (O,) what is added to it, in indices of the model before the cut; on the CPU.
        readers: weight of a reader -> how many of its inputs were absorbed (behind a flatten a channel is several).
        left: weight of a reader -> how many inputs are constant and not zero, but could not be absorbed.
        reasons: weight of a reader -> why it was left, or could not be looked at.
    """

    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    readers: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shifts)

    def add_to(self, model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]] | None = None) -> None:
        """Add the shifts to a model's tensors, in place.

        Args:
            model: as it was measured, or cut since.
            kept: name -> {dim: kept indices} of the cut that lies between; None if none does.
        """
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        sums = {}
        for name, shift in self.shifts.items():
            index = (kept or {}).get(name, {}).get(0)
            before = _wide(tensors[name])  # the sum is rounded, the shift is not
            sums[name] = before + (shift if index is None else shift[index.to(shift.device)]).to(before)
        with torch.no_grad():
            for name, value in sums.items():
                tensors[name].copy_(value)


def absorb(
    model: nn.Module,
    plan: Plan,
    graph: ChannelGraph,
    example_inputs: Any = None,
    tolerance: float = 0.0,
    since: Plan | None = None,
) -> Absorbed:
    """Move constants of the channels a plan removes into biases and running means, before the cut, in place.

    Between this and the cut the model computes something else.

    Args:
        model: about to be cut.
        plan: what will be kept.
        graph: the model's graph, or that of a model it is a copy of.
        example_inputs: as for `trace`, all samples of them are used; by default what the graph was traced on.
        tolerance: 0 takes only constants. Above it, a channel whose standard deviation is at most this fraction of the
            root mean square of all the reader's input is taken for its mean; this wants real data.
        since: what the model was cut to before.

    Returns:
        What was absorbed, and what had to be left.

    Raises:
        ValueError: if the tolerance is negative or not finite, or the plan does not fit.
        TraceError: if the model does not run on the example inputs; nothing has changed then.

    Example:
        >>> from lightning_prune.surgery import trace
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     model[0].weight[1], model[0].bias[1], model[2].weight[0, 1] = 0, 3, 2
        ...     before = model[2].bias.item()
        >>> graph = trace(model, torch.randn(4, 2))
        >>> found = absorb(model, graph.plan({"0": torch.tensor([True, False])}), graph)
        >>> round(model[2].bias.item() - before, 4), dict(found.readers)
        (6.0, {'2.weight': 1})
    """
    found = absorbable(model, plan, graph, example_inputs, tolerance, since)
    found.add_to(model)
    return found


def absorbable(
    model: nn.Module,
    plan: Plan,
    graph: ChannelGraph,
    example_inputs: Any = None,
    tolerance: float = 0.0,
    since: Plan | None = None,
    constants: Mapping[_Key, Tensor] | None = None,
) -> Absorbed:
    """What `absorb` would do, without doing it.

    Args:
        model, plan, graph, example_inputs, tolerance, since: see `absorb`.
        constants: what indices that go are taken to say, in place of what is measured: weight and dimension -> (R, I),
            one row, or one for each group of a grouped convolution.
    """
    checked(tolerance)
    kept = plan.relative_to(since or Plan())
    watch = _Watch(model, kept, tolerance > 0)
    expected = watch.expected(graph)
    if not kept:
        return Absorbed()
    if any(tensor.is_meta for tensor in model.parameters()):
        return Absorbed(reasons=dict.fromkeys(expected, "a model on the meta device has no values"))
    probed = _measure(model, graph, graph.example_inputs if example_inputs is None else example_inputs, watch)
    inexact = {(m.name, m.dim): g.inexact_because for g in graph.groups if not g.exact for m in g.members}
    return _resolved(watch, expected, {} if tolerance else inexact, tolerance, probed, constants)


def _resolved(
    watch: _Watch,
    expected: set[str],
    inexact: Mapping[_Key, str],
    tolerance: float,
    probed: bool,
    constants: Mapping[_Key, Tensor] | None,
) -> Absorbed:
    """What was measured, or given -> shifts, and what is left."""
    shifts: dict[str, Tensor] = {}
    readers: dict[str, int] = {}
    left: dict[str, int] = {}
    unseen = expected - {name for name, _ in watch.readings}
    reasons = dict.fromkeys(unseen, "its weight does not reach an operator as it is")
    for key, reading in watch.readings.items():
        name = key[0]
        values = reading.values(tolerance, probed) if constants is None else reading.given(constants.get(key))
        count = int(values.count_nonzero())
        if not count:
            continue
        why, targets = watch.targets(reading)
        why = inexact.get(key, why)
        contribution = None if why else _contribution(watch.tensors[name], reading, values)
        if contribution is None:
            why = why or "its stride makes what a constant gives differ from place to place"
        elif not bool(torch.isfinite(contribution).all()):
            why = "what it would get is not finite"
        if contribution is None or why:
            left[name] = left.get(name, 0) + count
            reasons[name] = why
            continue
        readers[name] = readers.get(name, 0) + count
        for target in targets:
            change = -contribution if target in watch.means else contribution
            shifts[target] = shifts[target] + change if target in shifts else change
    return Absorbed({name: shift.cpu() for name, shift in shifts.items()}, readers, left, reasons)


def for_cut(
    model: nn.Module,
    plan: Plan,
    graph: ChannelGraph | None,
    absorb: bool | float,
    example_inputs: Any = None,
    since: Plan | None = None,
) -> Absorbed:
    """What a cut is to absorb; the model runs only if its weights say that there may be anything.

    Args:
        absorb: False for nothing, True for constants, a number for near-constant channels up to that tolerance as well.
        model, plan, graph, example_inputs, since: see `absorb`. Without a graph there is nothing to go by.

    Raises:
        ValueError: if a tolerance is asked for without a graph, or is negative or not finite.
    """
    tolerance = 0.0 if isinstance(absorb, bool) else checked(absorb)
    if absorb is False:
        return Absorbed()
    if graph is None:
        if tolerance:
            raise ValueError(f"absorb={absorb!r} has to run {type(model).__name__}: trace it first, or pass graph=")
        return Absorbed()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if not tolerance:
        kept = plan.relative_to(since or Plan())
        if any(t.is_meta for t in tensors.values()) or not may_be_constant(kept, graph, tensors):
            return Absorbed()
    return absorbable(model, plan, graph, example_inputs, tolerance, since)


def checked(tolerance: float) -> float:
    """A tolerance as it came.

    Raises:
        ValueError: if it is negative or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance!r}")
    return tolerance


def may_be_constant(
    kept: Mapping[str, Mapping[int, Tensor]], graph: ChannelGraph, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether any channel that goes looks as if it could be constant, told from weights alone, without a run.

    So look a norm's weight that is zero or outweighed threefold by its shift (what it makes then lies on one side of an
    activation's bend), and a filter that is zero or outweighed by its bias.

    Args:
        kept: name -> {dim: kept indices} of the cut to come, in indices of the model as it is now.
        graph: the model's.
        tensors: its parameters by name.
    """
    makers = {(p.weight, p.dim): p.bias for group in graph.groups for p in group.producers}
    for name, dims in kept.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, nn.Parameter) or name.endswith("bias"):
            continue
        follows = tensor.ndim == 1 or (tensor.ndim > 2 and tensor.shape[1] == 1)  # a norm's, or depthwise
        for dim, index in dims.items():
            if (name, dim) in makers or (follows and dim == 0):
                bias = makers.get((name, dim)) or f"{name.rpartition('weight')[0]}bias"
                if _outweighed(tensor, dim, tensors.get(bias), index):
                    return True
    return False


@torch.no_grad()
def _outweighed(weight: Tensor, dim: int, bias: Tensor | None, kept: Tensor) -> bool:
    """Whether any filter or scale that goes is zero, or a third of its bias at most, by its first few weights."""
    size = weight.shape[dim]
    rows = weight.reshape(size, -1) if dim == 0 else weight.movedim(dim, 0)
    while rows.ndim > 2:
        rows = rows[..., 0]
    if bias is None or len(bias) != size:
        looks = rows[:, 0] == 0
        if bool(looks.any()):
            looks = ~rows[:, :_ENOUGH].any(1)
    else:
        looks = bias.abs() >= 3 * rows[:, :_ENOUGH].norm(dim=1)
    return bool(looks.any()) and bool(looks.index_fill(0, kept.to(looks.device), False).any())


def _gone(kept: Tensor, size: int) -> Tensor:
    """(size,) bool, True where an index is not kept."""
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept.cpu()] = False
    return gone


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


class _Reading:
    """What a weight reads along one of its dimensions, over all calls; channels are those of the input, C.

    Args:
        key: the weight and the dimension.
        gone: (I,) bool, which indices of that dimension go.
        setting: stride, dilation, whether transposed, and groups of a convolution; None of a linear layer.
    """

    def __init__(self, key: _Key, gone: Tensor, setting: tuple[Any, ...] | None) -> None:
        self.key = key
        self.setting = setting
        self.calls: list[_Call] = []
        self.rounding = 0.0
        groups = 1 if setting is None or setting[2] else int(setting[3])
        self._gone = gone.repeat(groups)  # (C,)
        self._range: tuple[Tensor, Tensor] | None = None  # (C,) lowest and highest of all
        self._inner: tuple[Tensor, Tensor] | None = None  # (C,) lowest and highest in the middle
        self._steady = self._gone  # (C,) bool, goes, and so far was the same in all samples, and all over the middle
        self._count = 0
        self._mean: Tensor | None = None  # (C,)
        self._squares: Tensor | None = None  # (C,) of deviations from the mean

    def look(self, x: Tensor, taken: bool) -> None:
        """See one input.

        Args:
            x: (B, C, *S) of a convolution, or (..., C) of a linear layer.
            taken: whether its moments count.
        """
        if x.numel() == 0:
            return
        x = x.detach() if self.setting is not None else x.detach().reshape(-1, x.shape[-1])  # (B, C, *S)
        self.rounding = _ROUNDING.get(x.dtype, 1e-5)
        self._range = _joined(self._range, x)
        self._steady = self._steady.to(x.device)
        if bool(self._steady.any()):
            self._look_inside(x)
        if taken:
            self._add_moments(x)

    def _look_inside(self, x: Tensor) -> None:
        """Padding, here or in a depthwise convolution before, spoils a constant at the rim, alike in all samples."""
        at = self._steady.nonzero().squeeze(1)
        x = x.index_select(1, at)
        same = torch.ones_like(at, dtype=torch.bool)
        if x.ndim > 2:
            same &= self._same(x.amin(0), x.amax(0)).flatten(1).all(1)
        for dim, n in enumerate(x.shape[2:], start=2):
            x = x.narrow(dim, n // 3, n - 2 * (n // 3))
        inner = _joined(None if self._inner is None else (self._inner[0][at], self._inner[1][at]), x)
        same &= self._same(*inner)
        self._steady = self._steady.index_put((at,), same)
        before = self._inner or (inner[0].new_zeros(len(self._gone)), inner[1].new_zeros(len(self._gone)))
        self._inner = before[0].index_put((at,), inner[0]), before[1].index_put((at,), inner[1])

    def _same(self, low: Tensor, high: Tensor) -> Tensor:
        """Whether they differ by no more than rounding; not where one is NaN."""
        return (high - low) <= self.rounding * torch.maximum(low.abs(), high.abs())

    def _add_moments(self, x: Tensor) -> None:
        """Chan, Golub and LeVeque's sum of two samples' means and squares."""
        n = x.numel() // x.shape[1]
        x = x.float() if x.dtype.itemsize < 4 else x
        variance, mean = torch.var_mean(x, dim=_all_but_channels(x), correction=0)
        mean, squares = _wide(mean), _wide(variance) * n
        if self._mean is not None and self._squares is not None:
            total, apart = self._count + n, mean - self._mean
            squares = self._squares + squares + apart.square() * (self._count * n / total)
            mean = self._mean + apart * (n / total)
        self._mean, self._squares, self._count = mean, squares, self._count + n

    def given(self, table: Tensor | None) -> Tensor:
        """(C,) what channels that go are taken to say, (R, I) as `absorbable` has it; 0 of others."""
        gone = self._gone.to(self._steady.device)
        if table is None:
            return torch.zeros_like(gone, dtype=torch.float64)
        return torch.where(gone, _wide(table).expand(len(gone) // table.shape[1], -1).reshape(-1).to(gone.device), 0.0)

    def values(self, tolerance: float, probed: bool) -> Tensor:
        """(C,) the constant of each channel that goes; 0 of one that is kept, or not constant.

        Args:
            tolerance: see `absorb`.
            probed: whether noise was seen. If not, and nothing at all varied, nothing can be told.
        """
        nothing = torch.zeros(len(self._gone), device=self._steady.device)
        if self._range is None or (not probed and bool(self._same(*self._range).all())):
            return nothing
        values = torch.zeros_like(self._range[0])
        if tolerance > 0 and self._mean is not None and self._squares is not None:
            variance = self._squares / self._count
            power = (variance + self._mean.square()).mean()
            near = self._gone.to(values.device) & (variance.sqrt() <= tolerance * power.sqrt())
            values = torch.where(near, self._mean, values)
        if self._inner is not None:
            values = torch.where(self._steady, (self._inner[0] + self._inner[1]) / 2, values)
        return values


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _joined(sofar: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) lowest and highest so far, with those of (B, C, *S) more."""
    low, high = (_wide(f(x, dim=_all_but_channels(x))) for f in (torch.amin, torch.amax))
    return (low, high) if sofar is None else (torch.minimum(sofar[0], low), torch.maximum(sofar[1], high))


@dataclass(eq=False)
class _Call:
    """One call of a reader: where a shift of its output can go.

    Attributes:
        key: of the reading.
        axis: of its output that carries channels.
        width: how many.
        target: bias or running mean.
        is_mean: whether it is a running mean.
        shared: whether anything but a batch norm gets its output.
    """

    key: _Key
    axis: int
    width: int
    target: str | None = None
    is_mean: bool = False
    shared: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what readers of removed channels read, and what their outputs meet next.

    Args:
        model: what will run.
        kept: name -> {dim: kept indices} of the cut to come.
        averages: whether means and deviations are asked for.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], averages: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.readings: dict[_Key, _Reading] = {}
        self.means: set[str] = set()
        self.taken = True
        self._kept = kept
        self._averages = averages
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        self._storages = {
            (t.untyped_storage()._cdata, t.storage_offset()): name for name, t in self.tensors.items() if name in kept
        }
        self._uses: dict[str, set[_Key | None]] = {}
        self._made: Any = WeakTensorKeyDictionary()

    def expected(self, graph: ChannelGraph) -> set[str]:
        """Weights of the readers that lose inputs."""
        return {c.weight for g in graph.groups for c in g.consumers if c.dim in self._kept.get(c.weight, {})}

    def targets(self, reading: _Reading) -> tuple[str, set[str]]:
        """Why a reader's output cannot be shifted, or '', and the tensors that shift it."""
        targets: set[str] = set()
        for call in reading.calls:
            if call.target is None or (call.is_mean and call.shared):
                return "it has no bias, and no batch norm with a running mean follows directly", set()
            targets.add(call.target)
        if any(self._uses[target] != {reading.key} for target in targets):
            return "its bias, or the batch norm behind it, serves another layer too", set()
        self.means.update(call.target for call in reading.calls if call.is_mean and call.target)
        return "", targets

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given.update(kwargs or {})
        key = self._read(name, given, out)
        if not self.taken:
            return out
        if key is None:
            key = self._follow(name, given, out)
        for tensor in _tensors(given.values()):
            if id(tensor) in self._names:
                self._uses.setdefault(self._names[id(tensor)], set()).add(key)
        return out

    def _read(self, name: str, given: Mapping[str, Any], out: Any) -> _Key | None:
        """Look at the input of a reader; returns its key if this is one."""
        setting = None
        if name in _CONVOLUTIONS:
            weight, x, dim = given["weight"], given["input"], 0 if given["transposed"] else 1
            setting = tuple(given["stride"]), tuple(given["dilation"]), given["transposed"], given["groups"]
        elif name in _PRODUCTS:
            side, dim = _PRODUCTS[name]
            weight = given[side]
            x = given["mat1"] if "mat1" in given else given["self"] if "self" in given else given["input"]
        else:
            return None
        found = self._storages.get((weight.untyped_storage()._cdata, weight.storage_offset()))
        if found is None:
            return None
        own = self.tensors[found]
        if not _alike(weight, own):
            if own.ndim != 2 or not _alike(weight, own.t()):
                return None
            dim = 1 - dim
        if dim not in self._kept[found]:
            return None
        key = found, dim
        if key not in self.readings:
            gone = _gone(self._kept[found][dim], own.shape[dim])
            self.readings[key] = _Reading(key, gone, setting)
        reading = self.readings[key]
        reading.look(x, self.taken and self._averages)
        if self.taken:
            call = _Call(key, -1 if setting is None else 1, out.shape[-1 if setting is None else 1])
            if reading.setting == setting:
                scaled = given.get("beta", 1) != 1 or given.get("alpha", 1) != 1
                bias = given.get("self") if name in ("addmm", "_addmm_activation") else given.get("bias")
                call.target = None if scaled else self._vector(bias, call.width)
                call.shared = scaled
            else:
                call.shared = True  # one weight at two strides: no one shift serves both
            reading.calls.append(call)
            self._made[out] = call
        return key

    def _follow(self, name: str, given: Mapping[str, Any], out: Any) -> _Key | None:
        """What meets the output of a reader: a view, its bias, a batch norm, or anything else."""
        tensors = list(_tensors(given.values()))
        calls = [self._made[t] for t in tensors if t in self._made]
        if not calls:
            return None
        call: _Call = calls[0]
        if name in _VIEWS and call.axis == -1 and out.shape[-1:] == (call.width,):
            self._made[out] = call
            return None
        if len(calls) == 1 and call.axis == -1 and name in ("add", "add_") and given.get("alpha", 1) == 1:
            other = tensors[1] if tensors[0] in self._made else tensors[0]
            bias = self._vector(other, call.width)
            if bias is not None and call.target is None and not call.shared:
                call.target = bias
                return call.key
        mean = given.get("running_mean")
        if mean is not None and not given.get("training", False) and call.target is None:
            x = given["input"]
            axis = call.axis % x.ndim
            if x in self._made and axis == 1 and self._vector(mean, call.width) is not None:
                call.target, call.is_mean = self._vector(mean, call.width), True
                return call.key
        for one in calls:
            one.shared = True
        return None

    def returned(self, out: Any) -> None:
        """What the model returns is seen outside of it."""
        for tensor in output_tensors(out):
            if tensor in self._made:
                self._made[tensor].shared = True

    def _vector(self, tensor: Any, width: int) -> str | None:
        """Name of a parameter or buffer with one entry a channel; None of anything else."""
        if not isinstance(tensor, Tensor) or tensor.shape != (width,):
            return None
        return self._names.get(id(tensor))


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.stride() == other.stride()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def _measure(model: nn.Module, graph: ChannelGraph, example_inputs: Any, watch: _Watch) -> bool:
    """Run the model on its inputs and on noise; returns whether it ran on noise."""
    with undisturbed(model):
        model.eval()
        try:
            with watch:
                watch.returned(_run(model, graph, example_inputs, lambda value: value))
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} does not run on what constants are to be measured on: "
                f"{type(error).__name__}: {error}; pass example_inputs that its forward takes"
            ) from error
        noise = _Noise()
        watch.taken = False
        try:
            with watch:
                _run(model, graph, example_inputs, noise)
        except Exception:  # not every input may be noise; what was seen until here still counts
            return False
    return noise.drawn


def _run(model: nn.Module, graph: ChannelGraph, inputs: Any, change: Callable[[Any], Any]) -> Any:
    """Run a model on all samples of its inputs, changed; a copy of the graph's model as if it were that."""
    if isinstance(inputs, Calls):
        names = {module: name for name, module in graph.model.named_modules()}
        own = dict(model.named_modules())
        out = []
        for module, args, kwargs in inputs.calls:
            args, kwargs = change(place((args, kwargs), model))
            out.append(own.get(names.get(module, ""), module)(*args, **kwargs))
        return out
    args, kwargs = as_call(change(place(inputs, model)))
    return model(*args, **kwargs)


class _Noise:
    """Two samples of noise in place of floating inputs, with their mean and deviation; indices are shuffled.

    Attributes:
        drawn: whether there was one.
    """

    def __init__(self) -> None:
        self.drawn = False
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, inputs: Any) -> Any:
        return tree_map(self._draw, samples(inputs, 2))

    def _draw(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.bool or value.numel() < 2:
            return value
        if not value.is_floating_point():  # tokens, say: each of them is a valid one
            shuffled = value.flatten()[torch.randperm(value.numel(), generator=self._generator).to(value.device)]
            self.drawn = self.drawn or not torch.equal(shuffled, value.flatten())
            return shuffled.reshape(value.shape)
        self.drawn = True
        deviation, mean = torch.std_mean(value.float(), correction=0)
        drawn = torch.randn(value.shape, generator=self._generator).to(value.device)
        return (mean + (deviation if deviation > 0 else 1.0) * drawn).to(value.dtype)


def _contribution(weight: Tensor, reading: _Reading, values: Tensor) -> Tensor | None:
    """(O,) what constants give each output inside the image; None if that differs from place to place."""
    if reading.setting is None:
        used = values.nonzero().squeeze(1)
        columns = _wide(weight.index_select(reading.key[1], used))
        return columns @ values[used] if reading.key[1] == 1 else values[used] @ columns
    stride, dilation, transposed, groups = reading.setting
    if not transposed:
        table = values.reshape(groups, -1)  # (G, I/G)
        used = table.any(0).nonzero().squeeze(1)
        columns = _wide(weight.index_select(1, used)).flatten(2).sum(2).reshape(groups, -1, len(used))
        return (columns * table[:, None, used]).sum(2).flatten()
    used = values.nonzero().squeeze(1)
    given = _wide(weight.index_select(0, used)) * values[used].reshape(-1, *[1] * (weight.ndim - 1))
    taps = given.new_zeros(groups, *given.shape[1:])
    taps = taps.index_add_(0, used // (weight.shape[0] // groups), given).flatten(0, 1)  # (O, *K)
    for dim, (step, apart) in enumerate(zip(stride, dilation, strict=True), start=1):
        phase = torch.arange(taps.shape[dim], device=taps.device) * apart % step  # taps that reach the same positions
        shape = [step if i == dim else n for i, n in enumerate(taps.shape)]
        taps = taps.new_zeros(shape).index_add_(dim, phase, taps)
    phases = taps.flatten(1)
    if bool(((phases.amax(1) - phases.amin(1)) > reading.rounding * phases.abs().amax()).any()):
        return None
    return phases.mean(1)
