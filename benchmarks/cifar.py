"""A trained CIFAR ResNet pruned to half its flops: accuracy before, right after the cut, and after fine-tuning.

    python benchmarks/cifar.py --images cifar10_jpeg.npz --weights resnet20_jpeg.pt [--methods TaylorWeight L1Filter]
        [--depth 20] [--epochs 2] [--keep 0.5] [--plans DIR] --out FILE.csv

The images are CIFAR-10 as JPEG files in one npz (``<split>_jpeg``, ``<split>_offsets``, ``<split>_labels``); the
weights a ``{"state_dict": ...}`` of He et al.'s net. All cut in one event: at the start, but those that learn while
the network trains after ``--gather`` steps, with a learning rate of zero until then, so that the cut alone is seen.
Methods that are none of ours: ``dense``, fine-tuned and not cut; ``Torch-Pruning``, its group-norm pruner at the same
flops, without the training that it may have before; ``Scratch-E:NAME`` and ``Scratch-B:NAME``, what NAME left (its plan
is in ``--plans``), from new weights, for as many epochs as the fine-tuning had or up to twice as many, with a learning
rate of ``--scratch-lr``. Rows are appended; runs already in the file are not repeated. Augmentation: 4-pixel pad and
crop (one offset a batch), flip. SGD, Nesterov 0.9, weight decay 5e-4, the rate falling linearly from 0.01 to zero,
batch 128.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from graph import CifarResNet
from pages import append, read
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_prune as lp
from lightning_prune.methods import discover, find
from lightning_prune.report import markdown_table

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(path: Path, cache: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """split -> (N, 3, 32, 32) uint8 and (N,) labels; decoded once where a cache file is given."""
    if cache is not None and cache.exists():
        stored = torch.load(cache, weights_only=True)
        return {split: (stored[f"{split}_x"], stored[f"{split}_y"]) for split in ("train", "test")}
    data = np.load(path)
    out = {}
    for split in ("train", "test"):
        raw, at = data[f"{split}_jpeg"], data[f"{split}_offsets"]
        pictures = [np.asarray(Image.open(io.BytesIO(raw[a:b].tobytes()))) for a, b in pairwise(at)]
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        out[split] = (x, torch.from_numpy(data[f"{split}_labels"].astype(np.int64)))
    if cache is not None:
        torch.save({f"{s}_{k}": t for s, pair in out.items() for k, t in zip("xy", pair, strict=True)}, cache)
    return out


def normalised(x: Tensor) -> Tensor:
    """uint8 -> float32, as the weights were trained."""
    return (x.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Net(pl.LightningModule):
    """A ResNet with fine-tuning; the rate is zero for the first ``hold`` steps."""

    def __init__(self, state: dict[str, Tensor], steps: int, hold: int, lr: float = 0.01, depth: int = 20) -> None:
        super().__init__()
        self.net = CifarResNet(depth)
        self.net.load_state_dict(state)
        self.example_input_array = torch.zeros(1, 3, 32, 32)
        self.steps, self.hold, self.lr = steps, hold, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x = F.pad(normalised(x), (4, 4, 4, 4))
        i, j = torch.randint(0, 9, (2,)).tolist()
        x = x[:, :, i : i + 32, j : j + 32]
        flip = torch.rand(len(x)) < 0.5
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        left = max(1, self.steps - self.hold)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: 0.0 if s < self.hold else 1 - (s - self.hold) / left
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def accuracy(net: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the test images that are told right."""
    modes = [(m, m.training) for m in net.modules()]
    metric = MulticlassAccuracy(10, average="micro")
    net.eval()
    with torch.no_grad():
        for at in range(0, len(x), 500):
            metric.update(net(normalised(x[at : at + 500])), y[at : at + 500])
    for module, mode in modes:
        module.training = mode
    return float(metric.compute())


class AfterCut(pl.Callback):
    """Tests right after the event."""

    def __init__(self, pruner: lp.Pruner, x: Tensor, y: Tensor) -> None:
        self.pruner, self.x, self.y = pruner, x, y
        self.found: float | None = None
        self.seconds = 0.0

    def _look(self, net: pl.LightningModule) -> None:
        if self.found is None and self.pruner.events_done:
            start = time.perf_counter()
            self.found = accuracy(net, self.x, self.y)
            self.seconds = time.perf_counter() - start

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        self._look(pl_module)


