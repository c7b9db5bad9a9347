import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import lightning_prune
from lightning_prune import Budget, Iterative, NetworkSlimming, OneShot, Schedule, trace
from lightning_prune.errors import NothingToPrune, UnmeetableBudget
from lightning_prune.methods.network_slimming import network_slimming_score, penalty_gradient

X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
SIGNS = [0.5, -0.5, 0.0]


class Still(pl.LightningModule):
    """Two norms and no loss: whatever moves, the penalty moved it, or weight decay."""

    def __init__(self, momentum=0.0, weight_decay=0.0, scales=SIGNS):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.last, self.out = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)
        self.settings = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor(scales))

    def forward(self, x):
        return self.out(self.last(F.relu(self.norm(self.conv(x)))))

    def training_step(self, batch, batch_idx):
        return 0 * self(batch[0]).float().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.settings)


class Scales(Callback):
    """What a norm's scales are after each batch, the callback before it included."""

    def __init__(self, name="norm"):
        self.name, self.seen = name, []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.seen.append(model.get_submodule(self.name).weight.tolist())


def scales_of(fit, model, callback, **settings):
    """Scales after each batch of two epochs of four."""
    watch = Scales()
    fit([callback, watch], model=model, **settings)
    return watch.seen


def late(**settings):
    """Prunes in front of the last of eight steps."""
    return NetworkSlimming(
        Budget(0.67, of="units"), **{"schedule": OneShot(7, unit="step"), "penalty": 0.01, **settings}
    )


