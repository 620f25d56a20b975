"""An application of coroutines: it reads streams and measures whether its event loop goes on.

Its argument names the event loop. It prints what it has measured as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

import anyio
import openai
import set_up

CALLS = ("cut", "closed", "cancelled")
# A step of the event loop that takes longer is slow. A look-up takes longer.
SLOW_S = 1.0
PATIENT_S = 60.0


async def read(client: openai.AsyncOpenAI, call: str) -> None:
    if call == "cancelled":
        stream = await client.responses.create(model=call, input="x", stream=True)
        with anyio.move_on_after(0.3):
            async with stream:
                async for _ in stream:
                    pass
    else:
        await set_up.async_read(client, call)


async def tick(gaps: list[float]) -> None:
    """Sleep for 10 ms again and again, and note how long it took."""
    while True:
        began = time.monotonic()
        await anyio.sleep(0.01)
        gaps.append(time.monotonic() - began)


async def main() -> None:
    log_steps_longer_than(PATIENT_S)
    ended = set_up.watch_spans()
    gaps: list[float] = []
    async with openai.AsyncOpenAI(max_retries=0) as client:
        await read(client, "whole")
        await anyio.sleep(0)  # the first call has loaded modules: that step may be slow
        log_steps_longer_than(SLOW_S)
        began = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(tick, gaps)
            async with anyio.create_task_group() as readers:
                for call in CALLS:
                    readers.start_soon(read, client, call)
            with anyio.fail_after(set_up.PATIENCE_S):
                while not ended.has(1 + len(CALLS)):
                    await anyio.sleep(0.01)
            lasted_s = time.monotonic() - began
            group.cancel_scope.cancel()
        await read(client, "cut at the end")
    log_steps_longer_than(PATIENT_S)
    gc.collect()
    await anyio.sleep(0.05)  # the generators that were found are closed meanwhile
    print(json.dumps({"longest_gap_s": max(gaps), "lasted_s": lasted_s, "ended_at": time.time()}))  # noqa: T201


def log_steps_longer_than(seconds: float) -> None:
    """Set what asyncio's debug mode logs as a slow step."""
    if "trio" not in sys.argv:
        asyncio.get_running_loop().slow_callback_duration = seconds


def run(runtime: str) -> None:
    """Run the application on an event loop of this kind."""
    library: Any
    if runtime == "trio":
        import trio as library

        library.run(main)
    elif runtime == "uvloop":
        import uvloop as library

        library.run(main())
    elif runtime == "nest_asyncio":
        import nest_asyncio as library

        async def cell() -> None:
            """Run the application in a notebook, whose own event loop is running."""
            library.apply()
            asyncio.run(main())

        asyncio.run(cell())
    else:
        asyncio.run(main())


if __name__ == "__main__":
    # The generators of a half-read async stream are left to the garbage collector by the SDK. If it runs in
    # another thread than the event loop's, trio and nest_asyncio complain, with our package or without.
    gc.disable()
    set_up.by_hand()
    run(sys.argv[1])
