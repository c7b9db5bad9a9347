"""Plans, checkpoints and callback states from strangers, a few thousand: our errors, and a model as it was before."""

import copy
import io
import json
import os
import pickle
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from benchmarks.mutants import HUGE, mutants, torn
from lightning_prune import Budget, L1Filter, OneShot, Plan, conform, cut, load_pruned, trace
from lightning_prune.checkpoint import KEY, take_shapes
from lightning_prune.errors import IncompatibleCheckpoint, PruneError
from lightning_prune.methods import discover
from lightning_prune.state import check_fields

METHODS = {name: cls for name, cls in discover().items() if cls.kind != "control"}
KEEP = {"channels": 0.5, "weights": 0.2, "ranks": 0.5}
OURS = (PruneError, ValueError)
KINDS = ("channels", "masks", "ranks")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the event at step .+ changed nothing"),
    pytest.mark.filterwarnings("ignore:Hierarchical. the (budget|redundancy)"),
]


@pytest.fixture(scope="module")
def net(tiny_net):
    torch.manual_seed(0)
    return tiny_net()


@pytest.fixture(scope="module")
def plans(net, random_keep):
    graph = trace(net, net.example_input_array)
    mask = torch.arange(72).reshape(12, 6) % 3 > 0
    return {
        "channels": graph.plan(random_keep(graph)),
        "masks": Plan(masks={"hidden.weight": mask}, shapes={"hidden.weight": (12, 6)}),
        "ranks": Plan(ranks={"conv2": 2, "hidden": 3}),
    }


def condition(model):
    """All that a load could have changed: values, shapes, and plain attributes of every module."""
    values = {name: (tuple(t.shape), t.dtype, t.clone()) for name, t in model.state_dict().items()}
    plain = {
        path: {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | tuple)}
        for path, module in model.named_modules()
    }
    return values, plain, [type(module) for module in model.modules()]


def assert_untouched(model, before):
    values, plain, types = condition(model)
    assert (values.keys(), plain, types) == (before[0].keys(), *before[1:])
    assert all(torch.equal(value[2], before[0][name][2]) for name, value in values.items())


def refusals(cases, act, model=None):
    """How many of the cases were refused; any other end than a refusal in our words, or none, fails by itself."""
    before, refused, count = None if model is None else condition(model), 0, 0
    for case, how in cases:
        count += 1
        try:
            act(case)
        except OURS as error:
            refused += 1
            assert str(error).strip(), how  # noqa: PT017 - of many cases, some are refused
            if model is not None:
                assert_untouched(model, before)
        except BaseException as error:
            raise AssertionError(f"after {how}: {type(error).__name__}: {error}") from error
    return refused, count


