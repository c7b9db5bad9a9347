from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, Iterative, IterativeImportance, L1Filter, OneShot
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.methods.iterative_importance import (
    _kernels,
    _spread,
    kernel_importance,
    linear_importance,
    signal_score,
)
from tests.nets import NETS

AT_1 = OneShot(1, unit="step")


class Learner(pl.LightningModule):
    """Around any network: the mean square of its output, with a rate so small that nothing moves."""

    def __init__(self, net, lr=1e-12, metrics=()):
        super().__init__()
        self.net, self.lr, self.metrics = net, lr, list(metrics)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Judged(Learner):
    """Says one metric after the other on validation, one an epoch."""

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val/acc", self.metrics[self.current_epoch])


class Spy(IterativeImportance):
    """Keeps scores and masks of each event."""

    def scores(self, weights):
        self.seen = super().scores(weights)
        return self.seen

    def select(self, *args):
        masks = super().select(*args)
        self.masks = [*getattr(self, "masks", []), {name: mask.clone() for name, mask in masks.items()}]
        return masks


def loader(x, batch_size=4):
    return DataLoader(TensorDataset(x), batch_size)


def kept_by(importance, alpha):
    """Bool, by the rule itself: the fewest, largest first, that carry a share alpha."""
    return signal_score(torch.tensor([importance]))[0].gt(1 - alpha).int().tolist()


def mlp(*sizes):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.abs_()  # so that every unit fires where inputs are positive
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


def counts(callback):
    return {name: int(mask.sum()) for name, mask in callback.plan.masks.items()}


# the pure functions


def test_importance_is_the_mean_of_absolute_signals():
    x, w = torch.tensor([[1.0, 2.0, -1.0], [3.0, 0.0, 1.0]]), torch.tensor([[0.5, -1.0, 2.0]])
    # mean |x w| = (1, 1, 2), where |mean x w| = (1, 1, 0) would drop the strongest
    importance = linear_importance(w, x.abs().mean(dim=0))
    assert importance.tolist() == [[1, 1, 2]]
    # with the bias 0.25 the total is 4.25: a share of 0.9 is 3.825, which 2 + 1 + 1 carry
    assert kept_by([1.0, 1.0, 2.0, 0.25], 0.9) == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("importance", "alpha", "kept"),
    [
        ([5.0, 3.0, 1.5, 0.5], 0.8, [1, 1, 0, 0]),  # 8 of 10
        ([5.0, 3.0, 1.5, 0.5], 0.9, [1, 1, 1, 0]),  # 9.5
        ([5.0, 3.0, 1.5, 0.5], 0.99, [1, 1, 1, 1]),
        ([6.0, 3.0, 1.0, 0.0], 0.9, [1, 1, 0, 0]),  # just 9 is enough
        ([0.0, 1.0, 3.0, 6.0], 1.0, [0, 1, 1, 1]),  # one without a signal always goes
        ([1.0, 1.0, 1.0, 1.0], 0.9, [1, 1, 1, 1]),
        ([1.0, 1.0, 1.0, 1.0], 0.5, [0, 0, 1, 1]),  # of equal ones the lower index goes
        ([0.0, 0.0], 0.9, [0, 0]),
    ],
)
def test_fewest_connections_that_carry_the_share_are_kept(importance, alpha, kept):
    assert kept_by(importance, alpha) == kept


def test_scores_are_of_each_unit_on_its_own():
    importance = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    scores = signal_score(importance)
    assert torch.equal(signal_score(importance * torch.tensor([[1.0], [8], [0.25], [2], [64]])), scores)
    for row, score in zip(importance, scores, strict=True):
        order, total = row.argsort(descending=True), row.double().sum()
        stronger = torch.tensor([row.double()[order[:i]].sum() / total for i in range(20)])
        expected = 1 - stronger.double()
        expected[0] += row.max() / total
        assert torch.allclose(score[order], expected)


@pytest.mark.parametrize(("power", "value"), [(2, 64.0), (1, 16.0)])
def test_kernel_of_ones_on_a_padded_map_of_ones(power, value):
    # four taps at each of four positions: the Frobenius norm of 4, 4, 4, 4 is 8
    found = kernel_importance(torch.ones(1, 1, 3, 3), torch.ones(1, 2, 2), "conv2d", power, padding=1)
    assert found.tolist() == [[value]]


