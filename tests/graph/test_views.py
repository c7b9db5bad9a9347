import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_prune import trace
from lightning_prune.graph.views import LayerView, gate_gradients


def views(model, x):
    """Group name -> views of its producers."""
    parameters = dict(model.named_parameters())
    graph = trace(model, x)
    return {g.name: [LayerView(g, p, parameters) for p in g.producers] for g in graph.groups}


def number(module):
    """Give a module's parameters the values 0, 1, 2, ..."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.arange(float(parameter.numel())).view_as(parameter))
    return module


def test_filters_of_a_convolution_are_its_rows():
    conv = number(nn.Conv2d(2, 3, 2))
    view = views(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(3, 1, 1)), torch.zeros(1, 2, 4, 4))["0"][0]
    assert (view.name, view.weight_name) == ("0", "0.weight")
    assert view.weight is conv.weight
    assert view.filters.tolist() == conv.weight.flatten(1).tolist()
    assert view.bias.tolist() == [0.0, 1.0, 2.0]


def test_filters_of_a_linear_layer_are_its_rows():
    linear = number(nn.Linear(2, 3))
    view = views(nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))["0"][0]
    assert view.filters.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_filters_of_a_transposed_convolution_are_its_columns():
    conv = number(nn.ConvTranspose2d(2, 3, 1, bias=False))  # weight (in, out, 1, 1)
    view = views(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(3, 1, 1)), torch.zeros(1, 2, 4, 4))["0"][0]
    assert view.filters.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert view.bias is None


def test_filters_of_another_tensor_are_taken_alike():
    conv = nn.ConvTranspose2d(2, 3, 1, bias=False)
    view = views(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(3, 1, 1)), torch.zeros(1, 2, 4, 4))["0"][0]
    other = torch.arange(6.0).view(2, 3, 1, 1)
    assert view.filters_of(other).tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_gradients_are_none_before_the_first_backward():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.ones(1, 2)
    view = views(model, x)["0"][0]
    assert view.filter_grads is None
    assert view.gate_gradient is None
    assert view.weight_gradient is None
    model(x).sum().backward()
    assert torch.equal(view.filter_grads, model[0].weight.grad)
    assert view.gate_gradient.shape == (3,)


def test_norm_that_follows_gives_scale_and_shift():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), number(nn.BatchNorm2d(3)), nn.ReLU(), nn.Conv2d(3, 2, 1))
    found = views(model, torch.zeros(2, 1, 4, 4))["0"][0]
    assert found.gamma.tolist() == found.beta.tolist() == [0.0, 1.0, 2.0]
    assert found.has_norm
    assert found.gate_names == ["1.weight"]


def test_layer_without_a_norm_has_neither_scale_nor_shift():
    view = views(nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)), torch.zeros(2, 1, 4, 4))["0"][0]
    assert view.gamma is None
    assert view.beta is None
    assert not view.has_norm
    assert view.gate_names == []


def test_norm_called_as_a_function_of_its_module_is_found(net):
    # no module stands between the layers: the trace says what follows
    layers = {"a": nn.Conv2d(1, 3, 1), "bn": nn.BatchNorm2d(3), "b": nn.Conv2d(3, 2, 1)}
    model = net(lambda n, x: n.b(F.relu(n.bn(n.a(x)))), **layers)
    assert views(model, torch.zeros(2, 1, 4, 4))["a"][0].gamma.shape == (3,)


def test_norm_that_is_not_affine_has_no_scale():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    view = views(model, torch.zeros(2, 1, 4, 4))["0"][0]
    assert view.gamma is None


def test_columns_of_a_reader_are_by_channel():
    reader = number(nn.Conv2d(3, 2, 1, bias=False))
    view = views(nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), reader), torch.zeros(1, 1, 4, 4))["0"][0]
    (consumer,) = view.consumers
    assert consumer.name == "2"
    assert consumer.columns.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_columns_behind_a_flatten_are_blocks_of_the_map():
    # channel c of a 2 x 2 map is columns 4 c to 4 c + 3
    reader = number(nn.Linear(12, 2, bias=False))
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), reader)
    view = views(model, torch.zeros(1, 1, 2, 2))["0"][0]
    columns = view.consumers[0].columns
    assert columns.shape == (3, 8)
    assert sorted(columns[1].tolist()) == [4.0, 5.0, 6.0, 7.0, 16.0, 17.0, 18.0, 19.0]


def test_residual_stream_has_a_view_of_each_layer_that_writes_to_it(tiny_net):
    stream = views(tiny_net(), torch.zeros(2, 1, 8, 8))["stem"]
    assert [view.name for view in stream] == ["stem", "conv2"]
    assert [view.filters.shape for view in stream] == [(6, 9), (6, 108)]
    for view in stream:
        assert [(c.name, tuple(c.columns.shape)) for c in view.consumers] == [("conv1", (6, 108)), ("hidden", (6, 12))]


def test_views_read_the_parameters_as_they_are_now():
    linear = nn.Linear(2, 3)
    view = views(nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))["0"][0]
    with torch.no_grad():
        linear.weight.fill_(7.0)
    assert view.filters.unique().tolist() == [7.0]


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_are_one_row_per_channel_of_the_group(groups):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=groups), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=groups), nn.ReLU())
    model = nn.Sequential(*model, nn.Conv2d(4, 1, 1))
    for group in views(model, torch.zeros(1, 2, 8, 8)).values():
        for view in group:
            assert view.filters.shape[0] == view.group.size


@pytest.mark.parametrize("name", ["resnet18", "densenet", "transformer", "tiny"])
def test_gate_gradients_of_all_groups_are_those_of_their_layers_added_up(name, tiny_net):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = {
        "resnet18": (torchvision.models.resnet18(num_classes=5), torch.randn(2, 3, 32, 32)),
        "densenet": (torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), torch.randn(2, 3, 32, 32)),
        "transformer": (nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 1)), torch.randn(2, 3, 8)),
        "tiny": (tiny_net(), torch.randn(2, 1, 8, 8)),
    }[name]
    parameters = dict(model.named_parameters())
    graph = trace(model, x)
    found = {g.name: [LayerView(g, p, parameters, graph) for p in g.producers] for g in graph.groups if g.producers}
    assert gate_gradients(found) == {}  # there is none yet
    model(x).square().sum().backward()
    assert_added_up(found)
    spared = next(parameter for layers in found.values() for parameter, _, _ in layers[0]._gated)
    spared.grad = None  # what is missing adds nothing
    assert_added_up(found)


def assert_added_up(found):
    parts = {group: [layer.gate_gradient for layer in layers] for group, layers in found.items()}
    known = {group: [part for part in each if part is not None] for group, each in parts.items()}
    torch.testing.assert_close(gate_gradients(found), {group: sum(each) for group, each in known.items() if each})
