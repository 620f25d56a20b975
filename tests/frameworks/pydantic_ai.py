"""Pydantic AI: an `Agent` with `OpenAIResponsesModel`."""

from __future__ import annotations

import asyncio

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel

from frameworks.kit import MODEL, PROMPT, case, main, weather


def make_agent() -> Agent[None, str]:
    return Agent(OpenAIResponsesModel(MODEL), tools=[weather])


@case("run")
def run() -> None:
    assert "piece" in make_agent().run_sync(PROMPT).output


@case("run")
async def run_async() -> None:
    assert "piece" in (await make_agent().run(PROMPT)).output


@case("streamed", "cut")
def streamed() -> None:
    assert "piece" in "".join(make_agent().run_stream_sync(PROMPT).stream_text(delta=True))


@case("streamed", "cut")
async def streamed_async() -> int:
    async with make_agent().run_stream(PROMPT) as result:
        assert "piece" in "".join([text async for text in result.stream_text(delta=True)])
    return result.usage.total_tokens


@case("left")
async def left() -> int:
    async with make_agent().run_stream(PROMPT) as result:
        async for _ in result.stream_text(delta=True):
            break
    return result.usage.total_tokens


@case("left")
async def stopped() -> int:
    async with make_agent().run_stream(PROMPT) as result:
        async for _ in result.stream_text(delta=True):
            await result.cancel()
            break
    return result.usage.total_tokens


@case("left")
async def cancelled() -> int:
    heard, results = asyncio.Event(), []

    async def read() -> None:
        async with make_agent().run_stream(PROMPT) as result:
            results.append(result)
            async for _ in result.stream_text(delta=True):
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return results[0].usage.total_tokens


if __name__ == "__main__":
    main("pydantic-ai", "pydantic-ai-slim", own_count="`result.usage`", own_spans=Agent.instrument_all)