def grouped_norm(net: CifarResNet, keep: float) -> None:
    """Cut by Torch-Pruning's group-norm pruner, one common ratio, bisected for the flops that may be kept.

    It may cut the channels inside blocks alone: with the residual streams, whose shortcuts are padded with zeros, it
    leaves a network that does not run (1.6.0).
    """
    import torch_pruning as tp

    example = torch.zeros(1, 3, 32, 32)
    dense, _ = tp.utils.count_ops_and_params(net, example)
    low, high, best = 0.0, 1.0, None
    for _ in range(10):
        ratio = (low + high) / 2
        trial = copy.deepcopy(net)
        pruner = tp.pruner.GroupNormPruner(
            trial, example, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
            ignored_layers=[trial.linear, trial.conv1, *(m for n, m in trial.named_modules() if n.endswith("conv2"))],
        )  # fmt: skip
        pruner.step()
        flops, _ = tp.utils.count_ops_and_params(trial, example)
        if flops <= keep * dense:
            high, best = ratio, trial
        else:
            low = ratio
    assert best is not None
    vars(net).update(vars(best.train()))  # it comes back in eval mode, in which a Trainer would leave it


def run(name: str, options: argparse.Namespace, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, object]:
    """One row: test, cut, test, fine-tune, test."""
    pl.seed_everything(options.seed, verbose=False)
    state = torch.load(options.weights, weights_only=True)["state_dict"]
    loader = DataLoader(TensorDataset(*data["train"]), batch_size=128, shuffle=True, drop_last=True)
    epochs, lr, hold, pruner, source = options.epochs, 0.01, 0, None, Path()
    whole = Net(state, 1, 0, depth=options.depth)
    dense_cost = lp.count(whole, whole.example_input_array)
    if name.startswith("Scratch-"):
        source, lr = options.plans / f"{name.partition(':')[2]}.json", options.scratch_lr
        pruner = lp.Scratch(source)
        if name.startswith("Scratch-B"):
            left = lp.trace(whole, whole.example_input_array).cost(lp.Plan.load(source))
            epochs = lp.scratch_epochs(epochs, dense_cost.flops, left.flops)
    elif name not in ("dense", "Torch-Pruning"):
        cls = find(name)
        hold = options.gather if cls.needs.endswith("of training") else 0
        pruner = cls(lp.Budget(options.keep), schedule=lp.OneShot(hold, unit="step"))  # type: ignore[call-arg]
    net = Net(state, len(loader) * epochs, hold, lr, options.depth)
    dense = accuracy(net, *data["test"])
    if name == "Torch-Pruning":
        grouped_norm(net.net, options.keep)
    probe = None if pruner is None else AfterCut(pruner, *data["test"])
    found = accuracy(net, *data["test"]) if name == "Torch-Pruning" else dense
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if pruner is None or probe is None else [pruner, probe],
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(net, loader)
    seconds = time.perf_counter() - start - (0.0 if probe is None else probe.seconds)
    if pruner is not None and probe is not None:
        assert probe.found is not None
        found = probe.found
        if options.plans is not None and not source.name:
            options.plans.mkdir(parents=True, exist_ok=True)
            pruner.plan.save(options.plans / f"{name}.json")
    cost = lp.count(net, net.example_input_array)
    return {
        "depth": options.depth,
        "method": name,
        "keep": options.keep,
        "seed": options.seed,
        "epochs": epochs,
        "dense": round(dense, 4),
        "after cut": round(found, 4),
        "fine-tuned": round(accuracy(net, *data["test"]), 4),
        "flops kept": round(cost.flops / dense_cost.flops, 4),
        "params kept": round(cost.params / dense_cost.params, 4),
        "fit s": round(seconds),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run what is missing and print all rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="where decoded images are kept")
    channels = [name for name, cls in discover().items() if cls.kind == "channels"]
    parser.add_argument("--methods", nargs="*", default=channels)
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--plans", type=Path, help="where plans are written and read")
    parser.add_argument("--scratch-lr", type=float, default=0.05)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--gather", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = images(options.images, options.cache)
    for name in options.methods:
        wanted = (options.depth, name, options.keep, options.seed)
        mine = [r for r in read(options.out) if (r["depth"], r["method"], r["keep"], r["seed"]) == wanted]
        longer = name.startswith("Scratch-B")  # has epochs of its own
        if not any(longer or r["epochs"] == options.epochs for r in mine):
            append([run(name, options, data)], options.out)
    print(markdown_table(read(options.out)))


if __name__ == "__main__":
    main()
