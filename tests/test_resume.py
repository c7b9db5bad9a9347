"""A run that ends too early goes on as if nothing had happened; one that would go on with another's state does not.

What is killed, and when, is drawn in ``benchmarks/reliability_kills.py``, which says kill by kill what became of it.
"""

import csv
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from benchmarks import reliability_kills as kills
from lightning_prune import (
    LRPET,
    Gradual,
    Iterative,
    LotteryTicket,
    Magnitude,
    OneShot,
    RigL,
    Rounds,
    TaylorWeight,
    Updates,
)
from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.methods import discover
from lightning_prune.optimizers import check_states

METHODS = [name for name, cls in discover().items() if cls.kind in kills.KEEP]
OF_EACH_KIND = {
    "TaylorWeight": lambda: TaylorWeight(0.5),
    "TaylorWeight masked": lambda: TaylorWeight(0.5, apply="mask"),
    "Magnitude": lambda: Magnitude(0.2),
    "RigL": lambda: RigL(0.2),
    "LRPET": lambda: LRPET(0.5),
}
each_kind = pytest.mark.parametrize("make", OF_EACH_KIND.values(), ids=OF_EACH_KIND)

pytestmark = [
    # A net of a thousand weights reaches its budget before the last step of a fine schedule.
    pytest.mark.filterwarnings("ignore:.*changed nothing"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Method -> what became of its kill. Runs are forked from a process that is not the one which tests."""
    out = tmp_path_factory.mktemp("killed") / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.reliability_kills", "--most", "1", "--least", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.slow  # four fits for each method, each in a process of its own
@pytest.mark.processes  # a process that is killed cannot be the one that tests
@pytest.mark.xdist_group("kills")
@pytest.mark.parametrize("method", METHODS)
def test_killed_run_ends_bitwise_as_the_uninterrupted_one(rows, method):
    row = rows[method]
    assert row["control"] == "bitwise"
    assert (row["survived"], row["differs"]) == ("True", "")
    assert 0 < int(row["resumed from step"]) <= kills.STEPS


@pytest.mark.parametrize("place", kills.PLACES)
def test_moments_are_drawn_after_the_first_checkpoint_and_within_the_run(place, monkeypatch):
    counted = {"event": [[0, 5], [7, 50], [20, 60]], "scoring": [[7, 9]]}
    monkeypatch.setattr(kills, "whole_run", lambda *_: {"counted": counted})
    drawn = [kills.draw("any", place, random.Random(number))[0] for number in range(200)]
    assert {moment.every for moment in drawn} == {0, 1, 2, 3, 4, 5}
    for moment in drawn:
        first = moment.every or kills.BATCHES
        spans = {
            "training": range(first + 1, kills.STEPS + 1),
            "scoring": range(1),
            "event": range(1, 3),  # not the one at step 0
            "checkpoint write": range(3, 2 * (kills.STEPS // first) + 1),
        }
        assert moment.at in spans[moment.place]


def test_comparison_tells_one_bit_from_equal():
    first = {"a": [torch.tensor([0.0, torch.nan]), 1.5], "b": {"c": torch.ones(2)}}
    same = {"a": [torch.tensor([0.0, torch.nan]), 1.5], "b": {"c": torch.ones(2)}}
    other = {"a": [torch.tensor([-0.0, torch.nan]), 1.25], "b": {"c": torch.ones(2).double()}, "d": 0}
    assert list(kills.differences(first, same)) == []
    assert list(kills.differences(first, other)) == ["/a/0", "/a/1: 1.5 and 1.25", "/b/c", "/d is missing"]


def final(trainer, callback):
    """All that has to be equal at the end of a fit."""
    return {
        "weights": dict(trainer.lightning_module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "plan": callback.plan.state_dict(),
        "events": [[event.step, event.progress] for event in callback.events],
        "rows": [{k: v for k, v in row.items() if k != "prune/seconds"} for row in callback.report.rows],
    }


def assert_equal(first, second):
    assert list(kills.differences(first, second)) == []


@pytest.mark.parametrize("method", ["TaylorWeight", "Magnitude", "RigL", "LRPET"])
def test_each_of_several_checkpoints_leads_to_the_same_end(method, tmp_path):
    moment = kills.Moment("training", 4, 0)  # saved every 4 steps of epochs of 6
    whole = kills.run(tmp_path, method, moment, 0)
    for step in (4, 16, 24):  # the last one is written before the epoch, and training, end
        resumed = kills.run(tmp_path, method, moment, 7, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert kills.compare(whole, {**resumed, "step": step}) == []


@each_kind
def test_run_that_is_resumed_twice_ends_as_the_whole_one(make, fit, save_each, tmp_path):
    whole, second = make(), make()
    expected = final(fit([whole, save_each()], max_epochs=4), whole)
    for path in ("epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"):
        (tmp_path / path).rename(tmp_path / f"whole {path}")
    fit([make(), save_each()], max_epochs=4, ckpt_path=tmp_path / "whole epoch=0.ckpt", seed=1)
    again = fit(second, max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt", seed=2)
    assert_equal(expected, final(again, second))


@each_kind
def test_model_that_is_pruned_already_goes_back_to_the_checkpoint(make, fit, save_each, tmp_path):
    whole, resumed = make(), make()
    trainer = fit([whole, save_each()], max_epochs=4)
    expected = final(trainer, whole)
    expected["weights"] = {name: value.clone() for name, value in expected["weights"].items()}
    again = fit(resumed, model=trainer.lightning_module, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_equal(expected, final(again, resumed))


class Best(Callback):
    """Says which epoch is the best one."""

    def on_validation_epoch_end(self, trainer, model):
        model.log("score", float(trainer.current_epoch == 1))


@each_kind
def test_fit_goes_on_from_the_best_checkpoint_of_the_same_trainer(make, fit, make_loader, tmp_path):
    whole = make()
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max")
    trainer = fit([whole, Best(), saver], max_epochs=4, num_sanity_val_steps=0)
    expected = final(trainer, whole)
    expected["weights"] = {name: value.clone() for name, value in expected["weights"].items()}
    assert saver.best_model_path.endswith("epoch=1.ckpt")
    model = trainer.lightning_module
    trainer.fit(model, make_loader(), make_loader(8, seed=1), ckpt_path="best", weights_only=True)
    assert_equal(expected, final(trainer, whole))


SCHEDULES = {
    "one shot": lambda: Magnitude(0.2, schedule=OneShot(0.75)),
    "iterative": lambda: Magnitude(0.2, schedule=Iterative(start=0.1, end=0.8, events=6)),
    "gradual": lambda: Magnitude(0.2),
    "gradual in steps": lambda: Magnitude(0.2, schedule=Gradual(start=1, end=7, every=2, unit="step")),
    "iterative in epochs": lambda: TaylorWeight(0.5, schedule=Iterative(start=0.5, end=1.5, every=0.5, unit="epoch")),
    "channels": lambda: TaylorWeight(0.5),
    "updates": lambda: RigL(0.2),
    "closing updates": lambda: LRPET(0.5),
    "rounds": lambda: LotteryTicket(0.2, schedule=Rounds(epochs=0.5)),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("saved", [0, 1])
def test_longer_fit_goes_the_rest_of_the_way_in_the_time_that_is_left(make, saved, fit, save_each, tmp_path):
    short, long = make(), make()
    fit([short, save_each()])  # 8 steps
    done = [event for event in short.events if event.step <= 4 * (saved + 1)]
    trainer = fit(long, max_epochs=6, ckpt_path=tmp_path / f"epoch={saved}.ckpt")  # 24 steps
    assert list(long.events[: len(done)]) == done
    steps, progress = zip(*((event.step, event.progress) for event in long.events), strict=True)
    assert list(steps) == sorted(set(steps))
    assert steps[-1] <= 24
    assert list(progress) == sorted(progress)
    assert progress[-1] == 1.0
    assert long.events_done == len(long.events)
    assert trainer.global_step == 24
    kept = {"channels": "prune/flops_kept", "weights": "prune/density", "ranks": "prune/flops_kept"}[long.kind]
    assert long.report.rows[-1][kept] <= long.budget.keep + 1e-9


LONGER = {
    # after 4 of 8 steps the fit gets 24
    "one shot": [18],
    # at 0.1, 0.24, 0.38, 0.52, 0.66, 0.8 of 8 steps: 1, 2, 3, 4, which are done, 5, 6; the last two of 24: 16, 19
    "iterative": [1, 2, 3, 4, 16, 19],
    "iterative in epochs": [2, 4, 6],
    "gradual in steps": [3, 5, 7],
    # phases of 2 steps: 3 rounds, after steps 2, 4, 6, of which two are done, at 2/3 of the way; of 24 steps 11 rounds,
    # one every 2 steps: those from number 8 on are further
    "rounds": [2, 4, 16, 18, 20, 22],
}


@pytest.mark.parametrize("name", LONGER)
def test_longer_fit_has_the_events_that_are_left_at_their_places_in_it(name, fit, save_each, tmp_path):
    fit([SCHEDULES[name](), save_each()])
    callback = SCHEDULES[name]()
    fit(callback, max_epochs=6, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [event.step for event in callback.events] == LONGER[name]
    assert callback.events_done == len(callback.events)
    key = {"channels": "prune/flops_kept", "weights": "prune/density"}[callback.kind]
    kept = [row[key] for row in callback.report.rows]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)  # each goes further than the one before


def test_updates_of_a_longer_fit_come_where_it_has_them(fit, save_each, tmp_path):
    # every 2 of 12 steps, before the end; of 24 steps every 4: at the end of epoch 1, step 8, three are still to come
    schedule = Updates(every=1 / 6, unit="fit", end=1.0, least=1)
    short, long = (RigL(0.2, schedule=schedule) for _ in range(2))
    fit([short, save_each()], max_epochs=3)
    assert [event.step for event in short.events] == [0, 2, 4, 6, 8, 10]
    fit(long, max_epochs=6, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [event.step for event in long.events] == [0, 2, 4, 6, 8, 12, 16, 20]


@pytest.mark.parametrize("method", [TaylorWeight, Magnitude, LRPET])
@pytest.mark.parametrize(("first", "second"), [("sgd", "adam"), ("adam", "sgd")])
def test_checkpoint_of_another_optimizer_is_refused_before_a_step(
    method, first, second, fit, save_each, tiny_net, tmp_path
):
    foreign = {"adam": "amsgrad, betas", "sgd": "dampening, momentum"}[first]
    fit([method(0.5), save_each()], model=tiny_net(optimizer=first))
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    model = tiny_net(optimizer=second)
    with pytest.raises(IncompatibleCheckpoint, match=f"another optimizer than .*param group 0 has {foreign}"):
        fit(method(0.5), model=model, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_equal(dict(saved), dict(model.state_dict()))  # loaded, not trained on


@pytest.mark.parametrize("change", [lambda group: group.pop("fused"), lambda group: group.update(newer=True)])
def test_a_setting_more_or_less_is_another_version_of_torch_and_no_other_optimizer(change):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    state = optimizer.state_dict()
    change(state["param_groups"][0])
    assert state["param_groups"][0].keys() != optimizer.param_groups[0].keys()
    check_states([optimizer], [state])
    with pytest.raises(IncompatibleCheckpoint, match="another optimizer than SGD"):
        check_states([torch.optim.SGD(optimizer.param_groups[0]["params"])], [state])


@pytest.mark.parametrize(("first", "second"), [("cut", "mask"), ("mask", "cut")])
def test_cut_is_not_gone_on_with_as_a_mask_nor_a_mask_as_a_cut(first, second, fit, save_each, tmp_path):
    fit([TaylorWeight(0.5, apply=first), save_each()])
    with pytest.raises(IncompatibleCheckpoint, match=f"apply='{first}', this one has apply='{second}'"):
        fit(TaylorWeight(0.5, apply=second), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_shorter_fit_than_was_done_is_refused(fit, save_each, tmp_path):
    fit([Magnitude(0.2), save_each()], max_epochs=3)
    with pytest.raises(Exception, match=r"current_epoch=\d, but you have set Trainer\(max_epochs=1\)"):
        fit(Magnitude(0.2), max_epochs=1, ckpt_path=tmp_path / "epoch=2.ckpt")
