"""Stand-ins for attention modules, so that whole heads can go.

Heads go if a forward reads its sizes from tensors or from attributes of the module (``num_heads``, ``head_dim``), not
where it derives them from the width of the residual stream, which stays: ``C // num_heads``, ``reshape(B, N, C)``. A
stand-in is a subclass of the module's class whose forward computes the same and takes its sizes from attributes. It is
put in place by ``module.__class__ = stand_in``: object, parameter names, hooks and ``isinstance`` stay what they were.

`nn.MultiheadAttention` and torchvision's shifted windows have one written by hand. For modules whose code is right but
for the two expressions above, `rewritten` makes one out of their own source, and so follows the installed version.
docs/attention.md lists which modules need one and which do not. Nothing is imported that the user did not import.
"""

from __future__ import annotations

import ast
import copyreg
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def register(module_type: type[nn.Module], stand_in: type[nn.Module]) -> None:
    """Let heads of a module go by a stand-in of yours.

    Args:
        module_type: instances of exactly this class are meant, and of subclasses that keep its ``forward``.
        stand_in: a subclass of it, with a ``forward`` that computes the same but reads every size from an attribute of
            ``self`` or from a tensor. If it reads attributes that the module lacks, it has a classmethod
            ``prepare(module) -> dict`` that returns them, as integers and floats. `rewritten` makes one from source.

    Raises:
        ValueError: if ``stand_in`` is no subclass, or keeps the forward.
    """
    if not issubclass(stand_in, module_type) or stand_in.forward is module_type.forward:
        raise ValueError(
            f"a stand-in for {module_type.__qualname__} is a subclass of it with a forward of its own, "
            f"got {stand_in.__qualname__}; derive it from {module_type.__qualname__}"
        )
    _TABLE[module_type.__module__, module_type.__qualname__] = lambda _: stand_in
    _ORIGINALS[stand_in] = module_type
    _CHOSEN.clear()


def stand_in_for(module: nn.Module) -> type[nn.Module] | None:
    """The class that stands in for a module's own; None if there is none, or if it already is a stand-in."""
    if "forward" in vars(module) or type(module) in _ORIGINALS:
        return None
    if type(module) not in _CHOSEN:
        _CHOSEN[type(module)] = _choose(type(module))
    return _CHOSEN[type(module)]


def is_stand_in(module: nn.Module) -> bool:
    """Whether a module has the class of a stand-in."""
    return type(module) in _ORIGINALS


def swap(module: nn.Module) -> bool:
    """Give a module the class of its stand-in, in place, and the attributes that one reads.

    Args:
        module: with the shapes it was made with; a module that lost heads is a stand-in already.

    Returns:
        Whether it has one and was not one already.
    """
    stand_in = stand_in_for(module)
    if stand_in is None:
        return False
    wanted: Mapping[str, int | float] = stand_in.prepare(module) if hasattr(stand_in, "prepare") else {}
    added = {name: value for name, value in wanted.items() if not hasattr(module, name)}
    vars(module).update(added)
    vars(module)[_ADDED] = tuple(added)
    module.__class__ = stand_in
    return True


def restore(module: nn.Module) -> None:
    """Take `swap` back: class and attributes are what they were. A module that lost heads does not run afterwards.

    Raises:
        ValueError: if the module is no stand-in.
    """
    original = _ORIGINALS.get(type(module))
    if original is None:
        raise ValueError(f"expected a module that was swapped, got {type(module).__qualname__}; call swap first")
    module.__class__ = original
    for name in vars(module).pop(_ADDED):
        del vars(module)[name]


