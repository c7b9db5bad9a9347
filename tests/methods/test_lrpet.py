import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import LRPET, Budget, Iterative, count
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.factorise import factorise
from lightning_prune.methods.lrpet import energy_transfer, rectified_transfer, softened_inverse
from lightning_prune.rank_pruner import MatrixSize, rank_of


def values(matrix):
    return torch.linalg.svdvals(matrix.double())


def turned(sigma, outs, fan_in, seed=0):
    """A matrix with these singular values, turned at random on both sides."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(outs, outs, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(fan_in, fan_in, generator=generator, dtype=torch.float64))[0]
    n = len(sigma)
    return left[:, :n] @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ right[:, :n].T


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 3)])
def test_energy_of_what_goes_is_given_to_what_stays_by_one_factor(shape):
    # sigma (3, 2, 1), r 2: c = sqrt((9 + 4 + 1) / (9 + 4)) = 1.037749
    new, before = energy_transfer(turned([3.0, 2.0, 1.0], *shape), 2)
    assert values(new)[:3].tolist() == pytest.approx([3.113248, 2.075498, 0], abs=1e-6)
    assert before.tolist() == pytest.approx([3, 2, 1])


def test_energy_of_a_softened_tail_is_left_to_it():
    # rho 0.5: c = sqrt((14 - 0.25) / 13) = 1.028442, and the tail is 0.5
    new, _ = energy_transfer(turned([3.0, 2.0, 1.0], 3, 4), 2, tail=0.5)
    assert values(new).tolist() == pytest.approx([3 * 1.028442, 2 * 1.028442, 0.5], abs=1e-6)


def test_energy_is_neither_dropped_nor_added_value_by_value():
    # sigma (4, 3), r 1: truncation gives 4, adding the tail's value 7; the norm, 5, is what stays
    new, _ = energy_transfer(turned([4.0, 3.0], 2, 2), 1)
    assert values(new).tolist() == pytest.approx([5, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_projection_is_the_slow_one_by_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = (sigma.square().sum() / sigma[:2].square().sum()).sqrt()
    wanted = torch.zeros(shape, dtype=torch.float64)
    for k in range(2):
        wanted += scale * sigma[k] * torch.outer(left[:, k], right[k])
    assert torch.allclose(energy_transfer(matrix, 2)[0], wanted, atol=1e-8)


def test_projecting_twice_changes_nothing_more():
    once, _ = energy_transfer(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), 2)
    twice, _ = energy_transfer(once, 2)
    assert torch.allclose(once, twice, atol=1e-6)


def test_full_rank_and_zeros_stay_as_they_are():
    matrix = turned([3.0, 2.0, 1.0], 3, 4)
    assert torch.allclose(energy_transfer(matrix, 3)[0], matrix, atol=1e-9)
    assert energy_transfer(torch.zeros(3, 4), 2)[0].count_nonzero() == 0


def test_softened_inverse_is_near_zero_where_the_gain_is_and_keeps_its_sign():
    gain = torch.tensor([0.0, 0.001, 0.1, 1.0, -1.0], dtype=torch.float64)
    # 0.001 / (1e-6 + 1e-5) = 90.909; a plain inverse would say 1000
    assert softened_inverse(gain).tolist() == pytest.approx([0, 90.909091, 9.990010, 0.999990, -0.999990], abs=1e-6)


def test_rectified_projection_keeps_the_row_that_its_norm_makes_large():
    # merged rows (4, 0) and (0, 2): row 0 stays, with c = sqrt(20 / 16); alone, row 1 of length 2 would
    matrix, gain = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([4.0, 1.0])
    new, before = rectified_transfer(matrix, gain, 1)
    assert new.flatten().tolist() == pytest.approx([1.118034, 0, 0, 0], abs=2e-6)
    assert before.tolist() == pytest.approx([4, 2])
    assert energy_transfer(matrix, 1)[0].flatten().tolist() == pytest.approx([0, 0, 0, 2.236068], abs=1e-6)


def test_rectified_projection_conserves_the_merged_norm_and_not_the_weights():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    gain = (torch.rand(6, generator=generator, dtype=torch.float64) + 0.2) * torch.tensor([1, -1, 1, -1, 1, 1])
    new, _ = rectified_transfer(matrix, gain, 2)
    assert float((gain[:, None] * new).norm()) == pytest.approx(float((gain[:, None] * matrix).norm()), rel=1e-4)
    assert float(new.norm()) != pytest.approx(float(matrix.norm()), rel=1e-2)
    assert values(new)[2] < 1e-5 * values(new)[0]
    again, _ = rectified_transfer(new, gain, 2)
    assert torch.allclose(again, new, rtol=2e-5 / 0.04, atol=1e-7)  # the softening: about 1e-5 / gain^2


def test_row_behind_a_scale_of_zero_is_driven_to_zero():
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    new, _ = rectified_transfer(matrix, torch.tensor([1.0, 0.0, 1.0]), 2)
    assert new[1].count_nonzero() == 0
    assert torch.isfinite(new).all()


def test_layer_behind_scales_that_start_at_zero_is_projected_without_them():
    # by its merged matrix, which is zero, nothing of it would be left to train
    matrix = turned([3.0, 2.0, 1.0], 3, 4)
    new, before = rectified_transfer(matrix, torch.zeros(3), 2)
    assert torch.allclose(new, energy_transfer(matrix, 2)[0])
    assert before.count_nonzero() == 0


class Spy(LRPET):
    """Holds what each projection got and gave; after each epoch alone."""

    default_schedule = LRPET.paper_schedule()

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.seen = []

    def project(self, view, rank):
        new, sigma = super().project(view, rank)
        self.seen.append((view, rank, new, sigma))
        return new, sigma


def test_fit_projects_each_layer_after_every_epoch_as_its_norm_scales_it(fit):
    callback = Spy(0.5, finalize=False)
    model = fit(callback, max_epochs=3).lightning_module
    names = list(callback.plan.ranks)
    assert [view.name for view, *_ in callback.seen] == 3 * names
    assert [view.closing for view, *_ in callback.seen] == [False] * 2 * len(names) + [True] * len(names)
    view, rank, new, _ = next(entry for entry in callback.seen[::-1] if entry[0].name == "conv1")
    norm = model.norm1  # in eval mode since the last step, so that its statistics are those of the last event
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(view.gain, gain.double(), rtol=1e-5)
    assert torch.allclose(new, rectified_transfer(view.matrix, gain, rank)[0], atol=1e-6)
    assert not torch.allclose(new, energy_transfer(view.matrix, rank)[0], atol=1e-4)
    assert torch.allclose(model.conv1.weight.flatten(1).double(), new, atol=1e-6)


def test_without_rectifying_norms_do_not_count(fit):
    callback = Spy(0.5, finalize=False, rectify=False)
    fit(callback)
    view, rank, new, _ = callback.seen[-1]
    assert torch.allclose(new, energy_transfer(view.matrix, rank)[0])


def test_tail_is_softened_between_events_and_gone_after_the_last_step(fit):
    callback = Spy(0.4, tail=0.5)
    fit(callback)
    name = next(iter(callback.plan.ranks))
    rank = callback.plan.ranks[name]
    first, last = (new for view, _, new, _ in callback.seen if view.name == name)
    assert values(first)[rank] > 0.01 * values(first)[0]
    assert values(last)[rank] < 1e-5 * values(last)[0]


def test_paper_schedules_are_each_epoch_and_each_250_steps():
    assert [event.step for event in LRPET.paper_schedule().resolve(12, 4)] == [4, 8, 12]
    assert [event.step for event in LRPET.paper_schedule("imagenet").resolve(600, 300)] == [250, 500, 600]
    with pytest.raises(ValueError, match="data must be one of 'cifar', 'imagenet', got 'mnist'"):
        LRPET.paper_schedule("mnist")


@pytest.mark.parametrize("tail", [1.0, -0.1, float("nan"), True])
def test_tail_outside_its_range_is_refused(tail):
    with pytest.raises(ValueError, match=r"tail must be in \[0, 1\)"):
        LRPET(0.5, tail=tail)


def resnet(blocks):
    """Convolutions of He et al.'s network for CIFAR; its shortcuts have no parameters."""
    sizes = [MatrixSize(16, 27, 1024)]
    for width, before, places in ((16, 16, 1024), (32, 16, 256), (64, 32, 64)):
        sizes += [MatrixSize(width, 9 * before, places), *[MatrixSize(width, 9 * width, places)] * (2 * blocks - 1)]
    return sizes


