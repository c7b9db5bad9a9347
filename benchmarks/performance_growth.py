"""How the cost of pruning grows with the size of a network: seconds and memory of each operation, and their exponents.

    python benchmarks/performance_growth.py [--families resnet ...] [--repeat 5] --out FILE.csv [--picture FILE.png]

One thread, seed 0, weights drawn uniformly, CPU seconds. In each family all networks take turns in one process, in an
order that rotates; every round gives one exponent e, the slope of the least-squares line through log seconds over log
parameters, ``seconds ~ parameters ** e``. The table has the median exponent over rounds with the lowest and highest;
1 is linear. ``of layers`` is the same against the number of layers, which is what work in Python goes by.

Operations are `trace`, `plan` (scores included) at ``Budget(0.5)`` with `L1Filter`, on the meta device with
`RandomChannels`, `cut` with ``verify="never"`` and without absorbing constants, and ``mask``: `rank_weights` of all
magnitudes to a tenth, `Masks` and its zeros.

Families: torchvision's residual networks (18 to 152 layers) and densenets (121 to 201) at 64x64 pixels, vision
transformers b_16, l_16 and h_14 in bfloat16 at 2x2 patches, and encoders of 2 to 20 layers of 2048 features over
four positions, in bfloat16 and on the meta device, where there is no memory for weights; the largest has 1.007e9
parameters. Masks are made of networks below 3.1e8 parameters.

``memory`` is of a process for each network: the resident set's high-water mark over what there was before the operation
began. ``held`` is over what there was before the network was made: all of `trace`, `plan` and `cut`, and the network;
it is told of encoders, and by performance_oneshot.py of networks whose forward takes more than their weights. A small
network was pruned before, so that imports do not count.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_prune as lp
from benchmarks.pages import ROOT, Row, append, read
from lightning_prune.comparison import meters
from lightning_prune.figures import BLUE, GREEN, INK, ORANGE
from lightning_prune.masks import Masks
from lightning_prune.ranking import rank_weights

WIDTH = 2048
OPERATIONS = ("trace", "plan", "cut", "mask")
MOST_MASKED = 3.1e8  # parameters
LOOKS = {
    "resnet": (BLUE, "o"),
    "densenet": (ORANGE, "s"),
    "vit": (GREEN, "^"),
    "encoder": ("#CC79A7", "D"),
    "encoder on meta": ("#56B4E9", "v"),
}
Made = tuple[nn.Module, Tensor]


def encoder(depth: int) -> nn.Module:
    """A transformer of so many layers of equal width."""
    layer = nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(WIDTH, 10))


def _image_network(name: str) -> Callable[[], Made]:
    return lambda: (torchvision.models.get_model(name, weights=None), torch.zeros(1, 3, 64, 64))


def _vit(name: str) -> Callable[[], Made]:
    size = 2 * int(name.rpartition("_")[2])
    return lambda: (torchvision.models.get_model(name, weights=None, image_size=size), torch.zeros(1, 3, size, size))


def _encoder(depth: int) -> Callable[[], Made]:
    return lambda: (encoder(depth), torch.zeros(1, 4, WIDTH))


DEPTHS = (2, 5, 10, 20)
FAMILIES: dict[str, dict[str, Callable[[], Made]]] = {
    "resnet": {f"resnet{n}": _image_network(f"resnet{n}") for n in (18, 34, 50, 101, 152)},
    "densenet": {f"densenet{n}": _image_network(f"densenet{n}") for n in (121, 169, 201)},
    "vit": {name: _vit(name) for name in ("vit_b_16", "vit_l_16", "vit_h_14")},
    "encoder": {f"{n} layers": _encoder(n) for n in DEPTHS},
    "encoder on meta": {f"{n} layers": _encoder(n) for n in DEPTHS},
}


def made(family: str, name: str) -> Made:
    """A network and its input; values are drawn once, as a constructor would do it several times over."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model, x = FAMILIES[family][name]()
    model.eval()
    if family == "encoder on meta":
        return model, x
    dtype = torch.float32 if family in ("resnet", "densenet") else torch.bfloat16
    model, x = model.to(dtype).to_empty(device="cpu"), torch.randn(x.shape, dtype=dtype)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.05, 0.05)
    for key, buffer in model.named_buffers():
        buffer.fill_(1 if key.endswith("running_var") else 0)
    return model, x


