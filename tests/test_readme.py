"""What the README says is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from documents import ROOT, blocks
from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from observed import HANGING_S, usage_attributes
from otel_responses_usage import MissingReason, UsageSource

PAGE = ROOT / "README.md"
README = PAGE.read_text("utf-8")
MOST_WORDS = 900


def test_the_example_by_hand_exports_what_was_billed(tmp_path: Path) -> None:
    """The lines of the README, run as they stand, bring a span and metrics with the server's own counts."""
    billed = usage(14, 871, cached=2, reasoning=640)
    program = tmp_path / "by_hand.py"
    [block] = blocks("python", pages=[PAGE])
    program.write_text(block.text)
    api = ResponsesAPI(lambda _: Plan(Answer(usage=billed), cut_after=6, end=Hold()))
    with ScriptedServer(api) as server, OtlpReceiver() as receiver:
        environment = {
            "PATH": os.environ["PATH"],
            "OPENAI_API_KEY": "sk-readme",
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint,
        }
        command = [sys.executable, str(program)]
        subprocess.run(command, env=environment, check=True, timeout=HANGING_S)  # noqa: S603  # the README's own
    [span] = receiver.spans
    assert span.name == "chat gpt-5.4-mini"
    assert span.attributes["openai_responses.stream.outcome"] == "closed"
    assert span.attributes["openai_responses.usage.source"] == "retrieval"
    assert {key: value for key, value in span.attributes.items() if ".usage." in key} == {
        **usage_attributes(billed),
        "openai_responses.usage.source": "retrieval",
    }
    points = receiver.metrics["gen_ai.client.token.usage"].points
    assert {(point.attributes["gen_ai.token.type"], point.sum) for point in points} == {
        ("input", 14),
        ("output", 871),
    }


def test_it_is_short() -> None:
    """A reader is through in a few minutes."""
    assert len(README.split()) <= MOST_WORDS


def test_the_honest_line_comes_first() -> None:
    """What is not documented is said, with the reports, before the first heading below the title."""
    beginning = README.partition("\n## ")[0]
    assert "is not documented" in beginning
    assert (
        "https://community.openai.com/t/responses-api-reconnect-to-a-streaming-response/1362217" in beginning
    )
    assert "https://github.com/openai/openai-node/issues/2571" in beginning


def test_it_names_every_source_and_known_reasons() -> None:
    """The table of how the usage is known has every source, and no reason that does not exist."""
    section = README.partition("## How the usage is known")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")][1:]
    sources = {name for row in rows[:-1] for name in re.findall(r"`([a-z_]+)`", row.split(" | ")[1])}
    reasons = set(re.findall(r"`([a-z_]+)`", rows[-1].split(" | ")[1]))
    assert sources == {source.value for source in UsageSource}
    assert reasons
    assert reasons <= {reason.value for reason in MissingReason}


@pytest.mark.parametrize("block", blocks("sh", pages=[PAGE]), ids=lambda block: block.id)
def test_the_extras_exist(block: object) -> None:
    """What `pip install` asks for is in pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for extras in re.findall(r"\[([a-z,]+)\]", getattr(block, "text", "")):
        assert all(f"\n{extra} = [" in project for extra in extras.split(","))


def test_the_two_commands_can_be_run() -> None:
    """The commands that the README begins with are programs of this repository."""
    commands = re.findall(r"^scripts/\w+", README, re.MULTILINE)
    assert commands == ["scripts/demo", "scripts/test"]
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)
