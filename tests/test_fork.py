"""Processes that fork: a call belongs to the process that made it, and no socket to two of them."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import re
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedded.answer import new_id
from embedded.http_server import Pause, Reply, ScriptedServer, SeenRequest, Wait
from embedded.responses_api import Plan
from test_exit import ANSWER, BEGUN, CUT, EXIT, PROVIDER_FIRST, NamedAPI, Ran, all_told, begin, finish, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")

KNOWN = {"source": "retrieval"}


class PortServer(ScriptedServer):
    """A server that notes over which connections each process has spoken, as it calls itself."""

    def __init__(self, handler: Any) -> None:
        super().__init__(handler)
        self.ports: defaultdict[int, set[int]] = defaultdict(set)

    async def _exchange(self, wire: Any, request: SeenRequest) -> bool:
        self.ports[int(request.headers["x-process"])].add(wire.transport.get_extra_info("peername")[1])
        return await super()._exchange(wire, request)


@pytest.fixture
def server() -> Iterator[PortServer]:
    with PortServer(NamedAPI(before_get=Pause(0.3))) as server:
        yield server


def by_process(ran: Ran) -> dict[int, set[str]]:
    """The calls that each process has exported, by the models that name them."""
    calls: dict[int, set[str]] = {}
    for span in ran.spans:
        calls.setdefault(span["pid"], set()).add(span["attributes"]["gen_ai.request.model"])
    return calls


def assert_no_port_is_shared(server: PortServer) -> None:
    ports = [port for ports in server.ports.values() for port in ports]
    assert len(ports) == len(set(ports))


FORK = """
child = os.fork()
if child == 0:
    stream.close()
    make_clients()
    stream = read_half("open in the child")
    read_cut("cut in the child")
    sys.exit()
os.waitpid(child, 0)
read_cut("cut after the fork")
"""


def test_a_forked_child_accounts_for_its_own_calls_alone(tmp_path: Path, server: PortServer) -> None:
    """Calls open or pending at a fork are the parent's; the child, whatever it does to them, has its own."""
    ran = run(tmp_path, server, BEGUN + FORK)
    own = {"open in the child": EXIT | KNOWN, "cut in the child": CUT | KNOWN}
    assert "Traceback" not in ran.complaints
    assert ran.told() == all_told(KNOWN) | own | {"cut after the fork": CUT | KNOWN}
    assert min(by_process(ran).values(), key=len) == set(own)
    assert set(by_process(ran)) == set(server.ports)
    assert_no_port_is_shared(server)
    assert ran.total("gen_ai.client.token.usage", **{"gen_ai.token.type": "output"}) == 8 * 245
    assert ran.total("openai_responses.pending") == 0, "what waits in the parent does not wait in the child"


FORKS = """
read_cut("cut")
for number in range({forks}):
    child = os.fork()
    if child == 0:
        make_clients()
        read_cut(f"cut in child {{number}}")
        sys.exit()
    time.sleep(0.002)
for _ in range({forks}):
    os.wait()
"""


def test_forks_wait_for_what_the_first_look_up_imports(tmp_path: Path) -> None:
    """A child that is forked while the first look-up begins can look up as well as its parent."""
    with PortServer(NamedAPI(before_get=Pause(0))) as server:
        ran = run(tmp_path, server, FORKS.format(forks=12))
    children = {f"cut in child {number}": CUT | KNOWN for number in range(12)}
    assert "Traceback" not in ran.complaints
    assert ran.told() == children | {"cut": CUT | KNOWN}
    assert_no_port_is_shared(server)


