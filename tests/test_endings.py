"""Streams that end untidily: dropped, closed elsewhere, left with their loop; and faults of our own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import enum
import gc
import itertools
import json
import logging
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import anyio
import openai
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import StatusCode

from calls import CUT as CUT_ERRORS
from calls import HTTP, entered, items, settle, since
from conftest import Instrument, Serve
from embedded.answer import Answer, new_id, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Send, Step, Wait, frame
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import PATIENCE_S, Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage import ResponsesUsageInstrumentor
from otel_responses_usage._lookup.worker import THREAD_NAME
from otel_responses_usage._surfaces import _target
from otel_responses_usage._surfaces._retrieve import HttpRetriever
from test_matrix import ASYNCIO, RUNTIMES, SYNC, TRIO, Runtime

ANSWER = Answer(
    pieces=tuple(f"piece {n} " for n in range(12)), usage=usage(31, 245, cached=16, reasoning=128)
)
ASKED: dict[str, Any] = {"model": "gpt-5.4-mini", "input": "x", "stream": True}
HALF = Plan(ANSWER, cut_after=6, end=Hold())
BOTH = (SYNC, ASYNCIO)

pytestmark = pytest.mark.usefixtures("quick_collections")

# What the interpreter says of things that are dropped half-used is the same without us.
untidy = pytest.mark.filterwarnings(
    "ignore:.*async_generator object:pytest.PytestUnraisableExceptionWarning",
    "ignore:multiple unraisable exception:pytest.PytestUnraisableExceptionWarning",
    "ignore:Async generator:ResourceWarning",
    "ignore:unclosed:ResourceWarning",
)
runtimes = pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
both = pytest.mark.parametrize("runtime", BOTH, ids=str)


def client_of(runtime: Runtime, server: ScriptedServer) -> Any:
    return runtime.client(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


async def take(stream: Any, events: int = 6) -> None:
    for _ in range(events):
        await settle(stream.__anext__() if hasattr(stream, "__anext__") else next(stream))


def told(span: ReadableSpan) -> dict[str, Any]:
    """How a call ended, in the words of its span."""
    attributes = span.attributes or {}
    names = {
        "outcome": "openai_responses.stream.outcome",
        "error": "error.type",
        "source": "openai_responses.usage.source",
        "missing": "openai_responses.usage.missing_reason",
        "events": "openai_responses.stream.events",
    }
    return {short: attributes[name] for short, name in names.items() if name in attributes}


def looked_up(outcome: str, error: str | None = None, events: int = 6) -> dict[str, Any]:
    """What is told of a call that ended so, and whose usage was found by the look-up."""
    known = {"outcome": outcome, "source": "retrieval", "events": events}
    return known | {"error": error} if error else known


# Dropped


async def read_half(client: Any) -> Any:
    stream = await settle(client.responses.create(**ASKED))
    await take(stream)
    return stream


async def read_not_at_all(client: Any) -> Any:
    return await settle(client.responses.create(**ASKED))


async def entered_and_forgotten(client: Any) -> Any:
    manager = client.responses.stream(model="m", input="x")
    stream = await settle(manager.__aenter__() if hasattr(manager, "__aenter__") else manager.__enter__())
    await take(stream)
    return stream


async def left_raw(client: Any) -> Any:
    return await settle(client.responses.with_raw_response.create(**ASKED))


async def parsed_from_raw(client: Any) -> Any:
    stream = (await left_raw(client)).parse()
    await take(stream)
    return stream


def elsewhere(act: Callable[[], object]) -> None:
    """Do something on another thread, and wait for it."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


@contextlib.contextmanager
def collected_only_by_hand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


FOUND = {"outcome": "abandoned", "error": "stream_abandoned", "source": "retrieval", "events": 6}
UNREAD = {"outcome": "abandoned", "error": "stream_abandoned", "missing": "no_response_id", "events": 0}


@pytest.mark.parametrize("collect", [gc.collect, lambda: elsewhere(gc.collect)], ids=["here", "elsewhere"])
@pytest.mark.parametrize(
    ("leave", "expected"),
    [
        (read_half, FOUND),
        (entered_and_forgotten, FOUND),
        (parsed_from_raw, FOUND),
        (read_not_at_all, UNREAD),
        (left_raw, UNREAD),
    ],
    ids=["half read", "manager", "parsed from raw", "not read", "raw"],
)
@runtimes
@untidy
def test_a_dropped_stream_is_told_when_it_is_collected(
    runtime: Runtime,
    leave: Callable[[Any], Awaitable[Any]],
    expected: dict[str, Any],
    collect: Callable[[], object],
    observed: Observed,
    serve: Serve,
) -> None:
    """A stream dropped without a close ends as `abandoned`, whoever collects it, and is looked up."""
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(runtime, server)
        with collected_only_by_hand():
            await leave(client)
            assert observed.finished == 0
            collect()
            observed.span()
        await settle(client.close())

    runtime.drive(main)
    span = observed.span()
    assert told(span) == expected
    assert span.status.status_code is StatusCode.ERROR
    assert token_attributes(span) == (usage_attributes(ANSWER.usage) if "source" in expected else {})


def all_at_once(request: SeenRequest) -> Reply:
    """A server that sends the whole answer in one piece, and does not keep it."""
    if request.method != "POST":
        return error(404, "not found")
    return Reply.sse([b"".join(map(frame, ANSWER.events()))])


def drop(held: list[Any]) -> None:
    held.clear()
    gc.collect()


def uninstrument(_: list[Any]) -> None:
    ResponsesUsageInstrumentor().uninstrument()


