"""What several processes share, case by case; what came of each goes into a file per process.

python -m tests.process_cases FOLDER PROCESSES CASE ...
"""

import json
import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from lightning_prune import OneShot, Updates
from lightning_prune.commands.digits import DigitsNet
from lightning_prune.methods import discover

KINDS = ("L1Filter", "TaylorActivation", "TaylorWeight", "ThiNet", "Magnitude", "SNIP", "RigL", "LRPET")
KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5, "control": 0.5}


def images(samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(samples, 1, 8, 8, generator=generator), torch.arange(samples) % 10)


class Steady(DigitsNet):
    """Learns, with norms that stay as they are: processes together make the step that one makes."""

    def __init__(self, shares: Sequence[int] = (), spare: bool = False) -> None:
        super().__init__(width=4)
        self.shares = shares
        if spare:
            self.spare = nn.Linear(4, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)

    def on_train_epoch_start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def train_dataloader(self) -> DataLoader[Any]:
        """Sixteen samples a step, by default in equal shares; else process k has ``shares[k]`` of each sixteen."""
        process, processes = self.trainer.global_rank, self.trainer.world_size
        if processes == 1 or not self.shares:
            sampler = DistributedSampler(images(), processes, process, shuffle=False)
            return DataLoader(images(), 16 // processes, sampler=sampler)
        first, size = sum(self.shares[:process]), self.shares[process]
        own = [16 * step + first + i for step in range(4) for i in range(size)]
        return DataLoader(Subset(images(), own), size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.02, 0.9, weight_decay=1e-3)


class Still(Steady):
    """Learns nothing: scores depend only on which samples there are."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(
    folder: Path,
    net: pl.LightningModule,
    pruner: pl.Callback,
    processes: int,
    others: Sequence[pl.Callback] = (),
    ckpt_path: Any = None,
    ddp: Any = None,
    **settings: Any,
) -> pl.Trainer:
    strategy = DDPStrategy(timeout=timedelta(seconds=90), **(ddp or {})) if processes > 1 else "auto"
    trainer = pl.Trainer(**{
        "max_epochs": 2, "accelerator": "cpu", "devices": processes, "strategy": strategy, "logger": False,
        "callbacks": [pruner, *others], "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in others),
        "use_distributed_sampler": False, "default_root_dir": folder, "limit_val_batches": 0, **settings,
    })  # fmt: skip
    trainer.fit(net, ckpt_path=ckpt_path)
    return trainer


def method(name: str, step: int = 4, **settings: Any) -> Any:
    """A method that prunes once, after so many steps; those that go on updating do so from there."""
    cls = discover()[name]
    schedule = Updates(every=2, unit="step", end=1.0) if name in ("RigL", "LRPET") else OneShot(step, unit="step")
    data = [] if name in ("RigL", "LRPET", "L1Filter", "Magnitude", "RandomChannels") else [DataLoader(images(), 7)]
    calibration = {"calibration": data[0]} if data else {}
    return cls(KEEP[cls.kind], schedule=schedule, **{**calibration, **settings})


def weights(net: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()


def follow(processes: int, folder: Path) -> dict[str, Any]:
    """Training before and after the event, by each kind of method."""
    out = {}
    for name in KINDS:
        pl.seed_everything(1, verbose=False)
        net, pruner = Steady(), method(name)
        fit(folder, net, pruner, processes)
        pairs = [n for n, m in net.named_modules() if isinstance(m, nn.Sequential) and name == "LRPET"]
        out[name] = {"plan": pruner.plan.digest(), "weights": weights(net), "pairs": pairs}
    return out


class Reducer(pl.Callback):
    """Looks at the wrapper, its gradients and whether the one before is gone."""

    def __init__(self) -> None:
        self.wrappers: list[Any] = []
        self.flags: list[Any] = []
        self.gone: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        wrapper = trainer.strategy.model
        if self.wrappers and self.wrappers[-1]() is not wrapper:
            self.gone.append(self.wrappers[-1]() is None)
        if not self.wrappers or self.wrappers[-1]() is not wrapper:
            self.wrappers.append(weakref.ref(wrapper))
            names = ("static_graph", "find_unused_parameters", "gradient_as_bucket_view")
            self.flags.append([getattr(wrapper, name, None) for name in names])


def reducers(processes: int, folder: Path) -> dict[str, Any]:
    """A cut under each setting of the reducer; the net has a layer that is never used where that is allowed."""
    out = {}
    for flag in ("static_graph", "find_unused_parameters", "gradient_as_bucket_view"):
        pl.seed_everything(1, verbose=False)
        net, pruner, looks = Steady(spare=flag == "find_unused_parameters"), method("L1Filter"), Reducer()
        fit(folder, net, pruner, processes, [looks], ddp={flag: True} if processes > 1 else None)
        out[flag] = {"weights": weights(net), "flags": looks.flags, "gone": looks.gone, "events": pruner.events_done}
    return out


def uneven(processes: int, folder: Path) -> dict[str, Any]:
    """Processes see unlike numbers of samples of each sixteen."""
    scores: dict[str, list[float]] = {}
    cls = discover()["TaylorActivation"]

    class Spy(cls):
        def scores(self, *arguments: Any) -> dict[str, Any]:
            out = super().scores(*arguments)
            scores.update({group: score.tolist() for group, score in out.items()})
            return out

    Spy.__name__ = cls.__name__
    pl.seed_everything(1, verbose=False)
    pruner = Spy(0.5, schedule=OneShot(4, unit="step"), layer_norm="none")
    fit(folder, Still(shares=(11, 5)), pruner, processes)
    return {"scores": scores, "plan": pruner.plan.digest()}


def norms(processes: int, folder: Path) -> dict[str, Any]:
    """Norms that are joined over processes: traced, cut, masked, and put back after the fit.

    On the CPU they work in eval mode alone; one that is called in train mode, by us, say, raises. That torch wants the
    whole module on a GPU is switched off.
    """
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None
    out = {}
    for name in ("BNImportance", "Magnitude", "LRPET"):
        pl.seed_everything(1, verbose=False)
        net, pruner, seen = Steady(), method(name), []

        class Names(pl.Callback):
            def on_train_epoch_end(self, trainer: pl.Trainer, net: pl.LightningModule, seen: Any = seen) -> None:
                seen.append(sorted({type(m).__name__ for m in net.modules() if "BatchNorm" in type(m).__name__}))

        fit(folder, net, pruner, processes, [Names()], sync_batchnorm=processes > 1)
        after = sorted({type(m).__name__ for m in net.modules() if "BatchNorm" in type(m).__name__})
        out[name] = {"plan": pruner.plan.digest(), "during": seen[-1], "after": after, "weights": weights(net)}
    return out


def noting(function: Any, notes: dict[str, Any]) -> Any:
    def noted(*arguments: Any) -> Any:
        out = function(*arguments)
        notes.update({group: score.tolist() for group, score in out.items()})
        return out

    return noted


def resume(processes: int, folder: Path) -> dict[str, Any]:
    """Whole, and from a checkpoint in the middle of what the event looks back on."""
    out = {}
    for name in ("TaylorActivation", "RigL", "LRPET"):
        ends = []
        for start in (None, folder / name / "epoch=0.ckpt"):
            pl.seed_everything(1, verbose=False)
            net, pruner, scores = Steady(), method(name, step=6), {}
            if name == "TaylorActivation":
                pruner.scores = noting(pruner.scores, scores)
            save = ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
            fit(folder, net, pruner, processes, [] if start else [save], start)
            end = {"plan": pruner.plan.digest(), "weights": weights(net), "events": pruner.events_done}
            ends.append({"end": end, "scores": scores.get("stem", [])})
        out[name] = ends
    return out


class OneIsSick(Still):
    """The last process sees nothing finite; the step itself is made whole, as a scaler or a hook of the user would."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad.nan_to_num_()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (float("nan") if self.trainer.global_rank else 1.0)


def sick(processes: int, folder: Path) -> dict[str, Any]:
    pl.seed_everything(1, verbose=False)
    pruner = method("TaylorActivation", step=2)
    fit(folder, OneIsSick(), pruner, processes)
    return {"plan": pruner.plan.digest(), "events": pruner.events_done, "kept": pruner.report.flops_kept}


def seeds(processes: int, folder: Path) -> dict[str, Any]:
    """Each process has a seed of its own."""
    out = {}
    for name in ("RandomChannels", "RigL"):
        pl.seed_everything(1, verbose=False)
        net, pruner = Steady(), method(name)

        class Own(pl.Callback):
            def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
                pl.seed_everything(trainer.global_rank, verbose=False)

        fit(folder, net, pruner, processes, [Own()])
        out[name] = {"plan": pruner.plan.digest(), "weights": weights(net)}
    return out


class SharedOut(Steady):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.02, momentum=0.9)


