"""The sensitivity scan of Han, Pool, Tran and Dally (2015): each layer alone, thinned out more and more, not retrained.

What it finds says how much of each layer may go: densities, or quality factors, layer by layer.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_prune.budget import Budget
from lightning_prune.errors import NothingToPrune
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.ignore import matching
from lightning_prune.ranking import top_mask
from lightning_prune.report import markdown_table
from lightning_prune.taps import evaluating

DENSITIES = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
_NOT_MULTIPLIED = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
)  # weights of two dimensions that no layer multiplies with
_M = TypeVar("_M", bound=nn.Module)


def deviations(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Absolute weights in standard deviations of those that survive: what Han's quality factor is a threshold on.

    Args:
        weight: any shape.
        mask: bool, the shape of the weight, True = survives; all by default. Zeros of earlier rounds would make the
            deviation smaller, and iteration stall.

    Returns:
        ``|w| / std``, float64, the population's standard deviation around the mean. Where the survivors do not differ
        no factor removes any of them, and all are at the largest number there is.

    Example:
        >>> deviations(torch.tensor([1.0, -1.0, 3.0, -3.0])).round(decimals=4)
        tensor([0.4472, 0.4472, 1.3416, 1.3416], dtype=torch.float64)
    """
    wide = weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)
    alive = wide if mask is None else wide[mask]
    spread = alive.std(correction=0) if alive.numel() else torch.zeros((), dtype=wide.dtype)
    if spread == 0:
        return torch.full_like(wide, torch.finfo(wide.dtype).max)
    return wide.abs() / spread


