"""Streams made, read, closed, dropped, cancelled, resumed and polled in any order.

A state machine uses two clients, a sync and an async one, as an application could, and looks afterwards
whether every response is accounted for. Whatever it does it does twice: watched, and with the
instrumentation suppressed, to an equal response of the same server. What the application sees must be the
same both times.

`MACHINE_EXAMPLES=2000` makes it run longer, and differently every time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import os
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from openai.resources.responses import Responses
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from calls import CAN_RESUME, settle, since
from embedded.answer import COMPLETED, FAILED, OUT_OF_QUOTA, OUT_OF_TOKENS, Answer, Ending, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Send, Step
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from otel_responses_usage._call.invocation import Invocation
from otel_responses_usage._lookup.circuit import CircuitPolicy
from otel_responses_usage._lookup.retrieval import RetrievalPolicy

PATIENCE_S = 30.0
IMPATIENCE_S = 0.3

# One for all clients: to read the authorities takes longer than a call does.
TLS = ssl.create_default_context()

# What a circuit counts.
FUTILE = frozenset({"not_found", "timeout", "transport_error", "no_usage"})


CAN_CANCEL = hasattr(Responses, "cancel")


# --- what the server does ------------------------------------------------------------------------------

GETS: dict[str, Reply | str] = {
    "queued": "queued",
    "in_progress": "in_progress",
    "404": error(404, "not yet"),
    "429": Reply.json({}, 429, headers={"retry-after-ms": "10"}),
    "500": error(500, "broken"),
    "cut": Reply(200, before=(Cut(),)),
}
ENDS: dict[str, Step | None] = {"end": None, "fin": Cut(), "rst": Cut("rst"), "hold": Hold()}


@dataclass(frozen=True)
class Behaviour:
    """What the server makes of one response."""

    ending: Ending
    billed: bool
    sends: int | None  # events; all, if None
    end: str
    clump: int  # events a piece
    fate: Any
    gets: tuple[str, ...]
    charges_late: bool  # if it is cancelled
    resumes: int | None  # events that the first resumed stream gets
    resume_end: str
    refusal: int | None  # of the call itself, with this status
    is_mute: bool = False  # it never begins to answer


behaviours = st.builds(
    Behaviour,
    ending=st.sampled_from((COMPLETED, OUT_OF_TOKENS, FAILED, OUT_OF_QUOTA)),
    billed=st.sampled_from((True, True, True, False)),
    sends=st.none() | st.integers(0, 9),
    end=st.sampled_from(tuple(ENDS)),
    clump=st.sampled_from((1, 3, 99)),
    fate=st.sampled_from(("kept", "kept", "lost", "stuck")),
    gets=st.lists(st.sampled_from(tuple(GETS)), max_size=2).map(tuple),
    charges_late=st.booleans(),
    resumes=st.none() | st.integers(0, 9),
    resume_end=st.sampled_from(("end", "fin", "hold")),
    refusal=st.sampled_from((None,) * 7 + (400, 503)),
)


@dataclass(frozen=True)
class Sent:
    """What the server has put on the way."""

    events: int
    pieces: int
    holds: bool


class Server:
    """The Responses API, with a behaviour for each model."""

    def __init__(self) -> None:
        self.http = ScriptedServer(self._reply)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.http.exchanges.clear()
        self.sent: dict[str, Sent] = {}  # by model, or by id where a stream is resumed
        self._plans: dict[str, tuple[Plan, Behaviour]] = {}
        self._resumes: dict[str, Behaviour] = {}
        self._api = ResponsesAPI(lambda request: self._plans[request.json["model"]][0])

    def expect(self, model: str, plan: Plan, behaviour: Behaviour) -> None:
        """Answer a call for this model like that."""
        self._plans[model] = plan, behaviour
        self._resumes[plan.answer.id] = behaviour

    def _reply(self, request: SeenRequest) -> Reply:
        if request.method == "POST" and request.path.endswith("/responses"):
            model = request.json["model"]
            behaviour = self._plans[model][1]
            if behaviour.refusal is not None:
                return error(behaviour.refusal, "no", code="refused")
            reply = self._noted(model, self._api(request), behaviour.clump)
            return dataclasses.replace(reply, before=(Hold(),)) if behaviour.is_mute else reply
        reply = self._api(request)
        response_id = request.path.rpartition("/")[2]
        if request.query.get("stream") != "true" or reply.status != 200:
            return reply
        first = self._resumes.pop(response_id, None)
        if first is not None and first.resumes is not None:
            end = ENDS[first.resume_end]
            reply = dataclasses.replace(
                reply, steps=(*reply.steps[: first.resumes], *((end,) if end else ()))
            )
        return self._noted(response_id, reply, 1)

    def _noted(self, name: str, reply: Reply, clump: int) -> Reply:
        if not reply.chunked:
            return reply
        events = [step.data for step in reply.steps if isinstance(step, Send)]
        rest = [step for step in reply.steps if not isinstance(step, Send)]
        pieces = [Send(b"".join(events[at : at + clump])) for at in range(0, len(events), clump)]
        self.sent[name] = Sent(len(events), len(pieces), any(isinstance(step, Hold) for step in rest))
        return dataclasses.replace(reply, steps=(*pieces, *rest))


# --- what the application has --------------------------------------------------------------------------

END = "the end"


def word_of(value: Any) -> str:
    """What is compared of something that the application was given."""
    return str(getattr(value, "type", type(value).__name__))


def word_of_error(raised: BaseException) -> str:
    return f"raised {type(raised).__module__}.{type(raised).__name__}"


class Handle:
    """A stream in the application's hands. Who forgets it has dropped the stream."""

    def __init__(self, source: Any, owner: Any) -> None:
        self._source = source
        self._owner = owner

    async def next(self) -> str:
        try:
            asynchronous = hasattr(self._source, "__anext__")
            return word_of(await anext(self._source) if asynchronous else next(self._source))
        except (StopIteration, StopAsyncIteration):
            return END

    async def close(self) -> None:
        await settle(self._owner.close())


