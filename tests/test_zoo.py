"""The zoo's own check of a cut, which has to tell a right one from one that is almost right, and its tables."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import zoo
from benchmarks.zoo_models import Model, hand_models
from tests.nets import normal


class Mlp(nn.Module):
    """A hidden layer of six units, with a norm over them if asked."""

    def __init__(self, hidden=6, norm=False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, hidden), nn.Linear(hidden, 3)
        self.norm = nn.LayerNorm(hidden) if norm else None

    def forward(self, x):
        x = F.relu(self.fc1(x))
        return self.fc2(x if self.norm is None else self.norm(x))


def model(**options):
    return Model("mlp", "hand", "other", lambda: Mlp(**options), normal(4))


def cut_to(dense, rows, columns, norm=None):
    """A hidden layer of the rows, read through the columns: right if the two are the same."""
    net = Mlp(len(rows), norm is not None)
    values = {"fc1.weight": dense.fc1.weight[rows], "fc1.bias": dense.fc1.bias[rows]}
    values |= {"fc2.weight": dense.fc2.weight[:, columns], "fc2.bias": dense.fc2.bias}
    if norm is not None:
        values |= {"norm.weight": dense.norm.weight[norm], "norm.bias": dense.norm.bias[norm]}
    net.load_state_dict(values)
    return net


KEPT = [0, 2, 5]
PLAN = {
    "fc1.weight": {0: torch.tensor(KEPT)},
    "fc1.bias": {0: torch.tensor(KEPT)},
    "fc2.weight": {1: torch.tensor(KEPT)},
}


def test_the_check_passes_a_right_cut_and_not_one_whose_reader_is_off_by_one():
    dense = zoo.build(model())
    right = zoo.independent_difference(model(), cut_to(dense, KEPT, KEPT), PLAN)
    wrong = zoo.independent_difference(model(), cut_to(dense, KEPT, [0, 2, 4]), PLAN)
    assert right[0] < 1e-12
    assert wrong[0] > 1e-2


def test_norms_aside_a_cut_through_a_norm_is_told_from_one_that_mixes_its_scales_up():
    # the norm's mean and variance change as units go, so the plain difference says nothing
    plan = {**PLAN, "norm.weight": {0: torch.tensor(KEPT)}, "norm.bias": {0: torch.tensor(KEPT)}}
    dense = zoo.build(model(norm=True))
    raw, aside, allowed, _ = zoo.independent_difference(model(norm=True), cut_to(dense, KEPT, KEPT, KEPT), plan)
    wrong = zoo.independent_difference(model(norm=True), cut_to(dense, KEPT, KEPT, [0, 2, 4]), plan)
    assert raw > 1e-2
    assert aside < 1e-12 < allowed
    assert wrong[1] > 1e-2


@pytest.mark.parametrize("form", ["mean", "var", "std"])
def test_sums_stand_for_means_so_that_zeros_do_not_count(form):
    def scaled(x):
        if form == "mean":
            return x * torch.rsqrt(x.square().mean(1, keepdim=True))
        return x / getattr(x, form)(1, keepdim=True)

    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = F.pad(x, (0, 2))
    assert not torch.allclose(scaled(padded)[:, :3], scaled(x))
    with zoo.SumsForMeans():
        assert torch.allclose(scaled(padded)[:, :3], scaled(x))


def test_where_an_output_is_a_choice_the_layers_before_it_are_compared_and_nothing_after_them_runs():
    class Choosing(Mlp):
        def forward(self, x):
            raise RuntimeError(f"chose box {int(super().forward(x).argmax())}")

    choosing = Model("mlp", "hand", "other", Choosing, normal(4), compare=("fc1", "fc2"))
    shapes = [tuple(t.shape) for t in zoo.outputs(choosing, zoo.build(choosing))]
    assert shapes == [(1, 6), (1, 3)]


def test_a_check_says_so_where_what_was_removed_does_not_matter():
    # the reader's columns are zero from the start: any cut would pass
    def built():
        net = Mlp()
        nn.init.normal_(net.fc2.weight[:, 0], std=1.0)
        net.fc2.weight.data[:, [1, 3, 4]] = 0
        return net

    blind = Model("mlp", "hand", "other", built, normal(4))
    *_, note = zoo.independent_difference(blind, cut_to(zoo.build(blind), KEPT, KEPT), PLAN)
    assert "weak" in note


def test_kept_indices_are_read_out_of_values_also_where_some_are_equal():
    dense = zoo.build(model())
    with torch.no_grad():
        dense.fc1.weight[1] = dense.fc1.weight[2]  # rows that differ only in the bias
        dense.fc2.weight[0, :4] = 1.0
    read = zoo.read_kept(dense, cut_to(dense, KEPT, KEPT))
    assert read["fc2.weight"][1].tolist() == KEPT
    assert read["fc1.bias"][0].tolist() == KEPT


def test_two_dimensions_that_were_cut_are_both_read():
    dense, cut = nn.Conv2d(5, 6, 3), nn.Conv2d(2, 3, 3)
    cut.weight.data, cut.bias.data = dense.weight.data[[1, 3, 4]][:, [0, 4]], dense.bias.data[[1, 3, 4]]
    read = zoo.read_kept(dense, cut)
    assert {dim: index.tolist() for dim, index in read["weight"].items()} == {0: [1, 3, 4], 1: [0, 4]}


def test_values_that_are_no_slices_of_the_dense_ones_are_wrong():
    dense = zoo.build(model())
    cut = cut_to(dense, KEPT, KEPT)
    cut.fc1.bias.data += 1
    with pytest.raises(zoo.Failed, match=r"fc1.bias are not slices"):
        zoo.read_kept(dense, cut)


def test_a_tied_weight_that_came_apart_gets_a_copy_of_its_own():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert not zoo.untie(net, ["0.weight"])
    assert zoo.untie(net, ["0.weight", "1.weight"])
    assert net[1].weight is not net[0].weight
    assert torch.equal(net[1].weight, net[0].weight)


def test_output_layers_are_those_with_no_layer_after_them():
    entry = next(m for m in hand_models() if m.name == "nested_outputs")
    net = zoo.build(entry)
    assert set(zoo.output_layers(net, entry.inputs(1))) == {net.boxes, net.classes, net.mask}


def test_no_norm_and_no_zero_layer_is_left_constant():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    nn.init.zeros_(net[1].weight)
    zoo.unsettle(net)
    spread = [t.std() for t in [*net.parameters(), net[0].running_mean, net[0].running_var]]
    assert min(spread) > 0.01


def test_a_process_that_takes_too_long_leaves_a_row_that_says_where_it_was():
    row = zoo.in_a_process(model(), "ours", seconds=0.01, gigabytes=1)
    assert row["status"] == "time"
    assert row["model"] == "mlp"
    assert "during start" in row["note"]


def test_rows_that_are_there_are_not_made_again(monkeypatch, tmp_path, capsys):
    made = []

    def fake(model, tool, seconds, gigabytes):
        made.append(model.name)
        return {**dict.fromkeys(zoo.FIELDS), "model": model.name, "source": "hand", "tool": tool, "status": "ok"}

    monkeypatch.setattr(zoo, "in_a_process", fake)
    for pattern, more in [("^hand/(unet|gru)$", []), ("^hand/(unet|glu)$", []), ("^hand/unet$", ["--redo"])]:
        monkeypatch.setattr(sys, "argv", ["zoo.py", "--only", pattern, "--results", str(tmp_path), *more])
        zoo.main()
    assert made == ["unet", "gru", "glu", "unet"]
    assert sorted(row["model"] for row in zoo.read_rows(tmp_path / "zoo.csv")) == ["glu", "gru", "unet"]
    assert "| gru " in (tmp_path / "zoo.md").read_text()


ROWS = [
    {"model": "a", "status": "ok", "exact": "yes", "prunable share": 0.99, "flops kept": 0.5, "predicted - counted": 0},
    {"model": "b", "status": "ok", "exact": "no", "prunable share": 0.9, "flops kept": 0.6, "predicted - counted": 0},
    {"model": "c", "status": "raised", "exact": None, "prunable share": None, "flops kept": None},
]
ROWS = [
    dict.fromkeys(zoo.FIELDS) | {"source": "hand", "kind": "convnet", "family": "f", "tool": "ours"} | r for r in ROWS
]


def test_models_short_of_the_goal_are_listed_with_why():
    short = {row["model"]: row["short"] for row in zoo.short_of_the_goal(ROWS)}
    assert short == {"b": "share 0.900 of 0.98, flops kept 0.600", "c": "raised"}


def test_a_family_counts_its_models_that_are_right_and_those_that_are_exact():
    (row,) = zoo.families(ROWS)
    assert (row["models"], row["right"], row["exact"], row["least share"]) == (3, 2, 1, 0.9)


def test_tables_go_between_their_marks_and_nowhere_else():
    page = "Before.\n<!-- zoo: one -->\nold\n<!-- zoo: end -->\nAfter.\n"
    assert zoo.fill(page, {"one": "new"}) == "Before.\n<!-- zoo: one -->\nnew\n<!-- zoo: end -->\nAfter.\n"
    with pytest.raises(ValueError, match="no place for 'two'"):
        zoo.fill(page, {"two": "new"})
