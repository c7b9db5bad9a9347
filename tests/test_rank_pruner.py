import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_prune import L1Filter, OneShot, Plan, PrunableModule, RankPruner, count, load_pruned, trace
from lightning_prune.errors import NonFiniteScore, NothingToPrune, UnmeetableBudget
from lightning_prune.factorise import is_pair, matrix_of
from lightning_prune.rank_pruner import MatrixSize, rank_of
from lightning_prune.schedule import Updates

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
AT_3 = OneShot(3, unit="step")
AVERAGING = vars(pl.callbacks).get("EMAWeightAveraging")


class Truncate(RankPruner):
    """The simplest method there can be: smaller singular values go, after each epoch."""

    default_schedule = Updates(every=1, unit="epoch", end=1.0, least=1, closing=True)

    def project(self, view, rank):
        left, sigma, right = torch.linalg.svd(view.matrix, full_matrices=False)
        return (left[:, :rank] * sigma[:rank]) @ right[:rank], sigma


class Watch(Callback):
    """What the network computes when training ends, and the rank of each layer after each batch."""

    def __init__(self, *layers):
        self.layers, self.ranks, self.out = layers, [], None

    def on_train_batch_end(self, trainer, model, *_):
        self.ranks.append([rank(model.get_submodule(name)) for name in self.layers])

    def on_train_end(self, trainer, model):
        model.eval()
        with torch.no_grad():
            self.out = model(X.to(model.device))


def rank(layer):
    sigma = torch.linalg.svdvals(matrix_of(layer).double())
    return int((sigma > 1e-5 * sigma[0]).sum())


def same(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])] == []


def planned(callback, model):
    return callback.plan_for(trace(model, model.example_input_array)).ranks


def test_rank_is_the_whole_part_of_what_a_goal_leaves():
    assert [rank_of(0.8, n) for n in (3, 16, 32, 64)] == [1, 3, 6, 12]  # 0.6 of a value is one
    assert rank_of(0, 7) == 7


@pytest.mark.parametrize("goal", [1, -0.1, float("nan"), True, "most"])
def test_goal_outside_its_range_is_refused(goal):
    with pytest.raises(ValueError, match=r"goal must be in \[0, 1\)"):
        Truncate(goal=goal)


def test_size_of_two_layers():
    size = MatrixSize(outs=6, fan_in=9, places=64)
    # a rank costs 6 + 9 where the whole costs 54: three pay, the fourth does not
    assert [size.left(r) for r in (1, 3, 4, 6)] == [15, 45, 54, 54]
    assert [size.pays(r) for r in (1, 3, 4, 6)] == [True, True, False, False]
    assert size.values == 6


def test_shipped_network_computes_what_the_projected_one_did(fit):
    callback, watch = Truncate(0.4), Watch()
    model = fit([callback, watch]).lightning_module
    assert {name for name, module in model.named_modules() if is_pair(module)} == set(callback.plan.ranks)
    assert torch.allclose(model.eval()(X), watch.out, atol=1e-5)


def test_cost_is_of_the_factorised_network_to_the_unit_and_by_layer(fit):
    callback = Truncate(0.4)
    model = fit(callback).lightning_module
    counted = count(model, model.example_input_array)
    assert counted == callback.report.after
    assert {name: dict(row) for name, row in counted.by_layer.items()} == callback.report.after.by_layer
    assert callback.report.rows[-1]["prune/flops"] == counted.flops
    assert callback.report.rows[-1]["prune/params_kept"] == counted.params / callback.dense_cost.params


@pytest.mark.parametrize("of", ["flops", "params", "units"])
@pytest.mark.parametrize("keep", [0.3, 0.45, 0.6, 0.8])
def test_budget_is_met_from_below_and_no_single_rank_more_fits(tiny_net, of, keep):
    callback, model = Truncate({"keep": keep, "of": of}), tiny_net(width=8)
    ranks = planned(callback, model)
    dense = callback.dense_cost

    def measured(ranks):
        if of == "units":
            return sum(ranks.get(name, size.values) for name, size in callback._sizes.items())
        total = dense.flops if of == "flops" else dense.params
        for name, r in ranks.items():
            size = callback._sizes[name]
            saved = size.outs * size.fan_in - r * (size.outs + size.fan_in)
            total -= saved * (size.places if of == "flops" else 1)
        return total

    bound = keep * measured({})
    assert measured(ranks) <= bound
    for name, r in ranks.items():
        size = callback._sizes[name]
        more = {**ranks, name: r + 1}
        if not size.pays(r + 1):
            del more[name]
        assert measured(more) > bound


