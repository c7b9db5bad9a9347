import copy
import pickle
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.graph.labels import tracked, untracked
from lightning_prune.graph.sizes import Attribute, Node, Ratio, Read, Size, describe, evaluate, form_of, leaves
from lightning_prune.graph.trace import Tracer, record

TRACE, OTHER = object(), object()
HEADS = Attribute("body.attention", "heads", None, 4)
PARTS = Attribute("body.split", "parts", 1, 6)
WIDTH = Read(tracked(np.arange(12)))


def numbers():
    """4 heads and 6 of a tuple, as a traced module holds them, and a width of 12 read from a tensor."""
    return Size(4, HEADS, TRACE), Size(6, PARTS, TRACE), Size(12, WIDTH, TRACE)


def after(value, heads=4, parts=6, width=12):
    """What an expression would come out as, were these the sizes."""
    form = form_of(value, TRACE)
    assert form is not None

    def size(dim):
        total = 1
        for n, ids in dim:  # the width may be one factor of a product of dimensions
            total *= n if ids is None else width
        return total

    return evaluate(form, size, {HEADS: heads, PARTS: parts}.__getitem__)


def test_a_size_behaves_as_the_integer_it_is():
    heads, _, width = numbers()
    assert isinstance(heads, int)
    assert heads == 4
    assert (heads < 5, heads > 4, heads != 4, bool(heads)) == (True, False, False, True)
    assert ({4: "four"}[heads], {heads: "four"}[4]) == ("four", "four")
    assert (str(heads), f"{heads}", f"{heads:03d}", "%d" % heads) == ("4", "4", "004", "4")  # noqa: UP031
    assert ([1, 2, 3, 4, 5][heads], list(range(heads)), "ab" * heads) == (5, [0, 1, 2, 3], "abababab")
    assert [0] * heads == [0, 0, 0, 0]
    assert heads * [0] == [0, 0, 0, 0]
    assert heads * (1, 2) == (1, 2, 1, 2, 1, 2, 1, 2)
    assert (-heads, abs(heads), ~heads, heads << 1, heads & 6, divmod(width, 5)) == (-4, 4, -5, 8, 4, (2, 2))
    assert (max(heads, 3), min(heads, width), sum([heads, width])) == (4, 4, 16)
    assert sys.getsizeof(int(heads)) == sys.getsizeof(4)
    assert type(int(heads)) is int


# An expression is written twice: with numbers that remember, and with the sizes they would have after a cut.
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "/": lambda a, b: a / b,
}
LEAVES = st.sampled_from(["heads", "parts", "width", 1, 2, 3, 7])
WHOLE = st.sampled_from(sorted(set(OPERATIONS) - {"/"}))
INTEGERS = st.recursive(LEAVES, lambda inner: st.tuples(WHOLE, inner, inner), max_leaves=6)
EXPRESSIONS = INTEGERS | st.tuples(st.just("/"), INTEGERS, INTEGERS)


def value_of(expression, named):
    if isinstance(expression, tuple):
        symbol, left, right = expression
        return OPERATIONS[symbol](value_of(left, named), value_of(right, named))
    return named.get(expression, expression)


def has_name(expression):
    return isinstance(expression, str) or (isinstance(expression, tuple) and any(map(has_name, expression[1:])))


def remainder_of_number(expression):
    """Whether somewhere a mere number is divided for its remainder: that is computed without a form."""
    if not isinstance(expression, tuple):
        return False
    symbol, left, right = expression
    return (symbol == "%" and not has_name(left) and has_name(right)) or any(map(remainder_of_number, (left, right)))


@given(expression=EXPRESSIONS, heads=st.integers(1, 4), parts=st.integers(1, 6), width=st.integers(1, 12))
def test_what_is_computed_with_sizes_says_how_it_would_come_out_with_others(expression, heads, parts, width):
    assume(has_name(expression) and not remainder_of_number(expression))
    dense = dict(zip(("heads", "parts", "width"), numbers(), strict=True))
    cut = {"heads": heads, "parts": parts, "width": width}
    try:
        said = value_of(expression, dense)
        expected = value_of(expression, cut)
    except ZeroDivisionError:
        assume(False)
    plain = value_of(expression, {"heads": 4, "parts": 6, "width": 12})
    assert (said, type(plain)) == (plain, int if isinstance(said, int) else float)
    assert after(said) == pytest.approx(plain, rel=1e-12)
    assert after(said, heads, parts, width) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("symbol", sorted(set(OPERATIONS) - {"%"}))
@pytest.mark.parametrize("swapped", [False, True])
def test_a_number_may_stand_on_either_side(symbol, swapped):
    _, parts, _ = numbers()
    said = OPERATIONS[symbol](*((7, parts) if swapped else (parts, 7)))
    expected = OPERATIONS[symbol](*((7, 3) if swapped else (3, 7)))
    assert after(said, parts=3) == expected


