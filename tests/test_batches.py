import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.batches import example_from_batch, quiet_loss, second_iterator, without_log
from lightning_prune.errors import TraceError


class Numbers(TensorDataset):
    """0, 1, 2, ... so that a batch says which samples it has."""

    def __init__(self, size=20):
        super().__init__(torch.arange(float(size)))


class Attached:
    """A trainer with this train loader, as a callback sees it."""

    def __new__(cls, make_trainer, loader, model=None):
        trainer = make_trainer(max_epochs=1)
        model = Plain() if model is None else model
        found = []

        class Look(pl.Callback):
            def on_train_start(self, trainer, module):
                found.append((trainer, module))
                raise KeyboardInterrupt  # from here on the test holds it

        trainer.callbacks.append(Look())
        with pytest.raises(SystemExit):
            trainer.fit(model, loader)
        return found[0]


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 2)

    def training_step(self, batch, batch_idx):
        return self.fc(batch[0][:, None]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def samples(batches):
    return [batch[0].tolist() for batch in batches]


def test_gives_batches_until_there_are_enough_samples(make_trainer):
    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8))
    batches = samples(second_iterator(trainer, model, None, 10, seed=0))
    assert [len(batch) for batch in batches] == [8, 8]
    assert len({x for batch in batches for x in batch}) == 16
    everything = samples(second_iterator(trainer, model, None, 1000, seed=0))
    assert sorted(x for batch in everything for x in batch) == list(range(20))


def test_order_depends_on_the_seed_alone(make_trainer):
    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8, shuffle=True))
    first = samples(second_iterator(trainer, model, None, 20, seed=1))
    torch.rand(7)
    assert samples(second_iterator(trainer, model, None, 20, seed=1)) == first
    assert samples(second_iterator(trainer, model, None, 20, seed=2)) != first


@pytest.mark.parametrize("stop", [1, 100], ids=["left early", "to the end"])
def test_random_state_is_as_before(make_trainer, stop):
    class Augmented(Numbers):
        def __getitem__(self, i):
            return (super().__getitem__(i)[0] + torch.rand(()) + np.random.rand() + random.random(),)

    trainer, model = Attached(make_trainer, DataLoader(Augmented(), 4, shuffle=True))
    before = states()
    kept = second_iterator(trainer, model, None, 100, seed=0)
    for _, _ in zip(kept, range(stop), strict=False):
        assert states() == before  # between two batches as well
    assert states() == before


def test_augmentation_is_the_same_twice(make_trainer):
    class Augmented(Numbers):
        def __getitem__(self, i):
            return (super().__getitem__(i)[0] + torch.rand(()),)

    trainer, model = Attached(make_trainer, DataLoader(Augmented(), 4))
    first = samples(second_iterator(trainer, model, None, 20, seed=3))
    torch.rand(7)
    assert samples(second_iterator(trainer, model, None, 20, seed=3)) == first
    assert first[0][0] % 1 != first[1][0] % 1


def test_sampler_of_the_training_loader_is_not_asked(make_trainer):
    class Counting(SequentialSampler):
        asked = 0

        def __iter__(self):
            Counting.asked += 1
            return super().__iter__()

    data = Numbers()
    trainer, model = Attached(make_trainer, DataLoader(data, 8, sampler=Counting(data)))
    Counting.asked = 0
    assert len(samples(second_iterator(trainer, model, None, 20, seed=0))) == 3
    assert Counting.asked == 0


def test_batch_sampler_and_collate_function_are_kept(make_trainer):
    data = Numbers()
    loader = DataLoader(
        data,
        batch_sampler=BatchSampler(SequentialSampler(data), 5, drop_last=False),
        collate_fn=lambda items: [torch.stack([item[0] + 100 for item in items])],
    )
    trainer, model = Attached(make_trainer, loader)
    batches = samples(second_iterator(trainer, model, None, 10, seed=0))
    assert [len(batch) for batch in batches] == [5, 5]
    assert min(min(batch) for batch in batches) >= 100


def test_iterable_data_is_iterated_again(make_trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.tensor(float(i)),) for i in range(6)])

    trainer, model = Attached(make_trainer, DataLoader(Stream(), 2))
    assert samples(second_iterator(trainer, model, None, 4, seed=0)) == [[0, 1], [2, 3]]


def test_several_training_loaders_are_combined(make_trainer):
    class Two(Plain):
        def training_step(self, batch, batch_idx):
            return self.fc(batch["a"][0][:, None]).sum() + self.fc(batch["b"][0][:, None]).sum()

    loaders = {"a": DataLoader(Numbers(), 8), "b": DataLoader(Numbers(), 4)}
    trainer, model = Attached(make_trainer, loaders, Two())
    batch = next(second_iterator(trainer, model, None, 1, seed=0))
    assert {name: len(part[0]) for name, part in batch.items()} == {"a": 8, "b": 4}


