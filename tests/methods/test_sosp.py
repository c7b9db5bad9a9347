import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from lightning_prune import SOSP, Budget, plan, trace
from lightning_prune.commands.digits import DigitsData
from lightning_prune.errors import NonFiniteScore
from lightning_prune.methods import sosp
from lightning_prune.methods.sosp import (
    all_channels,
    by_channel,
    gradient_and_product,
    slices_of,
    sosp_h_score,
    sosp_i_matrix,
)
from lightning_prune.ranking import greedy_order
from lightning_prune.taps import gated


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def squared(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def method(batches, loss=cross_entropy, **settings):
    return SOSP(0.5, calibration=batches, loss_fn=loss, **settings)


def inside(method, model, x, ask):
    """What ``ask(method, parameters, slices)`` says of a traced model at an event."""
    method.check(trace(model, x))
    parameters = dict(model.named_parameters())
    slices = {g.name: slices_of(method.graph, g, method.structure) for g in method._groups}
    names = dict.fromkeys(name for part in slices.values() for name, _, _ in part)
    with torch.no_grad(), method._event(None, model):
        return ask(method, {name: parameters[name] for name in names}, slices)


def sums_of(model, batches, loss=cross_entropy, **settings):
    """group -> (C,) signed first and second inner products of SOSP-H."""
    means = inside(method(batches, loss, **settings), model, batches[0][0][:2], SOSP._curvature)
    names = dict.fromkeys(key.rpartition("/")[0] for key in means)
    return {n: means[f"{n}/first"] for n in names}, {n: means[f"{n}/second"] for n in names}


def pairs_of(model, batches, loss=cross_entropy, **settings):
    """(S,) signed first inner products and (S, S) of pairs, of SOSP-I."""
    return inside(method(batches, loss, variant="I", **settings), model, batches[0][0][:2], SOSP._pairs)


def joined(by_group):
    return torch.cat(list(by_group.values()))


class Plain(nn.Module):
    """Two convolutions without norms, a hidden layer; smooth."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)
        self.hidden, self.fc = nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = F.softplus(self.conv2(F.softplus(self.conv1(x))))
        return self.fc(F.softplus(self.hidden(x.flatten(1))))


def plain_net():
    torch.manual_seed(0)
    return Plain().double(), [(rows(6, 1, 6, 6), torch.arange(6) % 3)]


@pytest.fixture
def residual(tiny_net, with_random_norms):
    """A residual network with norms, and two batches for it."""
    torch.manual_seed(0)
    model = with_random_norms(tiny_net()).double()
    return model, [(rows(6, 1, 8, 8), torch.arange(6) % 3), (rows(4, 1, 8, 8, seed=1), torch.arange(4) % 3)]


@pytest.fixture
def smooth(residual):
    """The same with softplus in place of relu, whose kinks finite differences would see."""
    model, batches = residual

    def forward(x):
        x = F.softplus(model.norm0(model.stem(x)))
        x = F.softplus(x + model.norm2(model.conv2(F.softplus(model.norm1(model.conv1(x))))))
        return model.fc(F.softplus(model.hidden(x.mean((2, 3)))))

    model.forward = forward
    return model.eval(), batches


# L = t A t / 2 - b t at t = (1, 1, 1): g = A t - b = (1, 1/2, -1/10), H t = A t = (2, 3, 0)
A = torch.tensor([[2.0, 1.0, -1.0], [1.0, 2.0, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([1.0, 2.5, 0.1], dtype=torch.float64)


def quadratic(t):
    return 0.5 * t @ A @ t - B @ t


def test_quadratic_example_of_h():
    t = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (gradient,), (product,) = gradient_and_product(quadratic(t), [t], [t.detach()])
    assert gradient.tolist() == pytest.approx([1, 0.5, -0.1])
    assert product.tolist() == pytest.approx([2, 3, 0])
    score = sosp_h_score(t.detach() * gradient, t.detach() * product)
    assert score.tolist() == pytest.approx([2, 2, 0.1])
    # absolute values before the sum over the row would give (3, 2, 1.1), the diagonal alone (2, 1.5, 0.6)
    assert (gradient.abs() + 0.5 * A.abs().sum(1)).tolist() == pytest.approx([3, 2, 1.1])
    assert float(score[:2].sum()) == pytest.approx(4.0)


def test_terms_of_opposite_sign_do_not_cancel_in_the_score():
    assert sosp_h_score(torch.tensor([1.0, -1.0]), torch.tensor([-2.0, 4.0])).tolist() == [2, 3]


def test_quadratic_example_of_i():
    matrix = sosp_i_matrix(torch.tensor([1.0, 0.5, -0.1], dtype=torch.float64), A)
    expected = torch.tensor([[2, 0.5, 0.5], [0.5, 1.5, 0], [0.5, 0, 0.6]], dtype=torch.float64)
    assert torch.allclose(matrix, expected)
    assert float(matrix[:2, :2].sum()) == pytest.approx(4.5)
    # 2 goes first (0.6), then 1 adds 1.5 and 0 adds 2 + 2 * 0.5 = 3
    assert greedy_order(matrix).tolist() == [2, 1, 0]


def test_greedy_order_is_that_of_a_slow_loop_and_not_of_the_diagonal():
    torch.manual_seed(0)
    half = torch.rand(12, 12, dtype=torch.float64)
    matrix = sosp_i_matrix(0.1 * torch.rand(12, dtype=torch.float64), half + half.T)
    gone = []
    while len(gone) < 12:
        left = [s for s in range(12) if s not in gone]
        gone.append(min(left, key=lambda s: float(matrix[[*gone, s]][:, [*gone, s]].sum())))
    assert greedy_order(matrix).tolist() == gone
    assert gone != matrix.diagonal().argsort().tolist()


def test_lower_index_goes_first_among_equal_ones():
    assert greedy_order(torch.ones(4, 4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("structure", ["gate", "filter", "all"])
def test_second_term_is_the_central_difference_of_the_gradient(smooth, structure):
    model, batches = smooth
    graph = trace(model, batches[0][0][:2])
    slices = {g.name: slices_of(graph, g, structure) for g in graph.groups}
    names = dict.fromkeys(name for part in slices.values() for name, _, _ in part)
    parameters = {name: dict(model.named_parameters())[name] for name in names}
    direction = all_channels(parameters, slices)
    values = list(parameters.values())
    gradient, product = gradient_and_product(cross_entropy(model, batches[0]), values, direction)

    def gradient_at(step):
        with torch.no_grad():
            for p, d in zip(values, direction, strict=True):
                p.add_(step * d)
        found = torch.autograd.grad(cross_entropy(model, batches[0]), values)
        with torch.no_grad():
            for p, d in zip(values, direction, strict=True):
                p.sub_(step * d)
        return found

    step = 1e-5
    expected = [(a - b) / (2 * step) for a, b in zip(gradient_at(step), gradient_at(-step), strict=True)]
    for a, b in zip(product, expected, strict=True):
        assert float((a - b).abs().max()) < 1e-6 * float(b.abs().max())
    second = joined(by_channel(parameters, product, slices))
    whole = sum(float((p * d).sum()) for p, d in zip(product, direction, strict=True))
    assert float(second.sum()) == pytest.approx(whole, rel=1e-9)
    assert all(g is not None for g in gradient)


def test_both_terms_are_those_of_the_dense_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 2)).double()
    batches = [(rows(7, 3), torch.arange(7) % 2)]
    first, second = sums_of(model, batches)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    at = {name: p.detach() for name, p in model.named_parameters()}
    theta = torch.cat([at[name].reshape(-1) for name in names])

    def loss(flat):
        parts = torch.split(flat, [at[name].numel() for name in names])
        new = {name: part.reshape(at[name].shape) for name, part in zip(names, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, at | new, batches[0][0]), batches[0][1])

    gradient, hessian = torch.func.grad(loss)(theta), torch.autograd.functional.hessian(loss, theta)
    owner = torch.cat([torch.arange(5).repeat_interleave(3), torch.arange(5), torch.arange(5, 9).repeat_interleave(5),
                       torch.arange(5, 9)])  # fmt: skip
    zeros = torch.zeros(9, dtype=torch.float64)
    assert torch.allclose(joined(first), zeros.index_add(0, owner, theta * gradient), rtol=1e-9)
    assert torch.allclose(joined(second), zeros.index_add(0, owner, theta * (hessian @ theta)), rtol=1e-9)


@pytest.mark.parametrize("variant", ["H", "I"])
def test_scores_do_not_depend_on_batches(tiny_net, with_random_norms, variant):
    torch.manual_seed(0)
    model = with_random_norms(tiny_net())
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 3
    graph = trace(model, x[:2])

    def scores(size):
        batches = list(zip(x.split(size), y.split(size), strict=True))
        return joined(method(batches, variant=variant).scores_for(graph))

    one, several, uneven = scores(64), scores(16), scores(24)
    assert torch.allclose(one, several, rtol=1e-5, atol=1e-6 * float(one.max()))
    assert torch.allclose(one, uneven, rtol=1e-5, atol=1e-6 * float(one.max()))


@pytest.mark.parametrize("variant", ["H", "I"])
def test_model_is_left_as_it_was(residual, variant):
    model, batches = residual
    model.train()
    model.norm1.eval()
    model.hidden.weight.requires_grad_(False)
    model.norm1.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = copy.deepcopy(model)
    method(batches, variant=variant).scores_for(trace(model, batches[0][0][:2]))
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert all(bool((p.grad == 7).all()) for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


def test_signs_cancel_over_samples_before_the_absolute_value():
    model, ((x, y),) = plain_net()

    def signed(model, batch):
        return batch[2][0] * F.cross_entropy(model(batch[0]), batch[1])

    plus, minus = (x, y, torch.ones(6)), (x, y, -torch.ones(6))
    graph = trace(model, x[:2])
    alone = joined(method([plus], signed).scores_for(graph))
    both = joined(method([plus, minus], signed).scores_for(graph))
    assert float(alone.min()) > 0
    assert float(both.max()) < 1e-12 * float(alone.max())


def test_filters_in_front_of_a_norm_say_nothing_in_train_mode():
    # the loss does not change when filters are rescaled: theta_s g = 0, and H theta = -g
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False)]
    layers += [nn.BatchNorm2d(5, eps=1e-12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double()
    batch = (rows(8, 1, 8, 8), torch.arange(8) % 3)
    with torch.no_grad():
        model(batch[0])  # statistics of a kind
    graph = trace(model, batch[0][:2])
    slices = {g.name: slices_of(graph, g, "filter") for g in graph.groups}
    parameters = {name: p for name, p in model.named_parameters() if name in ("0.weight", "3.weight")}
    direction = all_channels(parameters, slices)
    gradient, product = gradient_and_product(cross_entropy(model.train(), batch), list(parameters.values()), direction)
    trap = [joined(by_channel(parameters, v, slices)) for v in (gradient, product)]
    first, second = sums_of(model, [batch], structure="filter")
    assert float(trap[0].abs().max()) < 1e-6 * float(joined(first).abs().max())
    assert float(trap[1].abs().max()) < 1e-6 * float(joined(second).abs().max())


def slow_pairs(model, batches, slices, curvature):
    """The Gauss-Newton inner products by a loop over samples and outputs."""
    model.eval()
    values = dict(model.named_parameters())
    total, samples = 0, 0
    for x, _ in batches:
        for sample in x:
            out = model(sample[None])[0]
            jacobian = []
            for output in out:
                found = torch.autograd.grad(output, list(values.values()), retain_graph=True, allow_unused=True)
                jacobian.append(joined(by_channel(values, found, slices)))
            a = torch.stack(jacobian)  # (O, S)
            p = out.detach().softmax(0)
            middle = (
                torch.diag(p) - p[:, None] * p if curvature == "cross_entropy" else 2 / len(p) * torch.eye(len(p)).to(p)
            )
            total, samples = total + a.T @ middle @ a, samples + 1
    return total / samples


@pytest.mark.parametrize("curvature", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("structure", ["gate", "filter", "all"])
def test_pairs_are_those_of_a_slow_loop(residual, structure, curvature):
    model, batches = residual
    first, pairs = pairs_of(model, batches, structure=structure, curvature=curvature)
    graph = trace(model, batches[0][0][:2])
    slices = {g.name: slices_of(graph, g, structure) for g in graph.groups}
    assert torch.allclose(pairs, slow_pairs(model, batches, slices, curvature), rtol=1e-8, atol=1e-12)
    assert torch.allclose(first, joined(sums_of(model, batches, structure=structure)[0]), rtol=1e-9, atol=1e-14)


def test_pairs_are_those_of_a_slow_loop_without_norms():
    model, batches = plain_net()
    _, pairs = pairs_of(model, batches)
    graph = trace(model, batches[0][0][:2])
    slices = {g.name: slices_of(graph, g, "gate") for g in graph.groups}
    assert torch.allclose(pairs, slow_pairs(model, batches, slices, "cross_entropy"), rtol=1e-8, atol=1e-12)


def linear_net():
    """Outputs are linear in the parameters of the only group."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)).double()


@pytest.mark.parametrize(("curvature", "loss"), [("cross_entropy", cross_entropy), ("squared_error", squared)])
def test_gauss_newton_is_the_hessian_where_outputs_are_linear(curvature, loss):
    model = linear_net()
    batch = (rows(9, 3), torch.arange(9) % 4 if curvature == "cross_entropy" else rows(9, 4, seed=1))
    _, pairs = pairs_of(model, [batch], loss, curvature=curvature)
    _, second = sums_of(model, [batch], loss)
    assert torch.allclose(pairs.sum(dim=1), second["0"], rtol=1e-9)


def test_removing_any_set_changes_a_quadratic_loss_by_the_signed_sum():
    # dL = -sum theta_s g + 1/2 sum theta_s H theta_s', exactly, as the loss is quadratic in what is removed
    model = linear_net()
    batch = (rows(9, 3), rows(9, 4, seed=1))
    first, pairs = pairs_of(model, [batch], squared, curvature="squared_error")
    matrix = sosp_i_matrix(first, pairs)
    for gone in ([0], [5], [1, 2], [0, 3, 4], list(range(6))):
        smaller = copy.deepcopy(model)
        with torch.no_grad():
            smaller[0].weight[gone], smaller[0].bias[gone] = 0, 0
            change = float(squared(smaller, batch) - squared(model, batch))
        assert change == pytest.approx(float(-first[gone].sum() + 0.5 * pairs[gone][:, gone].sum()), rel=1e-9)
        assert abs(change) <= float(matrix[gone][:, gone].sum())


def test_removing_all_channels_changes_a_quadratic_loss_by_the_signed_sum_of_h():
    model = linear_net()
    batch = (rows(9, 3), rows(9, 4, seed=1))
    first, second = sums_of(model, [batch], squared)
    empty = copy.deepcopy(model)
    with torch.no_grad():
        empty[0].weight.zero_(), empty[0].bias.zero_()
        change = float(squared(empty, batch) - squared(model, batch))
    assert change == pytest.approx(float(-first["0"].sum() + 0.5 * second["0"].sum()), rel=1e-9)


def names_of(model, x, structure="gate"):
    graph = trace(model, x)
    return {g.name: {name for name, _, _ in slices_of(graph, g, structure)} for g in graph.groups}


def test_a_coupled_group_stands_for_the_parameters_of_all_its_members(tiny_net):
    x = torch.randn(2, 1, 8, 8)
    gate, filters, whole = (names_of(tiny_net(), x, kind) for kind in ("gate", "filter", "all"))
    assert gate["stem"] == {"norm0.weight", "norm0.bias", "norm2.weight", "norm2.bias"}
    assert filters["stem"] == {"stem.weight", "conv2.weight"}
    assert whole["stem"] == gate["stem"] | filters["stem"]
    assert gate["hidden"] == filters["hidden"] == whole["hidden"] == {"hidden.weight", "hidden.bias"}


def test_a_depthwise_layer_is_part_of_its_producer(net):
    x = torch.randn(2, 1, 8, 8)
    layers = {"expand": nn.Conv2d(1, 6, 1), "norm": nn.BatchNorm2d(6), "deep": nn.Conv2d(6, 6, 3, groups=6)}
    layers["out"] = nn.Conv2d(6, 2, 1)
    bare = net(lambda n, x: n.out(F.relu(n.deep(F.relu(n.norm(n.expand(x)))))), **layers)
    assert names_of(bare, x)["expand"] == {"norm.weight", "norm.bias", "deep.weight", "deep.bias"}
    layers["norm2"] = nn.BatchNorm2d(6)
    normed = net(lambda n, x: n.out(F.relu(n.norm2(n.deep(F.relu(n.norm(n.expand(x))))))), **layers)
    assert names_of(normed, x)["expand"] == {"norm.weight", "norm.bias", "norm2.weight", "norm2.bias"}
    assert names_of(normed, x, "filter")["expand"] == {"expand.weight", "expand.bias", "deep.weight", "deep.bias"}


def test_norms_that_read_a_stream_gate_it(net):
    layers = {"stem": nn.Conv2d(1, 4, 3, padding=1), "norm1": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 4, 3, padding=1)}
    layers |= {"last": nn.BatchNorm2d(4), "fc": nn.Linear(4, 3)}

    def forward(n, x):
        x = n.stem(x)
        x = x + n.conv(F.relu(n.norm1(x)))
        return n.fc(F.relu(n.last(x)).mean((2, 3)))

    model = net(forward, **layers)
    gates = names_of(model, torch.randn(2, 1, 6, 6))["stem"]
    assert gates == {"norm1.weight", "norm1.bias", "last.weight", "last.bias"}


