import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import find_dead, remove_dead, trace
from lightning_prune.dead import silent_constants, weaker_half, without
from tests.conftest import Net


def bits(*rows):
    return torch.tensor(rows).bool()


def zeroed(weight, *rows):
    with torch.no_grad():
        for row in rows:
            weight[row] = 0


def mlp(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def masks_of(model):
    return {name: p != 0 for name, p in model.named_parameters() if p.ndim > 1}


def test_unit_without_inputs_is_silent_and_one_without_outputs_unread():
    masks = {"0.weight": bits([1, 1], [0, 0], [1, 1]), "2.weight": bits([1, 1, 0])}
    dead = find_dead(trace(mlp(2, 3, 1), torch.randn(1, 2)), masks)
    assert dead.silent["0"].tolist() == [False, True, False]
    assert dead.unread["0"].tolist() == [False, False, True]
    assert len(dead) == 2


def test_units_die_one_after_the_other_in_both_directions():
    model = mlp(2, 3, 3, 3, 1)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1}
    masks["0.weight"][0] = False  # unit 0 of the first layer is silent ...
    masks["2.weight"][0, 1:] = False  # ... and all that unit 0 of the second hears
    masks["6.weight"][0, 2] = False  # unit 2 of the third layer is unread ...
    masks["4.weight"][:2, 2] = False  # ... and all that hears unit 2 of the second
    dead = find_dead(trace(model, torch.randn(1, 2)), masks)
    assert [dead.silent[name].tolist() for name in "024"] == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert [dead.unread[name].tolist() for name in "024"] == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]
    left = without(masks, trace(model, torch.randn(1, 2)), dead)
    assert not left["2.weight"][0].any()
    assert not left["2.weight"][:, 0].any()
    assert not left["4.weight"][:, [0, 2]].any()
    assert bool(left["4.weight"][:2, 1].all())


def test_unit_of_a_residual_stream_is_dead_only_where_all_producers_and_all_readers_are(cifar_net):
    model = cifar_net()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1}
    stream = next(group for group in graph.groups if len(group.producers) > 1)
    places = {(m.name, m.dim): m.indices[0] for m in stream.members}  # of its unit 0
    first, *others = [p.weight for p in stream.producers]
    masks[first][places[first, 0]] = False
    assert len(find_dead(graph, masks)) == 0
    for name in others:
        masks[name][places[name, 0]] = False
    assert find_dead(graph, masks).silent[stream.name].tolist() == [True, False, False, False]
    for reader in stream.consumers:
        masks[reader.weight].index_fill_(1, places[reader.weight, 1], False)
    dead = find_dead(graph, masks)
    assert dead.unread[stream.name].tolist() == [True, False, False, False]
    assert not dead.silent[stream.name].any()


def test_depthwise_filter_that_is_gone_silences_its_unit():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 1, 1))
    graph = trace(model, torch.randn(1, 2, 5, 5))
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1}
    masks["1.weight"][1] = False
    dead = find_dead(graph, masks)
    assert dead.silent["0"].tolist() == [False, True, False]
    left = without(masks, graph, dead)
    assert not left["0.weight"][1].any()
    assert not left["3.weight"][:, 1].any()


def test_group_keeps_one_unit_that_has_weights():
    model = mlp(2, 3, 1)
    masks = {"0.weight": bits([0, 0], [1, 1], [0, 0]), "2.weight": bits([0, 0, 0])}
    dead = find_dead(trace(model, torch.randn(1, 2)), masks)
    assert dead.of("0").tolist() == [True, False, True]
    assert dead.last["0"].tolist() == [False, True, False]


def test_weight_that_is_not_masked_keeps_its_units_alive():
    masks = {"0.weight": bits([1, 1], [0, 0], [1, 1])}
    dead = find_dead(trace(mlp(2, 3, 1), torch.randn(1, 2)), masks)
    assert dead.silent["0"].tolist() == [False, True, False]
    assert len(find_dead(trace(mlp(2, 3, 1), torch.randn(1, 2)), {"2.weight": bits([1, 1, 1])})) == 0


