"""Mixed traffic for a long time: `scripts/soak`.

Calls of all kinds are made in rounds, by threads and by an event loop. After each round every span is
compared with the counts of the server, which is a process of its own. At the end the sums are compared, and
memory, threads and descriptors with those of the beginning.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai

from calls import CUT, entered, items, settle
from embedded.answer import FAILED, OUT_OF_QUOTA, Answer, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from file_process import FileProcess, answer_words
from load import TLS, Tally, memory
from observed import eventually
from otel_responses_usage import ResponsesUsageInstrumentor
from sockets import HAS_WEBSOCKET, client_of, until_end
from test_matrix import ASYNCIO, SYNC, Runtime

if TYPE_CHECKING:
    from collections.abc import Mapping

LEFT_AFTER = 6
PAUSE_S = 0.1  # of each worker, between two calls
WORKERS = 4  # threads, and as many tasks of an event loop
ROUND_S = 10.0
WARM_UP_S = 5.0
SETTLE_S = 60.0
# The process keeps memory that it has freed: more of it, the more calls have coincided.
MOST_GROWTH = 1.05
# Blocks of the interpreter for each call. Caches fill up. A call that is kept has ten blocks at least: it is
# found even if it happens to one use of thirteen only.
MOST_BLOCKS = 0.5
# Blocks of caches that are not full yet after a tenth of a short run on a slow machine.
MOST_CACHED = 1_000


# --- the server's process ------------------------------------------------------------------------------


def plan_of(model: str, answer: Answer) -> Plan | Reply:
    """What becomes of a call, by the first word of its model."""
    left: dict[str, Any] = {"cut_after": LEFT_AFTER}
    match model.split()[0]:
        case "cut":
            return Plan(answer, **left, end=Cut())
        case "left" | "cancelled":
            return Plan(answer, **left, end=Hold())
        case "late":
            return Plan(answer, **left, end=Hold(), get_replies=(error(404, "Not found."),) * 4)
        case "background" | "polled":
            return Plan(answer, get_replies=("queued", "in_progress"))
        case "refused":
            return error(500, "Not now.")
    return Plan(answer)


class Serving:
    """Both servers. They forget on demand, since they are to serve for an hour."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._api = ResponsesAPI(self._plan)
        self._server = ScriptedServer(lambda request: self._api(request)).start()
        self._websockets = self._new_websockets()

    @property
    def urls(self) -> dict[str, str]:
        return {
            "http": f"{self._server.url}/v1",
            "websocket": self._websockets.url if self._websockets else "",
        }

    def billed(self) -> dict[str, list[int]]:
        """Input and output tokens by the id of the response."""
        stored = {**self._api.stored, **(self._websockets.stored if self._websockets else {})}
        return {
            response_id: [body["usage"]["input_tokens"], body["usage"]["output_tokens"]]
            for response_id, body in stored.items()
        }

    def forget(self) -> dict[str, str]:
        self._api = ResponsesAPI(self._plan)
        self._server.exchanges.clear()
        if self._websockets:
            # Not a new server: it had another port, so the metrics had new series.
            known = self._websockets
            for held in (known.stored, known._records, known.messages, known.connections):
                held.clear()
            known.gets.clear()
            known.handshakes.clear()
        return self.urls

    def _plan(self, request: SeenRequest) -> Plan | Reply:
        return plan_of(request.json["model"], self._answer(request.json["model"]))

    def _answer(self, model: str) -> Answer:
        # No two responses have a count in common.
        number = next(self._numbers)
        endings = {"failed": FAILED, "quota": OUT_OF_QUOTA}
        counts = usage(2 * number, 2 * number + 1, cached=number)
        kind = model.split()[0]
        return Answer(usage=counts, model=model, **({"ending": endings[kind]} if kind in endings else {}))

    def _new_websockets(self) -> Any:
        if not HAS_WEBSOCKET:
            return None
        from embedded.websocket_api import Turn, WebSocketAPI

        def turn(asked: Mapping[str, Any]) -> Turn:
            is_left = asked["model"].startswith("socket_left")
            return Turn(
                self._answer(asked["model"]),
                cut_after=LEFT_AFTER if is_left else None,
                end=Hold() if is_left else None,
            )

        return WebSocketAPI(turn).__enter__()