@contextmanager
def standing_in(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside, every module of a model that has a stand-in is swapped; the modules that were are yielded."""
    swapped: list[nn.Module] = []
    try:
        for module in model.modules():
            if swap(module):
                swapped.append(module)
        yield swapped
    finally:
        for module in swapped:
            restore(module)


def rewritten(
    module_type: type[nn.Module],
    *,
    width: str = "C",
    heads: str = "num_heads",
    output: str = "proj",
    methods: tuple[str, ...] = ("forward",),
) -> type[nn.Module]:
    """A stand-in out of a module's own source: of its code, only two kinds of expressions are replaced.

    ``width // self.heads`` becomes ``self.head_dim``, and a ``width`` that is the last size given to ``view`` or
    ``reshape`` becomes ``-1``.

    Args:
        module_type: its methods are plain functions whose source is at hand.
        width: the local variable that holds the width of the residual stream.
        heads: the attribute that holds the number of heads.
        output: name of the layer that projects all heads back; what it reads says how wide a head is, if there is no
            attribute ``head_dim``.
        methods: those to rewrite; names of helpers beside ``forward``.

    Raises:
        ValueError: if a method cannot be rewritten, or there is nothing to replace in any.

    Example:
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         B, N, C = x.shape
        ...         q = self.q(x).view(B, N, self.num_heads, C // self.num_heads)
        ...         return self.proj(q.reshape(B, N, C))
        >>> register(Attention, rewritten(Attention))  # doctest: +SKIP
    """
    found = {name: _narrow(getattr(module_type, name), width, f"self.{heads}", "self.head_dim") for name in methods}
    if not any(count for _, count in found.values()):
        raise ValueError(
            f"{module_type.__qualname__} nowhere derives a size from {width!r} in {', '.join(methods)}; "
            "say in width= which variable holds the width of the residual stream, if it needs a stand-in at all"
        )

    def prepare(module: Any) -> dict[str, int | float]:
        if hasattr(module, "head_dim"):
            return {}
        return {"head_dim": int(getattr(module, output).weight.shape[1] // getattr(module, heads))}

    return _derived(module_type, {name: f for name, (f, _) in found.items()} | {"prepare": staticmethod(prepare)})


class MultiheadAttentionStandIn(nn.MultiheadAttention):
    """Multi-head attention whose heads may be fewer than the width of its input has room for.

    Parameters and arguments are those of `nn.MultiheadAttention`. With H heads of width D: ``in_proj_weight`` is
    (3*H*D, E), or the three separate weights are (H*D, ...); ``bias_k`` and ``bias_v`` are (1, 1, H*D), the weight of
    ``out_proj`` (E, H*D).
    The fused kernels of `nn.TransformerEncoderLayer` are never taken: they know one width only.
    """

    scale: float
    # `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` ask this before they use fused kernels.
    _qkv_same_embed_dim = property(lambda self: False)

    @classmethod
    def prepare(cls, module: nn.MultiheadAttention) -> dict[str, int | float]:
        """The softmax scale, of the width that a head had when it was made."""
        return {"scale": float(module.head_dim**-0.5)}

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
        is_batched = query.dim() == 3
        if not 2 <= query.dim() <= 3 or not query.dim() == key.dim() == value.dim():
            dims = [x.dim() for x in (query, key, value)]
            raise ValueError(f"query, key and value have 3 dimensions each, or 2 without a batch, got {dims}")
        key_padding_mask = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
        )
        attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says that attn_mask is causal, but attn_mask is None; pass the mask as well")

        q, k, v = (
            # (B, H, length, D)
            x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).permute(1, 2, 0, 3)
            for x in self._project(query, key, value, is_batched)
        )
        mask = self._mask(attn_mask, key_padding_mask, q.shape[0], q.shape[2], k.shape[2])
        k, v, mask = self._extend(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            b, (q, k, v) = q.shape[0], (x.flatten(0, 1) for x in (q * self.scale, k, v))  # (B*H, length, D)
            if mask is None:
                scores = torch.bmm(q, k.transpose(-2, -1))  # (B*H, L, S)
            else:
                by_head = mask.expand(b, self.num_heads, q.shape[1], k.shape[1]).flatten(0, 1)
                scores = torch.baddbmm(by_head, q, k.transpose(-2, -1))
            weights = scores.softmax(dim=-1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            out = torch.bmm(weights, v).view(b, self.num_heads, q.shape[1], self.head_dim)
            weights = weights.view(b, self.num_heads, q.shape[1], k.shape[1])
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            is_causal = is_causal and key_padding_mask is None
            out = F.scaled_dot_product_attention(
                q, k, v, None if is_causal else mask, dropout, is_causal, scale=self.scale
            )
        out = F.linear(out.permute(2, 0, 1, 3).flatten(2), self.out_proj.weight, self.out_proj.bias)  # (L, B, E)
        if not is_batched:
            return out.squeeze(1), weights
        return (out.transpose(0, 1) if self.batch_first else out), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, is_batched: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads: (length, B, H*D) each."""
        is_self = query is key and key is value
        inputs: tuple[Tensor, ...] = (query,) if is_self else (query, key, value)
        if not is_batched:
            inputs = tuple(x.unsqueeze(1) for x in inputs)
        elif self.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)
        if is_self and self.in_proj_weight is not None:
            return F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            projections = self.in_proj_weight.chunk(3)
        else:
            projections = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = inputs * 3 if is_self else inputs
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, projections, biases, strict=True))

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, b: int, length: int, source: int
    ) -> Tensor | None:
        """What is added to the scores (B, H, L, S), from masks of floats as the forward takes them."""
        if attention is not None:
            by_head = (b, self.num_heads, length, source) if attention.dim() == 3 else (1, 1, length, source)
            attention = attention.view(by_head)
        if padding is not None:
            padding = padding.view(b, 1, 1, source)
        if attention is None or padding is None:
            return padding if attention is None else attention
        return attention + padding

    def _extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """One more key and value from ``add_bias_kv``, and one from ``add_zero_attn``; no mask hides them."""
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            bias_k, bias_v = (
                x.reshape(1, 1, self.num_heads, self.head_dim).transpose(1, 2).expand(k.shape[0], -1, -1, -1)
                for x in (self.bias_k, self.bias_v)
            )
            k, v, more = torch.cat([k, bias_k], dim=2), torch.cat([v, bias_v], dim=2), more + 1
        if self.add_zero_attn:
            k, v, more = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), more + 1
        return k, v, F.pad(mask, (0, more)) if mask is not None and more else mask

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences of unequal lengths, which `nn.TransformerEncoder` makes for its fused kernels: padded and back."""
        if query is not key or key is not value or key_padding_mask is not None or attn_mask is not None:
            raise ValueError("nested tensors are for self-attention without masks; pass padded tensors and masks")
        lengths = [len(sequence) for sequence in query.unbind()]
        x = query.to_padded_tensor(0.0)
        is_padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        out, weights = self.forward(x, x, x, is_padding, need_weights, average_attn_weights=average_attn_weights)
        return torch.nested.as_nested_tensor([o[:n] for o, n in zip(out, lengths, strict=True)]), weights


def _multi_head(module_type: type[nn.Module]) -> type[nn.Module]:
    return MultiheadAttentionStandIn


def _shifted_windows(module_type: type[nn.Module]) -> type[nn.Module] | None:
    """Both of torchvision's window attentions: one function computes them."""
    if not hasattr(inspect.getmodule(module_type), "shifted_window_attention"):
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        return _shifted_window_attention(
            x,
            self.qkv.weight,
            self.proj.weight,
            self.get_relative_position_bias(),
            self.window_size,
            self.num_heads,
            shift_size=self.shift_size,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            logit_scale=getattr(self, "logit_scale", None),  # the second version's
            training=self.training,
            head_dim=self.head_dim,
        )

    def prepare(module: Any) -> dict[str, int | float]:
        return {"head_dim": int(module.proj.weight.shape[1] // module.num_heads)}

    return _derived(module_type, {"forward": forward, "prepare": staticmethod(prepare)})


def _shifted_window_attention(*args: Any, head_dim: int, **kwargs: Any) -> Tensor:
    return cast(Tensor, _window_function()(*args, head_dim=head_dim, **kwargs))


torch.fx.wrap("_shifted_window_attention")  # a leaf for torch.fx, as torchvision's own function is


@lru_cache(maxsize=1)
def _window_function() -> Callable[..., Any]:
    """torchvision's ``shifted_window_attention`` with the width of a head as one more argument."""
    from torchvision.models import swin_transformer

    return _narrow(swin_transformer.shifted_window_attention, "C", "num_heads", "head_dim", ("head_dim",))[0]


@dataclass(frozen=True)
class _Source:
    """How the source of a module names things; see `rewritten`."""

    width: str = "C"
    heads: str = "num_heads"
    output: str = "proj"
    methods: tuple[str, ...] = ("forward",)

    def __call__(self, module_type: type[nn.Module]) -> type[nn.Module] | None:
        """The stand-in; None where the installed version has nothing to replace."""
        try:
            return rewritten(module_type, width=self.width, heads=self.heads, output=self.output, methods=self.methods)
        except ValueError:
            return None


# Module and qualified name -> what makes the stand-in. By name, so that no library is imported for it.
_TABLE: dict[tuple[str, str], Callable[[type[nn.Module]], type[nn.Module] | None]] = {
    ("torch.nn.modules.activation", "MultiheadAttention"): _multi_head,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): _shifted_windows,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): _shifted_windows,
    ("torchvision.models.maxvit", "RelativePositionalMultiHeadAttention"): _Source("D", "n_heads", "merge"),
    ("timm.layers.attention_pool", "AttentionPoolLatent"): _Source(),
    ("timm.models.beit", "Attention"): _Source(),
    ("timm.models.cait", "ClassAttn"): _Source(),
    ("timm.models.cait", "TalkingHeadAttn"): _Source(),
    ("timm.models.coat", "FactorAttnConvRelPosEnc"): _Source(),
    ("timm.models.convit", "GPSA"): _Source(methods=("forward", "get_attention")),
    ("timm.models.convit", "MHSA"): _Source(),
    ("timm.models.crossvit", "CrossAttention"): _Source(),
    ("timm.models.davit", "ChannelAttention"): _Source(),
    ("timm.models.davit", "ChannelAttentionV2"): _Source(heads="groups"),
    ("timm.models.davit", "WindowAttention"): _Source(),
    ("timm.models.edgenext", "CrossCovarianceAttn"): _Source(),
    ("timm.models.eva", "EvaAttention"): _Source(),
    ("timm.models.fastvit", "Attention"): _Source(),
    ("timm.models.metaformer", "Attention"): _Source(),
    ("timm.models.nest", "Attention"): _Source(),
    ("timm.models.nextvit", "EfficientAttention"): _Source(),
    ("timm.models.pvt_v2", "Attention"): _Source(),
    ("timm.models.swin_transformer_v2", "WindowAttention"): _Source(),
    ("timm.models.swin_transformer_v2_cr", "WindowMultiHeadAttention"): _Source(),
    ("timm.models.twins", "GlobalSubSampleAttn"): _Source(),
    ("timm.models.twins", "LocallyGroupedAttn"): _Source(),
    ("timm.models.vision_transformer", "ParallelScalingBlock"): _Source(),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"): _Source(),
    ("timm.models.volo", "Attention"): _Source(),
    ("timm.models.xcit", "XCA"): _Source(),
    ("transformers.models.blip.modeling_blip", "BlipAttention"): _Source("embed_dim", output="projection"),
    ("transformers.models.led.modeling_led", "LEDDecoderAttention"): _Source("embed_dim", output="out_proj"),
}

