"""Pictures of a prune, and the loggers that take them.

Figures are made without pyplot, so that they need no display and leave no state behind. Colours are Okabe and Ito's,
which hold up in every common form of colour blindness and in grey.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_prune.graph.explain import Explanation, listed

BLUE, ORANGE, GREEN, INK, PALE = "#0072B2", "#D55E00", "#009E73", "#333333", "#D3DEE8"
CURVES = (
    ("prune/flops_kept", "flops", BLUE, "-"),
    ("prune/params_kept", "params", ORANGE, "--"),
    ("prune/density", "density", GREEN, "-."),
)
# most sensitive first: a colour, a line and a marker each
_LINES = (
    (ORANGE, "-", "o"),
    (BLUE, "-", "s"),
    (GREEN, "-", "^"),
    ("#CC79A7", "--", "D"),
    ("#E69F00", "--", "v"),
    ("#56B4E9", "--", "P"),
)
LONGEST_NAME = 40
LARGEST_NODE, SMALLEST_NODE = 420.0, 14.0  # areas in square points


def architecture_figure(before: Mapping[str, int], after: Mapping[str, int]) -> Figure:
    """Draw channels per group, of the dense model pale and what is kept solid, first group on top.

    Args:
        before: group name -> channels of the dense model, in data-flow order; at least one group.
        after: group name -> channels kept, for the same groups.

    Returns:
        A figure that grows with the number of groups; not known to pyplot, so nothing has to close it.

    Raises:
        ValueError: if there is no group, or the two do not name the same groups.
    """
    if not before:
        raise ValueError("a figure of channels per group needs at least one group, got none")
    if before.keys() != after.keys():
        differing = sorted(before.keys() ^ after.keys())
        raise ValueError(f"before and after must name the same groups, only one of them has {differing}")
    rows = range(len(before))
    dense, kept = list(before.values()), [after[name] for name in before]
    figure, axes = _axes(width=6.4, height=1.3 + 0.24 * max(len(before), 3))  # loggers show pictures small
    axes.barh(rows, dense, height=0.74, color=PALE, label="dense")
    axes.barh(rows, kept, height=0.74, color=BLUE, label="kept")
    for row, of, count in zip(rows, dense, kept, strict=True):
        axes.annotate(
            f"{count} / {of}", (of, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    axes.set_yticks(rows, [_shortened(name) for name in before], fontsize=8)
    axes.set_ylim(len(before) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(dense))  # leaves room for the widest bar's count
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_xlabel("channels")
    total = max(sum(dense), 1)
    title = f"Channels kept per group: {sum(kept):,} of {sum(dense):,} ({sum(kept) / total:.0%})"
    figure.suptitle(title, fontsize=11, color=INK)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def curve_figure(rows: Sequence[Mapping[str, object]], until: float = 0.0) -> Figure:
    """Draw what was kept over the steps of a run, as fractions of the dense model, and mark the prune events.

    Args:
        rows: as logged, in order of time: ``step``, the number of events done as ``prune/event``, and any of
            ``prune/flops_kept``, ``prune/params_kept`` and ``prune/density``. Before the first row all are 1.
        until: the step that the axis goes to at least, such as the last of the fit.

    Returns:
        A figure that pyplot does not know; nothing has to close it.

    Raises:
        ValueError: if no row has a ``step`` and one of the three fractions.
    """
    figure, axes = _axes(width=6.4, height=3.4)
    events = _event_steps(rows)
    for step in events:
        axes.axvline(step, color="#BBBBBB", linewidth=0.9, zorder=1)
    last_step = max((_number(row["step"]) for row in rows if "step" in row), default=0.0)
    drawn = 0
    for key, name, colour, style in CURVES:
        points = [(_number(row["step"]), _number(row[key])) for row in rows if "step" in row and key in row]
        if not points:
            continue
        drawn += 1
        steps, values = zip((0.0, 1.0), *points, (last_step, points[-1][1]), strict=True)
        label = f"{name}: {values[-1]:.3f}"
        axes.plot(steps, values, drawstyle="steps-post", color=colour, linestyle=style, linewidth=2, label=label)
    if not drawn:
        wanted = [key for key, *_ in CURVES]
        raise ValueError(f"a curve needs rows with 'step' and one of {wanted}, got {len(rows)} rows without")
    if events:
        axes.plot([], [], color="#BBBBBB", linewidth=0.9, label=f"prune events: {len(events)}")
    axes.set_ylim(0, 1.05)
    axes.set_xlim(0, max(last_step, until, 1) * 1.03)  # an event on the last step is seen
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("kept, of the dense model")
    figure.suptitle("Kept while training", fontsize=11, color=INK)
    figure.legend(loc="outside lower center", ncols=drawn + 1, frameon=False, fontsize=9)
    return figure


def graph_figure(explanation: Explanation) -> Figure:
    """Draw the groups of a channel graph and what leads from one to another.

    A row for each group in data-flow order, and one for each reason that freezes layers, below the last group that
    leads to these. A node's area is the share of the parameters that go if the group is cut to one channel; of frozen
    layers, the share they hold. It stands the further right the more layers lie before it. Solid lines lead down to
    what is made from a group, dashed ones back up to a group that is made from a later one as well, as a residual
    stream is.

    Args:
        explanation: of `lightning_prune.graph.explain.explain`.

    Returns:
        A figure that grows with the number of rows; not known to pyplot, so nothing has to close it.

    Raises:
        ValueError: if there is neither a group nor anything frozen.
    """
    rows = _graph_rows(explanation)
    if not rows:
        raise ValueError("a figure of a graph needs a group or something frozen, got neither")
    row_of = {row.key: i for i, row in enumerate(rows)}
    links = [((0, i), (0, j)) for i, j in explanation.links]
    links += [((0, i), (1, n)) for n, frozen in enumerate(explanation.frozen) for i in frozen.reads]
    depths = _depths(len(rows), [(row_of[a], row_of[b]) for a, b in links])
    figure, axes = _axes(width=9.0, height=1.5 + (0.24 if len(rows) <= 40 else 0.18) * max(len(rows), 4))
    axes.hlines(range(len(rows)), 0, 1, transform=axes.get_yaxis_transform(), color="#F0F0F0", linewidth=0.8, zorder=0)
    for leads_up, style in ((False, "-"), (True, (0, (3, 2)))):
        lines = [
            PathPatch(_line((depths[a], a), (depths[b], b)))
            for a, b in ((row_of[x], row_of[y]) for x, y in links)
            if (b < a) == leads_up
        ]
        axes.add_collection(
            PatchCollection(lines, facecolor="none", edgecolor="#8C8C8C", linewidth=0.8, linestyle=style, zorder=1)
        )
    largest = max(row.share for row in rows) or 1.0
    for row, depth in zip(rows, depths, strict=True):
        face, edge = _NODES[row.kind]
        area = max(SMALLEST_NODE, LARGEST_NODE * row.share / largest)
        nodes: PathCollection = axes.scatter(
            [depth], [row_of[row.key]], s=area, facecolor=face, edgecolor=edge, linewidth=1.0, zorder=2
        )
        nodes.set_gid(row.kind)
    for at, row in enumerate(rows):
        axes.annotate(
            row.note, (1, at), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8, color=INK
        )
    axes.set_yticks(range(len(rows)), [_shortened(row.name) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.3, -0.7)
    deepest = max(4, *depths)  # a shallow graph is not drawn out
    axes.set_xlim(-0.06 * deepest, 1.06 * deepest)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    figure.suptitle(
        f"{len(explanation.groups)} groups; {explanation.prunable_share:.1%} of {explanation.params:,} parameters can "
        "go in part",
        fontsize=11,
        color=INK,
    )
    handles = [
        Line2D([], [], marker="o", linestyle="", markerfacecolor=face, markeredgecolor=edge, label=kind)
        for kind, (face, edge) in _NODES.items()
        if any(row.kind == kind for row in rows)
    ]
    if any(row_of[b] > row_of[a] for a, b in links):
        handles.append(Line2D([], [], color="#8C8C8C", label="makes"))
    if any(row_of[b] < row_of[a] for a, b in links):
        handles.append(Line2D([], [], color="#8C8C8C", linestyle=(0, (3, 2)), label="is added back to"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8,
        title="area: parameters gone with all channels but one", title_fontsize=8,
    )  # fmt: skip
    return figure


def sensitivity_figure(
    values: Mapping[str, Sequence[float]], densities: Sequence[float], dense: float, quantity: str = "value"
) -> Figure:
    """Draw what becomes of a network as each layer alone is thinned out; the most sensitive layers stand out.

    Args:
        values: layer -> what was measured at each density.
        densities: falling, in (0, 1).
        dense: what was measured with all weights there.
        quantity: what is measured, for the axis.

    Returns:
        A figure that pyplot does not know; nothing has to close it.

    Raises:
        ValueError: if there is no layer, or one without a value for each density.
    """
    if not values or any(len(row) != len(densities) for row in values.values()):
        counts = {name: len(row) for name, row in values.items()}
        raise ValueError(f"a figure of sensitivity needs {len(densities)} values for each layer, got {counts}")
    figure, axes = _axes(width=8.0, height=4.4)
    worst = {n: sum(abs(v - dense) if math.isfinite(v) else math.inf for v in row) for n, row in values.items()}
    ranked = sorted(values, key=lambda name: -worst[name])
    x = [1.0, *densities]
    axes.axhline(dense, color="#BBBBBB", linewidth=1.2, linestyle="--", zorder=1, label=f"all weights: {dense:.4g}")
    for name in ranked[len(_LINES) :]:
        axes.plot(x, [dense, *values[name]], color="#CCCCCC", linewidth=1.2, zorder=2)
    for name, (colour, style, marker) in zip(ranked, _LINES, strict=False):
        line = [dense, *values[name]]
        axes.plot(x, line, style, color=colour, marker=marker, markersize=4, label=_shortened(name), zorder=3)
    if len(ranked) > len(_LINES):
        label = f"{len(ranked) - len(_LINES)} less sensitive"
        axes.plot([], [], color="#CCCCCC", linewidth=1.2, label=label)
    axes.set_xlim(1.02, max(0.0, min(densities) - 0.02))
    axes.grid(axis="both", color="#E6E6E6", linewidth=0.8)
    axes.set_xlabel("density of the layer, the others whole")
    axes.set_ylabel(quantity)
    figure.suptitle("Sensitivity: one layer thinned out, nothing retrained", fontsize=11, color=INK)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


@rank_zero_only
def log_figure(loggers: Iterable[Logger], tag: str, figure: Figure | Callable[[], Figure], step: int) -> None:
    """Hand the figure to every logger that takes figures, as TensorBoard's does; on the first process only."""
    for experiment in _experiments(loggers, "add_figure"):
        experiment.add_figure(tag, figure() if callable(figure) else figure, step)


