import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import Budget, Iterative, OneShot, TaylorWeight, cut, trace
from lightning_prune.graph.views import LayerView
from lightning_prune.methods.taylor_weight import (
    gate_derivatives,
    moving_average,
    second_order_score,
    taylor_weight_score,
)
from lightning_prune.statistics import Statistics
from lightning_prune.taps import gated
from tests.conftest import Net, with_random_norms
from tests.nets import NETS

CPU = torch.device("cpu")


def views_of(model, x):
    """Group name -> its views, on a model traced with x."""
    parameters = dict(model.named_parameters())
    graph = trace(model, x)
    return {g.name: [LayerView(g, p, parameters, graph) for p in g.producers] for g in graph.groups}


def gate_gradients(model, x, loss):
    """Group name -> (C,) what TaylorWeight squares, after one backward of ``loss(model(x))``."""
    method = TaylorWeight(0.5)
    views = views_of(model, x)
    model.zero_grad()
    loss(model(x)).backward()
    with torch.no_grad():
        return {name: method._joined([method.measure(view) for view in group]) for name, group in views.items()}


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_score_is_the_square_of_the_signed_sum():
    # w (1, -2), g (2, 1): 2 - 2 = 0; summing squares would give 4 + 4 = 8, absolute values 4
    assert taylor_weight_score(torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, 1.0]])).tolist() == [0.0]
    assert taylor_weight_score(torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, -1.0]])).tolist() == [16.0]


def test_quadratic_example():
    # E = (z a - t)^2 / 2 with a (2, 1, -1/2), t 1: residual 3/2, dE/dz = 3/2 a = (3, 3/2, -3/4)
    a = torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64)
    z = torch.ones(3, dtype=torch.float64, requires_grad=True)
    error = 0.5 * (z @ a - 1).square()
    error.backward()
    score = taylor_weight_score(z.detach()[:, None], z.grad[:, None])
    assert score.tolist() == [9.0, 2.25, 0.5625]
    true = [(0.5 * ((z * (torch.arange(3) != m)) @ a - 1).square() - error).item() ** 2 for m in range(3)]
    assert true == pytest.approx([1.0, 1.0, 0.765625])
    assert score.argmin() == torch.tensor(true).argmin() == 2


def test_mean_is_of_the_squares_over_batches():
    # signed sums +1 and -1 of two batches: mean of squares 1, square of the mean 0
    method = TaylorWeight(0.5)
    statistics = Statistics({"a": 1}, CPU)
    for signed in (1.0, -1.0):
        statistics.add({"a": method.combine(torch.tensor([signed]))})
    assert statistics.means()["a"].tolist() == [1.0]


def test_members_of_a_group_are_summed_before_the_square():
    method = TaylorWeight(0.5)
    joined = method._joined([torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 1.0])])
    assert method.combine(joined).tolist() == [0.0, 4.0]


def test_moving_average_starts_at_the_first_value_without_correction():
    first = moving_average(None, torch.tensor([4.0]), 0.9)
    second = moving_average(first, torch.tensor([0.0]), 0.9)
    assert first.tolist() == [4.0]
    assert second.item() == pytest.approx(3.6)
    assert moving_average(first, torch.tensor([0.0]), 0.0).tolist() == [0.0]


def test_average_runs_over_events_and_follows_the_cut(fit):
    class Spy(TaylorWeight):
        def scores(self, views):
            out = super().scores(views)
            for name, group in views.items():
                self.seen.setdefault(name, []).append((group[0].measured.clone(), out[name].clone()))
            return out

        def after_prune(self, keep):
            self.kept.append(keep)

    callback = Spy(0.4, schedule=Iterative(start=2, end=6, events=3, unit="step"))
    callback.seen, callback.kept = {}, []
    fit(callback)
    for name, seen in callback.seen.items():
        average = None
        for (measured, score), keep in zip(seen, callback.kept, strict=True):
            average = measured if average is None else 0.9 * average + 0.1 * measured
            assert torch.allclose(score, average)
            average = average[keep[name]]


def test_convolution_without_a_norm_equals_a_gate_on_its_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3)).double()
    x, gate = rows(2, 2, 7, 7), torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)

    def loss(out):
        return out.square().mean()

    got = gate_gradients(model, x, loss)["0"]
    loss(model[2](model[1](gate * model[0](x)))).backward()
    assert torch.allclose(got, gate.grad.flatten(), rtol=1e-10, atol=0)
    assert got.abs().min() > 1e-6


