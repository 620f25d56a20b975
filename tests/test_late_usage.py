"""Calls that were recorded without usage are counted when the application is shown their response, once."""

from __future__ import annotations

import asyncio
import gc
import pickle
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from billing import (
    ASKED,
    COUNTS,
    SEARCHES,
    TOOL_CALLS,
    TOOLS,
    WINDOW,
    BilledAPI,
    answer,
    assert_tools_once,
    late,
)
from calls import CUT, entered, needs_resume, settle
from conftest import Instrument, Serve
from embedded.answer import Json, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Send
from embedded.responses_api import Plan, error
from observed import Observed, eventually, token_attributes
from otel_responses_usage import CallRecord, Config, ResponsesUsageInstrumentor
from otel_responses_usage._call import observation as _observation
from otel_responses_usage._call.observation import Observation
from otel_responses_usage._facts.request import Operation, Server
from otel_responses_usage._facts.response import Response as ResponseFacts
from otel_responses_usage._facts.usage import MissingReason, Usage, UsageSource
from otel_responses_usage._lookup import lookups as _lookup
from otel_responses_usage._lookup.job import Job, LookupResult
from otel_responses_usage._lookup.recovery import Recovery
from otel_responses_usage._lookup.retrieval import RetrievalPolicy
from otel_responses_usage._lookup.worker import WorkShare
from otel_responses_usage._telemetry.uncounted import UncountedCall
from test_exit import run
from test_observation import FETCHES, POLL_S, Fetch