def test_offset_of_a_loader_with_a_state_stays(make_trainer):
    class Resumable:
        offset = 0

        def __iter__(self):
            for i in range(3):
                self.offset = i + 1
                yield [torch.full((4,), float(i))]

        def __len__(self):
            return 3

    loader = Resumable()
    trainer, model = Attached(make_trainer, loader)
    loader.offset = 0
    assert len(samples(second_iterator(trainer, model, None, 8, seed=0))) == 2
    assert loader.offset == 0


def test_own_loader_or_number_of_samples_is_used(make_trainer):
    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8))
    own = DataLoader(TensorDataset(torch.full((6,), -1.0)), 3)
    assert samples(second_iterator(trainer, model, own, 4, seed=0)) == [[-1.0] * 3, [-1.0] * 3]
    assert len(samples(second_iterator(trainer, model, 17, 1, seed=0))) == 3


def test_batches_go_through_the_hooks_of_the_module(make_trainer):
    class Hooked(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1000]

    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8), Hooked())
    assert min(samples(second_iterator(trainer, model, None, 8, seed=0))[0]) >= 1000


def test_batches_go_through_the_hook_before_the_transfer_too(make_trainer):
    class Hooked(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1]

    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 20), Hooked())
    (got,) = samples(second_iterator(trainer, model, None, 20, seed=0))
    assert sorted(got) == [2 * i + 1 for i in range(20)]


class Noisy(Plain):
    """Makes a tensor of its own, whose type is the default one."""

    def training_step(self, batch, batch_idx):
        return self.fc(batch[0][:, None] + torch.zeros(len(batch[0]), 1)).sum()


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_batches_and_loss_have_the_precision_of_the_fit(make_trainer, precision, dtype):
    trainer = make_trainer(max_epochs=1, precision=precision)
    trainer, model = Attached(lambda **_: trainer, DataLoader(Numbers(), 8), Noisy())
    batch = next(second_iterator(trainer, model, None, 1, seed=0))
    assert batch[0].dtype == dtype
    assert quiet_loss(model, batch, None).dtype == dtype
    ((_, (seen,), _),) = example_from_batch(trainer, model, None, seed=0).calls
    assert seen.dtype == dtype
    assert torch.get_default_dtype() == torch.float32


def test_loss_and_example_of_a_mixed_precision_fit_are_not_cast(make_trainer):
    trainer = make_trainer(max_epochs=1, precision="bf16-mixed")
    trainer, model = Attached(lambda **_: trainer, DataLoader(Numbers(), 8), Parts())
    batch = next(second_iterator(trainer, model, None, 1, seed=0))
    assert quiet_loss(model, batch, None).dtype == torch.float32
    calls = example_from_batch(trainer, model, None, seed=0).calls
    assert [args[0].dtype for _, args, _ in calls] == [torch.float32] * 2


