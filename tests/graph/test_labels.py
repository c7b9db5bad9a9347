import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from lightning_prune.graph.labels import (
    Unsplittable,
    full,
    ids_of,
    is_tracked,
    merge,
    reshape,
    size_of,
    tracked,
    untracked,
)


def ids(*values):
    return np.array(values, dtype=np.int64)


def test_a_dimension_of_one_index_has_no_factor_tracked_or_not():
    assert untracked(1) == ()
    assert tracked(ids(7)) == ()
    assert size_of(()) == 1
    assert full(()).tolist() == [-1]


def test_labels_that_are_all_unknown_are_no_labels():
    assert tracked(ids(-1, -1)) == ((2, None),)
    assert is_tracked(tracked(ids(-1, 4)))


def test_flattening_keeps_the_factor_instead_of_repeating_its_labels():
    flat = merge([tracked(ids(5, 6)), untracked(3), untracked(2)])
    assert [n for n, _ in flat] == [2, 6]
    assert flat[0][1].tolist() == [5, 6]
    assert flat[1][1] is None


def test_full_repeats_labels_over_what_lies_inside_and_tiles_them_over_what_lies_outside():
    inside = merge([tracked(ids(5, 6)), untracked(3)])  # (C, H*W): each channel is three columns in a row
    outside = merge([untracked(3), tracked(ids(5, 6))])  # (H*W, C): channels alternate
    assert full(inside).tolist() == [5, 5, 5, 6, 6, 6]
    assert full(outside).tolist() == [5, 6, 5, 6, 5, 6]


def test_full_says_nothing_where_two_tracked_factors_meet():
    both = merge([tracked(ids(1, 2)), tracked(ids(3, 4))])
    assert full(both) is None
    assert [i.tolist() for i in ids_of(both)] == [[1, 2], [3, 4]]


def test_a_view_that_flattens_and_one_that_unflattens_are_inverse():
    dims = [untracked(2), tracked(ids(5, 6, 7)), untracked(4)]
    flat, splits = reshape(dims, (2, 12))
    assert splits == []
    back, splits = reshape(flat, (2, 3, 4))
    assert splits == []
    assert full(back[1]).tolist() == [5, 6, 7]
    assert not is_tracked(back[2])


def test_a_split_into_equal_parts_keeps_the_labels_of_the_first_and_reports_what_was_split():
    dims, splits = reshape([tracked(ids(0, 1, 2, 3, 4, 5))], (2, 3))
    assert not is_tracked(dims[0])
    assert full(dims[1]).tolist() == [0, 1, 2]
    assert [(grid.tolist(), axis) for grid, axis in splits] == [([[0, 1, 2], [3, 4, 5]], 1)]


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (8, 2)])
def test_a_view_that_does_not_divide_a_tracked_dimension_evenly_is_refused(shape):
    # 6 labels and a plain 2: 4 parts of 6 labels would cut the second channel in two
    with pytest.raises(Unsplittable):
        reshape([tracked(np.arange(6)), untracked(2)], shape)


def test_a_view_to_another_number_of_entries_is_refused():
    with pytest.raises(Unsplittable):
        reshape([tracked(np.arange(6)), untracked(2)], (6,))


@given(st.data())
def test_a_view_puts_every_label_where_numpy_puts_it(data):
    sizes = st.sampled_from([1, 2, 3, 4, 6])
    before = data.draw(st.lists(sizes, min_size=1, max_size=4))
    which = data.draw(st.integers(0, len(before) - 1))
    total = int(np.prod(before))
    after, left = [], total
    for _ in range(data.draw(st.integers(0, 3))):
        after.append(data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= after[-1]
    after.append(left)
    dims = [tracked(np.arange(n)) if i == which else untracked(n) for i, n in enumerate(before)]
    wide = [-1 if i == which else 1 for i in range(len(before))]
    labels = np.broadcast_to(np.arange(before[which]).reshape(wide), before).reshape(after)
    try:
        made, splits = reshape(dims, after)
    except Unsplittable:
        reject()
    assert [size_of(dim) for dim in made] == after
    assert all(axis == grid.ndim - 1 for grid, axis in splits)  # the innermost part keeps the labels
    parts = int(np.prod([grid.size // grid.shape[axis] for grid, axis in splits]))
    assert sum(is_tracked(dim) for dim in made) == (before[which] // parts > 1)
    for axis in [axis for axis, dim in enumerate(made) if is_tracked(dim)]:
        wide = [-1 if i == axis else 1 for i in range(len(after))]
        expected = labels % (before[which] // parts)  # the same index of every part is one channel
        assert (np.broadcast_to(full(made[axis]).reshape(wide), after) == expected).all()
