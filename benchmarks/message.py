"""What a message of a WebSocket costs, apart from everything else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from openai.resources.responses.responses import AsyncResponsesConnection, ResponsesConnection

from .clock import added, paired
from .event import GOALS_NS
from .instrumented import instrumented
from .pieces import answer
from .row import Row
from .telemetry import Told
from .websocket import CREATE, AsyncSocket, Socket


def rows(*, quick: bool) -> list[Row]:
    """Measure a message, sync and async, and one of a lane with a name."""
    count, rounds = (2_000, 3) if quick else (20_000, 25)
    with instrumented(**Told().providers):
        one = _added(None, count, rounds)
        lane = _added("lane", count // 4, rounds)
    return [
        Row(f"added per message of {what}", found[how], goal_ns, "ns", how=how)
        for what, found in (("a WebSocket", one), ("a named lane of a WebSocket", lane))
        for how, goal_ns in GOALS_NS.items()
    ]


def _added(lane: str | None, count: int, rounds: int) -> dict[str, float]:
    works: dict[str, Callable[[], object]] = {}
    for size in (count // 10, count):
        works |= _works(lane, size)
    costs = paired(works, rounds)

    def per_message(name: str) -> float:
        both = (added(costs, f"{name} {size}", f"plain {name} {size}") for size in (count, count // 10))
        return (next(both) - next(both)) / (count - count // 10)

    return {name: per_message(name) for name in ("sync", "async")}


def _works(lane: str | None, size: int) -> dict[str, Callable[[], object]]:
    named = {} if lane is None else {"stream_id": lane}
    events = answer(size).events({"stream_options": {"include_obfuscation": False}})
    messages = [json.dumps({**event, **named}, separators=(",", ":")).encode() for event in events]
    create = json.dumps({**CREATE, **named})

    def sync(make: Callable[[Any], object]) -> None:
        socket = Socket(messages)
        kept = make(socket)
        socket.send(create)
        recv = socket.recv
        for _ in messages:
            recv(decode=False)
        del kept

    async def read(make: Callable[[Any], object]) -> None:
        socket = AsyncSocket(messages)
        kept = make(socket)
        await socket.send(create)
        recv = socket.recv
        for _ in messages:
            await recv(decode=False)
        del kept

    return {
        f"plain sync {size}": lambda: sync(id),
        f"sync {size}": lambda: sync(ResponsesConnection),
        f"plain async {size}": lambda: asyncio.run(read(id)),
        f"async {size}": lambda: asyncio.run(read(AsyncResponsesConnection)),
    }
