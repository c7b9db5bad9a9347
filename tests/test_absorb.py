import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune.absorb import absorb, absorbable, may_be_constant
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.decision import Plan
from lightning_prune.errors import TraceError, UnsafeCut
from lightning_prune.graph.trace import Calls
from lightning_prune.schedule import OneShot
from lightning_prune.surgery import cut, trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KEEP = torch.tensor([True, False, True, True])  # of the first layer, channel 1 goes


def settled(norm):
    """A batch norm whose running statistics are not those of a fresh one."""
    norm.running_mean.copy_(torch.linspace(-0.5, 0.5, norm.num_features))
    norm.running_var.copy_(torch.linspace(0.5, 1.5, norm.num_features))
    return norm


@torch.no_grad()
def stem(beta=3.0):
    """3 -> conv (4) -> norm -> relu; channel 1 is relu(beta) everywhere, since its norm's weight is 0."""
    torch.manual_seed(0)
    norm = settled(nn.BatchNorm2d(4))
    norm.weight.copy_(torch.tensor([1.0, 0.0, 0.8, 1.2]))
    norm.bias.copy_(torch.tensor([0.1, beta, 0.3, -0.2]))
    return [nn.Conv2d(3, 4, 3), norm, nn.ReLU()]


def net(*after, beta=3.0):
    return nn.Sequential(*stem(beta), *after).eval()


@torch.no_grad()
def run(model, inputs=IMAGES):
    return model.eval()(inputs)


def cut_without(model, tolerance=0.0, keep=KEEP, inputs=IMAGES):
    """Outputs dense, cut, and cut with constants absorbed; and what was absorbed."""
    dense = run(model, inputs)
    plain, absorbing = copy.deepcopy(model), copy.deepcopy(model)
    graph = trace(plain, inputs)
    name = graph.groups[0].name
    cut(plain, graph.plan({name: keep}), absorb=False)
    graph = trace(absorbing, inputs)
    plan = graph.plan({name: keep})
    found = absorb(absorbing, plan, graph, tolerance=tolerance)
    cut(absorbing, plan, absorb=False)
    return dense, run(plain, inputs), run(absorbing, inputs), found


def far(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / a.abs().max()).item()


# constants and their readers


def test_bias_of_a_convolution_gets_the_kernel_sum_times_the_constant():
    model = net(nn.Conv2d(4, 2, 3))
    weight, bias = model[3].weight.detach().clone(), model[3].bias.detach().clone()
    graph = trace(model, IMAGES)
    found = absorb(model, graph.plan({"0": KEEP}), graph)
    assert torch.allclose(model[3].bias, bias + 3 * weight[:, 1].sum((1, 2)))  # relu(0 * x + 3) = 3
    assert torch.equal(model[3].weight, weight)
    assert (found.readers, found.left, found.reasons) == ({"3.weight": 1}, {}, {})


def test_cut_network_computes_what_the_dense_one_does():
    dense, plain, absorbed, _ = cut_without(net(nn.Conv2d(4, 2, 3)))
    assert far(dense, plain) > 0.1
    assert far(dense, absorbed) < 1e-5


def test_with_zero_padding_only_the_inside_of_the_image_is_unchanged():
    dense, plain, absorbed, _ = cut_without(net(nn.Conv2d(4, 2, 3, padding=1)))
    inside = (..., slice(1, -1), slice(1, -1))
    assert far(dense[inside], plain[inside]) > 0.1
    assert far(dense[inside], absorbed[inside]) < 1e-5
    assert far(dense, absorbed) > 1e-2


def test_linear_reader_behind_a_flatten_gets_all_columns_of_the_channel():
    model = net(nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 3))
    weight, bias = model[5].weight.detach().clone(), model[5].bias.detach().clone()
    dense, plain, absorbed, found = cut_without(model)
    assert far(dense, plain) > 0.1
    assert far(dense, absorbed) < 1e-5
    assert found.readers == {"5.weight": 4}  # 2 x 2 positions
    assert torch.allclose(found.shifts["5.bias"].float(), 3 * weight[:, 4:8].sum(1))
    assert torch.equal(model[5].bias, bias)


