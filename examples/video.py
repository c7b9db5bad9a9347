"""A recurrent network over 3-D convolutions, pruned: which way does the bar move?

    python examples/video.py            12 epochs on 2,048 clips made here
    python examples/video.py --fast     2 epochs on 128 clips, to see that it runs

Channels of 3-D convolutions and units of the GRU go together with all that carries them. fvcore counts no flops of
nn.GRU, so that the budget is of parameters. Seed 0, CPU; prints the layers and the test accuracy before and after.
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, TaylorWeight


def clips(count, seed):
    """(N, 1, 8, 16, 16) clips of a noisy bar, and (N,) where it goes: right, left, down or up."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randint(4, (count,), generator=generator)
    start = torch.randint(16, (count, 1), generator=generator)
    sign = torch.where(direction % 2 == 0, 1, -1)
    places = (start + sign[:, None] * torch.arange(8)) % 16  # (N, T)
    bars = F.one_hot(places, 16).float()[:, :, None, :].expand(-1, -1, 16, -1)  # (N, T, H, W)
    bars = torch.where((direction < 2)[:, None, None, None], bars, bars.mT)
    return (bars + 0.5 * torch.randn(bars.shape, generator=generator)).unsqueeze(1), direction


class BarNet(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(1, 16, 3, padding=1, bias=False), nn.BatchNorm3d(16)
        self.conv2, self.bn2 = nn.Conv3d(16, 32, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 4)
        self.example_input_array = torch.zeros(1, 1, 8, 16, 16)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        states, _ = self.gru(x.mean((3, 4)).transpose(1, 2))  # (B, T, C)
        return self.head(states[:, -1])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the parameters that stays (%(default)s)")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    count, epochs = (128, 2) if options.fast else (2048, 12)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    test = DataLoader(TensorDataset(*clips(256, seed=1)), 256)

    def trained(name, callbacks):
        pl.seed_everything(0, verbose=False)
        net, train = BarNet(), DataLoader(TensorDataset(*clips(count, seed=0)), 32, shuffle=True)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **quiet)
        trainer.fit(net, train)
        (result,) = trainer.test(net, test, verbose=False)
        print(f"{name}: test accuracy {result['test/acc']:.2%}\n  {net.conv1}\n  {net.conv2}\n  {net.gru}")

    trained("dense", [])
    pruner = TaylorWeight(Budget(options.keep, of="params"))
    trained("pruned", [pruner])
    print(f"parameters kept: {pruner.report.params_kept:.4f}")


if __name__ == "__main__":
    main()
