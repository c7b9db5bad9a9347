import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import NISP, Budget, OneShot, cut, trace
from lightning_prune.errors import NonFiniteScore
from lightning_prune.methods.nisp import inf_fs
from tests.conftest import Net, with_random_norms
from tests.nets import NETS


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def method_for(batches, keep=0.5, **settings):
    """Without a Trainer; the loss runs the model and says nothing."""
    settings.setdefault("loss_fn", lambda model, batch: model(batch).sum())
    return NISP(keep, calibration=batches, **settings)


def importance(model, batches, **settings):
    """group -> (C,) before anything is chosen."""
    return method_for(batches, 1.0, **settings).scores_for(trace(model, batches[0]))


def test_inf_fs_worked_example():
    # Spearman's correlations 0.8, -0.4, -0.2; A = (0 .6 .3; .6 .5 .9; .3 .9 0) with radius 1.479271
    x = torch.tensor([[1.0, 2.0, 4.0], [2.0, 4.0, 1.0], [3.0, 8.0, 3.0], [4.0, 6.0, 2.0]])
    assert inf_fs(x).tolist() == pytest.approx([6.131553, 11.283000, 8.027435], rel=1e-6)


def test_inf_fs_is_the_sum_over_paths_of_all_lengths():
    a = torch.tensor([[0.0, 0.6, 0.3], [0.6, 0.5, 0.9], [0.3, 0.9, 0.0]], dtype=torch.float64) * (0.9 / 1.479271)
    paths = sum(torch.linalg.matrix_power(a, length) for length in range(1, 400)).sum(1)
    x = torch.tensor([[1.0, 2.0, 4.0], [2.0, 4.0, 1.0], [3.0, 8.0, 3.0], [4.0, 6.0, 2.0]])
    assert inf_fs(x).tolist() == pytest.approx(paths.tolist(), rel=1e-5)


@pytest.mark.parametrize(("factor", "score"), [(0.9, 9.0), (0.99, 99.0)])
def test_two_features_that_spread_alike_score_factor_over_one_minus_factor(factor, score):
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 4.0], [4.0, 3.0]])
    assert inf_fs(x, factor=factor).tolist() == pytest.approx([score, score])


def test_alpha_weighs_the_spread_against_the_lack_of_correlation():
    # features 1 and 2 go together, feature 3 is on its own but spreads least
    x = torch.tensor([[0.0, 0.0, 1.0], [10.0, 9.0, 2.0], [20.0, 18.0, 1.5], [30.0, 27.0, 1.0]])
    assert inf_fs(x, alpha=1.0).argmin() == 2
    assert inf_fs(x, alpha=0.0).argmax() == 2


def test_constant_feature_scores_nothing_though_nothing_goes_with_it():
    scores = inf_fs(torch.tensor([[1.0, 1.0, 5.0], [2.0, 3.0, 5.0], [3.0, 2.0, 5.0]]))
    assert scores[2] == 0
    assert scores[:2].min() > 0


def test_features_that_nothing_tells_apart_score_alike():
    assert inf_fs(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])).tolist() == [1.0, 1.0]
    assert inf_fs(torch.tensor([[1.0], [2.0]])).tolist() == [1.0]


def test_equal_values_share_the_mean_of_their_ranks():
    # ranks (1.5 1.5 3 4) and (1 2 3 4): correlation 0.9487; counting ties in order would make it 1 and all scores 1
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 3.0], [4.0, 4.0]], dtype=torch.float64)
    x = x * torch.tensor([1.0, x[:, 0].std() / x[:, 1].std()])
    assert inf_fs(x).tolist() == pytest.approx([9.0, 9.0])


def test_one_sample_is_not_enough():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        inf_fs(torch.ones(1, 3))


