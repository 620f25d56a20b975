"""What earlier look-ups say about an endpoint: a circuit breaker, and when it is of use to ask at all."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from .._facts.usage import MissingReason
from .job import LookupResult


class CircuitPolicy(NamedTuple):
    """When a circuit opens, and the pauses in seconds.

    Attributes:
        failures: So many failed look-ups in a row open the circuit.
        first_pause_s: The time until the first trial. Each failed trial doubles it.
        longest_pause_s: The longest time until a trial.
        unfinished: After so many responses in a row that never ended, each later one is asked for once.
        first_reconnect_s: The time until the next connection after one was refused. Each further refused
            connection doubles it.
        longest_reconnect_s: The longest time until the next connection.

    """

    failures: int = 5
    first_pause_s: float = 5.0
    longest_pause_s: float = 60.0
    unfinished: int = 5
    first_reconnect_s: float = 0.1
    longest_reconnect_s: float = 1.0


class Verdict(Enum):
    """What the result of a look-up says about its endpoint.

    Attributes:
        ENDED: The server returned a response that had ended.
        UNFINISHED: The server returned the response, which did not end within the time limit.
        ALIVE: The server returned the response. Nothing more is known yet.
        NOT_FOUND: The server does not have the response.
        FUTILE: The server cannot be used for look-ups.
        NOTHING: Nothing was learned.

    """

    ENDED = "ended"
    UNFINISHED = "unfinished"
    ALIVE = "alive"
    NOT_FOUND = "not_found"
    FUTILE = "futile"
    NOTHING = "nothing"


_WITH_RESPONSE: Final = frozenset({Verdict.ENDED, Verdict.UNFINISHED, Verdict.ALIVE})

# The results of look-ups that were not shown their response.
_VERDICTS: Final = {
    None: Verdict.ENDED,
    MissingReason.NO_USAGE: Verdict.ENDED,
    MissingReason.NOT_FOUND: Verdict.NOT_FOUND,
    MissingReason.TIMEOUT: Verdict.FUTILE,
    MissingReason.TRANSPORT_ERROR: Verdict.FUTILE,
    MissingReason.UNAUTHORIZED: Verdict.FUTILE,
    MissingReason.UNSUPPORTED: Verdict.FUTILE,
}


def verdict_of(result: LookupResult) -> Verdict:
    """Classify the result of a look-up. A result that contains the response counts as success."""
    response = result.response
    if response is None:
        return _VERDICTS.get(result.reason, Verdict.NOTHING)
    if result.usage is not None or response.is_terminal or result.reason is MissingReason.NO_USAGE:
        return Verdict.ENDED
    return Verdict.UNFINISHED if result.reason is MissingReason.TIMEOUT else Verdict.ALIVE


class Change(Enum):
    """What a verdict did to a circuit."""

    OPENED = 1
    CLOSED = -1
    NONE = 0


class Circuit:
    """What is known of one endpoint. It has no clock: its caller gives the time in seconds.

    It opens after some failed look-ups in a row. After a pause one look-up may pass as a trial, and a success
    closes it. A server that has once returned a response does store them: from then on a 404 is no failure.

    It also counts responses that did not end within their time limit, see `never_ends`. And it spaces
    connections to a server that refuses them, see `reconnect_wait_s`.
    """

    __slots__ = (
        "_failures",
        "_has_answered",
        "_open_until",
        "_pause_s",
        "_policy",
        "_reconnect_at",
        "_reconnect_s",
        "_trying",
        "_unfinished",
    )

    def __init__(self, policy: CircuitPolicy) -> None:
        self._policy = policy
        self._has_answered = False
        self._failures = 0
        self._unfinished = 0
        self._open_until: float | None = None
        self._pause_s = policy.first_pause_s
        self._trying = False
        self._reconnect_at: float | None = None
        self._reconnect_s = policy.first_reconnect_s

    @property
    def is_unknown(self) -> bool:
        """Whether the server has neither answered yet nor failed often enough."""
        return not (self._has_answered or self.is_open)

    @property
    def is_open(self) -> bool:
        """Whether look-ups are refused, except for trials."""
        return self._open_until is not None

    @property
    def never_ends(self) -> bool:
        """Whether the last responses all were still in progress when their time was up."""
        return self._unfinished >= self._policy.unfinished

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
        if verdict in _WITH_RESPONSE:
            return self._learn_of_response(verdict)
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

    def _learn_of_response(self, verdict: Verdict) -> Change:
        if verdict is Verdict.ENDED:
            self._unfinished = 0
        elif verdict is Verdict.UNFINISHED:
            self._unfinished += 1
        was_open = self.is_open
        self._has_answered = True
        self._failures = 0
        self._open_until = None
        self._pause_s = self._policy.first_pause_s
        return Change.CLOSED if was_open else Change.NONE

    def learn_connection(self, now: float, *, is_refused: bool) -> None:
        """Note whether a request got a connection to the server."""
        if not is_refused:
            self._reconnect_at = None
            self._reconnect_s = self._policy.first_reconnect_s
        elif self._reconnect_at is None or now >= self._reconnect_at:
            self._space_connections(now)

    def reconnect_wait_s(self, now: float) -> float:
        """Return after how many seconds a look-up may connect. With 0 it may connect now.

        All look-ups at an endpoint that refuses connections share one schedule, so a server that is away is
        tried about once a second, however many look-ups there are. The look-up that gets 0 takes the turn.
        """
        if self._reconnect_at is None:
            return 0.0
        if now < self._reconnect_at:
            return self._reconnect_at - now
        self._space_connections(now)
        return 0.0

    def _space_connections(self, now: float) -> None:
        self._reconnect_at = now + self._reconnect_s
        self._reconnect_s = min(self._reconnect_s * 2, self._policy.longest_reconnect_s)