def apply_both(net, plan):
    """Cut by a plan, and conform to it, on copies: done, or refused with nothing changed."""
    for verb in (lambda model: cut(model, plan, example_inputs=net.example_input_array), lambda m: conform(m, plan)):
        model = copy.deepcopy(net)
        before = condition(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verb(model)
        except OURS:
            assert_untouched(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_in_json_end_in_our_errors(net, plans, kind):
    def act(tree):
        try:
            text = json.dumps(tree)
        except (TypeError, ValueError):  # no JSON can say it
            return
        apply_both(net, Plan.from_dict(json.loads(text)))

    refused, count = refusals(mutants(plans[kind].to_dict(), 500, seed=1, tensors=False), act)
    assert refused > 0.6 * count == 300


@pytest.mark.parametrize("kind", KINDS)
def test_plans_as_state_dicts_end_in_our_errors(net, plans, kind):
    def act(tree):
        apply_both(net, Plan.from_state_dict(tree))

    refused, count = refusals(mutants(plans[kind].state_dict(), 300, seed=2), act)
    assert refused > 0.6 * count == 180


def test_torn_plan_files_end_in_an_error_that_names_the_file(plans, tmp_path):
    path = tmp_path / "some.json"
    plans["channels"].save(path)
    sound = path.read_bytes()

    def act(data):
        path.write_bytes(data)
        try:
            Plan.load(path)
        except IncompatibleCheckpoint as error:
            assert "some.json" in str(error)  # noqa: PT017 - as above
            raise

    refused, count = refusals(torn(sound, 300, seed=3), act)
    assert refused > 0.8 * count == 240


@pytest.mark.parametrize("planned", [True, False], ids=["with its plan", "by shapes alone"])
def test_checkpoints_end_in_our_errors(net, plans, planned):
    smaller = copy.deepcopy(net)
    cut(smaller, plans["channels"], example_inputs=net.example_input_array)
    sound = {"state_dict": dict(smaller.state_dict())}
    if planned:
        sound[KEY] = {"version": 1, "plans": {"L1Filter-0": plans["channels"].state_dict()}}
    refused = 0
    for case in mutants(sound, 350, seed=4):
        model = copy.deepcopy(net)
        refused += refusals([case], partial(take_shapes, model), model)[0]
    assert refused > 100


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_callback_states_are_refused_whole_with_the_name_of_the_callback(method, fit):
    callback = method(Budget(KEEP[method.kind]))
    fit(callback, max_steps=6, limit_val_batches=0)
    sound = torch.load(_saved(callback.state_dict()), weights_only=True)
    assert callback.own_state().keys() >= {key for key in method.own_fields if not key.endswith("?")}
    method(Budget(KEEP[method.kind])).load_state_dict(sound)
    for state, how in mutants(sound, 60, seed=5):
        fresh = method(Budget(KEEP[method.kind]))
        before = {key: value for key, value in vars(fresh).items() if key != "schedule"}
        try:
            fresh.load_state_dict(state)
        except IncompatibleCheckpoint as error:
            assert f"the state of {method.__name__} is not" in str(error), how  # noqa: PT017 - as above
            assert {key: value for key, value in vars(fresh).items() if key != "schedule"} == before, how
        except Exception as error:
            raise AssertionError(f"after {how}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_state_without_a_key_says_which(method, fit):
    callback = method(Budget(KEEP[method.kind]))
    fit(callback, max_steps=6, limit_val_batches=0)
    sound = callback.state_dict()
    for key in {key for key in sound if not key.endswith("?")} & set(method.state_fields):
        with pytest.raises(IncompatibleCheckpoint, match=f"state of {method.__name__} .*'{key}' is missing"):
            method(Budget(KEEP[method.kind])).load_state_dict({k: v for k, v in sound.items() if k != key})
    for key in {key for key in method.own_fields if not key.endswith("?")}:
        state = {**sound, "own": {k: v for k, v in sound["own"].items() if k != key}}
        with pytest.raises(IncompatibleCheckpoint, match=f"state of {method.__name__} .*'own'.'{key}'. is missing"):
            method(Budget(KEEP[method.kind])).load_state_dict(state)


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def checkpoint_file(tiny_net, make_loader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callback = L1Filter(0.5, schedule=OneShot(3, unit="step"))
    trainer = pl.Trainer(max_steps=4, callbacks=callback, enable_checkpointing=False, **quiet)
    trainer.fit(tiny_net(), make_loader(), make_loader(8))
    trainer.save_checkpoint(folder / "cut.ckpt")
    return folder / "cut.ckpt"


def test_torn_checkpoint_files_end_in_our_errors(checkpoint_file, tiny_net, tmp_path):
    path = tmp_path / "torn.ckpt"

    def act(data):
        path.write_bytes(data)
        load_pruned(tiny_net, path)

    refused, count = refusals(torn(checkpoint_file.read_bytes(), 80, seed=6), act)
    assert refused > 0.5 * count == 40  # bytes of a weight are weights all the same


def test_changed_checkpoint_files_end_in_our_errors(checkpoint_file, tiny_net, tmp_path):
    path = tmp_path / "changed.ckpt"
    sound = torch.load(checkpoint_file, weights_only=True)
    sound = {key: sound[key] for key in ("pytorch-lightning_version", "hparams_name", "state_dict", KEY)}
    sound["state_dict"] = dict(sound["state_dict"])

    def act(tree):
        torch.save(tree, path)
        load_pruned(tiny_net, path)

    refused, count = refusals(mutants(sound, 80, seed=7), act)
    assert refused > 0.3 * count == 24


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["state_dict", KEY, "callbacks", "hyper_parameters", "whole"])
def test_code_in_a_checkpoint_is_refused_and_not_run(checkpoint_file, tiny_net, tmp_path, where):
    evil = Malicious(tmp_path / "it ran")
    sound = torch.load(checkpoint_file, weights_only=True)
    path = tmp_path / "evil.ckpt"
    torch.save(evil if where == "whole" else {**sound, where: evil}, path)
    with pytest.raises(IncompatibleCheckpoint, match=r"evil.ckpt could not be loaded as a TinyNet: UnpicklingError"):
        load_pruned(tiny_net, path)
    assert not (tmp_path / "it ran").exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "it ran").exists()


def test_code_where_a_plan_was_wanted_is_refused_and_not_run(tmp_path):
    (tmp_path / "plan.json").write_bytes(pickle.dumps(Malicious(tmp_path / "it ran")))
    with pytest.raises(IncompatibleCheckpoint, match=r"plan.json' is not a plan in JSON"):
        Plan.load(tmp_path / "plan.json")
    assert not (tmp_path / "it ran").exists()


EMPTY = Plan().to_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shapes": {"w": [HUGE]}, "masks": {"w": "AAAA"}}, "base64 text of one bit per entry"),
        ({"shapes": {"w": [HUGE, HUGE]}, "masks": {"w": "AAAA"}}, "larger than any tensor"),
        ({"shapes": {"w": [HUGE]}, "kept": {"w": {"0": [HUGE]}}}, r"ints in \[0, 1000000000000\)"),
        ({"shapes": {"w": [4]}, "kept": {"w": {"0": [1, 4]}}}, r"at most 4 ints in \[0, 4\)"),
        ({"shapes": {"w": [4]}, "kept": {"w": {"1": [1]}}}, r"has shape \(4,\) and no dim '1'"),
        ({"shapes": {"w": [4, 2]}, "masks": {"w": "AA=="}}, r"bit|base64"),
        ({"ranks": {"fc": 0}}, "rank of layer 'fc' must be an int of at least 1"),
    ],
)
def test_sizes_and_indices_are_checked_before_memory_is_taken(change, said):
    if "AA==" in str(change):  # eight entries fit a byte: one more would not
        change = {"shapes": {"w": [4, 3]}, "masks": {"w": "AA=="}}
    with pytest.raises(IncompatibleCheckpoint, match=said):
        Plan.from_dict({**EMPTY, **change})


