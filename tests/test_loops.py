"""Features of the Trainer, each with methods that cut channels, mask weights and remove ranks.

`benchmarks/reliability_matrix.py` makes a table of these tests: a row is a test without its method, a column a kind.
"""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    LRPET,
    L1Filter,
    Magnitude,
    OneShot,
    PrunedCheckpoint,
    RandomChannels,
    RigL,
    SparseConnectivityLearning,
    Spectral,
    TaylorActivation,
    TaylorWeight,
    Updates,
    count,
    load_pruned,
    trace,
)
from lightning_prune.checkpoint import copies
from lightning_prune.errors import NoEvent, UnmeetableBudget
from lightning_prune.factorise import is_pair
from lightning_prune.graph.trace import undisturbed

METHODS = {cls.__name__: cls for cls in (TaylorWeight, L1Filter, Magnitude, RigL, LRPET)}
OF_EACH_KIND = [TaylorWeight, Magnitude, LRPET]
KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}
IN_STEPS = Updates(every=1, unit="step", end=1.0, least=10, closing=True)  # LRPET's own counts epochs
X = torch.zeros(2, 1, 8, 8)

pytestmark = pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing")


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


one_of_each_kind = pytest.mark.parametrize("method", OF_EACH_KIND, ids=lambda cls: cls.__name__)


class Steps(Callback):
    """Before the pruner in the list: counts the batches after its first event in which weights were trained."""

    def __init__(self, pruner):
        self.pruner, self.after_event = pruner, 0

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.before = [p.detach().clone() for p in model.parameters()]

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        moved = any(not torch.equal(a, b) for a, b in zip(self.before, model.parameters(), strict=True))
        self.after_event += moved and self.pruner.events_done > 0


@pytest.fixture
def prune(fit, method):
    """Fit with the method, built from a budget alone: its budget is met, optimizers follow, and training goes on."""

    def run(*callbacks, checked=True, arguments=None, **settings):
        pruner = method(KEEP[method.kind], **(arguments or {}))
        steps = Steps(pruner)
        trainer = fit([steps, pruner, *callbacks], **settings)
        trainer.pruner = pruner
        if checked:
            assert steps.after_event > 0
            assert pruner.events_done == len(pruner.events) > 0
            assert_budget_met(pruner, trainer.lightning_module)
            assert_followed(trainer)
        return trainer

    return run


def assert_budget_met(pruner, model, x=X):
    """By exact count: of weights, or of flops and parameters of the network as it is."""
    if pruner.kind == "weights":
        weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
        asked = int(KEEP["weights"] * sum(p.numel() for p in weights.values()))
        assert sum(int(mask.sum()) for mask in pruner.plan.masks.values()) == asked
        assert_zero(pruner, model)
        return
    cost, said = count(model, x.to(next(model.parameters()))), pruner.report.after
    assert (cost.flops, cost.params) == (said.flops, said.params)
    assert 0.3 < cost.flops / pruner.dense_cost.flops <= KEEP[pruner.kind]
    assert all(is_pair(model.get_submodule(name)) for name in pruner.plan.ranks)


def assert_zero(pruner, model):
    parameters = dict(model.named_parameters())
    for name, mask in pruner.plan.masks.items():
        assert not parameters[name][~mask].any()


def assert_followed(trainer):
    """Optimizers hold each parameter of the network once, with state of its shape, and nothing else."""
    held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, trainer.lightning_module.parameters()))
    for optimizer in trainer.optimizers:
        assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
        for parameter, state in optimizer.state.items():
            shapes = [value.shape for value in state.values() if isinstance(value, Tensor) and value.ndim]
            assert shapes == [parameter.shape] * len(shapes)


PRECISIONS = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(prune, precision):
    trainer = prune(precision=precision)
    assert {p.dtype for p in trainer.lightning_module.parameters()} == {PRECISIONS[precision]}


def test_precision_of_16_mixed(prune):
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    prune(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])  # as precision="16-mixed" is on a GPU
    assert scaler.get_scale() > 2.0**16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_precision_of_16_mixed_on_a_gpu(prune):
    trainer = prune(precision="16-mixed", accelerator="cuda", devices=1)
    assert trainer.precision_plugin.scaler is not None


class Gradients(RandomChannels):
    """Notes the gradients of each step, and changes nothing."""

    def before_step(self, optimizer, held):
        vars(self).setdefault("seen", []).append({name: p.grad.clone() for name, p in held.items()})


