"""Pictures of a prune, and the loggers that take them.

Figures are made without pyplot, so that they need no display and leave no state behind. Colours are Okabe and Ito's,
which hold up in every common form of colour blindness and in grey.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

BLUE, ORANGE, GREEN, INK, PALE = "#0072B2", "#D55E00", "#009E73", "#333333", "#D3DEE8"
CURVES = (
    ("prune/flops_kept", "flops", BLUE, "-"),
    ("prune/params_kept", "params", ORANGE, "--"),
    ("prune/density", "density", GREEN, "-."),
)
LONGEST_NAME = 40


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
    figure, axes = _axes(width=8.0, height=1.3 + 0.24 * max(len(before), 3))
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


def curve_figure(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Draw what was kept over the steps of a run, as fractions of the dense model, and mark the prune events.

    Args:
        rows: as logged, in order of time: ``step``, the number of events done as ``prune/event``, and any of
            ``prune/flops_kept``, ``prune/params_kept`` and ``prune/density``. Before the first row all are 1.

    Returns:
        A figure that pyplot does not know; nothing has to close it.

    Raises:
        ValueError: if no row has a ``step`` and one of the three fractions.
    """
    figure, axes = _axes(width=8.0, height=3.8)
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
    axes.set_xlim(0, max(last_step, 1) * 1.03)  # an event on the last step is seen
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("kept, of the dense model")
    figure.suptitle("Kept while training", fontsize=11, color=INK)
    figure.legend(loc="outside lower center", ncols=drawn + 1, frameon=False, fontsize=9)
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
    values = values.detach().float().cpu()
    values = values[values.isfinite()]
    if values.numel():
        for experiment in _experiments(loggers, "add_histogram"):
            experiment.add_histogram(tag, values, step)


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
