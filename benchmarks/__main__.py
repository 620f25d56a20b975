"""The command behind `scripts/bench`."""

from __future__ import annotations

import argparse
import os
import platform
import sys

from . import growth, instructions, peers
from .one import rows_of
from .row import table

MEASUREMENTS = ("event", "message", "pipeline", "call", "memory", "fallback", "startup")


def main() -> int:
    """Measure, print, and return the exit status."""
    given = _arguments()
    if given.check or given.update:
        return _check(update=given.update)
    _say(f"{platform.python_implementation()} {platform.python_version()}, {_load()}\n")
    if given.peers:
        _say(peers.report(quick=given.quick))
    elif given.growth:
        _say(growth.report(quick=given.quick))
    else:
        for name in MEASUREMENTS:
            sys.stderr.write(f"Measuring: {name} ...\n")
            lines = table(rows_of(name, quick=given.quick)).splitlines()
            _say("\n".join(lines if name == MEASUREMENTS[0] else lines[2:]))
        try:
            _say("\n" + instructions.table(instructions.counts()))
        except instructions.ValgrindMissingError as reason:
            _say(f"\nInstructions are not counted: {reason}")
    _say(f"\n{_load()}")
    return 0


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
    """Return the exit status where a baseline holds nothing: it is for people to shrug at, and not for CI."""
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
    return parser.parse_args()


def _load() -> str:
    return "load average " + " ".join(f"{load:.1f}" for load in os.getloadavg())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
