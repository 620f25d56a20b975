"""The Responses API over HTTP, as a handler for `ScriptedServer` that knows the true token counts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedded.answer import Answer, Json, new_id
from embedded.http_server import Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from embedded.http_server import SeenRequest, Step

ROUTE = re.compile(r".*/responses(?:/(?P<id>[^/]+?)(?P<cancel>/cancel)?)?")
UNDER_WAY = ("queued", "in_progress")

Fate: TypeAlias = Literal["kept", "lost", "stuck"]


@dataclass(frozen=True)
class Plan:
    """What becomes of one call.

    The stream sends `cut_after` events (all, if None), `pace` seconds apart, then does `end`; without an
    `end` the body ends cleanly. However little of it was delivered, the server had generated the whole
    answer, and its `fate` decides what a later GET finds: the response as it ended (`kept`), a 404
    (`lost`) or `in_progress` for good (`stuck`). Before that, GETs get `get_replies` one by one: a
    reply, or a status in which the response is shown. Streamed GETs get `resume_replies`, then the rest
    of the events. A cancelled response has no usage, as with the real service, until the GETs after it
    find `usage_after_cancel`.

    Of the plan for a compaction only `before` and the answer's id and usage count.
    """

    answer: Answer = field(default_factory=Answer)
    cut_after: int | None = None
    end: Step | None = None
    pace: float = 0.0
    event_lines: bool = True
    before: tuple[Step, ...] = ()
    fate: Fate = "kept"
    get_replies: tuple[Reply | str, ...] = ()
    resume_replies: tuple[Reply, ...] = ()
    usage_after_cancel: Mapping[str, Any] | None = None


@dataclass
class _Record:
    plan: Plan
    answer: Answer
    asked: Json
    get_replies: list[Reply | str]
    resume_replies: list[Reply]


class ResponsesAPI:
    """Answers each create as `plan` says: with the stream or the response of a `Plan`, or with any reply.

    `stored` has every response by id as the server ended it: the truth to compare with, also for those
    that `store=False` hides from GET, as it does without `background=True`, and for compactions, which no
    GET finds. With a `key` only that key is let in, else any.
    """

    def __init__(
        self, plan: Callable[[SeenRequest], Plan | Reply] = lambda _: Plan(), *, key: str | None = None
    ) -> None:
        self.stored: dict[str, Json] = {}
        self._plan = plan
        self._key = key
        self._records: dict[str, _Record] = {}

    def __call__(self, request: SeenRequest) -> Reply:
        """What the service replies to this request."""
        route = ROUTE.fullmatch(request.path)
        if refusal := self._refuse(request):
            return refusal
        match request.method, route and route["id"], route and route["cancel"]:
            case "POST", None, None if route:
                return self._create(request)
            case "POST", "compact", None:
                return self._compact(request)
            case "GET", str(response_id), None:
                return self._fetch(response_id, request)
            case "POST", str(response_id), str():
                return self._cancel(response_id)
        return error(404, f"Invalid URL ({request.method} {request.path})")

    def _refuse(self, request: SeenRequest) -> Reply | None:
        # Azure sends its key in a header of its own.
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = request.headers.get("api-key") or (key.strip() if scheme.lower() == "bearer" else "")
        if not given:
            return error(401, "Missing bearer or basic authentication in header")
        if self._key and given != self._key:
            return error(401, "Incorrect API key provided.", code="invalid_api_key")
        return None

    def _create(self, request: SeenRequest) -> Reply:
        asked: Json = request.json
        previous = asked.get("previous_response_id")
        if previous and not self._visible(previous):
            return error(
                400, f"Previous response with id '{previous}' not found.", code="previous_response_not_found"
            )
        plan = self._plan(request)
        if isinstance(plan, Reply):
            return plan
        answer = plan.answer.within(asked.get("max_output_tokens"))
        self._records[answer.id] = _Record(
            plan, answer, asked, list(plan.get_replies), list(plan.resume_replies)
        )
        self.stored[answer.id] = answer.response(asked)
        if asked.get("stream"):
            return self._stream(plan, answer.events(asked)[: plan.cut_after], plan.end)
        status = "queued" if asked.get("background") else None
        return Reply.json(answer.response(asked, status=status), headers=_request_id())

    def _compact(self, request: SeenRequest) -> Reply:
        plan = self._plan(request)
        if isinstance(plan, Reply):
            return plan
        compaction = plan.answer.compaction()
        self.stored[plan.answer.id] = compaction
        return replace(Reply.json(compaction, headers=_request_id()), before=plan.before)

    def _fetch(self, response_id: str, request: SeenRequest) -> Reply:
        record = self._visible(response_id)
        if record is None:
            return _not_found(response_id)
        if request.query.get("stream") == "true":
            if record.resume_replies:
                return record.resume_replies.pop(0)
            after = int(request.query.get("starting_after", -1))
            return self._stream(record.plan, record.answer.events(record.asked)[after + 1 :])
        shown: Reply | str | None = record.get_replies.pop(0) if record.get_replies else None
        if isinstance(shown, Reply):
            return shown
        if shown is None and record.plan.fate == "stuck":
            shown = "in_progress"
        body = record.answer.response(record.asked, status=shown) if shown else self.stored[response_id]
        return Reply.json(body, headers=_request_id())

    def _cancel(self, response_id: str) -> Reply:
        record = self._visible(response_id)
        if record is None:
            return _not_found(response_id)
        if not record.asked.get("background"):
            return error(400, "Cannot cancel a synchronous response.")
        cancelled = record.answer.response(record.asked, status="cancelled")
        self.stored[response_id] = {**cancelled, "usage": record.plan.usage_after_cancel}
        return Reply.json(cancelled, headers=_request_id())

    def _visible(self, response_id: str) -> _Record | None:
        record = self._records.get(response_id)
        if record is None or record.plan.fate == "lost":
            return None
        if record.asked.get("store") is False and not record.asked.get("background"):
            return None  # a background response is kept for some minutes all the same
        return record

    def _stream(self, plan: Plan, events: list[Json], end: Step | None = None) -> Reply:
        return Reply.sse(
            events,
            pace=plan.pace,
            event_lines=plan.event_lines,
            end=end,
            before=plan.before,
            headers=_request_id(),
        )


def error(status: int, message: str, *, code: str | None = None, kind: str | None = None) -> Reply:
    """An error as the API words it."""
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Reply.json(body, status=status, headers=_request_id())


def _not_found(response_id: str) -> Reply:
    return error(404, f"Response with id '{response_id}' not found.")


def _request_id() -> dict[str, str]:
    return {"x-request-id": new_id("req")}
