import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import auto_cli

from lightning_prune.budget import Budget

KEEPS = st.floats(min_value=1e-6, max_value=1, exclude_min=True)


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf, True, "0.5", None, [0.5]])
def test_keep_outside_zero_to_one_or_not_a_number_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep must be .*\(0, 1\]"):
        Budget(keep)


def test_of_must_be_a_known_kind():
    with pytest.raises(ValueError, match="flops, params, units, latency, got 'macs'"):
        Budget(0.5, of="macs")


def test_default_of_fills_only_what_was_left_open():
    assert Budget(0.5).resolved("units") == Budget(0.5, of="units")
    assert Budget(0.5, of="params").resolved("units") == Budget(0.5, of="params")


def test_of_any_takes_a_fraction_a_mapping_or_a_budget():
    assert Budget.of_any(0.25) == Budget(0.25)
    assert Budget.of_any({"keep": 0.25, "of": "params"}) == Budget(0.25, of="params")
    assert Budget.of_any({"keep": 0.25}) == Budget(0.25)
    assert Budget.of_any(Budget(0.25, of="units")) == Budget(0.25, of="units")


@pytest.mark.parametrize("value", [{}, {"of": "flops"}, {"keep": 0.5, "ratio": 1}, {"keep": "half"}, "0.5"])
def test_of_any_refuses_what_is_no_budget(value):
    with pytest.raises(ValueError, match="keep"):
        Budget.of_any(value)


def test_intermediate_budget_goes_down_in_a_straight_line():
    # keep 0.2: three quarters of the way to removing 0.8 leaves 1 - 0.75 * 0.8 = 0.4
    assert Budget(0.2, of="flops").at(0.75).keep == pytest.approx(0.4)
    assert Budget(0.2, of="flops").at(0.75).of == "flops"
    assert Budget(0.2).at(0.0).keep == 1.0


def test_intermediate_budget_at_the_end_is_the_budget_to_the_last_bit():
    # 1 - (1 - 0.1) is 0.09999999999999998, 1 - (1 - 0.3) is 0.30000000000000004
    assert Budget(0.1).at(1.0).keep == 0.1
    assert Budget(0.3).at(1.0).keep == 0.3


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_zero_to_one_is_refused(progress):
    with pytest.raises(ValueError, match="progress"):
        Budget(0.5).at(progress)


@given(KEEPS, st.floats(0, 1), st.floats(0, 1))
def test_intermediate_budget_never_rises_with_progress_nor_falls_below_keep(keep, one, other):
    early, late = sorted([one, other])
    assert 1 >= Budget(keep).at(early).keep >= Budget(keep).at(late).keep >= keep


def test_integers_fit_exactly_what_is_written():
    # 0.29 * 100 is 28.999999999999996 in floating point, and 0.1 * 3 is above 0.3
    budget = Budget(0.29)
    assert budget.fits(29, 100)
    assert not budget.fits(30, 100)
    # beyond 2**53 floats cannot tell neighbours apart
    assert Budget(0.5).fits(10**18, 2 * 10**18)
    assert not Budget(0.5).fits(10**18 + 1, 2 * 10**18)


def test_floats_fit_with_a_tolerance_for_rounding_only():
    assert Budget(0.1).fits(0.1 + 0.2, 3.0)  # 0.30000000000000004
    assert not Budget(0.1).fits(0.3 * (1 + 1e-9), 3.0)
    assert not Budget(0.5).fits(math.nan, 3.0)


@given(KEEPS, st.integers(0, 10**15))
def test_limit_is_the_largest_count_that_fits(keep, dense):
    budget = Budget(keep)
    limit = budget.limit(dense)
    assert budget.fits(limit, dense)
    assert not budget.fits(limit + 1, dense)


def read(budget: Budget = Budget(1.0)) -> Budget:  # noqa: B008  # frozen
    return budget


def test_budget_is_read_from_the_command_line_and_config_as_a_mapping():
    assert auto_cli(read, args=["--budget.keep=0.5", "--budget.of=flops"]) == Budget(0.5, of="flops")
    assert auto_cli(read, args=['--budget={"keep": 0.25}']) == Budget(0.25)


def test_a_third_of_the_way_keeps_what_a_third_says():
    # of 30 units 6 go in three events: 2 each; 1 - 0.2 / 3 in binary is a little below 28 / 30
    budget = Budget(0.8, of="units")
    assert [budget.at(step / 3).limit(30) for step in range(4)] == [30, 28, 26, 24]
    assert budget.at(1 / 3).fits(28, 30)
    assert not budget.at(1 / 3).fits(29, 30)
