"""LlamaIndex: `OpenAIResponses` alone and in a `FunctionAgent`.

It asks for `store=False` by default. Such a response cannot be looked up: a case leaves one of them, too.
"""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAIResponses

from frameworks.kit import MODEL, PROMPT, case, main, weather

ASKED = [ChatMessage(role="user", content=PROMPT)]


def make_model(*, store: bool = True) -> OpenAIResponses:
    return OpenAIResponses(MODEL, store=store)


def make_agent() -> FunctionAgent:
    return FunctionAgent(tools=[weather], llm=make_model())


@case("run")
def run() -> None:
    assert "piece" in str(make_model().chat(ASKED))


@case("run")
async def run_async() -> None:
    assert "piece" in str(await make_model().achat(ASKED))
    assert "piece" in str(await make_agent().run(PROMPT))


@case("streamed", "cut")
def streamed() -> int | None:
    chunks = list(make_model().stream_chat(ASKED))
    assert "piece" in str(chunks[-1])
    return counted(chunks[-1])


@case("streamed", "cut")
async def streamed_async() -> None:
    handler = make_agent().run(PROMPT)
    deltas = [event.delta async for event in handler.stream_events() if isinstance(event, AgentStream)]
    await handler
    assert "piece" in "".join(deltas)


@case("left")
def left() -> int | None:
    for chunk in make_model().stream_chat(ASKED):
        if chunk.delta:
            break
    return counted(chunk)


@case("left")
async def left_async() -> int | None:
    async for chunk in await make_model().astream_chat(ASKED):
        if chunk.delta:
            break
    return counted(chunk)


@case("left")
def left_by_default() -> int | None:
    for chunk in make_model(store=False).stream_chat(ASKED):
        if chunk.delta:
            break
    return counted(chunk)


@case("left")
async def cancelled_agent() -> int | None:
    handler = make_agent().run(PROMPT)
    async for event in handler.stream_events():
        if isinstance(event, AgentStream) and event.delta:
            await handler.cancel_run()
            break
    await asyncio.gather(handler, return_exceptions=True)
    return counted(event)


def counted(chunk: Any) -> int | None:
    usage = getattr(chunk, "additional_kwargs", {}).get("usage")
    return usage.total_tokens if usage else None


if __name__ == "__main__":
    main("llama-index", "llama-index-core", own_count="`additional_kwargs`")
