"""Records -> groups: which coordinates go together, what may go, and what a choice would cost.

Coordinates joined by an edge are one *channel*. Channels that touch the same dimensions of the same parameters, each as
often, are a *group*; ranking chooses among the channels of a group, or of all groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from lightning_prune.cost import Cost, CostModel
from lightning_prune.decision import Plan
from lightning_prune.graph import equations
from lightning_prune.graph.explain import explain
from lightning_prune.graph.flow import Activation, Call, Flow, Tap
from lightning_prune.graph.gates import Gate, place
from lightning_prune.graph.labels import Dim, Ids, full, ids_of
from lightning_prune.graph.sizes import Read, leaves
from lightning_prune.graph.trace import LayerRecord, Records, Slot, record


@dataclass(frozen=True)
class Member:
    """The part a parameter has in a group.

    Attributes:
        name: qualified name of the parameter or buffer.
        dim: which of its dimensions.
        indices: (C, M): for each channel of the group, the indices of that dimension it stands for.
        is_buffer: whether it is a buffer.
    """

    name: str
    dim: int
    indices: Tensor
    is_buffer: bool


@dataclass(frozen=True)
class Norm:
    """Scale and shift of a norm over a group's channels: parameter names, with (C,) indices into them."""

    gamma: str
    beta: str | None
    indices: Tensor


@dataclass(frozen=True)
class Producer:
    """A layer whose output axis carries a group's channels.

    Attributes:
        name: module path.
        weight, bias: parameter names; bias may be None.
        dim: axis of the weight that makes channels.
        indices: (C,) index of each channel on that axis.
        norms: norms whose scale gates these channels: the one that follows directly, else those of all readers.
        gated: whether such a norm follows directly.
        scale_free: whether a norm without a scale follows, so that the loss does not depend on the filter's length.
    """

    name: str
    weight: str
    bias: str | None
    dim: int
    indices: Tensor
    norms: tuple[Norm, ...] = ()
    gated: bool = False
    scale_free: bool = False


@dataclass(frozen=True)
class Consumer:
    """A layer whose input axis carries a group's channels: (C, M) ``indices`` on axis ``dim`` of its weight."""

    name: str
    weight: str
    dim: int
    indices: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that can be chosen among: channel i goes as a whole, in every member.

    Attributes:
        name: module path of the first producer.
        size: number of channels, C.
        members: every parameter and buffer dimension that carries them.
        producers: layers that make them, in data-flow order.
        consumers: layers that read them.
        exact: whether a cut computes what zeroing computes.
        inexact_because: why not, if not.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    exact: bool = True
    inexact_because: str = ""

    def __repr__(self) -> str:
        return f"Group({self.name!r}, size={self.size}, exact={self.exact})"


@dataclass(frozen=True)
class Resized:
    """An attribute of a module that has to follow: its value is ``factor`` times a size of the cost model.

    Attributes:
        module: path.
        attribute: name.
        index: of the size, in `CostModel`.
        factor: what the size is multiplied by.
        position: which entry of it, where it is a tuple or list; ``whole`` then holds all of them.
        whole: the attribute when traced, if it has entries.
    """

    module: str
    attribute: str
    index: int
    factor: int = 1
    position: int | None = None
    whole: tuple[int, ...] = ()


@dataclass(frozen=True)
class Partly:
    """What is frozen of a layer that makes other channels that may go.

    Attributes:
        weight, dim: the dimension that carries its channels.
        count: how many of them are frozen, however many of the others go.
        reason: why the first of them is.
    """

    weight: str
    dim: int
    count: int
    reason: str


