import base64
import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint


def index(*values):
    return torch.tensor(values, dtype=torch.long)


def example():
    """A convolution cut to 3 of 4 outputs with its norm, and a linear layer that is cut and masked."""
    return Plan(
        kept={"conv.weight": {0: index(0, 1, 3)}, "fc.weight": {1: index(0, 1, 3)}},
        masks={"fc.weight": torch.tensor([[True, False, True, True], [False, True, True, False]])},
        buffers={"norm.running_mean": {0: index(0, 1, 3)}},
        shapes={"conv.weight": (4, 2, 1, 1), "fc.weight": (2, 4), "norm.running_mean": (4,)},
        attributes={"conv": {"out_channels": 3}, "norm": {"num_features": 3}, "ln": {"normalized_shape": (3,)}},
        groups={"conv": (3, 4)},
        ranks={"fc": 1},
    )


def cut(name, dim, kept, size, **more):
    """Make a plan that cuts one dim of a 2-D parameter whose other dim has 3 entries."""
    shape = (size, 3) if dim == 0 else (3, size)
    return Plan(kept={name: {dim: index(*kept)}}, shapes={name: shape}, **more)


# what a plan says


def test_current_shape_counts_kept_indices_per_dim():
    plan = example()
    assert plan.current_shape("conv.weight") == (3, 2, 1, 1)
    assert plan.current_shape("fc.weight") == (2, 3)
    assert plan.current_shape("norm.running_mean") == (3,)
    with pytest.raises(ValueError, match="says nothing about tensor 'other'"):
        plan.current_shape("other")


def test_mask_now_has_the_shape_after_the_cut():
    # column 2 is cut
    assert torch.equal(example().mask_now("fc.weight"), torch.tensor([[True, False, True], [False, True, False]]))
    with pytest.raises(ValueError, match=r"no mask for parameter 'conv.weight'"):
        example().mask_now("conv.weight")


def test_density_counts_an_entry_that_is_masked_and_cut_once():
    # conv: 3 * 2 of 8; fc: of 8 entries column 2 is cut and 3 of the other 6 are masked; the buffer does not count:
    # (6 + 3) / 16. Multiplying both densities of fc would give 8 * 5/8 * 3/4 = 3.75 there
    assert example().density == 9 / 16


def test_density_weighs_tensors_by_their_entries_and_is_one_for_an_empty_plan():
    masks = {"a": torch.ones(1, dtype=torch.bool), "b": torch.zeros(3, dtype=torch.bool)}
    assert Plan(masks=masks, shapes={"a": (1,), "b": (3,)}).density == 0.25
    assert Plan().density == 1.0


def test_plan_that_names_nothing_is_empty():
    assert Plan().is_empty
    assert not Plan(ranks={"fc": 1}).is_empty
    assert not example().is_empty


def test_summary_shows_channels_mask_densities_and_ranks():
    # the mask of what is left of fc keeps 3 of 6
    assert example().summary().splitlines() == [
        "2 parameters cut, 1 masked, density 0.5625",
        "channels:",
        "  conv  3 / 4",
        "mask density:",
        "  fc.weight  0.5000",
        "rank:",
        "  fc  1",
    ]


# frozen


def test_plan_does_not_change_with_the_tensors_and_dicts_it_was_made_of():
    kept, mask, shapes = index(0, 2), torch.ones(4, dtype=torch.bool), {"a": (3,), "b": (4,)}
    plan = Plan(kept={"a": {0: kept}}, masks={"b": mask}, shapes=shapes)
    digest = plan.digest()
    kept[1] = 1
    mask[0] = False
    shapes["a"] = (5,)
    assert plan.kept["a"][0].tolist() == [0, 2]
    assert plan.masks["b"].all()
    assert plan == Plan(kept={"a": {0: index(0, 2)}}, masks={"b": torch.ones(4) > 0}, shapes={"a": (3,), "b": (4,)})
    assert plan.digest() == digest


def test_mappings_are_read_only():
    plan = example()
    with pytest.raises(TypeError, match="does not support item assignment"):
        plan.kept["conv.weight"][0] = index(0)
    with pytest.raises(TypeError, match="does not support item assignment"):
        plan.attributes["conv"]["out_channels"] = 1
    with pytest.raises(AttributeError):
        plan.ranks = {}