def test_search_goes_on_from_what_is_known():
    graph = trace(mlp(2, 3, 1), torch.randn(1, 2))
    silent = find_dead(graph, {"0.weight": bits([1, 1], [0, 0], [1, 1]), "2.weight": bits([1, 1, 1])})
    # unit 1 has lost its reader by now as well: it stays silent, as what it said was heard when it died
    more = find_dead(graph, {"0.weight": bits([1, 1], [0, 0], [0, 0]), "2.weight": bits([1, 0, 1])}, known=silent)
    assert more.silent["0"].tolist() == [False, True, True]
    assert not more.unread["0"].any()
    assert silent.silent["0"].tolist() == [False, True, False]


def test_weaker_half_of_the_new_units_is_by_their_best_weights():
    model = mlp(2, 5, 1)
    graph = trace(model, torch.randn(1, 2))
    known = find_dead(graph, {"0.weight": bits([1, 1], [0, 0], [1, 1], [1, 1], [1, 1])})
    dead = find_dead(graph, {"0.weight": bits([0, 0], [0, 0], [0, 0], [0, 0], [1, 1])}, known=known)
    scores = {
        "0.weight": torch.tensor([[5.0, 1.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0], [9.0, 9.0]]),
        "2.weight": torch.tensor([[1.0, 0.0, 3.0, 4.0, 9.0]]),
    }
    half = weaker_half(graph, dead, known, scores)  # best of the new ones: 5, 3, 4
    assert half.silent["0"].tolist() == [False, True, True, False, False]
    last = weaker_half(graph, half, known, scores)
    assert last.silent["0"].tolist() == known.silent["0"].tolist()


def test_constant_of_a_silent_unit_goes_to_the_next_bias():
    model = mlp(2, 3, 2)
    with torch.no_grad():
        model[0].bias[1] = 0.3
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1}
    masks["0.weight"][1] = False
    graph = trace(model, torch.randn(4, 2))
    before = copy.deepcopy(model.state_dict())
    found, stuck = silent_constants(model, graph, find_dead(graph, masks), masks)
    assert stuck == {}
    # b2 += w * relu(0.3)
    torch.testing.assert_close(found.shifts["2.bias"].float(), before["2.weight"][:, 1] * 0.3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_constants_run_through_chains_of_silent_units():
    model = mlp(2, 3, 3, 1)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1}
    with torch.no_grad():
        model[0].bias[0], model[2].bias[0] = 0.5, 0.25
        model[2].weight[0, 0] = 2.0
    masks["0.weight"][0] = False
    masks["2.weight"][0, 1:] = False  # hears nothing but unit 0: says relu(0.25 + 2 * 0.5) = 1.25
    graph = trace(model, torch.randn(4, 2))
    found, _ = silent_constants(model, graph, find_dead(graph, masks), masks)
    torch.testing.assert_close(found.shifts["4.bias"].float(), model[4].weight[:, 0].detach() * 1.25)


def test_unit_that_says_something_else_at_each_step_is_stuck():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.b(F.relu(self.a(x) * torch.arange(4.0, device=x.device)[:, None]))

    model = Steps()
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1}
    masks["a.weight"][1] = False
    with torch.no_grad():
        model.a.bias[1] = 1.0
    graph = trace(model, torch.randn(2, 4, 2))
    dead = find_dead(graph, masks)
    assert dead.silent["a"].tolist() == [False, True, False]
    assert silent_constants(model, graph, dead, masks)[1]["a"].tolist() == [False, True, False]
    assert len(find_dead(graph, masks, spared={"a": dead.silent["a"]})) == 0


def test_unit_whose_reader_has_no_bias_is_stuck_unless_it_says_zero():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
    masks = {"0.weight": bits([1, 1], [0, 0], [0, 0]), "2.weight": bits([1, 1, 1])}
    with torch.no_grad():
        model[0].bias[1], model[0].bias[2] = 0.3, -0.3
    graph = trace(model, torch.randn(4, 2))
    _, stuck = silent_constants(model, graph, find_dead(graph, masks), masks)
    assert stuck["0"].tolist() == [False, True, False]


def test_dead_units_are_cut_out_and_the_outputs_stay():
    model = mlp(4, 6, 5, 3)
    zeroed(model[0].weight, 1, 4)
    with torch.no_grad():
        model[0].bias[1], model[0].bias[4] = 0.3, 0.7
        model[4].weight[:, 2] = 0  # unread
    x = torch.randn(16, 4)
    before = model(x)
    done = remove_dead(model, torch.randn(4, 4))
    assert done.units == {"0": 2, "2": 1}
    assert done.left == {}
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (4, 4, 4)
    assert float((model(x) - before).detach().abs().max()) < 1e-6
    assert done.report.params_kept < 1
    assert "|       2 |" in str(done)


