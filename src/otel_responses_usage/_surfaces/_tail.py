"""Reads the tail of a stream: the part that arrives after the application closed it."""

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

Decode = Callable[[bytes], Iterator[bytes]]

# Each tail needs a thread. Above this number a stream is closed at once, and its usage is looked up.
_MAX_THREADS: Final = 64
_thread_slots = threading.BoundedSemaphore(_MAX_THREADS)

# An event loop has only weak references to its tasks.
_tasks: set[asyncio.Task[None]] = set()


def read_tail_in_thread(
    source: Iterator[bytes],
    close: Callable[[], None],
    decode: Decode,
    invocation: Invocation,
    timeout_s: float,
    connection: socket.socket | None,
) -> threading.Thread | None:
    """Read the tail in a new thread. Returns `None` if that is not possible.

    A blocking read has no timeout. At the timeout the connection is shut down, so that the read fails.
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
                if any(invocation.on_tail(plain) for plain in decode(piece)):
                    break
        except Exception:  # noqa: S110  # the connection failed, or the timeout has passed
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
    """Read the tail in a task of the application's event loop. Returns `None` if that is not asyncio."""

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
        task = asyncio.get_running_loop().create_task(read_until_timeout(), name=THREAD_NAME)
    except RuntimeError:
        return None
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


def _reset_after_fork() -> None:
    """Forget the threads and tasks of the parent process."""
    global _thread_slots
    _thread_slots = threading.BoundedSemaphore(_MAX_THREADS)
    _tasks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def _duplicate(connection: socket.socket | None) -> socket.socket | None:
    """Return a second handle to a connection. It still works after the application closed the first."""
    if connection is None:
        return None
    try:
        return socket.socket(fileno=os.dup(connection.fileno()))
    except OSError:
        return None


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
