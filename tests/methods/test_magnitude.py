import copy
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import Budget, Gradual, Iterative, L1Filter, Magnitude, OneShot, find_dead, trace
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.methods.magnitude import han_threshold, lowered_dropout, magnitude_score
from lightning_prune.ranking import rank_weights
from lightning_prune.sensitivity import deviations

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


AT_0 = OneShot(0, unit="step")
ROUNDS = Iterative(start=1, end=5, events=3, unit="step")


class Digits(pl.LightningModule):
    """A network of linear layers with dropout, as LeNet-300-100."""

    def __init__(self, widths=(64, 12, 8, 3), bias=True):
        super().__init__()
        self.drop1, self.drop2 = nn.Dropout(0.2), nn.Dropout(0.5)
        self.fc1, self.fc2, self.fc3 = (nn.Linear(n, m, bias) for n, m in pairwise(widths))
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x):
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(self.drop1(x)))
        return self.fc3(self.drop2(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def digits(seed=0, **settings):
    torch.manual_seed(seed)
    return Digits(**settings)


def total(callback):
    return sum(int(mask.sum()) for mask in callback.plan.masks.values())


# thresholds


def test_one_quality_factor_for_all_layers_is_a_threshold_in_each(fit, tiny_net):
    model = tiny_net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    callback = Magnitude(0.3, threshold="quality", schedule=AT_0)
    fit(callback, model=model)
    for name, mask in callback.plan.masks.items():
        threshold = han_threshold(before[name], callback.quality_factor)
        assert torch.equal(mask, before[name].abs().double() >= threshold * (1 - 1e-12))
    everything = sum(mask.numel() for mask in callback.plan.masks.values())
    assert total(callback) == int(0.3 * everything)


def test_quality_keeps_more_of_layers_with_long_tails_than_one_density_and_one_ranking_do(fit):
    model = digits()
    with torch.no_grad():
        model.fc1.weight.uniform_(-1, 1)
        model.fc2.weight.copy_(0.01 * torch.randn(8, 12).pow(3))  # small, but a few stand out
    kept = {}
    for name, rule in {"layer": {}, "global": {"scope": "global"}, "quality": {"threshold": "quality"}}.items():
        callback = Magnitude(0.2, schedule=AT_0, **rule)
        fit(callback, model=copy.deepcopy(model))
        kept[name] = int(callback.plan.masks["fc2.weight"].sum())
    assert kept["global"] == 0
    assert kept["layer"] == pytest.approx(0.2 * 96, abs=1)
    assert 0 < kept["quality"] < 0.8 * kept["layer"]  # a uniform layer of the same spread loses fewer at that q


def test_quality_meets_the_count_at_every_event_of_survivors_alone(fit):
    class Spy(Magnitude):
        def select(self, scores, allowance, price):
            masks = super().select(scores, allowance, price)
            self.seen.append((sum(int(m.sum()) for m in masks.values()), int(allowance), self.quality_factor))
            self.used.append((scores, {n: (w.detach().clone(), self.alive(n)) for n, w in self.weights.items()}))
            return masks

    callback = Spy(0.1, threshold="quality", schedule=ROUNDS)
    callback.seen, callback.used = [], []
    fit(callback)
    assert [kept for kept, *_ in callback.seen] == [allowed for _, allowed, _ in callback.seen]
    assert len(callback.seen) == 3
    for scores, weights in callback.used:
        for name, (weight, alive) in weights.items():
            torch.testing.assert_close(scores[name][alive], deviations(weight, alive)[alive])
    assert callback.report.rows[-1]["prune/quality"] == callback.quality_factor == callback.seen[-1][2]


def test_factors_of_layers_remove_what_is_below_their_thresholds(fit, tiny_net):
    model = tiny_net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    callback = Magnitude(quality={"conv*": 1.0, "fc": 0.5}, schedule=AT_0)
    fit(callback, model=model)
    factors = {"conv1.weight": 1.0, "conv2.weight": 1.0, "fc.weight": 0.5, "stem.weight": 0.0, "hidden.weight": 0.0}
    for name, mask in callback.plan.masks.items():
        assert torch.equal(mask, before[name].abs().double() >= han_threshold(before[name], factors[name]))
        assert bool(mask.all()) == (factors[name] == 0)


def test_second_round_of_factors_is_of_the_survivors(fit):
    model = digits()
    with torch.no_grad():
        model.fc3.weight[0, :6] = W  # (-0.4, 0.5, 0.6) survive q = 1.05; of these q = 1.05 removes -0.4
        model.fc3.weight[0, 6:] = model.fc3.weight[1:] = 0

    class Frozen(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model.__class__ = Frozen
    callback = Magnitude(quality={"fc3": 1.05}, schedule=Iterative(start=1, end=3, events=2, unit="step"))
    with torch.no_grad():  # 24 entries, of which 6 are not zero: make the others survive nothing
        model.fc3.weight[model.fc3.weight == 0] = 1e-9
    spread = model.fc3.weight.double().std(correction=0)
    first = model.fc3.weight.detach().abs().double() >= 1.05 * spread
    again = model.fc3.weight.detach().abs().double() >= han_threshold(model.fc3.weight, 1.05, first)
    fit(callback, model=model)
    assert torch.equal(callback.plan.masks["fc3.weight"], first & again)
    assert int(first.sum()) > int((first & again).sum()) > 0


def test_rounds_of_factors_default_to_one():
    assert Magnitude(quality=1.0).schedule == OneShot(0.5)
    assert Magnitude(quality=1.0, schedule=ROUNDS).schedule == ROUNDS
    assert Magnitude(0.1, threshold="quality").schedule == Magnitude.default_schedule


def test_layer_that_loses_everything_to_its_factor_is_named(fit):
    with pytest.warns(UserWarning, match=r"leaves no weight of fc2.weight, .* or lower quality="):
        fit(Magnitude(quality={"fc2": 50.0}, schedule=AT_0), model=digits())


def test_layers_keep_their_own_densities_and_the_others_share_the_rest(fit):
    callback = Magnitude(0.2, keep={"fc3": 0.75, "fc*": 0.5, "fc1": 0.1}, ignore=["fc2"], schedule=AT_3)
    with pytest.raises(ValueError, match="leaves nothing to a budget"):
        fit(callback, model=digits())
    callback = Magnitude(0.2, keep={"fc3": 0.75}, schedule=AT_3)
    fit(callback, model=digits())
    assert counts(callback)["fc3.weight"] == (18, 24)
    assert total(callback) == int(0.2 * 888)
    for name, size in (("fc1.weight", 768), ("fc2.weight", 96)):  # (177 - 18) / 864 of each
        assert abs(counts(callback)[name][0] - (177 - 18) / 864 * size) < 1


def test_densities_without_a_budget_leave_the_other_layers_whole(fit):
    callback = Magnitude(keep={"fc3": 0.75, "fc[23]": 0.25}, schedule=Gradual(start=0.0, end=0.8, events=3))
    fit(callback, model=digits())
    assert counts(callback) == {"fc1.weight": (768, 768), "fc2.weight": (24, 96), "fc3.weight": (18, 24)}


def test_densities_that_cost_more_than_the_budget_are_refused_at_the_start(fit):
    model = digits()
    with pytest.raises(UnmeetableBudget, match=r"cost 207 more than a budget of 0\.2 of the units"):
        fit(Magnitude(0.2, keep={"fc1": 0.5}), model=model)  # 384 of 177


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "wants a budget, or keep= with densities, or quality="),
        ({"budget": 0.1, "quality": 1.0}, "goes without budget=, keep= and scope="),
        ({"keep": {"a": 0.1}, "quality": 1.0}, "goes without budget="),
        ({"scope": "layer", "quality": 1.0}, "goes without budget="),
        ({"budget": 0.1, "threshold": "quality", "scope": "layer"}, "one quality factor for all layers"),
        ({"budget": 0.1, "threshold": "quality", "keep": {"a": 0.1}}, "one quality factor for all layers"),
        ({"threshold": "quality"}, "wants a budget"),
        ({"budget": 0.1, "threshold": "std"}, "threshold must be one of 'density', 'quality', got 'std'"),
        ({"quality": -1.0}, "at least 0, got -1"),
        ({"quality": {"a": float("inf")}}, "finite number of at least 0, got inf"),
        ({"budget": 0.1, "keep": {"a": 0.0}}, "keep must be in"),
    ],
)
def test_contradictions_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Magnitude(**settings)


