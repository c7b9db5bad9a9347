"""Compare methods under one protocol, with dense, random and scratch rows; go on after a kill by the same command.

    lightning-prune compare --out results
    lightning-prune compare --config mine.yaml --methods L1Filter TaylorWeight --channels 0.5 0.25 --seeds 0 1 2
    lightning-prune compare --out results --only-report

One dense network for each seed is trained once; every method starts from it and has the same epochs of fine-tuning, on
its default schedule. It writes rows.csv, results.md, results.json and pareto.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_prune.budget import Budget
from lightning_prune.methods import find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--config", type=Path, metavar="YAML", help="sections model:, data: and perhaps trainer:")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="class or file names; by default all")
    for kind, default in (("channels", "0.5"), ("weights", "0.1"), ("ranks", "0.5")):
        parser.add_argument(
            f"--{kind}", nargs="*", type=_budget, default=[_budget(default)], metavar="KEEP[:OF]",
            help=f"budgets of methods that remove {kind}, such as {default} or {default}:params ({default})",
        )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--epochs", type=int, default=15, metavar="E", help="of the dense network (%(default)s)")
    parser.add_argument("--finetune", type=int, default=10, metavar="F", help="of each method (%(default)s)")
    parser.add_argument(
        "--scratch", nargs="+", default=["all"], metavar="NAME",
        help="methods whose plans are also trained from new weights; all, or none (all)",
    )  # fmt: skip
    parser.add_argument("--cap", type=float, default=2.0, metavar="X", help="Scratch-B has at most X times the epochs")
    parser.add_argument(
        "--start", nargs="+", default=[], type=_start, metavar="NAME=START", help="trained or initial, for a method"
    )
    parser.add_argument("--metric", metavar="NAME", help="of the test; by default the only one with 'acc' in its name")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed runs (%(default)s); 0 for none")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="within an operator (%(default)s)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes on this machine")
    parser.add_argument(
        "--out", type=Path, default=Path("lightning_prune_compare"), metavar="DIR", help="(%(default)s)"
    )
    parser.add_argument("--only-report", action="store_true", help="write the report anew from rows.csv")


def run(options: argparse.Namespace) -> int:
    """Run what is missing and report.

    Returns:
        0, or 1 if a run has failed.

    Raises:
        ValueError: for what cannot be compared, before anything is trained.
    """
    from lightning_prune import comparison

    if options.only_report:
        if not (options.out / "rows.csv").exists():
            raise ValueError(f"{options.out} holds no rows.csv to report on")
        _written(comparison.report(options.out))
        return 0
    settings: dict[str, Any] = {} if options.config is None else {"config": comparison.read_config(options.config)}
    protocol = comparison.Protocol(
        **settings,
        epochs=options.epochs,
        finetune=options.finetune,
        metric=options.metric,
        start=dict(options.start),
        cap=options.cap,
        repeats=options.repeats,
        threads=options.threads,
    )
    budgets = {kind: getattr(options, kind) for kind in ("channels", "weights", "ranks")}
    named: Any = options.scratch[0] if options.scratch in (["all"], ["none"]) else options.scratch
    runs = comparison.wanted(options.methods, budgets, options.seeds, named)
    protocol.build(options.seeds[0])  # a config that cannot be read is said now
    rows = comparison.compare(protocol, runs, options.out, options.jobs, lambda line: print(line, flush=True))
    print(f"\n{(options.out / 'results.md').read_text('utf-8')}")
    _written((options.out / "rows.csv", *(options.out / n for n in ("results.md", "results.json", "pareto.png"))))
    failed = [row for row in rows if row["error"]]
    if failed:
        print(f"{len(failed)} of {len(rows)} runs failed; the same command runs them again")
    return int(bool(failed))


def _written(paths: tuple[Path, ...]) -> None:
    print(f"written: {', '.join(map(str, paths))}")


def _budget(text: str) -> Budget:
    keep, _, of = text.partition(":")
    try:
        return Budget(float(keep), of or None)  # type: ignore[arg-type]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _start(text: str) -> tuple[str, str]:
    name, _, start = text.partition("=")
    try:
        return find(name).__name__, start
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
