"""Checks of the process: servers that fork, greenlets, platforms that freeze, and how it ended."""

from __future__ import annotations

import ast
import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from .findings import Area, Finding, find, fine
from .set_up import protocol_of
from .situation import Situation

_GREEN_WORKERS: Final = ("gevent", "eventlet")
_GEVENT_PATCH: Final = "OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH"
_FROZEN: Final = {
    "AWS_LAMBDA_FUNCTION_NAME": "AWS Lambda",
    "K_SERVICE": "Cloud Run or Knative",
    "FUNCTIONS_WORKER_RUNTIME": "Azure Functions",
    "VERCEL": "Vercel",
}
# Servers that end their processes by a signal.
_SIGNALLING: Final = ("uvicorn", "celery", "hypercorn")
_MAX_WORDS: Final = 8


def check_platform(situation: Situation) -> Iterator[Finding]:
    """Check whether the environment is one of a platform that freezes processes."""
    for variable, name in _FROZEN.items():
        if situation.value(variable):
            yield find("frozen", f"{variable} is set: {name}.")
            with contextlib.suppress(ValueError):
                if float(situation.value("OTEL_RESPONSES_USAGE_FLUSH_TIMEOUT") or 1) == 0:
                    yield find("frozen-no-wait", "OTEL_RESPONSES_USAGE_FLUSH_TIMEOUT is 0.")
            return


def check_server(situation: Situation) -> Iterator[Finding]:
    """Check the settings of gunicorn, and whether the command is a server that needs a hook."""
    settings = _gunicorn_settings(situation)
    worker = str(settings.get("worker_class", ""))
    if settings.get("preload_app"):
        yield find("preload", "preload_app is set.")
    if any(name in worker for name in _GREEN_WORKERS):
        is_patched = situation.value(_GEVENT_PATCH) == "patch_all"
        if situation.zero_code and not is_patched:
            yield find(
                "gevent-order", f"The workers of gunicorn are {worker}, and {_GEVENT_PATCH} is not set."
            )
        if protocol_of(situation, "traces") == "grpc":
            yield find("gevent-grpc", f"The workers of gunicorn are {worker}, and the protocol is grpc.")
    words = [Path(word).name for word in situation.command[:_MAX_WORDS]]
    server = next((name for name in _SIGNALLING if name in words), "uvicorn" if "uvicorn" in worker else None)
    if server is not None:
        yield find("server-signals", f"The server is {server}.")


def _gunicorn_settings(situation: Situation) -> dict[str, Any]:
    """Return what is set for gunicorn: in its file, its variable and the command, the last one counts."""
    words = [*_words(situation.value("GUNICORN_CMD_ARGS")), *situation.command]
    uses_gunicorn = bool(situation.value("GUNICORN_CMD_ARGS")) or any(
        Path(word).name == "gunicorn" for word in situation.command
    )
    options = _options(words)
    file = Path(str(options.get("config", "gunicorn.conf.py")).removeprefix("file:"))
    settings: dict[str, Any] = {}
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                settings.update(
                    {one.id: node.value.value for one in node.targets if isinstance(one, ast.Name)}
                )
    if not uses_gunicorn and situation.command:
        return {}  # the file is of another start of the application
    return {**settings, **options}


def _options(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = {"-k": "worker_class", "--worker-class": "worker_class", "-c": "config", "--config": "config"}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, _, value = word.partition("=")
        if option in names:
            found[names[option]] = value or following
        elif word == "--preload":
            found["preload_app"] = True
    return found


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return []


def check_run(situation: Situation) -> Iterator[Finding]:
    """Check what happened in the process: forks, greenlets, and its end."""
    run, report = situation.run, situation.report
    if run is None:
        return
    if not report.all_processes:
        yield find("run-unseen", f"The exit code was {run.code}.")
        return
    green = situation.state.get("green") or []
    if green and any(not facts["patched"] for facts in report.all("exporter")):
        yield find("gevent-order", f"{green[0]} replaced threads after an exporter was made.")
    if green and any(one.protocol == "grpc" for one in report.exporters):
        yield find("gevent-grpc", f"{green[0]} is in use, and an exporter uses gRPC.")
    if forks := report.all("forked"):
        kinds = "gRPC" if any(".grpc" in module for one in forks for module in one["exporters"]) else "HTTP"
        forked = "A process was" if len(forks) == 1 else f"{len(forks)} processes were"
        yield find("forked", f"{forked} forked after an exporter over {kinds} was made.")
    if situation.is_trial:
        return
    if run.is_stopped:
        yield find("run-stopped", "The application was stopped.")
    elif run.code:
        end = f"the exit code {run.code}" if run.code > 0 else f"the signal {-run.code}"
        yield find("run-failed", f"The application ended with {end}.")
    killed = [one for one in report.processes if one.is_of_interest and not one.has_ended]
    if killed:
        lost = sum(len(one.all("call")) for one in killed)
        ended = "A process" if len(killed) == 1 else f"{len(killed)} processes"
        yield find("killed", f"{ended} ended without exit handlers. Responses calls until then: {lost}.")
    elif any(one.is_of_interest for one in report.processes):
        yield fine(Area.PROCESS, "exit", "The process ended with its exit handlers.")