def test_layers_keep_one_common_fraction(tiny_net):
    model = tiny_net(width=24)
    callback = Truncate(0.4)
    ranks = planned(callback, model)
    # of 48 and 24 singular values; the small layers may have got what a rank of the large ones would exceed
    assert abs(ranks["conv1"] / 48 - ranks["conv2"] / 24) <= 1 / 24
    assert ranks["conv1"] > ranks["conv2"]


def test_layer_has_a_fraction_of_its_own(tiny_net):
    ranks = planned(Truncate(0.5, keep={"conv2": 0.5}), tiny_net())
    assert ranks["conv2"] == 3  # of six
    with pytest.raises(ValueError, match=r"keep= names layer 'fc', .*: it makes the model's output"):
        planned(Truncate(0.5, keep={"fc": 0.5}), tiny_net())


def test_min_rank_is_the_least(tiny_net):
    assert min(planned(Truncate(0.3), tiny_net()).values()) == 1
    assert min(planned(Truncate(0.5, min_rank=2), tiny_net()).values()) == 2


@pytest.mark.parametrize("of", ["flops", "params", "units"])
def test_unmeetable_budget_says_the_smallest_that_can_be_met(tiny_net, of):
    with pytest.raises(UnmeetableBudget, match=r"smallest ranks allowed 0\.\d{4} are left") as caught:
        planned(Truncate({"keep": 0.01, "of": of}), tiny_net())
    smallest = float(str(caught.value).split("allowed ")[1].split(" ")[0])
    assert set(planned(Truncate({"keep": smallest, "of": of}), tiny_net()).values()) == {1}
    with pytest.raises(UnmeetableBudget):
        planned(Truncate({"keep": round(smallest - 0.001, 4), "of": of}), tiny_net())


def test_ranks_by_hand_are_taken_as_they_are(fit):
    callback = Truncate(ranks={"conv1": 4, "hidden": 2})
    model = fit(callback).lightning_module
    assert callback.plan == Plan(ranks={"conv1": 4, "hidden": 2})
    assert [model.conv1[0].out_channels, model.hidden[0].out_features] == [4, 2]
    assert type(model.conv2) is nn.Conv2d


def test_goal_leaves_whole_what_would_not_get_cheaper(tiny_net):
    # stem 6 x 9: rank 6 - 1.8 = 4 costs 60, more than 54; conv1 12 x 54: 8 costs 528 of 648
    ranks = planned(Truncate(goal=0.3), tiny_net())
    # conv2 6 x 108: 4 cost 456 of 648; hidden 12 x 6: 4 cost as much as its 72
    assert ranks == {"conv1": 8, "conv2": 4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs one of a budget, .* got none"),
        ({"budget": 0.5, "goal": 0.5}, "got a budget and goal="),
        ({"goal": 0.5, "ranks": {"a": 1}}, "got goal= and ranks="),
        ({"ranks": {"a": 0}}, "rank of layer 'a' must be an int of at least 1, got 0"),
        ({"ranks": {"a": 1.5}}, "rank of layer 'a' must be an int"),
        ({"budget": 0.5, "keep": {"a": 0.0}}, r"keep of layer 'a' must be in \(0, 1\]"),
        ({"budget": 0.5, "min_rank": 0}, "min_rank must be an int of at least 1, got 0"),
        ({"budget": 0.5, "scope": "global"}, "scope must be one of 'uniform', got 'global'"),
        ({"goal": 0.5, "min_rank": 2}, "keep= and min_rank= .* goal= needs no budget"),
        ({"ranks": {"a": 1}, "keep": {"a": 0.5}}, "keep= and min_rank= .* ranks= needs no budget"),
    ],
)
def test_bad_arguments_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Truncate(**settings)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"other": 2}, "ranks= names layer 'other', which cannot become two: layers are stem, conv1, conv2, hidden"),
        ({"fc": 2}, "ranks= names layer 'fc', .* it makes the model's output"),
        ({"stem": 4}, "gives layer 'stem' rank 4, .* 6 x 9 matrix; give it at most 3"),
    ],
)
def test_impossible_ranks_are_refused_before_training(fit, tiny_net, ranks, words):
    model = tiny_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        fit(Truncate(ranks=ranks), model=model)
    assert same(before, model.state_dict())


