import csv
import io
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import Magnitude, OneShot, sensitivity, trace
from lightning_prune.errors import NothingToPrune
from lightning_prune.figures import sensitivity_figure
from lightning_prune.sensitivity import deviations


def line(*values):
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def total(model):
    return sum(p.abs().sum() for p in model.parameters() if p.ndim > 1)


def test_deviations_are_of_the_survivors_and_of_the_population():
    # std 0.35940 of all (unbiased 0.39370); 0.44969 of (-0.4, 0.5, 0.6), with zeros in place of the others 0.33871
    w = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, 0.6])
    torch.testing.assert_close(deviations(w), w.abs().double() / 0.35940, rtol=1e-4, atol=0)
    alive = w.abs() > 0.35
    torch.testing.assert_close(deviations(w * alive, alive)[3:], w[3:].abs().double() / 0.44969, rtol=1e-4, atol=0)


def test_weights_that_do_not_differ_are_above_every_factor_and_nan_stays_nan():
    assert bool((deviations(torch.full((3,), 0.5)) > 1e300).all())
    assert bool(deviations(torch.tensor([1.0, float("nan")])).isnan().any())


def test_scan_thins_out_one_weight_at_a_time_smallest_first():
    model = two_layers()
    sizes = [p.detach().abs().flatten().sort(descending=True).values for p in (model[0].weight, model[2].weight)]
    scan = sensitivity(model, total, [0.5, 0.2])
    assert scan.densities == (0.5, 0.2)
    assert scan.kept == {"0.weight": (10, 4), "2.weight": (7, 3)}
    for name, own, other in (("0.weight", *sizes), ("2.weight", *reversed(sizes))):
        expected = [float(own[:n].sum() + other.sum()) for n in scan.kept[name]]
        assert list(scan.values[name]) == pytest.approx(expected, rel=1e-6)
    assert scan.dense == pytest.approx(float(sum(s.sum() for s in sizes)), rel=1e-6)


def test_counts_are_exact_with_ties_and_as_the_budget_counts_them():
    scan = sensitivity(nn.Linear(10, 10, bias=False), lambda m: (m.weight != 0).sum(), [0.29])
    assert scan.values == {"weight": (29.0,)}  # 0.29 * 100 is below 29 in floating point
    layer = line(*[0.5] * 10)
    assert sensitivity(layer, lambda m: (m.weight != 0).sum(), [0.3]).values == {"weight": (3.0,)}


def test_everything_is_as_before_also_when_an_evaluation_fails():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def evaluate(net):
        assert not net.training
        net.train()
        out = net(torch.randn(4, 1, 5, 5)).sum()
        calls.append(float(out))
        if len(calls) == 3:
            raise ArithmeticError("the user's own mistake")
        return out

    random = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="own mistake"):
        sensitivity(model, evaluate, [0.9, 0.5])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(random, torch.get_rng_state())


def test_each_evaluation_draws_the_same_numbers():
    drawn = []

    def evaluate(model):
        drawn.append(float(torch.rand(())))
        return 1.0

    sensitivity(two_layers(), evaluate, [0.5])
    assert len(drawn) == 3
    assert len(set(drawn)) == 1


def test_factors_keep_as_many_as_the_densities():
    model = two_layers()
    scan = sensitivity(model, total, [0.9, 0.5, 0.1])
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            kept = [int((deviations(weight) >= q).sum()) for q in scan.factors[name]]
            assert tuple(kept) == scan.kept[name]
    # std of (4, 3, 2, 1) is 1.11803: halfway between 2 and 3, and above 4 if nothing is kept
    factors = sensitivity(line(4.0, 3.0, 2.0, 1.0), total, [0.5, 0.1]).factors["weight"]
    assert factors[0] == pytest.approx(2.5 / 1.11803, rel=1e-5)
    assert factors[1] == pytest.approx(4 / 1.11803, rel=1e-5)
    assert factors[1] > float(deviations(line(4.0, 3.0, 2.0, 1.0).weight).max())


def test_suggestions_stop_at_the_first_density_that_costs_too_much():
    values = {0.8: 0.99, 0.6: 0.95, 0.4: 0.98, 0.2: 0.5}  # 0.4 is within again, but only by luck
    layer = line(*[float(n) for n in range(1, 11)])

    def evaluate(model):
        return values.get(float((model.weight != 0).sum()) / 10, 1.0)

    scan = sensitivity(layer, evaluate, list(values))
    assert scan.keep(0.02) == {"weight": 0.8}
    assert scan.keep(0.06) == {"weight": 0.4}
    assert scan.keep(0.001) == {"weight": 1.0}
    assert scan.quality(0.001) == {"weight": 0.0}
    assert scan.quality(0.06) == {"weight": scan.factors["weight"][2]}
    assert scan.keep(0.0, higher_is_better=False) == {"weight": 0.2}
    with pytest.raises(ValueError, match="at least 0, got -1"):
        scan.keep(-1)


