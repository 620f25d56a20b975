"""The command behind `scripts/bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from . import growth, instructions, page, peers
from .one import rows_of
from .row import Row, table

MEASUREMENTS = ("event", "pipeline", "message", "call", "memory", "fallback", "startup")


def main() -> int:
    """Measure, print, and return the exit status."""
    given = _arguments()
    if given.check or given.update:
        return _check(update=given.update)
    _say(page.conditions())
    for measure in _chosen(given):
        before = page.load()
        _say(f"\nload average {before}\n")
        parts = measure(quick=given.quick)
        after = page.load()
        _say(f"\nload average {after}")
        for name, text in parts.items() if given.write else ():
            page.write(name, f"{text}\n\n{page.conditions()}. Load average {before} before, {after} after.")
    return 0


def _chosen(given: argparse.Namespace) -> list[Callable[..., dict[str, str]]]:
    """Return what is to be measured: one thing, or everything if all of the pages are to be written."""
    one = [measure for measure, asked in ((_peers, given.peers), (_growth, given.growth)) if asked]
    return one or ([_costs, _peers, _growth] if given.write else [_costs])


def _peers(*, quick: bool) -> dict[str, str]:
    parts = peers.report(quick=quick)
    _say(parts["peers"])
    return parts


def _growth(*, quick: bool) -> dict[str, str]:
    text = growth.report(quick=quick)
    _say(text)
    return {"growth": text}


def _costs(*, quick: bool) -> dict[str, str]:
    text = _measured(quick=quick)
    try:
        _say("\n" + instructions.table(instructions.counts()))
    except instructions.ValgrindMissingError as reason:
        _say(f"\nInstructions are not counted: {reason}")
    return {"costs": text}


def _measured(*, quick: bool) -> str:
    """Measure everything, print the table line by line, and return it."""
    rows: list[Row] = []
    said = 0
    for name in MEASUREMENTS:
        sys.stderr.write(f"Measuring: {name} ...\n")
        rows += rows_of(name, quick=quick)
        lines = table(rows).splitlines()
        _say("\n".join(lines[said:]))
        said = len(lines)
    return table(rows)


def _check(*, update: bool) -> int:
    try:
        found = instructions.counts()
    except instructions.ValgrindMissingError as reason:
        sys.stderr.write(f"{reason}\n")
        return _in_ci()
    if update:
        instructions.update(found)
    _say(instructions.table(found))
    is_unknown = any(count.before is None for count in found) and not update
    if is_unknown:
        sys.stderr.write(
            f"There is no baseline for {instructions.version()}: `scripts/bench --update` makes one.\n"
        )
    grown = [count for count in found if count.grew and not update]
    fallen = [count for count in found if count.fell and not update]
    for count in grown + fallen:
        sys.stderr.write(
            f"{count.name} takes {count.ratio} times the instructions of its reference; "
            f"the baseline is {count.before}{'; it fell: run --update' if count.fell else ''}.\n"
        )
    return 1 if grown else _in_ci() if is_unknown else 0


def _in_ci() -> int:
    """Return the exit status where a baseline holds nothing: an error in CI only."""
    return 1 if os.environ.get("CI") == "true" else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: shows that it works, not what it costs"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail if an instruction count has grown by over 10 %%; say if one fell",
    )
    parser.add_argument(
        "--update", action="store_true", help="make the instruction counts of now the baseline"
    )
    parser.add_argument(
        "--peers", action="store_true", help="compare with other instrumentations, from the index"
    )
    parser.add_argument("--growth", action="store_true", help="from 1 to 10,000 streams and 100,000 events")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the tables and pictures of the pages; all of them without --peers or --growth",
    )
    given = parser.parse_args()
    if given.write and (given.quick or given.check or given.update):
        parser.error("--write is for tables that were measured in full")
    return given


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
