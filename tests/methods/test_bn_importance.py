import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune
from lightning_prune import BNImportance, Budget, Iterative, trace
from lightning_prune.errors import NothingToPrune, UnmeetableBudget
from lightning_prune.graph.flow import Activation
from lightning_prune.methods.bn_importance import IDENTITY, bn_importance_score, moments, rectified

RELU = Activation("relu", F.relu)
RELU6 = Activation("hardtanh", lambda x: F.hardtanh(x, 0.0, 6.0))
LEAKY = Activation("leaky_relu", lambda x: F.leaky_relu(x, 0.1))
TABLE = [  # beta, gamma, E relu, E relu^2, E |z|
    (0, 1, 0.398942, 0.500000, 0.797885),
    (1, 1, 1.083315, 1.924660, 1.166631),
    (-1, 1, 0.083315, 0.075340, 1.166631),
    (-2, 1, 0.008491, 0.005769, 2.016981),
    (-3, 1, 0.000382, 0.000203, 3.000764),
    (0, 2, 0.797885, 2.000000, 1.595769),
    (0, -2, 0.797885, 2.000000, 1.595769),
    (0.5, 0.25, 0.502123, 0.312139, 0.504245),
    (-0.5, 0.25, 0.002123, 0.000361, 0.504245),
    (0.1, 2, 0.848882, 2.164643, 1.597763),
]


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def one(beta, gamma, activation=IDENTITY, functional="mean_abs"):
    return bn_importance_score(vector(gamma), vector(beta), activation, functional).item()


@pytest.mark.parametrize(("beta", "gamma", "relu", "square", "folded"), TABLE)
def test_scores_by_hand(beta, gamma, relu, square, folded):
    # a negative scale counts as its size; scale and shift swapped would give 2 for (0, 2)
    assert one(beta, gamma, RELU) == pytest.approx(relu, abs=1e-6)
    assert one(beta, gamma, RELU, "second_moment") == pytest.approx(square, abs=1e-6)
    assert one(beta, gamma, RELU, "std") == pytest.approx(math.sqrt(square - relu**2), abs=2e-5)
    assert one(beta, gamma) == pytest.approx(folded, abs=1e-6)
    assert one(beta, gamma, IDENTITY, "second_moment") == pytest.approx(beta**2 + gamma**2)
    assert one(beta, gamma, IDENTITY, "std") == pytest.approx(abs(gamma))


def test_other_activations_by_hand():
    assert one(0.1, 2, RELU6) == pytest.approx(0.847971, abs=1e-6)
    assert one(0.1, 2, RELU6) != pytest.approx(one(0.1, 2, RELU), abs=1e-4)
    gelu, silu = Activation("gelu", F.gelu), Activation("silu", F.silu)
    means = [moments(vector(beta), vector(1), gelu).mean.item() for beta in (0, 1, -1)]
    assert means == pytest.approx([0.282095, 0.979946, -0.020054], abs=1e-6)
    assert one(-1, 1, gelu) == pytest.approx(0.151234, abs=2e-6)  # the bend of |f| costs the trapezoids a millionth
    assert moments(vector(0), vector(1), silu).mean.item() == pytest.approx(0.206621, abs=1e-6)


def test_without_spread_the_score_is_the_activation_of_the_shift():
    assert [one(beta, 0, RELU) for beta in (0.5, -0.5, 0.0)] == [0.5, 0.0, 0.0]
    assert one(-0.5, 0) == 0.5
    assert one(8, 0, RELU6) == pytest.approx(6)
    assert one(-1, 0, LEAKY) == pytest.approx(0.1)
    assert one(0.3, 0, Activation("silu", F.silu)) == pytest.approx(F.silu(vector(0.3)).item())
    assert one(0.5, 0, RELU, "std") == 0