async def enter(manager: Any) -> Any:
    return await settle(manager.__aenter__() if hasattr(manager, "__aenter__") else manager.__enter__())


async def create(client: Any, **asked: Any) -> Handle:
    stream = await settle(client.responses.create(**asked, stream=True))
    return Handle(stream, stream)


async def raw(client: Any, **asked: Any) -> Handle:
    response = await settle(client.responses.with_raw_response.create(**asked, stream=True))
    stream = response.parse()
    return Handle(stream, stream)


async def manager(client: Any, **asked: Any) -> Handle:
    stream = await enter(client.responses.stream(**asked))
    return Handle(stream, stream)


async def iter_bytes(client: Any, **asked: Any) -> Handle:
    response = await enter(client.responses.with_streaming_response.create(**asked, stream=True))
    return Handle(response.iter_bytes(), response)


WAYS: dict[str, Callable[..., Awaitable[Handle]]] = {
    way.__name__: way for way in (create, raw, manager, iter_bytes)
}


@dataclass(eq=False)
class Asked:
    """A response that the application has asked for: watched, and its twin that nobody watches."""

    number: int
    is_async: bool
    behaviour: Behaviour
    stored: bool
    background: bool
    late_charge: dict[str, Any] | None
    models: tuple[str, str]
    answers: tuple[Answer, Answer]
    is_over: bool = False  # as far as the application goes
    has_events: bool = False  # the application has seen one
    is_cancelled: bool = False

    def arguments(self, which: int) -> dict[str, Any]:
        return {
            "model": self.models[which],
            "input": "x",
            "store": self.stored,
            # Not an argument of its own in old releases of the SDK.
            "extra_body": {"background": self.background},
        }

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        return self.models[0]


