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
from lightning_prune.methods.bn_importance import BNImportance
from lightning_prune.methods.chip import CHIP
from lightning_prune.methods.hierarchical import Hierarchical, Redundancy, redundancy
from lightning_prune.methods.l1_filter import L1Filter
from lightning_prune.methods.magnitude import Magnitude
from lightning_prune.methods.nisp import NISP
from lightning_prune.methods.random import RandomChannels, RandomWeights
from lightning_prune.methods.sosp import SOSP
from lightning_prune.methods.taylor_activation import TaylorActivation
from lightning_prune.methods.taylor_weight import TaylorWeight
from lightning_prune.methods.thinet import ThiNet
from lightning_prune.oracle import RankCorrelation, loss_changes, rank_correlation
from lightning_prune.planning import plan
from lightning_prune.pruner import Paper, Pruner
from lightning_prune.report import Report
from lightning_prune.schedule import Event, Gradual, Iterative, OneShot, Schedule
from lightning_prune.surgery import conform, cut, trace
from lightning_prune.weight_pruner import WeightPruner
from lightning_prune.widening import bottlenecks, widen

__version__ = "0.1.0"

__all__ = [
    "CHIP",
    "NISP",
    "SOSP",
    "BNImportance",
    "Budget",
    "ChannelGraph",
    "ChannelPruner",
    "Cost",
    "Event",
    "Gradual",
    "Hierarchical",
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
    "RankCorrelation",
    "Redundancy",
    "Report",
    "Schedule",
    "TaylorActivation",
    "TaylorWeight",
    "ThiNet",
    "WeightPruner",
    "bottlenecks",
    "conform",
    "count",
    "cut",
    "errors",
    "load_pruned",
    "loss_changes",
    "plan",
    "rank_correlation",
    "redundancy",
    "trace",
    "widen",
]