@pytest.mark.parametrize("method", [Gradients, TaylorWeight, Spectral, SparseConnectivityLearning])
def test_fused_optimizers_that_unscale_gradients_themselves_are_no_exception(tiny_net, fit, method):
    def run(fused):
        class Net(tiny_net):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, fused=fused)

        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)  # doubles at every step
        by_size = {"norm": "none"} if method is SparseConnectivityLearning else {}  # else any scale would do
        pruner = method(0.5, schedule=OneShot(6, unit="step"), **by_size)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        model = fit(pruner, model=Net(), max_epochs=2, plugins=[plugin]).lightning_module
        assert scaler.get_scale() == 4.0 * 2**8
        return pruner, dict(model.named_parameters())

    (apart, expected), (fused, weights) = run(False), run(True)
    assert fused.plan == apart.plan
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], rtol=1e-5, atol=1e-7), name
    for step, alone in zip(vars(fused).get("seen", []), vars(apart).get("seen", []), strict=True):
        assert all(torch.allclose(step[name], alone[name], rtol=1e-5, atol=1e-7) for name in alone)


def test_gradient_accumulation(prune):
    trainer = prune(accumulate_grad_batches=2, max_epochs=4)
    assert trainer.pruner.steps == trainer.global_step == 8


def test_gradient_accumulation_that_changes(prune, method):
    # epochs of 4, 2, 2 and 2 steps: Lightning's estimate is 16, by which the last events would never come
    arguments = {"schedule": IN_STEPS} if method is LRPET else {}
    trainer = prune(GradientAccumulationScheduler({1: 2}), arguments=arguments, max_epochs=4)
    assert trainer.pruner.steps == trainer.global_step == 10


@one_of_each_kind
def test_gradient_accumulation_that_changes_where_a_schedule_counts_epochs_is_refused(prune, tiny_net, method):
    schedule = OneShot(1, unit="epoch") if method.kind != "ranks" else method.default_schedule
    model = tiny_net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NoEvent, match=r"counts epochs, but an epoch has no known number of steps; use unit='step'"):
        prune(GradientAccumulationScheduler({1: 2}), arguments={"schedule": schedule}, model=model, max_epochs=4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@one_of_each_kind
def test_gradient_clipping(prune, algorithm):
    prune(gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)


class Gan(pl.LightningModule):
    """Two networks, two optimizers, steps by hand; each loss reaches the other network too."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.critic = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)[:, :16]
        generate, judge = self.optimizers()
        generate.zero_grad()
        self.manual_backward(-self.critic(self.generator(real[:, :8])).mean())
        generate.step()
        judge.zero_grad()
        fake = self.generator(real[:, :8]).detach()
        self.manual_backward(F.softplus(self.critic(fake)).mean() + F.softplus(-self.critic(real)).mean())
        judge.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]


def gan_loss(model, batch):
    return model.critic(model.generator(batch[0].flatten(1)[:, :8])).mean()


def assert_gan_pruned(pruner, model):
    """A multiplication a weight of each linear layer; the loss runs both networks once."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    flops, masked = sum(m.weight.numel() for m in linears), pruner.kind == "weights"
    assert pruner.report.after.flops == flops
    assert masked or 0.3 < flops / (8 * 16 + 16 * 16 + 16 * 16 + 16 * 4 + 4) <= 0.5
    kept = sum(int(mask.sum()) for mask in pruner.plan.masks.values())
    assert kept == (int(0.2 * flops) if masked else 0)
    assert_zero(pruner, model)


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 16}], ids=["epochs", "max_steps"])
def test_several_optimizers_by_hand(prune, end):
    # max_steps counts the steps of both optimizers: 16 of them are 8 batches
    trainer = prune(model=Gan(), arguments={"loss_fn": gan_loss}, checked=False, **end)
    pruner = trainer.pruner
    assert pruner.steps == 8
    assert pruner.events_done == len(pruner.events) > 0
    assert_gan_pruned(pruner, trainer.lightning_module)
    assert_followed(trainer)


SCHEDULERS = {
    "per step": lambda o: {"scheduler": lr_scheduler.StepLR(o, 2), "interval": "step"},
    "per epoch": lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.5)},
    "OneCycle": lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=12), "interval": "step"},
    "ReduceLROnPlateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
        "monitor": "prune/flat",
    },
}


@pytest.mark.parametrize("name", SCHEDULERS)
@one_of_each_kind
def test_learning_rate_schedule(fit, prune, tiny_net, name):
    class Scheduled(tiny_net):
        def validation_step(self, batch, batch_idx):
            self.log("prune/flat", 1.0)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": SCHEDULERS[name](optimizer)}

    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, model, *_):
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    plain, pruned = Rates(), Rates()
    fit(plain, model=Scheduled(), max_epochs=3)
    prune(pruned, model=Scheduled(), max_epochs=3)
    assert plain.seen == pruned.seen
    assert plain.seen[0] != plain.seen[-1]


