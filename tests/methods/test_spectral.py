import csv
import math
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, OneShot, RandomChannels, Spectral, cut, plan, trace
from lightning_prune.curvature import Factors, Spectrum, power_iteration
from lightning_prune.errors import NonFiniteScore, NothingToPrune
from lightning_prune.methods import spectral
from lightning_prune.methods.spectral import loss_increase, spectral_score
from lightning_prune.schedule import Gradual

pytestmark = pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing")


def singly(n):
    return torch.arange(n)[:, None]


# the score


def test_worked_example_of_the_score():
    a, g = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[2.0]])
    weights = torch.tensor([[1.0, 2.0]])
    # 1/2 G_jj w^T A w = 1/2 * 2 * (2 * 1 + 1 * 4) = 6
    increase = loss_increase(weights, torch.zeros(1, 2), a, g, singly(1))
    assert increase.tolist() == [6]
    # without the unit 2 of 3 is left of the radius of [[2, 1], [1, 2]]: 6 * 2/3 = 4; without flatness 6
    ratio = Spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).share_without(singly(2))[:1]
    assert spectral_score(increase, ratio).tolist() == pytest.approx([4])
    assert spectral_score(increase, ratio, mu=0).tolist() == [6]
    assert spectral_score(increase, ratio, mu=2).tolist() == pytest.approx([6 * 4 / 9])


def test_first_order_term_is_there_and_its_sign_is_not():
    a, g = torch.eye(2), torch.zeros(2, 2)
    weights, gradient = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[3.0, -1.0], [-3.0, 1.0]])
    # |3 * 1 - 1 * 2| = 1
    assert loss_increase(weights, gradient, a, g, singly(2)).tolist() == [1, 1]


def test_units_of_several_rows_count_what_is_between_these():
    generator = torch.Generator().manual_seed(0)
    weights, gradient = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    a, g = (half @ half.T for half in (weights.T @ weights + 1, torch.randn(4, 4, generator=generator).double()))
    units = torch.tensor([[0, 2], [1, 3]])
    found = loss_increase(weights, gradient, a, g, units)
    hessian = torch.kron(g, a)  # of all weights, row after row
    for unit, value in zip(units, found, strict=True):
        removed = torch.zeros_like(weights)
        removed[unit] = weights[unit]
        flat = removed.flatten()
        assert float(value) == pytest.approx(
            abs(float((gradient * removed).sum())) + 0.5 * float(flat @ hessian @ flat)
        )


def test_of_two_equally_cheap_units_the_one_in_the_top_eigenvector_goes_first():
    g = torch.tensor([[4.0, 0, 0], [0, 4.0, 3.0], [0, 3.0, 4.0]])  # top eigenvector (0, 1, 1), eigenvalue 7
    a, weights = torch.eye(2), torch.ones(3, 2)
    increase = loss_increase(weights, torch.zeros(3, 2), a, g, singly(3))
    ratio = Spectrum(g).share_without(singly(3))
    assert increase.tolist() == [4, 4, 4]
    assert spectral_score(increase, ratio, mu=0).tolist() == [4, 4, 4]
    assert spectral_score(increase, ratio).tolist() == pytest.approx([4, 4 * 4 / 7, 4 * 4 / 7])


# without a Trainer


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(60, 4, dtype=torch.float64)
    return model, [(x[:40], torch.arange(40) % 3), (x[40:], torch.arange(20) % 3)]


def alone(batches, **settings):
    return Spectral(0.5, calibration=batches, loss_fn=cross_entropy, **settings)


