"""The thread that makes the look-ups, with its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from opentelemetry.instrumentation.utils import suppress_instrumentation

from . import _fault
from ._circuit import Change, Circuit, CircuitPolicy, Verdict, verdict_of
from ._loop import Loop, Pace, let_by
from ._request import Server
from ._retrieval import Answer, Attempt, DeadlinePassed, RetrievalPolicy, Retrieved, Trouble, retrieval_flow
from ._usage import MissingReason, UsageSource

THREAD_NAME: Final = "otel-responses-usage"

# An idle worker keeps its connections for as long.
_REST_AFTER_S: Final = 5.0
# How long it is before what has come is seen: the call that ends is still at it, and to wake the worker for
# each would take the application a system call, in which it loses the interpreter to the worker.
_TICK_S: Final = 0.01
# What a stopping worker may take for closing its sockets.
STOP_GRACE_S: Final = 1.0


class Target(Protocol):
    """How to ask for a response: the retriever's business, but for whose response it is."""

    @property
    def tenant(self) -> int:
        """A number that stands for the credentials, and tells nothing of them."""
        ...


class Retriever(Protocol):
    """Makes the requests; lives on the worker's event loop."""

    async def get(self, target: Any, timeout_s: float) -> Answer:
        """Ask once for a response. Never raises for what a server or a network can do."""
        ...

    async def aclose(self) -> None:
        """Close every connection; it may be asked again."""
        ...


class Place(NamedTuple):
    """Where look-ups go that share their luck.

    A server may keep background responses and no others, and may know one key and not another.
    """

    address: str
    port: int | None
    background: bool
    tenant: int


class Aim(NamedTuple):
    """Where a response is asked for, and how."""

    place: Place
    target: Target


class Asker(Protocol):
    """Who wants to know of a response."""

    def on_begin(self, job: Job) -> Aim | MissingReason:
        """Say where the response is asked for and how, or why it cannot be. Called by the worker, if at all.

        Working it out when a call ends would be on the application's time.
        """
        ...

    def on_result(self, job: Job, result: Retrieved, source: UsageSource) -> None:
        """Take the result, and where it was read. Called once, on any thread."""
        ...


class Job:
    """A response to look up.

    Attributes:
        server: The server that the application's call went to.
        response_id: The response asked for.
        deadline: When to give up, by `time.monotonic`.
        asker: Who is told of the result.
        attempts: Requests made so far.
        held: The asker's own note: one element while its span is counted as held.

    """

    __slots__ = ("_open", "asker", "attempts", "deadline", "held", "response_id", "server")

    def __init__(self, server: Server, response_id: str, deadline: float, asker: Asker) -> None:
        self.server = server
        self.response_id = response_id
        self.deadline = deadline
        self.asker = asker
        self.attempts = 0
        self.held: list[None] = []
        self._open: list[None] = [None]

    @property
    def is_open(self) -> bool:
        """Whether nobody has settled the job yet."""
        return bool(self._open)

    def finish(self, result: Retrieved, source: UsageSource) -> None:
        """Settle the job, unless somebody else has."""
        try:
            self._open.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return
        try:
            self.asker.on_result(self, result, source)
        except Exception:
            _fault.report("settling a look-up")


class Circuits:
    """The circuits of the places asked lately. Used by the worker alone.

    Of a place that nothing is known of, only as many look-ups are under way as it takes to know: the
    first streams that a server without stored responses loses cost a handful of requests, however many
    are lost at once.
    """

    _MOST: Final = 256

    def __init__(self, on_change: Callable[[Place, int], None]) -> None:
        self._on_change = on_change
        self._policy = CircuitPolicy()
        self._circuits: dict[Place, Circuit] = {}
        self._probations: dict[Place, _Probation] = {}

    def enter_loop(self) -> None:
        """Begin on another event loop: who waits at a place waits on the one before."""
        self._probations = {}

    def of(self, place: Place) -> Circuit:
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

    def learn(self, place: Place, verdict: Verdict, *, is_trial: bool) -> None:
        """Take what a look-up says of a place."""
        circuit = self.of(place)
        change = circuit.learn(verdict, time.monotonic(), is_trial=is_trial)
        if change is not Change.NONE:
            self._on_change(place, change.value)
        if not circuit.on_probation:
            self._end_probation(place)

    async def enter(self, place: Place, timeout_s: float) -> _Probation | None:
        """Wait for one's turn at a place that is on probation; `None` where it is not, or no turn came."""
        deadline = time.monotonic() + timeout_s
        while self.of(place).on_probation:
            probation = self._probations.setdefault(place, _Probation(self._policy.failures))
            if await probation.enter(max(0.0, deadline - time.monotonic())):
                return probation
            if not probation.over.is_set():
                break
        return None

    def _end_probation(self, place: Place) -> None:
        if place in self._probations:
            self._probations.pop(place).over.set()

    def clear(self) -> None:
        """Forget every place."""
        for place, circuit in self._circuits.items():
            if circuit.is_open:
                self._on_change(place, Change.CLOSED.value)
        self._circuits.clear()


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


