import os
import subprocess
import sys

import pytest
import torch

from lightning_prune import Budget, Iterative, OneShot, RandomChannels, RandomWeights
from lightning_prune.methods.random import random_score

OTHER_PROCESS = """
import torch
from lightning_prune import RandomChannels
from lightning_prune.methods.random import random_score
print(random_score((4,), RandomChannels(0.5).generator("score", "conv1")).tolist())
"""


def test_score_is_uniform_in_zero_to_one():
    scores = random_score((100, 100), torch.Generator().manual_seed(0))
    assert scores.min() >= 0
    assert scores.max() < 1
    assert scores.mean().item() == pytest.approx(0.5, abs=0.02)


def test_score_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    random_score((4,), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.processes
def test_scores_are_equal_in_every_process(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    here = random_score((4,), RandomChannels(0.5).generator("score", "conv1")).tolist()
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == str(here)


def test_each_event_draws_anew(fit):
    callback = RandomChannels(0.5)
    first = random_score((8,), callback.generator("score", "conv1"))
    callback._done = 1
    assert not torch.equal(first, random_score((8,), callback.generator("score", "conv1")))


def test_channels_go_by_the_same_fraction_in_every_group(fit):
    callback = RandomChannels(Budget(0.5, of="units"), schedule=OneShot(3, unit="step"))
    fit(callback)
    assert {name: kept for name, (kept, _) in callback.plan.groups.items()} == {"stem": 3, "conv1": 6, "hidden": 6}


def test_weights_have_the_same_density_in_every_layer_and_the_exact_count(fit):
    callback = RandomWeights(0.2, schedule=OneShot(3, unit="step"))
    fit(callback)
    masks = callback.plan.masks.values()
    assert sum(int(mask.sum()) for mask in masks) == int(0.2 * sum(mask.numel() for mask in masks))
    assert all(abs(int(mask.sum()) - 0.2 * mask.numel()) < 1 for mask in masks)


def test_choice_has_nothing_to_do_with_the_weights(fit, tiny_net):
    plans = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        callback = RandomWeights(0.5, schedule=OneShot(0, unit="step"))
        fit(callback, model=tiny_net())
        plans.append(callback.plan)
    assert plans[0] == plans[1]


def test_weight_that_went_does_not_return(fit):
    class Spy(RandomWeights):
        def select(self, *args):
            masks = super().select(*args)
            self.seen.append({name: mask.clone() for name, mask in masks.items()})
            return masks

    callback = Spy(0.2, schedule=Iterative(start=1, end=6, events=3, unit="step"))
    callback.seen = []
    fit(callback)
    for earlier, later in zip(callback.seen, callback.seen[1:], strict=False):
        assert not any((later[name] & ~earlier[name]).any() for name in earlier)
    assert len(callback.seen) == 3
