import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_prune import Budget, Gradual, Iterative, L1Filter, OneShot, RigL
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.methods.rigl import drop_and_grow, drop_fraction, training_flops
from lightning_prune.schedule import Updates

W = torch.tensor([0.9, -0.1, 0.5, 0.0, 0.0, 0.0, -0.05, 0.3])
MASK = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
GRADIENT = torch.tensor([0.05, 0.2, 0.3, 0.7, 0.1, 0.6, 0.9, 0.01])
EVERY_4 = Updates(every=4, start=0.0, end=0.75, least=1)  # of 16 steps: the draw, and updates at 4 and 8

pytestmark = pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing")


def places(mask):
    return mask.nonzero().flatten().tolist()


def matrices(model):
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


class Watch(Callback):
    """Copies weights, optimizer state, gradients and masks around each update; put it in front of RigL."""

    def __init__(self, pruner):
        self.pruner, self.before, self.after, self.counts = pruner, {}, {}, []

    @staticmethod
    def copies(trainer, model):
        optimizer = trainer.optimizers[0]
        state = {n: copy.deepcopy(dict(optimizer.state.get(p, {}))) for n, p in model.named_parameters()}
        return {n: p.detach().clone() for n, p in model.named_parameters()}, state

    def on_before_optimizer_step(self, trainer, model, optimizer):
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        masks = {n: self.pruner.alive(n).clone() for n in self.pruner.weights}
        self.before[trainer.global_step] = (*self.copies(trainer, model), masks, gradients)

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        masks = {n: self.pruner.alive(n).clone() for n in self.pruner.weights}
        self.after[trainer.global_step] = (*self.copies(trainer, model), masks)
        self.counts.append(sum(int(mask.sum()) for mask in masks.values()))


# the formulas


def test_drop_fraction_falls_along_half_a_cosine():
    # 0.15 (1 + cos(pi t / 1000))
    found = [drop_fraction(t, 1000) for t in (0, 250, 500, 750, 1000, 1200)]
    assert found == pytest.approx([0.3, 0.256066, 0.15, 0.043934, 0.0, 0.0], abs=1e-6)


def test_one_update_grows_among_those_just_dropped_as_well():
    # k = floor(0.4 * 5) = 2: the smallest active are 6 and 1; of all not kept, 6 and 3 have the largest gradient
    mask = drop_and_grow(W, MASK, GRADIENT, 0.4)
    assert places(mask) == [0, 2, 3, 6, 7]
    # growth among those that were inactive before alone would take 3 and 5
    assert places(MASK & mask) == [0, 2, 6, 7]


def test_a_weight_at_zero_that_is_active_goes_before_inactive_ones_count():
    # zeros outside of the mask are no candidates for dropping: the smallest active are at 1 and 2
    weight, mask = torch.tensor([0.0, 0.1, 0.2, 0.3]), torch.tensor([False, True, True, True])
    assert places(drop_and_grow(weight, mask, torch.tensor([9.0, 0.0, 0.0, 0.0]), 0.34)) == [0, 2, 3]


def test_gradients_of_masked_weights_are_what_grows():
    # a gradient that is masked says nothing: it would grow the two it dropped
    assert places(drop_and_grow(W, MASK, GRADIENT * MASK, 0.4)) == [0, 1, 2, 6, 7]


def test_a_fraction_of_zero_changes_nothing():
    assert torch.equal(drop_and_grow(W, MASK, GRADIENT, 0.0), MASK)
    assert torch.equal(drop_and_grow(W, MASK, GRADIENT, 0.19), MASK)  # of 5 weights it is less than one


def test_the_number_dropped_is_not_lost_to_rounding():
    # 0.29 * 100 is 28.999999999999996
    weight, mask = torch.arange(200.0), torch.arange(200) < 100
    assert int((drop_and_grow(weight, mask, weight, 0.29) & mask).sum()) == 71


def test_another_count_is_grown_or_dropped_to():
    assert places(drop_and_grow(W, MASK, GRADIENT, 0.4, count=6)) == [0, 2, 3, 5, 6, 7]
    assert places(drop_and_grow(W, MASK, GRADIENT, 0.4, count=2)) == [0, 2]


