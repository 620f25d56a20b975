"""An ordinary chat service: one page, answers that are streamed to it as server-sent events, and a ledger."""

import asyncio
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from ledger import LEDGER
from model import MODEL, NoAnswerError, answering
from openai.types.responses import (
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseFailedEvent,
    ResponseIncompleteEvent,
    ResponseRefusalDeltaEvent,
    ResponseTextDeltaEvent,
)
from opentelemetry import metrics, trace
from pydantic import BaseModel, Field
from users import UserBaggage, begin_session, user_of

from otel_responses_usage import Usage

PAGE = Path(__file__).with_name("page.html")
STATIC = Path(__file__).with_name("static")

# By the API's error code or, where it gave none, by the SDK's exception.
APOLOGIES = {
    "previous_response_not_found": "This conversation cannot be continued any more.",
    "context_length_exceeded": "This conversation has become too long for the model.",
    "rate_limit_exceeded": "Too many questions at once. Please wait a moment.",
    "insufficient_quota": "This service has used up its quota. Please come back later.",
    "APIConnectionError": "The connection to the model failed.",
    "ConnectionClosedError": "The connection to the model failed.",
    "ConnectionRefusedError": "The connection to the model failed.",
    "APITimeoutError": "The model took too long.",
}
APOLOGY = "Something went wrong on our side."

logger = logging.getLogger("chat")


class Question(BaseModel):
    """What the page asks, its own id of the question, and the answer that the question continues."""

    text: str = Field(min_length=1, max_length=50_000)
    id: str = Field(default_factory=lambda: secrets.token_hex(16), min_length=16, max_length=64)
    previous_response_id: str | None = None


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, openai.AsyncOpenAI]]:
    async with openai.AsyncOpenAI() as client:
        settling = asyncio.create_task(settle_left_open(client))
        yield {"client": client}
        settling.cancel()
        await asyncio.sleep(0.1)  # uvicorn has just cancelled open requests: let them close their streams
    # uvicorn may end the process without its exit handlers, so export everything here.
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        if hasattr(provider, "shutdown"):
            provider.shutdown()


app = FastAPI(title="Chat", lifespan=lifespan)
app.add_middleware(UserBaggage)
app.mount("/static", StaticFiles(directory=STATIC))


@app.get("/")
async def page(request: Request) -> FileResponse:
    response = FileResponse(PAGE)
    begin_session(request, response)
    return response


@app.get("/usage")
def usage(request: Request) -> dict[str, Any]:
    """Return the sums of the user who asks."""
    return LEDGER.of_user(user_of(request))


@app.get("/usage/{question_id}")
def usage_of_question(question_id: str, request: Request) -> dict[str, Any]:
    """Return the call of one question. Without an `outcome` its tokens are not known yet."""
    call = LEDGER.of_question(question_id, user_of(request))
    if call is None:
        raise HTTPException(404)
    return call


@app.post("/answers")
async def answer(question: Question, request: Request) -> StreamingResponse:
    # FastAPI's own EventSourceResponse is shorter, but when a slow browser goes away, it leaves the generator
    # open, and so the stream.
    return StreamingResponse(
        events(question, user_of(request), request.state.client),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def events(question: Question, user: str, client: openai.AsyncOpenAI) -> AsyncIterator[str]:
    """Yield the answer: events `text`, then `end` or `trouble`.

    Stop, or a closed tab, cancels this coroutine. `async with` then closes the stream.
    """
    try:
        async with answering(client, question.text, question.previous_response_id) as stream:
            async for event in stream:
                match event:
                    case ResponseCreatedEvent():
                        # From here on the call is in the ledger, also if this process is killed.
                        await asyncio.to_thread(
                            LEDGER.begin, event.response.id, question=question.id, user=user, model=MODEL
                        )
                    case ResponseTextDeltaEvent() | ResponseRefusalDeltaEvent():
                        yield sse("text", event.delta)
                    case ResponseCompletedEvent() | ResponseIncompleteEvent():
                        told = {"id", "status", "incomplete_details", "usage"}
                        yield sse("end", event.response.model_dump(mode="json", include=told))
                    case ResponseFailedEvent():
                        error = event.response.error
                        yield trouble(error.code if error else "failed")
    except NoAnswerError as error:
        yield trouble(error.code)


async def settle_left_open(client: openai.AsyncOpenAI) -> None:
    """Look up the calls that a killed process left open. Their telemetry died with that process."""
    left_open = await asyncio.to_thread(LEDGER.left_open)
    for _ in range(12):
        for response_id in list(left_open):
            with suppress(openai.OpenAIError):  # not now
                if (found := await look_up(client, response_id)) is not None:
                    await asyncio.to_thread(LEDGER.settle, response_id, *found)
                    left_open.remove(response_id)
        if not left_open:
            return
        await asyncio.sleep(5)


async def look_up(client: openai.AsyncOpenAI, response_id: str) -> tuple[Usage | None, str | None] | None:
    """Return the usage of a response or why it is unknown, and `None` while the response runs."""
    try:
        response = await client.responses.retrieve(response_id)
    except openai.NotFoundError:
        return None, "not_found"
    if (usage := Usage.from_response(response.to_dict())) is not None:
        return usage, None
    return None if response.status in {"queued", "in_progress"} else (None, "no_usage")


def trouble(code: str) -> str:
    logger.warning("no answer: %s", code)
    return sse("trouble", {"code": code, "message": APOLOGIES.get(code, APOLOGY)})


def sse(event: str, data: object) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")), timeout_graceful_shutdown=5)
