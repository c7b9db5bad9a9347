"""Prune in a loop of one's own: Lightning Fabric, or plain PyTorch, through trace, plan and cut.

    python examples/fabric.py            half of the flops, 12 + 12 epochs on the digits
    python examples/fabric.py --fast     1 + 1 epochs, to see that it runs

Seed 0, CPU: prints flops, parameters and test accuracy before the cut, after it and at the end, and that of the saved
file when it is loaded into a dense network. The optimizer goes on through the cut: its momentum is cut as well.

Under DDP cut before `fabric.setup`, or set up anew after the cut: the reducer holds the old shapes. A strategy that
shards parameters (FSDP, DeepSpeed) needs the cut before `fabric.setup`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric, seed_everything
from torch import nn
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.commands.digits import DigitsData

EXAMPLE = torch.zeros(1, 1, 8, 8)


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def train(fabric, model, optimizer, loader, epochs):
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()


@torch.no_grad()
def say(when, net, data):
    """Print a line; returns the test accuracy."""
    cost, (x, y) = lp.count(net, EXAMPLE), data.tensors
    accuracy = float((net.eval()(x).argmax(1) == y).float().mean())
    print(f"{when:<16} {cost.flops:>9,} flops {cost.params:>7,} params, test accuracy {accuracy:.2%}")
    return accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="1 + 1 epochs instead of 12 + 12")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the flops that stays (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    epochs = 1 if options.fast else 12

    seed_everything(options.seed, verbose=False)
    digits = DigitsData(seed=options.seed)
    digits.setup("fit")
    fabric = Fabric(accelerator="cpu", devices=1)
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4))
    loader = fabric.setup_dataloaders(DataLoader(digits.train, 64, shuffle=True))

    train(fabric, model, optimizer, loader, epochs)
    say("dense", net, digits.test)
    plan = lp.plan(lp.trace(net, EXAMPLE), method="l1_filter", budget=lp.Budget(options.keep))
    lp.cut(net, plan, optimizers=[optimizer], example_inputs=EXAMPLE)  # the network itself, not Fabric's wrapper
    say("cut", net, digits.test)
    train(fabric, model, optimizer, loader, epochs)
    trained = say("trained on", net, digits.test)

    with tempfile.TemporaryDirectory() as folder:
        fabric.save(Path(folder) / "pruned.ckpt", {"net": net.state_dict(), "plan": plan.state_dict()})
        saved = torch.load(Path(folder) / "pruned.ckpt", weights_only=True)
    again = lp.conform(make_net(), saved["net"], lp.Plan.from_state_dict(saved["plan"]))
    again.load_state_dict(saved["net"])
    if say("loaded again", again, digits.test) != trained:
        raise SystemExit("the file does not do what the trained network did")


if __name__ == "__main__":
    main()
