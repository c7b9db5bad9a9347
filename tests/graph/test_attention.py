"""Stand-ins compute what the modules they replace compute, and go on doing so when a head is gone."""

import builtins
import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_prune.graph import attention
from lightning_prune.graph.attention import (
    MultiheadAttentionStandIn,
    register,
    restore,
    rewritten,
    stand_in_for,
    standing_in,
    swap,
)

torch.set_num_threads(1)
HEADS, DIM = 4, 3
WIDTH = HEADS * DIM
TIGHT = {"rtol": 1e-5, "atol": 1e-6}


def randomised(module):
    """Every parameter and floating-point buffer away from zero, so that none hides a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return module.eval()


def index_without(layout, size, head):
    """Indices of an axis that stay without a head. "3HD" is three blocks of heads of D entries, "DH" heads last.

    With 2 heads, "HD" of 6 without head 0 is [3, 4, 5]; "DH" is [1, 3, 5].
    """
    blocks = int(layout[0]) if layout[0].isdigit() else 1
    names = layout.lstrip("0123456789")
    dim = size // blocks // HEADS
    shape = (blocks, *(HEADS if name == "H" else dim for name in names))
    grid = torch.arange(size).reshape(shape)
    keep = [h for h in range(HEADS) if h != head]
    return grid.index_select(names.index("H") + 1, torch.tensor(keep)).flatten()


def tensor_of(module, name):
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def remove_head(module, layouts, head, heads="num_heads"):
    """Cut one head out of the tensors named, and count one less."""
    for name, (dim, layout) in layouts.items():
        tensor = tensor_of(module, name)
        tensor.data = tensor.data.index_select(dim, index_without(layout, tensor.shape[dim], head))
    setattr(module, heads, getattr(module, heads) - 1)


def zero_head(module, layouts, head):
    """Zero what would be cut of the tensors named."""
    for name, (dim, layout) in layouts.items():
        tensor = tensor_of(module, name)
        keep = index_without(layout, tensor.shape[dim], head)
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[keep] = False
        with torch.no_grad():
            tensor.index_fill_(dim, gone.nonzero()[:, 0], 0.0)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def run_with_gradients(module, inputs):
    module.train()
    torch.manual_seed(4)  # timm's Swin v2 (cr) has a dropout that is not zero
    inputs = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    out = first(module(*inputs))
    leaves = [x for x in inputs if isinstance(x, torch.Tensor)] + list(module.parameters())
    torch.manual_seed(2)
    (out * torch.randn(out.shape)).sum().backward()
    return out.detach(), [leaf.grad for leaf in leaves]


def test_layouts_name_the_right_indices():
    assert index_without("HD", 8, 1).tolist() == [0, 1, 4, 5, 6, 7]
    assert index_without("DH", 8, 1).tolist() == [0, 2, 3, 4, 6, 7]
    assert index_without("2HD", 8, 0).tolist() == [1, 2, 3, 5, 6, 7]
    assert index_without("H", 4, 2).tolist() == [0, 1, 3]


# nn.MultiheadAttention

MULTIHEAD = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "without_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all_extras": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "other_widths": {"kdim": 5, "vdim": 7},
    "other_widths_extras": {"kdim": 5, "vdim": 7, "add_bias_kv": True, "bias": False},
}
B, L, S = 2, 5, 6


def multihead_inputs(options, kind):
    """Query, key and value. Self-attention needs one width for all."""
    torch.manual_seed(0)
    query = torch.randn(L, B, WIDTH)
    if kind == "self":
        inputs = [query]
    else:
        key = torch.randn(S, B, options.get("kdim", WIDTH))
        value = torch.randn(S, B, options.get("vdim", WIDTH))
        inputs = [query, key] if kind == "memory" else [query, key, value]
    if options.get("batch_first"):
        inputs = [x.transpose(0, 1).contiguous() for x in inputs]
    return inputs


def spread(inputs):
    """[x] -> x, x, x; [query, memory] -> query, memory, memory."""
    return [*inputs, *[inputs[-1]] * (3 - len(inputs))]


KINDS = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, options in MULTIHEAD.items()
    for kind in ("self", "memory", "cross")
    if kind == "cross" or "kdim" not in options
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_computed_alike(name, kind, need_weights):
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS, **MULTIHEAD[name]))
    inputs = spread(multihead_inputs(MULTIHEAD[name], kind))
    expected, weights = module(*inputs, need_weights=need_weights)
    assert swap(module)
    out, own_weights = module(*inputs, need_weights=need_weights)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(own_weights, weights, **TIGHT)


@pytest.mark.parametrize("name", list(MULTIHEAD))
def test_multihead_attention_has_the_same_gradients(name):
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS, **MULTIHEAD[name]))
    other = copy.deepcopy(module)
    swap(other)
    inputs = multihead_inputs(MULTIHEAD[name], "cross")
    expected, gradients = run_with_gradients(module, inputs)
    out, own = run_with_gradients(other, inputs)
    torch.testing.assert_close(out, expected, **TIGHT)
    for gradient, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-5)


def masks():
    torch.manual_seed(3)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, -2:] = True
    causal = torch.ones(L, S, dtype=torch.bool).triu(2)
    by_head = torch.rand(B * HEADS, L, S) < 0.3
    by_head[..., 0] = False
    return {
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": torch.randn(B, S)},
        "matrix": {"attn_mask": causal},
        "float_matrix": {"attn_mask": torch.randn(L, S)},
        "by_head": {"attn_mask": by_head},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "by_head_and_padding": {"attn_mask": by_head, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal_padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("extras", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["bare", "extras"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_multihead_attention_takes_every_mask(mask, extras, need_weights, average):
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS, **extras))
    inputs = multihead_inputs({}, "cross")
    options = {"need_weights": need_weights, "average_attn_weights": average, **masks()[mask]}
    expected, weights = module(*inputs, **options)
    swap(module)
    out, own_weights = module(*inputs, **options)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(own_weights, weights, **TIGHT)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_takes_one_sample_without_a_batch(need_weights):
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x, memory = torch.randn(L, WIDTH), torch.randn(S, WIDTH)
    options = {
        "need_weights": need_weights,
        "average_attn_weights": False,
        "attn_mask": torch.randn(HEADS, L, S),
        "key_padding_mask": torch.randn(S),
    }
    expected, weights = module(x, memory, memory, **options)
    swap(module)
    out, own_weights = module(x, memory, memory, **options)
    assert out.shape == (L, WIDTH)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(own_weights, weights, **TIGHT)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_drops_the_same_weights(need_weights):
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)).train()
    x = torch.randn(L, B, WIDTH)
    torch.manual_seed(5)
    expected, _ = module(x, x, x, need_weights=need_weights)
    swap(module)
    torch.manual_seed(5)
    out, _ = module(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(out, expected, **TIGHT)
    assert not torch.allclose(module(x, x, x)[0], out)
    module.eval()
    torch.testing.assert_close(module(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_output_lies_in_memory_as_the_original_s(batch_first):
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)).train()
    x = torch.randn(L, B, WIDTH)
    expected = module(x, x, x)[0].stride()
    swap(module)
    assert module(x, x, x)[0].stride() == expected


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"is_causal": True}, RuntimeError, "pass the mask"),
        ({"attn_mask": torch.zeros(1, S)}, RuntimeError, "shape"),
        ({"attn_mask": torch.zeros(HEADS, L, S)}, RuntimeError, "shape"),
    ],
)
def test_multihead_attention_refuses_masks_that_do_not_fit(arguments, error, words):
    module = nn.MultiheadAttention(WIDTH, HEADS)
    swap(module)
    with pytest.raises(error, match=words):
        module(*multihead_inputs({}, "cross"), **arguments)


def test_multihead_attention_refuses_inputs_of_different_dimensions():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    swap(module)
    with pytest.raises(ValueError, match=r"got \[3, 2, 2\]"):
        module(torch.zeros(L, 1, WIDTH), torch.zeros(S, WIDTH), torch.zeros(S, WIDTH))


def multihead_layouts(module):
    """Which tensors have what of a head."""
    packed = {"in_proj_weight": (0, "3HD")}
    separate = {f"{name}_proj_weight": (0, "HD") for name in "qkv"}
    layouts = {
        **(separate if module.in_proj_weight is None else packed),
        "in_proj_bias": (0, "3HD"),
        "bias_k": (2, "HD"),
        "bias_v": (2, "HD"),
        "out_proj.weight": (1, "HD"),
    }
    return {name: layout for name, layout in layouts.items() if tensor_of(module, name) is not None}


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_without_a_head(name, kind, need_weights):
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS, **MULTIHEAD[name]))
    cut = copy.deepcopy(module)
    swap(cut)
    remove_head(cut, multihead_layouts(cut), 1)
    zero_head(module, {"out_proj.weight": (1, "HD")}, 1)
    inputs = spread(multihead_inputs(MULTIHEAD[name], kind))
    options = {"need_weights": need_weights, "average_attn_weights": False}
    expected, weights = module(*inputs, **options)
    out, own_weights = cut(*inputs, **options)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(own_weights, weights[:, [0, 2, 3]] if need_weights else None, **TIGHT)
    assert tuple(cut.out_proj.weight.shape) == (WIDTH, WIDTH - DIM)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_softmax_scale_stays_when_heads_get_narrower(need_weights):
    # Without the last index of each head, and with scores divided by sqrt(3) as before, not by sqrt(2).
    module = randomised(nn.MultiheadAttention(WIDTH, HEADS))
    cut = copy.deepcopy(module)
    swap(cut)
    keep = torch.tensor([i for i in range(3 * WIDTH) if i % DIM < 2])
    cut.in_proj_weight.data, cut.in_proj_bias.data = cut.in_proj_weight.data[keep], cut.in_proj_bias.data[keep]
    cut.out_proj.weight.data = cut.out_proj.weight.data[:, keep[keep < WIDTH]]
    cut.head_dim = 2
    gone = torch.arange(DIM - 1, 3 * WIDTH, DIM)
    with torch.no_grad():
        module.in_proj_weight[gone] = 0.0
        module.in_proj_bias[gone] = 0.0
    x = torch.randn(L, B, WIDTH)
    out, expected = (m(x, x, x, need_weights=need_weights)[0] for m in (cut, module))
    torch.testing.assert_close(out, expected, **TIGHT)


@pytest.fixture
def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    return randomised(nn.TransformerEncoder(layer, 2))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_the_fused_kernels_of_an_encoder_are_never_taken(encoder):
    # Two heads left, an even number, which the kernels would take; they would read 2 heads of width 6 out of width 12.
    x = torch.randn(B, L, WIDTH)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, 3:] = True
    cut = copy.deepcopy(encoder)
    for layer, other in zip(encoder.layers, cut.layers, strict=True):
        swap(other.self_attn)
        keep = torch.cat([torch.arange(block * WIDTH, block * WIDTH + 2 * DIM) for block in range(3)])
        other.self_attn.in_proj_weight.data = other.self_attn.in_proj_weight.data[keep]
        other.self_attn.in_proj_bias.data = other.self_attn.in_proj_bias.data[keep]
        other.self_attn.out_proj.weight.data = other.self_attn.out_proj.weight.data[:, : 2 * DIM]
        other.self_attn.num_heads = 2
        layer.self_attn.out_proj.weight.data[:, 2 * DIM :] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(cut(x), encoder(x), **TIGHT)
        # Padding makes the encoder pass nested tensors down.
        expected = encoder(x, src_key_padding_mask=padding)
        out = cut(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out, expected, **TIGHT)
    assert out[1, 3:].abs().max() == 0.0  # it did: padded positions come back as zeros


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_are_for_self_attention_only():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    swap(module)
    nested = torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)])
    with pytest.raises(ValueError, match="self-attention without masks"):
        module(nested, nested.clone(), nested)


def test_a_swapped_module_can_be_initialised_again():
    module = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
    swap(module)
    before = module.in_proj_weight.clone(), module.bias_k.clone()
    nn.init.ones_(module.in_proj_bias)
    module._reset_parameters()
    assert not torch.equal(module.in_proj_weight, before[0])
    assert not torch.equal(module.bias_k, before[1])
    assert module.in_proj_bias.abs().sum() == 0.0


# Modules of torchvision, timm and transformers: how each is made, its inputs, and which tensors have what of a head.

QKV = {"qkv.weight": (0, "3HD"), "proj.weight": (1, "HD")}
BIASED = {**QKV, "qkv.bias": (0, "3HD")}
SEPARATE = {"q.weight": (0, "HD"), "kv.weight": (0, "2HD"), "proj.weight": (1, "HD")}
SEPARATE_BIASED = {**SEPARATE, "q.bias": (0, "HD"), "kv.bias": (0, "2HD")}
OWN_BIAS = {**QKV, "q_bias": (0, "HD"), "k_bias": (0, "HD"), "v_bias": (0, "HD")}


def tokens(count=16):
    return (torch.randn(2, count, WIDTH),)


class Positions(nn.Module):
    """Stands for CoaT's convolutions: something per head, made of queries and values."""

    def forward(self, q, v, size):
        return q * v.tanh()