@dataclass
class ChannelGraph:
    """What may be cut out of a model, and at what saving.

    Attributes:
        model: the traced model.
        example_inputs: what it was traced on.
        groups: what may go, in data-flow order.
        frozen: parameter or layer -> why none of its channels may go.
        partly: layer -> what is frozen of it, where that is not all.
        costs: flops and parameters by arithmetic.
        suspects: groups whose size the model's own code may hold as a number, before that is tried.
        resized: module attributes that follow a cut.
        shapes: shapes of parameters and buffers when traced.
        weights: parameters with more than one dimension that a layer multiplies with: what weight methods may mask.
        weight_terms: per term of the flops, the parameter it multiplies with.
        has_training_branch: whether layers run in train mode that do not in eval mode (auxiliary heads).
        flow: which calls of a forward carry the groups.
    """

    model: nn.Module
    example_inputs: Any
    groups: tuple[Group, ...]
    frozen: dict[str, str]
    partly: Mapping[str, Partly]
    costs: CostModel
    suspects: frozenset[str]
    resized: tuple[Resized, ...]
    shapes: Mapping[str, tuple[int, ...]]
    weights: tuple[str, ...] = ()
    weight_terms: tuple[str | None, ...] = ()
    has_training_branch: bool = False
    flow: Flow | None = field(default=None, repr=False)
    _by_name: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_name = {group.name: i for i, group in enumerate(self.groups)}

    def group(self, name: str) -> Group:
        """A group by its name."""
        return self.groups[self._by_name[name]]

    def plan(self, keep: Mapping[str, Tensor]) -> Plan:
        """A plan that keeps the given channels.

        Args:
            keep: group name -> (C,) bool, True = keep. Groups left out keep everything.

        Raises:
            ValueError: for an unknown group, a mask of another shape, or a group left without a channel.
        """
        tables = self._tables
        stays = np.ones(sum(group.size for group in self.groups), dtype=bool)
        touched: list[Group] = []
        counts = self.costs.dense.copy()
        groups: dict[str, tuple[int, int]] = {}
        for name, mask in keep.items():
            if name not in self._by_name:
                raise ValueError(f"no group {name!r}; groups are {', '.join(self._by_name)}")
            group = self.group(name)
            mask = mask.detach().cpu()
            if mask.dtype != torch.bool or mask.shape != (group.size,):
                raise ValueError(
                    f"group {name!r} wants a bool mask of shape ({group.size},), got {mask.dtype} {tuple(mask.shape)}"
                )
            i = self._by_name[name]
            n = int(mask.sum())
            if not n:
                raise ValueError(f"group {name!r} would be left without a channel")
            counts[i] = n
            groups[name] = (n, group.size)
            if n < group.size:
                stays[tables.first_channel[i] : tables.first_channel[i] + group.size] = mask.numpy()
                touched.append(group)
        kept: dict[str, dict[int, Tensor]] = {}
        buffers: dict[str, dict[int, Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        alive = tables.alive(stays)
        for name, dim, is_buffer in dict.fromkeys((m.name, m.dim, m.is_buffer) for g in touched for m in g.members):
            left = alive[tables.axes[name, dim]]
            if not left.shape[0]:
                raise ValueError(f"{name!r} would be left without an index in dimension {dim}")
            (buffers if is_buffer else kept).setdefault(name, {})[dim] = left
            shapes[name] = self.shapes[name]
        return Plan._of_valid(kept, buffers, shapes, self._attributes(counts), groups)

    @cached_property
    def _tables(self) -> _Tables:
        return _Tables.of(self.groups, self.shapes)

    def _attributes(self, counts: NDArray[np.int64]) -> dict[str, dict[str, int | tuple[int, ...]]]:
        before = self.costs.base + self.costs.per_group @ self.costs.dense
        after = self.costs.base + self.costs.per_group @ counts
        out: dict[str, dict[str, int | tuple[int, ...]]] = {}
        for entry in self.resized:
            if before[entry.index] != after[entry.index]:
                size = entry.factor * int(after[entry.index])
                values = out.setdefault(entry.module, {})
                if entry.position is None:
                    values[entry.attribute] = (size,) if entry.attribute == "normalized_shape" else size
                else:
                    earlier = values.get(entry.attribute, entry.whole)
                    assert isinstance(earlier, tuple)
                    values[entry.attribute] = (*earlier[: entry.position], size, *earlier[entry.position + 1 :])
        return out

    def counts(self, plan: Plan) -> NDArray[np.int64]:
        """(G,) channels of each group that a plan keeps."""
        counts = self.costs.dense.copy()
        for i, group in enumerate(self.groups):
            if group.name in plan.groups:
                counts[i] = plan.groups[group.name][0]
        return counts

    def cost(self, plan: Plan | None = None) -> Cost:
        """What the model would cost once a plan is applied, to the unit what fvcore counts then; without one, now."""
        return self.costs.cost(None if plan is None else self.counts(plan))

    @property
    def prunable_share(self) -> float:
        """Share of all parameters with at least one coordinate that may go."""
        touched: dict[str, Tensor] = {}
        for group in self.groups:
            for member in group.members:
                if member.is_buffer:
                    continue
                mask = touched.setdefault(member.name, torch.zeros(self.shapes[member.name], dtype=torch.bool))
                mask.movedim(member.dim, 0)[member.indices.reshape(-1)] = True
        return sum(int(m.sum()) for m in touched.values()) / max(1, self.costs.params(self.costs.dense))

    def without(self, names: Mapping[str, str]) -> ChannelGraph:
        """The same graph with some groups frozen: group name -> reason."""
        stay = [i for i, group in enumerate(self.groups) if group.name not in names]
        gone = [i for i, group in enumerate(self.groups) if group.name in names]
        costs = self.costs
        base = costs.base + costs.per_group[:, gone] @ costs.dense[gone]
        reduced = CostModel(
            base,
            costs.per_group[:, stay],
            costs.dense[stay],
            costs.flop_coefficients,
            costs.flop_sizes,
            costs.param_coefficients,
            costs.param_sizes,
            costs.labels,
            costs.rounded,
        )
        return ChannelGraph(
            self.model,
            self.example_inputs,
            tuple(self.groups[i] for i in stay),
            {**self.frozen, **names},
            self.partly,
            reduced,
            self.suspects - set(names),
            self.resized,
            self.shapes,
            self.weights,
            self.weight_terms,
            self.has_training_branch,
            self.flow,
        )

    def weight_flops(self) -> dict[str, int]:
        """Flops that each weight's layers cost, for one sample."""
        flops = self.costs.flop_terms(self.costs.dense)
        out = dict.fromkeys(self.weights, 0)
        for name, n in zip(self.weight_terms, flops.tolist(), strict=True):
            if name in out:
                out[name] += n
        return out

    def after(self, plan: Plan) -> ChannelGraph:
        """The graph of the model once a plan of this graph is applied, without tracing again.

        Args:
            plan: made by `plan` of this graph.
        """
        tables = self._tables.after({**plan.kept, **plan.buffers})
        new = tables.split()
        groups = []
        for group in self.groups:
            members = tuple([Member(m.name, m.dim, next(new), m.is_buffer) for m in group.members])
            producers = tuple(
                Producer(
                    p.name,
                    p.weight,
                    p.bias,
                    p.dim,
                    next(new),
                    tuple([Norm(n.gamma, n.beta, next(new)) for n in p.norms]),
                    p.gated,
                    p.scale_free,
                )
                for p in group.producers
            )
            consumers = tuple([Consumer(c.name, c.weight, c.dim, next(new)) for c in group.consumers])
            size = members[0].indices.shape[0]
            groups.append(Group(group.name, size, members, producers, consumers, group.exact, group.inexact_because))
        shapes = {name: plan.current_shape(name) if name in plan.shapes else s for name, s in self.shapes.items()}
        counts = self.counts(plan)
        attributes = self._attributes(counts)
        resized = tuple(self._now(entry, attributes.get(entry.module, {})) for entry in self.resized)
        costs = replace(self.costs, dense=counts)
        flow = None if self.flow is None else self.flow.after(self.groups, {**plan.kept, **plan.buffers})
        graph = replace(self, groups=tuple(groups), costs=costs, shapes=shapes, resized=resized, flow=flow)
        vars(graph)["_tables"] = tables
        return graph

    @staticmethod
    def _now(entry: Resized, attributes: Mapping[str, int | tuple[int, ...]]) -> Resized:
        """An entry of an attribute with entries, with those as a plan leaves them."""
        whole = attributes.get(entry.attribute)
        return replace(entry, whole=whole) if entry.position is not None and isinstance(whole, tuple) else entry

    def maps(self, group: Group) -> list[Tap]:
        """A group's maps as its readers receive them: after norm, activation and add, before pooling."""
        assert self.flow is not None
        return self.flow.maps(group.name, [consumer.weight for consumer in group.consumers])

    def gates(self, group: Group) -> list[Tap]:
        """What a group's gates multiply: behind the norms or layers of `gate_parameters`."""
        assert self.flow is not None
        found: dict[Call, Tap] = {}
        for gate in self.gate_parameters(group):
            for tap in self.flow.made_by(gate.weight, group.name):
                found.setdefault(tap.call, replace(tap, indices=gate.of(tap.indices)))
        return list(found.values())

    def gate_parameters(self, group: Group) -> tuple[Gate, ...]:
        """Where a gate on a group's channels sits; see `lightning_prune.graph.gates`."""
        assert self.flow is not None
        known = self.flow.gates
        if group.name not in known:
            readers = [consumer.weight for consumer in group.consumers]
            found = place(self.flow, group.name, readers, {p.weight: p.dim for p in group.producers})
            known[group.name] = _with_all_parameters(group, found or gates_of(group))
        return known[group.name]

    def activation(self, producer: Producer) -> Activation:
        """What a producer's channels go through behind its norm, or behind the layer."""
        assert self.flow is not None
        return self.flow.activation(producer.norms[0].gamma if producer.norms else producer.weight)

    def explain(self) -> str:
        """Per group what goes together and what it is worth; then what is frozen, why, and what would free it."""
        return str(explain(self))


@dataclass(frozen=True)
class _Tables:
    """All index tables of a graph's groups in one array, so that no step has to be taken table by table.

    Dimensions on which the same channels lie in the same places, such as those of a filter, its norm and the next
    layer's input, are one *axis*, and what is the same on all of them is worked out once.

    Attributes:
        axes: (name, dim) of a parameter or buffer -> its axis; sizes: (A,) how long that is.
        axis, group, rows, width: (T,) of each table.
        members: how many tables are of members; these come first.
        places: (N,) all entries, table after table, row after row: places on the table's axis.
        used: per group the table of each of its members, producers with their norms, and consumers, in turn.
    """

    axes: Mapping[tuple[str, int], int]
    sizes: NDArray[np.int64]
    axis: NDArray[np.int64]
    group: NDArray[np.int64]
    rows: NDArray[np.int64]
    width: NDArray[np.int64]
    members: int
    places: NDArray[np.int64]
    used: Sequence[Sequence[int]]

    @classmethod
    def of(cls, groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]]) -> _Tables:
        contents: dict[tuple[int, tuple[int, ...], bytes], int] = {}

        def content(g: int, indices: Tensor) -> int:
            return contents.setdefault((g, tuple(indices.shape), indices.numpy().tobytes()), len(contents))

        members = [[(m.name, m.dim, content(g, m.indices)) for m in group.members] for g, group in enumerate(groups)]
        others = [[(name, dim, content(g, i)) for name, dim, i in _others(group)] for g, group in enumerate(groups)]
        lie: dict[tuple[str, int], list[int]] = {(name, dim): [] for part in others for name, dim, _ in part}
        for part in members:
            for name, dim, c in part:
                lie.setdefault((name, dim), []).append(c)
        kinds: dict[tuple[int, ...], int] = {}
        axes = {(n, dim): kinds.setdefault((shapes[n][dim], *on), len(kinds)) for (n, dim), on in lie.items()}
        tables: dict[tuple[int, int], int] = {}
        used = [[tables.setdefault((axes[n, dim], c), len(tables)) for n, dim, c in part] for part in members]
        count = len(tables)
        for g, part in enumerate(others):
            used[g] += [tables.setdefault((axes[n, dim], c), len(tables)) for n, dim, c in part]
        keys = list(contents)
        shown = [keys[c] for _, c in tables]
        return cls(
            axes,
            np.array([size for size, *_ in kinds], dtype=np.int64),
            np.array([axis for axis, _ in tables], dtype=np.int64),
            np.array([g for g, _, _ in shown], dtype=np.int64),
            np.array([rows for _, (rows, _), _ in shown], dtype=np.int64),
            np.array([width for _, (_, width), _ in shown], dtype=np.int64),
            count,
            np.frombuffer(b"".join(entries for _, _, entries in shown), dtype=np.int64),
            used,
        )

    @cached_property
    def first_channel(self) -> NDArray[np.int64]:
        """(G,) number of each group's first channel, where those of all groups are counted through."""
        size = np.zeros(len(self.used), dtype=np.int64)
        size[self.group[: self.members]] = self.rows[: self.members]
        return _starts(size)

    def alive(self, stays: NDArray[np.bool_]) -> list[Tensor]:
        """Per axis its indices that stay, if of all channels these do."""
        rows, width = self.rows[: self.members], self.width[: self.members]
        row = np.arange(rows.sum()) + np.repeat(self.first_channel[self.group[: self.members]] - _starts(rows), rows)
        gone = np.repeat(~stays[row], np.repeat(width, rows))
        first = _starts(self.sizes)
        left = np.ones(self.sizes.sum(), dtype=bool)
        left[(self.places[: len(gone)] + np.repeat(first[self.axis[: self.members]], rows * width))[gone]] = False
        indices = np.flatnonzero(left)
        ends = [*np.searchsorted(indices, first).tolist(), len(indices)]
        return [torch.from_numpy(indices[a:b] - f) for a, b, f in zip(ends, ends[1:], first.tolist(), strict=False)]

    def after(self, kept: Mapping[str, Mapping[int, Tensor]]) -> _Tables:
        """The tables once only these indices of each dimension are left; rows without one of theirs are gone."""
        first = _starts(self.sizes)
        sizes = self.sizes.copy()
        moved = np.arange(self.sizes.sum()) - np.repeat(first, self.sizes)
        left = {axis: kept[name][dim] for (name, dim), axis in self.axes.items() if dim in kept.get(name, ())}
        for axis, index in left.items():
            part = moved[first[axis] : first[axis] + self.sizes[axis]]
            part[:] = -1
            part[index.numpy()] = np.arange(index.shape[0])
            sizes[axis] = index.shape[0]
        places = moved[self.places + np.repeat(first[self.axis], self.rows * self.width)]
        widths = np.repeat(self.width, self.rows)
        stays = np.minimum.reduceat(places, _starts(widths)) >= 0 if len(places) else np.zeros(0, dtype=bool)
        ends = np.concatenate([[0], np.cumsum(stays)])[np.concatenate([[0], np.cumsum(self.rows)])]
        return replace(self, sizes=sizes, rows=np.diff(ends), places=places[np.repeat(stays, widths)])

    def split(self) -> Iterator[Tensor]:
        """What `used` names, one (C, M) table after the other; what is the same there is one tensor."""
        ends = np.cumsum(self.rows * self.width).tolist()
        shapes = zip([0, *ends], ends, self.rows.tolist(), self.width.tolist(), strict=False)
        tables = [torch.from_numpy(self.places[a:b].reshape(rows, width)) for a, b, rows, width in shapes]
        return (tables[t] for part in self.used for t in part)


