import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune import Budget, L1Filter, LotteryTicket, Magnitude, OneShot
from lightning_prune.methods.lottery_ticket import cycled, rounds_for, survivors, ticket_score
from lightning_prune.schedule import Rounds

AT_3 = OneShot(3, unit="step")
TWO = Rounds(2, epochs=1)  # three phases of an epoch, in three epochs


class Watch(Callback):
    """What is there before each step: weights, buffers, optimizer state, learning rate."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        self.seen.append(
            {
                "model": copy.deepcopy(model.state_dict()),
                "optimizer": copy.deepcopy(optimizer.state_dict()["state"]),
                "schedulers": [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
                "lr": optimizer.param_groups[0]["lr"],
            }
        )

    @property
    def rates(self):
        return [each["lr"] for each in self.seen]


def scheduled(base, scheduler, **config):
    """A network of a class, with a learning-rate scheduler."""

    class Scheduled(base):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), **config}}

    return Scheduled


class Two(pl.LightningModule):
    """Two weights, 1 and 0.5, and a loss that is a square of each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, 0.5]])
        self.example_input_array = torch.zeros(1, 2)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def one_cycle(optimizer):
    # a step size of its own for each of the 12 steps, and momentum or betas that go with it
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=12)


def linear_fall(optimizer):
    return LambdaLR(optimizer, lambda step: 1 - step / 12)


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def masked(state, masks):
    return {name: value * masks[name] if name in masks else value for name, value in state.items()}


def test_score_is_the_absolute_value_of_what_is_alive():
    weight, alive = torch.tensor([[0.5, -2.0, 9.0]]), torch.tensor([[True, True, False]])
    assert ticket_score(weight, alive).tolist() == [[0.5, 2.0, -torch.inf]]
    assert not ticket_score(nn.Parameter(weight), alive).requires_grad


def test_the_papers_rule_rounds_up_what_goes():
    # 10 active weights at 20 %: 2, 2, 2, 1, 1 go; 7 % of 100 is 7, though 0.07 * 100 is a bit more
    assert [survivors(10, rounds) for rounds in range(6)] == [10, 8, 6, 4, 3, 2]
    assert survivors(100, 1, drop=0.07) == 93
    assert survivors(7, 3, drop=0.0) == 7


@pytest.mark.parametrize(("rounds", "percent"), [(1, 80.04), (2, 64.06), (3, 51.28), (7, 21.07), (15, 3.58)])
def test_the_papers_rule_leaves_its_fractions_of_lenet(rounds, percent):
    # 235,200 and 30,000 weights at 20 % a round, the output layer's 1,000 at 10 %
    left = survivors(235_200, rounds) + survivors(30_000, rounds) + survivors(1_000, rounds, drop=0.1)
    assert 100 * left / 266_200 == pytest.approx(percent, abs=0.01)


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="a drop in"):
        survivors(10, 1, drop=1.0)
    with pytest.raises(ValueError, match="got -1 weights"):
        survivors(-1, 1)


def test_rounds_are_as_many_as_a_fifth_each_takes():
    # 0.8**10 = 0.107, 0.8**11 = 0.086; 0.512 is 0.8**3
    assert [rounds_for(keep) for keep in (0.1, 0.512, 0.8, 0.81, 0.9, 1.0)] == [11, 3, 1, 1, 1, 1]
    assert LotteryTicket(0.1).schedule == Rounds(11)
    assert LotteryTicket(Budget(0.05)).schedule == Rounds(14)
    assert LotteryTicket(0.1, schedule=AT_3).schedule == AT_3


def test_cycle_moves_every_value_and_loses_none():
    values = torch.arange(12.0).reshape(3, 4)
    for seed in range(20):
        moved = cycled(values, torch.Generator().manual_seed(seed))
        assert moved.shape == values.shape
        assert not (moved == values).any()
        assert torch.equal(moved.flatten().sort().values, values.flatten())
    assert torch.equal(
        cycled(values, torch.Generator().manual_seed(3)), cycled(values, torch.Generator().manual_seed(3))
    )


