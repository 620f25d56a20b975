"""Compares runs beside neighbours with runs of the neighbours alone: see `scripts/test-neighbours`.

Each argument is `NEIGHBOUR[/VARIANT]=PYTHON`. Without a variant all variants of the neighbour are run.
`PYTHONPATH` is a folder with our package. The exit code is 1 if a row of the tables is wrong.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neighbours import NEIGHBOURS, is_early

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
TIMEOUT_S = 90.0
AT_ONCE = 2
ORDERS = ("ours first", "theirs first", "zero-code")
BOTH = ORDERS[:2]

# These are judged by themselves. They are in neither column of the table.
# A neighbour may record the usage of the application's own `retrieve()` as another inference.
ASIDE = (
    "streaming-lines",
    "parse-raises",
    "background",
    "fetched-stream",
    "chat-completion",
    "refused",
    "inner-call",
    "inner-same-model",
    "inner-stream",
)

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
        if not self.alone["theirs"] and NEIGHBOURS[self.name].makes_spans:
            self.faults.append("the neighbour alone makes no spans")
        unknown = set(self.run["ours"]) - {"chat", "usage", "fetch_response"}
        if unknown:
            self.faults.append(f"unknown spans of ours: {sorted(unknown)}")
        if self.run["traced_look_ups"]:
            self.faults.append(f"{self.run['traced_look_ups']} look-ups with `traceparent`")
        self.faults += [f"stray span: {what}" for what in self._more_than_alone("theirs")]
        self.faults += [f"logged: {what}" for what in self._more_than_alone("complaints")]
        lost = Counter(self.alone["theirs"]) - Counter(self.run["theirs"])
        self.faults += [f"span lost: {count} {what}" for what, count in lost.items()]
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

    def _more_than_alone(self, kind: str) -> list[str]:
        more = Counter(self.run[kind]) - Counter(self.alone[kind])
        return [f"{count} {what}" for what, count in more.items()]

    def times(self, kind: str, *scenarios: str) -> float:
        """The sum over scenarios as a multiple of the truth."""
        truth = sum(self.run["truth"][scenario] for scenario in scenarios)
        return (
            round(sum(self.run[kind].get(scenario, 0) for scenario in scenarios) / truth, 2) if truth else 0
        )

    def cells(self) -> tuple[str, ...]:
        """The row of the table, without its last column."""
        if "failed" in self.run:
            return (self.name, "", self.order, *[""] * 4)
        judged = [scenario for scenario in self.run["truth"] if scenario not in ASIDE]
        early = [scenario for scenario in judged if is_early(scenario)]
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


def run(
    python: str, program: str, *args: str, package: str, environ: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a program in a process of its own. Returns what it printed, or `failed`."""
    kept = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "TMPDIR")
    inherited = {name: os.environ[name] for name in kept if name in os.environ}
    try:
        done = subprocess.run(  # noqa: S603  # the project's own programs
            [python, str(HERE / program), *args],
            env={
                **inherited,
                **(environ or {}),
                "PACKAGE": package,
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


def rows(pythons: dict[str, str], orders: list[str], package: str) -> list[Row]:
    """Run all neighbours in all orders, two processes at a time, and print each row."""
    say(
        COLUMNS.format(
            "neighbour", "version", "order", "spans of ours", "metric", "spans", "early", "verdict"
        )
    )
    say(COLUMNS.format("", "", "", "", "done/early", "done/early", "kept", ""))
    made: list[Row] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        for name, python in pythons.items():
            chosen = [order for order in NEIGHBOURS[name].orders() if not orders or order in orders]
            for order in ("alone", *chosen):
                futures[name, order] = pool.submit(run, python, "measure.py", name, order, package=package)
        for (name, order), future in futures.items():
            row = Row(name, order, future.result(), futures[name, "alone"].result())
            if order != "alone":
                row.judge()
                made.append(row)
            show(row)
    return made


def checks_of(name: str, *, brief: bool) -> list[tuple[str, ...]]:
    """The further checks beside a neighbour, with their arguments. `brief`: fewer of a variant."""
    neighbour = NEIGHBOURS[name]
    if neighbour.framework:
        return []
    chosen: list[tuple[str, ...]] = []
    if neighbour.can_be_off:
        on_off = [("on/off", on, off) for on in BOTH for off in ("ours off", "theirs off")]
        chosen += on_off[1:3] if brief and "/" in name else on_off
    if brief and name in ("logfire/open", "logfire/plain"):
        return [("suppression, start, flush", "theirs first")]
    both = BOTH if neighbour.theirs_first else BOTH[:1]
    chosen += [("suppression, start, flush", order) for order in both]
    chosen += [("start with spans=always", both[-1])]
    if name in ("aiohttp", "ddtrace"):
        return chosen
    chosen += [("old client", order) for order in both]
    if name == "genai":  # it records token points itself
        chosen += [("tenants", "ours first", spans) for spans in ("auto", "always")]
    if not brief or name in ("genai", "logfire"):
        chosen += [(check, "ours first") for check in ("meter only", "tracer only")]
        # A known limit, of an unsampled trace: in the first call of a client, what the wrapper of that client
        # suppresses looks like the application's own suppression.
        if name != "logfire/client":
            chosen += [("unsampled", "ours first")]
    return chosen


def judge_setting(run: dict[str, Any], alone: dict[str, Any], name: str, setting: str) -> list[str]:
    """What is wrong with a run under `OTEL_RESPONSES_USAGE_SPANS`."""
    if "failed" in run:
        return [f"failed: {run['failed']}"]
    row = Row(name, setting, run, alone)
    faults = []
    for scenario in run["truth"]:
        expected = {"our_metric": 1.0, "our_spans": 1.0} if setting == "always" else {"metric": 1.0}
        if setting == "never" and is_early(scenario) and NEIGHBOURS[name].makes_current:
            expected["spans"] = 1.0
        for kind, times in expected.items():
            if row.times(kind, scenario) != times:
                faults.append(f"{scenario}: {kind.replace('_', ' ')} {row.times(kind, scenario):g}x")
    chats = run["ours"].get("chat", 0)
    if chats != (run["calls_made"] if setting == "always" else 0):
        faults.append(f"{chats} chat spans of {run['calls_made']} calls")
    if setting == "always" and run["ours"].get("usage"):
        faults.append(f"{run['ours']['usage']} usage spans")
    if run["calls_counted"] != run["calls_made"]:
        faults.append(f"{run['calls_counted']} of {run['calls_made']} calls counted")
    return faults


def checks(
    pythons: dict[str, str], alone: dict[str, dict[str, Any]], package: str, *, brief: bool
) -> tuple[int, int]:
    """Run the further checks, and print a line for each.

    Returns:
        How many were made, and how many are wrong.

    """
    say("")
    made = wrong = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
        for name, python in pythons.items():
            for check in checks_of(name, brief=brief):
                future: Future[Any] = pool.submit(run, python, "checks.py", name, *check, package=package)
                futures.append((name, ", ".join(check), future.result))
            if brief and "/" in name:
                continue
            for setting in ("always", "never"):
                environ = {"OTEL_RESPONSES_USAGE_SPANS": setting}
                args = (python, "measure.py", name, "theirs first")
                future = pool.submit(run, *args, package=package, environ=environ)
                judged = partial(_setting, future, alone[name], name, setting)
                futures.append((name, f"spans={setting}", judged))
        for name, check, result_of in futures:
            result = result_of()
            faults = result.get("faults", [result.get("failed")])
            made += 1
            wrong += bool(faults)
            say(f"{name:16} {check:40} {'WRONG' if faults else 'ok'}")
            for fault in faults:
                say(f"    {fault}")
            if "log" in result:
                say(result["log"])
    return made, wrong


def _setting(
    future: Future[dict[str, Any]], alone: dict[str, Any], name: str, setting: str
) -> dict[str, Any]:
    return {"faults": judge_setting(future.result(), alone, name, setting)}


def show(row: Row) -> None:
    """Print a row, and below it what else is wrong."""
    verdict = "ok" if not row.faults else "WRONG"
    if row.order == "alone":
        verdict = ", ".join(f"{name} {version}" for name, version in row.run.get("also", {}).items())
    say(COLUMNS.format(*row.cells(), verdict))
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


def draw(pythons: dict[str, str], package: str) -> int:
    """Print the traces beside each neighbour that makes spans, as Markdown. Returns how many failed."""
    failed = 0
    for name, python in pythons.items():
        if "/" in name or not NEIGHBOURS[name].makes_inferences:
            continue
        result = run(python, "draw.py", name, package=package)
        problem = result.get("failed") or result["errors"]
        if problem:
            failed += 1
            say(f"{name}: {problem}")
            say(result.get("log", ""))
            continue
        neighbour = NEIGHBOURS[name]
        other_name = f" ({neighbour.other_name})" if neighbour.other_name else ""
        say(f"### `{neighbour.distribution}`{other_name}\n\n```text")
        say("\n\n".join("\n".join((f"{end}:", *rows)) for end, rows in result["drawn"].items()))
        say("```")
        say("")
    return failed


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line.rstrip()}\n")
    sys.stdout.flush()


def main() -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(prog="scripts/test-neighbours")
    parser.add_argument("runs", nargs="+", metavar="NEIGHBOUR=PYTHON")
    parser.add_argument("--order", action="append", default=[], choices=ORDERS)
    parser.add_argument("--brief", action="store_true", help="leave out checks of variants, as CI does")
    parser.add_argument("--table-only", action="store_true", help="leave out the checks after the table")
    parser.add_argument(
        "--draw", action="store_true", help="only draw traces, as docs/neighbours.md has them"
    )
    parser.add_argument("--json", metavar="FILE", help="also write what each process recorded")
    args = parser.parse_args()
    began = time.monotonic()
    pythons: dict[str, str] = {}
    for pair in args.runs:
        asked, _, python = pair.partition("=")
        chosen = [name for name in NEIGHBOURS if asked in (name, name.partition("/")[0])]
        if not chosen:
            parser.error(f"there is no neighbour {asked}")
        pythons.update(dict.fromkeys(chosen, python))
    package = os.environ.pop("PYTHONPATH")
    if args.draw:
        return int(draw(pythons, package) > 0)
    made = rows(pythons, args.order, package)
    if args.json:
        Path(args.json).write_text(json.dumps([vars(row) for row in made], indent=1))
    wrong = sum(bool(row.faults) for row in made)
    total = len(made)
    if not args.table_only:
        of_checks = checks(pythons, {row.name: row.alone for row in made}, package, brief=args.brief)
        total, wrong = total + of_checks[0], wrong + of_checks[1]
    say(f"{total - wrong} passed, {wrong} failed in {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
