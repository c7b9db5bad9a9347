"""The examples as a user runs them, in seconds; those that are not here are beside what they show."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
LONGER = {"oracle.py"}  # with a picture

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '\\w+_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:Found \\d+ module.s. in eval mode",  # a frozen backbone
)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs an example with arguments and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def pictures(tmp_path):
    """Three classes of 32 x 32 pictures in folders: noise with more of one colour."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 4)):
        for colour, name in enumerate(("red", "green", "blue")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., colour] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(tmp_path / "pictures")


def kept(said: str) -> dict[str, tuple[int, int]]:
    """group -> channels before and after, of a printed report."""
    rows = re.findall(r"^\| (\S+) +\| +(\d+) \| +(\d+) \| +\d+ \|$", said, re.MULTILINE)
    return {name: (int(dense), int(left)) for name, dense, left in rows}


def test_examples_are_short_and_the_table_names_each():
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".yaml")]
    listed = re.findall(r"^\| \[(\S+?)/?\]", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted([*names, "digits"])
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name for name, length in lengths.items() if length >= 100} == LONGER


def test_cifar10_example_trains_from_folders_and_cuts_to_the_budget(run, pictures):
    said = run("cifar10.py", "--images", pictures, "--fast", "--keep", "0.4")
    groups = kept(said)
    assert groups["conv1"][0] == 16
    assert groups["layer3.2.conv1"][0] == 64
    (share,) = re.findall(r"^\| flops +\|.*\| +(\d\.\d+) \|$", said, re.MULTILINE)
    assert 0.3 < float(share) <= 0.4
    assert "test/acc" in said


def test_cifar10_example_takes_up_a_trained_network_and_any_method(run, pictures, tmp_path):
    module, file = runpy.run_path(str(EXAMPLES / "cifar10.py"))["CifarResNet"](20, 3), tmp_path / "trained.pt"
    arguments = ["--images", pictures, "--fast", "--method", "L1Filter", "--weights", str(file)]
    torch.save({"state_dict": module.state_dict()}, file)
    assert {left < dense for dense, left in kept(run("cifar10.py", *arguments)).values()} == {True}
    torch.save({"state_dict": module.linear.state_dict()}, file)
    with pytest.raises(RuntimeError, match="Missing key"):
        run("cifar10.py", *arguments)


def test_transfer_example_freezes_then_tunes_then_cuts(run):
    said = run("transfer.py", "--fast")
    stages = re.findall(r"^(head alone|fine-tuned|pruned) +test accuracy", said, re.MULTILINE)
    assert stages == ["head alone", "fine-tuned", "pruned"]
    assert min(left / dense for dense, left in kept(said).values()) < 0.5


def test_backbone_of_the_transfer_example_stays_as_it_was_while_frozen(fit, make_loader):
    net = runpy.run_path(str(EXAMPLES / "transfer.py"))["Transfer"]()
    net.freeze_backbone(True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(model=net, max_epochs=1, loader=make_loader(8))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_video_example_cuts_convolutions_and_the_recurrent_layer(run):
    said = run("video.py", "--fast")
    dense, pruned = re.findall(r"Conv3d\(1, (\d+).*?Conv3d\((\d+), (\d+).*?GRU\((\d+), (\d+)", said, re.DOTALL)
    assert dense == ("16", "16", "32", "32", "32")
    assert pruned[0] == pruned[1]
    assert pruned[2] == pruned[3]
    assert int(pruned[4]) < 32
    assert 0.4 < float(said.split("parameters kept: ")[1]) <= 0.5


def test_bar_of_a_clip_moves_the_way_its_label_says():
    clips, directions = runpy.run_path(str(EXAMPLES / "video.py"))["clips"](200, seed=3)
    centres = {0: 2, 1: 2, 2: 1, 3: 1}  # direction -> axis of (T, H, W) that the bar moves along
    for clip, direction in zip(clips[:, 0], directions.tolist(), strict=True):
        along = clip.mean(dim=3 - centres[direction]).argmax(dim=1)  # (T,), where the bar is
        assert ((along[1:] - along[:-1]) % 16).tolist() == [1 if direction % 2 == 0 else 15] * 7


def test_transformer_example_cuts_whole_heads_and_hidden_units(run):
    said = run("transformer.py", "--fast")
    heads, hidden = (re.findall(rf"{what} \[(\d+), (\d+)\]", said) for what in ("heads", "hidden units"))
    assert heads[0] == ("4", "4")
    assert hidden[0] == ("128", "128")
    assert sum(map(int, heads[1])) < 8
    assert sum(map(int, hidden[1])) < 256
    assert 0.4 < float(said.split("flops kept: ")[1]) <= 0.5


def test_label_of_a_sequence_is_the_symbol_behind_its_marker():
    x, y = runpy.run_path(str(EXAMPLES / "transformer.py"))["sequences"](50, seed=1)
    assert [row[row.index(0) + 1] for row in x.tolist()] == y.tolist()
    assert (x == 0).sum(dim=1).tolist() == [1] * 50


@pytest.mark.processes  # a notebook runs in a kernel of its own
def test_notebook_runs_from_top_to_bottom_and_is_stored_without_outputs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells] == [[]] * len(cells)
    assert "EPOCHS = 15" in cells[0].source
    cells[0].source = cells[0].source.replace("EPOCHS = 15", "EPOCHS = 2")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert re.search(r"^test accuracy .*flops kept 0\.4", said, re.MULTILINE)
