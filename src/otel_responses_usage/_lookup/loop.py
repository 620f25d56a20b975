"""The event loop of the look-ups, and how it keeps out of the application's way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, Final

# After so much work the application is let by, for longer than a system takes to wake the thread.
_STEP_S: Final = 1e-4
_WAY_S: Final = 5e-5
# So many calls to attend to within so long are a burst. While it goes on, the rests are so many times as long
# as the work, but not longer than so; where many calls end all the time, only at first, and then as long.
_BURST: Final = 8
_BURST_S: Final = 0.05
_LONGEST_BURST_S: Final = 3.0
_BETWEEN_BURSTS_S: Final = 1.0
_REST_SHARE: Final = 19
_STEADY_REST_SHARE: Final = 1
_LONGEST_REST_S: Final = 0.02


class Pace:
    """When to rest, and for how long.

    A thread of the application that waits for the interpreter gets it after 5 ms, or when its holder waits
    for something; and there are more than a thousand microseconds' work to do for each look-up. While many
    calls end at once the application has its hands full, and the look-ups can wait.
    """

    def __init__(self) -> None:
        self._called_at = deque([-_BURST_S] * _BURST, _BURST)
        self._burst_began = self._burst_seen_at = -_LONGEST_BURST_S
        self._rested_at_s = 0.0  # of the thread's processor time

    def begin(self) -> None:
        """Begin in the thread that calls: each has a processor time of its own."""
        self._rested_at_s = time.thread_time()

    def note_call(self) -> None:
        """Note that a call ends. May be called by any thread."""
        self._called_at.append(time.monotonic())

    @property
    def in_burst(self) -> bool:
        """Whether many calls are ending. May be asked by any thread."""
        return time.monotonic() - self._called_at[0] < _BURST_S

    def rest(self) -> None:
        """Let the application by, if there has been some work since it last was."""
        worked_s = time.thread_time() - self._rested_at_s
        if worked_s < _STEP_S:
            return
        rest_s = _WAY_S
        if self.in_burst:
            now = time.monotonic()
            if now - self._burst_seen_at > _BETWEEN_BURSTS_S:
                self._burst_began = now
            self._burst_seen_at = now
            is_new = now - self._burst_began < _LONGEST_BURST_S
            share = _REST_SHARE if is_new else _STEADY_REST_SHARE
            rest_s = min(share * worked_s, _LONGEST_REST_S)
        time.sleep(rest_s)
        self.begin()


class Loop(asyncio.SelectorEventLoop):
    """An event loop that rests between the steps of its tasks.

    It resolves names also while the interpreter exits, when no thread can be started.
    """

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def run_forever(self) -> None:
        """Run in the thread that calls; where there was none to be had, that was another one before."""
        self._pace.begin()
        super().run_forever()

    def call_soon(
        self, callback: Callable[..., object], *args: object, context: Context | None = None
    ) -> asyncio.Handle:
        """Arrange for a callback, and for a rest after it: each step of a task is one."""
        return super().call_soon(self._step, callback, *args, context=context)

    def _step(self, callback: Callable[..., object], *args: object) -> None:
        callback(*args)
        self._pace.rest()

    def close(self) -> None:
        """Close; also one that could not be made, for want of a file descriptor: the collector closes it."""
        with contextlib.suppress(AttributeError):
            super().close()

    async def getaddrinfo(self, host: Any, port: Any, **kwargs: Any) -> Any:
        """Resolve a name, in this thread where there can be no other."""
        try:
            return await super().getaddrinfo(host, port, **kwargs)
        except RuntimeError:
            return socket.getaddrinfo(host, port, **kwargs)


async def let_by() -> None:
    """End a step of a task here, so that the application is let by."""
    await asyncio.sleep(0)
