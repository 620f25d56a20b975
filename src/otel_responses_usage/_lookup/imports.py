"""Imports that are made when they are needed first, in whatever thread, and forks that wait for them."""

from __future__ import annotations

import os
import threading
from typing import Final

_PATIENCE_S: Final = 1.0

# Held while something is imported late: a child that inherits a half-done import can never do it.
late_import: Final = threading.Lock()


class _Forks:
    """Keeps imports of ours and forks of the application's apart, and never holds up a fork for long."""

    def __init__(self) -> None:
        self._is_held = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._after)

    def _before(self) -> None:
        self._is_held = late_import.acquire(timeout=_PATIENCE_S)

    def _after(self) -> None:
        if self._is_held:
            late_import.release()


_forks: Final = _Forks()
