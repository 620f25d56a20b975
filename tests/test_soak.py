"""The soak itself: a short one passes, and it says what differs."""

from __future__ import annotations

from collections import Counter

from soak import USES, Result, State, soak
from traffic import show


def test_a_short_soak_accounts_for_everything() -> None:
    """Calls of all kinds are accounted for. Memory is for longer runs: at first all caches fill up."""
    result = soak(0.1)
    show(str(result))
    assert [fault for fault in result.faults if "memory" not in fault] == []
    assert set(result.calls) == set(USES)


def test_whatever_differs_is_a_fault() -> None:
    """Sums that are not the same, memory that has grown, and spans that are wrong."""
    before = State(megabytes=100.0, blocks=1000, threads=1, descriptors=7)
    after = State(megabytes=130.0, blocks=3000, threads=1, descriptors=7)
    same = {"calls made, spans": (3, 3), "descriptors before, after": (7, 8)}
    result = Result(1.0, same, before, after, Counter(whole=100), ["a span is wrong"])
    assert len(result.faults) == 4
    assert str(result).count("DIFFERS") == 4
    result = Result(1.0, {"calls made, spans": (3, 3)}, before, before, Counter(whole=100), [])
    assert result.faults == []
