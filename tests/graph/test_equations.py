"""Attributes that follow: sizes in a model's own code shrink along where they can, and else freeze with the line."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.errors import TraceError
from lightning_prune.graph.groups import build
from lightning_prune.graph.sizes import Size
from lightning_prune.graph.trace import record
from lightning_prune.surgery import cut, trace

ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def sizes(graph):
    return {group.name: group.size for group in graph.groups}


def keep(*which):
    """keep(0, 2, of 4) as a mask: the last number is how many there are."""
    *kept, count = which
    mask = torch.zeros(count, dtype=torch.bool)
    mask[kept] = True
    return mask


def attended(n, q, k, v):
    return n.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attention(net, forward, **more):
    """Four heads of width two."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in ("q", "k", "v")}
    return net(forward, **layers, o=nn.Linear(8, 3), heads=4, size=2, **more)


def of_stream(n, x):
    b, t, c = x.shape
    return attended(n, *(layer(x).view(b, t, n.heads, c // n.heads).transpose(1, 2) for layer in (n.q, n.k, n.v)))


# heads


def test_whole_heads_go_and_their_number_follows(net, check_cut):
    def forward(n, x):
        b, t, _ = x.shape
        return attended(n, *(layer(x).view(b, t, n.heads, n.size).transpose(1, 2) for layer in (n.q, n.k, n.v)))

    model = attention(net, forward)
    graph = trace(model, TOKENS)
    assert sizes(graph) == {"q": 4}
    assert graph.suspects == frozenset()
    plan = graph.plan({"q": keep(0, 3, 4)})
    assert dict(plan.attributes[""]) == {"heads": 2}
    assert plan.kept["q.weight"][0].tolist() == [0, 1, 6, 7]  # head 0 and head 3, both of their channels
    assert plan.kept["o.weight"][1].tolist() == [0, 1, 6, 7]
    cut(model, plan)
    assert (model.heads, model.size, type(model.heads)) == (2, 2, int)
    assert model(TOKENS).shape == (2, 5, 3)
    check_cut(trace(model, TOKENS))  # traced again with two heads left


def test_a_head_width_read_off_the_residual_stream_freezes_stream_and_heads_and_the_line_is_named(net):
    model = net(lambda n, x: n.attention(n.stem(x)), stem=nn.Linear(8, 8), attention=attention(net, of_stream))
    graph = trace(model, TOKENS)
    assert graph.groups == ()
    line = of_stream.__code__.co_firstlineno + 2
    for name in ("stem", "attention.q", "attention.k", "attention.v"):
        why = graph.frozen[name]
        assert "a size read from a tensor // attention.heads has to stay as wide as it is" in why
        assert f"(in attention, test_equations.py:{line})" in why


def test_a_head_width_read_off_the_layers_own_output_lets_the_same_index_of_every_head_go(net, check_cut):
    def forward(n, x):
        qkv = (layer(x) for layer in (n.q, n.k, n.v))
        return attended(n, *(y.view(*y.shape[:2], n.heads, y.shape[2] // n.heads).transpose(1, 2) for y in qkv))

    graph = trace(attention(net, forward, scale=1.0), TOKENS)
    assert {group.size for group in graph.groups} <= {2, 4}
    assert all("stay as wide" not in why for why in graph.frozen.values())
    check_cut(graph, exact=all(group.exact for group in graph.groups))


# splits and slices


def parted(net, forward, first=2, rest=4, **more):
    torch.manual_seed(0)
    layers = {"c": nn.Linear(5, first + rest), "d": nn.Linear(first, 3), "e": nn.Linear(rest, 3)}
    return net(forward, **layers, **more)


def test_a_split_by_attributes_leaves_two_groups_that_go_on_their_own(net, check_cut):
    def forward(n, x):
        a, b = n.c(x).split([n.first, n.rest], 1)
        return n.d(a) + n.e(b)

    model = parted(net, forward, first=2, rest=4)
    model.first, model.rest = 2, 4
    graph = trace(model, ROWS)
    assert sizes(graph) == {"c": 2, "c:2": 4}
    plan = graph.plan({"c:2": keep(1, 2, 3, 4)})
    assert plan.kept["c.weight"][0].tolist() == [0, 1, 3, 4, 5]
    assert dict(plan.attributes[""]) == {"rest": 3}
    check_cut(graph)


@pytest.mark.parametrize("kind", [tuple, list])
def test_one_entry_of_a_tuple_follows_and_the_others_stay(kind, net, check_cut):
    def forward(n, x):
        a, b = n.c(x).split(n.sizes, 1)
        return n.d(a) + n.e(b)

    graph = trace(parted(net, forward, sizes=kind([2, 4])), ROWS)
    assert sizes(graph) == {"c": 2, "c:2": 4}
    plan = graph.plan({"c:2": keep(0, 4)})
    assert tuple(plan.attributes[""]["sizes"]) == (2, 1)
    model = check_cut(graph)
    assert sum(model.sizes) == model.c.out_features


def test_a_split_by_numbers_freezes(net):
    def forward(n, x):
        a, b = n.c(x).split([2, 4], 1)
        return n.d(a) + n.e(b)

    graph = trace(parted(net, forward), ROWS)
    assert graph.groups == ()
    assert "it is split into parts of [2, 4], by number" in graph.frozen["c"]
    assert "test_equations.py:" in graph.frozen["c"]


def test_halves_go_alike_index_by_index(net, check_cut):
    def forward(n, x):
        y = n.c(x)
        return n.d(y[:, : y.shape[1] // 2]) + n.e(y[:, y.shape[1] // 2 :])

    graph = trace(parted(net, forward, 4, 4), ROWS)
    assert sizes(graph) == {"c": 4}
    assert graph.plan({"c": keep(0, 2, 4)}).kept["c.weight"][0].tolist() == [0, 2, 4, 6]
    check_cut(graph)


def test_parts_at_an_attribute_go_each_on_its_own(net, check_cut):
    """``y[:, :half]`` is shorter with ``half``; ``y[:, half:]`` takes whatever is left."""

    def forward(n, x):
        y = n.c(x)
        return n.d(y[:, : n.half]) + n.e(y[:, n.half :])

    model = parted(net, forward, 4, 4, half=4)
    graph = trace(model, ROWS)
    assert sizes(graph) == {"c": 4, "c:2": 4}
    assert "" not in graph.plan({"c:2": keep(0, 2, 4)}).attributes
    assert dict(graph.plan({"c": keep(0, 2, 3, 4)}).attributes[""]) == {"half": 3}
    check_cut(graph)


def test_a_slice_at_a_number_freezes(net):
    def forward(n, x):
        y = n.c(x)
        return n.d(y[:, :4]) + n.e(y[:, 4:])

    graph = trace(parted(net, forward, 4, 4), ROWS)
    assert graph.groups == ()
    assert "it is sliced at a number in the model's code" in graph.frozen["c"]


# padding and states


def test_zero_padding_by_an_attribute_follows_and_the_zeros_go_with_it(net, check_cut):
    """Channels 0 1 of the padded ones are zeros, 2 to 5 the convolution's, 6 7 zeros; what is added to them couples."""
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.o(F.pad(n.c(x), (0, 0, 0, 0, n.extra, n.extra)) + n.d(x)),
        extra=2, c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(3, 8, 1), o=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    graph = trace(model, IMAGES)
    assert sizes(graph) == {"c": 4, "d": 2}
    zeros = graph.plan({"d": keep(0, 2)})
    assert dict(zeros.attributes[""]) == {"extra": 1}
    assert zeros.kept["d.weight"][0].tolist() == [0, 2, 3, 4, 5, 6]  # as many behind as before
    assert "c.weight" not in zeros.kept
    inner = graph.plan({"c": keep(0, 1, 2, 4)})
    assert "" not in inner.attributes
    assert inner.kept["d.weight"][0].tolist() == [0, 1, 2, 3, 4, 6, 7]
    check_cut(graph)


def test_a_state_made_with_an_attribute_follows_the_recurrent_layer(net, check_cut):
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.o(n.r(x, torch.zeros(1, x.shape[0], n.hidden, dtype=x.dtype))[0]),
        hidden=6, r=nn.GRU(8, 6, batch_first=True), o=nn.Linear(6, 3),
    )  # fmt: skip
    graph = trace(model, TOKENS)
    assert sizes(graph) == {"r": 6}
    attributes = graph.plan({"r": keep(0, 1, 2, 3, 6)}).attributes
    assert dict(attributes[""]) == {"hidden": 4}
    assert dict(attributes["r"]) == {"hidden_size": 4}
    check_cut(graph)


# views


def folded(net, forward, **more):
    """8 channels seen as 4 x 2."""
    torch.manual_seed(0)
    return net(forward, a=nn.Linear(5, 8), o=nn.Linear(8, 3), **more)


def test_minus_one_takes_what_is_left(net, check_cut):
    model = folded(net, lambda n, x: n.o(n.a(x).view(x.shape[0], -1, n.size).flatten(1)), size=2)
    graph = trace(model, ROWS)
    assert sizes(graph) == {"a": 4}  # four pairs: the attribute stays, so that -1 is what shrinks
    assert graph.plan({"a": keep(1, 2, 4)}).kept["a.weight"][0].tolist() == [2, 3, 4, 5]
    assert "" not in graph.plan({"a": keep(1, 2, 4)}).attributes
    check_cut(graph)


def test_an_unflatten_module_follows(check_cut):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(12, 3)
    )
    graph = trace(model, ROWS)
    assert sizes(graph) == {"0": 4, "2": 3}
    plan = graph.plan({"0": keep(0, 2, 3, 4)})
    assert tuple(plan.attributes["1"]["unflattened_size"]) == (3, 2, 2)
    assert type(model[1].unflattened_size) is tuple
    assert [type(n) for n in model[1].unflattened_size] == [int] * 3
    cut_model = check_cut(graph)
    assert cut_model[1].unflattened_size[0] == cut_model[2].in_channels


@pytest.mark.parametrize(
    "held",
    [SimpleNamespace(count=4), SimpleNamespace(count=4, more={"count": 4})],
    ids=["an object", "an object with a dictionary"],
)
def test_a_number_in_a_config_is_a_mere_number_so_a_trial_freezes_it(held, net):
    model = folded(net, lambda n, x: n.o(n.a(x).view(x.shape[0], n.config.count, 2).relu().flatten(1)), config=held)
    graph = trace(model, ROWS)
    assert graph.groups == ()
    assert "a trial cut failed" in graph.frozen["a"]
    assert held.count == 4


def test_a_number_in_a_config_that_need_not_shrink_does_no_harm(net, check_cut):
    config = SimpleNamespace(size=2)
    model = folded(net, lambda n, x: n.o(n.a(x).view(x.shape[0], -1, n.config.size).relu().flatten(1)), config=config)
    graph = trace(model, ROWS)
    assert sizes(graph) == {"a": 4}
    check_cut(graph)


@functools.lru_cache
def layout(shape, parts):
    """As libraries do that parse a pattern once: the shapes to fold to and back."""
    return (shape[0], parts, shape[1] // parts), (shape[0], shape[1])


def test_sizes_remembered_by_a_cache_are_not_trusted_in_a_later_trace(net, check_cut):
    def forward(n, x):
        y = n.a(x)
        there, back = layout(tuple(y.shape), n.parts)
        return n.o(y.reshape(there).relu().reshape(back))

    layout.cache_clear()
    graphs = [trace(folded(net, forward, parts=2), ROWS) for _ in range(3)]
    assert layout.cache_info().hits >= 1
    # the first trace filled the cache; the later ones get its numbers, of which none is theirs: a trial decides
    assert [sizes(graph) for graph in graphs] == [{"a": 4}] * 3
    assert graphs[1].suspects == graphs[2].suspects == {"a"}
    for graph in graphs:
        check_cut(graph)


# one attribute, several uses


def test_an_attribute_that_sizes_two_coupled_dimensions_lets_both_go_at_once(net, check_cut):
    torch.manual_seed(0)

    def forward(n, x):
        a = n.a(x).view(x.shape[0], n.count, n.one).sum(2)
        return n.o(a + n.b(x).view(x.shape[0], n.count, n.other).sum(2))

    model = net(forward, count=4, one=2, other=3, a=nn.Linear(5, 8), b=nn.Linear(5, 12), o=nn.Linear(4, 3))
    graph = trace(model, ROWS)
    assert sizes(graph) == {"a": 4}
    plan = graph.plan({"a": keep(0, 1, 3, 4)})
    assert dict(plan.attributes[""]) == {"count": 3}
    assert plan.kept["b.weight"][0].tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    check_cut(graph)


def test_an_attribute_that_sizes_two_layers_couples_what_nothing_else_does(net, check_cut):
    """Four heads in each of two layers: neither can lose one alone, as there is one number for both."""
    torch.manual_seed(0)

    def forward(n, x):
        a = n.a(x).view(x.shape[0], n.count, n.one).relu().flatten(1)
        return n.o(a) + n.p(n.b(x).view(x.shape[0], n.count, n.other).relu().flatten(1))

    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(5, 12), "o": nn.Linear(8, 3), "p": nn.Linear(12, 3)}
    graph = trace(net(forward, count=4, one=2, other=3, **layers), ROWS)
    assert sizes(graph) == {"a": 4}
    plan = graph.plan({"a": keep(0, 2, 3, 4)})
    assert [len(plan.kept[name][0]) for name in ("a.weight", "b.weight")] == [6, 9]
    assert dict(plan.attributes[""]) == {"count": 3}
    check_cut(graph)


def test_an_attribute_used_for_two_different_things_freezes_both(net):
    """A count here is a width there, so that one of the two axes would have to lose what the other keeps."""
    torch.manual_seed(0)

    def forward(n, x):
        there = n.a(x).view(x.shape[0], n.count, n.size).relu().flatten(1)
        return n.o(there + n.a(x).view(x.shape[0], n.size, n.count).flatten(1))

    graph = trace(folded(net, forward, count=4, size=2), ROWS)
    assert graph.groups == ()
    line = forward.__code__.co_firstlineno
    assert "has to stay as wide as it is" in graph.frozen["a"]
    assert any(f"test_equations.py:{line + i}" in graph.frozen["a"] for i in (1, 2))


def pairs(net):
    """Four pairs."""
    layers = {"a": nn.Linear(5, 8)}
    return net(lambda n, x: n.a(x).view(x.shape[0], n.count, n.size).relu().flatten(1), count=4, size=2, **layers)


def test_the_same_attribute_of_two_modules_follows_in_each_on_its_own(net, check_cut):
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.o(n.p(x)) + n.u(n.q(x)), p=pairs(net), q=pairs(net), o=nn.Linear(8, 3), u=nn.Linear(8, 3)
    )
    graph = trace(model, ROWS)
    assert sizes(graph) == {"p.a": 4, "q.a": 4}
    attributes = graph.plan({"p.a": keep(0, 4), "q.a": keep(0, 1, 3, 4)}).attributes
    assert (dict(attributes["p"]), dict(attributes["q"])) == ({"count": 1}, {"count": 3})
    check_cut(graph)


def test_the_same_attribute_of_two_coupled_modules_follows_in_both(net, check_cut):
    torch.manual_seed(0)
    graph = trace(net(lambda n, x: n.o(n.p(x) + n.q(x)), p=pairs(net), q=pairs(net), o=nn.Linear(8, 3)), ROWS)
    assert sizes(graph) == {"p.a": 4}
    attributes = graph.plan({"p.a": keep(0, 2, 3, 4)}).attributes
    assert (dict(attributes["p"]), dict(attributes["q"])) == ({"count": 3}, {"count": 3})
    check_cut(graph)


# what a model does with its own attributes


def test_a_size_that_a_forward_keeps_is_a_plain_number_afterwards(net, check_cut):
    def forward(n, x):
        y = n.a(x)
        n.width, n.shape, n.list = y.shape[1], y.shape, [y.shape[1], 3]
        return n.o(y.view(-1, n.width).relu())

    model = folded(net, forward, width=0)
    graph = trace(model, ROWS)
    assert sizes(graph) == {"a": 8}
    assert (type(model.width), model.width) == (int, 8)
    assert [type(n) for n in (*model.shape, *model.list)] == [int] * 4
    check_cut(graph)


def test_a_forward_that_raises_midway_leaves_attributes_as_they_were(net):
    def forward(n, x):
        n.seen = n.a(x).shape[1]
        assert type(n.count) is Size
        raise ZeroDivisionError

    model = folded(net, forward, count=4, several=(2, 4), seen=0)
    with pytest.raises(TraceError, match="ZeroDivisionError"):
        trace(model, ROWS)
    assert (type(model.count), model.count) == (int, 4)
    assert ([type(n) for n in model.several], model.several) == ([int, int], (2, 4))
    assert type(model.seen) is int


def test_an_attribute_that_the_forward_itself_changes_stays_changed(net):
    def forward(n, x):
        n.calls += 1
        return n.o(n.a(x).relu())

    model = folded(net, forward, calls=5)
    trace(model, ROWS)
    assert type(model.calls) is int
    assert model.calls >= 6


class WithProperty(nn.Module):
    """Its count of pairs is computed from an attribute each time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o, self.width = nn.Linear(5, 8), nn.Linear(8, 3), 8

    @property
    def half(self):
        return self.width // 2

    def forward(self, x):
        y = self.a(x)
        return self.o(torch.cat([y[:, : self.half].relu(), y[:, self.half :]], 1))


def test_a_property_computed_from_an_attribute_stays_a_property_and_no_cut_of_it_is_wrong(check_cut):
    model = WithProperty()
    graph = trace(model, ROWS)
    assert type(model.width) is int
    assert "half" not in vars(model)
    check_cut(graph)


class WithSlots(nn.Module):
    __slots__ = ("count",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(5, 8), nn.Linear(8, 3)
        self.count = 4

    def forward(self, x):
        return self.o(self.a(x).view(x.shape[0], self.count, 2).relu().flatten(1))


def test_a_number_in_a_slot_is_a_mere_number():
    model = WithSlots()
    graph = trace(model, ROWS)
    assert graph.groups == ()
    assert "a trial cut failed" in graph.frozen["a"]
    assert (type(model.count), model.count) == (int, 4)


def test_a_check_of_a_size_against_an_attribute_lets_both_shrink(net, check_cut):
    def forward(n, x):
        y = n.a(x)
        if y.shape[1] != n.width:
            raise ValueError
        return n.o(y.relu())

    graph = trace(folded(net, forward, width=8), ROWS)
    assert sizes(graph) == {"a": 8}
    assert dict(graph.plan({"a": keep(0, 1, 2, 8)}).attributes[""]) == {"width": 3}
    assert check_cut(graph).width < 8


class Counted(nn.Module):
    """Splits its channels by an attribute, whose name may tell what it is for or not."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        setattr(self, name, 4)
        self.a, self.b = nn.Linear(5, 8), nn.Linear(4, 2)

    def forward(self, x):
        first, second = self.a(x).split(getattr(self, self.name), dim=-1)
        return self.b(first * second)


def test_an_attribute_whose_name_does_not_tell_a_size_is_tried_as_it_may_mean_more():
    inputs = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for name, tried in (("n", {"a"}), ("width", set())):
        model = Counted(name)
        assert build(model, inputs, record(model, inputs)).suspects == tried
