"""Messages of a WebSocket that have arrived, and that the application has not received."""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from typing import Any, Final

# The library holds its lock only while it adds or takes one frame.
_LOCK_TIMEOUT_S: Final = 0.1


def unread_messages(socket: Any) -> list[bytes]:
    """Return the complete messages, the oldest first. The application can still receive them.

    Args:
        socket: A connection of the library `websockets`. The first releases have another buffer. For those
            the result is empty.

    """
    messages: list[bytes] = []
    parts: list[bytes] = []
    is_whole = False  # whether the first part of the message is there: a reader may have taken it
    for frame in _unread_frames(getattr(socket, "recv_messages", None)):
        if frame.opcode != 0:  # it does not continue a message
            is_whole = True
        parts.append(frame.data)
        if frame.fin:
            if is_whole:
                messages.append(b"".join(parts))
            parts, is_whole = [], False
    return messages


def _unread_frames(assembler: Any) -> list[Any]:
    frames = getattr(assembler, "frames", None)
    frames_of_async = getattr(frames, "queue", None)
    if isinstance(frames_of_async, deque):
        return list(frames_of_async)
    mutex = getattr(assembler, "mutex", None)
    if not isinstance(frames, queue.SimpleQueue) or mutex is None:
        return []
    # Such a queue cannot be read without taking from it. Nothing else takes or adds while the lock is held,
    # unless a reader waits: then nothing is unread.
    if not mutex.acquire(timeout=_LOCK_TIMEOUT_S):
        return []
    taken: list[Any] = []
    try:
        if not assembler.get_in_progress:
            with contextlib.suppress(queue.Empty):
                while True:
                    taken.append(frames.get(block=False))
    finally:
        for frame in taken:
            frames.put(frame)
        mutex.release()
    return [frame for frame in taken if frame is not None]  # `None` marks the end
