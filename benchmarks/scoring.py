"""How long each channel method takes to score a network, beside the direct way of computing the same.

    python benchmarks/scoring.py [--model resnet50] [--images 256] [--size 64] [--methods CHIP ...] [--out FILE.csv]

Random weights and images, seed 0, batches of 32, one thread, float32; CPU seconds of the process, as the machine may be
shared. A method's seconds are those of `scores_for` on a traced model, forward passes included; methods that look at
data see all images. Direct ways are measured on a part and extrapolated, the column ``direct on`` says of what:

- `CHIP`: a singular value decomposition per image and channel, with that channel's row at zero;
- `ThiNet`: the search alone, where each step adds up the squares over all rows anew for every candidate, beside the
  search on the Gram matrix, X^T X included;
- `Hierarchical`, `TaylorActivation`: the gradients of each image's loss by gates alone, where each image has a forward
  and a backward pass of its own, beside `SampleGradients` with one of each a batch;
- `SOSP`: no direct way (one backward pass per channel); its seconds are divided by those of one backward pass over all
  images instead.

Rows are appended to the file; what it already holds is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.batches import evaluating
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.flow import Tap
from lightning_prune.methods import discover
from lightning_prune.methods.chip import channel_independence
from lightning_prune.methods.thinet import backward_score
from lightning_prune.taps import SampleGradients, Seen, gated, looks_at, tensor_of, watching

FIELDS = ["model", "images", "size", "method", "seconds", "direct seconds", "times faster", "direct on", "torch"]
Batches = list[tuple[Tensor, Tensor]]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def scored(graph: lp.ChannelGraph, method: type[ChannelPruner], batches: Batches) -> float:
    """Seconds of a method's scores."""
    images = sum(len(x) for x, _ in batches)
    settings: dict[str, Any] = {"calibration": batches, "loss_fn": loss}
    pruner = method(lp.Budget(0.99), **settings)
    if hasattr(pruner, "samples"):
        pruner = method(lp.Budget(0.99), samples=images, **settings)
    return seconds_of(lambda: pruner.scores_for(graph))


def decompositions(maps: Tensor, channels: int = 2) -> float:
    """Seconds that one image's (C, P) maps would take, from so many of its channels."""
    whole = seconds_of(lambda: torch.linalg.svdvals(maps))
    first = min(channels, len(maps))
    without = [maps.index_fill(0, torch.tensor([c]), 0.0) for c in range(first)]
    return whole + len(maps) / first * seconds_of(lambda: [torch.linalg.svdvals(one) for one in without])


def direct_chip(graph: lp.ChannelGraph, batches: Batches) -> tuple[float, str]:
    found: list[float] = []

    def look(name: str, tap: Tap, seen: Seen) -> None:
        found.append(decompositions(tap.maps(tensor_of(tap, seen.out), seen.batch)[0]))

    taps = {group.name: graph.maps(group) for group in graph.groups}
    with evaluating(graph.model), watching(graph.model, looks_at(taps, look)):
        loss(graph.model, (batches[0][0][:1], batches[0][1][:1]))
    return sum(found) * sum(len(x) for x, _ in batches), f"1 image, 2 channels of each of {len(found)} maps"


def recomputed_steps(rows: Tensor, steps: int) -> None:
    """The first steps of ThiNet's search, from the rows."""
    removed = torch.zeros(len(rows), dtype=rows.dtype)
    left = torch.ones(rows.shape[1], dtype=torch.bool)
    for _ in range(steps):
        errors = (removed[:, None] + rows).square().sum(dim=0).masked_fill(~left, torch.inf)
        best = int(errors.argmin())
        removed += rows[:, best]
        left[best] = False


def searches(graph: lp.ChannelGraph, images: int, steps: int = 2) -> tuple[float, float, str]:
    """Seconds of ThiNet's search in all groups, on Gram matrices and on ten rows an image."""
    fast = direct = 0.0
    generator = torch.Generator().manual_seed(0)
    for group in graph.groups:
        rows = torch.randn(10 * images, group.size, generator=generator, dtype=torch.float64)
        fast += seconds_of(lambda rows=rows: backward_score(rows.T @ rows))  # type: ignore[misc]
        some = min(steps, group.size)
        direct += group.size / some * seconds_of(lambda rows=rows, some=some: recomputed_steps(rows, some))  # type: ignore[misc]
    return fast, direct, f"{steps} steps in each of {len(graph.groups)} groups"


