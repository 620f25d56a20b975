"""One line of the table: what is measured, its goal, and the result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A result and its goal. A smaller result is better.

    Attributes:
        what: What is measured.
        result: The result.
        goal: The largest result that meets the goal; `None` if there is no goal.
        unit: The unit of both.
        beside: A number to compare the result with, and what it is.
        how: `sync` or `async`. The table has both in one line.

    """

    what: str
    result: float
    goal: float | None
    unit: str
    beside: str = ""
    how: str = ""

    @property
    def passes(self) -> bool:
        """Whether the goal is met, or there is none."""
        return self.goal is None or self.result <= self.goal

    @property
    def verdict(self) -> str:
        """What the table says of it."""
        return "" if self.goal is None else "meets it" if self.passes else "**misses it**"


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table, with a line for each thing that is measured."""
    by_what: dict[str, list[Row]] = {}
    for row in rows:
        by_what.setdefault(row.what, []).append(row)
    lines = ["| what, sync / async | goal | result | | to compare |", "| --- | ---: | ---: | --- | ---: |"]
    for what, same in by_what.items():
        goals = _joined([_number(row.goal) for row in same if row.goal is not None], same[0].unit)
        results = _joined([_number(row.result) for row in same], same[0].unit)
        verdicts = " / ".join(dict.fromkeys(row.verdict for row in same))
        lines.append(
            f"| {what} | {goals} | {results} | {verdicts} | {_joined([row.beside for row in same])} |"
        )
    return "\n".join(lines)


def _joined(values: list[str], unit: str = "") -> str:
    """Return the values of a line; one if all are the same."""
    different = list(dict.fromkeys(values)) if len(set(values)) == 1 else values
    return f"{' / '.join(different)} {unit}".strip() if any(different) else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
