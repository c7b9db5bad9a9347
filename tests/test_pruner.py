import math
import re
import subprocess
import sys
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Budget,
    ChannelPruner,
    Gradual,
    Iterative,
    L1Filter,
    Magnitude,
    OneShot,
    RandomChannels,
    TaylorWeight,
    WeightPruner,
    count,
    surgery,
    trace,
)
from lightning_prune.errors import NoEvent, NonFiniteScore, NothingToPrune, TraceError, UnmeetableBudget
from lightning_prune.pruner import NotYet

AT_START, AT_3, AT_6 = (OneShot(n, unit="step") for n in (0, 3, 6))


class Recorder(Callback):
    """Calls a function of the trainer after each training step, and keeps what it returns."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.seen.append(self.look(trainer))


class LastIndices(ChannelPruner):
    """A fake method: later channels are better."""

    default_scope = "uniform"
    join = "first"

    def score(self, view):
        return torch.arange(float(view.group.size))


def sizes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_event_at_progress_zero_runs_before_the_first_step(fit, tiny_net):
    class First(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if batch_idx == 0:
                self.width = model.conv1.out_channels

    first = First()
    callback = L1Filter(0.5, schedule=AT_START)
    trainer = fit([callback, first], max_epochs=1)
    assert first.width == trainer.lightning_module.conv1.out_channels < 12
    assert callback.report.rows[0]["step"] == 0


def test_event_in_the_last_step_of_an_epoch_runs_before_validation_and_checkpoint(fit, save_each, tmp_path):
    class AtValidation(Callback):
        widths = ()

        def on_validation_start(self, trainer, model):
            self.widths += (model.conv1.out_channels,)

    watch = AtValidation()
    callback = L1Filter(0.5, schedule=OneShot(4, unit="step"))
    trainer = fit([watch, callback, save_each()])
    width = trainer.lightning_module.conv1.out_channels
    assert watch.widths == (12, width, width)  # the sanity check, then two epochs of four steps
    assert width < 12
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert len(saved["state_dict"]["conv1.weight"]) == width


def test_steps_are_optimizer_steps_under_gradient_accumulation(fit):
    # 8 batches, 2 to a step: 4 steps; step 3 is after batch 6
    recorder = Recorder(lambda trainer: trainer.lightning_module.conv1.out_channels)
    callback = L1Filter(0.5, schedule=AT_3)
    fit([callback, recorder], accumulate_grad_batches=2)
    assert callback.steps == 4
    assert [width < 12 for width in recorder.seen] == [False] * 5 + [True] * 3


def test_taylor_measures_whole_gradients_under_accumulation(fit):
    callback = TaylorWeight(0.5, schedule=OneShot(3, unit="step"))
    counts = Recorder(lambda trainer: float(callback._statistics._window.count[0]))
    fit([counts, callback], accumulate_grad_batches=2)
    assert counts.seen[:6] == [0, 1, 1, 2, 2, 3]


def test_events_on_one_step_are_one_event(fit):
    callback = L1Filter(0.5, schedule=Iterative(start=0.5, end=0.6, events=10))
    fit(callback)
    assert [event.step for event in callback.events] == [4, 5]
    assert len(callback.report.rows) == callback.events_done == 2


def test_schedule_that_ends_after_the_fit_is_refused_before_anything_changes(fit, tiny_net):
    model = tiny_net()
    before = weights(model)
    with pytest.raises(NoEvent, match=r"event at step 8, but the fit has 8 steps"):
        fit(L1Filter(0.5, schedule=OneShot(8, unit="step")), model=model)
    assert differing(before, model.state_dict()) == []


def test_fit_without_an_end_needs_a_schedule_in_steps(fit):
    settings = {"max_epochs": -1, "max_time": {"hours": 1}}
    with pytest.raises(NoEvent, match="this fit has no end; use unit='step' or set max_steps"):
        fit(L1Filter(0.5), **settings)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 6

    callback = L1Filter(0.5, schedule=AT_3)
    fit([callback, Stop()], **settings)
    assert callback.events_done == 1


def test_fast_dev_run_prunes_in_its_one_batch(fit):
    callback = L1Filter(0.5)
    fit(callback, fast_dev_run=True)
    assert callback.events_done == 1
    assert callback.report.flops_kept <= 0.5


def test_keep_is_of_the_dense_model_at_every_event(fit):
    # linear: after the k-th of 4 events 1 - k / 4 * 0.6 may stay; of the network before it, it would be 0.4**k
    callback = LastIndices(0.4, schedule=Iterative(start=0.1, end=0.6, events=4))
    fit(callback, max_epochs=4)
    kept = [row["prune/flops_kept"] for row in callback.report.rows]
    for value, allowed in zip(kept, [0.85, 0.7, 0.55, 0.4], strict=True):
        assert allowed - 0.15 < value <= allowed


def test_plan_of_several_events_is_in_indices_of_the_dense_model(fit):
    callback = LastIndices(0.4, schedule=Iterative(start=0.1, end=0.6, events=4))
    trainer = fit(callback, max_epochs=4)
    width = trainer.lightning_module.conv1.out_channels
    assert callback.plan.kept["conv1.weight"][0].tolist() == list(range(12 - width, 12))
    assert callback.plan.kept["conv2.weight"][1].tolist() == list(range(12 - width, 12))
    assert callback.plan.groups["conv1"] == (width, 12)
    assert len(callback.report.rows) == 4


def test_cut_and_mask_make_the_same_plan_and_outputs(fit, tiny_net):
    models = []
    plans = []
    for apply in ("cut", "mask"):
        callback = LastIndices(0.5, schedule=AT_3, apply=apply)
        trainer = fit(callback)
        models.append(trainer.lightning_module)
        plans.append(callback.plan)
    assert plans[0].groups == plans[1].groups
    cut, masked = (model.eval().double() for model in models)
    assert cut.conv1.out_channels < masked.conv1.out_channels == 12
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(cut(x), masked(x), atol=1e-6)
    for name, dims in plans[0].kept.items():
        small = masked.state_dict()[name]
        for dim, kept in dims.items():
            small = small.index_select(dim, kept)
        assert torch.allclose(cut.state_dict()[name], small, atol=1e-6), name


def test_masked_channels_stay_at_zero_through_momentum_and_weight_decay(fit):
    callback = LastIndices(0.5, schedule=AT_3, apply="mask")
    trainer = fit(callback)
    parameters = dict(trainer.lightning_module.named_parameters())
    assert sum(int((~mask).sum()) for mask in callback.plan.masks.values()) > 100
    for name, mask in callback.plan.masks.items():
        assert parameters[name][~mask].count_nonzero() == 0
        assert parameters[name][mask].count_nonzero() > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_masked_weights_and_their_optimizer_state_stay_at_zero(fit, tiny_net, optimizer):
    def leaked(trainer):
        if callback.events_done == 0:
            return 0
        parameters = dict(trainer.lightning_module.named_parameters())
        held = sum(int(parameters[n][~mask].count_nonzero()) for n, mask in callback.plan.masks.items())
        state = trainer.optimizers[0].state
        for name, mask in callback.plan.masks.items():
            for value in state[parameters[name]].values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    held += int(value[~mask].count_nonzero())
        return held

    callback = Magnitude(0.2, schedule=AT_3)
    recorder = Recorder(leaked)
    fit([callback, recorder], model=tiny_net(optimizer=optimizer))
    assert recorder.seen == [0] * 8


def test_gradient_of_a_masked_weight_is_zero_before_the_step(fit):
    class Norm(Callback):
        norm = None

        def on_before_optimizer_step(self, trainer, model, optimizer):
            if callback.events_done:
                grads = {n: p.grad for n, p in model.named_parameters()}
                self.norm = sum(float(grads[n][~mask].abs().sum()) for n, mask in callback.plan.masks.items())

    callback, before, after = Magnitude(0.2, schedule=AT_3), Norm(), Norm()
    fit([before, callback, after])
    assert before.norm > 0
    assert after.norm == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_optimizer_state_has_the_shape_of_its_parameter(fit, tiny_net, optimizer):
    trainer = fit(LastIndices(0.5, schedule=AT_3), model=tiny_net(optimizer=optimizer))
    state = trainer.optimizers[0].state
    assert trainer.lightning_module.conv1.out_channels < 12
    for parameter in trainer.lightning_module.parameters():
        values = [v for v in state[parameter].values() if isinstance(v, Tensor) and v.ndim]
        assert values
        assert [v.shape for v in values] == [parameter.shape] * len(values)


def test_learning_rate_schedule_and_param_groups_stay(fit, tiny_net):
    class Scheduled(tiny_net):
        def configure_optimizers(self):
            groups = [{"params": self.conv1.parameters(), "lr": 0.1}, {"params": self.fc.parameters(), "lr": 0.01}]
            optimizer = torch.optim.SGD(groups, lr=0.05)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def look(trainer):
        groups = trainer.optimizers[0].param_groups
        return [(group["lr"], len(group["params"])) for group in groups]

    runs = []
    for callbacks in ([], [LastIndices(0.5, schedule=AT_3)]):
        recorder = Recorder(look)
        fit([*callbacks, recorder], model=Scheduled())
        runs.append(recorder.seen)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][-1]


def test_round_to_makes_channel_counts_multiples(fit):
    callback = LastIndices(0.5, schedule=AT_3, round_to=4)
    fit(callback)
    counts = {name: kept for name, (kept, _) in callback.plan.groups.items()}
    assert counts["conv1"] in (4, 8)
    assert counts["hidden"] in (4, 8, 12)
    assert counts["stem"] in (4, 6)  # all or a multiple
    assert callback.report.flops_kept <= 0.5


def test_min_channels_is_the_fewest_a_group_keeps(fit):
    few = LastIndices(0.25, schedule=AT_3)
    fit(few)
    assert min(kept for kept, _ in few.plan.groups.values()) < 4
    callback = LastIndices(0.25, schedule=AT_3, min_channels=4)
    fit(callback)
    assert min(kept for kept, _ in callback.plan.groups.values()) == 4
    assert callback.report.flops_kept <= 0.25


def test_keep_gives_a_group_its_own_fraction(fit):
    callback = LastIndices(0.6, schedule=AT_3, keep={"hidden": 0.25})
    fit(callback)
    assert callback.plan.groups["hidden"] == (3, 12)
    kept, dense = callback.plan.groups["conv1"]
    assert kept / dense > 0.5


def test_uniform_scope_keeps_about_the_same_fraction_of_each_group(fit):
    callback = LastIndices(Budget(0.5, of="units"), schedule=AT_3)
    fit(callback)
    assert {name: kept for name, (kept, _) in callback.plan.groups.items()} == {"stem": 3, "conv1": 6, "hidden": 6}


def test_global_scope_takes_from_where_scores_are_low(fit):
    class HiddenLow(LastIndices):
        default_scope = "global"

        def score(self, view):
            return super().score(view) + (0.0 if view.group.name == "hidden" else 100.0)

    callback = HiddenLow(Budget(0.7, of="units"), schedule=AT_3)  # 9 of 30 go
    fit(callback)
    assert {name: kept for name, (kept, _) in callback.plan.groups.items()} == {"stem": 6, "conv1": 12, "hidden": 3}


@pytest.mark.parametrize("of", ["flops", "params", "units"])
def test_channel_budget_bounds_what_it_says(fit, tiny_net, of):
    callback = LastIndices(Budget(0.5, of=of), schedule=AT_3)
    trainer = fit(callback)
    row = callback.report.rows[-1]
    measured = {"flops": row["prune/flops_kept"], "params": row["prune/params_kept"], "units": row["prune/density"]}
    assert 0.4 < measured[of] <= 0.5
    model = trainer.lightning_module
    assert row["prune/params"] == sum(p.numel() for p in model.parameters())
    assert row["prune/flops"] == count(model, model.example_input_array).flops


def test_ignored_layers_stay_whole(fit):
    callback = LastIndices(0.6, schedule=AT_3, ignore=["hidden", "stem"])
    trainer = fit(callback)
    model = trainer.lightning_module
    assert (model.stem.out_channels, model.hidden.out_features) == (6, 12)
    assert model.conv1.out_channels < 12
    weight = Magnitude(0.6, schedule=AT_3, ignore=["fc", "*.bias"])
    fit(weight)
    assert "fc.weight" not in weight.plan.masks
    assert weight.report.rows[-1]["prune/density"] == pytest.approx(0.6, abs=0.001)


def test_an_event_that_changes_nothing_warns(fit):
    with pytest.warns(UserWarning, match="LastIndices: the event at step 3 changed nothing"):
        fit(LastIndices(1.0, schedule=AT_3))


def test_second_fit_of_the_same_callback_starts_anew(fit, tiny_net):
    callback = TaylorWeight(0.5)
    first = fit(callback)
    plan, rows = callback.plan, len(callback.report.rows)
    second = fit(callback)
    assert callback.plan == plan
    assert len(callback.report.rows) == rows
    assert differing(weights(first.lightning_module), weights(second.lightning_module)) == []


def test_second_fit_of_a_cut_model_halves_what_it_finds(fit):
    callback = LastIndices(0.5, schedule=AT_3)
    model = fit(callback).lightning_module
    dense, once = callback.dense_cost.flops, count(model, model.example_input_array).flops
    fit(callback, model=model)
    assert callback.dense_cost.flops == once
    assert count(model, model.example_input_array).flops <= 0.5 * once <= 0.25 * dense


def test_two_of_one_class_prune_different_layers(fit):
    inner = L1Filter(0.75, ignore=["hidden", "stem"], schedule=AT_3)
    rest = L1Filter(0.5, ignore=["conv1"], schedule=AT_6)
    trainer = fit([inner, rest])
    assert inner.state_key != rest.state_key
    model = trainer.lightning_module
    assert model.conv1.out_channels < 12
    assert model.stem.out_channels < 6
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    assert inner.dense_cost == rest.dense_cost
    assert inner.report.after.flops == rest.report.after.flops == count(model, model.example_input_array).flops
    assert inner.plan.merge(rest.plan) == rest.plan


def test_two_methods_share_all_layers(fit, save_each, tmp_path):
    def callbacks():
        return [
            L1Filter(0.8, schedule=OneShot(2, unit="step")),
            TaylorWeight(0.3, schedule=Iterative(start=3, end=6, events=3, unit="step")),
        ]

    first = callbacks()
    trainer = fit([*first, save_each()])
    assert first[0].dense_cost == first[1].dense_cost
    assert first[1].report.flops_kept <= 0.3
    again = fit(callbacks(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert differing(weights(trainer.lightning_module), weights(again.lightning_module)) == []


def test_dense_cost_of_a_second_callback_is_of_the_dense_model_though_the_first_cuts_at_once(fit):
    first, second = L1Filter(0.8, schedule=AT_START), LastIndices(0.5, schedule=AT_3)
    fit([first, second])
    assert second.dense_cost == first.dense_cost
    assert 0.35 < second.report.flops_kept <= 0.5


class Gan(pl.LightningModule):
    """Two networks, two optimizers, steps by hand; each loss reaches the other network too."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16))
        self.critic = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)[:, :16]
        noise = real[:, :4]
        g, d = self.optimizers()
        loss = -self.critic(self.generator(noise)).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()
        fake = self.generator(noise).detach()
        loss = F.softplus(self.critic(fake)).mean() + F.softplus(-self.critic(real)).mean()
        d.zero_grad()
        self.manual_backward(loss)
        d.step()

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.Adam(self.critic.parameters(), lr=0.01),
        ]


