"""Do processes decide the same? Every method under DDP on the CPU (gloo), two and four processes.

    python benchmarks/reliability_ranks.py --out benchmarks/results/reliability_ranks.csv
    python benchmarks/reliability_ranks.py --methods RigL LRPET --processes 2

One row a method and number of processes; rows that the CSV has already are not made again. Of each row:

- plans, weights: a fit on the digits, of two epochs on the method's own schedule. Whether the plan after each event is
  the same on all processes, and the weights at the end, bit by bit.
- as one: one event after four steps of 16 samples in all, and the same calibration data in batches of seven. Whether
  the plan is the one that a single process makes of the same samples.
- few: the same with all calibration data in one batch, so that all processes but the first look at none.

Seed 0 for the fit, 1 for the single event. Nets of width 4.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightning_prune.methods import discover  # noqa: E402
from lightning_prune.report import markdown_table  # noqa: E402
from tests.two_processes import METHODS, look  # noqa: E402

FIELDS = ["method", "kind", "processes", "events", "plans", "weights", "as one", "few", "error"]


def ranks(
    out: Path | None = None, processes: Sequence[int] = (2, 4), methods: Sequence[str] = METHODS
) -> list[dict[str, Any]]:
    """Rows of all methods, those that ``out`` has already included.

    Args:
        out: CSV that rows are added to, as they are made.
        processes: how many, one row each.
        methods: class names.
    """
    rows = known(out)
    for number in processes:
        done = {row["method"] for row in rows if int(row["processes"]) == number}
        if left := [name for name in methods if name not in done]:
            for row in fits(number, left):
                rows.append(row)
                append(out, row)
    return rows


def fits(processes: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Start the processes once for all methods; one that fails ends it, and its row says what was said."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "tests.two_processes", place, str(processes), *methods]
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        environment = {**os.environ, **path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        files = [Path(place, f"{process}.json") for process in range(processes)]
        said = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        found = [name for name in methods if all(name in one for one in said)]
        rows = [row_of(name, [one[name] for one in said], Path(place)) for name in found]
    if failed := [name for name in methods if name not in found][:1]:
        error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        rows.append({"method": failed[0], "kind": discover()[failed[0]].kind, "processes": processes, "error": error})
    return rows


def row_of(name: str, said: Sequence[dict[str, Any]], place: Path) -> dict[str, Any]:
    """What the processes said of a method, next to one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 64 samples are few
        alone = {"look": look(name, 1, place)["plan"], "few": look(name, 1, place, 64)["plan"]}
    trained, first = [one["train"] for one in said], said[0]["train"]
    return {
        "method": name, "kind": discover()[name].kind, "processes": len(said), "events": first["events"],
        "plans": yes(all(one["plans"] == first["plans"] for one in trained) and first["events"] > 0),
        "weights": yes(all(one["weights"] == first["weights"] for one in trained)),
        "as one": yes(all(one["look"]["plan"] == alone["look"] for one in said)),
        "few": yes(all(one["few"]["plan"] == alone["few"] for one in said)),
        "error": "",
    }  # fmt: skip


def yes(fact: bool) -> str:
    return "yes" if fact else "no"


def known(out: Path | None) -> list[dict[str, Any]]:
    """Rows that were made before; those of an error are made again."""
    if out is None or not out.exists():
        return []
    with out.open(newline="") as file:
        return [row for row in csv.DictReader(file) if not row["error"]]


def append(out: Path | None, row: dict[str, Any]) -> None:
    if out is None:
        return
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Make the rows that are missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    rows = ranks(options.out, options.processes, options.methods)
    print(markdown_table([{field: row.get(field, "") for field in FIELDS} for row in rows]))


if __name__ == "__main__":
    main()
