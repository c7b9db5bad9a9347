"""The models of the zoo: how each is built, small, with random weights and without downloads, and what it is given.

`catalog()` knows them all by ``source/name``. Nothing here knows how a model is pruned. Libraries are imported when a
model of theirs is built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests.nets, when run as a script


@dataclass(frozen=True)
class Model:
    """One row of the zoo.

    Attributes:
        name: as its library calls it.
        source: "torchvision", "timm", "transformers" or "hand".
        kind: "convnet", "transformer" or "other", for the goals of prunable share.
        build: makes it, random; seeded from outside.
        inputs: batch size -> example inputs: a tensor, tuple of positional or dict of keyword inputs.
        compare: paths of modules whose outputs are compared, where the model's own output is a choice among them that
            rounding can tip (detection: boxes are sorted, thresholded and suppressed), the last to run at the end. The
            model's output if empty.
        family: what the table of families calls it.
    """

    name: str
    source: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    compare: tuple[str, ...] = ()
    family: str = ""

    @property
    def key(self) -> str:
        """``source/name``."""
        return f"{self.source}/{self.name}"


def images(*size: int) -> Callable[[int], Tensor]:
    """Batch size -> (B, *size) seeded normal values; (B, 3, size, size) for a single number."""
    shape = (3, size[0], size[0]) if len(size) == 1 else size

    def make(batch: int = 1) -> Tensor:
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))

    return make


def catalog() -> dict[str, Model]:
    """Every model by its key, in the order of the table."""
    models = [*torchvision_models(), *timm_models(), *transformers_models(), *hand_models()]
    return {model.key: model for model in models}


# torchvision: every name that is not quantized. Pixels are the fewest a model allows, 64 if not said here.
_PIXELS = {
    "inception_v3": 299,  # its auxiliary head wants a 17 x 17 map
    "maxvit_t": 224,  # partitions of 7 after five strides
    "vit_h_14": 56,
    **dict.fromkeys(["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"], 64),  # they enlarge to their own size
}
_TRANSFORMERS = ("vit_", "swin", "maxvit", "mvit")
_VIDEO = {  # (3, frames, height, width)
    **dict.fromkeys(["r3d_18", "r2plus1d_18", "mc3_18"], (3, 4, 32, 32)),
    "s3d": (3, 14, 209, 209),  # pools 2 x 7 x 7 after its last stage
    **dict.fromkeys(["mvit_v1_b", "mvit_v2_s"], (3, 4, 64, 64)),
    **dict.fromkeys(["swin3d_t", "swin3d_s", "swin3d_b"], (3, 4, 64, 64)),
}
_DETECTION = {  # what their layers compute, before boxes are sorted and suppressed; the last one runs last
    "fasterrcnn": ("rpn.head", "roi_heads.box_predictor"),
    "maskrcnn": ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor"),
    "keypointrcnn": ("rpn.head", "roi_heads.box_predictor", "roi_heads.keypoint_predictor"),
    "retinanet": ("head",),
    "fcos": ("head",),
    "ssd": ("head",),
}
_FEW_BOXES = {  # and always as many, whatever their scores, so that flops can be compared
    **dict.fromkeys(["rpn_nms_thresh", "box_nms_thresh"], 1.0),
    **dict.fromkeys(["rpn_score_thresh", "box_score_thresh"], 0.0),
    **dict.fromkeys([f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test")], 20),
    "box_batch_size_per_image": 8,
    "box_detections_per_img": 4,
}
_FAMILIES = (  # prefix -> family
    ("alexnet", "AlexNet, VGG, SqueezeNet"), ("vgg", "AlexNet, VGG, SqueezeNet"),
    ("squeezenet", "AlexNet, VGG, SqueezeNet"), ("convnext", "ConvNeXt"), ("densenet", "DenseNet"),
    ("efficientnet", "EfficientNet"), ("googlenet", "GoogLeNet, Inception"), ("inception", "GoogLeNet, Inception"),
    ("mnasnet", "MobileNet, MNASNet"), ("mobilenet", "MobileNet, MNASNet"), ("shufflenet", "ShuffleNet"),
    ("regnet", "RegNet"), ("resne", "ResNet, ResNeXt, Wide ResNet"), ("wide_resnet", "ResNet, ResNeXt, Wide ResNet"),
    ("deeplab", "segmentation"), ("fcn", "segmentation"), ("lraspp", "segmentation"), ("vit_", "ViT"),
    ("swin3d", "video"), ("mvit", "video"), ("swin", "Swin, MaxViT"), ("maxvit", "Swin, MaxViT"), ("raft", "RAFT"),
    ("r3d", "video"), ("r2plus1d", "video"), ("mc3", "video"), ("s3d", "video"),
    *((prefix, "detection") for prefix in _DETECTION if prefix != "fcos"), ("fcos", "detection"),
)  # fmt: skip


def torchvision_models() -> list[Model]:
    """All of torchvision."""
    from torchvision.models import list_models

    return [_torchvision(name) for name in list_models() if "quantized" not in name]


def _torchvision(name: str) -> Model:
    pixels = _PIXELS.get(name, 64)
    options: dict[str, Any] = {"weights": None}
    inputs: Callable[[int], Any] = images(pixels)
    compare: tuple[str, ...] = ()
    kind = "transformer" if name.startswith(_TRANSFORMERS) else "other" if name.startswith("raft") else "convnet"
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    elif name.startswith("vit_"):
        options["image_size"] = pixels
    elif name in _VIDEO:
        inputs = images(*_VIDEO[name])
        if name.startswith("mvit"):
            return Model(name, "torchvision", kind, lambda: _small_mvit(name), inputs, family="video")
    elif name.startswith("raft"):
        inputs = _pair
    elif name.startswith(("deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
        if not name.startswith("lraspp"):
            options["aux_loss"] = True
    elif prefix := next((p for p in _DETECTION if name.startswith(p)), None):
        options |= {"weights_backbone": None}
        if prefix != "ssd":
            options |= {"min_size": 64, "max_size": 64}
        if "rcnn" in prefix:
            options |= _FEW_BOXES
        compare = _DETECTION[prefix]
        inputs = partial(_detection, extra=_EXTRA.get(prefix), least=2 if name.startswith("ssdlite") else 1)

    def build() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, **options)

    family = next(family for prefix, family in _FAMILIES if name.startswith(prefix))
    return Model(name, "torchvision", kind, build, inputs, compare, family)


def _small_mvit(name: str) -> nn.Module:
    """An MViT for smaller videos than its function allows, with the same layers."""
    from torchvision.models.video import mvit

    size = {"spatial_size": _VIDEO[name][2:], "temporal_size": _VIDEO[name][1]}
    cls = mvit.MViT
    with patch.object(mvit, "MViT", lambda **options: cls(**{**options, **size})):
        return getattr(mvit, name)(weights=None)


def _pair(batch: int = 1) -> tuple[Tensor, Tensor]:
    one = images(128)(2 * batch)
    return one[:batch], one[batch:]


_EXTRA = {
    "maskrcnn": {"masks": torch.ones(2, 64, 64, dtype=torch.uint8)},
    "keypointrcnn": {"keypoints": torch.tensor([20.0, 20.0, 1.0]).repeat(2, 17, 1)},
}


def _detection(
    batch: int = 1, *, extra: dict[str, Tensor] | None, least: int = 1
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets; at least two where a BatchNorm sees one pixel of each."""
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [10.0, 20.0, 60.0, 60.0]])
    pictures = images(64)(max(batch, least)).sigmoid()
    targets = {"boxes": boxes, "labels": torch.tensor([1, 1]), **(extra or {})}
    return list(pictures), [{key: value.clone() for key, value in targets.items()} for _ in pictures]


