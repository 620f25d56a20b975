"""The chat service, used as a person uses it: in a browser, with a hand on the Stop button.

The service runs under `opentelemetry-instrument` in a process of its own. The model behind it is a server
that knows what each answer came to, and what the service exports goes to a receiver: the tests compare the
two, and what the page shows with both.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from browsers import chromium
from embedded.answer import FAILED, OUT_OF_TOKENS, Answer, usage
from embedded.http_server import Cut, Exchange, Hold, Reply, ScriptedServer, SeenRequest
from embedded.otlp_receiver import OtlpReceiver, ReceivedSpan
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import eventually, usage_attributes
from programs import Collector, Jaeger, Prometheus

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat_service"
expect.set_options(timeout=15_000)

SERVICE = EXAMPLE / "service.py"
KEY = "sk-canary-key-7d10"
# Exports without the usual delay.
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "200"}


def plan(request: SeenRequest) -> Plan | Reply:
    """What the model does about each of the questions that are asked here."""
    words = ("One ", "two ", "three ", "four.")
    match request.json["input"]:
        case "Hello?":
            return Plan(Answer(usage=usage(23, 1187, reasoning=128)), pace=0.01)
        case "And then?":
            return Plan(Answer(usage=usage(1301, 64, cached=1024)))
        case "Talk.":
            return Plan(Answer(words, usage(40, 913)), cut_after=7, end=Hold())
        case "Think.":
            return Plan(Answer(usage=None), before=(Hold(),))
        case "Go on and on.":
            # More than all the buffers on the way can hold.
            return Plan(Answer(("on " * 10_000,) * 600, usage(7, 6000)))
        case "Write a page.":
            return Plan(Answer(("<h3>Ships</h3>\n", "<script>document.title = 'gone'</script>")))
        case "Talk at length.":
            return Plan(
                Answer(tuple(f"Line {n}.\n" for n in range(99))), cut_after=60, pace=0.005, end=Hold()
            )
        case "Be brief.":
            return Plan(Answer(words, usage(9, 16), ending=OUT_OF_TOKENS))
        case "Forget me.":
            return Plan(fate="lost")
        case "Fail.":
            return Plan(Answer(words, usage(11, 5), ending=FAILED))
        case "Break.":
            return Plan(Answer(words, usage(12, 77)), cut_after=7, end=Cut())
        case "Trail off.":
            return Plan(Answer(words, usage(13, 78)), cut_after=7)
    return error(401, f"Incorrect API key provided: {KEY}.", code="invalid_api_key")


@dataclass(frozen=True)
class Chat:
    """A running service, and the model's server behind it."""

    url: str
    process: subprocess.Popen[bytes]
    api: ResponsesAPI
    server: ScriptedServer

    @property
    def asked(self) -> list[Exchange]:
        """The answers asked for at the model's server, the newest last."""
        return [exchange for exchange in self.server.exchanges if exchange.request.method == "POST"]

    @property
    def newest(self) -> dict[str, Any]:
        """The newest response, as the server knows it."""
        return list(self.api.stored.values())[-1]

    def billed(self) -> Counter[str]:
        """The tokens of all responses."""
        bills = [response["usage"] for response in self.api.stored.values() if response["usage"]]
        return Counter({kind: sum(bill[f"{kind}_tokens"] for bill in bills) for kind in ("input", "output")})


@dataclass(frozen=True)
class Telemetry:
    """What has arrived of it over OTLP."""

    receiver: OtlpReceiver

    def span_of(self, response: dict[str, Any]) -> ReceivedSpan:
        """The span of a response, once it has arrived."""
        return self.span({"gen_ai.response.id": response["id"]})

    def span(self, wanted: dict[str, str]) -> ReceivedSpan:
        """The newest span with these attributes, once there is one."""

        def found() -> ReceivedSpan | None:
            spans = [span for span in self.receiver.spans if span.attributes.items() >= wanted.items()]
            return spans[-1] if spans else None

        span: ReceivedSpan = eventually(found, f"span with {wanted}")
        return span

    def counted(self) -> Counter[str]:
        """The sums of the token histogram as it last arrived."""
        metric = self.receiver.metrics.get("gen_ai.client.token.usage")
        sums: Counter[str] = Counter()
        for point in metric.points if metric else ():
            sums[point.attributes["gen_ai.token.type"]] += int(point.sum or 0)
        return sums


