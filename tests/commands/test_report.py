import csv
import json
import re
import shlex
import sys
import types

import lightning.pytorch as pl
import pytest
import torch

from lightning_prune import LRPET, Budget, L1Filter, Magnitude, OneShot
from lightning_prune.commands import main
from lightning_prune.commands.digits import DigitsNet
from lightning_prune.comparison.table import COLUMNS
from lightning_prune.cost import count
from lightning_prune.histograms import BINS

AT_3 = OneShot(3, unit="step")


@pytest.fixture(autouse=True)
def own_models(monkeypatch, tiny_net, make_loader):
    """The tiny network and its data under a plain name, as a user's own module would have."""

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return make_loader(32)

        def test_dataloader(self):
            return make_loader(8, seed=2)

    module = types.ModuleType("own_models")
    module.TinyNet, module.Data = tiny_net, Data
    monkeypatch.setitem(sys.modules, "own_models", module)
    return module


@pytest.fixture
def saved(fit, tmp_path):
    """A function that fits a callback and saves the checkpoint: its path, and the trainer."""

    def save(callback=(), name="pruned.ckpt", **settings):
        trainer = fit(callback, limit_val_batches=0, **settings)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        trainer.save_checkpoint(path)
        return path, trainer

    return save


def report(tmp_path, *arguments):
    out = tmp_path / "out"
    model = [] if "--model" in arguments or "--compare" in arguments else ["--model", "own_models.TinyNet"]
    status = main(["report", *map(str, arguments), *model, "--repeats", "0", "--out", str(out)])
    written = out / "report.json"
    return status, json.loads(written.read_text("utf-8")) if written.exists() else None


def test_cut_checkpoint_is_counted_as_it_is_and_held_against_its_dense_network(saved, tmp_path, tiny_net, capsys):
    callback = L1Filter(0.5, schedule=AT_3)
    path, trainer = saved(callback)
    status, said = report(tmp_path, path)
    assert status == 0
    dense, pruned = said["networks"]
    model = trainer.lightning_module
    whole, cut = (count(m, m.example_input_array) for m in (tiny_net(), model))
    assert (dense["flops"], dense["params"]) == (whole.flops, whole.params)
    assert (pruned["flops"], pruned["params"], pruned["nonzero"]) == (cut.flops, cut.params, cut.params)
    assert pruned["flops_kept"] == cut.flops / whole.flops <= 0.5
    (bars,) = said["architectures"]
    assert {row["name"]: (row["kept"], row["dense"]) for row in bars["rows"]} == dict(callback.plan.groups)
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"{cut.flops:,}" in html
    assert "report.html" in capsys.readouterr().out


def test_page_says_how_the_method_was_made_and_what_it_scored(saved, tmp_path):
    callback = L1Filter(0.5, schedule=AT_3, ignore=["fc*"], min_channels=2)
    path, _ = saved(callback, seed=11)
    (one,) = report(tmp_path, path)[1]["prunings"]
    assert (one["method"], one["seed"], one["done"], one["planned"], one["steps"]) == ("L1Filter", "11", 1, 1, 8)
    arguments = {"budget": repr(callback.budget), "ignore": "['fc*']", "min_channels": "2", "schedule": repr(AT_3)}
    assert arguments.items() <= one["arguments"].items()
    counts = {name: (sum(found["kept"]), sum(found["gone"])) for name, found in one["scores"].items()}
    assert counts == {name: (kept, of - kept) for name, (kept, of) in callback.plan.groups.items()}
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "seed_everything(11)\nL1Filter(\n" in html


