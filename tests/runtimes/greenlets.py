"""An application of greenlets: it reads streams and watches itself during the look-ups.

The command that starts it has patched the standard library, so each `threading.Thread` here is a greenlet.
Its arguments: how OpenTelemetry is set up (`by-hand` or `zero-code`), and the calls to make at the same time.
Two more calls are cut when the program ends. It prints what it has seen as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import set_up
from asgiref.sync import async_to_sync

WATCH_AFTERWARDS_S = 1.5
CALLS_AT_THE_END = ("cut at the end", "hanging at the end")


class Watch(threading.Thread):
    """A greenlet that runs coroutines of its own now and then, and notes what prevents that."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.looks = 0
        self.seen: set[str] = set()
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            self.look()
            time.sleep(0.05)

    def look(self) -> None:
        """Try what an application does that has no event loop running."""
        self.looks += 1
        with contextlib.suppress(RuntimeError):
            self.seen.add(f"a running {type(asyncio.get_running_loop()).__name__}")
        self.run_by("asyncio.run", lambda: asyncio.run(answer()))
        self.run_by("async_to_sync", lambda: async_to_sync(answer)())

    def run_by(self, name: str, run: Callable[[], int]) -> None:
        """Run a coroutine, and note how that fails."""
        try:
            assert run() == 42
        except BaseException as error:
            self.seen.add(f"{name}: {error!r}")


async def answer() -> int:
    return 42


class Ticker(threading.Thread):
    """A greenlet that sleeps for 10 ms again and again, and measures the longest time it took."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0
        self.is_over = threading.Event()

    def run(self) -> None:
        last = time.monotonic()
        while not self.is_over.is_set():
            time.sleep(0.01)
            now = time.monotonic()
            self.longest_s, last = max(self.longest_s, now - last), now


def read(client: openai.OpenAI, call: str) -> None:
    """Make a call, which ends as its name says."""
    if call == "timed out":
        timeout = timeout_of_a_greenlet()
        stream = client.responses.create(model=call, input="x", stream=True)
        next(stream)
        with contextlib.suppress(timeout), timeout(0.3), stream:
            list(stream)
    else:
        set_up.read(client, call)


def timeout_of_a_greenlet() -> Any:
    """Return the exception that is raised in a greenlet when its time is up."""
    library: Any = sys.modules.get("gevent") or sys.modules["eventlet"]
    return library.Timeout


def main() -> None:
    way, *calls = sys.argv[1:]
    if way == "by-hand":
        set_up.by_hand()
    ended = set_up.watch_spans()
    client = openai.OpenAI(max_retries=0)
    read(client, "whole")
    watch, ticker = Watch(), Ticker()
    watch.look()  # also in the main greenlet
    watch.start()
    ticker.start()
    began = time.monotonic()
    readers = [threading.Thread(target=read, args=(client, call)) for call in calls]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    gc.collect()
    ended.wait_for(1 + len(calls))
    lasted_s = time.monotonic() - began
    ticker.is_over.set()
    time.sleep(WATCH_AFTERWARDS_S)
    watch.is_over.set()
    watch.join()
    watch.look()
    for call in CALLS_AT_THE_END:
        read(client, call)
    seen = {
        "seen": sorted(watch.seen),
        "looks": watch.looks,
        "longest_gap_s": ticker.longest_s,
        "lasted_s": lasted_s,
        "ended_at": time.time(),
    }
    print(json.dumps(seen))  # noqa: T201
