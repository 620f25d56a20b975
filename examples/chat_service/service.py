"""An ordinary chat service: one page, and answers that are streamed to it as server-sent events."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, StreamingResponse
from openai.types.responses import (
    ResponseCompletedEvent,
    ResponseFailedEvent,
    ResponseIncompleteEvent,
    ResponseRefusalDeltaEvent,
    ResponseTextDeltaEvent,
)
from opentelemetry import metrics, trace
from pydantic import BaseModel, Field

MODEL = os.environ.get("OPENAI_MODEL", "gpt-5.4-mini")
PAGE = Path(__file__).with_name("page.html")

# By the API's error code or, where it gave none, by the SDK's exception.
APOLOGIES = {
    "previous_response_not_found": "This conversation cannot be continued any more.",
    "context_length_exceeded": "This conversation has become too long for the model.",
    "rate_limit_exceeded": "Too many questions at once. Please wait a moment.",
    "insufficient_quota": "This service has used up its quota. Please come back later.",
    "APIConnectionError": "The connection to the model failed.",
    "APITimeoutError": "The model took too long.",
}
APOLOGY = "Something went wrong on our side."

logger = logging.getLogger("chat")


class Question(BaseModel):
    """What the page asks, and the answer it goes on from."""

    text: str = Field(min_length=1, max_length=50_000)
    previous_response_id: str | None = None


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, openai.AsyncOpenAI]]:
    async with openai.AsyncOpenAI() as client:
        yield {"client": client}
        await asyncio.sleep(0.1)  # uvicorn has just cancelled open requests: let them close their streams
    # uvicorn may end the process without its exit handlers, so export everything here.
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        if hasattr(provider, "shutdown"):
            provider.shutdown()


app = FastAPI(title="Chat", lifespan=lifespan)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(PAGE)


@app.post("/answers")
async def answer(question: Question, request: Request) -> StreamingResponse:
    # FastAPI's own EventSourceResponse is shorter, but when a slow browser goes away, it leaves the generator
    # open, and so the stream.
    return StreamingResponse(
        events(question, request.state.client),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def events(question: Question, client: openai.AsyncOpenAI) -> AsyncIterator[str]:
    """Yield the answer: events `text`, then `end` or `trouble`.

    Stop, or a closed tab, cancels this coroutine. `async with` then closes the stream. Otherwise the model
    would keep generating text that is not read.
    """
    try:
        async with await client.responses.create(
            model=MODEL,
            instructions="You are a friendly assistant. Answer in plain text, without Markdown.",
            input=question.text,
            previous_response_id=question.previous_response_id,
            stream=True,
        ) as stream:
            async for event in stream:
                match event:
                    case ResponseTextDeltaEvent() | ResponseRefusalDeltaEvent():
                        yield sse("text", event.delta)
                    case ResponseCompletedEvent() | ResponseIncompleteEvent():
                        told = {"id", "status", "incomplete_details", "usage"}
                        yield sse("end", event.response.model_dump(mode="json", include=told))
                    case ResponseFailedEvent():
                        error = event.response.error
                        yield trouble(error.code if error else "failed")
    except openai.OpenAIError as error:
        yield trouble(getattr(error, "code", None) or type(error).__name__)


def trouble(code: str) -> str:
    logger.warning("no answer: %s", code)
    return sse("trouble", {"code": code, "message": APOLOGIES.get(code, APOLOGY)})


def sse(event: str, data: object) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")), timeout_graceful_shutdown=5)
