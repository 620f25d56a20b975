"""Calls over a WebSocket: one span for each response, in the context of its create, with exact usage."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from calls import MODEL, SDK, entered, items, settle, since
from conftest import Instrument
from embedded.answer import FAILED, OUT_OF_TOKENS, FunctionCall, Json, new_id
from embedded.http_server import Cut, Hold, Wait
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage import ResponsesUsageInstrumentor
from otel_responses_usage._lookup import lookups as _lookup
from otel_responses_usage._lookup.retrieval import RetrievalPolicy
from otel_responses_usage._surfaces._unread_messages import unread_messages
from sockets import (
    BOTH,
    CREATE,
    HAS_BETA,
    HAS_STEER,
    TERMINAL,
    TURNS,
    answer,
    assert_counted_once,
    assert_exact,
    assert_unharmed,
    both,
    client_of,
    first_connection,
    has_all_arrived,
    kind,
    needs_websocket,
    of_model,
    receive,
    send,
    session_of,
    told,
    until_end,
)
from test_matrix import ASYNCIO, SYNC, Runtime

pytestmark = [needs_websocket, pytest.mark.usefixtures("quick_collections")]

if needs_websocket.args[0] is False:
    from embedded.websocket_api import Close, Turn, WebSocketAPI, error
else:  # every test is skipped
    Close = Turn = WebSocketAPI = error = lambda *_, **__: None

HELD = {"cut_after": 6, "end": Hold()}


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the GETs of a look-up no time is lost."""
    policy = RetrievalPolicy(first_wait_s=0.01, longest_wait_s=0.05)
    monkeypatch.setattr(_lookup, "RetrievalPolicy", lambda: policy)


@pytest.fixture
def play() -> Iterator[Callable[..., Any]]:
    """Start a server that answers the creates with these turns in order, and all others with the last one."""
    with contextlib.ExitStack() as running:

        def start(*turns: Any, **given: Any) -> Any:
            left = list(turns) or [Turn(answer())]

            def next_turn(_: Json) -> Any:
                turn = left.pop(0) if len(left) > 1 else left[0]
                # No two responses have an id in common.
                return replace(turn, answer=replace(turn.answer, id=new_id()))

            return running.enter_context(WebSocketAPI(next_turn, **given))

        yield start


Play = Callable[..., Any]


def by_model(**turns: Any) -> Callable[[Json], Any]:
    """Turns by the model of the create."""
    return lambda asked: replace(
        turns[asked["model"]], answer=replace(turns[asked["model"]].answer, id=new_id())
    )


# Ways


@both
@pytest.mark.parametrize("way", TURNS)
def test_every_way_to_have_a_turn_is_one_span(
    observed: Observed, play: Play, runtime: Runtime, way: str
) -> None:
    """However an application sends and receives, its response has one span with exact usage."""
    api = play()
    seen: list[str] = []

    async def main() -> None:
        async with entered(client_of(runtime, api)) as client:
            seen.extend(await TURNS[way](client, dict(CREATE)))

    runtime.drive(main)
    assert seen[-1] == "response.completed"
    span = observed.span()
    assert span.name == f"chat {MODEL}"
    assert span.kind is SpanKind.CLIENT
    (truth,) = api.stored.values()
    attributes = dict(span.attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    lane = {"openai_responses.stream.lane": "conversation"} if way == "session" else {}
    assert attributes == lane | usage_attributes(truth["usage"]) | {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": truth["id"],
        "gen_ai.response.model": truth["model"],
        "gen_ai.response.finish_reasons": ("stop",),
        "network.protocol.name": "websocket",
        "openai.api.type": "responses",
        "openai.response.service_tier": "default",
        "openai_responses.response.status": "completed",
        "openai_responses.stream.deltas": 12,
        "openai_responses.stream.deltas_by_type.output_text": 12,
        "openai_responses.stream.events": 20,
        "openai_responses.stream.outcome": "completed",
        "openai_responses.usage.source": "stream",
        "server.address": "127.0.0.1",
        "server.port": int(api.url.rpartition(":")[2].partition("/")[0]),
    }
    assert_counted_once(observed, truth["usage"])
    assert observed.calls() == {"stream": 1}
    assert_unharmed(observed)


@both
def test_a_client_and_a_manager_made_before_are_covered(
    instrument: Instrument, play: Play, runtime: Runtime
) -> None:
    """What was made before `instrument()` makes connections that are seen."""
    api = play()

    async def main() -> Observed:
        async with entered(client_of(runtime, api)) as client:
            enter = client.responses.connect().enter
            observed = instrument()
            connection = await settle(enter())
            await send(connection)
            await until_end(connection)
            await settle(connection.close())
            return observed

    observed = drive(runtime, main)
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}


