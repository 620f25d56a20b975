"""What the application has of its WebSockets: the same with and without us; and what we keep of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import secrets
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from calls import entered, items, settle
from conftest import Instrument
from embedded.answer import Json, new_id
from embedded.http_server import Cut, Wait
from observed import Observed, eventually
from otel_responses_usage import ResponsesUsageInstrumentor
from otel_responses_usage._call.lanes import Lanes
from sockets import (
    CREATE,
    HAS_WEBSOCKET,
    TERMINAL,
    TURNS,
    answer,
    assert_unharmed,
    both,
    client_of,
    first_connection,
    has_all_arrived,
    kind,
    needs_websocket,
    receive,
    send,
    told,
    until_end,
)
from test_matrix import ASYNCIO, SYNC, Runtime

pytestmark = [needs_websocket, pytest.mark.usefixtures("quick_collections")]

if needs_websocket.args[0] is False:
    from embedded.websocket_api import Close, Turn, WebSocketAPI, error

websockets_version = importlib.metadata.version("websockets") if HAS_WEBSOCKET else "0"
ANSWER = answer(id="resp_of_all", created_at=1_800_000_000)


@contextlib.contextmanager
def served(turn: Callable[[Json], Any]) -> Iterator[Any]:
    with WebSocketAPI(turn) as api:
        yield api


async def receive_bytes(connection: Any, messages: int) -> list[Any]:
    return [await settle(connection.recv_bytes()) for _ in range(messages)]


async def whole(connection: Any) -> list[Any]:
    return await receive_bytes(connection, 20)


async def two_turns(connection: Any) -> list[Any]:
    await send(connection, input="again")
    return [event.to_dict() for event in [*(await until_end(connection)), *(await until_end(connection))]]


async def to_the_end(connection: Any) -> list[Any]:
    return [event.to_dict() async for event in items(connection)]


async def one_by_one(connection: Any) -> list[Any]:
    return await receive(connection, 99)


async def after_close(connection: Any) -> list[Any]:
    await whole(connection)
    await settle(connection.close(code=1000, reason="enough"))
    return await receive(connection, 1)


async def unread_after_close(connection: Any) -> list[Any]:
    """Receives after its own close what had arrived before."""
    results = await receive_bytes(connection, 16)  # with more than four unread, the library does not go on
    await has_all_arrived(connection)
    await settle(connection.close())
    for _ in range(9):
        try:
            results.append(await settle(connection.recv_bytes()))
        except Exception as raised:  # noqa: PERF203  # it ends the loop
            results.append(f"{type(raised).__name__}: {raised}")
            break
    return results


async def sent_after_close(connection: Any) -> list[Any]:
    await whole(connection)
    await settle(connection.close())
    await send(connection)
    return []


async def wrong_types(connection: Any) -> list[Any]:
    results = await whole(connection)
    for wrong in (5, {"type": "response.create"}, None):
        try:
            await settle(connection._connection.send(wrong))
        except Exception as raised:  # noqa: PERF203  # each of them raises
            results.append(f"{type(raised).__name__}: {raised}")
    return results


async def handled(connection: Any) -> list[Any]:
    seen: list[Any] = []
    connection.on("response.output_text.delta", lambda event: seen.append(event.delta))
    await settle(connection.dispatch_events())
    return seen


ACTS = {
    act.__name__: act for act in (whole, two_turns, to_the_end, one_by_one, after_close, sent_after_close)
}
ACTS |= {"wrong_types": wrong_types, "unread_after_close": unread_after_close}
ACTS |= {"handled": handled} if "handlers" in TURNS else {}
WAYS_TO_END = {
    "held": dict,
    "closed": lambda: {"end": Close(1000), "cut_after": 9},
    "going away": lambda: {"end": Close(1001), "cut_after": 9},
    "broken": lambda: {"end": Close(1011), "cut_after": 9},
    "reset": lambda: {"end": Cut("rst"), "cut_after": 9},
    "cut": lambda: {"end": Cut(), "cut_after": 9},
    "refused": lambda: {"refusal": error("No.", "nothing"), "end": Close(1000)},
}
# Those that receive until the server ends the connection. The others receive a whole response.
NEEDS_END = {"to_the_end", "one_by_one", "handled"}


@pytest.mark.parametrize("act", ACTS)
@both
def test_the_application_sees_the_same(instrument: Instrument, runtime: Runtime, act: str) -> None:
    """Bytes, order, objects, exceptions with their causes and their frames, and what the server is sent."""
    for end, how in WAYS_TO_END.items():
        if (end != "held") != (act in NEEDS_END) or (act == "handled" and end == "refused"):
            continue
        plain = seen_by(runtime, act, how())
        instrument(retrieval=False)
        watched = seen_by(runtime, act, how())
        ResponsesUsageInstrumentor().uninstrument()
        assert watched.pop("frames") - plain.pop("frames") in (0, 1), (act, end)
        if end == "reset":  # it may swallow what was sent before
            plain.pop("results"), watched.pop("results")
        assert watched == plain, (act, end)


def seen_by(runtime: Runtime, act: str, how: dict[str, Any]) -> dict[str, Any]:
    """What an application sees of a connection, in words that can be compared."""
    seen: dict[str, Any] = {"results": None, "raised": None, "frames": 0}

    async def main(api: Any) -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection)
            seen["types"] = [type(connection), type(connection._connection), sorted(vars(connection))]
            seen["methods"] = [type(connection).send, type(connection).recv, type(connection).close]
            try:
                seen["results"] = await ACTS[act](connection)
            except Exception as raised:
                seen["raised"] = shape_of(raised)
                seen["frames"] = len(traceback.extract_tb(raised.__traceback__))
        closed = [getattr(connection._connection, name, None) for name in ("close_code", "close_reason")]
        seen["closed"] = closed  # not in the first releases of the library

    with served(lambda _: Turn(ANSWER, **how)) as api:
        runtime.drive(lambda: main(api))
        seen["sent"] = [message.data for message in api.messages]
        seen["handshakes"] = [
            sorted(name for name, _ in request.headers.raw_items()) for request in api.handshakes
        ]
        seen["gets"] = len(api.gets)
    return seen


def shape_of(raised: BaseException | None) -> list[str]:
    """The type and text of an exception and of those that led to it."""
    shape = []
    while raised is not None:
        shape.append(f"{type(raised).__module__}.{type(raised).__name__}: {raised}")
        raised = raised.__cause__ or raised.__context__
    return shape


@pytest.mark.skipif(
    int(websockets_version.partition(".")[0]) < 15,
    reason="this release of websockets reads ahead without limit",
)
def test_a_slow_reader_holds_up_the_server_as_before(observed: Observed) -> None:
    """Messages that nobody receives are not read ahead: the server has to wait."""
    big = secrets.token_hex(1 << 19)  # which cannot be compressed much
    extra = {0: (f'{{"type":"keepalive","x":"{big}"}}',) * 40}
    with (
        served(lambda _: Turn(ANSWER, extra=extra)) as api,
        client_of(SYNC, api) as client,
        client.responses.connect() as connection,
    ):
        connection.send(CREATE)
        transport = first_connection(api).socket.transport
        eventually(lambda: transport.get_write_buffer_size() > 0, "the server waits")
        for _ in range(40):
            connection._connection.recv()
        while connection.recv().type not in TERMINAL:
            pass
    assert told(observed.span()) == {"outcome": "completed", "source": "stream"}


def test_creates_of_many_threads_are_told_apart(observed: Observed) -> None:
    """On one lane the order of the sending decides, also if threads send at the same time."""

    def turn(asked: Json) -> Any:
        return Turn(replace(answer(id=new_id()), pieces=("x",), model=f"{asked['model']}-of-server"))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with served(turn) as api, client_of(SYNC, api) as client, client.responses.connect() as connection:

            def ask(name: int) -> None:
                for n in range(25):
                    connection.send({**CREATE, "model": f"m-{name}-{n}"})

            threads = [threading.Thread(target=ask, args=(name,)) for name in range(8)]
            for thread in threads:
                thread.start()
            ended = 0
            while ended < 200:
                ended += kind(connection.recv()) in TERMINAL
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    for span in observed.spans(200):
        attributes = span.attributes or {}
        assert attributes["gen_ai.response.model"] == f"{attributes['gen_ai.request.model']}-of-server"


@both
def test_ten_thousand_responses_leave_nothing(observed: Observed, runtime: Runtime) -> None:
    """On one connection, on a thousand lanes or on one: memory does not grow, also without a collector."""
    event = '{{"type":"response.{kind}","response":{{"id":"{id}","status":"{status}"{more}}}{lane}}}'
    usage = ',"usage":{"input_tokens":1,"output_tokens":2}'
    count, kept = 10_000, []

    def converse(lanes: Lanes, first: int, last: int) -> None:
        from otel_responses_usage._call.lanes import SentMessage

        for n in range(first, last):
            lane = f',"stream_id":"lane-{n % 1000}"' if n % 2 else ""
            lanes.on_send(f'{{"type":"response.create","model":"m"{lane}}}', SentMessage.now())
            for event_kind, status, more in (
                ("created", "in_progress", ""),
                ("completed", "completed", usage),
            ):
                lanes.on_message(
                    event.format(
                        kind=event_kind, id=f"resp_{n}", status=status, more=more, lane=lane
                    ).encode()
                )

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            lanes = connection._connection.recv.__closure__
            (tapped,) = [cell.cell_contents for cell in lanes if isinstance(cell.cell_contents, Lanes)]
            observed._spans.export = lambda spans: kept.append(len(spans))
            gc.collect()
            gc.disable()
            converse(tapped, 0, 5_000)  # the interpreter keeps 2,000 tuples of each size
            before = sys.getallocatedblocks()
            converse(tapped, 5_000, count)
            grown = sys.getallocatedblocks() - before
            gc.enable()
            assert len(tapped._named) <= 65
            assert weakref.getweakrefcount(connection) < 20
            assert grown < 1_000, grown

    with served(lambda _: Turn()) as api:
        runtime.drive(main)
    assert sum(kept) == count
    assert_unharmed(observed)


@both
@pytest.mark.usefixtures("observed")
def test_a_connection_and_its_client_are_not_kept(runtime: Runtime) -> None:
    """After a close nothing of ours holds the connection; an open one does not hold its client."""
    references = []

    async def main() -> None:
        client = client_of(runtime, api)
        connection = await settle(client.responses.connect().enter())
        references.append(weakref.ref(client))
        await send(connection)
        await until_end(connection)
        await settle(client.close())
        del client
        gc.collect()
        assert references[0]() is None
        await settle(connection.close())
        references.extend((weakref.ref(connection), weakref.ref(connection._connection)))
        del connection

    with served(lambda _: Turn(ANSWER)) as api:
        runtime.drive(main)
    gc.collect()
    eventually(lambda: gc.collect() is not None and not any(ref() for ref in references), "freed")


@both
def test_a_fault_of_ours_is_contained(
    observed: Observed, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of ours raises, the application has its response, and the fault is counted."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    targets = (
        "otel_responses_usage._surfaces._websocket._Caller.__init__",
        "otel_responses_usage._surfaces._target_factory.TargetFactory.__init__",
        "otel_responses_usage._surfaces._websocket._ConnectionTap.__init__",
        "otel_responses_usage._surfaces._websocket.SentMessage.now",
        "otel_responses_usage._call.lanes.decoded",
        "otel_responses_usage._call.lanes._lane_name",
        "otel_responses_usage._call.lanes.Lanes._begin",
        "otel_responses_usage._call.invocation.Invocation.on_message",
        "otel_responses_usage._call.ledger.Ledger.open",
    )
    with served(lambda _: Turn(ANSWER)) as api:
        for target in targets:
            with monkeypatch.context() as patch:
                patch.setattr(target, broken)

                async def main() -> None:
                    async with (
                        entered(client_of(runtime, api)) as client,
                        entered(client.responses.connect()) as connection,
                    ):
                        await send(connection)
                        assert len(await until_end(connection)) == 20

                runtime.drive(main)
    assert sum(point.value for point in observed.points("openai_responses.faults")) >= len(targets)


@both
def test_a_buffer_that_cannot_be_read_changes_nothing(
    observed: Observed, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The close ends its calls all the same."""

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("otel_responses_usage._surfaces._websocket.unread_messages", broken)

    async def main() -> None:
        async with (
            entered(client_of(runtime, api)) as client,
            entered(client.responses.connect()) as connection,
        ):
            await send(connection)
            await receive(connection, 6)

    with served(lambda _: Turn(ANSWER)) as api:
        runtime.drive(main)
        assert told(observed.span()) == {"outcome": "closed", "source": "retrieval"}


