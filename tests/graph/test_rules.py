"""How operators carry channels, seen from outside: which groups a network has, and whether a random cut is right."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.graph.rules import RULES
from lightning_prune.surgery import trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
SERIES = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))  # (B, T, C)


def area(x):
    return x.mean((2, 3))


def conv(ins, outs, kernel=3, **options):
    return nn.Conv2d(ins, outs, kernel, **options)


def shuffled(n, x):
    x = n.a(x)
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
    return n.l(area(n.b(x).relu()))


def squeezed(n, x):
    x = n.a(x).relu()
    gate = n.up(n.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
    return n.l(area(x * gate))


def squeezed_by_linears(n, x):
    x = n.a(x).relu()
    gate = n.up(n.down(area(x)).relu()).sigmoid().view(x.size(0), x.size(1), 1, 1)
    return n.l(area(x * gate.expand_as(x)))


def tokens(n, x):
    x = n.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([n.token.expand(x.shape[0], -1, -1), x], dim=1) + n.position
    return n.l((x + n.up(n.down(x).relu()))[:, 0])


def halves(n, x):
    a, b = n.a(x).chunk(2, dim=1)
    return n.l(area(torch.cat([a.relu(), b], dim=1)))


# name -> (forward, layers, example input, the size of each group)
NETS = {
    "an element-wise sum couples the layers it joins": (
        lambda n, x: n.l(area((n.a(x) + n.b(x)).relu())),
        lambda: {"a": conv(3, 6), "b": conv(3, 6), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "activations that are not zero at zero": (
        lambda n, x: n.l(area(F.softplus(n.b(n.a(x).sigmoid())).cos())),
        lambda: {"a": conv(3, 6), "b": conv(6, 7), "l": nn.Linear(7, 2)},
        IMAGES,
        {"a": 6, "b": 7},
    ),
    "one slope per channel, and one for all": (
        lambda n, x: n.l(area(n.q(n.b(n.p(n.a(x)))))),
        lambda: {"a": conv(3, 6), "b": conv(6, 7), "p": nn.PReLU(6), "q": nn.PReLU(), "l": nn.Linear(7, 2)},
        IMAGES,
        {"a": 6, "b": 7},
    ),
    "dropout of whole channels": (
        lambda n, x: n.l(area(n.d(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "d": nn.Dropout2d(), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "a grouped convolution of two groups takes the same index of each": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 12), "b": conv(12, 18, groups=2), "l": nn.Linear(18, 2)},
        IMAGES,
        {"a": 6, "b": 9},
    ),
    "a grouped convolution of many narrow groups loses whole groups": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 16), "b": conv(16, 32, groups=8), "l": nn.Linear(32, 2)},
        IMAGES,
        {"a": 8},
    ),
    "a depthwise convolution follows its producer": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "b": conv(6, 6, groups=6), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "a depthwise convolution with a channel multiplier": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "b": conv(6, 18, groups=6), "l": nn.Linear(18, 2)},
        IMAGES,
        {"a": 6},
    ),
    "a depthwise convolution of the input keeps each input channel": (
        lambda n, x: n.l(area(n.b(x).relu())),
        lambda: {"b": conv(3, 12, groups=3), "l": nn.Linear(12, 2)},
        IMAGES,
        {"b": 4},
    ),
    "a transposed convolution has its axes the other way round": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "b": nn.ConvTranspose2d(6, 8, 3, stride=2), "l": nn.Linear(8, 2)},
        IMAGES,
        {"a": 6, "b": 8},
    ),
    "a transposed convolution of two groups": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "b": nn.ConvTranspose2d(6, 8, 3, groups=2), "l": nn.Linear(8, 2)},
        IMAGES,
        {"a": 3, "b": 4},
    ),
    "a transposed convolution of many narrow groups": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 16), "b": nn.ConvTranspose2d(16, 32, 3, groups=8), "l": nn.Linear(32, 2)},
        IMAGES,
        {"a": 8},
    ),
    "a depthwise transposed convolution with a multiplier": (
        lambda n, x: n.l(area(n.b(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "b": nn.ConvTranspose2d(6, 12, 3, groups=6), "l": nn.Linear(12, 2)},
        IMAGES,
        {"a": 6},
    ),
    "convolutions over one dimension": (
        lambda n, x: n.l(n.norm(n.b(n.a(x).relu())).mean(2)),
        lambda: {"a": nn.Conv1d(4, 6, 3), "b": nn.Conv1d(6, 7, 3), "norm": nn.BatchNorm1d(7), "l": nn.Linear(7, 2)},
        SERIES,
        {"a": 6, "b": 7},
    ),
    "convolutions over three dimensions": (
        lambda n, x: n.l(n.norm(n.b(n.a(x[:, :, None]).relu())).mean((2, 3, 4))),
        lambda: {
            "a": nn.Conv3d(3, 6, (1, 3, 3)),
            "b": nn.Conv3d(6, 7, (1, 3, 3)),
            "norm": nn.BatchNorm3d(7),
            "l": nn.Linear(7, 2),
        },
        IMAGES,
        {"a": 6, "b": 7},
    ),
    "a concatenation moves the second producer's channels": (
        lambda n, x: n.l(area(torch.cat([n.a(x), n.b(x)], 1).relu())),
        lambda: {"a": conv(3, 6), "b": conv(3, 5), "l": nn.Linear(11, 2)},
        IMAGES,
        {"a": 6, "b": 5},
    ),
    "a concatenation with the input leaves the input's channels": (
        lambda n, x: n.l(area(torch.cat([x, n.b(x)], 1).relu())),
        lambda: {"b": conv(3, 5, padding=1), "l": nn.Linear(8, 2)},
        IMAGES,
        {"b": 5},
    ),
    "a concatenation of a tensor with itself gives two columns a channel": (
        lambda n, x: n.l(area(torch.cat([n.b(x), n.b(x)], 1).relu())),
        lambda: {"b": conv(3, 5), "l": nn.Linear(10, 2)},
        IMAGES,
        {"b": 5},
    ),
    "flattened, a channel is as many columns as the map has pixels": (
        lambda n, x: n.l(n.a(x).relu().flatten(1)),
        lambda: {"a": conv(3, 6), "l": nn.Linear(6 * 36, 2)},
        IMAGES,
        {"a": 6},
    ),
    "flattened with channels last, a channel's columns lie apart": (
        lambda n, x: n.l(n.a(x).relu().permute(0, 2, 3, 1).reshape(x.size(0), -1)),
        lambda: {"a": conv(3, 6), "l": nn.Linear(6 * 36, 2)},
        IMAGES,
        {"a": 6},
    ),
    "a batch norm over what was flattened": (
        lambda n, x: n.l(n.norm(n.a(x).flatten(1)).relu()),
        lambda: {"a": conv(3, 4), "norm": nn.BatchNorm1d(4 * 36), "l": nn.Linear(4 * 36, 2)},
        IMAGES,
        {"a": 4},
    ),
    "a batch norm without scale and shift": (
        lambda n, x: n.l(area(n.norm(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "norm": nn.BatchNorm2d(6, affine=False), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "a batch norm without running statistics": (
        lambda n, x: n.l(area(n.norm(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "norm": nn.BatchNorm2d(6, track_running_stats=False), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "an instance norm": (
        lambda n, x: n.l(area(n.norm(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "norm": nn.InstanceNorm2d(6, affine=True), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "an instance norm without a parameter": (
        lambda n, x: n.l(area(n.norm(n.a(x)).relu())),
        lambda: {"a": conv(3, 6), "norm": nn.InstanceNorm2d(6), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "halves of a chunk lose the same index": (
        halves,
        lambda: {"a": conv(3, 12), "l": nn.Linear(12, 2)},
        IMAGES,
        {"a": 6},
    ),
    "a gated linear unit": (
        lambda n, x: n.l(area(F.glu(n.a(x), dim=1))),
        lambda: {"a": conv(3, 12), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "a channel shuffle written out": (
        shuffled,
        lambda: {"a": conv(3, 8), "b": conv(8, 8, groups=2), "l": nn.Linear(8, 2)},
        IMAGES,
        {"a": 2, "b": 4},
    ),
    "a channel shuffle of torch's": (
        lambda n, x: n.l(area(n.b(n.s(n.a(x))).relu())),
        lambda: {"a": conv(3, 8), "s": nn.ChannelShuffle(2), "b": conv(8, 8, groups=2), "l": nn.Linear(8, 2)},
        IMAGES,
        {"a": 2, "b": 4},
    ),
    "a pixel shuffle": (
        lambda n, x: n.l(area(n.s(n.a(x)).relu())),
        lambda: {"a": conv(3, 16), "s": nn.PixelShuffle(2), "l": nn.Linear(4, 2)},
        IMAGES,
        {"a": 4},
    ),
    "a pixel unshuffle": (
        lambda n, x: n.l(area(n.s(n.a(x)).relu())),
        lambda: {"a": conv(3, 4), "s": nn.PixelUnshuffle(2), "l": nn.Linear(16, 2)},
        IMAGES,
        {"a": 4},
    ),
    "pooling and resizing": (
        lambda n, x: n.l(F.adaptive_avg_pool2d(F.interpolate(F.max_pool2d(n.a(x), 2), scale_factor=2.0), 1).flatten(1)),
        lambda: {"a": conv(3, 6), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
    "squeeze and excitation": (
        squeezed,
        lambda: {"a": conv(3, 8), "down": conv(8, 4, 1), "up": conv(4, 8, 1), "l": nn.Linear(8, 2)},
        IMAGES,
        {"a": 8, "down": 4},
    ),
    "squeeze and excitation by linear layers": (
        squeezed_by_linears,
        lambda: {"a": conv(3, 8), "down": nn.Linear(8, 4), "up": nn.Linear(4, 8), "l": nn.Linear(8, 2)},
        IMAGES,
        {"a": 8, "down": 4},
    ),
    "layer scale": (
        lambda n, x: n.l(area(n.a(x) * n.scale)),
        lambda: {"a": conv(3, 8), "scale": nn.Parameter(torch.randn(8, 1, 1)), "l": nn.Linear(8, 2)},
        IMAGES,
        {"a": 8},
    ),
    "class token and position embedding": (
        tokens,
        lambda: {
            "patch": conv(3, 8, 4, stride=4),
            "token": nn.Parameter(torch.randn(1, 1, 8)),
            "position": nn.Parameter(torch.randn(1, 5, 8)),
            "down": nn.Linear(8, 12),
            "up": nn.Linear(12, 8),
            "l": nn.Linear(8, 2),
        },
        IMAGES,
        {"patch": 8, "down": 12},
    ),
    "parameters without a layer": (
        lambda n, x: n.l((F.linear(x, n.v, n.b).relu() @ n.w).relu()),
        lambda: {
            "v": nn.Parameter(torch.randn(7, 5)),
            "b": nn.Parameter(torch.randn(7)),
            "w": nn.Parameter(torch.randn(7, 6)),
            "l": nn.Linear(6, 2),
        },
        ROWS,
        {"": 7, ":2": 6},
    ),
    "an einsum": (
        lambda n, x: n.l(torch.einsum("btc,cd->btd", x, n.w).relu()),
        lambda: {"w": nn.Parameter(torch.randn(5, 6)), "l": nn.Linear(6, 2)},
        SERIES,
        {"w": 6},
    ),
    "an embedding": (
        lambda n, x: n.l(n.e(x).mean(1)),
        lambda: {"e": nn.Embedding(10, 6), "l": nn.Linear(6, 2)},
        torch.tensor([[1, 2, 3], [4, 5, 9]]),
        {"e": 6},
    ),
    "a weight-normalised layer": (
        lambda n, x: n.l(n.a(n.z(x).relu()).relu()),
        lambda: {
            "z": nn.Linear(5, 7),
            "a": nn.utils.parametrizations.weight_norm(nn.Linear(7, 6)),
            "l": nn.Linear(6, 2),
        },
        ROWS,
        {"z": 7, "a": 6},
    ),
    "an operator that writes into a tensor it is given": (
        lambda n, x: n.l(torch.div(n.a(x).detach(), 2.0, out=x.new_empty(0)).relu()),
        lambda: {"a": nn.Linear(5, 6), "l": nn.Linear(6, 2)},
        ROWS,
        {"a": 6},
    ),
    "operators in place": (
        lambda n, x: n.l(area(n.a(x).relu_().mul_(2).add_(n.b(x)))),
        lambda: {"a": conv(3, 6), "b": conv(3, 6), "l": nn.Linear(6, 2)},
        IMAGES,
        {"a": 6},
    ),
}


@pytest.mark.parametrize("case", NETS)
def test_channels_are_found_and_cut_right(case, net, check_cut, with_random_norms):
    forward, layers, inputs, sizes = NETS[case]
    torch.manual_seed(0)
    graph = trace(with_random_norms(net(forward, **layers())), inputs)
    assert {group.name: group.size for group in graph.groups} == sizes
    assert all(group.exact for group in graph.groups)
    check_cut(graph)


def test_attributes_of_grouped_convolutions_follow(net, check_cut):
    # groups of 2 keep their number and lose width; groups of 8 keep their width and lose number; depthwise is both
    layers = {
        "a": conv(3, 16),
        "few": conv(16, 16, groups=2),
        "many": conv(16, 16, 1, groups=8),
        "each": conv(16, 32, 1, groups=16),
        "back": nn.ConvTranspose2d(32, 16, 1, groups=8),
        "l": nn.Linear(16, 2),
    }
    torch.manual_seed(0)
    model = net(lambda n, x: n.l(area(n.back(n.each(n.many(n.few(n.a(x))).relu())))), **layers)
    cut = check_cut(trace(model, IMAGES))
    assert cut.few.groups == 2
    assert cut.few.in_channels < 16
    assert cut.many.in_channels == 2 * cut.many.groups < 16
    assert (cut.each.in_channels, cut.each.out_channels) == (cut.each.groups, 2 * cut.each.groups)
    assert (cut.back.in_channels, cut.back.out_channels) == (4 * cut.back.groups, 2 * cut.back.groups)


@pytest.mark.parametrize(("groups", "size"), [(1, 8), (2, 4)])
def test_a_group_norm_makes_channels_inexact_and_its_groups_lose_equally(groups, size, net, check_cut):
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.l(area(n.norm(n.a(x)).relu())), a=conv(3, 8), norm=nn.GroupNorm(groups, 8), l=nn.Linear(8, 2)
    )
    graph = trace(model, IMAGES)
    assert [(g.name, g.size, g.exact) for g in graph.groups] == [("a", size, False)]
    assert graph.groups[0].inexact_because.startswith("a norm runs across it (in norm, test_rules.py:")
    check_cut(graph, exact=False)


def test_a_layer_norm_over_channels_and_area_follows_in_its_shape(net, check_cut):
    torch.manual_seed(0)
    layers = {"a": conv(3, 8), "norm": nn.LayerNorm([8, 6, 6]), "l": nn.Linear(8, 2)}
    graph = trace(net(lambda n, x: n.l(area(n.norm(n.a(x)).relu())), **layers), IMAGES)
    assert [(g.name, g.size, g.exact) for g in graph.groups] == [("a", 8, False)]
    cut = check_cut(graph, exact=False)
    assert cut.norm.normalized_shape == (cut.a.out_channels, 6, 6)


def test_a_layer_norm_over_rows_is_inexact_and_its_shape_follows(net, check_cut):
    torch.manual_seed(0)
    model = net(lambda n, x: n.l(n.norm(n.a(x)).relu()), a=nn.Linear(5, 6), norm=nn.LayerNorm(6), l=nn.Linear(6, 2))
    graph = trace(model, ROWS)
    assert [(g.name, g.size, g.exact) for g in graph.groups] == [("a", 6, False)]
    cut = check_cut(graph, exact=False)
    assert cut.norm.normalized_shape == (cut.a.out_features,)


def test_a_group_norm_with_a_channel_a_group_is_frozen_by_its_module(net):
    model = net(lambda n, x: n.l(area(n.norm(n.a(x)).relu())), a=conv(3, 8), norm=nn.GroupNorm(8, 8), l=nn.Linear(8, 2))
    graph = trace(model, IMAGES)
    assert graph.groups == ()
    assert "one channel a group" in graph.frozen["a"]


@pytest.mark.parametrize("name", ["leaky_relu", "hardtanh", "hardsigmoid", "elu", "celu", "selu", "ldexp"])
def test_activations_that_torch_2_10_does_not_tag_as_pointwise_have_a_rule_of_their_own(name):
    assert RULES[name] is RULES["pointwise"]


def test_an_operator_without_a_rule_freezes_what_it_touches_and_says_which_and_where(net):
    class Head(nn.Module):
        def forward(self, x):
            return torch.linalg.matrix_exp(x[:, None, :] * x[:, :, None]).sum(2)  # marked line

    model = net(
        lambda n, x: n.l(n.head(n.b(n.a(x).relu()))), a=nn.Linear(5, 6), b=nn.Linear(6, 4), head=Head(),
        l=nn.Linear(4, 2),
    )  # fmt: skip
    lines = Path(__file__).read_text("utf-8").splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if text.endswith("# marked line"))
    graph = trace(model, ROWS)
    assert [(g.name, g.size) for g in graph.groups] == [("a", 6)]
    assert graph.frozen["b"] == f"operator 'linalg_matrix_exp' has no rule (in head, test_rules.py:{line})"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.view(x.size(0), 6, -1), "a trial cut failed: the cut model does not run"),
        (lambda x: torch.cat(x.split(3, dim=1)[::-1], 1), "a trial cut failed: the cut model computes something else"),
        (lambda x: torch.cat(x.split([2, 4], dim=1), 1), "it is split into parts of [2, 4], by number"),
        (lambda x: x[:, [3, 1, 0, 2, 4, 5]], "it is looked up by index"),
        (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), "it is sliced at a number in the model's code"),
        (lambda x: x * torch.arange(6.0).to(x).view(6, 1, 1), "with a dimension that is not a parameter's"),
        (lambda x: x.roll(1, 1), "it is rolled by a number in the model's code"),
        (lambda x: x.sort(dim=1).values, "'sort' chooses among its values"),
        (lambda x: torch.stack([x.select(1, i) for i in range(6)], 1), "one index of it is taken by its number"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, 1))[:, :6], "it is sliced at a number in the model's code"),
    ],
)
def test_what_rests_on_a_number_of_channels_is_frozen_with_the_reason(change, reason, net):
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.l(n.b(change(n.a(x)).flatten(2)).mean(2)),
        a=conv(3, 6), b=nn.Conv1d(6, 7, 1), l=nn.Linear(7, 2),
    )  # fmt: skip
    graph = trace(model, IMAGES)
    assert [group.name for group in graph.groups] == ["b"]
    assert reason in graph.frozen["a"]


def test_a_view_that_asks_for_its_size_stays_prunable_though_it_traces_like_one_with_a_number(net, check_cut):
    torch.manual_seed(0)
    model = net(
        lambda n, x: (lambda y: n.l(n.b(y.view(y.size(0), y.size(1), -1)).mean(2)))(n.a(x)),
        a=conv(3, 6), b=nn.Conv1d(6, 7, 1), l=nn.Linear(7, 2),
    )  # fmt: skip
    graph = trace(model, IMAGES)
    assert {group.name: group.size for group in graph.groups} == {"a": 6, "b": 7}
    check_cut(graph)


# functions that are followed as a whole


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_loop_over_a_recurrent_cell_loses_units_of_all_its_gates_and_costs_what_is_counted(cell, net, check_cut):
    # each step is two linear layers, as fvcore counts it
    torch.manual_seed(0)

    def forward(n, x):
        state = None
        for step in range(x.shape[1]):
            state = n.r(n.a(x[:, step]).relu(), state)
        return n.l(state[0] if isinstance(state, tuple) else state)

    model = net(forward, a=nn.Linear(5, 6), r=cell(6, 8), l=nn.Linear(8, 2))
    graph = trace(model, SERIES)
    assert {group.name: group.size for group in graph.groups} == {"a": 6, "r": 8}
    cut = check_cut(graph)
    assert (cut.r.input_size, cut.r.hidden_size) == (cut.a.out_features, cut.l.in_features)


class Grouped(nn.Module):
    """Four heads of queries read two of keys and values; the scale is a number."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.width = 4, 2, 3
        self.q, self.kv, self.o = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.num_kv_heads, self.width).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.o(y.transpose(1, 2).flatten(2))


