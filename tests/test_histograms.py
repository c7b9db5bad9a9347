import pytest
import torch

from lightning_prune import LRPET, Budget, Gradual, L1Filter, Magnitude, RandomChannels
from lightning_prune.histograms import BINS, histogram


def test_units_are_counted_in_bins_of_equal_width_apart_by_what_becomes_of_them():
    # from 0 to 24 in 24 bins: each is one wide, and the largest score belongs to the last
    scores = torch.tensor([[0.0, 0.9, 1.0], [12.5, 23.9, 24.0]])
    found = histogram(scores, torch.tensor([[False, True, True], [True, False, True]]))
    kept = {0: 1, 1: 1, 12: 1, 23: 1}
    assert found == {
        "low": 0.0,
        "high": 24.0,
        "kept": [kept.get(n, 0) for n in range(BINS)],
        "gone": [{0: 1, 23: 1}.get(n, 0) for n in range(BINS)],
    }


def test_what_is_not_finite_is_left_out():
    inf, nan = float("inf"), float("nan")
    found = histogram(torch.tensor([1.0, inf, -inf, nan, 3.0]), torch.ones(5, dtype=torch.bool))
    assert (found["low"], found["high"], sum(found["kept"])) == (1.0, 3.0, 2)
    assert histogram(torch.tensor([inf]), torch.tensor([True])) == {}
    assert histogram(torch.tensor([]), torch.tensor([], dtype=torch.bool)) == {}


@pytest.mark.parametrize("value", [0.0, 7.0, -1e30, 1e-40])
def test_equal_scores_stand_in_the_first_bin(value):
    found = histogram(torch.full((5,), value), torch.arange(5) < 2)
    assert (found["kept"][0], found["gone"][0], sum(found["kept"] + found["gone"])) == (2, 3, 5)


def test_largest_floats_do_not_overflow():
    largest = torch.finfo(torch.float64).max
    found = histogram(torch.tensor([-largest / 4, largest / 4], dtype=torch.float64), torch.tensor([True, True]))
    assert (found["kept"][0], found["kept"][-1], sum(found["kept"])) == (1, 1, 2)


METHODS = [L1Filter(0.5), Magnitude(Budget(0.3)), LRPET(0.6), RandomChannels(0.5)]


@pytest.mark.parametrize("callback", METHODS, ids=lambda callback: type(callback).__name__)
def test_state_says_the_scores_of_the_last_event_and_keeps_them(fit, callback):
    fit(callback, limit_val_batches=0)
    state = callback.state_dict()
    plan, scores = callback.plan, state["scores"]
    kept = {name: sum(found["kept"]) for name, found in scores.items()}
    stays = {**{n: k for n, (k, _) in plan.groups.items()}, **plan.ranks}
    stays |= {name: int(mask.sum()) for name, mask in plan.masks.items()}
    assert kept
    assert kept == {name: stays[name] for name in kept}
    fresh = type(callback)(callback.budget)
    fresh.load_state_dict(state)
    assert fresh.state_dict()["scores"] == scores


def test_fine_schedules_keep_the_scores_of_some_events_and_of_the_last(fit, monkeypatch):
    made = []
    monkeypatch.setattr("lightning_prune.pruner.histogram", lambda *given: made.append(given) or histogram(*given))
    callback = Magnitude(Budget(0.3), schedule=Gradual(end=0.95, events=38))
    fit(callback, limit_val_batches=0, max_epochs=10)
    layers = len(callback.plan.masks)
    assert len(callback.events) > 30
    assert 10 * layers < len(made) <= 21 * layers
    kept = {name: sum(found["kept"]) for name, found in callback.state_dict()["scores"].items()}
    assert kept == {name: int(mask.sum()) for name, mask in callback.plan.masks.items()}


def test_state_says_what_the_callback_was_made_with_and_no_address():
    callback = L1Filter(0.4, ignore="fc*", loss_fn=lambda model, batch: None, example_input=torch.zeros(2, 1, 8, 8))
    said = callback.state_dict()["arguments"]
    assert said["budget"] == "Budget(keep=0.4, of='flops')"
    assert said["ignore"] == "['fc*']"
    assert (said["loss_fn"], said["example_input"]) == ("a function", "a Tensor")
    assert LRPET(0.5, finalize=False).state_dict()["arguments"]["finalize"] == "False"
    assert "self" not in said
    assert L1Filter(0.5, calibration=[object()]).state_dict()["arguments"]["calibration"] == "a list"
