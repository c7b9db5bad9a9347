import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_prune import LRPET, Budget, L1Filter, Magnitude, Plan, Scratch, conform, count, scratch_epochs, trace
from lightning_prune.commands import main
from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.methods.scratch import read_plan, sparse_std


class Begun(Callback):
    """The weights with which the first step is made."""

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_step == 0:
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def channels(tiny_net):
    """Half of the channels of each group, every other one."""
    net = tiny_net()
    graph = trace(net, net.example_input_array)
    return graph.plan({g.name: torch.arange(g.size) % 2 == 0 for g in graph.groups})


@pytest.fixture
def masks(tiny_net):
    generator = torch.Generator().manual_seed(1)
    shapes = {name: tuple(p.shape) for name, p in tiny_net().named_parameters() if p.ndim > 1}
    return Plan(masks={n: torch.rand(s, generator=generator) < 0.3 for n, s in shapes.items()}, shapes=shapes)


def shared(first, second):
    """How many values two states have in common, in place, where layers draw them: weights, and biases of layers."""
    drawn = [n for n in first if "norm" not in n and first[n].shape == second[n].shape]
    assert drawn
    return sum(int((first[name] == second[name])[first[name] != 0].sum()) for name in drawn)


# Scratch-B


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        ((160, 3.13e8, 2.06e8), 243),  # int(160 * 1.51942) = int(243.1); milestones at a half and three quarters of it
        ((90, 3, 1), 180),  # the cap
        ((90, 3, 1, None), 270),
        ((100, 145, 100), 145),
        ((100, 29, 20), 145),  # 1.45 again: 100 * 1.45 is 145.0, and must not be 144
        ((100, 1, 2), 100),  # never fewer
        ((15, 7, 7), 15),  # nothing pruned
    ],
)
def test_scratch_b_has_the_epochs_that_the_dense_training_pays_for(arguments, epochs):
    assert scratch_epochs(*arguments) == epochs


def test_scratch_b_costs_no_more_than_the_dense_training_and_one_epoch_less_at_most():
    for small in (7, 11, 13, 17, 19):
        spent = scratch_epochs(33, 20, small, cap=None) * small
        assert 33 * 20 - small < spent <= 33 * 20


@pytest.mark.parametrize("wrong", [(0, 2, 1), (5, 0, 1), (5, 2, 0), (5, 2, 1, 0.5)])
def test_scratch_b_refuses_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="wants epochs and flops above 0"):
        scratch_epochs(*wrong)


# new values


def test_deviation_of_a_masked_convolution_is_of_its_surviving_connections():
    # 64 -> 64, 3 x 3, 20 % kept: 7,372.8 of 36,864, so n = 115.2 and sqrt(2 / 115.2) = 0.131762. The dense layer has
    # n = 576 and 0.058926, which is what the simpler way, drawing densely and masking, would give.
    mask = torch.zeros(64 * 64 * 9, dtype=torch.bool)
    mask[:7373] = True
    assert sparse_std(mask.reshape(64, 64, 3, 3), 64) == pytest.approx(math.sqrt(2 / (7373 / 64)))
    assert sparse_std(mask.reshape(64, 64, 3, 3), 64) == pytest.approx(0.131762, abs=3e-6)
    assert sparse_std(torch.ones(64, 64, 3, 3, dtype=torch.bool), 64) == pytest.approx(0.058926, abs=1e-6)


def test_deviation_counts_input_channels_over_all_groups():
    # depthwise, 8 channels: each has 9 connections going out, whatever the weight's second dimension says
    assert sparse_std(torch.ones(8, 1, 3, 3, dtype=torch.bool), 8) == pytest.approx(math.sqrt(2 / 9))


def test_masked_layers_are_drawn_by_their_density(fit, tiny_net):
    class Wide(tiny_net):
        def __init__(self):
            super().__init__(width=32)

    net = Wide()
    generator = torch.Generator().manual_seed(0)
    plan = Plan(
        masks={n: torch.rand(net.get_parameter(n).shape, generator=generator) < 0.25 for n in WIDE},
        shapes={n: tuple(net.get_parameter(n).shape) for n in WIDE},
    )
    begun, dense = Begun(), Begun()
    fit([Scratch(plan, seed=3), begun], model=net, max_steps=1)
    fit([Scratch(plan, seed=3, sparse_init=False), dense], model=Wide(), max_steps=1)
    conv = begun.weights["conv1.weight"][plan.masks["conv1.weight"]]
    assert conv.std().item() == pytest.approx(sparse_std(plan.masks["conv1.weight"], 32), rel=0.05)
    # a linear layer is drawn as it comes, from +-sqrt(1 / 32), and scaled by sqrt(1 / density)
    mask = plan.masks["hidden.weight"]
    scale = math.sqrt(mask.numel() / int(mask.sum()))
    assert torch.allclose(begun.weights["hidden.weight"], dense.weights["hidden.weight"] * scale)