def test_norm_equals_a_gate_behind_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)).double()
    nn.init.normal_(model[1].bias)
    x, gate = rows(2, 2, 7, 7), torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)

    def loss(out):
        return out.square().mean()

    got = gate_gradients(model, x, loss)["0"]
    model.zero_grad()
    loss(model[3](model[2](gate * model[1](model[0](x))))).backward()
    assert torch.allclose(got, gate.grad.flatten(), rtol=1e-10, atol=0)


def test_linear_layer_equals_a_gate_on_its_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, gate = rows(6, 3), torch.ones(5, dtype=torch.float64, requires_grad=True)
    got = gate_gradients(model, x, lambda out: out.logsumexp(1).mean())["0"]
    model.zero_grad()
    model[2](F.relu(gate * model[0](x))).logsumexp(1).mean().backward()
    assert torch.allclose(got, gate.grad, rtol=1e-10, atol=1e-15)


def residual(model, x, gate):
    """``TinyNet`` with a gate on its stream, wherever the stream is written to: stem and second convolution."""
    x = F.relu(gate * model.norm0(model.stem(x)))
    x = F.relu(x + gate * model.norm2(model.conv2(F.relu(model.norm1(model.conv1(x))))))
    return model.fc(F.relu(model.hidden(x.mean((2, 3)))))


