"""The demo: what it prints, draws and writes, how it stops, and what it says of a dead endpoint."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
)
from playwright.sync_api import Browser
from rich.cells import cell_len

import page
import picture
from acts import ACTS
from browsers import chromium
from embedded.http_server import Reply, ScriptedServer, Send
from embedded.otlp_receiver import OtlpReceiver
from endpoint import likely_cause
from observed import HANGING_S
from otel_responses_usage import MissingReason, Outcome, UsageSource
from outlets import CountingMetricExporter, CountingSpanExporter, Outlet
from pictures import PICTURES, RECORDING, drawn
from readings import OWN_ANSWER, REASONS, SOURCES, Call, Readings, read_calls
from recording import Recording, write

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
COLUMNS = 80


def environment(**more: str) -> dict[str, str]:
    """The environment of a user who has set nothing else."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OTEL_", "OPENAI_", "COLUMNS"))
    }
    return inherited | more


@dataclass(frozen=True)
class Played:
    """The demo, after it has run: what it printed and wrote, and what it sent to an endpoint of the user."""

    output: str
    svg: str
    page: str
    receiver: OtlpReceiver

    @property
    def rows(self) -> dict[str, list[str]]:
        """The lines by their first cell. Cells are two blanks apart."""
        cells = [re.split(r"\s{2,}", line.strip()) for line in self.output.splitlines()]
        return {first: rest for first, *rest in cells if rest}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """The demo as a user runs it, in a terminal of 80 columns, with everything it can write."""
    directory = tmp_path_factory.mktemp("demo")
    with OtlpReceiver() as receiver:
        told = {
            OTEL_EXPORTER_OTLP_ENDPOINT: receiver.http_endpoint,
            OTEL_EXPORTER_OTLP_PROTOCOL: "http/protobuf",
        }
        command: list[str | Path] = [
            sys.executable,
            "-W",
            "error",
            DEMO,
            "--svg",
            "calls.svg",
            "--page",
            "calls.html",
        ]
        done = subprocess.run(  # noqa: S603 - the project's own file
            command,
            env=environment(COLUMNS=str(COLUMNS), **told),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HANGING_S,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        svg, written = (directory / name for name in ("calls.svg", "calls.html"))
        yield Played(done.stdout, svg.read_text("utf-8"), written.read_text("utf-8"), receiver)


def facts(calls: list[Call]) -> list[Call]:
    """The calls without what differs from run to run: times, and GETs that depend on them."""
    return [
        replace(
            call,
            duration_s=0.0,
            first_chunk_s=None,
            look_up_s=None,
            gets=0,
            fetches=tuple(replace(fetch, began_s=0.0, duration_s=0.0) for fetch in call.fetches),
        )
        for call in calls
    ]


def test_the_table_shows_every_ending(played: Played) -> None:
    """Each call has its outcome, deltas, what its last event told, its tokens and where they come from."""
    table = played.rows
    assert table["a crew of emoji"] == ["completed", "20", "213", "213", "stream"]
    assert table["a thinker"] == ["completed", "18", "969", "969", "stream"]
    assert table["out of tokens"] == ["incomplete", "24", "48", "48", "stream"]
    assert table["over a WebSocket"] == ["completed", "9", "133", "133", "stream"]
    assert table["a compaction"] == ["completed", "-", "187", "187", "response"]
    assert table["closed at the end"] == ["closed", "18", "-", "154", "tail"]
    assert table["closed half-way"][:5] == ["closed", "12", "-", "441", "retrieval"]
    assert table["a cancelled task"][:5] == ["cancelled", "15", "-", "305", "retrieval"]
    assert table["cut by network"][:5] == ["cut", "16", "-", "388", "retrieval"]
    assert table["cut and resumed"][:4] == ["cut", "11", "-", "276"]
    assert table["cut and resumed"][4] in {"observation", "retrieval"}
    assert table["└ fetched again"] == ["completed", "17", "-", "-", "-"]
    assert table["cut, store=False"] == ["cut", "14", "-", "-", "not_stored"]
    assert table["cut and forgotten"][:5] == ["cut", "13", "-", "-", "not_found"]
    assert table["in all"] == ["187", "1,550", "3,114"]
    assert table["chat"][1:] == ["9", "2,927", *table["chat"][3:]]


def test_the_text_of_a_call_begins_with_an_ellipsis_if_it_is_not_whole(played: Played) -> None:
    """The line of a call has its last words."""
    assert played.rows["✓ cut by network"][1].startswith("… expedition was The last")
    assert played.rows["✓ over a WebSocket"][1].startswith("One connection carries")


def test_the_page_explains_its_numbers(played: Played) -> None:
    """There are more spans than calls. The deltas of a call that was resumed are those of two streams."""
    assert (
        "Made from 25 spans and their metrics, as they arrived over OTLP. 12 are of calls, 1 of a response"
        " that was fetched again and 12 of the application itself."
    ) in played.page
    assert "28 deltas: 11 of the call, and 17 that were fetched again." in played.page


def test_the_demo_holds_three_readings_against_the_bill(played: Played) -> None:
    """Deltas, last events and telemetry are set beside what the server billed, and what lacks has reasons."""
    assert played.rows["counting the deltas"][0] == "187"
    assert played.rows["reading last events"][0] == "1,550"
    assert played.rows["telemetry"][0] == "3,114"
    assert played.rows["billed by the server"][0] == "3,444"
    assert "The other 330 are of 2 calls whose spans say why: not_stored (1), not_found (1)." in played.output


def test_the_demo_fits_into_a_terminal_of_80_columns(played: Played) -> None:
    """No line of it is longer, but for addresses and paths, which are of the user's own length."""
    lines = [line for line in played.output.splitlines() if "/" not in line.replace("/ GETs", "")]
    assert len(lines) > 40
    assert [line for line in lines if cell_len(line) > COLUMNS] == []


def test_the_demo_also_exports_to_an_endpoint_of_the_user(played: Played) -> None:
    """With an endpoint in the environment everything is sent there as well, and the demo says so."""
    assert len(played.receiver.spans) == 25
    assert played.receiver.metrics["gen_ai.client.token.usage"].unit == "{token}"
    assert (
        f"Sent to {played.receiver.http_endpoint}: 25 of 25 spans accepted, and the metrics.\n"
        in played.output
    )


def test_picture_and_page_are_made_from_what_arrived_over_otlp(played: Played) -> None:
    """Whoever has the same spans and metrics makes the same picture and the same page of them."""
    assert played.svg == picture.draw(read_calls(played.receiver.spans))
    assert played.page == page.write(played.receiver.spans, played.receiver.metrics)


def test_the_demo_says_what_to_do_next(played: Played) -> None:
    """It names where the page is, and the two commands for a service of one's own."""
    assert re.search(r"^The page is file://\S+/calls\.html$", played.output, re.MULTILINE)
    assert f'    pip install "{DEMO.parents[1]}[instruments,otlp]"\n' in played.output
    assert "    opentelemetry-instrument python app.py\n" in played.output


def test_the_committed_pictures_are_those_of_the_present_code() -> None:
    """`scripts/draw-pictures` would change nothing."""
    for path, text in drawn().items():
        assert path.read_text("utf-8") == text, f"run scripts/draw-pictures: {path.name} is out of date"


def test_the_recorded_calls_are_those_of_the_present_demo(played: Played) -> None:
    """The committed telemetry says what the demo says today; `scripts/draw-pictures --record` renews it."""
    recorded = facts(read_calls(Recording.read(RECORDING).spans))
    assert [call.name for call in recorded] == [act.title for act in ACTS]
    assert recorded == facts(read_calls(played.receiver.spans))


def test_a_recording_has_all_that_arrived(played: Played, tmp_path: Path) -> None:
    """Spans and metrics are the same after they were written and read."""
    write(tmp_path / "recorded.jsonl", played.receiver.requests)
    recorded = Recording.read(tmp_path / "recorded.jsonl")
    assert recorded.spans == played.receiver.spans
    assert recorded.metrics == played.receiver.metrics


@pytest.mark.parametrize("theme", ["light", "dark", "auto"])
def test_the_picture_stands_alone(theme: picture.Theme) -> None:
    """It is well-formed, has every call and number, and refers to nothing outside of it."""
    calls = read_calls(Recording.read(RECORDING).spans)
    text = picture.draw(calls, theme)
    root = ET.fromstring(text)  # noqa: S314 - written by ourselves
    words = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert words >= {call.name for call in calls} | {"187", "1,550", "3,114", "not_stored", "observation"}
    assert re.findall(r"https?://[^\"]+|url\(|@import|<image|href", text) == ["http://www.w3.org/2000/svg"]
    assert ("prefers-color-scheme" in text) == (theme == "auto")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium."""
    with chromium() as browser:
        yield browser


# What stands beyond the edge, is cut off by its own box, or overlaps a neighbour; and small text.
TROUBLE = """
() => {
    const trouble = [], seen = [];
    for (const node of document.querySelectorAll('body *')) {
        const box = node.getBoundingClientRect(), style = getComputedStyle(node);
        if (!box.width || style.display === 'inline') continue;
        if (box.left < -0.5 || box.right > innerWidth + 0.5)
            trouble.push(`beyond the edge: ${node.outerHTML.slice(0, 200)}`);
        if (node.scrollWidth > node.clientWidth + 1 && style.overflowX !== 'visible')
            trouble.push(`cut off: ${node.outerHTML.slice(0, 200)}`);
    }
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        if (!walker.currentNode.data.trim()) continue;
        if (parseFloat(getComputedStyle(walker.currentNode.parentElement).fontSize) < 12)
            trouble.push(`small: ${walker.currentNode.data}`);
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        for (const box of range.getClientRects()) {
            for (const [other, text] of seen)
                if (box.left < other.right - 1 && other.left < box.right - 1
                    && box.top < other.bottom - 4 && other.top < box.bottom - 4)
                    trouble.push(`${walker.currentNode.data} overlaps ${text}`);
            seen.push([box, walker.currentNode.data]);
        }
    }
    return trouble;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_can_be_read(browser: Browser, width: int, scheme: str) -> None:
    """On a phone and on a desk, light and dark: nothing is fetched, overflows, overlaps or is tiny."""
    asked: list[str] = []
    errors: list[str] = []
    with browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
    ) as context:
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto((PICTURES / "demo.html").as_uri())
        assert tab.evaluate(TROUBLE) == []
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        words = tab.inner_text("body")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 384) == (scheme == "dark")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert errors == []
    for said in ("187", "1,550", "3,114", "Looked up: 2 GETs", "not_found", "0.5 s", "tokens out"):
        assert said in words


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_word_of_the_picture_overlaps_another(browser: Browser, theme: str) -> None:
    """Also in the wide letters of a machine without the fonts that the picture asks for first."""
    with browser.new_context(viewport={"width": picture.WIDTH, "height": 800}) as context:
        tab = context.new_page()
        tab.set_content(
            f'<body style="margin:0">{(PICTURES / f"demo-{theme}.svg").read_text("utf-8")}</body>',
        )
        assert tab.evaluate(TROUBLE) == []