@pytest.mark.parametrize(
    "activation",
    [
        IDENTITY,
        RELU,
        RELU6,
        LEAKY,
        Activation("hardtanh", F.hardtanh),
        Activation("clamp", lambda x: x.clamp(-2, -0.5)),
        Activation("clamp", lambda x: x.clamp(0.5, 2)),
        Activation("clamp", lambda x: x.clamp(max=0.7)),
        Activation("clamp_min", lambda x: x.clamp_min(-0.2)),
        Activation("leaky_relu", lambda x: F.leaky_relu(x, -0.3)),
    ],
)
def test_closed_forms_are_what_the_trapezoids_give(activation):
    beta, gamma = vector(-2, -0.7, 0, 0.4, 3), vector(0.5, 1.5, 1, 2, 0.1)
    closed = moments(beta, gamma, activation)
    numerical = moments(beta, gamma, Activation("any", activation.function))
    for first, second in zip(closed, numerical, strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=2e-5)


def test_samples_agree_with_the_moments():
    generator = torch.Generator().manual_seed(0)
    z = 0.3 + 0.8 * torch.randn(400_000, generator=generator, dtype=torch.float64)
    for activation in (RELU, RELU6, LEAKY, Activation("hardswish", F.hardswish), Activation("sigmoid", torch.sigmoid)):
        a = activation.function(z)
        found = moments(vector(0.3), vector(0.8), activation)
        assert found.mean.item() == pytest.approx(a.mean().item(), abs=4e-3)
        assert found.magnitude.item() == pytest.approx(a.abs().mean().item(), abs=4e-3)
        assert found.square.item() == pytest.approx(a.square().mean().item(), abs=1e-2)


def test_identities_of_the_rectified_gaussian():
    beta, gamma = vector(-1.3, 0.2, 2), vector(0.4, 1, 3)
    plus, minus = rectified(beta, gamma)[0], rectified(-beta, gamma)[0]
    assert torch.allclose(plus - minus, beta)
    assert torch.allclose(plus + minus, moments(beta, gamma).magnitude)
    assert torch.allclose(rectified(7 * beta, 7 * gamma)[0], 7 * plus)
    assert bool((rectified(beta + 0.1, gamma)[0] > plus).all())
    assert bool((rectified(beta, gamma + 0.1)[0] > plus).all())


def test_far_tails_stay_finite_and_in_order():
    score = bn_importance_score(vector(1, 1, 1, 1e-300), vector(-10, -20, -30, -1), RELU)
    assert score.isfinite().all()
    assert score.tolist() == sorted(score.tolist(), reverse=True)
    assert score[2] > 0


def with_norms(model, **pairs):
    """Give norms these scales and shifts: name -> (gamma, beta)."""
    for name, (gamma, beta) in pairs.items():
        norm = model.get_submodule(name.replace("__", "."))
        with torch.no_grad():
            norm.weight.copy_(torch.as_tensor(gamma))
            norm.bias.copy_(torch.as_tensor(beta))
    return model


