"""The benchmarks run, and notice what they are there to notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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
        ("event", 11),
        ("message", 4),
        ("pipeline", 12),
        ("call", 7),
        ("memory", 4),
        ("fallback", 5),
        ("startup", 1),
    ],
)
def test_a_measurement_runs(measurement: str, number: int) -> None:
    """Each measurement gives its rows, with goals, from a process of its own."""
    done = run("benchmarks.one", measurement, "--quick")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == number
    assert all(row["unit"] and row["what"] and row["goal"] for row in rows)


def test_the_table_has_sync_and_async_in_one_line(instructions: Any) -> None:  # noqa: ARG001
    """A row without a goal misses none."""
    from benchmarks.row import Row, table

    rows = [
        Row("added", 1e9, None, "us"),
        Row("event", 250, 400, "ns", "floor 90 ns", "sync"),
        Row("event", 601, 600, "ns", "floor 95 ns", "async"),
        Row("call", 1.7, 2, "x", "by hand", "sync"),
        Row("call", 1.75, 2, "x", "by hand", "async"),
    ]
    assert rows[0].passes
    assert table(rows).splitlines()[2:] == [
        "| added |  | 1,000,000,000 us |  |  |",
        "| event | 400 / 600 ns | 250 / 601 ns | meets it / **misses it** | floor 90 ns / floor 95 ns |",
        "| call | 2 x | 1.7 / 1.75 x | meets it | by hand |",
    ]


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


def test_each_division_has_the_same_bytes(instructions: Any) -> None:  # noqa: ARG001
    """The pieces differ, the body does not. A delta is as long as one of the API with its padding."""
    from benchmarks import pieces

    events = pieces.padded(500)
    deltas = [event for event in events if b'.delta"' in event]
    assert len(deltas) == 500
    assert all(230 <= len(delta) <= 260 for delta in deltas)
    assert [b"".join(pieces.divided(name, 500)) for name in pieces.DIVISIONS] == [b"".join(events)] * 5
    assert len({len(pieces.divided(name, 500)) for name in pieces.DIVISIONS}) == 5
    assert max(map(len, pieces.compressed(events))) == pieces.SEGMENT


def test_processes_take_turns(instructions: Any) -> None:  # noqa: ARG001
    """Each turn has the processor time of each process, which works only in its turn."""
    from benchmarks import lockstep

    def worker(loops: int) -> Callable[[], lockstep.Worker]:
        def work(task: int, pause: lockstep.Pause) -> int:
            for _ in range(task):
                sum(range(loops))
                pause()
            return loops

        return lambda: work

    allowed = os.sched_getaffinity(0)
    try:
        with lockstep.children(worker(10), worker(2_000_000)) as forked:
            turns = lockstep.run(forked, [3, 3])
            assert [child.result for child in forked] == [10, 2_000_000]
            assert len(lockstep.run(forked, [2, 2])) == 2
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(turns) == 3
    assert all(0 < few < many for few, many in turns)


def test_a_process_that_fails_ends_the_turns(
    instructions: Any,  # noqa: ARG001
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The result is empty, for later tasks too, and the traceback is shown."""
    from benchmarks import lockstep

    def failing(_: object, pause: lockstep.Pause) -> None:
        pause()
        raise ValueError("as it should")

    def working(_: object, pause: lockstep.Pause) -> None:
        pause()
        pause()

    allowed = os.sched_getaffinity(0)
    try:
        with lockstep.children(lambda: working, lambda: failing) as forked:
            assert lockstep.run(forked, [1, 1]) == []
            assert lockstep.run(forked[1:], [1]) == []
    finally:
        os.sched_setaffinity(0, allowed)
    assert "ValueError: as it should" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "begin", "spans"),
    [("none", "sys.modules['otel_responses_usage'] = None", 0), ("ours", "", 1)],
)
def test_a_peer_is_measured_in_its_own_environment(
    name: str,
    begin: str,
    spans: int,
    instructions: Any,  # noqa: ARG001
) -> None:
    """The process of a peer needs nothing of ours, measures everything, and says what is recorded."""
    from benchmarks import peers, pieces

    script = f"import runpy, sys\n{begin}\nrunpy.run_module('benchmarks.peer', run_name='__main__')"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, name, "--quick"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = peers.Measured(json.loads(done.stdout))
    for how in peers.HOW:
        assert measured.own_call(how) > 0
        assert measured.call(how) is not None
        assert (measured.call(how, by_hand=True) is not None) is bool(spans)
        assert all(measured.event(division, how) is not None for division in pieces.DIVISIONS)
        assert all(measured.own_event(division, how) > 0 for division in pieces.DIVISIONS)
        recorded = measured.recorded(how)
        assert len(recorded["attributes"]) == spans
        assert recorded["has_usage"] is bool(spans)
        assert recorded["points"].get("gen_ai.client.token.usage", 0) == 2 * spans
        assert recorded["content"] == []


