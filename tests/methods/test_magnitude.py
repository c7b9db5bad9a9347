import pytest
import torch
from torch import nn

from lightning_prune import Budget, Gradual, Iterative, Magnitude, OneShot
from lightning_prune.methods.magnitude import han_threshold, magnitude_score

W = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, 0.6])
AT_3 = OneShot(3, unit="step")


def counts(callback):
    return {name: (int(mask.sum()), mask.numel()) for name, mask in callback.plan.masks.items()}


def test_score_is_the_absolute_value():
    assert magnitude_score(torch.tensor([[0.5, -2.0]])).tolist() == [[0.5, 2.0]]
    assert not magnitude_score(nn.Parameter(W)).requires_grad


def test_threshold_uses_the_standard_deviation_of_the_population():
    # 0.35940 * 1.05 = 0.37737 removes 3; the unbiased 0.39370 would give 0.41339 and remove 4
    threshold = han_threshold(W, 1.05)
    assert threshold == pytest.approx(0.37737, abs=1e-5)
    assert int((W.abs() < threshold).sum()) == 3


def test_threshold_of_a_second_round_is_of_the_survivors():
    # of (-0.4, 0.5, 0.6) it is 0.44969 and removes -0.4; with the zeros it is 0.33871, and iteration stalls
    after = torch.tensor([0.0, 0.0, 0.0, -0.4, 0.5, 0.6])
    assert han_threshold(after, 1.0, after != 0) == pytest.approx(0.44969, abs=1e-5)
    assert han_threshold(after, 1.0) == pytest.approx(0.33871, abs=1e-5)


def test_bad_thresholds_are_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        han_threshold(W, -1)
    with pytest.raises(ValueError, match=r"no weight of the \(6,\) tensor survives"):
        han_threshold(W, 1.0, torch.zeros(6, dtype=torch.bool))


def test_layer_scope_keeps_the_same_fraction_of_every_layer(fit):
    callback = Magnitude(0.2, schedule=AT_3)
    fit(callback)
    total = sum(size for _, size in counts(callback).values())
    assert sum(kept for kept, _ in counts(callback).values()) == int(0.2 * total)
    for kept, size in counts(callback).values():
        assert abs(kept - 0.2 * size) < 1


def test_global_scope_keeps_the_exact_count_in_total_alone(fit):
    callback = Magnitude(0.2, schedule=AT_3, scope="global")
    trainer = fit(callback)
    total = sum(size for _, size in counts(callback).values())
    assert sum(kept for kept, _ in counts(callback).values()) == int(0.2 * total)
    assert max(abs(kept - 0.2 * size) for kept, size in counts(callback).values()) > 2
    assert trainer.lightning_module is not None


def test_global_scope_keeps_the_largest_of_all_layers(fit, tiny_net):
    model = tiny_net()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
    callback = Magnitude(0.3, schedule=OneShot(0, unit="step"), scope="global")
    fit(callback, model=model)
    values = torch.cat([before[name][mask].abs() for name, mask in callback.plan.masks.items()])
    gone = torch.cat([before[name][~mask].abs() for name, mask in callback.plan.masks.items()])
    assert values.min() >= gone.max()


def test_ties_still_give_the_exact_count(fit, tiny_net):
    model = tiny_net()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    for scope in ("layer", "global"):
        callback = Magnitude(0.3, schedule=OneShot(0, unit="step"), scope=scope)
        fit(callback, model=model)
        total = sum(size for _, size in counts(callback).values())
        assert sum(kept for kept, _ in counts(callback).values()) == int(0.3 * total)


@pytest.mark.parametrize("schedule", [Gradual(start=0.1, end=0.9, events=5), Iterative(start=0.1, end=0.9, events=4)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_only_lose(fit, schedule, scope):
    class Spy(Magnitude):
        def select(self, *args):
            masks = super().select(*args)
            self.seen.append({name: mask.clone() for name, mask in masks.items()})
            return masks

    callback = Spy(0.1, schedule=schedule, scope=scope)
    callback.seen = []
    fit(callback, max_epochs=3)
    assert len(callback.seen) == len(callback.events) > 3
    for earlier, later in zip(callback.seen, callback.seen[1:], strict=False):
        assert not any((later[name] & ~earlier[name]).any() for name in earlier)
        assert sum(int(m.sum()) for m in later.values()) < sum(int(m.sum()) for m in earlier.values())


def test_weight_that_went_is_out_of_the_ranking_also_where_others_are_at_zero(fit):
    class Spy(Magnitude):
        def scores(self, weights):
            out = super().scores(weights)
            self.seen = {name: (score, self.alive(name)) for name, score in out.items()}
            return out

    callback = Spy(0.2, schedule=Iterative(start=2, end=4, events=2, unit="step"))
    fit(callback)
    for score, alive in callback.seen.values():
        assert torch.equal(score.isneginf(), ~alive)
        assert 0 < alive.sum() < alive.numel()


def test_weight_that_is_zero_before_pruning_is_not_counted_as_pruned(fit, tiny_net):
    model = tiny_net()
    nn.init.zeros_(model.hidden.weight)
    callback = Magnitude(0.9, schedule=OneShot(0, unit="step"))
    fit(callback, model=model)
    assert counts(callback)["hidden.weight"][0] == pytest.approx(0.9 * 72, abs=1)


def test_biases_and_norms_are_left_alone(fit):
    callback = Magnitude(0.05, schedule=AT_3)
    fit(callback)
    assert sorted(callback.plan.masks) == [f"{name}.weight" for name in ("conv1", "conv2", "fc", "hidden", "stem")]


def test_survivors_train_on_from_their_values(fit, tiny_net):
    model = tiny_net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    callback = Magnitude(0.5, schedule=OneShot(0, unit="step"))
    fit(callback, model=model, limit_train_batches=1, max_epochs=1)
    for name, mask in callback.plan.masks.items():
        after = dict(model.named_parameters())[name]
        assert (after[mask] - before[name][mask]).abs().max() < 0.1
        assert not torch.equal(after[mask], before[name][mask])


def test_every_schedule_ends_at_the_budget(fit):
    for schedule in (OneShot(0.5), Iterative(start=0.1, end=0.8, events=3), Gradual(start=0.0, end=0.8, events=7)):
        callback = Magnitude(Budget(0.1), schedule=schedule)
        fit(callback, max_epochs=3)
        total = sum(size for _, size in counts(callback).values())
        assert sum(kept for kept, _ in counts(callback).values()) == int(0.1 * total)
