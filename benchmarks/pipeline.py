"""What events and calls cost in the whole of the real SDK, over a transport that is in memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from statistics import median

import httpx2
import openai

from . import pieces
from .call import AT_START
from .clock import added, paired
from .instrumented import instrumented
from .one import rows_of
from .row import Row
from .telemetry import Told, by_hand

Work = Callable[[], object]


class SyncBody(httpx2.SyncByteStream):
    """A body in memory, a piece at a time."""

    def __init__(self, stream: list[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream


class AsyncBody(httpx2.AsyncByteStream):
    """The same for an async client."""

    def __init__(self, stream: list[bytes]) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._stream:
            yield piece


def reader(stream: list[bytes]) -> Work:
    """Return a function that makes a call and reads the answer, which is always this stream."""
    transport = httpx2.MockTransport(lambda _: _answer(SyncBody(stream)))
    client = openai.OpenAI(
        api_key="none", base_url="http://127.0.0.1:9/v1", http_client=httpx2.Client(transport=transport)
    )

    def read() -> None:
        for _ in client.responses.create(model="gpt-5.4-mini", input="hello", stream=True):
            pass

    return read


def async_reader(stream: list[bytes]) -> Work:
    """Return the same for the async client, on an event loop of its own."""
    transport = httpx2.MockTransport(lambda _: _answer(AsyncBody(stream)))
    client = openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1:9/v1", http_client=httpx2.AsyncClient(transport=transport)
    )
    loop = asyncio.new_event_loop()

    async def read() -> None:
        async for _ in await client.responses.create(model="gpt-5.4-mini", input="hello", stream=True):
            pass

    return lambda: loop.run_until_complete(read())


def rows(*, quick: bool) -> list[Row]:
    """Say what share our cost of an event is of the SDK's own, and measure what is added to whole calls."""
    isolated = {row.what: row.result for row in rows_of("event", quick=quick)}
    events, rounds = (100, 3) if quick else (1_000, 15)
    short, long = pieces.whole(pieces.SHORT), pieces.whole(pieces.SHORT + events)
    costs = paired(
        {
            "short": reader(short),
            "long": reader(long),
            "async short": async_reader(short),
            "async long": async_reader(long),
        },
        rounds,
    )
    found = []
    for how in ("sync", "async"):
        prefix = "async " if how == "async" else ""
        own = (
            median(a - b for a, b in zip(costs[f"{prefix}long"], costs[f"{prefix}short"], strict=True))
            / events
        )
        found.append(
            Row(
                f"isolated cost of an event as a share of the SDK's own {own / 1000:,.0f} us, {how}",
                100 * isolated[f"added per event, {how}"] / own,
                0.5,
                "%",
            )
        )
    return found + _calls(short, *((3, 3) if quick else (30, 20)))


def _calls(stream: list[bytes], rounds: int, times: int) -> list[Row]:
    """Compare whole calls watched, unwatched, and unwatched with their span and points by hand after them.

    So the work by hand finds the processor's caches as ours finds them: filled with the SDK's own.
    """
    found = []
    for how, read in (("sync", reader(stream)), ("async", async_reader(stream))):
        told = Told()
        with instrumented(**told.providers):
            read()
        tell = by_hand(told.attributes, told.points(), AT_START)
        works = {"ours": read, "plain": read, "by hand": _both(read, tell)}
        costs: dict[str, list[int]] = {name: [] for name in works}
        for turn in range(rounds):
            for name in works if turn % 2 else reversed(works):
                with instrumented(**told.providers) if name == "ours" else contextlib.nullcontext():
                    costs[name].append(_ns(works[name], times))
        ours, hand = (added(costs, name, "plain") / times / 1000 for name in ("ours", "by hand"))
        what = (
            f"added per call of {len(stream)} events in the real SDK, {how}, against by hand ({hand:.0f} us)"
        )
        found.append(Row(what, ours / hand, 2.0, "x", "1 x"))
    return found


def _both(read: Work, tell: Work) -> Work:
    def both() -> None:
        read()
        tell()

    return both


def _ns(read: Work, times: int) -> int:
    read()  # what is made once after a switch is made now
    gc.collect()
    began = time.thread_time_ns()
    for _ in range(times):
        read()
    return time.thread_time_ns() - began


def _answer(body: SyncBody | AsyncBody) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=body)
