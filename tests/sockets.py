"""What the tests of the WebSocket share: a server, clients of both kinds, and ways to send and to receive."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import openai
import pytest
from openai.resources.responses import Responses
from opentelemetry.sdk.trace import ReadableSpan

from calls import MODEL, SDK, entered, items, settle
from embedded.answer import Answer, Json, usage
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage._surfaces._unread_messages import unread_messages
from test_matrix import ASYNCIO, SYNC, Runtime

HAS_WEBSOCKET = hasattr(Responses, "connect") and importlib.util.find_spec("websockets") is not None
# The tests of a release without `connect` are skipped as a whole.
needs_websocket = pytest.mark.skipif(
    not HAS_WEBSOCKET,
    reason=f"openai {openai.__version__} has no responses.connect, or websockets is missing",
)
BOTH = (SYNC, ASYNCIO)
both = pytest.mark.parametrize("runtime", BOTH, ids=str)

CREATE: dict[str, Any] = {"type": "response.create", "model": MODEL, "input": "canary-of-the-prompt"}
TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})
# Lanes came with openai 3.1. A release before sends their names as they are, by `send_raw` or `send`.
HAS_STEER = SDK >= (3, 8)
HAS_SESSIONS = SDK >= (3, 15)
HAS_SEND_RAW = SDK >= (2, 31)
HAS_RECONNECT = SDK >= (2, 32)
HAS_BETA = SDK >= (2, 45)
ISOLATES_LANES = SDK >= (3, 54)


def answer(number: int = 0, **given: Any) -> Answer:
    """An answer of twelve pieces, whose usage no other number has."""
    counts = usage(31 + number, 245 + number, cached=16, reasoning=128)
    return Answer(pieces=tuple(f"piece {n} " for n in range(12)), usage=counts, **given)


def client_of(runtime: Runtime, api: Any, **given: Any) -> Any:
    # The first releases take no plain `ws` from a base URL.
    plain = {"websocket_base_url": api.url.replace("http", "ws", 1)} if not HAS_RECONNECT else {}
    return runtime.client(**{"base_url": api.url, "api_key": "k", "max_retries": 0, **plain, **given})


def first_connection(api: Any) -> Any:
    """The server's side of the first connection."""
    return eventually(lambda: api.connections, "the server's side is there")[0]


def kind(event: Any) -> str:
    return str(event["type"] if isinstance(event, dict) else event.type)


async def until_end(connection: Any) -> list[Any]:
    """Receive events until one ends a response."""
    seen = []
    while True:
        seen.append(await settle(connection.recv()))
        if kind(seen[-1]) in TERMINAL:
            return seen


async def receive(connection: Any, events: int) -> list[Any]:
    return [await settle(connection.recv()) for _ in range(events)]


async def send(connection: Any, **given: Any) -> None:
    """Send a create."""
    await settle(connection.send({**CREATE, **given}))


def told(span: ReadableSpan) -> dict[str, Any]:
    """How a call ended, in the words of its span."""
    attributes = span.attributes or {}
    names = {
        "outcome": "openai_responses.stream.outcome",
        "error": "error.type",
        "source": "openai_responses.usage.source",
        "missing": "openai_responses.usage.missing_reason",
        "lane": "openai_responses.stream.lane",
    }
    return {short: attributes[name] for short, name in names.items() if name in attributes}


def of_model(spans: Iterable[ReadableSpan], model: str) -> ReadableSpan:
    (span,) = [span for span in spans if (span.attributes or {})["gen_ai.request.model"] == model]
    return span


def assert_exact(span: ReadableSpan, api: Any) -> None:
    """The usage on the span is that of its response on the server."""
    response_id = str((span.attributes or {})["gen_ai.response.id"])
    assert token_attributes(span) == usage_attributes(api.stored[response_id]["usage"])


def assert_counted_once(observed: Observed, *truths: Json) -> None:
    """The metric has each of these usages once."""
    assert observed.tokens() == {
        "input": (len(truths), sum(truth["input_tokens"] for truth in truths)),
        "output": (len(truths), sum(truth["output_tokens"] for truth in truths)),
    }


def assert_unharmed(observed: Observed) -> None:
    """Nothing is pending, and there was no fault of ours."""
    eventually(lambda: observed.pending() == 0, "nothing pending")
    assert observed.points("openai_responses.faults") == []


def parse(data: bytes) -> Json:
    parsed: Json = json.loads(data)
    return parsed


# Ways to have one turn: send a create, and receive to its end.

Turn = Callable[[Any, Json], Awaitable[list[str]]]


