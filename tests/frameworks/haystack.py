"""Haystack: `OpenAIResponsesChatGenerator` alone and in an `Agent`. Its streams go to a callback."""

from __future__ import annotations

import asyncio

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import create_tool_from_function

from frameworks.kit import MODEL, PROMPT, case, main, weather

ASKED = [ChatMessage.from_user(PROMPT)]


class LeaveError(Exception):
    """The application has heard enough."""


def make_generator() -> OpenAIResponsesChatGenerator:
    return OpenAIResponsesChatGenerator(model=MODEL)


def make_agent() -> Agent:
    return Agent(chat_generator=make_generator(), tools=[create_tool_from_function(weather)])


@case("run")
def run() -> None:
    assert "piece" in make_generator().run(ASKED)["replies"][0].text
    assert "piece" in make_agent().run(ASKED)["last_message"].text


@case("run")
async def run_async() -> None:
    assert "piece" in (await make_generator().run_async(ASKED))["replies"][0].text
    assert "piece" in (await make_agent().run_async(ASKED))["last_message"].text


@case("streamed", "cut")
def streamed() -> None:
    chunks: list[StreamingChunk] = []
    make_agent().run(ASKED, streaming_callback=chunks.append)
    assert "piece" in "".join(chunk.content for chunk in chunks)


@case("streamed", "cut")
async def streamed_async() -> int:
    chunks: list[StreamingChunk] = []

    async def listen(chunk: StreamingChunk) -> None:
        chunks.append(chunk)

    result = await make_agent().run_async(ASKED, streaming_callback=listen)
    assert "piece" in "".join(chunk.content for chunk in chunks)
    return counted(result["messages"])


@case("left")
def left() -> None:
    def leave(chunk: StreamingChunk) -> None:
        if chunk.content:
            raise LeaveError

    try:
        make_generator().run(ASKED, streaming_callback=leave)
    except LeaveError:
        return
    raise AssertionError("the run went on")


@case("left")
async def cancelled() -> None:
    heard = asyncio.Event()

    async def listen(chunk: StreamingChunk) -> None:
        if chunk.content:
            heard.set()

    task = asyncio.create_task(make_agent().run_async(ASKED, streaming_callback=listen))
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def counted(messages: list[ChatMessage]) -> int:
    return sum(message.meta["usage"]["total_tokens"] for message in messages if "usage" in message.meta)


if __name__ == "__main__":
    main("haystack", "haystack-ai", own_count="the run raises")
