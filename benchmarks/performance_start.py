"""How long the import of the package takes, over that of lightning, in turns; and the demo from end to end.

    python benchmarks/performance_start.py [--repeat 7] [--out FILE.csv]

Each import is a fresh process, ``python -c "import ..."`` with one thread; CPU seconds of the process and its children,
user and system, as the kernel counts them once they have ended. ``import lightning`` is what the others are divided by,
turn by turn; their order changes from turn to turn, and the first turn warms. ``lightning-prune --help`` is a fresh
process as well. ``lightning-prune demo`` runs once with its defaults in an empty folder, two threads allowed; its goal
is of wall seconds on two free cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pages import RESULTS, ROOT, append, read

COMMANDS = {
    "import lightning": ["-c", "import lightning"],
    "import lightning_prune": ["-c", "import lightning_prune"],
    "lightning-prune --help": ["-m", "lightning_prune", "--help"],
}
BASES = {"import lightning_prune": "import lightning", "lightning-prune --help": "import lightning"}
GOALS = {"import lightning_prune": 1.1}
MOST_SECONDS = 60  # of the demo


def seconds_of(arguments: Sequence[str], threads: int, folder: str) -> tuple[float, float]:
    """CPU and wall seconds of a fresh Python process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def rows(repeat: int, known: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """A row for each process that is not known yet."""
    names = list(COMMANDS)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(-1, repeat):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if (name, turn) not in known:
                    cpu, wall = seconds_of(COMMANDS[name], 1, folder)
                    if turn >= 0:
                        yield {"what": name, "turn": turn, "cpu": f"{cpu:.3f}", "wall": f"{wall:.3f}"}
        if ("lightning-prune demo", 0) not in known:
            cpu, wall = seconds_of(["-m", "lightning_prune", "demo"], 2, folder)
            yield {"what": "lightning-prune demo", "turn": 0, "cpu": f"{cpu:.3f}", "wall": f"{wall:.3f}"}


def table(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The page's: medians over turns, with the goals."""
    cpu = {(row["what"], row["turn"]): row["cpu"] for row in found}
    out = []
    for name in dict.fromkeys(row["what"] for row in found):
        of = [row for row in found if row["what"] == name]
        line = {
            "what": f"`{name}`",
            "CPU seconds": f"{median(row['cpu'] for row in of):.2f}",
            "wall seconds": f"{median(row['wall'] for row in of):.2f}",
            "ratio": "",
            "lowest": "",
            "highest": "",
            "goal": "",
            "met": "",
        }
        if base := BASES.get(name):
            ratios = [row["cpu"] / cpu[base, row["turn"]] for row in of if (base, row["turn"]) in cpu]
            line |= {"ratio": f"{median(ratios):.2f}", "lowest": f"{min(ratios):.2f}", "highest": f"{max(ratios):.2f}"}
            if goal := GOALS.get(name):
                line |= {"goal": f"{goal:g}", "met": "yes" if median(ratios) <= goal else "no"}
        elif name == "lightning-prune demo":
            line |= {"goal": f"{MOST_SECONDS} s", "met": "yes" if of[0]["wall"] < MOST_SECONDS else "no"}
        out.append(line)
    return out


def main() -> None:
    """Measure what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "performance_start.csv")
    options = parser.parse_args()
    known = {(row["what"], row["turn"]) for row in read(options.out)}
    append(rows(options.repeat, known), options.out)


if __name__ == "__main__":
    main()
