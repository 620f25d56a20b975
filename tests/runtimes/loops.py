"""An application that records every event loop which is made in its process, and where it runs.

Its argument says how it reads its streams: in `threads`, or in `coroutines` of one event loop. The last thing
it does is to print what it has recorded as JSON.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import sys
import threading
from typing import Any

made: list[str] = []
running: list[str] = []


def record() -> None:
    """Record event loops from now on."""
    make, set_running = asyncio.BaseEventLoop.__init__, asyncio.events._set_running_loop

    def note_made(self: Any, *args: Any) -> None:
        made.append(type(self).__name__)
        make(self, *args)

    def note_running(loop: Any) -> None:
        if loop is not None:
            running.append(threading.current_thread().name)
        set_running(loop)

    setattr(asyncio.BaseEventLoop, "__init__", note_made)  # noqa: B010  # it is read-only for a type checker
    setattr(asyncio.events, "_set_running_loop", note_running)  # noqa: B010
    # Functions that are registered first are called last.
    atexit.register(lambda: print(json.dumps({"made": len(made), "running": sorted(set(running))})))  # noqa: T201


def main(way: str) -> None:
    import openai
    import set_up

    set_up.by_hand()
    ended = set_up.watch_spans()
    calls = ("whole", "cut", "closed", "abandoned")
    if way == "threads":
        client = openai.OpenAI(max_retries=0)
        threads = [threading.Thread(target=set_up.read, args=(client, call)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        ended.wait_for(len(calls))
        set_up.read(client, "cut at the end")
    else:

        async def read() -> None:
            async with openai.AsyncOpenAI(max_retries=0) as client:
                for call in ("whole", "cut", "closed"):
                    await set_up.async_read(client, call)
                while not ended.has(3):
                    await asyncio.sleep(0.01)
                await set_up.async_read(client, "cut at the end")

        asyncio.run(read())


if __name__ == "__main__":
    record()
    main(sys.argv[1])