def gan_loss(model, batch):
    return model.critic(model.generator(batch[0].flatten(1)[:, :4])).mean()


@pytest.mark.parametrize("method", [L1Filter, Magnitude, TaylorWeight])
def test_two_optimizers_by_hand(fit, method):
    callback = method(0.5, schedule=AT_3, loss_fn=gan_loss)
    trainer = fit(callback, model=Gan())
    assert callback.steps == 8
    model = trainer.lightning_module
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.ndim]
                assert [v.shape for v in values] == [parameter.shape] * 2
    if method.kind == "channels":
        assert callback.report.flops_kept <= 0.5
        assert {model.generator[0].out_features, model.critic[0].out_features} != {8}
        assert model.critic[0].in_features == 16
    else:
        total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        assert sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1) == total // 2


def test_group_is_measured_once_a_step_of_its_own_optimizer(fit):
    callback = TaylorWeight(0.5, schedule=AT_6, loss_fn=gan_loss)
    recorder = Recorder(lambda trainer: callback._statistics._window.count.tolist())
    fit([recorder, callback], model=Gan())
    assert recorder.seen[0] == [1.0] * 16  # eight channels of each network
    assert recorder.seen[3] == [4.0] * 16


def test_manual_optimization_without_loss_fn_or_example_is_refused(fit):
    with pytest.raises(TraceError, match=r"optimizes manually.*pass example_input= or a loss_fn="):
        fit(L1Filter(0.5), model=Gan())


