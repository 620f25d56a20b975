"""What runs while callgrind counts: each part once to warm up, then so often, then twice so often.

A call of `getloadavg` tells callgrind where a part ends (`--dump-before`): it is in every libc, and
nobody else calls it. The difference between the two counts is free of whatever a part does once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

from . import call, floor, pieces, standin

EVENTS = 500
CALLS = 10
# As `call.contenders` names them, in other words.
_CALLS = (
    "plain call of one event",
    "call of one event",
    "call of one event by hand",
    "plain call",
    "call",
    "call by hand",
    "plain call, async",
    "call, async",
    "call by hand, async",
    "plain call of 103 events",
    "call of 103 events",
    "call of 103 events by hand",
)
# In the order in which they run, and how many events or calls a part is.
PARTS = {
    "plain event": EVENTS,
    "plain event, async": EVENTS,
    "bare event": EVENTS,
    "bare event, async": EVENTS,
    "floor event": EVENTS,
    "floor event, async": EVENTS,
    "event": EVENTS,
    "event, async": EVENTS,
    "event of another kind": EVENTS,
    **dict.fromkeys(_CALLS, CALLS),
    "call, no SDK": CALLS,
    "call, not sampled": CALLS,
    "event, no SDK": EVENTS,
}


def parts(artificial_loss: int = 0) -> dict[str, Callable[[int], None]]:
    """Return what is counted; `artificial_loss` is wasted per event, to see whether that is noticed."""
    standin.install()
    from .instrumented import ResponsesUsageInstrumentor
    from .telemetry import deaf, unsampled

    calls = dict(zip(_CALLS, call.contenders().values(), strict=True))
    same = {times: pieces.repeated(EVENTS * times) for times in (1, 2)}
    mixed = {times: pieces.mixed(EVENTS * times) for times in (1, 2)}

    def drain(client: Callable[[list[bytes]], Any], streams: dict[int, list[bytes]]) -> Callable[[int], None]:
        return lambda times: standin.drain(client(streams[times]))

    def async_drain(client: Callable[[list[bytes]], Any]) -> Callable[[int], None]:
        return lambda times: standin.run(standin.async_drain(client(same[times])))

    def wasteful(times: int) -> None:
        standin.drain(standin.SyncAPIClient(same[times]))
        for _ in range(times * EVENTS * artificial_loss):
            pass

    def unheard(
        providers: Callable[[], dict[str, Any]], work: Callable[[int], None]
    ) -> Callable[[int], None]:
        def work_unheard(times: int) -> None:
            instrumentor = ResponsesUsageInstrumentor()
            instrumentor.uninstrument()
            instrumentor.instrument(**providers())
            work(times)

        return work_unheard

    def repeat(name: str) -> Callable[[int], None]:
        work = calls[name]

        def times_of(times: int) -> None:
            for _ in range(times * CALLS):
                work()

        return times_of

    return {
        "plain event": drain(standin.PlainSyncAPIClient, same),
        "plain event, async": async_drain(standin.PlainAsyncAPIClient),
        "bare event": lambda times: floor.bare(same[times]),
        "bare event, async": lambda times: floor.async_bare(same[times]),
        "floor event": lambda times: floor.floor(same[times]),
        "floor event, async": lambda times: floor.async_floor(same[times]),
        "event": wasteful,
        "event, async": async_drain(standin.AsyncAPIClient),
        "event of another kind": drain(standin.SyncAPIClient, mixed),
        **{name: repeat(name) for name in _CALLS},
        "call, no SDK": unheard(deaf, repeat("call")),
        "call, not sampled": unheard(unsampled, repeat("call")),
        "event, no SDK": unheard(deaf, drain(standin.SyncAPIClient, same)),
    }


def main() -> None:
    """Run every part, and mark where it begins and ends."""
    run = parts(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    if list(run) != list(PARTS):
        raise RuntimeError("the parts are not those that are expected")
    gc.disable()
    for work in run.values():
        os.getloadavg()
        for times in (1, 1, 2):
            work(times)
            os.getloadavg()


if __name__ == "__main__":
    main()
