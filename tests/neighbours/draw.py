"""Draws the traces of two streams beside one neighbour: `draw.py NEIGHBOUR`. `judge.py --draw` runs it.

The first stream is read to its end. The application closes the second one early. The program prints the two
drawings as JSON. The environment variable `PACKAGE` is a folder with our package.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from measure import FLUSH_S, Ran, Runner, ours, switch_on
from opentelemetry import trace
from recorder import Recorder, scope_of
from server import Api

from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer
from embedded.responses_api import Plan
from neighbours import NEIGHBOURS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from embedded.http_server import SeenRequest

MODEL = "gpt-5.4-mini"
STREAMS = {"read to its end": ("drained", "streamed"), "closed early": ("closed", "run-left")}
# Where instrumentations write the tokens: input, output.
TOKENS = (
    ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"),
    ("gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens"),
    ("llm.token_count.prompt", "llm.token_count.completion"),
)
OUTCOME, SOURCE = "openai_responses.stream.outcome", "openai_responses.usage.source"
LONGEST = 34  # letters of a name that are drawn
PREFIXES = ("opentelemetry.instrumentation.", "openinference.instrumentation.")


class DrawnApi(Api):
    """All answers are the same. Streams are whole, or held open after some events."""

    early = False

    def _plan_of(self, request: SeenRequest) -> Plan:
        answer = Answer(
            pieces=tuple(f"piece {n} " for n in range(12)), usage=usage(1200, 90), model=request.json["model"]
        )
        return Plan(answer, cut_after=10, end=Hold()) if self.early else Plan(answer)


def tokens(span: ReadableSpan) -> str:
    """The tokens on a span."""
    attributes: Any = span.attributes or {}
    for names in TOKENS:
        if names[0] in attributes:
            return "input={} output={}".format(*(attributes.get(name, "-") for name in names))
    details = json.loads(str(attributes.get("langfuse.observation.usage_details", "{}")))
    for names in (("input", "output"), ("input_tokens", "output_tokens")):
        if names[0] in details:
            return f"input={details[names[0]]} output={details.get(names[1], '-')}"
    return "-"


def lines(spans: Sequence[ReadableSpan]) -> Iterator[tuple[str, str, str, str]]:
    """A line for each span: branch and name, scope, tokens, outcome and source."""
    below: dict[int | None, list[ReadableSpan]] = {}
    for span in sorted(spans, key=lambda span: span.start_time or 0):
        below.setdefault(span.parent.span_id if span.parent else None, []).append(span)

    def draw(span: ReadableSpan, before: str, branch: str, after: str) -> Iterator[tuple[str, str, str, str]]:
        scope = scope_of(span)
        for prefix in PREFIXES:
            scope = scope.removeprefix(prefix)
        attributes: Any = span.attributes or {}
        added = [
            f"{what}={attributes[name]}"
            for what, name in (("outcome", OUTCOME), ("source", SOURCE))
            if name in attributes
        ]
        name = span.name if len(span.name) <= LONGEST else f"{span.name[: LONGEST - 1]}…"
        yield f"{before}{branch}{name}", scope, tokens(span), " ".join(added)
        children = below.get(span.context.span_id if span.context else None, [])
        for child in children:
            last = child is children[-1]
            yield from draw(child, before + after, *(("└─ ", "   ") if last else ("├─ ", "│  ")))

    (application,) = below[None]
    _, *others = draw(application, "", "", "")
    yield application.name, "", "", ""
    yield from others


def drawing(spans: Sequence[ReadableSpan]) -> list[str]:
    """The lines of one trace, in columns."""
    rows = list(lines(spans))
    assert len(rows) == len(spans), "a span has no place in the tree"
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def main(name: str) -> None:
    """Run the two streams, and draw them."""
    api, recorder = DrawnApi(), Recorder()
    drawn: dict[str, list[str]] = {}
    with ScriptedServer(api) as server:
        neighbour = NEIGHBOURS[name](recorder, server.url)
        neighbour.set_up()
        switch_on(neighbour, "theirs first")
        runner = Runner(Ran(), neighbour.clients)
        for end, of_scenario in STREAMS.items():
            api.early = end == "closed early"
            recorder.exporter.clear()
            if neighbour.framework:
                scenario = importlib.import_module("frameworks").scenarios(neighbour.framework)[
                    of_scenario[1]
                ]
                runner.run_async("the application", _of_model(scenario), neighbour.async_client)
            else:
                scenario = importlib.import_module("scenarios").SYNC[of_scenario[0]]
                runner.run("the application", _of_model(scenario), neighbour.client())
            assert ours().flush(FLUSH_S), "look-ups are still pending"
            trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
            drawn[end] = drawing(recorder.exporter.get_finished_spans())
    sys.stdout.write(json.dumps({"drawn": drawn, "errors": runner.ran.errors}))
    sys.stdout.flush()
    os._exit(0)  # what a neighbour does at the exit is not drawn


def _of_model(scenario: Any) -> Any:
    return lambda client, _name: scenario(client, MODEL)


if __name__ == "__main__":
    main(*sys.argv[1:])
