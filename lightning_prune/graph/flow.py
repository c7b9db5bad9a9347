"""Where a group's channels are while the model runs: the tensors that methods look at, by the calls that make them.

A *tap* is a tensor inside a forward that carries a group's channels: the output of one call of a torch function. Calls
are known by place, not by number: the module's path, how often it was called before, the function's name, how often
this visit of the module had called it. So a tap is found again in any later forward, in train mode, and when only
functions were called where others build modules (``F.relu(self.bn(x))``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.graph.labels import Dim, Ids
from lightning_prune.graph.sizes import plain
from lightning_prune.graph.trace import CallRecord, LayerRecord, Records

# Functions behind which a channel is what it was, but for where its values are: maps are looked at before them.
_RESHAPING = frozenset(
    f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)
) | frozenset([
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "feature_dropout", "flatten", "unflatten", "view", "reshape", "contiguous", "clone", "detach", "squeeze",
    "unsqueeze", "permute", "transpose", "swapaxes", "movedim", "moveaxis", "mean", "sum", "amax", "pad",
    "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "to", "float", "type_as",
    "expand", "expand_as", "__getitem__", "roll", "flip",
])  # fmt: skip

# Functions applied to every entry on its own that stand behind a norm or a layer.
ACTIVATIONS = frozenset([
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_",
    "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "celu_", "selu", "selu_", "gelu", "silu", "silu_",
    "mish", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "softsign",
    "tanhshrink", "hardshrink", "softshrink", "logsigmoid", "threshold", "threshold_", "rrelu", "rrelu_", "abs",
    "square", "exp",
])  # fmt: skip


@dataclass(frozen=True)
class Call:
    """Where a torch function is called in a model.

    Attributes:
        module: path of the innermost module that runs.
        visit: how often that module was called before, in one forward.
        name: of the function.
        number: how often this visit of the module had called it before.
        total: how often it calls it in all; 0 if that is not known.
    """

    module: str
    visit: int
    name: str
    number: int
    total: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Tap:
    """A tensor that carries a group's channels, where it is made.

    Attributes:
        call: what makes it.
        output: which of the tensors that the call returns.
        dim: axis of the channels.
        indices: (C, M) for each channel of the group its places on that axis.
        overwritten: whether the model writes to this tensor later: look at a copy.
    """

    call: Call
    output: int
    dim: int
    indices: Tensor
    overwritten: bool

    def maps(self, tensor: Tensor, batch: int) -> Tensor:
        """(B, C, P): each sample's values of each channel, all positions in one axis.

        Args:
            tensor: what the call returned, or a tensor of its shape, such as its gradient.
            batch: number of samples; the first axis is a multiple of it (windows of one sample lie together), or
                another one is just that long.

        Raises:
            ValueError: if no axis carries the samples.
        """
        if self.dim == 1 and len(tensor) == batch and self.indices.shape == (tensor.shape[1], 1) and self._in_order:
            return tensor.reshape(batch, tensor.shape[1], -1)
        moved = tensor.movedim(self.dim, -1)
        if self.indices.numel() != moved.shape[-1] or not self._in_order:
            moved = moved.index_select(-1, self._on(tensor.device))
        if moved.shape[0] % batch or moved.ndim == 1:
            at = next((d for d, n in enumerate(moved.shape[:-1]) if n == batch), None)
            if at is None:
                raise ValueError(
                    f"no axis of {tuple(tensor.shape)}, made by '{self.call.name}' in "
                    f"{self.call.module or 'the model'}, carries {batch} samples"
                )
            moved = moved.movedim(at, 0)
        channels, repeats = self.indices.shape
        rows = moved.reshape(batch, -1, channels, repeats)  # (B, P, C, M)
        return rows.permute(0, 2, 1, 3).reshape(batch, channels, -1)

    @cached_property
    def _in_order(self) -> bool:
        flat = self.indices.reshape(-1)
        return bool((flat == torch.arange(len(flat))).all())

    def _on(self, device: torch.device) -> Tensor:
        """All places in one row on a device, copied there once: a copy waits for what the device has to do."""
        if device not in self._copies:
            self._copies[device] = self.indices.reshape(-1).to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}


@dataclass(frozen=True)
class Activation:
    """The function that a channel goes through behind its norm or layer.

    Attributes:
        name: of the function; "identity" where there is none.
        function: of one tensor, entry by entry.
    """

    name: str
    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Flow:
    """All calls of a forward, and which channels flow through them.

    Attributes:
        calls: in the order they ran.
        layers: number of the call that multiplies with a weight, or scales by one, by that parameter's name.
        made: number of a call -> the layers and norms that run in it.
        component, unit_group, unit_place: of coordinates -> component, and of components -> group and place in it.
        numbers: group name -> its number among all that were found.
        before: (U,) of components, whether they were there before ``cuts``.
        cuts: made since: group -> (C,) bool, which of its components stayed.
        gates: group name -> where its gates are, once that was asked for; no cut changes it.
    """

    calls: Sequence[CallRecord]
    layers: Mapping[str, tuple[int, ...]]
    made: Mapping[int, Sequence[LayerRecord]]
    component: Ids
    unit_group: NDArray[np.int64]
    unit_place: NDArray[np.int64]
    numbers: Mapping[str, int]
    before: NDArray[np.bool_]
    cuts: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    gates: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        records: Records,
        component: Ids,
        unit_group: NDArray[np.int64],
        unit_place: NDArray[np.int64],
        numbers: Mapping[str, int],
    ) -> Flow:
        """The flow of a trace."""
        layers: dict[str, list[int]] = {}
        made: dict[int, list[LayerRecord]] = {}
        for layer in records.layers:
            made.setdefault(layer.call, []).append(layer)
            if layer.weight is not None and layer.call >= 0:
                calls = layers.setdefault(layer.weight, [])
                if layer.call not in calls:
                    calls.append(layer.call)
        return cls(
            records.calls,
            {name: tuple(calls) for name, calls in layers.items()},
            made,
            component,
            unit_group,
            unit_place,
            numbers,
            np.ones(len(unit_group), dtype=bool),
        )

    def after(self, groups: Sequence[Any], kept: Mapping[str, Mapping[int, Tensor]]) -> Flow:
        """The flow once a plan is applied; which components that leaves is worked out when it is asked for.

        Args:
            groups: as they were before.
            kept: parameter or buffer -> {dim: kept indices}.
        """
        asked = "_alive" in vars(self)
        before = self._alive if asked else self.before
        cuts = {} if asked else dict(self.cuts)  # one mask a group, however many cuts nobody asked about
        for group in groups:
            member = next((m for m in group.members if m.dim in kept.get(m.name, {})), None)
            if member is not None:
                stays = np.isin(member.indices[:, 0].numpy(), kept[member.name][member.dim].numpy())
                whole = cuts[group.name].copy() if group.name in cuts else np.ones(len(stays), dtype=bool)
                whole[whole] = stays
                cuts[group.name] = whole
        return replace(self, before=before, cuts=cuts)

    @cached_property
    def _alive(self) -> NDArray[np.bool_]:
        """(U,) of components, whether they are there now."""
        alive = self.before.copy()
        for group, stays in self.cuts.items():
            alive[self._units(group, self.before)[~stays]] = False
        return alive

    def _units(self, group: str, alive: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Components of a group, in its order."""
        units = np.flatnonzero((self.unit_group == self.numbers[group]) & alive)
        return units[np.argsort(self.unit_place[units], kind="stable")]

    def call(self, number: int) -> Call:
        """Where a call is."""
        record = self.calls[number]
        total = self._totals[record.module, record.visit, record.name]
        return Call(record.module, record.visit, record.name, record.number, total)

    @cached_property
    def _totals(self) -> Counter[tuple[str, int, str]]:
        return Counter((record.module, record.visit, record.name) for record in self.calls)

    def tap(self, number: int, output: int, group: str) -> Tap | None:
        """An output of a call, where it carries all channels of a group; else None."""
        record = self.calls[number]
        for dim, labels in enumerate(record.outputs[output]):
            indices = self._indices(labels, group)
            if indices is not None:
                return Tap(self.call(number), output, dim, indices, record.overwritten)
        return None

    def maps(self, group: str, readers: Sequence[str]) -> list[Tap]:
        """The maps of a group as its readers receive them: after norm, activation and add, before pooling.

        Args:
            group: name.
            readers: names of the weights that read its channels.

        Returns:
            One tap per tensor, in data-flow order; several where a residual stream is read in several places.
        """
        found: dict[tuple[int, int], Tap] = {}
        for weight in readers:
            for reader in self.layers.get(weight, ()):
                last: tuple[tuple[int, int], Tap] | None = None
                at = self._made(reader)
                while at is not None:
                    tap = self.tap(*at, group)
                    last = last if tap is None else (at, tap)
                    at = self._made(at[0]) if self.calls[at[0]].name in _RESHAPING else None
                if last is not None:
                    found[last[0]] = last[1]
        return [found[at] for at in sorted(found)]

    def _made(self, number: int) -> tuple[int, int] | None:
        """The call that made what a call works on, its first tensor, and which output; None if none did."""
        return next(iter(self.calls[number].sources), None)

    def made_by(self, weight: str, group: str) -> list[Tap]:
        """What a layer or a norm with this weight returns, where it carries a group."""
        taps = [self.tap(number, 0, group) for number in self.layers.get(weight, ()) if self.calls[number].outputs]
        return [tap for tap in taps if tap is not None]

    def activation(self, weight: str) -> Activation:
        """What the output of a layer or norm goes through next; pooling and the like between does not count."""
        at = list(self.layers.get(weight, ()))
        seen = set(at)
        while at:
            number = at.pop()
            for following in range(number + 1, len(self.calls)):
                record = self.calls[following]
                if following in seen or all(source is None or source[0] != number for source in record.sources):
                    continue
                seen.add(following)
                found = self.entrywise(following)
                if found is not None and found.name != "identity":
                    return found
                if found is not None:
                    at.append(following)
        return Activation("identity", lambda x: x)

    def entrywise(self, number: int) -> Activation | None:
        """What a call does to each entry: nothing where it pools or moves them; None if it does anything else."""
        record = self.calls[number]
        if record.name in ACTIVATIONS and record.function is not None:
            return _activation(record.name, record.function, plain(record.rest), plain(dict(record.options)))
        return Activation("identity", lambda x: x) if record.name in _RESHAPING else None

    def _indices(self, dim: Dim, group: str) -> Tensor | None:
        """(C, M) places of a group's channels on a dimension; None if it does not carry them all alike."""
        if len(dim) != 1 or dim[0][1] is None:
            return None
        ids = dim[0][1]
        known = ids >= 0
        component = np.where(known, self.component[ids], 0)
        stays = ~known | self._alive[component]
        mine = known & stays & (self.unit_group[component] == self.numbers[group])
        if not mine.any():
            return None
        units = self._units(group, self._alive)
        places = (np.cumsum(stays) - 1)[mine]
        rank = np.searchsorted(self.unit_place[units], self.unit_place[component[mine]])
        counts = np.bincount(rank, minlength=len(units))
        if (counts != counts[0]).any():
            return None
        order = np.argsort(rank, kind="stable")
        return torch.from_numpy(places[order].reshape(len(units), -1).astype(np.int64))


def _activation(name: str, function: Callable[..., Any], rest: tuple[Any, ...], options: dict[str, Any]) -> Activation:
    def apply(x: Tensor) -> Tensor:
        out: Tensor = function(x.clone(), *rest, **options)  # it may work in place
        return out

    return Activation(name.rstrip("_"), apply)
