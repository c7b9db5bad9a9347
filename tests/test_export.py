import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune import Budget, L1Filter, cut, export, plan, rebuild, trace
from lightning_prune.decision import Plan
from lightning_prune.errors import TraceError, UnequalExport
from lightning_prune.export import OnnxModel, export_model, plain
from lightning_prune.factorise import factorise

OWN_NETS = """
import torch.nn.functional as F
from torch import nn


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.last(F.relu(self.hidden(x.mean((2, 3)))))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])
"""

ELSEWHERE = """
import sys, json

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning_prune", "lightning", "pytorch_lightning"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
folder = sys.argv[1]
sys.path.insert(0, folder)
import onnxruntime, torch
import own_nets

said = {}
try:
    import lightning_prune
except ImportError as error:
    said["refused"] = str(error)
sys.path.insert(0, folder + "/images")
from load_model import load

given = torch.load(folder + "/inputs.pt")
for name, make in (("images", own_nets.Images), ("words", own_nets.Words)):
    x, at = given[name], folder + "/" + name
    program = torch.export.load(at + "/model.pt2").module()
    session = onnxruntime.InferenceSession(at + "/model.onnx", providers=["CPUExecutionProvider"])
    said[name] = {
        "axes": [value.shape for value in session.get_inputs()],
        "torch_export": program(x).tolist(),
        "onnx": session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].tolist(),
    }
    try:
        said[name]["state_dict"] = load(make(), at)(x).tolist()
    except RuntimeError as error:
        said[name]["state_dict"] = str(error)
assert not [name for name in sys.modules if name.startswith("lightning")]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, with_random_norms):
    """What a program says that has torch and ONNX Runtime, but neither this package nor Lightning; and what is right.

    ``images`` lost channels, then a layer of it became two of rank 2, and its norms are folded. ``words`` lost heads.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "own_nets.py").write_text(OWN_NETS, encoding="utf-8")
    space: dict = {}
    exec(OWN_NETS, space)
    torch.manual_seed(0)
    images, words = with_random_norms(space["Images"]()).eval(), space["Words"]().eval()
    given = {"images": torch.randn(5, 1, 8, 8), "words": torch.randn(5, 7, 8)}
    for model, name in ((images, "images"), (words, "words")):
        graph = trace(model, given[name])
        cut(model, plan(graph, method="l1_filter", budget=Budget(0.6)), example_inputs=given[name])
    factorise(images, {"hidden": 2})
    made = {"images": space["Images"], "words": None}
    for model, name in ((images, "images"), (words, "words")):
        export_model(model, given[name], folder / name, fold_bn=name == "images", build=made[name])
    torch.save(given, folder / "inputs.pt")
    run = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        right = {"images": images(given["images"]), "words": words(given["words"])}
    return json.loads(run.stdout.splitlines()[-1]), right, images, words


def test_the_other_program_has_no_lightning_prune(elsewhere):
    assert elsewhere[0]["refused"] == "lightning_prune is not installed here"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("images", "torch_export"),
        ("images", "onnx"),
        ("images", "state_dict"),
        ("words", "torch_export"),
        ("words", "onnx"),
    ],
)
def test_a_pruned_model_gives_the_same_outputs_where_the_package_is_not(elsewhere, name, form):
    said, right, images, words = elsewhere
    assert images.conv1.out_channels < 6
    assert words.attention.num_heads < 4
    torch.testing.assert_close(torch.tensor(said[name][form]), right[name], rtol=1e-4, atol=1e-5)


def test_the_batch_of_an_onnx_file_is_open_and_called_so(elsewhere):
    assert elsewhere[0]["images"]["axes"] == [["batch", 1, 8, 8]]
    assert elsewhere[0]["words"]["axes"] == [["batch", 7, 8]]


def test_a_state_dict_of_lost_heads_says_what_to_use_instead(elsewhere):
    assert (
        "attention lost whole heads, which the forward of its class cannot run" in elsewhere[0]["words"]["state_dict"]
    )