class Config:
    """What transformers' configurations are asked for."""

    hidden_size, num_attention_heads, attention_dropout = WIDTH, HEADS, 0.0


# name -> (class, arguments, keyword arguments, inputs, layouts)
MODULES = {
    "torchvision-swin": (
        "torchvision.models.swin_transformer:ShiftedWindowAttention",
        (WIDTH, [2, 2], [1, 1], HEADS),
        {},
        lambda: (torch.randn(2, 5, 4, WIDTH),),  # 5 is padded to 6
        {**BIASED, "relative_position_bias_table": (1, "H")},
    ),
    "torchvision-swin-unshifted": (
        "torchvision.models.swin_transformer:ShiftedWindowAttention",
        (WIDTH, [2, 2], [0, 0], HEADS),
        {"qkv_bias": False},
        lambda: (torch.randn(2, 4, 4, WIDTH),),
        {**QKV, "relative_position_bias_table": (1, "H")},
    ),
    "torchvision-swin-v2": (
        "torchvision.models.swin_transformer:ShiftedWindowAttentionV2",
        (WIDTH, [2, 2], [1, 1], HEADS),
        {},
        lambda: (torch.randn(2, 5, 4, WIDTH),),
        {**BIASED, "logit_scale": (0, "H"), "cpb_mlp.2.weight": (0, "H")},
    ),
    "torchvision-maxvit": (
        "torchvision.models.maxvit:RelativePositionalMultiHeadAttention",
        (WIDTH, DIM, 4),
        {},
        lambda: (torch.randn(2, 3, 4, WIDTH),),
        {
            "to_qkv.weight": (0, "3HD"),
            "to_qkv.bias": (0, "3HD"),
            "merge.weight": (1, "HD"),
            "relative_position_bias_table": (1, "H"),
        },
    ),
    "timm-attention-pool": (
        "timm.layers.attention_pool:AttentionPoolLatent",
        (WIDTH,),
        {"num_heads": HEADS},
        tokens,
        SEPARATE_BIASED,
    ),
    "timm-beit": (
        "timm.models.beit:Attention",
        (WIDTH, HEADS),
        {"qkv_bias": True, "window_size": (3, 5)},
        tokens,  # 3 * 5 and the class token
        {**OWN_BIAS, "relative_position_bias_table": (1, "H")},
    ),
    "timm-cait-class": (
        "timm.models.cait:ClassAttn",
        (WIDTH, HEADS),
        {},
        tokens,
        {**{f"{name}.weight": (0, "HD") for name in "qkv"}, "proj.weight": (1, "HD")},
    ),
    "timm-convit": ("timm.models.convit:MHSA", (WIDTH, HEADS), {}, tokens, QKV),
    "timm-convit-gated": (
        "timm.models.convit:GPSA",
        (WIDTH, HEADS),
        {},
        tokens,
        {
            "qk.weight": (0, "2HD"),
            "v.weight": (0, "HD"),
            "proj.weight": (1, "HD"),
            "pos_proj.weight": (0, "H"),
            "pos_proj.bias": (0, "H"),
            "gating_param": (0, "H"),
        },
    ),
    "timm-crossvit": (
        "timm.models.crossvit:CrossAttention",
        (WIDTH, HEADS),
        {},
        tokens,
        {**{f"w{name}.weight": (0, "HD") for name in "qkv"}, "proj.weight": (1, "HD")},
    ),
    "timm-davit-channels": ("timm.models.davit:ChannelAttention", (WIDTH, HEADS), {}, tokens, QKV),
    "timm-davit-channels-v2": ("timm.models.davit:ChannelAttentionV2", (WIDTH, HEADS), {}, tokens, BIASED),
    "timm-davit-window": ("timm.models.davit:WindowAttention", (WIDTH, (4, 4), HEADS), {}, tokens, BIASED),
    "timm-edgenext": (
        "timm.models.edgenext:CrossCovarianceAttn",
        (WIDTH, HEADS),
        {},
        tokens,
        {**QKV, "temperature": (0, "H")},
    ),
    "timm-eva": ("timm.models.eva:EvaAttention", (WIDTH, HEADS), {"scale_norm": False}, tokens, OWN_BIAS),
    "timm-fastvit": (
        "timm.models.fastvit:Attention",
        (WIDTH, DIM),
        {},
        lambda: (torch.randn(2, WIDTH, 3, 5),),
        QKV,
    ),
    "timm-metaformer": ("timm.models.metaformer:Attention", (WIDTH, DIM), {}, tokens, QKV),
    "timm-nest": (
        "timm.models.nest:Attention",
        (WIDTH, HEADS),
        {},
        lambda: (torch.randn(2, 3, 4, WIDTH),),
        {**QKV, "proj.weight": (1, "DH")},  # heads are the inner axis of what it projects
    ),
    "timm-nextvit": (
        "timm.models.nextvit:EfficientAttention",
        (WIDTH,),
        {"head_dim": DIM},
        tokens,
        {f"{name}.{kind}": (0, "HD") for name in "qkv" for kind in ("weight", "bias")} | {"proj.weight": (1, "HD")},
    ),
    "timm-parallel-vit": (
        "timm.models.vision_transformer:ParallelScalingBlock",
        (WIDTH, HEADS),
        {"mlp_ratio": 1.0, "qk_norm": True, "qkv_bias": True},
        tokens,
        None,  # in_proj also makes the hidden units: their rows come first, and their number is in in_split
    ),
    "timm-pvt": ("timm.models.pvt_v2:Attention", (WIDTH, HEADS), {}, lambda: (*tokens(), [4, 4]), SEPARATE_BIASED),
    "timm-pvt-reduced": (
        "timm.models.pvt_v2:Attention",
        (WIDTH, HEADS),
        {"sr_ratio": 2},
        lambda: (*tokens(), [4, 4]),
        SEPARATE_BIASED,
    ),
    "timm-pvt-linear": (
        "timm.models.pvt_v2:Attention",
        (WIDTH, HEADS),
        {"linear_attn": True},
        lambda: (*tokens(64), [8, 8]),
        SEPARATE_BIASED,
    ),
    "timm-relpos": (
        "timm.models.vision_transformer_relpos:RelPosAttention",
        (WIDTH, HEADS),
        {"qk_norm": True},
        tokens,
        QKV,
    ),
    "timm-swin-v2": (
        "timm.models.swin_transformer_v2:WindowAttention",
        (WIDTH, (4, 4), HEADS),
        {},
        tokens,
        {**OWN_BIAS, "logit_scale": (0, "H"), "cpb_mlp.2.weight": (0, "H")},
    ),
    "timm-swin-v2-cr": (
        "timm.models.swin_transformer_v2_cr:WindowMultiHeadAttention",
        (WIDTH, HEADS, (4, 4)),
        {},
        tokens,
        {**BIASED, "logit_scale": (0, "H"), "meta_mlp.fc2.weight": (0, "H"), "meta_mlp.fc2.bias": (0, "H")},
    ),
    "timm-twins-local": (
        "timm.models.twins:LocallyGroupedAttn",
        (WIDTH, HEADS),
        {"ws": 2},
        lambda: (*tokens(15), (3, 5)),  # padded to 4 by 6
        BIASED,
    ),
    "timm-twins-global": (
        "timm.models.twins:GlobalSubSampleAttn",
        (WIDTH, HEADS),
        {"sr_ratio": 2},
        lambda: (*tokens(), (4, 4)),
        SEPARATE_BIASED,
    ),
    "timm-volo": ("timm.models.volo:Attention", (WIDTH, HEADS), {}, lambda: (torch.randn(2, 4, 4, WIDTH),), QKV),
    "timm-xcit": ("timm.models.xcit:XCA", (WIDTH, HEADS), {}, tokens, {**QKV, "temperature": (0, "H")}),
    "transformers-blip": (
        "transformers.models.blip.modeling_blip:BlipAttention",
        (Config,),
        {},
        tokens,
        {"qkv.weight": (0, "3HD"), "qkv.bias": (0, "3HD"), "projection.weight": (1, "HD")},
    ),
    "timm-coat": (
        "timm.models.coat:FactorAttnConvRelPosEnc",
        (WIDTH, HEADS),
        {"shared_crpe": Positions()},
        lambda: (*tokens(), (4, 4)),
        None,  # positions come from convolutions with a number of heads each
    ),
    "timm-cait-talking": ("timm.models.cait:TalkingHeadAttn", (WIDTH, HEADS), {}, tokens, None),  # heads mix
    "transformers-led": (
        "transformers.models.led.modeling_led:LEDDecoderAttention",
        (WIDTH, HEADS),
        {},
        tokens,
        {f"{name}_proj.{kind}": (0, "HD") for name in "qkv" for kind in ("weight", "bias")}
        | {"out_proj.weight": (1, "HD")},
    ),
}
COUNTS = {"torchvision-maxvit": "n_heads", "timm-davit-channels-v2": "groups"}
ATTRIBUTES = {"transformers-blip": {"embed_dim": WIDTH - DIM}}  # besides the number of heads


