"""What an application does with the openai SDK, once per way to make a call and read its answer.

The request model is the name of the scenario, so points can be assigned to their calls. If the name has one
of the words of `neighbours.EARLY_WORDS`, the server holds the stream open after some events.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

REFUSED = "refused"
# The application marks its own GETs.
OWN = {"x-of-the-application": "yes"}
PROMPT = "What is a span?"
READ = 4  # events before a stream is left

SYNC: dict[str, Callable[[Any, str], Any]] = {}
ASYNC: dict[str, Callable[[Any, str], Awaitable[Any]]] = {}


def sync(scenario: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Register a scenario of the sync client."""
    SYNC[scenario.__name__.replace("_", "-")] = scenario
    return scenario


def asynchronous(scenario: Callable[[Any, str], Awaitable[Any]]) -> Callable[[Any, str], Awaitable[Any]]:
    """Register a scenario of the async client."""
    ASYNC[scenario.__name__.replace("_", "-")] = scenario
    return scenario


class Weather(BaseModel):
    """A format that the answer of the server does not have."""

    degrees: int


def read(stream: Any) -> None:
    """Read a few events."""
    for _, _event in zip(range(READ), stream, strict=False):
        pass


async def read_async(stream: Any) -> None:
    """Read a few events."""
    count = 0
    async for _event in stream:
        count += 1
        if count == READ:
            return


@sync
def drained(client: Any, model: str) -> Any:
    stream = client.responses.create(model=model, input=PROMPT, stream=True)
    for _event in stream:
        pass
    return stream


@sync
def closed(client: Any, model: str) -> Any:
    stream = client.responses.create(model=model, input=PROMPT, stream=True)
    read(stream)
    stream.close()
    return stream


@sync
def left_with(client: Any, model: str) -> Any:
    with client.responses.create(model=model, input=PROMPT, stream=True) as stream:
        read(stream)
    return stream


@sync
def manager_left(client: Any, model: str) -> Any:
    with client.responses.stream(model=model, input=PROMPT) as stream:
        read(stream)
    return stream


@sync
def manager_drained(client: Any, model: str) -> Any:
    with client.responses.stream(model=model, input=PROMPT) as stream:
        for _event in stream:
            pass
        stream.get_final_response()
    return stream


@sync
def raw_drained(client: Any, model: str) -> Any:
    stream = client.responses.with_raw_response.create(model=model, input=PROMPT, stream=True).parse()
    for _event in stream:
        pass
    return stream


@sync
def raw_closed(client: Any, model: str) -> Any:
    stream = client.responses.with_raw_response.create(model=model, input=PROMPT, stream=True).parse()
    read(stream)
    stream.close()
    return stream


@sync
def streaming_response(client: Any, model: str) -> Any:
    with client.responses.with_streaming_response.create(model=model, input=PROMPT, stream=True) as response:
        for _event in response.parse():
            pass
    return response


@sync
def streaming_lines(client: Any, model: str) -> Any:
    with client.responses.with_streaming_response.create(model=model, input=PROMPT, stream=True) as response:
        for _line in response.iter_lines():
            pass
    return response


@sync
def create(client: Any, model: str) -> Any:
    return client.responses.create(model=model, input=PROMPT)


@sync
def parse_raises(client: Any, model: str) -> Any:
    return client.responses.parse(model=model, input=PROMPT, text_format=Weather)


@sync
def background(client: Any, model: str) -> Any:
    response = client.responses.create(model=model, input=PROMPT, background=True)
    return client.responses.retrieve(response.id, extra_headers=OWN)


@sync
def fetched_stream(client: Any, model: str) -> Any:
    response = client.responses.create(model=model, input=PROMPT)
    stream = client.responses.retrieve(response.id, stream=True, extra_headers=OWN)
    for _event in stream:
        pass
    return stream


@sync
def chat_completion(client: Any, model: str) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": PROMPT}])


@sync
def refused(client: Any, model: str) -> Any:
    return client.responses.create(model=model, input=PROMPT, stream=True)


@asynchronous
async def async_drained(client: Any, model: str) -> Any:
    stream = await client.responses.create(model=model, input=PROMPT, stream=True)
    async for _event in stream:
        pass
    return stream


@asynchronous
async def async_closed(client: Any, model: str) -> Any:
    stream = await client.responses.create(model=model, input=PROMPT, stream=True)
    await read_async(stream)
    await stream.close()
    return stream


@asynchronous
async def async_cancelled(client: Any, model: str) -> Any:
    streams = []
    read_some = asyncio.Event()

    async def consume() -> None:
        stream = await client.responses.create(model=model, input=PROMPT, stream=True)
        streams.append(stream)
        async for event in stream:
            if event.type.endswith(".delta"):
                read_some.set()

    task = asyncio.create_task(consume())
    await read_some.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return streams[0]


@asynchronous
async def async_create(client: Any, model: str) -> Any:
    return await client.responses.create(model=model, input=PROMPT)


@asynchronous
async def async_manager_left(client: Any, model: str) -> Any:
    async with client.responses.stream(model=model, input=PROMPT) as stream:
        await read_async(stream)
    return stream
