"""Instructions per event and per call, counted by callgrind: the same on a busy machine as on an idle one.

Python itself is compiled in many ways, and differs in how many instructions it takes for the same thing.
So what is compared with the baseline is not the count but how often the work of a reference fits into it,
which the same Python has done in the same run: for an event the floor, for a call the span by hand. The floor
is told over a bare read, behind the layer of an HTTP library: no change of that layer changes the reference.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .counted import PARTS

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.10
# What two runs may differ by where nothing is added, and a tenth of it is nothing as well.
_NOISE = 0.03
# What two runs differ by at most where little is added, which may be a tenth of that.
_LEAST_FALL = 0.01

_ROOT = Path(__file__).parents[1]
_FLOOR, _ASYNC_FLOOR = ("floor event", "bare event"), ("floor event, async", "bare event, async")
_CALL = ("call by hand", None)
# What is held and what is in it but none of ours; what it is compared with and what is in that.
_HELD: dict[str, tuple[str, tuple[str, str | None]]] = {
    "event": ("plain event", _FLOOR),
    "event, async": ("plain event, async", _ASYNC_FLOOR),
    "event of another kind": ("plain event", _FLOOR),
    "event, no SDK": ("plain event", _FLOOR),
    **{
        f"event, {division} a piece": (f"plain event, {division} a piece", _FLOOR)
        for division in ("1,460 bytes", "4 KiB", "64 KiB")
    },
    "call of one event": ("plain call of one event", ("call of one event by hand", None)),
    "call": ("plain call", _CALL),
    "call, async": ("plain call, async", ("call by hand, async", None)),
    "call of 103 events": ("plain call of 103 events", ("call of 103 events by hand", None)),
    "call, no SDK": ("plain call", _CALL),
    "call, not sampled": ("plain call", _CALL),
    "call with baggage": ("plain call", _CALL),
    "call with a neighbour": ("plain call with a neighbour", _CALL),
    "compact call": ("plain compact call", _CALL),
    "call over WebSocket": ("plain call over WebSocket", _CALL),
}


@dataclass(frozen=True)
class Count:
    """Instructions that ours adds, those of the reference, and what the baseline allows."""

    name: str
    added: int
    reference: int
    before: float | None

    @property
    def ratio(self) -> float:
        """How often the work of the reference fits into ours."""
        return round(self.added / self.reference, 3)

    @property
    def grew(self) -> bool:
        """Whether it is more than the baseline allows."""
        return self.before is not None and self.ratio > max(self.before * (1 + TOLERANCE), _NOISE)

    @property
    def fell(self) -> bool:
        """Whether it is so much less that the baseline would let it grow back unseen."""
        if self.before is None or self.before <= _NOISE:
            return False
        return self.before - self.ratio > max(self.before * TOLERANCE, _LEAST_FALL)

    @property
    def verdict(self) -> str:
        """What the table says of it."""
        return "**grew**" if self.grew else "fell: run --update" if self.fell else "holds"


class ValgrindMissingError(Exception):
    """There is no valgrind."""


def version() -> str:
    """The Python that counts, as the baseline names it: a build by profile differs from a plain one."""
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    build = "by profile" if "--enable-optimizations" in arguments else "plain"
    return f"{sys.version_info.major}.{sys.version_info.minor} {build}"


def counts(artificial_loss: int = 0) -> list[Count]:
    """Count everything, in one run of callgrind."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise ValgrindMissingError(
            "valgrind is not installed; on Debian and Ubuntu: apt-get install valgrind"
        )
    per_item = _per_item(valgrind, artificial_loss)
    before = json.loads(BASELINE.read_text()).get(version(), {}) if BASELINE.exists() else {}
    found = []
    for name, (plain, (reference, without)) in _HELD.items():
        base = per_item[reference] - (per_item[without] if without else 0)
        found.append(Count(name, per_item[name] - per_item[plain], base, before.get(name)))
    return found


def update(found: list[Count]) -> None:
    """Make these counts the baseline of this Python."""
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baseline[version()] = {count.name: count.ratio for count in found}
    BASELINE.write_text(json.dumps(dict(sorted(baseline.items())), indent=2) + "\n")


def table(found: list[Count]) -> str:
    """Return the counts as a Markdown table."""
    lines = [
        "| instructions | added | reference | ratio | baseline | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {count.name} | {count.added:,} | {count.reference:,} | {count.ratio} "
        f"| {'none' if count.before is None else count.before} | {count.verdict} |"
        for count in found
    ]
    return "\n".join(lines)


def _per_item(valgrind: str, artificial_loss: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "counts"
        subprocess.run(  # noqa: S603
            [
                valgrind,
                "--tool=callgrind",
                "--dump-before=getloadavg",
                "--combine-dumps=yes",
                f"--callgrind-out-file={out}",
                sys.executable,
                "-m",
                "benchmarks.counted",
                str(artificial_loss),
            ],
            check=True,
            capture_output=True,
            cwd=_ROOT,
            env={
                **os.environ,
                "PYTHONHASHSEED": "0",
                "PYTHONPATH": _path(),
                "OTEL_METRICS_EXEMPLAR_FILTER": "always_off",
            },
        )
        totals = [int(found) for found in re.findall(r"^totals: (\d+)$", out.read_text(), re.MULTILINE)]
    # Of each part: what came before it, its warm-up, once, twice.
    return {
        name: (totals[4 * index + 3] - totals[4 * index + 2]) // items
        for index, (name, items) in enumerate(PARTS.items())
    }


def _path() -> str:
    return os.pathsep.join(["examples", os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
