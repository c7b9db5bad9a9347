"""Prune a network of one's own Trainer: one callback more, and the checkpoint is of a smaller network.

    python examples/train_digits.py            half of the flops, 24 epochs, about ten seconds on one core
    python examples/train_digits.py --fast     2 epochs, to see that it runs

Seed 0, CPU: prints the report, the test accuracy, and that of the checkpoint when it is loaded again.
"""

import argparse
import tempfile

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import Budget, TaylorWeight, load_pruned
from lightning_prune.commands.digits import DigitsData, DigitsNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="2 epochs instead of 24")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the flops that stays (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    seed_everything(options.seed)
    net, data = DigitsNet(), DigitsData(seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        pruner = TaylorWeight(Budget(options.keep))
        last = ModelCheckpoint(folder, filename="pruned")
        trainer = Trainer(
            max_epochs=2 if options.fast else 24,
            accelerator="cpu",
            callbacks=[pruner, last],  # this line is all that pruning adds
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net, data)

        print(pruner.report.to_markdown().split("\n\n| step")[0])  # without the rows of its events
        (trained,) = trainer.test(net, data, verbose=False)
        again = load_pruned(DigitsNet, last.best_model_path)
        (reloaded,) = trainer.test(again, data, verbose=False)
    print(f"test accuracy {trained['test/acc']:.2%}, of the checkpoint loaded again {reloaded['test/acc']:.2%}")
    if trained != reloaded:
        raise SystemExit("the checkpoint does not do what the trained network did")


if __name__ == "__main__":
    main()
