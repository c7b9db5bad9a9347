"""Train a small network on handwritten digits, prune it while it trains, and report.

Two fits of equal length start from the same weights and see the same batches: one dense, one with the pruning callback,
which trains, prunes while training and fine-tunes. Both are tested once, at their end, on 360 images that neither has
seen. The checkpoint of the pruned network is then loaded in a fresh process and has to reach the same accuracy there.
Everything runs on one CPU thread: the network is too small for more, and the figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typing_extensions import override

import lightning_prune
from lightning_prune.budget import Budget
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.checkpoint import load_pruned, plan_of
from lightning_prune.commands import one_line, quiet
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.cost import count
from lightning_prune.figures import BLUE, INK, PALE, architecture_figure
from lightning_prune.latency import Latency, compare, state_dict_bytes
from lightning_prune.methods import find
from lightning_prune.pruner import Pruner
from lightning_prune.rank_pruner import RankPruner
from lightning_prune.report import markdown_table
from lightning_prune.surgery import trace

BATCH_SIZES = (1, 32)
KEEP = {"weights": 0.1}  # of the kinds that are not at 0.5 by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--method", default="taylor_weight", metavar="NAME", help="class or file name (%(default)s)")
    parser.add_argument(
        "--keep",
        type=float,
        metavar="F",
        help="fraction kept: of the flops (0.5), or for methods that remove weights, of the weights (0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (%(default)s)")
    parser.add_argument("--epochs", type=int, default=24, metavar="N", help="length of each fit (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (lightning_prune_demo/METHOD)")
    parser.add_argument(
        "--check", type=Path, metavar="CKPT", help="only load this checkpoint and test it; prints one line of JSON"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo, or check one of its checkpoints.

    Returns:
        0 if the checkpoint, loaded in a fresh process, did what the trained network had done.

    Raises:
        ValueError: for an unknown method, or a budget, number of epochs or seed that makes no sense.
        RuntimeError: if the fresh process did something else.
    """
    if options.check is not None:
        with _one_thread(), quiet():
            print(json.dumps(checked(options.check)))
        return 0
    if options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 4,294,967,295, got {options.seed}")
    method = find(options.method)
    if method.kind == "control":
        raise ValueError(f"{method.__name__} trains the plan of another method; see lightning-prune compare")
    pruner = method(Budget(KEEP.get(method.kind, 0.5) if options.keep is None else options.keep))
    out = options.out or Path("lightning_prune_demo") / method.__module__.rpartition(".")[2]
    with _one_thread(), quiet():
        demo(pruner, seed=options.seed, epochs=options.epochs, out=out)
    return 0


