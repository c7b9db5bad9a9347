"""How long checkpoints of a cut network take, over those of a dense network of the same size, in turns.

    python benchmarks/performance_files.py [--models resnet50 small] [--repeat 15] [--out FILE.csv]

Each network is trained for a step, on two images, with SGD and momentum: once with `L1Filter`, which cuts all layers
but those of the residual streams to half of their channels before the step, and once as torchvision builds it with so
many channels, without a callback of ours. Both then have tensors of the same shapes. Random weights, seed 0, one
thread, float32; files are on the machine's disk, and were written just before they are read. CPU seconds of the
process:

- ``save``: `Trainer.save_checkpoint`, with optimizer states, to a file that is there already;
- ``load``: `load_pruned` over ``load_from_checkpoint`` of the plain module: both read the file, make the module with
  the hyper-parameters in it, ours with all its channels, and give it its weights;
- ``load into``: the same into a module that is made already, ours dense, the plain one of the file's shapes.

``bytes`` is the size of the file over that of the plain one.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_prune as lp
from benchmarks.pages import RESULTS, append, read
from lightning_prune.checkpoint import load_into, read_checkpoint

GOAL = 1.1
WIDTHS = {"resnet50": 64, "small": 32}
RESIDUAL = {"resnet50": ["net.conv1", "*.conv3", "*.downsample.0"], "small": []}


def small(width: int) -> nn.Module:
    """Three convolutions with norms and a linear layer."""
    layers: list[nn.Module] = []
    for read_, made in ((3, width), (width, width), (width, width)):
        layers += [nn.Conv2d(read_, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Net(pl.LightningModule):
    """A network of so many channels a layer, or in the first bottlenecks."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = small(width) if name == "small" else torchvision.models.resnet50(width_per_group=width)
        self.example_input_array = torch.zeros(1, 3, 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)


def fitted(module: Net, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A trainer that did a step."""
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    data = TensorDataset(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))
    trainer.fit(module, DataLoader(data, batch_size=2))
    return trainer


def seconds_of(run: Callable[[], Any]) -> float:
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def plainly(module: Net, path: Path) -> None:
    """What Lightning does once a module is made."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def rows(name: str, repeat: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each of the three."""
    torch.manual_seed(0)
    width = WIDTHS[name]
    half = lp.Budget(0.5, of="units")
    method = lp.L1Filter(half, scope="uniform", ignore=RESIDUAL[name], schedule=lp.OneShot(0.0))
    ours = fitted(Net(name, width), [method])
    plain = fitted(Net(name, width // 2), [])
    shapes = [{n: t.shape for n, t in t.lightning_module.state_dict().items()} for t in (ours, plain)]
    assert shapes[0] == shapes[1], "the networks differ"
    files = {key: folder / f"{name}-{key}.ckpt" for key in ("ours", "plain")}
    dense, same = Net(name, width), Net(name, width // 2)
    for trainer, path in ((ours, files["ours"]), (plain, files["plain"])):
        trainer.save_checkpoint(path)
    runs: dict[str, Sequence[Callable[[], Any]]] = {
        "save": (
            lambda: ours.save_checkpoint(files["ours"]),
            lambda: plain.save_checkpoint(files["plain"]),
        ),
        "load": (
            lambda: lp.load_pruned(Net, files["ours"]),
            lambda: Net.load_from_checkpoint(files["plain"], weights_only=True),
        ),
    }
    for what, pair in runs.items():
        yield row(name, what, [seconds_in_turn([*pair], turn) for turn in range(-1, repeat)], files)
    into = []
    for turn in range(-1, repeat):
        module, other = copy.deepcopy(dense), copy.deepcopy(same)
        pair = [
            lambda m=module: load_into(m, read_checkpoint(files["ours"])),
            lambda m=other: plainly(m, files["plain"]),
        ]
        into.append(seconds_in_turn(pair, turn))
    yield row(name, "load into", into, files)


def seconds_in_turn(pair: Sequence[Callable[[], Any]], turn: int) -> tuple[float, float]:
    """Seconds of both, in an order that changes from turn to turn."""
    found = {i: seconds_of(pair[i]) for i in ((0, 1) if turn % 2 else (1, 0))}
    return found[0], found[1]


def row(name: str, what: str, times: Sequence[tuple[float, float]], files: Mapping[str, Path]) -> dict[str, Any]:
    """Medians of all turns but the first, which warms."""
    mine, others = zip(*times[1:], strict=True)
    ratios = [a / b for a, b in times[1:]]
    return {
        "model": name,
        "what": what,
        "seconds": f"{median(mine):.4f}",
        "plain": f"{median(others):.4f}",
        "ratio": f"{median(ratios):.3f}",
        "lowest": f"{min(ratios):.3f}",
        "highest": f"{max(ratios):.3f}",
        "bytes": f"{files['ours'].stat().st_size / files['plain'].stat().st_size:.4f}",
        "turns": len(ratios),
        "torch": torch.__version__,
    }


def table(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The page's, with the goal."""
    return [
        {
            "network": row["model"],
            "what": row["what"],
            "ms": f"{1000 * row['seconds']:.1f}",
            "plain, ms": f"{1000 * row['plain']:.1f}",
            **{key: f"{row[key]:.2f}" for key in ("ratio", "lowest", "highest")},
            "bytes": f"{row['bytes']:.3f}",
            "goal": GOAL,
            "met": "yes" if row["ratio"] <= GOAL else "no",
        }
        for row in found
    ]


def main() -> None:
    """Measure what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "performance_files.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of a loader with one process, and of a fit of one step
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    known = {row["model"] for row in read(options.out)}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            if name not in known:
                found = list(rows(name, options.repeat, Path(folder)))
                append(found, options.out)


if __name__ == "__main__":
    main()
