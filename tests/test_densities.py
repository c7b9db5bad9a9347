import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.densities import layer_counts, layer_densities, relative_density
from lightning_prune.errors import UnmeetableBudget

SMALL = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "fc": (10, 128)}  # 432, 4608 and 1280 weights
LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}  # 235200, 30000 and 1000 weights


def sizes(shapes):
    return {name: math.prod(shape) for name, shape in shapes.items()}


def solved(shapes, allowance, distribution="erk", **settings):
    densities = layer_densities(shapes, allowance, distribution, **settings)
    settings.pop("whole", None)
    return densities, layer_counts(shapes, densities, allowance, **settings)


def test_erk_at_a_fifth():
    # sums of sizes 25, 54, 138; factor 1264 / 217 = 5.824885: 145.62 + 314.54 + 803.83 = 1264
    densities, counts = solved(SMALL, 1264)
    assert densities == pytest.approx({"conv1": 0.337088, "conv2": 0.068260, "fc": 0.627995}, abs=1e-6)
    assert counts == {"conv1": 146, "conv2": 314, "fc": 804}
    assert sum(counts.values()) == 1264


def test_erk_solves_again_when_layers_would_be_denser_than_dense():
    # conv1 and fc take 432 + 1280 of 3160, which leaves 1448 for conv2: factor 1448 / 54
    densities, counts = solved(SMALL, 3160)
    assert densities == pytest.approx({"conv1": 1.0, "conv2": 0.314236, "fc": 1.0}, abs=1e-6)
    assert counts == {"conv1": 432, "conv2": 1448, "fc": 1280}


def test_er_leaves_the_kernel_out():
    densities, counts = solved(SMALL, 1264, "er")
    assert densities == pytest.approx({"conv1": 0.675214, "conv2": 0.159919, "fc": 0.183907}, abs=1e-6)
    assert sum(counts.values()) == 1264


def test_er_on_lenet_makes_the_last_layer_dense():
    # clipping fc3 at 1 without solving again would keep 25,783 of the 26,620
    densities, counts = solved(LENET, 26_620, "er")
    assert densities == pytest.approx({"fc1": 0.079568, "fc2": 0.230189, "fc3": 1.0}, abs=1e-6)
    assert counts == {"fc1": 18_714, "fc2": 6_906, "fc3": 1_000}


def test_er_of_three_linear_layers():
    _, counts = solved({"a": (10, 20), "b": (20, 40), "c": (40, 10)}, 350, "er")
    assert counts == {"a": 75, "b": 150, "c": 125}


def test_er_and_erk_are_one_for_linear_layers():
    assert relative_density((10, 20), "er") == relative_density((10, 20), "erk") == 30 / 200


def test_a_bias_or_a_number_has_a_relative_density_of_one():
    assert [relative_density(shape, "erk") for shape in ((8,), (), (0, 3))] == [1.0, 1.0, 1.0]


def test_uniform_gives_the_rest_one_density_beside_what_stays_whole():
    # 432 stay, (1264 - 432) / 5888 of the others
    densities, counts = solved(SMALL, 1264, "uniform", whole={"conv1"})
    assert densities == pytest.approx({"conv1": 1.0, "conv2": 832 / 5888, "fc": 832 / 5888})
    assert sum(counts.values()) == 1264


def test_what_stays_whole_has_to_fit():
    with pytest.raises(UnmeetableBudget, match=r"fc1 stays dense and costs 235200, but the budget leaves 26620"):
        layer_densities(LENET, 26_620, "uniform", whole={"fc1"})


def test_prices_are_paid_by_the_factor():
    price = {"conv1": 100.0, "conv2": 10.0, "fc": 1.0}
    densities, counts = solved(SMALL, 20_000, price=price)
    paid = sum(price[n] * densities[n] * size for n, size in sizes(SMALL).items())
    assert paid == pytest.approx(20_000)
    # densities are as relative ones: 25 / 432 to 54 / 4608
    assert densities["conv1"] / densities["conv2"] == pytest.approx((25 / 432) / (54 / 4608))
    assert 0 <= 20_000 - sum(price[n] * count for n, count in counts.items()) < 1


def test_what_costs_nothing_stays():
    densities, counts = solved(SMALL, 100, price={"conv1": 1.0, "conv2": 1.0, "fc": 0.0})
    assert counts["fc"] == 1280
    assert densities["fc"] == 1.0 > densities["conv1"] > 0
    assert counts["conv1"] + counts["conv2"] == 100


def test_a_layer_that_would_be_empty_is_served_first():
    # 0.4 of b is rounded to nothing, and a has the larger remainder
    assert layer_counts({"a": (4,), "b": (4,)}, {"a": 0.65, "b": 0.1}, 3) == {"a": 2, "b": 1}


shapes_of_nets = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6).map(
    lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)}
)


@given(shapes=shapes_of_nets, keep=st.floats(0, 1), distribution=st.sampled_from(["erk", "er", "uniform"]))
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_and_beside_their_densities(shapes, keep, distribution):
    total = sum(sizes(shapes).values())
    allowance = int(keep * total)
    densities, counts = solved(shapes, allowance, distribution)
    assert sum(counts.values()) == allowance
    for name, size in sizes(shapes).items():
        assert 0 <= counts[name] <= size
        assert abs(counts[name] - densities[name] * size) < 1 + 1e-9


@given(shapes=shapes_of_nets, keep=st.floats(0.01, 1), distribution=st.sampled_from(["erk", "er"]))
@settings(max_examples=60, deadline=None)
def test_densities_are_those_of_taking_the_densest_layer_out_one_at_a_time(shapes, keep, distribution):
    allowance = keep * sum(sizes(shapes).values())
    dense = []
    while True:
        left = [name for name in shapes if name not in dense]
        total = sum(relative_density(shapes[n], distribution) * sizes(shapes)[n] for n in left)
        factor = (allowance - sum(sizes(shapes)[n] for n in dense)) / total if total else 0.0
        wanted = {n: factor * relative_density(shapes[n], distribution) for n in left}
        if not left or max(wanted.values()) <= 1 + 1e-12:
            break
        dense.append(max(wanted, key=lambda n: wanted[n]))
    slow = {name: wanted.get(name, 1.0) for name in shapes}
    assert layer_densities(shapes, allowance, distribution) == pytest.approx(slow)


@given(shapes=shapes_of_nets, keep=st.floats(0.05, 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_with_prices_nothing_affordable_is_left_over(shapes, keep, data):
    price = {name: float(data.draw(st.integers(1, 50))) for name in shapes}
    allowance = keep * sum(price[n] * size for n, size in sizes(shapes).items())
    _, counts = solved(shapes, allowance, price=price)
    left = allowance - sum(price[n] * count for n, count in counts.items())
    assert left >= -1e-6
    assert [n for n, size in sizes(shapes).items() if counts[n] < size and price[n] < left - 1e-6] == []