def demo(pruner: Pruner, seed: int, epochs: int, out: Path) -> dict[str, Any]:
    """Fit, prune, compare, write and reload; prints as it goes.

    Args:
        pruner: a method with its budget.
        seed: of weights and batches.
        epochs: of each of the two fits.
        out: directory for everything that is written; made if it is not there.

    Returns:
        What is written to ``report.json``.

    Raises:
        RuntimeError: if the checkpoint, loaded in a fresh process, is not what was trained.
        UnmeetableBudget: if the budget is out of reach, before anything is trained or written.
    """
    started = time.perf_counter()
    name = type(pruner).__name__
    if isinstance(pruner, ChannelPruner):  # a budget out of reach is said now, not after the dense fit
        net = DigitsNet()
        type(pruner)(pruner.budget).check(trace(net, net.example_input_array))
    out.mkdir(parents=True, exist_ok=True)
    print(f"{name}, {pruner.budget.keep:g} of the {pruner.budget.of} kept, seed {seed}: two fits of {epochs} epochs")
    dense, dense_accuracy, _ = _fitted("dense", seed, epochs, out)
    keeper = ModelCheckpoint(out, filename="pruned", enable_version_counter=False)
    pruned, accuracy, log_dir = _fitted("pruned", seed, epochs, out, pruner, keeper)
    row = pruner.report.rows[-1]
    times = compare({"dense": dense, "pruned": pruned}, dense.example_input_array, BATCH_SIZES, repeats=60, warmup=10)
    cost = count(dense, dense.example_input_array)
    picture = out / ("channels.png" if pruner.plan.groups else "density.png")
    _picture(pruner).savefig(picture)
    print("loading the checkpoint in a fresh process")
    checkpoint = out / "pruned.ckpt"
    reloaded = _in_fresh_process(checkpoint)
    report: dict[str, Any] = {
        "method": name,
        "budget": {"keep": pruner.budget.keep, "of": pruner.budget.of},
        "seed": seed,
        "epochs": epochs,
        "dense": {
            "accuracy": dense_accuracy,
            "flops": cost.flops,
            "params": cost.params,
            "bytes": state_dict_bytes(dense),
            "latency_ms": _milliseconds(times["dense"]),
        },
        "pruned": {
            "accuracy": accuracy,
            "flops": int(_number(row["prune/flops"])),
            "params": int(_number(row["prune/params"])),
            "bytes": state_dict_bytes(pruned),
            "latency_ms": _milliseconds(times["pruned"]),
        },
        "flops_kept": row["prune/flops_kept"],
        "params_kept": row["prune/params_kept"],
        "density": row["prune/density"],
        "flops_sparse": row["prune/flops_sparse"],
        "reloaded": reloaded["accuracy"],
        "checkpoint": str(checkpoint),
        "tensorboard": log_dir,
        "picture": str(picture),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    written = out / "report.json"
    written.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(report)}\n")
    for what in ("checkpoint", "picture", "tensorboard"):
        print(f"{what:<12} {report[what]}")
    print(f"{'report':<12} {written}\n{'seconds':<12} {report['seconds']}")
    trained = {key: report["pruned"][key] for key in reloaded}
    if reloaded != trained:
        raise RuntimeError(f"{checkpoint}, loaded in a fresh process, has {reloaded}, but what was trained {trained}")
    print(f"{'reloaded':<12} test accuracy {accuracy:.2%} again")
    return report


def checked(path: Path) -> dict[str, float]:
    """Load a checkpoint of the demo and test it.

    Returns:
        ``accuracy`` on the test images, ``flops`` as fvcore counts them, and ``params``: those not masked.
    """
    net = load_pruned(DigitsNet, path)
    cost = count(net, net.example_input_array)
    masked = sum(int((~mask).sum()) for mask in _masks(path).values())
    return {"accuracy": _tested(_trainer(logger=False), net), "flops": cost.flops, "params": cost.params - masked}


