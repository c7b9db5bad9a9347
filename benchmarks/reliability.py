"""The tables of docs/reliability.md: kills, processes, features of the Trainer, bad inputs, long runs.

    python benchmarks/reliability.py [--parts kills ranks matrix faults long] [--tables-only]

Each part is a module of its own, benchmarks/reliability_<part>.py, which can be run alone and goes on with the rows
that its file in benchmarks/results already holds. Afterwards the tables are written into the page, each between its two
marks; the text around them is by hand. A part without rows says so on the page.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lightning_prune.report import markdown_table  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("kills", "ranks", "matrix", "faults", "long")
TABLES = ("matrix",)  # parts that write a table, not rows
Row = Mapping[str, Any]


def make(part: str) -> None:
    """Run a part in a process of its own; what it prints is seen."""
    command = [sys.executable, "-m", f"benchmarks.reliability_{part}", "--out", str(results_of(part))]
    subprocess.run(command, check=True, cwd=ROOT)


def results_of(part: str) -> Path:
    """Where the rows of a part are."""
    return RESULTS / f"reliability_{part}{'.md' if part in TABLES else '.csv'}"


def rows_of(part: str) -> list[dict[str, Any]]:
    """Rows that were made so far; truth values and numbers as such."""
    if not results_of(part).exists():
        return []
    with results_of(part).open(newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def table_of(part: str) -> str:
    """A part's table in Markdown: as its module's ``table`` sums the rows up, if it has one."""
    if part in TABLES and results_of(part).exists():
        return results_of(part).read_text(encoding="utf-8").strip()
    rows: Sequence[Row] = rows_of(part)
    if not rows:
        return "Not measured yet."
    module = importlib.import_module(f"benchmarks.reliability_{part}")
    table: Callable[[Sequence[Row]], Sequence[Row]] | None = getattr(module, "table", None)
    return markdown_table(rows if table is None else table(rows))


def put(page: str, part: str, table: str) -> str:
    """The page with another table between the marks of a part.

    Raises:
        ValueError: if the page has not both marks, once each.
    """
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs {begin.strip()!r} and {end!r} once each, for the table between them")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    """Make what is missing, then write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tables-only", action="store_true", help="write the page from the rows there are")
    options = parser.parse_args()
    for part in options.parts:
        if not options.tables_only:
            make(part)
        PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), part, table_of(part)), encoding="utf-8")


if __name__ == "__main__":
    main()