COUNTED_ONCE = {"input": (1, 7), "output": (1, 21)}
REASON = "openai_responses.usage.missing_reason"
KINDS = pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look-ups are made in short and even intervals."""
    policy = RetrievalPolicy(first_wait_s=POLL_S, longest_wait_s=POLL_S)
    monkeypatch.setattr(_lookup, "RetrievalPolicy", lambda: policy)


class Backend(BilledAPI):
    """A server that tells our look-ups something else than the application: `to_us`, if it is set."""

    def __init__(
        self,
        serve: Serve,
        plan: Callable[[SeenRequest], Plan | Reply] | Plan | Reply | None = None,
        to_us: Callable[[str], Reply] | None = None,
    ) -> None:
        super().__init__(plan, cancel=lambda response_id: Reply.json(self.stored[response_id]))
        self.to_us = to_us
        self.server: ScriptedServer = serve(self)

    @property
    def stored(self) -> dict[str, Json]:
        return self.api.stored

    def __call__(self, request: SeenRequest) -> Reply:
        if self.to_us is not None and request.method == "GET" and request.headers["x-by"] == "caller":
            return self.to_us(request.path.rpartition("/")[2])
        return super().__call__(request)

    def client(self, kind: type[Any] = openai.OpenAI, *, by: str = "caller") -> Any:
        """A client of the application. Look-ups have the headers of the caller."""
        return kind(
            base_url=f"{self.server.url}/v1", api_key="k", max_retries=0, default_headers={"x-by": by}
        )

    def gets(self, by: str = "caller") -> int:
        return sum(
            request.method == "GET" and request.headers["x-by"] == by for request in self.server.requests
        )


def in_progress(response_id: str) -> Reply:
    return Reply.json({"id": response_id, "object": "response", "status": "in_progress", "usage": None})


def chat_of(observed: Observed) -> ReadableSpan:
    """The span of the one call, among those of fetches."""
    (span,) = (span for span in observed.spans(observed.finished or 1) if span.name.startswith("chat"))
    return span


def recorded_in(observed: Observed) -> set[tuple[int, int]]:
    """The spans that late points were recorded in. An SDK tells exemplars once: ask first of all."""
    data = observed._metrics.get_metrics_data()
    return {
        (exemplar.trace_id, exemplar.span_id)
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name in {"gen_ai.client.token.usage", "openai_responses.late_usage"}
        for point in metric.data.data_points
        for exemplar in point.exemplars
    }


def identity(span: Any) -> tuple[int, int]:
    context = span.get_span_context()
    return context.trace_id, context.span_id


def fetch(backend: Backend, response_id: str, times: int = 1) -> None:
    """Fetch a response as another part of the application does."""
    with backend.client(by="application") as client:
        for _ in range(times):
            client.responses.retrieve(response_id)


# --- completion windows ------------------------------------------------------------------------------


@KINDS
def test_a_response_in_a_window_is_deferred_at_once(
    kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """A call whose response may take hours ends when its create returns, and is never asked for."""
    backend = Backend(serve, Plan(answer()))

    async def main() -> None:
        client = backend.client(kind)
        await settle(client.responses.create(**ASKED, **WINDOW))
        assert observed.finished == 1
        await settle(client.close())

    asyncio.run(main())
    span = observed.span()
    attributes = dict(span.attributes or {})
    assert attributes[REASON] == "deferred"
    assert attributes["openai_responses.request.completion_window"] == "2h"
    assert attributes["openai_responses.response.status"] == "queued"
    assert "openai_responses.retrieval.attempts" not in attributes
    assert "gen_ai.response.finish_reasons" not in attributes
    assert span.status.is_unset
    assert observed.calls() == {"deferred": 1}
    assert observed.tokens() == {}
    assert observed.pending() == 0
    time.sleep(5 * POLL_S)
    assert backend.seen == {"POST": 1}


async def by_copy(client: Any, response_id: str) -> None:
    await settle(
        client.with_options(timeout=7, default_headers={"x-more": "1"}).responses.retrieve(response_id)
    )


async def by_copied_client(client: Any, response_id: str) -> None:
    await settle(client.copy(api_key="another").responses.retrieve(response_id))


async def streaming_json(client: Any, response_id: str) -> None:
    async with entered(client.responses.with_streaming_response.retrieve(response_id)) as response:
        assert (await settle(response.json()))["id"] == response_id


async def streaming_text(client: Any, response_id: str) -> None:
    async with entered(client.responses.with_streaming_response.retrieve(response_id)) as response:
        for _ in range(3):
            assert response_id in await settle(response.text())


async def streaming_cancel(client: Any, response_id: str) -> None:
    async with entered(client.responses.with_streaming_response.cancel(response_id)) as response:
        await settle(response.read())


ALL_FETCHES = (
    *(way for way in FETCHES if way.name not in {"retrieve by name", "get", "resume raw"}),
    Fetch("copy of the client", by_copy),
    Fetch("client with another key", by_copied_client),
    Fetch("streaming json", streaming_json),
    Fetch("streaming text", streaming_text),
    Fetch("streaming cancel", streaming_cancel, needs="responses.cancel"),
)


@KINDS
@pytest.mark.parametrize("way", ALL_FETCHES, ids=str)
def test_a_deferred_response_counts_when_the_application_sees_it(
    way: Fetch, kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """However the application fetches it: its tokens and tools count once, for the call that made them."""
    backend = Backend(serve, Plan(TOOLS))

    async def main() -> None:
        client = backend.client(by="application", kind=kind)
        for _ in range(3):
            await way.make(client, TOOLS.id)
        await settle(client.close())

    with backend.client() as client:
        if not way.is_in_sdk():
            pytest.skip("not in this release of the SDK")
        client.responses.create(**ASKED, **WINDOW)
    span = chat_of(observed)
    assert token_attributes(span) == {}
    asyncio.run(main())

    assert recorded_in(observed) == {identity(span)}
    assert observed.tokens() == COUNTED_ONCE
    assert_tools_once(observed)
    assert late(observed) == {"deferred": 1}
    assert observed.calls() == {"deferred": 1}
    assert backend.gets() == 0
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": TOOLS.model,
        "openai.response.service_tier": "default",
        "openai_responses.request.completion_window": "2h",
        "server.address": "127.0.0.1",
        "server.port": int(backend.server.url.rpartition(":")[2]),
    }
    for point in observed.points("gen_ai.client.token.usage"):
        attributes = dict(point.attributes)
        assert attributes.pop("gen_ai.token.type") in {"input", "output"}
        assert attributes == expected


SAYS_NOTHING: dict[str, Json] = {
    "queued": {"status": "queued", "usage": None},
    "in progress": {"status": "in_progress", "usage": None},
    "counts on the way": {"status": "in_progress", "usage": usage(1, 1)},
    "cancelled, not charged yet": {"status": "cancelled", "usage": None},
    "completed without counts": {"status": "completed", "usage": None},
    "half of the usage": {"status": "completed", "usage": {"total_tokens": 28}},
    "another object": {"object": "list", "status": "completed", "usage": usage(1, 1)},
    "a compaction": {"object": "response.compaction", "usage": usage(1, 1)},
}


@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_what_is_no_bill_adds_nothing(name: str, serve: Serve, observed: Observed) -> None:
    """A response that runs, or tells no usage, leaves its call uncounted. The bill counts when it is seen."""
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
        bill = backend.stored[response_id]
        backend.stored[response_id] = {"id": response_id, **SAYS_NOTHING[name]}
        client.responses.retrieve(response_id)
        assert observed.tokens() == late(observed) == {}
        backend.stored[response_id] = bill
        client.responses.retrieve(response_id)
    assert observed.tokens() == COUNTED_ONCE
    assert late(observed) == {"deferred": 1}


BODIES = {
    "no JSON": b"{]",
    "a page": b"<html>",
    "a text": b'"completed"',
    "a list": b"[1]",
    "null": b"null",
    "nested too deep": b"[" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("is_streaming", [False, True], ids=["raw", "streaming"])
@pytest.mark.parametrize("name", BODIES)
def test_a_fetch_that_shows_no_response_is_no_fault(
    name: str, is_streaming: bool, serve: Serve, observed: Observed
) -> None:
    """What a gateway answers in place of the response changes nothing, and is no fault of ours."""
    body = BODIES[name]
    described = {"content-type": "application/json", "content-length": str(len(body))}
    odd = Reply(headers=described, steps=(Send(body),), chunked=False)
    backend = Backend(serve, Plan(answer(), get_replies=(odd,)))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
        if is_streaming:
            with client.responses.with_streaming_response.retrieve(response_id) as response:
                assert isinstance(response.read(), bytes)
        else:
            assert client.responses.with_raw_response.retrieve(response_id).http_response.content is not None
        assert observed.tokens() == {}
        assert observed.points("openai_responses.faults") == []
        client.responses.retrieve(response_id)
    assert observed.tokens() == COUNTED_ONCE


def test_the_application_is_told_once_more_of_a_late_call(serve: Serve, instrument: Instrument) -> None:
    """The second record of a call has all that its response used, not only what is counted late."""
    told: list[CallRecord] = []
    instrument(on_call=told.append)
    backend = Backend(serve, Plan(TOOLS))
    with backend.client() as client:
        client.responses.create(**ASKED, **WINDOW)
    fetch(backend, TOOLS.id, 2)
    eventually(lambda: len(told) == 2, "both records")
    first, second = told
    assert (first.usage, first.missing_reason, first.is_late) == (None, MissingReason.DEFERRED, False)
    assert (second.missing_reason, second.usage_source, second.is_late) == (
        None,
        UsageSource.OBSERVATION,
        True,
    )
    assert second.usage is not None
    assert (second.usage.input_tokens, second.usage.output_tokens) == (7, 21)
    assert second.tool_calls == TOOL_CALLS
    assert second.web_search_requests == SEARCHES
    assert (second.response_id, second.span_context) == (first.response_id, first.span_context)


def test_a_refused_fetch_changes_nothing(serve: Serve, observed: Observed) -> None:
    """A fetch that fails shows no response; the next one counts."""
    backend = Backend(serve, Plan(answer(), get_replies=(error(500, "no"), error(404, "no"))))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
        for _ in range(2):
            with pytest.raises(openai.APIStatusError):
                client.responses.retrieve(response_id)
        assert observed.tokens() == {}
        client.responses.retrieve(response_id)
    assert observed.tokens() == COUNTED_ONCE


@needs_resume
def test_a_resumed_stream_that_is_left_early_counts_nothing(serve: Serve, observed: Observed) -> None:
    """The terminal event of a resumed stream has the usage. Without it the call stays uncounted."""
    made = answer()
    some_more = Reply.sse(made.events()[3:6], end=Hold())
    backend = Backend(serve, Plan(made, resume_replies=(some_more,)))
    with backend.client() as client:
        client.responses.create(**ASKED, **WINDOW)
        with client.responses.retrieve(made.id, stream=True, starting_after=2) as stream:
            next(stream)
        assert observed.tokens() == {}
        assert list(client.responses.retrieve(made.id, stream=True, starting_after=2))
    assert observed.tokens() == COUNTED_ONCE
    assert [span.name for span in observed.spans(3)] == ["chat m", "fetch_response", "fetch_response"]


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streamed"])
def test_a_response_under_another_id_is_still_its_call_s(
    streams: bool, serve: Serve, observed: Observed
) -> None:
    """Where a proxy encrypts ids anew in each answer, the id in the URL says which call is shown."""
    made, shown = answer(), answer()
    if streams and not any(way.name == "resume" and way.is_in_sdk() for way in FETCHES):
        pytest.skip("not in this release of the SDK")

    def proxy(request: SeenRequest) -> Reply:
        if request.method == "POST":
            return Reply.json(made.response(status="queued"))
        return Reply.sse(shown.events()) if "stream" in request.query else Reply.json(shown.response())

    server = serve(proxy)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as client:
        client.responses.create(**ASKED, **WINDOW)
        for _ in range(2):
            if streams:
                assert list(client.responses.retrieve(made.id, stream=True, starting_after=0))
            else:
                client.responses.retrieve(made.id)
    assert observed.tokens() == COUNTED_ONCE
    assert late(observed) == {"deferred": 1}


def test_a_cancelled_deferred_response_counts_when_it_is_charged(serve: Serve, observed: Observed) -> None:
    """A cancel that answers without usage counts nothing. What is charged later counts when it is seen."""
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
        backend.stored[response_id] |= {"status": "cancelled", "usage": None}
        client.post(f"/responses/{response_id}/cancel", cast_to=object)
        assert observed.tokens() == {}
        backend.stored[response_id]["usage"] = dict(COUNTS)
        fetch(backend, response_id, 2)
    assert observed.tokens() == COUNTED_ONCE


def test_a_stream_in_a_window_counts_where_it_ends(serve: Serve, observed: Observed) -> None:
    """Read to its end, its terminal event has the usage. Closed early, the response is deferred."""
    made = [answer(), answer()]
    plans = iter((Plan(made[0]), Plan(made[1], cut_after=4, end=Hold())))
    backend = Backend(serve, lambda _: next(plans))
    with backend.client() as client:
        assert list(client.responses.create(**ASKED, **WINDOW, stream=True))
        with client.responses.create(**ASKED, **WINDOW, stream=True) as stream:
            next(iter(stream))
        assert observed.calls() == {"stream": 1, "deferred": 1}
        fetch(backend, made[0].id)
        assert observed.tokens() == COUNTED_ONCE
        fetch(backend, made[1].id)
    assert observed.tokens() == {"input": (2, 14), "output": (2, 42)}
    assert backend.gets() == 0


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streamed"])
def test_a_deferred_response_whose_answer_was_lost_cannot_be_known(
    streams: bool, serve: Serve, observed: Observed
) -> None:
    """Without an answer there is no id to know the response by: a fetch of it counts nothing."""
    made = answer()
    backend = Backend(serve)

    def loses(request: SeenRequest) -> Reply:
        reply = Backend.__call__(backend, request)
        return Reply(before=(Cut(),)) if request.method == "POST" else reply

    backend.api._plan = lambda _: Plan(made)
    server = serve(loses)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(CUT):
            client.responses.create(**ASKED, **WINDOW, stream=streams)
        client.responses.retrieve(made.id)
    assert observed.tokens() == {}
    assert observed.calls() == {"no_response_id": 1}


# --- calls that ended otherwise ----------------------------------------------------------------------


def cut(client: Any, **asked: Any) -> None:
    with pytest.raises(CUT):
        list(client.responses.create(**ASKED, **asked, stream=True))


TO_US: dict[str, tuple[Callable[[str], Reply] | None, dict[str, Any]]] = {
    "timeout": (in_progress, {"retrieval_timeout": 0.2}),
    "overload": (None, {"max_pending": 0}),
    "transport_error": (lambda _: Reply(before=(Cut("rst"),)), {"retrieval_timeout": 0.5}),
    "not_found": (lambda _: error(404, "no such response"), {}),
    "unauthorized": (lambda _: error(401, "no"), {}),
    "unsupported": (lambda _: error(405, "no"), {}),
    "no_usage": (
        lambda i: Reply.json({"id": i, "object": "response", "status": "failed", "usage": None}),
        {},
    ),
    "disabled": (None, {"retrieval": False}),
}


@pytest.mark.parametrize("reason", TO_US)
def test_a_call_that_could_not_be_counted_counts_when_it_is_seen(
    reason: str, serve: Serve, instrument: Instrument
) -> None:
    """Whatever kept us from its usage: the application's own fetch brings it, once, whenever it comes."""
    to_us, settings = TO_US[reason]
    observed = instrument(grace_timeout=0.0, **settings)
    backend = Backend(serve, Plan(TOOLS, cut_after=4, end=Cut()), to_us)
    with backend.client() as client:
        cut(client)
    span = observed.span()
    assert (span.attributes or {})[REASON] == reason
    gets = backend.gets()
    fetch(backend, TOOLS.id, 3)
    assert recorded_in(observed) == {identity(span)}
    assert observed.tokens() == COUNTED_ONCE
    assert_tools_once(observed)
    assert late(observed) == {reason: 1}
    assert observed.calls() == {reason: 1}
    assert backend.gets() == gets
    assert observed.finished == 1