def test_scores_are_those_of_a_slow_loop():
    model, batches = mlp()
    found = alone(batches, mu=0.7).scores_for(trace(model, batches[0][0][:2]))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    reads = [x, torch.tanh(model[0](x)), torch.tanh(model[2](torch.tanh(model[0](x))))]
    reads = [torch.cat([r, torch.ones(60, 1)], dim=1).detach() for r in reads]
    layers = [model[0], model[2], model[4]]
    made = {}
    handles = [m.register_forward_hook(lambda m, a, out: made.__setitem__(m, out)) for m in layers]
    gs = [torch.zeros(m.out_features, m.out_features, dtype=torch.float64) for m in layers]
    for n in range(60):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for i, g in enumerate(torch.autograd.grad(loss, [made[m] for m in layers])):
            gs[i] += g.T @ g / 60
    for handle in handles:
        handle.remove()
    as_ = [r.T @ r / 60 for r in reads]
    weighted = [torch.autograd.grad(cross_entropy(model, b), list(model.parameters())) for b in batches]
    mean = [(p + q) / 2 for p, q in zip(*weighted, strict=True)]

    def top(matrix, gone=None):
        stay = [i for i in range(len(matrix)) if i != gone]
        return float(torch.linalg.eigvalsh(matrix[stay][:, stay])[-1])

    for i, name in enumerate(("0", "2")):
        for j in range(layers[i].out_features):
            w = torch.cat([layers[i].weight[j], layers[i].bias[j : j + 1]]).detach()
            slope = float((w[:-1] * mean[2 * i][j]).sum() + w[-1] * mean[2 * i + 1][j])
            increase = abs(slope) + 0.5 * float(gs[i][j, j] * (w @ as_[i] @ w))
            q = top(gs[i], j) / top(gs[i]) * top(as_[i + 1], j) / top(as_[i + 1])
            assert float(found[name][j]) == pytest.approx(increase * q**0.7, rel=1e-6)


def test_predicted_increases_follow_those_of_really_removing_units():
    model, batches = mlp(1)
    x = torch.cat([b[0] for b in batches])
    y = (x[:, 0] > 0.3).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    graph = trace(model, x[:2])
    scores = alone([(x, y)], mu=0).scores_for(graph)
    changes = []
    with torch.no_grad():
        before = float(F.cross_entropy(model(x), y))
        for name in scores:
            reader = model[int(name) + 2]
            for j in range(len(scores[name])):
                column = reader.weight[:, j].clone()
                reader.weight[:, j] = 0
                changes.append(abs(float(F.cross_entropy(model(x), y)) - before))
                reader.weight[:, j] = column
    assert spearmanr(torch.cat(list(scores.values())), changes).statistic > 0.6


def test_plan_without_a_trainer_leaves_the_model_alone():
    model, batches = mlp()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model, batches[0][0][:2])
    decided = plan(graph, "spectral", 0.5, calibration=batches, loss_fn=cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((p.grad == 7).all()) for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    report = cut(model, decided)
    assert report.after.flops <= 0.5 * report.before.flops


def test_plan_without_a_trainer_wants_batches():
    model, batches = mlp()
    with pytest.raises(ValueError, match=r"without a Trainer calibration= must be a loader"):
        plan(trace(model, batches[0][0][:2]), "spectral", 0.5, loss_fn=cross_entropy)


# what is left whole


def test_residual_streams_stay_whole_unless_asked_for(fit):
    once = {"schedule": OneShot(4, unit="step")}
    callback, asked = Spectral(0.6, **once), Spectral(0.6, residual=True, most=1.0, **once)
    fit(callback)
    fit(asked)
    assert "residual stream" in callback.report.frozen["stem"]
    assert set(callback.plan.groups) == {"conv1", "hidden"}
    assert set(asked.plan.groups) == {"stem", "conv1", "hidden"}
    assert "stem" not in asked.report.frozen


def test_coupled_producers_add_their_increases_and_multiply_their_ratios(net):
    torch.manual_seed(0)
    forward = lambda n, x: n.fc(torch.tanh(n.one(x) * n.two(x)))  # noqa: E731
    model = net(forward, one=nn.Linear(4, 5), two=nn.Linear(4, 5), fc=nn.Linear(5, 3))
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    method = alone([(x, y)])
    (found,) = method.scores_for(trace(model, x[:2])).values()
    factors = method.factors
    increase, ratio = 0, 1
    for name in ("one", "two"):
        layer, f = model.get_submodule(name), factors[f"{name}.weight"]
        rows = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
        increase = increase + loss_increase(rows, f.mean_gradient, f.a, f.g, singly(5))
        ratio = ratio * Spectrum(f.g).share_without(singly(5))
    ratio = ratio * Spectrum(factors["fc.weight"].a).share_without(singly(5))
    assert torch.allclose(found, increase * ratio)


def test_layers_without_factors_are_frozen_with_the_reason(net):
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.fc(n.rnn(torch.tanh(n.inner(x)))[0].mean(1)),
        inner=nn.Linear(4, 6), rnn=nn.LSTM(6, 5, batch_first=True), fc=nn.Linear(5, 3),
    )  # fmt: skip
    x, y = torch.randn(20, 3, 4), torch.arange(20) % 3
    method = alone([(x, y)])
    assert list(method.scores_for(trace(model, x[:2]))) == ["inner"]
    assert "'lstm' of rnn.weight_ih_l0 has no Kronecker factors" in method._frozen["rnn"]
    grouped = trace(nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), x.mT[:2])
    with pytest.raises(NothingToPrune, match="works in groups"):
        method.scores_for(grouped)