@given(
    values=st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30),
    fraction=st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_an_update_keeps_the_count_and_does_what_a_slow_loop_does(values, fraction):
    weight, growth = (torch.tensor([float(v[i]) for v in values]) for i in (0, 2))
    mask = torch.tensor([v[1] for v in values])
    active = set(places(mask))
    for _ in range(math.floor(fraction * len(active) + 1e-9)):
        active.remove(min(active, key=lambda i: (abs(float(weight[i])), i)))
    while len(active) < int(mask.sum()):
        active.add(max(set(range(len(mask))) - active, key=lambda i: (float(growth[i]), i)))
    assert places(drop_and_grow(weight, mask, growth, fraction)) == sorted(active)


def test_flops_of_training_are_the_papers():
    # (3 * 0.2 * 100 + 2 * 0.2 + 1) / 101 = 61.4 / 101; of dense training, 3 * 1, it is 0.2026
    assert training_flops(0.2, 1.0, 100) == pytest.approx(0.607921, abs=1e-6)
    assert training_flops(0.2, 1.0, 100) / training_flops(1.0, 1.0) == pytest.approx(0.2026, abs=1e-4)
    assert training_flops(0.2, 1.0) == pytest.approx(0.6)
    # ResNet-50: 32,000 steps of 4,096 images, with 8.2e9 operations forward
    assert training_flops(8.2e9, 8.2e9) * 32_000 * 4096 == pytest.approx(3.2e18, rel=0.01)


# arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "snip"}, "distribution must be one of 'erk', 'er', 'uniform', got 'snip'"),
        ({"grow": "momentum"}, "grow must be one of 'gradient', 'random', 'none', got 'momentum'"),
        ({"alpha": 1.5}, "alpha must be a fraction from 0 to 1 of the weights of a layer, got 1.5"),
        ({"alpha": True}, "got True"),
        ({"scope": "global"}, "scope='global' means nothing"),
        ({"schedule": Gradual()}, r"Gradual nears it event by event; use Updates\(\.\.\.\)"),
        ({"schedule": Iterative(events=3)}, "Iterative nears it event by event"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RigL(0.1, **settings)


def test_there_are_twenty_updates_at_least_and_the_papers_distance_in_a_long_fit():
    short, long = (RigL(0.1).schedule.resolve(steps, None) for steps in (126, 97_656))
    assert len(short) == 21
    assert [event.step for event in long] == list(range(0, 73_242, 100))
    assert [e.step for e in RigL.paper_schedule().resolve(1000, None)] == [0, 100, 200, 300, 400, 500, 600, 700]


def test_a_static_mask_is_drawn_once_at_the_start():
    assert RigL(0.1, grow="none").schedule == OneShot(0.0)
    assert RigL(0.1, grow="none", schedule=EVERY_4).schedule == EVERY_4


# the draw


def draw(fit, model=None, **settings):
    pruner = RigL(settings.pop("budget", 0.2), schedule=OneShot(0.0), **settings)
    fit(pruner, model=model, max_epochs=1)
    return pruner, {name: int(mask.sum()) for name, mask in pruner.plan.masks.items()}


def test_densities_are_those_of_erk_in_the_network(fit, tiny_net):
    # sizes 54, 648, 648, 72, 36 of shapes (6,1,3,3), (12,6,3,3), (6,12,3,3), (12,6), (3,12): of 1458 a fifth is 291;
    # sums of sizes 13, 24, 24, 18, 15, together 94: 40.2, 74.3, 74.3, 55.7 and 46.4, of which fc has but 36;
    # 255 / 79: 42.0, 77.5, 77.5, 58.1
    _, counts = draw(fit)
    assert counts == {"stem.weight": 42, "conv1.weight": 78, "conv2.weight": 77, "hidden.weight": 58, "fc.weight": 36}


def test_densities_of_er_leave_the_kernel_out(fit):
    # relative densities 7/6, 18/72, 18/72, 18/72, 15/36; factor 291 / (63 + 162 + 162 + 18 + 15) = 0.692857:
    # 43.65, 112.24, 112.24, 12.47, 10.39
    _, counts = draw(fit, distribution="er")
    assert counts == {"stem.weight": 44, "conv1.weight": 112, "conv2.weight": 112, "hidden.weight": 13, "fc.weight": 10}


def test_uniform_leaves_the_first_layer_dense_in_the_order_of_the_data(fit, tiny_net):
    class HeadFirst(tiny_net):
        def __init__(self):
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))

    model = HeadFirst()
    assert next(iter(matrices(model))) == "fc.weight"
    pruner, counts = draw(fit, model=model, distribution="uniform")
    # (291 - 54) / 1404 of the others
    assert counts["stem.weight"] == 54
    for name, mask in pruner.plan.masks.items():
        assert name == "stem.weight" or abs(counts[name] - mask.numel() * 237 / 1404) < 1
    assert sum(counts.values()) == 291