class Meanwhile(SpanProcessor):
    """Does something on another thread while a span ends."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self._happens = happens

    def on_end(self, span: ReadableSpan) -> None:  # noqa: ARG002
        thread = threading.Thread(target=self._happens)
        thread.start()
        thread.join()


@pytest.mark.parametrize("input_count", [False, True], ids=["look-up", "count of the input"])
def test_a_response_that_is_seen_while_its_span_ends_counts(
    input_count: bool, serve: Serve, instrument: Instrument
) -> None:
    """The last moment before the call is known as uncounted is no gap."""
    made, observed = answer(), Observed()
    backend = Backend(serve, Plan(made, cut_after=4, end=Cut()), in_progress)
    observed.tracer_provider.add_span_processor(Meanwhile(lambda: fetch(backend, made.id)))
    instrument(observed, retrieval_timeout=0.1, input_count=input_count)
    with backend.client() as client:
        cut(client)
        observed.span()
        eventually(lambda: observed.tokens(), "the tokens")
    assert observed.tokens() == COUNTED_ONCE
    assert late(observed) == {"timeout": 1}


class Slow(SpanProcessor):
    """Takes its time for each span."""

    def on_end(self, span: ReadableSpan) -> None:  # noqa: ARG002
        time.sleep(0.02)


def test_calls_of_a_flood_count_when_they_are_seen_at_once(
    serve: Serve, instrument: Instrument, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose record has to wait for its turn is known already: a fetch right after it counts."""
    monkeypatch.setattr(WorkShare, "is_used_up", True)
    observed = Observed()
    observed.tracer_provider.add_span_processor(Slow())
    told: list[CallRecord] = []
    instrument(observed, max_pending=0, grace_timeout=0.0, on_call=told.append)
    backend, calls = Backend(serve, lambda _: Plan(answer(), cut_after=4, end=Cut())), 10
    with backend.client() as client, backend.client(by="application") as other:
        for _ in range(calls):
            cut(client)
            other.responses.retrieve(next(reversed(backend.stored)))
    observed.spans(calls)
    assert observed.tokens() == {"input": (calls, 7 * calls), "output": (calls, 21 * calls)}
    assert late(observed) == observed.calls() == {"overload": calls}
    eventually(lambda: len(told) == 2 * calls, "all records")
    assert [record.is_late for record in told] == [False, True] * calls