def with_scales(model, **scales):
    """Give norms these scales, and shifts of all kinds."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for name, values in scales.items():
            model.get_submodule(name).weight.copy_(torch.tensor(values))
    return model


def scores(model, x=X, **settings):
    return NetworkSlimming(0.99, **settings).scores_for(trace(model, x))


def frozen(model, x=X, **settings):
    method = NetworkSlimming(1.0, **settings)
    method.check(trace(model, x))
    return method.report.frozen


# --- the penalty ----------------------------------------------------------------------------------------------------


def test_subgradient_is_the_sign_and_nothing_at_zero():
    assert penalty_gradient(torch.tensor([0.5, -0.5, 0.0]), 0.01).tolist() == pytest.approx([0.01, -0.01, 0.0])


def test_one_step_moves_scales_by_learning_rate_times_penalty(fit):
    model = Still()
    before = copy.deepcopy(model.state_dict())
    seen = scales_of(fit, model, late())
    # 0.5 - 0.1 * 0.01; the whole penalty's mean over three channels would move it by a third of that
    assert seen[0] == pytest.approx([0.499, -0.499, 0.0], abs=1e-7)
    assert seen[1] == pytest.approx([0.498, -0.498, 0.0], abs=1e-7)
    after = model.state_dict()
    assert torch.equal(after["out.weight"], before["out.weight"])  # it decides about no channel that may go
    assert after["norm.bias"].tolist() == [0.0, 0.0]


def test_momentum_sees_the_penalty_as_part_of_the_gradient(fit):
    seen = scales_of(fit, Still(momentum=0.9), late())
    # 0.5 - 0.001 - (0.9 * 0.001 + 0.001)
    assert seen[1][0] == pytest.approx(0.4971, abs=1e-7)


def test_accumulated_batches_are_one_step(fit):
    seen = scales_of(fit, Still(), late(schedule=OneShot(1, unit="step")), accumulate_grad_batches=4)
    assert seen[2] == SIGNS
    assert seen[3][:1] == pytest.approx([0.499], abs=1e-7)  # not 0.5 - 4 * 0.001


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scale_leaves_the_penalty_alone(fit, fused):
    class Fused(Still):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    seen = scales_of(fit, Fused(), late(), plugins=[precision])
    assert seen[0] == pytest.approx([0.499, -0.499, 0.0], abs=1e-7)


def test_clipping_comes_after_the_penalty(fit):
    seen = scales_of(fit, Still(), late(penalty=1.0), gradient_clip_val=1.0)
    # the gradient (1, -1, 0) is clipped to length 1
    assert seen[0] == pytest.approx([0.5 - 0.1 / 2**0.5, -0.5 + 0.1 / 2**0.5, 0.0], abs=1e-5)


def test_with_two_optimizers_each_scale_is_penalised_once(fit):
    class Two(Still):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second):
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            first.step()
            second.step()

        def configure_optimizers(self):
            norm = list(self.norm.parameters())
            rest = [p for p in self.parameters() if all(p is not n for n in norm)]
            return [torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(norm, lr=0.1)]

    seen = scales_of(fit, Two(), late())
    assert seen[0] == pytest.approx([0.499, -0.499, 0.0], abs=1e-7)


def test_frozen_scales_stay_and_still_decide(fit):
    model = Still()
    model.norm.weight.requires_grad_(False)
    seen = scales_of(fit, model, late())
    assert seen[0] == SIGNS
    assert model.norm.weight.tolist() == [0.5, -0.5]


def test_nothing_is_penalised_after_the_last_event(fit):
    callback = NetworkSlimming(
        Budget(0.4, of="units"), penalty=0.01, schedule=Iterative(start=2, end=4, events=2, unit="step")
    )
    seen = scales_of(fit, Still(scales=[0.5, -0.9, 0.1]), callback)
    assert [len(scales) for scales in seen] == [3, 2, 2, 1, 1, 1, 1, 1]
    # in front of both events, and between them; then it stays to the bit
    assert seen[3] == pytest.approx([-0.896], abs=1e-6)
    assert seen[4:] == [seen[3]] * 4


def test_a_fit_goes_on_as_if_it_had_not_stopped_where_a_layer_is_down_to_one_channel(fit, save_each, tmp_path):
    def callback():
        return NetworkSlimming(Budget(0.125, of="units"), penalty=0.01, schedule=Iterative(2, 6, events=2, unit="step"))

    whole, resumed = Wide(), Wide()
    for_epoch = callback()
    fit([for_epoch, save_each()], model=whole)
    assert counts(for_epoch) == [(1, 8), (1, 1)]
    fit(callback(), model=resumed, ckpt_path=tmp_path / "epoch=0.ckpt", seed=7)
    assert torch.equal(whole.norm.weight, resumed.norm.weight)
    assert torch.equal(whole.out.weight, resumed.out.weight)
    assert whole.norm.weight.item() == pytest.approx(0.107 - 2 * 0.001)


def test_an_ignored_layer_is_not_penalised(fit, tiny_net):
    class Plain(tiny_net):
        def training_step(self, batch, batch_idx):
            return 0 * self(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for ignore, moved in (((), 0.999), (["conv1"], 1.0)):
        watch = Scales("norm1")
        callback = late(coupled="mean", ignore=ignore, gamma_init=None)
        fit([callback, watch], model=Plain())
        assert watch.seen[0] == pytest.approx([moved] * 12, abs=1e-7)


def test_a_norm_over_several_layers_is_penalised_only_where_it_decides(fit):
    class Joined(Still):
        def __init__(self):
            super().__init__(scales=[0.5, -0.5, 0.7])
            self.conv, self.lone = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.last(F.relu(self.norm(torch.cat([self.conv(x), self.lone(x)], dim=1))))

    seen = scales_of(fit, Joined(), late(schedule=OneShot(1, unit="step")), accumulate_grad_batches=2)
    # a layer with a single channel keeps it
    assert seen[1] == pytest.approx([-0.499, 0.7], abs=1e-7)


def test_without_penalty_training_is_the_same_to_the_bit(fit, make_loader):
    class Before(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    runs = []
    for callbacks in ([], [late(penalty=0.0, gamma_init=None, schedule=OneShot(6, unit="step"))]):
        before = Before()
        fit([before, *callbacks], loader=make_loader(shuffle=True))
        runs.append(before.weights)
    assert [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])] == []


def test_a_budget_of_everything_changes_nothing(fit):
    with pytest.warns(UserWarning, match="changed nothing"):
        seen = scales_of(fit, Still(scales=[1.0] * 3), NetworkSlimming(1.0, penalty=0.1))
    assert seen == [[1.0] * 3] * 8  # neither a penalty nor a beginning at 0.5


def test_the_penalty_is_logged_until_the_last_event(fit):
    callback = late()
    rows = []

    class Rows(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            rows.append(callback._row()["prune/penalty/scales"])

    fit([callback, Rows()], model=Still())
    # 0.01 * (|0.499| + |-0.499| + 0)
    assert rows[0] == pytest.approx(0.00998)
    assert rows[-1] == 0


def test_channels_that_are_masked_stay_exactly_zero_while_the_rest_decays(fit):
    model = Still(momentum=0.9, weight_decay=0.01, scales=[0.5, -0.9, 0.1])
    model.norm.bias.data.fill_(0.3)
    callback = NetworkSlimming(Budget(0.67, of="units"), apply="mask", schedule=OneShot(3, unit="step"))
    fit(callback, model=model, max_epochs=14)
    assert callback.steps == 56
    assert model.norm.weight.tolist()[2] == model.norm.bias.tolist()[2] == 0.0
    assert 0 < model.norm.weight[0] < 0.5


# --- where scales begin ---------------------------------------------------------------------------------------------


def begin(fit, model, **settings):
    """Scales in front of the first step, by name."""
    found = {}

    class Start(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            found.setdefault("scales", {n: m.weight.tolist() for n, m in model.named_modules() if "norm" in n})

    fit([NetworkSlimming(0.6, **settings), Start()], model=model, max_epochs=1)
    return found["scales"]


def test_scales_of_norms_that_have_seen_no_batch_begin_at_a_half(fit, tiny_net):
    # norm0 and norm2 write the stream, which stays whole
    assert begin(fit, tiny_net()) == {"norm0": [1.0] * 6, "norm1": [0.5] * 12, "norm2": [1.0] * 6}
    assert begin(fit, tiny_net(), coupled="mean") == {"norm0": [0.5] * 6, "norm1": [0.5] * 12, "norm2": [0.5] * 6}
    assert begin(fit, tiny_net(), gamma_init=0.25)["norm1"] == [0.25] * 12
    assert begin(fit, tiny_net(), gamma_init=None)["norm1"] == [1.0] * 12


def test_scales_that_were_trained_or_chosen_stay(fit, tiny_net):
    trained, chosen = tiny_net(), tiny_net()
    trained(torch.randn(8, 1, 8, 8))  # in train mode: its statistics are its own now
    nn.init.constant_(chosen.norm1.weight, 0.1)
    without = tiny_net()
    without.norm1 = nn.BatchNorm2d(12, track_running_stats=False)  # cannot say
    assert begin(fit, trained)["norm1"] == [1.0] * 12
    assert begin(fit, chosen)["norm1"] == pytest.approx([0.1] * 12)
    assert begin(fit, without)["norm1"] == [1.0] * 12


def test_scales_are_not_set_again_when_a_fit_goes_on(fit, tiny_net, save_each, tmp_path):
    class Slow(tiny_net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def callback():
        return NetworkSlimming(0.6, schedule=OneShot(7, unit="step"), penalty=10.0)

    fit([callback(), save_each()], model=Slow())
    watch = Scales("norm1")
    fit([callback(), watch], model=Slow(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert watch.seen[0] == pytest.approx([0.5 - 5 * 0.01] * 12, abs=5e-3)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_a_negative_scale_counts_as_its_size():
    assert network_slimming_score(torch.tensor([[-0.9], [0.5]])).tolist() == pytest.approx([0.9, 0.5])


def chain(*widths):
    """Convolutions with norms, one after the other."""
    layers, before = [], 1
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Conv2d(before, 2, 1))


def kept(model, keep, **settings):
    """Group -> channels kept of a budget of units."""
    graph = trace(model, X)
    plan = NetworkSlimming(Budget(keep, of="units"), **settings).plan_for(graph)
    every = {group.name: torch.arange(group.size) for group in graph.groups}
    return {name: plan.kept.get(f"{name}.weight", {}).get(0, all_).tolist() for name, all_ in every.items()}


def test_exactly_the_budget_s_count_stays_and_no_threshold_takes_one_more():
    model = with_scales(chain(10), **{"1": [k / 10 for k in range(1, 11)]})
    # 70% go: the port's strict threshold y[7] = 0.8 would take 0.8 as well
    assert kept(model, 0.3) == {"0": [7, 8, 9]}


def test_the_ranking_is_over_all_layers():
    model = with_scales(chain(2, 2, 2), **{"1": [0.9, 0.8], "4": [0.3, 0.2], "7": [-0.95, 0.7]})
    assert kept(model, 0.67) == {"0": [0, 1], "3": [0], "6": [0]}  # per layer: one of each; min_channels holds 0.3
    assert kept(model, 0.5, scope="uniform") == {"0": [0], "3": [0], "6": [0]}


class Residual(nn.Module):
    """Norms behind convolutions, then the sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 36, 2)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.fc(x.flatten(1))