def drive(runtime: Runtime, main: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine, and return its result."""
    results = []

    async def run() -> None:
        results.append(await main())

    runtime.drive(run)
    return results[0]


@both
def test_many_turns_on_one_connection_have_spans_of_their_own(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """Turns that continue each other, and creates that wait for each other, are told one by one."""
    api = play(*(Turn(answer(n)) for n in range(6)))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            previous = None
            for _ in range(3):
                more = {"previous_response_id": previous} if previous else {}
                await send(connection, **more)
                previous = (await until_end(connection))[-1].response.id
            for _ in range(3):  # at once
                await send(connection)
            for _ in range(3):
                await until_end(connection)

    runtime.drive(main)
    spans = observed.spans(6)
    for span in spans:
        assert_exact(span, api)
    ids = [span.attributes["gen_ai.response.id"] for span in spans if span.attributes]
    assert ids == list(api.stored)
    assert spans[1].attributes["gen_ai.request.previous_response.id"] == ids[0]
    assert_counted_once(observed, *(response["usage"] for response in api.stored.values()))


@both
def test_what_is_asked_for_is_on_the_span(observed: Observed, play: Play, runtime: Runtime) -> None:
    """The parameters of a create are read as those of an HTTP request, and a warm-up is marked."""
    api = play()

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, generate=False, store=False)
            warm = await until_end(connection)
            await send(
                connection,
                previous_response_id=warm[-1].response.id,
                max_output_tokens=20_000,
                temperature=0.5,
                reasoning={"effort": "low"},
                service_tier="flex",
            )
            await until_end(connection)

    runtime.drive(main)
    warm, turn = (dict(span.attributes or {}) for span in observed.spans(2))
    assert warm["openai_responses.request.generate"] is False
    assert warm["openai_responses.stream.deltas"] == 0
    assert "openai_responses.request.generate" not in turn
    expected = {
        "gen_ai.request.max_tokens": 20_000,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.reasoning.level": "low",
        "gen_ai.request.previous_response.id": warm["gen_ai.response.id"],
        "openai.request.service_tier": "flex",
    }
    assert expected.items() <= turn.items()


def test_no_content_and_no_key_is_told(observed: Observed, play: Play) -> None:
    """Prompt, answer, lane messages and credentials stay out of spans and metrics."""
    api = play(Turn(answer(), **HELD), Turn(answer()))
    with (
        client_of(SYNC, api, api_key="canary-of-the-key") as client,
        client.responses.connect() as connection,
    ):
        connection.send({**CREATE, "stream_id": "a"})
        connection.send({**CREATE, "stream_id": "b", "instructions": "canary-of-the-instructions"})
        while kind(connection.recv()) not in TERMINAL:
            pass
    observed.spans(2)
    for _, text in observed.told():
        assert "canary" not in text
        assert "piece 1" not in text


# Context


def test_the_parent_is_the_context_of_the_sender(observed: Observed, play: Play) -> None:
    """A reader in another thread, with a span of its own, is not the parent."""
    api = play()
    tracer = observed.tracer_provider.get_tracer("app")
    with client_of(SYNC, api) as client, client.responses.connect() as connection:

        def read() -> None:
            with tracer.start_as_current_span("reader"):
                for _ in range(2):
                    drive(SYNC, lambda: until_end(connection))

        reader = threading.Thread(target=read)
        reader.start()
        for name in ("first", "second"):
            with tracer.start_as_current_span(name):
                connection.send(CREATE)
        reader.join()
    by_name = {span.name: span for span in observed.spans(5)}
    calls = [span for span in observed.spans(5) if span.name.startswith("chat")]
    assert [call.parent for call in calls] == [by_name[name].context for name in ("first", "second")]


def test_the_parent_is_the_task_that_sends(observed: Observed, play: Play) -> None:
    """Tasks that send over one connection have their own calls as children."""
    api = play()
    tracer = observed.tracer_provider.get_tracer("app")

    async def main() -> None:
        async with client_of(ASYNCIO, api) as client, client.responses.connect() as connection:

            async def ask(lane: str) -> None:
                with tracer.start_as_current_span(lane):
                    await connection.send({**CREATE, "stream_id": lane, "model": lane})
                    assert trace.get_current_span().get_span_context().span_id != 0

            await asyncio.gather(*(ask(lane) for lane in "abc"))
            for _ in range(3):
                await until_end(connection)

    asyncio.run(main())
    spans = {span.name: span for span in observed.spans(6)}
    for lane in "abc":
        assert spans[f"chat {lane}"].parent == spans[lane].context
        assert told(spans[f"chat {lane}"])["lane"] == lane


@pytest.mark.skipif("manager" not in TURNS, reason="not in this release of the SDK")
@both
def test_creates_that_wait_for_the_connection_keep_their_context(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """`manager.send` before entering: each call begins there and then, also if two messages are equal."""
    api = play()
    tracer = observed.tracer_provider.get_tracer("app")

    async def main() -> None:
        async with entered(client_of(runtime, api)) as client:
            manager = client.responses.connect()
            for name in ("first", "second"):
                with tracer.start_as_current_span(name):
                    manager.send(CREATE)
            with tracer.start_as_current_span("entering"):
                connection = await settle(manager.enter())
            for _ in range(2):
                await until_end(connection)
            await settle(connection.close())

    runtime.drive(main)
    spans = observed.spans(5)
    by_name = {span.name: span for span in spans}
    calls = sorted((span for span in spans if span.name.startswith("chat")), key=lambda span: span.start_time)
    assert [call.parent for call in calls] == [by_name[name].context for name in ("first", "second")]
    assert all(call.start_time < by_name["entering"].start_time for call in calls)


# Lanes


@both
def test_lanes_that_interleave_are_told_apart(observed: Observed, play: Play, runtime: Runtime) -> None:
    """Twenty lanes with two creates each: every response has its own usage, events and lane."""
    lanes = [f"lane-{n}" for n in range(20)]
    numbers = iter(range(100))
    api = play()
    api._turn = lambda asked: Turn(
        replace(answer(next(numbers), id=new_id()), model=f"{asked['model']}-2026"), pace=0.0005
    )

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            for turn in range(2):
                for lane in lanes:
                    await send(connection, model=f"m-{lane}-{turn}", stream_id=lane)
            ended = 0
            while ended < 40:
                ended += kind(await settle(connection.recv())) in TERMINAL

    runtime.drive(main)
    spans = observed.spans(40)
    for span in spans:
        attributes = span.attributes or {}
        assert_exact(span, api)
        model = str(attributes["gen_ai.request.model"])
        assert attributes["gen_ai.response.model"] == f"{model}-2026"
        assert model.startswith(f"m-{attributes['openai_responses.stream.lane']}-")
        assert attributes["openai_responses.stream.events"] == 20
        assert attributes["openai_responses.stream.deltas"] == 12
    assert len({span.name for span in spans}) == 40
    assert_unharmed(observed)


@both
def test_a_lane_alone_beside_others_that_are_not_recorded(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """Events of a suppressed call, in the default lane or in another, do not count for one that is told."""
    api = play(Turn(answer(1), pace=0.002))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, stream_id="a", model="told")
            with suppress_instrumentation():
                for more in ({}, {"stream_id": "ba"}):
                    await send(connection, model="suppressed", **more)
            for _ in range(3):
                await until_end(connection)

    runtime.drive(main)
    span = observed.span()
    assert told(span) == {"outcome": "completed", "source": "stream", "lane": "a"}
    assert (span.attributes or {})["openai_responses.stream.events"] == 20
    assert (span.attributes or {})["openai_responses.stream.deltas"] == 12
    assert_exact(span, api)


@pytest.mark.skipif("session" not in TURNS, reason="not in this release of the SDK")
@both
def test_a_session_with_lanes(observed: Observed, play: Play, runtime: Runtime) -> None:
    """A lane that closes ends no call; the session's close does, as the application's own."""
    api = play()
    api._turn = by_model(left=Turn(answer(1), **HELD), read=Turn(answer(2)), open=Turn(answer(3), **HELD))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
            entered(session_of(connection)) as session,
        ):
            left, read = session.lane("left"), session.lane("read")
            await settle(left.send({**CREATE, "model": "left"}))
            await settle(left.recv())
            left.close()
            await settle(read.send({**CREATE, "model": "read"}))
            assert (await settle(read.get_final_response())).status == "completed"
            await settle(session.default.send({**CREATE, "model": "open"}))
            event = None
            # It also receives what still arrives for the lane that is closed.
            while event is None or event.stream_id or event.type != "response.output_text.delta":
                event = await settle(session.default.recv())
            assert observed.finished == 1

    runtime.drive(main)
    spans = observed.spans(3)
    assert told(of_model(spans, "read")) == {"outcome": "completed", "source": "stream", "lane": "read"}
    assert told(of_model(spans, "left")) == {"outcome": "closed", "source": "retrieval", "lane": "left"}
    assert told(of_model(spans, "open")) == {"outcome": "closed", "source": "retrieval"}
    assert_unharmed(observed)


@pytest.mark.skipif("session" not in TURNS, reason="not in this release of the SDK")
@both
def test_a_session_that_overflows(observed: Observed, play: Play, runtime: Runtime) -> None:
    """The SDK closes the connection of a session that is full: its calls are closed, and looked up."""
    from openai.lib.responses_websocket import ResponsesWebSocketBufferError

    api = play(Turn(answer(), **HELD))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
            entered(session_of(connection, limits={"max_events": 4})) as session,
        ):
            await settle(session.default.send(CREATE))
            await asyncio.sleep(0.2) if runtime is ASYNCIO else eventually(
                lambda: not session._thread.is_alive(), "the reader ended"
            )
            with pytest.raises(ResponsesWebSocketBufferError):
                await until_end(session.default)

    runtime.drive(main)
    assert told(observed.span())["source"] == "retrieval"
    assert_unharmed(observed)


@both
def test_a_lane_without_a_name_in_the_answer(observed: Observed, play: Play, runtime: Runtime) -> None:
    """Text that looks like a lane, and another field of the same name inside, belong to no lane."""
    text = '"stream_id":"other" \\"stream_id\\": \\"other\\"'
    api = play(Turn(replace(answer(), pieces=(text,) * 3)), Turn(replace(answer(), pieces=(text,) * 3)))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            for more in ({}, {"stream_id": "mine"}):
                await send(connection, metadata={"stream_id": "other"}, **more)
                await until_end(connection)

    runtime.drive(main)
    for span in observed.spans(2):
        assert_exact(span, api)


@both
def test_a_server_that_does_not_repeat_the_lane(observed: Observed, play: Play, runtime: Runtime) -> None:
    """Some servers accept a lane and run one response at a time, without its name in their events."""
    api = play(
        Turn(answer(1), echoes_lane=False),
        Turn(refusal=error("No.", "refused"), echoes_lane=False),
        Turn(answer(2), echoes_lane=False),
    )

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            for number, lane in enumerate(("a", "b", "a")):
                await send(connection, model=f"m{number}", stream_id=lane)
                await until_end(connection)

    runtime.drive(main)
    spans = observed.spans(3)
    assert [told(span)["outcome"] for span in spans] == ["completed", "error", "completed"]
    assert [told(span)["lane"] for span in spans] == ["a", "b", "a"]
    assert [span.name for span in spans] == ["chat m0", "chat m1", "chat m2"]
    for span in (spans[0], spans[2]):
        assert_exact(span, api)


# Steering


needs_steer = pytest.mark.skipif(not HAS_STEER, reason="not in this release of the SDK")


@needs_steer
@both
@pytest.mark.parametrize("lane", [None, "lane"])
def test_a_steered_response_and_its_successor_are_two_calls(
    observed: Observed, play: Play, runtime: Runtime, lane: str | None
) -> None:
    """The steered one is incomplete; its successor has a link to it, and the steering as its parent."""
    gate = threading.Event()
    api = play(Turn(answer(1), cut_after=6, end=Wait(gate)), Turn(answer(2)))
    tracer = observed.tracer_provider.get_tracer("app")
    named = {"stream_id": lane} if lane else {}

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            with tracer.start_as_current_span("asking"):
                await send(connection, temperature=0.25, **named)
            first = await receive(connection, 6)
            with tracer.start_as_current_span("steering"):
                await settle(
                    connection.response.steer(input="more", previous_response_id=first[0].response.id)
                )
            assert kind(await settle(connection.recv())) == "response.steer.accepted"
            gate.set()
            for _ in range(2):
                await until_end(connection)

    runtime.drive(main)
    spans = observed.spans(4)
    by_name = {span.name: span for span in spans}
    steered, successor = sorted(
        (span for span in spans if span.name == f"chat {MODEL}"), key=lambda span: span.start_time
    )
    lanes = {"lane": lane} if lane else {}
    assert told(steered) == {"outcome": "incomplete", "source": "stream", **lanes}
    assert steered.attributes["gen_ai.response.finish_reasons"] == ("steered",)
    assert told(successor) == {"outcome": "completed", "source": "stream", **lanes}
    assert [link.context for link in successor.links] == [steered.context]
    assert steered.parent == by_name["asking"].context
    assert successor.parent == by_name["steering"].context
    assert steered.end_time <= successor.start_time
    attributes = successor.attributes or {}
    assert attributes["gen_ai.request.previous_response.id"] == steered.attributes["gen_ai.response.id"]
    assert attributes["gen_ai.request.temperature"] == 0.25
    for span in (steered, successor):
        assert_exact(span, api)
    assert_counted_once(observed, *(response["usage"] for response in api.stored.values()))


@needs_steer
@both
def test_a_successor_comes_before_the_creates_that_wait(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """A create that was queued behind a steered response is not taken for the successor."""
    gate = threading.Event()
    api = play(Turn(answer(1), cut_after=6, end=Wait(gate)), Turn(answer(2)), Turn(answer(3)))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, model="steered")
            first = await receive(connection, 6)
            await send(connection, model="queued")
            for _ in range(2):  # two submissions make one successor
                await settle(connection.response.steer(input="x", previous_response_id=first[0].response.id))
                await settle(connection.recv())
            gate.set()
            for _ in range(3):
                await until_end(connection)

    runtime.drive(main)
    spans = sorted(observed.spans(3), key=lambda span: str(span.attributes["gen_ai.response.id"]))
    ids = list(api.stored)
    by_id = {span.attributes["gen_ai.response.id"]: span for span in spans}
    assert [by_id[name].attributes["gen_ai.request.model"] for name in ids] == [
        "steered",
        "steered",
        "queued",
    ]
    for span in spans:
        assert_exact(span, api)


@needs_steer
@both
def test_steering_that_fails_or_waits_makes_no_call(observed: Observed, play: Play, runtime: Runtime) -> None:
    """A steer that comes too late, and one that waits for the application's own create, are no calls."""
    calling = replace(answer(1), pieces=(), calls=(FunctionCall("find", ("{", "}")),))
    gate = threading.Event()
    api = play(Turn(calling, cut_after=4, end=Wait(gate)), Turn(answer(2)))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection)
            first = (await receive(connection, 4))[0].response.id
            await settle(connection.response.steer(input="x", previous_response_id=first))
            assert kind(await settle(connection.recv())) == "response.steer.accepted"
            gate.set()
            await until_end(connection)
            assert kind(await settle(connection.recv())) == "response.steer.pending"
            await send(connection, previous_response_id=first)
            last = (await until_end(connection))[-1].response.id
            await settle(connection.response.steer(input="x", previous_response_id=last))
            assert kind(await settle(connection.recv())) == "response.steer.failed"

    runtime.drive(main)
    spans = observed.spans(2)
    assert [told(span) for span in spans] == [{"outcome": "completed", "source": "stream"}] * 2
    assert not spans[1].links
    for span in spans:
        assert_exact(span, api)


