"""The DEBUG log of the package: the story of each call."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from calls import CUT
from conftest import Instrument, Serve
from embedded.answer import Answer, usage
from embedded.http_server import Cut, Hold, ScriptedServer
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import HANGING_S

MODEL = "gpt-5.4-mini"
PROMPT, ANSWER, KEY = "canary-prompt-77", "canary-answer-78", "sk-canary-key-79"
PIECES = ("The ", ANSWER, " of ", "it.")
LINE = re.compile(r"Call (\d+) (opened|answered|ended|asked|settled)(?:: (.*)|\.)")

APP = """
import logging
from openai import OpenAI
from opentelemetry.sdk.trace import TracerProvider
from otel_responses_usage import ResponsesUsageInstrumentor

logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
logging.getLogger("otel_responses_usage").setLevel(logging.DEBUG)
ResponsesUsageInstrumentor().instrument(tracer_provider=TracerProvider())
with OpenAI().responses.create(model="gpt-5.4-mini", input="canary-prompt-77", stream=True) as stream:
    for event in stream:
        if event.type == "response.output_text.delta":
            break
"""


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[tuple[str, str]]]:
    """The steps that are logged, each with its facts; without what differs between runs."""
    told: list[tuple[str, str]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = LINE.fullmatch(record.getMessage())
            assert found is not None, record.getMessage()
            facts = re.sub(r" ?(?:span|request_id)=\S+", "", found[3] or "")
            told.append((found[2], facts))

    logger, handler = logging.getLogger("otel_responses_usage"), Lines()
    logger.addHandler(handler)
    with caplog.at_level(logging.DEBUG, logger.name):
        yield told
    logger.removeHandler(handler)


def call(server: ScriptedServer, *, early: bool = False, **more: object) -> None:
    """Make one streamed call, and leave it at its first delta if asked to."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    asked: dict[str, object] = {"model": MODEL, "input": PROMPT, "stream": True, **more}
    with client.responses.create(**asked) as stream:  # type: ignore[call-overload]
        for event in stream:
            if early and event.type == "response.output_text.delta":
                break


def test_a_call_whose_stream_has_its_usage(
    instrument: Instrument, serve: Serve, lines: list[tuple[str, str]]
) -> None:
    """Four lines: opened, answered, ended, settled."""
    instrument()
    answer = Answer(id="resp_1", pieces=PIECES, usage=usage(14, 9))
    call(serve(ResponsesAPI(lambda _: Plan(answer))))
    dated = f"{MODEL}-2026-03-17"
    assert lines == [
        ("opened", f"operation=chat model={MODEL}"),
        ("answered", ""),
        ("ended", f"response=resp_1 model={dated} outcome=completed events=12"),
        ("settled", f"response=resp_1 model={dated} source=stream"),
    ]


def test_a_call_that_is_looked_up(instrument: Instrument, serve: Serve, lines: list[tuple[str, str]]) -> None:
    """Each request of the look-up has a line with its number and what the server said."""
    observed = instrument()
    answer = Answer(id="resp_2", pieces=PIECES, usage=usage(14, 9))
    plan = Plan(answer, cut_after=6, end=Cut(), get_replies=("in_progress", error(503, "busy")))
    with pytest.raises(CUT):
        call(serve(ResponsesAPI(lambda _: plan)))
    observed.span()
    asked = [facts for step, facts in lines if step == "asked"]
    assert asked == [
        "response=resp_2 attempt=1 http=200 status=in_progress",
        "response=resp_2 attempt=2 http=503",
        "response=resp_2 attempt=3 http=200 status=completed",
    ]
    assert [step for step, _ in lines][:3] == ["opened", "answered", "ended"]
    assert "outcome=cut" in lines[2][1]
    assert lines[-1][0] == "settled"
    assert lines[-1][1].endswith("source=retrieval")


def test_a_call_without_usage_tells_the_reason(
    instrument: Instrument, serve: Serve, lines: list[tuple[str, str]]
) -> None:
    """The last line has the missing reason of the span."""
    observed = instrument()
    plan = Plan(Answer(id="resp_3", pieces=PIECES), cut_after=6, end=Hold(), fate="lost")
    call(serve(ResponsesAPI(lambda _: plan)), early=True, store=False)
    observed.span()
    assert lines[-1] == ("settled", f"response=resp_3 model={MODEL}-2026-03-17 reason=not_stored")


def test_a_refused_call_is_answered_and_ended(
    instrument: Instrument, serve: Serve, lines: list[tuple[str, str]]
) -> None:
    """The error is its code, and not its message, which can have a part of the key."""
    instrument()
    server = serve(lambda _: error(401, f"Incorrect API key provided: {KEY}", code="invalid_api_key"))
    with pytest.raises(openai.AuthenticationError):
        call(server)
    assert lines == [
        ("opened", f"operation=chat model={MODEL}"),
        ("answered", ""),
        ("ended", f"model={MODEL} outcome=error error=invalid_api_key"),
        ("settled", f"model={MODEL} reason=no_response_id"),
    ]


def test_nothing_is_logged_without_debug(
    instrument: Instrument, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """At INFO a call leaves no line."""
    instrument()
    with caplog.at_level(logging.INFO, "otel_responses_usage"):
        call(serve(ResponsesAPI(lambda _: Plan(Answer(pieces=PIECES)))))
    assert caplog.records == []


def test_a_logger_that_raises_harms_no_call(instrument: Instrument, serve: Serve) -> None:
    """A filter of the application that raises does not reach the application's call."""
    observed = instrument()
    logger = logging.getLogger("otel_responses_usage.story")

    def broken(record: logging.LogRecord) -> bool:
        raise RuntimeError(record.name)

    logger.addFilter(broken)
    level, logger.level = logger.level, logging.DEBUG
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    try:
        call(serve(ResponsesAPI(lambda _: Plan(Answer(pieces=PIECES, usage=usage(14, 9))))))
    finally:
        logger.removeFilter(broken)
        logger.setLevel(level)
    assert (observed.span().attributes or {})["gen_ai.usage.output_tokens"] == 9


def test_the_log_of_a_process_has_neither_content_nor_credentials(tmp_path: Path, serve: Serve) -> None:
    """A whole process with its root logger at DEBUG: the story is there, the prompt and the key are not."""
    program = tmp_path / "app.py"
    program.write_text(APP)
    plan = Plan(Answer(id="resp_9", pieces=PIECES, usage=usage(1, 2)), cut_after=6, end=Hold())
    server = serve(ResponsesAPI(lambda _: plan, key=KEY))
    environment = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"{server.url}/v1"}
    done = subprocess.run(  # noqa: S603  # what it runs is written above
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=True,
    )
    told = [
        line
        for line in done.stderr.splitlines()
        if line.startswith("otel_responses_usage.story DEBUG Call 1")
    ]
    assert [line.split()[4].strip(":.") for line in told] == [
        "opened",
        "answered",
        "ended",
        "asked",
        "settled",
    ]
    assert not [canary for canary in (PROMPT, ANSWER, KEY) if canary in done.stderr]
