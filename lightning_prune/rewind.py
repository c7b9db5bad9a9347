"""Copies of a whole training state, and the way back to it within a fit."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def take_snapshot(trainer: pl.Trainer, model: nn.Module) -> dict[str, Any]:
    """Copy parameters and buffers, optimizers, schedulers and random states.

    Returns:
        Names, numbers, lists and CPU tensors only, so that it can be part of a checkpoint.
    """
    return {
        "model": {name: _copied(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)},
        "optimizers": [tree_map(_copied, optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "random": _random_states(model),
    }


@torch.no_grad()
def put_back(trainer: pl.Trainer, model: nn.Module, snapshot: Mapping[str, Any], random_state: bool = False) -> None:
    """Give a training state the values of a snapshot, in place.

    Args:
        trainer: of the fit that the snapshot is of.
        model: its module; parameters keep their identity.
        snapshot: made by `take_snapshot`; it stays as it is and can be used again.
        random_state: also draw the same numbers again from here.

    Raises:
        RuntimeError: if the model has other tensors or shapes by now, or there are other optimizers or schedulers;
            nothing has changed then.
    """
    now = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    other = [n for n, t in snapshot["model"].items() if n not in now or now[n].shape != t.shape]
    if other or now.keys() != snapshot["model"].keys():
        names = other or sorted(now.keys() ^ snapshot["model"].keys())
        raise RuntimeError(f"cannot rewind: {names[0]!r} is not of the shape it had when the snapshot was taken")
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for what, held, saved in (
        ("optimizers", trainer.optimizers, "optimizers"),
        ("schedulers", schedulers, "schedulers"),
    ):
        if len(held) != len(snapshot[saved]):
            raise RuntimeError(f"cannot rewind: there are {len(held)} {what}, the snapshot has {len(snapshot[saved])}")
    for name, value in now.items():
        value.copy_(snapshot["model"][name])
    for optimizer, state in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
        optimizer.load_state_dict(tree_map(_copied, state))  # it would go on in the snapshot's own tensors
    for scheduler, state in zip(schedulers, snapshot["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(state))
    if random_state:
        _set_random_states(model, snapshot["random"])


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


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
