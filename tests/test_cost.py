import copy
import logging
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.cost import Cost, attention_flops, count
from lightning_prune.errors import TraceError
from lightning_prune.surgery import cut, trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))


def test_a_multiply_accumulate_is_one_flop():
    # conv: 2x2 outputs, 3 out, 2 in, 3x3 kernel = 4*54 = 216; linear: 12 x 5 = 60; biases and ReLU cost nothing
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
    cost = count(model, torch.randn(7, 2, 4, 4))  # of seven samples one is counted
    assert cost.flops == 216 + 60
    assert cost.params == 54 + 3 + 60 + 5
    assert cost.by_layer == {"0": {"conv": 216}, "3": {"linear": 60}}


def test_a_model_on_the_meta_device_costs_what_it_costs_elsewhere(cifar_net):
    model = cifar_net()
    assert count(copy.deepcopy(model).to("meta"), IMAGES) == count(model, IMAGES)


def test_conv_and_linear_alone_can_be_read_off():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    cost = count(model, torch.randn(1, 2, 4, 4))
    assert cost.flops == 216 + 2 * 12 + 60  # batch norm: two a value
    assert cost.conv_linear_flops == 276


def test_attention_counts_its_two_matrix_products():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    # 2 heads, 3 queries, 4 keys, width 5, values 5 wide: 2*3*4*5 twice
    inputs = (torch.randn(1, 2, 3, 5), torch.randn(1, 2, 4, 5), torch.randn(1, 2, 4, 5))
    assert count(Attention(), inputs).flops == 240
    assert trace(Attention(), inputs).cost().flops == 240


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # fvcore's own use of torch.jit
def test_a_user_can_register_the_attention_handle_with_fvcore():
    from fvcore.nn import FlopCountAnalysis

    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    analysis = FlopCountAnalysis(Attention(), torch.randn(1, 3, 5)).unsupported_ops_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    assert analysis.total() == 2 * 3 * 3 * 5


def everything_counted(n, x):
    x = n.norm(n.a(x)).relu()
    x = n.group(n.back(F.interpolate(x, scale_factor=2.0)))
    x = F.interpolate(n.each(n.instance(x)), size=(6, 6), mode="bilinear")
    x = F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)
    x = n.encoder(x)
    x = n.layer(torch.bmm(x, x.transpose(1, 2)) @ x)
    x = torch.einsum("btc,cd->btd", x, n.w)
    return n.l(torch.mm(x.mean(1), n.v))


def counted_model(net):
    torch.manual_seed(0)
    return net(
        everything_counted,
        a=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6), back=nn.ConvTranspose2d(6, 8, 3, groups=2),
        group=nn.GroupNorm(2, 8), instance=nn.InstanceNorm2d(8, affine=True), each=nn.Conv2d(8, 8, 3, groups=8),
        encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), layer=nn.LayerNorm(8),
        w=nn.Parameter(torch.randn(8, 5)), v=nn.Parameter(torch.randn(5, 6)), l=nn.Linear(6, 2),
    )  # fmt: skip


def test_the_arithmetic_agrees_with_fvcore_layer_by_layer_and_operator_by_operator(net):
    model = counted_model(net)
    told, counted = trace(model, IMAGES).cost(), count(model, IMAGES)
    assert {layer: dict(row) for layer, row in told.by_layer.items()} == counted.by_layer
    assert told.flops == counted.flops
    assert told.params == counted.params
    operators = {operator for row in counted.by_layer.values() for operator in row}
    assert operators == {
        "conv", "linear", "batch_norm", "group_norm", "instance_norm", "layer_norm", "upsample_nearest2d",
        "upsample_bilinear2d", "adaptive_avg_pool2d", "attention", "bmm", "matmul", "mm", "einsum",
    }  # fmt: skip


def test_by_layer_sums_to_the_total(net):
    cost = count(counted_model(net), IMAGES)
    assert sum(sum(row.values()) for row in cost.by_layer.values()) == cost.flops
    assert cost.by_layer[""].keys() >= {"bmm", "matmul"}  # what the model computes outside of its children