@rank_zero_only
def log_histogram(loggers: Iterable[Logger], tag: str, values: Tensor, step: int) -> None:
    """Hand the finite values to every logger that takes histograms; on the first process only.

    Without a finite value nothing is logged, as a histogram of nothing has no range.
    """
    if not (experiments := list(_experiments(loggers, "add_histogram"))):
        return
    values = values.detach().float().cpu()
    values = values[values.isfinite()]
    if values.numel():
        for experiment in experiments:
            experiment.add_histogram(tag, values, step)


_NODES = {"exact": (BLUE, BLUE), "inexact": (ORANGE, ORANGE), "frozen": ("white", INK)}  # face and edge


@dataclass(frozen=True)
class _Row:
    """A row of the graph's picture; ``key`` is (0, index of a group) or (1, index of a frozen entry)."""

    key: tuple[int, int]
    name: str
    kind: str
    share: float
    note: str


def _graph_rows(explanation: Explanation) -> list[_Row]:
    """Groups in their order; what is frozen after the last group that it reads or that adds to one, or else last."""
    total = max(1, explanation.params)
    ends: dict[int, list[_Row]] = {}
    for n, frozen in enumerate(explanation.frozen):
        share = frozen.params / total
        row = _Row((1, n), listed(frozen.names, LONGEST_NAME), "frozen", share, f"frozen, {share:.1%}")
        before = {*frozen.reads, *(i for i, j in explanation.links if j in frozen.reads)}
        ends.setdefault(max(before, default=len(explanation.groups)), []).append(row)
    rows: list[_Row] = []
    for i, worth in enumerate(explanation.groups):
        share, size = worth.whole.params / total, worth.group.size
        kind = "exact" if worth.group.exact else "inexact"
        rows += [_Row((0, i), worth.group.name, kind, share, f"{size} ch, {share:.1%}"), *ends.pop(i, [])]
    return rows + [row for left in ends.values() for row in left]


