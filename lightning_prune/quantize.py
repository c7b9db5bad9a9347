"""A trained, pruned model with int8 weights, made by ONNX Runtime or torchao after training.

The order is: prune, fine-tune, quantize. Nothing is pruned afterwards. Zeros stay zeros, as weights are quantized
symmetrically. What comes out computes something near to the model, not the same: its accuracy has to be measured.
"""

from __future__ import annotations

import importlib
import io
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.export import OnnxModel, export_model, needs, plain, quiet
from lightning_prune.graph.trace import as_call, place

ENGINES = ("onnxruntime", "torchao")
_RUN = 32  # samples that go through a model at a time while it is calibrated


@dataclass(frozen=True)
class Quantized:
    """A model with int8 weights.

    Attributes:
        engine: one of `ENGINES`.
        model: takes what the model takes, on the CPU; of ONNX Runtime it gives one tensor, or a tuple of several.
        bytes: of its file: the ONNX file, or the saved state dict.
        samples: it was calibrated on; 0 with torchao, which measures activations while it runs.
        reduced_range: whether weights have 7 bits, as `quantized` says.
        path: of its file, if it was asked for.
    """

    engine: str
    model: nn.Module
    bytes: int
    samples: int
    reduced_range: bool
    path: Path | None


def quantized(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    *,
    engine: Literal["onnxruntime", "torchao"] = "onnxruntime",
    samples: int = 256,
    reduce_range: bool | None = None,
    out: str | Path | None = None,
) -> Quantized:
    """Quantize a model to int8 after training.

    With ONNX Runtime norms become part of convolutions, then convolutions and linear layers compute on int8, with a
    scale for each output channel of a weight and one for each activation. With torchao linear layers do, with a scale
    for each row of activations, measured when it runs; everything else stays as it is.

    Args:
        model: dense or pruned; it is left as it is. Of a model whose ranks are still to be cut give `export.plain`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs; the first dimension is the batch.
        calibration: batches of **training** samples, not augmented, as a loader gives them: inputs, or inputs and then
            targets, or a dict; ONNX Runtime takes the range of activations from them. torchao needs none.
        engine: one of `ENGINES`.
        samples: how many to calibrate on, at most; 128 to 512 are usual.
        reduce_range: whether weights get 7 bits, as sums of 8-bit products overflow 16 bits on x86 processors without
            VNNI instructions; None asks the processor.
        out: file to write: ``.onnx``, or for torchao ``.pt``. It is not left behind after an error.

    Returns:
        The model that runs, its size, and how it was made.

    Raises:
        ValueError: for arguments that make no sense, without calibration samples, or if torchao finds no linear layer.
        ModuleNotFoundError: without the packages needed.
        TraceError: if the model cannot be exported.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples must be an int of at least 1, got {samples!r}")
    path = None if out is None else Path(out)
    suffix = ".onnx" if engine == "onnxruntime" else ".pt"
    if path is not None and path.suffix != suffix:
        raise ValueError(f"{engine} writes a {suffix} file, got out={str(path)!r}")
    if engine == "torchao":
        return _by_torchao(model, example_inputs, path)
    needs("onnx", "onnxscript", "onnxruntime", extra="export")
    if calibration is None:
        raise ValueError("ONNX Runtime takes the ranges of activations from training samples: pass calibration=")
    reduced = _overflows() if reduce_range is None else reduce_range
    with TemporaryDirectory(dir=_folder(path), prefix=".quantize-") as aside:
        done, seen = _by_onnxruntime(model, example_inputs, calibration, samples, reduced, Path(aside))
        size, ran = done.stat().st_size, OnnxModel(done)
        _check_runs(ran, plain(model, example_inputs).model, example_inputs)
        if path is not None:
            os.replace(done, path)
    return Quantized(engine, ran, size, seen, reduced, path)


def _folder(path: Path | None) -> Path | None:
    """Where to write aside: beside the file, so that it moves there at once."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return None if path is None else path.parent


def _by_onnxruntime(
    model: nn.Module, example_inputs: Any, calibration: Iterable[Any], samples: int, reduced: bool, aside: Path
) -> tuple[Path, int]:
    """The quantized file, and how many samples it was calibrated on."""
    quantization = importlib.import_module("onnxruntime.quantization")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")
    whole = export_model(model, example_inputs, aside, to=["onnx"], name="whole")["onnx"].path
    ready, done = aside / "ready.onnx", aside / "int8.onnx"
    reader = _Reader(OnnxModel(whole), _inputs(example_inputs, calibration, samples))
    with quiet():
        shapes.quant_pre_process(str(whole), str(ready))
        quantization.quantize_static(
            str(ready),
            str(done),
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduced,
            weight_type=quantization.QuantType.QInt8,
        )
    return done, reader.samples