@needs_steer
def test_many_steers_are_all_followed(observed: Observed, play: Play) -> None:
    """After a hundred steers that failed, a successor still has the context of its steer."""
    gate = threading.Event()
    api = play(Turn(answer(1), cut_after=6, end=Wait(gate)), Turn(answer(2)), Turn(answer(3)))
    tracer = observed.tracer_provider.get_tracer("app")
    with client_of(SYNC, api) as client, client.responses.connect() as connection:
        for n in range(100):
            connection.response.steer(input="x", previous_response_id=f"resp_unknown_{n}")
            assert connection.recv().type == "response.steer.failed"
        connection.send(CREATE)
        first, *_ = (connection.recv() for _ in range(6))
        connection.send({**CREATE, "model": "queued"})
        with tracer.start_as_current_span("steering") as steering:
            connection.response.steer(input="x", previous_response_id=first.response.id)
        gate.set()
        for _ in range(3):
            drive(SYNC, lambda: until_end(connection))
    spans = [span for span in observed.spans(4) if span.links]
    assert [span.parent for span in spans] == [steering.get_span_context()]


@pytest.mark.skipif(not HAS_BETA, reason="not in this release of the SDK")
@both
def test_input_that_cannot_be_injected_ends_no_call(observed: Observed, play: Play, runtime: Runtime) -> None:
    """`response.inject.failed` has an error, which is not that of the response."""
    failed = {
        "type": "response.inject.failed",
        "error": {"code": "response_not_found", "message": "No."},
        "input": [],
        "response_id": "resp_other",
        "sequence_number": 9,
    }
    api = play(Turn(answer(), extra={7: (json.dumps(failed),)}))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.beta.responses.connect()) as connection,
        ):
            await settle(connection.send(CREATE))
            await until_end(connection)

    runtime.drive(main)
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}


