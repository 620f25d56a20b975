"""CrewAI: a `Crew` of one agent whose `LLM` has `api="responses"`.

No case leaves a crew: its thread reads the model's stream to the end. A crew that streams has no tool here:
with one, `LLM` returns an empty answer, also without this package.
"""

from __future__ import annotations

import asyncio
from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.events import LLMStreamChunkEvent, crewai_event_bus
from crewai.tools import tool

from frameworks.kit import MODEL, PROMPT, case, main
from frameworks.kit import weather as tell


@tool("weather")
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return tell(city)


def make_model(*, stream: bool = False) -> Any:
    return LLM(f"openai/{MODEL}", api="responses", stream=stream)


def make_crew(*, stream: bool = False) -> Crew:
    agent = Agent(
        role="storyteller",
        goal="tell stories",
        backstory="You travel.",
        llm=make_model(stream=stream),
        tools=[] if stream else [weather],
    )
    task = Task(description=PROMPT, expected_output="A story.", agent=agent)
    return Crew(agents=[agent], tasks=[task], stream=stream)


@case("run")
def run() -> None:
    assert "piece" in make_crew().kickoff().raw


@case("run")
async def run_async() -> None:
    assert "piece" in (await make_crew().akickoff()).raw


@case("streamed", "cut")
def streamed() -> int:
    crew = make_crew(stream=True)
    assert "piece" in "".join(chunk.content for chunk in crew.kickoff())
    return crew.calculate_usage_metrics().total_tokens


@case("streamed", "cut")
async def streamed_async() -> None:
    output = await make_crew(stream=True).akickoff()
    assert "piece" in "".join([chunk.content async for chunk in output])


@case("left")
async def cancelled() -> int | None:
    model, heard, loop = make_model(stream=True), asyncio.Event(), asyncio.get_running_loop()
    with crewai_event_bus.scoped_handlers():

        @crewai_event_bus.on(LLMStreamChunkEvent)
        def listen(*_: Any) -> None:
            loop.call_soon_threadsafe(heard.set)

        task = asyncio.create_task(model.acall(PROMPT))
        await heard.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    return model.get_token_usage_summary().total_tokens


if __name__ == "__main__":
    main("crewai", "crewai", own_count="`get_token_usage_summary()`")
