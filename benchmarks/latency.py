"""Latency of a pruned network, predicted and measured, as fractions of the dense one's in one run.

    python benchmarks/latency.py [--model resnet50] [--batch 8] [--size 224] [--threads 1 2] [--repeats 8]
        [--out benchmarks/results/latency.csv]

Random weights, seed 0, float32, eager, CPU. For each number of threads a latency table of the dense network is made;
`L1Filter` then plans half of the flops, with channel counts as they come and as multiples of 8 and of 16, and half of
the latency. All networks are timed in turn on random images, so that a machine that slows down slows all of them;
``measured`` is the median of one network's times by that of the dense one's, ``fastest`` the same of the least tenth.
``load`` is the load average of the machine over the minute before: its time may be other people's as well.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import time
from pathlib import Path
from typing import Any

import torch
import torchvision

import lightning_prune as lp
from lightning_prune.latency import compare
from lightning_prune.latency_table import latency_table
from lightning_prune.report import markdown_table


def rows(name: str, batch: int, size: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each plan, with a number of threads."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    x = torch.randn(1, 3, size, size)
    graph = lp.trace(model, x)
    load, start = os.getloadavg()[0], time.process_time()
    table = latency_table(graph, batch=batch, threads=threads, repeats=2)
    seconds = time.process_time() - start
    half = lp.Budget(0.5)
    plans = {
        "flops 0.5": lp.plan(graph, budget=half),
        "flops 0.5, round_to=8": lp.plan(graph, budget=half, round_to=8),
        "flops 0.5, round_to=16": lp.plan(graph, budget=half, round_to=16),
        "latency 0.5, round_to=16": lp.plan(
            graph, budget=lp.Budget(0.5, of="latency"), latency_table=table, round_to=16
        ),
    }
    models = {"dense": model}
    for key, plan in plans.items():
        models[key] = copy.deepcopy(model)
        lp.cut(models[key], plan, verify="never", absorb=False)
    timed = {key: each[0] for key, each in compare(models, x, (batch,), repeats, 2, threads).items()}
    dense = timed["dense"]
    out = []
    for key, plan in plans.items():
        own, predicted = timed[key], table.predict(graph, plan) / table.dense_ms
        measured = own.median_ms / dense.median_ms
        out.append(
            {
                "model": name,
                "batch": batch,
                "threads": threads,
                "budget": key,
                "flops": graph.cost(plan).flops / graph.cost().flops,
                "predicted": predicted,
                "measured": measured,
                "fastest": own.p10_ms / dense.p10_ms,
                "error": predicted / measured - 1,
                "dense_ms": dense.median_ms,
                "dense_p10_ms": dense.p10_ms,
                "dense_p90_ms": dense.p90_ms,
                "rest": table.rest_ms / table.dense_ms,
                "table_cpu_s": seconds,
                "load": load,
            }
        )
    return out


def main() -> None:
    """Time each number of threads, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description="Latency of a pruned network, predicted and measured.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency.csv"))
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for threads in options.threads:
        found += rows(options.model, options.batch, options.size, threads, options.repeats)
        print(markdown_table(found), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
