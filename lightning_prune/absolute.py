"""The absolute network: how far a change of a tensor inside a model can change another one, at most.

It is the model with the absolute values of all weights, no biases and no activation functions, averages instead of
maxima, and norms as the absolute values of their scales. All of that is linear, so that what comes back through it does
not depend on the data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from lightning_prune.graph.flow import ACTIVATIONS, Call, Tap
from lightning_prune.graph.trace import run
from lightning_prune.taps import Look, Seen, looks_at, tensor_of, watching

Rule = Callable[..., Any]

# What is as it was, entry by entry: functions that no slope of is above 1 by much, and those that do nothing at all.
_NOTHING = (ACTIVATIONS - {"square", "exp"}) | frozenset([
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "feature_dropout", "prelu", "to", "float", "double", "half", "bfloat16", "type", "type_as",
    "cuda", "cpu", "neg", "__neg__", "__pos__", "local_response_norm",
])  # fmt: skip

# What is linear without negative factors.
_LINEAR = frozenset([
    "clone", "contiguous", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "squeeze_",
    "unsqueeze", "unsqueeze_", "permute", "transpose", "transpose_", "t", "movedim", "moveaxis", "swapaxes",
    "swapdims", "__get__", "__getitem__", "__setitem__", "cat", "concat", "concatenate", "stack", "hstack", "vstack",
    "chunk", "split", "tensor_split", "split_with_sizes", "unbind", "narrow", "select", "index_select", "expand",
    "expand_as", "repeat", "repeat_interleave", "roll", "flip", "rot90", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "mean", "sum", "pad", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "unfold", "fold",
    "add", "add_", "__add__", "__radd__", "__iadd__", "copy_",
])  # fmt: skip


def propagate(
    model: nn.Module,
    example_inputs: Any,
    final: Call,
    response: Tensor | None,
    taps: Mapping[str, Sequence[Tap]],
    decide: Callable[[str, Tensor], Tensor | None] = lambda name, found: None,
) -> dict[str, Tensor]:
    """What changes of maps can do to the input of a layer, the entries of which have an importance.

    Args:
        model: in eval mode; nothing of it changes.
        example_inputs: what it runs on; only the shapes of the first sample count.
        final: call of the layer, which the model is run up to.
        response: (D,) importance of the entries of that layer's input, shared out among its positions; None: 1 each.
        taps: group -> tensors that carry it.
        decide: (group, (C,) what came back to it so far) -> (C,) bool of the channels that it goes on from; None: all.
            Asked at each tensor of a group, those nearest to the layer first.

    Returns:
        group -> (C,) sums over positions and tensors, in float64; groups that nothing comes back to are left out.

    Raises:
        ValueError: if the model calls a function of which it is not known how changes go through it.
    """
    found: dict[str, Tensor] = {}
    ends: list[Tensor] = []

    def look(name: str, tap: Tap, seen: Seen) -> None:
        tensor = tensor_of(tap, seen.out)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: came_back(name, tap, gradient, seen.batch))  # type: ignore[no-untyped-call]

    def came_back(name: str, tap: Tap, gradient: Tensor, batch: int) -> Tensor | None:
        values = tap.maps(gradient, batch).sum(dim=(0, 2))
        found[name] = found[name] + values if name in found else values
        mask = decide(name, found[name])
        return None if mask is None else gradient * _spread(mask, tap, gradient)

    def stop(seen: Seen) -> None:
        ends.append(seen.args[0] if seen.args else seen.kwargs["input"])
        raise _Reached

    absolute = _Absolute(model)
    looks: dict[Call, Sequence[Look]] = {**looks_at(taps, look), final: [stop]}
    # in one thread, so that blocks that are computed anew for the backward pass are absolute too
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False), absolute, watching(model, looks):
        with suppress(_Reached):
            run(model, example_inputs, 1)
        if ends and ends[0].requires_grad:
            edges = [torch.autograd.graph.get_gradient_edge(begin) for begin in absolute.begins]  # keep the mode on
            end = torch.autograd.graph.get_gradient_edge(ends[0])
            torch.autograd.backward(end, _shared(response, final, ends[0]), inputs=edges)
    return found


class _Reached(Exception):
    """The model has run up to the layer."""


def responses(call: Call, entered: Tensor) -> Tensor:
    """(B, D): what a layer got, mean over positions."""
    rows = entered.movedim(-1 if call.name == "linear" else 1, 1) if entered.ndim > 1 else entered[None]
    return torch.flatten(rows, 2).mean(dim=2) if rows.ndim > 2 else rows


def _shared(response: Tensor | None, call: Call, entered: Tensor) -> Tensor:
    """Importance at each position of what a layer got."""
    dim = entered.ndim - 1 if call.name == "linear" else 1
    count = entered.shape[dim]
    values = torch.ones(count, dtype=entered.dtype, device=entered.device) if response is None else response
    shape = [count if d == dim else 1 for d in range(entered.ndim)]
    return (values.to(entered) * count / entered.numel()).reshape(shape).expand_as(entered)


def _spread(mask: Tensor, tap: Tap, like: Tensor) -> Tensor:
    """A mask of channels, on the axis of a tensor that carries them."""
    indices = tap.indices.to(like.device)
    factor = torch.ones(like.shape[tap.dim], dtype=like.dtype, device=like.device)
    factor[indices.reshape(-1)] = mask.to(factor)[:, None].expand(indices.shape).reshape(-1)
    return factor.reshape([-1 if d == tap.dim else 1 for d in range(like.ndim)])


class _Absolute(TorchFunctionMode):
    """Runs a model as its absolute network, in float64.

    The first layers that run are where it begins: their outputs, not the model's inputs, are what `begins` holds. Their
    values are 0, and so are all others but for constants, as nothing depends on them.

    Args:
        model: for the names of its modules, in errors.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.begins: list[Tensor] = []
        self._paths = {module: name for name, module in model.named_modules()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":  # what torch.no_grad and torch.enable_grad do
            return func(*args, **kwargs)
        flows = any(_flows(x) for x in tree_flatten((args, kwargs))[0])
        if flows and name in _LAYERS and not torch.is_grad_enabled():
            raise ValueError(
                f"changes do not go through '{name}'{self._where()} without gradients; take it out of torch.no_grad "
                "and torch.utils.checkpoint with use_reentrant=False"
            )
        if not flows or not torch.is_grad_enabled():
            with torch.no_grad():
                out = func(*args, **kwargs)
            return self._begin(out) if name in _LAYERS or name == "embedding" else out
        rule = _RULES.get(name)
        if rule is not None:
            return rule(func, *args, **kwargs)
        out = func(*args, **kwargs)
        if any(_flows(x) for x in tree_flatten(out)[0]):
            raise ValueError(
                f"it is not known how changes go through '{name}'{self._where()}; rank a layer in front of it "
                "(final_layer=), or take another method"
            )
        return out

    def _begin(self, out: Tensor) -> Tensor:
        self.begins.append(torch.zeros(out.shape, dtype=torch.float64, device=out.device, requires_grad=True))
        return self.begins[-1].clone()

    def _where(self) -> str:
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self._paths:
                return f", which {self._paths[module] or 'the model'} calls"
            frame = frame.f_back  # type: ignore[assignment]
        return ""


def _flows(value: Any) -> bool:
    """Whether something is a tensor that depends on what the first layers made."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def _size(value: Any) -> Any:
    """The absolute value of a constant, without a graph."""
    return value.detach().double().abs() if isinstance(value, Tensor) else abs(value)


def _layer(func: Any, input: Tensor, weight: Tensor, bias: Any = None, *rest: Any, **options: Any) -> Tensor:
    if _flows(weight):
        raise ValueError(f"it is not known how changes go through the weight of '{func.__name__}'")
    out: Tensor = func(input, _size(weight), None, *rest, **options)
    return out


def _product(func: Any, *factors: Any, **options: Any) -> Any:
    """A matrix product with constants."""
    if sum(_flows(x) for x in factors) > 1:
        raise ValueError(f"it is not known how changes go through '{func.__name__}' of two maps")
    return func(*(x if _flows(x) or isinstance(x, str) else _size(x) for x in factors), **options)


def _nothing(func: Any, input: Tensor, *rest: Any, **options: Any) -> Tensor:
    return input if _in_place(func) or options.get("inplace") else input.clone()


def _as_it_is(func: Any, *args: Any, **options: Any) -> Any:
    return func(*args, **{key: abs(value) if key == "alpha" else value for key, value in options.items()})


def _sum(func: Any, input: Any, other: Any, **options: Any) -> Tensor:
    """A difference can be as large as a sum; of a product of maps each is taken for a gate of the other, 1 at most."""
    return input.add_(other) if _in_place(func) else torch.add(input, other)


def _in_place(func: Any) -> bool:
    return func.__name__.endswith("_") and not func.__name__.endswith("__")


def _times(func: Any, input: Any, other: Any, **options: Any) -> Tensor:
    if _flows(input) and _flows(other):
        return _sum(func, input, other)
    if _flows(other):
        input, other = other, input
    return input.mul_(_size(other)) if _in_place(func) else input * _size(other)  # type: ignore[no-any-return]


def _divided(func: Any, input: Any, other: Any, **options: Any) -> Tensor:
    if _flows(other):
        raise ValueError(f"it is not known how changes go through '{func.__name__}' by a map")
    return input.div_(_size(other)) if _in_place(func) else input / _size(other)  # type: ignore[no-any-return]


def _batch_norm(
    func: Any, input: Tensor, running_mean: Any, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if running_var is not None:
        input = input / _column(running_var.double() + eps, input).sqrt()
    return input.clone() if weight is None else input * _column(_size(weight), input)


def _instance_norm(
    func: Any, input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, *_: Any, **__: Any
) -> Tensor:
    return input.clone() if weight is None else input * _column(_size(weight), input)


def _group_norm(func: Any, input: Tensor, num_groups: int, weight: Any = None, *_: Any, **__: Any) -> Tensor:
    return input.clone() if weight is None else input * _column(_size(weight), input)


def _layer_norm(func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any) -> Tensor:
    return input.clone() if weight is None else input * _size(weight)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


def _average(of: Callable[..., Tensor]) -> Rule:
    """Changes of a window's maximum, shared out evenly: at which place it is depends on the data."""

    def rule(
        func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Tensor:  # fmt: skip
        if return_indices or {*(dilation if isinstance(dilation, (tuple, list)) else (dilation,))} != {1}:
            raise ValueError(f"it is not known how changes go through '{func.__name__}' with indices or dilation")
        return of(input, kernel_size, kernel_size if stride is None else stride, padding, ceil_mode)

    return rule


def _adaptive_average(of: Callable[..., Tensor]) -> Rule:
    return lambda func, input, output_size, *_, **__: of(input, output_size)


def _mean(func: Any, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return input.mean(dim, keepdim) if dim != () else input.mean()


def _interpolated(func: Any, input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
                  *rest: Any, **options: Any) -> Tensor:  # fmt: skip
    if mode == "bicubic":
        raise ValueError(
            f"'{func.__name__}' with mode='bicubic' has negative factors; take 'bilinear', or leave it out"
        )
    return func(input, size, scale_factor, mode, *rest, **options)  # type: ignore[no-any-return]


def _glu(func: Any, input: Tensor, dim: int = -1) -> Tensor:
    first, second = input.chunk(2, dim)
    return first + second


_LAYERS = frozenset(["linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))])

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_NOTHING, _nothing),
    **dict.fromkeys(_LINEAR, _as_it_is),
    **dict.fromkeys(_LAYERS, _layer),
    **dict.fromkeys(["matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum"], _product),
    **dict.fromkeys(["sub", "sub_", "__sub__", "__rsub__", "__isub__", "subtract"], _sum),
    **dict.fromkeys(["mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"], _times),
    **dict.fromkeys(["div", "div_", "__truediv__", "__itruediv__", "divide", "true_divide"], _divided),
    **{f"max_pool{n}d": _average(of) for n, of in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), start=1)},
    "adaptive_max_pool1d": _adaptive_average(F.adaptive_avg_pool1d),
    "adaptive_max_pool2d": _adaptive_average(F.adaptive_avg_pool2d),
    "adaptive_max_pool3d": _adaptive_average(F.adaptive_avg_pool3d),
    "amax": _mean,
    "interpolate": _interpolated,
    "upsample": _interpolated,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "glu": _glu,
}
