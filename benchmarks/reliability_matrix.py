"""Features of the Trainer x kinds of methods: a table with a tick only where a test has run and passed.

    python benchmarks/reliability_matrix.py [--tests tests/test_loops.py] [--out FILE.md]

The tests run under pytest, and the table is made of the results it writes: a row is a test with its parameters except
the method, a column what the method does. A cell says how many methods of that kind passed; a test that was skipped
or failed says so, with the reason. Tests that name no method have a list of their own. Nothing is written by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from lightning_prune.methods import discover
from lightning_prune.report import markdown_table

KINDS = {"channels": "channel cut", "weights": "weight mask", "ranks": "rank"}


@dataclass(frozen=True)
class Ran:
    """A test that ran: what it is of, its method if it has one, and what came out."""

    row: str
    method: str | None
    outcome: str  # "passed", "skipped" or "failed"
    reason: str = ""


def run(tests: list[str]) -> list[Ran]:
    """Run test files and read what pytest says of each test."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *tests]
        subprocess.run(command, check=False, cwd=Path(__file__).parents[1])
        if not results.exists():
            raise SystemExit(f"pytest wrote no results of {', '.join(tests)}")
        return [read(case) for case in ElementTree.parse(results).iter("testcase")]


def read(case: ElementTree.Element) -> Ran:
    """One ``<testcase>``: its name is ``test_what[parameters joined by dashes]``."""
    name, _, parameters = case.get("name", "").partition("[")
    parts = parameters.removesuffix("]").split("-") if parameters else []
    method = next((part for part in parts if part in discover()), None)
    left = "-".join(part for part in parts if part != method)
    row = name.removeprefix("test_").replace("_", " ") + (f": {left}" if left else "")
    for tag, outcome in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        found = case.find(tag)
        if found is not None:
            return Ran(row, method, outcome, found.get("message", "").splitlines()[0])
    return Ran(row, method, "passed")


def table(ran: Iterable[Ran]) -> str:
    """Markdown: the matrix, and the tests that are of one method or none."""
    rows: dict[str, dict[str, list[Ran]]] = {}
    alone = []
    for each in ran:
        if each.method is None:
            alone.append(each)
        else:
            rows.setdefault(each.row, {}).setdefault(discover()[each.method].kind, []).append(each)
    matrix = [{"feature": row, **{KINDS[k]: cell(cells.get(k, [])) for k in KINDS}} for row, cells in rows.items()]
    listed = "".join(f"- {each.row}: {cell([each])}\n" for each in alone)
    return markdown_table(matrix) + ("\n\nAlso:\n\n" + listed if listed else "\n")


def cell(ran: list[Ran]) -> str:
    """A tick where every test of it passed, with the methods; a blank where none ran."""
    if not ran:
        return ""
    bad = [each for each in ran if each.outcome != "passed"]
    if bad:
        reasons = sorted({f"{each.outcome}: {each.reason}" for each in bad})
        return "; ".join(reasons).replace("|", "/")
    names = ", ".join(each.method for each in ran if each.method)
    return f"✓ {names}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", nargs="+", default=["tests/test_loops.py"])
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    ran = run(options.tests)
    text = table(ran)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if any(each.outcome == "failed" for each in ran):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
