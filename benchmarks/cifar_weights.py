"""ResNet-20 on CIFAR-10 with a tenth of its weights: all methods that mask weights, from the same start.

    python benchmarks/cifar_weights.py --images cifar10_jpeg.npz [--weights resnet20_jpeg.pt] [--methods RigL SNIP ...]
        [--epochs 3] [--keep 0.1] [--lr 0.05] --out FILE.csv

Each method has its default schedule and settings, but RigL, SET and static, which have ERK densities (RigL's default).
The start is the trained network given, or with none a random one, the same for all. SGD, Nesterov 0.9, weight decay
5e-4, the rate falling linearly from ``--lr`` to zero, batch 128; images and augmentation as in ``cifar.py``. Rows are
appended; runs already in the file are not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from cifar import Net, accuracy, images
from graph import CifarResNet
from pages import append, read
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.methods import find
from lightning_prune.report import markdown_table

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Magnitude": ("Magnitude", {}),
    "RandomWeights": ("RandomWeights", {}),
    "SNIP": ("SNIP", {}),
    "RigL": ("RigL", {}),
    "SET": ("RigL", {"grow": "random"}),
    "static": ("RigL", {"grow": "none"}),
    "SparseConnectivityLearning": ("SparseConnectivityLearning", {}),
    "IterativeImportance": ("IterativeImportance", {}),
    "LotteryTicket": ("LotteryTicket", {}),
}


def run(name: str, options: argparse.Namespace, data: dict[str, Any]) -> dict[str, object]:
    """One fit."""
    pl.seed_everything(options.seed, verbose=False)
    if options.weights is None:
        state = CifarResNet(20).state_dict()
    else:
        state = torch.load(options.weights, weights_only=True)["state_dict"]
    pl.seed_everything(options.seed, verbose=False)
    pruner: Any = None
    if name != "dense":
        method, settings = VARIANTS[name]
        pruner = find(method)(lp.Budget(options.keep), **settings)  # type: ignore[call-arg]
    loader = DataLoader(TensorDataset(*data["train"]), batch_size=128, shuffle=True, drop_last=True)
    net = Net(state, len(loader) * options.epochs, 0, options.lr)
    before = accuracy(net, *data["test"])
    trainer = pl.Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[] if pruner is None else [pruner],
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(net, loader)
    seconds = time.perf_counter() - start
    row = pruner.report.rows[-1] if pruner is not None else {}
    return {
        "method": name,
        "start": "random" if options.weights is None else "trained",
        "keep": 1.0 if pruner is None else options.keep,
        "seed": options.seed,
        "epochs": options.epochs,
        "lr": options.lr,
        "before": round(before, 4),
        "accuracy": round(accuracy(net, *data["test"]), 4),
        "density": round(row.get("prune/density", 1.0), 4),
        "flops sparse": round(row["prune/flops_sparse"] / row["prune/flops"], 4) if row else 1.0,
        "regrown": int(row.get("prune/regrown", 0)),
        "events": 0 if pruner is None else pruner.events_done,
        "fit s": round(seconds),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run what is missing and print all rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cache", type=Path, help="where decoded images are kept")
    parser.add_argument("--methods", nargs="*", default=["dense", *VARIANTS])
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = images(options.images, options.cache)
    begun = "random" if options.weights is None else "trained"
    same = ("method", "start", "keep", "seed", "epochs", "lr")
    for name in options.methods:
        wanted = (name, begun, 1.0 if name == "dense" else options.keep, options.seed, options.epochs, options.lr)
        if not any(tuple(r[key] for key in same) == wanted for r in read(options.out)):
            append([run(name, options, data)], options.out)
    print(markdown_table(read(options.out)))


if __name__ == "__main__":
    main()
