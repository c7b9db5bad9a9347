"""The oracle: what the loss really does when a channel goes, and how well scores foretell it.

It costs a forward per channel and batch, so it judges methods; it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.statistics import samples_in
from lightning_prune.taps import evaluating, gated


def loss_changes(
    model: nn.Module, graph: ChannelGraph, batches: Iterable[Any], loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """The change of the mean loss when each channel is removed on its own, in eval mode; nothing of the model changes.

    A channel is removed where its readers receive it: behind norm, activation and addition, in all places where its
    group is read. Of a recurrent layer it is what the layer returns; the layer itself goes on with it.

    Args:
        model: what runs.
        graph: of the model.
        batches: on the model's device; their losses are weighted with their numbers of samples.
        loss_fn: ``(model, batch) -> loss``, a mean over the samples.

    Returns:
        group -> (C,) float64, positive where the loss rises; groups that are not read in eval mode are left out.

    Raises:
        ValueError: if there is no batch, or the loss is not finite with all channels there.
    """
    taps = {group.name: found for group in graph.groups if (found := graph.maps(group))}
    total = {name: torch.zeros(graph.group(name).size, dtype=torch.float64) for name in taps}
    samples = 0
    with evaluating(model):
        for batch in batches:
            count = samples_in(batch)
            whole = float(loss_fn(model, batch))
            if not np.isfinite(whole):
                raise ValueError(f"the loss of a batch of {count} samples is {whole} with all channels there")
            for name, change in total.items():
                gates = torch.ones(len(change))
                with gated(model, {name: taps[name]}, {name: gates}):
                    for channel in range(len(change)):
                        gates[channel] = 0
                        change[channel] += count * (float(loss_fn(model, batch)) - whole)
                        gates[channel] = 1
            samples += count
    if not samples:
        raise ValueError("the oracle needs at least one batch, got none")
    return {name: change / samples for name, change in total.items()}


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of scores with what the loss really does, from -1 to 1.

    Attributes:
        groups: group -> correlation inside it; NaN where all scores, or all changes, are equal.
        mean: over the groups that have one.
        overall: over all channels of all groups at once, as a global ranking sees them.
    """

    groups: Mapping[str, float]
    mean: float
    overall: float


def rank_correlation(scores: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> RankCorrelation:
    """Compare scores with the absolute loss changes of `loss_changes`.

    Args:
        scores: group -> (C,), larger = keep; groups that a method does not score may be missing.
        changes: group -> (C,).

    Raises:
        ValueError: if the two know no group in common, or disagree on the size of one.

    Example:
        >>> rank_correlation({"a": torch.tensor([1.0, 2.0, 3.0])}, {"a": torch.tensor([-0.1, 0.2, -0.3])}).mean
        1.0
    """
    common = [name for name in scores if name in changes]
    if not common:
        raise ValueError(
            f"scores of groups {', '.join(scores)} and changes of {', '.join(changes)} have none in common"
        )
    pairs = {}
    for name in common:
        if scores[name].shape != changes[name].shape:
            raise ValueError(
                f"group {name!r} has scores of shape {tuple(scores[name].shape)} and changes of shape "
                f"{tuple(changes[name].shape)}"
            )
        pairs[name] = tuple(x.detach().double().cpu().numpy() for x in (scores[name], changes[name].abs()))
    groups = {name: _spearman(*pair) for name, pair in pairs.items()}
    known = [value for value in groups.values() if not np.isnan(value)]
    every = [np.concatenate(side) for side in zip(*pairs.values(), strict=True)]
    return RankCorrelation(groups, float(np.mean(known)) if known else float("nan"), _spearman(*every))


def _spearman(a: Any, b: Any) -> float:
    """The correlation of ranks, of equal values their mean; NaN where one side is all equal."""
    first, second = rankdata(a), rankdata(b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