class PreActivation(nn.Module):
    """Norms in front of convolutions, which read a stream without any."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        for i in (1, 2):
            setattr(self, f"norm{i}", nn.BatchNorm2d(4))
            setattr(self, f"down{i}", nn.Conv2d(4, 3, 1, bias=False))
            setattr(self, f"inner{i}", nn.BatchNorm2d(3))
            setattr(self, f"up{i}", nn.Conv2d(3, 4, 3, padding=1, bias=False))
        self.last, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        for i in (1, 2):
            out = self.get_submodule(f"down{i}")(F.relu(self.get_submodule(f"norm{i}")(x)))
            x = x + self.get_submodule(f"up{i}")(F.relu(self.get_submodule(f"inner{i}")(out)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class Dense(nn.Module):
    """What layers make is concatenated, and read through norms."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1, bias=False)
        self.last, self.fc = nn.BatchNorm2d(10), nn.Linear(10, 2)

    def forward(self, x):
        x = self.conv0(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], dim=1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], dim=1)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self, normed=True):
        super().__init__()
        self.wide, self.norm1 = nn.Conv2d(1, 5, 1), nn.BatchNorm2d(5)
        self.deep, self.norm2 = nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.BatchNorm2d(5) if normed else nn.Identity()
        self.narrow, self.norm3 = nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = self.norm2(self.deep(F.relu6(self.norm1(self.wide(x)))))
        return self.fc(self.norm3(self.narrow(x)).mean((2, 3)))