def _others(group: Group) -> Iterator[tuple[str, int, Tensor]]:
    """(name, dim, indices) of a group's producers with their norms, and of its consumers."""
    for p in group.producers:
        yield p.weight, p.dim, p.indices
        for n in p.norms:
            yield n.gamma, 0, n.indices
    for c in group.consumers:
        yield c.weight, c.dim, c.indices


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of several pieces begins, one after the other."""
    return np.cumsum(lengths) - lengths


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Trace a model and find what may be cut out of it.

    Args:
        model: any module that runs on the example inputs. Its mode, buffers, gradients, hooks and the random state are
            left as they were.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs, on any device.

    Returns:
        The graph. It may have no groups; `ChannelGraph.frozen` then says why.

    Raises:
        TraceError: if the model does not run on the example inputs.
    """
    return build(model, example_inputs, record(model, example_inputs))


def build(model: nn.Module, example_inputs: Any, records: Records) -> ChannelGraph:
    """Records -> graph: components, what is frozen, groups, and costs."""
    held = equations.held(records)
    index, reasons = _indexed(records)
    names, unit_group, unit_place, unit_components = _grouped_units(index, records)

    def sizes() -> equations.Sizes:
        return equations.Sizes(held, index.component, unit_group, unit_components)

    if joined := equations.joined(records, sizes()):
        records.edges += joined
        index, reasons = _indexed(records)
        names, unit_group, unit_place, unit_components = _grouped_units(index, records)
    while broken := equations.broken(records, sizes()):
        for g, why in broken.items():
            index.free[unit_components[g]] = False
            reasons.update(dict.fromkeys(unit_components[g].tolist(), why))
        names, unit_group, unit_place, unit_components = _grouped_units(index, records)
    records.inexact += equations.inexact(records, held)
    groups, suspects = _groups(index, records, names, unit_group, unit_place, unit_components)
    costs, resized = _costs(model, records, index.component, unit_group, len(groups), unit_components)
    return ChannelGraph(
        model,
        example_inputs,
        tuple(groups),
        *_frozen_names(records, index, unit_group, reasons),
        costs,
        frozenset(suspects),
        tuple(resized),
        {name: tuple(t.shape) for named in (records.parameters, records.buffers) for name, t in named.items()},
        _weights(records),
        tuple(term.weight for term in records.terms),
        records.has_training_branch,
        Flow.of(records, index.component, unit_group, unit_place, {group.name: g for g, group in enumerate(groups)}),
    )


