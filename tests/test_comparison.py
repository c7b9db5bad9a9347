import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.image import imread

import lightning_prune
from lightning_prune import Budget, L1Filter, OneShot, Plan, WeightPruner, count, scratch_epochs
from lightning_prune.commands.digits import DigitsNet
from lightning_prune.comparison import Protocol, Run, compare, engine, pareto_front, report, running, wanted
from lightning_prune.comparison.meters import PASSES, ScoringMeter, TrainingMeter
from lightning_prune.comparison.picture import pareto_figure
from lightning_prune.comparison.table import summarised, verdicts

DIGITS = "lightning_prune.commands.digits"
TINY = {
    "model": {"class_path": f"{DIGITS}.DigitsNet", "init_args": {"width": 4}},
    "data": {"class_path": f"{DIGITS}.DigitsData"},
    "trainer": {"accelerator": "cpu", "limit_train_batches": 8},
}
SAMPLES = 8 * 64  # an epoch


@pytest.fixture(autouse=True)
def _same_seed_afterwards(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def tiny(**settings):
    return Protocol(TINY, **{"epochs": 1, "finetune": 1, "repeats": 0, **settings})


def row(method, variant, seed, accuracy, **more):
    named = {"method": method, "variant": variant, "kind": "channels", "keep": 0.5, "of": "flops", "seed": seed}
    costs = {"epochs": 1, "flops": 50, "flops_sparse": 50.0, "train_flops": 1.0, "nnz": 5, "bytes": 9, "error": ""}
    return {**named, **costs, "accuracy": accuracy, "metric": "test/acc", "versions": "", **more}


# what is run


def test_runs_are_dense_random_methods_and_then_scratch():
    runs = wanted(["l1_filter", "Magnitude", "LRPET"], {"channels": [0.5], "weights": [0.1], "ranks": [0.4]}, [3])
    assert [(run.method, run.variant, run.keep, run.of) for run in runs] == [
        ("dense", "dense", 1.0, "flops"),
        ("RandomChannels", "finetuned", 0.5, "flops"),
        ("RandomWeights", "finetuned", 0.1, "units"),
        ("L1Filter", "finetuned", 0.5, "flops"),
        ("Magnitude", "finetuned", 0.1, "units"),
        ("LRPET", "finetuned", 0.4, "flops"),
        ("L1Filter", "scratch_e", 0.5, "flops"),
        ("L1Filter", "scratch_b", 0.5, "flops"),
        ("Magnitude", "scratch_e", 0.1, "units"),
        ("Magnitude", "scratch_b", 0.1, "units"),
        ("LRPET", "scratch_e", 0.4, "flops"),
        ("LRPET", "scratch_b", 0.4, "flops"),
    ]
    assert {run.seed for run in runs} == {3}
    assert len({run.key for run in runs}) == len(runs)


def test_runs_of_all_methods_leave_out_the_control_and_kinds_without_a_budget():
    runs = wanted(None, {"channels": [Budget(0.5, "params")], "weights": []}, [0], scratch=["L1Filter"])
    assert {run.method for run in runs} >= {"dense", "RandomChannels", "L1Filter", "ThiNet"}
    assert not {run.method for run in runs} & {"Scratch", "Magnitude", "RandomWeights", "LRPET"}
    assert {run.of for run in runs if run.method != "dense"} == {"params"}
    assert {run.method for run in runs if run.variant.startswith("scratch")} == {"L1Filter"}
    assert not any(run.variant.startswith("scratch") for run in wanted(None, {"ranks": [0.5]}, [0], scratch="none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["nothing"],), "no method 'nothing'"),
        ((["Scratch"],), "Scratch is a control"),
        ((["Magnitude"],), "Magnitude removes weights, for which no budget"),
        ((["L1Filter"], ["ThiNet"]), "--scratch names ThiNet, which is not compared"),
    ],
)
def test_runs_that_cannot_be_are_refused(arguments, message):
    methods, *scratch = arguments
    with pytest.raises(ValueError, match=message):
        wanted(methods, {"channels": [0.5]}, [0], *scratch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"model": TINY["model"]}}, "no 'data' section; there are model"),
        ({"config": {**TINY, "trainer": {"max_epochs": 3}}}, "sets 'max_epochs'; leave it out: --epochs"),
        ({"finetune": 0}, "finetune must be at least 1, got 0"),
        ({"cap": 0.5}, "cap must be at least 1"),
        ({"start": {"L1Filter": "somewhere"}}, "start of L1Filter must be 'trained' or 'initial'"),
    ],
)
def test_protocol_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"config": TINY, **settings})


