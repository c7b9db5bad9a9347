"""What methods may ask for at an event: the model in eval mode, batches, the loss, sums over processes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import OneShot, trace
from lightning_prune.batches import evaluating, share, without_trainer
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.errors import NothingToPrune

AT_3 = OneShot(3, unit="step")


class Looks(ChannelPruner):
    """Scores by the mean of maps over calibration data."""

    default_scope = "uniform"
    looks_at = "maps"
    samples = 16

    def scores(self, views):
        self.modes, self.losses, self.grads = [], [], []
        with self.evaluating():
            for batch in self.calibrate(self.samples):
                self.modes.append(self.model.training)
                self.losses.append(self.loss(batch))
                self.grads.append(torch.is_grad_enabled())
        return {name: torch.arange(float(group[0].group.size)) for name, group in views.items()}


def state(model):
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
    }


def assert_unchanged(before, after):
    assert before["modes"] == after["modes"]
    assert torch.equal(before["random"], after["random"])
    for key in ("tensors", "grads"):
        for name, value in before[key].items():
            assert (value is None) == (after[key][name] is None), name
            assert value is None or torch.equal(value, after[key][name]), name


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_leaves_no_trace_and_says_whether_there_are_gradients(tiny_net, grad):
    model = tiny_net().train()
    model.norm1.eval()
    F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4) % 3).backward()
    before = state(model)
    with evaluating(model, grad):
        assert not any(module.training for module in model.modules())
        loss = F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4) % 3)
        assert loss.requires_grad == grad
        grads = torch.autograd.grad(loss, [model.conv1.weight]) if grad else ()
        assert len(grads) == grad
    assert_unchanged(before, state(model))


def test_evaluation_that_fails_leaves_no_trace(tiny_net):
    model = tiny_net().train()
    before = state(model)
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.rand(1))
    assert_unchanged(before, state(model))


def test_evaluation_is_in_the_models_own_precision(tiny_net):
    model = tiny_net()
    with torch.autocast("cpu", dtype=torch.bfloat16), evaluating(model):
        assert model(torch.randn(1, 1, 8, 8)).dtype == torch.float32


def test_processes_share_the_batches():
    assert [list(share(iter(range(5)), process, 2)) for process in (0, 1)] == [[0, 2, 4], [1, 3]]


def test_own_batches_serve_without_a_trainer():
    batches = [(torch.zeros(4, 1), torch.ones(4)) for _ in range(3)]
    assert len(list(without_trainer(nn.Linear(1, 1), batches, 5))) == 2


@pytest.mark.parametrize("calibration", [None, 7])
def test_without_a_trainer_a_loader_is_needed(calibration):
    with pytest.raises(ValueError, match="calibration= must be a loader, or a list of batches"):
        list(without_trainer(nn.Linear(1, 1), calibration, 5))


def test_event_can_look_at_the_model_and_its_loss(fit):
    callback = Looks(0.5, schedule=AT_3)
    fit(callback)
    assert callback.modes == callback.grads == [False, False]
    assert all(0 < float(loss) < 10 for loss in callback.losses)


def test_number_of_samples_can_be_asked_for(fit):
    callback = Looks(0.5, schedule=AT_3, calibration=30)
    fit(callback)
    assert len(callback.losses) == 4


def test_model_can_be_looked_at_only_at_an_event(fit):
    callback = Looks(0.5, schedule=AT_3)
    fit(callback)
    for ask in (lambda: callback.model, lambda: callback.loss(None), lambda: next(callback.calibrate(1))):
        with pytest.raises(RuntimeError, match="Looks looks at its model only at an event"):
            ask()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_scores_and_plan_without_a_trainer(tiny_net, make_loader):
    model = tiny_net()
    graph = trace(model, model.example_input_array)
    callback = Looks(0.5, calibration=make_loader(), loss_fn=loss_fn)
    assert callback.scores_for(graph).keys() == {group.name for group in graph.groups}
    assert callback.plan_for(graph).groups["conv1"][0] < 12
    assert len(callback.losses) == 2


def test_plain_module_needs_a_loss_function(make_loader):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(RuntimeError, match="Sequential has no training_step; pass loss_fn="):
        Looks(0.5, calibration=make_loader()).scores_for(graph)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)
        self.aux, self.aux_out = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.conv(x).relu()
        return (self.out(x), self.aux_out(self.aux(x).relu())) if self.training else self.out(x)


def test_groups_that_a_method_cannot_look_at_are_frozen_for_it_with_the_reason(make_loader):
    graph = trace(TwoHeads(), torch.zeros(1, 1, 8, 8))
    own = {"calibration": make_loader(), "loss_fn": lambda model, batch: model(batch[0]).sum()}
    callback = Looks(0.9, **own)
    assert list(callback.scores_for(graph)) == ["conv"]
    assert callback._frozen["aux"].startswith("no tensor carries its channels where Looks looks")
    with pytest.raises(NothingToPrune, match="aux: no tensor carries its channels where Looks looks"):
        Looks(0.9, ignore=["conv"], **own).scores_for(graph)