def gradients(graph: lp.ChannelGraph, taps: dict[str, list[Tap]], batches: Batches) -> float:
    """Seconds of every image's gradients by gates, a batch at a time."""
    found = SampleGradients(taps)
    first = next(graph.model.parameters())  # down to it, and to no other weight

    def run() -> None:
        with evaluating(graph.model, grad=True), watching(graph.model, found.looks):
            for batch in batches:
                torch.autograd.grad(loss(graph.model, batch), first)
                found.take()

    return seconds_of(run)


def direct_gradients(graph: lp.ChannelGraph, taps: dict[str, list[Tap]], batches: Batches, on: int = 8) -> float:
    """Seconds of the same, one image after the other, from so many images."""
    x, y = batches[0]
    gates = {g.name: torch.ones(g.size, requires_grad=True) for g in graph.groups if taps[g.name]}

    def run() -> None:
        with evaluating(graph.model, grad=True), gated(graph.model, taps, gates):
            for i in range(on):
                error = loss(graph.model, (x[i : i + 1], y[i : i + 1]))
                torch.autograd.grad(error, list(gates.values()), allow_unused=True)

    return seconds_of(run) / on * sum(len(x) for x, _ in batches)


def passes(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Seconds of the forward and of the backward passes over all images."""
    forward = backward = 0.0
    parameters = list(model.parameters())
    with evaluating(model, grad=True):
        for batch in batches:
            start = time.process_time()
            error = loss(model, batch)
            middle = time.process_time()
            torch.autograd.grad(error, parameters)
            forward, backward = forward + middle - start, backward + time.process_time() - middle
    return forward, backward


def rows(model: nn.Module, batches: Batches, wanted: list[str], known: set[str]) -> Iterator[dict[str, Any]]:
    """What is not known yet, a row at a time."""
    graph = lp.trace(model, batches[0][0][:2])
    images = sum(len(x) for x, _ in batches)
    methods = {n: c for n, c in discover().items() if issubclass(c, ChannelPruner) and (not wanted or n in wanted)}
    forward = backward = 0.0
    for name, cls in methods.items():
        if name not in known:
            row: dict[str, Any] = {"method": name, "seconds": scored(graph, cls, batches)}
            if name == "CHIP":
                row["direct seconds"], row["direct on"] = direct_chip(graph, batches)
            elif name == "SOSP":
                forward, backward = passes(model, batches)
                row["direct on"] = f"takes {row['seconds'] / backward:.1f} backward passes"
            yield row
    if backward:
        yield {"method": "one forward pass", "seconds": forward}
        yield {"method": "one backward pass", "seconds": backward}
    for method, where in {"Hierarchical": graph.gates, "TaylorActivation": graph.maps}.items():
        if method in methods and (name := f"{method}, gradients alone") not in known:
            taps = {group.name: where(group) for group in graph.groups}
            fast, direct = gradients(graph, taps, batches), direct_gradients(graph, taps, batches)
            yield {"method": name, "seconds": fast, "direct seconds": direct, "direct on": "8 images"}
    if "ThiNet" in methods and (name := "ThiNet, search alone") not in known:
        fast, direct, on = searches(graph, images)
        yield {"method": name, "seconds": fast, "direct seconds": direct, "direct on": on}
    if "CHIP" in methods and (name := "CHIP, 64 maps of 32x32 alone") not in known:
        maps = torch.randn(images, 64, 1024, generator=torch.Generator().manual_seed(0)).relu()
        direct = images * sum(decompositions(one, channels=64) for one in maps[:2]) / 2
        fast = seconds_of(lambda: channel_independence(maps))
        yield {"method": name, "seconds": fast, "direct seconds": direct, "direct on": "2 images"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--methods", nargs="*", default=[], help="default: all there are")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scoring.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # few images for wide layers, which the methods say
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, weights=None)
    x, y = torch.randn(options.images, 3, options.size, options.size), torch.arange(options.images) % 1000
    batches = list(zip(x.split(32), y.split(32), strict=True))
    same = {"model": options.model, "images": str(options.images), "size": str(options.size)}
    before = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    known = {row["method"] for row in before if all(row[key] == value for key, value in same.items())}
    for row in rows(model, batches, options.methods, known):
        if "direct seconds" in row:
            row["times faster"] = f"{row['direct seconds'] / row['seconds']:.1f}"
            row["direct seconds"] = f"{row['direct seconds']:.2f}"
        row |= {**same, "seconds": f"{row['seconds']:.3f}", "torch": torch.__version__}
        print({key: row[key] for key in FIELDS if key in row}, flush=True)
        is_new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            if is_new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
