"""Architectural bottlenecks: layers that a prune hardly touched, and a wider network without them.

Expand-pruning (Nonnenmacher et al., 2022) prunes a trained network hard, widens in a new one what was hardly pruned,
trains that, and prunes it back to the old size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune import surgery
from lightning_prune.decision import Plan
from lightning_prune.errors import UnsafeCut
from lightning_prune.graph.attention import swap
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.trace import output_tensors, run, undisturbed
from lightning_prune.proof import with_noise

_M = TypeVar("_M", bound=nn.Module)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of what a widened network computes, else 0.05


def bottlenecks(plan: Plan, threshold: float = 0.5, factor: float = 2.0) -> dict[str, float]:
    """The groups that a prune of the whole network hardly touched.

    Args:
        plan: what was kept, of a prune that could choose freely between layers (one global ranking).
        threshold: a group is a bottleneck if it lost less than this part of the fraction that all groups together lost.
        factor: what each is to be widened by.

    Returns:
        group -> factor, the least pruned group first; what `widen` takes.

    Raises:
        ValueError: if the plan prunes no group, or an argument is out of range.

    Example:
        >>> bottlenecks(Plan(groups={"stem": (9, 10), "conv": (1, 10)}))  # half of all channels went
        {'stem': 2.0}
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold!r}")
    if not factor > 1:
        raise ValueError(f"factor must be above 1, got {factor!r}")
    kept, dense = (sum(counts[i] for counts in plan.groups.values()) for i in (0, 1))
    if kept == dense:
        raise ValueError("no channel of any group went, so that the plan tells of no bottleneck; prune harder")
    lost = {name: 1 - k / n for name, (k, n) in plan.groups.items()}
    low = threshold * (1 - kept / dense)
    return {name: float(factor) for name in sorted(lost, key=lost.__getitem__) if lost[name] < low}


def widen(model: _M, factors: Mapping[str, float], example_inputs: Any, *, keep: bool = False) -> _M:
    """A new network in which groups have more channels, every layer, norm and attribute that goes with them included.

    Args:
        model: stays as it is.
        factors: group -> how many times as many channels, above 1; rounded to whole ones.
        example_inputs: as for `lightning_prune.trace`.
        keep: keep the weights there are; new channels are read with weight 0, so that the network computes what it
            computed. Otherwise all weights are drawn anew, to train from scratch: by each module's own
            ``reset_parameters``; a parameter of a module without one from a normal distribution of its old mean and
            spread.

    Returns:
        A copy of the model. It was seen to run in eval and in train mode, and with ``keep`` to compute the same.

    Raises:
        ValueError: for an unknown or frozen group, a factor that adds no channel, or ``keep`` on the meta device.
        UnsafeCut: if this model cannot be widened so: the message says why.
    """
    if keep and any(p.is_meta for p in model.parameters()):
        raise ValueError("keep=True keeps values, which tensors on the meta device do not have")
    new = copy.deepcopy(model)
    graph = surgery.trace(new, example_inputs)
    sizes = {name: _wanted(graph, name, factor) for name, factor in factors.items()}
    said = f"{type(model).__name__} with " + ", ".join(f"{n} channels in {name!r}" for name, n in sizes.items())
    inputs = with_noise(example_inputs)
    before = _outputs(new, inputs) if keep else []
    old = {name: tensor.detach().clone() for name, tensor in _named(new).items()}
    _grow(new, graph, sizes)
    _draw(new, old)
    try:
        with undisturbed(new):
            run(new.train(), example_inputs, 2)
        wider = surgery.trace(new, example_inputs)
    except Exception as error:
        raise UnsafeCut(f"{said} does not run: {type(error).__name__}: {error}") from error
    now = {group.name: group.size for group in wider.groups}
    wanted = {**({group.name: group.size for group in graph.groups} if keep else {}), **sizes}
    if wrong := [name for name, size in wanted.items() if now.get(name) != size]:
        raise UnsafeCut(
            f"{said} runs, but has {now.get(wrong[0], 0)} channels of {wrong[0]!r} that go together, not "
            f"{wanted[wrong[0]]}"
        )
    if keep:
        _take_over(new, graph, wider, old)
        _check_same(before, _outputs(new, inputs), said)
    return new


