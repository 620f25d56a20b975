"""A Responses server in a process of its own, whose streams break and whose look-ups wait for a sign.

It prints its address, and stops when its standard input ends. A POST to `/open` is the sign; from then on
a look-up is answered `ANSWER_S` seconds after it was asked.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from types import TracebackType

from typing_extensions import Self

from embedded.http_server import Cut, Pause, Reply, ScriptedServer, SeenRequest, Wait
from embedded.responses_api import Plan, ResponsesAPI

ANSWER_S = 0.05


def main() -> None:
    """Serve until standard input ends."""
    opened = threading.Event()
    from embedded.answer import Answer

    api = ResponsesAPI(lambda _: Plan(Answer(), cut_after=4, end=Cut()))

    def handle(request: SeenRequest) -> Reply:
        if request.path == "/open":
            opened.set()
            return Reply.json({})
        reply = api(request)
        if request.method == "GET":
            return dataclasses.replace(reply, before=(Wait(opened), Pause(ANSWER_S)))
        return reply

    with ScriptedServer(handle) as server:
        sys.stdout.write(server.url + "\n")
        sys.stdout.flush()
        sys.stdin.read()


class BreakingServer:
    """The server as a context manager of the process that measures."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self._process.stdout.readline().strip() if self._process.stdout else ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


if __name__ == "__main__":
    main()