@dataclass(frozen=True)
class Sensitivity:
    """What becomes of a network when one layer is thinned out and nothing is retrained.

    Attributes:
        dense: what was measured with all weights there.
        densities: falling, each in (0, 1).
        values: weight -> what was measured at each density of it.
        kept: weight -> how many of its entries were kept at each density: exact counts, rounded down.
        sizes: weight -> how many entries it has.
        factors: weight -> the quality factor that keeps as many, at each density.
    """

    dense: float
    densities: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]
    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    factors: Mapping[str, tuple[float, ...]]

    def keep(self, tolerance: float, higher_is_better: bool = True) -> dict[str, float]:
        """The lowest density of each weight down to which the network stays nearly as good; 1 if there is none.

        Each is right for this weight alone: together they cost more than the tolerance.

        Args:
            tolerance: how much worse it may be, in the unit of the values.
            higher_is_better: whether the values are accuracies, say, and not losses.

        Raises:
            ValueError: if the tolerance is negative or not finite.
        """
        return {name: (1.0, *self.densities)[self._within(name, tolerance, higher_is_better)] for name in self.values}

    def quality(self, tolerance: float, higher_is_better: bool = True) -> dict[str, float]:
        """As `keep`, but the quality factors that keep as many: ``Magnitude(quality=...)``; 0 removes nothing."""
        return {
            name: (0.0, *factors)[self._within(name, tolerance, higher_is_better)]
            for name, factors in self.factors.items()
        }

    def _within(self, name: str, tolerance: float, higher_is_better: bool) -> int:
        """How many densities, from the highest down, are within the tolerance."""
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance!r}")
        for count, value in enumerate(self.values[name]):
            if not (self.dense - value if higher_is_better else value - self.dense) <= tolerance:  # NaN is not within
                return count
        return len(self.densities)

    def to_markdown(self) -> str:
        """A table: a row a weight, a column a density."""
        rows: list[dict[str, object]] = [
            {"weight": name, "entries": self.sizes[name], "1": self.dense, **dict(zip(self._columns, row, strict=True))}
            for name, row in self.values.items()
        ]
        return markdown_table(rows)

    def to_csv(self) -> str:
        """A header and a line a weight and density: weight, entries, density, kept, quality, value."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["weight", "entries", "density", "kept", "quality", "value"])
        for name, size in self.sizes.items():
            writer.writerow([name, size, 1.0, size, 0.0, self.dense])
            columns = (self.densities, self.kept[name], self.factors[name], self.values[name])
            writer.writerows([name, size, *row] for row in zip(*columns, strict=True))
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists and numbers."""
        tables = {"values": self.values, "kept": self.kept, "factors": self.factors}
        return {
            "dense": self.dense,
            "densities": list(self.densities),
            "sizes": dict(self.sizes),
            **{key: {name: list(row) for name, row in table.items()} for key, table in tables.items()},
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as standard JSON: a value that is not finite becomes null."""
        state = self.to_dict()
        state["values"] = {n: [v if math.isfinite(v) else None for v in row] for n, row in state["values"].items()}
        return json.dumps(state, indent=indent, allow_nan=False)

    @property
    def _columns(self) -> list[str]:
        return [f"{density:g}" for density in self.densities]

    def __str__(self) -> str:
        return self.to_markdown()


def sensitivity(
    model: _M,
    evaluate: Callable[[_M], Any],
    densities: Sequence[float] = DENSITIES,
    *,
    graph: ChannelGraph | None = None,
    ignore: Sequence[str] = (),
) -> Sensitivity:
    """Thin out each layer alone, smallest weights first, and see what becomes of the network.

    Nothing is retrained, and nothing changes: weights are put back bit by bit, errors included, and so are modes,
    buffers and the random state. Each evaluation starts from the same random state.

    Args:
        model: what is looked at, in eval mode and without gradients.
        evaluate: of the model -> a number: accuracy, or a loss. Runs once for each weight and density, and once more.
        densities: fractions of a weight's entries that are kept, in (0, 1).
        graph: from `lightning_prune.trace`: the weights that weight methods mask are scanned. Without one, all
            parameters with more than one dimension but embeddings and norms.
        ignore: glob patterns of module or parameter names that are not scanned.

    Raises:
        ValueError: for a density outside of (0, 1), none at all, a pattern that matches nothing, or a dense network
            whose value is not finite.
        NothingToPrune: if no weight is left to scan.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> sensitivity(layer, lambda model: model.weight.sum(), [0.5, 0.25]).values
        {'weight': (7.0, 4.0)}
    """
    grid = tuple(sorted({float(density) for density in densities}, reverse=True))
    if not grid or any(not 0 < density < 1 for density in grid):
        raise ValueError(f"densities must be at least one fraction in (0, 1), got {list(densities)!r}")
    weights = _scanned(model, graph, [ignore] if isinstance(ignore, str) else ignore)
    dense = _value(model, evaluate)
    if not math.isfinite(dense):
        raise ValueError(
            f"evaluate gave {dense} for the network as it is; a scan compares with it, so it has to be finite"
        )
    values: dict[str, tuple[float, ...]] = {}
    kept = {name: tuple(Budget(d, "units").limit(w.numel()) for d in grid) for name, w in weights.items()}
    factors: dict[str, tuple[float, ...]] = {}
    with tqdm(total=len(weights) * len(grid), desc="sensitivity", leave=False, disable=None) as bar:
        for name, weight in weights.items():
            found = []
            for count in kept[name]:
                found.append(_thinned(model, weight, count, evaluate))
                bar.update()
            values[name] = tuple(found)
            ordered = deviations(weight).flatten().sort().values
            factors[name] = tuple(_factor(ordered, count) for count in kept[name])
    return Sensitivity(dense, grid, values, kept, {name: w.numel() for name, w in weights.items()}, factors)


def _scanned(model: nn.Module, graph: ChannelGraph | None, ignore: Sequence[str]) -> dict[str, nn.Parameter]:
    ignored = matching(model, ignore)
    if graph is not None:
        names = set(graph.weights)
    else:
        no = {id(p) for m in model.modules() if isinstance(m, _NOT_MULTIPLIED) for p in m.parameters(recurse=False)}
        names = {name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in no}
    weights = {name: p for name, p in model.named_parameters() if name in names - ignored}
    if not weights:
        raise NothingToPrune(
            f"{type(model).__name__} has no weight to scan: none has two dimensions, or all are ignored"
        )
    return weights


def _value(model: _M, evaluate: Callable[[_M], Any]) -> float:
    with evaluating(model):
        return float(evaluate(model))


def _thinned(model: _M, weight: nn.Parameter, count: int, evaluate: Callable[[_M], Any]) -> float:
    """The value with the largest so many entries of one weight."""
    whole = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.masked_fill_(~top_mask(whole.abs(), count), 0)
        return _value(model, evaluate)
    finally:
        with torch.no_grad():
            weight.copy_(whole)


def _factor(ordered: Tensor, count: int) -> float:
    """The quality factor that keeps so many: halfway between what goes and what stays, of equal ones what stays.

    Args:
        ordered: (N,) absolute weights in standard deviations, rising.
        count: from 0 to N.
    """
    gone = len(ordered) - count
    if not gone:
        return 0.0
    below = float(ordered[gone - 1])
    if not count:
        return math.nextafter(below, math.inf)
    return (below + float(ordered[gone])) / 2