# Endings


@dataclass(frozen=True)
class Ending:
    """What the server does, what the application does then, and what is told."""

    name: str
    outcome: str
    error: str | None = None
    turn: dict[str, Any] | None = None
    act: Callable[[Any], Awaitable[object]] = until_end
    raises: str | None = None
    source: str | None = "retrieval"
    missing: str | None = None
    runtimes: tuple[Runtime, ...] = BOTH
    is_error: bool = False

    def __str__(self) -> str:
        return self.name


async def close(connection: Any) -> None:
    await receive(connection, 6)
    await settle(connection.close())


async def leave(connection: Any) -> None:
    await receive(connection, 6)


async def leave_at_once(_: Any) -> None:
    pass


async def stumble(connection: Any) -> None:
    await receive(connection, 6)
    raise ZeroDivisionError


async def cancel(connection: Any) -> None:
    task = asyncio.ensure_future(until_end(connection))
    await asyncio.sleep(0.1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def wait_in_vain(connection: Any) -> None:
    await receive(connection, 6)
    await asyncio.wait_for(connection.recv(), 0.05)


async def poll_then_close(connection: Any) -> None:
    """A reader that was once cancelled, and has received since, is not what ends the call."""
    await receive(connection, 3)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(connection._connection.recv(), 0)
    await receive(connection, 3)
    await connection.close()


async def drain(connection: Any) -> None:
    async for _ in items(connection):
        pass


CLOSED_ERROR = "ConnectionClosedError"
ENDINGS = (
    Ending("completed", "completed", source="stream"),
    Ending("incomplete", "incomplete", turn={"answer": answer(ending=OUT_OF_TOKENS)}, source="stream"),
    Ending(
        "failed",
        "failed",
        "server_error",
        turn={"answer": answer(ending=FAILED)},
        source="stream",
        is_error=True,
    ),
    Ending(
        "refused",
        "error",
        "no_such_model",
        turn={"refusal": {"type": "error", "error": {"code": "no_such_model"}, "status": 404}},
        source=None,
        missing="no_response_id",
        is_error=True,
    ),
    Ending(
        "an error event",
        "error",
        "overloaded",
        turn={**HELD, "extra": {5: ({"type": "error", "error": {"code": "overloaded"}, "status": 503},)}},
        is_error=True,
    ),
    Ending("close 1000", "truncated", "stream_truncated", {**HELD, "end": Close(1000)}, drain, is_error=True),
    Ending("close 1001", "truncated", "stream_truncated", {**HELD, "end": Close(1001)}, drain, is_error=True),
    Ending(
        "close 1000, received singly",
        "truncated",
        "stream_truncated",
        {**HELD, "end": Close(1000)},
        raises="ConnectionClosedOK",
        is_error=True,
    ),
    Ending(
        "close 1011",
        "cut",
        CLOSED_ERROR,
        {**HELD, "end": Close(1011)},
        drain,
        raises=CLOSED_ERROR,
        is_error=True,
    ),
    Ending("no close frame", "cut", CLOSED_ERROR, {**HELD, "end": Cut()}, raises=CLOSED_ERROR, is_error=True),
    Ending("reset", "cut", CLOSED_ERROR, {**HELD, "end": Cut("rst")}, raises=CLOSED_ERROR, is_error=True),
    Ending("closed", "closed", turn=HELD, act=close),
    Ending("left", "closed", turn=HELD, act=leave),
    Ending("stumbled", "closed", turn=HELD, act=stumble, raises="ZeroDivisionError"),
    Ending("left at once", "closed", turn=HELD, act=leave_at_once, source=None, missing="no_response_id"),
    Ending("cancelled", "cancelled", turn=HELD, act=cancel, runtimes=(ASYNCIO,)),
    Ending("timed out", "cancelled", turn=HELD, act=wait_in_vain, raises="TimeoutError", runtimes=(ASYNCIO,)),
    Ending("polled, then closed", "closed", turn=HELD, act=poll_then_close, runtimes=(ASYNCIO,)),
)


@pytest.mark.parametrize(
    ("ending", "runtime"),
    [(ending, runtime) for ending in ENDINGS for runtime in ending.runtimes],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("lane", [None, "lane"])
def test_every_ending(
    observed: Observed, play: Play, ending: Ending, runtime: Runtime, lane: str | None
) -> None:
    """However a response ends, its span says so once, and its usage is read or looked up."""
    api = play(Turn(**{"answer": answer(), **(ending.turn or {})}))
    named = {"stream_id": lane} if lane else {}

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, **named)
            await ending.act(connection)

    raised = None
    try:
        runtime.drive(main)
    except Exception as error:
        raised = type(error).__name__
    assert raised == ending.raises
    span = observed.span()
    expected = {"outcome": ending.outcome, "error": ending.error, "source": ending.source}
    expected |= {"missing": ending.missing, "lane": lane}
    assert told(span) == {name: value for name, value in expected.items() if value}
    assert span.status.status_code is (StatusCode.ERROR if ending.is_error else StatusCode.UNSET)
    if ending.source:
        assert_exact(span, api)
        assert_counted_once(observed, *(response["usage"] for response in api.stored.values()))
    assert len(api.gets) == (ending.source == "retrieval")
    assert_unharmed(observed)


# All events but the last four. The library reads from the network again when no more than four are unread.
MOST_EVENTS = 16


async def close_unread(connection: Any) -> None:
    await has_all_arrived(connection)
    await settle(connection.close())


async def stumble_unread(connection: Any) -> None:
    await has_all_arrived(connection)
    raise ZeroDivisionError


async def close_after_the_server(connection: Any) -> None:
    await has_all_arrived(connection)
    unread = len(unread_messages(connection._connection))
    first = connection._connection
    for _ in range(500):
        if first.state.name == "CLOSED":
            break
        await asyncio.sleep(0.01) if hasattr(connection, "__aiter__") else time.sleep(0.01)
    assert len(unread_messages(first)) == unread
    await settle(connection.close())


@both
@pytest.mark.parametrize("lane", [None, "lane"])
@pytest.mark.parametrize("act", [close_unread, stumble_unread, close_after_the_server])
def test_what_had_arrived_at_the_close_is_read(
    observed: Observed,
    play: Play,
    runtime: Runtime,
    lane: str | None,
    act: Callable[[Any], Awaitable[object]],
) -> None:
    """A terminal event that the application does not receive any more tells the usage: nothing is stored."""
    ends = act is close_after_the_server
    api = play()
    named = {"stream_id": lane} if lane else {}

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, store=False, **named)
            await receive(connection, MOST_EVENTS)
            if ends:
                await has_all_arrived(connection)
                first_connection(api).end_now(Close(1000))
            await act(connection)

    with pytest.raises(ZeroDivisionError) if act is stumble_unread else contextlib.nullcontext():
        runtime.drive(main)
    span = observed.span()
    lanes = {"lane": lane} if lane else {}
    assert told(span) == {"outcome": "completed", "source": "stream", **lanes}
    assert (span.attributes or {})["openai_responses.stream.events"] == 20
    assert_exact(span, api)
    assert_counted_once(observed, *(response["usage"] for response in api.stored.values()))
    assert_unharmed(observed)


