"""Fits of every method, in one process or in several; what came of them goes into a file per process.

python -m tests.two_processes FOLDER [PROCESSES [METHOD ...]]
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


class Plans(pl.Callback):
    """Notes the plan after each event of a method."""

    def __init__(self, pruner: pl.Callback) -> None:
        self.pruner, self.digests = pruner, []

    def on_train_start(self, *_: Any) -> None:
        self.note()

    def on_train_batch_end(self, *_: Any) -> None:
        self.note()

    def note(self) -> None:
        if self.pruner.events_done > len(self.digests):
            self.digests += [self.pruner.plan.digest()] * (self.pruner.events_done - len(self.digests))


def look(name: str, processes: int, folder: Path, batch_size: int = 7) -> dict[str, Any]:
    """Scores and plan of one event, after an epoch of four steps, each with sixteen samples of all processes.

    Data for calibration comes in batches of seven, the last of which is a single sample: processes get unlike shares.
    """
    cls = discover()[name]
    scores: dict[str, list[float]] = {}

    class Spy(cls):
        def scores(self, *arguments: Any) -> dict[str, Any]:
            out = super().scores(*arguments)
            scores.update({group: score.double().reshape(-1).tolist() for group, score in out.items()})
            return out

    Spy.__name__ = name  # the seeds of a method depend on it
    pl.seed_everything(1, verbose=False)
    pruner = Spy(KEEP[cls.kind], schedule=OneShot(4, unit="step"), calibration=samples(batch_size))
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
    fit.callbacks.append(plans := Plans(pruner))
    fit.fit(net, DigitsData(batch_size=128, seed=0))
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()
    kept = float(fit.callback_metrics["prune/density"]) if cls.kind == "weights" else pruner.report.flops_kept
    return {"weights": weights, "plans": plans.digests, "events": pruner.events_done, "kept": kept}


def main() -> None:
    """So many processes fit every method in turn; each also looks at data that is not enough for all of them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, processes, names = Path(sys.argv[1]), int((sys.argv[2:3] or ["2"])[0]), sys.argv[3:] or METHODS
    rows: dict[str, Any] = {}
    for name in names:
        rows[name] = {
            "look": look(name, processes, folder),
            "few": look(name, processes, folder, 64),
            "train": train(name, processes, folder),
        }
        (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