def test_methods_start_where_their_papers_do_unless_told():
    protocol = tiny(start={"SNIP": "trained"})
    names = ("L1Filter", "Magnitude", "RigL", "LotteryTicket", "LRPET", "SNIP")
    assert [protocol.start_of(name) for name in names] == [
        "trained", "trained", "initial", "initial", "initial", "trained",
    ]  # fmt: skip


def test_config_that_cannot_be_read_is_said_in_a_line():
    wrong = {**TINY, "model": {"class_path": f"{DIGITS}.DigitsNet", "init_args": {"wdith": 4}}}
    with pytest.raises(ValueError, match=r"the config: .*wdith"):
        Protocol(wrong).build(0)


def test_data_get_the_seed_of_the_run_unless_the_config_says_one():
    assert tiny().build(5)[1].seed == 5
    fixed = {**TINY, "data": {"class_path": f"{DIGITS}.DigitsData", "init_args": {"seed": 2}}}
    assert Protocol(fixed).build(5)[1].seed == 2


# meters


def test_training_is_counted_at_the_cost_of_the_time(fit):
    pruner = L1Filter(0.5, schedule=OneShot(3, unit="step"))
    dense = count(DigitsNet(), torch.zeros(1, 1, 8, 8)).flops
    meter = TrainingMeter(dense, 0, pruner)
    fit([pruner, meter], model=DigitsNet())
    small = pruner.report.after.flops
    # 8 batches of 8: three before the cut, five after it
    assert meter.samples == 64
    assert meter.flops == meter.flops_sparse == 3 * 8 * (3 * dense + 5 * small)
    assert PASSES == 3


def test_masked_training_costs_the_same_and_less_in_theory(fit):
    class Half(WeightPruner):
        def score(self, name, weight):
            return weight.abs()

    pruner = Half(0.5, schedule=OneShot(3, unit="step"))
    meter = TrainingMeter(1000, 0, pruner)
    trainer = fit([pruner, meter])
    dense, last = pruner.dense_cost.flops, pruner.report.rows[-1]
    assert count(trainer.lightning_module, torch.zeros(1, 1, 8, 8)).flops == dense
    assert meter.flops == 3 * 8 * (3 * 1000 + 5 * dense)
    assert meter.flops_sparse == pytest.approx(3 * 8 * (3 * 1000 + 5 * last["prune/flops_sparse"]))
    assert last["prune/flops_sparse"] < 0.8 * dense


def test_order_of_data_is_the_same_whatever_a_method_draws(fit, make_loader):
    class Draws(Callback):
        def __init__(self, numbers):
            self.numbers, self.labels = numbers, []

        def on_train_start(self, trainer, model):
            torch.rand(self.numbers)

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            self.labels.append(batch[0].sum().item())
            torch.rand(self.numbers)

    seen = []
    for numbers, meter in ((1, True), (2, True), (1, False), (2, False)):
        seen.append(Draws(numbers))
        meters = [TrainingMeter(1, seed=4)] if meter else []
        fit([seen[-1], *meters], loader=make_loader(shuffle=True), max_epochs=3)
    assert seen[0].labels == seen[1].labels
    assert seen[0].labels[:4] != seen[0].labels[4:8]  # and another one in each epoch
    assert seen[2].labels != seen[3].labels  # which would not be so by itself


def test_best_epoch_is_one_after_the_last_event():
    meter = TrainingMeter(1, 0)
    meter.validations = [(0, {"val/acc": 0.9}, False), (1, {"val/acc": 0.7}, True), (2, {"val/acc": 0.7}, True)]
    assert meter.best("test/acc") == (0.7, 1)  # the dense network's 0.9 does not count; of equal ones the first
    assert meter.best("accuracy") == (0.7, 1)  # the only one with acc in its name
    meter.validations = [(0, {"val/acc": 0.9, "val/acc5": 1.0}, True)]
    assert meter.best("top") is None


