"""One paper per file. The files beside this one are found by themselves; only the package re-exports them by name."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lightning_prune.pruner import Pruner


def discover() -> dict[str, type[Pruner]]:
    """Every method there is: class name -> class, in order of file and definition."""
    return dict(_found())


@cache  # a plan of an iterative run asks each time
def _found() -> dict[str, type[Pruner]]:
    found: dict[str, type[Pruner]] = {}
    for entry in iter_modules(__path__):
        module = import_module(f"{__name__}.{entry.name}")
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Pruner) and not name.startswith("_"):
                found[name] = value
    return found


def find(name: str) -> type[Pruner]:
    """A method by its class name or file name, upper or lower case: "L1Filter", "l1_filter", "random_channels".

    Raises:
        ValueError: if there is none; the message lists what there is.
    """
    methods = discover()
    wanted = name.replace("_", "").replace("-", "").lower()
    for known, cls in methods.items():
        if wanted in (known.lower(), cls.__module__.rpartition(".")[2].replace("_", "")):
            return cls
    raise ValueError(f"no method {name!r}; there are {', '.join(methods)}")