WORKER = """
import multiprocessing


def work():
    make_clients()
    read_cut(multiprocessing.current_process().name)
    trace.get_tracer_provider().shutdown()
    metrics.get_meter_provider().shutdown()


if __name__ == "__main__":
    stream = read_half("open")
    read_cut("cut")
    context = multiprocessing.get_context({method!r})
    worker = context.Process(target=work, name="cut in a worker")
    worker.start()
    worker.join()
    print(worker.exitcode)
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_worker_process_exports_what_it_has_called(method: str, tmp_path: Path, server: PortServer) -> None:
    """However `multiprocessing` starts a worker, its calls are exported by it, and by nobody else."""
    ran = run(tmp_path, server, WORKER.format(method=method))
    assert (ran.output, "Traceback" in ran.complaints) == ("0\n", False)
    assert ran.told() == {
        "open": EXIT | KNOWN,
        "cut": CUT | KNOWN,
        "cut in a worker": CUT | KNOWN,
    }
    assert sorted(map(sorted, by_process(ran).values())) == [["cut", "open"], ["cut in a worker"]]
    assert_no_port_is_shared(server)
    assert ran.total("openai_responses.calls", **{"openai_responses.usage.source": "retrieval"}) == 3


WEB = """
read_cut("cut in the master")


def app(environ, start_response):
    start_response("200 OK", [("content-type", "text/plain")])
    return answer(environ["PATH_INFO"].lstrip("/").replace("-", " "))


def answer(model):
    try:
        with client.responses.create(model=model, input="x", stream=True) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    yield event.delta.encode()
    except CUT:
        yield b"cut"
"""


class WebAPI(NamedAPI):
    """Also answers whole, at once for two that ask at the same time, or slowly."""

    def __init__(self) -> None:
        super().__init__(before_get=Pause(0.3))
        self._plan = self._plan_by_name
        self._both = threading.Event()
        self._asked = 0

    def _plan_by_name(self, request: SeenRequest) -> Plan | Reply:
        model = request.json["model"]
        answer = replace(ANSWER, id=new_id())
        if model.startswith("both"):
            self._asked += 1
            if self._asked == 2:
                self._both.set()
            return Plan(answer, before=(Wait(self._both),))
        if model.startswith("slow"):
            return Plan(answer, pace=0.05)
        return self._plan_of(request)


def get(port: int, path: str, pieces: int | None = None) -> bytes:
    """Read a page, or leave after some bytes of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", f"/{path}")
        return connection.getresponse().read(pieces)
    finally:
        connection.close()


def test_a_preloading_web_server_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Each worker of a preloaded gunicorn exports its calls, also those of its last moment, and no others."""
    command = ("-m", "gunicorn", "--preload", "--workers=2", "--bind=127.0.0.1:0", "application:app")
    with PortServer(WebAPI()) as server:
        process = begin(tmp_path, server, WEB, PROVIDER_FIRST, command)
        assert process.stderr is not None
        listening = next(
            filter(None, (re.search(r"http://127.0.0.1:(\d+)", line) for line in process.stderr))
        )
        port = int(listening[1])
        with ThreadPoolExecutor() as browsers:
            pages = list(browsers.map(lambda path: get(port, path), ("both-1", "both-2")))
            left = browsers.submit(get, port, "slow", 5).result()
        pages += [get(port, "cut-1"), get(port, "cut-2")]
        process.send_signal(signal.SIGTERM)
        ran = finish(tmp_path, process)
    whole = {"outcome": "completed", "source": "stream"}
    assert pages == [ANSWER.text.encode()] * 2 + [ANSWER.text[:16].encode() + b"cut"] * 2
    assert ANSWER.text.encode().startswith(left)
    assert ran.code == 0
    assert ran.told() == {
        "cut in the master": CUT | KNOWN,
        "both 1": whole,
        "both 2": whole,
        "slow": {"outcome": "closed"} | KNOWN,
        "cut 1": CUT | KNOWN,
        "cut 2": CUT | KNOWN,
    }
    master = next(pid for pid, calls in by_process(ran).items() if "cut in the master" in calls)
    assert by_process(ran).pop(master) == {"cut in the master"}
    assert len(by_process(ran)) == 3
    assert ran.total("gen_ai.client.token.usage", **{"gen_ai.token.type": "output"}) == 6 * 245
