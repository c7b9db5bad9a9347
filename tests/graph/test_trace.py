import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_prune.errors import TraceError
from lightning_prune.graph.trace import output_tensors, record, samples, undisturbed
from lightning_prune.surgery import trace


@dataclass
class Output:
    logits: Tensor
    hidden: Any = None


def two_layers(net, forward=lambda n, x: n.b(n.a(x).relu()), **more):
    torch.manual_seed(0)
    return net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3), **more)


ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def test_what_the_model_lets_go_of_is_not_held_until_the_trace_ends(net):
    gone = []

    def forward(n, x):
        hidden = n.a(x)
        held = StorageWeakRef(hidden.untyped_storage())
        out = n.b(hidden.relu())
        del hidden
        gone.append(held.expired())
        return out

    assert [group.size for group in trace(two_layers(net, forward), ROWS).groups] == [6]
    assert all(gone)


# what is left behind


def everything(model):
    """All of a model, of its modules' modes and hooks, and of the random generators, to compare bit by bit."""
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict(keep_vars=True).items()},
        "identity": [id(p) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in model.modules()],
        "attributes": [
            {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))} for module in model.modules()
        ],
        "global hooks": [
            dict(nn.modules.module._global_forward_hooks),
            dict(nn.modules.module._global_forward_pre_hooks),
        ],
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool(np.all(a == b))


def disturbed_model(net):
    """Mixed modes, running statistics, dropout that draws random numbers, hooks, gradients, a frozen parameter."""
    torch.manual_seed(0)
    model = net(
        lambda n, x: n.b(n.drop(n.norm(n.a(x)).relu())),
        a=nn.Linear(5, 6), norm=nn.BatchNorm1d(6), drop=nn.Dropout(), b=nn.Linear(6, 3),
    )  # fmt: skip
    model.train()
    model.norm.eval()
    model.a.bias.requires_grad_(False)
    model.a.weight.grad = torch.ones(6, 5)
    model.seen = []
    model.b.register_forward_hook(lambda module, args, out: None)
    return model


def test_tracing_leaves_the_model_and_the_random_state_as_they_were(net):
    model = disturbed_model(net)
    before = everything(model)
    graph = trace(model, ROWS)
    assert same(before, everything(model))
    assert [group.name for group in graph.groups] == ["a"]


def test_a_forward_that_raises_leaves_everything_as_it_was_too(net):
    model = disturbed_model(net)
    model.b = nn.Linear(7, 3)  # after dropout and batch norm have run
    before = everything(model)
    with pytest.raises(TraceError, match="shapes cannot be multiplied"):
        trace(model, ROWS)
    assert same(before, everything(model))


def test_the_check_of_these_two_tests_sees_a_changed_bit(net):
    model = disturbed_model(net)
    before = everything(model)
    model.norm.num_batches_tracked += 1
    assert not same(before, everything(model))


def test_foreign_hooks_run_and_stay(net):
    model, seen = two_layers(net), []
    model.a.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    trace(model, ROWS)
    ran = len(seen)
    model(ROWS)
    assert ran >= 1
    assert len(seen) == ran + 1


def test_example_inputs_are_not_changed_and_need_no_gradient(net):
    x = ROWS.clone().requires_grad_()
    trace(two_layers(net, lambda n, x: n.b(n.a(x.mul_(1.0)).relu())), x)
    assert torch.equal(x, ROWS)
    assert x.grad is None


