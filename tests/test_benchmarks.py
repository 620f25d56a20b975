"""The benchmarks run, and notice what they are there to notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

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
    [
        ("event", 3),
        ("message", 4),
        ("pipeline", 6),
        ("call", 7),
        ("memory", 4),
        ("fallback", 5),
        ("startup", 1),
    ],
)
def test_a_measurement_runs(measurement: str, number: int) -> None:
    """Each measurement gives its rows, most with a goal, from a process of its own."""
    done = run("benchmarks.one", measurement, "--quick")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == number
    assert all(row["unit"] and row["what"] for row in rows)
    without_goal = [row["what"] for row in rows if not row["goal"]]
    assert all("in the real SDK" in what for what in without_goal)


def test_a_row_without_a_goal_misses_none(instructions: Any) -> None:  # noqa: ARG001
    """Where nothing is aimed at the table says nothing of a goal."""
    from benchmarks.row import Row, table

    row = Row("added", 1e9, None, "us")
    assert row.passes
    assert table([row]).splitlines()[-1] == "| added |  |  | 1,000,000,000 us |  |"


def test_growth_is_measured_and_drawn(instructions: Any) -> None:  # noqa: ARG001
    """Both curves have a number of streams or events per point, and the picture has each point."""
    from benchmarks import growth

    done = run("benchmarks.growth", "--quick")
    assert done.returncode == 0, done.stderr
    curves = [
        {int(number): (ns, held) for number, (ns, held) in curve.items()} for curve in json.loads(done.stdout)
    ]
    assert [list(curve) for curve in curves] == [list(growth.STREAMS[:-2]), list(growth.EVENTS[:-2])]
    assert all(held > 0 for curve in curves for _, held in curve.values())
    drawn = ET.fromstring(growth.picture(*curves))  # noqa: S314
    assert len(drawn.findall("{*}circle")) == 2 * sum(map(len, curves))
    assert len(growth._table("events of one stream", curves[1]).splitlines()) == 2 + len(curves[1])


@pytest.mark.parametrize(
    ("name", "begin", "hears"),
    [("none", "sys.modules['otel_responses_usage'] = None", False), ("ours", "", True)],
)
def test_a_peer_is_measured_in_its_own_environment(
    name: str,
    begin: str,
    hears: bool,
    instructions: Any,  # noqa: ARG001
) -> None:
    """The process of a peer needs nothing of ours, measures all columns when asked, and counts the spans."""
    from benchmarks import peers

    script = f"import runpy, sys\n{begin}\nrunpy.run_module('benchmarks.peer', run_name='__main__')"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, name],
        cwd=ROOT,
        env=ENVIRONMENT,
        input="\n\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(answer["costs"]) for answer in answers] == [sorted(peers._MEASURES)] * 2
    assert all(cost > 0 for answer in answers for cost in answer["costs"].values())
    assert (answers[-1]["spans"] > answers[0]["spans"] > 0) is hears


def test_the_table_of_peers_tells_what_each_adds(instructions: Any) -> None:  # noqa: ARG001
    """The one without any is what others are compared with in the same round; one may fail or see nothing."""
    from benchmarks import peers

    def peer(name: str, spans: int, *rounds: int) -> Any:
        costs = [dict.fromkeys(peers._MEASURES, 1000.0 * ns) if ns else {} for ns in rounds]
        return SimpleNamespace(name=name, version="1.0", spans=spans, costs=costs)

    table = peers._table(
        [
            peer("none", 0, 70, 80, 90),
            peer("ours", 3, 73, 82, 92),
            peer("genai", 0, 71, 81, 91),
            peer("ddtrace", 3, 0, 0, 0),
        ]
    )
    assert [line.split(" | ")[2:4] for line in table.splitlines()[2:]] == [
        ["80.0 us", "80.0 us"],
        ["+2,000 ns", "+2,000 ns"],
        ["sees nothing", "sees nothing"],
        ["fails", "fails"],
    ]
    assert table.splitlines()[3].endswith("| +2 us | +2 us |")


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


@pytest.mark.parametrize(("added", "fell"), [(3_000, False), (2_710, False), (2_690, True)])
def test_more_than_a_tenth_less_is_a_fall(instructions: Any, added: int, fell: bool) -> None:
    """A count that fell has to become the baseline, which would let it grow back unseen."""
    count = instructions.Count("event", added, 1_000, 3.0)
    assert count.fell is fell
    assert instructions.table([count]).endswith("| fell: run --update |" if fell else "| holds |")


def test_next_to_nothing_does_not_grow(instructions: Any) -> None:
    """Where nothing is added, a tenth more or less of it is no growth, but a new cost is."""
    assert not instructions.Count("event, no SDK", 60, 2_500, -0.02).grew
    assert instructions.Count("event, no SDK", 100, 2_500, -0.02).grew
    assert not instructions.Count("event, no SDK", -70, 2_500, -0.02).fell
    assert not instructions.Count("event, no SDK", 0, 2_500, 0.003).fell
    assert not instructions.Count("call, no SDK", 28, 1_000, 0.034).fell
    assert instructions.Count("call, no SDK", 23, 1_000, 0.034).fell


@pytest.mark.parametrize("update", [False, True])
def test_a_fall_is_reported(
    update: bool,
    instructions: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever made a call cheaper is told to say so, and what is updated has not fallen."""
    from benchmarks import __main__ as command

    monkeypatch.setattr(instructions, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(
        command.instructions, "counts", lambda: [instructions.Count("event", 2_000, 1_000, 3.0)]
    )
    assert command._check(update=update) == 0
    assert ("it fell: run --update" in capsys.readouterr().err) is not update


@pytest.mark.parametrize("ci", ["true", ""])
def test_growth_passes_nowhere(ci: str, instructions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count that grew fails the check, in CI and elsewhere."""
    from benchmarks import __main__ as command

    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(
        command.instructions, "counts", lambda: [instructions.Count("event", 4_000, 1_000, 3.0)]
    )
    assert command._check(update=False) == 1


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
