"""Glob patterns of module or parameter names -> the parameters they mean."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn


def matching(model: nn.Module, patterns: Iterable[str], argument: str = "ignore") -> set[str]:
    """Names of the parameters that patterns mean; one that matches a module means all parameters under it.

    Args:
        model: whose names are meant.
        argument: what the patterns were given as, for the error.
        patterns: shell-style globs, such as ``"layer3.*"``, ``"*.downsample.0"`` or ``"fc.weight"``.

    Raises:
        ValueError: for a pattern that matches nothing; the message lists near names.
    """
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        under = tuple(f"{name}." for name in modules if fnmatchcase(name, pattern))
        matched = {name for name in parameters if fnmatchcase(name, pattern) or (under and name.startswith(under))}
        if not matched and not under:
            near = get_close_matches(pattern, modules + parameters, n=4, cutoff=0.4) or modules[:4]
            raise ValueError(
                f"{argument} pattern {pattern!r} matches no module or parameter of {type(model).__name__}; "
                f"near names: {', '.join(map(repr, near))}"
            )
        found |= matched
    return found