@both
def test_what_had_arrived_does_not_count_without_an_end(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """Of two lanes, one has its end among the unread messages. The events of the other are not counted."""
    api = play()
    api._turn = by_model(whole=Turn(answer(1)), part=Turn(answer(2), cut_after=5, end=Hold()))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, model="part", stream_id="a")
            await receive(connection, 2)
            await send(connection, model="whole", stream_id="b", store=False)
            received = 0
            while received < MOST_EVENTS:
                received += (await settle(connection.recv())).stream_id == "b"
            await close_unread(connection)

    runtime.drive(main)
    spans = observed.spans(2)
    whole, part = of_model(spans, "whole"), of_model(spans, "part")
    assert told(whole) == {"outcome": "completed", "source": "stream", "lane": "b"}
    assert told(part) == {"outcome": "closed", "source": "retrieval", "lane": "a"}
    for span in spans:
        assert_exact(span, api)


def test_polling_with_a_timeout_ends_no_call(observed: Observed, play: Play) -> None:
    """`wait_for(connection.recv())` may time out again and again: the call goes on."""
    gate = threading.Event()
    api = play(Turn(answer(), cut_after=6, end=Wait(gate)))

    async def main() -> None:
        async with client_of(ASYNCIO, api) as client, client.responses.connect() as connection:
            await connection.send(CREATE)
            await receive(connection, 6)
            for _ in range(3):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(connection.recv(), 0.01)
            assert observed.finished == 0
            gate.set()
            await until_end(connection)

    asyncio.run(main())
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}


def test_polling_a_sync_connection_ends_no_call(observed: Observed, play: Play) -> None:
    """The library's own timeout of a sync `recv` ends nothing."""
    gate = threading.Event()
    api = play(Turn(answer(), cut_after=6, end=Wait(gate)))
    with client_of(SYNC, api) as client, client.responses.connect() as connection:
        connection.send(CREATE)
        drive(SYNC, lambda: receive(connection, 6))
        with pytest.raises(TimeoutError):
            connection._connection.recv(timeout=0.01)
        assert observed.finished == 0
        gate.set()
        drive(SYNC, lambda: until_end(connection))
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}


@both
def test_a_dropped_connection_is_abandoned(observed: Observed, play: Play, runtime: Runtime) -> None:
    """A connection that the garbage collector finds has abandoned its calls."""
    api = play(Turn(answer(), **HELD))

    async def main() -> None:
        client = client_of(runtime, api)
        connection = await settle(client.responses.connect().enter())
        socket = connection._connection
        await send(connection)
        await receive(connection, 6)
        del connection
        gc.collect()
        await asyncio.sleep(0) if runtime is ASYNCIO else None
        await asyncio.to_thread(observed.span) if runtime is ASYNCIO else observed.span()
        await settle(socket.close())
        await settle(client.close())

    runtime.drive(main)
    expected = {"outcome": "abandoned", "error": "stream_abandoned", "source": "retrieval"}
    assert told(observed.span()) == expected


@both
def test_not_stored_and_lost_responses_have_their_reason(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """A response with `store=False` is not asked for; one that the server has lost is `not_found`."""
    api = play()
    api._turn = by_model(private=Turn(answer(), **HELD), lost=Turn(answer(), **HELD, fate="lost"))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, store=False, model="private", stream_id="a")
            await send(connection, model="lost", stream_id="b")
            await receive(connection, 12)

    runtime.drive(main)
    spans = observed.spans(2)
    assert told(of_model(spans, "private"))["missing"] == "not_stored"
    assert told(of_model(spans, "lost"))["missing"] == "not_found"
    assert observed.calls() == {"not_stored": 1, "not_found": 1}


@both
def test_usage_that_is_shown_later_is_counted(observed: Observed, play: Play, runtime: Runtime) -> None:
    """The application's own `retrieve` of a response whose usage is unknown is used, once."""
    api = play(Turn(answer(), **HELD))

    async def main() -> None:
        async with entered(client_of(runtime, api)) as client:
            async with entered(client.responses.connect()) as connection:
                await send(connection, store=False)
                first = await receive(connection, 6)
            for record in api._records.values():
                record.asked = {**record.asked, "store": True}
            for _ in range(2):
                await settle(client.responses.retrieve(first[0].response.id))

    runtime.drive(main)
    assert told(observed.span())["missing"] == "not_stored"
    assert_counted_once(observed, *(response["usage"] for response in api.stored.values()))
    (late,) = observed.points("openai_responses.late_usage")
    assert late.value == 1


# Errors


@both
def test_a_refused_create_leaves_the_others_alone(observed: Observed, play: Play, runtime: Runtime) -> None:
    """On each lane an error ends the create that it answers, and the next create goes on."""
    refusal = error("No such model.", "model_not_found", 404)
    api = play()
    api._turn = by_model(
        bad=Turn(refusal=refusal), good=Turn(answer(1)), **{"also-good": Turn(answer(2), pace=0.001)}
    )

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            for lane in ({}, {"stream_id": "x"}):
                for model in ("good", "bad", "also-good"):
                    await send(connection, model=model, **lane)
            ended = 0
            while ended < 6:
                ended += kind(await settle(connection.recv())) in TERMINAL

    runtime.drive(main)
    spans = observed.spans(6)
    outcomes = {
        (span.attributes["gen_ai.request.model"], told(span).get("lane"), told(span)["outcome"])
        for span in spans
    }
    assert outcomes == {
        (model, lane, outcome)
        for lane in (None, "x")
        for model, outcome in (("good", "completed"), ("bad", "error"), ("also-good", "completed"))
    }
    for span in spans:
        if told(span)["outcome"] == "completed":
            assert_exact(span, api)


