"""Every way of calling with every way of ending: one span, the exact usage, and an unharmed application."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import openai
import pytest
import trio
from opentelemetry.trace import SpanKind, StatusCode

from calls import CALLS, CUT, HTTP, MODEL, OTHER_HTTP, PROMPT, Call, Dropped, Reader, create, settle
from conftest import Instrument, Serve
from embedded.answer import FAILED, OUT_OF_QUOTA, OUT_OF_TOKENS, Answer, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Send
from embedded.responses_api import Plan, ResponsesAPI
from observed import token_attributes, usage_attributes

KEY = "canary-of-the-key"
pytestmark = pytest.mark.usefixtures("quick_collections")

ANSWER = Answer(
    pieces=tuple(f"canary-of-the-answer {n} " for n in range(12)),
    usage=usage(31, 245, cached=16, reasoning=128),
)
KINDS = [event["type"] for event in ANSWER.events()]
LAST_DELTA = len(KINDS) - KINDS[::-1].index("response.output_text.delta")  # its number, from one
REFUSED = Answer(ANSWER.pieces, ANSWER.usage, ending=OUT_OF_QUOTA)
ERROR_EVENT = [event["type"] for event in REFUSED.events()].index("error") + 1


class ApplicationError(Exception):
    """An exception of the application's own."""


Act = Callable[[Reader, Any], Awaitable[None]]


async def drain(reader: Reader, _: Any) -> None:
    await reader.rest()


async def close(reader: Reader, _: Any) -> None:
    await reader.take(6)
    await reader.close()


async def close_at_the_last_delta(reader: Reader, _: Any) -> None:
    await reader.take(LAST_DELTA)
    await reader.close()


async def close_the_client(reader: Reader, client: Any) -> None:
    await reader.take(6)
    await settle(client.close())


async def leave(reader: Reader, _: Any) -> None:
    await reader.take(6)


async def leave_at_once(_: Reader, __: Any) -> None:
    pass


async def stumble(reader: Reader, _: Any) -> None:
    await reader.take(6)
    raise ApplicationError


async def drop(reader: Reader, _: Any) -> None:
    await reader.take(6)
    raise Dropped


async def wait_in_vain(reader: Reader, _: Any) -> None:
    with anyio.fail_after(0.15):
        await reader.rest()


async def cancel_the_task(reader: Reader, _: Any) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(reader.rest)
        while reader.passed < 6:
            await anyio.sleep(0.002)
        group.cancel_scope.cancel()


def is_closed_by_the_library(call: Call, runtime: Runtime) -> bool:
    """Whether a stream is closed as soon as the application lets go of the loop over its bytes."""
    return HTTP.__name__ == "httpx2" and runtime.is_sync and not call.reads_events


class OnePieceAPI(ResponsesAPI):
    """Sends the last delta and all that follows it in one piece, and does not end the body."""

    def __call__(self, request: SeenRequest) -> Reply:
        reply = super().__call__(request)
        if request.method != "POST":
            return reply
        sent = [step for step in reply.steps if isinstance(step, Send)]
        last = b"".join(step.data for step in sent[LAST_DELTA - 1 :])
        return replace(reply, steps=(*sent[: LAST_DELTA - 1], Send(last), Hold()))


@dataclass(frozen=True)
class Ending:
    """What the server does, what the application does, and what has to come of it."""

    name: str
    act: Act
    outcome: str
    plan: Plan
    finish_reason: str = "error"
    error_types: frozenset[str] = frozenset()
    source: str = "retrieval"
    missing: str = ""  # why there is no source
    raises: tuple[type[BaseException], ...] = ()
    events: int | None = None
    only_async: bool = False
    of: Callable[[Call, Runtime], bool] = lambda _, __: True
    api: type[ResponsesAPI] = ResponsesAPI
    afterwards: Callable[[], object] = lambda: None  # when the application holds nothing any more

    def suits(self, call: Call, runtime: Runtime) -> bool:
        return self.of(call, runtime) and not (self.only_async and runtime.is_sync)

    def __str__(self) -> str:
        return self.name


SIX: dict[str, Any] = {"cut_after": 6, "end": Hold()}

