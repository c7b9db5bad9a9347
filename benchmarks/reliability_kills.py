"""Kills survived: runs that die by SIGKILL at a random moment, go on, and are compared bit by bit with whole ones.

    python -m benchmarks.reliability_kills [--methods TaylorWeight ...] [--most 10] [--least 2] [--seed 0]
        [--out benchmarks/results/reliability_kills.csv]

Each run is a process of its own, forked from this one, which has imported everything. A network of 1.2 thousand weights
trains for 4 epochs of 6 steps, seed 0, one thread, with one method built from a budget alone. Checkpoints are written
every 1 to 5 steps (a loader that knows where in its epoch it is) or at the end of each epoch (a plain loader). The
moments are drawn from the seed, the method's name and the number of the kill:

    training           in a hook of a training batch, ahead of the method's own hook or behind it
    scoring            at a random call of a Python function while the method scores, or projects, at an event
    event              at a random call of a Python function anywhere in an event
    checkpoint write   with a random part of the file written, over the file that was there

The killed run goes on with ``fit(ckpt_path="last")`` in a process with another seed. Where the last checkpoint is torn,
that has to be refused with its name, and the run goes on from the newest that is whole. It survives if its weights,
plan, masks, events, optimizer and scheduler states, the method's own state and all rows logged from there on have the
bits of the run that nothing killed. ``control`` says whether the same run without the method, killed as it trains and
continued from the same step, has them; a kill with another control than "bitwise" says nothing of the method.

Rows that the CSV has already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget
from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.methods import discover
from lightning_prune.pruner import Pruner

EPOCHS, BATCHES, BATCH = 4, 6, 4
STEPS = EPOCHS * BATCHES
KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}
MOST = ("TaylorWeight", "Magnitude", "RigL", "LRPET")  # one that cuts, one that masks, one that regrows, one of ranks
PLACES = ("training", "scoring", "event", "checkpoint write")
HOOKS = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
SCORING = {"channels": "_score_all", "weights": "scores", "ranks": "_project"}
CONTROL = "none"  # instead of a method's name


class Net(pl.LightningModule):
    """A residual network for 1 x 6 x 6 images, with a scheduler that steps with each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 8)
        self.fc = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        every_step = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, STEPS)
        return [optimizer], [{"scheduler": every_step, "interval": "step"}]


class EpochOrder:
    """An order that depends on the epoch alone."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(BATCH * BATCHES, generator=generator).tolist())


class Resumable:
    """A loader that knows which batch of its epoch comes next."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.sampler, self.offset = data, EpochOrder(), 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        order = list(self.sampler)
        for number in range(self.offset, BATCHES):
            self.offset = (number + 1) % BATCHES
            yield self.data[order[BATCH * number : BATCH * (number + 1)]]

    def state_dict(self) -> dict[str, int]:
        return {"offset": self.offset}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.offset = state["offset"]


class Rows(Logger):
    """Keeps what is logged; seconds are no result."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {key: float(value) for key, value in metrics.items() if not key.startswith("prune/seconds")}
        self.rows.append({"step": float(step or 0), **row})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """None are needed."""


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    Args:
        place: one of `PLACES`.
        every: steps between checkpoints; 0 for the end of each epoch, over a plain loader.
        at: the optimizer step, the number of the event, or the number of the write.
        part: how much of the event, or of the file, is done, in [0, 1].
        hook: of `HOOKS`, where ``place`` is "training".
        ahead: whether that hook runs ahead of the method's.
    """

    place: str
    every: int
    at: int
    part: float = 0.0
    hook: str = HOOKS[-1]
    ahead: bool = False


