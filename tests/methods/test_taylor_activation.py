import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, Iterative, OneShot, TaylorActivation, loss_changes, rank_correlation, trace
from lightning_prune.commands.digits import DigitsData
from lightning_prune.methods.taylor_activation import layer_normalised, map_mflops, taylor_activation_score
from lightning_prune.taps import gated
from tests.conftest import Net, with_random_norms
from tests.nets import NETS


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theta(model, example, batches, loss_fn, **settings):
    """Group -> (C,) scores from calibration batches, not normalised unless asked for."""
    method = TaylorActivation(0.9, calibration=batches, loss_fn=loss_fn, **{"layer_norm": "none", **settings})
    return method.scores_for(trace(model, example))


# the worked example: two examples, two maps, two positions
MAPS = torch.tensor([[[1.0, 2.0], [1.0, 1.0]], [[1.0, -1.0], [2.0, 0.0]]])
GRADIENTS = torch.tensor([[[1.0, -1.0], [1.0, 1.0]], [[1.0, -2.0], [-1.0, 3.0]]])  # of each example's own loss


class Given(nn.Module):
    """Hands its input on as its maps."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv1d(2, 2, 1, bias=False), nn.Conv1d(2, 2, 1, bias=False)
        for layer in (self.conv, self.last):
            layer.weight.data = torch.eye(2)[:, :, None]

    def forward(self, x):
        return self.last(self.conv(x))


def weighted(model, batch):
    """A mean loss whose gradient by the maps of an example is that example's weights."""
    x, gradients = batch
    return (model(x) * gradients).sum((1, 2)).mean()


def test_worked_example():
    # products [[1,-2],[1,1]] and [[1,2],[-2,0]]: a = [[-1/2, 1], [3/2, -1]], theta = (1, 1)
    a = (MAPS * GRADIENTS).mean(2)
    assert a.tolist() == [[-0.5, 1.0], [1.5, -1.0]]
    assert taylor_activation_score(a).tolist() == [1.0, 1.0]
    got = theta(Given(), MAPS, [(MAPS, GRADIENTS)], weighted)["conv"]
    assert got.tolist() == [1.0, 1.0]
    hat = theta(Given(), MAPS, [(MAPS, GRADIENTS)], weighted, layer_norm="l2")["conv"]
    assert hat.tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    # neither the absolute value of every position nor that of the batch's mean
    assert (MAPS * GRADIENTS).abs().mean((0, 2)).tolist() == [1.5, 1.0]
    assert a.mean(0).abs().tolist() == [0.5, 0.0]


