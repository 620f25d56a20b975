"""The story of each call: one DEBUG line of the logger `otel_responses_usage.story` for each step."""

from __future__ import annotations

import contextlib
import itertools
import logging
from typing import Final

_MAX_LENGTH: Final = 200

_logger = logging.getLogger("otel_responses_usage.story")
_numbers = itertools.count(1)


class Story:
    """Logs the steps of one call. The lines have ids, names and counts: no content, no credentials."""

    __slots__ = ("_number",)

    def __init__(self) -> None:
        """Give the call a number, which is in all of its lines."""
        self._number = next(_numbers)

    def tell(self, step: str, **facts: object) -> None:
        """Log one step. Never raises. Facts that are `None` or false are left out."""
        with contextlib.suppress(Exception):  # a filter of the application may raise
            told = " ".join(f"{name}={_one_line(value)}" for name, value in facts.items() if value)
            _logger.debug("Call %d %s%s", self._number, step, f": {told}" if told else ".")


def begin_story() -> Story | None:
    """Return the story of a new call. `None` if the logger does not log at DEBUG."""
    return Story() if _logger.isEnabledFor(logging.DEBUG) else None


def _one_line(value: object) -> str:
    text = str(getattr(value, "value", value))  # of a member of an `Enum`, its value
    return "".join(text.split())[:_MAX_LENGTH]
