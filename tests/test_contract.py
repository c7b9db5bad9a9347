"""What every method keeps to, built from a budget alone. A new method is found by itself."""

import csv
from collections.abc import Mapping

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.modules import module as torch_module

from lightning_prune import Budget, OneShot, count, trace
from lightning_prune.methods import discover

METHODS = {name: cls for name, cls in discover().items() if cls.kind != "control"}
KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}
OWN = {"channels": "prune/channels/conv1", "weights": "prune/density/conv1.weight", "ranks": "prune/rank/conv1"}
ROW = ("flops", "flops_kept", "params", "params_kept", "density", "flops_sparse", "event", "seconds")

pytestmark = [
    # A net of a thousand weights reaches its budget before the last step of a fine schedule.
    pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing"),
    # It has little to spare, and 32 samples say little of it.
    pytest.mark.filterwarnings("ignore:Hierarchical. the (budget|redundancy)"),
]


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


def make(method, **settings):
    return method(Budget(KEEP[method.kind]), **settings)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: Mapping, second: Mapping):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks there are, of every sort, on modules, on parameters and on all modules at once."""
    counts = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "hooks" in key and key.startswith("_"):
                counts[f"{name}.{key}"] = len(value)
    for name, parameter in model.named_parameters():
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            counts[f"{name}.{key}"] = len(getattr(parameter, key) or ())
    for key in [key for key in vars(torch_module) if key.startswith("_global_") and "hooks" in key]:
        value = getattr(torch_module, key)
        counts[key] = len(value) if isinstance(value, Mapping) else 0
    return counts


def test_trains_and_meets_its_budget(method, fit, tiny_net):
    callback = make(method)
    trainer = fit(callback, max_epochs=3)
    model = trainer.lightning_module
    fresh = tiny_net()
    dense = count(fresh, fresh.example_input_array)
    assert callback.dense_cost.flops == dense.flops
    assert callback.events_done == len(callback.events) > 0
    assert not torch.equal(model.fc.bias, fresh.fc.bias)
    if method.kind == "channels":
        cost = count(model, model.example_input_array)
        assert (callback.report.after.flops, callback.report.after.params) == (cost.flops, cost.params)
        graph = trace(model, model.example_input_array)
        now = {group.name: group.size for group in graph.groups}
        least = {name: torch.arange(size) > 0 for name, size in now.items() if size > 1}
        dearest = max(cost.flops - graph.cost(graph.plan({name: mask})).flops for name, mask in least.items())
        assert 0.5 * dense.flops - 1.5 * dearest < cost.flops <= 0.5 * dense.flops
    elif method.kind == "ranks":
        cost = count(model, model.example_input_array)
        assert (callback.report.after.flops, callback.report.after.params) == (cost.flops, cost.params)
        assert 0.4 * dense.flops < cost.flops <= 0.5 * dense.flops
    else:
        matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
        total = sum(p.numel() for p in matrices.values())
        assert sum(int(mask.sum()) for mask in callback.plan.masks.values()) == int(0.2 * total)
        assert sum(int(p.count_nonzero()) for p in matrices.values()) == int(0.2 * total)


def test_same_seed_gives_the_same_plan_and_weights(method, fit, make_loader):
    runs = []
    for _ in range(2):
        callback = make(method)
        trainer = fit(callback, loader=make_loader(shuffle=True))
        runs.append((callback.plan, weights(trainer.lightning_module)))
    assert runs[0][0] == runs[1][0]
    assert not runs[0][0].is_empty
    assert_same(runs[0][1], runs[1][1])


def test_resumes_from_the_end_of_an_epoch_to_the_same_weights(method, fit, save_each, tmp_path):
    whole, resumed = make(method), make(method)
    trainer = fit([whole, save_each()], max_epochs=4)
    again = fit(resumed, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt", seed=7)
    assert 0 < len([event for event in whole.events if event.step <= 8]) < len(whole.events) or len(whole.events) == 1
    assert_same(weights(trainer.lightning_module), weights(again.lightning_module))
    assert resumed.plan == whole.plan
    assert resumed.events == whole.events
    assert resumed.dense_cost == whole.dense_cost
    timeless = [{k: v for k, v in row.items() if k != "prune/seconds"} for row in whole.report.rows]
    assert [{k: v for k, v in row.items() if k != "prune/seconds"} for row in resumed.report.rows] == timeless


def test_checkpoint_holds_nothing_that_weights_only_refuses(method, fit, tmp_path):
    callback = make(method)
    trainer = fit(callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(checkpoint["lightning_prune"]["plans"]) == [callback.state_key]
    assert callback.state_key in checkpoint["callbacks"]


def test_leaves_no_hook_behind(method, fit, tiny_net):
    model = tiny_net()
    mine = model.conv1.register_forward_hook(lambda *_: None)
    before = hooks(model)
    whole = {"finalize": False} if method.kind == "ranks" else {}  # pairs of layers have other names
    fit(make(method, **whole), model=model)
    assert hooks(model) == before
    assert len(model.conv1._forward_hooks) == 1
    mine.remove()


@pytest.mark.parametrize("where", ["forward", "training_step"])
@pytest.mark.parametrize("call", [0, 5], ids=["at once", "in mid-fit"])
def test_leaves_no_hook_behind_when_the_model_raises(method, fit, tiny_net, where, call):
    class Fails(tiny_net):
        calls = 0

        def _maybe(self):
            if not torch.is_grad_enabled():
                return
            if self.calls == call:
                raise ArithmeticError("the user's own mistake")
            type(self).calls += 1

        def forward(self, x):
            if where == "forward":
                self._maybe()
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            if where == "training_step":
                self._maybe()
            return super().training_step(batch, batch_idx)

    model = Fails()
    before = hooks(model)
    with pytest.raises(Exception, match="the user's own mistake"):
        fit(make(method), model=model)
    assert hooks(model) == before


def test_leaves_train_and_eval_mode_alone(method, fit, tiny_net):
    class FrozenNorm(tiny_net):
        def on_train_epoch_start(self):
            self.norm1.eval()

    class Modes(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            self.seen.append({name: m.training for name, m in model.named_modules()})

    runs = []
    for callbacks in ([], [make(method)]):
        modes = Modes()
        fit([*callbacks, modes], model=FrozenNorm())
        runs.append(modes.seen)
    assert runs[0] == runs[1]
    assert not runs[1][0]["norm1"]
    assert runs[1][0]["norm0"]


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.alters_training], ids=lambda m: m.__name__)
def test_changes_nothing_before_its_first_event(method, fit, tiny_net, make_loader):
    # dropout and shuffling draw from the global random state: one number more, and the runs part
    class Dropping(tiny_net):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.2, self.training))

    class Before(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                self.weights, self.random = weights(model), torch.get_rng_state()

    runs = []
    for callbacks in ([], [make(method, schedule=OneShot(6, unit="step"))]):
        pl.seed_everything(0, verbose=False)
        before = Before()
        fit([before, *callbacks], model=Dropping(), loader=make_loader(shuffle=True))
        runs.append(before)
    assert_same(runs[0].weights, runs[1].weights)
    assert torch.equal(runs[0].random, runs[1].random)


def test_logs_its_row_at_each_event_and_epoch(method, fit, tmp_path):
    callback = make(method)
    fit(callback, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=50)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["prune/flops_kept"]]
    assert {f"prune/{key}" for key in ROW} | {OWN[method.kind]} <= rows[0].keys()
    assert [int(float(row["prune/event"])) for row in rows][-1] == len(callback.events)
    # Lightning logs what belongs to the n-th batch at step n - 1, and an epoch's figures with its last batch
    assert {int(row["step"]) for row in rows} == {*(max(event.step - 1, 0) for event in callback.events), 3, 7}
    assert float(rows[-1]["prune/density"]) == pytest.approx(callback.report.rows[-1]["prune/density"])


def test_draws_histograms_and_figures_for_tensorboard(method, fit, tmp_path):
    callback = make(method, schedule=OneShot(3, unit="step"))
    fit(callback, logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert "prune/flops_kept" in tags["scalars"]
    assert "prune/curve" in tags["images"]
    if method.kind == "channels":
        assert "prune/architecture" in tags["images"]
        scored = {"stem", "conv1", "hidden"} - callback.report.frozen.keys()  # some methods cannot score them all
        assert {"prune/score/conv1"} <= {f"prune/score/{name}" for name in scored} <= set(tags["histograms"])
        assert [e.step for e in events.Scalars("prune/channels/conv1")] == [2, 3, 7]  # 0-based: event, two epochs
    else:
        named = "conv1.weight" if method.kind == "weights" else "conv1"
        assert f"prune/score/{named}" in tags["histograms"]


def test_metrics_can_be_monitored(method, fit, tmp_path):
    class AtValidationEnd(Callback):
        seen = None

        def on_validation_end(self, trainer, model):
            if not trainer.sanity_checking:
                self.seen = dict(trainer.callback_metrics)

    watch = AtValidationEnd()
    saver = ModelCheckpoint(tmp_path, monitor="prune/density", mode="min")
    callback = make(method)
    trainer = fit([callback, watch, saver])
    last = callback.report.rows[-1]
    for metrics in (watch.seen, trainer.callback_metrics):
        assert float(metrics["prune/flops_kept"]) == pytest.approx(last["prune/flops_kept"])
        assert float(metrics["prune/density"]) == pytest.approx(last["prune/density"])
    assert float(saver.best_model_score) == pytest.approx(last["prune/density"])


def test_plan_report_and_cost_are_there_after_the_fit(method, fit):
    callback = make(method)
    fit(callback)
    assert callback._handles == []
    assert callback.report.rows[-1]["prune/event"] == len(callback.events)
    assert callback.report.before == callback.dense_cost
    assert not callback.plan.is_empty
    with pytest.raises(AttributeError):
        callback.plan = None


def test_keep_all_changes_nothing(method, fit):
    callback = method(Budget(1.0))
    with pytest.warns(UserWarning, match="changed nothing"):
        trainer = fit(callback)
    plain = fit()
    assert_same(weights(trainer.lightning_module), weights(plain.lightning_module))


def test_says_what_it_is(method):
    callback = make(method)
    assert callback.kind in KEEP
    assert callback.paper is not None or method.__name__.startswith("Random")
    assert callback.needs
    assert method.__doc__
