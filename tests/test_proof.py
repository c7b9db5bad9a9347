import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_prune import proof
from lightning_prune.decision import Plan
from lightning_prune.errors import UnsafeCut
from lightning_prune.proof import difference, prove, with_noise
from lightning_prune.surgery import _Operation, cut

KEPT = torch.tensor([0, 2, 3, 5])


def layers(net, forward, **more):
    """5 -> a (6) -> whatever ``forward`` puts between -> b (3); and a cut of channels 1 and 4."""
    torch.manual_seed(0)
    return net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3), **more)


def plan(columns=KEPT, rows=KEPT, **attributes):
    return Plan(
        kept={"a.weight": {0: rows}, "a.bias": {0: KEPT}, "b.weight": {1: columns}},
        shapes={"a.weight": (6, 5), "a.bias": (6,), "b.weight": (3, 6)},
        attributes=attributes,
    )


WRONG = [plan(columns=torch.tensor([0, 1, 3, 5])), plan(rows=torch.tensor([0, 1, 3, 5]))]
INPUT = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def hard(x):
    return F.hardtanh(x, -0.2, 0.2)


def boxes(n, x):
    """Keeps the tokens whose score is not near that of a better one, as a detector does with its boxes."""
    tokens = n.a(x[:, None] * torch.linspace(0.5, 2, 8, dtype=x.dtype)[:, None])[0]
    scores = tokens.sum(1).sigmoid()
    corners = torch.stack([scores, scores, scores + 0.3, scores + 0.3], 1)
    keep = torchvision.ops.nms(corners, scores, 0.3)
    return n.b(tokens[keep][:2])


def token(n, x):
    tokens = n.a(x[:, None] * torch.tensor([1, -1, 2], dtype=x.dtype)[:, None])
    return n.b(tokens[:, tokens.sum(2)[0].argmax()])


