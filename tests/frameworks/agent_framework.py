"""Microsoft Agent Framework: an `Agent` with `OpenAIChatClient`, which uses the Responses API.

It is async only.
"""

from __future__ import annotations

import asyncio
from typing import Any

from agent_framework import Agent, AgentResponse
from agent_framework.observability import enable_instrumentation
from agent_framework.openai import OpenAIChatClient

from frameworks.kit import MODEL, PROMPT, case, main, weather


def make_agent() -> Agent:
    return Agent(OpenAIChatClient(MODEL), tools=[weather])


@case("run")
async def run() -> None:
    assert "piece" in (await make_agent().run(PROMPT)).text


@case("streamed", "cut")
async def streamed() -> int | None:
    updates = [update async for update in make_agent().run(PROMPT, stream=True)]
    assert "piece" in "".join(update.text for update in updates)
    return counted(updates)


@case("left")
async def left() -> int | None:
    updates = []
    async for update in make_agent().run(PROMPT, stream=True):
        updates.append(update)
        if update.text:
            break
    return counted(updates)


@case("left")
async def cancelled() -> int | None:
    heard, updates = asyncio.Event(), []

    async def read() -> None:
        async for update in make_agent().run(PROMPT, stream=True):
            updates.append(update)
            if update.text:
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return counted(updates)


def counted(updates: list[Any]) -> int | None:
    usage = AgentResponse.from_updates(updates).usage_details
    return usage["total_token_count"] if usage else None


if __name__ == "__main__":
    main(
        "agent-framework",
        "agent-framework-openai",
        own_count="`usage_details`",
        own_spans=lambda: enable_instrumentation(force=True),
    )
