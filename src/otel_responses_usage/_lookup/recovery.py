"""Look-ups in the background: one thread, a bounded number of jobs, a deadline for each."""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from .. import _fault
from .._config import Config
from .._facts.request import Server
from .._facts.response import Response
from .._facts.usage import MissingReason, UsageSource
from .imports import late_import
from .job import Endpoint, Job, LookupResult
from .worker import STOP_GRACE_S, Worker

if TYPE_CHECKING:
    from .lookups import LookUps, Retriever

# Each stands for a call that has ended: some kilobytes.
_MOST_ERRANDS: Final = 16_384


class Recovery:
    """Looks responses up until their usage is known or their time is up.

    Nothing here makes a caller wait except `drain` and `stop`. The worker thread is started by the first
    job, and is a daemon: a process can always exit.
    """

    def __init__(
        self,
        config: Config,
        make_retriever: Callable[[], Retriever],
        on_circuit: Callable[[Endpoint, int], None] = lambda *_: None,
    ) -> None:
        self._config = config
        self._make_retriever = make_retriever
        self._on_circuit = on_circuit
        self._start_anew()

    def begin_anew(self) -> tuple[int, Callable[[], None]]:
        """Leave to the parent process its jobs, thread and sockets.

        Returns:
            How many spans it held, and a function that reports its open circuits as closed.

        """
        held, worker = len(self._waiting), self._worker
        self._start_anew()
        return held, worker.forget_places if worker is not None else lambda: None

    def _start_anew(self) -> None:
        # A signal handler of the application's may come back here.
        self._starting = threading.RLock()
        self._worker: Worker | None = None
        # Jobs that are not settled. Only single dict operations touch them, so no thread needs a lock.
        self._waiting: dict[Job, None] = {}
        self._by_response: dict[tuple[Server, str], Job] = {}
        self._errands: deque[Callable[[], None]] = deque()
        self._errand_turn = threading.RLock()
        self._closed = False

    def submit(self, job: Job) -> MissingReason | None:
        """Take a job over, or say why not."""
        if self._closed:
            return MissingReason.SHUTDOWN
        if len(self._waiting) >= self._config.max_pending:
            return MissingReason.OVERLOAD
        worker = self._running_worker()
        if worker is None:
            return MissingReason.TRANSPORT_ERROR
        job.listener.on_accept()
        self._waiting[job] = None
        # A server that hands an id out twice is served twice.
        self._by_response.setdefault((job.server, job.response_id), job)
        worker.put(job)
        return None

    def run_soon(self, errand: Callable[[], None]) -> None:
        """Do something, or have the worker do it soon: while many calls end the application is busy."""
        worker = self._worker
        is_behind = len(self._errands) >= _MOST_ERRANDS
        if worker is not None and worker.takes_jobs() and worker.in_burst() and not is_behind:
            self.run_later(errand)
            return
        if worker is not None:
            worker.note_call()
        errand()

    def run_after(self, seconds: float, errand: Callable[[], None]) -> None:
        """Have the worker do something at a later time."""
        worker = self._running_worker()
        if worker is not None:
            worker.call_after(seconds, partial(self.run_later, errand))

    def run_later(self, errand: Callable[[], None]) -> None:
        """Have the worker do something soon. Takes no lock, so a garbage collector may call it."""
        self._errands.append(errand)
        worker = self._worker
        if worker is not None and worker.takes_jobs():
            worker.wake()
        else:
            # `Thread.start` takes locks that the thread which the collector interrupts may hold. At the
            # end of the interpreter no thread starts; then `drain` runs the errands.
            with contextlib.suppress(RuntimeError):
                _thread.start_new_thread(self._run_errands_somewhere, ())

    @property
    def is_waiting(self) -> bool:
        """Whether there is any job."""
        return bool(self._by_response)

    def awaits(self, server: Server, response_id: str) -> bool:
        """Whether a job waits for this response of this server."""
        return (server, response_id) in self._by_response

    def observe(self, server: Server, response: Response) -> None:
        """Settle the job that waits for this response, if what the application itself read says enough."""
        job = self._by_response.get((server, response.id)) if response.id is not None else None
        if job is not None and response.is_terminal and response.usage is not None:
            self._finish(job, LookupResult(response.usage, None, response), UsageSource.OBSERVATION)

    def drain(self, timeout_s: float) -> None:
        """Wait until nothing is pending, for so long at most; then close what is left as `shutdown`."""
        deadline = time.monotonic() + timeout_s
        for _ in range(len(self._errands)):
            if not self._run_errand(max(0.0, deadline - time.monotonic())):
                break
        worker = self._worker
        if worker is not None and worker.has_no_thread:
            worker.serve_here(timeout_s)
        while self._waiting and worker is not None and worker.is_alive():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            worker.settled.clear()
            if self._waiting:
                worker.settled.wait(min(left_s, 0.1))
        for job in list(self._waiting):
            self._finish(job, LookupResult(None, MissingReason.SHUTDOWN), UsageSource.RETRIEVAL)

    def stop(self, timeout_s: float) -> None:
        """Drain, refuse every later job, and end the worker."""
        self.drain(timeout_s)
        with self._starting:  # a worker that is being started is seen here, and a later one sees this
            self._closed = True
            worker = self._worker
        if worker is not None:
            worker.stop(STOP_GRACE_S)
            worker.forget_places()

    def _finish(self, job: Job, result: LookupResult, source: UsageSource) -> None:
        job.finish(result, source)
        self._forget(job)
        if self._worker is not None:
            self._worker.cancel(job)

    def _forget(self, job: Job) -> None:
        self._waiting.pop(job, None)
        if self._by_response.get((job.server, job.response_id)) is job:
            self._by_response.pop((job.server, job.response_id), None)

    def _run_errand(self, patience_s: float = threading.TIMEOUT_MAX) -> bool:
        """Run the next errand; say whether there was one."""
        # One thread at a time: whoever drains waits for what another is just doing.
        turn = self._errand_turn  # a fork makes a new one
        if not turn.acquire(timeout=min(patience_s, threading.TIMEOUT_MAX)):
            return False
        try:
            if not self._errands:
                return False
            self._errands.popleft()()
        except Exception:
            _fault.report("ending a call")
        finally:
            turn.release()
        return True

    def _run_errands_somewhere(self) -> None:
        worker = None if self._closed else self._running_worker()
        if worker is not None:
            worker.wake()
            return
        while self._run_errand():
            pass

    def _running_worker(self) -> Worker | None:
        """Return the worker, made anew where it has to be; `None` where the process cannot have one."""
        worker = self._worker
        if worker is None or not worker.takes_jobs():
            with self._starting:
                worker = self._worker
                if worker is None or worker.has_ended:
                    try:
                        worker = Worker(self._load_look_ups, self._run_errand, self._forget)
                    except OSError:  # no file descriptor is left
                        _fault.report("starting the look-ups")
                        return None
                if not worker.takes_jobs():
                    worker.start()
                self._worker = worker
                if self._closed:
                    worker.stop(0.0)
        return worker

    def _load_look_ups(self) -> LookUps:
        """Import what does look-ups, and make it. Called by the worker."""
        with late_import:
            from .lookups import LookUps
        return LookUps(self._config.max_concurrency, self._make_retriever(), self._on_circuit)
