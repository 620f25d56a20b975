"""Every way of calling with every way of ending: one span, the exact usage, and an unharmed application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import openai
import pytest
import trio
from opentelemetry.trace import SpanKind, StatusCode

from calls import CALLS, CUT, MODEL, PROMPT, Call, Reader
from conftest import Instrument, Serve
from embedded.answer import FAILED, OUT_OF_TOKENS, Answer, usage
from embedded.http_server import Cut, Hold, ScriptedServer
from embedded.responses_api import Plan, ResponsesAPI
from observed import token_attributes, usage_attributes

KEY = "canary-of-the-key"
ANSWER = Answer(
    pieces=tuple(f"canary-of-the-answer {n} " for n in range(12)),
    usage=usage(31, 245, cached=16, reasoning=128),
)


class ApplicationError(Exception):
    """An exception of the application's own."""


Act = Callable[[Reader], Awaitable[None]]


async def drain(reader: Reader) -> None:
    await reader.rest()


async def close(reader: Reader) -> None:
    await reader.take(6)
    await reader.close()


async def leave(reader: Reader) -> None:
    await reader.take(6)


async def stumble(reader: Reader) -> None:
    await reader.take(6)
    raise ApplicationError


async def wait_in_vain(reader: Reader) -> None:
    with anyio.fail_after(0.15):
        await reader.rest()


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
    raises: tuple[type[BaseException], ...] = ()
    events: int | None = None
    only_async: bool = False
    only_events: bool = False

    def __str__(self) -> str:
        return self.name


SIX = {"cut_after": 6, "end": Hold()}

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
        error_types=frozenset({"RemoteProtocolError", "ClientPayloadError"}),
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
        error_types=frozenset({"CancelledError", "Cancelled"}),
        raises=(TimeoutError,),
        events=6,
        only_async=True,
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

    def __str__(self) -> str:
        return self.name


RUNTIMES = (
    Runtime("sync", drive_sync, openai.OpenAI),
    Runtime("asyncio", lambda main: asyncio.run(main()), openai.AsyncOpenAI),  # type: ignore[arg-type]
    Runtime("trio", lambda main: trio.run(main), openai.AsyncOpenAI),
)


@dataclass
class Played:
    """What one case of the matrix came to, as the application saw it."""

    raised: BaseException | None = None
    seen_at: list[float] = field(default_factory=list)
    left_at: float = 0.0


def play(call: Call, ending: Ending, runtime: Runtime, server: ScriptedServer) -> Played:
    played = Played()

    async def main() -> None:
        client = runtime.client(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        try:
            async with call.open(client, model=MODEL, input=PROMPT) as reader:
                try:
                    await ending.act(reader)
                finally:
                    played.seen_at = reader.seen_at
        except ending.raises as error:
            played.raised = error
        except RuntimeError as error:
            # The SDK's manager insists on `response.completed` and says so; the stream is over by then.
            if "response.completed" not in str(error):
                raise
        finally:
            played.left_at = time.time()
        closed = client.close()
        if closed is not None:
            await closed

    runtime.drive(main)
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
@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_call_is_one_span_with_its_exact_usage(
    call: Call, ending: Ending, runtime: Runtime, instrument: Instrument, serve: Serve
) -> None:
    """However a stream is opened and however it ends, its one span has the server's own counts."""
    if ending.only_async and runtime.name == "sync":
        pytest.skip("a sync read cannot be cancelled")
    if not call.is_in_sdk():
        pytest.skip("not in this release of the SDK")
    observed = instrument()
    api = ResponsesAPI(lambda _: ending.plan)
    server = serve(api)

    played = play(call, ending, runtime, server)

    span = observed.span()
    attributes = dict(span.attributes or {})
    (response,) = api.stored.values()
    posted, *gets = server.requests
    assert span.name == f"chat {MODEL}"
    assert span.kind is SpanKind.CLIENT
    assert attributes["openai_responses.stream.outcome"] == ending.outcome
    assert attributes["openai_responses.usage.source"] == ending.source
    assert token_attributes(span) == usage_attributes(response["usage"])
    assert attributes["gen_ai.response.id"] == response["id"]
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
    assert [get.method for get in gets] == (["GET"] if ending.source == "retrieval" else [])
    assert all(get.headers["authorization"] == f"Bearer {KEY}" for get in gets)
    assert posted.headers["authorization"] == f"Bearer {KEY}"
    usages = response["usage"]
    assert observed.tokens() == {"input": (1, usages["input_tokens"]), "output": (1, usages["output_tokens"])}
    assert observed.calls() == {ending.source: 1}
    assert observed.pending() == 0
    assert "canary" not in "".join(text for _, text in observed.told())