def test_shapes_of_tensors_that_are_not_named_are_dropped():
    plan = Plan(kept={"a": {0: index(0)}}, shapes={"a": (2,), "b": (3,)})
    assert dict(plan.shapes) == {"a": (2,)}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kept": {"a": {0: index(0)}}}, "'a' without its dense shape"),
        ({"kept": {"a": {0: index()}}, "shapes": {"a": (2,)}}, "dim 0 of 'a': got 0 indices"),
        ({"kept": {"a": {0: index(1, 0)}}, "shapes": {"a": (2,)}}, "dim 0 of 'a' must be sorted"),
        ({"kept": {"a": {0: index(1, 1)}}, "shapes": {"a": (2,)}}, "dim 0 of 'a' must be sorted, unique"),
        ({"kept": {"a": {0: index(0, 2)}}, "shapes": {"a": (2,)}}, r"dim 0 of 'a' must be .* in \[0, 2\)"),
        ({"kept": {"a": {0: index(-1, 0)}}, "shapes": {"a": (2,)}}, r"dim 0 of 'a' must be .* in \[0, 2\)"),
        ({"kept": {"a": {0: torch.tensor([0.0])}}, "shapes": {"a": (2,)}}, "int64"),
        ({"kept": {"a": {0: index(0).expand(1, 1)}}, "shapes": {"a": (2,)}}, "1-D"),
        ({"kept": {"a": {1: index(0)}}, "shapes": {"a": (2,)}}, "no dim 1"),
        ({"kept": {"a": {-1: index(0)}}, "shapes": {"a": (2,)}}, "no dim -1"),
        ({"masks": {"a": torch.ones(2)}, "shapes": {"a": (2,)}}, "mask of 'a' must be a bool tensor"),
        ({"masks": {"a": torch.ones(3) > 0}, "shapes": {"a": (2,)}}, r"mask of 'a' .* \(2,\), got torch.bool"),
        ({"buffers": {"a": {0: index(2)}}, "shapes": {"a": (2,)}}, "dim 0 of 'a'"),
        (
            {"kept": {"a": {0: index(0)}}, "buffers": {"a": {0: index(0)}}, "shapes": {"a": (2,)}},
            "'a' both as parameter and as buffer",
        ),
        ({"attributes": {"m": {"p": 0.5}}}, "attribute 'p' of module 'm'"),
        ({"groups": {"g": (0, 4)}}, "group 'g'"),
        ({"groups": {"g": (5, 4)}}, "group 'g'"),
        ({"ranks": {"fc": 0}}, "rank of layer 'fc'"),
        ({"kept": {"a": {0: index(0)}}, "shapes": {"a": [2]}}, "shape of 'a' must be a tuple"),
    ],
)
def test_what_is_not_a_plan_is_refused_by_name(fields, match):
    with pytest.raises(ValueError, match=match):
        Plan(**fields)


# one more cut


def test_relative_to_gives_positions_inside_what_is_left():
    # of 6 rows 0, 2, 3, 5 are left; keeping 2 and 5 are the second and the fourth of them
    now, then = cut("w", 0, [2, 5], 6), cut("w", 0, [0, 2, 3, 5], 6)
    positions = now.relative_to(then)
    assert positions.keys() == {"w"}
    assert positions["w"][0].tolist() == [1, 3]
    dense = torch.arange(18).reshape(6, 3)
    assert torch.equal(dense[[0, 2, 3, 5]].index_select(0, positions["w"][0]), dense[[2, 5]])


def test_relative_to_names_only_what_shrinks_buffers_included():
    plan = example()
    assert plan.relative_to(plan) == {}
    assert plan.relative_to(Plan()).keys() == {"conv.weight", "fc.weight", "norm.running_mean"}
    everything = Plan(kept={"w": {0: index(0, 1)}}, shapes={"w": (2,)})
    assert everything.relative_to(Plan()) == {}
    assert Plan().relative_to(everything) == {}


def test_relative_to_refuses_to_keep_what_has_gone():
    with pytest.raises(ValueError, match="keeps index 1 of dim 0 of 'w', which an earlier cut has removed"):
        cut("w", 0, [0, 1], 6).relative_to(cut("w", 0, [0, 2], 6))
    # saying nothing about a tensor keeps all of it
    with pytest.raises(ValueError, match="keeps index 1 of dim 0 of 'w'"):
        Plan().relative_to(cut("w", 0, [0, 2], 6))


