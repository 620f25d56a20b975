"""Reading a stream to its end after the application has closed it, for a while."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final

from .. import _fault
from .._call.invocation import Invocation

THREAD_NAME: Final = "otel-responses-usage-tail"

Decode = Callable[[bytes], bytes]

# Each reader is a thread; one more stream than this is closed as ever, and looked up.
_MAX_THREADS: Final = 64
_thread_slots = threading.BoundedSemaphore(_MAX_THREADS)

# A loop keeps its tasks by weak references only.
_tasks: set[asyncio.Task[None]] = set()


def read_tail_in_thread(
    source: Iterator[bytes],
    close: Callable[[], None],
    decode: Decode,
    invocation: Invocation,
    timeout_s: float,
    connection: socket.socket | None,
) -> threading.Thread | None:
    """Read on in a thread of its own; `None` where that cannot be.

    A blocking read takes no deadline, so at the deadline its connection is shut down under it.
    """
    if not _thread_slots.acquire(blocking=False):
        return None
    duplicate = _duplicate(connection)
    if duplicate is None:
        _thread_slots.release()
        return None

    def read() -> None:
        deadline = threading.Timer(timeout_s, _shut_down, (duplicate,))
        deadline.daemon = True
        deadline.start()
        try:
            for piece in source:
                if invocation.on_tail(decode(piece)):
                    break
        except Exception:  # noqa: S110  # the tail has broken off, or its time is up
            pass
        finally:
            deadline.cancel()
            duplicate.close()
            try:
                close()
            except Exception:
                _fault.report("closing a stream that was read on")
            _thread_slots.release()
            invocation.on_tail_end()

    thread = threading.Thread(target=read, name=THREAD_NAME, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down
        duplicate.close()
        _thread_slots.release()
        return None
    return thread


def read_tail_in_task(
    source: AsyncIterator[bytes],
    close: Callable[[], Awaitable[None]],
    decode: Decode,
    invocation: Invocation,
    timeout_s: float,
) -> asyncio.Task[None] | None:
    """Read on in a task of the application's loop; `None` where that is not asyncio's."""

    async def read() -> None:
        async for piece in source:
            if invocation.on_tail(decode(piece)):
                break

    async def read_until_timeout() -> None:
        try:
            with contextlib.suppress(Exception):  # the tail has broken off, or its time is up
                await asyncio.wait_for(read(), timeout_s)
        finally:
            try:
                await close()
            except Exception:
                _fault.report("closing a stream that was read on")
            finally:
                invocation.on_tail_end()

    try:
        task = asyncio.get_running_loop().create_task(read_until_timeout(), name=THREAD_NAME)
    except RuntimeError:
        return None
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


def _reset_after_fork() -> None:
    """Forget the readers of the parent process."""
    global _thread_slots
    _thread_slots = threading.BoundedSemaphore(_MAX_THREADS)
    _tasks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def _duplicate(connection: socket.socket | None) -> socket.socket | None:
    """Return a second handle on a connection, which works also when the application closes the first."""
    if connection is None:
        return None
    try:
        return socket.socket(fileno=os.dup(connection.fileno()))
    except OSError:
        return None


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