def test_a_softmax_scale_is_a_float_that_remembers():
    heads, _, width = numbers()
    scale = (width // heads) ** -0.5
    assert isinstance(scale, Ratio)
    assert scale == 3**-0.5
    assert after(scale, heads=2, width=10) == 5**-0.5
    half = width / heads * 0.5
    assert (half, after(half, width=8)) == (1.5, 1.0)
    assert after(1 / (width / heads), width=8) == 0.5


def test_a_product_of_two_dimensions_is_a_dimension():
    *_, width = numbers()
    area = width * Size(5, Read(untracked(5)), TRACE)
    assert isinstance(area.form, Read)
    assert [n for n, _ in area.form.dim] == [12, 5]
    assert [n for n, _ in (3 * width).form.dim] == [3, 12]
    assert isinstance((width + 1).form, Node)
    assert isinstance((width * numbers()[0]).form, Node)  # an attribute is no dimension
    assert isinstance((width * -1).form, Node)  # nor is less than nothing


def test_sizes_of_another_trace_are_mere_numbers():
    *_, width = numbers()
    old = Size(12, WIDTH, OTHER)
    assert form_of(old, TRACE) is None
    assert form_of(old, OTHER) is WIDTH
    for mixed in (width + old, old + width, old // width, width * old, width / old):
        assert form_of(mixed, TRACE) is None
        assert form_of(mixed, OTHER) is None
    assert [type(old + width), type(width / old)] == [int, float]
    assert (old + width, width / old) == (24, 1.0)


def test_a_mere_number_has_no_form():
    assert [form_of(value, TRACE) for value in (4, 0.5, True, "4", None)] == [None] * 5


@pytest.mark.parametrize(
    "lose", [int, np.int64, lambda n: n.__index__(), lambda n: n << 0, lambda n: n & 15, lambda n: ~n]
)
def test_what_loses_the_form_is_a_number_of_the_same_value_again(lose):
    *_, width = numbers()
    assert form_of(lose(width), TRACE) is None
    assert lose(width) == lose(12)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_and_pickles_are_plain(again):
    heads, _, width = numbers()
    got = again(heads)
    assert (type(got), got) == (int, 4)
    nested = copy.deepcopy({"shape": (heads, [width]), "scale": width / heads})
    assert [type(v) for v in (nested["shape"][0], nested["shape"][1][0], nested["scale"])] == [int, int, float]
    assert nested == {"shape": (4, [12]), "scale": 3.0}


def test_torch_takes_sizes_for_integers():
    heads, _, width = numbers()
    x = torch.arange(24.0)
    assert x.view(-1, heads).shape == (6, 4)
    assert x.view((2, width)).shape == (2, 12)
    assert x[:heads].tolist() == [0, 1, 2, 3]
    assert torch.zeros(heads, 2).shape == (4, 2)
    assert x[: heads + 1].sum() == 10
    assert (x[:3] * heads).tolist() == [0, 4, 8]
    assert (heads * x[:3]).tolist() == [0, 4, 8]
    assert (heads - x[:3]).tolist() == [4, 3, 2]
    assert (x[:3] / heads).tolist() == [0.0, 0.25, 0.5]
    assert (heads // torch.tensor([2, 3])).tolist() == [2, 1]
    assert (x[1:3] ** heads).tolist() == [1.0, 16.0]
    assert (x[:3] * (width / heads)).tolist() == [0.0, 3.0, 6.0]
    assert x.split([heads, width, width - heads])[1].tolist() == list(range(4, 16))
    assert torch.nn.functional.pad(x, (heads, heads)).shape == (32,)
    assert torch.tensor([heads, width]).dtype == torch.int64
    assert nn.Linear(width, heads).weight.shape == (4, 12)


def test_other_numbers_go_their_own_way():
    heads, *_ = numbers()
    assert heads * Fraction(1, 2) == 2
    assert heads * 1j == 4j
    assert (heads * np.float64(0.5), np.arange(3) * heads) == (2.0, pytest.approx([0, 4, 8]))
    with pytest.raises(TypeError):
        heads + "4"


def test_forms_are_described_as_the_code_has_them():
    heads, parts, width = numbers()
    assert describe((width // heads).form) == "a size read from a tensor // body.attention.heads"
    assert describe(parts.form) == "body.split.parts[1]"
    assert describe((2 * parts + 1).form) == "2 * body.split.parts[1] + 1"
    assert str(Attribute("", "heads", None, 4)) == "the model.heads"
    assert describe(3) == "3"


def test_leaves_are_what_a_form_is_made_of():
    heads, parts, width = numbers()
    assert list(leaves((width // heads + 3 * parts).form)) == [WIDTH, HEADS, PARTS]
    assert list(leaves(7)) == []


def test_shapes_read_in_a_trace_remember_and_those_read_outside_do_not(net):
    seen = []

    def forward(n, x):
        y = n.a(x)
        seen.append([x.shape[1], *y.shape, y.size(-1), y.size()[1], y.numel(), len(y), y.shape.numel(), *y.size()])
        return n.b(y)

    model = net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    record(model, torch.randn(2, 5))
    first = seen[0]
    assert first[:6] == [5, 1, 6, 6, 6, 6]
    assert [type(v) for v in first[:6]] == [int, int, Size, Size, Size, Size]
    seen.clear()
    model(torch.randn(2, 5))
    assert {type(v) for v in seen[0]} == {int}


def test_the_verb_that_asks_for_a_form_knows_only_its_own_trace():
    records = [record(nn.Linear(2, 2), torch.randn(1, 2)) for _ in range(2)]
    tracers = [Tracer(r, nn.Linear(2, 2), {}) for r in records]
    size = Size(12, WIDTH, records[0])
    assert [tracer.form(size) for tracer in tracers] == [WIDTH, None]