# Class of a stand-in -> the class it stands in for.
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {MultiheadAttentionStandIn: nn.MultiheadAttention}
_CHOSEN: dict[type[nn.Module], type[nn.Module] | None] = {}  # class -> its stand-in, once it was asked for
_ADDED = "_stand_in_added"  # attribute of a swapped module: names of the attributes it was given


def _choose(module_type: type[nn.Module]) -> type[nn.Module] | None:
    """The stand-in for a class: by its own row of the table, or by that of the class it has its forward from."""
    for owner in module_type.__mro__:
        make = _TABLE.get((owner.__module__, owner.__qualname__))
        if make is not None:
            stand_in = make(owner)
            if stand_in is None or owner is module_type:
                return stand_in
            hidden = {"forward", *(name for name in vars(stand_in) if not name.startswith("__"))}
            is_alike = all(getattr(module_type, name, None) is getattr(owner, name, None) for name in hidden)
            return _derived(module_type, {}, stand_in) if is_alike else None
    return None


def _derived(
    module_type: type[nn.Module], members: dict[str, Any], stand_in: type[nn.Module] | None = None
) -> type[nn.Module]:
    """A class made here: it has no place that pickle could import it from, and is made again where it is loaded."""
    space = {"__module__": __name__, "__doc__": module_type.__doc__, "__reduce_ex__": _reduce, **members}
    bases = (module_type,) if stand_in is None else (stand_in, module_type)
    made = type(f"{module_type.__name__}StandIn", bases, space)
    _ORIGINALS[made] = module_type
    return made


