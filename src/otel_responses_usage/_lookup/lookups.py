"""Runs look-ups: sends the requests, applies retries and the circuit breaker. Loaded with the first job."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Protocol

from opentelemetry.instrumentation.utils import suppress_instrumentation

from .. import _fault
from .._facts.usage import MissingReason
from .circuit import Change, Circuit, CircuitPolicy, Verdict, verdict_of
from .job import Endpoint, Job, LookupRequest, LookupResult
from .retrieval import (
    Answer,
    Attempt,
    DeadlinePassed,
    Failure,
    RetrievalPolicy,
    Wait,
    count_flow,
    retrieval_flow,
)

_SHORTEST_TIMEOUT_S: Final = 0.01
# How much longer than its timeout a request takes at most in a process that runs.
_MOST_DELAY_S: Final = 1.0
# Where responses never end, a look-up sends one request. It is sent so long before the end of its time limit,
# or, if that is less, this share of the time limit before its end. So a response that takes long is found.
_LAST_REQUEST_S: Final = 5.0
_LAST_REQUEST_SHARE: Final = 0.1


class Retriever(Protocol):
    """Sends the requests. Any thread may call any method at any time."""

    def get(self, target: Any, timeout_s: float, content: bytes = b"") -> Answer:
        """Send one request: a POST if there is content. Errors are part of the answer."""
        ...

    def close(self) -> None:
        """Close the connections that are not in use."""
        ...

    def interrupt(self) -> None:
        """End the requests that are under way."""
        ...


class Put(Protocol):
    """Has a callback run on a thread of the look-ups; see `Workers.put`."""

    def __call__(self, callback: Callable[[], float | None], after_s: float = 0.0) -> None: ...


class LookUps:
    """Runs jobs on the threads of the look-ups: a callback for each request.

    Attributes:
        retriever: Sends the requests.
        policy: The time limits and pauses of a look-up.
        circuits: What is known of the endpoints.
        put: Has a callback run on a thread of the look-ups.
        finish: Takes the result of a job.

    """

    def __init__(
        self,
        retriever: Retriever,
        put: Put,
        finish: Callable[[Job, LookupResult], object],
        on_circuit: Callable[[Endpoint, int], None],
    ) -> None:
        self.retriever = retriever
        self.policy = RetrievalPolicy()
        self.put = put
        self.finish = finish
        self.circuits = Circuits(on_circuit, put)

    def start(self, job: Job) -> None:
        """Begin a job, and send its first request unless it has to wait for others."""
        request = job.listener.on_begin(job)
        if isinstance(request, MissingReason):
            self.finish(job, LookupResult(None, request))
            return
        lookup = LookUp(self, job, request)
        wait_s = lookup.advance()
        if wait_s is not None:
            self.put(lookup.advance, wait_s)


class LookUp:
    """One look-up under way. One thread at a time advances it.

    Attributes:
        has_seen: The server has returned the response. The look-up may ask again even if the circuit opens.
        has_slot: It is one of the first look-ups at an endpoint of which nothing is known.
        is_trial: It is the trial of an open circuit.

    """

    __slots__ = (
        "_asks_late",
        "_attempt",
        "_flow",
        "_is_judged",
        "_job",
        "_left_s",
        "_lookups",
        "_request",
        "has_seen",
        "has_slot",
        "is_trial",
    )

    def __init__(self, lookups: LookUps, job: Job, request: LookupRequest) -> None:
        self._lookups = lookups
        self._job = job
        self._request = request
        # Only requests and the pauses between them count. Other delays are not caused by the server.
        self._left_s = job.timeout_s
        policy = lookups.policy
        self._flow = (
            count_flow(policy)
            if job.counts_input
            else retrieval_flow(job.response_id, policy, asks_once=job.asks_once)
        )
        self._attempt: Attempt | None = None  # the next request, not sent yet
        self._asks_late: bool | None = None  # decided before the first request
        self._is_judged = False  # whether the circuit breaker learns of the result
        self.has_seen = False
        self.has_slot = False
        self.is_trial = False

    def advance(self) -> float | None:
        """Send the next request.

        Returns:
            After how many seconds to advance again. `None` if there is a result, or if the look-up waits
            for others at its endpoint: `Circuits` has it advanced then.

        """
        try:
            if self._job.is_open:
                return self._advance()
            self._end(None)  # the application was shown the usage itself, or the process ends
        except StopIteration as end:
            self._end(end.value)
        except Exception:
            _fault.report("looking a response up")
            self._end(LookupResult(None, MissingReason.TRANSPORT_ERROR))
        except BaseException:  # the thread ends: gevent kills it, or Ctrl-C arrives in it
            self._end(LookupResult(None, MissingReason.SHUTDOWN))
            raise
        return None

    def _advance(self) -> float | None:
        circuits, endpoint = self._lookups.circuits, self._request.endpoint
        if self._asks_late is None:
            # Of a response that has ended, one request tells all there is: no need to send it late.
            self._asks_late = not self._job.asks_once and circuits.never_ends(endpoint)
            if self._asks_late:
                return self._spend(self._left_s - min(_LAST_REQUEST_S, self._left_s * _LAST_REQUEST_SHARE))
        attempt = self._attempt = self._attempt or self._next_attempt()
        admission = circuits.admit(endpoint, self)
        if admission is Admission.QUEUED:
            return None
        if admission is Admission.REFUSED:
            self._end(LookupResult(None, MissingReason.CIRCUIT_OPEN))
            return None
        if admission is not Admission.ADMITTED:
            return self._wait_for_connection(admission)
        self._attempt = None
        pause = self._flow.send(self._ask(attempt))
        assert isinstance(pause, Wait)  # noqa: S101  # after each answer
        if pause.time_limit_s is not None:
            self._left_s = min(self._left_s, pause.time_limit_s)
        if self._asks_late and self.has_seen:
            self._left_s = 0.0
        return self._spend(pause.seconds)

    def _next_attempt(self) -> Attempt:
        is_new = self._job.attempts == 0
        if not is_new and self._left_s <= 0:
            step = self._flow.throw(DeadlinePassed())
        else:
            step = self._flow.send(None)
        assert isinstance(step, Attempt)  # noqa: S101  # at first, and after each pause
        return step

    def _wait_for_connection(self, seconds: float) -> float | None:
        """Wait because the server refuses connections. If the time is up, the look-up ends."""
        if self._left_s <= 0:
            self._is_judged = True
            self._end(LookupResult(None, MissingReason.TRANSPORT_ERROR))
            return None
        return self._spend(seconds)

    def _spend(self, seconds: float) -> float:
        """Return how long to wait: the given time, or what is left of the time limit."""
        wait_s = max(0.0, min(seconds, self._left_s))
        self._left_s -= seconds
        return wait_s

    def _ask(self, attempt: Attempt) -> Answer:
        job, circuits, endpoint = self._job, self._lookups.circuits, self._request.endpoint
        began = time.monotonic()
        job.attempts += 1
        timeout_s = max(_SHORTEST_TIMEOUT_S, min(attempt.timeout_s, self._left_s))
        self._is_judged = True
        with suppress_instrumentation():
            ask, content = self._lookups.retriever.get, self._request.content
            target = self._request.target
            answer = ask(target, timeout_s, content) if content else ask(target, timeout_s)
        took_s = time.monotonic() - began
        if took_s > timeout_s + _MOST_DELAY_S:
            # For the rest of the time the process was frozen or busy. With an answer, perhaps for all of it.
            took_s = timeout_s if answer.failure else 0.0
        self._left_s -= took_s
        if job.story is not None:
            status = answer.response.status if answer.response is not None else None
            facts = {"http": answer.status, "failure": answer.failure, "status": status}
            job.story.tell("asked", response=job.response_id, attempt=job.attempts, **facts)
        if answer.failure is Failure.RESOURCES:
            self._is_judged = False
        else:
            self._is_judged = not job.asks_once
            circuits.learn_connection(endpoint, is_refused=answer.failure is Failure.UNREACHABLE)
        if answer.status == 200 and answer.response is not None:
            self.has_seen = True
            circuits.learn(endpoint, self, Verdict.ALIVE)
        return answer

    def _end(self, result: LookupResult | None) -> None:
        job, verdict = self._job, Verdict.NOTHING
        if result is not None and job.is_open and self._is_judged:
            verdict = verdict_of(result)
        self._lookups.circuits.leave(self._request.endpoint, self, verdict)
        if result is not None:
            self._lookups.finish(job, result)


class Admission(Enum):
    """Whether a look-up may send a request now."""

    ADMITTED = "admitted"
    QUEUED = "queued"
    REFUSED = "refused"


class Circuits:
    """The circuit breakers of the endpoints asked lately. Any thread may call any method.

    At an endpoint of which nothing is known, only so many look-ups run as open its circuit. The others wait.
    So a server without stored responses gets few requests, however many streams end at once.
    """

    _MOST: Final = 256

    def __init__(self, on_change: Callable[[Endpoint, int], None], put: Put) -> None:
        self._on_change = on_change
        self._put = put
        self._policy = CircuitPolicy()
        self._lock = threading.Lock()
        self._entries: dict[Endpoint, _Entry] = {}

    def admit(self, endpoint: Endpoint, lookup: LookUp) -> Admission | float:
        """Say whether a look-up may send a request now.

        Returns:
            The admission, or after how many seconds to try again because the server refuses connections. A
            queued look-up is advanced when its turn has come.

        """
        with self._lock:
            entry = self._entry(endpoint)
            circuit = entry.circuit
            if lookup.has_seen or lookup.is_trial:
                pass
            elif circuit.is_open:
                lookup.is_trial = circuit.begin_trial(time.monotonic())
                if not lookup.is_trial:
                    return Admission.REFUSED
            elif circuit.is_unknown and not lookup.has_slot:
                if not entry.free_slots:
                    entry.queued.append(lookup)
                    return Admission.QUEUED
                entry.free_slots -= 1
                lookup.has_slot = True
            return circuit.reconnect_wait_s(time.monotonic()) or Admission.ADMITTED

    def never_ends(self, endpoint: Endpoint) -> bool:
        """Whether the last responses of an endpoint all were still in progress when their time was up."""
        with self._lock:
            entry = self._entries.get(endpoint)
            return entry is not None and entry.circuit.never_ends

    def learn_connection(self, endpoint: Endpoint, *, is_refused: bool) -> None:
        """Note whether a request got a connection to the server."""
        with self._lock:
            self._entry(endpoint).circuit.learn_connection(time.monotonic(), is_refused=is_refused)

    def learn(self, endpoint: Endpoint, lookup: LookUp, verdict: Verdict) -> None:
        """Take the verdict of a look-up that goes on."""
        with self._lock:
            self._learn(endpoint, lookup, verdict)

    def leave(self, endpoint: Endpoint, lookup: LookUp, verdict: Verdict) -> None:
        """Take the verdict of a look-up that has ended.

        A failed look-up keeps its slot. The next one may only begin if nothing was learned.
        """
        with self._lock:
            entry = self._learn(endpoint, lookup, verdict)
            if lookup.has_slot and verdict is Verdict.NOTHING:
                entry.free_slots += 1
                self._advance(entry, 1)

    def clear(self) -> None:
        """Forget every endpoint."""
        with self._lock:
            while self._entries:
                self._forget(next(iter(self._entries)))

    def _learn(self, endpoint: Endpoint, lookup: LookUp, verdict: Verdict) -> _Entry:
        entry = self._entry(endpoint)
        change = entry.circuit.learn(verdict, time.monotonic(), is_trial=lookup.is_trial)
        if change is not Change.NONE:
            self._on_change(endpoint, change.value)
        if not entry.circuit.is_unknown:
            self._advance(entry, len(entry.queued))
        return entry

    def _advance(self, entry: _Entry, number: int) -> None:
        for _ in range(min(number, len(entry.queued))):
            self._put(entry.queued.popleft().advance)

    def _entry(self, endpoint: Endpoint) -> _Entry:
        entry = self._entries.pop(endpoint, None) or _Entry(Circuit(self._policy), self._policy.failures)
        self._entries[endpoint] = entry  # last used, last in the order
        if len(self._entries) > self._MOST:
            self._forget(next(iter(self._entries)))
        return entry

    def _forget(self, endpoint: Endpoint) -> None:
        entry = self._entries.pop(endpoint)
        self._advance(entry, len(entry.queued))
        if entry.circuit.is_open:
            self._on_change(endpoint, Change.CLOSED.value)


class _Entry:
    """The circuit breaker of one endpoint, and the look-ups that wait until something is known of it."""

    __slots__ = ("circuit", "free_slots", "queued")

    def __init__(self, circuit: Circuit, free_slots: int) -> None:
        self.circuit = circuit
        self.free_slots = free_slots
        self.queued: deque[LookUp] = deque()