@dataclass(eq=False)
class Stream:
    """A stream and its twin: of the call that made the response, or of a later one."""

    of: Asked
    way: str
    handles: tuple[Handle, Handle] | None
    left: int  # that can be read without waiting
    holds: bool  # then the server leaves its reader waiting
    is_over: bool = False
    is_closed: bool = False

    @property
    def blocks(self) -> bool:
        return self.holds and not self.is_over

    @property
    def is_comparable(self) -> bool:
        """Whether twins must see the same, event by event."""
        behaviour = self.of.behaviour
        if self.way == "resume":
            return True
        # A reset may swallow some events. Before the last one a piece of several may be divided.
        return behaviour.end != "rst" and (self.way != "iter_bytes" or behaviour.clump == 1)

    def end(self) -> None:
        self.is_over = True
        if self.way != "resume":
            self.of.is_over = True

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(f"<{'async' if self.of.is_async else 'sync'} {self.way} of {self.of}>")


def drive(coroutine: Any) -> Any:
    """Run a coroutine of a sync client, which never really waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a sync client has made its application wait for an event loop")


def in_another_thread(function: Callable[[], Any]) -> Any:
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(function()))
    thread.start()
    thread.join()
    return done[0]


class Complaints(logging.Handler):
    """Log lines of a span ended twice, of a task forgotten, of a fault of our own."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name == "otel_responses_usage"  # and not the story of each call
        text = logging.Formatter().format(record)
        if "asynchronous generator is already running" in text:
            return  # the SDK alone, where streams are dropped, says so too
        if ours or (record.name.startswith(("opentelemetry", "asyncio")) and record.levelno > logging.INFO):
            self.lines.append(f"{record.name}: {text}")


def a(kind: str) -> st.SearchStrategy[Any]:
    """One of those that the machine has of a kind."""
    return st.runner().flatmap(lambda machine: st.sampled_from(getattr(machine, kind)))


# --- what it does with them ----------------------------------------------------------------------------