def test_a_channel_of_a_stream_is_scored_by_the_loss_with_its_gates_scaled(smooth):
    # all gates times (1 + e), those of channel 2 of the stream times (1 + t) more: derivatives by t, and by t and e
    model, batches = smooth
    first, second = sums_of(model, batches[:1])
    gates = {n: p for n, p in model.named_parameters() if n.startswith(("norm", "hidden"))}

    def loss(t, e):
        new = {}
        for name, p in gates.items():
            scale = torch.full((len(p),), 1.0, dtype=torch.float64) + e
            if name.startswith(("norm0", "norm2")):
                scale = scale + t * (torch.arange(6) == 2)
            new[name] = p.detach() * (scale[:, None] if p.ndim == 2 else scale)
        with torch.no_grad():
            return float(F.cross_entropy(torch.func.functional_call(model, new, batches[0][0]), batches[0][1]))

    h = 1e-4
    assert first["stem"][2].item() == pytest.approx((loss(h, 0) - loss(-h, 0)) / (2 * h), rel=1e-5)
    mixed = (loss(h, h) - loss(h, -h) - loss(-h, h) + loss(-h, -h)) / (4 * h * h)
    assert second["stem"][2].item() == pytest.approx(mixed, rel=1e-3, abs=1e-6)


def test_each_parameter_counts_once_in_the_direction():
    weight = torch.arange(1.0, 7.0).reshape(2, 3)
    slices = {"a": [("w", 0, torch.tensor([[0], [1]]))], "b": [("w", 1, torch.tensor([[0], [1], [2]]))]}
    (direction,) = all_channels({"w": weight}, slices)
    assert torch.equal(direction, weight)
    assert {n: v.tolist() for n, v in by_channel({"w": weight}, [torch.ones(2, 3)], slices).items()} == {
        "a": [6, 15], "b": [5, 7, 9],
    }  # fmt: skip


