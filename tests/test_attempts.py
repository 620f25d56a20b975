"""How often a request was sent, which request the server knows it as, and what is left of the rate limits."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import openai
import pytest
from openai._base_client import AsyncAPIClient, SyncAPIClient
from opentelemetry.trace import StatusCode

from billing import ASKED, BACKGROUND, COUNTS, BilledAPI, answer, compaction, counted
from calls import CUT, entered, items, settle
from conftest import Instrument, Serve
from embedded.answer import Answer
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Wait
from embedded.responses_api import Plan
from observed import Observed, eventually, token_attributes, usage_attributes

ANSWER = answer()
RESENT, REQUEST_ID = "http.request.resend_count", "openai_responses.request_id"
KINDS = pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])

LOST = Reply(before=(Cut(),))
SILENT = Reply(before=(Hold(),))


def refused(
    number: int = 1, status: int = 503, wait_ms: float = 1, headers: dict[str, str] | None = None
) -> Reply:
    """A refusal after which the SDK sends the request again, with a request id of its own."""
    return Reply.json(
        {"error": {"message": "no", "type": "server_error", "code": "no_way"}},
        status,
        headers={"x-request-id": f"req_{number}", "retry-after-ms": f"{wait_ms}", **(headers or {})},
    )


class Server:
    """A server that gives one reply after the other, and then answers."""

    def __init__(self, serve: Serve, *replies: Reply, made: Answer = ANSWER) -> None:
        self._left = list(replies)
        self._made = made
        self.server: ScriptedServer = serve(self._reply)

    @property
    def requests(self) -> int:
        return len(self.server.requests)

    def client(self, kind: type[Any] = openai.OpenAI, **given: Any) -> Any:
        return kind(base_url=f"{self.server.url}/v1", api_key="k", **{"max_retries": 2, **given})

    def _reply(self, request: SeenRequest) -> Reply:
        if self._left:
            return self._left.pop(0)
        headers = {"x-request-id": "req_last"}
        if request.json.get("stream"):
            return Reply.sse(self._made.events(request.json), headers=headers)
        return Reply.json(self._made.response(request.json), headers=headers)


async def plain(client: Any) -> None:
    assert (await settle(client.responses.create(**ASKED))).id == ANSWER.id


async def streamed(client: Any) -> None:
    stream = await settle(client.responses.create(**ASKED, stream=True))
    assert [event async for event in items(stream)]


async def raw(client: Any) -> None:
    response = await settle(client.responses.with_raw_response.create(**ASKED))
    assert response.parse().id == ANSWER.id


async def raw_stream(client: Any) -> None:
    response = await settle(client.responses.with_raw_response.create(**ASKED, stream=True))
    assert [event async for event in items(response.parse())]


async def streaming(client: Any) -> None:
    async with entered(client.responses.with_streaming_response.create(**ASKED)) as response:
        assert (await settle(response.parse())).id == ANSWER.id


WAYS = pytest.mark.parametrize("way", [plain, streamed, raw, raw_stream, streaming])


def run(client: Any, way: Callable[[Any], Awaitable[None]]) -> None:
    """Make a call in this way."""

    async def main() -> None:
        try:
            await way(client)
        finally:
            await settle(client.close())

    asyncio.run(main())


def retries(observed: Observed) -> float:
    points = observed.points("openai_responses.retries")
    for point in points:
        assert dict(point.attributes) == {"gen_ai.provider.name": "openai", "gen_ai.request.model": "m"}
    return sum(point.value for point in points)


def assert_sent(observed: Observed, resent: int | None, request_id: str | None) -> dict[str, Any]:
    """Check the one span and the counter, and return the attributes of the span."""
    attributes = dict(observed.span().attributes or {})
    assert attributes.get(RESENT) == resent
    assert attributes.get(REQUEST_ID) == request_id
    assert retries(observed) == (resent or 0)
    assert sum(observed.calls().values()) == 1
    return attributes


# --- calls that recover, and calls that fail ---------------------------------------------------------


@KINDS
@WAYS
def test_a_call_that_recovers_says_how_often_it_was_sent_again(
    way: Callable[[Any], Awaitable[None]], kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """Two refusals and an answer are one call, sent again twice, under the id of the answer."""
    server = Server(serve, refused(1), refused(2, 429))
    run(server.client(kind), way)
    assert_sent(observed, 2, "req_last")
    assert token_attributes(observed.span()) == usage_attributes(COUNTS)
    assert server.requests == 3


@KINDS
@pytest.mark.parametrize("way", [plain, streamed])
def test_a_call_that_is_answered_at_once_was_not_sent_again(
    way: Callable[[Any], Awaitable[None]], kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """Without a retry there is no count of them."""
    run(Server(serve).client(kind), way)
    assert_sent(observed, None, "req_last")


@KINDS
@pytest.mark.parametrize("way", [plain, raw_stream, streaming])
def test_a_call_that_is_refused_in_the_end_was_sent_again(
    way: Callable[[Any], Awaitable[None]], kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """A call that fails counts its retries, too, and has the id of the last refusal."""
    server = Server(serve, *(refused(number) for number in range(3)))
    with pytest.raises(openai.InternalServerError):
        run(server.client(kind), way)
    attributes = assert_sent(observed, 2, "req_2")
    assert attributes["error.type"] == "no_way"
    assert observed.span().status.status_code is StatusCode.ERROR


@KINDS
def test_a_call_that_is_refused_for_good_has_its_request_id(
    kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """A refusal that the SDK does not retry has an id to ask the provider about."""
    with pytest.raises(openai.BadRequestError):
        run(Server(serve, refused(7, 400)).client(kind), plain)
    assert_sent(observed, None, "req_7")


@KINDS
@pytest.mark.parametrize(
    ("reply", "settings", "raised"),
    [(LOST, {}, openai.APIConnectionError), (SILENT, {"timeout": 0.1}, openai.APITimeoutError)],
    ids=["connection error", "timeout"],
)
def test_a_call_without_any_answer_was_sent_again(
    reply: Reply,
    settings: dict[str, Any],
    raised: type[Exception],
    kind: type[Any],
    serve: Serve,
    observed: Observed,
) -> None:
    """Where no answer comes, the retries are counted, and no server has given the request an id."""
    server = Server(serve, reply, reply)
    with pytest.raises(raised):
        run(server.client(kind, max_retries=1, **settings), streamed)
    attributes = assert_sent(observed, 1, None)
    assert attributes["error.type"] == raised.__name__
    assert server.requests == 2


@KINDS
def test_a_call_that_recovers_from_a_lost_connection(
    kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """What was sent again because the connection broke counts like what was refused."""
    run(Server(serve, LOST).client(kind), streamed)
    assert_sent(observed, 1, "req_last")


def test_a_refusal_and_then_no_answer(serve: Serve, observed: Observed) -> None:
    """The id of a refusal that was retried is not the id of the call."""
    with pytest.raises(openai.APIConnectionError):
        run(Server(serve, refused(1), LOST).client(max_retries=1), plain)
    assert_sent(observed, 1, None)


def test_calls_are_counted_apart(serve: Serve, observed: Observed) -> None:
    """Each call has its own count, and the counter has the sum."""
    server = Server(serve, refused(1), refused(2, 429))
    with server.client() as client:
        for _ in range(3):
            client.responses.create(**ASKED)
    assert [(span.attributes or {}).get(RESENT) for span in observed.spans(3)] == [2, None, None]
    assert retries(observed) == 2


def test_calls_at_the_same_time_are_counted_apart(serve: Serve, observed: Observed) -> None:
    """Tasks that are retried side by side have each their own count."""

    def reply(request: SeenRequest) -> Reply:
        again = int(request.headers.get("x-stainless-retry-count", 0))
        if again < int(request.json["input"]):
            return refused(again)
        return Reply.json(ANSWER.response(request.json))

    server = serve(reply)

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=5) as client:
            await asyncio.gather(*(client.responses.create(model="m", input=str(n % 4)) for n in range(24)))

    asyncio.run(main())
    resent = [(span.attributes or {}).get(RESENT, 0) for span in observed.spans(24)]
    assert sorted(resent) == sorted([0, 1, 2, 3] * 6)
    assert retries(observed) == 36


def test_a_compaction_that_is_sent_again_says_so(serve: Serve, observed: Observed) -> None:
    """A compaction is a call like another."""
    replies = [refused(1), Reply.json(compaction(), headers={"x-request-id": "req_2"})]
    server = serve(lambda _: replies.pop(0))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as client:
        client.post("/responses/compact", body=ASKED, cast_to=object)
    assert_sent(observed, 1, "req_2")


def test_what_the_application_asks_while_it_is_called_back_is_not_the_call_s(
    serve: Serve, observed: Observed
) -> None:
    """A request made inside of another, to get a key for it, has retries and refusals of its own."""
    if not callable(getattr(openai.OpenAI, "_refresh_api_key", None)):
        pytest.skip("not in this release of the SDK")
    server, keys = Server(serve), Server(serve, refused(1), refused(2))

    def get_key() -> str:
        with keys.client() as client:
            client.get("/keys", cast_to=object, options={"extra_json": {}})
        return "k"

    keys._reply = lambda _: keys._left.pop(0) if keys._left else Reply.json({})
    keys.server = serve(keys._reply)
    with openai.OpenAI(base_url=f"{server.server.url}/v1", api_key=get_key) as client:
        client.responses.create(**ASKED)
    assert keys.requests == 3
    assert_sent(observed, None, "req_last")


# --- cancellations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [plain, streamed])
def test_a_call_cancelled_while_it_waits_was_not_sent_again(
    way: Callable[[Any], Awaitable[None]], serve: Serve, observed: Observed
) -> None:
    """A retry that was only planned is none."""
    server = Server(serve, refused(1), refused(2, wait_ms=30_000))

    async def main() -> None:
        client = server.client(openai.AsyncOpenAI)
        task = asyncio.create_task(way(client))
        while server.requests < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await client.close()

    asyncio.run(main())
    attributes = assert_sent(observed, 1, None)
    assert attributes["openai_responses.stream.outcome"] == "cancelled"
    assert server.requests == 2


def test_a_call_cancelled_during_its_second_request_was_sent_again(serve: Serve, observed: Observed) -> None:
    """A request that has left counts, whether or not it is answered."""
    server = Server(serve, refused(1), SILENT)

    async def main() -> None:
        client = server.client(openai.AsyncOpenAI)
        task = asyncio.create_task(plain(client))
        while server.requests < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await client.close()

    asyncio.run(main())
    assert_sent(observed, 1, None)


class OutOfTimeError(Exception):
    """A time limit of the application, as Celery raises it from a signal handler."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers on this system")
