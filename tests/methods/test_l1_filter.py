import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import Budget, L1Filter, plan, trace
from lightning_prune.methods.l1_filter import l1_filter_score, sensitivity

W1 = torch.tensor([[1.0, -2.0], [0.5, 0.5], [3.0, 0.0]])
W2 = torch.tensor([[0.1, 5.0, 0.1], [1.0, 0.0, 1.5], [1.0, 0.2, 2.0]])


def kept(plan, name):
    return plan.kept[name][0].tolist()


def two_layers():
    """Two 1x1 convolutions with the weights above, and a reader."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1)
    )
    with torch.no_grad():
        model[0].weight.copy_(W1[:, :, None, None])
        model[2].weight.copy_(W2[:, :, None, None])
    return model


def test_score_sums_absolute_values():
    # signed sums (-1, 1, 3) would remove filter 0; squares are (5, 0.5, 9)
    assert l1_filter_score(W1).tolist() == [3.0, 1.0, 3.0]


def test_scores_of_many_weights_are_bit_by_bit_those_of_all_at_once():
    for shape in ((5, 300_000), (3, 2**19), (1, 2**19), (700, 2_001)):
        filters = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(l1_filter_score(filters), filters.abs().sum(dim=1))


def test_independent_and_greedy_disagree_where_a_producer_is_gone():
    # filter 1 of the first layer goes. Independent: (5.2, 2.5, 3.2), 1 goes next; without input 1: (0.2, 2.5, 3.0), 0
    graph = trace(two_layers(), torch.zeros(1, 2, 4, 4))
    plans = {mode: plan(graph, "l1_filter", Budget(0.67, of="units"), mode=mode) for mode in ("independent", "greedy")}
    assert kept(plans["independent"], "0.weight") == kept(plans["greedy"], "0.weight") == [0, 2]
    assert kept(plans["independent"], "2.weight") == [0, 2]
    assert kept(plans["greedy"], "2.weight") == [1, 2]


def test_greedy_works_in_a_fit(fit):
    callback = L1Filter(0.5, mode="greedy")
    fit(callback)
    assert callback.report.flops_kept <= 0.5


class Projected(nn.Module):
    """A residual block whose shortcut is a 1x1 projection."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.projection = nn.Conv2d(2, 3, 1)
        self.last = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last((self.conv(x) + self.projection(x)).relu())


def projected():
    """Channel norms of the convolution (18, 36, 72), of the projection (8, 4, 2): they order channels oppositely."""
    model = Projected()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([1.0, 2.0, 4.0])[:, None, None, None].expand(3, 2, 3, 3))
        model.projection.weight.copy_(torch.tensor([4.0, 2.0, 1.0])[:, None, None, None].expand(3, 2, 1, 1))
    return model


def test_projection_decides_in_a_residual_group():
    graph = trace(projected(), torch.zeros(1, 1, 6, 6))
    settings = {"budget": Budget(0.8, of="units"), "ignore": ["first"]}
    found = plan(graph, "l1_filter", **settings)
    assert kept(found, "projection.weight") == kept(found, "conv.weight") == [0, 1]


@pytest.mark.parametrize(
    ("reduction", "survivors"),
    # sum and mean: (26, 40, 74), 0 goes first; min: (8, 4, 2), 2 goes first, as the projection says
    [("sum", [1, 2]), ("mean", [1, 2]), ("min", [0, 1]), ("first", [0, 1])],
)
def test_group_reduction_joins_the_producers(reduction, survivors):
    graph = trace(projected(), torch.zeros(1, 1, 6, 6))
    found = plan(graph, "l1_filter", Budget(0.8, of="units"), ignore=["first"], group_reduction=reduction)
    assert kept(found, "conv.weight") == survivors


def test_norms_and_biases_do_not_count(cifar_net):
    model = cifar_net()
    x = torch.zeros(1, 3, 8, 8)
    first = plan(trace(model, x), "l1_filter", 0.5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(len(module.weight)))
                module.running_var.copy_(torch.rand(len(module.weight)))
        model.linear.bias.fill_(9.0)
    assert plan(trace(model, x), "l1_filter", 0.5) == first


def test_among_equal_filters_the_lower_index_goes_first():
    model = two_layers()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    found = plan(trace(model, torch.zeros(1, 2, 4, 4)), "l1_filter", Budget(0.67, of="units"))
    assert kept(found, "0.weight") == [1, 2]


def test_own_fractions_keep_the_floor_without_floating_point_error():
    # int(10 * (1 - 0.9)) is 0 in floating point; one filter of ten stays
    model = nn.Sequential(nn.Conv2d(1, 10, 1), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 1, 1))
    graph = trace(model, torch.zeros(1, 1, 4, 4))
    found = plan(graph, "l1_filter", 1.0, keep={"0": 1 - 0.9, "1": 0.7})
    assert found.groups == {"0": (1, 10), "1": (7, 10)}


