"""A stream closed when its output is complete: the terminal event has arrived, or arrives in a moment."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import trustme

from calls import HTTP, settle
from conftest import Instrument, Serve
from embedded.http_server import Hold, Pause, Reply, ScriptedServer, SeenRequest, Send, Step, Wait, frame
from embedded.responses_api import error
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage._answer.state import AnswerState
from otel_responses_usage._surfaces import _tail
from test_endings import ANSWER, ASKED, encoded, faults, pause, runtimes, take, told
from test_matrix import ASYNCIO, Runtime
from test_tail import until

pytestmark = pytest.mark.usefixtures("quick_collections")

KINDS = [event["type"] for event in ANSWER.events()]
EVENTS = [frame(event) for event in ANSWER.events()]


def read_until(kind: str) -> int:
    """How many events an application has read that leaves at an event of this kind."""
    return KINDS.index(kind) + 1


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A private certificate authority."""
    return trustme.CA()


@dataclass(frozen=True)
class Way:
    """A way in which a client and a server are connected."""

    name: str
    tls: bool = False
    compressed: bool = False

    def __str__(self) -> str:
        return self.name


PLAIN = Way("plain")
WAYS = (
    PLAIN,
    Way("TLS", tls=True),
    Way("gzip", compressed=True),
    Way("TLS, gzip", tls=True, compressed=True),
)
ways = pytest.mark.parametrize("way", WAYS, ids=str)


class Line:
    """A client, and a server that does not keep responses."""

    def __init__(self, way: Way, serve: Serve, authority: trustme.CA, runtime: Runtime) -> None:
        self._way = way
        self._runtime = runtime
        self.replies: list[Reply] = []
        tls = None
        self._verify: Any = True
        if way.tls:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("127.0.0.1").configure_cert(tls)
            self._verify = ssl.create_default_context()
            authority.configure_trust(self._verify)
        self.server: ScriptedServer = serve(self._reply, tls=tls)

    def _reply(self, request: SeenRequest) -> Reply:
        return self.replies.pop(0) if request.method == "POST" else error(404, "not found")

    def answer(self, *steps: Step) -> None:
        """Have the next call answered so."""
        reply = Reply(steps=steps)
        self.replies.append(encoded(reply, 31) if self._way.compressed else reply)

    def client(self, **how: Any) -> Any:
        http_client = HTTP.Client if self._runtime.is_sync else HTTP.AsyncClient
        return self._runtime.client(
            base_url=f"{self.server.url}/v1",
            api_key="k",
            max_retries=0,
            http_client=http_client(verify=self._verify, **how),
        )


@pytest.fixture
def line(way: Way, runtime: Runtime, serve: Serve, authority: trustme.CA) -> Line:
    """A client and a server, connected in this way."""
    return Line(way, serve, authority, runtime)


def drain_late(observed: Observed) -> None:
    eventually(lambda: not _tail._tails, "no connection is kept")
    assert observed.pending() == 0
    assert faults(observed) == 0


# The terminal event has arrived


@pytest.mark.parametrize("events", [0, 6, read_until("response.output_text.done")])
@ways
@runtimes
def test_a_terminal_event_that_the_kernel_has_received_counts(
    events: int, runtime: Runtime, line: Line, instrument: Instrument
) -> None:
    """The HTTP library has not read it when the application closes the stream. The call is completed."""
    observed = instrument(grace_timeout=0)
    gate = threading.Event()
    line.answer(*map(Send, EVENTS[:events]), Wait(gate), Send(b"".join(EVENTS[events:])), Hold())

    async def main() -> None:
        client = line.client()
        stream = await settle(client.responses.create(**ASKED))
        await take(stream, events)
        gate.set()
        await until(runtime, lambda: line.server.exchanges[0].sent > events)
        await pause(runtime)
        await settle(stream.close())
        await settle(client.close())

    runtime.drive(main)
    span = observed.span()
    assert told(span) == {"outcome": "completed", "source": "stream", "events": len(EVENTS)}
    assert token_attributes(span) == usage_attributes(ANSWER.usage)
    assert len(line.server.requests) == 1
    drain_late(observed)