@pytest.mark.parametrize("leave", [drop, uninstrument], ids=["dropped", "uninstrumented"])
@both
@untidy
def test_a_terminal_event_that_lies_before_its_reader_counts(
    runtime: Runtime, leave: Callable[[list[Any]], None], observed: Observed, serve: Serve
) -> None:
    """It came in one piece with events that have been read: so the usage is known, though nobody reads on."""
    server = serve(all_at_once)

    async def main() -> None:
        client = client_of(runtime, server)
        with collected_only_by_hand():
            held = [await read_half(client)]
            assert observed.finished == 0
            leave(held)
            observed.span()
            held.clear()
        await settle(client.close())

    runtime.drive(main)
    gc.collect()
    assert told(observed.span()) == {
        "outcome": "completed",
        "source": "stream",
        "events": len(ANSWER.events()),
    }
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


async def read_half_and_closed(client: Any) -> None:
    await settle((await read_half(client)).close())


@pytest.mark.parametrize("leave", [read_half, read_half_and_closed], ids=["dropped", "closed"])
@both
@untidy
def test_a_dropped_client_is_finalized_as_ever(
    runtime: Runtime, leave: Callable[[Any], Awaitable[Any]], observed: Observed, serve: Serve
) -> None:
    """A client that is dropped with its stream closes its connections then and there, on that thread."""
    server = serve(ResponsesAPI(lambda _: replace(HALF, fate="stuck")))
    threads: list[str] = []
    base = openai.DefaultHttpxClient if runtime is SYNC else openai.DefaultAsyncHttpxClient

    class Noting(base):  # type: ignore[misc, valid-type]
        def __del__(self) -> None:
            threads.append(threading.current_thread().name)

    async def main() -> None:
        with collected_only_by_hand():
            await leave(
                runtime.client(base_url=f"{server.url}/v1", api_key="k", max_retries=0, http_client=Noting())
            )
            gc.collect()
            assert observed.finished == 0
            assert threads == [threading.current_thread().name]

    runtime.drive(main)
    gc.collect()  # the connection that nobody has closed is of this test


class CollectingExporter(SpanExporter):
    """An exporter in which the collector runs at the worst moment: while it holds its lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.names: list[str] = []
        self.deadlocks = 0

    def export(self, spans: Any) -> Any:
        if not self._lock.acquire(timeout=5):
            self.deadlocks += 1
            return
        self.names += [span.name for span in spans]
        gc.collect()
        self._lock.release()


def test_a_collector_may_interrupt_an_exporter(observed: Observed, serve: Serve) -> None:
    """A stream that is collected inside of an exporter is not exported from there, but a moment later."""
    exporter = CollectingExporter()
    observed.tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))
    with client_of(SYNC, serve(ResponsesAPI(lambda _: HALF))) as client, collected_only_by_hand():
        SYNC.drive(lambda: read_not_at_all(client))  # nothing to look up: its span can end at once
        observed.tracer_provider.get_tracer("application").start_span("own").end()
        observed.spans(2)
        eventually(lambda: len(exporter.names) == 2, "both spans exported")
    assert (exporter.names[0], exporter.deadlocks) == ("own", 0)


@untidy
def test_a_call_whose_loop_is_gone_ends_on_another_thread(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    """Its coroutine is closed by the collector: in another context, and perhaps inside of an exporter."""
    exporter = CollectingExporter()
    observed.tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def never(_: Any) -> Any:
        # Not the library's own transport: what waits in there is never collected, with us or without.
        await asyncio.get_running_loop().create_future()

    def call_and_leave() -> None:
        loop = asyncio.new_event_loop()
        transport = HTTP.AsyncClient(transport=HTTP.MockTransport(never))
        client = openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="k", http_client=transport)
        tasks: list[Any] = []

        async def main() -> None:
            tasks.append(asyncio.ensure_future(read_not_at_all(client)))
            await asyncio.sleep(0.2)

        loop.run_until_complete(main())
        loop.close()

    with collected_only_by_hand():
        call_and_leave()
        observed.tracer_provider.get_tracer("application").start_span("own").end()
        observed.spans(2)
        eventually(lambda: len(exporter.names) == 2, "both spans exported")
    assert (exporter.names[0], exporter.deadlocks) == ("own", 0)
    (span,) = (span for span in observed.spans(2) if span.name != "own")
    assert told(span) == UNREAD
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


@both
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_streaming_response_that_is_never_entered_is_no_call(
    runtime: Runtime, observed: Observed, serve: Serve
) -> None:
    """`with_streaming_response` sends its request when it is entered; before that nothing has happened."""
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(runtime, server)
        client.responses.with_streaming_response.create(**ASKED)
        gc.collect()
        await settle(client.close())

    runtime.drive(main)
    assert (observed.finished, server.requests) == (0, [])


# Elsewhere


def test_a_stream_read_on_another_thread_is_metered(observed: Observed, serve: Serve) -> None:
    """It does not matter which thread reads a stream, nor whether it is always the same."""
    with client_of(SYNC, serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
        stream = client.responses.create(**ASKED)
        seen = [next(stream)]
        elsewhere(lambda: seen.append(next(stream)))
        elsewhere(lambda: seen.extend(stream))
    assert told(observed.span()) == {"outcome": "completed", "source": "stream", "events": len(seen)}
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


async def pause(runtime: Runtime) -> None:
    if runtime is SYNC:
        threading.Event().wait(0.05)
    else:
        await anyio.sleep(0.05)


def begin(runtime: Runtime, act: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Do something on another thread or in another task, and return how to wait for it."""
    if runtime is not SYNC:
        task = asyncio.ensure_future(act())
        return lambda: task
    thread = threading.Thread(target=runtime.drive, args=(act,))
    thread.start()

    async def join() -> None:
        thread.join()

    return join


