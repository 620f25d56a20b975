"""The one place where a fault of the instrumentation itself ends."""

from __future__ import annotations

import logging
from collections.abc import Callable

_logger = logging.getLogger("otel_responses_usage")
_count: Callable[[], None] | None = None


def report(doing: str) -> None:
    """Log and count the exception being handled; the application never sees it."""
    _logger.debug(
        "A fault of the instrumentation while %s; the application is not affected.", doing, exc_info=True
    )
    if _count is not None:
        try:
            _count()
        except Exception:
            _logger.debug("The fault could not be counted.", exc_info=True)


def count_with(count: Callable[[], None] | None) -> None:
    """Have every later fault counted by this function."""
    global _count  # faults are of the process, whoever has them
    _count = count
