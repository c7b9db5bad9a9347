import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import SNIP, Budget, Iterative, L1Filter, OneShot
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.methods.snip import snip_score, variance_scaled
from tests.nets import NETS

W = torch.tensor([[2.0, 3.5], [0.5, 1.5]])
# y = Wx = (9.5, 3) of x = (3, 1), minus t = (8.5, 5), is (1, -2); dL/dW = (1, -2) x^T
GRADIENT = torch.tensor([[3.0, 1.0], [-6.0, -2.0]])


class Line(pl.LightningModule):
    """y = Wx, with half of the squared error, summed over outputs, as its loss."""

    def __init__(self, weight=W):
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.fc.weight.data = weight.clone()
        self.factor = 1.0

    def forward(self, x):
        return self.fc(x)

    def training_step(self, batch, batch_idx):
        return self.factor * 0.5 * (self(batch[0]) - batch[1]).square().sum(dim=1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Learner(pl.LightningModule):
    """A classifier around any network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        return F.cross_entropy(out.flatten(2).mean(2) if out.ndim > 2 else out, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def pairs(x, y, batch_size=1):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size)


LINE = pairs(torch.tensor([[3.0, 1.0]]), torch.tensor([[8.5, 5.0]]))


class Spy(SNIP):
    """Keeps what it scored, and what there was when it did."""

    def scores(self, weights):
        self.before = {name: weight.detach().clone() for name, weight in weights.items()}
        self.seen = super().scores(weights)
        return self.seen


def kept(callback):
    return {name: int(mask.sum()) for name, mask in callback.plan.masks.items()}


def test_score_is_weight_times_gradient_as_a_share_of_all():
    score = snip_score({"w": W}, {"w": GRADIENT})["w"]
    # |W g| = [[6, 3.5], [3, 3]], of 15.5
    assert torch.allclose(score, torch.tensor([[6, 3.5], [3, 3]], dtype=torch.float64) / 15.5)
    # neither the largest weight nor the largest gradient
    assert (int(score.argmax()), int(W.argmax()), int(GRADIENT.abs().argmax())) == (0, 1, 2)


def test_scores_of_all_tensors_together_add_up_to_one():
    scores = snip_score({"a": W, "b": torch.ones(3)}, {"a": GRADIENT, "b": torch.full((3,), 2.0)})
    assert sum(float(score.sum()) for score in scores.values()) == pytest.approx(1)
    assert scores["b"].tolist() == pytest.approx([2 / 21.5] * 3)


def test_score_is_refused_where_the_loss_feels_nothing():
    with pytest.raises(NonFiniteScore, match="every weight times its gradient is 0"):
        snip_score({"w": torch.zeros(2)}, {"w": torch.ones(2)})


@pytest.mark.parametrize(("keep", "mask"), [(0.25, [[1, 0], [0, 0]]), (0.5, [[1, 1], [0, 0]])])
def test_fit_keeps_what_the_hand_case_says(fit, keep, mask):
    callback = Spy(keep)
    fit(callback, Line(), LINE, max_epochs=1)
    assert callback.seen["fc.weight"].flatten().tolist() == pytest.approx([6 / 15.5, 3.5 / 15.5, 3 / 15.5, 3 / 15.5])
    assert callback.plan.masks["fc.weight"].int().tolist() == mask


@pytest.mark.parametrize("name", ["lstm_stacked", "gru", "recurrent_cells", "padded_shortcuts", "conv1d"])
def test_score_is_the_derivative_by_a_switch_on_each_weight(name, fit):
    example = NETS[name]
    torch.manual_seed(0)
    net = example.build()
    x, y = example.inputs(4), torch.arange(4) % 3
    callback = Spy(0.5, samples=4)
    fit(callback, Learner(net), pairs(x, y, 4), max_epochs=1)
    torch.manual_seed(0)
    net = example.build()
    parameters = dict(net.named_parameters())
    switches = {n: torch.ones_like(p, requires_grad=True) for n, p in parameters.items() if f"net.{n}" in callback.seen}
    switched = {n: p.detach() * switches[n] if n in switches else p.detach() for n, p in parameters.items()}
    loss = F.cross_entropy(torch.func.functional_call(net, switched, (x,)), y)
    by_switch = torch.autograd.grad(loss, list(switches.values()))
    total = sum(float(g.abs().sum()) for g in by_switch)
    for n, g in zip(switches, by_switch, strict=True):
        assert torch.allclose(callback.seen[f"net.{n}"].float(), g.abs() / total, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["lstm", "gru_stacked_bidirectional", "padded_shortcuts"])
def test_count_is_exact_and_zeros_stay_zeros_in_convolutions_and_gates(name, fit):
    example = NETS[name]
    torch.manual_seed(0)
    model = Learner(example.build())
    callback = SNIP(0.1, samples=8)
    fit(callback, model, pairs(example.inputs(8), torch.arange(8) % 3, 4), max_epochs=2)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    total = sum(p.numel() for p in matrices.values())
    assert sum(kept(callback).values()) == int(0.1 * total)
    assert sum(int(p.count_nonzero()) for p in matrices.values()) == int(0.1 * total)
    # one ranking: with the same fraction in each layer it would be another method
    densities = [float(mask.float().mean()) for mask in callback.plan.masks.values()]
    assert max(densities) > 2 * min(densities)


def test_gradients_of_batches_are_summed_with_their_signs(fit):
    # errors 1 and -1 at x = (1, 0), 1 at x = (0, 0.5): the first weight's gradients cancel, whatever the batches
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    y = x @ W.T - torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    for batch_size in (1, 2, 3, 4):
        callback = Spy(0.25, samples=4)
        fit(callback, Line(), pairs(x, y, batch_size), max_epochs=1)
        assert callback.seen["fc.weight"].flatten().tolist() == pytest.approx([0, 1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("samples", [1, 8, 20])
def test_at_least_so_many_samples_are_looked_at(fit, samples, make_loader):
    class Count(SNIP):
        looked = 0

        def loss(self, batch):
            self.looked += len(batch[0])
            return super().loss(batch)

    callback = Count(0.5, samples=samples)
    fit(callback)
    assert callback.looked == -(-samples // 8) * 8


def test_a_larger_loss_changes_nothing(fit):
    plain, larger, model = Spy(0.5), Spy(0.5), Line()
    fit(plain, Line(), LINE, max_epochs=1)
    model.factor = 1000.0
    fit(larger, model, LINE, max_epochs=1, limit_train_batches=1)
    assert torch.allclose(plain.seen["fc.weight"], larger.seen["fc.weight"])
    assert plain.plan == larger.plan


def test_scaling_one_layer_up_and_the_next_one_down_changes_no_score(fit):
    class Two(Line):
        def __init__(self, factor):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(2, 3, bias=False)
            self.fc = nn.Linear(3, 2, bias=False)
            self.first.weight.data *= factor
            self.fc.weight.data /= factor

        def forward(self, x):
            return self.fc(F.relu(self.first(x)))

    seen = []
    for factor in (1.0, 2.0):
        callback = Spy(0.5)
        fit(callback, Two(factor), LINE, max_epochs=1)
        seen.append((callback.seen, callback.before))
    (scores, weights), (scaled, others) = seen
    for name in scores:
        assert torch.allclose(scores[name], scaled[name], rtol=1e-5)
        assert not torch.allclose(weights[name], others[name])


def test_survivors_start_from_their_initial_values_and_no_step_is_lost(fit, tiny_net):
    class First(pl.Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if trainer.global_step == 0:
                self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
                self.state = {k: dict(v) for k, v in trainer.optimizers[0].state.items()}

    first, model = First(), tiny_net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    callback = SNIP(0.2)
    seen = []
    loss = callback.loss
    callback.loss = lambda batch: (seen.append({n: b.clone() for n, b in model.named_buffers()}), loss(batch))[1]
    trainer = fit([callback, first], model=model)
    for name, mask in callback.plan.masks.items():
        assert torch.equal(first.weights[name], before[name] * mask)
    assert first.state == {}
    assert len(seen) > 1
    assert all(torch.equal(buffers[n], b) for n, b in seen[-1].items())  # running statistics come back
    assert trainer.global_step == callback.steps == 8


def test_accumulating_batches_changes_neither_scores_nor_masks(fit):
    plain, accumulated = Spy(0.3), Spy(0.3)
    fit(plain)
    fit(accumulated, accumulate_grad_batches=4)
    assert plain.plan == accumulated.plan


def test_norms_score_by_the_batch_or_by_their_running_statistics(fit, tiny_net):
    plans = {}
    for bn_eval in (False, True):
        model = tiny_net()
        modes = []
        model.norm1.register_forward_hook(lambda m, args, out, modes=modes: modes.append(m.training))
        callback = Spy(0.3, bn_eval=bn_eval, samples=8)
        callback.loss = lambda batch, modes=modes, c=callback: (modes.clear(), type(c).loss(c, batch))[1]
        fit(callback, model=model, limit_train_batches=1, max_epochs=1)
        plans[bn_eval] = callback.seen
        assert modes[0] is not bn_eval
        assert model.norm1.training
    assert not torch.allclose(plans[False]["stem.weight"], plans[True]["stem.weight"])


def test_layer_scope_keeps_the_same_fraction_of_every_layer(fit):
    callback = SNIP(0.2, scope="layer")
    fit(callback)
    for name, count in kept(callback).items():
        assert abs(count - 0.2 * callback.plan.masks[name].numel()) < 1


def test_layer_without_a_weight_is_warned_of_and_a_floor_prevents_it(fit):
    with pytest.warns(UserWarning, match=r"SNIP leaves no weight of \w+\.weight"):
        fit(SNIP(0.005))
    callback = SNIP(0.02, min_keep_per_layer=3)
    fit(callback)
    assert min(kept(callback).values()) >= 3
    assert sum(kept(callback).values()) == int(0.02 * sum(m.numel() for m in callback.plan.masks.values()))
    with pytest.raises(UnmeetableBudget, match="=30 in 5 layers is 150 of the units, but the budget"):
        fit(SNIP(0.02, min_keep_per_layer=30))


def test_floor_keeps_the_best_of_a_layer(fit):
    callback = Spy(0.02, min_keep_per_layer=3)
    fit(callback)
    for name, mask in callback.plan.masks.items():
        assert callback.seen[name][mask].min() >= callback.seen[name][~mask].max()


def test_noise_of_the_model_is_new_in_each_batch_and_the_same_in_each_run(fit, tiny_net):
    class Dropping(tiny_net):
        def forward(self, x):
            ones = F.dropout(torch.ones_like(x), 0.5, self.training)
            seen.append(ones)
            return super().forward(x * ones)

    class Draws(pl.Callback):
        def on_train_start(self, trainer, model):
            torch.rand(len(runs))

    runs, noise = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model, callback, seen = Dropping(), Spy(0.3, samples=32), []
        fit([Draws(), callback], model=model, limit_train_batches=1, max_epochs=1, num_sanity_val_steps=0)
        runs.append(callback.seen)
        noise.append([ones for ones in seen if len(ones) == 8][:4])
    assert all(torch.equal(score, runs[1][name]) for name, score in runs[0].items())
    assert len(noise[0]) == 4
    assert not torch.equal(noise[0][0], noise[0][1])


def test_weights_that_do_not_train_compete_and_are_left_frozen(fit, tiny_net):
    scored = []
    for trains in (True, False):
        torch.manual_seed(0)
        model = tiny_net()
        model.conv1.weight.requires_grad_(trains)
        callback = Spy(0.3)
        fit(callback, model=model)
        assert model.conv1.weight.requires_grad == trains
        assert torch.equal(model.conv1.weight != 0, callback.plan.masks["conv1.weight"])
        scored.append(callback.seen["conv1.weight"])
    assert torch.equal(*scored)


def test_layer_that_the_loss_does_not_reach_is_an_error_that_names_it(fit, tiny_net):
    class Aside(tiny_net):
        def forward(self, x):
            return super().forward(x) + 0 * self.aside(x.mean((2, 3))).detach()

        def __init__(self):
            super().__init__()
            self.aside = nn.Linear(1, 3)

    with pytest.raises(NonFiniteScore, match=r"no gradient to score aside\.weight by: .* list it in ignore="):
        fit(SNIP(0.3), model=Aside())
    callback = SNIP(0.3, ignore=["aside"])
    fit(callback, model=Aside())
    assert "aside.weight" not in callback.plan.masks


def test_batches_that_are_not_finite_are_left_out_and_counted(fit, make_loader):
    loader = make_loader()
    images = loader.dataset.tensors[0]
    images[3] = torch.nan
    seen = Spy(0.3, samples=32, calibration=make_loader())
    fit(seen)
    callback = Spy(0.3, samples=32, calibration=loader)
    with pytest.warns(UserWarning, match="SNIP left 1 calibration batches out"):
        fit(callback)
    assert all(torch.isfinite(score).all() for score in callback.seen.values())
    assert not torch.equal(seen.seen["fc.weight"], callback.seen["fc.weight"])
    images[:] = torch.inf
    with pytest.raises(NonFiniteScore, match="4 batches were not finite"):
        fit(SNIP(0.3, samples=32, calibration=loader))


def test_scale_of_half_precision_training_does_not_enter(fit):
    plain, mixed = Spy(0.3), Spy(0.3)
    fit(plain)
    fit(mixed, precision="bf16-mixed")
    for name, score in plain.seen.items():
        assert torch.equal(score, mixed.seen[name])


def test_manual_optimization_needs_a_loss(fit, tiny_net):
    class Manual(tiny_net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()

    with pytest.raises(RuntimeError, match="optimizes manually"):
        fit(SNIP(0.3), model=Manual())
    plans = []
    for net in (Manual, tiny_net):
        torch.manual_seed(0)
        callback = SNIP(0.3, loss_fn=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
        fit(callback, model=net())
        plans.append(callback.plan)
    assert plans[0] == plans[1]


@pytest.mark.parametrize(("kind", "variance"), [("he", 2 / 50), ("glorot", 2 / 150), ("lecun", 1 / 50)])
def test_drawn_weights_have_the_variance_of_their_scheme_and_no_outliers(kind, variance):
    drawn = variance_scaled((400, 250), kind, 50, 100, torch.Generator().manual_seed(0))
    assert float(drawn.var()) == pytest.approx(variance, rel=0.02)
    assert float(drawn.abs().max()) <= 2 * variance**0.5 / 0.8796256 + 1e-6


@pytest.mark.parametrize(
    ("name", "weight", "fan_in", "fan_out"),
    [
        ("lstm", "net.rnn.weight_ih_l0", 8, 12),  # one of four gates
        ("lstm", "net.rnn.weight_hh_l0", 12, 12),
        ("gru", "net.rnn.weight_ih_l0", 8, 12),  # one of three
        ("transposed", "net.up1.weight", 8 * 4, 12 * 4),  # (in, out, 2, 2)
        ("conv1d", "net.filter.weight", 8 * 3, 12 * 3),
        ("lstm", "net.fc.weight", 12, 3),
    ],
)
def test_layers_are_drawn_anew_by_their_own_fans(name, weight, fan_in, fan_out, fit, monkeypatch):
    asked = {}

    def record(shape, kind, fan_in, fan_out, generator):
        asked[tuple(shape)] = (kind, fan_in, fan_out)
        return variance_scaled(shape, kind, fan_in, fan_out, generator)

    monkeypatch.setattr("lightning_prune.methods.snip.variance_scaled", record)
    example = NETS[name]
    torch.manual_seed(0)
    model = Learner(example.build())
    shape = tuple(model.get_parameter(weight).shape)
    data = pairs(example.inputs(4), torch.arange(4) % 2, 4)
    fit(SNIP(0.5, reinit="glorot", samples=4), model, data, max_epochs=1)
    assert asked[shape] == ("glorot", fan_in, fan_out)


def test_redrawn_weights_depend_on_the_seed_alone_and_biases_are_zero(fit):
    class Before(Spy):
        def scores(self, weights):
            self.biases = {n: p.detach().clone() for n, p in self.model.named_parameters() if "bias" in n}
            return super().scores(weights)

    class Draws(pl.Callback):
        def on_train_start(self, trainer, model):
            torch.rand(len(runs))

    example = NETS["gru"]
    runs = {}
    for run, (seed, reinit) in {"a": (0, "he"), "b": (0, "he"), "c": (1, "he"), "none": (0, None)}.items():
        torch.manual_seed(len(runs))
        model = Learner(example.build())
        callback = Before(0.5, reinit=reinit, samples=4)
        fit([Draws(), callback], model, pairs(example.inputs(4), torch.arange(4) % 3, 4), max_epochs=1, seed=seed)
        runs[run] = callback
    for name, weight in runs["a"].before.items():
        assert torch.equal(weight, runs["b"].before[name])
        assert not torch.equal(weight, runs["c"].before[name])
    assert sorted(runs["a"].biases) == [
        "net.fc.bias", "net.inner.bias", "net.rnn.bias_hh_l0", "net.rnn.bias_ih_l0"]  # fmt: skip
    assert all(not bias.any() for bias in runs["a"].biases.values())
    assert all(bias.any() for bias in runs["none"].biases.values())


def test_ignored_layers_and_norms_are_not_drawn_anew(fit, tiny_net):
    class Before(Spy):
        def scores(self, weights):
            self.all = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            return super().scores(weights)

    model = tiny_net()
    nn.init.uniform_(model.norm1.weight), nn.init.uniform_(model.norm1.bias)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    callback = Before(0.5, reinit="lecun", ignore=["fc"])
    fit(callback, model=model)
    same = {n for n, p in callback.all.items() if torch.equal(p, start[n])}
    assert {"fc.weight", "fc.bias", "norm1.weight", "norm1.bias"} <= same
    assert not same & {"stem.weight", "conv1.weight", "hidden.weight", "hidden.bias"}


def test_fit_that_goes_on_neither_draws_nor_scores_again(fit, save_each, tmp_path):
    class Once(SNIP):
        calls = 0

        def scores(self, weights):
            type(self).calls += 1
            return super().scores(weights)

    whole, resumed = Once(0.2, reinit="he"), Once(0.2, reinit="he")
    trainer = fit([whole, save_each()], max_epochs=3)
    again = fit(resumed, max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert Once.calls == 1
    assert resumed.plan == whole.plan
    for first, second in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_layer_that_cannot_be_drawn_anew_is_named(fit, tiny_net):
    class Product(tiny_net):
        def __init__(self):
            super().__init__()
            self.bare = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return super().forward(x) @ self.bare

    with pytest.raises(ValueError, match=r"'bare' is read by (matmul|__matmul__)\(\); initialise the module yourself"):
        fit(SNIP(0.5, reinit="he"), model=Product())


def test_in_rounds_masks_only_lose(fit):
    class Rounds(Spy):
        def select(self, *args):
            self.masks = [*getattr(self, "masks", []), super().select(*args)]
            return self.masks[-1]

    callback = Rounds(0.2, schedule=Iterative(start=0, end=4, events=3, unit="step"))
    fit(callback)
    assert len(callback.masks) == 3
    assert all(torch.equal(score.isneginf(), ~callback.masks[1][n]) for n, score in callback.seen.items())
    for earlier, later in zip(callback.masks, callback.masks[1:], strict=False):
        assert not any((later[name] & ~earlier[name]).any() for name in earlier)


def test_masks_follow_a_later_cut_of_channels(fit):
    snip, cut = SNIP(0.5), L1Filter(Budget(0.6), schedule=OneShot(4, unit="step"))
    trainer = fit([snip, cut])
    model = trainer.lightning_module
    assert model.conv1.weight.shape[0] < 12
    assert 0 < int(model.conv1.weight.count_nonzero()) < model.conv1.weight.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be an int of at least 1, got 0"),
        ({"min_keep_per_layer": -1}, "min_keep_per_layer must be an int of at least 0, got -1"),
        ({"reinit": "xavier"}, "reinit must be one of 'he', 'glorot', 'lecun', got 'xavier'"),
        ({"scope": "layer", "min_keep_per_layer": 1}, "leave min_keep_per_layer 0"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SNIP(0.5, **settings)
