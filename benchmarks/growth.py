"""How the costs grow with the number of streams and the length of each, and a picture of it."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from . import pieces, standin

PICTURE = Path(__file__).parents[1] / "docs" / "growth.svg"
STREAMS = (1, 10, 100, 1_000, 10_000)
EVENTS = (100, 1_000, 10_000, 100_000)

Curve = dict[int, tuple[float, float]]


def report(*, quick: bool) -> str:
    """Measure in a process of its own, draw the picture, and return the numbers as Markdown."""
    command = [sys.executable, "-m", "benchmarks.growth", *(["--quick"] if quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    by_streams, by_events = (
        {int(number): (cost[0], cost[1]) for number, cost in curve.items()}
        for curve in json.loads(done.stdout)
    )
    if not quick:
        PICTURE.write_text(picture(by_streams, by_events))
    return "\n\n".join(
        (
            _table("streams open at once, 20 events each", by_streams),
            _table("events of one stream", by_events),
        )
    )


def measure(*, quick: bool) -> tuple[Curve, Curve]:
    """Return added nanoseconds per event and bytes per stream, by streams and by events."""
    standin.install()
    from .instrumented import instrumented
    from .telemetry import Told

    cut = -2 if quick else None
    with instrumented(**Told().providers):
        by_streams = {number: _cost(number, 20) for number in STREAMS[:cut]}
        by_events = {number: _cost(1, number) for number in EVENTS[:cut]}
    return by_streams, by_events


def _cost(streams: int, events: int) -> tuple[float, float]:
    stream = [*pieces.whole(pieces.SHORT)[:4], *pieces.repeated(events)]
    number = streams * len(stream)
    rounds = max(3, min(15, 100_000 // number))
    repeats = max(1, 2_000 // number)
    ours, plain = standin.SyncAPIClient(stream), standin.PlainSyncAPIClient(stream)
    costs: dict[object, list[float]] = {ours: [], plain: []}
    for turn in range(rounds):
        for client in costs if turn % 2 else reversed(costs):
            costs[client].append(_ns(partial(_interleaved, client, streams), repeats))
    added_ns = median(mine - theirs for mine, theirs in zip(costs[ours], costs[plain], strict=True))
    streams = max(streams, 20)  # of a single one the memory is not told from that of the measurement
    return added_ns / number, (_held(ours, streams) - _held(plain, streams)) / streams


def _interleaved(client: Any, streams: int) -> list[Iterator[bytes]]:
    """Open so many streams, and read an event of each in turn until they end, but for the last read."""
    opened = [client.request(object, standin.Options()) for _ in range(streams)]
    readings = [iter(response.stream) for response in opened]
    for _ in range(len(client._pieces)):  # noqa: SLF001
        for reading in readings:
            next(reading)
    return [*readings, *opened]


def _ns(work: Callable[[], object], repeats: int) -> float:
    gc.collect()
    gc.disable()
    began = time.thread_time_ns()
    for _ in range(repeats):
        work()
    taken = time.thread_time_ns() - began
    gc.enable()
    return taken / repeats


def _held(client: Any, streams: int) -> float:
    _interleaved(client, 1)
    gc.collect()
    tracemalloc.start()
    kept = _interleaved(client, streams)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return held


def _table(what: str, curve: Curve) -> str:
    lines = [f"| {what} | added per event | memory per stream, SDK span included |", "| ---: | ---: | ---: |"]
    lines += [f"| {number:,} | {ns:,.0f} ns | {held:,.0f} bytes |" for number, (ns, held) in curve.items()]
    return "\n".join(lines)


def picture(by_streams: Curve, by_events: Curve) -> str:
    """Draw two curves in each of two panels: the cost of an event, and the memory of a stream."""
    panels = [
        _panel(0, "streams open at once", by_streams),
        _panel(360, "events of one stream", by_events),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" '
        'font-family="sans-serif" font-size="11">'
        '<rect width="720" height="300" fill="white"/>'
        '<text x="60" y="18" fill="#1f77b4">added per event, us, with its share of the call</text>'
        '<text x="420" y="18" fill="#d62728">memory per open stream, KiB, with the SDK\'s span</text>'
        f"{''.join(panels)}</svg>\n"
    )


def _panel(left: int, what: str, curve: Curve) -> str:
    lowest, highest = math.log10(min(curve)), math.log10(max(curve))
    values = {
        "#1f77b4": [ns / 1000 for ns, _ in curve.values()],
        "#d62728": [b / 1024 for _, b in curve.values()],
    }
    top = max(max(numbers) for numbers in values.values()) * 1.15

    def at(number: float, value: float) -> tuple[float, float]:
        return (
            left + 45 + 290 * (math.log10(number) - lowest) / (highest - lowest),
            250 - 215 * max(0.0, value) / top,
        )

    parts = [f'<path d="M{left + 45} 35V250H{left + 335}" fill="none" stroke="black"/>']
    for number in curve:
        x, _ = at(number, 0)
        parts.append(f'<text x="{x:.0f}" y="266" text-anchor="middle">{number:,}</text>')
    for part in range(5):
        value = top * part / 4
        y = at(min(curve), value)[1] + 4
        parts.append(f'<text x="{left + 40}" y="{y:.0f}" text-anchor="end">{value:.1f}</text>')
    parts.append(f'<text x="{left + 190}" y="286" text-anchor="middle">{what}</text>')
    for colour, numbers in values.items():
        points = [at(number, value) for number, value in zip(curve, numbers, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(quick="--quick" in sys.argv)))
