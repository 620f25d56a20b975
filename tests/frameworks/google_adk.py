"""Google's Agent Development Kit: an `Agent` with its `OpenAIResponsesLlm`. It is async only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from google.adk.agents import Agent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.integrations.openai import OpenAIResponsesLlm
from google.adk.runners import InMemoryRunner
from google.genai import types

from frameworks.kit import MODEL, PROMPT, case, main, weather

ASKED = types.Content(role="user", parts=[types.Part(text=PROMPT)])


async def events(mode: StreamingMode) -> AsyncGenerator[Any, None]:
    agent = Agent(name="storyteller", model=OpenAIResponsesLlm(model=MODEL), tools=[weather])
    runner = InMemoryRunner(agent, app_name="stories")
    session = await runner.session_service.create_session(app_name="stories", user_id="reader")
    run = runner.run_async(
        user_id="reader",
        session_id=session.id,
        new_message=ASKED,
        run_config=RunConfig(streaming_mode=mode),
    )
    async with aclosing(run):
        async for event in run:
            yield event


@case("run")
async def run() -> None:
    assert "piece" in "".join([text_of(event) async for event in events(StreamingMode.NONE)])


@case("streamed", "cut")
async def streamed() -> int | None:
    seen = [event async for event in events(StreamingMode.SSE)]
    assert "piece" in "".join(text_of(event) for event in seen)
    return counted(seen)


@case("left")
async def left() -> int | None:
    seen = []
    async with aclosing(events(StreamingMode.SSE)) as run:
        async for event in run:
            seen.append(event)
            if text_of(event):
                break
    return counted(seen)


@case("left")
async def cancelled() -> int | None:
    heard, seen = asyncio.Event(), []

    async def read() -> None:
        async for event in events(StreamingMode.SSE):
            seen.append(event)
            if text_of(event):
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return counted(seen)


def text_of(event: Any) -> str:
    parts = (event.content and event.content.parts) or ()
    return "".join(part.text or "" for part in parts)


def counted(seen: list[Any]) -> int | None:
    usages = [event.usage_metadata for event in seen if event.usage_metadata]
    return sum(usage.total_token_count for usage in usages) if usages else None


if __name__ == "__main__":
    main("google-adk", "google-adk", own_count="`usage_metadata`", own_spans=lambda: None)
