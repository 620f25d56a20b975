"""How a response is looked up after its stream: when to ask, when to ask again, when to stop."""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from .._facts.response import Response
from .._facts.usage import MissingReason
from .job import LookupResult


class Failure(Enum):
    """Why a request has no answer: the server is slow, it cannot be reached, or we lack what it takes."""

    TIMEOUT = "timeout"
    TRANSPORT = "transport"
    RESOURCES = "resources"


class Answer(NamedTuple):
    """What one request brought: an HTTP status with what could be read of the body, or why there is none."""

    status: int | None = None
    response: Response | None = None
    retry_after_s: float | None = None
    failure: Failure | None = None


class Attempt(NamedTuple):
    """Ask now, and send the `Answer`."""

    timeout_s: float


class Wait(NamedTuple):
    """Do nothing for a while, and send `None`."""

    seconds: float


class DeadlinePassed(Exception):  # noqa: N818  # it is news, not an error
    """Thrown into a flow when its time is up."""


class RetrievalPolicy(NamedTuple):
    """The patience of a look-up, in seconds and tries."""

    attempt_timeout_s: float = 5.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0
    # A response may take a moment to be stored, but most servers that answer 404 store nothing.
    not_found_tries: int = 4
    transport_tries: int = 4


RetrievalFlow: TypeAlias = Generator["Attempt | Wait", "Answer | None", LookupResult]

_UNREACHABLE: Final = frozenset({Failure.TRANSPORT, Failure.RESOURCES})
_UNAUTHORIZED: Final = frozenset({401, 403})
_BUSY: Final = frozenset({408, 409, 425, 429})
_NOT_IMPLEMENTED: Final = 501


def retrieval_flow(response_id: str, policy: RetrievalPolicy) -> RetrievalFlow:
    """Ask for one response until it is terminal, will never be had, or `DeadlinePassed` is thrown in."""
    not_found = unreachable = 0
    wait_s = policy.first_wait_s
    seen: Response | None = None
    reason = MissingReason.TIMEOUT  # what is said if the time is up now
    try:
        while True:
            answer = yield Attempt(policy.attempt_timeout_s)
            assert answer is not None, "an attempt is answered"  # noqa: S101  # the driver's contract
            reason = MissingReason.TIMEOUT
            pause_s = wait_s
            if answer.failure in _UNREACHABLE:
                reason = MissingReason.TRANSPORT_ERROR
                unreachable += 1
                if unreachable >= policy.transport_tries:
                    break
            elif answer.status == 200:
                response = answer.response
                if response is None or response.id != response_id:
                    reason = MissingReason.UNSUPPORTED
                    break
                seen = response
                if response.is_terminal or response.status is None:
                    if response.usage is not None:
                        return LookupResult(response.usage, None, seen)
                    reason = MissingReason.NO_USAGE
                    # A cancelled response may be charged later: its usage can still appear.
                    if response.status != "cancelled":
                        break
            elif answer.status == 404:
                reason = MissingReason.NOT_FOUND
                not_found += 1
                if not_found >= policy.not_found_tries:
                    break
                pause_s *= 2
            elif answer.status in _UNAUTHORIZED:
                reason = MissingReason.UNAUTHORIZED
                break
            elif answer.failure is None and not _may_recover(answer.status or 0):
                reason = MissingReason.UNSUPPORTED
                break
            yield Wait(max(pause_s, answer.retry_after_s or 0.0))
            wait_s = min(wait_s * 2, policy.longest_wait_s)
    except DeadlinePassed:
        pass
    return LookupResult(None, reason, seen)


def _may_recover(status: int) -> bool:
    return status in _BUSY or (status >= 500 and status != _NOT_IMPLEMENTED)
