"""How long each method takes to score a network, over one forward and backward pass on the same images, in turns.

    python benchmarks/performance_scoring.py [--model resnet50] [--images 256] [--size 64] [--repeat 3]
        [--methods CHIP ...] [--out FILE.csv]

Random weights and images, seed 0, batches of 32, one thread, float32; CPU seconds of the process, as the machine may be
shared. A method's seconds are those of `scores_for` on a traced model, forward passes included; methods that look at
data see all images. Those of `SNIP` and `IterativeImportance`, which mask weights, are of `scores` alike. What they are
divided by is the forward passes in train mode, and the backward passes to all parameters, over the same images: the
nearest of those that are run in front of every third method. Each round has all methods in another order; the table
has medians over rounds, and the range. ``peak`` is the most memory that a process held in addition to what it held
before (``VmHWM`` of Linux, reset for each run), over the same of the forward and backward passes.

What needs a backward pass a channel or an output is measured on a small network with ten outputs instead, and 32 images
of 32 x 32, over the passes on that network: `SOSP` with ``variant="I"`` and `TaylorWeight` with ``order=2``.

Direct ways of computing the same, ``--direct`` alone, are measured on a part and extrapolated, the column
``direct on`` says of what; these rows go to another file:

- `CHIP`: a singular value decomposition per image and channel, with that channel's row at zero;
- `ThiNet`: the search alone, where each step adds up the squares over all rows anew for every candidate, beside the
  search on the Gram matrix, X^T X included;
- `Hierarchical`, `TaylorActivation`: the gradients of each image's loss by gates alone, where each image has a forward
  and a backward pass of its own, beside `SampleGradients` with one of each a batch.

Rows are appended to the file; what it already holds is not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_prune as lp
from benchmarks.pages import RESULTS, append, read
from lightning_prune.batches import evaluating
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.flow import Tap
from lightning_prune.methods import discover
from lightning_prune.methods.chip import channel_independence
from lightning_prune.methods.thinet import backward_score
from lightning_prune.taps import SampleGradients, Seen, gated, looks_at, tensor_of, watching

Batches = list[tuple[Tensor, Tensor]]
GOALS = {
    "SOSP": 4.0,
    "SOSP(variant='I')": 1.3,
    "NISP": 1.3,
    "TaylorWeight": 1.3,
    "TaylorWeight(order=2)": 1.3,
    "TaylorActivation": 1.3,
    "CHIP": 3.0,
    "ThiNet": 3.0,
}
SMALL = {"SOSP(variant='I')": {"variant": "I"}, "TaylorWeight(order=2)": {"order": 2}}
WEIGHTS = ("SNIP", "IterativeImportance")


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def scoring(graph: lp.ChannelGraph, name: str, batches: Batches) -> Callable[[], Any]:
    """What scores once: a method by its class's name, with settings for those in SMALL, on all images."""
    settings: dict[str, Any] = {"calibration": batches, "loss_fn": loss, **SMALL.get(name, {})}
    cls = discover()[name.partition("(")[0]]
    if hasattr(cls(lp.Budget(0.99)), "samples"):
        settings["samples"] = sum(len(x) for x, _ in batches)
    pruner = cls(lp.Budget(0.99), **settings)
    if isinstance(pruner, ChannelPruner):
        return lambda: pruner.scores_for(graph)
    pruner._graph, pruner._dense_cost = graph, graph.cost()
    with pruner._event(None, graph.model):
        pruner._prepare(graph.model)

    def run() -> None:
        with torch.no_grad(), pruner._event(None, graph.model):
            pruner.scores(pruner.weights)

    return run


def held(key: str) -> int:
    """Bytes of this process: VmRSS, what it holds, or VmHWM, the most it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measured(run: Callable[[], Any]) -> tuple[float, int]:
    """CPU seconds of a run, and the most bytes that it held in addition."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = held("VmRSS")
    seconds = seconds_of(run)
    return seconds, held("VmHWM") - before


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


def passes(model: nn.Module, batches: Batches) -> None:
    """One forward and backward pass over all images, as in training."""
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
    model.zero_grad()


