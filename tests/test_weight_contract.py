"""What every method that masks weights keeps to, with every optimizer and loop. A new method is found by itself."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import Budget, Iterative, WeightPruner, count
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.methods import discover
from tests.conftest import make_loader as loader_of

METHODS = {name: cls for name, cls in discover().items() if cls.kind == "weights"}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum and decay": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam and decay": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, amsgrad=True),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing")


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


def assert_exact(callback, model: nn.Module, keep: float = 0.2) -> None:
    """The masks have the asked count, the weights are zero under them, and there is no more to it."""
    weights = matrices(model)
    asked = int(keep * sum(p.numel() for p in weights.values()))
    masks = callback.plan.masks
    assert sum(int(mask.sum()) for mask in masks.values()) == asked
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
    zero = {name: mask & (weights[name] == 0) for name, mask in masks.items()}
    if callback.regrown and any(entries.any() for entries in zero.values()):
        model.zero_grad()
        for x, y in loader_of():
            F.cross_entropy(model.train()(x), y).backward()
        zero = {name: entries & (weights[name].grad != 0) for name, entries in zero.items()}  # but in a dead unit
    assert not any(entries.any() for entries in zero.values())


@pytest.mark.parametrize("of", ["units", "params"])
def test_budget_that_leaves_no_weight_is_refused_before_anything_changes(method, fit, tiny_net, of):
    model = tiny_net()
    fixed = sum(p.numel() for p in model.parameters() if p.ndim < 2) / count(model, model.example_input_array).params
    before = copy.deepcopy(model.state_dict())
    keep = 0.0001 + (fixed if of == "params" else 0)
    with pytest.raises(UnmeetableBudget, match=r"cannot be met with even one of the \d+ weights .* raise keep"):
        fit(method(Budget(keep, of)), model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_numbers_stop_the_event_and_are_named(method, fit, tiny_net):
    model = tiny_net()
    with torch.no_grad():
        model.conv1.weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteScore, match=r"weights of '\w+\.weight'( and \d+ more)? are NaN or infinite"):
        fit(method(Budget(0.5)), model=model)


def test_layer_that_loses_its_last_weight_is_said_once(fit, tiny_net):
    class Head(WeightPruner):
        """Keeps the weights that come last in the network."""

        def scores(self, weights):
            return {n: torch.full(w.shape, float(i)) for i, (n, w) in enumerate(weights.items())}

    with pytest.warns(UserWarning, match="Head leaves no weight of") as caught:
        fit(Head(0.1, schedule=Iterative(start=2, end=6, every=2, unit="step")), max_epochs=2)
    said = [str(w.message) for w in caught if "leaves no weight of" in str(w.message)]
    assert [message.count("stem.weight") for message in said].count(1) == 1
    assert all("raise keep, or list what has to stay in ignore=" in message for message in said)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_whatever_the_optimizer_remembers_or_decays(method, fit, tiny_net, optimizer):
    class Net(tiny_net):
        def configure_optimizers(self):
            return optimizer(self.parameters())

    callback = method(Budget(0.2))
    trainer = fit(callback, model=Net(), max_epochs=4)
    assert_exact(callback, trainer.lightning_module)
    weights = matrices(trainer.lightning_module)
    for name, mask in callback.plan.masks.items():
        for value in trainer.optimizers[0].state[weights[name]].values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                assert not value[~mask].any()


def test_lbfgs_is_refused_with_the_reason(method, fit, tiny_net):
    class Net(tiny_net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"LBFGS keeps its history as flat vectors .* prune with another optimizer"):
        fit(method(Budget(0.2)), model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_accumulated_batches_are_one_step(method, fit, make_loader):
    callback = method(Budget(0.2))
    trainer = fit(callback, max_epochs=4, accumulate_grad_batches=2)
    assert callback.steps == trainer.global_step == 8
    assert callback.events[-1].step < 8
    assert callback.events_done == len(callback.events)
    assert_exact(callback, trainer.lightning_module)


class TwoOptimizers(pl.LightningModule):
    """Steps by hand; each loss reaches both halves, and all gradients are there before the first optimizer steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        first.step()
        second.step()

    def configure_optimizers(self):
        # decay makes sure that even a weight that sees no gradient moves, if it is not zero
        body = torch.optim.AdamW(self.body.parameters(), lr=0.01)
        return body, torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.9)


