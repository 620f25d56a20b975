"""What an event costs that arrives in a network piece of its own, apart from everything else."""

from __future__ import annotations

from collections.abc import Callable

from . import pieces, standin
from .clock import added, paired
from .floor import async_floor, floor
from .row import Row


def rows(*, quick: bool) -> list[Row]:
    """Measure an event, sync and async, and one that is of another kind than the one before."""
    standin.install()
    from .instrumented import instrumented
    from .telemetry import Told

    count, rounds = (2_000, 3) if quick else (20_000, 25)
    with instrumented(**Told().providers):
        same = _added(pieces.repeated, count, rounds)
        other = _added(pieces.mixed, count // 4, rounds)
    return [
        Row("added per event, sync", same["sync"], 400, "ns", f"{same['sync floor']:.0f} ns"),
        Row("added per event, async", same["async"], 600, "ns", f"{same['async floor']:.0f} ns"),
        Row("added per event of another kind than the last, sync", other["sync"], 10_000, "ns"),
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
