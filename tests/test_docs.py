"""Runs what the pages show, and holds them against the package."""

import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_prune.commands import main
from lightning_prune.methods import discover

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HEADINGS = ["What it does", "How to use", "Settings", "Differs from the paper", "Reference"]
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def links(page: Path) -> Iterator[str]:
    """Targets of links that stay in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield target.partition("#")[0]


@pytest.fixture
def short_trainer(monkeypatch, tmp_path):
    """Two epochs of three batches, whatever a page says, on the CPU and each into a folder of its own."""
    real = pl.Trainer.__init__

    def init(self, **settings):
        limits = {"max_epochs": 2, "limit_train_batches": 3, "accelerator": "cpu", "logger": False}
        real(self, **{**settings, **limits, "default_root_dir": tempfile.mkdtemp(dir=tmp_path)})

    monkeypatch.setattr(pl.Trainer, "__init__", init)
    pl.seed_everything(0, verbose=False)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_on_a_page_runs_from_top_to_bottom(page, short_trainer):
    space = {"__name__": page.stem}
    with warnings.catch_warnings():
        # Six steps are too few for what a page does in thirty epochs.
        warnings.filterwarnings("ignore", message=".*changed nothing")
        warnings.filterwarnings("ignore", message="Hierarchical: the budget asks for more")
        for block in blocks(page, "python"):
            exec(compile(block, name_of(page), "exec"), space)
        tests = [value for name, value in space.items() if name.startswith("test_")]
        for test in tests:
            test()
    pruners = [value for value in space.values() if isinstance(value, pl.Callback) and hasattr(value, "events_done")]
    assert [p for p in pruners if p.dense_cost is not None and p.events_done == 0] == []


@pytest.mark.parametrize("page", METHOD_PAGES, ids=name_of)
def test_method_page_has_the_five_headings_in_order(page):
    assert re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("page", METHOD_PAGES, ids=name_of)
def test_method_page_shows_python_and_yaml_under_how_to_use(page):
    section = page.read_text(encoding="utf-8").split("## How to use\n")[1].split("\n## ")[0]
    assert {kind for kind, _ in FENCE.findall(section)} == {"python", "yaml"}


def test_every_method_file_has_its_page_and_names_its_classes_there():
    classes: dict[str, list[str]] = {}
    for name, cls in discover().items():
        classes.setdefault(cls.__module__.rpartition(".")[2], []).append(name)
    assert sorted(classes) == [page.stem for page in METHOD_PAGES]
    for page in METHOD_PAGES:
        title = page.read_text(encoding="utf-8").splitlines()[0]
        assert title == "# " + " and ".join(classes[page.stem])


YAML = [pytest.param(text, id=f"{name_of(page)}:{n}") for page in PAGES for n, text in enumerate(blocks(page, "yaml"))]


@pytest.mark.parametrize("text", [case for case in YAML if case.values[0].startswith("trainer:")])
def test_yaml_on_a_page_is_a_config_that_fit_takes(text, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    digits = "lightning_prune.commands.digits"
    data = ["--model", f"{digits}.DigitsNet", "--data", f"{digits}.DigitsData"]
    assert main(["fit", "--config", str(config), *data, "--print_config"]) == 0
    (method,) = re.findall(r"class_path: (\w+)", text)[:1]
    assert f"class_path: lightning_prune.{method}" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files(page):
    assert [target for target in links(page) if not (page.parent / target).is_file()] == []


def test_readme_has_the_two_commands():
    demo, test = blocks(README, "bash")
    assert demo == "pip install .\nlightning-prune demo\n"
    assert test == 'pip install ".[test]"\npytest -n auto --dist loadgroup\n'


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (program,) = re.findall(r"\bawk '(.*?)' README\.md", script, re.DOTALL)
    run = subprocess.run(["awk", program, str(README)], capture_output=True, text=True, check=True)
    assert run.stdout == blocks(README, "bash")[1]


def test_pages_name_no_place_of_one_machine():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|opt|usr)/", page.read_text(encoding="utf-8")) == []


def test_readme_holds_the_table_that_the_methods_command_prints(capsys):
    assert main(["methods"]) == 0
    (table,) = re.findall(r"<!-- methods -->\n(.*?)<!-- /methods -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert table == capsys.readouterr().out


def test_configs_that_a_page_names_are_there():
    for page in PAGES:
        named = re.findall(r"--config (\S+\.yaml)", page.read_text(encoding="utf-8"))
        assert [path for path in named if not (ROOT / path).is_file()] == []
