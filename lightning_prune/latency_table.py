"""How long a network takes as a function of its channel counts, from layers timed at a few widths on a device.

    table = latency_table(graph, batch=8, threads=1)
    table.predict(graph, plan)  # milliseconds
    plan = lightning_prune.plan(graph, budget=Budget(0.5, of="latency"), latency_table=table)

The prediction is ``rest + sum over calls of ms * t(widths) / t(dense widths)``: ``ms`` is what a call took within the
dense forward, ``t`` what the same work took by itself at a grid of widths, made monotone and interpolated, and ``rest``
what no cut changes. All of it is scaled so that the dense network comes out at the time it took as a whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import nn

from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.trace import undisturbed
from lightning_prune.latency import threads_set
from lightning_prune.latency_calls import Axis, TimedCall, forward_of, record, synchronise
from lightning_prune.state import check_fields

STEPS = (8, 16)
"""Channels that a device may compute together, so that a count between two multiples costs as much as the larger."""

_OFF = 5  # how far below a multiple of 8 the count is that is timed to see whether that is so
_FRACTIONS = (0.25, 0.5, 0.75)
_FIELDS = {
    "version": int,
    "batch": int,
    "device": str,
    "dtype": str,
    "threads": int,
    "dense_ms": float,
    "rest_ms": float,
    "grids": list[Any],
    "calls": list[Any],
}
_GRID = {"function": str, "widths": list[list[int]], "ms": list[list[float]], "padding": list[tuple[float, float]]}
_CALL = {"axes": list[tuple[str, int]], "ms": float, "grid": int}


@dataclass(frozen=True)
class Grid:
    """One kind of work, timed at a grid of widths.

    Attributes:
        function: what was called.
        widths: per axis, at most two, ascending.
        ms: (first widths, second widths), never less where a width is larger; one column where there is one axis.
        padding: per axis, for each of `STEPS`, in [0, 1]: of the way from a channel count up to the next multiple, how
            much is paid for all the same. 1: a count between two multiples takes the time of the larger.
    """

    function: str
    widths: tuple[tuple[int, ...], ...]
    ms: tuple[tuple[float, ...], ...]
    padding: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Entry:
    """One call of the forward: the parameter dimensions that are its widths, its time when dense, and its grid."""

    axes: tuple[Axis, ...]
    ms: float
    grid: int


@dataclass(frozen=True, repr=False)
class LatencyTable:
    """Measured times, and what they predict. Make it with `latency_table`.

    Attributes:
        batch: samples per forward.
        device: type and, of an accelerator, name.
        dtype: of the weights.
        threads: CPU threads within an operator.
        dense_ms: milliseconds per forward of the dense network.
        rest_ms: of them, what no cut changes.
        grids: what was timed.
        calls: which calls a forward makes.
    """

    batch: int
    device: str
    dtype: str
    threads: int
    dense_ms: float
    rest_ms: float
    grids: tuple[Grid, ...]
    calls: tuple[Entry, ...]

    def predict(self, graph: ChannelGraph, plan: Plan | None = None) -> float:
        """Milliseconds per forward once a plan is applied to a traced model; without one, as the model is now.

        Raises:
            ValueError: if the table is of another network.
        """
        return self.on(graph).milliseconds(graph.costs.dense if plan is None else graph.counts(plan))

    def on(self, graph: ChannelGraph) -> Prediction:
        """The table with the widths that a graph's groups stand for; the model may have been cut since it was made.

        Raises:
            ValueError: if the table is of another network.
        """
        return Prediction(self, graph)

    def to_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists, strings and numbers."""
        return {"version": 1, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LatencyTable:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: if it is something else, or its numbers cannot be times at widths.
        """
        try:
            check_fields("a latency table", value, _FIELDS)
            for each, fields in (("grids", _GRID), ("calls", _CALL)):
                for entry in value[each]:
                    check_fields(f"one of the {each} of a latency table", entry, fields)
        except IncompatibleCheckpoint as error:
            raise ValueError(f"{error}; make a table with latency_table(graph)") from error
        grids = tuple(
            Grid(g["function"], _tuples(g["widths"]), _tuples(g["ms"]), _tuples(g["padding"])) for g in value["grids"]
        )
        calls = tuple(Entry(_tuples(c["axes"]), float(c["ms"]), c["grid"]) for c in value["calls"])
        _check(value, grids, calls)
        own = {key: value[key] for key in ("batch", "device", "dtype", "threads")}
        return cls(**own, dense_ms=float(value["dense_ms"]), rest_ms=float(value["rest_ms"]), grids=grids, calls=calls)

    @classmethod
    def of_any(cls, value: LatencyTable | Mapping[str, Any] | str | Path) -> LatencyTable:
        """Take a table, what `to_dict` returned, or the JSON file that `save` wrote."""
        if isinstance(value, LatencyTable):
            return value
        if isinstance(value, str | Path):
            value = json.loads(Path(value).read_text("utf-8"))
        return cls.from_dict(value)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()), "utf-8")

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}, batch {self.batch}, threads {self.threads}"

    def __repr__(self) -> str:
        return f"LatencyTable({self}, {self.dense_ms:.3f} ms)"  # it is long

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Grids of one size: widths (N, 2, K), milliseconds by dense ones (N, K, K), padding (N, 2, 2)."""
        size = max((len(w) for g in self.grids for w in g.widths), default=1) + 1
        widths = np.zeros((len(self.grids), 2, size))
        scale = np.ones((len(self.grids), size, size))
        padding = np.zeros((len(self.grids), 2, len(STEPS)))
        for n, grid in enumerate(self.grids):
            for axis in range(2):
                own = list(grid.widths[axis]) if axis < len(grid.widths) else [1]
                widths[n, axis] = [*own, *(own[-1] + 1 + np.arange(size - len(own)))]
            ms = np.array(grid.ms)
            scale[n] = np.pad(ms, [(0, size - length) for length in ms.shape], mode="edge") / ms[-1, -1]
            padding[n, : len(grid.padding)] = grid.padding
        return widths, scale, padding


class Prediction:
    """A table on a graph: milliseconds for channel counts."""

    def __init__(self, table: LatencyTable, graph: ChannelGraph) -> None:
        self.table, self.graph = table, graph
        axes = sorted({axis for call in table.calls for axis in call.axes})
        for name, dim in axes:
            if name not in graph.shapes or dim >= len(graph.shapes[name]):
                raise ValueError(
                    f"the latency table is of another network: it has times of {name!r}, which "
                    f"{type(graph.model).__name__} has not; make one of this network with latency_table(graph)"
                )
        place = {axis: i + 1 for i, axis in enumerate(axes)}
        # widths = base + per_group @ counts; place 0 is the width of a call without a second axis
        self._base = np.array([1.0, *(graph.shapes[name][dim] for name, dim in axes)])
        self._per_group = np.zeros((len(axes) + 1, len(graph.groups)))
        for i, group in enumerate(graph.groups):
            for member in group.members:
                if (at := place.get((member.name, member.dim))) is not None:
                    self._per_group[at, i] += member.indices[0].numel()
        self._base -= self._per_group @ graph.costs.dense
        self._ms = np.array([call.ms for call in table.calls])
        self._of = np.array([[place[a] for a in call.axes] + [0] * (2 - len(call.axes)) for call in table.calls], int)
        self._grid = np.array([call.grid for call in table.calls], int)
        self._refuse_wider(graph)

    def milliseconds(self, counts: NDArray[np.int64]) -> float:
        """Of a forward, for (G,) channels kept per group."""
        return float(self.table.rest_ms + self.by_call(counts).sum())

    def by_call(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """(calls,) milliseconds of each call, for (G,) channels kept per group."""
        if not len(self._ms):
            return self._ms
        widths, scale, padding = (array[self._grid] for array in self.table._arrays)
        own = (self._base + self._per_group @ counts)[self._of]  # (calls, 2)
        for i, step in enumerate(STEPS):
            own = own + padding[..., i] * (np.ceil(own / step) * step - own)
        below = np.clip((widths <= own[..., None]).sum(axis=2) - 1, 0, widths.shape[2] - 2)
        low, high = (np.take_along_axis(widths, (below + i)[..., None], 2)[..., 0] for i in (0, 1))
        part = np.clip((own - low) / (high - low), 0, 1)
        n = np.arange(len(own))
        corners = [[scale[n, below[:, 0] + i, below[:, 1] + j] for j in (0, 1)] for i in (0, 1)]
        rows = [corner[0] * (1 - part[:, 1]) + corner[1] * part[:, 1] for corner in corners]
        times: NDArray[np.float64] = self._ms * (rows[0] * (1 - part[:, 0]) + rows[1] * part[:, 0])
        return times

    def _refuse_wider(self, graph: ChannelGraph) -> None:
        for call in self.table.calls:
            for (name, dim), known in zip(call.axes, self.table.grids[call.grid].widths, strict=True):
                if graph.shapes[name][dim] > known[-1]:
                    raise ValueError(
                        f"the latency table is of another network: it knows {name!r} with up to {known[-1]} in "
                        f"dimension {dim}, here are {graph.shapes[name][dim]}; make one with latency_table(graph)"
                    )


def latency_table(graph: ChannelGraph, *, batch: int = 1, threads: int | None = None, repeats: int = 3) -> LatencyTable:
    """Time a traced model and its layers, in eval mode and without gradients, on the device where it is.

    Args:
        graph: from `lightning_prune.trace`; nothing of its model changes.
        batch: samples per forward, the first of the example input over and over.
        threads: CPU threads within an operator; None leaves torch's setting.
        repeats: readings of a time, of which the least counts: other work on a machine only adds. Layers by
            themselves get twice as many, in two rounds.

    Returns:
        The table: times of each kind of call at up to 5 widths per axis, equal work once.

    Raises:
        ValueError: if a count is below 1, or the model is on the meta device.
    """
    for what, value in (("batch", batch), ("threads", threads), ("repeats", repeats)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{what} must be an int of at least 1, got {value!r}")
    model = graph.model
    device, here = _place(model)
    if device.type == "meta":
        raise ValueError("nothing can be timed on the meta device; materialise the model, or make the table elsewhere")
    with undisturbed(model), threads_set(threads):
        model.eval()
        forward = forward_of(model, graph.example_inputs, batch)
        recording = record(graph, forward, device, repeats)
        whole = time_of(forward, device, repeats)
        kinds = {call.key: call for call in recording.calls}
        grids = [grid_of(call, device, repeats) for call in kinds.values()]
        whole = min(whole, time_of(forward, device, repeats))
        number = {key: i for i, key in enumerate(kinds)}
        scale = whole / (recording.rest_ms + sum(recording.milliseconds))
        times = [ms * scale for ms in recording.milliseconds]
        entries = tuple(Entry(c.axes, ms, number[c.key]) for c, ms in zip(recording.calls, times, strict=True))
        dense = recording.rest_ms * scale + float(np.array(times).sum())  # as it is predicted, to the last bit
        counted = torch.get_num_threads()
        return LatencyTable(batch, *here, counted, dense, recording.rest_ms * scale, tuple(grids), entries)


def measured_ms(graph: ChannelGraph, table: LatencyTable, repeats: int = 10) -> float | None:
    """Time a model the way its table was made: batch, threads; None on another device, or with another dtype.

    Args:
        graph: of the model as it is now.
        table: of the model when it was dense.
        repeats: runs, of which the least counts.
    """
    model = graph.model
    device, here = _place(model)
    if here != (table.device, table.dtype):
        return None
    with undisturbed(model), threads_set(table.threads):
        model.eval()
        return time_of(forward_of(model, graph.example_inputs, table.batch), device, repeats)


def _place(model: nn.Module) -> tuple[torch.device, tuple[str, str]]:
    """Where a model is, and what a table calls that: device and dtype."""
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    name = f" {torch.cuda.get_device_name(tensor.device)}" if tensor.is_cuda else ""
    return tensor.device, (f"{tensor.device.type}{name}", str(tensor.dtype).removeprefix("torch."))


def time_of(forward: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The least milliseconds of ``repeats`` runs after one that is not timed."""
    forward()

    def once() -> float:
        synchronise(device)
        start = time.perf_counter()
        forward()
        synchronise(device)
        return 1000 * (time.perf_counter() - start)

    return min(once() for _ in range(repeats))


def grid_of(call: TimedCall, device: torch.device, repeats: int) -> Grid:
    """Time one kind of call at up to 5 widths per axis, and at two between multiples of 16 on each."""
    widths = tuple(widths_of(n, unit) for n, unit in zip(call.dense, call.units, strict=True))
    ms = np.full([len(w) for w in widths], np.inf)
    for index in [*np.ndindex(ms.shape)] * 2:  # in two rounds, so that a busy moment does not pass for a width
        at = [w[i] for w, i in zip(widths, index, strict=True)]
        ms[index] = min(ms[index], call.milliseconds(at, device, repeats))
    table = monotone(ms.reshape(len(widths[0]), -1))
    middle = [len(w) // 2 for w in widths]
    padding = [(0.0, 0.0)] * len(widths)
    for axis, known in enumerate(widths):
        at = [w[i] for w, i in zip(widths, middle, strict=True)]
        line = table[:, middle[1] if len(middle) > 1 else 0] if axis == 0 else table[middle[0]]

        def timed(width: int, at: list[int] = at, axis: int = axis) -> float:
            return call.milliseconds([*at[:axis], width, *at[axis + 1 :]], device, repeats)

        if call.units[axis] == 1 and at[axis] % STEPS[0] == 0 and at[axis] >= 2 * STEPS[0]:
            padding[axis] = padding_of(known, line.tolist(), at[axis], timed)
    return Grid(call.function, widths, _tuples(table.tolist()), tuple(padding))


def widths_of(dense: int, unit: int = 1) -> tuple[int, ...]:
    """The widths that are timed: about 8 channels, 1/4, 1/2, 3/4 and all, multiples of 8 where there are enough.

    Example:
        >>> widths_of(256), widths_of(12), widths_of(9, unit=3)
        ((8, 64, 128, 192, 256), (1, 3, 6, 9, 12), (3, 6, 9))
    """
    multiples = [math.lcm(unit, step) for step in STEPS]
    step = max([unit, *(multiple for multiple in multiples if dense >= 4 * multiple)])
    steps = [max(1, round(fraction * dense / step)) for fraction in _FRACTIONS]
    return tuple(sorted({min(step, multiples[0]), *(n * step for n in steps), dense}))


def monotone(ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest times, in the mean of squares, that never fall where a width rises; along both axes in turn.

    Args:
        ms: (first widths, second widths).
    """
    out = ms.astype(float)
    for _ in range(10):
        for axis in (0, 1):
            out = np.apply_along_axis(lambda line: isotonic_regression(line).x, axis, out)
    return np.asarray(np.maximum.accumulate(np.maximum.accumulate(out, axis=0), axis=1))


def padding_of(
    widths: Sequence[int], ms: Sequence[float], width: int, timed: Callable[[int], float]
) -> tuple[float, float]:
    """How much of the way to the next multiple of 8, and of 16, is paid for by a count below it, in [0, 1].

    Args:
        widths: ascending, with their times.
        ms: of them, never falling.
        width: one of them, a multiple of 8: counts just below it are timed.
        timed: milliseconds at a count.

    Example:
        >>> padding_of([8, 32], [1.0, 2.0], 32, lambda n: 2.0), padding_of([8, 32], [1.0, 2.0], 32, lambda n: n / 32)
        ((0.0, 1.0), (0.0, 0.0))
    """

    def part(count: float, measured: float) -> float:
        least, most = np.interp([count, width], widths, ms)
        return float(np.clip((measured - least) / (most - least), 0, 1)) if most > least else 0.0

    small, large = STEPS
    to_large = part(width - small, timed(width - small)) if width % large == 0 else 0.0
    # what lies below the multiple of 8 is moved on by what is known of those of 16 already
    below = width - _OFF + to_large * _OFF
    return part(below, timed(width - _OFF)), to_large


def unpaid(prediction: Prediction, counts: NDArray[np.int64]) -> dict[str, tuple[int, int]]:
    """Groups that would take no longer with more channels: group -> (channels, channels for the same time).

    The same: at most a tenth of what the whole step from one multiple of 8, or of 16, to the next one takes.

    Args:
        prediction: of the network.
        counts: (G,) channels kept per group.
    """

    def ms(i: int, count: int) -> float:
        changed = counts.copy()
        changed[i] = count
        return prediction.milliseconds(changed)

    names, dense = [group.name for group in prediction.graph.groups], prediction.graph.costs.dense
    found = {}
    for i, (name, n) in enumerate(zip(names, counts.tolist(), strict=True)):
        for step in STEPS:
            below, above = max(1, n // step * step), math.ceil(n / step) * step
            if n < above <= dense[i]:
                least, now, most = (ms(i, count) for count in (below, n, above))
                if most > least and most - now <= 0.1 * (most - least):
                    found[name] = (n, above)
    return found


def _check(value: Mapping[str, Any], grids: Sequence[Grid], calls: Sequence[Entry]) -> None:
    def wrong() -> Iterator[str]:
        if value["version"] != 1:
            yield f"format version 1 is wanted, got {value['version']}"
        if min(value["dense_ms"], value["rest_ms"] + value["dense_ms"]) <= 0 or value["rest_ms"] < 0:
            yield f"dense_ms must be positive and rest_ms not negative, got {value['dense_ms']}, {value['rest_ms']}"
        for grid in grids:
            ms, sizes = np.array([list(row) for row in grid.ms]) if grid.ms else np.zeros((0, 0)), grid.widths
            if not 1 <= len(sizes) <= 2 or ms.shape != (len(sizes[0]), len(sizes[1]) if len(sizes) > 1 else 1):
                yield f"times of shape {ms.shape} at {[len(w) for w in sizes]} widths of {grid.function}"
            elif not (np.isfinite(ms).all() and (ms > 0).all() and (np.diff(ms, axis=0) >= 0).all()):
                yield f"times of {grid.function} must be positive and not fall where a width rises"
            elif (np.diff(ms, axis=1) < 0).any() or any((np.diff(w) <= 0).any() or w[0] < 1 for w in sizes):
                yield f"widths and times of {grid.function} must rise"
            elif len(grid.padding) != len(sizes) or any(not 0 <= p <= 1 for both in grid.padding for p in both):
                yield f"padding of {grid.function} must be {len(sizes)} pairs in [0, 1], got {grid.padding}"
        for call in calls:
            if not 0 <= call.grid < len(grids) or len(call.axes) != len(grids[call.grid].widths) or not call.ms >= 0:
                yield f"the call with axes {call.axes} has no grid for them"

    if (what := next(wrong(), None)) is not None:
        raise ValueError(f"not a latency table: {what}; make one with latency_table(graph)")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
