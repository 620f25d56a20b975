"""What an application waits because usage is looked up, and how fast that is done; over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request
from statistics import fmean
from typing import NamedTuple

import openai

from otel_responses_usage import Config

from .clock import percentile
from .instrumented import instrumented
from .row import Row
from .server import ANSWER_S, BreakingServer
from .telemetry import Told

CONCURRENCY = 8
_TICK_S = 0.002


class Waits(NamedTuple):
    """Seconds that the read takes that finds a stream cut, and `close()` of one that is open."""

    cut: list[float]
    close: list[float]


def rows(*, quick: bool) -> list[Row]:
    """Cut and close streams while all of their usage waits to be looked up, and while it is looked up.

    Once that has been answered for, let the rest be looked up with nothing else to do.
    """
    streams, times, settling_times = (300, 20, 10) if quick else (600, 500, 500)
    made = streams + 2 * (times + settling_times)
    told = Told()
    config = Config(max_concurrency=CONCURRENCY, retrieval_timeout=300.0, max_pending=made)
    with BreakingServer() as server:
        before, idle_before = asyncio.run(_waits(server.url, settling_times)), asyncio.run(_lag(1.0))
        with instrumented(config, **told.providers):
            asyncio.run(_cut(server.url, streams))
            hanging = asyncio.run(_waits(server.url, times))
            most = streams + 2 * times - told.ended
            _open(server.url)
            settling = asyncio.run(_waits(server.url, settling_times))
            left = made - told.ended
            if left < CONCURRENCY:
                raise RuntimeError("the look-ups were over before the waits were taken")
            lag, settled_s = asyncio.run(_settled(told, made, time.perf_counter()))
        after, idle_after = asyncio.run(_waits(server.url, settling_times)), asyncio.run(_lag(1.0))
    ideal_s = left / CONCURRENCY * ANSWER_S
    what = f"while up to {most:,} look-ups hang or settle, p99"
    return [
        Row(
            f"added at the end of a cut stream {what}",
            _added((hanging.cut, settling.cut), (before.cut, after.cut)),
            0.5,
            "ms",
        ),
        Row(
            f"added to close() {what}",
            _added((hanging.close, settling.close), (before.close, after.close)),
            0.5,
            "ms",
        ),
        Row(
            f"added event-loop lag while {left:,} look-ups settle, p99",
            _added((lag,), (idle_before, idle_after)),
            0.5,
            "ms",
        ),
        Row(
            f"{left:,} cut streams settle, in multiples of {ideal_s:.2f} s "
            f"({left:,} / {CONCURRENCY} x {1000 * ANSWER_S:.0f} ms)",
            settled_s / ideal_s,
            1.2,
            "x",
        ),
        Row("processor time of one look-up", _processor_time_ms(50 if quick else 800), 0.6, "ms"),
    ]


def _processor_time_ms(streams: int) -> float:
    """Return what the process works for a look-up, from its first request to the end of its span."""
    told = Told()
    config = Config(max_concurrency=CONCURRENCY, retrieval_timeout=300.0, max_pending=streams)
    with BreakingServer() as server, instrumented(config, **told.providers):
        asyncio.run(_cut(server.url, streams))
        _open(server.url)
        began, ended = time.process_time(), told.ended
        while told.ended < streams:
            time.sleep(0.1)
        return 1000 * (time.process_time() - began) / (streams - ended)


def _added(ours: tuple[list[float], ...], plain: tuple[list[float], list[float]]) -> float:
    """Return the milliseconds by which the worst of ours is over the mean of before and after."""
    return 1000 * (max(percentile(each, 99) for each in ours) - fmean(percentile(each, 99) for each in plain))


async def _cut(url: str, streams: int) -> None:
    slots = asyncio.Semaphore(50)
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as client:

        async def one() -> None:
            async with slots:
                stream = await client.responses.create(model="gpt-5.4-mini", input="hello", stream=True)
                with contextlib.suppress(openai.APIConnectionError):
                    async for _ in stream:
                        pass

        await asyncio.gather(*(one() for _ in range(streams)))


async def _waits(url: str, times: int) -> Waits:
    waits = Waits([], [])
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as client:
        for _ in range(times):
            cut = await client.responses.create(model="gpt-5.4-mini", input="hello", stream=True)
            for _ in range(4):
                await anext(aiter(cut))
            # While the other is opened and closed the end of this one arrives, and no read need wait for it.
            open_ = await client.responses.create(model="gpt-5.4-mini", input="hello", stream=True)
            await anext(aiter(open_))
            began = time.perf_counter()
            await open_.close()
            waits.close.append(time.perf_counter() - began)
            began = time.perf_counter()
            with contextlib.suppress(openai.APIConnectionError):
                await anext(aiter(cut))
            waits.cut.append(time.perf_counter() - began)
    return waits


async def _lag(for_s: float) -> list[float]:
    """Return how much later than asked for an event loop with nothing to do wakes up."""
    lags = []
    until = time.perf_counter() + for_s
    while (began := time.perf_counter()) < until:
        await asyncio.sleep(_TICK_S)
        lags.append(time.perf_counter() - began - _TICK_S)
    return lags


async def _settled(told: Told, number: int, began: float) -> tuple[list[float], float]:
    lags: list[float] = []
    while told.ended < number and time.perf_counter() < began + 120:
        lags += await _lag(0.02)
    return lags, time.perf_counter() - began


def _open(url: str) -> None:
    request = urllib.request.Request(f"{url}/open", method="POST")  # noqa: S310
    urllib.request.urlopen(request).close()  # noqa: S310
