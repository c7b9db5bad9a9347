"""Two processes whose scores differ; what each of them says goes into a file.

python -m tests.disagreeing_processes FOLDER
"""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_prune import Budget, OneShot, WeightPruner
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.commands.digits import DigitsData, DigitsNet


def shifted(size: int) -> torch.Tensor:
    """Scores of another order in each process."""
    return torch.arange(float(size)).roll(torch.distributed.get_rank())


class Channels(ChannelPruner):
    default_scope = "uniform"
    join = "first"

    def score(self, view):
        of = view.group.size
        return shifted(of) if view.group.name == "stage2.conv1" else torch.arange(float(of))


class Weights(WeightPruner):
    default_scope = "layer"

    def score(self, name, weight):
        size = weight.numel()
        return (shifted(size) if name == "head.weight" else torch.arange(float(size))).reshape(weight.shape)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    said = []
    for method in (Channels, Weights):
        pl.seed_everything(0, verbose=False)
        pruner = method(Budget(0.5), schedule=OneShot(2, unit="step"))
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", callbacks=[pruner], logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        try:
            trainer.fit(DigitsNet(width=4), DigitsData(batch_size=128, seed=0))
        except RuntimeError as error:
            said.append(f"{error} | {pruner.events_done}")
    (folder / f"{torch.distributed.get_rank()}.txt").write_text("\n".join(said))


if __name__ == "__main__":
    main()
