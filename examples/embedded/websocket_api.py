"""The Responses API over WebSocket and, for look-ups, over HTTP: both on one port."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeAlias, cast
from urllib.parse import parse_qsl, urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from embedded.answer import Answer, Ending, Json, new_id
from embedded.http_server import Cut, Hold, Wait
from embedded.responses_api import ROUTE, Fate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self
    from websockets.http11 import Request, Response

LANE = re.compile(r"[A-Za-z0-9_.-]{1,256}")
MOST_ACTIVE = 16
STEERED = Ending("incomplete", reason="steered")


@dataclass(frozen=True)
class Close:
    """The server closes the connection, by a close frame with this code."""

    code: int = 1000


End: TypeAlias = Close | Cut | Hold | Wait | None


@dataclass(frozen=True)
class Turn:
    """What the server does about one `response.create`.

    It sends `cut_after` events (all, if None), then does `end`: a `Wait` goes on with the other events. A
    `refusal` is sent in place of all events, and `extra` before the event of that number. Without
    `echoes_lane` the events do not say which lane they belong to.
    """

    answer: Answer = field(default_factory=Answer)
    cut_after: int | None = None
    end: End = None
    refusal: Json | None = None
    fate: Fate = "kept"
    first_event: int = 0
    extra: Mapping[int, tuple[str | bytes | Json, ...]] = field(default_factory=dict)
    pace: float = 0.0
    echoes_lane: bool = True
    gate: threading.Event | None = None  # before the first event


@dataclass
class SeenMessage:
    """A message as it arrived, with the connection that it came by."""

    data: str | bytes
    connection: Connection

    @property
    def json(self) -> Json:
        """The message, decoded."""
        return cast("Json", json.loads(self.data))


@dataclass
class _Record:
    answer: Answer
    asked: Json
    fate: Fate


@dataclass
class _Lane:
    """The creates of a lane, which run one after the other."""

    name: str | None
    creates: asyncio.Queue[Json] = field(default_factory=asyncio.Queue)
    active: str | None = None  # id of the response that runs
    steers: deque[Json] = field(default_factory=deque)
    pending: dict[str, list[Json]] = field(default_factory=dict)  # steering that waits for a create


class WebSocketAPI:
    """Answers each create as `turn` says. Also a plain HTTP server for `GET /v1/responses/{id}`.

    `stored` has every response by id as it ended: the truth to compare with. `handshakes` and `gets` have the
    headers of what arrived. `refuse_connections` is the HTTP status for so many of the next handshakes.
    """

    def __init__(self, turn: Callable[[Json], Turn] = lambda _: Turn(), *, key: str | None = None) -> None:
        self.stored: dict[str, Json] = {}
        self.messages: list[SeenMessage] = []
        self.handshakes: list[Request] = []
        self.gets: list[Request] = []
        self.connections: list[Connection] = []
        self.refusals: list[int] = []
        self.faults: list[BaseException] = []
        self._turn = turn
        self._key = key
        self._records: dict[str, _Record] = {}
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._listening = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The base URL for clients, over HTTP."""
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopping = self._stopping
        assert stopping is not None  # noqa: S101  # it is listening
        self.loop.call_soon_threadsafe(stopping.set)
        self._thread.join()
        if error is None and self.faults:
            raise self.faults[0]

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = await serve(
            self._converse,
            "127.0.0.1",
            0,
            process_request=self._on_request,
            max_size=None,
            ping_interval=None,
        )
        self._port = next(iter(server.sockets)).getsockname()[1]
        self._listening.set()
        await self._stopping.wait()
        for connection in self.connections:
            connection.socket.transport.abort()
        server.close()
        await server.wait_closed()

    def _on_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a plain request, or refuse a handshake. `None` goes on with the handshake."""
        given = request.headers.get("api-key") or request.headers.get("authorization", "")
        given = given.removeprefix("Bearer ")
        is_handshake = "upgrade" in request.headers
        (self.handshakes if is_handshake else self.gets).append(request)
        if not given or (self._key and given != self._key):
            return self._document(connection, 401, _error("Incorrect API key provided.", "invalid_api_key"))
        if not is_handshake:
            return self._document(connection, *self._fetch(request))
        if self.refusals:
            return self._document(connection, self.refusals.pop(0), _error("Not now.", "server_error"))
        return None

    def _fetch(self, request: Request) -> tuple[int, Json]:
        route = ROUTE.fullmatch(urlsplit(request.path).path)
        response_id = route and route["id"]
        record = self._records.get(response_id or "")
        if record is None or record.fate == "lost" or record.asked.get("store") is False:
            return 404, _error(f"Response with id '{response_id}' not found.", None)
        if record.fate == "stuck":
            return 200, record.answer.response(record.asked, status="in_progress")
        return 200, self.stored[record.answer.id]

    @staticmethod
    def _document(connection: ServerConnection, status: int, body: Json) -> Response:
        response = connection.respond(HTTPStatus(status), json.dumps(body))
        del response.headers["content-type"]
        response.headers["content-type"] = "application/json"
        return response

    async def _converse(self, socket: ServerConnection) -> None:
        connection = Connection(self, socket)
        self.connections.append(connection)
        try:
            await connection.run()
        except ConnectionClosed:
            pass
        except Exception as error:
            self.faults.append(error)
            raise

    def turn_of(self, asked: Json) -> Turn:
        """What to do about a create."""
        return self._turn(asked)

    def begin(self, turn: Turn, asked: Json) -> Answer:
        """Store the response as it will have ended, and return it."""
        answer = turn.answer.within(asked.get("max_output_tokens"))
        if asked.get("generate") is False:
            answer = replace(answer, pieces=(), reasoning=(), calls=())
        self._records[answer.id] = _Record(answer, asked, turn.fate)
        self.stored[answer.id] = answer.response(asked)
        return answer

    def end(self, answer: Answer, asked: Json) -> None:
        """Store a response that ended in another way."""
        self._records[answer.id].answer = answer
        self.stored[answer.id] = answer.response(asked)


class Connection:
    """One WebSocket of the server: lanes that run side by side, each in order."""

    def __init__(self, api: WebSocketAPI, socket: ServerConnection) -> None:
        self._api = api
        self.socket = socket
        self.query = dict(parse_qsl(urlsplit(cast("Request", socket.request).path).query))
        self._lanes: dict[str | None, _Lane] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._active = asyncio.Semaphore(MOST_ACTIVE)
        self._lane_of: dict[str, _Lane] = {}

    async def run(self) -> None:
        """Take messages until the client leaves."""
        try:
            async for data in self.socket:
                self._api.messages.append(SeenMessage(data, self))
                await self._on_message(json.loads(data))
        finally:
            for task in self._tasks:
                task.cancel()

    def send_now(self, *messages: str | bytes | Json) -> None:
        """Send something that nobody asked for, from any thread."""

        async def send() -> None:
            for message in messages:
                await self.send(message)

        asyncio.run_coroutine_threadsafe(send(), self._api.loop).result(5)

    def end_now(self, end: Close | Cut) -> None:
        """Begin to end the connection, from any thread."""
        asyncio.run_coroutine_threadsafe(self._end(end), self._api.loop)

    async def send(self, message: str | bytes | Json) -> None:
        """Send an event, or a message as it is."""
        if isinstance(message, dict):
            message = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
        await self.socket.send(message)

    async def _on_message(self, message: Json) -> None:
        if message.get("type") == "response.create":
            name = message.get("stream_id")
            if name is not None and not LANE.fullmatch(str(name)):
                await self.send(error("That is no lane.", "invalid_stream_id"))
                return
            if name not in self._lanes:
                self._lanes[name] = lane = _Lane(name)
                self._tasks.append(asyncio.create_task(self._run_lane(lane)))
            self._lanes[name].creates.put_nowait(message)
        elif message.get("type") == "response.steer":
            await self._steer(message)
        else:
            await self.send(error(f"Unknown type {message.get('type')}.", "invalid_value"))

    async def _steer(self, message: Json) -> None:
        previous_id, steer_id = message["previous_response_id"], new_id("steer")
        lane = self._lane_of.get(previous_id)
        named = {} if lane is None or lane.name is None else {"stream_id": lane.name}
        if lane is None or lane.active != previous_id:
            code = "response_not_found" if lane is None else "response_already_completed"
            failure = {"code": code, "message": "No.", "type": "invalid_request_error"}
            steer = {"input": message["input"], "previous_response_id": previous_id}
            event = {"type": "response.steer.failed", "sequence_number": 0, "error": failure, "steer": steer}
            await self.send({**event, **named})
            return
        steer = {"id": steer_id, "previous_response_id": previous_id}
        lane.steers.append(steer)
        await self.send({"type": "response.steer.accepted", "sequence_number": 0, "steer": steer, **named})

    async def _run_lane(self, lane: _Lane) -> None:
        try:
            while True:
                asked = await lane.creates.get()
                async with self._active:
                    await self._run(lane, asked)
        except ConnectionClosed:
            pass
        except Exception as fault:
            self._api.faults.append(fault)
            raise

    async def _run(self, lane: _Lane, asked: Json) -> None:
        turn = self._api.turn_of(asked)
        named = {"stream_id": lane.name} if lane.name is not None and turn.echoes_lane else {}
        if turn.gate is not None:
            await self._wait(turn.gate)
        if turn.refusal is not None:
            await self.send({**turn.refusal, **named})
            if turn.end is not None and turn.cut_after is None:
                await self._end(turn.end)
            return
        steered = await self._play(lane, turn, asked, named)
        while steered is not None:
            # The successor has the settings of the response that was steered.
            asked = {**asked, "previous_response_id": steered}
            asked.pop("generate", None)
            turn = replace(self._api.turn_of({**asked, "steers": steered}), first_event=0)
            steered = await self._play(lane, turn, asked, named)

    async def _play(self, lane: _Lane, turn: Turn, asked: Json, named: Json) -> str | None:
        """Send one response. Returns its id if a successor continues it because it was steered."""
        answer = self._api.begin(turn, asked)
        events = answer.events({**asked, "stream_options": {"include_obfuscation": False}})
        if asked.get("generate") is False:
            events = [events[0], events[-1]]
        lane.active = answer.id
        self._lane_of[answer.id] = lane
        lane.steers.clear()
        for number, event in enumerate(events):
            if number == turn.cut_after and turn.end is not None:
                await self._end(turn.end)
            if number < turn.first_event:
                continue
            for message in turn.extra.get(number, ()):
                await self.send({**message, **named} if isinstance(message, dict) else message)
            is_last = number == len(events) - 1
            if lane.steers and not is_last and not answer.calls:
                answer = replace(answer, ending=STEERED)
                self._api.end(answer, asked)
                lane.active = None
                await self.send({**answer.events(asked)[-1], **named})
                return answer.id
            if is_last:
                lane.active = None
            await self.send({**event, **named})
            # Also lets what has arrived in the meantime be read.
            await asyncio.sleep(turn.pace)
        if lane.steers and answer.calls:
            for steer in lane.steers:
                stubs = [{"type": "function_call_output", "call_id": "call_x"}]
                event = {"type": "response.steer.pending", "sequence_number": 0, "steer": steer}
                reason = "waiting_for_required_input"
                await self.send({**event, "reason": reason, "required_input": stubs, **named})
            return None
        return answer.id if lane.steers else None

    async def _end(self, end: Close | Cut | Hold | Wait) -> None:
        match end:
            case Close(code):
                await self.socket.close(code)
            case Cut(how):
                transport = self.socket.transport
                if how == "rst":
                    plain: socket.socket = transport.get_extra_info("socket")
                    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
                await self.socket.wait_closed()
            case Hold():
                await self.socket.wait_closed()
            case Wait(event):
                await self._wait(event)

    @staticmethod
    async def _wait(event: threading.Event) -> None:
        while not event.is_set():
            await asyncio.sleep(0.002)


def error(message: str, code: str | None, status: int = 400) -> Json:
    """An `error` event as the API words it."""
    return {"type": "error", "status": status, **_error(message, code)}


def _error(message: str, code: str | None) -> Json:
    return {"error": {"type": "invalid_request_error", "code": code, "message": message, "param": None}}
