"""What a latency table says of a network, and budgets that are solved by one.

Tables are made by hand where a number is checked, so that no test depends on how busy a machine is; what is really
measured is held against what does not depend on it: which calls there are, and which shapes they have.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import LRPET, Budget, L1Filter, Magnitude, RandomChannels, plan
from lightning_prune.commands import explain
from lightning_prune.errors import IncompatibleCheckpoint, UnmeetableBudget
from lightning_prune.latency_calls import TimedCall, _Shape, forward_of, record
from lightning_prune.latency_table import (
    Entry,
    Grid,
    LatencyTable,
    latency_table,
    measured_ms,
    monotone,
    padding_of,
    unpaid,
    widths_of,
)
from lightning_prune.surgery import cut, trace

CPU = torch.device("cpu")
NONE = (0.0, 0.0)


def chain(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def table_of(grids, calls, rest: float = 0.0) -> LatencyTable:
    total = rest + sum(call.ms for call in calls)
    return LatencyTable(1, "cpu", "float32", torch.get_num_threads(), total, rest, tuple(grids), tuple(calls))


def chain_table(rest: float = 1.0, padding=NONE) -> LatencyTable:
    """Of `chain`: 2 ms for what makes the channels, out of proportion to them, and 1 ms for what reads them."""
    makes = Grid("linear", ((8, 16, 32),), ((1.0,), (3.0,), (4.0,)), (padding,))
    reads = Grid("linear", ((8, 32),), ((0.25,), (1.0,)), (NONE,))
    return table_of([makes, reads], [Entry((("0.weight", 0),), 2.0, 0), Entry((("2.weight", 1),), 1.0, 1)], rest)


def by_flops(graph, rest: float = 0.0) -> LatencyTable:
    """A table of a network whose convolutions and linear layers take a time in proportion to their flops."""
    grids, calls = [], []
    carried = {(m.name, m.dim) for group in graph.groups for m in group.members}
    for name, shape in graph.shapes.items():
        axes = tuple((name, dim) for dim in (0, 1) if (name, dim) in carried)
        if len(shape) > 1 and axes:
            widths = tuple((1, shape[dim]) for _, dim in axes)
            ms = np.outer(widths[0], widths[1] if len(widths) > 1 else (1,))
            grids.append(Grid("conv2d", widths, tuple(map(tuple, ms.tolist())), (NONE,) * len(axes)))
            calls.append(Entry(axes, float(math.prod(shape)), len(grids) - 1))
    return table_of(grids, calls, rest)


def kept(name: str, graph, count: int):
    return {name: torch.arange(graph.group(name).size) < count}


# --- what a table predicts


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (32, 1 + 2 + 1),
        (16, 1 + 2 * 3 / 4 + 0.5),
        # between two widths that were timed: 2 * (3.5 / 4), and (0.25 + 0.75 * 16 / 24) of 1 ms
        (24, 1 + 2 * 3.5 / 4 + 0.75),
        (8, 1 + 2 * 1 / 4 + 0.25),
        (3, 1 + 2 * 1 / 4 + 0.25),  # below the narrowest that was timed nothing is gained
    ],
)
def test_prediction_is_the_rest_and_each_call_scaled_by_its_grid(channels, expected):
    graph = trace(chain(), torch.zeros(1, 4))
    assert chain_table().predict(graph, graph.plan(kept("0", graph, channels))) == pytest.approx(expected)


def test_two_widths_are_interpolated_in_both():
    graph = trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)), torch.zeros(1, 4))
    grid = Grid("linear", ((4, 8), (4, 8)), ((1.0, 2.0), (3.0, 8.0)), (NONE, NONE))
    table = table_of([grid], [Entry((("1.weight", 0), ("1.weight", 1)), 16.0, 0)])
    chosen = graph.plan({**kept("0", graph, 5), **kept("1", graph, 6)})
    # rows at 6 of 4..8: (1 + 3) / 2 = 2 and (2 + 8) / 2 = 5; columns at 5: 2 + 3 / 4; dense 8 is 16 ms
    assert table.predict(graph, chosen) == pytest.approx(16 * 2.75 / 8)


def test_channels_that_are_padded_for_cost_as_the_next_multiple():
    graph = trace(chain(), torch.zeros(1, 4))

    def ms(channels, padding):
        prediction = chain_table(0.0, padding).on(graph)
        return prediction.by_call(np.array([channels]))[0]

    assert ms(17, (0.0, 1.0)) == ms(32, NONE) == 2.0
    assert ms(17, (1.0, 0.0)) == ms(24, NONE)
    assert ms(17, (0.5, 0.0)) == pytest.approx(ms(17, NONE) + 3.5 * 2 / 4 / 16)  # half of the 7 channels up to 24
    assert ms(17, (1.0, 1.0)) == 2.0
    assert ms(16, (1.0, 1.0)) == ms(16, NONE)


def test_prediction_never_falls_where_a_count_rises():
    graph = trace(chain(40), torch.zeros(1, 4))
    generator = np.random.default_rng(0)
    for _ in range(20):
        times = monotone(generator.uniform(1, 2, (5, 1)))
        grid = Grid("linear", ((8, 16, 24, 32, 40),), tuple(map(tuple, times.tolist())), (tuple(generator.random(2)),))
        prediction = table_of([grid], [Entry((("0.weight", 0),), 1.0, 0)]).on(graph)
        every = [prediction.milliseconds(np.array([n])) for n in range(1, 41)]
        assert (np.diff(every) >= -1e-12).all()
        assert every[-1] == 1.0


def test_grids_of_several_sizes_stand_in_one_table():
    graph = trace(nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 8), nn.Linear(8, 2)), torch.zeros(1, 4))
    small = Grid("linear", ((1, 12),), ((1.0,), (2.0,)), (NONE,))
    large = Grid(
        "linear", ((1, 4, 8), (1, 3, 6, 12)), tuple((a, a + 1, a + 2, a + 3) for a in (1.0, 5.0, 9.0)), (NONE,) * 2
    )
    calls = [Entry((("0.weight", 0),), 2.0, 0), Entry((("1.weight", 0), ("1.weight", 1)), 12.0, 1)]
    prediction = table_of([small, large], calls).on(graph)
    assert prediction.by_call(np.array([12, 8])).tolist() == [2.0, 12.0]
    assert prediction.by_call(np.array([6, 4])).tolist() == pytest.approx([1 + 5 / 11, 7.0])
    assert prediction.by_call(np.array([3, 8])).tolist() == pytest.approx([1 + 2 / 11, 10.0])


def test_a_network_that_was_cut_is_predicted_by_the_table_of_the_dense_one():
    model = chain()
    graph = trace(model, torch.zeros(1, 4))
    table, chosen = chain_table(), graph.plan(kept("0", graph, 20))
    before = table.predict(graph, chosen)
    cut(model, chosen, graph=graph)
    after = trace(model, torch.zeros(1, 4))
    assert table.predict(after) == pytest.approx(before)
    assert table.predict(after, after.plan(kept("0", after, 8))) == pytest.approx(1.75)
    assert table.predict(graph.after(chosen)) == pytest.approx(before)


def test_a_table_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"of another network: it has times of '2.weight', which Sequential has not"):
        chain_table().predict(trace(nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 2)), torch.zeros(1, 4)))
    with pytest.raises(ValueError, match=r"knows '0.weight' with up to 32 in dimension 0, here are 64"):
        chain_table().predict(trace(chain(64), torch.zeros(1, 4)))


# --- how a table is made


def test_times_are_made_monotone_by_the_nearest_that_are():
    # 3 and 2 are out of order: both become their mean
    assert monotone(np.array([[1.0], [3.0], [2.0], [4.0]])).ravel().tolist() == [1, 2.5, 2.5, 4]
    times = monotone(np.random.default_rng(0).uniform(1, 2, (5, 5)))
    assert (np.diff(times, axis=0) >= 0).all()
    assert (np.diff(times, axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("dense", "unit"), [(1, 1), (3, 1), (20, 1), (33, 1), (64, 1), (100, 1), (512, 1), (96, 3), (64, 64)]
)
def test_widths_end_with_all_channels_and_are_multiples_of_the_unit(dense, unit):
    widths = widths_of(dense, unit)
    assert widths[-1] == dense
    assert list(widths) == sorted(set(widths))
    assert all(width % unit == 0 for width in widths[:-1])
    assert len(widths) <= 5


def test_padding_is_found_again_from_the_times_that_it_makes():
    widths, ms = [8, 16, 32, 48, 64], [1.0, 2.0, 4.0, 6.0, 8.0]
    for small, large in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.5)]:

        def timed(n, small=small, large=large):
            n += small * (math.ceil(n / 8) * 8 - n)
            return (n + large * (math.ceil(n / 16) * 16 - n)) / 8

        found = padding_of(widths, ms, 48, timed)
        assert found == pytest.approx((small, large))


def networks(net):
    """Networks with every kind of call that is timed, and some that are not."""
    return {
        "depthwise": (
            nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(inplace=True), nn.Conv2d(16, 16, 3, groups=16),
                nn.MaxPool2d(2), nn.Conv2d(16, 24, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
                nn.Flatten(), nn.Linear(24, 5),
            ),
            torch.zeros(1, 3, 16, 16),
        ),
        "grouped": (
            net(
                lambda n, x: n.fc(n.c(F.relu(n.b(F.relu(n.a(x))))).mean((2, 3))),
                a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 32, 3, groups=4), c=nn.Conv2d(32, 16, 1), fc=nn.Linear(16, 4),
            ),
            torch.zeros(1, 3, 12, 12),
        ),
        "transposed": (
            net(
                lambda n, x: n.c(n.b(F.gelu(n.norm(n.a(x))))),
                a=nn.Conv1d(2, 12, 3), norm=nn.BatchNorm1d(12, affine=False), b=nn.ConvTranspose1d(12, 20, 4, 2),
                c=nn.Conv1d(20, 2, 3),
            ),
            torch.zeros(1, 2, 16),
        ),
        "layer norm": (
            net(
                lambda n, x: n.head(n.b(F.gelu(n.a(n.norm(n.stem(x).flatten(2).transpose(1, 2))))).mean(1)),
                stem=nn.Conv2d(3, 16, 4, 4), norm=nn.LayerNorm(16), a=nn.Linear(16, 40), b=nn.Linear(40, 16),
                head=nn.Linear(16, 3),
            ),
            torch.zeros(1, 3, 16, 16),
        ),
        "gate and concatenation": (
            net(
                lambda n, x: n.c(torch.cat([(y := F.relu(n.a(x))), F.relu(n.b(y)) * n.gate(y)], 1)),
                gate=net(lambda n, y: torch.sigmoid(n.d(y.mean((2, 3), True))), d=nn.Conv2d(16, 12, 1)),
                a=nn.Conv2d(3, 16, 3, padding=1), b=nn.Conv2d(16, 12, 3, padding=1), c=nn.Conv2d(28, 4, 1),
            ),
            torch.zeros(1, 3, 8, 8),
        ),
    }  # fmt: skip


KINDS = {
    "depthwise": [
        *("conv2d", "batch_norm", "hardtanh", "conv2d", "max_pool2d", "conv2d", "silu", "adaptive_avg_pool2d"),
        "linear",
    ],
    "grouped": ["conv2d", "relu", "conv2d", "relu", "conv2d", "linear"],
    "transposed": ["conv1d", "batch_norm", "gelu", "conv_transpose1d", "conv1d"],
    "layer norm": ["conv2d", "layer_norm", "linear", "gelu", "linear", "linear"],
    "gate and concatenation": ["conv2d", "relu", "conv2d", "relu", "conv2d", "sigmoid", "mul", "conv2d"],
}  # fmt: skip


@pytest.fixture
def recorded():
    """Calls of a model's forward with 2 samples, and its graph."""

    def of(model, example):
        graph = trace(model.eval(), example)
        with torch.no_grad():
            return graph, record(graph, forward_of(model, example, 2), CPU, 1).calls

    return of