def test_undisturbed_puts_modes_back_module_by_module_when_the_body_raises():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[0].eval()

    def train_until_it_fails():
        with undisturbed(model):
            model.train()
            model(torch.randn(4, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_until_it_fails()
    assert [m.training for m in model.modules()] == [True, False, True]
    assert torch.equal(model[0].running_mean, torch.zeros(2))


# inputs


@pytest.mark.parametrize(
    "inputs", [(ROWS, ROWS + 1), {"x": ROWS, "y": ROWS + 1}, [ROWS, ROWS + 1]], ids=["tuple", "keywords", "list"]
)
def test_inputs_may_be_a_tuple_of_positional_or_a_dict_of_keyword_arguments(inputs, net, check_cut):
    forward = (
        (lambda n, pair: n.b(n.a(pair[0]) + n.c(pair[1])))
        if isinstance(inputs, list)
        else (lambda n, x, y: n.b(n.a(x) + n.c(y)))
    )
    graph = trace(two_layers(net, forward, c=nn.Linear(5, 6)), inputs)
    assert [(group.name, len(group.producers)) for group in graph.groups] == [("a", 2)]
    check_cut(graph)


def test_inputs_take_the_dtype_of_the_model_and_a_batch_of_one_is_enough_for_train_mode_norms(net, check_cut):
    model = two_layers(net, lambda n, x: n.b(n.norm(n.a(x))), norm=nn.BatchNorm1d(6)).double()
    graph = trace(model, ROWS[:1])  # a batch norm refuses a single row in train mode
    assert [group.size for group in graph.groups] == [6]
    check_cut(graph)


def test_samples_repeats_the_first_one_and_leaves_inputs_without_a_common_batch_alone():
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    several = samples({"x": x, "y": y}, 2)
    assert several["x"].tolist() == [[0, 1], [0, 1]]
    assert several["y"].tolist() == [0, 0]
    odd = (x, torch.arange(4))
    assert samples(odd, 2) is odd


def test_an_input_the_model_refuses_is_named_with_its_shape_the_mode_and_the_models_own_words(net):
    with pytest.raises(TraceError) as caught:
        trace(two_layers(net), torch.randn(2, 4))
    text = str(caught.value)
    assert "Net does not run on the example input with shapes [(2, 4)] in eval mode" in text
    assert "mat1 and mat2 shapes cannot be multiplied (1x4 and 5x6)" in text
    assert "example_input=" in text
    assert isinstance(caught.value.__cause__, RuntimeError)


# inputs and outputs of the model are frozen


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, h: (y, h),
        lambda y, h: {"logits": y, "hidden": [h]},
        lambda y, h: Output(y, h),
        lambda y, h: Output(y, {"deep": (h,)}),
    ],
    ids=["tuple", "dict", "dataclass", "nested"],
)
def test_every_tensor_in_an_output_freezes_its_channels(wrap, net, check_cut):
    def forward(n, x):
        hidden = n.a(x).relu()
        return wrap(n.b(n.c(hidden).relu()), hidden)

    graph = trace(two_layers(net, forward, c=nn.Linear(6, 6)), ROWS)
    assert [group.name for group in graph.groups] == ["c"]
    assert graph.frozen == {"a": "it is an output of the model", "b": "it is an output of the model"}
    check_cut(graph)


def test_input_channels_are_never_cut(net):
    graph = trace(two_layers(net), ROWS)
    assert [(m.name, m.dim) for m in graph.groups[0].members] == [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]


def test_output_tensors_opens_what_pytree_does_not():
    x, y = torch.zeros(1), torch.ones(2)
    found = output_tensors({"a": [Output(x, (y, "text", None))]})
    assert sorted(len(t) for t in found) == [1, 2]


# modes


def test_a_branch_that_only_trains_is_followed_but_not_counted(net, check_cut):
    def forward(n, x):
        h = n.a(x).relu()
        return (n.b(h), n.head(n.aux(h).relu())) if n.training else n.b(h)

    model = two_layers(net, forward, aux=nn.Linear(6, 4), head=nn.Linear(4, 3))
    graph = trace(model.eval(), ROWS)
    assert graph.has_training_branch
    assert {group.name: group.size for group in graph.groups} == {"a": 6, "aux": 4}
    assert {m.name for m in graph.group("a").members} == {"a.weight", "a.bias", "b.weight", "aux.weight"}
    assert graph.cost().flops == 5 * 6 + 6 * 3
    check_cut(graph)


def test_layers_that_only_run_in_eval_mode_are_followed_too(net, check_cut):
    def forward(n, x):
        h = n.a(x).relu()
        return n.b(h) if n.training else n.b(h) + n.top(n.extra(h))

    graph = trace(two_layers(net, forward, extra=nn.Linear(6, 7), top=nn.Linear(7, 3)), ROWS)
    assert {group.name: group.size for group in graph.groups} == {"a": 6, "extra": 7}
    check_cut(graph)


def test_parameters_that_nothing_reached_are_frozen_with_that_reason(net):
    graph = trace(two_layers(net, spare=nn.Linear(6, 6)), ROWS)
    assert graph.frozen["spare.weight"] == "the example input did not reach 'spare.weight'"
    assert [group.name for group in graph.groups] == ["a"]


def test_a_model_with_nothing_to_prune_has_no_groups_and_says_why():
    graph = trace(nn.Linear(5, 3), ROWS)
    assert graph.groups == ()
    assert graph.frozen == {"weight": "it is an output of the model"}
    assert graph.prunable_share == 0


