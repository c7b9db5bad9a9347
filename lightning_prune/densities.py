"""How dense each layer is of a network that may keep so many weights: uniform, Erdos-Renyi (ER), or with kernels (ERK).

Mocanu et al., 2018 (ER); Evci et al., 2020 (ERK). A layer's density is a common factor times a density of its own; the
factor is solved for, so that the network keeps what it may.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from lightning_prune.errors import UnmeetableBudget

Distribution = Literal["erk", "er", "uniform"]


def relative_density(shape: Sequence[int], distribution: Distribution) -> float:
    """A layer's density up to the factor that all layers share.

    Args:
        shape: of the weight; ER takes the first two dims, outputs and inputs, and ERK all of them.
        distribution: "erk" and "er": sum of the sizes / their product, so that the kept weights of a layer grow with
            the sum; "uniform": 1.

    Example:
        >>> relative_density((10, 20), "er"), relative_density((16, 3, 3, 3), "erk")
        (0.15, 0.05787037037037037)
    """
    sizes = shape[:2] if distribution == "er" else shape
    if distribution == "uniform" or not math.prod(sizes) or not sizes:
        return 1.0
    return sum(sizes) / math.prod(sizes)


def layer_densities(
    shapes: Mapping[str, Sequence[int]],
    allowance: float,
    distribution: Distribution = "erk",
    *,
    price: Mapping[str, float] | None = None,
    whole: Collection[str] = (),
) -> dict[str, float]:
    """Solve the common factor; a layer that would be denser than dense is whole, and the others are solved again.

    Args:
        shapes: weight -> its shape.
        allowance: what the weights kept may cost together; with prices of 1, their number.
        distribution: see `relative_density`.
        price: weight -> what one of its entries costs; 1 by default.
        whole: weights that stay dense whatever happens.

    Returns:
        weight -> density in [0, 1]; together they cost the allowance, or everything where it is enough for all.

    Raises:
        UnmeetableBudget: if what stays whole costs more than the allowance.

    Example:
        >>> layer_densities({"a": (10, 20), "b": (20, 40), "c": (40, 10)}, 350, "er")
        {'a': 0.375, 'b': 0.1875, 'c': 0.3125}
    """
    cost = {name: math.prod(shape) * (1.0 if price is None else price[name]) for name, shape in shapes.items()}
    raw = {name: relative_density(shape, distribution) for name, shape in shapes.items()}
    full = {*whole, *(name for name in cost if not cost[name])}  # what costs nothing need not go
    while True:
        left = allowance - sum(cost[name] for name in full)
        if left < -1e-12 * abs(allowance):
            raise UnmeetableBudget(
                f"{', '.join(sorted(whole))} stays dense and costs {allowance - left:g}, but the budget leaves "
                f"{allowance:g} for all weights that may go; raise keep, or choose another distribution"
            )
        total = sum(cost[name] * raw[name] for name in raw if name not in full)
        factor = left / total if total else math.inf
        over = {name for name in raw if name not in full and factor * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else max(0.0, factor * raw[name]) for name in raw}
        full |= over


def layer_counts(
    shapes: Mapping[str, Sequence[int]],
    densities: Mapping[str, float],
    allowance: float,
    *,
    price: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Round densities to whole weights that use the allowance up: largest remainders first, empty layers before them.

    Args:
        shapes: weight -> its shape.
        densities: of `layer_densities`.
        allowance, price: see `layer_densities`.

    Returns:
        weight -> entries kept; with prices of 1 they sum to the allowance exactly, if there are as many.

    Example:
        >>> layer_counts({"a": (4,), "b": (4,)}, {"a": 0.65, "b": 0.6}, 5)
        {'a': 3, 'b': 2}
    """
    prices = dict.fromkeys(shapes, 1.0) if price is None else price
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    exact = {name: densities[name] * size for name, size in sizes.items()}
    kept = {name: min(sizes[name], int(wanted + 1e-9)) for name, wanted in exact.items()}
    left = allowance - sum(prices[name] * n for name, n in kept.items())

    def buy(name: str, most: int) -> None:
        nonlocal left
        if not prices[name]:
            return  # whole already
        more = max(0, min(most, sizes[name] - kept[name], int(left / prices[name] + 1e-9)))
        kept[name] += more
        left -= more * prices[name]

    for name in sorted(kept, key=lambda n: (kept[n] > 0, kept[n] - exact[n])):
        buy(name, 1)
    for name in sorted(kept, key=lambda n: prices[n]):  # prices differ: what no remainder was worth
        buy(name, sizes[name])
    return kept
