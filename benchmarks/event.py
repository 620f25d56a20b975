"""The cost of an event for each division of the bytes, without the SDK around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import pieces, standin
from .clock import added, paired
from .floor import async_floor, floor
from .row import Row

GOALS_NS = {"sync": 400, "async": 600}


def rows(*, quick: bool) -> list[Row]:
    """Measure an event, sync and async, and an event with another type than the event before it."""
    standin.install()
    from .instrumented import instrumented
    from .telemetry import Told

    count, rounds = (500, 3) if quick else (5_000, 50)
    with instrumented(**Told().providers):
        by_division = {
            division: _added(partial(pieces.divided, division), count, rounds)
            for division in pieces.DIVISIONS
        }
        other = _added(pieces.mixed, count, rounds)
    return [
        *(
            Row(
                f"added per event, {division}",
                found[how],
                goal_ns,
                "ns",
                f"floor {found[f'{how} floor']:.0f} ns",
                how,
            )
            for division, found in by_division.items()
            for how, goal_ns in GOALS_NS.items()
        ),
        Row("added per event of another type than the last", other["sync"], 10_000, "ns"),
    ]


def _added(make: Callable[[int], list[bytes]], count: int, rounds: int) -> dict[str, float]:
    works: dict[str, Callable[[], object]] = {}
    for size in (count // 10, count):
        works |= _works(make(size), size)
    costs = paired(works, rounds)

    def per_event(name: str) -> float:
        plain = "async plain" if name.startswith("async") else "plain"
        both = (added(costs, f"{name} {size}", f"{plain} {size}") for size in (count, count // 10))
        return (next(both) - next(both)) / (count - count // 10)

    return {name: per_event(name) for name in ("sync", "sync floor", "async", "async floor")}


def _works(stream: list[bytes], size: int) -> dict[str, Callable[[], object]]:
    plain, plain_async = standin.PlainSyncAPIClient(stream), standin.PlainAsyncAPIClient(stream)
    ours, ours_async = standin.SyncAPIClient(stream), standin.AsyncAPIClient(stream)
    return {
        f"plain {size}": lambda: standin.drain(plain),
        f"sync {size}": lambda: standin.drain(ours),
        f"sync floor {size}": lambda: floor(stream),
        f"async plain {size}": lambda: standin.run(standin.async_drain(plain_async)),
        f"async {size}": lambda: standin.run(standin.async_drain(ours_async)),
        f"async floor {size}": lambda: async_floor(stream),
    }
