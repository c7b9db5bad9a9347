import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jsonargparse import auto_cli

from lightning_prune.errors import NoEvent
from lightning_prune.schedule import (
    CURVES,
    Event,
    Gradual,
    Iterative,
    OneShot,
    Rounds,
    Schedule,
    Updates,
    cosine,
    cubic,
    polynomial,
)


def steps(events):
    return [event.step for event in events]


def progresses(events):
    return [event.progress for event in events]


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_curve_runs_from_zero_to_exactly_one_and_never_falls(curve):
    values = [curve(i / 100) for i in range(101)]
    assert values[0] == 0
    assert values[-1] == 1
    assert values == sorted(values)


@pytest.mark.parametrize(("tau", "sparsity"), [(0.1, 0.2439), (0.25, 0.5203125), (0.5, 0.7875), (1.0, 0.9)])
def test_cubic_gives_the_sparsities_of_zhu_and_gupta(tau, sparsity):
    # eq. 1 with s_i = 0, s_f = 0.9: s = 0.9 * (1 - (1 - tau)**3); tau 0.5: 0.9 * (1 - 0.125) = 0.7875
    assert 0.9 * cubic(tau) == pytest.approx(sparsity)


def test_curves_differ_where_their_names_say():
    # at a quarter: linear 1/4, cosine (1 - sqrt(1/2)) / 2, cubic 1 - 27/64
    assert CURVES["linear"](0.25) == 0.25
    assert cosine(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert cubic(0.25) == 37 / 64
    assert polynomial(0.25, 1.0) == 0.25


def test_one_shot_is_one_event_with_all_progress():
    assert OneShot(0.25).resolve(100, 10) == (Event(25, 1.0),)
    assert OneShot(7, unit="step").resolve(None, None) == (Event(7, 1.0),)
    assert OneShot(1.5, unit="epoch").resolve(100, 10) == (Event(15, 1.0),)


def test_step_zero_is_before_the_first_training_step():
    assert OneShot(0.0).resolve(100, 10) == (Event(0, 1.0),)


def test_iterative_spreads_events_from_start_to_end_and_prunes_at_the_first():
    # 4 events from step 10 to step 70: 20 apart; the k-th has progress k / 4
    events = Iterative(start=0.1, end=0.7, events=4).resolve(100, 10)
    assert steps(events) == [10, 30, 50, 70]
    assert progresses(events) == [0.25, 0.5, 0.75, 1.0]


def test_iterative_every_overrides_events_and_forgives_rounding():
    # (0.7 - 0.1) / 0.2 is 2.9999999999999996, still 4 events
    assert steps(Iterative(start=0.1, end=0.7, every=0.2).resolve(100, 10)) == [10, 30, 50, 70]


def test_iterative_every_that_overshoots_the_end_stops_before_it_with_full_progress():
    events = Iterative(start=2, end=9, every=3, unit="step").resolve(20, None)
    assert steps(events) == [2, 5, 8]
    assert progresses(events) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_iterative_curve_shapes_the_progress():
    # cubic at 1/2 is 7/8
    assert progresses(Iterative(events=2, curve="cubic").resolve(100, None)) == [0.875, 1.0]


def test_single_iterative_event_comes_at_the_end():
    assert Iterative(start=0.1, end=0.6, events=1).resolve(10, None) == (Event(6, 1.0),)


def test_gradual_skips_the_start_where_nothing_would_go():
    # dt = 10: tau 1/4, 1/2, 3/4, 1; cubic 37/64, 7/8, 63/64, 1
    events = Gradual(start=20, end=60, every=10, unit="step").resolve(100, None)
    assert events == (Event(30, 37 / 64), Event(40, 7 / 8), Event(50, 63 / 64), Event(60, 1.0))


def test_gradual_counts_events_and_ends_at_the_end():
    assert steps(Gradual(start=0.0, end=0.5, events=5).resolve(100, None)) == [10, 20, 30, 40, 50]


def test_gradual_every_that_overshoots_the_end_adds_the_end():
    # tau of step 15 is 10/25; a shorter last distance leads to the end
    events = Gradual(start=5, end=30, every=10, power=1, unit="step").resolve(100, None)
    assert steps(events) == [15, 25, 30]
    assert progresses(events) == pytest.approx([0.4, 0.8, 1.0])


def test_events_on_one_step_become_one_with_the_largest_progress():
    # 10 events in steps 0 to 2 of a fit of 3
    events = Iterative(start=0.0, end=0.7, events=10).resolve(3, None)
    assert steps(events) == [0, 1, 2]
    assert progresses(events)[-1] == 1.0
    assert progresses(events) == sorted(set(progresses(events)))


def test_fraction_below_one_leaves_a_step_in_the_shortest_fit():
    assert OneShot(0.7).resolve(1, None) == (Event(0, 1.0),)


@pytest.mark.parametrize(
    ("schedule", "total", "epoch"),
    [
        (OneShot(1.0), 100, 10),
        (OneShot(100, unit="step"), 100, 10),
        (Iterative(start=1, end=10, unit="epoch"), 100, 10),
        (OneShot(0.5), 0, None),
    ],
)
def test_event_with_no_training_step_after_it_is_refused(schedule, total, epoch):
    with pytest.raises(NoEvent, match="at least one has to follow the last event"):
        schedule.resolve(total, epoch)


def test_fraction_of_a_fit_without_an_end_asks_for_steps():
    with pytest.raises(NoEvent, match="unit='step'"):
        Gradual().resolve(None, 10)


def test_epochs_of_unknown_length_ask_for_steps():
    with pytest.raises(NoEvent, match="unit='step'"):
        OneShot(1, unit="epoch").resolve(100, None)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OneShot(1.5), r"at must be in \[0, 1\]"),
        (lambda: OneShot(-1, unit="step"), "at least 0"),
        (lambda: OneShot(1.5, unit="step"), "whole number of steps"),
        (lambda: OneShot(math.nan), "finite"),
        (lambda: OneShot(0.5, unit="batch"), "unit must be one of fit, step, epoch"),
        (lambda: Iterative(start=0.5, end=0.4), "start must not be after end"),
        (lambda: Iterative(events=0), "events"),
        (lambda: Iterative(every=0.0), "every"),
        (lambda: Iterative(curve="sine"), "curve must be one of linear, cubic, cosine"),
        (lambda: Gradual(start=0.5, end=0.5), "start < end"),
        (lambda: Gradual(power=0), "power"),
        (lambda: Event(-1, 0.5), "step"),
        (lambda: Event(1, 1.5), "progress"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@st.composite
def schedules(draw):
    start, end = sorted([draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))])
    every = draw(st.none() | st.floats(0.01, 1))
    count = draw(st.integers(1, 50))
    if draw(st.booleans()):
        return Iterative(start, end, every, count, curve=draw(st.sampled_from(list(CURVES))))
    assume(end - start > 1e-6)
    return Gradual(start, end, every, count, power=draw(st.floats(0.5, 5)))


