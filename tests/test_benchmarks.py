"""The benchmarks run, and notice what they are there to notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": "examples", "no_proxy": "127.0.0.1"}


def run(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that counts instructions, without having counted any."""
    monkeypatch.syspath_prepend(str(ROOT))
    import importlib

    return importlib.import_module("benchmarks.instructions")


@pytest.mark.parametrize(
    ("measurement", "number"),
    [("event", 3), ("pipeline", 2), ("call", 5), ("memory", 2), ("fallback", 4), ("startup", 1)],
)
def test_a_measurement_runs(measurement: str, number: int) -> None:
    """Each measurement gives its rows, with a result and a goal, from a process of its own."""
    done = run("benchmarks.one", measurement, "--quick")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == number
    assert all(row["goal"] > 0 and row["unit"] and row["what"] for row in rows)


def test_what_is_counted_runs_without_valgrind() -> None:
    """Every part that is to be counted runs, in the order in which its counts are read."""
    done = run("benchmarks.counted")
    assert done.returncode == 0, done.stderr


def test_ci_does_not_pass_where_nothing_can_be_counted() -> None:
    """Without valgrind the check says how to install it, and fails in CI only."""
    for ci, status in (("true", 1), ("", 0)):
        done = run("benchmarks", "--check", CI=ci, PATH="")
        assert done.returncode == status
        assert "apt-get install valgrind" in done.stderr


@pytest.mark.parametrize(("added", "grew"), [(3_000, False), (3_290, False), (3_310, True)])
def test_more_than_a_tenth_is_growth(instructions: Any, added: int, grew: bool) -> None:
    """A count may exceed the baseline by a tenth, since compilers differ, and by no more."""
    assert instructions.Count("event", added, 1_000, 3.0).grew is grew


def test_next_to_nothing_does_not_grow(instructions: Any) -> None:
    """Where nothing is added, a tenth more or less of it is no growth, but a new cost is."""
    assert not instructions.Count("event, no SDK", 60, 2_500, -0.02).grew
    assert instructions.Count("event, no SDK", 100, 2_500, -0.02).grew


@pytest.mark.parametrize(("ci", "status"), [("true", 1), ("", 0)])
def test_a_python_without_a_baseline_does_not_pass_in_ci(
    ci: str,
    status: int,
    instructions: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A count without a baseline has not grown, but CI is not to hold nothing and say so to nobody."""
    from benchmarks import __main__ as command

    unknown = instructions.Count("event", 9_999_999, 1, None)
    assert not unknown.grew
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(command.instructions, "counts", lambda: [unknown])
    assert command._check(update=False) == status
    assert "`scripts/bench --update` makes one" in capsys.readouterr().err


@pytest.mark.parametrize(("times", "grown"), [(1.0, []), (1.08, []), (1.2, ["event"])])
def test_an_artificial_regression_is_noticed(
    instructions: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: float, grown: list[str]
) -> None:
    """Instructions that only an event takes more are noticed there and nowhere else."""
    counted = {name: 100_000 * number for number, name in enumerate(instructions.PARTS, 1)}
    monkeypatch.setattr(instructions.shutil, "which", lambda _: "valgrind")
    monkeypatch.setattr(instructions, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(instructions, "_per_item", lambda *_: counted)
    instructions.update(instructions.counts())
    plain = counted["plain event"]
    counted["event"] = round(plain + times * (counted["event"] - plain))
    assert [count.name for count in instructions.counts() if count.grew] == grown


@pytest.mark.skipif(
    shutil.which("valgrind") is None or os.environ.get("CI") != "true", reason="takes callgrind half a minute"
)
def test_callgrind_notices_a_regression(
    instructions: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twenty empty loops more per event are counted, and counting twice gives the same but for that."""
    monkeypatch.setattr(instructions, "BASELINE", tmp_path / "baseline.json")
    instructions.update(instructions.counts())
    assert [count.name for count in instructions.counts(artificial_loss=20) if count.grew] == ["event"]