def test_linear_reader_behind_a_flatten_gets_the_value_of_each_position():
    # depthwise 3x3 of ones, padded, over 2x2 of the constant 3: 12 everywhere; over 3x3: 12, 18 and 27 by position
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    with torch.no_grad():
        depthwise.weight.fill_(1.0)
        depthwise.bias.zero_()
    model = net(nn.AvgPool2d(2), depthwise, nn.Flatten(), nn.Linear(36, 2))
    dense, plain, absorbed, found = cut_without(model)
    columns = model[6].weight.detach()[:, 9:18]
    expected = columns @ torch.tensor([12.0, 18, 12, 18, 27, 18, 12, 18, 12])
    assert torch.allclose(found.shifts["6.bias"].float(), expected, rtol=1e-4)
    assert far(dense, plain) > 0.1
    assert far(dense, absorbed) < 1e-5


def test_running_mean_of_the_batch_norm_behind_a_reader_without_bias_goes_down():
    model = net(nn.Conv2d(4, 2, 3, bias=False), settled(nn.BatchNorm2d(2)), nn.ReLU(), nn.Conv2d(2, 2, 1))
    mean, weight = model[4].running_mean.clone(), model[3].weight.detach()
    dense, plain, absorbed, found = cut_without(model)
    assert far(dense, plain) > 0.05
    assert far(dense, absorbed) < 1e-5
    assert torch.allclose(found.shifts["4.running_mean"].float(), -3 * weight[:, 1].sum((1, 2)))
    assert torch.equal(model[4].running_mean, mean)


def test_shift_follows_where_the_reader_loses_channels_itself():
    model = net(nn.Conv2d(4, 3, 3, bias=False), settled(nn.BatchNorm2d(3)), nn.ReLU(), nn.Conv2d(3, 2, 1))
    graph = trace(model, IMAGES)
    plan = graph.plan({"0": KEEP, "3": torch.tensor([True, False, True])})
    wanted = (model[4].running_mean - 3 * model[3].weight.detach()[:, 1].sum((1, 2)))[[0, 2]]
    found = absorbable(model, plan, graph)
    cut(model, plan, absorb=False)
    found.add_to(model, plan.relative_to(Plan()))
    assert torch.allclose(model[4].running_mean, wanted)


def test_bias_goes_first_where_a_batch_norm_follows_too():
    *_, found = cut_without(net(nn.Conv2d(4, 2, 3), settled(nn.BatchNorm2d(2))))
    assert set(found.shifts) == {"3.bias"}


def test_bias_that_is_added_on_its_own_is_found():
    # a linear layer adds its bias to the product where its input is not contiguous
    torch.manual_seed(0)
    model = Net(lambda self, x: self.reader(x.flatten(2).transpose(1, 2)), reader=nn.Linear(4, 2))
    dense, plain, absorbed, found = cut_without(model)
    assert set(found.shifts) == {"reader.bias"}
    assert far(dense, absorbed) < 1e-5 < far(dense, plain)


def test_linear_reader_without_bias_shifts_a_batch_norm_only_where_it_has_the_channel_axis():
    def features(after):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), after).eval()
        with torch.no_grad():
            model[0].weight[1], model[0].bias[1] = 0, 2
        return model

    right = cut_without(features(settled(nn.BatchNorm1d(3))), inputs=torch.randn(6, 5))
    assert far(right[0], right[2]) < 1e-5 < far(right[0], right[1])
    # (B, 3 tokens, 3 features): this norm is over tokens
    *_, found = cut_without(features(settled(nn.BatchNorm1d(3))), inputs=torch.randn(6, 3, 5))
    assert found.left == {"2.weight": 1}


