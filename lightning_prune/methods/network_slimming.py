"""Network slimming: an L1 penalty on the scales of batch norms while training, then the channels with small scales go.

Liu, Li, Shen, Huang, Yan and Zhang, 2017. Differs from the paper: the target is a budget instead of a percentile; a
channel that is read through several norms goes for all of its readers or for none; the scales that are penalised are
those that decide about a channel; and between two passes the penalty goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.errors import UnmeetableBudget
from lightning_prune.graph.flow import Flow
from lightning_prune.graph.groups import Group
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper, one_of
from lightning_prune.ranking import Fits
from lightning_prune.schedule import Iterative, OneShot

_SUMS = frozenset([
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__",
])  # fmt: skip


def network_slimming_score(*scales: Tensor) -> Tensor:
    """Score each channel by the absolute value of its scale; the mean, where several norms scale it.

    Args:
        scales: (C, M) each, M scales of every channel in one norm.

    Returns:
        (C,), at least 0.

    Example:
        >>> network_slimming_score(torch.tensor([[-0.9], [0.5]]), torch.tensor([[0.1], [0.7]]))
        tensor([0.5000, 0.6000])
    """
    return torch.stack([gamma.abs().mean(dim=1) for gamma in scales]).mean(dim=0)


def penalty_gradient(gamma: Tensor, penalty: Tensor | float) -> Tensor:
    """Subgradient of ``penalty * |gamma|`` for each scale, 0 at 0 (eq. 1).

    Args:
        gamma: scales, of any shape.
        penalty: lambda.

    Example:
        >>> penalty_gradient(torch.tensor([0.5, -0.5, 0.0]), 0.25)
        tensor([ 0.2500, -0.2500,  0.0000])
    """
    return gamma.detach().sign() * penalty


class NetworkSlimming(ChannelPruner):
    """Train with an L1 penalty on batch norm's scales, cut the channels with the smallest, and train on without it.

    Args:
        budget: see `ChannelPruner`.
        penalty: lambda, of which the loss gets the sum over all scales that decide about a channel, until the last
            event; 1e-4 is the paper's for VGG, 1e-5 for ResNet and DenseNet.
        gamma_init: what those scales begin at in norms that are as PyTorch makes them and have not seen a batch; norms
            that were trained, or made otherwise, stay as they are. None for none.
        coupled: "skip" leaves streams that several layers are added up in whole; "mean" scores them by the mean over
            the norms that write them.
        passes: how often to prune, in equal parts of the fit and each time the same fraction of what is left; in place
            of ``schedule``.
        cap: fraction of its channels that a group loses at most at one event; 0.5 in the paper's passes.
        **shared: see `ChannelPruner`; one global ranking, as in the paper.

    Raises:
        ValueError: for ``passes`` and ``schedule`` together, or a value out of range.
    """

    paper = Paper("Liu et al.", 2017, "https://arxiv.org/abs/1708.06519")
    needs = "training with its penalty"
    start = "initial"
    default_schedule = OneShot(0.5)
    default_scope = "global"
    alters_training = True

    def __init__(
        self,
        budget: Budget | float,
        *,
        penalty: float = 1e-4,
        gamma_init: float | None = 0.5,
        coupled: Literal["skip", "mean"] = "skip",
        passes: int | None = None,
        cap: float | None = None,
        **shared: Any,
    ) -> None:
        if passes is not None:
            if type(passes) is not int or passes < 1:
                raise ValueError(f"passes must be an int of at least 1, got {passes!r}")
            if shared.get("schedule") is not None:
                raise ValueError("passes= and schedule= both say when to prune: give one of them")
            shared["schedule"] = Iterative(start=1 / (passes + 1), end=passes / (passes + 1), events=passes)
        super().__init__(budget, **shared)
        if not 0 <= penalty < math.inf:
            raise ValueError(f"penalty must be a finite number of at least 0, got {penalty!r}")
        if gamma_init is not None and not 0 < gamma_init < math.inf:
            raise ValueError(f"gamma_init must be above 0, or None, got {gamma_init!r}")
        one_of("coupled", coupled, ("skip", "mean"))
        if cap is not None and not 0 < cap < 1:
            raise ValueError(f"cap must be a fraction in (0, 1), or None, got {cap!r}")
        self.penalty = penalty
        self.gamma_init = gamma_init
        self.coupled = coupled
        self.passes = passes
        self.cap = cap
        self._penalised: dict[str, Tensor] = {}  # name of a scale -> 1 where it decides about a channel, else 0
        self._events_ahead = 1  # that a group's floor is after

    @staticmethod
    def paper_schedule(epochs: int = 160) -> OneShot:
        """Prune after the paper's number of epochs, of a fit that is twice as long."""
        return OneShot(epochs, unit="epoch")

    @property
    def _penalises(self) -> bool:
        return self.events_done < len(self.events) and self.penalty > 0 and self.budget.keep < 1

    @override
    def initialise(self) -> None:
        if self.gamma_init is None or self.budget.keep == 1:
            return
        fresh = [name for name in self._penalised if _is_fresh(self.model, name)]
        for name in fresh:
            self.model.get_parameter(name).fill_(self.gamma_init)
        if fresh:
            rank_zero_info(
                f"{type(self).__name__}: the scales of {len(fresh)} batch norms that have not seen a batch begin at "
                f"{self.gamma_init:g}; gamma_init=None leaves them"
            )

    @override
    def before_step(self, optimizer: Optimizer, held: Mapping[str, nn.Parameter]) -> None:
        if not self._penalises:
            return
        for name, where in self._penalised.items():
            gamma = held.get(name)
            if gamma is not None and gamma.grad is not None:
                gamma.grad.addcmul_(penalty_gradient(gamma, self.penalty), where)

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        out = {}
        for name, group in views.items():
            found = self._scales(group[0].group)
            out[name] = network_slimming_score(*(_at(self.model.get_parameter(p).detach(), i) for p, i in found))
        return out

    def _scales(self, group: Group) -> list[tuple[str, Tensor]]:
        """The batch norm scales that are nearest to a group's readers: names, and (C, M) of their entries.

        Returns:
            Nothing, if a reader gets something that no batch norm scales.
        """
        tables = {member.name: member.indices for member in group.members if member.dim == 0}
        found: dict[str, Tensor] = {}
        for gate in self.graph.gate_parameters(group):
            if self._is_depthwise(gate.weight) and all(p.gated for p in group.producers):  # the scale is in front of it
                found |= {norm.gamma: norm.indices for p in group.producers for norm in p.norms}
            elif self._is_scale(gate.weight):
                found[gate.weight] = gate.of(tables[gate.weight])
            else:
                return []
        return list(found.items()) if all(self._is_scale(name) for name in found) else []

    def _is_scale(self, weight: str) -> bool:
        calls = self._flow.layers.get(weight, ())
        return bool(calls) and all(self._flow.calls[call].name == "batch_norm" for call in calls)

    def _is_depthwise(self, weight: str) -> bool:
        calls = self._flow.layers.get(weight, ())
        return any(layer.depthwise and layer.weight == weight for call in calls for layer in self._flow.made[call])

    @property
    def _flow(self) -> Flow:
        assert self.graph.flow is not None
        return self.graph.flow

    @override
    def _look(self, model: nn.Module) -> None:
        super()._look(model)
        self._penalised = {}
        for group in (g for g in self._groups if g.size > 1):  # a lone channel stays, and a trace does not follow it
            for name, indices in self._scales(group):
                gamma = model.get_parameter(name).detach()
                where = self._penalised.setdefault(name, torch.zeros_like(gamma))
                where[indices.reshape(-1).to(where.device)] = 1

    @override
    def _refusal(self, group: Group) -> str | None:
        if not self._scales(group):
            return "no batch norm's scale says what all of its channels' readers get of them"
        if self.coupled == "skip" and self._is_sum(group):
            return "its channels are sums of what several layers make; coupled='mean' scores them"
        return super()._refusal(group)

    def _is_sum(self, group: Group) -> bool:
        """Whether a reader gets a sum of what several layers make of a group, without a norm in between."""
        readers = [call for reader in group.consumers for call in self._flow.layers.get(reader.weight, ())]
        left = [call for reader in readers for call in self._before(reader, group)]
        seen: set[int] = set()
        while left:
            call = left.pop()
            if call in seen or any(not layer.depthwise for layer in self._flow.made.get(call, ())):
                continue
            seen.add(call)
            before = self._before(call, group)
            if len(before) > 1 and self._flow.calls[call].name in _SUMS:
                return True
            left += before
        return False

    def _before(self, call: int, group: Group) -> list[int]:
        """The calls that a call gets a group from; of flattened channels, which have no axis, its first argument's."""
        sources = [source for source in dict.fromkeys(self._flow.calls[call].sources) if source is not None]
        carrying = [source for source in sources if self._flow.tap(*source, group.name) is not None]
        return [number for number, _ in carrying or sources[:1]]

    @override
    def _floor(self, group: str) -> int:
        return self._fewest(int(self._alive[group].sum()), self._events_ahead)

    def _fewest(self, channels: int, events: int) -> int:
        """Fewest of a group's channels that may be left after a number of events."""
        if self.cap is None:
            return self.min_channels
        least = channels
        for _ in range(events):
            kept = least - int(self.cap * least + 1e-9)
            least = min(least, math.ceil(kept / self.round_to) * self.round_to)
        return max(self.min_channels, least)

    @override
    def _check_reachable(self) -> None:
        self._events_ahead = max(1, len(self.events) - self.events_done)
        try:
            super()._check_reachable()
        except UnmeetableBudget as error:
            streams = ", or let streams go as well with coupled='mean'" if self.coupled == "skip" else ""
            cap = f", or raise cap={self.cap:g} or prune in more passes" if self.cap is not None else ""
            raise UnmeetableBudget(f"{error}{cap}{streams}") from error
        finally:
            self._events_ahead = 1

    @override
    def _choose(self, scores: Mapping[str, Tensor], budget: Budget) -> dict[str, Tensor]:
        if self.cap is not None:
            budget = self.budget  # what is wanted on the way, `select` finds out
        return super()._choose(scores, budget)

    @override
    def select(self, scores: Mapping[str, Tensor], fits: Fits) -> dict[str, Tensor]:
        later = sum(event.step > self.steps for event in self.events)
        if self.cap is not None and later:
            fits = self._on_the_way(scores, later)
        chosen = super().select(scores, fits)
        few = {name: mask for name, mask in chosen.items() if int(mask.sum()) == self.min_channels < len(mask)}
        if emptied := [name for name in few if self._dense_sizes[name] >= 10 * self.min_channels]:
            rank_zero_warn(
                f"{type(self).__name__}: of {', '.join(emptied[:3])} only min_channels={self.min_channels} stay, as "
                "the scales of the others are larger; raise it, or set a cap="
            )
        return chosen

    def _on_the_way(self, scores: Mapping[str, Tensor], later: int) -> Fits:
        """Whether channel counts are within the budget of this event, and the last one's after ``later`` more."""
        budget, dense = self._budget_at(self.events[-later - 1].progress), self._dense_measure()
        least = {name: min(len(score), self._floor(name)) for name, score in scores.items()}

        def enough(counts: Mapping[str, int]) -> bool:
            fewest = {name: min(count, self._fewest(count, later)) for name, count in counts.items()}
            return self.budget.fits(self._measured_cost(fewest), dense) and budget.fits(
                self._measured_cost(counts), dense
            )

        if enough(least):
            return enough
        return lambda counts: all(counts[name] <= least[name] for name in least)  # as far as the cap lets it

    @override
    def _budget_at(self, progress: float) -> Budget:
        if self.passes is None or progress == 1:
            return super()._budget_at(progress)
        return replace(self.budget, keep=self.budget.keep**progress)  # the same fraction of what is left each time

    @override
    def _row(self) -> dict[str, float]:
        sizes = []
        if self._penalises:
            model = self.graph.model
            sizes = [(model.get_parameter(n).detach().abs() * where).sum() for n, where in self._penalised.items()]
        return {**super()._row(), "prune/penalty/scales": self.penalty * float(sum(sizes))}


def _is_fresh(model: nn.Module, name: str) -> bool:
    """Whether a batch norm is as PyTorch makes it and has not seen a batch."""
    seen = getattr(model.get_submodule(name.rpartition(".")[0]), "num_batches_tracked", None)
    return seen is not None and int(seen) == 0 and bool((model.get_parameter(name) == 1).all())


def _at(gamma: Tensor, indices: Tensor) -> Tensor:
    """(C, M): entries of a scale."""
    return gamma[indices.to(gamma.device)]
