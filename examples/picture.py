"""The table of calls as an SVG: no fonts or files from elsewhere, readable in the column of a README."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Literal, TypeAlias

from readings import Call, Readings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Theme: TypeAlias = Literal["light", "dark", "auto"]

# Colours by role: text, text of less weight, lines, the page, and the three readings.
LIGHT = {
    "ink": "#1f1d1a",
    "muted": "#68635c",
    "line": "#e2ddd5",
    "paper": "#fbfaf8",
    "known": "#0b6e63",
    "partly": "#3f6fb5",
    "wrong": "#a8a197",
    "trouble": "#9f2f1c",
}
DARK = {
    "ink": "#ece8e1",
    "muted": "#a8a197",
    "line": "#3a3732",
    "paper": "#181715",
    "known": "#66cdbd",
    "partly": "#7ba7e8",
    "wrong": "#7d776d",
    "trouble": "#f2a08f",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"

WIDTH, MARGIN = 780, 24
BARS_TOP, BAR_ROW, BAR_FROM, BAR_LENGTH = 76, 32, 190, 370
ROW, SIZE = 27, 15
# Where each column is aligned: text begins there, numbers end there.
NAME, OUTCOME, DELTAS, LAST, SPAN, SOURCE, LOOK_UP = 24, 174, 318, 400, 486, 514, 622

NOTE = (
    "last event: what the answer to the call itself told. All of this is from spans that arrived over OTLP."
)


def draw(calls: Sequence[Call], theme: Theme = "auto") -> str:
    """Return the SVG; with the theme "auto" it follows the colour scheme of the reader."""
    readings = Readings.of(calls)
    top = BARS_TOP + 3 * BAR_ROW + 36
    height = top + 34 + ROW * (sum(1 + len(call.fetches) for call in calls) + 1) + 44
    summary = (
        f"Output tokens of {len(calls)} calls: {readings.deltas:,} by counting deltas,"
        f" {readings.last_events:,} by reading last events, {readings.telemetry:,} in spans."
    )
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(summary)}">',
        f"<title>{escape(summary)}</title>",
        f"<style>{_style(theme)}</style>",
        f'<rect class="paper" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        *_bars(readings, len(calls)),
        *_table(calls, readings, top),
        _text(MARGIN, height - 20, NOTE, "muted s"),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _style(theme: Theme) -> str:
    fixed = (
        f"text{{font:{SIZE}px {FONT};font-variant-numeric:tabular-nums}}"
        ".n{text-anchor:end}.b{font-weight:600}.h{font-size:20px;font-weight:600}.s{font-size:13px;font-weight:400}"
    )
    if theme == "auto":
        return f"{fixed}{_colours(LIGHT)}@media (prefers-color-scheme:dark){{{_colours(DARK)}}}"
    return fixed + _colours(DARK if theme == "dark" else LIGHT)


def _colours(theme: dict[str, str]) -> str:
    roles = "".join(f".{role}{{fill:{theme[role]}}}" for role in theme if role not in {"line", "paper"})
    return f".paper{{fill:{theme['paper']};stroke:{theme['line']}}}.line{{stroke:{theme['line']}}}{roles}"


def _bars(readings: Readings, number: int) -> Iterator[str]:
    yield _text(MARGIN, 40, f"Output tokens of {number} calls, read in three ways", "ink h")
    most = max(readings.telemetry, readings.last_events, readings.deltas, 1)
    unknown = len(readings.unknown)
    calls = "1 call" if unknown == 1 else f"{unknown} calls"
    notes = ("", "", f"+ {calls} unknown" if unknown else "")
    rows = (
        ("counting deltas", readings.deltas, "wrong"),
        ("reading last events", readings.last_events, "partly"),
        ("in these spans", readings.telemetry, "known"),
    )
    for index, ((title, tokens, role), note) in enumerate(zip(rows, notes, strict=True)):
        y = BARS_TOP + index * BAR_ROW
        length = max(2.0, BAR_LENGTH * tokens / most)
        yield _text(MARGIN, y + 5, title, "ink")
        yield f'<rect class="{role}" x="{BAR_FROM}" y="{y - 9}" width="{length:.1f}" height="18" rx="3"/>'
        note = f'<tspan class="trouble s" dx="8">{note}</tspan>' if note else ""
        yield f'<text class="ink b" x="{BAR_FROM + length + 10:.1f}" y="{y + 6}">{tokens:,}{note}</text>'


def _table(calls: Sequence[Call], readings: Readings, top: int) -> Iterator[str]:
    y = top
    yield _text(NAME, y, "call", "muted s")
    yield _text(OUTCOME, y, "outcome", "muted s")
    for x, title in ((DELTAS, "deltas"), (LAST, "last event"), (SPAN, "in its span")):
        yield _text(x, y, title, "muted s n")
    yield _text(SOURCE, y, "known from", "muted s")
    yield _text(LOOK_UP, y, "look-up", "muted s")
    yield _rule(y + 10)
    y += 5
    for call in calls:
        y += ROW
        yield from _row(y, call)
        for fetch in call.fetches:
            y += ROW
            yield _text(NAME + 14, y, "fetched again", "muted")
            yield _text(OUTCOME, y, fetch.outcome, "muted")
            yield _text(DELTAS, y, f"{fetch.deltas:,}", "muted n")
    yield _rule(y + 12)
    y += ROW + 7
    yield _text(NAME, y, "in all", "ink b")
    totals = ((DELTAS, readings.deltas), (LAST, readings.last_events), (SPAN, readings.telemetry))
    for x, total in totals:
        yield _text(x, y, f"{total:,}", "ink b n")


def _row(y: int, call: Call) -> Iterator[str]:
    yield _text(NAME, y, call.name, "ink")
    yield _text(OUTCOME, y, call.outcome, "muted")
    for x, value in ((DELTAS, call.deltas), (LAST, call.last_event)):
        yield _number(x, y, value, "muted")
    yield _number(SPAN, y, call.output, "ink b")
    yield _text(SOURCE, y, call.source or call.reason or "", "known" if call.source else "trouble")
    if call.look_up_s is not None:
        gets = "1 GET" if call.gets == 1 else f"{call.gets} GETs"
        yield _text(LOOK_UP, y, f"{gets} in {_seconds(call.look_up_s)}", "muted")


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _number(x: float, y: float, value: int | None, classes: str) -> str:
    if value is None:
        return _text(x, y, "–", "muted n")  # noqa: RUF001 - a dash, as is usual in tables
    return _text(x, y, f"{value:,}", f"{classes} n")


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _rule(y: float) -> str:
    return f'<path class="line" d="M{MARGIN} {y + 0.5:g}H{WIDTH - MARGIN}"/>'
