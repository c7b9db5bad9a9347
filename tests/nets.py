"""Small networks, each for one thing a channel graph has to get right, with inputs for them.

`NETS` has them by name. Weights are random: seed before `build`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Example:
    """How a network is built, and batch size -> what it is given; kind is "convnet", "transformer" or "other"."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    kind: str


def normal(*shape: int) -> Callable[[int], Tensor]:
    """Batch size -> seeded normal values of (B, *shape)."""
    return lambda batch=1: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def tokens(length: int = 6, count: int = 20) -> Callable[[int], Tensor]:
    """Batch size -> (B, length) seeded integers below count."""
    return lambda batch=1: torch.randint(count, (batch, length), generator=torch.Generator().manual_seed(1))


def conv(ins: int, outs: int, size: int = 3, **options: Any) -> nn.Sequential:
    """Convolution that keeps the size, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(ins, outs, size, padding=size // 2, **options), nn.BatchNorm2d(outs), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up, with skips by concatenation and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up2, self.join2 = nn.ConvTranspose2d(16, 12, 2, 2), conv(24, 12)
        self.up1, self.join1 = nn.Upsample(scale_factor=2), conv(20, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = self.join2(torch.cat([self.up2(c), b], 1))
        return self.head(self.join1(torch.cat([self.up1(b), a], 1)))


class Recurrent(nn.Module):
    """A sequence classifier: projection, LSTM or GRU, the mean over time."""

    def __init__(self, cell: type[nn.RNNBase], **options: Any):
        super().__init__()
        self.inner = nn.Linear(5, 8)
        self.rnn = cell(8, 12, batch_first=True, **options)
        self.fc = nn.Linear(24 if options.get("bidirectional") else 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(F.relu(self.inner(x)))
        return self.fc(out.mean(1))


class LastState(nn.Module):
    """A classifier of the last hidden state of an LSTM over embedded tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.rnn(self.embedding(x))
        return self.fc(h[-1])


class Cells(nn.Module):
    """A loop over time with an LSTMCell and a GRUCell."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.first, self.second = nn.LSTMCell(5, 8), nn.GRUCell(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c, g = (x.new_zeros(len(x), self.width) for _ in range(3))
        for t in range(x.shape[1]):
            h, c = self.first(x[:, t], (h, c))
            g = self.second(h, g)
        return self.fc(g)


class Conv1dNet(nn.Module):
    """Dilated convolutions over time, gated, with a residual stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv1d(4, 8, 5, padding=2), nn.BatchNorm1d(8)
        self.filter = nn.Conv1d(8, 12, 3, padding=2, dilation=2)
        self.gate = nn.Conv1d(8, 12, 3, padding=2, dilation=2)
        self.out = nn.Conv1d(12, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.out(torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x)))
        return self.fc(x.mean(-1))


class Conv3dNet(nn.Module):
    """Volumes: two convolutions, one of them factored over space and time, and a flatten before the classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.space = nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1))
        self.time, self.bn2 = nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(6)
        self.fc = nn.Linear(6 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.time(F.relu(self.space(x)))))
        return self.fc(F.adaptive_avg_pool3d(x, 2).flatten(1))


class Transposed(nn.Module):
    """Transposed convolutions, the second in groups, the third depthwise."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.up1 = nn.ConvTranspose2d(8, 12, 2, 2)
        self.up2, self.bn = nn.ConvTranspose2d(12, 8, 2, 2, groups=2), nn.BatchNorm2d(8)
        self.up3 = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up1(self.stem(x)))
        return self.head(F.relu(self.up3(F.relu(self.bn(self.up2(x))))))


class PixelShuffled(nn.Module):
    """Four channels become four pixels of one; by the layer, or by views and a permutation."""

    def __init__(self, by_hand: bool = False):
        super().__init__()
        self.stem, self.widen = conv(3, 8), nn.Conv2d(8, 24, 3, padding=1)
        self.shuffle = None if by_hand else nn.PixelShuffle(2)
        self.body, self.head = conv(6, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(self.stem(x))
        if self.shuffle is not None:
            x = self.shuffle(x)
        else:
            b, c, h, w = x.shape
            x = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        return self.head(self.body(F.relu(x)))


class Unshuffled(nn.Module):
    """Space to depth: four pixels become four channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = conv(3, 6), conv(24, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(F.pixel_unshuffle(self.stem(x), 2)).mean((2, 3)))


class Glu(nn.Module):
    """Gated linear units: the first half of the channels times the sigmoid of the second, by the layer and by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.conv(x), 1).mean((2, 3))
        a, b = self.fc1(x).chunk(2, -1)
        return self.fc2(a * F.gelu(b))


