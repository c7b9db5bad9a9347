"""A training step with a callback at work between its events, next to the plain step and to others that mask.

    python benchmarks/performance_steps.py [--models resnet50 transformer digits] [--steps 40] [--out FILE.csv]
    python benchmarks/performance_steps.py --accelerator cuda --precision bf16-mixed --batch 256 [--compile]

Every variant trains the same network in a Lightning Trainer of its own, SGD with momentum and weight decay, on random
data, seed 0. The Trainers take turns step by step: each runs in a thread, which waits at the start of a batch for its
turn, in an order drawn anew for each round. A step is all that happens between two starts of a batch, the loop's own
work included: CPU seconds of that thread, with one thread for operators; on a GPU wall seconds after `synchronize`.
What is compared is a variant's step with the plain step of the same round; printed are the median of these ratios, a
95 % interval of the median (order statistics) and the lowest and highest. The first two steps are left out.

- `callback that does nothing`: what Lightning itself takes for one more callback;
- `masks`: `Magnitude`, a tenth of the weights kept from step 0 on;
- `torch.nn.utils.prune`: `l1_unstructured`, the same density; `ModelPruning`: Lightning's callback, global, the same;
- `TaylorWeight`, `TaylorActivation`: gather gradients for an event that is still to come;
- `RigL`: steps between updates, and `RigL update`, every fifth step here; `RigL, amortised` is computed from the two
  at the default interval.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import random
import sys
import threading
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
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pages import append, read
from lightning_prune import Budget, Magnitude, OneShot, RigL, TaylorActivation, TaylorWeight
from lightning_prune.commands.digits import DigitsNet
from lightning_prune.schedule import Updates

KEEP = 0.1
UPDATE = 5  # steps between two updates of RigL here
INTERVAL = 100  # and by default
GOALS = {
    "masks": 1.02,
    "TaylorWeight": 1.02,
    "TaylorActivation": 1.10,
    "RigL update": 1.5,
    "RigL, amortised": 1.01,
}
WARM_UP = 2
PEERS = ("torch.nn.utils.prune", "ModelPruning")
OURS = ("masks", "TaylorWeight", "TaylorActivation", "RigL")


class Block(nn.Module):
    """An encoder layer of linear layers alone, all of which anybody can mask."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """Two encoder layers of width 256 over 64 tokens, and a classifier on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(32, 256), nn.Linear(256, 10)
        self.layers = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, 32) -> (N, 10)."""
        out: Tensor = self.head(self.layers(self.embed(x)).mean(dim=1))
        return out


NETS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), (3, 224, 224), 8),
    "transformer": (Transformer, (64, 32), 32),
    "digits": (DigitsNet, (1, 8, 8), 64),
}


class Net(pl.LightningModule):
    """A network with a loss and an optimizer."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = example

    @override
    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)


class OneBatch(Dataset[tuple[Tensor, Tensor]]):
    """The same batch again and again."""

    def __init__(self, x: Tensor, y: Tensor, times: int) -> None:
        self.batch, self.times = (x, y), times

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batch

    def __len__(self) -> int:
        return self.times


class Turns(Callback):
    """Holds a Trainer at the start of each batch until it is its turn; what it took since is the step before."""

    def __init__(self, cuda: bool) -> None:
        self.seconds: list[float] = []
        self.cuda = cuda
        self.mine, self.done = threading.Event(), threading.Event()
        self.ended = False

    def now(self) -> float:
        if not self.cuda:
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.hand_over()

    def hand_over(self) -> None:
        if hasattr(self, "begun"):
            self.seconds.append(self.now() - self.begun)
        self.done.set()
        self.mine.wait()
        self.mine.clear()
        self.begun = self.now()

    def step(self) -> None:
        """Let it run until the start of its next batch; from another thread."""
        self.done.clear()
        self.mine.set()
        self.done.wait()