def test_uniform_takes_no_second_layer_for_the_first_when_that_is_ignored(fit):
    _, counts = draw(fit, distribution="uniform", ignore=["stem"])
    assert counts["conv1.weight"] == pytest.approx(648 * 237 / 1404, abs=1)


def test_uniform_says_when_the_first_layer_alone_is_too_much(fit):
    with pytest.raises(UnmeetableBudget, match=r"stem.weight stays dense and costs 54, but the budget leaves 29"):
        draw(fit, budget=0.02, distribution="uniform")


def test_masks_are_drawn_at_random_and_no_weight_is_scaled(fit, tiny_net):
    model = tiny_net()
    before = {name: p.detach().clone() for name, p in matrices(model).items()}
    watch = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            watch.append({name: p.detach().clone() for name, p in matrices(model).items()})

    pruner = RigL(0.2, grow="none")
    fit([pruner, Look()], model=model)
    for name, mask in pruner.plan.masks.items():
        assert torch.equal(watch[0][name], before[name] * mask)
    # by magnitude nothing of the upper half would be gone
    gone = before["conv1.weight"][~pruner.plan.masks["conv1.weight"]].abs()
    assert (gone > before["conv1.weight"].abs().median()).float().mean() > 0.3


def test_the_three_start_from_one_draw(fit):
    plans = []
    for grow in ("gradient", "random", "none"):
        pruner = RigL(0.2, grow=grow, schedule=OneShot(0.0))
        fit(pruner, max_epochs=1)
        plans.append(pruner.plan)
    assert plans[0] == plans[1] == plans[2]


def test_another_seed_draws_other_masks(fit):
    plans = []
    for seed in (0, 1):
        pruner = RigL(0.2, grow="none")
        fit(pruner, max_epochs=1, seed=seed)
        plans.append(pruner.plan)
    assert plans[0] != plans[1]


# updates


def watched(fit, model=None, **settings):
    """A fit of 16 steps with updates behind the 4th and the 8th."""
    pruner = RigL(settings.pop("budget", 0.2), schedule=settings.pop("schedule", EVERY_4), **settings)
    watch = Watch(pruner)
    fit([watch, pruner], model=model, max_epochs=4)
    return pruner, watch


@pytest.mark.parametrize("grow", ["gradient", "random", "none"])
def test_the_count_is_exact_before_every_step(fit, grow):
    pruner, watch = watched(fit, grow=grow)
    assert watch.counts == [291] * 16
    layers = [{name: int(mask.sum()) for name, mask in masks.items()} for _, _, masks in watch.after.values()]
    assert all(counts == layers[0] for counts in layers)
    masks = [watch.after[t][2] for t in range(16)]
    changed = [t for t in range(1, 16) if any((masks[t][n] != masks[t - 1][n]).any() for n in layers[0])]
    assert changed == ([] if grow == "none" else [4, 8])
    assert pruner.regrown == sum(int((masks[t][n] & ~masks[t - 1][n]).sum()) for t in changed for n in layers[0])


def test_an_update_does_what_the_formula_does_with_the_dense_gradient(fit):
    _, watch = watched(fit)
    for t in (4, 8):
        weights, _, masks, gradients = watch.before[t - 1]
        fraction = drop_fraction(t, 12)  # T_end is a distance behind the last update
        for name, mask in masks.items():
            wanted = drop_and_grow(weights[name], mask, gradients[name].abs(), fraction)
            assert torch.equal(watch.after[t][2][name], wanted)
        assert int((watch.after[t][2]["conv1.weight"] != masks["conv1.weight"]).sum()) > 4
        assert gradients["conv1.weight"][~masks["conv1.weight"]].abs().min() > 0


class WithOptimizer:
    SGD = staticmethod(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1))
    ADAM = staticmethod(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True))


