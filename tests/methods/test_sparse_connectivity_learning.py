import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Gradual, L1Filter, OneShot, SparseConnectivityLearning
from lightning_prune.methods import sparse_connectivity_learning as module
from lightning_prune.methods.sparse_connectivity_learning import decay, mask_gradient, normalised, solved_mask_lr

AT_6 = OneShot(6, unit="step")
# the case that fits in the head: loss y^2 / 2, so that dL/dW = y x; the third weight is off
V, M, X = [2.0, -1.0, 0.5], [0.5, 0.5, -0.5], [1.0, 1.0, 2.0]


class Linear(pl.LightningModule):
    """One linear layer and squared error; ``pull=0`` takes the task away."""

    def __init__(self, weight, lr=0.1, pull=1.0):
        super().__init__()
        weight = torch.as_tensor(weight, dtype=torch.float32)
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data.copy_(weight)
        self.example_input_array = torch.zeros(1, weight.shape[1])
        self.lr, self.pull = lr, pull

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return self.pull * 0.5 * (self(batch[0]) - batch[1]).square().sum(dim=1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Set(SparseConnectivityLearning):
    """Starts with these mask variables."""

    start = (M,)

    def initialise(self):
        super().initialise()
        self.kept["mask"]["layer.weight"].copy_(torch.tensor(self.start))
        self._exchange(self._connected())
        self.set_masks(self._connected())


class Watch(Callback):
    """What is there after each step: mask variables, values on and aside, masks."""

    def __init__(self, pruner):
        self.pruner, self.rows = pruner, []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        weights = {name: p.detach().clone() for name, p in self.pruner.weights.items()}
        kept = {key: {n: t.clone() for n, t in values.items()} for key, values in self.pruner.kept.items()}
        masks = {name: self.pruner.alive(name) for name in weights}
        self.rows.append({"weight": weights, "on": masks, **kept})

    def of(self, key, name="layer.weight"):
        return [row[key][name] for row in self.rows if key in row]


def loader(x, y, batch_size=1):
    return DataLoader(TensorDataset(torch.as_tensor(x), torch.as_tensor(y)), batch_size)


def ones(batches, inputs=3, outputs=1, batch_size=1):
    count = batches * batch_size
    return loader(torch.ones(count, inputs), torch.zeros(count, outputs), batch_size)


def linear_fit(fit, pruner, model, data, **settings):
    watch = Watch(pruner)
    fit([pruner, watch], model=model, loader=data, **{"max_epochs": 1, **settings})
    return watch


@pytest.fixture
def constant_rate(monkeypatch):
    monkeypatch.setattr(module, "decay", lambda step, steps: 1.0)


def test_mask_gradient_reaches_weights_that_are_off():
    # y = 2 - 1 = 1, dL/dW = (1, 1, 2), g = dL/dW V; a mask on the gradient would make the last one 0 for good
    assert mask_gradient(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([V]), (1, 3)).tolist() == [[2.0, -1.0, 1.0]]


def test_mask_gradient_is_summed_over_what_shares_a_variable():
    gradient, weight = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    found = mask_gradient(gradient, weight, (2, 3, 1, 1))
    assert found.dtype == torch.float32
    for o in range(2):
        for i in range(3):
            slow = sum(gradient[o, i, a, b] * weight[o, i, a, b] for a in range(2) for b in range(2))
            assert float(found[o, i, 0, 0]) == pytest.approx(float(slow), rel=1e-5)


@pytest.mark.parametrize(
    ("norm", "after"),
    [
        ("rms", [0.308579, 0.520711, -0.620711]),  # rms of (2, -1, 1) is sqrt(2): 0.5 - 0.1 (1.41421 + 0.5), ...
        ("l2", [0.368350, 0.490825, -0.590825]),  # its length is sqrt(6)
        ("none", [0.25, 0.55, -0.65]),
    ],
)
def test_first_step_is_the_hand_worked_one(fit, norm, after):
    pruner = Set(0.5, lam=0.5, mask_lr=0.1, norm=norm, schedule=AT_6)
    watch = linear_fit(fit, pruner, Linear([V]), loader([X] * 8, [[0.0]] * 8))
    assert watch.of("mask")[0].tolist() == [pytest.approx(after, abs=1e-6)]
    # dL/dV = dL/dW H(M) = (1, 1, 0) at a rate of 0.1
    assert watch.of("weight")[0].tolist() == [pytest.approx([1.9, -1.1, 0.0])]
    assert watch.of("parked")[0].tolist() == [[0.0, 0.0, 0.5]]


def test_normalised_rows_have_a_root_mean_square_of_one():
    gradient = torch.randn(3, 4, 2, 2) * torch.tensor([1.0, 100.0, 1e-4]).reshape(3, 1, 1, 1)
    for row in normalised(gradient):
        assert math.sqrt(sum(float(x) ** 2 for x in row.flatten()) / 16) == pytest.approx(1, rel=1e-5)
    for column in normalised(gradient, dim=1).unbind(1):  # transposed convolutions
        assert math.sqrt(sum(float(x) ** 2 for x in column.flatten()) / 12) == pytest.approx(1, rel=1e-5)


def test_row_with_a_larger_gradient_learns_its_masks_no_faster():
    gradient = torch.randn(2, 5)
    louder = gradient * torch.tensor([[1.0], [1000.0]])
    torch.testing.assert_close(normalised(louder), normalised(gradient))
    assert not torch.allclose(normalised(louder, norm="none"), normalised(gradient, norm="none"))


def test_gradient_of_zero_stays_zero():
    assert normalised(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_features_of_a_single_variable_are_normalised_over_their_layer():
    # row by row only the signs would be left, (1, -1)
    gradient = torch.tensor([[3.0], [-1.0]])
    assert normalised(gradient).flatten().tolist() == pytest.approx([3 / math.sqrt(5), -1 / math.sqrt(5)])
    assert normalised(gradient.flatten()).tolist() == normalised(gradient).flatten().tolist()


def test_pressure_alone_switches_everything_off_after_the_fourth_update(fit, constant_rate):
    # 0.5 - 4 * 0.125 is exactly 0, and a variable of 0 is off
    pruner = SparseConnectivityLearning(0.5, lam=1.0, mask_lr=0.125, at_budget="press", schedule=AT_6)
    watch = linear_fit(fit, pruner, Linear([V], pull=0.0), ones(8))
    assert [float(m.max()) for m in watch.of("mask")[:4]] == [0.375, 0.25, 0.125, 0.0]
    assert [int(mask.sum()) for mask in watch.of("on")[:4]] == [3, 3, 3, 0]
    assert watch.of("parked")[3].tolist() == [V]
    assert watch.of("weight")[3].tolist() == [[0.0] * 3]


def test_pressure_alone_switches_off_after_an_eighth_of_the_steps(fit):
    pruner = SparseConnectivityLearning(
        0.5, lam=0.3, mask_init=2.0, at_budget="press", schedule=OneShot(64, unit="step")
    )
    watch = linear_fit(fit, pruner, Linear([V], pull=0.0), ones(70))
    assert float(watch.of("mask")[6].min()) > 0.1  # after 7 of 64 steps
    assert float(watch.of("mask")[7].abs().max()) < 1e-6


def test_decay_is_half_a_cosine_to_the_freezing_point():
    assert [decay(step, 4) for step in (0, 2, 4, 5)] == pytest.approx([1, 0.5, 0, 0])
    # eight of 64 steps hold 8 - (sum over t < 8 of (1 - cos(pi t / 64)) / 2)
    assert solved_mask_lr(0.5, 0.5, 64) == pytest.approx(
        1 / sum((1 + math.cos(math.pi * t / 64)) / 2 for t in range(8))
    )
    assert solved_mask_lr(0.5, 0.5, 7) == pytest.approx(1 / sum(decay(t, 7) for t in range(4)))


class UnitStep(torch.autograd.Function):
    """H with the identity as its derivative."""

    @staticmethod
    def forward(ctx, variables):
        return (variables > 0).float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_sixty_steps_are_those_of_autograd_through_the_unit_step(fit):
    torch.manual_seed(0)
    x, teacher, start = torch.randn(64, 6), torch.randn(4, 6) * (torch.rand(4, 6) < 0.4), torch.randn(4, 6)
    y = x @ teacher.T + 0.3 * torch.randn(64, 4)
    pruner = SparseConnectivityLearning(0.5, lam=0.4, mask_lr=0.1, at_budget="press", schedule=OneShot(61, unit="step"))
    watch = linear_fit(fit, pruner, Linear(start, lr=0.05), loader(x, y, 1))

    values, variables = start.clone().requires_grad_(), torch.full((4, 6), 0.5, requires_grad=True)
    for step in range(60):
        loss = 0.5 * (F.linear(x[step : step + 1], values * UnitStep.apply(variables)) - y[step : step + 1]).square()
        by_value, by_variable = torch.autograd.grad(loss.sum(dim=1).mean(), (values, variables))
        with torch.no_grad():
            values -= 0.05 * by_value
            for row, gradient in zip(variables, by_variable, strict=True):
                row -= 0.1 * decay(step, 61) * (gradient / (gradient.square().mean().sqrt() + 1e-12) + 0.4)
        row = watch.rows[step]
        both = row["weight"]["layer.weight"] + row["parked"]["layer.weight"]
        torch.testing.assert_close(row["mask"]["layer.weight"], variables.detach(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(both, values.detach(), atol=2e-5, rtol=1e-4)
        assert torch.equal(row["on"]["layer.weight"], variables > 0)
    assert pruner.regrown > 5


def test_weight_comes_back_with_its_value_and_without_momentum(fit):
    class Momentum(Linear):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    class State(Watch):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, model, outputs, batch, batch_idx)
            self.rows[-1]["momentum"] = {
                "layer.weight": trainer.optimizers[0].state[model.layer.weight]["momentum_buffer"].clone()
            }

    torch.manual_seed(0)
    x = torch.randn(64, 8)
    pruner = SparseConnectivityLearning(0.5, lam=0.3, mask_lr=0.2, at_budget="press", schedule=OneShot(61, unit="step"))
    watch = State(pruner)
    model = Momentum(torch.randn(2, 8))
    fit([pruner, watch], model=model, loader=loader(x, x[:, :2] - x[:, 2:4]), max_epochs=1)
    seen = 0
    for before, after in pairwise(watch.rows[:60]):
        on, was = after["on"]["layer.weight"], before["on"]["layer.weight"]
        back = on & ~was
        assert torch.equal(after["weight"]["layer.weight"][back], before["parked"]["layer.weight"][back])
        assert not after["momentum"]["layer.weight"][back | ~on].any()
        assert not after["weight"]["layer.weight"][~on].any()
        assert not after["parked"]["layer.weight"][on].any()
        seen += int(back.sum())
    assert 0 < seen <= pruner.regrown


class Teacher(Linear):
    """Eight outputs whose losses differ by a factor of 100, under plain SGD with a step of each row's own."""

    def __init__(self, start, steps):
        super().__init__(start)
        self.loudness, self.steps = torch.logspace(-2, 0, len(start)), steps

    def training_step(self, batch, batch_idx):
        return 0.5 * ((self(batch[0]) - batch[1]).square() * self.loudness).sum(dim=1).mean()

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.param_groups[0]["lr"] = 0.1 * decay(batch_idx, self.steps)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_before_optimizer_step(self, optimizer):  # after ours: mask variables see the gradient as it was
        self.layer.weight.grad /= self.loudness.clamp(min=0.05).unsqueeze(1)


def learned_support(fit, steps=400, **settings):
    """What is on at the end, and what is in the teacher."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 40, generator=generator)
    teacher = torch.where(teacher >= 0, 0.3 + teacher, teacher - 0.3) * (torch.rand(8, 40, generator=generator) < 0.15)
    x = torch.randn(64 * steps, 40, generator=generator)
    y = x @ teacher.T + 0.1 * torch.randn(64 * steps, 8, generator=generator)
    pruner = SparseConnectivityLearning(None, mask_lr=10 / steps, schedule=OneShot(steps - 1, unit="step"), **settings)
    model = Teacher(0.2 * torch.randn(8, 40, generator=generator), steps)
    batches = DataLoader(TensorDataset(x.reshape(steps, 64, 40), y.reshape(steps, 64, 8)), batch_size=None)
    fit(pruner, model=model, loader=batches, max_epochs=1)
    return pruner, pruner.plan.masks["layer.weight"], teacher != 0


@pytest.mark.parametrize("lam", [0.2, 0.3])
def test_support_of_a_teacher_is_recovered_exactly(fit, lam):
    pruner, found, wanted = learned_support(fit, lam=lam)
    assert 0.1 < wanted.float().mean() < 0.2
    assert torch.equal(found, wanted)
    assert pruner.regrown > 0


def test_without_normalisation_quiet_rows_lose_connections_that_exist(fit):
    _, found, _ = learned_support(fit, lam=0.3, norm="none")
    assert not found[:3].any()
    assert found[-3:].any()


def test_masks_are_constant_from_the_freezing_point_on(fit):
    pruner = SparseConnectivityLearning(0.3, schedule=AT_6)
    watch = Watch(pruner)
    trainer = fit([pruner, watch], max_epochs=3)
    last = watch.rows[4]
    assert any(not torch.equal(last["on"][name], mask) for name, mask in watch.rows[3]["on"].items())
    for row in watch.rows[6:]:
        assert all(torch.equal(watch.rows[5]["on"][name], mask) for name, mask in row["on"].items())
    total = sum(mask.numel() for mask in watch.rows[-1]["on"].values())
    assert sum(int(mask.sum()) for mask in watch.rows[-1]["on"].values()) == int(0.3 * total)
    for name, mask in pruner.plan.masks.items():
        weight = trainer.lightning_module.get_parameter(name)
        assert not weight[~mask].any()
        assert not torch.equal(weight[mask], watch.rows[5]["weight"][name][mask])  # they settle


def test_freezing_keeps_the_largest_mask_variables_of_all_layers(fit):
    class Spy(SparseConnectivityLearning):
        def scores(self, weights):
            self.seen = {name: score.clone() for name, score in super().scores(weights).items()}
            return self.seen

    pruner = Spy(0.3, schedule=AT_6)
    fit(pruner)
    stay = torch.cat([pruner.seen[name][mask] for name, mask in pruner.plan.masks.items()])
    go = torch.cat([pruner.seen[name][~mask] for name, mask in pruner.plan.masks.items()])
    assert stay.min() >= go.max()
    assert len({round(float(mask.float().mean()), 3) for mask in pruner.plan.masks.values()}) > 1  # no rate per layer


def test_what_freezing_turns_on_again_has_the_value_it_was_parked_with(fit):
    # everything is off when masks freeze: 0.5 - 5 * 0.25 < 0
    pruner = SparseConnectivityLearning(0.7, lam=1.0, mask_lr=0.25, at_budget="press", schedule=OneShot(5, unit="step"))
    watch = linear_fit(fit, pruner, Linear([V], pull=0.0), ones(6))
    assert int(watch.of("on")[3].sum()) == 0
    assert watch.of("on")[4].tolist() == [[False, True, True]]  # of equal variables the lower index goes first
    assert watch.of("weight")[4].tolist() == [[0.0, -1.0, 0.5]]
    assert pruner.regrown == 2


def test_nothing_of_the_mask_variables_is_left_once_they_are_frozen(fit, tiny_net, tmp_path):
    pruner = SparseConnectivityLearning(0.3, schedule=AT_6)
    trainer = fit(pruner)
    assert pruner.kept == {}
    assert trainer.lightning_module.state_dict().keys() == tiny_net().state_dict().keys()
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in trainer.lightning_module.parameters()]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"][pruner.state_key]["kept"] == {}


def test_checkpoint_in_mid_fit_goes_on_to_the_same_masks(fit, save_each, tmp_path):
    whole, resumed = (SparseConnectivityLearning(0.3, schedule=OneShot(10, unit="step")) for _ in range(2))
    watches = Watch(whole), Watch(resumed)
    fit([whole, watches[0], save_each(steps=True)], max_epochs=3)
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"][whole.state_key]
    assert state["kept"].keys() == {"mask", "parked"}
    fit([resumed, watches[1]], max_epochs=3, ckpt_path=tmp_path / "step=4.ckpt", seed=5)
    for first, second in zip(watches[0].rows[4:], watches[1].rows, strict=True):
        for key, values in first.items():
            assert all(torch.equal(tensor, second[key][name]) for name, tensor in values.items())
    assert resumed.regrown == whole.regrown > 0


def test_without_pressure_and_far_from_zero_training_is_as_without_it(fit):
    pruner = SparseConnectivityLearning(0.3, lam=0, mask_init=1e6, mask_lr=0.01, schedule=AT_6)

    class Weights(Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            self.rows.append([p.detach().clone() for p in model.parameters()])

    plain, pruned = Weights(), Weights()
    fit(plain)
    fit([pruner, pruned])
    for first, second in zip(plain.rows[:5], pruned.rows[:5], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pressure_is_released_while_the_budget_is_met(fit, constant_rate):
    # four weights, two may stay: the mask variables start at 0.1, 0.2, 0.6, 0.7, and pressure alone takes 0.25 a step
    class Start(Set):
        start = ([0.1, 0.2, 0.6, 0.7],)

    settings = {"lam": 1.0, "mask_lr": 0.25, "schedule": AT_6}
    watch = linear_fit(fit, Start(0.5, **settings), Linear([[1.0] * 4], pull=0.0), ones(8, 4))
    assert watch.of("mask")[4].tolist() == [pytest.approx([-0.15, -0.05, 0.35, 0.45])]
    pressed = Start(0.5, at_budget="press", **settings)
    watch = linear_fit(fit, pressed, Linear([[1.0] * 4], pull=0.0), ones(8, 4))
    assert watch.of("mask")[4].tolist() == [pytest.approx([-1.15, -1.05, -0.65, -0.55])]


def test_pressure_comes_back_when_more_is_on_than_the_budget_allows(fit, constant_rate):
    class Grows(Set):
        start = ([0.1, 0.7],)

        def after_step(self):
            if self.steps == 3:
                self.kept["mask"]["layer.weight"][0, 0] = 0.5
            super().after_step()

    watch = linear_fit(
        fit, Grows(0.5, lam=1.0, mask_lr=0.125, schedule=AT_6), Linear([[1.0, 1.0]], pull=0.0), ones(8, 2)
    )
    # met after one step of 0.125; the first is then lifted, and pressed again
    assert [float(m[0, 1]) for m in watch.of("mask")[:5]] == pytest.approx([0.575, 0.575, 0.575, 0.45, 0.325])


def test_masks_stop_at_once_where_they_are_to_freeze_at_the_budget(fit, save_each, tmp_path):
    def pruner():
        return SparseConnectivityLearning(0.3, at_budget="freeze", schedule=OneShot(24, unit="step"))

    first, second = pruner(), pruner()
    watch = Watch(first)
    fit([first, watch, save_each()], max_epochs=7)
    counts = [sum(int(mask.sum()) for mask in row["on"].values()) for row in watch.rows]
    total = sum(mask.numel() for mask in watch.rows[0]["on"].values())
    stop = next(i for i, count in enumerate(counts) if count <= 0.3 * total)
    assert 2 < stop < 20
    assert counts[:stop] != [counts[0]] * stop
    assert counts[stop:23] == [counts[stop]] * (23 - stop)
    assert counts[23:] == [int(0.3 * total)] * 5
    fit(second, max_epochs=7, ckpt_path=tmp_path / f"epoch={(stop + 1) // 4}.ckpt")
    assert second.plan == first.plan
    assert second.regrown == first.regrown


def test_connectivity_can_be_taken_as_it_is_learned(fit):
    class Spy(SparseConnectivityLearning):
        def scores(self, weights):
            self.seen = {name: score.clone() for name, score in super().scores(weights).items()}
            return self.seen

    pruner = Spy(None, lam=1.0, schedule=AT_6)
    fit(pruner)
    assert all(torch.equal(mask, pruner.seen[name] > 0) for name, mask in pruner.plan.masks.items())
    assert 0 < sum(int(mask.sum()) for mask in pruner.plan.masks.values()) < 1458
    assert pruner.kept == {}


def test_density_is_at_the_budget_before_masks_freeze_and_weights_return(fit, make_loader):
    # 126 steps, of which 107 are before the freezing point
    pruner = SparseConnectivityLearning(0.2)
    watch = Watch(pruner)
    fit([pruner, watch], loader=make_loader(56), max_epochs=18)
    assert pruner.steps == 126
    assert pruner.events[0].step == 107
    masks = [torch.cat([mask.flatten() for mask in row["on"].values()]) for row in watch.rows]
    assert float(masks[105].float().mean()) == pytest.approx(0.2, abs=0.02)
    assert pruner.regrown == sum(int((b & ~a).sum()) for a, b in pairwise(masks)) > 100


def test_kernels_share_one_variable_and_go_whole(fit):
    pruner = SparseConnectivityLearning(0.3, granularity="kernel", schedule=AT_6)
    watch = Watch(pruner)
    fit([pruner, watch])
    assert watch.rows[0]["mask"]["conv1.weight"].shape == (12, 6, 1, 1)
    assert watch.rows[0]["mask"]["fc.weight"].shape == (3, 12)
    for row in watch.rows:
        for mask in row["on"].values():
            per_kernel = mask.flatten(2).float().mean(2) if mask.ndim > 2 else mask
            assert set(per_kernel.unique().tolist()) <= {0.0, 1.0}
    kept, total = (sum(int(f(mask)) for mask in pruner.plan.masks.values()) for f in (torch.sum, torch.numel))
    assert int(0.3 * total) - 9 < kept <= int(0.3 * total)


def test_filters_share_one_variable_wherever_a_layer_has_its_output_channels(fit):
    class Up(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv2d(1, 4, 3, padding=1), nn.ConvTranspose2d(4, 5, 3, padding=1)
            self.mix, self.out = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 2)
            self.example_input_array = torch.zeros(1, 1, 8, 8)

        def forward(self, x):
            x = F.relu(self.up(F.relu(self.conv(x)))).mean((2, 3))
            return self.out(F.relu(x @ self.mix))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    pruner = SparseConnectivityLearning(0.5, granularity="filter", schedule=AT_6)
    watch = Watch(pruner)
    fit([pruner, watch], model=Up())
    sizes = {name: tuple(variables.shape) for name, variables in watch.rows[0]["mask"].items()}
    assert sizes == {"conv.weight": (4, 1, 1, 1), "up.weight": (1, 5, 1, 1), "mix": (1, 6), "out.weight": (2, 1)}
    assert set(pruner.plan.masks["up.weight"].float().mean((0, 2, 3)).tolist()) <= {0.0, 1.0}
    kept = sum(int(mask.sum()) for mask in pruner.plan.masks.values())
    assert 0.5 * 258 - 36 < kept <= 0.5 * 258


def test_coarse_variables_are_pressed_by_how_many_weights_they_switch(fit, constant_rate, tiny_net):
    class Idle(tiny_net):
        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    pruner = SparseConnectivityLearning(0.5, lam=0.1, mask_lr=1.0, granularity="kernel", schedule=AT_6)
    watch = Watch(pruner)
    fit([pruner, watch], model=Idle())
    pressed = {name: 0.5 - m for name, m in watch.rows[0]["mask"].items()}
    assert float(pressed["conv1.weight"].max()) == pytest.approx(9 * float(pressed["fc.weight"].max()), rel=1e-5)
    # on average over all variables it is lam
    assert float(torch.cat([p.flatten() for p in pressed.values()]).mean()) == pytest.approx(0.1, rel=1e-5)


def test_variables_move_once_an_optimizer_step_when_gradients_accumulate(fit, constant_rate):
    pruner = SparseConnectivityLearning(0.5, lam=1.0, mask_lr=0.0625, at_budget="press", schedule=AT_6)
    watch = linear_fit(fit, pruner, Linear([V], pull=0.0), ones(16), accumulate_grad_batches=2)
    assert [float(m.max()) for m in watch.of("mask")[:6]] == [0.5, 0.4375, 0.4375, 0.375, 0.375, 0.3125]


def test_each_of_several_optimizers_moves_the_variables_of_its_own_weights(fit, constant_rate):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)
            self.example_input_array = torch.zeros(1, 3)
            self.automatic_optimization = False

        def forward(self, x):
            return self.second(self.first(x))

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, first, second)[batch_idx % 2 :]:  # the first twice, then once
                optimizer.zero_grad()
                self.manual_backward(0.0 * self(batch[0]).sum())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]

    pruner = SparseConnectivityLearning(0.5, lam=1.0, mask_lr=0.03125, at_budget="press", schedule=AT_6)
    watch = Watch(pruner)
    fit([pruner, watch], model=Two(), loader=ones(8), max_epochs=1)
    assert [float(m.max()) for m in watch.of("mask", "first.weight")[:3]] == [0.4375, 0.40625, 0.34375]
    assert [float(m.max()) for m in watch.of("mask", "second.weight")[:3]] == [0.46875, 0.4375, 0.40625]


def test_step_with_a_gradient_that_is_not_finite_leaves_the_variables_alone(fit, tiny_net):
    class Overflows(tiny_net):
        def on_after_backward(self):
            if self.trainer.global_step == 2:
                self.norm1.bias.grad[0] = math.inf

        def on_before_optimizer_step(self, optimizer):  # after ours, as a loss scaler leaves the step out
            self.norm1.bias.grad.nan_to_num_(posinf=0.0)

    pruner = SparseConnectivityLearning(0.3, schedule=AT_6)
    watch = Watch(pruner)
    fit([pruner, watch], model=Overflows())
    moved = [not torch.equal(a, b) for a, b in pairwise(watch.of("mask", "fc.weight"))]
    assert moved == [True, False, True, True]


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_variables_and_parked_values_follow_a_cut_of_channels(fit, first):
    def now(pruner, name="conv1.weight"):
        parked = pruner.kept["parked"][name]
        return {"mask": pruner.kept["mask"][name].clone(), "value": parked + pruner.weights[name].detach()}

    class Spy(SparseConnectivityLearning):
        def before_step(self, optimizer, held):
            if self.steps == 4:
                self.seen = now(self)
            super().before_step(optimizer, held)

    class Cuts(L1Filter):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 4:
                self.seen = now(pruner)
            super().on_train_batch_end(trainer, *rest)

    pruner = Spy(0.2, schedule=OneShot(10, unit="step"))
    cutter = Cuts(0.5, schedule=OneShot(4, unit="step"))
    trainer = fit([pruner, cutter] if first == "ours" else [cutter, pruner], max_epochs=3)
    assert len(cutter.plan.kept["conv1.weight"][0]) < 12
    for key, expected in cutter.seen.items():
        for dim, index in cutter.plan.kept["conv1.weight"].items():
            expected = expected.index_select(dim, index)
        assert torch.equal(pruner.seen[key], expected)
    matrices = [p for p in trainer.lightning_module.parameters() if p.ndim > 1]
    assert sum(int(p.count_nonzero()) for p in matrices) == int(0.2 * 1458) < sum(p.numel() for p in matrices)


def test_weight_that_never_had_a_gradient_is_warned_of_and_then_an_error_that_names_it(fit, tiny_net):
    model = tiny_net()
    model.fc.weight.requires_grad_(False)
    with (
        pytest.warns(UserWarning, match=r"'fc.weight' does not train \(requires_grad=False\)"),
        pytest.raises(RuntimeError, match=r"'fc.weight' had no gradient before the freezing point at step 6.*ignore="),
    ):
        fit(SparseConnectivityLearning(0.3, schedule=AT_6), model=model)
    pruner = SparseConnectivityLearning(0.3, schedule=AT_6, ignore=["fc"])
    fit(pruner, model=model)
    assert "fc.weight" not in pruner.plan.masks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -0.1}, "lam must be at least 0, got -0.1"),
        ({"lam": 0}, "give mask_lr="),
        ({"mask_init": 0}, "mask_init must be above 0, got 0"),
        ({"mask_lr": -1.0}, "mask_lr must be above 0, got -1.0"),
        ({"norm": "max"}, "norm must be one of 'rms', 'l2', 'none', got 'max'"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"at_budget": "stop"}, "at_budget must be one of"),
        ({"budget": None, "at_budget": "freeze"}, "needs a budget"),
        ({"schedule": Gradual(events=3)}, "masks freeze once"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseConnectivityLearning(**{"budget": 0.1, **settings})