@both
def test_a_stream_closed_elsewhere_while_it_is_read_is_closed(
    runtime: Runtime, observed: Observed, serve: Serve
) -> None:
    """The read that a close has broken raises, but the call was closed and not cut."""
    gate = threading.Event()
    server = serve(ResponsesAPI(lambda _: replace(HALF, end=Wait(gate))))
    has_read = threading.Event()

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await settle(client.responses.create(**ASKED))

        async def read() -> None:
            await take(stream)
            has_read.set()
            with pytest.raises(CUT_ERRORS):
                await take(stream, 1)

        finished = begin(runtime, read)
        while not has_read.is_set():
            await pause(runtime)
        await pause(runtime)
        await settle(stream.close())
        gate.set()  # a blocked thread is not woken by a close; it notices when something arrives
        await finished()
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == looked_up("closed")


# Left with their loop


def run_to_its_end(runtime: Runtime, main: Callable[[], Awaitable[None]]) -> None:
    runtime.drive(main)


def run_and_close(_: Runtime, main: Callable[[], Awaitable[None]]) -> None:
    """Without the care for generators that `asyncio.run` takes."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()


@pytest.mark.parametrize(
    ("runtime", "run"),
    [(ASYNCIO, run_to_its_end), (TRIO, run_to_its_end), (ASYNCIO, run_and_close)],
    ids=["asyncio.run", "trio.run", "loop.close"],
)
@untidy
def test_a_stream_that_outlives_its_loop_is_abandoned(
    runtime: Runtime,
    run: Callable[[Runtime, Callable[[], Awaitable[None]]], None],
    observed: Observed,
    serve: Serve,
) -> None:
    """A stream kept while its loop ends is told when the loop or the collector drops it."""
    server = serve(ResponsesAPI(lambda _: HALF))
    kept: list[Any] = []

    async def main() -> None:
        kept.append(await read_half(client_of(runtime, server)))

    run(runtime, main)
    kept.clear()
    gc.collect()
    assert told(observed.span()) == FOUND
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


# Cancelled

Reading = Callable[[], Awaitable[None]]


async def wait_for(read: Reading) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), 0.1)


async def timeout(read: Reading) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.1):  # type: ignore[attr-defined]
            await read()


async def task_cancel(read: Reading) -> None:
    task = asyncio.ensure_future(read())
    await asyncio.sleep(0.1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def move_on_after(read: Reading) -> None:
    with anyio.move_on_after(0.1):
        await read()


async def scope_cancel(read: Reading) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.sleep(0.1)
        group.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("runtime", "cancel"),
    [
        (ASYNCIO, wait_for),
        pytest.param(
            *(ASYNCIO, timeout),
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="`asyncio.timeout` is of 3.11"),
        ),
        (ASYNCIO, task_cancel),
        (ASYNCIO, move_on_after),
        (ASYNCIO, scope_cancel),
        (TRIO, move_on_after),
        (TRIO, scope_cancel),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("between_reads", [False, True], ids=["reading", "between reads"])
@untidy
def test_a_stream_whose_reader_is_cancelled_is_cancelled(
    between_reads: bool,
    runtime: Runtime,
    cancel: Callable[[Reading], Awaitable[None]],
    observed: Observed,
    serve: Serve,
) -> None:
    """Whatever cancels the reading task, in a read or between reads: the call is `cancelled`, no error."""
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await read_half(client)

        async def read() -> None:
            async with stream:
                await (anyio.sleep(60) if between_reads else take(stream))

        await cancel(read)
        await client.close()

    runtime.drive(main)
    assert told(observed.span()) == looked_up("cancelled")
    assert observed.span().status.status_code is StatusCode.UNSET
    durations = observed.points("gen_ai.client.operation.duration")
    assert all("error.type" not in point.attributes for point in durations)


def with_for(client: Any) -> Iterator[Any]:
    with client.responses.create(**ASKED) as stream:
        for event in stream:  # noqa: UP028  # what most applications write
            yield event


def with_yield_from(client: Any) -> Iterator[Any]:
    with client.responses.create(**ASKED) as stream:
        yield from stream


def managed(client: Any) -> Iterator[Any]:
    with client.responses.stream(model="m", input="x") as stream:
        yield from stream


async def async_with_for(client: Any) -> Any:
    async with await client.responses.create(**ASKED) as stream:
        async for event in stream:
            yield event


async def async_managed(client: Any) -> Any:
    async with client.responses.stream(model="m", input="x") as stream:
        async for event in stream:
            yield event


@pytest.mark.parametrize(
    ("runtime", "body"),
    [
        (SYNC, with_for),
        (SYNC, with_yield_from),
        (SYNC, managed),
        (ASYNCIO, async_with_for),
        (ASYNCIO, async_managed),
        (TRIO, async_with_for),
        (TRIO, async_managed),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@untidy
def test_a_generator_around_a_stream_that_is_closed_closes_it(
    runtime: Runtime, body: Callable[[Any], Any], observed: Observed, serve: Serve
) -> None:
    """A web server that closes its body because the browser has gone is an application that closes."""
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(runtime, server)
        pieces = body(client)
        await take(pieces)
        await settle(pieces.close() if runtime is SYNC else pieces.aclose())
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == looked_up("closed")


@pytest.mark.parametrize("method", ["iter_bytes", "iter_text", "iter_lines"])
@both
@untidy
def test_a_body_that_is_left_half_read_is_closed(
    method: str, runtime: Runtime, observed: Observed, serve: Serve
) -> None:
    """Who leaves the loop over a body, and then its `with` block, has closed it."""
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(runtime, server)
        async with entered(client.responses.with_streaming_response.create(**ASKED)) as response:
            # No generator of the test's own: the loop is to let go of the SDK's.
            pieces = getattr(response, method)()
            if runtime is SYNC:
                for _ in pieces:
                    break
            else:
                async for _ in pieces:
                    break
            del pieces
        await settle(client.close())

    runtime.drive(main)
    span = observed.span()
    assert told(span) == looked_up("closed", events=(span.attributes or {})["openai_responses.stream.events"])  # type: ignore[arg-type]
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("error", [KeyError, concurrent.futures.CancelledError])
@runtimes
def test_an_exception_of_the_application_s_own_closes_its_stream(
    error: type[Exception], runtime: Runtime, observed: Observed, serve: Serve
) -> None:
    """Whatever it is called, what is raised in the body of a loop is the application's."""
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(runtime, server)
        with contextlib.suppress(error):
            async with entered(await settle(client.responses.create(**ASKED))) as stream:
                await take(stream)
                raise error
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == looked_up("closed")