def small_net() -> nn.Module:
    """Six convolutions with norms and a linear layer: 32 x 32 images, 10 classes."""
    layers: list[nn.Module] = []
    widths = [3, 32, 32, 64, 64, 128, 128]
    for i, (read_, made) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(read_, made, 3, stride=2 if i in (2, 4) else 1, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(made), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def turns(
    graph: lp.ChannelGraph, batches: Batches, names: Sequence[str], known: set[tuple[str, int]], repeat: int
) -> Iterator[dict[str, Any]]:
    """A row for each method and round that is not known yet."""
    runs = {name: scoring(graph, name, batches) for name in names}
    passes(graph.model, batches[:1])  # warm
    for turn in range(repeat):
        shift = turn * max(1, len(names) // repeat)
        wanted = [name for name in [*names[shift:], *names[:shift]] if (name, turn) not in known]
        base = (0.0, 0)
        for number, name in enumerate(wanted):
            if number % 3 == 0:
                base = measured(lambda: passes(graph.model, batches))
            seconds, peak = measured(runs[name])
            yield {
                "method": name,
                "turn": turn,
                "seconds": f"{seconds:.4f}",
                "passes": f"{base[0]:.4f}",
                "peak_mb": f"{peak / 2**20:.0f}",
                "passes_peak_mb": f"{base[1] / 2**20:.0f}",
            }


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The page's: medians over turns, with the goals."""
    out = []
    for name in sorted({row["method"] for row in rows}, key=lambda n: (n in SMALL, n)):
        of = [row for row in rows if row["method"] == name]
        ratios = [row["seconds"] / row["passes"] for row in of]
        peaks = [row["peak_mb"] / max(1, row["passes_peak_mb"]) for row in of]
        goal = GOALS.get(name)
        out.append(
            {
                "method": f"`{name}`",
                "network": of[0]["model"],
                "seconds": f"{median(row['seconds'] for row in of):.2f}",
                "forward and backward": f"{median(row['passes'] for row in of):.2f}",
                "ratio": f"{median(ratios):.2f}",
                "lowest": f"{min(ratios):.2f}",
                "highest": f"{max(ratios):.2f}",
                "goal": "" if goal is None else f"{goal:g}",
                "met": "" if goal is None else "yes" if median(ratios) <= goal else "no",
                "peak": f"{median(peaks):.2f}",
            }
        )
    return out


def direct_rows(graph: lp.ChannelGraph, batches: Batches, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The direct ways beside ours."""
    images = sum(len(x) for x, _ in batches)

    def row(method: str, seconds: float, direct: float, on: str) -> dict[str, Any]:
        times = f"{direct / seconds:.1f}"
        return {
            "method": method,
            "seconds": f"{seconds:.3f}",
            "direct seconds": f"{direct:.2f}",
            "times faster": times,
            "direct on": on,
        }

    if "CHIP" in methods:
        direct, on = direct_chip(graph, batches)
        yield row("CHIP", seconds_of(scoring(graph, "CHIP", batches)), direct, on)
    for method, where in {"Hierarchical": graph.gates, "TaylorActivation": graph.maps}.items():
        if method in methods:
            taps = {group.name: where(group) for group in graph.groups}
            fast, direct = gradients(graph, taps, batches), direct_gradients(graph, taps, batches)
            yield row(f"{method}, gradients alone", fast, direct, "8 images")
    if "ThiNet" in methods:
        fast, direct, on = searches(graph, images)
        yield row("ThiNet, search alone", fast, direct, on)
    if "CHIP" in methods:
        maps = torch.randn(images, 64, 1024, generator=torch.Generator().manual_seed(0)).relu()
        direct = images * sum(decompositions(one, channels=64) for one in maps[:2]) / 2
        yield row("CHIP, 64 maps of 32x32 alone", seconds_of(lambda: channel_independence(maps)), direct, "2 images")


def images_of(count: int, size: int, classes: int) -> Batches:
    """Random images in batches of 32."""
    x, y = torch.randn(count, 3, size, size), torch.arange(count) % classes
    return list(zip(x.split(32), y.split(32), strict=True))


def main() -> None:
    """Run the methods in turns, or the direct ways; append rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=[], help="default: all channel methods, and two of weights")
    parser.add_argument("--direct", action="store_true", help="only the direct ways, into another file")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # few images for wide layers, which the methods say
    channels = [n for n, c in discover().items() if issubclass(c, ChannelPruner)]
    names = options.methods or [*channels, *WEIGHTS, *SMALL]
    torch.manual_seed(0)
    big = torchvision.models.get_model(options.model, weights=None)
    batches = images_of(options.images, options.size, 1000)
    same = {"model": options.model, "images": options.images, "size": options.size}
    if options.direct:
        out, found = (
            options.out or RESULTS / "scoring.csv",
            direct_rows(lp.trace(big, batches[0][0][:2]), batches, names),
        )
        append(({**same, **row, "torch": torch.__version__} for row in found), out)
        return
    out = options.out or RESULTS / "performance_scoring.csv"
    small, tiny = small_net(), images_of(32, 32, 10)
    for model, data, what in (
        (small, tiny, {"model": "small", "images": 32, "size": 32}),
        (big, batches, same),
    ):
        mine = [name for name in names if (name in SMALL) == (model is small)]
        known = {(r["method"], r["turn"]) for r in read(out) if {key: r[key] for key in what} == what}
        graph = lp.trace(model, data[0][0][:2])
        if mine:
            append(
                (
                    {**what, **row, "torch": torch.__version__}
                    for row in turns(graph, data, mine, known, options.repeat)
                ),
                out,
            )


if __name__ == "__main__":
    main()
