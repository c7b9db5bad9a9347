"""Two hundred events in one fit: what grows.

    python benchmarks/reliability_long.py [--runs TaylorWeight RigL ...] [--events 200] [--out FILE.csv]

Each run is a process of its own that trains the demo's network for two steps an event, with a TensorBoard logger, and
is counted three times: before its first event, after a quarter of its events, and after the last one. Counted are the
memory of the process, live tensors and Python objects once garbage is collected, hooks on the model, and bytes of the
callback's state in a checkpoint. CPU seconds of a step, event included, are of the first and of the last quarter.
Runs that the file already holds are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_prune import (
    LRPET,
    Iterative,
    Magnitude,
    NetworkSlimming,
    OneShot,
    RandomChannels,
    RigL,
    SparseConnectivityLearning,
    TaylorWeight,
    Updates,
)
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.pruner import Pruner
from lightning_prune.report import markdown_table

SEED = 0
WIDTH = 20  # of the demo's network: channels enough for one to go at each of 200 events
BATCH = 16


def _every_second(events: int) -> Iterative:
    return Iterative(start=2, end=2 * events, every=2, unit="step")


# name -> events -> the callback; None is the same fit without one
RUNS: dict[str, Callable[[int], Pruner | None]] = {
    "no callback": lambda events: None,
    "RandomChannels": lambda events: RandomChannels(0.1, schedule=_every_second(events)),
    "TaylorWeight": lambda events: TaylorWeight(0.1, schedule=_every_second(events)),
    "NetworkSlimming": lambda events: NetworkSlimming(0.3, passes=events),
    "Magnitude": lambda events: Magnitude(0.05, schedule=_every_second(events)),
    "RigL": lambda events: RigL(0.1, schedule=Updates(every=2, start=0.0, end=1.0, least=1)),
    # its masks change at every step until they freeze
    "SparseConnectivityLearning": lambda events: SparseConnectivityLearning(0.1, schedule=OneShot(2 * events, "step")),
    "LRPET": lambda events: LRPET(0.3, schedule=Updates(every=2, start=0.0, end=1.0, least=1, closing=True)),
}
QUIET = ", no logger"
NAMES = [*RUNS, *(name + QUIET for name in ("TaylorWeight", "Magnitude"))]
COUNTED = ("MB", "tensors", "objects")
FIELDS = [
    "run", "seed", "events", "steps", "hooks before", "hooks in fit, first", "hooks in fit, last", "hooks after",
    "MB first", "MB quarter", "MB last", "tensors first", "tensors quarter", "tensors last",
    "objects first", "objects quarter", "objects last", "state bytes quarter", "state bytes last",
    "ms a step, first quarter", "ms a step, last quarter", "ms of an event, first quarter",
    "ms of an event, last quarter", "lines printed", "warnings",
]  # fmt: skip


def count_hooks(model: nn.Module) -> int:
    """Hooks of every sort, on modules, on parameters and on all modules at once."""
    total = 0
    for module in model.modules():
        total += sum(len(value) for key, value in vars(module).items() if key.startswith("_") and "hooks" in key)
    for parameter in model.parameters():
        total += sum(len(getattr(parameter, key) or ()) for key in ("_backward_hooks", "_post_accumulate_grad_hooks"))
    held = [value for key, value in vars(torch_module).items() if key.startswith("_global_") and "hooks" in key]
    return total + sum(len(value) for value in held if isinstance(value, Mapping))


def count_live() -> tuple[int, int]:
    """Tensors, and objects that the garbage collector knows, once it has run."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(each), Tensor) for each in objects), len(objects)


def resident() -> float:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def state_bytes(callback: Callback | None) -> int:
    """What a callback adds to a checkpoint."""
    if callback is None:
        return 0
    buffer = io.BytesIO()
    torch.save(callback.state_dict(), buffer)
    return buffer.tell()