@pytest.mark.parametrize(
    "compute",
    [
        lambda n, x: torch.baddbmm(x.new_zeros(1), x, n.w.expand(x.shape[0], -1, -1)),
        lambda n, x: torch.tensordot(x, n.w, 1),
        lambda n, x: F.bilinear(x, x, n.big),
        lambda n, x: n.gru(x)[0],
        lambda n, x: F.adaptive_avg_pool1d(x, 2)[..., :1] * n.w[0],
    ],
    ids=["baddbmm", "tensordot", "bilinear", "gru", "adaptive_avg_pool1d"],
)
def test_what_fvcore_does_not_count_the_arithmetic_does_not_either(compute, net):
    model = net(
        lambda n, x: n.l(compute(n, x)), w=nn.Parameter(torch.randn(5, 6)), big=nn.Parameter(torch.randn(6, 5, 5)),
        gru=nn.GRU(5, 6, batch_first=True), l=nn.Linear(6, 2),
    )  # fmt: skip
    assert trace(model, SERIES).cost().flops == count(model, SERIES).flops == 4 * 12


# tiny nets for the property: name -> (model, input)
def tiny(net, cifar_net):
    torch.manual_seed(0)
    return {
        "residual": (cifar_net(), IMAGES),
        "every operator": (counted_model(net), IMAGES),
        "concatenation": (
            net(
                lambda n, x: n.l(torch.cat([n.a(x), n.b(x)], 1).flatten(1)), a=nn.Conv2d(3, 4, 3),
                b=nn.Conv2d(3, 3, 3), l=nn.Linear(7 * 36, 2),
            ),
            IMAGES,
        ),
        "depthwise and squeeze": (
            net(
                lambda n, x: (lambda y: n.l((y * n.up(n.down(y.mean((2, 3), True)).relu()).sigmoid()).mean((2, 3))))(
                    n.each(n.a(x))
                ),
                a=nn.Conv2d(3, 5, 3), each=nn.Conv2d(5, 10, 3, groups=5), down=nn.Conv2d(10, 4, 1),
                up=nn.Conv2d(4, 10, 1), l=nn.Linear(10, 2),
            ),
            IMAGES,
        ),
        "sequence": (
            net(
                lambda n, x: n.l(n.encoder(n.a(x)).mean(1)), a=nn.Linear(5, 8),
                encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), l=nn.Linear(8, 2),
            ),
            SERIES,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def traced(net, cifar_net):
    return {name: (model, x, trace(model, x)) for name, (model, x) in tiny(net, cifar_net).items()}


@pytest.mark.parametrize("name", ["residual", "every operator", "concatenation", "depthwise and squeeze", "sequence"])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_plan_costs_what_fvcore_counts_after_the_cut(name, data, traced):
    model, x, graph = traced[name]
    keep = {
        group.name: torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size).filter(any))
        )
        for group in graph.groups
    }
    plan = graph.plan(keep)
    told = graph.cost(plan)
    smaller = copy.deepcopy(model)
    cut(smaller, plan, graph=graph, verify="never")
    counted = count(smaller, x)
    assert (told.flops, told.params) == (counted.flops, counted.params)
    assert {layer: dict(row) for layer, row in told.by_layer.items()} == counted.by_layer
    assert len(graph.groups) > 0


def test_shared_parameters_count_once_and_shared_layers_twice(net):
    torch.manual_seed(0)
    model = net(lambda n, x: n.l(n.h(n.h(x))), h=nn.Linear(5, 5, bias=False), l=nn.Linear(5, 2, bias=False))
    cost = trace(model, ROWS).cost()
    assert cost.flops == count(model, ROWS).flops == 25 + 25 + 10
    assert cost.params == count(model, ROWS).params == 25 + 10


def test_counting_leaves_the_model_and_the_random_state_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    model[0].weight.grad = torch.ones(4, 5)
    model[0].bias.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    level = logging.getLogger("fvcore.nn.jit_analysis").level
    count(model, ROWS)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 5))
    assert [p.requires_grad for p in model[0].parameters()] == [True, False]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert logging.getLogger("fvcore.nn.jit_analysis").level == level


def test_keyword_inputs_and_outputs_that_fvcore_cannot_follow_are_counted(net):
    class Output:
        def __init__(self, y):
            self.y = y

    def forward(n, x, y):
        return Output({"a": [n.a(x) + n.b(y) @ n.b.weight[:, :3]]})

    model = net(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 4))
    cost = count(model, {"x": ROWS, "y": ROWS})
    assert cost == Cost(15 + 20 + 12, 18 + 24, {"": {"matmul": 12}, "a": {"linear": 15}, "b": {"linear": 20}})


def test_an_input_the_model_refuses_is_a_trace_error():
    with pytest.raises(TraceError, match=r"Linear cannot be counted .* shapes cannot be multiplied"):
        count(nn.Linear(5, 2), torch.randn(2, 4))


def test_costs_of_counters_and_dicts_compare_equal():
    assert Cost(1, 2, {"a": Counter(conv=1)}) == Cost(1, 2, {"a": {"conv": 1}})