def test_convolutions_with_norms_are_cut_as_far_as_they_compute_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)
    ).eval()
    zeroed(model[0].weight, 0, 1, 2)
    with torch.no_grad():
        model[1].bias[:3] = torch.tensor([-1.0, 0.5, -2.0])  # units 0 and 2 say 0; unit 1 0.5, but not at the rim
    x = torch.randn(3, 2, 6, 6)
    before = model(x)
    done = remove_dead(model, x)
    assert (done.units, done.left) == ({"0": 2}, {"0": 1})
    assert float((model(x) - before).detach().abs().max()) < 1e-6


def test_difference_that_single_precision_hides_is_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    zeroed(model[0].weight, 1)
    with torch.no_grad():
        model[0].bias[1] = 1e-6  # what is missing of it at the rim is 1e-6 of the output
    done = remove_dead(model, torch.randn(2, 2, 8, 8))
    assert (done.units, done.left) == ({}, {"0": 1})
    assert "| 0     |       0 |    1 |" in str(done)


def test_constant_goes_where_nothing_pads_and_into_the_running_mean_of_a_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    ).eval()
    zeroed(model[0].weight, 2)
    with torch.no_grad():
        model[0].bias[2] = 0.8
    x = torch.randn(3, 2, 8, 8)
    before, mean = model(x), model[3].running_mean.clone()
    assert remove_dead(model, x).units == {"0": 1}
    assert not torch.equal(model[3].running_mean, mean)
    assert float((model(x) - before).detach().abs().max()) < 1e-6


def test_residual_network_computes_the_same_without_its_dead_units(cifar_net):
    model = cifar_net().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.rand_like(parameter) < 0.2)
        zeroed(model.layer1.conv1.weight, 0, 3)
        model.layer2.conv2.weight[:, 5] = 0
    x = torch.randn(4, 3, 8, 8)
    before = model(x)
    done = remove_dead(model, x)
    assert sum(done.units.values()) > 0
    assert done.units["layer2.conv1"] >= 1
    assert float((model(x) - before).detach().abs().max()) < 1e-5 * float(before.detach().abs().max())


def test_optimizer_follows():
    model = mlp(4, 6, 3)
    zeroed(model[0].weight, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    zeroed(model[0].weight, 1)
    remove_dead(model, torch.randn(4, 4), [optimizer])
    assert optimizer.state[model[0].weight]["momentum_buffer"].shape == (5, 4)


def test_without_dead_units_nothing_happens_and_it_says_so():
    model = mlp(4, 6, 3)
    before = copy.deepcopy(model.state_dict())
    done = remove_dead(model, torch.randn(4, 4))
    assert not done
    assert str(done) == "No unit is dead: each has inputs and outputs. Nothing was removed."
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert done.report.params_kept == 1


def test_mode_and_values_of_what_stays_are_left_alone():
    model = mlp(4, 6, 3).train()
    zeroed(model[0].weight, 1)
    kept = model[0].weight.detach()[[0, 2, 3, 4, 5]].clone()
    remove_dead(model, torch.randn(4, 4))
    assert model.training
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, kept)


def test_model_that_insists_on_its_precision_is_looked_at_in_it():
    model = Net(lambda n, x: n.b(F.relu(n.a(x.float())).float()), a=nn.Linear(2, 3), b=nn.Linear(3, 1))
    zeroed(model.a.weight, 1)
    with torch.no_grad():
        model.a.bias[1] = 0.3
    x = torch.randn(8, 2)
    before = model(x)
    assert remove_dead(model, x).units == {"a": 1}
    assert float((model(x) - before).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_random_masks_leave_the_same_function(seed):
    model = mlp(5, 8, 8, 8, 2, seed=seed)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.15)
                layer.bias.uniform_(-1, 1)
        model[6].weight[:, 0] = 1.0
    x = torch.randn(16, 5)
    before = model(x)
    done = remove_dead(model, x)
    assert sum(done.units.values()) > 3
    assert float((model(x) - before).detach().abs().max()) < 1e-6
    again = find_dead(trace(model, x), masks_of(model))
    assert len(again) == 0