def test_flops_of_events_are_those_of_what_they_compute(fit):
    class Costly(WeightPruner):
        def score(self, name, weight):
            with torch.enable_grad():
                factor = torch.zeros(5, 6, requires_grad=True)
                (torch.zeros(4, 5) @ factor).sum().backward()  # 4 * 5 * 6 forward, and the same for the gradient
            return weight.abs()

    pruner, meter = Costly(0.5, schedule=OneShot(3, unit="step")), ScoringMeter()
    meter.watch(pruner)
    fit(pruner)
    assert meter.flops == 5 * 2 * 120  # five matrices in the network, one event


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says the peak of a process")
def test_peak_memory_is_of_the_event_alone(fit):
    class Large(WeightPruner):
        def score(self, name, weight):
            if name == "fc.weight":
                torch.ones(2**24)  # 67 MB
            return weight.abs()

    ballast = torch.ones(2**25)
    blocks = [torch.ones(2**14) for _ in range(2000)]
    last = blocks[-1]  # above the others in the heap, which so keeps what they leave
    del blocks
    peaks = []
    for cls in (Large, type("Small", (WeightPruner,), {"score": lambda self, name, weight: weight.abs()})):
        pruner, meter = cls(0.5), ScoringMeter()
        meter.watch(pruner)
        fit(pruner)
        peaks.append(meter.peak_bytes)
    assert (len(ballast), len(last)) == (2**25, 2**14)
    assert 60e6 < peaks[0] < 100e6
    assert peaks[1] < 40e6


# tables


def test_front_is_what_nothing_else_beats():
    points = {"A": (10, 90), "B": (5, 89), "C": (6, 88), "D": (20, 91), "E": (12, 90)}
    assert ["ABCDE"[i] for i in pareto_front(list(points.values()))] == ["B", "A", "D"]
    assert pareto_front([(1, 5), (1, 7), (1, 7), (0, 7)]) == [3]
    assert pareto_front([]) == []


def test_summary_has_means_sample_deviations_and_deltas_of_the_same_seed():
    rows = [row("dense", "dense", 0, 0.9), row("dense", "dense", 1, 0.8)]
    rows += [row("L1Filter", "finetuned", 0, 0.8), row("L1Filter", "finetuned", 1, 0.75)]
    rows += [{**row("L1Filter", "finetuned", 2, None), "error": "ValueError: no"}]
    dense, line = summarised(rows)
    assert (line["runs"], line["failed"]) == (2, 1)
    assert line["accuracy"] == pytest.approx(0.775)
    assert line["accuracy_std"] == pytest.approx(0.05 / math.sqrt(2))  # n - 1
    assert line["delta"] == pytest.approx((-0.1 - 0.05) / 2)  # by seed, so that seeds that are hard for all cancel
    assert line["delta_std"] == pytest.approx(0.05 / math.sqrt(2))
    assert dense["delta"] == 0
    assert summarised(rows[:1])[0]["accuracy_std"] is None


@pytest.mark.parametrize(
    ("tuned", "scratch", "said"),
    [
        # deviations of 0.01 and 0.01 * sqrt(2) each over two seeds: combined sqrt(1 + 1) * 0.01 = 0.01414
        ([0.90 - 0.00707107, 0.90 + 0.00707107], [0.88 - 0.00707107, 0.88 + 0.00707107], "weights matter"),
        ([0.89 - 0.00707107, 0.89 + 0.00707107], [0.88 - 0.00707107, 0.88 + 0.00707107], "no evidence"),
        ([0.80, 0.80], [0.90, 0.90], "no evidence"),
        ([0.90], [0.10], "one seed, no verdict"),
    ],
)
def test_weights_matter_only_beyond_the_combined_deviation(tuned, scratch, said):
    rows = [row("L1Filter", "finetuned", seed, a) for seed, a in enumerate(tuned)]
    rows += [row("L1Filter", "scratch_b", seed, a) for seed, a in enumerate(scratch)]
    rows += [row("L1Filter", "scratch_b", 9, 0.0)]  # of a seed that the method does not have
    (verdict,) = verdicts(rows)
    assert verdict["verdict"] == said
    assert verdict["runs"] == len(tuned)


