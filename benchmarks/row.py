"""One line of the table: what is measured, what is aimed at, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A result beside its goal, if it has one; the smaller the better.

    `floor` is what no implementation can beat.
    """

    what: str
    result: float
    goal: float | None
    unit: str
    floor: str = ""

    @property
    def passes(self) -> bool:
        """Whether the goal is met, or there is none."""
        return self.goal is None or self.result <= self.goal

    @property
    def verdict(self) -> str:
        """What the table says of it."""
        return "" if self.goal is None else "meets it" if self.passes else "**misses it**"


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | goal | floor | result | |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [
        f"| {row.what} | {'' if row.goal is None else f'{_number(row.goal)} {row.unit}'} | {row.floor} "
        f"| {_number(row.result)} {row.unit} | {row.verdict} |"
        for row in rows
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