def test_every_round_keeps_the_same_fraction_of_what_was_left(fit, tiny_net):
    # 0.8, 0.64, 0.512, 0.4096 of all weights, by exact count; a linear way would keep 0.85 first
    callback = LotteryTicket(0.4096, schedule=Rounds(4, epochs=1))
    fit(callback, max_epochs=5)
    total = sum(p.numel() for p in tiny_net().parameters() if p.ndim > 1)
    kept = [round(row["prune/density"] * total) for row in callback.report.rows]
    assert kept == [int(0.8**i * total + 1e-9) for i in (1, 2, 3, 4)]


def test_counts_on_the_way_lose_nothing_to_floating_point():
    # 0.9, 0.81, 0.729 of 100 weights, though 0.729 ** (2 / 3) is 0.80999...
    callback = LotteryTicket(0.729)
    assert [callback._budget_at(i / 3).limit(1000) for i in (1, 2, 3)] == [900, 810, 729]


def test_phases_are_whole_epochs_and_nothing_happens_in_the_last(fit):
    callback, watch = LotteryTicket(0.4, schedule=Rounds(5, epochs=1)), Watch()
    fit([callback, watch], max_epochs=7)
    assert [event.step for event in callback.events] == [4, 8, 12, 16, 20]
    assert callback.phase_lengths == (4, 4, 4, 4, 4, 8)
    for name, mask in callback.plan.masks.items():
        for seen in watch.seen[20:]:
            assert not seen["model"][name][~mask].any()


def test_ranking_is_by_the_trained_weights_not_by_the_early_ones(fit):
    # loss (w - (0.2, 3))^2 pulls w from (1, 0.5) so that the order turns over; the survivor goes back to 0.5
    watch, model = Watch(), Two()
    callback = LotteryTicket(0.5, schedule=OneShot(10, unit="step"), rewind_to=0)
    loader = DataLoader(TensorDataset(torch.eye(2), torch.tensor([[0.2], [3.0]])), 2)
    fit([callback, watch], model=model, loader=loader, max_epochs=12)
    assert watch.seen[9]["model"]["layer.weight"].abs().argmax() == 1
    assert callback.plan.masks["layer.weight"].tolist() == [[False, True]]
    assert watch.seen[10]["model"]["layer.weight"].tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("k", [0, 2])
def test_survivors_go_back_bit_for_bit_with_norms_optimizer_and_scheduler(fit, tiny_net, k, optimizer):
    watch = Watch()
    callback = LotteryTicket(0.5, rewind_to=k, rewind_unit="step", schedule=TWO)
    fit([callback, watch], model=scheduled(tiny_net, one_cycle, interval="step")(optimizer=optimizer), max_epochs=3)
    assert [event.step for event in callback.events] == [4, 8]
    assert (callback.rewind_step, callback.rewinds) == (k, 2)
    early = watch.seen[k]
    for after in (watch.seen[4], watch.seen[8]):
        masks = {name: after["model"][name] != 0 for name in callback.plan.masks}
        assert all(0 < int(mask.sum()) < mask.numel() for name, mask in masks.items() if name != "stem.weight")
        assert_same(after["model"], masked(early["model"], masks))
        assert after["lr"] == early["lr"]
        assert after["schedulers"] == early["schedulers"]
        assert after["optimizer"].keys() == early["optimizer"].keys()
        names = [name for name, _ in tiny_net().named_parameters()]
        for index, state in after["optimizer"].items():
            mask = masks.get(names[index], torch.tensor(True))
            for key, value in state.items():
                expected = early["optimizer"][index][key]
                assert torch.equal(value, expected * mask if value.shape == mask.shape else expected)
    assert bool(watch.seen[4]["optimizer"]) == (k > 0)
    assert not torch.equal(watch.seen[3]["model"]["norm0.running_mean"], early["model"]["norm0.running_mean"])


