import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.errors import NonFiniteScore, UnmeetableBudget
from lightning_prune.ranking import (
    check_finite,
    check_finite_weights,
    greedy_order,
    rank_global,
    rank_uniform,
    rank_weights,
    round_count,
    top_mask,
)

few_values = st.lists(st.sampled_from([0.0, 0.5, 1.0, -2.0]), min_size=1, max_size=12)


def kept(masks):
    return {name: mask.nonzero().squeeze(1).tolist() for name, mask in masks.items()}


def at_most(total, **price):
    """Fits while the channels, each at its group's price, cost no more than a total."""
    return lambda counts: sum(price.get(name, 1) * n for name, n in counts.items()) <= total


# one list of scores


@given(few_values, st.data())
def test_top_mask_keeps_exactly_n_when_scores_tie(values, data):
    n = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    mask = top_mask(scores, n)
    assert int(mask.sum()) == n
    # a threshold would keep all three of [1, 1, 1] or none
    worst_kept = min([v for v, m in zip(values, mask.tolist(), strict=True) if m], default=math.inf)
    best_gone = max([v for v, m in zip(values, mask.tolist(), strict=True) if not m], default=-math.inf)
    assert worst_kept >= best_gone


def test_of_equal_scores_the_lower_index_goes_first():
    assert top_mask(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2).tolist() == [False, False, True, True]
    assert top_mask(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2).tolist() == [True, False, True, False]


def test_top_mask_has_the_shape_of_the_scores():
    assert top_mask(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), 2).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("n", [-1, 4])
def test_a_count_that_is_not_there_is_refused(n):
    with pytest.raises(ValueError, match=f"from 0 to the 3 scores there are, got {n}"):
        top_mask(torch.ones(3), n)


def test_greedy_order_is_that_of_a_loop_over_all_sets():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, gone = rows.T @ rows, []
    for _ in range(6):
        sums = {i: matrix[[*gone, i]][:, [*gone, i]].sum().item() for i in range(6) if i not in gone}
        gone.append(min(sums, key=lambda i: sums[i]))
    assert greedy_order(matrix).tolist() == gone
    assert gone != matrix.diagonal().argsort().tolist()  # each on its own


def test_of_equal_units_the_greedy_order_begins_with_the_lower_index():
    assert greedy_order(torch.eye(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_name_and_number(bad):
    scores = {"good": torch.ones(3), "bad": torch.tensor([1.0, bad, bad])}
    with pytest.raises(NonFiniteScore, match="2 of 3 scores of 'bad'"):
        check_finite(scores)
    with pytest.raises(NonFiniteScore, match="'bad'"):
        rank_global(scores, at_most(3))
    with pytest.raises(NonFiniteScore, match="'bad'"):
        rank_uniform(scores, at_most(3), dense={"good": 3, "bad": 3})


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_a_rounded_count_is_a_multiple_or_the_whole_group(count, size, multiple):
    count = min(count, size)
    rounded = round_count(count, size, multiple)
    assert 1 <= rounded <= size
    assert rounded % multiple == 0 or rounded == size
    assert rounded <= count or rounded == min(multiple, size)  # up only where there is no multiple below
    assert count - rounded < multiple


# one ranking over all groups


def test_the_lowest_channels_of_all_groups_go_until_the_rest_fits():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([2.0, 6.0, 3.0])}
    # ascending: a1 b0 b2 a2 a0 b1; four of six fit, so a1 and b0 go. Uniform would take one of each as well; of three
    # that fit, global takes b2 too and leaves b one channel
    assert kept(rank_global(scores, at_most(4))) == {"a": [0, 2], "b": [1, 2]}
    assert kept(rank_global(scores, at_most(3))) == {"a": [0, 2], "b": [1]}


def test_no_group_loses_its_last_channel_nor_goes_under_its_floor():
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([1.0, 2.0, 3.0])}
    assert kept(rank_global(scores, at_most(2))) == {"a": [2], "b": [2]}
    assert kept(rank_global(scores, at_most(4), floors={"a": 2})) == {"a": [1, 2], "b": [1, 2]}
    assert kept(rank_global(scores, at_most(5), floors={"a": 9})) == {"a": [0, 1, 2], "b": [1, 2]}


def test_equal_scores_go_from_the_earlier_group_first():
    scores = {"a": torch.ones(2), "b": torch.ones(2)}
    assert kept(rank_global(scores, at_most(3))) == {"a": [1], "b": [0, 1]}


