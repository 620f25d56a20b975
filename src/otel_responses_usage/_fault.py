"""The one place where a fault of the instrumentation itself ends."""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_logger = logging.getLogger("otel_responses_usage")
_counter: Callable[[], None] | None = None


def report(action: str) -> None:
    """Log and count the exception being handled; the application never sees it."""
    _log(f"A fault of the instrumentation while {action}; the application is not affected.")
    if _counter is not None:
        try:
            _counter()
        except Exception:
            _log("The fault could not be counted.")


def catch_and_report(action: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R | None]]:
    """Return a decorator for functions that the application runs through: what they raise ends here."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R | None]:
        @functools.wraps(function)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R | None:
            try:
                return function(*args, **kwargs)
            except Exception:
                report(action)
                return None

        return guarded

    return decorate


def set_counter(counter: Callable[[], None] | None) -> None:
    """Have every later fault counted by this function."""
    global _counter  # faults are of the process, whoever has them
    _counter = counter


def _log(message: str) -> None:
    if _logger.isEnabledFor(logging.DEBUG):
        # Not the chain: a fault may happen while an exception of the application's is handled, whose
        # text can quote a prompt or a key.
        text = "".join(traceback.format_exception(*sys.exc_info(), chain=False))
        _logger.debug("%s\n%s", message, text)