def test_a_layers_length_is_one_and_zeros_stay():
    assert layer_normalised(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert layer_normalised(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_cost_of_a_map_is_the_papers():
    # 2 * 224^2 * (64 * 9 + 1) = 57.90 million, of VGG-16's second convolution; the first: 2.8
    assert map_mflops(224 * 224, 64 * 9) == pytest.approx(57.90, abs=0.005)
    assert map_mflops(224 * 224, 3 * 9) == pytest.approx(2.8, abs=0.05)
    wide = Net(lambda n, x: n.b(n.a(x)), a=nn.Conv2d(8, 4, 3, padding=1), b=nn.Conv2d(4, 2, 3))
    x = torch.randn(1, 8, 14, 14)

    def loss(model, batch):
        return model(batch).square().mean()

    free, priced = (theta(wide, x, [x], loss, flops_lambda=price)["a"] for price in (0.0, 1e-3))
    assert (free - priced).tolist() == pytest.approx([1e-3 * 2 * 14 * 14 * (8 * 9 + 1) / 1e6] * 4, rel=1e-3)


def plain(activation=F.relu):
    torch.manual_seed(0)
    net = Net(
        lambda n, x: n.fc(F.max_pool2d(activation(n.norm(n.conv(x))), 2).flatten(1)),
        conv=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(16, 3),
    )  # fmt: skip
    return with_random_norms(net).double().eval()


X, Y = rows(5, 2, 6, 6), torch.tensor([0, 1, 2, 0, 1])


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_equals_a_slow_loop_over_examples_and_positions():
    model = plain()
    maps = F.relu(model.norm(model.conv(X))).detach().requires_grad_()
    expected = torch.zeros(4, dtype=torch.float64)
    for n in range(5):
        loss = F.cross_entropy(model.fc(F.max_pool2d(maps[n : n + 1], 2).flatten(1)), Y[n : n + 1])
        (gradient,) = torch.autograd.grad(loss, maps)
        product = (maps * gradient).detach()
        for k in range(4):
            expected[k] += abs(sum(float(product[n, k, i, j]) for i in range(4) for j in range(4)))
    got = theta(model, X, [(X, Y)], cross_entropy)["conv"]
    assert torch.allclose(got.double(), expected / 16 / 5, rtol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_scores_before_and_after_the_relu_are_equal(dims):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = Net(lambda n, x: n.b(F.relu(n.a(x))).flatten(1).sum(1).exp(), a=conv(2, 4, 2), b=conv(4, 2, 2)).double()
    x = rows(3, 2, *[4] * dims)
    got = theta(model, x, [x], lambda model, x: model(x).mean())["a"]
    before = model.a(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.b(F.relu(before)).flatten(1).sum(1).exp().sum(), before)
    expected = (before * gradient).flatten(2).mean(2).abs().mean(0)
    assert torch.allclose(got.double(), expected, rtol=1e-6)


def test_normalised_scores_do_not_depend_on_the_scale_of_the_loss():
    once, seven = (
        theta(plain(), X, [(X, Y)], lambda m, b, s=s: s * cross_entropy(m, b), layer_norm="l2")["conv"] for s in (1, 7)
    )
    assert torch.allclose(once, seven, rtol=1e-6)


@pytest.mark.parametrize("split", [1, 2, [4, 1]])
def test_scores_do_not_depend_on_the_batches(split):
    whole = theta(plain(), X, [(X, Y)], cross_entropy)["conv"]
    parts = theta(plain(), X, list(zip(X.split(split), Y.split(split), strict=True)), cross_entropy)["conv"]
    assert torch.allclose(whole, parts, rtol=1e-6)


def test_of_one_example_it_is_the_gradient_of_a_gate():
    model = plain(F.gelu)
    graph = trace(model, X)
    gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with gated(model, {"conv": graph.maps(graph.group("conv"))}, {"conv": gate}):
        (slope,) = torch.autograd.grad(cross_entropy(model, (X[:1], Y[:1])), gate)
    got = theta(model, X, [(X[:1], Y[:1])], cross_entropy)["conv"]
    assert torch.allclose(16 * got.double(), slope.abs(), rtol=1e-6)


def test_is_the_change_of_each_examples_loss_where_that_is_linear():
    # without activations the logits are linear in each map; so is the loss, if it is a weighted sum of them
    torch.manual_seed(0)
    model = Net(lambda n, x: n.b(n.a(x)).sum((2, 3)), a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 3, 2)).double()
    graph = trace(model, X)

    def loss(model, batch):
        return model(batch[0]).gather(1, batch[1][:, None]).mean()

    got = theta(model, X, [(X, Y)], loss)["a"]
    changes = torch.stack([loss_changes(model, graph, [(X[n : n + 1], Y[n : n + 1])], loss)["a"] for n in range(5)])
    assert torch.allclose(16 * got.double(), changes.abs().mean(0), rtol=1e-6)
    assert not torch.allclose(16 * got.double(), changes.mean(0).abs(), rtol=0.1)


def test_a_dead_map_and_one_that_nobody_reads_score_zero():
    model = plain()
    with torch.no_grad():
        model.norm.weight[1] = model.norm.bias[1] = 0
        model.fc.weight[:, 8:12] = 0  # what reads map 2
    got = theta(model, X, [(X, Y)], cross_entropy, layer_norm="l2")["conv"]
    assert got[1:3].tolist() == [0.0, 0.0]
    assert got[[0, 3]].min() > 0


def test_a_stream_is_summed_with_signs_over_where_it_is_read():
    # out = relu(x) is read by b and by the sum: signed sums before the absolute value
    torch.manual_seed(0)
    model = Net(
        lambda n, x: n.c(n.s(x) + torch.tanh(n.b(n.s(x)))).flatten(1).sum(1),
        s=nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU()), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1),
    ).double()  # fmt: skip
    graph = trace(model, X)
    group = graph.groups[0]
    taps = graph.maps(group)
    assert len(taps) > 1
    slopes = torch.zeros(len(taps), 5, 4, dtype=torch.float64)
    for t, tap in enumerate(taps):
        for n in range(5):
            gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
            with gated(model, {"s": [tap]}, {"s": gate}):
                slopes[t, n] = torch.autograd.grad(model(X[n : n + 1]).sum(), gate)[0] / 36
    got = theta(model, X, [X], lambda model, x: model(x).mean())[group.name].double()
    assert torch.allclose(got, slopes.sum(0).abs().mean(0), rtol=1e-6)
    assert not torch.allclose(got, slopes.abs().sum(0).mean(0), rtol=0.01)


@pytest.mark.parametrize("name", ["squeeze_excite", "unet", "several_inputs", "nested_outputs", "transformer_encoder"])
def test_every_group_of_many_kinds_of_networks_is_scored(name):
    torch.manual_seed(0)
    model, inputs = with_random_norms(NETS[name].build()).eval(), NETS[name].inputs(3)

    def loss(model, batch):
        out = model(**batch[0]) if isinstance(batch[0], dict) else model(*batch)
        return sum(x.square().mean() for x in torch.utils._pytree.tree_leaves(out) if x is not None)

    scores = theta(model, inputs, [(inputs,)], loss)
    assert set(scores) == {group.name for group in trace(model, inputs).groups}
    assert all(bool(torch.isfinite(score).all() and score.max() > 0) for score in scores.values())


