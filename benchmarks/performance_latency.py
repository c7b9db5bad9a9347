"""Latency of a cut network over the dense one's, beside the fraction of the flops that is left, in turns.

    python benchmarks/performance_latency.py [--models resnet50 ...] [--batches 1 32] [--size 224] [--threads 1]
        [--repeats 3] [--out FILE.csv]
    python benchmarks/performance_latency.py --predict --models resnet50 --batches 8 --threads 2
    python benchmarks/performance_latency.py --profile --models mobilenet_v2 --batches 32

Random weights, seed 0, float32, eager, CPU, eval mode. `L1Filter` plans half of the flops, with channel counts as they
come, as multiples of 8, and as multiples of 16, the dense and all cut networks are run on random images in turn, in an
order that changes from turn to turn, after a run of each that is not counted. With one thread times are CPU seconds of
the process, as the machine may be shared, else wall seconds. ``speed-up`` is the median over turns of the dense
network's time by the cut one's of the same turn; ``of the flops`` is it by the flops' ratio, dense by cut: 1 if a flop
takes as long as before. The goal is 0.8 at batch 32 with multiples of 8.

``--latency MODELS`` names networks for which a latency table is made at batch 8, and half of the latency is
planned with it; ``--predict`` makes one at each batch, and says what it predicts of each plan. ``--profile`` prints the
time of each operator, dense and cut, and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_prune as lp
from benchmarks.pages import RESULTS, append, read
from lightning_prune.latency_table import LatencyTable, latency_table
from lightning_prune.report import markdown_table

MODELS = ["resnet50", "mobilenet_v2", "vit_b_16"]
GOAL, JUDGED = 0.8, "flops 0.5, round_to=8"
STEPS = {"flops 0.5": 1, JUDGED: 8, "flops 0.5, round_to=16": 16}
Plans = Mapping[str, lp.Plan]


def plans_of(graph: lp.ChannelGraph, table: LatencyTable | None) -> dict[str, lp.Plan]:
    """What is compared."""
    plans = {key: lp.plan(graph, budget=lp.Budget(0.5), round_to=step) for key, step in STEPS.items()}
    if table is not None:
        half = lp.Budget(0.5, of="latency")
        plans["latency 0.5, round_to=8"] = lp.plan(graph, budget=half, latency_table=table, round_to=8)
    return plans


def cut_models(model: nn.Module, plans: Plans) -> dict[str, nn.Module]:
    """The dense network, and copies cut to each plan."""
    models = {"dense": model}
    for key, plan in plans.items():
        models[key] = copy.deepcopy(model)
        lp.cut(models[key], plan, verify="never", absorb=False)
    return models


def timed(models: Mapping[str, nn.Module], x: Tensor, repeats: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each, turn by turn."""
    clock = time.process_time if threads == 1 else time.perf_counter
    names, found = list(models), {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(-1, repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = clock()
                models[name](x)
                if turn >= 0:
                    found[name].append(clock() - start)
    return found


def rows(
    name: str, batch: int, threads: int, options: argparse.Namespace, table: LatencyTable | None
) -> Iterator[dict[str, Any]]:
    """One row for each plan."""
    graph = traced(name, options.size)
    plans = plans_of(graph, table)
    seconds = timed(
        cut_models(graph.model, plans), torch.randn(batch, 3, options.size, options.size), options.repeats, threads
    )
    for key, plan in plans.items():
        speed = [dense / own for dense, own in zip(seconds["dense"], seconds[key], strict=True)]
        flops = graph.cost(plan).flops / graph.cost().flops
        yield {
            "model": name,
            "batch": batch,
            "threads": threads,
            "budget": key,
            "dense_ms": f"{1000 * median(seconds['dense']):.1f}",
            "ms": f"{1000 * median(seconds[key]):.1f}",
            "flops": f"{flops:.4f}",
            "speed": f"{median(speed):.4f}",
            "lowest": f"{min(speed):.4f}",
            "highest": f"{max(speed):.4f}",
            "predicted": "" if table is None else f"{table.predict(graph, plan) / table.dense_ms:.4f}",
            "repeats": options.repeats,
            "load": f"{os.getloadavg()[0]:.1f}",
            "torch": torch.__version__,
        }


def traced(name: str, size: int) -> lp.ChannelGraph:
    """The network with the weights of seed 0."""
    torch.manual_seed(0)
    return lp.trace(torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, size, size))


def table(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The page's, with the goal."""
    out = []
    for row in found:
        judged = row["budget"] == JUDGED and row["batch"] == 32
        part = row["speed"] * row["flops"]
        out.append(
            {
                "network": row["model"],
                "batch": row["batch"],
                "budget": row["budget"],
                "dense, ms": row["dense_ms"],
                "cut, ms": row["ms"],
                "flops kept": f"{row['flops']:.3f}",
                "speed-up": f"{row['speed']:.2f}",
                "lowest": f"{row['lowest']:.2f}",
                "highest": f"{row['highest']:.2f}",
                "of the flops": f"{part:.2f}",
                "goal": GOAL if judged else "",
                "met": ("yes" if part >= GOAL else "no") if judged else "",
            }
        )
    return out


def operators(name: str, batch: int, size: int, most: int = 9) -> list[dict[str, Any]]:
    """Milliseconds of CPU that each operator takes by itself, dense and cut, the largest first."""
    graph = traced(name, size)
    models = cut_models(graph.model, {JUDGED: plans_of(graph, None)[JUDGED]})
    x = torch.randn(batch, 3, size, size)
    times: dict[str, dict[str, float]] = {}
    for which, model in models.items():
        with torch.inference_mode():
            model(x)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                model(x)
        times[which] = {event.key: event.self_cpu_time_total / 1000 for event in seen.key_averages()}
    dense, cut = times["dense"], times[JUDGED]
    order = sorted(dense, key=lambda key: -dense[key])[:most]
    return [
        {
            "operator": key,
            "dense, ms": f"{dense[key]:.1f}",
            "part": f"{dense[key] / sum(dense.values()):.3f}",
            "cut, ms": f"{cut.get(key, 0.0):.1f}",
            "speed-up": f"{dense[key] / cut[key]:.2f}" if key in cut else "",
        }
        for key in order
    ]


def main() -> None:
    """Time what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--latency", nargs="*", default=["mobilenet_v2"], help="networks to plan half of the latency of"
    )
    parser.add_argument("--predict", action="store_true", help="say what a latency table predicts; into another file")
    parser.add_argument("--profile", action="store_true", help="print the time of each operator, and write nothing")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or RESULTS / ("latency_predicted.csv" if options.predict else "performance_latency.csv")
    known = {(row["model"], row["batch"], row["threads"]) for row in read(out)}
    for name in options.models:
        for threads in options.threads:
            torch.set_num_threads(threads)
            tables: LatencyTable | None = None
            for batch in options.batches:
                if options.profile:
                    print(f"{name}, batch {batch}\n{markdown_table(operators(name, batch, options.size))}", flush=True)
                elif (name, batch, threads) not in known:
                    if options.predict or (name in options.latency and tables is None):
                        graph = traced(name, options.size)
                        at = batch if options.predict else 8
                        tables = latency_table(graph, batch=at, threads=threads, repeats=2)
                    append(list(rows(name, batch, threads, options, tables)), out)


if __name__ == "__main__":
    main()
