"""Instructor in its mode for the Responses API: the answer is a Pydantic model, whole or field by field.

No case leaves a sync stream: the sync `create_partial` reads the stream to its end before it returns.
"""

from __future__ import annotations

import asyncio
from typing import Any

import instructor
import openai
import pydantic

from frameworks.kit import MODEL, PROMPT, case, main

MODE = instructor.Mode.RESPONSES_TOOLS


class Story(pydantic.BaseModel):
    """A story."""

    title: str
    text: str


ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": PROMPT}],
    "response_model": Story,
}
ARGUMENTS = ('{"title": "Rain', ' in Paris", "text"', ': "It rained', " and it", ' rained."}')


@case("run")
def run() -> None:
    client = instructor.from_openai(openai.OpenAI(), mode=MODE)
    story, response = client.create_with_completion(**ASKED)
    assert (story.title, response.object) == ("Rain in Paris", "response")


@case("run")
async def run_async() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(), mode=MODE)
    assert (await client.create(**ASKED)).title == "Rain in Paris"


@case("streamed", "cut")
def streamed() -> int | None:
    client = instructor.from_openai(openai.OpenAI(), mode=MODE)
    story = list(client.create_partial(**ASKED))[-1]
    assert story.title == "Rain in Paris"
    return counted(story)


@case("streamed", "cut")
async def streamed_async() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(), mode=MODE)
    assert [story async for story in client.create_partial(**ASKED)][-1].title == "Rain in Paris"


@case("left")
async def left() -> int | None:
    client = instructor.from_openai(openai.AsyncOpenAI(), mode=MODE)
    async for story in client.create_partial(**ASKED):
        if story.title:
            break
    return counted(story)


@case("left")
async def cancelled() -> int | None:
    client = instructor.from_openai(openai.AsyncOpenAI(), mode=MODE)
    heard, stories = asyncio.Event(), []

    async def read() -> None:
        async for story in client.create_partial(**ASKED):
            stories.append(story)
            if story.title:
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return counted(stories[-1])


def counted(story: Any) -> int | None:
    response = getattr(story, "_raw_response", None)
    return response.usage.total_tokens if response is not None and response.usage else None


if __name__ == "__main__":
    main("instructor", "instructor", own_count="no stream has one", arguments=ARGUMENTS)