def _indexed(records: Records) -> tuple[_Index, dict[int, str]]:
    """Components of the coordinates, and the frozen ones with their reasons."""
    component = _components(records)
    count = int(component.max()) + 1 if len(component) else 0
    reasons = _reasons(records, component, count)
    free = np.ones(count, dtype=bool)
    free[list(reasons)] = False
    slot_of = np.repeat(np.arange(len(records.slots)), [s.size for s in records.slots])
    return _Index(records, component, slot_of, free), reasons


def _weights(records: Records) -> tuple[str, ...]:
    """Weights that layers multiply with, in the model's order; not those of norms and embeddings."""
    no = {layer.weight for layer in records.layers if layer.kind in ("norm", "embedding")}
    yes = {term.weight for term in records.terms}
    return tuple(
        name
        for name, p in records.parameters.items()
        if p.ndim > 1
        and name in records.touched
        and name not in no
        and (name in yes or "weight" in name.rpartition(".")[2])
    )


def _components(records: Records) -> Ids:
    if not records.edges:
        return np.arange(records.size, dtype=np.int64)
    left = np.concatenate([a for a, _ in records.edges])
    right = np.concatenate([b for _, b in records.edges])
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(records.size, records.size))
    labels: Ids = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _reasons(records: Records, component: Ids, count: int) -> dict[int, str]:
    """Frozen component -> the first reason."""
    reasons: dict[int, str] = {}
    first = np.full(count, len(records.frozen))
    for i, (ids, _) in enumerate(records.frozen):
        at = component[ids]
        first[at] = np.minimum(first[at], i)
    for c in np.flatnonzero(first < len(records.frozen)).tolist():
        reasons[c] = records.frozen[first[c]][1]
    for slot in records.slots:
        if slot.name not in records.touched:
            for c in np.unique(component[slot.offset : slot.offset + slot.size]).tolist():
                reasons.setdefault(c, f"the example input did not reach '{slot.name}'")
    return reasons


