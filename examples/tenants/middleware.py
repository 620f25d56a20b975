"""A FastAPI application whose calls are counted per tenant.

Start it with `OTEL_RESPONSES_USAGE_BAGGAGE_KEYS=tenant.id`. The middleware works with every ASGI framework.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import openai
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from opentelemetry import baggage, context
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send


class TenantBaggage:
    """Puts the tenant of a request into the baggage, until its response has been sent."""

    def __init__(self, app: ASGIApp, tenant_of: Callable[[HTTPConnection], str | None]) -> None:
        self.app, self.tenant_of = app, tenant_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        tenant = self.tenant_of(HTTPConnection(scope)) if scope["type"] != "lifespan" else None
        token = context.attach(baggage.set_baggage("tenant.id", tenant or "unknown"))
        try:
            await self.app(scope, receive, send)
        finally:
            context.detach(token)


app = FastAPI()
# From a header that your gateway sets after it has checked who asks. From a session it is
# `tenant_of=lambda request: request.session.get("tenant")`, added before `SessionMiddleware`.
app.add_middleware(TenantBaggage, tenant_of=lambda request: request.headers.get("x-tenant-id"))


@app.get("/answer")
async def answer(question: str) -> StreamingResponse:
    """Stream an answer of the model."""

    async def pieces() -> AsyncIterator[str]:
        async with openai.AsyncOpenAI() as client:
            stream = await client.responses.create(model="gpt-5.4-mini", input=question, stream=True)
            async with stream:
                async for event in stream:
                    if event.type == "response.output_text.delta":
                        yield event.delta

    return StreamingResponse(pieces())
