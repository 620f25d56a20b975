"""LangChain: `ChatOpenAI(use_responses_api=True)` alone, and as the model of an agent.

No case leaves the sync stream of an agent: its `close` waits until the model's stream has ended.
"""

from __future__ import annotations

import asyncio
from typing import Any

from langchain.agents import create_agent
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_openai import ChatOpenAI

from frameworks.kit import MODEL, PROMPT, case, main, weather

ASKED = {"messages": [("user", PROMPT)]}


def make_model() -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, use_responses_api=True)


def make_agent() -> Any:
    return create_agent(make_model(), [weather])


@case("run")
def run() -> None:
    assert "piece" in make_model().invoke(PROMPT).text
    assert "piece" in make_agent().invoke(ASKED)["messages"][-1].text


@case("run")
async def run_async() -> None:
    assert "piece" in (await make_model().ainvoke(PROMPT)).text
    assert "piece" in (await make_agent().ainvoke(ASKED))["messages"][-1].text


@case("streamed", "cut")
def streamed() -> None:
    assert "piece" in "".join(chunk.text for chunk in make_model().stream(PROMPT))


@case("streamed", "cut")
def streamed_agent() -> None:
    for _ in make_agent().stream(ASKED, stream_mode="messages"):
        pass


@case("streamed", "cut")
async def streamed_async() -> None:
    assert "piece" in "".join([chunk.text async for chunk in make_model().astream(PROMPT)])


@case("streamed", "cut")
async def streamed_agent_async() -> int | None:
    usage = UsageMetadataCallbackHandler()
    async for _ in make_agent().astream(ASKED, {"callbacks": [usage]}, stream_mode="messages"):
        pass
    return counted(usage)


def counted(usage: UsageMetadataCallbackHandler) -> int | None:
    counts = usage.usage_metadata.values()
    return sum(count["total_tokens"] for count in counts) if counts else None


@case("left")
def left() -> int | None:
    usage = UsageMetadataCallbackHandler()
    for chunk in make_model().stream(PROMPT, {"callbacks": [usage]}):
        if chunk.text:
            break
    return counted(usage)


@case("left")
async def left_async() -> int | None:
    usage = UsageMetadataCallbackHandler()
    async for chunk in make_model().astream(PROMPT, {"callbacks": [usage]}):
        if chunk.text:
            break
    return counted(usage)


@case("left")
async def cancelled_agent() -> int | None:
    usage = UsageMetadataCallbackHandler()
    heard = asyncio.Event()

    async def read() -> None:
        async for chunk, _ in make_agent().astream(ASKED, {"callbacks": [usage]}, stream_mode="messages"):
            if chunk.text:
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return counted(usage)


if __name__ == "__main__":
    main("langchain-openai", "langchain-openai", own_count="`UsageMetadataCallbackHandler`")
