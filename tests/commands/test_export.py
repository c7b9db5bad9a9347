import json
import sys
import types

import pytest
import torch
from torch import nn

from lightning_prune import LRPET, L1Filter, rebuild
from lightning_prune.checkpoint import load_into, read_checkpoint
from lightning_prune.commands import main
from lightning_prune.errors import IncompatibleCheckpoint


class Data:
    """Stands for a LightningDataModule: batches once it is set up."""

    def prepare_data(self):
        self.stage = None

    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        assert self.stage == "fit"
        return [(torch.randn(16, 1, 8, 8), torch.zeros(16)) for _ in range(2)]


@pytest.fixture(autouse=True)
def _importable(monkeypatch, tiny_net):
    """The network and data of these tests under a plain name, whatever pytest calls them."""
    module = types.ModuleType("own_models")
    module.TinyNet, module.Data, module.samples = tiny_net, Data, lambda: [torch.randn(8, 1, 8, 8)]
    module.linear = lambda: nn.Linear(3, 2)
    module.Scaled, module.branching = Scaled, Branching
    monkeypatch.setitem(sys.modules, "own_models", module)


class Scaled(nn.Module):
    """Its argument is in no shape, so that only the checkpoint can say it."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 2), scale

    def forward(self, x):
        return self.fc(x) * self.scale


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


@pytest.fixture
def pruned(fit, tiny_net, tmp_path):
    """Path of a checkpoint of a cut network of another width than the class has by itself, and that network."""
    trainer = fit(L1Filter(0.5), model=tiny_net(width=4))
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    return tmp_path / "pruned.ckpt", trainer.lightning_module.eval()


def test_a_cut_network_is_written_with_the_arguments_in_its_checkpoint(pruned, tiny_net, tmp_path, capsys):
    path, model = pruned
    out = tmp_path / "out"
    command = ["export", str(path), "--model", "own_models.TinyNet", "--fold-bn", "--out", str(out)]
    assert main([*command, "--to", "state_dict", "torch_export"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in ("model.pt ", "model.pt2", "model.onnx") if name in printed] == ["model.pt ", "model.pt2"]
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        right = model(x)
        torch.testing.assert_close(torch.export.load(out / "model.pt2").module()(x), right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rebuild.load(tiny_net(width=4), out)(x), right, rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in out.iterdir()) == ["load_model.py", "model.json", "model.pt", "model.pt2"]


@pytest.mark.parametrize(("more", "scale"), [([], 3.0), (["--arguments", '{"scale": 5}'], 5.0)])
def test_arguments_come_from_the_checkpoint_and_the_command_has_the_last_word(tmp_path, more, scale):
    model = Scaled(scale)
    known = {"scale": 3.0, "of another class": 1}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": known}, tmp_path / "a.ckpt")
    command = ["export", str(tmp_path / "a.ckpt"), "--model", "own_models.Scaled", "--input", "1,3", *more]
    assert main([*command, "--to", "torch_export", "--out", str(tmp_path / "out")]) == 0
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.export.load(tmp_path / "out" / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize("finalize", [True, False], ids=["two layers in the checkpoint", "one layer in the checkpoint"])
def test_ranks_leave_as_two_layers(fit, tiny_net, tmp_path, finalize):
    trainer = fit(LRPET(0.5, finalize=finalize))
    trainer.save_checkpoint(tmp_path / "ranks.ckpt")
    whole = isinstance(trainer.lightning_module.conv1, nn.Conv2d)
    assert whole is not finalize
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "ranks.ckpt"), "--model", "own_models.TinyNet", "--to", "state_dict"]
    assert main([*command, "--fold-bn", "--out", str(out)]) == 0
    assert "conv1" in json.loads((out / "model.json").read_text("utf-8"))["rebuild"]["pairs"]
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        right = trainer.lightning_module.eval()(x)
        torch.testing.assert_close(rebuild.load(tiny_net(), out)(x), right, rtol=1e-4, atol=1e-5)


def test_a_config_says_the_model(pruned, tmp_path):
    config = tmp_path / "config.yaml"
    digits = "{class_path: lightning_prune.commands.digits.DigitsNet, init_args: {width: 4}}"
    config.write_text(f"model: {digits}\n", encoding="utf-8")
    from lightning_prune.commands.digits import DigitsNet

    torch.save(DigitsNet(width=4).state_dict(), tmp_path / "dense.pt")
    command = ["export", str(tmp_path / "dense.pt"), "--config", str(config), "--to", "state_dict"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "model.json").read_text("utf-8"))["class"].endswith("DigitsNet")


def test_a_part_of_a_model_is_written_alone(pruned, tmp_path):
    path, model = pruned
    width = model.hidden.in_features
    command = ["export", str(path), "--model", "own_models.TinyNet", "--module", "hidden", "--input", f"2,{width}"]
    assert main([*command, "--to", "state_dict", "--out", str(tmp_path / "out")]) == 0
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert torch.equal(state["weight"], model.hidden.weight)


@pytest.mark.parametrize("calibration", ["own_models.Data", "own_models.samples", "samples.pt"])
def test_int8_is_a_row_of_its_own_and_a_file(pruned, tmp_path, capsys, monkeypatch, calibration):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.randn(20, 1, 8, 8), "samples.pt")
    command = ["export", str(pruned[0]), "--model", "own_models.TinyNet", "--to", "state_dict", "--out", "out"]
    assert main([*command, "--int8", "onnxruntime", "--calibration", calibration, "--samples", "24"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "model.int8.onnx" in line]
    assert "any" in row
    assert (tmp_path / "out" / "model.int8.onnx").is_file()


def refused(capsys, *arguments):
    status = main(["export", *map(str, arguments)])
    said = capsys.readouterr().err.strip()
    assert status == 1
    assert "\n" not in said
    return said


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "more": Code()}, tmp_path / "bad.ckpt")
    said = refused(capsys, tmp_path / "bad.ckpt", "--model", "own_models.linear", "--out", tmp_path / "out")
    assert "bad.ckpt could not be read as a checkpoint: UnpicklingError" in said
    assert "this must not run" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds a Tensor, not a checkpoint"),
        ({"weight": torch.ones(2, 3, 4), "bias": torch.ones(2)}, "weight"),
        ({"state_dict": {"other": torch.ones(2)}}, "other"),
        ({"state_dict": 3}, "'state_dict' must be a mapping"),
        ({"state_dict": {}, "lightning_prune": 3}, "is not one that lightning_prune wrote"),
        ({"state_dict": {}, "hyper_parameters": 3}, "bias"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "other.ckpt")
    said = refused(
        capsys, tmp_path / "other.ckpt", "--model", "own_models.linear", "--input", "2,3", "--out", tmp_path / "out"
    )
    assert message in said


def test_what_cannot_be_exported_says_what_torch_said(tmp_path, capsys):
    torch.save(Branching().state_dict(), tmp_path / "a.pt")
    command = [tmp_path / "a.pt", "--model", "own_models.branching", "--input", "2,3", "--out", tmp_path / "out"]
    assert "data-dependent" in refused(capsys, *command)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--int8", "onnxruntime"], "give --calibration"),
        (["--int8", "onnxruntime", "--calibration", "own_models.gone"], "--calibration own_models.gone"),
        (["--module", "gone"], "--module gone"),
        (["--arguments", '{"width": 0.5}'], ""),
        (["--tolerance", "2"], "tolerance must be above 0"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(pruned, tmp_path, capsys, more, message):
    command = [pruned[0], "--model", "own_models.TinyNet", "--to", "state_dict", "--out", tmp_path / "out", *more]
    assert message in refused(capsys, *command)


def test_a_missing_checkpoint_is_said(tmp_path, capsys):
    assert "gone.ckpt" in refused(capsys, tmp_path / "gone.ckpt", "--model", "own_models.linear", "--out", tmp_path)


def test_half_a_checkpoint_is_named(pruned, tmp_path):
    half = tmp_path / "half.ckpt"
    half.write_bytes(pruned[0].read_bytes()[:5000])
    with pytest.raises(
        IncompatibleCheckpoint, match=r"half\.ckpt is not a whole checkpoint.*pruned\.ckpt is the newest"
    ):
        read_checkpoint(half)


def test_a_model_made_already_takes_shapes_and_weights(pruned, tiny_net):
    path, model = pruned
    other = tiny_net(width=4)
    load_into(other, read_checkpoint(path))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