def made(name):
    """The module and its inputs."""
    place, args, kwargs, inputs, _ = MODULES[name]
    library, _, class_name = place.partition(":")
    pytest.importorskip(library.partition(".")[0])
    torch.manual_seed(0)
    module = randomised(getattr(importlib.import_module(library), class_name)(*args, **kwargs))
    return module, inputs()


@pytest.mark.parametrize("name", list(MODULES))
def test_a_module_is_computed_alike(name):
    module, inputs = made(name)
    expected = first(module(*inputs))
    assert swap(module)
    torch.testing.assert_close(first(module(*inputs)), expected, **TIGHT)


@pytest.mark.parametrize("name", list(MODULES))
def test_a_module_has_the_same_gradients(name):
    module, inputs = made(name)
    other = copy.deepcopy(module)
    swap(other)
    expected, gradients = run_with_gradients(module, inputs)
    out, own = run_with_gradients(other, inputs)
    torch.testing.assert_close(out, expected, **TIGHT)
    for gradient, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, row in MODULES.items() if row[4] is not None])
def test_a_module_without_a_head(name):
    module, inputs = made(name)
    layouts = MODULES[name][4]
    cut = copy.deepcopy(module)
    swap(cut)
    remove_head(cut, layouts, 1, COUNTS.get(name, "num_heads"))
    vars(cut).update(ATTRIBUTES.get(name, {}))
    columns = {key: layout for key, layout in layouts.items() if layout[0] == 1 and "table" not in key}
    assert len(columns) == 1
    full = first(module(*inputs))
    zero_head(module, columns, 1)
    expected = first(module(*inputs))
    torch.testing.assert_close(first(cut(*inputs)), expected, **TIGHT)
    assert not torch.allclose(full, expected, atol=1e-3)


