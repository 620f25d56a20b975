"""Reading on after the application has closed a stream: in the background, for a while, if asked to."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from calls import CALLS, MODEL, Call, settle, since
from conftest import Instrument, Serve
from embedded.answer import FAILED, Answer
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest, Send, Step, Wait, frame
from embedded.responses_api import Plan, ResponsesAPI
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage import ResponsesUsageInstrumentor
from otel_responses_usage._surfaces import _tail
from test_endings import (
    ANSWER,
    ASKED,
    ASYNCIO,
    HALF,
    SYNC,
    both,
    client_of,
    encoded,
    looked_up,
    pause,
    read_half,
    read_half_and_closed,
    runtimes,
    take,
    told,
    untidy,
)
from test_exit import NamedAPI, run
from test_matrix import Runtime

BACKGROUND: dict[str, Any] = {"extra_body": {"background": True}}  # early releases do not know it by name
TAILED = {"outcome": "closed", "source": "tail", "events": 6}


class GatedAPI(ResponsesAPI):
    """Keeps each stream waiting for its gate after six events; then follows what is given, or the rest."""

    def __init__(self, answer: Answer = ANSWER, *then: Step) -> None:
        super().__init__(lambda _: Plan(answer))
        self.gate = threading.Event()
        self._then = then

    def __call__(self, request: SeenRequest) -> Reply:
        reply = super().__call__(request)
        if request.method != "POST":
            return reply
        head, rest = reply.steps[:6], reply.steps[6:]
        return replace(reply, steps=(*head, Wait(self.gate), *(self._then or rest)))


def open_tails() -> int:
    return len(_tail._tails) + len(_tail._tasks)


async def until(runtime: Runtime, holds: Callable[[], Any]) -> None:
    """Wait as an application does that goes on with something else."""
    deadline = time.monotonic() + 15
    while not holds() and time.monotonic() < deadline:
        await pause(runtime)


def close_with_a_tail(runtime: Runtime, observed: Observed, server: ScriptedServer, api: GatedAPI) -> None:
    """Close a stream half-way, and let the server go on; the client stays until the call is told."""

    async def main() -> None:
        client = client_of(runtime, server)
        await read_half_and_closed(client)
        api.gate.set()
        await until(runtime, lambda: observed.finished)
        await settle(client.close())

    runtime.drive(main)


@both
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_rest_of_a_closed_stream_is_read_in_the_background(
    call: Call, runtime: Runtime, instrument: Instrument, serve: Serve
) -> None:
    """`close()` returns while the server still has to answer; the usage is that of the terminal event."""
    if not call.is_in_sdk():
        pytest.skip("not in this release of the SDK")
    observed = instrument(tail_timeout=60)
    api = GatedAPI()
    server = serve(api)
    closed_at: list[int] = []

    async def main() -> None:
        client = client_of(runtime, server)
        async with call.open(client, model=MODEL, input="x") as reader:
            await reader.take(6)
            await reader.close()
            closed_at.append(time.time_ns())
        await pause(runtime)
        api.gate.set()
        await until(runtime, lambda: observed.finished)
        await settle(client.close())

    runtime.drive(main)
    span = observed.span()
    assert told(span) == TAILED
    assert (span.attributes or {})["openai_responses.response.status"] == "completed"
    assert token_attributes(span) == usage_attributes(ANSWER.usage)
    assert span.end_time is not None
    assert span.end_time < closed_at[0] + 20_000_000  # the end is the application's, not that of the tail
    assert [request.method for request in server.requests] == ["POST"]
    assert observed.calls() == {"tail": 1}
    assert observed.pending() == 0


@both
@pytest.mark.parametrize("wbits", [zlib.MAX_WBITS + 16, zlib.MAX_WBITS], ids=["gzip", "deflate"])
def test_the_rest_of_a_compressed_stream_is_read_too(
    wbits: int, runtime: Runtime, instrument: Instrument, serve: Serve
) -> None:
    """The tail of a compressed stream goes on where the application's reading has left its decoder."""
    observed = instrument(tail_timeout=60)
    api = GatedAPI()
    server = serve(lambda request: encoded(api(request), wbits))

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await read_half(client)
        await settle(stream.close())
        api.gate.set()
        await until(runtime, lambda: observed.finished)
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == TAILED
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


