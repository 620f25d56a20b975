"""The command `otel-responses-usage`. A command's module is imported only if the command is run.

Each module has two functions:

- `add_arguments(parser: argparse.ArgumentParser) -> None` adds its options.
- `run(arguments: argparse.Namespace) -> int` runs the command and returns the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from .._version import __version__


class Command(NamedTuple):
    """A command: the name of its module in this folder, and its line in `--help`."""

    module: str
    help: str


COMMANDS: Final = {
    "doctor": Command("doctor", "Find out why telemetry does not arrive, or is not complete."),
    "reconcile": Command(
        "reconcile", "Compare the token totals in Prometheus with the provider's usage record."
    ),
}

_INTERRUPTED: Final = 130  # the exit code that shells use for Ctrl-C


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, and return the exit code.

    Args:
        words: The arguments. The default is those of the process.

    """
    words = sys.argv[1:] if words is None else list(words)
    parser = argparse.ArgumentParser(prog="otel-responses-usage", description="Tools for exact token usage.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if words[:1] == [name]:
            module = importlib.import_module(f".{command.module}", __name__)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone, as in `... | head`. Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