def test_talking_heads_without_a_head():
    # The scores of a head also speak into the other heads, through proj_l: a head goes with its column there.
    module, inputs = made("timm-cait-talking")
    cut = copy.deepcopy(module)
    swap(cut)
    mixing = {"proj_l.weight": (1, "H"), "proj_w.weight": (0, "H"), "proj_w.bias": (0, "H")}
    remove_head(cut, {**QKV, **mixing}, 1)
    zero_head(module, {"proj.weight": (1, "HD"), "proj_l.weight": (1, "H")}, 1)
    torch.testing.assert_close(cut(*inputs), module(*inputs), **TIGHT)


def test_a_parallel_block_without_a_head():
    # in_proj makes 12 hidden units of the MLP, then queries, keys and values of 4 heads of 3.
    module, inputs = made("timm-parallel-vit")
    cut = copy.deepcopy(module)
    swap(cut)
    keep = torch.cat([torch.arange(WIDTH), WIDTH + index_without("3HD", 3 * WIDTH, 1)])
    cut.in_proj.weight.data = cut.in_proj.weight.data[keep]
    cut.in_proj.bias.data = cut.in_proj.bias.data[keep]
    cut.in_split = [WIDTH, *[WIDTH - DIM] * 3]
    remove_head(cut, {"attn_out_proj.weight": (1, "HD")}, 1)
    zero_head(module, {"attn_out_proj.weight": (1, "HD")}, 1)
    torch.testing.assert_close(cut(*inputs), module(*inputs), **TIGHT)


