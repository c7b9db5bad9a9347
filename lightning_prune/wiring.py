"""How a model uses its layers: which norm alone reads one, whose weight is read past it, which ones make the outputs.

Told from one forward in eval mode, by the tensors that functions get and return, never by the order of modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.graph.trace import output_tensors, run, undisturbed

_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@dataclass(frozen=True)
class NormBehind:
    """A norm with running statistics that alone reads what a layer makes.

    Attributes:
        weight: qualified name of its scale; None without one.
        variance: qualified name of its running variance.
        eps: what it adds to the variance.
    """

    weight: str | None
    variance: str
    eps: float


@dataclass(frozen=True)
class Wiring:
    """How some layers of a model are used.

    Attributes:
        norms: layer -> the norm behind it, if that and nothing else reads what the layer makes.
        bypassed: layers whose weight something reads that does not call them.
        last: layers that make an output of the model with no other of the layers in between, each alone.
    """

    norms: Mapping[str, NormBehind]
    bypassed: frozenset[str]
    last: frozenset[str]


def wiring(model: nn.Module, example_inputs: Any, layers: Mapping[str, nn.Module]) -> Wiring:
    """Run a model once in eval mode and see how layers with a ``weight`` are used; the model is left as it was.

    Args:
        model: any module that runs on the example inputs.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        layers: qualified name -> module of the model.
    """
    watch = _Watch(layers)
    with undisturbed(model):
        model.eval()
        with watch.calls(), watch:
            out = run(model, example_inputs, 1)
        return watch.found(model, output_tensors(out))


class _Watch(TorchFunctionMode):
    """Sees every function that is called with tensors, and notes what it does with what layers made."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._layers = layers
        self._weights = {id(layer.weight): name for name, layer in layers.items()}
        self._inside: list[str] = []
        self._made: Any = WeakIdKeyDictionary()  # tensor -> the layer that made it
        self._behind: Any = WeakIdKeyDictionary()  # tensor -> layers with no other one after them
        self._norms: dict[str, list[Mapping[str, Any] | None]] = {}  # layer -> its readers, None for other than a norm
        self._bypassed: set[str] = set()

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Know which layer runs."""

        def enter(name: str) -> Any:
            return lambda module, args: self._inside.append(name)

        def leave(name: str) -> Any:
            return lambda module, args, out: self._leave(name, out)

        handles: list[Any] = []
        try:
            for name, layer in self._layers.items():
                handles.append(layer.register_forward_pre_hook(enter(name)))
                handles.append(layer.register_forward_hook(leave(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, name: str, out: Any) -> None:
        self._inside.pop()
        if isinstance(out, Tensor):
            self._made[out] = name
            self._behind[out] = frozenset([name])

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        results = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
        if not results:  # a size, a type, a device
            return out
        given = [value for value in tree_flatten((args, kwargs or {}))[0] if isinstance(value, Tensor)]
        for value in given:
            layer = self._weights.get(id(value))
            if layer is not None and self._inside[-1:] != [layer]:
                self._bypassed.add(layer)
            if value in self._made:
                self._read(self._made[value], value, function, args, kwargs or {})
        behind = frozenset[str]().union(*(self._behind.get(value, frozenset()) for value in given))
        for value in results:
            self._behind[value] = behind
        return out

    def _read(self, layer: str, made: Tensor, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note who reads what a layer made."""
        norm: Mapping[str, Any] | None = None
        if function is F.batch_norm and (made.ndim == 2 or hasattr(self._layers[layer], "out_channels")):
            given = {**dict(zip(_NORM_ARGUMENTS, args, strict=False)), **kwargs}
            norm = None if given.get("training") else given  # what is normed with its own statistics has no gain
        self._norms.setdefault(layer, []).append(norm)

    def found(self, model: nn.Module, outputs: list[Tensor]) -> Wiring:
        names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        shown = {self._made[value] for value in outputs if value in self._made}
        norms = {}
        for layer, readers in self._norms.items():
            first = readers[0]
            if first is None or layer in shown or any(_tensors(reader) != _tensors(first) for reader in readers):
                continue
            variance, scale = names.get(id(first["running_var"])), first.get("weight")
            if variance is not None and (scale is None or id(scale) in names):
                norms[layer] = NormBehind(
                    None if scale is None else names[id(scale)], variance, float(first.get("eps", 1e-5))
                )
        behind = [self._behind.get(value, frozenset()) for value in outputs]
        last = frozenset(next(iter(some)) for some in behind if len(some) == 1)
        return Wiring(norms, frozenset(self._bypassed), last)


def _tensors(norm: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Which norm it is."""
    return None if norm is None else (id(norm["running_var"]), id(norm.get("weight")))
