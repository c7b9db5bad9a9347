"""The commands of ``lightning-prune``: parse, call, print.

A command is a module with ``add_arguments(parser)`` and ``run(options) -> exit status``. It is imported when it is
asked for, so that one command does not wait for what another one needs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from lightning_prune.errors import PruneError

PROGRAM = "lightning-prune"
LIGHTNING = {
    "fit": "train, and prune while training, as a LightningCLI config says",
    "validate": "run the validation loop of a config, also on a checkpoint of a cut model",
    "test": "run the test loop of a config, also on a checkpoint of a cut model",
    "predict": "run the prediction loop of a config, also on a checkpoint of a cut model",
}
OWN = {
    "demo": "train a small network on handwritten digits, prune it while it trains, and report",
    "methods": "the table of methods: paper, what they remove and need, default schedule",
    "compare": "methods, budgets and seeds under one protocol, with dense, random and scratch rows",
    "export": "write a checkpoint as state dict, torch.export program and ONNX, each compared with the model; int8",
    "report": "one page of HTML on checkpoints or a comparison: what went, what it saved, how to do it again",
    "explain": "dry run: what of a model may go, what is frozen and why, and what a budget would save",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error on stderr and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line, without the program's name; by default the process's own.

    Returns:
        0 if what was asked was done, 1 if not, 2 for a command line that cannot be read, 130 if interrupted. Errors are
        one line on stderr; ``--debug`` anywhere adds the traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    command = given[0] if given else ""
    if os.getcwd() not in sys.path:  # one's own modules are found where the command runs, after all installed ones
        sys.path.append(os.getcwd())
    try:
        if command in LIGHTNING:
            status = import_module("lightning_prune.cli").run(given)
        elif command in OWN:
            module = import_module(f"{__name__}.{command}")
            parser = Parser(prog=f"{PROGRAM} {command}", description=module.__doc__, epilog=_DEBUG)
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(parser)
            status = module.run(parser.parse_args(given[1:]))
        else:
            _top().parse_args(given or ["--help"])
            status = 2
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        if isinstance(leave.code, str):
            print(one_line(leave.code), file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{PROGRAM} {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{PROGRAM} {command}: error: {_said(error)}", file=sys.stderr)
        return 1
    return int(status)


def write(out: Path | None, name: str, text: str, value: object) -> None:
    """Print a text and, with a directory to write to, leave it there with the same as JSON beside it.

    Args:
        out: directory, made if it is not there; None to print only.
        name: of the text's file with its suffix; the JSON has the same name with ``.json``.
        text: what is printed.
        value: what JSON can say.
    """
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text + "\n", encoding="utf-8")
        path = (out / name).with_suffix(".json")
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten: {out / name}, {path}")


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's tips and its remarks on small data; our own warnings are heard."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.(pytorch|fabric)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_DEBUG = "--debug adds a traceback to an error"


def _said(error: Exception) -> str:
    """What an error says; its type too where the type is part of the message."""
    text = one_line(str(error))
    plain = isinstance(error, PruneError | ValueError | RuntimeError | FileNotFoundError)
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _top() -> Parser:
    commands: Mapping[str, str] = {**LIGHTNING, **OWN}
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    parser = Parser(
        prog=PROGRAM,
        description="Prune networks while they train.",
        usage=f"{PROGRAM} COMMAND [OPTIONS]",
        epilog=f"commands:\n{listed}\n\n'{PROGRAM} COMMAND --help' says more; {_DEBUG}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    parser.add_argument("command", choices=list(commands), metavar="COMMAND", help="one of those below")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from lightning_prune import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()