def test_reader_with_neither_bias_nor_norm_is_left_and_counted():
    model = net(nn.Conv2d(4, 2, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(2))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    graph = trace(model, IMAGES)
    found = absorb(model, graph.plan({"0": KEEP}), graph)
    assert not found
    assert found.left == {"3.weight": 1}
    assert "no bias" in found.reasons["3.weight"]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


class Net(nn.Module):
    """Layers of a stem, and what a test makes of them."""

    def __init__(self, forward, beta=3.0, **layers):
        super().__init__()
        self.stem = nn.Sequential(*stem(beta))
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.eval()

    def forward(self, x):
        return self._forward(self, self.stem(x))


def test_norm_is_not_shifted_where_something_else_gets_the_readers_output_too():
    def forward(self, x):
        y = self.reader(x)
        return self.norm(y) + y

    *_, found = cut_without(Net(forward, reader=nn.Conv2d(4, 2, 1, bias=False), norm=nn.BatchNorm2d(2)))
    assert found.left == {"reader.weight": 1}
    model = Net(lambda self, x: [self.norm(y := self.reader(x)), y], reader=nn.Conv2d(4, 2, 1, bias=False),
                norm=nn.BatchNorm2d(2))  # fmt: skip
    graph = trace(model, IMAGES)
    assert absorb(model, graph.plan({"stem.0": KEEP}), graph).left == {"reader.weight": 1}


def test_norm_is_not_shifted_where_the_output_was_changed_in_place_before():
    layers = {"reader": nn.Conv2d(4, 2, 1, bias=False), "norm": nn.BatchNorm2d(2)}
    *_, found = cut_without(Net(lambda self, x: self.norm(F.relu_(self.reader(x))), **layers))
    assert found.left == {"reader.weight": 1}


def test_each_of_several_readers_gets_its_own():
    def forward(self, x):
        return self.a(x) + self.b(F.max_pool2d(x, 3, 1, 1)) * torch.sigmoid(self.c(x.mean((2, 3))))[:, :, None, None]

    model = Net(forward, a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 2, 1), c=nn.Linear(4, 2))
    dense, plain, absorbed, found = cut_without(model)
    assert found.readers == {"a.weight": 1, "b.weight": 1, "c.weight": 1}
    assert far(dense, plain) > 0.05
    assert far(dense, absorbed) < 1e-5


def test_reader_called_twice_gets_its_shift_once():
    model = Net(lambda self, x: self.reader(x) + self.reader(x * 1.0).square(), reader=nn.Conv2d(4, 2, 1))
    dense, _, absorbed, found = cut_without(model)
    assert far(dense, absorbed) < 1e-5
    assert torch.allclose(found.shifts["reader.bias"].float(), 3 * model.reader.weight.detach()[:, 1, 0, 0])


def test_reader_called_with_two_constants_is_not_absorbed():
    *_, found = cut_without(Net(lambda self, x: self.reader(x) + self.reader(x * 2.0), reader=nn.Conv2d(4, 2, 1)))
    assert (found.shifts, found.left) == ({}, {})


def test_reader_behind_two_batch_norms_shifts_both():
    norms = {"one": settled(nn.BatchNorm2d(2)), "two": nn.BatchNorm2d(2)}
    reader = nn.Conv2d(4, 2, 1, bias=False)
    model = Net(lambda self, x: self.one(self.reader(x)) + self.two(self.reader(x)), reader=reader, **norms)
    dense, _, absorbed, found = cut_without(model)
    assert set(found.shifts) == {"one.running_mean", "two.running_mean"}
    assert far(dense, absorbed) < 1e-5


def test_bias_that_serves_another_layer_too_is_left():
    model = Net(lambda self, x: self.b(self.a(x)), a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(2, 2, 1))
    model.b.bias = model.a.bias
    *_, found = cut_without(model)
    assert found.left == {"a.weight": 1}
    assert "another layer" in found.reasons["a.weight"]


def test_weight_that_is_computed_is_said_not_to_have_been_looked_at():
    reader = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 1))
    model = net(reader)
    graph = trace(model, IMAGES)
    found = absorb(model, graph.plan({"0": KEEP}), graph)
    assert not found
    assert all("as it is" in why for why in found.reasons.values())
    assert len(found.reasons) >= 1


# what a constant comes through


def test_channel_dead_before_a_depthwise_convolution_leaves_the_activation_of_its_bias():
    # relu(0 x - 5) = 0, and relu(0 + depthwise bias 2) = 2
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    with torch.no_grad():
        depthwise.bias[1] = 2.0
    model = net(depthwise, nn.ReLU(), nn.Conv2d(4, 2, 1), beta=-5.0)
    dense, plain, absorbed, found = cut_without(model)
    assert torch.allclose(found.shifts["5.bias"].float(), 2 * model[5].weight.detach()[:, 1, 0, 0])
    assert far(dense, plain) > 0.05
    assert far(dense, absorbed) < 1e-5