ENDINGS = (
    Ending("drained", drain, "completed", Plan(ANSWER), finish_reason="stop", source="stream"),
    Ending(
        "incomplete",
        drain,
        "incomplete",
        Plan(Answer(ANSWER.pieces, ANSWER.usage, ending=OUT_OF_TOKENS)),
        finish_reason="length",
        source="stream",
    ),
    Ending(
        "failed",
        drain,
        "failed",
        Plan(Answer(ANSWER.pieces, ANSWER.usage, ending=FAILED)),
        error_types=frozenset({"server_error"}),
        source="stream",
    ),
    Ending(
        "cut",
        drain,
        "cut",
        Plan(ANSWER, cut_after=6, end=Cut()),
        error_types=frozenset({"RemoteProtocolError", "ReadError"}),  # the other is of aiohttp
        raises=CUT,
        events=6,
    ),
    Ending(
        "reset",
        drain,
        "cut",
        Plan(ANSWER, cut_after=6, end=Cut("rst")),
        error_types=frozenset({"ReadError"}),
        raises=CUT,
    ),
    Ending(
        "truncated",
        drain,
        "truncated",
        Plan(ANSWER, cut_after=6),
        error_types=frozenset({"stream_truncated"}),
        events=6,
    ),
    Ending("closed", close, "closed", Plan(ANSWER, **SIX), events=6),
    Ending("left", leave, "closed", Plan(ANSWER, **SIX), events=6),
    Ending("stumbled", stumble, "closed", Plan(ANSWER, **SIX), raises=(ApplicationError,), events=6),
    Ending(
        "timed_out",
        wait_in_vain,
        "cancelled",
        Plan(ANSWER, **SIX),
        raises=(TimeoutError,),
        events=6,
        only_async=True,
    ),
    Ending(
        "task_cancelled",
        cancel_the_task,
        "cancelled",
        Plan(ANSWER, **SIX),
        events=6,
        only_async=True,
    ),
    Ending(
        "dropped",
        drop,
        "abandoned",
        Plan(ANSWER, **SIX),
        error_types=frozenset({"stream_abandoned"}),
        raises=(Dropped,),
        events=6,
        afterwards=gc.collect,
        of=lambda call, runtime: not is_closed_by_the_library(call, runtime),
    ),
    Ending(
        "bytes_dropped",
        drop,
        "closed",
        Plan(ANSWER, **SIX),
        raises=(Dropped,),
        events=6,
        afterwards=gc.collect,
        of=lambda call, runtime: is_closed_by_the_library(call, runtime),
    ),
    Ending("never_read", leave_at_once, "closed", Plan(ANSWER, **SIX), missing="no_response_id", events=0),
    Ending("client_closed_first", close_the_client, "closed", Plan(ANSWER, **SIX), events=6),
    Ending(
        "closed_with_the_end_in_the_buffer",
        close_at_the_last_delta,
        "completed",
        Plan(ANSWER),
        finish_reason="stop",
        source="stream",
        events=len(KINDS),
        api=OnePieceAPI,
    ),
    Ending(
        "error_event",
        drain,
        "error",
        Plan(REFUSED, cut_after=ERROR_EVENT),
        error_types=frozenset({"insufficient_quota"}),
        raises=(openai.APIError,),
        events=ERROR_EVENT,
        of=lambda call, _: call.reads_events,
    ),
    Ending(
        "error_event_handed_on",
        drain,
        "error",
        Plan(REFUSED, cut_after=ERROR_EVENT),
        error_types=frozenset({"insufficient_quota"}),
        events=ERROR_EVENT,
        of=lambda call, _: not call.reads_events,
    ),
)