def table(report: Mapping[str, Any]) -> str:
    """Dense beside pruned, as Markdown."""
    dense, pruned = report["dense"], report["pruned"]
    change = 100 * (pruned["accuracy"] - dense["accuracy"])
    rows = [("test accuracy", f"{dense['accuracy']:.2%}", f"{pruned['accuracy']:.2%}", f"{change:+.2f} points")]
    masked = report["flops_sparse"] != pruned["flops"]  # the kernels stay dense, so zeros save nothing by themselves
    labels = {"flops": "flops, one sample", "params": "parameters", "bytes": "state dict, bytes"}
    if masked:
        labels["params"] += " not masked"
    for key, label in labels.items():
        rows.append((label, f"{dense[key]:,}", f"{pruned[key]:,}", f"{pruned[key] / dense[key]:.4f} kept"))
    if masked:
        theory, share = report["flops_sparse"], report["flops_sparse"] / dense["flops"]
        rows.append(("flops if zeros were free", f"{dense['flops']:,}", f"{theory:,.0f}", f"{share:.4f} kept"))
        rows.append(("density", "1.0000", f"{report['density']:.4f}", ""))
    for batch in map(str, BATCH_SIZES):
        before, after = dense["latency_ms"][batch], pruned["latency_ms"][batch]
        times = f"{before['median'] / after['median']:.2f}x as fast"
        rows.append((f"ms, batch of {batch}", _spread(before), _spread(after), times))
    columns = ["", "dense", "pruned", "change"]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    aligned = [[row[0], *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    return markdown_table([dict(zip(columns, row, strict=True)) for row in aligned], columns)


def density_figure(kept: Mapping[str, tuple[int, int]], what: str = "Weights") -> Figure:
    """Draw the density of each layer's weights, or singular values, first layer on top.

    Args:
        kept: layer -> (weights kept, weights), at least one layer.
        what: of which these are counts.
    """
    figure = Figure(figsize=(8.0, 1.3 + 0.24 * max(len(kept), 3)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = range(len(kept))
    axes.barh(rows, [1.0] * len(kept), height=0.74, color=PALE, label="dense")
    axes.barh(rows, [n / of for n, of in kept.values()], height=0.74, color=BLUE, label="kept")
    for row, (n, of) in zip(rows, kept.values(), strict=True):
        label = f"{n / of:.3f} of {of:,}"
        axes.annotate(label, (1, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(rows, list(kept), fontsize=8)
    axes.set_ylim(len(kept) - 0.4, -0.6)
    axes.set_xlim(0, 1.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("density")
    total, whole = (sum(numbers) for numbers in zip(*kept.values(), strict=True))
    figure.suptitle(f"{what} kept per layer: {total:,} of {whole:,} ({total / whole:.1%})", fontsize=11, color=INK)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "lightning_prune": lightning_prune.__version__,
        "torch": version("torch"),
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


class Progress(Callback):
    """One line that is rewritten on a terminal; elsewhere a line every fifth epoch and at the end.

    Args:
        label: what is trained.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        metrics = trainer.callback_metrics
        line = f"{self.label:<6}  epoch {epoch:>2} of {last}  validation accuracy {float(metrics['val/acc']):.2%}"
        for key, name in (("prune/flops_kept", "flops kept"), ("prune/density", "density")):
            if key in metrics:
                line += f"  {name} {float(metrics[key]):.3f}"
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if epoch == last else "", flush=True)
        elif epoch == last or epoch % 5 == 0:
            print(line, flush=True)


def _fitted(label: str, seed: int, epochs: int, out: Path, *callbacks: Callback) -> tuple[DigitsNet, float, str]:
    """A network trained from the seed, its test accuracy, and where it was logged."""
    pl.seed_everything(seed, verbose=False)
    net, data = DigitsNet(), DigitsData(seed=seed)
    logger = TensorBoardLogger(out, name=f"tensorboard/{label}", default_hp_metric=False)
    trainer = _trainer(logger=logger, max_epochs=epochs, callbacks=[*callbacks, Progress(label)])
    trainer.fit(net, data)
    if any(isinstance(callback, RankPruner) for callback in callbacks):  # pairs of layers are made after the fit
        trainer.save_checkpoint(out / "pruned.ckpt")
    accuracy = _tested(trainer, net)
    logger.finalize("success")
    return net, accuracy, str(logger.log_dir)


def _tested(trainer: pl.Trainer, net: DigitsNet) -> float:
    return float(trainer.test(net, DigitsData(), verbose=False)[0]["test/acc"])


def _trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        log_every_n_steps=5,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in settings.get("callbacks", [])),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _in_fresh_process(checkpoint: Path) -> dict[str, float]:
    """What ``--check`` says of a checkpoint, in a process that knows nothing but its path."""
    source = str(Path(lightning_prune.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "lightning_prune", "demo", "--check", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkpoint {checkpoint} did not load in a fresh process: {one_line(done.stderr)}")
    said: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def _masks(path: Path) -> Mapping[str, torch.Tensor]:
    plan = plan_of(torch.load(path, weights_only=True, map_location="cpu"))
    return {} if plan is None else plan.masks


def _picture(pruner: Pruner) -> Figure:
    groups = pruner.plan.groups
    if groups:
        before, after = {n: of for n, (_, of) in groups.items()}, {n: kept for n, (kept, _) in groups.items()}
        return architecture_figure(before, after)
    if isinstance(pruner, RankPruner):
        return density_figure(pruner.ranks_kept, "Singular values")
    masks = pruner.plan.masks
    return density_figure({name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()})


def _milliseconds(latencies: list[Latency]) -> dict[str, dict[str, float]]:
    return {str(one.batch): {"median": one.median_ms, "p10": one.p10_ms, "p90": one.p90_ms} for one in latencies}


def _spread(times: Mapping[str, float]) -> str:
    return f"{times['median']:.3f} ({times['p10']:.3f} to {times['p90']:.3f})"


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
