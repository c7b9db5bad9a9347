"""Every method is exported, tested and documented."""

from pathlib import Path

import pytest

import lightning_prune
from lightning_prune.methods import discover

ROOT = Path(__file__).parent.parent
FILES = sorted(path.stem for path in (ROOT / "lightning_prune" / "methods").glob("*.py") if path.stem != "__init__")


def test_every_method_is_exported():
    assert set(discover()) <= set(lightning_prune.__all__)
    assert all(getattr(lightning_prune, name) is cls for name, cls in discover().items())


def test_exported_names_exist_and_are_sorted():
    names = list(lightning_prune.__all__)
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))  # all capitals first, as ruff has it
    assert [name for name in lightning_prune.__all__ if not hasattr(lightning_prune, name)] == []


def test_methods_are_found_in_their_files():
    assert {cls.__module__.rpartition(".")[2] for cls in discover().values()} == set(FILES)
    assert len(FILES) >= 4


@pytest.mark.parametrize("name", FILES)
def test_every_method_file_has_its_tests_and_its_page(name):
    assert (ROOT / "tests" / "methods" / f"test_{name}.py").is_file()
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def test_methods_are_final():
    classes = list(discover().values())
    assert [cls for cls in classes if any(cls is not other and issubclass(cls, other) for other in classes)] == []