def test_what_still_fits_comes_back_after_the_last_one_that_had_to_go():
    # ascending: a0 (price 1), b0 (price 5), then the rest. Of 12 + 3 at most 12 may stay: a0 and b0 go, 9 are left,
    # and then a0, which is cheap, fits again
    scores = {"a": torch.tensor([0.1, 0.9, 0.8]), "b": torch.tensor([0.2, 0.7, 0.6])}
    fits = at_most(13, a=1, b=5)
    assert kept(rank_global(scores, fits)) == {"a": [0, 1, 2], "b": [1, 2]}


def test_a_budget_below_the_floors_is_unmeetable():
    scores = {"a": torch.ones(3), "b": torch.ones(3)}
    with pytest.raises(UnmeetableBudget, match="even the fewest channels"):
        rank_global(scores, at_most(1))
    with pytest.raises(UnmeetableBudget, match="even the fewest channels"):
        rank_global(scores, at_most(3), floors={"a": 3})
    with pytest.raises(UnmeetableBudget, match="even the fewest channels"):
        rank_uniform(scores, at_most(1), dense={"a": 3, "b": 3})


def test_everything_stays_when_everything_fits():
    scores = {"a": torch.randn(3), "b": torch.randn(2)}
    assert all(mask.all() for mask in rank_global(scores, at_most(5)).values())
    assert all(mask.all() for mask in rank_uniform(scores, at_most(5), dense={"a": 3, "b": 2}).values())


groups = st.lists(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=5), min_size=1, max_size=3)


@given(groups, st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(0, 60))
def test_no_single_channel_more_would_fit(values, prices, extra):
    scores = {f"g{i}": torch.tensor(v) for i, v in enumerate(values)}
    price = dict(zip(scores, prices, strict=False))
    total = sum(price[name] for name in scores) + extra  # one channel of each always fits
    masks = rank_global(scores, at_most(total, **price))
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(price[name] * n for name, n in counts.items()) <= total
    assert min(counts.values()) >= 1
    larger = [{**counts, name: n + 1} for name, n in counts.items() if n < len(scores[name])]
    assert not any(at_most(total, **price)(more) for more in larger)
    assert all(torch.equal(mask, top_mask(scores[name], counts[name])) for name, mask in masks.items())


@given(groups, st.integers(1, 15))
def test_with_equal_prices_the_kept_scores_are_the_best_there_are(values, total):
    scores = {f"g{i}": torch.tensor(v) for i, v in enumerate(values)}
    total = max(total, len(scores))
    masks = rank_global(scores, at_most(total))
    reached = sum(float(scores[name][mask].sum()) for name, mask in masks.items())
    choices = itertools.product(*([range(1, len(s) + 1) for s in scores.values()]))
    best = max(
        sum(float(s.sort(descending=True).values[:n].sum()) for s, n in zip(scores.values(), choice, strict=True))
        for choice in choices
        if sum(choice) <= total
    )
    assert reached == best


def test_counts_are_rounded_where_the_group_allows():
    scores = {"a": torch.arange(20.0), "b": torch.arange(6.0) + 100}
    masks = rank_global(scores, at_most(20), round_to=8)
    # 14 of a and 6 of b fit; a goes down to 8, b cannot be a multiple of 8 and stays whole
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 8, "b": 6}
    masks = rank_uniform(scores, at_most(23), dense={"a": 20, "b": 6}, round_to=4)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 16, "b": 6}


def test_scores_permute_with_the_channels():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randperm(9, generator=generator).float()
    order = torch.randperm(9, generator=generator)
    straight = rank_global({"a": scores}, at_most(4))["a"]
    assert torch.equal(rank_global({"a": scores[order]}, at_most(4))["a"], straight[order])


# the same of each group


@given(groups, st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(0, 60))
def test_uniform_counts_lie_within_a_channel_of_one_fraction_that_could_not_be_larger(values, prices, extra):
    scores = {f"g{i}": torch.tensor(v) for i, v in enumerate(values)}
    price = dict(zip(scores, prices, strict=False))
    total = sum(price[name] for name in scores) + extra
    sizes = {name: len(s) for name, s in scores.items()}
    masks = rank_uniform(scores, at_most(total, **price), dense=sizes)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(price[name] * n for name, n in counts.items()) <= total
    assert all(torch.equal(mask, top_mask(scores[name], counts[name])) for name, mask in masks.items())
    # floor(f * size) or one more of each, so f is at least (count - 1) / size and at most (count + 1) / size, which it
    # comes as near as one likes to where the next whole channel does not fit
    assert max((n - 1) / sizes[name] for name, n in counts.items()) <= min(
        [(n + 1) / sizes[name] for name, n in counts.items() if n < sizes[name]] + [2]
    )
    one_more_of_each = {name: min(sizes[name], n + 1) for name, n in counts.items()}
    assert one_more_of_each == counts or not at_most(total, **price)(one_more_of_each)


