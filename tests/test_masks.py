import math

import pytest
import torch
from torch import nn

from lightning_prune.masks import Masks


def two_by_two(values=((1.0, 2.0), (3.0, 4.0))):
    return nn.Parameter(torch.tensor(values))


DIAGONAL = torch.tensor([[True, False], [False, True]])


def test_zero_puts_zeros_where_the_mask_is_false_and_keeps_the_parameter_object():
    weight = two_by_two()
    storage = weight.data_ptr()
    Masks({"w": weight}, {"w": DIAGONAL}).zero()
    assert torch.equal(weight, torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    assert weight.data_ptr() == storage


def test_a_negative_weight_becomes_zero_without_a_sign():
    weight = two_by_two(((1.0, -2.0), (-3.0, -4.0)))
    Masks({"w": weight}, {"w": DIAGONAL}).zero()
    assert torch.equal(weight.signbit(), torch.tensor([[False, False], [False, True]]))


def test_building_masks_changes_no_weight():
    weight = two_by_two()
    masks = Masks({"w": weight}, {"w": DIAGONAL})
    assert torch.equal(weight, two_by_two())
    assert masks.density() == 0.5


def test_zero_removes_infinities_that_multiplying_would_turn_into_nan():
    weight = two_by_two(((1.0, math.inf), (math.nan, 4.0)))
    Masks({"w": weight}, {"w": DIAGONAL}).zero()
    assert torch.equal(weight, torch.tensor([[1.0, 0.0], [0.0, 4.0]]))


def test_gradients_are_zero_under_the_mask_and_untouched_elsewhere():
    weight, frozen = two_by_two(), two_by_two()
    weight.grad = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    Masks({"w": weight, "frozen": frozen}, {"w": DIAGONAL, "frozen": DIAGONAL}).mask_gradients()
    assert torch.equal(weight.grad, torch.tensor([[5.0, 0.0], [0.0, 8.0]]))
    assert frozen.grad is None


def test_hold_takes_back_what_weight_decay_and_momentum_moved():
    weight, free = two_by_two(), two_by_two()
    masks = Masks({"w": weight, "free": free}, {"w": DIAGONAL})
    masks.zero()
    with torch.no_grad():
        weight += 1.0
        free += 1.0
    masks.hold()
    assert torch.equal(weight, torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    assert torch.equal(free, two_by_two() + 1)


def test_masked_training_with_momentum_leaves_masked_weights_at_zero():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    masks = Masks(dict(layer.named_parameters()), {"weight": torch.rand(3, 4) > 0.5})
    masks.zero()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(5, 4)).square().sum().backward()
        masks.mask_gradients()
        optimizer.step()
        masks.hold()
    gone = ~masks.as_bool()["weight"]
    assert gone.any()
    assert torch.equal(layer.weight[gone], torch.zeros(int(gone.sum())))
    assert bool((layer.weight[~gone] != 0).all())


def test_update_replaces_all_masks_and_turned_on_entries_start_at_zero():
    weight, other = two_by_two(), two_by_two()
    masks = Masks({"w": weight, "o": other}, {"w": DIAGONAL, "o": DIAGONAL})
    masks.zero()
    masks.update({"w": ~DIAGONAL})
    assert torch.equal(weight, torch.zeros(2, 2))
    assert list(masks.as_bool()) == ["w"]
    assert torch.equal(masks.as_bool()["w"], ~DIAGONAL)


def test_refused_update_leaves_the_masks_as_they_were():
    masks = Masks({"w": two_by_two()}, {"w": DIAGONAL})
    with pytest.raises(ValueError, match="'w' must be a bool tensor of shape"):
        masks.update({"w": torch.ones(2, 3, dtype=torch.bool)})
    assert torch.equal(masks.as_bool()["w"], DIAGONAL)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(4, dtype=torch.bool)], ids=["float", "flat"])
def test_mask_of_another_dtype_or_shape_is_refused(mask):
    with pytest.raises(ValueError, match="mask of 'w' must be a bool tensor of shape"):
        Masks({"w": two_by_two()}, {"w": mask})


def test_mask_without_a_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match="mask for 'v'"):
        Masks({"w": two_by_two()}, {"v": DIAGONAL})


def test_density_weighs_parameters_by_their_entries():
    # 2 of 4 and 0 of 12: 2 / 16, not the mean of 1/2 and 0
    parameters = {"a": two_by_two(), "b": nn.Parameter(torch.ones(12))}
    masks = Masks(parameters, {"a": DIAGONAL, "b": torch.zeros(12, dtype=torch.bool)})
    assert masks.densities() == {"a": 0.5, "b": 0.0}
    assert masks.density() == 0.125
    assert Masks(parameters, {}).density() == 1.0


def test_nonzero_kept_counts_kept_entries_that_are_not_zero():
    # kept are 0 and 4, and one of them is zero; the 2 and 3 under the mask do not count
    masks = Masks({"w": two_by_two(((0.0, 2.0), (3.0, 4.0)))}, {"w": DIAGONAL})
    assert masks.nonzero_kept() == {"w": 1}


def test_masks_follow_a_parameter_to_another_dtype():
    layer = nn.Linear(2, 2, bias=False)
    masks = Masks({"weight": layer.weight}, {"weight": DIAGONAL})
    layer.double()
    masks.hold()
    assert layer.weight.dtype == torch.float64
    assert layer.weight[0, 1].item() == 0
    assert layer.weight[0, 0].item() != 0


def test_parameter_cut_under_its_mask_is_an_error_that_names_it():
    weight = two_by_two()
    masks = Masks({"w": weight}, {"w": DIAGONAL})
    with torch.no_grad():
        weight.set_(weight[:1].clone())
    with pytest.raises(RuntimeError, match=r"'w' was cut from \(2, 2\) to \(1, 2\)"):
        masks.hold()


def test_sparse_gradient_is_refused_by_name():
    table = nn.Embedding(2, 2, sparse=True)
    table(torch.tensor([0])).sum().backward()
    with pytest.raises(RuntimeError, match="'table' has a sparse gradient"):
        Masks({"table": table.weight}, {"table": DIAGONAL}).mask_gradients()


def test_masks_take_the_strides_of_channels_last_weights():
    weight = nn.Parameter(torch.ones(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    mask = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    mask[1, 2, 0, 1] = True
    masks = Masks({"w": weight}, {"w": mask})
    masks.hold()
    assert torch.equal(weight, mask.float())
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_follow_a_parameter_to_the_gpu():
    layer = nn.Linear(2, 2, bias=False)
    masks = Masks({"weight": layer.weight}, {"weight": DIAGONAL})
    layer.cuda()
    layer.weight.grad = torch.ones_like(layer.weight)
    masks.zero()
    masks.mask_gradients()
    assert torch.equal(layer.weight.grad.cpu(), DIAGONAL.float())
    assert torch.equal((layer.weight == 0).cpu(), ~DIAGONAL)


def test_nothing_is_touched_before_anything_is_masked():
    layer = nn.Linear(3, 2)
    masks = Masks({"weight": layer.weight}, {"weight": torch.ones(2, 3, dtype=torch.bool)})
    layer.weight.grad = torch.ones(2, 3)
    before = layer.weight._version, layer.weight.grad._version
    masks.mask_gradients()
    masks.hold()
    assert (layer.weight._version, layer.weight.grad._version) == before
    assert masks.removed() == 0


def test_removed_counts_masked_entries_and_of_gives_one_mask():
    layer = nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    masks = Masks({"weight": layer.weight}, {"weight": mask})
    assert masks.removed() == 3
    assert torch.equal(masks.of("weight"), mask)
