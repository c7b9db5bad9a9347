"""Pruning for PyTorch Lightning: one callback per landmark method, real cuts, honest numbers.

    trainer = Trainer(callbacks=[TaylorWeight(Budget(0.5))])

`flops` everywhere is what fvcore counts: one multiply-accumulate is one flop, in eval mode, for one sample.
"""

from lightning_prune import errors
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.checkpoint import PrunableModule, PrunedCheckpoint, load_pruned
from lightning_prune.cost import Cost, count
from lightning_prune.dead import DeadUnits, Removal, find_dead, remove_dead
from lightning_prune.decision import Plan
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.methods.bn_importance import BNImportance
from lightning_prune.methods.chip import CHIP
from lightning_prune.methods.hierarchical import Hierarchical, Redundancy, redundancy
from lightning_prune.methods.iterative_importance import IterativeImportance
from lightning_prune.methods.l1_filter import L1Filter
from lightning_prune.methods.lottery_ticket import LotteryTicket
from lightning_prune.methods.lrpet import LRPET
from lightning_prune.methods.magnitude import Magnitude
from lightning_prune.methods.network_slimming import NetworkSlimming
from lightning_prune.methods.nisp import NISP
from lightning_prune.methods.random import RandomChannels, RandomWeights
from lightning_prune.methods.rigl import RigL
from lightning_prune.methods.scratch import Scratch, scratch_epochs
from lightning_prune.methods.snip import SNIP
from lightning_prune.methods.sosp import SOSP
from lightning_prune.methods.sparse_connectivity_learning import SparseConnectivityLearning
from lightning_prune.methods.spectral import Spectral
from lightning_prune.methods.taylor_activation import TaylorActivation
from lightning_prune.methods.taylor_weight import TaylorWeight
from lightning_prune.methods.thinet import ThiNet
from lightning_prune.oracle import RankCorrelation, loss_changes, rank_correlation
from lightning_prune.planning import plan
from lightning_prune.pruner import Paper, Pruner
from lightning_prune.rank_pruner import RankPruner
from lightning_prune.report import Report
from lightning_prune.schedule import Event, Gradual, Iterative, OneShot, Rounds, Schedule, Updates
from lightning_prune.sensitivity import Sensitivity, sensitivity
from lightning_prune.surgery import conform, cut, trace
from lightning_prune.weight_pruner import WeightPruner
from lightning_prune.widening import bottlenecks, widen

__version__ = "0.1.0"

__all__ = [
    "CHIP",
    "LRPET",
    "NISP",
    "SNIP",
    "SOSP",
    "BNImportance",
    "Budget",
    "ChannelGraph",
    "ChannelPruner",
    "Cost",
    "DeadUnits",
    "Event",
    "Gradual",
    "Hierarchical",
    "Iterative",
    "IterativeImportance",
    "L1Filter",
    "LotteryTicket",
    "Magnitude",
    "NetworkSlimming",
    "OneShot",
    "Paper",
    "Plan",
    "PrunableModule",
    "PrunedCheckpoint",
    "Pruner",
    "RandomChannels",
    "RandomWeights",
    "RankCorrelation",
    "RankPruner",
    "Redundancy",
    "Removal",
    "Report",
    "RigL",
    "Rounds",
    "Schedule",
    "Scratch",
    "Sensitivity",
    "SparseConnectivityLearning",
    "Spectral",
    "TaylorActivation",
    "TaylorWeight",
    "ThiNet",
    "Updates",
    "WeightPruner",
    "bottlenecks",
    "conform",
    "count",
    "cut",
    "errors",
    "find_dead",
    "load_pruned",
    "loss_changes",
    "plan",
    "rank_correlation",
    "redundancy",
    "remove_dead",
    "scratch_epochs",
    "sensitivity",
    "trace",
    "widen",
]