# Documents


DOCUMENT = json.dumps(ANSWER.response()).encode()
LARGE = json.dumps({**ANSWER.response(), "extra": "A" * 17 * 2**20}).encode()


def in_pieces(document: bytes, *then: Step, length: int | None = None) -> Callable[[SeenRequest], Reply]:
    """A server that answers calls with a document, or a part of it, and keeps the whole."""
    headers = {"content-type": "application/json", "content-length": str(length or len(document))}
    pieces = (document[at : at + 65_536] for at in range(0, len(document), 65_536))
    answered = Reply(200, headers, (*map(Send, pieces), *then), chunked=False)
    return lambda request: answered if request.method == "POST" else Reply.json(ANSWER.response())


async def read_document(response: Any) -> None:
    with contextlib.suppress(*CUT_ERRORS):
        async for _ in items(response.iter_bytes()):
            pass


async def read_piece(response: Any) -> None:
    pieces = response.iter_bytes()
    await settle(pieces.__anext__() if hasattr(pieces, "__anext__") else next(pieces))


@pytest.mark.parametrize(
    ("handler", "read", "expected"),
    [
        (in_pieces(DOCUMENT), read_document, {"outcome": "completed", "source": "response"}),
        (in_pieces(LARGE), read_document, {"outcome": "completed", "source": "retrieval"}),
        (
            in_pieces(b'{"extra": "' + b"A" * 17 * 2**20 + b'"}'),
            read_document,
            {"outcome": "completed", "missing": "no_response_id"},
        ),
        (
            in_pieces(DOCUMENT[:200], Cut(), length=len(DOCUMENT)),
            read_document,
            {"outcome": "cut", "error": "RemoteProtocolError", "source": "retrieval"},
        ),
        (
            in_pieces(DOCUMENT[:200]),
            read_document,
            {"outcome": "truncated", "error": "stream_truncated", "source": "retrieval"},
        ),
        (
            in_pieces(DOCUMENT[:200], Hold(), length=len(DOCUMENT)),
            read_piece,
            {"outcome": "closed", "source": "retrieval"},
        ),
        (
            in_pieces(b'{"error": {"id": "resp_x"'),
            read_document,
            {"outcome": "truncated", "error": "stream_truncated", "missing": "no_response_id"},
        ),
    ],
    ids=["whole", "large", "large without id", "cut", "truncated", "closed", "no id"],
)
@both
@untidy
def test_a_document_that_does_not_come_whole_is_looked_up(
    handler: Callable[[SeenRequest], Reply],
    read: Callable[[Any], Awaitable[None]],
    expected: dict[str, Any],
    runtime: Runtime,
    observed: Observed,
    serve: Serve,
) -> None:
    """An answer that is not streamed says its id first: with that its usage can be asked for."""
    server = serve(handler)

    async def main() -> None:
        client = client_of(runtime, server)
        asked = {"model": "gpt-5.4-mini", "input": "x"}
        async with entered(client.responses.with_streaming_response.create(**asked)) as response:
            await read(response)
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == expected
    assert token_attributes(observed.span()) == (
        usage_attributes(ANSWER.usage) if "source" in expected else {}
    )


# Clients


async def then_read(stream: Any) -> None:
    with pytest.raises(CUT_ERRORS):
        await take(stream)


async def then_close(stream: Any) -> None:
    await settle(stream.close())


async def then_drop(stream: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (then_read, looked_up("cut", "ReadError")),
        (then_close, looked_up("closed")),
        (then_drop, FOUND),
    ],
    ids=["read", "closed", "dropped"],
)
@both
@untidy
def test_a_client_may_be_closed_before_its_stream(
    runtime: Runtime,
    end: Callable[[Any], Awaitable[None]],
    expected: dict[str, Any],
    observed: Observed,
    serve: Serve,
) -> None:
    """A stream whose client has gone ends as it is left, and is looked up without the client."""
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await read_half(client)
        await settle(client.close())
        await end(stream)
        del stream
        gc.collect()

    runtime.drive(main)
    assert told(observed.span()) == expected
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


@runtimes
def test_streams_that_are_read_in_turns_are_told_apart(
    runtime: Runtime, observed: Observed, serve: Serve, api: Callable[..., ResponsesAPI]
) -> None:
    """Two streams on one client, read in turns, have each its own counts."""
    answers = {12: Answer(ANSWER.pieces, usage(31, 245)), 3: Answer(ANSWER.pieces[:3], usage(5, 6))}
    server = serve(api(*(Plan(answer) for answer in answers.values())))

    async def main() -> None:
        client = client_of(runtime, server)
        first = items(await settle(client.responses.create(**ASKED)))
        second = items(await settle(client.responses.create(**ASKED)))
        async for _ in first:
            await anext(second, None)
        await settle(client.close())

    runtime.drive(main)
    for span in observed.spans(2):
        attributes = span.attributes or {}
        answer = answers[attributes["openai_responses.stream.deltas"]]  # type: ignore[index]
        assert attributes["gen_ai.response.id"] == answer.id
        assert told(span) == {"outcome": "completed", "source": "stream", "events": len(answer.events())}
        assert token_attributes(span) == usage_attributes(answer.usage or {})


