"""Calls that are watched, gradients of maps while a model trains, and gates."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

from lightning_prune import Iterative, OneShot, RandomChannels, trace
from lightning_prune.batches import evaluating
from lightning_prune.channel_pruner import ChannelPruner
from lightning_prune.graph.flow import Call
from lightning_prune.taps import _CALLS, SampleGradients, gated, looks_at, watching
from tests.conftest import Net, TinyNet, with_random_norms

AT_4 = OneShot(4, unit="step")


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hooks(model):
    return {name: [len(v) for k, v in vars(m).items() if "hooks" in k] for name, m in model.named_modules()}


def seen_in(model, calls, run):
    """(module, visit, number, forward, batch) of each run of the calls, in order."""
    seen = []
    with watching(model, {call: [seen.append] for call in calls}):
        run(model)
    return [(s.call.module, s.call.visit, s.call.number, s.forward, s.batch) for s in seen]


# what is watched


def test_call_is_found_by_module_name_and_number():
    net = Net(lambda n, x: F.relu(n.b(F.relu(n.a(x)))) + x.relu(), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    got = []
    with watching(net, {Call("", 0, "relu", 1): [got.append], Call("b", 0, "linear", 0): [got.append]}):
        out = net(rows(2, 3).float())
    linear, second = got
    assert linear.args[1] is net.b.weight
    assert torch.equal(second.out, F.relu(net.b(F.relu(net.a(rows(2, 3).float())))))
    assert second.batch == 2
    assert out.shape == (2, 3)


def test_calls_of_a_module_inside_are_not_its_parents():
    inner = Net(lambda n, x: F.relu(x))
    net = Net(lambda n, x: F.relu(n.inner(F.relu(x)) - 1), inner=inner)
    seen = []
    with watching(net, {Call("", 0, "relu", 1): [seen.append]}):
        out = net(torch.tensor([[0.5, 3.0]]))
    assert [s.out.tolist() for s in seen] == [out.tolist()] == [[[0.0, 2.0]]]


def test_what_a_look_returns_replaces_the_output():
    net = Net(lambda n, x: n.a(F.relu(x)), a=nn.Identity())
    with watching(net, {Call("", 0, "relu", 0): [lambda seen: seen.out + 1]}):
        assert net(torch.tensor([-1.0, 2.0])).tolist() == [1.0, 3.0]
    assert net(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_calls_of_a_hook_on_a_module_inside_are_not_its_parents():
    net = Net(lambda n, x: F.relu(n.a(x) - 1), a=nn.Linear(3, 3))
    net.a.register_forward_hook(lambda module, args, out: F.relu(out))
    seen = []
    with watching(net, {Call("", 0, "relu", 0): [seen.append]}):
        out = net(rows(2, 3).float())
    assert len(seen) == 1
    assert torch.equal(seen[0].out, out)


class Functions(TorchFunctionMode):
    """Notes the names of the functions that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Identity(), (2, 4)),
        (nn.Linear(4, 4), (2, 4)),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 8)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
        (nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate"), (2, 4, 8, 8, 8)),
        (nn.BatchNorm1d(4, momentum=None), (2, 4)),
        (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 8, 8)),
        (nn.BatchNorm3d(4, momentum=None), (2, 4, 8, 8, 8)),
        (nn.LayerNorm(4), (2, 4)),
        (nn.GroupNorm(2, 4), (2, 4)),
        (nn.Dropout(), (2, 4)),
        (nn.ReLU(inplace=True), (2, 4)),
        (nn.GELU(), (2, 4)),
        (nn.MaxPool2d(2), (2, 4, 8, 8)),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 8, 8)),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_modules_that_are_passed_over_call_what_is_known_of_them(module, shape):
    x = torch.zeros(shape)
    with Functions() as called:
        module(x)
    assert called.names <= set(_CALLS[type(module)])


def test_every_module_that_is_passed_over_is_tried():
    tried = test_modules_that_are_passed_over_call_what_is_known_of_them.pytestmark[0].args[1]
    assert {type(module) for module, _ in tried} == set(_CALLS)


