"""What a Trainer's loop is going to do: how many optimizer steps there will be, and what it has compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer


def expected_steps(trainer: pl.Trainer) -> tuple[int | None, int | None]:
    """Optimizer steps of a whole fit and of one of its epochs, once training starts.

    A step is a batch after which an optimizer stepped, be it one of several. Lightning's own estimate knows neither of
    accumulation that changes from epoch to epoch nor of the epoch without steps that stochastic weight averaging adds,
    and takes ``max_steps`` for batches where several optimizers count towards it.

    Returns:
        Steps of the fit, None if it has no end by then; steps of an epoch, None if epochs have no known length or
        differ in it.
    """
    most = None if trainer.max_steps == -1 else trainer.max_steps
    if most is not None and not trainer.lightning_module.automatic_optimization:
        most //= max(1, len(trainer.optimizers))  # global_step counts each of them
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    factors = _accumulations(trainer)
    per_epoch = None if math.isinf(batches) or len(set(factors)) > 1 else math.ceil(batches / factors[0])
    if math.isinf(batches) or epochs is None or epochs == -1:
        return most, per_epoch
    epochs = max(1, min([epochs, *_asked_for(trainer)]))
    total = sum(math.ceil(batches / factor) for factor in factors[:epochs])
    total += math.ceil(batches / factors[-1]) * max(0, epochs - len(factors))
    return (total if most is None else min(total, most)), per_epoch


def _accumulations(trainer: pl.Trainer) -> list[int]:
    """Batches to a step, epoch by epoch up to the last change; one entry if it never changes."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return [callback.get_accumulate_grad_batches(epoch) for epoch in range(max(callback.epochs) + 1)]
    return [trainer.accumulate_grad_batches]


def _asked_for(trainer: pl.Trainer) -> list[int]:
    """Epochs that were asked for, where averaging has added one that only renews the statistics of norms."""
    averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]  # type: ignore[attr-defined]
    return [callback._max_epochs for callback in averaging if callback._max_epochs != -1]


def loss_scale(trainer: pl.Trainer) -> Tensor | float:
    """What the loss is multiplied with: 1, or a gradient scaler's own tensor, as reading it would wait for the device.

    It changes in place when the scaler is updated, after the optimizer step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return 1.0
    ask = getattr(scaler, "_get_scale_async", None)
    found: Tensor | float | None = None if ask is None else ask()
    return scaler.get_scale() if found is None else found


@contextmanager
def unscaled(trainer: pl.Trainer, optimizer: Optimizer) -> Iterator[None]:
    """Divide gradients by the loss scale inside, where a fused optimizer does so only while it steps (16-mixed).

    Gradients are the same afterwards, to the bit where the scale is a power of two, as a scaler's is by default.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    scale = loss_scale(trainer) if fused else 1.0
    if isinstance(scale, float) and scale == 1:
        yield
        return
    _scale(optimizer, 1 / scale)
    yield
    _scale(optimizer, scale)


@torch.no_grad()
def _scale(optimizer: Optimizer, factor: Tensor | float) -> None:
    every = (p.grad for group in optimizer.param_groups for p in group["params"])
    devices: dict[torch.device, list[Tensor]] = {}
    for gradient in every:
        if gradient is not None:
            devices.setdefault(gradient.device, []).append(gradient)
    for device, gradients in devices.items():
        torch._foreach_mul_(gradients, factor.to(device) if isinstance(factor, Tensor) else factor)


def forget_compiled(model: nn.Module) -> None:
    """Drop what was compiled for shapes that are gone.

    Of each function torch keeps eight versions and compiles no more after that, or stops with an error where it may
    not fall back; a fit may well cut more often.
    """
    if any(_is_compiled(module) for module in model.modules()):
        torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    own = (vars(module).get(name) for name in ("forward", "training_step"))
    wrapped = any(hasattr(function, "_torchdynamo_orig_callable") for function in own)
    return wrapped or type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