def size(norm, where=slice(None)):
    return norm.weight.detach().abs()[where]


def test_streams_that_layers_are_added_up_in_stay_whole_by_default():
    model = with_scales(Residual())
    assert list(scores(model)) == ["conv1"]
    assert "coupled='mean' scores them" in frozen(model)["stem"]
    found = scores(model, coupled="mean")
    assert torch.allclose(found["stem"], (size(model.norm0) + size(model.norm2)) / 2)
    assert torch.equal(found["conv1"], size(model.norm1))


def test_a_stream_that_is_read_through_norms_scores_their_mean():
    model = with_scales(PreActivation())
    found = scores(model)
    assert torch.allclose(found["stem"], (size(model.norm1) + size(model.norm2) + size(model.last)) / 3)
    assert torch.equal(found["down2"], size(model.inner2))


def test_layers_that_are_concatenated_score_by_the_norms_that_read_them():
    model = with_scales(Dense())
    found = scores(model)
    first, second, third = slice(4), slice(4, 7), slice(7, 10)
    readers = [size(model.norm1), size(model.norm2, first), size(model.last, first)]
    assert torch.allclose(found["conv0"], torch.stack(readers).mean(dim=0))
    assert torch.allclose(found["conv1"], (size(model.norm2, second) + size(model.last, second)) / 2)
    assert torch.equal(found["conv2"], size(model.last, third))