def test_model_without_example_input_is_traced_from_a_batch(fit, tiny_net):
    pl.seed_everything(0, verbose=False)
    model = tiny_net()
    model.example_input_array = None
    callback = TaylorWeight(0.5)
    with_example = TaylorWeight(0.5)
    trainer = fit(callback, model=model)
    other = fit(with_example)
    assert callback.plan == with_example.plan
    assert differing(weights(trainer.lightning_module), weights(other.lightning_module)) == []


def test_model_whose_forward_is_not_used_is_traced_through_its_loss(fit, caplog):
    class Parts(pl.LightningModule):
        def __init__(self):
            super().__init__()
            first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
            self.encoder = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
            self.head = nn.Linear(6, 3)
            self.unused = nn.Linear(5, 5)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.encoder(batch[0]).mean((2, 3))), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    callback = TaylorWeight(0.5)
    trainer = fit(callback, model=Parts())
    model = trainer.lightning_module
    assert "traced through encoder, head" in caplog.text
    assert model.encoder[0].out_channels < 8
    assert callback.report.flops_kept <= 0.5
    assert any("unused" in name for name in callback.report.frozen)
    assert model.unused.weight.shape == (5, 5)


def test_example_that_the_model_refuses_is_an_error(fit, tiny_net):
    model = tiny_net()
    before = weights(model)
    with pytest.raises(TraceError, match=r"TinyNet.*example"):
        fit(L1Filter(0.5, example_input=torch.zeros(1, 5, 8, 8)), model=model)
    assert differing(before, model.state_dict()) == []


