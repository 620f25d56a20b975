"""Calls of the real SDK, over a transport that is in memory. Knows of no instrumentation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import openai

Work = Callable[[], object]


class SyncBody(httpx2.SyncByteStream):
    """A body in memory, a piece at a time."""

    def __init__(self, stream: list[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream


class AsyncBody(httpx2.AsyncByteStream):
    """The same for an async client."""

    def __init__(self, stream: list[bytes]) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._stream:
            yield piece


def reader(stream: list[bytes], client_class: Any = openai.OpenAI) -> Work:
    """Return a function that makes a call and reads the answer, which is always this stream."""
    transport = httpx2.MockTransport(lambda _: _answer(SyncBody(stream)))
    client = client_class(
        api_key="none", base_url="http://127.0.0.1:9/v1", http_client=httpx2.Client(transport=transport)
    )

    def read() -> None:
        for _ in client.responses.create(model="gpt-5.4-mini", input="hello", stream=True):
            pass

    return read


def async_reader(stream: list[bytes], client_class: Any = openai.AsyncOpenAI) -> Work:
    """Return the same for the async client, on an event loop of its own."""
    transport = httpx2.MockTransport(lambda _: _answer(AsyncBody(stream)))
    client = client_class(
        api_key="none", base_url="http://127.0.0.1:9/v1", http_client=httpx2.AsyncClient(transport=transport)
    )
    loop = asyncio.new_event_loop()

    async def read() -> None:
        async for _ in await client.responses.create(model="gpt-5.4-mini", input="hello", stream=True):
            pass

    return lambda: loop.run_until_complete(read())


def _answer(body: SyncBody | AsyncBody) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=body)