@pytest.mark.parametrize(
    "name",
    [name for name in MODULES if name.startswith("timm") and name not in ("timm-convit", "timm-edgenext")],
)
def test_a_module_is_computed_alike_with_and_without_the_fused_operator(name):
    module, inputs = made(name)
    module.fused_attn = False
    expected = first(module(*inputs))
    swap(module)
    torch.testing.assert_close(first(module(*inputs)), expected, **TIGHT)
    module.fused_attn = True
    torch.testing.assert_close(first(module(*inputs)), expected, **TIGHT)


def test_every_row_of_the_table_is_tested():
    tested = {row[0] for row in MODULES.values()} | {"torch.nn.modules.activation:MultiheadAttention"}
    assert {f"{library}:{name}" for library, name in attention._TABLE} == tested


# Swapping


def state_of(module):
    """Everything that could change: class, attributes with their order, parameters by identity."""
    return (
        type(module),
        {k: v for k, v in vars(module).items() if not k.startswith("_") or k == attention._ADDED},
        [(name, id(p)) for name, p in module.named_parameters()],
    )


@pytest.mark.parametrize("name", ["torchvision-swin", "torchvision-swin-v2"])
def test_swap_keeps_the_object_and_restore_takes_it_back(name):
    module, _ = made(name)
    before = state_of(module)
    kept = module.state_dict().keys()
    assert swap(module)
    assert isinstance(module, before[0])
    assert type(module) is not before[0]
    assert module.head_dim == DIM
    assert module.state_dict().keys() == kept
    restore(module)
    assert state_of(module) == before
    assert not hasattr(module, "head_dim")


