"""What the application itself learns of a response is used, and a response's tokens are counted once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from opentelemetry.trace import StatusCode

from calls import CAN_RESUME, CUT, entered, is_in_sdk, items, needs_resume, settle
from conftest import Instrument, Serve
from embedded.answer import FAILED, Answer, FunctionCall, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from otel_responses_usage._facts.request import Server
from otel_responses_usage._facts.response import Response as ResponseFacts
from otel_responses_usage._facts.usage import MissingReason, Usage, UsageSource
from otel_responses_usage._lookup import lookups as _lookup
from otel_responses_usage._lookup.job import Endpoint, Job, LookupRequest, LookupResult
from otel_responses_usage._lookup.recovery import Recovery
from otel_responses_usage._lookup.retrieval import Answer as Answered
from otel_responses_usage._lookup.retrieval import RetrievalPolicy

COUNTS = usage(7, 21, cached=3, reasoning=11)
ANSWER = Answer(pieces=("one ", "two ", "three "), usage=COUNTS)
COUNTED_ONCE = {"input": (1, 7), "output": (1, 21)}
ASKED: dict[str, Any] = {"model": "m", "input": "x"}
BACKGROUND: dict[str, Any] = {"extra_body": {"background": True}}  # early releases do not know it by name
POLL_S = 0.03


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look-ups are made in short and even intervals."""
    policy = RetrievalPolicy(first_wait_s=POLL_S, longest_wait_s=POLL_S)
    monkeypatch.setattr(_lookup, "RetrievalPolicy", lambda: policy)


class Backend:
    """A server that cuts its streams, and on which we, other than the application, see work under way."""

    def __init__(self, serve: Serve, plan: Callable[[SeenRequest], Plan] | None = None) -> None:
        self.api = ResponsesAPI(plan or (lambda _: Plan(replace(ANSWER), cut_after=5, end=Cut())))
        self.keeps_us_waiting = True
        self.shows: dict[str, Any] | None = None  # to the application, if not the truth
        self.server: ScriptedServer = serve(self._answer)

    def client(self, kind: type[Any] = openai.OpenAI, *, by: str = "caller") -> Any:
        """A client of the application; what is asked `by` anybody but the caller is no look-up of ours."""
        return kind(
            base_url=f"{self.server.url}/v1", api_key="k", max_retries=0, default_headers={"x-by": by}
        )

    @property
    def gets(self) -> int:
        """GETs of ours so far: they have the headers of the call."""
        return sum(self._is_ours(request) for request in self.server.requests)

    def cut(self, client: openai.OpenAI, **asked: Any) -> str:
        """Make a call that is cut, and return the id of its response."""
        with pytest.raises(CUT):
            list(client.responses.create(**ASKED, **asked, stream=True))
        return next(reversed(self.api.stored))

    def _is_ours(self, request: SeenRequest) -> bool:
        return request.method == "GET" and request.headers["x-by"] == "caller"

    def _answer(self, request: SeenRequest) -> Reply:
        response_id = request.path.rpartition("/")[2]
        if self._is_ours(request) and self.keeps_us_waiting:
            return Reply.json({"id": response_id, "status": "in_progress", "usage": None})
        looks = request.method == "GET" and "stream" not in request.query and not self._is_ours(request)
        if self.shows is not None and (looks or response_id == "cancel"):
            return Reply.json(self.shows)
        return self.api(request)


@pytest.fixture
def backend(serve: Serve) -> Backend:
    return Backend(serve)


def attributes_of(observed: Observed, kind: str = "chat") -> dict[str, Any]:
    """The attributes of the one span of this kind."""
    (span,) = (span for span in observed.spans(observed.finished or 1) if span.name.startswith(kind))
    return dict(span.attributes or {})


def stays(backend: Backend) -> bool:
    """Whether no GET of ours is made any more; one that was under way may still arrive."""
    time.sleep(2 * POLL_S)
    before = backend.gets
    time.sleep(6 * POLL_S)
    return backend.gets == before


# --- what settles a waiting span ---------------------------------------------------------------------


async def retrieve(client: Any, response_id: str) -> None:
    await settle(client.responses.retrieve(response_id))


async def retrieve_by_name(client: Any, response_id: str) -> None:
    await settle(client.responses.retrieve(response_id=response_id, include=["reasoning.encrypted_content"]))