def test_step_zero_is_before_any_step(fit, tiny_net):
    model, watch = tiny_net(), Watch()
    initial = copy.deepcopy(model.state_dict())
    callback = LotteryTicket(0.3, rewind_to=0, schedule=AT_3)
    fit([callback, watch], model=model)
    assert_same(watch.seen[3]["model"], masked(initial, callback.plan.masks))
    assert watch.seen[3]["optimizer"] == {}


def test_a_fit_is_what_a_loop_of_trainings_by_hand_gives(fit, tiny_net, make_loader):
    callback = LotteryTicket(0.25, schedule=TWO, rewind_to=0)
    trainer = fit(callback, max_epochs=3)
    torch.manual_seed(0)  # as `fit` does
    model = tiny_net()
    start = copy.deepcopy(model.state_dict())
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in weights.items()}
    for keep in (0.5, 0.25, None):
        model.load_state_dict(masked(start, masks))
        optimizer = model.configure_optimizers()
        model.train()
        for images, labels in make_loader():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            for name, p in weights.items():
                p.grad *= masks[name]
            optimizer.step()
            with torch.no_grad():
                for name, p in weights.items():
                    p *= masks[name]
        if keep is not None:
            every = torch.cat([p.detach().abs().flatten() for p in weights.values()])
            smallest = every.sort(descending=True).values[int(keep * len(every)) - 1]
            masks = {name: p.detach().abs() >= smallest for name, p in weights.items()}
    assert_same(callback.plan.masks, masks)
    assert_same(trainer.lightning_module.state_dict(), model.state_dict())


def test_rounds_in_which_nothing_goes_repeat_the_first_one(fit, tiny_net):
    class KeepsAll(LotteryTicket):
        def select(self, scores, allowance, price):
            return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}

    watch = Watch()
    model = scheduled(tiny_net, one_cycle, interval="step")()
    with pytest.warns(UserWarning, match="changed nothing"):
        fit([KeepsAll(0.5, schedule=TWO, rewind_to=0), watch], model=model, max_epochs=3)
    for phase in (watch.seen[4:8], watch.seen[8:12]):
        for first, again in zip(watch.seen[:4], phase, strict=True):
            assert_same(first["model"], again["model"])
            assert first["lr"] == again["lr"]


def test_a_budget_of_all_neither_goes_back_nor_touches_schedulers(fit, tiny_net):
    runs = []
    for callbacks in ([], [LotteryTicket(1.0)]):
        watch = Watch()
        torch.manual_seed(0)
        fit_quietly(fit, [*callbacks, watch], scheduled(tiny_net, linear_fall, interval="step")(), bool(callbacks))
        runs.append(watch)
    assert runs[0].rates == runs[1].rates
    assert_same(runs[0].seen[-1]["model"], runs[1].seen[-1]["model"])


def fit_quietly(fit, callbacks, model, warns):
    if not warns:
        return fit(callbacks, model=model, max_epochs=3)
    with pytest.warns(UserWarning, match="changed nothing"):
        return fit(callbacks, model=model, max_epochs=3)


def test_without_schedulers_nothing_changes_before_the_first_event(fit, make_loader):
    runs = []
    for callbacks in ([], [LotteryTicket(0.2, schedule=OneShot(6, unit="step"))]):
        watch = Watch()
        fit([*callbacks, watch], loader=make_loader(shuffle=True))
        runs.append(watch.seen[:6])
    for first, second in zip(*runs, strict=True):
        assert_same(first["model"], second["model"])


def test_step_schedulers_run_their_whole_course_in_each_phase(fit, tiny_net):
    # phases of 4 of 12 steps: step j of a phase has the rate of step 3 j of the fit
    watch = Watch()
    fit([LotteryTicket(0.5, schedule=TWO, rewind_to=0), watch], max_epochs=3,
        model=scheduled(tiny_net, linear_fall, interval="step")())  # fmt: skip
    assert watch.rates == pytest.approx([0.05 * (1 - j / 4) for j in range(4)] * 3)