class WeightNormed(nn.Module):
    """Weights as directions and lengths, beside a plain layer."""

    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.conv1 = norm(nn.Conv2d(3, 8, 3, padding=1))
        self.conv2 = norm(nn.Conv2d(8, 8, 3, padding=1))
        self.fc = norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class SpectralNormed(nn.Module):
    """Weights divided by their largest singular value."""

    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.conv1 = norm(nn.Conv2d(3, 8, 3, padding=1))
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1, self.fc2 = norm(nn.Linear(8, 12)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3))
        return self.fc2(F.relu(self.fc1(x)))


class AttentionBlock(nn.Module):
    """A transformer's block with `nn.MultiheadAttention`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm1, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` with keys and values of other widths than the queries; its weights are an output too."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=12)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1)
        out, weights = self.attention(self.queries(x), F.relu(self.keys(x)), F.relu(self.values(x)))
        return self.head(out).transpose(0, 1), weights


class EncoderDecoder(nn.Module):
    """`nn.Transformer` between embeddings and an output layer."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.source(source), self.target(target)))


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, norms first, with positions that are learned."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Linear(6, 16), nn.Parameter(0.1 * torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.positions).mean(1))


class EinsumAttention(nn.Module):
    """Attention written with `torch.einsum` over bare parameters that have an axis of heads."""

    def __init__(self, width: int = 16, heads: int = 4, inner: int = 4):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, inner) / width**0.5) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, inner, width) / width**0.5)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)
        self.scale = inner**-0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (torch.einsum("btc,chd->bthd", y, w) for w in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale, -1)
        x = x + torch.einsum("bqhd,hdc->bqc", torch.einsum("bhqk,bkhd->bqhd", weights, v), self.o)
        return self.head(x.mean(1))


class FusedAttention(nn.Module):
    """Attention as most vision transformers write it: one layer for query, key and value, and a number of heads."""

    def __init__(self, width: int = 16, heads: int = 4):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, -1))
        return self.head(x.mean(1))


class GroupedQueryAttention(nn.Module):
    """Four heads of queries read two heads of keys and values."""

    def __init__(self, width: int = 16, heads: int = 4, shared: int = 2, inner: int = 4):
        super().__init__()
        self.heads, self.shared, self.inner = heads, shared, inner
        self.embed = nn.Linear(6, width)
        self.q, self.k = nn.Linear(width, heads * inner), nn.Linear(width, shared * inner)
        self.v, self.o = nn.Linear(width, shared * inner), nn.Linear(heads * inner, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.inner).transpose(1, 2)
        k = self.k(x).view(b, n, self.shared, self.inner).transpose(1, 2)
        v = self.v(x).view(b, n, self.shared, self.inner).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.o(y.transpose(1, 2).reshape(b, n, -1))).mean(1))


class SharedBranches(nn.Module):
    """One convolution reads two maps, and a tied linear layer is used both ways."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.shared = conv(3, 8), conv(3, 8), conv(8, 12)
        self.fc, self.back, self.head = nn.Linear(12, 10, bias=False), nn.Linear(10, 12, bias=False), nn.Linear(12, 3)
        self.alias = self.fc

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.left(x)) + self.shared(F.max_pool2d(self.right(x), 3, 1, 1))
        y = F.relu(self.fc(y.mean((2, 3))))
        y = F.relu(F.linear(y, self.fc.weight.t()))
        return self.head(y + F.relu(self.back(F.relu(self.alias(y)))))


class NestedOutputs(nn.Module):
    """A dict of a tensor, a tuple and a list of dicts."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 8), conv(8, 8)
        self.boxes, self.classes, self.mask = nn.Conv2d(8, 4, 1), nn.Linear(8, 3), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a = self.stem(x)
        b = self.body(a)
        return {
            "classes": self.classes(b.mean((2, 3))),
            "pair": (self.boxes(b), [{"mask": self.mask(a)}]),
            "none": None,
        }


