"""How each operator carries channels: one function a family, one row an operator in `RULES`.

A rule gets the tracer, the operator's name, what it returned and what it was called with. Names are those of ATen; an
operator in place shares the row of its functional form, and every operator that torch itself tags as pointwise shares
one rule. What has no row freezes whatever it touches, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.labels import (
    Chooser,
    Dim,
    Ids,
    Unsplittable,
    full,
    ids_of,
    innermost,
    is_tracked,
    merge,
    reshape,
    size_of,
    tracked,
    untracked,
)
from lightning_prune.graph.sizes import Attribute, Read, leaves
from lightning_prune.graph.trace import Equation, LayerRecord, Tracer

Rule = Callable[..., None]
RULES: dict[str, Rule] = {}
FUNCTIONS: dict[str, Rule] = {}  # functions of torch that are followed as a whole, whatever operators they run

# Functions of torch itself that derive every size they use from the tensors they get.
_SIZES_FROM_TENSORS = frozenset(
    [
        "flatten",
        "linear",
        "matmul",
        "__matmul__",
        "bmm",
        "batch_norm",
        "layer_norm",
        "group_norm",
        "instance_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "chunk",
        "permute",
        "transpose",
        "pixel_shuffle",
        "dropout",
        "einsum",
        "max_pool1d",
        "avg_pool1d",
        "interpolate",
    ]
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def _outputs(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else _tensors(out)


def _tensors(*values: Any) -> list[Tensor]:
    """All tensors in arguments, in order, out of lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


@rule("unknown")
def _unknown(t: Tracer, name: str, out: Any, *args: Any, **kwargs: Any) -> None:
    for tensor in _tensors(args, kwargs):
        info = t.info(tensor)
        if any(is_tracked(d) for d in info.dims):
            t.freeze(info.dims, f"operator '{name}' has no rule")


def broadcast(t: Tracer, name: str, tensors: Sequence[Tensor], ndim: int) -> list[Dim]:
    """Align tensors at their last dimension and join their labels."""
    dims: list[Dim] = [()] * ndim
    for tensor in tensors:
        info = t.info(tensor)
        for i, dim in enumerate(reversed(info.dims)):
            at = ndim - 1 - i
            if tensor.shape[-1 - i] == 1:
                continue
            dims[at] = t.same(dims[at], dim, f"'{name}'") if dims[at] else dim
    return dims


@rule(
    "pointwise", "where", "masked_fill", "lerp", "addcmul", "addcdiv", "native_dropout", "rsub", "dropout",
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "prelu", "_prelu_kernel", "celu", "mish", "log_sigmoid_forward",
    "threshold", "rrelu_with_noise", "feature_dropout", "alpha_dropout", "selu", "softplus", "elu",
    "leaky_relu", "ldexp",
)  # fmt: skip
def _pointwise(t: Tracer, name: str, out: Any, *args: Any, **kwargs: Any) -> None:
    outs = _outputs(out)
    if not outs:
        return
    tensors = _tensors(args, kwargs)
    dims = broadcast(t, name, tensors, outs[0].ndim)
    dims = [d if d else untracked(n) for d, n in zip(dims, outs[0].shape, strict=True)]
    for tensor in outs:
        t.set(tensor, dims)


@rule("_to_copy", "detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy", "clone", "_conj")
def _identity(t: Tracer, name: str, out: Tensor, self: Tensor, *args: Any, **kwargs: Any) -> None:
    info = t.info(self)
    t.set(out, info.dims, info.source, info.param)


@rule(
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "uniform", "normal",
    "zero", "fill", "random", "exponential",
)  # fmt: skip
def _like(t: Tracer, name: str, out: Any, self: Tensor, *args: Any, **kwargs: Any) -> None:
    for tensor in _outputs(out):
        t.set(tensor, t.info(self).dims)


@rule(
    "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "scalar_tensor", "linspace", "eye",
    "empty_strided", "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "empty_permuted",
    "_local_scalar_dense", "sym_size", "is_same_size", "randperm", "equal", "tril_indices", "triu_indices",
    "_efficientzerotensor",
    "_assert_async", "_assert_tensor_metadata", "lift",
)  # fmt: skip
def _no_labels(t: Tracer, name: str, out: Any, *args: Any, **kwargs: Any) -> None:
    """Sizes and values that are not a parameter's: they carry no labels, and freeze what they meet.

    Unless they were made with a size that the model's code read from a tensor, or from an attribute.
    """
    if isinstance(out, Tensor):
        sizes = t.call.sizes(out.ndim)
        if sizes is not None and any(t.form(n) is not None for n in sizes):
            t.set(out, [t.made(n) if t.form(n) is not None else untracked(int(n)) for n in sizes])


@rule("copy")
def _copy(t: Tracer, name: str, out: Tensor, self: Tensor, src: Tensor, *args: Any, **kwargs: Any) -> None:
    info = t.info(self)
    dims = broadcast(t, name, [src], self.ndim)
    if any(is_tracked(d) for d in info.dims) or self._is_view():
        dims = [t.same(a, b, "writing into a tensor") if b else a for a, b in zip(info.dims, dims, strict=True)]
    t.set(out, [d if d else untracked(n) for d, n in zip(dims, out.shape, strict=True)])


def _only(dim: Dim) -> Ids | None:
    """The label array of a dimension that is one tracked factor."""
    return dim[0][1] if len(dim) == 1 else None


_NONE: Ids = np.empty(0, dtype=np.int64)  # what a layer with a single output makes: it is a reader all the same


