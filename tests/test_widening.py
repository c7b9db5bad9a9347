import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import SOSP, Budget, OneShot, bottlenecks, count, trace, widen
from lightning_prune.decision import Plan
from lightning_prune.errors import UnsafeCut
from lightning_prune.graph.trace import output_tensors, run, undisturbed
from tests.nets import NETS

# concatenation, gates, shuffles, grouped and transposed convolutions, flattened maps, padded shortcuts, heads, units
GROWING = ["unet", "glu", "channel_shuffle", "transposed", "pixel_shuffle", "squeeze_excite", "padded_shortcuts"]
GROWING += ["conv1d", "conv3d", "several_inputs", "shared_branches", "cross_attention", "grouped_query_attention"]
ONLY_ANEW = ["lstm_bidirectional", "group_norm", "multihead_attention", "mixer", "transformer_encoder", "weight_norm"]


def built(name):
    torch.manual_seed(0)
    return NETS[name].build(), NETS[name].inputs(2)


def outputs(model, inputs):
    with undisturbed(model):
        return output_tensors(run(model.eval(), inputs, 2))


def plan_of(**counts):
    return Plan(groups=counts)


def test_a_bottleneck_lost_less_than_a_part_of_what_all_lost():
    # of 30 channels 15 went, a half; of the groups 0.1, 0.5, 0.9
    plan = plan_of(a=(5, 10), b=(9, 10), c=(1, 10))
    assert bottlenecks(plan) == {"b": 2.0}
    assert bottlenecks(plan, threshold=0.15) == {}
    assert bottlenecks(plan, threshold=1, factor=1.5) == {"b": 1.5}


def test_bottlenecks_begin_with_the_least_pruned():
    plan = plan_of(a=(8, 10), b=(9, 10), c=(10, 10), d=(1, 20))
    assert list(bottlenecks(plan)) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("groups", "settings", "message"),
    [
        ({}, {}, "no channel of any group went"),
        ({"a": (10, 10)}, {}, "no channel of any group went"),
        ({"a": (5, 10)}, {"threshold": 0}, r"threshold must be in \(0, 1\], got 0"),
        ({"a": (5, 10)}, {"factor": 1.0}, "factor must be above 1, got 1.0"),
    ],
)
def test_bottlenecks_refuse_what_tells_nothing(groups, settings, message):
    with pytest.raises(ValueError, match=message):
        bottlenecks(Plan(groups=groups), **settings)


@pytest.mark.parametrize("name", [*GROWING, *ONLY_ANEW])
def test_every_group_can_be_wider_with_all_that_belongs_to_it(name, wrong_attributes):
    model, inputs = built(name)
    before = copy.deepcopy(model)
    graph = trace(model, inputs)
    for number, group in enumerate(graph.groups):
        wider = widen(model, {group.name: 1.5}, inputs)
        size = int(1.5 * group.size + 0.5)
        counts = graph.costs.dense.copy()
        counts[number] = size
        assert {g.name: g.size for g in trace(wider, inputs).groups}[group.name] == size
        predicted, counted = graph.costs.cost(counts), count(wider, inputs)
        assert (predicted.flops, predicted.params) == (counted.flops, counted.params)
        assert wrong_attributes(wider) == []
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", GROWING)
def test_kept_weights_compute_what_they_computed_in_a_wider_network(name, with_random_norms):
    model, inputs = built(name)
    model = with_random_norms(model).double()
    inputs = torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    expected = outputs(model, inputs)
    graph = trace(model, inputs)
    wider = widen(model, {group.name: 1.5 for group in graph.groups}, inputs, keep=True)
    assert sum(p.numel() for p in wider.parameters()) > 1.3 * sum(p.numel() for p in model.parameters())
    for a, b in zip(expected, outputs(wider, inputs), strict=True):
        assert float((a - b).abs().max()) < 1e-9 * float(a.abs().max())


def test_new_channels_learn_from_the_first_step(tiny_net):
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    wider = widen(tiny_net(), {"conv1": 2}, x, keep=True)
    wider(x).square().sum().backward()
    assert bool((wider.conv2.weight[:, 12:] == 0).all())
    assert float(wider.conv2.weight.grad[:, 12:].abs().amin(dim=(0, 2, 3)).max()) > 0
    assert bool((wider.conv1.weight[12:] != 0).all())


def test_all_weights_are_drawn_anew_from_the_global_seed(tiny_net):
    x = torch.randn(4, 1, 8, 8)
    model = tiny_net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
        model.norm1.running_mean.fill_(3.0)
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(widen(model, {"stem": 2}, x))
    torch.manual_seed(1)
    fresh = tiny_net(width=12)
    assert all(not bool((p == 7).any()) for p in made[0].parameters())
    assert bool((made[0].norm1.running_mean == 0).all())
    assert made[0].stem.weight.shape == fresh.stem.weight.shape == (12, 1, 3, 3)
    # uniform in +- 1 / sqrt(fan in), of the new fan in
    assert float(made[0].conv1.weight.detach().abs().max()) == pytest.approx(1 / (12 * 9) ** 0.5, rel=0.02)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in made), strict=True))