def masked(model: nn.Module) -> None:
    """Hold nine of ten weights at zero."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    total = sum(p.numel() for p in weights.values())
    masks = rank_weights({name: p.detach().abs() for name, p in weights.items()}, total // 10)
    Masks(weights, masks).zero()


def operations(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is done to a network, one after the other."""
    found: dict[str, Any] = {}
    on_meta = x.is_meta
    method = "random_channels" if on_meta else "l1_filter"
    if not on_meta and sum(p.numel() for p in model.parameters()) < MOST_MASKED:
        yield "mask", lambda: masked(model)
    yield "trace", lambda: found.update(graph=lp.trace(model, x))
    yield "plan", lambda: found.update(plan=lp.plan(found["graph"], method=method, budget=lp.Budget(0.5)))
    yield "cut", lambda: lp.cut(model, found["plan"], graph=found["graph"], verify="never", absorb=False)


def seconds(family: str, repeat: int) -> Iterator[Row]:
    """CPU seconds of each operation on each network of a family, in turns."""
    names = list(FAMILIES[family])
    for turn in range(repeat):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            model, x = made(family, name)
            size = {"params": sum(p.numel() for p in model.parameters()), "layers": _layers(model)}
            for operation, run in operations(model, x):
                gc.collect()
                start = time.process_time()
                run()
                taken = time.process_time() - start
                yield _row(family, name, size, operation, "seconds", turn, f"{taken:.5f}")


def memory(family: str, name: str) -> Iterator[Row]:
    """The most bytes that each operation took, and those of all with the network; in a process of its own."""
    base = meters._begin()
    model, x = made(family, name)
    size = {"params": sum(p.numel() for p in model.parameters()), "layers": _layers(model)}
    held = 0
    for operation, run in operations(model, x):
        before = meters._begin()
        run()
        peak = meters._peak()
        if base is None or before is None or peak is None:
            raise RuntimeError("memory is measured on Linux alone")
        held = max(held, peak - base) if operation != "mask" else held
        yield _row(family, name, size, operation, "memory", 0, str(peak - before))
    yield _row(family, name, size, "held", "memory", 0, str(held))


def _warm_up() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    for _, run in operations(model, torch.zeros(1, 8)):
        run()


def _layers(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Linear | nn.Conv2d | nn.MultiheadAttention) for m in model.modules())


