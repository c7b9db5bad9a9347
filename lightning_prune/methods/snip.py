"""SNIP: before training, drop the weights that the loss feels least when they are switched off.

Lee, Ajanthan and Torr, 2019. Differs from the paper: weights alone compete, where its code lets biases count as well;
what is trained is the draw that was scored, where the code trains a fresh one under the same mask; norms score in the
mode they train in, where the code's are at their initial running statistics (``bn_eval=True``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.batches import samples_in
from lightning_prune.budget import Budget
from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.pruner import Paper, one_of
from lightning_prune.ranking import top_mask
from lightning_prune.schedule import OneShot
from lightning_prune.statistics import SampleSums
from lightning_prune.weight_pruner import WeightPruner

Reinit = Literal["he", "glorot", "lecun"]

# Layers that `reinit` knows, by the function that runs them: over how many gates their weights are stacked.
_GATES = {
    **dict.fromkeys(("linear", *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3))), 1),
    **{"multi_head_attention_forward": 1, "rnn_tanh": 1, "rnn_relu": 1, "rnn_tanh_cell": 1, "rnn_relu_cell": 1},
    **{"lstm": 4, "lstm_cell": 4, "gru": 3, "gru_cell": 3},
}


def snip_score(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Score each weight by its share of the sensitivities of the loss to a switch on each weight (eq. 6).

    The derivative of the loss by a switch c at 1, where c multiplies w, is ``w * dL/dw``.

    Args:
        weights: name -> any shape.
        gradients: name -> the same shape: of the mean loss, signed sums over batches.

    Returns:
        name -> at least 0, float64; all scores of all tensors add up to 1.

    Raises:
        NonFiniteScore: if the loss feels none of the weights.

    Example:
        >>> snip_score({"fc": torch.tensor([2.0, 3.5, 0.5])}, {"fc": torch.tensor([3.0, 1.0, -1.0])})
        {'fc': tensor([0.6000, 0.3500, 0.0500], dtype=torch.float64)}
    """
    felt = {name: (weight.detach().double() * gradients[name].double()).abs() for name, weight in weights.items()}
    total = sum(float(value.sum()) for value in felt.values())
    if total == 0:
        raise NonFiniteScore(
            "SNIP: every weight times its gradient is 0, so that no weight can be told from another; start from "
            "weights that are not 0 (reinit= draws new ones), and look at the loss"
        )
    return {name: value / total for name, value in felt.items()}


def variance_scaled(
    shape: Sequence[int], kind: Reinit, fan_in: int, fan_out: int, generator: torch.Generator
) -> Tensor:
    """Draw weights whose variance keeps the scale of what flows through a layer.

    Args:
        shape: of the weights.
        kind: variance of "he" 2 / fan_in, of "glorot" 2 / (fan_in + fan_out), of "lecun" 1 / fan_in.
        fan_in: entries that an output reads.
        fan_out: entries that an input goes to.
        generator: on the CPU.

    Returns:
        float32, normal, cut off at two of the normal's standard deviations and widened for the variance as said.
    """
    variance = {"he": 2 / fan_in, "glorot": 2 / (fan_in + fan_out), "lecun": 1 / fan_in}[kind]
    width = math.sqrt(variance) / 0.87962566103423978  # the standard deviation of a normal of 1 that is cut off at 2
    out = torch.empty(tuple(shape))
    return nn.init.trunc_normal_(out, std=width, a=-2 * width, b=2 * width, generator=generator)


