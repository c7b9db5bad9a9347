"""The methods there are, as a table: paper, what they remove, what they need, and when they prune by default."""

from __future__ import annotations

import argparse
from dataclasses import fields, is_dataclass
from pathlib import Path

from lightning_prune.commands import write
from lightning_prune.methods import discover
from lightning_prune.pruner import Pruner
from lightning_prune.report import markdown_table
from lightning_prune.schedule import Schedule

COLUMNS = ("name", "paper", "removes", "needs", "default_schedule")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write methods.md and methods.json there")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    rows = [described(cls) for cls in discover().values()]
    shown = [{column.replace("_", " "): row[column] for column in COLUMNS} for row in rows]
    write(options.out, "methods.md", markdown_table(shown), rows)
    return 0


def described(cls: type[Pruner]) -> dict[str, str]:
    """What the table says of a method; the paper's address and the file beside it, for the JSON."""
    paper = cls.paper
    return {
        "name": cls.__name__,
        "paper": "baseline, no paper" if paper is None else f"{paper.authors}, {paper.year}",
        "removes": cls.kind,
        "needs": cls.needs,
        "default_schedule": schedule_text(cls.default_schedule),
        "url": "" if paper is None else paper.url,
        "module": cls.__module__,
    }


def schedule_text(schedule: Schedule) -> str:
    """A schedule as one would write it: its points always, the rest where it is not the default.

    Example:
        >>> from lightning_prune.schedule import Iterative
        >>> schedule_text(Iterative(curve="cubic"))
        "Iterative(start=0.1, end=0.7, events=10, curve='cubic')"
    """
    if not is_dataclass(schedule):
        return repr(schedule)
    shown = []
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        replaced = field.name == "events" and getattr(schedule, "every", None) is not None
        if value != field.default or (field.name in ("at", "start", "end", "events") and not replaced):
            shown.append(f"{field.name}={value!r}")
    return f"{type(schedule).__name__}({', '.join(shown)})"