def test_later_phases_run_what_is_left_of_the_course(fit, tiny_net):
    # step 2 of the first phase is 6 of 12; from there 4 steps lead to the end: 6, 7.5, 9, 10.5, rounded down
    watch = Watch()
    callback = LotteryTicket(0.5, schedule=TWO, rewind_to=2, rewind_unit="step")
    fit([callback, watch], model=scheduled(tiny_net, linear_fall, interval="step")(), max_epochs=3)
    counts = [0, 3, 6, 9, 6, 7, 9, 10, 6, 7, 9, 10]
    assert watch.rates == pytest.approx([0.05 * (1 - c / 12) for c in counts])


def test_epoch_schedulers_run_their_whole_course_in_each_phase(fit, tiny_net):
    # 6 epochs of 4 steps, phases of 2: epoch e of the fit begins 4 e / 3 steps into a phase, from step 2, 3, 4, 6, 7 on
    watch = Watch()
    model = scheduled(tiny_net, lambda optimizer: StepLR(optimizer, 1, gamma=0.5), interval="epoch")()
    callback = LotteryTicket(0.5, schedule=TWO, rewind_to=0)
    fit([callback, watch], model=model, max_epochs=6)
    assert [event.step for event in callback.events] == [8, 16]
    assert watch.rates == pytest.approx([0.05 * 0.5**e for e in (0, 0, 1, 2, 3, 3, 4, 5)] * 3)


def test_milestones_are_passed_in_each_phase_also_by_a_chain_and_every_second_step(fit, tiny_net):
    def chain(optimizer):
        return ChainedScheduler([MultiStepLR(optimizer, [3, 5], gamma=0.1), StepLR(optimizer, 100)])

    # 6 counts in 12 steps: those of phase step 0 to 3 are 0, 1.5, 3, 4.5, and Lightning's own come no later
    watch = Watch()
    fit([LotteryTicket(0.5, schedule=TWO, rewind_to=0), watch], max_epochs=3,
        model=scheduled(tiny_net, chain, interval="step", frequency=2)())  # fmt: skip
    assert watch.rates == pytest.approx([0.05, 0.05, 0.005, 0.005] * 3)


def test_schedulers_left_as_they_are_count_single_steps_of_a_phase(fit, tiny_net):
    watch = Watch()
    callback = LotteryTicket(0.5, schedule=TWO, rewind_to=1, rewind_unit="step", schedulers="as_is")
    fit([callback, watch], model=scheduled(tiny_net, linear_fall, interval="step")(), max_epochs=3)
    counts = [0, 1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4]
    assert watch.rates == pytest.approx([0.05 * (1 - c / 12) for c in counts])


