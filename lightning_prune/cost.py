"""What a model costs: flops and parameters, counted in eval mode for one sample.

`flops` is what fvcore counts: one multiply-accumulate is one flop. `count` runs fvcore on a model. `CostModel` says by
arithmetic, from the shapes of one trace, what fvcore would count after a cut, to the unit.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.graph.trace import as_call, output_tensors, place, samples, undisturbed


@dataclass(frozen=True)
class Cost:
    """What one sample costs in eval mode.

    Attributes:
        flops: fvcore's count, one multiply-accumulate is one flop.
        params: number of parameters, shared ones once.
        by_layer: module path -> operator -> flops. Operators are fvcore's names ("conv", "linear", "batch_norm", ...).
    """

    flops: int
    params: int
    by_layer: Mapping[str, Mapping[str, int]]

    @property
    def conv_linear_flops(self) -> int:
        """Flops of convolutions and linear layers alone, which most papers print."""
        return sum(n for row in self.by_layer.values() for op, n in row.items() if op in ("conv", "linear"))


def count(model: nn.Module, example_inputs: Any) -> Cost:
    """Count a model with fvcore, in eval mode for one sample; nothing about the model changes.

    fvcore cannot follow a model on the meta device: the same figure is then had by arithmetic, from one trace.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs, on any device. Of tensors that
            share their first dimension the first sample is used.

    Raises:
        TraceError: if the model does not run on the example inputs.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        from lightning_prune.graph.groups import trace  # it counts by this file's arithmetic

        return trace(model, example_inputs).cost()
    args, kwargs = as_call(samples(place(example_inputs, model), 1))
    with undisturbed(model), _uncompiled(model), _quiet(), torch.enable_grad():
        model.eval()
        analysis = _analysis(_Plain(model, len(args), tuple(kwargs)), (*args, *kwargs.values()))
        try:
            total = int(analysis.total())
            layers = analysis.by_module_and_operator()
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} cannot be counted on the example input: {type(error).__name__}: {error}"
            ) from error
    by_layer = {
        name.removeprefix("model").removeprefix("."): {op: int(n) for op, n in row.items()}
        for name, row in _leaves(layers).items()
        if row
    }
    return Cost(total, sum(p.numel() for p in model.parameters()), by_layer)


def _leaves(layers: Mapping[str, Mapping[str, float]]) -> dict[str, Counter[str]]:
    """Each module's own operators: what its children count is taken off."""
    own = {name: Counter({op: int(n) for op, n in row.items()}) for name, row in layers.items()}
    for name, row in layers.items():
        if name:
            parent = name.rpartition(".")[0]
            while parent not in own and parent:
                parent = parent.rpartition(".")[0]
            own[parent].subtract({op: int(n) for op, n in row.items()})
    return {name: +row for name, row in own.items()}


class _Plain(nn.Module):
    """fvcore takes positional inputs alone, and follows no outputs but tensors in tuples."""

    def __init__(self, model: nn.Module, positional: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.positional = positional
        self.names = names

    def forward(self, *values: Any) -> tuple[Tensor, ...]:
        args, named = values[: self.positional], values[self.positional :]
        return tuple(output_tensors(self.model(*args, **dict(zip(self.names, named, strict=True)))))


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled parts run as they were: the tracer that fvcore uses cannot look into what torch has compiled."""
    saved = []
    for module in model.modules():
        own = vars(module)
        original = getattr(own.get("forward"), "_torchdynamo_orig_callable", None)
        change = {} if original is None else {"forward": original}
        if own.get("_compiled_call_impl") is not None:
            change["_compiled_call_impl"] = None
        saved.append((own, {key: own[key] for key in change}))
        own.update(change)
    try:
        yield
    finally:
        for own, before in saved:
            own.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """fvcore and the tracer it uses warn of every operator they do not count."""
    loggers = [logging.getLogger(name) for name in ("fvcore.nn.jit_analysis", "fvcore")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _analysis(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    for operator in _ATTENTION:
        analysis.set_op_handle(operator, attention_flops)
    return analysis


_ATTENTION = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)


def attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Flops of scaled dot-product attention: the two matrix products it stands for.

    A handle for `fvcore.nn.FlopCountAnalysis.set_op_handle`.
    """
    query, key, value = (v.type().sizes() for v in inputs[:3])
    products = int(np.prod(query[:-1], dtype=np.int64)) * key[-2]
    return Counter({"attention": products * (query[-1] + value[-1])})


@dataclass(frozen=True)
class CostModel:
    """Flops and parameters as a function of how many channels each group keeps.

    A size is linear in the channels kept: ``sizes = base + per_group @ kept``. A term is its coefficient times the
    product of the sizes it names.

    Attributes:
        base: (S,), the part of each size that no group changes. Size 0 is always 1.
        per_group: (S, G), indices of each size per channel of each group.
        dense: (G,), channels of each group.
        flop_coefficients, flop_sizes: (T,), (T, K): terms of the flops; unused places name size 0.
        param_coefficients, param_sizes: likewise, one term per parameter.
        labels: per flop term (module path, operator).
        rounded: (T,) bool, flop terms that fvcore counts from a figure of four digits, printed by NumPy.
    """

    base: NDArray[np.int64]
    per_group: NDArray[np.int64]
    dense: NDArray[np.int64]
    flop_coefficients: NDArray[np.int64]
    flop_sizes: NDArray[np.int64]
    param_coefficients: NDArray[np.int64]
    param_sizes: NDArray[np.int64]
    labels: Sequence[tuple[str, str]]
    rounded: NDArray[np.bool_]

    def flop_terms(self, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """(T,) flops of each term, for (G,) channels kept per group."""
        flops: NDArray[np.int64] = self.flop_coefficients * self._sizes(kept)[self.flop_sizes].prod(axis=1)
        for i in self._rounded_at:
            flops[i] = int(float(f"{flops[i] + 1:.3e}") // 2)
        return flops

    def params(self, kept: NDArray[np.int64]) -> int:
        """Number of parameters, for (G,) channels kept per group."""
        return int((self.param_coefficients * self._sizes(kept)[self.param_sizes].prod(axis=1)).sum())

    def flops_and_params(self, kept: NDArray[np.int64]) -> tuple[int, int]:
        """The two totals, for (G,) channels kept per group."""
        return int(self.flop_terms(kept).sum()), self.params(kept)

    def _sizes(self, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        sizes: NDArray[np.int64] = self.base + (self._per_channel @ kept).astype(np.int64)
        return sizes

    @cached_property
    def _per_channel(self) -> NDArray[np.float64]:
        """`per_group` as BLAS multiplies it, many times faster than integers; sizes are far below 2^53, so exact."""
        return self.per_group.astype(np.float64)

    @cached_property
    def _rounded_at(self) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.rounded)]

    def cost(self, kept: NDArray[np.int64] | None = None) -> Cost:
        """The whole cost, by layer, for (G,) channels kept per group; of the dense model by default."""
        kept = self.dense if kept is None else kept
        flops = self.flop_terms(kept)
        by_layer: dict[str, dict[str, int]] = {}
        for (module, operator), n in zip(self.labels, flops.tolist(), strict=True):
            row = by_layer.setdefault(module, {})
            row[operator] = row.get(operator, 0) + n
        return Cost(int(flops.sum()), self.params(kept), by_layer)