def test_patterns_that_mean_no_pruned_weight_are_refused(fit):
    for settings in ({"keep": {"fc1.bias": 0.5}}, {"quality": {"fc1.bias": 0.5}}):
        with pytest.raises(ValueError, match=r"pattern 'fc1.bias' means no weight that is pruned"):
            fit(Magnitude(**settings), model=digits())
    with pytest.raises(ValueError, match="keep pattern 'fc9' matches no module"):
        fit(Magnitude(keep={"fc9": 0.5}), model=digits())


@pytest.mark.parametrize("rule", [{"quality": 1.0}, {"keep": {"fc2": 0.5}}, {"budget": 0.5}], ids=str)
def test_weights_that_are_not_numbers_are_refused_by_every_rule(fit, rule):
    model = digits()
    with torch.no_grad():
        model.fc2.weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteScore, match=r"weights of 'fc2.weight' are NaN or infinite"):
        fit(Magnitude(schedule=AT_0, **rule), model=model)


# dropout


def test_dropout_falls_with_the_square_root_of_the_connections():
    # sqrt(0.09) = 0.3; a second full correction, from 0.27386 after 30 %, would give 0.0822
    assert lowered_dropout(0.5, 9, 100) == pytest.approx(0.15)
    assert lowered_dropout(0.5, 30, 100) == pytest.approx(0.27386, abs=1e-5)
    assert lowered_dropout(0.5, 100, 100) == 0.5