def test_a_call_behind_an_open_circuit_counts_when_it_is_seen(serve: Serve, observed: Observed) -> None:
    """Where look-ups have stopped, every call waits for the application to fetch its response."""
    made = [answer() for _ in range(7)]
    plans = iter(made)
    backend = Backend(
        serve, lambda _: Plan(next(plans), cut_after=4, end=Cut()), lambda _: error(404, "no such response")
    )
    with backend.client() as client:
        for number in range(len(made)):
            cut(client)
            observed.spans(number + 1)
    assert observed.calls() == {"not_found": 5, "circuit_open": 2}
    for one in made:
        fetch(backend, one.id, 2)
    assert observed.tokens() == {"input": (7, 49), "output": (7, 147)}
    assert late(observed) == {"not_found": 5, "circuit_open": 2}


def test_a_call_that_was_still_open_at_the_end_is_gone_with_it(serve: Serve, instrument: Instrument) -> None:
    """What the instrumentation left uncounted when it was removed, the next one does not know."""
    observed = instrument()
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
        ResponsesUsageInstrumentor().uninstrument()
        client.responses.retrieve(response_id)
        assert observed.tokens() == {}
        again = instrument()
        client.responses.retrieve(response_id)
    assert again.tokens() == observed.tokens() == late(again) == {}


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streamed"])
def test_a_call_whose_usage_is_known_is_never_counted_again(
    streams: bool, serve: Serve, observed: Observed
) -> None:
    """A response that was counted stays counted, however often it is fetched, resumed or cancelled."""
    backend = Backend(serve, Plan(TOOLS))
    with backend.client() as client:
        made = client.responses.create(**ASKED, stream=streams)
        if streams:
            assert list(made)
        client.responses.create(**ASKED, **WINDOW)  # so that the table is not empty
        observed.spans(2)
    # Another call has the same id: it is the one that the application is shown.
    fetch(backend, TOOLS.id, 3)
    assert late(observed) == {"deferred": 1}
    assert observed.tokens() == {"input": (2, 14), "output": (2, 42)}
    assert_tools_once(observed, 2)