def test_a_cancelled_send_is_not_lost(observed: Observed) -> None:
    """A create whose sending was cancelled after it left has its answer, and the next one has its own."""
    gate = threading.Event()
    first = Turn(answer(1, id=new_id()), gate=gate)
    turns = [first, Turn(answer(2, id=new_id()))]

    async def main() -> None:
        async with client_of(ASYNCIO, api) as client, client.responses.connect() as connection:
            socket = connection._connection
            drain = socket.drain

            async def stuck() -> None:
                await asyncio.sleep(60)

            socket.drain = stuck
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(connection.send({**CREATE, "model": "first"}), 0.05)
            socket.drain = drain
            await connection.send({**CREATE, "model": "second"})
            gate.set()
            for _ in range(2):
                await until_end(connection)

    with served(lambda _: turns.pop(0)) as api:
        asyncio.run(main())
    spans = observed.spans(2)
    assert [span.name for span in spans] == ["chat first", "chat second"]
    assert [told(span)["outcome"] for span in spans] == ["completed", "completed"]


def test_exit_ends_what_is_open(observed: Observed, caplog: pytest.LogCaptureFixture) -> None:
    """A provider that is shut down has the calls of open connections, with usage if it was stored."""
    gate = threading.Event()
    with (
        served(lambda _: Turn(ANSWER, cut_after=6, end=Wait(gate))) as api,
        client_of(SYNC, api) as client,
        client.responses.connect() as connection,
    ):
        connection.send(CREATE)
        for _ in range(6):
            connection.recv()
        observed.tracer_provider.shutdown()
        gate.set()
        while connection.recv().type not in TERMINAL:
            pass
    assert told(observed.span()) == {"outcome": "exit", "error": "process_exit", "source": "retrieval"}
    ours = [record for record in caplog.records if record.name.startswith("otel_responses_usage")]
    assert all(record.levelno < logging.WARNING for record in ours)