def norm(channels, mean, variance, gamma, beta, eps, kind=nn.BatchNorm2d):
    made = kind(channels, eps=eps)
    for tensor, value in (
        (made.running_mean, mean),
        (made.running_var, variance),
        (made.weight, gamma),
        (made.bias, beta),
    ):
        nn.init.constant_(tensor, value)
    return made


LAYERS = [
    pytest.param(nn.Conv2d(1, 1, 1), nn.BatchNorm2d, (1, 1, 4, 4), id="conv"),
    pytest.param(nn.ConvTranspose2d(1, 1, 1), nn.BatchNorm2d, (1, 1, 4, 4), id="transposed"),
    pytest.param(nn.Linear(1, 1), nn.BatchNorm1d, (1, 1), id="linear"),
]


@pytest.mark.parametrize(("layer", "kind", "shape"), LAYERS)
def test_a_folded_norm_is_in_weight_and_bias(net, layer, kind, shape):
    # 4 ((2 x + 1) - 3) / sqrt(3 + 1) + 5 = 4 x + 1
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 1.0)
    model = net(lambda n, x: F.relu(n.norm(n.layer(x))), layer=layer, norm=norm(1, 3, 3, 4, 5, 1, kind))
    done = plain(model, torch.randn(shape), fold_bn=True)
    assert done.folded == {"norm": "layer"}
    assert type(done.model.norm) is nn.Identity
    assert (done.model.layer.weight.item(), done.model.layer.bias.item()) == (4.0, 1.0)
    assert model.layer.weight.item() == 2.0


UNFOLDABLE = {
    "what the layer makes is read twice": lambda n, x: n.norm(n.a(x)) + n.a(x) * 0 + n.b(x),
    "two layers share the norm": lambda n, x: n.norm(n.a(x)) + n.norm(n.b(x)),
    "something stands between": lambda n, x: n.norm(F.relu(n.a(x))) + n.b(x),
    "the weight is read past the layer": lambda n, x: n.norm(n.a(x)) + n.b(x) + n.a.weight.sum(),
}


@pytest.mark.parametrize("why", UNFOLDABLE)
def test_a_norm_stays_where(net, why):
    model = net(
        UNFOLDABLE[why], a=nn.Conv2d(1, 2, 1), b=nn.Conv2d(1, 2, 1), norm=norm(2, 0.3, 2, 1.5, 0.2, 1e-5)
    ).eval()
    x = torch.randn(2, 1, 4, 4)
    done = plain(model, x, fold_bn=True)
    assert done.folded == {}
    torch.testing.assert_close(done.model(x), model(x))


def test_parametrizations_and_zeros_are_in_the_weights_of_the_file(net, tmp_path):
    model = net(lambda n, x: n.b(n.a(x)), a=parametrizations.weight_norm(nn.Linear(3, 4)), b=nn.Linear(4, 2))
    with torch.no_grad():
        model.b.weight[:, 1:3] = 0
    export_model(model, torch.randn(1, 3), tmp_path, to=["state_dict"])
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert sorted(state) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    torch.testing.assert_close(state["a.weight"], model.a.weight.detach())  # the model keeps its own
    assert torch.equal(state["b.weight"] == 0, torch.tensor([[False, True, True, False]] * 2))


def other_when_exported(factor):
    return lambda n, x: n.fc(x) * (factor if torch.compiler.is_exporting() else 1.0)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_program_that_computes_something_else_is_an_error_and_not_left_behind(net, tmp_path, factor):
    model = net(other_when_exported(factor), fc=nn.Linear(3, 2))
    out = tmp_path / "out"
    with pytest.raises(
        UnequalExport, match=r"torch_export differs from the model by (0\.01|nan) of its largest output"
    ):
        export_model(model, torch.randn(2, 3), out, to=["state_dict", "torch_export"])
    assert not out.exists()


