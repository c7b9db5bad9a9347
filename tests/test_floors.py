"""Holds the order of the house: a file imports only from floors above its own.

Within a floor files may import each other as long as that goes round in no circle, except for methods, which never do.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_prune"
METHODS, LIGHTNING = 4, 3
# Floor -> first part of the module's name below the package; a folder is on one floor as a whole.
FLOORS = {
    0: ("errors", "state", "decision", "schedule", "budget", "ranking", "densities", "histograms"),
    1: ("graph", "cost", "report", "ignore", "terms", "wiring", "svg", "page"),
    2: (
        "statistics",
        "masks",
        "surgery",
        "proof",
        "replay",
        "absorb",
        "absolute",
        "optimizers",
        "latency",
        "latency_calls",
        "latency_table",
        "footprint",
        "taps",
        "compensation",
        "oracle",
        "dead",
        "sensitivity",
        "widening",
        "curvature",
        "factorise",
        "rebuild",
        "export",
        "quantize",
    ),
    LIGHTNING: (
        "pruner",
        "checkpoint",
        "figures",
        "batches",
        "loop",
        "rewind",
        "channel_pruner",
        "weight_pruner",
        "rank_pruner",
    ),
    METHODS: ("methods",),
    5: ("commands", "comparison", "cli", "planning", "__init__", "__main__"),
}


def module_name(path: str) -> str:
    """'lightning_prune/graph/__init__.py' -> 'lightning_prune.graph'."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def floor_of(module: str) -> int | None:
    first = module.split(".")[1] if "." in module else "__init__"
    return next((floor for floor, names in FLOORS.items() if first in names), None)


def targets(node: ast.AST, path: str) -> Iterator[str]:
    """Dotted names a statement imports; ``from a import b`` gives ``a.b``, be b a module or not."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        folders = path.split("/")[: -node.level] if node.level else []
        base = ".".join([*folders, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.nn":
        yield "torch.nn"  # reached through ``import torch``


def module_within(target: str, modules: set[str]) -> str | None:
    """The longest beginning of a dotted name that is a module of ours."""
    parts = target.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in modules), None)


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks the order, in sentences.

    Args:
        sources: path from the repository's root -> Python source; together they are the whole package.
    """
    modules = {module_name(path) for path in sources}
    found = []
    circle: dict[str, set[str]] = {module: set() for module in modules}
    for path, source in sources.items():
        module, tree = module_name(path), ast.parse(source)
        floor = floor_of(module)
        if floor is None:
            found.append(f"{path} is on no floor; add it to the table")
            continue
        for node in ast.walk(tree):
            for target in targets(node, path):
                other = module_within(target, modules)
                sentence = f"{path} (floor {floor}) imports {other or target}"
                if other is None:
                    found += [f"{sentence}, {why}" for why in [foreign(target, floor)] if why]
                elif (floor_of(other) or 0) > floor:
                    found.append(f"{sentence}, which is on floor {floor_of(other)}")
                elif floor == METHODS == floor_of(other) and other != module:
                    found.append(f"{sentence}; methods never import each other")
                elif node in tree.body and other != module:
                    circle[module].add(other)
    try:
        TopologicalSorter(circle).prepare()
    except CycleError as error:
        found.append(f"imports go round in a circle: {' <- '.join(error.args[1])}")
    return found


def foreign(target: str, floor: int) -> str | None:
    """Why a file of that floor may not import that name from outside the package; None if it may."""
    top = target.split(".")[0]
    if top in ("lightning", "pytorch_lightning", "lightning_fabric") and floor < LIGHTNING:
        return f"but only floor {LIGHTNING} and those after it know Lightning"
    if floor == 0 and (top == "torch" and f"{target}.".startswith("torch.nn.")):
        return "but floor 0 knows no module"
    if floor == 0 and top not in ("torch", "numpy") and top not in sys.stdlib_module_names:
        return "but floor 0 stands on torch and NumPy alone"
    return None


def test_the_package_keeps_the_order():
    root = Path(__file__).parents[1]
    paths = sorted((root / PACKAGE).rglob("*.py"))
    assert len(paths) > 5
    assert violations({path.relative_to(root).as_posix(): path.read_text("utf-8") for path in paths}) == []


HOUSE = {
    "__init__": "from lightning_prune.methods.rigl import RigL",
    "errors": "",
    "decision": "import json\nimport torch\nfrom torch import Tensor\nfrom lightning_prune.errors import PruneError",
    "graph/__init__": "",
    "graph/trace": "from torch import nn\nfrom .labels import Dim\ndef record():\n    from .rules import RULES",
    "graph/labels": "import numpy",
    "graph/rules": "from lightning_prune.graph.trace import Tracer",
    "masks": "from lightning_prune import decision",
    "pruner": "import lightning\nfrom lightning_prune.graph import trace",
    "methods/__init__": "import pkgutil",
    "methods/rigl": "from lightning_prune.pruner import WeightPruner",
    "methods/nisp": "from ..pruner import ChannelPruner",
    "cli": "from lightning_prune import methods",
}


def house(**changed: str) -> dict[str, str]:
    """The house above with some files replaced; ``methods__rigl`` is methods/rigl.py."""
    files = HOUSE | {name.replace("__", "/"): source for name, source in changed.items()}
    return {f"{PACKAGE}/{name}.py": source for name, source in files.items()}


def test_a_house_in_order_has_no_violation():
    assert violations(house()) == []


@pytest.mark.parametrize(
    ("planted", "sentence"),
    [
        ({"decision": "from lightning_prune.masks import hold"}, "masks, which is on floor 2"),
        ({"decision": "from . import pruner"}, "pruner, which is on floor 3"),
        ({"masks": "def late():\n    from lightning_prune.pruner import Pruner"}, "pruner, which is on floor 3"),
        ({"masks": "from lightning_prune import Budget"}, "lightning_prune, which is on floor 5"),
        ({"pruner": "import lightning_prune.methods.rigl"}, "methods.rigl, which is on floor 4"),
        ({"methods__rigl": "from lightning_prune.methods.nisp import nisp_score"}, "methods never import each other"),
        ({"methods__rigl": "from .nisp import nisp_score"}, "methods never import each other"),
        ({"masks": "from lightning.pytorch import Trainer"}, "only floor 3 and those after it know Lightning"),
        ({"graph__rules": "import pytorch_lightning"}, "only floor 3 and those after it know Lightning"),
        ({"decision": "from torch import nn"}, "floor 0 knows no module"),
        ({"decision": "import torch.nn.functional as F"}, "floor 0 knows no module"),
        ({"decision": "import torch\nLAYER = torch.nn.Linear"}, "floor 0 knows no module"),
        ({"decision": "import scipy"}, "floor 0 stands on torch and NumPy alone"),
        ({"graph__labels": "from lightning_prune.graph.rules import RULES"}, "imports go round in a circle"),
        ({"utils": ""}, "utils.py is on no floor"),
    ],
)
def test_a_planted_violation_is_found(planted, sentence):
    found = violations(house(**planted))
    assert len(found) == 1
    assert sentence in found[0]
