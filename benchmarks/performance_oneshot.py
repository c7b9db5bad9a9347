"""A one-shot prune beside Torch-Pruning, what the proof of its cut costs, and the memory that it takes.

    python benchmarks/performance_oneshot.py [--models resnet18 ...] [--repeat 5] --out FILE.csv

Random weights, seed 0, one 224x224 image, one thread, float32, absorb=False. Ours is `trace`, `plan` (which scores)
with `L1Filter` at ``Budget(0.5)`` and `cut` with ``verify="never"``; Torch-Pruning's is building a `BasePruner` with
magnitude scores at half the channels, and its `step`. Each takes a fresh copy of the network, which has run once. They
take turns, and so do a cut with its proof (the default) and one forward in eval mode without gradients. Seconds are CPU
seconds of the process, as the machine may be shared; each figure is the median of the rounds with the least and the
greatest of them.

- ``seconds``: ours without the proof over Torch-Pruning's, of the same round.
- ``proof, seconds``: what a cut with its proof takes more than one without, in forwards of the same round.
- ``proof, forwards``: how often the network ran in a cut with its proof, by a hook.
- ``memory`` and ``memory, proved``: the most that the process held in `trace`, `plan` and `cut`, the network itself
  included, over twice its parameters and buffers plus one forward. A process of its own for each network; the high
  water mark of its resident set, over what there was before, is `lightning_prune.comparison.meters`', for a forward as
  well as for a prune. A small network was pruned before, so that imports do not count. ``MALLOC_MMAP_THRESHOLD_``
  makes the C library hand back blocks at once: by default it keeps some, so that the figure is its, not the prune's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_prune as lp
from benchmarks.pages import ROOT, Row, append, read
from lightning_prune.comparison import meters

MODELS = ["resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "convnext_tiny", "vit_b_16"]
GOALS = {"seconds": 1.0, "proof, seconds": 2.0, "proof, forwards": 2.0, "memory": 1.0, "memory, proved": 1.0}


def ours(model: nn.Module, x: Tensor, verify: str = "never") -> dict[str, float]:
    """Seconds of each part of a one-shot prune."""
    start = time.process_time()
    graph = lp.trace(model, x)
    traced = time.process_time()
    plan = lp.plan(graph, method="l1_filter", budget=lp.Budget(0.5))
    planned = time.process_time()
    lp.cut(model, plan, verify=verify, absorb=False)
    cut = time.process_time()
    return {"trace": traced - start, "plan": planned - traced, "cut": cut - planned, "all": cut - start}


def proved(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of a prune with the proof of its cut, and how often the network ran for that."""
    runs: list[bool] = []
    graph = lp.trace(model, x)
    plan = lp.plan(graph, method="l1_filter", budget=lp.Budget(0.5))
    handle = model.register_forward_hook(lambda *_: runs.append(True))
    start = time.process_time()
    lp.cut(model, plan, absorb=False)
    seconds = time.process_time() - start
    handle.remove()
    return {"cut": seconds, "forwards": float(len(runs))}


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
    return {"all": time.process_time() - start}


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of a forward."""
    start = time.process_time()
    model(x)
    return {"all": time.process_time() - start}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network and its input, which it has seen once."""
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    forward(model, x)
    return model, x


def rounds(name: str, repeat: int) -> Iterator[dict[str, dict[str, float]]]:
    """All four in turns, each time in another order."""
    sides: list[Callable[[nn.Module, Tensor], dict[str, float]]] = [ours, theirs, proved, forward]
    model, x = made(name)
    for i in range(repeat + 1):
        found = {}
        for side in sides[i % 4 :] + sides[: i % 4]:
            fresh = copy.deepcopy(model)
            forward(fresh, x)
            gc.collect()
            found[side.__name__] = side(fresh, x)
        if i:  # the first warms up
            yield found


def figures(name: str, repeat: int) -> Iterator[Row]:
    """The rows of one network."""
    found = list(rounds(name, repeat))
    values = {
        "seconds": [r["ours"]["all"] / r["theirs"]["all"] for r in found],
        "proof, seconds": [(r["proved"]["cut"] - r["ours"]["cut"]) / r["forward"]["all"] for r in found],
        "proof, forwards": [r["proved"]["forwards"] for r in found],
    }
    said = [("ours", key) for key in found[0]["ours"]] + [("theirs", "all"), ("proved", "cut"), ("forward", "all")]
    seconds = " ".join(f"{side}.{key}={median(r[side][key] for r in found):.4f}" for side, key in said)
    memory = [json.loads(line) for line in in_own_process(name)]
    for what in ("memory", "memory, proved"):
        values[what] = [(m["parameters"] + m[what]) / (2 * m["parameters"] + m["forward"]) for m in memory]
    megabytes = " ".join(f"{key}={value / 2**20:.1f}" for key, value in memory[-1].items())
    for what, each in values.items():
        yield {
            "model": name,
            "what": what,
            "median": median(each),
            "lowest": min(each),
            "highest": max(each),
            "rounds": len(each),
            "of": megabytes if what.startswith("memory") else seconds,
        }


def in_own_process(name: str, repeat: int = 1) -> Iterator[str]:
    """Measure the memory of one network, in processes of their own."""
    for _ in range(repeat):
        command = [sys.executable, str(Path(__file__)), "--memory", name, "--out", "-"]
        exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, cwd=ROOT, env=exact, capture_output=True, text=True)
        yield done.stdout.splitlines()[-1]


def memory(name: str) -> dict[str, int]:
    """Bytes of a network, and the most that a forward and a prune take over what there was before."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    ours(small, torch.randn(1, 3, 16, 16), "first")
    model, x = made(name)
    found = {"parameters": sum(t.nbytes for t in (*model.parameters(), *model.buffers()))}
    found["forward"] = peak(lambda: forward(model, x))
    fresh = [copy.deepcopy(model)]
    found["memory"] = peak(lambda: ours(fresh.pop(), x))
    found["memory, proved"] = peak(lambda: ours(model, x, "first"))
    return found


def peak(run: Callable[[], Any]) -> int:
    """Bytes that something takes at most, over what there was before it."""
    before = meters._begin()
    run()
    after = meters._peak()
    assert before is not None, "the peak of the resident set can be told on Linux only"
    assert after is not None
    return after - before


def table(rows: Sequence[Row]) -> list[Row]:
    """The page's table: each figure, its goal, and whether it is met."""
    return [
        {
            "model": row["model"],
            "what": row["what"],
            **{key: f"{row[key]:.2f}" for key in ("median", "lowest", "highest")},
            "goal": f"{GOALS[row['what']]:.1f}",
            "met": "yes" if row["median"] <= GOALS[row["what"]] else "no",
        }
        for row in sorted(rows, key=lambda row: list(GOALS).index(row["what"]))
    ]


def main() -> None:
    """Measure the networks that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Torch-Pruning's, of parameters outside of layers
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    known = {row["model"] for row in read(options.out)}
    for name in options.models:
        if name not in known:
            append(list(figures(name, options.repeat)), options.out)
            print(name, flush=True)


if __name__ == "__main__":
    main()
