"""Pruning for PyTorch Lightning: one callback per landmark method, real cuts, honest numbers.

    trainer = Trainer(callbacks=[TaylorWeight(Budget(0.5))])

`flops` everywhere is what fvcore counts: one multiply-accumulate is one flop, in eval mode, for one sample.
"""

from lightning_prune import errors
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.checkpoint import PrunableModule, PrunedCheckpoint, load_pruned
from lightning_prune.cost import Cost, count
from lightning_prune.decision import Plan
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.methods.l1_filter import L1Filter
from lightning_prune.methods.magnitude import Magnitude
from lightning_prune.methods.random import RandomChannels, RandomWeights
from lightning_prune.methods.taylor_weight import TaylorWeight
from lightning_prune.planning import plan
from lightning_prune.pruner import Paper, Pruner
from lightning_prune.report import Report
from lightning_prune.schedule import Event, Gradual, Iterative, OneShot, Schedule
from lightning_prune.surgery import conform, cut, trace
from lightning_prune.weight_pruner import WeightPruner

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ChannelGraph",
    "ChannelPruner",
    "Cost",
    "Event",
    "Gradual",
    "Iterative",
    "L1Filter",
    "Magnitude",
    "OneShot",
    "Paper",
    "Plan",
    "PrunableModule",
    "PrunedCheckpoint",
    "Pruner",
    "RandomChannels",
    "RandomWeights",
    "Report",
    "Schedule",
    "TaylorWeight",
    "WeightPruner",
    "conform",
    "count",
    "cut",
    "errors",
    "load_pruned",
    "plan",
    "trace",
]
