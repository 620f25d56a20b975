"""The one place where a fault of the instrumentation itself ends."""

from __future__ import annotations

import logging

_logger = logging.getLogger("otel_responses_usage")


def report(doing: str) -> None:
    """Log the exception being handled, for whoever debugs; the application never sees it."""
    _logger.debug(
        "A fault of the instrumentation while %s; the application is not affected.", doing, exc_info=True
    )
