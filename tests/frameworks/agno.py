"""Agno: an `Agent` with `OpenAIResponses`."""

from __future__ import annotations

import asyncio
from typing import Any

from agno.agent import Agent
from agno.models.openai import OpenAIResponses

from frameworks.kit import MODEL, PROMPT, case, main, weather


def make_agent() -> Agent:
    return Agent(model=OpenAIResponses(id=MODEL), tools=[weather], telemetry=False)


@case("run")
def run() -> None:
    assert "piece" in make_agent().run(PROMPT).content


@case("run")
async def run_async() -> None:
    assert "piece" in (await make_agent().arun(PROMPT)).content


@case("streamed", "cut")
def streamed() -> int | None:
    events = list(make_agent().run(PROMPT, stream=True, stream_events=True))
    assert "piece" in "".join(text_of(event) for event in events)
    return counted(events)


@case("streamed", "cut")
async def streamed_async() -> None:
    assert "piece" in "".join([text_of(event) async for event in make_agent().arun(PROMPT, stream=True)])


@case("left")
def left() -> int | None:
    events = []
    for event in make_agent().run(PROMPT, stream=True, stream_events=True):
        events.append(event)
        if text_of(event):
            break
    return counted(events)


@case("left")
async def left_async() -> int | None:
    events = []
    async for event in make_agent().arun(PROMPT, stream=True, stream_events=True):
        events.append(event)
        if text_of(event):
            break
    return counted(events)


@case("left")
async def cancelled() -> int | None:
    heard, events = asyncio.Event(), []

    async def read() -> None:
        async for event in make_agent().arun(PROMPT, stream=True, stream_events=True):
            events.append(event)
            if text_of(event):
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return counted(events)


def text_of(event: Any) -> str:
    return getattr(event, "content", None) or "" if event.event == "RunContent" else ""


def counted(events: list[Any]) -> int | None:
    metrics = [event.metrics for event in events if getattr(event, "metrics", None)]
    return metrics[-1].total_tokens if metrics else None


if __name__ == "__main__":
    main("agno", "agno", own_count="`metrics`")