def assert_average_followed(trainer):
    """The average has the network's layers and shapes, and the fit ends with its weights."""
    (average,) = copies(trainer, trainer.lightning_module)
    average, model = dict(average.named_parameters()), dict(trainer.lightning_module.named_parameters())
    assert {name: p.shape for name, p in average.items()} == {name: p.shape for name, p in model.items()}
    different = {name for name in model if not torch.equal(average[name], model[name])}
    # a projection asks norms for their statistics, which stochastic averaging renews in the network alone
    assert different <= {f"{name}.{part}.weight" for name in trainer.pruner.plan.ranks for part in (0, 1)}


def test_stochastic_weight_averaging(prune):
    # 3 epochs and one more that only renews the norms' statistics, which Lightning's estimate counts as steps
    trainer = prune(StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=3)
    assert max(event.step for event in trainer.pruner.events) <= 12
    assert trainer.current_epoch == 4
    assert_average_followed(trainer)


AVERAGING = [name for name in ("WeightAveraging", "EMAWeightAveraging") if hasattr(pl.callbacks, name)]


@pytest.mark.parametrize("name", AVERAGING)
def test_weight_averaging(prune, name):
    trainer = prune(getattr(pl.callbacks, name)(), max_epochs=3)
    assert_average_followed(trainer)


@pytest.mark.skipif("WeightAveraging" not in AVERAGING, reason="this Lightning has no WeightAveraging")
def test_average_across_a_cut_is_the_mean_of_what_stays(fit):
    class Seen(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, model, *_):
            self.weights.append(model.conv1.weight.detach().clone())

    pruner, seen = L1Filter(0.5, schedule=OneShot(5, unit="step")), Seen()
    trainer = fit([pruner, seen, pl.callbacks.WeightAveraging()])
    kept = pruner.plan.kept["conv1.weight"]
    whole = [weight[kept[0]][:, kept[1]] for weight in seen.weights[:4]]  # the event is after the fifth step
    assert [tuple(w.shape) for w in seen.weights[4:]] == [tuple(whole[0].shape)] * 4
    mean = torch.stack([*whole, *seen.weights[4:]]).mean(dim=0)
    assert torch.allclose(trainer.lightning_module.conv1.weight, mean, atol=1e-6)


class TwoParts(pl.LightningModule):
    """A backbone and a head; the optimizer gets what is trained at the start."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
        self.example_input_array = X

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def finetuning():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # norms, without a pruner too
@pytest.mark.parametrize("method", [TaylorWeight, L1Filter, Magnitude, RigL], ids=lambda cls: cls.__name__)
def test_backbone_finetuning(prune, method):
    # gradients of the backbone come with epoch 1, so that what scores by them prunes after that
    arguments = {"schedule": OneShot(7, unit="step")} if method is TaylorWeight else {}
    trainer = prune(finetuning(), model=TwoParts(), arguments=arguments, max_epochs=4)
    assert len(trainer.optimizers[0].param_groups) == 2
    names = {name for name, p in trainer.lightning_module.named_parameters() if p in trainer.optimizers[0].state}
    assert {"backbone.0.weight", "backbone.3.weight", "head.0.weight"} <= names


def test_backbone_finetuning_where_ranks_of_what_is_frozen_have_to_go_is_refused(fit):
    model = TwoParts()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnmeetableBudget, match=r"LRPET: .*or train backbone.0, backbone.3 from the start"):
        fit([LRPET(0.5), finetuning()], model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_layers(prune, tiny_net):
    model = tiny_net()
    model.stem.requires_grad_(False)
    model.norm2.requires_grad_(False)
    before = model.stem.weight.detach().clone()
    plan = prune(model=model).pruner.plan
    for dim, kept in plan.kept.get("stem.weight", {}).items():
        before = before.index_select(dim, kept)
    assert torch.equal(model.stem.weight, before * plan.masks.get("stem.weight", torch.tensor(True)))


LOOPS = {
    "limit_train_batches": {"limit_train_batches": 2, "max_epochs": 4},
    "max_steps": {"max_steps": 7, "max_epochs": 9},
    "max_time": {"max_time": {"hours": 1}},
    "overfit_batches": {"overfit_batches": 2, "max_epochs": 4},
    "fast_dev_run": {"fast_dev_run": 3},
    "no sanity check": {"num_sanity_val_steps": 0},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1},
}


@pytest.mark.parametrize("name", LOOPS)
@one_of_each_kind
def test_setting_of_the_loop(prune, name):
    trainer = prune(**LOOPS[name])
    last = max(event.step for event in trainer.pruner.events)
    assert last <= trainer.pruner.steps == trainer.global_step


class AtValidation(Callback):
    """Keeps what is known of pruning after each validation, and what the pruner's own row says then."""

    def __init__(self):
        self.sanity, self.seen = [], []

    def on_validation_end(self, trainer, model):
        (pruner,) = [callback for callback in trainer.callbacks if hasattr(callback, "events_done")]
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("prune/")}
        if trainer.sanity_checking:
            self.sanity.append(metrics)
        else:
            self.seen.append((trainer.global_step, metrics, {k: pruner._row()[k] for k in metrics}))