# timm: name -> pixels, kind, family; options of the constructor. Small variants, cut short where depth repeats itself.
_C, _T = "convnet", "transformer"
_TIMM: list[tuple[str, str, int, str, dict[str, Any]]] = [
    ("resnet10t", _C, 64, "ResNet and its relatives", {}),
    ("seresnet18", _C, 64, "squeeze-excite", {}),
    ("legacy_seresnet18", _C, 64, "squeeze-excite", {}),
    ("ecaresnet26t", _C, 64, "squeeze-excite", {}),
    ("resnest14d", _C, 64, "split attention", {}),
    ("skresnet18", _C, 64, "selective kernels", {}),
    ("resnetblur18", _C, 64, "anti-aliasing", {}),
    ("resnetv2_18", _C, 64, "ResNet and its relatives", {}),
    ("res2net50_14w_8s", _C, 64, "ResNet and its relatives", {}),
    ("resnetaa34d", _C, 64, "anti-aliasing", {}),
    ("gernet_s", _C, 64, "ResNet and its relatives", {}),
    ("nf_resnet26", _C, 64, "scaled weight standardisation", {}),
    ("eca_nfnet_l0", _C, 64, "scaled weight standardisation", {}),
    ("repvgg_a0", _C, 64, "re-parameterised branches", {}),
    ("mobileone_s0", _C, 64, "re-parameterised branches", {}),
    ("repvit_m0_9", _C, 64, "re-parameterised branches", {}),
    ("fastvit_t8", _C, 64, "re-parameterised branches", {}),
    ("dpn48b", _C, 64, "concatenating nets", {}),
    ("cspresnet50", _C, 64, "concatenating nets", {}),
    ("cspdarknet53", _C, 64, "concatenating nets", {}),
    ("densenetblur121d", _C, 64, "anti-aliasing", {}),
    ("vovnet39a", _C, 64, "concatenating nets", {}),
    ("ese_vovnet19b_slim_dw", _C, 64, "concatenating nets", {}),
    ("selecsls42b", _C, 64, "concatenating nets", {}),
    ("dla34", _C, 64, "concatenating nets", {}),
    ("hgnetv2_b0", _C, 64, "concatenating nets", {}),
    ("hrnet_w18_small", _C, 64, "concatenating nets", {}),
    ("inception_v4", _C, 96, "concatenating nets", {}),
    ("nasnetalarge", _C, 96, "searched cells", {"stem_size": 24, "num_features": 960}),
    ("hardcorenas_a", _C, 64, "mobile nets", {}),
    ("efficientnet_b0", _C, 64, "mobile nets", {}),
    ("tf_efficientnetv2_b0", _C, 64, "mobile nets", {}),
    ("mobilenetv3_small_050", _C, 64, "mobile nets", {}),
    ("mobilenetv4_conv_small", _C, 64, "mobile nets", {}),
    ("tf_mobilenetv3_small_minimal_100", _C, 64, "mobile nets", {}),
    ("ghostnet_050", _C, 64, "mobile nets", {}),
    ("mixnet_s", _C, 64, "mobile nets", {}),
    ("rexnet_100", _C, 64, "mobile nets", {}),
    ("lcnet_050", _C, 64, "mobile nets", {}),
    ("xception41", _C, 64, "mobile nets", {}),
    ("convmixer_768_32", _C, 64, "large kernels", {}),
    ("convnextv2_atto", _C, 64, "large kernels", {}),
    ("inception_next_atto", _C, 64, "large kernels", {}),
    ("focalnet_tiny_srf", _C, 64, "large kernels", {}),
    ("starnet_s1", _C, 64, "large kernels", {}),
    ("vit_tiny_patch16_224", _T, 64, "plain ViT", {"img_size": 64, "depth": 4}),
    ("deit3_small_patch16_224", _T, 64, "plain ViT", {"img_size": 64, "depth": 4}),
    ("beit_base_patch16_224", _T, 64, "relative position bias", {"img_size": 64, "depth": 3}),
    ("vit_relpos_small_patch16_224", _T, 64, "relative position bias", {"img_size": 64, "depth": 4}),
    ("eva02_tiny_patch14_224", _T, 56, "rotary embedding, SwiGLU", {"img_size": 56, "depth": 4}),
    ("swin_tiny_patch4_window7_224", _T, 56, "windowed", {"img_size": 56, "depths": (2, 2, 2, 2)}),
    ("swinv2_cr_tiny_224", _T, 64, "windowed", {"img_size": 64, "depths": (2, 2, 2, 2)}),
    ("maxvit_nano_rw_256", _T, 64, "windowed", {"img_size": 64}),
    ("coatnet_0_rw_224", _T, 64, "conv-attention hybrids", {"img_size": 64}),
    ("cait_xxs24_224", _T, 64, "class attention", {"img_size": 64, "depth": 4}),
    ("xcit_nano_12_p16_224", _T, 64, "cross-covariance attention", {"img_size": 64, "depth": 4}),
    ("davit_tiny", _T, 64, "cross-covariance attention", {"depths": (1, 1, 2, 1)}),
    ("convit_tiny", _T, 64, "conv-attention hybrids", {"img_size": 64, "depth": 4, "local_up_to_layer": 3}),
    ("levit_128s", _T, 64, "conv-attention hybrids", {"img_size": 64}),
    ("edgenext_xx_small", _T, 64, "conv-attention hybrids", {}),
    ("mobilevit_xxs", _T, 64, "conv-attention hybrids", {}),
    ("coat_lite_tiny", _T, 64, "conv-attention hybrids", {"img_size": 64}),
    ("visformer_tiny", _T, 64, "conv-attention hybrids", {"img_size": 64}),
    ("efficientvit_b0", _T, 64, "conv-attention hybrids", {}),
    ("mixer_s32_224", _T, 64, "MLP mixers", {"img_size": 64}),
    ("resmlp_12_224", _T, 64, "MLP mixers", {"img_size": 64}),
    ("gmlp_ti16_224", _T, 64, "MLP mixers", {"img_size": 64}),
    ("poolformer_s12", _T, 64, "hierarchical", {}),
    ("pvt_v2_b0", _T, 64, "hierarchical", {}),
    ("twins_svt_small", _T, 64, "hierarchical", {"img_size": 64, "depths": (1, 1, 2, 1)}),
    ("crossvit_9_240", _T, 240, "hierarchical", {}),
    ("tnt_s_patch16_224", _T, 64, "hierarchical", {"img_size": 64, "depth": 3}),
    ("hiera_tiny_224", _T, 64, "hierarchical", {"img_size": 64}),
]  # fmt: skip


