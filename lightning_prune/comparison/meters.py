"""What a run costs: flops of training and of pruning, memory of scoring; and which epoch was its best."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from lightning_prune.batches import samples_in
from lightning_prune.pruner import Pruner

PASSES = 3  # a training step is counted as three forward passes: forward, and gradients of activations and of weights


class TrainingMeter(pl.Callback):
    """Counts samples and flops of training, batch by batch at the cost the network has then; notes each validation.

    It goes behind the method in the list of callbacks. It also makes the order of data, and the noise in the network,
    one of seed and epoch alone: a method that draws numbers, or a network with fewer channels to drop out, changes
    nothing about the batches of the next epoch.

    Args:
        flops: of one forward of the network at the fit's start.
        seed: of the data order.
        pruner: the method, which knows what the network costs now.

    Attributes:
        flops: of all steps so far, as executed: zeros under masks cost what they cost, and ranks are whole until the
            fit ends.
        flops_sparse: the same, if zeros were free.
        samples: trained on, counted each time.
        validations: (epoch, metrics, whether the method had done its last event).
    """

    def __init__(self, flops: int, seed: int, pruner: Pruner | None = None) -> None:
        self.flops = 0.0
        self.flops_sparse = 0.0
        self.samples = 0
        self.validations: list[tuple[int, dict[str, float], bool]] = []
        self._now = self._now_sparse = float(flops)
        self._seed, self._pruner, self._events = seed, pruner, -1

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.manual_seed(self._seed * 1_000_003 + trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.manual_seed(self._seed * 1_000_003 + trainer.current_epoch + 1)  # some loaders begin before the hook

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._look()
        samples = samples_in(batch)
        self.samples += samples
        self.flops += PASSES * samples * self._now
        self.flops_sparse += PASSES * samples * self._now_sparse

    def _look(self) -> None:
        """What the network costs now, where an event has changed it."""
        if self._pruner is None or self._pruner.events_done == self._events:
            return
        self._events = self._pruner.events_done
        if self._events and self._pruner.kind != "ranks":
            row: Any = self._pruner.report.rows[-1]
            self._now, self._now_sparse = row["prune/flops"], row["prune/flops_sparse"]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        done = self._pruner is None or self._pruner.events_done == len(self._pruner.events)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.validations.append((trainer.current_epoch, metrics, done))

    def best(self, metric: str) -> tuple[float, int] | None:
        """The best validation of a test metric's namesake, and its epoch, among those after the last event.

        Args:
            metric: as the test calls it; the namesake has "val" for "test", or is the only one with "acc" in its name.
        """
        found = []
        for epoch, metrics, done in self.validations:
            name = metric.replace("test", "val", 1)
            others = [key for key in metrics if "acc" in key and "train" not in key]
            if name not in metrics and len(others) == 1:
                name = others[0]
            if done and name in metrics:
                found.append((metrics[name], epoch))
        return max(found, key=lambda one: (one[0], -one[1]), default=None)


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiply-accumulates of whatever is computed, backward passes included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not (isinstance(out, Tensor) and out.is_meta):
            self.flops += formula(*args, **kwargs, out_val=out) // 2  # torch counts multiply and add
        return out


class ScoringMeter:
    """What the events of a method cost, whatever they do: score, choose, cut and prove.

    Attributes:
        flops: multiply-accumulates of matrix products and convolutions in the events, backward passes included.
        peak_bytes: the most memory that an event took over what was there before it; None where it cannot be told.
            On CUDA torch's allocator says it, on Linux the resident set of the process.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.peak_bytes: int | None = None

    def watch(self, pruner: Pruner) -> None:
        """Measure the events of a method from now on."""
        for name in ("_decide_and_apply", "initialise"):
            setattr(pruner, name, self._measured(getattr(pruner, name)))

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self._memory(), _Counted() as counted:
                try:
                    return function(*args, **kwargs)
                finally:
                    self.flops += counted.flops

        return measured

    @contextmanager
    def _memory(self) -> Iterator[None]:
        before = _begin()
        try:
            yield
        finally:
            after = _peak()
            if before is not None and after is not None:
                self.peak_bytes = max(self.peak_bytes or 0, after - before)


def _begin() -> int | None:
    """Forget the peak of before; bytes in use now."""
    gc.collect()  # else what an event lets go of garbage hides what it takes
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)  # else memory that is free, but was not handed back, is taken again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set begins anew
    except OSError:
        return None
    return _status("VmRSS")


def _peak() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if sys.platform.startswith("linux") else None


def _status(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return None
