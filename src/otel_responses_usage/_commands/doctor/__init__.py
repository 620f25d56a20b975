"""The command `doctor`: finds out why telemetry does not arrive, or is not complete."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any, Final

from . import calls, delivery, neighbours, patches, process, set_up, settings, versions
from .child import CommandError, complete, is_zero_code
from .child import run as run_child
from .findings import Area, Finding, Level, find, without_consequences
from .situation import Redactor, Situation

Check = Callable[[Situation], Iterator[Finding]]

# In the order of the output.
CHECKS: Final[tuple[Check, ...]] = (
    versions.check_versions,
    set_up.check_switches,
    set_up.check_exporters,
    set_up.check_process,
    settings.check_own_settings,
    settings.check_names,
    settings.check_conventions,
    settings.check_service,
    settings.check_sampling,
    settings.check_metrics,
    settings.check_limits,
    delivery.check_endpoints,
    delivery.check_delivery,
    patches.check_patches,
    neighbours.check_neighbours,
    process.check_platform,
    process.check_server,
    process.check_run,
    calls.check_calls,
)

_WIDTH: Final = 80
_INDENT: Final = "           "
# Of a clone. An installed package has no documentation beside it.
_DOCS: Final = Path(__file__).parents[2].parent.parent / "docs" / "doctor.md"
_MODEL: Final = "gpt-5.4-mini"
_TRIAL_S: Final = 45.0
_RUN_S: Final = 60.0
_LABELS: Final = {Level.OK: "ok", Level.NOTE: "note", Level.PROBLEM: "PROBLEM"}
_EXIT_PROBLEMS: Final = 1
_EXIT_USAGE: Final = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Finds out why telemetry does not arrive, or is not complete. Sends a test span and a test metric "
        "with the exporters that opentelemetry-instrument sets up in this environment. With --run it runs "
        "your application instead, and looks at what happens in it."
    )
    parser.epilog = "Exit code: 0 if there is no problem, 1 if there is one, 2 if the command is wrong."
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--in-code",
        action="store_true",
        help="the application sets OpenTelemetry up in code, without opentelemetry-instrument",
    )
    parser.add_argument(
        "--zero-code",
        action="store_true",
        help="with --run: start it with opentelemetry-instrument",
    )
    parser.add_argument(
        "--accept",
        metavar="NAME",
        action="append",
        default=[],
        help="take this problem for a note; may be given more than once",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        help=f"the longest time for --run ({_RUN_S:g}) or for the test ({_TRIAL_S:g})",
    )
    parser.add_argument(
        "--api",
        action="store_true",
        help="make one small call of the API that is billed, close it early, and have its usage looked up",
    )
    parser.add_argument("--model", default=_MODEL, help=f"the model of --api ({_MODEL})")
    parser.add_argument(
        "--run",
        dest="program",
        metavar="COMMAND",
        nargs=argparse.REMAINDER,
        help="run this application and look at its calls: app.py, -m shop, gunicorn wsgi:app",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the checks, print the findings, and return the exit code."""
    command = tuple(arguments.program or ())
    if arguments.program is not None and not command:
        return _refuse("--run needs a command.")
    try:
        command = tuple(complete(command)) if command else ()
    except CommandError as error:
        return _refuse(str(error))
    environ = dict(os.environ)
    zero_code = not arguments.in_code
    if command:
        zero_code = arguments.zero_code or is_zero_code(environ, command)
    redactor = Redactor(environ)
    situation = _with_run(Situation(environ, zero_code, command), arguments)
    checks = CHECKS
    if arguments.api:
        checks = (*CHECKS, functools.partial(_call_api, arguments.model))
    found = [finding for check in checks for finding in _findings_of(check, situation)]
    findings = [_cleaned(finding, redactor, arguments.accept) for finding in without_consequences(found)]
    areas = list(Area)
    findings.sort(key=lambda finding: areas.index(finding.area))
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if arguments.json:
        _print_json(findings, problems, situation)
    else:
        _print(findings, problems, situation)
    return _EXIT_PROBLEMS if problems else 0


