"""The Agents SDK: `Runner` with its Responses model, which is its default."""

from __future__ import annotations

import agents

from frameworks.kit import MODEL, PROMPT, case, main, weather


def make_agent() -> agents.Agent:
    agents.set_trace_processors([])  # the processor of the SDK sends traces to OpenAI
    agents.set_default_openai_api("responses")
    model = agents.OpenAIResponsesModel(MODEL, agents.AsyncOpenAI())
    return agents.Agent("storyteller", model=model, tools=[agents.function_tool(weather)])


@case("run")
def run() -> None:
    assert "piece" in agents.Runner.run_sync(make_agent(), PROMPT).final_output


@case("run")
async def run_async() -> None:
    assert "piece" in (await agents.Runner.run(make_agent(), PROMPT)).final_output


@case("streamed", "cut")
async def streamed() -> int:
    result = agents.Runner.run_streamed(make_agent(), PROMPT)
    async for _ in result.stream_events():
        pass
    assert "piece" in result.final_output
    return result.context_wrapper.usage.total_tokens


@case("left")
async def left() -> int:
    result = agents.Runner.run_streamed(make_agent(), PROMPT)
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            result.cancel()
    return result.context_wrapper.usage.total_tokens


if __name__ == "__main__":
    main("openai-agents", "openai-agents", own_count="`context_wrapper.usage`")
