"""Very many streams, one after the other: what is left of them in memory.

`LOAD_STREAMS=100000` makes more of them.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from embedded.answer import Answer, usage
from embedded.http_server import frame
from load import HTTP, TLS, Server, Tally, memory
from observed import eventually
from otel_responses_usage import Config, ResponsesUsageInstrumentor

WITH_SOCKETS = int(os.environ.get("LOAD_STREAMS", "2000"))
WITHOUT_SOCKETS = int(os.environ.get("LOAD_STREAMS", "10000"))
PATIENCE_S = 300.0

# Blocks for each stream: the SDK's own examples and caches fill up slowly, but what every stream of one of
# the four uses leaves behind comes to a quarter of a block at least.
LEAK = 0.2


@pytest.fixture
def server() -> Iterator[Server]:
    """The server."""
    server = Server()
    yield server
    server.stop()


def drained(client: openai.OpenAI) -> None:
    assert len(list(streamed(client, "whole"))) > 3


def closed(client: openai.OpenAI) -> None:
    with streamed(client, "left open") as stream:
        next(stream)


def broken(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIConnectionError):
        list(streamed(client, "broken"))


def dropped(client: openai.OpenAI) -> None:
    next(streamed(client, "left open"))


def streamed(client: openai.OpenAI, model: str) -> openai.Stream[Any]:
    return client.post(
        "/responses",
        body={"model": model, "input": "x", "stream": True},
        cast_to=object,
        stream=True,
        stream_cls=openai.Stream[Any],
    )


USES = (drained, closed, broken, dropped)


def growth(
    streams: int, use: Callable[[int], None], settle: Callable[[int], None], report: Callable[[str], None]
) -> tuple[float, float]:
    """Use streams one after the other.

    Returns:
        How much larger memory is after the last of them than after the first tenth: blocks for each of
        the streams between, and the process as a ratio.

    """
    tenth = -(-streams // 10)
    began, marks = time.perf_counter(), []
    for done in range(0, 10 * tenth, tenth):
        for number in range(done, done + tenth):
            use(number)
        gc.collect()
        settle(tenth)
        marks.append(memory())
    (blocks, megabytes), (blocks_now, megabytes_now) = marks[0], marks[-1]
    report(
        f"{10 * tenth} streams in {time.perf_counter() - began:.1f} s: {blocks} blocks, {megabytes:.1f} MB "
        f"after a tenth, {blocks_now} blocks, {megabytes_now:.1f} MB after all"
    )
    return (blocks_now - blocks) / (9 * tenth), megabytes_now / megabytes


def all_told(tally: Tally, streams: int) -> bool:
    """Whether the spans of so many streams have ended.

    A collection does nothing while another thread collects. So one may leave dropped streams behind.
    """
    if tally.finished < streams:
        gc.collect()
        time.sleep(0.1)  # a collection keeps the interpreter, which the threads of the look-ups need
    return tally.finished >= streams


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what was measured."""
    terminal = request.config.get_terminal_writer()
    terminal.line()
    return terminal.line


@pytest.fixture
def tally() -> Iterator[Tally]:
    """The instrumentation on."""
    tally = Tally()
    ResponsesUsageInstrumentor().instrument(
        tracer_provider=tally.tracer_provider,
        meter_provider=tally.meter_provider,
        config=Config(retrieval_timeout=PATIENCE_S),
    )
    yield tally
    ResponsesUsageInstrumentor().uninstrument()


# The garbage collector finds sockets of streams that were dropped, with us and without. pytest would make an
# error of each and keep it with its traceback: hundreds of blocks.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_memory_does_not_grow_with_streams(
    server: Server, tally: Tally, report: Callable[[str], None]
) -> None:
    """However many streams there have been, drained, closed, broken and dropped ones, memory is the same."""
    server("forget")
    client = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="key",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(verify=TLS),
    )

    def settle(streams: int) -> None:
        eventually(lambda: all_told(tally, streams), "all are told", PATIENCE_S)
        assert tally.settle(server("tell")["truth"])[0] == {"exact": streams}
        server("forget")

    blocks, ratio = growth(WITH_SOCKETS, lambda number: USES[number % len(USES)](client), settle, report)
    client.close()
    assert blocks < LEAK
    assert ratio < 1.05


def test_memory_does_not_grow_with_streams_without_a_network(
    tally: Tally, report: Callable[[str], None]
) -> None:
    """The same for more streams, where the SDK reads what an HTTP transport without sockets gives it."""
    events = [frame(event) for event in Answer(("one ", "two "), usage(2, 3)).events()]
    bodies = {"whole": events, "left open": events[:3], "broken": events[:3]}

    class Body(HTTP.SyncByteStream):
        def __init__(self, model: str) -> None:
            self._model = model

        def __iter__(self) -> Iterator[bytes]:
            yield from bodies[self._model]
            if self._model == "broken":
                raise HTTP.ReadError("cut")

    def answer(request: Any) -> Any:
        body = Body(json.loads(request.content)["model"])
        return HTTP.Response(200, headers={"content-type": "text/event-stream"}, stream=body)

    client = openai.OpenAI(
        base_url="http://127.0.0.1:9/v1",
        api_key="key",
        max_retries=0,
        http_client=HTTP.Client(transport=HTTP.MockTransport(answer)),
    )

    def settle(streams: int) -> None:
        eventually(lambda: all_told(tally, streams), "all are told", PATIENCE_S)
        # Where such a transport leads to cannot be known, so no look-up is made.
        told = Counter(reason for _, reason, *_ in tally.told)
        # Without a network streams end faster than that can be found out: of very many some find no room.
        without_room = told.pop("overload", 0)
        assert without_room <= max(0, streams - Config().max_pending)
        assert told == {None: streams // 4, "transport_error": streams - streams // 4 - without_room}
        tally.told.clear()

    blocks, ratio = growth(WITHOUT_SOCKETS, lambda number: USES[number % len(USES)](client), settle, report)
    client.close()
    assert blocks < LEAK
    assert ratio < 1.05
