"""Cut parameters and buffers of a model, in place.

A cut is applied and proved (`lightning_prune.proof`), or taken back whole. `Parameter` objects, their hooks and their
places in optimizers stay the same: only the storage behind them is exchanged.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune import proof
from lightning_prune.absorb import Absorbed, for_cut
from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, UnsafeCut
from lightning_prune.factorise import factorise, in_form_of, is_pair_of, put_back
from lightning_prune.graph import groups as _groups
from lightning_prune.graph.attention import restore, swap
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.optimizers import Cut, check, follow
from lightning_prune.report import Report

_graphs: WeakKeyDictionary[nn.Module, ChannelGraph] = WeakKeyDictionary()
_applied: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()
_stand_ins: WeakSet[nn.Module] = WeakSet()  # modules swapped here
_dense_attributes: WeakKeyDictionary[nn.Module, dict[tuple[str, str], Any]] = WeakKeyDictionary()  # before any cut
_largest: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()  # shapes before any cut
_IN_CACHE = 2**18  # entries that a processor's cache holds; going through main memory costs more than the copy
_SMALL = 1e-2  # a constant below is taken for a start near zero (layer scale), at which a branch would not be seen


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Trace a model, find what may be cut out of it, and prove what is doubtful.

    Where the model's own code may hold a size as a number (a view, a split), only the cut model can tell: such groups
    are cut on trial, and frozen if that goes wrong. The model is left as it was.

    Args:
        model: any module that runs on the example inputs.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs, on any device.

    Returns:
        The graph, with its `groups`, what is `frozen` and why, `explain()` and `cost(plan)`.

    Raises:
        TraceError: if the model does not run on the example inputs.
    """
    graph = settle(_groups.trace(model, example_inputs))
    _graphs[model] = graph
    return graph


def cut(
    model: nn.Module,
    plan: Plan,
    optimizers: Iterable[Optimizer] = (),
    *,
    example_inputs: Any = None,
    verify: str = "first",
    graph: ChannelGraph | None = None,
    since: Plan | None = None,
    absorb: bool | float | Absorbed = True,
) -> Report:
    """Cut a model down to a plan, in place; its optimizers follow.

    Args:
        model: the model the plan was made for, dense or cut by an earlier plan of the same run.
        plan: what is kept, in indices of the dense model, or of the model as it is now if it was traced again.
        optimizers: their state is sliced with the parameters; groups, learning rates and schedulers stay.
        example_inputs: what the proof runs on; by default what `trace` was given for this model.
        verify: "first" (prove the first cut of this model), "always", or "never".
        graph: the model's graph; by default the one `trace` made for it.
        since: the plan it has been cut to before; by default what `cut` did to it last.
        absorb: whether constants of channels that go are added to what their readers make (`lightning_prune.absorb`),
            so that the function stays as it was; a number takes near-constant channels as well, up to that tolerance.

    Returns:
        What was cut, with costs before and after (flops are 0 if the model was never traced).

    Raises:
        UnsafeCut: if the cut model does not run, or computes something else; it is then exactly as before.
        ValueError: if the plan does not fit the model, or an optimizer has a state that cannot follow.
    """
    if verify not in ("first", "always", "never"):
        raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
    if plan.ranks:
        raise ValueError("ranks are not cut: lightning_prune.conform(model, plan) puts two thin layers in place of one")
    started = time.perf_counter()
    graph = graph or _graphs.get(model)
    earlier = _applied.get(model) or Plan()
    modules = dict(model.named_modules())
    tensors = _tensors(modules)
    if since is None:
        since = Plan() if _is_of_now(tensors, plan, earlier) else earlier
    before = graph.cost(since) if graph is not None else _params_only(model)
    inputs = graph.example_inputs if example_inputs is None and graph is not None else example_inputs
    proved = verify != "never" and (verify == "always" or since.is_empty)
    if proved and inputs is None:
        warnings.warn("the cut is not proved: this model was not traced; pass example_inputs=", stacklevel=2)
        proved = False
    optimizers = list(optimizers)
    operation = _Operation(model, plan, since, modules)
    _shapes_before_any_cut(model, tensors)
    check(optimizers, operation.parameters())
    found = absorb if isinstance(absorb, Absorbed) else for_cut(model, plan, graph, absorb, inputs, since)
    if proved:
        _warn_of(proof.prove(operation, inputs, graph is None or graph.has_training_branch), graph, plan)
    else:
        operation.apply()
    if optimizers:
        follow(optimizers, operation.cuts())
    operation.finish()
    if found:
        found.add_to(model, operation.kept)
    _applied[model] = plan if since == earlier else compose(earlier, plan)
    return Report(
        before=before,
        after=graph.cost(plan) if graph is not None else _params_only(model),
        groups=dict(plan.groups),
        removed=operation.removed(),
        frozen=dict(graph.frozen) if graph is not None else {},
        seconds=time.perf_counter() - started,
    )