class Checkpointed(nn.Module):
    """Blocks whose activations are computed anew for the backward."""

    def __init__(self):
        super().__init__()
        self.stem, self.block1, self.block2, self.fc = conv(3, 8), conv(8, 12), conv(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block1, x, use_reentrant=False)
        x = checkpoint(self.block2, x, use_reentrant=False)
        return self.fc(x.mean((2, 3)))


class SeveralInputs(nn.Module):
    """An image, numbers and an optional mask, the last by keyword."""

    def __init__(self):
        super().__init__()
        self.image, self.numbers, self.bias = conv(3, 8), nn.Linear(5, 8), nn.Parameter(torch.randn(8, 1, 1))
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, image: Tensor, numbers: Tensor, mask: Tensor | None = None) -> Tensor:
        a = self.image(image) * torch.sigmoid(self.bias)
        if mask is not None:
            a = a * mask
        b = F.relu(self.numbers(numbers))
        return self.fc2(F.relu(self.fc1(torch.cat([a.mean((2, 3)), b], 1))))


class Plain(nn.Module):
    """Two convolutions and a hidden layer: what is built in half precision, or without memory."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 12)
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.conv2(self.conv1(x)).mean((2, 3)))))


class RMSNorm(nn.Module):
    """Root mean square norm, as Llama writes it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class DecoderLayer(nn.Module):
    """Causal attention with rotated queries and keys, then a SwiGLU."""

    def __init__(self, width: int = 16, heads: int = 4, hidden: int = 24):
        super().__init__()
        self.heads, self.inner = heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        half = self.inner // 2
        angles = torch.outer(torch.arange(x.shape[2]), 100.0 ** -(torch.arange(half) / half)).to(x)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, n, self.heads, self.inner).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layers, self.norm = nn.ModuleList([DecoderLayer(), DecoderLayer()]), RMSNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class ChannelShuffled(nn.Module):
    """Convolutions in groups that exchange channels between them, as ShuffleNet writes it."""

    def __init__(self, groups: int = 2):
        super().__init__()
        self.groups = groups
        self.stem, self.conv1 = conv(3, 8), conv(8, 12, groups=groups)
        self.conv2, self.fc = conv(12, 12, groups=groups), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.stem(x))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.fc(self.conv2(x).mean((2, 3)))


class ValueDependent(nn.Module):
    """Which block runs, and how often, depends on the values of the input."""

    def __init__(self):
        super().__init__()
        self.stem, self.dark, self.bright, self.fc = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.bright(y) if x.mean() > 0 else self.dark(y)
        for _ in range(int(x.abs().max().item()) % 3):
            y = y + self.dark(y)
        return self.fc(y.mean((2, 3)))


