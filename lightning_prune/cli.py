"""``lightning-prune fit | validate | test | predict``: LightningCLI that knows every callback by its class name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_prune import checkpoint, schedule
from lightning_prune.commands import LIGHTNING, PROGRAM, one_line
from lightning_prune.methods import discover

REGISTERED = (*discover().values(), checkpoint.PrunedCheckpoint, schedule.Schedule)
"""Classes that a config may call by their bare names; a class is known once it is imported."""


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
        print(f"{PROGRAM} {arguments[0]}: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0