# The terminal event arrives in a moment


@pytest.mark.parametrize(
    "kind", ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
)
@ways
@runtimes
def test_a_terminal_event_that_arrives_a_moment_after_the_close_is_read(
    kind: str, runtime: Runtime, line: Line, instrument: Instrument
) -> None:
    """After an event that says the output is complete, the stream is read on in the background."""
    observed = instrument(grace_timeout=10)
    events, gate = read_until(kind), threading.Event()
    line.answer(*map(Send, EVENTS[:events]), Wait(gate), *map(Send, EVENTS[events:]))

    async def main() -> None:
        client = line.client()
        stream = await settle(client.responses.create(**ASKED))
        await take(stream, events)
        await settle(stream.close())
        closed_at = time.time_ns()
        assert observed.pending() == 1
        await pause(runtime)
        gate.set()
        await until(runtime, lambda: observed.finished)
        await settle(client.close())
        assert (observed.span().end_time or 0) <= closed_at

    runtime.drive(main)
    span = observed.span()
    assert told(span) == {"outcome": "closed", "source": "tail", "events": events}
    assert token_attributes(span) == usage_attributes(ANSWER.usage)
    assert (span.attributes or {})["openai_responses.response.status"] == "completed"
    assert len(line.server.requests) == 1
    drain_late(observed)


@pytest.mark.parametrize("way", [PLAIN], ids=str)
@pytest.mark.parametrize("settings", [{}, {"grace_timeout": 0.0}], ids=["on", "off"])
@runtimes
def test_a_stream_closed_at_a_delta_is_left_at_once(
    settings: dict[str, Any], runtime: Runtime, line: Line, instrument: Instrument
) -> None:
    """The model is still generating, and each token costs. So the server sees its client leave."""
    events = 6 if not settings else read_until("response.output_text.done")
    observed = instrument(**settings)
    line.answer(*map(Send, EVENTS[:events]), Hold())
    left: list[float | None] = []

    async def main() -> None:
        client = line.client()
        stream = await settle(client.responses.create(**ASKED))
        await take(stream, events)
        await settle(stream.close())
        closed_at = time.time()
        await until(runtime, lambda: line.server.exchanges[0].client_left_at)
        left.append((line.server.exchanges[0].client_left_at or 1e12) - closed_at)
        await settle(client.close())

    runtime.drive(main)
    assert (left[0] or 0) < 0.2
    assert told(observed.span())["missing"] == "not_found"
    drain_late(observed)


@ways
@runtimes
def test_nobody_waits_for_a_connection_that_is_read_on(
    runtime: Runtime, line: Line, instrument: Instrument
) -> None:
    """With a pool of one connection the next request is answered at once, while the server is silent."""
    observed = instrument(grace_timeout=2)
    events = read_until("response.output_text.done")
    line.answer(*map(Send, EVENTS[:events]), Hold())
    line.answer(*map(Send, EVENTS))
    took: list[float] = []

    async def main() -> None:
        client = line.client(limits=HTTP.Limits(max_connections=1))
        stream = await settle(client.responses.create(**ASKED))
        await take(stream, events)
        began = time.monotonic()
        await settle(stream.close())
        took.append(time.monotonic() - began)
        again = await settle(client.responses.create(**ASKED))
        await take(again, len(EVENTS))
        took.append(time.monotonic() - began)
        await settle(client.close())

    runtime.drive(main)
    closing, both = took
    assert closing < 0.5
    assert both < 1.5
    outcomes = sorted(told(span)["outcome"] for span in observed.spans(2))
    assert outcomes == ["closed", "completed"]
    drain_late(observed)