def test_restore_leaves_an_attribute_that_was_there():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    module.scale = 0.25
    swap(module)
    assert module.scale == 0.25
    restore(module)
    assert module.scale == 0.25
    assert type(module) is nn.MultiheadAttention
    assert module._qkv_same_embed_dim is True


def test_hooks_go_on_being_called():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    called = []
    module.register_forward_hook(lambda *_: called.append("after"))
    module.register_forward_pre_hook(lambda *_: called.append("before"))
    swap(module)
    x = torch.randn(L, B, WIDTH)
    module(x, x, x)
    assert called == ["before", "after"]


def test_a_second_swap_does_nothing():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    assert swap(module)
    assert not swap(module)
    assert stand_in_for(module) is None
    restore(module)
    assert type(module) is nn.MultiheadAttention


def test_restore_of_a_module_that_was_never_swapped_is_refused():
    with pytest.raises(ValueError, match="got Linear; call swap first"):
        restore(nn.Linear(2, 2))


def test_modules_without_a_row_have_no_stand_in():
    assert stand_in_for(nn.Linear(2, 2)) is None
    assert not swap(nn.LSTM(2, 2))


class Renamed(nn.MultiheadAttention):
    """Keeps the forward."""

    def extra_repr(self):
        return "renamed"


class Rewritten(nn.MultiheadAttention):
    """Computes something else."""

    def forward(self, query, key, value, **kwargs):
        out, weights = super().forward(query, key, value, **kwargs)
        return 2 * out, weights


