import pytest
import torch
import torch.nn.functional as F

from lightning_prune.terms import channel_terms, random_places


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# function, input, weight, further arguments, arguments by name
CASES = {
    "linear": ("linear", (3, 5, 7), (4, 7), (), {}),
    "conv1d, strided and dilated": ("conv1d", (3, 4, 20), (6, 4, 3), (2, 1, 2), {}),
    "conv2d, axes apart": ("conv2d", (2, 4, 9, 8), (5, 4, 3, 2), ((2, 1), (1, 0), (1, 2)), {}),
    "conv2d in groups": ("conv2d", (2, 6, 5, 5), (4, 3, 3, 3), (1, 1, 1, 2), {}),
    "conv2d, same": ("conv2d", (2, 4, 9, 8), (5, 4, 4, 3), (), {"padding": "same", "dilation": 2}),
    "conv2d, valid": ("conv2d", (2, 4, 9, 8), (5, 4, 4, 3), (), {"padding": "valid"}),
    "conv2d of one sample": ("conv2d", (4, 6, 5), (5, 4, 3, 3), (1, 1), {}),
    "conv3d": ("conv3d", (2, 3, 4, 5, 6), (2, 3, 2, 3, 3), ((1, 2, 1), 1), {}),
    "conv_transpose1d": ("conv_transpose1d", (2, 4, 5), (4, 3, 4), (2, 1, 1), {}),
    "conv_transpose2d in groups": (
        "conv_transpose2d",
        (2, 4, 4, 3),
        (4, 3, 3, 4),
        ((2, 3), (1, 2), (1, 0), 2, (2, 1)),
        {},
    ),
    "conv_transpose3d": ("conv_transpose3d", (2, 2, 2, 3, 2), (2, 2, 2, 3, 2), (2,), {}),
}
every_case = pytest.mark.parametrize(("name", "x", "weight", "rest", "named"), CASES.values(), ids=CASES)


@every_case
def test_terms_add_up_to_the_output_without_its_bias(name, x, weight, rest, named):
    x, weight = normal(*x), normal(*weight, seed=1)
    plain = getattr(F, name)(x, weight, None, *rest, **named)
    bias = normal(plain.shape[1 - weight.ndim], seed=2)
    out = getattr(F, name)(x, weight, bias, *rest, **named)
    terms = channel_terms(name, (x, weight, bias, *rest), named, out, torch.arange(out.numel()))
    assert terms.shape == (out.numel(), weight.shape[0 if "transpose" in name else 1])
    assert torch.allclose(terms.sum(dim=1), plain.reshape(-1), rtol=0, atol=1e-12)
    assert not torch.allclose(terms.sum(dim=1), out.reshape(-1))


@every_case
def test_a_term_is_the_output_with_all_other_channels_at_zero(name, x, weight, rest, named):
    x, weight = normal(*x), normal(*weight, seed=1)
    out = getattr(F, name)(x, weight, None, *rest, **named)
    places = torch.arange(0, out.numel(), 7)
    terms = channel_terms(name, (x, weight, None, *rest), named, out, places)
    axis = -1 if name == "linear" else 1 - weight.ndim
    for column in range(terms.shape[1]):
        alone = torch.zeros_like(x)
        read = torch.arange(column, x.shape[axis], terms.shape[1])  # in a grouped convolution that column of each group
        alone.index_copy_(axis, read, x.index_select(axis, read))
        wanted = getattr(F, name)(alone, weight, None, *rest, **named).reshape(-1)[places]
        assert torch.allclose(terms[:, column], wanted, rtol=0, atol=1e-12)


def test_terms_of_half_precision_are_float32():
    x, weight = normal(2, 4).bfloat16(), normal(3, 4).bfloat16()
    terms = channel_terms("linear", (x, weight), {}, F.linear(x, weight), torch.arange(6))
    assert terms.dtype == torch.float32
    assert torch.equal(terms[1], x[0].float() * weight[1].float())


def test_places_of_a_sample_depend_on_its_number_only():
    whole = random_places((8, 5, 3), batch=8, rows=6, seed=3, first=0).reshape(8, 6)
    later = random_places((3, 5, 3), batch=3, rows=6, seed=3, first=5).reshape(3, 6)
    assert torch.equal(later, whole[5:] - 5 * 15)
    assert not torch.equal(random_places((8, 5, 3), batch=8, rows=6, seed=4, first=0).reshape(8, 6), whole)


def test_places_lie_in_their_own_sample_and_everywhere_in_it():
    places = random_places((6, 5, 3), batch=2, rows=2000, seed=0, first=0).reshape(2, -1)  # 3 x 15 outputs a sample
    assert [row.unique().tolist() for row in places] == [list(range(45)), list(range(45, 90))]
    counts = torch.bincount(places[0])
    assert counts.min() > 20  # 44 are expected
    assert counts.max() < 80


def test_places_are_drawn_from_all_outputs_where_samples_are_not_on_the_first_axis():
    places = random_places((3, 2, 4), batch=2, rows=500, seed=0, first=0)
    assert len(places) == 1000
    assert places.unique().tolist() == list(range(24))
