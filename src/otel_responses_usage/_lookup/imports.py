"""Keeps forks of the application away from what the threads of the look-ups must not leave half-done."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Final

_MAX_WAIT_S: Final = 1.0
_CHECK_S: Final = 0.0005

# Held while a module is imported late. In a child that inherits a half-done import, that import never ends.
late_import: Final = threading.Lock()

# A mark for each thread of the look-ups that may hold a lock of the OpenTelemetry SDK. A child that inherits
# such a lock waits for it for ever. Not a lock: under gevent the holder may switch to another greenlet.
_recording: Final[dict[object, None]] = {}


@contextlib.contextmanager
def forks_wait() -> Iterator[None]:
    """Have forks wait until this block has ended, but not for long."""
    while _forks.is_forking:
        time.sleep(_CHECK_S)
    mark = object()
    _recording[mark] = None
    try:
        yield
    finally:
        _recording.pop(mark, None)


class _Forks:
    """Has forks of the application wait for imports and records of the look-ups, but not for long."""

    def __init__(self) -> None:
        self.is_forking = False
        self._is_held = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before, after_in_parent=self._after, after_in_child=self._after_in_child
            )

    def _before(self) -> None:
        self._is_held = late_import.acquire(timeout=_MAX_WAIT_S)
        self.is_forking = True
        for _ in range(int(_MAX_WAIT_S / _CHECK_S)):
            if not _recording:
                break
            time.sleep(_CHECK_S)

    def _after(self) -> None:
        self.is_forking = False
        if self._is_held:
            late_import.release()

    def _after_in_child(self) -> None:
        _recording.clear()
        self._after()


_forks: Final = _Forks()