def shared_out(processes: int, folder: Path) -> dict[str, Any]:
    """An optimizer that keeps its state in pieces."""
    try:
        fit(folder, SharedOut(), method("L1Filter"), processes)
    except ValueError as error:
        return {"error": str(error)}
    return {}


def files(processes: int, folder: Path) -> dict[str, Any]:
    """Which files each process writes, with checkpoints and a logger; NODES of them, if that is set."""
    nodes = int(os.environ.get("NODES", "1"))
    written: list[str] = []
    sys.addaudithook(lambda event, details: written.extend(written_by(event, details)))
    out: dict[str, Any] = {}
    for name in ("L1Filter", "RigL", "LRPET"):
        pl.seed_everything(1, verbose=False)
        net, pruner = Steady(), method(name)
        save = ModelCheckpoint(folder / name, save_last=True)
        trainer = fit(
            folder, net, pruner, processes, [save], devices=processes // nodes, num_nodes=nodes,
            logger=[TensorBoardLogger(folder, name), CSVLogger(folder, name)], log_every_n_steps=1,
        )  # fmt: skip
        out[name] = {"plan": pruner.plan.digest(), "weights": weights(net), "local": trainer.local_rank}
    return {**out, "written": sorted(set(written))}


def written_by(event: str, details: Any) -> list[str]:
    """Paths that an audited event of the interpreter writes, makes, renames or removes."""
    if event == "open":
        path, mode, flags = details
        writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        return [str(path)] if writes and str(path) != os.devnull else []
    return [str(details[0])] if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink") else []


CASES = [follow, reducers, uneven, resume, sick, seeds, shared_out, files, norms]  # the last one switches a check off


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, processes, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    rows: dict[str, Any] = {}
    for case in CASES:
        if not names or case.__name__ in names:
            rows[case.__name__] = case(processes, folder)
            (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