def test_an_id_that_is_handed_out_twice_counts_once_late(serve: Serve, observed: Observed) -> None:
    """Two uncounted calls of one id are one response: its tokens count once."""
    made = answer()
    backend = Backend(serve, lambda _: Plan(made))
    with backend.client() as client:
        for _ in range(2):
            client.responses.create(**ASKED, **WINDOW)
    fetch(backend, made.id, 3)
    assert observed.tokens() == COUNTED_ONCE
    assert late(observed) == {"deferred": 1}


def test_another_server_s_response_of_the_same_id_is_another(serve: Serve, observed: Observed) -> None:
    """A response is known by its server and its id."""
    made = answer()
    backend, other = Backend(serve, Plan(made)), Backend(serve, Plan(made))
    with other.client() as elsewhere:
        with suppress_instrumentation():
            elsewhere.responses.create(**ASKED)
        with backend.client() as client:
            client.responses.create(**ASKED, **WINDOW)
        elsewhere.responses.retrieve(made.id)
    assert observed.tokens() == {}
    fetch(backend, made.id)
    assert observed.tokens() == COUNTED_ONCE


# --- beside others -----------------------------------------------------------------------------------


def test_an_unsampled_call_counts_without_an_exemplar(serve: Serve, instrument: Instrument) -> None:
    """Metrics do not depend on sampling."""
    observed = Observed()
    observed.tracer_provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    instrument(observed)
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
    fetch(backend, response_id, 2)
    assert recorded_in(observed) == set()
    assert observed.tokens() == COUNTED_ONCE
    assert late(observed) == {"deferred": 1}


