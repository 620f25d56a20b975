"""Answers in unusual shapes: usage that arrived is recorded, and an unusable answer is named as it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai.resources.responses import Responses
from opentelemetry.trace import StatusCode

from calls import items, settle
from conftest import Instrument, Serve
from embedded.answer import Answer, usage
from embedded.http_server import Hold, Pause, Reply, ScriptedServer, SeenRequest, Send, Step, frame
from embedded.responses_api import error
from observed import Observed, eventually, token_attributes, usage_attributes

ANSWER = Answer(pieces=("one ", "two "), usage=usage(11, 40, cached=4, reasoning=7))
COUNTS = usage_attributes(ANSWER.usage)
ASKED: dict[str, Any] = {"model": "m", "input": "x"}
BOM = b"\xef\xbb\xbf"
CREATED, *_ = ANSWER.events()
BEGUN = [event for event in ANSWER.events() if event["type"] != "response.completed"]
NOT_FOUND = error(404, "no such response")

Client = type[openai.OpenAI] | type[openai.AsyncOpenAI]
both = pytest.mark.parametrize("client_class", [openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])


def drive(client_class: Client, server: ScriptedServer, act: Callable[[Any], Awaitable[Any]]) -> Any:
    """Do something with a client, and close the client."""

    async def main() -> Any:
        client = client_class(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        try:
            return await act(client)
        finally:
            await settle(client.close())

    if client_class is openai.AsyncOpenAI:
        return asyncio.run(main())
    try:
        main().send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a sync client has awaited something")


def serving(answer: Reply, get: Reply = NOT_FOUND) -> Callable[[SeenRequest], Reply]:
    return lambda request: get if request.method == "GET" else answer


def gets(server: ScriptedServer) -> int:
    return sum(request.method == "GET" for request in server.requests)


def told(observed: Observed) -> dict[str, Any]:
    """How the call ended, in the words of its span."""
    attributes = observed.span().attributes or {}
    names = {
        "outcome": "openai_responses.stream.outcome",
        "error": "error.type",
        "source": "openai_responses.usage.source",
        "missing": "openai_responses.usage.missing_reason",
    }
    return {short: attributes[name] for short, name in names.items() if name in attributes}


def read(**asked: Any) -> Callable[[Any], Awaitable[None]]:
    """Read a stream to its end."""

    async def act(client: Any) -> None:
        async for _ in items(await settle(client.responses.create(**ASKED, **asked, stream=True))):
            pass

    return act


def close(**asked: Any) -> Callable[[Any], Awaitable[None]]:
    """Close a stream after its first event."""

    async def act(client: Any) -> None:
        stream = await settle(client.responses.create(**ASKED, **asked, stream=True))
        await settle(stream.__anext__() if hasattr(stream, "__anext__") else next(stream))
        await settle(stream.close())

    return act


def create(**asked: Any) -> Callable[[Any], Awaitable[Any]]:
    """Make a call that does not stream."""
    return lambda client: settle_call(client.responses.create(**ASKED, **asked))


async def settle_call(result: Any) -> Any:
    return await settle(result)


# --- events that end the response ----------------------------------------------------------------------

TYPES = [
    "response.done",
    "response.finished",
    "response.stream.completed",
    "vendor.response.final",
    "done",
    "response.created",
    None,
]


def unnamed(data: dict[str, Any]) -> bytes:
    """An event without a type, and without an `event:` line."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def final(event_type: str | None, **fields: Any) -> Any:
    """An event of some type with the whole response. A field that is `...` is left out."""
    response = {k: v for k, v in {**ANSWER.response(), **fields}.items() if v is not ...}
    return {"type": event_type, "response": response} if event_type else unnamed({"response": response})


