"""Catches errors of the instrumentation itself, so that the application never sees them."""

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
    """Log and count the exception that is being handled. `action` completes the log line."""
    _log(f"A fault of the instrumentation while {action}; the application is not affected.")
    if _counter is not None:
        try:
            _counter()
        except Exception:
            _log("The fault could not be counted.")


def catch_and_report(action: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R | None]]:
    """Return a decorator for functions that run in the application's call stack.

    The decorated function returns `None` if the original raises. The exception is passed to `report`.
    """

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
    """Set the function that is called once for each later fault; `None` removes it."""
    global _counter  # one counter for the whole process
    _counter = counter


def _log(message: str) -> None:
    if _logger.isEnabledFor(logging.DEBUG):
        # Without the exception chain. The application may be handling an exception of its own, and its text
        # can contain a prompt or a key.
        text = "".join(traceback.format_exception(*sys.exc_info(), chain=False))
        _logger.debug("%s\n%s", message, text)
