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
from embedded.websocket_api import Turn, WebSocketAPI
from readings import read_calls
from tables import WIDE, calls_table, tokens_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedded.answer import Json
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

PROGRAM = """\
Here is how the keeper **adds up her book**, in Python:

```python
def total(book: list[tuple[str, int | None]]) -> tuple[int, list[str]]:
    # The sum of the cargo, and the ships whose *weight* is unknown.
    known = sum(weight for _, weight in book if weight is not None)
    return known, [ship for ship, weight in book if weight is None]
```

1. A weight that is known is added **once**.
2. A weight that is *not* known is no zero. `None` says so.

| ship | hour | weight |
| --- | :---: | ---: |
| Aurora | 06:10 | 187 |
| Meridian | 07:45 | 1,024 |
| Halcyon | 09:30 | unknown |

> A horn says that a ship is there, and not what it carries.

More about `sum` is in [the documentation](https://docs.python.org/3/library/functions.html#sum).
"""


@contextmanager
def stand_in_api(*, by_websocket: bool = False) -> Iterator[None]:
    """Points the openai SDK at an embedded server, unless there is a key for the real one."""
    if "OPENAI_API_KEY" in os.environ:
        yield
        return
    by_websocket = by_websocket or os.environ.get("CHAT_TRANSPORT") == "websocket"
    with WebSocketAPI(_turn) if by_websocket else ScriptedServer(ResponsesAPI(_plan)) as server:
        url = server.url if by_websocket else f"{server.url}/v1"
        os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-stand-in"} | NO_PROXY
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
    if read_calls(receiver.spans):
        console.print(calls_table(receiver.spans, wide=console.width >= WIDE))
    if "gen_ai.client.token.usage" in receiver.metrics:
        console.print(tokens_table(receiver.metrics))


def _turn(asked: Json) -> Turn:
    plan = _plan_for(asked)
    return Turn(plan.answer, pace=plan.pace)


def _plan(request: SeenRequest) -> Plan:
    return _plan_for(request.json)


def _plan_for(asked: Json) -> Plan:
    question = str(asked["input"]).lower()
    if "crew" in question:
        # `token_report.py --cut` breaks the connection after some text. The rest must not be there already.
        return Plan(_crew(), pace=0.1 if asked.get("background") else 0.02)
    tokens = 31 + len(question.split())
    if "program" in question:
        pieces = tuple(re.findall(r"\S{1,4}|\s+", PROGRAM))
        return Plan(Answer(pieces, usage(tokens, 243)), pace=0.015)
    words = tuple(re.findall(r"\S+\s*", STORY))
    if "fail" in question:
        return Plan(Answer(words[:12], usage(tokens, 16), ending=FAILED), pace=0.06)
    return Plan(Answer(words, usage(tokens, 196)), pace=0.06)


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