@rule("convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution")
def _convolution(
    t: Tracer,
    name: str,
    out: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> None:
    xi, wi = t.info(x), t.info(w)
    t.freeze(wi.dims[2:], "it runs over the kernel's area")
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    per_out, per_in = wi.dims[out_axis], wi.dims[in_axis]
    read = xi.dims[1]
    made: Dim
    whole = True
    depthwise = False
    if groups == 1:
        t.same(read, per_in, "a convolution") if size_of(read) > 1 else t.freeze([per_in], "it reads one channel")
        made = per_out
    else:
        made, whole, depthwise = _grouped(t, x, w, read, per_out, per_in, transposed, groups)
    spatial = x.shape[2:] if transposed else out.shape[2:]
    constant = int(np.prod(w.shape[2:], dtype=np.int64) * np.prod(spatial, dtype=np.int64)) * out.shape[0]
    weight = t.origin(wi, per_out)
    if not any(isinstance(a, str) for a in (*t.call.args, *t.call.kwargs.values())):  # padding="same" is not counted
        t.flops("conv", constant, [wi.dims[0], wi.dims[1]], weight)
    source = None
    ids = _only(made) if made else _NONE
    if ids is not None:
        if bias is not None:
            t.same(made, t.info(bias).dims[0], "a convolution's bias")
        source = t.layer(LayerRecord("conv", t.module, ids, read, weight, _param(t, bias), groups, whole, depthwise))
    elif bias is not None:
        t.freeze(t.info(bias).dims, "its convolution is frozen")
    batch = xi.dims[0] if len(xi.dims) == out.ndim else ()
    t.set(out, [batch, made if made else untracked(out.shape[1]), *map(untracked, out.shape[2:])], source)


def _grouped(
    t: Tracer, x: Tensor, w: Tensor, read: Dim, per_out: Dim, per_in: Dim, transposed: bool, groups: int
) -> tuple[Dim, bool, bool]:
    """Whole groups go, or the same index of every group, whichever leaves more to choose from."""
    ins = full(read)
    rows = (full(per_in), full(per_out)) if transposed else (full(per_out), full(per_in))
    outer, inner = rows  # outer: weight dimension 0, which holds all groups; inner: one group's worth
    if ins is None or outer is None or inner is None:
        t.freeze([read, per_out, per_in], "a grouped convolution reads dimensions flattened into one")
        return (), True, False
    if transposed:
        made_per_group, into = inner, outer
        t.same(read, per_in, "a grouped convolution")
        makes = np.tile(made_per_group, groups)
    else:
        makes, into = outer, ins
    in_rows, out_rows = into.reshape(groups, -1), makes.reshape(groups, -1)
    whole = groups >= max(in_rows.shape[1], out_rows.shape[1])
    if getattr(t.modules.get(t.module), "groups", None) != groups:  # a layer of torch follows by itself
        said = t.call.args[6] if len(t.call.args) > 6 else t.call.kwargs.get("groups", groups)
        t.claim(tracked(in_rows[:, 0].copy()) if whole else untracked(groups), said)
    if whole:
        if in_rows.shape[1] > 1:
            t.couple(in_rows.T.ravel(), in_rows.shape[1])
        if not transposed:
            if out_rows.shape[1] > 1:
                t.couple(out_rows.T.ravel(), out_rows.shape[1])
            t.same(tracked(in_rows[:, 0].copy()), tracked(out_rows[:, 0].copy()), "a grouped convolution")
            t.freeze([per_in], "whole groups of its convolution go, so their width stays")
        else:
            t.freeze([per_out], "whole groups of its convolution go, so their width stays")
            makes = np.repeat(in_rows[:, 0], out_rows.shape[1])
    else:
        t.couple(into, groups)
        if not transposed:
            t.couple(makes, groups)
            t.same(tracked(in_rows[0].copy()), per_in, "a grouped convolution")
    return tracked(makes), whole, in_rows.shape[1] == 1


def _param(t: Tracer, tensor: Tensor | None) -> str | None:
    return None if tensor is None else t.info(tensor).param


@rule("addmm", "mm", "mv", "addmv", "linear", "mkldnn_linear", "_addmm_activation")
def _linear(t: Tracer, name: str, out: Tensor, *args: Any, **kwargs: Any) -> None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    bias: Tensor | None = None
    if name in ("addmm", "addmv", "_addmm_activation"):
        bias, x, w = tensors[:3]
    else:
        x, w = tensors[:2]
        bias = tensors[2] if len(tensors) > 2 else None
    xi, wi = t.info(x), t.info(w)
    reads, makes = (wi.dims[1], wi.dims[0]) if "linear" in name else (wi.dims[0], wi.dims[-1] if w.ndim > 1 else ())
    _contract(t, xi.dims[-1], reads)
    lead = xi.dims[:-1]
    if wi.param is None and xi.param is not None:  # weight @ activation
        t.suspect([xi.dims[0]])
    weight = t.origin(wi, makes)
    t.flops(_product(t, "linear"), 1, [*_numel(t, x), makes or untracked(_width(w, name))], weight)
    source = None
    ids = _only(makes) if makes else _NONE
    if ids is not None and weight is not None:
        source = t.layer(LayerRecord("linear", t.module, ids, xi.dims[-1], weight, _param(t, bias)))
    dims = [*lead, makes][: out.ndim]
    if bias is not None:
        dims = [t.same(a, b, "a linear layer's bias") if b and a else a for a, b in zip(
            dims, broadcast(t, name, [bias], out.ndim), strict=True)]  # fmt: skip
    t.set(out, [d if d else untracked(n) for d, n in zip(dims, out.shape, strict=True)], source)


def _product(t: Tracer, otherwise: str) -> str:
    """Name of a matrix product, as fvcore says it: that of the function the model called."""
    name = t.call.name.strip("_").removeprefix("r")  # x @ w is __matmul__, or __rmatmul__
    return name if name in ("matmul", "mm", "bmm", "addmm", "einsum") else otherwise


def _width(w: Tensor, name: str) -> int:
    return w.shape[0] if "linear" in name else (w.shape[1] if w.ndim > 1 else 1)


def _contract(t: Tracer, left: Dim, right: Dim) -> None:
    """Summed over together: the same channels."""
    if left and right:
        t.same(left, right, "a matrix product")
    else:
        t.freeze([left, right], "it is read together with a single value")


@rule("bmm", "baddbmm", "matmul")
def _bmm(t: Tracer, name: str, out: Tensor, *args: Any, **kwargs: Any) -> None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    a, b = tensors[1:3] if name == "baddbmm" else tensors[:2]
    ai, bi = t.info(a), t.info(b)
    _contract(t, ai.dims[-1], bi.dims[-2] if b.ndim > 1 else bi.dims[0])
    t.suspect([ai.dims[-1]])
    if b.ndim < 2 or a.ndim != b.ndim:
        t.freeze([*ai.dims, *bi.dims], f"'{name}' of tensors with {a.ndim} and {b.ndim} dimensions")
        return
    lead = [t.same(x, y, "a batched matrix product") if x and y else x or y
            for x, y in zip(ai.dims[:-2], bi.dims[:-2], strict=True)]  # fmt: skip
    dims = [*lead, ai.dims[-2], bi.dims[-1]]
    if name == "bmm":  # fvcore does not know the others
        t.flops(_product(t, "bmm"), 1, [*dims, ai.dims[-1]])
    if name == "baddbmm":
        dims = [t.same(x, y, "'baddbmm'") if y else x
                for x, y in zip(dims, broadcast(t, name, [tensors[0]], 3), strict=True)]  # fmt: skip
    t.set(out, [d if d else untracked(n) for d, n in zip(dims, out.shape, strict=True)])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
)  # fmt: skip
def _attention(t: Tracer, name: str, out: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> None:
    qi, ki, vi = t.info(q), t.info(k), t.info(v)
    if name == "scaled_dot_product_attention" and kwargs.get("scale") is not None and t.form(kwargs["scale"]) is None:
        t.same(qi.dims[-1], ki.dims[-1], "attention")  # the softmax scale is a number, so it stays
    else:
        why = "it is the width of an attention head, which the softmax scale is derived from"
        t.freeze([qi.dims[-1], ki.dims[-1]], why)
    t.freeze([vi.dims[-1]], "it is the width of an attention head, which torch lays out by the query's")
    lead = list(qi.dims[:-2])
    for other in (k, v):
        theirs = t.info(other).dims[:-2]
        if q.ndim > 3 and q.shape[-3] != other.shape[-3]:  # several query heads share one of these
            shared = merge([theirs[-1], untracked(q.shape[-3] // other.shape[-3])])
            theirs = [*theirs[:-1], shared]
        lead = [t.same(x, y, "attention") if x and y else x or y for x, y in zip(lead, theirs, strict=True)]
    scores = [*lead, qi.dims[-2], ki.dims[-2]]
    for mask in _tensors(args[:1], kwargs.get("attn_mask"), kwargs.get("attn_bias")):  # (..., L, S), broadcast
        for i, dim in enumerate(reversed(t.info(mask).dims), start=1):
            if is_tracked(dim) and i <= len(scores):
                scores[-i] = t.same(scores[-i], dim, "an attention mask")
    lead = scores[:-2]
    t.flops("attention", 1, [*lead, qi.dims[-2], ki.dims[-2], qi.dims[-1]])
    t.flops("attention", 1, [*lead, qi.dims[-2], ki.dims[-2], vi.dims[-1]])
    dims = [*lead, qi.dims[-2], vi.dims[-1]]
    first = _outputs(out)[0]
    t.set(first, [d if d else untracked(n) for d, n in zip(dims, first.shape, strict=True)])


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
    "_batch_norm_with_update_functional", "_native_batch_norm_legit_functional", "batch_norm",
)  # fmt: skip
def _batch_norm(t: Tracer, name: str, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    xi = t.info(x)
    channels = xi.dims[1]
    arguments = _tensors(args[:4])
    weight, bias = args[0], args[1]
    for tensor in arguments:
        if channels:
            channels = t.same(channels, t.info(tensor).dims[0], "a batch norm")
        else:
            t.freeze(t.info(tensor).dims, "it normalises one channel")
    marked = t.call.name == "instance_norm"
    over_batch = next((a for a in args if isinstance(a, bool)), name.startswith("_batch_norm_with_update"))
    affine = weight is not None
    scale = (5 if affine else 4) if marked or over_batch else (2 if affine else 1)
    t.flops(
        "instance_norm" if marked else "batch_norm",
        scale,
        [channels if i == 1 else d for i, d in enumerate(_numel(t, x))],
    )
    if over_batch:
        t.inexact([d for i, d in enumerate(xi.dims) if i != 1], "a norm runs across it")
    ids = _only(channels)
    if ids is not None:
        t.layer(LayerRecord("norm", t.module, ids, None, _param(t, weight), _param(t, bias), source=xi.source))
    dims = [channels if i == 1 else d for i, d in enumerate(xi.dims)]
    t.set(_outputs(out)[0], [d if d else untracked(n) for d, n in zip(dims, x.shape, strict=True)])


def _numel(t: Tracer, x: Tensor) -> list[Dim]:
    """The dimensions of a tensor with untracked sizes filled in."""
    return [d if d else untracked(n) for d, n in zip(t.info(x).dims, x.shape, strict=True)]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(t: Tracer, name: str, out: Any, x: Tensor, shape: Sequence[int], *args: Any, **kwargs: Any) -> None:
    xi = t.info(x)
    dims = list(xi.dims)
    weight = args[0] if args else None
    for tensor in _tensors(args[:2]):
        for i, dim in enumerate(t.info(tensor).dims):
            at = len(dims) - len(shape) + i
            dims[at] = t.same(dims[at], dim, "a layer norm") if dims[at] else dim
    t.inexact(dims[len(dims) - len(shape) :], "a norm runs across it")
    if weight is None:  # nothing says, in a proof, which channels it ran across
        t.suspect(dims[len(dims) - len(shape) :])
    said = t.call.args[1] if len(t.call.args) > 1 else t.call.kwargs.get("normalized_shape")
    held = getattr(t.modules.get(t.module), "normalized_shape", None)
    for i, dim in enumerate(dims[len(dims) - len(shape) :]):
        if isinstance(held, (tuple, list)) and tuple(held) == tuple(shape):
            t.records.equations.append(Equation(dim, Attribute(t.module, "normalized_shape", i, shape[i]), ""))
        elif isinstance(said, (tuple, list)) and len(said) == len(shape):
            t.claim(dim, said[i])
        else:
            t.suspect([dim])
    if name == "native_layer_norm":
        t.flops("layer_norm", 5 if weight is not None else 4, _numel(t, x))
    ids = _only(dims[-1])
    if ids is not None and weight is not None and len(shape) == 1:
        bias = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
        t.layer(LayerRecord("norm", t.module, ids, None, _param(t, weight), _param(t, bias)))
    t.set(_outputs(out)[0], [d if d else untracked(n) for d, n in zip(dims, x.shape, strict=True)])


@rule("native_group_norm")
def _group_norm(t: Tracer, name: str, out: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                n: int, c: int, hw: int, groups: int, eps: float) -> None:  # fmt: skip
    xi = t.info(x)
    channels = xi.dims[1]
    for tensor in _tensors(weight, bias):
        channels = t.same(channels, t.info(tensor).dims[0], "a group norm") if channels else channels
    ids = full(channels)
    if ids is None:
        t.freeze([channels], "a group norm over dimensions flattened into one")
    elif groups < c:
        if groups > 1:
            t.couple(ids, groups)
        t.inexact([channels], "a norm runs across it")
        if weight is None:
            t.suspect([channels])
    else:
        t.freeze([channels], "its group norm has one channel a group, as many as the module says")
    t.flops(
        "group_norm", 5 if weight is not None else 4, [channels if i == 1 else d for i, d in enumerate(_numel(t, x))]
    )
    only = _only(channels)
    if only is not None and weight is not None:
        t.layer(LayerRecord("norm", t.module, only, None, _param(t, weight), _param(t, bias), source=xi.source))
    dims = [channels if i == 1 else d for i, d in enumerate(xi.dims)]
    t.set(_outputs(out)[0], [d if d else untracked(k) for d, k in zip(dims, x.shape, strict=True)])


def _spatial(count: int, operator: str = "", input_scale: int = 0, output_scale: int = 0) -> Rule:
    """The last ``count`` dimensions change size and stay free of labels."""

    def apply(t: Tracer, name: str, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        info = t.info(x)
        t.freeze(info.dims[-count:], f"'{name}' runs over it")
        if input_scale:
            t.flops(operator, input_scale, _numel(t, x))
        for tensor in _outputs(out):
            dims = [*info.dims[:-count], *map(untracked, tensor.shape[-count:])]
            t.set(tensor, [d if d else untracked(n) for d, n in zip(dims, tensor.shape, strict=True)])
        if output_scale:
            t.flops(operator, output_scale, _numel(t, _outputs(out)[0]))

    return apply


for _n, _names in {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
    "reflection_pad1d replication_pad1d",
    2: "max_pool2d_with_indices avg_pool2d adaptive_max_pool2d max_pool2d upsample_bicubic2d reflection_pad2d "
    "replication_pad2d max_unpool2d fractional_max_pool2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    3: "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
    "upsample_trilinear3d reflection_pad3d replication_pad3d",
}.items():
    for _name in _names.split():
        RULES[_name] = _spatial(_n)
RULES["_adaptive_avg_pool2d"] = _spatial(2, "adaptive_avg_pool2d", input_scale=1)
RULES["upsample_nearest2d"] = _spatial(2, "upsample_nearest2d", output_scale=1)
RULES["upsample_bilinear2d"] = _spatial(2, "upsample_bilinear2d", output_scale=4)


@rule("grid_sampler_2d")
def _grid_sampler(t: Tracer, name: str, out: Tensor, x: Tensor, grid: Tensor, *args: Any) -> None:
    t.freeze(t.info(grid).dims, "it is a sampling position")
    _spatial(2, "grid_sampler", output_scale=4)(t, name, out, x)


@rule("constant_pad_nd")
def _pad(t: Tracer, name: str, out: Tensor, x: Tensor, pad: Sequence[int], *args: Any) -> None:
    dims = list(t.info(x).dims)
    said = t.call.args[1] if t.call.name == "pad" and len(t.call.args) > 1 else pad
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        at = x.ndim - 1 - i
        if before or after:
            ids = full(dims[at])
            if is_tracked(dims[at]) and (ids is None or before < 0 or after < 0):
                t.freeze([dims[at]], f"it is padded by ({before}, {after}) channels")
            elif is_tracked(dims[at]) and ids is not None:  # the padding stays as wide: what meets it is frozen there
                first, last = _padding(t, said[2 * i]), _padding(t, said[2 * i + 1])
                dims[at] = tracked(np.concatenate([first, ids, last]))
            else:
                dims[at] = untracked(out.shape[at])
    t.set(out, dims)


def _padding(t: Tracer, count: Any) -> Ids:
    """Labels of padded channels: none where their number is a mere number, else those of what it was read from."""
    labels = full(t.made(count)) if t.form(count) is not None else None
    return np.full(int(count), -1, dtype=np.int64) if labels is None else labels


@rule("pixel_shuffle")
def _pixel_shuffle(t: Tracer, name: str, out: Tensor, x: Tensor, factor: int) -> None:
    dims = t.info(x).dims
    ids = full(dims[-3])
    made: Dim = untracked(out.shape[-3])
    if ids is None:
        t.freeze([dims[-3]], "a pixel shuffle of dimensions flattened into one")
    elif is_tracked(dims[-3]):
        blocks = ids.reshape(-1, factor * factor)
        t.couple(blocks.T.ravel(), factor * factor)
        made = tracked(blocks[:, 0].copy())
    t.set(out, [*dims[:-3], made, *map(untracked, out.shape[-2:])])


@rule("pixel_unshuffle")
def _pixel_unshuffle(t: Tracer, name: str, out: Tensor, x: Tensor, factor: int) -> None:
    dims = t.info(x).dims
    t.set(out, [*dims[:-3], merge([dims[-3], untracked(factor * factor)]), *map(untracked, out.shape[-2:])])


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(t: Tracer, name: str, out: Tensor, x: Tensor, groups: int) -> None:
    dims = list(t.info(x).dims)
    ids = full(dims[1])
    if ids is None:
        t.freeze([dims[1]], "a channel shuffle of dimensions flattened into one")
    elif is_tracked(dims[1]):
        t.couple(ids, groups)
        dims[1] = tracked(ids.reshape(groups, -1).T.ravel())
    t.set(out, dims)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _view(t: Tracer, name: str, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    info = t.info(x)
    if tuple(out.shape) == tuple(x.shape):
        t.set(out, info.dims, info.source, info.param)
        return
    if not any(is_tracked(d) for d in info.dims):
        return
    sizes = t.call.sizes(out.ndim)
    try:
        dims, splits = reshape(_numel(t, x), out.shape, _chooser(t, sizes, out.shape))
    except Unsplittable:
        t.freeze(info.dims, f"a view from {tuple(x.shape)} to {tuple(out.shape)} does not divide it evenly")
        return
    for grid, axis in splits:
        t.couple_grid(grid, axis)
    if sizes is not None:
        for dim, n in zip(dims, sizes, strict=True):
            if n is not None and n != -1:
                t.claim(dim, n)
    elif t.call.name not in _SIZES_FROM_TENSORS:
        t.suspect(dims)
    t.set(out, dims, info.source if _drops_only_ones(x, out) else None)


def _chooser(t: Tracer, sizes: Sequence[Any] | None, shape: Sequence[int]) -> Chooser:
    """Which part of a split dimension is to shrink: what the numbers in the model's code leave open.

    Whole heads, where one of the sizes is an attribute named for heads; else the part whose size is derived from the
    very dimension that is split, or left open (-1); else, of a sequence, the outer of two attributes; else the
    innermost.
    """

    def choose(ids: Ids, parts: list[tuple[int, int]]) -> int:
        if sizes is None:
            return innermost(ids, parts)
        said = [sizes[at] if p == shape[at] else None for at, p in parts]
        forms = [t.form(n) for n in said]
        heads = [i for i, f in enumerate(forms) if isinstance(f, Attribute) and "head" in f.name and "dim" not in f.name
                 and "size" not in f.name]  # fmt: skip
        own = [i for i, f in enumerate(forms) if f is not None and any(
            isinstance(leaf, Read) and _shares(leaf.dim, ids) for leaf in leaves(f))]  # fmt: skip
        left_open = [i for i, n in enumerate(said) if n == -1]
        held = [i for i, f in enumerate(forms) if isinstance(f, Attribute)] if len(shape) <= 4 else []
        return (heads or own or left_open or (held if len(held) > 1 else []) or [innermost(ids, parts)])[0]

    return choose


def _shares(dim: Dim, ids: Ids) -> bool:
    """Whether a dimension carries any of these labels."""
    known = ids[ids >= 0]
    return any(len(np.intersect1d(own, known)) > 0 for own in ids_of(dim))


def _drops_only_ones(x: Tensor, out: Tensor) -> bool:
    return [n for n in x.shape if n > 1] == [n for n in out.shape if n > 1]


@rule("permute", "transpose", "t", "numpy_T", "movedim", "transpose_", "swapaxes")
def _permute(t: Tracer, name: str, out: Tensor, x: Tensor, *args: Any) -> None:
    info = t.info(x)
    if name.rstrip("_") == "permute":
        order = [d % x.ndim for d in args[0]]
    elif name.rstrip("_") == "t":
        order = list(range(x.ndim))[::-1]
    else:
        order = list(range(x.ndim))
        a, b = args[0] % x.ndim, args[1] % x.ndim
        order[a], order[b] = order[b], order[a]
    t.set(out, [info.dims[d] for d in order], info.source, info.param)


@rule("unsqueeze")
def _unsqueeze(t: Tracer, name: str, out: Tensor, x: Tensor, dim: int) -> None:
    dims = list(t.info(x).dims)
    dims.insert(dim % out.ndim, ())
    t.set(out, dims)


@rule("squeeze")
def _squeeze(t: Tracer, name: str, out: Tensor, x: Tensor, dim: Any = None) -> None:
    info = t.info(x)
    drop = range(x.ndim) if dim is None else [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    dims = [d for i, d in enumerate(info.dims) if not (i in drop and x.shape[i] == 1)]
    t.set(out, dims, info.source)


@rule("expand", "broadcast_to")
def _expand(t: Tracer, name: str, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    dims = broadcast(t, name, [x], out.ndim)
    sizes = t.call.sizes(out.ndim) or [None] * out.ndim
    if t.call.name == "expand_as":
        wide = t.info(t.call.args[1]).dims
        t.set(out, [d or w or untracked(n) for d, w, n in zip(dims, wide, out.shape, strict=True)])
        return
    made = [untracked(n) if t.form(said) is None else t.made(said) for n, said in zip(out.shape, sizes, strict=True)]
    for dim, said in zip(dims, sizes, strict=True):
        if is_tracked(dim) and said is not None and said != -1:
            t.claim(dim, said)
    t.set(out, [d if d else new for d, new in zip(dims, made, strict=True)])


@rule("repeat")
def _repeat(t: Tracer, name: str, out: Tensor, x: Tensor, repeats: Sequence[int]) -> None:
    dims = [()] * (out.ndim - x.ndim) + list(t.info(x).dims)
    said = t.call.sizes(out.ndim) or repeats
    outer = [t.made(n) if t.form(n) is not None else untracked(r) for n, r in zip(said, repeats, strict=True)]
    t.set(out, [merge([r, d]) for r, d in zip(outer, dims, strict=True)])


@rule("slice", "select", "narrow")
def _slice(t: Tracer, name: str, out: Tensor, x: Tensor, dim: int = 0, *args: Any, **kwargs: Any) -> None:
    info = t.info(x)
    dim %= x.ndim
    dims = list(info.dims)
    if name == "select":
        t.freeze([dims[dim]], "one index of it is taken by its number")
        del dims[dim]
        t.set(out, dims)
        return
    if out.shape[dim] == x.shape[dim]:
        t.set(out, dims, info.source, info.param)
        return
    if is_tracked(dims[dim]):
        ids = full(dims[dim])
        start = (args[0] if args and args[0] is not None else 0) if name == "slice" else args[0]
        step = args[2] if name == "slice" and len(args) > 2 else 1
        start = start + x.shape[dim] if start < 0 else start
        stop = start + step * out.shape[dim]
        if ids is None or step != 1 or not _sliced_at_sizes(t, x, dim, ids, start, stop):
            t.freeze([dims[dim]], "it is sliced at a number in the model's code")
        dims[dim] = untracked(out.shape[dim]) if ids is None else tracked(ids[start:stop:step])
    else:
        dims[dim] = untracked(out.shape[dim])
    t.set(out, dims)


def _sliced_at_sizes(t: Tracer, x: Tensor, dim: int, ids: Ids, start: int, stop: int) -> bool:
    """Whether both ends of a slice are sizes that can be followed; they are then noted to hold."""
    at = _slice_of(t, x, dim)
    if at is None:
        return False
    ends = []
    for value, end, default in ((at.start, start, 0), (at.stop, stop, x.shape[dim])):
        if end == default and t.form(value) is None and (value is None or value in (0, default) or value >= default):
            continue
        if t.form(value) is None or value < 0:
            return False
        ends.append((end, value))
    parts = [x.shape[dim] // n for n in (stop - start,) if n and x.shape[dim] % n == 0 and start % n == 0]
    if parts and any(not isinstance(t.form(value), Attribute) for _, value in ends):
        t.couple(ids, parts[0])  # halves, thirds: derived from the whole, so equal after a cut
    for end, value in ends:
        t.claim(tracked(ids[:end]), value)
    return True


def _slice_of(t: Tracer, x: Tensor, dim: int) -> slice | None:
    """The slice over a dimension, as the model's code wrote it."""
    if t.call.name == "narrow":
        _, _, start, length = (*t.call.args, *t.call.kwargs.values())
        return slice(start, start + length)
    if t.call.name != "__getitem__":
        return None
    index = t.call.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (Tensor, list)) or i is None for i in index):
        return None
    if Ellipsis in index:
        gap = index.index(Ellipsis)
        missing = t.call.args[0].ndim - len(index) + 1
        index = (*index[:gap], *[slice(None)] * missing, *index[gap + 1 :])
    kept = [i for i in index[: dim + sum(isinstance(i, int) for i in index) + 1] if isinstance(i, slice)]
    return kept[dim] if dim < len(kept) else None


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def _split(t: Tracer, name: str, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> None:
    info = t.info(x)
    dim %= x.ndim
    whole = info.dims[dim]
    parts: list[Dim] = [untracked(o.shape[dim]) for o in out]
    if is_tracked(whole) and len(out) > 1:
        ids = full(whole)
        widths = {o.shape[dim] for o in out}
        if ids is None:
            t.freeze([whole], "a split of dimensions flattened into one")
        else:
            parts = [tracked(p) for p in np.split(ids, np.cumsum([o.shape[dim] for o in out])[:-1])]
            said = _said_sizes(t, len(out))
            if len(widths) == 1 and (said is None or len({id(t.form(n)) for n in said}) == 1):
                t.couple(ids, len(out))
            if said is not None:
                for part, n in zip(parts, said, strict=True):
                    if len(widths) == 1 or t.form(n) is not None:
                        t.claim(part, n)
                    else:
                        t.freeze([part], f"it is split into parts of {[o.shape[dim] for o in out]}, by number")
            elif t.call.name not in _EQUAL_PARTS:
                t.suspect([whole])
    elif len(out) == 1:
        parts = [whole]
    for tensor, part in zip(out, parts, strict=True):
        t.set(tensor, [*info.dims[:dim], part, *info.dims[dim + 1 :]])


_EQUAL_PARTS = frozenset(["chunk", "tensor_split", "glu", "unsafe_chunk"])


def _said_sizes(t: Tracer, count: int) -> list[Any] | None:
    """The sizes of the parts of a split, as the model's code wrote them; None where it says how many instead."""
    if t.call.name not in ("split", "split_with_sizes", "unsafe_split"):
        return None
    sizes = t.call.args[1] if len(t.call.args) > 1 else next(iter(t.call.kwargs.values()), None)
    if isinstance(sizes, (list, tuple)):
        return list(sizes) if len(sizes) == count else None
    return [sizes] * count


@rule("glu")
def _glu(t: Tracer, name: str, out: Tensor, x: Tensor, dim: int = -1) -> None:
    dims = list(t.info(x).dims)
    dim %= x.ndim
    ids = full(dims[dim])
    if ids is None:
        t.freeze([dims[dim]], "a gated linear unit over dimensions flattened into one")
    elif is_tracked(dims[dim]):
        t.couple(ids, 2)
    dims[dim] = untracked(out.shape[dim]) if ids is None else tracked(ids[: out.shape[dim]])
    t.set(out, dims)


@rule("unbind")
def _unbind(t: Tracer, name: str, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> None:
    dims = list(t.info(x).dims)
    dim %= x.ndim
    t.freeze([dims[dim]], "each index of it is taken by its number")
    del dims[dim]
    for tensor in out:
        t.set(tensor, dims)


@rule("cat")
def _cat(t: Tracer, name: str, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    tensors = [x for x in tensors if x.ndim == out.ndim]
    dim %= out.ndim
    dims: list[Dim] = list(t.info(tensors[0]).dims)
    for x in tensors[1:]:
        for i, d in enumerate(t.info(x).dims):
            if i != dim and (d or dims[i]):
                dims[i] = t.same(dims[i], d, "a concatenation")
    parts = [t.info(x).dims[dim] for x in tensors]
    arrays = [full(p) if p else np.full(x.shape[dim], -1) for p, x in zip(parts, tensors, strict=True)]
    if any(a is None for a in arrays):
        t.freeze(parts, "a concatenation of dimensions flattened into one")
        dims[dim] = untracked(out.shape[dim])
    elif any(is_tracked(p) for p in parts):
        dims[dim] = tracked(np.concatenate([a for a in arrays if a is not None]))
    else:
        dims[dim] = untracked(out.shape[dim])
    t.set(out, dims)


@rule("stack")
def _stack(t: Tracer, name: str, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    dims: list[Dim] = list(t.info(tensors[0]).dims)
    for x in tensors[1:]:
        dims = [t.same(a, b, "a stack") if a or b else a for a, b in zip(dims, t.info(x).dims, strict=True)]
    dims.insert(dim % out.ndim, untracked(len(tensors)))
    t.set(out, dims)


@rule("flip")
def _flip(t: Tracer, name: str, out: Tensor, x: Tensor, over: Sequence[int]) -> None:
    dims = list(t.info(x).dims)
    for d in over:
        ids = full(dims[d])
        if ids is None:
            t.freeze([dims[d]], "a flip of dimensions flattened into one")
        elif is_tracked(dims[d]):
            dims[d] = tracked(ids[::-1].copy())
    t.set(out, dims)


@rule("roll")
def _roll(t: Tracer, name: str, out: Tensor, x: Tensor, shifts: Any, over: Sequence[int] = ()) -> None:
    dims = list(t.info(x).dims)
    t.freeze([dims[d] for d in over] or dims, "it is rolled by a number in the model's code")
    t.set(out, dims)


@rule("index", "index_select", "embedding")
def _index(t: Tracer, name: str, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    dims = list(t.info(x).dims)
    if name == "index":
        at = [i for i, index in enumerate(args[0]) if index is not None]
        first, indexed = at[0], at
        ndim = max(args[0][i].ndim for i in at)
        if any(args[0][i].dtype in (torch.bool, torch.uint8) for i in at):
            ndim = out.ndim - (x.ndim - sum(args[0][i].ndim for i in at))
            indexed = list(range(at[0], at[0] + sum(args[0][i].ndim for i in at)))
        contiguous = at == list(range(at[0], at[-1] + 1))
    elif name == "embedding":
        first, indexed, ndim, contiguous = 0, [0], args[0].ndim, True
    else:
        first, indexed, ndim, contiguous = args[0] % x.ndim, [args[0] % x.ndim], 1, True
    t.freeze([dims[i] for i in indexed], "it is looked up by index")
    rest = [d for i, d in enumerate(dims) if i not in indexed]
    if not contiguous:
        first = 0
    new = [untracked(n) for n in out.shape[first : first + ndim]]
    result = [*rest[:first], *new, *rest[first:]]
    if len(result) != out.ndim:
        t.freeze(dims, f"operator '{name}' indexes it in a way that is not followed")
        return
    if name == "embedding":
        ids = _only(result[-1])
        if ids is not None:
            t.layer(LayerRecord("embedding", t.module, ids, None, t.info(x).param))
    t.set(out, [d if d else untracked(n) for d, n in zip(result, out.shape, strict=True)])


def _axes(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    dim = kwargs.get("dim", args[0] if args else None)
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(x.ndim))
    return [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)] if x.ndim else []


def _reduce(t: Tracer, out: Any, x: Tensor, axes: Sequence[int]) -> None:
    dims = t.info(x).dims
    for tensor in _outputs(out):
        if tensor.ndim == x.ndim:
            t.set(tensor, [() if i in axes else d for i, d in enumerate(dims)])
        else:
            t.set(tensor, [d for i, d in enumerate(dims) if i not in axes])


@rule("sum", "mean", "amax", "amin", "logsumexp", "var", "std", "var_mean", "std_mean", "prod", "any", "all")
def _reduction(t: Tracer, name: str, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    if args and not isinstance(args[0], (int, list, tuple, type(None))):
        args = ()
    axes = _axes(x, [a for a in args if not isinstance(a, bool)], kwargs)
    over = [t.info(x).dims[i] for i in axes]
    if name != "sum":
        t.inexact(over, f"'{name}' runs across it")
    t.suspect(over)  # exact if what is summed is zero there, which a sigmoid's result is not
    if name == "mean" and t.call.name == "adaptive_avg_pool2d":
        t.flops("adaptive_avg_pool2d", 1, _numel(t, x))
    _reduce(t, out, x, axes)


@rule("linalg_vector_norm", "norm")
def _norm(t: Tracer, name: str, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Zeros add nothing to a vector norm of order 1 or 2, so a cut is exact where there are zeros."""
    t.suspect([t.info(x).dims[i] for i in _axes(x, args[1:], kwargs)])
    _reduce(t, out, x, _axes(x, args[1:], kwargs))


@rule("max", "min", "median", "mode", "kthvalue", "argmax", "argmin", "topk", "sort", "argsort")
def _choice(t: Tracer, name: str, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    if args and isinstance(args[0], Tensor):
        _pointwise(t, name, out, x, *args, **kwargs)
        return
    place = args[1:] if name in ("topk", "kthvalue") else args
    axes = _axes(x, [-1] if not place and name in ("topk", "sort", "argsort") else place, kwargs)
    t.freeze([t.info(x).dims[i] for i in axes], f"'{name}' chooses among its values")
    dims = t.info(x).dims
    if name in ("topk", "sort", "argsort"):
        for tensor in _outputs(out):
            t.set(tensor, [untracked(tensor.shape[i]) if i in axes else d for i, d in enumerate(dims)])
    else:
        _reduce(t, out, x, axes)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp")
def _softmax(t: Tracer, name: str, out: Tensor, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> None:
    info = t.info(x)
    t.inexact([info.dims[dim % x.ndim]], f"'{name.strip('_')}' runs across it")
    t.suspect([info.dims[dim % x.ndim]])
    t.set(out, info.dims)


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(t: Tracer, name: str, out: Any, v: Tensor, g: Tensor, dim: int = 0) -> None:
    dims = list(t.info(v).dims)
    t.same(dims[dim], t.info(g).dims[dim], "weight normalisation")
    t.set(_outputs(out)[0], dims, None, t.info(v).param)


def function(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for functions of torch, which are then followed as a whole."""

    def register(follow: Rule) -> Rule:
        for name in names:
            FUNCTIONS[name] = follow
        return follow

    return register


@rule("gather")
def _gather(t: Tracer, name: str, out: Tensor, x: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> None:
    dims, at = list(t.info(x).dims), dim % max(1, x.ndim)
    t.freeze(dims[at : at + 1], "it is looked up by index")
    along = [() if i == at else d for i, d in enumerate(dims)]
    if tuple(n for i, n in enumerate(x.shape) if i != at) != tuple(n for i, n in enumerate(out.shape) if i != at):
        t.freeze(dims, "it is looked up by an index that is smaller")
        along = [()] * x.ndim
    theirs = t.info(index).dims
    along = [t.same(a, b, "a lookup by index") if a and b and i != at else a
             for i, (a, b) in enumerate(zip(along, theirs, strict=True))]  # fmt: skip
    t.set(out, [d if d else untracked(n) for d, n in zip(along, out.shape, strict=True)])


@rule("dot", "vdot")
def _dot(t: Tracer, name: str, out: Tensor, a: Tensor, b: Tensor) -> None:
    _contract(t, t.info(a).dims[0], t.info(b).dims[0])


@function("scaled_dot_product_attention")
def _attention_called(
    t: Tracer, name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> None:  # fmt: skip
    """As the model calls it, whichever kernel torch takes."""
    _attention(t, name, out, q, k, v, attn_mask=attn_mask, scale=scale)


@function("normalize")
def _normalize(t: Tracer, name: str, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    dims = t.info(x).dims
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 1)
    t.suspect([dims[d] for d in ([dim] if isinstance(dim, int) else dim)])
    t.set(out, dims)


@function("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(t: Tracer, name: str, out: Any, x: Tensor, state: Any, *weights: Tensor | None) -> None:
    """One step of a recurrent layer; its state is the result of the one before."""
    w_ih, w_hh, *biases = [w for w in weights if w is not None]
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(name, 1)
    hidden = _gates(t, name, t.info(x).dims[-1], w_ih, w_hh, biases, gates)
    t.flops("linear", 1, [*_numel(t, x), t.info(w_ih).dims[0]], _param(t, w_ih))
    t.flops("linear", x.numel() // x.shape[-1], [hidden, t.info(w_ih).dims[0]], _param(t, w_hh))
    for tensor in _tensors(state):
        t.same(t.info(tensor).dims[-1] or untracked(tensor.shape[-1]), hidden, f"the states of '{name}'")
    if t.module:
        for attribute, dim in (("input_size", t.info(x).dims[-1]), ("hidden_size", hidden)):
            t.records.equations.append(Equation(dim, Attribute(t.module, attribute, None, size_of(dim)), ""))
    for tensor in _outputs(out):
        t.set(tensor, [*map(untracked, tensor.shape[:-1]), hidden])


def _gates(t: Tracer, name: str, read: Dim, w_ih: Tensor, w_hh: Tensor, biases: Sequence[Tensor], gates: int) -> Dim:
    """Couple the gate blocks of one cell by index; returns the labels of its units."""
    into, recurrent = t.info(w_ih).dims, t.info(w_hh).dims
    for other in (w_hh, *biases):
        t.same(into[0], t.info(other).dims[0], f"the gates of '{name}'")
    grid = full(into[0])
    assert grid is not None
    t.couple_grid(grid.reshape(gates, -1), 1)
    hidden = tracked(grid.reshape(gates, -1)[0].copy())
    t.same(recurrent[1], hidden, f"the states of '{name}'")
    t.same(read, into[1], f"'{name}'") if size_of(read) > 1 else t.freeze([into[1]], "it reads one value")
    t.layer(LayerRecord("linear", t.module, grid, read, _param(t, w_ih), _param(t, biases[0]) if biases else None))
    t.layer(LayerRecord("linear", t.module, grid, hidden, _param(t, w_hh)))
    return hidden


@function("repeat_interleave")
def _repeat_interleave(t: Tracer, name: str, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Each head of keys and values, say, is read by several heads of queries in a row."""
    repeats, dim = (*args, *kwargs.values(), None)[:2]
    dims = t.info(x).dims
    if not isinstance(repeats, int) or dim is None:
        t.freeze(dims, "it is repeated by numbers in a tensor, or flattened")
        return
    t.claim(untracked(repeats), repeats)
    dims = [merge([d or untracked(n), untracked(repeats)]) if i == dim % x.ndim else d
            for i, (d, n) in enumerate(zip(dims, x.shape, strict=True))]  # fmt: skip
    t.set(out, [d if d else untracked(n) for d, n in zip(dims, out.shape, strict=True)])


@function("einsum")
def _einsum(t: Tracer, name: str, out: Tensor, equation: str, *operands: Any) -> None:
    """Each letter is one dimension: wherever it stands, it stands for the same channels."""
    tensors = _tensors(operands)
    inputs, result = _letters(equation.replace(" ", ""), [x.ndim for x in tensors], out.ndim)
    dims: dict[str, Dim] = {}
    for letters, x in zip(inputs, tensors, strict=True):
        for letter, dim, n in zip(letters, t.info(x).dims, x.shape, strict=True):
            if n > 1:
                dims[letter] = t.same(dims[letter], dim, "an einsum") if letter in dims else dim or untracked(n)
    summed = [letter for letter in dims if letter not in result]
    t.suspect([dims[letter] for letter in summed if len(tensors) > 1])
    if len(tensors) > 2:
        t.freeze(list(dims.values()), "an einsum of more than two tensors")
    _einsum_flops(t, equation, inputs, result, tensors, dims)
    t.set(out, [dims.get(letter, ()) or untracked(n) for letter, n in zip(result, out.shape, strict=True)])


def _letters(equation: str, ndims: Sequence[int], out_ndim: int) -> tuple[list[str], str]:
    """Letters of each operand and of the result; an ellipsis becomes capital letters nobody uses."""
    left, arrow, right = equation.partition("->")
    spare = [chr(0x391 + i) for i in range(24)]
    inputs = []
    for letters, ndim in zip(left.split(","), ndims, strict=True):
        more = ndim - len(letters.replace("...", ""))
        inputs.append(letters.replace("...", "".join(spare[len(spare) - more :]) if more else ""))
    if not arrow:
        every = "".join(inputs)
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(every) if every.count(c) == 1
                                                                  and c not in spare))  # fmt: skip
    more = out_ndim - len(right.replace("...", ""))
    return inputs, right.replace("...", "".join(spare[len(spare) - more :]) if more else "")


def _einsum_flops(
    t: Tracer, equation: str, inputs: list[str], result: str, tensors: Sequence[Tensor], dims: dict[str, Dim]
) -> None:
    """As fvcore counts: exactly for two equations, else half of NumPy's count, of which it reads four digits."""
    order = {c: chr(97 + i) for i, c in enumerate(dict.fromkeys(c for c in equation if c.isalpha()))}
    plain = "".join(order.get(c, c) for c in equation.replace(" ", ""))
    every = list(dims.values())
    if plain in ("abc,abd->acd", "abc,adc->adb"):
        t.flops("einsum", 1, every)
    elif len(tensors) <= 2:
        inner = any(c not in result for letters in inputs for c in letters)
        t.flops("einsum", 2 if inner and len(tensors) == 2 else 1 + inner, every, rounded=True)
    else:
        shapes = [np.empty(tuple(x.shape)) for x in tensors]
        told = np.einsum_path(equation, *shapes, optimize="optimal")[1]
        line = next(line for line in told.splitlines() if "optimized flop" in line.lower())
        t.flops("einsum", int(float(line.split(":")[-1]) // 2), [])


@function("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(t: Tracer, name: str, out: Any, *args: Any, **kwargs: Any) -> None:
    """Gate blocks are coupled by index; all layers and directions have one width, so that they go together.

    A unit whose weights are zero stays at zero: LSTM has c = f c + i tanh(0), GRU h = (1 - z) tanh(0) + z h.
    """
    packed = isinstance(args[3], (list, tuple))
    x = args[0]
    states, weights, has_biases, layers, _, _, bidirectional = args[2:9] if packed else args[1:8]
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (layers * directions)
    if per_cell > (4 if has_biases else 2):
        t.freeze([d for w in weights for d in t.info(w).dims], f"'{name}' projects its states")
        return
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    read = t.info(x).dims[-1]
    if t.module:
        t.records.equations.append(Equation(read, Attribute(t.module, "input_size", None, x.shape[-1]), ""))
    width: Dim = ()
    for layer in range(layers):
        made: list[Ids] = []
        for direction in range(directions):
            at = (layer * directions + direction) * per_cell
            w_ih, w_hh, *biases = weights[at : at + per_cell]
            hidden = _gates(t, name, read, w_ih, w_hh, biases, gates)
            width = t.same(width, hidden, f"the width of '{name}'") if width else hidden
            made.append(full(hidden))  # type: ignore[arg-type]
        read = tracked(np.concatenate(made))
    if t.module:
        t.records.equations.append(Equation(width, Attribute(t.module, "hidden_size", None, size_of(width)), ""))
    for state in states if isinstance(states, (list, tuple)) else [states]:
        t.same(t.info(state).dims[-1] or untracked(state.shape[-1]), width, f"the states of '{name}'")
    first, *last = _outputs(out)
    lead = t.info(x).dims[:-1]
    t.set(first, [*[d if d else untracked(n) for d, n in zip(lead, first.shape[:-1], strict=True)], read])
    for state in last if not packed else [s for s in last if s.ndim == 3]:
        t.set(state, [*map(untracked, state.shape[:-1]), width])