def test_example_input_may_be_a_dict_or_a_tuple(fit):
    for example in ({"x": torch.zeros(1, 1, 8, 8)}, (torch.zeros(1, 1, 8, 8),)):
        callback = L1Filter(0.5, example_input=example)
        fit(callback)
        assert 0.3 < callback.report.flops_kept <= 0.5


def test_frozen_layers_stop_nothing_that_is_not_scored_by_gradients(fit, tiny_net):
    model = tiny_net()
    model.conv1.requires_grad_(False)
    callback = L1Filter(0.5)
    fit(callback, model=model)
    assert not model.conv1.weight.requires_grad
    assert model.conv1.out_channels < 12


class Poisoned:
    """Makes the losses of some steps NaN, without a trace in the weights."""

    def __new__(cls, base, steps):
        class Module(base):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return loss * float("nan") if self.trainer.global_step in steps else loss

            def on_before_optimizer_step(self, optimizer):
                # as a scaler would: no step on gradients that are not finite
                if self.trainer.global_step in steps:
                    for parameter in self.parameters():
                        parameter.grad.zero_()

        return Module()


def test_weight_that_is_not_trained_may_be_infinite(fit, tiny_net):
    class Masked(tiny_net):
        def __init__(self):
            super().__init__()
            self.mask = nn.Parameter(torch.full((4, 4), -math.inf), requires_grad=False)

    callback = L1Filter(0.5)
    fit(callback, model=Masked())
    assert callback.report.flops_kept <= 0.5


class SeeGradients(Callback):
    """Shapes of gradients behind an event."""

    def on_train_batch_end(self, trainer, model, *_):
        if trainer.global_step == 3:
            self.seen = {n: None if p.grad is None else p.grad.shape for n, p in model.named_parameters()}


def test_gradients_of_the_step_that_was_made_are_let_go_of_by_a_cut(fit):
    see = SeeGradients()
    fit([L1Filter(0.5, schedule=AT_3), see])
    assert set(see.seen.values()) == {None}


def test_gradients_are_cut_along_where_the_module_steps_by_itself(fit, tiny_net):
    class Manual(tiny_net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    see, model = SeeGradients(), Manual()
    fit([L1Filter(0.5, schedule=AT_3, example_input=torch.randn(2, 1, 8, 8)), see], model=model)
    assert see.seen == {n: p.shape for n, p in model.named_parameters()}


def test_batch_with_a_nan_loss_is_left_out_and_counted(fit, tiny_net):
    callback = TaylorWeight(0.5, schedule=AT_3)
    recorder = Recorder(lambda trainer: (float(callback._statistics._window.count[0]), callback._statistics.skipped))
    fit([recorder, callback], model=Poisoned(tiny_net, {1}))
    assert recorder.seen[:3] == [(1.0, 0), (1.0, 1), (2.0, 1)]
    assert callback.report.flops_kept <= 0.5


def test_event_without_a_finite_batch_raises_or_waits(fit, tiny_net):
    with pytest.raises(NonFiniteScore, match="no finite batch to score by: 3 batches were not finite"):
        fit(TaylorWeight(0.5, schedule=AT_3), model=Poisoned(tiny_net, {0, 1, 2}))
    callback = TaylorWeight(0.5, schedule=AT_3, on_nonfinite="postpone")
    with pytest.warns(UserWarning, match="postpones its event at step 3"):
        fit(callback, model=Poisoned(tiny_net, {0, 1, 2}))
    assert callback.report.rows[0]["step"] == 4


def test_nan_weight_raises_before_anything_is_cut(fit, tiny_net):
    model = tiny_net()
    with torch.no_grad():
        model.hidden.weight[0, 0] = float("nan")
    for method in (L1Filter, Magnitude):
        callback = method(0.5, schedule=AT_START)
        with pytest.raises(NonFiniteScore, match="hidden"):
            fit(callback, model=model)
        assert model.conv1.out_channels == 12
        assert callback.plan.is_empty


def test_event_before_any_gradient_says_so(fit):
    with pytest.raises(NonFiniteScore, match="a training batch must run first"):
        fit(TaylorWeight(0.5, schedule=AT_START))


def test_frozen_layer_that_must_be_scored_by_gradients_is_named(fit, tiny_net):
    model = tiny_net()
    for module in (model.conv1, model.norm1):
        module.requires_grad_(False)
    with pytest.raises(NonFiniteScore, match=r"no gradient to score conv1 by.*must be trained.*ignore="):
        fit(TaylorWeight(0.5, schedule=AT_3), model=model)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), True, "half"])
