"""Bad inputs tried and what came out: numbers that are none, and files from strangers.

    python -m benchmarks.reliability_faults [--mutants 2000] [--seed 0] [--methods TaylorWeight ...]
        [--out benchmarks/results/reliability_faults.csv]

Numbers: a residual network of a few hundred weights trains for 3 epochs of 4 steps with one method built from a budget
alone, once for each method and each fault; "raise" and "postpone" are ``on_nonfinite``. What came out is one of

    met        the fit ended, the budget is met, and plan, log and state hold finite numbers only
    said       the fit ended, the budget is not met, a warning says so, and nothing was pruned
    refused    an error of ours, before anything was pruned
    LOST       anything else

Files: a sound plan, checkpoint or callback state with one to three changes. Each ends as

    taken      read; what is wrong with it, if anything, cannot be seen, or the cut itself is proved or refused later
    refused    an error of ours, with values, shapes and attributes of the model as before
    LOST       another error, or a model that has changed

A row holds how many cases there were, and how many ended in each way; "LOST" names the first.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import logging
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mutants import mutants, torn
from lightning_prune import Budget, Plan, conform, cut, load_pruned, trace
from lightning_prune.checkpoint import KEY, take_shapes
from lightning_prune.errors import PruneError
from lightning_prune.methods import discover
from lightning_prune.pruner import Pruner

KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}
METHODS = {name: cls for name, cls in discover().items() if cls.kind != "control"}
OURS = (PruneError, ValueError)
Case = tuple[Any, str]


class Net(pl.LightningModule):
    """A residual network for 1 x 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 12, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 12)
        self.fc = nn.Linear(12, 3)
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        out: Tensor = self.fc(F.relu(self.hidden(x.mean((2, 3)))))
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Fault(Callback):
    """Puts a bad value into weights, gradients or inputs at some batches."""

    def __init__(self, where: str, bad: float, batches: Iterable[int]) -> None:
        self.where, self.bad, self.batches = where, bad, set(batches)
        self.seen = -1

    def on_train_batch_start(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen in self.batches and self.where == "inputs":
            batch[0][0, 0, 0, 0] = self.bad
        if self.seen in self.batches and self.where == "weights":
            model.conv1.weight.data[0, 0, 0, 0] = self.bad  # type: ignore[index,union-attr,operator]

    def on_after_backward(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        if self.seen in self.batches and self.where == "gradients":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = self.bad


FAULTS: Mapping[str, tuple[str, float, Iterable[int]]] = {
    "a weight is NaN": ("weights", math.nan, [1]),
    "a weight is infinite": ("weights", math.inf, [1]),
    "gradients of a batch are NaN, and stepped on": ("gradients", math.nan, [1]),
    "gradients of all batches are infinite, and stepped on": ("gradients", math.inf, range(100)),
    "inputs of a batch are NaN, and so is its loss": ("inputs", math.nan, [1]),
}


def outcome(method: type[Pruner], fault: tuple[str, float, Iterable[int]], on_nonfinite: str) -> str:
    """What came out of one fit with one fault."""
    pl.seed_everything(0, verbose=False)
    callback = method(Budget(KEEP[method.kind]), on_nonfinite=on_nonfinite)  # type: ignore[arg-type]
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(32) % 3), 8)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    error: PruneError | None = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {**quiet, "accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
        trainer = pl.Trainer(max_epochs=3, callbacks=[Fault(*fault), callback], **settings)
        try:
            trainer.fit(Net(), loader)
        except PruneError as raised:
            error = raised
        except Exception as raised:  # a table of what came out says it, too
            return f"LOST: {type(raised).__name__}: {raised}"
    return _judged(callback, error, [str(each.message) for each in caught])


def _judged(callback: Pruner, error: PruneError | None, said: Sequence[str]) -> str:
    rows = () if callback.dense_cost is None else callback.report.rows
    if any(not math.isfinite(value) for row in rows for value in row.values()):
        return "LOST: a row is not finite"
    if error is not None:
        return "refused"
    key = "prune/density" if callback.kind == "weights" else "prune/flops_kept"
    if rows and callback.events_done == len(callback.events) and 0 < rows[-1][key] <= KEEP[callback.kind]:
        return "met"
    told = any("training ended" in text or "budget is not met" in text for text in said)
    return "said" if told else "LOST: nobody said that the budget is not met"


def numbers(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each method, fault and way to take it."""
    for name in names:
        for fault, made in FAULTS.items():
            for on_nonfinite in ("raise", "postpone"):
                out = outcome(METHODS[name], made, on_nonfinite)
                yield _row(f"{name}, {on_nonfinite}", fault, Counter([out.partition(":")[0]]), out)


def _row(subject: str, fault: str, ends: Counter[str], lost: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {"subject": subject, "fault": fault, "cases": sum(ends.values())}
    row |= {end: ends[end] for end in ("met", "said", "taken", "refused", "LOST")}
    return row | {"what was lost": lost if ends["LOST"] else ""}


def condition(model: nn.Module) -> Any:
    """All that a load could have changed."""
    values = {name: (tuple(t.shape), t.double().sum().item()) for name, t in model.state_dict().items()}
    kinds = (int, float, str, tuple)
    plain = {n: {k: v for k, v in vars(m).items() if isinstance(v, kinds)} for n, m in model.named_modules()}
    return values, plain


def ends(cases: Iterable[Case], act: Callable[[Any, nn.Module], object], model: nn.Module) -> tuple[Counter[str], str]:
    """How the cases ended, and the first that was lost."""
    counts: Counter[str] = Counter()
    first = ""
    before = condition(model)
    for case, how in cases:
        again = copy.deepcopy(model)
        try:
            act(case, again)
            end = "taken"
        except OURS as error:
            end = "refused" if condition(again) == before else f"LOST: after {how} the model has changed: {error}"
        except Exception as error:
            end = f"LOST: after {how}: {type(error).__name__}: {error}"
        counts[end.partition(":")[0]] += 1
        first = first or (end if end.startswith("LOST") else "")
    return counts, first[:300]


def sound_plans(net: nn.Module) -> dict[str, Plan]:
    """A plan of each kind."""
    graph = trace(net, torch.zeros(2, 1, 8, 8))
    keep = {group.name: torch.arange(group.size) % 3 > 0 for group in graph.groups}
    mask = Plan(masks={"hidden.weight": torch.arange(72).reshape(12, 6) % 3 > 0}, shapes={"hidden.weight": (12, 6)})
    return {"channels": graph.plan(keep), "masks": mask, "ranks": Plan(ranks={"conv2": 2, "hidden": 3})}


def _use(plan: Plan, model: nn.Module) -> None:
    if plan.ranks:
        conform(model, plan)
    else:
        cut(model, plan, example_inputs=torch.zeros(2, 1, 8, 8))


def _from_json(tree: Any, model: nn.Module) -> None:
    try:
        text = json.dumps(tree)
    except (TypeError, ValueError) as error:
        raise ValueError("no JSON can say it") from error
    _use(Plan.from_dict(json.loads(text)), model)


def files(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each kind of file: of plans and checkpoints."""
    torch.manual_seed(seed)
    net = Net()
    plans = sound_plans(net)
    for kind, plan in plans.items():
        cases: Iterator[Case] = mutants(plan.to_dict(), count, seed, tensors=False)
        yield _row(f"plan of {kind}, JSON", "changed entries", *ends(cases, _from_json, net))
        cases = mutants(plan.state_dict(), count, seed)
        act = lambda tree, model: _use(Plan.from_state_dict(tree), model)  # noqa: E731
        yield _row(f"plan of {kind}, state dict", "changed entries", *ends(cases, act, net))
    smaller = copy.deepcopy(net)
    cut(smaller, plans["channels"], example_inputs=net.example_input_array)
    sound = {"state_dict": dict(smaller.state_dict())}
    entry = {KEY: {"version": 1, "plans": {"a": plans["channels"].state_dict()}}}
    for name, tree in (("with its plan", {**sound, **entry}), ("without a plan", sound)):
        shapes = lambda changed, model: take_shapes(model, changed)  # noqa: E731
        yield _row(f"checkpoint {name}", "changed entries", *ends(mutants(tree, count, seed), shapes, net))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.ckpt"
        buffer = io.BytesIO()
        torch.save({**sound, **entry, "pytorch-lightning_version": pl.__version__}, buffer)

        def load(data: bytes, model: nn.Module) -> None:
            path.write_bytes(data)
            load_pruned(Net, path)

        yield _row("checkpoint file", "changed bytes", *ends(torn(buffer.getvalue(), count // 4, seed), load, net))


def main() -> None:
    """Make the table, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reliability_faults.csv"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = [*files(options.mutants, options.seed), *numbers(options.methods)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind of file, and one a fault, over all methods."""
    summed: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        subject, _, taken = str(row["subject"]).partition(", ")
        who = f"all methods, {taken}" if subject in METHODS else str(row["subject"])
        into = summed.setdefault((who, str(row["fault"])), {"bad input": f"{row['fault']}", "of": who})
        for key in ("cases", "met", "said", "taken", "refused", "LOST"):
            into[key] = int(into.get(key, 0)) + int(row[key])
    return list(summed.values())


if __name__ == "__main__":
    main()
