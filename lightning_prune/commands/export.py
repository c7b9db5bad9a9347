"""Write a checkpoint in forms that load where lightning-prune is not installed, each compared with the model first.

    lightning-prune export best.ckpt --model my.Net --out exported
    lightning-prune export best.ckpt --model my.Net --input 1,3,32,32 --to onnx --fold-bn --out exported
    lightning-prune export best.ckpt --config config.yaml --int8 onnxruntime --calibration my.Data --out exported

model.pt is a state dict; load_model.py beside it, which needs torch alone, loads it into the model's class. model.pt2
is a torch.export program, model.onnx is for ONNX Runtime and others, model.int8.onnx has int8 weights. All take any
batch size. Nothing is written unless outputs are those of the checkpoint. int8 alone may differ; it is said how much.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.checkpoint import load_into, plan_of, read_checkpoint
from lightning_prune.commands.explain import add_input, example_inputs, from_config, imported, made
from lightning_prune.decision import Plan
from lightning_prune.export import FORMS, TOLERANCE, Exported, export_model, plain
from lightning_prune.graph.trace import as_call
from lightning_prune.quantize import ENGINES, Quantized, inputs_of, quantized
from lightning_prune.report import markdown_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of Lightning, or a plain state dict")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PATH", help="dotted path of a class or function that makes the model")
    what.add_argument("--config", type=Path, metavar="YAML", help="a LightningCLI config; its model section is used")
    parser.add_argument(
        "--arguments", default="{}", metavar="JSON", help="keyword arguments for --model, over those in the checkpoint"
    )
    parser.add_argument("--module", metavar="NAME", help="export this part of the model alone, such as net")
    add_input(parser)
    parser.add_argument("--to", nargs="+", choices=FORMS, default=list(FORMS), help="what to write (all)")
    parser.add_argument("--fold-bn", action="store_true", help="make norms part of the layers before them")
    parser.add_argument("--fixed-batch", action="store_true", help="the batch size is that of the example, for good")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="F",
        help="largest difference of outputs, as a fraction of the largest output (%(default)s)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX (the exporter's)")
    parser.add_argument("--int8", choices=ENGINES, help="also write the model with int8 weights")
    parser.add_argument(
        "--calibration",
        metavar="PATH",
        help="training samples for int8: dotted path of a LightningDataModule class, or of a function that gives "
        "batches; or a .pt file of one tensor of samples",
    )
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="to calibrate on, at most (%(default)s)")
    parser.add_argument("--name", default="model", help="of the files, before their suffixes (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")


def run(options: argparse.Namespace) -> int:
    """Write what was asked for, and print what was compared.

    Raises:
        ValueError: if the model or the calibration samples cannot be made from what was given.
        IncompatibleCheckpoint: if the checkpoint is not of that model.
        TraceError: if torch cannot export the model.
        UnequalExport: if a form computes something else.
    """
    if options.int8 == "onnxruntime" and options.calibration is None:
        raise ValueError("--int8 onnxruntime takes the ranges of activations from training samples: give --calibration")
    loaded = _loaded(options)
    inputs = example_inputs(loaded.inputs_of, options.input)
    done = export_model(
        loaded.model,
        inputs,
        options.out,
        to=options.to,
        name=options.name,
        fold_bn=options.fold_bn,
        plan=loaded.plan,
        build=loaded.build,
        dynamic_batch=not options.fixed_batch,
        tolerance=options.tolerance,
        opset=options.opset,
    )
    rows = [_row(one) for one in done.values()]
    if options.int8 is not None:
        shipped = plain(loaded.model, inputs, fold_bn=options.fold_bn, plan=loaded.plan).model
        rows.append(_int8(options, shipped, inputs))
    print(markdown_table(rows))
    print(f"\nwritten: {options.out}")
    return 0


@dataclass(frozen=True)
class _Loaded:
    """A model with a checkpoint's weights, how to make it anew, the checkpoint's plan, and who knows its inputs."""

    model: nn.Module
    build: Callable[[], nn.Module]
    plan: Plan | None
    inputs_of: nn.Module


def _loaded(options: argparse.Namespace) -> _Loaded:
    checkpoint = read_checkpoint(options.checkpoint)
    known = checkpoint.get("hyper_parameters")

    def build() -> nn.Module:
        if options.config is not None:
            return from_config(options.config)[1]
        return made(options.model, options.arguments, known if isinstance(known, dict) else {})[1]

    whole = build()
    load_into(whole, checkpoint)
    plan = plan_of(checkpoint)
    if options.module is None:
        return _Loaded(whole, build, plan, whole)
    try:
        part = whole.get_submodule(options.module)
    except AttributeError as error:
        raise ValueError(f"--module {options.module}: {error}") from error
    if plan is not None and plan.ranks:
        raise ValueError("--module does not go with a checkpoint of layers that become two; export the whole model")
    return _Loaded(part, lambda: build().get_submodule(options.module), None, whole)


def _row(done: Exported) -> dict[str, Any]:
    batches = " and ".join(map(str, done.batch_sizes)) or "as the example"
    return {
        "": done.path.name,
        "bytes": done.bytes,
        "largest difference": f"{done.difference:.2g}",
        "allowed": f"{done.tolerance:g}",
        "batch sizes": batches,
    }


def _int8(options: argparse.Namespace, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Quantize, and say how far outputs on calibration samples moved."""
    batches = None if options.calibration is None else _batches(options.calibration)
    first = None
    if batches is not None:
        batches = iter(batches)
        first = next(batches, None)
        batches = chain([] if first is None else [first], batches)
    suffix = "onnx" if options.int8 == "onnxruntime" else "pt"
    made_int8 = quantized(
        model,
        inputs,
        batches,
        engine=options.int8,
        samples=options.samples,
        out=options.out / f"{options.name}.int8.{suffix}",
    )
    given = inputs if first is None else inputs_of(first, inputs)
    assert made_int8.path is not None
    return {
        "": made_int8.path.name,
        "bytes": made_int8.bytes,
        "largest difference": f"{_moved(made_int8, model, given):.2g}",
        "allowed": "any",
        "batch sizes": str(len(tree_leaves(as_call(given))[0])),
    }


def _moved(done: Quantized, model: nn.Module, inputs: Any) -> float:
    """The largest difference of outputs, as a fraction of the largest output."""
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        pairs = zip(tree_leaves(done.model(*args, **kwargs)), tree_leaves(model(*args, **kwargs)), strict=True)
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def _batches(path: str) -> Iterable[Any]:
    """Training batches from what ``--calibration`` names."""
    if path.endswith(".pt"):
        samples = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(samples, Tensor):
            raise ValueError(f"--calibration {path} holds a {type(samples).__name__}, one tensor of samples is wanted")
        return [samples]
    found: Any = imported(path, "--calibration")()
    if not hasattr(found, "train_dataloader"):
        return found  # type: ignore[no-any-return]
    found.prepare_data()
    found.setup("fit")
    return found.train_dataloader()  # type: ignore[no-any-return]
