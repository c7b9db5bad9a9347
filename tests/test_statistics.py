import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.errors import NonFiniteScore
from lightning_prune.statistics import AT_ONCE, ChannelSums, SampleSums, Statistics

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def vector(*values):
    return torch.tensor(values)


def test_mean_is_over_batches():
    statistics = Statistics({"a": 2, "b": 1}, CPU)
    statistics.add({"a": vector(1.0, 2.0), "b": vector(5.0)})
    statistics.add({"a": vector(3.0, 4.0), "b": vector(7.0)})
    means = statistics.means()
    assert {name: value.tolist() for name, value in means.items()} == {"a": [2.0, 3.0], "b": [6.0]}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_batch_that_is_not_finite_is_left_out_whole_and_counted(bad):
    statistics = Statistics({"a": 2, "b": 1}, CPU)
    statistics.add({"a": vector(1.0, 2.0), "b": vector(5.0)})
    statistics.add({"a": vector(9.0, bad), "b": vector(9.0)})
    assert statistics.means()["a"].tolist() == [1.0, 2.0]
    assert statistics.means()["b"].tolist() == [5.0]
    assert statistics.skipped == 1


def test_groups_are_counted_by_themselves():
    # of two optimizers one steps twice as often
    statistics = Statistics({"a": 1, "b": 2}, CPU)
    statistics.add({"a": vector(1.0)})
    assert statistics.unmeasured() == ["b"]
    statistics.add({"a": vector(3.0)})
    statistics.add({"b": vector(4.0, 6.0)})
    assert statistics.unmeasured() == []
    assert statistics.means()["a"].tolist() == [2.0]
    assert statistics.means()["b"].tolist() == [4.0, 6.0]


def test_nothing_is_measured_before_the_first_finite_batch():
    statistics = Statistics({"a": 1}, CPU)
    assert statistics.unmeasured() == ["a"]
    statistics.add({"a": vector(NAN)})
    assert statistics.unmeasured() == ["a"]
    assert statistics.skipped == 1


def test_single_entry_stays_a_vector():
    statistics = Statistics({"a": 1}, CPU)
    statistics.add({"a": vector(3.0)})
    assert statistics.means()["a"].shape == (1,)


def test_many_small_values_do_not_drown():
    # in single precision 2**24 + 1 is 2**24
    statistics = Statistics({"a": 1}, CPU)
    statistics.add({"a": vector(2.0**24)})
    for _ in range(4):
        statistics.add({"a": vector(1.0)})
    assert statistics._window.total.item() == 2**24 + 4


def test_batches_that_wait_make_the_sums_of_batches_added_one_by_one():
    torch.manual_seed(0)
    statistics, sums = Statistics({"a": 2, "b": 3}, CPU), ChannelSums(5)
    for i in range(2 * AT_ONCE + 5):
        values = torch.randn(5) / 3
        values[0] = NAN if i == AT_ONCE else values[0]
        whole = i % 3 > 0
        statistics.add({"a": values[:2], **({"b": values[2:]} if whole else {})}, weight=1 + i % 2)
        measured = torch.tensor([True, True, whole, whole, whole])
        sums.update(torch.where(measured, values, 0), measured, 1 + i % 2)
    state = statistics.state_dict()
    assert torch.equal(state["total"], sums.total)  # to the bit: a run that goes on adds in the same order
    assert torch.equal(state["count"], sums.count)
    assert statistics.skipped == 1
    statistics.add({"a": vector(1.0, 1.0), "b": vector(1.0, 1.0, 1.0)})
    statistics.cut({})
    assert statistics.unmeasured() == ["a", "b"]


def test_cut_begins_a_new_window_and_slices_what_is_kept():
    statistics = Statistics({"a": 3, "b": 2}, CPU)
    statistics.add({"a": vector(1.0, 2.0, 3.0), "b": vector(4.0, 5.0)})
    held = statistics.kept["a"]
    held["average"] = vector(10.0, 20.0, 30.0)
    statistics.cut({"a": torch.tensor([True, False, True])})
    assert statistics.kept["a"] is held  # views hold it
    assert held["average"].tolist() == [10.0, 30.0]
    assert statistics.unmeasured() == ["a", "b"]
    statistics.add({"a": vector(7.0, 8.0), "b": vector(1.0, 1.0)})
    assert statistics.means()["a"].tolist() == [7.0, 8.0]


def test_dropped_groups_are_forgotten():
    statistics = Statistics({"a": 2, "b": 1}, CPU)
    statistics.drop(["a"])
    statistics.add({"b": vector(2.0)})
    assert list(statistics.means()) == ["b"]
    statistics.join({"c": 2, "b": 1})
    assert statistics.unmeasured() == ["c", "b"]
    assert statistics.kept == {"c": {}, "b": {}}


