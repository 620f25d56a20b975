"""The thread that makes the look-ups, with its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation

from .. import _fault
from .._facts.usage import MissingReason, UsageSource
from .job import Job, LookupResult
from .loop import Loop, Pace, let_by

if TYPE_CHECKING:
    from .lookups import LookUps

THREAD_NAME: Final = "otel-responses-usage"

# An idle worker keeps its connections for as long.
_REST_AFTER_S: Final = 5.0
# How long it is before what has come is seen: the call that ends is still at it, and to wake the worker for
# each would take the application a system call, in which it loses the interpreter to the worker.
_TICK_S: Final = 0.01
# What a stopping worker may take for closing its sockets.
STOP_GRACE_S: Final = 1.0


class Worker:
    """The thread with its event loop. What has no underscore may be called from any thread."""

    def __init__(
        self,
        load_look_ups: Callable[[], LookUps],
        run_errand: Callable[[], bool],
        forget: Callable[[Job], None],
    ) -> None:
        self.settled = threading.Event()
        self.has_no_thread = False
        self.has_ended = False
        self._load_look_ups = load_look_ups
        self._look_ups: LookUps | None = None  # until there is a job
        self._run_errand = run_errand
        self._forget = forget
        self._inbox: deque[Job] = deque()
        self._tasks: dict[Job, asyncio.Task[None]] = {}
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

    def forget_places(self) -> None:
        """Count no circuit as open any more. Called when nothing is looked up."""
        if self._look_ups is not None:
            self._look_ups.forget_places()

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has stopped
            self._loop.call_soon_threadsafe(function, *args)

    def _cancel(self, job: Job) -> None:
        task = self._tasks.get(job)
        # A request that is under way ends by itself: then its connection can be used again. One that is just
        # being opened would even be lost half-open.
        if task is not None and not (self._look_ups is not None and self._look_ups.is_asking(job)):
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
                self.forget_places()

    def _give_up(self) -> None:
        """Settle what nobody will look up. Also called by who was too late to see that the worker ended."""
        while True:
            try:
                job = self._inbox.popleft()
            except IndexError:
                break
            job.finish(LookupResult(None, MissingReason.SHUTDOWN), UsageSource.RETRIEVAL)
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
        is_busy = False
        try:
            while not self._stopping:
                self._is_woken = False  # before the inbox is looked into: what comes later wakes again
                self._wake.clear()
                while self._inbox:
                    is_busy = True
                    self._begin(self._inbox.popleft())
                if self._run_errand():
                    is_busy = self._is_woken = True  # it comes round by itself
                    await let_by()
                    continue
                if until_idle and not self._tasks:
                    break
                if not is_busy:
                    if not self._tasks and not await self._woken_within(_REST_AFTER_S):
                        await self._close_connections()  # they are opened again when they are needed
                    await self._wake.wait()
                is_busy = False
                self._is_woken = True
                await asyncio.sleep(_TICK_S)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close_connections()

    async def _close_connections(self) -> None:
        if self._look_ups is not None:
            await self._look_ups.aclose()

    def _begin(self, job: Job) -> None:
        # Not a variable of `_serve`: that would keep the last job, and its credentials, until the next one.
        if job.is_open:
            self._tasks[job] = task = self._loop.create_task(self._settle(job))
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

    async def _settle(self, job: Job) -> None:
        result = LookupResult(None, MissingReason.TRANSPORT_ERROR)
        try:
            if self._look_ups is None:
                self._look_ups = self._load_look_ups()
            result = await self._look_ups.do(job)
            await let_by()
        except Exception:
            _fault.report("looking a response up")
        finally:
            # In this order: whoever waits for the last job waits for its span, too.
            job.finish(result, UsageSource.RETRIEVAL)
            self._forget(job)
            self.settled.set()
