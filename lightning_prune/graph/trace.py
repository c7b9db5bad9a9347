"""Model -> records, by running it: every operator call is followed through a rule on labels.

The model runs on the example input as it stands, under a dispatch mode that sees the operators it really calls, once as
it trains (so that auxiliary heads are there) and once in eval mode with one sample (so that flops are those of the
network that would be shipped). Nothing of the model changes by it: modes, buffers, random state and hooks are put back,
also when the forward raises.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lightning_prune.errors import TraceError
from lightning_prune.graph.attention import standing_in
from lightning_prune.graph.labels import Dim, Ids, Info, full, ids_of, is_tracked, merge, tracked, untracked
from lightning_prune.graph.sizes import Attribute, Form, Read, Size, form_of, leaves, plain

_TORCH = str(Path(torch.__file__).parent) + os.sep
_HERE = str(Path(__file__).parent) + os.sep

# Attributes named like this are taken for the size they are used as, until the first proof.
_NAMES_A_SIZE = re.compile("head|dim|size|width|channel|chs|feature|hidden|embed|group|plane|pad|split")

# Functions of torch that multiply matrices, or pool, by operators fvcore counts, while it counts none for themselves.
_UNCOUNTED = frozenset(
    [
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
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
    is_virtual: bool = False  # no tensor of the model: an axis made with a size that a module holds


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
        call: number of the function call it happened in; -1 where calls are not recorded.
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
    call: int = -1


@dataclass(slots=True)
class CallRecord:
    """One call of a torch function by the model's own code, in eval mode: where it is, and what flows in and out.

    Attributes:
        module: path of the innermost module that ran.
        visit: how often that module was called before.
        name: of the function.
        number: how often this visit of the module had called it before.
        sources: per tensor it got, in order, the call that made it and which of its outputs; None for any other tensor.
        outputs: per tensor it returned, its dimensions.
        function: what was called; ``rest``: its arguments but the first, ``options``: those by keyword. Only where the
            first argument is its one tensor; else None.
        overwritten: whether what it returned is written to later.
    """

    module: str
    visit: int
    name: str
    number: int
    sources: tuple[tuple[int, int] | None, ...] = ()
    outputs: tuple[tuple[Dim, ...], ...] = ()
    function: Callable[..., Any] | None = None
    rest: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    overwritten: bool = False


@dataclass(slots=True)
class Term:
    """A summand of the flops: ``coefficient`` times the product of the current sizes of ``dims``.

    With ``rounded`` fvcore counts it from a figure of four digits (einsum).
    """

    module: str
    operator: str
    coefficient: int
    dims: list[Dim]
    weight: str | None = None
    rounded: bool = False


@dataclass(slots=True)
class Equation:
    """A dimension has the size that a form says; both have to follow a cut alike.

    Attributes:
        dim: as its labels say it.
        form: as the model's code says it.
        where: the module and the line.
    """

    dim: Dim
    form: Form
    where: str


@dataclass
class Records:
    """All that one or more traces of a model have told."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    labels: dict[tuple[str, int], Ids] = field(default_factory=dict)
    size: int = 0
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    inexact: list[tuple[Ids, str]] = field(default_factory=list)
    suspect: list[Ids] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    equations: list[Equation] = field(default_factory=list)
    scalars: list[tuple[Form, str]] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    has_training_branch: bool = False

    def equate(self, dim: Dim, form: Form) -> None:
        """The model's code compares the size of a dimension with another."""
        self.equations.append(Equation(dim, form, ", with which the code compares it"))


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows labels through the operators called inside its context.

    Rules (`lightning_prune.graph.rules`) call its verbs: `same`, `freeze`, `inexact`, `layer`, `flops`.
    """

    def __init__(self, records: Records, model: nn.Module, rules: Mapping[str, Callable[..., None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records = records
        self.counting = False
        self.call = Call(self)
        self.muted = 0
        self.skeleton: Skeleton | None = None
        self._rules = rules
        self._known: dict[Any, tuple[str, Callable[..., None], bool]] = {}
        self._virtual: dict[Attribute, Dim] = {}
        if not records.parameters:
            records.parameters, records.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        parameters, buffers = records.parameters, records.buffers
        self._ndim = {name: p.ndim for name, p in parameters.items()}
        self._infos: dict[tuple[Any, ...], Info] = {}
        self._held: dict[int, Any] = {}  # of all data that was seen
        self.modules = dict(model.named_modules())
        self._paths = {module: name for name, module in self.modules.items()}
        self._path: list[str] = []
        self._visits: list[tuple[int, Counter[str]]] = [(0, Counter())]  # of each module on the path: visit, calls made
        self._visited: Counter[str] = Counter()
        self._made: dict[Any, tuple[int, int]] = {}  # a tensor's data -> the call that made it, which of its outputs
        self._written: dict[int, list[int]] = {}  # a storage -> calls that returned it
        for name, tensor in (*parameters.items(), *buffers.items()):
            dims: list[Dim] = []
            for dim, size in enumerate(tensor.shape):
                if (name, dim) not in records.labels:
                    records.labels[name, dim] = np.arange(records.size, records.size + size)
                    records.slots.append(Slot(name, dim, size, records.size, name in buffers))
                    records.size += size
                dims.append(((size, records.labels[name, dim]),) if size > 1 else ())
            self._infos[self._seen(tensor)] = Info(dims, param=name)
        self._offsets = [slot.offset for slot in records.slots]

    def sized(self, tensor: Tensor, shape: torch.Size) -> torch.Size:
        """The shape of a tensor, with sizes that remember the dimension they were read from."""
        info = self._infos.get(_key(tensor))
        if info is None or not any(ids is not None for dim in info.dims for _, ids in dim):
            return shape
        if info.param is not None:
            self.records.touched.add(info.param)
        return torch.Size(
            [
                Size(n, Read(dim), self.records) if is_tracked(dim) else n
                for n, dim in zip(shape, info.dims, strict=True)
            ]
        )

    def form(self, value: Any) -> Form | None:
        """Where a number of the model's code comes from; None if it is a mere number."""
        return form_of(value, self.records)

    def claim(self, dim: Dim, value: Any) -> None:
        """The model's code says a number for the size of a dimension; where that is a mere number, it is doubtful."""
        form = self.form(value)
        if isinstance(form, Attribute) and not _NAMES_A_SIZE.search(form.name):
            self.suspect([dim])  # it may mean something else as well: how often a loop runs, say
        if form is not None:
            if is_tracked(dim) or any(not isinstance(leaf, Read) or is_tracked(leaf.dim) for leaf in leaves(form)):
                self.records.equations.append(Equation(dim, form, self._where()))
        elif is_tracked(dim):
            self.suspect([dim])

    def made(self, value: Any) -> Dim:
        """The dimension that an operator makes with a number for its size."""
        form = self.form(value)
        if isinstance(form, Read):
            return form.dim
        if isinstance(form, Attribute):
            if form not in self._virtual:
                records = self.records
                slot = Slot(f"attribute:{form}", 0, form.value, records.size, False, is_virtual=True)
                records.size += slot.size
                records.slots.append(slot)
                records.touched.add(slot.name)
                self._virtual[form] = tracked(np.arange(slot.offset, slot.offset + slot.size))
                records.equations.append(Equation(self._virtual[form], form, self._where()))
            return self._virtual[form]
        return untracked(int(value))

    def info(self, tensor: Tensor) -> Info:
        """What is known of a tensor; untracked dimensions if nothing is."""
        found = self._infos.get(_key(tensor))
        if found is None:
            return Info([untracked(size) for size in tensor.shape])
        if found.param is not None:
            self.records.touched.add(found.param)
        return found

    def origin(self, info: Info, makes: Dim) -> str | None:
        """The parameter that a layer's weight is, or was computed from (standardised, say), by the labels it makes."""
        if info.param is not None or len(makes) != 1 or makes[0][1] is None:
            return info.param
        owners = {self._owner(dim) for dim in info.dims if dim}
        name = self._owner(makes)
        return name if owners == {name} else None

    def _owner(self, dim: Dim) -> str | None:
        """The parameter whose whole dimension this is."""
        ids = dim[0][1]
        if len(dim) != 1 or ids is None or ids[0] < 0:
            return None
        slot = self.records.slots[bisect_right(self._offsets, int(ids[0])) - 1]
        whole = len(ids) == slot.size and ids[0] == slot.offset
        return slot.name if whole and self._ndim.get(slot.name, 0) > 1 else None

    @property
    def module(self) -> str:
        """Path of the innermost module that is running."""
        return self._path[-1] if self._path else ""

    def set(self, tensor: Tensor, dims: Sequence[Dim], source: int | None = None, param: str | None = None) -> None:
        """Give a result its labels."""
        self._infos[self._seen(tensor)] = Info(list(dims), source, param)

    def _seen(self, tensor: Tensor) -> tuple[Any, ...]:
        """The identity of a tensor's data, which stays its own; the data itself may go when the model lets go of it."""
        key = _key(tensor)
        if key[0] not in self._held:
            strided = tensor.layout == torch.strided
            self._held[key[0]] = StorageWeakRef(tensor.untyped_storage()) if strided else tensor  # type: ignore[no-untyped-call]
        return key

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

    def couple_grid(self, grid: Ids, axis: int) -> None:
        """What lies at the same index of one axis of a grid of labels is one channel."""
        rows = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
        if len(rows) > 1:
            self._same_ids(np.tile(rows[0], len(rows) - 1), rows[1:].ravel(), "an equal split")

    def couple(self, ids: Ids, parts: int) -> None:
        """The same index of each of ``parts`` equal parts is one channel."""
        rows = ids.reshape(parts, -1)
        if parts > 1:
            self._same_ids(np.tile(rows[0], parts - 1), rows[1:].ravel(), "an equal split")

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

    def begin_call(self, name: str) -> CallRecord | None:
        """Note that the model's code calls a function; None where calls are not recorded."""
        if not self.counting or not self._path:
            return None
        visit, made = self._visits[-1]
        record = CallRecord(self.module, visit, name, made[name])
        made[name] += 1
        self.records.calls.append(record)
        return record

    def end_call(
        self, record: CallRecord, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], before: int, out: Any
    ) -> None:
        """Note what a call got and returned.

        Args:
            before: version of its first argument before it ran; another one now means that it was written to.
        """
        outs = [out] if isinstance(out, Tensor) else _tensors_in((out,))
        if not outs:  # a size, or a number: nothing flows on
            self.records.calls.pop()
            return
        number = len(self.records.calls) - 1
        tensors = _tensors_in(args)
        if kwargs:
            tensors += _tensors_in(kwargs.values())
        made, known = self._made, self._infos
        record.sources = tuple([None if type(x) is nn.Parameter else made.get(_key(x)) for x in tensors])
        if len(tensors) == 1 and args and args[0] is tensors[0]:
            record.function, record.rest, record.options = function, args[1:], dict(kwargs)
        # a dropout that does nothing in eval mode writes in train mode
        if tensors and (tensors[0]._version != before or kwargs.get("inplace") is True):
            for earlier in self._written.get(_storage(tensors[0]), ()):
                self.records.calls[earlier].overwritten = True
        outputs: list[tuple[Dim, ...]] = []
        for i, x in enumerate(outs):
            key = self._seen(x)
            info = known.get(key)
            outputs.append(() if info is None else tuple(info.dims))
            made[key] = number, i
            self._written.setdefault(key[0], []).append(number)
        record.outputs = tuple(outputs)

    def layer(self, record: LayerRecord) -> int:
        """Note a layer; returns its number."""
        record.call = len(self.records.calls) - 1 if self.counting else -1
        self.records.layers.append(record)
        return len(self.records.layers) - 1

    def flops(
        self,
        operator: str,
        coefficient: int,
        dims: Sequence[Dim],
        weight: str | None = None,
        rounded: bool = False,
    ) -> None:
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
        self.records.terms.append(Term(self.module, operator, coefficient, kept, weight, rounded))

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
            if name.endswith("attention.py") and name.startswith(_HERE):  # a stand-in: its caller is the model's line
                frame = frame.f_back  # type: ignore[assignment]
                continue
            if not name.startswith((_TORCH, _HERE, "<")):
                line = f", {Path(name).name}:{frame.f_lineno}"
                break
            frame = frame.f_back  # type: ignore[assignment]
        return f" (in {self.module or 'the model'}{line})"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, rule, in_place = self._known.get(func) or self._lookup(func)
        mutated = args[0] if in_place and args and isinstance(args[0], Tensor) else None
        before = None if mutated is None else (_key(mutated), tuple(mutated.shape), self.info(mutated))
        out = func(*args, **kwargs) if self.skeleton is None else self.skeleton(func, args, kwargs)
        if self.muted:
            return out
        if mutated is not None and before is not None and _key(mutated) != before[0]:
            self._relaid(mutated, before[1], before[2], name)
            return out
        if "out" in kwargs:  # what was written to is `out` already
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        rule(self, name, out, *args, **kwargs)
        return out

    def _lookup(self, func: Any) -> tuple[str, Callable[..., None], bool]:
        """An operator's name, its rule, and whether it works in place."""
        name = func._schema.name.removeprefix("aten::")
        rule = self._rules.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self._rules["pointwise"]
        if rule is None and name.endswith("_"):
            rule = self._rules.get(name[:-1])
        self._known[func] = name, rule or self._rules["unknown"], name.endswith("_")
        return self._known[func]

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
            path = self._paths.get(module)
            if path is None:
                self._visits.append(self._visits[-1])
            else:
                self._visits.append((self._visited[path], Counter()))
                self._visited[path] += 1
            self._path.append(self.module if path is None else path)

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if self._path:
                self._path.pop()
                self._visits.pop()

        try:
            with around_modules(enter, leave):
                yield
        finally:
            self._path.clear()