@pytest.mark.parametrize(
    ("raised", "waits"),
    [(KeyboardInterrupt, True), (OutOfTimeError, True), (KeyboardInterrupt, False)],
    ids=["interrupted while it waits", "out of time while it waits", "interrupted during its second request"],
)
def test_a_call_that_a_signal_ends_counts_what_was_sent(
    raised: type[BaseException], waits: bool, serve: Serve, observed: Observed
) -> None:
    """A signal handler that raises ends a sync call: requests that were sent count, planned ones do not."""
    server = Server(serve, refused(1, wait_ms=30_000) if waits else refused(1), SILENT)

    def interrupt(*_: Any) -> None:
        raise raised

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with server.client() as client:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(raised):
                client.responses.create(**ASKED)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert_sent(observed, None if waits else 1, None)
    assert server.requests == (1 if waits else 2)


# --- beside a package that wraps `request` -----------------------------------------------------------


@dataclass(frozen=True)
class Wrapping:
    """A package that has stored the SDK's own `request` and wraps it, and what is observed beside it."""

    observed: Observed
    when: str
    wrap: Callable[[], None]

    def run(self, client: Any, way: Callable[[Any], Awaitable[None]]) -> None:
        """Make a call with a client that is older than the wrapper, or younger."""
        if self.when == "after the client was made":
            self.wrap()
        run(client, way)


