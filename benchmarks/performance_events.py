"""Twenty further events of an iterative prune of resnet50, each beside a step of Torch-Pruning's iterative pruner.

    python benchmarks/performance_events.py [--model resnet50] [--events 22] [--repeat 3] --out FILE.csv

Random weights, seed 0, a 224x224 image to trace on, one thread, float32. `L1Filter` at ``Budget(0.6)`` prunes in 22
events, from 0.98 to 0.6 of the flops, in a fit under SGD with momentum whose loss is zero and reads no network, so that
all time is the callback's. The first event, which has the proof, is left out of the figures, and so is the last, at
which Torch-Pruning has nothing left to do. Three sides take turns at every event, each on a network of its own:

- ``callback``: the whole event: scores, budget, cut, momentum, views of what is left, row and log.
- ``bare``: `ChannelGraph.after`, `plan` and `cut` without an optimizer, down to the same fraction.
- Torch-Pruning's `BasePruner.step` with ``iterative_steps=22`` and magnitude scores, to 0.78 of the channels (about 0.6
  of the flops). Its graph is made before and does not count; no optimizer follows its cuts: that is left to the user.

Seconds are CPU seconds of the process. A figure is, event by event, ours over Torch-Pruning's at the same event, the
median of the rounds; of the twenty events the table has the median, the least and the greatest, which has to meet the
goal. Garbage is collected before each turn, outside of its time.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_prune as lp
from benchmarks.pages import Row, append, read

KEEP = 0.6
GOAL = 0.2


class Net(pl.LightningModule):
    """A network that is never run: every gradient is zero, and there is momentum for all of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = torch.randn(1, 3, 224, 224)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * torch.stack([p.sum() for p in self.parameters()]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Bare:
    """The same events without a Trainer."""

    def __init__(self, model: nn.Module, x: Tensor, events: int) -> None:
        self.model, self.events, self.done = model, events, 0
        self.graph = lp.trace(model, x)
        self.dense = self.graph.cost().flops
        self.plan = lp.Plan()

    def step(self) -> None:
        """One event, as a loop of one's own has it."""
        self.done += 1
        if self.plan.groups:
            self.graph = self.graph.after(self.plan)
        keep = 1 - (1 - KEEP) * self.done / self.events
        left = lp.Budget(min(1.0, keep * self.dense / self.graph.cost().flops))
        self.plan = lp.plan(self.graph, method="l1_filter", budget=left)
        lp.cut(self.model, self.plan, graph=self.graph, verify="first" if self.done == 1 else "never", absorb=False)


def theirs(model: nn.Module, x: Tensor, events: int) -> Callable[[], None]:
    """Torch-Pruning's step."""
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    pruner = tp.pruner.BasePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.22, iterative_steps=events,
        ignored_layers=last,
    )  # fmt: skip
    return pruner.step


class Turns(pl.Callback):
    """At the end of the fit it knows the seconds of each side at each event."""

    def __init__(self, method: lp.L1Filter, others: dict[str, Callable[[], None]]) -> None:
        self.found: list[dict[str, float]] = []
        self._others, self._event = others, method._run_due
        method._run_due = self.take  # type: ignore[method-assign]

    def take(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """All sides, each time in another order."""
        sides: dict[str, Callable[[], None]] = {"callback": lambda: self._event(trainer, model), **self._others}
        names = list(sides)
        at = len(self.found) % len(names)
        seconds = {}
        for name in names[at:] + names[:at]:
            gc.collect()  # else one side now and then pays for the garbage of all
            start = time.process_time()
            sides[name]()
            seconds[name] = time.process_time() - start
        self.found.append(seconds)


def fit(name: str, events: int) -> list[dict[str, float]]:
    """Seconds of each side at each event of one fit."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None)

    x = torch.randn(1, 3, 224, 224)
    method = lp.L1Filter(KEEP, schedule=lp.Iterative(1, events, every=1, unit="step"))
    turns = Turns(method, {"torch-pruning": theirs(fresh(), x, events), "bare": Bare(fresh(), x, events).step})
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=events + 1, accelerator="cpu", logger=CSVLogger(folder), callbacks=[method],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Net(fresh()), DataLoader(TensorDataset(torch.zeros(events + 1, 1))))
    assert method.events_done == events, f"{method.events_done} events of {events}"
    return [each for each in turns.found if each["callback"] > 1e-4]  # the steps without an event


def figures(name: str, events: int, repeat: int) -> Iterator[Row]:
    """The rows: of each side, each event."""
    found = [fit(name, events) for _ in range(repeat)]
    for event in range(1, events - 1):
        for side in ("callback", "bare"):
            ratios = [each[event][side] / each[event]["torch-pruning"] for each in found]
            seconds = {key: median(each[event][key] for each in found) for key in (side, "torch-pruning")}
            yield {
                "model": name, "side": side, "event": event + 1, "ratio": median(ratios), "lowest": min(ratios),
                "highest": max(ratios), "seconds": seconds[side], "theirs": seconds["torch-pruning"], "rounds": repeat,
            }  # fmt: skip


def table(rows: Sequence[Row]) -> list[Row]:
    """The page's table: of each side the median, the least and the greatest of the events."""
    out = []
    for name, side in dict.fromkeys((row["model"], row["side"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["side"]) == (name, side)]
        ratios = [row["ratio"] for row in mine]
        out.append(
            {
                "model": name,
                "event": side,
                "ms": f"{1000 * median(row['seconds'] for row in mine):.1f}",
                "Torch-Pruning, ms": f"{1000 * median(row['theirs'] for row in mine):.1f}",
                "median": f"{median(ratios):.2f}",
                "lowest": f"{min(ratios):.2f}",
                "highest": f"{max(ratios):.2f}",
                "goal, each event": f"{GOAL:.1f}",
                "met": "yes" if max(ratios) <= GOAL else "no",
            }
        )
    return out


def main() -> None:
    """Measure, unless the file holds the network already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--events", type=int, default=22)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Lightning's, of a loader without workers
    if options.model not in {row["model"] for row in read(options.out)}:
        append(list(figures(options.model, options.events, options.repeat)), options.out)


if __name__ == "__main__":
    main()