def _warn_of(seen: proof.Proof, graph: ChannelGraph | None, plan: Plan) -> None:
    """Say what a proof left open, unless the graph said it before."""
    if not seen.compared:
        warnings.warn("the model is on the meta device: the cut was seen to run, but no value compared", stacklevel=3)
    if seen.inexact and graph is not None:
        cut_groups = [g for g in graph.groups if plan.groups.get(g.name, (g.size, 0))[0] < g.size]
        if all(group.exact for group in cut_groups):
            warnings.warn(
                f"the cut network differs from the one with these channels at zero: {seen.inexact[0]}", stacklevel=3
            )


def _swap(module: nn.Module) -> bool:
    """Put a stand-in in place of a module that has one, and remember who did; whether that was so."""
    swapped = swap(module)
    if swapped:
        _stand_ins.add(module)
    return swapped


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters, then buffers, by name, each once; of a model's modules by path."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for path, module in modules.items():
            for key, tensor in getattr(module, kind).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensors[f"{path}.{key}" if path else key] = tensor
    return tensors


def _with_attributes(model: nn.Module, named: Mapping[str, nn.Module], plan: Plan) -> dict[str, nn.Module]:
    """The modules, of all by name, that a plan names attributes of."""
    if missing := next((name for name in plan.attributes if name not in named), None):
        raise ValueError(f"the plan names attributes of {missing!r}, which {type(model).__name__} does not have")
    _check_sizes(named, plan)
    return {name: named[name] for name in plan.attributes}


def _check_sizes(named: Mapping[str, nn.Module], plan: Plan) -> None:
    """Refuse a plan that would set what is no size of a module: a stranger's may name ``forward``, or ``weight``."""
    for name, values in plan.attributes.items():
        module = named.get(name)
        for key, value in values.items() if module is not None else ():
            now = getattr(module, key, 0)  # what it does not have may come with the cut
            if not isinstance(now, int | tuple | list) or isinstance(now, bool):
                raise ValueError(
                    f"the plan sets {key!r:.40} of module {name!r} to {value}; that is no size but {type(now).__name__}"
                )