@pytest.mark.parametrize("optimizer", [WithOptimizer.SGD, WithOptimizer.ADAM], ids=["sgd", "adamw"])
def test_an_update_takes_the_place_of_the_step(fit, tiny_net, optimizer):
    class Net(tiny_net):
        def configure_optimizers(self):
            return optimizer(self.parameters())

    pruner, watch = watched(fit, model=Net())
    for t in (4, 8):
        weights, state, masks, _ = watch.before[t - 1]
        now, state_now, masks_now = watch.after[t]
        for name, weight in weights.items():
            if name not in masks:
                assert torch.equal(now[name], weight)  # no step, no decay
            stays = masks[name] & masks_now[name] if name in masks else torch.ones_like(weight, dtype=torch.bool)
            new = masks_now[name] & ~masks[name] if name in masks else ~stays
            assert torch.equal(now[name][stays], weight[stays])
            assert not now[name][new].any()
            assert state[name].keys() == state_now[name].keys() != set()
            for key, value in state[name].items():
                if value.shape == weight.shape:
                    assert torch.equal(state_now[name][key][stays], value[stays])
                    assert not state_now[name][key][~stays].any()
                else:
                    assert torch.equal(state_now[name][key], value)
    assert pruner.regrown > 0


def test_every_other_step_is_made(fit):
    _, watch = watched(fit)
    moved = [t for t in range(15) if not torch.equal(watch.after[t][0]["fc.bias"], watch.after[t + 1][0]["fc.bias"])]
    assert moved == [t for t in range(15) if t not in (3, 7)]


def test_grown_weights_are_trained_from_zero(fit):
    _, watch = watched(fit)
    old, new = watch.after[3][2]["conv1.weight"], watch.after[4][2]["conv1.weight"]
    grown = new & ~old
    assert int(grown.sum()) > 2
    assert not watch.after[4][0]["conv1.weight"][grown].any()
    assert watch.after[5][0]["conv1.weight"][grown].all()


def test_a_weight_dropped_and_grown_in_one_update_keeps_value_and_momentum(fit):
    _, watch = watched(fit, alpha=1.0)  # so much is dropped that some of it comes back at once
    weights, state, masks, gradients = watch.before[3]
    fraction = drop_fraction(4, 12, 1.0)
    back = 0
    for name, mask in masks.items():
        active = int(mask.sum())
        kept = active - math.floor(fraction * active + 1e-9)
        smallest = weights[name].abs().masked_fill(~mask, torch.inf).flatten().argsort()[: active - kept]
        again = torch.zeros(mask.numel(), dtype=torch.bool)
        again[smallest] = True
        again = again.reshape(mask.shape) & watch.after[4][2][name]
        back += int(again.sum())
        assert torch.equal(watch.after[4][0][name][again], weights[name][again])
        momentum = watch.after[4][1][name]["momentum_buffer"]
        assert torch.equal(momentum[again], state[name]["momentum_buffer"][again])
    assert back > 10
    assert gradients.keys() >= masks.keys()


def test_growth_leaves_the_loss_as_it_was_and_gradients_of_the_grown_are_large(fit, tiny_net, make_loader):
    _, watch = watched(fit)
    images, labels = next(iter(make_loader()))
    losses = []
    for masks in (watch.after[3][2], watch.after[4][2]):
        model = tiny_net().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(watch.after[4][0][name] * masks.get(name, 1))
        losses.append(F.cross_entropy(model(images), labels))
    assert torch.equal(losses[0], losses[1])


def test_gradients_of_accumulated_batches_decide_together(fit):
    pruner = RigL(0.2, schedule=EVERY_4)
    watch = Watch(pruner)
    fit([watch, pruner], max_epochs=8, accumulate_grad_batches=2)
    weights, _, masks, gradients = watch.before[3]
    wanted = drop_and_grow(
        weights["conv1.weight"], masks["conv1.weight"], gradients["conv1.weight"].abs(), drop_fraction(4, 12)
    )
    assert torch.equal(watch.after[4][2]["conv1.weight"], wanted)
    assert pruner.steps == 16


