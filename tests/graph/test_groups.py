import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.graph.groups import build
from lightning_prune.graph.trace import record
from lightning_prune.surgery import settle, trace
from tests.conftest import Net

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def chain():
    """3 -> conv a (4) -> norm -> relu -> conv b (5) -> flattened 2x2 -> linear (2); returns model and graph."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=3), nn.Flatten(), nn.Linear(20, 2)
    )
    return model, trace(model, IMAGES)


# what goes together


def test_members_name_every_tensor_that_carries_a_channel_with_its_indices(chain):
    _, graph = chain
    members = {(m.name, m.dim): m.indices.tolist() for m in graph.group("3").members}
    column = [[0], [1], [2], [3], [4]]
    # flattened 5 x 2 x 2: channel i is columns 4i to 4i + 3 of the linear layer
    wide = [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(5)]
    assert members == {("3.weight", 0): column, ("3.bias", 0): column, ("5.weight", 1): wide}


def test_buffers_of_a_norm_are_members_and_marked(chain):
    _, graph = chain
    members = {m.name: m.is_buffer for m in graph.group("0").members if m.name.startswith("1.")}
    assert members == {"1.weight": False, "1.bias": False, "1.running_mean": True, "1.running_var": True}


def test_producers_consumers_and_norms_say_who_makes_reads_and_scales(chain):
    _, graph = chain
    group = graph.group("0")
    assert [(p.name, p.weight, p.bias, p.dim, p.gated) for p in group.producers] == [
        ("0", "0.weight", "0.bias", 0, True)
    ]
    assert [(n.gamma, n.beta) for n in group.producers[0].norms] == [("1.weight", "1.bias")]
    assert [(c.name, c.weight, c.dim) for c in group.consumers] == [("3", "3.weight", 1)]
    assert graph.group("3").producers[0].norms == ()


def test_groups_stand_in_data_flow_order(chain):
    _, graph = chain
    assert [group.name for group in graph.groups] == ["0", "3"]


def test_a_residual_stream_is_one_group_of_all_its_producers_in_order(net, check_cut):
    torch.manual_seed(0)
    model = net(
        lambda n, x: (lambda y: n.l((y + n.b2(n.b1(y).relu())).mean((2, 3))))(n.a(x).relu()),
        a=nn.Conv2d(3, 6, 3), b1=nn.Conv2d(6, 7, 3, padding=1), b2=nn.Conv2d(7, 6, 3, padding=1), l=nn.Linear(6, 2),
    )  # fmt: skip
    graph = trace(model, IMAGES)
    assert {group.name: group.size for group in graph.groups} == {"a": 6, "b1": 7}
    assert [p.name for p in graph.group("a").producers] == ["a", "b2"]
    assert [c.name for c in graph.group("a").consumers] == ["b1", "l"]
    check_cut(graph)


def test_a_zero_padded_shortcut_loses_channels_in_pairs_where_its_width_is_an_attribute(cifar_net, check_cut):
    # 4 channels become 2 + 4 + 2, padded by `self.pad` on either side: it follows, so the same number goes from both
    graph = trace(cifar_net(), IMAGES)
    sizes = {"conv1": 4, "layer1.conv1": 4, "layer2.conv1": 8, "layer2.conv2": 2}
    assert {group.name: group.size for group in graph.groups} == sizes
    pairs = {(m.name, m.dim): m.indices.tolist() for m in graph.group("layer2.conv2").members}
    assert pairs["layer2.conv2.weight", 0] == [[0, 6], [1, 7]]
    cut = check_cut(graph)
    assert cut.layer2.pad == 1
    assert cut.layer2.conv2.out_channels == 2 + cut.conv1.out_channels


def test_a_zero_padded_shortcut_keeps_its_padding_and_loses_channels_between_it(cifar_net, check_cut):
    # padded by a number: what meets its zeros stays
    model = cifar_net()
    block = model.layer2
    block.forward = lambda x: F.relu(
        block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    )
    graph = trace(model, IMAGES)
    assert {group.name: group.size for group in graph.groups} == {"conv1": 4, "layer1.conv1": 4, "layer2.conv1": 8}
    rows = {(m.name, m.dim): m.indices.squeeze(1).tolist() for m in graph.group("conv1").members}
    assert rows["layer2.conv2.weight", 0] == [2, 3, 4, 5]
    assert graph.prunable_share < 1


def test_a_depthwise_layer_is_no_producer_beside_the_one_it_follows(net):
    model = net(
        lambda n, x: n.l(n.b(n.a(x)).relu().mean((2, 3))),
        a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 6, 3, groups=6), l=nn.Linear(6, 2),
    )  # fmt: skip
    assert [p.name for p in trace(model, IMAGES).group("a").producers] == ["a"]


def test_norms_before_the_readers_gate_channels_that_no_norm_follows(net):
    # pre-activation: a and b2 feed a sum; the norm stands before the next reader
    model = net(
        lambda n, x: n.l(n.norm(n.a(x) + n.b(x)).relu()), a=nn.Linear(5, 6), b=nn.Linear(5, 6),
        norm=nn.BatchNorm1d(6), l=nn.Linear(6, 2),
    )  # fmt: skip
    first, second = trace(model, ROWS).group("a").producers
    assert [n.gamma for n in first.norms] == ["norm.weight"]
    assert not first.gated
    assert second.norms == ()  # counted once


def test_a_group_that_a_norm_runs_across_is_inexact_and_says_where(net):
    model = net(lambda n, x: n.l(n.norm(n.a(x))), a=nn.Linear(5, 6), norm=nn.LayerNorm(6), l=nn.Linear(6, 2))
    group = trace(model, ROWS).groups[0]
    assert not group.exact
    assert group.inexact_because.startswith("a norm runs across it (in norm, test_groups.py:")


# plans


def test_a_plan_keeps_in_every_member_what_the_mask_keeps(chain):
    _, graph = chain
    plan = graph.plan({"3": torch.tensor([True, False, True, False, False])})
    kept = {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in plan.kept.items()}
    columns = [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept == {"3.weight": {0: [0, 2]}, "3.bias": {0: [0, 2]}, "5.weight": {1: columns}}
    assert plan.attributes == {"3": {"out_channels": 2}, "5": {"in_features": 8}}
    assert plan.groups == {"3": (2, 5)}
    assert plan.buffers == {}


def test_two_groups_cut_both_dimensions_of_the_layer_between_them(chain):
    _, graph = chain
    plan = graph.plan({"0": torch.arange(4) < 3, "3": torch.arange(5) < 2})
    assert plan.current_shape("3.weight") == (2, 3, 3, 3)
    assert plan.current_shape("1.running_var") == (3,)
    assert plan.attributes["3"] == {"in_channels": 3, "out_channels": 2}


def test_a_plan_that_keeps_everything_names_no_tensor(chain):
    _, graph = chain
    plan = graph.plan({group.name: torch.ones(group.size, dtype=torch.bool) for group in graph.groups})
    assert (plan.kept, plan.buffers, plan.attributes) == ({}, {}, {})
    assert graph.cost(plan) == graph.cost()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"elsewhere": torch.ones(4, dtype=torch.bool)}, "no group 'elsewhere'; groups are 0, 3"),
        ({"0": torch.ones(5, dtype=torch.bool)}, r"wants a bool mask of shape \(4,\), got torch.bool \(5,\)"),
        ({"0": torch.ones(4)}, r"wants a bool mask of shape \(4,\), got torch.float32"),
        ({"0": torch.zeros(4, dtype=torch.bool)}, "'0' would be left without a channel"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(keep, message, chain):
    _, graph = chain
    with pytest.raises(ValueError, match=message):
        graph.plan(keep)


def test_groups_that_share_a_dimension_are_cut_from_it_together(net, check_cut):
    model = net(
        lambda n, x: n.l(torch.cat([n.a(x), n.b(x)], 1).relu()), a=nn.Linear(5, 3), b=nn.Linear(5, 4), l=nn.Linear(7, 2)
    )
    graph = trace(model, ROWS)
    plan = graph.plan({"a": torch.tensor([False, True, True]), "b": torch.tensor([True, False, False, True])})
    assert plan.kept["l.weight"][1].tolist() == [1, 2, 3, 6]
    check_cut(graph)


@given(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), st.lists(st.booleans(), min_size=5, max_size=5))
def test_counts_read_back_what_a_plan_keeps(chain, first, second):
    _, graph = chain
    second[0] = True
    plan = graph.plan({"0": torch.tensor(first), "3": torch.tensor(second)})
    assert graph.counts(plan).tolist() == [sum(first), sum(second)]


# shares and words


def test_the_prunable_share_counts_each_entry_once_that_some_group_can_remove(chain):
    _, graph = chain
    # all but the last bias: conv a 4*27+4, norm 8, conv b 5*36+5, linear 2*20 of those and 2
    assert graph.prunable_share == (112 + 8 + 185 + 40) / (112 + 8 + 185 + 42)


def test_explain_names_groups_with_their_worth_members_and_what_is_frozen_and_why(chain):
    _, graph = chain
    text = graph.explain()
    # a channel of conv b: 36 weights over 2x2 pixels and 4 columns times 2 outputs; 36 + 1 + 8 parameters
    assert "3: 5 channels, each 152 flops and 45 parameters" in text
    assert "3.weight[0], 3.bias[0], 5.weight[1]" in text
    assert "5: it is an output of the model" in text


def test_without_freezes_groups_at_their_dense_size_and_costs_stay_right(chain):
    _, graph = chain
    less = graph.without({"3": "because"})
    assert [group.name for group in less.groups] == ["0"]
    assert less.frozen["3"] == "because"
    assert less.cost() == graph.cost()
    keep = {"0": torch.arange(4) < 1}
    assert less.cost(less.plan(keep)) == graph.cost(graph.plan(keep))
    assert less.plan(keep).attributes == graph.plan(keep).attributes


def test_weights_are_those_layers_multiply_with(net):
    model = net(
        lambda n, i: n.l(n.norm(n.h(n.e(i)).mean(1)) @ n.w), e=nn.Embedding(9, 6), h=nn.Linear(6, 5),
        norm=nn.LayerNorm(5), w=nn.Parameter(torch.randn(5, 4)), l=nn.Linear(4, 2),
    )  # fmt: skip
    graph = trace(model, torch.tensor([[1, 2, 3]]))
    assert graph.weights == ("w", "h.weight", "l.weight")
    assert graph.weight_flops() == {"w": 20, "h.weight": 3 * 30, "l.weight": 8}


# doubt


def test_views_and_splits_are_doubtful_until_tried_and_pooling_is_not(net, cifar_net):
    model = net(
        lambda n, x: n.l(n.b(n.a(x).view(x.size(0), 4, -1)).mean(2)),
        a=nn.Conv2d(3, 4, 3), b=nn.Conv1d(4, 5, 1), l=nn.Linear(5, 2),
    )  # fmt: skip
    graph = build(model, IMAGES, record(model, IMAGES))
    assert graph.suspects == {"a"}
    assert [group.name for group in settle(graph).groups] == ["b"]
    plain = cifar_net()
    assert build(plain, IMAGES, record(plain, IMAGES)).suspects == set()


def test_settling_finds_the_one_bad_group_among_good_ones(net, check_cut):
    torch.manual_seed(0)

    def forward(n, x):
        for name in "abcd":
            x = getattr(n, name)(x).relu()
            x = x.view(x.size(0), 6 if name == "c" else x.size(1), -1).unflatten(2, (8, 8))
        return n.l(x.mean((2, 3)))

    layers = {name: nn.Conv2d(3 if name == "a" else 6, 6, 3, padding=1) for name in "abcd"}
    graph = trace(net(forward, **layers, l=nn.Linear(6, 2)), IMAGES)
    assert [group.name for group in graph.groups] == ["a", "b", "d"]
    assert "trial cut failed" in graph.frozen["c"]
    check_cut(graph)


# the graph of what is left


def test_after_a_plan_the_graph_is_that_of_a_new_trace(cifar_net, net, check_cut, random_keep):
    shuffled = net(
        lambda n, x: n.l(F.glu(n.b(torch.cat([n.a(x), n.a2(x)], 1)), 1).flatten(1)),
        a=nn.Conv2d(3, 6, 3), a2=nn.Conv2d(3, 4, 3), b=nn.Conv2d(10, 8, 3), l=nn.Linear(4 * 16, 2),
    )  # fmt: skip
    for model in (cifar_net(), shuffled):
        graph = trace(model, IMAGES)
        told = graph.after(graph.plan(random_keep(graph)))
        found = trace(check_cut(graph), IMAGES)
        still = [group for group in told.groups if group.size > 1]  # a lone channel is no choice
        for a, b in zip(still, found.groups, strict=True):
            assert (a.name, a.size) == (b.name, b.size)
            assert [(m.name, m.dim, m.indices.tolist()) for m in a.members] == [
                (m.name, m.dim, m.indices.tolist()) for m in b.members
            ]
            assert [p.indices.tolist() for p in a.producers] == [p.indices.tolist() for p in b.producers]
            assert [c.indices.tolist() for c in a.consumers] == [c.indices.tolist() for c in b.consumers]
        assert told.cost().flops == found.cost().flops
        assert told.cost().params == found.cost().params
        assert dict(told.shapes) == dict(found.shapes)


@pytest.mark.parametrize("last", [nn.Conv2d(4, 1, 1), nn.Sequential(nn.Flatten(), nn.Linear(16, 1))])
def test_layer_with_a_single_output_is_a_reader(last):
    graph = trace(nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), last), torch.zeros(1, 1, 2, 2))
    (group,) = graph.groups
    (reader,) = group.consumers
    assert reader.weight.startswith("2.")
    assert [tap.call.name for tap in graph.maps(group)] == ["relu"]


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layer_reads_its_own_units_on_the_other_axis(layer, gates):
    net = Net(lambda n, x: n.fc(n.rnn(x)[0][:, -1]), rnn=layer(3, 5, batch_first=True), fc=nn.Linear(5, 2))
    group = trace(net, torch.randn(2, 4, 3)).group("rnn")
    assert [(c.weight, c.dim, c.indices.shape[1]) for c in group.consumers] == [
        ("rnn.weight_hh_l0", 1, 1), ("fc.weight", 1, 1),
    ]  # fmt: skip
    assert [(p.weight, p.dim, p.indices.shape[1]) for p in group.producers] == [
        ("rnn.weight_ih_l0", 0, gates), ("rnn.weight_hh_l0", 0, gates),
    ]  # fmt: skip
