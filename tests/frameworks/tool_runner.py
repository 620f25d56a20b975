"""The tool runner of the openai SDK itself, sync and async."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from typing import Any

import openai
from openai.lib.responses_tool_runner import (
    AsyncRegisteredFunction,
    AsyncResponsesToolRunner,
    RegisteredFunction,
    ResponsesToolRunner,
    ToolRunnerError,
)

from frameworks.kit import MODEL, PROMPT, case, main

PARAMS: Any = {"model": MODEL, "input": PROMPT}


TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def tell(arguments: Any) -> str:
    return f"It rains in {arguments['city']}."


async def tell_async(arguments: Any) -> str:
    return tell(arguments)


def make_runner() -> ResponsesToolRunner:
    return ResponsesToolRunner(functions=[RegisteredFunction(TOOL, tell)])


def make_async_runner() -> AsyncResponsesToolRunner:
    return AsyncResponsesToolRunner(functions=[AsyncRegisteredFunction(TOOL, tell_async)])


class LeaveError(Exception):
    """The application has heard enough."""


@case("run")
def run() -> None:
    with openai.OpenAI() as client:
        assert "piece" in make_runner().run(client, PARAMS).output_text


@case("run")
async def run_async() -> None:
    async with openai.AsyncOpenAI() as client:
        assert "piece" in (await make_async_runner().run(client, PARAMS)).output_text


@case("streamed", "cut")
def streamed() -> None:
    with openai.OpenAI() as client, closing(make_runner().iterate(client, PARAMS, stream=True)) as turns:
        assert "piece" in [turn.response.output_text for turn in turns][-1]


@case("streamed", "cut")
async def streamed_async() -> None:
    async with (
        openai.AsyncOpenAI() as client,
        aclosing(make_async_runner().iterate(client, PARAMS, stream=True)) as turns,
    ):
        assert "piece" in [turn.response.output_text async for turn in turns][-1]


@case("left")
def left() -> int | None:
    def leave(event: Any) -> None:
        if event.type == "response.output_text.delta":
            raise LeaveError

    with openai.OpenAI() as client:
        try:
            make_runner().run(client, PARAMS, stream=True, on_event=leave)
        except ToolRunnerError:
            return None
    raise AssertionError("the run went on")


@case("left")
async def cancelled() -> int | None:
    heard = asyncio.Event()

    async def listen(event: Any) -> None:
        if event.type == "response.output_text.delta":
            heard.set()

    async with openai.AsyncOpenAI() as client:
        task = asyncio.create_task(make_async_runner().run(client, PARAMS, stream=True, on_event=listen))
        await heard.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    return None


if __name__ == "__main__":
    main("tool-runner", "openai", own_count="the run raises")