BETWEEN = {
    "layer norm": lambda n, x: n.b(F.layer_norm(n.a(x), (n.a.weight.shape[0],))),
    "rms norm by hand": lambda n, x: n.b(rms(n.a(x))),
    "softmax over channels": lambda n, x: n.b(n.a(x).softmax(1)),
    "width": lambda n, x: n.b(n.a(x) / n.a.weight.shape[0]),
    "centred": lambda n, x: n.b(hard(n.a(x) - n.a(x).mean(1, keepdim=True))),
    "token chosen": token,
    "boxes": boxes,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_right_cut_is_proved_and_a_wrong_one_is_not(name, net):
    model = layers(net, BETWEEN[name])
    for wrong in WRONG:
        with pytest.raises(UnsafeCut, match="computes something else"):
            prove(_Operation(model, wrong, Plan()), INPUT)
        assert model.a.weight.shape == (6, 5)
    seen = prove(_Operation(model, plan(), Plan()), INPUT)
    assert model.a.weight.shape == (4, 5)
    assert seen.worst < 5e-6
    assert [text.split(" (")[0] for text in seen.inexact] == (
        ["'div' computes with 4, and with 6 before"] if name == "width" else []
    )


def test_a_wrong_cut_that_only_moves_what_is_chosen_by_is_seen(net):
    model = layers(net, lambda n, x: x + 0 * n.b(n.a(x)).argmax(1, keepdim=True).to(x.dtype))  # x, whatever is chosen
    for wrong in WRONG:
        with pytest.raises(UnsafeCut, match="in what 'argmax' in the model chooses by"):
            prove(_Operation(model, wrong, Plan()), INPUT)
    assert prove(_Operation(model, plan(), Plan()), INPUT).worst < 5e-6


def test_a_network_that_is_dead_behind_is_compared_before(net):
    model = layers(net, lambda n, x: n.b((n.a(x) - 100).relu()))
    with pytest.raises(UnsafeCut, match="in the length of what a computes"):
        prove(_Operation(model, WRONG[1], Plan()), INPUT)
    prove(_Operation(model, plan(), Plan()), INPUT)


def test_an_input_of_zeros_does_not_hide_a_wrong_index(net):
    model = layers(net, lambda n, x: n.b(n.a(x)))
    wrong = WRONG[1]  # in rows of the first weight, which an input of zeros multiplies away
    with pytest.raises(UnsafeCut, match="computes something else"):
        prove(_Operation(model, wrong, Plan()), torch.zeros(1, 5))


def test_noise_is_added_to_what_is_constant_alone():
    varied, flag, count = torch.tensor([1.0, 2.0]), torch.ones(3, dtype=torch.bool), torch.tensor([7.0])
    out = with_noise((torch.zeros(2, 3), {"a": varied, "b": flag, "c": count}))
    assert out[0].unique().numel() == 6
    assert out[1]["a"] is varied
    assert out[1]["b"] is flag
    assert out[1]["c"] is count


def test_an_input_that_has_to_be_constant_stays_so(net):
    def forward(n, x, mask):
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("a mask is 0 or 1")
        return n.b(n.a(x)) * mask

    model = layers(net, forward)
    assert prove(_Operation(model, plan(), Plan()), (INPUT, torch.ones(1, 3))).worst < 5e-6


def test_a_branch_scaled_by_nearly_nothing_is_seen(net):
    model = layers(net, lambda n, x: x[:, :3] + n.scale * n.b(n.a(x)), scale=nn.Parameter(torch.full((3,), 1e-6)))
    for wrong in WRONG:
        with pytest.raises(UnsafeCut, match="computes something else"):
            prove(_Operation(model, wrong, Plan()), INPUT)
    prove(_Operation(model, plan(), Plan()), INPUT)
    assert model.scale.tolist() == [pytest.approx(1e-6)] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_looked_at_in_double(dtype, net):
    model = layers(net, lambda n, x: n.b(F.layer_norm(n.a(x), (n.a.weight.shape[0],)))).to(dtype)
    before = model.b.weight.detach().clone()
    for wrong in WRONG:
        with pytest.raises(UnsafeCut, match="allowed 1e-09"):
            prove(_Operation(model, wrong, Plan()), INPUT)
    assert prove(_Operation(model, plan(), Plan()), INPUT).worst < 1e-9
    assert model.b.weight.dtype == dtype
    assert torch.equal(model.b.weight, before[:, KEPT])


def test_a_model_that_holds_its_precision_is_judged_by_it(net):
    model = layers(net, lambda n, x: n.b(n.a(x.to(torch.bfloat16)))).to(torch.bfloat16)
    seen = prove(_Operation(model, plan(), Plan()), INPUT)
    assert seen.worst < 0.1
    with pytest.raises(UnsafeCut, match=r"allowed 0\.1"):
        prove(_Operation(layers(net, lambda n, x: n.b(n.a(x.bfloat16()))).bfloat16(), WRONG[0], Plan()), INPUT)


def test_only_shapes_are_compared_on_the_meta_device(net):
    model = layers(net, lambda n, x: n.b(n.a(x))).to("meta")
    with pytest.warns(UserWarning, match="meta device: the cut was seen to run, but no value compared"):
        cut(model, plan(), example_inputs=INPUT)
    assert model.a.weight.shape == (4, 5)
    short = Plan(kept={"a.weight": {0: KEPT}}, shapes={"a.weight": (6, 5)})
    with pytest.raises(UnsafeCut, match="does not run"):
        prove(_Operation(layers(net, lambda n, x: n.b(n.a(x))).to("meta"), short, Plan()), INPUT)


def test_an_ordinary_model_runs_twice_and_once_more_as_it_trains(net):
    model = layers(net, lambda n, x: n.b(n.a(x).relu()))
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append((module.training, len(out))))
    prove(_Operation(model, plan(), Plan()), INPUT, training=False)
    assert calls == [(False, 1)] * 2
    calls.clear()
    prove(_Operation(layers(net, lambda n, x: n.b(n.a(x).relu())), plan(), Plan()), INPUT)
    assert calls == []
    model = layers(net, lambda n, x: n.b(n.a(x).relu()))
    model.register_forward_hook(lambda module, args, out: calls.append((module.training, len(out))))
    prove(_Operation(model, plan(), Plan()), INPUT)
    assert calls == [(False, 1)] * 2 + [(True, 2)]


def test_infinity_may_be_an_output_if_it_stays_where_it_was(net):
    def forward(n, x):
        return n.b(n.a(x)).masked_fill(torch.tensor([False, True, False]), -math.inf)

    assert prove(_Operation(layers(net, forward), plan(), Plan()), INPUT).worst < 5e-6
    with pytest.raises(UnsafeCut, match="computes something else"):
        prove(_Operation(layers(net, forward), WRONG[0], Plan()), INPUT)
    with pytest.raises(UnsafeCut, match="computes NaN on its example input"):
        prove(_Operation(layers(net, lambda n, x: n.b(n.a(x)) / 0 * 0), plan(), Plan()), INPUT)