@pytest.mark.parametrize("event_type", TYPES)
@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, "completed"),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            "incomplete",
        ),
        ({"status": "failed", "error": {"code": "server_error", "message": "no"}}, "failed"),
        ({"status": "cancelled"}, "incomplete"),
    ],
    ids=["completed", "incomplete", "failed", "cancelled"],
)
@both
def test_any_event_whose_response_has_a_final_status_ends_the_call(
    client_class: Client,
    fields: dict[str, Any],
    outcome: str,
    event_type: str | None,
    observed: Observed,
    serve: Serve,
) -> None:
    """The status of the response counts, not the type of its event. Nothing has to be looked up."""
    server = serve(serving(Reply.sse([*BEGUN, final(event_type, **fields), b"data: [DONE]\n\n"])))
    drive(client_class, server, read(store=False))
    expected = {"outcome": outcome, "source": "stream"}
    assert told(observed) == (expected | {"error": "server_error"} if outcome == "failed" else expected)
    assert token_attributes(observed.span()) == COUNTS
    assert not gets(server)


@pytest.mark.parametrize("event_type", [kind for kind in TYPES if kind != "response.created"])
@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"status": ...}, "completed"),
        ({"status": None}, "completed"),
        ({"status": "finished"}, "completed"),
        ({"status": "stopped", "incomplete_details": {"reason": "max_output_tokens"}}, "incomplete"),
        ({"status": ..., "error": {"code": "server_error", "message": "no"}}, "failed"),
    ],
    ids=["no status", "null", "unknown", "unknown, with a reason", "no status, with an error"],
)
def test_usage_without_a_known_status_ends_the_call(
    fields: dict[str, Any], outcome: str, event_type: str | None, observed: Observed, serve: Serve
) -> None:
    """Usage is final unless the response still runs. The error and the reason tell how it ended."""
    server = serve(serving(Reply.sse([*BEGUN, final(event_type, **fields)])))
    drive(openai.OpenAI, server, read(store=False))
    assert told(observed).items() >= {"outcome": outcome, "source": "stream"}.items()
    assert token_attributes(observed.span()) == COUNTS
    assert not gets(server)


def test_an_event_that_is_the_response_itself_ends_the_call(observed: Observed, serve: Serve) -> None:
    """Some servers send the response object as the last event, without an event around it."""
    server = serve(serving(Reply.sse([*BEGUN, unnamed(ANSWER.response())])))
    drive(openai.OpenAI, server, read(store=False))
    assert told(observed) == {"outcome": "completed", "source": "stream"}
    assert token_attributes(observed.span()) == COUNTS


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_such_an_event_ends_the_call_in_pieces_of_any_size(
    size: int, observed: Observed, serve: Serve
) -> None:
    """The borders of the pieces change nothing."""
    body = b"".join(frame(event) for event in [*BEGUN, final("response.done")])
    steps = tuple(Send(body[start : start + size]) for start in range(0, len(body), size))
    server = serve(serving(Reply(headers={"content-type": "text/event-stream"}, steps=steps)))
    drive(openai.OpenAI, server, read(store=False))
    assert told(observed) == {"outcome": "completed", "source": "stream"}
    assert (observed.span().attributes or {})["openai_responses.stream.events"] == len(BEGUN) + 1


def test_such_an_event_in_the_buffer_ends_the_call(observed: Observed, serve: Serve) -> None:
    """A stream that is closed while such an event lies unread has that event's usage."""
    body = b"".join(frame(event) for event in [*BEGUN, final("response.done")])
    server = serve(serving(Reply(headers={"content-type": "text/event-stream"}, steps=(Send(body), Hold()))))
    drive(openai.OpenAI, server, close(store=False))
    assert told(observed) == {"outcome": "completed", "source": "stream"}


@pytest.mark.parametrize("event_type", [*TYPES, "response.in_progress"])
@pytest.mark.parametrize("status", ["in_progress", "queued"])
def test_usage_of_a_running_response_is_not_final(
    event_type: str | None, status: str, observed: Observed, serve: Serve
) -> None:
    """Counts that a running response shows are not used, and do not end the call."""
    server = serve(serving(Reply.sse([*BEGUN, final(event_type, status=status)])))
    drive(openai.OpenAI, server, read(store=False))
    assert told(observed) == {
        "outcome": "truncated",
        "error": "stream_truncated",
        "missing": "not_stored",
    }
    assert observed.tokens() == {}


