import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.factorise import candidates
from lightning_prune.wiring import NormBehind, wiring


def seen(model, *shape):
    return wiring(model, torch.randn(*shape), candidates(model)[0])


def behind(name, scale=True):
    return NormBehind(f"{name}.weight" if scale else None, f"{name}.running_var", 1e-5)


def test_norms_are_paired_by_data_flow_not_by_order(net):
    layers = {
        "a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3),
        "behind_b": nn.BatchNorm2d(4), "behind_a": nn.BatchNorm2d(4),
    }  # fmt: skip
    model = net(lambda n, x: n.behind_b(n.b(F.relu(n.behind_a(n.a(x))))), **layers)
    assert seen(model, 2, 3, 8, 8).norms == {"a": behind("behind_a"), "b": behind("behind_b")}


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.norm(n.conv(x).relu()),
        lambda n, x: (lambda y: n.norm(y) + y)(n.conv(x)),
        lambda n, x: (lambda y: (n.norm(y), y))(n.conv(x)),
        lambda n, x: n.norm(n.conv(x) + x),
        lambda n, x: (n.norm(n.conv(x)), n.other(n.conv(x))),
        lambda n, x: n.conv(n.norm(x)),
    ],
    ids=["activation between", "read twice", "an output", "added", "two norms", "norm before"],
)
def test_layer_that_a_norm_does_not_read_alone_has_none(net, forward):
    layers = {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4)}
    assert seen(net(forward, **layers), 2, 4, 5, 5).norms == {}


def test_layer_that_is_called_twice_in_front_of_one_norm_has_it(net):
    model = net(lambda n, x: n.norm(n.conv(x)) + n.norm(n.conv(2 * x)), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    assert seen(model, 2, 4, 5, 5).norms == {"conv": behind("norm")}


def test_norm_without_scale_is_one_and_one_without_statistics_is_none(net):
    def forward(n, x):
        own = F.batch_norm(n.c(x), n.norm.running_mean, n.norm.running_var, training=True)
        return n.norm(n.a(x)), n.still(n.b(x)), own

    norm, still = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)
    layers = {name: nn.Conv2d(4, 4, 1) for name in "abc"}
    model = net(forward, **layers, norm=norm, still=still)
    assert seen(model, 2, 4, 5, 5).norms == {"a": behind("norm", scale=False)}


def test_norm_of_tokens_is_not_of_a_linear_layers_outputs(net):
    # (B, L, C) into BatchNorm1d: its channels are the L tokens, here as many as features
    layers = {"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}
    assert seen(net(lambda n, x: n.norm(n.fc(x)), **layers), 2, 4, 4).norms == {}
    assert seen(net(lambda n, x: n.norm(n.fc(x)), **layers), 2, 4).norms == {"fc": behind("norm")}


def test_weight_that_is_read_past_its_layer_is_told(net):
    def forward(n, x):
        return n.tied(F.linear(x, n.read.weight.t())) + n.called(x) + x.new_zeros(n.called.weight.shape)

    layers = {name: nn.Linear(4, 4) for name in ("read", "tied", "called")}
    assert seen(net(forward, **layers), 4, 4).bypassed == {"read"}


def test_layers_behind_which_is_no_other_are_the_last(net):
    def forward(n, x):
        stream = n.stem(x)
        stream = stream + n.block(stream)
        return F.log_softmax(n.head(stream), dim=1), n.aux(stream).sigmoid(), stream

    layers = {name: nn.Linear(4, 4) for name in ("stem", "block", "head", "aux")}
    assert seen(net(forward, **layers), 2, 4).last == {"head", "aux"}


def test_nothing_about_the_model_changes(net):
    model = net(lambda n, x: n.norm(n.conv(x)), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    handle = model.conv.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen(model, 2, 3, 5, 5)
    assert model.training
    assert len(model.conv._forward_hooks) == 1
    assert len(model.conv._forward_pre_hooks) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    handle.remove()


def test_hooks_go_when_the_model_raises(net):
    def forward(n, x):
        n.conv(x)
        raise ArithmeticError("the user's own mistake")

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(ArithmeticError, match="the user's own mistake"):
        seen(model, 2, 3, 5, 5)
    assert len(model.conv._forward_hooks) == len(model.conv._forward_pre_hooks) == 0
