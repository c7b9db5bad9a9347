"""The tables of docs/performance.md: training steps, cuts, events, scores, files, imports, latency, growth.

    python benchmarks/performance.py [--parts steps oneshot ...] [--tables-only]

Each part is a module of its own, benchmarks/performance_<part>.py, which can be run alone and goes on with the rows
that its file in benchmarks/results already holds. Everything is a ratio of two things done in turns in one process.
Afterwards the tables are written into the page, each between its two marks; the text around them is by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pages import RESULTS, ROOT, write

PARTS = ("steps", "oneshot", "events", "budget", "scoring", "files", "start", "latency", "growth")


def main() -> None:
    """Make what is missing, then write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tables-only", action="store_true", help="write the page from the rows there are")
    options = parser.parse_args()
    parts = {name: (f"benchmarks.performance_{name}", RESULTS / f"performance_{name}.csv") for name in options.parts}
    write(ROOT / "docs" / "performance.md", parts, options.tables_only)


if __name__ == "__main__":
    main()
