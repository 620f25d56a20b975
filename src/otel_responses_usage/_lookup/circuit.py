"""A circuit breaker per endpoint: stops look-ups at servers that do not store responses."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from .._facts.usage import MissingReason
from .job import LookupResult


class CircuitPolicy(NamedTuple):
    """When a circuit opens, and for how many seconds. Each failed trial doubles the time."""

    failures: int = 5
    first_pause_s: float = 5.0
    longest_pause_s: float = 60.0


class Verdict(Enum):
    """What the result of a look-up says about its endpoint."""

    ALIVE = "alive"
    NOT_FOUND = "not_found"
    FUTILE = "futile"
    NOTHING = "nothing"


# How a look-up ends, at a server that works, and at one that stores nothing or cannot be reached.
_VERDICTS: Final = {
    None: Verdict.ALIVE,
    MissingReason.NO_USAGE: Verdict.ALIVE,
    MissingReason.NOT_FOUND: Verdict.NOT_FOUND,
    MissingReason.TIMEOUT: Verdict.FUTILE,
    MissingReason.TRANSPORT_ERROR: Verdict.FUTILE,
    MissingReason.UNAUTHORIZED: Verdict.FUTILE,
    MissingReason.UNSUPPORTED: Verdict.FUTILE,
}


def verdict_of(result: LookupResult) -> Verdict:
    """Classify the result of a look-up. A result that contains the response counts as success."""
    if result.response is not None:
        return Verdict.ALIVE
    return _VERDICTS.get(result.reason, Verdict.NOTHING)


class Change(Enum):
    """What a verdict did to a circuit."""

    OPENED = 1
    CLOSED = -1
    NONE = 0


class Circuit:
    """The circuit breaker of one endpoint.

    It opens after some failed look-ups in a row. After a pause it lets one look-up pass as a trial, and a
    success closes it. A server that has once returned a response does store them: from then on a 404 is no
    failure. It has no clock: its caller gives the time in seconds.
    """

    __slots__ = ("_failures", "_has_answered", "_open_until", "_pause_s", "_policy", "_trying")

    def __init__(self, policy: CircuitPolicy) -> None:
        self._policy = policy
        self._has_answered = False
        self._failures = 0
        self._open_until: float | None = None
        self._pause_s = policy.first_pause_s
        self._trying = False

    @property
    def is_unknown(self) -> bool:
        """Whether the server has neither answered yet nor failed often enough."""
        return not (self._has_answered or self.is_open)

    @property
    def is_open(self) -> bool:
        """Whether look-ups are refused, except for trials."""
        return self._open_until is not None

    def begin_trial(self, now: float) -> bool:
        """Return whether a look-up may be the trial of an open circuit. The trial ends with `learn`."""
        if self._trying or self._open_until is None or now < self._open_until:
            return False
        self._trying = True
        return True

    def learn(self, verdict: Verdict, now: float, *, is_trial: bool) -> Change:
        """Take the verdict of a look-up, and return what it did to the circuit."""
        if is_trial:
            self._trying = False
        if verdict is Verdict.ALIVE:
            was_open = self.is_open
            self._has_answered = True
            self._failures = 0
            self._open_until = None
            self._pause_s = self._policy.first_pause_s
            return Change.CLOSED if was_open else Change.NONE
        if verdict is Verdict.NOTHING or (verdict is Verdict.NOT_FOUND and self._has_answered):
            return Change.NONE
        if self._open_until is None:
            self._failures += 1
            if self._failures < self._policy.failures:
                return Change.NONE
            self._open_until = now + self._pause_s
            return Change.OPENED
        if is_trial:
            self._pause_s = min(self._pause_s * 2, self._policy.longest_pause_s)
            self._open_until = now + self._pause_s
        return Change.NONE