def test_masked_checkpoint_says_what_is_not_zero_layer_by_layer(saved, tmp_path):
    callback = Magnitude(Budget(0.25), schedule=AT_3)
    path, trainer = saved(callback)
    said = report(tmp_path, path)[1]
    network, (bars,) = said["networks"][1], said["architectures"]
    zeros = sum(int((p == 0).sum()) for n, p in trainer.lightning_module.named_parameters() if n in callback.plan.masks)
    assert network["nonzero"] == network["params"] - zeros < 0.4 * network["params"]
    assert network["flops_kept"] == 1
    assert network["flops_sparse"] == callback.report.rows[-1]["prune/flops_sparse"] < network["flops"]
    masks = {name: (int(mask.sum()), mask.numel()) for name, mask in callback.plan.masks.items()}
    assert {row["name"]: (row["kept"], row["dense"]) for row in bars["rows"]} == masks
    order = [name for name, _ in trainer.lightning_module.named_parameters() if name in masks]
    assert [row["name"] for row in bars["rows"]] == order


def test_factorised_checkpoint_says_its_ranks(saved, tmp_path):
    callback = LRPET(0.6)
    path, trainer = saved(callback)
    said = report(tmp_path, path)[1]
    (bars,) = said["architectures"]
    assert bars["of"] == "singular values"
    assert {row["name"]: row["kept"] for row in bars["rows"]} == dict(callback.plan.ranks)
    # conv1 has 12 filters of 6 * 9 weights: 12 singular values
    assert {row["name"]: row["dense"] for row in bars["rows"]}["conv1"] == 12
    model = trainer.lightning_module
    assert said["networks"][1]["flops"] == count(model, model.example_input_array).flops


def test_arguments_come_from_the_checkpoint_and_those_given_go_over_them(saved, tmp_path, tiny_net, capsys):
    path, _ = saved(L1Filter(0.5, schedule=AT_3), model=tiny_net(width=4))
    said = report(tmp_path, path)[1]
    assert said["networks"][0]["params"] == sum(p.numel() for p in tiny_net(width=4).parameters())
    capsys.readouterr()
    assert report(tmp_path, path, "--arguments", '{"width": 9}')[0] == 1
    error = capsys.readouterr().err
    assert f"{path}: it was pruned from a network whose" in error
    assert error.count("\n") == 1


def test_checkpoints_of_one_name_are_told_apart_and_a_dense_one_is_tested_too(saved, tmp_path):
    first, _ = saved(L1Filter(0.5, schedule=AT_3), name="a/last.ckpt")
    second, trainer = saved(name="b/last.ckpt")
    said = report(tmp_path, first, second, "--data", "own_models.Data")[1]
    assert [network["name"] for network in said["networks"]] == ["dense", "a/last", "b/last"]
    dense, _, trained = said["networks"]
    assert (trained["params_kept"], dense["tested"]) == (1, {})
    (found,) = trainer.test(trainer.lightning_module, sys.modules["own_models"].Data(), verbose=False)
    assert trained["tested"] == pytest.approx(found)
    assert [one["network"] for one in said["prunings"]] == ["a/last"]
    assert len(said["explanations"]) == 1


def test_times_are_held_against_the_dense_network(saved, tmp_path):
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    out = tmp_path / "out"
    words = ["--model", "own_models.TinyNet", "--repeats", "3", "--batch-sizes", "2", "5", "--out", str(out)]
    assert main(["report", str(path), *words]) == 0
    dense, pruned = json.loads((out / "report.json").read_text("utf-8"))["networks"]
    assert list(pruned["latency_ms"]) == ["2", "5"]
    ratio = dense["latency_ms"]["5"]["median"] / pruned["latency_ms"]["5"]["median"]
    assert pruned["latency_ms"]["5"]["speed_up"] == pytest.approx(ratio)


def test_the_command_on_the_page_makes_the_page_again(saved, tmp_path, monkeypatch):
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    said = report(tmp_path, path, "--arguments", '{"optimizer": "adam"}')[1]
    words = shlex.split(said["command"])
    assert words[:2] == ["lightning-prune", "report"]
    assert main(words[1:]) == 0
    again = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert again == said


