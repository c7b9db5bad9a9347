import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import CHIP, Budget, OneShot, RandomChannels, trace
from lightning_prune.errors import NonFiniteScore
from lightning_prune.methods.chip import channel_independence


def slow(maps):
    """Eq. 4 as it stands: a singular value decomposition per sample and channel, the channel's row at zero."""
    out = []
    for a in maps.double():
        whole = torch.linalg.svdvals(a).sum()
        rows = []
        for channel in range(len(a)):
            without = a.clone()
            without[channel] = 0
            rows.append(whole - torch.linalg.svdvals(without).sum())
        out.append(torch.stack(rows))
    return torch.stack(out)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **tolerance)


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        # orthogonal rows: what goes is the row's norm; a Frobenius norm would give 1.505589 first
        ([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]], [3, 2, 1]),
        ([[1.0, 0], [0, 1]], [1, 1]),
        # twins: sqrt(2) - 1 each; a third orthogonal row keeps its norm
        ([[1.0, 0], [1, 0]], [2**0.5 - 1] * 2),
        ([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]], [2**0.5 - 1, 2**0.5 - 1, 1]),
        # singular values sqrt(3), 1; without a unit row sqrt((3 + sqrt 5) / 2) + sqrt((3 - sqrt 5) / 2) = sqrt(5)
        ([[1.0, 0], [0, 1], [1, 1]], [3**0.5 + 1 - 5**0.5] * 2 + [3**0.5 + 1 - 2]),
        # a column: 5 - 4 and 5 - 3
        ([[3.0], [4]], [1, 2]),
        ([[0.0, 0], [0, 0]], [0, 0]),
        ([[0.0, 0], [0, 7]], [0, 7]),
    ],
)
def test_independence_by_hand(a, expected):
    close(channel_independence(torch.tensor([a]))[0], expected, rtol=1e-8, atol=1e-8)


def test_norms_are_taken_per_sample_and_averaged_afterwards():
    # the mean of the maps is [[1, 0], [0, 0]], which would give [1, 0]; side by side they give [sqrt 2, sqrt 2]
    maps = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [-1, 0]]])
    close(channel_independence(maps).mean(dim=0), [2**0.5 - 1] * 2)
    close(channel_independence(maps.mean(dim=0, keepdim=True))[0], [1, 0], atol=1e-8, rtol=1e-8)
    close(channel_independence(maps.movedim(0, 1).reshape(1, 2, 4))[0], [2**0.5] * 2)


@pytest.mark.parametrize("shape", [(3, 5, 40), (3, 7, 7), (2, 30, 6), (4, 9, 1), (5, 1, 8), (1, 1, 1)])
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_is_what_a_decomposition_per_channel_gives(shape, activation):
    maps = activation(rows(*shape))
    expected = slow(maps)
    close(channel_independence(maps), expected, rtol=1e-6, atol=1e-7 * float(expected.max() + maps.abs().max()))


def test_is_precise_where_singular_values_lie_far_apart():
    # singular values from 1 to 1e-5, rows near each other
    left, _ = torch.linalg.qr(rows(8, 8).double())
    right, _ = torch.linalg.qr(rows(20, 8, seed=1).double())
    maps = (left * torch.logspace(0, -5, 8, dtype=torch.float64) @ right.T)[None]
    close(channel_independence(maps), slow(maps), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (40, 3), (3, 40)])
def test_is_precise_where_rows_lie_in_a_plane(shape):
    channels, positions = shape
    maps = rows(20, channels, 2) @ rows(20, 2, positions, seed=1)
    close(channel_independence(maps), slow(maps), rtol=1e-6, atol=1e-6)


def test_large_maps_in_single_precision_agree_to_a_millionth():
    maps = F.relu(rows(1, 64, 1024))
    close(channel_independence(maps), slow(maps), rtol=1e-6, atol=0)


def test_twenty_times_faster_than_a_decomposition_per_channel():
    # 64 channels of 32 x 32; about 200 times on a quiet machine
    maps = F.relu(rows(8, 64, 1024))
    channel_independence(maps)
    start = time.process_time()
    slow(maps[:1])
    direct = time.process_time() - start
    start = time.process_time()
    channel_independence(maps)
    assert (time.process_time() - start) / 8 < direct / 20


