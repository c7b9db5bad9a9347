"""Optimizer state follows a cut: momentum and moments lose the slices that their parameter lost.

Parameters keep their identity, so param groups, learning rates and schedulers are never touched. The order is
:func:`check` before anything changes, :func:`snapshot` if the cut may be taken back, the cut, :func:`follow`.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.masks import clear_off

State = dict[Any, Any]


@dataclass(frozen=True, eq=False)
class Cut:
    """What a cut did to one parameter.

    Args:
        name: qualified name of the parameter.
        parameter: the parameter, the same object before and after.
        before: its shape before the cut.
        kept: dim -> (n,) sorted int64 positions that stay, in the shape before.

    Raises:
        ValueError: if there is no such dim or position.
    """

    name: str
    parameter: nn.Parameter
    before: tuple[int, ...]
    kept: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        for dim, index in self.kept.items():
            if not 0 <= dim < len(self.before):
                raise ValueError(f"{self.name!r} had shape {self.before} and no dim {dim}")
            if index.ndim != 1 or index.dtype != torch.long:
                raise ValueError(f"kept positions of dim {dim} of {self.name!r} must be a 1-D int64 tensor")
            if len(index) and (int(index.min()) < 0 or int(index.max()) >= self.before[dim]):
                raise ValueError(f"kept positions of dim {dim} of {self.name!r} must be in [0, {self.before[dim]})")


def check(optimizers: Iterable[Any], parameters: Mapping[str, nn.Parameter]) -> None:
    """Make sure that the state of every optimizer can follow a cut of these parameters; changes nothing.

    State can follow if it is a number, a string, a tensor of the parameter's shape, a tensor of one entry, or a
    factored one (Adafactor) that has in each dim either the parameter's size or 1.

    Args:
        optimizers: torch optimizers, also wrapped ones (anything with an ``.optimizer``).
        parameters: name -> parameter that is about to be cut.

    Raises:
        ValueError: if some state cannot follow; the message names the optimizer, the parameter and the state. Also if
            an optimizer shares its state out over processes.
    """
    for optimizer in _unwrapped(optimizers):
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        _refuse_shared_out(optimizer)
        for name, parameter in parameters.items():
            if isinstance(optimizer, LBFGS) and id(parameter) in held:
                raise ValueError(
                    f"LBFGS keeps its history as flat vectors over all parameters, so parameter {name!r} cannot be cut "
                    "or masked under it; prune with another optimizer"
                )
            for key, value in _state(optimizer, parameter).items():
                _check_follows(optimizer, name, key, value, tuple(parameter.shape))


def check_states(optimizers: Iterable[Any], states: Iterable[Mapping[str, Any]]) -> None:
    """Make sure that states are of these optimizers' kind, before they load them; changes nothing.

    Torch takes another kind's settings without a word, and fails at the next step, or does something else there.

    Raises:
        IncompatibleCheckpoint: if param groups have settings that the optimizer's have not, and the other way round.
            One-sided ones are those of another version of torch.
    """
    for optimizer, state in zip(_unwrapped(optimizers), states, strict=False):
        for number, (group, saved) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=False)):
            lacking, foreign = sorted(group.keys() - saved.keys()), sorted(saved.keys() - group.keys())
            if lacking and foreign:
                raise IncompatibleCheckpoint(
                    f"the checkpoint was written with another optimizer than {type(optimizer).__name__}: its param "
                    f"group {number} has {', '.join(foreign)} and no {', '.join(lacking)}; go on with the optimizer "
                    "that it was written with, or start a new fit from its weights: load_pruned"
                )


def follow(optimizers: Iterable[Any], cuts: Sequence[Cut]) -> None:
    """Cut the state of every optimizer as its parameters were cut.

    All tensors are made first and then put in place, so that an error leaves every optimizer as it was. New tensors
    take the memory format of the parameter, where that has its new shape already.

    Args:
        optimizers: see :func:`check`.
        cuts: one per parameter; the same cut of one parameter under two names (tied weights) counts once.

    Raises:
        ValueError: if some state cannot follow (see :func:`check`), or one parameter is cut in two ways.
    """
    changes: list[tuple[State, Any, Tensor]] = []
    for optimizer in _unwrapped(optimizers):
        for cut in _once(cuts):
            state = _state(optimizer, cut.parameter)
            for key, value in state.items():
                _check_follows(optimizer, cut.name, key, value, cut.before)
                if isinstance(value, Tensor) and value.ndim == len(cut.before):
                    changes.append((state, key, _sliced(value, cut)))
    for state, key, tensor in changes:
        state[key] = tensor


def clear(optimizers: Iterable[Any], masks: Mapping[nn.Parameter, Tensor]) -> None:
    """Set optimizer state to zero where a mask is False, so that nothing moves there from memory.

    Args:
        optimizers: see :func:`check`.
        masks: parameter -> bool mask of its shape, True = keep. Only state of that shape is touched, in place.
    """
    with torch.no_grad():
        for optimizer in _unwrapped(optimizers):
            for parameter, mask in masks.items():
                for value in _state(optimizer, parameter).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        clear_off(value, mask.to(value.device))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of optimizer state: optimizer, parameter, its state or None where it had none."""

    entries: tuple[tuple[Optimizer, nn.Parameter, State | None], ...]