def test_dropout_in_front_of_each_layer_is_found_and_lowered_always_from_the_dense_network(fit):
    model = digits()
    callback = Magnitude(keep={"fc2": 0.09, "fc3": 0.25}, dropout=True, schedule=ROUNDS)
    fit(callback, model=model)
    assert counts(callback)["fc2.weight"] == (8, 96)  # 8.64 rounded down
    assert counts(callback)["fc3.weight"] == (6, 24)
    assert model.drop1.p == pytest.approx(0.2 * (8 / 96) ** 0.5)
    assert model.drop2.p == pytest.approx(0.5 * 0.5)
    assert callback.dropouts == {"drop1": (0.2, model.drop1.p), "drop2": (0.5, model.drop2.p)}
    logged = [row["prune/dropout/drop2"] for row in callback.report.rows]
    assert logged == sorted(logged, reverse=True)
    assert logged[-1] == model.drop2.p < logged[0] < 0.5
    callback.restore_dropout(model)
    assert (model.drop1.p, model.drop2.p) == (0.2, 0.5)


def test_dropout_feeds_through_reshaping_and_activations_and_not_through_layers(fit):
    class Otherwise(Digits):
        def forward(self, x):
            x = F.relu(self.fc2(F.relu(self.fc1(self.drop1(x).flatten(1)))))
            return self.fc3(F.relu(self.drop2(x).reshape(-1, 8)))

    torch.manual_seed(0)
    model = Otherwise()
    fit(Magnitude(keep={"fc2": 0.09, "fc3": 0.25}, dropout=True, schedule=AT_0), model=model)
    assert (model.drop1.p, model.drop2.p) == (0.2, 0.25)


def test_dropout_is_left_alone_unless_asked(fit):
    model = digits()
    fit(Magnitude(0.1, schedule=AT_0), model=model)
    assert (model.drop1.p, model.drop2.p) == (0.2, 0.5)


def test_dropout_may_be_told_what_it_feeds(fit):
    model = digits()
    callback = Magnitude(keep={"fc[12]": 0.25}, dropout={"drop1": "fc[12]"}, schedule=AT_0)
    fit(callback, model=model)
    assert model.drop1.p == pytest.approx(0.1)  # 216 of 864: half of 0.2
    assert model.drop2.p == 0.5


def test_dropout_that_is_not_there_is_refused(fit, tiny_net):
    with pytest.raises(ValueError, match=r"dropout=True found no nn.Dropout in front of"):
        fit(Magnitude(0.1, dropout=True))
    with pytest.raises(ValueError, match="dropout= names 'fc1', which is no module with"):
        fit(Magnitude(0.1, dropout={"fc1": "fc2"}), model=digits())


def test_dropout_of_a_fit_that_goes_on_is_as_it_was_from_its_first_batch(fit, save_each, tmp_path):
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_start(self, trainer, model, *_):
            self.seen[trainer.global_step] = (model.drop1.p, model.drop2.p)

    seen = []
    for others, settings in (([save_each()], {}), ([], {"ckpt_path": tmp_path / "epoch=0.ckpt"})):
        watch, callback = Watch(), Magnitude(0.1, dropout=True, schedule=ROUNDS)
        fit([callback, watch, *others], model=digits(), max_epochs=3, **settings)
        seen.append((callback.dropouts, watch.seen))
    (whole, before), (resumed, after) = seen
    assert resumed == whole
    assert after == {step: dropouts for step, dropouts in before.items() if step >= 4}
    assert before[0] == (0.2, 0.5) != after[4]


