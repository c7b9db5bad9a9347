"""Fits of every method, in one process or in two; what came of them goes into a file per process.

python -m tests.two_processes FOLDER
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_prune import OneShot
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.methods import discover

METHODS = [name for name, cls in discover().items() if cls.kind != "control"]
KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}


class Still(DigitsNet):
    """Learns nothing, and its norms stay in eval mode: what a method sees depends only on which samples there are."""

    def on_train_epoch_start(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()

    def train_dataloader(self) -> DataLoader[Any]:
        return samples(16 // self.trainer.world_size, self.trainer.global_rank, self.trainer.world_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def samples(batch_size: int, process: int = 0, processes: int = 1) -> DataLoader[Any]:
    """64 random images in order, those of one process: the batches of all of them together are as of one."""
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 10)
    return DataLoader(data, batch_size, sampler=DistributedSampler(data, processes, process, shuffle=False))


def trainer(processes: int, callback: pl.Callback, folder: Path, distribute: bool = True) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto",
        callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=distribute, default_root_dir=folder,
    )  # fmt: skip


def look(name: str, processes: int, folder: Path) -> dict[str, Any]:
    """Scores and plan of one event, after an epoch of four steps, each with sixteen samples of all processes."""
    cls = discover()[name]
    scores: dict[str, list[float]] = {}

    class Spy(cls):
        def scores(self, *arguments: Any) -> dict[str, Any]:
            out = super().scores(*arguments)
            scores.update({group: score.double().reshape(-1).tolist() for group, score in out.items()})
            return out

    Spy.__name__ = name  # the seeds of a method depend on it
    pl.seed_everything(1, verbose=False)
    pruner = Spy(KEEP[cls.kind], schedule=OneShot(4, unit="step"), calibration=samples(8))
    net = Still(width=4)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    trainer(processes, pruner, folder, distribute=False).fit(net)
    return {"scores": scores, "plan": pruner.plan.digest(), "events": pruner.events_done}


def train(name: str, processes: int, folder: Path) -> dict[str, Any]:
    """A fit on the digits on the method's own schedule."""
    cls = discover()[name]
    pl.seed_everything(0, verbose=False)
    pruner = cls(KEEP[cls.kind])
    fit, net = trainer(processes, pruner, folder), DigitsNet(width=4)
    fit.fit(net, DigitsData(batch_size=128, seed=0))
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()
    kept = float(fit.callback_metrics["prune/density"]) if cls.kind == "weights" else pruner.report.flops_kept
    return {"weights": weights, "plan": pruner.plan.digest(), "events": pruner.events_done, "kept": kept}


def main() -> None:
    """Two processes fit every method in turn."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    rows: dict[str, Any] = {}
    for name in METHODS:
        rows[name] = {"look": look(name, 2, folder), "train": train(name, 2, folder)}
        (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