@pytest.mark.parametrize("claim", [torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.uint8)])
@pytest.mark.parametrize("section", [*EMPTY, "shapes"])
def test_a_tensor_that_claims_more_than_it_holds_is_not_looked_at(section, claim):
    with pytest.raises(IncompatibleCheckpoint, match="this is not the state of a plan"):
        Plan.from_state_dict({**Plan().state_dict(), section: claim.expand(HUGE)})


def test_ranks_beyond_a_layers_are_refused_and_nothing_has_changed(net):
    model = copy.deepcopy(net)
    before = condition(model)
    with pytest.raises(IncompatibleCheckpoint, match=r"rank"):
        conform(model, Plan(ranks={"hidden": 10**9}))
    assert_untouched(model, before)


def test_two_thin_layers_of_a_rank_beyond_the_layers_are_refused(net):
    model, state = copy.deepcopy(net), dict(net.state_dict())
    del state["hidden.weight"]
    state["hidden.0.weight"] = torch.zeros(1).expand(10**9, 6)
    state["hidden.1.weight"] = torch.zeros(1).expand(12, 10**9)
    before = condition(model)
    with pytest.raises(IncompatibleCheckpoint, match=r"'hidden' .* rank"):
        take_shapes(model, {"state_dict": state})
    assert_untouched(model, before)


@pytest.mark.parametrize("deep", ["[" * 10**5 + "]" * 10**5, '{"kept": ' * 10**5 + "1" + "}" * 10**5])
def test_a_plan_nested_a_hundred_thousand_deep_is_refused(tmp_path, deep):
    (tmp_path / "deep.json").write_text(deep)
    with pytest.raises(IncompatibleCheckpoint, match=r"deep.json' is not a plan in JSON"):
        Plan.load(tmp_path / "deep.json")


@pytest.mark.parametrize(
    ("module", "key"), [("", "forward"), ("norm1", "weight"), ("fc", "_parameters"), ("", "training"), ("stem", "bias")]
)
def test_a_plan_sets_sizes_of_modules_and_nothing_else(net, module, key):
    plan = Plan(attributes={module: {key: 3}})
    for verb, error in ((cut, ValueError), (conform, IncompatibleCheckpoint)):
        model = copy.deepcopy(net)
        before = condition(model)
        arguments = {"example_inputs": net.example_input_array} if verb is cut else {}
        target = plan if verb is cut else Plan(ranks={"hidden": 2}, attributes=plan.attributes)
        with pytest.raises(error, match=f"the plan sets '{key}' of module '{module}' to 3; that is no size"):
            verb(model, target, **arguments)
        assert_untouched(model, before)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (int, True, "'x' must be an int of 64 bits, got True"),
        (int, 2**63, "'x' must be an int of 64 bits"),
        (float, "1", "'x' must be a number, got '1'"),
        (str | None, 3, "'x' must be"),
        (list[tuple[int, float]], [[1, 0.5], [2]], r"'x'\[1\] must be a list of 2 entries, got list"),
        (dict[str, dict[str, int]], {"a": {"b": "c"}}, r"'x'\['a'\]\['b'\] must be an int"),
        (({"y": int}, None), {"y": None}, r"'x'\['y'\] must be an int of 64 bits, got None"),
        ({"y": int}, {}, r"'x'\['y'\] is missing"),
        (torch.Tensor, torch.zeros(1).expand(HUGE), r"'x' must be a dense tensor in memory, got a strided tensor"),
        (torch.Tensor, torch.zeros(3, device="meta"), "got a meta tensor"),
    ],
)
def test_fields_name_the_entry_that_is_wrong(kind, value, said):
    with pytest.raises(IncompatibleCheckpoint, match=said):
        check_fields("the state of X", {"x": value}, {"x": kind})


def test_fields_that_are_right_pass():
    check_fields("it", {"a": 1, "b": [[1, 2]], "c": None}, {"a": float, "b": list[tuple[int, int]], "c": (int, None)})
    check_fields("it", {}, {"a?": int})
