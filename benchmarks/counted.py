"""What runs while callgrind counts: each part once to warm up, then so often, then twice so often.

A call of `getloadavg` tells callgrind where a part ends (`--dump-before`): it is in every libc, and
nobody else calls it. The difference between the two counts is free of whatever a part does once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from opentelemetry import baggage, context

from . import call, floor, pieces, standin
from .websocket import CREATE, Socket

_TIMES = (1, 1, 2)
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
# How the bytes of the counted streams are divided, by the names of the parts.
_DIVISIONS = {"1,460 bytes": pieces.SEGMENT, "4 KiB": 4_096, "64 KiB": 65_536}
BAGGAGE = {"tenant.id": "shop", "feature": "search"}
_INFERENCE = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-5.4-mini"}
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
    **{f"{what}, {division} a piece": EVENTS for division in _DIVISIONS for what in ("plain event", "event")},
    **dict.fromkeys(_CALLS, CALLS),
    "plain call with a neighbour": CALLS,
    "call with a neighbour": CALLS,
    "plain compact call": CALLS,
    "compact call": CALLS,
    "plain call over WebSocket": CALLS,
    "call over WebSocket": CALLS,
    "call with baggage": CALLS,
    "call, no SDK": CALLS,
    "call, not sampled": CALLS,
    "event, no SDK": EVENTS,
}


def parts(artificial_loss: int = 0) -> dict[str, Callable[[int], None]]:
    """Return what is counted; `artificial_loss` is wasted per event, to see whether that is noticed."""
    standin.install()
    from .instrumented import Config, ResponsesUsageInstrumentor
    from .telemetry import Told, deaf, unsampled

    calls = dict(zip(_CALLS, call.contenders().values(), strict=True))
    same = {times: pieces.repeated(EVENTS * times) for times in (1, 2)}
    divided = {
        division: {times: pieces.cut(pieces.padded(EVENTS * times)[4:-4], size) for times in (1, 2)}
        for division, size in _DIVISIONS.items()
    }
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

    def with_baggage(work: Callable[[int], None]) -> Callable[[int], None]:
        def work_with_baggage(times: int) -> None:
            instrumentor = ResponsesUsageInstrumentor()
            instrumentor.uninstrument()
            instrumentor.instrument(config=Config(baggage_keys=tuple(BAGGAGE)), **Told().providers)
            carried = context.get_current()
            for name, value in BAGGAGE.items():
                carried = baggage.set_baggage(name, value, carried)
            token = context.attach(carried)
            work(times)
            context.detach(token)

        return work_with_baggage

    def with_neighbour(client: Callable[[list[bytes]], Any]) -> Callable[[], None]:
        caller = client(pieces.whole(pieces.SHORT))
        tracer = Told().tracer_provider.get_tracer("theirs")

        def call_with_neighbour() -> None:
            with tracer.start_as_current_span("theirs", attributes=_INFERENCE):
                standin.drain(caller)

        return call_with_neighbour

    def compact(client: Callable[[list[bytes]], Any]) -> Callable[[], None]:
        caller = client([json.dumps(pieces.answer(pieces.SHORT).compaction()).encode()])
        return lambda: standin.compact(caller)

    def over_websocket(connect: Callable[[Socket], object]) -> Callable[[], None]:
        # Each answer has an id of its own: a server does not repeat one on the same connection.
        answers = [
            dataclasses.replace(pieces.answer(pieces.SHORT), id=f"resp_{number:048x}").events({})
            for number in range(CALLS * sum(_TIMES))
        ]
        socket = Socket([json.dumps(event).encode() for events in answers for event in events])
        kept = connect(socket)
        create = json.dumps(CREATE)

        def call_over_websocket() -> None:
            socket.send(create)
            for _ in answers[0]:
                socket.recv(decode=False)

        call_over_websocket.connection = kept  # type: ignore[attr-defined]  # the tap ends with it
        return call_over_websocket

    def repeat(work: Callable[[], None]) -> Callable[[int], None]:
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
        **{
            f"{what}, {division} a piece": drain(client, divided[division])
            for division in _DIVISIONS
            for what, client in (
                ("plain event", standin.PlainSyncAPIClient),
                ("event", standin.SyncAPIClient),
            )
        },
        **{name: repeat(calls[name]) for name in _CALLS},
        "plain call with a neighbour": repeat(with_neighbour(standin.PlainSyncAPIClient)),
        "call with a neighbour": repeat(with_neighbour(standin.SyncAPIClient)),
        "plain compact call": repeat(compact(standin.PlainSyncAPIClient)),
        "compact call": repeat(compact(standin.SyncAPIClient)),
        "plain call over WebSocket": repeat(over_websocket(id)),
        "call over WebSocket": repeat(over_websocket(standin.ResponsesConnection)),
        "call with baggage": with_baggage(repeat(calls["call"])),
        "call, no SDK": unheard(deaf, repeat(calls["call"])),
        "call, not sampled": unheard(unsampled, repeat(calls["call"])),
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
        for times in _TIMES:
            work(times)
            os.getloadavg()


if __name__ == "__main__":
    main()
