"""NISP: drop the channels that matter least to the response in front of the classifier, propagated back to them.

Yu, Li, Chen, Lai, Morariu, Han, Gao, Lin and Davis, 2018; the response is ranked by Inf-FS (Roffo, Melzi and Cristani,
2015). Differs from the paper: how many channels each layer loses is one common fraction solved for the budget (or
``keep=`` per group) where the paper sets it by hand; streams of residual nets are pruned too, by one score for all
tensors that are added together, and their choice is made before the sweep that the others are chosen in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.sparse.linalg import eigsh
from scipy.stats import rankdata
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.absolute import propagate, responses
from lightning_prune.batches import evaluating
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.errors import NonFiniteScore
from lightning_prune.graph.flow import Call, Tap
from lightning_prune.graph.groups import Group
from lightning_prune.graph.views import LayerView
from lightning_prune.pruner import Paper
from lightning_prune.ranking import top_mask
from lightning_prune.schedule import OneShot
from lightning_prune.taps import Seen, watching


def inf_fs(features: Tensor, alpha: float = 0.5, factor: float = 0.9) -> Tensor:
    """Score each feature by how it spreads and how little it goes with the others, over paths of all lengths (Inf-FS).

    With A the mean of pairs' larger standard deviation, scaled to [0, 1], weighted by alpha, and of 1 - |Spearman's
    rank correlation|, weighted by 1 - alpha, and r = factor / (largest eigenvalue of A), it is the sum of a row of
    ``(I - r A)^-1 - I``.

    Args:
        features: (N, D), N samples, at least 2.
        alpha: in [0, 1].
        factor: in (0, 1); the nearer to 1, the more long paths count.

    Returns:
        (D,) at least 0, float64; 0 for a feature that is always the same, all 1 where no pair tells features apart.

    Raises:
        ValueError: for less than 2 samples.

    Example:
        >>> inf_fs(torch.tensor([[1.0, 2.0, 4.0], [2.0, 4.0, 1.0], [3.0, 8.0, 3.0], [4.0, 6.0, 2.0]]))
        tensor([ 6.1316, 11.2830,  8.0274], dtype=torch.float64)
    """
    if len(features) < 2:
        raise ValueError(f"features are ranked by their spread over samples, at least 2, got {len(features)}")
    x = features.double()
    deviation = x.std(dim=0)
    spread = torch.maximum(deviation[:, None], deviation)
    low, high = spread.min(), spread.max()
    differ = high - low > 1e-12 * high  # else by rounding alone, which the scale would blow up
    spread = (spread - low) / (high - low) if differ else torch.zeros_like(spread)
    ranks = torch.from_numpy(rankdata(x.cpu().numpy(), axis=0)).to(x)  # of equal values the mean
    ranks = nn.functional.normalize(ranks - ranks.mean(dim=0), dim=0)  # of a constant feature 0, and so its correlation
    adjacency = alpha * spread + (1 - alpha) * (1 - (ranks.mT @ ranks).abs()).clamp_min(0)
    one = torch.ones_like(deviation)
    scores = one
    if adjacency.max() > 1e-12:
        # nothing is negative, so that the largest eigenvalue is the radius, and no entry of its vector differs in sign
        (radius,) = eigsh(adjacency.cpu().numpy(), k=1, which="LA", v0=one.cpu().numpy(), return_eigenvectors=False)
        scores = torch.linalg.solve(torch.eye(len(one)).to(x) - factor / float(radius) * adjacency, one) - one
    return torch.where(x.amax(dim=0) > x.amin(dim=0), scores, 0.0)


class NISP(ChannelPruner):
    """Cut the channels that matter least to what the last layer reads, by one sweep back through the absolute weights.

    Args:
        budget: see `ChannelPruner`.
        alpha: of Inf-FS: weight of the spread against that of the lack of correlation.
        factor: of Inf-FS, in (0, 1).
        samples: looked at for the responses, at least; in eval mode, without gradients.
        final_layer: path of the module whose input is ranked; by default the one whose output is the model's.
        streams: whether channels that several layers make together go as well (residual streams).
        **shared: see `ChannelPruner`; the scope is "uniform" by default, as scores grow towards the input and do not
            compare between layers, and ``keep=`` gives groups fractions of their own.
    """

    paper = Paper("Yu et al.", 2018, "https://arxiv.org/abs/1711.05908")
    needs = "calibration data"
    default_schedule = OneShot(0.5)
    default_scope = "uniform"

    def __init__(
        self,
        budget: Budget | float,
        *,
        alpha: float = 0.5,
        factor: float = 0.9,
        samples: int = 5000,
        final_layer: str | None = None,
        streams: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
        if not 0 < factor < 1:
            raise ValueError(f"factor must be in (0, 1), got {factor!r}")
        if type(samples) is not int or samples < 2:
            raise ValueError(f"samples must be an int of at least 2, got {samples!r}")
        self.alpha = alpha
        self.factor = factor
        self.samples = samples
        self.final_layer = final_layer
        self.streams = streams
        self._response: Tensor | None = None  # only from the scores of an event to its choice
        self._reached: frozenset[str] = frozenset()

    @override
    def _prepare(self, model: nn.Module) -> None:
        """Go back once, to see what nothing comes back to, and that all functions on the way are known."""
        taps = {g.name: self._taps(g) for g in self.graph.groups if g.producers}
        with evaluating(model):
            self._reached = frozenset(propagate(model, self.graph.example_inputs, self._final(), None, taps))
        super()._prepare(model)

    @override
    def _refusal(self, group: Group) -> str | None:
        why = super()._refusal(group)
        if why is None and group.name not in self._reached:
            why = f"nothing of it comes to '{self._final().module}', whose input NISP ranks"
        if why is None and len(self._taps(group)) > 1 and not self.streams:
            why = f"{len(self._taps(group))} layers make its channels together, which streams=False leaves alone"
        return why

    @override
    def _taps(self, group: Group) -> Sequence[Tap]:
        """Where the layers' neurons are: behind each one's norm, not behind norms in front of its readers."""
        flow = self.graph.flow
        assert flow is not None
        gates = {gate.weight for gate in self.graph.gate_parameters(group)}
        behind = [layer for name in gates for call in flow.layers.get(name, ()) for layer in flow.made[call]]
        if all(layer.kind != "norm" or layer.source is not None for layer in behind):
            return self.graph.gates(group)
        own = [p.norms[0].gamma if p.gated and p.norms else p.weight for p in group.producers]
        return [tap for name in own for tap in flow.made_by(name, group.name)]

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        self._response = inf_fs(self._responses(), self.alpha, self.factor)
        return self._sweep(lambda name, found: None)

    @override
    def select(self, scores: Mapping[str, Tensor], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, Tensor]:
        """The counts are settled; which channels stay is decided on the way back, from what is left behind them."""
        keep = super().select(scores, fits)

        def decide(name: str, found: Tensor) -> Tensor | None:
            if name not in keep:
                return None
            alive = self._alive[name].to(found.device)
            if len(self._taps(self.graph.group(name))) == 1:  # all that comes back is here: it is decided now
                keep[name] = top_mask(found[alive], int(keep[name].sum())).cpu()
            whole = torch.zeros_like(alive)
            whole[alive] = keep[name].to(found.device)
            return whole

        self._sweep(decide)
        self._response = None
        return keep

    def _sweep(self, decide: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
        taps = {name: self._taps(views[0].group) for name, views in self._views.items()}
        with self.evaluating():
            found = propagate(self.model, self.graph.example_inputs, self._final(), self._response, taps, decide)
        return {name: found[name] for name in self._views}

    def _responses(self) -> Tensor:
        """(N, D) inputs of the final layer for calibration samples of all processes."""
        seen: list[Tensor] = []
        final = self._final()

        def look(seen_now: Seen) -> None:
            seen.append(responses(final, seen_now.args[0] if seen_now.args else seen_now.kwargs["input"]).double())

        with self.evaluating(), watching(self.model, {final: [look]}):
            for batch in self.calibrate(self.samples):
                self.loss(batch)
        finite = [rows for rows in seen if bool(torch.isfinite(rows).all())]
        rows = self._of_all_processes(finite)
        if len(rows) < 2:
            raise NonFiniteScore(
                f"NISP needs the responses of 2 samples at least, got {len(rows)}; {len(seen) - len(finite)} batches "
                "of this process were not finite"
            )
        return rows

    def _of_all_processes(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all processes, one after the other: rank correlations of parts could not be averaged."""
        assert self._at_event is not None
        trainer, model = self._at_event
        rank, processes = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        sizes = torch.zeros(processes, 2, dtype=torch.float64, device=next(model.parameters()).device)
        for part in parts:
            sizes[rank] = torch.tensor([sizes[rank, 0] + len(part), part.shape[1]])
        counts, widths = self.total(sizes).long().T.tolist()
        rows = torch.zeros(sum(counts), max(widths), dtype=torch.float64, device=sizes.device)
        if parts:
            rows[sum(counts[:rank]) :][: counts[rank]] = torch.cat(list(parts))
        return self.total(rows)

    def _final(self) -> Call:
        """The call of the layer whose input is ranked.

        Raises:
            ValueError: if ``final_layer`` is none, or the outputs are of several layers and none is named.
        """
        flow = self.graph.flow
        assert flow is not None
        layers = {n for n, made in flow.made.items() if n >= 0 and any(layer.kind != "norm" for layer in made)}
        if self.final_layer is not None:
            chosen = {n for n in layers if flow.call(n).module == self.final_layer}
            wanted = f"final_layer={self.final_layer!r} must be the path of a layer"
        else:
            read = {source[0] for record in flow.calls for source in record.sources if source is not None}
            left = [n for n, record in enumerate(flow.calls) if record.outputs and n not in read]
            chosen, seen = set[int](), set(left)
            while left:
                number = left.pop()
                if number in layers:
                    chosen.add(number)
                    continue
                new = {source[0] for source in flow.calls[number].sources if source is not None} - seen
                seen |= new
                left += new
            wanted = "the model's outputs must come from one layer, or final_layer= say which"
        modules = sorted({flow.call(n).module for n in chosen or layers})
        if not chosen or len(modules) > 1:
            raise ValueError(f"NISP ranks what one layer reads: {wanted}; there are {', '.join(modules)}")
        return flow.call(max(chosen))