def test_depthwise_layers_are_passed_over(net):
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.fc(n.two(F.relu(n.deep(F.relu(n.one(x))))).mean((2, 3))),
        one=nn.Conv2d(2, 6, 1), deep=nn.Conv2d(6, 6, 3, groups=6), two=nn.Conv2d(6, 4, 1), fc=nn.Linear(4, 3),
    )  # fmt: skip
    x, y = torch.randn(12, 2, 5, 5), torch.arange(12) % 3
    method = alone([(x, y)])
    scores = method.scores_for(trace(model, x[:2]))
    assert scores.keys() == {"one", "two"}
    assert method.factors.keys() == {"one.weight", "two.weight", "fc.weight"}


def test_flattened_maps_and_transposed_convolutions_are_read_by_blocks(net):
    torch.manual_seed(0)
    forward = lambda n, x: n.fc(n.up(F.relu(n.down(x))).relu().flatten(1))  # noqa: E731
    model = net(forward, down=nn.Conv2d(1, 4, 2, 2), up=nn.ConvTranspose2d(4, 3, 2, 2), fc=nn.Linear(48, 3))
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    method = alone([(x, y)])
    graph = trace(model, x[:2])
    scores = method.scores_for(graph)
    assert {name: len(score) for name, score in scores.items()} == {"down": 4, "up": 3}
    f = method.factors
    blocks = torch.arange(48).reshape(3, 16)  # each channel is sixteen columns of fc
    rows = torch.cat([model.up.weight.movedim(1, 0).flatten(1), model.up.bias[:, None]], dim=1).detach()
    up = f["up.weight"]
    expected = loss_increase(rows, up.mean_gradient, up.a, up.g, singly(3))
    expected *= Spectrum(up.g).share_without(singly(3)) * Spectrum(f["fc.weight"].a).share_without(blocks)
    assert torch.allclose(scores["up"], expected)


def test_channels_of_embeddings_and_layers_are_scored_by_the_layers(net):
    torch.manual_seed(0)
    forward = lambda n, x: n.fc(torch.tanh(n.emb(x[:, 0]) * n.two(x[:, 1:].float())))  # noqa: E731
    model = net(forward, emb=nn.Embedding(7, 5), two=nn.Linear(2, 5), fc=nn.Linear(5, 3))
    x, y = torch.arange(30).reshape(10, 3) % 7, torch.arange(10) % 3
    method = alone([(x, y)])
    (found,) = method.scores_for(trace(model, x[:2])).values()
    assert method.factors.keys() == {"two.weight", "fc.weight"}
    assert bool((found > 0).all())
    alone_in_it = net(lambda n, x: n.fc(n.emb(x[:, 0])), emb=nn.Embedding(7, 5), fc=nn.Linear(5, 3))
    method = alone([(x, y)])
    graph = trace(alone_in_it, x[:2])
    with pytest.raises(NothingToPrune, match="come from embeddings alone"):
        method.scores_for(graph)


# in a fit


class Watched(Spectral):
    """Remembers what the factors were when an event scored by them, and what it was scored."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.seen, self.scored, self.sizes = [], [], []

    def scores(self, views):
        out = super().scores(views)
        self.seen.append(self.factors)
        self.scored.append(out)
        self.sizes.append({name: len(score) for name, score in out.items()})
        return out


class Still(pl.LightningModule):
    """Does not learn and has no norm, so that its factors depend on the samples alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 6), nn.Linear(6, 3)
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x):
        return self.fc(torch.tanh(self.hidden(torch.tanh(self.conv(x)).mean((2, 3)))))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def factors_of_a_fit(fit, make_loader, batch_size, epochs=2, **settings):
    """Factors at an event after the first epoch, of 32 samples."""
    steps = 32 // batch_size // settings.get("accumulate_grad_batches", 1)
    callback = Watched(0.6, schedule=OneShot(steps, unit="step"), every=1, decay=0.0)
    fit(callback, model=Still(), loader=make_loader(32, batch_size), max_epochs=epochs, **settings)
    return callback.seen[0]


