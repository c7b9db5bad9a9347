"""One page of HTML on pruned checkpoints or a comparison: what went, what it saved, how to do it again.

    lightning-prune report pruned.ckpt --model my.Net --out report
    lightning-prune report dense.ckpt pruned.ckpt --config config.yaml --data my.Data --out report
    lightning-prune report --compare lightning_prune_compare --out report

report.html needs no network and no other file; report.json beside it holds the same. A checkpoint without a plan is of
a dense network, and is shown as one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import math
import platform
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

import lightning_prune
from lightning_prune.checkpoint import load_into, plan_of, read_checkpoint, written_by
from lightning_prune.commands import PROGRAM, engines, one_line, quiet
from lightning_prune.commands.explain import add_input, example_inputs, from_config, imported, made
from lightning_prune.cost import count
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, PruneError, TraceError
from lightning_prune.factorise import matrix_of
from lightning_prune.graph.explain import explain
from lightning_prune.latency import compare, state_dict_bytes
from lightning_prune.methods import discover
from lightning_prune.page import page, rows_of
from lightning_prune.pruner import Pruner
from lightning_prune.report import finite
from lightning_prune.state import check_fields
from lightning_prune.surgery import trace

NOISY = 1.5  # the slowest tenth of the runs, in medians, from which on a speed-up is not put forward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="of Lightning")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="PATH", help="dotted path of a class or function that makes the dense model")
    what.add_argument("--config", type=Path, metavar="YAML", help="a LightningCLI config; its model section is used")
    parser.add_argument(
        "--arguments", default="{}", metavar="JSON", help="keyword arguments for --model, over those in the checkpoint"
    )
    add_input(parser)
    parser.add_argument(
        "--data", metavar="PATH", help="dotted path of a LightningDataModule class; each checkpoint is tested on it"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="also each network in ONNX Runtime, in float32 and in int8, calibrated on training samples of --data",
    )
    parser.add_argument("--compare", type=Path, metavar="DIR", help="also the rows that lightning-prune compare wrote")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1, 32], metavar="N", help="that are timed (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed runs (%(default)s); 0 for none")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="within an operator (%(default)s)")
    parser.add_argument("--title", default="Pruning report", help="of the page (%(default)s)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where report.html and .json are written"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, write the page, and say where it is.

    Raises:
        ValueError: if there is nothing to report on, or a model cannot be made from what was given.
        IncompatibleCheckpoint: if a checkpoint is of another model.
        FileNotFoundError: if a file is missing.
    """
    _check(options)
    report: dict[str, Any] = {"title": options.title, "command": command_of(options), "versions": _versions()}
    if options.checkpoints:
        report |= measured(options)
    if options.compare is not None:
        report["compare"] = compared(options.compare)
    options.out.mkdir(parents=True, exist_ok=True)
    path, data = options.out / "report.html", finite(report)
    assert isinstance(data, dict)
    path.write_text(page(data), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written: {path}, {path.with_suffix('.json')}")
    return 0


@dataclass
class Network:
    """A model, what it is called, the dense one it came from, and the checkpoint with its plan, if it has one."""

    name: str
    model: nn.Module
    dense: Network | None = None
    checkpoint: Mapping[str, Any] | None = None
    plan: Plan | None = None


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What there is to say about the checkpoints: loaded, counted, timed, and tested if there are data."""
    networks = loaded(options)
    inputs = example_inputs(networks[0].model, options.input)
    rows = [_counted(network, inputs) for network in networks]
    data = imported(options.data, "--data") if options.data else None
    for row, network in zip(rows, networks, strict=True):
        if data is not None and network.checkpoint is not None:  # the dense model made to compare with is not trained
            row["tested"] = _tested(network.model, data)
    models = {network.name: network.model for network in networks}
    with tempfile.TemporaryDirectory() as folder:
        if options.int8:
            engines = _engines(networks, inputs, data, Path(folder), options.threads)
            rows += [_as_run(engine, rows, networks, data) for engine in engines]
            models |= {engine.name: engine.model for engine in engines}
        _time(rows, models, inputs, options)
    notes = _notes(rows, options)
    pruned = [network for network in networks if network.plan is not None]
    return {
        "networks": rows,
        "notes": notes,
        "architectures": [part for network in pruned for part in _architectures(network)],
        "prunings": [part for network in pruned for part in _prunings(network)],
        "explanations": [
            _explained(network, inputs, options.input) for network in networks if network.name.startswith("dense")
        ],
        "checkpoints": [
            _identity(path, network.checkpoint)
            for path, network in zip(options.checkpoints, (n for n in networks if n.checkpoint), strict=True)
        ],
    }


def loaded(options: argparse.Namespace) -> list[Network]:
    """The dense networks that the checkpoints' arguments make, and after them the checkpoints' own."""
    dense: list[tuple[Any, Network]] = []
    others: list[Network] = []
    names = _names(options.checkpoints)
    for path, name in zip(options.checkpoints, names, strict=True):
        checkpoint = read_checkpoint(path)
        known = checkpoint.get("hyper_parameters")
        known = dict(known) if isinstance(known, Mapping) and options.config is None else {}
        origin = next((network for arguments, network in dense if arguments == known), None)
        if origin is None:
            origin = Network("dense" if not dense else f"dense {len(dense) + 1}", _made(options, known))
            dense.append((known, origin))
        model = copy.deepcopy(origin.model)
        try:
            plan = plan_of(checkpoint)
            _refuse_another(origin.model, plan)
            load_into(model, checkpoint)
        except PruneError as error:
            raise type(error)(f"{path}: {one_line(str(error))}") from error
        others.append(Network(name, model, origin, checkpoint, plan))
    return [*(network for _, network in dense), *others]


def compared(folder: Path) -> dict[str, Any]:
    """What the rows of a comparison say: fronts, means, verdicts and failures, from rows.csv alone.

    Raises:
        FileNotFoundError: if the folder has no rows.csv.
        ValueError: if it has no rows, or such as cannot be read.
    """
    from lightning_prune.comparison.engine import rows_in
    from lightning_prune.comparison.picture import PANELS, pareto_front
    from lightning_prune.comparison.table import label, summarised, verdicts

    if not (folder / "rows.csv").is_file():
        raise FileNotFoundError(f"{folder} has no rows.csv; --compare wants a folder that {PROGRAM} compare wrote")
    try:
        rows = rows_in(folder)
        summary, said = summarised(rows), verdicts(rows)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{folder / 'rows.csv'} does not hold rows of {PROGRAM} compare: {error}") from error
    good = [{**line, "name": f"{label(line)} {_budget(line)}".strip()} for line in summary if line["runs"]]
    if not rows:
        raise ValueError(f"{folder / 'rows.csv'} holds no row")
    dense = next((100 * line["accuracy"] for line in good if line["variant"] == "dense"), None)
    panels = []
    for name, title in PANELS:
        lines = [line for line in good if line.get(name) is not None]
        front = set(pareto_front([(line[name], line["accuracy"]) for line in lines]))
        points = [_point(line, name, number in front) for number, line in enumerate(lines)]
        if points:
            panels.append({"cost": title, "dense": dense, "points": points})
    seeds = sorted({row["seed"] for row in rows})
    return {
        "folder": str(folder),
        "lead": f"{len(rows)} runs, seeds {', '.join(map(str, seeds))}. A point is the mean over seeds, its upright "
        "line one sample standard deviation to each side; the dashed line joins what nothing cheaper beats, the "
        "dotted one is the dense network.",
        "panels": panels,
        "rows": [_summary_row(line) for line in good],
        "verdicts": [_verdict(one) for one in said],
        "failed": [
            {"run": label(row), "budget": _budget(row), "seed": row["seed"], "error": row["error"]}
            for row in rows
            if row["error"]
        ],
    }


def command_of(options: argparse.Namespace) -> str:
    """The command line that makes this page, as a shell takes it."""
    words = [PROGRAM, "report", *map(str, options.checkpoints)]
    given = {
        "--model": options.model,
        "--config": options.config,
        "--arguments": None if options.arguments == "{}" else options.arguments,
        "--data": options.data,
        "--compare": options.compare,
        "--repeats": options.repeats,
        "--threads": options.threads,
        "--out": options.out,
    }
    for name, value in given.items():
        words += [] if value is None else [name, str(value)]
    for shape in options.input or ():
        words += ["--input", shape]
    words += ["--int8"] * options.int8
    return shlex.join([*words, "--batch-sizes", *map(str, options.batch_sizes)])


def _check(options: argparse.Namespace) -> None:
    """Before anything is read or measured."""
    if not options.checkpoints and options.compare is None:
        raise ValueError("there is nothing to report on: give a CHECKPOINT, or --compare a folder of a comparison")
    if options.checkpoints and options.model is None and options.config is None:
        raise ValueError("a checkpoint holds no model: give --model, the dotted path of its class, or --config")
    if options.int8 and (not options.checkpoints or not options.data):
        raise ValueError("--int8 wants a CHECKPOINT, and --data, whose training samples it is calibrated on")
    if options.repeats < 0 or options.threads < 1 or min(options.batch_sizes) < 1:
        raise ValueError("--threads and --batch-sizes must be at least 1, and --repeats at least 0")


def _made(options: argparse.Namespace, known: Mapping[str, Any]) -> nn.Module:
    if options.config is not None:
        return from_config(options.config)[1]
    return made(options.model, options.arguments, known)[1]


def _refuse_another(dense: nn.Module, plan: Plan | None) -> None:
    """A checkpoint can be had by a wider network, too, but then nothing is kept of what it never had."""
    tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    for name, shape in ({} if plan is None else plan.shapes).items():
        if name in tensors and tuple(tensors[name].shape) != tuple(shape):
            raise IncompatibleCheckpoint(
                f"it was pruned from a network whose {name!r} has shape {tuple(shape)}, and --model makes one with "
                f"{tuple(tensors[name].shape)}; give --arguments that it was trained with"
            )


def _names(paths: Sequence[Path]) -> list[str]:
    """What to call each checkpoint: its file's name, with as many folders as tell it from the others."""
    parts = [path.absolute().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def _counted(network: Network, inputs: Any) -> dict[str, Any]:
    """Flops, parameters and bytes; masked weights are zero, so that zeros are counted and not believed."""
    cost = count(network.model, inputs)
    dense = network.dense if network.dense is not None else network
    of = cost if dense is network else count(dense.model, inputs)
    masks = {} if network.plan is None else network.plan.masks
    parameters = dict(network.model.named_parameters())
    zeros = sum(int((parameters[name] == 0).sum()) for name in masks if name in parameters)
    return {
        "name": network.name,
        "dense": None if network.dense is None else network.dense.name,
        "flops": cost.flops,
        "params": cost.params,
        "nonzero": cost.params - zeros,
        "flops_kept": cost.flops / max(1, of.flops),
        "params_kept": cost.params / max(1, of.params),
        "flops_sparse": _if_free(network) if masks else cost.flops,
        "bytes": state_dict_bytes(network.model),
        "latency_ms": {},
        "tested": {},
    }


def _if_free(network: Network) -> float | None:
    """Flops if zeros were free, as the callback counted them at its last event; None if it did not say."""
    rows = [row for part in _prunings(network) for row in part["rows"]]
    return rows[-1].get("prune/flops_sparse") if rows else None


def _engines(networks: Sequence[Network], inputs: Any, data: Any, folder: Path, threads: int) -> list[engines.Engine]:
    batches = engines.training_samples(data())
    with quiet():
        return [
            engine
            for number, network in enumerate(networks)
            for engine in engines.in_onnxruntime(
                network.name, network.model, inputs, batches, folder / str(number), threads
            )
        ]


def _as_run(
    engine: engines.Engine, rows: Sequence[dict[str, Any]], networks: Sequence[Network], data: Any
) -> dict[str, Any]:
    """The row of a network in an engine: its counts, the file's size, and what the engine's own outputs score."""
    row = next(row for row in rows if row["name"] == engine.of)
    network = next(network for network in networks if network.name == engine.of)
    tested = {}
    if network.checkpoint is not None:
        assert isinstance(network.model, pl.LightningModule)  # it was tested before
        shell = engines.standing_in(network.model, engine)
        tested = _tested(shell, data)
        engines.refuse_bypassed(shell, engine)
    return {
        **row, "name": engine.name, "dense": row["dense"] or row["name"], "engine": True, "bytes": engine.bytes,
        "latency_ms": {}, "tested": tested,
    }  # fmt: skip


def _time(
    rows: list[dict[str, Any]], models: Mapping[str, nn.Module], inputs: Any, options: argparse.Namespace
) -> None:
    if not options.repeats:
        return
    times = compare(models, inputs, options.batch_sizes, options.repeats, threads=options.threads)
    for row in rows:
        for one, before in zip(times[row["name"]], times[row["dense"] or row["name"]], strict=True):
            row["latency_ms"][str(one.batch)] = {
                "median": one.median_ms,
                "p10": one.p10_ms,
                "p90": one.p90_ms,
                "speed_up": None if row["dense"] is None else before.median_ms / one.median_ms,
                "noisy": max(one.p90_ms / one.median_ms, before.p90_ms / before.median_ms) > NOISY,
            }


def _notes(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    """What to know of the numbers before one believes them."""
    notes = ["Nothing was timed."]
    if options.repeats:
        threads = "one thread" if options.threads == 1 else f"{options.threads} threads"
        notes = [
            f"Times are medians of {options.repeats} runs on the CPU with {threads}, and the range of the middle "
            "80 % of them; all networks ran in turn."
        ]
    if any(times["noisy"] for row in rows for times in row["latency_ms"].values()):
        notes.append(
            f"Where the slowest tenth took more than {NOISY:g} medians the machine was busy and says no speed-up."
        )
    if options.int8:
        notes.append(
            "Rows of ONNX Runtime have its file's bytes, and are held against the dense network in torch; int8 is "
            f"calibrated on {engines.SAMPLES} training samples."
        )
    return notes if options.data else [*notes, "Accuracy was not measured; --data tests each checkpoint."]


def _tested(model: nn.Module, data: Any) -> dict[str, float]:
    """What the module's own ``test_step`` logs."""
    if not isinstance(model, pl.LightningModule):
        raise ValueError(f"--data tests a LightningModule, and {type(model).__name__} is none")
    with quiet():
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        (found,) = trainer.test(model, datamodule=data(), verbose=False)
    return {name: float(value) for name, value in found.items()}


def _architectures(network: Network) -> Iterator[dict[str, Any]]:
    """Channels per group, weights per masked layer, singular values per factorised layer: what the plan has."""
    assert network.plan is not None
    assert network.dense is not None
    plan, whole = network.plan, {"network": network.name}
    if plan.groups:
        yield {
            **whole, "of": "channels", "by": "group",
            "rows": rows_of((name, kept, dense) for name, (kept, dense) in plan.groups.items()),
        }  # fmt: skip
    if plan.masks:
        counts = [(name, int(mask.sum()), mask.numel()) for name, mask in plan.masks.items()]
        yield {**whole, "of": "weights", "by": "layer", "rows": rows_of(_in_order(network.dense.model, counts))}
    if plan.ranks:
        values = [
            (name, rank, min(matrix_of(network.dense.model.get_submodule(name)).shape))
            for name, rank in plan.ranks.items()
        ]
        yield {**whole, "of": "singular values", "by": "layer", "rows": rows_of(values)}


def _in_order(model: nn.Module, counts: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """As the model names its parameters."""
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    return sorted(counts, key=lambda row: order.get(row[0], len(order)))


def _prunings(network: Network) -> list[dict[str, Any]]:
    """What the callbacks of a checkpoint say of themselves.

    Raises:
        IncompatibleCheckpoint: if it is not what they write.
    """
    states = (network.checkpoint or {}).get("callbacks", {})
    out, methods = [], discover()
    for key in written_by(network.checkpoint or {}):
        if not isinstance(states, Mapping) or key not in states:
            continue
        state, method = states[key], key.rpartition("-")[0]
        check_fields(f"the state of {method} in {network.name}", state, Pruner.state_fields)
        for name, found in state.get("scores", {}).items():
            if len(found["kept"]) != len(found["gone"]) or min([*found["kept"], *found["gone"]], default=-1) < 0:
                raise IncompatibleCheckpoint(f"the scores of {name!r} in {network.name} are no histogram")
        paper = methods[method].paper if method in methods else None
        out.append(
            {
                "network": network.name,
                "method": method,
                "paper": None if paper is None else f"{paper.authors}, {paper.year}",
                "arguments": dict(state.get("arguments", {})),
                "seed": state["seed"],
                "steps": state["steps"],
                "done": state["done"],
                "planned": len(state["events"]),
                "seconds": state["seconds"] if math.isfinite(state["seconds"]) else None,
                "rows": [dict(row) for row in state["rows"] if math.isfinite(row.get("step", math.nan))],
                "scores": {
                    name: found
                    for name, found in state.get("scores", {}).items()
                    if math.isfinite(found["low"]) and math.isfinite(found["high"])
                },
            }
        )
    return out


def _explained(network: Network, inputs: Any, given: Sequence[str] | None) -> dict[str, Any]:
    try:
        explanation = explain(trace(network.model, inputs))
    except TraceError as error:
        raise TraceError(str(error).replace("example_input=", "--input")) from error
    said = explanation.to_dict()
    return {
        "model": network.name,
        "params": said["params"],
        "prunable_share": said["prunable_share"],
        "groups": len(said["groups"]),
        "freezes": said["freezes"],
        "partly": said["partly"],
    }


def _identity(path: Path, checkpoint: Mapping[str, Any] | None) -> dict[str, Any]:
    known = checkpoint or {}
    return {
        "name": str(path),
        **{name: found if type(found := known.get(key)) is int else None for name, key in _COUNTERS.items()},
        "lightning": str(known.get("pytorch-lightning_version", "")),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


_COUNTERS = {"epoch": "epoch", "step": "global_step"}


def _versions() -> dict[str, str]:
    return {
        "lightning-prune": lightning_prune.__version__,
        **{name: version(name) for name in ("torch", "lightning")},
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _budget(line: Mapping[str, Any]) -> str:
    return "" if line["variant"] == "dense" else f"{line['keep']:g} of the {line['of']}"


def _point(line: Mapping[str, Any], cost: str, on_front: bool) -> dict[str, Any]:
    spread = line["accuracy_std"]
    return {
        "method": line["method"] if not line["variant"].startswith("scratch") else f"Scratch of {line['method']}",
        "name": line["name"],
        "cost": line[cost],
        "accuracy": 100 * line["accuracy"],
        "spread": None if spread is None else 100 * spread,
        "on_front": on_front,
    }


def _summary_row(line: Mapping[str, Any]) -> dict[str, Any]:
    def percent(value: float | None, std: float | None, sign: str = "") -> str | None:
        return None if value is None else f"{100 * value:{sign}.2f}" + ("" if std is None else f" ± {100 * std:.2f}")

    return {
        "run": line["name"],
        "runs": line["runs"],
        "accuracy, %": percent(line["accuracy"], line["accuracy_std"]),
        "to dense": percent(line["delta"], line["delta_std"], "+"),
        "flops kept": line["flops_kept"],
        "not zero": None if line["nnz"] is None else round(line["nnz"]),
        "bytes": None if line["bytes"] is None else round(line["bytes"]),
        "latency kept": line.get("latency_kept"),
        "training flops": line.get("train_flops"),
        "seconds of events": line.get("score_seconds"),
    }


def _verdict(line: Mapping[str, Any]) -> dict[str, Any]:
    shown = {"method": line["method"], "budget": f"{line['keep']:g} of the {line['of']}", "runs": line["runs"]}
    for name, title in _VERDICT.items():
        shown[title] = None if line[name] is None else f"{100 * line[name]:{'+' * (name == 'gain')}.2f}"
    return {**shown, "verdict": line["verdict"]}


_VERDICT = {
    "finetuned": "fine-tuned, %",
    "scratch_e": "Scratch-E, %",
    "scratch_b": "Scratch-B, %",
    "gain": "gain",
    "combined_std": "combined std",
}