def test_modules_that_call_nothing_that_is_looked_for_have_no_hooks():
    net = Net(lambda n, x: n.b(F.relu(n.norm(n.a(x)))), a=nn.Linear(3, 3), norm=nn.BatchNorm1d(3), b=nn.Linear(3, 3))
    before = hooks(net)
    with watching(net, {Call("", 0, "relu", 0): [lambda seen: None]}):
        assert {name for name, of in hooks(net).items() if of != before[name]} == {""}
    with watching(net, {Call("b", 0, "linear", 0): [lambda seen: None]}):
        assert {name for name, of in hooks(net).items() if of != before[name]} == {"", "a", "b"}


def test_functions_outside_of_the_modules_looked_into_run_as_ever():
    inside = []
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(3, 3), b=Net(lambda n, x: F.relu(x)))
    net.a.register_forward_hook(lambda *_: inside.append(len(_get_current_function_mode_stack())))
    net.b.register_forward_pre_hook(lambda *_: inside.append(len(_get_current_function_mode_stack())))
    seen = []
    with watching(net, {Call("b", 0, "relu", 0): [seen.append]}):
        net(rows(2, 3).float())
    assert inside == [0, 0]
    assert len(seen) == 1


def test_visits_are_counted_anew_in_each_forward_and_begin_again_past_those_that_are_known():
    net = Net(lambda n, x, steps: [n.cell(x) for _ in range(steps)][-1], cell=nn.Linear(2, 2))
    calls = [Call("cell", visit, "linear", 0) for visit in (0, 1)]
    x = torch.zeros(3, 2)
    got = seen_in(net, calls, lambda n: (n(x, 2), n(x, 1), n(x[:2], 3)))
    assert got == [
        ("cell", 0, 0, 0, 3), ("cell", 1, 0, 0, 3), ("cell", 0, 0, 1, 3),
        ("cell", 0, 0, 2, 2), ("cell", 1, 0, 2, 2), ("cell", 0, 0, 2, 2),
    ]  # fmt: skip


def test_modules_called_one_after_the_other_are_one_forward_and_the_next_begins_where_one_is_called_again():
    parts = nn.ModuleDict({"encoder": nn.Linear(3, 3), "head": nn.Linear(3, 2), "metric": nn.Linear(2, 2)})
    calls = [Call(name, 0, "linear", 0) for name in ("encoder", "head")]

    def run(parts):
        for samples in (4, 5):
            x = torch.zeros(samples, 3)
            parts["metric"](parts["head"](parts["encoder"](x)))
        parts["encoder"](x)

    got = [(module, forward, batch) for module, _, _, forward, batch in seen_in(parts, calls, run)]
    assert got == [("encoder", 0, 4), ("head", 0, 4), ("encoder", 1, 5), ("head", 1, 5), ("encoder", 2, 5)]


def test_a_part_called_before_the_whole_is_a_forward_of_its_own():
    net = Net(lambda n, x: n.a(x), a=nn.Linear(2, 2))
    got = seen_in(net, [Call("a", 0, "linear", 0)], lambda n: (n.a(torch.zeros(1, 2)), n(torch.zeros(3, 2))))
    assert [(forward, batch) for *_, forward, batch in got] == [(0, 1), (1, 3)]
    again = seen_in(net, [Call("a", 0, "linear", 0)], lambda n: [n(torch.zeros(1, 2)), n.a(torch.zeros(3, 2))])
    assert [forward for *_, forward, _ in again] == [0, 1]