@pytest.mark.parametrize("status", [..., None, "started"])
def test_usage_in_the_first_event_is_not_final(status: Any, observed: Observed, serve: Serve) -> None:
    """`response.created` says that the response begins, also where the status is missing."""
    first = final("response.created", status=status, usage=usage(0, 0))
    server = serve(serving(Reply.sse([first, *BEGUN[1:], ANSWER.events()[-1]])))
    drive(openai.OpenAI, server, read())
    assert told(observed) == {"outcome": "completed", "source": "stream"}
    assert token_attributes(observed.span()) == COUNTS


# --- the start of a body -------------------------------------------------------------------------------

DOCUMENT = json.dumps(ANSWER.response()).encode()
EVENTS = b"".join(frame(event) for event in ANSWER.events())
STARTS: dict[str, tuple[bytes, ...]] = {
    "a space": (b" ",),
    "line breaks": (b"\n", b"\r\n", b"\r", b"\n"),
    "white space at the start of the document": (b" \n\t " * 3 + DOCUMENT[:9], DOCUMENT[9:]),
    "very much white space": (b" " * 100_000, b"\n" * 100_000),
    "a byte order mark": (BOM,),
    "a byte order mark in pieces": (b"\xef", b"\xbb", b"\xbf"),
    "a byte order mark in two pieces": (b"\xef", b"\xbb\xbf" + DOCUMENT[:30], DOCUMENT[30:]),
    "a byte order mark, then white space": (BOM + b"  ", b"\n "),
}


def body(name: str, content: bytes, *then: Step) -> Reply:
    pieces = STARTS[name]
    if b"".join(pieces).endswith(DOCUMENT):
        if content is not DOCUMENT:
            pieces = (b"".join(pieces)[: -len(DOCUMENT)] or BOM, content)
    else:
        pieces = (*pieces, content[:40], content[40:])
    steps: list[Step] = []
    for piece in pieces:
        steps += [Send(piece), Pause(0.005)]  # a piece of its own for the client, too
    kind = "application/json" if content is DOCUMENT else "text/event-stream"
    return Reply(headers={"content-type": kind}, steps=(*steps, *then))


async def read_raw(client: Any) -> None:
    (await settle(client.responses.with_raw_response.create(**ASKED))).parse()


async def read_parsed(client: Any) -> None:
    made = client.responses.with_streaming_response.create(**ASKED)
    if hasattr(made, "__aenter__"):
        async with made as response:
            await response.parse()
    else:
        with made as response:
            response.parse()


async def read_bytes(client: Any) -> None:
    made = client.responses.with_streaming_response.create(**ASKED)
    if hasattr(made, "__aenter__"):
        async with made as response:
            async for _ in response.iter_bytes():
                pass
    else:
        with made as response:
            for _ in response.iter_bytes():
                pass


@pytest.mark.parametrize(
    "act", [create(), read_raw, read_parsed, read_bytes], ids=["whole", "raw", "parsed", "bytes"]
)
@pytest.mark.parametrize("start", STARTS)
@both
def test_what_precedes_a_document_is_no_part_of_it(
    client_class: Client,
    start: str,
    act: Callable[[Any], Awaitable[Any]],
    observed: Observed,
    serve: Serve,
) -> None:
    """White space that keeps a connection open, and a byte order mark, hide no usage."""
    server = serve(serving(body(start, DOCUMENT)))
    drive(client_class, server, act)
    assert told(observed) == {"outcome": "completed", "source": "response"}
    assert token_attributes(observed.span()) == COUNTS
    assert not gets(server)