@given(schedules(), st.integers(1, 10_000))
def test_resolved_events_rise_in_step_never_fall_in_progress_and_end_at_one(schedule, total):
    events = schedule.resolve(total, None)
    assert steps(events) == sorted(set(steps(events)))
    assert progresses(events) == sorted(progresses(events))
    assert events[-1].progress == 1.0
    assert 0 <= events[0].step <= events[-1].step < total


def read(schedule: Schedule) -> Schedule:
    return schedule


def test_schedule_is_read_from_a_config_by_class_path():
    config = '{"class_path": "lightning_prune.schedule.Gradual", "init_args": {"end": 0.5, "events": 3}}'
    assert auto_cli(read, args=[config]) == Gradual(end=0.5, events=3)
    config = '{"class_path": "lightning_prune.schedule.Rounds", "init_args": {"events": 3, "epochs": 1}}'
    assert auto_cli(read, args=[config]) == Rounds(3, epochs=1)


def test_updates_come_at_their_distance_before_the_end_all_the_way_each_time():
    events = Updates(every=100, end=0.75).resolve(4000, None)
    assert steps(events) == list(range(0, 3000, 100))  # 3000 itself is not before the end
    assert set(progresses(events)) == {1.0}


def test_updates_of_the_rigl_paper_on_cifar():
    # 97,656 steps, the last update before 75,000
    events = Updates(every=100, end=75_000 / 97_656).resolve(97_656, 391)
    assert (len(events), events[1].step, events[-1].step) == (750, 100, 74_900)


def test_updates_move_together_where_too_few_would_fit():
    # 126 steps, until 0.75 * 126 = 94.5: 20 of them every 4.7 steps
    events = Updates(every=100, end=0.75, least=20).resolve(126, 42)
    assert len(events) == 20
    assert steps(events)[:3] == [0, 5, 9]
    assert steps(events)[-1] < 94
    assert steps(Updates(least=20).resolve(8, 4)) == [0, 1, 2, 3, 4, 5]  # never more than one a step


def test_closing_updates_come_at_the_ends_of_epochs_and_of_the_fit():
    assert steps(Updates(1, "epoch", end=1.0, least=1, closing=True).resolve(12, 4)) == [4, 8, 12]
    assert steps(Updates(1, "epoch", end=1.0, least=6, closing=True).resolve(12, 4)) == [2, 4, 6, 8, 10, 12]
    assert steps(Updates(5, "step", end=1.0, least=1, closing=True).resolve(12, 4)) == [5, 10, 12]
    assert steps(Updates(0.5, "fit", start=0.5, end=1.0, least=2, closing=True).resolve(12, 4)) == [9, 12]


