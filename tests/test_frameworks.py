"""The page about frameworks and the script that runs them are about the same frameworks.

The frameworks themselves are not run here: `scripts/test-frameworks` does it.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "scripts" / "test-frameworks").read_text("utf-8")
PAGE = (ROOT / "docs" / "frameworks.md").read_text("utf-8")

LIST = SCRIPT.partition("FRAMEWORKS=(\n")[2].partition("\n)")[0]
FRAMEWORKS = re.findall(r"^    '([a-z-]+) \S", LIST, re.MULTILINE)
_, _, ROWS = PAGE.partition("\n| framework |")
TABLE = [
    [cell.strip() for cell in row.strip("|").split(" | ")]
    for row in ROWS.partition("\n\n")[0].splitlines()[2:]
]


def test_the_table_names_the_frameworks_of_the_script() -> None:
    """The table has one row per framework that the script runs, in the same order."""
    assert FRAMEWORKS
    assert [cells[0].split()[0] for cells in TABLE] == FRAMEWORKS


def test_the_table_is_of_a_run_without_failures() -> None:
    """Each row has a version, was run, streamed, left and cut, and was exact."""
    for framework, sdk, tested, result, *_ in TABLE:
        assert re.fullmatch(r"[a-z-]+ \d+\.\d+\.\d+", framework)
        assert re.fullmatch(r"\d+\.\d+\.\d+", sdk)
        assert re.findall(r"(\w+) \(", tested) == ["run", "streamed", "left", "cut"], framework
        assert re.fullmatch(r"exact in \d+ calls", result), framework


def test_each_framework_has_a_program() -> None:
    """The script finds a program for each framework, and there is none that it does not run."""
    programs = {path.stem for path in (ROOT / "tests" / "frameworks").glob("*.py")} - {"kit"}
    assert programs == {name.replace("-", "_") for name in FRAMEWORKS}