WIDE = ("conv1.weight", "hidden.weight")


def test_shares_no_value_with_the_network_it_is_given(fit, tiny_net, channels):
    trained = fit().lightning_module
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    assert not torch.equal(before["norm1.weight"], torch.ones(12))
    begun = Begun()
    fit([Scratch(channels), begun], model=trained)
    kept = conform(tiny_net(), channels)  # the shapes
    kept.load_state_dict({n: _taken(channels, n, before[n]) for n in before})
    assert shared(begun.weights, kept.state_dict()) == 0
    assert torch.equal(begun.weights["norm1.weight"], torch.ones(6))
    assert torch.equal(begun.weights["norm1.running_mean"], torch.zeros(6))
    assert begun.weights["norm1.num_batches_tracked"] == 0


def _taken(plan, name, value):
    for dim, index in {**plan.kept, **plan.buffers}.get(name, {}).items():
        value = value.index_select(dim, index)
    return value


def test_same_seed_repeats_and_another_shares_nothing(fit, tiny_net, channels):
    begun = []
    for run, own in ((0, None), (0, None), (1, None), (0, 5), (1, 5)):
        pl.seed_everything(0, verbose=False)
        net = tiny_net()
        begun.append(Begun())
        fit([Scratch(channels, seed=own), begun[-1]], model=net, max_steps=1, seed=run)
    first, again, other, fifth, fifth_again = (each.weights for each in begun)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(fifth[name], fifth_again[name]) for name in first)
    assert shared(first, other) == shared(first, fifth) == 0


def test_drawing_leaves_the_order_of_data_alone(fit, tiny_net, channels, make_loader):
    class Seen(Callback):
        def __init__(self):
            self.labels = []

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            self.labels.append(batch[1].tolist())

    seen = [Seen(), Seen()]
    for each, callbacks in zip(seen, ([], [Scratch(channels)]), strict=True):
        pl.seed_everything(0, verbose=False)
        fit([*callbacks, each], model=tiny_net(), loader=make_loader(shuffle=True))
    assert seen[0].labels == seen[1].labels


# what is trained


def test_channels_are_cut_before_the_first_step_and_the_optimizer_follows(fit, tiny_net, channels):
    callback, begun = Scratch(channels), Begun()
    trainer = fit([callback, begun])
    model = trainer.lightning_module
    assert begun.weights["conv1.weight"].shape == (6, 3, 3, 3)
    assert not torch.equal(model.conv1.weight, begun.weights["conv1.weight"])
    cost, dense = count(model, model.example_input_array), count(tiny_net(), model.example_input_array)
    assert (callback.report.after.flops, callback.report.after.params) == (cost.flops, cost.params)
    assert callback.report.before.flops == dense.flops
    assert {m.shape for m in (s["momentum_buffer"] for s in trainer.optimizers[0].state.values())} == {
        p.shape for p in model.parameters()
    }
    assert callback.plan == channels


def test_trains_what_a_small_network_with_these_weights_would_be(fit, tiny_net, channels):
    # the same network made small by hand, given the same start: two fits step by step alike
    begun = Begun()
    scratch = fit([Scratch(channels), begun]).lightning_module
    by_hand = conform(tiny_net(), channels)
    by_hand.load_state_dict(begun.weights)
    fit(model=by_hand)
    for name, value in scratch.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], msg=name)


def test_masks_hold_for_the_whole_fit_bit_for_bit(fit, masks):
    callback = Scratch(masks)
    model = fit(callback).lightning_module
    for name, mask in masks.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    assert callback.plan == masks
    sparse = callback.report.rows[-1]["prune/flops_sparse"]
    graph = trace(model, model.example_input_array)
    saved = sum(graph.weight_flops()[n] * (1 - m.float().mean().item()) for n, m in masks.masks.items())
    assert sparse == pytest.approx(graph.cost().flops - saved)
    removed = sum(int((~mask).sum()) for mask in masks.masks.values())
    assert callback.report.after.params == sum(p.numel() for p in model.parameters()) - removed


def test_ranks_become_two_layers_that_the_optimizer_steps(fit, tiny_net):
    pruner = LRPET(Budget(0.6))
    fit(pruner)
    callback, begun = Scratch(pruner.plan), Begun()
    model = fit([callback, begun]).lightning_module
    assert pruner.plan.ranks
    cost = count(model, model.example_input_array)
    assert cost.flops == pruner.report.after.flops == callback.report.after.flops
    for name in pruner.plan.ranks:
        for part in ("0", "1"):
            assert not torch.equal(model.get_parameter(f"{name}.{part}.weight"), begun.weights[f"{name}.{part}.weight"])


