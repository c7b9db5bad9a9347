import itertools
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models import resnet50, vgg16

from lightning_prune import Budget, Iterative, OneShot, ThiNet, figures, trace
from lightning_prune.batches import share
from lightning_prune.errors import NonFiniteScore
from lightning_prune.methods.thinet import backward_score, pursuit_score, rescaling
from lightning_prune.ranking import top_mask

HAND = torch.tensor([[1.0, -1, 1], [1, 1, 0], [2, -2, 2], [0, 1, 0]])  # rows are samples, y = (1, 2, 2, 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(rows):
    return rows.T @ rows


def correlated_rows(m, channels, seed=0):
    """Rows whose channels overlap, as those of a network do."""
    return normal(m, channels, seed=seed) @ normal(channels, channels, seed=seed + 1) + normal(m, 1, seed=seed + 2)


def residual(rows, removed):
    """J(T): sum over rows of the squared sum of the terms removed."""
    return rows[:, list(removed)].sum(dim=1).square().sum().item()


def scaled_residual(rows, keep, scale):
    return (rows.sum(dim=1) - rows[:, keep] @ scale.to(rows)).square().sum().item()


def removed(score, count):
    return set((~top_mask(score, len(score) - count)).nonzero().flatten().tolist())


def greedy_directly(rows, count):
    """The search as the paper writes it: J from the rows, for every candidate in every step."""
    gone = []
    for _ in range(count):
        rest = [c for c in range(rows.shape[1]) if c not in gone]
        gone.append(min(rest, key=lambda c: residual(rows, [*gone, c])))
    return gone


def looked_at(model, x, budget=0.5, batch=16, **settings):
    """A ThiNet that has scored a model on x, group -> (C,) scores; what it saw is in ``_grams``."""
    batches = [tuple(part) for part in zip(*(t.split(batch) for t in x), strict=True)]

    def loss(model, batch):
        return model(*batch).sum()

    method = ThiNet(budget, calibration=batches, loss_fn=loss, samples=len(x[0]), verify="never", **settings)
    return method, method.scores_for(trace(model, tuple(t[:2] for t in x)))


# the search


def test_hand_case_removes_channels_that_cancel_last():
    # Q = [[6, -4, 5], [-4, 7, -5], [5, -5, 5]]; J of one: 6, 7, 5, so 2 goes; then J({2, 0}) = 21 and J({2, 1}) = 2
    assert gram(HAND).tolist() == [[6, -4, 5], [-4, 7, -5], [5, -5, 5]]
    assert [residual(HAND, t) for t in ([2], [2, 0], [2, 1])] == [5, 21, 2]
    score = backward_score(gram(HAND))
    assert score.tolist() == [2, 1, 0]
    by_energy = HAND.square().sum(dim=0)  # 6, 7, 5: a ranking of single channels removes 2 and 0
    assert removed(score, 2) == {2, 1}
    assert removed(by_energy, 2) == {2, 0}


def test_hand_case_is_rescaled_by_seven_sixths():
    # w = x.y / x.x = (1 + 2 + 4) / 6; residual 2 before, 11 / 6 after; what energies keep: 21, and 66 / 7 after
    keep = torch.tensor([True, False, False])
    scale = rescaling(gram(HAND), keep)
    assert scale.tolist() == pytest.approx([7 / 6], abs=1e-6)
    assert scaled_residual(HAND, keep, torch.ones(1)) == 2
    assert scaled_residual(HAND, keep, scale) == pytest.approx(11 / 6)
    other = torch.tensor([False, True, False])
    assert scaled_residual(HAND, other, rescaling(gram(HAND), other)) == pytest.approx(66 / 7)


def test_search_by_gram_matrix_is_the_search_by_rows():
    rows = correlated_rows(60, 9)
    score = backward_score(gram(rows))
    order = score.argsort().tolist()
    assert order[:7] == greedy_directly(rows, 7)
    for count in range(1, 9):  # nested, so that the lowest scores are the set at any count
        assert removed(score, count) == set(order[:count])


@pytest.mark.parametrize("seed", range(4))
def test_greedy_set_is_the_best_single_channel_and_no_better_than_the_best_set(seed):
    rows = correlated_rows(40, 7, seed=seed)
    score = backward_score(gram(rows))
    for count in range(1, 7):
        best = min(residual(rows, t) for t in itertools.combinations(range(7), count))
        found = residual(rows, removed(score, count))
        assert found >= best * (1 - 1e-12)
        assert count > 1 or found == pytest.approx(best)


