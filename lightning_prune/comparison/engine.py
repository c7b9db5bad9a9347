"""Shares the runs of a comparison out over processes, and goes on where it was killed."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib

from lightning_prune.comparison.picture import pareto_figure
from lightning_prune.comparison.protocol import Protocol, Run
from lightning_prune.comparison.running import Row, attempt, train_dense
from lightning_prune.comparison.table import COLUMNS, markdown, summarised, verdicts

PHASES = (("dense", "finetuned"), ("scratch_e", "scratch_b"))  # a plan is there before it is trained from scratch


def compare(
    protocol: Protocol,
    runs: Sequence[Run],
    out: Path,
    jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Run what is missing, write rows as they come, and the report at the end.

    Runs go through joblib: to processes of this machine, or to what ``joblib.parallel_config(backend=...)`` names
    around this call. All workers have to see the folder ``out``.

    Args:
        protocol: one for all rows of the folder.
        runs: from `wanted`.
        out: folder for everything that is written; one that holds rows of the same protocol is gone on with.
        jobs: processes; None for what ``parallel_config`` says, else one.
        say: takes a line for each run.

    Returns:
        The rows of these runs; those that failed have an ``error``, and are run again next time.

    Raises:
        ValueError: if the folder holds rows of another protocol.
    """
    _claim(out, protocol)
    rows = _held(out)
    missing = [run for run in runs if run.key not in rows or rows[run.key]["error"]]
    say(f"{len(runs)} runs, {len(runs) - len(missing)} of them done already")
    seeds = sorted({run.seed for run in missing})
    trained = [seed for seed in seeds if not (out / "dense" / f"seed={seed}.json").exists()]
    for seed, error in _shared([(train_dense, seed, protocol, out) for seed in trained], jobs):
        say(f"dense network of seed {seed}: {error or 'trained'}")
    started, done = time.perf_counter(), 0
    for phase in PHASES:
        tasks = [(attempt, run, protocol, out) for run in missing if run.variant in phase]
        for row in _shared(tasks, jobs):
            rows[_key(row)] = row
            _append(out / "rows.csv", row)
            done += 1
            say(_line(row, done, len(missing), (time.perf_counter() - started) / done * (len(missing) - done)))
    mine = [rows[run.key] for run in runs]
    report(out, protocol)
    return mine


def _shared(tasks: Sequence[tuple[Any, ...]], jobs: int | None) -> Iterator[Any]:
    """Results of (function, *arguments), as they come where the backend can say so."""
    if not tasks:
        return
    parallel = joblib.Parallel(n_jobs=jobs)
    if getattr(parallel._backend, "supports_return_generator", False):
        parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    yield from parallel(joblib.delayed(function)(*arguments) for function, *arguments in tasks)


def report(out: Path, protocol: Protocol | None = None) -> tuple[Path, ...]:
    """Write results.md, results.json and pareto.png from rows.csv alone; returns the paths.

    Raises:
        FileNotFoundError: if the folder holds no rows.
    """
    said = json.loads((out / "protocol.json").read_text("utf-8")) if protocol is None else protocol.to_dict()
    rows = rows_in(out)
    summary, verdict = summarised(rows), verdicts(rows)
    paths = out / "results.md", out / "results.json", out / "pareto.png"
    paths[0].write_text(markdown(rows, summary, verdict, said), encoding="utf-8")
    value = {"protocol": said, "summary": summary, "verdicts": verdict, "rows": rows}
    paths[1].write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    pareto_figure(summary).savefig(paths[2])
    return paths


def rows_in(out: Path) -> list[Row]:
    """The last row of each run, from rows.csv alone."""
    return list(_latest(_read(out / "rows.csv")).values())


def _claim(out: Path, protocol: Protocol) -> None:
    """Say of a folder which protocol its rows are of."""
    path, now = out / "protocol.json", json.loads(json.dumps(protocol.to_dict()))
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        if other := [key for key in now if now[key] != before.get(key)]:
            raise ValueError(
                f"{out} holds rows of another protocol: {other[0]} was {before.get(other[0])} and is {now[other[0]]} "
                "now; take another --out, or the same settings"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _held(out: Path) -> dict[str, Row]:
    """Rows that are there, by run; those a kill kept from the CSV are added to it."""
    path = out / "rows.csv"
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)  # a line that was being written
    rows = _latest(_read(path)) if path.exists() and path.stat().st_size else {}
    for file in sorted((out / "runs").glob("*.json")):
        row = json.loads(file.read_text("utf-8"))
        if _key(row) not in rows or (rows[_key(row)]["error"] and not row["error"]):
            rows[_key(row)] = row
            _append(path, row)
    return rows


def _latest(rows: Iterable[Row]) -> dict[str, Row]:
    return {_key(row): row for row in rows}


def _key(row: Row) -> str:
    return Run(row["method"], row["variant"], row["keep"], row["of"], row["seed"]).key


def _append(path: Path, row: Row) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def _read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: COLUMNS[key](value) if value else _EMPTY.get(key) for key, value in row.items() if key in COLUMNS}
                for row in csv.DictReader(file)]  # fmt: skip


_EMPTY = {"error": "", "notes": ""}


def _line(row: Row, done: int, of: int, left: float) -> str:
    run = Run(row["method"], row["variant"], row["keep"], row["of"], row["seed"])
    said = f"failed: {row['error']}" if row["error"] else f"{row['metric']} {row['accuracy']:.4f}"
    rest = f", about {_time(left)} left" if done < of else ""
    return f"[{done} of {of}{rest}] {run}: {said} ({_time(row['seconds'])})"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
