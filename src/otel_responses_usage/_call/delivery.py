"""Hands the records of ended calls to a function of the application."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, NamedTuple

from .. import _fault
from .._call_record import CallRecord, late_record
from .._callback import CoroutineError, result_of
from .._config import NamedFunction
from .._facts.response import Response
from .._lookup.imports import forks_wait
from .._lookup.worker import THREAD_NAME, Signal
from .._telemetry.call_record import call_record
from .._telemetry.neighbour import CallSpan
from .._telemetry.record import Record

_MAX_RECORDS: Final = 10_000
_IDLE_S: Final = 5.0
_CHECK_S: Final = 0.05

_logger = logging.getLogger("otel_responses_usage")


class Loss(Enum):
    """Why the application was not told of a call, or did not take its record.

    Attributes:
        REFUSED: Too many records were waiting.
        RAISED: The function raised.
        SHUTDOWN: The process ended before.

    """

    REFUSED = "refused"
    RAISED = "raised"
    SHUTDOWN = "shutdown"


class _Locks(NamedTuple):
    """What the threads wait with.

    It is made with the first record and not earlier: gevent and eventlet replace the locks of Python, and may
    do so after the instrumentation was switched on.
    """

    arrived: Signal
    delivered: Signal
    starting: Any  # a reentrant lock: a signal handler may come back here


class _Mark:
    """Stands for a record that the function has not returned from.

    Attributes:
        is_given_up: Whether an exit has waited for it in vain.

    """

    __slots__ = ("is_given_up",)

    def __init__(self) -> None:
        self.is_given_up = False


class Delivery:
    """Calls the function with one record after the other, in the order in which calls are recorded.

    It runs on a daemon thread of its own, so it never delays a call. The first record starts the thread. It
    ends after some seconds without records. Any thread may call any method.
    """

    def __init__(self, on_call: Callable[[CallRecord], object], count_loss: Callable[[Loss], object]) -> None:
        """Deliver nothing yet.

        Args:
            on_call: The function of the application.
            count_loss: Called once for each record that is lost.

        """
        self._on_call = on_call
        self._count_loss = count_loss
        self._warned: set[Loss] = set()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the records. Called in a forked child, too: the parent process delivers them."""
        # Only single operations of `dict` and `deque` touch these, so no thread needs a lock.
        self._records: deque[CallRecord] = deque()
        self._busy: dict[_Mark, None] = {}
        self._locks: dict[None, _Locks] = {}
        self._thread: threading.Thread | None = None

    @_fault.catch_and_report("telling the application of a call")
    def records_of(self, call_span: CallSpan, record: Record) -> CallRecords:
        """Return the records of an ended call. None is delivered yet."""
        return CallRecords(self, call_record(call_span, record))

    def put(self, record: CallRecord) -> None:
        """Have a record delivered soon."""
        if len(self._records) >= _MAX_RECORDS:
            self._lose(
                Loss.REFUSED, f"on_call is slow. {_MAX_RECORDS} calls wait for it, and others are lost."
            )
            return
        self._records.append(record)
        self._get_locks().arrived.send()
        self._start()

    def drain(self, timeout_s: float, *, is_exit: bool = False) -> bool:
        """Wait until all records are delivered, at most so long; return whether they are.

        Args:
            timeout_s: The longest wait.
            is_exit: Whether the process or a provider ends. That is so several times in one exit, but one
                record is waited for only once.

        """
        deadline = time.monotonic() + timeout_s
        waited_s = 0.0  # counted as well as measured: tests freeze the clock
        while self._records or self._busy:
            thread = self._thread
            if thread is threading.current_thread():  # the function itself waits
                return False
            if is_exit and any(mark.is_given_up for mark in list(self._busy)):
                return False
            if time.monotonic() >= deadline or waited_s >= timeout_s:
                for mark in list(self._busy):
                    mark.is_given_up |= is_exit
                return False
            if thread is None or not thread.is_alive():
                self._deliver_next()  # no thread could be started
            elif not self._get_locks().delivered.wait(_CHECK_S):
                waited_s += _CHECK_S
        return True

    def give_up(self) -> None:
        """Count the records that are left as lost."""
        while True:
            try:
                self._records.popleft()
            except IndexError:
                break
            self._lose(Loss.SHUTDOWN, "The process ends before on_call has been called for all calls.")

    def _get_locks(self) -> _Locks:
        return self._locks.get(None) or self._locks.setdefault(
            None, _Locks(Signal(), Signal(), threading.RLock())
        )

    def _start(self) -> None:
        if self._thread is not None:
            return
        with self._get_locks().starting:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
            try:
                self._thread.start()
            except Exception:  # the process is out of threads, or it ends: then `drain` delivers
                self._thread = None

    def _serve(self) -> None:
        try:
            while self._records or self._get_locks().arrived.wait(_IDLE_S):
                while self._deliver_next():
                    pass
        finally:
            self._thread = None
            if self._records:  # one came in just now
                self._start()

    def _deliver_next(self) -> bool:
        """Deliver the next record, and return whether there was one."""
        mark = _Mark()
        self._busy[mark] = None  # before it leaves the queue: `drain` waits for it
        try:
            try:
                record = self._records.popleft()
            except IndexError:
                return False
            self._call(record)
        finally:
            self._busy.pop(mark, None)
            self._get_locks().delivered.send()
        return True

    def _call(self, record: CallRecord) -> None:
        try:
            if isinstance(self._on_call, NamedFunction):
                with forks_wait():  # in a child that inherits a half-done import, that import never ends
                    self._on_call.load()
            result_of(self._on_call, record)
        except KeyboardInterrupt:
            raise
        except CoroutineError:
            self._lose_raised("is a coroutine function, which cannot be called on a thread")
        except BaseException as error:  # also what ends a process, or cancels a task
            self._lose_raised(f"has raised {type(error).__name__}")

    def _lose_raised(self, problem: str) -> None:
        self._lose(Loss.RAISED, f"{_name_of(self._on_call)} {problem}. Its further errors are not logged.")

    def _lose(self, loss: Loss, warning: str) -> None:
        """Count a lost record. The first of its kind is logged, since there may be no metrics."""
        if loss not in self._warned:
            self._warned.add(loss)
            _logger.warning(warning)
        with forks_wait():  # the SDK takes a lock
            self._count_loss(loss)


class CallRecords:
    """The records of one call, in their order: a late one is never delivered before the first.

    Another thread may put the late one at any time. Only single operations touch the list, so it needs no
    lock.
    """

    __slots__ = ("_delivery", "_first", "_is_first_put", "_late")

    def __init__(self, delivery: Delivery, first: CallRecord) -> None:
        """Deliver nothing yet.

        Args:
            delivery: Delivers the records.
            first: The record of the call as it ended.

        """
        self._delivery = delivery
        self._first = first
        self._late: list[CallRecord] = []
        self._is_first_put = False

    def put_first(self) -> None:
        """Have the first record delivered."""
        self._delivery.put(self._first)
        self._is_first_put = True
        self._put_late_ones()

    def put_late(self, response: Response) -> None:
        """Have a late record delivered: the application was shown the response of the call."""
        self._late.append(late_record(self._first, response))
        if self._is_first_put:
            self._put_late_ones()

    def _put_late_ones(self) -> None:
        while self._late:
            with contextlib.suppress(IndexError):  # another thread has taken it
                self._delivery.put(self._late.pop(0))


def _name_of(function: object) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"on_call ({getattr(function, '__module__', None)}:{name})"
