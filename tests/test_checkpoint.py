import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_prune import (
    Budget,
    Iterative,
    L1Filter,
    Magnitude,
    OneShot,
    Plan,
    PrunableModule,
    PrunedCheckpoint,
    TaylorWeight,
    count,
    load_pruned,
)
from lightning_prune.checkpoint import KEY, add_plan, conform_on_load, plan_of, take_shapes
from lightning_prune.errors import IncompatibleCheckpoint

AT_3 = OneShot(3, unit="step")
IN_STEPS = Iterative(start=3, end=7, events=2, unit="step")  # once in each epoch of 4 steps
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def differing(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.fixture
def saved(fit, save_each, tmp_path):
    """A folder with ``epoch=0.ckpt``, cut once, and ``epoch=1.ckpt``, cut twice, and the trained model."""
    callback = L1Filter(0.4, schedule=IN_STEPS)
    trainer = fit([callback, save_each()])
    return tmp_path, trainer.lightning_module, callback


def test_load_pruned_gives_the_module_with_its_shapes_weights_and_class(saved, tiny_net):
    folder, model, _ = saved
    loaded = load_pruned(tiny_net, folder / "epoch=1.ckpt")
    assert type(loaded) is tiny_net
    assert shapes(loaded) == shapes(model)
    assert differing(model.state_dict(), loaded.state_dict()) == []
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert loaded.conv2.in_channels == loaded.conv1.out_channels == loaded.norm1.num_features < 12
    assert count(loaded, X) == count(model, X)


def test_load_pruned_says_what_comes_first(tiny_net, tmp_path):
    with pytest.raises(TypeError, match=r"the module's class first, then the path, got str: load_pruned\(MyModule"):
        load_pruned(str(tmp_path / "best.ckpt"), tiny_net())


def test_load_pruned_takes_arguments_and_hyper_parameters(fit, save_each, tiny_net, tmp_path):
    trainer = fit([L1Filter(0.5, schedule=AT_3), save_each()], model=tiny_net(width=4))
    loaded = load_pruned(tiny_net, tmp_path / "epoch=1.ckpt", map_location="cpu", optimizer="adam")
    assert loaded.optimizer == "adam"
    assert shapes(loaded) == shapes(trainer.lightning_module)


def test_load_pruned_reads_a_dense_checkpoint_too(fit, save_each, tiny_net, tmp_path):
    trainer = fit(save_each())
    loaded = load_pruned(tiny_net, tmp_path / "epoch=1.ckpt")
    assert differing(trainer.lightning_module.state_dict(), loaded.state_dict()) == []


def test_prunable_module_loads_by_itself(fit, save_each, tiny_net, tmp_path):
    class Net(PrunableModule, tiny_net):
        seen = None

    trainer = fit([L1Filter(0.5, schedule=AT_3), save_each()], model=Net())
    loaded = Net.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert shapes(loaded) == shapes(trainer.lightning_module)
    assert differing(trainer.lightning_module.state_dict(), loaded.state_dict()) == []
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny_net.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True)


def test_prunable_module_calls_the_hook_of_its_base(saved, tiny_net):
    class Base(tiny_net):
        seen = ()

        def on_load_checkpoint(self, checkpoint):
            self.seen = tuple(self.conv1.weight.shape)

    class Net(PrunableModule, Base):
        pass

    folder, model, _ = saved
    assert Net.load_from_checkpoint(folder / "epoch=1.ckpt", weights_only=True).seen == model.conv1.weight.shape


