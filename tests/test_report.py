import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.report import Report, markdown_table


@dataclass(frozen=True)
class Cost:
    flops: int
    params: int
    by_layer: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerCost:
    flops: int
    params: int


@pytest.fixture
def report():
    return Report(
        before=Cost(1_200_000, 5_000, {"conv1": LayerCost(1_000_000, 4_000), "fc": (200_000, 1_000)}),
        after=Cost(588_000, 2_000, {"conv1": LayerCost(490_000, 1_600), "fc": (98_000, 400)}),
        groups={"conv1": (7, 16), "conv2": (16, 16)},
        removed={"conv1.weight": {0: 9, 1: 2}},
        frozen={"fc": "model output"},
        rows=({"step": 30, "prune/event": 1, "prune/flops_kept": 0.49},),
        seconds=0.25,
    )


def test_kept_fractions_are_of_the_cost_before(report):
    # 588000 / 1200000 = 0.49 and 2000 / 5000 = 0.4; the other way round both would be above 1.
    assert report.flops_kept == pytest.approx(0.49)
    assert report.params_kept == pytest.approx(0.4)


def test_kept_fraction_of_a_model_that_costs_nothing_is_one(report):
    empty = Report(Cost(0, 0), Cost(0, 0), {}, {}, {})
    assert (empty.flops_kept, empty.params_kept) == (1.0, 1.0)


def test_dict_holds_every_field_under_plain_keys(report):
    assert report.to_dict() == {
        "before": {
            "flops": 1_200_000,
            "params": 5_000,
            "by_layer": {"conv1": {"flops": 1_000_000, "params": 4_000}, "fc": [200_000, 1_000]},
        },
        "after": {
            "flops": 588_000,
            "params": 2_000,
            "by_layer": {"conv1": {"flops": 490_000, "params": 1_600}, "fc": [98_000, 400]},
        },
        "flops_kept": 0.49,
        "params_kept": 0.4,
        "groups": {"conv1": {"kept": 7, "dense": 16}, "conv2": {"kept": 16, "dense": 16}},
        "removed": {"conv1.weight": {"0": 9, "1": 2}},
        "frozen": {"fc": "model output"},
        "rows": [{"step": 30, "prune/event": 1, "prune/flops_kept": 0.49}],
        "seconds": 0.25,
    }


def test_json_reads_back_as_the_dict(report):
    assert json.loads(report.to_json()) == report.to_dict()


def test_json_writes_null_for_what_is_not_finite():
    rows = ({"loss": float("nan"), "score": [float("inf"), 1.0]},)
    text = Report(Cost(1, 1), Cost(1, 1), {}, {}, {}, rows).to_json()
    assert json.loads(text)["rows"] == [{"loss": None, "score": [None, 1.0]}]


def test_markdown_shows_costs_groups_events_and_frozen_in_that_order(report):
    cost, groups, events, frozen = report.to_markdown().split("\n\n")
    assert cost.splitlines()[2].split() == ["|", "flops", "|", "1,200,000", "|", "588,000", "|", "0.49", "|"]
    # 16 channels of which 7 are kept: 9 removed.
    assert groups.splitlines()[2].split() == ["|", "conv1", "|", "16", "|", "7", "|", "9", "|"]
    assert "prune/flops_kept" in events.splitlines()[0]
    assert frozen.splitlines()[2].split("|")[1:3] == [" fc     ", " model output "]


def test_markdown_leaves_out_tables_without_a_line():
    report = Report(Cost(2, 2), Cost(1, 1), {}, {}, {})
    assert report.to_markdown().count("\n\n") == 0


def test_str_is_the_markdown(report):
    assert str(report) == report.to_markdown()


def test_table_pads_cells_and_sets_numbers_to_the_right():
    rows = [{"layer": "conv1", "flops": 36864}, {"layer": "fc", "flops": 640, "kept": 0.5}]
    assert markdown_table(rows).splitlines() == [
        "| layer |  flops | kept |",
        "| :---- | -----: | ---: |",
        "| conv1 | 36,864 |      |",
        "| fc    |    640 |  0.5 |",
    ]


def test_table_shows_only_the_columns_asked_for_in_that_order():
    table = markdown_table([{"a": 1, "b": 2, "c": 3}], columns=["c", "a"])
    assert table.splitlines()[0].split() == ["|", "c", "|", "a", "|"]
    assert table.splitlines()[2].split() == ["|", "3", "|", "1", "|"]


def test_table_of_nothing_is_empty_but_keeps_named_columns():
    assert markdown_table([]) == ""
    assert markdown_table([], columns=["method"]).splitlines() == ["| method |", "| :----- |"]


def test_table_writes_booleans_as_words_and_none_as_nothing():
    table = markdown_table([{"cut": True, "paper": None}, {"cut": False, "paper": "x"}])
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["yes", "no"]
    assert table.splitlines()[2].split("|")[2].strip() == ""


CELLS = st.text("a|\\\n", max_size=4) | st.integers() | st.floats() | st.none()


@given(st.lists(st.dictionaries(st.sampled_from("abc"), CELLS), max_size=3))
def test_table_has_one_line_per_row_and_as_many_cells_in_each(rows):
    lines = markdown_table(rows).split("\n")
    columns = len({key for row in rows for key in row})
    bars = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines]
    assert bars == ([columns + 1] * (len(rows) + 2) if columns else [0])