def test_accumulated_batches_give_the_factors_of_one_large_batch(fit, make_loader):
    # a gradient of the mean loss over 4 accumulated batches is a fourth of the batch's own: G would be a sixteenth
    whole = factors_of_a_fit(fit, make_loader, 32)
    parts = factors_of_a_fit(fit, make_loader, 8, accumulate_grad_batches=4)
    assert whole.keys() == {"conv.weight", "hidden.weight", "fc.weight"}
    for name in whole:
        assert torch.allclose(parts[name].a, whole[name].a, rtol=1e-5, atol=1e-5)
        assert torch.allclose(parts[name].g, whole[name].g, rtol=1e-4, atol=1e-9)
        assert torch.allclose(parts[name].mean_gradient, whole[name].mean_gradient, rtol=1e-4, atol=1e-7)


def test_gradients_that_are_not_the_loss_s_are_not_looked_at(fit, make_loader):
    class Penalised(Still):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            torch.autograd.grad(loss, self.fc.weight, retain_graph=True)  # of a penalty, say
            return loss

    callback = Watched(0.6, schedule=OneShot(2, unit="step"), every=1, decay=0.0)
    fit(callback, model=Penalised(), loader=make_loader(32, 8), accumulate_grad_batches=2)
    assert callback.seen[0]["fc.weight"].counts.tolist() == [16, 16, 1]


def test_bf16_mixed_precision_gives_nearly_the_same_factors(fit, make_loader):
    whole, mixed = (factors_of_a_fit(fit, make_loader, 32, precision=p) for p in ("32-true", "bf16-mixed"))
    for name in whole:
        assert float((mixed[name].g - whole[name].g).norm() / whole[name].g.norm()) < 0.02
        assert mixed[name].inputs.dtype == torch.float32


def test_factors_are_updated_every_so_many_steps_and_five_times_before_the_first_event():
    callback = Spectral(0.5)
    assert callback.interval == 10
    callback._events = Gradual(0.1, 0.7).resolve(20000, None)
    assert callback.interval == 10
    callback._events = Gradual(0.1, 0.7).resolve(200, None)
    assert callback._events[0].step == 26
    assert callback.interval == 5
    callback._events = Gradual(0.1, 0.7).resolve(8, None)
    assert callback.interval == 1


def test_updates_fall_on_the_steps_of_the_interval(fit):
    steps = []

    class Counting(Spectral):
        def after_step(self):
            if self._running.looking:
                steps.append(self.steps)
            super().after_step()

    fit(Counting(0.6, schedule=OneShot(6, unit="step"), every=2))
    assert steps == [1, 2, 3, 4, 5, 6]  # 6 // 5: else the event would come after three
    steps.clear()
    fit(Counting(0.6, schedule=OneShot(11, unit="step"), every=2), max_epochs=3)
    assert steps == [1, 3, 5, 7, 9, 11]


def dense_radius(model, batches):
    """The Hessian's eigenvalue of largest magnitude, from all its entries."""
    values = dict(model.named_parameters())

    def loss(flat):
        parts = flat.split([p.numel() for p in values.values()])
        new = {n: part.view_as(p) for (n, p), part in zip(values.items(), parts, strict=True)}
        losses = [F.cross_entropy(torch.func.functional_call(model, new, (x,)), y, reduction="sum") for x, y in batches]
        return sum(losses) / sum(len(x) for x, _ in batches)

    flat = torch.cat([p.detach().flatten() for p in values.values()])
    with torch.enable_grad():
        spectrum = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    return float(spectrum[spectrum.abs().argmax()])


def test_radius_is_that_of_the_dense_hessian_before_and_after(fit, monkeypatch):
    monkeypatch.setattr(spectral, "power_iteration", partial(power_iteration, tolerance=1e-8))
    found = {}

    class Checked(Spectral):
        def scores(self, views):
            out = super().scores(views)
            found["before"] = dense_radius(self.model, self._batches)
            return out

        def after_prune(self, keep):
            batches = self._batches
            super().after_prune(keep)
            found["after"] = dense_radius(self.model, batches)

    callback = Checked(0.5, schedule=OneShot(4, unit="step"), iterations=500, samples=32)
    fit(callback, model=Still())
    row = callback.report.rows[0]
    for key in ("before", "after"):
        assert row[f"prune/spectral_radius/{key}"] == pytest.approx(found[key], rel=1e-3)
    assert found["before"] != pytest.approx(found["after"], rel=1e-2)