def test_the_norm_behind_a_depthwise_layer_decides_and_the_one_in_front_where_there_is_none():
    model = with_scales(Depthwise())
    assert torch.equal(scores(model)["wide"], size(model.norm2))
    model = with_scales(Depthwise(normed=False))
    assert torch.equal(scores(model)["wide"], size(model.norm1))


def test_channels_in_several_places_of_a_norm_score_the_mean():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 2, 1)
    )
    with_scales(model)
    # in front of two conv groups, channels i and i + 3 go together
    assert torch.allclose(scores(model)["0"], size(model[1]).reshape(2, 3).mean(dim=0))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)])
def test_without_a_batch_norm_s_scale_there_is_no_score(norm):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(NothingToPrune, match="0: no batch norm's scale says what all of its channels' readers get"):
        scores(model)


def test_a_sum_with_something_that_no_norm_scales_is_not_scored():
    model = with_scales(Residual())
    model.norm2 = nn.Identity()
    assert "no batch norm's scale" in frozen(model, coupled="mean")["stem"]


@pytest.mark.parametrize("make", [lambda: chain(4, 5), PreActivation, Dense, Depthwise, Residual])
def test_channels_whose_scale_and_shift_are_zero_can_be_cut_and_the_output_stays(make):
    torch.manual_seed(1)
    model = with_scales(make()).eval()
    graph = trace(model, X)
    method = NetworkSlimming(Budget(0.6, of="units"), coupled="mean")
    plan = method.plan_for(graph)
    zeroed = copy.deepcopy(model)
    parameters = dict(zeroed.named_parameters())
    with torch.no_grad():
        for name, dims in plan.kept.items():
            if parameters[name].ndim == 1:  # scales and shifts, and biases in front of them
                parameters[name][~torch.isin(torch.arange(len(parameters[name])), dims[0])] = 0
        lightning_prune.cut(model, plan, graph=graph, absorb=False)
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in parameters.values())
        difference = (model(X) - zeroed(X)).abs().max()
    assert difference < 1e-5


def test_plans_without_a_trainer():
    model = with_scales(chain(4, 5))
    assert not lightning_prune.plan(trace(model, X), method="network_slimming", budget=0.6).is_empty


# --- passes and caps ------------------------------------------------------------------------------------------------


def test_passes_are_equal_parts_of_the_fit():
    assert NetworkSlimming(0.5).schedule == OneShot(0.5)
    assert [at for at, _ in NetworkSlimming(0.5, passes=3).schedule.points()] == pytest.approx([0.25, 0.5, 0.75])
    assert NetworkSlimming(0.5, passes=1).schedule.points() == OneShot(0.5).points()
    assert NetworkSlimming.paper_schedule().points() == [(160, 1.0)]


def test_each_pass_takes_the_same_fraction_of_what_is_left(fit):
    torch.manual_seed(0)
    callback = NetworkSlimming(Budget(0.25, of="units"), passes=2)
    fit(callback, model=Wide(), max_epochs=2)
    assert [row["prune/density"] for row in callback.report.rows] == [0.5, 0.25]
    steady = NetworkSlimming(Budget(0.25, of="units"), schedule=Iterative(start=0.3, end=0.6, events=2))
    fit(steady, model=Wide(), max_epochs=2)
    assert [row["prune/density"] for row in steady.report.rows] == [0.625, 0.25]