def pursue_directly(rows):
    y, order = rows.sum(dim=1), []
    left = y
    for _ in range(rows.shape[1]):
        rest = [c for c in range(rows.shape[1]) if c not in order]
        order.append(max(rest, key=lambda c: ((rows[:, c] @ left) ** 2 / rows[:, c].square().sum()).item()))
        left = y - rows[:, order] @ torch.linalg.lstsq(rows[:, order], y).solution
    return order


def test_pursuit_by_gram_matrix_is_the_pursuit_by_rows():
    rows = correlated_rows(60, 9)
    order = pursuit_score(gram(rows)).argsort(descending=True).tolist()
    assert order[:8] == pursue_directly(rows)[:8]
    assert order != backward_score(gram(rows)).argsort(descending=True).tolist()
    assert pursuit_score(gram(HAND)).argmax() == 0  # gains 49 / 6, 4 / 7, 25 / 5


def test_pursuit_adds_what_says_nothing_or_nothing_new_last():
    rows = normal(20, 5)
    rows[:, 1], rows[:, 3] = 0, 2 * rows[:, 0]
    score = pursuit_score(gram(rows))
    assert torch.isfinite(score).all()
    assert sorted(score.tolist()) == [0, 1, 2, 3, 4]
    assert removed(score, 2) in ({1, 0}, {1, 3})


# least squares


def test_rescaling_is_the_least_squares_of_the_rows():
    rows = correlated_rows(80, 8)
    rows[:, 1] = -3 * rows[:, 0] + 0.1 * rows[:, 1]
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    wanted = torch.linalg.lstsq(rows[:, keep], rows.sum(dim=1)).solution
    assert torch.allclose(rescaling(gram(rows), keep), wanted, rtol=1e-4)
    assert wanted[0] < -1  # any sign is allowed


@pytest.mark.parametrize("seed", range(3))
def test_rescaling_never_adds_to_the_error(seed):
    rows = correlated_rows(12, 10, seed=seed).float()  # hardly more rows than channels
    rows[:, 4] = rows[:, 7]
    for keep in (torch.rand(10, generator=torch.Generator().manual_seed(k)) < 0.5 for k in range(8)):
        keep[0], keep[1] = True, False
        before = scaled_residual(rows, keep, torch.ones(int(keep.sum())))
        assert scaled_residual(rows, keep, rescaling(gram(rows), keep)) <= before * (1 + 1e-6)


def test_without_removal_nothing_is_rescaled():
    assert rescaling(gram(correlated_rows(30, 5)), torch.ones(5, dtype=torch.bool)).tolist() == [1] * 5
    assert rescaling(torch.zeros(3, 3), torch.tensor([True, False, True])).tolist() == [1, 1]


def test_a_channel_that_says_nothing_keeps_its_scale():
    rows = normal(30, 4)
    rows[:, 2] = 0
    scale = rescaling(gram(rows), torch.tensor([False, True, True, True]))
    assert scale[1] == 1
    assert scale[0] != 1


# what is measured


class Reader(nn.Module):
    """Two convolutions without a norm; the second has one output, so that a sample has one row."""

    def __init__(self, width=6, **options):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.second = nn.Conv2d(width, 1, 4, **options)

    def maps(self, x):
        return F.relu(self.first(x))

    def forward(self, x):
        return self.second(self.maps(x))


def zeroed(model, x, channels):
    """Mean over samples of the squared change of the reader's output when channels of its input are zeroed."""
    with torch.no_grad():
        maps = model.maps(x)
        without = maps.clone()
        without[:, list(channels)] = 0
        return (model.second(maps) - model.second(without)).square().mean().item()


def test_criterion_is_the_change_of_the_readers_output_when_channels_are_really_zeroed():
    torch.manual_seed(0)
    model, x = Reader().double(), normal(60, 2, 4, 4)
    method, scores = looked_at(model, [x], rows=1)
    q = method._grams["first"]["second.weight"]
    for channels in ([0], [3], [1, 4], [0, 2, 5]):
        assert q[channels][:, channels].sum().item() == pytest.approx(zeroed(model, x, channels), rel=1e-9)
    order = scores["first"].argsort().tolist()
    assert zeroed(model, x, order[:1]) == min(zeroed(model, x, [c]) for c in range(6))
    assert zeroed(model, x, order[:2]) == min(zeroed(model, x, [order[0], c]) for c in order[1:])