@one_of_each_kind
def test_validation_within_epochs(prune, method):
    watch = AtValidation()
    prune(watch, val_check_interval=0.5)
    assert watch.sanity == [{}]
    assert [step for step, _, _ in watch.seen] == [2, 4, 6, 8]
    for _, metrics, row in watch.seen:
        assert metrics == pytest.approx(row)
        assert {"prune/flops_kept", "prune/density"} <= metrics.keys()
    key = "prune/density" if method.kind == "weights" else "prune/flops_kept"
    assert watch.seen[-1][1][key] <= KEEP[method.kind] < 1


class Stream(IterableDataset):
    """32 images, and no length."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for label in range(32):
            yield torch.randn(1, 8, 8, generator=generator), label % 3


def test_data_without_a_length(prune, method):
    arguments = {"schedule": IN_STEPS} if method is LRPET else {}
    prune(loader=DataLoader(Stream(), 8), max_steps=8, max_epochs=9, arguments=arguments)


def test_data_without_a_length_and_a_fit_without_max_steps_is_refused(prune):
    with pytest.raises(NoEvent, match=r"has no end.*set max_steps.*the training data has no length"):
        prune(loader=DataLoader(Stream(), 8))


@one_of_each_kind
def test_data_without_a_length_and_a_schedule_in_steps(prune, method):
    schedule = {"ranks": IN_STEPS}.get(method.kind, OneShot(3, unit="step"))
    end = {"max_steps": 8} if method.kind == "ranks" else {}  # a projection has to close the fit
    prune(loader=DataLoader(Stream(), 8), arguments={"schedule": schedule}, **end)


@one_of_each_kind
def test_combined_loaders(prune, tiny_net, make_loader):
    class Both(tiny_net):
        def __init__(self):
            super().__init__()
            self.example_input_array = None  # it is traced through its loss on a batch

        def training_step(self, batch, batch_idx):
            return sum(F.cross_entropy(self(x), y) for x, y in (batch["first"], batch["second"])) / 2

    loaders = {"first": make_loader(), "second": make_loader(16, seed=1)}
    prune(model=Both(), loader=CombinedLoader(loaders, "max_size_cycle"))


@pytest.mark.filterwarnings("ignore:.*training ended at step 8 after")
def test_early_stopping_between_events(prune, method):
    # the loss never falls by enough, so that training ends with the second of six epochs
    stop = EarlyStopping("val_loss", min_delta=1e9, patience=1)
    trainer = prune(stop, max_epochs=6, checked=False)
    pruner, model = trainer.pruner, trainer.lightning_module
    assert trainer.global_step == 8
    assert 0 <= pruner.events_done < len(pruner.events)
    assert_followed(trainer)
    assert_zero(pruner, model)
    cost = count(model, X)
    masked = sum(int((~mask).sum()) for mask in pruner.plan.masks.values())
    assert (cost.flops, cost.params - masked) == (pruner.report.after.flops, pruner.report.after.params)


def test_early_stopping_between_events_is_said(prune):
    with pytest.warns(UserWarning, match=r"training ended at step 8 after \d+ of \d+ events"):
        prune(EarlyStopping("val_loss", min_delta=1e9, patience=1), max_epochs=6, checked=False)


@pytest.mark.filterwarnings("ignore:.*training ended at step")
def test_early_stopping_by_what_is_kept(prune, method):
    key = "prune/density" if method.kind == "weights" else "prune/flops_kept"
    stop = EarlyStopping(key, mode="min", patience=99, stopping_threshold=KEEP[method.kind])
    arguments = {} if method in (RigL, LRPET) else {"schedule": OneShot(6, unit="step")}
    trainer = prune(stop, arguments=arguments, max_epochs=6, checked=False)
    met = {RigL: 4, LRPET: 4}.get(method, 8)  # the first validation after the event
    assert trainer.global_step == met
    assert_budget_met(trainer.pruner, trainer.lightning_module)


def test_pruned_checkpoint(prune, tiny_net, method, tmp_path):
    key = "max_density" if method.kind == "weights" else "max_flops_kept"
    within = {key: KEEP[method.kind]}
    saver = PrunedCheckpoint(**within, dirpath=tmp_path, filename="{epoch}", monitor="epoch", save_top_k=-1)
    arguments = {} if method in (RigL, LRPET) else {"schedule": OneShot(6, unit="step")}
    trainer = prune(saver, arguments=arguments, max_epochs=3)
    dense_yet = [] if method in (RigL, LRPET) else ["epoch=0.ckpt"]
    left = [f"epoch={n}.ckpt" for n in range(3) if f"epoch={n}.ckpt" not in dense_yet]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == left
    loaded = load_pruned(tiny_net, tmp_path / left[-1])
    if method.kind == "ranks":  # a checkpoint of the fit has the layers whole
        trainer.pruner.finalize(loaded)
    assert_budget_met(trainer.pruner, loaded)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(test):
    # torch's own look at the inputs of what it compiles
    quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    return quiet(pytest.mark.usefixtures("fresh_compiler")(test))


class Compiled:
    """A backend that notes the shapes of what it compiles."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append({tuple(value.shape) for value in inputs if isinstance(value, Tensor)})
        return graph.forward


