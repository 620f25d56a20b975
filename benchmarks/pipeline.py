"""The cost of events and calls inside of the real SDK, in lockstep with the SDK alone: see `lockstep`."""

from __future__ import annotations

import sys

from . import peers, pieces
from .row import Row


def rows(*, quick: bool) -> list[Row]:
    """Measure an event for each division of the bytes, and a call beside the same span and points by hand."""
    found = peers.measure("ours", sys.executable, quick=quick)
    rows = []
    for how in peers.HOW:
        for division in pieces.DIVISIONS:
            cost = _known(found.event(division, how))
            what = f"added per event in the real SDK, {division}"
            rows.append(Row(what, cost.value, 1_000, "ns", f"error {cost.spread:.0f} ns", how))
    for how in peers.HOW:
        call, by_hand = _known(found.call(how)), _known(found.call(how, by_hand=True))
        rows.append(
            Row(
                "added per call of 9 events in the real SDK",
                call.value / by_hand.value,
                2,
                "x",
                f"by hand {by_hand.value / 1000:.0f} us",
                how,
            )
        )
    return rows


def _known(cost: peers.Cost | None) -> peers.Cost:
    if cost is None:
        raise RuntimeError("the instrumentation has failed")
    return cost