class Wide(Still):
    """Two layers of 8 and 8 channels, of which the first one's scales are small."""

    def __init__(self, first=0.1, second=1.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.last, self.out = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.norm.weight.copy_(first + 0.001 * torch.arange(8))
            self.out.weight.copy_(second + 0.001 * torch.arange(8))

    def forward(self, x):
        return self.head(F.relu(super().forward(x)))


def counts(callback):
    return [(row["prune/channels/conv"], row["prune/channels/last"]) for row in callback.report.rows]


def test_a_cap_bounds_what_a_group_loses_at_an_event(fit):
    found = {}
    for cap in (None, 0.5):
        callback = NetworkSlimming(Budget(0.5, of="units"), passes=2, cap=cap)
        fit(callback, model=Wide())
        found[cap] = counts(callback)
    # 16 channels, 11 after the first pass, 8 after the second
    assert found == {None: [(3, 8), (1, 7)], 0.5: [(4, 7), (2, 6)]}


def test_a_cap_leaves_no_group_behind_that_the_last_event_needs(fit):
    # 4 of 16 stay, half of each group at most goes an event: both have to give from the first one on
    callback = NetworkSlimming(
        Budget(0.25, of="units"), cap=0.5, schedule=Iterative(start=2, end=4, events=2, unit="step")
    )
    fit(callback, model=Wide())
    assert counts(callback) == [(4, 4), (2, 2)]
    # without it the first event would have left (4, 6), of which the second could have made no less than (2, 3)


def test_a_cap_comes_before_a_budget_on_the_way(fit):
    # of 16 channels 0.44, 0.23 and 0.2 may stay, 7, 3 and 3; a cap of a half leaves (4, 4), (2, 2) and (1, 1) at least
    schedule = Iterative(start=1, end=3, events=3, unit="step", curve="cubic")
    callback = NetworkSlimming(Budget(0.2, of="units"), cap=0.5, schedule=schedule)
    fit(callback, model=Wide())
    assert counts(callback) == [(4, 4), (2, 2), (1, 2)]


class Late(Schedule):
    """Hardly anything by the first two of three events."""

    unit = "step"

    def points(self):
        return [(1, 0.1), (2, 0.11), (3, 1.0)]


def test_a_cap_makes_an_event_cut_although_its_own_budget_is_met(fit):
    # 14 of 16 may stay after the first two events, but from 8 a cap of 0.4 leaves 5, then 3, then 2 at least
    callback = NetworkSlimming(Budget(0.25, of="units"), cap=0.4, schedule=Late())
    fit(callback, model=Wide())
    assert counts(callback) == [(5, 5), (3, 3), (2, 2)]


def test_a_cap_keeps_counts_multiples(fit):
    callback = NetworkSlimming(Budget(0.6, of="units"), cap=0.3, passes=3, round_to=4)
    with pytest.raises(UnmeetableBudget, match=r"or raise cap=0.3 or prune in more passes"):
        fit(callback, model=Wide())
    callback = NetworkSlimming(Budget(0.5, of="units"), cap=0.5, passes=2, round_to=4)
    fit(callback, model=Wide())
    assert counts(callback)[-1] == (4, 4)


def test_a_budget_out_of_reach_says_what_would_help(fit):
    with pytest.raises(UnmeetableBudget, match=r"raise cap=0.5 or prune in more passes, or let streams go as well"):
        fit(NetworkSlimming(Budget(0.4, of="units"), cap=0.5), model=Wide())
    fit(NetworkSlimming(Budget(0.5, of="units"), cap=0.5), model=Wide())


def test_a_layer_that_a_ranking_empties_is_named():
    model = with_scales(chain(12, 12), **{"1": [0.01] * 12, "4": [1.0] * 12})
    with pytest.warns(UserWarning, match="of 0 only min_channels=1 stay, as the scales of the others are larger"):
        assert [len(channels) for channels in kept(model, 0.5).values()] == [1, 11]


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": -1.0}, "penalty must be a finite number of at least 0, got -1.0"),
        ({"penalty": float("nan")}, "penalty must be a finite number of at least 0, got nan"),
        ({"gamma_init": 0}, "gamma_init must be above 0, or None, got 0"),
        ({"coupled": "sum"}, "coupled must be one of 'skip', 'mean', got 'sum'"),
        ({"passes": 0}, "passes must be an int of at least 1, got 0"),
        ({"passes": 2, "schedule": OneShot(0.5)}, "passes= and schedule= both say when to prune: give one of them"),
        ({"cap": 1.0}, r"cap must be a fraction in \(0, 1\), or None, got 1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NetworkSlimming(0.5, **settings)
