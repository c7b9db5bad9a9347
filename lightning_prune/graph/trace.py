"""Model -> records, by running it: every operator call is followed through a rule on labels.

The model runs on the example input as it stands, under a dispatch mode that sees the operators it really calls, once as
it trains (so that auxiliary heads are there) and once in eval mode with one sample (so that flops are those of the
network that would be shipped). Nothing of the model changes by it: modes, buffers, random state and hooks are put back,
also when the forward raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lightning_prune.errors import TraceError
from lightning_prune.graph.labels import Dim, Ids, Info, full, ids_of, is_tracked, tracked, untracked

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)

# Functions of torch that multiply matrices, or pool, by operators fvcore counts, while it counts none for themselves.
_UNCOUNTED = frozenset(
    [
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "lstm_cell",
        "gru_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "dot",
        "vdot",
        "inner",
        "tensordot",
        "cdist",
        "adaptive_avg_pool1d",
    ]
)


@dataclass(slots=True)
class Slot:
    """One dimension of one parameter or buffer: coordinates ``offset`` to ``offset + size - 1``."""

    name: str
    dim: int
    size: int
    offset: int
    is_buffer: bool


@dataclass(slots=True)
class LayerRecord:
    """One call of an operator that makes channels (convolution, linear), or of a norm over them.

    Attributes:
        kind: "conv", "linear" or "norm".
        module: path of the module the call was made in.
        out: labels of the channels it makes (or, for a norm, scales).
        into: labels of the channels it reads; None if untracked.
        weight, bias: labels of the weight's first tracked axis are ``out``; the names are looked up from labels.
        groups: as the operator got it.
        whole_groups: whether whole groups go (True), or the same index of every group (False).
        depthwise: every output channel reads one input channel, so that it follows its producer.
        source: for a norm, number of the record that made what it reads, if nothing came between.
    """

    kind: str
    module: str
    out: Ids
    into: Dim | None
    weight: str | None
    bias: str | None = None
    groups: int = 1
    whole_groups: bool = True
    depthwise: bool = False
    source: int | None = None


@dataclass(slots=True)
class Term:
    """A summand of the flops: ``coefficient`` times the product of the current sizes of ``dims``."""

    module: str
    operator: str
    coefficient: int
    dims: list[Dim]
    weight: str | None = None


@dataclass
class Records:
    """All that one or more traces of a model have told."""

    slots: list[Slot] = field(default_factory=list)
    size: int = 0
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    inexact: list[tuple[Ids, str]] = field(default_factory=list)
    suspect: list[Ids] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    has_training_branch: bool = False


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows labels through the operators called inside its context.

    Rules (`lightning_prune.graph.rules`) call its verbs: `same`, `freeze`, `inexact`, `layer`, `flops`.
    """

    def __init__(self, records: Records, model: nn.Module, rules: Mapping[str, Callable[..., None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records = records
        self.counting = False
        self.call = Call()
        self._rules = rules
        self._infos: dict[tuple[Any, ...], Info] = {}
        self._alive: list[Tensor] = []
        self._paths = {module: name for name, module in model.named_modules()}
        self._path: list[str] = []
        self._named = {
            id(tensor): (name, is_buffer)
            for is_buffer, named in ((True, model.named_buffers()), (False, model.named_parameters()))
            for name, tensor in named
        }
        slots: dict[str, list[Slot]] = {}
        for slot in records.slots:
            slots.setdefault(slot.name, []).append(slot)
        for is_buffer, named in ((False, model.named_parameters()), (True, model.named_buffers())):
            for name, tensor in named:
                if name not in slots:
                    slots[name] = []
                    for dim, size in enumerate(tensor.shape):
                        slots[name].append(Slot(name, dim, size, records.size, is_buffer))
                        records.size += size
                    records.slots.extend(slots[name])
                dims = [tracked(np.arange(s.offset, s.offset + s.size)) for s in slots[name]]
                self._infos[_key(tensor)] = Info(dims, param=name)
                self._alive.append(tensor)

    def info(self, tensor: Tensor) -> Info:
        """What is known of a tensor; untracked dimensions if nothing is."""
        found = self._infos.get(_key(tensor))
        if found is None:
            return Info([untracked(size) for size in tensor.shape])
        if found.param is not None:
            self.records.touched.add(found.param)
        return found

    @property
    def module(self) -> str:
        """Path of the innermost module that is running."""
        return self._path[-1] if self._path else ""

    def set(self, tensor: Tensor, dims: Sequence[Dim], source: int | None = None, param: str | None = None) -> None:
        """Give a result its labels."""
        self._infos[_key(tensor)] = Info(list(dims), source, param)
        self._alive.append(tensor)

    def same(self, a: Dim, b: Dim, why: str) -> Dim:
        """Two dimensions of equal size stand for the same channels, index by index.

        Where one carries labels and the other is a plain size, the code holds that size as a number: frozen.
        """
        if a is b:
            return a
        if tuple(n for n, _ in a) == tuple(n for n, _ in b):
            for (_, left), (_, right) in zip(a, b, strict=True):
                self._same_ids(left, right, why)
        elif is_tracked(a) or is_tracked(b):
            left, right = full(a), full(b)
            if left is None or right is None:
                self.freeze([a, b], f"two dimensions flattened into one meet another layout in {why}")
            else:
                self._same_ids(left, right, why)
        return a if is_tracked(a) else b

    def _same_ids(self, left: Ids | None, right: Ids | None, why: str) -> None:
        if left is right or (left is None and right is None):
            return
        if left is None or right is None:
            if "dropout" in self.call.name:  # its noise has the size of what it multiplies
                return
            ids = left if right is None else right
            assert ids is not None
            self._freeze(ids, f"{why} pairs it with a dimension that is not a parameter's")
            return
        known = (left >= 0) & (right >= 0)
        if known.all():
            self.records.edges.append((left, right))
            return
        self.records.edges.append((left[known], right[known]))
        lone = ~known
        self._freeze(
            np.concatenate([left[lone], right[lone]]),
            f"{why} pairs it with channels that no parameter makes (padded in, or constant)",
        )

    def couple(self, ids: Ids, parts: int) -> None:
        """The same index of each of ``parts`` equal parts is one channel."""
        rows = ids.reshape(parts, -1)
        for row in rows[1:]:
            self._same_ids(rows[0], row, "an equal split")

    def freeze(self, dims: Sequence[Dim], why: str) -> None:
        """None of these coordinates may go."""
        for dim in dims:
            for ids in ids_of(dim):
                self._freeze(ids, why)

    def _freeze(self, ids: Ids, why: str) -> None:
        ids = ids[ids >= 0]
        if len(ids):
            self.records.frozen.append((ids, f"{why}{self._where()}"))

    def inexact(self, dims: Sequence[Dim], why: str) -> None:
        """A cut of these is legitimate, but differs from zeroing: statistics run over them."""
        for dim in dims:
            for ids in ids_of(dim):
                self.records.inexact.append((ids[ids >= 0], f"{why}{self._where()}"))

    def suspect(self, dims: Sequence[Dim]) -> None:
        """Code outside of torch may hold the size of these; only running the cut model tells."""
        for dim in dims:
            for ids in ids_of(dim):
                self.records.suspect.append(ids[ids >= 0])

    def layer(self, record: LayerRecord) -> int:
        """Note a layer; returns its number."""
        self.records.layers.append(record)
        return len(self.records.layers) - 1

    def flops(self, operator: str, coefficient: int, dims: Sequence[Dim], weight: str | None = None) -> None:
        """Add a summand to the flops; untracked sizes go into the coefficient."""
        if not self.counting or self.call.name in _UNCOUNTED:
            return
        kept: list[Dim] = []
        for dim in dims:
            for n, ids in dim:
                if ids is None:
                    coefficient *= n
                else:
                    kept.append(((n, ids),))
        self.records.terms.append(Term(self.module, operator, coefficient, kept, weight))

    def _where(self) -> str:
        """The module and the line of the model's own code that is running; nothing once the model has returned."""
        if not self._path:
            return ""
        frame = sys._getframe(2)
        line = ""
        while frame is not None:
            name = frame.f_code.co_filename
            if frame.f_code is run.__code__:  # outside of the model; all that ran in it is torch's own
                break
            if not name.startswith((_TORCH, _HERE, "<")):
                line = f", {Path(name).name}:{frame.f_lineno}"
                break
            frame = frame.f_back  # type: ignore[assignment]
        return f" (in {self.module or 'the model'}{line})"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mutated = args[0] if func._schema.name.endswith("_") and args and isinstance(args[0], Tensor) else None
        before = None if mutated is None else (_key(mutated), tuple(mutated.shape), self.info(mutated))
        out = func(*args, **kwargs)
        if mutated is not None and before is not None and _key(mutated) != before[0]:
            self._relaid(mutated, before[1], before[2], func._schema.name)
            return out
        name = func._schema.name[6:] if func._schema.name.startswith("aten::") else func._schema.name
        rule = self._rules.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self._rules["pointwise"]
        if rule is None and name.endswith("_"):
            rule = self._rules.get(name[:-1])
        named = {key: value for key, value in kwargs.items() if key != "out"}  # what was written to is `out` already
        (rule or self._rules["unknown"])(self, name, out, *args, **named)
        return out

    def _relaid(self, tensor: Tensor, shape: tuple[int, ...], info: Info, name: str) -> None:
        """A tensor got another layout in place: known where its shape stayed (another memory format)."""
        if tuple(tensor.shape) == shape:
            self.set(tensor, info.dims, info.source, info.param)
        else:
            self.freeze(info.dims, f"operator '{name}' changes its shape in place")

    @contextmanager
    def paths(self) -> Iterator[None]:
        """Know which module runs: global hooks for the time of the trace, so that no module is touched."""

        def enter(module: nn.Module, _: Any) -> None:
            self._path.append(self._paths.get(module, self.module))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if self._path:
                self._path.pop()

        first = nn.modules.module.register_module_forward_pre_hook(enter)
        second = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            first.remove()
            second.remove()
            self._path.clear()


class Call(TorchFunctionMode):
    """Remembers which torch function the model called: flops and baked sizes depend on it, not on its operators."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.literal_sizes: tuple[int, ...] = ()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        previous = self.name, self.literal_sizes
        self.name = getattr(func, "__name__", "")
        self.literal_sizes = ()
        if self.name in ("view", "reshape", "unflatten"):
            self.literal_sizes = tuple(a for a in tree_flatten(args[1:])[0] if isinstance(a, int))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name, self.literal_sizes = previous


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """Identity of the data a tensor shows: two views of the same memory in the same layout are the same."""
    storage = tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()


@dataclass(frozen=True)
class Calls:
    """An example input for a model without one forward: the modules that run, with what each gets."""

    calls: tuple[tuple[nn.Module, tuple[Any, ...], dict[str, Any]], ...]


def run(model: nn.Module, example_inputs: Any, count: int) -> Any:
    """Run a model on the first sample of its example input, ``count`` times over.

    Args:
        model: what runs, unless the input is `Calls`.
        example_inputs: see `record`.
        count: batch size.
    """
    if isinstance(example_inputs, Calls):
        out = []
        for module, args, kwargs in example_inputs.calls:
            args, kwargs = samples(place((args, kwargs), model), count)
            out.append(module(*args, **kwargs))
        return out
    args, kwargs = as_call(samples(place(example_inputs, model), count))
    return model(*args, **kwargs)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs -> positional and keyword arguments.

    Args:
        example_inputs: a tensor, a tuple or list of positional inputs, or a dict of keyword inputs.
    """
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def place(example_inputs: Any, model: nn.Module) -> Any:
    """Move example inputs to the model's device, and floating ones to its dtype."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is None:
        return example_inputs

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(reference.device, reference.dtype if value.is_floating_point() else None)

    return tree_map(move, example_inputs)


def samples(example_inputs: Any, count: int) -> Any:
    """The first sample, ``count`` times; inputs without a common first dimension stay as they are."""
    tensors = [t for t in tree_flatten(example_inputs)[0] if isinstance(t, Tensor)]
    if not tensors or any(t.ndim == 0 or t.shape[0] != tensors[0].shape[0] or t.shape[0] == 0 for t in tensors):
        return example_inputs

    def repeat(value: Any) -> Any:
        return value[:1].repeat(count, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value

    return tree_map(repeat, example_inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model inside without a trace: modes, buffers and random state are as before afterwards, errors included."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def record(model: nn.Module, example_inputs: Any) -> Records:
    """Trace a model in the mode that trains and in eval mode.

    Args:
        model: any module; nothing about it changes.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs, on any device.

    Raises:
        TraceError: if the model refuses the example input; the message carries the model's own error.
    """
    from lightning_prune.graph.rules import RULES

    records = Records()
    ran: dict[bool, set[str]] = {}
    with undisturbed(model):
        for training, count in ((True, 2), (False, 1)):
            model.train(training)
            tracer = Tracer(records, model, RULES)
            tracer.counting = not training
            first = len(records.layers)
            try:
                with tracer.paths(), tracer.call, tracer:
                    out = run(model, example_inputs, count)
            except Exception as error:
                shapes = [tuple(t.shape) for t in tree_flatten(_arguments(example_inputs))[0] if isinstance(t, Tensor)]
                raise TraceError(
                    f"{type(model).__name__} does not run on the example input with shapes {shapes} in "
                    f"{'train' if training else 'eval'} mode: {type(error).__name__}: {error}; "
                    "pass example_input= with what its forward takes"
                ) from error
            ran[training] = {layer.module for layer in records.layers[first:]}
            for tensor in output_tensors(out):
                tracer.freeze(tracer.info(tensor).dims, "it is an output of the model")
    records.has_training_branch = bool(ran[True] - ran[False])
    return records


def _arguments(example_inputs: Any) -> Any:
    return [call[1:] for call in example_inputs.calls] if isinstance(example_inputs, Calls) else example_inputs


def output_tensors(value: Any) -> list[Tensor]:
    """All tensors inside an output, also those of dataclasses and named outputs that pytree does not open."""
    found: list[Tensor] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, Sequence) and not isinstance(item, str):
            stack.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, nn.Module):
            stack.extend(vars(item).values())
    return found
