"""The threads of the look-ups: they run callbacks, each when it is due."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

from .. import _fault

THREAD_NAME: Final = "otel-responses-usage"

# A thread that has had nothing to do for so long ends. The last one stays.
_IDLE_S: Final = 5.0

# A thread waits at most so long for the work of another one. A span processor may even wait for a server.
_LONGEST_STEP_S: Final = 0.02
_PAUSE_S: Final = 5e-5
# After each callback it is longer. Most callbacks are short, and when very many calls end at once, each would
# take the interpreter from the application between two of its steps.
_CALLBACK_PAUSE_S: Final = 1e-3
# Work may take this share of the time. On a thread of the application the share is less, since there the work
# delays the application. So much time before the work counts: a few look-ups do not rest.
_WORK_SHARE: Final = 0.2
APPLICATION_WORK_SHARE: Final = 0.03
_COUNTED_TIME_S: Final = 0.1
_LONGEST_REST_S: Final = 0.01

# Runs once, and returns after how many seconds it is to run again; `None` if it is not.
Callback: TypeAlias = Callable[[], "float | None"]


class Signal:
    """Wakes a waiting thread.

    Sending takes no lock that another sender may hold, so a garbage collector and a signal handler may send.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def send(self) -> None:
        """Wake the thread that waits, or the next one that will."""
        with contextlib.suppress(RuntimeError):  # it has been sent already
            self._lock.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the signal, and return whether it came."""
        return self._lock.acquire(timeout=-1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))


class WorkShare:
    """Says when work has taken more than its share of the time. Any thread may call any method."""

    def __init__(self, share: float) -> None:
        self._share = share
        # Until then the work so far has taken its share.
        self._earned_at_s = 0.0

    @property
    def is_used_up(self) -> bool:
        """Whether there is to be no work now."""
        return time.monotonic() < self._earned_at_s

    def add(self, worked_s: float) -> float:
        """Count work, and return for how many seconds there is to be none."""
        now_s = time.monotonic()
        earned_at_s = max(self._earned_at_s, now_s - _COUNTED_TIME_S) + worked_s / self._share
        # Under gevent the work of the application is counted as ours, and a clock may be frozen.
        self._earned_at_s = min(earned_at_s, now_s + _LONGEST_REST_S)
        return max(0.0, self._earned_at_s - now_s)


class Pace:
    """Has one thread of the look-ups work at a time, and take at most a fifth of the interpreter.

    A thread of the application that needs the interpreter waits for the one that has it. With many threads
    of ours in line it would wait for several. Any thread may call any method.

    Attributes:
        is_hurried: The application itself waits for the look-ups: then they take what they can get.

    """

    def __init__(self) -> None:
        self.is_hurried = False
        self._lock = threading.Lock()
        self._local = threading.local()
        self._share = WorkShare(_WORK_SHARE)

    def begin(self) -> None:
        """Begin to work, when no other thread works.

        Waits only briefly. Where the application computes without pause, a thread works for long, most of it
        waiting for the interpreter.
        """
        if getattr(self._local, "since_s", None) is None:
            self._local.is_alone = self._lock.acquire(timeout=_LONGEST_STEP_S)
            self._local.since_s = time.thread_time()

    def let_application_in(self) -> None:
        """Pause for longer than the system takes to wake a thread of the application."""
        time.sleep(_PAUSE_S)

    def end(self, pause_s: float = _PAUSE_S) -> None:
        """End the work, or interrupt it to wait for a server, with a rest. Harmless if it has not begun.

        Args:
            pause_s: The shortest rest, unless the application waits.

        """
        since_s = getattr(self._local, "since_s", None)
        if since_s is None:
            return
        try:
            rest_s = self._share.add(time.thread_time() - since_s)
            time.sleep(_PAUSE_S if self.is_hurried else max(pause_s, rest_s))  # before the next thread works
        finally:
            self._local.since_s = None
            if self._local.is_alone:
                self._lock.release()


class Workers:
    """At most so many daemon threads, started when they are needed, and the queue of what they run.

    One thread at a time waits for the next callback; it holds `_turn`. When it has one, the next thread takes
    the turn, and a thread is started for it if there is none. So a callback that blocks delays no other until
    all threads are busy. It is to be made with the first callback and not earlier: gevent and eventlet
    replace the locks and threads of Python, and may do so after the instrumentation was switched on.

    Attributes:
        progress: Sent after each callback.
        pace: Begun before each callback, and ended after it.

    """

    def __init__(self, max_threads: int, on_idle: Callable[[], None]) -> None:
        self._max_threads = max_threads
        self._on_idle = on_idle
        self._inbox: deque[tuple[float, Callback]] = deque()  # put, and not in the queue yet
        self._queue: list[tuple[float, int, Callback]] = []  # a heap; belongs to the holder of the turn
        self._number = itertools.count()
        self._signal = Signal()
        self.progress = Signal()
        self.pace = Pace()
        self._turn = threading.Lock()
        # Reentrant: a signal handler may come back here.
        self._starting = threading.RLock()
        # Only single operations of `dict` touch these, so they need no lock.
        self._threads: dict[threading.Thread, None] = {}
        self._candidates: dict[int, None] = {}  # the threads that wait for the turn
        self._stopping = False

    @property
    def has_threads(self) -> bool:
        """Whether any thread runs."""
        return bool(self._threads)

    @property
    def includes_this_thread(self) -> bool:
        """Whether the calling thread is one of these."""
        return threading.current_thread() in self._threads

    def put(self, callback: Callback, after_s: float = 0.0) -> None:
        """Have a callback run. Takes no lock, so a garbage collector may call it; see `start`."""
        try:
            self._inbox.append((time.monotonic() + after_s, callback))
        finally:  # also if a signal handler raises here
            self._signal.send()

    def start(self) -> None:
        """Start the first thread, if none runs. Where none can be started now, a later call tries again."""
        if not self._threads:
            with self._starting:
                if not self._threads:
                    self._start_thread()

    def run_here(self, timeout_s: float) -> bool:
        """Run one callback on the calling thread, if one is due in time; return whether one was."""
        if not self._turn.acquire(timeout=timeout_s):
            return False
        try:
            callback = self._next(timeout_s)
        finally:
            self._turn.release()
        if callback is not None:
            self._run(callback)
        return callback is not None

    def stop(self, timeout_s: float) -> None:
        """End all threads, and wait for them at most so long. What is in the queue does not run any more."""
        self._stopping = True
        self._signal.send()
        deadline = time.monotonic() + timeout_s
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._inbox.clear()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
        self._threads[thread] = None
        try:
            thread.start()
        except Exception:
            # The process is out of threads, or it ends: since Python 3.12 it starts none then.
            self._threads.pop(thread, None)

    def _serve(self) -> None:
        """Run callbacks until no more are expected: the body of a thread."""
        thread = threading.current_thread()
        try:
            while self._take_turn():
                try:
                    callback = self._next()
                finally:
                    self._turn.release()
                if callback is None:
                    break
                # After the release. Before it, a candidate that gives up just now would be relied on.
                if not self._candidates and len(self._threads) < self._max_threads:
                    with self._starting:
                        if len(self._threads) < self._max_threads:  # another thread may have started one
                            self._start_thread()
                self._run(callback)
                callback = None  # it holds a call with its credentials
        except BaseException:  # also what would end a thread without a word
            _fault.report("running the look-ups")
        finally:
            self._threads.pop(thread, None)
            if self._stopping:
                self._signal.send()  # wakes the next thread, so that it ends, too
            elif self._inbox or self._queue:
                self.start()  # a callback has ended this thread, and it was the last one

    def _take_turn(self) -> bool:
        """Wait until it is this thread's turn to wait for a callback; false if this thread is not needed."""
        me = threading.get_ident()
        self._candidates[me] = None
        try:
            has_turn = self._turn.acquire(timeout=_IDLE_S)
        finally:
            self._candidates.pop(me, None)
        # The last thread that had the turn may have relied on this one.
        return has_turn or self._turn.acquire(blocking=False)

    def _next(self, timeout_s: float | None = None) -> Callback | None:
        """Wait for the next callback that is due; `None` when the threads are stopped, or the time is up."""
        idle_s: float | None = _IDLE_S
        while not self._stopping:
            while self._inbox:
                due, callback = self._inbox.popleft()
                heapq.heappush(self._queue, (due, next(self._number), callback))
            left_s = self._queue[0][0] - time.monotonic() if self._queue else None
            if left_s is not None and left_s <= 0:
                return heapq.heappop(self._queue)[2]
            wait_s = left_s if left_s is not None else idle_s
            if timeout_s is not None and (wait_s is None or timeout_s < wait_s):
                self._signal.wait(timeout_s)
                timeout_s = 0.0
                if not self._inbox:
                    return None
            elif not self._signal.wait(wait_s):
                if left_s is not None:
                    # It has been waited for, even if the clock does not move: tests freeze it.
                    return heapq.heappop(self._queue)[2]
                idle_s = None
                self._on_idle()
        return None

    def _run(self, callback: Callback) -> None:
        self.pace.begin()
        try:
            again_s = callback()
        except Exception:
            _fault.report("looking a response up")
        else:
            if again_s is not None:
                self.put(callback, again_s)
        finally:
            self.pace.end(_CALLBACK_PAUSE_S)
            self.progress.send()