# Bodies


*BEFORE, LAST = ANSWER.events()
LATE = Answer(ANSWER.pieces[:1], usage(1, 1), id=ANSWER.id).events()[-2:]
DONE = b"data: [DONE]\n\n"
STOPS_AT_DONE = since(2, 7, 0)  # before, the SDK read on to the end of the body


@pytest.mark.parametrize(
    ("ending", "end", "expected"),
    [
        ([LAST, *LATE], None, {"outcome": "completed", "source": "stream"}),
        ([LAST, DONE], None, {"outcome": "completed", "source": "stream"}),
        pytest.param([LAST, DONE], Hold(), {"outcome": "completed", "source": "stream"}, marks=STOPS_AT_DONE),
        ([DONE], None, {"outcome": "truncated", "error": "stream_truncated", "source": "retrieval"}),
        pytest.param(
            [DONE],
            Hold(),
            {"outcome": "truncated", "error": "stream_truncated", "source": "retrieval"},
            marks=STOPS_AT_DONE,
        ),
    ],
    ids=["terminal, more", "terminal, done", "terminal, done, silence", "done", "done, silence"],
)
@pytest.mark.parametrize("in_one_piece", [True, False], ids=["one piece", "pieces"])
@both
def test_what_follows_the_last_event_is_not_part_of_the_call(
    runtime: Runtime,
    in_one_piece: bool,
    end: Hold | None,
    ending: list[Any],
    expected: dict[str, Any],
    observed: Observed,
    serve: Serve,
) -> None:
    """The terminal event, else `[DONE]`, is the end, whatever a server sends or does after it."""
    pieces = [event if isinstance(event, bytes) else frame(event) for event in (*BEFORE, *ending)]
    if in_one_piece:
        pieces = [b"".join(pieces)]

    def api(request: SeenRequest) -> Reply:
        return Reply.sse(pieces, end=end) if request.method == "POST" else Reply.json(ANSWER.response())

    server = serve(api)
    seen: list[Any] = []

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await settle(client.responses.create(**ASKED))
        seen.extend([event.type async for event in items(stream)])
        await settle(client.close())

    runtime.drive(main)
    assert seen == [event["type"] for event in (*BEFORE, *ending) if event != DONE]
    assert told(observed.span()) == expected | {"events": len(BEFORE) + (LAST in ending)}
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            Reply.sse([]),
            {
                "outcome": "truncated",
                "error": "stream_truncated",
                "missing": "no_response_id",
                "events": 0,
            },
        ),
        (Reply.json(ANSWER.response()), {"outcome": "completed", "source": "response", "events": 0}),
        (
            Reply.json({"error": {"code": "overloaded", "message": "no"}}),
            {"outcome": "error", "error": "overloaded", "missing": "no_response_id", "events": 0},
        ),
    ],
    ids=["nothing", "response", "error"],
)
@both
def test_a_stream_without_events_is_told_by_its_body(
    runtime: Runtime, reply: Reply, expected: dict[str, Any], observed: Observed, serve: Serve
) -> None:
    """A stream that turns out to be empty, or a document, ends the SDK's loop at once; the span says why."""
    server = serve(lambda _: reply)
    seen: list[Any] = []

    async def main() -> None:
        client = client_of(runtime, server)
        stream = await settle(client.responses.create(**ASKED))
        seen.extend([event async for event in items(stream)])
        await settle(client.close())

    runtime.drive(main)
    assert seen == []
    assert told(observed.span()) == expected
    assert token_attributes(observed.span()) == (
        usage_attributes(ANSWER.usage) if "source" in expected else {}
    )


def encoded(reply: Reply, wbits: int) -> Reply:
    """The same reply as a compressing proxy sends it: each event at once, in the same stream of bits."""
    compressor = zlib.compressobj(wbits=wbits)
    steps = [
        Send(compressor.compress(step.data) + compressor.flush(zlib.Z_SYNC_FLUSH))
        if isinstance(step, Send)
        else step
        for step in reply.steps
    ]
    coding = "gzip" if wbits > zlib.MAX_WBITS else "deflate"
    return replace(reply, headers={**reply.headers, "content-encoding": coding}, steps=tuple(steps))


@pytest.mark.parametrize("wbits", [zlib.MAX_WBITS + 16, zlib.MAX_WBITS], ids=["gzip", "deflate"])
@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan(ANSWER), {"outcome": "completed", "source": "stream", "events": len(ANSWER.events())}),
        (HALF, looked_up("closed")),
        (replace(HALF, end=Cut()), looked_up("cut", "RemoteProtocolError")),
    ],
    ids=["drained", "closed", "cut"],
)
@both
def test_a_compressed_stream_is_metered_the_same(
    runtime: Runtime, plan: Plan, expected: dict[str, Any], wbits: int, observed: Observed, serve: Serve
) -> None:
    """`content-encoding` changes neither the counts nor what the application reads."""
    api = ResponsesAPI(lambda _: plan)
    server = serve(lambda request: encoded(api(request), wbits) if request.method == "POST" else api(request))

    async def main() -> None:
        client = client_of(runtime, server)
        async with entered(await settle(client.responses.create(**ASKED))) as stream:
            await take(stream)
            if expected["outcome"] != "closed":
                with contextlib.suppress(*CUT_ERRORS):
                    async for _ in items(stream):
                        pass
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == expected
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


