"""A plan without a Trainer, for methods that need no data."""

from __future__ import annotations

from typing import Any

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.decision import Plan
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.methods import find


def plan(graph: ChannelGraph, method: str = "l1_filter", budget: Budget | float = 0.5, **arguments: Any) -> Plan:
    """Decide what a data-free channel method would keep of a model, without training.

    Args:
        graph: of the model, from `lightning_prune.trace`.
        method: class or file name: "l1_filter", "RandomChannels".
        budget: what may be kept.
        **arguments: of the method: ``ignore``, ``min_channels``, ``round_to``, ``scope``, ...

    Returns:
        The plan; `lightning_prune.cut` applies it.

    Raises:
        ValueError: if there is no such method, or it needs data or a training loop.
        NothingToPrune: if no channel may go; the message says why.
        UnmeetableBudget: if the budget is out of reach.
    """
    cls = find(method)
    if not issubclass(cls, ChannelPruner) or cls.needs != "nothing":
        needs = "a training loop to hold its masks" if cls.needs == "nothing" else cls.needs
        raise ValueError(
            f"{cls.__name__} needs {needs}; add it "
            "to a Trainer, or plan with a channel method that needs no data, such as 'l1_filter'"
        )
    return cls(budget, **arguments).plan_for(graph)
