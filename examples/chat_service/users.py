"""Who asks: from a header of a trusted proxy, or from a session cookie. Put into OpenTelemetry's baggage."""

from __future__ import annotations

import hashlib
import os
import secrets

from fastapi import Request, Response
from ledger import USER_KEY
from opentelemetry import baggage, context
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

# Set this only behind a proxy that checks the user and overwrites the header: a browser can send any header.
USER_HEADER = os.environ.get("CHAT_USER_HEADER")
COOKIE = "chat_session"


class UserBaggage:
    """ASGI middleware: the user of a request is in the baggage of all calls that the request makes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, with its user in the baggage."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token = context.attach(baggage.set_baggage(USER_KEY, user_of(HTTPConnection(scope))))
        try:
            await self.app(scope, receive, send)
        finally:
            context.detach(token)


def user_of(connection: HTTPConnection) -> str:
    """Return the user of a request. The cookie is a secret, so its digest is used."""
    if USER_HEADER and (user := connection.headers.get(USER_HEADER)):
        return user[:128]  # as long as the instrumentation keeps it
    session = connection.cookies.get(COOKIE)
    return f"guest-{hashlib.sha256(session.encode()).hexdigest()[:16]}" if session else "anonymous"


def begin_session(request: Request, response: Response) -> None:
    """Set the session cookie, if the browser has none."""
    if COOKIE not in request.cookies:
        response.set_cookie(
            COOKIE,
            secrets.token_urlsafe(),
            max_age=365 * 24 * 3600,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
