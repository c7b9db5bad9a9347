import io
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_prune.latency import (
    Latency,
    activation_bytes,
    compare,
    compiler_missing,
    measure,
    state_dict_bytes,
)


class Recorder(nn.Module):
    """Keeps what it was called with, and the state it was called in."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.states = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        self.states.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return args


class Sleeper(nn.Module):
    """Takes the named number of milliseconds, one after another, on a clock of the test's."""

    now = 0.0

    def __init__(self, *milliseconds):
        super().__init__()
        self.milliseconds = iter(milliseconds)

    def forward(self, x):
        Sleeper.now += next(self.milliseconds) / 1000
        return x


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `Sleeper` moves: that of a busy machine is moved by others as well."""
    monkeypatch.setattr("lightning_prune.latency.time", SimpleNamespace(perf_counter=lambda: Sleeper.now))


class Named(NamedTuple):
    left: torch.Tensor
    right: int


def test_measure_runs_warmup_and_repeats_at_each_batch_size():
    model = Recorder()
    latencies = measure(model, torch.zeros(4, 3), batch_sizes=(2, 5), repeats=3, warmup=1)
    assert [args[0].shape for args, _ in model.calls] == [(2, 3)] * 4 + [(5, 3)] * 4
    assert [(one.batch, one.repeats, one.device) for one in latencies] == [(2, 3, "cpu"), (5, 3, "cpu")]


def test_measure_reports_the_median_and_the_tenths_of_the_timed_runs_only(clock):
    # One warmup of 60 ms, then 20, 2, 2, 2, 10 ms: median 2 (the mean is 7), ninth tenth 10 + 0.6 * (20 - 10) = 16.
    latency = measure(Sleeper(60, 20, 2, 2, 2, 10), torch.zeros(1), batch_sizes=(4,), repeats=5, warmup=1)[0]
    assert (latency.p10_ms, latency.median_ms, latency.p90_ms) == pytest.approx((2, 2, 16))
    assert latency.per_second == pytest.approx(4 * 1000 / 2)


def test_batches_repeat_the_first_sample_of_every_tensor_in_the_nest():
    model = Recorder()
    first = torch.tensor([[1.0], [2.0]])
    scale = torch.tensor(3.0)
    measure(model, (first, {"x": [first, "name"]}, Named(first, 7), scale), batch_sizes=(3,), repeats=1, warmup=0)
    (tensor, mapping, named, scalar), keywords = model.calls[0]
    expected = torch.tensor([[1.0], [1.0], [1.0]])
    assert torch.equal(tensor, expected)
    assert torch.equal(mapping["x"][0], expected)
    assert mapping["x"][1] == "name"
    assert isinstance(named, Named)
    assert torch.equal(named.left, expected)
    assert named.right == 7
    assert scalar.dim() == 0
    assert keywords == {}


def test_a_dict_of_inputs_is_passed_by_keyword():
    model = Recorder()
    measure(model, {"images": torch.zeros(1, 2)}, batch_sizes=(1,), repeats=1, warmup=0)
    args, keywords = model.calls[0]
    assert args == ()
    assert keywords["images"].shape == (1, 2)


def test_measure_runs_in_eval_mode_without_gradients_on_the_threads_asked_for():
    model = Recorder()
    latency = measure(model, torch.zeros(1), batch_sizes=(1,), repeats=1, warmup=0, threads=1)[0]
    assert model.states == [(False, False, 1)]
    assert latency.threads == 1


def test_measure_puts_modes_and_threads_back_also_when_the_forward_raises():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    threads = torch.get_num_threads()
    measure(model, torch.zeros(1, 2), batch_sizes=(1,), repeats=1, warmup=0, threads=threads + 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(model, torch.zeros(1, 3), batch_sizes=(1,), repeats=1, threads=threads + 1)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.get_num_threads() == threads


def test_measure_leaves_batch_norm_statistics_alone():
    model = nn.BatchNorm1d(2)
    measure(model, torch.ones(1, 2), batch_sizes=(4,), repeats=2)
    assert model.num_batches_tracked == 0
    assert torch.equal(model.running_mean, torch.zeros(2))


def test_compare_takes_the_models_in_turn():
    order = []

    class Tracked(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return x

    latencies = compare({"a": Tracked("a"), "b": Tracked("b")}, torch.zeros(1), (1, 2), repeats=2, warmup=1)
    assert order == ["a", "b"] * 6
    assert {name: [one.batch for one in each] for name, each in latencies.items()} == {"a": [1, 2], "b": [1, 2]}


def test_compare_times_each_model_by_itself(clock):
    models = {"slow": Sleeper(*[20] * 3), "fast": Sleeper(*[1] * 3)}
    latencies = compare(models, torch.zeros(1), (1,), repeats=3, warmup=0)
    assert latencies["slow"][0].median_ms == pytest.approx(20)
    assert latencies["fast"][0].median_ms == pytest.approx(1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"batch_sizes": (1, 0)}, r"every batch size must be at least 1, got \(1, 0\)"),
        ({"example_inputs": torch.zeros(0, 2)}, r"needs a first sample to repeat, got shape \(0, 2\)"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    arguments = {"example_inputs": torch.zeros(1, 2)} | wrong
    with pytest.raises(ValueError, match=message):
        measure(nn.Identity(), **arguments)


def test_state_dict_bytes_are_those_of_the_saved_file_and_fall_with_the_width():
    wide, narrow = nn.Linear(100, 100), nn.Linear(50, 100)
    file = io.BytesIO()
    torch.save(wide.state_dict(), file)
    assert state_dict_bytes(wide) == len(file.getvalue())
    # 100 x 50 weights fewer, of 4 bytes each.
    assert state_dict_bytes(wide) - state_dict_bytes(narrow) == pytest.approx(20_000, abs=200)


def test_latency_is_frozen():
    latency = Latency(1, 1.0, 1.0, 1.0, 1000.0, 1, 1, "cpu")
    with pytest.raises(AttributeError, match="cannot assign"):
        latency.batch = 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measure_moves_inputs_to_the_model_and_waits_for_the_device():
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).cuda()
    latency = measure(model, torch.zeros(1, 2048), batch_sizes=(4096,), repeats=5)[0]
    # 8 x 4096 x 2048 x 2048 multiply-accumulates are 137 G; a launch that is not waited for takes 0.1 ms.
    assert latency.median_ms > 0.5
    assert latency.device == "cuda:0"


@pytest.fixture
def compiler(monkeypatch):
    """A stand-in for `torch.compile` that notes what it is given."""
    given = []

    def compile_(model):
        given.append(model)
        return model

    compiler_missing.cache_clear()
    monkeypatch.setattr(torch, "compile", compile_)
    yield given
    compiler_missing.cache_clear()


def test_compiled_is_compiled_for_each_batch_size_and_run_once_before_warmup(compiler):
    model = Recorder()
    latencies = measure(model, torch.zeros(1, 3), batch_sizes=(2, 5), repeats=2, warmup=1, compiled=True)
    assert [one.compiled for one in latencies] == [True, True]
    assert compiler[1:] == [model, model]  # the first is the function that is tried out
    assert [args[0].shape[0] for args, _ in model.calls] == [2] * 4 + [5] * 4
    assert measure(model, torch.zeros(1, 3), batch_sizes=(2,), repeats=1)[0].compiled is False


def test_without_a_compiler_the_reason_is_said_and_eager_times_are_had(compiler, monkeypatch):
    def broken(model):
        raise RuntimeError("no C++ compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiler_missing() == "RuntimeError: no C++ compiler here"
    with pytest.raises(
        RuntimeError, match=r"torch.compile does not work here: RuntimeError: no C.. compiler here; mea"
    ):
        measure(Recorder(), torch.zeros(1, 3), compiled=True)
    assert len(measure(Recorder(), torch.zeros(1, 3), batch_sizes=(1,), repeats=1)) == 1


def chain(inplace: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 2))


def test_peak_of_a_chain_is_the_largest_pair_of_neighbours():
    # float32: 8 values and their 8 positive parts are 64 bytes; then 8 and 2 are 40. The input is the caller's.
    assert activation_bytes(chain(), torch.zeros(1, 4)) == 64
    assert activation_bytes(chain(), torch.zeros(1, 4), batch=3) == 3 * 64


def test_what_is_written_in_place_takes_no_memory():
    assert activation_bytes(chain(inplace=True), torch.zeros(1, 4)) == 40


def test_a_shortcut_is_alive_until_it_is_added(net):
    model = net(lambda n, x: (y := n.a(x)) + n.b(torch.relu(y)), a=nn.Linear(4, 8), b=nn.Linear(8, 8))
    # y beside its positive part and what b makes of it: 3 * 32 bytes
    assert activation_bytes(model, torch.zeros(1, 4)) == 96


def test_views_and_what_was_freed_do_not_count(net):
    model = net(lambda n, x: n.b(n.a(x).view(2, 4).flatten()), a=nn.Linear(4, 8), b=nn.Linear(8, 1))
    assert activation_bytes(model, torch.zeros(1, 4)) == 36
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    assert activation_bytes(deep, torch.zeros(1, 8)) == 64


def test_activations_fall_with_the_width_and_by_the_type(net):
    wide, narrow = (nn.Sequential(nn.Conv2d(1, n, 3, padding=1), nn.Conv2d(n, 1, 3, padding=1)) for n in (8, 4))
    x = torch.zeros(1, 1, 8, 8)
    assert activation_bytes(wide, x) == (8 + 1) * 64 * 4
    assert activation_bytes(narrow, x) == (4 + 1) * 64 * 4
    assert activation_bytes(wide.double(), x.double()) == (8 + 1) * 64 * 8


def test_counting_activations_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    activation_bytes(model, torch.zeros(4, 2))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert model[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        activation_bytes(model, torch.zeros(4, 2), batch=0)