def test_asks_one_forward_and_two_backwards_of_a_batch(residual, monkeypatch):
    model, batches = residual
    graph = trace(model, batches[0][0][:2])
    calls = {"forward": 0, "backward": 0}
    grad = torch.autograd.grad

    def counted(*args, **kwargs):
        calls["backward"] += 1
        return grad(*args, **kwargs)

    def loss(model, batch):
        calls["forward"] += 1
        return cross_entropy(model, batch)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    method(batches, loss).scores_for(graph)
    assert calls == {"forward": len(batches), "backward": 2 * len(batches)}


def test_looks_at_no_more_samples_than_asked():
    model, ((x, y),) = plain_net()
    seen = []

    def loss(model, batch):
        seen.append(len(batch[0]))
        return cross_entropy(model, batch)

    method([(x, y)] * 5, loss, samples=12).scores_for(trace(model, x[:2]))
    assert seen == [6, 6]


def test_two_inputs_and_outputs_in_a_dict(net):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 5), "b": nn.Linear(2, 5), "fc": nn.Linear(5, 3)}
    model = net(lambda n, left, right: {"out": n.fc(F.softplus(n.a(left) + n.b(right)))}, **layers).double()
    batch = {"left": rows(6, 3), "right": rows(6, 2, seed=1), "label": torch.arange(6) % 3}

    def outputs(model, batch):
        return model(left=batch["left"], right=batch["right"])["out"]

    def loss(model, batch):
        return F.cross_entropy(outputs(model, batch), batch["label"])

    graph = trace(model, {"left": batch["left"][:2], "right": batch["right"][:2]})
    h = method([batch], loss).scores_for(graph)
    i = method([batch], loss, variant="I", outputs_fn=outputs).scores_for(graph)
    assert h.keys() == i.keys() == {"a"}
    assert float(h["a"].min()) > 0
    assert sorted(i["a"].tolist()) == [0, 1, 2, 3, 4]


