"""Several methods in one Trainer: masks follow cuts, one of them says what is common, and what cannot be is refused."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_prune import Iterative, L1Filter, Magnitude, OneShot, Plan, RandomChannels, WeightPruner, load_pruned
from lightning_prune.masks import Masks

AT_3, AT_6 = (OneShot(n, unit="step") for n in (3, 6))
THREE = Iterative(start=2, end=6, events=3, unit="step")


class Remembers(WeightPruner):
    """A fake method: keeps the largest of the weights it saw at the start, and a number for each output."""

    default_scope = "global"

    def initialise(self):
        self.kept["first"] = {name: weight.detach().clone() for name, weight in self.weights.items()}
        rows = {n: torch.arange(float(len(w))) for n, w in self.weights.items()}
        self.kept["row"] = {n: rows[n].reshape(-1, *[1] * (w.ndim - 1)) for n, w in self.weights.items()}

    def score(self, name, weight):
        return self.kept["first"][name].abs().masked_fill(~self.alive(name), -torch.inf)


def matrices(model):
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


def same_weights(first, second):
    a, b = first.state_dict(), second.state_dict()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(params=["cut first", "mask first"])
def pair(request):
    """Makes a cutting and a masking callback, in either order in the Trainer."""

    def make(cut=None, mask=None):
        callbacks = [cut or L1Filter(0.5, schedule=AT_3), mask or Magnitude(0.2, schedule=THREE)]
        return callbacks, callbacks if request.param == "cut first" else callbacks[::-1]

    return make


def test_masks_follow_a_cut_and_meet_the_budget_of_the_dense_model(pair, fit, tiny_net):
    (cut, mask), callbacks = pair()
    model = fit(callbacks).lightning_module
    assert 0.4 < cut.report.flops_kept <= 0.5
    dense = sum(p.numel() for p in matrices(tiny_net()).values())
    assert sum(int(p.count_nonzero()) for p in matrices(model).values()) == int(0.2 * dense)
    assert mask.plan.masks["conv1.weight"].shape == (12, 6, 3, 3)  # a plan speaks of the dense model
    assert model.conv1.weight.shape == (8, 4, 3, 3)
    both = cut.plan.merge(mask.plan)
    for name, weight in matrices(model).items():
        assert torch.equal(both.mask_now(name), weight != 0)
        assert int(mask.plan.masks[name].sum()) == int(weight.count_nonzero())


def test_what_the_mask_had_removed_before_the_cut_stays_removed(pair, fit):
    class AtCut(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                self.before = {name: p.detach().clone() for name, p in matrices(model).items()}

    at_cut = AtCut()
    (cut, mask), callbacks = pair(mask=Magnitude(0.3, schedule=OneShot(2, unit="step")))
    model = fit([at_cut, *callbacks]).lightning_module
    for name, weight in matrices(model).items():
        left = at_cut.before[name]
        for dim, index in cut.plan.kept.get(name, {}).items():
            left = left.index_select(dim, index)
        assert torch.equal(left != 0, weight != 0)
    assert mask.events_done == 1


def test_what_a_method_keeps_of_a_weight_is_cut_with_it(pair, fit, tiny_net):
    (cut, mask), callbacks = pair(mask=Remembers(0.3, schedule=AT_6))
    torch.manual_seed(0)
    model = tiny_net()
    start = {name: p.detach().clone() for name, p in matrices(model).items()}
    fit(callbacks, model=model)
    for name, kept in mask.kept["first"].items():
        rows = cut.plan.kept.get(name, {}).get(0, torch.arange(len(start[name])))
        for dim, index in cut.plan.kept.get(name, {}).items():
            start[name] = start[name].index_select(dim, index)
        assert torch.equal(kept, start[name])
        assert mask.kept["row"][name].flatten().tolist() == rows.tolist()


def test_a_resumed_pair_ends_as_the_uninterrupted_one(pair, fit, save_each, tmp_path, tiny_net):
    # the checkpoint is from after the cut and before the last masks
    (cut, mask), callbacks = pair(mask=Remembers(0.3, schedule=THREE))
    whole = fit([*callbacks, save_each()]).lightning_module
    (cut_again, mask_again), callbacks = pair(mask=Remembers(0.3, schedule=THREE))
    resumed = fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt", seed=7).lightning_module
    assert same_weights(whole, resumed) == []
    assert (cut_again.plan, mask_again.plan) == (cut.plan, mask.plan)
    loaded = load_pruned(tiny_net, tmp_path / "epoch=1.ckpt")
    assert same_weights(whole, loaded) == []


def test_one_row_says_what_is_common_and_each_method_what_is_its_own(pair, fit, tmp_path, tiny_net):
    (cut, _mask), callbacks = pair()
    trainer = fit(callbacks, logger=CSVLogger(tmp_path, name="", version=""))
    model = trainer.lightning_module
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["prune/event/L1Filter"] or row["prune/event"]]
    last = {key: value for row in rows for key, value in row.items() if value}
    assert float(last["prune/channels/conv1"]) == model.conv1.out_channels == 8
    assert float(last["prune/event/L1Filter"]) == 1
    assert float(last["prune/event"]) == 3
    nonzero = sum(int(p.count_nonzero()) for p in matrices(model).values())
    dense = sum(p.numel() for p in matrices(tiny_net()).values())
    assert float(last["prune/density"]) == pytest.approx(nonzero / dense)
    others = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert float(last["prune/params"]) == nonzero + others
    assert float(last["prune/flops_kept"]) == pytest.approx(cut.report.flops_kept)
    at_cut = next(row for row in rows if row["step"] == "2")  # the third batch
    assert float(at_cut["prune/flops_kept"]) == pytest.approx(cut.report.flops_kept)
    metrics = trainer.callback_metrics
    assert float(metrics["prune/flops_kept"]) == pytest.approx(cut.report.flops_kept)
    assert float(metrics["prune/density"]) == pytest.approx(0.2, abs=1e-3)


def test_sparse_flops_are_of_the_cut_layers(pair, fit):
    (cut, mask), callbacks = pair()
    fit(callbacks)
    row = mask.report.rows[-1]
    assert row["prune/flops"] == cut.report.after.flops
    assert row["prune/flops_sparse"] < row["prune/flops"]
    densest = max(value for key, value in row.items() if key.startswith("prune/density/"))
    assert row["prune/flops_sparse"] <= row["prune/flops"] * densest / 0.3


def test_two_methods_that_mask_share_the_layers_out(fit, tiny_net):
    first = Magnitude(0.5, schedule=AT_3, ignore=["hidden", "fc"])
    second = Remembers(0.95, schedule=AT_6, ignore=["stem", "conv*"])
    model = fit([first, second]).lightning_module
    total = sum(p.numel() for p in matrices(tiny_net()).values())
    nonzero = sum(int(p.count_nonzero()) for p in matrices(model).values())
    assert first.plan.masks.keys() & second.plan.masks.keys() == set()
    assert nonzero == total - (total - int(0.5 * total)) - (total - int(0.95 * total))
    assert second.report.rows[-1]["prune/density"] == pytest.approx(nonzero / total)


def test_two_methods_on_the_same_weights_are_refused_before_anything_changes(fit, tiny_net):
    model = tiny_net()
    before = tiny_net()
    before.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Remembers and Magnitude would both mask 'conv1.weight' and 4 more"):
        fit([Magnitude(0.5), Remembers(0.5)], model=model)
    assert same_weights(model, before) == []


def test_channel_masks_do_not_go_with_cuts_or_weight_masks(fit):
    masked = L1Filter(0.5, schedule=AT_3, apply="mask")
    for other in (RandomChannels(0.5), Magnitude(0.5)):
        name = type(other).__name__
        with pytest.raises(RuntimeError, match=f'L1Filter and {name} cannot go together: apply="mask" holds'):
            fit([masked, other])


def test_a_method_that_cannot_follow_a_cut_says_why(fit):
    class Rigid(Remembers):
        def _cannot_follow(self):
            return "it remembers the whole network"

    with pytest.raises(RuntimeError, match="L1Filter and Rigid cannot go together: it remembers the whole network"):
        fit([L1Filter(0.5), Rigid(0.5)])


def test_masks_are_cut_with_their_parameters():
    layer = nn.Linear(3, 2, bias=False)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    masks = Masks({"weight": layer.weight}, {"weight": mask})
    with torch.no_grad():
        layer.weight.set_(layer.weight[:, [0, 1]].clone())
        layer.weight.fill_(1.0)
    masks.cut({"weight": {1: torch.tensor([0, 1])}})
    assert masks.as_bool()["weight"].tolist() == [[True, False], [False, True]]
    assert layer.weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert masks.counts() == {"weight": 2}


def test_plans_of_a_cut_and_of_masks_merge():
    cut = Plan(kept={"w": {0: torch.tensor([0, 2])}}, shapes={"w": (3, 2)})
    mask = Plan(masks={"w": torch.tensor([[True, False], [False, False], [True, True]])}, shapes={"w": (3, 2)})
    assert cut.merge(mask).mask_now("w").tolist() == [[True, False], [True, True]]