def test_cut_network_computes_what_the_least_squares_promised():
    torch.manual_seed(0)
    model, x = Reader().double(), normal(60, 2, 4, 4)
    method, _ = looked_at(model, [x], rows=1)
    keep = torch.tensor([True, False, True, True, False, True])
    with torch.no_grad():
        before, maps = model(x), model.maps(x)
        windows = maps * model.second.weight
        rows = windows.sum(dim=(2, 3))  # (60, 6), as the one window is the whole map
        method.compensate({"first": keep}).apply(model)
        after = F.conv2d(maps[:, keep], model.second.weight[:, keep], model.second.bias)
    scale = torch.linalg.lstsq(rows[:, keep], rows.sum(dim=1)).solution
    wanted = rows[:, keep] @ scale + model.second.bias
    assert torch.allclose(after.flatten(), wanted, rtol=1e-4)
    assert (after - before).square().mean() < rows[:, ~keep].sum(dim=1).square().mean()


def test_of_two_filters_that_say_the_same_one_costs_nothing():
    # w_next[:, a] = 2 w_next[:, b] with equal filters: x_a = 2 x_b, and b alone says it all with w_b = 1 + 2
    torch.manual_seed(0)
    model, x = Reader().double(), normal(50, 2, 4, 4)
    a, b = 1, 4
    with torch.no_grad():
        model.first.weight[a], model.first.bias[a] = model.first.weight[b], model.first.bias[b]
        model.second.weight[:, a] = 2 * model.second.weight[:, b]
        before = model(x)
        method, _ = looked_at(model, [x])
        keep = torch.arange(6) != a
        kernel = model.second.weight[:, b].clone()
        method.compensate({"first": keep}).apply(model)
        after = F.conv2d(model.maps(x)[:, keep], model.second.weight[:, keep], model.second.bias)
    assert torch.allclose(model.second.weight[:, b], 3 * kernel, rtol=1e-4)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-6)


def test_the_search_is_the_one_asked_for_and_a_group_that_stays_whole_is_not_touched():
    torch.manual_seed(0)
    model, x = Reader(width=10).double(), normal(120, 2, 4, 4)
    (one, backward), (other, pursuit) = (looked_at(model, [x], rows=1, search=s) for s in ("backward", "omp"))
    q = one._grams["first"]["second.weight"]
    assert torch.equal(other._grams["first"]["second.weight"], q)
    assert torch.equal(backward["first"], backward_score(q))
    assert torch.equal(pursuit["first"], pursuit_score(q))
    assert not torch.equal(backward["first"], pursuit["first"])
    assert not one.compensate({"first": torch.ones(10, dtype=torch.bool)})


