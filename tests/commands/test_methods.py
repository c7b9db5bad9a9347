import json

import pytest

from lightning_prune.commands import main
from lightning_prune.commands.methods import described, schedule_text
from lightning_prune.methods import discover
from lightning_prune.methods.random import RandomWeights
from lightning_prune.methods.taylor_weight import TaylorWeight
from lightning_prune.schedule import Gradual, Iterative, OneShot, Schedule


def test_table_has_a_row_for_every_method_in_order(capsys):
    assert main(["methods"]) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert [cell.strip() for cell in header.strip("| ").split("|")] == [
        "name",
        "paper",
        "removes",
        "needs",
        "default schedule",
    ]
    assert [row.split("|")[1].strip() for row in rows] == list(discover())


def test_json_beside_the_table_says_the_same_and_where_to_read(tmp_path, capsys):
    assert main(["methods", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "new" / "methods.md").read_text("utf-8"))
    rows = {row["name"]: row for row in json.loads((tmp_path / "new" / "methods.json").read_text("utf-8"))}
    assert rows.keys() == discover().keys()
    assert rows["TaylorWeight"] == described(TaylorWeight)


def test_row_says_paper_kind_needs_and_schedule():
    assert described(TaylorWeight) == {
        "name": "TaylorWeight",
        "paper": "Molchanov et al., 2019",
        "removes": "channels",
        "needs": TaylorWeight.needs,
        "default_schedule": schedule_text(TaylorWeight.default_schedule),
        "url": "https://arxiv.org/abs/1906.10771",
        "module": "lightning_prune.methods.taylor_weight",
    }
    assert (described(RandomWeights)["paper"], described(RandomWeights)["removes"]) == ("baseline, no paper", "weights")


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (OneShot(), "OneShot(at=0.5)"),
        (Iterative(0.1, 0.6, events=15), "Iterative(start=0.1, end=0.6, events=15)"),
        (Iterative(every=0.2), "Iterative(start=0.1, end=0.7, every=0.2)"),  # events does not count beside every
        (Gradual(10, 90, power=2.0, unit="step"), "Gradual(start=10, end=90, events=20, power=2.0, unit='step')"),
    ],
)
def test_schedule_is_written_so_that_it_reads_back(schedule, text):
    assert schedule_text(schedule) == text
    assert eval(text, {"OneShot": OneShot, "Iterative": Iterative, "Gradual": Gradual}) == schedule


def test_schedule_that_is_no_dataclass_is_shown_as_it_shows_itself():
    class Fortnightly(Schedule):
        def points(self):
            return [(0.5, 1.0)]

        def __repr__(self):
            return "every fortnight"

    assert schedule_text(Fortnightly()) == "every fortnight"