def test_fused_attention_is_differentiated_twice(net):
    torch.manual_seed(0)
    layers = {"attention": nn.MultiheadAttention(8, 4, batch_first=True), "out": nn.Linear(8, 3)}
    model = net(lambda n, x: n.out(n.attention(x, x, x, need_weights=False)[0]).mean(1), **layers)
    x, y = torch.randn(4, 5, 8), torch.arange(4) % 3
    graph = trace(model, x[:2])
    scores = method([(x, y)]).scores_for(graph)
    assert float(joined(scores).min()) > 0
    values = list(model.parameters())
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        gradient_and_product(cross_entropy(model, (x, y)), values, [p.detach() for p in values])


def test_a_layer_that_the_loss_does_not_reach_is_named():
    model, ((x, y),) = plain_net()

    def loss(model, batch):
        return F.softplus(model.conv1(batch[0])).mean()

    graph = trace(model, x[:2])
    with pytest.raises(NonFiniteScore, match=r"reached conv2.weight, conv2.bias, hidden.weight; list these layers in"):
        method([(x, y)], loss).scores_for(graph)
    scores = method([(x, y)], loss, ignore=["conv2", "hidden"]).scores_for(graph)
    assert list(scores) == ["conv1"]


def test_a_head_that_only_training_uses_stays_whole(net):
    layers = {"first": nn.Linear(4, 6), "side": nn.Linear(6, 5), "aux": nn.Linear(5, 2), "out": nn.Linear(6, 2)}

    def forward(n, x):
        x = torch.tanh(n.first(x))
        return n.out(x) + (n.aux(torch.tanh(n.side(x))) if n.training else 0)

    graph = trace(net(forward, **layers), torch.randn(2, 4))
    assert {group.name for group in graph.groups} == {"first", "side"}
    scores = method([(torch.randn(6, 4), torch.arange(6) % 2)]).scores_for(graph)
    assert list(scores) == ["first"]