class Several(nn.Module):
    """One group read behind a pool by a linear layer, by a convolution in groups, and behind a depthwise one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.flat = nn.Linear(6 * 2 * 2, 1)
        self.grouped = nn.Conv2d(6, 2, 4, groups=2)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 1, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        a = self.flat(F.max_pool2d(x, 2).flatten(1))
        return a + self.grouped(x).sum(dim=1).flatten(1) + self.point(F.relu(self.depth(x))).flatten(1)


def test_readers_of_one_group_decide_together_and_are_scaled_each_for_itself():
    torch.manual_seed(0)
    model, x = Several().double(), normal(40, 2, 4, 4)
    method, scores = looked_at(model, [x], rows=400)
    with torch.no_grad():
        maps = F.relu(model.stem(x))
        pooled = F.max_pool2d(maps, 2)
        flat = (pooled * model.flat.weight.reshape(1, 6, 2, 2)).sum(dim=(2, 3))
        point = (F.relu(model.depth(maps)) * model.point.weight).sum(dim=(2, 3))
    # a channel of the group is one input of each of the two conv groups
    assert {name: len(score) for name, score in scores.items()} == {"stem": 3}
    for reader, rows in (("flat.weight", flat), ("point.weight", point)):
        each = rows[:, :3] + rows[:, 3:]
        assert torch.allclose(method._grams["stem"][reader], 400 * gram(each) / 40, rtol=1e-9)
    with torch.no_grad():
        halves = (maps.reshape(40, 2, 3, 4, 4) * model.grouped.weight).sum(dim=(3, 4))  # (B, conv group, channel)
    found = method._grams["stem"]["grouped.weight"]  # either conv group's output is drawn about as often
    wanted = 400 * (gram(halves[:, 0]) + gram(halves[:, 1])) / 2 / 40
    assert torch.allclose(found, wanted, rtol=0, atol=0.02 * wanted.max().item())
    keep = torch.tensor([True, False, True])
    factors = method.compensate({"stem": keep}).factors
    scales = {r: rescaling(q, keep) for r, q in method._grams["stem"].items()}
    assert factors["grouped.weight"][1][keep].tolist() == scales["grouped.weight"].tolist()
    assert factors["point.weight"][1].reshape(2, 3)[:, keep].tolist() == [scales["point.weight"].tolist()] * 2
    columns = factors["flat.weight"][1].reshape(2, 3, 4)[:, keep]
    assert torch.equal(columns, scales["flat.weight"][None, :, None].expand(2, 2, 4))
    assert not torch.equal(scales["flat.weight"], scales["point.weight"])


def test_a_stream_is_ordered_by_the_rows_of_all_its_readers(tiny_net, with_random_norms):
    torch.manual_seed(1)
    method, scores = looked_at(with_random_norms(tiny_net()).double(), [normal(60, 1, 8, 8)])
    one, other = method._grams["stem"].values()
    assert torch.equal(scores["stem"], backward_score(one + other))
    assert not any(torch.equal(scores["stem"], backward_score(alone)) for alone in (one, other))


def test_wide_layers_are_looked_at_with_more_samples(tiny_net):
    model, seen = tiny_net(), []

    def loss(model, batch):
        seen.append(len(batch[0]))
        return model(*batch).sum()

    batches = [(part,) for part in normal(100, 1, 8, 8).float().split(10)]
    for rows, samples in ((2, 60), (10, 20)):  # 12 channels want 120 rows
        seen.clear()
        method = ThiNet(0.5, calibration=batches, loss_fn=loss, samples=20, rows=rows)
        method.scores_for(trace(model, batches[0][0]))
        assert sum(seen) == samples


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.join = nn.Conv2d(7, 1, 4)

    def forward(self, x):
        return self.join(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], dim=1))


def test_parts_of_a_concatenation_are_scaled_at_their_places():
    torch.manual_seed(0)
    model, x = Concat().double(), normal(40, 2, 4, 4)
    method, _ = looked_at(model, [x], rows=1)
    with torch.no_grad():
        maps = torch.cat([F.relu(model.a(x)), F.relu(model.b(x))], dim=1)
        rows = (maps * model.join.weight).sum(dim=(2, 3))
    assert torch.allclose(method._grams["a"]["join.weight"], gram(rows[:, :3]) / 40)
    assert torch.allclose(method._grams["b"]["join.weight"], gram(rows[:, 3:]) / 40)
    keep = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True, True, True])}
    factor = method.compensate(keep).factors["join.weight"][1]
    wanted = [rescaling(gram(rows[:, :3]), keep["a"]), rescaling(gram(rows[:, 3:]), keep["b"])]
    assert torch.allclose(factor[[0, 2, 4, 5, 6]], torch.cat(wanted))
    assert factor[[1, 3]].tolist() == [1, 1]


def test_scores_do_not_depend_on_the_batch_size(tiny_net, with_random_norms):
    torch.manual_seed(0)
    model, x = with_random_norms(tiny_net()), normal(70, 1, 8, 8).float()
    found = [looked_at(model, [x], batch=size)[0]._grams for size in (16, 64, 7)]
    assert list(found[0]) == ["stem", "conv1", "hidden"]
    assert list(found[0]["stem"]) == ["conv1.weight", "hidden.weight"]
    for name, of_group in found[0].items():
        for reader, q in of_group.items():
            for other in found[1:]:
                assert torch.allclose(other[name][reader], q, rtol=1e-5, atol=1e-6 * q.diagonal().mean().item())


def test_processes_together_look_at_the_rows_of_one(tiny_net):
    model, x = tiny_net().double(), normal(60, 1, 8, 8)
    method, _ = looked_at(model, [x], batch=16)  # four batches, the last one smaller
    whole = method._grams["conv1"]["conv2.weight"]
    group = method._views["conv1"][0].group
    method.total = lambda value: value
    summed = torch.zeros_like(whole)
    for rank, samples in ((0, 32), (1, 28)):
        method._at_event = SimpleNamespace(global_rank=rank, world_size=2), model
        mine = list(share(iter([(part,) for part in x.split(16)]), rank, 2))
        method.calibrate = lambda _, mine=mine: iter(mine)
        with torch.no_grad():
            summed += samples * method._collect([group])["conv1"]["conv2.weight"] / 60
    assert torch.allclose(summed, whole)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.numbers = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(3, 5)
        self.join = nn.Linear(9, 2)

    def forward(self, image, numbers):
        seen = F.relu(self.image(image)).mean(dim=(2, 3))
        return self.join(torch.cat([seen, torch.sigmoid(self.numbers(numbers))], dim=1))


def test_a_model_with_two_inputs_and_without_norms_is_scored():
    torch.manual_seed(0)
    model, x = TwoInputs().double(), [normal(30, 1, 6, 6), normal(30, 3, seed=1)]
    method, scores = looked_at(model, x, rows=500)
    rows = torch.sigmoid(model.numbers(x[1])).detach()
    # of the two outputs each is drawn about as often, in each sample
    wanted = sum(gram(rows * w[4:]) for w in model.join.weight.detach()) / 30 / 2 * 500
    assert torch.allclose(method._grams["numbers"]["join.weight"], wanted, rtol=0.05, atol=0.02 * wanted.max().item())
    assert {name: sorted(score.tolist()) for name, score in scores.items()} == {
        "image": list(range(4)),
        "numbers": list(range(5)),
    }


def test_looking_leaves_no_trace_also_where_the_model_raises(tiny_net):
    model, x = tiny_net().train(), normal(20, 1, 8, 8).float()
    before, random = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    looked_at(model, [x])

    def fails(model, batch):
        model(*batch)
        raise ArithmeticError("the user's own mistake")

    method = ThiNet(0.5, calibration=[(x,)], loss_fn=fails)
    with pytest.raises(ArithmeticError, match="own mistake"):
        method.scores_for(trace(model, x[:2]))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_greedy_beats_energy_l1_and_chance_and_least_squares_beats_greedy():
    # relative error of the next layer's output, half of 16 channels gone, digits through random convolutions
    images = torch.tensor(load_digits().images[:500], dtype=torch.float32).unsqueeze(1) / 16
    errors = torch.zeros(5)
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1)
        )
        model(images)  # the norm's statistics
        method, scores = looked_at(model, [images], batch=100)
        q = method._grams["0"]["3.weight"]
        chance = torch.rand(16)
        keeps = [top_mask(s, 8) for s in (scores["0"], q.diagonal(), model[0].weight.abs().sum(dim=(1, 2, 3)), chance)]
        of_seed = [q[~keep][:, ~keep].sum() / q.sum() for keep in keeps]
        scale = torch.ones(16, dtype=torch.float64)
        scale[keeps[0]] = rescaling(q, keeps[0])
        off = torch.where(keeps[0], 1 - scale, 1.0)
        of_seed.append(off @ q @ off / q.sum())
        assert of_seed[4] <= of_seed[0] <= of_seed[1] + 1e-9
        errors += torch.stack(of_seed).float() / 4
    greedy, energy, l1, chance, least_squares = errors.tolist()
    assert least_squares < greedy < energy
    assert greedy < min(l1, chance)


def test_search_is_over_twenty_times_faster_than_working_out_every_set():
    rows = correlated_rows(640, 64).float()
    begun = time.perf_counter()
    slow = greedy_directly(rows, 32)
    between = time.perf_counter()
    fast = backward_score(gram(rows.double())).argsort()[:32].tolist()
    assert fast == slow
    assert time.perf_counter() - between < (between - begun) / 20


# in a fit


class Deep(pl.LightningModule):
    """Five hidden layers without norms, one of them depthwise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)])
        self.layers += [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
        self.fc = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.fc(x.mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def channels(row):
    return [int(n) for name, n in row.items() if name.startswith("prune/channels/")]


def test_layers_go_one_after_the_other_in_data_flow_order_each_once_and_all_the_way(fit):
    callback = ThiNet(Budget(0.5))
    fit(callback, model=Deep(), max_epochs=10)
    assert len(callback.events) == 4
    last = channels(callback.report.rows[-1])
    for done, row in enumerate(callback.report.rows, start=1):
        assert channels(row) == [*last[:done], *[8] * (4 - done)]
    assert max(last) - min(last) <= 1  # the common fraction
    assert callback.report.flops_kept <= 0.5


def test_events_that_no_layer_falls_to_are_left_out_and_several_layers_may_share_one(fit):
    many, few, one = (
        ThiNet(0.5),
        ThiNet(0.5, schedule=Iterative(0.2, 0.6, events=2)),
        ThiNet(0.5, schedule=OneShot(0.3)),
    )
    for callback in (many, few, one):
        fit(callback, model=Deep(), max_epochs=10)
    assert len(many.events) == 4  # of 40
    assert [sum(n == 8 for n in channels(row)) for row in few.report.rows] == [2, 0]
    assert len({str(callback.plan.groups) for callback in (many, few, one)}) == 1  # the same counts


def test_what_is_read_is_scaled_with_the_cut_and_only_then(fit, tiny_net, monkeypatch):
    class Spy(ThiNet):
        def compensate(self, keep):
            out = super().compensate(keep)
            seen.append({name: {dim: len(f) for dim, f in dims.items()} for name, dims in out.factors.items()})
            return out

    seen, logged = [], []
    monkeypatch.setattr(figures, "log_histogram", lambda loggers, name, *rest: logged.append(name))
    callback = Spy(0.5)
    fit(callback, model=tiny_net(), max_epochs=4)
    assert [list(names) for names in seen] == [["conv1.weight", "hidden.weight"], ["conv2.weight"], ["fc.weight"]]
    assert seen[1]["conv2.weight"] == {1: 12}
    assert logged == ["prune/score/stem", "prune/score/conv1", "prune/score/hidden"]  # each when it was scored
    assert callback._grams == {}


def test_a_fit_in_which_nothing_was_learnt_still_computes_nearly_the_same_after_the_cut(fit, tiny_net):
    class Still(tiny_net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    x, errors = normal(40, 1, 8, 8).float(), []
    for cls in (ThiNet, Unscaled):
        model = Still()
        pl.seed_everything(0, verbose=False)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.5)
        before = model.eval()(x).detach()
        fit(cls(0.7, streams=False, schedule=OneShot(1, unit="step")), model=model.train(), max_epochs=1)
        after = model.eval()(x).detach()
        errors.append(((after - before).square().sum() / before.square().sum()).item())
    assert errors[0] < errors[1]


class Unscaled(ThiNet):
    def compensate(self, keep):
        return type(super().compensate(keep))()


def test_masking_chooses_and_scales_as_cutting_does(fit):
    plans = []
    for apply in ("cut", "mask"):
        callback = ThiNet(0.5, apply=apply, schedule=OneShot(5, unit="step"))
        trainer = fit(callback)
        plans.append(callback.plan.groups)
        scale = trainer.lightning_module.fc.weight.abs().sum(dim=0)
    assert plans[0] == plans[1]
    assert (scale == 0).sum() == plans[1]["hidden"][1] - plans[1]["hidden"][0]


class Doubtful(pl.LightningModule):
    """The second layer's width has a part in what the model computes, which only a cut can show."""

    def __init__(self, doubtful=1):
        super().__init__()
        self.doubtful = doubtful
        self.layers = nn.ModuleList([nn.Linear(64, 12), *(nn.Linear(12, 12) for _ in range(3))])
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1)
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            x = x * torch.arange(1.0, 20.0)[int(x.shape[1])] / 13 if i == self.doubtful else x
        return self.fc(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_what_a_frozen_layer_keeps_is_taken_from_the_layers_that_are_left(fit):
    callback, plain = (ThiNet(0.4, schedule=Iterative(0.2, 0.7, events=4)) for _ in range(2))
    with pytest.warns(UserWarning, match="freezes layers.1"):
        fit(callback, model=Doubtful(), max_epochs=4)
    fit(plain, model=Doubtful(doubtful=-1), max_epochs=4)
    kept, without = ([count for count, _ in c.plan.groups.values()] for c in (callback, plain))
    assert kept[:2] == [without[0], 12]
    assert max(kept[2:]) < min(without[2:])
    assert max(callback.report.flops_kept, plain.report.flops_kept) <= 0.4


def test_streams_can_be_left_alone_with_a_reason(fit):
    callback = ThiNet(0.6, streams=False)
    fit(callback)
    assert list(callback.plan.groups) == ["conv1", "hidden"]
    assert callback.report.frozen["stem"] == "2 layers make its channels together, which streams=False leaves alone"


def test_trains_in_half_precision(fit):
    callback = ThiNet(0.5)
    fit(callback, precision="bf16-mixed")
    assert callback.report.flops_kept <= 0.5


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.rnn = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True)
        self.hidden, self.fc = nn.Linear(4, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.fc(F.relu(self.hidden(self.rnn(F.relu(self.inner(x)))[0].mean(1))))


def test_layers_that_read_in_a_way_of_their_own_are_left_whole_with_a_reason():
    method = ThiNet(0.95)
    method.check(trace(Recurrent(), torch.randn(2, 3, 5)))
    assert method._frozen["inner"] == "'rnn' reads it in lstm(), where its terms cannot be told apart"
    assert list(method._views) == ["hidden"]


def test_a_reader_whose_weight_is_computed_is_left_as_it_is():
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3))
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), normed, nn.ReLU(), nn.Conv2d(6, 2, 1))
    method = ThiNet(0.9)
    method.check(trace(model, torch.randn(2, 1, 8, 8)))
    assert method._frozen["0"].startswith("'2' computes its weight anew in each forward")
    assert list(method._views) == ["2"]


