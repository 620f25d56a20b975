"""The event loop of the look-ups keeps out of the application's way, in whatever thread it runs."""

from __future__ import annotations

import threading
import time

from otel_responses_usage._lookup.loop import Loop, Pace, let_by

_STEPS = 20
_STEP_S = 0.001


def work(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def test_it_rests_in_a_thread_that_is_younger_than_the_one_before() -> None:
    """Where a thread was not to be had at first, the look-ups began in one of the application's."""
    pace = Pace()
    loop = Loop(pace)
    worked_and_lasted: list[tuple[float, float]] = []

    async def look_up() -> None:
        worked, began = time.thread_time(), time.monotonic()
        for _ in range(_STEPS):
            for _ in range(8):
                pace.note_call()
            work(_STEP_S)
            await let_by()
        worked_and_lasted.append((time.thread_time() - worked, time.monotonic() - began))

    try:
        work(2 * _STEPS * _STEP_S)  # more than the thread will ever have worked
        loop.run_until_complete(look_up())
        thread = threading.Thread(target=lambda: loop.run_until_complete(look_up()))
        thread.start()
        thread.join()
    finally:
        loop.close()
    for worked, lasted in worked_and_lasted:
        assert lasted > 5 * worked, f"{lasted:.3f} s for {worked:.3f} s of work: it did not rest"
    assert len(worked_and_lasted) == 2
