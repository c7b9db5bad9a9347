"""How long it takes to solve a budget to whole channels.

    python benchmarks/performance_budget.py [--models resnet50 densenet121] [--repeat 9] --out FILE.csv

Random weights, seed 0, one thread. The graph is there, and so is a score for each channel: what is timed is
`lightning_prune.ranking`, asked to keep half of the flops or of the parameters, of all groups in one ranking ("global")
or of each the same fraction ("uniform"), with the graph's arithmetic to say what a choice costs. The settings take
turns. CPU seconds of the process: median of the rounds, with the least and the greatest. ``asked`` is how often the
solver had a choice counted, ``counting`` the share of the time that this took. ``in forwards`` is the median over that
of a forward of the network in the same rounds, so that machines can be compared.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_prune as lp
from benchmarks.pages import Row, append, read

MODELS = ["resnet50", "densenet121"]
SETTINGS = [("flops", "global"), ("params", "global"), ("flops", "uniform"), ("params", "uniform")]
GOAL = 0.2
Counts = Mapping[str, int]


class Timed(lp.L1Filter):
    """The method, with a clock around its choice and around each count of a cost."""

    asked = 0
    counting = 0.0

    def start(self) -> None:
        """Forget what was seen."""
        self.asked, self.counting = 0, 0.0

    def _measured_cost(self, counts: Counts) -> Any:
        begun = time.process_time()
        try:
            return super()._measured_cost(counts)
        finally:
            self.asked += 1
            self.counting += time.process_time() - begun


def figures(name: str, repeat: int) -> Iterator[Row]:
    """The rows of one network."""
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    graph = lp.trace(model, x)
    methods = {(of, scope): Timed(lp.Budget(0.5, of=of), scope=scope) for of, scope in SETTINGS}
    scores = {setting: method.scores_for(graph) for setting, method in methods.items()}
    seconds: dict[Any, list[float]] = {setting: [] for setting in [*SETTINGS, "forward"]}
    for i in range(repeat + 1):
        gc.collect()
        begun = time.process_time()
        with torch.no_grad():
            model(x)
        seconds["forward"].append(time.process_time() - begun)
        for of, scope in SETTINGS[i % 4 :] + SETTINGS[: i % 4]:
            method = methods[of, scope]
            method.start()
            begun = time.process_time()
            method._choose(scores[of, scope], method.budget)
            seconds[of, scope].append(time.process_time() - begun)
    for of, scope in SETTINGS:
        mine, method = seconds[of, scope][1:], methods[of, scope]  # the first warms up
        yield {
            "model": name, "of": of, "scope": scope, "groups": len(graph.groups), "median": median(mine),
            "lowest": min(mine), "highest": max(mine), "asked": method.asked,
            "counting": method.counting / seconds[of, scope][-1], "forward": median(seconds["forward"][1:]),
            "rounds": len(mine),
        }  # fmt: skip


def table(rows: Sequence[Row]) -> list[Row]:
    """The page's table."""
    return [
        {
            **{key: row[key] for key in ("model", "groups", "of", "scope")},
            **{f"{key}, s": f"{row[key]:.4f}" for key in ("median", "lowest", "highest")},
            "in forwards": f"{row['median'] / row['forward']:.2f}",
            "asked": row["asked"],
            "counting": f"{row['counting']:.0%}",
            "goal, s": f"{GOAL:.1f}",
            "met": "yes" if row["median"] <= GOAL else "no",
        }
        for row in rows
    ]


def main() -> None:
    """Measure the networks that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {row["model"] for row in read(options.out)}
    for name in options.models:
        if name not in known:
            append(list(figures(name, options.repeat)), options.out)


if __name__ == "__main__":
    main()
