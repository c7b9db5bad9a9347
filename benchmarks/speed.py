"""How long a one-shot prune takes, beside Torch-Pruning in the same process, and a further event beside the first.

    python benchmarks/speed.py [--models resnet18 ...] [--repeat 5] [--out benchmarks/results/speed.csv]

Random weights, seed 0, one 224x224 image, one thread, float32. Ours is `trace`, `plan` with `L1Filter` at
``Budget(0.5)`` and `cut` with ``verify="never"``, without absorbing constants, which Torch-Pruning does not do either;
Torch-Pruning's is building a `BasePruner` with magnitude scores at half the channels and its `step`. Both models ran
once before. Seconds are CPU seconds of the process, as the machine may be shared; the least of all repeats, which take
turns. ``event`` is what an iterative run does at its second event: `ChannelGraph.after`,
`plan`, `cut`, against a first one of `trace`, `plan`, and `cut` with its proof. ``copy`` is what no event can be faster
than: cloning, into fresh memory as a cut has to, the tensors that the second event left smaller.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import lightning_prune as lp

MODELS = ["resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "convnext_tiny", "vit_b_16"]


def ours(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of each part of a one-shot prune."""
    start = time.process_time()
    graph = lp.trace(model, x)
    traced = time.process_time()
    plan = lp.plan(graph, method="l1_filter", budget=lp.Budget(0.5))
    planned = time.process_time()
    lp.cut(model, plan, verify="never", absorb=False)
    cut = time.process_time()
    return {"trace": traced - start, "plan": planned - traced, "cut": cut - planned, "ours": cut - start}


def theirs(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of Torch-Pruning's one-shot prune."""
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=last,
        num_heads=heads,
    )  # fmt: skip
    pruner.step()
    return {"torch-pruning": time.process_time() - start}


def events(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of the first event, proof included, of the second, and of a copy of what that one left."""
    start = time.process_time()
    graph = lp.trace(model, x)
    plan = lp.plan(graph, method="l1_filter", budget=lp.Budget(0.9))
    lp.cut(model, plan, graph=graph, absorb=False)
    first = time.process_time()
    after = graph.after(plan)
    step = lp.plan(after, method="l1_filter", budget=lp.Budget(0.9))
    lp.cut(model, step, graph=after, verify="never", absorb=False)
    second = time.process_time()
    changed = [value for name, value in model.state_dict().items() if name in step.shapes]
    found = time.process_time()
    copies = [value.clone() for value in changed]
    copied = time.process_time()
    assert len(copies) == len(step.shapes)
    return {"first event": first - start, "event": second - first, "copy": copied - found}


def least(times: list[dict[str, float]]) -> dict[str, float]:
    """The least of each part."""
    return {key: min(row[key] for row in times) for key in times[0]}


def row(name: str, repeat: int) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    runs: dict[Callable[[nn.Module, Tensor], dict[str, float]], list[dict[str, float]]] = {
        ours: [], theirs: [], events: []
    }  # fmt: skip
    for _ in range(repeat):
        for run, times in runs.items():
            fresh = copy.deepcopy(model)
            with torch.no_grad():
                fresh(x)
            times.append(run(fresh, x))
    found = {key: value for times in runs.values() for key, value in least(times).items()}
    return {
        "model": name,
        **{key: f"{value:.3f}" for key, value in found.items()},
        "ours / torch-pruning": f"{found['ours'] / found['torch-pruning']:.2f}",
        "event / first": f"{found['event'] / found['first event']:.3f}",
        "copy / first": f"{found['copy'] / found['first event']:.3f}",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        line = row(name, options.repeat)
        print(line, flush=True)
        is_new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, line.keys())
            if is_new:
                writer.writeheader()
            writer.writerow(line)


if __name__ == "__main__":
    main()