def test_test_with_the_best_checkpoint_after_the_fit(fit, make_loader, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    callback = L1Filter(0.5, schedule=AT_3)
    trainer = fit([callback, saver])
    result = trainer.test(ckpt_path="best", dataloaders=make_loader(8, seed=1), verbose=False, weights_only=True)[0]
    assert result["test_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-5)


def test_less_cut_checkpoint_grows_the_model_again(saved, tiny_net, make_trainer, make_loader):
    folder, model, _ = saved
    once = torch.load(folder / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert len(once["conv1.weight"]) > model.conv1.out_channels
    trainer = make_trainer(L1Filter(0.4, schedule=IN_STEPS))
    trainer.test(model, make_loader(8), ckpt_path=folder / "epoch=0.ckpt", verbose=False, weights_only=True)
    assert differing(once, model.state_dict()) == []
    assert model.conv1.out_channels == len(once["conv1.weight"])
    assert torch.equal(model.eval()(X), load_pruned(tiny_net, folder / "epoch=0.ckpt").eval()(X))


def test_dense_checkpoint_of_the_same_run_grows_the_model_again(fit, save_each, make_loader, tmp_path):
    trainer = fit([L1Filter(0.5, schedule=AT_3), save_each(steps=True)])
    model = trainer.lightning_module
    assert model.conv1.out_channels < 12
    trainer.test(model, make_loader(8), ckpt_path=tmp_path / "step=2.ckpt", verbose=False, weights_only=True)
    assert (model.conv1.out_channels, model.norm1.num_features, model.conv2.in_channels) == (12, 12, 12)
    trainer.test(model, make_loader(8), ckpt_path=tmp_path / "step=5.ckpt", verbose=False, weights_only=True)
    assert model.conv1.out_channels < 12


def test_fit_goes_on_from_a_half_pruned_checkpoint(saved, fit, tiny_net):
    folder, model, callback = saved
    resumed = L1Filter(0.4, schedule=IN_STEPS)
    trainer = fit(resumed, model=tiny_net(), ckpt_path=folder / "epoch=0.ckpt")
    assert shapes(trainer.lightning_module) == shapes(model)
    assert resumed.plan == callback.plan
    assert resumed.dense_cost == callback.dense_cost
    assert [row["step"] for row in resumed.report.rows] == [3, 7]


def test_fit_goes_on_from_what_model_checkpoint_wrote_at_validation(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path / "a", "{epoch}", save_top_k=-1, every_n_epochs=1, save_last="link")
    whole = fit([L1Filter(0.4, schedule=IN_STEPS), saver], max_epochs=3)
    saver = ModelCheckpoint(tmp_path / "a", "{epoch}", save_top_k=-1, every_n_epochs=1, save_last="link")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        again = fit([L1Filter(0.4, schedule=IN_STEPS), saver], max_epochs=3, ckpt_path=tmp_path / "a" / "epoch=0.ckpt")
    assert differing(whole.lightning_module.state_dict(), again.lightning_module.state_dict()) == []


def test_checkpoint_without_a_plan_is_read_by_its_shapes(saved, tiny_net):
    folder, model, _ = saved
    checkpoint = torch.load(folder / "epoch=1.ckpt", weights_only=True)
    del checkpoint[KEY]
    fresh = tiny_net()
    take_shapes(fresh, checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(fresh.eval()(X), model.eval()(X))


def test_masks_survive_a_checkpoint(fit, save_each, tmp_path):
    whole = Magnitude(0.2, schedule=AT_3)
    trainer = fit([whole, save_each()])
    again = Magnitude(0.2, schedule=AT_3)
    resumed = fit(again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again.plan == whole.plan
    for name, mask in again.plan.masks.items():
        assert resumed.lightning_module.state_dict()[name][~mask].count_nonzero() == 0
    assert differing(trainer.lightning_module.state_dict(), resumed.lightning_module.state_dict()) == []


def test_masked_channels_resume(fit, save_each, tmp_path):
    settings = {"schedule": IN_STEPS, "apply": "mask"}
    whole, again = TaylorWeight(0.4, **settings), TaylorWeight(0.4, **settings)
    trainer = fit([whole, save_each()])
    resumed = fit(again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again.plan == whole.plan
    assert differing(trainer.lightning_module.state_dict(), resumed.lightning_module.state_dict()) == []


@pytest.mark.parametrize("fresh", [True, False], ids=["dense", "cut"])
def test_checkpoint_of_another_architecture_is_refused_before_anything_changes(saved, tiny_net, make_trainer, fresh):
    class Other(tiny_net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(3, 3)

    folder, model, _ = saved
    other = Other()
    if not fresh:
        take_shapes(other, {"state_dict": {**other.state_dict(), **model.state_dict()}})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(IncompatibleCheckpoint, match=r"not of a Other: it lacks \['extra.weight', 'extra.bias'\]"):
        make_trainer(L1Filter(0.4)).test(other, ckpt_path=folder / "epoch=1.ckpt", weights_only=True)
    assert shapes(other) == {name: tuple(value.shape) for name, value in before.items()}
    assert differing(before, other.state_dict()) == []


@pytest.mark.parametrize("method", [L1Filter, Magnitude])
def test_checkpoint_of_another_width_is_refused(fit, save_each, tiny_net, tmp_path, method):
    fit([method(0.5, schedule=AT_3), save_each()], model=tiny_net(width=8))
    model = tiny_net(width=6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IncompatibleCheckpoint, match="has shape"):
        fit(method(0.5, schedule=AT_3), model=model, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert differing(before, model.state_dict()) == []
    with pytest.raises(IncompatibleCheckpoint, match="has shape"):
        load_pruned(tiny_net, tmp_path / "epoch=0.ckpt", width=4)


def test_load_pruned_of_no_file_says_so(tiny_net, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pruned(tiny_net, tmp_path / "none.ckpt")


def test_plans_of_several_callbacks_are_merged():
    def plan(*kept):
        return Plan(kept={"fc.weight": {0: torch.tensor(kept)}}, shapes={"fc.weight": (4, 3)})

    checkpoint = {}
    add_plan(checkpoint, "a", plan(0, 1, 2))
    add_plan(checkpoint, "b", plan(1, 2, 3))
    assert plan_of(checkpoint).kept["fc.weight"][0].tolist() == [1, 2]
    assert plan_of({}) is None


@pytest.mark.parametrize("entry", [7, {"plans": 3}, {"plans": {"a": 1}}])
def test_entry_that_is_no_plan_is_refused(entry):
    with pytest.raises(IncompatibleCheckpoint):
        plan_of({KEY: entry})


AVERAGING = vars(pl.callbacks).get("EMAWeightAveraging")
needs_averaging = pytest.mark.skipif(AVERAGING is None, reason="this Lightning has no EMAWeightAveraging")


@needs_averaging
@pytest.mark.parametrize("first", [True, False], ids=["pruner first", "average first"])
def test_average_of_the_weights_follows_the_cut(fit, tiny_net, save_each, tmp_path, first):
    averaging, callback = AVERAGING(decay=0.5), L1Filter(0.4, schedule=IN_STEPS)
    order = [callback, averaging] if first else [averaging, callback]
    trainer = fit([*order, save_each()], max_epochs=3)
    model = trainer.lightning_module
    assert shapes(averaging._average_model.module) == shapes(model)
    again = [L1Filter(0.4, schedule=IN_STEPS), AVERAGING(decay=0.5)]
    resumed = fit(again if first else again[::-1], max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert differing(model.state_dict(), resumed.lightning_module.state_dict()) == []
    loaded = load_pruned(tiny_net, tmp_path / "epoch=2.ckpt")  # holds the average, which the fit ends with
    assert differing(model.state_dict(), loaded.state_dict()) == []


@needs_averaging
@pytest.mark.parametrize("method", [Magnitude, TaylorWeight])
def test_average_of_the_weights_brings_nothing_back_under_a_mask(fit, method):
    callback = method(0.4, schedule=AT_3, **({"apply": "mask"} if method is TaylorWeight else {}))
    trainer = fit([AVERAGING(decay=0.9), callback])
    for name, mask in callback.plan.masks.items():
        assert trainer.lightning_module.state_dict()[name][~mask].count_nonzero() == 0


def test_checkpoint_of_a_second_fit_loads_into_a_dense_model(fit, save_each, tiny_net, tmp_path):
    model = fit(L1Filter(0.6, schedule=AT_3)).lightning_module
    fit([L1Filter(0.6, schedule=AT_3), save_each()], model=model)
    loaded = load_pruned(tiny_net, tmp_path / "epoch=1.ckpt")
    assert differing(model.state_dict(), loaded.state_dict()) == []
    assert torch.equal(loaded.eval()(X), model.eval()(X))


def test_copy_of_the_module_takes_neither_the_trainer_nor_the_hook(tiny_net):
    class Held(pl.Trainer):
        def __deepcopy__(self, memo):
            raise AssertionError("the trainer was copied with the module")

    model = tiny_net()
    handle = conform_on_load(Held(logger=False, accelerator="cpu", enable_checkpointing=False), model)
    other = copy.deepcopy(model)
    smaller = {name: value[:4] if name == "hidden.bias" else value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for hidden.bias"):
        other.load_state_dict(smaller)
    assert model.hidden.bias.shape == (12,)  # the hook of the copy does not reach back
    handle.remove()


class Metrics(Callback):
    """Stands for a pruner: says what each epoch's metrics are."""

    def __init__(self, flops_kept, score):
        self.flops_kept, self.score = flops_kept, score

    def on_validation_epoch_end(self, trainer, model):
        if not trainer.sanity_checking:
            model.log("prune/flops_kept", self.flops_kept[trainer.current_epoch])
            model.log("score", self.score[trainer.current_epoch])


def test_pruned_checkpoint_ranks_only_what_is_within_the_budget(fit, tmp_path):
    # the best score is of an epoch that keeps too much
    metrics = Metrics([1.0, 0.6, 0.5, 0.4], [9.0, 8.0, 3.0, 2.0])
    saver = PrunedCheckpoint(max_flops_kept=0.5, dirpath=tmp_path, filename="{epoch}", monitor="score", mode="max")
    fit([metrics, saver], max_epochs=4)
    assert saver.best_model_path.endswith("epoch=2.ckpt")
    assert float(saver.best_model_score) == 3.0


def test_pruned_checkpoint_bounds_density(fit, tmp_path):
    saver = PrunedCheckpoint(max_density=0.2, dirpath=tmp_path, filename="{epoch}", monitor="val_loss")
    callback = Magnitude(Budget(0.2), schedule=OneShot(6, unit="step"))
    fit([callback, saver])
    assert saver.best_model_path.endswith("epoch=1.ckpt")


def test_pruned_checkpoint_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="needs max_flops_kept= or max_density="):
        PrunedCheckpoint(monitor="val_loss")


def test_hook_is_gone_after_every_stage(saved, make_trainer, make_loader):
    _, model, _ = saved
    before = len(model._load_state_dict_pre_hooks)
    trainer = make_trainer(L1Filter(0.4))
    trainer.validate(model, make_loader(8), verbose=False)
    trainer.test(model, make_loader(8), verbose=False)
    assert len(model._load_state_dict_pre_hooks) == before == 0


def test_two_loads_into_one_process_do_not_touch_each_other(saved, tiny_net):
    folder, _, _ = saved
    first, second = (load_pruned(tiny_net, folder / f"epoch={i}.ckpt") for i in (0, 1))
    assert first.conv1.out_channels > second.conv1.out_channels
    assert tiny_net().conv1.out_channels == 12
    assert isinstance(first, pl.LightningModule)


ENDS = {"nothing": slice(0), "two bytes": slice(2), "a third": slice(5000), "all but a byte": slice(-1)}


@pytest.fixture(params=ENDS.values(), ids=ENDS)
def torn(request, saved):
    """The folder of `saved`, with ``epoch=1.ckpt`` torn, as a file system without atomic renames leaves it."""
    folder, _, _ = saved
    file = folder / "epoch=1.ckpt"
    file.write_bytes(file.read_bytes()[request.param])
    return file


def test_torn_checkpoint_is_refused_with_its_name_and_the_one_before_it_works(torn, fit, tiny_net, make_trainer):
    message = rf"{torn} is not a whole checkpoint: {torn.stat().st_size} bytes .* epoch=0.ckpt is the newest whole one"
    with pytest.raises(IncompatibleCheckpoint, match=message):
        load_pruned(tiny_net, torn)
    model, callback = tiny_net(), L1Filter(0.4, schedule=IN_STEPS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IncompatibleCheckpoint, match=message):
        fit([callback, Magnitude(0.5, ignore="stem")], model=model, ckpt_path=torn)
    with pytest.raises(IncompatibleCheckpoint, match=message):
        make_trainer(callback).test(model, ckpt_path=torn, weights_only=True)
    assert differing(before, model.state_dict()) == []
    again = fit(callback, model=model, ckpt_path=torn.with_stem("epoch=0"))
    assert callback.events_done == 2
    assert again.global_step == 8
    load_pruned(tiny_net, torn.with_stem("epoch=0"))


def test_torn_checkpoint_alone_in_its_folder_is_refused_too(fit, tmp_path):
    file = tmp_path / "alone" / "last.ckpt"
    file.parent.mkdir()
    file.write_bytes(b"PK\3\4 and no more")
    file.with_stem("notes").write_text("no checkpoint, but not torn either")
    with pytest.raises(IncompatibleCheckpoint, match=r"last.ckpt is not a whole checkpoint.*use the one before it$"):
        fit(L1Filter(0.4), ckpt_path=file)


def test_whole_file_that_is_refused_for_another_reason_is_not_called_torn(saved, fit, tiny_net):
    folder, _, _ = saved
    other = folder / "other.ckpt"
    torch.save({"state_dict": {}, "code": copy.copy}, other)
    for load in (lambda: load_pruned(tiny_net, other), lambda: fit(L1Filter(0.4), ckpt_path=other)):
        with pytest.raises(Exception, match=r"copy\.copy was not an allowed global"):
            load()
    with pytest.raises(FileNotFoundError):
        fit(L1Filter(0.4), ckpt_path=folder / "none.ckpt")


@pytest.mark.parametrize("fails", [True, False])
def test_strategy_loads_as_before_once_a_stage_has_ended(saved, tiny_net, make_trainer, make_loader, fails):
    folder, _, _ = saved
    trainer = make_trainer([L1Filter(0.4, schedule=IN_STEPS), Magnitude(0.5, ignore="stem")])
    file = folder / "epoch=1.ckpt"
    if fails:
        file.write_bytes(b"")
        with pytest.raises(IncompatibleCheckpoint):
            trainer.validate(tiny_net(), make_loader(8), ckpt_path=file, weights_only=True)
    else:
        trainer.validate(tiny_net(), make_loader(8), ckpt_path=file, verbose=False, weights_only=True)
    assert "load_checkpoint" not in vars(trainer.strategy)


def test_load_draws_no_random_number_for_what_the_checkpoint_holds(saved, tiny_net):
    folder, model, _ = saved
    before = torch.get_rng_state()
    loaded = load_pruned(tiny_net, folder / "epoch=1.ckpt")
    assert torch.equal(torch.get_rng_state(), before)
    assert differing(model.state_dict(), loaded.state_dict()) == []


def test_load_draws_what_the_checkpoint_leaves_out(saved, tiny_net):
    class WithoutHead(tiny_net):
        strict_loading = False

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if not n.startswith("fc")}

    folder, model, _ = saved
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not in the checkpoint"):  # Lightning's own
        loaded = load_pruned(WithoutHead, folder / "epoch=1.ckpt")
    assert differing(model.state_dict(), loaded.state_dict()) == ["fc.weight", "fc.bias"]
    assert loaded.fc.weight.count_nonzero() == model.fc.weight.numel()  # drawn, and neither zero nor left over
    assert float(loaded.fc.weight.detach().abs().max()) <= 12**-0.5  # as nn.Linear draws for 12 inputs


def test_load_draws_what_a_module_does_not_call_its_state(saved, tiny_net):
    class Adapter(tiny_net):
        strict_loading = False

        def state_dict(self, *args, **settings):
            return {n: t for n, t in super().state_dict(*args, **settings).items() if not n.startswith("fc")}

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if not n.startswith("fc")}

        def load_state_dict(self, state_dict, **settings):
            return super(tiny_net, self).load_state_dict(state_dict, strict=False)

    folder, model, _ = saved
    with pytest.warns(UserWarning, match="not in the checkpoint"):  # Lightning's own
        loaded = load_pruned(Adapter, folder / "epoch=1.ckpt")
    assert torch.equal(loaded.hidden.weight, model.hidden.weight)
    assert loaded.fc.weight.count_nonzero() == model.fc.weight.numel()


def test_load_takes_a_network_that_looks_at_its_first_values(saved, tiny_net):
    class Careful(tiny_net):
        def __init__(self, **settings):
            super().__init__(**settings)
            if not self.fc.weight.std() > 0:
                raise ValueError("all weights are equal")

    folder, model, _ = saved
    loaded = load_pruned(Careful, folder / "epoch=1.ckpt")
    assert differing(model.state_dict(), loaded.state_dict()) == []


def test_file_holds_a_plan_once_and_indices_of_a_group_once(saved):
    folder, _, callback = saved
    checkpoint = torch.load(folder / "epoch=1.ckpt", weights_only=True)
    plan, own = checkpoint[KEY]["plans"][callback.state_key], checkpoint["callbacks"][callback.state_key]["plan"]
    kept = plan["kept"]
    assert kept["conv1.weight"]["0"].data_ptr() == own["kept"]["conv1.weight"]["0"].data_ptr()
    assert kept["conv1.weight"]["0"].data_ptr() == kept["norm1.bias"]["0"].data_ptr()
    assert kept["conv1.weight"]["0"].data_ptr() == plan["buffers"]["norm1.running_mean"]["0"].data_ptr()
    assert Plan.from_state_dict(plan) == callback.plan