def test_classifier_is_projected_if_asked(tiny_net):
    model = tiny_net()
    assert "fc" not in planned(Truncate(goal=0.6), model)
    assert planned(Truncate(goal=0.6, classifier=True), model)["fc"] == 1


def test_layers_left_whole_have_their_reason(fit, tiny_net):
    class Net(tiny_net):
        def __init__(self):
            super().__init__()
            self.hidden.weight.requires_grad_(False)
            self.spare = nn.Linear(6, 6)
            self.narrow = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return super().forward(self.narrow(x))

    callback = Truncate(goal=0.5, ignore=["conv2"])
    fit(callback, model=Net())
    assert set(callback.plan.ranks) == {"stem", "conv1"}
    assert callback.report.frozen == {
        "hidden": "its weight is not trained",
        "fc": "it makes the model's output (classifier=True takes it)",
        "spare": "the example input does not reach it",
        "narrow": "two layers would cost as much at any rank",
        "conv2": "it is ignored",
    }


def test_layer_that_the_model_asks_something_stays_whole(fit, tiny_net):
    class Asks(tiny_net):
        def forward(self, x):
            return super().forward(x) * self.conv1.out_channels / 12

    callback = Truncate(goal=0.5)
    model = fit(callback, model=Asks()).lightning_module
    assert type(model.conv1) is nn.Conv2d
    assert "'_TwoLayers' object has no attribute 'out_channels'" in callback.report.frozen["conv1"]
    assert "conv2" in callback.plan.ranks


def test_model_without_a_layer_to_factorise_says_why(fit):
    with pytest.raises(
        NothingToPrune, match="no layer of TinyNet may become two: stem: it is ignored; conv1: it is ign"
    ):
        fit(Truncate(0.5, ignore=["stem", "conv*", "hidden"]))


def test_projections_come_after_each_epoch_and_training_is_free_between(fit):
    callback, watch = Truncate(ranks={"conv1": 4}), Watch("conv1")
    fit([callback, watch], max_epochs=3)
    assert [event.step for event in callback.events] == [4, 8, 12]
    assert [ranks for (ranks,) in watch.ranks] == [12, 12, 12, 4] * 3


def test_projections_come_every_so_many_steps(fit):
    schedule = Updates(every=3, unit="step", end=1.0, least=1, closing=True)
    callback, watch = Truncate(ranks={"conv1": 4}, schedule=schedule), Watch("conv1")
    fit([callback, watch])
    assert [number + 1 for number, (r,) in enumerate(watch.ranks) if r == 4] == [3, 6, 8]


def test_short_fits_are_projected_within_epochs_whose_ends_stay_events():
    # 3 epochs of 17 steps: 10 events are one every 5.1 steps, and 4 an epoch one every 4.25
    events = [event.step for event in RankPruner.default_schedule.resolve(51, 17)]
    assert events == [4, 8, 13, 17, 21, 26, 30, 34, 38, 42, 47, 51]
    assert [event.step for event in RankPruner.default_schedule.resolve(50 * 17, 17)] == list(range(17, 851, 17))


def test_accumulated_batches_are_one_step(fit):
    callback, watch = Truncate(ranks={"conv1": 4}), Watch("conv1")
    fit([callback, watch], accumulate_grad_batches=3)  # four batches make two steps
    assert [event.step for event in callback.events] == [2, 4]
    assert [ranks for (ranks,) in watch.ranks] == [12, 12, 12, 4, 4, 4, 12, 4]  # the third and the fourth batch step


