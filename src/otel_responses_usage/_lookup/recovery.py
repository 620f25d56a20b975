"""Look-ups in the background: a bounded number of jobs, each with a time limit, on threads of their own."""

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
from .imports import forks_wait, late_import
from .job import Endpoint, Job, LookupResult
from .worker import APPLICATION_WORK_SHARE, Pace, Workers, WorkShare

if TYPE_CHECKING:
    from .lookups import LookUps, Retriever

# Each stands for a call that has ended: some kilobytes.
_MAX_CALLBACKS: Final = 16_384
# How long a stopping thread may take.
_STOP_GRACE_S: Final = 1.0
# A thread that waits for jobs looks so often whether threads are still there.
_CHECK_S: Final = 0.05


class Recovery:
    """Looks responses up until their usage is known or their time is up.

    Only `drain` and `stop` make a caller wait. Threads are started by the first job and are daemons: the
    process can always exit.
    """

    def __init__(
        self,
        config: Config,
        make_retriever: Callable[[Pace], Retriever],
        on_circuit: Callable[[Endpoint, int], None] = lambda *_: None,
    ) -> None:
        self._config = config
        self._make_retriever = make_retriever
        self._on_circuit = on_circuit
        self._reset()

    def begin_anew(self) -> list[Callable[[], object]]:
        """Leave the jobs, threads and sockets to the parent process. Called in a forked child.

        Returns:
            Functions that take back what was counted: spans that wait for their usage, and open circuits.

        """
        take_back = [job.listener.leave_to_parent() for job in (*self._waiting, *self._tails)]
        if self._lookups is not None:
            take_back.append(self._lookups.circuits.clear)
        self._reset()
        return take_back

    def _reset(self) -> None:
        # Only single operations of `dict` and `deque` touch these, so no thread needs a lock.
        self._workers: dict[None, Workers] = {}
        self._waiting: dict[Job, None] = {}  # without a result
        self._tails: dict[Job, None] = {}  # tails that are being read
        self._by_response: dict[tuple[Server, str], Job] = {}
        self._callbacks: deque[Callable[[], None]] = deque()
        self._running: dict[object, int] = {}  # callbacks that run now, and on which thread
        self._lookups: LookUps | None = None  # loaded with the first job
        self._closed = False
        self._share = WorkShare(APPLICATION_WORK_SHARE)  # of callbacks that run at once

    def submit(self, job: Job) -> MissingReason | None:
        """Accept a job, or return the reason why not."""
        if self._closed:
            return MissingReason.SHUTDOWN
        if len(self._waiting) >= self._config.max_pending:
            return MissingReason.OVERLOAD
        job.listener.on_accept()
        self._waiting[job] = None
        key = job.server, job.response_id
        if job.counts_input and job.response_id:
            self._by_response[key] = job  # the look-up before it ends just now
        elif job.response_id:
            # The same response id can occur twice. Each call keeps its own job.
            self._by_response.setdefault(key, job)
        reason = self._put(partial(self._begin, job), "looking a response up")
        if reason is not None:
            self._finish(job, LookupResult(None, reason))
        return None

    def begin_tail(self, tail: Job, read_on: Callable[[], float | None]) -> bool:
        """Have the tail of a stream read, and return whether that is possible.

        `drain` waits for it as for a look-up. It ends with `end_tail`.

        Args:
            tail: The job to settle when the tail has ended.
            read_on: Runs on a thread of the look-ups. Returns after how many seconds to run it again.

        """
        if self._closed or len(self._waiting) + len(self._tails) >= self._config.max_pending:
            return False
        tail.listener.on_accept()
        self._tails[tail] = None
        reason = self._put(read_on, "reading on")
        if reason is not None:
            self.end_tail(tail, reason)
        return True

    def end_tail(self, tail: Job, reason: MissingReason | None = None) -> None:
        """Settle a tail. Its call is recorded or looked up. Acts only once."""
        try:
            with forks_wait():
                tail.finish(LookupResult(None, reason), UsageSource.TAIL)
        finally:  # also if a hook of the application or a signal handler raises what is no error
            self._tails.pop(tail, None)  # after the look-up has begun, for which `drain` waits, too
            self._get_workers().progress.send()

    def run_in_turn(self, callback: Callable[[], None]) -> None:
        """Run a callback now, or soon on another thread if such callbacks take too much of the time.

        So it is when very many calls end at once, and the application has enough to do.
        """
        if self._share.is_used_up and not self._closed and len(self._callbacks) < _MAX_CALLBACKS:
            self.run_later(callback)
            return
        began_s = time.thread_time()
        callback()
        self._share.add(time.thread_time() - began_s)

    def run_later(self, callback: Callable[[], None]) -> None:
        """Run a callback soon, on another thread. Takes no lock, so a garbage collector may call it."""
        self._callbacks.append(callback)
        workers = self._get_workers()
        workers.put(self._run_next_callback)
        if workers.has_threads and not self._closed:
            return
        # `Thread.start` takes locks that the interrupted thread may hold. At the end of the interpreter no
        # thread starts; then `drain` runs the callbacks.
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(self._run_callbacks_somewhere, ())

    @property
    def is_waiting(self) -> bool:
        """Whether any job has no result yet."""
        return bool(self._by_response)

    def awaits(self, server: Server, response_id: str) -> bool:
        """Whether a job waits for this response of this server."""
        return (server, response_id) in self._by_response

    def observe(self, server: Server, response: Response) -> bool:
        """Settle the job that waits for this response with its usage; return whether there was one.

        Args:
            server: The server that the application's request went to.
            response: An ended response with its usage, as the application was shown it.

        """
        job = self._by_response.get((server, str(response.id)))
        if job is None:
            return False
        job.shown = response  # first: another thread may just be ending the job without usage
        return self._finish(job, LookupResult(response.usage, None, response), UsageSource.OBSERVATION)

    def flush(self, timeout_s: float, *, includes_background: bool) -> bool:
        """Wait until every job has a result, at most so long; return whether that is so.

        Args:
            timeout_s: The longest wait.
            includes_background: Whether to wait for background responses, which may take minutes.

        """
        self._run_callbacks()
        return self._wait(timeout_s, includes_background=includes_background)

    def drain(self, timeout_s: float) -> None:
        """Wait until every job has a result, at most so long. Then the others get the result `shutdown`.

        A tail that needs more than half of the time is cut off, so that its usage can be looked up.
        """
        try:
            self._run_callbacks()  # not left to the threads: all of them may be waiting for a server
            began = time.monotonic()
            if self._tails:
                self._wait(timeout_s / 2, for_tails=True)
                self._cut_tails()
            self._wait(timeout_s - (time.monotonic() - began))
        finally:  # also if Ctrl-C ends the wait
            self._give_up()

    def stop(self, timeout_s: float) -> None:
        """Drain, refuse later jobs, and end the threads."""
        try:
            self.drain(timeout_s)
        finally:
            self._closed = True
            workers, lookups = self._workers.get(None), self._lookups
            if lookups is not None:
                lookups.retriever.interrupt()
            if workers is not None:
                workers.stop(_STOP_GRACE_S)
            if lookups is not None:
                lookups.retriever.close()
                lookups.circuits.clear()
            self._give_up()
            self._run_callbacks()

    def _wait(self, timeout_s: float, *, includes_background: bool = True, for_tails: bool = False) -> bool:
        deadline = time.monotonic() + timeout_s
        workers = self._get_workers()
        workers.pace.is_hurried = True
        waited_s = 0.0  # counted as well as measured: tests freeze the clock
        try:
            while self._tails or (not for_tails and self._is_busy(includes_background)):
                left_s = min(deadline - time.monotonic(), timeout_s - waited_s)
                # On a thread of the look-ups a span processor may flush or shut down, in the midst of a job.
                if left_s <= 0 or workers.includes_this_thread:
                    return False
                wait_s = min(left_s, _CHECK_S)
                wait = workers.progress.wait if workers.has_threads else workers.run_here
                if not wait(wait_s):
                    waited_s += wait_s
            return True
        finally:
            workers.pace.is_hurried = False

    def _is_busy(self, includes_background: bool) -> bool:
        jobs = list(self._waiting)
        return self._runs_elsewhere() or any(includes_background or not job.is_background for job in jobs)

    def _runs_elsewhere(self) -> bool:
        """Whether another thread runs a callback."""
        this = threading.get_ident()
        return any(thread != this for thread in list(self._running.values()))

    def _cut_tails(self) -> None:
        for tail in list(self._tails):
            self.end_tail(tail, MissingReason.SHUTDOWN)

    def _give_up(self) -> None:
        self._cut_tails()
        for job in list(self._waiting):
            self._finish(job, LookupResult(None, MissingReason.SHUTDOWN))

    def _put(self, callback: Callable[[], float | None], action: str) -> MissingReason | None:
        """Have a thread run a callback of an accepted job. Returns the missing reason if that cannot be."""
        try:
            workers = self._get_workers()
            workers.put(callback)
            workers.start()
        except Exception:  # whatever is missing, the span of the call must end
            _fault.report(action)
            return MissingReason.TRANSPORT_ERROR
        return MissingReason.SHUTDOWN if self._closed else None  # `stop` may have missed this job

    def _begin(self, job: Job) -> None:
        """Begin a look-up: the first callback of a job."""
        if not job.is_open:
            return
        try:
            lookups = self._lookups or self._load_lookups()
            lookups.start(job)
        except Exception:
            _fault.report("looking a response up")
            self._finish(job, LookupResult(None, MissingReason.TRANSPORT_ERROR))

    def _finish(self, job: Job, result: LookupResult, source: UsageSource = UsageSource.RETRIEVAL) -> bool:
        # Keep this order. A thread that waits for the last job must also see its span ended.
        try:
            with forks_wait():
                return job.finish(result, source)
        finally:  # also if a hook of the application or a signal handler raises what is no error
            self._waiting.pop(job, None)
            if self._by_response.get((job.server, job.response_id)) is job:
                self._by_response.pop((job.server, job.response_id), None)
            self._get_workers().progress.send()

    def _run_callback(self) -> bool:
        """Run the next callback; return whether there was one."""
        mark = object()
        self._running[mark] = threading.get_ident()  # before it leaves the queue: `_wait` waits for it
        try:
            try:
                callback = self._callbacks.popleft()
            except IndexError:
                return False
            with forks_wait():
                callback()
        except Exception:
            _fault.report("ending a call")
        finally:
            self._running.pop(mark, None)
        return True

    def _run_next_callback(self) -> None:
        self._run_callback()

    def _run_callbacks(self) -> None:
        while self._run_callback():
            pass

    def _run_callbacks_somewhere(self) -> None:
        workers = self._get_workers()
        if not self._closed:
            workers.start()
        if self._closed or not workers.has_threads:
            self._run_callbacks()

    def _get_workers(self) -> Workers:
        # Made with the first callback: gevent and eventlet may replace what `threading` has until then.
        return self._workers.get(None) or self._workers.setdefault(
            None, Workers(self._config.max_concurrency, self._on_idle)
        )

    def _on_idle(self) -> None:
        if self._lookups is not None:
            self._lookups.retriever.close()

    def _load_lookups(self) -> LookUps:
        """Import what does look-ups, and make it. Called on a thread of the look-ups."""
        with late_import:
            from .lookups import LookUps
        retriever = self._make_retriever(self._get_workers().pace)
        with late_import:
            if self._lookups is None:
                self._lookups = LookUps(retriever, self._get_workers().put, self._finish, self._on_circuit)
        return self._lookups