class _Index:
    """Look-ups over coordinates: component, slot, and place in the slot."""

    def __init__(self, records: Records, component: Ids, slot_of: Ids, free: NDArray[np.bool_]) -> None:
        self.slots = records.slots
        self.component = component
        self.slot_of = slot_of
        self.free = free
        self.offsets = np.array([s.offset for s in records.slots], dtype=np.int64)

    def slot(self, ids: Ids) -> Slot | None:
        """The slot all these coordinates are of, if it is one."""
        at = self.slot_of[ids]
        return self.slots[int(at[0])] if len(at) and (at == at[0]).all() else None


def _grouped_units(
    index: _Index, records: Records
) -> tuple[int, NDArray[np.int64], NDArray[np.int64], list[NDArray[np.int64]]]:
    """Components that touch the same slots, and the same sizes of traced tensors, equally often are one group.

    Returns:
        number of groups; per component its group (-1: none) and its place in it; per group its components in order.
    """
    count = len(index.free)
    rng = np.random.default_rng(0)
    coordinate_hash = rng.integers(1, 2**63, size=len(index.slots), dtype=np.uint64)
    signature = np.zeros(count, dtype=np.uint64)
    np.add.at(signature, index.component, coordinate_hash[index.slot_of])
    seen: dict[int, None] = {}
    for ids in _arrays(records):
        if id(ids) in seen:
            continue
        seen[id(ids)] = None
        known = ids[ids >= 0]
        np.add.at(signature, index.component[known], rng.integers(1, 2**63, dtype=np.uint64))
    first = np.full(count, np.iinfo(np.int64).max, dtype=np.int64)
    np.minimum.at(first, index.component, np.arange(len(index.component)))
    group = np.full(count, -1, dtype=np.int64)
    place = np.full(count, -1, dtype=np.int64)
    components: list[NDArray[np.int64]] = []
    candidates = np.flatnonzero(index.free)
    candidates = candidates[np.argsort(first[candidates], kind="stable")]
    _, begins, kind, sizes = np.unique(
        signature[candidates], return_index=True, return_inverse=True, return_counts=True
    )
    by_kind = np.split(candidates[np.argsort(kind, kind="stable")], np.cumsum(sizes)[:-1])
    for i in np.argsort(begins).tolist():
        array = by_kind[i]
        if len(array) == 1:  # a lone channel cannot go: its layer would be left without one
            continue
        group[array] = len(components)
        place[array] = np.arange(len(array))
        components.append(array)
    return len(components), group, place, components


def _arrays(records: Records) -> Iterable[Ids]:
    for term in records.terms:
        for dim in term.dims:
            yield from ids_of(dim)
    for equation in records.equations:
        yield from ids_of(equation.dim)
        for leaf in leaves(equation.form):
            if isinstance(leaf, Read):
                yield from ids_of(leaf.dim)