def rows(folder, *changes):
    """A comparison's rows.csv; a row has what is given and the rest at fixed values."""
    base = {
        "method": "dense", "variant": "dense", "kind": "", "keep": 1.0, "of": "flops", "seed": 0, "start": "trained",
        "epochs": 1, "epochs_total": 2, "metric": "acc", "accuracy": 0.9, "best_accuracy": 0.9, "best_epoch": 1,
        "params": 100, "params_kept": 1.0, "nnz": 100, "flops": 1000, "flops_kept": 1.0, "flops_sparse": 1000.0,
        "bytes": 500, "latency_ms": 1.0, "train_flops": 1e6, "prune_flops": 0, "score_seconds": 0.0, "seconds": 1.0,
        "versions": "torch",
    }  # fmt: skip
    folder.mkdir()
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([{**base, **change} for change in changes])
    return folder


def test_comparison_shows_means_spread_and_front(tmp_path):
    good = {"method": "L1Filter", "variant": "finetuned", "kind": "channels", "keep": 0.5, "flops": 500}
    folder = rows(
        tmp_path / "compared",
        {},
        {**good, "accuracy": 0.84},
        {**good, "accuracy": 0.88, "seed": 1},
        {**good, "method": "Magnitude", "accuracy": 0.8, "flops": 600},
        {**good, "method": "CHIP", "error": "ValueError: too <b>bad</b>"},
    )
    said = report(tmp_path, "--compare", folder)[1]["compare"]
    points = {p["method"]: p for p in said["panels"][0]["points"]}
    assert said["panels"][0]["dense"] == pytest.approx(90)
    # mean of 84 and 88, and sqrt(2^2 + 2^2) with n - 1 = 1 below
    assert (points["L1Filter"]["accuracy"], points["L1Filter"]["spread"]) == pytest.approx((86, 8**0.5))
    assert {name for name, point in points.items() if point["on_front"]} == {"dense", "L1Filter"}
    assert [(one["run"], one["error"]) for one in said["failed"]] == [("CHIP", "ValueError: too <b>bad</b>")]
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "&lt;b&gt;bad" in html
    assert "86.00 ± 2.83" in html


def test_a_group_named_as_a_script_is_text(saved, tmp_path):
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    state = torch.load(path, weights_only=True)
    (own,) = [value for key, value in state["callbacks"].items() if key.startswith("L1Filter")]
    own["arguments"] = {"budget": "<script>alert(1)</script>"}
    own["scores"] = {"<script>alert(2)</script>": {"low": 0.0, "high": 1.0, "kept": [1] * BINS, "gone": [0] * BINS}}
    torch.save(state, path)
    assert report(tmp_path, path)[0] == 0
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<script>" not in html
    assert html.count("&lt;script&gt;alert(1)") == 1
    assert html.count("&lt;script&gt;alert(2)") == 2  # beside the picture, and in what a screen reader says of it


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: own.update(scores={"a": {"low": 0.0}}), r"'scores'.*'high'.* is missing"),
        (lambda own: own["scores"].update(a={"low": 0.0, "high": 1.0, "kept": [-1], "gone": [1]}), "no histogram"),
        (lambda own: own["scores"].update(a={"low": 0.0, "high": 1.0, "kept": [], "gone": []}), "no histogram"),
        (lambda own: own.update(rows=[{"step": "x"}]), "'step'.* must be a number"),
        (lambda own: own.pop("seed"), "'seed' is missing"),
    ],
)
def test_a_state_that_is_not_as_written_is_an_error_of_one_line(saved, tmp_path, capsys, change, said):
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    state = torch.load(path, weights_only=True)
    change(next(value for key, value in state["callbacks"].items() if key.startswith("L1Filter")))
    torch.save(state, path)
    capsys.readouterr()
    assert report(tmp_path, path) == (1, None)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error)


