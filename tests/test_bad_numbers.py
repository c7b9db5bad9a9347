"""Numbers that are none, and data that is not as said: put off or refused with a reason, by every method, never a plan.

A new method is found by itself.
"""

import math
import re
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_prune import Budget, L1Filter, OneShot, RigL, SparseConnectivityLearning, trace
from lightning_prune.errors import NonFiniteScore, NothingToPrune, PruneError, UnmeetableBudget
from lightning_prune.methods import discover
from tests.test_contract import hooks

METHODS = {name: cls for name, cls in discover().items() if cls.kind != "control"}
KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}
CHANNELS = [cls for cls in METHODS.values() if cls.kind == "channels"]
NAN, INF = math.nan, math.inf
AT_3 = OneShot(3, unit="step")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing"),
    pytest.mark.filterwarnings("ignore:Hierarchical. the (budget|redundancy)"),
]


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


def make(method, **settings):
    return method(Budget(KEEP[method.kind]), **settings)


class Scaled:
    """Leaves out a step with a gradient that is not finite, as a scaler of the loss does."""

    bad_steps = ()
    bad = NAN

    def on_after_backward(self):
        self.tries = getattr(self, "tries", -1) + 1
        if self.tries in self.bad_steps:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = self.bad

    def on_before_optimizer_step(self, optimizer):  # after the callbacks have seen the gradients
        if not all(bool(p.grad.isfinite().all()) for p in self.parameters() if p.grad is not None):
            for parameter in self.parameters():
                parameter.grad = None


def run(callback, fit, **settings):
    """Fit; what was raised of ours, and every warning's text."""
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(callback, **settings)
        except PruneError as raised:
            error = raised
    return error, [str(warning.message) for warning in caught]


def assert_sound(callback):
    """What was decided, logged and kept for later is made of numbers."""
    assert all(math.isfinite(value) for row in callback.report.rows for value in row.values())
    assert [key for key, tensor in _tensors(callback.state_dict()) if not tensor.isfinite().all()] == []


def _tensors(value, key=""):
    if isinstance(value, torch.Tensor):
        return [(key, value)] if value.is_floating_point() else []
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [found for name, each in named for found in _tensors(each, f"{key}/{name}")]


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_a_weight_that_is_no_number_is_refused_by_name_before_anything_goes(method, fit, tiny_net, bad):
    model = tiny_net()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = bad
    callback = make(method)
    error, _ = run(callback, fit, model=model, limit_val_batches=0)
    assert isinstance(error, NonFiniteScore)
    assert callback.plan.is_empty or callback.plan.density == 1
    assert model.conv1.out_channels == 12