def test_dropout_follows_cuts_of_another_callback(fit):
    model = digits()
    callback = Magnitude(1.0, dropout=True, schedule=AT_0)
    cutter = L1Filter(0.5, schedule=AT_3)
    with pytest.warns(UserWarning, match="changed nothing"):
        fit([callback, cutter], model=model)
    assert model.fc3.in_features < 8
    assert model.drop2.p == pytest.approx(0.5 * (model.fc3.in_features / 8) ** 0.5)


# dead units


def no_dead(model, masks):
    return len(find_dead(trace(model, model.example_input_array), masks)) == 0


RULES = {"layer": (0.15, {}), "global": (0.04, {"scope": "global"}), "quality": (0.04, {"threshold": "quality"})}


@pytest.mark.parametrize(("keep", "rule"), RULES.values(), ids=RULES)
def test_dead_units_lose_everything_and_the_count_is_exact_at_every_event(fit, keep, rule):
    class Spy(Magnitude):
        def set_masks(self, masks):
            self.seen.append((self._dead, {name: mask.clone() for name, mask in masks.items()}))
            return super().set_masks(masks)

    plain = Magnitude(keep, schedule=ROUNDS, **rule)
    fit(plain, model=digits())
    model = digits()
    assert not no_dead(model, plain.plan.masks)
    callback = Spy(keep, schedule=ROUNDS, remove_dead=True, **rule)
    callback.seen = []
    fit(callback, model=model)
    graph = trace(model, model.example_input_array)
    for event, (dead, masks) in zip(callback.events, callback.seen, strict=True):
        assert sum(int(mask.sum()) for mask in masks.values()) == Budget(keep, "units").at(event.progress).limit(888)
        found = find_dead(graph, masks)
        assert len(found) == dead
        for layer, reader, group in (("fc1", "fc2", "fc1"), ("fc2", "fc3", "fc2")):
            units = found.of(group)
            assert not masks[f"{layer}.weight"][units].any()
            assert not masks[f"{reader}.weight"][:, units].any()
    assert callback.dead == callback.seen[-1][0] > 0
    assert callback.report.rows[-1]["prune/dead"] == callback.dead