async def retrieve_raw(client: Any, response_id: str) -> None:
    raw = await settle(client.responses.with_raw_response.retrieve(response_id))
    assert raw.parse().id == response_id


async def retrieve_streaming(client: Any, response_id: str) -> None:
    async with entered(client.responses.with_streaming_response.retrieve(response_id)) as response:
        assert (await settle(response.parse())).id == response_id


async def retrieve_beta(client: Any, response_id: str) -> None:
    await settle(client.beta.responses.retrieve(response_id))


async def get(client: Any, response_id: str) -> None:
    await settle(client.get(f"/responses/{response_id}", cast_to=Response))


async def resume(client: Any, response_id: str) -> None:
    stream = await settle(client.responses.retrieve(response_id, stream=True, starting_after=3))
    assert [event.type async for event in items(stream)][-1] == "response.completed"


async def resume_raw(client: Any, response_id: str) -> None:
    raw = await settle(client.responses.with_raw_response.retrieve(response_id, stream=True))
    async for _ in items(raw.parse()):
        pass


async def resume_by_helper(client: Any, response_id: str) -> None:
    async with entered(client.responses.stream(response_id=response_id)) as stream:
        assert (await settle(stream.get_final_response())).id == response_id


async def cancel(client: Any, response_id: str) -> None:
    await settle(client.responses.cancel(response_id))


@dataclass(frozen=True)
class Fetch:
    """A way for the application to see a response, and what of the SDK it takes."""

    name: str
    make: Callable[[Any, str], Awaitable[None]]
    needs: str = "responses.retrieve"
    is_span: bool = False

    def __str__(self) -> str:
        return self.name

    def is_in_sdk(self) -> bool:
        return is_in_sdk(self.needs) and (CAN_RESUME or not self.is_span)


FETCHES = (
    Fetch("retrieve", retrieve),
    Fetch("retrieve by name", retrieve_by_name),
    Fetch("retrieve raw", retrieve_raw),
    Fetch("retrieve streaming", retrieve_streaming),
    Fetch("retrieve beta", retrieve_beta, needs="beta.responses.retrieve"),
    Fetch("get", get),
    Fetch("resume", resume, is_span=True),
    Fetch("resume raw", resume_raw, is_span=True),
    Fetch("resume by helper", resume_by_helper, is_span=True),
    Fetch("cancel", cancel, needs="responses.cancel"),
)


@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])
@pytest.mark.parametrize("fetch", FETCHES, ids=str)
def test_what_the_application_sees_settles_the_span(
    fetch: Fetch, kind: type[Any], backend: Backend, observed: Observed
) -> None:
    """What the application fetches, resumes or cancels is counted from that, and we ask for it no more."""
    with backend.client() as client:
        if not fetch.is_in_sdk():
            pytest.skip("not in this release of the SDK")
        response_id = backend.cut(client, **BACKGROUND)
    backend.shows = backend.api.stored[response_id]
    eventually(lambda: backend.gets >= 2, "our polling")
    assert (observed.finished, observed.pending()) == (0, 1)

    async def main() -> None:
        application = backend.client(kind, by="somebody else")
        try:
            await fetch.make(application, response_id)
        finally:
            await settle(application.close())

    asyncio.run(main())

    observed.spans(1 + fetch.is_span)
    attributes = attributes_of(observed)
    assert attributes["openai_responses.usage.source"] == "observation"
    assert attributes["openai_responses.stream.outcome"] == "cut"
    assert attributes["openai_responses.response.status"] == "completed"
    assert {name: attributes[name] for name in usage_attributes(COUNTS)} == usage_attributes(COUNTS)
    assert observed.tokens() == COUNTED_ONCE
    assert observed.calls() == {"observation": 1}
    assert observed.pending() == 0
    assert stays(backend)
    if fetch.is_span:
        fetched = attributes_of(observed, "fetch_response")
        assert not {name for name in fetched if "usage" in name}
        assert fetched["gen_ai.response.id"] == response_id