def _groups(
    index: _Index,
    records: Records,
    count: int,
    unit_group: NDArray[np.int64],
    unit_place: NDArray[np.int64],
    components: Sequence[NDArray[np.int64]],
) -> tuple[list[Group], set[str]]:
    members = _members(index, unit_group, unit_place, components)
    producers: list[list[Producer]] = [[] for _ in range(count)]
    followers: list[list[Producer]] = [[] for _ in range(count)]
    consumers: list[list[Consumer]] = [[] for _ in range(count)]
    norms, direct = _norms(index, records, unit_group, unit_place, components)
    seen: set[tuple[int, str]] = set()
    without_scale = {r.source for r in records.layers if r.kind == "norm" and r.weight is None}
    for number, layer in enumerate(records.layers):
        if layer.kind == "norm":
            continue
        for g, positions in _split_by_group(index, unit_group, layer.out):
            producer = _producer(index, layer, g, positions, unit_place, components)
            if producer is None or (g, producer.weight) in seen:
                continue
            seen.add((g, producer.weight))
            own = tuple(direct.get((number, g), ()))
            producer = Producer(
                producer.name,
                producer.weight,
                producer.bias,
                producer.dim,
                producer.indices,
                own,
                bool(own),
                number in without_scale and not own,
            )
            (followers if layer.depthwise else producers)[g].append(producer)
    read: set[tuple[int, str]] = set()
    for layer in records.layers:
        if layer.into is None or layer.weight is None:
            continue
        slots = [s for s in index.slots if s.name == layer.weight]
        made = index.slot(layer.out[layer.out >= 0])
        if made is not None and made.name != layer.weight:  # what it makes is told by another weight: find its own axis
            made = next((s for s in slots if _same_channels(index, s, layer.out)), made)
        for slot in slots:
            if made is not None and slot.name == made.name and slot.dim == made.dim:
                continue
            ids = np.arange(slot.offset, slot.offset + slot.size)
            for g, positions in _split_by_group(index, unit_group, ids):
                if (g, layer.weight) in read:
                    continue
                read.add((g, layer.weight))
                table = _table(index.component[ids[positions]], positions, unit_place, len(components[g]))
                if table is not None:
                    consumers[g].append(Consumer(layer.module, layer.weight, slot.dim, table))
    out: list[Group] = []
    used: dict[str, int] = {}
    suspects: set[str] = set()
    suspicious = np.zeros(len(index.free), dtype=bool)
    for ids in records.suspect:
        suspicious[index.component[ids]] = True
    inexact = np.full(len(index.free), len(records.inexact))  # the first that says so
    for i, (ids, _) in enumerate(records.inexact):
        at = index.component[ids]
        inexact[at] = np.minimum(inexact[at], i)
    for g in range(count):
        made_by = producers[g] or followers[g]
        made_by = _with_reader_norms(made_by, norms[g])
        name = made_by[0].name if made_by else members[g][0].name.rpartition(".")[0] or members[g][0].name
        used[name] = used.get(name, 0) + 1
        name = name if used[name] == 1 else f"{name}:{used[name]}"
        first = int(inexact[components[g]].min())
        why = records.inexact[first][1] if first < len(records.inexact) else ""
        if suspicious[components[g]].any():
            suspects.add(name)
        out.append(
            Group(name, len(components[g]), tuple(members[g]), tuple(made_by), tuple(consumers[g]), not why, why)
        )
    return out, suspects


def gates_of(group: Group) -> tuple[Gate, ...]:
    """A gate behind each producer's norm, else behind the layer."""
    norms = [Gate(norm.gamma, 0, norm.beta) for p in group.producers for norm in p.norms]
    return (*norms, *(Gate(p.weight, p.dim, p.bias) for p in group.producers if not p.norms and not p.gated))


def _with_all_parameters(group: Group, gates: Sequence[Gate]) -> tuple[Gate, ...]:
    """Gates with what the calls of their layers do not tell: a bias added later, the lengths of normed filters."""
    names = {member.name for member in group.members}
    out: list[Gate] = []
    for gate in gates:
        owner, _, own = gate.weight.rpartition(".")
        bias = f"{owner.removesuffix('.parametrizations.weight')}.bias".removeprefix(".")
        later = gate.bias is None and own in ("weight", "original", "original1") and bias in names
        out.append(replace(gate, bias=bias) if later else gate)
        if own == "original1" and f"{owner}.original0" in names:  # a filter is its direction times its length
            out.append(Gate(f"{owner}.original0", gate.dim, None))
    return tuple(out)


def _same_channels(index: _Index, slot: Slot, out: Ids) -> bool:
    ids = np.arange(slot.offset, slot.offset + slot.size)
    return len(ids) == len(out) and bool((index.component[ids] == index.component[out]).all())


def _with_reader_norms(producers: list[Producer], readers: list[Norm]) -> list[Producer]:
    """Where no norm follows a producer directly, the norms of its readers gate its channels (pre-activation nets).

    They see the sum of all such producers, so they are counted once, with the first.
    """
    bare = [i for i, p in enumerate(producers) if not p.gated]
    if not bare or not readers:
        return producers
    own = {norm.gamma for p in producers for norm in p.norms}
    left = tuple(norm for norm in readers if norm.gamma not in own)
    if not left:
        return producers
    out = list(producers)
    for i in bare:
        p = out[i]
        out[i] = replace(p, norms=left if i == bare[0] else (), gated=i != bare[0])
    return out


def _split_by_group(index: _Index, unit_group: NDArray[np.int64], ids: Ids) -> list[tuple[int, Ids]]:
    """Positions of a label array, by group; those of frozen channels left out."""
    if len(ids) and ids[0] >= 0:
        groups = unit_group[index.component[ids]]  # of -1 it is the last one's, which the next line finds out
        if ids.min() >= 0 and (groups == groups[0]).all():  # nearly always
            return [(int(groups[0]), np.arange(len(ids)))] if groups[0] >= 0 else []
    known = np.flatnonzero(ids >= 0)
    groups = unit_group[index.component[ids[known]]]
    return [(int(g), known[groups == g]) for g in np.unique(groups) if g >= 0]


