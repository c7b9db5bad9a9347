"""The digits network dense and pruned, in float32 and in int8: accuracy, bytes, milliseconds. Prints a Markdown table.

    python benchmarks/int8_digits.py --seed 0

Both networks are trained as ``lightning-prune demo`` trains them. All four rows run in ONNX Runtime on one thread, in
turn, so that they differ in nothing but the network and its numbers. int8 is calibrated on 256 training images.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_prune import TaylorWeight
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.export import OnnxModel, export_model
from lightning_prune.latency import compare
from lightning_prune.quantize import quantized
from lightning_prune.report import markdown_table


def fitted(seed: int, epochs: int, *callbacks: pl.Callback) -> DigitsNet:
    pl.seed_everything(seed, verbose=False)
    net = DigitsNet()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(net, DigitsData(seed=seed))
    return net.eval()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--keep", type=float, default=0.5, help="of the flops")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = DigitsData(seed=options.seed)
    data.setup("fit")
    images, labels = data.test.tensors
    nets = {
        "dense": fitted(options.seed, options.epochs),
        "pruned": fitted(options.seed, options.epochs, TaylorWeight(options.keep)),
    }
    models, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, net in nets.items():
            whole = export_model(net, net.example_input_array, Path(folder) / name, to=["onnx"])["onnx"]
            small = quantized(net, net.example_input_array, data.train_dataloader(), samples=256)
            models |= {f"{name}, float32": OnnxModel(whole.path), f"{name}, int8": small.model}
            sizes |= {f"{name}, float32": whole.bytes, f"{name}, int8": small.bytes}
            print(
                f"{name}: eager {accuracy(net, images, labels):.4f}; int8 on {small.samples} samples, "
                f"reduced range: {small.reduced_range}"
            )
    times = compare(models, images[:1], (1, 32), repeats=500, warmup=50)
    rows = [
        {
            "": name,
            "test accuracy": f"{accuracy(model, images, labels):.2%}",
            "bytes": sizes[name],
            "ms, batch 1": f"{times[name][0].median_ms:.3f}",
            "ms, batch 32": f"{times[name][1].median_ms:.3f}",
        }
        for name, model in models.items()
    ]
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
