import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.graph.trace import output_tensors, run, undisturbed
from lightning_prune.surgery import cut, trace
from lightning_prune.taps import gated
from tests.conftest import Net, with_random_norms
from tests.nets import NETS

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def where(taps):
    return [(tap.call.module, tap.call.visit, tap.call.name, tap.call.number) for tap in taps]


def plain_net(**layers):
    return Net(
        lambda n, x: n.fc(F.max_pool2d(F.relu(n.norm(n.conv(x))), 2).flatten(1)),
        conv=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4), fc=nn.Linear(64, 2), **layers,
    )  # fmt: skip


def residual_net():
    def forward(n, x):
        x = F.relu(n.norm0(n.stem(x)))
        x = F.relu(x + n.norm1(n.conv1(x)))
        return n.fc((x + n.conv2(x)).mean((2, 3)))

    return Net(
        forward, stem=nn.Conv2d(3, 4, 3), norm0=nn.BatchNorm2d(4), conv1=nn.Conv2d(4, 4, 3, padding=1),
        norm1=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 4, 1), fc=nn.Linear(4, 2),
    )  # fmt: skip


def concatenating_net():
    return Net(
        lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)),
        a=nn.Conv2d(3, 2, 3),
        b=nn.Conv2d(3, 3, 3),
        c=nn.Conv2d(5, 2, 3),
    )


def test_map_is_behind_norm_and_activation_and_before_pooling_and_flatten():
    graph = trace(plain_net(), IMAGE)
    (tap,) = graph.maps(graph.group("conv"))
    assert (tap.call.module, tap.call.name, tap.call.number, tap.dim) == ("", "relu", 0, 1)
    assert tap.indices.tolist() == [[0], [1], [2], [3]]


def test_gate_is_behind_the_norm_and_before_the_activation():
    graph = trace(plain_net(), IMAGE)
    assert where(graph.gates(graph.group("conv"))) == [("norm", 0, "batch_norm", 0)]


def test_gate_is_the_layers_output_where_no_norm_follows():
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 3))
    graph = trace(net, IMAGE)
    assert where(graph.gates(graph.group("a"))) == [("a", 0, "conv2d", 0)]


def test_residual_stream_has_a_map_per_reading_and_a_gate_per_producer():
    graph = trace(residual_net(), IMAGE)
    group = graph.group("stem")
    assert where(graph.maps(group)) == [("", 0, "relu", 0), ("", 0, "relu", 1), ("", 0, "add", 1)]
    assert where(graph.gates(group)) == [
        ("norm0", 0, "batch_norm", 0), ("norm1", 0, "batch_norm", 0), ("conv2", 0, "conv2d", 0),
    ]  # fmt: skip


def test_concatenated_groups_share_a_tensor_at_offsets():
    graph = trace(concatenating_net(), IMAGE)
    first, second = (graph.maps(graph.group(name))[0] for name in "ab")
    assert (first.call.name, second.call.name) == ("cat", "cat")
    assert (first.indices.flatten().tolist(), second.indices.flatten().tolist()) == ([0, 1], [2, 3, 4])


def test_depthwise_layer_is_no_reader_of_its_group():
    net = Net(
        lambda n, x: n.out(F.relu6(n.deep(F.relu(n.wide(x))))),
        wide=nn.Conv2d(3, 4, 1),
        deep=nn.Conv2d(4, 4, 3, groups=4),
        out=nn.Conv2d(4, 2, 1),
    )
    graph = trace(net, IMAGE)
    assert where(graph.maps(graph.group("wide"))) == [("", 0, "relu6", 0)]


def test_module_called_twice_is_told_apart_by_its_visit():
    def forward(n, x):
        x = n.act(n.a(x))
        return n.c(n.act(n.b(x)))

    net = Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 5, 3), c=nn.Conv2d(5, 2, 3), act=nn.ReLU())
    graph = trace(net, IMAGE)
    assert [where(graph.maps(graph.group(name)))[0][:2] for name in "ab"] == [("act", 0), ("act", 1)]


@pytest.mark.parametrize("in_place", [False, True])
def test_tensor_that_is_written_to_later_is_marked(in_place):
    net = Net(
        lambda n, x: n.out(F.relu(n.norm(n.conv(x)), inplace=in_place)),
        conv=nn.Conv2d(3, 4, 3),
        norm=nn.BatchNorm2d(4),
        out=nn.Conv2d(4, 2, 1),
    )
    graph = trace(net, IMAGE)
    group = graph.group("conv")
    assert [tap.overwritten for tap in (*graph.gates(group), *graph.maps(group))] == [in_place, False]


def test_output_of_a_recurrent_layer_that_is_read_is_the_one_tapped():
    net = Net(lambda n, x: n.fc(n.rnn(x)[1][0][-1]), rnn=nn.LSTM(3, 4, batch_first=True), fc=nn.Linear(4, 2))
    graph = trace(net, torch.randn(2, 5, 3))
    (tap,) = graph.maps(graph.group("rnn"))
    assert (tap.call.name, tap.output) == ("lstm", 1)