def test_a_part_called_after_the_whole_belongs_to_it_unless_it_ran():
    net = Net(lambda n, x: n.a(x), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    x = torch.zeros(1, 2)
    got = seen_in(net, [Call(name, 0, "linear", 0) for name in "ab"], lambda n: [n.b(n(x)) for _ in range(2)])
    assert [(module, forward) for module, *_, forward, _ in got] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_training_step_in_the_place_of_the_forward_is_not_taken_for_it():
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return F.relu(self.layer(x))

        def training_step(self, batch, batch_idx):
            return F.relu(self(F.relu(batch))).sum()

    model, seen = Module(), []
    wrapper = Net(lambda n, *args: n.module(*args), module=model)
    x = rows(3, 2).float()
    with watching(model, {Call("", 0, "relu", 0): [seen.append]}):
        _ForwardRedirection()(wrapper, model, "training_step", x, 0)
    assert [torch.equal(s.out, F.relu(model.layer(F.relu(x)))) for s in seen] == [True]
    assert seen[0].batch == 3


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_nothing_is_left_behind_when_the_model_raises(error):
    def forward(n, x):
        x = n.a(x)
        raise error("the model's own")

    net = Net(lambda n, x: n.inner(x), inner=Net(forward, a=nn.Linear(2, 2)))
    before = hooks(net)
    with pytest.raises(error, match="the model's own"), watching(net, {Call("inner.a", 0, "linear", 0): [print]}):
        net(torch.zeros(1, 2))
    assert hooks(net) == before
    assert _get_current_function_mode_stack() == []


def test_watching_goes_on_after_an_error_that_the_model_catches():
    def forward(n, x):
        try:
            n.bad(x)
        except ArithmeticError:
            return F.relu(n.a(x))

    def raises(n, x):
        raise ArithmeticError

    net = Net(forward, a=nn.Linear(2, 2), bad=Net(raises))
    # fails in its own hook, before the module was entered
    net.bad.register_forward_pre_hook(lambda module, args: raises(module, args), prepend=True)
    got = seen_in(net, [Call("a", 0, "linear", 0), Call("", 0, "relu", 0)], lambda n: n(torch.zeros(1, 2)))
    assert [module for module, *_ in got] == ["a", ""]


def whole(net):
    return torch.compile(net, backend="eager")


def inside(net):
    net.block = torch.compile(net.block, backend="eager")
    return net


def in_place(net):
    net.block.compile(backend="eager")
    return net


@pytest.mark.parametrize(
    ("compiled", "named"), [(whole, "the model"), (inside, "module 'block'"), (in_place, "module 'block'")]
)
def test_a_compiled_module_is_refused(compiled, named):
    net = compiled(Net(lambda n, x: n.block(x), block=nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    with (
        pytest.raises(RuntimeError, match=f"{named} is compiled.*compile it after pruning"),
        watching(net, {Call("block._orig_mod.1", 0, "relu", 0): [print]}),
    ):
        raise AssertionError("is watched")
    assert all(not any(counts) for counts in hooks(net).values())


def test_a_compiled_module_is_watched_as_it_was_at_an_event():
    torch.manual_seed(0)
    net = inside(
        Net(lambda n, x: n.fc(n.block(x)), block=nn.Sequential(nn.Linear(2, 4), nn.ReLU()), fc=nn.Linear(4, 1))
    )
    graph = trace(net, torch.zeros(1, 2))
    (group,) = graph.groups
    x = rows(3, 2).float()
    with evaluating(net), gated(net, {"g": graph.maps(group)}, {"g": torch.zeros(4)}):
        assert torch.equal(net(x), net.fc.bias.expand(3, 1))


def test_a_loop_of_more_steps_than_were_traced_is_warned_of_where_not_every_step_is_looked_at():
    def forward(n, x, steps):
        x = F.relu(n.a(x))
        for _ in range(steps):
            x = F.relu(n.b(x))
        return x

    net = Net(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 3))
    graph = trace(Net(lambda n, x: n.net(x, 2), net=net), torch.zeros(1, 2))
    call = graph.flow.call(next(i for i, c in enumerate(graph.flow.calls) if c.name == "relu"))
    assert (call.module, call.number, call.total) == ("net", 0, 3)
    seen = []
    with watching(net, {Call("", 0, "relu", 0, 3): [seen.append]}):
        net(torch.zeros(1, 2), 2)
        net(torch.zeros(1, 2), 1)
        with pytest.warns(UserWarning, match=r"'relu' is called more often in the model than the 3 times when"):
            net(torch.zeros(1, 2), 4)
        net(torch.zeros(1, 2), 4)  # once is enough
    assert len(seen) == 4


# gradients of maps


def gate_gradients_by_loop(model, graph, x, loss):
    """Group -> (B, C) derivative of each sample's own loss by one gate on all of a group's maps, sample by sample."""
    out = {}
    for group in graph.groups:
        gradients = []
        for sample in x.split(1):
            gate = torch.ones(group.size, dtype=x.dtype, requires_grad=True)
            with gated(model, {group.name: graph.maps(group)}, {group.name: gate}):
                value = loss(model(sample))
            gradients.append(torch.autograd.grad(value, gate)[0])
        out[group.name] = torch.stack(gradients)
    return out


def sample_gradients(model, graph, *batches, loss, mean=False):
    """What `SampleGradients` takes of one backward over the mean loss of all batches."""
    gradients = SampleGradients({g.name: graph.maps(g) for g in graph.groups}, mean)
    with watching(model, gradients.looks):
        sum(loss(model(x)) for x in batches).backward()
    model.zero_grad()
    return gradients.take()


def mean_logsumexp(out):
    return out.logsumexp(1).mean()


class Residual(nn.Module):
    """A stream written to in place, read in three places, beside a concatenation and a depthwise layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.side, self.depth = nn.Conv2d(4, 5, 1), nn.Conv2d(9, 9, 3, groups=9)
        self.fc, self.norm = nn.Linear(9, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        out = self.conv2(F.silu(self.norm(self.conv1(x))))
        out += x
        out.relu_()
        out = torch.cat([out, torch.tanh(self.side(out))], 1)
        return self.fc(F.relu(self.depth(out)).flatten(2).mean(2))


class Convs(nn.Module):
    """Convolutions of three dimensions, as over the frames of a film."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv3d(3, 4, 2), nn.Conv3d(4, 5, 2, stride=2), nn.Linear(5, 3)

    def forward(self, x):
        x = F.max_pool3d(torch.tanh(self.first(x[:, :, None].expand(-1, -1, 4, -1, -1))), (1, 2, 2))
        return self.fc(F.gelu(self.second(x)).mean((2, 3, 4)))


class Unrolled(nn.Module):
    """A convolutional cell that is called once per step of time in one forward, with its own output."""

    def __init__(self, steps=3):
        super().__init__()
        self.steps, self.width = steps, 4
        self.inner = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
        self.cell = nn.Conv2d(5 + 4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        hidden = x.new_zeros(len(x), self.width, *x.shape[2:])
        for step in range(self.steps):
            hidden = torch.tanh(self.cell(torch.cat([self.inner(x * (step + 1)), hidden], 1)))
        return self.fc(hidden.mean((2, 3)))


@pytest.fixture(params=[Residual, Convs, Unrolled], ids=lambda c: c.__name__)
def traced(request):
    """A model in eval mode, its graph, and a batch."""
    torch.manual_seed(0)
    model = with_random_norms(request.param()).double().eval()
    x = rows(4, 3, 6, 6)
    return model, trace(model, x), x


def test_gradients_of_samples_equal_those_of_a_gate_sample_by_sample(traced):
    model, graph, x = traced
    assert len(graph.groups) >= 2
    got = sample_gradients(model, graph, x, loss=mean_logsumexp)
    expected = gate_gradients_by_loop(model, graph, x, mean_logsumexp)
    assert got.keys() == expected.keys()
    for name, gradients in expected.items():
        assert torch.allclose(got[name], gradients, rtol=1e-9, atol=1e-12)
        assert gradients.abs().max() > 1e-4


def test_gradients_of_samples_do_not_depend_on_the_batch(traced):
    model, graph, x = traced
    joint = sample_gradients(model, graph, x, loss=mean_logsumexp, mean=True)
    for name, gradients in joint.items():
        parts = [sample_gradients(model, graph, part, loss=mean_logsumexp, mean=True)[name] for part in x.split([1, 3])]
        assert torch.allclose(torch.cat(parts), gradients, rtol=1e-9, atol=1e-12)


def test_mean_is_over_the_positions_of_a_map():
    # one map of 2 x 2 positions with values 1, 2, 3, 4 and gradients 1 each: sum 10, mean 2.5
    net = Net(lambda n, x: n.b(F.relu(n.a(x))).sum((1, 2, 3)), a=nn.Conv2d(1, 2, 1, bias=False), b=nn.Conv2d(2, 1, 1))
    nn.init.ones_(net.a.weight)
    nn.init.ones_(net.b.weight)
    graph = trace(net, torch.zeros(1, 1, 2, 2))
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    for mean, expected in ((False, 10.0), (True, 2.5)):
        assert sample_gradients(net, graph, x, loss=torch.sum, mean=mean)["a"].tolist() == [[expected, expected]]


def test_more_steps_of_time_than_were_traced_are_found_too():
    torch.manual_seed(0)
    model, x = Unrolled(2).double(), rows(2, 3, 5, 5)
    graph = trace(model, x)
    model.steps = 4
    with pytest.warns(UserWarning, match="'tanh' is called more often"):  # of these the last step alone is read
        got = sample_gradients(model, graph, x, loss=mean_logsumexp)["inner.0"]
    gates = torch.ones(2, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    model.inner.append(Net(lambda n, y: y * gates))
    (expected,) = torch.autograd.grad(2 * mean_logsumexp(model(x)), gates)
    assert torch.allclose(got, expected.flatten(1), rtol=1e-9, atol=1e-12)


def test_a_second_forward_has_further_samples():
    torch.manual_seed(0)
    model, first, second = Residual().double().eval(), rows(3, 3, 6, 6), rows(2, 3, 6, 6, seed=1)
    graph = trace(model, first)
    got = sample_gradients(model, graph, first, second, loss=mean_logsumexp)
    alone = [sample_gradients(model, graph, x, loss=mean_logsumexp) for x in (first, second)]
    for name, gradients in got.items():
        assert sorted(map(tuple, gradients.tolist())) == sorted(
            tuple(row) for part in alone for row in part[name].tolist()
        )


def test_groups_that_no_gradient_reaches_are_left_out():
    model, x = Residual().double(), rows(2, 3, 6, 6)
    graph = trace(model, x)
    gradients = SampleGradients({g.name: graph.maps(g) for g in graph.groups})
    with watching(model, gradients.looks):
        with torch.no_grad():
            model(x)
        model(x)
        assert gradients.take() == {}
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
        mean_logsumexp(model(x)).backward()
    assert gradients.take() == {}


def test_what_was_taken_or_cleared_is_not_taken_again():
    model, x = Residual().double(), rows(2, 3, 6, 6)
    graph = trace(model, x)
    gradients = SampleGradients({g.name: graph.maps(g) for g in graph.groups})
    with watching(model, gradients.looks):
        mean_logsumexp(model(x)).backward()
        assert len(gradients.take()["stem"]) == 2
        assert gradients.take() == {}
        mean_logsumexp(model(x)).backward()
        gradients.clear()
        assert gradients.take() == {}


class Dropping(nn.Module):
    """A map that a dropout overwrites, in train mode only."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5, inplace=True)
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x))).flatten(1))


def test_a_map_that_a_dropout_overwrites_is_looked_at_before():
    torch.manual_seed(0)
    model, x = with_random_norms(Dropping()).double(), rows(2, 3, 6, 6)
    graph = trace(model, x)
    model.train()
    out_of_place = copy.deepcopy(model)
    out_of_place.drop.inplace = False
    for net, seed in ((model, 1), (out_of_place, 1)):
        torch.manual_seed(seed)
        net.got = sample_gradients(net, graph, x, loss=mean_logsumexp)["conv"]
    assert torch.allclose(model.got, out_of_place.got, rtol=1e-10)
    assert model.got.abs().min() > 0


def test_a_map_that_is_overwritten_where_the_trace_did_not_see_it_is_an_error():
    def forward(n, x):
        x = n.norm(n.a(x))
        if x.requires_grad:
            x += 1
        return n.b(x.flatten(1))

    net = Net(forward, a=nn.Conv2d(1, 2, 1), norm=nn.BatchNorm2d(2), b=nn.Linear(8, 2)).requires_grad_(False)
    graph = trace(net, torch.zeros(1, 1, 2, 2))
    net.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'batch_norm' makes in norm was written to in place after group 'a'"):
        sample_gradients(net, graph, torch.randn(2, 1, 2, 2), loss=mean_logsumexp)


def test_products_of_half_precision_are_taken_in_single_precision():
    torch.manual_seed(0)
    model, x = Residual().eval(), rows(4, 3, 6, 6).float()
    graph = trace(model, x)

    def run():
        gradients = SampleGradients({g.name: graph.maps(g) for g in graph.groups})
        with watching(model, gradients.looks):
            mean_logsumexp(model(x)).backward()
        return gradients.take()["stem"]

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run()
    assert half.dtype == torch.float32
    assert torch.allclose(half, exact, rtol=0.1, atol=0.02 * exact.abs().max())


# checkpoints


class Blocks(nn.Module):
    """A stream through two blocks, which may be computed anew in the backward; as modules, or as mere functions."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        for i in (1, 2):
            block = Net(lambda n, x: torch.tanh(x + n.b(F.relu(n.a(x)))), a=nn.Conv2d(4, 5, 1), b=nn.Conv2d(5, 4, 1))
            setattr(self, f"block{i}", block)

    def forward(self, x):
        x = self.stem(x)
        for block in (self.block1, self.block2):
            if self.how == "plain":
                x = block(x)
            elif self.how == "function":
                x = checkpoint(lambda x, b=block: torch.tanh(x + b.b(F.relu(b.a(x)))), x, use_reentrant=True)
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    model, x = Blocks().double(), rows(3, 3, 6, 6)
    return model, trace(model, x), x


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("forwards", [1, 2])
def test_what_a_checkpoint_computes_anew_is_found_once_and_in_its_forward(blocks, how, forwards):
    model, graph, x = blocks
    batches = [x, x[:2] + 1][:forwards]
    expected = sample_gradients(model, graph, *batches, loss=mean_logsumexp)
    model.how = how
    got = sample_gradients(model, graph, *batches, loss=mean_logsumexp)
    assert got.keys() == expected.keys() == {"stem", "block1.a", "block2.a"}
    for name, gradients in expected.items():
        assert len(gradients) == (3 if forwards == 1 else 5)
        ordered = [torch.tensor(sorted(map(tuple, side.tolist()))) for side in (got[name], gradients)]
        assert torch.allclose(*ordered, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the trace, which takes no gradients
def test_a_reentrant_checkpoint_of_a_function_is_an_error(blocks):
    model, _, x = blocks
    model.how = "function"
    graph = trace(model, x)
    assert {tap.call.module for tap in graph.maps(graph.group("stem"))} == {"", "stem"}
    with pytest.raises(RuntimeError, match="group 'stem' is read in several places, of which some ran without gradi"):
        sample_gradients(model, graph, x, loss=mean_logsumexp)


def test_a_forward_without_gradients_beside_the_one_that_trains_is_none_of_its_places(blocks):
    model, graph, x = blocks
    expected = sample_gradients(model, graph, x, loss=mean_logsumexp)
    gradients = SampleGradients({g.name: graph.maps(g) for g in graph.groups})
    with watching(model, gradients.looks):
        with torch.no_grad():
            labels = model(x).argmax(1)
        mean_logsumexp(model(x) + 0 * labels[:, None]).backward()
    got = gradients.take()
    assert all(torch.allclose(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_gates_reach_what_is_computed_anew(blocks, how):
    model, graph, x = blocks
    taps, gate = graph.maps(graph.group("block1.a")), rows(5).requires_grad_()

    def gradient():
        model.zero_grad()
        with gated(model, {"g": taps}, {"g": gate}):
            mean_logsumexp(model(x)).backward()
        out, gate.grad = (gate.grad, model.stem.weight.grad.clone()), None
        return out

    expected = gradient()
    model.how = how
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(gradient(), expected, strict=True))


# gates


def test_a_gate_scales_its_channel_alone():
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.Linear(2, 3), b=nn.Linear(3, 2)).double()
    graph = trace(net, torch.zeros(1, 2))
    x, gate = rows(4, 2), torch.tensor([1.0, 0.0, 0.5])
    with gated(net, {"a": graph.maps(graph.group("a"))}, {"a": gate}):
        got = net(x)
        gate[1] = 1.0  # what the gates are at the time of the forward counts
        other = net(x)
    assert torch.allclose(got, net.b(F.relu(net.a(x)) * torch.tensor([1.0, 0.0, 0.5])))
    assert torch.allclose(other, net.b(F.relu(net.a(x)) * torch.tensor([1.0, 1.0, 0.5])))


def test_gates_of_one_leave_every_bit_and_no_hook(traced):
    model, graph, x = traced
    before, expected = hooks(model), model(x)
    with gated(
        model, {g.name: graph.maps(g) for g in graph.groups}, {g.name: torch.ones(g.size) for g in graph.groups}
    ):
        assert torch.equal(model(x), expected)
    assert hooks(model) == before


# in a fit


class Observes(ChannelPruner):
    """Scores by what it observes, and keeps what each event saw."""

    looks_at = "maps"
    needs = "maps and gradients of training"
    default_schedule = AT_4

    def __init__(self, budget=0.6, **settings):
        super().__init__(budget, **settings)
        self.seen = []

    def observe(self, gate_gradients):
        return gate_gradients.abs().sum(0)

    def scores(self, views):
        out = {name: group[0].measured.clone() for name, group in views.items()}
        self.seen.append(out)
        return out


class Still(TinyNet):
    """Does not learn, and is the same in train and eval mode: what is observed is known beforehand."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__()
        with_random_norms(self)

    def forward(self, x):
        for module in (self.norm0, self.norm1, self.norm2):
            module.eval()
        return super().forward(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def expected(means):
    return dict(means)


@pytest.fixture(scope="module")
def means(make_loader):
    """Group -> (C,) mean over the samples of the loader, sample by sample with explicit gates."""
    model = Still().double().eval()
    graph = trace(model, model.example_input_array)
    sums = {}
    for x, y in make_loader():
        for i in range(len(x)):
            found = gate_gradients_by_loop(
                model, graph, x[i : i + 1].double(), lambda out, y=y[i : i + 1]: F.cross_entropy(out, y)
            )
            for name, gradients in found.items():
                sums[name] = sums.get(name, 0) + gradients[0].abs()
    positions = {"stem": 64, "conv1": 64, "hidden": 1}
    assert sums.keys() == positions.keys()
    return {name: (total / 32 / positions[name]).float() for name, total in sums.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-8)] == []


def test_the_mean_over_the_samples_of_training_is_observed(fit, expected):
    callback = Observes()
    fit(callback, model=Still())
    assert_same(callback.seen[0], expected)


@pytest.mark.parametrize("batch_size", [4, 5, 16])
def test_what_is_observed_does_not_depend_on_the_batch_size(fit, make_loader, expected, batch_size):
    loader = make_loader(batch_size=batch_size)
    callback = Observes(schedule=OneShot(len(loader), unit="step"))
    fit(callback, model=Still(), loader=loader)
    assert_same(callback.seen[0], expected)


def test_each_batch_of_an_accumulated_gradient_is_observed(fit, expected):
    callback = Observes(schedule=OneShot(2, unit="step"))
    fit(callback, model=Still(), accumulate_grad_batches=2)
    assert_same(callback.seen[0], expected)


class Scaled(Precision):
    """Multiplies the loss as a gradient scaler does; the scale grows with every step."""

    class Scaler:
        scale = 64.0

        def get_scale(self):
            return self.scale

    def __init__(self):
        self.scaler = self.Scaler()

    def pre_backward(self, tensor, module):
        return super().pre_backward(tensor * self.scaler.scale, module)

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        out = super().optimizer_step(optimizer, model, closure, **kwargs)
        self.scaler.scale *= 2
        return out


def test_the_scale_of_the_loss_is_divided_out(fit, expected):
    callback = Observes()
    fit(callback, model=Still(), plugins=[Scaled()])
    assert_same(callback.seen[0], expected)


def test_a_batch_that_is_not_finite_is_left_out(fit, make_loader):
    class Overflows(Still):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 1 else 1)

        def on_before_optimizer_step(self, optimizer):
            optimizer.zero_grad()

    finite = DataLoader(Subset(make_loader().dataset, [*range(8), *range(16, 32)]), 8)
    callback, other = Observes(), Observes(schedule=OneShot(3, unit="step"))
    fit(callback, model=Overflows())
    fit(other, model=Still(), loader=finite)
    assert_same(callback.seen[0], other.seen[0])


def test_validation_is_not_observed_even_with_gradients(fit, expected):
    class Attacks(Still):
        @torch.inference_mode(False)
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                torch.autograd.grad(F.cross_entropy(self(x), batch[1]), x)

    callback = Observes()
    fit(callback, model=Attacks(), val_check_interval=1)
    assert_same(callback.seen[0], expected)


def test_gradients_of_a_penalty_are_not_those_of_the_loss(fit, expected):
    class Penalised(Still):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            loss = F.cross_entropy(self(x), batch[1])
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss + 0 * slope.square().sum()

    callback = Observes()
    fit(callback, model=Penalised())
    assert_same(callback.seen[0], expected)


def test_several_backward_passes_of_a_manual_step_are_observed(fit, expected):
    class Manual(Still):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for x, y in zip(batch[0].split([2, 6]), batch[1].split([2, 6]), strict=True):
                self.manual_backward(F.cross_entropy(self(x), y))
            optimizer.step()

    callback = Observes()
    fit(callback, model=Manual())
    assert_same(callback.seen[0], expected)


def test_modules_called_on_their_own_are_observed(fit, expected):
    class Parts(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.head = Still(), nn.Linear(1, 1)
            self.head, self.body.fc = self.body.fc, nn.Identity()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = Observes()
    fit(callback, model=Parts())
    # what one module hands to another is given up when they are traced on their own
    del expected["hidden"]
    assert_same({name.removeprefix("body."): value for name, value in callback.seen[0].items()}, expected)


def test_each_event_sees_the_network_as_it_then_is(fit):
    callback = Observes(schedule=Iterative(start=2, end=6, events=3, unit="step"))
    trainer = fit(callback, max_epochs=2)
    sizes = [{name: len(score) for name, score in seen.items()} for seen in callback.seen]
    assert sum(sizes[0].values()) > sum(sizes[1].values()) > sum(sizes[2].values())
    assert trainer.lightning_module.conv1.out_channels < sizes[2]["conv1"] or callback.plan.groups["conv1"][0] < 12


@pytest.mark.parametrize("first", [True, False])
def test_a_cut_by_another_callback_is_followed(fit, first):
    other, callback = RandomChannels(0.7, schedule=OneShot(2, unit="step")), Observes(0.4)
    fit([callback, other] if first else [other, callback])
    assert sum(len(score) for score in callback.seen[0].values()) < 30


def test_nothing_is_watched_after_the_last_event_and_nothing_is_left_after_the_fit(fit):
    class Counts(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, model, *rest):
            self.seen.append(sum(sum(counts) for counts in hooks(model).values()))

    model, counts, callback = TinyNet(), Counts(), Observes(schedule=OneShot(3, unit="step"))
    before = hooks(model)
    fit([counts, callback], model=model)
    assert min(counts.seen[:3]) > counts.seen[3] == counts.seen[-1]
    assert hooks(model) == before
    assert callback._watching is None


def test_a_check_of_the_budget_watches_nothing(tiny_net):
    model = tiny_net()
    before = hooks(model)
    Observes().check(trace(model, model.example_input_array))
    assert hooks(model) == before


def test_a_module_that_lightning_compiled_as_a_whole_is_refused(make_trainer, make_loader):
    model = torch.compile(TinyNet(), backend="eager")
    with pytest.raises(RuntimeError, match=r"the model is compiled.*compile it after pruning"):
        make_trainer(Observes()).fit(model, make_loader(), make_loader(8))


def test_a_compiled_part_is_refused_when_the_fit_starts(fit):
    class Compiled(TinyNet):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.compile(self.conv1, backend="eager")

    model = Compiled()
    before = hooks(model)
    with pytest.raises(RuntimeError, match=r"module 'conv1' is compiled.*compile it after pruning"):
        fit(Observes(), model=model)
    assert hooks(model) == before


# without a Trainer


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("batch_size", [4, 32])
def test_calibration_batches_stand_in_for_training(make_loader, expected, batch_size):
    model = Still().eval()
    graph = trace(model, model.example_input_array)
    callback = Observes(calibration=make_loader(batch_size=batch_size), loss_fn=loss_fn)
    assert_same(callback.scores_for(graph), expected)
    plan = callback.plan_for(graph)
    assert graph.cost(plan).flops <= 0.6 * graph.cost().flops


def test_calibration_leaves_no_trace(make_loader, tiny_net):
    model = with_random_norms(tiny_net())
    loss_fn(model, next(iter(make_loader()))).backward()
    state = copy.deepcopy(model.state_dict())
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    before, random = hooks(model), torch.get_rng_state()
    graph = trace(model, model.example_input_array)
    Observes(calibration=make_loader(), loss_fn=loss_fn).scores_for(graph)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert hooks(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(ArithmeticError):
        Observes(calibration=make_loader(), loss_fn=lambda *_: 1 / 0).scores_for(graph)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert hooks(model) == before


def test_a_look_per_tap_knows_its_group():
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.Linear(2, 3), b=nn.Linear(3, 2))
    graph = trace(net, torch.zeros(1, 2))
    seen = []
    taps = {"a": graph.maps(graph.group("a"))}
    with watching(net, looks_at(taps, lambda name, tap, s: seen.append((name, tap.call.name, s.out.shape[0])))):
        net(torch.zeros(5, 2))
    assert seen == [("a", "relu", 5)]
