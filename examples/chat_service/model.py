"""The model: asked over HTTP, or over a WebSocket."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai

MODEL = os.environ.get("OPENAI_MODEL", "gpt-5.4-mini")
BY_WEBSOCKET = os.environ.get("CHAT_TRANSPORT", "http") == "websocket"
INSTRUCTIONS = "You are a friendly assistant. You may use Markdown."
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


class NoAnswerError(Exception):
    """The model gives no answer, or no more of it.

    Attributes:
        code: The API's error code or, where it gave none, the name of the exception.

    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@asynccontextmanager
async def answering(
    client: openai.AsyncOpenAI, question: str, previous_response_id: str | None
) -> AsyncIterator[AsyncIterable[Any]]:
    """Ask the model, and iterate over the events of its answer.

    The end of the block closes the stream. Otherwise the model would keep generating text that is not read.

    Raises:
        NoAnswerError: Also for exceptions of the SDK within the block.

    """
    ask = over_websocket if BY_WEBSOCKET else over_http
    try:
        async with ask(client, question, previous_response_id) as events:
            yield events
    except openai.OpenAIError as error:
        raise NoAnswerError(getattr(error, "code", None) or type(error).__name__) from error


@asynccontextmanager
async def over_http(
    client: openai.AsyncOpenAI, question: str, previous_response_id: str | None
) -> AsyncIterator[AsyncIterable[Any]]:
    async with await client.responses.create(
        model=MODEL,
        instructions=INSTRUCTIONS,
        input=question,
        previous_response_id=previous_response_id,
        stream=True,
    ) as stream:
        yield stream


@asynccontextmanager
async def over_websocket(
    client: openai.AsyncOpenAI, question: str, previous_response_id: str | None
) -> AsyncIterator[AsyncIterable[Any]]:
    """Ask on a new connection. Its end stops the answer."""
    from websockets.exceptions import WebSocketException  # only needed here

    try:
        async with client.responses.connect() as connection:
            await connection.response.create(
                model=MODEL,
                instructions=INSTRUCTIONS,
                input=question,
                previous_response_id=previous_response_id,
            )
            yield until_terminal(connection)
    except (WebSocketException, OSError) as error:
        raise NoAnswerError(type(error).__name__) from error


async def until_terminal(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """Yield the events of one answer. The connection stays open after the last one."""
    async for event in events:
        if event.type == "error":
            raise NoAnswerError(getattr(event, "error", event).code or "error")
        yield event
        if event.type in TERMINAL:
            return