def test_relative_to_refuses_another_model():
    with pytest.raises(ValueError, match=r"'w' has dense shape \(6, 3\) in one and \(7, 3\)"):
        cut("w", 0, [0], 7).relative_to(cut("w", 0, [0], 6))


# merging


def test_merge_keeps_what_both_keep():
    shapes = {"w": (4, 3)}
    one = Plan(kept={"w": {0: index(0, 1, 2)}}, masks={"w": torch.eye(4, 3) == 0}, shapes=shapes, ranks={"w": 2})
    other = Plan(
        kept={"w": {0: index(1, 2, 3), 1: index(0, 2)}},
        masks={"w": torch.ones(4, 3).triu() > 0},
        shapes=shapes,
        ranks={"w": 1},
    )
    merged = one.merge(other)
    assert {dim: kept.tolist() for dim, kept in merged.kept["w"].items()} == {0: [1, 2], 1: [0, 2]}
    assert torch.equal(merged.masks["w"], torch.ones(4, 3).triu(1) > 0)
    assert dict(merged.ranks) == {"w": 1}
    assert merged == other.merge(one)


def test_merge_of_a_later_cut_takes_its_attributes_and_counts_in_either_order():
    early = cut("conv.weight", 0, [0, 1, 3], 4, attributes={"conv": {"out_channels": 3}}, groups={"conv": (3, 4)})
    late = cut("conv.weight", 0, [1, 3], 4, attributes={"conv": {"out_channels": 2}}, groups={"conv": (2, 4)})
    assert early.merge(late) == late
    assert late.merge(early) == late


def test_merge_of_cuts_on_both_sides_of_a_layer_keeps_both_attributes():
    outputs = cut("fc.weight", 0, [0, 1], 3, attributes={"fc": {"out_features": 2}})
    inputs = cut("fc.weight", 1, [2], 3, attributes={"fc": {"in_features": 1}})
    merged = outputs.merge(inputs)
    assert merged.current_shape("fc.weight") == (2, 1)
    assert dict(merged.attributes["fc"]) == {"out_features": 2, "in_features": 1}


def test_merge_of_crossing_cuts_of_a_module_with_attributes_is_refused():
    # both keep 2 of 4 and agree in out_channels, but only one channel would be left
    one = cut("conv.weight", 0, [0, 1], 4, attributes={"conv": {"out_channels": 2}})
    other = cut("conv.weight", 0, [1, 2], 4, attributes={"conv": {"out_channels": 2}})
    with pytest.raises(ValueError, match=r"dim 0 of 'conv.weight' that the other removes.*module 'conv'"):
        one.merge(other)


def test_merge_of_crossing_cuts_with_a_common_group_is_refused():
    one, other = (cut("w", 0, kept, 4, groups={"g": (2, 4)}) for kept in ([0, 1], [1, 2]))
    with pytest.raises(ValueError, match=r"'w' that the other removes.*count of group 'g'"):
        one.merge(other)


def test_merge_is_refused_where_each_plan_cuts_another_side_and_both_claim_one_attribute():
    one = cut("fc.weight", 0, [0, 1], 3, attributes={"fc": {"out_features": 2, "in_features": 3}})
    other = cut("fc.weight", 1, [2], 3, attributes={"fc": {"out_features": 3, "in_features": 1}})
    with pytest.raises(ValueError, match=r"cannot merge plans.*'fc.weight'.*module 'fc'"):
        one.merge(other)


def test_merge_with_nothing_left_or_another_model_is_refused():
    with pytest.raises(ValueError, match="dim 0 of 'w': got 0 indices"):
        cut("w", 0, [0], 3).merge(cut("w", 0, [1], 3))
    with pytest.raises(ValueError, match="different models: 'w'"):
        cut("w", 0, [0], 3).merge(cut("w", 0, [0], 4))
    with pytest.raises(ValueError, match="group 'g' has 3 channels in one, 4 in the other"):
        Plan(groups={"g": (1, 3)}).merge(Plan(groups={"g": (1, 4)}))