def _wanted(graph: ChannelGraph, name: str, factor: float) -> int:
    """How many channels a group is to have."""
    group = next((g for g in graph.groups if g.name == name), None)
    if group is None:
        why = f"is frozen: {graph.frozen[name]}" if name in graph.frozen else "is unknown"
        raise ValueError(f"group {name!r} {why}; groups are {', '.join(g.name for g in graph.groups)}")
    size = int(factor * group.size + 0.5)
    if size <= group.size:
        raise ValueError(f"factor {factor!r} adds no channel to the {group.size} of group {name!r}; it must be above 1")
    return size


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _grow(model: nn.Module, graph: ChannelGraph, sizes: Mapping[str, int]) -> None:
    """Give tensors and attributes their new sizes; new entries are drawn with the mean and spread of the old ones."""
    tensors, modules = _named(model), dict(model.named_modules())
    shapes: dict[str, list[int]] = {}
    counts = graph.costs.dense.copy()
    for number, group in enumerate(graph.groups):
        if group.name not in sizes:
            continue
        counts[number] = sizes[group.name]
        for member in group.members:
            shape = shapes.setdefault(member.name, list(tensors[member.name].shape))
            shape[member.dim] += member.indices.shape[1] * (sizes[group.name] - group.size)
    for name in shapes:
        owner = name.rpartition(".")[0]
        if not isinstance(tensors[name], nn.Parameter) and _reset(modules[owner]) is None:
            raise UnsafeCut(
                f"buffer {name!r} has an entry for each channel, and {type(modules[owner]).__name__} has no "
                "reset_parameters() that would make new ones"
            )
    for path, module in modules.items():
        if any(name.startswith(f"{path}.") or not path for name in shapes):
            swap(module)  # a module whose own forward would not read its attributes
    with torch.no_grad():
        for name, shape in shapes.items():
            tensors[name].grad = None
            tensors[name].set_(_like(tensors[name], tuple(shape)))  # type: ignore[call-overload]
    for path, values in graph._attributes(counts).items():
        for key, value in values.items():
            setattr(modules[path], key, value)


def _like(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normal values with the mean and the spread of a tensor; zeros where it has whole numbers."""
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if not old.is_floating_point():
        return new
    values = old.detach().float()
    return new.normal_() * values.std(correction=0).to(new) + values.mean().to(new)


def _reset(module: nn.Module) -> Callable[[], Any] | None:
    """What makes a module's weights as they were when it was made."""
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def _draw(model: nn.Module, old: Mapping[str, Tensor]) -> None:
    """All weights anew."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _reset(modules[name.rpartition(".")[0]]) is None:
                parameter.copy_(_like(old[name], tuple(parameter.shape)))
        for module in reversed(modules.values()):  # as they were made: what is inside first
            reset = _reset(module)
            if reset is not None:
                reset()


def _take_over(model: nn.Module, graph: ChannelGraph, wider: ChannelGraph, old: Mapping[str, Tensor]) -> None:
    """Put the old weights where their channels are now, and let nothing read the new channels."""
    tensors = _named(model)
    places: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}  # of a dimension: old and new indices of its groups
    for group in graph.groups:
        now = {(m.name, m.dim): m.indices for m in wider.group(group.name).members}
        for m in group.members:
            places.setdefault((m.name, m.dim), []).append((m.indices, now[m.name, m.dim]))
    with torch.no_grad():
        for name, values in old.items():
            to = [_moved(places.get((name, dim), []), n, m) for dim, (n, m) in enumerate(
                zip(values.shape, tensors[name].shape, strict=True))]  # fmt: skip
            at = torch.meshgrid(*to, indexing="ij") if to else ()
            tensors[name][tuple(index.to(values.device) for index in at)] = values
        for group in graph.groups:
            for reader in wider.group(group.name).consumers:
                new = reader.indices[group.size :].reshape(-1)
                tensors[reader.weight].index_fill_(reader.dim, new.to(tensors[reader.weight].device), 0)


def _moved(places: list[tuple[Tensor, Tensor]], before: int, now: int) -> Tensor:
    """(before,) new index of each old one on a dimension; what is of no group keeps its order."""
    to = torch.full((before,), -1, dtype=torch.int64)
    free = torch.ones(now, dtype=torch.bool)
    for old, new in places:
        to[old.reshape(-1)] = new[: len(old)].reshape(-1)
        free[new.reshape(-1)] = False
    to[to < 0] = free.nonzero().squeeze(1)
    return to


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with undisturbed(model):
        out = run(model.eval(), inputs, 1)
    return [t for t in output_tensors(out) if t.is_floating_point()]


def _check_same(before: list[Tensor], now: list[Tensor], said: str) -> None:
    for a, b in zip(before, now, strict=True):
        size, apart = float(a.abs().max()), float((a - b).abs().max())
        if not apart <= _TOLERANCE.get(a.dtype, 0.05) * size:
            raise UnsafeCut(
                f"{said} does not compute what it did (difference {apart:.2g} of {size:.2g}), as where a norm runs "
                "across the channels; widen without keep=True"
            )
