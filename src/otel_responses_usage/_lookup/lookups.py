"""How jobs are done: whom to ask, when, and whom no more. Loaded with the first of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from .. import _fault
from .._facts.usage import MissingReason
from .circuit import Change, Circuit, CircuitPolicy, Verdict, verdict_of
from .job import Endpoint, Job, LookupRequest, LookupResult, LookupTarget
from .loop import let_by
from .retrieval import Answer, Attempt, DeadlinePassed, RetrievalPolicy, Trouble, retrieval_flow


class Retriever(Protocol):
    """Makes the requests; lives on the worker's event loop."""

    async def get(self, target: Any, timeout_s: float) -> Answer:
        """Ask once for a response. Never raises for what a server or a network can do."""
        ...

    async def aclose(self) -> None:
        """Close every connection; it may be asked again."""
        ...


class LookUps:
    """Does jobs, each in a task of its own, on the worker's event loop."""

    def __init__(
        self, max_concurrency: int, retriever: Retriever, on_circuit: Callable[[Endpoint, int], None]
    ) -> None:
        self._slots = asyncio.Semaphore(max_concurrency)
        self._retriever = retriever
        self._policy = RetrievalPolicy()
        self._circuits = Circuits(on_circuit)
        self._asking: set[Job] = set()

    def is_asking(self, job: Job) -> bool:
        """Whether a request is under way."""
        return job in self._asking

    async def aclose(self) -> None:
        """Close every connection; jobs may come again."""
        await self._retriever.aclose()

    def forget_places(self) -> None:
        """Begin anew with every place."""
        self._circuits.clear()

    async def do(self, job: Job) -> LookupResult:
        """Drive the flow of one job, unless the circuit of its place is open."""
        aim = job.listener.on_begin(job)
        await let_by()
        if isinstance(aim, MissingReason):
            return LookupResult(None, aim)
        trial = _Trial()
        result: LookupResult | None = None
        probation: _Probation | None = None
        try:
            left_s = max(0.0, job.deadline - time.monotonic())
            probation = await self._circuits.enter(aim.endpoint, left_s)
            result = await self._drive(job, aim, trial)
        finally:
            judged = job.is_open and result is not None and job.attempts > 0
            verdict = verdict_of(result) if judged and result is not None else Verdict.NOTHING
            self._circuits.learn(aim.endpoint, verdict, is_trial=trial.is_held)
            # One that has failed keeps its turn: the next may begin only where nothing was learned.
            if probation is not None and verdict is Verdict.NOTHING:
                probation.leave()
        return result

    async def _drive(self, job: Job, aim: LookupRequest, trial: _Trial) -> LookupResult:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        flow = retrieval_flow(job.response_id, self._policy)
        left_s = max(0.0, job.deadline - time.monotonic())
        at_deadline = asyncio.get_running_loop().call_later(left_s, task.cancel)
        try:
            step = next(flow)
            while True:
                # `wait_for` may swallow the cancellation that comes together with its result.
                if time.monotonic() >= job.deadline or not job.is_open:
                    raise asyncio.CancelledError  # noqa: TRY301
                if isinstance(step, Attempt):
                    async with self._slots:
                        if not trial.admits(self._circuits.of(aim.endpoint)):
                            return LookupResult(None, MissingReason.CIRCUIT_OPEN)
                        job.attempts += 1
                        self._asking.add(job)
                        try:
                            answer = await _attempt(self._retriever, aim.target, step.timeout_s)
                        finally:
                            self._asking.discard(job)
                        seen = answer.response if answer.status == 200 else None
                        if seen is not None and seen.id == job.response_id:
                            trial.has_seen = True
                            self._circuits.learn(aim.endpoint, Verdict.ALIVE, is_trial=trial.is_held)
                        step = flow.send(answer)
                else:
                    await asyncio.sleep(step.seconds)
                    step = flow.send(None)
        except asyncio.CancelledError:
            try:
                flow.throw(DeadlinePassed())
            except StopIteration as end:
                return _result(end)
            raise
        except StopIteration as end:
            return _result(end)
        finally:
            at_deadline.cancel()


