"""Dead units: those that masks on single weights have left without inputs, or without outputs.

Han, Pool, Tran and Dally (2015) remove them with all their other connections, again and again, as that may leave other
units without. Units here are the channels of a channel graph: of a residual stream all producers and all readers count.

A unit without inputs is *silent*: it still says what its bias makes of nothing, and that constant goes to the biases of
its readers (`lightning_prune.absorb`). A unit without outputs is *unread*, and nobody misses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_prune import surgery
from lightning_prune.absorb import Absorbed, absorbable
from lightning_prune.graph.flow import Tap
from lightning_prune.graph.groups import ChannelGraph, Group
from lightning_prune.graph.trace import Calls, output_tensors, run
from lightning_prune.report import Report, markdown_table
from lightning_prune.taps import Seen, evaluating, looks_at, tensor_of, watching

_T = TypeVar("_T")
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SAME = {torch.float64: 1e-9, torch.float32: 1e-5}  # of what a network without its dead units computes, else 0.02


@dataclass(frozen=True)
class DeadUnits:
    """Units without inputs or without outputs, once no further one follows from them.

    Attributes:
        silent: group -> (C,) bool, True = without inputs, but read.
        unread: group -> (C,) bool, True = without outputs.
        last: group -> (C,) bool, the one unit that a group of dead units keeps.
    """

    silent: Mapping[str, Tensor]
    unread: Mapping[str, Tensor]
    last: Mapping[str, Tensor]

    @classmethod
    def none(cls, graph: ChannelGraph) -> DeadUnits:
        """All units are alive."""
        return cls(*({g.name: torch.zeros(g.size, dtype=torch.bool) for g in graph.groups} for _ in range(3)))

    def of(self, group: str) -> Tensor:
        """(C,) bool, True = dead."""
        return self.silent[group] | self.unread[group]

    def __len__(self) -> int:
        return sum(int(mask.sum()) for units in (self.silent, self.unread) for mask in units.values())


def find_dead(
    graph: ChannelGraph,
    masks: Mapping[str, Tensor],
    spared: Mapping[str, Tensor] | None = None,
    known: DeadUnits | None = None,
) -> DeadUnits:
    """Find dead units, and those that are dead without them, until nothing changes.

    Args:
        graph: of the model as it is now.
        masks: parameter -> bool, its shape, True = there. What is not named is there as a whole. A filter of a
            depthwise convolution is an input of its unit as well: without it the unit is silent.
        spared: group -> (C,) bool, silent units that are to count as alive.
        known: what was found before, to go on from.

    Returns:
        All dead units. Each group keeps one unit at least, dead or not.

    Example:
        >>> from lightning_prune.surgery import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> first, second = torch.tensor([[1, 1], [0, 0], [1, 1]]), torch.tensor([[1, 1, 0]])
        >>> dead = find_dead(trace(model, torch.randn(1, 2)), {"0.weight": first.bool(), "2.weight": second.bool()})
        >>> dead.silent["0"].tolist(), dead.unread["0"].tolist()
        ([False, True, False], [False, False, True])
    """
    found = DeadUnits.none(graph) if known is None else _copied(known)
    left = without(masks, graph, found)
    changed = True
    while changed:
        changed = False
        for group in graph.groups:
            unread, silent = _newly_dead(graph, group, left, found)
            if spared is not None and group.name in spared:
                silent &= ~spared[group.name]
            if bool((found.of(group.name) | unread | silent).all()):
                keeper = _keeper(group, masks, unread | silent)
                found.last[group.name][keeper], unread[keeper], silent[keeper] = True, False, False
            if bool((new := unread | silent).any()):
                changed = True
                found.unread[group.name].logical_or_(unread)
                found.silent[group.name].logical_or_(silent)
                _clear(group, left, new)
    return found


def _copied(dead: DeadUnits) -> DeadUnits:
    parts = [{n: mask.clone() for n, mask in part.items()} for part in (dead.silent, dead.unread, dead.last)]
    return DeadUnits(*parts)


def _newly_dead(
    graph: ChannelGraph, group: Group, masks: Mapping[str, Tensor], found: DeadUnits
) -> tuple[Tensor, Tensor]:
    """(C,) units that are unread, and those that are silent, of those not found yet."""
    alive = ~(found.of(group.name) | found.last[group.name])
    unread = alive & ~_any(group, masks, _readers(group))
    return unread, alive & ~unread & ~_has_inputs(graph, group, masks)


def _keeper(group: Group, masks: Mapping[str, Tensor], units: Tensor) -> int:
    """Which of the last units of a group stays: one that has a weight, if there is one."""
    places = [*_readers(group), *((producer.weight, producer.dim) for producer in group.producers)]
    there = units & _any(group, masks, places)
    return int((there if bool(there.any()) else units).nonzero()[-1])


def without(masks: Mapping[str, Tensor], graph: ChannelGraph, dead: DeadUnits) -> dict[str, Tensor]:
    """The masks with all connections of dead units gone; vectors (biases, norms) stay as they are."""
    left = {name: mask.clone() for name, mask in masks.items()}
    for group in graph.groups:
        if bool((units := dead.of(group.name)).any()):
            _clear(group, left, units)
    return left


def weaker_half(graph: ChannelGraph, dead: DeadUnits, known: DeadUnits, scores: Mapping[str, Tensor]) -> DeadUnits:
    """What was known, and of the units found since the half, rounded down, whose best weights have the lowest scores.

    Args:
        graph: of the model.
        dead: from `find_dead`, with ``known``.
        known: what is dead in any case.
        scores: parameter -> scores in its shape.
    """
    best = {}
    for group in graph.groups:
        best[group.name] = torch.full((group.size,), -torch.inf, dtype=torch.float64)
        for member in group.members:
            if member.name in scores and scores[member.name].ndim > 1:
                score = scores[member.name].movedim(member.dim, 0).flatten(1).amax(dim=1).cpu().double()  # (N,)
                best[group.name] = torch.maximum(best[group.name], score[member.indices].amax(dim=1))
    new = {group.name: dead.of(group.name) & ~known.of(group.name) for group in graph.groups}
    order = torch.cat([best[name][units] for name, units in new.items()]).argsort(stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: len(order) // 2]] = True
    half, parts = _copied(known), torch.split(chosen, [int(units.sum()) for units in new.values()])
    for (name, units), part in zip(new.items(), parts, strict=True):
        weaker = units.clone()
        weaker[units] = part
        half.silent[name].logical_or_(dead.silent[name] & weaker)
        half.unread[name].logical_or_(dead.unread[name] & weaker)
    return half


def _readers(group: Group) -> list[tuple[str, int]]:
    return [(consumer.weight, consumer.dim) for consumer in group.consumers]


def _has_inputs(graph: ChannelGraph, group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """(C,) whether any producer makes a unit, and every depthwise filter of it is there.

    A matrix that no layer multiplies with (an embedding, a position's) is a producer too.
    """
    matrices = {(m.name, m.dim) for m in group.members if len(graph.shapes[m.name]) > 1}
    made = {(producer.weight, producer.dim) for producer in group.producers}
    made |= {place for place in matrices if place[0] not in graph.weights}
    out = _any(group, masks, made)
    for place in matrices - made - {*_readers(group)}:
        out &= _any(group, masks, [place])
    return out


def _any(group: Group, masks: Mapping[str, Tensor], places: Iterable[tuple[str, int]]) -> Tensor:
    """(C,) whether any entry of a unit's slices of these weights' dimensions is there."""
    indices = {(member.name, member.dim): member.indices for member in group.members}
    out = torch.zeros(group.size, dtype=torch.bool)
    for name, dim in places:
        if name not in masks:
            return torch.ones(group.size, dtype=torch.bool)
        mask = masks[name]
        there = mask.movedim(dim, 0).reshape(mask.shape[dim], -1).any(dim=1).cpu()  # (N,)
        out |= there[indices[name, dim]].any(dim=1)
    return out


def _clear(group: Group, masks: Mapping[str, Tensor], units: Tensor) -> None:
    for member in group.members:
        if member.name in masks and masks[member.name].ndim > 1:
            mask = masks[member.name]
            mask.index_fill_(member.dim, member.indices[units].reshape(-1).to(mask.device), False)


@torch.no_grad()
def silent_constants(
    model: nn.Module, graph: ChannelGraph, dead: DeadUnits, masks: Mapping[str, Tensor]
) -> tuple[Absorbed, dict[str, Tensor]]:
    """What silent units say under masks, as shifts of what their readers make; the model is left as it was.

    The model runs in eval mode, on its example input and on noise.

    Args:
        model: with weights as before the masks.
        graph: of the model as it is now.
        dead: from `find_dead`, with these masks.
        masks: parameter -> bool, True = there.

    Returns:
        The shifts, and group -> (C,) bool of silent units that cannot go, as what they say is not constant (a time
        step, a position says it), or a reader has no bias to put it in. Only if there is none of these are the shifts
        of all.
    """
    silent = {group.name: dead.silent[group.name] for group in graph.groups if bool(dead.silent[group.name].any())}
    if not silent:
        return Absorbed(), {}
    with _heard(model, graph, silent, without(masks, graph, dead)):
        says = _constants(model, graph, silent)
        moving = {name: units & ~says[name][0] for name, units in silent.items()}
        plan = graph.plan({name: ~units | moving[name] for name, units in silent.items()})
        found = absorbable(model, plan, graph)
    stuck = {}
    for group in graph.groups:
        if group.name in silent:
            stays = moving[group.name]
            if any(reader.weight in found.left for reader in group.consumers):
                stays = stays | (silent[group.name] & ~says[group.name][1])
            if bool(stays.any()):
                stuck[group.name] = stays
    return found, stuck


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Units that are in either: group -> (C,) bool."""
    return {**first, **{name: units | first.get(name, units) for name, units in second.items()}}


@contextmanager
def _heard(
    model: nn.Module, graph: ChannelGraph, silent: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """The weights under masks inside, but with all that readers of silent units hear of them."""
    parameters = dict(model.named_parameters())
    there = {name: mask.clone() for name, mask in masks.items()}
    for group in graph.groups:
        if group.name in silent:
            indices = {(member.name, member.dim): member.indices for member in group.members}
            for name, dim in _readers(group):
                if name in there:
                    heard = indices[name, dim][silent[group.name]].reshape(-1).to(there[name].device)
                    there[name].index_fill_(dim, heard, True)
    own = {name: parameters[name].detach().clone() for name, mask in there.items() if not bool(mask.all())}
    try:
        for name in own:
            parameters[name].masked_fill_(~there[name].to(parameters[name].device), 0)
        yield
    finally:
        for name, values in own.items():
            parameters[name].copy_(values)


def _constants(model: nn.Module, graph: ChannelGraph, units: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Group -> (C,) whether its units say the same everywhere and whatever the input, and whether that is zero."""
    taps = {name: graph.maps(graph.group(name)) for name in units}
    ranges: dict[str, dict[int, tuple[Tensor, Tensor]]] = {name: {} for name in units}
    rounding = dict.fromkeys(units, 0.0)

    def look(name: str, tap: Tap, seen: Seen) -> None:
        values = tensor_of(tap, seen.out).detach()
        rounding[name] = max(rounding[name], _ROUNDING.get(values.dtype, 1e-5))
        maps = tap.maps(values, seen.batch).transpose(0, 1).flatten(1).cpu().double()  # (C, B P)
        low, high = maps.amin(1), maps.amax(1)
        before = ranges[name].get(id(tap), (low, high))
        ranges[name][id(tap)] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    with evaluating(model), watching(model, looks_at(taps, look)):
        for inputs in (graph.example_inputs, _noisy(graph.example_inputs)):
            run(model, inputs, 2)
    out = {}
    for name, of_group in ranges.items():
        constant = torch.full((graph.group(name).size,), bool(of_group))
        zero = constant.clone()
        for low, high in of_group.values():
            constant &= (high - low) <= rounding[name] * torch.maximum(low.abs(), high.abs())
            zero &= (low == 0) & (high == 0)
        out[name] = constant, zero
    return out


def _noisy(example_inputs: Any) -> Any:
    """The same inputs and noise as large as they are, where they are floating numbers."""
    generator = torch.Generator().manual_seed(0)

    def noisy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        scale = value.detach().float().std(correction=0).item() or 1.0
        return value + scale * torch.randn(value.shape, generator=generator).to(value)

    if isinstance(example_inputs, Calls):
        return Calls(tuple((module, *tree_map(noisy, (args, kwargs))) for module, args, kwargs in example_inputs.calls))
    return tree_map(noisy, example_inputs)


@dataclass(frozen=True)
class Removal:
    """What `remove_dead` did.

    Attributes:
        units: group -> how many dead units were cut out.
        left: group -> how many were left, as the network would compute something else without them.
        report: dense against now.
    """

    units: Mapping[str, int]
    left: Mapping[str, int]
    report: Report

    def __bool__(self) -> bool:
        return bool(self.units)

    def __str__(self) -> str:
        if not self.units and not self.left:
            return "No unit is dead: each has inputs and outputs. Nothing was removed."
        names = [*self.units, *(name for name in self.left if name not in self.units)]
        rows: list[dict[str, object]] = [
            {"group": name, "removed": self.units.get(name, 0), "left": self.left.get(name, 0)} for name in names
        ]
        return f"{markdown_table(rows)}\n\n{self.report}"


def remove_dead(model: nn.Module, example_inputs: Any, optimizers: Iterable[Optimizer] = ()) -> Removal:
    """Cut dead units out of a model with zeros for masked weights, in place; it computes what it computed.

    Constants that they said go into the biases, or running means, of their readers. A unit whose constant cannot go
    there, or not at the rim of a convolution that pads, is left.

    Args:
        model: a network whose masked weights are zero, after a fit say; not while a method still holds masks.
        example_inputs: a tensor, tuple of positional inputs, or dict of keyword inputs, on any device.
        optimizers: their state follows.

    Returns:
        What was removed and what was left; it is false, and says so, if nothing was removed.

    Raises:
        TraceError: if the model does not run on the example inputs.
        UnsafeCut: if the cut goes wrong; the model is then as before.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data[1].zero_()
        >>> remove_dead(model, torch.randn(4, 2)).units, model[0].out_features
        ({'0': 1}, 2)
    """
    graph = surgery.trace(model, example_inputs)
    wanted, chosen, absorbed = _in_double(model, lambda: _removable(model, graph))
    if chosen:
        plan = graph.plan({name: ~units for name, units in chosen.items()})
        report = surgery.cut(model, plan, optimizers, example_inputs=example_inputs, graph=graph, absorb=absorbed)
    else:
        report = Report(graph.cost(), graph.cost(), {g.name: (g.size, g.size) for g in graph.groups}, {}, graph.frozen)
    removed = {name: int(units.sum()) for name, units in chosen.items()}
    left = {name: int(units.sum()) - removed.get(name, 0) for name, units in wanted.items()}
    return Removal(removed, {name: count for name, count in left.items() if count}, report)


def _removable(model: nn.Module, graph: ChannelGraph) -> tuple[dict[str, Tensor], dict[str, Tensor], Absorbed]:
    """Dead units; those without which the outputs are the same; and what their readers get for them.

    They are all of them if that is so, or what of group after group is so: all of it, or what says nothing but zero.
    """
    parameters = dict(model.named_parameters())
    members = {m.name for group in graph.groups for m in group.members if m.name in parameters}
    masks = {name: parameters[name] != 0 for name in members if parameters[name].ndim > 1}
    first = find_dead(graph, masks)
    dead, stuck = first, silent_constants(model, graph, first, masks)[1]
    spared = stuck
    while stuck:
        dead = find_dead(graph, masks, spared)
        stuck = silent_constants(model, graph, dead, masks)[1]
        spared = joined(spared, stuck)
    wanted = {group.name: units for group in graph.groups if bool((units := first.of(group.name)).any())}
    free = {n: units for n in wanted if graph.group(n).exact and bool((units := dead.of(n)).any())}
    before = _outputs(model, graph)
    found = _without(model, graph, free, before)
    if found is not None:
        return wanted, free, found
    says = _constants(model, graph, free)
    chosen: dict[str, Tensor] = {}
    absorbed = Absorbed()
    for name, units in free.items():
        for attempt in (units, units & (dead.unread[name] | says[name][1])):
            trial = {**chosen, name: attempt}
            if bool(attempt.any()) and (found := _without(model, graph, trial, before)) is not None:
                chosen, absorbed = trial, found
                break
    return wanted, chosen, absorbed


@torch.no_grad()
def _without(
    model: nn.Module, graph: ChannelGraph, units: Mapping[str, Tensor], before: list[Tensor]
) -> Absorbed | None:
    """What readers get for these units, if nobody misses them then, else None; the model is left as it was."""
    plan = graph.plan({name: ~mask for name, mask in units.items()})
    found = absorbable(model, plan, graph)
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {name: tensors[name].detach().clone() for name in {*plan.kept, *found.shifts}}
    try:
        for name, dims in plan.kept.items():
            for dim, kept in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                gone[kept] = False
                tensors[name].index_fill_(dim, gone.nonzero().squeeze(1).to(tensors[name].device), 0)
        found.add_to(model)
        same = all(_close(a, b) for a, b in zip(before, _outputs(model, graph), strict=True))
        return found if same else None
    finally:
        for name, values in own.items():
            tensors[name].copy_(values)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    return float((a - b).abs().max()) <= _SAME.get(a.dtype, 0.02) * float(a.abs().max())


def _outputs(model: nn.Module, graph: ChannelGraph) -> list[Tensor]:
    with evaluating(model):
        out = [run(model, inputs, 2) for inputs in (graph.example_inputs, _noisy(graph.example_inputs))]
    return [tensor.clone() for tensor in output_tensors(out) if tensor.is_floating_point()]


def _in_double(model: nn.Module, function: Callable[[], _T]) -> _T:
    """What a function finds with the model in double precision, where its code runs in it; values come back as is."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    own = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        return function()
    except Exception:  # it holds a dtype in its code, or the device has no double precision
        pass
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data
    return function()
