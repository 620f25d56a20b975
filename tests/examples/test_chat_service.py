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
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from websockets.protocol import State

from browsers import chromium
from embedded.answer import FAILED, OUT_OF_TOKENS, Answer, usage
from embedded.http_server import Cut, Exchange, Hold, Reply, ScriptedServer, SeenRequest
from embedded.otlp_receiver import OtlpReceiver, ReceivedSpan
from embedded.responses_api import Plan, ResponsesAPI, error
from embedded.websocket_api import Turn, WebSocketAPI
from embedded.websocket_api import error as refusal
from observed import eventually, usage_attributes
from programs import Collector, Jaeger, Prometheus

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat_service"
expect.set_options(timeout=15_000)

SERVICE = EXAMPLE / "service.py"
LINK = "https://example.com/" + "a-long_path" * 26
KEY = "sk-canary-key-7d10"
# Exports without the usual delay.
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "200"}


# Each line would run something, or load something, if it got into the page as it is.
ATTACK = """\
<img src=x onerror="document.title='gone'">
<svg onload="document.title='gone'">
<iframe srcdoc="<script>parent.document.title='gone'</script>"></iframe>

[one](javascript:document.title='gone') [two](data:text/html,<script>1</script>) [three](vbscript:x)
[four](JaVaScRiPt&colon;document.title='gone') <javascript:document.title='gone'>
[five]( javascript:document.title='gone') [six](/usage "x\" onmouseover=\"document.title='gone'")
![seven](https://127.0.0.1:1/seen.png) ![eight](javascript:1)
[nine](https://example.com/"onmouseover="document.title='gone')

```"><script>document.title='gone'</script>
code
```

| a | b |
| :-: | --: |
| <b onclick="document.title='gone'">bold</b> | **2** |
"""

MARKDOWN = """\
# Ships

A **bold** word, `code`, and [a link](https://example.com/a).

- one
- two
  - three

1. first

2. second

```python
def ship(**cargo):
    return [cargo]
```

| ship | weight |
| --- | ---: |
| Aurora | 187 |

The end.
"""


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
        case "Attack.":
            return Plan(Answer(tuple(re.findall(r"[\s\S]{1,3}", ATTACK)), usage(15, 99)))
        case "Use Markdown.":
            return Plan(Answer(tuple(re.findall(r"[\s\S]{1,2}", MARKDOWN)), usage(16, 120)), pace=0.01)
        case "Talk and forget.":
            return Plan(Answer(words, usage(41, 914)), cut_after=7, end=Hold(), fate="lost")
        case str(text) if text.startswith("Bill "):
            # "Bill 3 times 7" has tokens of its own.
            bill = usage(*(100 + int(number) for number in re.findall(r"\d+", text)))
            return Plan(Answer(words * 3, bill), pace=0.02)
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
    ledger: Path

    @property
    def asked(self) -> list[Exchange]:
        """The answers asked for at the model's server, the newest last."""
        return [exchange for exchange in self.server.exchanges if exchange.request.method == "POST"]

    @property
    def newest(self) -> dict[str, Any]:
        """The newest response, as the server knows it."""
        return list(self.api.stored.values())[-1]

    def billed(self) -> Counter[str]:
        """The tokens of all responses that the service has been told of, or can look up."""
        sums: Counter[str] = Counter()
        for response_id, response in self.api.stored.items():
            plan = self.api._records[response_id].plan
            if response["usage"] and not (plan.fate == "lost" and plan.cut_after):
                sums.update({kind: response["usage"][f"{kind}_tokens"] for kind in ("input", "output")})
        return sums

    def calls(self) -> list[dict[str, Any]]:
        """The rows of the ledger, the oldest first."""
        with closing(sqlite3.connect(self.ledger)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute("SELECT * FROM calls ORDER BY started_at")]

    def call(self, response_id: str) -> dict[str, Any]:
        """The row of a response, once it has ended."""

        def found() -> dict[str, Any] | None:
            return next((row for row in self.calls() if row["id"] == response_id and row["outcome"]), None)

        call: dict[str, Any] = eventually(found, f"{response_id} in the ledger")
        return call


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

    def counted(self, wanted: Mapping[str, str] = MappingProxyType({})) -> Counter[str]:
        """The sums of the token histogram as it last arrived, of the points with these attributes."""
        metric = self.receiver.metrics.get("gen_ai.client.token.usage")
        sums: Counter[str] = Counter()
        for point in metric.points if metric else ():
            if not point.attributes.items() >= wanted.items():
                continue
            sums[point.attributes["gen_ai.token.type"]] += int(point.sum or 0)
        return sums