class Circuits:
    """The circuits of the places asked lately.

    Of a place that nothing is known of, only as many look-ups are under way as it takes to know: the
    first streams that a server without stored responses loses cost a handful of requests, however many
    are lost at once.
    """

    _MOST: Final = 256

    def __init__(self, on_change: Callable[[Endpoint, int], None]) -> None:
        self._on_change = on_change
        self._policy = CircuitPolicy()
        self._circuits: dict[Endpoint, Circuit] = {}
        self._probations: dict[Endpoint, _Probation] = {}

    def of(self, place: Endpoint) -> Circuit:
        """Return the circuit of a place."""
        circuit = self._circuits.pop(place, None) or Circuit(self._policy)
        self._circuits[place] = circuit  # last used, last in the order
        if len(self._circuits) > self._MOST:
            oldest, forgotten = next(iter(self._circuits.items()))
            del self._circuits[oldest]
            self._end_probation(oldest)
            if forgotten.is_open:
                self._on_change(oldest, Change.CLOSED.value)
        return circuit

    def learn(self, place: Endpoint, verdict: Verdict, *, is_trial: bool) -> None:
        """Take what a look-up says of a place."""
        circuit = self.of(place)
        change = circuit.learn(verdict, time.monotonic(), is_trial=is_trial)
        if change is not Change.NONE:
            self._on_change(place, change.value)
        if not circuit.on_probation:
            self._end_probation(place)

    async def enter(self, place: Endpoint, timeout_s: float) -> _Probation | None:
        """Wait for one's turn at a place that is on probation; `None` where it is not, or no turn came."""
        deadline = time.monotonic() + timeout_s
        while self.of(place).on_probation:
            probation = self._probations.setdefault(place, _Probation(self._policy.failures))
            if await probation.enter(max(0.0, deadline - time.monotonic())):
                return probation
            if not probation.over.is_set():
                break
        return None

    def _end_probation(self, place: Endpoint) -> None:
        if place in self._probations:
            self._probations.pop(place).over.set()

    def clear(self) -> None:
        """Forget every place. Two threads may do so at once, where one has waited for the other in vain."""
        circuits, self._circuits = self._circuits, {}
        for place, circuit in circuits.items():
            if circuit.is_open:
                self._on_change(place, Change.CLOSED.value)


class _Probation:
    """Lets a few in until it is over, and then everybody."""

    def __init__(self, places: int) -> None:
        self.over = asyncio.Event()
        self._free = asyncio.Semaphore(places)

    async def enter(self, timeout_s: float) -> bool:
        turn = asyncio.ensure_future(self._free.acquire())
        over = asyncio.ensure_future(self.over.wait())
        has_turn = False
        try:
            await asyncio.wait((turn, over), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            has_turn = turn.done() and not self.over.is_set()
            return has_turn
        finally:
            if not has_turn and not turn.cancel():
                self.leave()  # the turn came too late
            over.cancel()

    def leave(self) -> None:
        self._free.release()


class _Trial:
    """Whether one look-up may ask: it may for good once it has seen its response."""

    def __init__(self) -> None:
        self.is_held = False
        self.has_seen = False

    def admits(self, circuit: Circuit) -> bool:
        if self.has_seen or self.is_held or not circuit.is_open:
            return True
        self.is_held = circuit.begin_trial(time.monotonic())
        return self.is_held


async def _attempt(retriever: Retriever, target: LookupTarget, timeout_s: float) -> Answer:
    try:
        return await asyncio.wait_for(_ask(retriever, target, timeout_s), timeout_s)
    except asyncio.TimeoutError:
        return Answer(trouble=Trouble.TIMEOUT)


async def _ask(retriever: Retriever, target: LookupTarget, timeout_s: float) -> Answer:
    try:
        return await retriever.get(target, timeout_s)
    except asyncio.CancelledError:
        raise
    except BaseException:  # some of it would end the loop, and every other look-up with it
        _fault.report("asking for a response")
        return Answer(trouble=Trouble.TRANSPORT)


def _result(end: StopIteration) -> LookupResult:
    result: LookupResult = end.value
    return result