def test_a_suppressed_call_is_never_counted(serve: Serve, observed: Observed) -> None:
    """What the application has suppressed is not recorded late either."""
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        with suppress_instrumentation():
            response_id = client.responses.create(**ASKED, **WINDOW).id
        client.responses.retrieve(response_id)
    assert observed.tokens() == late(observed) == {}


def test_a_suppressed_fetch_counts_the_call(serve: Serve, observed: Observed) -> None:
    """A fetch records nothing of itself. What it shows belongs to a call that was not suppressed."""
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
        with suppress_instrumentation():
            client.responses.retrieve(response_id)
    assert observed.tokens() == COUNTED_ONCE


def test_a_call_within_another_s_span_counts_late(serve: Serve, observed: Observed) -> None:
    """Another instrumentation cannot know the usage of a deferred call: the points are ours."""
    backend = Backend(serve, Plan(answer()))
    tracer = observed.tracer_provider.get_tracer("someone's")
    inference = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
    with backend.client() as client, tracer.start_as_current_span("chat m", attributes=inference) as span:
        response_id = client.responses.create(**ASKED, **WINDOW).id
    fetch(backend, response_id, 2)
    assert recorded_in(observed) == {identity(span)}
    assert observed.tokens() == COUNTED_ONCE
    assert late(observed) == {"deferred": 1}


def test_the_span_of_a_fetch_is_no_exemplar(serve: Serve, observed: Observed) -> None:
    """The points belong to the span of the call, not to that around the fetch."""
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
    span = observed.span()
    with observed.tracer_provider.get_tracer("the application's").start_as_current_span("fetch"):
        fetch(backend, response_id)
    assert recorded_in(observed) == {identity(span)}


def test_a_response_that_has_been_fetched_can_be_pickled(serve: Serve, observed: Observed) -> None:
    """The HTTP response of a fetch is the HTTP library's own once it has been read."""
    backend = Backend(serve, Plan(answer()))
    with backend.client() as client:
        response_id = client.responses.create(**ASKED, **WINDOW).id
        with client.responses.with_streaming_response.retrieve(response_id) as response:
            response.read()
            assert pickle.loads(pickle.dumps(response.http_response)).json()["id"] == response_id  # noqa: S301
            assert "read" not in vars(response.http_response)
    assert observed.tokens() == COUNTED_ONCE


FORK = """
window = {"background": True, "background_options": {"completion_window": "2h"}}
response_ids = [client.responses.create(model="deferred", input="x", extra_body=window).id]
child = os.fork()
if child == 0:
    make_clients()
    client.responses.retrieve(response_ids[0])
    response = client.responses.create(model="deferred in the child", input="x", extra_body=window)
    client.responses.retrieve(response.id)
    sys.exit()
os.waitpid(child, 0)
for _ in range(2):
    client.responses.retrieve(response_ids[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on this system")
def test_a_fork_leaves_uncounted_calls_to_the_parent(serve: Serve, tmp_path: Path) -> None:
    """The parent counts the call that it made, the child its own. No call counts in both."""
    server = serve(Backend(serve, lambda _: Plan(answer())))
    ran = run(tmp_path, server, FORK)
    assert "Traceback" not in ran.complaints
    for model in ("deferred", "deferred in the child"):
        of_model = {"gen_ai.request.model": model}
        assert ran.total("openai_responses.late_usage", **of_model) == 1
        assert ran.total("gen_ai.client.token.usage", **of_model, **{"gen_ai.token.type": "input"}) == 7
        assert ran.total("gen_ai.client.token.usage", **of_model, **{"gen_ai.token.type": "output"}) == 21


# --- bounds ------------------------------------------------------------------------------------------

SERVER = Server("openai", "127.0.0.1", 80)
BILLED = Usage(7, 21)


def seen(number: int) -> ResponseFacts:
    return ResponseFacts(id=f"resp_{number}", status="completed", usage=BILLED)


def uncounted(number: int = 1) -> UncountedCall:
    context = SpanContext(number + 1, number + 1, is_remote=False, trace_flags=TraceFlags(1))
    return UncountedCall(
        Operation.CHAT, SERVER, "m", None, MissingReason.TIMEOUT, NonRecordingSpan(context), {}, None
    )


class CountsLate:
    """Takes what is counted late."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def record_late_usage(self, call: UncountedCall, response: ResponseFacts) -> None:  # noqa: ARG002
        self.ids.append(str(response.id))


