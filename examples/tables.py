"""What arrived over OTLP, as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from readings import Call, Readings, read_calls

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from embedded.otlp_receiver import ReceivedMetric, ReceivedSpan

OUTCOME_STYLES = {"completed": "green", "incomplete": "yellow", "closed": "cyan", "cancelled": "cyan"}
UNKNOWN = Text("-", style="dim")
# The columns of tokens that only a wide table has.
DETAILS = ("in", "out", "cached", "reasoning")
BAR_LENGTH = 36
# Columns of a terminal from which on a table may be wide.
WIDE = 114


def calls_table(spans: Iterable[ReceivedSpan], *, wide: bool) -> Table:
    """One row per Responses call, named by the application's span around it, and their sums.

    "last event" has the output tokens that the answer to the call itself told: in its last event, or in its
    body. A table that is not `wide` fits into 80 columns. It has only the output tokens of a span.
    """
    calls = read_calls(spans)
    readings = Readings.of(calls)
    table = _table(show_footer=True)
    table.add_column("call", "in all", no_wrap=True)
    table.add_column("outcome")
    table.add_column("deltas", f"{readings.deltas:,}", justify="right")
    table.add_column("last\nevent", f"{readings.last_events:,}", justify="right")
    for title in DETAILS if wide else ("out",):
        field = {"in": "input", "out": "output"}.get(title, title)
        total = sum(getattr(call, field) or 0 for call in calls)
        table.add_column(title if wide else "in its\nspan", f"{total:,}", justify="right")
    table.add_column("known from")
    table.add_column("look-up\n/ GETs")
    if wide:
        table.add_column("stream", justify="right")
    for call in calls:
        details = (call.input, call.output, call.cached, call.reasoning) if wide else (call.output,)
        row = [
            Text(call.name),
            _outcome(call.outcome),
            *map(_number, (call.deltas, call.last_event, *details)),
            _source(call.source, call.reason),
            _look_up(call),
        ]
        table.add_row(*row, *([f"{call.duration_s:.2f} s"] if wide else []))
        for fetch in call.fetches:
            # A fetch reports no tokens: they belong to the call that consumed them.
            row = [Text("└ fetched again"), _outcome(fetch.outcome), _number(fetch.deltas)]
            row += [UNKNOWN] * (2 + len(details)) + [Text()]
            table.add_row(*row, *([f"{fetch.duration_s:.2f} s"] if wide else []))
    return table


def readings_table(readings: Readings, billed: int) -> Table:
    """The output tokens as three readings have them and as the server billed them, with bars."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for title, tokens, style in (
        ("counting the deltas", readings.deltas, "red"),
        ("reading last events", readings.last_events, "blue"),
        ("telemetry", readings.telemetry, "green"),
        ("billed by the server", billed, "default"),
    ):
        bar = "█" * max(1, round(BAR_LENGTH * tokens / max(billed, 1)))
        table.add_row(f"  {title}", f"{tokens:,}", Text(bar, style=style))
    return table


def unknown_statement(readings: Readings, billed: int) -> str:
    """What telemetry says about the tokens that it does not have."""
    if not readings.unknown:
        return "Telemetry has every token that was billed."
    counts = Counter(readings.unknown)
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.items())
    calls = "1 call" if counts.total() == 1 else f"{counts.total()} calls"
    return f"The other {billed - readings.telemetry:,} are of {calls} whose spans say why: {reasons}."


def tokens_table(metrics: Mapping[str, ReceivedMetric]) -> Table:
    """The token usage metric, a row per operation and token type."""
    table = _table(title="gen_ai.client.token.usage")
    for title in ("operation", "tokens"):
        table.add_column(title)
    for title in ("calls", "sum"):
        table.add_column(title, justify="right")
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for point in metrics["gen_ai.client.token.usage"].points:
        # Points of another instrumentation may lack these attributes.
        key = point.attributes.get("gen_ai.operation.name", ""), point.attributes.get("gen_ai.token.type", "")
        count, total = sums.get(key, (0, 0))
        sums[key] = count + (point.count or 0), total + (point.sum or 0)
    for (operation, kind), (count, total) in sums.items():
        table.add_row(operation, kind, _number(count), _number(total))
    return table


def outcomes_table(metrics: Mapping[str, ReceivedMetric]) -> Table:
    """The calls metric, a row per series: from it the share of unmetered calls is known."""
    table = _table(title="openai_responses.calls")
    for title in ("outcome", "known from"):
        table.add_column(title)
    table.add_column("calls", justify="right")
    for point in metrics["openai_responses.calls"].points:
        told = point.attributes
        source = told.get("openai_responses.usage.source")
        reason = told.get("openai_responses.usage.missing_reason")
        outcome = _outcome(told["openai_responses.stream.outcome"])
        table.add_row(outcome, _source(source, reason), _number(point.value))
    return table


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


def _outcome(outcome: str) -> Text:
    return Text(outcome, style=OUTCOME_STYLES.get(outcome, "red")) if outcome else UNKNOWN


def _source(source: str | None, reason: str | None) -> Text:
    if source:
        return Text(source, style="green")
    return Text(reason, style="red") if reason else UNKNOWN


def _look_up(call: Call) -> Text:
    if call.look_up_s is None:
        return Text()
    return Text(f"{call.look_up_s:.2f} s / {call.gets}", style="dim")