def randomised(model, seed=0):
    """All norms with scales and shifts of every size and sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.copy_(torch.randn(len(module.weight), generator=generator))
                module.bias.copy_(torch.randn(len(module.bias), generator=generator))
                module.running_mean.copy_(torch.randn(len(module.bias), generator=generator))
                module.running_var.copy_(0.5 + torch.rand(len(module.bias), generator=generator))
    return model


def scores(model, x, **settings):
    return BNImportance(0.99, **settings).scores_for(trace(model, x))


def score_of(norm, activation=RELU):
    return bn_importance_score(norm.weight, norm.bias, activation)


X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def plain(activation=None, width=4):
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(1, width, 3, bias=False),
            nn.BatchNorm2d(width),
            activation or nn.ReLU(),
            nn.Conv2d(width, 3, 3),
            nn.Flatten(),
            nn.Linear(12, 2),
        )
    )


def test_a_wide_norm_that_is_never_on_goes_before_a_narrow_one_that_is():
    # (gamma, beta) = (1, -3) and (0.3, 1): slimming would drop the second, the smaller scale
    model = with_norms(plain(width=2), **{"1": ([1.0, 0.3], [-3.0, 1.0])})
    found = scores(model, X)["0"]
    assert found.tolist() == pytest.approx([0.000382, 1.0], abs=1e-4)
    method = BNImportance(Budget(0.99))
    assert method.plan_for(trace(model, X)).kept["0.weight"][0].tolist() == [1]


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (nn.ReLU(inplace=True), RELU),
        (nn.ReLU6(), RELU6),
        (nn.LeakyReLU(0.1), LEAKY),
        (nn.Identity(), IDENTITY),
        (nn.Hardswish(), Activation("hardswish", F.hardswish)),
        (nn.GELU(), Activation("gelu", F.gelu)),
        (nn.SiLU(), Activation("silu", F.silu)),
        (nn.Sequential(nn.Dropout(0.1), nn.ReLU(), nn.MaxPool2d(1), nn.Dropout2d(0.5)), RELU),
    ],
)
def test_the_activation_is_the_network_s_own(module, activation):
    model = plain(module)
    assert torch.allclose(scores(model, X)["0"], score_of(model[1], activation))


def test_no_activation_is_not_taken_for_relu():
    # the mean of size 2 of a channel that is always negative counts where nothing cuts it off
    model = with_norms(plain(nn.Identity(), width=2), **{"1": ([0.1, 0.1], [-2.0, 1.0])})
    assert scores(model, X)["0"].argmax() == 0


def test_neither_weights_nor_running_statistics_nor_data_count():
    model = plain()
    before = scores(model, X)["0"]
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[1].running_mean.add_(1)
        model[1].running_var.mul_(2)
    assert torch.equal(scores(model, 5 * X)["0"], before)


def test_measured_means_agree_where_what_goes_in_is_gaussian():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)))
    x = torch.randn(100_000, 5)
    with torch.no_grad():
        measured = F.relu(model[1].train()(model[0](x))).mean(dim=0)
    found = scores(model, x[:4])["0"].float()
    assert torch.allclose(found, measured, rtol=0.02, atol=0.002)


class Residual(nn.Module):
    """Stem, a block with the identity, and one with a projection to more channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a1, self.norm_a1 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.a2, self.norm_a2 = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b1, self.norm_b1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b2, self.norm_b2 = nn.Conv2d(6, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.down, self.norm_down = nn.Conv2d(4, 7, 1), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        out = self.norm_a2(self.a2(F.relu(self.norm_a1(self.a1(x)))))
        out += x
        x = F.relu(out)
        x = F.relu(self.norm_b2(self.b2(F.relu(self.norm_b1(self.b1(x))))) + self.norm_down(self.down(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return randomised(Residual())


def test_streams_stay_whole_by_default(residual):
    method = BNImportance(0.9)
    graph = trace(residual, X)
    found = method.scores_for(graph)
    assert list(found) == ["a1", "b1"]
    assert torch.allclose(found["a1"], score_of(residual.norm_a1))
    assert "sums of what several layers make; coupled='sum'" in method.report.frozen["stem"]
    assert method.report.frozen["b2"] == method.report.frozen["stem"]
    assert set(method.plan_for(graph).groups) == {"a1", "b1"}


def test_a_budget_out_of_reach_says_what_would_help(residual):
    graph = trace(residual, X)
    with pytest.raises(UnmeetableBudget, match=r"here also lower floor=0.5, or let streams go as well with coupled='s"):
        BNImportance(0.3, floor=0.5).check(graph)
    with pytest.raises(UnmeetableBudget, match=r"lower floor=0.5$"):
        BNImportance(0.01, floor=0.5, coupled="sum").check(graph)


def test_sums_are_of_independent_gaussians(residual):
    found = scores(residual, X, coupled="sum")
    norm = residual.norm_b2, residual.norm_down
    mean = norm[0].bias + norm[1].bias
    deviation = (norm[0].weight.square() + norm[1].weight.square()).sqrt()
    # both branches end in a norm: shifts add, squares of scales add; without the activation it would be E|sum|
    assert torch.allclose(found["b2"], moments(mean, deviation, RELU).magnitude)
    # the identity brings mean and variance of the block before; scored where it is read, behind the stem and the block
    before = moments(residual.norm0.bias, residual.norm0.weight.abs(), RELU)
    variance = before.square - before.mean.square() + residual.norm_a2.weight.double().square()
    behind = moments(before.mean + residual.norm_a2.bias, variance.sqrt(), RELU)
    assert torch.allclose(found["stem"], (before.magnitude + behind.magnitude) / 2)
    assert torch.equal(found["a1"], scores(residual, X)["a1"])


class Depthwise(nn.Module):
    """An inverted residual without its shortcut, and squeeze and excite on it."""

    def __init__(self, excite=False):
        super().__init__()
        self.wide, self.norm1 = nn.Conv2d(1, 5, 1), nn.BatchNorm2d(5)
        self.deep, self.norm2 = nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5)
        self.fc1, self.fc2 = (nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1)) if excite else (None, None)
        self.narrow, self.norm3 = nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = F.relu6(self.norm2(self.deep(F.relu6(self.norm1(self.wide(x))))))
        if self.fc1 is not None:
            x = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))) * x
        return self.fc(self.norm3(self.narrow(x)).mean((2, 3)))


