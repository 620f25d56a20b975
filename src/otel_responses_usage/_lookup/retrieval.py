"""When to ask for a response after its stream, when to ask again, when to stop. No clock, no network."""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from .._facts.response import Response
from .._facts.usage import MissingReason
from .job import LookupResult


class Failure(Enum):
    """Why a request got no answer.

    Attributes:
        TIMEOUT: The server did not answer in time.
        UNREACHABLE: There is no connection: it was refused, or the name or the route is unknown.
        TRANSPORT: The connection broke, or what arrived is not HTTP.
        RESOURCES: This process has no file descriptor, port or memory left.

    """

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    TRANSPORT = "transport"
    RESOURCES = "resources"


class Answer(NamedTuple):
    """The result of one request: an HTTP status and the facts of the body, or a failure.

    Attributes:
        status: The HTTP status.
        response: The response in the body, `None` if the body is something else.
        retry_after_s: The seconds that the server asks the client to wait.
        failure: Why there is no HTTP status.
        input_tokens: The count of input tokens in the body, if that was asked for.

    """

    status: int | None = None
    response: Response | None = None
    retry_after_s: float | None = None
    failure: Failure | None = None
    input_tokens: int | None = None


class Attempt(NamedTuple):
    """A step of a flow: send a request now. The flow expects the `Answer`."""

    timeout_s: float


class Wait(NamedTuple):
    """A step of a flow: wait. The flow expects `None`.

    Attributes:
        seconds: How long to wait.
        time_limit_s: If set, the look-up ends so many seconds from now, or earlier if its time is up earlier.

    """

    seconds: float
    time_limit_s: float | None = None


class DeadlinePassed(Exception):  # noqa: N818  # not an error
    """Thrown into a flow when its time is up."""


class RetrievalPolicy(NamedTuple):
    """The time limits, pauses and numbers of tries of a look-up. Times are in seconds."""

    attempt_timeout_s: float = 5.0
    # Each pause is twice as long as the one before, up to the longest.
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0
    # A server that restarts is away for some seconds only, and a refused connection costs little.
    longest_unreachable_wait_s: float = 1.0
    # Used where a new answer is unlikely: after `cancelled`, and after a 500.
    longest_unlikely_wait_s: float = 8.0
    # A response may take a moment to be stored. But most servers that answer 404 store nothing.
    not_found_tries: int = 4
    transport_tries: int = 4
    # A cancelled response without usage may still be charged.
    cancelled_timeout_s: float = 30.0


RetrievalFlow: TypeAlias = Generator["Attempt | Wait", "Answer | None", LookupResult]

_UNAUTHORIZED: Final = frozenset({401, 403})
_BUSY: Final = frozenset({408, 409, 425, 429})
_INTERNAL_ERROR: Final = 500
_NOT_IMPLEMENTED: Final = 501


def retrieval_flow(response_id: str, policy: RetrievalPolicy, *, asks_once: bool = False) -> RetrievalFlow:
    """Return a generator that says when to ask for a response, until the result is known.

    The caller does each step that is yielded, and throws `DeadlinePassed` when the time is up. The generator
    returns the result. An answer with status 200 is the response that was asked for, whatever id it shows:
    some proxies encrypt ids anew in each answer. With `asks_once` the first answer is the last.
    """
    not_found = broken = 0
    wait_s = policy.first_wait_s
    time_limit_s: float | None = None
    seen: Response | None = None
    reason = MissingReason.TIMEOUT  # the result, if the time is up now
    try:
        while True:
            answer = yield Attempt(policy.attempt_timeout_s)
            assert answer is not None, "an attempt has an answer"  # noqa: S101  # the caller's contract
            reason = MissingReason.TIMEOUT
            longest_wait_s, stretch = policy.longest_wait_s, 1
            if answer.failure is Failure.UNREACHABLE:
                reason = MissingReason.TRANSPORT_ERROR
                longest_wait_s = policy.longest_unreachable_wait_s
            elif answer.failure in (Failure.TRANSPORT, Failure.RESOURCES):
                reason = MissingReason.TRANSPORT_ERROR
                broken += 1
                if broken >= policy.transport_tries:
                    break
            elif answer.status == 200:
                if answer.response is None:
                    reason = MissingReason.UNSUPPORTED
                    break
                seen = answer.response._replace(id=response_id)
                if seen.has_ended or seen.status is None:
                    if seen.usage is not None:
                        return LookupResult(seen.usage, None, seen)
                    reason = MissingReason.NO_USAGE
                    if seen.status != "cancelled":
                        break
                    longest_wait_s = policy.longest_unlikely_wait_s
                    time_limit_s = time_limit_s or policy.cancelled_timeout_s
                else:
                    seen = seen.without_usage()
            elif answer.status == 404:
                reason = MissingReason.NOT_FOUND
                not_found += 1
                if not_found >= policy.not_found_tries:
                    break
                stretch = 2
            elif answer.status in _UNAUTHORIZED:
                reason = MissingReason.UNAUTHORIZED
                break
            elif answer.failure is None and not _may_recover(answer.status or 0):
                reason = MissingReason.UNSUPPORTED
                break
            elif answer.status == _INTERNAL_ERROR:
                longest_wait_s = policy.longest_unlikely_wait_s
            if asks_once:
                break
            wait_s = min(wait_s, longest_wait_s)
            yield Wait(max(wait_s * stretch, answer.retry_after_s or 0.0), time_limit_s)
            wait_s *= 2
    except DeadlinePassed:
        pass
    return LookupResult(None, reason, seen)


def count_flow(policy: RetrievalPolicy) -> RetrievalFlow:
    """Return a generator that asks once for a count of input tokens; see `retrieval_flow`."""
    try:
        answer = yield Attempt(policy.attempt_timeout_s)
    except DeadlinePassed:
        return LookupResult(None, MissingReason.TIMEOUT)
    assert answer is not None, "an attempt has an answer"  # noqa: S101  # the caller's contract
    if answer.status == 200 and answer.input_tokens is not None:
        return LookupResult(input_tokens=answer.input_tokens)
    if answer.failure is None and not _may_recover(answer.status or 0):
        return LookupResult(None, MissingReason.UNSUPPORTED)
    return LookupResult(None, MissingReason.TRANSPORT_ERROR)


def _may_recover(status: int) -> bool:
    return status in _BUSY or (status >= 500 and status != _NOT_IMPLEMENTED)
