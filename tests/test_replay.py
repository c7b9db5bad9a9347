import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_prune.replay import Notes, Record, Replay

KEPT = torch.tensor([0, 2, 3, 5])


def beside(function, dense, dim=1, kept=KEPT):
    """What a function makes of a tensor; then, beside the notes of that, of the tensor without what is not kept."""
    notes, model = Notes(), nn.Identity()
    with Record(model, notes):
        before = function(dense)
    replay = Replay(model, notes)
    small = dense.index_select(dim, kept)
    with replay:
        after = function(small)
    return before, after, function(small), replay


def zeroed(*shape, dim=1, shift=0.0):
    """Seeded normal values of which those of channels 1 and 4 are zero, in double precision."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + shift
    return x.index_fill(dim, torch.tensor([1, 4]), 0.0)


# statistics over fewer entries are those of zeros beside them


REDUCTIONS = {
    "mean": lambda x: x.mean(1),
    "mean of all": lambda x: x.mean(),
    "mean, kept": lambda x: x.mean((1, 2), keepdim=True),
    "var": lambda x: x.var(1),
    "var, biased": lambda x: x.var((1, 2), unbiased=False),
    "std": lambda x: x.std(1),
    "var_mean": lambda x: torch.stack(torch.var_mean(x, 1)),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, 1, correction=0)),
    "logsumexp": lambda x: x.logsumexp(1),
    "amax": lambda x: (x - 9).amax(1) if x.shape[1] == 0 else x.neg().amax(1),
    "amin": lambda x: x.amin(1),
    "max": lambda x: x.neg().max(1).values,
    "max of all": lambda x: x.neg().max(),
    "min": lambda x: x.min(1).values,
    "aminmax": lambda x: x.aminmax(dim=1).min,
    "prod": lambda x: x.prod(1),
    "median": lambda x: x.median(1).values,
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_over_fewer_entries_is_that_of_zeros_beside_them(name):
    before, after, plain, _ = beside(REDUCTIONS[name], zeroed(2, 6, 4, shift=6.0))  # so that 0 is outside the others
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)
    assert not torch.allclose(plain, before)


def affine(size, dim=0):
    """As a weight of a norm over the channels, cut like them."""
    weight = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    return weight if size == 6 else weight[KEPT]


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


MAPS = {
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "layer_norm": lambda x: F.layer_norm(
        x.transpose(1, 2), (x.shape[1],), affine(x.shape[1]), affine(x.shape[1]) ** 2
    ).transpose(1, 2),
    "layer_norm over two": lambda x: F.layer_norm(x, x.shape[1:], affine(x.shape[1])[:, None].expand(-1, 4)),
    "rms_norm": lambda x: F.rms_norm(x.transpose(1, 2), (x.shape[1],), affine(x.shape[1])).transpose(1, 2),
    "rms norm by hand": rms,
    "group_norm": lambda x: F.group_norm(x, 2, affine(x.shape[1]), affine(x.shape[1]) ** 2),
    "group_norm of one, no weight": lambda x: F.group_norm(x, 1),
    "a scale from the width": lambda x: x / x.shape[1],
    "a scale from the width as a tensor": lambda x: x * torch.tensor(x.shape[1] ** -0.5, dtype=x.dtype),
    "a power of the width": lambda x: x * x.shape[1] ** -0.5,
}


@pytest.mark.parametrize("name", MAPS)
def test_a_norm_over_fewer_channels_is_that_of_zeros_beside_them(name):
    before, after, plain, _ = beside(MAPS[name], zeroed(2, 6, 4, shift=1.0))
    torch.testing.assert_close(after, before[:, KEPT], rtol=1e-12, atol=0)
    assert not torch.allclose(plain, before[:, KEPT])


def test_each_group_of_a_group_norm_has_its_own_zeros():
    x = zeroed(2, 6, 4, shift=1.0)  # two groups of three: 0 1 2 | 3 4 5, of which 1 and 4 go
    before, after, _, _ = beside(lambda x: F.group_norm(x, 2), x)
    by_hand = [(g - g.mean((1, 2), keepdim=True)) / (g.var((1, 2), keepdim=True, unbiased=False) + 1e-5).sqrt()
               for g in (x[:, :3], x[:, 3:])]  # fmt: skip
    torch.testing.assert_close(before, torch.cat(by_hand, 1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(after, before[:, KEPT], rtol=1e-12, atol=1e-12)


def test_a_standardised_weight_with_fewer_inputs_has_the_statistics_of_zeros():
    weight = zeroed(4, 6, 3, 3, shift=1.0)

    def standardised(w):
        return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape(w.shape)

    before, after, plain, _ = beside(standardised, weight)
    torch.testing.assert_close(after, before[:, KEPT], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain, before[:, KEPT])


def test_attention_over_fewer_keys_is_that_over_keys_and_values_of_zero():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    before, after, plain, _ = beside(lambda k: F.scaled_dot_product_attention(q, k, k), zeroed(1, 2, 6, 4, dim=2), 2)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain, before)


def test_attention_with_narrower_heads_keeps_its_scale_and_says_so():
    before, after, plain, replay = beside(
        lambda x: F.scaled_dot_product_attention(x, x, x), zeroed(1, 2, 3, 6, dim=3), 3
    )
    torch.testing.assert_close(after, before[..., KEPT], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain, before[..., KEPT])
    assert len(replay.inexact) == 1  # 6 ** -0.5 = 0.408
    assert "computes with 0.5, and with 0.408" in replay.inexact[0]


def test_vector_norms_and_sums_are_left_as_they_are():
    before, after, plain, replay = beside(lambda x: F.normalize(x) + x.sum(1, keepdim=True), zeroed(2, 6, 4))
    torch.testing.assert_close(after, before[:, KEPT])
    assert torch.equal(after, plain)
    assert replay.inexact == []


# numbers


def test_a_number_that_comes_from_a_width_is_said_and_one_that_does_not_is_not():
    _, _, _, replay = beside(lambda x: x / x.shape[1] * 0.3 + 2, zeroed(2, 6, 4))
    assert replay.inexact == ["'div' computes with 4, and with 6 before (in the model)"]


def test_numbers_of_index_arithmetic_are_the_cut_networks_own():
    _, after, plain, replay = beside(lambda x: torch.arange(x.shape[1]) % x.shape[1], zeroed(2, 6, 4))
    assert after.tolist() == plain.tolist() == [0, 1, 2, 3]
    assert replay.inexact == []


def test_a_value_read_into_python_is_that_of_before():
    notes, model = Notes(), nn.Identity()
    with Record(model, notes):
        before = torch.tensor([1.0]).item()
    with (replay := Replay(model, notes)):
        after = torch.tensor([1.25]).item()
    assert before == after == 1.0
    assert [float(b - a) for a, b, _ in replay.witnesses] == [0.25]  # and the reading itself is compared


def test_a_number_that_differs_by_rounding_is_that_of_before_and_not_said():
    notes, model, x = Notes(), nn.Identity(), torch.ones(1, dtype=torch.float64)
    with Record(model, notes):
        x * 2.0
    with (replay := Replay(model, notes)):
        assert float(x * (2.0 + 1e-7)) == 2
    assert replay.inexact == []


# choices


CHOICES = {
    "topk": lambda y: y.topk(2).indices,
    "sort": lambda y: y.sort().indices,
    "argmax": lambda y: y.argmax(-1),
    "max": lambda y: y.max(-1).indices,
    "comparison": lambda y: y > 1,
    "comparison of two": lambda y: y == y.amax(),
    "nonzero": lambda y: (y - y[3]).nonzero(),
    "rounding": lambda y: (y * 1e6).long(),
    "nms": lambda y: torchvision.ops.nms(torch.eye(4, dtype=y.dtype)[:3] + torch.tensor([0, 0, 2.0, 2]), y[:3], 0.5),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_between_equals_is_made_as_before_though_rounding_differs(name):
    notes, model, function = Notes(), nn.Identity(), CHOICES[name]
    one, other = torch.tensor([1.0, 1 + 1e-9, 1 - 1e-9, 1], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    other[:3] = torch.tensor([1 + 1e-6, 1 - 1e-6, 1 + 1e-6])
    with Record(model, notes):
        before = function(one)
    with (replay := Replay(model, notes)):
        after = function(other)
    assert torch.equal(before, after)
    assert not (before.shape == function(other).shape and torch.equal(before, function(other)))
    assert max(float((a - b).abs().max()) for a, b, _ in replay.witnesses) > 1e-7


def test_the_values_beside_chosen_indices_are_the_cut_networks_own():
    notes, model = Notes(), nn.Identity()
    with Record(model, notes):
        torch.tensor([1.0, 2.0, 3.0]).topk(2)
    with Replay(model, notes):
        values, indices = torch.tensor([1.0, 5.0, 3.0]).topk(2)
    assert values.tolist() == [5, 3]
    assert indices.tolist() == [2, 1]


def test_a_choice_among_other_shapes_is_the_cut_networks_own():
    before, after, _, replay = beside(lambda x: (x > 0).sum(), torch.ones(2, 6, 4))
    assert (int(before), int(after)) == (48, 32)
    assert replay.witnesses == []


def test_a_choice_written_in_place_stays_in_its_place():
    flags = torch.zeros(3, dtype=torch.bool)
    notes, model = Notes(), nn.Identity()
    with Record(model, notes):
        flags.copy_(torch.tensor([0.0, 1.0, 0.0]))
    flags = torch.zeros(3, dtype=torch.bool)
    with Replay(model, notes):
        flags.copy_(torch.tensor([1.0, 1.0, 0.0]))
    assert flags.tolist() == [False, True, False]


def test_what_is_out_of_step_runs_as_it_stands_to_the_end_of_its_module():
    class Odd(nn.Module):
        def forward(self, x):
            return (x + 1 if x.shape[1] == 6 else x + x.mean()) / x.shape[1]

    class Even(nn.Module):
        def forward(self, x):
            return x / x.shape[1]

    model = nn.Sequential(Odd(), Even())
    notes, x = Notes(), torch.ones(1, 6)
    record = Record(model, notes)
    with record.places(), record:
        model(x)
    replay = Replay(model, notes)
    with replay.places(), replay:
        out = model(x[:, KEPT])
    assert out.tolist() == [[pytest.approx(2 / 4 / 6)] * 4]  # 4: its own width, out of step; 6: that of before
    assert [text[-5:] for text in replay.inexact] == ["in 1)"]


def test_a_layer_that_reads_zeros_in_its_first_rows_is_not_dead():
    notes, x = Notes(), torch.zeros(3, 6)
    notes.layer(("fc", 0), x, x)
    assert notes.is_dead
    x[2, 5] = 1  # a padded sample comes before it
    notes.layer(("fc", 1), x, x)
    assert not notes.is_dead