@pytest.fixture(params=["before", "after", "after the client was made"])
def wrapping(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, instrument: Instrument
) -> Wrapping:
    """A package wraps `request` before the instrumentation does, or after."""
    sync, asynchronous = SyncAPIClient.request, AsyncAPIClient.request

    def wrap() -> None:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return sync(self, *args, **kwargs)

        async def async_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await asynchronous(self, *args, **kwargs)

        monkeypatch.setattr(openai.OpenAI, "request", call, raising=False)
        monkeypatch.setattr(openai.AsyncOpenAI, "request", async_call, raising=False)

    observed = Observed()
    if request.param == "before":
        wrap()
    instrument(observed)
    if request.param == "after":
        wrap()
    return Wrapping(observed, request.param, wrap)


@KINDS
@pytest.mark.parametrize("way", [plain, streamed])
def test_a_late_call_that_recovers_says_how_often_it_was_sent_again(
    way: Callable[[Any], Awaitable[None]], kind: type[Any], serve: Serve, wrapping: Wrapping
) -> None:
    """A call that is noticed at its answer has the counts and the id of one that was seen from the start."""
    wrapping.run(Server(serve, refused(1), refused(2)).client(kind), way)
    assert_sent(wrapping.observed, 2, "req_last")


@KINDS
def test_a_late_call_that_is_refused_in_the_end_was_sent_again(
    kind: type[Any], serve: Serve, wrapping: Wrapping
) -> None:
    """A call that is noticed at its error has the counts and the id of that error's answer."""
    left = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "3"}
    server = Server(serve, *(refused(number, 429, headers=left) for number in range(3)))
    with pytest.raises(openai.RateLimitError):
        wrapping.run(server.client(kind), plain)
    assert_sent(wrapping.observed, 2, "req_2")
    assert remaining(wrapping.observed) == {"requests": 3}