@pytest.mark.parametrize("start", STARTS)
@both
def test_what_precedes_an_event_stream_is_no_part_of_it(
    client_class: Client, start: str, observed: Observed, serve: Serve
) -> None:
    """The same is true for an event stream."""
    server = serve(serving(body(start, EVENTS)))
    drive(client_class, server, read(store=False))
    assert told(observed) == {"outcome": "completed", "source": "stream"}
    assert token_attributes(observed.span()) == COUNTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_document_in_another_encoding_is_read(encoding: str, observed: Observed, serve: Serve) -> None:
    """The SDK reads JSON in each of the encodings of Unicode, and so does its span."""
    content = DOCUMENT.decode().encode(encoding)
    steps = (Send(content[:1]), Pause(0.01), Send(content[1:]))
    server = serve(serving(Reply(headers={"content-type": "application/json"}, steps=steps)))
    drive(openai.OpenAI, server, read_parsed)
    assert told(observed) == {"outcome": "completed", "source": "response"}
    assert token_attributes(observed.span()) == COUNTS


STORED: dict[str, bytes] = {
    "white space": b" \n " + DOCUMENT,
    "a byte order mark": BOM + DOCUMENT,
    "an unknown status": json.dumps({**ANSWER.response(), "status": "finished"}).encode(),
    "whole numbers with a decimal point": json.dumps(
        {**ANSWER.response(), "usage": {"input_tokens": 11.0, "output_tokens": 40.0}}
    ).encode(),
}


@pytest.mark.parametrize("name", STORED)
def test_a_stored_response_is_read_in_the_same_way(name: str, observed: Observed, serve: Serve) -> None:
    """What is true for an answer is true for that of a look-up. One request is enough."""
    cut = Reply.sse(BEGUN[:4], end=Hold())
    headers = {"content-type": "application/json", "content-length": str(len(STORED[name]))}
    server = serve(serving(cut, Reply(200, headers, (Send(STORED[name]),), chunked=False)))
    drive(openai.OpenAI, server, close())
    assert told(observed) == {"outcome": "closed", "source": "retrieval"}
    assert {name: count for name, (_, count) in observed.tokens().items()} == {"input": 11, "output": 40}
    assert gets(server) == 1


# --- stored or not -------------------------------------------------------------------------------------


def begun(**fields: Any) -> list[dict[str, Any]]:
    """The beginning of a stream, with more fields in its response."""
    return [{**CREATED, "response": {**CREATED["response"], **fields}}, *BEGUN[1:4]]


def running(**fields: Any) -> Reply:
    return Reply.json({**ANSWER.response(status="queued"), **fields})


NO_STORE: dict[str, Any] = {"store": False, "background": False}


@pytest.mark.parametrize(
    ("reply", "act"),
    [
        (Reply.sse(begun(**NO_STORE), end=Hold()), close()),
        (Reply.sse(begun(**NO_STORE), end=Hold()), close(store=True)),
        (Reply.sse(begun(**NO_STORE)), read()),
        (Reply.sse([*begun(), final("response.paused", status="queued", usage=None, **NO_STORE)]), read()),
        (running(**NO_STORE), create()),
        (running(**NO_STORE), read_parsed),
    ],
    ids=["closed", "closed, store asked for", "truncated", "said later", "a document", "a streamed document"],
)
@both
def test_a_response_that_says_it_is_not_stored_is_not_asked_for(
    client_class: Client,
    reply: Reply,
    act: Callable[[Any], Awaitable[Any]],
    observed: Observed,
    serve: Serve,
) -> None:
    """Organisations without data retention get `store: false` in each response. No GET can find those."""
    server = serve(serving(reply))
    drive(client_class, server, act)
    assert told(observed)["missing"] == "not_stored"
    assert not gets(server)


