"""What an application waits because usage is looked up, and how fast that is done; over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request

import openai

from otel_responses_usage import Config

from .clock import percentile
from .instrumented import instrumented
from .row import Row
from .server import ANSWER_S, BreakingServer
from .telemetry import Told

CONCURRENCY = 8
_TICK_S = 0.002


def rows(*, quick: bool) -> list[Row]:
    """Cut streams, close streams while all of their usage is looked up, then let the look-ups be answered."""
    streams, closes = (40, 10) if quick else (1_000, 300)
    told = Told()
    config = Config(max_concurrency=CONCURRENCY, retrieval_timeout=300.0, max_pending=4 * streams)
    with BreakingServer() as server:
        plain_cut, plain_close = asyncio.run(_waits(server.url, closes))
        idle = asyncio.run(_lag(1.0))
        with instrumented(config, **told.providers):
            asyncio.run(_cut(server.url, streams))
            cut, close = asyncio.run(_waits(server.url, closes))
            pending = streams + 2 * closes - told.ended
            began = time.perf_counter()
            _open(server.url)
            lag, settled_s = asyncio.run(_settled(told, streams + 2 * closes, began))
    ideal_s = pending / CONCURRENCY * ANSWER_S
    what = f"with {pending:,} look-ups pending, p99"
    return [
        Row(f"added at the end of a cut stream {what}", _added(cut, plain_cut), 1, "ms", "0 ms"),
        Row(f"added to close() {what}", _added(close, plain_close), 1, "ms", "0 ms"),
        Row(f"added event-loop lag while they settle {what}", _added(lag, idle), 1, "ms", "0 ms"),
        Row(
            f"{pending:,} cut streams settle, in multiples of {ideal_s:.2f} s "
            f"({pending:,} / {CONCURRENCY} x {1000 * ANSWER_S:.0f} ms)",
            settled_s / ideal_s,
            1.2,
            "x",
            "1 x",
        ),
    ]


def _added(ours: list[float], plain: list[float]) -> float:
    return 1000 * max(0.0, percentile(ours, 99) - percentile(plain, 99))


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


async def _waits(url: str, times: int) -> tuple[list[float], list[float]]:
    """Return what the read takes that finds a stream cut, and what `close()` takes of one that is open."""
    cut: list[float] = []
    close: list[float] = []
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as client:
        for _ in range(times):
            stream = await client.responses.create(model="gpt-5.4-mini", input="hello", stream=True)
            for _ in range(4):
                await anext(aiter(stream))
            await asyncio.sleep(0.005)  # by now the end has arrived, and the read need not wait for it
            began = time.perf_counter()
            with contextlib.suppress(openai.APIConnectionError):
                await anext(aiter(stream))
            cut.append(time.perf_counter() - began)
            stream = await client.responses.create(model="gpt-5.4-mini", input="hello", stream=True)
            await anext(aiter(stream))
            began = time.perf_counter()
            await stream.close()
            close.append(time.perf_counter() - began)
    return cut, close


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
