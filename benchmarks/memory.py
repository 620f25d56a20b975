"""What an open stream holds in memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

from . import pieces, standin
from .row import Row


def rows(*, quick: bool) -> list[Row]:
    """Measure streams that have been read for a while and are open still."""
    standin.install()
    from .instrumented import instrumented
    from .telemetry import Told

    streams, sizes = (50, (10, 500)) if quick else (300, (100, 10_000))
    told = Told()
    with instrumented(**told.providers):
        plain = _per_stream(standin.PlainSyncAPIClient, streams, sizes[0])
        held = [_per_stream(standin.SyncAPIClient, streams, events) - plain for events in sizes]
        span = _span(told, streams)
    return [
        Row(
            f"memory per open stream after {events:,} events, without the SDK's span of {span:,.0f} bytes",
            bytes_held - span,
            2048,
            "bytes",
        )
        for events, bytes_held in zip(sizes, held, strict=True)
    ]


def _per_stream(client: Callable[[list[bytes]], Any], streams: int, events: int) -> float:
    """Return the bytes that each of so many streams holds; the pieces of all are the same objects."""
    head, deltas = pieces.whole(pieces.SHORT)[:4], pieces.repeated(events)
    caller = client([*head, *deltas, b""])

    def open_and_read() -> object:
        response = caller.request(object, standin.Options())
        reading = iter(response.stream)
        for _ in range(len(head) + len(deltas)):
            next(reading)
        return response, reading

    return _held(open_and_read, streams)


def _span(told: Any, streams: int) -> float:
    from .call import AT_START

    standin.drain(standin.SyncAPIClient(pieces.whole(pieces.SHORT)))
    first = dict(list(told.attributes.items())[:AT_START])
    tracer = told.tracer_provider.get_tracer("by_hand")
    return _held(lambda: tracer.start_span("chat gpt-5.4-mini", attributes=dict(first)), streams)


def _held(make: Callable[[], object], number: int) -> float:
    kept = [make() for _ in range(10)]  # what is made once is made now
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    room: list[object] = [None] * number
    own = tracemalloc.get_traced_memory()[0] - before
    for index in range(number):
        room[index] = make()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before - own
    tracemalloc.stop()
    del kept
    return held / number