def test_a_parameter_that_no_module_resets_keeps_mean_and_spread(net):
    torch.manual_seed(0)
    scale = nn.Parameter(3 + 0.1 * torch.randn(200, 1, 1))
    layers = {"conv": nn.Conv2d(1, 200, 1), "out": nn.Conv2d(200, 2, 1)}
    model = net(lambda n, x: n.out(n.scale * n.conv(x)), scale=scale, **layers)
    wider = widen(model, {"conv": 2}, torch.randn(2, 1, 4, 4))
    assert wider.scale.shape == (400, 1, 1)
    assert float(wider.scale.detach().mean()) == pytest.approx(3, abs=0.05)
    assert float(wider.scale.detach().std()) == pytest.approx(0.1, rel=0.2)
    assert not bool(torch.isin(wider.scale, scale).any())


def test_a_norm_across_channels_cannot_keep_its_function(net):
    layers = {"first": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "out": nn.Linear(6, 2)}
    model = net(lambda n, x: n.out(n.norm(n.first(x))), **layers)
    x = torch.randn(3, 4)
    with pytest.raises(UnsafeCut, match=r"Net with 12 channels in 'first' does not compute what it did"):
        widen(model, {"first": 2}, x, keep=True)
    assert widen(model, {"first": 2}, x).norm.normalized_shape == (12,)


def test_unknown_and_frozen_groups_and_small_factors_are_refused(tiny_net):
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"group 'conv9' is unknown; groups are stem, conv1, hidden"):
        widen(tiny_net(), {"conv9": 2}, x)
    with pytest.raises(ValueError, match="group 'fc' is frozen: it is an output of the model"):
        widen(tiny_net(), {"fc": 2}, x)
    for factor in (1.0, 0.5, 1.01):
        with pytest.raises(ValueError, match=f"factor {factor} adds no channel to the 6 of group 'stem'"):
            widen(tiny_net(), {"stem": factor}, x)


def test_code_that_takes_no_more_channels_is_told(net):
    def forward(n, x):
        x = n.first(x)
        if x.shape[1] > 6:
            raise ArithmeticError("six is the most")
        return n.out(F.relu(x))

    model = net(forward, first=nn.Linear(4, 6), out=nn.Linear(6, 2))
    with pytest.raises(UnsafeCut, match=r"12 channels in 'first' does not run: ArithmeticError: six is the most"):
        widen(model, {"first": 2}, torch.randn(3, 4))


def test_a_buffer_that_nothing_makes_anew_is_told():
    model, inputs = built("spectral_norm")
    with pytest.raises(UnsafeCut, match=r"buffer '.*_u' has an entry for each channel, and _SpectralNorm has no reset"):
        widen(model, {"conv1": 2}, inputs)


def test_weights_without_values_cannot_be_kept():
    model, inputs = built("meta")
    name = trace(model, inputs).groups[0].name
    assert count(widen(model, {name: 2}, inputs), inputs).flops > count(model, inputs).flops
    with pytest.raises(ValueError, match="keep=True keeps values, which tensors on the meta device do not have"):
        widen(model, {name: 2}, inputs, keep=True)


def test_dtype_and_frozen_parameters_stay(tiny_net):
    model = tiny_net().double()
    model.conv1.weight.requires_grad_(False)
    wider = widen(model, {"conv1": 2}, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert {p.dtype for p in wider.parameters()} == {torch.float64}
    assert [n for n, p in wider.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert model.conv1.weight.shape[0] == 12


def test_expand_pruning_from_end_to_end(fit, tiny_net):
    first = SOSP(0.4, schedule=OneShot(4, unit="step"), samples=16)
    trainer = fit(first)
    x = tiny_net().example_input_array
    old = count(tiny_net(), x).flops
    wider = widen(tiny_net(), first.bottlenecks(threshold=1.0), x)
    assert count(wider, x).flops > old
    back = SOSP(Budget(old / count(wider, x).flops), schedule=OneShot(4, unit="step"), samples=16)
    fit(back, model=wider)
    assert count(wider, x).flops <= old
    assert count(trainer.lightning_module, x).flops <= 0.4 * old
    twice = widen(trainer.lightning_module, {"hidden": 2}, x)  # one that was cut, and has a trainer
    assert twice.hidden.out_features == 2 * trainer.lightning_module.hidden.out_features
