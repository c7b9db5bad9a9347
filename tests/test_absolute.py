import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.absolute import propagate, responses
from lightning_prune.batches import evaluating
from lightning_prune.graph.flow import Call
from lightning_prune.surgery import trace
from tests.conftest import Net, with_random_norms


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def came_back(model, x, response=None, decide=None, final="fc"):
    """group -> what comes back to its gates."""
    graph = trace(model, x)
    call = next(graph.flow.call(n) for n in graph.flow.made if graph.flow.call(n).module == final)
    taps = {group.name: graph.gates(group) for group in graph.groups}
    with evaluating(model):
        return propagate(model, x, call, response, taps, decide or (lambda name, found: None))


def layers_of(*weights):
    """Linear layers without biases from their weights, with a ReLU behind each, and an output layer."""
    layers = []
    for weight in weights:
        layer = nn.Linear(len(weight[0]), len(weight), bias=False)
        layer.weight.data = torch.tensor(weight)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(len(weights[-1]), 2))


W1 = [[1.0, -1.0], [2.0, 0.0], [0.0, 3.0]]
W2 = [[1.0, -2.0, 0.0], [0.5, 1.0, -1.0]]
W0 = [[1.0, 1.0], [1.0, -1.0]]


def test_importance_goes_back_through_absolute_weights():
    # s1 = |W2|^T (3, 1); with signs it would be (3.5, -5, -1)
    found = came_back(layers_of(W1, W2), rows(2, 2), torch.tensor([3.0, 1.0]), final="4")
    assert found["2"].tolist() == [3.0, 1.0]
    assert found["0"].tolist() == [3.5, 7.0, 1.0]


def test_channels_that_go_pass_nothing_on():
    # without unit 2 of layer 2 s1 = (3, 6, 0); without unit 3 of layer 1 as well s0 = |W1|^T (3.5, 7, 0) = (17.5, 3.5)
    gone = {"4": torch.tensor([True, False])}
    found = came_back(
        layers_of(W0, W1, W2), rows(2, 2), torch.tensor([3.0, 1.0]), lambda name, _: gone.get(name), final="6"
    )
    assert found["2"].tolist() == [3.0, 6.0, 0.0]
    gone = {"2": torch.tensor([True, True, False])}
    found = came_back(
        layers_of(W0, W1, W2), rows(2, 2), torch.tensor([3.0, 1.0]), lambda name, _: gone.get(name), final="6"
    )
    assert found["0"].tolist() == [17.5, 3.5]  # and 6.5 with the third unit


def test_what_comes_back_to_a_channel_is_summed_over_its_positions():
    # valid convolution with |W| summing to 4 and 3 per input channel, s (1, 2; 3, 4) sums to 10
    conv = nn.Conv2d(2, 1, 2)
    conv.weight.data = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]], [[-3.0, 0.0], [0.0, 0.0]]]])
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), conv, nn.Flatten(), nn.Linear(4, 2))
    found = came_back(model, rows(1, 1, 3, 3), torch.tensor([1.0, 2.0, 3.0, 4.0]), final="4")
    assert found["0"].tolist() == [40.0, 30.0]