class SNIP(WeightPruner):
    """Mask the weights with the smallest connection sensitivity, once, before the first training step.

    Args:
        budget: see `WeightPruner`.
        samples: training samples that the gradient is a mean over, at least; the paper's is one batch.
        reinit: draw the weights of convolutions, linear and recurrent layers anew first, by a scheme that scales
            variances, and set their biases to zero; None trains and scores what the module came with. Ignored layers
            are left alone.
        bn_eval: norms score with their running statistics, at the start 0 and 1, instead of the batch's.
        min_keep_per_layer: fewest weights of each parameter that stay, whatever their scores.
        **shared: see `WeightPruner`; the scope is "global" as in the paper. "layer" ranks within each layer, which is
            the variant that later work compares with under the same name.
    """

    paper = Paper("Lee et al.", 2019, "https://arxiv.org/abs/1810.02340")
    needs = "calibration data"
    start = "initial"
    default_schedule = OneShot(0.0)
    default_scope = "global"
    _against_empty = "raise keep, give min_keep_per_layer="

    def __init__(
        self,
        budget: Budget | float,
        *,
        samples: int = 128,
        reinit: Reinit | None = None,
        bn_eval: bool = False,
        min_keep_per_layer: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(budget, **shared)
        for name, value, least in (("samples", samples, 1), ("min_keep_per_layer", min_keep_per_layer, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if reinit is not None:
            one_of("reinit", reinit, get_args(Reinit))
        if min_keep_per_layer and self.scope != "global":
            raise ValueError(f"scope={self.scope!r} keeps the same fraction of each layer: leave min_keep_per_layer 0")
        self.samples = samples
        self.reinit = reinit
        self.bn_eval = bn_eval
        self.min_keep_per_layer = min_keep_per_layer

    @override
    def initialise(self) -> None:
        if self.reinit is None:
            return
        flow, parameters = self.graph.flow, dict(self.model.named_parameters())
        assert flow is not None
        for name, weight in self.weights.items():
            if weight.ndim < 2:
                continue  # named in include=: a bias, or a norm's scale
            calls = [flow.calls[number].name for number in flow.layers.get(name, ())]
            if not calls or calls[0] not in _GATES:
                raise ValueError(
                    f"reinit knows convolutions, linear and recurrent layers, but {name!r} is read by "
                    f"{calls[0] + '()' if calls else 'none that was followed'}; initialise the module yourself, or "
                    "list it in ignore="
                )
            weight.copy_(self._drawn(name, weight, calls[0]))
            of_layer = {layer.bias for number in flow.layers[name] for layer in flow.made[number]}
            for bias in of_layer | {name.replace("weight", "bias")}:  # a recurrent layer has two for each weight's rows
                if bias in parameters and bias != name and parameters[bias].ndim == 1:
                    parameters[bias].zero_()

    def _drawn(self, name: str, weight: Tensor, call: str) -> Tensor:
        """New values of a weight, (out, in, *kernel), or (in, out, *kernel) where it is of a transposed convolution."""
        assert self.reinit is not None
        window = math.prod(weight.shape[2:])
        fans = weight.shape[1] * window, weight.shape[0] // _GATES[call] * window
        fan_in, fan_out = fans[::-1] if "transpose" in call else fans
        return variance_scaled(weight.shape, self.reinit, fan_in, fan_out, self.generator("reinit", name))

    @override
    def scores(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        scores = snip_score(weights, self._gradients(weights))
        return {name: score.masked_fill(~self.alive(name), -torch.inf) for name, score in scores.items()}

    def _gradients(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """name -> mean gradient over samples of all processes, float64."""
        device = next(iter(weights.values())).device
        sums = SampleSums({name: weight.shape for name, weight in weights.items()}, device)
        reached = torch.zeros(len(weights), dtype=torch.float64, device=device)
        rank, processes = self._place()
        with self._scoring(weights):
            for number, batch in enumerate(self.calibrate(self.samples)):
                with isolate_rng():  # dropout: of the batch's own, however many processes there are
                    torch.manual_seed(self.seed(f"noise of batch {number * processes + rank}"))
                    loss = self.loss(batch)
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                reached += torch.tensor([gradient is not None for gradient in found], device=device)
                count = samples_in(batch)  # the loss is a mean over them
                named = zip(weights, found, strict=True)
                sums.add({name: gradient.double() * count for name, gradient in named if gradient is not None}, count)
        means = sums.means(self.total)
        self._check(list(weights), self.total(reached), sums.skipped, device)
        return means

    def _place(self) -> tuple[int, int]:
        """Which of how many processes this is."""
        trainer = None if self._at_event is None else self._at_event[0]
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    @contextmanager
    def _scoring(self, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Weights that do not train have a sensitivity as well; norms are in the mode that is wanted."""
        norms = [m for m in self.model.modules() if m.training and getattr(m, "running_mean", None) is not None]
        still = [weight for weight in weights.values() if not weight.requires_grad]
        try:
            for weight in still:
                weight.requires_grad_(True)
            for norm in norms:
                norm.training = not self.bn_eval
            with torch.enable_grad():
                yield
        finally:
            for weight in still:
                weight.requires_grad_(False)
            for norm in norms:
                norm.training = True

    def _check(self, names: Sequence[str], reached: Tensor, skipped: int, device: torch.device) -> None:
        """Say what was left out.

        Raises:
            NonFiniteScore: naming weights that the loss does not depend on.
        """
        if unseen := [name for name, count in zip(names, reached.tolist(), strict=True) if not count]:
            raise NonFiniteScore(
                f"SNIP has no gradient to score {', '.join(unseen[:3])} by: the loss does not depend on "
                f"{'it' if len(unseen) == 1 else 'them'}; list {'it' if len(unseen) == 1 else 'them'} in ignore=, or "
                "give a loss_fn= that reaches all that is to be pruned"
            )
        if left_out := int(self.total(torch.tensor(float(skipped), device=device))):
            rank_zero_warn(f"SNIP left {left_out} calibration batches out, as their gradients were not finite")

    @override
    def _prepare(self, model: nn.Module) -> None:
        super()._prepare(model)
        allowance, price = self._allowance(self.budget)
        least = sum(price[name] * min(self.min_keep_per_layer, w.numel()) for name, w in self.weights.items())
        if least > allowance:
            raise UnmeetableBudget(
                f"SNIP: min_keep_per_layer={self.min_keep_per_layer} in {len(self.weights)} layers is {least:g} of the "
                f"{self.budget.of}, but the budget leaves {allowance:g}; raise keep, or lower min_keep_per_layer"
            )

    @override
    def select(self, scores: Mapping[str, Tensor], allowance: float, price: Mapping[str, float]) -> dict[str, Tensor]:
        held = {name: top_mask(s, min(self.min_keep_per_layer, s.numel())) for name, s in scores.items()}
        first = {name: score + 2.0 * held[name] for name, score in scores.items()}  # no score is above 1
        return super().select(first, allowance, price)