def test_updates_refuse_what_they_cannot_place():
    with pytest.raises(NoEvent, match="this fit has no end; set max_steps"):
        Updates().resolve(None, 4)
    with pytest.raises(NoEvent, match="an epoch has no known number of steps"):
        Updates(1, "epoch").resolve(100, None)
    with pytest.raises(ValueError, match=r"start < end, got both 0\.5"):
        Updates(start=0.5, end=0.5)
    with pytest.raises(ValueError, match="least must be an int of at least 1, got 0"):
        Updates(least=0)
    with pytest.raises(ValueError, match=r"every must be a whole number of steps, got 1\.5"):
        Updates(every=1.5)
    with pytest.raises(ValueError, match="every must be above 0, got 0"):
        Updates(every=0)
    with pytest.raises(ValueError, match="unit must be one of fit, step, epoch, got 'batch'"):
        Updates(unit="batch")


@given(st.integers(1, 3000), st.integers(1, 500), st.floats(0.05, 1.0), st.integers(1, 40), st.booleans())
def test_updates_rise_and_stay_within_their_span(total, every, end, least, closing):
    events = Updates(every=every, end=end, least=least, closing=closing).resolve(total, None)
    assert events
    assert steps(events) == sorted(set(steps(events)))
    assert steps(events)[-1] <= max(1, round(end * total))
    assert (steps(events)[0] == 0) is not closing


def test_rounds_are_ends_of_equal_phases_and_leave_a_whole_one():
    # four phases of 25 steps
    assert Rounds(3, steps=1).resolve(100, None) == (Event(25, 1 / 3), Event(50, 2 / 3), Event(75, 1.0))


def test_rounds_end_with_epochs_where_there_is_one_for_each_phase():
    # 7 epochs of 10 steps in 3 phases: 2, 2 and 3 epochs; in 4 and a bit of epochs the bit is the last phase's
    assert steps(Rounds(2, epochs=1).resolve(70, 10)) == [20, 40]
    assert steps(Rounds(3, epochs=1).resolve(43, 10)) == [10, 20, 30]


def test_rounds_are_fewer_where_phases_would_be_too_short():
    # 12 epochs of 10 steps
    assert len(Rounds(99, epochs=1).resolve(120, 10)) == 11
    assert len(Rounds(99, epochs=3).resolve(120, 10)) == 3
    assert progresses(Rounds(99, epochs=3).resolve(120, 10)) == [1 / 3, 2 / 3, 1.0]
    assert len(Rounds(2, epochs=3).resolve(120, 10)) == 2


def test_rounds_of_long_epochs_count_steps():
    # one epoch of 5,000 steps: five phases of a thousand, where ten would be five hundred
    assert steps(Rounds(10, steps=1000).resolve(5000, 5000)) == [1000, 2000, 3000, 4000]


def test_there_is_one_round_in_the_shortest_fit():
    assert Rounds().resolve(8, 4) == (Event(4, 1.0),)
    assert Rounds().resolve(3, 3) == (Event(1, 1.0),)
    assert Rounds().resolve(2, 100) == (Event(1, 1.0),)


def test_rounds_refuse_what_they_cannot_place():
    with pytest.raises(NoEvent, match="this fit has no end; set max_steps"):
        Rounds().resolve(None, 4)
    with pytest.raises(NoEvent, match="this fit has no step"):
        Rounds().resolve(0, None)
    with pytest.raises(ValueError, match="events must be an int of at least 1, got 0"):
        Rounds(0)
    with pytest.raises(ValueError, match=r"steps must be an int of at least 1, got 1\.5"):
        Rounds(steps=1.5)
    with pytest.raises(ValueError, match="epochs must be above 0, got 0"):
        Rounds(epochs=0)
    with pytest.raises(ValueError, match="epochs must be a finite number, got True"):
        Rounds(epochs=True)


@given(st.integers(1, 30), st.floats(0.1, 5), st.integers(1, 2000), st.integers(2, 5000), st.integers(1, 600))
def test_phases_of_rounds_are_equal_up_to_an_epoch_and_none_is_longer_than_the_last(events, epochs, least, total, each):
    found = Rounds(events, epochs, least).resolve(total, each)
    ends = [0, *steps(found), total]
    lengths = [end - start for start, end in pairwise(ends)]
    assert 1 <= len(found) <= events
    assert min(lengths) >= 1
    assert lengths[-1] == max(lengths)
    assert max(lengths[:-1]) - min(lengths[:-1]) <= each
    assert progresses(found) == [i / len(found) for i in range(1, len(found) + 1)]
    assert Rounds(events, epochs, least).points()[-1][1] == 1.0
