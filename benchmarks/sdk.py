"""Calls of the real SDK, over a transport that is in memory. Knows of no instrumentation."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import openai

Work = Callable[[], object]

PROMPT = "canary-of-the-prompt"


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


def reader(
    stream: list[bytes],
    client_class: Any = openai.OpenAI,
    *,
    encoding: str | None = None,
    pause: Work = lambda: None,
    turn: int = sys.maxsize,
) -> Work:
    """Return a function that makes a call and reads the answer.

    Args:
        stream: The pieces of the answer, which is always the same.
        client_class: The class of the client.
        encoding: The content encoding of the pieces.
        pause: Called after each turn, in mid-stream.
        turn: The number of events of a turn.

    """
    transport = httpx2.MockTransport(lambda _: _answer(SyncBody(stream), encoding))
    client = client_class(
        api_key="none", base_url="http://127.0.0.1:9/v1", http_client=httpx2.Client(transport=transport)
    )

    def read() -> None:
        number = 0
        for _ in client.responses.create(model="gpt-5.4-mini", input=PROMPT, stream=True):
            number += 1
            if number == turn:
                number = 0
                pause()

    return read


def async_reader(
    stream: list[bytes],
    client_class: Any = openai.AsyncOpenAI,
    *,
    encoding: str | None = None,
    pause: Work = lambda: None,
    turn: int = sys.maxsize,
) -> Work:
    """Return the same for the async client, on an event loop of its own. A pause stops the loop."""
    transport = httpx2.MockTransport(lambda _: _answer(AsyncBody(stream), encoding))
    client = client_class(
        api_key="none", base_url="http://127.0.0.1:9/v1", http_client=httpx2.AsyncClient(transport=transport)
    )
    loop = asyncio.new_event_loop()

    async def read() -> None:
        number = 0
        async for _ in await client.responses.create(model="gpt-5.4-mini", input=PROMPT, stream=True):
            number += 1
            if number == turn:
                number = 0
                pause()

    return lambda: loop.run_until_complete(read())


def _answer(body: SyncBody | AsyncBody, encoding: str | None) -> httpx2.Response:
    headers = {"content-type": "text/event-stream", **({"content-encoding": encoding} if encoding else {})}
    return httpx2.Response(200, headers=headers, stream=body)