@pytest.mark.parametrize(
    "seen",
    [
        {"status": "in_progress", "usage": None},
        {"status": "queued", "usage": None},
        {"status": "in_progress", "usage": usage(1, 1)},
        {"status": "cancelled", "usage": None},
        {"status": "completed", "usage": None},
        {"object": "list", "status": "completed", "usage": usage(1, 1)},
    ],
    ids=["in progress", "queued", "counts on the way", "cancelled", "no counts", "another object"],
)
def test_what_says_nothing_of_the_bill_settles_nothing(
    seen: dict[str, Any], backend: Backend, observed: Observed
) -> None:
    """Until a response has ended and is counted, its span waits on; then we ask, and have the truth."""
    with backend.client() as client:
        response_id = backend.cut(client, **BACKGROUND)
        backend.shows = {"id": response_id, **seen}
        with backend.client(by="somebody else") as other:
            other.responses.retrieve(response_id)
        before = backend.gets
        eventually(lambda: backend.gets > before + 1, "our polling to go on")
        assert (observed.finished, observed.pending()) == (0, 1)
        backend.keeps_us_waiting = False
        assert token_attributes(observed.span()) == usage_attributes(COUNTS)
    assert attributes_of(observed)["openai_responses.usage.source"] == "retrieval"
    assert observed.tokens() == COUNTED_ONCE


@pytest.mark.parametrize(
    "fetch", [fetch for fetch in FETCHES if fetch.name in {"retrieve", "resume"}], ids=str
)
def test_a_response_that_is_shown_under_another_id_settles_its_span(
    fetch: Fetch, serve: Serve, observed: Observed
) -> None:
    """Where ids are encrypted anew in each answer, the id in the URL says which call has been fetched."""
    shown = replace(ANSWER, id="resp_encrypted_anew")
    created = {"type": "response.created", "response": {"id": ANSWER.id, "status": "in_progress"}}

    def proxy(request: SeenRequest) -> Reply:
        if request.method == "POST":
            return Reply.sse([created], end=Cut())
        if request.headers["x-by"] == "caller":
            return Reply.json({**shown.response(), "status": "in_progress", "usage": None})
        return Reply.sse(shown.events()) if "stream" in request.query else Reply.json(shown.response())

    server = serve(proxy)

    def client(by: str) -> Any:
        return openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="k", max_retries=0, default_headers={"x-by": by}
        )

    with client("caller") as caller, client("somebody else") as other:
        if not fetch.is_in_sdk():
            pytest.skip("not in this release of the SDK")
        with pytest.raises(CUT):
            list(caller.responses.create(**ASKED, **BACKGROUND, stream=True))
        eventually(lambda: observed.pending() == 1, "the span held")
        asyncio.run(fetch.make(other, ANSWER.id))
    observed.spans(1 + fetch.is_span)
    attributes = attributes_of(observed)
    assert attributes["openai_responses.usage.source"] == "observation"
    assert attributes["gen_ai.response.id"] == ANSWER.id
    assert observed.tokens() == COUNTED_ONCE


@needs_resume
def test_a_resumed_stream_that_is_left_early_settles_nothing(backend: Backend, observed: Observed) -> None:
    """What is resumed and closed before its end is a fetch that ended so; the call is looked up as ever."""
    with backend.client() as client:
        response_id = backend.cut(client, **BACKGROUND)
        some_more = Reply.sse(ANSWER.events()[3:6], end=Hold())
        backend.api._records[response_id].resume_replies[:] = [some_more]
        with backend.client(by="somebody else") as other:
            with other.responses.retrieve(response_id, stream=True, starting_after=2) as stream:
                next(stream)
            backend.keeps_us_waiting = False
        observed.spans(2)
    assert attributes_of(observed)["openai_responses.usage.source"] == "retrieval"
    fetched = attributes_of(observed, "fetch_response")
    assert fetched["openai_responses.stream.outcome"] == "closed"
    assert "openai_responses.retrieval.attempts" not in fetched
    assert observed.tokens() == COUNTED_ONCE
    assert observed.calls() == {"retrieval": 1}


def test_a_fetch_that_the_application_reads_in_pieces_is_not_used(
    backend: Backend, observed: Observed
) -> None:
    """Pieces of a body are the application's. The look-up goes on, and the tokens are counted once."""
    with backend.client() as client:
        response_id = backend.cut(client, **BACKGROUND)
        with backend.client(by="somebody else") as other:
            with other.responses.with_streaming_response.retrieve(response_id) as response:
                assert response_id in b"".join(response.iter_bytes()).decode()
            backend.keeps_us_waiting = False
        assert token_attributes(observed.span()) == usage_attributes(COUNTS)
    assert observed.tokens() == COUNTED_ONCE
    assert observed.calls() == {"retrieval": 1}