@pytest.mark.parametrize("name", KINDS)
def test_calls_at_other_widths_have_the_shapes_of_the_network_that_is_cut(name, net, recorded, random_keep):
    model, example = networks(net)[name]
    graph, calls = recorded(model, example)
    assert [call.function for call in calls] == KINDS[name]
    chosen = graph.plan(random_keep(graph))
    assert len(chosen.kept) >= 3
    cut(model, chosen, graph=graph)
    _, after = recorded(model, example)
    for call, own in zip(calls, after, strict=True):
        assert (own.function, own.axes) == (call.function, call.axes)
        replayed = call.arguments(own.dense, CPU)
        assert [tuple(t.shape) for t in replayed if isinstance(t, torch.Tensor)] == [
            leaf.sizes for leaf in own.leaves if isinstance(leaf, _Shape)
        ]
        assert [x for x in replayed if isinstance(x, int)] == [
            x for x in own.arguments(own.dense, CPU) if isinstance(x, int)
        ]
        assert call.milliseconds(own.dense, CPU, 1) > 0  # it runs


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_call_runs_at_all_widths_of_its_grid(name, net):
    model, example = networks(net)[name]
    graph = trace(model, example)
    table = latency_table(graph, repeats=1)
    assert len(table.calls) == len(KINDS[name])
    assert table.predict(graph) == table.dense_ms