def test_radii_are_logged_at_events_with_those_of_the_factors(fit, tmp_path):
    callback = Watched(0.5, schedule=Gradual(0.1, 0.7, events=3))
    fit(callback, logger=CSVLogger(tmp_path, name="", version=""))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["prune/spectral_radius/after"]]
    assert len(rows) >= len(callback.events)
    for row, factors in zip(callback.report.rows, callback.seen, strict=True):
        radii = {
            name.removesuffix(".weight"): float(torch.linalg.eigvalsh(f.a)[-1] * torch.linalg.eigvalsh(f.g)[-1])
            for name, f in factors.items()
        }
        assert {k.rpartition("/")[2]: v for k, v in row.items() if "/kfac/" in k} == pytest.approx(radii, rel=1e-6)
        assert row["prune/spectral_radius/kfac"] == pytest.approx(max(radii.values()), rel=1e-6)
        assert math.isfinite(row["prune/spectral_radius/before"])
        assert math.isfinite(row["prune/spectral_radius/after"])


def test_factors_lose_the_rows_of_channels_that_went(fit):
    shapes = []

    class Shapes(Watched):
        def after_prune(self, keep):
            super().after_prune(keep)
            weights = dict(self.model.named_parameters())
            for name, f in self.factors.items():
                rows = self._running.layers[name].rows_of(weights[name], weights.get(name[:-6] + "bias"))
                shapes.append((tuple(rows.shape), (len(f.g), len(f.a)), tuple(f.gradient.shape)))

    callback = Shapes(0.5, schedule=Gradual(0.1, 0.7, events=3))
    fit(callback)
    assert len(shapes) == 2 * 4  # conv1, conv2, hidden, fc; after the last event there are none
    assert all(first == second == third for first, second, third in shapes)
    assert callback.factors == {}


def test_factors_follow_the_cuts_of_another_callback(fit):
    callback = Watched(Budget(0.6, of="units"), schedule=OneShot(6, unit="step"), every=1)
    other = RandomChannels(Budget(0.5, of="units"), schedule=OneShot(3, unit="step"), ignore=["conv1", "stem"])
    trainer = fit([other, callback])
    (factors,) = callback.seen
    width = other.plan.groups["hidden"][0]
    assert width == 6
    assert factors["fc.weight"].a.shape == (width + 1, width + 1)
    assert factors["hidden.weight"].g.shape == (width, width)
    assert float(factors["fc.weight"].counts[2]) == pytest.approx(1 - 0.95**6)  # no update was lost
    assert trainer.lightning_module.hidden.weight.shape[0] <= width


def test_average_is_taken_up_when_a_fit_goes_on(fit, save_each, tmp_path):
    settings = {"schedule": OneShot(6, unit="step"), "decay": 0.9}
    whole, resumed = Watched(0.6, **settings), Watched(0.6, **settings)
    fit([whole, save_each()])
    fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt", seed=5)
    (first,), (second,) = whole.seen, resumed.seen
    for name in first:
        assert all(torch.equal(getattr(first[name], key), getattr(second[name], key)) for key in vars(first[name]))
    assert resumed.report.rows[0]["prune/spectral_radius/after"] == whole.report.rows[0]["prune/spectral_radius/after"]


def test_nothing_of_the_factors_is_in_a_checkpoint_after_the_last_event(fit, save_each, tmp_path):
    callback = Spectral(0.6, schedule=OneShot(4, unit="step"))
    fit([callback, save_each()])
    own = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"][callback.state_key]["own"]
    assert own["curvature"]["factors"] == {}
    assert own["radii"]["after"] == callback.report.rows[0]["prune/spectral_radius/after"]


def test_masks_hold_what_a_cut_would_remove(fit):
    dead = []

    class Blank(Watched):
        def after_prune(self, keep):
            super().after_prune(keep)
            gone = ~keep["conv1"]
            dead.extend(self.factors["conv1.weight"].outputs[gone].flatten().tolist() if self.factors else [])

    callback = Blank(0.5, apply="mask", schedule=Gradual(0.1, 0.7, events=3))
    trainer = fit(callback)
    assert len(dead) >= 12
    assert not any(dead)
    weight = trainer.lightning_module.conv1.weight
    alive = callback._alive["conv1"]
    assert weight.shape[0] == 12
    assert not bool(weight[~alive].any())
    assert callback.report.flops_kept <= 0.5
    last = callback.seen[-1]["conv1.weight"]
    assert last.g.shape == (12, 12)
    assert all(math.isfinite(row["prune/spectral_radius/after"]) for row in callback.report.rows)