def test_plans_of_a_huge_dim_are_compared_without_memory_for_it():
    plan = Plan(kept={"w": {0: index(0, 2**40 - 1)}}, shapes={"w": (2**40,)})
    assert plan.relative_to(Plan())["w"][0].tolist() == [0, 2**40 - 1]
    assert plan.merge(Plan()) == plan
    with pytest.raises(ValueError, match="keeps index 1 of dim 0 of 'w'"):
        Plan().relative_to(plan)
    # what is kept from the start on ends somewhere
    with pytest.raises(ValueError, match="keeps index 2 of dim 0 of 'w'"):
        Plan().relative_to(Plan(kept={"w": {0: index(0, 1)}}, shapes={"w": (2**40,)}))


def test_merge_with_an_empty_plan_changes_nothing():
    assert example().merge(Plan()) == example()
    assert Plan().merge(example()) == example()


# value


def test_plans_are_equal_by_value_whatever_the_order_of_names():
    plan = example()
    turned = Plan(
        **{
            name: dict(reversed(getattr(plan, name).items()))
            for name in ("kept", "masks", "buffers", "shapes", "attributes", "groups", "ranks")
        }
    )
    assert plan == turned
    assert hash(plan) == hash(turned)
    assert len({plan, turned, Plan()}) == 2
    assert plan != "a plan"


def test_every_part_of_a_plan_counts_for_equality():
    state = example().to_dict()
    changes = [
        ("kept", "conv.weight", {"0": [0, 1, 2]}),
        ("masks", "fc.weight", base64.b64encode(b"\xb7").decode()),
        ("buffers", "norm.running_mean", {"0": [1, 2, 3]}),
        ("shapes", "conv.weight", [4, 3, 1, 1]),
        ("attributes", "conv", {"out_channels": 4}),
        ("groups", "conv", [2, 4]),
        ("ranks", "fc", 2),
    ]
    plans = {example()}
    for section, name, value in changes:
        plans.add(Plan.from_dict({**state, section: {**state[section], name: value}}))
    assert len(plans) == 1 + len(changes)


