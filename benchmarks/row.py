"""One line of the table: what is measured, what is aimed at, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A result beside its goal; the smaller the better. `floor` is what no implementation can beat."""

    what: str
    result: float
    goal: float
    unit: str
    floor: str = ""

    @property
    def passes(self) -> bool:
        """Whether the goal is met."""
        return self.result <= self.goal


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | goal | floor | result | |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [
        f"| {row.what} | {_number(row.goal)} {row.unit} | {row.floor} | {_number(row.result)} {row.unit} "
        f"| {'meets it' if row.passes else '**misses it**'} |"
        for row in rows
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