# sharing


def test_a_parameter_used_twice_couples_what_both_uses_touch(net, check_cut):
    # v is (7, 6): it makes 7 channels from a's 6, and transposed it makes 6 from them again
    graph = trace(
        two_layers(net, lambda n, x: n.b(F.linear(F.linear(n.a(x), n.v).relu(), n.v.t())),
                   v=nn.Parameter(torch.randn(7, 6))),
        ROWS,
    )  # fmt: skip
    assert sorted(group.size for group in graph.groups) == [6, 7]
    six = next(group for group in graph.groups if group.size == 6)
    assert {(m.name, m.dim) for m in six.members} == {("a.weight", 0), ("a.bias", 0), ("v", 1), ("b.weight", 1)}
    check_cut(graph)


def test_a_module_called_twice_couples_its_input_with_its_output(net, check_cut):
    graph = trace(two_layers(net, lambda n, x: n.b(n.h(n.h(n.a(x)).relu())), h=nn.Linear(6, 6)), ROWS)
    assert [(group.name, group.size) for group in graph.groups] == [("a", 6)]
    assert {("h.weight", 0), ("h.weight", 1)} <= {(m.name, m.dim) for m in graph.groups[0].members}
    check_cut(graph)


def test_an_embedding_tied_to_the_output_layer_keeps_its_words_and_loses_its_width(net, check_cut):
    torch.manual_seed(0)
    embedding, out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    out.weight = embedding.weight
    model = net(lambda n, i: n.out(n.hidden(n.embedding(i)).relu()), embedding=embedding, hidden=nn.Linear(6, 6),
                out=out)  # fmt: skip
    graph = trace(model, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert [(group.name, group.size) for group in graph.groups] == [("embedding", 6)]
    cut = check_cut(graph)
    assert cut.out.weight is cut.embedding.weight
    assert cut.out.out_features == 9


def test_one_module_under_two_names_is_cut_once(net, check_cut):
    hidden = nn.Linear(6, 6)
    graph = trace(two_layers(net, lambda n, x: n.b(n.h(n.a(x)) + n.g(n.a(x))), h=hidden, g=hidden), ROWS)
    cut = check_cut(graph)
    assert cut.h is cut.g


# attention


def test_a_transformer_layer_loses_hidden_units_whole_heads_and_width(net, check_cut):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = net(lambda n, x: n.b(n.t(n.a(x)).mean(1)), a=nn.Linear(5, 8), t=layer, b=nn.Linear(8, 3))
    graph = trace(model, torch.randn(2, 4, 5))
    assert {group.name: group.size for group in graph.groups} == {"a": 8, "t.self_attn": 2, "t.linear1": 16}
    assert {group.name: group.exact for group in graph.groups} == {"a": False, "t.self_attn": True, "t.linear1": True}
    cut = check_cut(graph, exact=False)
    assert (cut.t.self_attn.num_heads, cut.t.self_attn.in_proj_weight.shape[0]) == (1, 3 * 4)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_a_recurrent_layer_loses_units_of_all_its_gates_layers_and_directions(kind, options, net, check_cut):
    torch.manual_seed(0)
    directions = 2 if options.get("bidirectional") else 1
    model = net(
        lambda n, x: n.b(n.c(n.r(n.a(x))[0]).relu()),
        a=nn.Linear(5, 6), r=kind(6, 7, batch_first=True, **options), c=nn.Linear(7 * directions, 8), b=nn.Linear(8, 3),
    )  # fmt: skip
    graph = trace(model, torch.randn(2, 4, 5))
    assert {group.name: group.size for group in graph.groups} == {"a": 6, "r": 7, "c": 8}
    cut = check_cut(graph)
    assert (cut.r.input_size, cut.r.hidden_size) == (cut.a.out_features, cut.c.in_features // directions)


def test_records_number_every_coordinate_once():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    records = record(model, torch.randn(1, 2, 2, 2))
    numbers = np.concatenate([np.arange(slot.offset, slot.offset + slot.size) for slot in records.slots])
    assert np.array_equal(np.sort(numbers), np.arange(records.size))
    assert {slot.name for slot in records.slots if slot.is_buffer} == {"1.running_mean", "1.running_var"}


def test_a_traced_model_can_still_be_copied_and_saved(net):
    model = two_layers(net)
    trace(model, ROWS)
    assert torch.equal(copy.deepcopy(model)(ROWS), model(ROWS))
