"""A run that is killed after its first prune event goes on from its last checkpoint as if nothing had happened.

This file is also a program: ``python test_resume.py FOLDER`` starts each run in a process of its own, which is killed.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Magnitude, TaylorWeight

# 3 epochs of 6 steps. Default schedules: events from step 2 to 11, or to 13.
PRUNERS = {"TaylorWeight": lambda: [TaylorWeight(0.5)], "Magnitude": lambda: [Magnitude(0.2)], "none": lambda: []}
KILLED_AT = 10  # the last checkpoint is then of step 8, in mid-epoch, or of step 6, the end of epoch 0
LAST = {"steps": "step=8.ckpt", "epochs": "epoch=0.ckpt"}

pytestmark = [
    pytest.mark.processes,  # a process that is killed cannot be the one that tests
    pytest.mark.filterwarnings("ignore:.*changed nothing"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(1, 1, 6, 6)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


class EpochOrder:
    """An order that depends on the epoch alone."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Resumable:
    """A loader that knows which batch of its epoch comes next."""

    def __init__(self, data):
        self.data, self.sampler, self.offset = data, EpochOrder(), 0

    def __len__(self):
        return 6

    def __iter__(self):
        order = list(self.sampler)
        for number in range(self.offset, 6):
            self.offset = (number + 1) % 6
            yield self.data[order[4 * number : 4 * number + 4]]

    def state_dict(self):
        return {"offset": self.offset}

    def load_state_dict(self, state):
        self.offset = state["offset"]


class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, variant, pruner, *callbacks, ckpt_path=None):
    """Train with a checkpoint every 4 steps over a resumable loader, or at each epoch's end over a plain one."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(24, 1, 6, 6, generator=generator), torch.arange(24) % 3)
    if variant == "steps":
        loader, when = Resumable(data), {"every_n_train_steps": 4, "filename": "{step}"}
    else:
        loader, when = DataLoader(data, 4), {"save_on_train_epoch_end": True, "filename": "{epoch}"}
    pruners = PRUNERS[pruner]()
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[*pruners, ModelCheckpoint(folder, save_top_k=-1, **when), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Net()
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return model, pruners


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what the killed runs left: ``VARIANT-PRUNER/*.ckpt``."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def unequal(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("variant", ["steps", "epochs"])
@pytest.mark.parametrize("pruner", ["TaylorWeight", "Magnitude"])
def test_killed_run_ends_bitwise_as_the_uninterrupted_one(killed, tmp_path, pruner, variant):
    for name in ("none", pruner):  # the control first: the same run without our callback
        left = killed / f"{variant}-{name}"
        last = max(left.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert last.name == LAST[variant]
        whole, pruners = run(tmp_path / name, variant, name)
        resumed, again = run(tmp_path / f"{name}-resumed", variant, name, ckpt_path=left / last.name)
        assert unequal(whole, resumed) == []
        assert unequal(whole, Net()) != []
    saved = torch.load(last, weights_only=True)["callbacks"][again[0].state_key]
    assert 0 < saved["done"] < len(again[0].events)  # killed between two events
    assert again[0].plan == pruners[0].plan
    assert [event.step for event in again[0].events] == [event.step for event in pruners[0].events]
    assert again[0].events_done == len(again[0].events)


if __name__ == "__main__":
    for variant in LAST:
        for pruner in PRUNERS:
            child = os.fork()
            if child == 0:
                run(Path(sys.argv[1]) / f"{variant}-{pruner}", variant, pruner, Kill())
                os._exit(1)  # not reached
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                sys.exit(f"{variant} {pruner} was to be killed, got status {status}")
