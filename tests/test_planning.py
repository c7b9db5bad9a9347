import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune import Budget, Plan, count, cut, plan, trace
from lightning_prune.errors import NothingToPrune, UnmeetableBudget
from lightning_prune.methods import find

X = torch.zeros(1, 3, 8, 8)


def test_plan_meets_its_budget_and_changes_nothing(cifar_net):
    model = cifar_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model, X)
    found = plan(graph, "l1_filter", 0.5)
    assert isinstance(found, Plan)
    assert 0.35 < graph.cost(found).flops / graph.cost().flops <= 0.5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    dense = count(model, X).flops
    cut(model, found)
    assert count(model, X).flops == graph.cost(found).flops <= 0.5 * dense


@pytest.mark.parametrize("name", ["l1_filter", "L1Filter", "l1filter", "L1_FILTER", "l1-filter"])
def test_methods_go_by_class_or_file_name(name):
    assert find(name) is lightning_prune.L1Filter


def test_file_with_two_classes_is_told_apart_by_class():
    assert find("random_channels") is lightning_prune.RandomChannels
    assert find("RandomWeights") is lightning_prune.RandomWeights


def test_unknown_method_lists_what_there_is(cifar_net):
    with pytest.raises(ValueError, match=r"no method 'l2_filter'; there are .*L1Filter"):
        plan(trace(cifar_net(), X), "l2_filter")


def test_method_that_needs_gradients_is_refused(cifar_net):
    with pytest.raises(ValueError, match="TaylorWeight needs gradients of training; add it to a Trainer"):
        plan(trace(cifar_net(), X), "taylor_weight")


def test_weight_method_is_refused(cifar_net):
    with pytest.raises(ValueError, match="Magnitude needs a training loop to hold its masks"):
        plan(trace(cifar_net(), X), "magnitude")


def test_arguments_reach_the_method(cifar_net):
    graph = trace(cifar_net(), X)
    found = plan(graph, "l1_filter", Budget(0.7, of="units"), ignore=["layer1"], min_channels=2)
    assert not any(name.startswith("layer1") for name in found.groups)
    with pytest.raises(TypeError, match="unexpected keyword argument 'keeep'"):
        plan(graph, "l1_filter", 0.5, keeep=3)


def test_random_plan_is_the_same_twice(cifar_net):
    graph = trace(cifar_net(), X)
    assert plan(graph, "random_channels", 0.5) == plan(graph, "RandomChannels", 0.5)


def test_nothing_to_prune_says_why():
    graph = trace(nn.Linear(4, 2), torch.zeros(1, 4))
    with pytest.raises(NothingToPrune, match="no channel of Linear may go"):
        plan(graph, "l1_filter")


def test_budget_out_of_reach_says_what_can_be_reached(cifar_net):
    with pytest.raises(UnmeetableBudget, match=r"0\.001 of the flops cannot be met.*0\.\d+ are left"):
        plan(trace(cifar_net(), X), "l1_filter", 0.001)


def test_budget_may_be_a_mapping(cifar_net):
    graph = trace(cifar_net(), X)
    assert plan(graph, "l1_filter", {"keep": 0.5, "of": "params"}) == plan(graph, "l1_filter", Budget(0.5, of="params"))
