"""What has arrived of a stream when it is closed, but lies unread in buffers below.

A server often sends the last delta and the terminal event in one go. An application that closes at the
last delta leaves the terminal event, with the usage, in the HTTP library's buffer or in the socket's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Final

# More than this is not the end of an answer but the middle of one.
_MOST_PIECES: Final = 256

See = Callable[[bytes], bool]


def see_arrived(source: Iterator[bytes], see: See, connection: socket.socket | None) -> None:
    """Show what has arrived to `see`, as long as it asks for more. Never waits for the network.

    The connection is lost by this; it is about to be closed.
    """
    if connection is None:
        return
    try:
        # From now on a read ends where otherwise it would wait. Not the method of a TLS socket, which
        # would also drop its keys.
        socket.socket.shutdown(connection, socket.SHUT_RD)
        for piece, _ in zip(source, range(_MOST_PIECES), strict=False):
            if not see(piece):
                break
    except Exception:  # noqa: S110  # the end of what had arrived
        pass


async def async_see_arrived(source: AsyncIterator[bytes], see: See) -> None:
    """Do the same on asyncio. On trio nothing is shown: its reads cannot be left half-way."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    with contextlib.suppress(StopAsyncIteration, _WouldWait, Exception):
        for _ in range(_MOST_PIECES):
            if not see(await _AtOnce(source.__anext__())):
                break


class _WouldWait(BaseException):
    """Thrown into a read that waits for the network, as a cancellation would be."""


class _AtOnce:
    """Awaits something that is there already; what would have to wait is broken off."""

    def __init__(self, awaitable: Any) -> None:
        self._steps = awaitable.__await__()

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            self._steps.send(None)
        except StopIteration as done:
            return done.value
        # What it awaits while it is broken off is the closing of the connection.
        return (yield from _thrown(self._steps))


def _thrown(steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    try:
        awaited = steps.throw(_WouldWait())
    except StopIteration as done:
        return done.value
    while True:
        sent = yield awaited
        try:
            awaited = steps.send(sent)
        except StopIteration as done:
            return done.value
