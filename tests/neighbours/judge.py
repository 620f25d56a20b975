"""Compares runs beside neighbours with the neighbours alone, and prints a table: see `scripts/test-neighbours`.

Each argument is `NEIGHBOUR[/VARIANT]=PYTHON`. Without a variant all variants of the neighbour are run. `PYTHONPATH`
is a folder with our package. The exit code is 1 if a row of the table is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 90.0
AT_ONCE = 2
NAMES = (
    "none",
    "genai",
    "openinference",
    "logfire",
    "logfire/open",
    "logfire/plain",
    "logfire/client",
    "openllmetry",
    "langfuse",
    "agents",
    "pydantic-ai",
    "agent-framework",
    "httpx",
    "aiohttp",
    "ddtrace",
)
ORDERS = ("ours first", "theirs first", "zero-code")
# Neighbours that `opentelemetry-instrument` switches on.
WITH_ENTRY_POINT = ("genai", "openinference", "openllmetry", "agents", "httpx", "aiohttp")
ORDERS_OF = {"none": ("ours first", "zero-code")}
SILENT = ("none", "logfire/plain", "ddtrace")  # without spans of OpenTelemetry

EARLY_WORDS = ("closed", "left", "cancelled")
# These are judged by themselves. They are in neither column of the table.
# A neighbour may record the usage of the application's own `retrieve()` as another inference.
ASIDE = ("streaming-lines", "parse-raises", "background", "fetched-stream", "chat-completion", "refused", "inner-call", "inner-stream")

COLUMNS = "{:16} {:8} {:13} {:34} {:12} {:12} {:6} {}"


@dataclass
class Row:
    """A run beside a neighbour, and what is wrong with it."""

    name: str
    order: str
    run: dict[str, Any]
    alone: dict[str, Any]
    faults: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Find what is wrong."""
        if "failed" in self.run or "failed" in self.alone:
            which = "failed" if "failed" in self.run else "failed alone"
            self.faults.append(f"{which}: {self.run.get('failed') or self.alone.get('failed')}")
            return
        self._judge_sums()
        if self.run["calls_counted"] != self.run["calls_made"]:
            self.faults.append(f"{self.run['calls_counted']} of {self.run['calls_made']} calls counted")
        self.faults += [f"misplaced: {what}" for what in self.run["misplaced"]]
        if not self.alone["theirs"] and self.name not in SILENT:
            self.faults.append("the neighbour alone makes no spans")
        unknown = set(self.run["ours"]) - {"chat", "usage", "fetch_response"}
        if unknown:
            self.faults.append(f"unknown spans of ours: {sorted(unknown)}")
        if self.run["traced_look_ups"]:
            self.faults.append(f"{self.run['traced_look_ups']} look-ups with `traceparent`")
        self._compare("theirs", "stray span", "span lost")
        self._compare("complaints", "logged", "no longer logged")
        for kind in ("types", "errors"):
            for scenario in {**self.run[kind], **self.alone[kind]}:
                now, before = self.run[kind].get(scenario), self.alone[kind].get(scenario)
                if now != before:
                    self.faults.append(f"{scenario}: {now}, alone {before}")
        if leaks := [leak for leak in self.run["leaks"] if leak not in self.alone["leaks"]]:
            self.faults.append(f"context not restored: {sorted(set(leaks))}")

    def _judge_sums(self) -> None:
        for scenario, truth in self.run["truth"].items():
            metric, spans = self.times("metric", scenario), self.times("spans", scenario)
            least = most = 1.0
            if scenario in ASIDE:
                alone = self.alone["spans"].get(scenario, 0) / self.alone["truth"].get(scenario, truth)
                least, most = max(1.0, alone), max(1.0, alone)
                # The neighbour records the application's own `retrieve()`, and we the call.
                if scenario == "background" and alone:
                    most = alone + 1
            if not least <= spans <= most:
                self.faults.append(f"{scenario}: spans {spans:g}x")
            if metric != 1:
                self.faults.append(f"{scenario}: metric {metric:g}x")

    def _compare(self, kind: str, more: str, fewer: str) -> None:
        now, before = Counter(self.run[kind]), Counter(self.alone[kind])
        for what, count in (now - before).items():
            self.faults.append(f"{more}: {count} {what}")
        for what, count in (before - now).items():
            self.faults.append(f"{fewer}: {count} {what}")

    def times(self, kind: str, *scenarios: str) -> float:
        """The sum over scenarios as a multiple of the truth."""
        truth = sum(self.run["truth"][scenario] for scenario in scenarios)
        return round(sum(self.run[kind].get(scenario, 0) for scenario in scenarios) / truth, 2) if truth else 0

    def cells(self) -> tuple[str, ...]:
        """The row of the table, without its last column."""
        if "failed" in self.run:
            return (self.name, "", self.order, *[""] * 4)
        judged = [scenario for scenario in self.run["truth"] if scenario not in ASIDE]
        early = [scenario for scenario in judged if any(word in scenario for word in EARLY_WORDS)]
        done = [scenario for scenario in judged if scenario not in early]
        kept = sum(self.run["spans"].get(scenario, 0) >= self.run["truth"][scenario] for scenario in early)
        return (
            self.name,
            self.run["version"],
            self.order,
            ", ".join(f"{count} {kind}" for kind, count in sorted(self.run["ours"].items())) or "-",
            *[
                "/".join(f"{self.times(kind, *group):g}x" for group in (done, early))
                for kind in ("metric", "spans")
            ],
            f"{kept}/{len(early)}",
        )