def vgg16():
    """VGG-16 for CIFAR-10 with one hidden layer, as the paper counts it."""
    layers, width = [], 3
    for step in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if step == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, step, 3, padding=1), nn.BatchNorm2d(step), nn.ReLU()]
            width = step
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))


def test_vgg16_a_costs_what_the_paper_says():
    # convolutions 1 and 8 to 13 lose half: 313,463,808 to 206,279,680 multiply-accumulates
    graph = trace(vgg16(), torch.zeros(1, 3, 32, 32))
    convs = [group.name for group in graph.groups][:13]
    keep = {name: 0.5 if i == 0 or i >= 7 else 1.0 for i, name in enumerate(convs)}
    found = plan(graph, "l1_filter", 1.0, keep=keep, ignore=[graph.groups[13].name])
    assert graph.cost().conv_linear_flops == 313_463_808
    assert graph.cost(found).conv_linear_flops == 206_279_680
    shapes = {name: found.current_shape(name) for name in found.shapes}
    matrices = [shapes.get(n, p.shape) for n, p in graph.model.named_parameters() if p.ndim > 1]
    assert sum(torch.Size(shape).numel() for shape in matrices) == 5_390_176


class Basic(nn.Module):
    """Two convolutions beside a shortcut that subsamples and pads with zeros (option A)."""

    def __init__(self, width, planes):
        super().__init__()
        stride, self.pad = (1, 0) if width == planes else (2, (planes - width) // 2)
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)

    def forward(self, x):
        out = self.conv2(F.relu(self.conv1(x)))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


def test_resnet56_b_costs_what_the_paper_says():
    # first convolutions of blocks lose 60, 30, 10 % by stage, but for layers 16, 18, 20, 34, 38, 54 (stem = 1);
    # kept 6 of 16, 22 of 32, 57 of 64: 125,485,696 to 90,907,264 multiply-accumulates
    widths = [16] * 9 + [32] * 9 + [64] * 9
    blocks = [Basic(before, width) for before, width in zip([16, *widths], widths, strict=False)]
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ReLU(), *blocks, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)
    )
    graph = trace(model, torch.zeros(1, 3, 32, 32))
    keep = {}
    for number, fraction in enumerate([0.4] * 9 + [0.7] * 9 + [0.9] * 9, start=1):
        layer = 2 * number  # the first convolution of block b is layer 2 b
        keep[f"{number + 1}.conv1"] = 1.0 if layer in (16, 18, 20, 34, 38, 54) else fraction
    streams = sorted({group.name for group in graph.groups} - keep.keys())
    found = plan(graph, "l1_filter", 1.0, keep=keep, ignore=streams)
    assert graph.cost().conv_linear_flops == 125_485_696
    assert graph.cost(found).conv_linear_flops == 90_907_264
    assert sorted({kept for kept, size in found.groups.values() if kept < size}) == [6, 22, 57]


def test_sensitivity_prunes_each_group_alone():
    asked = []

    def evaluate(group, fraction):
        asked.append((group, fraction))
        return 1 - fraction

    rows = sensitivity([0.5, 0.9], {"a": 10, "b": 1}, evaluate)
    assert asked == [("a", 0.5), ("a", 0.9), ("b", 0.5), ("b", 0.9)]
    assert [row["channels"] for row in rows] == [5, 9, 1, 1]
    assert rows[1] == {"group": "a", "keep": 0.9, "channels": 9, "accuracy": pytest.approx(0.1)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "mode must be 'independent' or 'greedy', got 'both'"),
        ({"group_reduction": "max"}, "group_reduction must be 'first', 'sum', 'mean' or 'min', got 'max'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        L1Filter(0.5, **settings)


class Bottleneck(nn.Module):
    """A residual block that ends in a 1x1 convolution, as its shortcut does: shapes do not tell them apart."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.inner = nn.Conv2d(2, 3, 3, padding=1)
        self.expand = nn.Conv2d(3, 3, 1)
        self.projection = nn.Conv2d(2, 3, 1)
        self.last = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last((self.expand(self.inner(x).relu()) + self.projection(x)).relu())


def test_projection_decides_in_a_bottleneck_too():
    # norms of the last convolution (3, 6, 12), of the projection (8, 4, 2): the projection reads what `inner` reads too
    model = Bottleneck()
    with torch.no_grad():
        model.expand.weight.copy_(torch.tensor([1.0, 2.0, 4.0])[:, None, None, None].expand(3, 3, 1, 1))
        model.projection.weight.copy_(torch.tensor([4.0, 2.0, 1.0])[:, None, None, None].expand(3, 2, 1, 1))
    graph = trace(model, torch.zeros(1, 1, 6, 6))
    found = plan(graph, "l1_filter", Budget(0.9, of="units"), ignore=["first", "inner"])
    assert kept(found, "expand.weight") == kept(found, "projection.weight") == [0, 1]