def timm_models() -> list[Model]:
    """A selection of timm that has each of its ideas once."""
    return [_timm(*row) for row in _TIMM]


def _timm(name: str, kind: str, pixels: int, family: str, options: dict[str, Any]) -> Model:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return Model(name, "timm", kind, build, images(pixels), family=family)


# transformers: model class, configuration, what it is given.
_TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LONG = {**_TEXT, "intermediate_size": 128, "max_position_embeddings": 64}
_LLAMA = {**_LONG, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
_SMALL_VIT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def _tokens(batch: int = 1, length: int = 12) -> Tensor:
    return torch.randint(4, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def _text(batch: int = 1) -> dict[str, Tensor]:
    return {"input_ids": _tokens(batch), "attention_mask": torch.ones(batch, 12, dtype=torch.long)}


def _two_texts(batch: int = 1) -> dict[str, Tensor]:
    return {"input_ids": _tokens(batch), "decoder_input_ids": _tokens(batch, 7)}


def _pixels(size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch=1: {"pixel_values": images(size)(batch)}


def _clip(batch: int = 1) -> dict[str, Tensor]:
    return {**_text(batch), "pixel_values": images(32)(batch)}


def _audio(batch: int = 1) -> dict[str, Tensor]:
    return {"input_features": images(80, 60)(batch), "decoder_input_ids": _tokens(batch, 7)}


def _wave(batch: int = 1) -> dict[str, Tensor]:
    return {"input_values": images(1, 1600)(batch).flatten(1)}


_HF: list[tuple[str, str, str, dict[str, Any], Callable[[int], Any]]] = [
    ("bert", "BertForSequenceClassification", "BertConfig", _LONG, _text),
    ("bert_mlm", "BertForMaskedLM", "BertConfig", _LONG, _text),
    (
        "distilbert", "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
        _text,
    ),
    ("roberta", "RobertaForSequenceClassification", "RobertaConfig", {**_LONG, "pad_token_id": 1}, _text),
    ("albert", "AlbertForSequenceClassification", "AlbertConfig", {**_LONG, "embedding_size": 32}, _text),
    ("electra", "ElectraForSequenceClassification", "ElectraConfig", {**_LONG, "embedding_size": 32}, _text),
    ("deberta_v2", "DebertaV2ForSequenceClassification", "DebertaV2Config",
     {**_LONG, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}, _text),
    (
        "gpt2", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False}, _text,
    ),
    ("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_LONG, "use_cache": False}, _text),
    (
        "opt", "OPTForCausalLM", "OPTConfig",
        {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64, "use_cache": False}, _text,
    ),
    ("bloom", "BloomForCausalLM", "BloomConfig",
     {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False}, _text),
    ("llama", "LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}, _text),
    ("mistral", "MistralForCausalLM", "MistralConfig", {**_LLAMA, "head_dim": 16}, _text),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _LLAMA, _text),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 16}, _text),
    ("gemma", "GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 16}, _text),
    ("phi", "PhiForCausalLM", "PhiConfig", {**_LONG, "use_cache": False}, _text),
    (
        "t5", "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
         "use_cache": False, "decoder_start_token_id": 0}, _two_texts,
    ),
    (
        "bart", "BartForConditionalGeneration", "BartConfig",
        {"vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
         "use_cache": False}, _two_texts,
    ),
    ("vit", "ViTForImageClassification", "ViTConfig", _SMALL_VIT, _pixels(32)),
    ("deit", "DeiTForImageClassification", "DeiTConfig", _SMALL_VIT, _pixels(32)),
    (
        "swin", "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _pixels(32),
    ),
    (
        "convnext", "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1]}, _pixels(64),
    ),
    (
        "resnet", "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2]}, _pixels(64),
    ),
    (
        "segformer", "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4], "depths": [1, 1, 1, 1],
         "decoder_hidden_size": 32}, _pixels(64),
    ),
    ("clip", "CLIPModel", "CLIPConfig",
     {"text_config": {**_LONG, "eos_token_id": 98}, "vision_config": _SMALL_VIT, "projection_dim": 32}, _clip),
    (
        "whisper", "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 30,
         "max_target_positions": 32, "num_mel_bins": 80, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1}, _audio,
    ),
    (
        "wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {**_TEXT, "vocab_size": 32, "intermediate_size": 128, "conv_dim": [32, 32, 32], "conv_stride": [5, 2, 2],
         "conv_kernel": [10, 3, 3], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
         "apply_spec_augment": False}, _wave,
    ),
    (
        "mamba", "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_cache": False},
        lambda batch=1: {"input_ids": _tokens(batch, 6)},
    ),
]  # fmt: skip
_VISION = ("vit", "deit", "swin", "clip")


def transformers_models() -> list[Model]:
    """Models of transformers, from configurations of two small layers."""
    return [_transformers(*row) for row in _HF]


def _transformers(name: str, model: str, config: str, options: dict[str, Any], inputs: Callable[[int], Any]) -> Model:
    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    kind = "convnet" if name in ("convnext", "resnet") else "other" if name == "mamba" else "transformer"
    if kind == "convnet":
        family = "convnets"
    elif name in ("segformer", *_VISION):
        family = "vision transformers, CLIP"
    elif name in ("whisper", "wav2vec2"):
        family = "speech"
    elif name in ("t5", "bart"):
        family = "encoder-decoders"
    elif inputs is _text and any(word in model for word in ("Causal", "LMHead")):
        family = "decoders"
    else:
        family = "encoders" if kind == "transformer" else "state space"
    return Model(name, "transformers", kind, build, inputs, family=family)


def hand_models() -> list[Model]:
    """The networks of `tests.nets`."""
    from tests.nets import NETS

    return [
        Model(name, "hand", net.kind, net.build, net.inputs, family="written by hand") for name, net in NETS.items()
    ]
