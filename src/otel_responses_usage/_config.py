"""The settings of the instrumentation and their environment variables."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

_PREFIX: Final = "OTEL_RESPONSES_USAGE_"
_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})

# Whether a call gets a `chat` span of its own.
Spans = Literal["auto", "always", "never"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Config:
    """The settings. Each has an environment variable `OTEL_RESPONSES_USAGE_<NAME>`.

    Attributes:
        retrieval: Whether to look usage up that the stream did not deliver.
        retrieval_timeout: Seconds from the end of a stream until its look-up stops.
        background_timeout: The same for calls with `background=True`.
        max_concurrency: Maximum number of look-up requests at the same time.
        max_pending: Maximum number of spans that stay open until their usage is known. Further spans end at
            once, with the missing reason `overload`.
        exit_timeout: Seconds that a process exit or `uninstrument()` waits for pending look-ups. It waits
            half of this time for streams that are read on.
        flush_timeout: Seconds that a `force_flush()` of the SDK's providers waits for pending look-ups, no
            longer than its own timeout and not for background responses; 0 is not at all.
        grace_timeout: Seconds to continue reading after the application closed a stream whose output is
            complete: only the terminal event is due then; 0 is off.
        tail_timeout: Seconds to continue reading after the application closed a stream; 0 is off. Costs the
            tokens that are generated during this time.
        spans: Whether a call gets a `chat` span. `"auto"`: not if another instrumentation has a span of the
            call; then only what that span lacks is recorded. `"always"`: every call. `"never"`: no call.

    Raises:
        ValueError: A value is out of range.

    """

    retrieval: bool = True
    retrieval_timeout: float = 10.0
    background_timeout: float = 300.0
    max_concurrency: int = 8
    max_pending: int = 2048
    exit_timeout: float = 5.0
    flush_timeout: float = 1.0
    grace_timeout: float = 0.25
    tail_timeout: float = 0.0
    spans: Spans = "auto"

    def __post_init__(self) -> None:
        for name in (
            "retrieval_timeout",
            "background_timeout",
            "exit_timeout",
            "flush_timeout",
            "grace_timeout",
            "tail_timeout",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of seconds, 0 or more, not {value!r}")
        if self.max_concurrency < 1:
            raise ValueError(f"max_concurrency must be 1 or more, not {self.max_concurrency!r}")
        if self.max_pending < 0:
            raise ValueError(f"max_pending must be 0 or more, not {self.max_pending!r}")
        if self.spans not in get_args(Spans):
            raise ValueError(f"spans must be one of {get_args(Spans)}, not {self.spans!r}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Config:
        """Return the settings from the environment.

        An invalid value does not raise. One warning names all invalid variables, and their defaults are used.
        """
        values: dict[str, Any] = {}
        invalid: list[str] = []
        for field in fields(cls):
            variable = _PREFIX + field.name.upper()
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                value = _PARSERS[type(field.default)](text)
                cls(**{field.name: value})
                values[field.name] = value
            except ValueError:
                invalid.append(f"{variable} (using {field.default!r})")
        if invalid:
            _logger.warning("These settings have a value that cannot be used: %s", ", ".join(invalid))
        return cls(**values)


def _parse_bool(text: str) -> bool:
    word = text.lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError(text)


_PARSERS: Final[dict[type, Callable[[str], Any]]] = {
    bool: _parse_bool,
    int: int,
    float: float,
    str: str.lower,
}