def test_a_scheduler_that_waits_for_a_metric_forgets_what_it_saw(fit, tiny_net):
    class Plateau(tiny_net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, threshold_mode="abs", factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    watch = Watch()
    callback = LotteryTicket(0.5, schedule=OneShot(12, unit="step"), rewind_to=0)
    fit([callback, watch], model=Plateau(), max_epochs=6)
    # nothing is 10 better than the first loss it sees: the rate halves at each later one. Once back it is whole again;
    # the first loss then is the rewound network's own, as validation follows the event
    assert watch.rates[:12:4] == [0.05, 0.05, 0.025]
    assert watch.rates[12::4] == [0.05, 0.025, 0.0125]
    assert watch.seen[12]["schedulers"][0]["num_bad_epochs"] == 0
    assert watch.seen[12]["schedulers"][0]["last_epoch"] == 1


def test_manual_optimization_keeps_its_own_count_of_steps(fit, tiny_net):
    class Manual(scheduled(tiny_net, linear_fall, interval="step")):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.lr_schedulers().step()

    watch = Watch()
    fit([LotteryTicket(0.5, schedule=TWO, rewind_to=0), watch], model=Manual(), max_epochs=3)
    assert watch.rates == pytest.approx([0.05 * (1 - j / 12) for j in range(4)] * 3)


def test_learning_rate_rewinding_keeps_the_trained_weights_with_a_fresh_optimizer(fit, tiny_net):
    class Event(LotteryTicket):
        def select(self, *args):
            self.trained = {name: value.clone() for name, value in self.model.state_dict().items()}
            return super().select(*args)

    watch = Watch()
    callback = Event(0.5, schedule=AT_3, variant="learning_rate", rewind_to=2, rewind_unit="step")
    fit([callback, watch], model=scheduled(tiny_net, linear_fall, interval="step")(), max_epochs=3)
    assert_same(watch.seen[3]["model"], masked(callback.trained, callback.plan.masks))
    assert watch.seen[3]["optimizer"] == {}
    assert watch.rates[3] == watch.rates[2] > 0
    assert callback.rewinds == 1


def test_finetuning_goes_on_as_global_magnitude_pruning_would(fit, tiny_net):
    runs = []
    for callback in (
        LotteryTicket(0.3, schedule=AT_3, variant="finetune"),
        Magnitude(0.3, schedule=AT_3, scope="global"),
    ):
        watch = Watch()
        torch.manual_seed(0)
        fit([callback, watch], model=scheduled(tiny_net, linear_fall, interval="step")(), max_epochs=3)
        runs.append((callback, watch))
    assert runs[0][0].rewinds == 0
    assert runs[0][1].rates == runs[1][1].rates == pytest.approx([0.05 * (1 - j / 12) for j in range(12)])
    assert_same(runs[0][1].seen[-1]["model"], runs[1][1].seen[-1]["model"])


def ticket_and(control, fit, **settings):
    """(callback, what Watch saw) of the ticket and of a control."""
    runs = []
    for each in (None, control):
        callback, watch = LotteryTicket(0.3, schedule=TWO, control=each, **settings), Watch()
        fit([callback, watch], max_epochs=3)
        assert_same(watch.seen[7]["model"], runs[0][1][7]["model"] if runs else watch.seen[7]["model"])
        runs.append((callback, watch.seen))
    return runs


@pytest.mark.parametrize("k", [0, 2])
def test_random_reinit_has_the_tickets_mask_and_no_value_of_it(fit, k):
    (ticket, seen), (control, others) = ticket_and("reinit", fit, rewind_to=k, rewind_unit="step")
    assert_same(ticket.plan.masks, control.plan.masks)
    start, last = seen[0]["model"], others[8]["model"]
    for name, mask in control.plan.masks.items():
        assert not (last[name] == start[name])[mask].any()
        assert not last[name][~mask].any()
        assert torch.isin(last[name][mask], start[name]).all()  # a draw of the same distribution
    assert_same({n: v for n, v in last.items() if n not in control.plan.masks},
                {n: v for n, v in start.items() if n not in control.plan.masks})  # fmt: skip
    assert others[8]["optimizer"] == {}


def test_random_ticket_has_the_tickets_counts_and_early_values_but_not_its_mask(fit):
    (ticket, seen), (control, others) = ticket_and("random_ticket", fit, rewind_to=1, rewind_unit="step")
    early, last = seen[1]["model"], others[8]["model"]
    assert_same(last, masked(early, control.plan.masks))
    for name, mask in control.plan.masks.items():
        assert int(mask.sum()) == int(ticket.plan.masks[name].sum())
    different = [n for n, mask in control.plan.masks.items() if not torch.equal(mask, ticket.plan.masks[n])]
    assert {"conv1.weight", "conv2.weight", "hidden.weight"} <= set(different)


def test_tied_weights_are_drawn_once(fit, tiny_net):
    class Tied(tiny_net):
        def __init__(self):
            super().__init__()
            self.again = self.hidden

        def forward(self, x):
            return super().forward(x) + 0 * self.again(torch.ones(1, 6, device=x.device)).sum()

    watch, model = Watch(), Tied()
    callback = LotteryTicket(0.9, schedule=AT_3, control="reinit", rewind_to=0)
    fit([callback, watch], model=model)
    start, last = watch.seen[0]["model"]["hidden.weight"], watch.seen[3]["model"]["hidden.weight"]
    assert not (last == start)[callback.plan.masks["hidden.weight"]].any()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [1, 3, 4, 6, 8, 10])
