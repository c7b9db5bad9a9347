import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from lightning_prune import ChannelPruner, count, cut, loss_changes, rank_correlation, trace
from lightning_prune.methods import discover
from tests.conftest import Net, with_random_norms
from tests.nets import NETS


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def changes_by_parameters(model, graph, x, y, loss):
    """Group -> (C,) change of the loss when the readers' weights of one channel are zero."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        before = loss(model, (x, y))
        out = {}
        for group in graph.groups:
            found = []
            for channel in range(group.size):
                saved = [(parameters[c.weight], parameters[c.weight].clone()) for c in group.consumers]
                for c in group.consumers:
                    parameters[c.weight].index_fill_(c.dim, c.indices[channel], 0)
                found.append(loss(model, (x, y)) - before)
                for parameter, value in reversed(saved):
                    parameter.copy_(value)
            out[group.name] = torch.stack(found).double()
    return out


def test_change_of_a_net_that_fits_in_the_head():
    # out = 2 relu(x) + 3 relu(-x), target 2: at x = 1 out 2, loss 0; without the first 0, loss 4; without the second 0
    # at x = -2 out 6, loss 16; without the first the same; without the second 0, loss 4, 12 less
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.Linear(1, 2, bias=False), b=nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net.b.weight.copy_(torch.tensor([[2.0, 3.0]]))
    graph = trace(net, torch.zeros(1, 1))
    batches = [(torch.tensor([[x]]), torch.tensor([[2.0]])) for x in (1.0, -2.0)]
    got = loss_changes(net, graph, batches, squared)["a"]
    assert got.tolist() == [2.0, -6.0]
    assert got.dtype == torch.float64


@pytest.mark.parametrize("name", ["squeeze_excite", "padded_shortcuts", "unet", "conv3d", "several_inputs"])
def test_change_equals_that_of_zeroing_the_readers_weights(name):
    torch.manual_seed(0)
    model, inputs = with_random_norms(NETS[name].build()).double().eval(), NETS[name].inputs(2)
    graph = trace(model, inputs)
    inputs = torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)

    def loss(model, batch):
        out = model(**batch[0]) if isinstance(batch[0], dict) else model(batch[0])
        return out.square().mean()

    expected = changes_by_parameters(model, graph, inputs, None, loss)
    got = loss_changes(model, graph, [(inputs, None)], loss)
    assert got.keys() == expected.keys()
    assert len(got) > 1
    for group, change in expected.items():
        assert torch.allclose(got[group], change, rtol=1e-9, atol=1e-12)


def test_change_is_that_of_really_cutting_the_channel(cifar_net):
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = (x, torch.arange(6) % 3)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    model = cifar_net().eval()
    graph = trace(model, x)
    got = loss_changes(model, graph, [batch], loss)
    for name, changes in got.items():
        smaller = cifar_net().eval()
        other = trace(smaller, x)
        keep = torch.arange(len(changes)) != 1
        cut(smaller, other.plan({name: keep}), graph=other, absorb=False)
        assert count(smaller, x).flops < count(model, x).flops
        assert changes[1].item() == pytest.approx((loss(smaller, batch) - loss(model, batch)).item(), abs=1e-6)


def test_batches_count_by_their_samples(cifar_net):
    x = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(7) % 3
    model = cifar_net()
    graph = trace(model, x)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    whole = loss_changes(model, graph, [(x, y)], loss)
    parts = loss_changes(model, graph, zip(x.split([2, 5]), y.split([2, 5]), strict=True), loss)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)
    assert max(change.abs().max() for change in whole.values()) > 1e-3


def test_nothing_of_the_model_changes(tiny_net):
    model = with_random_norms(tiny_net()).train()
    model.norm1.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    batch = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3)
    graph = trace(model, model.example_input_array)
    modes = []

    def loss(model, batch):
        modes.append(any(module.training for module in model.modules()))
        return F.cross_entropy(model(batch[0]), batch[1])

    loss_changes(model, graph, [batch], loss)
    assert modes == [False] * (1 + 6 + 12 + 12)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not model.norm1.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_batch_and_a_loss_that_is_not_finite_are_refused(tiny_net):
    model = tiny_net()
    graph = trace(model, model.example_input_array)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        loss_changes(model, graph, [], squared)
    with pytest.raises(ValueError, match="the loss of a batch of 2 samples is nan with all channels there"):
        loss_changes(model, graph, [torch.zeros(2, 1)], lambda model, batch: batch.sum() * math.nan)


def test_correlation_is_of_ranks_with_absolute_changes():
    # changes 0.1, 0.2, 0.3, 0.4 in size: ranks of "a" 1 2 and 1 2, of "b" 3 4 against 4 3
    scores = {"a": torch.tensor([0.0, 5.0]), "b": torch.tensor([9.0, 7.0])}
    changes = {"a": torch.tensor([0.1, -0.2]), "b": torch.tensor([-0.3, 0.4])}
    got = rank_correlation(scores, changes)
    assert got.groups == pytest.approx({"a": 1.0, "b": -1.0})
    assert got.mean == pytest.approx(0.0)
    assert got.overall == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))


def test_correlation_equals_scipys_with_ties():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(4, (30,), generator=generator).float()
    change = torch.randn(30, generator=generator)
    got = rank_correlation({"a": score}, {"a": change, "unscored": change})
    assert got.overall == got.mean == pytest.approx(spearmanr(score, change.abs()).statistic)


def test_group_of_equal_scores_has_no_correlation_and_is_left_out_of_the_mean():
    scores = {"a": torch.ones(3), "b": torch.tensor([1.0, 2.0, 3.0])}
    got = rank_correlation(scores, {name: torch.tensor([0.1, 0.2, 0.3]) for name in scores})
    assert math.isnan(got.groups["a"])
    assert got.mean == pytest.approx(1.0)
    assert math.isnan(rank_correlation({"a": torch.ones(3)}, {"a": torch.ones(3)}).mean)


def test_scores_of_other_groups_or_sizes_are_refused():
    with pytest.raises(ValueError, match="scores of groups a and changes of b have none in common"):
        rank_correlation({"a": torch.ones(3)}, {"b": torch.ones(3)})
    with pytest.raises(ValueError, match=r"group 'a' has scores of shape \(3,\) and changes of shape \(2,\)"):
        rank_correlation({"a": torch.ones(3)}, {"a": torch.ones(2)})


@pytest.mark.filterwarnings("ignore::UserWarning")  # methods may say that 64 images are few for them
def test_example_judges_every_channel_method(monkeypatch, capsys, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "oracle.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--fast", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert "224 channels in 6 groups, 64 images" in out
    methods = [name for name, method in discover().items() if issubclass(method, ChannelPruner)]
    assert [name for name in methods if f"| {name} " not in out] == []
    table = (tmp_path / "oracle.csv").read_text().splitlines()
    assert table[0] == "method,all channels,within groups"
    assert {line.split(",")[0] for line in table[1:]} == set(methods)
    assert (tmp_path / "oracle.png").stat().st_size > 10_000