def test_widths_of_a_grouped_convolution_are_multiples_of_its_groups(net, recorded):
    _, calls = recorded(*networks(net)["grouped"])
    assert (calls[2].function, calls[2].axes[0], calls[2].units[0] % 4) == ("conv2d", ("b.weight", 0), 0)


def test_calls_know_the_batch_and_keep_what_no_cut_changes(recorded):
    _, calls = recorded(chain(), torch.zeros(7, 4))
    first = calls[0].arguments([10], CPU)
    assert [tuple(t.shape) for t in first if isinstance(t, torch.Tensor)] == [(2, 4), (10, 4), (10,)]
    assert [call.axes for call in calls] == [(("0.weight", 0),), (("0.weight", 0),), (("2.weight", 1),)]


def test_measured_table_predicts_the_dense_time_for_the_dense_network_to_the_last_bit(cifar_net):
    graph = trace(cifar_net(), torch.zeros(1, 3, 8, 8))
    table = latency_table(graph, batch=2, threads=1, repeats=1)
    assert table.predict(graph) == table.dense_ms > 0
    assert 0 <= table.rest_ms < table.dense_ms
    assert (table.batch, table.threads, table.device, table.dtype) == (2, 1, "cpu", "float32")
    assert len(table.grids) < len(table.calls)  # equal work is timed once
    least = graph.plan({g.name: torch.arange(g.size) < 1 for g in graph.groups})
    assert table.rest_ms <= table.predict(graph, least) <= table.dense_ms


