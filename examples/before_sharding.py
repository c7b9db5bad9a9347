"""Prune first, shard after: plan and cut through the functional API, then hand the small network to FSDP or DeepSpeed.

    python examples/before_sharding.py          trains the digits net for 8 epochs, cuts, and goes on for 8
    python examples/before_sharding.py --fast   1 epoch and 1 epoch, to see that it runs

Callbacks refuse strategies that shard parameters, as a channel of a sharded weight lies in pieces. Nothing of a plan
needs them: it is made and cut on one device, and what comes out is an ordinary smaller module. Its state dict is all
that the second run needs, wherever it is launched: `conform` takes the shapes from it. Seed 0, CPU. With several GPUs
give the second Trainer `strategy="fsdp"`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

import lightning_prune as lp
from lightning_prune.commands.digits import DigitsData, DigitsNet


def trainer(epochs, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet, **settings)


def prune(net, keep, path):
    """Cut in place, and write what the second run starts from."""
    graph = lp.trace(net, net.example_input_array)
    plan = lp.plan(graph, method="l1_filter", budget=lp.Budget(keep))
    report = lp.cut(net, plan)
    torch.save(net.state_dict(), path)
    return report


def start_again(path):
    """What every process of the sharded run does before it is wrapped: the shapes, then the weights."""
    state = torch.load(path, weights_only=True)
    net = lp.conform(DigitsNet(), state)
    net.load_state_dict(state)
    return net


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="of the flops (%(default)s)")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    epochs = 1 if options.fast else 8
    seed_everything(0, verbose=False)
    net, data = DigitsNet(), DigitsData()
    trainer(epochs).fit(net, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pruned.pt")
        report = prune(net, options.keep, path)
        small = start_again(path)
    print(f"flops {report.before.flops:,} -> {report.after.flops:,}, params {report.before.params:,} -> "
          f"{report.after.params:,}")  # fmt: skip
    sharded = trainer(epochs)  # strategy="fsdp" and devices= where there are GPUs
    sharded.fit(small, data)
    accuracy = sharded.test(small, data, verbose=False)[0]["test/acc"]
    print(f"accuracy after {epochs} more epochs: {accuracy:.4f}")
    assert lp.count(small, small.example_input_array).flops == report.after.flops


if __name__ == "__main__":
    main()