class Busy(pl.LightningModule):
    """A training step with everything in it that leaves a trace."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)
        self.accuracy = MulticlassAccuracy(3)
        self.logged = []

    def log(self, name, value, **settings):
        self.logged.append(name)

    def training_step(self, batch, batch_idx):
        out = self.fc(self.drop(self.norm(batch[0])))
        self.log("a", self.accuracy(out, batch[1]))
        self.log_dict({"b": 1.0})
        return F.cross_entropy(out, batch[1])


BATCH = (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)


def test_loss_leaves_no_trace():
    model = Busy()
    model.fc.eval()
    model.accuracy.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before, value, counted = states(), model.accuracy.compute(), model.accuracy.tp.tolist()
    loss = quiet_loss(model, BATCH, None)
    assert loss.requires_grad
    assert 0.1 < loss.item() < 5
    assert states() == before
    assert model.logged == []
    assert "log" not in model.__dict__
    assert model.accuracy.compute() == value
    assert model.accuracy.tp.tolist() == counted
    assert model.accuracy._update_count == 1
    assert [name for name in weights if not torch.equal(weights[name], model.state_dict()[name])] == []
    assert not model.fc.training
    assert model.norm.training


def test_loss_has_no_graph_where_gradients_are_off():
    with torch.no_grad():
        assert not quiet_loss(Busy(), BATCH, None).requires_grad


def test_loss_gives_the_gradients_of_the_training_step():
    model = nn.Sequential(nn.Linear(4, 3))
    module = Plain()
    module.net = model
    module.training_step = lambda batch, batch_idx: {"loss": F.cross_entropy(model(batch[0]), batch[1]), "other": 1}
    quiet_loss(module, BATCH, None).backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    assert torch.equal(got, model[0].weight.grad)


class TakesTheBatchOnly(Busy):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class NamesTheIndexDifferently(Busy):
    def training_step(self, batch, i, dataloader_idx=0):
        assert (i, dataloader_idx) == (0, 0)
        return super().training_step(batch, i)


class TakesWhateverComes(Busy):
    def training_step(self, *args, **settings):
        assert args[1:] == (0,)
        assert settings == {}
        return super().training_step(*args)


class TakesAnIterator(Busy):
    def training_step(self, dataloader_iter):
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


@pytest.mark.parametrize(
    "module",
    [TakesTheBatchOnly, NamesTheIndexDifferently, TakesWhateverComes, TakesAnIterator],
    ids=lambda c: c.__name__,
)
def test_step_gets_the_arguments_that_it_takes(module):
    torch.manual_seed(0)
    plain = Busy()
    model = module()
    model.load_state_dict(plain.state_dict())
    assert quiet_loss(model.eval(), BATCH, None).item() == quiet_loss(plain.eval(), BATCH, None).item()


def test_own_loss_function_is_used():
    loss = quiet_loss(Busy(), BATCH, lambda model, batch: model.fc(batch[0]).sum() * 0 + 7)
    assert loss.item() == 7


def test_manual_optimization_needs_a_loss_function():
    model = Busy()
    model.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"Busy optimizes manually.*pass loss_fn="):
        quiet_loss(model, BATCH, None)


@pytest.mark.parametrize("returned", [None, {"no": 1}, 3.0])
def test_step_that_returns_no_loss_is_refused(returned):
    model = Busy()
    model.training_step = lambda batch, batch_idx: returned
    with pytest.raises(RuntimeError, match=r"training_step of Busy returned .* no loss; pass loss_fn="):
        quiet_loss(model, BATCH, None)


def test_log_works_again_after_an_error():
    model = Busy()
    with pytest.raises(ZeroDivisionError), without_log(model):
        raise ZeroDivisionError
    model.log("a", 1.0)
    assert model.logged == ["a"]


def test_log_that_a_wrapper_put_on_the_module_comes_back():
    model = Busy()
    mine = model.__dict__["log"] = lambda *_: None
    with without_log(model):
        assert model.log is not mine
    assert model.log is mine


class Parts(Plain):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)
        del self.fc

    def training_step(self, batch, batch_idx):
        hidden = self.encoder(batch[0][:, None])
        return self.head(hidden).sum() + self.head(2 * hidden).sum()


def test_example_is_what_the_outermost_modules_get(make_trainer):
    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8), Parts())
    calls = example_from_batch(trainer, model, None, seed=0).calls
    assert [module for module, _, _ in calls] == [model.encoder, model.head]  # each once, not what is inside
    assert [args[0].shape for _, args, _ in calls] == [(8, 1), (8, 4)]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_example_of_a_step_that_fails_says_what_to_do(make_trainer):
    class Fails(Parts):
        def training_step(self, batch, batch_idx):
            raise IndexError("seven")

    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8), Fails())
    with pytest.raises(TraceError, match="IndexError: seven; pass example_input= or set example_input_array"):
        example_from_batch(trainer, model, None, seed=0)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_example_needs_no_loss(make_trainer):
    class NoLoss(Parts):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8), NoLoss())
    assert [module for module, _, _ in example_from_batch(trainer, model, None, seed=0).calls] == [
        model.encoder,
        model.head,
    ]


def test_example_under_manual_optimization_says_all_that_can_be_done(make_trainer):
    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8), Parts())
    model.automatic_optimization = False
    said = "Parts optimizes manually.*set example_input_array, or pass example_input= or a loss_fn="
    with pytest.raises(TraceError, match=said):
        example_from_batch(trainer, model, None, seed=0)
    calls = example_from_batch(trainer, model, lambda m, batch: m.head(m.encoder(batch[0][:, None])), seed=0).calls
    assert [module for module, _, _ in calls] == [model.encoder, model.head]


def test_example_of_a_loss_without_modules_says_so(make_trainer):
    trainer, model = Attached(make_trainer, DataLoader(Numbers(), 8), Parts())
    with pytest.raises(TraceError, match="no module of Parts with parameters was called with a tensor"):
        example_from_batch(trainer, model, lambda module, batch: batch[0].sum(), seed=0)