@pytest.mark.parametrize("method", [L1Filter, Magnitude])
def test_budget_outside_zero_to_one_is_refused(method, keep):
    with pytest.raises(ValueError, match=r"keep must be"):
        method(keep)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": 0.5}, "schedule must be OneShot"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be 'raise' or 'postpone', got 'ignore'"),
        ({"apply": "zero"}, "apply must be one of 'cut', 'mask', got 'zero'"),
        ({"scope": "layer"}, "scope must be one of 'global', 'uniform', got 'layer'"),
        ({"verify": True}, "verify must be one of"),
        ({"round_to": 0}, "round_to must be an int of at least 1, got 0"),
        ({"min_channels": 2.0}, "min_channels must be an int of at least 1, got 2.0"),
        ({"keep": {"conv1": 0.5}, "scope": "global"}, "needs scope='uniform'"),
        ({"keep": {"conv1": 0.0}}, r"keep of group 'conv1' must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        LastIndices(0.5, **settings)


def test_weight_scope_is_layer_or_global():
    with pytest.raises(ValueError, match="scope must be one of 'global', 'layer', got 'uniform'"):
        Magnitude(0.5, scope="uniform")


@pytest.mark.parametrize("method", [L1Filter, Magnitude])
def test_ignore_that_matches_nothing_names_what_is_near(fit, tiny_net, method):
    model = tiny_net()
    before = weights(model)
    with pytest.raises(ValueError, match=r"ignore pattern 'conv9' matches no module .* near names: .*'conv1'"):
        fit(method(0.5, ignore=["conv9"]), model=model)
    assert differing(before, model.state_dict()) == []


def test_keep_of_an_unknown_group_is_refused(fit):
    with pytest.raises(ValueError, match="keep= names group 'conv7'; groups are stem, conv1, hidden"):
        fit(LastIndices(0.5, keep={"conv7": 0.5}))


@pytest.mark.parametrize("method", [L1Filter, Magnitude])
def test_model_with_everything_ignored_has_nothing_to_prune(fit, method):
    with pytest.raises(NothingToPrune, match="TinyNet may go"):
        fit(method(0.5, ignore=["*"]))


def test_model_with_one_layer_has_nothing_to_prune_and_says_why(fit, tiny_net):
    class One(tiny_net):
        def __init__(self):
            super().__init__()
            for name in ("stem", "norm0", "conv1", "norm1", "conv2", "norm2", "hidden"):
                delattr(self, name)
            self.fc = nn.Linear(64, 3)

        def forward(self, x):
            return self.fc(x.flatten(1))

    with pytest.raises(NothingToPrune, match="fc"):
        fit(L1Filter(0.5), model=One())


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (L1Filter(0.01), r"0.01 of the flops cannot be met: with the fewest channels allowed 0\.\d+ are left"),
        (L1Filter(0.3, min_channels=5), "cannot be met"),
        (L1Filter(0.3, round_to=6), "cannot be met"),
        (Magnitude(0.05, ignore=["conv*"]), r"is 0\.\d+ of them \(mostly conv1\.weight: ignored; conv2"),
        (Magnitude(Budget(0.01, of="params")), "cannot be met"),
    ],
    ids=["channels", "min_channels", "round_to", "ignored", "params"],
)
def test_budget_that_nothing_can_meet_is_refused_at_the_start(fit, tiny_net, callback, message):
    model = tiny_net()
    before = weights(model)
    with pytest.raises(UnmeetableBudget, match=message):
        fit(callback, model=model)
    assert differing(before, model.state_dict()) == []


def test_smallest_reachable_budget_that_the_error_names_can_be_met(fit):
    with pytest.raises(UnmeetableBudget) as caught:
        fit(L1Filter(0.01))
    least = float(re.search(r"allowed (\d\.\d+) are left", str(caught.value)).group(1))
    callback = L1Filter(least)
    fit(callback)
    assert callback.plan.groups["conv1"] == (1, 12)
    assert callback.report.flops_kept <= least


def test_optimizer_that_cannot_follow_is_refused_before_anything_changes(fit, tiny_net):
    class Quasi(tiny_net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)

    model = Quasi()
    before = weights(model)
    with pytest.raises(ValueError, match="LBFGS keeps its history as flat vectors"):
        fit(L1Filter(0.5), model=model)
    assert differing(before, model.state_dict()) == []


def test_report_before_a_fit_says_so():
    with pytest.raises(RuntimeError, match="L1Filter has no report before a fit"):
        L1Filter(0.5).report  # noqa: B018


def test_method_without_scores_says_so(fit):
    class Nothing(WeightPruner):
        pass

    with pytest.raises(RuntimeError, match=r"Nothing has neither score\(\) nor scores\(\)"):
        fit(Nothing(0.5, schedule=AT_3))


MIXED = """
import warnings; warnings.simplefilter("ignore")
import torch, pytorch_lightning as other
from torch.utils.data import DataLoader, TensorDataset
from lightning_prune import L1Filter, Magnitude

class Net(other.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    def training_step(self, batch, i):
        return self.net(batch[0]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

for method in (L1Filter, Magnitude):
    trainer = other.Trainer(callbacks=[method(0.5)], max_epochs=1, logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.fit(Net(), DataLoader(TensorDataset(torch.zeros(8, 4)), 4))
"""