# Nothing left behind


async def wander(runtime: Runtime, server: ScriptedServer) -> Any:
    """End streams in every way at hand, and return the client."""
    client = client_of(runtime, server)
    # A collection that finds a dropped stream while httpcore 1 makes a request waits for ever for the lock
    # that this request holds; it does so without us, too.
    with collected_only_by_hand():
        for leave in (read_half, read_not_at_all, entered_and_forgotten, left_raw):
            await leave(client)
        await read_half_and_closed(client)
        async with entered(client.responses.stream(model="m", input="x")) as stream:
            await take(stream)
        if runtime is not SYNC:
            with anyio.move_on_after(0.1):
                async for _ in await client.responses.create(**ASKED):
                    pass
            await anyio.sleep(0.05)
    gc.collect()
    return client


def ours() -> list[Any]:
    """The instances of our classes, but for the members of enums: these live as long as their class."""
    gc.collect()
    package = "otel_responses_usage"
    return [
        thing
        for thing in gc.get_objects()
        if str(type(thing).__module__).startswith(package) and not isinstance(thing, enum.Enum)
    ]


def kept(before: list[Any]) -> set[str]:
    """The classes of ours that have instances, besides those that earlier tests have left."""
    earlier = {id(thing) for thing in before}
    return {type(thing).__name__ for thing in ours() if id(thing) not in earlier}