def test_maps_of_a_head_that_runs_in_train_mode_only_are_nowhere():
    def forward(n, x):
        x = F.relu(n.conv(x))
        return (n.out(x), n.aux_out(F.relu(n.aux(x)))) if n.training else n.out(x)

    net = Net(
        forward, conv=nn.Conv2d(3, 4, 3), out=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 5, 1), aux_out=nn.Conv2d(5, 2, 1)
    )
    graph = trace(net, IMAGE)
    assert graph.maps(graph.group("aux")) == graph.gates(graph.group("aux")) == []
    assert len(graph.maps(graph.group("conv"))) == 1


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"), (F.relu6, "relu6"), (F.silu, "silu"), (F.gelu, "gelu"), (torch.tanh, "tanh"),
        (lambda x: F.leaky_relu(x, 0.2), "leaky_relu"), (nn.ReLU6(), "hardtanh"), (lambda x: x.relu_(), "relu"),
        (lambda x: F.relu(F.max_pool2d(x, 2)), "relu"), (lambda x: x + 1, "identity"), (lambda x: x, "identity"),
    ],
)  # fmt: skip
def test_activation_is_what_follows_the_norm(function, name):
    net = Net(
        lambda n, x: n.out(function(n.norm(n.conv(x)))),
        conv=nn.Conv2d(3, 4, 3),
        norm=nn.BatchNorm2d(4),
        out=nn.Conv2d(4, 2, 1),
    )
    graph = trace(net, IMAGE)
    activation = graph.activation(graph.group("conv").producers[0])
    assert activation.name == name
    values = torch.linspace(-3, 7, 21)
    expected = {"identity": values, "relu": values.relu()}.get(name)
    result = activation.function(values)
    torch.testing.assert_close(result, function(values.clone()) if expected is None else expected)
    assert torch.equal(values, torch.linspace(-3, 7, 21))


def test_taps_follow_cuts():
    graph = trace(plain_net(), IMAGE)
    for mask, left in (([1, 0, 1, 1], [0, 1, 2]), ([0, 1, 1], [0, 1])):
        graph = graph.after(graph.plan({"conv": torch.tensor(mask).bool()}))
        (tap,) = graph.maps(graph.group("conv"))
        assert tap.indices.flatten().tolist() == left


def test_offset_of_a_concatenated_group_moves_with_a_cut_of_the_other():
    graph = trace(concatenating_net(), IMAGE)
    graph.maps(graph.group("b"))
    graph = graph.after(graph.plan({"a": torch.tensor([False, True])}))
    assert graph.maps(graph.group("b"))[0].indices.flatten().tolist() == [1, 2, 3]


def test_maps_are_samples_channels_positions():
    graph = trace(plain_net(), IMAGE)
    (tap,) = graph.maps(graph.group("conv"))
    x = torch.arange(2 * 4 * 6.0).reshape(2, 4, 2, 3)
    torch.testing.assert_close(tap.maps(x, 2), x.flatten(2))


def test_windows_of_one_sample_are_positions_of_it():
    net = Net(lambda n, x: n.b(F.gelu(n.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    graph = trace(net, torch.randn(2, 5, 3))
    (tap,) = graph.maps(graph.group("a"))
    x = torch.randn(2 * 3, 5, 4)  # three windows a sample
    torch.testing.assert_close(tap.maps(x, 2), x.reshape(2, 15, 4).transpose(1, 2))


def test_samples_on_another_axis_are_found_and_their_absence_is_said():
    net = Net(lambda n, x: n.b(F.gelu(n.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    graph = trace(net, torch.randn(2, 5, 3))
    (tap,) = graph.maps(graph.group("a"))
    x = torch.randn(5, 2, 4)  # time first
    torch.testing.assert_close(tap.maps(x, 2), x.permute(1, 2, 0))
    with pytest.raises(ValueError, match=r"no axis of .5, 2, 4., made by 'gelu' in the model, carries 3"):
        tap.maps(x, 3)


# A recurrent layer hears its own output again inside of one call, and norms of weights look at all weights of a layer;
# the others have no group that is exact and read by a layer.
_NOT = ("lstm", "gru", "recurrent", "spectral", "weight_norm", "meta", "group_norm", "einsum")


@pytest.mark.parametrize(
    "name",
    sorted(n for n in NETS if not any(word in n for word in _NOT)),
)
def test_gate_at_zero_on_the_maps_is_the_channel_gone(name):
    torch.manual_seed(0)
    net, x = with_random_norms(NETS[name].build()), NETS[name].inputs()
    graph = trace(net, x)
    looked = 0
    for group in graph.groups:
        taps = {group.name: graph.maps(group)}
        if not taps[group.name] or not group.exact:
            continue
        gates = torch.ones(group.size)
        gates[group.size // 2] = 0
        less = copy.deepcopy(net)
        cut(less, graph.plan({group.name: gates.bool()}), example_inputs=x, absorb=False)
        with undisturbed(net), torch.no_grad(), gated(net.eval(), taps, {group.name: gates}):
            got = output_tensors(run(net, x, 1))
        with undisturbed(less), torch.no_grad():
            expected = output_tensors(run(less.eval(), x, 1))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=1e-4, rtol=1e-3)
        looked += 1
    assert looked