def own(layer):
    """The layer with a forward in this file: torch 2.10 compiles no module of its own in place."""

    class Own(type(layer)):
        def forward(self, x):
            return super().forward(x)

    layer.__class__ = Own
    return layer


def quiet(tiny_net):
    class Quiet(tiny_net):
        """Does not log from a compiled step."""

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    return Quiet


def assert_compiled_as_it_is(model):
    out = model.eval()(X + 1)
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(model(X + 1), out, atol=1e-6)


@compiled
@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
@one_of_each_kind
def test_compiled_submodule(prune, tiny_net, how):
    backend = Compiled()

    class Net(quiet(tiny_net)):
        def configure_model(self):
            if how == "wrapped":
                self.hidden = torch.compile(self.hidden, backend=backend)
            elif how == "in place":
                own(self.hidden).compile(backend=backend)
            else:
                self.hidden.forward = torch.compile(self.hidden.forward, backend=backend)

    trainer = prune(model=Net(), max_epochs=3)
    assert trainer.lightning_module.hidden is not None
    assert len(backend.graphs) > 0
    assert_compiled_as_it_is(trainer.lightning_module)


@compiled
@pytest.mark.parametrize("how", ["in place", "function"])
def test_looking_at_a_compiled_network_compiles_nothing(tiny_net, how):
    backend, model = Compiled(), quiet(tiny_net)()
    if how == "in place":
        own(model.hidden).compile(backend=backend)
    else:
        model.hidden.forward = torch.compile(model.hidden.forward, backend=backend)
    assert trace(model, X).cost() == count(model, X) == count(tiny_net(), X)
    with undisturbed(model):  # as cuts are proved
        model(X)
    assert backend.graphs == []
    model(X)
    assert len(backend.graphs) == 1


@compiled
@one_of_each_kind
def test_compiled_module(prune, tiny_net, make_loader, method):
    backend = Compiled()
    model = torch.compile(quiet(tiny_net)(), backend=backend)
    arguments = {"schedule": OneShot(5, unit="step")} if method is TaylorWeight else {}  # it compiles for each cut
    trainer = prune(model=model, val=make_loader(8, seed=1), arguments=arguments, max_epochs=3)
    assert len(backend.graphs) > 0
    assert_compiled_as_it_is(trainer.lightning_module)


@compiled
def test_module_is_compiled_anew_after_each_of_many_cuts(fit, tiny_net):
    backend = Compiled()

    class Net(quiet(tiny_net)):
        def configure_model(self):
            own(self.conv1).compile(backend=backend, fullgraph=True)  # an error where torch would stop compiling

    pruner = RandomChannels(0.1)
    trainer = fit(pruner, model=Net(), max_epochs=8)
    cut = {row["prune/channels/conv1"] * row["prune/channels/stem"] for row in pruner.report.rows}
    assert len(cut) > 8  # as many versions torch keeps
    assert tuple(trainer.lightning_module.conv1.weight.shape) in backend.graphs[-1]


@compiled
def test_compiled_module_whose_maps_a_method_watches_is_refused(fit, tiny_net, make_loader):
    model = tiny_net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"the model is compiled, so that what happens inside cannot be watched"):
        fit(TaylorActivation(0.5), model=torch.compile(model, backend="eager"), val=make_loader(8, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
