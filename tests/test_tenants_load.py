"""Whose tokens, under load: metrics, `on_call` and a table that it fills equal what the server billed.

Server and application have processes of their own.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import json
import os
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry import baggage, context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from embedded.answer import Answer, new_id, usage
from embedded.http_server import Hold, Reply, ScriptedServer, SeenRequest, Wait, frame
from embedded.responses_api import Plan, ResponsesAPI
from file_process import FileProcess, answer_words
from load import HTTP, TLS, allow_files, memory
from otel_responses_usage import CallRecord, Config, ResponsesUsageInstrumentor

STREAMS = 2_000
TENANTS = 50
PER_CLIENT = 100  # the HTTP library's pool looks through all connections for each call
MANY_TENANTS = 10_000
TIMEOUT_S = 120
MOST_LABELS = 100

Bill = dict[str, list[int]]  # by tenant: calls, input and output tokens


# --- the server's process ------------------------------------------------------------------------------


class Served(ResponsesAPI):
    """Keeps a bill for each tenant. Streams stop in the middle, until all of them may go on."""

    def __init__(self) -> None:
        super().__init__(self._plan_of)
        self.goes_on = threading.Event()
        self.bill: Bill = {}
        self._calls = 0

    def __call__(self, request: SeenRequest) -> Reply:
        reply = super().__call__(request)
        if request.method == "GET":
            return reply
        return dataclasses.replace(reply, steps=(*reply.steps[:4], Wait(self.goes_on), *reply.steps[4:]))

    def _plan_of(self, request: SeenRequest) -> Plan:
        self._calls += 1
        # No two responses have a count in common.
        counts = usage(2 * self._calls, 2 * self._calls + 1)
        line = self.bill.setdefault(request.json["metadata"]["tenant"], [0, 0, 0])
        for place, count in enumerate((1, counts["input_tokens"], counts["output_tokens"])):
            line[place] += count
        answer = Answer(("one ", "two ", "three "), counts, id=new_id())
        is_left = request.json["model"] == "left"
        return Plan(answer, cut_after=6, end=Hold()) if is_left else Plan(answer)


def serve() -> None:
    """Serve, and answer each word with the bill."""
    allow_files()
    served = Served()

    def obey(word: str) -> Bill:
        if word == "go on":
            served.goes_on.set()
        return served.bill

    with ScriptedServer(served) as server:
        answer_words(server.url, obey)


# --- the application's process -------------------------------------------------------------------------


class Books:
    """The function that is told of each call: it adds up, and writes a line of a table."""

    def __init__(self, folder: Path) -> None:
        self.bill: Bill = {}
        self.losses = 0
        # By default a thread that is no other's calls it, and at the end of a process perhaps another one.
        self._table = sqlite3.connect(folder / "usage.sqlite", check_same_thread=False, isolation_level=None)
        self._table.execute("pragma journal_mode = wal")
        self._table.execute("pragma synchronous = off")
        self._table.execute(
            "create table usage (response_id text primary key, tenant text, input integer, output integer)"
        )

    def close(self) -> None:
        self._table.close()

    def __call__(self, record: CallRecord) -> None:
        tenant, used = record.baggage["tenant.id"], record.usage
        assert used is not None, record
        line = self.bill.setdefault(tenant, [0, 0, 0])
        for place, count in enumerate((1, used.input_tokens or 0, used.output_tokens or 0)):
            line[place] += count
        self._table.execute(
            "insert into usage values (?, ?, ?, ?)",
            (record.response_id, tenant, used.input_tokens, used.output_tokens),
        )


class Telemetry:
    """Providers of an SDK that keep points in memory."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)

    def points(self) -> dict[str, list[Any]]:
        """All points by metric."""
        data = self._reader.get_metrics_data()
        return {
            metric.name: list(metric.data.data_points)
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def bill(self) -> tuple[Bill, dict[str, int]]:
        """By tenant: calls, input and output tokens; and how many calls are pending, lost or faulty."""
        bill: Bill = {}
        others: Counter[str] = Counter()
        places = {"input": 1, "output": 2}
        for name, points in self.points().items():
            for point in points:
                line = bill.setdefault(point.attributes.get("tenant.id", ""), [0, 0, 0])
                if name == "openai_responses.calls":
                    line[0] += point.value
                elif name == "gen_ai.client.token.usage":
                    line[places[point.attributes["gen_ai.token.type"]]] += point.sum
                elif name in ("openai_responses.pending", "openai_responses.faults") or "losses" in name:
                    others[name] += abs(point.value)
        return bill, dict(others)


@contextmanager
def tenant(name: str) -> Iterator[None]:
    """Code that runs on behalf of a tenant."""
    token = context.attach(baggage.set_baggage("tenant.id", name))
    try:
        yield
    finally:
        context.detach(token)


def instrument(telemetry: Telemetry, books: Books, **settings: Any) -> None:
    ResponsesUsageInstrumentor().instrument(
        tracer_provider=telemetry.tracer_provider,
        meter_provider=telemetry.meter_provider,
        config=Config(baggage_keys=("tenant.id",), on_call=books, exit_timeout=TIMEOUT_S, **settings),
    )


def apply(url: str, folder: Path, way: str) -> None:
    """Hold all streams open at once, leave a third of them, and read the others, until told to stop."""
    allow_files()
    telemetry, books = Telemetry(), Books(folder)
    # Functions that are registered first are called last.
    atexit.register(lambda: (folder / "told.json").write_text(json.dumps([books.bill, *telemetry.bill()])))
    instrument(telemetry, books, retrieval_timeout=TIMEOUT_S)
    if way == "signal":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        sys.unraisablehook = stop_again
    asyncio.run(_apply(url, way))


def stop_again(dropped: sys.UnraisableHookArgs) -> None:
    """Send the signal again if its exception was dropped, as in a callback of asyncio's weak references.

    A moment later: here the exception would be dropped, too.
    """
    if isinstance(dropped.exc_value, SystemExit):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()


async def _apply(url: str, way: str) -> None:
    clients = [
        openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="key",
            max_retries=0,
            timeout=TIMEOUT_S,  # an event loop with so much to do takes long to connect
            http_client=openai.DefaultAsyncHttpxClient(verify=TLS),
        )
        for _ in range(STREAMS // PER_CLIENT)
    ]
    opening, open_ = asyncio.Semaphore(64), Counter[str]()

    async def one(number: int) -> None:
        name, is_left = f"t{number % TENANTS}", number % 3 == 0
        with tenant(name):
            async with opening:
                stream = await clients[number // PER_CLIENT].post(
                    "/responses",
                    body={
                        "model": "left" if is_left else "whole",
                        "input": "x",
                        "stream": True,
                        "metadata": {"tenant": name},
                    },
                    cast_to=object,
                    stream=True,
                    stream_cls=openai.AsyncStream[object],
                )
                for _ in range(4):
                    await anext(stream)
        open_["now"] += 1
        if open_["now"] == STREAMS:
            print("all are open", flush=True)  # noqa: T201
        await anext(stream)
        if is_left:
            await stream.close()
        else:
            async for _ in stream:
                pass
        open_["done"] += 1
        if open_["done"] == STREAMS // 4:
            print("under way", flush=True)  # noqa: T201

    await asyncio.gather(*(one(number) for number in range(STREAMS)))
    if way != "end":
        await asyncio.sleep(TIMEOUT_S)  # the signal is on its way
    for client in clients:
        await client.close()


# --- the tests -----------------------------------------------------------------------------------------


def process(*arguments: str) -> FileProcess:
    return FileProcess(__file__, *arguments, most_s=2 * TIMEOUT_S)


def kept_by_the_application(folder: Path) -> Bill:
    """The sums of the table that `on_call` fills."""
    with closing(sqlite3.connect(folder / "usage.sqlite")) as database:
        table = database.execute(
            "select tenant, count(*), sum(input), sum(output) from usage group by tenant"
        )
        return {name: list(line) for name, *line in table}


@pytest.mark.parametrize(("way", "code"), [("end", 0), ("signal", 4)])
def test_every_tenant_has_its_tokens_once(way: str, code: int, tmp_path: Path) -> None:
    """Metrics, `on_call` and table equal the server's bill, also of a process that is stopped in the midst.

    All streams are open at the same time. The handler of the signal exits wherever the application is just
    then.
    """
    if allow_files() < STREAMS + 500:
        pytest.skip("the system does not allow that many open files")
    with ExitStack() as stack:
        server = stack.enter_context(process("serve"))
        application = stack.enter_context(process("apply", server.answer(), str(tmp_path), way))
        assert application.line() == "all are open"
        server("go on")
        if way != "end":
            assert application.line() == "under way"
            application.process.send_signal(signal.SIGTERM)
        assert application.process.wait(TIMEOUT_S) == code
        billed: Bill = server("tell")
    told, counted, others = json.loads((tmp_path / "told.json").read_text())
    counted.pop("", None)
    assert sum(calls for calls, *_ in billed.values()) == STREAMS
    assert len(billed) == TENANTS
    assert others == {"openai_responses.pending": 0}
    assert kept_by_the_application(tmp_path) == billed
    assert told == billed
    if way == "signal" and counted != billed:
        # The handler raised in the midst of the SDK's own counting: of one call a point may be missing.
        missing = [
            [owed - paid for owed, paid in zip(billed[name], counted[name], strict=True)] for name in billed
        ]
        assert sum(any(line) for line in missing) == 1
        assert all(count >= 0 for line in missing for count in line)
        return
    assert counted == billed


def test_very_many_tenants_need_no_more_memory(tmp_path: Path) -> None:
    """Ten thousand tenants make a hundred labels and `other`; the table has each of them exactly."""
    billed: Bill = {}
    numbers = iter(range(1, MANY_TENANTS + 1))

    def answer(request: Any) -> Any:
        number = next(numbers)
        name = json.loads(request.content)["metadata"]["tenant"]
        billed[name] = [1, 2 * number, 2 * number + 1]
        events = Answer(("one ",), usage(2 * number, 2 * number + 1), id=f"resp_{number}").events()
        return HTTP.Response(
            200, headers={"content-type": "text/event-stream"}, content=b"".join(map(frame, events))
        )

    telemetry, books = Telemetry(), Books(tmp_path)
    books.bill = Nothing()
    instrument(telemetry, books)
    client = openai.OpenAI(
        base_url="http://127.0.0.1:9/v1",
        api_key="key",
        http_client=HTTP.Client(transport=HTTP.MockTransport(answer)),
    )
    blocks = []
    try:
        for half in range(2):
            for number in range(half * MANY_TENANTS // 2, (half + 1) * MANY_TENANTS // 2):
                name = f"t{number}"
                with tenant(name):
                    stream = client.post(
                        "/responses",
                        body={"model": "m", "input": "x", "stream": True, "metadata": {"tenant": name}},
                        cast_to=object,
                        stream=True,
                        stream_cls=openai.Stream[object],
                    )
                    for _ in stream:
                        pass
            assert ResponsesUsageInstrumentor().flush(TIMEOUT_S)
            blocks.append(memory()[0] - 9 * len(billed))
    finally:
        client.close()
        ResponsesUsageInstrumentor().uninstrument()
        books.close()
    assert kept_by_the_application(tmp_path) == billed
    counted, others = telemetry.bill()
    first = {f"t{number}": billed[f"t{number}"] for number in range(MOST_LABELS)}
    rest = [line for name, line in billed.items() if name not in first]
    assert counted == {**first, "other": [sum(column) for column in zip(*rest, strict=True)]}
    assert others == {}
    assert max(map(len, telemetry.points().values())) == 2 * (MOST_LABELS + 1)
    # Half of the tenants come after all labels are taken. `billed` itself has some blocks for each.
    assert (blocks[1] - blocks[0]) / (MANY_TENANTS / 2) < 0.5


class Nothing(Bill):
    """A bill that keeps nothing."""

    def setdefault(self, key: str, default: Any = None) -> Any:  # noqa: ARG002
        return default


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        apply(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