def test_picture_has_a_point_a_row_and_leaves_out_what_was_not_measured():
    rows = [row("dense", "dense", 0, 0.9, flops=100, flops_sparse=100.0), row("L1Filter", "finetuned", 0, 0.8)]
    figure = pareto_figure(summarised([*rows, row("L1Filter", "scratch_b", 0, 0.7)]))
    flops, _, milliseconds, _ = figure.axes
    assert len(flops.containers) == 3
    assert len(milliseconds.containers) == 0
    front = flops.lines[-1]
    assert front.get_xydata()[0].tolist() == [50, 80]
    assert front.get_xydata()[-1].tolist() == [100, 90]


def test_one_bad_row_does_not_press_the_others_together():
    rows = [row("dense", "dense", 0, 0.99), row("L1Filter", "finetuned", 0, 0.98), row("SOSP", "finetuned", 0, 0.5)]
    axes = pareto_figure(summarised(rows)).axes[0]
    bad, good, best = axes.transData.transform([(0, 50), (0, 98), (0, 99)])[:, 1]
    assert best - good > 0.1 * (best - bad)  # where a linear scale has a fiftieth
    shown = " ".join(label.get_text() for label in axes.get_yticklabels())
    assert shown == "40 60 70 80 90 95 97 98 99 99.5 100"
    assert axes.get_ylim()[0] < 50


def test_metric_that_is_no_share_has_a_linear_scale():
    axes = pareto_figure(summarised([row("dense", "dense", 0, 3.5), row("L1Filter", "finetuned", 0, 2.0)])).axes[0]
    assert axes.get_yscale() == "linear"


