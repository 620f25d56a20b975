"""What an application does with an agent framework. See `scenarios`: the names mean the same here.

The application can make a call of its own inside the framework's run. The model of that call is the name of
the scenario with a `+`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from scenarios import PROMPT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

READ = 2  # pieces of the answer before the run is left


class OpenAIAgents:
    """The OpenAI Agents SDK."""

    def _agent(self, client: Any, model: str) -> Any:
        from agents import Agent, OpenAIResponsesModel

        return Agent(name="answerer", model=OpenAIResponsesModel(model=model, openai_client=client))

    async def run(self, client: Any, model: str) -> Any:
        from agents import Runner

        return await Runner.run(self._agent(client, model), PROMPT)

    @contextlib.asynccontextmanager
    async def stream(self, client: Any, model: str) -> AsyncIterator[Any]:
        from agents import Runner

        result = Runner.run_streamed(self._agent(client, model), PROMPT)
        events = result.stream_events()
        try:
            yield (event async for event in events if event.type == "raw_response_event")
        finally:
            result.cancel()
            async for _event in events:  # it ends when the run has ended
                pass


class PydanticAi:
    """Pydantic AI."""

    def _agent(self, client: Any, model: str) -> Any:
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIResponsesModel
        from pydantic_ai.providers.openai import OpenAIProvider

        return Agent(OpenAIResponsesModel(model, provider=OpenAIProvider(openai_client=client)))

    async def run(self, client: Any, model: str) -> Any:
        return await self._agent(client, model).run(PROMPT)

    @contextlib.asynccontextmanager
    async def stream(self, client: Any, model: str) -> AsyncIterator[Any]:
        async with self._agent(client, model).run_stream(PROMPT) as result:
            yield result.stream_text(delta=True, debounce_by=None)


class AgentFramework:
    """Microsoft's Agent Framework."""

    def _agent(self, client: Any, model: str) -> Any:
        from agent_framework import Agent
        from agent_framework.openai import OpenAIChatClient

        return Agent(client=OpenAIChatClient(model=model, async_client=client), name="answerer")

    async def run(self, client: Any, model: str) -> Any:
        return await self._agent(client, model).run(PROMPT)

    @contextlib.asynccontextmanager
    async def stream(self, client: Any, model: str) -> AsyncIterator[Any]:
        async with contextlib.AsyncExitStack() as stack:
            stream = self._agent(client, model).run(PROMPT, stream=True)
            if hasattr(stream, "__aexit__"):
                stream = await stack.enter_async_context(stream)
            yield stream


FRAMEWORKS = {"agents": OpenAIAgents, "pydantic_ai": PydanticAi, "agent_framework": AgentFramework}


def scenarios(framework: str) -> dict[str, Callable[[Any, str], Awaitable[Any]]]:
    """The scenarios of a framework."""
    chosen = FRAMEWORKS[framework]()

    async def streamed(client: Any, model: str) -> Any:
        async with chosen.stream(client, model) as pieces:
            async for _piece in pieces:
                pass
            return pieces

    async def left(client: Any, model: str) -> Any:
        async with chosen.stream(client, model) as pieces:
            await _read(pieces)
            return pieces

    async def inner_call(client: Any, model: str) -> Any:
        async with chosen.stream(client, model) as pieces:
            await _read(pieces)
            inner = await client.responses.create(model=f"{model}+", input=PROMPT)
            async for _piece in pieces:
                pass
            return inner

    async def inner_same_model(client: Any, model: str) -> Any:
        async with chosen.stream(client, model) as pieces:
            await _read(pieces)
            inner = await client.responses.create(model=model, input=PROMPT)
            async for _piece in pieces:
                pass
            return inner

    async def inner_stream(client: Any, model: str) -> Any:
        async with chosen.stream(client, model) as pieces:
            await _read(pieces)
            inner = await client.responses.create(model=f"{model}+", input=PROMPT, stream=True)
            async for _event in inner:
                pass
            async for _piece in pieces:
                pass
            return inner

    return {
        "run": chosen.run,
        "streamed": streamed,
        "run-left": left,
        "inner-call": inner_call,
        "inner-same-model": inner_same_model,
        "inner-stream": inner_stream,
    }


async def _read(pieces: Any) -> None:
    """Read a few pieces."""
    count = 0
    async for _piece in pieces:
        count += 1
        if count == READ:
            return
