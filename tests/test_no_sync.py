"""Between events nothing of ours makes the host wait for the device, nor does its work grow with the parameters.

A GPU runs behind: a step that reads a value, or makes a tensor whose size depends on values, waits until the GPU has
caught up. So does one that copies values of the host to the device. A CPU does not show it, but the calls can be seen.
"""

import sys
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_prune
from lightning_prune import Budget, OneShot
from lightning_prune.methods import discover

METHODS = {name: cls for name, cls in discover().items() if cls.kind != "control"}
HOME = str(Path(lightning_prune.__file__).parent)
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "equal", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "_linalg_check_errors",
}  # fmt: skip
"""Operators whose result the host reads (float, bool and item all come down to the first), or sizes a tensor by."""
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def where() -> str:
    """The innermost line of the package that is running; nothing outside of it."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(HOME):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}"


class Seen(TorchDispatchMode):
    """Counts operators that are called by the package, and those that make the host wait."""

    def __init__(self):
        super().__init__()
        self.calls, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if line := where():
            name = func.overloadpacket.__name__
            self.calls[name] += 1
            by_mask = name in MASKED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            if name in WAITING or by_mask:
                self.waits[f"{name} in {line}"] += 1
        return func(*args, **(kwargs or {}))


class Watched:
    """A callback at each end of the list, which look at what a training step calls in between, if it has no event."""

    def __init__(self, callback, monkeypatch):
        self.callback, self.steps = callback, []
        self.all = [_First(self), callback, _Last(self)]
        for name in ("tolist", "numpy", "cpu"):
            self._patch(monkeypatch, Tensor, name, lambda args, kwargs: True)
        self._patch(monkeypatch, Tensor, "to", lambda args, kwargs: "cpu" in (*args, *kwargs.values()))
        for name in ("tensor", "as_tensor"):  # what is on the host is copied, unless it is to stay there
            self._patch(monkeypatch, torch, name, lambda args, kwargs: kwargs.get("device") is not None)
        self.now = None

    def _patch(self, monkeypatch, owner, name, counts):
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            if self.now is not None and counts(args, kwargs) and (line := where()):
                self.now.waits[f"{name} in {line}"] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, patched)

    @property
    def waits(self):
        return sum((seen.waits for seen in self.steps), Counter())


class _First(Callback):
    def __init__(self, watched):
        self.watched = watched

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.watched.done = self.watched.callback.events_done
        self.watched.now = Seen()
        self.watched.now.__enter__()


class _Last(Callback):
    def __init__(self, watched):
        self.watched = watched

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        watched, seen = self.watched, self.watched.now
        seen.__exit__(None, None, None)
        watched.now = None
        if watched.done == watched.callback.events_done:
            watched.steps.append(seen)

    def on_exception(self, trainer, model, exception):
        if self.watched.now is not None:
            self.watched.now.__exit__(None, None, None)
            self.watched.now = None


KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}
FEWER = {"Spectral": {"schedule": OneShot(0.6)}}  # its events run for seconds where each operator is looked at
CASES = {name: (cls, FEWER.get(name, {})) for name, cls in METHODS.items()} | {
    f"{name} {' '.join(map(str, settings.values()))}": (METHODS[name], settings)
    for name, settings in (
        ("NetworkSlimming", {"apply": "mask"}),
        ("RigL", {"grow": "random"}),
        ("SparseConnectivityLearning", {"at_budget": "freeze", "granularity": "kernel"}),
        ("TaylorWeight", {"on": "weight"}),
    )
}
BY_DESIGN = {
    "LotteryTicket": {"_copied", "_random_states"},  # the weights it goes back to are copied to the host, once a fit
    "TaylorActivation": {"_in_order"},  # indices of the graph are the host's own
    "TaylorWeight": {"_is_range"},
}
"""Functions that may ask for values: the reason why this does not hold up every step."""


@pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing")
@pytest.mark.filterwarnings("ignore:Hierarchical. the (budget|redundancy)")
@pytest.mark.filterwarnings("ignore:on='weight' scores")
@pytest.mark.parametrize(("method", "settings"), CASES.values(), ids=CASES)
def test_no_step_between_events_waits_for_the_device(method, settings, fit, make_loader, monkeypatch):
    watched = Watched(method(Budget(KEEP[method.kind]), **settings), monkeypatch)
    fit(watched.all, loader=make_loader(24, 4), max_epochs=3)
    assert watched.callback.events_done == len(watched.callback.events) > 0
    assert len(watched.steps) > 2
    allowed = BY_DESIGN.get(method.__name__, ())
    assert {wait: n for wait, n in watched.waits.items() if wait.split()[-1] not in allowed} == {}


def test_the_weights_to_go_back_to_are_copied_once(fit, make_loader, monkeypatch):
    watched = Watched(METHODS["LotteryTicket"](Budget(0.2)), monkeypatch)
    fit(watched.all, loader=make_loader(24, 4), max_epochs=3)
    assert sum(bool(seen.waits) for seen in watched.steps) == 1


def test_steps_that_wait_are_seen(fit, monkeypatch):
    """Each way to wait, from a hook of ours."""

    class Waits(METHODS["Magnitude"]):
        def after_step(self):
            vector = torch.arange(3.0)
            every = (
                vector[0].item, vector.tolist, vector.cpu, lambda: vector.to("cpu"), vector.numpy, vector.nonzero,
                vector.unique, lambda: bool(vector[1] > 0), lambda: float(vector[0]), lambda: vector[vector > 1],
                lambda: vector.masked_select(vector > 1), lambda: torch.equal(vector, vector),
                lambda: torch.tensor(1.0, device=vector.device), lambda: int(vector[0]),
            )  # fmt: skip
            every[self.steps % len(every)]()

    monkeypatch.setattr(sys.modules[__name__], "HOME", str(Path(__file__).parent))
    watched = Watched(Waits(0.5, schedule=OneShot(0, unit="step")), monkeypatch)
    fit(watched.all, max_epochs=4)
    assert [len(seen.waits) for seen in watched.steps] == [1] * 16


class Deep(pl.LightningModule):
    """As many hidden layers as wanted."""

    def __init__(self, depth):
        super().__init__()
        hidden = [part for _ in range(depth) for part in (nn.Linear(8, 8), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *hidden, nn.Linear(8, 3))
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def forward(self, x):
        return self.layers(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("name", ["Magnitude", "RigL", "RandomWeights", "SNIP"])
def test_masks_take_two_operations_a_step_however_many_layers_there_are(name, fit, make_loader, monkeypatch):
    def calls(depth):
        watched = Watched(METHODS[name](Budget(0.2)), monkeypatch)
        fit(watched.all, model=Deep(depth), loader=make_loader(24, 4), max_epochs=3)
        return watched.steps[-1].calls  # the last of the fit, with all masks in place

    # gradients of what is off, and after the step the weights: each all layers at once
    assert calls(2) == calls(8) == {"_foreach_mul_": 2}


def test_channels_held_at_zero_take_two_operations_a_step_however_many_layers_there_are(fit, monkeypatch):
    def calls(depth):
        watched = Watched(METHODS["L1Filter"](Budget(0.5), apply="mask"), monkeypatch)
        fit(watched.all, model=Deep(depth), max_epochs=3)
        return watched.steps[-1].calls

    assert calls(2) == calls(8) == {"_foreach_mul_": 2}
