import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import curvature, trace
from lightning_prune.curvature import (
    Factors,
    RunningFactors,
    Spectrum,
    factor_layer,
    hessian_product,
    input_rows,
    power_iteration,
)

G = torch.tensor([[2.0, 1.0], [1.0, 2.0]])


def singly(n):
    return torch.arange(n)[:, None]


def psd(n, seed=0):
    half = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half @ half.T


def slow_without(matrix, blocks):
    """The largest eigenvalue after each deletion, one dense eigenproblem each."""
    stay = [[i for i in range(len(matrix)) if i not in block.tolist()] for block in blocks]
    return torch.stack([torch.linalg.eigvalsh(matrix[i][:, i])[-1] for i in stay])


# the spectrum


def test_radius_of_a_kronecker_product_is_the_product_of_radii():
    a = torch.diag(torch.tensor([2.0, 1.0]))
    # eigenvalues of A kron G: {2, 1} times {3, 1}, so 6, 3, 2, 1
    assert torch.linalg.eigvalsh(torch.kron(a, G)).flip(0).tolist() == pytest.approx([6, 3, 2, 1], abs=1e-5)
    assert float(Spectrum(a).radius * Spectrum(G).radius) == pytest.approx(6)


def test_deletions_worked_by_hand():
    # without unit 0 or 1 the 2 x 2 block loses its off-diagonal: 2 of 3; unit 2 has no part in the top eigenvector
    three = torch.block_diag(G, torch.tensor([[0.5]]))
    assert Spectrum(G).share_without(singly(2)).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert Spectrum(three).without(singly(3)).tolist() == pytest.approx([2, 2, 3])
    assert Spectrum(three).share_without(singly(3)).tolist() == pytest.approx([2 / 3, 2 / 3, 1])


def test_a_unit_outside_of_the_top_eigenvector_leaves_exactly_all_of_it():
    three = torch.block_diag(G, torch.tensor([[0.5]]))
    assert float(Spectrum(three).share_without(singly(3))[2]) == 1


@pytest.mark.parametrize(("n", "width"), [(7, 1), (12, 3), (12, 4), (12, 11), (30, 5)])
def test_deletions_are_those_of_dense_eigenproblems(n, width):
    matrix = psd(n)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.stack([torch.randperm(n, generator=generator)[:width] for _ in range(6)])
    expected = slow_without(matrix, blocks)
    assert torch.allclose(Spectrum(matrix).without(blocks), expected, rtol=1e-9)
    shares = Spectrum(matrix).share_without(blocks)
    assert bool(((shares > 0) & (shares <= 1)).all())


def test_deletions_from_a_singular_matrix_with_equal_eigenvalues():
    matrix = torch.block_diag(torch.eye(3), torch.zeros(2, 2), 4 * torch.ones(2, 2)).double()
    blocks = torch.tensor([[0, 1], [5, 6], [3, 4], [5, 0]])
    # without (5, 6) the ones are left; without 5 the block of fours keeps its diagonal, 4 of 8
    assert Spectrum(matrix).without(blocks).tolist() == pytest.approx([8, 1, 8, 4])


def test_nothing_is_left_without_all_rows_and_zeros_stay_as_flat_as_they_are():
    assert Spectrum(G).without(torch.tensor([[0, 1]])).tolist() == [0]
    assert Spectrum(torch.zeros(3, 3)).share_without(singly(3)).tolist() == [1, 1, 1]


def test_large_matrices_get_lower_bounds(monkeypatch):
    matrix = psd(20)
    blocks = torch.arange(20).reshape(10, 2)
    exact, true = Spectrum(matrix).radius, Spectrum(matrix).without(blocks)
    monkeypatch.setattr(curvature, "_EXACT", 10)
    bound = Spectrum(matrix)
    assert float(bound.radius) == pytest.approx(float(exact), rel=1e-6)
    low = bound.without(blocks)
    assert bool((low <= true * (1 + 1e-6)).all())
    assert bool((low > 0.8 * true).all())
    # Rayleigh quotient of the top eigenvector with its entries in the block removed
    vector = torch.linalg.eigh(matrix)[1][:, -1].clone()
    vector[:2] = 0
    assert float(low[0]) == pytest.approx(float(vector @ matrix @ vector / (vector @ vector)), rel=1e-4)


