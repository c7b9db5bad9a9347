import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import surgery
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, UnsafeCut
from lightning_prune.surgery import applied, conform, cut, difference, settle, trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make():
    """3 -> conv (6) -> norm -> relu -> depthwise (6) -> conv (5) -> flattened 2x2 -> linear (3)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 5, 3, stride=3),
        nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def state_of(model, *optimizers):
    """Everything a failed cut could leave behind, bit by bit."""
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "attributes": {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (int, tuple))
        },
        "optimizers": [
            {(i, k): v.clone() if isinstance(v, torch.Tensor) else v for i, s in o.state_dict()["state"].items()
             for k, v in s.items()}
            for o in optimizers
        ],
    }  # fmt: skip


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def trained(model, optimizer):
    """One step, and the gradients of another."""
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()


FIRST = {"0": torch.tensor([True, False, True, True, False, True]), "4": torch.tensor([True, True, False, True, True])}


# what a cut does


def test_tensors_keep_what_the_plan_keeps_in_every_dimension():
    model = make()
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    report = cut(model, trace(model, IMAGES).plan(FIRST))
    rows, columns = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 3, 4])
    assert torch.equal(model[0].weight, dense["0.weight"][rows])
    assert torch.equal(model[1].running_var, dense["1.running_var"][rows])
    assert torch.equal(model[4].weight, dense["4.weight"][columns][:, rows])
    assert torch.equal(model[6].weight, dense["6.weight"].reshape(3, 5, 4)[:, columns].reshape(3, 16))
    assert report.removed["4.weight"] == {0: 1, 1: 2}
    assert report.groups == {"0": (4, 6), "4": (4, 5)}
    assert report.after.params == sum(p.numel() for p in model.parameters()) < report.before.params


def test_attributes_follow(wrong_attributes):
    model = make()
    cut(model, trace(model, IMAGES).plan(FIRST))
    assert wrong_attributes(model) == []
    assert (model[3].groups, model[3].in_channels, model[3].out_channels) == (4, 4, 4)
    assert (model[1].num_features, model[6].in_features) == (4, 16)


def test_parameters_stay_the_same_objects_with_their_hooks_and_flags():
    model = make()
    called = []
    model[0].weight.register_hook(lambda grad: called.append(grad.shape))
    model[0].register_forward_hook(lambda module, args, out: called.append("forward"))
    model[4].bias.requires_grad_(False)
    before = list(model.parameters())
    cut(model, trace(model, IMAGES).plan(FIRST))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert [p.requires_grad for p in model[4].parameters()] == [True, False]
    called.clear()
    model(IMAGES).sum().backward()
    assert called == ["forward", (4, 3, 3, 3)]


def test_gradients_follow_and_are_those_of_what_was_kept():
    model = make()
    model(IMAGES).sum().backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    cut(model, trace(model, IMAGES).plan(FIRST))
    rows, columns = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 3, 4])
    assert torch.equal(model[4].weight.grad, dense["4.weight"][columns][:, rows])
    assert torch.equal(model[6].bias.grad, dense["6.bias"])


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.Adam(p, 0.01, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: torch.optim.RMSprop(p, 0.01, centered=True), {"square_avg", "grad_avg"}),
    ],
    ids=["SGD", "Adam", "RMSprop"],
)
def test_optimizer_state_is_sliced_with_its_parameters_and_trains_on(optimizer, keys):
    model = make()
    optimizer = optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trained(model, optimizer)
    scheduler.step()
    weight = model[4].weight
    before = {key: optimizer.state[weight][key].clone() for key in keys}
    cut(model, trace(model, IMAGES).plan(FIRST), [optimizer])
    rows, columns = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 3, 4])
    for key in keys:
        assert torch.equal(optimizer.state[weight][key], before[key][columns][:, rows])
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == pytest.approx(0.001)
    trained(model, optimizer)
    assert torch.isfinite(model(IMAGES)).all()


def test_a_plan_that_keeps_everything_changes_nothing():
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    graph = trace(model, IMAGES)
    before, storages = state_of(model, optimizer), [p.data_ptr() for p in model.parameters()]
    cut(model, graph.plan({g.name: torch.ones(g.size, dtype=torch.bool) for g in graph.groups}), [optimizer])
    assert same(before, state_of(model, optimizer))
    assert storages == [p.data_ptr() for p in model.parameters()]


def test_two_cuts_one_after_the_other_equal_one():
    once, twice = make(), make()
    graph = trace(once, IMAGES)
    less = {"0": torch.tensor([True, False, False, True, False, False]), "4": FIRST["4"]}
    cut(once, graph.plan(less), verify="always")
    dense = trace(twice, IMAGES)
    cut(twice, dense.plan(FIRST), verify="always")
    cut(twice, dense.plan(less), verify="always")
    assert same(state_of(once), state_of(twice))
    assert applied(once) == applied(twice)


def test_two_cuts_joined_know_what_the_second_does_without_working_it_out():
    model = make()
    dense = trace(model, IMAGES)
    first = dense.plan({**FIRST, "4": torch.ones(5, dtype=torch.bool)})
    whole = {"0": torch.tensor([True, True, False, True]), "4": FIRST["4"]}
    both = surgery.compose(first, dense.after(first).plan(whole))
    worked_out = Plan.from_dict(both.to_dict())  # an equal plan that was not put together
    assert worked_out == both
    for earlier in (first, Plan(), Plan.from_dict(first.to_dict()), first):
        found, expected = both.relative_to(earlier), worked_out.relative_to(earlier)
        assert same(found, expected)
        found["0.weight"].clear()  # what is remembered is not what was handed out
    assert both.relative_to(first)["0.weight"][0].tolist() == [0, 1, 3]
    assert both.relative_to(Plan())["0.weight"][0].tolist() == [0, 2, 5]


def test_zeroing_is_in_place_and_put_back_bit_by_bit():
    model = make()
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0], model[0].weight[4, 0, 0, 0], model[4].weight[2, 1] = torch.nan, -0.0, torch.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = model[4].weight.data_ptr()
    operation = surgery._Operation(model, trace(make(), IMAGES).plan(FIRST), Plan())
    for nearly in (0.0, 1e-12):  # the second time without an undo between
        operation.zero(nearly)
        assert model[4].weight.data_ptr() == memory
        assert model[4].weight[2].unique().tolist() == [pytest.approx(nearly)]
        assert model[4].weight[:, [1, 4]].unique().tolist() == [pytest.approx(nearly)]
        assert torch.equal(model[0].weight[[0, 2, 3, 5]], before["0.weight"][[0, 2, 3, 5]])
    operation.undo()
    for name, tensor in model.state_dict().items():
        left = (
            (tensor, before[name])
            if not tensor.is_floating_point()
            else (t.view(torch.int32) for t in (tensor, before[name]))
        )
        assert torch.equal(*left)


def test_zeroing_leaves_others_in_the_same_memory_alone():
    # 0.weight goes, other shows the same numbers and does not
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False))
    model.other = nn.Parameter(model[0].weight.detach().view(-1))
    kept = torch.tensor([0, 2])
    plan = Plan(kept={"0.weight": {0: kept}, "1.weight": {1: kept}}, shapes={"0.weight": (4, 2), "1.weight": (2, 4)})
    before = model.other.detach().clone()
    operation = surgery._Operation(model, plan, Plan())
    operation.zero()
    assert not model[0].weight[[1, 3]].any()
    assert torch.equal(model.other, before)
    operation.undo()
    assert model[0].weight.data_ptr() == model.other.data_ptr()


def test_what_is_left_of_a_parameter_is_copied_once_to_be_tried_and_to_stay():
    model = make()
    operation = surgery._Operation(model, trace(model, IMAGES).plan(FIRST), Plan())
    operation.apply()
    tried = {name: p.data_ptr() for name, p in operation.parameters().items()}
    expected = copy.deepcopy(model.state_dict())
    operation.undo()
    operation.apply()
    assert {name: p.data_ptr() for name, p in operation.parameters().items()} == tried
    assert same(dict(model.state_dict()), dict(expected))


def test_a_plan_of_a_new_trace_of_the_cut_model_is_understood_as_one():
    once, twice = make(), make()
    cut(once, trace(once, IMAGES).plan({"0": torch.tensor([True, False, False, True, False, False])}))
    cut(twice, trace(twice, IMAGES).plan({"0": FIRST["0"]}))
    cut(twice, trace(twice, IMAGES).plan({"0": torch.tensor([True, False, True, False])}))  # 0 and 3 of the dense six
    assert same(state_of(once), state_of(twice))
    assert applied(twice).kept["0.weight"][0].tolist() == [0, 3]


# the proof


def wrong_plan(graph, name, indices, dim):
    """The plan of FIRST with other indices, as many of them, in one dimension of one tensor."""
    plan = graph.plan(FIRST)
    assert len(plan.kept[name][dim]) == len(indices)
    kept = {**plan.kept, name: {**plan.kept[name], dim: torch.tensor(indices)}}
    return Plan(kept=kept, buffers=plan.buffers, shapes=plan.shapes, attributes=plan.attributes, groups=plan.groups)


WRONG = [("4.weight", [0, 1, 3, 5], 1), ("1.weight", [0, 1, 2, 3], 0), ("3.bias", [1, 2, 3, 5], 0)]


@pytest.mark.parametrize(("name", "indices", "dim"), WRONG)
def test_a_plan_with_wrong_indices_in_one_place_is_refused_and_nothing_has_changed(name, indices, dim):
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    graph = trace(model, IMAGES)
    before, storages = state_of(model, optimizer), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(UnsafeCut, match="computes something else"):
        cut(model, wrong_plan(graph, name, indices, dim), [optimizer])
    assert same(before, state_of(model, optimizer))
    assert storages == [p.data_ptr() for p in model.parameters()]
    assert applied(model).is_empty
    cut(model, graph.plan(FIRST), [optimizer])  # and the right one can still be cut


@pytest.mark.parametrize(("name", "indices", "dim"), WRONG)
def test_layers_that_start_at_zero_or_one_do_not_hide_a_wrong_index(name, indices, dim):
    model = make()
    nn.init.zeros_(model[6].weight)
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[3].bias)
    graph = trace(model, IMAGES)
    before = state_of(model)
    assert float(model.eval()(IMAGES).detach().std(dim=0).max()) == 0  # whatever comes in
    model.train()
    with pytest.raises(UnsafeCut, match="computes something else"):
        cut(model, wrong_plan(graph, name, indices, dim))
    assert same(before, state_of(model))


def test_a_norm_across_channels_does_not_hide_a_wrong_index():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    graph = trace(model, torch.randn(2, 5))
    plan = graph.plan({"0": FIRST["0"]})
    wrong = Plan(
        kept={**plan.kept, "2.weight": {1: torch.tensor([0, 1, 2, 3])}}, shapes=plan.shapes, attributes=plan.attributes
    )
    with pytest.raises(UnsafeCut, match="computes something else"):
        cut(model, wrong)
    assert difference(model, plan, torch.randn(2, 5)) > 1e-3  # the user's figure is of the norm itself
    cut(model, plan)
    assert model[1].normalized_shape == (4,)


def test_a_cut_model_that_does_not_run_is_taken_back():
    model = make()
    plan = trace(model, IMAGES).plan(FIRST)
    kept = {name: dims for name, dims in plan.kept.items() if name != "6.weight"}
    before = state_of(model)
    with pytest.raises(UnsafeCut, match=r"the cut model does not run: RuntimeError: .*shapes cannot be multiplied"):
        cut(model, Plan(kept=kept, buffers=plan.buffers, shapes=plan.shapes, attributes=plan.attributes))
    assert same(before, state_of(model))


def test_a_model_that_only_breaks_in_train_mode_is_taken_back(net):
    def forward(n, x):
        h = n.a(x)
        return (n.b(h), n.aux(h)) if n.training else n.b(h)

    torch.manual_seed(0)
    model = net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 2), aux=nn.Linear(6, 2))
    plan = trace(model, torch.randn(2, 5)).plan({"a": FIRST["0"]})
    kept = {name: dims for name, dims in plan.kept.items() if name != "aux.weight"}
    before = state_of(model)
    with pytest.raises(UnsafeCut, match="does not run"):
        cut(model, Plan(kept=kept, shapes=plan.shapes, attributes=plan.attributes))
    assert same(before, state_of(model))


def test_an_interrupted_proof_takes_the_cut_back(net):
    stop = []

    def forward(n, x):
        if n.a.out_features < 6 and stop:
            raise KeyboardInterrupt
        return n.b(n.a(x))

    model = net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    graph = trace(model, torch.randn(2, 5))
    stop.append(True)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        cut(model, graph.plan({"a": FIRST["0"]}))
    assert same(before, state_of(model))


def test_verify_says_when_a_cut_is_proved():
    model = make()
    graph = trace(model, IMAGES)
    cut(model, wrong_plan(graph, *WRONG[0]), verify="never")
    assert model[4].weight.shape == (4, 4, 3, 3)
    model = make()
    graph = trace(model, IMAGES)
    cut(model, graph.plan({"0": FIRST["0"]}))
    with pytest.raises(UnsafeCut):
        cut(model, wrong_plan(graph, "4.bias", [0, 1, 2, 3], 0), verify="always", since=graph.plan({"0": FIRST["0"]}))
    with pytest.raises(ValueError, match="verify must be 'first', 'always' or 'never', got 'sometimes'"):
        cut(model, Plan(), verify="sometimes")


def test_proving_leaves_mode_statistics_and_random_state_alone():
    model = make()
    model[1].eval()
    graph = trace(model, IMAGES)
    modes = [m.training for m in model.modules()]
    statistics, state = model[1].running_mean.clone(), torch.get_rng_state()
    cut(model, graph.plan({"4": FIRST["4"]}))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(statistics, model[1].running_mean)
    assert torch.equal(state, torch.get_rng_state())


def test_a_cut_that_cannot_be_proved_for_want_of_an_input_says_so():
    model = make()
    plan = trace(copy.deepcopy(model), IMAGES).plan(FIRST)
    with pytest.warns(UserWarning, match="the cut is not proved"):
        cut(model, plan)
    assert model[0].out_channels == 4


def test_a_plan_of_another_model_or_of_other_shapes_is_refused_before_any_change():
    model = make()
    plan = trace(copy.deepcopy(model), IMAGES).plan(FIRST)
    other = nn.Sequential(nn.Linear(5, 6))
    with pytest.raises(ValueError, match=r"the plan names '0.bias'|'0.weight' has shape \(6, 5\)"):
        cut(other, plan, example_inputs=torch.randn(1, 5))
    cut(model, plan, example_inputs=IMAGES)
    with pytest.raises(ValueError, match="since"):
        cut(model, plan, since=Plan(), verify="never")


def test_an_optimizer_that_cannot_follow_refuses_before_any_change():
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters())
    graph = trace(model, IMAGES)
    before = state_of(model)
    with pytest.raises(ValueError, match="LBFGS"):
        cut(model, graph.plan(FIRST), [optimizer])
    assert same(before, state_of(model))


# a cut equals zeroing


def split_and_shuffled(n, x):
    x = F.glu(n.a(x), 1)
    x = torch.cat([n.b(x), F.softplus(n.c(x))], 1)
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return n.l(n.d(x).sigmoid().flatten(1))


@pytest.fixture(scope="module")
def graphs(net, cifar_net):
    torch.manual_seed(0)
    mixed = net(
        split_and_shuffled, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(4, 6, 1), c=nn.Conv2d(4, 6, 1),
        d=nn.Conv2d(12, 8, 3, stride=3, groups=2), l=nn.Linear(8 * 4, 2),
    )  # fmt: skip
    models = {"chain": make(), "residual": cifar_net(), "mixed": mixed}
    return {name: trace(model.double(), IMAGES) for name, model in models.items()}


@pytest.mark.parametrize("name", ["chain", "residual", "mixed"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_cut_network_computes_what_the_zeroed_one_computes(name, data, graphs):
    graph = graphs[name]
    keep = {
        group.name: torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size).filter(any))
        )
        for group in graph.groups
    }
    plan = graph.plan(keep)
    assert difference(graph.model, plan, graph.example_inputs) < 1e-9
    # the same by hand: zero every removed coordinate of every parameter, and compare with a copy that is cut
    zeroed, smaller = copy.deepcopy(graph.model).eval(), copy.deepcopy(graph.model).eval()
    parameters = dict(zeroed.named_parameters())
    for tensor, dims in plan.kept.items():
        for dim, index in dims.items():
            gone = [i for i in range(parameters[tensor].shape[dim]) if i not in index.tolist()]
            parameters[tensor].data.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)
    cut(smaller, plan, graph=graph, verify="never")
    torch.testing.assert_close(smaller(IMAGES.double()), zeroed(IMAGES.double()), rtol=1e-9, atol=1e-12)


def test_difference_leaves_the_model_as_it_was():
    model = make()
    plan = trace(model, IMAGES).plan(FIRST)
    before = state_of(model)
    assert difference(model, plan, IMAGES) < 1e-4
    assert same(before, state_of(model))


# shapes of a checkpoint


def pruned():
    model = make()
    cut(model, trace(model, IMAGES).plan(FIRST))
    return model


@pytest.mark.parametrize("with_plan", [True, False])
def test_a_dense_model_takes_the_shapes_of_a_pruned_state_and_loads_it(with_plan, wrong_attributes):
    small, model = pruned(), make()
    parameters = list(model.parameters())
    assert conform(model, small.state_dict(), applied(small) if with_plan else None) is model
    model.load_state_dict(small.state_dict())
    assert same(state_of(model), state_of(small))
    assert wrong_attributes(model) == []
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model.eval()(IMAGES), small.eval()(IMAGES))


def test_a_plan_alone_shrinks_to_the_values_it_keeps():
    small, model = pruned(), make()
    conform(model, applied(small))
    assert same(state_of(model), state_of(small))


def test_a_cut_model_grows_back_to_a_less_cut_state(wrong_attributes):
    model, dense = pruned(), make()
    conform(model, dense.state_dict())
    model.load_state_dict(dense.state_dict())
    assert same(state_of(model), state_of(dense))
    assert wrong_attributes(model) == []


def test_conforming_to_its_own_shapes_changes_nothing():
    model = make()
    before, storages = state_of(model), [p.data_ptr() for p in model.parameters()]
    conform(model, model.state_dict())
    assert same(before, state_of(model))
    assert storages == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 1, groups=4), nn.Conv2d(8, 2, 1)],
        lambda: [nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 32, 1, groups=8), nn.Conv2d(32, 2, 1)],
        lambda: [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 18, 1, groups=6), nn.Conv2d(18, 2, 1)],
        lambda: [nn.Conv2d(3, 12, 1), nn.GroupNorm(2, 12), nn.ConvTranspose2d(12, 8, 1, groups=2), nn.Conv2d(8, 2, 1)],
    ],
    ids=["wide groups", "transposed narrow groups", "depthwise with multiplier", "transposed wide groups"],
)
def test_attributes_of_grouped_layers_are_told_from_shapes_alone(layers, wrong_attributes, random_keep):
    torch.manual_seed(0)
    small = nn.Sequential(*layers(), nn.Flatten(), nn.Linear(128, 2))
    model = copy.deepcopy(small)
    graph = trace(small, IMAGES)
    cut(small, graph.plan(random_keep(graph, seed=1, share=0.3)))
    conform(model, small.state_dict())
    assert wrong_attributes(model) == wrong_attributes(small) == []
    assert [getattr(m, "groups", 1) for m in model] == [getattr(m, "groups", 1) for m in small]
    model.load_state_dict(small.state_dict())
    assert torch.equal(model(IMAGES), small(IMAGES))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda s: nn.Linear(3, 2).state_dict(), "it lacks"),
        (lambda s: {k: v for k, v in s.items() if k != "4.bias"}, r"it lacks \['4.bias'\]"),
        (lambda s: {**s, "0.weight": torch.zeros(4, 27)}, r"'0.weight' has shape \(6, .*\) in the model and \(4, 27\)"),
        (lambda s: {**s, "0.weight": torch.zeros(9, 3, 3, 3)}, "which pruning never makes"),
        (lambda s: {**s, "4.bias": torch.zeros(0)}, r"'4.bias' has shape \(5,\) in the model and \(0,\)"),
    ],
    ids=["another model", "a tensor missing", "another number of dimensions", "larger than dense", "nothing left"],
)
def test_a_state_of_another_architecture_is_refused_before_any_change(state, message):
    model = make()
    before = state_of(model)
    with pytest.raises(IncompatibleCheckpoint, match=message):
        conform(model, state(model.state_dict()))
    assert same(before, state_of(model))


def test_a_state_that_contradicts_its_plan_is_refused_before_any_change():
    small, model = pruned(), make()
    state = {**small.state_dict(), "4.bias": torch.zeros(2)}
    before = state_of(model)
    with pytest.raises(IncompatibleCheckpoint, match=r"'4.bias' has shape \(2,\) .* its plan says \(4,\)"):
        conform(model, state, applied(small))
    assert same(before, state_of(model))


def test_a_cut_keeps_the_memory_format_of_a_weight():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    cut(model, graph.plan({"0": torch.arange(8) % 2 == 0}))
    assert model[2].weight.shape == (4, 4, 3, 3)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[2].weight.is_contiguous()


def test_costs_before_a_second_cut_are_those_after_the_first():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    first = cut(model, graph.plan({"0": torch.arange(8) < 6}))
    second = cut(model, graph.plan({"0": torch.arange(8) < 4}))
    assert (second.before.flops, second.before.params) == (first.after.flops, first.after.params)


def test_an_error_too_small_for_single_precision_is_told_from_rounding_in_double(net):
    # the last bias is so large beside what the other layers give that a wrong column moves the output by less than 1e-4
    torch.manual_seed(0)
    model = net(lambda n, x: n.b(n.a(x).relu()), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model.b.bias.copy_(torch.tensor([1000.0, 900.0]))
    plan = trace(model, torch.randn(1, 3, 4, 4)).plan({"a": torch.arange(8) < 4})
    wrong = Plan(kept={**plan.kept, "b.weight": {1: torch.tensor([0, 1, 2, 4])}}, shapes=plan.shapes)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnsafeCut, match=r"relative difference .*e-05, allowed 1e-09"):
        cut(model, wrong)
    assert all(torch.equal(p, q) and p.dtype == torch.float32 for p, q in zip(model.parameters(), before, strict=True))
    cut(model, plan)


# what the code does with sizes


def scaled(net):
    torch.manual_seed(0)
    layers = {name: nn.Conv2d(3 if name == "a" else 8, 8, 1) for name in "abcd"}
    return net(lambda n, x: n.e(n.d(n.c(n.b(n.a(x)) / n.b.weight.shape[0]))), **layers, e=nn.Conv2d(8, 2, 1))


def called_exact(graph):
    """The graph, had the trace not seen that a size is computed with."""
    return replace(graph, groups=tuple(replace(g, exact=True, inexact_because="") for g in graph.groups))


def test_a_cut_that_changes_a_number_the_code_computes_with_is_warned_of_unless_the_graph_said_so(net):
    model = scaled(net)
    graph = called_exact(trace(model, IMAGES))
    plan = graph.plan({"b": torch.arange(8) < 4})
    said = replace(graph, groups=tuple(replace(g, exact=g.name != "b") for g in graph.groups))
    cut(copy.deepcopy(model), plan, example_inputs=IMAGES, graph=said)
    cut(copy.deepcopy(model), graph.plan({"c": torch.arange(8) < 4}), example_inputs=IMAGES, graph=graph)
    with pytest.warns(UserWarning, match="'div' computes with 4, and with 8 before"):
        cut(model, plan, graph=graph)
    assert model.b.out_channels == 4


def test_settling_marks_the_one_group_whose_size_is_computed_with(net):
    graph = called_exact(trace(scaled(net), IMAGES))
    settled = settle(graph, "abcd")
    assert [(g.name, g.exact) for g in settled.groups] == [("a", True), ("b", False), ("c", True), ("d", True)]
    assert "'div' computes with 4, and with 8 before" in settled.group("b").inexact_because


# heads of attention


TOKENS = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


def attention(net):
    """Four heads two wide."""
    torch.manual_seed(0)
    return net(lambda n, x: n.attn(x, x, x)[0], attn=nn.MultiheadAttention(8, 4, batch_first=True))


def without_head(*heads):
    gone = [2 * h + i for h in heads for i in range(2)]
    kept = torch.tensor([i for i in range(8) if i not in gone])
    rows = torch.cat([kept, kept + 8, kept + 16])
    return Plan(
        kept={"attn.in_proj_weight": {0: rows}, "attn.in_proj_bias": {0: rows}, "attn.out_proj.weight": {1: kept}},
        shapes={"attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,), "attn.out_proj.weight": (8, 8)},
        attributes={"attn": {"num_heads": 4 - len(heads)}, "attn.out_proj": {"in_features": 8 - len(gone)}},
    )


def test_heads_go_by_a_stand_in_which_computes_what_the_module_does_with_them_at_zero(net):
    model = attention(net)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.attn.out_proj.weight[:, 2:4] = 0
    cut(model, without_head(1), example_inputs=TOKENS)
    assert (model.attn.num_heads, model.attn.out_proj.in_features) == (3, 6)
    assert model.attn.in_proj_weight.shape == (18, 8)
    torch.testing.assert_close(model(TOKENS), dense(TOKENS))
    before = model(TOKENS)
    cut(model, without_head(1, 3), example_inputs=TOKENS, verify="always")  # a stand-in already
    assert (model.attn.num_heads, model(TOKENS).shape) == (2, before.shape)


def test_a_refused_cut_of_heads_leaves_the_module_of_its_own_class(net):
    model = attention(net)
    before = state_of(model), set(vars(model.attn))
    right = without_head(1)
    wrong = Plan(
        kept={**right.kept, "attn.out_proj.weight": {1: torch.tensor([0, 1, 2, 3, 4, 5])}},
        shapes=right.shapes, attributes=right.attributes,
    )  # fmt: skip
    with pytest.raises(UnsafeCut, match="computes something else"):
        cut(model, wrong, example_inputs=TOKENS)
    assert type(model.attn) is nn.MultiheadAttention
    assert same(before[0], state_of(model))
    assert before[1] == set(vars(model.attn))


def test_an_attribute_that_came_with_a_refused_cut_is_gone_with_it():
    model = make()
    plan = trace(model, IMAGES).plan(FIRST)
    kept = {name: dims for name, dims in plan.kept.items() if name != "6.weight"}
    attributes = {**plan.attributes, "2": {"width": 4}}
    with pytest.raises(UnsafeCut):
        cut(model, Plan(kept=kept, buffers=plan.buffers, shapes=plan.shapes, attributes=attributes))
    assert not hasattr(model[2], "width")


def test_a_dense_attention_takes_the_heads_of_a_plan_and_grows_back(net):
    small, model = attention(net), attention(net)
    dense, names = copy.deepcopy(model), set(vars(model.attn))
    cut(small, without_head(1), example_inputs=TOKENS)
    conform(model, small.state_dict(), applied(small))
    model.load_state_dict(small.state_dict())
    torch.testing.assert_close(model(TOKENS), small(TOKENS), rtol=0, atol=0)
    for grown in (model, small):
        conform(grown, dense.state_dict())
        grown.load_state_dict(dense.state_dict())
        assert type(grown.attn) is nn.MultiheadAttention
        assert (grown.attn.num_heads, set(vars(grown.attn))) == (4, names)
        torch.testing.assert_close(grown(TOKENS), dense(TOKENS), rtol=0, atol=0)


def test_attributes_of_a_module_that_is_not_there_are_refused_before_any_change():
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match="the plan names attributes of 'layer9', which Sequential does not have"):
        cut(model, Plan(attributes={"layer9": {"width": 3}}), verify="never")
    assert same(before, state_of(model))


@pytest.mark.parametrize("piece", [1, 20, 2**18])
@pytest.mark.parametrize("seed", range(8))
def test_slices_are_those_of_one_index_after_the_other_in_any_layout(seed, piece, monkeypatch):
    monkeypatch.setattr(surgery, "_IN_CACHE", piece)
    random = torch.Generator().manual_seed(seed)
    for ndim in (1, 2, 3, 4):
        shape = [(1, 2, 6, 12)[i] for i in torch.randint(4, (ndim,), generator=random).tolist()]
        tensor = torch.randn(shape, generator=random)
        for layout in (tensor, tensor.transpose(0, -1), tensor.flip(0)):
            kept, expected = {}, layout
            for dim, size in enumerate(layout.shape):
                block = 3 if size % 3 == 0 and seed % 2 else 1  # whole blocks of three, or anything
                chosen = torch.rand(size // block, generator=random) < 0.6
                chosen[int(torch.randint(size // block, (), generator=random))] = True
                if dim % 2 == seed % 3 % 2 or ndim == 1:
                    kept[dim] = chosen.repeat_interleave(block).nonzero().squeeze(1)
                    expected = expected.index_select(dim, kept[dim])
            assert torch.equal(surgery._select(layout, kept), expected)


@pytest.mark.parametrize("piece", [20, 2**18])
def test_slices_keep_the_memory_format(piece, monkeypatch):
    monkeypatch.setattr(surgery, "_IN_CACHE", piece)
    tensor = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    last = tensor.to(memory_format=torch.channels_last)
    new = surgery._select(last, {0: torch.tensor([0, 2, 3]), 1: torch.tensor([0, 2])})
    assert torch.equal(new, tensor[[0, 2, 3]][:, [0, 2]])
    assert new.is_contiguous(memory_format=torch.channels_last)
    assert not new.is_contiguous()