class Worker:
    """The thread with its event loop. What has no underscore may be called from any thread."""

    def __init__(
        self,
        max_concurrency: int,
        make_retriever: Callable[[], Retriever],
        circuits: Circuits,
        run_errand: Callable[[], bool],
        forget: Callable[[Job], None],
    ) -> None:
        self.settled = threading.Event()
        self.has_no_thread = False
        self.has_ended = False
        self._slots = asyncio.Semaphore(max_concurrency)
        self._policy = RetrievalPolicy()
        self._make_retriever = make_retriever
        self._circuits = circuits
        self._run_errand = run_errand
        self._forget = forget
        self._inbox: deque[Job] = deque()
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._asking: set[Job] = set()  # those with a request under way
        self._pace = Pace()
        self._loop = Loop(self._pace)
        self._wake = asyncio.Event()
        self._is_woken = False  # or will be in a moment
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    def start(self) -> None:
        """Start the thread, or try it once more with the next job."""
        with contextlib.suppress(RuntimeError):
            # The process is out of threads, or the interpreter is shutting down, and since Python 3.12 it
            # starts no thread then. Whoever waits for the jobs does them.
            self._thread.start()
        self.has_no_thread = not self._thread.is_alive()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def takes_jobs(self) -> bool:
        return self._thread.is_alive() and not self.has_ended

    def serve_here(self, timeout_s: float) -> None:
        """Do in the calling thread what there is to do, for so long at most."""
        with suppress_instrumentation(), contextlib.suppress(asyncio.TimeoutError):
            self._loop.run_until_complete(asyncio.wait_for(self._serve(until_idle=True), timeout_s))

    def put(self, job: Job) -> None:
        self._inbox.append(job)
        if self.has_ended:
            self._give_up()
        else:
            self.wake()

    def note_call(self) -> None:
        self._pace.note_call()

    def in_burst(self) -> bool:
        """Whether many calls are ending."""
        return self._pace.in_burst

    def wake(self) -> None:
        self.note_call()
        if self._is_woken:
            return
        self._is_woken = True
        try:
            self._call(self._wake.set)
        except BaseException:  # of a signal handler
            self._is_woken = False
            self._call(self._wake.set)
            raise

    def cancel(self, job: Job) -> None:
        self._call(self._cancel, job)

    def call_after(self, seconds: float, function: Callable[[], object]) -> None:
        self._call(self._loop.call_later, seconds, function)

    def stop(self, timeout_s: float) -> None:
        self._stopping = True
        self.wake()
        if self.has_no_thread:
            self.has_ended = True
            self._loop.close()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has stopped
            self._loop.call_soon_threadsafe(function, *args)

    def _cancel(self, job: Job) -> None:
        task = self._tasks.get(job)
        # A request that is under way ends by itself: then its connection can be used again. One that is just
        # being opened would even be lost half-open.
        if task is not None and job not in self._asking:
            task.cancel()

    def _run(self) -> None:
        # The tasks inherit this context: their requests make no spans, nor does anybody's wrapper.
        with suppress_instrumentation():
            try:
                self._loop.run_until_complete(self._serve())
            except BaseException:  # also what would end a thread in silence
                _fault.report("looking responses up")
            finally:
                self.has_ended = True  # whatever comes from now on is for another worker
                self._wind_up()
                self._inbox.extend(self._tasks)
                self._give_up()
                while self._run_errand():
                    pass

    def _give_up(self) -> None:
        """Settle what nobody will look up. Also called by who was too late to see that the worker ended."""
        while True:
            try:
                job = self._inbox.popleft()
            except IndexError:
                break
            job.finish(Retrieved(None, MissingReason.SHUTDOWN), UsageSource.RETRIEVAL)
            self._forget(job)
        self.settled.set()

    def _wind_up(self) -> None:
        """Let what a broken loop has left behind end in good order."""
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=STOP_GRACE_S))
            # It also gives connections that have just been closed the turns they need to be gone.
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        except BaseException:
            _fault.report("ending the look-ups")
        self._loop.close()

    async def _serve(self, *, until_idle: bool = False) -> None:
        self._circuits.enter_loop()
        retriever = self._make_retriever()
        is_busy = False
        try:
            while not self._stopping:
                self._is_woken = False  # before the inbox is looked into: what comes later wakes again
                self._wake.clear()
                while self._inbox:
                    is_busy = True
                    self._begin(self._inbox.popleft(), retriever)
                if self._run_errand():
                    is_busy = self._is_woken = True  # it comes round by itself
                    await let_by()
                    continue
                if until_idle and not self._tasks:
                    break
                if not is_busy:
                    if not self._tasks and not await self._woken_within(_REST_AFTER_S):
                        await retriever.aclose()  # it opens its connections again when they are needed
                    await self._wake.wait()
                is_busy = False
                self._is_woken = True
                await asyncio.sleep(_TICK_S)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await retriever.aclose()

    def _begin(self, job: Job, retriever: Retriever) -> None:
        # Not a variable of `_serve`: that would keep the last job, and its credentials, until the next one.
        if job.is_open:
            self._tasks[job] = task = self._loop.create_task(self._settle(job, retriever))
            # Not at the end of the task's own steps: it may be cancelled before the first of them.
            task.add_done_callback(lambda _: self._dismiss(job))

    def _dismiss(self, job: Job) -> None:
        self._tasks.pop(job, None)
        if not self._tasks:
            self._wake.set()

    async def _woken_within(self, timeout_s: float) -> bool:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), timeout_s)
        return self._wake.is_set()

    async def _settle(self, job: Job, retriever: Retriever) -> None:
        result = Retrieved(None, MissingReason.TRANSPORT_ERROR)
        try:
            result = await self._look_up(job, retriever)
            await let_by()
        except Exception:
            _fault.report("looking a response up")
        finally:
            # In this order: whoever waits for the last job waits for its span, too.
            job.finish(result, UsageSource.RETRIEVAL)
            self._forget(job)
            self.settled.set()

    async def _look_up(self, job: Job, retriever: Retriever) -> Retrieved:
        """Drive the flow of one job, unless the circuit of its place is open."""
        aim = job.asker.on_begin(job)
        await let_by()
        if isinstance(aim, MissingReason):
            return Retrieved(None, aim)
        trial = _Trial()
        result: Retrieved | None = None
        probation: _Probation | None = None
        try:
            left_s = max(0.0, job.deadline - time.monotonic())
            probation = await self._circuits.enter(aim.place, left_s)
            result = await self._drive(job, aim, retriever, trial)
        finally:
            # What is given up by a worker that ends says nothing of the server.
            judged = job.is_open and result is not None and job.attempts > 0 and not self.has_ended
            verdict = verdict_of(result) if judged and result is not None else Verdict.NOTHING
            self._circuits.learn(aim.place, verdict, is_trial=trial.is_held)
            # One that has failed keeps its turn: the next may begin only where nothing was learned.
            if probation is not None and verdict is Verdict.NOTHING:
                probation.leave()
        return result

    async def _drive(self, job: Job, aim: Aim, retriever: Retriever, trial: _Trial) -> Retrieved:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        flow = retrieval_flow(job.response_id, self._policy)
        left_s = max(0.0, job.deadline - time.monotonic())
        at_deadline = self._loop.call_later(left_s, task.cancel)
        try:
            step = next(flow)
            while True:
                # `wait_for` may swallow the cancellation that comes together with its result.
                if time.monotonic() >= job.deadline or not job.is_open:
                    raise asyncio.CancelledError  # noqa: TRY301
                if isinstance(step, Attempt):
                    async with self._slots:
                        if not trial.admits(self._circuits.of(aim.place)):
                            return Retrieved(None, MissingReason.CIRCUIT_OPEN)
                        job.attempts += 1
                        self._asking.add(job)
                        try:
                            answer = await _attempt(retriever, aim.target, step.timeout_s)
                        finally:
                            self._asking.discard(job)
                        seen = answer.response if answer.status == 200 else None
                        if seen is not None and seen.id == job.response_id:
                            trial.has_seen = True
                            self._circuits.learn(aim.place, Verdict.ALIVE, is_trial=trial.is_held)
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


async def _attempt(retriever: Retriever, target: Target, timeout_s: float) -> Answer:
    try:
        return await asyncio.wait_for(_ask(retriever, target, timeout_s), timeout_s)
    except asyncio.TimeoutError:
        return Answer(trouble=Trouble.TIMEOUT)


async def _ask(retriever: Retriever, target: Target, timeout_s: float) -> Answer:
    try:
        return await retriever.get(target, timeout_s)
    except asyncio.CancelledError:
        raise
    except BaseException:  # some of it would end the loop, and every other look-up with it
        _fault.report("asking for a response")
        return Answer(trouble=Trouble.TRANSPORT)


def _result(end: StopIteration) -> Retrieved:
    result: Retrieved = end.value
    return result
