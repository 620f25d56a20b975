"""Hands the records of ended calls to a function of the application."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

from .._call_record import CallRecord
from .._lookup.worker import THREAD_NAME, Signal

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
        self._has_warned = False
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the records. Called in a forked child, too: the parent process delivers them."""
        self._records: deque[CallRecord] = deque()
        self._signal, self._delivered = Signal(), Signal()
        self._starting = threading.RLock()  # a signal handler may come back here
        self._thread: threading.Thread | None = None
        self._busy: dict[object, None] = {}  # a mark for each record that is being delivered

    def put(self, record: CallRecord) -> None:
        """Have a record delivered soon."""
        if len(self._records) >= _MAX_RECORDS:
            self._count_loss(Loss.REFUSED)
            return
        self._records.append(record)
        self._signal.send()
        self._start()

    def drain(self, timeout_s: float) -> bool:
        """Wait until all records are delivered, at most so long; return whether they are."""
        deadline = time.monotonic() + timeout_s
        waited_s = 0.0  # counted as well as measured: tests freeze the clock
        while self._records or self._busy:
            thread = self._thread
            if thread is threading.current_thread():  # the function itself waits
                return False
            if time.monotonic() >= deadline or waited_s >= timeout_s:
                return False
            if thread is None or not thread.is_alive():
                self._deliver_next()  # no thread could be started
            elif not self._delivered.wait(_CHECK_S):
                waited_s += _CHECK_S
        return True

    def give_up(self) -> None:
        """Count the records that are left as lost."""
        while True:
            try:
                self._records.popleft()
            except IndexError:
                break
            self._count_loss(Loss.SHUTDOWN)

    def _start(self) -> None:
        if self._thread is not None:
            return
        with self._starting:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
            try:
                self._thread.start()
            except Exception:  # the process is out of threads, or it ends: then `drain` delivers
                self._thread = None

    def _serve(self) -> None:
        try:
            while self._records or self._signal.wait(_IDLE_S):
                while self._deliver_next():
                    pass
        finally:
            self._thread = None
            if self._records:  # one came in just now
                self._start()

    def _deliver_next(self) -> bool:
        """Deliver the next record, and return whether there was one."""
        mark = object()
        self._busy[mark] = None  # before it leaves the queue: `drain` waits for it
        try:
            try:
                record = self._records.popleft()
            except IndexError:
                return False
            self._on_call(record)
        except (Exception, SystemExit) as error:
            self._count_loss(Loss.RAISED)
            if not self._has_warned:
                self._has_warned = True
                name = type(error).__name__
                _logger.warning("on_call has raised %s. Its further errors are not logged.", name)
        finally:
            self._busy.pop(mark, None)
            self._delivered.send()
        return True