# the whole


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two methods, and everything that belongs beside them."""
    out, lines = tmp_path_factory.mktemp("compared"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        runs = wanted(["L1Filter", "RigL"], {"channels": [0.5], "weights": [0.1]}, [0])
        rows = compare(tiny(repeats=2), runs, out, say=lines.append)
    return {f"{r['method']}/{r['variant']}": r for r in rows}, out, lines


def test_every_row_is_there_without_an_error(compared):
    rows, _, lines = compared
    assert list(rows) == [
        "dense/dense",
        "RandomChannels/finetuned",
        "RandomWeights/finetuned",
        "L1Filter/finetuned",
        "RigL/finetuned",
        "L1Filter/scratch_e",
        "L1Filter/scratch_b",
        "RigL/scratch_e",
        "RigL/scratch_b",
    ]
    assert [r["error"] for r in rows.values()] == [""] * 9
    assert lines[-1].startswith("[9 of 9] Scratch-B of RigL, 0.1 of the units, seed 0: test/acc ")
    assert " left] dense, seed 0: " in lines[2]


def test_epochs_are_the_protocols(compared):
    rows, _, _ = compared
    dense = rows["dense/dense"]["flops"]
    small, sparse = rows["L1Filter/finetuned"]["flops"], rows["RigL/finetuned"]["flops_sparse"]
    assert {name: r["epochs"] for name, r in rows.items()} == {
        "dense/dense": 1,
        "RandomChannels/finetuned": 1,
        "RandomWeights/finetuned": 1,
        "L1Filter/finetuned": 1,
        "RigL/finetuned": 2,  # it trains sparse from the start
        "L1Filter/scratch_e": 2,
        "L1Filter/scratch_b": scratch_epochs(2, dense, small),
        "RigL/scratch_e": 2,
        "RigL/scratch_b": scratch_epochs(2, dense, sparse),
    }
    assert {r["epochs_total"] for name, r in rows.items() if not name.endswith("_b")} == {2}


def test_flops_of_training_are_of_the_whole_path(compared):
    rows, _, _ = compared
    dense, small = rows["dense/dense"]["flops"], rows["L1Filter/finetuned"]["flops"]
    epoch = 3 * SAMPLES
    assert rows["dense/dense"]["train_flops"] == 2 * epoch * dense
    assert rows["RigL/finetuned"]["train_flops"] == 2 * epoch * dense + rows["RigL/finetuned"]["prune_flops"]
    # one cut at half of eight steps: four are dense
    tuned = epoch * dense + 3 * 64 * (4 * dense + 4 * small) + rows["L1Filter/finetuned"]["prune_flops"]
    assert rows["L1Filter/finetuned"]["train_flops"] == tuned
    scratch = rows["L1Filter/scratch_e"]
    assert scratch["train_flops"] == 2 * epoch * small + scratch["prune_flops"]


def test_costs_are_of_the_network_that_is_left(compared):
    rows, out, _ = compared
    plan = Plan.load(out / "plans" / f"{Run('L1Filter', 'finetuned', 0.5, 'flops', 0).key}.json")
    net = lightning_prune.conform(DigitsNet(4), plan)
    cost = count(net, net.example_input_array)
    for name in ("L1Filter/finetuned", "L1Filter/scratch_e", "L1Filter/scratch_b"):
        assert (rows[name]["flops"], rows[name]["params"]) == (cost.flops, cost.params)
        assert rows[name]["bytes"] < rows["dense/dense"]["bytes"]
    kept = sum(int(mask.sum()) for mask in Plan.load(next((out / "plans").glob("RigL*.json"))).masks.values())
    vectors = sum(p.numel() for p in DigitsNet(4).parameters() if p.ndim == 1)
    for name in ("RigL/finetuned", "RigL/scratch_b"):
        assert rows[name]["flops"] == rows["dense/dense"]["flops"]
        assert kept <= rows[name]["nnz"] <= kept + vectors
    assert 0 < rows["RigL/finetuned"]["latency_p10_ms"] <= rows["RigL/finetuned"]["latency_ms"]


def test_accuracy_is_of_the_weights_that_were_trained_from_the_one_dense_file(compared):
    rows, out, _ = compared
    model, data = tiny().build(0)
    checkpoint = torch.load(out / "dense" / "seed=0.ckpt", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    running.pl.seed_everything(0, verbose=False)
    meter = TrainingMeter(1, 0)
    trainer = tiny().trainer(1, [meter], out)
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test/acc"] == rows["dense/dense"]["accuracy"] > 0.12
    assert meter.best("test/acc") == (rows["dense/dense"]["best_accuracy"], rows["dense/dense"]["best_epoch"])
    assert len({r["accuracy"] for r in rows.values()}) > 4  # else equal figures say nothing


def test_runs_that_are_there_are_not_repeated(compared, monkeypatch):
    rows, out, _ = compared
    before = (out / "rows.csv").read_bytes()
    monkeypatch.setattr(engine, "attempt", lambda *_: pytest.fail("it was run again"))
    monkeypatch.setattr(engine, "train_dense", lambda *_: pytest.fail("it was trained again"))
    runs = wanted(["L1Filter"], {"channels": [0.5]}, [0])
    again = compare(tiny(repeats=2), runs, out, say=lambda line: None)
    assert [r["accuracy"] for r in again] == [rows[f"{r['method']}/{r['variant']}"]["accuracy"] for r in again]
    assert (out / "rows.csv").read_bytes() == before


def test_another_protocol_is_refused(compared):
    _, out, _ = compared
    with pytest.raises(ValueError, match="rows of another protocol: finetune was 1 and is 2 now; take another --out"):
        compare(tiny(repeats=2, finetune=2), [], out)


def test_report_is_made_of_the_rows_alone(compared, tmp_path):
    rows, out, _ = compared
    for name in ("rows.csv", "protocol.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    report(tmp_path)
    for name in ("results.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert (imread(tmp_path / "pareto.png") == imread(out / "pareto.png")).all()
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "| Scratch-B of RigL" in text
    assert "one seed, no verdict" in text
    value = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert value["rows"] == json.loads(json.dumps([{**dict.fromkeys(value["rows"][0]), **r} for r in rows.values()]))


def test_a_torn_line_is_dropped_and_comes_back_from_the_run_itself(compared, tmp_path):
    _, out, _ = compared
    data = (out / "rows.csv").read_bytes()
    (tmp_path / "runs").mkdir()
    for file in (out / "runs").glob("*.json"):
        (tmp_path / "runs" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "rows.csv").write_bytes(data[:-40])
    held = engine._held(tmp_path)
    assert len(held) == 9
    assert engine._read(tmp_path / "rows.csv") == engine._read(out / "rows.csv")


def test_a_run_that_fails_is_a_row_and_is_run_again(tmp_path, monkeypatch):
    runs = wanted(["Magnitude"], {"weights": [0.1]}, [0])
    real = running.find

    def broken(name):
        if name == "Magnitude":
            raise ArithmeticError("no such luck")
        return real(name)

    monkeypatch.setattr(running, "find", broken)
    rows = compare(tiny(), runs, tmp_path, say=lambda line: None)
    assert [r["error"].partition(":")[0] for r in rows] == ["", "", "ArithmeticError", *["FileNotFoundError"] * 2]
    assert "left no plan" in rows[-1]["error"]
    (traceback,) = (tmp_path / "errors").glob("Magnitude-finetuned*")
    assert "no such luck" in traceback.read_text("utf-8")
    assert "## Failed" in (tmp_path / "results.md").read_text("utf-8")
    monkeypatch.setattr(running, "find", real)
    again = compare(tiny(), runs, tmp_path, say=lambda line: None)
    assert [r["error"] for r in again] == [""] * 5
    assert [r["accuracy"] for r in again[:2]] == [r["accuracy"] for r in rows[:2]]
    assert "## Failed" not in (tmp_path / "results.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("metric", "message"), [("test/f1", "the metric 'test/f1', the test returns test/acc"), ("test/acc", "")]
)
def test_metric_is_named_or_the_list_of_them_is(metric, message, tmp_path):
    (seed, error) = running.train_dense(0, tiny(metric=metric), tmp_path)
    assert (seed, message in error, bool(message)) == (0, True, bool(error))


# processes


@pytest.mark.processes  # what is tested is that they share the runs
def test_two_processes_give_the_rows_of_one(compared, tmp_path):
    rows, _, _ = compared
    runs = wanted(["RigL"], {"weights": [0.1]}, [0], scratch="none")
    with joblib.parallel_config(backend="loky", n_jobs=2):
        shared = compare(tiny(repeats=2), runs, tmp_path, say=lambda line: None)
    assert [r["error"] for r in shared] == [""] * 3
    assert [r["accuracy"] for r in shared] == [rows[f"{r['method']}/{r['variant']}"]["accuracy"] for r in shared]


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_prune.comparison import Protocol, compare, engine, wanted
real = engine.attempt
def attempt(run, protocol, out):
    if run.method == "Magnitude":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, protocol, out)
engine.attempt = attempt
protocol = Protocol({config}, epochs=1, finetune=1, repeats=0)
compare(protocol, wanted(["Magnitude"], {{"weights": [0.1]}}, [0], "none"), Path(sys.argv[1]))
"""


@pytest.mark.processes  # one of them is killed
def test_goes_on_after_a_kill_without_repeating_what_is_there(compared, tmp_path):
    source = str(Path(lightning_prune.__file__).parents[1])
    command = [sys.executable, "-c", KILLED.format(config=TINY), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": source}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "dense").iterdir()}
    before = (tmp_path / "rows.csv").read_bytes()
    lines: list[str] = []
    rows = compare(tiny(), wanted(["Magnitude"], {"weights": [0.1]}, [0], "none"), tmp_path, say=lines.append)
    assert lines[0] == "3 runs, 2 of them done already"
    assert [r["error"] for r in rows] == [""] * 3
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dense").iterdir()} == written
    assert (tmp_path / "rows.csv").read_bytes().startswith(before)
    assert len(engine._read(tmp_path / "rows.csv")) == 3
    whole = compared[0]["RandomWeights/finetuned"]
    assert rows[1]["accuracy"] == whole["accuracy"]
