"""Taylor pruning on weights and gates: drop the units whose removal changes the loss least, to first or second order.

Molchanov, Mallya, Tyree, Frosio and Kautz, 2019. Differs from the paper: the target is a budget of flops instead of a
number of units, so that each event removes as many as its part of the budget wants; a coupled group's score is divided
by the number of its gates only if asked; the second order takes the diagonal of the Hessian, as the authors' code does
and as removing a single unit wants, where the paper prints a whole row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.groups import Group
from lightning_prune.graph.views import LayerView, gate_gradients
from lightning_prune.pruner import Paper, one_of
from lightning_prune.schedule import Iterative, at_a_time
from lightning_prune.statistics import SampleSums
from lightning_prune.taps import gated


def taylor_weight_score(weights: Tensor, grads: Tensor) -> Tensor:
    """Score each unit by the squared first-order change of the loss when all its weights go at once (eq. 8).

    Args:
        weights: (C, F), one row per unit.
        grads: (C, F), gradients of the mini-batch mean loss.

    Returns:
        (C,), at least 0, in the unit of the loss squared: the sum over a row is signed, then squared.

    Example:
        >>> import torch
        >>> taylor_weight_score(torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, 1.0]]))
        tensor([0.])
    """
    return (weights * grads).sum(dim=1).square()


def second_order_score(gradients: Tensor, curvatures: Tensor) -> Tensor:
    """Score each gate by the square of what the loss changes by, to second order, when it turns from 1 to 0 (eq. 6).

    Args:
        gradients: (C,), dE/dz.
        curvatures: (C,), d2E/dz2, the diagonal of the Hessian.

    Returns:
        (C,), at least 0, in the unit of the loss squared: ``(dE/dz - d2E/dz2 / 2)**2``.

    Example:
        >>> import torch
        >>> second_order_score(torch.tensor([3.0, 1.5, -0.75]), torch.tensor([4.0, 1.0, 0.25]))
        tensor([1.0000, 1.0000, 0.7656])
    """
    return (gradients - 0.5 * curvatures).square()


def gate_derivatives(loss: Tensor, gates: Sequence[Tensor], at_once: int = 16) -> list[tuple[Tensor, Tensor]]:
    """First derivatives of a loss by gates, and the diagonal of the second, exactly.

    It costs one backward pass through the gradient's own graph for each entry of a gate, ``at_once`` of them batched;
    one after the other, with a warning, where an operator has no rule for batches.

    Args:
        loss: a number with a graph, which stays.
        gates: each (C,), requiring gradients.
        at_once: rows of the Hessian computed together; memory grows with it.

    Returns:
        Per gate dE/dz and d2E/dz2, both (C,).
    """
    firsts = torch.autograd.grad(loss, gates, create_graph=True, materialize_grads=True)
    out = []
    for gate, first in zip(gates, firsts, strict=True):
        second = torch.zeros_like(gate)
        if first.requires_grad:  # else the loss is linear in the gate
            for rows in torch.split(torch.eye(len(gate), dtype=gate.dtype, device=gate.device), at_once):
                second += (_rows_of_hessian(first, gate, rows) * rows).sum(dim=0)
        out.append((first.detach(), second))
    return out


def _rows_of_hessian(first: Tensor, gate: Tensor, rows: Tensor) -> Tensor:
    """(R, C): rows of the Hessian that unit vectors (R, C) choose."""
    settings: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    try:
        return torch.autograd.grad(first, gate, rows, is_grads_batched=True, **settings)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        found = torch.stack([torch.autograd.grad(first, gate, row, **settings)[0] for row in rows])
        warnings.warn(f"rows of the Hessian are computed one by one, which takes longer: {error}", stacklevel=2)
        return found


def moving_average(average: Tensor | None, value: Tensor, momentum: float) -> Tensor:
    """Average over events: the first value as it is, then ``momentum * average + (1 - momentum) * value``.

    Args:
        average: (C,), or None before the first event.
        value: (C,).
        momentum: in [0, 1).
    """
    return value if average is None else momentum * average + (1 - momentum) * value


class TaylorWeight(ChannelPruner):
    """Cut the channels whose removal is estimated to change the loss least, from gradients of training itself.

    Args:
        budget: see `ChannelPruner`.
        order: of the expansion: 1 from gradients that training computes anyway; 2 also from the diagonal of the
            Hessian, by one backward pass a gate and calibration batch at an event, in eval mode: for small networks.
        on: "gate" reads the gradient of a gate behind each channel's norm (the paper's best), "weight" that of the
            filter itself, which in front of a norm in train mode is noise, and warns.
        momentum: of the average over events (0.9 in the paper), 0 for none.
        group_norm: "count" divides a coupled group's score by the number of its gates, as the authors' code is meant
            to do, "none" does not.
        samples: at least so many calibration samples are looked at by an event of order 2.
        **shared: see `ChannelPruner`; one global ranking, as in the paper.
    """

    paper = Paper("Molchanov et al.", 2019, "https://arxiv.org/abs/1906.10771")
    needs = "gradients of training"
    default_schedule = Iterative(start=0.1, end=0.6, events=15)
    default_scope = "global"
    first_step = 1
    join = "sum"

    def __init__(
        self,
        budget: Budget | float,
        *,
        order: Literal[1, 2] = 1,
        on: Literal["gate", "weight"] = "gate",
        momentum: float = 0.9,
        group_norm: Literal["none", "count"] = "none",
        samples: int = 256,
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order!r}")
        one_of("on", on, ("gate", "weight"))
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        one_of("group_norm", group_norm, ("none", "count"))
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples!r}")
        self.order = order
        self.on = on
        self.momentum = momentum
        self.group_norm = group_norm
        self.samples = samples

    @staticmethod
    def paper_schedule(units: int, *, updates: int = 30, at_once: int = 100) -> Iterative:
        """The paper's own steps: so many units after every so many optimizer steps, until they are gone.

        Args:
            units: how many go in all; ``Budget(keep, of="units")`` takes the same number each time.
            updates: optimizer steps between two events.
            at_once: units an event.

        Raises:
            ValueError: if one of them is below 1.
        """
        return at_a_time("units", units, updates, at_once)

    @property
    @override
    def _measures(self) -> bool:
        return self.order == 1

    @override
    def measure(self, view: LayerView) -> Tensor | None:
        return view.gate_gradient if self.on == "gate" else view.weight_gradient

    @override
    def measure_all(self, views: Mapping[str, Sequence[LayerView]]) -> dict[str, Tensor]:
        own = type(self).measure is TaylorWeight.measure and self.join == "sum"  # else a subclass has its say
        return gate_gradients(views) if own and self.on == "gate" else super().measure_all(views)

    @override
    def combine(self, joined: Tensor) -> Tensor:
        return joined.square()  # once a batch, after the signed sum over the group's members

    @override
    def scores(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        if self.order == 2:
            for name, value in self._second_order(views).items():
                views[name][0].measured = value
        return {name: self.score(group[0]) for name, group in views.items()}

    @override
    def score(self, view: LayerView) -> Tensor:
        assert view.measured is not None
        parts = len(self._places(view.group)) if self.group_norm == "count" else 1
        average = moving_average(view.kept.get("average"), view.measured / parts, self.momentum)
        view.kept["average"] = average
        return average

    def _second_order(self, views: Mapping[str, list[LayerView]]) -> dict[str, Tensor]:
        """group -> (C,) mean over calibration batches of the second-order score, exact in eval mode."""
        taps = {name: self._taps(group[0].group) for name, group in views.items()}
        weight = next(iter(views.values()))[0].weight
        sums = SampleSums({name: (group[0].group.size,) for name, group in views.items()}, weight.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for batch in self.calibrate(self.samples):
            gates = {
                name: torch.ones(group[0].group.size, dtype=dtype, device=weight.device, requires_grad=True)
                for name, group in views.items()
            }
            with self.evaluating(grad=True), gated(self.model, taps, gates), sdpa_kernel(SDPBackend.MATH):
                found = gate_derivatives(self.loss(batch), list(gates.values()))
            values = (second_order_score(first, second) for first, second in found)
            sums.add(dict(zip(gates, values, strict=True)), samples=1)  # the square is a batch's, as for order 1
        return {name: mean.to(dtype) for name, mean in sums.means(self.total).items()}

    def _places(self, group: Group) -> Sequence[Any]:
        """Where a group's gates or filters are."""
        return self.graph.gate_parameters(group) if self.on == "gate" else group.producers

    @override
    def _taps(self, group: Group) -> Sequence[Any]:
        if self.order == 1:
            return super()._taps(group)
        if self.on == "gate":
            return self.graph.gates(group)
        assert self.graph.flow is not None
        return [tap for producer in group.producers for tap in self.graph.flow.made_by(producer.weight, group.name)]

    @override
    def _prepare(self, model: Any) -> None:
        super()._prepare(model)
        blind = [name for name, views in self._views.items() if all(view.scale_free for view in views)]
        if blind and self.order == 1:
            warnings.warn(
                f"{', '.join(blind[:3])} stand in front of a norm without a scale, where the loss does not depend on a "
                "filter's length and the score is noise; list them in ignore=, or give the norm affine=True",
                stacklevel=2,
            )
        if self.on == "weight":
            behind = [name for name, views in self._views.items() if any(view.has_norm for view in views)]
            if behind:
                why = (
                    "the loss does not depend on a filter's length and the score is noise"
                    if self.order == 1
                    else "the score is of a filter of zeros, whose norm still passes its shift on"
                )
                warnings.warn(
                    f"on='weight' scores {len(behind)} groups in front of a norm ({', '.join(behind[:3])}...), where "
                    f"{why}; use on='gate'",
                    stacklevel=2,
                )