@needs_resume
def test_what_nobody_waits_for_changes_nothing(backend: Backend, observed: Observed) -> None:
    """Fetching, resuming or cancelling a settled response counts nothing, nor does one made elsewhere."""
    backend.keeps_us_waiting = False
    with backend.client() as client:
        response_id = backend.cut(client, **BACKGROUND)
        observed.span()
        backend.shows = backend.api.stored[response_id]
        elsewhere = Answer(usage=usage(100, 100))
        backend.api._plan = lambda _: Plan(elsewhere)
        with backend.client(by="somebody else") as other:
            ResponsesUsageInstrumentor().uninstrument()
            other.responses.create(**ASKED)
            ResponsesUsageInstrumentor().instrument(
                tracer_provider=observed.tracer_provider, meter_provider=observed.meter_provider
            )
            for one in (response_id, elsewhere.id):
                other.responses.retrieve(one)
                list(other.responses.retrieve(one, stream=True, starting_after=0))
            other.responses.cancel(response_id)
    names = [span.name for span in observed.spans(3)]
    assert names == ["chat m", "fetch_response", "fetch_response"]
    assert observed.tokens() == COUNTED_ONCE
    assert observed.calls() == {"retrieval": 1}


# --- calls in the background that are not streamed ---------------------------------------------------


def test_a_background_create_waits_for_its_usage(backend: Backend, instrument: Instrument) -> None:
    """A create that answers `queued` ends when it returns; its usage is waited for as long as work takes."""
    observed = instrument(retrieval_timeout=0.05, background_timeout=30)
    with backend.client() as client:
        began_ns = time.time_ns()
        response = client.responses.create(**ASKED, **BACKGROUND)
        returned_ns = time.time_ns()
        assert response.status == "queued"
        eventually(lambda: backend.gets >= 5, "our polling")
        assert (observed.finished, observed.pending()) == (0, 1)
        backend.keeps_us_waiting = False
        span = observed.span()
    attributes = attributes_of(observed)
    assert span.start_time is not None
    assert span.end_time is not None
    assert began_ns <= span.start_time <= span.end_time <= returned_ns
    (duration,) = observed.points("gen_ai.client.operation.duration")
    assert duration.sum == (span.end_time - span.start_time) / 1e9
    assert attributes["openai_responses.stream.outcome"] == "completed"
    assert attributes["openai_responses.response.status"] == "completed"
    assert attributes["openai_responses.usage.source"] == "retrieval"
    assert attributes["openai_responses.retrieval.attempts"] == backend.gets
    assert attributes["openai_responses.retrieval.duration"] > 4 * POLL_S
    assert "gen_ai.request.stream" not in attributes
    assert token_attributes(span) == usage_attributes(COUNTS)
    assert observed.tokens() == COUNTED_ONCE


def test_the_application_s_own_polling_settles_a_background_create(
    backend: Backend, observed: Observed
) -> None:
    """An application that polls as the API's guide says has its usage from its own last fetch, once."""
    with backend.client() as client, backend.client(by="somebody else") as other:
        statuses = iter(["queued", "in_progress", "in_progress"])
        response = client.responses.create(**ASKED, **BACKGROUND)
        backend.api._records[response.id].get_replies[:] = list(statuses)
        while response.status in {"queued", "in_progress"}:
            response = other.responses.retrieve(response.id)
            time.sleep(POLL_S)
    assert token_attributes(observed.span()) == usage_attributes(COUNTS)
    assert attributes_of(observed)["openai_responses.usage.source"] == "observation"
    assert observed.tokens() == COUNTED_ONCE
    assert stays(backend)


def test_a_background_create_that_fails_later_is_failed(serve: Serve, observed: Observed) -> None:
    """The span of a create ends as its work does."""
    backend = Backend(serve, lambda _: Plan(Answer(ANSWER.pieces, COUNTS, ending=FAILED)))
    backend.keeps_us_waiting = False
    with backend.client() as client:
        client.responses.create(**ASKED, **BACKGROUND)
        span = observed.span()
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "failed"
    assert attributes["error.type"] == "server_error"
    assert span.status.status_code is StatusCode.ERROR
    assert observed.tokens() == COUNTED_ONCE


# --- one response, one count -------------------------------------------------------------------------


