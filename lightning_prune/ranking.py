"""Scores -> what to keep: exact counts with a tie rule. The only place that sorts.

Larger scores stay. Among equal scores the one with the lower index goes first, and among groups the earlier one, so
that the same scores give the same choice everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.errors import NonFiniteScore, UnmeetableBudget

Counts = Mapping[str, int]
Fits = Callable[[Counts], bool]


def top_mask(scores: Tensor, n: int) -> Tensor:
    """Keep exactly the n largest scores; of equal ones those with the higher index.

    Args:
        scores: any shape, none NaN.
        n: from 0 to the number of scores.

    Returns:
        bool, the shape of the scores, True = keep; in time and memory linear in their number.

    Raises:
        ValueError: if n is out of range.

    Example:
        >>> top_mask(torch.tensor([1.0, 1.0, 1.0]), 2)
        tensor([False,  True,  True])
    """
    if not 0 <= n <= scores.numel():
        raise ValueError(f"n must be from 0 to the {scores.numel()} scores there are, got {n}")
    flat = scores.detach().reshape(-1)
    if not n:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = _ascending(flat, flat.numel() - n)
    mask = flat > least
    ties = (flat == least).nonzero().reshape(-1)
    mask[ties[len(ties) - (n - int(mask.count_nonzero())) :]] = True
    return mask.reshape(scores.shape)


def greedy_order(matrix: Tensor) -> Tensor:
    """The order in which units go when each time the one goes that adds least to a sum over pairs of removed units.

    Args:
        matrix: (C, C), symmetric: entry ij is added, twice, once both i and j are gone; the diagonal once.

    Returns:
        (C,) int64, first to go first; of equal ones the lower index.

    Example:
        >>> greedy_order(torch.tensor([[2.0, 0.5, 0.5], [0.5, 1.5, 0.0], [0.5, 0.0, 0.6]]))
        tensor([2, 1, 0])
    """
    q = matrix.detach().double().cpu().numpy()
    added = q.diagonal().copy()
    order = []
    for _ in range(len(q)):
        least = int(added.argmin())
        order.append(least)
        added += 2 * q[least]
        added[least] = np.inf
    return torch.tensor(order, dtype=torch.int64)


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse a network that computes nothing any more; the host waits for the device once.

    Raises:
        NonFiniteScore: naming the first weight that is NaN or infinite.
    """
    seen = {name: weight for name, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    if not seen:
        return
    # many times as fast as the largest entry of each
    lengths = torch._foreach_norm([weight.detach() for weight in seen.values()])
    finite = torch.stack([torch.isfinite(length).to(lengths[0].device) for length in lengths]).tolist()
    doubtful = [name for name, fine in zip(seen, finite, strict=True) if not fine]  # or so large that squares overflow
    if bad := [name for name in doubtful if not bool(torch.isfinite(seen[name]).all())]:
        raise NonFiniteScore(
            f"weights of {bad[0]!r}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} are NaN or infinite; "
            "look at the loss before this event"
        )


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that say nothing.

    Raises:
        NonFiniteScore: naming the first group or layer with a NaN or infinite score.
        ValueError: if scores are of a model on the meta device.
    """
    for name, score in scores.items():
        if score.is_meta:
            raise ValueError(
                f"the scores of {name!r} are on the meta device, where tensors have no values to choose by; "
                "materialise the model, or choose at random (RandomChannels)"
            )
        bad = ~torch.isfinite(score)
        if bad.any():
            raise NonFiniteScore(
                f"{int(bad.sum())} of {score.numel()} scores of {name!r} are NaN or infinite; "
                "look at the loss and its gradients in the batches before this event"
            )


def round_count(count: int, size: int, multiple: int) -> int:
    """The largest multiple not above a count; the smallest multiple if there is none, the size if nothing goes.

    Example:
        >>> round_count(13, 20, 8), round_count(5, 20, 8), round_count(20, 20, 8), round_count(3, 6, 8)
        (8, 8, 20, 6)
    """
    if count >= size:
        return size
    return min(size, max(multiple, count - count % multiple))


def rank_global(
    scores: Mapping[str, Tensor], fits: Fits, *, floors: Counts | None = None, round_to: int = 1
) -> dict[str, Tensor]:
    """One ranking over all groups: the fewest lowest units go so that the rest fits, then what still fits comes back.

    Args:
        scores: group -> (C,).
        fits: says of channel counts per group whether they are within the budget; fewer never fit worse.
        floors: group -> least number of channels, default 1.
        round_to: channel counts become multiples of it where the group allows.

    Returns:
        group -> (C,) bool, True = keep.

    Raises:
        NonFiniteScore: if a score is NaN or infinite.
        UnmeetableBudget: if even the floors do not fit.
    """
    check_finite(scores)
    names = list(scores)
    sizes = {name: len(scores[name]) for name in names}
    least = {name: _least((floors or {}).get(name, 1), sizes[name], round_to) for name in names}
    order = {name: torch.sort(scores[name].detach().double().cpu(), stable=True) for name in names}
    # a group's units go in ascending order; those its floor holds back are not in the list
    owner = torch.cat([torch.full((sizes[n] - least[n],), i) for i, n in enumerate(names)])
    values = torch.cat([order[n].values[: sizes[n] - least[n]] for n in names])
    sequence = owner[torch.sort(values, stable=True).indices]

    def counts(removed: int) -> dict[str, int]:
        gone = torch.bincount(sequence[:removed], minlength=len(names)).tolist()
        return {
            n: max(least[n], round_count(sizes[n] - k, sizes[n], round_to)) for n, k in zip(names, gone, strict=True)
        }

    low, high = 0, len(sequence)
    if not fits(counts(high)):
        raise UnmeetableBudget("even the fewest channels allowed do not fit")
    while low < high:
        middle = (low + high) // 2
        if fits(counts(middle)):
            high = middle
        else:
            low = middle + 1
    kept = counts(low)
    full: set[int] = set()  # groups that cannot have more: what did not fit will not when others have more
    for i in sequence[:low].flip(0).tolist():
        if i not in full and not _give_back(kept, names[i], sizes[names[i]], round_to, fits):
            full.add(i)
    return {n: _top(order[n].indices, kept[n]) for n in names}


def rank_uniform(
    scores: Mapping[str, Tensor],
    fits: Fits,
    *,
    dense: Counts,
    keep: Mapping[str, float] | None = None,
    floors: Counts | None = None,
    round_to: int = 1,
) -> dict[str, Tensor]:
    """Each group keeps the same fraction of its dense channels, solved for the budget.

    Args:
        scores: group -> (C,).
        fits: as in `rank_global`.
        dense: group -> channels of the dense model, which the fraction is of.
        keep: group -> its own fraction instead of the common one.
        floors: group -> least number of channels, default 1.
        round_to: channel counts become multiples of it where the group allows.

    Returns:
        group -> (C,) bool, True = keep. A group keeps ``floor(fraction * dense)``; what then still fits is given one
        channel at a time to the groups that lost most by rounding.

    Raises:
        NonFiniteScore: if a score is NaN or infinite.
        UnmeetableBudget: if even the floors do not fit.
    """
    check_finite(scores)
    own = dict(keep or {})
    names = list(scores)
    sizes = {name: len(score) for name, score in scores.items()}
    size = np.array(list(sizes.values()), dtype=np.int64)
    full = np.array([dense[name] for name in names], dtype=np.float64)
    least = np.array([_least((floors or {}).get(name, 1), sizes[name], round_to) for name in names])
    fixed = np.array([name in own for name in names])
    fractions = np.array([own.get(name, 0.0) for name in names])

    def wanted(fraction: float) -> NDArray[np.float64]:
        return np.minimum(size, np.where(fixed, fractions, fraction) * full)

    def counts(fraction: float) -> list[int]:
        whole = np.maximum(1, (wanted(fraction) + 1e-9).astype(np.int64))
        rounded = np.where(whole >= size, size, np.minimum(size, np.maximum(round_to, whole - whole % round_to)))
        kept: list[int] = np.maximum(least, rounded).tolist()
        return kept

    known: dict[tuple[int, ...], bool] = {}  # most steps of the bisection change no count

    def fit(fraction: float) -> bool:
        count = tuple(counts(fraction))
        if count not in known:
            known[count] = fits(dict(zip(names, count, strict=True)))
        return known[count]

    if not fit(0.0):
        raise UnmeetableBudget("even the fewest channels allowed do not fit")
    low, high = 0.0, 1.0
    if fit(1.0):
        low = 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    kept = dict(zip(names, counts(low), strict=True))
    target = dict(zip(names, wanted(low).tolist(), strict=True))
    for name in sorted(names, key=lambda n: kept[n] - target[n]):
        if name not in own and kept[name] < target[name] - 1e-6:
            _give_back(kept, name, sizes[name], round_to, fits)
    return {n: top_mask(score.detach().double().cpu(), kept[n]) for n, score in scores.items()}


def _least(floor: int, size: int, multiple: int) -> int:
    """A floor as a multiple, where the group has one."""
    return max(1, min(size, -(-floor // multiple) * multiple))


def _give_back(kept: dict[str, int], name: str, size: int, step: int, fits: Fits) -> bool:
    """Let a group have one more step of its channels, if that fits; whether it did."""
    more = min(size, kept[name] + step)
    given = more > kept[name] and (more % step == 0 or more == size) and fits({**kept, name: more})
    if given:
        kept[name] = more
    return given


def _top(ascending: Tensor, n: int) -> Tensor:
    mask = torch.zeros(len(ascending), dtype=torch.bool)
    mask[ascending[len(ascending) - n :]] = True
    return mask


def rank_weights(
    scores: Mapping[str, Tensor], allowance: float, *, price: Mapping[str, float] | None = None, scope: str = "global"
) -> dict[str, Tensor]:
    """Keep as many of the best weights as an allowance pays for.

    Args:
        scores: parameter -> scores in its shape; -inf marks a weight that may not stay.
        allowance: what the weights kept may cost together; with prices of 1, their number.
        price: parameter -> what one of its weights costs (its layer's flops per weight, say); 1 by default.
        scope: "global", one ranking over all parameters, or "layer", the same fraction of each.

    Returns:
        parameter -> bool mask, True = keep, of exact count: one more weight would not be paid for.

    Raises:
        NonFiniteScore: if a score is NaN or +inf.
        UnmeetableBudget: if the allowance is negative.
    """
    for name, score in scores.items():
        if torch.isnan(score).any() or torch.isposinf(score).any():
            raise NonFiniteScore(
                f"scores of {name!r} are NaN or infinite; look at the loss and its gradients in the batches before "
                "this event"
            )
    prices = {name: 1.0 if price is None else price[name] for name in scores}
    if allowance < 0:
        raise UnmeetableBudget("the weights that stay whatever happens cost more than the budget")
    if scope == "layer":
        return _weights_by_layer(scores, allowance, prices)
    if all(each == 1 for each in prices.values()):
        return _best(scores, allowance)
    names = list(scores)
    dtype = torch.float64 if any(scores[n].dtype == torch.float64 for n in names) else torch.float32
    flat = torch.cat([scores[n].detach().reshape(-1).to(dtype) for n in names])
    order = torch.sort(flat, stable=True).indices.flip(0)  # best first; of equal ones the higher index
    cost = torch.cat([torch.full((scores[n].numel(),), prices[n], dtype=torch.float64) for n in names])
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[order] = _affordable(cost.to(order.device)[order], ~torch.isneginf(flat[order]), allowance)
    parts = torch.split(mask, [scores[n].numel() for n in names])
    return {n: part.reshape(scores[n].shape) for n, part in zip(names, parts, strict=True)}


def _best(scores: Mapping[str, Tensor], most: float) -> dict[str, Tensor]:
    """As many of the best as there may be, over all tensors, none of which is NaN; -inf may not stay.

    Without sorting, in time and memory linear in their number.
    """
    flat = {name: score.detach().reshape(-1) for name, score in scores.items()}
    every = torch.cat([score.float() if score.dtype.itemsize < 4 else score for score in flat.values()])
    alive = int((every != -torch.inf).count_nonzero())  # a sum of bools takes eight bytes for each
    n = alive if most >= alive else int(most * (1 + 1e-12))
    if not n:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    least = _ascending(every, len(every) - n)
    masks = {name: score > least for name, score in flat.items()}
    spare = n - sum(int(mask.count_nonzero()) for mask in masks.values())
    for name in reversed(masks):  # of equal ones the last
        ties = (flat[name] == least).nonzero().reshape(-1)
        taken = min(spare, len(ties))
        masks[name][ties[len(ties) - taken :]] = True
        spare -= taken
    return {name: mask.reshape(scores[name].shape) for name, mask in masks.items()}


def _ascending(values: Tensor, place: int) -> Tensor:
    """(1,): the value at a place of the ascending order."""
    return values.kthvalue(place + 1, keepdim=True).values  # NumPy's partition takes ten times as long with many -inf


def _affordable(cost: Tensor, alive: Tensor, allowance: float) -> Tensor:
    """Which units, best first, an allowance pays for; past one too dear, cheaper ones may still be paid for."""
    chosen = torch.zeros_like(alive)
    left = allowance * (1 + 1e-12)
    while bool((candidates := alive & ~chosen & (cost <= left)).any()):  # each round rules out one price
        taken = candidates & (torch.cumsum(cost * candidates, 0) <= left)
        chosen |= taken
        left -= float(cost[taken].sum())
    return chosen


def _weights_by_layer(scores: Mapping[str, Tensor], allowance: float, prices: Mapping[str, float]) -> dict[str, Tensor]:
    alive = {n: int((~torch.isneginf(s)).sum()) for n, s in scores.items()}
    exact = {n: float(k) for n, k in alive.items()}
    share, rest = dict.fromkeys(scores), allowance  # layers that do not keep all they can share what the others leave
    while share:
        total = sum(prices[n] * scores[n].numel() for n in share)
        fraction = min(1.0, rest / total) if total else 1.0
        full = [n for n in share if fraction * scores[n].numel() >= alive[n]]
        exact |= {n: fraction * scores[n].numel() for n in share if n not in full}
        if not full:
            break
        for n in full:
            exact[n] = float(alive[n])  # in an earlier round it may have been less
            rest -= prices[n] * alive[n]
            del share[n]
    kept = {n: int(e + 1e-9) for n, e in exact.items()}
    left = allowance - sum(prices[n] * k for n, k in kept.items())
    for n in sorted(kept, key=lambda name: kept[name] - exact[name]):
        if prices[n] <= left * (1 + 1e-12) and kept[n] < alive[n]:
            kept[n] += 1
            left -= prices[n]
    return {n: _best({n: s}, kept[n])[n] for n, s in scores.items()}