class Application(RuleBasedStateMachine):
    """An application of two clients, and what must be true of its telemetry whatever it does."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.asked: list[Asked] = []
        self.streams: list[Stream] = []
        self.fetches: Counter[str] = Counter()
        self.numbers = itertools.count(1)

    @initialize(
        patient=st.booleans(),
        retrieval=st.sampled_from((True,) * 5 + (False,)),
        tail_s=st.sampled_from((0.0, 0.0, 0.05)),
        max_pending=st.sampled_from((2048, 2048, 2048, 1)),
        max_concurrency=st.sampled_from((8, 1)),
    )
    def begin(
        self, *, patient: bool, retrieval: bool, tail_s: float, max_pending: int, max_concurrency: int
    ) -> None:
        """Switch on. With patience all is learned that can be, without it some look-ups have no time."""
        self.server.reset()
        self.patient = patient
        patience_s = PATIENCE_S if patient else IMPATIENCE_S
        self.config = Config(
            retrieval=retrieval,
            retrieval_timeout=patience_s,
            background_timeout=patience_s,
            exit_timeout=patience_s,
            tail_timeout=tail_s,
            max_pending=max_pending,
            max_concurrency=max_concurrency,
        )
        self.complaints = Complaints()
        logging.getLogger().addHandler(self.complaints)
        logging.getLogger("otel_responses_usage").setLevel(logging.DEBUG)
        self.threads = set(threading.enumerate())
        self.observed = Observed()
        ResponsesUsageInstrumentor().instrument(
            tracer_provider=self.observed.tracer_provider,
            meter_provider=self.observed.meter_provider,
            config=self.config,
        )
        self.loop = asyncio.new_event_loop()
        options: dict[str, Any] = {
            "base_url": f"{self.server.http.url}/v1",
            "api_key": "key",
            "max_retries": 0,
            "timeout": PATIENCE_S,
        }
        self.sync = openai.OpenAI(**options, http_client=openai.DefaultHttpxClient(verify=TLS))
        self.asynchronous = openai.AsyncOpenAI(
            **options, http_client=openai.DefaultAsyncHttpxClient(verify=TLS)
        )

    # --- calls ---

    @property
    def has_room(self) -> bool:
        return len(self.asked) < 12

    @precondition(lambda self: self.has_room)
    @rule(
        way=st.sampled_from(tuple(WAYS)),
        behaviour=behaviours,
        is_async=st.booleans(),
        stored=st.sampled_from((True, True, True, False)),
        background=st.sampled_from((False, False, True)),
    )
    def make(self, way: str, behaviour: Behaviour, **how: bool) -> None:
        """Make a streamed call."""
        asked = self._expect(behaviour, **how)
        handles = self._twice(asked, lambda client, which: WAYS[way](client, **asked.arguments(which)))
        if behaviour.refusal is None:
            sent = self.server.sent[asked.models[0]]
            left = sent.pieces if way == "iter_bytes" else sent.events
            self.streams.append(Stream(asked, way, handles, left, sent.holds))
        else:
            asked.is_over = True

    @precondition(lambda self: self.has_room)
    @rule(behaviour=behaviours, is_async=st.booleans(), stored=st.booleans(), background=st.booleans())
    def ask(self, behaviour: Behaviour, **how: bool) -> None:
        """Make a call that is not streamed."""
        asked = self._expect(behaviour, **how)
        self._twice(asked, lambda client, which: settle(client.responses.create(**asked.arguments(which))))
        asked.is_over = True
        asked.has_events = behaviour.refusal is None

    @precondition(lambda self: self.has_room)
    @rule(way=st.sampled_from(tuple(WAYS)), behaviour=behaviours)
    def cancel_call(self, way: str, behaviour: Behaviour) -> None:
        """Cancel a task that waits for the answer to begin."""
        mute = dataclasses.replace(behaviour, refusal=None, is_mute=True)
        asked = self._expect(mute, is_async=True, stored=True, background=False)

        async def call(client: Any, which: int) -> str:
            task = asyncio.ensure_future(WAYS[way](client, **asked.arguments(which)))
            while asked.models[which] not in self.server.sent:
                await asyncio.sleep(0.001)
            return await self._cancelled(task)

        self._twice(asked, call)
        asked.is_over = True

    @precondition(lambda self: CAN_RESUME and self.asked and len(self.streams) < 20)
    @rule(asked=a("asked"), after=st.none() | st.integers(0, 12))
    def resume(self, asked: Asked, after: int | None) -> None:
        """Ask for the stream of a response once more, from its beginning or from an event on."""
        cursor = {} if after is None else {"starting_after": after}

        async def call(client: Any, which: int) -> Handle:
            response_id = asked.answers[which].id
            stream = await settle(client.responses.retrieve(response_id, stream=True, **cursor))
            return Handle(stream, stream)

        response_id = asked.answers[0].id
        self.fetches[response_id] += 1
        handles = self._twice(asked, call)
        if handles[0] is not None:
            sent = self.server.sent[response_id]
            self.streams.append(Stream(asked, "resume", handles, sent.events, sent.holds))

    @precondition(lambda self: self.asked)
    @rule(asked=a("asked"))
    def poll(self, asked: Asked) -> None:
        """Ask for a response."""

        async def call(client: Any, which: int) -> Any:
            return await settle(client.responses.retrieve(asked.answers[which].id))

        # A failing GET is had by one of twins alone where a look-up has had the other's.
        self._twice(asked, call, compares=not asked.behaviour.gets)

    @precondition(lambda self: CAN_CANCEL and self.asked)
    @rule(asked=a("asked"))
    def cancel(self, asked: Asked) -> None:
        """Cancel a response, which is refused for most."""

        async def call(client: Any, which: int) -> Any:
            return await settle(client.responses.cancel(asked.answers[which].id))

        cancelled, _ = self._twice(asked, call)
        asked.is_cancelled |= cancelled is not None

    # --- streams ---

    @property
    def readable(self) -> list[Stream]:
        return [
            stream for stream in self.streams if stream.handles and not (stream.blocks and not stream.left)
        ]

    @property
    def held(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.handles]

    @property
    def blocking(self) -> list[Stream]:
        return [stream for stream in self.held if stream.of.is_async and stream.blocks]

    @precondition(lambda self: self.readable)
    @rule(stream=a("readable"), count=st.integers(1, 14), elsewhere=st.booleans())
    def read(self, stream: Stream, count: int, elsewhere: bool) -> None:
        """Read some events or all, here or in another thread, even after the end or a close."""
        if stream.blocks:
            count = min(count, stream.left)
        handles = stream.handles
        assert handles is not None

        def both() -> list[list[str]]:
            return [self._run(stream.of, self._some(handle, count)) for handle in handles]

        seen, plain = in_another_thread(both) if elsewhere and not stream.of.is_async else both()
        stream.left -= len(seen)
        if stream.way != "resume":
            stream.of.has_events |= not seen[0].startswith("raised") and seen[0] != END
        if seen[-1] == END or seen[-1].startswith("raised"):
            stream.end()
        if stream.is_closed and self.config.tail_timeout:
            # After a close the SDK hands out what has arrived; here it has been read already.
            seen, plain = seen[-1:], plain[-1:]
        if stream.is_comparable:
            assert seen == plain

    @precondition(lambda self: self.blocking)
    @rule(stream=a("blocking"))
    def cancel_reading(self, stream: Stream) -> None:
        """Cancel a task that waits for the next event."""
        assert stream.handles is not None

        async def read(handle: Handle) -> tuple[list[str], str]:
            seen = await self._some(handle, stream.left)
            task = asyncio.ensure_future(handle.next())
            await asyncio.sleep(0.002)
            return seen, await self._cancelled(task)

        both = [self._run(stream.of, read(handle)) for handle in stream.handles]
        if stream.way != "resume":
            stream.of.has_events |= bool(stream.left)
        stream.left = 0
        stream.end()
        if stream.is_comparable:
            assert both[0] == both[1]

    @precondition(lambda self: self.held)
    @rule(stream=a("held"))
    def close(self, stream: Stream) -> None:
        """Close a stream, perhaps not for the first time."""
        assert stream.handles is not None
        for handle in stream.handles:
            self._run(stream.of, handle.close())
        stream.is_closed = True
        stream.end()

    @precondition(lambda self: self.held)
    @rule(stream=a("held"), collects=st.sampled_from(("here", "elsewhere", "later")))
    def drop(self, stream: Stream, collects: str) -> None:
        """Forget a stream, and have the garbage collected."""
        stream.handles = None
        stream.end()
        if collects == "here":
            gc.collect()
        elif collects == "elsewhere":
            in_another_thread(gc.collect)

    @rule()
    def idle(self) -> None:
        """Let the event loop run for a moment."""
        self._idle()

    @invariant()
    def nothing_is_told_twice(self) -> None:
        names = Counter(span.name for span in self.observed._spans.get_finished_spans())
        assert all(names[f"chat {asked}"] <= 1 for asked in self.asked)
        assert self.complaints.lines == []

    # --- the end ---

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # nothing has failed so far
                self._check()
        finally:
            self._leave()

    def _check(self) -> None:
        gc.collect()  # what was dropped and left to be found later
        over = {f"chat {asked}" for asked in self.asked if asked.is_over}
        self._until(lambda: over <= set(self._told()), "what is over is told")
        self._until(lambda: self.observed.pending() == 0, "nothing is pending")
        ResponsesUsageInstrumentor().uninstrument()
        self._check_told()
        for stream in self.readable:  # a stream that is open goes on
            self.read(stream, 99, elsewhere=False)
        told = self._told()
        self._close_clients()
        self._until(lambda: len(asyncio.all_tasks(self.loop)) == 0, "no task is left")
        self.loop.run_until_complete(self.loop.shutdown_default_executor())  # the SDK's own use of it
        eventually(lambda: self._threads() <= self.threads, f"no thread is left: {self._threads()}")
        eventually(lambda: self.server.http.open_connections == 0, "no connection is left")
        gc.collect()
        assert [thing for thing in gc.get_objects() if isinstance(thing, Invocation)] == []
        assert self._told() == told
        assert self.complaints.lines == []

    def _check_told(self) -> None:
        spans: dict[str, ReadableSpan] = {}
        for span in self.observed._spans.get_finished_spans():
            assert span.name not in spans or span.name == "fetch_response"
            spans[span.name] = span
            if span.name == "fetch_response":
                assert token_attributes(span) == {}
        fetched = Counter(
            (span.attributes or {})["gen_ai.response.id"]
            for span in self.observed._spans.get_finished_spans()
            if span.name == "fetch_response"
        )
        assert fetched == self.fetches
        assert set(spans) - {"fetch_response"} == {f"chat {asked}" for asked in self.asked}
        reasons = {asked: self._check_usage(asked, spans[f"chat {asked}"]) for asked in self.asked}
        for asked, reason in reasons.items():
            if reason == "circuit_open":
                futile = [
                    other
                    for other, why in reasons.items()
                    if why in FUTILE and other.background == asked.background
                ]
                assert len(futile) >= CircuitPolicy().failures
        assert self.observed.points("openai_responses.faults") == []

    def _check_usage(self, asked: Asked, span: ReadableSpan) -> str | None:
        """Check that the tokens are counted once and exactly, or the reason is; return the reason."""
        attributes = span.attributes or {}
        tokens = {
            point.attributes["gen_ai.token.type"]: (point.count, point.sum)
            for point in self.observed.points("gen_ai.client.token.usage")
            if point.attributes["gen_ai.request.model"] == str(asked)
        }
        (call,) = [
            point
            for point in self.observed.points("openai_responses.calls")
            if point.attributes["gen_ai.request.model"] == str(asked)
        ]
        assert call.value == 1
        names = ("openai_responses.usage.source", "openai_responses.usage.missing_reason")
        said = {name: attributes[name] for name in names if name in attributes}
        assert {name: call.attributes[name] for name in names if name in call.attributes} == said
        ((_, word),) = said.items()
        truths = [asked.answers[0].usage, asked.late_charge if asked.is_cancelled else None]
        if names[1] in said:
            assert token_attributes(span) == {}
            late = [
                (point.attributes[names[1]], point.value)
                for point in self.observed.points("openai_responses.late_usage")
                if point.attributes["gen_ai.request.model"] == str(asked)
            ]
            # Later the application may have been shown the response, which then counts once.
            assert late in ([], [(word, 1)])
            counted = {kind: (1, count) for kind, (_, count) in tokens.items()}
            assert tokens == counted
            known = [(truth["input_tokens"], truth["output_tokens"]) for truth in truths if truth is not None]
            sums = (tokens["input"][1], tokens["output"][1]) if tokens else ()
            assert sums in known if late else sums == ()
            assert word in self._excuses(asked)
            return str(word)
        told = token_attributes(span)
        assert told in [usage_attributes(dict(truth)) for truth in truths if truth is not None]
        assert tokens == {
            "input": (1, told["gen_ai.usage.input_tokens"]),
            "output": (1, told["gen_ai.usage.output_tokens"]),
        }
        return None

    def _excuses(self, asked: Asked) -> set[str]:
        """The reasons for which the usage of a response may be missing."""
        behaviour = asked.behaviour
        unbilled = {"no_usage"} if asked.answers[0].usage is None else set()
        if not asked.has_events:
            # Its end may have arrived all the same, and is read when the application closes the stream.
            return {"no_response_id"} | unbilled
        if not asked.stored and not asked.background:
            return {"not_stored"} | unbilled
        if not self.config.retrieval:
            return {"disabled"} | unbilled
        excuses = {"circuit_open"} | unbilled
        if behaviour.fate == "lost":
            excuses.add("not_found")
        if self.config.max_pending == 1:
            excuses.add("overload")
        if not self.patient:
            excuses |= {"timeout", "shutdown"}
            excuses |= {"not_found"} if "404" in behaviour.gets else set()
            excuses |= {"transport_error"} if "cut" in behaviour.gets else set()
            excuses |= {"no_usage"} if asked.is_cancelled else set()
        return excuses

    def _leave(self) -> None:
        if ResponsesUsageInstrumentor().is_instrumented_by_opentelemetry:
            ResponsesUsageInstrumentor().uninstrument()
        if hasattr(self, "loop") and not self.loop.is_closed():
            self._close_clients()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()
        logging.getLogger().removeHandler(self.complaints)
        logging.getLogger("otel_responses_usage").setLevel(logging.NOTSET)

    # --- tools ---

    def _expect(self, behaviour: Behaviour, *, is_async: bool, stored: bool, background: bool) -> Asked:
        """Have the server expect a call and its twin."""
        number = next(self.numbers)
        if self.patient:  # then nothing may hang for ever
            fate = "kept" if behaviour.fate == "stuck" else behaviour.fate
            behaviour = dataclasses.replace(behaviour, fate=fate, charges_late=True)
        # No two responses have a count in common.
        billed = usage(10_000 + number, 20_000 + number, cached=number, reasoning=500 + number)
        late = usage(30_000 + number, 40_000 + number)
        answer = Answer(
            ("one ", "two ", "three"), billed if behaviour.billed else None, ending=behaviour.ending
        )
        asked = Asked(
            number,
            is_async,
            behaviour,
            stored,
            background,
            late if behaviour.charges_late else None,
            (f"m-{number}", f"plain-{number}"),
            (
                dataclasses.replace(answer, id=f"resp_{number}"),
                dataclasses.replace(answer, id=f"resp_plain_{number}"),
            ),
        )
        for model, its_answer in zip(asked.models, asked.answers, strict=True):
            plan = Plan(
                its_answer,
                cut_after=behaviour.sends,
                end=ENDS[behaviour.end],
                fate=behaviour.fate,
                get_replies=tuple(GETS[name] for name in behaviour.gets),
                usage_after_cancel=asked.late_charge,
            )
            self.server.expect(model, plan, behaviour)
        self.asked.append(asked)
        return asked

    def _run(self, asked: Asked, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine) if asked.is_async else drive(coroutine)

    def _twice(self, asked: Asked, call: Callable[[Any, int], Any], *, compares: bool = True) -> Any:
        """Make a call for the watched response and for the other; `None` for one that raised."""
        client = self.asynchronous if asked.is_async else self.sync
        results: list[Any] = []
        words: list[str] = []
        for which in (0, 1):
            result = None
            with suppress_instrumentation() if which else contextlib.nullcontext():
                try:
                    result = self._run(asked, call(client, which))
                except openai.OpenAIError as raised:
                    words.append(word_of_error(raised))
                else:
                    words.append(result if isinstance(result, str) else word_of(result))
            results.append(result)
        if compares:
            assert words[0] == words[1]
        return tuple(results)

    async def _some(self, handle: Handle, count: int) -> list[str]:
        seen: list[str] = []
        while len(seen) < count:
            try:
                seen.append(await handle.next())
            except Exception as raised:
                seen.append(word_of_error(raised))
                break
            if seen[-1] == END:
                break
        return seen

    async def _cancelled(self, task: asyncio.Future[Any]) -> str:
        task.cancel()
        (raised,) = await asyncio.gather(task, return_exceptions=True)
        return word_of_error(raised) if isinstance(raised, BaseException) else "not cancelled"

    def _idle(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0.002))

    def _until(self, holds: Callable[[], Any], what: str) -> None:
        """Wait while the event loop runs."""

        def look() -> Any:
            self._idle()
            return holds()

        eventually(look, what)

    def _threads(self) -> set[str]:
        return set(threading.enumerate())

    def _told(self) -> Counter[str]:
        return Counter(span.name for span in self.observed._spans.get_finished_spans())

    def _close_clients(self) -> None:
        for stream in self.streams:
            stream.handles = None
        gc.collect()
        self.sync.close()
        self.loop.run_until_complete(self.asynchronous.close())
        self._idle()


# --- the tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for all examples."""
    server = Server()
    with server.http:
        yield server


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


LONG = int(os.environ.get("MACHINE_EXAMPLES", "0"))


@since(
    2, 7, 0
)  # before, a reader had to wait for the end of the body, which some of these servers never send
@pytest.mark.usefixtures("hasty", "small_heap")
def test_whatever_an_application_does_every_response_is_accounted_for(server: Server) -> None:
    """In any order of doings each response is told once, exactly or with its reason, and nothing is left."""
    run_state_machine_as_test(
        functools.partial(Application, server),
        settings=settings(
            max_examples=LONG or 60,
            stateful_step_count=25,
            deadline=None,
            derandomize=not LONG,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[phase for phase in Phase if phase is not Phase.explain],
            report_multiple_bugs=False,
        ),
    )