def test_rows_that_are_not_finite_are_left_out(saved, tmp_path):
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    state = torch.load(path, weights_only=True)
    own = next(value for key, value in state["callbacks"].items() if key.startswith("L1Filter"))
    own["rows"] += [{"step": float("nan")}, {"step": 5.0, "prune/flops_kept": float("nan")}]
    own["seconds"] = float("inf")
    torch.save(state, path)
    status, said = report(tmp_path, path)
    assert status == 0
    assert [row["step"] for row in said["prunings"][0]["rows"]] == [3.0, 5.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to report on"),
        (["none.ckpt"], "give --model"),
        (["none.ckpt", "--model", "own_models.TinyNet"], "none.ckpt"),
        (["torn.ckpt", "--model", "own_models.TinyNet"], "torn.ckpt could not be read as a checkpoint"),
        (["--compare", "none"], "none has no rows.csv"),
        (["--compare", "bad"], "does not hold rows of lightning-prune compare"),
        (["--compare", "empty"], "holds no row"),
        (["none.ckpt", "--model", "own_models.TinyNet", "--repeats", "-1"], "--repeats at least 0"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.ckpt").write_bytes(b"not a checkpoint")
    for name, text in (("bad", "method,seed\nL1Filter,x\n"), ("empty", ",".join(COLUMNS) + "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text(text, encoding="utf-8")
    assert main(["report", *words, "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_config_makes_the_model(fit, tmp_path, make_loader):
    trainer = fit(L1Filter(0.5, schedule=AT_3), model=DigitsNet(width=4), limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  class_path: lightning_prune.commands.digits.DigitsNet\n  init_args:\n    width: 4\n")
    words = [str(tmp_path / "pruned.ckpt"), "--config", str(config), "--repeats", "0", "--out", str(tmp_path / "out")]
    assert main(["report", *words]) == 0
    said = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert said["networks"][0]["params"] == sum(p.numel() for p in DigitsNet(width=4).parameters())


# in ONNX Runtime


def test_networks_run_in_float32_and_int8_beside_themselves(saved, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the extra 'export'")
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    model, out = ["--model", "own_models.TinyNet", "--data", "own_models.Data"], tmp_path / "out"
    status = main(["report", str(path), *model, "--int8", "--repeats", "2", "--out", str(out)])
    assert status == 0, capsys.readouterr().err
    written = json.loads((out / "report.json").read_text("utf-8"))
    rows = {row["name"]: row for row in written["networks"]}
    names = ["dense", "pruned"]
    assert list(rows) == [*names, *(f"{n}, ONNX Runtime{kind}" for n in names for kind in ("", ", int8"))]
    whole, plain, small = (rows[f"pruned{kind}"] for kind in ("", ", ONNX Runtime", ", ONNX Runtime, int8"))
    assert plain["flops"] == small["flops"] == whole["flops"] < rows["dense"]["flops"]
    assert plain["tested"]["test_loss"] == pytest.approx(whole["tested"]["test_loss"], rel=1e-4)
    assert small["tested"]["test_loss"] == pytest.approx(whole["tested"]["test_loss"], rel=0.1)
    assert small["tested"]["test_loss"] != whole["tested"]["test_loss"]  # the engine's own, and int8's
    assert rows["dense, ONNX Runtime, int8"]["tested"] == {}  # nobody trained it
    assert set(small["latency_ms"]) == {"1", "32"}
    assert "--int8" in written["command"]


def test_module_whose_test_goes_around_its_forward_is_refused(saved, tmp_path, own_models, tiny_net, capsys):
    pytest.importorskip("onnxruntime", reason="the extra 'export'")

    class Around(tiny_net):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.fc(self.hidden(torch.zeros(1, self.hidden.in_features))).sum())

    own_models.TinyNet = Around
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    status, written = report(tmp_path, path, "--data", "own_models.Data", "--int8")
    assert (status, written) == (1, None)
    assert "test_step of Around does not call self(...)" in capsys.readouterr().err


def test_int8_without_data_is_refused(saved, tmp_path, capsys):
    path, _ = saved(L1Filter(0.5, schedule=AT_3))
    status, _ = report(tmp_path, path, "--int8")
    assert status == 1
    assert "--int8 wants a CHECKPOINT, and --data" in capsys.readouterr().err