class Wide(Still):
    def __init__(self):
        super().__init__()
        self.hidden, self.fc = nn.Linear(4, 40), nn.Linear(40, 3)


def parts_that_went(fit, most):
    """Of the forty hidden units, what part went at each of two events, of which each has to take a tenth of all 44."""
    callback = Watched(
        Budget(0.8, of="units"), schedule=Gradual(0, 0.7, events=2, power=1), loss_growth=None, radius_growth=None,
        min_channels=1, most=most,
    )  # fmt: skip
    fit(callback, model=Wide())
    sizes = [s["hidden"] for s in callback.sizes] + [callback.plan.groups["hidden"][0]]
    return [(before - after) / before for before, after in pairwise(sizes)]


def test_at_most_a_tenth_of_a_group_goes_at_an_event_where_that_is_enough(fit):
    # five units of 44, and four of 39: up to four, and three, hidden ones, and one of the convolution's
    assert parts_that_went(fit, 0.1) == [4 / 40, 3 / 36]
    assert parts_that_went(fit, 1.0) == [5 / 40, 4 / 35]


def test_more_goes_where_a_tenth_is_not_enough(fit):
    callback = Spectral(Budget(0.3, of="units"), schedule=OneShot(0.5))
    fit(callback, model=Wide())
    assert callback.plan.groups["hidden"][0] <= 13
    assert callback.plan.groups["conv"][0] >= 2  # min_channels


def guarded(fit, monkeypatch, **settings):
    """Units kept after each of five events, beside what was due then."""
    callback = Spectral(Budget(0.3, of="units"), schedule=Gradual(0.1, 0.9, events=5, power=1), **settings)
    fit(callback, model=Wide(), max_epochs=5)
    kept = [row["prune/density"] for row in callback.report.rows]
    due = [callback.budget.at(event.progress).keep for event in callback.events]
    return kept, due


def test_an_event_whose_trial_raises_the_loss_is_held_back_until_the_next_one(fit, monkeypatch):
    free, due = guarded(fit, monkeypatch, loss_growth=None, radius_growth=None)
    assert all(kept <= keep for kept, keep in zip(free, due, strict=True))
    losses = iter(range(1, 10**6))
    monkeypatch.setattr(Spectral, "_loss", lambda self: float(next(losses)))  # grows with every trial
    held, due = guarded(fit, monkeypatch, radius_growth=None)
    assert held[0] == 1  # nothing was due before it
    assert all(kept <= keep for kept, keep in zip(held[1:], due, strict=False))
    assert all(kept > keep for kept, keep in zip(held[:-1], due, strict=False))
    assert held[-1] <= 0.3


def test_a_trial_that_is_better_at_half_the_way_takes_it(fit, monkeypatch):
    calls = []

    def loss(self):
        calls.append(1)
        return 1.0 if len(calls) % 3 != 2 else 2.0  # before, the whole part, half of it

    monkeypatch.setattr(Spectral, "_loss", loss)
    held, due = guarded(fit, monkeypatch, radius_growth=None)
    halves = [(before + now) / 2 for before, now in zip([1.0, *due], due, strict=False)]
    assert all(now < kept <= half for kept, half, now in zip(held[:-1], halves, due, strict=False))
    assert held[-1] <= 0.3


def test_trials_leave_the_model_as_it_was(fit):
    seen = []

    class Trying(Spectral):
        def _guarded(self, scores, keep, before, now):
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            out = super()._guarded(scores, keep, before, now)
            seen.append(all(torch.equal(state[name], value) for name, value in self.model.state_dict().items()))
            return out

    fit(Trying(0.5, loss_growth=0.0, radius_growth=0.0, schedule=Gradual(0.1, 0.7, events=4)))
    assert len(seen) >= 2
    assert all(seen)


def test_a_trial_computes_what_the_cut_network_does(fit, tiny_net):
    pairs = []

    class Comparing(Spectral):
        def select(self, scores, fits):
            keep = super().select(scores, fits)
            with self._trial(keep):
                self.tried = self._loss()
            return keep

        def after_prune(self, keep):
            pairs.append((self.tried, self._loss()))
            super().after_prune(keep)

    fit(Comparing(0.5, schedule=OneShot(4, unit="step"), absorb=False))
    ((trial, really),) = pairs
    assert trial == pytest.approx(really, rel=1e-5)


