"""Stand-ins for what an environment lacks: a Responses API without a key, a Collector without an endpoint.

`python examples/stand_ins.py COMMAND ...` runs a command among them and prints the telemetry it sent.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from embedded.answer import FAILED, Answer, usage
from embedded.http_server import ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from tables import WIDE, calls_table, tokens_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedded.http_server import SeenRequest

# A proxy of the user's could not find what is on loopback here; programs differ in the case they look for.
NO_PROXY = dict.fromkeys(
    ("no_proxy", "NO_PROXY"),
    f"127.0.0.1,{os.environ.get('no_proxy', os.environ.get('NO_PROXY', ''))}",
)

# What the embedded server has to say to anything it was not made for.
STORY = """\
I am only a stand-in for a model, so whatever you ask, this is the one story I know.

There was once a lighthouse whose keeper counted ships. Every ship that came home got a line in her book, \
with the hour and the weight of its cargo, which the captain called up to her as he passed. The harbour \
paid by that book, and it was always right.

Then came a winter of fog. Ships turned back half-way, or dropped anchor out of sight, and nobody called \
up to the tower. The harbour master told her to count the blasts of their horns. But a horn says that a \
ship is there, she said, and not what it carries.

So in the mornings, when the fog had lifted, she rowed out to the ships that had fallen silent, and asked. \
Most of them knew. She wrote it down at the hour at which she had last heard them; and where nobody knew, \
she wrote that nobody knew.

The harbour has paid by her book ever since."""


@contextmanager
def stand_in_api() -> Iterator[None]:
    """Points the openai SDK at an embedded server, unless there is a key for the real one."""
    if "OPENAI_API_KEY" in os.environ:
        yield
        return
    with ScriptedServer(ResponsesAPI(_plan)) as server:
        os.environ |= {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "sk-stand-in"} | NO_PROXY
        yield


@contextmanager
def stand_in_receiver() -> Iterator[None]:
    """Points OTLP exporters at an embedded receiver and prints what it got, unless they have an endpoint."""
    if "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ:
        yield
        return
    with OtlpReceiver() as receiver:
        by_grpc = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc") == "grpc"
        endpoint = receiver.grpc_endpoint if by_grpc else receiver.http_endpoint
        os.environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} | NO_PROXY
        yield
        print_arrivals(receiver)


def print_arrivals(receiver: OtlpReceiver) -> None:
    """Prints the calls and the token metric, or that nothing came."""
    console = Console(highlight=False)
    console.print(
        f"\n[bold]What arrived over OTLP[/]: spans {len(receiver.spans)}, metrics {len(receiver.metrics)}"
    )
    if receiver.spans:
        console.print(calls_table(receiver.spans, wide=console.width >= WIDE))
    if "gen_ai.client.token.usage" in receiver.metrics:
        console.print(tokens_table(receiver.metrics))


def _plan(request: SeenRequest) -> Plan:
    question = str(request.json["input"]).lower()
    if "crew" in question:
        return Plan(_crew(), pace=0.02)
    asked = 31 + len(question.split())
    words = tuple(re.findall(r"\S+\s*", STORY))
    if "fail" in question:
        return Plan(Answer(words[:12], usage(asked, 16), ending=FAILED), pace=0.06)
    return Plan(Answer(words, usage(asked, 196)), pace=0.06)


def _crew() -> Answer:
    return Answer(
        pieces=("A ", "crew ", "of ", "five", ": ", "👩🏽‍🚀", "👨🏻‍🔬", "🧑🏿‍🍳", "👩🏼‍🚒", "🧑🏾‍🌾", "."),
        usage=usage(23, 187, reasoning=128),
        reasoning=("**Choosing ", "a ", "crew**"),
    )


def run(command: list[str]) -> int:
    """Runs the command to its end and returns its status. What stops us is for the command to obey."""
    with subprocess.Popen(command) as process:  # noqa: S603 - the user's own command
        # Ctrl-C reaches it from the terminal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()


if __name__ == "__main__":
    with stand_in_api(), stand_in_receiver():
        status = run(sys.argv[1:])
    sys.exit(status)
