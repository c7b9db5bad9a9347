"""Which method foretells best what happens when a channel goes? Each one's scores against the true loss changes.

    python examples/oracle.py                   the digits net, trained for 15 epochs
    python examples/oracle.py --data FOLDER     a trained ResNet-20: cifar10_jpeg.npz and resnet20_jpeg.pt, as
                                                benchmarks/cifar.py describes them
    python examples/oracle.py --fast            2 epochs and 64 images, to see that it runs

Spearman's rank correlation with |loss change| when each channel is removed alone: over all channels, as a global
ranking sees them, and inside of groups. Data is seen in eval mode. Seed 0, CPU; `--out FOLDER` takes table and picture.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure

import lightning_prune as lp
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.errors import PruneError
from lightning_prune.methods import discover
from lightning_prune.report import markdown_table


def digits(epochs):
    net, data = DigitsNet(), DigitsData()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet).fit(net, data)
    return net, *data.train.tensors


def resnet20(folder):
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from cifar import images, normalised
    from graph import CifarResNet

    net = CifarResNet(20)
    net.load_state_dict(torch.load(folder / "resnet20_jpeg.pt", weights_only=True)["state_dict"])
    x, y = images(folder / "cifar10_jpeg.npz", None)["train"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:5000]
    return net, normalised(x[order]), y[order]


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def figure(rows, scores, changes):
    """Bars of the correlations, and a panel a method: all its channels, by rank of score and size of change."""
    columns = 1 + (len(scores) + 1) // 2
    drawn = Figure(figsize=(3 * columns, 6), layout="constrained")
    grid = drawn.add_gridspec(2, columns)
    bars = drawn.add_subplot(grid[:, 0])
    for offset, key in ((0.2, "all channels"), (-0.2, "within groups")):
        bars.barh([offset - i for i in range(len(rows))], [row[key] for row in rows], 0.4, label=key)
    bars.set(
        yticks=[-i for i in range(len(rows))], yticklabels=[row["method"] for row in rows], xlabel="rank correlation"
    )
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1))
    colour = {name: f"C{i % 10}" for i, name in enumerate(changes)}  # a group
    for i, row in enumerate(rows):
        panel = drawn.add_subplot(grid[i // (columns - 1), 1 + i % (columns - 1)])
        score = scores[row["method"]]
        rank = torch.cat(list(score.values())).argsort().argsort().split([len(s) for s in score.values()])
        for name, ranks in zip(score, rank, strict=True):
            panel.scatter(ranks.cpu(), changes[name].abs().clamp(min=1e-7), s=4, color=colour[name])
        panel.set(title=row["method"], yscale="log", xlabel="rank of the score", ylabel="|loss change|")
    return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of CIFAR-10 and the trained ResNet-20")
    parser.add_argument("--samples", type=int, default=1024, help="images to look at (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for oracle.csv and oracle.png")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    net, x, y = digits(2 if options.fast else 15) if options.data is None else resnet20(options.data)
    samples = 64 if options.fast else options.samples
    batches = list(zip(x[:samples].split(64), y[:samples].split(64), strict=True))
    graph = lp.trace(net, x[:1])
    changes = lp.loss_changes(net, graph, batches, loss)
    rows, scores, without = [], {}, {}
    for name, method in discover().items():
        if method.kind != "channels":
            continue
        try:
            scores[name] = method(0.5, calibration=batches, loss_fn=loss).scores_for(graph)
        except (PruneError, ValueError) as error:
            without[name] = error
            continue
        found = lp.rank_correlation(scores[name], changes)
        rows.append({"method": name, "all channels": found.overall, "within groups": found.mean})
    rows.sort(key=lambda row: row["within groups"], reverse=True)
    print(f"{sum(map(len, changes.values()))} channels in {len(changes)} groups, {len(x[:samples])} images\n")
    rounded = [{k: v if k == "method" else f"{v:.3f}" for k, v in row.items()} for row in rows]
    print(markdown_table(rounded))
    for name, error in without.items():
        print(f"\n{name} has no scores here: {error}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = [rows[0].keys(), *[row.values() for row in rounded]]
        (options.out / "oracle.csv").write_text("".join(",".join(line) + "\n" for line in lines))
        figure(rows, scores, changes).savefig(options.out / "oracle.png", dpi=150)


if __name__ == "__main__":
    main()
