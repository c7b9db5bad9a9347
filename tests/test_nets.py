"""The networks other files of tests prune: each runs, and trains every parameter it says it uses."""

import pytest
import torch
from torch import nn

from tests.nets import NETS


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [t for item in items for t in tensors(item)]


def run(net, inputs):
    if isinstance(inputs, dict):
        return tensors(net(**inputs))
    return tensors(net(*inputs) if isinstance(inputs, tuple) else net(inputs))


def without_gradient(name, batch=2):
    torch.manual_seed(0)
    net = NETS[name].build().train()
    sum(t.float().square().sum() for t in run(net, NETS[name].inputs(batch))).backward()
    return [key for key, p in net.named_parameters() if p.grad is None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile reads it of its own tensors
@pytest.mark.parametrize("name", [name for name in NETS if name != "value_dependent"])
def test_a_network_trains_every_parameter_it_has(name):
    assert without_gradient(name) == []


def test_only_one_branch_of_the_value_dependent_network_runs():
    untouched = {key.split(".")[0] for key in without_gradient("value_dependent", batch=1)}
    assert untouched in ({"dark"}, {"bright"})


@pytest.mark.parametrize("name", NETS)
def test_the_first_dimension_of_every_output_is_the_batch(name):
    torch.manual_seed(0)
    net = NETS[name].build().eval()
    with torch.no_grad():
        sizes = {t.shape[0] for t in run(net, NETS[name].inputs(3))}
    assert sizes == {3}


def test_the_same_seed_gives_the_same_network_and_inputs():
    def made():
        torch.manual_seed(0)
        return NETS["unet"].build(), NETS["unet"].inputs(1)

    (one, x), (other, y) = made(), made()
    assert torch.equal(x, y)
    assert torch.equal(
        nn.utils.parameters_to_vector(one.parameters()), nn.utils.parameters_to_vector(other.parameters())
    )
