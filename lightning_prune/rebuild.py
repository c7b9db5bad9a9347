"""Load an exported state dict into a model of the class it came from. Needs torch alone; may be copied anywhere.

    model = load(MyNet(), "exported")  # made with the arguments that it was trained with

The state dict holds tensors of a pruned model, which are smaller than those that its class makes, and may hold two
layers for one, or none for a norm that was folded. The JSON beside it says how each layer of the class has to change.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_M = TypeVar("_M", bound=nn.Module)


def load(model: _M, folder: str | Path, name: str = "model") -> _M:
    """Give a model the shapes and values that were exported, in place.

    Args:
        model: of the class that was exported, made with the same arguments.
        folder: where the export was written.
        name: of its files.

    Returns:
        The same model, on the CPU, in eval mode.

    Raises:
        RuntimeError: if the state cannot be had as this class, or is not of it.
    """
    recipe = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    state = torch.load(Path(folder) / f"{name}.pt", map_location="cpu", weights_only=True)
    return _filled(model, recipe["rebuild"], state)


def fold_parametrizations(model: nn.Module) -> None:
    """Make every parametrized tensor a plain one of the value that it has, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            made = type(module)  # shared with copies of the module, and taken apart below
            module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
            for key in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, key)


def _filled(model: _M, recipe: Mapping[str, Any], state: Mapping[str, Tensor]) -> _M:
    if recipe["rewritten"]:
        raise RuntimeError(
            f"{', '.join(recipe['rewritten'][:3])} lost whole heads, which the forward of its class cannot run; "
            "use the torch.export program or the ONNX file"
        )
    model = model.cpu()
    fold_parametrizations(model)
    try:
        for path in recipe["pairs"]:
            if not isinstance(layer := model.get_submodule(path), nn.Sequential):  # the class has no two layers itself
                _put(model, path, _pair(layer))
        for path in recipe["folded"]:
            _put(model, path, nn.Identity())
        for path, values in recipe["attributes"].items():
            for key, value in values.items():
                setattr(model.get_submodule(path), key, tuple(value) if isinstance(value, list) else value)
        for path, tensor in state.items():
            _make_room(model, path, tensor)
    except AttributeError as error:
        raise RuntimeError(f"what was exported is not of a {type(model).__name__}: {error}") from error
    model.load_state_dict(state)
    return model.eval()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, key = path.rpartition(".")
    model.get_submodule(path)  # raises if nothing stands there
    model.get_submodule(parent)._modules[key] = module


def _pair(layer: Any) -> nn.Sequential:
    """Two layers for one: the first has its kernel, stride and padding, the second its bias; sizes come later."""
    first, bias = copy.deepcopy(layer), layer.bias is not None
    first.bias = None
    second = nn.Linear(1, 1, bias) if isinstance(layer, nn.Linear) else type(layer)(1, 1, 1, bias=bias)
    return nn.Sequential(first, second)


def _make_room(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Have a tensor of that shape and dtype at a place."""
    parent, _, key = path.rpartition(".")
    module = model.get_submodule(parent)
    held = module._parameters if key in module._parameters else module._buffers
    if key not in held:
        raise AttributeError(f"{type(module).__name__} {parent!r} has no {key!r}")
    standing = held[key]
    if standing is None or standing.shape != tensor.shape or standing.dtype != tensor.dtype:
        made = torch.empty_like(tensor)
        held[key] = nn.Parameter(made, requires_grad=False) if held is module._parameters else made  # type: ignore[assignment]