def test_set_grows_anywhere_and_leaves_no_step_out(fit):
    _, watch = watched(fit, grow="random")
    for t in (4, 8):
        weights, _, masks = watch.after[t - 1]
        assert not torch.equal(weights["fc.bias"], watch.after[t][0]["fc.bias"])
        grown = {n: watch.after[t][2][n] & ~mask for n, mask in masks.items()}
        gradient = watch.before[t - 1][3]["conv1.weight"].abs()
        rank = gradient.flatten().argsort().argsort().reshape(gradient.shape)[grown["conv1.weight"]]
        assert rank.min() < 648 / 2  # the gradient would take the largest of what is off
    first, second = (watch.after[t][2]["conv1.weight"] & ~watch.after[t - 1][2]["conv1.weight"] for t in (4, 8))
    assert not torch.equal(first, second)


def test_a_fit_of_a_few_steps_trains_although_every_step_updates(fit):
    pruner = RigL(0.2)
    watch = Watch(pruner)
    fit([watch, pruner])
    assert [event.step for event in pruner.events] == [0, 1, 2, 3, 4, 5]
    assert all(not torch.equal(watch.after[t][0]["fc.bias"], watch.after[t + 1][0]["fc.bias"]) for t in range(7))
    assert pruner.regrown > 0


def test_budget_of_one_leaves_no_step_out(fit):
    class Counts(RigL):
        skipped = 0

        def skip_step(self, optimizer):
            self.skipped += 1

    Counts.__name__ = "RigL"
    whole, sparse = Counts(1.0, schedule=EVERY_4), Counts(0.9, schedule=EVERY_4)
    fit(whole, max_epochs=4)
    fit(sparse, max_epochs=4)
    assert (whole.skipped, sparse.skipped) == (0, 2)


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_a_layer_that_does_not_train_keeps_its_mask(fit, tiny_net, grow):
    model = tiny_net()
    model.conv1.weight.requires_grad_(False)
    pruner, watch = watched(fit, model=model, grow=grow)
    assert torch.equal(watch.after[0][2]["conv1.weight"], pruner.plan.masks["conv1.weight"])
    assert not torch.equal(watch.after[0][2]["conv2.weight"], pruner.plan.masks["conv2.weight"])
    assert watch.counts == [291] * 16


def test_a_draw_in_mid_fit_leaves_no_step_out(fit):
    pruner = RigL(0.2, schedule=Updates(every=4, start=0.25, end=0.75, least=1))
    watch = Watch(pruner)
    fit([watch, pruner], max_epochs=4)
    assert [event.step for event in pruner.events] == [4, 8]
    still = [t for t in range(15) if torch.equal(watch.after[t][0]["fc.bias"], watch.after[t + 1][0]["fc.bias"])]
    assert still == [7]


def test_a_layer_that_no_gradient_reached_keeps_its_mask(fit, tiny_net):
    class Skips(tiny_net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx < 3 else self.stem(batch[0]).square().mean()

    pruner, watch = watched(fit, model=Skips())
    for name in ("conv1.weight", "fc.weight"):
        assert torch.equal(watch.after[0][2][name], pruner.plan.masks[name])
    assert not torch.equal(watch.after[0][2]["stem.weight"], pruner.plan.masks["stem.weight"])


def test_a_bias_that_is_included_is_masked_as_well(fit):
    pruner = RigL(0.2, include=["hidden.bias"], schedule=EVERY_4)
    fit(pruner, max_epochs=4)
    assert "hidden.bias" in pruner.plan.masks


# optimizers and precisions


class ByHand(pl.LightningModule):
    """Body and head have an optimizer each; ``turns`` says which of them step with the n-th batch of an epoch."""

    def __init__(self, turns):
        super().__init__()
        self.turns = turns
        self.automatic_optimization = False
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 16)
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        self.stepped = []

    def forward(self, x):
        return self.head(torch.relu(self.body(x.flatten(1))))

    def training_step(self, batch, batch_idx):
        for turn in self.turns[batch_idx]:
            optimizer = self.optimizers()[turn]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.stepped.append((self.body.bias.detach().clone(), self.head.bias.detach().clone()))

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.body, self.head)]