@pytest.mark.parametrize(("size", "stride", "output_padding"), [(8, 2, 1), (7, 2, 0), (8, 1, 0)])
def test_convolution_is_what_a_transposed_one_of_absolute_weights_gives(size, stride, output_padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride, 1)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), conv, nn.Flatten())
    width = 5 * ((size - 1) // stride + 1) ** 2
    model.append(nn.Linear(width, 2))
    response = torch.rand(width)
    found = came_back(model, rows(1, 1, size, size), response, final="4")["0"]
    side = (size - 1) // stride + 1
    expected = F.conv_transpose2d(
        response.reshape(1, 5, side, side), conv.weight.abs(), None, stride, 1, output_padding
    )
    assert expected.shape[-1] == size
    assert torch.allclose(found.float(), expected.sum((0, 2, 3)), rtol=1e-5)


def test_batch_norm_multiplies_by_its_absolute_scale_over_the_deviation():
    model = with_random_norms(
        Net(
            lambda n, x: n.fc(F.relu(n.b(n.norm(F.relu(n.a(x))))).mean((2, 3))),
            a=nn.Conv2d(1, 4, 1),
            norm=nn.BatchNorm2d(4),
            b=nn.Conv2d(4, 4, 1, groups=4),
            fc=nn.Linear(4, 2),
        )
    )
    model.norm.weight.data[1] *= -1
    graph = trace(model, rows(1, 1, 2, 2))
    call = next(graph.flow.call(n) for n in graph.flow.made if graph.flow.call(n).module == "fc")
    with evaluating(model):
        found = propagate(model, rows(1, 1, 2, 2), call, torch.ones(4), {"a": graph.flow.made_by("a.weight", "a")})["a"]
    expected = model.norm.weight.abs() / (model.norm.running_var + 1e-5).sqrt() * model.b.weight.abs().flatten()
    assert torch.allclose(found.float(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: torch.tanh(x) - 1,
        lambda x: -x / 1.0,
        lambda x: F.dropout(F.leaky_relu(x), 0.5, False),
        lambda x: 3 - x,
    ],
)
def test_what_neither_makes_nor_loses_importance(between):
    model = Net(lambda n, x: n.fc(between(n.a(x)).mean((2, 3))), a=nn.Conv2d(1, 4, 1), fc=nn.Linear(4, 2))
    response = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = came_back(model, rows(1, 1, 4, 4), response)["a"]
    assert torch.allclose(found.float(), response)


def test_branches_that_are_added_get_it_whole_and_what_is_read_twice_gets_the_sum():
    def forward(n, x):
        x = n.a(x)
        return n.fc(F.relu(x + n.b(F.relu(n.c(x)))))

    model = Net(forward, a=nn.Linear(3, 2), c=nn.Linear(2, 2), b=nn.Linear(2, 2), fc=nn.Linear(2, 2))
    response = torch.tensor([1.0, 2.0])
    graph = trace(model, rows(1, 3))
    call = next(graph.flow.call(n) for n in graph.flow.made if graph.flow.call(n).module == "fc")
    taps = {name: graph.flow.made_by(f"{name}.weight", "c" if name == "c" else "a") for name in "abc"}
    with evaluating(model):
        found = propagate(model, rows(1, 3), call, response, taps)
    b, c = model.b.weight.abs().double(), model.c.weight.abs().double()
    assert torch.allclose(found["b"], response.double())
    assert torch.allclose(found["c"], b.T @ response.double())
    assert torch.allclose(found["a"], response.double() + c.T @ (b.T @ response.double()))


def test_concatenation_gives_each_its_slice():
    model = Net(
        lambda n, x: n.fc(torch.cat([n.a(x), n.b(x)], 1)), a=nn.Linear(3, 2), b=nn.Linear(3, 3), fc=nn.Linear(5, 2)
    )
    found = came_back(model, rows(1, 3), torch.arange(5.0))
    assert (found["a"].tolist(), found["b"].tolist()) == ([0.0, 1.0], [2.0, 3.0, 4.0])


def test_factors_of_a_product_get_it_whole():
    model = Net(
        lambda n, x: n.fc((n.a(x) * torch.sigmoid(n.b(x)[:, :, None, None])[:, :, 0, 0]) * -n.scale),
        a=nn.Linear(3, 2), b=nn.Linear(3, 2), fc=nn.Linear(2, 2), scale=nn.Parameter(torch.tensor([2.0, -3.0])),
    )  # fmt: skip
    graph = trace(model, rows(1, 3))
    call = next(graph.flow.call(n) for n in graph.flow.made if graph.flow.call(n).module == "fc")
    taps = {name: graph.flow.made_by(f"{name}.weight", "a") for name in "ab"}
    with evaluating(model):
        found = propagate(model, rows(1, 3), call, torch.tensor([1.0, 1.0]), taps)
    assert found["a"].tolist() == found["b"].tolist() == [2.0, 3.0]


def conv_net():
    return with_random_norms(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(20, 2),
        )
    ).eval()


