import copy
import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim import lr_scheduler

from lightning_prune.rewind import positions, put_back, run_schedulers, take_snapshot

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "step": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)]),
}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


class Steps(Callback):
    """Calls functions after some optimizer steps: step -> function of trainer and model."""

    def __init__(self, **functions):
        self.functions = {int(name[2:]): function for name, function in functions.items()}

    def on_train_start(self, trainer, model):
        self.functions.get(0, lambda *_: None)(trainer, model)

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.functions.get(trainer.global_step, lambda *_: None)(trainer, model)


class Keeper:
    """Takes a snapshot, puts it back, and notes the whole state each step after either."""

    def __init__(self, random_state=False):
        self.random_state = random_state

    def take(self, trainer, model):
        self.snapshot = take_snapshot(trainer, model)
        self.untouched = copy.deepcopy(self.snapshot)

    def put_back(self, trainer, model):
        put_back(trainer, model, self.snapshot, self.random_state)


class Trace(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.seen.append(state_of(trainer, model))


def state_of(trainer, model):
    return copy.deepcopy(
        {
            "model": dict(model.state_dict()),
            "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
            "schedulers": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
        }
    )


def same(first, second):
    """Equal, tensor by tensor and bit by bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if callable(first):
        return callable(second)
    return first == second


def net(tiny_net, optimizer=OPTIMIZERS["momentum"], scheduler=None, interval="step"):
    class Net(tiny_net):
        def configure_optimizers(self):
            made = optimizer(self.parameters())
            if scheduler is None:
                return made
            return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler(made), "interval": interval}}

    return Net()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 1])
def test_training_repeats_itself_bit_for_bit_from_a_snapshot(fit, tiny_net, optimizer, at):
    # the batches of each epoch are the same: after step n + 4 those follow that came after step n
    keeper, trace = Keeper(), Trace()
    functions = {f"at{at}": keeper.take, f"at{at + 4}": keeper.put_back, f"at{at + 8}": keeper.put_back}
    fit([Steps(**functions), trace], model=net(tiny_net, optimizer, SCHEDULERS["cosine"]), max_epochs=3)
    first, again, last = (trace.seen[at + 4 * phase : at + 4 * phase + 3] for phase in range(3))
    assert len(first) == len(again) == len(last) == 3
    assert same(first, again)
    assert same(again, last)
    assert not same(first[0], first[1])


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("at", [0, 2])
def test_every_scheduler_goes_back_and_on_as_before(fit, tiny_net, scheduler, at):
    keeper, trace = Keeper(), Trace()
    functions = {f"at{at}": keeper.take, "at8": keeper.put_back}
    fit([Steps(**functions), trace], model=net(tiny_net, scheduler=scheduler), max_epochs=3)
    rates = [seen["rates"] for seen in trace.seen]
    assert rates[8:] == rates[at : at + 4]
    assert rates[at : at + 4] != rates[4:8]


def test_what_is_set_back_before_the_first_step_has_no_optimizer_state(fit, tiny_net):
    keeper = Keeper()
    found = []
    steps = Steps(at0=keeper.take, at3=lambda *a: (keeper.put_back(*a), found.append(state_of(*a))))
    fit(steps, model=net(tiny_net, OPTIMIZERS["adamw"]))
    assert found[0]["optimizer"][0]["state"] == {}
    assert same(found[0]["model"], keeper.snapshot["model"])


def test_a_snapshot_stays_as_it_is_while_training_goes_on_from_it(fit, tiny_net):
    keeper = Keeper()
    steps = Steps(at2=keeper.take, at4=keeper.put_back, at6=keeper.put_back)
    fit(steps, model=net(tiny_net, OPTIMIZERS["adamw"], SCHEDULERS["one cycle"]), max_epochs=3)
    assert same(keeper.snapshot, keeper.untouched)
    assert len(keeper.snapshot["optimizers"][0][1]["state"]) > 5


def test_a_scheduler_that_hands_out_its_own_list_cannot_change_a_snapshot(fit, tiny_net):
    class Remembers(lr_scheduler.LambdaLR):
        """Its state is a list, which it goes on writing to."""

        def __init__(self, optimizer):
            self.past = []
            super().__init__(optimizer, lambda step: 0.9**step)

        def step(self, epoch=None):
            self.past.append(self.last_epoch + 1)
            super().step()

    keeper, trace = Keeper(), Trace()
    fit([Steps(at2=keeper.take, at4=keeper.put_back), trace], model=net(tiny_net, scheduler=Remembers))
    assert keeper.snapshot["schedulers"][0][1]["past"] == [0, 1, 2]  # made, and two steps
    assert trace.seen[4]["schedulers"][0]["past"] == [0, 1, 2, 3]


def test_parameters_keep_their_identity_and_what_holds_them(fit, tiny_net):
    keeper, seen = Keeper(), []
    model = net(tiny_net)

    def check(trainer, module):
        keeper.put_back(trainer, module)
        seen.append([id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]])

    before = [id(p) for p in model.parameters()]
    fit(Steps(at2=keeper.take, at4=check), model=model)
    assert seen == [before]
    assert [id(p) for p in model.parameters()] == before


def test_a_part_of_a_snapshot_sets_back_that_part(fit, tiny_net):
    keeper, found = Keeper(), []

    def part(trainer, model):
        before = state_of(trainer, model)
        put_back(trainer, model, {"schedulers": keeper.snapshot["schedulers"]})
        after = state_of(trainer, model)
        found.extend([same(before["model"], after["model"]), same(before["optimizer"], after["optimizer"])])
        found.append([s["last_epoch"] for s in after["schedulers"]])

    fit(Steps(at1=keeper.take, at3=part), model=net(tiny_net, scheduler=SCHEDULERS["cosine"]))
    assert found == [True, True, [1]]


def test_a_snapshot_passes_through_a_file_that_may_hold_only_data(fit, tiny_net, tmp_path):
    keeper, trace = Keeper(), Trace()

    def through_a_file(trainer, model):
        torch.save(keeper.snapshot, tmp_path / "snapshot.pt")
        keeper.snapshot = torch.load(tmp_path / "snapshot.pt", weights_only=True)
        keeper.put_back(trainer, model)

    model = net(tiny_net, OPTIMIZERS["adamw"], SCHEDULERS["milestones"])
    fit([Steps(at0=keeper.take, at4=through_a_file), trace], model=model)
    assert same(trace.seen[:3], trace.seen[4:7])


def draws():
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()


@pytest.mark.parametrize("random_state", [True, False])
def test_all_generators_draw_the_same_numbers_again_if_asked(fit, tiny_net, random_state):
    keeper, drawn = Keeper(random_state), []

    def take_and_draw(trainer, model):
        random.gauss(0, 1)  # leaves a second number behind, which is part of the state
        np.random.randn()
        keeper.take(trainer, model)
        drawn.append(draws())

    def put_back_and_draw(trainer, model):
        keeper.put_back(trainer, model)
        drawn.append(draws())

    fit(Steps(at1=take_and_draw, at3=put_back_and_draw))
    assert (drawn[0] == drawn[1]) is random_state


def test_a_snapshot_draws_no_number(fit):
    states = []

    def watch(trainer, model):
        states.append(torch.get_rng_state())
        take_snapshot(trainer, model)
        states.append(torch.get_rng_state())

    fit(Steps(at1=watch))
    assert torch.equal(*states)


def refused(fit, tiny_net, change, match, **settings):
    """What went wrong must not have changed anything."""
    keeper, found = Keeper(), []

    def go_back(trainer, model):
        change(trainer, model)
        before = state_of(trainer, model)
        with pytest.raises(RuntimeError, match=match):
            keeper.put_back(trainer, model)
        found.append(same(before, state_of(trainer, model)))

    fit(Steps(at1=keeper.take, at3=go_back), model=net(tiny_net, **settings), limit_train_batches=3, max_epochs=1,
        limit_val_batches=0)  # fmt: skip
    assert found == [True]


def test_other_shapes_names_optimizers_schedulers_and_groups_are_refused(fit, tiny_net):
    def cut(trainer, model):
        model.hidden.bias = nn.Parameter(torch.zeros(5))

    def add(trainer, model):
        model.register_buffer("late", torch.zeros(1))

    def other_optimizer(trainer, model):
        trainer.strategy._optimizers = [torch.optim.Adam(model.parameters())]

    def other_scheduler(trainer, model):
        config = trainer.lr_scheduler_configs[0]
        config.scheduler = lr_scheduler.ConstantLR(trainer.optimizers[0])

    def no_scheduler(trainer, model):
        trainer.strategy.lr_scheduler_configs = []

    def more_groups(trainer, model):
        trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    refused(fit, tiny_net, cut, r"'hidden.bias' has shape \(5,\), when the snapshot was taken it had \(12,\)")
    refused(fit, tiny_net, add, r"'late' has shape \(1,\), .* it had None")
    refused(fit, tiny_net, other_optimizer, r"optimizers are \['Adam'\], .* they were \['SGD'\]")
    cosine = SCHEDULERS["cosine"]
    refused(fit, tiny_net, other_scheduler, r"are \['ConstantLR'\], .* \['CosineAnnealingLR'\]", scheduler=cosine)
    refused(fit, tiny_net, no_scheduler, r"schedulers are \[\], .* \['CosineAnnealingLR'\]", scheduler=cosine)
    refused(fit, tiny_net, more_groups, r"SGD has param groups of \[13, 1\] parameters, .* they had \[13\]")


def test_averages_of_the_model_go_back_with_what_they_count(fit, tiny_net):
    keeper, found = Keeper(), []
    average = WeightAveraging()

    def go_back(trainer, model):
        keeper.put_back(trainer, model)
        found.append(copy.deepcopy(average._average_model.state_dict()))

    fit([Steps(at2=keeper.take, at6=go_back), average])
    assert int(found[0]["n_averaged"]) == int(keeper.snapshot["averages"][0]["n_averaged"]) == 1
    assert same(dict(found[0]), keeper.snapshot["averages"][0])


def test_averaging_that_takes_the_scheduler_over_is_refused(fit, tiny_net):
    keeper = Keeper()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    with pytest.raises(RuntimeError, match=r"cannot rewind: the schedulers are \['SWALR'\]"):
        fit([Steps(at1=keeper.take, at6=keeper.put_back), swa], max_epochs=3,
            model=net(tiny_net, scheduler=SCHEDULERS["cosine"], interval="epoch"))  # fmt: skip


def course(fit, tiny_net, scheduler, interval, total=12, epochs=3, **changes):
    """Counts of a scheduler, as it is run through the whole fit in each phase of four steps."""
    counts = []

    class Paced(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            step = trainer.global_step
            counts.append(positions(trainer)[0][1])
            run_schedulers(trainer, start, (step % 4 or 4) / 4, total)
            counts[-1] = positions(trainer)[0][1]
            if step % 4 == 0:
                put_back(trainer, model, keeper.snapshot)

        def on_train_start(self, trainer, model):
            keeper.take(trainer, model)
            start.extend(positions(trainer))
            for key, value in changes.items():
                setattr(trainer.lr_scheduler_configs[0], key, value)

    keeper, start = Keeper(), []
    fit(Paced(), model=net(tiny_net, scheduler=scheduler, interval=interval), max_epochs=epochs)
    return counts


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_run_through_the_whole_fit_in_a_phase(fit, tiny_net, scheduler):
    assert course(fit, tiny_net, scheduler, "step") == [3, 6, 9, 12] * 3


def test_schedulers_of_epochs_do_so_as_well(fit, tiny_net):
    # 3 epochs: 3/4, 6/4, 9/4 and 3 of them, rounded down
    assert course(fit, tiny_net, SCHEDULERS["cosine"], "epoch") == [0, 1, 2, 3] * 3


def test_a_frequency_counts(fit, tiny_net):
    # Lightning steps at every third batch: 4 times in 12 steps
    assert course(fit, tiny_net, SCHEDULERS["cosine"], "step", frequency=3) == [1, 2, 3, 4] * 3


def test_what_lightning_does_not_step_by_count_is_left_alone(fit, tiny_net):
    found = []

    class Silent:
        """A scheduler that does not tell its count."""

        def __init__(self, optimizer):
            self.optimizer, self.steps = optimizer, 0

        def step(self, epoch=None):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    class Net(tiny_net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [
                {"scheduler": plateau, "monitor": "train_loss"},
                {"scheduler": Silent(optimizer), "interval": "step"},
            ]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(*() if metric is None else (metric,))

    def look(trainer, model):
        start = positions(trainer)
        run_schedulers(trainer, start, 1.0, 8)
        found.append((start, trainer.lr_scheduler_configs[1].scheduler.steps))

    fit(Steps(at1=look), model=Net())
    assert found == [([["ReduceLROnPlateau", -1], ["Silent", -1]], 1)]


def test_schedulers_that_came_later_are_left_alone(fit, tiny_net):
    found = []

    def look(trainer, model):
        start = positions(trainer)
        trainer.lr_scheduler_configs[0].scheduler = lr_scheduler.ExponentialLR(trainer.optimizers[0], 0.9)
        run_schedulers(trainer, start, 1.0, 8)
        found.append(positions(trainer))

    fit(Steps(at1=look), model=net(tiny_net, scheduler=SCHEDULERS["cosine"]))
    assert found == [[["ExponentialLR", 0]]]


def test_epochs_of_unknown_length_leave_their_schedulers_alone(fit, tiny_net):
    found = []

    def look(trainer, model):
        trainer.fit_loop.max_batches = math.inf
        start = positions(trainer)
        run_schedulers(trainer, start, 1.0, 8)
        found.append(positions(trainer) == start)
        trainer.fit_loop.max_batches = 4

    fit(Steps(at1=look), model=net(tiny_net, scheduler=SCHEDULERS["cosine"], interval="epoch"))
    assert found == [True]


def test_a_modules_own_way_to_step_its_scheduler_is_used(fit, tiny_net):
    class Net(tiny_net):
        called = 0

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def lr_scheduler_step(self, scheduler, metric):
            type(self).called += 1
            scheduler.step()

    model = Net()
    fit(Steps(at1=lambda trainer, _: run_schedulers(trainer, positions(trainer), 1.0, 5)), model=model,
        limit_train_batches=1, max_epochs=1)  # fmt: skip
    assert model.called == 5  # Lightning's one, and four more to be at 5
    assert isinstance(model, pl.LightningModule)
