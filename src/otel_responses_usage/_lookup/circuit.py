"""Knowing a server that has no answers, and asking it only now and then."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from .._facts.usage import MissingReason
from .job import LookupResult


class CircuitPolicy(NamedTuple):
    """When a circuit opens, and for how long in seconds; each trial in vain doubles the time."""

    failures: int = 5
    first_pause_s: float = 5.0
    longest_pause_s: float = 60.0


class Verdict(Enum):
    """What a look-up says of the server it was made at."""

    ALIVE = "alive"
    NOT_FOUND = "not_found"
    FUTILE = "futile"
    NOTHING = "nothing"


# What a server without stored responses, or one out of reach, makes of every look-up.
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
    """Judge a look-up for which the server was asked. One that showed the response is no failure of its."""
    if result.response is not None:
        return Verdict.ALIVE
    return _VERDICTS.get(result.reason, Verdict.NOTHING)


class Change(Enum):
    """What a verdict did to a circuit."""

    OPENED = 1
    CLOSED = -1
    NONE = 0


class Circuit:
    """Whether look-ups at one place are worth a request.

    It opens after some look-ups in a row that brought nothing, lets one pass as a trial when its pause
    is over, and closes with the first that brings something. A server that has once had a response does
    store them: from then on a 404 speaks of that one response. Times in seconds come in: there is no
    clock here.
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
    def on_probation(self) -> bool:
        """Whether nothing is known of the server: it has neither answered nor failed often enough."""
        return not (self._has_answered or self.is_open)

    @property
    def is_open(self) -> bool:
        """Whether look-ups are refused, but for a trial now and then."""
        return self._open_until is not None

    def begin_trial(self, now: float) -> bool:
        """Whether a look-up may be made though the circuit is open. It ends with `learn`."""
        if self._trying or self._open_until is None or now < self._open_until:
            return False
        self._trying = True
        return True

    def learn(self, verdict: Verdict, now: float, *, is_trial: bool) -> Change:
        """Take the verdict of a look-up."""
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
