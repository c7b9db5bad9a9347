"""How well do scores tell the true loss change? The trained digits net, every channel removed on its own.

    python benchmarks/oracle.py [--seeds 0 1 2] [--out FILE.csv]

The oracle is |loss without the channel - loss| over the whole training set in eval mode, by `loss_changes`. The scores
of `TaylorWeight` are the mean over training batches of 64 of the squared gate gradients, with the net in train mode as
the callback sees it, and in eval mode; those of `L1Filter` are the filters' norms. Spearman's rank correlation over all
channels of the net, and the mean over groups. `examples/oracle.py` does it for every method, in eval mode.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

import lightning_prune as lp
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.graph.views import LayerView
from lightning_prune.methods.l1_filter import l1_filter_score
from lightning_prune.report import markdown_table


def trained(seed: int, epochs: int = 15) -> tuple[DigitsNet, Tensor, Tensor]:
    """A dense digits net, and its training images and labels."""
    pl.seed_everything(seed, verbose=False)
    net, data = DigitsNet(), DigitsData(seed=seed)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, data)
    parts = [batch[:2] for batch in data.train_dataloader()]
    return net, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def loss(net: DigitsNet, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of a batch."""
    return torch.nn.functional.cross_entropy(net(batch[0]), batch[1])


def taylor(net: DigitsNet, graph: lp.ChannelGraph, x: Tensor, y: Tensor, training: bool) -> dict[str, Tensor]:
    """group -> (C,) mean of squared gate gradients over batches of 64, through the callback's own measure."""
    method = lp.TaylorWeight(0.5)
    parameters = dict(net.named_parameters())
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    views = {g.name: [LayerView(g, p, parameters) for p in g.producers] for g in graph.groups}
    total = {name: torch.zeros(group[0].group.size) for name, group in views.items()}
    net.train(training)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    batches = [part for part in order.split(64) if len(part) == 64]
    for part in batches:
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(x[part]), y[part]).backward()
        for name, group in views.items():
            joined = torch.stack([method.measure(view) for view in group]).sum(dim=0)
            total[name] += method.combine(joined) / len(batches)
    for name, b in net.named_buffers():
        b.copy_(buffers[name])
    return total


def rows(seed: int) -> Iterator[dict[str, object]]:
    """One row per score."""
    net, x, y = trained(seed)
    graph = lp.trace(net, torch.zeros(1, 1, 8, 8))
    true = lp.loss_changes(net, graph, [(x, y)], loss)
    parameters = dict(net.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "TaylorWeight, train mode": taylor(net, graph, x, y, training=True),
        "TaylorWeight, eval mode": taylor(net, graph, x, y, training=False),
        "L1Filter": {
            g.name: l1_filter_score(LayerView(g, g.producers[0], parameters).filters.detach()) for g in graph.groups
        },
        "random": {g.name: torch.rand(g.size, generator=generator) for g in graph.groups},
    }
    for name, score in scores.items():
        found = lp.rank_correlation(score, true)
        yield {
            "score": name,
            "seed": seed,
            "spearman": round(found.overall, 3),
            "mean within groups": round(found.mean, 3),
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = [row for seed in options.seeds for row in rows(seed)]
    print(markdown_table(table))
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
