"""L1 filter pruning: drop the filters whose weights are small in sum.

Li, Kadav, Durdanovic, Samet and Graf, 2017. Differs from the paper: how many filters each layer loses is one common
fraction solved for the budget (or ``keep=`` per group) where the paper sets it per stage by hand; streams of residual
nets are pruned too, scored by the layer the paper lets decide (``group_reduction="first"``: see `L1Filter`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner, Join
from lightning_prune.graph.groups import Group
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper
from lightning_prune.ranking import top_mask
from lightning_prune.schedule import OneShot

_IN_CACHE = 2**18  # absolute values taken at a time: they need not go through main memory


def l1_filter_score(filters: Tensor) -> Tensor:
    """Score each filter by the sum of the absolute values of its weights (section 3.1).

    Args:
        filters: (C, F), one row per filter; bias and norm do not count.

    Returns:
        (C,), at least 0, in the unit of the weights. Only comparable inside one layer.

    Example:
        >>> import torch
        >>> l1_filter_score(torch.tensor([[1.0, -2.0], [0.5, 0.5], [3.0, 0.0]]))
        tensor([3., 1., 3.])
    """
    # a lone row would be summed in another order by several threads
    count = min(len(filters) // 2, filters.numel() // _IN_CACHE) if filters.is_cpu else 1
    return torch.cat([piece.abs().sum(dim=1) for piece in filters.tensor_split(max(1, count))])


def sensitivity(
    keep: Sequence[float], groups: Mapping[str, int], evaluate: Callable[[str, float], float]
) -> list[dict[str, float | str]]:
    """Prune each group alone to each fraction, without retraining (section 3.2).

    Args:
        keep: fractions of the channels to keep, each in (0, 1].
        groups: group -> channels.
        evaluate: (group, fraction) -> accuracy of the network with only that group pruned.

    Returns:
        One row per group and fraction: ``{"group", "keep", "channels", "accuracy"}``.
    """
    return [
        {"group": name, "keep": k, "channels": max(1, int(size * k + 1e-9)), "accuracy": evaluate(name, k)}
        for name, size in groups.items()
        for k in keep
    ]


class L1Filter(ChannelPruner):
    """Cut the filters with the smallest L1 norm; no data needed.

    Args:
        budget: see `ChannelPruner`.
        mode: "independent" scores a filter over all its inputs; "greedy" leaves out inputs whose producer is removed by
            the same event, layer by layer in data-flow order (section 3.3).
        group_reduction: how a coupled group's producers are joined: "first" (the paper: the shortcut's projection where
            there is one, else the first producer), "sum", "mean" or "min".
        **shared: see `ChannelPruner`; the scope is "uniform" by default, as norms of different layers do not compare.
    """

    paper = Paper("Li et al.", 2017, "https://arxiv.org/abs/1608.08710")
    default_schedule = OneShot(0.5)
    default_scope = "uniform"

    def __init__(
        self,
        budget: Budget | float,
        *,
        mode: Literal["independent", "greedy"] = "independent",
        group_reduction: Join = "first",
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        if mode not in ("independent", "greedy"):
            raise ValueError(f"mode must be 'independent' or 'greedy', got {mode!r}")
        if group_reduction not in ("first", "sum", "mean", "min"):
            raise ValueError(f"group_reduction must be 'first', 'sum', 'mean' or 'min', got {group_reduction!r}")
        self.mode = mode
        self.group_reduction = group_reduction
        self.join: Join = group_reduction

    @override
    def score(self, view: LayerView) -> Tensor:
        return l1_filter_score(view.filters)

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        shared = _readers(self.graph.groups)
        ordered = {name: _projection_first(group, shared) for name, group in views.items()}
        return {name: self._joined([self.score(view) for view in group]) for name, group in ordered.items()}

    @override
    def select(self, scores: Mapping[str, Tensor], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, Tensor]:
        keep = super().select(scores, fits)
        if self.mode == "independent":
            return keep
        # the counts stay; which filters go is decided again, with the inputs that are gone at zero
        return self._greedily({name: int(mask.sum()) for name, mask in keep.items()})

    def _greedily(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        gone: dict[str, list[tuple[int, Tensor]]] = {}
        keep = {}
        shared = _readers(self.graph.groups)
        for name, views in self._views.items():
            parts = []
            for view in _projection_first(views, shared):
                weight = view.weight.detach().clone()
                for dim, indices in gone.get(view.weight_name, []):
                    weight.index_fill_(dim, indices.to(weight.device), 0)
                parts.append(l1_filter_score(view.filters_of(weight)))
            alive = self._alive[name]
            score = self._joined(parts).cpu()[alive]
            keep[name] = top_mask(score.double(), counts[name])
            whole = alive.clone()
            whole[alive] = keep[name]
            for consumer in views[0].group.consumers:
                gone.setdefault(consumer.weight, []).append((consumer.dim, consumer.indices[~whole].reshape(-1)))
        return keep


def _projection_first(views: Sequence[LayerView], shared: Mapping[str, int]) -> list[LayerView]:
    """In a residual stream the projection of the shortcut decides (section 3.3).

    It is told by what it reads: channels that another layer reads too, where the last layer of a block reads what only
    the block itself makes; of several such the one with the smallest kernel.

    Args:
        views: the producers of one group.
        shared: weight -> number of layers that read the channels it reads.
    """

    def rank(view: LayerView) -> tuple[bool, int]:
        alone = shared.get(view.weight_name, 1) < 2
        return alone, 0 if alone else math.prod(view.weight.shape[2:])

    return sorted(views, key=rank)


def _readers(groups: Iterable[Group]) -> dict[str, int]:
    """Weight -> how many layers read the channels that it reads."""
    return {consumer.weight: len(group.consumers) for group in groups for consumer in group.consumers}
