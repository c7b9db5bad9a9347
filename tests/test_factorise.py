import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import Plan, conform, cut, load_pruned
from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.factorise import (
    candidates,
    factorise,
    factors,
    follow,
    in_form_of,
    is_pair,
    matrix_of,
    merged,
    pair,
    put_back,
    refusal,
    spectrum,
    trial,
)


def low_rank(layer, rank):
    """The layer with a weight of that rank."""
    matrix = layer.weight.detach().flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_(((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(layer.weight.shape))
    return layer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (1, 6)])
def test_spectrum_is_what_a_singular_value_decomposition_says(shape):
    matrix = torch.randn(shape)
    values, vectors = spectrum(matrix)
    left, wanted, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(values, wanted, atol=1e-7)
    side = left if shape[0] <= shape[1] else right.T
    assert torch.allclose((vectors * side).sum(dim=0).abs(), torch.ones(min(shape), dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_factors_are_the_nearest_product_and_share_the_singular_values(shape, rank):
    matrix = torch.randn(shape)
    first, second = factors(matrix, rank)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert first.shape == (rank, shape[1])
    assert second.shape == (shape[0], rank)
    assert torch.allclose(second @ first, (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-7)
    # sqrt(sigma) V^T and U sqrt(sigma): each has rows, or columns, of length sqrt(sigma)
    assert torch.allclose(first.norm(dim=1), values[:rank].sqrt())
    assert torch.allclose(second.norm(dim=0), values[:rank].sqrt())


def test_factors_of_zeros_are_zeros():
    first, second = factors(torch.zeros(3, 5), 2)
    assert first.count_nonzero() == second.count_nonzero() == 0


@pytest.mark.parametrize("rank", [0, 4])
def test_factors_of_an_impossible_rank_are_refused(rank):
    with pytest.raises(ValueError, match=rf"a \(3, 5\) matrix has a rank from 1 to 3, wanted {rank}"):
        factors(torch.zeros(3, 5), rank)


LAYERS = {
    "strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 9, 9)),
    "dilated": (nn.Conv2d(6, 8, 3, dilation=2, padding=2, bias=False), (6, 9, 9)),
    "row": (nn.Conv2d(6, 8, (1, 3), padding=(0, 1)), (6, 9, 9)),
    "reflecting": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (6, 9, 9)),
    "same": (nn.Conv2d(6, 8, 3, padding="same"), (6, 9, 9)),
    "pointwise, wide": (nn.Conv2d(4, 20, 1), (4, 5, 5)),
    "1d": (nn.Conv1d(6, 8, 3, stride=2), (6, 11)),
    "3d": (nn.Conv3d(2, 8, 3, padding=1), (2, 4, 4, 4)),
    "linear": (nn.Linear(7, 9), (7,)),
    "linear of tokens": (nn.Linear(7, 9, bias=False), (5, 7)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_two_layers_compute_what_the_low_rank_one_did(kind):
    layer, shape = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    model = nn.Sequential(low_rank(layer, 3))
    x = torch.randn(2, *shape)
    wanted = model(x)
    (done,) = factorise(model, {"0": 3})
    first, second = model[0]
    assert (done.old, done.new) == (layer, model[0])
    assert type(model[0]) is nn.Sequential
    assert type(first) is type(second) is type(layer)
    assert first.bias is None
    assert second.bias is layer.bias
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert is_pair(model[0])
    again = merged(model[0])
    assert type(again) is type(layer)
    assert again.extra_repr() == layer.extra_repr()
    assert torch.allclose(again.weight, layer.weight, atol=1e-6)
    assert torch.allclose(again(x), wanted, atol=1e-5)


def test_a_full_weight_loses_exactly_its_smaller_singular_values():
    layer = nn.Linear(6, 5)
    model = nn.Sequential(copy.deepcopy(layer))
    factorise(model, {"0": 2})
    lost = matrix_of(layer) - matrix_of(merged(model[0]))
    values = torch.linalg.svdvals(matrix_of(layer))
    assert torch.allclose(torch.linalg.svdvals(lost)[:3], values[2:], atol=1e-5)


def test_two_layers_keep_type_mode_training_and_hooks():
    seen = []
    layer = nn.Linear(6, 5).double().eval()
    layer.weight.requires_grad_(False)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model = nn.Sequential(layer)
    factorise(model, {"0": 2})
    assert [p.dtype for p in model.parameters()] == [torch.float64] * 3
    assert [p.requires_grad for p in model.parameters()] == [False, False, True]
    assert [m.training for m in model[0].modules()] == [False] * 3
    x = torch.zeros(2, 6, dtype=torch.float64)
    model(x)
    handle.remove()
    model(x)
    assert seen == [(2, 5)]


def test_factorising_and_back_draws_no_random_number():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    before = torch.get_rng_state()
    factorise(model, {"0": 2})
    merged(model[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_put_back_undoes_it():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    before = dict(model.items())
    done = factorise(model, {"b": 1, "a": 2})
    assert [key for key, _ in model.items()] == ["a", "b"]
    put_back(model, done)
    assert dict(model.items()) == before


def test_factorising_what_is_not_there_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2))
    for name, why in (("9", "there is none"), ("1", "it is no layer"), ("2", "its 2 groups are thin already")):
        with pytest.raises(ValueError, match=f"layer '{name}' of Sequential cannot become two of rank 1: {why}"):
            factorise(model, {"0": 1, name: 1})
    with pytest.raises(ValueError, match=r"layer '0': a \(4, 4\) matrix has a rank from 1 to 4, wanted 5"):
        factorise(model, {"0": 5})
    assert type(model[0]) is nn.Linear


def test_layers_that_cannot_become_two_say_why():
    class Own(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.good = nn.Linear(4, 4)
            self.own = Own(4, 4)
            self.grouped = nn.Conv2d(4, 4, 3, groups=4)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.twice = self.again = nn.Linear(4, 4)
            self.head = nn.Linear(4, 10)
            self.embedding = nn.Embedding(10, 4)
            self.head.weight = self.embedding.weight
            self.watched = nn.Linear(4, 4)
            self.watched.register_state_dict_pre_hook(lambda *_: None)

    found, why = candidates(Model())
    assert list(found) == ["good"]
    assert why == {
        "own": "a Own does not become two layers",
        "grouped": "its 4 groups are thin already",
        "normed": "a ParametrizedLinear does not become two layers",
        "twice": "the model has it under several names",
        "again": "the model has it under several names",
        "head": "other layers share its parameters",
        "watched": "it has hooks on its state dict, which knows no two layers",
    }
    assert candidates(nn.Linear(4, 4)) == ({}, {"": "it is the model itself"})


def test_layer_whose_weight_is_made_elsewhere_is_refused():
    pruned = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 3)
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    assert refusal(pruned) == refusal(patched) == "its weight, or its forward, is made by something else"


def test_what_only_looks_like_a_pair_is_none():
    good = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 5, 1))
    assert is_pair(good)
    for other in (
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 5, 1)),  # a bias between
        nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 5, 3)),
        nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 5, 1, stride=2)),
        nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 5, 1, padding=1)),
        nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 5, 1)),
        nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 5)),
        nn.ModuleList(good),
    ):
        assert not is_pair(other)


