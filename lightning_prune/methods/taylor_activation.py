"""Taylor pruning on feature maps: drop the maps whose removal changes each example's loss least, to first order.

Molchanov, Tyree, Karras, Aila and Kautz, 2017. Differs from the paper: the target is a budget of flops, so that each
event removes as many maps as its part of the budget wants; linear layers and the streams of residual networks are
pruned too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper, one_of
from lightning_prune.schedule import Iterative, at_a_time


def taylor_activation_score(gate_gradients: Tensor) -> Tensor:
    """Score each map by the first-order change of each example's own loss when it is zeroed (eq. 8).

    Args:
        gate_gradients: (B, C), for each example the mean over a map's positions of its values times the gradient of
            that example's loss.

    Returns:
        (C,), at least 0, in the unit of the loss: absolute for each example, then the mean over examples.

    Example:
        >>> import torch
        >>> taylor_activation_score(torch.tensor([[-0.5, 1.0], [1.5, -1.0]]))
        tensor([1., 1.])
    """
    return gate_gradients.abs().mean(dim=0)


def layer_normalised(scores: Tensor) -> Tensor:
    """Scores of a layer divided by their Euclidean length (section 2.2); zeros stay zeros.

    Args:
        scores: (C,), at least 0.

    Example:
        >>> import torch
        >>> layer_normalised(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    length = scores.norm()
    return scores / length if length > 0 else scores


def map_mflops(positions: int, weights: int) -> float:
    """What one map costs, in millions of multiplications and additions (appendix A.1).

    Args:
        positions: of the map: height times width.
        weights: of the filter that makes it: input channels times kernel size.

    Example:
        >>> round(map_mflops(224 * 224, 64 * 3 * 3), 2)
        57.9
    """
    return 2 * positions * (weights + 1) / 1e6


class TaylorActivation(ChannelPruner):
    """Cut the maps whose removal is estimated to change the loss of each example least, a few at a time.

    Args:
        budget: see `ChannelPruner`.
        layer_norm: "l2" divides the scores of a layer by their length, without which layers do not compare; "none"
            ranks them as they are.
        flops_lambda: what a map's cost takes off its score, per million multiplications and additions of one map in
            the network as it is now; 0.001 in the paper.
        **shared: see `ChannelPruner`; one global ranking, as in the paper.
    """

    paper = Paper("Molchanov et al.", 2017, "https://arxiv.org/abs/1611.06440")
    needs = "maps and gradients of training"
    default_schedule = Iterative(start=0.1, end=0.7, events=30)
    default_scope = "global"
    first_step = 1
    looks_at = "maps"

    def __init__(
        self,
        budget: Budget | float,
        *,
        layer_norm: Literal["l2", "none"] = "l2",
        flops_lambda: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        one_of("layer_norm", layer_norm, ("l2", "none"))
        if not (math.isfinite(flops_lambda) and flops_lambda >= 0):
            raise ValueError(f"flops_lambda must be a number of at least 0, got {flops_lambda!r}")
        self.layer_norm = layer_norm
        self.flops_lambda = flops_lambda

    @staticmethod
    def paper_schedule(maps: int, *, updates: int = 30, at_once: int = 1) -> Iterative:
        """The paper's own steps: so many maps after every so many optimizer steps, until they are gone.

        Args:
            maps: how many go in all; ``Budget(keep, of="units")`` takes the same number each time.
            updates: optimizer steps between two events.
            at_once: maps an event.

        Raises:
            ValueError: if one of them is below 1.
        """
        return at_a_time("maps", maps, updates, at_once)

    @override
    def observe(self, gate_gradients: Tensor) -> Tensor:
        return len(gate_gradients) * taylor_activation_score(gate_gradients)

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        costs = self._costs_of_maps() if self.flops_lambda else dict.fromkeys(views, 0.0)
        out = {}
        for name, group in views.items():
            theta = group[0].measured
            assert theta is not None
            if self.layer_norm == "l2":
                theta = layer_normalised(theta)  # what is masked has no gradient, and adds nothing
            out[name] = theta - self.flops_lambda * costs[name]
        return out

    def _costs_of_maps(self) -> dict[str, float]:
        """Group -> MFLOPs of one of its maps, summed over its producers, in the network as it is now."""
        graph = self.graph if self.cuts else self.graph.after(self.graph.plan(self._alive))
        flops = graph.weight_flops()
        out = {}
        for group in graph.groups:
            out[group.name] = 0.0
            for producer in group.producers:
                shape = graph.shapes[producer.weight]
                filters = producer.indices.shape[1]  # a channel of several, where one is repeated
                positions = flops.get(producer.weight, 0) / math.prod(shape)
                weights = math.prod(shape) / shape[producer.dim]
                out[group.name] += filters * map_mflops(round(positions), round(weights))
        return out
