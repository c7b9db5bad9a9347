"""The channel graph on eighteen architectures: what can go, whether the cost is predicted, whether the cut is right.

    python benchmarks/graph.py [--models resnet18 ...] [--out FILE.csv]

Random weights with random norms, channels chosen by `RandomChannels`' rule at half the flops, seed 0, one thread.
``difference`` is the largest relative difference, in float64, between the cut network and the uncut one with the
removed coordinates at zero; it is large where a norm runs across channels, which the column ``inexact`` counts.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.budget import Budget
from lightning_prune.ranking import rank_global
from lightning_prune.surgery import difference

MODELS = [
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "alexnet",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "cifar_resnet56",
]


class CifarResNet(nn.Module):
    """He et al.'s CIFAR ResNet: 16/32/64 channels, identity shortcuts padded with zero channels."""

    def __init__(self, depth: int = 56) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, planes in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(_CifarBlock(width, planes, 2 if i == 0 and stage > 1 else 1))
                width = planes
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


class _CifarBlock(nn.Module):
    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.pad = stride, (planes - width) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and an example input for it."""
    torch.manual_seed(0)
    if name == "cifar_resnet56":
        model, size = CifarResNet(56), 32
    else:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model, size = torchvision.models.get_model(name, weights=None, **extra), 299 if name == "inception_v3" else 224
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, torch.randn(1, 3, size, size)


def row(name: str, keep: float = 0.5) -> dict[str, object]:
    """All figures of one model."""
    model, x = build(name)
    clock = [time.perf_counter()]
    graph = lp.trace(model, x)
    clock.append(time.perf_counter())
    dense = graph.cost()
    scores = {group.name: torch.rand(group.size) for group in graph.groups}
    names = list(scores)
    budget = Budget(keep)

    def fits(counts: dict[str, int]) -> bool:
        flops, _ = graph.costs.flops_and_params(torch.tensor([counts[n] for n in names]).numpy())
        return budget.fits(flops, dense.flops)

    plan = graph.plan(rank_global(scores, fits))
    clock.append(time.perf_counter())
    model.double()
    distance = difference(model, plan, x.double())
    model.float()
    predicted = graph.cost(plan)
    start = time.perf_counter()
    lp.cut(model, plan, verify="never")
    cutting = time.perf_counter() - start
    counted = lp.count(model, x)
    return {
        "model": name,
        "groups": len(graph.groups),
        "inexact": sum(not group.exact for group in graph.groups),
        "prunable share": round(graph.prunable_share, 4),
        "flops before": dense.flops,
        "flops after": counted.flops,
        "flops kept": round(counted.flops / dense.flops, 5),
        "predicted - counted": predicted.flops - counted.flops,
        "params predicted - counted": predicted.params - counted.params,
        "difference": f"{distance:.1e}",
        "trace s": round(clock[1] - clock[0], 2),
        "plan s": round(clock[2] - clock[1], 2),
        "cut s": round(cutting, 2),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        rows.append(row(name))
        print(rows[-1], flush=True)
    print(lp.report.markdown_table(rows))
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
