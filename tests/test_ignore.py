import pytest
from torch import nn

from lightning_prune.ignore import matching


@pytest.fixture
def model():
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    return nn.ModuleDict({"layer1": body, "layer10": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], set()),
        (["fc"], {"fc.weight", "fc.bias"}),
        (["fc.weight"], {"fc.weight"}),
        (["*.bias"], {"layer1.0.bias", "layer1.1.bias", "layer10.bias", "fc.bias"}),
        (["layer1"], {"layer1.0.weight", "layer1.0.bias", "layer1.1.weight", "layer1.1.bias"}),  # and not layer10
        (["layer1.1", "fc.b*"], {"layer1.1.weight", "layer1.1.bias", "fc.bias"}),
        (["layer1.2"], set()),  # a module without parameters
    ],
)
def test_patterns_name_modules_or_parameters(model, patterns, names):
    assert matching(model, patterns) == names


def test_star_means_everything(model):
    assert matching(model, ["*"]) == {name for name, _ in model.named_parameters()}


def test_letter_case_counts(model):
    with pytest.raises(ValueError, match="'FC'"):
        matching(model, ["FC"])


@pytest.mark.parametrize("pattern", ["layer2", "", "fc.weights", "fc."])
def test_pattern_that_matches_nothing_lists_near_names(model, pattern):
    with pytest.raises(ValueError, match=rf"ignore pattern '{pattern}' matches no module or parameter of ModuleDict"):
        matching(model, ["fc", pattern])


def test_near_names_are_near(model):
    with pytest.raises(ValueError, match=r"near names: .*'fc.weight'"):
        matching(model, ["fc.weigth"])
