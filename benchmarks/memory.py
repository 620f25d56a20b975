"""What an open stream holds in memory."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import pieces, standin
from .row import Row

if TYPE_CHECKING:
    from .telemetry import Told

_WARM_UP = 10
_PATIENCE_S = 60.0


def rows(*, quick: bool) -> list[Row]:
    """Measure streams, sync and async, that have been read for a while and are open still."""
    standin.install()
    from .instrumented import instrumented
    from .telemetry import Told

    streams, sizes = (50, (10, 500)) if quick else (300, (100, 10_000))
    told = Told()
    held: dict[tuple[str, int], float] = {}
    with instrumented(**told.providers):
        span = _span(told, streams)
        for how, plain_client, client, open_and_read in (
            ("sync", standin.PlainSyncAPIClient, standin.SyncAPIClient, _open_and_read),
            ("async", standin.PlainAsyncAPIClient, standin.AsyncAPIClient, _async_open_and_read),
        ):
            plain = _per_stream(plain_client, open_and_read, streams, sizes[0])
            for events in sizes:
                ended = told.ended
                ours = _per_stream(client, open_and_read, streams, events)
                held[how, events] = ours - plain
                _await(told, ended + _WARM_UP + streams)
    return [
        Row(
            f"memory per open stream, after {events:,} events",
            bytes_held - span,
            1_843,  # 1.8 KiB
            "bytes",
            f"besides the span {span:,.0f} bytes",
            how,
        )
        for (how, events), bytes_held in held.items()
    ]


def _per_stream(
    client: Callable[[list[bytes]], Any],
    open_and_read: Callable[[Any, int], object],
    streams: int,
    events: int,
) -> float:
    """Return the bytes that each of so many streams holds; the pieces of all are the same objects."""
    read = [*pieces.whole(pieces.SHORT)[:4], *pieces.repeated(events)]
    caller = client([*read, b""])
    return _held(lambda: open_and_read(caller, len(read)), streams)


def _open_and_read(caller: standin.SyncAPIClient, number: int) -> object:
    response = caller.request(object, standin.Options())
    reading = iter(response.stream)
    for _ in range(number):
        next(reading)
    return response, reading


def _async_open_and_read(caller: standin.AsyncAPIClient, number: int) -> object:
    response = standin.run(caller.request(object, standin.Options()))
    reading = aiter(response.stream)
    for _ in range(number):
        standin.run(reading.__anext__())
    return response, reading


def _span(told: Any, streams: int) -> float:
    from .call import AT_START

    standin.drain(standin.SyncAPIClient(pieces.whole(pieces.SHORT)))
    first = dict(list(told.attributes.items())[:AT_START])
    tracer = told.tracer_provider.get_tracer("by_hand")
    return _held(lambda: tracer.start_span("chat gpt-5.4-mini", attributes=dict(first)), streams)


def _await(told: Told, ended: int) -> None:
    """Wait until the streams that were dropped have been looked up: the next are measured without that."""
    until = time.monotonic() + _PATIENCE_S
    while told.ended < ended:
        if time.monotonic() > until:
            raise TimeoutError(f"{ended - told.ended} spans have not ended")
        time.sleep(0.01)


def _held(make: Callable[[], object], number: int) -> float:
    kept = [make() for _ in range(_WARM_UP)]  # what is made once is made now
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