def test_a_late_call_without_any_answer_was_sent_again(serve: Serve, wrapping: Wrapping) -> None:
    """A call that is noticed at its connection error counts its retries."""
    with pytest.raises(openai.APIConnectionError):
        wrapping.run(Server(serve, LOST, LOST).client(max_retries=1), plain)
    assert_sent(wrapping.observed, 1, None)


# --- rate limits -------------------------------------------------------------------------------------


def limits(tokens: int | str, requests: int | str, prefix: str = "x-ratelimit") -> dict[str, str]:
    return {
        f"{prefix}-limit-tokens": "200000",
        f"{prefix}-remaining-tokens": str(tokens),
        f"{prefix}-limit-requests": "500",
        f"{prefix}-remaining-requests": str(requests),
        f"{prefix}-reset-tokens": "12ms",
    }


def remaining(observed: Observed) -> dict[Any, float]:
    return counted(observed, "openai_responses.rate_limit.remaining", "openai_responses.rate_limit.type")


def limit(observed: Observed) -> dict[Any, float]:
    return counted(observed, "openai_responses.rate_limit.limit", "openai_responses.rate_limit.type")


def client_of(server: ScriptedServer, kind: type[Any] = openai.OpenAI, **given: Any) -> Any:
    return kind(base_url=f"{server.url}/v1", api_key="k", **{"max_retries": 0, **given})


