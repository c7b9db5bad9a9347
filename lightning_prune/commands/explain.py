"""Dry run: what of a model may go, what is frozen and why, and what a budget would save. Nothing is trained.

    lightning-prune explain --model torchvision.models.resnet18 --input 1,3,224,224
    lightning-prune explain --config examples/digits/l1_filter.yaml --keep 0.3
    lightning-prune explain --model torchvision.models.resnet18 --input 1,3,224,224 --figure groups.png

The weights are the ones the model is built with, so the flops and parameters at the budget are what a method that looks
at data would come near, and what one that does not would meet.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor, nn

from lightning_prune.budget import Budget, Of
from lightning_prune.commands import write
from lightning_prune.decision import Plan
from lightning_prune.errors import NothingToPrune, PruneError, TraceError
from lightning_prune.figures import graph_figure
from lightning_prune.graph.explain import Explanation, explain
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.latency_table import LatencyTable, latency_table
from lightning_prune.planning import plan
from lightning_prune.report import markdown_table
from lightning_prune.surgery import trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PATH", help="dotted path of a class or function that makes the model")
    what.add_argument("--config", type=Path, metavar="YAML", help="a LightningCLI config; its model section is used")
    parser.add_argument("--arguments", default="{}", metavar="JSON", help="keyword arguments for --model")
    add_input(parser)
    parser.add_argument("--keep", type=float, default=0.5, metavar="F", help="fraction kept (%(default)s)")
    parser.add_argument(
        "--of", default="flops", choices=get_args(Of), help="of what (%(default)s); latency is measured here"
    )
    parser.add_argument(
        "--method", default="l1_filter", metavar="NAME", help="a channel method that needs no data (%(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write explain.txt, .json and .png there")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the graph of groups, as .png, .svg or .pdf by its suffix"
    )


def run(options: argparse.Namespace) -> int:
    """Print what there is to say about the model.

    Raises:
        ValueError: if the model cannot be made from what was given, or an input shape cannot be read.
        TraceError: if the model refuses the input.
        NothingToPrune: if nothing may go, after saying why.
        UnmeetableBudget: if the budget is out of reach, after saying what there is.
    """
    budget = Budget(options.keep, of=options.of)
    pictures = _pictures(options.figure, options.out)
    name, model = made(options.model, options.arguments) if options.config is None else from_config(options.config)
    inputs = example_inputs(model, options.input)
    try:
        graph = trace(model, inputs)
    except TraceError as error:
        raise TraceError(str(error).replace("example_input=", "--input")) from error
    explanation = explain(graph)
    text, value = explained(explanation, graph.frozen, name)
    failed: PruneError | None = None
    table = latency_table(graph) if budget.of == "latency" and graph.groups else None
    try:
        chosen = plan(graph, options.method, budget, **({} if table is None else {"latency_table": table}))
    except PruneError as error:
        failed = error
    else:
        more, prediction = predicted(graph, chosen, budget, options.method, table)
        text, value = f"{text}\n\n{more}", {**value, "predicted": prediction}
    write(options.out, "explain.txt", text, value)
    for path in pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        graph_figure(explanation).savefig(path)
        print(f"written: {path}")
    if failed is not None:
        if isinstance(failed, NothingToPrune):
            raise NothingToPrune(f"nothing of {name} may go; the reasons are listed above") from failed
        raise failed
    return 0


def made(path: str, arguments: str = "{}", known: Mapping[str, Any] | None = None) -> tuple[str, nn.Module]:
    """Make a model from the dotted path of a class or function.

    Args:
        path: such as ``torchvision.models.resnet18``.
        arguments: keyword arguments, as JSON.
        known: further ones, taken where they are wanted and ``arguments`` has no others.

    Returns:
        The path and the model.

    Raises:
        ValueError: if there is nothing of that name, it cannot be called so, or it makes no module.
    """
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f'--arguments must be JSON such as {{"width": 8}}, got {arguments!r}: {error}') from error
    if not isinstance(keywords, dict):
        raise ValueError(f'--arguments must be a JSON object such as {{"width": 8}}, got {arguments!r}')
    factory = imported(path)
    keywords = {**_wanted(factory, known or {}), **keywords}
    try:
        model = factory(**keywords)
    except TypeError as error:
        raise ValueError(f"{path} cannot be called with {keywords}: {error}; see --arguments") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path} makes {type(model).__name__}, but a torch.nn.Module is wanted")
    return path, model


def from_config(path: Path) -> tuple[str, nn.Module]:
    """Make the model of a LightningCLI config; nothing else in the config is looked at.

    Returns:
        Its class path and the model.

    Raises:
        ValueError: if the config has no model section, or one that cannot be read.
        FileNotFoundError: if there is no such file.
    """
    from jsonargparse import ArgumentError, ArgumentParser
    from lightning.pytorch import LightningModule

    from lightning_prune.cli import told

    config = importlib.import_module("yaml").safe_load(path.read_text("utf-8"))
    section = config.get("model") if isinstance(config, dict) else None
    if section is None:
        raise ValueError(f"{path} has no 'model' section, which explain looks at")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
    try:
        parsed = parser.parse_object({"model": section})
        # renamed on the way, and the old name warns
        model = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed).model
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{path}: {told(str(error))}") from error
    assert isinstance(model, nn.Module)
    return str(parsed.model.class_path), model


def add_input(parser: argparse.ArgumentParser) -> None:
    """The option that `example_inputs` reads."""
    parser.add_argument(
        "--input",
        action="append",
        metavar="SHAPE[:DTYPE]",
        help="of an example input, as 1,3,224,224 or 1,16:int64; once for each positional input; by default the "
        "model's example_input_array",
    )


def example_inputs(model: nn.Module, shapes: Sequence[str] | None) -> Any:
    """Inputs to trace on: normal noise of the shapes, zeros for integers; else the model's ``example_input_array``.

    Args:
        model: whose ``example_input_array`` is taken where no shape is given.
        shapes: ``1,3,224,224`` or ``1,16:int64``, one for each positional input.

    Raises:
        ValueError: if a shape cannot be read, or there is neither.

    Example:
        >>> example_inputs(nn.Identity(), ["2,3:int64"])
        (tensor([[0, 0, 0], [0, 0, 0]]),)
    """
    if not shapes:
        example = getattr(model, "example_input_array", None)
        if example is None:
            raise ValueError(f"{type(model).__name__} has no example_input_array; give --input, such as 1,3,224,224")
        return example
    generator = torch.Generator().manual_seed(0)
    return tuple(_tensor(shape, generator) for shape in shapes)


def explained(explanation: Explanation, frozen: Mapping[str, str], name: str) -> tuple[str, dict[str, Any]]:
    """What of a model may go, and what not: as text, and as what JSON can say.

    Args:
        explanation: of its channel graph.
        frozen: layer or parameter -> why, as `ChannelGraph.frozen` has it.
        name: what to call the model.
    """
    return f"{name}\n{explanation}", {"model": name, **explanation.to_dict(), "frozen": dict(frozen)}


def predicted(
    graph: ChannelGraph, chosen: Plan, budget: Budget, method: str, table: LatencyTable | None = None
) -> tuple[str, dict[str, Any]]:
    """What a plan would leave: as text, and as what JSON can say; with a table also the time by it."""
    before, after = graph.cost(), graph.cost(chosen)
    costs: list[dict[str, Any]] = [
        {"": key, "dense": dense, "pruned": left, "kept": left / max(1, dense)}
        for key, dense, left in (("flops", before.flops, after.flops), ("params", before.params, after.params))
    ]
    times: dict[str, Any] = {}
    if table is not None:
        ms = table.predict(graph, chosen)
        costs.append({"": "ms, predicted", "dense": table.dense_ms, "pruned": ms, "kept": ms / table.dense_ms})
        times = {"latency_ms": ms, "latency_kept": ms / table.dense_ms, "latency_on": str(table)}
    kept = [{"group": name, "dense": of, "kept": n} for name, (n, of) in chosen.groups.items()]
    title = f"with {budget.keep:g} of the {budget.of} kept, channels as {method} would choose them now:"
    value = {
        "keep": budget.keep,
        "of": budget.of,
        "method": method,
        "flops": after.flops,
        "params": after.params,
        "flops_kept": after.flops / max(1, before.flops),
        "params_kept": after.params / max(1, before.params),
        "groups": {name: n for name, (n, _) in chosen.groups.items()},
        **times,
    }
    return f"{title}\n\n{markdown_table(costs)}\n\n{markdown_table(kept)}", value


def _pictures(figure: Path | None, out: Path | None) -> list[Path]:
    """Where the picture goes; a suffix that it cannot be written as is an error before any work is done."""
    if figure is not None:
        known = FigureCanvasAgg.get_supported_filetypes()
        if figure.suffix[1:].lower() not in known:
            raise ValueError(f"--figure wants a file such as groups.png, one of {', '.join(known)}, got {figure}")
    return [path for path in (figure, out and out / "explain.png") if path is not None]


def _wanted(factory: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Those keyword arguments that a factory takes."""
    if not known:
        return {}
    taken = inspect.signature(factory).parameters
    return {key: value for key, value in known.items() if key in taken}


def imported(path: str, option: str = "--model") -> Callable[..., Any]:
    """The class or function of a dotted path.

    Raises:
        ValueError: naming the option that asked, if there is none.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{option} wants a dotted path such as torchvision.models.resnet18, got {path!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {path}: {error}") from error
    if not callable(found):
        raise ValueError(f"{option} {path} is {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def _tensor(text: str, generator: torch.Generator) -> Tensor:
    sizes, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
        raise ValueError(f"--input wants sizes and perhaps a dtype, such as 1,3,224,224 or 1,16:int64, got {text!r}")
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)
