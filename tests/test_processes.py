"""Several processes: one plan and equal weights on all, as one process has them, and the reducer follows the cut."""

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_prune import LRPET, L1Filter, Magnitude, OneShot
from lightning_prune.cost import count
from lightning_prune.methods import discover
from tests import process_cases
from tests.two_processes import KEEP, METHODS, look

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("processes")]  # started once for all


def start(module, folder, processes, *names):
    """What each process says, and what they wrote to stderr if one of them failed."""
    command = [sys.executable, "-m", module, str(folder), str(processes), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, check=False)
    files = [folder / f"{process}.json" for process in range(processes)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files], done.stderr[-2000:]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Method, what it did -> what the two processes say; they are started once for all methods."""
    rows, error = start("tests.two_processes", tmp_path_factory.mktemp("processes"), 2)

    def said(method, what):
        assert all(method in row for row in rows), error  # they stop at the first that fails
        return [row[method][what] for row in rows]

    return said


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Kind, what it did -> what four processes say, of one method of each kind."""
    names = {"channels": "TaylorActivation", "weights": "Magnitude", "ranks": "LRPET"}
    rows, error = start("tests.two_processes", tmp_path_factory.mktemp("four"), 4, *names.values())

    def said(kind, what):
        assert all(names[kind] in row for row in rows), error
        return names[kind], [row[names[kind]][what] for row in rows]

    return said


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Name of a case -> what the two processes say of it."""
    rows, error = start("tests.process_cases", tmp_path_factory.mktemp("cases"), 2)

    def said(case):
        assert all(case in row for row in rows), error
        return [row[case] for row in rows]

    return said


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """What two nodes say, with a process and a folder each, the second of which the first cannot see into."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folders = [tmp_path_factory.mktemp(f"node{node}") for node in (0, 1)]
    shared = {**os.environ, "NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.process_cases", str(folder), "2", "files"],
            env={**shared, "NODE_RANK": str(node), "PYTHONPATH": path}, cwd=folder, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )
        for node, folder in enumerate(folders)
    ]  # fmt: skip
    errors = [one.communicate(timeout=600)[1] for one in started]
    assert [one.returncode for one in started] == [0, 0], "\n".join(error[-2000:] for error in errors)
    return [json.loads((folder / f"{node}.json").read_text())["files"] for node, folder in enumerate(folders)], folders