@pytest.fixture
def recovery() -> Iterator[Recovery]:
    made = Recovery(Config(), lambda _: NoRetriever())
    yield made
    made.stop(0.0)


class NoRetriever:
    def close(self) -> None:
        pass

    interrupt = close


def test_the_newest_calls_are_kept(recovery: Recovery) -> None:
    """Of very many uncounted calls the last 10,000 are kept."""
    telemetry = CountsLate()
    table: Any = Observation(recovery, telemetry)
    for number in range(25_000):
        table.keep(f"resp_{number}", uncounted(number), None)
        assert len(table._uncounted) <= 10_000
    for number in (0, 14_999, 15_000, 24_999):
        table.observe(SERVER, seen(number))
    assert telemetry.ids == ["resp_15000", "resp_24999"]


def test_keeping_a_call_costs_the_same_when_the_table_is_full(recovery: Recovery) -> None:
    """The table does not search for its oldest entry."""
    table: Any = Observation(recovery, CountsLate())
    calls = [(f"resp_{number}", uncounted(number)) for number in range(30_000)]

    def seconds(some: list[tuple[str, UncountedCall]]) -> float:
        began = time.thread_time()
        for response_id, call in some:
            table.keep(response_id, call, None)
        return time.thread_time() - began

    empty, _, full = seconds(calls[:9_000]), seconds(calls[9_000:11_000]), seconds(calls[11_000:])
    assert full / 19_000 < 4 * empty / 9_000 + 2e-6