def test_infinities_elsewhere_are_infinitely_far():
    a, b = torch.tensor([1.0, math.inf]), torch.tensor([1.5, math.inf])
    assert proof._distance(a, b) == 0.5
    assert proof._distance(a, b.flip(0)) == math.inf
    assert proof._distance(a, -b) == math.inf
    assert proof._distance(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 0.0])) == math.inf
    assert proof._distance(b - b, torch.tensor([0.25, math.nan]), at_least=0.5) == 0.5


def test_a_witness_that_is_nothing_but_rounding_is_no_evidence(net):
    def forward(n, x):
        noise = torch.tensor([1e-9] if n.a.weight.shape[0] == 6 else [2e-9])
        return n.b(n.a(x)) + (noise > 0)

    assert prove(_Operation(layers(net, forward), plan(), Plan()), INPUT).worst < 0.1


def test_random_numbers_are_the_same_on_both_sides_and_nobody_elses(net):
    model = layers(net, lambda n, x: n.b(n.a(x)) + torch.randn(3))
    state = torch.get_rng_state()
    assert prove(_Operation(model, plan(), Plan()), INPUT).worst < 5e-6
    assert torch.equal(state, torch.get_rng_state())


def test_buffers_are_zeroed_too(net):
    # a position table that is added in front of a norm: in the zeroed network its removed entries would count
    model = layers(net, lambda n, x: n.b(F.layer_norm(n.a(x) + n.table, (n.a.weight.shape[0],))))
    model.register_buffer("table", torch.linspace(-1, 1, 6))
    whole = plan()
    buffered = Plan(kept=whole.kept, buffers={"table": {0: KEPT}}, shapes={**whole.shapes, "table": (6,)})
    assert prove(_Operation(model, buffered, Plan()), INPUT).worst < 5e-6
    assert model.table.shape == (4,)


def test_difference_is_that_of_the_norms_themselves(net):
    model = layers(net, lambda n, x: (n.b(n.a(x)), n.b(F.layer_norm(n.a(x), (n.a.weight.shape[0],)))))
    assert difference(_Operation(model, plan(), Plan()), INPUT) > 1e-3
    assert model.a.weight.shape == (6, 5)
    plain = layers(net, lambda n, x: n.b(n.a(x)))
    assert difference(_Operation(plain, plan(), Plan()), INPUT) < 1e-6


def test_difference_leaves_out_what_changes_shape_and_is_nan_without_the_rest(net):
    model = layers(net, lambda n, x: (n.a(x), n.b(n.a(x))))
    assert difference(_Operation(model, plan(), Plan()), INPUT) < 1e-6
    assert math.isnan(difference(_Operation(layers(net, lambda n, x: n.a(x)), plan(), Plan()), INPUT))
    with pytest.raises(UnsafeCut, match=r"outputs change shape, \[\(1, 6\)\] to \[\(1, 4\)\]"):
        prove(_Operation(layers(net, lambda n, x: n.a(x)), plan(), Plan()), INPUT)


def test_hooks_for_the_time_of_a_run_are_gone_afterwards_also_when_it_raises(net):
    before = len(nn.modules.module._global_forward_pre_hooks), len(nn.modules.module._global_forward_hooks)
    model = layers(net, lambda n, x: n.b(n.a(x)))
    with pytest.raises(UnsafeCut, match="does not run"):
        prove(_Operation(model, plan(), Plan()), torch.randn(1, 7))
    assert before == (len(nn.modules.module._global_forward_pre_hooks), len(nn.modules.module._global_forward_hooks))


def test_a_compiled_part_is_proved_like_any_other(net):
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), torch.compile(nn.Linear(6, 3), backend="eager")

        def forward(self, x):
            return self.b(self.a(x))

    def named(whole):
        return Plan(
            kept={n.replace("b.weight", "b._orig_mod.weight"): dims for n, dims in whole.kept.items()},
            shapes={"a.weight": (6, 5), "a.bias": (6,), "b._orig_mod.weight": (3, 6)},
        )

    torch.manual_seed(0)
    model = Compiled()
    for wrong in WRONG:
        with pytest.raises(UnsafeCut, match="computes something else"):
            prove(_Operation(model, named(wrong), Plan()), INPUT)
    assert prove(_Operation(model, named(plan()), Plan()), INPUT).worst < 5e-6


def test_a_proof_is_a_value():
    assert proof.Proof() == proof.Proof(0.0, (), True)
