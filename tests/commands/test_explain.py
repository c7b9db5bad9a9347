import json

import pytest
import torch
from torch import nn

from lightning_prune.commands import main
from lightning_prune.commands.explain import example_inputs, from_config
from lightning_prune.cost import count
from lightning_prune.planning import plan
from lightning_prune.surgery import cut, trace


class Wide(nn.Module):
    """Found by its dotted path, as a user's own module would be."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.last(self.first(x).relu())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, words, scale):
        return self.head(self.hidden(self.embedding(words) * scale).relu())


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """This file under a plain name, whatever pytest calls it."""
    import sys
    import types

    module = types.ModuleType("own_models")
    module.Wide, module.Words = Wide, Words
    monkeypatch.setitem(sys.modules, "own_models", module)


def explain(tmp_path, *arguments):
    status = main(["explain", *arguments, "--out", str(tmp_path)])
    written = tmp_path / "explain.json"
    return status, json.loads(written.read_text("utf-8")) if written.exists() else None


def test_groups_frozen_layers_and_costs_are_said(tmp_path, capsys):
    status, said = explain(tmp_path, "--model", "own_models.Wide", "--input", "1,4")
    text = capsys.readouterr().out
    assert status == 0
    # 4 * 8 + 8 * 2 multiply-accumulates; 8 biases and 2 more to the parameters
    assert (said["flops"], said["params"]) == (48, 58)
    assert [(group["name"], group["channels"], group["producers"]) for group in said["groups"]] == [
        ("first", 8, ["first"])
    ]
    assert said["groups"][0]["members"] == ["first.weight[0]", "first.bias[0]", "last.weight[1]"]
    assert said["frozen"] == {"last": "it is an output of the model"}
    assert "last: it is an output of the model" in text
    assert text.startswith((tmp_path / "explain.txt").read_text("utf-8"))


def test_worth_links_and_what_would_free_a_layer_are_written(tmp_path, capsys):
    _, said = explain(tmp_path, "--model", "own_models.Wide", "--input", "1,4")
    (group,) = said["groups"]
    # a channel has 4 + 2 weights and a bias
    assert group["each"] == {"flops": 6, "params": 7}
    assert group["all_but_one"] == {"flops": 42, "params": 49}
    assert group["consumers"] == ["last"]
    (frozen,) = said["freezes"]
    assert frozen["names"] == ["last"]
    assert frozen["remedy"] in capsys.readouterr().out
    assert said["links"] == []


def test_picture_is_drawn_beside_the_text_and_where_asked(tmp_path, capsys):
    asked = tmp_path / "new" / "groups.svg"
    status, _ = explain(tmp_path / "out", "--model", "own_models.Wide", "--input", "1,4", "--figure", str(asked))
    assert status == 0
    assert asked.read_text("utf-8").startswith("<?xml")
    assert (tmp_path / "out" / "explain.png").read_bytes().startswith(b"\x89PNG")
    assert f"written: {asked}" in capsys.readouterr().out


def test_picture_is_drawn_when_nothing_may_go(tmp_path):
    figure = tmp_path / "groups.png"
    keywords = '{"in_features": 3, "out_features": 4}'
    line = ["--model", "torch.nn.Linear", "--arguments", keywords, "--input", "1,3", "--figure", str(figure)]
    assert main(["explain", *line]) == 1
    assert figure.exists()


def test_prediction_is_what_the_cut_model_counts(tmp_path):
    torch.manual_seed(3)
    status, said = explain(
        tmp_path, "--model", "own_models.Wide", "--arguments", '{"width": 20}', "--input", "2,4", "--keep", "0.33"
    )
    assert status == 0
    # each of 20 channels costs 4 + 2 flops of 120: 6 of them are 36 flops, 0.3; 7 would be 0.35
    assert said["predicted"]["groups"] == {"first": 6}
    assert said["predicted"]["flops_kept"] == pytest.approx(0.3)
    model, inputs = Wide(20), torch.zeros(1, 4)
    cut(model, plan(trace(model, inputs), "l1_filter", 0.33), example_inputs=inputs)
    cost = count(model, inputs)
    assert (said["predicted"]["flops"], said["predicted"]["params"]) == (cost.flops, cost.params)


def test_budget_may_be_of_parameters(tmp_path):
    _, said = explain(tmp_path, "--model", "own_models.Wide", "--input", "1,4", "--keep", "0.5", "--of", "params")
    # a channel has 4 + 1 + 2 parameters of 58 = 7 * 8 + 2: 3 channels are 23, 4 are 30, and half is 29
    assert said["predicted"]["groups"] == {"first": 3}
    assert said["predicted"]["of"] == "params"


def test_several_inputs_and_integers_are_positional(tmp_path):
    status, said = explain(tmp_path, "--model", "own_models.Words", "--input", "1,5:int64", "--input", "1,5,1")
    assert status == 0
    assert "hidden" in {group["name"] for group in said["groups"]}


def test_model_of_a_config_is_made_as_the_config_says(tmp_path):
    config = tmp_path / "digits.yaml"
    config.write_text(
        "trainer: {max_epochs: 3}\n"
        "model: {class_path: lightning_prune.commands.digits.DigitsNet, init_args: {width: 4}}\n",
        encoding="utf-8",
    )
    name, model = from_config(config)
    assert name == "lightning_prune.commands.digits.DigitsNet"
    assert model.stem.out_channels == 4
    status, said = explain(tmp_path, "--config", str(config), "--method", "RandomChannels")
    assert status == 0
    assert said["predicted"]["method"] == "RandomChannels"
    assert 0.3 < said["predicted"]["flops_kept"] <= 0.5


def test_where_nothing_may_go_the_reasons_come_before_the_error(tmp_path, capsys):
    status, said = explain(
        tmp_path, "--model", "torch.nn.Linear", "--arguments", '{"in_features": 3, "out_features": 4}', "--input", "1,3"
    )
    shown = capsys.readouterr()
    assert status == 1
    assert "weight: it is an output of the model" in shown.out
    assert shown.err == (
        "lightning-prune explain: error: nothing of torch.nn.Linear may go; the reasons are listed above\n"
    )
    assert "predicted" not in said


def test_budget_out_of_reach_is_an_error_after_the_groups(tmp_path, capsys):
    status, _ = explain(tmp_path, "--model", "own_models.Wide", "--input", "1,4", "--keep", "0.01")
    shown = capsys.readouterr()
    assert status == 1
    assert "first: 8 channels" in shown.out
    assert "with the fewest channels allowed 0.1250 are left" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "own_models.Wide"], "Wide has no example_input_array; give --input"),
        (["--model", "own_models.Wild", "--input", "1,4"], "has no attribute 'Wild'"),
        (["--model", "no_models.Wide", "--input", "1,4"], "No module named 'no_models'"),
        (["--model", "Wide", "--input", "1,4"], "wants a dotted path such as torchvision.models.resnet18, got 'Wide'"),
        (["--model", "torch.nn.Linear", "--input", "1,4"], "cannot be called with {}"),
        (["--model", "torch.pi", "--input", "1,4"], "is float, which cannot be called"),
        (["--model", "builtins.dict", "--input", "1,4"], "makes dict, but a torch.nn.Module is wanted"),
        (["--model", "own_models.Wide", "--input", "1x4"], "got '1x4'"),
        (["--model", "own_models.Wide", "--input", "1,4:half8"], "got '1,4:half8'"),
        (["--model", "own_models.Wide", "--input", "0,4"], "got '0,4'"),
        (["--model", "own_models.Wide", "--input", "1,5"], "pass --input with what its forward takes"),
        (["--model", "own_models.Wide", "--input", "1,4", "--arguments", "8"], "must be a JSON object"),
        (["--model", "own_models.Wide", "--input", "1,4", "--arguments", "{"], "must be JSON such as"),
        (["--model", "own_models.Wide", "--input", "1,4", "--keep", "1.5"], "keep must be in (0, 1]"),
        (["--model", "own_models.Wide", "--input", "1,4", "--method", "magnitude"], "Magnitude needs a training loop"),
        (["--model", "own_models.Wide", "--input", "1,4", "--figure", "g.bmp"], "such as groups.png, one of "),
        (["--config", "no.yaml"], "No such file or directory: 'no.yaml'"),
    ],
)
def test_what_cannot_be_explained_is_one_line_and_status_one(arguments, message, capsys):
    assert main(["explain", *arguments]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_config_without_a_model_or_with_a_wrong_one_is_refused(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("trainer: {max_epochs: 3}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no 'model' section"):
        from_config(config)
    config.write_text("model: {class_path: own_models.Wild}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run.yaml: Parser key .model.*has no attribute 'Wild'"):
        from_config(config)


def test_example_inputs_are_noise_for_floats_and_zeros_for_integers():
    noise, zeros = example_inputs(nn.Identity(), ["2,3", "4:int64"])
    assert noise.shape == (2, 3)
    assert noise.dtype == torch.float32
    assert noise.unique().numel() == 6  # a cut is proved on it, so it must tell channels apart
    assert torch.equal(zeros, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(example_inputs(nn.Identity(), ["2,3"])[0], noise)


def test_model_that_has_an_example_needs_no_input():
    model = nn.Identity()
    model.example_input_array = torch.ones(1, 2)
    assert example_inputs(model, None) is model.example_input_array
    assert torch.equal(example_inputs(model, ["1,1:int32"])[0], torch.zeros(1, 1, dtype=torch.int32))