def test_the_timeline_has_stream_look_up_and_end_of_span_in_their_places(browser: Browser) -> None:
    """The look-up of a call begins where its span ends, which is where its stream ended."""
    calls = read_calls(Recording.read(RECORDING).spans)
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        tab = context.new_page()
        tab.goto((PICTURES / "demo.html").as_uri())
        drawn_calls = tab.evaluate("""() => [...document.querySelectorAll('li.call')].map(call => {
            const track = call.querySelector('.track').getBoundingClientRect();
            const places = {};
            for (const bar of call.querySelectorAll('.track i:not(.line)')) {
                const box = bar.getBoundingClientRect();
                places[bar.className] = [box.left, box.right].map(x => (x - track.left) / track.width);
            }
            return places;
        })""")
    axis_s = 2.0
    assert len(drawn_calls) == len(calls)
    for call, places in zip(calls, drawn_calls, strict=True):
        assert sum(places["end"]) / 2 * axis_s == pytest.approx(call.duration_s, abs=0.01)
        assert places["stream"][1] * axis_s == pytest.approx(call.duration_s, abs=0.01)
        assert ("look-up" in places) == (call.look_up_s is not None)
        if call.look_up_s is not None:
            assert places["look-up"][0] * axis_s == pytest.approx(call.duration_s, abs=0.01)
            assert places["look-up"][1] * axis_s == pytest.approx(call.duration_s + call.look_up_s, abs=0.03)


