import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.colors import to_hex
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_prune.figures import (
    BLUE,
    INK,
    ORANGE,
    PALE,
    architecture_figure,
    curve_figure,
    graph_figure,
    log_figure,
    log_histogram,
)
from lightning_prune.graph.explain import Explanation, explain
from lightning_prune.surgery import trace

ROWS = (
    {"step": 10, "prune/event": 1, "prune/flops_kept": 0.8, "prune/density": 0.9},
    {"step": 15, "prune/event": 1, "prune/flops_kept": 0.8, "prune/density": 0.9},
    {"step": 20, "prune/event": 2, "prune/flops_kept": 0.5, "prune/density": 0.7},
)


def bars(figure, colour):
    """Lengths of the bars of one colour, from the top of the picture to its foot."""
    axes = figure.axes[0]
    drawn = [bar for bar in axes.patches if to_hex(bar.get_facecolor()).upper() == colour]
    return [bar.get_width() for bar in sorted(drawn, key=lambda bar: -axes.transData.transform((0, bar.get_y()))[1])]


def stored(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_architecture_draws_kept_over_dense_with_the_first_group_on_top():
    figure = architecture_figure({"stem": 16, "stage1": 32}, {"stage1": 8, "stem": 12})
    assert bars(figure, PALE) == [16, 32]
    assert bars(figure, BLUE) == [12, 8]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["stem", "stage1"]


def test_architecture_writes_the_counts_and_their_total():
    figure = architecture_figure({"stem": 16, "stage1": 32}, {"stem": 12, "stage1": 8})
    assert [text.get_text() for text in figure.axes[0].texts] == ["12 / 16", "8 / 32"]
    # 20 of 48 is 41.7 %.
    assert figure.get_suptitle() == "Channels kept per group: 20 of 48 (42%)"


@pytest.mark.parametrize("groups", [5, 60])
def test_architecture_keeps_rows_apart_however_many_groups(groups):
    figure = architecture_figure({f"g{i}": 8 for i in range(groups)}, {f"g{i}": 4 for i in range(groups)})
    figure.canvas.draw()
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    # Pixels grow upwards, so each label's foot must be above the next one's head.
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(labels))


def test_architecture_shortens_a_long_name_in_its_middle():
    name = "encoder." + "x" * 60 + ".conv"
    figure = architecture_figure({name: 8}, {name: 8})
    text = figure.axes[0].get_yticklabels()[0].get_text()
    assert len(text) <= 40
    assert text.startswith("encoder.")
    assert text.endswith(".conv")


def test_architecture_refuses_groups_that_do_not_match():
    with pytest.raises(ValueError, match=r"only one of them has \['a', 'b'\]"):
        architecture_figure({"a": 1, "c": 1}, {"b": 1, "c": 1})
    with pytest.raises(ValueError, match="at least one group"):
        architecture_figure({}, {})


def test_curve_starts_at_one_and_steps_down_at_each_row():
    lines = {line.get_label(): line for line in curve_figure(ROWS).axes[0].lines}
    flops = lines["flops: 0.500"]
    assert list(flops.get_xdata()) == [0, 10, 15, 20, 20]
    assert list(flops.get_ydata()) == [1, 0.8, 0.8, 0.5, 0.5]
    assert flops.get_drawstyle() == "steps-post"
    assert "density: 0.700" in lines
    assert not any(label.startswith("params") for label in lines)


