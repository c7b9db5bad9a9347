"""Two hundred events in one fit: nothing grows, and the log stays readable."""

import gc
import logging
import tracemalloc

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import reliability_long
from benchmarks.reliability_long import count_hooks, count_live
from lightning_prune import (
    LRPET,
    Iterative,
    L1Filter,
    Magnitude,
    NetworkSlimming,
    OneShot,
    RandomChannels,
    RigL,
    SparseConnectivityLearning,
    TaylorActivation,
    TaylorWeight,
    Updates,
    trace,
)

EACH = Iterative(start=2, end=201, every=1, unit="step")
EVENTS = 200
STEPS = 202
RUNS = {
    "TaylorWeight": lambda: TaylorWeight(0.1, schedule=EACH),
    "TaylorActivation": lambda: TaylorActivation(0.1, schedule=EACH),
    "RandomChannels": lambda: RandomChannels(0.1, schedule=EACH),
    "NetworkSlimming": lambda: NetworkSlimming(0.3, passes=EVENTS),
    "mask": lambda: L1Filter(0.1, schedule=EACH, apply="mask"),
    "Magnitude": lambda: Magnitude(0.1, schedule=EACH),
    "RigL": lambda: RigL(0.2, schedule=Updates(every=1, start=0.01, end=1.0, least=1)),
    "SparseConnectivityLearning": lambda: SparseConnectivityLearning(0.2, schedule=OneShot(201, unit="step")),
    "LRPET": lambda: LRPET(0.4, schedule=Updates(every=1, start=0.01, end=1.0, least=1)),
}
# bytes that a row of a report takes in memory and in a file: some thirty numbers under names that are there already
ROW = 4000

pytestmark = pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing")


class Census(Callback):
    """Counts after a quarter of the steps and after the last event."""

    def __init__(self, pruner):
        self.pruner, self.seen = pruner, []

    def on_train_batch_end(self, trainer, model, *_):
        if self.pruner.steps == 52:
            gc.collect()
            tracemalloc.start()
        if self.pruner.steps in (52, 201):
            rows = len(self.pruner.report.rows)  # asks for the plan, which is made then
            tensors, objects = count_live()
            state = len(torch.nn.Module.state_dict(model)), len(trainer.optimizers[0].state)
            python = tracemalloc.get_traced_memory()[0]  # of what was made since the first time
            self.seen.append((tensors, objects, count_hooks(model), state, rows, python))


@pytest.fixture(autouse=True)
def untraced():
    yield
    tracemalloc.stop()


def marked(names):
    """One of each kind always, the others where a run may take a minute: each is hundreds of steps."""
    slow = RUNS.keys() - {"TaylorWeight", "RigL", "LRPET"}
    return [pytest.param(RUNS[n], marks=[pytest.mark.slow] if n in slow else [], id=n) for n in names]


def long_fit(fit, tiny_net, make_loader, callbacks, width=8, **settings):
    settings = {"max_steps": STEPS, "max_epochs": -1, **settings}
    return fit(callbacks, model=tiny_net(width=width), loader=make_loader(52, 2), seed=0, **settings)


@pytest.mark.parametrize("run", marked(RUNS))
def test_no_tensor_object_hook_or_memory_is_held_for_events_gone_by(run, fit, tiny_net, make_loader):
    pruner = run()
    census = Census(pruner)
    # channels enough for most events to have one to cut
    width = {"channels": 44, "weights": 8, "ranks": 8}[pruner.kind]
    trainer = long_fit(fit, tiny_net, make_loader, [pruner, census], width)
    (tensors, objects, hooks, state, rows, memory), last = census.seen
    assert pruner.events_done == len(pruner.events)
    # 149 events lie between; a plan may name a few parameters more
    assert last[0] <= tensors + 30, "live tensors"
    assert last[1] <= objects + 140, "objects that the garbage collector knows"
    assert last[2:4] == (hooks, state)
    assert last[5] - memory < 100_000 + ROW * (last[4] - rows), "bytes of Python objects"
    assert trainer.global_step <= STEPS