def test_digest_is_the_same_in_another_process():
    code = (
        "import torch; from lightning_prune.decision import Plan;"
        "print(Plan(kept={'w': {0: torch.tensor([0, 2])}}, masks={'v': torch.tensor([True, False])},"
        "shapes={'v': (2,), 'w': (3,)}).digest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = Plan(kept={"w": {0: index(0, 2)}}, masks={"v": torch.tensor([True, False])}, shapes={"w": (3,), "v": (2,)})
    assert here.digest() == there
    assert len(there) == 64


def test_plan_can_be_copied_and_pickled():
    plan = example()
    assert copy.deepcopy({"plan": plan})["plan"] is plan
    assert copy.copy(plan) is plan
    assert pickle.loads(pickle.dumps(plan)) == plan


# saving


@st.composite
def plans(draw):
    shapes, kept, masks, buffers = {}, {}, {}, {}
    for i in range(draw(st.integers(0, 3))):
        name = f"layer{i}.weight"
        shape = shapes[name] = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        dims = {
            dim: index(*sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
            for dim, size in enumerate(shape)
            if draw(st.booleans())
        }
        (buffers if draw(st.booleans()) else kept)[name] = dims
        if name in kept and draw(st.booleans()):
            masks[name] = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) > 0.5
    return Plan(kept, masks, buffers, shapes)


@given(plans())
def test_plan_survives_json_and_state_dict(plan):
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    file = io.BytesIO()
    torch.save(plan.state_dict(), file)
    file.seek(0)
    loaded = Plan.from_state_dict(torch.load(file, weights_only=True))
    assert again == loaded == plan
    for name, mask in plan.masks.items():
        assert torch.equal(loaded.masks[name], mask)
        assert torch.equal(again.masks[name], mask)


@st.composite
def pairs(draw):
    """Two plans of one model; index 0 is always kept, so that something is left."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    return [
        Plan(
            kept={
                "w": {
                    dim: index(*sorted({0, *draw(st.sets(st.integers(0, size - 1)))}))
                    for dim, size in enumerate(shape)
                    if draw(st.booleans())
                }
            },
            shapes={"w": shape},
        )
        for _ in range(2)
    ]


def cut_tensor(tensor, dims):
    for dim, kept in dims.items():
        tensor = tensor.index_select(dim, kept)
    return tensor


@given(pairs())
def test_cutting_by_a_plan_and_then_on_to_a_merge_is_cutting_by_the_merge(pair):
    one, merged = pair[0], pair[0].merge(pair[1])
    shape = one.shapes["w"]
    dense = torch.arange(torch.Size(shape).numel()).reshape(shape)
    in_two = cut_tensor(cut_tensor(dense, one.kept["w"]), merged.relative_to(one).get("w", {}))
    assert torch.equal(in_two, cut_tensor(dense, merged.kept["w"]))
    assert tuple(in_two.shape) == merged.current_shape("w")


def test_full_plan_survives_json_state_dict_and_file(tmp_path):
    plan = example()
    plan.save(tmp_path / "plan.json")
    for again in (
        Plan.load(tmp_path / "plan.json"),
        Plan.from_dict(plan.to_dict()),
        Plan.from_state_dict(plan.state_dict()),
    ):
        assert again == plan
        assert again.attributes["ln"]["normalized_shape"] == (3,)
        assert again.groups["conv"] == (3, 4)


def test_masks_are_saved_as_one_bit_per_entry():
    plan = Plan(masks={"w": torch.ones(100, 80, dtype=torch.bool)}, shapes={"w": (100, 80)})
    assert plan.state_dict()["masks"]["w"].numel() == 1000
    assert len(plan.to_dict()["masks"]["w"]) == 1336  # base64: 4 letters for 3 bytes, rounded up


def test_scalar_mask_survives():
    plan = Plan(masks={"scale": torch.tensor(False)}, shapes={"scale": ()})
    assert Plan.from_dict(plan.to_dict()) == plan


def changed(state, path, value):
    """Return a copy of nested dicts with one entry replaced."""
    if not path:
        return value
    return {**state, path[0]: changed(state.get(path[0], {}), path[1:], value)}


FC_MASK = base64.b64encode(b"\xb6").decode()  # the 8 bits of example()'s mask: 1011 0110


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (["version"], 2, "wanted format version 1, got 2"),
        (["version"], True, "wanted format version 1, got True"),
        (["extra"], {}, "section 'extra' is unknown"),
        (["kept"], [], "kept must be a mapping"),
        (["kept", "conv.weight", "0"], [0, 10**30], "conv.weight"),
        (["kept", "conv.weight", "0"], [0, 4], "conv.weight"),
        (["kept", "conv.weight", "0"], [0, True], "conv.weight"),
        (["kept", "conv.weight", "0"], [1, 0], "conv.weight"),
        (["kept", "conv.weight", "0"], [], "conv.weight"),
        (["kept", "conv.weight", "0"], "0,1", "conv.weight"),
        (["kept", "conv.weight", "0"], [0] * 5, "conv.weight"),
        (["kept", "conv.weight", "4"], [0], "no dim '4'"),
        (["kept", "conv.weight", "-1"], [0], "no dim '-1'"),
        (["kept", "conv.weight", "00"], [0], "no dim '00'"),
        (["kept", "unknown"], {"0": [0]}, "'unknown' is named without its dense shape"),
        (["masks", "fc.weight"], "", "fc.weight"),
        (["masks", "fc.weight"], "!!!!", "fc.weight"),
        (["masks", "fc.weight"], FC_MASK[:-1], "fc.weight"),
        (["masks", "fc.weight"], [1, 0], "fc.weight"),
        (["shapes", "fc.weight"], [2**40, 2**40], "fc.weight"),
        (["shapes", "fc.weight"], [2, -4], "fc.weight"),
        (["shapes", "fc.weight"], [2, 4.0], "fc.weight"),
        (["shapes", "fc.weight"], [2**20, 2**20], "fc.weight"),
        (["shapes", "fc.weight"], 8, "fc.weight"),
        (["attributes", "conv"], {"out_channels": "3"}, "out_channels"),
        (["attributes", "ln"], {"normalized_shape": [[3]]}, "normalized_shape"),
        (["groups", "conv"], [3], "conv"),
        (["groups", "conv"], [3, 4, 5], "conv"),
        (["ranks", "fc"], 1.5, "fc"),
        (["ranks", "fc"], True, "fc"),
        ([], None, "must be a mapping"),
        ([], {"version": 1}, "missing"),
    ],
)
def test_hostile_json_is_refused_by_name(path, value, match):
    with pytest.raises(IncompatibleCheckpoint, match=match):
        Plan.from_dict(changed(example().to_dict(), path, value))


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        # 2**40 entries in 8 bytes of memory, if copied they would be 8 TiB
        (["kept", "conv.weight", "0"], torch.zeros(1, dtype=torch.long).expand(2**40), "conv.weight"),
        (["masks", "fc.weight"], torch.zeros(1, dtype=torch.uint8).expand(2**40), "fc.weight"),
        (["kept", "conv.weight", "0"], torch.zeros(2, dtype=torch.long, device="meta"), "conv.weight"),
        (["kept", "conv.weight", "0"], index(0, 1).to_sparse(), "conv.weight"),
        (["kept", "conv.weight", "0"], torch.tensor([0.0, 1.0]), "conv.weight"),
        (["kept", "conv.weight", "0"], index(2, 1), "conv.weight"),
        (["kept", "conv.weight", "0"], index(0, 2**41), "conv.weight"),
        (["kept", "conv.weight", "0"], [0, 1], "conv.weight"),
        (["masks", "fc.weight"], torch.zeros(2, dtype=torch.uint8), "holds 2 bytes"),
        (["masks", "fc.weight"], torch.zeros(8, dtype=torch.bool), "fc.weight"),
    ],
    ids=lambda value: None,
)
def test_hostile_state_dict_is_refused_by_name(path, value, match):
    state = example().state_dict()
    state = changed(state, ["shapes", "conv.weight"], [2**41, 2, 1, 1]) if "conv.weight" in path else state
    with pytest.raises(IncompatibleCheckpoint, match=match):
        Plan.from_state_dict(changed(state, path, value))


def test_bits_beyond_the_last_entry_of_a_mask_are_refused():
    # 4 entries in a byte: the low 4 bits must be 0, else two files would say the same plan
    plan = Plan(masks={"w": torch.ones(4, dtype=torch.bool)}, shapes={"w": (4,)})
    state = plan.to_dict()
    assert state["masks"]["w"] == base64.b64encode(b"\xf0").decode()
    with pytest.raises(IncompatibleCheckpoint, match="beyond the last entry"):
        Plan.from_dict(changed(state, ["masks", "w"], base64.b64encode(b"\xf1").decode()))


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"version": 1}', b"9" * 10_000])
def test_file_that_is_no_plan_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "odd.json").write_bytes(text)
    with pytest.raises(IncompatibleCheckpoint, match=r"odd\.json"):
        Plan.load(tmp_path / "odd.json")


def test_digests_tell_what_two_plans_say_differently():
    def plan(index, mask, count):
        return Plan(
            kept={"a": {0: torch.tensor(index)}}, masks={"b": torch.tensor(mask)}, groups={"g": (count, 4)},
            shapes={"a": (4, 2), "b": (2,)},
        )  # fmt: skip

    base = plan([0, 2], [True, False], 2).digests()
    assert base.keys() == {"a", "b", "g"}
    assert all(0 <= value < 2**62 for value in base.values())
    for other, name in ((plan([0, 3], [True, False], 2), "a"), (plan([0, 2], [False, True], 2), "b")):
        assert [key for key in base if other.digests()[key] != base[key]] == [name]
    assert plan([0, 2], [True, False], 2).digests() == base
    assert plan([0, 2], [True, False], 3).digests()["g"] != base["g"]


def test_state_dict_has_equal_indices_once_and_none_of_the_plans_own():
    index = torch.tensor([0, 2])
    plan = Plan(kept={"a": {0: index}, "b": {1: index.clone()}}, shapes={"a": (3,), "b": (4, 3)})
    state = plan.state_dict()
    assert state["kept"]["a"]["0"] is state["kept"]["b"]["1"]
    state["kept"]["a"]["0"][0] = 1
    assert plan.kept["a"][0].tolist() == [0, 2]
    assert plan.kept["b"][1].tolist() == [0, 2]


def test_index_that_fits_one_of_two_tensors_that_share_it_is_refused():
    index = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"'b' must be sorted, unique and in \[0, 2\)"):
        Plan(kept={"a": {0: index}, "b": {0: index}}, shapes={"a": (3,), "b": (2,)})