def test_two_calls_with_the_same_id_are_two_calls(serve: Serve, observed: Observed) -> None:
    """A server that hands an id out twice is served twice: each span is ended, with its counts."""
    backend = Backend(serve, lambda _: Plan(ANSWER, cut_after=5, end=Cut()))
    with backend.client() as client:
        assert backend.cut(client) == backend.cut(client) == ANSWER.id
        eventually(lambda: observed.pending() == 2, "both spans held")
        with backend.client(by="somebody else") as other:
            other.responses.retrieve(ANSWER.id)
        backend.keeps_us_waiting = False
        for span in observed.spans(2):
            assert token_attributes(span) == usage_attributes(COUNTS)
        assert backend.cut(client) == ANSWER.id
        observed.spans(3)
    assert observed.tokens() == {"input": (3, 21), "output": (3, 63)}
    assert observed.calls()["retrieval"] >= 1
    assert sum(observed.calls().values()) == 3
    assert observed.pending() == 0


def test_another_server_s_response_of_the_same_id_is_another(serve: Serve, observed: Observed) -> None:
    """Where ids are counted from one, two servers have the same."""
    backend, other = (
        Backend(serve, lambda _, answer=answer: Plan(answer, cut_after=5, end=Cut()))
        for answer in (ANSWER, replace(ANSWER, usage=usage(1000, 2000)))
    )
    with backend.client() as client, other.client() as elsewhere:
        backend.cut(client)
        eventually(lambda: observed.pending() == 1, "the span held")
        elsewhere.responses.retrieve(ANSWER.id)
        backend.keeps_us_waiting = False
        assert token_attributes(observed.span()) == usage_attributes(COUNTS)
    assert observed.calls() == {"retrieval": 1}


def test_fetches_at_the_same_time_count_once(backend: Backend, observed: Observed) -> None:
    """Many tasks that fetch the response while we poll for it: one of us is believed, once."""
    with backend.client() as client:
        response_id = backend.cut(client, **BACKGROUND)

    async def main() -> None:
        async with backend.client(openai.AsyncOpenAI, by="somebody else") as other:
            backend.keeps_us_waiting = False
            await asyncio.gather(*(other.responses.retrieve(response_id) for _ in range(10)))

    asyncio.run(main())
    assert token_attributes(observed.span()) == usage_attributes(COUNTS)
    assert observed.tokens() == COUNTED_ONCE
    assert sum(observed.calls().values()) == 1


SERVER = Server("openai", "127.0.0.1", 80)