@pytest.mark.parametrize(
    ("blocks", "goal", "reduction"), [(9, 0.80, 79.10), (18, 0.62, 58.26), (18, 0.70, 69.30), (18, 0.79, 78.56)]
)
def test_goals_of_the_paper_reduce_its_networks_as_it_says(blocks, goal, reduction):
    sizes = resnet(blocks)
    dense = sum(size.outs * size.fan_in * size.places for size in sizes)
    left = sum(size.left(rank_of(goal, size.values)) * size.places for size in sizes)
    assert 100 * (1 - left / dense) == pytest.approx(reduction, abs=0.005)


def test_gradual_ranks_fall_to_the_budget(fit):
    callback = Spy(Budget(0.4), schedule=Iterative(start=2, end=6, every=2, unit="step"))
    model = fit(callback).lightning_module
    ranks = [rank for view, rank, *_ in callback.seen if view.name == "conv2"]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) > 1
    assert count(model, model.example_input_array).flops <= 0.4 * callback.dense_cost.flops


@pytest.mark.slow  # two fits of a few seconds each
def test_projecting_while_training_keeps_what_cutting_ranks_at_the_end_forgets():
    # handwritten digits, seed 0: cut at the end the network is left guessing one of ten classes
    def accuracy(callback=None):
        pl.seed_everything(0, verbose=False)
        callbacks = [] if callback is None else [callback]
        trainer = pl.Trainer(
            max_epochs=5, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        model, data = DigitsNet(width=6), DigitsData(seed=0)
        trainer.fit(model, data)
        if callback is None:
            factorise(model, projected.plan.ranks)
        return trainer.test(model, data, verbose=False)[0]["test/acc"]

    projected = LRPET(0.3)
    assert accuracy(projected) > accuracy() + 0.4


class Tokens(pl.LightningModule):
    """A transformer block on eight tokens, and a class for all of them."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide, self.back, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x):
        x = x.squeeze(1)
        seen = self.norm1(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        x = x + self.back(F.gelu(self.wide(self.norm2(x))))
        return self.head(x.mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_linear_layers_of_a_transformer_are_projected_plainly(fit):
    callback = Spy(Budget(0.6), keep={"back": 0.25})
    model = fit(callback, model=Tokens()).lightning_module
    assert set(callback.plan.ranks) == {"wide", "back"}
    assert callback.plan.ranks["back"] == 2
    assert all(view.gain is None for view, *_ in callback.seen)
    assert type(model.head) is nn.Linear
    assert "a NonDynamicallyQuantizableLinear" in callback.report.frozen["attention.out_proj"]
    cost = count(model, model.example_input_array)
    assert (cost.flops, cost.params) == (callback.report.after.flops, callback.report.after.params)
    assert cost.flops <= 0.6 * callback.dense_cost.flops