@both
def test_a_tail_that_fails_is_still_a_close(runtime: Runtime, instrument: Instrument, serve: Serve) -> None:
    """What the response came to afterwards is its status; how the call ended was the application's doing."""
    observed = instrument(tail_timeout=60)
    api = GatedAPI(replace(ANSWER, ending=FAILED))
    close_with_a_tail(runtime, observed, serve(api), api)
    assert told(observed.span()) == TAILED
    assert (observed.span().attributes or {})["openai_responses.response.status"] == "failed"


def test_tails_give_their_places_back(instrument: Instrument, serve: Serve) -> None:
    """A tail that has ended leaves its place among the pending calls to the next one."""
    observed = instrument(tail_timeout=60, max_pending=1)
    api = GatedAPI()
    with client_of(SYNC, serve(api)) as client:
        for done in (1, 2, 3):
            api.gate.clear()
            SYNC.drive(lambda: read_half_and_closed(client))
            assert observed.pending() == 1
            api.gate.set()
            observed.spans(done)
            eventually(lambda: open_tails() == 0, "the tail's connection is closed")
    assert observed.calls() == {"tail": 3}
    assert observed.pending() == 0


async def leave_it_open(client: Any) -> None:
    pass


async def close_it(client: Any) -> None:
    await settle(client.close())


@both
@pytest.mark.parametrize("then", [leave_it_open, close_it], ids=["client open", "client closed"])
def test_a_tail_ends_at_its_deadline(
    then: Callable[[Any], Awaitable[None]], runtime: Runtime, instrument: Instrument, serve: Serve
) -> None:
    """A server that goes on for longer is left, and the usage is looked up as without a tail."""
    observed = instrument(tail_timeout=0.3)
    server = serve(ResponsesAPI(lambda _: HALF))
    closed_at: list[float] = []

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await read_half(client)
        await settle(stream.close())
        closed_at.append(time.time())
        await pause(runtime)
        await then(client)
        await until(runtime, lambda: observed.finished)
        await until(runtime, lambda: server.exchanges[0].client_left_at)
        await settle(client.close())

    runtime.drive(main)
    left_at = server.exchanges[0].client_left_at
    assert told(observed.span()) == looked_up("closed")
    assert left_at is not None
    assert left_at - closed_at[0] > 0.25 or then is close_it
    eventually(lambda: open_tails() == 0, "the tail's connection is closed")


@both
@pytest.mark.parametrize("split", [0, 2], ids=["at its border", "in its middle"])
def test_a_terminal_event_that_has_half_arrived_is_read_once(
    split: int, runtime: Runtime, instrument: Instrument, serve: Serve
) -> None:
    """What lies in the HTTP library's buffer at the close is looked at, and then read on with the rest."""
    observed = instrument(tail_timeout=60)
    gate = threading.Event()
    *others, last = (b"%x\r\n%b\r\n" % (len(event), event) for event in map(frame, ANSWER.events()))
    border = len(last) // split if split else 0
    body = (Send(b"".join(others) + last[:border]), Wait(gate), Send(last[border:] + b"0\r\n\r\n"))
    headers = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
    server = serve(lambda _: Reply(headers=headers, steps=body, chunked=False))

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await settle(client.responses.create(**ASKED))
        await take(stream, len(others))
        await settle(stream.close())
        gate.set()
        await until(runtime, lambda: observed.finished)
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == {**TAILED, "events": len(others)}
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed")
def test_a_tail_ends_though_its_loop_is_closed(instrument: Instrument, serve: Serve) -> None:
    """The tail does not need the event loop of the application. At its timeout the usage is looked up."""
    observed = instrument(tail_timeout=0.2)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(read_half_and_closed(client_of(ASYNCIO, serve(ResponsesAPI(lambda _: HALF)))))
    loop.close()
    assert told(observed.span()) == looked_up("closed")
    gc.collect()  # what such a loop leaves behind is of this test


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_no_tail(instrument: Instrument, serve: Serve) -> None:
    """The tails of the parent continue in the parent. The child closes its handles to their connections."""
    observed = instrument(tail_timeout=60)
    api = GatedAPI()
    with client_of(SYNC, serve(api)) as client:
        SYNC.drive(lambda: read_half_and_closed(client))
        assert open_tails() == 1
        child = os.fork()
        if child == 0:
            os._exit(open_tails())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        api.gate.set()
        assert told(observed.span()) == TAILED


