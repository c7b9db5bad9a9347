"""``lightning-prune fit | validate | test | predict``: LightningCLI that knows every callback by its class name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_prune import checkpoint, schedule
from lightning_prune.commands import LIGHTNING, PROGRAM
from lightning_prune.methods import discover

REGISTERED: tuple[type, ...] = (
    *discover().values(),
    checkpoint.PrunedCheckpoint,
    *(schedule.OneShot, schedule.Iterative, schedule.Gradual, schedule.Updates, schedule.Rounds),
)
"""Our classes that a config may call by their bare names: a class is known to LightningCLI once it is imported."""


class PruneCLI(LightningCLI):
    """`LightningCLI` as it comes, but that checkpoints are read with ``weights_only`` unless a config says otherwise.

    A config names the callback and a budget, and nothing more is needed:

        trainer:
          callbacks:
            - class_path: TaylorWeight
              init_args: {budget: 0.5}
    """

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(told(str(error))) from error

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if "weights_only" in self._subcommand_method_arguments[subcommand]:
            parser.set_defaults(weights_only=True)
        return parser


def run(arguments: Sequence[str]) -> int:
    """Run a LightningCLI command.

    Args:
        arguments: the command's name, then its options.

    Returns:
        0, or 2 for a command line or config that cannot be read, after one line on stderr.
    """
    strict: dict[str, Any] = {"exit_on_error": False}
    try:
        PruneCLI(
            parser_kwargs={"prog": PROGRAM, **strict, **{name: dict(strict) for name in LIGHTNING}},
            save_config_kwargs={"overwrite": True},
            args=list(arguments),
        )
    except ArgumentError as error:
        print(f"{PROGRAM} {arguments[0]}: error: {told(str(error))}", file=sys.stderr)
        return 2
    return 0


def told(message: str) -> str:
    r"""What jsonargparse says in many lines, in one: where it went wrong and why, without what else it tried.

    Example:
        >>> told("Parser key 'a':\n  Errors:\n    - Expected a <class 'int'>\n    - too small\n  Given value: 0")
        "Parser key 'a': too small; given 0"
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)] or lines
    text = " ".join(dict.fromkeys(kept))  # several alternatives may say the same
    given = [line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")]
    scalars = [value for value in given if not value.startswith(("[", "{", "Namespace", "NestedArg"))]
    if scalars and scalars[0] not in text:
        text = f"{text}; given {scalars[0]}"
    unknown = re.search(r"Expected a dot import path string: (\w+)", text)
    if unknown and 'Parser key "budget"' in text:
        text = text.replace(unknown[0], f"a budget is a fraction or {{keep: 0.5, of: flops}}, got {unknown[1]!r}")
    elif unknown:
        names = [cls.__name__ for cls in REGISTERED]
        near = get_close_matches(unknown[1], names, n=3) or names
        text = text.replace(unknown[0], f"no class {unknown[1]!r} is known by its bare name; near: {', '.join(near)}")
    refused = re.search(r"class_path '[\w.]*?(\w+)': Option '(\w+)' is not accepted", text)
    if refused and (cls := {cls.__name__: cls for cls in REGISTERED}.get(refused[1])):
        names = sorted(_arguments(cls))
        near = get_close_matches(refused[2], names, n=3)
        text = f"{text}; near: {', '.join(near)}" if near else f"{text}; {refused[1]} takes {', '.join(names)}"
    if "Key must be a string, got: True" in text:
        text += " YAML reads a bare on as true; quote it: 'on'"
    return text


def _arguments(cls: type) -> set[str]:
    """Names that a class takes, those it hands on to its bases included."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    made = [inspect.signature(vars(base)["__init__"]).parameters for base in cls.__mro__ if "__init__" in vars(base)]
    return {name for names in made for name, p in names.items() if p.kind in kinds} - {"self"}


_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class ",
    "Expected a path but ",
    "Problem with given class_path 'lightning.Callback'",
    "Not a valid subclass of ",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
    "Given value",
)