def test_trainer_of_pytorch_lightning_is_refused():
    pytest.importorskip("pytorch_lightning", reason="comes with the test extra")
    # in a process of its own: the two packages share names, and importing one marks the other's globals
    done = subprocess.run([sys.executable, "-c", MIXED], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import Trainer and LightningModule from lightning.pytorch, not pytorch_lightning" in done.stderr


def test_generators_differ_by_purpose_and_layer_and_agree_between_callbacks(fit):
    def numbers(callback, *purpose):
        return torch.rand(3, generator=callback.generator(*purpose)).tolist()

    first, second = RandomChannels(0.5), RandomChannels(0.5)
    assert numbers(first, "score", "conv1") == numbers(second, "score", "conv1")
    assert numbers(first, "score", "conv1") != numbers(first, "score", "conv2")
    assert numbers(first, "score", "conv1") != numbers(first, "grow", "conv1")


def test_generator_follows_the_global_seed(fit):
    plans = []
    for seed in (0, 0, 1):
        callback = RandomChannels(0.5)
        fit(callback, seed=seed)
        plans.append(callback.plan)
    assert plans[0] == plans[1] != plans[2]


def test_method_can_look_at_calibration_data_and_loss(fit):
    class Looks(LastIndices):
        def _decide_and_apply(self, trainer, model, progress):
            batches = list(self.calibrate(20))
            self.samples = [len(batch[0]) for batch in batches]
            self.losses = [float(self.loss(batch)) for batch in batches]
            return super()._decide_and_apply(trainer, model, progress)

    callback = Looks(0.5, schedule=AT_3)
    fit(callback)
    assert callback.samples == [8, 8, 8]  # until there are 20
    assert all(0 < loss < 10 for loss in callback.losses)


def test_statistics_of_channels_that_stay_follow_the_cut(fit):
    class Remembers(LastIndices):
        def score(self, view):
            score = super().score(view)
            view.kept.setdefault("name", torch.arange(float(view.group.size)))
            return score

    callback = Remembers(0.4, schedule=Iterative(start=0.2, end=0.6, events=3))
    recorder = Recorder(lambda trainer: {n: dict(kept) for n, kept in callback._statistics.kept.items()})
    trainer = fit([callback, recorder])
    names = recorder.seen[-1]["conv1"]["name"].tolist()
    assert names == [float(i) for i in range(12 - trainer.lightning_module.conv1.out_channels, 12)]


def test_gradual_density_follows_the_cubic_curve(fit):
    # 4 events, tau 1/4 ... 1; of 0.8 to remove: 0.8 * (37/64, 7/8, 63/64, 1)
    callback = Magnitude(0.2, schedule=Gradual(start=0.0, end=0.8, events=4))
    fit(callback, max_epochs=5)
    total = sum(mask.numel() for mask in callback.plan.masks.values())
    densities = [row["prune/density"] for row in callback.report.rows]
    expected = [1 - 0.8 * part for part in (37 / 64, 7 / 8, 63 / 64, 1)]
    for density, wanted in zip(densities, expected, strict=True):
        assert wanted - 1 / total < density <= wanted + 1e-9


def test_flops_sparse_counts_each_layer_by_its_density(fit):
    callback = Magnitude(0.2, schedule=AT_3)
    trainer = fit(callback)
    model = trainer.lightning_module
    # conv: (H W) = 64 outputs a weight; linear: one. Norms and adds are not sparse.
    masks = callback.plan.masks
    saved = sum(int((~m).sum()) * (64 if m.ndim == 4 else 1) for m in masks.values())
    row = callback.report.rows[-1]
    assert row["prune/flops"] == count(model, model.example_input_array).flops == callback.dense_cost.flops
    assert row["prune/flops_sparse"] == pytest.approx(row["prune/flops"] - saved)


def test_flops_budget_of_weights_bounds_flops_sparse(fit):
    callback = Magnitude(Budget(0.3, of="flops"), schedule=AT_3, scope="global")
    fit(callback)
    row = callback.report.rows[-1]
    assert 0.29 < row["prune/flops_sparse"] / row["prune/flops"] <= 0.3
    assert row["prune/flops_kept"] == 1.0


def test_params_budget_of_weights_bounds_all_parameters(fit):
    callback = Magnitude(Budget(0.3, of="params"), schedule=AT_3)
    trainer = fit(callback)
    parameters = list(trainer.lightning_module.parameters())
    total = sum(p.numel() for p in parameters)
    kept = sum(int(m.sum()) for m in callback.plan.masks.values()) + sum(p.numel() for p in parameters if p.ndim == 1)
    assert kept == int(0.3 * total)


def test_exempt_weights_count_as_kept(fit):
    callback = Magnitude(0.5, schedule=AT_3, ignore=["conv1"])
    trainer = fit(callback)
    matrices = {n: p for n, p in trainer.lightning_module.named_parameters() if p.ndim > 1}
    total = sum(p.numel() for p in matrices.values())
    pruned = sum(int(m.sum()) for m in callback.plan.masks.values())
    assert pruned + matrices["conv1.weight"].numel() == int(0.5 * total)
    assert callback.report.rows[-1]["prune/density"] == pytest.approx(int(0.5 * total) / total)


def test_graph_of_a_cut_model_is_what_a_fresh_trace_finds(fit):
    class Keeps(LastIndices):
        def teardown(self, trainer, pl_module, stage):
            self.last = self._graph
            super().teardown(trainer, pl_module, stage)

    callback = Keeps(0.4, schedule=Iterative(start=0.1, end=0.6, events=3))
    model = fit(callback).lightning_module
    fresh = trace(model, model.example_input_array)
    assert [(g.name, g.size) for g in fresh.groups] == [(g.name, g.size) for g in callback.last.groups]
    assert fresh.cost() == callback.last.cost()


def test_fit_that_goes_on_from_a_dense_checkpoint_prunes_in_the_rest(fit, save_each, tmp_path):
    fit(save_each())
    callback = L1Filter(0.5, schedule=OneShot(0.75))
    fit([callback, save_each()], max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [(event.step, callback.steps) for event in callback.events] == [(6, 8)]  # of 8 steps that were left of 16
    assert callback.report.flops_kept <= 0.5
    again = L1Filter(0.5, schedule=OneShot(0.75))
    fit(again, max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert again.events == callback.events
    assert again.plan == callback.plan


def test_longer_fit_on_resume_moves_only_events_not_yet_done(fit, save_each, tmp_path):
    schedule = Iterative(start=0.25, end=0.75, events=3)  # of 8 steps: 2, 4, 6; of 16: 4, 8, 12
    fit([LastIndices(0.4, schedule=schedule), save_each()])
    callback = LastIndices(0.4, schedule=schedule)
    fit(callback, max_epochs=4, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [event.step for event in callback.events] == [2, 4, 12]
    assert callback.events_done == 3
    assert callback.report.flops_kept <= 0.4


def test_masks_hold_against_an_optimizer_that_adds_noise(fit, tiny_net):
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter += 0.01
            return loss

    class Net(tiny_net):
        def configure_optimizers(self):
            return Noisy(self.parameters(), lr=0.05)

    callback = Magnitude(0.2, schedule=AT_3)
    trainer = fit(callback, model=Net())
    for name, mask in callback.plan.masks.items():
        assert trainer.lightning_module.state_dict()[name][~mask].count_nonzero() == 0


def scaled_by_width(tiny_net, also_hidden=False):
    """TinyNet whose code multiplies with the width of its inner convolution: no trace sees it, a first cut shows it."""

    def width(x):
        return torch.arange(1.0, 20.0)[int(x.shape[1])]  # a number that forgot what it was read from

    class Scaled(tiny_net):
        def forward(self, x):
            x = F.relu(self.norm0(self.stem(x)))
            inner = F.relu(self.norm1(self.conv1(x)))
            x = F.relu(x + self.norm2(self.conv2(inner * width(inner))))
            hidden = F.relu(self.hidden(x.mean((2, 3)) * (width(x) if also_hidden else 1)))
            return self.fc(hidden * (width(hidden) if also_hidden else 1))

    return Scaled()


def test_a_group_that_a_cut_shows_to_be_unsafe_is_frozen_and_the_others_meet_the_budget(fit, tiny_net):
    # 6 + 12 + 12 channels; conv1's 12 stay whole, and are not counted as gone: of the 18 others 12 may be kept
    callback = L1Filter(Budget(0.7, of="units"), schedule=OneShot(0.0))
    model = scaled_by_width(tiny_net)
    with pytest.warns(UserWarning, match="freezes conv1"):
        fit(callback, model=model)
    assert model.conv1.weight.shape[0] == 12
    assert len(model.stem.weight) + len(model.hidden.weight) == 12
    assert "conv1" in callback.report.frozen


def test_where_every_group_is_unsafe_the_model_is_left_whole_and_says_so(fit, tiny_net):
    model = scaled_by_width(tiny_net, also_hidden=True)
    with pytest.warns(UserWarning, match="freezes"), pytest.raises(NothingToPrune, match="as trial cuts showed"):
        fit(L1Filter(0.5, schedule=OneShot(0.0)), model=model)
    assert [p.shape for p in model.parameters()] == [p.shape for p in tiny_net().parameters()]


def test_training_that_ends_before_pruning_says_what_was_reached(fit):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 3

    callback = LastIndices(0.5, schedule=Iterative(start=2, end=6, every=2, unit="step"))
    with pytest.warns(
        UserWarning, match=r"ended at step 3 after 1 of 3 events, the next is due at step 4; 0\.\d+ of the"
    ):
        fit([callback, Stops()])


def test_event_that_waits_for_a_finite_batch_is_said_once(fit, tiny_net):
    class Diverged(tiny_net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    callback = TaylorWeight(0.5, schedule=AT_3, on_nonfinite="postpone")
    with pytest.warns(UserWarning, match="LastIndices|TaylorWeight") as caught:
        fit(callback, model=Diverged())
    said = [str(w.message) for w in caught if "postpones its event" in str(w.message)]
    assert len(said) == 1
    assert [str(w.message) for w in caught if "after 0 of 1 events" in str(w.message)]


def test_events_that_join_one_that_waits_are_not_said(fit, tiny_net):
    class Diverged(tiny_net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if self.global_step < 4 else 1)

    callback = TaylorWeight(0.5, schedule=Iterative(start=1, end=3, every=1, unit="step"), on_nonfinite="postpone")
    with pytest.warns(UserWarning, match="TaylorWeight") as caught:
        fit(callback, model=Diverged())
    assert len([w for w in caught if "postpones its event" in str(w.message)]) == 1


def test_event_that_finds_its_budget_met_is_no_warning_once_something_went(fit, caplog):
    # 24 channels in 30 events: some have nothing left to do
    callback = LastIndices(0.9, schedule=Iterative(start=1, end=7, every=1, unit="step"))
    with caplog.at_level("INFO"):
        fit(callback)
    quiet = [r for r in caplog.records if "changed nothing" in r.message]
    assert not callback.plan.is_empty
    assert quiet


def test_resuming_with_another_budget_says_that_pruning_begins_anew(fit, save_each, tmp_path):
    fit([LastIndices(0.5, schedule=AT_3), save_each()])
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    with pytest.warns(UserWarning, match="written by LastIndices with another budget, schedule or ignore="):
        fit(LastIndices(0.8, schedule=AT_6), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")


class Narrow(pl.LightningModule):
    """Its first layer goes first: its channels say next to nothing."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2))
        self.example_input_array = torch.ones(2, 4)
        with torch.no_grad():
            self.net[0].weight.mul_(1e-3)
            self.net[0].bias.zero_()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("of", ["flops", "units"])
@pytest.mark.parametrize("method", [TaylorWeight, L1Filter])
def test_run_with_groups_of_one_channel_goes_on_as_if_nothing_had_happened(fit, tmp_path, method, of):
    def run(name, **resume):
        pruner = method(
            {"keep": 0.2, "of": of}, scope="global", schedule=Iterative(start=2, end=14, every=4, unit="step")
        )
        data = DataLoader(TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(0))), 8)
        keep = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = fit([pruner, keep], Narrow(), data, max_epochs=4, **resume)
        return trainer.lightning_module, pruner

    whole, pruner = run("whole")
    saved = torch.load(tmp_path / "whole" / "step=12.ckpt", weights_only=True)["callbacks"][pruner.state_key]
    assert saved["alive"]["net.0"].tolist() == [1]
    assert saved["done"] < len(pruner.events)
    resumed, again = run("resumed", ckpt_path=tmp_path / "whole" / "step=12.ckpt")
    assert again.plan == pruner.plan
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(pruner.report.rows, again.report.rows, strict=True):
        assert {**a, "prune/seconds": 0} == {**b, "prune/seconds": 0}
    assert again.state_dict()["alive"].keys() == pruner.state_dict()["alive"].keys()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_tensors_that_a_forward_makes_have_the_precision_of_the_fit(fit, tiny_net, precision):
    class Makes(tiny_net):
        def forward(self, x):
            return super().forward(
                x + torch.nn.functional.linear(torch.ones(1, 1), self.stem.weight[:1, 0, :1, 0]).sum()
            )

    callback = TaylorWeight(0.5, schedule=AT_3)
    fit(callback, model=Makes(), precision=precision)
    assert callback.report.flops_kept <= 0.5


@pytest.mark.parametrize(
    ("verify", "proofs"), [("first", [True, True, False]), ("never", [False] * 3), ("always", [True] * 3)]
)
def test_cut_is_proved_where_a_group_is_cut_for_the_first_time(fit, monkeypatch, verify, proofs):
    class Later(LastIndices):
        """Its first event takes of 'conv1', the second of 'hidden', the third of both."""

        def select(self, scores, fits):
            keep = {name: torch.ones(len(score), dtype=torch.bool) for name, score in scores.items()}
            for name in (["conv1"], ["hidden"], ["conv1", "hidden"])[self.events_done]:
                keep[name][0] = False
            return keep

    cut, seen = surgery.cut, []

    def noting(*args, **kwargs):
        seen.append(kwargs["verify"] == "always")
        return cut(*args, **kwargs)

    monkeypatch.setattr(surgery, "cut", noting)
    fit(Later(0.5, schedule=Iterative(start=2, end=6, every=2, unit="step"), verify=verify))
    assert seen == proofs


class Verbs(WeightPruner):
    """A fake method that notes what it is asked when, and runs a function of itself before each step."""

    def __init__(self, budget, before=None, **shared):
        super().__init__(budget, **shared)
        self.before, self.calls, self.number, self.waits = before, [], 0, 0

    def initialise(self):
        self.calls.append(("initialise", self.steps))
        self.number = 5

    def before_step(self, optimizer, held):
        self.calls.append(("before", self.steps, self.due, len(held)))
        if self.before is not None:
            self.before(self, optimizer, held)

    def after_step(self):
        assert not torch.is_grad_enabled()
        assert self.model is not None
        self.calls.append(("after", self.steps))

    def own_state(self):
        return {"number": self.number}

    def load_own_state(self, state):
        self.number = state["number"]

    def score(self, name, weight):
        self.calls.append(("score", self.steps))
        if self.waits:
            self.waits -= 1
            raise NotYet
        return weight.detach().abs()


def test_verbs_around_a_step_come_in_their_order(fit):
    method = Verbs(0.98, schedule=OneShot(2, unit="step"), ignore=["stem", "conv*", "hidden"])
    fit(method, max_epochs=1, limit_train_batches=3)
    assert method.calls == [
        ("initialise", 0),
        ("before", 0, False, 13), ("after", 1),
        ("before", 1, True, 13), ("after", 2), ("score", 2),
        ("before", 2, False, 13), ("after", 3),
    ]  # fmt: skip


def test_verbs_are_called_once_an_optimizer_step_with_accumulation(fit):
    method = Verbs(0.5, schedule=OneShot(1, unit="step"))
    fit(method, max_epochs=1, accumulate_grad_batches=2)
    assert [call[:2] for call in method.calls if call[0] == "before"] == [("before", 0), ("before", 1)]


def test_before_step_gets_the_parameters_of_the_optimizer_that_steps(fit):
    seen = []
    method = Verbs(0.5, lambda self, optimizer, held: seen.append(set(held)), schedule=OneShot(1, unit="step"),
                   loss_fn=lambda model, batch: model.generator(batch[0].flatten(1)[:, :4]).mean())  # fmt: skip
    fit(method, model=Gan(), max_epochs=1)
    assert {frozenset(name.split(".")[0] for name in names) for names in seen} == {
        frozenset({"generator"}),
        frozenset({"critic"}),
    }


def test_before_step_sees_gradients_that_are_not_masked(fit):
    seen = {}

    def look(self, optimizer, held):
        seen[self.steps] = int((held["conv1.weight"].grad != 0).sum()), int(self.alive("conv1.weight").sum())

    fit(Verbs(0.5, look, schedule=OneShot(0, unit="step")))
    assert all(nonzero > 1.5 * kept for nonzero, kept in seen.values())
    assert len(seen) == 8


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_skipped_step_changes_no_weight_and_no_optimizer_state(fit, tiny_net, optimizer):
    def skip(self, optimizer, held):
        if self.steps == 4:
            self.skip_step(optimizer)

    def look(trainer):
        state = trainer.optimizers[0].state
        held = {n: p.detach().clone() for n, p in trainer.lightning_module.named_parameters()}
        return held, [[v.clone() for v in s.values() if isinstance(v, Tensor)] for s in state.values()]

    recorder = Recorder(look)
    fit([Verbs(0.5, skip, schedule=AT_6), recorder], model=tiny_net(optimizer=optimizer))
    (before, states), (after, states_after) = recorder.seen[3:5]
    assert differing(before, after) == []
    for old, new in zip(states, states_after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert len(differing(before, recorder.seen[5][0])) > 5


def test_an_event_that_waits_is_tried_at_each_step(fit):
    method = Verbs(0.98, schedule=AT_3, ignore=["stem", "conv*", "hidden"])
    method.waits = 2
    fit(method)
    assert [call for call in method.calls if call[0] == "score"] == [("score", 3), ("score", 4), ("score", 5)]
    assert [row["step"] for row in method.report.rows] == [5.0]


def test_own_state_is_found_again_and_not_initialised_anew(fit, save_each, tmp_path):
    def count(self, optimizer, held):
        self.number += 1

    whole, resumed = Verbs(0.5, count), Verbs(0.5, count)
    fit([whole, save_each()])
    fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert whole.number == resumed.number == 5 + 8
    assert ("initialise", 0) not in resumed.calls


def test_biases_and_norms_go_only_where_they_are_named(fit, tiny_net):
    plain, named = Verbs(0.5, schedule=AT_3), Verbs(0.5, schedule=AT_3, include=["*.bias", "norm1.weight"])
    fit(plain)
    model = fit(named).lightning_module
    assert {"conv1.weight", "fc.weight"} <= plain.plan.masks.keys()
    assert not any(name.endswith("bias") or name.startswith("norm") for name in plain.plan.masks)
    assert {"norm1.weight", "norm2.bias", "fc.bias"} <= named.plan.masks.keys()
    assert "norm2.weight" not in named.plan.masks
    counted = [p for n, p in model.named_parameters() if p.ndim > 1 or n.endswith("bias") or n == "norm1.weight"]
    assert sum(int(p.count_nonzero()) for p in counted) <= int(0.5 * sum(p.numel() for p in counted))
    with pytest.raises(ValueError, match="include pattern 'convx' matches no module or parameter"):
        fit(Verbs(0.5, include=["convx"]))


def test_regrown_weights_are_counted_and_start_at_zero_without_momentum(fit):
    class Turns(WeightPruner):
        """Keeps the first half of each weight, then the second, and so on."""

        default_scope = "layer"

        def scores(self, weights):
            sign = 1 if self.events_done % 2 else -1
            return {name: sign * torch.arange(float(w.numel())).reshape(w.shape) for name, w in weights.items()}

    def look(trainer):
        weight = trainer.lightning_module.conv1.weight
        state = trainer.optimizers[0].state[weight]["momentum_buffer"]
        return weight.detach().clone(), state.clone()

    method, recorder = Turns(0.5, schedule=Iterative(start=2, end=4, events=2, unit="step")), Recorder(look)
    fit([method, recorder], max_epochs=2)
    assert method.regrown == method.report.rows[-1]["prune/regrown"] > 0
    off, grown = method.report.rows[0], method.plan.masks["conv1.weight"]
    assert off["prune/regrown"] == 0
    weight, momentum = recorder.seen[3]
    was_off = recorder.seen[2][0] == 0
    assert int((was_off & grown).sum()) > 100
    assert not weight[was_off & grown].any()
    assert not momentum[was_off & grown].any()
    assert recorder.seen[4][0][was_off & grown].any()