def test_change_of_the_response_is_bounded_by_what_comes_back():
    # <s, |F(x) - F(mask x)|> <= sum of s_j |x_j| over what is masked, position by position
    torch.manual_seed(0)
    model, x, response = conv_net(), rows(3, 2, 8, 8), torch.rand(20)
    image = torch.relu(model[1](model[0](x))).detach()
    per_position = torch.zeros_like(image[:1], dtype=torch.float64)
    graph = trace(model, x)
    call = graph.flow.call(max(graph.flow.made))
    (tap,) = graph.gates(graph.group("0"))

    class Keep:
        """Reads the importance of each position where the sum over them is taken."""

        call, output, dim, indices, overwritten = tap.call, tap.output, tap.dim, tap.indices, tap.overwritten

        def maps(self, gradient, batch):
            per_position.add_(gradient)
            return tap.maps(gradient, batch)

    with evaluating(model):
        propagate(model, x, call, response, {"0": [Keep()]})
    tight = 0
    for seed in range(20):
        mask = torch.rand(image.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
        with torch.no_grad():
            change = ((model[3:9](image) - model[3:9](image * mask)).abs() * response).sum(1)
        bound = (per_position * image.abs() * ~mask).sum((1, 2, 3))
        assert (change <= bound + 1e-6).all()
        tight = max(tight, (change / bound).max().item())
    assert tight > 0.01


def test_only_weights_behind_a_layer_count_and_they_count_linearly():
    torch.manual_seed(0)
    model, x, response = conv_net(), rows(1, 2, 8, 8), torch.rand(20)
    before = came_back(model, x, response, final="9")["0"]
    other = copy.deepcopy(model)
    nn.init.normal_(other[0].weight)
    nn.init.normal_(other[4].bias)
    assert torch.equal(came_back(other, x, response, final="9")["0"], before)
    assert torch.allclose(came_back(model, x, 3 * response, final="9")["0"], 3 * before)
    other[4].weight.data *= -2
    assert torch.allclose(came_back(other, x, response, final="9")["0"], 2 * before)


def test_scores_of_a_deep_network_do_not_overflow():
    # each layer multiplies by a thousand: 1e60 in all, more than a float32 holds
    model = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(22)])
    for layer in model:
        nn.init.constant_(layer.weight, 100.0)
    found = came_back(model, rows(1, 10), torch.ones(10), final="21")["0"]
    assert found[0].item() == pytest.approx(1e60)


def test_model_is_as_before():
    torch.manual_seed(0)
    model, x = conv_net().train(), rows(1, 2, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    came_back(model, x, torch.ones(20), final="9")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def checkpointed(reentrant):
    block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    layers = {"a": nn.Linear(3, 4), "block": block, "fc": nn.Linear(4, 2)}
    anew = partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    return [Net(lambda n, x, run=run: n.fc(run(n.block, n.a(x))), **layers) for run in (lambda f, x: f(x), anew)]


def test_blocks_that_are_computed_anew_are_absolute_too():
    first, second = (came_back(model, rows(2, 3), torch.rand(4).fill_(0.5)) for model in checkpointed(False))
    assert list(first) == list(second) == ["block.2", "block.0", "a"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_blocks_without_gradients_are_refused():
    with pytest.raises(ValueError, match=r"'linear', which block.0 calls without gradients; .* use_reentrant=False"):
        came_back(checkpointed(True)[1], rows(2, 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.softmax(1), "it is not known how changes go through 'softmax', which head calls"),
        (lambda x: 1 / (x + 2), "go through '__rdiv__', which head calls"),
        (lambda x: x @ x.mT, "go through 'matmul' of two maps"),
    ],
)
def test_function_without_a_rule_is_refused_by_name_and_place(function, message):
    head = Net(lambda n, x: function(n.inner(x)), inner=nn.Linear(4, 4))
    model = Net(lambda n, x: n.fc(n.head(n.a(x))[:, :2]), a=nn.Linear(3, 4), head=head, fc=nn.Linear(2, 2))
    x = rows(2, 3)
    call = Call("fc", 0, "linear", 0)
    with evaluating(model), pytest.raises(ValueError, match=message):
        propagate(model, x, call, None, {})
    assert not any(module._forward_hooks for module in model.modules())


def test_responses_are_means_over_positions():
    assert responses(Call("", 0, "linear", 0), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist() == [[2.0, 3.0]]
    assert responses(Call("", 0, "conv2d", 0), torch.arange(8.0).reshape(1, 2, 2, 2)).tolist() == [[1.5, 5.5]]
