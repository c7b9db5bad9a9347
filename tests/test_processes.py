"""Two processes: the same plan and the same weights on both, and the reducer follows the cut."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, json, sys
import lightning.pytorch as pl
import torch
import lightning_prune as lp
from lightning_prune.commands.digits import DigitsData, DigitsNet

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, keep, out = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    pl.seed_everything(0, verbose=False)
    pruner = getattr(lp, name)(keep)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=[pruner], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )
    net = DigitsNet(width=4)
    trainer.fit(net, DigitsData(batch_size=128, seed=0))
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()
    row = {"plan": pruner.plan.digest(), "weights": weights, "events": pruner.events_done,
           "flops": pruner.report.flops_kept, "density": float(trainer.callback_metrics["prune/density"])}
    with open(f"{out}/{trainer.global_rank}.json", "w") as file:
        json.dump(row, file)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("method", "keep"), [("TaylorWeight", 0.5), ("RandomChannels", 0.5), ("Magnitude", 0.2)])
def test_two_processes_end_with_one_plan_and_equal_weights(method: str, keep: float, tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), method, str(keep), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["events"] > 0
    kept = first["density"] if method == "Magnitude" else first["flops"]
    assert keep - 0.05 < kept <= keep + 1e-9