def test_table_is_the_same_after_a_round_trip_through_json(tmp_path, cifar_net):
    graph = trace(cifar_net(), torch.zeros(1, 3, 8, 8))
    table = latency_table(graph, repeats=1)
    table.save(tmp_path / "table.json")
    assert LatencyTable.of_any(tmp_path / "table.json") == table
    assert LatencyTable.of_any(json.loads(json.dumps(table.to_dict()))) == table
    assert LatencyTable.of_any(str(tmp_path / "table.json")).predict(graph) == table.dense_ms


def test_making_a_table_changes_nothing(cifar_net):
    model = cifar_net().train()
    model.bn1.eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    graph, seed = trace(model, torch.zeros(1, 3, 8, 8)), torch.get_rng_state()
    latency_table(graph, repeats=1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)


def test_threads_are_those_asked_for_and_put_back(net):
    seen, threads = [], torch.get_num_threads()
    model = net(
        lambda n, x: (seen.append(torch.get_num_threads()), n.b(n.a(x)))[1], a=nn.Linear(2, 4), b=nn.Linear(4, 2)
    )
    graph = trace(model, torch.zeros(1, 2))
    seen.clear()
    table = latency_table(graph, threads=threads + 1, repeats=1)
    assert set(seen) == {threads + 1}
    assert table.threads == threads + 1
    assert torch.get_num_threads() == threads
    measured_ms(graph, table, repeats=1)
    assert set(seen) == {threads + 1}