def test_an_error_leaves_an_earlier_export_as_it_was(net, tmp_path):
    good = net(lambda n, x: n.fc(x), fc=nn.Linear(3, 2))
    export_model(good, torch.randn(2, 3), tmp_path, to=["state_dict"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = net(other_when_exported(2.0), fc=nn.Linear(3, 2))
    with pytest.raises(UnequalExport):
        export_model(bad, torch.randn(2, 3), tmp_path, to=["state_dict", "torch_export"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sorted(before) == ["load_model.py", "model.json", "model.pt"]


def test_a_difference_below_the_tolerance_is_said(net, tmp_path):
    model = net(other_when_exported(1.01), fc=nn.Linear(3, 2))
    done = export_model(model, torch.randn(2, 3), tmp_path, to=["torch_export"], tolerance=0.02)["torch_export"]
    assert done.difference == pytest.approx(0.01, rel=1e-3)
    assert done.bytes == (tmp_path / "model.pt2").stat().st_size
    assert json.loads((tmp_path / "model.json").read_text("utf-8"))["forms"]["torch_export"]["batch_sizes"] == [1, 3]


def test_classes_have_to_be_equal_whatever_the_tolerance(net, tmp_path):
    def classes(n, x):
        return n.fc(x).argmax(1) + int(torch.compiler.is_exporting())

    with pytest.raises(UnequalExport, match=r"by 1 of its largest output.*at most 0 is allowed"):
        export_model(net(classes, fc=nn.Linear(3, 2)), torch.randn(2, 3), tmp_path, to=["torch_export"], tolerance=0.5)


def branches(n, x):
    return n.fc(x) if x.sum() > 0 else -n.fc(x)


def test_control_flow_on_data_is_an_error_that_says_what_torch_said(net, tmp_path):
    with pytest.raises(TraceError, match=r"torch cannot export Net: .*data-dependent") as raised:
        export_model(net(branches, fc=nn.Linear(3, 2)), torch.randn(2, 3), tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_no_hook_behind(net, tmp_path, monkeypatch):
    def leaves(*args, **kwargs):  # as torch 2.10 does
        nn.modules.module.register_module_buffer_registration_hook(lambda *_: None)
        raise RuntimeError("no")

    monkeypatch.setattr(torch.export, "export", leaves)
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = dict(hooks)
    with pytest.raises(TraceError, match="torch cannot export Net: RuntimeError: no"):
        export_model(net(lambda n, x: n.fc(x), fc=nn.Linear(3, 2)), torch.randn(2, 3), tmp_path / "out")
    assert dict(hooks) == before


def two_rows(n, x):
    return n.fc(x.reshape(2, -1)[:, :3])


def test_a_fixed_batch_is_an_error_unless_asked_for(net, tmp_path):
    model = net(two_rows, fc=nn.Linear(3, 2))
    with pytest.raises(TraceError):
        export_model(model, torch.randn(2, 3), tmp_path, to=["torch_export"])
    done = export_model(model, torch.randn(2, 3), tmp_path, to=["torch_export"], dynamic_batch=False)
    assert done["torch_export"].batch_sizes == ()


def test_keyword_inputs_in_any_order_and_tokens_reach_onnx(net, tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.fc = nn.Embedding(8, 4), nn.Linear(4, 2)

        def forward(self, scale, tokens):
            x = self.embedding(tokens) * scale
            return self.fc(x), x.mean(1)

    inputs = {"tokens": torch.tensor([[1, 7, 3]]), "scale": torch.ones(1, 3, 4)}
    model = Words().eval()
    export_model(model, inputs, tmp_path, to=["onnx"])
    more = {"tokens": torch.tensor([[0, 2, 5], [7, 6, 4]]), "scale": torch.randn(2, 3, 4)}
    for got, right in zip(OnnxModel(tmp_path / "model.onnx")(**more), model(**more), strict=True):
        torch.testing.assert_close(got, right)


def test_a_module_fresh_from_its_fit_is_exported_and_left_as_it_was(fit, tiny_net, tmp_path):
    trainer = fit(pruner := L1Filter(0.5))
    model = trainer.lightning_module.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    export_model(
        model,
        model.example_input_array,
        tmp_path / "out",
        to=["state_dict"],
        fold_bn=True,
        plan=pruner.plan,
        build=tiny_net,
    )
    assert model.trainer is trainer
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    said = json.loads((tmp_path / "out" / "model.json").read_text("utf-8"))
    assert Plan.from_dict(said["plan"]) == pruner.plan
    assert said["rebuild"]["folded"] == ["norm0", "norm1", "norm2"]
    loaded = rebuild.load(tiny_net(), tmp_path / "out")
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_weights_that_moved_on_from_their_ranks_are_not_factorised(net, tmp_path):
    torch.manual_seed(0)
    model = net(lambda n, x: n.fc(x), fc=nn.Linear(6, 6))
    ranks = Plan(ranks={"fc": 2}, shapes={"fc.weight": (6, 6)})
    with pytest.raises(UnequalExport, match="model at the plan's ranks differs"):
        export_model(model, torch.randn(2, 6), tmp_path, to=["state_dict"], plan=ranks)
    with torch.no_grad():  # as the projection leaves them
        u, s, v = torch.linalg.svd(model.fc.weight)
        model.fc.weight.copy_(u[:, :2] * s[:2] @ v[:2])
    export_model(model, torch.randn(2, 6), tmp_path, to=["state_dict"], plan=ranks)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "fc.0.weight": (2, 6),
        "fc.1.weight": (6, 2),
        "fc.1.bias": (6,),
    }


def test_two_layers_that_a_class_has_itself_are_loaded_as_such(net, tmp_path):
    def make():
        return net(lambda n, x: n.two(x), two=nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3)))

    export_model(make(), torch.randn(2, 3), tmp_path, to=["state_dict"], build=make)


def test_a_state_dict_of_another_class_is_refused(net, tmp_path):
    export_model(net(lambda n, x: n.fc(x), fc=nn.Linear(3, 2)), torch.randn(2, 3), tmp_path, to=["state_dict"])
    with pytest.raises(RuntimeError, match="not of a Sequential"):
        rebuild.load(nn.Sequential(nn.Linear(3, 2)), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "onnx"}, "to= takes a list"),
        ({"to": ["tflite"]}, "to= takes a list"),
        ({"to": []}, "to= takes a list"),
        ({"name": "a/b"}, "without a folder"),
        ({"tolerance": 0.0}, "above 0 and below 1"),
        ({"example_inputs": (torch.ones(2, 3), torch.ones(3))}, "dynamic_batch=False"),
        ({"plan": Plan(ranks={"gone": 1}, shapes={"gone.weight": (2, 2)})}, "ranks are not of this model"),
    ],
)
def test_bad_arguments_are_named(net, tmp_path, settings, message):
    arguments = {"example_inputs": torch.ones(2, 3), "out": tmp_path / "out", "to": ["state_dict"], **settings}
    with pytest.raises(ValueError, match=message):
        export_model(net(lambda n, x, *y: n.fc(x), fc=nn.Linear(3, 2)), **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda n, x: n.fc(x.T), "does not run on inputs like the examples: RuntimeError"),
        (lambda n, x: n.fc(x) / 0, "NaN or infinity"),
        (lambda n, x: 3, "gives no tensor"),
    ],
)
def test_a_model_that_cannot_be_compared_says_why(net, tmp_path, forward, message):
    with pytest.raises(TraceError, match=message):
        export_model(net(forward, fc=nn.Linear(3, 2)), torch.ones(2, 3), tmp_path)


def test_a_missing_package_names_the_extra(net, tmp_path, monkeypatch):
    real = importlib.import_module

    def without(name, *more):
        if name == "onnxscript":
            raise ImportError("No module named 'onnxscript'")
        return real(name, *more)

    monkeypatch.setattr(export.importlib, "import_module", without)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxscript.*pip install 'lightning-prune\[export\]'"):
        export_model(net(lambda n, x: n.fc(x), fc=nn.Linear(3, 2)), torch.ones(2, 3), tmp_path)


def test_the_loader_imports_nothing_of_ours():
    source = Path(rebuild.__file__).read_text(encoding="utf-8")
    assert "lightning_prune" not in source
    assert "import lightning" not in source