def close_at_once(runtime: Runtime, server: ScriptedServer, call: Callable[[Any], Any]) -> None:
    """Close a stream half-way: the server sees its client leave while that is still open."""

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await settle(call(client))
        await take(stream)
        await settle(stream.close())
        await until(runtime, lambda: server.exchanges[0].client_left_at)
        await settle(client.close())

    runtime.drive(main)
    assert server.exchanges[0].client_left_at is not None


@pytest.mark.parametrize(
    ("runtime", "settings", "asked"),
    [
        (SYNC, {}, {}),
        (ASYNCIO, {}, {}),
        (SYNC, {"tail_timeout": 60}, BACKGROUND),
        (ASYNCIO, {"tail_timeout": 60}, BACKGROUND),
    ],
    ids=[
        "sync, off",
        "asyncio, off",
        "sync, background",
        "asyncio, background",
    ],
)
@untidy
def test_what_is_not_read_on_is_closed_at_once(
    runtime: Runtime,
    settings: dict[str, Any],
    asked: dict[str, Any],
    instrument: Instrument,
    serve: Serve,
) -> None:
    """Where there is no tail, the server sees its client leave with the close, and is asked afterwards."""
    observed = instrument(**settings)
    server = serve(ResponsesAPI(lambda _: HALF))
    close_at_once(runtime, server, lambda client: client.responses.create(**ASKED, **asked))
    assert told(observed.span()) == looked_up("closed")
    assert [request.method for request in server.requests] == ["POST", "GET"]


@both
@since(1, 82, 0)
def test_a_fetch_is_not_read_on(runtime: Runtime, instrument: Instrument, serve: Serve) -> None:
    """A resumed stream has no usage of its own: when it is closed the server sees its client leave."""
    observed = instrument(tail_timeout=60)
    server = serve(lambda _: Reply.sse(ANSWER.events()[:6], end=Hold()))
    close_at_once(runtime, server, lambda client: client.responses.retrieve(ANSWER.id, stream=True))
    assert told(observed.span()) == {"outcome": "closed", "events": 6}


@both
@pytest.mark.parametrize("events", [0, 6], ids=["unread", "half read"])
def test_a_read_after_the_close_raises_as_without_a_tail(
    events: int, runtime: Runtime, instrument: Instrument, serve: Serve
) -> None:
    """An application that reads from a stream it has closed gets the exception that it always got."""
    api = GatedAPI()
    server = serve(api)
    raised: list[tuple[type, ...]] = []

    async def main() -> None:
        api.gate.clear()
        client = client_of(runtime, server)
        stream = await settle(client.responses.create(**ASKED))
        await take(stream, events)
        await settle(stream.close())
        try:
            await take(stream, 1)
        except Exception as error:
            # Early releases hand on the library's own error, whose cause is the library's business.
            of_sdk = isinstance(error, openai.APIConnectionError)
            raised.append((type(error), type(error.__cause__)) if of_sdk else (type(error),))
        api.gate.set()
        await settle(client.close())

    runtime.drive(main)
    observed = instrument(tail_timeout=60)
    runtime.drive(main)
    observed.span()
    without_us, with_us = raised
    assert with_us == without_us


@both
def test_a_tail_that_breaks_off_is_looked_up(runtime: Runtime, instrument: Instrument, serve: Serve) -> None:
    """A connection that is lost in mid-tail costs the tail, not the usage."""
    observed = instrument(tail_timeout=60)
    api = GatedAPI(ANSWER, Cut())
    close_with_a_tail(runtime, observed, serve(api), api)
    assert told(observed.span()) == looked_up("closed")