def test_a_forward_that_never_is_the_same_cannot_be_timed_call_by_call(net):
    counter = iter(range(100))

    def forward(n, x):
        return n.b(sum((F.relu(n.a(x)) for _ in range(next(counter) % 2)), n.a(x)))

    model = net(forward, a=nn.Linear(2, 8), b=nn.Linear(8, 2))
    graph = trace(model, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="makes another number of calls each time"):
        latency_table(graph, repeats=2)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"threads": 0}, {"repeats": 0}, {"batch": True}])
def test_wrong_counts_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1, got {value}"):
        latency_table(trace(chain(), torch.zeros(1, 4)), **wrong)


def grid(widths, ms, padding):
    return {"function": "f", "widths": widths, "ms": ms, "padding": padding}


def changed(**entries):
    return {**chain_table().to_dict(), **entries}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"batch": 1}, "'version' is missing"),
        (changed(version=2), "format version 1 is wanted, got 2"),
        (changed(rest_ms=-1.0), "rest_ms not negative"),
        (changed(grids=[]), "has no grid"),
        (changed(grids=[{"function": "f"}]), "'widths' is missing"),
        (changed(calls=[{"axes": [["0.weight", 0]], "ms": math.nan, "grid": 0}]), "has no grid"),
        (changed(grids=[grid([[8, 4]], [[1.0], [2.0]], [[0, 0]])]), "must rise"),
        (changed(grids=[grid([[4, 8]], [[2.0], [1.0]], [[0, 0]])]), "not fall"),
        (
            changed(grids=[grid([[4, 8]], [[1.0]], [[0, 0]])]),
            r"times of shape \(1, 1\)",
        ),
        (changed(grids=[grid([[4, 8]], [[1.0], [2.0]], [[0, 2]])]), "padding of f"),
    ],
)
def test_what_is_no_table_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        LatencyTable.from_dict(value)


# --- budgets of latency


def test_with_times_like_flops_half_of_the_latency_is_half_of_the_flops():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    graph = trace(model, torch.zeros(1, 16))
    by_time = plan(graph, budget=Budget(0.5, of="latency"), latency_table=by_flops(graph))
    assert by_time == plan(graph, budget=Budget(0.5, of="flops"))


def test_a_rest_that_no_cut_changes_is_paid_for_by_the_layers():
    graph = trace(chain(), torch.zeros(1, 4))
    without = plan(graph, budget=Budget(0.75, of="latency"), latency_table=chain_table(rest=0.0))
    with_rest = plan(graph, budget=Budget(0.75, of="latency"), latency_table=chain_table(rest=1.0))
    # of 3 ms 2.25: 2 t + r, at 20 channels 2 * 3.25 / 4 + 0.625 = 2.25. Of 4 ms 3, 2 for layers: at 16 channels.
    assert (without.groups["0"][0], with_rest.groups["0"][0]) == (20, 16)


def test_budget_is_met_from_below_and_as_closely_as_channels_allow(cifar_net):
    graph = trace(cifar_net(), torch.zeros(1, 3, 8, 8))
    table = by_flops(graph, rest=100.0)
    for keep in (0.9, 0.6, 0.4):
        chosen = plan(graph, method="random_channels", budget=Budget(keep, of="latency"), latency_table=table)
        counts = graph.counts(chosen)
        prediction = table.on(graph)
        assert prediction.milliseconds(counts) <= keep * table.dense_ms * (1 + 1e-9)
        assert prediction.milliseconds(counts + (counts < graph.costs.dense)) > keep * table.dense_ms


