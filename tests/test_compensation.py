import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import nn

from lightning_prune import OneShot, surgery
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.compensation import Compensation, restore
from lightning_prune.errors import UnsafeCut


def layer():
    conv = nn.Conv2d(2, 3, 1)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def test_factors_multiply_along_their_dimension_and_shifts_come_after():
    conv = layer()
    Compensation(
        {"weight": {0: torch.tensor([1.0, 2.0, 3.0]), 1: torch.tensor([1.0, 10.0])}},
        {"bias": torch.tensor([0.5, 0, 0])},
    ).apply(conv)
    assert conv.weight.flatten().tolist() == [1, 10, 2, 20, 3, 30]
    assert conv.bias.tolist() == [0.5, 0, 0]


def test_what_was_there_before_can_be_put_back():
    conv = layer()
    before = Compensation({"weight": {0: torch.tensor([1.0, 0.3, 3.0])}}).apply(conv)
    restore(conv, before)
    assert torch.equal(conv.weight, torch.ones(3, 2, 1, 1))


def test_buffers_can_be_shifted():
    norm = nn.BatchNorm1d(2)
    Compensation(shifts={"running_mean": torch.tensor([1.0, -1.0])}).apply(norm)
    assert norm.running_mean.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"weight": {1: torch.ones(3)}}, r"dimension 1 of 'weight' must have shape \(2,\), got \(3,\)"),
        ({"weight": {1: torch.tensor([1.0, float("nan")])}}, "compensation of 'weight' is not finite"),
    ],
)
def test_bad_compensation_is_refused_and_nothing_has_changed(factors, message):
    conv = layer()
    with pytest.raises(ValueError, match=message):
        Compensation({"bias": {0: torch.full((3,), 7.0)}, **factors}).apply(conv)
    assert torch.equal(conv.weight, torch.ones(3, 2, 1, 1))


class Doubles(ChannelPruner):
    """Keeps later channels, and doubles what the readers of 'conv1' make of them."""

    default_scope = "uniform"
    join = "first"

    def score(self, view):
        return torch.arange(float(view.group.size))

    def compensate(self, keep):
        factors = {}
        for view in self._views["conv1"][0].consumers:
            column = torch.where(keep["conv1"], 2.0, 1.0)
            factors[view._consumer.weight] = {
                view._consumer.dim: column.repeat_interleave(view._consumer.indices.shape[1])
            }
        return Compensation(factors)


@pytest.fixture
def still(tiny_net):
    """A net that does not learn, so that only pruning changes its weights."""

    class Still(tiny_net):
        def __init__(self):
            pl.seed_everything(0, verbose=False)
            super().__init__()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9)

    return Still


def pruned_weights(fit, model, compensates, **settings):
    method = Doubles(0.5, schedule=OneShot(2, unit="step"), **settings)
    if not compensates:
        method.compensate = lambda keep: Compensation()
    trainer = fit(method, model=model)
    return {name: p.detach().clone() for name, p in trainer.lightning_module.named_parameters()}


@pytest.mark.parametrize("apply", ["cut", "mask"])
def test_compensation_comes_with_the_cut(fit, still, apply):
    compensated = pruned_weights(fit, still(), True, apply=apply)
    plain = pruned_weights(fit, still(), False, apply=apply)
    assert [name for name in plain if not torch.equal(plain[name], compensated[name])] == ["conv2.weight"]
    torch.testing.assert_close(compensated["conv2.weight"], 2 * plain["conv2.weight"])


def test_compensation_is_taken_back_with_a_cut_that_is_refused(fit, still, monkeypatch):
    cut, refused = surgery.cut, []

    def refusing(*args, **kwargs):
        if not refused:
            refused.append(True)
            monkeypatch.setattr(surgery, "settle", lambda graph, *rest: graph.without({"hidden": "the test says no"}))
            raise UnsafeCut("the test says no")
        return cut(*args, **kwargs)

    monkeypatch.setattr(surgery, "cut", refusing)
    with pytest.warns(UserWarning, match="Doubles freezes hidden"):
        compensated = pruned_weights(fit, still(), True)
    assert refused
    kept = compensated["conv2.weight"]
    rows = still().conv2.weight[-kept.shape[0] :, -kept.shape[1] :]
    torch.testing.assert_close(kept, 2 * rows)  # not four times


def test_what_the_optimizer_knew_of_compensated_weights_is_forgotten(fit, still):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                self.momenta = {
                    name: trainer.optimizers[0].state[p]["momentum_buffer"].abs().sum().item()
                    for name, p in model.named_parameters()
                }

    stops = Stops()
    fit([Doubles(0.5, schedule=OneShot(2, unit="step")), stops], model=still())
    assert stops.momenta["conv2.weight"] == 0
    assert stops.momenta["conv1.weight"] > 0


def test_averaged_copies_are_compensated_too(fit, still):
    averages = WeightAveraging()
    compensated = pruned_weights(lambda method, model: fit([method, averages], model=model), still(), True)
    averaged = dict(averages._average_model.module.named_parameters())
    torch.testing.assert_close(averaged["conv2.weight"], compensated["conv2.weight"])
