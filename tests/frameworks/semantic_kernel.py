"""Semantic Kernel: `OpenAIResponsesAgent`. It is async only."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import openai
from semantic_kernel.agents import OpenAIResponsesAgent
from semantic_kernel.functions import kernel_function
from semantic_kernel.utils.telemetry.agent_diagnostics import decorators

from frameworks.kit import MODEL, PROMPT, case, main
from frameworks.kit import weather as tell


class Weather:
    """A plugin with one function."""

    @kernel_function(name="weather", description="Tell the weather in a city.")
    def weather(self, city: Annotated[str, "The city."]) -> str:
        return tell(city)


def make_agent() -> OpenAIResponsesAgent:
    return OpenAIResponsesAgent(
        ai_model_id=MODEL, client=openai.AsyncOpenAI(), name="storyteller", plugins=[Weather()]
    )


@case("run")
async def run() -> None:
    assert "piece" in str(await make_agent().get_response(PROMPT))


@case("streamed", "cut")
async def streamed() -> int | None:
    items = [item async for item in make_agent().invoke_stream(PROMPT)]
    assert "piece" in "".join(str(item.content) for item in items)
    return counted(items)


@case("left")
async def left() -> int | None:
    items = []
    async for item in make_agent().invoke_stream(PROMPT):
        items.append(item)
        if str(item.content):
            break
    return counted(items)


@case("left")
async def cancelled() -> int | None:
    heard, items = asyncio.Event(), []

    async def read() -> None:
        async for item in make_agent().invoke_stream(PROMPT):
            items.append(item)
            if str(item.content):
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return counted(items)


def counted(items: list[Any]) -> int | None:
    usages = [item.content.metadata["usage"] for item in items if item.content.metadata.get("usage")]
    return sum(usage["total_tokens"] for usage in usages) if usages else None


def own_spans() -> None:
    decorators.MODEL_DIAGNOSTICS_SETTINGS.enable_otel_diagnostics = True


if __name__ == "__main__":
    main("semantic-kernel", "semantic-kernel", own_count="no stream has one", own_spans=own_spans)
