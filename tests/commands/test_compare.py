import json

import pytest

from lightning_prune.commands import main
from lightning_prune.comparison import protocol as protocols

DIGITS = "lightning_prune.commands.digits"
CONFIG = f"""
model: {{class_path: {DIGITS}.DigitsNet, init_args: {{width: 4}}}}
data: {{class_path: {DIGITS}.DigitsData}}
trainer: {{accelerator: cpu, limit_train_batches: 2}}
"""


@pytest.fixture(autouse=True)
def _in_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG, encoding="utf-8")


def run(*arguments):
    settings = ["--config", "tiny.yaml", "--seeds", "0", "--epochs", "1", "--finetune", "1", "--repeats", "0"]
    return main(["compare", *settings, "--out", "out", *arguments])


def test_compares_and_leaves_four_files(capsys, tmp_path):
    assert run("--methods", "l1_filter", "--channels", "0.5:params", "--scratch", "none") == 0
    said = capsys.readouterr().out
    assert "3 runs, 0 of them done already" in said
    assert "| L1Filter" in said
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        "protocol.json",
        "rows.csv",
        "results.md",
        "results.json",
        "pareto.png",
    }
    value = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    (row,) = [row for row in value["rows"] if row["method"] == "L1Filter"]
    assert (row["of"], row["params_kept"] <= 0.5) == ("params", True)
    (tmp_path / "out" / "results.md").unlink()
    assert main(["compare", "--out", "out", "--only-report"]) == 0
    assert (tmp_path / "out" / "results.md").read_text("utf-8") in said


def test_a_run_that_fails_is_told_and_makes_the_status_one(capsys):
    assert run("--methods", "L1Filter", "RigL", "--channels", "0.001", "--scratch", "RigL") == 1
    said = capsys.readouterr().out
    assert "L1Filter, 0.001 of the flops, seed 0: failed: UnmeetableBudget: L1Filter: a budget of 0.001" in said
    assert "[7 of 7] Scratch-B of RigL, 0.1 of the units, seed 0: test/acc " in said  # the others went on
    assert "2 of 7 runs failed; the same command runs them again" in said  # RandomChannels has the same budget


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--methods", "nothing"], 1, "no method 'nothing'"),
        (["--methods", "Scratch"], 1, "Scratch is a control"),
        (["--channels", "1.5"], 2, "argument --channels: keep must be in (0, 1]"),
        (["--weights", "0.5:size"], 2, "argument --weights: of must be one of"),
        (["--methods", "L1Filter", "--scratch", "CHIP"], 1, "--scratch names CHIP, which is not compared"),
        (["--start", "L1Filter=later"], 1, "start of L1Filter must be 'trained' or 'initial', got 'later'"),
        (["--epochs", "0"], 1, "epochs must be at least 1, got 0"),
        (["--only-report"], 1, "out holds no rows.csv to report on"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_anything_is_trained(arguments, status, message, capsys, tmp_path):
    assert run(*arguments) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_config_with_a_wrong_argument_is_told_before_anything_is_trained(capsys, tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("width: 4", "wdith: 4"), encoding="utf-8")
    assert run() == 1
    assert "wdith" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_digits_are_compared_by_default():
    assert protocols.Protocol().config["model"]["class_path"] == f"{DIGITS}.DigitsNet"