def test_the_bound_of_an_isolated_direction_is_the_largest_diagonal_entry(monkeypatch):
    monkeypatch.setattr(curvature, "_EXACT", 2)
    matrix = torch.diag(torch.tensor([5.0, 3.0, 1.0]))
    # the top eigenvector is unit 0 alone; nothing of it is left, the next entry is
    assert Spectrum(matrix).without(singly(3)).tolist() == pytest.approx([3, 5, 5], rel=1e-6)


def test_power_iteration_finds_the_largest_magnitude_and_its_sign():
    matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
    value, vector = power_iteration(lambda v: matrix @ v, torch.ones(3), 200, 1e-12)
    assert value == pytest.approx(-3)  # the largest algebraic eigenvalue would be 2
    assert vector.abs().tolist() == pytest.approx([0, 1, 0], abs=1e-3)


def test_power_iteration_is_not_deceived_by_a_pair_of_opposite_sign():
    matrix = torch.diag(torch.tensor([3.0, -3.0, 1.0]))
    # v^T H v of (1, 1, 0) / sqrt 2 is 0 for ever, but |H v| is 3
    assert abs(power_iteration(lambda v: matrix @ v, torch.ones(3), 100, 1e-9)[0]) == pytest.approx(3)


def test_power_iteration_ends_at_zeros_and_at_its_limit():
    assert power_iteration(lambda v: 0 * v, torch.ones(3))[0] == 0
    calls = []
    power_iteration(lambda v: (calls.append(1), torch.tensor([2.0, 1.99]) * v)[1], torch.ones(2), 4, 0.0)
    assert len(calls) == 4


def test_radius_of_linear_regression_is_the_squared_length_of_its_input():
    layer = nn.Linear(3, 2).double()
    x = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    parameters = list(layer.parameters())
    gradient = torch.autograd.grad(0.5 * layer(x).square().sum(), parameters, create_graph=True)
    start = torch.arange(1.0, 9.0, dtype=torch.float64)
    value, _ = power_iteration(lambda v: hessian_product(gradient, parameters, v), start, 50, 1e-12)
    # the Hessian is (abar abar^T) kron I with abar = (1, 2, -1, 1): 1 + 4 + 1 + 1
    assert value == pytest.approx(7)


def test_hessian_product_is_the_dense_one_and_zero_where_the_loss_does_not_reach():
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(1, requires_grad=True)
    gradient = torch.autograd.grad((x[0] ** 2 * x[1]).sum(), [x, y], create_graph=True, allow_unused=True)
    # H = [[2 x1, 2 x0], [2 x0, 0]] = [[4, 2], [2, 0]]
    assert hessian_product(gradient, [x, y], torch.tensor([1.0, 10.0, 5.0])).tolist() == [24, 2, 0]
    linear = torch.autograd.grad(x.sum(), [x], create_graph=True)
    assert hessian_product(linear, [x], torch.ones(2)).tolist() == [0, 0]


# rows of inputs

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 6)),
    "stride and padding": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "dilated": (nn.Conv2d(2, 4, (3, 2), dilation=2, padding=(2, 1)), (2, 2, 8, 7)),
    "same": (nn.Conv2d(2, 3, 4, padding="same"), (2, 2, 6, 6)),
    "valid": (nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "1d": (nn.Conv1d(3, 4, 5, stride=3, padding=2), (2, 3, 11)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 3)),
    "one sample": (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 5)),
    "transposed, cropped": (nn.ConvTranspose2d(3, 4, 2, padding=2, dilation=1), (2, 3, 6, 6)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 4, stride=3, dilation=2), (2, 3, 5)),
}