class Projected(nn.MultiheadAttention):
    """Has a method by a name that the stand-in uses."""

    def _project(self):
        return "mine"


def test_a_subclass_with_the_same_forward_is_matched_and_stays_what_it_is():
    module = randomised(Renamed(WIDTH, HEADS))
    x = torch.randn(L, B, WIDTH)
    expected = module(x, x, x)[0]
    assert swap(module)
    assert isinstance(module, Renamed)
    assert isinstance(module, MultiheadAttentionStandIn)
    assert module.extra_repr() == "renamed"
    torch.testing.assert_close(module(x, x, x)[0], expected, **TIGHT)
    restore(module)
    assert type(module) is Renamed


def test_a_subclass_with_a_forward_of_its_own_is_not_matched():
    module = Rewritten(WIDTH, HEADS)
    assert not swap(module)
    assert type(module) is Rewritten


def test_a_subclass_whose_methods_the_stand_in_would_hide_is_not_matched():
    module = Projected(WIDTH, HEADS)
    assert not swap(module)
    assert module._project() == "mine"


def test_a_forward_set_on_the_instance_is_not_replaced():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    module.forward = lambda *args, **kwargs: "mine"
    assert not swap(module)
    assert module() == "mine"


def test_a_parametrised_module_is_matched():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = randomised(nn.MultiheadAttention(WIDTH, HEADS))
    parametrize.register_parametrization(module, "in_proj_weight", Doubled())
    x = torch.randn(L, B, WIDTH)
    expected = module(x, x, x)[0]
    assert swap(module)
    torch.testing.assert_close(module(x, x, x)[0], expected, **TIGHT)
    restore(module)
    torch.testing.assert_close(module(x, x, x)[0], expected, **TIGHT)


def test_standing_in_swaps_inside_and_puts_back_also_after_an_error():
    model = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS), nn.Linear(2, 2), nn.MultiheadAttention(WIDTH, HEADS)])
    model.append(model[0])  # one module in two places
    swap(model[2])

    def fail():
        with standing_in(model) as swapped:
            assert swapped == [model[0]]
            assert type(model[0]) is MultiheadAttentionStandIn
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert type(model[0]) is nn.MultiheadAttention
    assert type(model[2]) is MultiheadAttentionStandIn  # was one before


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(WIDTH, HEADS), lambda: Renamed(WIDTH, HEADS)])
@pytest.mark.parametrize("saved", ["deepcopy", "pickle", "torch"])
def test_a_module_that_lost_a_head_is_copied_and_saved(make, saved):
    module = randomised(make())
    swap(module)
    remove_head(module, multihead_layouts(module), 0)
    if saved == "deepcopy":
        again = copy.deepcopy(module)
    elif saved == "pickle":
        again = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    x = torch.randn(L, B, WIDTH)
    assert torch.equal(again(x, x, x)[0], module(x, x, x)[0])
    assert again.num_heads == HEADS - 1
    restore(again)
    assert type(again) is type(make())
    assert not hasattr(again, "scale")


def test_a_rewritten_module_that_lost_a_head_is_saved():
    module, inputs = made("torchvision-swin-v2")
    swap(module)
    remove_head(module, MODULES["torchvision-swin-v2"][4], 2)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(*inputs), module(*inputs))
    assert type(again) is type(module)


def test_a_fresh_module_takes_the_state_of_one_that_lost_a_head():
    cut, inputs = made("torchvision-swin")
    swap(cut)
    layouts = MODULES["torchvision-swin"][4]
    remove_head(cut, layouts, 3)
    fresh, _ = made("torchvision-swin")
    assert swap(fresh)
    remove_head(fresh, layouts, 0)  # shapes are what counts
    fresh.load_state_dict(cut.state_dict())
    assert torch.equal(fresh(*inputs), cut(*inputs))


def test_a_swapped_window_attention_is_a_leaf_of_torch_fx():
    module, inputs = made("torchvision-swin")
    swap(module)
    graph = torch.fx.symbolic_trace(module)
    assert torch.equal(graph(*inputs), module(*inputs))


# Registering