def test_absolute_values_are_taken_inside_of_the_convolution():
    kernel, flat = torch.tensor([[[[1.0, -1.0]]]]), torch.ones(1, 1, 5)
    assert F.conv2d(flat[None], kernel).abs().sum() == 0
    assert kernel_importance(kernel, flat, "conv2d", 1).item() == 8


def test_kernel_of_one_weight_on_one_position_is_a_linear_layer():
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 4, generator=generator).double(), torch.rand(4, generator=generator).double()
    found = kernel_importance(w[..., None, None], x[:, None, None], "conv2d", 2).sqrt()
    assert torch.allclose(found, linear_importance(w, x))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    ("name", "ins", "outs", "settings"),
    [
        ("conv2d", 4, 6, {"stride": 2, "padding": 1}),
        ("conv2d", 4, 6, {"padding": "same", "dilation": 2, "groups": 2}),
        ("conv2d", 4, 8, {"groups": 4}),
        ("conv1d", 3, 5, {"stride": (2,)}),
        ("conv3d", 2, 3, {"padding": (0, 1, 1)}),
        ("conv_transpose2d", 4, 6, {"stride": 2, "output_padding": 1, "groups": 2}),
    ],
)
def test_kernel_importance_is_what_a_loop_over_kernels_says(name, ins, outs, settings, power, monkeypatch):
    monkeypatch.setattr("lightning_prune.methods.iterative_importance._AT_ONCE", 1000)  # in several parts
    generator, space = torch.Generator().manual_seed(0), 3 if "3d" in name else 1 if "1d" in name else 2
    groups = settings.get("groups", 1)
    kernels = torch.randn(outs, ins // groups, *[3] * space, generator=generator).double()
    maps = torch.rand(ins, *[7] * space, generator=generator).double()
    rest = {key: value for key, value in settings.items() if key != "groups"}
    found = kernel_importance(kernels, maps, name, power, **settings)
    for k in range(outs):
        for c in range(ins // groups):
            read = maps[k // (outs // groups) * (ins // groups) + c]
            one = getattr(F, name)(read[None, None], kernels[k, c].abs()[None, None], **rest)
            assert found[k, c].item() == pytest.approx(one.pow(power).sum().item())


def test_kernels_of_a_transposed_convolution_are_those_of_its_outputs():
    weight = torch.arange(4 * 3 * 2).reshape(4, 3, 2).float()  # two groups: (in, out / groups, taps)
    kernels, table = _kernels(weight, True, 2), torch.arange(12).reshape(6, 2)
    spread = _spread(table, weight, True, 2)
    for made in range(6):
        for read in range(2):
            place = (made // 3 * 2 + read, made % 3)
            assert torch.equal(kernels[made, read], weight[place])
            assert (spread[place] == table[made, read]).all()
    assert torch.equal(_kernels(weight, False, 2), weight)


# a fit


def expected_scores(model, x, spatial="frobenius"):
    """name -> scores of kernels and weights, from inputs that hooks see in eval mode, before anything went."""
    inputs, out = {}, {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, module in layers.items():
        module.register_forward_hook(lambda m, args, made, name=name: inputs.update({name: (args[0], made)}))
    with torch.no_grad():
        model.eval()(x)
    for name, module in layers.items():
        read, made = inputs[name]
        mean, weight = read.abs().mean(dim=0).double(), module.weight.detach().double()
        if isinstance(module, nn.Linear):
            importance, places = weight.abs() * mean, 1.0
        else:
            maps = [
                [F.conv2d(mean[c][None, None], w.abs()[None, None], None, module.stride, module.padding)[0, 0]
                 for c, w in enumerate(kernels)] for kernels in weight
            ]  # fmt: skip
            places = float(made[0, 0].numel())
            importance = torch.tensor([[(m.norm() if spatial == "frobenius" else m.sum()) for m in r] for r in maps])
        if module.bias is not None:
            factor = places**0.5 if spatial == "frobenius" else places
            importance = torch.cat([importance, module.bias.detach().double().abs()[:, None] * factor], dim=1)
        scores = signal_score(importance)
        out[f"{name}.weight"] = scores[:, : weight.shape[1]]
    return out


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 2, stride=2)
        self.hidden, self.fc = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))


def images():
    torch.manual_seed(0)
    return Images(), torch.randn(12, 2, 6, 6) + 0.5


@pytest.mark.parametrize("spatial", ["frobenius", "sum"])
def test_scores_of_a_fit_are_what_a_loop_says_whatever_the_batch_size(fit, spatial):
    for batch_size in (12, 5, 1):
        net, x = images()
        expected = expected_scores(net, x, spatial)
        net, _ = images()
        callback = Spy(0.5, schedule=OneShot(0), samples=12, spatial=spatial)
        fit(callback, Learner(net), loader(x, batch_size), max_epochs=1)
        for name, scores in expected.items():
            found = callback.seen[f"net.{name}"]
            found = found.flatten(2).amax(dim=2) if found.ndim > 2 else found
            found = torch.where(found > 2, found - 4, found)  # the output's guard
            assert torch.allclose(found, scores, rtol=1e-5), name


def test_all_weights_of_a_kernel_go_together_but_for_one_kernel(fit, tiny_net):
    callback = IterativeImportance(0.3, schedule=AT_1, ignore=["hidden", "fc"])
    fit(callback)
    parts = 0
    for mask in callback.plan.masks.values():
        share = mask.double().flatten(2).mean(dim=2)
        parts += int(((share > 0) & (share < 1)).sum())
    assert parts <= 1
    assert {name.partition(".")[0] for name in callback.plan.masks} == {"stem", "conv1", "conv2"}


@pytest.mark.parametrize("keep", [0.55, 0.6, 0.65, 0.7])
def test_largest_weights_stay_of_the_kernel_that_is_paid_for_in_part(fit, keep):
    net, x = images()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    callback = IterativeImportance(keep, schedule=OneShot(0), ignore=["net.hidden", "net.fc"], samples=12)
    fit(callback, Learner(net), loader(x), max_epochs=1)
    split = []
    for name, mask in callback.plan.masks.items():
        weight = before[name.removeprefix("net.")].abs()
        split += [
            (kernel, kept)
            for kernel, kept in zip(weight.flatten(0, 1), mask.flatten(0, 1), strict=True)
            if 0 < kept.sum() < kept.numel()
        ]
    ((kernel, kept),) = split
    assert kernel[kept].min() > kernel[~kept].max()


def test_budget_is_met_with_one_share_of_the_signal_for_all_units(fit):
    def run(*args, **settings):
        callback = Spy(*args, schedule=OneShot(0), samples=12, **settings)
        torch.manual_seed(1)
        fit(callback, Learner(mlp(6, 10, 10, 4)), loader(x), max_epochs=1)
        return callback

    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    by_share = run(alpha=0.8)
    total = sum(mask.numel() for mask in by_share.plan.masks.values())
    by_budget = run(Budget(sum(counts(by_share).values()) / total))
    assert 0.3 * total < sum(counts(by_share).values()) < 0.7 * total
    assert by_budget.plan == by_share.plan
    assert sum(counts(run(alpha=0.95)).values()) > sum(counts(by_share).values()) > sum(counts(run(alpha=0.5)).values())


def test_linear_layers_have_a_share_of_their_own(fit):
    kept = {}
    for alpha_linear in (0.5, 0.99):
        net, x = images()
        callback = IterativeImportance(alpha=0.7, alpha_linear=alpha_linear, schedule=OneShot(0), samples=12)
        fit(callback, Learner(net), loader(x), max_epochs=1)
        kept[alpha_linear] = counts(callback)
    assert kept[0.5]["net.hidden.weight"] < kept[0.99]["net.hidden.weight"]
    assert callback.alpha_linear == 0.99
    assert IterativeImportance(alpha=0.7).alpha_linear == 0.7


def test_unit_that_nothing_reads_loses_its_incoming_weights_and_nothing_else_changes(fit):
    torch.manual_seed(0)
    net = mlp(6, 8, 8, 4)
    with torch.no_grad():
        net[4].weight[:, 3] = 1e-9  # nobody will listen to unit 3 of the second layer
        net[2].weight[3] = 5.0
        net[2].bias[3] = 20.0
    x = torch.randn(12, 6).abs()
    callback = IterativeImportance(alpha=0.9, schedule=AT_1, samples=12, include=["net.2.bias"])
    trainer = fit(callback, Learner(net), loader(x), max_epochs=1)
    assert not callback.plan.masks["net.2.bias"][3]
    assert not callback.plan.masks["net.4.weight"][:, 3].any()
    assert not callback.plan.masks["net.2.weight"][3].any()
    assert callback.plan.masks["net.2.weight"].any(dim=1).sum() >= 6
    model = trainer.lightning_module.net
    before = model(x)
    with torch.no_grad():
        model[2].bias[3] = 100.0  # whatever it says
    assert torch.equal(model(x), before)


def test_what_unread_units_free_is_spent_on_others(fit):
    def run():
        torch.manual_seed(0)
        net = mlp(6, 8, 8, 4)
        with torch.no_grad():
            net[4].weight[:, :5] = 1e-9
        callback = IterativeImportance(0.4, schedule=AT_1, samples=12)
        fit(callback, Learner(net), loader(torch.randn(12, 6).abs()), max_epochs=1)
        return callback

    callback = run()
    masks = callback.plan.masks
    assert sum(counts(callback).values()) == int(0.4 * (48 + 64 + 32))
    assert not masks["net.2.weight"][:5].any()
    assert not masks["net.4.weight"][:, :5].any()


def test_unit_that_never_fires_goes_first(fit):
    net = mlp(6, 8, 8, 4)
    with torch.no_grad():
        net[2].bias[3] = -1000.0
    callback = IterativeImportance(Budget(132.5 / 144), schedule=AT_1, samples=12)
    fit(callback, Learner(net), loader(torch.randn(12, 6).abs()), max_epochs=1)
    masks = callback.plan.masks
    assert sum(counts(callback).values()) == 132  # the 12 that go: all that it reads, and all that reads it
    assert not masks["net.2.weight"][3].any()
    assert not masks["net.4.weight"][:, 3].any()


def test_unit_that_nothing_reads_makes_up_what_little_has_to_go(fit):
    net = mlp(6, 8, 8, 4)
    with torch.no_grad():
        net[4].weight[:, 3] = 1e-9
    callback = IterativeImportance(Budget(137.5 / 144), schedule=AT_1, samples=12)
    fit(callback, Learner(net), loader(torch.randn(12, 6).abs()), max_epochs=1)
    masks = {name: mask.clone() for name, mask in callback.plan.masks.items()}
    assert not masks["net.4.weight"][:, 3].any()
    masks["net.2.weight"][3] = masks["net.4.weight"][:, 3] = True
    assert sum(counts(callback).values()) == 137
    assert all(mask.all() for mask in masks.values())


def test_every_output_keeps_a_connection_first_of_all(fit):
    # each of 20 hidden units has one of two connections with half of its signal or more, an output one with 1 / 20
    net = mlp(2, 20, 6)
    nn.init.zeros_(net[0].bias)
    callback = IterativeImportance(0.05, schedule=AT_1, samples=12)
    fit(callback, Learner(net), loader(torch.randn(12, 2).abs()), max_epochs=1)
    assert counts(callback) == {"net.0.weight": 2, "net.2.weight": 6}
    assert callback.plan.masks["net.2.weight"].any(dim=1).all()


def test_unit_that_a_layer_left_whole_reads_stays(fit):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.other = mlp(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
            with torch.no_grad():
                self.one.weight[:, 3] = 1e-9

        def forward(self, x):
            x = F.relu(self.body(x))
            return torch.cat([self.one(x), self.other(x)], dim=1)

    kept = {}
    for ignore in ([], ["net.other"]):
        net = Both()
        with torch.no_grad():
            net.other.weight[:, 3] = 1e-9
        callback = IterativeImportance(alpha=0.9, schedule=AT_1, samples=12, ignore=ignore)
        fit(callback, Learner(net), loader(torch.randn(12, 6).abs()), max_epochs=1)
        assert not callback.plan.masks["net.one.weight"][:, 3].any()
        kept[bool(ignore)] = bool(callback.plan.masks["net.body.0.weight"][3].any())
    assert kept == {False: False, True: True}


def test_layer_that_nothing_reads_yet_is_not_given_up(fit):
    net = mlp(6, 8, 8, 4)
    nn.init.constant_(net[2].bias, 1e6)  # beside it all that the second layer reads is too little to be paid for
    callback = IterativeImportance(0.2, schedule=AT_1, samples=12)
    fit(callback, Learner(net), loader(torch.randn(12, 6).abs()), max_epochs=1)
    assert counts(callback)["net.2.weight"] == 0
    assert counts(callback)["net.0.weight"] > 0


class Residual(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.last = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.norm, self.fc, self.inplace = nn.BatchNorm2d(4), nn.Linear(4, 3), inplace

    def forward(self, x):
        x = F.relu(self.stem(x))
        u = self.norm(self.last(F.relu(self.inner(x))))
        if self.inplace:
            u += x
        else:
            u = x + u
        return self.fc(F.relu(u).mean((2, 3)))


@pytest.mark.parametrize("inplace", [True, False])
def test_filter_goes_whose_part_in_a_residual_sum_is_small(fit, inplace):
    net = Residual(inplace)
    net.eval()
    x = torch.randn(12, 2, 4, 4).abs()
    with torch.no_grad():
        net.stem.bias[:] = 5.0
        net.norm.weight[1] = 1e-3
        stem = F.relu(net.stem(x))
        u = net.norm(net.last(F.relu(net.inner(stem))))
    small, other = (m.abs().mean(dim=0).double().flatten(1).norm(dim=1) for m in (u, stem))
    limits = small / (small + other)
    net.train()
    callback = Spy(alpha=0.95, schedule=OneShot(0), samples=12)
    fit(callback, Learner(net), loader(x), max_epochs=1)
    # nu / nr below (1 - alpha) / alpha = 0.0526 is a share below 0.05
    assert limits[1] < 0.05 < limits[[0, 2, 3]].min()
    for row, limit in zip(callback.seen["net.last.weight"].flatten(1), limits, strict=True):
        assert row.max().item() == pytest.approx(limit.item(), rel=1e-4)
    assert callback.plan.masks["net.last.weight"].flatten(1).any(dim=1).tolist() == [True, False, True, True]


def test_residual_sum_of_linear_layers_over_positions(fit):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.last, self.fc = nn.Linear(2, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.fc(F.relu(x + self.last(x)).mean(1))

    net, x = Tokens(), torch.randn(12, 4, 2).abs()
    with torch.no_grad():
        net.stem.bias[:] = 5.0
        stem = F.relu(net.stem(x))
        small, other = (m.abs().mean(dim=0).double().norm(dim=0) for m in (net.last(stem), stem))
        best = signal_score(net.last.weight.double().abs() * stem.double().abs().mean((0, 1))).amax(dim=1)
    callback = Spy(0.5, schedule=OneShot(0), samples=12)
    fit(callback, Learner(net), loader(x), max_epochs=1)
    limits = torch.where(small < other, small / (small + other), torch.inf)
    assert limits.isfinite().any()
    assert torch.allclose(callback.seen["net.last.weight"].amax(dim=1), torch.minimum(best, limits), rtol=1e-4)


def test_masks_only_lose_and_zeros_stay_zeros(fit):
    callback = Spy(0.2, samples=32, schedule=Iterative(start=1, end=5, events=3, unit="step"))
    trainer = fit(callback)
    assert len(callback.masks) == 3
    for earlier, later in zip(callback.masks, callback.masks[1:], strict=False):
        assert not any((later[name] & ~earlier[name]).any() for name in earlier)
    for name, mask in callback.masks[-1].items():
        assert not trainer.lightning_module.get_parameter(name)[~mask].any()


def test_layers_the_method_does_not_know_stay_whole_and_say_why(fit):
    torch.manual_seed(0)
    net = NETS["lstm"].build()
    callback = IterativeImportance(0.95, schedule=AT_1, samples=8)
    fit(callback, Learner(net), loader(NETS["lstm"].inputs(8)), max_epochs=1)
    assert sorted(callback.plan.masks) == ["net.fc.weight", "net.inner.weight"]
    assert "lstm() reads it" in callback.report.frozen["net.rnn.weight_ih_l0"]
    with pytest.raises(UnmeetableBudget, match=r"net\.rnn\.weight_hh_l0: lstm\(\) reads it, whose connections"):
        fit(IterativeImportance(0.5), Learner(net), loader(NETS["lstm"].inputs(8)), max_epochs=1)


def test_weights_that_are_computed_anew_stay_whole(fit):
    torch.manual_seed(0)
    example = NETS["weight_norm"]
    callback = IterativeImportance(0.995, schedule=AT_1, samples=8)
    plain = nn.Conv2d(3, 3, 1)
    fit(callback, Learner(nn.Sequential(plain, example.build())), loader(example.inputs(8)), max_epochs=1)
    assert list(callback.plan.masks) == ["net.0.weight"]


def test_bias_takes_part_in_the_sum_and_goes_only_if_it_is_named(fit):
    def run(**settings):
        net, x = images()
        with torch.no_grad():
            net.hidden.bias[:] = torch.tensor([100.0, *7 * [1e-6]])
        callback = Spy(alpha=0.9, schedule=OneShot(0), samples=12, **settings)
        fit(callback, Learner(net), loader(x), max_epochs=1)
        return callback

    plain, named = run(), run(include=["net.hidden.bias"])
    assert "net.hidden.bias" not in plain.plan.masks
    # beside that bias no connection of the first unit carries a tenth
    assert not plain.plan.masks["net.hidden.weight"][0].any()
    assert named.plan.masks["net.hidden.bias"].tolist() == [True] + 7 * [False]
    with pytest.raises(ValueError, match=r"'norm1\.weight' is none, take it out of include="):
        fit(IterativeImportance(0.5, include=["norm1.weight"]))


def test_shared_layer_adds_up_over_its_calls(fit):
    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(2, 2, 1, bias=False)
            self.fc = nn.Linear(2, 3)
            self.shared = shared

        def forward(self, x):
            y = self.conv(x)
            if self.shared:
                y = y + self.conv(3 * x.flip(1))
            return self.fc(y.mean((2, 3)))

    seen = {}
    x = torch.randn(8, 2, 4, 4)
    for shared in (False, True):
        callback = Spy(0.5, schedule=OneShot(0), samples=8)
        net = Twice(shared)
        weight = net.conv.weight.detach().double().flatten(1).abs()
        fit(callback, Learner(net), loader(x), max_epochs=1)
        seen[shared] = callback.seen["net.conv.weight"].flatten(1)
    norm = x.abs().mean(dim=0).double().flatten(1).norm(dim=1)
    both = (norm.square() + 9 * norm.flip(0).square()).sqrt()
    assert torch.allclose(seen[False], signal_score(weight * norm), rtol=1e-4)
    assert torch.allclose(seen[True], torch.minimum(signal_score(weight * both), seen[True]), rtol=1e-4)
    assert seen[True].argmax(dim=1).tolist() == (weight * both).argmax(dim=1).tolist()


def test_batches_that_are_not_finite_are_left_out(fit):
    net, x = images()
    x[3] = torch.nan
    other = x[[i for i in range(12) if i // 4]]
    runs = []
    for data in (x, other):
        net, _ = images()
        callback = Spy(0.5, schedule=OneShot(0), samples=12, calibration=loader(data))
        runs.append((callback, net))
    with pytest.warns(UserWarning, match="left 1 calibration batches out"):
        fit(runs[0][0], Learner(runs[0][1]), loader(other), max_epochs=1)
    fit(runs[1][0], Learner(runs[1][1]), loader(other), max_epochs=1)
    assert all(torch.equal(runs[0][0].seen[name], score) for name, score in runs[1][0].seen.items())
    callback = IterativeImportance(0.5, schedule=OneShot(0), calibration=loader(torch.full_like(x, torch.inf)))
    with pytest.raises(NonFiniteScore, match=r"of 3 calibration batches 3 were not finite"):
        fit(callback, Learner(net), loader(other), max_epochs=1)


def test_maps_of_several_sizes_are_refused(fit):
    class Sizes(Learner):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            return self(x[..., :4] if x[0, 0, 0, 0] < 0 else x).square().mean()

    net, x = images()
    x[:8, 0, 0, 0], x[8:, 0, 0, 0] = 1, -1
    callback = IterativeImportance(0.5, schedule=AT_1, samples=12, calibration=loader(x))
    with pytest.raises(ValueError, match=r"what goes into 'net\.first\.weight' is \(2, 6, 6\) at one time"):
        fit(callback, Sizes(net), loader(x), max_epochs=1)


def test_rewinding_puts_initial_values_back_with_fresh_state_and_the_learning_rate_goes_on(fit, tiny_net):
    class After(pl.Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
                self.state = list(trainer.optimizers[0].state.values())
                self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    class Falling(tiny_net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model, after = Falling(), After()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    callback = IterativeImportance(0.5, schedule=OneShot(3, unit="step"), rewind_to="init", samples=32)
    fit([callback, after], model=model)
    for name, value in after.weights.items():
        assert torch.equal(value, before[name] * callback.plan.masks.get(name, torch.tensor(True)))
    assert after.state == []
    assert after.lr == 0.05 / 8
    assert callback.steps == 8


ROUNDS = Iterative(start=4, end=12, events=3, unit="step")  # 4, 8 and 12, at the ends of epochs of 4 steps


def judged(fit, metrics, schedule=ROUNDS, callbacks=(), lr=1e-2, **settings):
    settings = {"alpha": 0.8, "tolerance": 0.05, "schedule": schedule, "samples": 16, **settings}
    callback = Spy(**settings)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    model = Judged(mlp(6, 8, 8, 4), lr=lr, metrics=metrics)
    trainer = fit([callback, *callbacks], model, loader(x), val=loader(x), max_epochs=len(metrics))
    return callback, trainer


def test_events_wait_for_validation_between_them(fit):
    callback, _ = judged(fit, [0.9] * 6)
    # validation follows the last step of an epoch, and its metric is known at the next one
    assert [row["step"] for row in callback.report.rows] == [5, 9, 13]
    assert callback.events_done == 3
    assert not callback._stopped


def test_event_that_costs_more_than_the_tolerance_is_taken_back(fit):
    class Weights(pl.Callback):
        def __init__(self):
            self.seen, self.momenta = {}, {}

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            self.seen[trainer.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}
            state = trainer.optimizers[0].state
            self.momenta[trainer.global_step] = {
                n: state[p]["momentum_buffer"].clone() for n, p in model.named_parameters() if p in state
            }

    # dense 0.9 is judged at step 5, 0.87 at step 9 is within 0.05; 0.8 at step 13 is not
    weights = Weights()
    callback, trainer = judged(fit, [0.9, 0.87, 0.8, 0.99, 0.99, 0.99], callbacks=[weights])
    assert len(callback.masks) == 2
    assert [row["step"] for row in callback.report.rows] == [5, 9, 13]
    assert all(torch.equal(callback.plan.masks[name], mask) for name, mask in callback.masks[0].items())
    assert sum(int(m.sum()) for m in callback.masks[1].values()) < sum(counts(callback).values())
    # back to what it was after step 9, before that event
    model = trainer.lightning_module
    for name, mask in callback.plan.masks.items():
        came_back = mask & ~callback.masks[1][name]
        assert not weights.seen[12][name][came_back].any()
        assert weights.seen[13][name][came_back].any() == came_back.any()
        assert not model.get_parameter(name)[~mask].any()
        stayed = callback.masks[1][name]
        assert torch.equal(weights.momenta[13][name][stayed], weights.momenta[9][name][stayed])
    assert not torch.equal(weights.seen[13]["net.0.weight"], weights.seen[20]["net.0.weight"])
    assert callback.regrown > 0


def test_nothing_is_pruned_any_more_after_an_event_was_taken_back(fit, save_each, tmp_path):
    metrics = [0.9, 0.8, 0.99, 0.99, 0.99, 0.99]
    callback, _ = judged(fit, metrics, callbacks=[save_each()])
    assert callback._stopped
    assert len(callback.masks) == 1
    assert [row["step"] for row in callback.report.rows] == [5, 9]
    assert callback.events_done == len(callback.events) == 2
    assert all(mask.all() for mask in callback.plan.masks.values())
    again = Spy(alpha=0.8, tolerance=0.05, schedule=ROUNDS, samples=16)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    model = Judged(mlp(6, 8, 8, 4), lr=1e-2, metrics=[*metrics, 0.99])
    with pytest.warns(UserWarning, match="the event at step 13 changed nothing"):  # of a longer fit
        fit(again, model, loader(x), val=loader(x), max_epochs=7, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert not hasattr(again, "masks")
    assert again.plan == callback.plan


def test_last_event_has_as_long_as_others_to_recover(fit):
    # 12 steps after it the 0.9 of step 20 is known, 5 steps after it the 0.1 of step 16 was
    metrics = [0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9]
    callback, _ = judged(fit, metrics, schedule=OneShot(12, unit="step"))
    assert not callback._stopped
    assert [row["step"] for row in callback.report.rows] == [12]


def test_last_event_is_judged_as_well(fit):
    callback, _ = judged(fit, [0.9, 0.1, 0.1, 0.1], schedule=OneShot(4, unit="step"))
    assert callback._stopped
    assert all(mask.all() for mask in callback.plan.masks.values())
    callback, _ = judged(fit, [0.9, 0.9, 0.1, 0.1], schedule=OneShot(4, unit="step"))
    assert not callback._stopped  # it was, after 9 steps
    assert not all(mask.all() for mask in callback.plan.masks.values())


def test_smaller_is_better_where_the_metric_is_a_loss(fit):
    better, _ = judged(fit, [0.9, 0.1, 0.1, 0.1], schedule=OneShot(4, unit="step"), mode="min")
    worse, _ = judged(fit, [0.9, 0.96, 0.1, 0.1], schedule=OneShot(4, unit="step"), mode="min")
    assert (better._stopped, worse._stopped) == (False, True)


def test_metric_that_is_not_a_number_is_worse(fit):
    callback, _ = judged(fit, [0.9, float("nan"), 0.9, 0.9], schedule=OneShot(4, unit="step"))
    assert callback._stopped


def test_too_late_to_go_back_is_said(fit):
    with pytest.warns(UserWarning, match=r"val/acc ends at 0\.1000, more than 0\.05 worse than 0\.9000"):
        judged(fit, [0.9, 0.1], schedule=OneShot(4, unit="step"))


def test_metric_that_is_not_logged_is_an_error(fit):
    with pytest.raises(RuntimeError, match="'nothing' is not among the metrics of validation; there are prune/"):
        judged(fit, [0.9, 0.9], monitor="nothing", schedule=AT_1)


def test_fit_that_goes_on_still_knows_what_to_go_back_to(fit, save_each, tmp_path):
    metrics = [0.9, 0.87, 0.8, 0.99, 0.99, 0.99]
    whole, trainer = judged(fit, metrics, callbacks=[save_each()])
    resumed = Spy(alpha=0.8, tolerance=0.05, schedule=ROUNDS, samples=16)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    model = Judged(mlp(6, 8, 8, 4), lr=1e-2, metrics=metrics)
    again = fit(resumed, model, loader(x), val=loader(x), max_epochs=6, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed._stopped
    assert not hasattr(resumed, "masks")
    assert resumed.plan == whole.plan
    for first, second in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_masks_follow_a_cut_but_earlier_weights_could_not(fit):
    settings = {"schedule": OneShot(2, unit="step"), "samples": 32}
    callback, cut = IterativeImportance(0.6, **settings), L1Filter(Budget(0.6), schedule=OneShot(4, unit="step"))
    model = fit([callback, cut]).lightning_module
    assert model.conv1.weight.shape[0] < 12
    assert 0 < int(model.conv1.weight.count_nonzero()) < model.conv1.weight.numel()
    for more in ({"rewind_to": "init"}, {"tolerance": 0.1, "alpha": 0.9}):
        budget = None if "alpha" in more else 0.6
        with pytest.raises(RuntimeError, match="go back to earlier weights"):
            fit([IterativeImportance(budget, **settings, **more), L1Filter(0.6)])


def test_an_event_after_a_cut_looks_at_the_network_as_it_is(fit):
    callback = Spy(0.3, schedule=Iterative(start=2, end=6, events=2, unit="step"), samples=32)
    trainer = fit([callback, L1Filter(Budget(0.6), schedule=OneShot(4, unit="step"))])
    model = trainer.lightning_module
    assert callback.seen["conv1.weight"].shape == model.conv1.weight.shape
    assert model.conv1.weight.shape[0] < 12


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        ((), {}, "give either a budget, or alpha="),
        ((0.5,), {"alpha": 0.9}, "give either a budget, or alpha="),
        ((), {"alpha": 1.0}, r"alpha must be in \(0, 1\), got 1.0"),
        ((), {"alpha": 0.9, "alpha_linear": 0}, r"alpha_linear must be in \(0, 1\), got 0"),
        ((0.5,), {"tolerance": 0.1}, "go with alpha="),
        ((), {"alpha": 0.9, "tolerance": -0.1}, "tolerance must be at least 0, got -0.1"),
        ((0.5,), {"samples": 0}, "samples must be an int of at least 1, got 0"),
        ((0.5,), {"spatial": "max"}, "spatial must be one of"),
        ((0.5,), {"rewind_to": "start"}, "rewind_to must be one of 'init', got 'start'"),
        ((), {"alpha": 0.9, "mode": "up"}, "mode must be one of"),
    ],
)
def test_bad_arguments_are_refused(args, settings, message):
    with pytest.raises(ValueError, match=message):
        IterativeImportance(*args, **settings)