def _with_run(situation: Situation, arguments: argparse.Namespace) -> Situation:
    """Run the application, or the test, and add what was seen."""
    if situation.command:
        _say(f"Running {os.path.basename(situation.command[0])} ...")  # noqa: PTH119  # its arguments may be secret
        result = run_child(
            situation.command,
            situation.environ,
            arguments.timeout or _RUN_S,
            zero_code=arguments.zero_code and not is_zero_code(situation.environ, situation.command),
        )
        return replace(situation, run=result)
    if not situation.zero_code and util.find_spec("opentelemetry.sdk") is None:
        return situation
    _say("Sending a test span and a test metric ...")
    trial = [sys.executable, "-m", f"{__package__}.trial"]
    if not situation.zero_code:
        trial += ["--in-code", set_up.protocol_of(situation, "traces")]
    result = run_child(
        trial,
        _trial_environ(situation),
        arguments.timeout or _TRIAL_S,
        zero_code=situation.zero_code,
        is_quiet=True,
    )
    return replace(situation, run=result)


def _trial_environ(situation: Situation) -> dict[str, str]:
    """Return the environment of the test. Its logs are not exported, and it tries for 5 s, not for 10 s."""
    environ = dict(situation.environ)
    environ["OTEL_LOGS_EXPORTER"] = "none"
    environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", "5")
    return environ


def _call_api(model: str, situation: Situation) -> Iterator[Finding]:
    from . import api

    if util.find_spec("openai") is None or util.find_spec("opentelemetry.sdk") is None:
        return iter(())  # the checks of versions tell so
    _say(api.announce(situation, model))
    return api.check_api(situation, model)


def _findings_of(check: Check, situation: Situation) -> list[Finding]:
    """Run one check. A fault of the check does not stop the others."""
    found: list[Finding] = []
    try:
        found += check(situation)
    except Exception as error:
        name = getattr(check, "__name__", "check_api")
        found.append(find("check-failed", f"{name}: {type(error).__name__}: {error}"))
    return found


def _cleaned(finding: Finding, redactor: Redactor, accepted: Iterable[str]) -> Finding:
    level = finding.level
    if level is Level.PROBLEM and finding.name in accepted:
        level = Level.NOTE
    return replace(finding, level=level, found=redactor.clean(" ".join(finding.found.split())))


def _print_json(findings: list[Finding], problems: int, situation: Situation) -> None:
    told: dict[str, Any] = {
        "problems": problems,
        "started_with": "opentelemetry-instrument" if situation.zero_code else "code",
        "findings": [
            {
                "name": finding.name,
                "area": finding.area.value,
                "level": finding.level.value,
                "found": finding.found,
                "advice": finding.advice,
            }
            for finding in findings
        ],
    }
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


def _print(findings: list[Finding], problems: int, situation: Situation) -> None:
    if situation.is_trial:
        how = "opentelemetry-instrument" if situation.zero_code else "code with the exporters of OTLP"
        lines = [f"Checked: what {how} sets up in this environment."]
    else:
        how = "with opentelemetry-instrument" if situation.zero_code else "as it is"
        lines = [f"Checked: the application, started {how}."]
    for area, of_area in itertools.groupby(findings, lambda finding: finding.area):
        lines += ["", area.value]
        for finding in of_area:
            lines += _wrapped(f"  {_LABELS[finding.level]:9}", _named(finding))
            if finding.advice:
                lines += _wrapped(_INDENT, f"Do: {_plain(finding.advice)}")
    notes = sum(finding.level is Level.NOTE for finding in findings)
    counts = f"{_counted(problems, 'problem')}, {_counted(notes, 'note')}."
    page = "docs/doctor.md" if _DOCS.is_file() else 'The page "doctor" of the documentation'
    lines += ["", *textwrap.wrap(f"{counts.capitalize()} {page} explains each by its name.", _WIDTH)]
    sys.stdout.write("\n".join(lines) + "\n")


def _named(finding: Finding) -> str:
    return finding.found if finding.level is Level.OK else f"{finding.found} [{finding.name}]"


def _plain(text: str) -> str:
    return text.replace("`", "")


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def _say(text: str) -> None:
    sys.stderr.write("\n".join(textwrap.wrap(text, _WIDTH)) + "\n")
    sys.stderr.flush()


def _refuse(text: str) -> int:
    _say(f"otel-responses-usage doctor: {text}")
    return _EXIT_USAGE
