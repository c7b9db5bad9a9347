"""The networks of a report in ONNX Runtime, in float32 and in int8: as they would be shipped to a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from typing_extensions import override

from lightning_prune.export import OnnxModel, export_model, plain
from lightning_prune.quantize import quantized

SAMPLES = 256


@dataclass(frozen=True)
class Engine:
    """A network as an engine runs it.

    Attributes:
        name: what to call it.
        of: the network it was made of.
        model: takes what the network takes.
        bytes: of its file.
    """

    name: str
    of: str
    model: nn.Module
    bytes: int


def in_onnxruntime(
    name: str, model: nn.Module, inputs: Any, calibration: Iterable[Any], folder: Path, threads: int
) -> list[Engine]:
    """A network in ONNX Runtime: float32, and int8 calibrated on `SAMPLES` training samples.

    Args:
        name: of the network.
        model: dense or pruned; it is left as it is.
        inputs: example inputs.
        calibration: batches of training samples.
        folder: where files may be written.
        threads: within an operator.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)  # the engine takes torch's when it starts
        part = plain(model, inputs).model
        whole = export_model(part, inputs, folder, to=["onnx"])["onnx"]
        small = quantized(part, inputs, calibration, samples=SAMPLES)
        return [
            Engine(f"{name}, ONNX Runtime", name, OnnxModel(whole.path), whole.bytes),
            Engine(f"{name}, ONNX Runtime, int8", name, small.model, small.bytes),
        ]
    finally:
        torch.set_num_threads(before)


def training_samples(data: pl.LightningDataModule) -> list[Any]:
    """Batches to calibrate on, of the training data as the loader gives them."""
    data.prepare_data()
    data.setup("fit")
    batches, seen = [], 0
    for batch in data.train_dataloader():
        batches.append(batch)
        first = batch[0] if isinstance(batch, list | tuple) else batch
        seen += len(first) if isinstance(first, torch.Tensor) else 1
        if seen >= SAMPLES:
            break
    return batches


def standing_in(module: pl.LightningModule, engine: Engine) -> pl.LightningModule:
    """A copy of a module whose ``forward`` is an engine's."""
    shell = copy.deepcopy(module)
    counted = Counted(engine.model)
    vars(shell)["forward"] = counted
    vars(shell)["engine_calls"] = counted
    return shell


def refuse_bypassed(shell: pl.LightningModule, engine: Engine) -> None:
    """Make sure that what was tested is what the engine computed.

    Raises:
        ValueError: if the module's ``test_step`` went another way than ``self(...)``.
    """
    if not vars(shell)["engine_calls"].calls:
        raise ValueError(
            f"{engine.name} could not be tested: test_step of {type(shell).__name__} does not call self(...), so that "
            "what was tested would be the network of before; call the module there, or leave --int8 out"
        )


class Counted(nn.Module):
    """A model that knows whether it was called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.model(*args, **kwargs)