def test_steps_by_hand_with_two_optimizers(method, fit):
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    callback = method(Budget(0.2), loss_fn=loss)
    trainer = fit(callback, model=TwoOptimizers(), max_epochs=4)
    assert callback.steps == 16
    assert callback.events_done == len(callback.events) > 0
    assert_exact(callback, trainer.lightning_module)


def test_mixed_precision_keeps_the_count(method, fit):
    callback = method(Budget(0.2))
    trainer = fit(callback, max_epochs=3, precision="bf16-mixed")
    assert_exact(callback, trainer.lightning_module)


def test_gradient_clipping_keeps_the_count(method, fit):
    callback = method(Budget(0.2))
    trainer = fit(callback, max_epochs=3, gradient_clip_val=0.1)
    assert_exact(callback, trainer.lightning_module)


def test_the_pruned_model_is_an_ordinary_one(method, fit, tiny_net):
    trainer = fit(method(Budget(0.2)), max_epochs=3)
    model, fresh = trainer.lightning_module, tiny_net()
    assert model.state_dict().keys() == fresh.state_dict().keys()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert sum(int(p.count_nonzero()) for p in matrices(fresh).values()) == int(
        0.2 * sum(p.numel() for p in matrices(fresh).values())
    )


def test_ignored_layers_stay_whole_and_the_others_pay(method, fit, tiny_net):
    callback = method(Budget(0.5), ignore=["stem", "fc"])
    model = fit(callback, max_epochs=3).lightning_module
    assert "stem.weight" not in callback.plan.masks
    assert model.stem.weight.count_nonzero() == model.stem.weight.numel()
    kept = sum(int(mask.sum()) for mask in callback.plan.masks.values())
    exempt = model.stem.weight.numel() + model.fc.weight.numel()
    assert kept + exempt == int(0.5 * sum(p.numel() for p in matrices(model).values()))


def test_density_of_each_layer_is_logged(method, fit):
    callback = method(Budget(0.2))
    fit(callback, max_epochs=3)
    row = callback.report.rows[-1]
    for name, mask in callback.plan.masks.items():
        assert row[f"prune/density/{name}"] == pytest.approx(float(mask.float().mean()))


def test_a_budget_of_sparse_flops_and_of_params_is_met(method, fit):
    flops, params = method(Budget(0.5, of="flops")), method(Budget(0.5, of="params"))
    fit(flops, max_epochs=3)
    row = flops.report.rows[-1]
    assert 0.47 * row["prune/flops"] < row["prune/flops_sparse"] <= 0.5 * row["prune/flops"]
    fit(params, max_epochs=3)
    assert params.report.rows[-1]["prune/params_kept"] == pytest.approx(0.5, abs=0.001)
    assert params.report.rows[-1]["prune/params_kept"] <= 0.5


REGROWING = {
    "RigL": {},
    "SET": {"grow": "random"},
    "SparseConnectivityLearning": {},
}


@pytest.mark.skipif("RigL" not in METHODS or "SparseConnectivityLearning" not in METHODS, reason="not there yet")
class TestRegrowth:
    """In a fit of 126 steps as in a long one."""

    @pytest.fixture
    def after_126_steps(self, fit, make_loader):
        def run(name, **settings):
            callback = METHODS["RigL" if name == "SET" else name](Budget(0.2), **settings)
            trainer = fit(callback, loader=make_loader(samples=84, batch_size=4), max_epochs=6)
            assert trainer.global_step == 126
            return callback

        return run

    @pytest.mark.parametrize(("name", "settings"), REGROWING.items(), ids=REGROWING)
    def test_weights_come_back(self, after_126_steps, name, settings):
        callback = after_126_steps(name, **settings)
        assert callback.events_done == len(callback.events) > 0
        assert callback.regrown > 0
        assert callback.report.rows[-1]["prune/regrown"] > 0

    def test_rigl_set_and_static_end_on_different_masks(self, after_126_steps):
        rigl, random, static = (after_126_steps("RigL", grow=grow) for grow in ("gradient", "random", "none"))
        assert rigl.plan != random.plan
        assert random.plan != static.plan
        assert rigl.plan != static.plan
        assert static.regrown == 0
        assert {c.plan.density for c in (rigl, random, static)} == {rigl.plan.density}