def test_constant_through_a_padded_depthwise_convolution_is_that_of_the_inside():
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = net(depthwise, nn.Conv2d(4, 2, 1))
    dense, plain, absorbed, _ = cut_without(model)
    inside = (..., slice(1, -1), slice(1, -1))
    assert far(dense[inside], plain[inside]) > 0.05
    assert far(dense[inside], absorbed[inside]) < 1e-5
    assert far(dense, absorbed) > 1e-3


def test_constant_that_is_padded_by_itself_is_that_of_the_inside():
    dense, plain, absorbed, _ = cut_without(Net(lambda self, x: self.reader(F.pad(x, (1, 1, 1, 1))),
                                                reader=nn.Conv2d(4, 2, 3)))  # fmt: skip
    inside = (..., slice(1, -1), slice(1, -1))
    assert far(dense[inside], plain[inside]) > 0.05
    assert far(dense[inside], absorbed[inside]) < 1e-5


def test_channel_whose_rim_varies_over_samples_is_not_constant():
    rim = F.pad(torch.zeros(4, 4), (1, 1, 1, 1), value=1.0)
    layers = {"inner": nn.Conv2d(4, 4, 1), "reader": nn.Conv2d(4, 2, 1)}
    *_, found = cut_without(Net(lambda self, x: self.reader(x + rim * self.inner(x)), **layers))
    assert found.readers == {"inner.weight": 1}


def test_channel_whose_lowest_value_is_the_same_everywhere_is_not_constant():
    # clamped to 1 from below; at each position some of 32 samples are, others are not
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = net(nn.Hardtanh(1.0, 100.0), nn.Conv2d(4, 2, 1))
    graph = trace(model, images)
    low = run(model[:4], images)[:, 2].amin(0)
    assert torch.equal(low, torch.ones(6, 6))
    assert not absorbable(model, graph.plan({"0": torch.tensor([True, True, False, True])}), graph)


def test_channel_that_varies_over_samples_but_not_over_positions_is_not_constant():
    model = Net(lambda self, x: self.reader(x.mean((2, 3), keepdim=True).expand_as(x)), reader=nn.Conv2d(4, 2, 1))
    graph = trace(model, IMAGES)
    keep = torch.tensor([False, False, True, True])
    assert absorbable(model, graph.plan({"stem.0": keep}), graph).readers == {"reader.weight": 1}