def _measured(added_ns: int, *, spans: int = 1, fails: bool = False) -> Any:
    """What is printed of two pairs. All turns of the second pair are slower."""
    from benchmarks import peers, pieces

    def of(noise: int) -> dict[str, Any]:
        turns = [[5_000 + 10 * noise, 5_000 + 10 * (noise + added_ns)]] * 10
        call = [[1_000_000, 1_000_000 + 100_000 * spans, 1_050_000]] * 3
        recorded = {
            "attributes": [20] * spans,
            "has_usage": bool(spans),
            "points": {"tokens": 2, "duration": 1} if spans else {},
            "content": ["input", "output"] if added_ns > 5_000 else [],
            "by_hand": [{}] * spans,
        }
        return {
            "recorded": None if fails else recorded,
            "call": [] if fails else call,
            "streams": dict.fromkeys(pieces.DIVISIONS, [] if fails else turns),
        }

    pairs = [dict.fromkeys(peers.HOW, of(noise)) for noise in (0, 3)]
    return peers.Measured({"events": 109, "short": 9, "pairs": pairs})


def test_the_tables_of_peers_tell_what_each_adds(instructions: Any) -> None:  # noqa: ARG001
    """Each is compared with the SDK alone in its own pairs. One may fail, or see nothing."""
    from benchmarks import peers

    found = {
        "none": _measured(0, spans=0),
        "ours": _measured(2_000),
        "logfire": _measured(9_000),
        "genai": _measured(50, spans=0),
        "ddtrace": _measured(0, fails=True),
    }
    versions = dict.fromkeys(found, "1.0")
    cells = [line.split(" | ") for line in peers.costs_table(found, versions).splitlines()[2:]]
    assert cells[0][1] == "0 / 0"
    assert [line[1] for line in cells[1:]] == [
        "+0.00 ± 0.00",
        "+1.00 ± 0.00",  # the call of nine events is not part of an event
        "+8.00 ± 0.00",
        "sees nothing",
        "fails",
    ]
    assert [line[6] for line in cells[1:]] == ["+0 ± 0", "+100 ± 0", "+100 ± 0", "sees nothing", "fails"]
    assert cells[2][7] == "+50 ± 0 |"
    short = peers.short_table(found, versions).splitlines()[2:]
    assert short[0] == "| `otel-responses-usage` 1.0 | +1.00 ± 0.00 | +1.00 ± 0.00 | +100 ± 0 |"
    assert len(short) == len(found) - 1
    records = peers.records_table(found, versions).splitlines()[2:]
    assert [line.split(" | ")[2:] for line in records] == [
        ["1, with 20 attributes", "yes", "3 of 2 instruments", "none |"],
        ["1, with 20 attributes", "yes", "3 of 2 instruments", "input and output |"],
        ["none", "no", "none", "none |"],
        ["fails", "", "", " |"],
    ]


def test_the_cost_of_an_event_is_drawn(instructions: Any) -> None:  # noqa: ARG001
    """Each peer that sees the calls has a line in both panels, with a point for each division."""
    from benchmarks import peers
    from benchmarks.plot import picture

    found = {
        "none": _measured(0, spans=0),
        "ours": _measured(2_000),
        "genai": _measured(50, spans=0),
        "logfire": _measured(90_000),
    }
    curves = peers.curves(found)
    drawn = ET.fromstring(picture(curves))  # noqa: S314
    assert [len(panel) for panel in curves.values()] == [2, 2]
    assert len(drawn.findall("{*}polyline")) == 4
    assert len(drawn.findall("{*}circle")) == 4 * 4
    assert [text.text for text in drawn.findall("{*}text")][-2:] == ["otel-responses-usage", "logfire"]


def test_each_part_of_the_pages_can_be_written(
    instructions: Any,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The rest of the page stays. A part that is not there is an error."""
    from benchmarks import page

    for name, path in page.PARTS.items():
        copy = tmp_path / path.name
        shutil.copy(path, copy)
        monkeypatch.setitem(page.PARTS, name, copy)
        page.write(name, r"| a \1 table |")
        page.write(name, r"| another \1 table |")
        before, marked, after = path.read_text().partition(f"<!-- begin {name} -->")
        rest = after[after.index(f"\n<!-- end {name} -->") :]
        assert copy.read_text() == f"{before}{marked}\n\n| another \\1 table |\n{rest}"
        copy.write_text(before)
        with pytest.raises(ValueError, match=f"0 parts with the name {name}"):
            page.write(name, "")


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], ["_costs"]),
        (["--peers"], ["_peers"]),
        (["--write"], ["_costs", "_peers", "_growth"]),
        (["--growth", "--write"], ["_growth"]),
    ],
)
def test_one_command_measures_everything(
    options: list[str],
    chosen: list[str],
    instructions: Any,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `--write` alone all pages are written."""
    from benchmarks import __main__ as command

    monkeypatch.setattr(sys, "argv", ["bench", *options])
    assert [measure.__name__ for measure in command._chosen(command._arguments())] == chosen


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
    """Twenty empty loops more per event are counted, and all else is as in the baseline."""
    if instructions.version() not in json.loads(instructions.BASELINE.read_text()):
        monkeypatch.setattr(instructions, "BASELINE", tmp_path / "baseline.json")
        instructions.update(instructions.counts())
    assert [count.name for count in instructions.counts(artificial_loss=20) if count.grew] == ["event"]