def serve() -> None:
    """Serve, and obey words."""
    serving = Serving()
    answer_words(serving.urls, lambda word: serving.billed() if word == "tell" else serving.forget())


# --- the application -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clients:
    """The clients of a round: one for HTTP, and one for the WebSocket."""

    runtime: Runtime
    http: Any
    websocket: Any = None

    @classmethod
    def of(cls, runtime: Runtime, urls: dict[str, str]) -> Clients:
        library = openai.DefaultHttpxClient if runtime.is_sync else openai.DefaultAsyncHttpxClient
        http = runtime.client(
            base_url=urls["http"], api_key="k", max_retries=0, http_client=library(verify=TLS)
        )
        if not HAS_WEBSOCKET:
            return cls(runtime, http)
        server = _Server(urls["websocket"])
        return cls(runtime, http, client_of(runtime, server, http_client=library(verify=TLS)))

    async def close(self) -> None:
        await settle(self.http.close())
        if self.websocket:
            await settle(self.websocket.close())


@dataclass(frozen=True)
class _Server:
    url: str


async def streamed(
    clients: Clients, model: str, events: int | None = None, on_event: Callable[[], object] = bool
) -> None:
    stream = await settle(clients.http.responses.create(model=model, input="x", stream=True))
    async with entered(stream):
        seen = 0
        async for _ in items(stream):
            seen += 1
            on_event()
            if seen == events:
                break


async def left(clients: Clients, model: str) -> None:
    await streamed(clients, model, LEFT_AFTER)


async def cut(clients: Clients, model: str) -> None:
    with contextlib.suppress(*CUT):
        await streamed(clients, model)
        raise AssertionError("was not cut")


async def cancelled(clients: Clients, model: str) -> None:
    """A task that reads is cancelled. A thread cannot be, so it leaves."""
    if clients.runtime.is_sync:
        await left(clients, model)
        return
    has_read = asyncio.Event()
    reading = asyncio.create_task(streamed(clients, model, on_event=has_read.set))
    await asyncio.wait_for(has_read.wait(), SETTLE_S)
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
        raise AssertionError("was not cancelled")


async def quota(clients: Clients, model: str) -> None:
    with contextlib.suppress(openai.APIError):
        await streamed(clients, model)
        raise AssertionError("was not refused")


async def whole_at_once(clients: Clients, model: str) -> None:
    await settle(clients.http.responses.create(model=model, input="x"))


async def refused(clients: Clients, model: str) -> None:
    with contextlib.suppress(openai.InternalServerError):
        await whole_at_once(clients, model)
        raise AssertionError("was not refused")


async def background(clients: Clients, model: str) -> None:
    await settle(clients.http.responses.create(model=model, input="x", background=True))


async def polled(clients: Clients, model: str) -> None:
    """The application asks for the response, and so do the look-ups."""
    response = await settle(clients.http.responses.create(model=model, input="x", background=True))
    while response.status in ("queued", "in_progress"):
        response = await settle(clients.http.responses.retrieve(response.id))


async def socket(clients: Clients, model: str) -> None:
    async with entered(clients.websocket.responses.connect()) as connection:
        for _ in range(2):
            await settle(connection.send({"type": "response.create", "model": model, "input": "x"}))
            await until_end(connection)


async def socket_left(clients: Clients, model: str) -> None:
    async with entered(clients.websocket.responses.connect()) as connection:
        await settle(connection.send({"type": "response.create", "model": model, "input": "x"}))
        for _ in range(LEFT_AFTER):
            await settle(connection.recv())


