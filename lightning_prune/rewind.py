"""Copies of a whole training state, the way back to it within a fit, and schedulers that run again from there."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler
from torch.utils._pytree import tree_map

from lightning_prune.state import Fields

SNAPSHOT: Fields = {
    "model": dict[str, Tensor],
    "averages": list[dict[str, Tensor]],
    "optimizers?": list[tuple[str, dict[str, Any]]],
    "schedulers?": list[tuple[str, dict[str, Any]]],
    "random?": dict[str, Any],
}
"""What `take_snapshot` returns, or a part of it."""


def take_snapshot(trainer: pl.Trainer, model: nn.Module) -> dict[str, Any]:
    """Copy what a checkpoint would hold of a model, and of averages of it, optimizers, schedulers and random states.

    Returns:
        Names, numbers, lists and CPU tensors only, so that it can be part of a checkpoint.
    """
    return {
        "model": _tensors(model),
        "averages": [_tensors(average) for average in _averages(trainer, model)],
        "optimizers": [[_class(each), tree_map(_copied, each.state_dict())] for each in trainer.optimizers],
        "schedulers": [[_class(each), copy.deepcopy(each.state_dict())] for each in _schedulers(trainer)],
        "random": _random_states(model),
    }


@torch.no_grad()
def put_back(trainer: pl.Trainer, model: nn.Module, snapshot: Mapping[str, Any], random_state: bool = False) -> None:
    """Give a training state the values of a snapshot, in place. What the snapshot has no entry for stays as it is.

    Args:
        trainer: of the fit that the snapshot is of.
        model: its module; parameters keep their identity.
        snapshot: made by `take_snapshot`, whole or in part; it stays as it is and can be used again.
        random_state: also draw the same numbers again from here.

    Raises:
        RuntimeError: if the model has other tensors or shapes by now, or there are other optimizers, schedulers or
            averages; nothing has changed then.
    """
    tensors = {"model": [model], "averages": _averages(trainer, model)}
    saved = {what: [snapshot[what]] if what == "model" else snapshot[what] for what in tensors if what in snapshot}
    stepped = {"optimizers": list(trainer.optimizers), "schedulers": _schedulers(trainer)}
    stepped = {what: held for what, held in stepped.items() if what in snapshot}
    for what, each in saved.items():
        _refuse_other_tensors(what, tensors[what], each)
    for what, held in stepped.items():
        _refuse_others(what, held, snapshot[what])
    for what, each in saved.items():
        for module, values in zip(tensors[what], each, strict=True):
            for name, value in _held(module).items():
                value.copy_(values[name])
    for what, held in stepped.items():
        for one, (_, state) in zip(held, snapshot[what], strict=True):
            one.load_state_dict(copy.deepcopy(state))  # it would go on in the snapshot's own tensors
    if random_state:
        _set_random_states(model, snapshot["random"])


def positions(trainer: pl.Trainer) -> list[list[Any]]:
    """How far each scheduler is: [its class, how many times it was stepped].

    The number is -1 for schedulers that Lightning does not step by count: those that wait for a metric, that the
    user's own loop steps, or that do not tell.
    """
    return [[_class(config.scheduler), _position(trainer, config)] for config in trainer.lr_scheduler_configs]


def run_schedulers(trainer: pl.Trainer, start: Sequence[Sequence[Any]], way: float, total_steps: int) -> None:
    """Step schedulers until they are so much of the way from where they were to the end of the fit.

    Args:
        trainer: of the fit.
        start: `positions` where the way begins; a scheduler that was not there then is left alone.
        way: in [0, 1].
        total_steps: optimizer steps of the whole fit.
    """
    batches = trainer.num_training_batches
    per_epoch = None if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
    for config, (name, begin) in zip(trainer.lr_scheduler_configs, start, strict=False):
        now = _position(trainer, config)
        if now < 0 or begin < 0 or name != _class(config.scheduler):
            continue
        if config.interval == "epoch" and per_epoch is None:
            continue
        units = total_steps if config.interval == "step" else math.ceil(total_steps / (per_epoch or 1))
        end = units // config.frequency
        target = begin + math.floor((end - begin) * way + 1e-9)
        for _ in range(target - now):
            trainer.lightning_module.lr_scheduler_step(config.scheduler, None)


def _position(trainer: pl.Trainer, config: LRSchedulerConfig) -> int:
    if config.reduce_on_plateau or not trainer.lightning_module.automatic_optimization:
        return -1
    scheduler: Any = config.scheduler
    if isinstance(scheduler, ChainedScheduler):  # keeps no count of its own
        scheduler = scheduler._schedulers[0]
    position = getattr(scheduler, "last_epoch", None)
    return position if type(position) is int else -1


def _schedulers(trainer: pl.Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _averages(trainer: pl.Trainer, model: nn.Module) -> list[nn.Module]:
    """Modules of other callbacks that hold a copy of the model, with what they count."""
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]  # type: ignore[attr-defined]
    modules = [value for value in held if isinstance(value, nn.Module) and value is not model]
    return [value for value in modules if type(getattr(value, "module", value)) is type(model)]


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: _copied(value) for name, value in _held(module).items()}


def _class(value: Any) -> str:
    return type(value).__name__


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _refuse_other_tensors(what: str, modules: Sequence[nn.Module], saved: Sequence[Mapping[str, Tensor]]) -> None:
    if len(modules) != len(saved):
        raise RuntimeError(f"cannot rewind: there are {len(modules)} {what}, the snapshot has {len(saved)}")
    for module, tensors in zip(modules, saved, strict=True):
        now = {name: tuple(value.shape) for name, value in _held(module).items()}
        then = {name: tuple(value.shape) for name, value in tensors.items()}
        for name in [name for name in {**then, **now} if now.get(name) != then.get(name)]:
            raise RuntimeError(
                f"cannot rewind: {name!r} has shape {now.get(name)}, when the snapshot was taken it had "
                f"{then.get(name)}; nothing may cut, add or remove weights in between"
            )


def _refuse_others(what: str, held: Sequence[Any], saved: Sequence[Any]) -> None:
    """Refuse what would load without a word and be wrong: another class's state, or other param groups."""
    now, then = [_class(each) for each in held], [name for name, _ in saved]
    if now != then:
        raise RuntimeError(f"cannot rewind: the {what} are {now}, when the snapshot was taken they were {then}")
    if what == "optimizers":
        for each, (name, state) in zip(held, saved, strict=True):
            sizes = [len(group["params"]) for group in each.param_groups]
            before = [len(group["params"]) for group in state["param_groups"]]
            if sizes != before:
                raise RuntimeError(
                    f"cannot rewind: {name} has param groups of {sizes} parameters, when the snapshot was taken they "
                    f"had {before}; unfreeze or add groups before that"
                )


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _random_states(model: nn.Module) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    device = _device(model)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def _set_random_states(model: nn.Module, states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and _device(model).type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], _device(model))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