def test_channels_and_masks_of_two_methods_go_together(fit, tiny_net):
    cut, masked = L1Filter(0.6), Magnitude(0.2)
    fit([cut, masked], max_epochs=4)
    plan = cut.plan.merge(masked.plan)
    model = fit(Scratch(plan)).lightning_module
    for name in plan.masks:
        assert torch.equal(model.get_parameter(name) != 0, plan.mask_now(name))
    assert model.conv1.weight.shape == plan.current_shape("conv1.weight")


def test_a_network_that_has_the_plans_shapes_already_is_taken_as_it_is(fit, tiny_net, channels):
    small = conform(tiny_net(), channels)
    begun, other = Begun(), Begun()
    fit([Scratch(channels), begun], model=small)
    fit([Scratch(channels), other])
    assert all(torch.equal(value, other.weights[name]) for name, value in begun.weights.items())


@pytest.mark.parametrize("what", ["channels", "masks"])
def test_resumes_to_the_same_weights(what, fit, save_each, tmp_path, request):
    plan = request.getfixturevalue(what)
    whole = fit([Scratch(plan), save_each()], max_epochs=3).lightning_module
    again = fit(Scratch(plan), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt", seed=7).lightning_module
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_resuming_with_another_plan_is_refused(fit, save_each, tmp_path, masks):
    fit([Scratch(masks), save_each()])
    other = Plan(masks={n: ~m for n, m in masks.masks.items()}, shapes=masks.shapes)
    with pytest.raises(IncompatibleCheckpoint, match="another plan"):
        fit(Scratch(other), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")


# where the plan comes from


def test_plan_is_read_from_its_file_or_from_a_checkpoint(fit, tmp_path, channels):
    channels.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == channels
    pruner = L1Filter(0.5)
    fit(pruner).save_checkpoint(tmp_path / "pruned.ckpt")
    callback = Scratch(tmp_path / "pruned.ckpt")
    fit(callback)
    assert callback.plan == pruner.plan
    fit().save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(IncompatibleCheckpoint, match=r"dense\.ckpt' holds no plan"):
        fit(Scratch(tmp_path / "dense.ckpt"))


def test_plan_of_another_network_is_refused_before_anything_changes(fit, tiny_net, channels):
    net = tiny_net(width=8)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(IncompatibleCheckpoint, match=r"not of this TinyNet: of 'stem.weight' it keeps \(3, 1, 3, 3\)"):
        fit(Scratch(channels), model=net)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_arguments_that_make_no_sense_are_refused(channels):
    with pytest.raises(ValueError, match="keeps everything"):
        Scratch(Plan())
    with pytest.raises(ValueError, match="wants a Plan, or the path of a plan or checkpoint, got float"):
        Scratch(0.5)
    with pytest.raises(ValueError, match="seed must be a whole number from 0, got -1"):
        Scratch(channels, seed=-1)


def test_demo_refuses_it(capsys, tmp_path):
    assert main(["demo", "--method", "scratch", "--out", str(tmp_path / "out")]) == 1
    assert "Scratch trains the plan of another method; see lightning-prune compare" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_method_beside_it_is_refused(fit, channels):
    with pytest.raises(RuntimeError, match="cannot go together: Scratch trains what a plan leaves"):
        fit([Scratch(channels), L1Filter(0.5)])


# layers that do not draw themselves


def test_value_that_no_layer_draws_needs_a_function(fit, tiny_net):
    class Scaled(tiny_net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((6,), 0.5))

        def forward(self, x):
            x = F.relu(self.norm0(self.stem(x))) * self.scale[:, None, None]
            return self.fc(F.relu(self.hidden(x.mean((2, 3)))))

    def reset(net):
        for parameter in net.parameters():
            nn.init.uniform_(parameter, 0.25, 0.75)

    net = Scaled()
    plan = Plan(masks={"fc.weight": torch.arange(36).reshape(3, 12) % 2 == 0}, shapes={"fc.weight": (3, 12)})
    with pytest.raises(RuntimeError, match="no way to draw scale anew"):
        fit(Scratch(plan), model=net)
    begun = Begun()
    fit([Scratch(plan, reset=reset, sparse_init=False), begun], model=Scaled(), max_steps=1)
    assert 0.25 <= begun.weights["stem.weight"].min() <= begun.weights["stem.weight"].max() <= 0.75
    assert not torch.equal(begun.weights["scale"], torch.full((6,), 0.5))


def test_weight_behind_a_parametrization_is_not_taken_for_drawn(fit, tiny_net):
    # reset_parameters() writes into what the parametrization computes, and the values below stay as they were
    net = tiny_net()
    nn.utils.parametrizations.weight_norm(net.hidden)
    plan = Plan(masks={"fc.weight": torch.arange(36).reshape(3, 12) % 2 == 0}, shapes={"fc.weight": (3, 12)})
    with pytest.raises(RuntimeError, match=r"no way to draw hidden\.parametrizations"):
        fit(Scratch(plan), model=net)
