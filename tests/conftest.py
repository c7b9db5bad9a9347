"""Tiny networks and the checks that more than one file of tests makes of them."""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.cost import count
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.trace import run, undisturbed
from lightning_prune.surgery import cut, difference

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Networks that are drawn without a seed, fixtures' included, are the same whichever tests ran before."""
    random.seed(0)
    torch.manual_seed(0)


class Net(nn.Module):
    """A network from a forward written as a function of it, and its layers: ``Net(lambda n, x: n.fc(x), fc=...)``."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters, which subsamples and pads with zero channels."""

    def __init__(self, width: int, planes: int):
        super().__init__()
        self.stride, self.pad = (1, 0) if width == planes else (2, (planes - width) // 2)
        self.conv1 = nn.Conv2d(width, planes, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarNet(nn.Module):
    """He et al.'s network for CIFAR with a block a stage, 4 to 8 channels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = Block(4, 4)
        self.layer2 = Block(4, 8)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


def with_random_norms(model: nn.Module) -> nn.Module:
    """Norms as after training: at their start they would hide which channel is which."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def random_keep(graph: ChannelGraph, seed: int = 0, share: float = 0.6) -> dict[str, Tensor]:
    """About a share of each group's channels, at least one of them and not all."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        mask = torch.rand(group.size, generator=generator) < share
        first, second = torch.randperm(group.size, generator=generator)[:2]
        mask[first], mask[second] = True, False
        keep[group.name] = mask
    return keep


def wrong_attributes(model: nn.Module) -> list[str]:
    """Layers whose attributes do not say the sizes their tensors have."""
    wrong = []
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = {key: tuple(t.shape) for key, t in tensors.items() if t is not None}
        weight, statistics = shapes.get("weight"), shapes.get("running_mean")
        if weight and isinstance(module, nn.modules.conv._ConvNd):
            ins, outs = module.in_channels, module.out_channels
            if module.transposed:
                ok = weight[:2] == (ins, outs // module.groups)
            else:
                ok = weight[:2] == (outs, ins // module.groups)
        elif weight and isinstance(module, nn.Linear):
            ok = weight == (module.out_features, module.in_features)
        elif weight and isinstance(module, nn.Embedding):
            ok = weight[1] == module.embedding_dim
        elif weight and isinstance(module, nn.LayerNorm):
            ok = weight == tuple(module.normalized_shape)
        elif weight and isinstance(module, nn.GroupNorm):
            ok = weight[0] == module.num_channels
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            ok = all(shape == (module.num_features,) for shape in (weight, statistics) if shape)
        else:
            continue
        if not ok:
            wrong.append(f"{name}: {module} has {shapes}")
    return wrong


def check_cut(graph: ChannelGraph, seed: int = 0, exact: bool = True) -> nn.Module:
    """Cut a copy of a graph's model at random, run it in both modes, and hold it against what was said beforehand.

    Returns:
        The cut copy, in float64.
    """
    model = copy.deepcopy(graph.model).double()
    plan = graph.plan(random_keep(graph, seed))
    if exact:
        assert difference(model, plan, graph.example_inputs) < 1e-9
    cut(model, plan, example_inputs=graph.example_inputs, graph=graph)
    predicted, counted = graph.cost(plan), count(model, graph.example_inputs)
    assert (predicted.flops, predicted.params) == (counted.flops, counted.params)
    assert wrong_attributes(model) == []
    with undisturbed(model):
        run(model.train(), graph.example_inputs, 2)
    return model


@pytest.fixture(scope="session")
def net() -> type[Net]:
    return Net


@pytest.fixture(scope="session")
def cifar_net() -> Callable[[], nn.Module]:
    """A function that makes the same small residual network every time."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return with_random_norms(CifarNet())

    return make


@pytest.fixture(scope="session", name="random_keep")
def _random_keep() -> Callable[..., dict[str, Tensor]]:
    return random_keep


@pytest.fixture(scope="session", name="check_cut")
def _check_cut() -> Callable[..., nn.Module]:
    return check_cut


@pytest.fixture(scope="session", name="wrong_attributes")
def _wrong_attributes() -> Callable[[nn.Module], list[str]]:
    return wrong_attributes


@pytest.fixture(scope="session", name="with_random_norms")
def _with_random_norms() -> Callable[[nn.Module], nn.Module]:
    return with_random_norms


class TinyNet(pl.LightningModule):
    """A residual network for 1 x 8 x 8 images, with every kind of group: stem and stream, inner, and a hidden layer."""

    def __init__(self, width: int = 6, optimizer: str = "sgd"):
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.fc = nn.Linear(2 * width, 3)
        self.optimizer = optimizer
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def make_loader(samples: int = 32, batch_size: int = 8, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """Random images in three classes; the order of a shuffled one depends on the global random state."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(samples) % 3), batch_size, shuffle=shuffle)


def make_trainer(folder: Any, callbacks: Any = (), max_epochs: int = 2, **settings: Any) -> pl.Trainer:
    """A quiet trainer on the CPU, without a logger and without checkpoints unless asked."""
    callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    settings.setdefault("enable_checkpointing", any(isinstance(c, Checkpoint) for c in callbacks))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, max_epochs=max_epochs, **{**quiet, **settings})


def fit(
    folder: Any,
    callbacks: Any = (),
    model: pl.LightningModule | None = None,
    loader: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    seed: int = 0,
    **settings: Any,
) -> pl.Trainer:
    """Train a seeded ``TinyNet`` (4 batches an epoch, 2 epochs) or another module; the trainer holds it afterwards."""
    pl.seed_everything(seed, verbose=False)
    trainer = make_trainer(folder, callbacks, **settings)
    model = TinyNet() if model is None else model
    loader = make_loader() if loader is None else loader
    if val is None and is_overridden("validation_step", model):
        val = make_loader(8, seed=1)
    trainer.fit(model, loader, val, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


@pytest.fixture(scope="session", name="tiny_net")
def _tiny_net() -> type[TinyNet]:
    return TinyNet


@pytest.fixture(scope="session", name="make_loader")
def _make_loader() -> Callable[..., DataLoader]:
    return make_loader


@pytest.fixture(name="make_trainer")
def _make_trainer(tmp_path) -> Callable[..., pl.Trainer]:
    return partial(make_trainer, tmp_path)


@pytest.fixture(name="fit")
def _fit(tmp_path) -> Callable[..., pl.Trainer]:
    return partial(fit, tmp_path)


class SaveEach(Checkpoint):
    """Writes ``epoch=0.ckpt``, ... at the end of each epoch, and with ``steps=True`` ``step=1.ckpt``, ... as well."""

    def __init__(self, folder: Any, steps: bool = False):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if self.steps:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, model):
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


@pytest.fixture(name="save_each")
def _save_each(tmp_path) -> Callable[..., SaveEach]:
    return partial(SaveEach, tmp_path)
