"""The same streams through the same SDK with each public instrumentation, with ours and with none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from . import pieces
from .plot import Curve, picture

PICTURE = Path(__file__).parents[1] / "docs" / "pieces.svg"

_ROOT = Path(__file__).parents[1]
_SDK = ("openai", "opentelemetry-sdk", "typing-extensions")
# Distribution by the name of its switch in `peer`.
DISTRIBUTIONS = {
    "none": "openai",
    "ours": "otel-responses-usage",
    "openinference": "openinference-instrumentation-openai",
    "traceloop": "opentelemetry-instrumentation-openai",
    "ddtrace": "ddtrace",
    "genai": "opentelemetry-instrumentation-genai-openai",
    "logfire": "logfire",
}
HOW = ("sync", "async")


@dataclass(frozen=True)
class Cost:
    """What is added: the median of the pairs, and half of the distance between their quartiles."""

    value: float
    spread: float

    @classmethod
    def of(cls, values: list[float]) -> Cost:
        """Return the median and the spread of measurements."""
        low, _, high = quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
        return cls(median(values), (high - low) / 2)

    def text(self, digits: int = 0) -> str:
        """Return the microseconds for a table."""
        return f"{self.value / 1000:+,.{digits}f} ± {self.spread / 1000:,.{digits}f}"


class Measured:
    """What one instrumentation costs and records, as `peer` prints it."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._pairs = found["pairs"]
        self._events = found["events"]
        self._more = found["events"] - found["short"]

    def recorded(self, how: str = "sync") -> dict[str, Any]:
        """Return what is recorded of a call. It is empty if the instrumentation fails."""
        return self._pairs[0][how]["recorded"] or {}

    def call(self, how: str, *, by_hand: bool = False) -> Cost | None:
        """Return the nanoseconds that are added to a call of nine events, or those of the same by hand."""
        if by_hand and not self.recorded(how).get("by_hand"):
            return None
        found = [_added(pair[how]["call"], 2 if by_hand else 1) for pair in self._pairs if pair[how]["call"]]
        return Cost.of(found) if found else None

    def own_call(self, how: str) -> float:
        """Return the nanoseconds that the SDK itself takes for such a call."""
        return float(median(turn[0] for pair in self._pairs for turn in pair[how]["call"]))

    def event(self, division: str, how: str) -> Cost | None:
        """Return the nanoseconds that are added to an event.

        This is what is added to a long stream and not to a short one.
        """
        found = [
            (sum(watched - plain for plain, watched in turns) - _added(pair[how]["call"], 1)) / self._more
            for pair in self._pairs
            if (turns := pair[how]["streams"][division]) and pair[how]["call"]
        ]
        return Cost.of(found) if found else None

    def own_event(self, division: str, how: str) -> float:
        """Return the nanoseconds that the SDK itself takes for an event."""
        streams = [pair[how]["streams"][division] for pair in self._pairs]
        return float(median(sum(plain for plain, _ in turns) for turns in streams) / self._events)


def _added(turns: list[list[float]], which: int) -> float:
    return median(turn[which] - turn[0] for turn in turns)