def test_the_whole_latency_keeps_the_whole_network():
    graph = trace(chain(), torch.zeros(1, 4))
    table = latency_table(graph, repeats=1)
    assert plan(graph, budget=Budget(1.0, of="latency"), latency_table=table).groups == {"0": (32, 32)}


def test_a_budget_below_the_rest_says_what_can_be_reached():
    graph = trace(chain(), torch.zeros(1, 4))
    # rest 9, and with one channel 2 * 1 / 4 + 0.25: 9.75 of 12 ms
    with pytest.raises(UnmeetableBudget, match=r"0.5 of the latency cannot be met: .* 0.8125 are left"):
        plan(graph, budget=Budget(0.5, of="latency"), latency_table=chain_table(rest=9.0))


def test_a_table_is_measured_where_none_is_given():
    graph = trace(chain(256), torch.zeros(1, 4))
    pruner = L1Filter(Budget(1.0, of="latency"))
    pruner.plan_for(graph)
    assert pruner.table is not None
    assert pruner.table.predict(graph) == pruner.table.dense_ms
    assert pruner.latency_table is None


@pytest.mark.parametrize(
    ("method", "why"), [(Magnitude, "the same time whatever is zero"), (LRPET, "no times of pairs of factors")]
)
def test_weights_and_ranks_take_no_budget_of_latency(method, why):
    with pytest.raises(ValueError, match=rf"{method.__name__} takes no Budget\(of='latency'\): .*{why}"):
        method(Budget(0.5, of="latency"))


def test_groups_whose_next_multiple_takes_no_longer_are_named():
    graph = trace(chain(), torch.zeros(1, 4))
    padded = chain_table(padding=(0.0, 1.0))
    reads_too = Grid("linear", ((8, 32),), ((0.25,), (1.0,)), ((0.0, 1.0),))
    padded = table_of([padded.grids[0], reads_too], padded.calls, 1.0)
    assert unpaid(padded.on(graph), np.array([17])) == {"0": (17, 32)}
    assert unpaid(padded.on(graph), np.array([16])) == {}
    assert unpaid(chain_table().on(graph), np.array([17])) == {}
    assert unpaid(padded.on(graph), np.array([32])) == {}


# --- the callback


def test_a_fit_meets_its_budget_logs_what_is_predicted_and_times_what_is_left(fit, tiny_net):
    table = by_flops(trace(tiny_net(), torch.zeros(1, 1, 8, 8)), rest=10.0)
    pruner = L1Filter(Budget(0.5, of="latency"), latency_table=table)
    model = fit(pruner).lightning_module
    row = pruner.report.rows[-1]
    after = table.predict(trace(model, torch.zeros(1, 1, 8, 8)))
    assert row["prune/latency_ms"] == pytest.approx(after)
    assert row["prune/latency_kept"] == pytest.approx(after / table.dense_ms)
    assert 0.4 < row["prune/latency_kept"] <= 0.5
    assert row["prune/latency_measured_ms"] > 0
    assert "prune/latency_measured_ms" in pruner.report.to_markdown()


def test_gradual_events_each_have_their_part_of_the_latency(fit, tiny_net):
    from lightning_prune import Iterative

    table = by_flops(trace(tiny_net(), torch.zeros(1, 1, 8, 8)))
    pruner = RandomChannels(Budget(0.4, of="latency"), latency_table=table, schedule=Iterative(0.1, 0.7, 0.3))
    fit(pruner)
    budgets = [pruner.budget.at(event.progress).keep for event in pruner.events]
    shares = [row["prune/latency_kept"] for row in pruner.report.rows]
    assert len(shares) > 1
    assert all(share <= budget for share, budget in zip(shares, budgets, strict=True))
    assert ["prune/latency_measured_ms" in row for row in pruner.report.rows] == [False] * (len(shares) - 1) + [True]


