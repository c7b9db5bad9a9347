"""All methods on the digits, next to dense: test accuracy at the same budget, over seeds.

    python benchmarks/digits.py [--seeds 0 1 2] [--epochs 15] [--channels 0.5 0.25] [--weights 0.2 0.1 0.05 0.02]
        [--ranks 0.5 0.3] [--methods RigL SNIP ...] [--figure FILE.png] --out FILE.csv

Each run trains for the same epochs from the same seed; the method prunes on its default schedule while it trains. Rows
are appended to the file, and runs it already holds are not repeated. The figure is of the methods that mask weights:
test error against density, mean and spread.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.methods import discover, find
from lightning_prune.report import markdown_table

# rows of a method that is not as it comes
VARIANTS = {
    "SET": ("RigL", {"grow": "random"}),
    "static": ("RigL", {"grow": "none"}),
    "NetworkSlimming, 3 passes": ("NetworkSlimming", {"passes": 3}),
}
FIELDS = ["method", "keep", "seed", "epochs", "accuracy", "flops_kept", "density", "params_kept", "seconds"]


def run(method: str, keep: float, seed: int, epochs: int) -> dict[str, object]:
    """One fit and its test accuracy."""
    pl.seed_everything(seed, verbose=False)
    name, settings = VARIANTS.get(method, (method, {}))
    pruner = None if method == "dense" else find(name)(keep, **settings)  # type: ignore[call-arg]
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if pruner is None else [pruner],
    )  # fmt: skip
    net, data = DigitsNet(), DigitsData(seed=seed)
    start = time.perf_counter()
    trainer.fit(net, data)
    seconds = time.perf_counter() - start
    logged = {key: round(float(value), 5) for key, value in trainer.callback_metrics.items()}
    accuracy = float(trainer.test(net, data, verbose=False)[0]["test/acc"])
    return {
        "method": method,
        "keep": keep,
        "seed": seed,
        "epochs": epochs,
        "accuracy": round(accuracy, 5),
        "flops_kept": logged.get("prune/flops_kept", 1.0),
        "density": logged.get("prune/density", 1.0),
        "params_kept": logged.get("prune/params_kept", 1.0),
        "seconds": round(seconds, 1),
    }


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Test error against density, a line a method that masks weights, with the spread over seeds."""
    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    methods = dict.fromkeys(row["method"] for row in table if row["method"] != "dense")
    for number, method in enumerate(methods):
        rows = sorted((r for r in table if r["method"] == method), key=lambda r: r["keep"])
        x = [row["keep"] * 1.02 ** (number - len(methods) / 2) for row in rows]  # side by side
        y, error = [100 - row["accuracy %"] for row in rows], [row["spread"] for row in rows]
        below = [min(spread, 0.7 * wrong) for wrong, spread in zip(y, error, strict=True)]  # a logarithm ends at 0
        style = "--" if method in ("RandomWeights", "static") else "-"
        axes.errorbar(
            x, y, (below, error), marker="o", markersize=4, capsize=2, linewidth=1.2, linestyle=style, label=method
        )
    for row in table:
        if row["method"] == "dense":
            axes.axhline(100 - row["accuracy %"], color="black", linewidth=0.8, linestyle=":", label="dense")
    ticks = sorted({row["keep"] for row in table if row["method"] != "dense"})
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="test error, %", xticks=ticks)
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, print mean and spread."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--channels", nargs="*", type=float, default=[0.5, 0.25])
    parser.add_argument("--weights", nargs="*", type=float, default=[0.2, 0.1, 0.05, 0.02])
    parser.add_argument("--ranks", nargs="*", type=float, default=[0.5, 0.3])
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    kinds = {name: cls.kind for name, cls in discover().items() if cls.kind != "control"}
    kinds |= {name: kinds[method] for name, (method, _) in VARIANTS.items() if method in kinds}
    keeps = {"channels": options.channels, "weights": options.weights, "ranks": options.ranks}
    wanted = [("dense", 1.0)]
    wanted += [(name, keep) for kind in keeps for keep in keeps[kind] for name in kinds if kinds[name] == kind]
    if options.methods:
        wanted = [(name, keep) for name, keep in wanted if name in options.methods]
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS)
        if not file.tell():
            writer.writeheader()
        for method, keep in wanted:
            for seed in options.seeds:
                key = (method, str(keep), str(seed), str(options.epochs))
                if any((r["method"], r["keep"], r["seed"], r["epochs"]) == key for r in rows):
                    continue
                row = run(method, keep, seed, options.epochs)
                rows.append({key: str(value) for key, value in row.items()})
                writer.writerow(row)
                file.flush()
    table = []
    for method, keep in wanted:
        mine = [r for r in rows if r["method"] == method and float(r["keep"]) == keep]
        scores = [100 * float(r["accuracy"]) for r in mine]
        table.append(
            {
                "method": method,
                "keep": keep,
                "accuracy %": round(mean(scores), 2),
                "spread": round(stdev(scores), 2) if len(scores) > 1 else 0.0,
                "lowest": round(min(scores), 2),
                "flops kept": round(mean(float(r["flops_kept"]) for r in mine), 4),
                "density": round(mean(float(r["density"]) for r in mine), 4),
                "runs": len(mine),
            }
        )
    print(markdown_table(table))
    if options.figure is not None:
        draw([row for row in table if kinds.get(str(row["method"]), "weights") == "weights"], options.figure)


if __name__ == "__main__":
    main()
