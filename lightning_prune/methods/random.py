"""Random pruning: the baseline that every table needs. No paper; equal on all processes, drawn anew at each event."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.views import LayerView
from lightning_prune.schedule import Gradual, Iterative
from lightning_prune.weight_pruner import WeightPruner


def random_score(size: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent uniform scores in [0, 1).

    Args:
        size: shape wanted.
        generator: on the CPU; equal seeds give equal scores on every machine.
    """
    return torch.rand(size, generator=generator)


class RandomChannels(ChannelPruner):
    """Cut channels at random, every group by the same fraction; no data needed. Args: see `ChannelPruner`."""

    default_schedule = Iterative(start=0.1, end=0.6, events=15)
    default_scope = "uniform"
    join = "first"

    @override
    def score(self, view: LayerView) -> Tensor:
        return random_score((view.group.size,), self.generator("score", view.group.name))


class RandomWeights(WeightPruner):
    """Mask weights at random, every layer to the same density; no data needed. Args: see `WeightPruner`."""

    default_schedule = Gradual(start=0.1, end=0.7, events=20)
    default_scope = "layer"

    @override
    def score(self, name: str, weight: nn.Parameter) -> Tensor:
        score = random_score(tuple(weight.shape), self.generator("score", name)).to(weight.device)
        return score.masked_fill(~self.alive(name), -torch.inf)