def test_stream_of_a_residual_net_equals_one_gate_on_all_that_writes_to_it(tiny_net, with_random_norms):
    torch.manual_seed(0)
    model = with_random_norms(tiny_net()).double().train()
    model.example_input_array = None
    x, labels = rows(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    got = gate_gradients(model, x, lambda out: F.cross_entropy(out, labels))["stem"]
    gate = torch.ones(6, 1, 1, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(residual(model, x, gate), labels).backward()
    assert torch.allclose(got, gate.grad.flatten(), rtol=1e-9, atol=0)
    assert not torch.allclose(got.square(), gate_square_of_parts(model, x, labels))


def gate_square_of_parts(model, x, labels):
    """What squaring each producer alone and then adding would give: not the paper's."""
    method, views = TaylorWeight(0.5), views_of(model, x)["stem"]
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    with torch.no_grad():
        return sum(method.measure(view).square() for view in views)


def test_stream_agrees_with_finite_differences(tiny_net, with_random_norms):
    torch.manual_seed(0)
    model = with_random_norms(tiny_net()).double().eval()
    x, labels = rows(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    got = gate_gradients(model, x, lambda out: F.cross_entropy(out, labels))["stem"]
    step = 1e-6
    for channel in range(6):
        errors = []
        for sign in (1, -1):
            gate = torch.ones(6, 1, 1, dtype=torch.float64)
            gate[channel] += sign * step
            with torch.no_grad():
                errors.append(F.cross_entropy(residual(model, x, gate), labels))
        assert got[channel].item() == pytest.approx(((errors[0] - errors[1]) / (2 * step)).item(), rel=1e-4, abs=1e-9)


class PreActivation(nn.Module):
    """Norms stand before the layers that read the stream, and two blocks write to it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        for i in (1, 2):
            setattr(self, f"norm{i}", nn.BatchNorm2d(4))
            setattr(self, f"conv{i}", nn.Conv2d(4, 4, 3, padding=1, bias=False))
        self.last = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x, gate=1.0):
        x = self.stem(x)
        x = x + self.conv1(F.relu(gate * self.norm1(x)))
        x = x + self.conv2(F.relu(gate * self.norm2(x)))
        return self.fc(F.relu(gate * self.last(x)).mean((2, 3)))


def test_stream_of_a_pre_activation_net_equals_one_gate_behind_the_norms_that_read_it(with_random_norms):
    torch.manual_seed(0)
    model = with_random_norms(PreActivation()).double()
    x, labels = rows(3, 1, 6, 6), torch.tensor([0, 1, 2])
    got = gate_gradients(model, x, lambda out: F.cross_entropy(out, labels))
    gate = torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(model(x, gate), labels).backward()
    assert list(got) == ["stem"]
    assert torch.allclose(got["stem"], gate.grad.flatten(), rtol=1e-9, atol=0)


def test_exact_where_the_loss_is_linear_in_the_gate():
    # without activations E = c W2 diag(z) W1 x is linear in each gate: E(z_m = 0) - E = -dE/dz_m, exactly
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2)).double()
    x = rows(4, 3)
    got = gate_gradients(model, x, torch.Tensor.sum)["0"]
    with torch.no_grad():
        whole = model(x).sum()
        for m in range(5):
            without = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2)).double()
            without.load_state_dict(model.state_dict())
            without[0].weight[m] = 0
            assert (without(x).sum() - whole).square().item() == pytest.approx(got[m].square().item())


def test_weight_form_in_front_of_a_norm_is_noise():
    # the loss does not change when a filter in front of a train-mode norm is rescaled: sum w g = 0 up to eps
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    x = rows(8, 2, 7, 7)
    views = views_of(model, x)["0"]
    model(x).square().mean().backward()
    weight, gate = views[0].weight_gradient.abs(), views[0].gate_gradient.abs()
    assert weight.max() < 1e-3 * gate.median()


def test_weight_form_in_front_of_a_norm_warns(fit):
    with pytest.warns(UserWarning, match=r"on='weight' scores 2 groups in front of a norm \(stem, conv1"):
        fit(TaylorWeight(0.5, on="weight"))


def test_weight_form_without_norms_is_the_gate_form(fit):
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
            self.fc = nn.Linear(12, 3)

        def forward(self, x):
            return self.fc(self.net(x))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    plans = []
    for on in ("gate", "weight"):
        pl.seed_everything(0, verbose=False)
        callback = TaylorWeight(0.5, on=on)
        fit(callback, model=Plain())
        plans.append(callback.plan)
    assert plans[0] == plans[1]


class Asked(TaylorWeight):
    """Another measure."""

    asked = 0

    def measure(self, view):
        self.asked += 1
        return super().measure(view)


def test_subclass_with_another_measure_is_asked_for_it(fit):
    callback = Asked(0.5)
    fit(callback)
    assert callback.asked > 0


def test_subclass_with_another_join_has_its_gates_joined_so(tiny_net):
    class First(TaylorWeight):
        join = "first"

    model = tiny_net()
    graph = trace(model, model.example_input_array)
    parameters = dict(model.named_parameters())
    views = {g.name: [LayerView(g, p, parameters, graph) for p in g.producers] for g in graph.groups}
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    found = First(0.5).measure_all(views)
    assert any(len(group) > 1 for group in views.values())
    for name, group in views.items():
        assert torch.equal(found[name], group[0].gate_gradient)


def test_ranks_all_layers_together_without_normalising(fit):
    callback = TaylorWeight(Budget(0.7, of="units"), schedule=OneShot(5, unit="step"))
    scores = {}

    class Spy(TaylorWeight):
        def scores(self, views):
            scores.update(super().scores(views))
            return scores

    callback = Spy(Budget(0.7, of="units"), schedule=OneShot(5, unit="step"))
    fit(callback)
    flat = torch.cat(list(scores.values()))
    keep = flat >= flat.sort().values[9]  # 9 of 30 go
    expected = {n: int(k.sum()) for n, k in zip(scores, keep.split([len(s) for s in scores.values()]), strict=True)}
    assert {name: kept for name, (kept, _) in callback.plan.groups.items()} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"on": "filter"}, "on must be one of 'gate', 'weight', got 'filter'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"group_norm": "mean"}, "group_norm must be one of 'none', 'count', got 'mean'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaylorWeight(0.5, **settings)


def test_a_layer_in_front_of_a_norm_without_a_scale_is_warned_of():
    norm = nn.BatchNorm2d(4, affine=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = trace(model, torch.zeros(2, 1, 8, 8))
    with pytest.warns(UserWarning, match="0 stand in front of a norm without a scale"):
        TaylorWeight(0.5).check(graph)


def scores_of(model, batches, loss, order=2, **settings):
    """group -> (C,) without a Trainer, in double precision."""
    method = TaylorWeight(0.9, order=order, calibration=batches, loss_fn=loss, **settings)
    return method.scores_for(trace(model, batches[0]))


def squared_error(model, batch):
    return 0.5 * (model(batch) - 1).square().mean()


def two_layers(a):
    """y = sum of a_i x, with a gate on each term."""
    model = nn.Sequential(nn.Linear(1, len(a), bias=False), nn.Linear(len(a), 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight[:] = torch.tensor(a, dtype=torch.float64)[:, None]
        model[1].weight[:] = 1
    return model


def test_second_order_is_exact_on_the_quadratic_example():
    # E = (z a - 1)^2 / 2 with a (2, 1, -1/2): E(z_m = 0) - E = (-1, -1, 0.875); first order says 3, 1.5, -0.75
    model, one = two_layers([2.0, 1.0, -0.5]), torch.ones(1, 1, dtype=torch.float64)
    assert scores_of(model, [one], squared_error)["0"].tolist() == [1.0, 1.0, 0.765625]
    assert scores_of(model, [one], squared_error, order=1)["0"].tolist() == [9.0, 2.25, 0.5625]
    # a whole row of the Hessian, as the paper prints it, would give (0.25, 0.0625, 0.015625)
    gates = torch.tensor([2.0, 1.0, -0.5])
    row = torch.outer(gates, gates).sum(1)
    assert second_order_score(1.5 * gates, row).tolist() == [0.25, 0.0625, 0.015625]


def test_second_order_tells_units_apart_where_all_gradients_are_zero():
    # a (2, -1) reaches the target, so E' = 0; without a unit E = (0 - 2)^2 / 2 = 2 and (2 - 1)^2 / 2 = 0.5
    model, one = two_layers([2.0, -1.0]), torch.ones(1, 1, dtype=torch.float64)
    assert scores_of(model, [one], squared_error, order=1)["0"].tolist() == [0.0, 0.0]
    assert scores_of(model, [one], squared_error)["0"].tolist() == [4.0, 0.25]


def test_second_order_is_the_mean_over_batches_of_squares():
    # one input: E = ((a - 1)^2 - 1) / 2 of an only unit a = 3 changes by -3/2, input 0 changes nothing
    model = two_layers([3.0, 0.0])
    batches = [torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)]
    assert scores_of(model, batches, squared_error)["0"][0].item() == pytest.approx(1.5**2 / 2)


def branches(norm=True):
    """Two branches into one stream, a gate on which the output is linear in."""
    layers = {"a": nn.Conv2d(2, 4, 3), "b": nn.Conv2d(2, 4, 3), "fc": nn.Linear(4, 2)}
    if norm:
        layers |= {"norm_a": nn.BatchNorm2d(4), "norm_b": nn.BatchNorm2d(4)}

    def forward(n, x):
        parts = [n.norm_a(n.a(x)), n.norm_b(n.b(x))] if norm else [n.a(x), n.b(x)]
        return n.fc(sum(parts).mean((2, 3)))

    return with_random_norms(Net(forward, **layers)).double().eval()


def weighted_sum(model, batch):
    return (model(batch) * torch.tensor([1.0, -2.0])).sum(1).mean()


@pytest.mark.parametrize("norm", [True, False])
def test_second_order_equals_the_first_where_the_loss_is_linear(norm):
    torch.manual_seed(0)
    model, batches = branches(norm), [rows(3, 2, 7, 7), rows(5, 2, 7, 7, seed=1)]
    first, second = (scores_of(model, batches, weighted_sum, order) for order in (1, 2))
    assert list(first) == list(second) == ["a"]
    assert first["a"].min() > 0
    assert torch.allclose(first["a"].double(), second["a"], rtol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_second_order_is_the_squared_change_of_really_cutting_where_the_loss_is_quadratic(norm):
    torch.manual_seed(0)
    model, batches = branches(norm), [rows(3, 2, 7, 7), rows(5, 2, 7, 7, seed=1)]
    score = scores_of(model, batches, squared_error)["a"]
    for channel in range(4):
        cut_model = copy.deepcopy(model)
        graph = trace(cut_model, batches[0])
        cut(cut_model, graph.plan({"a": torch.arange(4) != channel}), graph=graph, absorb=False)
        with torch.no_grad():
            changes = [squared_error(cut_model, batch) - squared_error(model, batch) for batch in batches]
        assert score[channel].item() == pytest.approx(torch.stack(changes).square().mean().item(), rel=1e-9)


def test_derivatives_by_gates_are_those_of_the_whole_hessian(with_random_norms):
    torch.manual_seed(0)
    model = with_random_norms(
        nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 3))
    )
    model = model.double().eval()
    x, labels = rows(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])

    def loss(gate):
        return F.cross_entropy(model[2:](gate[:, None, None] * model[:2](x)), labels)

    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    ((first, second),) = gate_derivatives(loss(gate), [gate], at_once=2)
    hessian = torch.autograd.functional.hessian(loss, gate.detach())
    assert torch.allclose(first, torch.autograd.grad(loss(gate), gate)[0])
    assert torch.allclose(second, hessian.diag(), rtol=1e-9)
    assert second.abs().min() > 1e-8


class Looks(torch.autograd.Function):
    """x squared, whose backward asks for values, which a batch of gradients has no single one of."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad if bool((grad == grad).all()) else grad


def test_operator_that_cannot_be_batched_is_run_row_by_row_with_a_warning():
    gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="one by one, which takes longer"):
        ((_, second),) = gate_derivatives(Looks.apply(Looks.apply(scale * gate)).sum(), [gate])
    assert second.tolist() == (12 * scale**4).tolist()  # (a z)^4


def test_second_order_of_filters_is_what_a_filter_of_zeros_does_to_the_loss():
    # the norm's shift stays, so that this is not what a cut does
    torch.manual_seed(0)
    model, batch = branches(), rows(6, 2, 7, 7)
    with pytest.warns(UserWarning, match=r"on='weight' scores 1 groups.*the score is of a filter of zeros"):
        score = scores_of(model, [batch], squared_error, on="weight")["a"]
    for channel in range(4):
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            for layer in (zeroed.a, zeroed.b):
                layer.weight[channel], layer.bias[channel] = 0, 0
            change = squared_error(zeroed, batch) - squared_error(model, batch)
        assert score[channel].item() == pytest.approx(change.item() ** 2, rel=1e-9)


def test_second_order_of_gates_and_filters_agree_without_norms():
    torch.manual_seed(0)
    model, batch = branches(norm=False), rows(6, 2, 7, 7)
    gates, filters = (scores_of(model, [batch], squared_error, on=on)["a"] for on in ("gate", "weight"))
    assert torch.allclose(gates, filters, rtol=1e-12)


def test_second_order_leaves_gradients_and_statistics_of_norms_alone():
    torch.manual_seed(0)
    model = branches().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores_of(model, [rows(6, 2, 7, 7)], squared_error)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_second_order_goes_through_checkpointed_blocks():
    torch.manual_seed(0)
    net = NETS["checkpointed"].build().double()
    plain = copy.deepcopy(net)
    plain.forward = lambda x: plain.fc(plain.block2(plain.block1(plain.stem(x))).mean((2, 3)))
    batch = NETS["checkpointed"].inputs(3).double()
    for name, score in scores_of(net, [batch], squared_error).items():
        assert torch.allclose(score, scores_of(plain, [batch], squared_error)[name], rtol=1e-9)


def test_second_order_with_two_inputs_equals_finite_differences():
    torch.manual_seed(0)
    net, batch = NETS["several_inputs"].build().double().eval(), NETS["several_inputs"].inputs(3)
    batch = {name: value.double() for name, value in batch.items()}
    graph = trace(net, batch)

    def loss(model, batch):
        return model(**batch).logsumexp(1).mean()

    scores = TaylorWeight(0.9, order=2, calibration=[batch], loss_fn=loss).scores_for(graph)
    group, step = graph.group("numbers"), 1e-4
    for channel in range(group.size):
        errors = []
        for z in (1 - step, 1.0, 1 + step):
            gate = torch.where(torch.arange(group.size) == channel, z, 1.0).double()
            with torch.no_grad(), gated(net, {"numbers": graph.gates(group)}, {"numbers": gate}):
                errors.append(loss(net, batch).item())
        first, second = (errors[2] - errors[0]) / (2 * step), (errors[2] - 2 * errors[1] + errors[0]) / step**2
        assert scores["numbers"][channel].item() == pytest.approx((first - second / 2) ** 2, rel=1e-3, abs=1e-9)


def test_second_order_prunes_a_fit_to_its_budget(fit):
    callback = TaylorWeight(0.5, order=2, samples=8, schedule=Iterative(start=2, end=6, events=2, unit="step"))
    fit(callback)
    assert callback.events_done == 2
    assert callback.report.flops_kept <= 0.5


def test_group_norm_divides_by_the_number_of_gates():
    torch.manual_seed(0)
    model, batch = branches(), rows(6, 2, 7, 7)
    for order in (1, 2):
        whole, part = (scores_of(model, [batch], squared_error, order, group_norm=g)["a"] for g in ("none", "count"))
        assert torch.allclose(part, whole / 2)


def test_paper_schedule_removes_so_many_units_every_so_many_steps(fit):
    schedule = TaylorWeight.paper_schedule(1000)
    assert [event.step for event in schedule.resolve(400, None)] == list(range(30, 301, 30))
    schedule = TaylorWeight.paper_schedule(6, updates=2, at_once=3)
    callback = TaylorWeight(Budget(0.8, of="units"), schedule=schedule)  # 6 of 30
    fit(callback)
    assert [round(30 * (1 - row["prune/density"])) for row in callback.report.rows] == [3, 6]
    assert [row["step"] for row in callback.report.rows] == [2, 4]
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        TaylorWeight.paper_schedule(0)


def test_removed_units_never_come_back_whatever_the_average(fit):
    class Spy(TaylorWeight):
        def after_prune(self, keep):
            self.sizes.append({name: int(mask.sum()) for name, mask in keep.items()})

    callback = Spy(Budget(0.6, of="units"), schedule=Iterative(start=1, end=6, events=6, unit="step"), apply="mask")
    callback.sizes = []
    fit(callback)
    for earlier, later in itertools.pairwise(callback.sizes):
        assert all(later[name] <= earlier[name] for name in later)
    assert sum(callback.sizes[-1].values()) == 18
