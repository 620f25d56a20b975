"""Writes a comparison as text of 80 columns, or as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .reconcile_compare import Cause, Cell, Comparison, Explanation
from .reconcile_facts import Counts, TimeRange, utc

_WIDTH: Final = 80
_MAX_LINES: Final = 40

_ROWS: Final = (
    ("requests", "requests"),
    ("input tokens", "input_tokens"),
    ("  of which cached", "cached_tokens"),
    ("output tokens", "output_tokens"),
    ("web searches", "web_searches"),
)

# What a part of the difference belongs to, after the number of calls.
_CAUSES: Final = {
    Cause.UNMETERED: "without usage ({reasons})",
    Cause.UNWATCHED: (
        "that Prometheus never counted: of a service without this package, of another program with a key of "
        "the same project, of a process that ended before its last export, or at the end of the range"
    ),
    Cause.LATE: "from before the range, whose usage became known in it",
    Cause.SURPLUS: (
        "that the provider does not have here: at the borders of the range, of another project, or not yet "
        "in its record"
    ),
    Cause.SEVERAL: "of more than one of these kinds in the same bucket",
    Cause.NONE: "no missing call: both records have the same calls with other tokens",
}


@dataclass(frozen=True)
class Border:
    """What Prometheus counted just after a bound of the range.

    Attributes:
        time: The bound.
        window_s: How long after it, in seconds.
        calls: The calls that were counted.
        tokens: Their tokens.

    """

    time: int
    window_s: int
    calls: int
    tokens: int


@dataclass(frozen=True)
class Bound:
    """The largest difference that is accepted: a number of tokens, or a share of all tokens."""

    tokens: int | None = None
    share: float | None = None

    def holds(self, comparison: Comparison) -> bool:
        """Return whether the difference is within the bound."""
        if self.share is not None:
            return comparison.share <= self.share
        return comparison.missed <= (self.tokens or 0)

    def __str__(self) -> str:
        """Return the bound as the user writes it."""
        return (
            f"{self.share:.4%}".rstrip("0%").rstrip(".") + " %"
            if self.share
            else f"{self.tokens or 0:,} tokens"
        )


@dataclass(frozen=True)
class Report:
    """A comparison, and all that is said about it."""

    time_range: TimeRange
    comparison: Comparison
    borders: Sequence[Border]
    bound: Bound
    notes: Sequence[str]

    def text(self) -> str:
        """Return the report as text."""
        return "\n".join(line.rstrip() for line in self._lines())

    def json(self) -> dict[str, Any]:
        """Return the report as an object for JSON. Unknown counts are null."""
        time_range, comparison = self.time_range, self.comparison
        return {
            "from": _iso(time_range.start),
            "to": _iso(time_range.end),
            "bucket_s": time_range.bucket_s,
            "difference_tokens": comparison.missed,
            "difference_share": comparison.share,
            "within_bound": self.bound.holds(comparison),
            "models": {model: _cell_json(cell) for model, cell in comparison.models.items()},
            "buckets": [
                {"start": _iso(time_range.start_of(bucket)), "model": model, **_cell_json(cell)}
                for model, cells in comparison.cells.items()
                for bucket, cell in cells.items()
            ],
            "explanations": [
                {
                    "cause": part.cause.value,
                    "tokens": part.tokens,
                    "calls": part.calls,
                    "missing_reasons": dict(part.reasons),
                    "input_count": part.input_count,
                }
                for part in comparison.explanations
            ],
            "batch": comparison.batch._asdict(),
            "borders": [
                {
                    "time": _iso(border.time),
                    "window_s": border.window_s,
                    "calls": border.calls,
                    "tokens": border.tokens,
                }
                for border in self.borders
            ],
            "notes": list(self.notes),
        }

    def _lines(self) -> Iterator[str]:
        time_range, comparison = self.time_range, self.comparison
        hours = time_range.bucket_s // 3600
        yield f"Token usage from {utc(time_range.start)} to {utc(time_range.end)} UTC"
        yield f"Buckets: {time_range.buckets} of {hours} h"
        for model, cell in comparison.models.items():
            yield ""
            yield from _wrapped(model)
            yield f"  {'':<18}{'provider':>17}{'Prometheus':>17}{'difference':>17}"
            yield from _table(cell)
        yield from self._differing_buckets()
        yield from self._explained()
        yield from self._at_the_borders()
        if self.notes:
            yield ""
            yield "Notes"
            for note in self.notes:
                yield from _wrapped(note, "- ")
        yield ""
        verdict = "within" if self.bound.holds(comparison) else "above"
        yield from _wrapped(
            f"Difference: {comparison.missed:,} tokens, {_percent(comparison.share)} of all. "
            f"This is {verdict} the bound of {self.bound}."
        )

    def _differing_buckets(self) -> Iterator[str]:
        rows = [
            (bucket, model, cell.difference)
            for model, cells in self.comparison.cells.items()
            for bucket, cell in cells.items()
            if any(cell.difference[:3])
        ]
        if not rows:
            return
        yield ""
        yield "Buckets with a difference"
        yield f"  {'begins (UTC)':<18}{'model':<27}{'requests':>9}{'input':>12}{'output':>12}"
        for bucket, model, difference in sorted(rows)[:_MAX_LINES]:
            name = model if len(model) <= 26 else f"{model[:23]}..."  # the column's width
            yield (
                f"  {utc(self.time_range.start_of(bucket)):<18}{name:<27}{difference.requests:>9,}"
                f"{difference.input_tokens:>12,}{difference.output_tokens:>12,}"
            )
        if len(rows) > _MAX_LINES:
            yield f"  ... and {len(rows) - _MAX_LINES} more. --json has all of them."

    def _explained(self) -> Iterator[str]:
        everything = self.comparison.all
        if self.comparison.explanations:
            yield ""
            yield "What the difference belongs to"
            for part in self.comparison.explanations:
                yield from _explanation(part)
            if everything.failed and everything.unwatched > 0:
                yield from _wrapped(
                    f"Failed without usage: {_calls(everything.failed)}. Most failed calls cost nothing. "
                    "The provider may count them as requests.",
                    "  ",
                )
        if everything.late:
            yield from _wrapped(
                f"The usage of {_calls(everything.late.total())} became known later. It is counted in the "
                "bucket in which it became known.",
                "  ",
            )
        batch = self.comparison.batch
        if batch.requests or batch.tokens:
            yield ""
            yield from _wrapped(
                f"Batch jobs are not compared: {_calls(batch.requests)}, {batch.tokens:,} tokens."
            )

    def _at_the_borders(self) -> Iterator[str]:
        if any(border.calls for border in self.borders):
            yield ""
            yield "Calls at the borders of the range"
        for border in self.borders:
            if border.calls:
                is_start = border.time == self.time_range.start
                yield from _wrapped(
                    f"{_calls(border.calls)} with {border.tokens:,} tokens: counted in the "
                    f"{border.window_s} s after {utc(border.time)}. The provider may have them "
                    f"{'before' if is_start else 'in'} the range.",
                    "  ",
                )


def _table(cell: Cell) -> Iterator[str]:
    difference = cell.difference
    for title, field in _ROWS:
        provider, prometheus = getattr(cell.provider, field), getattr(cell.prometheus, field)
        if not provider and not prometheus and field in {"cached_tokens", "web_searches"}:
            continue
        missing = getattr(difference, field)
        share = f"{_percent(missing / provider):>9}" if missing and provider else ""
        yield f"  {title:<18}{_number(provider):>17}{_number(prometheus):>17}{_number(missing):>17}{share}"


def _explanation(part: Explanation) -> Iterator[str]:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in part.reasons.items())
    what = _CAUSES[part.cause].format(reasons=reasons)
    if part.cause is not Cause.NONE:
        what = f"{_calls(abs(part.calls))} {what}"
    if part.input_count:
        what = f"{what}; {part.input_count:,} of their input tokens were counted by the API"
    lines = textwrap.wrap(what, _WIDTH - 24)
    yield f"  {part.tokens:>13,} tokens  {lines[0]}"
    yield from (f"{'':<24}{line}" for line in lines[1:])


def _calls(number: int) -> str:
    return "1 call" if number == 1 else f"{number:,} calls"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )


def _number(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _percent(share: float) -> str:
    text = f"{100 * share:.2f}"
    return f"{text} %" if float(text) or not share else f"{100 * share:.1g} %"


def _iso(time_s: int) -> str:
    return f"{utc(time_s).replace(' ', 'T')}Z"


def _cell_json(cell: Cell) -> dict[str, Any]:
    def counts(values: Counts) -> Mapping[str, int | None]:
        return values._asdict()

    return {
        "provider": counts(cell.provider),
        "prometheus": counts(cell.prometheus),
        "difference": counts(cell.difference),
        "unmetered": dict(sorted(cell.unmetered.items())),
        "late": dict(sorted(cell.late.items())),
        "failed": cell.failed,
        "input_count": cell.input_count,
        "unwatched": cell.unwatched,
        "cause": cell.cause.value,
    }
