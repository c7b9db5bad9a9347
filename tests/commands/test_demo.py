import json
import logging
import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from lightning_prune import load_pruned
from lightning_prune.checkpoint import plan_of
from lightning_prune.commands import demo, main
from lightning_prune.commands.digits import DigitsData, DigitsNet
from lightning_prune.cost import count
from lightning_prune.latency import state_dict_bytes
from lightning_prune.methods import discover

METHODS = [name for name, cls in discover().items() if cls.kind != "control"]


@pytest.fixture(autouse=True)
def _same_seed_afterwards(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def no_process(monkeypatch):
    """What the fresh process does, in this one: the process has a test of its own."""
    monkeypatch.setattr(demo, "_in_fresh_process", demo.checked)


def run(out, *arguments):
    status = main(["demo", "--epochs", "1", "--out", str(out), *arguments])
    return status, json.loads((out / "report.json").read_text("utf-8"))


@pytest.mark.usefixtures("no_process")
def test_accuracy_of_the_checkpoint_by_hand(tmp_path):
    status, report = run(tmp_path, "--method", "l1_filter")
    assert status == 0
    net, data = load_pruned(DigitsNet, report["checkpoint"]).eval(), DigitsData()
    data.setup("test")
    images, labels = data.test.tensors
    correct = (net(images).argmax(1) == labels).float().mean().item()
    assert report["pruned"]["accuracy"] == report["reloaded"] == pytest.approx(correct, abs=1e-6)
    assert report["pruned"]["bytes"] == state_dict_bytes(net)
    cost = count(net, net.example_input_array)
    assert (report["pruned"]["flops"], report["pruned"]["params"]) == (cost.flops, cost.params)
    assert report["dense"]["params"] == 77_754


@pytest.mark.filterwarnings("ignore:Hierarchical. the (redundancy of|budget asks for)")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("no_process")
def test_each_method_meets_its_budget_and_leaves_everything_it_names(method, tmp_path, capsys):
    status, report = run(tmp_path, "--method", method, "--seed", "3")
    assert status == 0
    if discover()[method].kind != "weights":
        assert 0.45 < report["flops_kept"] <= 0.5
        assert report["pruned"]["flops"] / report["dense"]["flops"] == report["flops_kept"]
    else:
        assert report["density"] == pytest.approx(0.1, abs=0.0005)
        assert report["flops_kept"] == 1.0
        assert 0 < report["flops_sparse"] < report["dense"]["flops"]
    assert {"accuracy", "flops", "params", "bytes", "latency_ms"} == report["dense"].keys() == report["pruned"].keys()
    assert all(set(times) == {"1", "32"} for times in (report[of]["latency_ms"] for of in ("dense", "pruned")))
    assert (report["method"], report["seed"]) == (method, 3)
    shown = capsys.readouterr().out
    for what in ("checkpoint", "picture", "tensorboard"):
        assert Path(report[what]).exists()
        assert report[what] in shown
    assert Path(report["picture"]).read_bytes().startswith(b"\x89PNG")
    assert any(Path(report["tensorboard"]).glob("events.*"))


@pytest.mark.usefixtures("no_process")
def test_parameters_of_a_masked_network_are_those_that_are_not_zero(tmp_path):
    _, report = run(tmp_path, "--method", "magnitude", "--keep", "0.25")
    state = torch.load(report["checkpoint"], weights_only=True)
    masks = plan_of(state).masks
    assert report["density"] == pytest.approx(0.25, abs=0.0005)
    alive = sum(int((state["state_dict"][name] != 0).sum()) for name in masks)
    rest = report["dense"]["params"] - sum(mask.numel() for mask in masks.values())
    assert report["pruned"]["params"] == alive + rest
    assert report["pruned"]["bytes"] == report["dense"]["bytes"]


def test_both_fits_start_from_the_same_weights_and_batches(tmp_path, monkeypatch):
    starts = []

    class Watched(DigitsNet):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                starts.append((self.stem.weight.detach().clone(), batch[0]))
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(demo, "DigitsNet", Watched)
    with demo.quiet():
        demo._fitted("dense", 5, 1, tmp_path)
        torch.rand(7)
        demo._fitted("pruned", 5, 1, tmp_path)
    (weights, images), (weights_again, images_again) = starts
    assert torch.equal(weights, weights_again)
    assert torch.equal(images, images_again)


def test_checkpoint_that_does_something_else_is_an_error(tmp_path, monkeypatch, capsys):
    def one_image_off(path):
        return {**demo.checked(path), "accuracy": 0.5}

    monkeypatch.setattr(demo, "_in_fresh_process", one_image_off)
    status, report = run(tmp_path, "--method", "l1_filter")
    assert status == 1
    assert report["reloaded"] == 0.5  # what was found is written all the same
    error = capsys.readouterr().err
    assert error.startswith("lightning-prune demo: error: ")
    assert "loaded in a fresh process, has {'accuracy': 0.5" in error


@pytest.mark.processes  # loads in a process of its own, as the command does
def test_fresh_process_says_what_this_one_does(tmp_path):
    status, report = run(tmp_path, "--method", "taylor_weight")
    assert status == 0
    with demo.quiet():
        assert report["reloaded"] == demo.checked(Path(report["checkpoint"]))["accuracy"]


def test_fresh_process_that_fails_is_an_error_with_what_it_said(monkeypatch):
    def run(command, env, **_):
        assert command[-2:] == ["--check", "gone.ckpt"]
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(Path(demo.__file__).parents[2])
        return subprocess.CompletedProcess(command, 1, "", "No such\n file")

    monkeypatch.setattr(demo.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"gone.ckpt did not load in a fresh process: No such file"):
        demo._in_fresh_process(Path("gone.ckpt"))


@pytest.mark.usefixtures("no_process")
def test_check_prints_one_line_of_json(tmp_path, capsys):
    _, report = run(tmp_path, "--method", "l1_filter")
    capsys.readouterr()
    assert main(["demo", "--check", report["checkpoint"]]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {key: report["pruned"][key] for key in ("accuracy", "flops", "params")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tailor"], "no method 'tailor'; there are "),
        (["--keep", "0"], "keep must be in (0, 1]"),
        (["--keep", "1.01"], "keep must be in (0, 1]"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be from 0 to 4,294,967,295, got -1"),
        (["--check", "gone.ckpt"], "No such file or directory"),
    ],
)
def test_bad_arguments_end_before_anything_is_trained(arguments, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def side(accuracy, flops, params, size, *medians):
    times = {str(b): {"median": m, "p10": m / 2, "p90": 2 * m} for b, m in zip((1, 32), medians, strict=True)}
    return {"accuracy": accuracy, "flops": flops, "params": params, "bytes": size, "latency_ms": times}


def cells(text):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()]


def test_table_says_change_in_points_shares_and_spread():
    report = {
        "dense": side(0.98, 1000, 200, 5000, 0.4, 1.2),
        "pruned": side(0.975, 500, 50, 1250, 0.2, 0.8),
        "flops_sparse": 500.0,
        "density": 0.6,
    }
    assert cells(demo.table(report))[2:] == [
        ["test accuracy", "98.00%", "97.50%", "-0.50 points"],
        ["flops, one sample", "1,000", "500", "0.5000 kept"],
        ["parameters", "200", "50", "0.2500 kept"],
        ["state dict, bytes", "5,000", "1,250", "0.2500 kept"],
        ["ms, batch of 1", "0.400 (0.200 to 0.800)", "0.200 (0.100 to 0.400)", "2.00x as fast"],
        ["ms, batch of 32", "1.200 (0.600 to 2.400)", "0.800 (0.400 to 1.600)", "1.50x as fast"],
    ]


def test_table_of_masked_weights_keeps_theory_apart_from_what_is_shipped():
    same = side(0.98, 1000, 200, 5000, 0.4, 1.2)
    report = {"dense": same, "pruned": {**same, "params": 30}, "flops_sparse": 125.0, "density": 0.1}
    lines = cells(demo.table(report))
    assert ["flops, one sample", "1,000", "1,000", "1.0000 kept"] in lines
    assert ["parameters not masked", "200", "30", "0.1500 kept"] in lines
    assert ["flops if zeros were free", "1,000", "125", "0.1250 kept"] in lines
    assert ["density", "1.0000", "0.1000", ""] in lines


def test_density_figure_has_a_bar_per_layer_as_long_as_its_density():
    figure = demo.density_figure({"stem": (3, 12), "head": (5, 5)})
    (axes,) = figure.axes
    dense, kept = axes.containers
    assert [bar.get_width() for bar in dense] == [1.0, 1.0]
    assert [bar.get_width() for bar in kept] == [0.25, 1.0]
    assert [text.get_text() for text in axes.texts] == ["0.250 of 12", "1.000 of 5"]
    assert figure.get_suptitle() == "Weights kept per layer: 8 of 17 (47.1%)"


def test_progress_is_every_fifth_epoch_and_the_last(capsys):
    class Running:
        max_epochs, current_epoch = 7, 0
        callback_metrics = {"val/acc": torch.tensor(0.5), "prune/flops_kept": torch.tensor(0.75)}  # noqa: RUF012

    progress = demo.Progress("pruned")
    for Running.current_epoch in range(7):
        progress.on_train_epoch_end(Running, None)
    assert capsys.readouterr().out.splitlines() == [
        f"pruned  epoch  {epoch} of 7  validation accuracy 50.00%  flops kept 0.750" for epoch in (5, 7)
    ]


def test_progress_on_a_terminal_is_one_line(capsys, monkeypatch):
    class Running:
        max_epochs, current_epoch = 2, 0
        callback_metrics = {"val/acc": torch.tensor(0.5)}  # noqa: RUF012

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = demo.Progress("dense")
    for Running.current_epoch in range(2):
        progress.on_train_epoch_end(Running, None)
    shown = capsys.readouterr().out
    assert shown.count("\r") == 2
    assert shown.count("\n") == 1


def test_threads_loggers_and_warnings_are_put_back_also_after_an_error():
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level, filters = logger.level, list(warnings.filters)
    torch.set_num_threads(2)

    def failing():
        with demo._one_thread(), demo.quiet():
            assert torch.get_num_threads() == 1
            assert logger.level == logging.ERROR
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert (logger.level, list(warnings.filters)) == (level, filters)


def warn_from(module):
    warnings.warn_explicit("changed nothing", UserWarning, "file.py", 1, module=module)


def test_lightning_s_warnings_are_not_heard_but_ours_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with demo.quiet():
            warn_from("lightning.pytorch.trainer")
            with pytest.raises(UserWarning, match="changed nothing"):
                warn_from("lightning_prune.pruner")


@pytest.mark.slow  # the main job as it stands, two fits of 24 epochs and a process: about 20 seconds
@pytest.mark.processes
def test_main_job_reaches_what_it_promises(tmp_path):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["dense"]["accuracy"] >= 0.97
    assert report["pruned"]["accuracy"] >= report["dense"]["accuracy"] - 0.01
    assert 0.45 <= report["flops_kept"] <= 0.5
    assert report["reloaded"] == report["pruned"]["accuracy"]
    assert report["seconds"] < 90


def test_budget_out_of_reach_is_said_before_anything_is_trained_or_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_fitted", None)
    assert main(["demo", "--keep", "0.001", "--out", str(tmp_path / "out")]) == 1
    assert "of the flops cannot be met: with the fewest channels allowed 0.0034 are left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