@pytest.mark.parametrize(
    ("kind", "is_done"),
    [
        ("response.output_text.done", True),
        ("response.content_part.done", True),
        ("response.output_item.done", True),
        ("response.refusal.done", True),
        ("response.function_call_arguments.done", True),
        ("response.custom_tool_call_input.done", True),
        ("response.output_text.delta", False),
        ("response.output_item.added", False),
        ("response.reasoning_text.done", False),
        ("response.reasoning_summary_part.done", False),
        ("response.mcp_call_arguments.done", False),
        ("response.code_interpreter_call_code.done", False),
        (None, False),
    ],
)
def test_the_events_after_which_the_terminal_event_is_due(kind: str | None, is_done: bool) -> None:
    """The model has finished its output, as a rule. After reasoning and hosted tools more output follows."""
    state = AnswerState()
    state.on_event("response.output_text.done", None)
    state.on_event(kind, None)
    assert state.is_output_done is is_done


# Other transports


class Http2Server(threading.Thread):
    """A server that speaks HTTP/2 and answers a call with pieces, all of them at once after the first."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__(daemon=True)
        self._pieces = pieces
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.methods: list[str] = []
        self.start()

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with self._listener, connection:
            self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        from h2.config import H2Configuration
        from h2.connection import H2Connection
        from h2.events import RequestReceived, StreamEnded

        state = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        state.initiate_connection()
        connection.sendall(state.data_to_send())
        while data := connection.recv(65536):
            for event in state.receive_data(data):
                if isinstance(event, RequestReceived):
                    self.methods.append(dict(event.headers or ())[":method"])
                elif isinstance(event, StreamEnded):
                    stream_id = event.stream_id
                    state.send_headers(stream_id, [(":status", "200"), ("content-type", "text/event-stream")])
                    first, *rest = self._pieces
                    state.send_data(stream_id, first)
                    connection.sendall(state.data_to_send())
                    time.sleep(0.1)
                    for piece in rest:
                        state.send_data(stream_id, piece)
            connection.sendall(state.data_to_send())


@runtimes
def test_a_terminal_event_that_lies_unread_over_http_2_counts(
    runtime: Runtime, instrument: Instrument
) -> None:
    """The HTTP library has read it together with the last event that the application has read."""
    pytest.importorskip("h2")
    observed = instrument()
    server = Http2Server(EVENTS[0], *EVENTS[1:])

    async def main() -> None:
        http_client = HTTP.Client if runtime.is_sync else HTTP.AsyncClient
        client = runtime.client(
            base_url=f"{server.url}/v1",
            api_key="k",
            max_retries=0,
            http_client=http_client(http1=False, http2=True),
        )
        stream = await settle(client.responses.create(**ASKED))
        await take(stream, 6)
        await settle(stream.close())
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == {"outcome": "completed", "source": "stream", "events": len(EVENTS)}
    assert server.methods == ["POST"]
    drain_late(observed)


@pytest.mark.parametrize("way", [PLAIN, WAYS[2]], ids=str)
@pytest.mark.parametrize("runtime", [ASYNCIO], ids=str)
def test_a_terminal_event_that_lies_unread_in_aiohttp_counts(
    runtime: Runtime, line: Line, instrument: Instrument
) -> None:
    """`DefaultAioHttpClient` has read it, and the application has not."""
    if not hasattr(openai, "DefaultAioHttpClient"):
        pytest.skip("not in this release of the SDK")
    observed = instrument()
    line.answer(*map(Send, EVENTS[:6]), Pause(0.05), Send(b"".join(EVENTS[6:])), Hold())

    async def main() -> None:
        http_client = openai.DefaultAioHttpClient()
        client = runtime.client(
            base_url=f"{line.server.url}/v1", api_key="k", max_retries=0, http_client=http_client
        )
        stream = await client.responses.create(**ASKED)
        await take(stream, 6)
        await until(runtime, lambda: line.server.exchanges[0].sent > 6)
        await pause(runtime)
        await stream.close()
        await client.close()

    runtime.drive(main)
    assert told(observed.span()) == {"outcome": "completed", "source": "stream", "events": len(EVENTS)}
    drain_late(observed)
