import copy
import math
import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.cost import count
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.sizes import Ratio, Size
from lightning_prune.graph.trace import output_tensors
from lightning_prune.surgery import applied, cut, difference, trace

SIDE, TOKENS = 4, 5  # images are (B, C, 4, 4), sequences (B, 5, C); every block keeps these

# Blocks: (net, channels read, channels to make, which variant) -> (module, channels made). All widths are even.

IMAGE: dict[str, Any] = {}
SEQUENCE: dict[str, Any] = {}
ACTIVATIONS = (F.relu, torch.sigmoid, F.softplus, F.gelu, torch.cos, F.silu)


def image(block):
    IMAGE[block.__name__] = block
    return block


def sequence(block):
    SEQUENCE[block.__name__] = block
    return block


@image
def conv(net, width, out, option):
    size, padding = ((1, 0), (3, 1))[option // 4]
    return nn.Conv2d(width, out, size, padding=padding, groups=1 + option // 2 % 2, bias=option % 2 == 0), out


@image
def depthwise(net, width, out, option):
    times = 1 + option % 2
    return nn.Conv2d(width, width * times, 3, padding=1, groups=width, bias=option < 4), width * times


@image
def transposed(net, width, out, option):
    groups = (1, 2, 1, width)[option % 4]
    out = width if groups == width else out
    return nn.ConvTranspose2d(width, out, 3, padding=1, groups=groups, bias=option < 4), out


@image
def activation(net, width, out, option):
    return net(lambda n, x: ACTIVATIONS[option % 6](x)), width


@image
def norm(net, width, out, option):
    if option % 4 == 0:
        return nn.BatchNorm2d(width, affine=option < 4), width
    if option % 4 == 1:
        return nn.GroupNorm(2, width), width
    if option % 4 == 2:
        return net(lambda n, x: n.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(width)), width
    scale = nn.Parameter(torch.rand(width) + 0.5)
    return net(lambda n, x: x * x.square().mean(1, True).add(0.1).rsqrt() * n.g[:, None, None], g=scale), width


@image
def bare(net, width, out, option):
    """Parameters without a layer: a scale, a shift, a matrix."""
    if option % 3 == 0:
        return net(lambda n, x: x * n.p.view(1, -1, 1, 1), p=nn.Parameter(torch.rand(width) + 0.5)), width
    if option % 3 == 1:
        return net(lambda n, x: x + n.p, p=nn.Parameter(torch.randn(1, width, 1, 1))), width
    return net(lambda n, x: torch.einsum("bchw,oc->bohw", x, n.p), p=nn.Parameter(torch.randn(out, width))), out


@image
def gated(net, width, out, option):
    """A gated linear unit, its halves told apart in one of five ways."""
    forward = (
        lambda n, x: (lambda a, b: a * torch.sigmoid(b))(*n.c(x).chunk(2, 1)),
        lambda n, x: (lambda a, b: a * torch.sigmoid(b))(*n.c(x).split(n.half, 1)),
        lambda n, x: (lambda y: y[:, : y.shape[1] // 2] * torch.tanh(y[:, y.shape[1] // 2 :]))(n.c(x)),
        lambda n, x: F.glu(n.c(x), 1),
        lambda n, x: (lambda y: y[:, : n.half] * torch.tanh(y[:, n.half :]))(n.c(x)),
        lambda n, x: (lambda y: y[:, ::2] * torch.tanh(y[:, 1::2]))(n.c(x)),
    )[option % 6]
    return net(forward, c=nn.Conv2d(width, 2 * out, 1), half=out), out


@image
def shuffled(net, width, out, option):
    """A channel shuffle: two groups, written in one of four ways."""

    def by_shape(n, x):
        b, c, h, w = x.shape
        return n.c(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))

    def by_attribute(n, x):
        b, c, h, w = x.size()
        return n.c(x.view(b, n.parts, c // n.parts, h, w).transpose(1, 2).reshape(b, -1, h, w))

    def by_literal(n, x):
        return n.c(x.view(x.shape[0], 2, -1, SIDE, SIDE).transpose(1, 2).flatten(1, 2))

    def by_module(n, x):
        return n.c(n.shuffle(x))

    forward = (by_shape, by_attribute, by_literal, by_module)[option % 4]
    after = nn.Conv2d(width, out, 1, groups=1 + option // 4)
    return net(forward, c=after, parts=2, shuffle=nn.ChannelShuffle(2)), out


@image
def pixels(net, width, out, option):
    """Channels become pixels, or pixels channels."""
    if option % 2:
        return net(lambda n, x: n.c(F.pixel_unshuffle(x, 2)).repeat_interleave(2, 2).repeat_interleave(2, 3),
                   c=nn.Conv2d(4 * width, out, 1)), out  # fmt: skip
    return net(lambda n, x: F.avg_pool2d(F.pixel_shuffle(n.c(x), 2), 2), c=nn.Conv2d(width, 4 * out, 1)), out


@image
def squeezed(net, width, out, option):
    """Squeeze and excite, with convolutions or linear layers."""
    if option % 2:
        return net(lambda n, x: x * torch.sigmoid(n.b(F.relu(n.a(x.mean((2, 3), True))))),
                   a=nn.Conv2d(width, out, 1), b=nn.Conv2d(out, width, 1)), width  # fmt: skip
    return net(lambda n, x: x * torch.sigmoid(n.b(F.relu(n.a(x.mean((2, 3))))))[:, :, None, None],
               a=nn.Linear(width, out), b=nn.Linear(out, width)), width  # fmt: skip


@image
def padded(net, width, out, option):
    """Zero channels beside what comes in, as many as an attribute says."""
    forward = (
        lambda n, x: F.pad(x, (0, 0, 0, 0, n.pad, n.pad)),
        lambda n, x: F.pad(x, (0, 0, 0, 0, n.pad, n.pad)) + n.c(x),
        lambda n, x: torch.cat([x, x.new_zeros(x.shape[0], 2 * n.pad, SIDE, SIDE)], 1) + n.c(x),
        lambda n, x: F.pad(n.d(x), (0, 0, 0, 0, 0, 2 * n.pad)) + n.c(x),
    )[option % 4]
    pad = out // 2
    return net(forward, pad=pad, c=nn.Conv2d(width, width + 2 * pad, 1), d=nn.Conv2d(width, width, 1)), width + 2 * pad


@image
def parted(net, width, out, option):
    """Channels split in two of different sizes, one part worked on."""

    def by_attributes(n, x):
        a, b = n.c(x).split([n.first, n.rest], 1)
        return torch.cat([n.d(a), b], 1)

    def by_split(n, x):
        a, b = torch.split(n.c(x), (n.first, n.rest), dim=1)
        return torch.cat([b, n.d(a)], 1)

    def by_slices(n, x):
        y = n.c(x)
        return torch.cat([n.d(y[:, : n.first]), y[:, n.first :]], 1)

    forward = (by_attributes, by_split, by_slices)[option % 3]
    return net(forward, c=nn.Conv2d(width, 2 + out, 1), d=nn.Conv2d(2, 4, 1), first=2, rest=out), out + 4


@image
def pooled(net, width, out, option):
    forward = (
        lambda n, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0),
        lambda n, x: F.interpolate(F.adaptive_avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear"),
        lambda n, x: x * torch.softmax(x, 1),
    )[option % 3]
    return net(forward), width


@sequence
def linear(net, width, out, option):
    return nn.Linear(width, out, bias=option % 2 == 0), out


@sequence
def wise(net, width, out, option):
    return net(lambda n, x: ACTIVATIONS[option % 6](x)), width


@sequence
def levelled(net, width, out, option):
    """A norm over channels."""
    if option % 4 == 0:
        return nn.LayerNorm(width, bias=option < 4), width
    if option % 4 == 1:
        return nn.RMSNorm(width), width
    if option % 4 == 2:
        return net(lambda n, x: n.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(width)), width
    return net(lambda n, x: x * x.pow(2).mean(-1, keepdim=True).add(0.1).rsqrt() * n.g,
               g=nn.Parameter(torch.rand(width) + 0.5)), width  # fmt: skip


@sequence
def perceptron(net, width, out, option):
    """Two linear layers, plain or gated; or one over the tokens."""
    if option % 4 == 0:
        forward = lambda n, x: n.b(F.gelu(n.a(x)))  # noqa: E731
        return net(forward, a=nn.Linear(width, out), b=nn.Linear(out, out)), out
    if option % 4 == 1:
        return net(lambda n, x: n.b(F.silu(n.a(x)) * n.c(x)), a=nn.Linear(width, out, False),
                   c=nn.Linear(width, out, False), b=nn.Linear(out, out, False)), out  # fmt: skip
    if option % 4 == 2:
        return net(lambda n, x: n.b((lambda y, g: y * F.silu(g))(*n.a(x).chunk(2, -1))),
                   a=nn.Linear(width, 2 * out), b=nn.Linear(out, out)), out  # fmt: skip
    return net(lambda n, x: n.b(F.gelu(n.a(x.transpose(1, 2)))).transpose(1, 2),
               a=nn.Linear(TOKENS, out, False), b=nn.Linear(out, TOKENS, False)), width  # fmt: skip


def scores(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@sequence
def attention(net, width, out, option):
    """Attention with two or four heads, their width read in one of eight ways."""

    def apart(n, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, n.heads, n.size).transpose(1, 2) for layer in (n.q, n.k, n.v))
        return n.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, n.heads * n.size))

    def by_hand(n, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, n.heads, -1).transpose(1, 2) for layer in (n.q, n.k, n.v))
        return n.o(scores(q, k, v).transpose(1, 2).reshape(b, t, -1))

    def scaled(n, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, n.size).transpose(1, 2) for layer in (n.q, n.k, n.v))
        return n.o(((q * n.scale) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    def einsum(n, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).reshape(b, t, n.heads, n.size) for layer in (n.q, n.k, n.v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * n.scale).softmax(-1)
        return n.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, -1))

    def packed(n, x):
        b, t, _ = x.shape
        q, k, v = n.qkv(x).reshape(b, t, 3, n.heads, n.size).permute(2, 0, 3, 1, 4).unbind(0)
        return n.o(F.scaled_dot_product_attention(q, k, v, scale=n.scale).transpose(1, 2).reshape(b, t, -1))

    def packed_by_chunks(n, x):
        q, k, v = (y.unflatten(-1, (n.heads, n.size)).transpose(1, 2) for y in n.qkv(x).chunk(3, dim=-1))
        return n.o(scores(q, k, v).transpose(1, 2).flatten(-2))

    def width_of_stream(n, x):
        b, t, c = x.shape
        q, k, v = (layer(x).view(b, t, n.heads, c // n.heads).transpose(1, 2) for layer in (n.sq, n.sk, n.sv))
        return n.so(scores(q, k, v).transpose(1, 2).reshape(b, t, c))

    def grouped(n, x):
        b, t, _ = x.shape
        q = n.q4(x).view(b, t, n.heads * n.times, n.size).transpose(1, 2)
        k, v = (layer(x).view(b, t, n.heads, n.size).transpose(1, 2) for layer in (n.k, n.v))
        k, v = (y.repeat_interleave(n.times, dim=1) for y in (k, v))
        return n.o4(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    heads, size = 2 if out < 8 else 4, 2 if out < 6 else 4
    inner = heads * size
    of_stream = {"sq": (width, width), "sk": (width, width), "sv": (width, width), "so": (width, out)}
    own = {"q": (width, inner), "k": (width, inner), "v": (width, inner), "o": (inner, out)}
    in_one = {"qkv": (width, 3 * inner), "o": (inner, out)}
    shared = {"q4": (width, 2 * inner), "k": (width, inner), "v": (width, inner), "o4": (2 * inner, out)}
    forward, layers = (
        (apart, own), (by_hand, own), (scaled, own), (einsum, own), (packed, in_one), (packed_by_chunks, in_one),
        (width_of_stream, of_stream), (grouped, shared),
    )[option % 8]  # fmt: skip
    used = {name: nn.Linear(*sizes) for name, sizes in layers.items()}
    heads = 2 if layers is of_stream else heads
    return net(forward, heads=heads, size=size, times=2, scale=size**-0.5, **used), out


@sequence
def torch_attention(net, width, out, option):
    layer = nn.MultiheadAttention(width, 2, batch_first=True, bias=option % 2 == 0)
    return net(lambda n, x: n.a(x, x, x, need_weights=option < 4)[0], a=layer), width


@sequence
def recurrent(net, width, out, option):
    kind = (nn.LSTM, nn.GRU)[option % 2]
    layer = kind(width, out, num_layers=1 + option // 2 % 2, bidirectional=option >= 4, batch_first=True)
    return net(lambda n, x: n.r(x)[0], r=layer), out * (1 + (option >= 4))


@sequence
def stated(net, width, out, option):
    """A recurrent layer whose first state the model makes itself."""
    layer = nn.GRU(width, out, batch_first=True)
    forward = (
        lambda n, x: n.r(x, torch.zeros(1, x.shape[0], n.hidden, dtype=x.dtype))[0],
        lambda n, x: n.r(x, x.new_zeros(1, x.shape[0], n.r.hidden_size))[0],
        lambda n, x: n.r(x, n.h.expand(-1, x.shape[0], -1).contiguous())[0],
    )[option % 3]
    return net(forward, r=layer, hidden=out, h=nn.Parameter(torch.randn(1, 1, out))), out


@sequence
def first_token(net, width, out, option):
    """A class token comes and goes."""
    token, places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, TOKENS + 1, width))
    return net(lambda n, x: (torch.cat([n.t.expand(x.shape[0], -1, -1), x], 1) + n.p)[:, 1:], t=token, p=places), width


@image
def as_sequence(net, width, out, option):
    """Pixels as tokens, and back to an image by one of three views."""
    names = sorted(name for name in SEQUENCE if name not in ("perceptron", "first_token"))
    inner, made = SEQUENCE[names[option % len(names)]](net, width, out, option // 2)

    def back_by_shape(n, x):
        y = n.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return y.reshape(x.shape[0], y.shape[1], SIDE, SIDE)

    def back_by_rest(n, x):
        return n.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])

    def back_by_unflatten(n, x):
        return n.inner(x.flatten(2).permute(0, 2, 1)).permute(0, 2, 1).unflatten(2, (SIDE, SIDE))

    return net((back_by_shape, back_by_rest, back_by_unflatten)[option % 3], inner=inner), made


# What is put around a block: (net, block, channels read, channels made, axis) -> (module, channels made).


def residual(net, block, width, made, axis):
    if width == made:
        return net(lambda n, x: x + n.block(x), block=block), made
    skip = nn.Conv2d(width, made, 1) if axis == 1 else nn.Linear(width, made)
    return net(lambda n, x: n.skip(x) + n.block(x), block=block, skip=skip), made


def dense(net, block, width, made, axis):
    return net(lambda n, x: torch.cat([x, n.block(x)], axis), block=block), width + made


def twice(net, block, width, made, axis):
    if width != made:
        return net(lambda n, x: n.block(x) + n.block(torch.tanh(x)), block=block), made
    return net(lambda n, x: n.block(torch.tanh(n.block(x))), block=block), made


def gating(net, block, width, made, axis):
    if width != made:
        return net(lambda n, x: (lambda y: y * torch.sigmoid(y))(n.block(x)), block=block), made
    return net(lambda n, x: x * torch.sigmoid(n.block(x)), block=block), made


AROUND = {"": None, "residual": residual, "dense": dense, "twice": twice, "gating": gating}

HEADS = {
    "mean": lambda n, x: n.fc(x.mean((2, 3) if x.ndim == 4 else 1)),
    "flat": lambda n, x: n.flat(x.flatten(1)),
    "dict": lambda n, x: (lambda y: {"a": n.fc(y), "b": [n.fc2(y.tanh())]})(x.mean((2, 3) if x.ndim == 4 else 1)),
    "tuple": lambda n, x: (lambda y: (n.fc(y), (n.fc2(y), None)))(x.flatten(2).amax(2) if x.ndim == 4 else x[:, 0]),
    "halves": lambda n, x: (
        lambda y: n.fc_half(y[:, : y.shape[1] // 2]) + n.fc_half2(y[:, y.shape[1] // 2 :])
    )(x.mean((2, 3)) if x.ndim == 4 else x[:, -1]),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A random network: steps are (block, what is around it, channels, variant)."""

    blocks: str
    stem: int
    steps: tuple[tuple[str, str, int, int], ...]
    head: str
    seed: int


@st.composite
def recipes(draw):
    blocks = draw(st.sampled_from(["image", "sequence"]))
    names = sorted(IMAGE if blocks == "image" else SEQUENCE)
    widths = st.sampled_from([4, 6, 8])
    steps = st.tuples(st.sampled_from(names), st.sampled_from(sorted(AROUND)), widths, st.integers(0, 7))
    return Recipe(
        blocks,
        draw(widths),
        tuple(draw(st.lists(steps, min_size=1, max_size=4))),
        draw(st.sampled_from(sorted(HEADS))),
        draw(st.integers(0, 3)),
    )


def build(net, recipe: Recipe) -> tuple[nn.Module, Tensor]:
    """The network in double precision, in train mode, and an input of two samples for it."""
    torch.manual_seed(recipe.seed)
    is_image = recipe.blocks == "image"
    table, axis = (IMAGE, 1) if is_image else (SEQUENCE, 2)
    width = recipe.stem
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1) if is_image else nn.Linear(3, width)]
    for name, around, out, option in recipe.steps:
        read = width
        block, width = table[name](net, read, out, option)
        if AROUND[around] is not None:
            block, width = AROUND[around](net, block, read, width, axis)
        layers.append(block)
    many = SIDE**2 if is_image else TOKENS
    made = {
        "mean": {"fc": width}, "flat": {"flat": width * many}, "dict": {"fc": width, "fc2": width},
        "tuple": {"fc": width, "fc2": width}, "halves": {"fc_half": width // 2, "fc_half2": width - width // 2},
    }[recipe.head]  # fmt: skip
    head = HEADS[recipe.head]
    model = net(lambda n, x: head(n, n.body(x)), body=nn.Sequential(*layers),
                **{name: nn.Linear(size, 3) for name, size in made.items()})  # fmt: skip
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        normalises = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))
        if normalises and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
    return model.double(), torch.randn((2, 3, SIDE, SIDE) if is_image else (2, TOKENS, 3), dtype=torch.float64)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return output_tensors(model(x))


def close(a: list[Tensor], b: list[Tensor], allowed: float = 1e-9) -> bool:
    return all(
        p.shape == q.shape and float((p - q).abs().max()) <= allowed * max(1.0, float(p.abs().max()))
        for p, q in zip(a, b, strict=True)
    )


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a trace could leave behind, exact types included."""
    plain = {
        (path, name): (type(value), value, [type(v) for v in value] if isinstance(value, (tuple, list)) else None)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, tuple, list, type(None)))
    }
    return {
        "plain": plain,
        "names": [sorted(vars(module)) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "tensors": [(id(p), p.shape, p.detach().numpy().tobytes()) for p in [*model.parameters(), *model.buffers()]],
        "random": (torch.get_rng_state().numpy().tobytes(), random.getstate()),
        "global hooks": len(nn.modules.module._global_forward_hooks),
    }


def sizes_left(model: nn.Module) -> list[str]:
    """Attributes that still are numbers of a trace."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        for entry in (value if isinstance(value, (tuple, list)) else [value])
        if isinstance(entry, (Size, Ratio))
    ]


def seen(net, recipe: Recipe):
    """A model of a recipe with its graph."""
    model, x = build(net, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model, x, trace(model, x)


def some_of(graph: ChannelGraph, seed: int) -> dict[str, Tensor]:
    """About 0.6 of each group's channels, also of a group with one channel left."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(group.size, generator=generator) < 0.6 for group in graph.groups]
    masks = [mask if mask.any() else torch.ones_like(mask) for mask in masks]
    return {group.name: mask for group, mask in zip(graph.groups, masks, strict=True)}


few = settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def check_cut_is_zeroed_and_priced(net, random_keep, wrong_attributes, recipe):
    model, x, graph = seen(net, recipe)
    plan = graph.plan(random_keep(graph, recipe.seed))
    if all(group.exact for group in graph.groups):
        assert difference(model, plan, x) < 1e-9
    cut(model, plan, verify="always")
    predicted, counted = graph.cost(plan), count(model, x)
    assert (predicted.flops, predicted.params) == (counted.flops, counted.params)
    assert wrong_attributes(model) == []
    model.train()
    sum(y.sum() for y in output_tensors(model(x))).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def check_keeping_all(net, recipe):
    model, x, graph = seen(net, recipe)
    before, expected = everything(model), outputs(model, x)
    plan = graph.plan({group.name: torch.ones(group.size, dtype=torch.bool) for group in graph.groups})
    assert (plan.kept, plan.buffers, plan.attributes) == ({}, {}, {})
    model.train()
    cut(model, plan)
    assert everything(model) == before
    assert close(expected, outputs(model, x), 0.0)
    assert graph.cost(plan) == graph.cost()


def check_two_cuts_are_one(net, random_keep, recipe):
    model, x, graph = seen(net, recipe)
    dense, again = copy.deepcopy(model), copy.deepcopy(model)
    first = graph.plan(random_keep(graph, recipe.seed, 0.8))
    cut(model, first)
    later = graph.after(first)
    keep = some_of(later, recipe.seed + 9)
    second = later.plan(keep)
    cut(model, second, graph=later, verify="always")
    cut(dense, applied(model), graph=graph, example_inputs=x)
    assert close(outputs(dense, x), outputs(model, x))
    counted = count(model, x)
    assert (later.cost(second).flops, later.cost(second).params) == (counted.flops, counted.params)
    # and traced anew in between
    cut(again, first, graph=graph, example_inputs=x)
    anew = trace(again, x)
    assert (anew.cost().flops, anew.cost().params) == (later.cost().flops, later.cost().params)
    cut(again, anew.plan({g.name: keep[g.name] for g in anew.groups if len(keep.get(g.name, ())) == g.size}))
    one, _ = build(net, recipe)
    cut(one, applied(again), graph=graph, example_inputs=x)
    assert close(outputs(one, x), outputs(again, x))


def check_tracing_leaves_no_trace(net, recipe):
    model, x = build(net, recipe)
    next(iter(model.body)).eval()
    before = everything(model)
    trace(model, x)
    assert everything(model) == before
    assert sizes_left(model) == []


@few
@given(recipe=recipes())
def test_a_cut_computes_what_zeros_compute_and_costs_what_was_said(net, random_keep, wrong_attributes, recipe):
    check_cut_is_zeroed_and_priced(net, random_keep, wrong_attributes, recipe)


@few
@given(recipe=recipes())
def test_keeping_all_changes_nothing(net, recipe):
    check_keeping_all(net, recipe)


@few
@given(recipe=recipes())
def test_two_cuts_one_after_the_other_are_one(net, random_keep, recipe):
    check_two_cuts_are_one(net, random_keep, recipe)


@few
@given(recipe=recipes())
def test_tracing_changes_nothing(net, recipe):
    check_tracing_leaves_no_trace(net, recipe)


@pytest.mark.parametrize("name", [*IMAGE, *SEQUENCE])
def test_every_block_alone_is_cut_right(name, net, random_keep, wrong_attributes):
    blocks = "image" if name in IMAGE else "sequence"
    for option in range(8):
        after = ("conv" if name in IMAGE else "linear", "", 6, 0)
        recipe = Recipe(blocks, 6, ((name, "", 4, option), after), "mean", 0)
        check_cut_is_zeroed_and_priced(net, random_keep, wrong_attributes, recipe)
