"""Reads the tail of a stream: the part that arrives after the application closed it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final

from .. import _fault
from .._call.invocation import Invocation
from ._unread import UnreadBody

TASK_NAME: Final = "otel-responses-usage-tail"

Decode = Callable[[bytes], Iterator[bytes]]

# How often to look for more bytes.
_FIRST_WAIT_S: Final = 0.002
_MAX_WAIT_S: Final = 0.1
# A task that reads a tail ends at the timeout. This much later the tail has ended in any case.
_TASK_GRACE_S: Final = 1.0

# An event loop has only weak references to its tasks.
_tasks: set[asyncio.Task[None]] = set()
# The tails whose connections are open.
_tails: set[Tail] = set()


class Tail:
    """The tail of one stream, on a connection that the application's HTTP client has already closed.

    A thread of the look-ups looks for new bytes from time to time. The application waits for nothing: its
    `close()` returns at once, and its connection pool may open another connection.
    """

    def __init__(
        self,
        body: UnreadBody,
        pieces: list[bytes],
        decode: Decode,
        invocation: Invocation,
        timeout_s: float,
    ) -> None:
        self._body = body
        self._pieces = pieces  # that have arrived and are decoded
        self._decode = decode
        self._invocation = invocation
        self._deadline = time.monotonic() + timeout_s
        self._left_s = timeout_s  # counted as well as measured: tests freeze the clock
        self._wait_s = _FIRST_WAIT_S
        self._is_reading = threading.Lock()
        _tails.add(self)

    def read_on(self) -> float | None:
        """Read what has arrived, and return after how many seconds to read again."""
        with self._is_reading:
            if self not in _tails:
                return None
            is_over = min(self._deadline - time.monotonic(), self._left_s) <= 0  # then this is the last read
            has_end = any(map(self._invocation.on_tail, self._read()))
        if has_end or is_over or self._body.ended:
            self._invocation.on_tail_end()
            return None
        wait_s = min(self._wait_s, self._left_s)
        self._left_s -= wait_s
        self._wait_s = min(self._wait_s * 2, _MAX_WAIT_S)
        return wait_s

    def _read(self) -> Iterator[bytes]:
        pieces, self._pieces = self._pieces, []
        yield from pieces
        for piece in self._body.read(any_content=True):
            yield from self._decode(piece)

    def close(self) -> None:
        """Close the connection."""
        with self._is_reading:
            _tails.discard(self)
            self._body.close()


def read_tail_in_task(
    source: AsyncIterator[bytes],
    close: Callable[[], Awaitable[None]],
    decode: Decode,
    invocation: Invocation,
    timeout_s: float,
) -> asyncio.Task[None] | None:
    """Read the tail in a task of the application's event loop. Returns `None` if that is not asyncio.

    The stream of the HTTP library stays open, and its connection in use.
    """

    async def read() -> None:
        async for piece in source:
            if any(invocation.on_tail(plain) for plain in decode(piece)):
                break

    async def read_until_timeout() -> None:
        try:
            with contextlib.suppress(Exception):  # the connection failed, or the timeout has passed
                await asyncio.wait_for(read(), timeout_s)
        finally:
            try:
                await close()
            except Exception:
                _fault.report("closing a stream that was read on")
            finally:
                invocation.on_tail_end()

    try:
        task = asyncio.get_running_loop().create_task(read_until_timeout(), name=TASK_NAME)
    except RuntimeError:
        return None
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


def end_after(invocation: Invocation, timeout_s: float) -> Callable[[], float | None]:
    """Return a callback that ends the tail of a task whose event loop may have stopped."""
    waits = iter((timeout_s + _TASK_GRACE_S,))

    def end() -> float | None:
        wait_s = next(waits, None)
        if wait_s is None:
            invocation.on_tail_end()
        return wait_s

    return end


def _reset_after_fork() -> None:
    """Leave the tails to the parent process."""
    tails = list(_tails)
    _tails.clear()
    for tail in tails:
        tail._body.close()  # noqa: SLF001  # a thread of the parent may hold the lock
    _tasks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