def test_value_that_is_not_a_number_is_never_good_enough():
    layer = line(1.0, 2.0)
    scan = sensitivity(layer, lambda m: float("nan") if (m.weight == 0).any() else 1.0, [0.5])
    assert scan.keep(1e9) == {"weight": 1.0}
    assert json.loads(scan.to_json())["values"] == {"weight": [None]}
    with pytest.raises(ValueError, match="has to be finite"):
        sensitivity(layer, lambda m: math.inf, [0.5])


def test_bad_grids_and_patterns_are_refused():
    for grid in ([], [0.0], [1.0], [0.5, 1.5]):
        with pytest.raises(ValueError, match=r"fraction in \(0, 1\)"):
            sensitivity(two_layers(), total, grid)
    with pytest.raises(ValueError, match="ignore pattern 'fc' matches no"):
        sensitivity(two_layers(), total, [0.5], ignore=["fc"])
    with pytest.raises(NothingToPrune, match="all are ignored"):
        sensitivity(two_layers(), total, [0.5], ignore=["0", "2"])


def test_embeddings_and_norms_are_not_scanned_and_a_graph_says_it_exactly():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm((3, 4)), nn.Linear(4, 2))
    assert list(sensitivity(model, total, [0.5]).values) == ["2.weight"]
    net = two_layers()
    net.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    assert list(sensitivity(net, total, [0.5]).values) == ["unused", "0.weight", "2.weight"]
    assert list(sensitivity(net, total, [0.5], graph=trace(net, torch.randn(2, 4))).values) == ["0.weight", "2.weight"]


def test_scan_as_markdown_csv_and_json():
    scan = sensitivity(two_layers(), total, [0.5, 0.2], ignore=["0"])
    header, _, row = scan.to_markdown().splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["weight", "entries", "1", "0.5", "0.2"]
    assert row.startswith("| 2.weight |")
    rows = list(csv.DictReader(io.StringIO(scan.to_csv())))
    assert [(r["density"], r["kept"]) for r in rows] == [("1.0", "15"), ("0.5", "7"), ("0.2", "3")]
    assert [float(r["value"]) for r in rows] == [scan.dense, *scan.values["2.weight"]]
    assert json.loads(scan.to_json()) == scan.to_dict()
    assert str(scan) == scan.to_markdown()


def test_method_with_the_factors_of_a_scan_keeps_what_the_scan_kept(fit, tiny_net):
    model = tiny_net()
    scan = sensitivity(model, total, [0.7, 0.3], graph=trace(model, model.example_input_array))
    quality = {name: factors[1] for name, factors in scan.factors.items()}
    callback = Magnitude(quality=quality, schedule=OneShot(0, unit="step"))
    fit(callback, model=model)
    assert {name: int(mask.sum()) for name, mask in callback.plan.masks.items()} == {
        name: kept[1] for name, kept in scan.kept.items()
    }


def test_figure_shows_the_most_sensitive_layers_and_counts_the_others():
    values = {f"layer{i}": (1.0, 1.0 - 0.1 * i) for i in range(9)}
    figure = sensitivity_figure(values, [0.5, 0.1], 1.0, "accuracy")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["all weights: 1", *[f"layer{i}" for i in (8, 7, 6, 5, 4, 3)], "3 less sensitive"]
    axes = figure.axes[0]
    assert axes.get_ylabel() == "accuracy"
    left, right = axes.get_xlim()
    assert left > right  # thinner to the right
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn["layer8"] == pytest.approx([1.0, 1.0, 0.2])


def test_figure_of_few_layers_counts_no_others_and_bad_ones_are_refused():
    figure = sensitivity_figure({"a": (0.5,)}, [0.5], 1.0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all weights: 1", "a"]
    with pytest.raises(ValueError, match=r"needs 1 values for each layer, got \{\}"):
        sensitivity_figure({}, [0.5], 1.0)
    with pytest.raises(ValueError, match="'a': 2"):
        sensitivity_figure({"a": (1.0, 2.0)}, [0.5], 1.0)


def test_example_runs(monkeypatch, capsys, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "sensitivity.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--fast", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "sensitivity.csv").read_text("utf-8").startswith("weight,entries,density")
    assert (tmp_path / "sensitivity.png").stat().st_size > 10_000
    assert "| stem.weight" in capsys.readouterr().out