def test_masks_are_predicted_as_if_cut_and_not_timed(fit, tiny_net):
    table = by_flops(trace(tiny_net(), torch.zeros(1, 1, 8, 8)))
    cut_, masked = (L1Filter(Budget(0.5, of="latency"), latency_table=table, apply=how) for how in ("cut", "mask"))
    fit(cut_)
    fit(masked)
    assert masked.report.rows[-1]["prune/latency_ms"] == pytest.approx(cut_.report.rows[-1]["prune/latency_ms"])
    assert "prune/latency_measured_ms" not in masked.report.rows[-1]


def test_a_fit_that_goes_on_has_the_table_it_began_with(fit, tiny_net, save_each, tmp_path):
    table = by_flops(trace(tiny_net(), torch.zeros(1, 1, 8, 8)), rest=5.0)
    fit([L1Filter(Budget(0.5, of="latency"), latency_table=table), save_each()])
    again = L1Filter(Budget(0.5, of="latency"))  # it would measure its own
    fit(again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again.table == table
    assert again.report.rows[-1]["prune/latency_kept"] <= 0.5


def test_a_checkpoint_with_a_broken_table_is_refused(fit, tiny_net, save_each, tmp_path):
    table = by_flops(trace(tiny_net(), torch.zeros(1, 1, 8, 8)))
    fit([L1Filter(Budget(0.5, of="latency"), latency_table=table), save_each()])
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    state = next(value for key, value in checkpoint["callbacks"].items() if key.startswith("L1Filter"))
    state["latency"]["table"]["dense_ms"] = -1.0
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(IncompatibleCheckpoint, match=r"the latency table of L1Filter .*dense_ms must be positive"):
        fit(L1Filter(Budget(0.5, of="latency")), ckpt_path=tmp_path / "broken.ckpt")


def test_only_the_first_process_measures(monkeypatch, tiny_net):
    graph = trace(tiny_net(), torch.zeros(1, 1, 8, 8))
    table = by_flops(graph)

    class Second(L1Filter):
        _is_first = False

        def same(self, value):
            assert value is None
            return table.to_dict()

    monkeypatch.setattr(TimedCall, "milliseconds", None)
    second = Second(Budget(0.5, of="latency"))
    second.plan_for(graph)
    assert second.table == table


def test_a_cut_that_does_not_pay_is_warned_of_with_what_to_do(fit, tiny_net):
    model = tiny_net(width=16)
    flat = by_flops(trace(model, torch.zeros(1, 1, 8, 8)))
    grids = tuple(Grid(g.function, g.widths, g.ms, ((0.0, 1.0),) * len(g.widths)) for g in flat.grids)
    table = table_of(grids, flat.calls)
    with pytest.warns(UserWarning, match=r"L1Filter: the cut of .* does not pay \(cpu, float32, batch 1.*round_to=16"):
        fit(L1Filter(Budget(0.8, of="latency"), latency_table=table), model=model)


def test_measured_time_is_of_the_device_and_type_of_the_table():
    graph = trace(chain(), torch.zeros(1, 4))
    assert measured_ms(graph, chain_table(), repeats=1) > 0
    other = LatencyTable(1, "cuda Some Card", "float32", 1, 1.0, 1.0, (), ())
    assert measured_ms(graph, other) is None


def test_explain_predicts_the_latency_of_a_plan(capsys):
    import argparse

    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    options = ["--model", "torch.nn.Linear", "--input", "1,4", "--of", "latency"]
    assert parser.parse_args(options).of == "latency"
    graph = trace(chain(), torch.zeros(1, 4))
    table, chosen = chain_table(), graph.plan(kept("0", graph, 16))
    text, value = explain.predicted(graph, chosen, Budget(0.75, of="latency"), "l1_filter", table)
    assert value["latency_ms"] == pytest.approx(3.0)
    assert value["latency_kept"] == pytest.approx(0.75)
    assert "ms, predicted" in text