def die() -> None:
    """End this process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillInTraining(Callback):
    """Dies in a hook of the batch that makes so many steps whole."""

    def __init__(self, moment: Moment) -> None:
        self.step = moment.at
        setattr(self, moment.hook, self._maybe)
        self.done = moment.hook == "on_train_batch_end"

    def _maybe(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step + (not self.done) == self.step:
            die()


class TearingIO(TorchCheckpointIO):
    """Dies in the so-many-th write, which goes straight over the file, as on a file system that cannot rename."""

    def __init__(self, moment: Moment) -> None:
        self.left, self.part = moment.at, moment.part

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.left -= 1
        if self.left:
            return super().save_checkpoint(checkpoint, path, storage_options)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        whole = buffer.getvalue()
        Path(path).write_bytes(whole[: int(self.part * len(whole))])
        return die()


class Calls:
    """Counts calls of Python functions in each event, and in its scoring; dies at one of them if asked.

    Attributes:
        seen: "event" or "scoring" -> for each of them the step, and how many calls there were.
    """

    def __init__(self, pruner: Pruner, moment: Moment | None, counted: Mapping[str, Sequence[int]]) -> None:
        self.seen: dict[str, list[list[int]]] = {"event": [], "scoring": []}
        self.pruner, self.moment, self.counted = pruner, moment, counted
        for place, name in (("event", "_decide_and_apply"), ("scoring", SCORING[pruner.kind])):
            setattr(pruner, name, self._watched(place, getattr(pruner, name)))

    def _watched(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            calls, before = 0, sys.getprofile()
            mine = self.moment is not None and (self.moment.place, self.moment.at) == (place, len(self.seen[place]))
            last = int(self.moment.part * self.counted["calls"][0]) if mine and self.moment else -1

            def count(frame: Any, event: str, argument: Any) -> None:
                nonlocal calls
                calls += event == "call"
                if calls == last:
                    die()
                if before is not None:
                    before(frame, event, argument)

            sys.setprofile(count)
            try:
                found = function(*arguments, **named)
            finally:
                sys.setprofile(before)
            if mine:  # fewer calls than in the whole run
                die()
            self.seen[place].append([self.pruner.steps, calls])
            return found

        return watched


def make(method: str) -> list[Pruner]:
    """The method from a budget alone; none for the control."""
    if method == CONTROL:
        return []
    cls = discover()[method]
    return [cls(Budget(KEEP[cls.kind]))]


def run(
    folder: Path, method: str, moment: Moment, seed: int, kill: Any = None, ckpt_path: Any = None
) -> dict[str, Any]:
    """One fit, until its end or its death.

    Args:
        folder: of checkpoints.
        method: class name, or `CONTROL`.
        moment: says when checkpoints are written.
        seed: of the process.
        kill: counts of calls at the event that is to be killed, or ``{}``, to die at the moment; None to live.
        ckpt_path: as in ``fit``.

    Returns:
        All that has to be equal, and under "counted" the calls in each event.
    """
    pl.seed_everything(seed, verbose=False)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCH * BATCHES, 1, 6, 6, generator=generator)
    data = TensorDataset(images, torch.arange(BATCH * BATCHES) % 3)
    when: dict[str, Any] = {"every_n_train_steps": moment.every} if moment.every else {"every_n_epochs": 1}
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, save_last=True, **when)
    if not moment.every:
        saver._save_on_train_epoch_end = True
    pruners, model, logger = make(method), Net(), Rows()
    callbacks: list[Callback] = [*pruners, saver]
    dies = moment if kill is not None else None
    calls = Calls(pruners[0], dies, kill or {}) if pruners else None
    if dies is not None and dies.place == "training":
        callbacks.insert(0 if dies.ahead else len(pruners), KillInTraining(dies))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, logger=logger, log_every_n_steps=1,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        plugins=[TearingIO(dies)] if dies is not None and dies.place == "checkpoint write" else None,
    )  # fmt: skip
    loader = Resumable(data) if moment.every else DataLoader(data, BATCH)
    trainer.fit(model, loader, DataLoader(data, 12), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    states = [
        {key: value for key, value in pruner.state_dict().items() if key not in ("seconds", "rows")}
        for pruner in pruners
    ]
    return {
        "weights": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callback": states,
        "report": [_timeless(row) for pruner in pruners for row in pruner.report.rows],
        "rows": logger.rows,
        "counted": {} if calls is None else calls.seen,
    }


def _timeless(row: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "prune/seconds"}


def forked(function: Callable[..., dict[str, Any]], *arguments: Any, **named: Any) -> dict[str, Any] | None:
    """What a function returns in a child of this process; None if it was killed.

    Raises:
        RuntimeError: if the child failed, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                warnings.simplefilter("ignore")
                logging.disable(logging.CRITICAL)
                torch.set_num_threads(1)
                torch.save(function(*arguments, **named), answer)
            except BaseException:
                Path(folder, "error").write_text(traceback.format_exc())
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        if not answer.exists():
            raise RuntimeError(f"a run failed:\n{Path(folder, 'error').read_text()}")
        found: dict[str, Any] = torch.load(answer, weights_only=True)
        return found