@runtimes
@untidy
def test_nothing_is_left_behind(
    runtime: Runtime, instrument: Instrument, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Ended streams leave what they leave without us: no thread, task, socket or object of ours is kept."""
    caplog.set_level(logging.CRITICAL + 1, "trio")  # its records would keep frames, and what is in them
    server = serve(ResponsesAPI(lambda _: HALF))
    instances = ours()
    before = set(threading.enumerate())
    connections: list[int] = []
    threads: list[set[str]] = []
    tasks: list[Any] = []

    def started() -> set[str]:
        return {thread.name for thread in set(threading.enumerate()) - before}

    async def main() -> None:
        client = await wander(runtime, server)
        if observed is not None:
            observed.spans(7 if runtime is not SYNC else 6)
            threads.append(started())
            ResponsesUsageInstrumentor().uninstrument()
        threads.append(started())
        if runtime is ASYNCIO:
            tasks.append(asyncio.all_tasks() - {asyncio.current_task()})
        await pause(runtime)
        without_us = connections[0] if connections else server.open_connections
        deadline = time.monotonic() + PATIENCE_S
        while server.open_connections > without_us and time.monotonic() < deadline:
            await pause(runtime)
        connections.append(server.open_connections)
        await settle(client.close())

    observed = None
    runtime.drive(main)
    eventually(lambda: server.open_connections == 0, "no connection left without us")
    observed = instrument()
    runtime.drive(main)
    eventually(lambda: server.open_connections == 0, "no connection left")
    without_us, with_us = connections
    assert with_us <= without_us
    own, while_on, once_off = threads  # asyncio and trio have some for the names of hosts
    assert while_on == own | {THREAD_NAME}
    assert once_off == own
    assert not any(tasks)
    for_good = {"ResponsesUsageInstrumentor", "Server"}  # servers are remembered, a few
    eventually(lambda: kept(instances) <= for_good, "all forgotten but what is for good")
    assert gc.garbage == []


@runtimes
@untidy
def test_calls_that_are_over_are_forgotten(
    runtime: Runtime, observed: Observed, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Once a span has ended and its connection is closed, nothing of the call is kept, least of all a key."""
    caplog.set_level(logging.CRITICAL + 1, "trio")
    instances = ours()
    server = serve(ResponsesAPI(lambda _: HALF))

    async def main() -> None:
        client = await wander(runtime, server)
        await settle(client.close())

    runtime.drive(main)
    observed.spans(7 if runtime is not SYNC else 6)
    eventually(lambda: not kept(instances) & {"Invocation", "Job", "Target"}, "no call kept")


@both
def test_the_memory_of_a_stream_does_not_grow(runtime: Runtime, observed: Observed, serve: Serve) -> None:
    """An open stream of a hundred thousand events holds no more than one of ten thousand."""
    delta = frame({"type": "response.output_text.delta", "delta": "some text ", "sequence_number": 7})
    block, blocks = Send(delta * 50), 2000
    first, last = (Send(frame(event)) for event in (ANSWER.events()[0], ANSWER.events()[-1]))
    reply = Reply(steps=(first, *((block,) * blocks), last))
    server = serve(lambda _: reply)
    held: list[int] = []

    async def main() -> None:
        client = client_of(runtime, server)
        async with entered(client.responses.with_streaming_response.create(**ASKED)) as response:
            read, total = 0, len(block.data) * blocks
            async for piece in items(response.iter_bytes()):
                read += len(piece)
                if read > total * (0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 2)[len(held)]:
                    gc.collect()
                    held.append(tracemalloc.get_traced_memory()[0])
        await settle(client.close())

    tracemalloc.start()
    try:
        runtime.drive(main)
    finally:
        tracemalloc.stop()
    assert told(observed.span())["events"] == 2 + 50 * blocks
    early, *late = held
    # What is on its way between server and client comes and goes; 8 bytes for an event would be 320,000.
    assert min(late) - early < 200_000


# Faults of our own


class BrokenError(Exception):
    """What a broken part of the application's telemetry raises."""


class Broken(SpanProcessor, SpanExporter):
    """A span processor or an exporter that raises wherever it is told to."""

    def __init__(self, where: str) -> None:
        setattr(self, where, self._break)

    def _break(self, *_: object, **__: object) -> Any:
        raise BrokenError

    def export(self, spans: Any) -> Any:  # noqa: ARG002  # the interface's signature
        return None

    def shutdown(self) -> None:
        pass


def faults(observed: Observed) -> int:
    return sum(point.value for point in observed.points("openai_responses.faults"))


async def read_all(client: Any) -> list[str]:
    """What the application sees of one stream: its events, and the exception that ended it."""
    seen = []
    try:
        async for event in items(await settle(client.responses.create(**ASKED))):
            seen.append(event.type)  # noqa: PERF401  # what was read before an exception counts
    except CUT_ERRORS:
        seen.append("cut")
    return seen


CUT = Plan(ANSWER, cut_after=6, end=Cut())
CUT_SEEN = [*(event["type"] for event in ANSWER.events()[:6]), "cut"]
ALL_SEEN = [event["type"] for event in ANSWER.events()]


def read_cut_and_whole(runtime: Runtime, serve: Serve, api: Callable[..., ResponsesAPI]) -> None:
    """Make a call that is cut and one that is not, and see that the application gets all there is."""
    server = serve(api(CUT, Plan(replace(ANSWER, id="resp_whole"))))

    async def main() -> None:
        client = client_of(runtime, server)
        assert await read_all(client) == CUT_SEEN
        assert await read_all(client) == ALL_SEEN
        await settle(client.close())

    runtime.drive(main)


@pytest.mark.parametrize(
    ("where", "as_exporter", "faults_per_call", "calls_counted"),
    [("on_start", False, 1, 0), ("on_end", False, 1, 2), ("export", True, 0, 2)],
    ids=["on_start", "on_end", "export"],
)
@both
def test_a_broken_processor_harms_no_stream(
    runtime: Runtime,
    where: str,
    as_exporter: bool,
    faults_per_call: int,
    calls_counted: int,
    observed: Observed,
    serve: Serve,
    api: Callable[..., ResponsesAPI],
) -> None:
    """Where the application's span processor or exporter raises, calls and tokens are as ever, or counted."""
    broken = Broken(where)
    observed.tracer_provider.add_span_processor(SimpleSpanProcessor(broken) if as_exporter else broken)
    read_cut_and_whole(runtime, serve, api)
    eventually(lambda: sum(observed.calls().values()) == calls_counted, "both calls counted")
    assert observed.pending() == 0
    eventually(lambda: faults(observed) == 2 * faults_per_call, "all faults counted")
    known = {"input": (2, 2 * 31), "output": (2, 2 * 245)}
    assert observed.tokens() == (known if calls_counted else {})


class BrokenReservoir:
    """An exemplar reservoir, as a view may name one, that raises."""

    def __init__(self, **_: object) -> None:
        pass

    def offer(self, *_: object) -> None:
        raise BrokenError

    def collect(self, *_: object) -> list[Any]:
        return []


@pytest.mark.parametrize(
    "instrument_name",
    [
        "gen_ai.client.token.usage",
        "gen_ai.client.operation.duration",
        "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.client.operation.time_per_output_chunk",
        "openai_responses.calls",
        "openai_responses.retrieval.duration",
        "openai_responses.pending",
    ],
)
@both
def test_a_broken_instrument_harms_no_stream(
    runtime: Runtime,
    instrument_name: str,
    instrument: Instrument,
    serve: Serve,
    api: Callable[..., ResponsesAPI],
) -> None:
    """Where recording a point raises, the application and the spans are as ever, and the loss is counted."""
    observed = Observed()
    view = View(instrument_name=instrument_name, exemplar_reservoir_factory=lambda _: BrokenReservoir)
    observed._metrics = InMemoryMetricReader()
    observed.meter_provider = MeterProvider([observed._metrics], views=[view], shutdown_on_exit=False)
    instrument(observed)
    read_cut_and_whole(runtime, serve, api)
    cut, whole = sorted(observed.spans(2), key=lambda span: told(span)["outcome"] == "completed")
    assert told(cut) == looked_up("cut", "RemoteProtocolError")
    assert told(whole) == {"outcome": "completed", "source": "stream", "events": len(ALL_SEEN)}
    assert [token_attributes(span) for span in (cut, whole)] == [usage_attributes(ANSWER.usage)] * 2
    assert faults(observed) > 0


@both
def test_a_full_queue_harms_no_stream(runtime: Runtime, instrument: Instrument, serve: Serve) -> None:
    """A call beyond the queue is counted as `overload`; those before and after it are looked up."""
    gate = threading.Event()
    observed = instrument(max_pending=1)
    api = ResponsesAPI(lambda _: replace(CUT, answer=replace(ANSWER, id=new_id())))

    def slowly(request: SeenRequest) -> Reply:
        reply = api(request)
        return replace(reply, before=(Wait(gate),)) if request.method == "GET" else reply

    server = serve(slowly)

    async def main() -> None:
        client = client_of(runtime, server)
        for done in (0, 1):
            assert await read_all(client) == CUT_SEEN
            assert observed.finished == done
        gate.set()
        observed.spans(2)
        assert await read_all(client) == CUT_SEEN
        await settle(client.close())

    runtime.drive(main)
    observed.spans(3)
    assert observed.calls() == {"retrieval": 2, "overload": 1}
    assert observed.tokens() == {"input": (2, 2 * 31), "output": (2, 2 * 245)}


class Mortal:
    """Makes the requests of look-ups, but for the first ones: each of these ends the thread it runs on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, in_hand: int) -> None:
        self.left = in_hand
        get = HttpRetriever.get

        def get_or_die(retriever: HttpRetriever, *args: Any) -> Any:
            if not self.left:
                return get(retriever, *args)
            self.left -= 1
            raise SystemExit

        monkeypatch.setattr(HttpRetriever, "get", get_or_die)


@both
def test_a_dead_worker_is_replaced(
    runtime: Runtime, observed: Observed, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dying worker had in hand is counted as lost; calls after it are looked up by another."""
    Mortal(monkeypatch, in_hand=1)
    server = serve(ResponsesAPI(lambda _: replace(CUT, answer=replace(ANSWER, id=new_id()))))

    async def main() -> None:
        client = client_of(runtime, server)
        for done in (1, 2):
            assert await read_all(client) == CUT_SEEN
            observed.spans(done)
        await settle(client.close())

    runtime.drive(main)
    lost, found = sorted(observed.spans(2), key=lambda span: "source" in told(span))
    assert "missing" in told(lost)
    assert told(found) == looked_up("cut", "RemoteProtocolError")
    assert sum(observed.calls().values()) == 2
    assert observed.pending() == 0
    gc.collect()  # whatever the worker left half-done would complain


@contextlib.contextmanager
def no_file_descriptor_left() -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("leave", ["close", "drop"])
@untidy
def test_a_process_without_file_descriptors_loses_one_look_up(
    leave: str, observed: Observed, serve: Serve
) -> None:
    """Where no connection can be made, the call says so; the next one is looked up as ever."""
    with client_of(SYNC, serve(ResponsesAPI(lambda _: HALF))) as client:
        for done in (1, 2):
            streams = [client.responses.create(**ASKED)]
            list(itertools.islice(streams[0], 6))
            with no_file_descriptor_left() if done == 1 else contextlib.nullcontext():
                if leave == "close":
                    streams[0].close()
                streams.clear()
                gc.collect()
                observed.spans(done)
    lost, found = sorted(observed.spans(2), key=lambda span: "source" in told(span))
    assert told(lost)["missing"] == "transport_error"
    assert told(found) == (looked_up("closed") if leave == "close" else FOUND)
    assert faults(observed) == 0
    assert observed.pending() == 0


@pytest.mark.parametrize("max_concurrency", [1, 8])
def test_a_dying_thread_takes_no_other_call_with_it(
    max_concurrency: int, instrument: Instrument, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that wait behind one whose thread dies are looked up by the next thread."""
    observed = instrument(max_concurrency=max_concurrency)
    mortal = Mortal(monkeypatch, in_hand=2)
    server = serve(ResponsesAPI(lambda _: replace(CUT, answer=replace(ANSWER, id=new_id()))))
    with client_of(SYNC, server) as client:
        for _ in range(6):
            SYNC.drive(lambda: read_all(client))
        observed.spans(6)
    assert mortal.left == 0
    assert observed.calls() == {"shutdown": 2, "retrieval": 4}
    assert observed.pending() == 0
    gc.collect()


def test_a_thread_that_cannot_be_started_is_tried_again(
    observed: Observed, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a process is out of threads for a moment, the calls of that moment wait, and no others."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == THREAD_NAME:
            raise RuntimeError("can't start new thread")
        start(thread)

    server = serve(ResponsesAPI(lambda _: replace(CUT, answer=replace(ANSWER, id=new_id()))))
    with client_of(SYNC, server) as client:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            SYNC.drive(lambda: read_all(client))
        SYNC.drive(lambda: read_all(client))
        observed.spans(2)
    assert observed.calls() == {"retrieval": 2}


@both
def test_a_fault_before_the_look_up_ends_the_span(
    runtime: Runtime, observed: Observed, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not even the question can be put together, the span ends, and says that its usage is missing."""

    def broken(*_: object) -> None:
        raise BrokenError

    monkeypatch.setattr(_target, "make_target", broken)
    server = serve(ResponsesAPI(lambda _: CUT))

    async def main() -> None:
        client = client_of(runtime, server)
        assert await read_all(client) == CUT_SEEN
        await settle(client.close())

    runtime.drive(main)
    assert "missing" in told(observed.span())
    assert faults(observed) == 1


def test_what_looks_up_may_be_out_of_reach_for_a_while(
    observed: Observed, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the look-ups cannot be loaded, the call says that nobody could ask; the next one tries again."""
    server = serve(ResponsesAPI(lambda _: replace(CUT, answer=replace(ANSWER, id=new_id()))))
    monkeypatch.setitem(sys.modules, "otel_responses_usage._lookup.lookups", None)
    with client_of(SYNC, server) as client:
        for done in (1, 2):
            SYNC.drive(lambda: read_all(client))
            observed.spans(done)
            monkeypatch.undo()
    lost, found = sorted(observed.spans(2), key=lambda span: "source" in told(span))
    assert told(lost)["missing"] == "transport_error"
    assert told(found)["source"] == "retrieval"
    assert faults(observed) == 1


def test_a_shutdown_waits_for_a_span_that_is_being_ended(instrument: Instrument, serve: Serve) -> None:
    """A provider is not shut down under the worker that is just handing a span to it."""
    exporting, shut_down = threading.Event(), threading.Event()

    class SlowProcessor(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:  # noqa: ARG002  # the interface's signature
            exporting.set()
            shut_down.wait(1)

    observed = Observed()
    observed.tracer_provider = TracerProvider(shutdown_on_exit=False)
    observed.tracer_provider.add_span_processor(SlowProcessor())
    observed.tracer_provider.add_span_processor(SimpleSpanProcessor(observed._spans))
    instrument(observed, exit_timeout=10)
    with client_of(SYNC, serve(ResponsesAPI(lambda _: CUT))) as client:
        SYNC.drive(lambda: read_all(client))
        exporting.wait(10)
        observed.tracer_provider.shutdown()
        shut_down.set()
    assert told(observed.span(timeout_s=2)) == looked_up("cut", "RemoteProtocolError")