async def by_iteration(client: Any, asked: Json) -> list[str]:
    async with entered(client.responses.connect()) as connection:
        await settle(connection.send(asked))
        seen = []
        async for event in items(connection):
            seen.append(kind(event))
            if seen[-1] in TERMINAL:
                break
        return seen


async def by_enter(client: Any, asked: Json) -> list[str]:
    connection = await settle(client.responses.connect().enter())
    try:
        await settle(connection.send(asked))
        return [kind(event) for event in await until_end(connection)]
    finally:
        await settle(connection.close())


async def by_bytes(client: Any, asked: Json) -> list[str]:
    """Sends raw JSON, and parses what arrives itself."""
    async with entered(client.responses.connect()) as connection:
        await settle(connection.send_raw(json.dumps(asked)))
        seen = [""]
        while seen[-1] not in TERMINAL:
            seen.append(kind(parse(await settle(connection.recv_bytes()))))
        return seen[1:]


async def by_binary_frames(client: Any, asked: Json) -> list[str]:
    async with entered(client.responses.connect()) as connection:
        await settle(connection.send_raw(json.dumps(asked, indent=2).encode()))
        return [kind(event) for event in await until_end(connection)]


async def by_handlers(client: Any, asked: Json) -> list[str]:
    async with entered(client.responses.connect()) as connection:
        seen: list[str] = []

        def on_event(event: Any) -> Any:
            seen.append(event.type)
            return connection.close() if event.type in TERMINAL else None

        connection.on("event", on_event)
        await settle(connection.send(asked))
        await settle(connection.dispatch_events())
        return seen


async def by_resource(client: Any, asked: Json) -> list[str]:
    async with entered(client.responses.connect()) as connection:
        given = {name: value for name, value in asked.items() if name != "type"}
        await settle(connection.response.create(**given))
        return [kind(event) for event in await until_end(connection)]


async def by_manager(client: Any, asked: Json) -> list[str]:
    """Sends before the connection is there."""
    manager = client.responses.connect()
    manager.send(asked)
    async with entered(manager) as connection:
        return [kind(event) for event in await until_end(connection)]


async def by_beta(client: Any, asked: Json) -> list[str]:
    async with entered(client.beta.responses.connect()) as connection:
        await settle(connection.send(asked))
        return [kind(event) for event in await until_end(connection)]


def session_of(connection: Any, **given: Any) -> Any:
    """The SDK's session over a connection."""
    from openai.lib import responses_websocket as sessions

    limits = sessions.ResponsesWebSocketLimits(
        **{
            "max_lanes": 8,
            "max_events_per_lane": 500,
            "max_events": 2_000,
            "max_bytes_per_lane": 1 << 24,
            "max_bytes": 1 << 25,
            **given.pop("limits", {}),
        }
    )
    is_async = hasattr(connection, "__aiter__")
    make = sessions.AsyncResponsesWebSocketSession if is_async else sessions.ResponsesWebSocketSession
    return make(connection, limits=limits, **given)


async def by_session(client: Any, asked: Json) -> list[str]:
    async with entered(client.responses.connect()) as connection, entered(session_of(connection)) as session:
        lane = session.lane("conversation")
        await settle(lane.send(asked))
        return [kind(event) for event in await until_end(lane)]


async def by_isolated_session(client: Any, asked: Json) -> list[str]:
    async with (
        entered(client.responses.connect()) as connection,
        entered(session_of(connection, isolate_lane_overflow=True)) as session,
    ):
        await settle(session.default.send(asked))
        await settle(session.default.get_final_response())
        return ["response.completed"]


TURNS: dict[str, Turn] = {
    name: turn
    for name, turn, is_there in (
        ("iteration", by_iteration, True),
        ("enter", by_enter, True),
        ("bytes", by_bytes, HAS_SEND_RAW),
        ("binary frames", by_binary_frames, HAS_SEND_RAW),
        ("handlers", by_handlers, HAS_RECONNECT),
        ("resource", by_resource, True),
        ("manager", by_manager, HAS_RECONNECT),
        ("beta", by_beta, HAS_BETA),
        ("session", by_session, HAS_SESSIONS),
        ("isolated session", by_isolated_session, ISOLATES_LANES),
    )
    if is_there
}


async def rest(connection: Any) -> AsyncIterator[str]:
    async for event in items(connection):
        yield kind(event)


async def has_all_arrived(connection: Any) -> None:
    """Wait until the library has the last message of a response in its buffer."""
    for _ in range(500):
        unread = unread_messages(connection._connection)
        if unread and b"response.completed" in unread[-1]:
            return
        await asyncio.sleep(0.01) if hasattr(connection, "__aiter__") else time.sleep(0.01)
    pytest.fail("the response has not arrived")
