"""Accuracy against what it costs, with the front of what nothing else beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_prune.comparison.table import label
from lightning_prune.figures import BLUE, GREEN, INK, ORANGE

PANELS = (
    ("flops", "flops, one sample"),
    ("nnz", "parameters not zero"),
    ("latency_kept", "latency of one sample, to the dense network's"),
    ("bytes", "state dict, bytes"),
)
_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7A5195")
_MARKERS = "oD^vPX<>hp"
_SCRATCH = "#9AA5AE"
_TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 97, 98, 99, 99.5, 100)
_SMALLEST = 0.2  # error in percent that still makes a difference in height


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats, cheapest first: less cost with as much accuracy, or more of it.

    Args:
        points: (cost, accuracy); of equal ones the first counts.

    Example:
        >>> ["ABCDE"[i] for i in pareto_front([(10, 90), (5, 89), (6, 88), (20, 91), (12, 90)])]
        ['B', 'A', 'D']
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def pareto_figure(summary: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw a panel for each cost: a point a row, bars as long as the standard deviation over seeds, the front as steps.

    Hollow points in the first panel are where masked networks would be if zeros were free.

    Args:
        summary: of `summarised`.
    """
    lines = [line for line in summary if line["runs"]]
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    looks = _looks(lines)
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(axes, [line for line in lines if line.get(key) is not None], key, looks)
        axes.set(xlabel=title, ylabel="accuracy, %")
        _spread_the_top(axes, [100 * line["accuracy"] for line in lines])
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6)
        if key != "latency_kept":
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        str(handle.get_label()): handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]
    }
    if handles:
        figure.legend(
            handles=list(handles.values()), labels=list(handles), loc="outside right upper", frameon=False, fontsize=8
        )
    return figure


def _spread_the_top(axes: Axes, accuracies: Sequence[float]) -> None:
    """Near 100 % heights go by the logarithm of the error: one outlier would press all others together."""
    if not accuracies or not 90 < max(accuracies) <= 100 or min(accuracies) < 0:
        return
    axes.set_yscale("function", functions=(_height, _accuracy))
    worst = min(accuracies)
    ticks = [tick for tick in _TICKS if tick >= worst - 0.3 * (100 - worst)]
    axes.set_ylim(_accuracy(_height(worst) - 0.08), 100)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _height(accuracy: Any) -> Any:
    return -np.log10(np.maximum(100 - np.asarray(accuracy), 0) + _SMALLEST)


def _accuracy(height: Any) -> Any:
    return 100 + _SMALLEST - 10 ** -np.asarray(height)


def _looks(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    methods = list(dict.fromkeys(line["method"] for line in lines if line["method"] != "dense"))
    looks = {m: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, m in enumerate(methods)}
    return {"dense": (INK, "*"), **looks}


def _panel(axes: Axes, lines: Sequence[Mapping[str, Any]], key: str, looks: Mapping[str, tuple[str, str]]) -> None:
    for line in lines:
        colour, marker = looks[line["method"]]
        is_scratch = line["variant"].startswith("scratch")
        x, y = line[key], 100 * line["accuracy"]
        error = 100 * (line["accuracy_std"] or 0.0)
        above = min(error, max(0.0, 100 - y)) if y <= 100 else error  # no accuracy is above all
        axes.errorbar(
            x, y, yerr=[[error], [above]], xerr=line.get(f"{key}_std") or 0.0, linestyle="none",
            marker=("1" if line["variant"] == "scratch_e" else "2") if is_scratch else marker, markersize=8,
            color=_SCRATCH if is_scratch else colour, elinewidth=0.8, capsize=2,
            label=f"{label(line).split()[0]} of any" if is_scratch else label(line),
        )  # fmt: skip
        if key == "flops" and not is_scratch and line["flops_sparse"] < 0.999 * line["flops"]:
            axes.plot(line["flops_sparse"], y, marker, markersize=7, markerfacecolor="none", color=colour)
            hollow = axes.plot([], [], "o", markersize=7, markerfacecolor="none", color=_SCRATCH)
            hollow[0].set_label("if zeros were free")
    front = pareto_front([(line[key], line["accuracy"]) for line in lines])
    steps = [(lines[i][key], 100 * lines[i]["accuracy"]) for i in front]
    if steps:
        axes.step(*zip(*steps, strict=True), where="post", color=INK, linewidth=1, linestyle=":", label="front")