def drive_sync(main: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine that never really waits."""
    coroutine: Any = main()
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("a sync client has made its application wait for an event loop")


@dataclass(frozen=True)
class Runtime:
    """What drives the application, and its kind of client."""

    name: str
    drive: Callable[[Callable[[], Awaitable[None]]], None]
    client: Callable[..., Any]
    is_sync: bool = False

    def __str__(self) -> str:
        return self.name


def drive_asyncio(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main())  # type: ignore[arg-type]


SYNC = Runtime("sync", drive_sync, openai.OpenAI, is_sync=True)
ASYNCIO = Runtime("asyncio", drive_asyncio, openai.AsyncOpenAI)
TRIO = Runtime("trio", lambda main: trio.run(main), openai.AsyncOpenAI)
RUNTIMES = (SYNC, ASYNCIO, TRIO)


def over(runtime: Runtime, library: str, http_client: Callable[[], Any]) -> Runtime:
    """The same, with an HTTP client of the application's own choice."""
    return replace(
        runtime,
        name=f"{runtime}-over-{library}",
        client=lambda **how: runtime.client(**how, http_client=http_client()),
    )


# aiohttp behind the HTTP library's interface, and that library's twin; not every release takes them.
OTHER_CLIENTS = [
    *(
        [over(ASYNCIO, "aiohttp", openai.DefaultAioHttpClient)]
        if hasattr(openai, "DefaultAioHttpClient")
        else []
    ),
    *([over(SYNC, "the-other-library", OTHER_HTTP.Client)] if OTHER_HTTP else []),
    *(
        [over(one, "the-other-library", OTHER_HTTP.AsyncClient) for one in (ASYNCIO, TRIO)]
        if OTHER_HTTP
        else []
    ),
]
CREATE = Call("create", create)
CASES = [
    pytest.param(call, ending, runtime, id=f"{call}-{ending}-{runtime}")
    for call, ending, runtime in [
        *itertools.product((call for call in CALLS if call.is_in_sdk()), ENDINGS, RUNTIMES),
        *itertools.product([CREATE], ENDINGS, OTHER_CLIENTS),
    ]
    if ending.suits(call, runtime)
]


@dataclass
class Played:
    """What one case of the matrix came to, as the application saw it."""

    raised: BaseException | None = None
    seen_at: list[float] = field(default_factory=list)
    left_at: float = 0.0


def play(call: Call, ending: Ending, runtime: Runtime, server: ScriptedServer) -> Played:
    played = Played()

    async def use(client: Any) -> None:
        async with call.open(client, model=MODEL, input=PROMPT) as reader:
            played.seen_at = reader.seen_at
            played.seen_at.append(time.time())
            await ending.act(reader, client)

    async def main() -> None:
        client = runtime.client(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        try:
            await use(client)
        except ending.raises as error:
            played.raised = error.with_traceback(None)  # which holds all that the application held
        except RuntimeError as error:
            # The SDK's manager insists on `response.completed` and says so; the stream is over by then.
            if "response.completed" not in str(error):
                raise
        ending.afterwards()
        await settle(client.close())

    runtime.drive(main)
    ending.afterwards()  # in older releases of the SDK a loop holds the iterator of a stream until it ends
    played.left_at = time.time()
    return played


@pytest.fixture(scope="module", autouse=True)
def _sdk_is_warm() -> None:
    """The SDK builds its models at first use, which takes longer than what is measured here."""
    with ScriptedServer(ResponsesAPI(lambda _: Plan(ANSWER))) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
        with client.responses.stream(model=MODEL, input=PROMPT) as stream:
            stream.until_done()
        client.close()


# Trio warns of every async generator that is dropped half-read; the SDK's own are, without us too.
@pytest.mark.filterwarnings("ignore:.*async_generator object:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
@pytest.mark.filterwarnings("ignore:multiple unraisable exception:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("call", "ending", "runtime"), CASES)
def test_a_call_is_one_span_with_its_exact_usage(
    call: Call, ending: Ending, runtime: Runtime, instrument: Instrument, serve: Serve
) -> None:
    """However a stream is opened and however it ends, its one span has the server's own counts."""
    observed = instrument()
    api = ending.api(lambda _: ending.plan)
    server = serve(api)

    played = play(call, ending, runtime, server)

    span = observed.span()
    attributes = dict(span.attributes or {})
    (response,) = api.stored.values()
    posted, *gets = server.requests
    assert span.name == f"chat {MODEL}"
    assert span.kind is SpanKind.CLIENT
    assert attributes["openai_responses.stream.outcome"] == ending.outcome
    assert attributes.get("openai_responses.usage.missing_reason", "") == ending.missing
    assert attributes.get("openai_responses.usage.source", "") == ("" if ending.missing else ending.source)
    assert attributes.get("gen_ai.response.id") == (None if ending.missing else response["id"])
    assert token_attributes(span) == ({} if ending.missing else usage_attributes(response["usage"]))
    assert attributes["gen_ai.response.finish_reasons"] == (ending.finish_reason,)
    if ending.error_types:
        assert attributes["error.type"] in ending.error_types
    else:
        assert "error.type" not in attributes
    assert span.status.status_code is (StatusCode.ERROR if ending.error_types else StatusCode.UNSET)
    if ending.events is not None:
        assert attributes["openai_responses.stream.events"] == ending.events
    if ending.raises:
        assert isinstance(played.raised, ending.raises)
    assert span.end_time is not None
    # The terminal event ends the call when it arrives; the SDK takes its time to hand it on.
    begun_at = played.seen_at[-2 if ending.source == "stream" else -1]
    assert begun_at - 0.05 < span.end_time / 1e9 < played.left_at + 0.05
    looked_up = ending.source == "retrieval" and not ending.missing
    assert [get.method for get in gets] == (["GET"] if looked_up else [])
    assert all(request.headers["authorization"] == f"Bearer {KEY}" for request in (posted, *gets))
    points = {kind: (1, response["usage"][f"{kind}_tokens"]) for kind in ("input", "output")}
    assert observed.tokens() == ({} if ending.missing else points)
    assert observed.calls() == {ending.missing or ending.source: 1}
    assert observed.pending() == 0
    assert "canary" not in "".join(text for _, text in observed.told())