def alone(case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case(1, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_end_with_one_plan_and_equal_weights(method, processes):
    first, second = processes(method, "train")
    assert first == second  # the plan after each event among it
    assert len(first["plans"]) == first["events"] > 0
    keep = KEEP[discover()[method].kind]
    assert keep - 0.05 < first["kept"] <= keep + 1e-9


@pytest.mark.parametrize("method", [n for n in METHODS if discover()[n].kind != "ranks"])  # these have no scores
def test_two_processes_choose_what_one_does_from_the_same_samples(method, processes, tmp_path):
    # sums over samples join before anything is squared or made absolute that the paper does not square sample by sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 64 samples are few
        one = look(method, 1, tmp_path)
    first, second = processes(method, "look")
    assert first == second
    assert first["plan"] == one["plan"]
    assert {row["plan"] for row in processes(method, "few")} == {one["plan"]}  # all the data is with the first
    assert first["scores"].keys() == one["scores"].keys()
    assert one["scores"]
    for group, scores in one["scores"].items():
        assert first["scores"][group] == pytest.approx(scores, rel=1e-4, abs=1e-5 * max(map(abs, scores)))


def test_processes_that_decide_differently_stop_and_say_where(tmp_path):
    command = [sys.executable, "-m", "tests.disagreeing_processes", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second
    channels, weights = first
    assert (
        "Channels: at step 2 processes decided differently about 'stage2.conv1.weight' (group 'stage2.conv1')"
        in channels
    )
    assert "Weights: at step 2 processes decided differently about 'head.weight'" in weights
    assert channels.endswith("| 0")  # the event does not count as done


@pytest.mark.parametrize("kind", ["channels", "weights", "ranks"])
def test_four_processes_end_with_one_plan_and_equal_weights(kind, four):
    _, rows = four(kind, "train")
    assert rows == [rows[0]] * 4
    assert len(rows[0]["plans"]) == rows[0]["events"] > 0


@pytest.mark.parametrize("kind", ["channels", "weights"])
@pytest.mark.parametrize("data", ["look", "few"])
def test_four_processes_choose_what_one_does_though_some_of_them_see_less(kind, data, four, tmp_path):
    # 64 samples in batches of 7 are 10 batches, shared 3, 3, 2, 2; in one batch they are all with the first process
    name, rows = four(kind, data)
    one = alone(lambda *where: look(name, *where), tmp_path)
    assert [row["plan"] for row in rows] == [one["plan"]] * 4


@pytest.mark.parametrize("method", process_cases.KINDS)
def test_training_around_the_event_is_that_of_one_process_with_the_global_batch(method, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(process_cases, "KINDS", (method,))
    first, second = (row[method] for row in cases("follow"))
    one = alone(process_cases.follow, tmp_path)[method]
    assert first == second
    assert (first["plan"], first["pairs"]) == (one["plan"], one["pairs"])
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-6)  # sums in another order


def test_rank_methods_put_two_layers_in_place_of_one_on_all_processes(cases):
    first, second = (row["LRPET"]["pairs"] for row in cases("follow"))
    assert first == second
    assert "stage3.conv2" in first


@pytest.mark.parametrize("flag", ["static_graph", "find_unused_parameters", "gradient_as_bucket_view"])
def test_reducer_is_made_anew_in_place_with_its_settings_and_the_old_one_is_gone(flag, cases, tmp_path):
    order = ["static_graph", "find_unused_parameters", "gradient_as_bucket_view"]
    one = alone(process_cases.reducers, tmp_path)[flag]
    for row in cases("reducers"):
        assert row[flag]["flags"] == [[flag == name for name in order]] * 2  # before and after the cut
        assert row[flag]["gone"] == [True]  # else its hooks would go on reducing
        assert row[flag]["events"] == 1
        assert row[flag]["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-6)


def test_processes_that_see_unlike_numbers_of_samples_count_by_sample(cases, tmp_path):
    # 11 and 5 of each 16: the mean of two means would weigh the samples of the second process 11 / 5 times as much
    first, second = cases("uneven")
    one = alone(process_cases.uneven, tmp_path)
    assert first == second
    assert first["plan"] == one["plan"]
    assert one["scores"]
    for group, scores in one["scores"].items():
        assert first["scores"][group] == pytest.approx(scores, rel=1e-4, abs=1e-5 * max(map(abs, scores)))


@pytest.mark.parametrize("method", ["BNImportance", "Magnitude", "LRPET"])
def test_synchronised_norms_are_traced_and_cut_and_put_back(method, cases, tmp_path):
    first, second = (row[method] for row in cases("norms"))
    assert first == second
    assert first["during"] == ["SyncBatchNorm"]
    assert "SyncBatchNorm" not in first["after"]


def test_net_of_synchronised_norms_trains_and_runs_once_cut(fit, tiny_net):
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(tiny_net())
    pruner = L1Filter(0.5, schedule=OneShot(3, unit="step"))
    fit(pruner, net)
    assert {type(net.norm1), type(net.norm2)} == {torch.nn.SyncBatchNorm}
    assert net.norm1.num_features == net.conv1.out_channels < 12
    assert count(net, torch.zeros(2, 1, 8, 8)).flops == pruner.report.after.flops


@pytest.mark.parametrize("method", ["TaylorActivation", "RigL", "LRPET"])
def test_resumed_between_events_ends_as_the_uninterrupted_run(method, cases):
    # TaylorActivation sums over steps 1 to 6 what each process sees of its own samples; the checkpoint is of step 4
    for row in cases("resume"):
        whole, resumed = row[method]
        assert resumed["end"] == whole["end"]
        assert resumed["scores"] == pytest.approx(whole["scores"], rel=1e-5)
        assert whole["end"]["events"] > 0
    first, second = (row[method][1] for row in cases("resume"))
    assert first == second


def test_process_without_a_finite_batch_leaves_scoring_to_the_others(cases):
    first, second = cases("sick")
    assert first == second
    assert first["events"] == 1
    assert first["kept"] <= 0.5


def test_processes_with_seeds_of_their_own_draw_the_same(cases):
    first, second = cases("seeds")
    assert first == second


def test_optimizer_that_shares_its_state_out_is_refused_on_all(cases):
    for row in cases("shared_out"):
        assert "prune with the optimizer that it wraps" in row["error"]


def test_only_the_first_process_writes_files(cases):
    first, second = (row["written"] for row in cases("files"))
    assert any(path.endswith(".ckpt") for path in first)  # so that the net has no hole
    assert second == []


def test_two_nodes_that_share_no_files_end_with_one_plan(nodes):
    (first, second), (_, folder) = nodes
    for method in ("L1Filter", "RigL", "LRPET"):
        assert first[method] == second[method]
        assert second[method]["local"] == 0  # rank 1 of 2, and the first of its node
    assert second["written"] == []
    assert [path.name for path in folder.iterdir()] == ["1.json"]


def strategy(cls):
    return cls.__new__(cls)  # without what they need: GPUs, or a package


class Own(FSDPStrategy):
    pass


@pytest.mark.parametrize("sharding", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Own])
@pytest.mark.parametrize("method", [L1Filter, Magnitude, LRPET])
def test_sharding_is_refused_in_setup_and_nothing_has_changed(sharding, method, tiny_net, make_trainer):
    net, trainer, pruner = tiny_net(), make_trainer(), method(0.5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer._accelerator_connector.strategy = strategy(sharding)
    with pytest.raises(RuntimeError, match=f"{sharding.__name__} shards parameters.*under DDP.*lightning_prune.cut"):
        pruner.setup(trainer, net, "fit")
    assert len(net._load_state_dict_pre_hooks) == 0
    assert pruner._handles == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("method", [L1Filter, LRPET])
@pytest.mark.parametrize("how", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_would_leave_the_dense_network_behind_are_refused(method, how, tiny_net, make_trainer):
    trainer = make_trainer(strategy=how, devices=2)
    with pytest.raises(RuntimeError, match=r"processes that end with the fit \((spawn|fork)\).*strategy='ddp'"):
        method(0.5).setup(trainer, tiny_net(), "fit")


def test_masks_in_processes_that_end_say_that_the_plan_ends_with_them(tiny_net, make_trainer):
    trainer = make_trainer(strategy="ddp_spawn", devices=2)
    pruner, net = Magnitude(0.5), tiny_net()
    with pytest.warns(UserWarning, match="its plan and report end with them"):
        pruner.setup(trainer, net, "fit")
    pruner.teardown(trainer, net, "fit")


def test_strategy_of_ones_own_on_top_of_ddp_is_none_that_shards(tiny_net, make_trainer):
    class Mine(DDPStrategy):
        pass

    trainer, pruner, net = make_trainer(strategy=Mine(), devices=2), L1Filter(0.5), tiny_net()
    pruner.setup(trainer, net, "fit")
    assert len(pruner._handles) > 0
    pruner.teardown(trainer, net, "fit")


def test_example_of_pruning_before_sharding_runs():
    script = ROOT / "examples" / "before_sharding.py"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(script), "--fast"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "flops 774,272 -> 387,102, params 77,754 ->" in done.stdout
    assert "accuracy after 1 more epochs: 0." in done.stdout