@contextmanager
def running(log: Path, endpoint: str, **settings: str) -> Iterator[Chat]:
    """The service, exporting to the endpoint, from the moment it listens; what it says goes to the log."""
    api = ResponsesAPI(plan)
    with (
        ScriptedServer(api) as server,
        serving(log, f"{server.url}/v1", endpoint, **settings) as (url, process),
    ):
        yield Chat(url, process, api, server, log.with_name("ledger.db"))


@contextmanager
def serving(
    log: Path, model_url: str, endpoint: str, **settings: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The process of the service and its URL. Its ledger lies beside its log."""
    with log.open("wb") as said:
        launcher = Path(sys.executable).with_name("opentelemetry-instrument")
        process = subprocess.Popen(  # noqa: S603 - the project's own file
            [launcher, sys.executable, SERVICE],
            env={
                "PATH": os.environ["PATH"],
                "PORT": "0",
                "OPENAI_API_KEY": KEY,
                "OPENAI_BASE_URL": model_url,
                "OTEL_SERVICE_NAME": "chat",
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_METRICS_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_RESPONSES_USAGE_ON_CALL": "ledger:LEDGER.record",
                "OTEL_RESPONSES_USAGE_BAGGAGE_KEYS": "enduser.id",
                "CHAT_LEDGER": str(log.with_name("ledger.db")),
                **settings,
            },
            stdout=said,
            stderr=said,
        )
        try:
            yield listening(log, process), process
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
    expect(ask(page, "Hello?")).to_contain_text(
        "Hello, world! 23 tokens in, 1,187 out, 128 of them reasoning"
    )
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
    expect(answer).to_contain_text(re.compile(r"Stopped\. 40 tokens in, 913 out, looked up in .*0\.\d s\."))
    expect(page.locator("#sum")).to_have_text("This conversation: 63 tokens in, 2,100 out")

    expect(ask(page, "And then?")).to_contain_text("64 out")
    assert chat.asked[-1].request.json["previous_response_id"] == finished


def test_stop_before_the_first_word_ends_the_call(chat: Chat, telemetry: Telemetry, page: Page) -> None:
    """An answer can be stopped before it begins; its call is closed at once and says why it has no tokens."""
    answer = ask(page, "Think.")
    rows = len(chat.calls())
    eventually(lambda: chat.asked and chat.asked[-1].request.json["input"] == "Think.", "asked")
    page.get_by_role("button", name="Stop").click()
    expect(answer).to_contain_text("Stopped.")
    wait_until_left(chat.asked[-1])
    span = telemetry.span({"openai_responses.usage.missing_reason": "no_response_id"})
    assert span.attributes["openai_responses.stream.outcome"] == "cancelled"
    expect(answer).to_contain_text("Stopped. Its tokens are unknown: the answer had not begun.")
    assert [call["missing_reason"] for call in chat.calls()[rows:]] == ["no_response_id"]
    expect(page.locator("#sum")).to_have_text("This conversation: 0 tokens in, 0 out · 1 answer unknown")


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
        ("Fail.", "One two three four. Something went wrong on our side.", "failed"),
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
    expect(status).to_have_text(re.compile(r"Stopped\. 40 tokens in, 913 out, looked up in .* without it\."))
    expect(field).to_be_focused()
    expect(page.locator("[aria-busy]")).to_have_count(0)
    assert page.get_by_role("heading", level=2).all_text_contents() == ["You asked", "Answer"] * 2


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    """On a phone as on a desk, with long words, all is within the window and the question is in sight."""
    page.set_viewport_size({"width": width, "height": 480})
    for question in ("Hello?", "Use Markdown.", "Fail.", "Be brief." + "!" * 400, LINK):
        page.get_by_label("Your question").fill(question)
        expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
        ask(page, question)
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
    # Long lines of code scroll, within their block.
    wide = "[...document.querySelectorAll('body, body :not(code)')].filter(e => e.scrollWidth > innerWidth)"
    assert page.evaluate(f"{wide}.map(e => e.outerHTML)") == []
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


def test_a_stopped_answer_that_the_server_forgets_says_so(chat: Chat, page: Page) -> None:
    """If the model's server no longer has the answer, page and ledger say why it has no tokens."""
    answer = ask(page, "Talk and forget.")
    expect(answer).to_contain_text("One two three")
    page.get_by_role("button", name="Stop").click()
    expect(answer).to_contain_text("Looking up its tokens")
    expect(page.locator("#sum")).to_be_hidden()
    expect(answer).to_contain_text("Its tokens are unknown: the model's server no longer has this answer.")
    expect(page.locator("#sum")).to_have_text("This conversation: 0 tokens in, 0 out · 1 answer unknown")
    call = chat.call(chat.newest["id"])
    assert (call["missing_reason"], call["input_tokens"], call["output_tokens"]) == ("not_found", None, None)


def test_an_answer_that_broke_off_shows_its_tokens(page: Page) -> None:
    """The page shows the tokens of an answer whose connection was lost, beside the trouble."""
    expect(ask(page, "Break.")).to_contain_text(re.compile("Try again12 tokens in, 77 out, looked up in"))
    expect(page.locator("#sum")).to_have_text("This conversation: 12 tokens in, 77 out")


def test_the_tokens_of_a_closed_tab_are_in_the_ledger(chat: Chat, browser: Browser) -> None:
    """A page that is opened later shows the tokens of an answer whose tab was closed, under Usage."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(chat.url)
        expect(ask(page, "Talk.")).to_contain_text("One two three")
        page.close()
        chat.call(chat.newest["id"])
        page = context.new_page()
        page.goto(chat.url)
        page.get_by_role("button", name="Usage").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_role("definition")).to_have_text(["40", "913", "1"])
        expect(dialog.get_by_role("row").nth(1)).to_have_text(re.compile(r"\d\d:\d\dstopped40913"))
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()


def test_each_user_sees_their_own_usage(chat: Chat, telemetry: Telemetry, browser: Browser) -> None:
    """Two browsers are two users, a request without a cookie is `anonymous`, and no other header counts."""
    users = []
    for question, tokens in (("Hello?", (23, 1187)), ("Be brief.", (9, 16))):
        with tab(browser, chat.url) as page:
            expect(ask(page, question)).to_contain_text("tokens in")
            chat.call(chat.newest["id"])
            told = page.evaluate("fetch('usage').then((response) => response.json())")
            assert (told["calls"], told["input_tokens"], told["output_tokens"]) == (1, *tokens)
            assert telemetry.span_of(chat.newest).attributes["enduser.id"] == told["user"]
            cookie = page.context.cookies()[0]
            assert cookie["httpOnly"]
            assert cookie["value"] not in json.dumps(told)
            users.append(told["user"])
    assert len({*users, "anonymous"}) == 3
    with httpx.Client(trust_env=False) as client:
        spoofed = {"baggage": f"enduser.id={users[0]}", "x-user": users[0]}
        client.post(f"{chat.url}/answers", json={"text": "Hello?"}, headers=spoofed)
        assert chat.call(chat.newest["id"])["user"] == "anonymous"
        assert client.get(f"{chat.url}/usage", headers=spoofed).json()["user"] == "anonymous"


def test_a_question_is_shown_to_its_user_only(chat: Chat) -> None:
    """The call of a question is a 404 for another user."""
    with httpx.Client(trust_env=False) as mine, httpx.Client(trust_env=False) as other:
        for client in (mine, other):
            client.get(chat.url)
        mine.post(f"{chat.url}/answers", json={"text": "Hello?", "id": "a" * 32})
        chat.call(chat.newest["id"])
        assert mine.get(f"{chat.url}/usage/{'a' * 32}").json()["output_tokens"] == 1187
        assert other.get(f"{chat.url}/usage/{'a' * 32}").status_code == 404


def test_the_user_is_an_attribute_of_the_metrics(chat: Chat, telemetry: Telemetry, browser: Browser) -> None:
    """The token metric of a user has their tokens, also those of a stopped answer."""
    with tab(browser, chat.url) as page:
        expect(ask(page, "Hello?")).to_contain_text("1,187 out")
        expect(ask(page, "Talk.")).to_contain_text("One two three")
        page.get_by_role("button", name="Stop").click()
        user = page.evaluate("fetch('usage').then((response) => response.json())")["user"]
        wanted = Counter({"input": 63, "output": 2100})
        eventually(lambda: telemetry.counted({"enduser.id": user}) == wanted, f"{wanted} of {user}")


def test_markup_of_an_answer_does_nothing(page: Page) -> None:
    """Markup, addresses of scripts and remote images in an answer are text, also while it is written."""
    answer = ask(page, "Attack.")
    expect(answer).to_contain_text("15 tokens in")
    assert page.title() == "Chat"
    text = answer.locator(".text")
    assert text.locator("img, svg, iframe, script, style, [style], [onclick], [onmouseover]").count() == 0
    hrefs = [link.get_attribute("href") for link in text.locator("a").all()]
    assert hrefs == [
        "https://127.0.0.1:1/seen.png",
        "https://example.com/%22onmouseover=%22document.title='gone'",
    ]
    expect(text.locator("td").first).to_have_text("<b onclick=\"document.title='gone'\">bold</b>")
    # And if markup got in, the page would still not run it.
    handler = '<img src=x onerror="document.title=1"><b onclick="document.title=2">b</b>'
    page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", handler)
    page.evaluate("document.body.lastElementChild.click()")
    page.wait_for_timeout(200)
    assert page.title() == "Chat"


def test_markdown_is_drawn_while_it_is_written(page: Page) -> None:
    """An answer is formatted from its first word on. Complete blocks are drawn once."""
    page.evaluate(WATCH)
    answer = ask(page, "Use Markdown.")
    expect(answer).to_contain_text("16 tokens in")
    text = answer.locator(".text")
    expect(text.locator("h1")).to_have_text("Ships")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("ul ul li")).to_have_text("three")
    expect(text.locator("ol > li")).to_have_text(["first", "second"])
    expect(text.locator("pre code")).to_have_text("def ship(**cargo):\n    return [cargo]\n")
    expect(text.locator("td")).to_have_text(["Aurora", "187"])
    assert text.locator("a").get_attribute("rel") == "noopener noreferrer nofollow"
    assert text.locator("a").get_attribute("target") == "_blank"
    seen = page.evaluate("window.seen")
    assert len(seen) > 30
    flashed = [line for line in seen if re.search(r"\*\*bold|# S|`code|\[a link|^- one|```", line)]
    assert flashed == []
    # The heading and the paragraph are those that were drawn first.
    assert page.evaluate("window.first === document.querySelector('.answer .text h1')")


# Keeps what the answer looked like whenever it was drawn, and its first heading once more follows.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const text = document.querySelector(".answer .text");
  if (text) window.seen.push(text.innerText);
  if (text?.querySelector("pre")) window.first ??= text.querySelector("h1");
}).observe(document.getElementById("log"), { childList: true, subtree: true });
"""


def test_a_killed_service_counts_every_answer_once(browser: Browser, tmp_path: Path) -> None:
    """After SIGKILL in mid-answer and a restart the page gets the tokens, and the ledger equals the bill."""
    with (
        OtlpReceiver() as receiver,
        running(tmp_path / "log.txt", receiver.grpc_endpoint) as chat,
        tab(browser, chat.url) as page,
    ):
        expect(ask(page, "Hello?")).to_contain_text("1,187 out")
        answer = ask(page, "Talk.")
        expect(answer).to_contain_text("One two three")
        forgotten = httpx.post(f"{chat.url}/answers", json={"text": "Forget me."}, trust_env=False)
        assert forgotten.status_code == 200
        before = chat.call(chat.newest["id"])
        chat.process.kill()
        chat.process.wait(10)
        expect(answer).to_contain_text("The connection to the service failed.")
        assert [call["outcome"] for call in chat.calls()] == ["completed", None, "completed"]

        port = chat.url.rpartition(":")[2]
        for start in range(2):  # the second start has nothing left to do
            log = tmp_path / f"log{start}.txt"
            with serving(log, f"{chat.server.url}/v1", receiver.grpc_endpoint, PORT=port) as (_, process):
                expect(answer).to_contain_text("40 tokens in, 913 out, looked up after a restart")
                calls = chat.calls()
                assert [call["outcome"] for call in calls] == ["completed", "killed", "completed"]
                assert calls[2] == before
                bills = [response["usage"] for response in chat.api.stored.values()]
                assert [(call["input_tokens"], call["output_tokens"]) for call in calls] == [
                    (bill["input_tokens"], bill["output_tokens"]) for bill in bills
                ]
                process.kill()
        expect(page.locator("#sum")).to_have_text("This conversation: 63 tokens in, 2,100 out")


def test_the_ledger_has_what_the_server_bills_to_each_user(tmp_path: Path) -> None:
    """Of many answers, finished, left and killed half-way, each user's sums are those of the server."""
    users = [f"user-{number}" for number in range(6)]
    begun: list[str] = []

    def ask_once(url: str, number: int, turn: int) -> None:
        question, headers = {"text": f"Bill {number} times {turn}"}, {"x-user": users[number]}
        with (
            suppress(httpx.HTTPError),
            httpx.stream(
                "POST", f"{url}/answers", json=question, headers=headers, trust_env=False, timeout=60
            ) as response,
        ):
            for line in response.iter_lines():
                if line == "event: text":
                    begun.append(question["text"])
                    if turn % 3 == 0:
                        return  # like a closed tab

    with (
        OtlpReceiver() as receiver,
        running(tmp_path / "log.txt", receiver.grpc_endpoint, CHAT_USER_HEADER="x-user") as chat,
        ThreadPoolExecutor(36) as pool,
    ):

        def ask_all(turns: range) -> list[Future[None]]:
            return [pool.submit(ask_once, chat.url, number, turn) for number in range(6) for turn in turns]

        wait(ask_all(range(6)))
        eventually(lambda: all(call["outcome"] for call in chat.calls()), "settled")
        begun.clear()
        asked = ask_all(range(6, 12))
        eventually(lambda: len(set(begun)) == len(asked), "all begun")
        chat.process.kill()
        wait(asked)
        assert {call["outcome"] for call in chat.calls()} >= {None, "completed", "cancelled"}
        with serving(tmp_path / "log2.txt", f"{chat.server.url}/v1", receiver.grpc_endpoint):
            eventually(lambda: all(call["outcome"] for call in chat.calls()), "settled after the restart")

        kept, billed = ({user: Counter[str]() for user in users} for _ in range(2))
        for call in chat.calls():
            kept[call["user"]].update(calls=1, input=call["input_tokens"], output=call["output_tokens"])
        for response_id, response in chat.api.stored.items():
            user = users[int(chat.api._records[response_id].asked["input"].split()[1])]
            bill = response["usage"]
            billed[user].update(calls=1, input=bill["input_tokens"], output=bill["output_tokens"])
        assert kept == billed
        assert sum(sums["calls"] for sums in kept.values()) == 72


def turn(asked: dict[str, Any]) -> Turn:
    """What the model does about a question over its WebSocket."""
    words = ("One ", "two ", "three ", "four.")
    match asked["input"]:
        case "Talk.":
            return Turn(Answer(words, usage(40, 913)), cut_after=7, end=Hold())
        case "Break.":
            return Turn(Answer(words, usage(12, 77)), cut_after=7, end=Cut("rst"))
        case "Fail.":
            return Turn(Answer(words, usage(11, 5), ending=FAILED))
        case "Be refused.":
            return Turn(refusal=refusal("Slow down.", "rate_limit_exceeded", 429))
    return Turn(Answer(usage=usage(23, 1187, reasoning=128)), pace=0.01)


def test_answers_can_come_over_a_websocket(browser: Browser, tmp_path: Path) -> None:
    """With `CHAT_TRANSPORT=websocket` the page, the ledger and the spans have the same, also after Stop."""
    with (
        OtlpReceiver() as receiver,
        WebSocketAPI(turn) as api,
        serving(
            tmp_path / "log.txt", api.url, receiver.grpc_endpoint, **SOON, CHAT_TRANSPORT="websocket"
        ) as (url, _),
        tab(browser, url) as page,
    ):
        expect(ask(page, "Hello?")).to_contain_text("Hello, world! 23 tokens in, 1,187 out")
        answer = ask(page, "Talk.")
        expect(answer).to_contain_text("One two three")
        page.get_by_role("button", name="Stop").click()
        eventually(lambda: api.connections[-1].socket.state is State.CLOSED, "closed upstream", 5)
        expect(answer).to_contain_text(re.compile(r"Stopped\. 40 tokens in, 913 out, looked up in"))
        expect(ask(page, "Break.")).to_contain_text("The connection to the model failed.")
        expect(page.locator("#sum")).to_contain_text("75 tokens in, 2,177 out")
        expect(ask(page, "Fail.")).to_contain_text("Something went wrong on our side.")
        expect(page.locator("#sum")).to_contain_text("86 tokens in, 2,182 out")
        expect(ask(page, "Be refused.")).to_contain_text("Too many questions at once.")
        assert len(api.handshakes) == 5
        told = page.evaluate("fetch('usage').then((response) => response.json())")
        kept = {call["id"]: (call["outcome"], call["output_tokens"]) for call in told["latest"]}
        outcomes = ["completed", "cancelled", "cut", "failed"]
        wanted = {
            response["id"]: (outcome, response["usage"]["output_tokens"])
            for response, outcome in zip(api.stored.values(), outcomes, strict=True)
        }
        assert kept.items() >= wanted.items()
        telemetry = Telemetry(receiver)
        for response in api.stored.values():
            assert telemetry.span_of(response).attributes["enduser.id"] == told["user"]


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
        call = chat.call(chat.newest["id"])
        assert (call["outcome"], call["output_tokens"], call["user"]) == ("cancelled", 913, "anonymous")


def test_one_command_shows_page_and_telemetry(tmp_path: Path) -> None:
    """Without a key and a Collector the script serves page and answers, and at Ctrl-C prints what arrived."""
    log = tmp_path / "log.txt"
    names = ("OTEL_", "OPENAI_", "COLUMNS")
    with log.open("wb") as said, httpx.Client(trust_env=False) as client:
        process = subprocess.Popen(  # noqa: S603 - the project's own file
            [EXAMPLE / "run"],
            env={name: value for name, value in os.environ.items() if not name.startswith(names)}
            | {"PORT": "0", "COLUMNS": "120", "CHAT_LEDGER": str(tmp_path / "ledger.db")},
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


def test_the_only_lines_of_telemetry_are_baggage_and_shutdown() -> None:
    """The service puts the user into the baggage and shuts the providers down. Its page has nothing of it."""
    found = {
        name: [
            line.strip()
            for line in (EXAMPLE / name).read_text("utf-8").splitlines()
            if re.search("otel|opentelemetry|tracer|provider|context[.]", line) and "#" not in line
        ]
        for name in ("service.py", "users.py", "ledger.py", "page.html", "static/chat.js")
    }
    assert found == {
        "service.py": [
            "from opentelemetry import metrics, trace",
            "from otel_responses_usage import Usage",
            "for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):",
            'if hasattr(provider, "shutdown"):',
            "provider.shutdown()",
        ],
        "users.py": [
            "from opentelemetry import baggage, context",
            "token = context.attach(baggage.set_baggage(USER_KEY, user_of(HTTPConnection(scope))))",
            "context.detach(token)",
        ],
        "ledger.py": ["from otel_responses_usage import CallRecord, Usage"],
        "page.html": [],
        "static/chat.js": [],
    }
