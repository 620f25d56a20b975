"""Knowing a server that has no answers, and asking it only now and then."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from ._usage import MissingReason

# What a server without stored responses, or one out of reach, makes of every look-up.
_FUTILE: Final = frozenset(
    {
        MissingReason.NOT_FOUND,
        MissingReason.TIMEOUT,
        MissingReason.TRANSPORT_ERROR,
        MissingReason.UNAUTHORIZED,
        MissingReason.UNSUPPORTED,
    }
)


@dataclass(frozen=True, slots=True)
class CircuitPolicy:
    """When a circuit opens, and for how long in seconds; each trial in vain doubles the time."""

    failures: int = 5
    first_pause_s: float = 5.0
    longest_pause_s: float = 60.0


class Change(Enum):
    """What a result did to a circuit."""

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

    def admits(self, now: float) -> bool:
        """Whether a look-up may be made now. One that may is told of with `learn` when it has ended."""
        if self._open_until is None:
            return True
        if self._trying or now < self._open_until:
            return False
        self._trying = True
        return True

    @property
    def is_open(self) -> bool:
        """Whether look-ups are refused, but for a trial now and then."""
        return self._open_until is not None

    def learn(self, reason: MissingReason | None, now: float) -> Change:
        """Take the result of a look-up: the reason why it brought nothing, `None` where it brought usage."""
        if reason not in _FUTILE:
            # Also `no_usage` is an answer: the server has the response. What says nothing of the
            # server, as a shutdown does, just ends a trial.
            known = reason in (None, MissingReason.NO_USAGE)
            return self._close() if known else self._end_trial()
        if reason is MissingReason.NOT_FOUND and self._has_answered:
            return self._end_trial()
        if self._open_until is None:
            self._failures += 1
            if self._failures < self._policy.failures:
                return Change.NONE
            self._open_until = now + self._pause_s
            return Change.OPENED
        if self._trying:
            self._trying = False
            self._pause_s = min(self._pause_s * 2, self._policy.longest_pause_s)
            self._open_until = now + self._pause_s
        return Change.NONE

    def _close(self) -> Change:
        was_open = self.is_open
        self.__init__(self._policy)  # type: ignore[misc]  # begins anew
        self._has_answered = True
        return Change.CLOSED if was_open else Change.NONE

    def _end_trial(self) -> Change:
        self._trying = False
        return Change.NONE