class Three(nn.Module):
    """Three convolutions for the digits."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 16), (16, 32), (32, 32))
        )  # fmt: skip
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(16), nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.fc(F.relu(self.norm3(self.conv3(x))).mean((2, 3)))


def test_ranks_as_the_true_loss_change_does_and_layers_only_once_they_are_normalised():
    data = DigitsData()
    data.setup("fit")
    x, y = data.train.tensors
    torch.manual_seed(0)
    model = Three()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(12):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    model.eval()
    loader = DataLoader(TensorDataset(x[:512], y[:512]), 64)
    changes = loss_changes(model, trace(model, x[:1]), loader, cross_entropy)
    raw, hat = (
        rank_correlation(theta(model, x[:1], loader, cross_entropy, layer_norm=norm), changes)
        for norm in ("none", "l2")
    )
    assert raw.groups == pytest.approx(hat.groups)
    assert hat.mean > 0.7
    assert hat.overall > raw.overall + 0.3


def test_cost_in_the_ranking_is_of_the_network_as_it_is_now(fit):
    seen = []

    class Spy(TaylorActivation):
        def scores(self, views):
            seen.append((self._costs_of_maps(), {name: group[0].group.size for name, group in views.items()}))
            return super().scores(views)

    at = Iterative(start=2, end=6, events=2, unit="step")
    fit(Spy(0.6, flops_lambda=1e-3, schedule=at))
    for costs, size in seen:
        # stem reads one channel, conv1 the stem's, conv2 conv1's and writes the stem's; hidden reads the stem's
        assert costs["stem"] == pytest.approx(2 * 64 * (9 + 1 + 9 * size["conv1"] + 1) / 1e6)
        assert costs["conv1"] == pytest.approx(2 * 64 * (9 * size["stem"] + 1) / 1e6)
        assert costs["hidden"] == pytest.approx(2 * (size["stem"] + 1) / 1e6)
    assert seen[0][0]["conv1"] != seen[1][0]["conv1"] or seen[0][0]["stem"] != seen[1][0]["stem"]


def test_masks_and_cuts_take_the_same_maps(fit):
    at, seen = Iterative(start=2, end=6, events=3, unit="step"), {}

    class Spy(TaylorActivation):
        def scores(self, views):
            out = super().scores(views)
            for name, group in views.items():
                alive = self._alive[name]
                seen.setdefault(self.apply, []).append((name, out[name][alive], group[0].group.size))
            return out

    kept = []
    for apply in ("cut", "mask"):
        callback = Spy(0.5, apply=apply, schedule=at, flops_lambda=1.0, absorb=False)
        fit(callback)
        kept.append(callback.plan.groups)
    assert kept[0] == kept[1]
    assert len(seen["cut"]) == 9
    for (name, cut, _), (other, masked, _) in zip(seen["cut"], seen["mask"], strict=True):
        assert name == other
        assert torch.allclose(cut, masked, rtol=1e-3, atol=1e-6)


def test_a_large_price_takes_dear_maps_first(fit):
    kept = {}
    for price in (0.0, 1e6):
        callback = TaylorActivation(Budget(0.7, of="units"), flops_lambda=price, schedule=OneShot(4, unit="step"))
        fit(callback)
        kept[price] = {name: count for name, (count, _) in callback.plan.groups.items()}
    # one map: stem's two layers 119 positions' worth, conv1 55, hidden next to nothing
    assert kept[1e6] == {"stem": 1, "conv1": 8, "hidden": 12}
    assert kept[0.0] != kept[1e6]


def test_papers_schedule_takes_as_many_each_time(fit):
    schedule = TaylorActivation.paper_schedule(9, updates=2, at_once=3)
    assert [(e.step, e.progress) for e in schedule.resolve(10, None)] == [
        (2, pytest.approx(1 / 3)), (4, pytest.approx(2 / 3)), (6, 1.0),
    ]  # fmt: skip
    callback = TaylorActivation(Budget(0.7, of="units"), schedule=schedule)  # 21 of 30
    fit(callback)
    assert [round(30 * row["prune/density"]) for row in callback.report.rows] == [27, 24, 21]
    assert TaylorActivation.paper_schedule(2).points() == [(30, 0.5), (60, 1.0)]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_give_about_the_same_scores(fit, precision):
    class Spy(TaylorActivation):
        def scores(self, views):
            self.seen = super().scores(views)
            return self.seen

    got = []
    for p in ("32-true", precision):
        callback = Spy(0.7, schedule=OneShot(4, unit="step"))
        fit(callback, precision=p)
        got.append(torch.cat(list(callback.seen.values())).float())
    assert torch.allclose(*got, atol=0.1)
    assert torch.corrcoef(torch.stack(got))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_norm": "l1"}, "layer_norm must be one of 'l2', 'none', got 'l1'"),
        ({"flops_lambda": -1.0}, r"flops_lambda must be a number of at least 0, got -1\.0"),
        ({"flops_lambda": math.nan}, "flops_lambda must be a number"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaylorActivation(0.5, **settings)


@pytest.mark.parametrize("settings", [{"maps": 0}, {"maps": 3, "updates": 0}, {"maps": 3, "at_once": 0}])
def test_a_papers_schedule_without_events_is_refused(settings):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        TaylorActivation.paper_schedule(**settings)
