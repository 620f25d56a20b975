"""The threads of the look-ups and their queue."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from observed import eventually
from otel_responses_usage._lookup.worker import THREAD_NAME, Signal, Workers

Make = Callable[[int], Workers]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make workers that are stopped afterwards."""
    made: list[Workers] = []

    def workers(max_threads: int, on_idle: Callable[[], None] = lambda: None) -> Workers:
        made.append(Workers(max_threads, on_idle))
        return made[-1]

    yield workers
    for each in made:
        each.stop(5)
    eventually(lambda: not threads(), "no thread of the look-ups")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def test_callbacks_run_when_they_are_due(make: Make) -> None:
    """The order is that of the times, and of two at the same time that of their coming."""
    workers, ran = make(1), []
    for name, after_s in (("late", 0.2), ("first", 0.0), ("middle", 0.1), ("second", 0.0)):
        workers.put(lambda name=name: ran.append(name), after_s)  # type: ignore[misc]
    workers.start()
    eventually(lambda: len(ran) == 4, "all callbacks")
    assert ran == ["first", "second", "middle", "late"]


def test_a_callback_says_when_it_runs_again(make: Make) -> None:
    """It returns the seconds until then, or nothing."""
    workers, ran = make(2), []

    def run() -> float | None:
        ran.append(time.monotonic())
        return 0.1 if len(ran) < 3 else None

    workers.put(run)
    workers.start()
    eventually(lambda: len(ran) == 3, "three runs")
    assert all(0.1 <= after - before < 1 for before, after in itertools.pairwise(ran))


@pytest.mark.parametrize("max_threads", [1, 2, 8])
def test_callbacks_that_block_take_all_threads_and_no_more(max_threads: int, make: Make) -> None:
    """While all of them block, the next callback waits; it runs as soon as one is done."""
    workers, running, release = make(max_threads), [], threading.Event()

    def block() -> None:
        running.append(threading.current_thread())
        release.wait(10)

    for _ in range(max_threads + 3):
        workers.put(block)
    workers.start()
    eventually(lambda: len(running) == max_threads, "all threads busy")
    time.sleep(0.05)
    assert len(running) == max_threads == len(set(running))
    assert all(thread.daemon for thread in running)
    release.set()
    eventually(lambda: len(running) == max_threads + 3, "the others")
    assert len(set(running)) <= max_threads


def test_a_callback_that_comes_while_threads_block_is_not_held_up(make: Make) -> None:
    """There is always a thread that waits for the next one, up to the limit."""
    workers, release, ran = make(4), threading.Event(), threading.Event()
    for _ in range(3):
        workers.put(lambda: release.wait(10) and None)
    workers.start()
    time.sleep(0.2)
    workers.put(ran.set)
    assert ran.wait(1)
    release.set()


def test_threads_that_come_and_go_lose_no_callback(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """While threads end for want of work, and others are started, every callback runs, and soon."""
    monkeypatch.setattr("otel_responses_usage._lookup.worker._IDLE_S", 0.001)
    workers, ran = make(4), []
    workers.start()
    for number in range(300):
        workers.put(lambda number=number: ran.append(number))  # type: ignore[misc]
        time.sleep(0.001 * (number % 4))
    eventually(lambda: len(ran) == 300, "all callbacks")
    assert sorted(ran) == list(range(300))


def test_threads_that_start_at_the_same_time_are_no_more_than_allowed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread makes another, which may take a while, a third one sees the same need."""

    class SlowlyMade(threading.Thread):
        def __init__(self, **given: Any) -> None:
            time.sleep(0.01)
            super().__init__(**given)

    monkeypatch.setattr(threading, "Thread", SlowlyMade)
    workers, counted = make(3), []

    def block() -> None:
        counted.append(len(threads()))
        time.sleep(0.002)

    for _ in range(100):
        workers.put(block)
    workers.start()
    eventually(lambda: len(counted) == 100, "all callbacks")
    assert max(counted) == 3


def test_what_a_callback_raises_ends_nothing(make: Make) -> None:
    """The thread goes on; where the callback would end the thread, another takes its place."""
    workers, ran = make(1), threading.Event()

    def fail(error: type[BaseException]) -> None:
        raise error

    for error in (ValueError, SystemExit, KeyError):
        workers.put(lambda error=error: fail(error))  # type: ignore[misc]
    workers.put(ran.set)
    workers.start()
    assert ran.wait(5)


def test_the_collector_may_put_a_callback_in_at_any_point(make: Make) -> None:
    """A garbage collector that interrupts the putting of a callback, or a thread's taking of one, may put."""
    workers, ran = make(2), []

    class Dropped:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            workers.put(lambda: ran.append(1))

    thresholds = gc.get_threshold()
    gc.set_threshold(7)
    try:
        workers.start()
        for _ in range(2_000):
            Dropped()
            workers.put(lambda: [object() for _ in range(20)] and None)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    eventually(lambda: len(ran) == 2_000, "all callbacks of the collector")


def test_the_caller_runs_what_is_due_where_no_thread_can(make: Make) -> None:
    """At the end of an interpreter no thread starts; then the thread that waits does the work."""
    workers, ran = make(1), []
    workers.put(lambda: ran.append(threading.current_thread()))
    workers.put(lambda: ran.append(None), 0.05)
    assert workers.run_here(1)
    assert workers.run_here(1)
    assert not workers.run_here(0.01)
    assert ran == [threading.current_thread(), None]


def test_idle_threads_close_what_is_open_and_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds without a callback one thread is left, and connections are closed once."""
    monkeypatch.setattr("otel_responses_usage._lookup.worker._IDLE_S", 0.1)
    closed: list[int] = []
    workers = make(4, lambda: closed.append(1))  # type: ignore[call-arg]
    barrier = threading.Barrier(3)
    for _ in range(3):
        workers.put(lambda: barrier.wait(5) and None)
    workers.start()
    eventually(lambda: closed and len(threads()) == 1, "one thread")
    time.sleep(0.3)
    assert closed == [1]


def test_a_signal_that_was_sent_before_is_not_lost() -> None:
    """However often it is sent, it wakes one thread once."""
    signal = Signal()
    assert not signal.wait(0)
    signal.send()
    signal.send()
    assert signal.wait(0)
    assert not signal.wait(0.01)