def test_an_update_waits_until_every_optimizer_was_about_to_step(fit):
    torch.manual_seed(0)
    model = ByHand([[0], [1], [0], [1]])
    # due with the 4th step, of the head; the body follows with the 5th, and only then masks change
    pruner = RigL(0.3, schedule=EVERY_4, alpha=0.9)
    watch = Watch(pruner)
    fit([watch, pruner], model=model, max_epochs=4)
    changed = {
        name: [t for t in range(1, 16) if (watch.after[t][2][name] != watch.after[t - 1][2][name]).any()]
        for name in ("body.weight", "head.weight")
    }
    # steps of either optimizer count in the trainer, batches in ours
    assert changed == {"body.weight": [5, 9], "head.weight": [5, 9]}
    assert watch.counts == [int(0.3 * 1280)] * 16
    body, head = (
        [t for t in range(1, 16) if torch.equal(model.stepped[t][i], model.stepped[t - 1][i])] for i in (0, 1)
    )
    # each leaves out one of its own steps for an update: the head the one at 3, the body the one at 4
    assert [t for t in head if t % 2 == 1] == [3, 7]
    assert [t for t in body if t % 2 == 0] == [4, 8]


def test_an_optimizer_that_waits_for_another_leaves_out_one_step_only(fit):
    torch.manual_seed(0)
    model = ByHand([[0, 1], [0], [0], [0]])
    pruner = RigL(0.3, schedule=EVERY_4, alpha=0.9)
    fit(pruner, model=model, max_epochs=4)
    # due with the 4th batch, where the body leaves its step out; the head follows with the 5th, where the body steps
    assert [row["step"] for row in pruner.report.rows] == [0, 5, 9]
    body = [t for t in range(1, 16) if torch.equal(model.stepped[t][0], model.stepped[t - 1][0])]
    assert body == [3, 7]


class Overflows(Callback):
    """Makes the gradient of one step infinite."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, model):
        if trainer.global_step == self.step:
            model.conv1.weight.grad[0, 0, 0, 0] = torch.inf


class Clean(Callback):
    """As a user's hook may do it: weights stay finite, whatever the gradient was."""

    def on_before_optimizer_step(self, trainer, model, optimizer):
        for gradient in [p.grad for p in model.parameters() if p.grad is not None]:
            gradient.nan_to_num_(0.0, 0.0, 0.0)


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_weight(fit):
    with pytest.raises(NonFiniteScore, match=r"the gradient of 'conv1.weight', by which RigL grows weights, is NaN"):
        fit([Overflows(3), RigL(0.2, schedule=EVERY_4), Clean()], max_epochs=4)


def test_a_gradient_that_is_not_finite_is_waited_out_if_asked(fit):
    pruner = RigL(0.2, schedule=EVERY_4, on_nonfinite="postpone")
    watch = Watch(pruner)
    with pytest.warns(UserWarning, match="RigL postpones its event at step 4: the gradient of 'conv1.weight'"):
        fit([Overflows(3), watch, pruner, Clean()], max_epochs=4)
    assert torch.equal(watch.after[3][2]["conv1.weight"], watch.after[4][2]["conv1.weight"])
    assert not torch.equal(watch.after[4][2]["conv1.weight"], watch.after[5][2]["conv1.weight"])


def test_a_scaler_that_looks_for_its_scale_is_waited_for_without_a_word(fit):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    pruner = RigL(0.2, schedule=EVERY_4)
    watch = Watch(pruner)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit([Overflows(3), watch, pruner], max_epochs=4, plugins=[plugin])
    assert scaler.get_scale() == 2.0**7  # it skipped the step itself
    assert torch.equal(watch.after[3][2]["conv1.weight"], watch.after[4][2]["conv1.weight"])
    assert not torch.equal(watch.after[4][2]["conv1.weight"], watch.after[5][2]["conv1.weight"])
    assert pruner.events_done == 3
    assert watch.counts == [291] * 16


@pytest.mark.parametrize("grow", ["gradient", "random", "none"])
def test_fused_optimizers_under_a_scaler_are_refused_at_the_start_where_steps_are_left_out(fit, tiny_net, grow):
    class Net(tiny_net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, fused=True)

    pruner = RigL(0.2, grow=grow, schedule=EVERY_4 if grow != "none" else None)
    settings = {"model": Net(), "max_epochs": 4}
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    if grow != "gradient":
        fit(pruner, plugins=plugins, **settings)
        assert pruner.events_done == len(pruner.events)
        return
    before = copy.deepcopy(settings["model"].state_dict())
    with pytest.raises(RuntimeError, match=r"RigL leaves out .* a fused SGD under 16-mixed .* give .* fused=False"):
        fit(pruner, plugins=plugins, **settings)
    assert pruner.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in settings["model"].state_dict().items())
    fit(RigL(0.2, schedule=EVERY_4), **settings)  # without a scaler