class _Reader:
    """Gives ONNX Runtime its calibration samples; it asks for ``get_next`` alone.

    Raises:
        ValueError: when made, if there is no sample at all.
    """

    def __init__(self, whole: OnnxModel, inputs: Iterator[Any]) -> None:
        self.samples = 0
        self._whole, self._inputs = whole, inputs
        self._next = self._fed()
        if self._next is None:
            raise ValueError("calibration has no batch; pass training samples")

    def get_next(self) -> dict[str, Any] | None:
        given = self._next
        if given is not None:
            self._next = self._fed()
        return given

    def _fed(self) -> dict[str, Any] | None:
        inputs = next(self._inputs, None)
        if inputs is None:
            return None
        args, kwargs = as_call(inputs)
        feeds = self._whole.feeds(*args, **kwargs)
        self.samples += len(next(iter(feeds.values())))
        return feeds


def _inputs(example_inputs: Any, calibration: Iterable[Any], samples: int) -> Iterator[Any]:
    """Inputs as the model takes them out of batches, some samples at a time, up to a number of samples."""
    left = samples
    for batch in calibration:
        inputs = inputs_of(batch, example_inputs)
        size = min(left, len(_leaf(inputs)))
        for start in range(0, size, _RUN):
            rows = slice(start, min(start + _RUN, size))
            yield tree_map(lambda x, rows=rows: x[rows] if isinstance(x, Tensor) else x, inputs)
        left -= size
        if left == 0:
            return


def inputs_of(batch: Any, example_inputs: Any) -> Any:
    """The part of a batch that the model takes: by name, or as many as it takes from its beginning.

    Example:
        >>> inputs_of((torch.ones(2, 3), torch.zeros(2)), torch.zeros(1, 3)).shape
        torch.Size([2, 3])
    """
    try:
        if isinstance(example_inputs, dict):
            return {key: batch[key] for key in example_inputs}
        many = isinstance(example_inputs, tuple)
        if isinstance(batch, Tensor):
            return (batch,) if many else batch
        return tuple(batch[: len(example_inputs)]) if many else batch[0]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"a calibration batch is a {type(batch).__name__} that does not hold the model's inputs "
            f"({type(error).__name__}: {error}); pass batches of inputs as the example inputs are"
        ) from error


def _leaf(inputs: Any) -> Tensor:
    args, kwargs = as_call(inputs)
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if found is None or not found.ndim:
        raise ValueError(f"a calibration batch holds no tensor of samples, got {type(inputs).__name__}")
    return found


def _by_torchao(model: nn.Module, example_inputs: Any, path: Path | None) -> Quantized:
    with quiet():
        needs("torchao", extra="int8")
    simple = plain(model, example_inputs).model
    if not any(isinstance(module, nn.Linear) for module in simple.modules()):
        raise ValueError(
            f"torchao quantizes linear layers, and {type(model).__name__} has none; use engine='onnxruntime'"
        )
    whole = plain(model, example_inputs).model
    with quiet():
        quantization: Any = importlib.import_module("torchao.quantization")
        quantization.quantize_(simple, quantization.Int8DynamicActivationInt8WeightConfig())
    _check_runs(simple, whole, example_inputs)
    buffer = io.BytesIO()
    torch.save(simple.state_dict(), buffer)
    if path is not None:
        with TemporaryDirectory(dir=_folder(path), prefix=".quantize-") as aside:
            (Path(aside) / path.name).write_bytes(buffer.getvalue())
            os.replace(Path(aside) / path.name, path)
    return Quantized("torchao", simple, buffer.getbuffer().nbytes, 0, False, path)


def _check_runs(done: nn.Module, whole: nn.Module, example_inputs: Any) -> None:
    """See that it runs and gives finite numbers of the right shapes; that they are the right numbers only data can say.

    Raises:
        RuntimeError: if not.
    """
    args, kwargs = as_call(place(example_inputs, whole))
    with torch.no_grad():
        got, right = done(*args, **kwargs), whole(*args, **kwargs)
    for value, wanted in zip(_tensors(got), _tensors(right), strict=True):
        if value.shape != wanted.shape or not bool(value.isfinite().all()):
            raise RuntimeError(
                f"the quantized {type(whole).__name__} gives {tuple(value.shape)} with "
                f"{int((~value.isfinite()).sum())} numbers that are not finite, the model {tuple(wanted.shape)}"
            )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value
    return [tensor for item in values for tensor in _tensors(item)]


def _overflows() -> bool:
    """Whether the processor adds products of 8-bit numbers in 16 bits; where that is not known, x86 is taken to."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    asked = getattr(torch.cpu, "_is_vnni_supported", None)
    return not (asked is not None and asked())
