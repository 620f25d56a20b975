"""Runs a program in a process of its own, with the probe in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from .report import Report

_PROBE: Final = Path(__file__).with_name("probe")
_LAUNCHER: Final = "opentelemetry-instrument"
_AFTER_INTERRUPT_S: Final = 15.0
_AFTER_TERMINATE_S: Final = 5.0
_MAX_ERRORS: Final = 4000


class CommandError(Exception):
    """The command cannot be run."""


@dataclass(frozen=True)
class Run:
    """How a program ended, and what the probe saw.

    Attributes:
        report: What the probe wrote.
        code: The exit code; negative for a signal.
        is_stopped: Whether it was stopped because its time was up.
        errors: The end of what it printed on its error output, if that was kept.

    """

    report: Report
    code: int
    is_stopped: bool
    errors: str = ""


def auto_folder() -> str | None:
    """Return the folder that `opentelemetry-instrument` puts on `PYTHONPATH`."""
    spec = find_spec("opentelemetry.instrumentation.auto_instrumentation")
    return str(Path(spec.origin).parent) if spec is not None and spec.origin is not None else None


def is_zero_code(environ: Mapping[str, str], command: Sequence[str] = ()) -> bool:
    """Whether a command runs under `opentelemetry-instrument`, or this process itself does."""
    parts = environ.get("PYTHONPATH", "").split(os.pathsep)
    return auto_folder() in parts or (bool(command) and Path(command[0]).stem == _LAUNCHER)


def complete(command: Sequence[str]) -> list[str]:
    """Return a command that can be run: a file of Python, or `-m`, is run by this Python.

    Raises:
        CommandError: There is no such program.

    """
    first = command[0]
    if first.endswith(".py") or first in {"-m", "-c"}:
        if first.endswith(".py") and not Path(first).is_file():
            raise CommandError(f"There is no file {first}.")
        return [sys.executable, *command]
    beside = Path(sys.executable).with_name(first)  # the programs of a virtual environment that is not active
    program = shutil.which(first) or (str(beside) if os.sep not in first and beside.is_file() else None)
    if program is None:
        raise CommandError(f"There is no program {first}.")
    return [program, *command[1:]]


def run(
    command: Sequence[str],
    environ: Mapping[str, str],
    timeout_s: float,
    *,
    zero_code: bool = False,
    is_quiet: bool = False,
) -> Run:
    """Run a program to its end, at most so long, and return what the probe saw.

    Args:
        command: The program and its arguments.
        environ: Its environment.
        timeout_s: After this time it is stopped, as with Ctrl-C.
        zero_code: Whether to run it as `opentelemetry-instrument` does.
        is_quiet: Whether to keep its output. Otherwise all of it goes to the error output of this process.

    """
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        path = Path(folder) / "events"
        child_environ = {**environ, "RESPONSES_USAGE_DOCTOR_REPORT": str(path)}
        others = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        auto = auto_folder()
        if zero_code and auto is not None:
            here = str(Path.cwd())
            others = [auto, *([] if here in others else [here]), *(part for part in others if part != auto)]
        child_environ["PYTHONPATH"] = os.pathsep.join([str(_PROBE), *others])
        # In a file: a process that the program leaves behind could keep a pipe open for ever.
        with tempfile.TemporaryFile() as output:
            streams: dict[str, Any] = {"stdout": output if is_quiet else sys.stderr}
            streams["stderr"] = output if is_quiet else None
            if is_quiet:
                streams["stdin"] = subprocess.DEVNULL
            process = subprocess.Popen(_with_probe(command, others), env=child_environ, **streams)  # noqa: S603
            code, is_stopped = _wait(process, timeout_s)
            output.seek(0)
            errors = output.read().decode("utf-8", "replace")[-_MAX_ERRORS:]
        return Run(Report.read(path), code, is_stopped, errors)


def _with_probe(command: Sequence[str], others: Sequence[str]) -> list[str]:
    """Have the probe run first also under `opentelemetry-instrument`, which puts its own folder first."""
    if Path(command[0]).stem != _LAUNCHER or (env := shutil.which("env")) is None:
        return list(command)
    rest, index = list(command[1:]), 0
    while index < len(rest) and rest[index].startswith("--"):
        index += 1 if "=" in rest[index] else 2
    if index >= len(rest):
        return list(command)
    path = os.pathsep.join([str(_PROBE), auto_folder() or "", str(Path.cwd()), *others])
    return [command[0], *rest[:index], env, f"PYTHONPATH={path}", *complete(rest[index:])]


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[int, bool]:
    """Wait for the end of a process, and return its exit code and whether it had to be stopped."""
    before = signal.getsignal(signal.SIGINT)
    try:
        # Ctrl-C goes to both processes. The program decides how it ends, and then the report is made.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, lambda *_: None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout_s), False
        for number, patience_s in ((signal.SIGINT, _AFTER_INTERRUPT_S), (signal.SIGTERM, _AFTER_TERMINATE_S)):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(patience_s), True
        process.kill()
        return process.wait(), True
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, before)
