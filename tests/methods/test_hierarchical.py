import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import Budget, Hierarchical, Iterative, OneShot, cut, plan, redundancy, trace
from lightning_prune.errors import NonFiniteScore
from lightning_prune.methods.hierarchical import (
    Redundancy,
    allocate,
    effective_rank,
    removal_order,
    rescaled_gates,
    salience,
)

FEW = pytest.mark.filterwarnings("ignore:Hierarchical. the redundancy")
BEYOND = pytest.mark.filterwarnings("ignore:Hierarchical. the budget asks for more")


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_fisher(size=7, samples=40, seed=0):
    """Curvature of unequal channels, some of them much alike."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    gradients = gradients @ (torch.eye(size) + 0.5 * torch.rand(size, size, generator=generator)).double()
    return gradients.T @ gradients / samples


def keep_all_but(size, *gone):
    keep = torch.ones(size, dtype=torch.bool)
    keep[list(gone)] = False
    return keep


def test_duplicate_filters_are_one_filter():
    # eigenvalues 2 and 0; with mu = 1e-6 either goes for about 1e-6, and the other's gate becomes 2
    fisher = matrix([1, 1], [1, 1])
    assert effective_rank(fisher) == 1
    assert salience(fisher, 1e-6).tolist() == pytest.approx([1e-6] * 2, rel=1e-3)
    assert salience(fisher, rescale=False).tolist() == [0.5, 0.5]
    assert rescaled_gates(fisher, keep_all_but(2, 0), 1e-9).tolist() == pytest.approx([0, 2])


def test_the_second_removal_counts_the_gate_that_grew():
    # 0.5 * 2^2 * 1 = 2 = 0.5 (1, 1) F (1, 1); without the square of the gate it would be 0.5
    _, costs = removal_order(matrix([1, 1], [1, 1]), 1e-9)
    assert costs.tolist() == pytest.approx([0, 2], abs=1e-6)


def test_a_dead_filter_goes_first_and_for_nothing():
    # 4 / 5 = 0.8, 5 / 5 = 1: two are needed
    fisher = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
    assert effective_rank(fisher) == 2
    order, costs = removal_order(fisher, 1e-9)
    assert order.tolist() == [2, 1, 0]
    assert costs.tolist() == pytest.approx([0, 0.5, 2], abs=1e-6)


def test_rank_is_the_least_that_holds_the_share():
    # 100 / 101.5 = 0.9852 < 0.99, 101 / 101.5 = 0.9951
    fisher = torch.diag(torch.tensor([0.5, 100.0, 1.0]))
    assert [effective_rank(fisher, t) for t in (0.02, 0.01, 0.001)] == [1, 2, 3]
    assert effective_rank(torch.zeros(3, 3)) == 1


def test_salience_knows_what_the_others_make_up_for():
    # 1 / (2 P_ii) of the inverse; the diagonal alone would say (1, 1, 1.5)
    fisher = matrix([2, 1, 0], [1, 2, 0], [0, 0, 3])
    assert salience(fisher, 0).tolist() == pytest.approx([0.75, 0.75, 1.5])
    assert salience(fisher, rescale=False).tolist() == [1, 1, 1.5]
    assert rescaled_gates(fisher, keep_all_but(3, 0), 0).tolist() == pytest.approx([0, 1.5, 1])


def test_linear_dependence_is_found_where_no_two_filters_are_alike():
    gradients = matrix([1, 0, 1], [0, 1, 1], [1, 1, 2], [1, -1, 0])  # the third is the sum of the others
    fisher = gradients.T @ gradients / 4
    assert fisher.tolist() == [[0.75, 0, 0.75], [0, 0.75, 0.75], [0.75, 0.75, 1.5]]
    assert effective_rank(fisher) == 2
    assert rescaled_gates(fisher, keep_all_but(3, 2), 1e-9).tolist() == pytest.approx([2, 2, 0])
    assert salience(fisher, 1e-9)[2].item() == pytest.approx(0, abs=1e-8)


def least_error(fisher, gone, damping):
    """min over the gates that stay of (z - 1)^T (F + mu I) (z - 1) / 2, the others 0; by its own equations."""
    damped = fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
    stays = [i for i in range(len(fisher)) if i not in gone]
    moved = -torch.ones(len(fisher), dtype=torch.float64)
    if stays:
        moved[stays] = torch.linalg.solve(damped[stays][:, stays], damped[stays][:, list(gone)].sum(1))
    return (moved @ damped @ moved / 2).item(), moved + 1


@pytest.mark.parametrize("damping", [1e-8, 1e-4, 0.1])
def test_greedy_order_is_that_of_trying_every_filter_anew(damping):
    fisher = random_fisher()
    order, costs = removal_order(fisher, damping)
    gone, before = [], 0.0
    for step in range(len(fisher)):
        errors = {i: least_error(fisher, [*gone, i], damping)[0] for i in range(len(fisher)) if i not in gone}
        best = min(errors, key=errors.__getitem__)
        assert order[step].item() == best
        assert costs[step].item() == pytest.approx(errors[best] - before, rel=1e-8)
        gone, before = [*gone, best], errors[best]
        gates = least_error(fisher, gone, damping)[1]
        assert torch.allclose(rescaled_gates(fisher, keep_all_but(7, *gone), damping), gates)


def test_greedy_order_of_many_filters_is_that_of_shrinking_the_inverse_step_by_step():
    fisher = random_fisher(150, 600)
    order, costs = removal_order(fisher)
    inverse = torch.linalg.inv(fisher + 1e-4 * fisher.diagonal().mean() * torch.eye(150, dtype=torch.float64))
    left, gates = list(range(150)), torch.ones(150, dtype=torch.float64)
    for step in range(150):
        price = gates.square() / (2 * inverse.diagonal())
        i = int(price.argmin())
        assert order[step].item() == left[i]
        assert costs[step].item() == pytest.approx(price[i].item(), rel=1e-8)
        gates = gates - gates[i] * inverse[:, i] / inverse[i, i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        stays = keep_all_but(len(left), i)
        inverse, gates, left = inverse[stays][:, stays], gates[stays], [c for c in left if c != left[i]]


def test_without_rescaling_costs_add_up_to_the_error_of_zeroed_gates():
    fisher = random_fisher()
    order, costs = removal_order(fisher, rescale=False)
    for n in range(1, 8):
        gone = order[:n]
        others = [i for i in range(7) if i not in gone[:-1].tolist()]
        errors = {i: fisher[[*gone[:-1].tolist(), i]][:, [*gone[:-1].tolist(), i]].sum().item() / 2 for i in others}
        assert gone[-1].item() == min(errors, key=errors.__getitem__)
        assert costs[:n].sum().item() == pytest.approx(fisher[gone][:, gone].sum().item() / 2)


def test_nothing_known_of_a_layer_costs_nothing():
    order, costs = removal_order(torch.zeros(3, 3))
    assert order.tolist() == [0, 1, 2]
    assert costs.tolist() == [0, 0, 0]
    assert salience(torch.zeros(2, 2)).tolist() == [0, 0]
    assert rescaled_gates(torch.zeros(2, 2), keep_all_but(2, 0)).tolist() == [0, 1]


def test_allocation_gives_each_layer_its_share_and_the_rest_to_the_cheapest():
    rises = {"a": [0.5] * 8, "b": [0.9, 0.1, 0.1, 0.1], "c": [0.2, 0.6]}
    bounds, limits = {"a": 4, "b": 2, "c": 1}, {"a": 7, "b": 3, "c": 1}
    # 4 of 7: floor(16/7), floor(8/7), floor(4/7) = 2, 1, 0; the one left goes to b, where the second costs 0.1
    assert allocate(rises, bounds, limits, 4) == {"a": 2, "b": 2, "c": 0}
    assert allocate(rises, bounds, limits, 7) == bounds
    # beyond the bounds: b's third for 0.1, then a at 0.5; c has reached its limit
    assert allocate(rises, bounds, limits, 9) == {"a": 5, "b": 3, "c": 1}


def test_allocation_removes_as_many_as_wanted_and_keeps_to_its_bounds():
    rises = {name: random_fisher(6, seed=i).diagonal().tolist() for i, name in enumerate("abcd")}
    limits = dict.fromkeys("abcd", 5)
    for sizes in itertools.product((0, 1, 3, 5), repeat=4):
        bounds = dict(zip("abcd", sizes, strict=True))
        for total in range(21):
            given = allocate(rises, bounds, limits, total)
            assert sum(given.values()) == total
            within = total <= sum(sizes)
            assert all(given[n] <= (bounds if within else limits)[n] for n in given)
            assert within or all(given[n] >= bounds[n] for n in given)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(size, samples=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (samples,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


def layers(model, data, loss_fn=cross_entropy, **settings):
    """What an event would know of each group of a model."""
    method = Hierarchical(0.5, calibration=data, loss_fn=loss_fn, **settings)
    method.scores_for(trace(model, data[0][0]))
    return method._layers


@pytest.fixture
def residual(tiny_net, with_random_norms):
    torch.manual_seed(0)
    model = with_random_norms(tiny_net()).double()
    model.example_input_array = None
    return model


def gated(model, x, gates):
    """``TinyNet`` with a gate on each group: the stream's wherever it is written to."""
    stream, inner = gates["stem"][:, None, None], gates["conv1"][:, None, None]
    x = F.relu(stream * model.norm0(model.stem(x)))
    x = F.relu(x + stream * model.norm2(model.conv2(F.relu(inner * model.norm1(model.conv1(x))))))
    return model.fc(F.relu(gates["hidden"] * model.hidden(x.mean((2, 3)))))


