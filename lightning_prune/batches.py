"""Batches outside of the training loop: an example to trace on, calibration data, the loss of a batch.

All without a trace: loaders, samplers, random state, metrics, norms, modes and the log are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from itertools import count
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchmetrics import Metric

from lightning_prune.errors import TraceError
from lightning_prune.graph.trace import Calls, undisturbed
from lightning_prune.statistics import samples_in as samples_in
from lightning_prune.taps import evaluating as evaluating


def second_iterator(
    trainer: pl.Trainer, model: pl.LightningModule, calibration: Any, samples: int, seed: int
) -> Iterator[Any]:
    """Batches from a second iterator over the training loader, or from a loader of one's own.

    The training loader's sampler is not asked: a map-style dataset is drawn from anew with a generator of its own.

    Args:
        trainer: of the fit that runs.
        model: batches get its precision and are moved to its device, through its own transfer hooks.
        calibration: a loader, a number of samples instead of ``samples``, or None.
        samples: stop once this many were given.
        seed: of the order and of the augmentation.
    """
    if isinstance(calibration, int):
        samples, calibration = calibration, None
    with isolate_rng():
        torch.manual_seed(seed)
        if calibration is None:
            combined = trainer.fit_loop._combined_loader
            batches = _second(trainer.train_dataloader, "min_size" if combined is None else combined._mode, seed)
        else:
            batches = iter(calibration)
    given = 0
    for number in count():
        with isolate_rng():  # around each batch: between two of them the random state is the caller's
            torch.manual_seed(seed + number)
            try:
                batch = next(batches)
            except StopIteration:
                return
            batch = model._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            batch = trainer.strategy.batch_to_device(batch, device=model.device, dataloader_idx=0)
        yield batch
        given += samples_in(batch)
        if given >= samples:
            return


def _second(loaders: Any, mode: Any, seed: int) -> Iterator[Any]:
    """Batches of the training loader, or of several in a list or dict, without a trace on them."""
    leaves, structure = tree_flatten(loaders)
    again = [_again(x, seed) if isinstance(x, DataLoader) else copy(x) for x in leaves]
    if len(again) == 1 and leaves[0] is loaders:
        return iter(again[0])
    return (batch for batch, _, _ in CombinedLoader(tree_unflatten(again, structure), mode))


def _again(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """A loader of the same data and batches, in one process, with an order of its own."""
    shared: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": 0}
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, **shared)
    size = loader.batch_size
    if size is None:
        size = getattr(loader.batch_sampler, "batch_size", None) or 1
    order = RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return DataLoader(loader.dataset, batch_size=size, sampler=order, **shared)


def without_trainer(model: nn.Module, calibration: Any, samples: int) -> Iterator[Any]:
    """Batches of a loader, on the model's device, where there is no Trainer.

    Raises:
        ValueError: if ``calibration`` is no loader.
    """
    if calibration is None or isinstance(calibration, int):
        raise ValueError(f"without a Trainer calibration= must be a loader, or a list of batches, got {calibration!r}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = 0
    for batch in calibration:
        yield tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
        given += samples_in(batch)
        if given >= samples:
            return


def share(batches: Iterator[Any], process: int, processes: int) -> Iterator[Any]:
    """Every n-th batch, n the number of processes: what one of them looks at."""
    return (batch for number, batch in enumerate(batches) if number % processes == process)


@contextmanager
def without_log(model: nn.Module) -> Iterator[None]:
    """``log`` and ``log_dict`` do nothing, and metrics inside the module keep their state."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    metrics = [m for m in model.modules() if isinstance(m, Metric)]
    states = [(m, m._copy_state_dict(), m._update_count, m._computed) for m in metrics]
    shadowed: dict[str, Any] = {name: model.__dict__[name] for name in ("log", "log_dict") if name in model.__dict__}
    model.__dict__["log"] = model.__dict__["log_dict"] = nothing
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del model.__dict__[name]
        model.__dict__.update(shadowed)
        for metric, state, updates, computed in states:
            for key, value in state.items():
                setattr(metric, key, value)
            metric._update_count, metric._computed = updates, computed


def quiet_loss(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Tensor:
    """The training loss of a batch, with a graph for gradients where they are enabled.

    ``training_step`` is called as Lightning calls it: with the index of the batch where it takes one, and with an
    iterator where it takes ``dataloader_iter``.

    Raises:
        RuntimeError: under manual optimization without ``loss_fn``, or where ``training_step`` returns no loss.
    """
    if loss_fn is None and not isinstance(model, pl.LightningModule):
        raise RuntimeError(f"{type(model).__name__} has no training_step; pass loss_fn=lambda model, batch: ...")
    if loss_fn is None and not model.automatic_optimization:
        raise RuntimeError(
            f"{type(model).__name__} optimizes manually, so its training_step cannot be asked for a loss; "
            "pass loss_fn=lambda pl_module, batch: ..."
        )
    out = _quiet_step(model, batch, loss_fn)
    loss = out.get("loss") if isinstance(out, dict) else out
    if not isinstance(loss, Tensor):
        raise RuntimeError(
            f"training_step of {type(model).__name__} returned {type(loss).__name__}, no loss; pass loss_fn="
        )
    return loss


def _quiet_step(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Any:
    grad = torch.is_grad_enabled()
    with isolate_rng(), without_log(model), undisturbed(model), own_precision(model), torch.set_grad_enabled(grad):
        if loss_fn is not None:
            return loss_fn(model, batch)
        assert isinstance(model, pl.LightningModule)
        return model.training_step(*_step_arguments(model, batch))


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """New tensors are of the type that the trainer says; without autocast, which would leave its types in between."""
    attached = getattr(model, "_trainer", None)
    step = nullcontext() if attached is None else attached.precision_plugin.train_step_context()
    device = next((p.device.type for p in model.parameters()), "cpu")
    with step, torch.autocast(device, enabled=False):
        yield


def _step_arguments(model: pl.LightningModule, batch: Any) -> tuple[Any, ...]:
    step = model.training_step
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        return (iter([(batch, 0, 0)]),)
    return (batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)


def example_from_batch(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    loss_fn: Callable[[pl.LightningModule, Any], Tensor] | None,
    seed: int,
) -> Calls:
    """What the outermost modules get when one training batch goes through the module's own loss.

    Raises:
        TraceError: if no module was called with a tensor, or the step cannot be run.
    """
    if loss_fn is None and not model.automatic_optimization:
        raise TraceError(
            f"{type(model).__name__} optimizes manually, so its training_step cannot be run to trace it; set "
            "example_input_array, or pass example_input= or a loss_fn= that calls all that is to be pruned"
        )
    batch = next(iter(second_iterator(trainer, model, None, 1, seed)))
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    depth = 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        relevant = not isinstance(module, Metric) and any(True for _ in module.parameters())
        if depth == 0 and tensors and relevant:
            calls.append((module, args, kwargs))
        depth += 1

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.no_grad():
            _quiet_step(model, batch, loss_fn)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} could not be run on a training batch to trace it: {type(error).__name__}: "
            f"{error}; pass example_input= or set example_input_array"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise TraceError(
            f"no module of {type(model).__name__} with parameters was called with a tensor in its training step; "
            "pass example_input= or set example_input_array"
        )
    unique: dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
    for call in calls:
        unique.setdefault(id(call[0]), call)
    names = {id(m): n or type(m).__name__ for n, m in model.named_modules()}
    rank_zero_info(
        f"{type(model).__name__} has no example_input_array: traced through {', '.join(names[k] for k in unique)} "
        "with what one training batch gives them"
    )
    return Calls(tuple(unique.values()))
