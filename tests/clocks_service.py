"""A service in the middle of whose calls something happens to its clocks: run by tests/test_clocks.py.

`clocks_service.py URL WEBSOCKET_URL jump SECONDS` moves the clock, which libfaketime reads from a file.
`clocks_service.py URL WEBSOCKET_URL wait` waits for a line on stdin: the test suspends the process meanwhile.
It prints what was told of each call, and what was true.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from calls import entered, items, settle
from observed import Observed
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from sockets import HAS_WEBSOCKET, until_end
from test_matrix import ASYNCIO, SYNC, Runtime

RETRIEVAL_TIMEOUT_S = 20.0  # a busy machine takes some seconds for what waits 1.5 s
READ = 6  # events before the middle
PATIENCE_S = 240.0


def uptime_s() -> float:
    """A clock that nothing here touches."""
    return float(Path("/proc/uptime").read_text().split()[0])


class Middle:
    """The moment at which something happens. Every call waits for it, in its middle."""

    def __init__(self, calls: int) -> None:
        self.begun = threading.Barrier(calls + 1)
        self.over = threading.Event()

    def wait(self) -> None:
        self.begun.wait(PATIENCE_S)
        self.over.wait()


def move_clock(seconds: int) -> None:
    """Let the time of day jump."""
    before = time.time()
    # In one step: a thread that finds an empty file gets no time at all.
    file = Path(os.environ["FAKETIME_TIMESTAMP_FILE"])
    moved = file.with_suffix(".moved")
    moved.write_text(f"{seconds:+d}")
    moved.replace(file)
    began_s = uptime_s()
    # libfaketime reads the file once a second.
    while abs(time.time() - before - seconds) > abs(seconds) / 2:
        if uptime_s() - began_s > PATIENCE_S:
            # Other threads wait for the middle. So no exception.
            sys.stderr.write("The clock has not moved.\n")
            sys.stderr.flush()
            os._exit(1)
        time.sleep(0.01)


def sleep(seconds: float) -> None:
    """As `time.sleep`. Under libfaketime 0.9.10 that raises EINVAL from Python 3.11 on."""
    select.select((), (), (), max(0.0, seconds))


class Times:
    """When a call was surely not yet begun, surely begun, surely not yet at its end, and at its end.

    Between them anything may take long on a busy machine.
    """

    def __init__(self) -> None:
        self.before_s = uptime_s()
        self.begun_s = self.open_s = 0.0

    def begun(self) -> None:
        self.begun_s = uptime_s()

    def still_open(self) -> None:
        self.open_s = uptime_s()

    def ended(self) -> tuple[float, float]:
        """Return the least and the most seconds that the call has taken."""
        return self.open_s - self.begun_s, uptime_s() - self.before_s


# The least and the most seconds that each call has taken, by model.
TRUE_S: dict[str, tuple[float, float]] = {}


def read_whole(runtime: Runtime, url: str, model: str, middle: Middle) -> None:
    async def main() -> None:
        client = runtime.client(base_url=url, api_key="k", max_retries=0)
        await read(client, model, middle.wait)
        await settle(client.close())

    runtime.drive(main)


def leave(runtime: Runtime, url: str, model: str, middle: Middle) -> None:
    async def main() -> None:
        client = runtime.client(base_url=url, api_key="k", max_retries=0)
        await read(client, model, None)
        middle.wait()
        await settle(client.close())

    runtime.drive(main)


async def read(client: Any, model: str, half_way: Callable[[], object] | None) -> None:
    """Read a stream, and call a function half-way; without one, leave the stream there."""
    seen = 0
    times = Times()
    stream = await settle(client.responses.create(model=model, input="x", stream=True))
    times.begun()
    async with entered(stream):
        async for _ in items(stream):
            seen += 1
            if seen == READ:
                if half_way:
                    half_way()
                times.still_open()
                if not half_way:
                    break
    TRUE_S[model] = times.ended()


def talk(runtime: Runtime, url: str, model: str, middle: Middle) -> None:
    """Send a create over a WebSocket. The middle is before its first event is received."""

    async def main() -> None:
        client = runtime.client(
            base_url=url, websocket_base_url=url.replace("http", "ws", 1), api_key="k", max_retries=0
        )
        async with entered(client.responses.connect()) as connection:
            times = Times()
            await settle(connection.send({"type": "response.create", "model": model, "input": "x"}))
            times.begun()
            middle.wait()
            times.still_open()
            await until_end(connection)
            TRUE_S[model] = times.ended()
        await settle(client.close())

    runtime.drive(main)


def main() -> None:
    url, websocket_url, what, *arguments = sys.argv[1:]
    if what == "jump":
        time.sleep = sleep
    observed = Observed()
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(
        tracer_provider=observed.tracer_provider,
        meter_provider=observed.meter_provider,
        config=Config(retrieval_timeout=RETRIEVAL_TIMEOUT_S, max_concurrency=16),
    )
    warm_up(url)
    uses: dict[str, Callable[..., None]] = {
        "whole": read_whole,
        **dict.fromkeys(("pending", "asked", "early", "unanswered", "stuck", "lost"), leave),
    }
    calls = [(use, runtime, url, name) for name, use in uses.items() for runtime in (SYNC, ASYNCIO)]
    if HAS_WEBSOCKET:
        calls += [(talk, runtime, websocket_url, "websocket") for runtime in (SYNC, ASYNCIO)]
    middle = Middle(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        running = [
            pool.submit(use, runtime, url, f"{name} {runtime}", middle) for use, runtime, url, name in calls
        ]
        middle.begun.wait(PATIENCE_S)
        middle_at_s = uptime_s()
        if what == "jump":
            time.sleep(0.5)  # look-ups are under way
            move_clock(int(arguments[0]))
        else:
            sys.stdout.write("middle\n")
            sys.stdout.flush()
            sys.stdin.readline()
        middle.over.set()
        for call in running:
            call.result()
    settled_s: dict[int, float] = {}
    while observed.finished < len(calls) and uptime_s() < middle_at_s + PATIENCE_S:
        settled_s.setdefault(observed.finished, uptime_s() - middle_at_s)
        time.sleep(0.02)
    settled_s[observed.finished] = uptime_s() - middle_at_s
    spans = observed.spans(len(calls))
    pending = observed.pending()
    fetch_lost(url, spans)
    told = {
        str((span.attributes or {})["gen_ai.request.model"]): {
            "duration_s": ((span.end_time or 0) - (span.start_time or 0)) / 1e9,
            **{key: value for key, value in (span.attributes or {}).items() if ".time_" not in key},
            "first_chunk_s": (span.attributes or {}).get("gen_ai.response.time_to_first_chunk"),
        }
        for span in spans
    }
    times = {
        name: [
            (point.count, point.min, point.max)
            for point in observed.points(f"gen_ai.client.operation.{name}")
        ]
        for name in ("duration", "time_to_first_chunk", "time_per_output_chunk")
    }
    late = sum(point.value for point in observed.points("openai_responses.late_usage"))
    result = {
        "told": told,
        "true_s": TRUE_S,
        "times": times,
        "pending": pending,
        "late": late,
        "tokens": observed.tokens(),
        "calls": observed.calls(),
        "faults": len(observed.points("openai_responses.faults")),
        "settled_s": max(settled_s.values()),
    }
    instrumentor.uninstrument()
    sys.stdout.write(json.dumps(result))


def warm_up(url: str) -> None:
    """The SDK builds its models at first use, which takes longer than a call."""
    with suppress_instrumentation(), openai.OpenAI(base_url=url, api_key="k") as client:
        list(client.responses.create(model="warm-up", input="x", stream=True))


def is_lost(span: ReadableSpan) -> bool:
    return str((span.attributes or {})["gen_ai.request.model"]).startswith("lost")


def fetch_lost(url: str, spans: list[ReadableSpan]) -> None:
    """Fetch the responses that the look-ups have not found, as an application does later."""
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        for span in spans:
            if is_lost(span):
                client.responses.retrieve(str((span.attributes or {})["gen_ai.response.id"]))


if __name__ == "__main__":
    main()