def test_where_the_radius_grows_the_units_that_flatten_least_are_given_back(fit, monkeypatch):
    kept = {"conv": torch.tensor([True, False, True, True]), "hidden": torch.tensor([False, True, False, False, True])}
    method = Spectral(0.5)
    method._alive = {name: torch.ones(len(mask), dtype=torch.bool) for name, mask in kept.items()}
    method._ratios = {"conv": torch.tensor([0.1, 0.9, 0.1, 0.1]), "hidden": torch.tensor([0.2, 0.1, 1.0, 0.3, 0.1])}
    flatter = method._flatter(kept)
    # 0.2, 0.3, 0.9 and 1 go; the upper half of them stays
    assert flatter["conv"].tolist() == [True, True, True, True]
    assert flatter["hidden"].tolist() == [False, True, True, False, True]


def test_the_radius_guard_takes_the_flatter_half_only_if_it_is_flatter(fit, monkeypatch):
    free, _ = guarded(fit, monkeypatch, loss_growth=None, radius_growth=None)
    radii = iter([100.0, 50.0] * 100)
    monkeypatch.setattr(Spectral, "_radius_of_trial", lambda self, keep: next(radii))
    back, _ = guarded(fit, monkeypatch, loss_growth=None)
    assert back[0] > free[0]
    assert back[-1] <= 0.3
    radii = iter([50.0, 100.0] * 100)
    assert guarded(fit, monkeypatch, loss_growth=None)[0] == free


# what cannot be


def test_an_event_before_the_first_batch_says_what_is_missing(fit):
    with pytest.raises(NonFiniteScore, match=r"no Kronecker factors of conv1.weight.*: a training batch"):
        fit(Spectral(0.5, schedule=OneShot(0, unit="step")))


def test_a_frozen_layer_says_what_is_missing_and_can_be_ignored(fit, tiny_net):
    def frozen():
        model = tiny_net()
        model.hidden.requires_grad_(False)
        return model

    with pytest.raises(NonFiniteScore, match=r"no Kronecker factors of hidden.weight: .* must be trained"):
        fit(Spectral(0.6), model=frozen())
    callback = Spectral(0.6, ignore=["hidden"], schedule=OneShot(4, unit="step"))
    fit(callback, model=frozen())
    assert callback.report.flops_kept <= 0.6


def test_losses_that_are_not_finite_postpone_an_event_if_asked(fit, tiny_net):
    class Nan(tiny_net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.nan

    with pytest.raises(NonFiniteScore):
        fit(Spectral(0.6), model=Nan())
    with pytest.warns(UserWarning, match="postpones its event|training ended"):
        fit(Spectral(0.6, on_nonfinite="postpone"), model=Nan())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": -1}, "mu must be at least 0"),
        ({"mu": math.inf}, "mu must be at least 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"every": 0}, "every must be an int"),
        ({"most": 0}, r"most must be in \(0, 1\]"),
        ({"loss_growth": -0.1}, "loss_growth must be at least 0, or None"),
        ({"radius_growth": math.nan}, "radius_growth must be at least 0, or None"),
        ({"samples": 0}, "samples must be an int"),
        ({"iterations": 1.5}, "iterations must be an int"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Spectral(0.5, **settings)


def test_functions_instead_of_modules_are_pruned(fit):
    class Functional(Still):
        def __init__(self):
            super().__init__()
            del self.hidden
            self.w, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return self.fc(torch.tanh(F.linear(torch.tanh(self.conv(x)).mean((2, 3)), self.w, bias=self.b)))

    callback = Watched(0.6)
    trainer = fit(callback, model=Functional())
    assert callback.seen[0].keys() == {"conv.weight", "w", "fc.weight"}
    assert trainer.lightning_module.conv.weight.shape[0] < 4 or trainer.lightning_module.w.shape[0] < 6


def test_dense_labels_need_no_mean_over_positions(fit):
    # a loss per position: samples are rows of the batch, positions make G a mean
    class Dense(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
            self.example_input_array = torch.zeros(2, 1, 8, 8)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0])[:, :1], batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callback = Watched(0.6, schedule=OneShot(2, unit="step"))
    data = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8)), 4)
    fit(callback, model=Dense(), loader=data)
    counts = callback.seen[0]["one.weight"].counts
    assert float(counts[1] / counts[0]) == 64
    assert isinstance(callback.seen[0]["one.weight"], Factors)