def shut_down(observed: Observed) -> None:
    observed.tracer_provider.shutdown()


def uninstrument(_: Observed) -> None:
    ResponsesUsageInstrumentor().uninstrument()


EXITS_BY = pytest.mark.parametrize("leave", [uninstrument, shut_down])


@EXITS_BY
@runtimes
def test_an_exit_waits_for_a_tail_that_is_about_to_end(
    runtime: Runtime, leave: Callable[[Observed], None], instrument: Instrument, serve: Serve
) -> None:
    """The usage that arrives meanwhile is recorded, also if the wait blocks the event loop of the stream."""
    observed = instrument(tail_timeout=60, exit_timeout=10)
    api = GatedAPI()
    server = serve(api)

    async def main() -> None:
        client = client_of(runtime, server)
        await read_half_and_closed(client)
        assert observed.pending() == 1
        threading.Timer(0.05, api.gate.set).start()
        leave(observed)
        assert observed.finished == 1
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == TAILED
    assert observed.pending() == 0


@EXITS_BY
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, looked_up("closed")),
        ({"store": False}, {"outcome": "closed", "missing": "shutdown", "events": 6}),
    ],
    ids=["stored", "not stored"],
)
@both
def test_an_exit_cuts_off_a_tail_that_takes_longer(
    runtime: Runtime,
    asked: dict[str, Any],
    expected: dict[str, Any],
    leave: Callable[[Observed], None],
    instrument: Instrument,
    serve: Serve,
) -> None:
    """After half of the exit timeout the usage is looked up, or the reason is `shutdown`."""
    observed = instrument(tail_timeout=60, exit_timeout=1)
    api = GatedAPI()
    server = serve(api)

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await settle(client.responses.create(**ASKED, **asked))
        await take(stream)
        await settle(stream.close())
        leave(observed)
        assert observed.finished == 1
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == expected
    assert observed.pending() == 0
    assert open_tails() == 0


def test_a_loop_is_not_held_up_by_a_tail(
    instrument: Instrument, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """`asyncio.run` returns in mid-tail, without a complaint. The tail is read to its end."""
    observed = instrument(tail_timeout=60)
    api = GatedAPI()
    server = serve(api)

    async def main() -> None:
        stream = await read_half(client_of(ASYNCIO, server))
        await stream.close()

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 20
    assert observed.finished == 0
    api.gate.set()
    assert told(observed.span()) == TAILED
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def test_a_cancelled_stream_has_no_tail(instrument: Instrument, serve: Serve) -> None:
    """A tail is for streams that the application closes; a cancelled read has lost its connection."""
    observed = instrument(tail_timeout=60)
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(ASYNCIO, server)
        async with await read_half(client) as stream:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(take(stream), 0.1)
        await until(ASYNCIO, lambda: server.exchanges[0].client_left_at)
        await client.close()

    asyncio.run(main())
    assert server.exchanges[0].client_left_at is not None
    assert told(observed.span()) == looked_up("cancelled")


EXITS = """
read_half("open").close()


async def leave():
    await (await async_read_half("open, async")).close()


loop = asyncio.new_event_loop()
loop.run_until_complete(leave())
"""


def test_an_exit_in_mid_tail_loses_nothing(tmp_path: Path, serve: Serve) -> None:
    """A process that ends while streams are read on looks their usage up, and complains of nothing."""
    server = serve(NamedAPI(before_get=Pause(0.3)))
    ran = run(tmp_path, server, EXITS, OTEL_RESPONSES_USAGE_TAIL_TIMEOUT="60")
    closed = {"outcome": "closed", "source": "retrieval"}
    assert (ran.code, ran.complaints) == (0, "")
    assert ran.told() == {"open": closed, "open, async": closed}
    assert ran.total("openai_responses.calls", **{"openai_responses.usage.source": "retrieval"}) == 2
