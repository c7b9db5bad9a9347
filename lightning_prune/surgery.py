"""Cut parameters and buffers of a model, in place, and prove it.

A cut is applied, seen to run and to compute what the uncut network computes with the removed coordinates at zero, or
taken back whole. `Parameter` objects, their hooks and their places in optimizers stay the same: only the storage behind
them is exchanged.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.cost import Cost
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, UnsafeCut
from lightning_prune.graph import groups as _groups
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.trace import output_tensors, run, undisturbed
from lightning_prune.optimizers import Cut, check, follow
from lightning_prune.report import Report

_graphs: WeakKeyDictionary[nn.Module, ChannelGraph] = WeakKeyDictionary()
_applied: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()
_largest: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()  # shapes before any cut


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Trace a model, find what may be cut out of it, and prove what is doubtful.

    Where the model's own code may hold a size as a number (a view, a split), only the cut model can tell: such groups
    are cut on trial, and frozen if that goes wrong. The model is left as it was.

    Args:
        model: any module that runs on the example inputs.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs, on any device.

    Returns:
        The graph: `groups`, `frozen` with reasons, `explain()`, `cost(plan)`.

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

    Returns:
        What was cut, with costs before and after (flops are 0 if the model was never traced).

    Raises:
        UnsafeCut: if the cut model does not run, or computes something else; it is then exactly as before.
        ValueError: if the plan does not fit the model, or an optimizer has a state that cannot follow.
    """
    if verify not in ("first", "always", "never"):
        raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
    started = time.perf_counter()
    graph = graph or _graphs.get(model)
    earlier = _applied.get(model) or Plan()
    if since is None:
        since = Plan() if _is_of_now(model, plan, earlier) else earlier
    before = graph.cost(since) if graph is not None else _params_only(model)
    inputs = graph.example_inputs if example_inputs is None and graph is not None else example_inputs
    proved = verify != "never" and (verify == "always" or since.is_empty)
    if proved and inputs is None:
        warnings.warn("the cut is not proved: this model was not traced; pass example_inputs=", stacklevel=2)
        proved = False
    optimizers = list(optimizers)
    operation = _Operation(model, plan, since)
    _shapes_before_any_cut(model)
    check(optimizers, operation.parameters())
    if proved:
        prove(operation, inputs, training=graph is None or graph.has_training_branch)
    else:
        operation.apply()
    follow(optimizers, operation.cuts())
    operation.finish()
    _applied[model] = plan if since == earlier else compose(earlier, plan)
    return Report(
        before=before,
        after=graph.cost(plan) if graph is not None else _params_only(model),
        groups=dict(plan.groups),
        removed=operation.removed(),
        frozen=dict(graph.frozen) if graph is not None else {},
        seconds=time.perf_counter() - started,
    )


def _is_of_now(model: nn.Module, plan: Plan, earlier: Plan) -> bool:
    """Whether a plan speaks of the model as it is now, traced again after an earlier cut, not of the dense one."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
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

    Raises:
        ValueError: if the model's tensors do not have the shapes the plans speak of.
    """

    def __init__(self, model: nn.Module, plan: Plan, since: Plan) -> None:
        self.model = model
        self.plan = plan
        self.since = since
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
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
        self._modules = {name: dict(model.named_modules())[name] for name in plan.attributes}
        self._attributes = {
            (name, key): getattr(module, key) for name, module in self._modules.items() for key in plan.attributes[name]
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: t for name, t in self._tensors.items() if isinstance(t, nn.Parameter)}

    @contextmanager
    def trial_values(self) -> Iterator[None]:
        """Random values, the same ones dense and cut, in place of tensors that are constant.

        A norm that is still at one, or a last layer at zero, would hide a wrong index from the proof.
        """
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        generator = torch.Generator().manual_seed(0)
        others: list[tuple[Tensor, Tensor]] = []
        try:
            for name, tensor in tensors.items():
                if not tensor.is_floating_point() or tensor.numel() < 2:
                    continue
                if not bool((tensor == tensor.flatten()[0]).all()):
                    continue
                value = tensor.detach().flatten()[0].cpu().double()
                scale = float(value.abs()) or 0.1
                drawn = value + scale * (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5)
                self._trial[name] = drawn.to(tensor)
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
        """Exchange the storages for smaller ones, and rewrite the attributes that hold sizes."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                _exchange(tensor, _select(self._value(name), self.kept[name]))
        for name, module in self._modules.items():
            for key, value in self.plan.attributes[name].items():
                setattr(module, key, value)

    def zero(self, nearly: float = 0.0) -> None:
        """Instead of cutting: removed coordinates at zero, in parameters.

        Args:
            nearly: a value to put there instead, for layers that divide by a weight's length.
        """
        with torch.no_grad():
            for name, tensor in self.parameters().items():
                zeroed = self._value(name).clone()
                for dim, kept in self.kept[name].items():
                    zeroed.index_fill_(dim, _complement(kept, zeroed.shape[dim]).to(zeroed.device), nearly)
                _exchange(tensor, zeroed)
            for name, buffer in self._tensors.items():
                if name in self._trial and not isinstance(buffer, nn.Parameter):
                    _exchange(buffer, self._trial[name].clone())

    def undo(self) -> None:
        """Everything as before."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                _exchange(tensor, self._originals[name])
        for (name, key), value in self._attributes.items():
            setattr(self._modules[name], key, value)

    def finish(self) -> None:
        """Gradients follow."""
        for name, tensor in self._tensors.items():
            if tensor.grad is not None:
                grad = tensor.grad
                tensor.grad = None
                tensor.grad = _select(grad, self.kept[name])

    def cuts(self) -> list[Cut]:
        return [Cut(name, p, self._shapes[name], self.kept[name]) for name, p in self.parameters().items()]

    def removed(self) -> dict[str, dict[int, int]]:
        return {
            name: {dim: self._shapes[name][dim] - len(kept) for dim, kept in dims.items()}
            for name, dims in self.kept.items()
        }


