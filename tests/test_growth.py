"""What takes time or memory in proportion to the size of a network, against the slow way to the same result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.performance_growth import encoder, exponent
from lightning_prune import Budget, L1Filter, plan, trace
from lightning_prune.masks import clear_off
from lightning_prune.ranking import rank_weights


def by_sorting(scores: dict[str, Tensor], most: float) -> dict[str, Tensor]:
    """The best of all by a stable sort, of equal ones the last."""
    flat = torch.cat([score.reshape(-1).double() for score in scores.values()])
    alive = int((~flat.isneginf()).sum())
    order = torch.sort(flat, stable=True).indices.flip(0)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[: int(min(most, alive))]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


VALUES = st.sampled_from([-float("inf"), -1.5, 0.0, -0.0, 0.25, 0.25, 1.0, 3.0])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(layers=st.lists(st.tuples(st.lists(VALUES, max_size=6), DTYPES), min_size=1, max_size=4), data=st.data())
@settings(max_examples=200, deadline=None)
def test_weights_chosen_without_sorting_are_those_of_a_stable_sort(layers, data):
    scores = {str(i): torch.tensor(values, dtype=dtype) for i, (values, dtype) in enumerate(layers)}
    before = {name: score.clone() for name, score in scores.items()}
    most = data.draw(st.floats(0, 1.5 * sum(map(len, scores.values())) + 1))
    masks, expected = rank_weights(scores, most), by_sorting(scores, most)
    assert all(torch.equal(masks[name], expected[name]) for name in scores)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


def test_scores_that_only_double_precision_tells_apart_are_not_taken_for_equal():
    # 1 + 2**-40 and 1 + 2**-30 are both 1 in float32
    fine = torch.tensor([1 + 2.0**-30, 1 + 2.0**-40], dtype=torch.float64)
    masks = rank_weights({"coarse": torch.ones(2), "fine": fine}, 1)
    assert masks["fine"].tolist() == [True, False]
    assert not masks["coarse"].any()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weights_of_equal_scores_keep_the_last(scope):
    masks = rank_weights({"a": torch.ones(2, 2), "b": torch.ones(4)}, 3, scope=scope)
    # 3 of 8: globally the last three; by layer one each (3/8 of 4 is 1.5), and one more where most was lost, in a
    expected = {"global": ([0, 0, 0, 0], [0, 1, 1, 1]), "layer": ([0, 0, 1, 1], [0, 0, 0, 1])}[scope]
    assert (masks["a"].flatten().int().tolist(), masks["b"].int().tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_bits_that_are_cleared_are_zeros(dtype):
    value = torch.arange(-3, 3).abs().to(dtype).reshape(2, 3).T  # strides other than the mask's
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    expected = torch.where(mask, value, torch.zeros_like(value))
    clear_off(value, mask)
    assert torch.equal(value, expected)


def test_what_is_not_finite_is_cleared_where_it_goes_and_stays_where_it_stays():
    value = torch.tensor([float("nan"), float("inf"), float("nan"), 1.0, -1.0])
    clear_off(value, torch.tensor([False, False, True, True, False]))
    assert value[[0, 1, 3, 4]].tolist() == [0, 0, 1, 0]
    assert value[2].isnan()
    assert not value.signbit()[4]  # no -0


def test_complex_state_is_cleared_as_well():
    value = torch.tensor([1 + 2j, 3 + 4j], dtype=torch.complex128)
    clear_off(value, torch.tensor([False, True]))
    assert value.tolist() == [0, 3 + 4j]


def test_a_power_law_has_its_exponent():
    # 3 x^1.5 at x = 1, 4, 16: 3, 24, 192
    assert exponent([(1, 3), (4, 24), (16, 192)]) == pytest.approx(1.5)


def test_a_network_without_memory_is_planned_by_a_rule_without_values():
    with torch.device("meta"):
        graph = trace(encoder(1), torch.zeros(1, 4, 2048))
    found = plan(graph, method="random_channels", budget=0.5)
    assert graph.cost(found).flops <= 0.5 * graph.cost().flops


def test_planning_holds_no_second_copy_of_the_weights():
    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            own = [t for t in args if isinstance(t, Tensor)]
            if isinstance(out, Tensor) and all(out.data_ptr() != t.data_ptr() for t in own):
                self.largest = max(self.largest, out.numel())
            return out

    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    graph = trace(model, torch.zeros(1, 64))
    with Counted() as counted:
        L1Filter(Budget(0.5)).plan_for(graph)
    assert counted.largest <= 64 * 64  # one layer's magnitudes at a time