# What an application does, and how many calls that is.
USES: dict[str, tuple[Callable[[Clients, str], Awaitable[None]], int]] = {
    "whole": (streamed, 1),
    "left": (left, 1),
    "cut": (cut, 1),
    "cancelled": (cancelled, 1),
    "failed": (streamed, 1),
    "quota": (quota, 1),
    "at_once": (whole_at_once, 1),
    "refused": (refused, 1),
    "background": (background, 1),
    "polled": (polled, 1),
    "late": (left, 1),
    **({"socket": (socket, 2), "socket_left": (socket_left, 1)} if HAS_WEBSOCKET else {}),
}
# What is told of these has no usage: nothing was generated, or nothing was found when it was asked for.
MISSING = {"refused": "no_response_id", "late": "not_found"}


@dataclass
class State:
    """What the process has."""

    megabytes: float
    blocks: int
    threads: int
    descriptors: int

    @classmethod
    def now(cls) -> State:
        blocks, megabytes = memory()
        directory = Path("/proc/self/fd")
        # One of them is that of the listing.
        descriptors = len(list(directory.iterdir())) - 1 if directory.exists() else 0
        return cls(megabytes, blocks, threading.active_count(), descriptors)

    def __str__(self) -> str:
        return (
            f"{self.megabytes:.1f} MB, {self.blocks:,} blocks, {self.threads} threads, "
            f"{self.descriptors} descriptors"
        )