def test_curve_marks_events_where_their_count_rises_and_nowhere_else():
    # Three rows, but the one at step 15 is an epoch's end without an event.
    axes = curve_figure(ROWS).axes[0]
    upright = [line for line in axes.lines if list(line.get_ydata()) == [0, 1] and len(set(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in upright] == [10, 20]
    assert "prune events: 2" in [line.get_label() for line in axes.lines]


def test_curve_goes_to_the_end_of_the_fit_it_is_of():
    # 3 % beyond, so that an event on the last step is seen
    assert curve_figure(ROWS, until=200).axes[0].get_xlim() == (0, 206)
    assert curve_figure(ROWS, until=1).axes[0].get_xlim()[1] == curve_figure(ROWS).axes[0].get_xlim()[1]


def test_curve_refuses_rows_that_hold_nothing_to_draw():
    with pytest.raises(ValueError, match="got 0 rows"):
        curve_figure([])
    with pytest.raises(ValueError, match="got 1 rows"):
        curve_figure([{"step": 3, "prune/params": 17}])
    with pytest.raises(ValueError, match="holds numbers, got 'half'"):
        curve_figure([{"step": 3, "prune/density": "half"}])


def test_figures_are_drawn_without_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import now raises
    figure = architecture_figure({"a": 2}, {"a": 1})
    figure.canvas.draw()
    assert figure.canvas.buffer_rgba().shape[1] == 768


def test_tensorboard_gets_figures_and_histograms_and_other_loggers_are_passed_over(tmp_path):
    tensorboard, csv = TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")
    log_figure([csv, tensorboard], "prune/architecture", architecture_figure({"a": 2}, {"a": 1}), step=7)
    log_histogram([csv, tensorboard], "prune/score/a", torch.tensor([1.0, float("nan"), 3.0, float("inf")]), step=7)
    tensorboard.finalize("success")
    events = stored(tensorboard.log_dir)
    assert [image.step for image in events.Images("prune/architecture")] == [7]
    histogram = events.Histograms("prune/score/a")[0]
    assert histogram.step == 7
    # Of the four values two are finite: 1 and 3.
    value = histogram.histogram_value
    assert (value.num, value.min, value.max) == (2, 1, 3)


def test_a_histogram_of_nothing_finite_is_not_logged(tmp_path):
    tensorboard = TensorBoardLogger(tmp_path)
    log_histogram([tensorboard], "prune/score/a", torch.tensor([float("nan")]), step=1)
    tensorboard.experiment.add_scalar("other", 1.0, 1)
    tensorboard.finalize("success")
    assert stored(tensorboard.log_dir).Tags()["histograms"] == []


@pytest.mark.parametrize(("rank", "logged"), [(0, ["figure", "histogram"]), (1, [])])
def test_only_the_first_process_logs(rank, logged, monkeypatch):
    calls = []

    class Experiment:
        def add_figure(self, tag, figure, step):
            calls.append("figure")

        def add_histogram(self, tag, values, step):
            calls.append("histogram")

    monkeypatch.setattr(rank_zero_only, "rank", rank)
    logger = SimpleNamespace(experiment=Experiment())
    log_figure([logger], "prune/architecture", architecture_figure({"a": 2}, {"a": 1}), step=7)
    log_histogram([logger], "prune/score/a", torch.ones(3), step=7)
    assert calls == logged


class Stream(nn.Module):
    """A normed stream of 6 channels, a branch that reads it and adds to it, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.up, self.down = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(self.up(self.norm(x)).relu()))


def nodes(figure):
    """Gid, edge colour and offset of each node, from the top."""
    drawn = [c for c in figure.axes[0].collections if c.get_gid() is not None]
    return [(c.get_gid(), to_hex(c.get_edgecolor()[0]).upper(), *c.get_offsets()[0].tolist()) for c in drawn]


def test_figure_has_a_node_for_each_group_and_frozen_reason_by_depth():
    figure = graph_figure(explain(trace(Stream(), torch.zeros(1, 3))))
    # the head reads the stream and stands below the branch, which adds to it
    assert nodes(figure) == [("inexact", ORANGE, 0, 0), ("exact", BLUE, 1, 1), ("frozen", INK, 1, 2)]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stem", "up", "head"]
    # 24 + 12 + 28 + 30 + 14 = 108 parameters: 4 + 2 + 4 + 5 + 2 for each of 5 channels, 13 for each of 3; the head 14
    assert [text.get_text() for text in axes.texts] == ["6 ch, 78.7%", "4 ch, 36.1%", "frozen, 13.0%"]


def test_figure_draws_what_is_added_back_dashed_and_up():
    figure = graph_figure(explain(trace(Stream(), torch.zeros(1, 3))))
    solid, dashed = (
        c for c in figure.axes[0].collections if c.get_gid() is None and len(c.get_paths()) and c.get_zorder() == 1
    )
    assert [[p.vertices[0].tolist(), p.vertices[-1].tolist()] for p in solid.get_paths()] == [
        [[0, 0], [1, 1]],
        [[0, 0], [1, 2]],
    ]
    assert [[p.vertices[0].tolist(), p.vertices[-1].tolist()] for p in dashed.get_paths()] == [[[1, 1], [0, 0]]]


@pytest.mark.parametrize("layers", [6, 101])
def test_figure_keeps_rows_apart_and_areas_in_proportion(layers):
    widths = [4] * layers
    widths[2] = 40
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in zip([4, *widths], [*widths, 2], strict=True)))
    said = explain(trace(model, torch.zeros(1, 4)))
    figure = graph_figure(said)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == layers + 1
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    areas = [c.get_sizes()[0] for c in figure.axes[0].collections if c.get_gid() is not None]
    worths = [worth.whole.params for worth in said.groups]
    assert areas[1] / areas[2] == pytest.approx(worths[1] / worths[2])
    assert areas[2] > 2 * areas[1] > areas[0]


def test_figure_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs a group or something frozen"):
        graph_figure(Explanation(0, 0, 0.0, (), (), (), ()))