class Clock(Callback):
    """The start of each step, the first of the list of callbacks; with another one at its end, CPU seconds of both."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended = time.process_time()


class Census(Callback):
    """Counts after given steps, behind all other callbacks.

    Attributes:
        counts: step -> what was counted.
        steps: CPU seconds of each step, callbacks included.
        ends: CPU seconds of the callbacks between clock and census at its end, an event among them.
    """

    def __init__(self, at: tuple[int, ...], pruner: Callback | None, clock: Clock) -> None:
        self.at, self.pruner, self.clock = at, pruner, clock
        self.counts: dict[int, dict[str, float]] = {}
        self.steps: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, model: pl.LightningModule, *_: Any) -> None:
        now = time.process_time()
        self.steps.append(now - self.clock.began)
        self.ends.append(now - self.clock.ended)
        if len(self.steps) in self.at:
            tensors, objects = count_live()
            self.counts[len(self.steps)] = {
                "MB": resident(),
                "tensors": tensors,
                "objects": objects,
                "hooks": count_hooks(model),
                "bytes": state_bytes(self.pruner),
            }


class Lines(logging.Handler):
    """Counts what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def run(name: str, events: int) -> dict[str, object]:
    """One fit, counted; a name that ends in "no logger" is the same without one."""
    torch.set_num_threads(1)
    pl.seed_everything(SEED, verbose=False)
    pruner, steps, clock = RUNS[name.removesuffix(QUIET)](events), 2 * events + 2, Clock()
    census = Census((1, 2 * (events // 4), 2 * events), pruner, clock)
    lines = Lines()
    model = DigitsNet(width=WIDTH)
    before = count_hooks(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", enable_checkpointing=False,
            logger=not name.endswith(QUIET) and TensorBoardLogger(folder),
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[clock, *([] if pruner is None else [pruner]), census],
        )  # fmt: skip
        logging.getLogger("lightning.pytorch").addHandler(lines)
        trainer.fit(model, DigitsData(batch_size=BATCH, seed=SEED))
    first, quarter, last = census.counts.values()
    part = events // 2  # steps in a quarter
    ours = pruner is not None

    def milliseconds(values: list[float]) -> float:
        return round(1e3 * median(values), 2)

    in_events = census.ends[1 : 2 * events : 2]
    own = [line for line in lines.said if ours and type(pruner).__name__ in line]
    warned = [str(w.message) for w in caught if ours and type(pruner).__name__ in str(w.message)]
    return {
        "run": name, "seed": SEED, "events": pruner.events_done if pruner is not None else 0, "steps": steps,
        "hooks before": before, "hooks in fit, first": first["hooks"], "hooks in fit, last": last["hooks"],
        "hooks after": count_hooks(model),
        **{
            f"{what} {when}": round(count[what])
            for what in COUNTED
            for when, count in (("first", first), ("quarter", quarter), ("last", last))
        },
        "state bytes quarter": quarter["bytes"], "state bytes last": last["bytes"],
        "ms a step, first quarter": milliseconds(census.steps[2 : part + 2]),
        "ms a step, last quarter": milliseconds(census.steps[2 * events - part : 2 * events]),
        "ms of an event, first quarter": milliseconds(in_events[1 : events // 4 + 1]),
        "ms of an event, last quarter": milliseconds(in_events[-(events // 4) :]),
        "lines printed": len(own), "warnings": len(warned),
    }  # fmt: skip


def long(out: Path, runs: list[str] | None = None, events: int = 200) -> list[dict[str, str]]:
    """Rows of all runs, one process each; those that the file does not hold yet are made and appended."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            csv.DictWriter(file, FIELDS).writeheader()
    for name in runs or NAMES:
        if name in {row["run"] for row in read(out)}:
            continue
        command = [sys.executable, "-m", "benchmarks.reliability_long", "--one", name, "--events", str(events)]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        if made.returncode:
            raise RuntimeError(f"the run of {name} ended with {made.returncode}: {made.stderr[-2000:]}")
        with out.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(json.loads(made.stdout.splitlines()[-1]))
    return read(out)


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a file of results."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a page shows of the rows: first, after a quarter, last."""
    return [
        {
            "run": row["run"],
            "events": int(row["events"]),
            "hooks: before, in the fit at first and last, after": _in_turn(
                row, "hooks before", "hooks in fit, first", "hooks in fit, last", "hooks after"
            ),
            **{what: _in_turn(row, f"{what} first", f"{what} quarter", f"{what} last") for what in COUNTED},
            "bytes of state": _in_turn(row, "state bytes quarter", "state bytes last"),
            "ms a step": _in_turn(row, "ms a step, first quarter", "ms a step, last quarter"),
            "ms of an event": _in_turn(row, "ms of an event, first quarter", "ms of an event, last quarter"),
            "lines": int(row["lines printed"]),
            "warnings": int(row["warnings"]),
        }
        for row in rows
    ]


def _in_turn(row: Mapping[str, Any], *keys: str) -> str:
    return " -> ".join(str(row[key]) for key in keys)


def main() -> None:
    """Make what is missing, print all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", choices=NAMES)
    parser.add_argument("--one", choices=NAMES, help="only this one, in this process, as JSON")
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reliability_long.csv"))
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run(options.one, options.events)))
        return
    print(markdown_table(table(long(options.out, options.runs, options.events))))


if __name__ == "__main__":
    main()
