"""A stand-in for a connection of the library `websockets`: its messages are in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CREATE: dict[str, Any] = {"type": "response.create", "model": "gpt-5.4-mini", "input": "x"}


class Socket:
    """A connection whose messages are in memory."""

    def __init__(self, messages: Iterable[bytes]) -> None:
        self._next = iter(messages).__next__

    def send(self, message: str) -> None:
        """Send nothing."""

    def recv(self, timeout: float | None = None, decode: bool | None = None) -> bytes:  # noqa: ARG002
        """Return the next message."""
        return self._next()

    def close(self) -> None:
        """Close nothing."""


class AsyncSocket(Socket):
    """The same for an async connection."""

    async def send(self, message: str) -> None:  # type: ignore[override]
        """Send nothing."""

    async def recv(self, decode: bool | None = None) -> bytes:  # type: ignore[override]  # noqa: ARG002
        """Return the next message."""
        return self._next()

    async def close(self) -> None:  # type: ignore[override]
        """Close nothing."""