def run(python: str, program: str, *args: str, package: str) -> dict[str, Any]:
    """Run a program in a process of its own. Returns what it printed, or `failed`."""
    kept = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "TMPDIR")
    environ = {name: os.environ[name] for name in kept if name in os.environ}
    try:
        done = subprocess.run(  # noqa: S603  # the project's own programs
            [python, str(HERE / program), *args],
            env={
                **environ,
                "PACKAGE": package,
                "PYTHONDONTWRITEBYTECODE": "1",
                "NO_PROXY": "127.0.0.1",
                "LOGFIRE_SEND_TO_LOGFIRE": "false",
                "OPENAI_API_KEY": "k",
                "OTEL_RESPONSES_USAGE_EXIT_TIMEOUT": "2",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT_S:g} s"}
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"failed": f"exit code {done.returncode}: {last[:200]}", "log": done.stderr}
    return result


def orders_of(name: str) -> tuple[str, ...]:
    """The orders of a neighbour."""
    return ORDERS_OF.get(name, ORDERS if name in WITH_ENTRY_POINT else ORDERS[:2])


def rows(pythons: dict[str, str], orders: list[str], package: str) -> list[Row]:
    """Run all neighbours in all orders, two processes at a time, and print each row."""
    say(COLUMNS.format("neighbour", "version", "order", "spans of ours", "metric", "spans", "early", "verdict"))
    say(COLUMNS.format("", "", "", "", "done/early", "done/early", "kept", ""))
    made: list[Row] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        for name, python in pythons.items():
            chosen = [order for order in orders_of(name) if not orders or order in orders]
            for order in ("alone", *chosen):
                futures[name, order] = pool.submit(run, python, "measure.py", name, order, package=package)
        for (name, order), future in futures.items():
            row = Row(name, order, future.result(), futures[name, "alone"].result())
            if order != "alone":
                row.judge()
                made.append(row)
            show(row)
    return made


def show(row: Row) -> None:
    """Print a row, and below it what else is wrong."""
    verdict = "ok" if not row.faults else "WRONG"
    say(COLUMNS.format(*row.cells(), verdict if row.order != "alone" else ""))
    doubled: dict[str, list[str]] = {}
    for fault in row.faults:
        scenario, _, rest = fault.partition(": ")
        if rest.startswith(("spans ", "metric ")):
            doubled.setdefault(rest, []).append(scenario)
        else:
            say(f"    {fault}")
    for rest, scenarios in doubled.items():
        say(f"    {rest}: {', '.join(scenarios)}")
    if "log" in row.run:
        say(row.run["log"])


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line.rstrip()}\n")
    sys.stdout.flush()


def main() -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(prog="scripts/test-neighbours")
    parser.add_argument("runs", nargs="+", metavar="NEIGHBOUR=PYTHON")
    parser.add_argument("--order", action="append", default=[], choices=ORDERS)
    parser.add_argument("--json", metavar="FILE", help="also write what each process recorded")
    args = parser.parse_args()
    began = time.monotonic()
    pythons: dict[str, str] = {}
    for pair in args.runs:
        asked, _, python = pair.partition("=")
        chosen = [name for name in NAMES if asked in (name, name.partition("/")[0])]
        if not chosen:
            parser.error(f"there is no neighbour {asked}")
        pythons.update(dict.fromkeys(chosen, python))
    package = os.environ.pop("PYTHONPATH")
    made = rows(pythons, args.order, package)
    if args.json:
        Path(args.json).write_text(json.dumps([vars(row) for row in made], indent=1))
    wrong = sum(bool(row.faults) for row in made)
    say(f"{len(made) - wrong} passed, {wrong} failed in {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