class Meanwhile:
    """A retriever during whose request something happens that ends the look-up."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self._happens = happens
        self.gets = 0

    def get(self, target: object, timeout_s: float) -> Answered:  # noqa: ARG002
        self.gets += 1
        self._happens()
        return Answered(200, ResponseFacts(id="resp_1", status="in_progress"))

    def close(self) -> None:
        pass

    interrupt = close


@pytest.mark.parametrize("ends_by", ["observation", "timeout"])
def test_a_look_up_that_is_over_while_its_answer_arrives_asks_no_more(ends_by: str) -> None:
    """Settled by the application, or out of time, in the very moment of an answer: it is over."""
    settled = threading.Event()
    results = []

    def happens() -> None:
        if ends_by == "timeout":
            time.sleep(job.timeout_s)
        else:
            recovery.observe(SERVER, ResponseFacts(id="resp_1", status="completed", usage=Usage(7, 21)))

    def settle_job(result: LookupResult, source: UsageSource) -> None:
        results.append((result.reason, source))
        settled.set()

    retriever = Meanwhile(happens)
    recovery = Recovery(Config(), lambda _: retriever)
    endpoint = Endpoint("127.0.0.1", 80, background=False, tenant=0)
    listener = SimpleNamespace(
        on_accept=lambda: None,
        on_begin=lambda _: LookupRequest(endpoint, SimpleNamespace(tenant=0)),
        on_result=lambda _, result, source: settle_job(result, source),
    )
    job = Job(SERVER, "resp_1", 0.1, listener)
    recovery.submit(job)
    try:
        assert settled.wait(2.0)
        time.sleep(5 * POLL_S)
        assert retriever.gets == 1
    finally:
        recovery.stop(0.0)
    assert results == [
        (None, UsageSource.OBSERVATION)
        if ends_by == "observation"
        else (MissingReason.TIMEOUT, UsageSource.RETRIEVAL)
    ]


# --- the SDK's own loop, and ways of asking ----------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])
def test_the_sdk_s_tool_runner_makes_one_span_per_call(
    kind: type[Any], streams: bool, serve: Serve, observed: Observed
) -> None:
    """A loop that calls the model, a tool, and the model again, makes two spans with their own counts."""
    runner_module = pytest.importorskip("openai.lib.responses_tool_runner")
    first = Answer((), usage(10, 5), calls=(FunctionCall("look_up", ('{"q": ', '"x"}')),))
    second = Answer(("done",), usage(20, 3))

    def plan(request: SeenRequest) -> Plan:
        returned = "function_call_output" in json.dumps(request.json["input"])
        return Plan(second if returned else first)

    server = serve(ResponsesAPI(plan))
    tool = {
        "type": "function",
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        "strict": False,
    }
    is_async = kind is openai.AsyncOpenAI

    async def later(arguments: dict[str, Any]) -> str:
        return str(arguments["q"])

    async def main() -> Any:
        prefix = "Async" if is_async else ""
        registered = getattr(runner_module, f"{prefix}RegisteredFunction")(
            tool, later if is_async else lambda arguments: str(arguments["q"])
        )
        runner = getattr(runner_module, f"{prefix}ResponsesToolRunner")(functions=[registered])
        client = kind(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        try:
            return await settle(runner.run(client, ASKED, max_steps=4, stream=streams))
        finally:
            await settle(client.close())

    response = asyncio.run(main())
    assert response.output_text == "done"
    called, answered = observed.spans(2)
    assert [(span.attributes or {})["gen_ai.response.finish_reasons"] for span in (called, answered)] == [
        ("tool_calls",),
        ("stop",),
    ]
    assert token_attributes(called) == usage_attributes(first.usage or {})
    assert token_attributes(answered) == usage_attributes(second.usage or {})
    assert observed.tokens() == {"input": (2, 30), "output": (2, 8)}
    assert len(server.requests) == 2


@pytest.mark.parametrize("streams", [True, 1, "yes"], ids=repr)
def test_whatever_the_sdk_takes_for_streamed_is_streamed(
    streams: Any, observed: Observed, serve: Serve
) -> None:
    """The SDK goes by truth: `stream=1` gives the application a stream, and the span says so."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as client:
        stream = client.responses.create(**ASKED, stream=streams)
        assert type(stream) is openai.Stream
        assert len(list(stream)) == len(ANSWER.events())
    attributes = attributes_of(observed)
    assert attributes["gen_ai.request.stream"] is True
    assert attributes["openai_responses.usage.source"] == "stream"
    assert observed.tokens() == COUNTED_ONCE


SENTINELS = {"None": None, "False": False, "0": 0, "NOT_GIVEN": openai.NOT_GIVEN}
if hasattr(openai, "omit"):
    SENTINELS["omit"] = openai.omit


@pytest.mark.parametrize("streams", SENTINELS.values(), ids=SENTINELS)
def test_whatever_the_sdk_takes_for_not_streamed_is_not(
    streams: Any, observed: Observed, serve: Serve
) -> None:
    """`None`, `False`, 0 and the SDK's sentinels ask for a whole response, and are no attributes."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    nothing = openai.NOT_GIVEN
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as client:
        response = client.responses.create(
            **ASKED,
            stream=streams,
            temperature=nothing,
            max_output_tokens=nothing,
            previous_response_id=nothing,
            reasoning=nothing,
            text=nothing,
            store=nothing,
        )
    assert type(response) is Response
    attributes = attributes_of(observed)
    assert attributes["openai_responses.usage.source"] == "response"
    assert [name for name in attributes if name.startswith("gen_ai.request.")] == ["gen_ai.request.model"]
    assert observed.tokens() == COUNTED_ONCE


@pytest.mark.parametrize("positional", [False, True], ids=["by name", "by position"])
def test_the_client_s_own_request_is_seen(positional: bool, observed: Observed, serve: Serve) -> None:
    """`client.request` with its arguments by position or by name is a call like any other."""
    from openai._models import FinalRequestOptions

    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    options = FinalRequestOptions(method="post", url="/responses", json_data={**ASKED, "stream": True})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as client:
        how: dict[str, Any] = {"stream": True, "stream_cls": openai.Stream[object]}
        if positional:
            stream = client.request(object, options, **how)
        else:
            stream = client.request(cast_to=object, options=options, **how)
        assert len(list(stream)) == len(ANSWER.events())
    assert attributes_of(observed)["openai_responses.usage.source"] == "stream"
    assert observed.tokens() == COUNTED_ONCE
