"""A plan without a Trainer."""

from __future__ import annotations

from typing import Any

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.decision import Plan
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.methods import find


def plan(graph: ChannelGraph, method: str = "l1_filter", budget: Budget | float = 0.5, **arguments: Any) -> Plan:
    """Decide what a channel method would keep of a model, without training.

    Args:
        graph: of the model, from `lightning_prune.trace`.
        method: class or file name: "l1_filter", "RandomChannels".
        budget: what may be kept.
        **arguments: of the method: ``ignore``, ``min_channels``, ``round_to``, ``scope``, ...; for one that looks at
            data ``calibration``, a loader or a list of batches, and ``loss_fn(model, batch)``.

    Returns:
        The plan; `lightning_prune.cut` applies it.

    Raises:
        ValueError: if there is no such method, it masks weights, or needs ``calibration`` that it was not given.
        NothingToPrune: if no channel may go; the message says why.
        UnmeetableBudget: if the budget is out of reach.
    """
    cls = find(method)
    if not issubclass(cls, ChannelPruner):
        raise ValueError(
            f"{cls.__name__} needs a training loop to hold its masks; add it to a Trainer, or plan with a method that "
            "removes channels, such as 'l1_filter'"
        )
    return cls(budget, **arguments).plan_for(graph)
