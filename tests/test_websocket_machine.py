"""WebSockets opened, used on several lanes, steered, cancelled, closed, broken and dropped in any order.

A state machine uses a sync and an async client, and looks afterwards whether every response is accounted for.
`MACHINE_EXAMPLES=2000` makes it run longer, and differently every time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from opentelemetry.sdk.trace import ReadableSpan

from embedded.answer import COMPLETED, FAILED, OUT_OF_TOKENS, Answer, Json, usage
from embedded.http_server import Cut, Wait
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from otel_responses_usage._call.invocation import Invocation
from otel_responses_usage._lookup.retrieval import RetrievalPolicy
from sockets import CREATE, HAS_SESSIONS, TERMINAL, needs_websocket
from test_machine import TLS
from test_machine import Complaints as AllComplaints

pytestmark = [
    needs_websocket,
    pytest.mark.skipif(not HAS_SESSIONS, reason="this release of the SDK has no lanes or no steering"),
]

if needs_websocket.args[0] is False:
    from embedded.websocket_api import Close, Turn, WebSocketAPI, error

LONG = int(os.environ.get("MACHINE_EXAMPLES", "0"))
LANES = (None, None, "a", "b", "c")
QUIET_S = 0.03  # after so long a silence nothing more arrives
# Small limits, since the library waits for the peer when it closes.
OPTIONS: dict[str, Any] = {"close_timeout": 0.3, "max_queue": None, "ping_interval": None}
UNASKED = (
    '{"type":"keepalive"}',
    "no json",
    '{"type":"response.output_text.delta","delta":"x","stream_id":"nobody"}',
    '{"type":"response.completed","response":{"id":"resp_x","usage":{"input_tokens":9}},"stream_id":"nobody"}',
    '{"type":"response.steer.accepted","steer":{"id":"s","previous_response_id":"resp_nobody"}}',
)


class Complaints(AllComplaints):
    """The same without the story of each call, which is told at DEBUG."""

    def emit(self, record: logging.LogRecord) -> None:
        if "fault" in record.msg or record.levelno > logging.DEBUG:
            super().emit(record)


@dataclass(frozen=True)
class Behaviour:
    """What the server makes of one response."""

    ending: Any
    refused: bool
    held: bool  # it waits half-way until it is released
    fate: Any
    first_event: int  # the events before it are not sent


behaviours = st.builds(
    Behaviour,
    ending=st.sampled_from((COMPLETED, COMPLETED, OUT_OF_TOKENS, FAILED)),
    refused=st.sampled_from((False,) * 5 + (True,)),
    held=st.booleans(),
    fate=st.sampled_from(("kept", "kept", "kept", "lost")),
    first_event=st.sampled_from((0, 0, 0, 1, 9)),
)


@dataclass(eq=False)
class Asked:
    """A response that the application has asked for."""

    number: int
    behaviour: Behaviour
    stored: bool
    lane: str | None
    gate: threading.Event = field(default_factory=threading.Event)
    ids: list[str] = field(default_factory=list)  # of the response and its successors, as received
    ended: list[str] = field(default_factory=list)  # the types of terminal events, as received
    runs: int = 0  # on the server

    @property
    def model(self) -> str:
        return f"m-{self.number}"

    def turn(self) -> Any:
        """What the server does: each successor has an id and a usage of its own."""
        run, self.runs = self.runs, self.runs + 1
        counts = usage(10_000 + 10 * self.number + run, 20_000 + 10 * self.number + run)
        answer = Answer(("one ", "two ", "three "), counts, ending=self.behaviour.ending)
        answer = dataclasses.replace(answer, id=f"resp_{self.number}_{run}")
        if self.behaviour.refused and not run:
            return Turn(answer, refusal=error("No.", "refused"))
        held = {"cut_after": 6, "end": Wait(self.gate)} if self.behaviour.held and not run else {}
        first = min(self.behaviour.first_event, len(answer.events()) - 1)
        if self.behaviour.ending is FAILED:
            first = 0  # alone, it could belong to an `error` before it
        return Turn(answer, fate=self.behaviour.fate, first_event=first, **held)


@dataclass(eq=False)
class Connection:
    """A connection in the application's hands."""

    is_async: bool
    sdk: Any
    server: Any
    is_closed: bool = False
    asked: list[Asked] = field(default_factory=list)

    def __str__(self) -> str:
        return "async" if self.is_async else "sync"


