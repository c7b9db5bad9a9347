"""Two processes: the same plan and the same weights on both, scores as in one, and the reducer follows the cut."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lightning_prune.methods import discover
from tests.two_processes import KEEP, METHODS, look

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("processes")]  # started once for all


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Method, "look" or "train" -> what the two processes say; they are started once for all methods."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.two_processes", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[1])
    rows = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]

    def said(method, what):
        assert all(method in row for row in rows), done.stderr[-2000:]  # they stop at the first that fails
        return [row[method][what] for row in rows]

    return said


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_end_with_one_plan_and_equal_weights(method, processes):
    first, second = processes(method, "train")
    assert first == second
    assert first["events"] > 0
    keep = KEEP[discover()[method].kind]
    assert keep - 0.05 < first["kept"] <= keep + 1e-9


@pytest.mark.parametrize("method", [n for n in METHODS if discover()[n].kind != "ranks"])  # these have no scores
def test_two_processes_choose_what_one_does_from_the_same_samples(method, processes, tmp_path):
    # sums over samples join before anything is squared or made absolute that the paper does not square sample by sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 64 samples are few
        alone = look(method, 1, tmp_path)
    first, second = processes(method, "look")
    assert first == second
    assert first["plan"] == alone["plan"]
    assert first["scores"].keys() == alone["scores"].keys()
    assert alone["scores"]
    for group, scores in alone["scores"].items():
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