def snapshot(optimizers: Iterable[Any], parameters: Iterable[nn.Parameter]) -> Snapshot:
    """Copy the state of these parameters in every optimizer, for :func:`restore`."""
    wanted = list({id(parameter): parameter for parameter in parameters}.values())
    return Snapshot(
        tuple(
            (optimizer, parameter, _copied(optimizer.state[parameter]) if parameter in optimizer.state else None)
            for optimizer in _unwrapped(optimizers)
            for parameter in wanted
        )
    )


def restore(saved: Snapshot) -> None:
    """Put the copied state back, also across a cut; a snapshot can be restored more than once."""
    for optimizer, parameter, state in saved.entries:
        if state is None:
            optimizer.state.pop(parameter, None)
            continue
        now = optimizer.state[parameter]
        now.clear()
        now.update(_copied(state))


def _copied(state: State) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in state.items()}


def _unwrapped(optimizers: Iterable[Any]) -> Iterator[Optimizer]:
    """Yield each optimizer once, without wrappers; Lightning's is an Optimizer itself, with stale copies."""
    seen: set[int] = set()
    for optimizer in optimizers:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"wanted a torch optimizer or a wrapper with .optimizer, got {type(optimizer).__name__}")
        if id(optimizer) not in seen:
            seen.add(id(optimizer))
            yield optimizer


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> State:
    # not optimizer.state[parameter], which makes an entry for whoever asks
    state: State = optimizer.state.get(parameter, {})
    return state


def _refuse_shared_out(optimizer: Optimizer) -> None:
    # by name, as not every build of torch has the class
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise ValueError(
            "ZeroRedundancyOptimizer shares its state out over processes, where it cannot follow what is cut or "
            "masked; prune with the optimizer that it wraps"
        )


def _once(cuts: Sequence[Cut]) -> list[Cut]:
    by_parameter: dict[int, Cut] = {}
    for cut in cuts:
        known = by_parameter.setdefault(id(cut.parameter), cut)
        same_dims = known.before == cut.before and known.kept.keys() == cut.kept.keys()
        if not same_dims or not all(torch.equal(known.kept[dim], cut.kept[dim]) for dim in cut.kept):
            raise ValueError(f"one parameter, known as {known.name!r} and {cut.name!r}, is cut in two different ways")
    return list(by_parameter.values())


def _check_follows(optimizer: Optimizer, name: str, key: Any, value: Any, before: tuple[int, ...]) -> None:
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        same_dims = len(shape) == len(before) and all(a in (b, 1) for a, b in zip(shape, before, strict=True))
        if value.layout == torch.strided and (value.numel() == 1 or same_dims):
            return
        problem = f"has shape {shape} while the parameter has {before}"
    elif isinstance(value, list | tuple | dict | set) and value:
        problem = f"is a {type(value).__name__}, whose parts nothing ties to the parameter's dims"
    elif value is None or isinstance(value, bool | int | float | complex | str | list | tuple | dict | set):
        return
    else:
        problem = f"is of type {type(value).__name__}"
    raise ValueError(
        f"state {key!r} of {type(optimizer).__name__} for parameter {name!r} cannot follow a cut: it {problem}; "
        'prune before its first step, use another optimizer, or mask instead of cutting (apply="mask")'
    )


def _sliced(value: Tensor, cut: Cut) -> Tensor:
    new = value.detach()
    for dim, index in cut.kept.items():
        if value.shape[dim] == cut.before[dim]:  # else a factored dim of size 1, common to all slices
            new = new.index_select(dim, index.to(new.device))
    if new.shape == cut.parameter.shape and new.stride() != cut.parameter.stride():
        return torch.empty_like(cut.parameter, dtype=new.dtype, device=new.device, requires_grad=False).copy_(new)
    return new.contiguous()
