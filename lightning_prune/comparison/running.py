"""One run of a comparison, from the weights it begins with to its row."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_prune import latency
from lightning_prune.budget import Budget
from lightning_prune.commands import one_line
from lightning_prune.commands.demo import versions
from lightning_prune.comparison.meters import ScoringMeter, TrainingMeter
from lightning_prune.comparison.protocol import Protocol, Run
from lightning_prune.cost import count
from lightning_prune.methods import discover, find
from lightning_prune.methods.scratch import Scratch, scratch_epochs
from lightning_prune.pruner import Pruner

Row = dict[str, Any]


def train_dense(seed: int, protocol: Protocol, out: Path) -> tuple[int, str]:
    """Train the dense network of a seed; returns the seed, and why it could not be trained, else nothing.

    It leaves ``dense/seed=N.ckpt``, the weights it began with, and last ``dense/seed=N.json`` with what it cost.
    """
    try:
        with _alone(protocol):
            _train_dense(seed, protocol, out / "dense")
    except Exception as error:
        _write(out / "errors" / f"dense-seed{seed}.txt", traceback.format_exc())
        return seed, one_line(f"{type(error).__name__}: {error}")
    return seed, ""


def _train_dense(seed: int, protocol: Protocol, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model, data = protocol.build(seed)
    torch.save(model.state_dict(), folder / f"seed={seed}-initial.pt")
    cost = count(model, model.example_input_array)
    meter = TrainingMeter(cost.flops, seed)
    started = time.perf_counter()
    trainer = _fitted(model, data, protocol, seed, protocol.epochs, [meter], folder)
    seconds = time.perf_counter() - started
    name, accuracy = _tested(trainer, model, data, protocol.metric)
    trainer.save_checkpoint(folder / f"seed={seed}.ckpt", weights_only=True)
    said = {"epochs": protocol.epochs, "metric": name, "accuracy": accuracy, "samples": meter.samples,
            "flops": cost.flops, "params": cost.params, "train_flops": meter.flops, "seconds": seconds}  # fmt: skip
    _write(folder / f"seed={seed}.json", json.dumps(said, indent=2) + "\n")


def attempt(run: Run, protocol: Protocol, out: Path) -> Row:
    """Run it and leave its row in ``runs/``; a run that fails is a row with its error, and its traceback a file."""
    row: Row = {**_named(run), "error": ""}
    started = time.perf_counter()
    try:
        with _alone(protocol) as noted:
            row |= _execute(run, protocol, out)
        row["notes"] = " | ".join(dict.fromkeys(noted))
    except Exception as error:
        row["error"] = one_line(f"{type(error).__name__}: {error}")
        _write(out / "errors" / f"{run.key}.txt", traceback.format_exc())
    row |= {"seconds": round(time.perf_counter() - started, 3), "versions": _versions()}
    _write(out / "runs" / f"{run.key}.json", json.dumps(row) + "\n")
    return row


def _named(run: Run) -> Row:
    kind = "dense" if run.method == "dense" else discover()[run.method].kind
    return {"method": run.method, "variant": run.variant, "kind": kind, "keep": run.keep, "of": run.of,
            "seed": run.seed}  # fmt: skip


def _execute(run: Run, protocol: Protocol, out: Path) -> Row:
    model, data = protocol.build(run.seed)
    before = _dense(run.seed, out)
    pruner, start, epochs = _prepared(run, protocol, out)
    weights = f"seed={run.seed}{'.ckpt' if start == 'trained' else '-initial.pt'}"
    loaded = torch.load(out / "dense" / weights, map_location="cpu", weights_only=True)
    model.load_state_dict(loaded["state_dict"] if start == "trained" else loaded)
    meter, scoring = TrainingMeter(before["flops"], run.seed, pruner), ScoringMeter()
    callbacks: list[pl.Callback] = [meter]
    if pruner is not None:
        scoring.watch(pruner)
        callbacks = [pruner, meter]
    trainer = _fitted(model, data, protocol, run.seed, epochs, callbacks, out)
    name, accuracy = _tested(trainer, model, data, protocol.metric)
    best = meter.best(name)
    path = before["train_flops"] if start == "trained" else 0.0
    if pruner is not None and run.variant == "finetuned":
        (out / "plans").mkdir(exist_ok=True)
        pruner.plan.save(out / "plans" / f"{run.plan_key}.json")
    return {
        "start": "scratch" if run.variant.startswith("scratch") else start,
        "epochs": epochs,
        "epochs_total": epochs + (protocol.epochs if start == "trained" else 0),
        "metric": name,
        "accuracy": accuracy,
        "best_accuracy": None if best is None else best[0],
        "best_epoch": None if best is None else best[1],
        **_costs(model, pruner, before),
        **_latency(model, protocol, run.seed),
        "train_flops": path + meter.flops + scoring.flops,
        "train_flops_sparse": path + meter.flops_sparse + scoring.flops,
        "prune_flops": scoring.flops,
        "score_seconds": 0.0 if pruner is None else pruner.report.seconds,
        "score_peak_bytes": None if pruner is None else scoring.peak_bytes,
    }


def _dense(seed: int, out: Path) -> Row:
    """What is known of the dense network of a seed."""
    path = out / "dense" / f"seed={seed}.json"
    if not path.exists():
        raise RuntimeError(f"the dense network of seed {seed} could not be trained, see {out / 'errors'}")
    said: Row = json.loads(path.read_text("utf-8"))
    return said


def _prepared(run: Run, protocol: Protocol, out: Path) -> tuple[Pruner | None, str, int]:
    """The callback of a run, the weights it begins with, and for how many epochs it trains."""
    whole = protocol.epochs + protocol.finetune
    if run.method == "dense":
        return None, "trained", protocol.finetune
    if run.variant == "finetuned":
        start = protocol.start_of(run.method)
        return find(run.method)(Budget(run.keep, run.of)), start, protocol.finetune if start == "trained" else whole  # type: ignore[arg-type]
    plan = out / "plans" / f"{run.plan_key}.json"
    if not plan.exists():
        raise FileNotFoundError(f"{run.method} left no plan to train from scratch: its own run has failed")
    if run.variant == "scratch_b":
        own = json.loads((out / "runs" / f"{run.plan_key}.json").read_text("utf-8"))
        whole = scratch_epochs(whole, _dense(run.seed, out)["flops"], own["flops_sparse"], protocol.cap)
    return Scratch(plan), "initial", whole


def _fitted(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    protocol: Protocol,
    seed: int,
    epochs: int,
    callbacks: list[pl.Callback],
    folder: Path,
) -> pl.Trainer:
    trainer = protocol.trainer(epochs, callbacks, folder)
    pl.seed_everything(seed, workers=True, verbose=False)
    trainer.fit(model, data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer


def _tested(
    trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule, metric: str | None
) -> tuple[str, float]:
    """Name and value of the metric.

    Raises:
        ValueError: if there is none of that name, or it is not clear which one is wanted.
    """
    found = {key: float(value) for part in trainer.test(model, data, verbose=False) for key, value in part.items()}
    names = (
        [key for key in found if "acc" in key.lower()] if metric is None else [key for key in found if key == metric]
    )
    if len(names) != 1:
        wish = "one metric with 'acc' in its name" if metric is None else f"the metric {metric!r}"
        raise ValueError(f"compare wants {wish}, the test returns {', '.join(found) or 'none'}; name one with --metric")
    return names[0], found[names[0]]


def _costs(model: pl.LightningModule, pruner: Pruner | None, dense: Mapping[str, Any]) -> Row:
    cost = count(model, model.example_input_array)
    sparse = float(cost.flops)
    if pruner is not None:
        row: Any = pruner.report.rows[-1]
        sparse = float(row["prune/flops_sparse"])
    act_peak = getattr(latency, "activation_bytes", None)
    return {
        "params": cost.params,
        "params_kept": cost.params / dense["params"],
        "nnz": sum(int(p.count_nonzero()) for p in model.parameters()),
        "flops": cost.flops,
        "flops_kept": cost.flops / dense["flops"],
        "flops_sparse": sparse,
        "bytes": latency.state_dict_bytes(model),
        "act_peak": None if act_peak is None else act_peak(model, model.example_input_array),
    }


def _latency(model: pl.LightningModule, protocol: Protocol, seed: int) -> Row:
    """Median, tenth and ninetieth percentile for one sample, next to the dense network, in turn."""
    if not protocol.repeats:
        return {}
    dense, _ = protocol.build(seed)
    models = {"dense": dense.to(model.device), "run": model}
    warmup = max(3, protocol.repeats // 5)
    times = latency.compare(models, model.example_input_array, (1,), protocol.repeats, warmup, protocol.threads)
    own, other = times["run"][0], times["dense"][0]
    return {
        "latency_ms": own.median_ms,
        "latency_p10_ms": own.p10_ms,
        "latency_p90_ms": own.p90_ms,
        "latency_kept": own.median_ms / other.median_ms,
        "device": own.device,
    }


def _versions() -> str:
    return "; ".join(f"{key} {value}" for key, value in versions().items())


def _write(path: Path, text: str) -> None:
    """Whole or not at all: who is killed here leaves nothing half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def _alone(protocol: Protocol) -> Iterator[list[str]]:
    """Threads as the protocol says, Lightning silent, and our own warnings in a list; all put back afterwards."""
    if os.getcwd() not in sys.path:  # in a worker process: one's own modules are found where the command runs
        sys.path.append(os.getcwd())
    threads = torch.get_num_threads()
    noted: list[str] = []
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    try:
        torch.set_num_threads(protocol.threads)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield noted
            finally:
                noted += [one_line(str(w.message)) for w in caught if _is_ours(w)]
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    return "lightning_prune" in Path(warning.filename).parts