@contextmanager
def running(log: Path, endpoint: str, **settings: str) -> Iterator[Chat]:
    """The service, exporting to the endpoint, from the moment it listens; what it says goes to the log."""
    api = ResponsesAPI(plan)
    with ScriptedServer(api) as server, log.open("wb") as said:
        launcher = Path(sys.executable).with_name("opentelemetry-instrument")
        process = subprocess.Popen(  # noqa: S603 - the project's own file
            [launcher, sys.executable, SERVICE],
            env={
                "PATH": os.environ["PATH"],
                "PORT": "0",
                "OPENAI_API_KEY": KEY,
                "OPENAI_BASE_URL": f"{server.url}/v1",
                "OTEL_SERVICE_NAME": "chat",
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_METRICS_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                **settings,
            },
            stdout=said,
            stderr=said,
        )
        try:
            yield Chat(listening(log, process), process, api, server)
        finally:
            process.terminate()
            process.wait(30)


def listening(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the service says that it listens."""

    def found() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text("utf-8")
        return re.search(r"running on (http://\S+)", log.read_text("utf-8"))

    told: re.Match[str] = eventually(found, "listening", 60)
    return told[1]


@pytest.fixture(scope="module")
def telemetry() -> Iterator[Telemetry]:
    """The receiver of the service's telemetry."""
    with OtlpReceiver() as receiver:
        yield Telemetry(receiver)


@pytest.fixture(scope="module")
def chat(telemetry: Telemetry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    """The service; when it has stopped, it has said nothing of an exception."""
    log = tmp_path_factory.mktemp("chat") / "log.txt"
    with running(log, telemetry.receiver.grpc_endpoint, **SOON) as chat:
        yield chat
    said = log.read_text("utf-8")
    assert chat.process.returncode == -signal.SIGTERM, said  # uvicorn repeats the signal
    assert "Traceback" not in said
    assert KEY not in said


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium."""
    with chromium() as browser:
        yield browser


@contextmanager
def tab(browser: Browser, url: str) -> Iterator[Page]:
    """The page in a tab of its own, which asks nobody but its service and has no error."""
    with browser.new_context() as context:
        page = context.new_page()
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        yield page
        assert errors == []
        assert [where for where in asked if not where.startswith((f"{url}/", "data:"))] == []


@pytest.fixture
def page(browser: Browser, chat: Chat) -> Iterator[Page]:
    """The page, with an empty conversation."""
    with tab(browser, chat.url) as page:
        yield page


def ask(page: Page, question: str) -> Locator:
    """Ask and return the answer as it stands on the page, now and later."""
    before = page.get_by_role("listitem").count()
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Send").click()
    return page.get_by_role("listitem").nth(before + 1)


def wait_until_left(exchange: Exchange) -> None:
    """Until the service has closed its connection for this answer, which must be soon."""
    eventually(lambda: exchange.client_left_at, "closed upstream", 5)


def test_finished_answers_show_what_is_billed(chat: Chat, telemetry: Telemetry, page: Page) -> None:
    """The page shows the tokens of each finished answer, and spans with the same numbers arrive."""
    expect(ask(page, "Hello?")).to_contain_text("Hello, world!23 tokens in, 1,187 out, 128 of them reasoning")
    first, span = chat.newest, telemetry.span_of(chat.newest)
    assert span.attributes["openai_responses.stream.outcome"] == "completed"
    assert span.attributes["openai_responses.usage.source"] == "stream"
    assert span.attributes.items() >= usage_attributes(first["usage"]).items()

    expect(ask(page, "And then?")).to_contain_text("1,301 tokens in, 64 out")
    assert chat.asked[-1].request.json["previous_response_id"] == first["id"]
    assert telemetry.span_of(chat.newest).attributes.items() >= usage_attributes(chat.newest["usage"]).items()


def test_stop_ends_the_answer_and_its_tokens_are_known(chat: Chat, telemetry: Telemetry, page: Page) -> None:
    """A stopped answer stays, marked, its stream is closed at once, and what it came to is looked up."""
    expect(ask(page, "Hello?")).to_contain_text("1,187 out")
    finished = chat.newest["id"]
    answer = ask(page, "Talk.")
    expect(answer).to_contain_text("One two three")

    page.get_by_role("button", name="Stop").click()
    expect(answer).to_contain_text("One two three Stopped.")
    wait_until_left(chat.asked[-1])
    span = telemetry.span_of(chat.newest)
    assert span.attributes["openai_responses.stream.outcome"] == "cancelled"
    assert span.attributes["openai_responses.usage.source"] == "retrieval"
    assert span.attributes.items() >= usage_attributes(usage(40, 913)).items()

    expect(ask(page, "And then?")).to_contain_text("64 out")
    assert chat.asked[-1].request.json["previous_response_id"] == finished


def test_stop_before_the_first_word_ends_the_call(chat: Chat, telemetry: Telemetry, page: Page) -> None:
    """An answer can be stopped before it begins; its call is closed at once and says why it has no tokens."""
    answer = ask(page, "Think.")
    eventually(lambda: chat.asked and chat.asked[-1].request.json["input"] == "Think.", "asked")
    page.get_by_role("button", name="Stop").click()
    expect(answer).to_contain_text("Stopped.")
    wait_until_left(chat.asked[-1])
    span = telemetry.span({"openai_responses.usage.missing_reason": "no_response_id"})
    assert span.attributes["openai_responses.stream.outcome"] == "cancelled"


def test_a_closed_tab_ends_the_answer_and_its_tokens_are_known(
    chat: Chat, telemetry: Telemetry, page: Page
) -> None:
    """When a tab is closed in mid-answer, the stream is closed at once, and what it came to is looked up."""
    expect(ask(page, "Talk.")).to_contain_text("One two three")
    page.close()
    wait_until_left(chat.asked[-1])
    span = telemetry.span_of(chat.newest)
    assert span.attributes["openai_responses.stream.outcome"] == "cancelled"
    assert span.attributes["openai_responses.usage.source"] == "retrieval"
    assert span.attributes.items() >= usage_attributes(usage(40, 913)).items()


def test_a_browser_that_reads_slowly_can_leave_too(chat: Chat, telemetry: Telemetry) -> None:
    """Also when the service waits for the browser and not for the model, the stream is closed at once."""
    body = b'{"text": "Go on and on."}'
    head = f"POST /answers HTTP/1.1\r\nhost: chat\r\ncontent-length: {len(body)}\r\n"
    host, _, port = chat.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        eventually(lambda: stalled(chat), "stalled")
    wait_until_left(chat.asked[-1])
    span = telemetry.span_of(chat.newest)
    assert span.attributes["openai_responses.stream.outcome"] in {"closed", "cancelled"}
    assert span.attributes.items() >= usage_attributes(usage(7, 6000)).items()


def stalled(chat: Chat) -> bool:
    """Whether the newest answer has begun and got stuck on its way."""
    written_at = chat.asked[-1].last_write_at if chat.asked else None
    return written_at is not None and time.time() - written_at > 1 and not chat.asked[-1].ended_at


def test_an_answer_cut_short_says_so(chat: Chat, telemetry: Telemetry, page: Page) -> None:
    """The page says why an answer is incomplete, and shows its tokens."""
    expect(ask(page, "Be brief.")).to_contain_text("Cut short by the token limit. 9 tokens in, 16 out")
    assert telemetry.span_of(chat.newest).attributes["openai_responses.stream.outcome"] == "incomplete"


def test_what_a_model_writes_is_text(page: Page) -> None:
    """Markup in an answer is shown as it was written, line by line, and is not part of the page."""
    answer = ask(page, "Write a page.")
    expect(answer).to_contain_text("tokens in")
    lines = answer.inner_text().splitlines()
    assert {"<h3>Ships</h3>", "<script>document.title = 'gone'</script>"} <= set(lines)
    assert page.title() == "Chat"


@pytest.mark.parametrize(
    ("question", "shown", "outcome"),
    [
        ("Fail.", "One two three four.Something went wrong on our side.", "failed"),
        ("Break.", "One two three The connection to the model failed.", "cut"),
        ("Trail off.", "One two three The answer broke off.", "truncated"),
        ("Be refused.", "Something went wrong on our side.", "error"),
    ],
)
def test_trouble_is_told_kindly(
    chat: Chat, telemetry: Telemetry, page: Page, question: str, shown: str, outcome: str
) -> None:
    """What goes wrong is said in plain words beside what has been written, and can be tried again."""
    answer = ask(page, question)
    expect(answer).to_contain_text(shown)
    assert KEY not in page.content()
    asked = len(chat.asked)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("listitem")).to_have_count(2)
    expect(answer).to_contain_text(shown)
    assert [exchange.request.json["input"] for exchange in chat.asked[asked:]] == [question]

    span = telemetry.span({"openai_responses.stream.outcome": outcome})
    if outcome != "error":
        assert span.attributes.items() >= usage_attributes(chat.newest["usage"]).items()


def test_a_lost_connection_is_told_kindly(page: Page) -> None:
    """Without a network the page says so, and the question can be asked again when it is back."""
    page.context.set_offline(True)
    expect(ask(page, "Hello?")).to_contain_text("The connection to the service failed.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("listitem").last).to_contain_text("1,187 out")


def test_a_conversation_that_is_gone_can_be_begun_anew(chat: Chat, page: Page) -> None:
    """If the API has forgotten what a question goes on from, the page offers to ask it anew."""
    expect(ask(page, "Forget me.")).to_contain_text("tokens in")
    expect(ask(page, "And then?")).to_contain_text("cannot be continued any more")
    page.get_by_role("button", name="Ask in a new conversation").click()
    expect(page.get_by_role("listitem")).to_have_count(2)
    expect(page.get_by_role("listitem").last).to_contain_text("64 out")
    assert chat.asked[-1].request.json["previous_response_id"] is None


def test_a_new_conversation_leaves_the_old_one_behind(chat: Chat, page: Page) -> None:
    """A new conversation, also one begun in mid-answer, has an empty page and goes on from nothing."""
    expect(ask(page, "Hello?")).to_contain_text("1,187 out")
    expect(ask(page, "Talk.")).to_contain_text("One two three")
    page.get_by_role("button", name="New conversation").click()
    wait_until_left(chat.asked[-1])
    expect(page.get_by_role("listitem")).to_have_count(0)
    page.get_by_role("button", name="Draw a crew of five.").click()
    expect(page.get_by_role("listitem")).to_have_count(2)
    eventually(lambda: chat.asked[-1].request.json["input"] == "Draw a crew of five.", "asked")
    assert chat.asked[-1].request.json["previous_response_id"] is None


def test_the_keyboard_and_a_screen_reader_are_enough(page: Page) -> None:
    """Enter asks, Escape stops, the focus stays, and whole answers and their ends are announced."""
    field, status = page.get_by_label("Your question"), page.get_by_role("status")
    expect(field).to_be_focused()
    page.keyboard.type("Hello?")
    page.keyboard.press("Enter")
    expect(status).to_have_text("Hello, world! 23 tokens in, 1,187 out, 128 of them reasoning")
    expect(field).to_be_focused()

    page.keyboard.type("Talk.")
    page.keyboard.press("Enter")
    expect(status).to_have_text("Answering")
    expect(page.get_by_role("listitem").last).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("listitem").last).to_contain_text("One two three")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Escape")
    expect(status).to_have_text("One two three Stopped. What you ask next goes on without it.")
    expect(field).to_be_focused()
    expect(page.locator("[aria-busy]")).to_have_count(0)
    assert page.get_by_role("heading", level=2).all_text_contents() == ["You asked", "Answer"] * 2


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    """On a phone as on a desk, with long words, all is within the window and the question is in sight."""
    page.set_viewport_size({"width": width, "height": 480})
    for question in ("Hello?", "And then?", "Fail.", "Be brief." + "!" * 400):
        ask(page, question)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.evaluate("[...document.querySelectorAll('*')].every(e => e.scrollWidth <= innerWidth)")
    expect(page.get_by_label("Your question")).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("listitem").last).to_be_in_viewport()


def test_the_end_stays_in_sight(page: Page) -> None:
    """The page follows an answer and makes room for a long question, unless its reader has scrolled up."""
    page.set_viewport_size({"width": 400, "height": 500})
    expect(ask(page, "Talk at length.")).to_contain_text("Line 54.")
    at_end = "main => Math.abs(main.scrollHeight - main.scrollTop - main.clientHeight) < 2"
    main = page.get_by_role("main")
    eventually(lambda: main.evaluate(at_end), "at the end of the answer")
    page.get_by_label("Your question").fill("One\ntwo\nthree\nfour")
    eventually(lambda: main.evaluate(at_end), "at the end beside a long question")

    main.hover()
    page.mouse.wheel(0, -300)
    eventually(lambda: not main.evaluate(at_end), "scrolled up")
    page.keyboard.press("Escape")
    expect(page.get_by_role("listitem").last).to_contain_text("Stopped.")
    assert not main.evaluate(at_end)


def test_the_histogram_has_the_tokens_of_every_answer(chat: Chat, telemetry: Telemetry, page: Page) -> None:
    """The token metric adds up to what the server has billed for all the answers, finished or not."""
    expect(ask(page, "Hello?")).to_contain_text("1,187 out")
    expect(ask(page, "Talk.")).to_contain_text("One two three")
    page.get_by_role("button", name="Stop").click()
    billed = chat.billed()
    eventually(lambda: telemetry.counted() == billed, f"{billed} counted")


def test_a_call_belongs_to_the_request_that_made_it(chat: Chat, telemetry: Telemetry, page: Page) -> None:
    """Where FastAPI has a span for each request, the span of a call is its child, also of a stopped one."""
    pytest.importorskip("fastapi.telemetry", reason="this FastAPI has no spans of its own")
    expect(ask(page, "Talk.")).to_contain_text("One two three")
    page.get_by_role("button", name="Stop").click()
    span = telemetry.span_of(chat.newest)
    parents = eventually(
        lambda: [parent for parent in telemetry.receiver.spans if parent.span_id == span.parent_id], "parent"
    )
    assert [(parent.kind, parent.name) for parent in parents] == [("SERVER", "POST /answers")]


def test_tokens_arrive_in_jaeger_and_prometheus(browser: Browser, tmp_path: Path) -> None:
    """Through a Collector, Jaeger has the tokens of each answer on its span, and Prometheus their sums."""
    with (
        Jaeger(tmp_path / "jaeger") as jaeger,
        Collector(tmp_path / "otelcol", JAEGER_OTLP_ENDPOINT=jaeger.otlp_endpoint) as collector,
        running(tmp_path / "log.txt", f"http://{collector.grpc_endpoint}", **SOON) as chat,
    ):
        scraped = {"targets": [f"127.0.0.1:{collector.prometheus_port}"]}
        scrape = {"job_name": "otelcol", "honor_labels": True, "static_configs": [scraped]}
        config = {"global": {"scrape_interval": "500ms"}, "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        with Prometheus(tmp_path / "prometheus", tmp_path / "prometheus.yml") as prometheus:
            with tab(browser, chat.url) as page:
                expect(ask(page, "Hello?")).to_contain_text("1,187 out")
                expect(ask(page, "Talk.")).to_contain_text("One two three")
                page.get_by_role("button", name="Stop").click()
                expect(ask(page, "And then?")).to_contain_text("64 out")
            with tab(browser, chat.url) as page:
                expect(ask(page, "Talk.")).to_contain_text("One two three")
                page.close()
            outcomes = ["completed", "cancelled", "completed", "cancelled"]
            assert len(chat.api.stored) == len(outcomes)

            told = {
                response["id"]: {"openai_responses.stream.outcome": outcome}
                | usage_attributes(response["usage"])
                for response, outcome in zip(chat.api.stored.values(), outcomes, strict=True)
            }
            eventually(lambda: in_jaeger(jaeger) == told, f"{told} in Jaeger", 30)
            billed = chat.billed()
            eventually(lambda: in_prometheus(prometheus) == billed, f"{billed} in Prometheus", 30)


def in_jaeger(jaeger: Jaeger) -> dict[str, dict[str, Any]]:
    """By response: how its call ended, and its tokens."""
    calls: dict[str, dict[str, Any]] = {}
    for span in jaeger.spans("chat"):
        tags = {tag["key"]: tag["value"] for tag in span["tags"]}
        if response := tags.get("gen_ai.response.id"):
            wanted = ("openai_responses.stream.outcome", "gen_ai.usage.")
            calls[response] = {key: value for key, value in tags.items() if key.startswith(wanted)}
    return calls


def in_prometheus(prometheus: Prometheus) -> dict[str, int]:
    """The sums of the token histogram."""
    sums = prometheus.query('sum by (gen_ai_token_type) (gen_ai_client_token_usage_sum{job="chat"})')
    return {series["metric"]["gen_ai_token_type"]: int(series["value"][1]) for series in sums}


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_a_service_that_is_stopped_loses_no_tokens(how: signal.Signals, code: int, tmp_path: Path) -> None:
    """Asked to stop, the service exits in good order, and the tokens of an answer under way have arrived."""
    with (
        OtlpReceiver() as receiver,
        running(tmp_path / "log.txt", receiver.grpc_endpoint) as chat,
        httpx.Client(trust_env=False) as client,
    ):
        with client.stream("POST", f"{chat.url}/answers", json={"text": "Talk."}) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: text"
            chat.process.send_signal(how)
            assert chat.process.wait(20) == code
        telemetry = Telemetry(receiver)
        span = telemetry.span_of(chat.newest)
        assert span.attributes["openai_responses.stream.outcome"] == "cancelled"
        assert span.attributes.items() >= usage_attributes(usage(40, 913)).items()
        assert telemetry.counted() == {"input": 40, "output": 913}


def test_one_command_shows_page_and_telemetry(tmp_path: Path) -> None:
    """Without a key and a Collector the script serves page and answers, and at Ctrl-C prints what arrived."""
    log = tmp_path / "log.txt"
    names = ("OTEL_", "OPENAI_", "COLUMNS")
    with log.open("wb") as said, httpx.Client(trust_env=False) as client:
        process = subprocess.Popen(  # noqa: S603 - the project's own file
            [EXAMPLE / "run"],
            env={name: value for name, value in os.environ.items() if not name.startswith(names)}
            | {"PORT": "0", "COLUMNS": "120"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            url = listening(log, process)
            assert "<title>Chat</title>" in client.get(url).text
            answer = client.post(f"{url}/answers", json={"text": "Draw a crew of five."}).text
            with client.stream("POST", f"{url}/answers", json={"text": "Tell me a long story."}) as stream:
                lines = stream.iter_lines()
                assert next(lines) == "event: text"
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(30)
    said_text = log.read_text("utf-8")
    assert process.returncode == 0, said_text
    assert '"output_tokens": 187' in answer
    assert re.search(r"completed +14 +187 +23 +187 +- +128 +stream", said_text)
    assert re.search(r"cancelled +\d+ +- +36 +196 +- +- +retrieval", said_text)


def test_the_only_lines_of_telemetry_are_those_of_the_shutdown() -> None:
    """The service imports two modules of OpenTelemetry and shuts the providers down. Its page has nothing."""
    found = {
        name: [
            line.strip()
            for line in (EXAMPLE / name).read_text("utf-8").splitlines()
            if re.search("otel|telemetry|tracer|provider", line, re.IGNORECASE)
        ]
        for name in ("service.py", "page.html")
    }
    assert found == {
        "service.py": [
            "from opentelemetry import metrics, trace",
            "for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):",
            'if hasattr(provider, "shutdown"):',
            "provider.shutdown()",
        ],
        "page.html": [],
    }