def ones():
    return {name: torch.ones(size, dtype=torch.float64) for name, size in (("stem", 6), ("conv1", 12), ("hidden", 12))}


def test_curvature_is_that_of_one_gate_a_group_sample_by_sample(residual):
    data = batches(16)
    found = layers(residual, data)
    residual.eval()
    rows = {name: [] for name in found}
    for x, label in ((x[None], label[None]) for xs, labels in data for x, label in zip(xs, labels, strict=True)):
        gates = {name: gate.requires_grad_() for name, gate in ones().items()}
        gradients = torch.autograd.grad(F.cross_entropy(gated(residual, x, gates), label), list(gates.values()))
        for name, gradient in zip(gates, gradients, strict=True):
            rows[name].append(gradient)
    for name, gradients in rows.items():
        stacked = torch.stack(gradients)
        assert torch.allclose(found[name].fisher, stacked.T @ stacked / 64, rtol=1e-8, atol=1e-14)


def test_diagonal_of_the_curvature_agrees_with_finite_differences(residual):
    data, step = batches(16), 1e-5
    found = layers(residual, data)
    residual.eval()
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    for name in found:
        losses = []
        for sign in (1, -1):
            gates = ones()
            gates[name][3] += sign * step
            with torch.no_grad():
                losses.append(F.cross_entropy(gated(residual, x, gates), labels, reduction="none"))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert found[name].fisher[3, 3].item() == pytest.approx(slope.square().mean().item(), rel=1e-4)