def test_a_create_that_is_refused_at_once_does_not_end_the_one_that_runs(
    observed: Observed, play: Play
) -> None:
    """A server without a queue answers a second create by an error, while the first response goes on."""
    busy = json.dumps(error("A response is in progress.", "concurrent_response"))
    gate = threading.Event()
    api = play(Turn(answer(1), cut_after=6, end=Wait(gate)))

    async def main() -> None:
        async with (
            entered(client_of(SYNC, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, model="first")
            await receive(connection, 6)
            # The server of this test would queue it, so it is only noted here.
            socket = connection._connection
            tapped, swallow = socket.send, _swallowing(socket)
            swallow(tapped, json.dumps({**CREATE, "model": "second"}))
            first_connection(api).send_now(busy)
            assert kind(await settle(connection.recv())) == "error"
            gate.set()
            await until_end(connection)

    SYNC.drive(main)
    spans = observed.spans(2)
    assert told(of_model(spans, "first")) == {"outcome": "completed", "source": "stream"}
    assert_exact(of_model(spans, "first"), api)
    assert told(of_model(spans, "second"))["outcome"] == "error"
    assert told(of_model(spans, "second"))["error"] == "concurrent_response"


def _swallowing(socket: Any) -> Callable[[Callable[..., Any], str], None]:
    """Send a message through the tap, but not to the server."""

    def send(tapped: Callable[..., Any], message: str) -> None:
        protocol = socket.protocol
        original = protocol.send_text
        protocol.send_text = lambda *_, **__: None
        try:
            tapped(message)
        finally:
            protocol.send_text = original

    return send


@both
def test_a_connection_error_ends_what_it_closes(observed: Observed, play: Play, runtime: Runtime) -> None:
    """An error without a lane belongs to no lane; the close that follows ends all calls."""
    api = play(Turn(answer(), **HELD))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            for lane in "ab":
                await send(connection, stream_id=lane)
            await receive(connection, 12)
            limit = error("Reached 60 minutes.", "websocket_connection_limit_reached")
            first_connection(api).send_now(limit)
            first_connection(api).end_now(Close(1000))
            await drain(connection)

    runtime.drive(main)
    for span in observed.spans(2):
        assert told(span)["outcome"] == "truncated"
        assert_exact(span, api)


@both
def test_a_message_that_cannot_be_sent_is_an_error(observed: Observed, play: Play, runtime: Runtime) -> None:
    """A create over a connection that is closed raises, and its call says what."""
    api = play()

    async def main() -> None:
        async with entered(client_of(runtime, api)) as client:
            connection = await settle(client.responses.connect().enter())
            await settle(connection.close())
            with pytest.raises(Exception, match="received 1000"):
                await send(connection)

    runtime.drive(main)
    told_of = told(observed.span())
    assert told_of == {"outcome": "error", "error": "ConnectionClosedOK", "missing": "no_response_id"}


@both
def test_a_terminal_event_alone_is_an_answer(observed: Observed, play: Play, runtime: Runtime) -> None:
    """A server may send a response in one event, failed or completed. The next create has its own answer."""
    last = len(answer().events()) - 1
    api = play(
        Turn(answer(1, ending=FAILED), first_event=len(answer(ending=FAILED).events()) - 1),
        Turn(answer(2), first_event=last),
        Turn(answer(3)),
    )

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            for n in range(3):
                await send(connection, model=f"m{n}")
            for _ in range(3):
                await until_end(connection)

    runtime.drive(main)
    spans = observed.spans(3)
    assert [told(span)["outcome"] for span in spans] == ["failed", "completed", "completed"]
    assert [span.name for span in spans] == ["chat m0", "chat m1", "chat m2"]
    for span in spans:
        assert_exact(span, api)


@both
def test_an_error_and_a_failed_response_are_one_answer(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """Some servers send an `error` event and `response.failed` after it. The next create is not failed."""
    gone = answer(1, ending=FAILED)
    failed = json.dumps(gone.events()[-1])
    api = play(
        Turn(answer(1), cut_after=6, end=None, refusal=error("No.", "bad")),
        Turn(answer(2), extra={0: (failed,)}),
    )

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, model="bad")
            await send(connection, model="good")
            for _ in range(3):
                await until_end(connection)

    runtime.drive(main)
    spans = observed.spans(2)
    assert told(of_model(spans, "bad"))["outcome"] == "error"
    assert told(of_model(spans, "good"))["outcome"] == "completed"
    assert_exact(of_model(spans, "good"), api)


@both
@pytest.mark.parametrize("is_stored", [True, False])
def test_an_error_that_does_not_end_the_response(
    observed: Observed, play: Play, runtime: Runtime, is_stored: bool
) -> None:
    """A server may answer another message of the application by an error, and go on with the response.

    The error ends the call. The usage in the terminal event is used all the same, once.
    """
    gate = threading.Event()
    api = play(
        Turn(
            answer(),
            extra={7: (error("Unknown type.", "invalid_value"),)},
            cut_after=9,
            end=Wait(gate),
            fate="stuck",
        )
    )

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection, store=is_stored)
            assert kind((await until_end(connection))[-1]) == "error"
            gate.set()
            assert kind((await until_end(connection))[-1]) == "response.completed"

    runtime.drive(main)
    usage = {"source": "observation"} if is_stored else {"missing": "not_stored"}
    assert told(observed.span()) == {"outcome": "error", "error": "invalid_value", **usage}
    assert_counted_once(observed, *(response["usage"] for response in api.stored.values()))
    assert len(observed.points("openai_responses.late_usage")) == (not is_stored)
    assert_unharmed(observed)


UNASKED: tuple[str | bytes, ...] = (
    '{"type":"keepalive"}',
    '{"type":"codex.rate_limits","plan":{"x":1}}',
    "no json",
    b"\xff\xfe",
    "[]",
    "null",
    '"text"',
    '{"type":5}',
    "{}",
    '{"type":"response.output_text.delta","delta":"x","stream_id":"nobody"}',
    '{"type":"response.created","response":{"id":"resp_nobody"},"stream_id":"nobody"}',
    '{"type":"response.completed","response":{"id":"resp_x","usage":{"input_tokens":9}},"stream_id":"nobody"}',
    '{"type":"error","error":{"code":"x"},"stream_id":"nobody"}',
    '{"type":"response.steer.accepted","steer":{"id":"s","previous_response_id":"resp_nobody"}}',
)


@both
def test_what_nobody_asked_for_harms_nothing(observed: Observed, play: Play, runtime: Runtime) -> None:
    """Before, within and after a response: no call is made of it, none is changed, and all is received."""
    api = play(Turn(answer(), extra={0: UNASKED, 7: UNASKED, 12: UNASKED}))

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            created = '{"type":"response.created","response":{"id":"resp_early","previous_response_id":null}}'
            done = '{"type":"response.completed","response":{"id":"resp_early","usage":{"input_tokens":9}}}'
            first_connection(api).send_now(*UNASKED, created, done)
            for _ in range(len(UNASKED) + 2):
                await settle(connection._connection.recv())
            await send(connection)
            for _ in range(20 + 3 * len(UNASKED)):
                await settle(connection._connection.recv())
            first_connection(api).send_now(*UNASKED)
            for _ in range(len(UNASKED)):
                await settle(connection._connection.recv())

    runtime.drive(main)
    span = observed.span()
    assert told(span) == {"outcome": "completed", "source": "stream"}
    assert (span.attributes or {})["openai_responses.stream.deltas"] == 12
    assert_exact(span, api)
    assert_unharmed(observed)


def test_a_response_that_another_overtakes_is_not_mistaken_for_it(observed: Observed, play: Play) -> None:
    """A server that runs two creates of one lane at a time gives each of them its own usage."""
    first, second = (answer(n, id=new_id()) for n in (1, 2))
    api = play()
    texts = [json.dumps(event) for event in first.events()], [json.dumps(event) for event in second.events()]

    async def main() -> None:
        async with (
            entered(client_of(SYNC, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            api.begin(Turn(first), {}), api.begin(Turn(second), {})
            socket = connection._connection
            for model in ("first", "second"):
                _swallowing(socket)(socket.send, json.dumps({**CREATE, "model": model}))
            first_connection(api).send_now(texts[0][0], texts[1][0], texts[0][-1], texts[1][-1])
            await receive(connection, 4)

    SYNC.drive(main)
    spans = observed.spans(2)
    assert of_model(spans, "second").attributes["gen_ai.response.id"] == second.id
    for span in spans:
        assert_exact(span, api)


def test_ids_that_change_with_every_event(observed: Observed, play: Play) -> None:
    """A proxy may encrypt the id anew in each event: it is one response all the same."""
    api = play()
    texts = []
    for number, event in enumerate(answer(id="resp_x").events()):
        texts.append(json.dumps(event).replace("resp_x", f"resp_{number}"))

    async def main() -> None:
        async with (
            entered(client_of(SYNC, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            socket = connection._connection
            _swallowing(socket)(socket.send, json.dumps(CREATE))
            first_connection(api).send_now(*texts)
            await until_end(connection)

    SYNC.drive(main)
    span = observed.span()
    assert told(span) == {"outcome": "completed", "source": "stream"}
    assert token_attributes(span) == usage_attributes(dict(answer().usage or {}))


# Reconnecting


needs_reconnect = pytest.mark.skipif("manager" not in TURNS, reason="not in this release of the SDK")


@needs_reconnect
@both
@pytest.mark.parametrize(
    "end",
    [pytest.param(Close(1001), marks=since(3, 54)), Close(1011), Close(1012), Cut(), Cut("rst")],
    ids=str,
)
def test_a_reconnect_ends_what_was_in_flight_and_goes_on(
    observed: Observed, play: Play, runtime: Runtime, end: Any
) -> None:
    """The lost response is told and looked up; creates of the new connection are seen."""
    api = play(Turn(answer(1), cut_after=6, end=end), Turn(answer(2)))
    tracer = observed.tracer_provider.get_tracer("app")
    tasks = []

    async def main() -> None:
        connection: Any = None

        def on_reconnecting(event: Any) -> Any:
            with tracer.start_as_current_span("sending"):
                sent = connection.send({**CREATE, "model": "next"})
                if sent is not None:
                    tasks.append(asyncio.ensure_future(sent))
            return {"extra_headers": {"x-attempt": str(event.attempt)}}

        async with entered(client_of(runtime, api)) as client:
            connect = client.responses.connect(on_reconnecting=on_reconnecting, initial_delay=0.01)
            async with entered(connect) as connection:
                await send(connection, model="lost")
                async for event in items(connection):
                    if event.type in TERMINAL:
                        break

    runtime.drive(main)
    spans = [span for span in observed.spans(3) if span.name.startswith("chat")]
    assert told(of_model(spans, "lost"))["outcome"] in ("cut", "truncated")
    assert told(of_model(spans, "next")) == {"outcome": "completed", "source": "stream"}
    sending = next(span for span in observed.spans(3) if span.name == "sending")
    assert of_model(spans, "next").parent == sending.context
    for span in spans:
        assert_exact(span, api)
    assert_unharmed(observed)


@needs_reconnect
@both
def test_a_refused_reconnect_leaves_nothing_open(observed: Observed, play: Play, runtime: Runtime) -> None:
    """If the SDK gives up, what was in flight has ended at the first close."""
    api = play(Turn(answer(1), cut_after=6, end=Close(1011)))

    async def main() -> None:
        async with entered(client_of(runtime, api)) as client:
            manager = client.responses.connect(
                on_reconnecting=lambda _: None, initial_delay=0.01, max_retries=2
            )
            async with entered(manager) as connection:
                api.refusals += [503] * 9
                await send(connection)
                with pytest.raises(Exception, match="1011"):
                    await drain(connection)

    runtime.drive(main)
    assert told(observed.span())["outcome"] == "cut"
    assert_unharmed(observed)


# Look-ups


@both
def test_a_look_up_has_the_credentials_of_the_connection(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """Keys, organisation, project, default headers and query of the handshake; nothing of the protocol."""
    api = play(Turn(answer(), **HELD), key="dynamic")

    def key() -> Any:
        async def later() -> str:
            return "dynamic"

        return "dynamic" if runtime is SYNC else later()

    async def main() -> None:
        client = client_of(
            runtime,
            api,
            api_key=key if SDK >= (3, 20) else "dynamic",  # before, it is not called for a WebSocket
            organization="org-1",
            project="proj-1",
            default_headers={"x-route": "gateway"},
        )
        connect = client.responses.connect(
            extra_headers={"x-tenant-key": "tenant", "traceparent": "00-1-2-3"}, extra_query={"version": "7"}
        )
        async with entered(client), entered(connect) as connection:
            await send(connection)
            await receive(connection, 6)

    runtime.drive(main)
    assert told(observed.span()) == {"outcome": "closed", "source": "retrieval"}
    (request,) = api.gets
    headers = {name.lower(): value for name, value in request.headers.raw_items()}
    expected = {
        "authorization": "Bearer dynamic",
        "x-tenant-key": "tenant",
        "accept": "application/json",
    }
    if SDK >= (3, 20):  # before, the connection has no default headers
        expected |= {"openai-organization": "org-1", "openai-project": "proj-1", "x-route": "gateway"}
    assert expected.items() <= headers.items()
    unwanted = ("sec-websocket", "upgrade", "connection", "content", "traceparent")
    assert [name for name in headers if name.startswith(unwanted)] in ([], ["connection"])
    assert request.path.endswith("?version=7")
    assert headers.get("connection", "keep-alive").lower() != "upgrade"


@both
def test_azure_and_other_base_urls(observed: Observed, play: Play, runtime: Runtime) -> None:
    """An Azure client is Azure's, and its look-up has the query of the API version and its key."""
    api = play(Turn(answer(), **HELD))
    kinds = {SYNC: openai.AzureOpenAI, ASYNCIO: openai.AsyncAzureOpenAI}

    async def main() -> None:
        websocket = api.url.replace("http", "ws", 1)
        client = kinds[runtime](
            base_url=api.url, websocket_base_url=websocket, api_key="k", api_version="2026-01-01"
        )
        connect = client.responses.connect(extra_query={"api-version": "2026-01-01"})
        async with entered(client), entered(connect) as connection:
            await send(connection)
            await receive(connection, 6)

    runtime.drive(main)
    span = observed.span()
    assert told(span) == {"outcome": "closed", "source": "retrieval"}
    assert (span.attributes or {})["gen_ai.provider.name"] == "azure.ai.openai"
    (request,) = api.gets
    if SDK >= (3, 20):  # before, it sends no header of Azure's
        assert request.headers["api-key"] == "k"
    assert request.path.endswith("?api-version=2026-01-01")


@both
def test_a_base_url_for_the_websocket_alone(observed: Observed, play: Play, runtime: Runtime) -> None:
    """`websocket_base_url` is the server that is told, and that is asked."""
    api = play(Turn(answer(), **HELD))
    port = api.url.rpartition(":")[2].partition("/")[0]

    async def main() -> None:
        client = client_of(
            runtime, api, base_url="http://127.0.0.1:9/v1", websocket_base_url=f"ws://127.0.0.1:{port}/v1/"
        )
        async with entered(client), entered(client.responses.connect()) as connection:
            await send(connection)
            await receive(connection, 6)

    runtime.drive(main)
    span = observed.span()
    assert told(span) == {"outcome": "closed", "source": "retrieval"}
    assert (span.attributes or {})["server.port"] == int(port)


def test_a_client_whose_transport_is_not_known_is_seen(observed: Observed, play: Play) -> None:
    """Without a way to look up, the calls are recorded all the same."""
    api = play(Turn(answer(1)), Turn(answer(2), **HELD))
    client = client_of(SYNC, api)

    class Strange:
        """An HTTP client with nothing of the library's inside."""

        def close(self) -> None:
            pass

    client._client.close()
    client._client = Strange()
    with client.responses.connect() as connection:
        for n in range(2):
            connection.send({**CREATE, "model": f"m{n}"})
        drive(SYNC, lambda: until_end(connection))
        drive(SYNC, lambda: receive(connection, 6))
    spans = observed.spans(2)
    assert told(of_model(spans, "m0")) == {"outcome": "completed", "source": "stream"}
    assert told(of_model(spans, "m1")) == {"outcome": "closed", "missing": "transport_error"}


# Neighbours


INFERENCE = {"gen_ai.operation.name": "chat", "gen_ai.request.model": MODEL}


@both
def test_beside_another_instrumentation(observed: Observed, play: Play, runtime: Runtime) -> None:
    """In the span of an inference there is no second one; after an early end there is a usage span below."""
    api = play(Turn(answer(1)), Turn(answer(2), **HELD))
    tracer = observed.tracer_provider.get_tracer("theirs")

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            with tracer.start_as_current_span("whole", attributes=INFERENCE):
                await send(connection)
                await until_end(connection)
            with tracer.start_as_current_span("early", attributes=INFERENCE):
                await send(connection)
                await receive(connection, 6)

    runtime.drive(main)
    by_name = {span.name: span for span in observed.spans(3)}
    whole = dict(by_name["whole"].attributes or {})
    assert whole["openai_responses.stream.outcome"] == "completed"
    assert whole["openai_responses.usage.source"] == "stream"
    usage_span = by_name[f"usage {MODEL}"]
    assert usage_span.parent == by_name["early"].context
    assert told(usage_span) == {"outcome": "closed", "source": "retrieval"}
    assert_counted_once(observed, *(response["usage"] for response in api.stored.values()))
    assert observed.calls() == {"stream": 1, "retrieval": 1}


def test_suppressed_and_unsampled_calls_have_no_span(instrument: Instrument, play: Play) -> None:
    """What the application suppresses at the send is not told; without a sample there are metrics alone."""
    api = play()
    observed = Observed()
    observed.tracer_provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    instrument(observed)
    with client_of(SYNC, api) as client, client.responses.connect() as connection:
        for n in range(3):
            with suppress_instrumentation() if n == 1 else contextlib.nullcontext():
                connection.send({**CREATE, "model": f"m{n}"})
        for _ in range(3):
            drive(SYNC, lambda: until_end(connection))
    assert observed.finished == 0
    assert observed.calls() == {"stream": 2}
    first, _, last = (response["usage"] for response in api.stored.values())
    assert_counted_once(observed, first, last)


@both
def test_a_connection_made_under_suppression_is_seen_later(
    observed: Observed, play: Play, runtime: Runtime
) -> None:
    """Suppression counts where a create is sent, and not where the connection was opened."""
    api = play()

    async def main() -> None:
        async with entered(client_of(runtime, api)) as client:
            with suppress_instrumentation():
                connection = await settle(client.responses.connect().enter())
            await send(connection)
            await until_end(connection)
            await settle(connection.close())

    runtime.drive(main)
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}


# Switching on and off


@both
def test_uninstrument_puts_back_and_ends(instrument: Instrument, play: Play, runtime: Runtime) -> None:
    """With open connections: their methods are the library's again, and their calls have ended."""
    observed = instrument()
    gate = threading.Event()
    api = play(Turn(answer(1), cut_after=6, end=Wait(gate)), Turn(answer(2)))

    async def main() -> None:
        async with entered(client_of(runtime, api)) as client:
            options = {"on_reconnecting": lambda _: None} if "manager" in TURNS else {}
            async with entered(client.responses.connect(**options)) as connection:
                socket = connection._connection
                assert "recv" in vars(socket)
                await send(connection)
                await receive(connection, 6)
                await asyncio.to_thread(ResponsesUsageInstrumentor().uninstrument)
                assert not {"send", "recv", "close"} & vars(socket).keys()
                if "manager" in TURNS:
                    assert connection._make_ws.__name__ == "_connect_ws"
                gate.set()
                await until_end(connection)
                await send(connection)
                assert len(await until_end(connection)) == 20

    asyncio.run(main()) if runtime is ASYNCIO else asyncio.run(_sync_in_loop(main))
    assert told(observed.span()) == {"outcome": "exit", "error": "process_exit", "source": "retrieval"}


async def _sync_in_loop(main: Callable[[], Awaitable[None]]) -> None:
    await main()


def test_a_connection_is_tapped_once(observed: Observed, play: Play) -> None:
    """A second `instrument()` changes nothing, and a connection has one layer."""
    api = play()
    ResponsesUsageInstrumentor().instrument()
    with client_of(SYNC, api) as client, client.responses.connect() as connection:
        connection.send(CREATE)
        drive(SYNC, lambda: until_end(connection))
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}
    assert observed.calls() == {"stream": 1}


def test_a_provider_that_comes_after_the_connection(play: Play) -> None:
    """A connection that is opened before there is an OpenTelemetry SDK is seen from then on."""
    script = Path(__file__).with_name("sockets_late_provider.py")
    api = play()
    done = subprocess.run(  # noqa: S603  # our own file
        [sys.executable, script, api.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["chat", "late"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_tells_nothing_of_the_parents_calls(observed: Observed, play: Play) -> None:
    """The parent goes on with its connection, and the child has ended no call of it."""
    gate = threading.Event()
    api = play(Turn(answer(), cut_after=6, end=Wait(gate)))
    with client_of(SYNC, api) as client, client.responses.connect() as connection:
        connection.send(CREATE)
        drive(SYNC, lambda: receive(connection, 6))
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                ResponsesUsageInstrumentor().uninstrument()
                status = observed.finished
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        gate.set()
        drive(SYNC, lambda: until_end(connection))
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}