def test_a_batch_that_is_not_finite_is_left_out():
    model, ((x, y),) = plain_net()
    graph = trace(model, x[:2])
    alone = joined(method([(x, y)]).scores_for(graph))
    with_nan = joined(method([(x * torch.nan, y), (x, y)]).scores_for(graph))
    assert torch.equal(alone, with_nan)
    with pytest.raises(NonFiniteScore, match="1 batches were not finite"):
        method([(x * torch.nan, y)]).scores_for(graph)


def test_outputs_of_another_shape_are_refused():
    model, ((x, y),) = plain_net()
    graph = trace(model, x[:2])
    wanted = r"needs outputs of shape \(6, O\), one row per sample, got shape \(6, 3, 1\)"
    with pytest.raises(ValueError, match=wanted):
        method([(x, y)], variant="I", outputs_fn=lambda model, batch: model(batch[0])[:, :, None]).scores_for(graph)
    with pytest.raises(ValueError, match="got dict"):
        method([(x, y)], variant="I", outputs_fn=lambda model, batch: {}).scores_for(graph)


def test_i_is_refused_where_it_would_take_too_much(monkeypatch):
    model, ((x, y),) = plain_net()
    graph = trace(model, x[:2])
    monkeypatch.setattr(sosp, "_MOST_PAIRS", 11**2)
    with pytest.raises(ValueError, match=r"all pairs of 12 channels; 11 channels are the most"):
        method([(x, y)], variant="I").scores_for(graph)
    monkeypatch.setattr(sosp, "_MOST_PAIRS", 12**2)
    monkeypatch.setattr(sosp, "_MOST_GRADIENTS", 35)
    with pytest.raises(ValueError, match=r"differentiates 3 outputs by 12 channels .* the 35 derivatives"):
        method([(x, y)], variant="I").scores_for(graph)