def measure(name: str, python: str, *, quick: bool) -> Measured:
    """Measure an instrumentation in a process of its own, by the Python of its environment."""
    command = [python, "-m", "benchmarks.peer", name, *(["--quick"] if quick else [])]
    done = subprocess.run(  # noqa: S603
        command, cwd=_ROOT, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return Measured(json.loads(done.stdout))


def report(*, quick: bool) -> dict[str, str]:
    """Install, measure, draw, and return the Markdown for each part of the pages.

    `BENCH_PEERS` names a directory for the environments. Without it they are made anew.
    """
    kept = os.environ.get("BENCH_PEERS")
    found: dict[str, Measured] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, distribution in DISTRIBUTIONS.items():
            sys.stderr.write(f"Measuring: {distribution} ...\n")
            directory = Path(kept or scratch) / name
            python = directory / "bin" / "python"
            # Ours is what it is now, and not what it was when the directory was made.
            if not python.exists() or name == "ours":
                _install(name, directory, python)
            versions[name] = _version(python, distribution)
            found[name] = measure(name, str(python), quick=quick)
    if not quick:
        PICTURE.write_text(picture(curves(found)))
    return {
        "peers": f"{costs_table(found, versions)}\n\n{records_table(found, versions)}",
        "comparison": short_table(found, versions),
    }


def curves(found: dict[str, Measured]) -> dict[str, dict[str, Curve]]:
    """Return microseconds per event by events per piece, for each instrumentation, sync and async."""
    events = pieces.padded(2_000)
    sizes = {
        division: len(events) / len(divide(events))
        for division, divide in pieces.DIVISIONS.items()
        if division != pieces.GZIP  # the decoding is a part of its cost
    }
    return {
        how: {
            _named(name, bare=True): {
                size: max(cost.value, 0.0) / 1000
                for division, size in sizes.items()
                if (cost := measured.event(division, how)) is not None
            }
            for name, measured in found.items()
            if name != "none" and measured.recorded(how).get("attributes")
        }
        for how in HOW
    }


def costs_table(found: dict[str, Measured], versions: dict[str, str]) -> str:
    """Return what each adds to an event at each division, and to a call. Each cell has sync and async."""
    columns = [*pieces.DIVISIONS, "call of 9 events", "the same by hand"]
    none = found["none"]
    own = [
        " / ".join(f"{none.own_event(division, how) / 1000:,.0f}" for how in HOW)
        for division in pieces.DIVISIONS
    ]
    own += [" / ".join(f"{none.own_call(how) / 1000:,.0f}" for how in HOW), ""]
    lines = [
        "| microseconds, sync / async | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        f"| `openai` {versions['none']} itself | " + " | ".join(own) + " |",
    ]
    for name, measured in found.items():
        cells = [
            _cell(name, measured, [measured.event(division, how) for how in HOW], 2)
            for division in pieces.DIVISIONS
        ]
        cells.append(_cell(name, measured, [measured.call(how) for how in HOW]))
        by_hand = [cost for how in HOW if (cost := measured.call(how, by_hand=True))]
        cells.append(_cell(name, measured, by_hand) if by_hand else "")
        lines.append(f"| {_named(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_table(found: dict[str, Measured], versions: dict[str, str]) -> str:
    """Return what each adds to a sync client: to an event at two divisions, and to a call."""
    divisions = (pieces.ONE_EVENT, pieces.FOUR_KIB)
    columns = [*(f"event, {division}" for division in divisions), "call of 9 events"]
    lines = ["| microseconds, sync | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, measured in found.items():
        if name != "none":
            cells = [_cell(name, measured, [measured.event(division, HOW[0])], 2) for division in divisions]
            cells.append(_cell(name, measured, [measured.call(HOW[0])]))
            lines.append(f"| {_named(name)} {versions[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def records_table(found: dict[str, Measured], versions: dict[str, str]) -> str:
    """Return what each has exported of one call, as it was seen in this run."""
    lines = [
        "| recorded of a call of 9 events | version | spans | token counts | metric points | content |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, measured in found.items():
        if name == "none":
            continue
        recorded = measured.recorded()
        if not recorded:
            lines.append(f"| {_named(name)} | {versions[name]} | fails |  |  |  |")
            continue
        attributes, points = recorded["attributes"], recorded["points"]
        of = " and ".join(map(str, attributes))
        spans = f"{len(attributes)}, with {of} attributes" if attributes else "none"
        told = f"{sum(points.values())} of {len(points)} instruments" if points else "none"
        lines.append(
            f"| {_named(name)} | {versions[name]} | {spans} | {'yes' if recorded['has_usage'] else 'no'} "
            f"| {told} | {' and '.join(recorded['content']) or 'none'} |"
        )
    return "\n".join(lines)


def _cell(name: str, measured: Measured, costs: Sequence[Cost | None], digits: int = 0) -> str:
    if name != "none" and measured.recorded() and not measured.recorded()["attributes"]:
        return "sees nothing"
    return " / ".join(dict.fromkeys(cost.text(digits) if cost else "fails" for cost in costs))


def _named(name: str, *, bare: bool = False) -> str:
    if name == "none":
        return "none, twice: the error"
    return DISTRIBUTIONS[name] if bare else f"`{DISTRIBUTIONS[name]}`"


def _version(python: Path, distribution: str) -> str:
    script = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    command = [str(python), "-c", script, distribution]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def _install(name: str, directory: Path, python: Path) -> None:
    distribution = f"{_ROOT}" if name == "ours" else DISTRIBUTIONS[name]
    wanted = [*_SDK, *([] if name == "none" else [distribution])]
    uv = shutil.which("uv")
    if uv is not None:
        _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(directory))
        _run(uv, "pip", "install", "--quiet", "--python", str(python), *wanted)
    else:
        _run(sys.executable, "-m", "venv", "--clear", str(directory))
        _run(str(python), "-m", "pip", "install", "--quiet", *wanted)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603


def _environment() -> dict[str, Any]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(["examples", "."]), "PYTHONWARNINGS": "ignore"}
