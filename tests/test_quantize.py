import importlib
import platform

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import export, quantize
from lightning_prune.quantize import inputs_of, quantized


class Small(nn.Module):
    """A convolution with a norm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def codes(path):
    """The int8 tensors of a file with more than one dimension."""
    tensors = [onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer]
    return [torch.from_numpy(value.copy()) for value in tensors if value.dtype == "int8" and value.ndim > 1]


def wide(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return layer.eval()


# One scale a row: the largest weight over 127, or over 64 in 7 bits. 1.27 / 127 = 0.01, 0.4 / 127 = 0.00315:
# with one scale for both rows the second would be (0, 10, -40, 0).
ROWS = [[0.0, 0.003, -0.4, 1.27], [0.0, 0.1, -0.4, 0.0]]


def test_codes_are_symmetric_and_have_a_scale_for_each_output_channel(tmp_path):
    quantized(wide(*ROWS), torch.randn(1, 4), [torch.randn(8, 4)], out=tmp_path / "a.onnx", reduce_range=False)
    (found,) = codes(tmp_path / "a.onnx")
    found = found if found.shape == (2, 4) else found.T
    assert found.tolist() == [[0, 0, -40, 127], [0, 32, -127, 0]]


def test_a_reduced_range_has_seven_bits(tmp_path):
    done = quantized(wide(*ROWS), torch.randn(1, 4), [torch.randn(8, 4)], out=tmp_path / "a.onnx", reduce_range=True)
    assert done.reduced_range
    (found,) = codes(tmp_path / "a.onnx")
    assert found.abs().max() == 64


def test_masked_weights_stay_zero_through_norm_and_int8(tmp_path, with_random_norms):
    torch.manual_seed(0)
    model = with_random_norms(Small()).eval()
    mask = torch.rand(6, 1, 3, 3) < 0.3
    with torch.no_grad():
        model.conv.weight.mul_(mask)
    quantized(model, torch.randn(1, 1, 8, 8), [torch.randn(32, 1, 8, 8)], out=tmp_path / "a.onnx")
    (conv,) = [found for found in codes(tmp_path / "a.onnx") if found.ndim == 4]
    assert conv[~mask].abs().sum() == 0
    assert conv[mask].count_nonzero() > 0.8 * mask.sum()


@pytest.mark.parametrize("engine", ["onnxruntime", "torchao"])
def test_outputs_are_near_those_of_the_model_which_is_left_as_it_was(with_random_norms, engine):
    torch.manual_seed(0)
    model = with_random_norms(Small()).train()
    x = torch.randn(64, 1, 8, 8)
    done = quantized(model, x[:1], [x], engine=engine)
    assert model.training
    assert type(model.fc.weight) is nn.Parameter
    assert model.fc.weight.requires_grad
    with torch.no_grad():
        right, got = model.eval()(x), done.model(x)
    assert got.shape == right.shape
    apart = (got - right).abs().max() / right.abs().max()
    assert 0 < apart < 0.05  # some, as int8 has 256 values
    assert done.samples == (64 if engine == "onnxruntime" else 0)


def ranges(calibration, samples):
    """The outputs of an identity, which show the range that was calibrated: what is beyond it is cut off."""
    done = quantized(wide([1.0]), torch.randn(1, 1), calibration, samples=samples, reduce_range=False)
    return done.samples, done.model(torch.tensor([[-100.0], [100.0]])).flatten()


def test_ranges_come_from_so_many_samples_and_no_later_ones():
    near, far = torch.linspace(-1, 1, 40)[:, None], torch.full((10, 1), 50.0)
    seen, few = ranges([torch.cat([near, far])], samples=40)
    assert seen == 40
    torch.testing.assert_close(few, torch.tensor([-1.0, 1.0]), atol=0.02, rtol=0)
    seen, all_of_them = ranges([near, far], samples=256)
    assert seen == 50
    torch.testing.assert_close(all_of_them[1], torch.tensor(50.0), atol=0.5, rtol=0)


def test_a_batch_gives_as_many_inputs_as_the_model_takes():
    one, two, labels = torch.ones(2, 3), torch.zeros(2, 3), torch.arange(2)
    assert inputs_of((one, labels), torch.ones(1, 3)) is one
    assert inputs_of(one, (torch.ones(1, 3),))[0] is one
    assert inputs_of([one, two, labels], (one, two)) == (one, two)
    assert inputs_of({"y": labels, "x": one}, {"x": one}) == {"x": one}


def test_linear_layers_become_a_quarter_in_bytes_with_torchao(tmp_path):
    from lightning_prune.latency import state_dict_bytes

    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    done = quantized(model, torch.randn(1, 256), engine="torchao", out=tmp_path / "a.pt")
    assert done.bytes == done.path.stat().st_size
    assert done.bytes < 0.3 * state_dict_bytes(model)
    assert done.model(torch.randn(3, 256)).shape == (3, 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "tensorrt"}, "engine must be one of onnxruntime, torchao"),
        ({"samples": 0}, "samples must be an int of at least 1"),
        ({"out": "a.pt"}, "onnxruntime writes a .onnx file"),
        ({"out": "a.onnx", "engine": "torchao"}, "torchao writes a .pt file"),
        ({"calibration": None}, "pass calibration="),
    ],
)
def test_bad_arguments_are_named(settings, message):
    arguments = {"example_inputs": torch.randn(1, 4), "calibration": [torch.randn(8, 4)], **settings}
    with pytest.raises(ValueError, match=message):
        quantized(wide(*ROWS), **arguments)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration has no batch"),
        ([{"x": 1}], "does not hold the model's inputs"),
        ([["a"]], "no tensor of samples"),
    ],
)
def test_calibration_without_samples_is_an_error_and_leaves_no_file(tmp_path, calibration, message):
    with pytest.raises(ValueError, match=message):
        quantized(wide(*ROWS), torch.randn(1, 4), calibration, out=tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_torchao_says_that_a_model_has_no_linear_layer():
    with pytest.raises(ValueError, match="Conv2d has none; use engine='onnxruntime'"):
        quantized(nn.Conv2d(1, 2, 1), torch.randn(1, 1, 4, 4), engine="torchao")


def test_torchao_missing_names_the_extra(monkeypatch):
    real = importlib.import_module

    def without(name, *more):
        if name == "torchao":
            raise ImportError("No module named 'torchao'")
        return real(name, *more)

    monkeypatch.setattr(export.importlib, "import_module", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-prune\[int8\]'"):
        quantized(wide(*ROWS), torch.randn(1, 4), engine="torchao")


@pytest.mark.parametrize(
    ("machine", "vnni", "reduced"), [("x86_64", False, True), ("AMD64", True, False), ("arm64", False, False)]
)
def test_the_range_is_reduced_where_sums_would_overflow(monkeypatch, machine, vnni, reduced):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni, raising=False)
    assert quantize._overflows() is reduced