def test_query_heads_go_with_the_head_of_keys_and_values_they_share(check_cut):
    torch.manual_seed(0)
    graph = trace(Grouped(), SERIES)
    assert {group.name: group.size for group in graph.groups} == {"q": 2}
    rows = {(m.name, m.dim): m.indices.tolist() for m in graph.group("q").members}
    assert rows["q.weight", 0] == [list(range(6)), list(range(6, 12))]  # two heads of width 3 each
    assert rows["kv.weight", 0] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]  # of keys, and of values
    cut = check_cut(graph)
    assert (cut.num_heads, cut.num_kv_heads) == (2, 1)


class OneHead(nn.Module):
    """Attention with one head, whose scale is a number or derived from the width."""

    def __init__(self, scale):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 4), nn.Linear(4, 2))
        self.scale = scale

    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=self.scale))


def test_the_width_of_a_head_goes_where_the_softmax_scale_is_a_number_and_not_where_torch_derives_it(check_cut):
    torch.manual_seed(0)
    graph = trace(OneHead(0.5), SERIES)
    assert {group.name: group.size for group in graph.groups} == {"q": 6}
    check_cut(graph)
    derived = trace(OneHead(None), SERIES)
    assert derived.groups == ()
    assert "which the softmax scale is derived from" in derived.frozen["q"]


