"""Baggage of the caller that becomes attributes of spans and metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from .. import _fault
from .._facts.response import utf8_safe

_MAX_LENGTH: Final = 128
# So many values of one key become attributes of metrics. Each value makes series of its own.
_MAX_VALUES: Final = 100
_OTHER: Final = "other"

_logger = logging.getLogger("otel_responses_usage")


class CallBaggage(NamedTuple):
    """The baggage entries of one call.

    Attributes:
        on_span: The attributes of its span.
        on_points: The attributes of its metric points. A value is `other` if there are too many values.

    """

    on_span: Mapping[str, str]
    on_points: Mapping[str, str]


NO_BAGGAGE: Final = CallBaggage({}, {})


class BaggageReader:
    """Reads some entries of the baggage of the current context."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        if keys:  # most services have none, and need not import it
            from opentelemetry.baggage import get_all

            self._get_all = get_all
        self._values: dict[str, set[str]] = {key: set() for key in keys}
        self._full: set[str] = set()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Make the lock. Called in a forked child, too: a thread of the parent process may hold it."""
        self._lock = threading.RLock()  # a signal handler may come back here

    def read(self) -> CallBaggage:
        """Return the entries of the current context that were asked for."""
        if not self._keys:
            return NO_BAGGAGE
        entries = self._get_all()
        on_span = {key: _text(entries[key]) for key in self._keys if entries.get(key) is not None}
        if not on_span:
            return NO_BAGGAGE
        return CallBaggage(on_span, {key: self._bounded(key, value) for key, value in on_span.items()})

    def _bounded(self, key: str, value: str) -> str:
        known = self._values[key]
        if value in known:
            return value
        if key not in self._full:
            with self._lock:
                # Another thread may just have added the same value.
                if value in known or len(known) < _MAX_VALUES:
                    known.add(value)
                    return value
                is_first = key not in self._full
                self._full.add(key)
            if is_first:
                _logger.warning(
                    "The baggage entry %s has more than %d values. On metrics, further values are %r.",
                    key,
                    _MAX_VALUES,
                    _OTHER,
                )
        return _OTHER


def _text(value: object) -> str:
    try:
        return utf8_safe(str(value)[:_MAX_LENGTH])
    except Exception:  # an object of the application, whose text cannot be had
        _fault.report("reading baggage")
        return _OTHER
