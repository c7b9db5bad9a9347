"""Where a gate on a group's channels sits: z = 1 multiplied onto what is made, and at 0 the channel is as if gone.

A gate sits behind the norms or layers that are nearest to the readers, so that what any of them reads is multiplied
once: behind a norm, else behind the layer. A depthwise layer, or one that works group by group, takes its channels from
another layer; the gate is then behind it, not behind both. Where tensors of one group are multiplied (squeeze and
excite, gated linear units, attention) one of them has the gate: with two the product would count twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.flow import ACTIVATIONS, Flow
from lightning_prune.graph.labels import Dim, Ids
from lightning_prune.graph.sizes import plain as plain_sizes
from lightning_prune.graph.trace import CallRecord, LayerRecord

# Functions of several tensors that are 0 only where all of them are; of other functions one is enough.
_SUMS = frozenset([
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "cat", "concat",
    "concatenate", "stack", "hstack", "vstack", "dstack", "where", "maximum", "minimum", "lerp",
])  # fmt: skip

# Functions after which a channel's labels may be those of one of its places only.
_SPLITTING = frozenset(["view", "reshape", "unflatten", "_unsafe_view"])

Node = tuple[int, int]  # number of a call, and which of its outputs


@dataclass(frozen=True)
class Gate:
    """Parameters that scale a group's channels at one place: scale and shift of a norm, or filters and bias of a layer.

    Attributes:
        weight: name of the parameter; ``dim``: its axis with the channels.
        bias: name of the shift that goes with it, or None.
        part: which of the indices that each channel has on that axis; None for all.
    """

    weight: str
    dim: int
    bias: str | None
    part: tuple[int, ...] | None = None

    def of(self, indices: Tensor) -> Tensor:
        """(C, M) indices of channels on an axis -> those of them that have the gate."""
        return indices if self.part is None else indices[:, list(self.part)]


def place(flow: Flow, group: str, readers: Sequence[str], axes: Mapping[str, int]) -> tuple[Gate, ...]:
    """Gates of a group, in data-flow order.

    Args:
        flow: of the model.
        group: name.
        readers: names of the weights that read its channels.
        axes: name of each weight that makes them -> its axis of channels.

    Returns:
        Nothing where no reader runs in eval mode, or what it reads comes from no parameter.
    """
    walk = _Walk(flow, group)
    spots: dict[int, Ids | None] = {}
    for weight in readers:
        for call in flow.layers.get(weight, ()):
            spots.update(walk.spots(walk.carrying(call)))
    for spot in sorted(spots, reverse=True):
        above = walk.spots(walk.in_front(spot))
        if above.keys() & spots.keys():  # they are needed for a reader of what is in front of this layer
            del spots[spot]
            spots.update(above)
    gates: dict[Gate, None] = {}
    for spot in sorted(spots):
        for record in walk.layers(spot):
            if record.weight is None:
                return ()
            gates[Gate(record.weight, axes.get(record.weight, 0), record.bias, walk.part(record, spots[spot]))] = None
    return tuple(gates)


class _Walk:
    """Goes from readers against the flow, to the places for gates."""

    def __init__(self, flow: Flow, group: str) -> None:
        self._flow = flow
        self._number = flow.numbers[group]
        self._above: dict[int, list[Node]] = {}

    def layers(self, call: int) -> list[LayerRecord]:
        """What makes this group's channels in a call, or scales them: layers, and norms with a scale."""
        records = self._flow.made.get(call, ())
        return [r for r in records if (r.kind != "norm" or r.weight is not None) and self._ours(r.out)]

    def carrying(self, call: int) -> list[Node]:
        """What a call gets of this group."""
        sources = dict.fromkeys(self._flow.calls[call].sources)
        return [s for s in sources if s is not None and len(self._labels(s))]

    def spots(self, begin: Sequence[Node]) -> dict[int, Ids | None]:
        """Calls of the nearest places for gates, in front of these tensors; with labels where only those get one."""
        out: dict[int, Ids | None] = {}
        for (call, _), labels in self._path(begin):
            if self.layers(call):
                out.setdefault(call, labels)
        return out

    def in_front(self, spot: int) -> list[Node]:
        """What a layer, or that of a norm, takes its channels from, if it does not make them of others."""
        calls = [spot, *(call for call, _ in self.carrying(spot))]
        followers = {record.call for call in calls for record in self.layers(call) if _follows(record)}
        return [source for call in followers for source in self.carrying(call)]

    def part(self, record: LayerRecord, labels: Ids | None) -> tuple[int, ...] | None:
        """Which of the places that each channel has in a layer carry these labels; None for all."""
        if labels is None:
            return None
        known = np.flatnonzero(record.out >= 0)
        component = self._flow.component[record.out[known]]
        mine = self._flow.unit_group[component] == self._number
        order = np.argsort(self._flow.unit_place[component[mine]], kind="stable")
        size = int((self._flow.unit_group == self._number).sum())
        if len(order) % size:
            return None
        inside = np.isin(record.out[known[mine][order]], labels).reshape(size, -1).all(axis=0)
        return None if inside.all() or not inside.any() else tuple(np.flatnonzero(inside).tolist())

    def _path(self, begin: Sequence[Node]) -> list[tuple[Node, Ids | None]]:
        """All tensors from these to the nearest places for gates."""
        left: list[tuple[Node, Ids | None]] = [(node, None) for node in begin]
        seen: dict[Node, Ids | None] = dict(left)
        while left:
            node, labels = left.pop()
            call = node[0]
            if self.layers(call):
                continue
            sources = self._up(call)
            if self._flow.calls[call].name in _SPLITTING:
                labels = None
            elif self._flow.calls[call].name == "glu":
                labels = self._labels(node)
            elif len(self.carrying(call)) > len(sources):
                labels = self._labels(sources[0])
            new = [(source, labels) for source in sources if source not in seen]
            seen.update(new)
            left += new
        return list(seen.items())

    def _up(self, call: int) -> list[Node]:
        """Of what a call gets of this group that which has to be gated for its result to be."""
        if call not in self._above:
            sources = self.carrying(call)
            if len(sources) > 1 and self._flow.calls[call].name not in _SUMS:
                plain = [self._plainness(source) for source in sources]
                best = max(range(len(sources)), key=lambda i: (plain[i], i))  # of attention the values, which are last
                sources = [sources[best]]
            self._above[call] = sources
        return self._above[call]

    def _plainness(self, begin: Node) -> int:
        """What a gate in front of a tensor does to it: 2 scales it, 1 only makes it 0 if it is, 0 neither."""
        between = {call for (call, _), _ in self._path([begin]) if not self.layers(call)}
        return min((_plainness(self._flow.calls[call]) for call in between), default=2)

    def _labels(self, node: Node) -> Ids:
        """The labels of this group on a tensor."""
        dims: Sequence[Dim] = self._flow.calls[node[0]].outputs[node[1]]
        found = [ids for dim in dims for _, ids in dim if ids is not None and self._ours(ids)]
        return found[0] if found else np.zeros(0, dtype=np.int64)

    def _ours(self, ids: Ids) -> bool:
        known = ids[ids >= 0]
        return bool((self._flow.unit_group[self._flow.component[known]] == self._number).any())


def _follows(record: LayerRecord) -> bool:
    """Whether each channel of a layer is made of the same channel of another."""
    return record.depthwise or (record.groups > 1 and record.whole_groups)


def _plainness(record: CallRecord) -> int:
    if record.name in ACTIVATIONS and record.function is not None:
        x = torch.tensor([0.0, 1.0, 2.0, -1.0, -2.0])
        y = record.function(x, *plain_sizes(record.rest), **plain_sizes(dict(record.options)))
        return 0 if y[0] != 0 else 1 + int(y[2] == 2 * y[1] and y[4] == 2 * y[3])
    return 0 if record.name in ("softmax", "log_softmax", "softmin") else 2