def test_weights_that_are_not_finite_are_named_at_an_update(fit):
    class Breaks(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                model.fc.weight.data[model.fc.weight != 0] = torch.nan

    with pytest.raises(NonFiniteScore, match=r"'fc.weight' are NaN or infinite"):
        fit([Breaks(), RigL(0.1, schedule=EVERY_4, ignore=["stem", "hidden"], distribution="er")], max_epochs=4)


# with others, and what it says


def test_the_count_is_the_budgets_also_once_another_callback_cut_channels(fit, tiny_net):
    rigl = RigL(0.2, schedule=EVERY_4)
    cut = L1Filter(0.6, schedule=OneShot(8, unit="step"))
    # the cut comes with the second update, whose gradients are sliced with their weights
    model = fit([cut, rigl], model=tiny_net(), max_epochs=4).lightning_module
    assert sum(p.numel() for p in matrices(model).values()) < 1458
    assert sum(int(mask.sum()) for mask in rigl.plan.masks.values()) == 291
    assert sum(int(p.count_nonzero()) for p in matrices(model).values()) <= 291
    assert rigl.events_done == 3


def test_a_budget_of_flops_bounds_what_masks_leave(fit):
    pruner = RigL(Budget(0.3, of="flops"), schedule=EVERY_4)
    fit(pruner, max_epochs=4)
    rows = pruner.report.rows
    assert len(rows) == 3
    for row in rows:
        assert 0.299 * row["prune/flops"] < row["prune/flops_sparse"] <= 0.3 * row["prune/flops"]


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_flops_of_training_are_counted_step_by_step(fit, grow):
    pruner = RigL(0.2, schedule=EVERY_4, grow=grow)
    fit(pruner, max_epochs=4)
    dense = pruner.dense_cost.flops
    rows = pruner.report.rows
    sparse = rows[0]["prune/flops_sparse"]
    assert 0.1 * dense < sparse < 0.5 * dense
    assert rows[0]["prune/training_flops"] == 3 * sparse
    # 8 steps, two of which read dense gradients: 3 f_S each, and f_D - f_S more for those two
    wanted = 3 * sparse + (2 / 8 * (dense - sparse) if grow == "gradient" else 0)
    assert rows[2]["prune/training_flops"] == pytest.approx(wanted)
    assert rows[2]["prune/training_flops"] == pytest.approx(
        training_flops(sparse, dense, 3 if grow == "gradient" else None)
    )
    assert rows[2]["prune/training_flops_kept"] == pytest.approx(wanted / (3 * dense))


def test_flops_before_the_draw_are_dense(fit):
    pruner = RigL(0.2, grow="none", schedule=OneShot(8, unit="step"))
    fit(pruner, max_epochs=4)
    assert pruner.report.rows[0]["prune/training_flops_kept"] == 1.0


def test_scores_are_what_is_dropped_by(fit):
    class Spy(RigL):
        def scores(self, weights):
            self.seen = super().scores(weights)
            self.masks = {name: self.alive(name).clone() for name in weights}
            return self.seen

    Spy.__name__ = "RigL"
    pruner = Spy(0.2, schedule=EVERY_4)
    fit(pruner, max_epochs=4)
    for name, score in pruner.seen.items():
        assert torch.equal(score.isneginf(), ~pruner.masks[name])
        assert (score[pruner.masks[name]] >= 0).all()


def test_a_fit_goes_on_from_between_two_updates_with_the_same_masks(fit, save_each, tmp_path):
    whole, again = (RigL(0.2, schedule=EVERY_4, grow="random") for _ in range(2))
    first = fit([whole, save_each()], max_epochs=4, limit_train_batches=3)
    second = fit(again, max_epochs=4, limit_train_batches=3, ckpt_path=tmp_path / "epoch=1.ckpt", seed=3)
    assert [event.step for event in whole.events] == [0, 4, 8]
    assert whole.plan == again.plan
    assert whole.regrown == again.regrown > 0
    assert whole.report.rows[-1]["prune/training_flops"] == again.report.rows[-1]["prune/training_flops"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.lightning_module.parameters(), second.lightning_module.parameters(), strict=True)
    )