def _table(component: Ids, positions: Ids, unit_place: NDArray[np.int64], size: int) -> Tensor | None:
    """(C, M): the positions of each channel, in the group's order; None if channels differ in how many they have."""
    places = unit_place[component]
    if len(places) == size and (places == np.arange(size)).all():  # nearly always
        return torch.from_numpy(positions.reshape(size, 1).copy())
    order = np.argsort(places, kind="stable")
    if len(positions) % size:
        return None
    table = positions[order].reshape(size, -1)
    if not (places[order].reshape(size, -1) == np.arange(size)[:, None]).all():
        return None
    return torch.from_numpy(table.copy())


def _members(
    index: _Index,
    unit_group: NDArray[np.int64],
    unit_place: NDArray[np.int64],
    components: Sequence[NDArray[np.int64]],
) -> list[list[Member]]:
    members: list[list[Member]] = [[] for _ in components]
    for slot in index.slots:
        if slot.is_virtual:
            continue
        ids = np.arange(slot.offset, slot.offset + slot.size)
        for g, positions in _split_by_group(index, unit_group, ids):
            table = _table(index.component[ids[positions]], positions, unit_place, len(components[g]))
            assert table is not None, f"channels of one group differ in {slot.name}[{slot.dim}]"
            members[g].append(Member(slot.name, slot.dim, table, slot.is_buffer))
    return members


def _producer(
    index: _Index,
    layer: LayerRecord,
    g: int,
    positions: Ids,
    unit_place: NDArray[np.int64],
    components: Sequence[NDArray[np.int64]],
) -> Producer | None:
    ids = layer.out[positions]
    slot = index.slot(ids)
    if slot is None or layer.weight is None:
        return None
    if slot.name != layer.weight:
        slot = next((s for s in index.slots if s.name == layer.weight and s.size == len(layer.out)), None)
        if slot is None:
            return None
        places = positions
    else:
        places = ids - slot.offset
    order = np.argsort(unit_place[index.component[ids]], kind="stable")
    if len(order) % len(components[g]):
        return None
    step = len(order) // len(components[g])
    indices = torch.from_numpy(places[order].reshape(-1, step).copy())
    return Producer(layer.module, layer.weight, layer.bias, slot.dim, indices)


def _norms(
    index: _Index,
    records: Records,
    unit_group: NDArray[np.int64],
    unit_place: NDArray[np.int64],
    components: Sequence[NDArray[np.int64]],
) -> tuple[list[list[Norm]], dict[tuple[int, int], list[Norm]]]:
    """Norms over each group, and those that follow a layer directly: (record number, group) -> norms."""
    slots = {s.name: s for s in index.slots if s.dim == 0}
    by_group: list[list[Norm]] = [[] for _ in components]
    direct: dict[tuple[int, int], list[Norm]] = {}
    seen: set[tuple[int, str]] = set()
    for layer in records.layers:
        if layer.kind != "norm" or layer.weight is None:
            continue
        slot = slots[layer.weight]
        ids = np.arange(slot.offset, slot.offset + slot.size)
        for g, positions in _split_by_group(index, unit_group, ids):
            if (g, layer.weight) in seen:
                continue
            seen.add((g, layer.weight))
            table = _table(index.component[ids[positions]], positions, unit_place, len(components[g]))
            if table is None:
                continue
            norm = Norm(layer.weight, layer.bias, table)
            by_group[g].append(norm)
            if layer.source is not None:
                direct.setdefault((layer.source, g), []).append(norm)
    return by_group, direct


def _frozen_names(
    records: Records, index: _Index, unit_group: NDArray[np.int64], reasons: dict[int, str]
) -> tuple[dict[str, str], dict[str, Partly]]:
    """Layers whose output channels are frozen, and parameters that nothing reached -> the reason; then what is partly.

    A channel that shares its group with no other counts as frozen.
    """
    out: dict[str, str] = {}
    partly: dict[str, Partly] = {}
    for layer in records.layers:
        if layer.kind == "norm":
            continue
        ids = layer.out[layer.out >= 0]
        stuck = index.component[ids][unit_group[index.component[ids]] < 0]
        if not len(stuck):
            continue
        name = layer.module or layer.weight or ""
        first = int(stuck[0])
        reason = reasons.setdefault(first, "no other channel goes with what it goes with, and a layer keeps one")
        slot = index.slot(ids)
        if len(stuck) == len(ids):
            out.setdefault(name, reason)
        elif slot is not None and not slot.is_virtual:
            partly.setdefault(name, Partly(slot.name, slot.dim, len(np.unique(stuck)), reason))
    for slot in records.slots:
        if slot.name not in records.touched and not slot.is_buffer:
            out.setdefault(slot.name, f"the example input did not reach '{slot.name}'")
    for ids, why in records.frozen:
        if "no rule" in why:
            slot = records.slots[int(index.slot_of[ids[0]])]
            out.setdefault(slot.name, why)
    return out, partly


_ATTRIBUTES = {
    "conv": (("out_channels", "out"), ("in_channels", "into")),
    "linear": (("out_features", "out"), ("in_features", "into"), ("nf", "out")),
    "norm": (("num_features", "out"), ("num_channels", "out"), ("normalized_shape", "out")),
    "embedding": (("embedding_dim", "out"),),
}


