"""A lock that is held during late imports. A fork waits for it."""

from __future__ import annotations

import os
import threading
from typing import Final

# A fork waits at most so long.
_FORK_TIMEOUT_S: Final = 1.0

# A child process that inherits a half-done import can never finish it.
late_import: Final = threading.Lock()


class _Forks:
    """Lets the forks of the application wait for a late import, for a limited time."""

    def __init__(self) -> None:
        self._is_held = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._after)

    def _before(self) -> None:
        self._is_held = late_import.acquire(timeout=_FORK_TIMEOUT_S)

    def _after(self) -> None:
        if self._is_held:
            late_import.release()


_forks: Final = _Forks()
