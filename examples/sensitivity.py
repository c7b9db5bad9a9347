"""How much of each layer may go? A scan, and a prune with the quality factors that it suggests, as Han et al. did.

    python examples/sensitivity.py             the digits net, trained for 15 epochs, retrained for 10
    python examples/sensitivity.py --fast      1 epoch each, to see that it runs

Accuracy is of the 360 validation images while it is scanned, and of the 360 test images in the end. The other networks
keep as many weights, with the same density in every layer, and with one quality factor for all. CPU; `--out FOLDER`
takes table and picture.
"""

import argparse
import copy
import logging
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

import lightning_prune as lp
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.figures import sensitivity_figure
from lightning_prune.report import markdown_table

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


@torch.no_grad()
def accuracy(net, data):
    training = net.training
    right = net.eval()(data.tensors[0]).argmax(1) == data.tensors[1]
    net.train(training)
    return float(right.float().mean())


def retrained(net, data, callback, epochs, seed):
    """A copy of the trained network, pruned before its first step and trained on at a tenth of the rate."""
    pruned = copy.deepcopy(net)
    pruned.lr = net.lr / 10
    seed_everything(seed, verbose=False)
    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback], **QUIET).fit(pruned, data)
    masks = callback.plan.masks.values()
    density = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    return density, accuracy(pruned, data.test)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=0.02, help="accuracy a layer may cost (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for sensitivity.csv and sensitivity.png")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(options.seed, verbose=False)
    net, data = DigitsNet(), DigitsData(seed=options.seed)
    Trainer(max_epochs=1 if options.fast else 15, accelerator="cpu", **QUIET).fit(net, data)
    net.trainer = None  # copies are of the network alone

    graph = lp.trace(net, net.example_input_array)
    densities = (0.5, 0.1) if options.fast else (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    scan = lp.sensitivity(net, lambda model: accuracy(model, data.val), densities, graph=graph)
    print(scan, "\n")

    epochs = 1 if options.fast else 10
    start = {"schedule": lp.OneShot(0, unit="step")}
    density, found = retrained(
        net, data, lp.Magnitude(quality=scan.quality(options.tolerance), **start), epochs, options.seed
    )
    rows = [
        {"network": "dense", "density": 1.0, "test accuracy": accuracy(net, data.test)},
        {"network": "factors of the scan", "density": density, "test accuracy": found},
    ]
    for name, rule in {"one density": {}, "one factor": {"threshold": "quality"}}.items():
        kept, found = retrained(net, data, lp.Magnitude(density, **rule, **start), epochs, options.seed)
        rows.append({"network": name, "density": kept, "test accuracy": found})
    print(markdown_table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "sensitivity.csv").write_text(scan.to_csv(), "utf-8")
        picture = sensitivity_figure(scan.values, scan.densities, scan.dense, "validation accuracy")
        picture.savefig(options.out / "sensitivity.png", dpi=150)


if __name__ == "__main__":
    main()