@KINDS
@pytest.mark.parametrize("way", [plain, streamed])
def test_the_last_answer_says_what_is_left(
    way: Callable[[Any], Awaitable[None]], kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """Each answer brings the limits up to date, for its model and its server."""
    server = serve(BilledAPI(lambda _: Plan(ANSWER), headers=lambda n: limits(150_000 - n, 400 - n)))
    for _ in range(3):
        run(client_of(server, kind), way)
    assert remaining(observed) == {"tokens": 149_997, "requests": 397}
    assert limit(observed) == {"tokens": 200_000, "requests": 500}
    for point in observed.points("openai_responses.rate_limit.remaining"):
        assert {
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "m",
            "server.address": "127.0.0.1",
            "server.port": int(server.url.rpartition(":")[2]),
        } == {name: value for name, value in point.attributes.items() if "rate_limit" not in name}


def test_models_have_limits_of_their_own(serve: Serve, observed: Observed) -> None:
    """What one model has left says nothing of another."""
    server = serve(BilledAPI(lambda _: Plan(answer()), headers=lambda n: limits(1000 * n, n)))
    with client_of(server) as client:
        for model in ("one", "two"):
            client.responses.create(model=model, input="x")
    assert counted(
        observed,
        "openai_responses.rate_limit.remaining",
        "gen_ai.request.model",
        "openai_responses.rate_limit.type",
    ) == {("one", "tokens"): 1000, ("one", "requests"): 1, ("two", "tokens"): 2000, ("two", "requests"): 2}


@KINDS
@pytest.mark.parametrize("recovers", [True, False], ids=["then lost", "refused in the end"])
def test_a_refusal_says_what_is_left(
    recovers: bool, kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """Of a call that runs into its limit the refusal itself tells it, also if it is retried."""
    refusal = Reply.json({}, 429, headers={**limits(0, 12), "retry-after-ms": "1"})
    server = Server(serve, refusal, LOST if recovers else refusal)
    with pytest.raises((openai.APIConnectionError, openai.RateLimitError)):
        run(server.client(kind, max_retries=1), plain)
    assert remaining(observed) == {"tokens": 0, "requests": 12}


@KINDS
def test_a_refusal_that_is_retried_is_not_the_last_word(
    kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """The answer after it is newer."""
    refusal = Reply.json({}, 429, headers={**limits(0, 0), "retry-after-ms": "1"})
    answered = Reply.json(ANSWER.response(), headers=limits(77, 5))
    run(Server(serve, refusal, answered).client(kind), plain)
    assert remaining(observed) == {"tokens": 77, "requests": 5}


def test_an_answer_without_limits_leaves_them_as_they_were(serve: Serve, observed: Observed) -> None:
    """Where a server tells nothing, nothing is known anew."""
    server = serve(
        BilledAPI(lambda _: Plan(answer()), headers=lambda n: limits(50, 5) if n == 1 else {"x-rate": "1"})
    )
    with client_of(server) as client:
        for _ in range(3):
            client.responses.create(**ASKED)
    assert remaining(observed) == {"tokens": 50, "requests": 5}


ODD_VALUES = {
    "-1": None,
    "": None,
    "abc": None,
    "1.5": None,
    "1e3": None,
    "0x10": None,
    "+5": None,
    "1_000": None,
    "1, 2": None,
    "\u00b2": None,
    "9" * 40: None,
    "0": 0,
    "007": 7,
    "9" * 18: 10**18 - 1,
}


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value[:10]))
def test_an_odd_value_is_unknown(value: str, serve: Serve, observed: Observed) -> None:
    """Only a whole number is a number. The other limits are told all the same, and so is the call."""
    server = serve(BilledAPI(lambda _: Plan(answer()), headers=lambda _: limits(value, 5)))
    with client_of(server) as client:
        client.responses.create(**ASKED)
    expected = ODD_VALUES[value]
    assert remaining(observed) == {"requests": 5, **({} if expected is None else {"tokens": expected})}
    assert limit(observed) == {"tokens": 200_000, "requests": 500}
    assert observed.points("openai_responses.faults") == []
    assert observed.finished == 1


@pytest.mark.parametrize("prefix", ["x-ratelimit", "X-RateLimit", "X-RATELIMIT", "X-ratelimit"])
def test_names_of_headers_have_any_letter_case(prefix: str, serve: Serve, observed: Observed) -> None:
    """Servers and proxies write the names of headers as they like."""
    name = f"{prefix[:3]}equest-id"
    server = serve(lambda _: Reply.json(answer().response(), headers={**limits(9, 5, prefix), name: "req_1"}))
    with client_of(server) as client:
        client.responses.create(**ASKED)
    assert remaining(observed) == {"tokens": 9, "requests": 5}
    assert (observed.span().attributes or {})[REQUEST_ID] == "req_1"


def test_limits_come_from_calls_alone(serve: Serve, observed: Observed) -> None:
    """A look-up and a fetch of the application have limits of their own kind: they are not the model's."""
    made = answer()

    def reply(request: SeenRequest) -> Reply:
        if request.method == "POST" and "cancel" not in request.path:
            return Reply.json(made.response(status="queued"), headers=limits(1000, 10))
        if "stream" in request.query:
            return Reply.sse(made.events(), headers=limits(1, 1))
        return Reply.json(made.response(), headers=limits(2, 2))

    with client_of(serve(reply)) as client:
        client.responses.create(**ASKED, **BACKGROUND)
        observed.span()
        client.responses.retrieve(made.id)
        client.post(f"/responses/{made.id}/cancel", cast_to=object)
        client.get(f"/responses/{made.id}", cast_to=object, options={"params": {"stream": "true"}})
    assert remaining(observed) == {"tokens": 1000, "requests": 10}
    assert limit(observed) == {"tokens": 200_000, "requests": 500}


def test_a_compaction_says_what_is_left(serve: Serve, observed: Observed) -> None:
    """A compaction uses up the same limits."""
    server = serve(BilledAPI(compact=lambda _: Reply.json(compaction(), headers=limits(8, 4))))
    with client_of(server) as client:
        client.post("/responses/compact", body=ASKED, cast_to=object)
    assert remaining(observed) == {"tokens": 8, "requests": 4}


# --- request ids -------------------------------------------------------------------------------------


def test_the_request_id_is_that_of_the_call_and_not_of_its_look_up(serve: Serve, observed: Observed) -> None:
    """The id names the request that the provider is asked about."""
    made = answer()

    def reply(request: SeenRequest) -> Reply:
        if request.method == "POST":
            return Reply.sse(made.events()[:4], end=Cut(), headers={"x-request-id": "req_of_the_call"})
        return Reply.json(made.response(), headers={"x-request-id": "req_of_the_look_up"})

    with client_of(serve(reply)) as client, pytest.raises(CUT):
        list(client.responses.create(**ASKED, stream=True))
    attributes = assert_sent(observed, None, "req_of_the_call")
    assert attributes["openai_responses.usage.source"] == "retrieval"


@pytest.mark.parametrize(
    ("sent", "told"),
    [("r" * 5000, "r" * 128), ("", None), ("req_\u00fc", "req_\ufffd"), ("a, b", "a, b")],
    ids=["long", "empty", "not ASCII", "two in one"],
)
def test_an_odd_request_id_is_harmless(sent: str, told: str | None, serve: Serve, observed: Observed) -> None:
    """An id of a server is a short text, whatever it sends."""
    with client_of(
        serve(lambda _: Reply.json(answer().response(), headers={"x-request-id": sent}))
    ) as client:
        client.responses.create(**ASKED)
    assert_sent(observed, None, told)


def test_a_fetch_has_a_request_id_of_its_own(serve: Serve, observed: Observed) -> None:
    """A streamed fetch is a request like another, and its retries count."""
    made, replies = answer(), [refused(1)]

    def reply(request: SeenRequest) -> Reply:
        if request.method == "GET" and replies:
            return replies.pop()
        if request.method == "GET":
            return Reply.sse(made.events(), headers={"x-request-id": "req_of_the_fetch"})
        return Reply.json(made.response(), headers={"x-request-id": "req_of_the_call"})

    server = serve(reply)
    with client_of(server, max_retries=2) as client:
        client.responses.create(**ASKED)
        client.get(f"/responses/{made.id}", cast_to=object, options={"params": {"stream": "true"}})
    called, fetched = observed.spans(2)
    assert (called.attributes or {})[REQUEST_ID] == "req_of_the_call"
    assert (fetched.attributes or {})[REQUEST_ID] == "req_of_the_fetch"
    assert (fetched.attributes or {})[RESENT] == 1
    (point,) = observed.points("openai_responses.retries")
    assert point.value == 1


def test_many_threads_are_counted_apart(serve: Serve, observed: Observed) -> None:
    """Threads that share a client have each their own retries and ids."""

    def reply(request: SeenRequest) -> Reply:
        again = int(request.headers.get("x-stainless-retry-count", 0))
        number = request.json["input"]
        if again < int(number) % 3:
            return refused(again)
        return Reply.json(answer().response(request.json), headers={"x-request-id": f"req_{number}"})

    with client_of(serve(reply), max_retries=3) as client:
        threads = [
            threading.Thread(target=client.responses.create, kwargs={"model": "m", "input": str(number)})
            for number in range(18)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [dict(span.attributes or {}) for span in observed.spans(18)]
    told = {attributes[REQUEST_ID]: attributes.get(RESENT, 0) for attributes in found}
    assert told == {f"req_{number}": number % 3 for number in range(18)}
    assert retries(observed) == 18


def test_a_retry_is_seen_while_the_call_goes_on(serve: Serve, observed: Observed) -> None:
    """The rate limits of a refusal are known before its call ends."""
    release = threading.Event()
    refusal = Reply.json({}, 429, headers={**limits(0, 3), "retry-after-ms": "1"})
    answered = Reply.json(ANSWER.response(), headers={"x-request-id": "req_last"})
    server = Server(serve, refusal, replace(answered, before=(Wait(release),)))
    with server.client() as client:
        thread = threading.Thread(target=client.responses.create, kwargs=ASKED)
        thread.start()
        try:
            eventually(lambda: server.requests == 2, "the second request")
            time.sleep(0.02)
            assert remaining(observed) == {"tokens": 0, "requests": 3}
            assert observed.finished == 0
        finally:
            release.set()
            thread.join()
    assert_sent(observed, 1, "req_last")