_HELD = (
    ("out_features", "weight", 0),
    ("in_features", "weight", 1),
    ("embedding_dim", "weight", 1),
    ("num_channels", "weight", 0),
    ("normalized_shape", "weight", 0),
    ("num_features", "weight", 0),
    ("num_features", "running_mean", 0),
)


def _costs(
    model: nn.Module,
    records: Records,
    component: Ids,
    unit_group: NDArray[np.int64],
    groups: int,
    components: Sequence[NDArray[np.int64]],
) -> tuple[CostModel, list[Resized]]:
    base: list[int] = [1]
    rows: list[NDArray[np.int64]] = [np.zeros(groups, dtype=np.int64)]
    known: dict[tuple[int, ...] | int, int] = {}
    dense = np.array([len(c) for c in components], dtype=np.int64)
    keep_alive: list[Ids] = []

    def size(ids: Ids) -> int:
        """Number of the size that counts these labels."""
        if id(ids) in known:
            return known[id(ids)]
        keep_alive.append(ids)
        at = unit_group[component[ids[ids >= 0]]]
        row = np.zeros(groups, dtype=np.int64)
        stay = len(ids)
        for g in np.unique(at).tolist() if len(at) and (at != at[0]).any() else at[:1].tolist():
            if g >= 0:
                count = int((at == g).sum())
                row[g] = count // dense[g]
                assert row[g] * dense[g] == count
                stay -= count
        base.append(stay)
        rows.append(row)
        known[id(ids)] = len(base) - 1
        return len(base) - 1

    slots: dict[str, list[Slot]] = {}
    for slot in records.slots:
        slots.setdefault(slot.name, []).append(slot)
    flop_terms = [
        (t.coefficient, [size(ids) for d in t.dims for _, ids in d if ids is not None]) for t in records.terms
    ]
    param_terms = [
        (1, [size(records.labels[s.name, s.dim]) for s in slots.get(name, [])]) for name in records.parameters
    ]
    resized = _resized(model, records, size)

    def table(terms: list[tuple[int, list[int]]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        width = max((len(s) for _, s in terms), default=0)
        sizes = np.zeros((len(terms), max(1, width)), dtype=np.int64)
        for i, (_, s) in enumerate(terms):
            sizes[i, : len(s)] = s
        return np.array([c for c, _ in terms], dtype=np.int64), sizes

    flop_coefficients, flop_sizes = table(flop_terms)
    param_coefficients, param_sizes = table(param_terms)
    labels = [(t.module, t.operator) for t in records.terms]
    per_group = np.stack(rows) if rows else np.zeros((1, groups), dtype=np.int64)
    return (
        CostModel(
            np.array(base, dtype=np.int64),
            per_group,
            dense,
            flop_coefficients,
            flop_sizes,
            param_coefficients,
            param_sizes,
            labels,
            np.array([t.rounded for t in records.terms], dtype=bool),
        ),
        resized,
    )


def _resized(model: nn.Module, records: Records, size: Any) -> list[Resized]:
    """Attributes of modules that hold a size we may change: they follow the cut."""
    modules = dict(model.named_modules())
    out: dict[tuple[str, str], Resized] = {}
    for layer in records.layers:
        owner = layer.module if layer.weight is None else _owner(layer.weight)
        module = modules.get(owner)
        if module is None:
            continue
        into: Dim | None = layer.into
        for attribute, which in _ATTRIBUTES[layer.kind]:
            ids = layer.out if which == "out" else (full(into) if into else None)
            value = vars(module).get(attribute)
            value = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
            if ids is None or value != len(ids):
                continue
            out.setdefault((owner, attribute), Resized(owner, attribute, size(ids)))
        if layer.groups > 1 and getattr(module, "groups", None) == layer.groups and layer.whole_groups:
            ids = layer.out.reshape(layer.groups, -1)[:, 0].copy()
            out.setdefault((owner, "groups"), Resized(owner, "groups", size(ids)))
    # what no layer record told: tied weights, norms without a weight, norms over dimensions flattened into one
    slots = {(slot.name, slot.dim): slot for slot in records.slots}
    names = {id(t): name for named in (records.parameters, records.buffers) for name, t in named.items()}
    for owner, module in modules.items():
        held = vars(module)
        for attribute, key, dim in _HELD:
            if attribute not in held:
                continue
            tensor = module._parameters.get(key, module._buffers.get(key))
            slot = slots.get((names.get(id(tensor), ""), dim))
            value = held[attribute]
            value = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
            if slot is not None and value == slot.size and (owner, attribute) not in out:
                out[owner, attribute] = Resized(owner, attribute, size(records.labels[slot.name, slot.dim]))
    for entry, sized in equations.held(records).items():
        labels = ids_of(sized)
        if len(labels) == 1:
            value = getattr(modules.get(entry.module), entry.name, None)
            whole = tuple(value) if entry.position is not None and isinstance(value, (tuple, list)) else ()
            factor = int(np.prod([n for n, ids in sized if ids is None], dtype=np.int64))
            out[entry.module, f"{entry.name}[{entry.position}]"] = Resized(
                entry.module, entry.name, size(labels[0]), factor, entry.position, whole
            )
    return list(out.values())


def _owner(weight: str) -> str:
    """Path of the module that a weight is of, be it held as it is or through a parametrisation."""
    return weight.partition(".parametrizations.")[0] if ".parametrizations." in weight else weight.rpartition(".")[0]