@pytest.mark.parametrize("control", [None, "reinit"])
def test_a_killed_run_goes_on_to_the_same_weights(fit, tiny_net, save_each, tmp_path, step, control):
    def make():
        return LotteryTicket(0.3, schedule=TWO, rewind_to=2, rewind_unit="step", control=control)

    net = scheduled(tiny_net, one_cycle, interval="step")
    whole, resumed = make(), make()
    trainer = fit(
        [whole, save_each(steps=True)], model=net(optimizer="adam"), max_epochs=3, loader=one_batch_again(step)
    )
    again = fit(resumed, model=net(optimizer="adam"), max_epochs=3, seed=7, loader=one_batch_again(step),
                ckpt_path=tmp_path / f"step={step}.ckpt")  # fmt: skip
    assert_same(trainer.lightning_module.state_dict(), again.lightning_module.state_dict())
    assert (resumed.plan, resumed.rewinds, resumed.phase_lengths) == (whole.plan, 2, (4, 4, 4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == again.optimizers[0].param_groups[0]["lr"]


def one_batch_again(step):
    """The same batch each time, so that where in an epoch a run was killed does not matter."""
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3
    return DataLoader(TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4)), 8)


def test_a_checkpoint_of_the_last_phase_does_without_the_early_state(fit, save_each, tmp_path):
    callback = LotteryTicket(0.3, schedule=TWO, rewind_to=0)
    fit([callback, save_each()], max_epochs=3)
    sizes = [(tmp_path / f"epoch={epoch}.ckpt").stat().st_size for epoch in range(3)]
    assert sizes[0] > 1.2 * sizes[2]
    assert callback.own_state()["snapshots"] == {}


def test_rows_say_that_and_where_to_it_went_back(fit):
    callback = LotteryTicket(0.3, schedule=TWO, rewind_to=0.5)
    fit(callback, max_epochs=3)
    assert [(row["step"], row["prune/rewinds"], row["prune/rewound_to"]) for row in callback.report.rows] == [
        (4.0, 1.0, 2.0),
        (8.0, 2.0, 2.0),
    ]


@pytest.mark.parametrize(("rewind_to", "unit", "step"), [(0.05, "phase", 1), (0.0, "phase", 0), (0.5, "phase", 4),
                                                         (0.99, "phase", 7), (3, "step", 3), (1, "epoch", 4),
                                                         (0.5, "epoch", 2)])  # fmt: skip
def test_step_to_go_back_to_is_counted_in_phases_steps_or_epochs(fit, rewind_to, unit, step):
    callback = LotteryTicket(0.5, schedule=OneShot(8, unit="step"), rewind_to=rewind_to, rewind_unit=unit)
    fit(callback, max_epochs=3)
    assert (callback.rewind_step, callback.rewinds) == (step, 1)


