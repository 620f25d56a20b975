"""One page about some calls, made from what arrived over OTLP alone; it loads nothing from anywhere."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from readings import REASONS, SOURCES, Call, Readings, read_calls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from embedded.otlp_receiver import ReceivedMetric, ReceivedSpan

STYLE = Path(__file__).with_name("page.css")
ICON = (
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><path fill='%230b6e63'"
    " d='M1 3h6v3H1zM1 7h9v3H1zM1 11h14v3H1z'/></svg>"
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Steps of the axis, in seconds; the first that leaves few enough lines is taken.
STEPS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
MOST_LINES = 6

ENDS = {
    "completed": "Read to the end",
    "incomplete": "Ended by the model before the text was complete",
    "failed": "Failed at the model",
    "error": "Failed",
    "cut": "The connection was lost",
    "truncated": "The stream stopped without a last event",
    "closed": "Closed by the application",
    "cancelled": "The reading task was cancelled",
    "abandoned": "Dropped by the application without a close",
    "exit": "Still open when the program ended",
}


def write(spans: Sequence[ReceivedSpan], metrics: Mapping[str, ReceivedMetric]) -> str:
    """Return the page as HTML."""
    calls = read_calls(spans)
    readings = Readings.of(calls)
    has_bodies = any(call.source == "response" for call in calls)
    title = f"What {len(calls)} calls cost, and how that is known"
    sections = [
        _header(title, spans, calls),
        _readings(readings, has_bodies=has_bodies),
        _timeline(calls, readings),
        _sources(calls),
        _metrics(calls, metrics),
    ]
    body = "\n".join("\n".join(section) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<!-- All that the page needs is in this file. -->
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="{ICON}">
<style>
{STYLE.read_text("utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _header(title: str, spans: Sequence[ReceivedSpan], calls: Sequence[Call]) -> Iterator[str]:
    began = datetime.fromtimestamp(min(span.start_ns for span in spans) / 1e9, timezone.utc)
    service = escape(str(spans[0].resource.get("service.name", "")))
    yield f"<header><h1>{escape(title)}</h1>"
    yield (
        f"<p>Made from {len(spans)} spans and their metrics, as they arrived over OTLP.{_kinds(spans, calls)}"
        f" Service <code>{service}</code>, {began:%d %B %Y, %H:%M} UTC.</p></header>"
    )


def _kinds(spans: Sequence[ReceivedSpan], calls: Sequence[Call]) -> str:
    """What the spans are, if not each of them is a call."""
    fetches = sum(len(call.fetches) for call in calls)
    others = len(spans) - len(calls) - fetches
    more = [f"{fetches} of a response that was fetched again"] if fetches else []
    more += [f"{others} of the application itself"] if others else []
    return f" {len(calls)} are of calls, {' and '.join(more)}." if more else ""


def _readings(readings: Readings, *, has_bodies: bool) -> Iterator[str]:
    streams = "A stream that was cut, closed or cancelled has no last event, so its tokens are missing."
    bodies = " The body of a call without a stream counts here, too." if has_bodies else ""
    unknown = len(readings.unknown)
    rest = f" {_calls(unknown)} could not be known, and {_their(unknown)} why." if unknown else ""
    rows = (
        ("Counting deltas", readings.deltas, "wrong", "A delta is a piece of text, and not a token."),
        ("Reading last events", readings.last_events, "partly", streams + bodies),
        (
            "In these spans",
            readings.telemetry,
            "known",
            f"Read from the stream, or looked up afterwards.{rest}",
        ),
    )
    most = max(1, *(tokens for _, tokens, _, _ in rows))
    yield '<section><h2>Output tokens, read in three ways</h2><ol class="readings">'
    for title, tokens, role, note in rows:
        width = f"{78 * tokens / most:.2f}%"
        yield (
            f'<li><span class="title">{title}</span><span class="bar">'
            f'<i class="{role}" style="width:{width}"></i><b>{tokens:,}</b></span><p>{note}</p></li>'
        )
    yield "</ol></section>"


def _timeline(calls: Sequence[Call], readings: Readings) -> Iterator[str]:
    axis = _Axis.over(calls)
    yield "<section><h2>Call by call</h2>"
    yield (
        '<p class="muted">Each call begins at 0. Its span ends when its stream ended for the application,'
        " however long the look-up took: a slow look-up never shows as latency.</p>"
    )
    yield '<ul class="legend">'
    for role, title in (
        ("wait", "waiting for the first piece"),
        ("stream", "stream"),
        ("end", "end of the span"),
        ("look-up", "look-up"),
        ("again", "fetched again by the application"),
    ):
        yield f'<li><i class="sample {role}"></i>{title}</li>'
    yield "</ul>"
    heads = "".join(f"<dd>{title}</dd>" for title in ("deltas", "last event", "in its span"))
    yield f'<div class="calls"><div class="head"><span></span><div class="axis">{axis.labels()}</div>'
    yield f'<dl class="numbers">{heads}</dl></div><ol>'
    for call in calls:
        yield from _call(call, axis)
    yield "</ol>"
    yield '<div class="call sum"><div class="named">All calls</div><div></div>'
    yield f"{_numbers(readings.deltas, readings.last_events, readings.telemetry)}</div></div></section>"


def _call(call: Call, axis: _Axis) -> Iterator[str]:
    first = min(call.first_chunk_s if call.first_chunk_s is not None else call.duration_s, call.duration_s)
    bars = [_bar("wait", axis, 0.0, first, "waiting for the first piece")]
    bars.append(_bar("stream", axis, first, call.duration_s, "stream"))
    if call.look_up_s is not None:
        bars.append(_bar("look-up", axis, call.duration_s, call.duration_s + call.look_up_s, "look-up"))
    bars.append(f'<i class="end" style="left:{axis.place(call.duration_s)}" title="end of the span"></i>')
    bars += [
        _bar("again", axis, fetch.began_s, fetch.began_s + fetch.duration_s, "fetched again")
        for fetch in call.fetches
    ]
    twice = " twice" if call.fetches else ""
    yield (
        f'<li class="call"><div class="named"><h3>{escape(call.name)}</h3>'
        f'<span class="outcome">{escape(call.outcome)}</span></div>'
        f'<div><div class="track{twice}">{axis.lines()}{"".join(bars)}</div>'
        f'<p class="story">{_story(call)}</p></div>'
        f"{_numbers(call.all_deltas if call.deltas is not None else None, call.last_event, call.output)}</li>"
    )


def _story(call: Call) -> str:
    """What happened, in a sentence or two."""
    end = ENDS.get(call.outcome, escape(call.outcome))
    if call.source == "response":
        end = "Answered in one piece"
    said = [f"{end} {'in' if call.outcome == 'completed' else 'after'} {_seconds(call.duration_s)}."]
    gets = "1 GET" if call.gets == 1 else f"{call.gets} GETs"
    after = f"{_seconds(call.look_up_s or 0.0)} after the end"
    match call.source or call.reason:
        case "stream":
            said.append("<em>Its last event has the usage.</em>")
        case "response":
            said.append("<em>The body has the usage.</em>")
        case "tail":
            said.append("<em>The last event was read in the background.</em>")
        case "retrieval":
            said.append(f"<em>Looked up: {gets}, answered {after}.</em>")
        case "observation":
            told = f", {after}" if call.look_up_s is not None else ""
            said.append(f"<em>The application fetched it again, and the last event had the usage{told}.</em>")
        case None:
            pass
        case reason:
            tried = f" after {gets} in {_seconds(call.look_up_s)}" if call.look_up_s is not None else ""
            why = escape(REASONS.get(reason, ""))
            said.append(f'<span class="why">Not known{tried}: <code>{escape(reason)}</code></span>, {why}.')
    if call.fetches and call.deltas is not None:
        again = call.all_deltas - call.deltas
        said.append(
            f"{call.all_deltas} deltas: {call.deltas} of the call, and {again} that were fetched again."
        )
    return " ".join(said)


def _numbers(deltas: int | None, last_event: int | None, output: int | None) -> str:
    cells = (("deltas", deltas, ""), ("last event", last_event, ""), ("in its span", output, ' class="ours"'))
    return (
        '<dl class="numbers">'
        + "".join(
            f"<div><dt>{title}</dt><dd{extra}>{_number(value)}</dd></div>" for title, value, extra in cells
        )
        + "</dl>"
    )


def _sources(calls: Sequence[Call]) -> Iterator[str]:
    known = Counter(call.source for call in calls if call.source)
    why = Counter(call.reason for call in calls if call.reason)
    inputs, outputs = Counter[str](), Counter[str]()
    for call in calls:
        if call.source:
            inputs[call.source] += call.input or 0
            outputs[call.source] += call.output or 0
    ordered = sorted(
        known, key=lambda source: list(SOURCES).index(source) if source in SOURCES else len(SOURCES)
    )
    yield "<section><h2>Tokens by source</h2>"
    yield '<p class="muted">Where the usage in each span comes from. Nothing here is an estimate.</p>'
    yield '<div class="share" role="img" aria-label="Output tokens by source">'
    for source in ordered:
        share = 100 * outputs[source] / max(1, outputs.total())
        title = f"{source}: {outputs[source]:,} output tokens"
        width = f"calc({share:.2f}% - 2px)"
        yield f'<i class="of-{escape(source)}" style="width:{width}" title="{escape(title)}"></i>'
    yield '</div><div class="scroll"><table class="sources">'
    yield '<thead><tr><th>source</th><th class="n">calls</th><th class="n">tokens in</th>'
    yield '<th class="n">tokens out</th><th>meaning</th></tr></thead><tbody>'
    for source in ordered:
        name = f'<i class="key of-{escape(source)}"></i><code class="source">{escape(source)}</code>'
        yield _source_row(name, known[source], inputs[source], outputs[source], SOURCES.get(source, ""))
    for reason, count in why.items():
        name = f'<i class="key"></i><code class="why">{escape(reason)}</code>'
        yield _source_row(name, count, None, None, REASONS.get(reason, ""))
    yield (
        f'</tbody><tfoot><tr><td>all</td><td class="n">{len(calls)}</td><td class="n">{inputs.total():,}</td>'
        f'<td class="n">{outputs.total():,}</td><td></td></tr></tfoot></table></div></section>'
    )


def _source_row(name: str, calls: int, tokens_in: int | None, tokens_out: int | None, meaning: str) -> str:
    return (
        f'<tr><td>{name}</td><td class="n">{calls}</td><td class="n">{_number(tokens_in)}</td>'
        f'<td class="n">{_number(tokens_out)}</td><td>{escape(meaning)}</td></tr>'
    )


def _metrics(calls: Sequence[Call], metrics: Mapping[str, ReceivedMetric]) -> Iterator[str]:
    usage = metrics.get("gen_ai.client.token.usage")
    if usage is None:
        return
    yield "<section><h2>The same tokens in the metrics</h2>"
    yield '<p class="muted">Dashboards and alerts use metrics. They are counted apart from the spans.</p>'
    yield '<div class="scroll"><table><thead><tr><th>tokens</th><th class="n">in the metric</th>'
    yield '<th class="n">in the spans</th><th></th></tr></thead><tbody>'
    for kind, spans in (
        ("input", sum(call.input or 0 for call in calls)),
        ("output", sum(call.output or 0 for call in calls)),
    ):
        points = [point for point in usage.points if point.attributes.get("gen_ai.token.type") == kind]
        counted = int(sum(point.sum or 0 for point in points))
        verdict = "equal" if counted == spans else f'<span class="why">{abs(counted - spans):,} apart</span>'
        yield (
            f'<tr><td>{kind}</td><td class="n">{counted:,}</td><td class="n">{spans:,}</td>'
            f'<td class="n">{verdict}</td></tr>'
        )
    yield '</tbody></table></div><p class="muted" style="margin-top:.75rem">The metric is'
    yield " <code>gen_ai.client.token.usage</code>.</p></section>"


class _Axis:
    """The time axis that all calls share."""

    def __init__(self, end_s: float, step_s: float) -> None:
        self._end_s = end_s
        self._ticks = [index * step_s for index in range(round(end_s / step_s) + 1)]

    @classmethod
    def over(cls, calls: Iterable[Call]) -> _Axis:
        over_s = max((call.over_s for call in calls), default=0.0) or STEPS[0]
        step_s = next((step for step in STEPS if over_s <= MOST_LINES * step), over_s)
        return cls(step_s * -(-over_s // step_s), step_s)

    def share(self, seconds: float) -> float:
        return 100 * seconds / self._end_s

    def place(self, seconds: float) -> str:
        return f"{self.share(seconds):.2f}%"

    def lines(self) -> str:
        return "".join(f'<i class="line" style="left:{self.place(tick)}"></i>' for tick in self._ticks)

    def labels(self) -> str:
        return "".join(f'<span style="left:{self.place(tick)}">{tick:g} s</span>' for tick in self._ticks)


def _bar(role: str, axis: _Axis, begin: float, end: float, title: str) -> str:
    width = axis.place(end - begin)
    text = f"{title}: {_seconds(end - begin)}"
    return f'<i class="{role}" style="left:{axis.place(begin)};width:{width}" title="{escape(text)}"></i>'


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.995 else f"{seconds:.2f} s"


def _number(value: int | None) -> str:
    return '<span class="none" title="not known from this">–</span>' if value is None else f"{value:,}"  # noqa: RUF001


def _calls(number: int) -> str:
    return "1 call" if number == 1 else f"{number} calls"


def _their(number: int) -> str:
    return "its span says" if number == 1 else "their spans say"