@contextmanager
def around_modules(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Call functions before and after whatever module runs, by global hooks, so that no module is touched.

    Args:
        enter: (module, args), before it runs.
        leave: (module, args, output), after it; also if it raised.
    """
    first = nn.modules.module.register_module_forward_pre_hook(enter)
    second = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        first.remove()
        second.remove()


class Call(TorchFunctionMode):
    """Remembers which torch function the model called, and with what numbers; its operators alone do not tell."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.name = ""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.functions: Mapping[str, Callable[..., None]] = {}
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            out = func(*args, **kwargs)
            return self._tracer.sized(args[0], out) if type(out) is torch.Size else out
        if name in ("size", "numel", "nelement", "__len__"):
            return self._size(name, func, args, kwargs)
        if self._tracer.skeleton is not None:
            args, kwargs = _without_noise(name, args, kwargs)
        outer = self.name, self.args, self.kwargs
        self.name, self.args, self.kwargs = name, args, kwargs
        followed = self.functions.get(name)
        record = self._tracer.begin_call(name)
        before = args[0]._version if args and isinstance(args[0], Tensor) else 0
        try:
            if name in _ARITHMETIC:
                self._note_scalars(args)
            if followed is None:
                out = func(*args, **kwargs)
            else:
                self._tracer.muted += 1
                try:
                    out = func(*args, **kwargs)
                finally:
                    self._tracer.muted -= 1
                kwargs.pop("out", None)  # what was written to is `out` already
                followed(self._tracer, name, out, *args, **kwargs)
            if record is not None:
                self._tracer.end_call(record, func, args, kwargs, before, out)
            return out
        finally:
            self.name, self.args, self.kwargs = outer

    def _size(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if not isinstance(args[0], Tensor):
            return out
        shape = self._tracer.sized(args[0], args[0].shape)
        if name == "__len__":
            return out  # Python makes a plain integer of it
        if name != "size":
            dims = self._tracer.info(args[0]).dims
            return Size(out, Read(merge(dims)), self._tracer.records) if any(map(is_tracked, dims)) else out
        if isinstance(out, torch.Size):
            return shape
        return shape[args[1] if len(args) > 1 else kwargs["dim"]]

    def _note_scalars(self, args: tuple[Any, ...]) -> None:
        """A tensor is computed with a size: its values depend on how many channels there are."""
        for value in args:
            form = self._tracer.form(value)
            if form is not None:
                self._tracer.records.scalars.append((form, f"its size is computed with{self._tracer._where()}"))

    def sizes(self, ndim: int) -> list[Any] | None:
        """The numbers a view or the like was called with, one per dimension; None if the function takes none."""
        if self.name not in ("view", "reshape", "expand", "zeros", "ones", "full", "empty", "rand", "randn",
                             "new_zeros", "new_ones", "new_empty", "new_full", "repeat"):  # fmt: skip
            return self._unflattened(ndim) if self.name == "unflatten" else None
        rest = self.args[1:] if self.args and isinstance(self.args[0], Tensor) else self.args
        if rest and isinstance(rest[0], (list, tuple)):
            rest = tuple(rest[0])
        elif not rest:
            rest = tuple(self.kwargs.get("shape", self.kwargs.get("size", ())))
        return list(rest) if len(rest) == ndim and all(isinstance(n, int) for n in rest) else None

    def _unflattened(self, ndim: int) -> list[Any] | None:
        x, *rest = self.args
        dim = rest[0] if rest else self.kwargs["dim"]
        sizes = rest[1] if len(rest) > 1 else self.kwargs["sizes"]
        dim %= x.ndim
        out = [None] * dim + list(sizes) + [None] * (x.ndim - dim - 1)
        return out if len(out) == ndim else None


_ARITHMETIC = frozenset(
    name.format(kind)
    for kind in ("add", "sub", "mul", "div", "truediv", "true_divide", "pow")
    for name in ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
)

# Functions with a flag that makes their result depend on chance, or on the other samples: its place among arguments.
_NOISE = {
    "batch_norm": ("training", 5),
    "dropout": ("training", 2),
    "dropout1d": ("training", 2),
    "dropout2d": ("training", 2),
    "dropout3d": ("training", 2),
    "alpha_dropout": ("training", 2),
    "feature_alpha_dropout": ("training", 2),
}


def _without_noise(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that make a norm use its own statistics and a dropout do nothing, where that is possible."""
    if name not in _NOISE:
        return args, kwargs
    key, place = _NOISE[name]
    statistics = args[1] if len(args) > 1 else kwargs.get("running_mean")
    if name == "batch_norm" and statistics is None:
        return args, kwargs
    if len(args) > place:
        return (*args[:place], False, *args[place + 1 :]), kwargs
    return args, {**kwargs, key: False}


class Skeleton:
    """Runs a model a second time without its heavy operators: what they return has the shape it had the first time.

    Args:
        shapes: of outputs, by operator and shapes of its inputs; filled while ``learning``.
    """

    heavy = frozenset(["aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"])

    def __init__(self) -> None:
        self.learning = True
        self.depends_on_values = False
        self._known: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, or not."""
        name = func._schema.name
        if name not in self.heavy:
            if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "torchvision::nms"):
                self.depends_on_values = True
            return func(*args, **kwargs)
        key = (name, *(_signature(a) for a in args), *((k, _signature(v)) for k, v in kwargs.items()))
        if self.learning:
            out = func(*args, **kwargs)
            self._known[key] = tuple(out.shape), out.stride(), out.dtype, out.device
            return out
        if key not in self._known:
            return func(*args, **kwargs)
        shape, stride, dtype, device = self._known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(value) if isinstance(value, list) else value


# Of torch's own modules, those whose forward reads sizes that they hold; others follow by the shapes of their weights.
_HOLD_SIZES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Transformer, nn.Unflatten)


@contextmanager
def remembered_sizes(model: nn.Module, trace: object) -> Iterator[None]:
    """The integers that modules hold remember, inside, that they are attributes; put back afterwards."""
    before: list[tuple[dict[str, Any], str, Any, Any]] = []
    theirs: list[dict[str, Any]] = []
    try:
        for path, module in model.named_modules():
            own = type(module).__module__.startswith("torch.nn.modules")
            if own and not isinstance(module, _HOLD_SIZES):
                continue
            held = vars(module)
            theirs.append(held)
            for name, value in list(held.items()):
                if type(value) is int and value > 1:
                    new: Any = Size(value, Attribute(path, name, None, value), trace)
                elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                    new = type(value)(
                        Size(v, Attribute(path, name, i, v), trace) if v > 1 else v for i, v in enumerate(value)
                    )
                else:
                    continue
                before.append((held, name, value, new))
                held[name] = new
        yield
    finally:
        for held, name, value, new in before:
            if held.get(name) is new:
                held[name] = value
        for held in theirs:  # what the forward itself kept of sizes it saw
            for name, value in list(held.items()):
                if (number := plain(value)) is not value:
                    held[name] = number


@contextmanager
def watched_mode() -> Iterator[list[str]]:
    """Lists the files, other than torch's own, whose code asks a module whether it is training."""
    seen: list[str] = []

    def get(module: nn.Module) -> bool:
        name = sys._getframe(1).f_code.co_filename
        if not name.startswith(_TORCH):
            seen.append(name)
        return bool(vars(module).get("training", True))

    def put(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield seen
    finally:
        del nn.Module.training


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors in arguments, in order; also in lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_in(value)
        elif isinstance(value, dict):
            found += _tensors_in(value.values())
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """Identity of the data a tensor shows: two views of the same memory in the same layout are the same."""
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


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
    """The first sample, ``count`` times; inputs without a common first dimension stay as they are.

    Lists of images (C, H, W), and lists beside them with an entry an image, as detection models take them, are cut to
    their first entries.
    """
    parts = [p for p in as_call(example_inputs)[0] if p is not None]
    if parts and all(isinstance(p, list) and p and len(p) == len(parts[0]) for p in parts) and _images(parts[0]):
        return tuple(p[:1] * count if isinstance(p, list) else p for p in as_call(example_inputs)[0])
    tensors = [t for t in tree_flatten(example_inputs)[0] if isinstance(t, Tensor)]
    if not tensors or any(t.ndim == 0 or t.shape[0] != tensors[0].shape[0] or t.shape[0] == 0 for t in tensors):
        return example_inputs

    def repeat(value: Any) -> Any:
        return value[:1].repeat(count, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value

    return tree_map(repeat, example_inputs)


def _images(values: Sequence[Any]) -> bool:
    return all(isinstance(v, Tensor) and v.ndim == 3 and v.shape[0] in (1, 3) and min(v.shape) < 4 for v in values)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model inside without a trace: modes, buffers and random state are as before afterwards, errors included."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers = [(b, b.detach().clone()) for module in modules for b in module._buffers.values() if b is not None]
    devices = sorted(
        {p.device.index or 0 for m in modules for p in m._parameters.values() if p is not None and p.is_cuda}
    )
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # what was compiled, modules and functions, runs as it was before
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, mode in modes:
                if module.training != mode:
                    module.training = mode
            for buffer, value in buffers:
                if buffer.shape == value.shape:
                    buffer.data.copy_(value)  # not noticed by a graph that is still to be differentiated


def record(model: nn.Module, example_inputs: Any) -> Records:
    """Trace a model in eval mode, and in the mode that trains where its code makes a difference between them.

    Args:
        model: any module; nothing about it changes.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs, on any device.

    Raises:
        TraceError: if the model refuses the example input; the message carries the model's own error.
    """
    records = Records()
    skeleton = Skeleton()
    with undisturbed(model), standing_in(model), remembered_sizes(model, records):
        with watched_mode() as asked:
            _pass(model, example_inputs, records, False, 1, skeleton)
        layers = len(records.layers)
        evaluated = {layer.module for layer in records.layers}
        if asked:
            skeleton.learning = False
            before = Records(**{f.name: _copied(getattr(records, f.name)) for f in fields(Records)})
            try:
                if skeleton.depends_on_values:
                    raise _NeedsValues
                _pass(model, example_inputs, records, True, 1, skeleton)
            except (TraceError, _NeedsValues):
                for f in fields(Records):
                    setattr(records, f.name, getattr(before, f.name))
                _pass(model, example_inputs, records, True, 2, None)
            records.has_training_branch = bool({layer.module for layer in records.layers[layers:]} - evaluated)
    return records


class _NeedsValues(Exception):
    """A model whose control flow depends on values cannot run without its heavy operators."""


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, set, dict)) else value


def _pass(
    model: nn.Module, example_inputs: Any, records: Records, training: bool, count: int, skeleton: Skeleton | None
) -> None:
    """Run a model once and follow its labels."""
    from lightning_prune.graph.rules import FUNCTIONS, RULES

    model.train(training)
    tracer = Tracer(records, model, RULES)
    tracer.call.functions = FUNCTIONS
    tracer.counting = not training
    tracer.skeleton = skeleton
    try:
        with tracer.paths(), tracer.call, tracer:
            out = run(model, example_inputs, count)
    except Exception as error:
        shapes = [tuple(t.shape) for t in tree_flatten(_arguments(example_inputs))[0] if isinstance(t, Tensor)]
        given = f"shapes {shapes}" if shapes else "no tensor in it"
        raise TraceError(
            f"{type(model).__name__} does not run on the example input with {given} in "
            f"{'train' if training else 'eval'} mode: {type(error).__name__}: {error}; "
            "pass example_input= with what its forward takes"
        ) from error
    for tensor in output_tensors(out):
        tracer.freeze(tracer.info(tensor).dims, "it is an output of the model")


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