@pytest.mark.parametrize("answer", ["raise", "postpone"])
@pytest.mark.parametrize("method", CHANNELS, ids=lambda cls: cls.__name__)
def test_weights_that_training_spoils_are_named_and_no_group_is_blamed(method, answer, fit, tiny_net):
    class Spoilt(tiny_net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 2:  # good gradients were seen by then
                self.conv1.weight.data[0, 0] = NAN

    callback = make(method, on_nonfinite=answer, schedule=AT_3)
    model = Spoilt()
    error, said = run(callback, fit, model=model, limit_val_batches=0)
    words = str(error) if answer == "raise" else next(text for text in said if "postpones its event" in text)
    assert (error is None) == (answer == "postpone")
    assert re.search(r"are NaN or infinite|not finite", words), words
    assert not [text for text in said if "frozen" in text or "freez" in text]
    assert model.conv1.out_channels == 12


def test_postponed_for_good_says_once_that_the_budget_is_not_met(method, fit, tiny_net):
    model = tiny_net()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = NAN
    callback = make(method, on_nonfinite="postpone")
    error, said = run(callback, fit, model=model, limit_val_batches=0)
    assert error is None
    assert len([text for text in said if "postpones its event" in text]) == 1
    assert len([text for text in said if "training ended" in text or "budget is not met" in text]) >= 1
    assert callback.plan.is_empty or callback.plan.density == 1
    assert callback.events_done == 0


def test_postponed_until_numbers_are_back_meets_its_budget(method, fit, tiny_net):
    class Heals(tiny_net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 5:
                fresh = type(self)()
                self.load_state_dict(fresh.state_dict())
                self.optimizers().state.clear()

    torch.manual_seed(0)
    model = Heals()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = NAN
    callback = make(method, on_nonfinite="postpone", schedule=AT_3)
    error, said = run(callback, fit, model=model, limit_val_batches=0)
    assert error is None
    assert len([text for text in said if "postpones its event" in text]) == 1
    assert callback.events_done == 1
    assert_within(callback)


def assert_within(callback):
    row = callback.report.rows[-1]
    key = {"channels": "prune/flops_kept", "weights": "prune/density", "ranks": "prune/flops_kept"}[callback.kind]
    assert 0 < row[key] <= KEEP[callback.kind]
    assert_sound(callback)


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_gradients_of_one_step_that_are_no_numbers_are_left_out(method, fit, tiny_net, bad):
    class Net(Scaled, tiny_net):
        bad_steps = (1,)

    Net.bad = bad
    callback = make(method, on_nonfinite="postpone")
    error, _ = run(callback, fit, model=Net(), limit_val_batches=0, max_epochs=3)
    assert error is None
    assert callback.events_done == len(callback.events)
    assert_within(callback)


def test_gradients_that_are_never_numbers_end_in_no_plan_of_them(method, fit, tiny_net):
    class Net(Scaled, tiny_net):
        bad_steps = range(1000)

    callback = make(method, on_nonfinite="postpone")
    error, said = run(callback, fit, model=Net(), limit_val_batches=0)
    assert error is None
    assert_sound(callback)
    if callback.events_done < len(callback.events):  # who needs no gradients prunes all the same
        assert any("training ended at step" in text for text in said)


def test_what_is_parked_by_scl_stays_finite_when_a_weight_was_not(fit, tiny_net):
    class Hiccups(Scaled, tiny_net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                self.conv1.weight.data[0, 0] = NAN
            if self.trainer.global_step == 3:
                self.load_state_dict(type(self)().state_dict())
            if self.trainer.global_step == 5:
                self.parked = callback.kept["parked"]["conv1.weight"].clone()

    callback = SparseConnectivityLearning(Budget(0.2), schedule=OneShot(6, unit="step"))
    model = Hiccups()
    error, _ = run(callback, fit, model=model, limit_val_batches=0)
    assert error is None
    assert model.parked.isfinite().all()
    assert_within(callback)


def test_a_gradient_that_is_nan_is_no_growth_score_of_rigl_later_on(fit, tiny_net):
    class Net(Scaled, tiny_net):
        bad_steps = (1, 3, 4)

    callback = RigL(Budget(0.2), on_nonfinite="postpone")
    error, _ = run(callback, fit, model=Net(), limit_val_batches=0, max_epochs=3)
    assert error is None
    assert_within(callback)


# what cannot be told apart


BY_SIZE = [METHODS[name] for name in ("Magnitude", "IterativeImportance", "SNIP", "LotteryTicket")]


@pytest.mark.parametrize("method", BY_SIZE, ids=lambda m: m.__name__)
def test_weights_that_are_all_equal_leave_the_exact_count(method, fit, tiny_net):
    model = tiny_net()
    with torch.no_grad():
        for parameter in (
            model.stem.weight,
            model.conv1.weight,
            model.conv2.weight,
            model.hidden.weight,
            model.fc.weight,
        ):
            parameter.fill_(0.1)
    callback = make(method, schedule=OneShot(1, unit="step"))
    fit(callback, model=model, limit_val_batches=0)
    sizes = [p.numel() for p in model.parameters() if p.ndim > 1]
    assert sum(int(mask.sum()) for mask in callback.plan.masks.values()) == int(0.2 * sum(sizes))


@pytest.mark.parametrize("value", [0.0, 0.1], ids=["zero", "equal"])
def test_channels_that_are_all_equal_meet_the_budget_and_keep_one_each(fit, tiny_net, value):
    model = tiny_net()
    with torch.no_grad():
        for layer in (model.stem, model.conv1, model.conv2, model.hidden):
            layer.weight.fill_(value)
    callback = L1Filter(Budget(0.5), schedule=OneShot(0.0), verify="never")
    fit(callback, model=model, limit_val_batches=0)
    row = callback.report.rows[-1]
    assert 0.2 < row["prune/flops_kept"] <= 0.5
    assert all(kept >= 1 for kept, _ in callback.plan.groups.values())


# what leaves nothing to choose


@pytest.mark.parametrize("method", CHANNELS, ids=lambda m: m.__name__)
def test_a_budget_below_the_fewest_channels_says_the_smallest_that_is_met(method, fit, tiny_net):
    model = tiny_net()
    error, _ = run(method(Budget(0.05), min_channels=5), fit, model=model, limit_val_batches=0)
    assert isinstance(error, UnmeetableBudget)
    assert model.conv1.out_channels == 12
    smallest = float(re.search(r"(0\.\d+) are left", str(error))[1])
    method(Budget(smallest), min_channels=5).check(trace(tiny_net(), torch.zeros(2, 1, 8, 8)))


@pytest.mark.parametrize("method", CHANNELS, ids=lambda m: m.__name__)
def test_layers_of_one_channel_stay(method, fit, tiny_net):
    class Narrow(tiny_net):
        def __init__(self):
            super().__init__(width=1)  # the residual stream is one channel wide

    callback = method(Budget(0.9, of="params"), min_channels=1)
    model = Narrow()
    error, _ = run(callback, fit, model=model, limit_val_batches=0)
    assert model.stem.out_channels == 1
    assert error is None or isinstance(error, PruneError)


@pytest.mark.parametrize("method", CHANNELS, ids=lambda m: m.__name__)
def test_a_model_whose_every_layer_is_ignored_says_so(method, fit, tiny_net):
    error, _ = run(make(method, ignore=["*"]), fit, model=tiny_net(), limit_val_batches=0)
    assert isinstance(error, NothingToPrune)
    assert "ignored" in str(error)


# data that is not as said


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_dataset_smaller_than_the_calibration_asks_for_is_used_whole(method, fit, make_loader):
    callback = make(method, calibration=10**6, on_nonfinite="postpone")
    error, _ = run(callback, fit, loader=make_loader(samples=12, batch_size=4), max_epochs=4, limit_val_batches=0)
    assert error is None
    assert callback.events_done == len(callback.events)
    assert_within(callback)


class OtherInput:
    """Batches are dicts of images of another size and type than ``example_input_array``."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"].float()), batch["label"])


def test_a_batch_that_the_example_does_not_look_like(method, fit, tiny_net):
    class Net(OtherInput, tiny_net):
        pass

    data = [{"image": torch.randn(1, 12, 10).double(), "label": torch.tensor(i % 3)} for i in range(16)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    callback = make(method)
    error, _ = run(callback, fit, model=Net(), loader=loader, limit_val_batches=0, max_epochs=3)
    assert error is None
    assert_within(callback)


# the user's own mistakes


HOOKS = ("validation_step", "on_train_epoch_end", "optimizer_step", "another callback")
SAMPLE = [METHODS[name] for name in ("TaylorActivation", "Spectral", "ThiNet", "Magnitude", "RigL", "LRPET")]


@pytest.mark.parametrize("where", HOOKS)
@pytest.mark.parametrize("method", SAMPLE, ids=lambda m: m.__name__)
def test_an_exception_anywhere_leaves_no_hook_of_ours_and_a_model_that_trains_on(method, fit, tiny_net, where):
    def fail(*_, **__):
        raise ArithmeticError("the user's own mistake")

    class Fails(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if trainer.global_step == 3:
                fail() if where == "another callback" else setattr(model, where, fail)

    model = tiny_net()
    before = hooks(model)
    with pytest.raises(ArithmeticError, match="the user's own mistake"):
        fit([make(method), Fails()], model=model)
    vars(model).pop(where, None)
    assert hooks(model) == before
    fit(model=model.train(), max_epochs=1)  # an error in validation leaves any model in eval mode
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
