"""Checks of the calls that the application made under `--run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .findings import Area, Finding, find, fine
from .situation import Situation

# What each reason calls for, in a few words.
REASONS = {
    "no_response_id": "refused, or ended before the server named the response",
    "not_stored": "the request or the server has store=False",
    "deferred": "a completion window of hours",
    "not_found": "the server does not know the response any more; background=True keeps it",
    "unauthorized": "the key may not read responses",
    "unsupported": "the server has no look-ups",
    "no_usage": "the response ended without usage",
    "timeout": "the response had not ended in time",
    "transport_error": "no connection to the server for the look-up",
    "overload": "too many look-ups at once",
    "circuit_open": "look-ups stopped after five failures in a row",
    "disabled": "OTEL_RESPONSES_USAGE_RETRIEVAL is off",
    "shutdown": "the process ended first",
}


def check_calls(situation: Situation) -> Iterator[Finding]:
    """Check that every call was recorded, and with its usage."""
    report, state = situation.report, situation.state
    if situation.run is None or situation.is_trial or not report.all_processes:
        return
    if not report.count("openai") and not state.get("openai"):
        yield find("openai-unused", "The application did not import openai.")
        return
    apis = Counter(str(facts["api"]) for facts in report.all("request"))
    if apis:
        yield find(
            "other-api", "Requests: " + ", ".join(f"{count} to {api}" for api, count in apis.items()) + "."
        )
    opened, ended = report.count("opened"), report.count("ended")
    made = max(report.calls_made, opened)  # calls over a WebSocket are seen as opened only
    if not made:
        yield find("no-calls", "No Responses call was made.")
        return
    suppressed = sum(bool(facts["suppressed"]) for facts in report.all("call"))
    if suppressed and opened < made:
        yield find(
            "calls-suppressed", f"Responses calls: {made}. With instrumentation suppressed: {suppressed}."
        )
    missed = made - opened - (suppressed if opened < made else 0)
    if missed > 0:
        yield find("calls-missed", f"Responses calls: {made}. Not recorded: {missed}.{_cause(situation)}")
    if opened > ended:
        yield find("calls-open", f"Calls begun: {opened}. Ended: {ended}.")
    reasons = report.reasons
    for reason, count in reasons.items():
        yield find(
            "usage-unknown", f"Calls ended: {ended}. Without usage, {reason}: {count} ({REASONS[reason]})."
        )
    known = ended - sum(reasons.values())
    if known and not missed > 0:
        yield fine(Area.CALLS, "calls", f"Responses calls: {made}. With their usage: {known}.")


def _cause(situation: Situation) -> str:
    state = situation.state
    if not state.get("package"):
        return " The package was not imported."
    if not state.get("instrumented"):
        return " The instrumentation was off at the first call."
    if not state.get("has_sdk"):
        return " There was no provider of the SDK at the first call."
    return ""