def _depths(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """How many layers lie before each row, along links that lead down."""
    depths = [0] * count
    for source, target in sorted(links):
        if target > source:
            depths[target] = max(depths[target], depths[source] + 1)
    return depths


def _line(start: tuple[float, float], end: tuple[float, float]) -> Path:
    """Down from its start and level to its end; one that leads up runs above its row, and up beside the others."""
    (x, y), (to_x, to_y) = start, end
    if to_y > y:
        points = [start, (x, to_y - 0.5), (x, to_y), (x + min(0.3, to_x - x), to_y), end]
        return Path(points, [Path.MOVETO, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO])
    beside = to_x + 0.14
    points = [start, (x - 0.04, y - 0.25), (x - 0.12, y - 0.25), (beside + 0.1, y - 0.25), (beside, y - 0.25)]
    points += [(beside, y - 0.6), (beside, to_y + 0.3), (beside, to_y), end]
    curve, level = [Path.CURVE3, Path.CURVE3], [Path.LINETO]
    return Path(points, [Path.MOVETO, *curve, *level, *curve, *level, *curve])


def _experiments(loggers: Iterable[Logger], method: str) -> list[Any]:
    experiments = [getattr(logger, "experiment", None) for logger in loggers]
    return [experiment for experiment in experiments if callable(getattr(experiment, method, None))]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _event_steps(rows: Sequence[Mapping[str, object]]) -> list[float]:
    """Steps of the rows in which the count of events went up."""
    steps, done = [], 0.0
    for row in rows:
        count = _number(row.get("prune/event", done))
        if count > done and "step" in row:
            steps.append(_number(row["step"]))
        done = count
    return steps


def _number(value: object) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise ValueError(f"a row to draw holds numbers, got {value!r}")


def _shortened(name: str) -> str:
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