def _row(family: str, name: str, size: Mapping[str, int], operation: str, of: str, turn: int, value: str) -> Row:
    return {"family": family, "network": name, **size, "operation": operation, "of": of, "round": turn, "value": value}


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    xs, ys = ([math.log(max(value, 1e-9)) for value in values] for values in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def _series(
    rows: Sequence[Row], family: str, operation: str, of: str, against: str = "params"
) -> dict[int, list[tuple[float, float]]]:
    """Round -> (parameters or layers, value) of each network."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if (row["family"], row["operation"], row["of"]) == (family, operation, of):
            found.setdefault(row["round"], []).append((row[against], row["value"]))
    return {turn: sorted(points) for turn, points in found.items() if len(points) > 1}


def table(rows: Sequence[Row]) -> list[Row]:
    """An exponent each family and operation, and what the largest network takes."""
    lines = []
    for family in FAMILIES:
        for operation in (*OPERATIONS, *(["held"] if family == "encoder" else [])):
            for of in ("seconds", "memory"):
                turns = _series(rows, family, operation, of)
                if turns:
                    layers = _series(rows, family, operation, of, "layers")
                    by_layers = median(exponent(points) for points in layers.values())
                    lines.append(_line(family, operation, of, turns, by_layers))
    return lines


def _line(
    family: str, operation: str, of: str, turns: Mapping[int, list[tuple[float, float]]], by_layers: float
) -> Row:
    slopes = sorted(exponent(points) for points in turns.values())
    smallest, largest = (next(iter(turns.values()))[end][0] for end in (0, -1))
    most = median(points[-1][1] for points in turns.values())
    size = 4 if family in ("resnet", "densenet") else 2
    shown = f"{most:.3f} s" if of == "seconds" else f"{most / 1e6:.0f} MB"
    over = "" if of == "seconds" or family == "encoder on meta" else f"{most / (size * largest):.2f}"
    goal, is_met = "exponent at most 1, of either", round(min(median(slopes), by_layers), 2) <= 1
    if operation == "held":
        goal, is_met = "twice the parameters at 1e9", float(over or 0) <= 2
    return {
        "family": family,
        "operation": operation,
        "of": of,
        "parameters": f"{smallest / 1e6:.0f}M to {largest / 1e6:.0f}M",
        "exponent": f"{median(slopes):.2f}",
        "lowest": f"{slopes[0]:.2f}",
        "highest": f"{slopes[-1]:.2f}",
        "of layers": f"{by_layers:.2f}",
        "the largest": shown,
        "in parameters": over,
        "goal": goal,
        "met": "yes" if is_met else "no",
    }


def picture(rows: Sequence[Row]) -> Figure:
    """Seconds above, memory below, an operation a column; a grey line is linear."""
    figure = Figure(figsize=(13, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(OPERATIONS), sharex=True, sharey="row")
    for line, (of, unit, scale) in zip(grid, (("seconds", "CPU seconds", 1), ("memory", "MB", 1e6)), strict=True):
        for axes, operation in zip(line, OPERATIONS, strict=True):
            _panel(axes, rows, operation, of, scale)
            axes.set_title(operation if of == "seconds" else "")
            axes.set_xlabel("parameters" if of == "memory" else "")
        line[0].set_ylabel(unit)
    handles = {str(h.get_label()): h for axes in grid.flat for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], operation: str, of: str, scale: float) -> None:
    first: tuple[float, float] | None = None
    for family, (colour, marker) in LOOKS.items():
        turns = _series(rows, family, operation, of)
        if not turns:
            continue
        sizes = [params for params, _ in next(iter(turns.values()))]
        values = [median(points[i][1] for points in turns.values()) / scale for i in range(len(sizes))]
        axes.plot(sizes, values, marker=marker, color=colour, linewidth=1.5, markersize=5, label=family)
        first = first or (sizes[0], values[0])
    if first is not None:
        x, y = first
        axes.plot([x, 1e9], [y, y * 1e9 / x], color="#9AA5AE", linewidth=1, linestyle=":", label="linear")
    axes.set(xscale="log", yscale="log")
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _apart(measure: Callable[..., Iterator[Row]], *arguments: Any) -> list[Row]:
    """Rows that a process of its own measures; it is forked, so that nothing is imported again."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(_all, measure, *arguments).result()


def _all(measure: Callable[..., Iterator[Row]], *arguments: Any) -> list[Row]:
    return list(measure(*arguments))


def main() -> None:
    """Make what is missing, then the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "growth.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _warm_up()
    have = {(row["family"], row["network"], row["of"]) for row in read(options.out)}
    for family in options.families:
        for name in FAMILIES[family]:
            if (family, name, "memory") not in have:
                append(_apart(memory, family, name), options.out)
        if (family, next(iter(FAMILIES[family])), "seconds") not in have:
            append(_apart(seconds, family, options.repeat), options.out)
    rows = read(options.out)
    for line in table(rows):
        print(line)
    picture(rows).savefig(options.picture)


if __name__ == "__main__":
    main()