def test_channel_that_is_the_same_in_all_samples_but_a_ramp_over_positions_is_not_constant():
    def forward(self, x):
        ramp = torch.linspace(0, 1, x.shape[-1])
        return self.reader(self.depthwise(x + ramp))

    layers = {"depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4), "reader": nn.Conv2d(4, 2, 1)}
    *_, found = cut_without(Net(forward, **layers))
    assert (found.shifts, found.left) == ({}, {})


def test_sum_of_constants_over_a_residual_connection():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        inner[1].weight[1], inner[1].bias[1] = 0, -1
    model = Net(lambda self, x: self.reader(x + self.inner(x)), inner=inner, reader=nn.Conv2d(4, 2, 3))
    dense, plain, absorbed, found = cut_without(model)
    weight = model.reader.weight.detach()
    assert torch.allclose(found.shifts["reader.bias"].float(), 2 * weight[:, 1].sum((1, 2)))  # 3 - 1
    assert found.readers == {"inner.0.weight": 1, "reader.weight": 1}
    assert far(dense, plain) > 0.05
    assert far(dense, absorbed) < 1e-5


def test_sum_of_a_constant_and_something_else_is_not_constant():
    model = Net(lambda self, x: self.reader(x + self.inner(x)), inner=nn.Conv2d(4, 4, 1), reader=nn.Conv2d(4, 2, 3))
    *_, found = cut_without(model)
    assert found.readers == {"inner.weight": 1}


def test_grouped_convolution_reads_the_same_index_of_every_group():
    # channels 1 and 3 go together, of which the norm makes 3 and 2
    model = net(nn.Conv2d(4, 6, 1, groups=2))
    with torch.no_grad():
        model[1].weight[3], model[1].bias[3] = 0, 2
    weight = model[3].weight.detach().squeeze()
    graph = trace(model, IMAGES)
    pair = graph.group("0").producers[0].indices.tolist()
    keep = torch.tensor([1 not in row for row in pair])
    dense = run(model)
    plan = graph.plan({"0": keep})
    found = absorb(model, plan, graph)
    cut(model, plan, absorb=False)
    assert torch.allclose(found.shifts["3.bias"].float(), weight[:, 1] * torch.tensor([3.0, 3, 3, 2, 2, 2]))
    assert far(dense, run(model)) < 1e-5


def test_transposed_convolution_with_stride_1_gets_its_kernel_sum():
    dense, plain, absorbed, found = cut_without(net(nn.ConvTranspose2d(4, 2, 2)))
    inside = (..., slice(1, -1), slice(1, -1))
    assert found.readers == {"3.weight": 1}
    assert far(dense[inside], plain[inside]) > 0.05
    assert far(dense[inside], absorbed[inside]) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "everywhere"),
    [(3, 1, 1, True), (3, 1, 2, True), (4, 2, 1, True), (3, 2, 2, False), (4, 4, 2, False)],
)
def test_grouped_transposed_convolution_gives_what_running_it_on_the_constant_gives(
    kernel, stride, dilation, everywhere
):
    # of 2 groups of 3 inputs, index 1 of each goes, where the norm makes 3 and 2; with stride all taps are the same.
    # Where stride and dilation are even, taps reach even positions only, and the odd ones get nothing.
    torch.manual_seed(0)
    reader = nn.ConvTranspose2d(6, 4, kernel, stride, groups=2, dilation=dilation)
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.weight[[1, 4]], norm.bias[[1, 4]] = 0, torch.tensor([3.0, 2.0])
        if stride > 1:
            reader.weight.copy_(reader.weight[..., :1, :1].expand_as(reader.weight).clone())
    model = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.ReLU(), reader).eval()
    gone = Plan(kept={"3.weight": {0: torch.tensor([0, 2, 3, 5])}}, shapes={"3.weight": tuple(reader.weight.shape)})
    found = absorbable(model, gone, trace(model, IMAGES))
    constant = torch.zeros(1, 6, 8, 8)
    constant[:, [1, 4]] = torch.tensor([3.0, 2.0])[:, None, None]
    expected = F.conv_transpose2d(constant, reader.weight.detach(), None, stride, groups=2, dilation=dilation)
    middle = expected[0, :, expected.shape[-1] // 2, expected.shape[-1] // 2]
    assert (found.left == {"3.weight": 2}) is not everywhere
    assert torch.allclose(found.shifts.get("3.bias", torch.zeros(4)).float(), middle * everywhere, rtol=1e-4)


def test_transposed_convolution_with_stride_is_absorbed_only_if_all_phases_get_the_same():
    reader = nn.ConvTranspose2d(4, 2, 2, stride=2)
    *_, found = cut_without(net(reader))
    assert found.left == {"3.weight": 1}
    assert "stride" in found.reasons["3.weight"]
    with torch.no_grad():
        reader.weight[1] = torch.tensor([0.5, -1.0])[:, None, None]
    dense, plain, absorbed, found = cut_without(net(reader))
    assert found.shifts["3.bias"].tolist() == pytest.approx([1.5, -3.0])
    assert far(dense, absorbed) < 1e-5 < far(dense, plain)


# what is not constant


def test_channels_that_vary_are_not_touched():
    model = net(nn.Conv2d(4, 2, 3))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    graph = trace(model, IMAGES)
    found = absorb(model, graph.plan({"0": torch.tensor([True, True, False, True])}), graph)
    assert (found.shifts, found.readers, found.left, found.reasons) == ({}, {}, {}, {})
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_channel_that_is_kept_is_not_absorbed():
    model = net(nn.Conv2d(4, 2, 3))
    graph = trace(model, IMAGES)
    found = absorb(model, graph.plan({"0": torch.tensor([False, True, False, True])}), graph)
    assert not found


def test_dead_channels_need_nothing():
    *_, found = cut_without(net(nn.Conv2d(4, 2, 3, bias=False), beta=-5.0))
    assert (found.shifts, found.left) == ({}, {})


@pytest.mark.parametrize("inputs", [torch.ones(1, 3, 8, 8), torch.zeros(2, 3, 8, 8), IMAGES[:1]])
def test_example_without_variation_does_not_make_all_channels_constant(inputs):
    # pooled, every channel of a single sample has but one value
    model = net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    graph = trace(model, inputs)
    keep = torch.tensor([True, False, False, True])
    found = absorb(model, graph.plan({"0": keep}), graph)
    assert found.readers == {"5.weight": 1}
    assert torch.allclose(found.shifts["5.bias"].float(), 3 * model[5].weight.detach()[:, 1])


def test_reader_of_which_all_inputs_are_constant_is_absorbed_since_noise_was_seen():
    model = net(nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[1].weight.zero_()
    graph = trace(model, IMAGES)
    found = absorbable(model, graph.plan({"0": torch.tensor([True, False, False, True])}), graph)
    assert found.readers == {"3.weight": 2}


def test_tokens_that_are_all_the_same_tell_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    tokens = torch.zeros(2, 3, dtype=torch.long)
    graph = trace(model, tokens)
    plan = graph.plan({"1": KEEP})
    assert not absorbable(model, plan, graph)
    with torch.no_grad():
        model[1].weight[1] = 0
    assert not absorbable(model, plan, graph)
    assert absorbable(model, plan, graph, example_inputs=torch.tensor([[0, 1], [2, 3]])).readers == {"2.weight": 1}


def test_input_that_may_not_be_noise_is_taken_as_it_is():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(nn.Conv2d(4, 2, 3))

        def forward(self, x):
            if x.min() < 0:
                raise ValueError("negative pixels")
            return self.net(x)

    model = Picky().eval()
    graph = trace(model, IMAGES.abs())
    assert absorbable(model, graph.plan({"net.0": KEEP}), graph).readers == {"net.3.weight": 1}


def test_groups_that_a_norm_runs_across_are_left_unless_means_are_asked_for():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[1].weight[1], model[1].bias[1] = 0, 2
    inputs = torch.randn(6, 5)
    graph = trace(model, inputs)
    plan = graph.plan({"0": KEEP})
    exact = absorbable(model, plan, graph)
    assert (exact.shifts, exact.left) == ({}, {"2.weight": 1})
    assert exact.reasons["2.weight"] == graph.group("0").inexact_because
    found = absorbable(model, plan, graph, tolerance=0.01)
    assert torch.allclose(found.shifts["2.bias"].float(), 2 * model[2].weight.detach()[:, 1])


# near-constant channels


def wavering():
    """Hidden channels x, 3 + 0.1 x, x, x of one number x of mean 0 and mean square 1, read by a linear layer."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.1], [1.0], [1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0]))
        model[1].weight.fill_(2.0)
        model[1].bias.zero_()
    return model.eval(), torch.tensor([[1.0], [-1.0]])


def test_near_constant_channel_is_taken_for_its_mean_up_to_the_tolerance():
    # deviation 0.1; root mean square of all input: sqrt((1 + 9.01 + 1 + 1) / 4) = 1.7328, and 0.1 / 1.7328 = 0.0577
    model, inputs = wavering()
    graph = trace(model, inputs)
    plan = graph.plan({"0": KEEP})
    assert not absorbable(model, plan, graph, tolerance=0.057)
    found = absorbable(model, plan, graph, tolerance=0.058)
    assert found.shifts["1.bias"].tolist() == pytest.approx([6.0])  # 2 * 3


def test_tolerance_makes_the_error_smaller_where_nothing_is_quite_constant():
    model = net(nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[1].weight[1] = 0.05
    dense, plain, absorbed, found = cut_without(model, tolerance=0.1)
    assert found.readers == {"3.weight": 1}
    assert far(dense, absorbed) < 0.2 * far(dense, plain)
    assert cut_without(model)[3].readers == {}


def test_moments_are_those_of_all_calls_together():
    # one reader called with x + 3 and x + 5: mean 4 of both, deviation sqrt(1 + 0.01)
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, _ = wavering()

        def forward(self, x):
            hidden = self.net[0](x)
            return self.net[1](hidden) + self.net[1](hidden + 2)

    model = Twice().eval()
    inputs = torch.tensor([[1.0], [-1.0]])
    graph = trace(model, inputs)
    plan = graph.plan({"net.0": KEEP})
    found = absorbable(model, plan, graph, tolerance=0.5)
    assert found.shifts["net.1.bias"].tolist() == pytest.approx([8.0])  # 2 * 4
    # mean squares: 3 of x and x + 2, and 16 + 1.01; sqrt(1.01 / ((3 + 17.01 + 3 + 3) / 4)) = 0.394
    assert absorbable(model, plan, graph, tolerance=0.395)
    assert not absorbable(model, plan, graph, tolerance=0.393)


@pytest.mark.parametrize("tolerance", [-0.1, float("inf"), float("nan")])
def test_tolerance_must_be_a_fraction(tolerance):
    model, inputs = wavering()
    graph = trace(model, inputs)
    with pytest.raises(ValueError, match="tolerance must be a finite number of at least 0"):
        absorb(model, graph.plan({"0": KEEP}), graph, tolerance=tolerance)


# the model stays itself


def test_parameters_stay_the_same_objects_and_modes_buffers_and_random_state_as_they_were():
    model = net(nn.Conv2d(4, 2, 3, bias=False), settled(nn.BatchNorm2d(2)), nn.Dropout())
    model.train()
    model[0].eval()
    graph = trace(model, IMAGES)
    before = list(model.parameters())
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    found = absorb(model, graph.plan({"0": KEEP}), graph)
    assert set(found.shifts) == {"4.running_mean"}
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert [m.training for m in model] == [False, True, True, True, True, True]
    assert torch.equal(state, torch.get_rng_state())
    changed = [n for n, b in model.named_buffers() if not torch.equal(b, buffers[n][1])]
    assert changed == ["4.running_mean"]
    assert all(id(b) == buffers[n][0] for n, b in model.named_buffers())
    assert all(p.grad is None for p in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_keep_theirs(dtype):
    model = net(nn.Conv2d(4, 2, 3)).to(dtype)
    weight, bias = model[3].weight.detach().double(), model[3].bias.detach().double().clone()
    graph = trace(model, IMAGES.to(dtype))
    absorb(model, graph.plan({"0": KEEP}), graph)
    assert model[3].bias.dtype == dtype
    wanted = bias + 3 * weight[:, 1].sum((1, 2))
    assert torch.equal(model[3].bias, wanted.to(dtype))


def test_model_that_does_not_run_on_what_it_is_given_is_left_as_it_was():
    model = net(nn.Conv2d(4, 2, 3))
    graph = trace(model, IMAGES)
    bias = model[3].bias.detach().clone()
    with pytest.raises(TraceError, match=r"Sequential does not run .* pass example_inputs"):
        absorb(model, graph.plan({"0": KEEP}), graph, example_inputs=torch.randn(2, 5, 8, 8))
    assert torch.equal(model[3].bias, bias)


def test_model_on_the_meta_device_is_said_to_have_no_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    graph = trace(net(nn.Conv2d(4, 2, 3)), IMAGES)
    real = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    graph = trace(real, IMAGES)
    found = absorb(model, graph.plan({"0": KEEP}), graph)
    assert found.reasons == {"1.weight": "a model on the meta device has no values"}


def test_copy_of_the_model_absorbs_its_own_values_also_where_the_example_names_modules():
    model = net(nn.Conv2d(4, 2, 3))
    graph = trace(model, Calls(((model, (IMAGES,), {}),)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].bias[1] = 7
    found = absorbable(twin, graph.plan({"0": KEEP}), graph)
    assert torch.allclose(found.shifts["3.bias"].float(), 7 * model[3].weight.detach()[:, 1].sum((1, 2)))


def test_model_that_was_cut_before_is_measured_as_it_is_now():
    model = net(nn.Conv2d(4, 2, 3))
    graph = trace(model, IMAGES)
    first = graph.plan({"0": torch.tensor([False, True, True, True])})
    cut(model, first)
    second = graph.plan({"0": torch.tensor([False, False, True, True])})
    dense = run(model)
    found = absorb(model, second, graph, since=first)
    cut(model, second, absorb=False)
    assert found.readers == {"3.weight": 1}
    assert far(dense, run(model)) < 1e-5


# telling beforehand


def test_weights_tell_whether_a_channel_might_be_constant():
    model = net(nn.Conv2d(4, 2, 3))
    graph = trace(model, IMAGES)
    tensors = dict(model.named_parameters())
    assert may_be_constant(graph.plan({"0": KEEP}).kept, graph, tensors)
    assert not may_be_constant(graph.plan({"0": torch.tensor([True, True, False, False])}).kept, graph, tensors)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: None, False),
        (lambda m: m[0].weight[1].zero_(), True),
        (lambda m: m[0].bias.copy_(torch.tensor([0.0, -9.0, 0.0, 0.0])), True),
        (lambda m: m[0].weight[2].zero_(), False),  # it stays
        (lambda m: m[0].register_parameter("bias", None), False),
        (lambda m: (m[0].register_parameter("bias", None), m[0].weight[1].zero_()), True),
        (lambda m: (m[0].register_parameter("bias", None), m[0].weight[1, 0, 0].zero_()), False),
    ],
)
def test_filters_that_are_zero_or_outweighed_might_be_constant(change, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        change(model)
    graph = trace(model, IMAGES)
    assert may_be_constant(graph.plan({"0": KEEP}).kept, graph, dict(model.named_parameters())) is expected


# with the cut


def test_cut_absorbs_constants_unless_told_not_to():
    model = net(nn.Conv2d(4, 2, 3))
    plain = copy.deepcopy(model)
    dense = run(model)
    cut(model, trace(model, IMAGES).plan({"0": KEEP}))
    cut(plain, trace(plain, IMAGES).plan({"0": KEEP}), absorb=False)
    assert far(dense, run(model)) < 1e-5
    assert far(dense, run(plain)) > 0.1


def test_cut_absorbs_near_constant_channels_up_to_a_number():
    exact, inputs = wavering()
    near = copy.deepcopy(exact)
    cut(exact, trace(exact, inputs).plan({"0": KEEP}))
    cut(near, trace(near, inputs).plan({"0": KEEP}), absorb=0.1)
    assert (exact[1].bias.item(), near[1].bias.item()) == pytest.approx((0.0, 6.0))


def test_cut_twice_absorbs_what_each_cut_takes():
    model = net(nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0, 1
    dense = run(model)
    graph = trace(model, IMAGES)
    cut(model, graph.plan({"0": KEEP}))
    cut(model, graph.plan({"0": torch.tensor([True, False, False, True])}))
    assert far(dense, run(model)) < 1e-5


def test_cut_that_fails_its_proof_absorbs_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise UnsafeCut("no")

    model = net(nn.Conv2d(4, 2, 3))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    graph = trace(model, IMAGES)
    monkeypatch.setattr("lightning_prune.proof.prove", refuse)
    with pytest.raises(UnsafeCut):
        cut(model, graph.plan({"0": KEEP}))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_cut_runs_the_model_for_constants_only_if_weights_say_there_may_be_any():
    ran = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    plan = trace(model, IMAGES).plan({"0": KEEP})
    model.register_forward_hook(lambda *_: ran.append(1))
    cut(model, plan, verify="never")
    assert ran == []


def test_tolerance_without_a_graph_is_refused():
    model = net(nn.Conv2d(4, 2, 3))
    plan = trace(copy.deepcopy(model), IMAGES).plan({"0": KEEP})
    with pytest.raises(ValueError, match=r"absorb=0.1 has to run Sequential: trace it first"):
        cut(model, plan, verify="never", absorb=0.1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net(nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class First(ChannelPruner):
    """Scores put channel 1 last."""

    def score(self, view):
        return torch.tensor([3.0, 0.0, 2.0, 1.0])


@pytest.mark.parametrize("averages", [[], [WeightAveraging]])  # whose average is the module's own at the end
@pytest.mark.parametrize("apply", ["cut", "mask"])
@pytest.mark.parametrize("absorb", [True, False])
def test_callback_absorbs_in_the_module_and_in_copies_that_others_hold(averages, apply, absorb, tmp_path):
    module = Module().train()
    module.net[1].momentum = 0.0  # running statistics stay as they are
    pruner = First(Budget(0.75, of="units"), schedule=OneShot(0.0), apply=apply, absorb=absorb)
    dense, bias = run(module.net), module.net[3].bias.detach().clone()
    module.train()
    trainer = pl.Trainer(
        max_steps=1, callbacks=[*[average() for average in averages], pruner], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(IMAGES, batch_size=2))
    assert pruner.report.groups == {"net.0": (3, 4)}
    assert (far(dense, run(module.net)) < 1e-5) is absorb
    assert torch.equal(bias, module.net[3].bias.detach()) is not absorb


@pytest.mark.parametrize("absorb", [-1, float("nan")])
def test_callback_refuses_a_tolerance_that_is_none(absorb):
    with pytest.raises(ValueError, match="tolerance must be a finite number of at least 0"):
        First(0.5, absorb=absorb)