@dataclass
class Soak:
    """Sums of all rounds, as the application made them and as they were told."""

    server: FileProcess
    tally: Tally = field(default_factory=Tally)
    calls: Counter[str] = field(default_factory=Counter)
    spans: int = 0
    billed: Counter[str] = field(default_factory=Counter)
    late: int = 0
    wrong: list[str] = field(default_factory=list)

    def round(self, seconds: float) -> None:
        """Make calls for so long, and compare what is told of them."""
        made: Counter[str] = Counter()
        lock = threading.Lock()
        ends_at = time.monotonic() + seconds
        urls = self.server("forget")

        async def work(clients: Clients, number: int, pause: Callable[[float], Any]) -> None:
            uses = list(USES.items())
            for step in itertools.count(number * len(uses) // WORKERS):
                if time.monotonic() > ends_at:
                    return
                name, (use, calls) = uses[step % len(uses)]
                await use(clients, f"{name} {clients.runtime}")
                with lock:
                    made[name] += calls
                await settle(pause(PAUSE_S))

        def in_thread(clients: Clients, number: int) -> None:
            SYNC.drive(lambda: work(clients, number, time.sleep))

        async def in_tasks() -> None:
            clients = Clients.of(ASYNCIO, urls)
            await asyncio.gather(*(work(clients, number, asyncio.sleep) for number in range(WORKERS)))
            await clients.close()

        sync = Clients.of(SYNC, urls)
        with ThreadPoolExecutor(WORKERS + 1) as pool:
            working = [pool.submit(in_thread, sync, number) for number in range(WORKERS)]
            working.append(pool.submit(asyncio.run, in_tasks()))
            for worker in working:
                worker.result()
        self.calls += made
        self._settle(sync.http, made)
        SYNC.drive(sync.close)

    def _settle(self, client: Any, made: Counter[str]) -> None:
        """Compare each span with the server's counts. Fetch what the look-ups have not found."""
        told = self.tally.told
        eventually(lambda: len(told) >= made.total(), "all calls are told", SETTLE_S)
        billed = self.server("tell")
        reasons: Counter[str] = Counter()
        for response_id, reason, *counts in told:
            if reason is not None:
                reasons[reason] += 1
            if counts != (billed[response_id] if reason is None else [None, None]):
                self.wrong.append(f"{response_id} has {counts} on its span, {billed.get(response_id)} billed")
            if reason == "not_found":
                client.responses.retrieve(response_id)
                self.late += 1
        expected = Counter({reason: made[name] for name, reason in MISSING.items()})
        if reasons != expected:
            self.wrong.append(f"missing reasons: {dict(reasons)} instead of {dict(expected)}")
        self.spans += len(told)
        told.clear()
        for inputs, outputs in billed.values():
            self.billed["input"] += inputs
            self.billed["output"] += outputs


@contextlib.contextmanager
def instrumented(tally: Tally) -> Iterator[None]:
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(tracer_provider=tally.tracer_provider, meter_provider=tally.meter_provider)
    try:
        yield
    finally:
        instrumentor.uninstrument()


@dataclass
class Result:
    """What a soak comes to: pairs that have to be the same, and figures."""

    minutes: float
    same: dict[str, tuple[int, int]]
    after_a_tenth: State
    after_all: State
    calls: Counter[str]
    wrong: list[str]

    @property
    def faults(self) -> list[str]:
        """What is not as it should be, in words."""
        faults = [f"{what}: {one} is not {other}" for what, (one, other) in self.same.items() if one != other]
        if self.after_all.megabytes > MOST_GROWTH * self.after_a_tenth.megabytes:
            faults.append(f"memory: the process has grown by more than {100 * (MOST_GROWTH - 1):.0f} %")
        if self.after_all.blocks - self.after_a_tenth.blocks > MOST_CACHED + MOST_BLOCKS * self.calls.total():
            faults.append(f"memory: more than {MOST_BLOCKS} blocks of the interpreter are left of a call")
        return faults + self.wrong

    def __str__(self) -> str:
        first, last = self.after_a_tenth, self.after_all
        rows = [
            f"{self.minutes:.1f} minutes, {self.calls.total():,} calls: "
            + ", ".join(f"{name} {calls:,}" for name, calls in self.calls.items()),
            *(f"{what}: {one:,}, {other:,}" for what, (one, other) in self.same.items()),
            f"MB of memory after a tenth, at the end: {first.megabytes:.1f}, {last.megabytes:.1f}",
            f"blocks of memory after a tenth, at the end: {first.blocks:,}, {last.blocks:,}",
            *(f"DIFFERS: {fault}" for fault in self.faults[:20]),
        ]
        return "\n".join(rows)


def soak(minutes: float) -> Result:
    """Make calls for so long."""
    server = FileProcess(__file__, "serve")
    server.answer()  # its first addresses
    try:
        # What is made at first use is no leak.
        warm_up = Soak(server)
        with instrumented(warm_up.tally):
            warm_up.round(min(WARM_UP_S, 6 * minutes))
        before = State.now()
        began = time.monotonic()
        soak = Soak(server)
        marks: list[State] = []
        with instrumented(soak.tally):
            rounds = max(2, round(60 * minutes / ROUND_S))
            for number in range(rounds):
                ends_at = began + 60 * minutes * (number + 1) / rounds
                soak.round(max(1.0, ends_at - time.monotonic()))
                marks.append(State.now())
                sys.stderr.write(f"{soak.calls.total():,} calls: {marks[-1]}\n")
            tally = soak.tally
            tokens, pending = tally.tokens(), tally.pending()
            counted = sum(tally.calls().values())
            late = sum(point.value for point in tally.points("openai_responses.late_usage"))
            own_faults = sum(point.value for point in tally.points("openai_responses.faults"))
        with contextlib.suppress(AssertionError):
            eventually(lambda: State.now().threads <= before.threads, "no more threads than before", 30)
        after = State.now()
    finally:
        server.stop()
    made = soak.calls.total()
    return Result(
        (time.monotonic() - began) / 60,
        {
            "calls made, spans": (made, soak.spans),
            "calls made, counted by the metric": (made, counted),
            "input tokens billed, in the metric": (soak.billed["input"], tokens["input"][1]),
            "output tokens billed, in the metric": (soak.billed["output"], tokens["output"][1]),
            "calls fetched later, counted late": (soak.late, late),
            "calls that are pending, none": (pending, 0),
            "errors of this package, none": (own_faults, 0),
            "threads before, after": (before.threads, after.threads),
            "descriptors before, after": (before.descriptors, after.descriptors),
        },
        marks[max(0, len(marks) // 10 - 1)],
        marks[-1],
        soak.calls,
        warm_up.wrong + soak.wrong,
    )


def main() -> int:
    """Run the server, or the soak, and say what came of it."""
    if sys.argv[1:] == ["serve"]:
        serve()
        return 0
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description="Makes calls of all kinds for a long time."
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="for how long; an hour by default")
    result = soak(parser.parse_args().minutes)
    print(result)  # noqa: T201
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