BACKGROUND: dict[str, Any] = {"extra_body": {"background": True}}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"store": False, "background": True}, {**BACKGROUND, "store": False}),
        ({"store": False, "background": True}, BACKGROUND),
        ({"store": False, "background": True}, {}),
        ({"store": False}, {**BACKGROUND, "store": False}),
        ({"store": True, "background": True}, {"store": False}),
    ],
    ids=["both say both", "store by the response", "both by the response", "background asked for", "mixed"],
)
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "document"])
def test_a_background_response_is_asked_for_although_it_is_not_stored(
    streams: bool, fields: dict[str, Any], asked: dict[str, Any], observed: Observed, serve: Serve
) -> None:
    """A background response can be fetched for some ten minutes, also with `store=False`."""
    stored = Reply.json({**ANSWER.response(), **fields})
    first = Reply.sse(begun(**fields), end=Hold()) if streams else running(**fields)
    server = serve(serving(first, stored))
    drive(openai.OpenAI, server, close(**asked) if streams else create(**asked))
    assert told(observed)["source"] == "retrieval"
    assert token_attributes(observed.span()) == COUNTS
    assert gets(server) == 1


# --- bodies of other shapes ----------------------------------------------------------------------------


@both
def test_events_of_a_body_that_was_read_whole_have_no_times(
    client_class: Client, observed: Observed, serve: Serve
) -> None:
    """A server that answers a plain call by events has its usage recorded, and no gaps between events."""
    server = serve(serving(Reply.sse(ANSWER.events())))
    drive(client_class, server, create())
    assert told(observed) == {"outcome": "completed", "source": "stream"}
    attributes = observed.span().attributes or {}
    assert attributes["openai_responses.stream.deltas"] == 2
    assert "gen_ai.response.time_to_first_chunk" not in attributes
    assert not observed.points("gen_ai.client.operation.time_per_output_chunk")
    assert not observed.points("gen_ai.client.operation.time_to_first_chunk")
    assert token_attributes(observed.span()) == COUNTS


EMPTY_BODIES = {
    "no body": Reply(200, {"content-length": "0"}, chunked=False),
    "an empty chunked body": Reply(200),
    "white space": Reply(200, {"content-type": "text/plain"}, (Send(b" \n"),)),
    "null": Reply.json(None),
    "no content": Reply(204, {}, chunked=False),
}


@pytest.mark.parametrize("act", [create(), read_bytes], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", EMPTY_BODIES)
@both
def test_an_empty_answer_is_an_error(
    client_class: Client,
    name: str,
    act: Callable[[Any], Awaitable[Any]],
    observed: Observed,
    serve: Serve,
) -> None:
    """A call that succeeds without a response is an error of the server. The SDK returns no response."""
    drive(client_class, serve(serving(EMPTY_BODIES[name])), act)
    assert told(observed) == {"outcome": "error", "error": "empty_response", "missing": "no_response_id"}
    assert observed.span().status.status_code is StatusCode.ERROR


def test_an_empty_stream_is_truncated(observed: Observed, serve: Serve) -> None:
    """A stream without a single event has ended too soon."""
    drive(openai.OpenAI, serve(serving(Reply.sse([]))), read())
    assert told(observed)["outcome"] == "truncated"


NO_USAGE_GETS: dict[str, Reply] = {
    "not found": NOT_FOUND,
    "no route": error(405, "no"),
    "busy": error(503, "no"),
    "null again": Reply.json({**ANSWER.response(), "usage": None}),
    "running": running(),
}


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "document"])
@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
@pytest.mark.parametrize("name", NO_USAGE_GETS)
def test_a_final_response_without_usage_is_asked_for_once(
    name: str, status: str, streams: bool, observed: Observed, serve: Serve
) -> None:
    """The span says `no_usage` after one request, whatever the server answers to it."""
    last = {"status": status, "usage": None}
    reply = (
        Reply.sse([*BEGUN, final(f"response.{status}", **last)])
        if streams
        else Reply.json(ANSWER.response() | last)
    )
    server = serve(serving(reply, NO_USAGE_GETS[name]))
    drive(openai.OpenAI, server, read() if streams else create())
    assert told(observed)["missing"] == "no_usage"
    assert gets(server) == 1


