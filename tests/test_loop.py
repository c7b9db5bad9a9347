"""How many optimizer steps a fit has, held against those that come."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.loop import expected_steps, forget_compiled


class Counts(Callback):
    """What is expected at the start, and the batches with gradients after which an optimizer stepped."""

    def __init__(self):
        self.steps, self.stepped = [], False

    def on_train_start(self, trainer, model):
        self.expected = expected_steps(trainer)

    def on_before_optimizer_step(self, trainer, model, optimizer):
        self.stepped = any(p.grad is not None for p in model.parameters())

    def on_train_batch_end(self, trainer, *_):
        if self.stepped:
            self.steps.append(trainer.current_epoch)
        self.stepped = False


FITS = {  # settings of a fit of 5 batches an epoch, steps of each of its epochs
    "plain": ({"max_epochs": 2}, [5, 5]),
    "accumulation": ({"max_epochs": 2, "accumulate_grad_batches": 2}, [3, 3]),
    "limit_train_batches": ({"max_epochs": 2, "limit_train_batches": 3}, [3, 3]),
    "overfit_batches": ({"max_epochs": 2, "overfit_batches": 2}, [2, 2]),
    "fast_dev_run": ({"fast_dev_run": 4}, [4]),
    "max_steps": ({"max_epochs": 9, "max_steps": 7}, [5, 2]),
    "max_steps alone": ({"max_epochs": -1, "max_steps": 7}, [5, 2]),
    "max_steps that do not bound": ({"max_epochs": 2, "max_steps": 99}, [5, 5]),
}
CHANGING = {
    "it ends while it changes": ({0: 2, 1: 1, 4: 5}, 3, [3, 5, 5]),
    "it goes on after the last change": ({1: 2, 2: 5}, 5, [5, 3, 1, 1, 1]),
}


def check(callback, epochs):
    assert [callback.steps.count(n) for n in range(len(epochs))] == epochs
    assert sum(epochs) == len(callback.steps) == callback.expected[0]


@pytest.mark.parametrize(("settings", "epochs"), FITS.values(), ids=FITS)
def test_as_many_steps_come_as_were_expected(fit, make_loader, settings, epochs):
    counts = Counts()
    fit(counts, loader=make_loader(40), **settings)
    check(counts, epochs)
    assert counts.expected[1] == epochs[0]


@pytest.mark.parametrize(("factors", "max_epochs", "epochs"), CHANGING.values(), ids=CHANGING)
def test_accumulation_may_change_from_epoch_to_epoch(fit, make_loader, factors, max_epochs, epochs):
    counts = Counts()
    fit([GradientAccumulationScheduler(factors), counts], loader=make_loader(40), max_epochs=max_epochs)
    check(counts, epochs)
    assert counts.expected[1] is None


@pytest.mark.parametrize("limit", [{}, {"max_steps": 12}], ids=["epochs", "max_steps"])
def test_epoch_that_renews_norms_for_an_average_has_no_steps(fit, make_loader, limit):
    counts = Counts()
    fit([StochasticWeightAveraging(0.01, swa_epoch_start=1), counts], loader=make_loader(40), max_epochs=3, **limit)
    check(counts, [5, 5, limit.get("max_steps", 15) - 10])


class Alternating(pl.LightningModule):
    """Two optimizers that both step after each batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(64, 4), nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.second(self.first(batch[0].flatten(1))), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]


def test_max_steps_counts_each_of_several_optimizers(fit, make_loader):
    counts = Counts()
    fit(counts, model=Alternating(), loader=make_loader(40), max_epochs=-1, max_steps=14)
    check(counts, [5, 2])


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((torch.zeros(1, 8, 8), label % 3) for label in range(16))


@pytest.mark.parametrize(("max_steps", "steps"), [(-1, None), (3, 3)])
def test_data_without_a_length_have_as_many_steps_as_max_steps(fit, max_steps, steps):
    counts = Counts()
    fit(counts, loader=DataLoader(Stream(), 4), max_epochs=1, max_steps=max_steps)
    assert counts.expected == (steps, None)


def test_fit_without_an_end_has_epochs_of_known_length(fit, make_loader):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    counts = Counts()
    fit([counts, Stop()], loader=make_loader(40), max_epochs=-1, accumulate_grad_batches=2)
    assert counts.expected == (None, math.ceil(5 / 2))


@pytest.mark.parametrize("how", ["wrapped", "in place", "function", "not"])
def test_only_a_model_with_compiled_parts_makes_the_compiler_forget(monkeypatch, how):
    inner = nn.Linear(2, 2)
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(how))
    if how == "wrapped":
        inner = torch.compile(inner, backend="eager")
    elif how == "in place":
        inner.compile(backend="eager")
    elif how == "function":
        inner.forward = torch.compile(inner.forward, backend="eager")
    forget_compiled(nn.Sequential(inner))
    assert resets == ([how] if how != "not" else [])
