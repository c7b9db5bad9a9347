"""Energy proxy and storage, by the values worked by hand for a convolution and a linear layer."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune.cost import count
from lightning_prune.footprint import energy, storage_bits, storage_bytes


def tiny(width: int = 8) -> nn.Module:
    """Conv 3 -> 8, 3x3, on 8x8, and a linear layer of all its positions: 18,944 multiply-accumulates."""
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10))


def test_energy_of_the_dense_float_network_is_mostly_that_of_its_weights():
    cost = count(tiny(), torch.zeros(1, 3, 8, 8))
    proxy = energy(cost)
    # 18,944 * 4.6 pJ and 5,354 * 640 pJ
    assert (cost.flops, cost.params) == (18_944, 5_354)
    assert proxy.compute_nj == pytest.approx(87.1424)
    assert proxy.memory_nj == pytest.approx(3426.56)
    assert proxy.total_nj == pytest.approx(87.1424 + 3426.56)


def test_energy_of_the_halved_network_in_int8():
    cost = count(tiny(4), torch.zeros(1, 3, 8, 8))
    proxy = energy(cost, bits=8)
    # 9,472 * 0.3 pJ, and four weights a word: 2,682 / 4 = 670.5 words of 640 pJ
    assert proxy.compute_nj == pytest.approx(2.8416)
    assert proxy.memory_nj == pytest.approx(429.12)


def test_activations_that_go_through_memory_cost_a_word_each():
    cost = count(tiny(), torch.zeros(1, 3, 8, 8))
    assert energy(cost, activations=100).memory_nj - energy(cost).memory_nj == pytest.approx(64.0)
    assert energy(cost, bits=8, activations=100).memory_nj - energy(cost, bits=8).memory_nj == pytest.approx(16.0)


def test_norms_are_not_among_the_multiply_accumulates_of_the_proxy():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    normed = nn.Sequential(*plain, nn.BatchNorm2d(4, affine=False))
    x = torch.zeros(1, 3, 8, 8)
    assert count(normed, x).flops > count(plain, x).flops
    assert energy(count(normed, x)) == energy(count(plain, x))


@pytest.mark.parametrize(
    ("encoding", "bits", "expected"),
    [
        ("dense", 32, 32_000),
        ("dense", 8, 8_000),
        ("bitmap", 32, 4_200),  # 1000 + 100 * 32: 7.62 times smaller, not 10 times
        ("bitmap", 8, 1_800),  # 1000 + 100 * 8: 17.78 times, not 40 times
        ("csr", 32, 5_472),  # 100 * (32 + 16) + (20 + 1) * 32
        ("csr", 8, 3_072),  # 100 * (8 + 16) + (20 + 1) * 32
    ],
)
def test_a_thousand_weights_of_which_a_tenth_is_kept(encoding, bits, expected):
    assert storage_bits(1000, 100, encoding, bits, rows=20) == expected


def test_dense_storage_of_a_model_is_four_bytes_a_parameter():
    assert storage_bytes(tiny()) == 4 * 5_354
    assert storage_bytes(tiny(4)) == 4 * 2_682


def test_int8_has_a_scale_per_output_channel_and_float_biases():
    # weights 216 + 5,120 bytes, 8 + 10 scales of 4 bytes, 8 + 10 biases of 4 bytes
    assert storage_bytes(tiny(), bits=8) == 216 + 5_120 + 18 * 4 + 18 * 4


def test_what_is_zero_and_what_is_masked_takes_the_same_place():
    model = tiny()
    torch.manual_seed(0)
    masks = {name: torch.rand_like(p) < 0.5 for name, p in model.named_parameters() if p.ndim > 1}
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).mul_(mask)
    kept = sum(int(mask.sum()) for mask in masks.values())
    expected = -(-(5_336 + 32 * kept + 32 * 18) // 8)  # a bit each, kept weights and biases at 32 bits
    assert storage_bytes(model, "bitmap", masks=masks) == storage_bytes(zeroed, "bitmap") == expected
    assert storage_bytes(model, "bitmap") > expected


def test_a_mask_of_ones_costs_its_bits():
    model = tiny()
    ones = {"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}
    assert storage_bytes(model, "bitmap", masks=ones) == storage_bytes(model, "bitmap") == 4 * 5_354 + 5_336 // 8


def test_a_shared_parameter_is_stored_once():
    first = nn.Linear(4, 4, bias=False)
    second = nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert storage_bytes(nn.Sequential(first, second)) == 64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoding": "zip"}, "encoding must be one of dense, bitmap, csr, got 'zip'"),
        ({"masks": {"9.weight": torch.ones(2)}}, r"'9.weight' has shape \(2,\), the model has no such parameter"),
        ({"masks": {"0.weight": torch.ones(2)}}, r"shape \(2,\), the model has \(8, 3, 3, 3\)"),
        ({"encoding": "csr", "index_bits": 8}, "'3.weight' has 512 columns, more than indices of 8 bits"),
        ({"bits": 0}, "bits=0"),
    ],
)
def test_wrong_storage_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        storage_bytes(tiny(), **wrong)


def test_more_than_all_weights_cannot_be_kept():
    with pytest.raises(ValueError, match="got 11 of 10"):
        storage_bits(10, 11)


@pytest.mark.parametrize(("wrong", "message"), [({"bits": 16}, "got 16"), ({"activations": -1}, "got -1")])
def test_wrong_energy_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        energy(count(tiny(), torch.zeros(1, 3, 8, 8)), **wrong)