def _exchange(tensor: Tensor, new: Tensor) -> None:
    """Put another storage behind a tensor; under ``no_grad``, so that older graphs notice and DDP need not be told."""
    tensor.set_(new)  # type: ignore[call-overload]


def _select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept slices, in the tensor's own memory format."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        last = torch.contiguous_format
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous(memory_format=last)


def _complement(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().squeeze(1)


def prove(operation: _Operation, example_inputs: Any, training: bool = True, tolerance: float | None = None) -> float:
    """Apply a cut that was seen to be right: it runs, and computes what the zeroed network computes.

    Norms across channels legitimately change by a cut; for the comparison they are replaced, in both networks, by one
    that zeros do not change, so that a wrong index is seen there too.

    Args:
        operation: not yet applied; applied on return.
        example_inputs: what to run on.
        training: also run the cut network in train mode.
        tolerance: largest relative difference allowed; by default by dtype.

    Returns:
        The largest relative difference of any output.

    Raises:
        UnsafeCut: and then nothing has changed.
    """
    model = operation.model
    try:
        with undisturbed(model):
            with operation.trial_values():
                expected, got = _zeroed_and_cut(operation, example_inputs)
            if not _finite(expected):  # a constant may have stood for something that has to be positive, say
                expected, got = _zeroed_and_cut(operation, example_inputs)
            worst = _compare(expected, got, tolerance)
            if worst > _ROUNDING and tolerance is None:
                worst = _in_double(operation, example_inputs, worst)
            operation.apply()
        if training:
            with undisturbed(model):
                model.train()
                run(model, example_inputs, 2)
    except UnsafeCut:
        operation.undo()
        raise
    except Exception as error:
        operation.undo()
        raise UnsafeCut(f"the cut model does not run: {type(error).__name__}: {error}") from error
    except BaseException:
        operation.undo()
        raise
    return worst


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _zeroed_and_cut(
    operation: _Operation, example_inputs: Any, stand_in: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the network with the removed coordinates at zero, and of the cut one; it is uncut on return."""
    operation.zero()
    expected = _outputs(operation.model, example_inputs, stand_in)
    if not _finite(expected):  # weight normalisation divides by the length of a row that is zero
        operation.zero(nearly=1e-12)
        expected = _outputs(operation.model, example_inputs, stand_in)
    operation.undo()
    operation.apply()
    got = _outputs(operation.model, example_inputs, stand_in)
    operation.undo()
    return expected, got


def difference(model: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """Largest relative difference between a cut network and the same one with the removed coordinates zeroed.

    The model is left as it was. Norms across channels are left as they are, so that the figure is what a user sees.
    """
    operation = _Operation(model, plan, _applied.get(model) or Plan())
    with undisturbed(model):
        try:
            with operation.trial_values():
                expected, got = _zeroed_and_cut(operation, example_inputs, stand_in=False)
        finally:
            operation.undo()
    return _compare(expected, got, float("inf"))


def _outputs(model: nn.Module, inputs: Any, stand_in: bool = True) -> list[Tensor]:
    model.eval()
    with _ZeroBlindNorms() if stand_in else nullcontext():  # type: ignore[no-untyped-call]
        return [t for t in output_tensors(run(model, inputs, 1)) if t.is_floating_point()]


_ROUNDING = 5e-6  # float32 stayed below 1.1e-6 on ten architectures; what lies above is looked at in double precision
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _compare(expected: Sequence[Tensor], got: Sequence[Tensor], tolerance: float | None) -> float:
    if [t.shape for t in expected] != [t.shape for t in got]:
        shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in got]
        raise UnsafeCut(f"outputs change shape, {shapes[0]} to {shapes[1]}")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if not a.numel():
            continue
        largest = float(a.abs().max())
        distance = float((a - b).abs().max()) / (largest if largest > 0 else 1.0)
        allowed = _TOLERANCE.get(a.dtype, 1e-4) if tolerance is None else tolerance
        if not bool(torch.isfinite(a).all()) and tolerance is None:
            raise UnsafeCut("the network computes NaN or infinity on its example input, so no cut of it can be proved")
        if not distance <= allowed:
            raise UnsafeCut(
                f"the cut model computes something else: relative difference {distance:.2g}, allowed {allowed:.2g}"
            )
        worst = max(worst, distance)
    return worst


def _in_double(operation: _Operation, example_inputs: Any, worst: float) -> float:
    """A difference that may be rounding or a small error, once more in double precision, where only the latter stays.

    Args:
        operation: not applied.
        example_inputs: what to run on.
        worst: the difference in the model's own precision, which is what is left to go by if the model's code does not
            run in another one.

    Raises:
        UnsafeCut: if it is no rounding.
    """
    model = operation.model
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if all(t.dtype == torch.float64 for t in tensors):
        return worst
    own = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        twin = _Operation(model, operation.plan, operation.since)
        try:
            with twin.trial_values():
                expected, got = _zeroed_and_cut(twin, example_inputs)
        except Exception:  # it holds a dtype in its code
            return worst
        finally:
            twin.undo()
        return _compare(expected, got, None)
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


class _ZeroBlindNorms(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Norms across channels, replaced by ones that channels at zero do not change: x / |x|, then scale and shift."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))  # also where it is replaced: its checks belong to the proof
        name = func._schema.name
        if name == "aten::native_layer_norm":
            x, shape, weight, bias, eps = args[:5]
            y = _by_length(x, list(range(x.ndim - len(shape), x.ndim)), eps)
            y = y if weight is None else y * weight
            y = y if bias is None else y + bias
            return y, x.new_zeros(()), x.new_zeros(())
        if name == "aten::native_group_norm":
            x, weight, bias, n, c, _, groups, eps = args
            y = _by_length(x.reshape(n, groups, -1), [2], eps).reshape(x.shape)
            wide = (1, c, *[1] * (x.ndim - 2))
            y = y if weight is None else y * weight.reshape(wide)
            y = y if bias is None else y + bias.reshape(wide)
            return y, x.new_zeros(()), x.new_zeros(())
        return out


def _by_length(x: Tensor, dims: list[int], eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dims, keepdim=True) + eps)


def settle(
    graph: ChannelGraph, names: Iterable[str] | None = None, keep: Mapping[str, Tensor] | None = None
) -> ChannelGraph:
    """Cut doubtful groups on trial and freeze those that go wrong, found by bisection.

    Args:
        graph: of a model that is as it was when traced.
        names: groups to try; by default those the trace marked as doubtful.
        keep: group -> (C,) bool, what to try; by default every other channel goes.

    Returns:
        The graph without the groups that failed; their reasons are in `frozen`.
    """
    doubtful = [g.name for g in graph.groups if g.name in (graph.suspects if names is None else set(names))]
    failed: dict[str, str] = {}

    def attempt(some: Sequence[str]) -> None:
        if not some:
            return
        trial = {name: (keep or {}).get(name, torch.arange(graph.group(name).size) % 2 == 0) for name in some}
        try:
            operation = _Operation(graph.model, graph.plan(trial), Plan())
            prove(operation, graph.example_inputs, training=graph.has_training_branch)
            operation.undo()
        except (UnsafeCut, ValueError) as error:
            if len(some) == 1:
                failed[some[0]] = f"a trial cut failed: {str(error).splitlines()[0]}"
                return
            attempt(some[: len(some) // 2])
            attempt(some[len(some) // 2 :])

    attempt(doubtful)
    return graph.without(failed) if failed else graph


def conform(model: nn.Module, state_dict: Mapping[str, Any] | Plan, plan: Plan | None = None) -> nn.Module:
    """Give a model the shapes of a pruned state dict, so that it loads; it may shrink or grow.

    Args:
        model: dense, or cut to another plan. Where a tensor shrinks and the plan is known its kept values stay; where
            one grows the new entries are zero until the state is loaded.
        state_dict: the state to be loaded, or a plan alone.
        plan: the plan of that state, which also says module attributes; without it they are told from shapes.

    Returns:
        The same model.

    Raises:
        IncompatibleCheckpoint: if the state is of another architecture; nothing has changed then.
    """
    if isinstance(state_dict, Plan):
        plan, state = state_dict, {name: state_dict.current_shape(name) for name in state_dict.shapes}
    else:
        state = {name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)}
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = [name for name in tensors if name not in state and not isinstance(state_dict, Plan)]
    missing = [name for name in missing if name in model.state_dict()]
    if missing or not any(name in tensors for name in state):
        raise IncompatibleCheckpoint(
            f"the state is not of a {type(model).__name__}: it lacks {missing[:3] or 'every parameter'}"
        )
    reshape_like(model, state, plan)
    return model


def reshape_like(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], plan: Plan | None, dense_again: bool = False
) -> list[str]:
    """Exchange storages where shapes differ; returns the names of the tensors that changed.

    Args:
        model: dense, or cut.
        shapes: what is wanted, by parameter and buffer name.
        plan: the plan those shapes come from, if it is known.
        dense_again: the shapes are known to be of the dense model, which a cut one grows back to.

    Raises:
        IncompatibleCheckpoint: if a tensor has another number of dimensions, or the plan contradicts the shapes.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = {n: s for n, s in shapes.items() if n in tensors and tuple(tensors[n].shape) != tuple(s)}
    for name, shape in changed.items():
        now = tuple(tensors[name].shape)
        if len(shape) != len(now) or 0 in shape:
            raise IncompatibleCheckpoint(f"{name!r} has shape {now} in the model and {shape} in the state")
        whole = tuple(shape) if plan is None or name not in plan.shapes else plan.shapes[name]
        if any(s > n for s, n in zip(whole, _shapes_before_any_cut(model)[name], strict=True)):
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
    with torch.no_grad():
        for name, shape in changed.items():
            tensor = tensors[name]
            dense = plan is not None and tuple(tensor.shape) == plan.shapes.get(name)
            kept = (plan.kept.get(name) or plan.buffers.get(name) or {}) if plan is not None else {}
            new = _select(tensor.detach(), kept) if dense else _resized(tensor.detach(), shape)
            tensor.grad = None
            _exchange(tensor, new)
    modules = dict(model.named_modules())
    for owner in owners:
        told_from_shape(modules[owner])
    if plan is not None:
        for name, values in plan.attributes.items():
            if name in modules:
                for key, value in values.items():
                    setattr(modules[name], key, value)
        _applied[model] = plan
    return list(changed)


def _shapes_before_any_cut(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors as they were when it was seen first."""
    if model not in _largest:
        _largest[model] = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return _largest[model]


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
    return _applied.get(model) or Plan()


def compose(previous: Plan, step: Plan) -> Plan:
    """Two plans, one after the other, as one of the dense model.

    Args:
        previous: what the model was cut to, in indices of the dense model.
        step: what is cut next, in indices of the model as it is now.
    """
    shapes = {**{n: s for n, s in step.shapes.items() if n not in previous.shapes}, **previous.shapes}
    composed: list[dict[str, dict[int, Tensor]]] = []
    for before, now in ((previous.kept, step.kept), (previous.buffers, step.buffers)):
        out = {name: dict(dims) for name, dims in before.items()}
        for name, dims in now.items():
            for dim, kept in dims.items():
                earlier = out.setdefault(name, {}).get(dim)
                out[name][dim] = kept if earlier is None else earlier[kept]
        composed.append(out)
    attributes = {name: dict(values) for name, values in previous.attributes.items()}
    for name, values in step.attributes.items():
        attributes.setdefault(name, {}).update(values)
    groups = dict(previous.groups)
    for name, (kept_count, size) in step.groups.items():
        groups[name] = (kept_count, previous.groups[name][1] if name in previous.groups else size)
    return Plan(kept=composed[0], buffers=composed[1], shapes=shapes, attributes=attributes, groups=groups)