def test_vectors_of_unit_length_lose_channels_and_a_lookup_along_another_axis_keeps_them(net, check_cut):
    torch.manual_seed(0)

    def forward(n, x):
        y = F.normalize(n.a(x), dim=-1)  # (B, T, C)
        order = torch.tensor([2, 0, 3, 1]).view(1, 4, 1).expand_as(y)
        return n.l(y.gather(1, order))

    graph = trace(net(forward, a=nn.Linear(5, 6), l=nn.Linear(6, 2)), SERIES)
    assert {group.name: group.size for group in graph.groups} == {"a": 6}
    check_cut(graph)


def test_a_convolution_with_padding_in_words_costs_nothing_as_fvcore_counts(net, check_cut):
    torch.manual_seed(0)
    model = net(lambda n, x: n.l(area(n.a(x))), a=conv(3, 6, padding="same"), l=nn.Linear(6, 2))
    graph = trace(model, IMAGES)
    assert graph.cost().conv_linear_flops == 12
    check_cut(graph)


@pytest.mark.parametrize("equation", ["bij,bjk->bik", "bij,bkj->bki", "bij,bij->bi", "...j,j->...", "bij->bji"])
def test_an_einsum_costs_what_fvcore_counts_and_its_letters_are_channels(equation, net, check_cut):
    torch.manual_seed(0)

    def forward(n, x):
        y = n.a(x)  # (B, T, C)
        second = {"bij,bjk->bik": y.transpose(1, 2), "bij,bkj->bki": y, "bij,bij->bi": y, "...j,j->...": n.w}
        out = torch.einsum(equation, *([y, second[equation]] if equation in second else [y]))
        if equation == "bij->bji":
            return n.l(out.transpose(1, 2))
        return out.mean(-1) if out.ndim == 3 else out

    model = net(forward, a=nn.Linear(5, 6), w=nn.Parameter(torch.randn(6)), l=nn.Linear(6, 2))
    graph = trace(model, SERIES)
    assert graph.group("a").size == 6
    check_cut(graph)