def test_curvature_does_not_depend_on_the_size_of_batches(residual):
    # the loss of a batch is a mean: without its number of samples F would differ by 16
    sixteen, sixty_four = layers(residual, batches(16)), layers(residual, batches(64))
    for name, layer in sixteen.items():
        assert torch.allclose(layer.fisher, sixty_four[name].fisher, rtol=1e-10, atol=0)
        assert layer.order.tolist() == sixty_four[name].order.tolist()


def test_scoring_changes_nothing_of_the_model(residual):
    residual.train()
    residual.norm1.eval()
    cross_entropy(residual, batches(8)[0]).backward()
    before, grads = copy.deepcopy(residual), [p.grad.clone() for p in residual.parameters()]
    layers(residual, batches(16))
    assert all(
        torch.equal(a, b) for a, b in zip(residual.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert [m.training for m in residual.modules()] == [m.training for m in before.modules()]
    assert all(torch.equal(p.grad, grad) for p, grad in zip(residual.parameters(), grads, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in residual.modules())


def test_frozen_layers_are_scored_as_trained_ones_are(residual):
    trained = layers(residual, batches(16))
    residual.requires_grad_(False)
    for name, layer in layers(residual, batches(16)).items():
        assert torch.allclose(layer.fisher, trained[name].fisher, rtol=1e-10, atol=0)


def test_removal_with_rescaling_changes_the_loss_by_what_it_says():
    # f(z) linear in the gates, each input twice with residuals +1 and -1: then the slopes cancel, and the loss is
    # 1/2 + (z - 1)^T F (z - 1) / 2 exactly
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    x, sign = torch.cat([x, x]), torch.cat([torch.ones(64, 1), -torch.ones(64, 1)]).double()
    target = model(x).detach() + sign

    def loss_of(model, batch):
        return F.mse_loss(model(batch[0]), batch[1]) / 2

    for rescale in (True, False):
        data = list(zip(x.split(32), target.split(32), strict=True))
        layer = layers(model, data, loss_of, damping=1e-9, rescale=rescale)["0"]
        assert layer.fisher.trace() > 0.1
        costs = removal_order(layer.fisher, 1e-9, rescale)[1]
        for n in range(1, 5):
            keep = keep_all_but(6, *layer.order[:n].tolist())
            gates = rescaled_gates(layer.fisher, keep, 1e-9) if rescale else keep.double()
            other = copy.deepcopy(model)
            with torch.no_grad():
                other[0].weight *= gates[:, None]
                other[0].bias *= gates
                rise = loss_of(other, (x, target)) - 0.5
            assert rise.item() == pytest.approx(costs[:n].sum().item(), rel=1e-6, abs=1e-7)


def leaky(x):
    """Leaves no channel dead, and scales with its input as ReLU does."""
    return F.leaky_relu(x, 0.1)


class Twins(pl.LightningModule):
    """A residual net without training in which some channels are copies: of the stream, within the block, hidden."""

    def __init__(self, norm=True, copies=1):
        super().__init__()

        def make(channels):
            return nn.BatchNorm2d(channels, momentum=0.0) if norm else nn.Identity()

        self.stem, self.norm0 = nn.Conv2d(1, 6, 3, padding=1), make(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 12, 3, padding=1), make(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 6, 3, padding=1), make(6)
        self.hidden, self.fc = nn.Conv2d(6, 12, 1), nn.Linear(12, 3)
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                nn.init.normal_(module.bias, std=0.2)
        makes = {"stem": ["stem", "norm0", "conv2", "norm2"], "conv1": ["conv1", "norm1"], "hidden": ["hidden"]}
        reads = {"stem": ["conv1", "hidden"], "conv1": ["conv2"], "hidden": ["fc"]}
        with torch.no_grad():
            for group in makes:
                for twin in range(1, 1 + copies):
                    for layer in makes[group]:
                        for parameter in getattr(self, layer).parameters():
                            parameter[twin] = parameter[0]
                    for layer in reads[group]:
                        weight = getattr(self, layer).weight
                        weight[:, twin] = weight[:, 0]
        self.double()

    def forward(self, x):
        x = leaky(self.norm0(self.stem(x.double())))
        x = leaky(x + self.norm2(self.conv2(leaky(self.norm1(self.conv1(x))))))
        return self.fc(leaky(self.hidden(x)).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def pruned(fit, make_loader, model, *arguments, **settings):
    """The outputs in eval mode before and after a fit in which nothing is learned, and the callback."""
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before = model.eval()(x)
        method = Hierarchical(*arguments, schedule=OneShot(1, unit="step"), absorb=False, **settings)
        fit(method, model=model.train(), loader=make_loader(64, 16), max_epochs=1)
        return before, model.eval()(x), method


@pytest.mark.parametrize("apply", ["cut", "mask"])
@pytest.mark.parametrize("norm", [True, False], ids=["norms", "no norms"])
def test_the_twin_of_a_channel_that_goes_takes_its_place(fit, make_loader, norm, apply):
    torch.manual_seed(0)
    model = Twins(norm)
    before, after, method = pruned(
        fit, make_loader, model, Budget(27 / 30, of="units"), apply=apply, tolerance=1e-10, damping=1e-11
    )
    assert {name: kept for name, (kept, _) in method.plan.groups.items()} == {"stem": 5, "conv1": 11, "hidden": 11}
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-7)
    assert method.clipped == {}


def test_without_rescaling_there_is_a_gap(fit, make_loader):
    torch.manual_seed(0)
    keep = {"stem": 1.0, "conv1": 11 / 12, "hidden": 1.0}
    before, after, method = pruned(
        fit, make_loader, Twins(), Budget(29 / 30, of="units"), keep=keep, damping=1e-8, rescale=False
    )
    assert sum(kept for kept, _ in method.plan.groups.values()) == 29
    assert (after - before).abs().max() > 1e-4


@BEYOND
def test_gates_are_clipped_and_that_is_said(fit, make_loader):
    # four copies: the one that stays would need a gate of 4
    torch.manual_seed(0)
    keep = {"stem": 1.0, "hidden": 1.0, "conv1": 0.75}
    model = Twins(copies=3)
    scale = model.norm1.weight.detach().clone()
    _, _, method = pruned(fit, make_loader, model, Budget(27 / 30, of="units"), keep=keep, damping=1e-8)
    (survivor,) = [i for i in range(4) if i in method.plan.kept["norm1.weight"][0].tolist()]
    assert model.norm1.weight[0].item() == pytest.approx(3 * scale[survivor].item())
    assert method.clipped == {"conv1": 1}
    assert method.report.rows[0]["prune/clipped"] == 1


def test_maximum_rate_removes_what_is_redundant_and_no_more(fit, make_loader):
    torch.manual_seed(0)
    _, _, method = pruned(fit, make_loader, Twins(), max_rate=True)
    found = method.redundancy
    assert found.channels > 0
    assert {name: (kept, of) for name, (kept, of) in method.plan.groups.items()} == dict(found.ranks)
    assert method.report.params_kept == pytest.approx(1 - found.params)
    assert method.report.flops_kept == pytest.approx(1 - found.flops)
    assert method.report.rows[0]["prune/redundancy"] == found.channels
    assert method.report.rows[0]["prune/redundancy/conv1"] == found.rate("conv1") == 1 - found.ranks["conv1"][0] / 12


def test_maximum_rate_in_several_events_removes_a_part_at_each(fit, make_loader):
    class Spy(Hierarchical):
        def after_prune(self, keep):
            self.seen.append((self.redundancy, sum(int((~mask).sum()) for mask in keep.values())))
            super().after_prune(keep)

    torch.manual_seed(0)
    method = Spy(max_rate=True, schedule=Iterative(start=1, end=3, events=2, unit="step"))
    method.seen = []
    fit(method, model=Twins(), loader=make_loader(64, 16), max_epochs=1)
    (first, half), (second, rest) = method.seen
    assert half == round(sum(of - k for k, of in first.ranks.values()) / 2)
    assert rest == sum(of - k for k, of in second.ranks.values())
    assert sum(of for _, of in second.ranks.values()) == 30 - half


def test_within_the_redundancy_no_layer_loses_more_than_is_redundant(fit, make_loader):
    torch.manual_seed(0)
    _, _, method = pruned(fit, make_loader, Twins(), Budget(25 / 30, of="units"))
    kept = {name: kept for name, (kept, _) in method.plan.groups.items()}
    assert sum(kept.values()) == 25
    assert all(kept[name] >= k for name, (k, _) in method.redundancy.ranks.items())


def test_a_budget_beyond_the_redundancy_is_met_with_a_warning(fit, make_loader):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"more than the maximum redundancy of the network, 0\.\d+ of its channels"):
        _, _, method = pruned(fit, make_loader, Twins(), Budget(6 / 30, of="units"))
    assert sum(kept for kept, _ in method.plan.groups.values()) == 6
    assert all(method.plan.groups[name][0] <= k for name, (k, _) in method.redundancy.ranks.items())


@pytest.mark.parametrize("of", ["flops", "params", "units"])
def test_one_more_channel_of_any_layer_would_break_the_budget(residual, of):
    data = batches(16)
    graph = trace(residual, data[0][0])
    decided = plan(graph, "hierarchical", Budget(0.8, of=of), calibration=data, loss_fn=cross_entropy)
    counts = {name: kept for name, (kept, _) in decided.groups.items()}

    def measure(counts):
        masks = {name: torch.arange(graph.group(name).size) < n for name, n in counts.items()}
        cost = graph.cost(graph.plan(masks))
        return {"flops": cost.flops, "params": cost.params, "units": sum(counts.values())}[of]

    dense = measure({group.name: group.size for group in graph.groups})
    assert measure(counts) <= 0.8 * dense
    more = [name for name, n in counts.items() if n < graph.group(name).size]
    assert more
    assert all(measure({**counts, name: counts[name] + 1}) > 0.8 * dense for name in more)


@BEYOND
def test_channel_counts_are_multiples_where_asked(residual):
    data = batches(16)
    graph = trace(residual, data[0][0])
    settings = {"calibration": data, "loss_fn": cross_entropy}
    decided = plan(graph, "hierarchical", Budget(0.5, of="units"), round_to=4, min_channels=3, **settings)
    assert all(kept % 4 == 0 or kept == size for kept, size in decided.groups.values())


def test_rounding_does_not_go_beyond_what_is_redundant():
    # needed are 4 of 6, 10 of 12 and 10 of 12: of the last two no multiple of four can do with less than all
    torch.manual_seed(0)
    graph = trace(Twins(copies=2), torch.zeros(2, 1, 8, 8))
    settings = {"calibration": batches(16), "loss_fn": cross_entropy, "tolerance": 1e-10, "max_rate": True}
    decided = plan(graph, "hierarchical", None, round_to=4, **settings)
    assert {name: kept for name, (kept, _) in decided.groups.items()} == {"stem": 4, "conv1": 12, "hidden": 12}


def test_a_fraction_of_its_own_holds_for_a_group(residual):
    data = batches(16)
    graph = trace(residual, data[0][0])
    settings = {"calibration": data, "loss_fn": cross_entropy, "keep": {"conv1": 0.5}}
    decided = plan(graph, "hierarchical", Budget(0.75, of="units"), **settings)
    assert decided.groups["conv1"][0] == 6
    assert sum(kept for kept, _ in decided.groups.values()) == 22  # 0.75 of 30


def test_redundancy_is_a_result_of_its_own():
    torch.manual_seed(0)
    model = Twins(copies=2)
    before = copy.deepcopy(model.state_dict())
    found = redundancy(trace(model, torch.zeros(2, 1, 8, 8)), batches(16, 128), cross_entropy, tolerance=1e-10)
    assert found.ranks == {"stem": (4, 6), "conv1": (10, 12), "hidden": (10, 12)}
    assert found.channels == pytest.approx(6 / 30)
    assert found.rate("stem") == pytest.approx(1 / 3)
    smaller = copy.deepcopy(model)
    graph = trace(smaller, torch.zeros(2, 1, 8, 8))
    keep = {name: torch.arange(size) < k for name, (k, size) in found.ranks.items()}
    report = cut(smaller, graph.plan(keep), graph=graph)
    assert (found.flops, found.params) == pytest.approx((1 - report.flops_kept, 1 - report.params_kept))
    assert found.samples == 128
    assert found.unreliable == ()
    assert "| stem" in str(found)
    assert Redundancy.from_dict(found.to_dict()) == found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_few_samples_are_said():
    torch.manual_seed(0)
    graph = trace(Twins(), torch.zeros(2, 1, 8, 8))
    with pytest.warns(UserWarning, match=r"of 2 groups is unreliable \(conv1, hidden\): 24 samples, 48 wanted for 12"):
        found = redundancy(graph, batches(8, 24), cross_entropy)
    assert found.unreliable == ("conv1", "hidden")


@FEW
@BEYOND
def test_redundancy_is_kept_in_checkpoints(fit, save_each, tmp_path):
    first, second = Hierarchical(0.5), Hierarchical(0.5)
    fit([first, save_each()])
    fit(second, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2, seed=1)
    assert second.redundancy == first.redundancy
    assert second.clipped == first.clipped


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.fc = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, a, b):
        return self.fc(torch.tanh(self.left(a) + self.right(b)))


def test_two_inputs_share_the_gates_of_what_they_are_added_to():
    torch.manual_seed(0)
    model = TwoInputs().double()
    a, b, labels = torch.randn(64, 5).double(), torch.randn(64, 3).double(), torch.arange(64) % 3

    def loss_of(model, batch):
        return F.cross_entropy(model(batch[0], batch[1]), batch[2])

    method = Hierarchical(0.5, calibration=[(a, b, labels)], loss_fn=loss_of)
    method.scores_for(trace(model, (a[:1], b[:1])))
    gate = torch.ones(64, 8, dtype=torch.float64, requires_grad=True)
    out = model.fc(torch.tanh(gate * model.left(a) + gate * model.right(b)))
    (gradients,) = torch.autograd.grad(F.cross_entropy(out, labels, reduction="sum"), gate)
    assert torch.allclose(method._layers["left"].fisher, gradients.T @ gradients / 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)),
        lambda: nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8, affine=False)),
        lambda: nn.Sequential(nn.Unflatten(1, (8, 8)), nn.LSTM(8, 8, batch_first=True)),
    ],
    ids=["weight norm", "norm without a scale", "lstm"],
)
def test_where_a_gate_cannot_be_folded_nothing_is_rescaled(net, make):
    torch.manual_seed(0)

    def forward(self, x):
        x = self.first(x.flatten(1))
        x = x[0][:, -1] if isinstance(x, tuple) else x
        return self.fc(F.relu(self.after(torch.tanh(x))))

    model = net(forward, first=make(), after=nn.Linear(8, 8), fc=nn.Linear(8, 3)).double()
    data = batches(16)
    method = Hierarchical(0.5, calibration=data, loss_fn=cross_entropy)
    graph = trace(model, data[0][0])
    method.scores_for(graph)
    (name,) = [group.name for group in graph.groups if group.name.startswith("first")]
    assert method._layers["after"].rescale
    assert not method._layers[name].rescale
    assert method._layers[name].increases[0] * method._layers[name].fisher.trace().item() == pytest.approx(
        method._layers[name].fisher.diagonal().min().item() / 2
    )
    keep = {key: torch.arange(8) > 1 for key in (name, "after")}
    with method._event(None, model):
        factors = method.compensate(keep).factors
    assert set(factors) == {"after.weight", "after.bias"}


