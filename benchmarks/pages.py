"""Rows that benchmarks append, and the tables made of them, put into a page between two marks."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_prune.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = Mapping[str, Any]


def append(rows: Iterable[Row], out: Path) -> None:
    """Append rows to a file that starts with their keys, each as soon as it is made."""
    for row in rows:
        is_new = not out.exists() or not out.stat().st_size
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that were made so far, numbers and truth values as such; none without the file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
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


def make(module: str, out: Path) -> None:
    """Run a benchmark in a process of its own; what it prints is seen."""
    subprocess.run([sys.executable, "-m", module, "--out", str(out)], check=True, cwd=ROOT)


def table_of(module: str, out: Path) -> str:
    """A benchmark's table in Markdown: the file if it is one, else its rows as the module's ``table`` has them."""
    if out.suffix == ".md" and out.exists():
        return out.read_text(encoding="utf-8").strip()
    rows: Sequence[Row] = read(out)
    if not rows:
        return "Not measured yet."
    table: Callable[[Sequence[Row]], Sequence[Row]] | None = getattr(importlib.import_module(module), "table", None)
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


def write(page: Path, parts: Mapping[str, tuple[str, Path]], tables_only: bool) -> None:
    """Make the rows that are missing, part by part (its module, its rows), and write each table into the page."""
    for part, (module, out) in parts.items():
        if not tables_only:
            make(module, out)
        page.write_text(put(page.read_text(encoding="utf-8"), part, table_of(module, out)), encoding="utf-8")