def test_averages_of_weights_go_back_as_well(fit, tiny_net):
    class Average(WeightAveraging):
        def on_train_end(self, trainer, model):
            self.counted = int(self._average_model.n_averaged)
            super().on_train_end(trainer, model)

    class Last(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            self.seen.append(copy.deepcopy(model.state_dict()))

    average, last = Average(), Last()
    callback = LotteryTicket(0.3, schedule=TWO, rewind_to=0)
    trainer = fit([average, callback, last], max_epochs=3)
    # a plain mean over the four steps of the last phase alone, in which every mean is under the mask
    assert average.counted == 4
    mean = torch.stack([seen["fc.weight"] for seen in last.seen[8:]]).mean(0)
    assert torch.allclose(trainer.lightning_module.fc.weight, mean, atol=1e-6)
    for name, mask in callback.plan.masks.items():
        assert not trainer.lightning_module.state_dict()[name][~mask].any()


def test_averages_bring_nothing_back_that_went(fit):
    # two averaged steps before the snapshot: their values would still be in the mean at the end
    callback = LotteryTicket(0.3, schedule=TWO, rewind_to=2, rewind_unit="step")
    trainer = fit([WeightAveraging(), callback], max_epochs=3)
    for name, mask in callback.plan.masks.items():
        assert not trainer.lightning_module.state_dict()[name][~mask].any()


def test_random_state_goes_back_if_asked(fit, tiny_net, make_loader):
    class Draws(tiny_net):
        def training_step(self, batch, batch_idx):
            drawn.append((float(torch.rand(())), batch[0].sum().item()))
            return super().training_step(batch, batch_idx)

    for random_state, same in ((True, True), (False, False)):
        drawn = []
        callback = LotteryTicket(0.3, schedule=TWO, rewind_to=0, random_state=random_state)
        fit(callback, model=Draws(), loader=make_loader(shuffle=True), max_epochs=3)
        assert (drawn[4:8] == drawn[8:12]) is same


def test_other_methods_in_the_trainer_are_refused(fit):
    for other in (L1Filter(0.5), Magnitude(0.5, ignore=["conv1"])):
        with pytest.raises(RuntimeError, match="rewinding would bring back what the other has cut or masked"):
            fit([LotteryTicket(0.5), other])


def test_a_fit_without_an_end_needs_schedulers_as_they_are(fit, tiny_net):
    class Endless(IterableDataset):
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            while True:
                yield torch.randn(1, 8, 8, generator=generator), 0

    class Stop(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step >= 6

    def run(schedulers):
        callback = LotteryTicket(0.5, schedule=AT_3, schedulers=schedulers)
        model = scheduled(tiny_net, linear_fall, interval="step")()
        fit([callback, Stop()], model=model, loader=DataLoader(Endless(), 8), max_epochs=-1, limit_val_batches=0)
        return callback

    with pytest.raises(RuntimeError, match="the last phase of this fit has no end; set max_steps"):
        run("per_phase")
    assert run("as_is").phase_lengths == (3,)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rewind_to": 1}, "rewind_to must be below 1, a fraction of the first phase, got 1"),
        ({"rewind_to": -0.1}, "at least 0, got -0.1"),
        ({"rewind_to": True}, "must be a number of at least 0, got True"),
        ({"rewind_to": float("nan")}, "must be a number of at least 0, got nan"),
        ({"rewind_to": 1.5, "rewind_unit": "step"}, "a whole number of steps, got 1.5"),
        ({"rewind_unit": "fit"}, "rewind_unit must be one of 'phase', 'step', 'epoch', got 'fit'"),
        ({"variant": "lr"}, "variant must be one of"),
        ({"control": "dense"}, "control must be one of 'reinit', 'random_ticket', got 'dense'"),
        ({"control": "reinit", "variant": "finetune"}, "needs variant='weights', as it is of early values"),
        ({"schedulers": "off"}, "schedulers must be one of"),
    ],
)
def test_bad_arguments_are_refused_at_once(settings, match):
    with pytest.raises(ValueError, match=match):
        LotteryTicket(0.5, **settings)


def test_a_step_to_go_back_to_has_to_be_in_the_first_phase(fit):
    with pytest.raises(ValueError, match=r"goes back to step 4 \(1 epochs\), but first prunes after step 3"):
        fit(LotteryTicket(0.5, schedule=AT_3, rewind_to=1, rewind_unit="epoch"))
