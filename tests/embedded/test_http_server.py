"""The scripted server does on the wire what its script says."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest

from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest, Send, Wait

if TYPE_CHECKING:
    from collections.abc import Callable


def connect(server: ScriptedServer) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=5)


def until(condition: Callable[[], bool], timeout: float = 2.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def test_a_request_is_seen_as_it_was_sent() -> None:
    """Method, path, query, headers and body of a request are kept."""
    with ScriptedServer(lambda _: Reply.json({"ok": True})) as server:
        client = connect(server)
        client.request("POST", "/v1/x%20y?after=3", json.dumps({"a": 1}), {"X-Key": "k"})
        assert json.load(client.getresponse()) == {"ok": True}
        client.close()
    [seen] = server.requests
    assert (seen.method, seen.path, seen.query, seen.json) == ("POST", "/v1/x y", {"after": "3"}, {"a": 1})
    assert seen.headers["x-key"] == "k"


def test_a_connection_is_kept_for_the_next_request() -> None:
    """Clean replies, chunked or not, leave the connection usable."""
    replies = [Reply.sse([{"type": "a"}]), Reply.json({}), Reply.sse([{"type": "b"}])]
    with ScriptedServer(lambda _: replies.pop(0)) as server:
        client = connect(server)
        bodies = []
        for _ in range(3):
            client.request("GET", "/")
            bodies.append(client.getresponse().read())
        client.close()
    assert bodies == [b'event: a\ndata: {"type":"a"}\n\n', b"{}", b'event: b\ndata: {"type":"b"}\n\n']
    assert server.connections == 1


@pytest.mark.parametrize(
    ("how", "error"), [("fin", http.client.IncompleteRead), ("rst", ConnectionResetError)]
)
def test_a_cut_is_felt_inside_the_body(how: Literal["fin", "rst"], error: type[Exception]) -> None:
    """A cut ends the connection between two chunks, in order or with a reset."""
    gate = threading.Event()
    with ScriptedServer(lambda _: Reply(steps=(Send(b"half"), Wait(gate), Cut(how)))) as server:
        client = connect(server)
        client.request("GET", "/")
        response = client.getresponse()
        assert response.read1() == b"half"
        gate.set()
        with pytest.raises(error):
            response.read()
        client.close()


def test_a_raw_body_ends_with_the_connection() -> None:
    """Without chunks and without a length the body is what came before the end."""
    with ScriptedServer(lambda _: Reply(steps=(Send(b"no"), Send(b"frames")), chunked=False)) as server:
        client = connect(server)
        client.request("GET", "/")
        assert client.getresponse().read() == b"noframes"
        client.close()


def test_steps_can_come_before_the_head() -> None:
    """A reply can be late, and a connection can end without any reply."""
    replies = [Reply.json({}, delay=0.1), Reply(before=(Cut(),))]
    with ScriptedServer(lambda _: replies.pop(0)) as server:
        client = connect(server)
        began = time.monotonic()
        client.request("GET", "/")
        client.getresponse().read()
        assert time.monotonic() - began >= 0.1
        client.request("GET", "/")
        with pytest.raises(http.client.RemoteDisconnected):
            client.getresponse()


def test_the_end_of_an_exchange_is_known() -> None:
    """A client that goes away during a silence is noticed at once, and a finished reply has no leaver."""
    replies = [Reply.json({}), Reply(steps=(Send(b"x"), Hold()))]
    with ScriptedServer(lambda _: replies.pop(0)) as server:
        client = connect(server)
        client.request("GET", "/")
        client.getresponse().read()
        client.request("GET", "/")
        response = client.getresponse()
        response.read1()
        left_at = time.time()
        response.close()
        client.close()
        assert until(lambda: server.exchanges[1].ended_at is not None)
    finished, left = server.exchanges
    assert finished.client_left_at is None
    assert left.ended_at == left.client_left_at == pytest.approx(left_at, abs=0.05)
    assert left.last_write_at is not None
    assert left.last_write_at <= left_at


def test_a_gate_lets_everybody_through_at_once() -> None:
    """Two hundred streams that wait for one event are cut within moments of each other."""
    gate = threading.Event()

    async def read_until_cut(port: int) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"first\r\n")
        waiting.append(1)
        if len(waiting) == 200:
            gate.set()
        assert await reader.read() == b""
        writer.close()
        return time.monotonic()

    async def main(port: int) -> list[float]:
        return await asyncio.gather(*(read_until_cut(port) for _ in range(200)))

    waiting: list[int] = []
    with ScriptedServer(lambda _: Reply(steps=(Send(b"first"), Wait(gate), Cut()))) as server:
        ends = asyncio.run(main(urlsplit(server.url).port or 0))
        assert server.peak_of("GET") == server.peak_of() == 200
        assert until(lambda: server.in_flight_of() == 0)
    assert max(ends) - min(ends) < 0.5


def test_stop_does_not_wait_for_what_is_held() -> None:
    """A server with held and slow replies stops within a second, and its clients notice."""
    script = {"/hold": Hold(), "/slow": Pause(60), "/wait": Wait(threading.Event())}
    with ExitStack() as clients:
        server = ScriptedServer(lambda request: Reply(steps=(Send(b"x"), script[request.path]))).start()
        connections = []
        for path in list(script) * 10:
            connection = clients.enter_context(
                socket.create_connection(("127.0.0.1", urlsplit(server.url).port))
            )
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            connections.append(connection)
        assert until(lambda: server.in_flight_of("GET") == 30)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 1
        assert server.open_connections == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_stop_leaves_nothing_of_what_comes_meanwhile() -> None:
    """A connection that is being accepted while the server stops is ended, too."""
    for _ in range(30):
        server = ScriptedServer(lambda _: Reply.json({})).start()
        address = ("127.0.0.1", urlsplit(server.url).port)
        with ExitStack() as clients:

            def come(address: tuple[str, int | None] = address, clients: ExitStack = clients) -> None:
                with suppress(OSError):
                    while True:
                        clients.enter_context(socket.create_connection(address))

            coming = threading.Thread(target=come)
            coming.start()
            until(lambda server=server: server.connections > 0)
            server.stop()
            coming.join()
        assert server.open_connections == 0
    gc.collect()


def test_a_fault_of_the_script_is_not_hidden() -> None:
    """A handler that raises is answered with 500, and the test that wrote it fails."""

    def broken(request: SeenRequest) -> Reply:
        raise KeyError(request.path)

    def provoke() -> None:
        with ScriptedServer(broken) as server:
            client = connect(server)
            client.request("GET", "/x")
            assert client.getresponse().status == 500
            client.close()

    with pytest.raises(KeyError, match="/x"):
        provoke()


def test_a_handler_may_be_a_coroutine() -> None:
    """A handler can take its time without holding up the others."""

    async def handler(request: SeenRequest) -> Reply:
        await asyncio.sleep(0.01)
        return Reply.json({"path": request.path})

    with ScriptedServer(handler) as server:
        client = connect(server)
        client.request("GET", "/x")
        assert json.load(client.getresponse()) == {"path": "/x"}
        client.close()
