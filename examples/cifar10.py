"""CIFAR-10 with He et al.'s ResNet-20 or -56: trained, or taken up trained, and cut while it trains.

    python examples/cifar10.py --images FOLDER    pictures of 32 x 32 in FOLDER/train/<class>/ and FOLDER/test/<class>/
    python examples/cifar10.py --cifar10 FOLDER   torchvision's copy of the data set; --download fetches it first
    python examples/cifar10.py --images FOLDER --fast    2 epochs of 4 batches, to see that it runs

--weights FILE starts from a checkpoint of this network, {"state_dict": ...}. Any method by its name: --method L1Filter.
Seed 0, on a GPU where there is one. Prints the report and the test accuracy.
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from lightning_prune import Budget
from lightning_prune.methods import find


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2  # of the shortcut, which has no weights

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad)))


class CifarResNet(pl.LightningModule):
    def __init__(self, depth=20, classes=10, lr=0.1):
        super().__init__()
        self.lr, blocks = lr, (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for i, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            shapes = [(inputs, outputs, 1 if i == 1 else 2), *[(outputs, outputs, 1)] * (blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*(Block(*shape) for shape in shapes)))
        self.linear = nn.Linear(64, classes)
        self.example_input_array = torch.zeros(1, 3, 32, 32)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, 0.9, weight_decay=5e-4, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def loaders(options):
    usual = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    moved = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    for split, steps in {"train": moved + usual, "test": usual}.items():
        if options.images:
            data = datasets.ImageFolder(f"{options.images}/{split}")
        else:
            data = datasets.CIFAR10(options.cifar10, split == "train", download=options.download)
        data.transform = transforms.Compose(steps)
        yield DataLoader(data, 8 if options.fast else 128, split == "train", num_workers=0 if options.fast else 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="FOLDER")
    source.add_argument("--cifar10", metavar="FOLDER")
    for flag in ("--download", "--fast"):
        parser.add_argument(flag, action="store_true")
    for name, default in {"method": "TaylorWeight", "keep": 0.5, "depth": 20, "epochs": 60, "weights": ""}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    options = parser.parse_args()
    pl.seed_everything(0)
    train, test = loaders(options)
    net = CifarResNet(options.depth, len(train.dataset.classes), lr=0.01 if options.weights else 0.1)
    if options.weights:
        net.load_state_dict(torch.load(options.weights, weights_only=True)["state_dict"])
    pruner = find(options.method)(Budget(options.keep))
    limits = {"max_epochs": 2, "limit_train_batches": 4, "limit_test_batches": 4} if options.fast else {}
    trainer = pl.Trainer(**{"max_epochs": options.epochs, **limits}, callbacks=[pruner], logger=False)
    trainer.fit(net, train)
    print(pruner.report.to_markdown().split("\n\n| step")[0])
    trainer.test(net, test)


if __name__ == "__main__":
    main()