def test_what_a_unit_without_inputs_said_is_in_the_next_bias(fit):
    class Untrained(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    model = Untrained()
    with torch.no_grad():
        model.fc1.weight[2] *= 1e-3  # goes as a whole
        model.fc1.bias[2] = 0.3
    column, bias = model.fc2.weight.detach()[:, 2].clone(), model.fc2.bias.detach().clone()
    callback = Magnitude(0.5, keep={"fc[23]": 0.9}, schedule=AT_0, remove_dead=True)
    fit(callback, model=model)
    assert not callback.plan.masks["fc2.weight"][:, 2].any()
    # b2 += w * relu(0.3)
    torch.testing.assert_close(model.fc2.bias.detach(), bias + 0.3 * column)
    assert callback.dead == 1


def test_masked_network_computes_the_same_once_dead_units_are_gone(fit):
    class Untrained(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    outputs = []
    x = torch.randn(16, 1, 8, 8)
    for remove_dead in (False, True):
        torch.manual_seed(0)
        model = Untrained()
        with torch.no_grad():
            model.fc1.weight[2:5] *= 1e-3
            model.fc1.bias[2:5] = torch.tensor([0.3, -0.3, 0.8])
        # all that fc1 loses is in these rows, so that the other layers stay whole and freed weights find no taker
        callback = Magnitude(quality={"fc1": 0.02}, schedule=AT_0, remove_dead=remove_dead)
        fit(callback, model=model)
        outputs.append(model.eval()(x).detach())
        removed = not callback.plan.masks["fc2.weight"][:, 2:5].any()
        assert removed == remove_dead
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-6


def test_unit_whose_constant_finds_no_bias_keeps_its_weights(fit):
    model = digits()
    model.fc2 = nn.Linear(12, 8, bias=False)
    with torch.no_grad():
        model.fc1.weight[2:4] *= 1e-3
        model.fc1.bias[2], model.fc1.bias[3] = 0.3, -0.3  # unit 3 says 0, and may go
    callback = Magnitude(0.5, keep={"fc[23]": 0.8}, schedule=AT_0, remove_dead=True)
    fit(callback, model=model, limit_train_batches=1, max_epochs=1)
    assert not callback.plan.masks["fc1.weight"][2:4].any()
    assert callback.plan.masks["fc2.weight"][:, 2].any()
    assert not callback.plan.masks["fc2.weight"][:, 3].any()


def test_count_comes_before_dead_units_where_too_few_weights_are_left(fit):
    model = digits()
    with torch.no_grad():
        model.fc1.weight[:11] *= 1e-3
        model.fc1.bias.zero_()
    callback = Magnitude(keep={"fc1": 0.0834, "fc2": 0.99}, schedule=AT_0, remove_dead=True)
    fit(callback, model=model)  # eleven units of twelve are silent, but fc2 is to lose one weight only
    assert counts(callback)["fc1.weight"] == (64, 768)
    assert counts(callback)["fc2.weight"] == (95, 96)


def test_by_layer_no_part_of_the_count_is_lost_where_few_weights_are_left():
    # 12 / 30 of each: 4 of a, which has 1 left, and 8 of b; what a leaves makes it 11 / 20 of b: more than its 10
    a, b = torch.full((10,), -torch.inf), torch.full((20,), -torch.inf)
    a[0], b[:10] = 1.0, torch.arange(10.0)
    masks = rank_weights({"a": a, "b": b}, 12, scope="layer")
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 1, "b": 10}


def test_convolutions_lose_their_dead_channels_too(fit, tiny_net):
    model = tiny_net()
    callback = Magnitude(0.05, scope="global", schedule=ROUNDS, remove_dead=True)
    trainer = fit(callback, model=model)
    everything = sum(mask.numel() for mask in callback.plan.masks.values())
    assert total(callback) == int(0.05 * everything)
    assert callback.dead > 0
    assert trainer.global_step == 8


def test_fit_that_goes_on_finds_the_same_dead_units_and_factors(fit, save_each, tmp_path):
    def make():
        schedule = Iterative(start=2, end=10, events=3, unit="step")
        return Magnitude(0.05, threshold="quality", remove_dead=True, schedule=schedule)

    whole, resumed = make(), make()
    first = fit([whole, save_each()], max_epochs=4).lightning_module
    second = fit(resumed, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt", seed=7).lightning_module
    assert (resumed.dead, resumed.quality_factor) == (whole.dead, whole.quality_factor)
    assert resumed.plan == whole.plan
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert resumed.report.rows[0]["prune/quality"] == whole.report.rows[0]["prune/quality"]


def test_dead_units_are_found_in_a_network_that_another_callback_cuts(fit):
    model = digits()
    callback = Magnitude(0.04, scope="global", schedule=OneShot(5, unit="step"), remove_dead=True)
    fit([callback, L1Filter(0.5, schedule=AT_3)], model=model)
    assert model.fc1.out_features < 12
    masks = {name: p != 0 for name, p in model.named_parameters() if p.ndim > 1}
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.04 * 888)
    assert len(find_dead(trace(model, model.example_input_array), masks)) == callback.dead > 0


def test_average_of_the_weights_gets_the_constants_too(fit):
    class Untrained(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Average(pl.Callback):
        def on_fit_start(self, trainer, model):
            self.copy = copy.deepcopy(model)

    torch.manual_seed(0)
    model, average = Untrained(), Average()
    with torch.no_grad():
        model.fc1.weight[2] *= 1e-3
        model.fc1.bias[2] = 0.3
    before = model.fc2.bias.detach().clone()
    callback = Magnitude(0.5, keep={"fc[23]": 0.9}, schedule=AT_0, remove_dead=True)
    fit([average, callback], model=model)
    assert not torch.equal(average.copy.fc2.bias, before)
    assert torch.equal(average.copy.fc2.bias, model.fc2.bias)


# local retraining


def test_frozen_layers_train_until_the_first_event_and_not_after(fit):
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, model, *_):
            self.seen.append(model.fc1.weight.detach().clone())

    watch = Watch()
    callback = Magnitude(0.9, schedule=AT_3, ignore=["fc1"], freeze=["fc1"])
    trainer = fit([callback, watch], model=digits())
    assert not torch.equal(watch.seen[0], watch.seen[2])
    assert all(torch.equal(watch.seen[2], later) for later in watch.seen[3:])
    assert not torch.equal(trainer.lightning_module.fc2.bias, digits().fc2.bias)
    with pytest.raises(ValueError, match="freeze pattern 'fc9' matches no"):
        fit(Magnitude(0.5, freeze=["fc9"]), model=digits())
