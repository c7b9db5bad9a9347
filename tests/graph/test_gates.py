"""Where gates sit: their gradient from parameters is that of a gate in the forward, and at 0 a channel is gone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from lightning_prune.graph.trace import as_call, output_tensors
from lightning_prune.graph.views import LayerView
from lightning_prune.surgery import cut, trace
from lightning_prune.taps import gated
from tests.conftest import Net, with_random_norms
from tests.nets import NETS

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

CONVNETS = [
    "unet", "conv1d", "conv3d", "transposed", "pixel_shuffle", "pixel_unshuffle", "glu",
    "squeeze_excite", "padded_shortcuts", "channel_shuffle", "several_inputs", "value_dependent",
]  # fmt: skip
ATTENTION = {
    "fused_attention": ["qkv"], "grouped_query_attention": ["embed", "q"], "multihead_attention": ["attention", "fc1"],
    "decoder": ["layers.0.q", "layers.0.gate"], "mixer": ["tokens.0", "channels.0"],
}  # fmt: skip


def conv(ins, outs, size=1, **options):
    return nn.Sequential(nn.Conv2d(ins, outs, size, padding=size // 2, **options), nn.BatchNorm2d(outs), nn.ReLU())


def places(graph, name):
    return [gate.weight for gate in graph.gate_parameters(graph.group(name))]


def loss_of(model, inputs):
    """A loss in which no two outputs count alike."""
    args, kwargs = as_call(inputs)
    outs = [out.flatten() for out in output_tensors(model(*args, **kwargs))]
    return sum((out * torch.arange(1, len(out) + 1).sin()).sum() + out.square().mean() for out in outs)


def in_double(inputs):
    return tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


def prepared(model, inputs, names=None):
    """The model in double precision with gradients of a loss, its inputs, its graph, and groups of it."""
    model = with_random_norms(model).double().eval()
    inputs = in_double(inputs)
    graph = trace(model, inputs)
    loss_of(model, inputs).backward()
    groups = [group for group in graph.groups if group.producers and (names is None or group.name in names)]
    assert len(groups) >= len(names or [0])
    return model, inputs, graph, groups


def gate_gradient(model, graph, group):
    """(C,) from parameter gradients, all parts of a group together."""
    parameters = dict(model.named_parameters())
    return sum(LayerView(group, p, parameters, graph).gate_gradient.detach() for p in group.producers)


def check_gradients(model, inputs, graph, groups):
    """Hold gradients from parameters against those of gates in the forward."""
    for group in groups:
        taps, gate = {group.name: graph.gates(group)}, torch.ones(group.size, dtype=torch.float64, requires_grad=True)
        with gated(model, taps, {group.name: gate}):
            (expected,) = torch.autograd.grad(loss_of(model, inputs), gate)
        got = gate_gradient(model, graph, group)
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12), group.name


def check_removal(model, inputs, graph, groups):
    """Hold a gate at zero against all that belongs to a channel at zero."""
    for group in groups:
        last = group.size - 1
        shut = {group.name: (torch.arange(group.size) != last).double()}
        removed = copy.deepcopy(model)
        with torch.no_grad():
            for member in group.members:
                if not member.is_buffer:
                    removed.get_parameter(member.name).index_fill_(member.dim, member.indices[last], 0)
            with gated(model, {group.name: graph.gates(group)}, shut):
                assert loss_of(model, inputs).item() == pytest.approx(loss_of(removed, inputs).item()), group.name


def check_gates(model, inputs, names=None):
    found = prepared(model, inputs, names)
    check_gradients(*found)
    check_removal(*found)


@pytest.mark.parametrize("name", CONVNETS)
def test_gradient_is_that_of_a_gate_in_the_forward_and_zero_removes(name):
    torch.manual_seed(0)
    check_gates(NETS[name].build(), NETS[name].inputs(2))


@pytest.mark.parametrize("name", ATTENTION)
def test_gates_of_heads_and_hidden_units(name):
    torch.manual_seed(0)
    check_gates(NETS[name].build(), NETS[name].inputs(2), ATTENTION[name])


def test_gate_of_normed_weights_is_on_their_lengths():
    torch.manual_seed(0)
    model, x, graph, groups = prepared(NETS["weight_norm"].build(), NETS["weight_norm"].inputs(2))
    assert [p.rpartition(".")[2] for p in places(graph, "conv1")] == ["original1", "original0"]
    check_gradients(model, x, graph, groups)


def squeeze_excite_behind_depthwise():
    """An inverted residual block of MobileNetV3: expand, depthwise, squeeze and excite, project."""

    def forward(n, x):
        x = n.deep(n.wide(x))
        x = torch.sigmoid(n.fc2(F.relu(n.fc1(x.mean((2, 3), keepdim=True))))) * x
        return n.out(x)

    return Net(
        forward, wide=conv(3, 6), deep=conv(6, 6, 3, groups=6), fc1=nn.Conv2d(6, 2, 1), fc2=nn.Conv2d(2, 6, 1),
        out=nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def test_depthwise_and_squeeze_excite_have_one_gate_behind_the_depthwise_norm():
    graph = trace(squeeze_excite_behind_depthwise(), IMAGE)
    assert [p.name for p in graph.group("wide.0").producers] == ["wide.0", "fc2"]
    assert places(graph, "wide.0") == ["deep.1.weight"]
    check_gates(squeeze_excite_behind_depthwise(), IMAGE)


def test_one_gate_agrees_with_finite_differences_on_the_groups_map():
    # behind a ReLU a gate scales as before it; both readers, of the squeeze and of the product, see the gated map
    model, x, graph, (group,) = prepared(squeeze_excite_behind_depthwise(), IMAGE, ["wide.0"])
    got = gate_gradient(model, graph, group)
    behind = [tap for tap in graph.maps(group) if tap.call.name == "relu"]
    assert len(behind) == 1
    for channel in range(group.size):
        errors = []
        for step in (1e-6, -1e-6):
            gate = torch.ones(6, dtype=torch.float64)
            gate[channel] += step
            with torch.no_grad(), gated(model, {group.name: behind}, {group.name: gate}):
                errors.append(loss_of(model, x).item())
        assert got[channel].item() == pytest.approx((errors[0] - errors[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_zero_gate_is_a_real_cut():
    model, x, graph, (group,) = prepared(squeeze_excite_behind_depthwise(), IMAGE, ["wide.0"])
    keep = torch.tensor([True, True, False, True, False, True])
    with torch.no_grad(), gated(model, {group.name: graph.gates(group)}, {group.name: keep.double()}):
        expected = loss_of(model, x)
    cut(model, graph.plan({group.name: keep}), graph=graph, absorb=False)
    assert loss_of(model, x).item() == pytest.approx(expected.item(), rel=1e-12)


def test_depthwise_layer_beside_a_shortcut_leaves_the_gates_with_the_stream():
    def forward(n, x):
        x = n.stem(x)
        return n.fc((x + n.narrow(n.deep(x))).mean((2, 3)))

    net = Net(forward, stem=conv(3, 6), deep=conv(6, 6, 3, groups=6), narrow=conv(6, 6)[:2], fc=nn.Linear(6, 2))
    assert places(trace(net, IMAGE), "stem.0") == ["stem.1.weight", "narrow.1.weight"]


def test_convolution_that_works_group_by_group_has_the_gate_of_its_producer():
    net = Net(lambda n, x: n.fc(n.b(n.a(x)).mean((2, 3))), a=conv(3, 8), b=conv(8, 8, 3, groups=4), fc=nn.Linear(8, 2))
    graph = trace(net, IMAGE)
    assert [p.name for p in graph.group("a.0").producers] == ["a.0", "b.0"]
    assert places(graph, "a.0") == ["b.1.weight"]
    check_gates(net, IMAGE)


def test_norms_before_the_readers_have_the_gates_also_behind_a_norm_of_the_layer():
    def forward(n, x):
        x = n.stem(x)
        x = torch.cat([x, n.conv(F.relu(n.norm(x)))], 1)
        return n.fc(F.relu(n.last(x)).mean((2, 3)))

    net = Net(
        forward, stem=conv(3, 4), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 2, 1), last=nn.BatchNorm2d(6),
        fc=nn.Linear(6, 2),
    )  # fmt: skip
    assert places(trace(net, IMAGE), "stem.0") == ["norm.weight", "last.weight"]
    check_gates(net, IMAGE)


@pytest.mark.parametrize("gate_first", [True, False])
def test_product_of_two_layers_is_gated_once_on_the_side_that_zero_silences(gate_first):
    def forward(n, x):
        sides = torch.sigmoid(n.a(x)), n.b(x)
        return n.fc(sides[not gate_first] * sides[gate_first])

    net = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 6), fc=nn.Linear(6, 2))
    graph = trace(net, torch.randn(2, 5))
    assert places(graph, "a") == ["b.weight"]


def test_half_of_a_layer_that_is_chunked_and_multiplied_has_the_gate():
    def forward(n, x):
        a, b = n.wide(x).chunk(2, -1)
        return n.fc(F.silu(a) * b)

    net = Net(forward, wide=nn.Linear(5, 12), fc=nn.Linear(6, 2))
    rows = torch.randn(2, 5)
    graph = trace(net, rows)
    (gate,) = graph.gate_parameters(graph.group("wide"))
    assert gate.of(torch.tensor([[0, 6], [1, 7]])).tolist() == [[6], [7]]
    check_gates(net, rows)


def test_gates_stay_where_they_are_after_a_cut():
    model = with_random_norms(squeeze_excite_behind_depthwise()).double().eval()
    x = in_double(IMAGE)
    graph = trace(model, x)
    plan = graph.plan({"wide.0": torch.tensor([True, False, True, True, False, True])})
    cut(model, plan, graph=graph)
    after = graph.after(plan)
    group = after.group("wide.0")
    assert places(after, "wide.0") == ["deep.1.weight"]
    (tap,) = after.gates(group)
    assert tap.indices.flatten().tolist() == [0, 1, 2, 3]


def test_layer_that_runs_in_train_mode_only_has_a_gate_of_its_own():
    def forward(n, x):
        x = F.relu(n.conv(x))
        return (n.out(x), n.aux_out(F.relu(n.norm(n.aux(x))))) if n.training else n.out(x)

    net = Net(
        forward, conv=nn.Conv2d(3, 4, 3), out=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 5, 1), norm=nn.BatchNorm2d(5),
        aux_out=nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    graph = trace(net, IMAGE)
    assert places(graph, "aux") == ["norm.weight"]
    assert places(graph, "conv") == ["conv.weight"]