def test_uniform_keeps_the_same_fraction_of_every_group_whatever_the_scores():
    scores = {"a": torch.arange(8.0), "b": 100 + torch.arange(4.0)}
    assert kept(rank_uniform(scores, at_most(6), dense={"a": 8, "b": 4})) == {"a": [4, 5, 6, 7], "b": [2, 3]}


def test_uniform_gives_single_channels_back_where_one_more_of_each_would_not_fit():
    # of 3 and 3 channels 3 fit: below 2/3 both keep one, at 2/3 both two. One place is left, and a comes first
    scores = {"a": torch.arange(3.0), "b": torch.arange(3.0)}
    masks = rank_uniform(scores, at_most(3), dense={"a": 3, "b": 3})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 2, "b": 1}


def test_a_fraction_is_of_the_dense_group_also_when_half_of_it_has_gone():
    # of 8 dense channels 4 are left: half of the dense model is all of them
    scores = {"a": torch.arange(4.0), "b": torch.arange(8.0)}
    masks = rank_uniform(scores, at_most(8), dense={"a": 8, "b": 8})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 4, "b": 4}


def test_a_group_with_its_own_fraction_keeps_it_and_the_others_make_up_for_it():
    scores = {"a": torch.arange(8.0), "b": torch.arange(8.0)}
    masks = rank_uniform(scores, at_most(10), dense={"a": 8, "b": 8}, keep={"a": 0.75})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 6, "b": 4}


# weights


def test_weights_are_kept_to_the_exact_number_over_all_layers():
    scores = {"a": torch.tensor([[1.0, 5.0], [3.0, 2.0]]), "b": torch.tensor([4.0, 0.0])}
    masks = rank_weights(scores, 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [[False, True], [True, False]],
        "b": [True, False],
    }


@given(st.lists(few_values, min_size=1, max_size=3), st.integers(0, 20))
def test_as_many_weights_stay_as_are_allowed_ties_included(values, allowance):
    scores = {f"w{i}": torch.tensor(v) for i, v in enumerate(values)}
    masks = rank_weights(scores, allowance)
    assert sum(int(mask.sum()) for mask in masks.values()) == min(allowance, sum(map(len, values)))


@given(st.lists(few_values, min_size=1, max_size=3), st.integers(0, 20))
def test_by_layer_the_number_is_exact_too_and_fractions_differ_by_less_than_a_weight(values, allowance):
    scores = {f"w{i}": torch.tensor(v) for i, v in enumerate(values)}
    masks = rank_weights(scores, allowance, scope="layer")
    total = sum(map(len, values))
    assert sum(int(mask.sum()) for mask in masks.values()) == min(allowance, total)
    for name, mask in masks.items():
        assert abs(int(mask.sum()) - min(1, allowance / total) * len(scores[name])) < 1 + 1e-9


def test_prices_are_paid_for_the_best_first():
    scores = {"dear": torch.tensor([9.0, 8.0]), "cheap": torch.tensor([7.0, 6.0])}
    masks = rank_weights(scores, 12, price={"dear": 5.0, "cheap": 1.0})
    assert kept(masks) == {"dear": [0, 1], "cheap": [0, 1]}
    masks = rank_weights(scores, 10, price={"dear": 5.0, "cheap": 1.0})
    assert kept(masks) == {"dear": [0, 1], "cheap": []}


def test_past_a_weight_that_is_too_dear_cheaper_ones_are_still_paid_for():
    scores = {"dear": torch.tensor([9.0, 8.0]), "cheap": torch.tensor([7.0, 6.0])}
    assert kept(rank_weights(scores, 6, price={"dear": 5.0, "cheap": 1.0})) == {"dear": [0], "cheap": [0]}


def test_by_layer_prices_scale_what_a_fraction_costs():
    scores = {"dear": torch.arange(4.0), "cheap": torch.arange(4.0)}
    # half of both costs 2*5 + 2*1 = 12 of 24
    assert kept(rank_weights(scores, 12, price={"dear": 5.0, "cheap": 1.0}, scope="layer")) == {
        "dear": [2, 3],
        "cheap": [2, 3],
    }


def test_a_weight_marked_as_gone_never_stays_though_it_could_be_paid_for():
    scores = {"w": torch.tensor([1.0, -math.inf, 0.0])}
    assert kept(rank_weights(scores, 3)) == {"w": [0, 2]}
    assert kept(rank_weights(scores, 3, scope="layer")) == {"w": [0, 2]}
    # one may stay of w's three: what it leaves of 4, the other layer gets
    scores = {"w": torch.tensor([1.0, -math.inf, -math.inf]), "v": torch.arange(5.0)}
    assert kept(rank_weights(scores, 4, scope="layer")) == {"w": [0], "v": [2, 3, 4]}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weight_scores_that_say_nothing_are_refused(bad):
    with pytest.raises(NonFiniteScore, match="'w'"):
        rank_weights({"w": torch.tensor([1.0, bad])}, 1)