def test_a_group_that_no_calibration_batch_reaches_is_named():
    model = Recurrent()
    x = torch.randn(80, 3, 5)
    method = ThiNet(
        0.95, calibration=[(x,)], loss_fn=lambda model, batch: model.rnn(F.relu(model.inner(batch[0])))[0].sum()
    )
    with pytest.raises(NonFiniteScore, match="no layer that reads hidden ran on the calibration data"):
        method.scores_for(trace(model, x[:2]))


def test_few_rows_are_warned_of(tiny_net):
    with pytest.warns(UserWarning, match="ThiNet looks at 40 rows to scale 12 channels by, and wants 10 for each"):
        looked_at(tiny_net(), [normal(4, 1, 8, 8).float()])


def test_a_large_change_of_scale_is_warned_of():
    model = Reader()
    with torch.no_grad():
        model.first.weight[1], model.first.bias[1] = model.first.weight[0], model.first.bias[0]
        model.second.weight[:, 1] = 100 * model.second.weight[:, 0]
    method, _ = looked_at(model, [normal(50, 2, 4, 4).float()])
    with pytest.warns(UserWarning, match="changes the scale of what 'second' reads of 'first' by up to"):
        method.compensate({"first": torch.arange(6) != 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "forward"}, "search must be one of 'backward', 'omp', got 'forward'"),
        ({"rows": 0}, "rows must be an int of at least 1, got 0"),
        ({"samples": 2.5}, "samples must be an int of at least 1, got 2.5"),
        ({"scope": "global"}, "scope must be 'uniform', got 'global'"),
        ({"absorb": True}, "absorb must be False, got True"),
        ({"absorb": 0.1}, "absorb must be False, got 0.1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ThiNet(0.5, **settings)


# sizes that the paper prints


def cost_after(model, keep):
    """GFLOPs of convolutions and linear layers, a multiply-accumulate as two, and millions of parameters."""
    graph = trace(model, torch.empty(1, 3, 224, 224, device="meta"))
    sizes = {group.name: group.size for group in graph.groups}
    masks = {name: torch.arange(sizes[name]) < int(sizes[name] * fraction) for name, fraction in keep.items()}
    cost = graph.cost(graph.plan(masks))
    return 2 * cost.conv_linear_flops / 1e9, cost.params / 1e6


def test_vgg16_has_the_papers_size_with_half_of_ten_layers():
    with torch.device("meta"):
        model = vgg16()
    first_ten = [f"features.{n}" for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)]
    assert cost_after(model, {}) == pytest.approx((30.9405, 138.358), abs=1e-3)
    assert cost_after(model, dict.fromkeys(first_ten, 0.5)) == pytest.approx((9.5824, 131.453), abs=1e-3)


@pytest.mark.parametrize(("fraction", "flops"), [(1.0, 7.7159), (0.7, 4.8801), (0.5, 3.4129), (0.3, 2.1950)])
def test_resnet50_has_the_papers_size_with_the_inner_layers_of_each_block_cut(fraction, flops):
    with torch.device("meta"):
        model = resnet50()
    blocks = [f"layer{i}.{b}" for i, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for b in range(count)]
    inner = [f"{block}.conv{c}" for block in blocks for c in (1, 2)]
    for i in (2, 3, 4):  # the stride is in the first layer of a block
        block = model.get_submodule(f"layer{i}.0")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    assert cost_after(model, dict.fromkeys(inner, fraction))[0] == pytest.approx(flops, abs=1e-3)
