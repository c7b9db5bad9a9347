"""The tables of docs/reliability.md: kills, processes, features of the Trainer, bad inputs, long runs.

    python benchmarks/reliability.py [--parts kills ranks matrix faults long] [--tables-only]

Each part is a module of its own, benchmarks/reliability_<part>.py, which can be run alone and goes on with the rows
that its file in benchmarks/results already holds. Afterwards the tables are written into the page, each between its two
marks; the text around them is by hand. A part without rows says so on the page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pages import RESULTS, ROOT, write

PARTS = ("kills", "ranks", "matrix", "faults", "long")
TABLES = ("matrix",)  # parts that write a table, not rows


def part(name: str) -> tuple[str, Path]:
    """A part's module, and where its rows are."""
    return f"benchmarks.reliability_{name}", RESULTS / f"reliability_{name}{'.md' if name in TABLES else '.csv'}"


def main() -> None:
    """Make what is missing, then write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tables-only", action="store_true", help="write the page from the rows there are")
    options = parser.parse_args()
    parts = {name: part(name) for name in options.parts}
    write(ROOT / "docs" / "reliability.md", parts, options.tables_only)


if __name__ == "__main__":
    main()
