"""Transfer learning, then pruning: a ResNet-18 learns a new task, first its head, then all of it, then it is cut.

    python examples/transfer.py --weights resnet18.pth    a state dict of torchvision's ResNet-18, trained on ImageNet
    python examples/transfer.py                           random weights, where none are at hand
    python examples/transfer.py --fast                    2 epochs of 4 batches a stage, to see that it runs

The manner of Molchanov et al. (2017): a network trained on much data is fine-tuned on little, and maps go by the effect
that their removal is estimated to have on the loss, a few at a time, with training in between. The new task here is
scikit-learn's digits as 3 x 32 x 32 images. Seed 0, CPU; prints test accuracy after each stage, and the report.
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from lightning_prune import Budget, TaylorActivation
from lightning_prune.commands.digits import DigitsData


class Transfer(pl.LightningModule):
    """A backbone and a new head; while frozen, the backbone keeps its weights and the statistics of its norms."""

    def __init__(self, weights=None, classes=10):
        super().__init__()
        self.backbone = resnet18()
        if weights:
            self.backbone.load_state_dict(torch.load(weights, weights_only=True))
        self.head = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()
        self.lr = 0.01
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def freeze_backbone(self, frozen):  # Lightning then warns of modules in eval mode: they are meant to be
        self.backbone.requires_grad_(not frozen).train(not frozen)

    def forward(self, x):
        x = F.interpolate(x, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, self.lr, momentum=0.9, weight_decay=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the flops that stays (%(default)s)")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    pl.seed_everything(0)
    net, data = Transfer(options.weights), DigitsData(batch_size=8 if options.fast else 32)

    def stage(name, epochs, callbacks=()):
        few = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 1} if options.fast else {}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            **{"max_epochs": epochs, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **few},
            callbacks=list(callbacks),
        )
        trainer.fit(net, data)
        (result,) = trainer.test(net, data, verbose=False)
        print(f"{name:<11} test accuracy {result['test/acc']:.2%}")

    net.freeze_backbone(True)
    stage("head alone", 5)
    net.freeze_backbone(False)
    stage("fine-tuned", 5)
    net.lr = 0.001  # as low as a network that is trained already can bear
    pruner = TaylorActivation(Budget(options.keep))
    stage("pruned", 10, [pruner])
    print(pruner.report.to_markdown().split("\n\n| step")[0])


if __name__ == "__main__":
    main()