def two_hidden():
    """Linear layers 2-3-2 in front of the output layer, with ReLUs."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[2].weight[:] = torch.tensor([[1.0, -2.0, 0.0], [0.5, 1.0, -1.0]])
    return model


def test_scores_start_at_the_responses_and_go_back_through_absolute_weights():
    model, x = two_hidden(), rows(40, 2)
    scores = importance(model, [x])
    response = inf_fs(model[:4](x).detach())
    assert torch.allclose(scores["2"], response)
    assert torch.allclose(scores["0"], model[2].weight.detach().abs().double().T @ response)


def test_unit_that_nothing_reads_scores_0_and_goes_first():
    model, x = two_hidden(), rows(40, 2)
    model[2].weight.data[:, 1] = 0
    scores = importance(model, [x])
    assert scores["0"][1] == 0
    graph = trace(model, x)
    plan = method_for([x], Budget(0.8, of="units")).plan_for(graph)
    assert plan.kept["0.weight"][0].tolist() == [0, 2]


def test_choice_goes_on_from_what_was_chosen_behind_it():
    # behind them the first unit reads 0, 1 with weight 1; the second reads 2, 3 with weight 3, but varies less and goes
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)), rows(60, 3)
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0], [1.0], [0.1], [0.1]]) * rows(4, 3, seed=3)
        model[2].weight[:] = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]])
        model[2].bias[:] = 0
        first, second = inf_fs(model[:4](x))
    assert second < first < 3 * second
    scores = importance(model, [x])["0"]
    assert scores.topk(2).indices.sort().values.tolist() == [2, 3]
    plan = method_for([x], Budget(0.5, of="units")).plan_for(trace(model, x))
    assert plan.kept["2.weight"][0].tolist() == [0]
    assert plan.kept["0.weight"][0].tolist() == [0, 1]


def stream_net():
    def forward(n, x):
        x = F.relu(n.norm0(n.stem(x)))
        x = F.relu(x + n.norm2(n.conv2(F.relu(n.norm1(n.conv1(x))))))
        return n.fc(x.mean((2, 3)))

    return with_random_norms(
        Net(
            forward, stem=nn.Conv2d(1, 4, 3, padding=1), norm0=nn.BatchNorm2d(4), conv1=nn.Conv2d(4, 6, 1),
            norm1=nn.BatchNorm2d(6), conv2=nn.Conv2d(6, 4, 1), norm2=nn.BatchNorm2d(4), fc=nn.Linear(4, 3),
        )
    )  # fmt: skip


def scale(norm):
    return norm.weight.abs().double() / (norm.running_var.double() + norm.eps).sqrt()


def test_stream_has_one_score_the_sum_over_all_tensors_that_are_added():
    torch.manual_seed(0)
    model, x = stream_net().eval(), rows(16, 1, 4, 4)
    scores = importance(model, [x])
    with torch.no_grad():
        entered = F.relu(model.norm0(model.stem(x)))
        entered = F.relu(entered + model.norm2(model.conv2(F.relu(model.norm1(model.conv1(entered))))))
        s2 = inf_fs(entered.mean((2, 3)))  # at the second tensor, all positions together
        through2 = model.conv2.weight.abs().double().flatten(1).T @ (scale(model.norm2) * s2)
        through1 = model.conv1.weight.abs().double().flatten(1).T @ (scale(model.norm1) * through2)
        s1 = s2 + through1  # at the first, over the shortcut and through the block
    assert torch.allclose(scores["conv1"], through2)
    assert torch.allclose(scores["stem"], s1 + s2)


def test_streams_can_be_left_alone():
    model, x = stream_net().eval(), rows(16, 1, 4, 4)
    method = method_for([x], Budget(0.9, of="units"), streams=False)
    plan = method.plan_for(trace(model, x))
    assert list(plan.groups) == ["conv1"]
    assert method._frozen["stem"] == "2 layers make its channels together, which streams=False leaves alone"


def test_depthwise_and_squeeze_excite_have_one_score_behind_the_depthwise_norm():
    def forward(n, x):
        x = n.deep(n.wide(x))
        return n.fc(n.out(x * torch.sigmoid(n.up(F.relu(n.down(x.mean((2, 3), keepdim=True)))))).mean((2, 3)))

    def conv(ins, outs, **options):
        return nn.Sequential(nn.Conv2d(ins, outs, 1, **options), nn.BatchNorm2d(outs), nn.ReLU())

    net = Net(
        forward, wide=conv(1, 6), deep=conv(6, 6, groups=6), down=nn.Conv2d(6, 2, 1), up=nn.Conv2d(2, 6, 1),
        out=conv(6, 4), fc=nn.Linear(4, 3),
    )  # fmt: skip
    model, x = with_random_norms(net).eval(), rows(16, 1, 3, 3)
    scores = importance(model, [x])
    out = scale(model.out[1])[:, None] * model.out[0].weight.detach().abs().double().flatten(1)
    read = out.T @ scores["out.0"]  # at the product; the gate's branch gets it too
    gate = model.up.weight.detach().abs().double().flatten(1).T @ read
    back = model.down.weight.detach().abs().double().flatten(1).T @ gate
    assert torch.allclose(scores["wide.0"], read + back)


def test_concatenated_branches_are_scored_by_their_own_slice():
    model = Net(
        lambda n, x: n.fc(torch.cat([F.relu(n.a(x)), F.relu(n.b(x))], 1)), a=nn.Linear(3, 4), b=nn.Linear(3, 5),
        fc=nn.Linear(9, 2),
    )  # fmt: skip
    x = rows(30, 3)
    with torch.no_grad():
        response = inf_fs(torch.cat([F.relu(model.a(x)), F.relu(model.b(x))], 1))
    scores = importance(model, [x])
    assert torch.allclose(torch.cat([scores["a"], scores["b"]]), response)


def test_removing_what_scores_0_changes_nothing_and_the_bound_holds_for_any_other():
    # s^T |change of the response| <= s_j |x_j|, here of the mean over samples
    torch.manual_seed(0)
    model, x = two_hidden(), rows(40, 2)
    model[2].weight.data[:, 1] = 0
    scores, response = importance(model, [x]), inf_fs(model[:4](x).detach())
    for unit in range(3):
        smaller = copy.deepcopy(model)
        graph = trace(smaller, x)
        cut(smaller, graph.plan({"0": torch.arange(3) != unit}), graph=graph, absorb=False)
        with torch.no_grad():
            change = ((model[:4](x) - smaller[:4](x)).abs().double() @ response).mean()
            bound = scores["0"][unit] * model[:2](x)[:, unit].abs().double().mean()
        assert change <= bound + 1e-6
    assert scores["0"][1] == 0


def test_scores_do_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model, x = stream_net(), rows(64, 1, 4, 4)
    first, second = (importance(model, x.split(size)) for size in (16, 64))
    assert all(torch.allclose(first[name], second[name], rtol=1e-5) for name in first)


def test_model_with_two_inputs_and_without_norms():
    net = NETS["several_inputs"]
    torch.manual_seed(0)
    scores = importance(net.build(), [net.inputs(8)], loss_fn=lambda model, batch: model(**batch).sum())
    assert list(scores) == ["image.0", "numbers", "fc1"]
    assert all(score.min() >= 0 and score.max() > 0 for score in scores.values())


def test_layer_whose_input_is_ranked_can_be_named():
    def forward(n, x):
        x = F.relu(n.a(x))
        return n.left(x), n.right(F.relu(n.b(x)))

    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 5), "left": nn.Linear(4, 2), "right": nn.Linear(5, 2)}
    model, x = Net(forward, **layers), rows(20, 3)

    def loss(model, batch):
        return sum(out.sum() for out in model(batch))

    with pytest.raises(
        ValueError, match=r"outputs must come from one layer, or final_layer= say which; there are left, r"
    ):
        importance(model, [x], loss_fn=loss)
    with pytest.raises(ValueError, match=r"final_layer='fc' must be the path of a layer; there are a, b, left, right"):
        importance(model, [x], loss_fn=loss, final_layer="fc")
    assert list(importance(model, [x], loss_fn=loss, final_layer="right")) == ["a", "b"]
    method = method_for([x], 1.0, loss_fn=loss, final_layer="left")
    assert list(method.scores_for(trace(model, x))) == ["a"]
    assert method._frozen["b"] == "nothing of it comes to 'left', whose input NISP ranks"


def test_function_that_importance_cannot_go_through_is_refused_before_training():
    net = NETS["fused_attention"]
    with pytest.raises(
        ValueError, match="how changes go through 'scaled_dot_product_attention', which the model calls"
    ):
        method_for([net.inputs(4)]).check(trace(net.build(), net.inputs(2)))


def test_batches_that_are_not_finite_are_left_out():
    model, x = two_hidden(), rows(40, 2)
    bad = torch.full((4, 2), torch.nan)
    scores = importance(model, [x, bad])
    expected = importance(model, [x])
    assert all(torch.equal(scores[name], expected[name]) for name in scores)
    with pytest.raises(NonFiniteScore, match="2 samples at least, got 0; 1 batches of this process were not finite"):
        importance(model, [bad])


def test_keep_gives_a_group_its_own_fraction(fit):
    callback = NISP(0.7, keep={"conv1": 0.25})
    fit(callback)
    assert callback.plan.groups["conv1"] == (3, 12)


def test_masks_are_chosen_as_cuts_are(fit):
    plans = []
    for apply in ("cut", "mask"):
        callback = NISP(0.5, apply=apply, schedule=OneShot(3, unit="step"))
        fit(callback)
        plans.append({name: kept for name, (kept, _) in callback.plan.groups.items()})
    assert plans[0] == plans[1]


def test_fit_looks_at_as_many_samples_as_asked(fit, tiny_net):
    class Counts(tiny_net):
        seen = 0

        def training_step(self, batch, batch_idx):
            if not self.training:
                type(self).seen += len(batch[0])
            return super().training_step(batch, batch_idx)

    pl.seed_everything(0, verbose=False)
    fit(NISP(0.5, samples=16), model=Counts())
    assert Counts.seen == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"factor": 1.0}, r"factor must be in \(0, 1\), got 1.0"),
        ({"samples": 1}, "samples must be an int of at least 2, got 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NISP(0.5, **settings)