def test_parameters_and_their_momentum_stay_the_same_objects(fit, tiny_net):
    class Momentum(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            (optimizer,) = trainer.optimizers
            self.now = optimizer.state[model.conv1.weight]["momentum_buffer"].clone()
            self.parameter = model.conv1.weight

    model = tiny_net()
    weight = model.conv1.weight
    first, second = Momentum(), Momentum()
    fit([first, Truncate(0.4, finalize=False), second], model=model)
    assert first.parameter is second.parameter is weight is model.conv1.weight
    assert torch.equal(first.now, second.now)


def test_what_is_validated_and_saved_is_what_was_projected(fit, save_each, tiny_net, tmp_path):
    class AtValidation(Callback):
        ranks = ()

        def on_validation_start(self, trainer, model):
            self.ranks = (*self.ranks, rank(model.conv1))

    watch = AtValidation()
    fit([Truncate(ranks={"conv1": 4}), watch, save_each()])
    assert watch.ranks == (12, 4, 4)  # the first is the sanity check
    assert rank(load_pruned(tiny_net, tmp_path / "epoch=0.ckpt").conv1) == 4


def test_validation_within_an_epoch_says_what_it_is_of(fit, caplog):
    caplog.set_level("INFO")
    fit(Truncate(0.4), val_check_interval=2)
    said = [r.message for r in caplog.records if "has trained on since the projection" in r.message]
    assert len(said) == 1
    assert "at step 6 has trained on since the projection at step 4" in said[0]


def test_training_that_ends_early_projects_once_more_and_says_so(fit):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 6

    callback, watch = Truncate(ranks={"conv1": 4}), Watch()
    with pytest.warns(UserWarning, match="training ended at step 6 after 1 of 3 events; it projects once more"):
        model = fit([Stop(), callback, watch], max_epochs=3).lightning_module
    assert callback.events_done == 1
    assert [row["step"] for row in callback.report.rows] == [4, 6]
    assert is_pair(model.conv1)
    assert torch.allclose(model.eval()(X), watch.out, atol=1e-5)


def test_schedule_that_ends_before_training_does_projects_once_more_without_a_warning(fit):
    callback, watch = Truncate(ranks={"conv1": 4}, schedule=AT_3), Watch("conv1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = fit([callback, watch]).lightning_module
    assert [ranks for (ranks,) in watch.ranks] == [12, 12, 4, 12, 12, 12, 12, 12]
    assert torch.allclose(model.eval()(X), watch.out, atol=1e-5)


@pytest.mark.skipif(AVERAGING is None, reason="this Lightning has no EMAWeightAveraging")
@pytest.mark.parametrize("first", [True, False], ids=["pruner first", "average first"])
def test_average_of_the_weights_is_projected_before_it_is_factorised(fit, tiny_net, tmp_path, first):
    averaging, callback = AVERAGING(decay=0.5), Truncate(0.4)
    trainer = fit([callback, averaging] if first else [averaging, callback])
    model = trainer.lightning_module
    average = averaging._average_model.module
    assert all(is_pair(each.get_submodule(name)) for each in (model, average) for name in callback.plan.ranks)
    assert same(model.state_dict(), average.state_dict())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_pruned(tiny_net, tmp_path / "last.ckpt")
    assert torch.equal(loaded.eval()(X), model.eval()(X))


def test_weights_that_change_after_the_last_projection_are_projected_once_more(fit):
    class Zero(Truncate):
        def project(self, view, rank):
            return torch.zeros_like(view.matrix), torch.linalg.svdvals(view.matrix)

    class Change(Callback):
        def on_train_end(self, trainer, model):
            for layer in (model.conv1, model.hidden):
                nn.init.normal_(layer.weight)
            model.hidden.weight.data[2:] = model.hidden.weight.data[:1]  # still of its rank

    model = fit([Zero(ranks={"conv1": 4, "hidden": 2}), Change()]).lightning_module
    assert matrix_of(model.conv1[1]).count_nonzero() == 0
    assert matrix_of(model.hidden[1]).count_nonzero() > 0


def test_without_finalize_layers_stay_until_asked(fit):
    callback, watch = Truncate(0.4, finalize=False), Watch()
    model = fit([callback, watch]).lightning_module
    assert not any(is_pair(module) for module in model.modules())
    assert torch.equal(model.eval()(X), watch.out)
    assert callback.finalize() is model
    assert count(model, model.example_input_array) == callback.report.after
    assert torch.allclose(model(X), watch.out, atol=1e-5)
    assert callback.finalize(model) is model  # a second time changes nothing
    assert sum(is_pair(module) for module in model.modules()) == len(callback.plan.ranks)


def test_finalize_before_an_event_is_refused(tiny_net):
    with pytest.raises(RuntimeError, match="Truncate factorises what it has projected; fit first, or pass the model"):
        Truncate(0.5).finalize()
    with pytest.raises(RuntimeError, match="fit first"):
        Truncate(0.5).finalize(tiny_net())


def test_best_checkpoint_after_the_fit_is_whole_and_finalize_factorises_it(fit, make_loader, tmp_path):
    saver, callback = ModelCheckpoint(tmp_path, monitor="val_loss"), Truncate(0.4)
    trainer = fit([callback, saver])
    model = trainer.lightning_module
    result = trainer.test(ckpt_path="best", dataloaders=make_loader(8, seed=1), verbose=False, weights_only=True)[0]
    assert result["test_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-5)
    assert type(model.conv1) is nn.Conv2d
    before = model.eval()(X)
    callback.finalize()
    assert torch.allclose(model(X), before, atol=1e-5)


def test_checkpoint_of_the_shipped_network_loads_everywhere(fit, tiny_net, make_trainer, make_loader, tmp_path):
    class Own(PrunableModule, tiny_net):
        pass

    trainer = fit(Truncate(0.4), model=Own())
    model, path = trainer.lightning_module, tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    wanted = model.eval()(X)
    assert torch.equal(load_pruned(tiny_net, path).eval()(X), wanted)
    assert torch.equal(Own.load_from_checkpoint(path, weights_only=True).eval()(X), wanted)
    fresh = tiny_net()
    make_trainer(Truncate(0.4)).test(fresh, make_loader(8), ckpt_path=path, verbose=False, weights_only=True)
    assert torch.equal(fresh.eval()(X), wanted)


def test_longer_fit_goes_on_from_the_shipped_network_as_it_is(fit, tiny_net, tmp_path):
    whole = Truncate(0.4)
    trainer = fit(whole)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Truncate(0.4)
    model = fit(again, model=tiny_net(), max_epochs=4, ckpt_path=tmp_path / "last.ckpt").lightning_module
    assert again.plan == whole.plan
    assert again.dense_cost == whole.dense_cost
    assert count(model, model.example_input_array) == again.report.after == whole.report.after
    assert not torch.equal(model.conv1[0].weight, trainer.lightning_module.conv1[0].weight)


def test_finished_fit_that_is_loaded_again_is_factorised_once(fit, save_each, tiny_net, tmp_path):
    trainer = fit([Truncate(0.4), save_each()])
    again = Truncate(0.4)
    model = fit(again, model=tiny_net(), ckpt_path=tmp_path / "epoch=1.ckpt").lightning_module
    assert same(model.state_dict(), trainer.lightning_module.state_dict())
    assert again.report.after == count(model, model.example_input_array)


def test_second_fit_prunes_the_shipped_network_like_any_other(fit):
    callback = Truncate(0.6)
    model = fit(callback).lightning_module
    now = count(model, model.example_input_array)
    fit(L1Filter(0.7, schedule=AT_3), model=model)
    assert count(model, model.example_input_array).flops <= 0.7 * now.flops


def test_channels_are_cut_first_and_ranks_after(fit, tiny_net, tmp_path):
    model = fit(L1Filter(0.7, schedule=AT_3)).lightning_module
    trainer = fit(Truncate(0.6), model=model)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    loaded = load_pruned(tiny_net, tmp_path / "both.ckpt")
    assert torch.equal(loaded.eval()(X), model.eval()(X))


def test_two_methods_at_once_are_refused(fit):
    with pytest.raises(RuntimeError, match="L1Filter and Truncate cannot go together: one projects whole matrices"):
        fit([L1Filter(0.5), Truncate(0.5)])


class BreakNorm(Callback):
    def on_before_optimizer_step(self, trainer, model, optimizer):
        model.norm1.running_var.fill_(float("nan"))


def test_norms_that_are_not_finite_stop_it(fit):
    with pytest.raises(
        NonFiniteScore, match="Truncate cannot project conv1: the weight, or the norm behind it, is not"
    ):
        fit([Truncate(ranks={"conv1": 4, "hidden": 2}), BreakNorm()])


class BreakLast(Callback):
    def on_train_batch_end(self, trainer, model, *_):
        if trainer.global_step == 7:
            model.norm1.running_var.fill_(float("nan"))


def test_last_projection_that_cannot_be_leaves_the_model_whole_if_asked(fit):
    callback = Truncate(0.5, schedule=AT_3, on_nonfinite="postpone")
    with pytest.warns(UserWarning, match="Truncate leaves every layer whole, and the budget is not met: Truncate can"):
        trainer = fit([BreakLast(), callback], max_steps=7)
    assert not any(is_pair(module) for module in trainer.lightning_module.modules())
    assert callback.plan.is_empty
    assert callback.report.flops_kept == 1
    assert callback.report.rows[-1]["prune/flops_kept"] == 1  # what loggers are left with


def test_nothing_is_projected_when_one_layer_cannot_be(fit, tiny_net):
    model = tiny_net()
    watch = Watch("hidden")
    with pytest.raises(NonFiniteScore):
        fit([BreakNorm(), Truncate(ranks={"hidden": 2, "conv1": 4}), watch], model=model)
    assert rank(model.hidden) == 6


def test_hook_of_the_user_goes_on_seeing_the_layer(fit, tiny_net):
    model, seen = tiny_net(), []
    handle = model.conv1.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    fit(Truncate(0.4), model=model)
    assert is_pair(model.conv1)
    seen.clear()
    model(X)
    assert seen == [(4, 12, 8, 8)]
    handle.remove()
    model(X)
    assert len(seen) == 1


def test_hooks_on_the_state_dict_that_came_during_the_fit_leave_layers_whole(fit):
    class Hooking(Callback):
        def on_train_end(self, trainer, model):
            model.conv1.register_state_dict_pre_hook(lambda *_: None)

    with pytest.warns(
        UserWarning, match=r"leaves layers projected, but whole: layer 'conv1' .* hooks on its state dict"
    ):
        model = fit([Truncate(0.4), Hooking()]).lightning_module
    assert rank(model.conv1) < 12


def test_callback_travels_between_processes_and_copies(fit):
    callback = Truncate(0.4)
    fit(callback)
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert other.plan == callback.plan
        with pytest.raises(RuntimeError, match="fit first, or pass the model"):
            other.finalize()


def test_state_key_tells_ranks_apart():
    keys = {
        Truncate(0.5).state_key, Truncate(0.4).state_key, Truncate(0.5, keep={"a": 0.5}).state_key,
        Truncate(0.5, min_rank=2).state_key, Truncate(0.5, classifier=True).state_key,
        Truncate(goal=0.5).state_key, Truncate(ranks={"a": 1}).state_key,
    }  # fmt: skip
    assert len(keys) == 7
    assert Truncate(0.5).state_key in keys


def test_logs_ranks_and_units(fit, tmp_path):
    callback = Truncate(ranks={"conv1": 4, "hidden": 2})
    fit(callback, logger=CSVLogger(tmp_path, name="", version=""))
    row = callback.report.rows[-1]
    assert [row[f"prune/rank/{name}"] for name in ("stem", "conv1", "conv2", "hidden")] == [6, 4, 6, 2]
    assert row["prune/density"] == pytest.approx((6 + 4 + 6 + 2) / (6 + 12 + 6 + 6))
    assert "prune/rank/conv1" in (tmp_path / "metrics.csv").read_text()


def test_gains_are_in_eval_mode_and_signed(fit):
    class Spy(Truncate):
        gains = ()

        def project(self, view, rank):
            self.gains = (*self.gains, (view.name, view.gain))
            return super().project(view, rank)

    callback = Spy(0.4, finalize=False)
    model = fit(callback, max_epochs=1).lightning_module
    gains = dict(callback.gains)
    norm = model.norm2
    assert torch.allclose(gains["conv2"], (norm.weight / (norm.running_var + norm.eps).sqrt()).double(), rtol=1e-5)
    assert gains.get("hidden") is None


def test_shared_batch_of_the_trial_leaves_norms_and_random_state(fit, tiny_net, make_loader):
    class Dropping(tiny_net):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.2, self.training))

    class First(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                self.state, self.random = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    runs = []
    for callbacks in ([], [Truncate(0.4)]):
        pl.seed_everything(0, verbose=False)
        first = First()
        fit([first, *callbacks], model=Dropping(), loader=make_loader(shuffle=True))
        runs.append(first)
    assert same(runs[0].state, runs[1].state)
    assert torch.equal(runs[0].random, runs[1].random)