class Mine(nn.Module):
    """Attention as many write it."""

    def __init__(self, dim=WIDTH, num_heads=HEADS):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, *, factor: float = 2.0):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (factor * q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Closed(nn.Module):
    def forward(self, x):
        C = x.shape[-1]
        return super().forward(x.view(-1, C))


class Secret(nn.Module):
    def forward(self, x):
        C = x.shape[-1]
        return self.__secret(x.view(2, C))


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(attention, "_TABLE", dict(attention._TABLE))
    monkeypatch.setattr(attention, "_CHOSEN", {})
    monkeypatch.setattr(attention, "_ORIGINALS", dict(attention._ORIGINALS))


def test_a_module_of_the_user_s_own_is_rewritten_and_registered(table):
    module = randomised(Mine())
    (x,) = tokens()
    expected = module(x)
    assert not swap(module)
    register(Mine, rewritten(Mine))
    assert swap(module)
    torch.testing.assert_close(module(x), expected, **TIGHT)
    assert not torch.allclose(module(x, factor=0.5), expected)
    original = copy.deepcopy(module)
    restore(original)
    remove_head(module, BIASED, 1)
    zero_head(original, {"proj.weight": (1, "HD")}, 1)
    torch.testing.assert_close(module(x), original(x), **TIGHT)


def test_a_stand_in_written_by_hand_is_registered(table):
    class ByHand(Mine):
        def forward(self, x):
            return x + self.offset

        @classmethod
        def prepare(cls, module):
            return {"offset": module.num_heads}

    register(Mine, ByHand)
    module = Mine()
    assert stand_in_for(module) is ByHand
    assert swap(module)
    assert module(torch.zeros(1)).item() == HEADS
    restore(module)
    assert type(module) is Mine
    assert not hasattr(module, "offset")


def test_what_is_no_stand_in_is_refused(table):
    class Keeps(Mine):
        pass

    with pytest.raises(ValueError, match="got Linear; derive it from Mine"):
        register(Mine, nn.Linear)
    with pytest.raises(ValueError, match="a forward of its own"):
        register(Mine, Keeps)


@pytest.mark.parametrize(
    ("module_type", "arguments", "words"),
    [
        (Mine, {"width": "D"}, "nowhere derives a size from 'D' in forward"),
        (Closed, {}, "super"),
        (Secret, {}, "two underscores"),
        (nn.Linear, {}, "Linear nowhere derives a size"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(module_type, arguments, words):
    with pytest.raises(ValueError, match=words):
        rewritten(module_type, **arguments)


def test_a_function_without_source_is_refused():
    space = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x", space)
    space["Made"].__module__ = "elsewhere"
    with pytest.raises(ValueError, match=r"source of .*forward is not at hand"):
        rewritten(space["Made"])


def test_rewritten_code_stands_on_the_lines_of_the_original():
    made_code, original = rewritten(Mine).forward.__code__, Mine.forward.__code__
    assert made_code.co_filename == original.co_filename
    lines = [{line for _, _, line in code.co_lines() if line} - {code.co_firstlineno} for code in (made_code, original)]
    assert lines[0] == lines[1]


def test_a_size_in_the_middle_of_a_view_is_left_alone():
    class Pooled(Mine):
        def forward(self, x):
            B, N, C = x.shape
            y = x.reshape(B, C, -1).view(B, C, 2, -1).reshape(B, C, 4)  # the residual stream
            return y, x.reshape(B, -1, C), x.view((B, N, C)), self.proj(x).reshape(B, N, C)

    function, count = attention._narrow(Pooled.forward, "C", "self.num_heads", "self.head_dim")
    assert count == 1  # the last one
    y, *rest = function(Pooled(), torch.randn(2, 4, WIDTH))
    assert y.shape == (2, WIDTH, 4)
    assert [r.shape for r in rest] == [(2, 4, WIDTH)] * 3


def test_no_library_is_imported_for_its_rows(table, monkeypatch):
    imported = []
    real = builtins.__import__

    def note(name, *args, **kwargs):
        imported.append(name.partition(".")[0])
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", note)
    with standing_in(nn.ModuleList([nn.Linear(2, 2), nn.MultiheadAttention(WIDTH, HEADS), Mine()])) as swapped:
        assert len(swapped) == 1
    assert not {"torchvision", "timm", "transformers"} & set(imported)


def test_a_stand_in_that_inherits_its_forward_does_not_serve_a_subclass_with_another(table):
    class Between(Mine):
        def forward(self, x):
            return x

    class Empty(Between):
        pass

    class Other(Mine):
        def forward(self, x):
            return -x

    register(Mine, Empty)
    assert stand_in_for(Mine()) is Empty
    assert stand_in_for(Other()) is None
