"""What arrived over OTLP, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from embedded.otlp_receiver import ReceivedMetric, ReceivedSpan

SCOPE = "otel_responses_usage"
OUTCOME_STYLES = {"completed": "green", "incomplete": "yellow", "closed": "cyan"}
COUNTS = {
    "deltas": "openai_responses.stream.deltas",
    "in": "gen_ai.usage.input_tokens",
    "out": "gen_ai.usage.output_tokens",
    "cached": "gen_ai.usage.cache_read.input_tokens",
    "reasoning": "gen_ai.usage.reasoning.output_tokens",
}
UNKNOWN = Text("-", style="dim")


def calls_table(spans: Iterable[ReceivedSpan], *, wide: bool) -> Table:
    """One row per Responses call, named by the application's span around it, and their sums.

    Unless there is room for it to be `wide`, the outcome is below the name, the look-up below the source.
    """
    spans = list(spans)
    names = {span.span_id: span.name for span in spans}
    table = _table(show_footer=True)
    table.add_column("call" if wide else "call\noutcome", "in all", no_wrap=True)
    if wide:
        table.add_column("outcome")
    for title, attribute in COUNTS.items():
        table.add_column(title, f"{total(spans, attribute):,}", justify="right")
    table.add_column("usage from" if wide else "usage from\nlook-up")
    if wide:
        table.add_column("look-up / GETs")
    table.add_column("stream", justify="right")
    for span in sorted(responses_spans(spans), key=lambda span: span.start_ns):
        told = span.attributes
        # A fetch reports no tokens: they belong to the call that consumed them.
        fetch = told["gen_ai.operation.name"] == "fetch_response"
        name = Text("└ fetched again" if fetch else names.get(span.parent_id, span.name))
        outcome = _outcome(told.get("openai_responses.stream.outcome"))
        counts = [_number(told.get(attribute)) for attribute in COUNTS.values()]
        source = UNKNOWN if fetch else _source(told)
        stream = f"{span.duration_s:.2f} s"
        if wide:
            table.add_row(name, outcome, *counts, source, _look_up(told), stream)
        else:
            below = Text("\n")
            table.add_row(below.join([name, outcome]), *counts, below.join([source, _look_up(told)]), stream)
    return table


def tokens_table(metrics: Mapping[str, ReceivedMetric]) -> Table:
    """The token usage metric, a row per series."""
    table = _table(title="gen_ai.client.token.usage")
    for title in ("model", "tokens"):
        table.add_column(title)
    for title in ("calls", "sum"):
        table.add_column(title, justify="right")
    for point in metrics["gen_ai.client.token.usage"].points:
        told = point.attributes
        model, kind = told["gen_ai.request.model"], told["gen_ai.token.type"]
        table.add_row(model, kind, _number(point.count), _number(point.sum))
    return table


def outcomes_table(metrics: Mapping[str, ReceivedMetric]) -> Table:
    """The calls metric, a row per series: from it the share of unmetered calls is known."""
    table = _table(title="openai_responses.calls")
    for title in ("outcome", "usage from"):
        table.add_column(title)
    table.add_column("calls", justify="right")
    for point in metrics["openai_responses.calls"].points:
        told = point.attributes
        outcome = _outcome(told["openai_responses.stream.outcome"])
        table.add_row(outcome, _source(told), _number(point.value))
    return table


def responses_spans(spans: Iterable[ReceivedSpan]) -> list[ReceivedSpan]:
    """The spans of the instrumentation alone."""
    return [span for span in spans if span.scope.name == SCOPE]


def total(spans: Iterable[ReceivedSpan], attribute: str) -> int:
    """The sum of an attribute over the spans that have it."""
    return sum(span.attributes.get(attribute, 0) for span in responses_spans(spans))


def _table(title: str | None = None, *, show_footer: bool = False) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="bold",
        footer_style="bold",
        show_footer=show_footer,
    )


def _number(value: float | None) -> Text:
    return UNKNOWN if value is None else Text(f"{value:,.0f}")


def _outcome(outcome: str | None) -> Text:
    return UNKNOWN if outcome is None else Text(outcome, style=OUTCOME_STYLES.get(outcome, "red"))


def _source(told: Mapping[str, Any]) -> Text:
    if source := told.get("openai_responses.usage.source"):
        return Text(source, style="green")
    return Text(str(told.get("openai_responses.usage.missing_reason")), style="red")


def _look_up(told: Mapping[str, Any]) -> Text:
    attempts = told.get("openai_responses.retrieval.attempts")
    if not attempts:
        return Text()
    return Text(f"{told['openai_responses.retrieval.duration']:.2f} s / {attempts}", style="dim")