def test_bounds_scale_and_symmetry():
    maps = F.relu(rows(4, 6, 25))
    independence = channel_independence(maps)
    assert bool((independence >= 0).all())
    assert bool((independence <= maps.double().norm(dim=2) * (1 + 1e-9)).all())
    close(channel_independence(maps[:, :, torch.randperm(25)]), independence)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(channel_independence(maps[:, order]), independence[:, order])
    close(channel_independence(1e-12 * maps), 1e-12 * independence)
    assert channel_independence(1e30 * maps).isfinite().all()


def test_samples_do_not_depend_on_how_many_are_worked_on_at_a_time():
    maps = F.relu(rows(40, 12, 300))
    close(torch.cat([channel_independence(part) for part in maps.split(7)]), channel_independence(maps))


def test_a_sample_that_is_not_finite_is_nan_and_spoils_no_other():
    maps = F.relu(rows(3, 4, 9))
    spoilt = maps.clone()
    spoilt[1, 2, 3] = torch.inf
    found = channel_independence(spoilt)
    assert found[1].isnan().all()
    close(found[[0, 2]], channel_independence(maps)[[0, 2]])


class Net(nn.Module):
    """A convolution, a residual block of the same width, and a layer without a norm."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 6, 3, padding=1), norm(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1), norm(6)
        self.hidden, self.fc = nn.Linear(6, 10), nn.Linear(10, 3)

    def maps(self, x):
        """What readers receive: (stream twice, inner, hidden)."""
        first = F.relu(self.norm0(self.stem(x)))
        inner = F.relu(self.norm1(self.conv1(first)))
        second = F.relu(first + self.norm2(self.conv2(inner)))
        return first, second, inner, F.relu(self.hidden(second.mean((2, 3))))

    def forward(self, x):
        return self.fc(self.maps(x)[3])


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count=48, size=16, seed=0):
    images = rows(count, 1, 6, 6, seed=seed)
    return [(part, torch.arange(len(part)) % 3) for part in images.split(size)]


def scores(model, data, **settings):
    method = CHIP(Budget(0.5), calibration=data, loss_fn=loss, **settings)
    return method.scores_for(trace(model, data[0][0]))


@pytest.fixture
def model(with_random_norms):
    torch.manual_seed(0)
    return with_random_norms(Net()).train()


def test_scores_are_the_mean_over_samples_of_what_readers_receive(model):
    data = batches()
    found = scores(model, data)
    with torch.no_grad():
        first, second, inner, hidden = model.eval().maps(torch.cat([x for x, _ in data]))
    expected = {name: slow(m.flatten(2)).mean(dim=0) for name, m in {"first": first, "second": second}.items()}
    # of the stream the mean over its maps, each after the addition and its activation
    close(found["stem"], (expected["first"] + expected["second"]) / 2)
    close(found["conv1"], slow(inner.flatten(2)).mean(dim=0))
    close(found["hidden"], slow(hidden[:, :, None]).mean(dim=0), rtol=1e-6, atol=1e-8)


def test_scores_do_not_depend_on_the_batch_size(model):
    found = [scores(model, batches(size=size)) for size in (16, 48, 7)]
    for other in found[1:]:
        for name, score in found[0].items():
            close(other[name], score, rtol=1e-5, atol=0)


def test_looks_at_as_many_samples_as_asked_for(model):
    data = batches(64, 16)
    few = scores(model, data, samples=32)
    close(scores(model, data[:2])["conv1"], few["conv1"])
    assert not torch.allclose(scores(model, data)["conv1"], few["conv1"])


def test_leaves_nothing_behind(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.norm1.eval()
    scores(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, m in model.named_modules() if not m.training] == ["norm1"]
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_leaves_nothing_behind_when_the_loss_raises(model):
    def fails(model, batch):
        model(batch[0])
        raise ArithmeticError("mine")

    method = CHIP(0.5, calibration=batches(), loss_fn=fails)
    graph = trace(model, batches()[0][0])
    with pytest.raises(ArithmeticError, match="mine"):
        method.scores_for(graph)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_batch_that_is_not_finite_is_left_out(model):
    data = batches()
    spoilt = [*data, (torch.full_like(data[0][0], torch.nan), data[0][1])]
    close(scores(model, spoilt)["conv1"], scores(model, data)["conv1"])
    with pytest.raises(NonFiniteScore, match="1 batches were not finite"):
        scores(model, spoilt[-1:])


def test_a_copied_channel_goes_before_a_quiet_one_of_its_own():
    # channels 0 and 1 are one and the same, channel 2 a quarter as loud but another: L1 and loudness would drop 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 0.6]]).reshape(3, 2, 1, 1))
    data = [(rows(16, 2, 5, 5),)]
    method = CHIP(Budget(0.67, of="units"), calibration=data, loss_fn=lambda m, b: m(b[0]).sum())
    graph = trace(model, data[0][0])
    assert method.scores_for(graph)["0"].argmax() == 2
    assert method.plan_for(graph).kept["0.weight"][0].tolist() == [1, 2]


def test_the_paper_s_list_of_ratios_is_keep(model):
    # keep = floor(C (1 - p)): of 8 with p = 0.4 four, of 10 with p = 0.7 three
    data = batches()
    method = CHIP(
        Budget(1.0), keep={"conv1": 0.6, "hidden": 0.3}, scope="uniform", calibration=data, loss_fn=loss
    )  # fmt: skip
    plan = method.plan_for(trace(model, data[0][0]))
    assert plan.groups == {"stem": (6, 6), "conv1": (4, 8), "hidden": (3, 10)}


def test_without_norms():
    torch.manual_seed(0)
    model, data = Net(nn.Identity), batches()
    found = scores(model, data)
    with torch.no_grad():
        _, _, inner, _ = model.maps(torch.cat([x for x, _ in data]))
    close(found["conv1"], slow(inner.flatten(2)).mean(dim=0))


def test_maps_that_go_together_are_rows_of_their_own():
    # a group norm of two groups: channels i and i + 4 go together; side by side as one row they would score otherwise
    torch.manual_seed(0)
    model, data = Net(lambda width: nn.GroupNorm(2, width)), batches()
    found = scores(model, data)
    with torch.no_grad():
        _, _, inner, _ = model.maps(torch.cat([x for x, _ in data]))
    close(found["conv1"], slow(inner.flatten(2)).mean(dim=0).reshape(2, 4).mean(dim=0))


class Branches(nn.Module):
    """Two inputs, a depthwise layer, a concatenation, and functions in place of modules."""

    def __init__(self):
        super().__init__()
        self.left, self.depthwise = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.right = nn.Conv2d(2, 5, 3, padding=1)
        self.join, self.fc = nn.Conv2d(9, 6, 1), nn.Linear(6 * 4, 2)

    def forward(self, x, y):
        self.seen = F.relu(self.depthwise(F.relu(self.left(x)))), F.relu(self.right(y))
        x = torch.cat(self.seen, dim=1)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.join(x)), 2).flatten(1))


def test_two_inputs_depthwise_and_concatenation():
    torch.manual_seed(0)
    model, data = Branches(), [(rows(6, 1, 4, 4), rows(6, 2, 4, 4, seed=1))]
    method = CHIP(0.5, calibration=data, loss_fn=lambda m, b: m(*b).sum())
    found = method.scores_for(trace(model, data[0]))
    with torch.no_grad():
        model(*data[0])
    # each producer's channels are scored where they are made, the depthwise layer's as its reader gets them
    close(found["left"], slow(model.seen[0].flatten(2)).mean(dim=0))
    close(found["right"], slow(model.seen[1].flatten(2)).mean(dim=0))
    assert found["join"].shape == (6,)


def test_prunes_while_training(fit):
    callback = CHIP(Budget(0.5), samples=16, schedule=OneShot(3, unit="step"))
    trainer = fit(callback)
    assert callback.report.flops_kept <= 0.5
    assert {name: kept < of for name, (kept, of) in callback.plan.groups.items()} == dict.fromkeys(
        ["stem", "conv1", "hidden"], True
    )
    assert trainer.lightning_module.conv1.out_channels == callback.plan.groups["conv1"][0]


def test_differs_from_chance(fit):
    plans = []
    for method in (CHIP, RandomChannels):
        callback = method(Budget(0.5))
        fit(callback)
        plans.append(callback.plan)
    assert plans[0] != plans[1]


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_bad_number_of_samples_is_refused(samples):
    with pytest.raises(ValueError, match="samples must be an int of at least 1, got"):
        CHIP(0.5, samples=samples)