class Application(RuleBasedStateMachine):
    def __init__(self, api: Any) -> None:
        super().__init__()
        self.api = api

    @initialize(retrieval=st.sampled_from((True, True, False)))
    def begin(self, retrieval: bool) -> None:
        gc.collect()
        self.connections: list[Connection] = []
        self.asked: dict[str, Asked] = {}
        self.api.connections.clear()
        self.api._turn = lambda asked: self.asked[asked["model"]].turn()
        self.complaints = Complaints()
        logging.getLogger().addHandler(self.complaints)
        logging.getLogger("otel_responses_usage").setLevel(logging.DEBUG)
        self.observed = Observed()
        self.config = Config(retrieval=retrieval, exit_timeout=5.0)
        ResponsesUsageInstrumentor().instrument(
            tracer_provider=self.observed.tracer_provider,
            meter_provider=self.observed.meter_provider,
            config=self.config,
        )
        self.loop = asyncio.new_event_loop()
        options: dict[str, Any] = {"base_url": self.api.url, "api_key": "k", "max_retries": 0}
        self.sync = openai.OpenAI(**options, http_client=openai.DefaultHttpxClient(verify=TLS))
        self.asynchronous = openai.AsyncOpenAI(
            **options, http_client=openai.DefaultAsyncHttpxClient(verify=TLS)
        )
        for is_async in (False, True):
            self.connect(is_async=is_async)

    @property
    def open(self) -> list[Connection]:
        return [connection for connection in self.connections if not connection.is_closed]

    has_open = precondition(lambda self: self.open)

    @precondition(lambda self: len(self.open) < 3)
    @rule(is_async=st.booleans())
    def connect(self, is_async: bool) -> None:
        before = len(self.api.connections)
        client = self.asynchronous if is_async else self.sync
        opened = client.responses.connect(websocket_connection_options=OPTIONS).enter()
        sdk = self.loop.run_until_complete(opened) if is_async else opened
        eventually(lambda: len(self.api.connections) > before, "the server's side")
        self.connections.append(Connection(is_async, sdk, self.api.connections[-1]))

    @has_open
    @rule(
        data=st.data(),
        creates=st.lists(
            st.tuples(behaviours, st.booleans(), st.sampled_from(LANES)), min_size=1, max_size=5
        ),
        count=st.sampled_from((0, 1, 7, 30, 99)),
    )
    def create(
        self, data: st.DataObject, creates: list[tuple[Behaviour, bool, str | None]], count: int
    ) -> None:
        """Several at once, and then some reading."""
        connection = data.draw(st.sampled_from(self.open))
        for behaviour, stored, lane in creates:
            asked = Asked(len(self.asked), behaviour, stored, lane)
            self.asked[asked.model] = asked
            connection.asked.append(asked)
            message = {**CREATE, "model": asked.model, "store": stored}
            message |= {"stream_id": lane} if lane else {}
            with contextlib.suppress(Exception):  # the server may have closed the connection
                self._do(connection, lambda message=message: connection.sdk.send(message))
        self._read(connection, count)

    @has_open
    @rule(data=st.data(), count=st.sampled_from((1, 8, 99)))
    def read(self, data: st.DataObject, count: int) -> None:
        self._read(data.draw(st.sampled_from(self.open)), count)

    @precondition(lambda self: any(connection.is_async for connection in self.open))
    @rule()
    def cancel_a_read(self) -> None:
        connection = next(connection for connection in self.open if connection.is_async)

        async def cancel() -> None:
            task = asyncio.ensure_future(connection.sdk.recv_bytes())
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                self._note(connection, await task)

        self.loop.run_until_complete(cancel())

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), count=st.sampled_from((0, 9, 99)))
    def release(self, data: st.DataObject, count: int) -> None:
        """Let the server go on with a response, and read."""
        asked = data.draw(st.sampled_from(list(self.asked.values())))
        asked.gate.set()
        for connection in self.open:
            if asked in connection.asked:
                self._read(connection, count)

    @has_open
    @rule(data=st.data())
    def steer(self, data: st.DataObject) -> None:
        """Also a response that has ended, and one that does not exist."""
        connection = data.draw(st.sampled_from(self.open))
        ids = [response_id for asked in connection.asked for response_id in asked.ids] or ["resp_nobody"]
        previous_id = data.draw(st.sampled_from(ids))
        with contextlib.suppress(Exception):
            self._do(
                connection, lambda: connection.sdk.response.steer(input="x", previous_response_id=previous_id)
            )
        if data.draw(st.booleans()):
            for asked in connection.asked:
                asked.gate.set()
            self._read(connection, 99)

    @has_open
    @rule(data=st.data())
    def send_what_nobody_asked_for(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.open))
        with contextlib.suppress(Exception):
            connection.server.send_now(*UNASKED)

    @has_open
    @rule(data=st.data(), end=st.sampled_from((1000, 1001, 1011, "fin", "rst")))
    def end_by_the_server(self, data: st.DataObject, end: Any) -> None:
        connection = data.draw(st.sampled_from(self.open))
        connection.server.end_now(Cut(end) if isinstance(end, str) else Close(end))
        self._idle()
        self._read(connection, data.draw(st.sampled_from((0, 99))))

    @has_open
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.open))
        connection.is_closed = True
        self._do(connection, connection.sdk.close)

    @has_open
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.open))
        connection.is_closed = True
        socket, connection.sdk = connection.sdk._connection, None
        gc.collect()
        # Later the peer leaves, so that the library lets go of it, too.
        connection.server.end_now(Cut())
        self._do(connection, socket.close)

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            for asked in self.asked.values():
                asked.gate.set()
            for connection in self.open:
                connection.is_closed = True
                self._do(connection, connection.sdk.close)
            self._check()
        finally:
            if ResponsesUsageInstrumentor().is_instrumented_by_opentelemetry:
                ResponsesUsageInstrumentor().uninstrument()
            self.sync.close()
            self.loop.run_until_complete(self.asynchronous.close())
            self.loop.close()
            logging.getLogger().removeHandler(self.complaints)
            logging.getLogger("otel_responses_usage").setLevel(logging.NOTSET)

    # --- what must hold ---

    def _check(self) -> None:
        eventually(lambda: self.observed.pending() == 0, "nothing pending")
        at_least = sum(1 + max(0, len(asked.ids) - 1) for asked in self.asked.values())
        eventually(lambda: self.observed.finished >= at_least, f"{at_least} spans")
        spans = self.observed.spans(self.observed.finished)
        by_model: dict[str, list[ReadableSpan]] = {model: [] for model in self.asked}
        for span in spans:
            by_model[str((span.attributes or {})["gen_ai.request.model"])].append(span)
        known = []
        for model, asked in self.asked.items():
            known += self._check_spans(asked, sorted(by_model[model], key=lambda span: span.start_time or 0))
        tokens = self.observed.tokens()
        sums = [sum(counts[name] for counts in known) for name in ("input_tokens", "output_tokens")]
        wanted = {"input": (len(known), sums[0]), "output": (len(known), sums[1])} if known else {}
        assert tokens == wanted
        assert sum(self.observed.calls().values()) == len(spans)
        assert self.observed.points("openai_responses.faults") == []
        assert self.complaints.lines == []
        del spans, by_model
        ResponsesUsageInstrumentor().uninstrument()
        self.connections.clear()
        gc.collect()
        left = [thing for thing in gc.get_objects() if isinstance(thing, Invocation)]
        assert left == []

    def _check_spans(self, asked: Asked, spans: list[ReadableSpan]) -> list[Json]:
        """Check the spans of one create and its successors, and return the usage that they tell.

        What had arrived when the application closed the connection may count, too, if it ends a response.
        """
        assert max(1, len(asked.ids)) <= len(spans) <= max(1, asked.runs), asked
        usages = []
        for run, span in enumerate(spans):
            attributes = dict(span.attributes or {})
            response_id = attributes.get("gen_ai.response.id")
            if run < len(asked.ids):
                assert response_id == asked.ids[run], asked
            else:
                assert response_id in {None, f"resp_{asked.number}_{run}"}, asked
            assert bool(span.links) == bool(run)
            assert attributes.get("openai_responses.stream.lane") == asked.lane
            outcome = attributes["openai_responses.stream.outcome"]
            if run < len(asked.ended):
                assert outcome == asked.ended[run].removeprefix("response."), asked
            elif attributes.get("openai_responses.usage.source") == "stream":
                assert outcome in {ending.removeprefix("response.") for ending in TERMINAL}, asked
            else:
                assert outcome in {"closed", "cancelled", "truncated", "cut", "abandoned", "error"}, asked
            reason = attributes.get("openai_responses.usage.missing_reason")
            if reason is None:
                truth = self.api.stored[str(response_id)]["usage"]
                assert token_attributes(span) == usage_attributes(truth)
                usages.append(truth)
            else:
                assert token_attributes(span) == {}
                assert reason in self._excuses(asked, response_id), asked
        return usages

    def _excuses(self, asked: Asked, response_id: object) -> set[str]:
        if response_id is None:
            return {"no_response_id"}
        excuses = set() if asked.stored else {"not_stored"}
        excuses |= {"disabled"} if not self.config.retrieval else set()
        return excuses | (
            {"not_found", "circuit_open"} if asked.behaviour.fate == "lost" else {"circuit_open"}
        )

    # --- tools ---

    def _do(self, connection: Connection, act: Any) -> Any:
        return self.loop.run_until_complete(act()) if connection.is_async else act()

    def _receive(self, connection: Connection) -> bytes | None:
        """Return the next message; `None` if there is none, or the connection is closed."""
        try:
            if connection.is_async:
                return self.loop.run_until_complete(asyncio.wait_for(connection.sdk.recv_bytes(), QUIET_S))
            return bytes(connection.sdk._connection.recv(timeout=QUIET_S, decode=False))
        except Exception:
            return None

    def _read(self, connection: Connection, count: int) -> None:
        for _ in range(count):
            message = self._receive(connection)
            if message is None:
                break
            self._note(connection, message)

    def _note(self, connection: Connection, message: bytes) -> None:
        """Note what the application has learnt of its responses."""
        with contextlib.suppress(ValueError):
            event = json.loads(message)
            lane, response = event.get("stream_id"), event.get("response") or {}
            if event["type"] == "error":
                asked = next(
                    one
                    for one in connection.asked
                    if one.lane == lane and one.behaviour.refused and not one.ended
                )
                asked.ended.append("error")
            elif str(response.get("id")).startswith("resp_") and response["id"] not in (
                "resp_x",
                "resp_nobody",
            ):
                number = int(response["id"].split("_")[1])
                asked = self.asked[f"m-{number}"]
                assert asked in connection.asked
                if response["id"] not in asked.ids:
                    asked.ids.append(response["id"])
                if event["type"] in TERMINAL:
                    asked.ended.append(event["type"])

    def _idle(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0.005))


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    """One server for all examples."""
    with WebSocketAPI() as api:
        yield api


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the GETs of a look-up no time is lost."""
    policy = RetrievalPolicy(first_wait_s=0.01, longest_wait_s=0.05)
    monkeypatch.setattr("otel_responses_usage._lookup.lookups.RetrievalPolicy", lambda: policy)


@pytest.fixture
def small_heap() -> Iterator[None]:
    """What has been imported is not collected again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("hasty", "small_heap")
def test_whatever_happens_on_websockets_every_response_is_accounted_for(api: Any) -> None:
    """In any order of doings each response is told once, exactly or with its reason, and nothing is left."""
    run_state_machine_as_test(
        functools.partial(Application, api),
        settings=settings(
            max_examples=LONG or 40,
            stateful_step_count=25,
            deadline=None,
            derandomize=not LONG,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[phase for phase in Phase if phase is not Phase.explain],
            report_multiple_bugs=False,
        ),
    )
