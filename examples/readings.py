"""What spans tell about the calls of a program, and what poorer readings would have told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from embedded.otlp_receiver import ReceivedSpan

SCOPE = "otel_responses_usage"
# The sources that need nothing but the answer to the call itself.
OWN_ANSWER = frozenset({"stream", "response"})

SOURCES = {
    "stream": "the last event of the stream",
    "response": "the body of a call without a stream",
    "tail": "the last event, read in the background after the application had closed the stream",
    "retrieval": "a look-up: GET /responses/{id}, sent after the stream had ended",
    "observation": "the application itself, which fetched the response again",
}
REASONS = {
    "no_response_id": "no event with the id of the response arrived",
    "not_stored": "the call has store=False, so the server keeps nothing that could be looked up",
    "deferred": "the response may take hours, and its span does not stay open so long",
    "not_found": "the server does not have the response",
    "unauthorized": "the server refused the key",
    "unsupported": "the server has no route for look-ups",
    "no_usage": "the response ended without usage",
    "timeout": "the response did not end in time",
    "transport_error": "no look-up reached the server",
    "overload": "too many calls were waiting for their usage",
    "circuit_open": "look-ups at this server had failed too often",
    "disabled": "look-ups are switched off",
    "shutdown": "the program ended first",
}


@dataclass(frozen=True)
class Fetch:
    """A response that the application fetched again as a stream; times in seconds since its call began."""

    began_s: float
    duration_s: float
    outcome: str
    deltas: int


@dataclass(frozen=True)
class Call:
    """One call, as its span tells it. Times are in seconds; what the span does not have is None."""

    name: str
    operation: str | None
    model: str
    outcome: str
    deltas: int | None
    input: int | None
    output: int | None
    cached: int | None
    reasoning: int | None
    source: str | None
    reason: str | None
    duration_s: float
    first_chunk_s: float | None
    gets: int
    look_up_s: float | None
    fetches: tuple[Fetch, ...] = ()

    @property
    def last_event(self) -> int | None:
        """The output tokens that the answer to the call itself had in its last event, or in its body."""
        return self.output if self.source in OWN_ANSWER else None

    @property
    def all_deltas(self) -> int:
        """The deltas of the call, and of the streams that fetched it again."""
        return (self.deltas or 0) + sum(fetch.deltas for fetch in self.fetches)

    @property
    def over_s(self) -> float:
        """When the call, its look-up and its fetches were over, in seconds since it began."""
        ends = [fetch.began_s + fetch.duration_s for fetch in self.fetches]
        return max(self.duration_s + (self.look_up_s or 0.0), *ends, 0.0)


@dataclass(frozen=True)
class Readings:
    """The output tokens of some calls, read in three ways."""

    deltas: int
    last_events: int
    telemetry: int
    unknown: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, calls: Iterable[Call]) -> Readings:
        """Add up; `unknown` has the reason of each call whose tokens telemetry does not have."""
        calls = list(calls)
        return cls(
            deltas=sum(call.all_deltas for call in calls),
            last_events=sum(call.last_event or 0 for call in calls),
            telemetry=sum(call.output or 0 for call in calls),
            unknown=tuple(call.reason for call in calls if call.reason),
        )


def read_calls(spans: Iterable[ReceivedSpan]) -> list[Call]:
    """The Responses calls in the order of their start, named by the span around each.

    Beside another instrumentation a call that ended early has a usage span, which has no operation. A whole
    call has no span of this package there.
    """
    spans = sorted(spans, key=lambda span: span.start_ns)
    names = {span.span_id: span.name for span in spans}
    ours = [span for span in spans if span.scope.name == SCOPE and _is_call(span)]
    fetches = [span for span in ours if _is_fetch(span)]
    calls = []
    for span in ours:
        if not _is_fetch(span):
            again = [fetch for fetch in fetches if _response_id(fetch) == _response_id(span)]
            fetches = [fetch for fetch in fetches if fetch not in again]
            calls.append(_call(span, names, tuple(_fetch(fetch, span) for fetch in again)))
    # Another program may have made the call that is fetched here.
    return calls + [_call(span, names, ()) for span in fetches]


def _call(span: ReceivedSpan, names: Mapping[str, str], fetches: tuple[Fetch, ...]) -> Call:
    told: Mapping[str, Any] = span.attributes
    return Call(
        name=names.get(span.parent_id, span.name),
        operation=told.get("gen_ai.operation.name"),
        model=told.get("gen_ai.request.model", ""),
        outcome=told.get("openai_responses.stream.outcome", ""),
        deltas=told.get("openai_responses.stream.deltas"),
        input=told.get("gen_ai.usage.input_tokens"),
        output=told.get("gen_ai.usage.output_tokens"),
        cached=told.get("gen_ai.usage.cache_read.input_tokens"),
        reasoning=told.get("gen_ai.usage.reasoning.output_tokens"),
        source=told.get("openai_responses.usage.source"),
        reason=told.get("openai_responses.usage.missing_reason"),
        duration_s=span.duration_s,
        first_chunk_s=told.get("gen_ai.response.time_to_first_chunk"),
        gets=told.get("openai_responses.retrieval.attempts", 0),
        look_up_s=told.get("openai_responses.retrieval.duration"),
        fetches=fetches,
    )


def _fetch(span: ReceivedSpan, call: ReceivedSpan) -> Fetch:
    return Fetch(
        began_s=(span.start_ns - call.start_ns) / 1e9,
        duration_s=span.duration_s,
        outcome=span.attributes.get("openai_responses.stream.outcome", ""),
        deltas=span.attributes.get("openai_responses.stream.deltas", 0),
    )


def _is_call(span: ReceivedSpan) -> bool:
    # The test span of `doctor` has the same scope, and no outcome.
    return "openai_responses.stream.outcome" in span.attributes


def _is_fetch(span: ReceivedSpan) -> bool:
    return bool(span.attributes.get("gen_ai.operation.name") == "fetch_response")


def _response_id(span: ReceivedSpan) -> str | None:
    return span.attributes.get("gen_ai.response.id")
