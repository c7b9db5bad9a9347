"""The example of a loop of one's own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prune

SCRIPT = Path(__file__).parents[1] / "examples" / "fabric.py"


@pytest.mark.processes  # a script is run as a user runs it
def test_fabric_example_meets_its_budget_and_its_file_loads_again(tmp_path):
    assert len(SCRIPT.read_text("utf-8").splitlines()) < 100
    environment = {
        "PYTHONPATH": os.fspath(Path(lightning_prune.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        "HOME": os.fspath(tmp_path),
    }
    command = [sys.executable, os.fspath(SCRIPT), "--fast", "--keep", "0.4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    dense, cut, trained, loaded = done.stdout.splitlines()
    flops = [int(line.split(" flops")[0].split()[-1].replace(",", "")) for line in (dense, cut, trained, loaded)]
    assert 0.3 < flops[1] / flops[0] <= 0.4
    assert flops[1:] == [flops[1]] * 3
    assert trained.split("flops")[1] == loaded.split("flops")[1]
    assert trained.split("accuracy")[1] != cut.split("accuracy")[1]