def test_optimizers_follow_with_a_fresh_state_and_the_old_one_of_the_bias():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}], 0.1, 0.9
    )
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].bias]["momentum_buffer"]
    follow([optimizer], factorise(model, {"0": 1}))
    first, second = model[0]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(first.weight), id(second.weight), id(second.bias)], [id(p) for p in model[1].parameters()]]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
    assert optimizer.state[second.bias]["momentum_buffer"] is momentum
    assert set(optimizer.state) == {second.bias, *model[1].parameters()}
    before = first.weight.detach().clone()
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(first.weight, before)


class Reads(nn.Module):
    """One layer is called; of the others something else is asked."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.asked = nn.Conv1d(4, 4, 1)
        self.trained = nn.Linear(4, 4)
        self.held = nn.Linear(4, 4)
        self.others = [self.held]
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        x = F.linear(self.called(x), self.read.weight)
        x = self.asked(x[:, :, None])[:, :, 0] * self.asked.out_channels
        x = self.norm(self.others[0](x)) + F.dropout(x, 0.5, self.training)
        return x + self.trained.bias.sum() if self.training else x + self.trained(x)


def test_trial_finds_what_a_model_asks_of_a_layer_beside_calling_it():
    model = Reads()
    found, _ = candidates(model)
    x, before, modules = torch.randn(3, 4), copy.deepcopy(model.state_dict()), list(model.modules())
    random = torch.get_rng_state()
    why = trial(model, x, found)
    assert set(why) == {"read", "asked", "trained", "held"}
    assert "has no attribute 'weight'" in why["read"]
    assert "has no attribute 'out_channels'" in why["asked"]
    assert "has no attribute 'bias'" in why["trained"]
    assert why["held"] == "the model does not call 'held' where it stands"
    assert list(model.modules()) == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_trial_finds_the_fast_path_that_reads_weights():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found, frozen = candidates(model)
    why = trial(model, torch.randn(2, 3, 8), found)
    assert set(why) == {"linear1", "linear2"}
    assert frozen["self_attn.out_proj"].startswith("a NonDynamicallyQuantizableLinear")
    assert torch.backends.mha.get_fastpath_enabled()


def test_trial_leaves_out_a_train_mode_that_wants_targets():
    class WantsTargets(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, target=None):
            out = self.layer(x)
            return (out - target).square().sum() if self.training else out

    model = WantsTargets()
    assert trial(model, torch.randn(2, 4), {"layer": model.layer}) == {}


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_conform_gives_a_whole_model_the_two_layers_of_a_state():
    shipped = Net()
    factorise(shipped, {"conv": 2})
    model = Net()
    before = model.fc.weight
    conform(model, shipped.state_dict()).load_state_dict(shipped.state_dict())
    assert torch.equal(model(X), shipped(X))
    assert model.fc.weight is before


def test_conform_gives_a_factorised_model_the_one_layer_of_a_state():
    whole, model = Net(), Net()
    factorise(model, {"conv": 2, "fc": 3})
    wanted = model(X)
    conform(model, whole.state_dict())
    assert type(model.conv) is nn.Conv2d
    assert torch.allclose(model(X), wanted, atol=1e-5)  # until the state is loaded it computes what it did
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model(X), whole(X))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_conform_changes_ranks(before, after):
    shipped, model = Net(), Net()
    factorise(shipped, {"conv": after})
    factorise(model, {"conv": before})
    conform(model, shipped.state_dict()).load_state_dict(shipped.state_dict())
    assert torch.equal(model(X), shipped(X))
    assert model.conv[0].out_channels == model.conv[1].in_channels == after


def test_conform_with_a_plan_factorises_the_values_that_are_there():
    model = Net()
    low_rank(model.conv, 2)
    wanted = model(X)
    conform(model, Plan(ranks={"conv": 2}))
    assert is_pair(model.conv)
    assert torch.allclose(model(X), wanted, atol=1e-5)
    conform(model, Plan(ranks={"conv": 2}))  # it is there already
    assert is_pair(model.conv)
    with pytest.raises(IncompatibleCheckpoint, match=r"plan is not of a Net: layer 'other' of Net .* there is none"):
        conform(model, Plan(ranks={"other": 2}))


def test_state_of_another_architecture_changes_no_form():
    shipped = Net()
    factorise(shipped, {"conv": 2})
    state = shipped.state_dict()
    model = Net()
    layer = model.conv
    with pytest.raises(IncompatibleCheckpoint, match=r"lacks \['fc.weight'\]"):
        conform(model, {name: value for name, value in state.items() if name != "fc.weight"})
    with pytest.raises(IncompatibleCheckpoint, match=r"'conv' has shape .* in the model, and .* in the state"):
        conform(model, {**state, "conv.1.weight": torch.zeros(6, 3, 1, 1)})
    wide = Net(width=9)
    factorise(wide, {"conv": 2})
    with pytest.raises(IncompatibleCheckpoint, match="which pruning never makes"):
        conform(model, wide.state_dict())
    assert model.conv is layer


def test_form_stays_when_what_follows_fails():
    model = Net()
    layer = model.conv
    shapes = {"conv.0.weight": (2, 3, 3, 3), "conv.1.weight": (6, 2, 1, 1)}
    seen = []

    def load():
        with in_form_of(model, shapes):
            seen.append(is_pair(model.conv))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        load()
    assert seen == [True]
    assert model.conv is layer


def test_ranks_are_not_cut():
    with pytest.raises(ValueError, match=r"ranks are not cut: lightning_prune.conform\(model, plan\)"):
        cut(Net(), Plan(ranks={"conv": 2}))


def test_factorised_network_exports_like_any_other():
    model = Net().eval()
    factorise(model, {"conv": 2, "fc": 1})
    exported = torch.export.export(model, (X,)).module()
    assert torch.allclose(exported(X), model(X), atol=1e-6)
    assert {type(m).__module__.partition(".")[0] for m in model.children() for m in m.modules()} == {"torch"}


def test_whole_and_factorised_networks_pickle(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6))
    factorise(model, {"0": 2})
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))


def test_pair_of_a_layer_in_half_precision_stays_so():
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    first, second = factors(matrix_of(layer), 2)
    made = pair(layer, first, second)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


def test_load_pruned_takes_both_forms(fit, tiny_net, tmp_path):
    trainer = fit(max_epochs=1)
    model = trainer.lightning_module
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    factorise(model, {"conv1": 3, "hidden": 2})
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    x = torch.randn(2, 1, 8, 8)
    loaded = load_pruned(tiny_net, tmp_path / "two.ckpt")
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert type(load_pruned(tiny_net, tmp_path / "whole.ckpt").conv1) is nn.Conv2d
