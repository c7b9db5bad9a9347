"""Eighteen published networks, traced and cut by the same rules as any other: no line of the package knows one of them.

Pictures are as small as each network takes; shares, flops and differences do not need large ones.
"""

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune.cost import count
from lightning_prune.ranking import rank_global
from lightning_prune.surgery import cut, difference, trace

# name -> (pixels, least share of the parameters with a coordinate that can go)
MODELS = {
    "resnet18": (64, 0.999),
    "resnet50": (64, 0.999),
    "vgg16_bn": (32, 0.999),
    "alexnet": (64, 0.999),
    "squeezenet1_1": (64, 0.998),
    "densenet121": (64, 0.999),
    "googlenet": (64, 0.999),
    "inception_v3": (299, 0.999),
    "mobilenet_v2": (64, 0.999),
    "mobilenet_v3_small": (64, 0.999),
    "mnasnet0_5": (64, 0.999),
    "shufflenet_v2_x0_5": (64, 0.997),
    "regnet_y_400mf": (64, 0.999),
    "resnext50_32x4d": (64, 0.999),
    "efficientnet_b0": (64, 0.999),
    "convnext_tiny": (64, 0.999),
    "vit_b_16": (64, 0.65),  # the hidden units of its MLPs
}
QUICK = ("resnet18", "mobilenet_v3_small", "squeezenet1_1")


def made(name, pixels, with_random_norms):
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"image_size": pixels} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    return with_random_norms(model), torch.randn(1, 3, pixels, pixels)


def check(model: nn.Module, x: torch.Tensor, share: float) -> None:
    graph = trace(model, x)
    assert graph.prunable_share >= share
    dense = graph.cost()
    assert (dense.flops, dense.params) == (count(model, x).flops, sum(p.numel() for p in model.parameters()))

    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.size, generator=generator) for group in graph.groups}

    def fits(counts):
        return graph.costs.flops_and_params(torch.tensor([counts[n] for n in scores]).numpy())[0] <= dense.flops // 2

    plan = graph.plan(rank_global(scores, fits))
    model.double()
    distance = difference(model, plan, x)
    model.float()
    exact = all(group.exact for group in graph.groups if plan.groups[group.name][0] < group.size)
    assert distance < (1e-9 if exact else float("inf"))
    cut(model, plan)  # proved, norms across channels put aside
    predicted, counted = graph.cost(plan), count(model, x)
    assert (predicted.flops, predicted.params) == (counted.flops, counted.params)
    assert 0.45 * dense.flops < counted.flops <= 0.5 * dense.flops
    with torch.no_grad():
        model.train()(torch.cat([x, x]))  # auxiliary heads run too


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],  # slow: seconds each
)
def test_a_network_is_cut_to_half_its_flops_and_computes_what_the_zeroed_one_does(name, with_random_norms):
    pixels, share = MODELS[name]
    model, x = made(name, pixels, with_random_norms)
    check(model, x, share)


def test_only_norms_across_channels_make_a_network_inexact(with_random_norms):
    model, x = made("resnet18", 64, with_random_norms)
    assert all(group.exact for group in trace(model, x).groups)


@pytest.mark.slow  # 56 layers
def test_a_cifar_network_of_56_layers_loses_inner_channels_and_those_of_its_padded_stream(with_random_norms):
    # 27 blocks with one inner convolution each, and the stream: 16 channels, then 8 + 16 + 8, then 16 + 32 + 16; what
    # is padded goes in pairs, one from either side, as the block holds the width of its padding
    from benchmarks.graph import CifarResNet

    torch.manual_seed(0)
    model = with_random_norms(CifarResNet(56))
    x = torch.randn(1, 3, 32, 32)
    graph = trace(model, x)
    assert [group.name for group in graph.groups] == [
        "conv1",
        *(f"layer1.{block}.conv1" for block in range(9)),
        "layer2.0.conv1",
        "layer2.0.conv2",
        *(f"layer2.{block}.conv1" for block in range(1, 9)),
        "layer3.0.conv1",
        "layer3.0.conv2",
        *(f"layer3.{block}.conv1" for block in range(1, 9)),
    ]
    sizes = {name: graph.group(name).size for name in ("conv1", "layer2.0.conv2", "layer3.0.conv2")}
    assert sizes == {"conv1": 16, "layer2.0.conv2": 8, "layer3.0.conv2": 16}
    check(model, x, 0.99)