class Compiled(nn.Module):
    """A block under `torch.compile` between others that are not."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv(3, 8), nn.Linear(8, 3)
        self.block = torch.compile(nn.Sequential(conv(8, 12), conv(12, 8)), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class PaddedShortcuts(nn.Module):
    """He et al.'s network for CIFAR, a block a stage: shortcuts subsample and pad with zero channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv(3, 8, bias=False), nn.Linear(16, 3)
        self.block1, self.block2 = PaddedBlock(8, 8), PaddedBlock(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class PaddedBlock(nn.Module):
    """Two convolutions beside a shortcut without parameters."""

    def __init__(self, width: int, planes: int):
        super().__init__()
        self.stride, self.pad = (1, 0) if width == planes else (2, (planes - width) // 2)
        self.conv1 = conv(width, planes, stride=self.stride, bias=False)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.conv1(x)))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class SqueezeExcite(nn.Module):
    """Inverted bottlenecks with depthwise convolutions and gates computed from the pooled map."""

    def __init__(self):
        super().__init__()
        self.stem, self.widen, self.depth = conv(3, 8), conv(8, 24, 1), conv(24, 24, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.narrow, self.norm, self.fc = nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depth(self.widen(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.fc((x + self.norm(self.narrow(y))).mean((2, 3)))


class GroupNormed(nn.Module):
    """Norms in groups of channels, and weights standardised by hand."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(1, 12)
        self.fc, self.scale = nn.Linear(12, 3), math.sqrt(8 * 3 * 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        w = self.conv2.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / self.scale
        return self.fc(F.relu(self.norm2(F.conv2d(x, w, self.conv2.bias, padding=1))).mean((2, 3)))


class Mixer(nn.Module):
    """An MLP over tokens and one over channels, in turn."""

    def __init__(self, patches: int = 16, width: int = 12):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.tokens = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(patches, 8), nn.GELU(), nn.Linear(8, patches)),
        )
        self.norm2, self.channels = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)),
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


def _several(batch: int = 1) -> dict[str, Tensor]:
    return {"image": normal(3, 8, 8)(batch), "numbers": normal(5)(batch), "mask": normal(1, 8, 8)(batch).sigmoid()}


def _two_texts(batch: int = 1) -> tuple[Tensor, Tensor]:
    return tokens(6)(batch), tokens(4)(batch)


def _meta() -> nn.Module:
    with torch.device("meta"):
        return Plain()


def _in(dtype: torch.dtype) -> Example:
    return Example(lambda: Plain().to(dtype), lambda batch=1: normal(3, 8, 8)(batch).to(dtype), "convnet")


_IMAGE, _SEQUENCE = normal(3, 16, 16), normal(5, 6)

NETS: dict[str, Example] = {
    "unet": Example(UNet, _IMAGE, "convnet"),
    "lstm": Example(lambda: Recurrent(nn.LSTM), normal(5, 5), "other"),
    "lstm_stacked": Example(lambda: Recurrent(nn.LSTM, num_layers=2), normal(5, 5), "other"),
    "lstm_bidirectional": Example(lambda: Recurrent(nn.LSTM, bidirectional=True), normal(5, 5), "other"),
    "lstm_last_state": Example(LastState, tokens(), "other"),
    "gru": Example(lambda: Recurrent(nn.GRU), normal(5, 5), "other"),
    "gru_stacked_bidirectional": Example(
        lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), normal(5, 5), "other"
    ),
    "recurrent_cells": Example(Cells, normal(4, 5), "other"),
    "conv1d": Example(Conv1dNet, normal(4, 20), "convnet"),
    "conv3d": Example(Conv3dNet, normal(2, 4, 6, 6), "convnet"),
    "transposed": Example(Transposed, normal(3, 4, 4), "convnet"),
    "pixel_shuffle": Example(PixelShuffled, normal(3, 6, 6), "convnet"),
    "pixel_shuffle_by_hand": Example(lambda: PixelShuffled(by_hand=True), normal(3, 6, 6), "convnet"),
    "pixel_unshuffle": Example(Unshuffled, normal(3, 8, 8), "convnet"),
    "glu": Example(Glu, normal(3, 8, 8), "convnet"),
    "weight_norm": Example(WeightNormed, normal(3, 8, 8), "convnet"),
    "spectral_norm": Example(SpectralNormed, normal(3, 8, 8), "convnet"),
    "squeeze_excite": Example(SqueezeExcite, normal(3, 8, 8), "convnet"),
    "group_norm": Example(GroupNormed, normal(3, 8, 8), "convnet"),
    "padded_shortcuts": Example(PaddedShortcuts, normal(3, 8, 8), "convnet"),
    "channel_shuffle": Example(ChannelShuffled, normal(3, 8, 8), "convnet"),
    "shared_branches": Example(SharedBranches, normal(3, 8, 8), "convnet"),
    "nested_outputs": Example(NestedOutputs, normal(3, 8, 8), "convnet"),
    "checkpointed": Example(Checkpointed, normal(3, 8, 8), "convnet"),
    "several_inputs": Example(SeveralInputs, _several, "convnet"),
    "value_dependent": Example(ValueDependent, normal(3, 8, 8), "convnet"),
    "compiled": Example(Compiled, normal(3, 8, 8), "convnet"),
    "bfloat16": _in(torch.bfloat16),
    "float16": _in(torch.float16),
    "meta": Example(_meta, lambda batch=1: torch.empty(batch, 3, 8, 8, device="meta"), "convnet"),
    "multihead_attention": Example(AttentionBlock, _SEQUENCE, "transformer"),
    "cross_attention": Example(CrossAttention, _SEQUENCE, "transformer"),
    "fused_attention": Example(FusedAttention, _SEQUENCE, "transformer"),
    "einsum_attention": Example(EinsumAttention, _SEQUENCE, "transformer"),
    "grouped_query_attention": Example(GroupedQueryAttention, _SEQUENCE, "transformer"),
    "transformer": Example(EncoderDecoder, _two_texts, "transformer"),
    "transformer_encoder": Example(Encoder, _SEQUENCE, "transformer"),
    "decoder": Example(Decoder, tokens(), "transformer"),
    "mixer": Example(Mixer, _IMAGE, "transformer"),
}