def test_callback_state_grows_by_its_rows_alone(fit, tiny_net, make_loader, tmp_path):
    class Save(Callback):
        sizes = ()

        def on_train_batch_end(self, trainer, model, *_):
            if pruner.steps in (52, 201):
                torch.save(pruner.state_dict(), tmp_path / "state.pt")
                self.sizes += ((tmp_path / "state.pt").stat().st_size,)

    pruner, save = Magnitude(0.1, schedule=EACH), Save()
    long_fit(fit, tiny_net, make_loader, [pruner, save])
    first, last = save.sizes
    # nine bytes a number, and three for a name that the file holds already: not the forty of the name itself
    assert 0 < (last - first) / 149 <= 16 * len(pruner.report.rows[0])


def test_log_of_200_events_has_some_20_lines_and_pictures_and_every_row(fit, tiny_net, make_loader, tmp_path, caplog):
    pruner = Magnitude(0.1, schedule=EACH)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with caplog.at_level(logging.INFO):
        long_fit(fit, tiny_net, make_loader, pruner, logger=logger)
    lines = [record.getMessage() for record in caplog.records if "Magnitude: event" in record.getMessage()]
    assert [line.split(" of ")[0] for line in lines] == [f"Magnitude: event {n}" for n in (1, *range(10, 201, 10))]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert len(events.Images("prune/curve")) == 21
    assert len(pruner.report.rows) == EVENTS
    assert {scalar.value for scalar in events.Scalars("prune/event")} == set(range(1, EVENTS + 1))


def test_each_of_at_most_20_events_is_printed(fit, caplog):
    pruner = L1Filter(0.5, schedule=Iterative(start=1, end=7, every=1, unit="step"))
    with caplog.at_level(logging.INFO):
        fit(pruner)
    assert sum("L1Filter: event" in record.getMessage() for record in caplog.records) == len(pruner.events) == 7


def test_events_that_change_nothing_are_warned_of_once(fit, tiny_net, make_loader):
    with pytest.warns(UserWarning, match="event at step 2 changed nothing") as caught:
        long_fit(fit, tiny_net, make_loader, L1Filter(1.0, schedule=EACH))
    assert len([w for w in caught if "changed nothing" in str(w.message)]) == 1


def test_warning_of_the_same_comes_once_a_fit_and_again_in_the_next(fit):
    class Warns(L1Filter):
        def after_prune(self, keep):
            self.warn_once("few", f"few rows at step {self.steps}")
            self.warn_once("steps", "few steps")

    pruner = Warns(0.5, schedule=Iterative(start=2, end=6, every=1, unit="step"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="few (rows at step 2|steps)") as caught:
            fit(pruner)
        assert sorted(str(w.message) for w in caught if "few" in str(w.message)) == ["few rows at step 2", "few steps"]


def test_validation_of_full_rank_is_said_once(fit, tiny_net, make_loader, caplog):
    pruner = LRPET(0.5, schedule=OneShot(2, unit="step"))
    with caplog.at_level(logging.INFO):
        fit(pruner, max_epochs=4)
    assert sum("what is validated" in record.getMessage() for record in caplog.records) == 1


def test_graph_of_many_cuts_holds_nothing_of_the_cuts_before(tiny_net):
    # the components that are left, asked for once after 9 cuts or after each of them, are the same
    model = tiny_net(width=10)
    lazy = asked = trace(model, model.example_input_array)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(9):
        keep = {}
        for group in lazy.groups:
            keep[group.name] = torch.ones(group.size, dtype=torch.bool)
            keep[group.name][torch.randint(group.size, (1,), generator=generator)] = False
        assert asked.flow._alive.any()
        lazy, asked = lazy.after(lazy.plan(keep)), asked.after(asked.plan(keep))
        sizes.add(len(lazy.flow.cuts))
    assert sizes == {3}  # groups, not cuts
    assert (lazy.flow._alive == asked.flow._alive).all()
    left = {group.name: group.size for group in lazy.groups}
    assert int(lazy.flow._alive.sum()) == int(lazy.flow.before.sum()) - 27
    assert left == {"stem": 1, "conv1": 11, "hidden": 11}


def test_the_benchmark_counts_a_run(monkeypatch):
    monkeypatch.setattr(reliability_long, "WIDTH", 4)
    row = reliability_long.run("RandomChannels", 8)
    assert row["events"] == 8
    assert row["hooks in fit, first"] == row["hooks in fit, last"] == 1
    assert row["hooks before"] == row["hooks after"] == 0
    assert row["lines printed"] == 8
