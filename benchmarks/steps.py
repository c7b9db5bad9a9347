"""A training step with active weight masks next to the plain step, and next to others that do the same.

    python benchmarks/steps.py [--model resnet50] [--batch 8] [--size 224] [--rounds 5] [--steps 3] [--out FILE.csv]

Every variant trains the same torchvision network (digits: the demo's) in a Lightning Trainer, SGD with momentum, on one
batch of random images, with a tenth of its weights kept. The variants take turns, a few steps each; a step is timed
from the start of its batch to its end, in CPU seconds of this process, and the first of each turn is left out. Printed
is the median of each variant over that of the plain step, with the lowest and highest round.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, Magnitude, OneShot
from lightning_prune.commands.digits import DigitsNet
from lightning_prune.report import markdown_table

KEEP = 0.1


class Net(pl.LightningModule):
    """A network with a loss and an optimizer."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = example

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)


class Clock(Callback):
    """One half at the start of the list of callbacks, the other at its end."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = time.process_time()


class Stop(Callback):
    """Takes the time when all other callbacks are done."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.seconds.append(time.process_time() - self.clock.begun)


def masked_layers(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """Layers whose weights are masked."""
    return [(module, "weight") for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def turn(variant: str, make: Any, batch: tuple[Tensor, Tensor], steps: int) -> list[float]:
    """CPU seconds of a few training steps of a variant."""
    torch.manual_seed(0)
    net = make()
    callbacks: list[Callback] = []
    if variant == "lightning_prune":
        callbacks = [Magnitude(Budget(KEEP), schedule=OneShot(0.0))]
    elif variant == "torch.nn.utils.prune":
        for module, name in masked_layers(net):
            prune.l1_unstructured(module, name, amount=1 - KEEP)
    clock = Clock([])
    data = DataLoader(TensorDataset(*(x.repeat((steps + 1, *[1] * (x.ndim - 1))) for x in batch)), len(batch[0]))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[clock, *callbacks, Stop(clock)],
    )  # fmt: skip
    trainer.fit(Net(net, batch[0][:1]), data)
    return clock.seconds[1:]


def main() -> None:
    """Take turns, print ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if options.model == "digits":
        images, make = torch.randn(options.batch, 1, 8, 8), DigitsNet
    else:
        images = torch.randn(options.batch, 3, options.size, options.size)
        make = getattr(torchvision.models, options.model)
    batch = images, torch.arange(options.batch) % 10
    variants = ["plain", "lightning_prune", "torch.nn.utils.prune"]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(options.rounds):
        for variant in variants[number % 3 :] + variants[: number % 3]:
            seconds[variant].append(median(turn(variant, make, batch, options.steps)))
    plain = seconds["plain"]
    rows = []
    for variant, times in seconds.items():
        ratios = [a / b for a, b in zip(times, plain, strict=True)]
        rows.append(
            {
                "model": options.model,
                "batch": options.batch,
                "variant": variant,
                "seconds": round(median(times), 4),
                "over plain": round(median(times) / median(plain), 4),
                "lowest": round(min(ratios), 4),
                "highest": round(max(ratios), 4),
                "rounds": options.rounds,
            }
        )
    print(markdown_table(rows))
    if options.out is not None:
        new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