def seen_of(layer, x):
    """What the torch function under a layer is called, and what it got."""
    found = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in curvature._LAYERS:
                found.append((func.__name__, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Spy():
        out = layer(x)
    return *found[0], out


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_is_its_rows_times_its_filters(name, monkeypatch):
    monkeypatch.setattr(curvature, "_MOST_ENTRIES", 300)  # a sample at a time
    layer, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    function, args, kwargs, out = seen_of(layer, x)
    rows = torch.cat(list(input_rows(function, args, kwargs)))
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    weight = layer.weight.movedim(1 if transposed else 0, 0).flatten(1)
    out = out if out.ndim == layer.weight.ndim else out[None]
    assert torch.allclose(rows @ weight.T + layer.bias, out.movedim(1, -1).flatten(0, -2), atol=1e-5)


def test_conv_rows_are_those_of_unfold():
    x = torch.randn(2, 3, 7, 7)
    (rows,) = input_rows("conv2d", (x, torch.zeros(4, 3, 3, 3), None, (2, 2), (1, 1), (1, 1), 1), {})
    assert torch.equal(rows, F.unfold(x, 3, stride=2, padding=1).movedim(1, 2).flatten(0, 1))


def test_a_one_by_one_conv_on_a_pixel_reads_what_a_linear_layer_does():
    x = torch.randn(5, 3)
    (rows,) = input_rows("conv2d", (x[:, :, None, None], torch.zeros(4, 3, 1, 1)), {})
    (flat,) = input_rows("linear", (x, torch.zeros(4, 3)), {})
    assert torch.equal(rows, flat)


# factors of a model


class Small(nn.Module):
    """A convolution without bias, one with stride, and a linear layer; no norm, so that samples are independent."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.conv2(torch.tanh(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


WEIGHTS = ["conv1.weight", "conv2.weight", "fc.weight"]


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Small().double()
    return model, torch.randn(16, 1, 6, 6, dtype=torch.float64), torch.arange(16) % 3


def one_process(x):
    return x


def factors_of(model, batches, weights=WEIGHTS, scale=1.0, total=one_process, decay=0.0, loss_fn=F.cross_entropy):
    """Factors of one update over some batches, each with its own backward."""
    running = RunningFactors(decay)
    running.know(trace(model, batches[0][0][:2]), weights)
    running.begin(model)
    for x, y in batches:
        running.expect(scale)
        model.zero_grad()
        (scale * loss_fn(model(x), y)).backward()
        running.settle()
        running.note({name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None})
    running.update(total)
    return running.factors


def assert_close(first, second, rtol=1e-9):
    assert first.keys() == second.keys()
    for name in first:
        for key in ("a", "g", "mean_gradient"):
            a, b = getattr(first[name], key), getattr(second[name], key)
            assert float((a - b).abs().max()) <= rtol * float(b.abs().max()), (name, key)


def test_factors_are_those_of_a_loop_over_samples(small):
    model, x, y = small
    found = factors_of(model, [(x, y)])
    caught = {}

    def keep(name):
        def hook(module, args, out):
            caught[name] = args[0], out

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in ("conv1", "conv2", "fc")]
    expected = {name: [0.0, 0.0, 0] for name in caught | dict.fromkeys(("conv1", "conv2", "fc"))}
    for n in range(16):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for name, (read, made) in caught.items():
            (g,) = torch.autograd.grad(loss, made, retain_graph=True)
            layer = model.get_submodule(name)
            if name == "fc":
                rows, g = read, g
            else:
                rows = F.unfold(read, 3, padding=layer.padding, stride=layer.stride)[0].T
                g = g[0].flatten(1).T
            if layer.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
            expected[name][0] = expected[name][0] + rows.detach().T @ rows.detach() / 16
            expected[name][1] = expected[name][1] + g.T @ g
            expected[name][2] += len(g)
    for handle in handles:
        handle.remove()
    for name, (a, g, positions) in expected.items():
        assert torch.allclose(found[f"{name}.weight"].a, a, rtol=1e-9)
        assert torch.allclose(found[f"{name}.weight"].g, g / positions, rtol=1e-9)
    gradient = found["fc.weight"].mean_gradient
    assert torch.allclose(gradient, torch.cat([model.fc.weight.grad, model.fc.bias.grad[:, None]], dim=1))


def test_factors_do_not_depend_on_the_batch_size(small):
    model, x, y = small
    whole, parts = factors_of(model, [(x, y)]), factors_of(model, list(zip(x.split(4), y.split(4), strict=True)))
    assert_close(parts, whole)
    uneven = factors_of(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert torch.allclose(uneven["fc.weight"].g, whole["fc.weight"].g)


def test_what_the_loss_is_multiplied_by_is_undone(small):
    # without it G would be 2 ** 20 times as large
    model, x, y = small
    assert_close(factors_of(model, [(x, y)], scale=1024.0), factors_of(model, [(x, y)]))


def test_two_processes_find_what_one_does(small):
    model, x, y = small
    halves = [(x[:8], y[:8]), (x[8:], y[8:])]
    alone = factors_of(model, [(x, y)])
    sums, asked = {}, []

    def gather(value):
        asked.append(value.clone())
        return value

    factors_of(model, halves[:1], total=gather)
    sums, asked = asked, []
    numbered = iter(range(len(sums)))
    second = factors_of(model, halves[1:], total=lambda value: value + sums[next(numbered)])
    for name in alone:
        assert torch.allclose(second[name].a, alone[name].a)
        assert torch.allclose(second[name].g, alone[name].g)


def test_averages_fade_with_the_bias_of_the_start_removed(small):
    model, x, y = small
    running = RunningFactors(0.9)
    running.know(trace(model, x[:2]), WEIGHTS)
    seen = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        running.begin(model)
        running.expect(1.0)
        model.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        running.note({name: p.grad for name, p in model.named_parameters()})
        running.update(one_process)
        seen.append(factors_of(model, [(x[part], y[part])])["fc.weight"])
    # A_3 = 0.1 (0.81 a_1 + 0.9 a_2 + a_3) / (1 - 0.9^3)
    for key in ("a", "g", "mean_gradient"):
        first, second, third = (getattr(found, key) for found in seen)
        expected = 0.1 * (0.81 * first + 0.9 * second + third) / (1 - 0.9**3)
        assert torch.allclose(getattr(running.factors["fc.weight"], key), expected)


def test_a_batch_that_is_not_finite_is_left_out(small):
    model, x, y = small
    running = RunningFactors(0.5)
    running.know(trace(model, x[:2]), WEIGHTS)

    def update(images):
        running.begin(model)
        running.expect(1.0)
        F.cross_entropy(model(images), y).backward()
        running.update(one_process)

    update(x)
    before = running.factors["fc.weight"].a
    update(torch.full_like(x, math.nan))
    assert torch.equal(running.factors["fc.weight"].a, before)
    assert running.skipped == 3


def test_only_gradients_of_the_loss_are_looked_at(small):
    model, x, y = small
    running = RunningFactors(0.0)
    running.know(trace(model, x[:2]), WEIGHTS)
    running.begin(model)
    F.cross_entropy(model(x), y).backward()  # of a penalty, say: nobody has said that the loss comes
    with torch.no_grad():
        model(x)
    running.update(one_process)
    assert running.factors == {}


def test_a_weight_that_is_used_twice_has_one_sample_and_two_positions(net):
    torch.manual_seed(0)
    model = net(lambda n, x: n.out(n.fc(torch.tanh(n.fc(x)))), fc=nn.Linear(3, 3), out=nn.Linear(3, 2))
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    found = factors_of(model, [(x, y)], ["fc.weight"])["fc.weight"]
    assert found.counts.tolist() == [6, 12, 1]
    both = torch.cat([x, torch.tanh(model.fc(x)).detach()])
    both = torch.cat([both, torch.ones(12, 1)], dim=1)
    assert torch.allclose(found.a, (both.T @ both / 6).double(), rtol=1e-5)


def test_functional_layers_and_sequences_have_factors(net):
    torch.manual_seed(0)
    model = net(
        lambda n, x: F.linear(torch.tanh(F.conv1d(x, n.w, stride=2)).mT, weight=n.v),
        w=nn.Parameter(torch.randn(4, 2, 3)),
        v=nn.Parameter(torch.randn(3, 4)),
    )
    x, y = torch.randn(6, 2, 9), torch.arange(24).reshape(6, 4) % 3
    found = factors_of(model, [(x, y)], ["w", "v"], loss_fn=lambda out, y: F.cross_entropy(out.mT, y))
    assert {name: factors.counts.tolist() for name, factors in found.items()} == {"w": [6, 24, 1], "v": [6, 24, 1]}
    assert found["w"].a.shape == (6, 6)
    assert found["v"].a.shape == (4, 4)


def test_an_input_written_to_after_the_layer_ran_is_an_error(net):
    model = net(lambda n, x: n.out(n.fc(x) + x.mul_(2).sum()), fc=nn.Linear(3, 3), out=nn.Linear(3, 2))
    running = RunningFactors(0.0)
    running.know(trace(model, torch.randn(2, 3)), ["fc.weight"])
    running.begin(model)
    running.expect(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # keeps a copy of its own, so that autograd does not mind
        loss = model(torch.randn(4, 3)).float().sum()
    with pytest.raises(RuntimeError, match=r"what fc reads was written to in place .* list the layer in ignore="):
        loss.backward()
    running.end()


def test_layers_without_factors_say_why(net):
    model = net(
        lambda n, x: n.fc(n.rnn(n.emb(x))[0].mT.contiguous()),
        emb=nn.Embedding(5, 4), rnn=nn.LSTM(4, 4, batch_first=True), fc=nn.Conv1d(4, 4, 1, groups=2),
    )  # fmt: skip
    graph = trace(model, torch.zeros(2, 3, dtype=torch.long))
    assert factor_layer(graph, "rnn.weight_ih_l0") == "'lstm' of rnn.weight_ih_l0 has no Kronecker factors"
    assert factor_layer(graph, "emb.weight") == "'embedding' of emb.weight has no Kronecker factors"
    assert "works in groups" in factor_layer(graph, "fc.weight")
    assert factor_layer(graph, "no.weight") == "no.weight does not run in eval mode"


def test_a_weight_that_is_computed_from_another_has_no_factors():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    graph = trace(model, torch.randn(2, 3))
    assert "is made into another tensor" in factor_layer(graph, "0.parametrizations.weight.original1")
    assert not isinstance(factor_layer(graph, "2.weight"), str)


def test_factors_follow_a_cut_and_zeros(small):
    model, x, y = small
    graph = trace(model, x[:2])
    running = RunningFactors(0.0)
    running.know(graph, WEIGHTS)
    running._factors = factors_of(model, [(x, y)])
    blank = RunningFactors(0.0)
    blank.layers, blank._factors = running.layers, dict(running.factors)
    before = dict(running.factors)
    plan = graph.plan({"conv1": torch.tensor([True, False, True]), "conv2": torch.tensor([False, True, True, True])})
    assert running.follow(plan)
    assert not running.follow(plan)
    patches = [*range(9), *range(18, 28)]  # nine weights of input channels 0 and 2, and the bias
    assert torch.equal(running.factors["conv2.weight"].a, before["conv2.weight"].a[patches][:, patches])
    assert torch.equal(running.factors["conv2.weight"].g, before["conv2.weight"].g[1:, 1:])
    assert torch.equal(running.factors["fc.weight"].a, before["fc.weight"].a[1:, 1:])
    assert torch.equal(running.factors["conv1.weight"].gradient, before["conv1.weight"].gradient[[0, 2]])
    blank.blank(plan)
    assert blank.factors["conv2.weight"].a.shape == before["conv2.weight"].a.shape
    assert torch.equal(blank.factors["conv2.weight"].a[patches][:, patches], running.factors["conv2.weight"].a)
    assert not bool(blank.factors["conv2.weight"].a[9:18].any())
    assert not bool(blank.factors["conv2.weight"].g[0].any())


def test_state_is_taken_up_bit_by_bit(small):
    model, x, y = small
    running = RunningFactors(0.0)
    running.know(trace(model, x[:2]), WEIGHTS)
    running._factors = factors_of(model, [(x, y)])
    other = RunningFactors(0.0)
    other.know(trace(model, x[:2]), WEIGHTS)
    other.load_state_dict(running.state_dict(), torch.device("cpu"))
    for name, found in running.factors.items():
        again = other.factors[name]
        assert all(torch.equal(getattr(found, key), getattr(again, key)) for key in vars(found))
        assert again.inputs is not found.inputs
    running.factors["fc.weight"].inputs.zero_()
    assert bool(other.factors["fc.weight"].inputs.any())


def test_factors_without_samples_are_zeros():
    empty = Factors.zeros(torch.ones(2, 3))
    assert empty.inputs.shape == (3, 3)
    assert empty.counts.tolist() == [0, 0, 0]
    assert empty.finite