def test_state_goes_on_where_it_was_taken(tmp_path):
    first = Statistics({"a": 2, "b": 1}, CPU)
    first.add({"a": vector(1.0, 2.0), "b": vector(NAN)})
    first.add({"a": vector(1.0, 2.0)})
    first.kept["a"]["average"] = vector(5.0, 6.0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Statistics({"a": 2, "b": 1}, CPU)
    held = second.kept["a"]
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.kept["a"] is held
    for statistics in (first, second):
        statistics.add({"a": vector(3.0, 4.0), "b": vector(9.0)})
    assert second.means()["a"].tolist() == first.means()["a"].tolist() == [2.0, 3.0]
    assert second.means()["b"].tolist() == [9.0]
    assert second.skipped == 1
    assert held["average"].tolist() == [5.0, 6.0]


def test_state_is_a_copy():
    statistics = Statistics({"a": 1}, CPU)
    statistics.kept["a"]["x"] = vector(1.0)
    state = statistics.state_dict()
    statistics.add({"a": vector(3.0)})
    statistics.kept["a"]["x"] += 1
    assert state["total"].tolist() == [0.0]
    assert state["kept"]["a"]["x"].tolist() == [1.0]


def test_state_of_other_groups_is_refused():
    state = Statistics({"a": 2}, CPU).state_dict()
    with pytest.raises(ValueError, match=r"statistics are of groups \{'a': 2\}, the model has \{'a': 3\}"):
        Statistics({"a": 3}, CPU).load_state_dict(state)


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=8), st.data())
@settings(max_examples=30, deadline=None)
def test_sums_of_two_processes_reduce_to_the_mean_of_all_batches(batches, data):
    # torchmetrics adds up sum states over processes: the mean must be over all batches, however they were dealt
    owners = data.draw(st.lists(st.booleans(), min_size=len(batches), max_size=len(batches)))
    parts = ChannelSums(3), ChannelSums(3)
    for batch, owner in zip(batches, owners, strict=True):
        parts[owner].update(torch.tensor(batch))
    joined = sum(p.total for p in parts) / sum(p.count for p in parts)
    expected = torch.tensor(batches, dtype=torch.float64).mean(0)
    assert torch.allclose(joined, expected)


def alone(value):
    return value


def test_weight_of_a_sum_over_samples_is_their_number():
    # 3 samples that sum to 6, then 1 of 6: mean 12 / 4
    statistics = Statistics({"a": 1}, CPU)
    statistics.add({"a": vector(6.0)}, weight=3)
    statistics.add({"a": vector(6.0)}, weight=1)
    assert statistics.means()["a"].tolist() == [3.0]


def test_mean_over_samples_does_not_depend_on_how_they_are_batched():
    values = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0))
    means = []
    for size in (1, 5, 12):
        sums = SampleSums({"a": (2, 3)}, CPU)
        for part in values.split(size):
            assert sums.add({"a": part.sum(0)}, len(part))
        means.append(sums.means(alone)["a"])
    for mean in means:
        torch.testing.assert_close(mean, values.double().mean(0), rtol=1e-6, atol=1e-7)


def test_batch_of_samples_that_is_not_finite_is_left_out_whole():
    sums = SampleSums({"a": (1,), "b": (1,)}, CPU)
    sums.add({"a": vector(4.0), "b": vector(2.0)}, 2)
    assert not sums.add({"a": vector(9.0), "b": vector(NAN)}, 5)
    assert sums.means(alone)["a"].tolist() == [2.0]
    assert (sums.samples, sums.skipped) == (2, 1)


def test_sums_are_joined_over_processes_before_they_are_divided():
    # this process saw 2 samples, another one 6 that sum to 60: mean (4 + 60) / 8
    def total(value):
        return value + (torch.tensor([6.0, 0.0]) if value.numel() == 2 else 60.0)

    sums = SampleSums({"a": (1,)}, CPU)
    sums.add({"a": vector(4.0)}, 2)
    assert sums.means(total)["a"].tolist() == [8.0]


def test_no_finite_batch_of_samples_is_an_error_that_says_which():
    sums = SampleSums({"a": (1,)}, CPU)
    with pytest.raises(NonFiniteScore, match="the loader gave none"):
        sums.means(alone)
    sums.add({"a": vector(INF)}, 2)
    with pytest.raises(NonFiniteScore, match="1 batches were not finite"):
        sums.means(alone)
