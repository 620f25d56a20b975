"""What events and calls cost in the whole of the real SDK."""

from __future__ import annotations

from statistics import median
from typing import Any, Final

import openai

from . import pieces
from .call import AT_START
from .clock import added, alternating, paired
from .instrumented import instrumented
from .one import rows_of
from .row import Row
from .sdk import Work, async_reader, reader
from .telemetry import Told, by_hand

_KINDS: Final = (("sync", reader, openai.OpenAI), ("async", async_reader, openai.AsyncOpenAI))


def rows(*, quick: bool) -> list[Row]:
    """Say what share our cost of an event is of the SDK's own, and measure what it adds in there."""
    isolated = {row.what: row.result for row in rows_of("event", quick=quick)}
    events, rounds = (100, 3) if quick else (1_000, 25)
    short, long = pieces.whole(pieces.SHORT), pieces.whole(pieces.SHORT + events)
    found = []
    for how, read, watched in _KINDS:
        plain = _unwatched(watched)
        with instrumented(**Told().providers):
            costs = paired(
                {
                    "short": read(short, plain),
                    "long": read(long, plain),
                    "ours short": read(short, watched),
                    "ours long": read(long, watched),
                },
                rounds,
            )
        own, ours = _per_event(costs, "", events), _per_event(costs, "ours ", events)
        found += [
            Row(
                f"isolated cost of an event as a share of the SDK's own {median(own) / 1000:,.0f} us, {how}",
                100 * isolated[f"added per event, {how}"] / median(own),
                0.5,
                "%",
            ),
            Row(
                f"added per event in the real SDK, {how}",
                median(mine - theirs for mine, theirs in zip(ours, own, strict=True)),
                None,
                "ns",
            ),
        ]
    return found + _calls(short, 30 if quick else 1_000)


def _per_event(costs: dict[str, list[int]], prefix: str, events: int) -> list[float]:
    """Return what an event costs by each round: what a long stream takes longer than a short one."""
    pairs = zip(costs[f"{prefix}long"], costs[f"{prefix}short"], strict=True)
    return [(long - short) / events for long, short in pairs]


def _calls(stream: list[bytes], rounds: int) -> list[Row]:
    """Compare calls watched, unwatched, and unwatched with their span and points by hand after them.

    So the work by hand finds the processor's caches as ours finds them: filled with the SDK's own.
    """
    found = []
    for how, read, watched in _KINDS:
        ours, unwatched = read(stream, watched), read(stream, _unwatched(watched))
        told = Told()
        with instrumented(**told.providers):
            ours()
            tell = by_hand(told.attributes, told.points(), AT_START)
            works = {"ours": ours, "plain": unwatched, "by hand": _both(unwatched, tell)}
            costs = alternating(works, rounds)
        added_us, hand_us = (added(costs, name, "plain") / 1000 for name in ("ours", "by hand"))
        what = f"added per call of {len(stream)} events in the real SDK, {how} (by hand {hand_us:.0f} us)"
        found.append(Row(what, added_us, None, "us"))
    return found


def _unwatched(client_class: Any) -> Any:
    """Return the client with the methods that it has before they are wrapped."""
    names = ("request", "_process_response")
    return type("Plain", (client_class,), {name: getattr(client_class, name) for name in names})


def _both(read: Work, tell: Work) -> Work:
    def both() -> None:
        read()
        tell()

    return both