def resume(folder: Path, method: str, moment: Moment) -> dict[str, Any]:
    """Go on from the last checkpoint; from the newest that is whole where that one is refused.

    Returns:
        What `run` does, and "refused": the torn file's name or "", "step": where it went on, "done": events by then.
    """
    refused, path = "", next(folder.glob("last*.ckpt"))
    if not _whole(path):
        try:
            run(folder, method, moment, 7, ckpt_path="last")
        except Exception as error:
            ours = isinstance(error, IncompatibleCheckpoint) and str(path) in str(error)
            refused = path.name if ours else f"without its name: {error}"
        else:
            refused = "not refused"
        path = max(filter(_whole, folder.glob("step=*.ckpt")), key=lambda file: file.stat().st_mtime_ns)
    saved = torch.load(path, weights_only=True)
    states = [state for key, state in saved["callbacks"].items() if key.startswith(f"{method}-")]
    found = run(folder, method, moment, 7, ckpt_path=path if refused else "last")
    return {**found, "refused": refused, "step": saved["global_step"], "done": states[0]["done"] if states else 0}


def _whole(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """Places where two results have different bits."""
    if type(first) is not type(second):
        yield f"{where}: {type(first).__name__} and {type(second).__name__}"
    elif isinstance(first, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype or not _same_bits(first, second):
            yield where
    elif isinstance(first, Mapping):
        for key in {**first, **second}:
            if key in first and key in second:
                yield from differences(first[key], second[key], f"{where}/{key}")
            else:
                yield f"{where}/{key} is missing"
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            yield f"{where}: {len(first)} and {len(second)} entries"
        for number, (a, b) in enumerate(zip(first, second, strict=False)):
            yield from differences(a, b, f"{where}/{number}")
    elif first != second and not (first != first and second != second):
        yield f"{where}: {first!r} and {second!r}"


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return first.contiguous().reshape(-1).view(torch.uint8).equal(second.contiguous().reshape(-1).view(torch.uint8))


def compare(whole: Mapping[str, Any], resumed: Mapping[str, Any]) -> list[str]:
    """Where a resumed run is not the whole one; of the rows, those that a whole run logs from that step on."""
    own = ("weights", "optimizers", "schedulers", "callback", "report")
    found = [each for key in own for each in differences(whole[key], resumed[key], key)]
    after = [row for row in whole["rows"] if row["step"] >= resumed["step"]]
    rows = resumed["rows"]
    if len(rows) < len(after):
        found.append(f"rows: {len(rows)} instead of {len(after)}")
    return found + list(differences(whole["rows"][len(whole["rows"]) - len(rows) :], rows, "rows"))


@cache
def whole_run(method: str, every: int) -> dict[str, Any]:
    """The run that nothing kills; how often it is saved changes nothing, and is the same for all here."""
    with tempfile.TemporaryDirectory() as folder:
        found = forked(run, Path(folder), method, Moment("training", every, 0), 0)
    assert found is not None
    return found


def killed(method: str, moment: Moment, counted: Mapping[str, Any]) -> dict[str, Any]:
    """Kill a run, let it go on, and return what `resume` does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if forked(run, folder, method, moment, 0, kill=counted) is not None:
            raise RuntimeError(f"{method} was to be killed: {moment}")
        found = forked(resume, folder, method, moment)
    assert found is not None
    return found


@cache
def control(every: int, step: int) -> str:
    """Whether a run without a method, killed as it trains and continued from the same step, ends as the whole one."""
    moment = Moment("training", every, step + 1, hook="on_train_batch_start")
    if step == STEPS:  # only a torn copy of the last checkpoint leaves that one to go on from
        moment = Moment("checkpoint write", every, 2 * (STEPS // (every or BATCHES)), 0.5)
    found = killed(CONTROL, moment, {})
    assert found["step"] == step, (found["step"], step)
    return "; ".join(compare(whole_run(CONTROL, bool(every)), found)) or "bitwise"


def draw(method: str, place: str, chance: random.Random) -> tuple[Moment, dict[str, Any]]:
    """A random moment at a place after the first checkpoint, and what is known of the calls there.

    A method that has no event after the first checkpoint is killed in training instead.
    """
    every = chance.choice((0, 1, 2, 3, 4, 5))
    first = every or BATCHES
    if place == "checkpoint write":  # each checkpoint is two files: the first two are left whole
        most = 2 * (STEPS // every if every else EPOCHS)
        return Moment(place, every, chance.randint(3, most), chance.random()), {}
    calls = whole_run(method, bool(every))["counted"].get(place, [])
    later = [number for number, (step, _) in enumerate(calls) if step > first]
    if later:
        number = chance.choice(later)
        return Moment(place, every, number, chance.random()), {"calls": [calls[number][1]]}
    step, hook, ahead = chance.randint(first + 1, STEPS), chance.choice(HOOKS), chance.random() < 0.5
    return Moment("training", every, step, hook=hook, ahead=ahead), {}


def one(method: str, number: int, seed: int) -> dict[str, Any]:
    """One row of the table: the so-many-th kill of a method."""
    chance = random.Random(f"{seed}/{method}/{number}")
    first = random.Random(f"{seed}/{method}").randrange(len(PLACES))
    moment, counted = draw(method, PLACES[(first + number) % len(PLACES)], chance)
    try:
        found = killed(method, moment, counted)
        differs = compare(whole_run(method, bool(moment.every)), found)
        if found["refused"].startswith(("without", "not")):
            differs.append(f"torn checkpoint {found['refused']}")
        known = control(moment.every, found["step"])
    except RuntimeError as error:
        found, differs, known = {}, [str(error).strip().splitlines()[-1]], ""
    return {
        "method": method,
        "kind": discover()[method].kind,
        "kill": number,
        "place": moment.place,
        "detail": moment.hook if moment.place == "training" else f"{moment.part:.2f} of it",
        "at": moment.at,
        "saved every": moment.every or "epoch",
        "resumed from step": found.get("step", ""),
        "events by then": found.get("done", ""),
        "torn file refused": found.get("refused", ""),
        "survived": not differs,
        "differs": json.dumps(differs[:5]) if differs else "",
        "control": known,
        "seed": seed,
        "torch": torch.__version__,
        "lightning": pl.__version__,
    }


def kills(
    methods: Sequence[str] | None = None,
    most: int = 10,
    least: int = 2,
    seed: int = 0,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Kill every method, or those named, and say what became of it.

    Args:
        methods: class names; default all there are.
        most: kills of one method of each kind, those in `MOST`.
        least: kills of the others.
        seed: of the moments.
        out: a CSV that rows are appended to, and read from if they are there.
        say: gets a line for each new row.

    Returns:
        One row a kill, those of earlier calls as the CSV says them.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if out is not None and out.exists():
        with out.open(newline="") as file:
            rows = [{**row, "survived": row["survived"] == "True"} for row in csv.DictReader(file)]
    known = {(row["method"], int(row["kill"]), int(row["seed"])) for row in rows}
    every = [name for name, cls in discover().items() if cls.kind in KEEP]
    for method in every if methods is None else methods:
        for number in range(most if method in MOST else least):
            if (method, number, seed) in known:
                continue
            row = one(method, number, seed)
            rows.append(row)
            if out is not None:
                is_new = not out.exists()
                with out.open("a", newline="") as file:
                    writer = csv.DictWriter(file, row.keys())
                    if is_new:
                        writer.writeheader()
                    writer.writerow(row)
            say(f"{method} {number}: {row['place']}, {'survived' if row['survived'] else row['differs']}")
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Kills survived of those tried per method, place by place; only those whose control resumes bitwise."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["control"] not in ("bitwise", ""):
            continue
        line = found.setdefault(row["method"], {"method": row["method"], "kind": row["kind"], "all": [0, 0]})
        for key in (row["place"], "all"):
            line.setdefault(key, [0, 0])
            line[key][0] += bool(row["survived"])
            line[key][1] += 1
    columns = ("method", "kind", *PLACES, "all")
    return [{key: _said(line.get(key, "")) for key in columns} for line in found.values()]


def _said(value: Any) -> str:
    return f"{value[0]} / {value[1]}" if isinstance(value, list) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--most", type=int, default=10)
    parser.add_argument("--least", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reliability_kills.csv")
    options = parser.parse_args()
    rows = kills(options.methods, options.most, options.least, options.seed, options.out)
    for line in table(rows):
        print(line)


if __name__ == "__main__":
    main()
