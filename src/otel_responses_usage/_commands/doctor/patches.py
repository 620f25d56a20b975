"""Checks of the functions that this package wraps in the SDK, and of what stands above them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from .findings import Area, Finding, find, fine
from .situation import Situation

_OURS: Final = "otel_responses_usage"
_TEST_CALLS: Final = 2


def check_patches(situation: Situation) -> Iterator[Finding]:
    """Check that the instrumentation is on, and that its wrappers are in place."""
    state = situation.state
    if situation.is_trial and situation.run is not None and situation.run.is_stopped:
        yield find(
            "test-call-late", f"Test calls until then: {situation.report.count('ended')} of {_TEST_CALLS}."
        )
    if situation.run is None or not state or situation.report.main is None:
        return
    if not state.get("instrumented"):
        # Without `openai` there is nothing to wrap, and other findings tell so.
        if state.get("openai"):
            what = "off" if state.get("package") else "not imported"
            yield find("not-instrumented", f"In the process of the calls this package is {what}.")
        return
    rows: list[dict[str, Any]] = state.get("patches") or []
    for row in rows:
        name = row["name"]
        above = sorted({module for module in row.get("above", ()) if not module.startswith(_OURS)})
        if not row["made"]:
            yield find("patch-missing", f"{name} is not there.")
        elif not row["in_place"]:
            by = f" by {', '.join(above)}" if above else ""
            yield find("patch-replaced", f"{name} was replaced{by}.")
        elif above:
            yield find("patch-covered", f"Above our wrapper of {name}: {', '.join(above)}.")
    for own in state.get("own_request") or ():
        if not own["module"].startswith("openai."):
            yield find("client-own-request", f"{own['name']} has a request of its own, from {own['module']}.")
    good = [row for row in rows if row["made"] and row.get("in_place")]
    if rows and len(good) == len(rows):
        yield fine(Area.PATCHES, "patches", f"{len(good)} wrappers are in place.")
    if situation.is_trial:
        yield from _check_test_calls(situation)


def _check_test_calls(situation: Situation) -> Iterator[Finding]:
    report = situation.report
    if not situation.state.get("has_sdk"):
        return  # nothing is recorded then, and a finding tells so
    if report.count("ended") >= _TEST_CALLS:
        yield fine(Area.PATCHES, "test-call", "A test call on loopback was recorded, sync and async.")
        return
    errors = [str(facts["message"]) for facts in report.all("failed") if facts["step"] == "call"]
    told = errors[0] if errors else f"{report.count('ended')} of {_TEST_CALLS} test calls were recorded."
    yield find("test-call-missed", told)