def _holders(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[nn.Module]:
    """Modules, of all by name, that hold, somewhere inside, what these names name."""
    paths: set[str] = set()
    for name in names:
        while name and name not in paths:
            paths.add(name)
            name = name.rpartition(".")[0]
    return [module for path, module in modules.items() if path in paths or not path]


def _is_of_now(tensors: Mapping[str, Tensor], plan: Plan, earlier: Plan) -> bool:
    """Whether a plan speaks of the model as it is now, traced again after an earlier cut, not of the dense one."""
    return not earlier.is_empty and all(
        name in tensors and tuple(tensors[name].shape) == shape for name, shape in plan.shapes.items()
    )


def _params_only(model: nn.Module) -> Cost:
    return Cost(0, sum(p.numel() for p in model.parameters()), {})


class _Operation:
    """A cut that can be applied, zeroed and taken back.

    Args:
        model: dense, or cut to ``since``.
        plan: where to go, in dense indices.
        since: where the model is now.
        modules: its modules by path, if they are at hand.

    Raises:
        ValueError: if the model's tensors do not have the shapes the plans speak of.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, since: Plan, modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.model = model
        self.plan = plan
        self.since = since
        modules = dict(model.named_modules()) if modules is None else modules
        tensors = _tensors(modules)
        self.kept = plan.relative_to(since)
        self._tensors: dict[str, Tensor] = {}
        for name in plan.shapes:
            if name not in tensors:
                raise ValueError(f"the plan names {name!r}, which {type(model).__name__} does not have")
            shape = since.current_shape(name) if name in since.shapes else plan.shapes[name]
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensors[name].shape)}, but the plan was made for {shape}; "
                    "pass since= if the model was cut before"
                )
        for name in self.kept:
            self._tensors[name] = tensors[name]
        self._shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        self._originals = {name: t.detach() for name, t in self._tensors.items()}
        self._trial: dict[str, Tensor] = {}
        self._alone = _alone(tensors.values())
        self._left: dict[str, Tensor] = {}  # of parameters, with their own values
        self._zeroed: list[tuple[Tensor, int, Tensor, Tensor]] = []  # tensor, dimension, indices, what was there
        self._complements: dict[tuple[int, int], Tensor] = {}
        self._modules = _with_attributes(model, modules, plan)
        self._holders = _holders(modules, [*plan.attributes, *plan.shapes])
        self._attributes = {
            (name, key): getattr(module, key, None)
            for name, module in self._modules.items()
            for key in plan.attributes[name]
        }
        self._swapped: list[nn.Module] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: t for name, t in self._tensors.items() if isinstance(t, nn.Parameter)}

    @contextmanager
    def trial_values(self) -> Iterator[None]:
        """Random values, the same ones dense and cut, in place of tensors that are constant.

        A norm that is still at one, or a last layer at zero, would hide a wrong index from the proof.
        """
        generator = torch.Generator().manual_seed(0)
        others: list[tuple[Tensor, Tensor]] = []
        try:
            for name, tensor in _tensors(dict(self.model.named_modules())).items():
                if not tensor.is_floating_point() or tensor.is_meta or not proof.is_constant(tensor):
                    continue
                value = float(tensor.detach().flatten()[0])
                scale = abs(value) if abs(value) > _SMALL else 0.1  # as large a part of the output as others have
                drawn = torch.rand(tensor.shape, generator=generator) - 0.5
                self._trial[name] = (drawn.double() * scale + value).to(tensor)
                if name not in self._tensors:
                    others.append((tensor, tensor.detach()))
                    with torch.no_grad():
                        _exchange(tensor, self._trial[name])
            yield
        finally:
            self._trial.clear()
            with torch.no_grad():
                for tensor, original in others:
                    _exchange(tensor, original)

    def _value(self, name: str) -> Tensor:
        return self._trial.get(name, self._originals[name])

    def apply(self) -> None:
        """Exchange the storages for smaller ones, and rewrite the attributes that hold sizes.

        A module whose own forward would not read them gets its stand-in.
        """
        self._swapped += [module for module in self._holders if _swap(module)]
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                _exchange(tensor, self._cut(name))
        for name, module in self._modules.items():
            for key, value in self.plan.attributes[name].items():
                setattr(module, key, value)

    def _cut(self, name: str) -> Tensor:
        """What is left of a tensor; of a parameter's own values it is made once, to be tried and to stay."""
        if name in self._trial or not isinstance(self._tensors[name], nn.Parameter):
            return _select(self._value(name), self.kept[name])
        if name not in self._left:
            self._left[name] = _select(self._originals[name], self.kept[name])
        return self._left[name]

    def zero(self, nearly: float = 0.0) -> None:
        """Instead of cutting: removed coordinates at zero, in parameters and in buffers of floating numbers.

        In place, where nothing else shows the same memory: only what was there is copied, not the whole model.

        Args:
            nearly: a value to put there instead, for layers that divide by a weight's length.
        """
        with torch.no_grad():
            self._put_back()
            for name, tensor in self._tensors.items():
                if not tensor.is_floating_point():
                    continue
                in_place = name not in self._trial and id(tensor) in self._alone
                if not in_place:
                    _exchange(tensor, self._value(name).clone())
                for dim, kept in self.kept[name].items():
                    gone = self._complement(kept, tensor.shape[dim]).to(tensor.device)
                    if in_place:
                        self._zeroed.append((tensor, dim, gone, tensor.index_select(dim, gone)))
                    tensor.index_fill_(dim, gone, nearly)

    def _put_back(self) -> None:
        """Undo what was zeroed in place, the last first: later ones saw zeros of earlier ones."""
        for tensor, dim, gone, values in reversed(self._zeroed):
            tensor.index_copy_(dim, gone, values)
        self._zeroed.clear()

    def _complement(self, kept: Tensor, size: int) -> Tensor:
        """Many dimensions have their indices in common."""
        same = id(kept), size
        if same not in self._complements:
            self._complements[same] = _complement(kept, size)
        return self._complements[same]

    def gone(self) -> dict[int, Tensor]:
        """Identity of a tensor of one dimension -> the indices that go."""
        return {
            id(tensor): self._complement(self.kept[name][0], self._shapes[name][0])
            for name, tensor in self._tensors.items()
            if tensor.ndim == 1 and 0 in self.kept[name]
        }

    def again(self) -> _Operation:
        """Return the same operation on the model's tensors as they are now, in double precision say."""
        return _Operation(self.model, self.plan, self.since)

    def undo(self) -> None:
        """Everything as before."""
        with torch.no_grad():
            self._put_back()
            for name, tensor in self._tensors.items():
                _exchange(tensor, self._originals[name])
        while self._swapped:
            _stand_ins.discard(self._swapped[-1])
            restore(self._swapped.pop())
        for (name, key), value in self._attributes.items():
            if value is None:  # it came with the cut, or with a stand-in
                vars(self._modules[name]).pop(key, None)
            else:
                setattr(self._modules[name], key, value)

    def finish(self) -> None:
        """Gradients follow, and what the attributes were in the dense model is remembered."""
        dense = _dense_attributes.setdefault(self.model, {})
        for at, value in self._attributes.items():
            dense.setdefault(at, value)
        for name, tensor in self._tensors.items():
            if tensor.grad is not None:
                grad = tensor.grad
                tensor.grad = None
                tensor.grad = _select(grad, self.kept[name])

    def cuts(self) -> list[Cut]:
        return [Cut(name, p, self._shapes[name], self.kept[name]) for name, p in self.parameters().items()]

    def removed(self) -> dict[str, dict[int, int]]:
        return {
            name: {dim: self._shapes[name][dim] - kept.shape[0] for dim, kept in dims.items()}
            for name, dims in self.kept.items()
        }


def _alone(tensors: Iterable[Tensor]) -> set[int]:
    """Identities of the tensors that fill memory of their own, each entry once, with no other of them in it."""
    every = [t for t in tensors if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided]
    held = Counter(tensor.untyped_storage()._cdata for tensor in every)
    return {
        id(tensor)
        for tensor in every
        if held[tensor.untyped_storage()._cdata] == 1 and tensor.untyped_storage().nbytes() == tensor.nbytes
    }


def _exchange(tensor: Tensor, new: Tensor) -> None:
    """Put another storage behind a tensor; under ``no_grad``, so that older graphs notice and DDP need not be told."""
    tensor.set_(new)  # type: ignore[call-overload]


def _format_of(tensor: Tensor) -> torch.memory_format:
    """Whether a tensor's channels lie last in memory."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    is_last = last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)
    return last if last is not None and is_last else torch.contiguous_format


def _select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept slices, in the tensor's own memory format."""
    last = _format_of(tensor)
    if len(kept) > 1 and tensor.is_cpu and tensor.numel() > _IN_CACHE:
        return _select_in_pieces(tensor, kept, last)
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous(memory_format=last)


def _select_in_pieces(tensor: Tensor, kept: Mapping[int, Tensor], memory_format: torch.memory_format) -> Tensor:
    """The kept slices, so many at a time that what lies between two dimensions' selection stays in the cache."""
    outer, *inner = sorted(kept)
    shape = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(tensor.shape)]
    new = torch.empty(shape, dtype=tensor.dtype, memory_format=memory_format)
    start = 0
    for index in torch.split(kept[outer], max(1, _IN_CACHE * tensor.shape[outer] // tensor.numel())):
        piece = tensor.index_select(outer, index)
        for dim in inner:
            piece = piece.index_select(dim, kept[dim])
        new.narrow(outer, start, len(index)).copy_(piece)
        start += len(index)
    return new


def _complement(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().squeeze(1)


def difference(model: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """Largest relative difference between a cut network and the same one with the removed coordinates zeroed.

    The model is left as it was. Norms across channels, choices and numbers derived from widths are left as they are, so
    that the figure is what a user sees. Outputs whose shape differs are left out; NaN if there is no other.
    """
    return proof.difference(_Operation(model, plan, _applied.get(model) or Plan()), example_inputs)


def settle(
    graph: ChannelGraph, names: Iterable[str] | None = None, keep: Mapping[str, Tensor] | None = None
) -> ChannelGraph:
    """Cut doubtful groups on trial, freeze those that go wrong, and mark those that are inexact; found by bisection.

    Args:
        graph: of a model that is as it was when traced.
        names: groups to try; by default those the trace marked as doubtful.
        keep: group -> (C,) bool, what to try; by default every other channel goes.

    Returns:
        The graph without the groups that failed; their reasons are in `frozen`.
    """
    doubtful = [g.name for g in graph.groups if g.name in (graph.suspects if names is None else set(names))]
    failed: dict[str, str] = {}
    inexact: dict[str, str] = {}

    def attempt(some: Sequence[str]) -> None:
        if not some:
            return
        trial = {name: (keep or {}).get(name, torch.arange(graph.group(name).size) % 2 == 0) for name in some}
        reason = ""
        try:
            operation = _Operation(graph.model, graph.plan(trial), Plan())
            seen = proof.prove(operation, graph.example_inputs, graph.has_training_branch)
            operation.undo()
            if not seen.inexact or not any(graph.group(name).exact for name in some):
                return
        except (UnsafeCut, ValueError) as error:
            seen, reason = None, f"a trial cut failed: {str(error).splitlines()[0]}"
        if len(some) > 1:
            attempt(some[: len(some) // 2])
            attempt(some[len(some) // 2 :])
        elif seen is None:
            failed[some[0]] = reason
        else:
            inexact[some[0]] = seen.inexact[0]

    attempt(doubtful)
    if inexact:
        graph = replace(
            graph,
            groups=tuple(
                replace(g, exact=False, inexact_because=inexact[g.name]) if g.name in inexact else g
                for g in graph.groups
            ),
        )
    return graph.without(failed) if failed else graph


def conform(
    model: nn.Module, state_dict: Mapping[str, Any] | Plan, plan: Plan | None = None, *, values: bool = True
) -> nn.Module:
    """Give a model the shapes of a pruned state dict, so that it loads; it may shrink or grow.

    Args:
        model: dense, or cut to another plan. Where a tensor shrinks and the plan is known its kept values stay; where
            one grows the new entries are zero until the state is loaded. A layer that the state has as two thin ones
            becomes two, and the other way round.
        state_dict: the state to be loaded, or a plan alone; at its ranks layers are factorised with their values.
        plan: the plan of that state, which also says module attributes; without it they are told from shapes.
        values: False leaves what changes its shape without values, as the state is loaded at once.

    Returns:
        The same model.

    Raises:
        IncompatibleCheckpoint: if the state is of another architecture; nothing has changed then.
    """
    if isinstance(state_dict, Plan):
        plan, state = state_dict, {name: state_dict.current_shape(name) for name in state_dict.shapes}
    else:
        state = {name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)}
    with in_form_of(model, state):
        tensors = _tensors(dict(model.named_modules()))
        missing = [name for name in tensors if name not in state and not isinstance(state_dict, Plan)]
        missing = [name for name in missing if name in model.state_dict()]
        ranks = state_dict.ranks if isinstance(state_dict, Plan) else {}
        if missing or not (ranks or any(name in tensors for name in state)):
            raise IncompatibleCheckpoint(
                f"the state is not of a {type(model).__name__}: it lacks {missing[:3] or 'every parameter'}"
            )
        whole = {name: rank for name, rank in ranks.items() if not is_pair_of(model, name, rank)}
        try:
            replaced = factorise(model, whole)
        except ValueError as error:
            raise IncompatibleCheckpoint(f"the plan is not of a {type(model).__name__}: {error}") from error
        try:
            reshape_like(model, state, plan, values=values)
        except IncompatibleCheckpoint:
            put_back(model, replaced)
            raise
    return model


def reshape_like(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    plan: Plan | None,
    dense_again: bool = False,
    values: bool = True,
) -> list[str]:
    """Exchange storages where shapes differ; returns the names of the tensors that changed.

    Args:
        model: dense, or cut.
        shapes: what is wanted, by parameter and buffer name.
        plan: the plan those shapes come from, if it is known.
        dense_again: the shapes are known to be of the dense model, which a cut one grows back to.
        values: False leaves what changes without values, which takes less time where a state follows.

    Raises:
        IncompatibleCheckpoint: if a tensor has another number of dimensions, or the plan contradicts the shapes.
    """
    modules = dict(model.named_modules())
    tensors = _tensors(modules)
    try:
        _check_sizes(modules, plan or Plan())
    except ValueError as error:
        raise IncompatibleCheckpoint(str(error)) from error
    changed = {n: s for n, s in shapes.items() if n in tensors and tuple(tensors[n].shape) != tuple(s)}
    largest = _shapes_before_any_cut(model, tensors)
    for name, shape in changed.items():
        now = tuple(tensors[name].shape)
        if len(shape) != len(now) or 0 in shape:
            raise IncompatibleCheckpoint(f"{name!r} has shape {now} in the model and {shape} in the state")
        whole = tuple(shape) if plan is None or name not in plan.shapes else plan.shapes[name]
        if any(s > n for s, n in zip(whole, largest[name], strict=True)):
            raise IncompatibleCheckpoint(
                f"{name!r} has shape {now} in the model and the larger {whole} in the state, which pruning never makes"
            )
        if (
            plan is not None
            and not dense_again
            and (name not in plan.shapes or plan.current_shape(name) != tuple(shape))
        ):
            told = plan.current_shape(name) if name in plan.shapes else now
            raise IncompatibleCheckpoint(f"{name!r} has shape {shape} in the state, but its plan says {told}")
    owners = {name.rpartition(".")[0] for name in changed}
    attributes = {} if plan is None else {name: v for name, v in plan.attributes.items() if name in modules}
    for module in _holders(modules, [*attributes, *changed]):
        _swap(module)  # which reads sizes, so before they change
    with torch.no_grad():
        for name, shape in changed.items():
            tensor = tensors[name]
            dense = plan is not None and tuple(tensor.shape) == plan.shapes.get(name)
            kept = (plan.kept.get(name) or plan.buffers.get(name) or {}) if plan is not None else {}
            if not values:
                new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=_format_of(tensor))
            else:
                new = _select(tensor.detach(), kept) if dense else _resized(tensor.detach(), shape)
            tensor.grad = None
            _exchange(tensor, new)
    for owner in owners:
        told_from_shape(modules[owner])
    dense_values = _dense_attributes.setdefault(model, {})
    for name, sizes in attributes.items():
        for key, value in sizes.items():
            dense_values.setdefault((name, key), getattr(modules[name], key, None))
            setattr(modules[name], key, value)
    _dense_again(model, {name for name, _ in dense_values} - set(attributes))
    if plan is not None:
        _applied[model] = plan
    return list(changed)


def _dense_again(model: nn.Module, names: Iterable[str]) -> None:
    """Modules all of whose tensors have their first shapes again get their first attributes, and their own class."""
    modules = dict(model.named_modules())
    now = _tensors(modules)
    largest = _shapes_before_any_cut(model, now)
    for name in names:
        prefix = f"{name}." if name else ""
        if any(tuple(now[n].shape) != largest[n] for n in now if n.startswith(prefix)):
            continue
        for (owner, key), value in _dense_attributes[model].items():
            if owner == name and value is not None:
                setattr(modules[name], key, value)
        if modules[name] in _stand_ins:
            restore(modules[name])
            _stand_ins.discard(modules[name])


def _shapes_before_any_cut(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors, by name, as they were when it was seen first."""
    known = _largest.setdefault(model, {})
    for name, tensor in tensors.items():
        known.setdefault(name, tuple(tensor.shape))
    return known


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    new = tensor.new_zeros(shape)
    overlap = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    new[overlap] = tensor[overlap]
    return new


def told_from_shape(layer: nn.Module) -> None:
    """Rewrite the attributes of a layer that hold sizes, as its weight's shape says."""
    module: Any = layer
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = getattr(module, "running_mean", None)
    if not isinstance(weight, Tensor):
        return
    if hasattr(module, "out_channels") and hasattr(module, "groups") and weight.ndim > 2:
        transposed = bool(getattr(module, "transposed", False))
        groups = int(module.groups)
        widths = (int(module.in_channels) // groups, int(module.out_channels) // groups)
        if groups > 1 and groups >= max(widths):  # whole groups went, as the trace decides it
            groups = weight.shape[0] // widths[0 if transposed else 1]
        ins, outs = weight.shape[1] * groups, weight.shape[0]
        if transposed:
            ins, outs = weight.shape[0], weight.shape[1] * groups
        module.out_channels, module.in_channels, module.groups = outs, ins, groups
    elif hasattr(module, "out_features") and weight.ndim == 2:
        module.out_features, module.in_features = weight.shape
    elif hasattr(module, "embedding_dim"):
        module.embedding_dim = weight.shape[1]
    for key in ("num_features", "num_channels"):
        if hasattr(module, key) and weight.ndim == 1:
            setattr(module, key, weight.shape[0])
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(weight.shape)


def call_dense(model: nn.Module) -> None:
    """Count cuts from here on: a model that was cut before is the dense one of what comes."""
    _applied[model] = Plan()


def applied(model: nn.Module) -> Plan:
    """The plan a model has been cut to; an empty one if it was not."""
    found = _applied.get(model)  # asked for at every step, and an empty plan takes longer to make than to find
    if found is None:
        found = _applied[model] = Plan()  # one object, so that who looks often sees at once that nothing changed
    return found


def compose(previous: Plan, step: Plan) -> Plan:
    """Two plans, one after the other, as one of the dense model.

    Args:
        previous: what the model was cut to, in indices of the dense model.
        step: what is cut next, in indices of the model as it is now.
    """
    shapes = {**{n: s for n, s in step.shapes.items() if n not in previous.shapes}, **previous.shapes}
    composed: list[dict[str, dict[int, Tensor]]] = []
    joined: dict[tuple[int, int], Tensor] = {}  # many dimensions have their indices in common
    positions: dict[str, dict[int, Tensor]] = {}
    for before, now in ((previous.kept, step.kept), (previous.buffers, step.buffers)):
        out = {name: dict(dims) for name, dims in before.items()}
        for name, dims in now.items():
            ours = out.setdefault(name, {})
            for dim, kept in dims.items():
                if len(kept) < (len(ours[dim]) if dim in ours else shapes[name][dim]):
                    positions.setdefault(name, {})[dim] = kept
                if dim in ours:
                    both = id(ours[dim]), id(kept)
                    if both not in joined:
                        joined[both] = ours[dim][kept]
                    ours[dim] = joined[both]
                else:
                    ours[dim] = kept
        composed.append(out)
    attributes = {name: dict(values) for name, values in previous.attributes.items()}
    for name, values in step.attributes.items():
        attributes.setdefault(name, {}).update(values)
    groups = dict(previous.groups)
    for name, (kept_count, size) in step.groups.items():
        groups[name] = (kept_count, previous.groups[name][1] if name in previous.groups else size)
    plan = Plan._of_valid(composed[0], composed[1], shapes, attributes, groups)
    plan._remember_relative(previous, positions)  # as it was put together, so it need not be taken apart
    return plan