def test_i_is_refused_where_a_weight_both_makes_and_reads(net):
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.out(F.linear(torch.tanh(n.fc(x)), n.fc.weight.t())), fc=nn.Linear(4, 6), out=nn.Linear(4, 2)
    )
    pre = net(lambda n, x: n.body(F.relu(n.first(x))), first=nn.Linear(3, 4), body=model)
    graph = trace(pre, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"cannot tell sample by sample what group .* adds to the outputs"):
        method([(torch.randn(6, 3), torch.arange(6) % 2)], variant="I").scores_for(graph)


def test_plans_of_i_are_nested(residual):
    model, batches = residual
    graph = trace(model, batches[0][0][:2])
    kept = []
    for keep in (0.7, 0.4):
        chosen = plan(graph, "sosp", Budget(keep, of="units"), variant="I", calibration=batches, loss_fn=cross_entropy)
        kept.append({name: set(dims[0].tolist()) for name, dims in chosen.kept.items() if 0 in dims})
    assert kept[0].keys() <= kept[1].keys()
    assert all(kept[1][name] < kept[0][name] for name in ("stem.weight", "conv1.weight"))


@pytest.mark.parametrize("settings", [{}, {"structure": "filter"}, {"variant": "I"}])
def test_prunes_in_a_fit_with_the_modules_own_loss(fit, settings):
    callback = SOSP(0.5, samples=16, **settings)
    fit(callback, max_epochs=3)
    assert callback.report.flops_kept <= 0.5