class Apply(Callback):
    """Lightning's ModelPruning prunes at the ends of epochs; here at the start already."""

    def __init__(self, pruning: ModelPruning) -> None:
        self.pruning = pruning

    @override
    def on_train_start(self, *_: Any) -> None:
        self.pruning.apply_pruning(1 - KEEP)


def layers(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """What others mask, and we: the weights of convolutions and of linear layers."""
    return [(module, "weight") for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def callbacks(variant: str, net: nn.Module, steps: int) -> list[Callback]:
    """What the Trainer of a variant is given, for so many steps."""
    never = OneShot(steps - 1, unit="step")  # none of the steps that are looked at
    match variant:
        case "plain":
            return []
        case "callback that does nothing":
            return [Callback()]
        case "masks":
            return [Magnitude(Budget(KEEP), schedule=OneShot(0.0))]
        case "TaylorWeight":
            return [TaylorWeight(0.5, schedule=never)]
        case "TaylorActivation":
            return [TaylorActivation(0.5, schedule=never)]
        case "RigL":
            return [RigL(Budget(KEEP), schedule=Updates(every=UPDATE, end=1.0, least=1))]
        case "torch.nn.utils.prune":
            for module, name in layers(net):
                prune.l1_unstructured(module, name, amount=1 - KEEP)
            return []
        case "ModelPruning":
            pruning = ModelPruning("l1_unstructured", layers(net), amount=1 - KEEP, make_pruning_permanent=False)
            return [pruning, Apply(pruning)]
    raise ValueError(variant)


VARIANTS = (
    "plain", "callback that does nothing", "masks", "torch.nn.utils.prune", "ModelPruning", "TaylorWeight",
    "TaylorActivation", "RigL",
)  # fmt: skip


def prepared(
    variant: str, model: str, steps: int, options: argparse.Namespace, first: Sequence[Callback] = (), **settings: Any
) -> tuple[pl.Trainer, Net, DataLoader[Any]]:
    """What a variant trains with, for so many steps; ``first`` are callbacks in front of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, shape, batch = NETS[model]
    count = options.batch or batch
    net, x = make(), torch.randn(count, *shape)
    chosen = callbacks(variant, net, steps)
    module = Net(net, x[:1])
    if options.compile:
        net.compile()
    data = DataLoader(OneBatch(x, torch.arange(count) % 10, steps), batch_size=None)
    trainer = pl.Trainer(
        max_epochs=1, accelerator=options.accelerator, devices=1, precision=options.precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*first, *chosen], **settings,
    )  # fmt: skip
    return trainer, module, data


def fit(variant: str, turns: Turns, model: str, options: argparse.Namespace, failed: list[BaseException]) -> None:
    """Train, a step each turn."""
    try:
        trainer, module, data = prepared(variant, model, options.steps + WARM_UP + 3, options, [turns])
        trainer.fit(module, data)
    except BaseException as error:
        failed.append(error)
    finally:
        turns.ended = True
        turns.done.set()


def measured(model: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Variant -> seconds of its steps, the n-th ones taken next to each other."""
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: memory that one thread freed serves the next one
    turns = {variant: Turns(options.accelerator == "cuda") for variant in options.variants}
    failed: list[BaseException] = []
    order, draw = list(turns), random.Random(0)
    for variant, each in turns.items():  # one after the other up to the first batch
        threading.Thread(target=fit, args=(variant, each, model, options, failed), daemon=True).start()
        each.done.wait()
    for _ in range(options.steps + WARM_UP):
        draw.shuffle(order)
        for variant in order:
            if failed:
                raise failed[0]
            turns[variant].step()
    return {variant: each.seconds[WARM_UP:] for variant, each in turns.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, by the normal approximation of the binomial ranks; all of few values."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(values) / 2 - half), int(len(values) / 2 + half) + 1
    return ordered[max(0, low)], ordered[min(len(values) - 1, high)]


def share(variant: str, model: str, options: argparse.Namespace) -> float:
    """Which part of a step Lightning's profiler finds in the hooks of a variant's callbacks, in a run of its own.

    Hooks on modules and tensors are in the passes, not in it.
    """
    profiler, steps = SimpleProfiler(), 6 if model == "resnet50" else 60
    trainer, module, data = prepared(variant, model, steps, options, profiler=profiler)
    trainer.fit(module, data)
    spent = {what: times for what, times in profiler.recorded_durations.items() if len(times) >= steps - 1}
    hooks = {what: median(times) for what, times in spent.items() if what.startswith("[Callback]")}
    ends = sum(seconds for what, seconds in hooks.items() if what.endswith(("batch_start", "batch_end")))
    return sum(hooks.values()) / (median(spent["run_training_batch"]) + ends)


def rows(model: str, seconds: Mapping[str, list[float]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each variant; RigL's has one for its updates, too."""
    plain = seconds["plain"]
    every = {variant: [a / b for a, b in zip(times, plain, strict=True)] for variant, times in seconds.items()}
    if "RigL" in every:  # step n is the n-th since the start: an update ends each UPDATE-th
        at = [(i + 1 + WARM_UP) % UPDATE == 0 for i in range(len(plain))]
        every["RigL update"] = [ratio for ratio, update in zip(every["RigL"], at, strict=True) if update]
        every["RigL"] = [ratio for ratio, update in zip(every["RigL"], at, strict=True) if not update]
        quiet, update = median(every["RigL"]), median(every["RigL update"])
        every["RigL, amortised"] = [quiet + (update - quiet) / INTERVAL]
    for variant, ratios in every.items():
        in_hooks = share(variant, model, options) if variant in OURS else ""
        low, high = interval(ratios)
        yield {
            "model": model, "batch": options.batch or NETS[model][2], "on": options.accelerator,
            "precision": options.precision, "compiled": options.compile, "variant": variant,
            "ms of a plain step": round(1000 * median(plain), 3), "over plain": round(median(ratios), 4),
            "from": round(low, 4), "to": round(high, 4), "lowest": round(min(ratios), 4),
            "highest": round(max(ratios), 4), "steps": len(ratios),
            "share": in_hooks and round(in_hooks, 5), "torch": torch.__version__,
        }  # fmt: skip


def table(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the page shows: the goals, and whether they are met."""
    shown = []
    for row in found:
        peers = [r for r in found if r["model"] == row["model"] and r["variant"] in PEERS]
        goal = GOALS.get(row["variant"])
        met = "" if goal is None else "yes" if row["over plain"] <= goal else "no"
        if row["variant"] == "masks" and peers:
            fastest = min(peers, key=lambda peer: peer["over plain"])
            slower = "slower than" if row["from"] > fastest["to"] else "not to be told from"
            met = met if row["over plain"] < fastest["over plain"] else f"no: {slower} {fastest['variant']}"
        shown.append(
            {
                "network": f"{row['model']}, batch {row['batch']}",
                "step": row["variant"],
                "over plain": f"{row['over plain']:.3f}",
                "95 %": f"{row['from']:.3f} to {row['to']:.3f}" if row["steps"] > 1 else "",
                "lowest, highest": f"{row['lowest']:.2f}, {row['highest']:.2f}" if row["steps"] > 1 else "",
                "in our hooks": f"{row['share']:.2%}" if row["share"] != "" else "",
                "goal": "" if goal is None else f"{goal:.2f}",
                "met": met,
            }
        )
    return shown


def main() -> None:
    """Take turns, append ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, help="default: 8, 32 and 64")
    parser.add_argument("--steps", type=int, help="default: 30, 120 and 400")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "performance_steps.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    asked = options.steps
    for model in options.models:
        options.steps = asked or {"resnet50": 30, "transformer": 120, "digits": 400}[model]
        same = (model, options.batch or NETS[model][2], options.accelerator, options.precision, options.compile)
        keys = ("model", "batch", "on", "precision", "compiled")
        if any(tuple(row[key] for key in keys) == same for row in read(options.out)):
            continue
        for row in rows(model, measured(model, options), options):
            print(row, flush=True)
            append([row], options.out)


if __name__ == "__main__":
    main()