def test_a_layer_that_the_loss_does_not_know_is_named(net):
    model = net(
        lambda n, x: (n.fc(F.relu(n.used(x.flatten(1)))), n.end(F.relu(n.unused(x.flatten(1))))),
        used=nn.Linear(64, 8), fc=nn.Linear(8, 3), unused=nn.Linear(64, 8), end=nn.Linear(8, 3),
    ).double()  # fmt: skip
    with pytest.raises(NonFiniteScore, match=r"no gradient to score unused by: the loss .* or ignore= them"):
        layers(model, batches(16), lambda model, batch: F.cross_entropy(model(batch[0])[0], batch[1]))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((), {}, "wants a budget, or max_rate=True .* got budget=None and max_rate=False"),
        ((0.5,), {"max_rate": True}, "wants a budget, or max_rate=True .* got budget=0.5 and max_rate=True"),
        ((0.5,), {"scope": "global"}, "scope='global' has no meaning"),
        ((0.5,), {"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
        ((0.5,), {"damping": 0.0}, r"damping must be in \(0, 1\], got 0.0"),
        ((0.5,), {"samples": 0}, "samples must be an int of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        Hierarchical(*arguments, **settings)


def test_there_is_no_redundancy_before_the_first_event():
    with pytest.raises(RuntimeError, match="once its first event is done"):
        _ = Hierarchical(0.5).redundancy
