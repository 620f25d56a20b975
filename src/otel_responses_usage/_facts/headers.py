"""The facts in the headers of an answer: its request id, and how much of the rate limits is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

_REQUEST_ID: Final = b"x-request-id"
_RATE_LIMIT: Final = b"x-ratelimit-"
_RATE_LIMIT_TYPES: Final = ("tokens", "requests")
# Most other headers begin with other letters.
_COMMON_START: Final = (b"x-r", b"X-R", b"X-r", b"x-R")

_MAX_ID_LENGTH: Final = 128
_MAX_DIGITS: Final = 18


class RateLimit(NamedTuple):
    """A rate limit of the account. A number that the server did not report is `None`.

    Attributes:
        type: What is limited: `tokens` or `requests`.
        limit: How many are allowed in a period.
        remaining: How many are left of them.

    """

    type: str
    limit: int | None
    remaining: int | None


class AnswerHeaders(NamedTuple):
    """The facts in the headers of one answer."""

    request_id: str | None = None
    rate_limits: tuple[RateLimit, ...] = ()

    @classmethod
    def from_raw(cls, headers: Iterable[tuple[bytes, bytes]]) -> AnswerHeaders:
        """Return the facts of these headers, given as names and values."""
        found = {
            lower: value
            for name, value in headers
            if name.startswith(_COMMON_START)
            and ((lower := name.lower()) == _REQUEST_ID or lower.startswith(_RATE_LIMIT))
        }
        if not found:
            return _NO_FACTS
        request_id = found.pop(_REQUEST_ID, b"")[:_MAX_ID_LENGTH].decode("ascii", "replace") or None
        return cls(request_id, tuple(_rate_limits(found)) if found else ())


_NO_FACTS: Final = AnswerHeaders()


def _rate_limits(headers: dict[bytes, bytes]) -> Iterable[RateLimit]:
    for kind in _RATE_LIMIT_TYPES:
        limit = _number(headers.get(b"x-ratelimit-limit-%b" % kind.encode()))
        remaining = _number(headers.get(b"x-ratelimit-remaining-%b" % kind.encode()))
        if limit is not None or remaining is not None:
            yield RateLimit(kind, limit, remaining)


def _number(text: bytes | None) -> int | None:
    # Servers send -1 where there is no limit.
    return int(text) if text is not None and text.isdigit() and len(text) <= _MAX_DIGITS else None