def test_responses_without_usage_do_not_stop_the_look_ups_of_others(observed: Observed, serve: Serve) -> None:
    """A server that reports no usage in some answers is asked for the others as before."""
    null = Reply.json({**ANSWER.response(), "usage": None})
    replies = [Reply.sse(BEGUN[:4], end=Hold())] + [null] * 8

    def handler(request: SeenRequest) -> Reply:
        if request.method == "GET":
            return Reply.json(ANSWER.response()) if not replies else NOT_FOUND
        return replies.pop()

    server = serve(handler)
    for number in range(1, 9):
        drive(openai.OpenAI, server, create())
        observed.spans(number)
    drive(openai.OpenAI, server, close())
    assert (observed.spans(9)[-1].attributes or {})["openai_responses.usage.source"] == "retrieval"
    assert not observed.points("openai_responses.retrieval.open_circuits")


def test_a_late_charge_of_a_response_without_usage_is_found(observed: Observed, serve: Serve) -> None:
    """The one request can bring the usage that the stream did not."""
    stored = Reply.json(ANSWER.response())
    server = serve(serving(Reply.sse([*BEGUN, final("response.completed", usage=None)]), stored))
    drive(openai.OpenAI, server, read())
    assert told(observed) == {"outcome": "completed", "source": "retrieval"}
    assert token_attributes(observed.span()) == COUNTS


# --- the SDK's helper ----------------------------------------------------------------------------------

helper = pytest.mark.skipif(
    not hasattr(Responses, "stream"),
    reason="not in this release of the SDK",
)
# The helper needs `response.created` and the items to which the deltas belong.
STRANGE = [{"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "delta": "x"}]


async def follow(client: Any, then: Callable[[], None] = lambda: None) -> None:
    """Read a stream by the SDK's helper."""
    manager = client.responses.stream(**ASKED)
    if hasattr(manager, "__aenter__"):
        async with manager as stream:
            async for _ in stream:
                then()
    else:
        with manager as stream:
            for _ in stream:
                then()


@helper
@both
def test_an_error_of_the_helper_is_the_error_of_the_call(
    client_class: Client, observed: Observed, serve: Serve
) -> None:
    """The SDK's helper raises on a stream that it cannot follow. The application gets that exception."""
    server = serve(serving(Reply.sse(STRANGE, end=Hold())))
    with pytest.raises(RuntimeError):
        drive(client_class, server, follow)
    assert told(observed) == {"outcome": "error", "error": "RuntimeError", "missing": "no_response_id"}
    assert observed.span().status.status_code is StatusCode.ERROR


@helper
@both
def test_an_error_of_the_application_is_not_one_of_the_helper(
    client_class: Client, observed: Observed, serve: Serve
) -> None:
    """An exception that the application raises in its loop closes the stream."""

    def fail() -> None:
        raise RuntimeError

    server = serve(serving(Reply.sse(BEGUN[:4], end=Hold()), Reply.json(ANSWER.response())))
    with pytest.raises(RuntimeError):
        drive(client_class, server, lambda client: follow(client, fail))
    assert told(observed) == {"outcome": "closed", "source": "retrieval"}


@helper
def test_an_error_of_the_helper_belongs_to_its_own_stream(instrument: Instrument, serve: Serve) -> None:
    """A stream inside the loop of another fails alone. The outer one is closed by the application."""
    observed = instrument(retrieval=False)
    good = serve(serving(Reply.sse(BEGUN[:4], end=Hold())))
    bad = serve(serving(Reply.sse(STRANGE, end=Hold())))

    def inner() -> None:
        drive(openai.OpenAI, bad, follow)

    with pytest.raises(RuntimeError):
        drive(openai.OpenAI, good, lambda client: follow(client, inner))
    outcomes = [(span.attributes or {})["openai_responses.stream.outcome"] for span in observed.spans(2)]
    assert outcomes == ["error", "closed"]
    eventually(lambda: observed.pending() == 0, "no look-up left")