def test_a_call_is_kept_for_a_day(recovery: Recovery, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is seen later than 24 hours after its call counts nothing, and old calls leave the table."""
    assert _observation._KEPT_S == 24 * 3600
    monkeypatch.setattr(_observation, "_KEPT_S", 0.05)
    telemetry = CountsLate()
    table: Any = Observation(recovery, telemetry)
    for number in range(3):
        table.keep(f"resp_{number}", uncounted(number), None)
    table.observe(SERVER, seen(0))
    time.sleep(0.06)
    table.observe(SERVER, seen(1))
    assert telemetry.ids == ["resp_0"]
    table.keep("resp_3", uncounted(3), None)
    assert [key[1] for key in table._uncounted] == ["resp_3"]
    time.sleep(0.06)
    table.keep("resp_3", uncounted(3), None)  # the same id, a day later
    table.observe(SERVER, seen(3))
    assert telemetry.ids == ["resp_0", "resp_3"]


MOST_BYTES = 1200


def test_an_uncounted_call_takes_little_memory(serve: Serve, instrument: Instrument) -> None:
    """Each takes about a kilobyte: no content, no clients, no credentials."""
    observed = instrument()
    backend = Backend(serve, lambda _: Plan(answer()))
    calls = 150
    prompt, key = "canary-of-the-prompt " * 200, "canary-of-the-key"
    with openai.OpenAI(base_url=f"{backend.server.url}/v1", api_key=key, max_retries=0) as client:

        def create() -> None:
            client.responses.create(model="m", input=prompt, instructions=prompt, **WINDOW)

        for _ in range(20):
            create()
        ledger: Any = ResponsesUsageInstrumentor()._ledger
        table = ledger.observation._uncounted
        observed._spans.clear()
        before = len(table)
        for _ in range(calls):
            create()
            observed._spans.clear()
    assert len(table) == before + calls
    held = list(reachable(table))
    texts = [value for value in held if isinstance(value, (str, bytes))]
    assert not [text for text in texts if "canary" in str(text)]
    assert sum(map(sys.getsizeof, held)) / len(table) < MOST_BYTES


def reachable(root: object) -> Iterator[object]:
    """Everything that an object holds, once, but no code."""
    left, known = [root], {id(root)}
    while left:
        value = left.pop()
        yield value
        for inner in gc.get_referents(value):
            if id(inner) not in known and not isinstance(inner, (type, types.ModuleType, types.FunctionType)):
                known.add(id(inner))
                left.append(inner)


# --- threads -----------------------------------------------------------------------------------------


@pytest.fixture
def _switching() -> Iterator[None]:
    """Threads take turns very often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Call:
    """A call whose look-up ends without usage, as `Settlement` does it."""

    def __init__(self, table: Observation, number: int) -> None:
        self._table = table
        self._number = number
        self.sources: list[UsageSource] = []

    def on_accept(self) -> None:
        pass

    def on_begin(self, _: Job) -> MissingReason:
        return MissingReason.TIMEOUT

    def on_result(self, job: Job, result: LookupResult, source: UsageSource) -> None:
        if result.usage is not None:
            self.sources.append(source)
        else:
            self._table.keep(job.response_id, uncounted(self._number), job)


@pytest.mark.usefixtures("_switching")
def test_a_response_seen_while_its_look_up_ends_counts_once(recovery: Recovery) -> None:
    """Threads see a response before, while and after its look-up ends without usage. It counts once."""
    telemetry = CountsLate()
    table = Observation(recovery, telemetry)
    deadline, number = time.monotonic() + 2.5, 0
    with ThreadPoolExecutor(3) as pool:
        while number < 5_000 and time.monotonic() < deadline:
            number += 1
            call = Call(table, number)
            job = Job(SERVER, f"resp_{number}", 1.0, call)
            recovery.submit(job)
            futures = [pool.submit(_observe_after, random.random() * 2e-4, table, number) for _ in range(3)]  # noqa: S311
            for future in futures:
                future.result()
            eventually(lambda call=call: telemetry.ids or call.sources, f"round {number} counted")
            eventually(lambda: not table.is_useful, "nothing left")
            assert (telemetry.ids, call.sources) in (
                ([f"resp_{number}"], []),
                ([], [UsageSource.OBSERVATION]),
            )
            telemetry.ids.clear()
    assert number > 50


@pytest.mark.usefixtures("_switching")
def test_a_call_is_awaited_also_while_its_look_up_ends(recovery: Recovery) -> None:
    """From the end of a call until its usage is seen, there is no moment in which it would be overlooked."""
    table: Any = Observation(recovery, CountsLate())
    deadline = time.monotonic() + 1.0
    for number in range(2_000):
        job = Job(SERVER, f"resp_{number}", 1.0, Call(table, number))
        recovery.submit(job)
        while (SERVER, job.response_id) not in table._uncounted:
            assert table.awaits(SERVER, job.response_id)
            assert table.is_useful
        table.observe(SERVER, seen(number))
        if time.monotonic() > deadline:
            break


def _observe_after(seconds: float, table: Observation, number: int) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    table.observe(SERVER, seen(number))


@pytest.mark.usefixtures("_switching")
def test_threads_that_fetch_the_same_responses_count_each_once(serve: Serve, instrument: Instrument) -> None:
    """Many threads fetch what is deferred or timing out just now: the sums are those of the server."""
    observed = instrument(retrieval_timeout=0.05)
    backend = Backend(serve, lambda _: Plan(answer(), cut_after=4, end=Cut()), in_progress)
    rounds, threads = 16, 4
    with backend.client() as client, backend.client(by="application") as other:
        with ThreadPoolExecutor(threads) as pool:
            for number in range(rounds):
                if number % 2:
                    client.responses.create(**ASKED, **WINDOW)
                else:
                    cut(client)
                response_id = next(reversed(backend.stored))
                deadline = time.monotonic() + 0.1

                def fetch_often(response_id: str = response_id, deadline: float = deadline) -> None:
                    while time.monotonic() < deadline:
                        time.sleep(random.random() * 0.02)  # noqa: S311
                        other.responses.retrieve(response_id)

                list(pool.map(lambda _: fetch_often(), range(threads)))
                other.responses.retrieve(response_id)
        observed.spans(rounds)
        eventually(lambda: observed.pending() == 0, "all look-ups")
    assert observed.tokens() == {"input": (rounds, 7 * rounds), "output": (rounds, 21 * rounds)}
    counted = observed.calls()
    assert sum(counted.values()) == rounds
    assert sum(late(observed).values()) == rounds - counted.get("observation", 0)


def test_threads_may_keep_and_see_calls_at_the_same_time(recovery: Recovery) -> None:
    """The table stays within its bound, and each call counts at most once, whatever threads do to it."""
    telemetry = CountsLate()
    table: Any = Observation(recovery, telemetry)

    def work(first: int) -> None:
        for number in range(first, first + 6_000):
            table.keep(f"resp_{number}", uncounted(number), None)
            for other in (number, number - 6_000, number - 50):
                if other % 3 == 0:
                    table.observe(SERVER, seen(other))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(0, 24_000, 6_000)))
    assert len(table._uncounted) <= 10_000 + 4
    assert len(telemetry.ids) == len(set(telemetry.ids))
    assert {int(name.removeprefix("resp_")) % 3 for name in telemetry.ids} == {0}