def test_a_negative_allowance_is_unmeetable():
    with pytest.raises(UnmeetableBudget, match="more than the budget"):
        rank_weights({"w": torch.ones(2)}, -1)


def test_scores_are_compared_at_their_own_precision():
    # equal as float32, apart as float64: the lower index goes only where they tie
    scores = {"w": torch.tensor([1.0 + 1e-12, 1.0], dtype=torch.float64)}
    assert kept(rank_weights(scores, 1)) == {"w": [0]}


@pytest.mark.parametrize("rank", [rank_global, partial(rank_uniform, dense={"a": 64, "b": 6})])
def test_floors_that_are_no_multiple_are_rounded_up(rank):
    scores = {"a": torch.arange(64.0), "b": torch.arange(6.0) + 100}
    masks = rank(scores, at_most(30), floors={"a": 19, "b": 5}, round_to=8)
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (24, 6)  # not 19; b has no multiple of 8


def test_layers_that_keep_all_they_can_leave_the_rest_its_exact_share():
    # of b only 20 may stay: 140 of 260 then are for a and c, more than the 30 that may stay of c; a has the other 110
    gone = torch.full((80,), -torch.inf)
    scores = {
        "a": torch.arange(200.0),
        "b": torch.cat([torch.arange(20.0), gone]),
        "c": torch.cat([torch.arange(30.0), gone[:30]]),
    }
    masks = rank_weights(scores, 160, scope="layer")
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 110, "b": 20, "c": 30}


# a network that computes nothing any more


def test_weights_whose_squares_overflow_are_finite_all_the_same():
    large = {"a": torch.full((4,), 1e30), "b": torch.full((3,), 6e4, dtype=torch.float16), "n": torch.tensor([2**40])}
    assert not torch.isfinite(torch.linalg.vector_norm(large["a"]))  # what is looked at first
    check_finite_weights(large)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteScore, match="weights of 'c' and 1 more are NaN or infinite"):
            check_finite_weights({**large, "c": torch.tensor([1.0, bad]), "d": torch.tensor([bad])})


# what came back is asked about no more often than it has to be


def given_back_one_by_one(scores, fits, round_to):
    """`rank_global`, but every unit that went asks again for its group."""
    names, kept = list(scores), {name: len(score) for name, score in scores.items()}
    order = sorted((float(s), i, j) for i, name in enumerate(names) for j, s in enumerate(scores[name]))

    def counts(removed):
        gone = [0] * len(names)
        for _, i, _ in ascending[:removed]:
            gone[i] += 1
        return {n: max(round_count(1, kept[n], round_to), round_count(kept[n] - k, kept[n], round_to))
                for n, k in zip(names, gone, strict=True)}  # fmt: skip

    last = {}  # the best of each group stay
    for _, i, j in order:
        last.setdefault(i, []).append(j)
    least = {i: set(js[len(js) - round_count(1, len(js), round_to) :]) for i, js in last.items()}
    ascending = [one for one in order if one[2] not in least[one[1]]]
    removed = next(r for r in range(len(ascending) + 1) if fits(counts(r)))
    left = counts(removed)
    for _, i, _ in reversed(ascending[:removed]):
        name = names[i]
        more = min(kept[name], left[name] + round_to)
        if more > left[name] and (more % round_to == 0 or more == kept[name]) and fits({**left, name: more}):
            left[name] = more
    return left


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.integers(1, 3),
    st.floats(0, 1),
)
def test_what_still_fits_comes_back_as_if_every_unit_asked(values, price, round_to, share):
    scores = {f"g{i}": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    prices = dict(zip(scores, price, strict=False))
    floor = sum(prices[n] * round_count(1, len(s), round_to) for n, s in scores.items())
    whole = sum(prices[n] * len(s) for n, s in scores.items())
    fits = at_most(floor + share * (whole - floor), **prices)
    found = rank_global(scores, fits, round_to=round_to)
    assert {name: int(mask.sum()) for name, mask in found.items()} == given_back_one_by_one(scores, fits, round_to)


def test_a_group_that_cannot_have_more_is_not_asked_about_again():
    asked = []

    def fits(counts):
        asked.append(counts)
        return 101 * counts["dear"] + counts["cheap"] <= 150

    scores = {"dear": torch.arange(1000.0), "cheap": torch.tensor([1e3, 1e4])}
    assert {name: int(mask.sum()) for name, mask in rank_global(scores, fits).items()} == {"dear": 1, "cheap": 2}
    assert len(asked) < 20
