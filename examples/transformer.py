"""Heads of a transformer, cut while it trains: nn.TransformerEncoder on sequences made here.

    python examples/transformer.py            20 epochs on 8,192 sequences
    python examples/transformer.py --fast     2 epochs on 256, to see that it runs

The task needs attention: which symbol follows the marker? Whole heads and hidden units of the MLPs go; the residual
stream stays (`ignore=`), since a norm that runs across channels computes otherwise without one. Each layer loses about
the same part (`scope="uniform"`): a head holds many more weights than a hidden unit, and one ranking of both would take
few heads. Seed 0, CPU; prints test accuracy, heads and hidden units of each layer, dense and pruned.
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, TaylorWeight

SYMBOLS, LENGTH = 8, 12


def sequences(count, seed):
    """(N, L) symbols with one marker (0) among them, and (N,) the symbol behind it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, SYMBOLS, (count, LENGTH), generator=generator)
    marker = torch.randint(LENGTH - 1, (count, 1), generator=generator)
    return x.scatter(1, marker, 0), x.gather(1, marker + 1).squeeze(1)


class Reader(pl.LightningModule):
    def __init__(self, width=32, heads=4, layers=2):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, width)
        self.place = nn.Parameter(0.5 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, SYMBOLS)
        self.example_input_array = torch.zeros(1, LENGTH, dtype=torch.long)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the flops that stays (%(default)s)")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    count, epochs = (256, 2) if options.fast else (8192, 20)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    test = DataLoader(TensorDataset(*sequences(1024, seed=1)), 256)

    def trained(name, callbacks):
        pl.seed_everything(0, verbose=False)
        net, train = Reader(), DataLoader(TensorDataset(*sequences(count, seed=0)), 64, shuffle=True)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **quiet)
        trainer.fit(net, train)
        (result,) = trainer.test(net, test, verbose=False)
        heads = [layer.self_attn.num_heads for layer in net.encoder.layers]
        hidden = [layer.linear1.out_features for layer in net.encoder.layers]
        print(f"{name:<7} test accuracy {result['test/acc']:.2%}, heads {heads}, hidden units {hidden}")

    trained("dense", [])
    pruner = TaylorWeight(Budget(options.keep), scope="uniform", ignore=["embed*"])
    trained("pruned", [pruner])
    print(f"flops kept: {pruner.report.flops_kept:.4f}")


if __name__ == "__main__":
    main()
