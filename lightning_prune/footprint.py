"""What a network would take to store and to run, by arithmetic: sizes of sparse files, and a proxy of energy.

Nothing here is measured. An energy proxy ranks designs for one kind of hardware; it is no measurement of any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from lightning_prune.cost import Cost

Encoding = Literal["dense", "bitmap", "csr"]

_MAC_PJ = {32: 3.7 + 0.9, 8: 0.2 + 0.1}  # bits -> a multiplication and an addition: float32; int8, added up in int32
_DRAM_PJ = 640.0  # a word of 32 bits
_ROW_POINTER_BITS = 32
_SCALE_BITS = 32


@dataclass(frozen=True)
class EnergyProxy:
    """Energy of one sample by the proxy ``E = MACs * e_mac + words * e_mem``, in nanojoules; not measured.

    Attributes:
        compute_nj: of the multiply-accumulates of convolutions and linear layers.
        memory_nj: of reading each weight once from DRAM, and the activations that were named.
    """

    compute_nj: float
    memory_nj: float

    @property
    def total_nj(self) -> float:
        """Of both."""
        return self.compute_nj + self.memory_nj


def energy(cost: Cost, *, bits: int = 32, activations: int = 0) -> EnergyProxy:
    """Energy proxy of one sample, with Horowitz's figures for 45 nm (ISSCC 2014).

    A multiply-accumulate takes 3.7 + 0.9 pJ in float32 and 0.2 + 0.1 pJ in int8 that adds up in int32; a word of 32
    bits from DRAM 640 pJ.

    Args:
        cost: of the network, from `lightning_prune.count` or a graph's ``cost(plan)``.
        bits: of a weight and an activation, 32 or 8.
        activations: values read from or written to DRAM beside the weights; 0 counts weights alone.

    Raises:
        ValueError: if ``bits`` is neither, or ``activations`` is negative.
    """
    if bits not in _MAC_PJ:
        raise ValueError(f"bits must be 32 (float32) or 8 (int8), got {bits!r}")
    if activations < 0:
        raise ValueError(f"activations must be a count of values of at least 0, got {activations}")
    words = (cost.params + activations) * bits / 32
    return EnergyProxy(cost.conv_linear_flops * _MAC_PJ[bits] / 1000, words * _DRAM_PJ / 1000)


def storage_bits(
    elements: int, nonzero: int, encoding: Encoding = "dense", bits: int = 32, *, rows: int = 0, index_bits: int = 16
) -> int:
    """Count the bits of one tensor: dense ``N b``, bitmap ``N + nnz b``, CSR ``nnz (b + i) + 32 (rows + 1)``.

    Args:
        elements: N, of the tensor.
        nonzero: nnz, how many of them are kept.
        encoding: "dense", "bitmap" or "csr".
        bits: b, of a value.
        rows: of the matrix, for CSR.
        index_bits: i, of a column index, for CSR.

    Raises:
        ValueError: for another encoding, or counts that cannot be.

    Example:
        >>> storage_bits(1000, 100, "bitmap"), storage_bits(1000, 100, "bitmap", 8)
        (4200, 1800)
    """
    if encoding not in get_args(Encoding):
        raise ValueError(f"encoding must be one of {', '.join(get_args(Encoding))}, got {encoding!r}")
    if not 0 <= nonzero <= elements or bits < 1 or rows < 0 or index_bits < 1:
        raise ValueError(
            f"wanted 0 <= nonzero <= elements and bits of at least 1, got {nonzero} of {elements}, bits={bits}, "
            f"rows={rows}, index_bits={index_bits}"
        )
    if encoding == "dense":
        return elements * bits
    if encoding == "bitmap":
        return elements + nonzero * bits
    return nonzero * (bits + index_bits) + (rows + 1) * _ROW_POINTER_BITS


def storage_bytes(
    model: nn.Module,
    encoding: Encoding = "dense",
    bits: int = 32,
    *,
    masks: Mapping[str, Tensor] | None = None,
    index_bits: int = 16,
) -> int:
    """Count the bytes of a model's parameters in an encoding, shared ones once, without a file format's overhead.

    Weights, the parameters with more than one dimension, are encoded: rows are their output channels, and below 32
    bits each row has a scale of 32 bits beside it. Biases and norms stay dense at 32 bits. A sparse encoding is taken
    where it is asked for, also where dense would be smaller.

    Args:
        model: any module; channels that were cut are not in it.
        encoding: see `storage_bits`, as for ``index_bits``.
        bits: of a weight.
        masks: parameter -> bool, True = keep, as ``plan.masks`` has them; parameters without one, and all by default,
            keep what is not zero.

    Raises:
        ValueError: for another encoding, if a mask is of no parameter or of another shape, or if a row is too long for
            the indices.
    """
    masks = masks or {}
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or mask.shape != parameters[name].shape:
            shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, the model has {shape}")
    total = 0
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            total += parameter.numel() * 32
            continue
        rows = parameter.shape[0]
        if encoding == "csr" and parameter.numel() > rows * 2**index_bits:
            raise ValueError(
                f"a row of {name!r} has {parameter.numel() // rows} columns, more than indices of {index_bits} bits "
                "tell apart; raise index_bits"
            )
        nonzero = int(masks.get(name, parameter).count_nonzero())
        scales = 0 if bits >= 32 else rows * _SCALE_BITS
        total += storage_bits(parameter.numel(), nonzero, encoding, bits, rows=rows, index_bits=index_bits) + scales
    return -(-total // 8)