def test_sources_reasons_and_outcomes_all_have_words() -> None:
    """The page has a meaning for each value that the package writes."""
    assert set(SOURCES) == {source.value for source in UsageSource}
    assert set(REASONS) == {reason.value for reason in MissingReason}
    assert set(page.ENDS) == {outcome.value for outcome in Outcome}
    assert set(SOURCES) > OWN_ANSWER


def test_three_readings_of_the_same_calls_differ() -> None:
    """Deltas are pieces of text, last events those that came, and telemetry has what was looked up, too."""
    readings = Readings.of(read_calls(Recording.read(RECORDING).spans))
    assert readings == Readings(187, 1_550, 3_114, ("not_stored", "not_found"))


@contextmanager
def running(terminal: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The demo, and where its output can be read. With a terminal it writes there."""
    reader, writer = (terminal, -1) if terminal is not None else os.pipe()
    process = subprocess.Popen(  # noqa: S603 - the project's own file
        [sys.executable, DEMO],
        env=environment(COLUMNS=str(COLUMNS)),
        stdin=subprocess.DEVNULL,
        stdout=terminal if terminal is not None else writer,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if terminal is None:
        os.close(writer)
    try:
        yield process, reader
    finally:
        process.kill()
        process.wait()
        if terminal is None:
            os.close(reader)


def read_until(reader: int, wanted: bytes) -> bytes:
    """What was said until something was said. Then there is more to come."""
    said = b""
    while wanted not in said:
        more = os.read(reader, 4096)
        assert more, said.decode()
        said += more
    return said


@pytest.mark.parametrize(
    ("said", "later_s"),
    [
        pytest.param(b"", 0.6, id="while modules are imported"),
        pytest.param("✓ closed half-way".encode(), 0.3, id="in a stream of an event loop"),
        pytest.param("✓ cut and forgotten".encode(), 0.3, id="while look-ups are waited for"),
    ],
)
def test_ctrl_c_ends_the_demo_at_once(said: bytes, later_s: float) -> None:
    """Whatever it is doing, the demo dies of the signal within a second, and says nothing more."""
    with running() as (process, reader):
        if said:
            read_until(reader, said)
        time.sleep(later_s)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(5) == -signal.SIGINT
        assert time.monotonic() - began < 1
        rest = b"".join(iter(lambda: os.read(reader, 65536), b""))
    assert b"Traceback" not in rest
    assert b"What arrived" not in rest


def test_ctrl_c_in_a_stream_leaves_a_terminal_as_it_was() -> None:
    """The demo ends within a second, and the cursor that it hides during a call is there again."""
    ours, theirs = pty.openpty()
    try:
        with running(theirs) as (process, _):
            said = read_until(ours, "✓ a crew of emoji".encode())
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(1) == -signal.SIGINT
            said += os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"Traceback" not in said
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l")


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_dead_endpoint_is_named_once_with_its_cause() -> None:
    """The demo runs all the same, says once what is wrong, and its exit code says so, too."""
    endpoint = f"http://127.0.0.1:{closed_port()}"
    done = subprocess.run(  # noqa: S603 - the project's own file
        [sys.executable, DEMO],
        env=environment(COLUMNS=str(COLUMNS), **{OTEL_EXPORTER_OTLP_ENDPOINT: endpoint}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.count(endpoint) == 1
    port = endpoint.rpartition(":")[2]
    assert (
        f"Sent to {endpoint} by grpc: 0 of 25 spans accepted."
        f" Nothing listens on port {port} of 127.0.0.1. Is the receiver running?\n"
    ) in done.stdout
    assert "3,114" in done.stdout


@contextmanager
def plain_web() -> Iterator[str]:
    """A server that answers a TLS handshake as web servers do that speak HTTP."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


def test_the_likely_cause_tells_the_usual_mistakes_apart() -> None:
    """A port of the other protocol, a server of another kind, a missing scheme: each has its advice."""
    with OtlpReceiver() as receiver, ScriptedServer(lambda _: Reply.json({}, status=404)) as web:
        assert likely_cause(receiver.http_endpoint, "grpc").endswith("or use the port for gRPC.")
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf" in likely_cause(receiver.http_endpoint, "grpc")
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in likely_cause(receiver.grpc_endpoint, "http/protobuf")
        assert "no OTLP receiver at this address (HTTP 404)" in likely_cause(web.url, "http/protobuf")
    assert (
        likely_cause("localhost:4318", "grpc") == "The endpoint has no scheme: write http://localhost:4318."
    )
    assert "no URL" in likely_cause("http://localhost:port", "grpc")
    with ScriptedServer(lambda _: Reply.json({}, status=401)) as web:
        assert "OTEL_EXPORTER_OTLP_HEADERS" in likely_cause(web.url, "http/protobuf")
    with plain_web() as address:
        assert "does not speak TLS" in likely_cause(f"https://{address}", "http/protobuf")
    with ScriptedServer(lambda _: Reply(steps=(Send(b"x"),), chunked=False)) as web:
        assert likely_cause(web.url, "http/protobuf").endswith("HTTP 200.")


def test_a_receiver_that_takes_no_metrics_is_not_said_to_have_them() -> None:
    """What became of spans and of metrics is said apart."""
    spans = CountingSpanExporter.__new__(CountingSpanExporter)
    spans.offered = spans.accepted = 3
    metrics = CountingMetricExporter.__new__(CountingMetricExporter)
    metrics.accepted = False
    assert "but [red]not the metrics[/]" in Outlet("http://here", "grpc", spans, metrics).statement()
    assert "OTEL_METRICS_EXPORTER=none" in Outlet("http://here", "grpc", spans, metrics).statement()
    assert Outlet("http://here", "grpc", spans, None).statement().endswith("[green]3 of 3 spans accepted[/].")


def test_a_file_that_cannot_be_written_is_named_before_the_calls(tmp_path: Path) -> None:
    """The demo does not run for nothing."""
    wrong = tmp_path / "missing" / "calls.svg"
    done = subprocess.run(  # noqa: S603 - the project's own file
        [sys.executable, DEMO, "--svg", wrong], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"there is no directory {wrong.parent}" in done.stderr