@pytest.mark.parametrize("excite", [False, True])
def test_a_channel_is_worth_the_lesser_of_what_stands_around_a_depthwise_layer(excite):
    torch.manual_seed(0)
    model = randomised(Depthwise(excite))
    found = scores(model, X)
    first, second = score_of(model.norm1, RELU6), score_of(model.norm2, RELU6)
    assert bool((first < second).any())
    assert bool((first > second).any())
    assert torch.allclose(found["wide"], torch.minimum(first, second))
    assert torch.allclose(found["narrow"], score_of(model.norm3, IDENTITY))


class SumInFrontOfDepthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, 5, 1), nn.BatchNorm2d(5)
        self.b, self.norm_b = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.deep, self.norm = nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5)
        self.narrow, self.norm_n, self.fc = nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x):
        x = F.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x)))
        return self.fc(F.relu(self.norm_n(self.narrow(F.relu(self.norm(self.deep(x)))))).mean((2, 3)))


def test_a_sum_in_front_of_a_depthwise_layer_is_a_stream_too():
    torch.manual_seed(0)
    model = randomised(SumInFrontOfDepthwise())
    assert list(scores(model, X)) == ["narrow"]
    mean = model.norm_a.bias + model.norm_b.bias
    deviation = (model.norm_a.weight.square() + model.norm_b.weight.square()).sqrt()
    before = moments(mean, deviation, RELU).magnitude
    assert torch.allclose(scores(model, X, coupled="sum")["a"], torch.minimum(before, score_of(model.norm)))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        for i in (1, 2):
            setattr(self, f"norm{i}", nn.BatchNorm2d(4))
            setattr(self, f"conv{i}", nn.Conv2d(4, 4, 3, padding=1, bias=False))
        self.last, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x)))
        x = x + self.conv2(F.relu(self.norm2(x)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def test_in_a_pre_activation_net_the_norms_that_read_the_stream_say_what_it_is_worth():
    torch.manual_seed(0)
    model = randomised(PreActivation())
    found = scores(model, X)
    norms = [score_of(norm) for norm in (model.norm1, model.norm2, model.last)]
    assert torch.allclose(found["stem"], torch.stack(norms).mean(dim=0))


class Concatenated(nn.Module):
    """Two inputs; two branches joined, and read through one norm; grouped behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)
        self.b, self.norm_b = nn.Conv2d(2, 5, 1), nn.BatchNorm2d(5)
        self.join, self.norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.grouped, self.fc = nn.Conv2d(6, 4, 1, groups=2), nn.Linear(4, 2)

    def forward(self, x, y):
        x = torch.cat([F.max_pool2d(F.relu(self.norm_a(self.a(x))), 1), torch.tanh(self.norm_b(self.b(y)))], dim=1)
        return self.fc(self.grouped(F.relu(self.norm(self.join(x)))).mean((2, 3)))


def test_producers_of_a_concatenation_keep_their_own_scores():
    torch.manual_seed(0)
    model = randomised(Concatenated())
    found = scores(model, (X, torch.randn(2, 2, 6, 6)))
    assert torch.allclose(found["a"], score_of(model.norm_a))
    assert torch.allclose(found["b"], score_of(model.norm_b, Activation("tanh", torch.tanh)))
    # in front of two conv groups, channels i and i + 3 go together
    assert torch.allclose(found["join"], score_of(model.norm).reshape(2, 3).mean(dim=0))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)])
def test_without_a_batch_norm_that_has_a_scale_there_is_no_score(norm):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 3))
    method = BNImportance(0.5)
    with pytest.raises(NothingToPrune, match="0: no batch norm says how its channels are distributed"):
        method.scores_for(trace(model, X))


def test_layers_without_a_norm_stay_whole_beside_others():
    model = nn.Sequential(*plain()[:4], nn.ReLU(), nn.Conv2d(3, 2, 1))
    method = BNImportance(0.95)
    assert list(method.scores_for(trace(model, X))) == ["0"]
    assert "no batch norm" in method.report.frozen["3"]


def test_untrained_norms_tie_and_the_lower_index_goes_first():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    plan = BNImportance(Budget(0.5, of="units")).plan_for(trace(model, X))
    assert plan.kept["0.weight"][0].tolist() == [2, 3]


def test_normalised_by_the_mean_of_the_layer(residual):
    found = scores(residual, X, normalize="layer_mean")
    raw = score_of(residual.norm_a1)
    assert torch.allclose(found["a1"], raw / raw.mean())


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 10, 3), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 2, 1),
    )  # fmt: skip
    return with_norms(model, **{"1": ([1.0] * 10, [2.0] * 10), "4": ([1.0] * 10, [-2.0] * 10)})


@pytest.mark.parametrize(("floor", "left"), [(0.1, 1), (0.3, 3), (0.0, 1)])
def test_a_group_keeps_its_floor(floor, left):
    # every channel of the second layer is worth less than any of the first
    method = BNImportance(Budget(0.55, of="units"), floor=floor)
    plan = method.plan_for(trace(two_layers(), X))
    assert {name: kept for name, (kept, _) in plan.groups.items()} == {"0": 11 - left, "3": left}


def test_ranks_all_layers_together_or_each_alone():
    keep = Budget(0.5, of="units")
    together = BNImportance(keep, floor=0.2).plan_for(trace(two_layers(), X))
    alone = BNImportance(keep, scope="uniform").plan_for(trace(two_layers(), X))
    assert [kept for kept, _ in together.groups.values()] == [8, 2]
    assert [kept for kept, _ in alone.groups.values()] == [5, 5]


def test_needs_no_data_and_plans_without_a_trainer(residual):
    assert BNImportance.needs == "nothing"
    plan = lightning_prune.plan(trace(residual, X), method="bn_importance", budget=0.8)
    assert not plan.is_empty


def compensation(model, keep, x=X, **settings):
    """What `absorb_means` adds where a group loses channels."""
    graph = trace(model, x)
    method = BNImportance(0.9, absorb_means=True, **settings)
    method.check(graph)
    with torch.no_grad(), method._event(None, model):
        return method.compensate(keep)


def test_means_that_go_are_added_to_the_reader_s_bias():
    model = plain()
    keep = torch.tensor([True, False, True, False])
    shifts = compensation(model, {"0": keep}).shifts
    means = score_of(model[1])  # of a rectified Gaussian mean and magnitude are one
    expected = (model[3].weight.double().sum((2, 3)) * means).detach()[:, ~keep].sum(dim=1)
    assert list(shifts) == ["3.bias"]
    assert torch.allclose(shifts["3.bias"], expected)


def test_means_that_go_are_taken_off_the_running_mean_of_the_norm_behind_the_reader(residual):
    keep = torch.tensor([True, False, True, True, False])
    residual.a2.bias = None
    shifts = compensation(residual, {"a1": keep}).shifts
    means = score_of(residual.norm_a1)
    expected = (residual.a2.weight.double().sum((2, 3)) * means).detach()[:, ~keep].sum(dim=1)
    assert list(shifts) == ["norm_a2.running_mean"]
    assert torch.allclose(shifts["norm_a2.running_mean"], -expected)


def test_means_behind_a_flatten_and_in_front_of_conv_groups():
    torch.manual_seed(0)
    model = randomised(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))
    )
    keep = torch.tensor([False, True, True])
    shifts = compensation(model, {"0": keep}).shifts
    expected = model[4].weight.double()[:, :16].sum(dim=1) * score_of(model[1])[0]
    assert torch.allclose(shifts["4.bias"], expected.detach())
    grouped = randomised(Concatenated())
    shifts = compensation(grouped, {"join": keep}, (X, torch.randn(2, 2, 6, 6))).shifts
    said = score_of(grouped.norm)[[0, 3]]  # channel 0 of each conv group
    expected = grouped.grouped.weight.double()[:, 0, 0, 0] * said.repeat_interleave(2)
    assert torch.allclose(shifts["grouped.bias"], expected.detach())


def test_means_of_a_stream_are_those_at_each_reader(residual):
    keep = torch.tensor([True, False, True, True])
    shifts = compensation(residual, {"stem": keep}, coupled="sum").shifts
    before = moments(residual.norm0.bias, residual.norm0.weight.abs(), RELU)
    variance = before.deviation.square() + residual.norm_a2.weight.double().square()
    behind = moments(before.mean + residual.norm_a2.bias, variance.sqrt(), RELU)
    assert set(shifts) == {"a1.bias", "b1.bias", "down.bias"}
    for name, mean in {"a1": before.mean, "b1": behind.mean, "down": behind.mean}.items():
        weight = residual.get_submodule(name).weight.double().sum((2, 3))
        assert torch.allclose(shifts[f"{name}.bias"], (weight[:, 1] * mean[1]).detach())


def test_absorbed_means_bring_the_output_back_where_the_assumption_holds():
    # Gaussian input of a linear layer and its norm: the mean of what the removed units said is what is added
    torch.manual_seed(0)
    x = torch.randn(20_000, 6)
    model = randomised(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[1].momentum = 1.0
        model.train()(x)
        model.eval()
        before = model(x).mean(dim=0)
    keep = torch.tensor([True] * 5 + [False] * 3)
    errors = []
    for given in (False, True):
        cut = copy.deepcopy(model)
        if given:
            compensation(cut, {"0": keep}, x[:8]).apply(cut)
        graph = trace(cut, x[:8])
        lightning_prune.cut(cut, graph.plan({"0": keep}), graph=graph, absorb=False)
        with torch.no_grad():
            errors.append((cut(x).mean(dim=0) - before).abs().max().item())
    assert errors[1] < 0.03 * errors[0]


@pytest.mark.parametrize("apply", ["cut", "mask"])
def test_means_are_absorbed_once_over_several_events(fit, tiny_net, with_random_norms, apply):
    class Same(tiny_net):
        """Neither weights nor running statistics move while it trains."""

        def __init__(self):
            super().__init__()
            with_random_norms(self)
            self.norm0.momentum = self.norm1.momentum = self.norm2.momentum = 0.0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    pl.seed_everything(0, verbose=False)
    model = Same()
    dense = copy.deepcopy(model)
    callback = BNImportance(
        0.5, absorb_means=True, apply=apply, schedule=Iterative(start=1, end=4, every=3, unit="step")
    )  # fmt: skip
    fit(callback, model=model)
    assert [row["prune/channels/conv1"] for row in callback.report.rows] == [8, 5]
    assert callback.absorb is False
    said = (dense.conv2.weight.double().sum((2, 3)) * score_of(dense.norm1)).detach()
    plan = callback.plan
    kept = (
        plan.kept["conv1.weight"][0] if apply == "cut" else plan.masks["conv1.weight"].flatten(1).any(1).nonzero()[:, 0]
    )
    gone = torch.ones(12, dtype=torch.bool).index_fill(0, kept, False)
    assert len(kept) == 5
    moved = model.norm2.running_mean - dense.norm2.running_mean
    assert torch.allclose(moved, -said[:, gone].sum(dim=1).float(), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functional": "max"}, "functional must be one of 'mean_abs', 'second_moment', 'std', got 'max'"),
        ({"coupled": "all"}, "coupled must be one of 'skip', 'sum', got 'all'"),
        ({"normalize": "max"}, "normalize must be None or 'layer_mean', got 'max'"),
        ({"floor": 1.0}, r"floor must be a fraction in \[0, 1\), got 1.0"),
        ({"absorb_means": True, "absorb": 0.1}, "absorb_means=True adds the constants that absorb= would add"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BNImportance(0.5, **settings)