def test_a_run_tells_its_bottlenecks(fit):
    callback = SOSP(0.4, samples=16)
    fit(callback, max_epochs=3)
    counts = callback.plan.groups
    overall = 1 - sum(k for k, _ in counts.values()) / sum(n for _, n in counts.values())
    low = {name for name, (k, n) in counts.items() if 1 - k / n < 0.9 * overall}
    assert low
    assert callback.bottlenecks(threshold=0.9, factor=3) == dict.fromkeys(low, 3.0)


def three_convolutions(seed, epochs):
    """A digits net without norms, trained; 512 training images and their labels."""
    pl.seed_everything(seed, verbose=False)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    model = nn.Sequential(*layers)
    data = DigitsData(shift=0, seed=seed)
    data.setup("fit")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for batch in data.train_dataloader():
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
    return model, data.train[:512]


def removals(model, batch):
    """(S,) absolute change of the loss by the removal of each channel alone."""
    graph = trace(model, batch[0][:2])
    true = []
    with torch.no_grad():
        before = cross_entropy(model, batch)
        for group in graph.groups:
            for channel in range(group.size):
                gate = (torch.arange(group.size) != channel).float()
                with gated(model, {group.name: graph.maps(group)}, {group.name: gate}):
                    true.append(float((cross_entropy(model, batch) - before).abs()))
    return torch.tensor(true)


def test_diagonal_of_i_tells_what_the_removal_of_one_channel_costs():
    model, batch = three_convolutions(0, epochs=4)
    first, pairs = pairs_of(model, [batch])
    true = removals(model, batch)
    assert spearmanr(sosp_i_matrix(first, pairs).diagonal(), true).statistic > 0.9
    assert spearmanr(first.abs(), true).statistic < 0.85


@pytest.mark.slow  # trains three networks
def test_h_tells_what_a_removal_costs_better_than_first_order():
    gains = []
    for seed in range(3):
        model, batch = three_convolutions(seed, epochs=15)
        first, second = sums_of(model, [batch])
        true = removals(model, batch)
        h = sosp_h_score(joined(first), joined(second))
        gains.append(spearmanr(h, true).statistic - spearmanr(joined(first).abs(), true).statistic)
    assert sum(gains) / 3 > 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "J"}, "variant must be one of 'H', 'I', got 'J'"),
        ({"structure": "norm"}, "structure must be one of 'gate', 'filter', 'all', got 'norm'"),
        ({"curvature": "hinge"}, "curvature must be one of"),
        ({"samples": 0}, "samples must be an int of at least 1, got 0"),
        ({"outputs_fn": print}, "outputs_fn= is for variant='I'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SOSP(0.5, **settings)