def _reduce(self: nn.Module, protocol: Any) -> Any:
    reduced = object.__reduce_ex__(self, protocol)
    original = _ORIGINALS.get(type(self))
    if original is None or reduced[0] is not vars(copyreg)["__newobj__"]:
        return reduced
    return _loaded, (original,), *reduced[2:]


def _loaded(original: type[nn.Module]) -> nn.Module:
    """An empty module of the stand-in's class; what loads it fills it."""
    module = original.__new__(original)
    stand_in = stand_in_for(module)
    if stand_in is None:
        raise RuntimeError(
            f"{original.__qualname__} was saved after losing heads, but nothing stands in for it here; "
            "register the stand-in it was saved with, and use the same version of its library"
        )
    return stand_in.__new__(stand_in)


class _Narrower(ast.NodeTransformer):
    """Replaces sizes that are derived from the width of the residual stream; counts what it replaced."""

    def __init__(self, width: str, heads: str, head_dim: str) -> None:
        self.width = width
        self.head_width = f"{width} // {heads}"
        self.head_dim = head_dim
        self.count = 0

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if ast.unparse(node) != self.head_width:
            return self.generic_visit(node)
        self.count += 1
        return ast.copy_location(ast.parse(self.head_dim, mode="eval").body, node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_view = isinstance(node.func, ast.Attribute) and node.func.attr in ("view", "reshape")
        sizes = [ast.unparse(size) for size in node.args] if is_view else []
        if sizes[-1:] == [self.width] and not any(size == "-1" or size.startswith("*") for size in sizes):
            node.args[-1] = ast.copy_location(ast.parse("-1", mode="eval").body, node.args[-1])
            self.count += 1
        return node


def _narrow(
    function: Any, width: str, heads: str, head_dim: str, more: tuple[str, ...] = ()
) -> tuple[Callable[..., Any], int]:
    """A function from the source of another, on the same lines of the same file, and how much was replaced.

    Args:
        function: of a module or of a class.
        width: variable with the width of the residual stream.
        heads: expression for the number of heads.
        head_dim: expression that replaces ``width // heads``.
        more: names of keyword arguments to add.

    Raises:
        ValueError: if it is no plain function, or its source is not at hand.
    """
    name = getattr(function, "__qualname__", str(function))
    code = getattr(function, "__code__", None)
    if not isinstance(function, FunctionType) or code is None or hasattr(function, "__wrapped__") or code.co_freevars:
        raise ValueError(f"{name} is decorated or uses super() or other closures; write its stand-in by hand")
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the source of {name} is not at hand ({error}); write its stand-in by hand") from error
    [definition] = tree.body
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError(f"{name} is not written as a def; write its stand-in by hand")
    if any(isinstance(node, ast.Attribute) and _is_private(node.attr) for node in ast.walk(definition)):
        raise ValueError(f"{name} uses names that begin with two underscores; write its stand-in by hand")
    narrower = _Narrower(width, heads, head_dim)
    narrower.visit(definition)
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    arguments.kwonlyargs += [ast.arg(arg=extra) for extra in more]
    arguments.kw_defaults += [None] * len(more)
    # Defaults and annotations were evaluated once; the defaults are taken from there.
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    ast.increment_lineno(ast.fix_missing_locations(tree), first - 1)
    space: dict[str, Any] = {}
    exec(compile(tree, code.co_filename, "exec", dont_inherit=True), space)
    made = FunctionType(space[definition.name].__code__, function.__globals__, function.__name__, function.__defaults__)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    return made, narrower.count


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")
