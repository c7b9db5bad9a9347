"""What the demo trains: scikit-learn's handwritten digits, and a small residual network for them."""

import math
from collections.abc import Iterator

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_prune.checkpoint import PrunableModule

Batch = tuple[Tensor, Tensor]


class EpochShuffle(Sampler[int]):
    """A new order for each epoch, which depends on the seed and the epoch alone.

    Lightning calls ``set_epoch``, so a run resumed at an epoch's end goes on with the batches it would have had.

    Args:
        size: number of samples.
        seed: orders of different seeds differ.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class DigitsData(LightningDataModule):
    """The 1,797 real 8x8 images that come with scikit-learn: 1,077 to train on, 360 to validate, 360 to test.

    Each part holds every digit in the same proportion. Pixels are scaled to [0, 1], then normalised by the mean and
    standard deviation of the training part. Batches are ((B, 1, 8, 8) float32, (B,) int64).

    Args:
        batch_size: images per batch, at least 1.
        shift: training images are moved by up to this many pixels each way, each image by itself; 0 leaves them alone.
        seed: of the order of training batches.
        split_seed: of the split; figures of different splits do not compare.
    """

    def __init__(self, batch_size: int = 64, shift: int = 1, seed: int = 0, split_seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= shift < 8:
            raise ValueError(f"shift must be from 0 to 7 pixels, as the images are 8 wide, got {shift}")
        self.batch_size = batch_size
        self.shift = shift
        self.seed = seed
        self.split_seed = split_seed

    @override
    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
        labels = torch.tensor(digits.target, dtype=torch.int64)
        rest, test = train_test_split(
            range(len(labels)), test_size=360, stratify=digits.target, random_state=self.split_seed
        )
        train, val = train_test_split(rest, test_size=360, stratify=digits.target[rest], random_state=self.split_seed)
        images = (images - images[train].mean()) / images[train].std()
        self.train, self.val, self.test = (TensorDataset(images[part], labels[part]) for part in (train, val, test))

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, sampler=EpochShuffle(len(self.train), self.seed))

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=360)

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=360)

    @override
    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.test_dataloader()

    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # Lightning's model summary hands over the example input, which is one tensor.
        if not self.shift or self.trainer is None or not self.trainer.training or isinstance(batch, Tensor):
            return batch
        images, labels = batch
        # Seeded by the step, so that a resumed run moves its images as the uninterrupted one would.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.global_step)
        offsets = torch.randint(-self.shift, self.shift + 1, (len(images), 2), generator=generator)
        return shifted(images, offsets), labels


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Move each image by whole pixels; what comes in from outside repeats the nearest edge.

    Args:
        images: (B, C, H, W).
        offsets: (B, 2) int64: pixels down and pixels to the right.

    Returns:
        (B, C, H, W), on the device of ``images``.

    Example:
        >>> shifted(torch.tensor([[[[1, 2, 3]]]]), torch.tensor([[0, 1]]))
        tensor([[[[1, 1, 2]]]])
    """
    height, width = images.shape[-2:]
    offsets = offsets.to(images.device)
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)  # (B, W)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsNet(PrunableModule, LightningModule):
    """A residual network of three stages for 8x8 images, 77,754 parameters at width 16.

    Trained by SGD with Nesterov momentum; the learning rate rises over the first tenth of the fit and falls to 0 along
    half a cosine. Logs ``train/loss``, ``val/loss``, ``val/acc`` and ``test/acc``.

    Args:
        width: channels of the stem and the first stage; the later stages have twice and four times as many.
        lr: the highest learning rate.
        momentum: of SGD, above 0.
        weight_decay: of every parameter.
    """

    def __init__(self, width: int = 16, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.example_input_array = torch.zeros(1, 1, 8, 8)
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = Block(width, width)
        self.stage2 = Block(width, 2 * width, stride=2)
        self.stage3 = Block(2 * width, 4 * width, stride=2)
        self.head = nn.Linear(4 * width, 10)
        self.val_acc = MulticlassAccuracy(10, average="micro")
        self.test_acc = MulticlassAccuracy(10, average="micro")

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1, 8, 8) to logits (B, 10)."""
        x = F.relu(self.bn(self.stem(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val/acc", self.val_acc, prog_bar=True)
        self.log("val/loss", F.cross_entropy(logits, labels))

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test/acc", self.test_acc)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Digits, (B,) int64."""
        logits: Tensor = self(batch[0])
        return logits.argmax(dim=1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )

        def factor(step: int) -> float:
            # The length of the fit is asked for only once steps are made: asking sets the loader up.
            progress = step / self.trainer.estimated_stepping_batches if step else 0.0
            return min((progress + 0.01) / 0.1, (1 + math.cos(math.pi * progress)) / 2)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
