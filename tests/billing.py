"""What is billed beside the tokens of an answer: hosted tools, compactions, and what was counted of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from embedded.answer import Answer, Json, new_id, usage
from embedded.http_server import Reply, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI
from observed import Observed

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNTS = usage(7, 21, cached=3, reasoning=11)
ASKED: dict[str, Any] = {"model": "m", "input": "x"}
# Early releases of the SDK know neither of them by name.
BACKGROUND: dict[str, Any] = {"extra_body": {"background": True}}
WINDOW: dict[str, Any] = {
    "extra_body": {"background": True, "background_options": {"completion_window": "2h"}}
}


@dataclass(frozen=True)
class BilledAnswer(Answer):
    """An answer with items that hosted tools made, and fields that the response has when it has ended."""

    items: tuple[Any, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def response(self, asked: Mapping[str, Any] | None = None, *, status: str | None = None) -> Json:
        """The response; it has the items and the fields at its end only."""
        body = super().response(asked, status=status)
        if status is not None:
            return body
        return {**body, "output": [*body["output"], *self.items], **self.fields}

    def _events(self, asked: Mapping[str, Any]) -> Iterator[Json]:
        *begun, terminal = super()._events(asked)
        yield from begun
        for number, item in enumerate(self.items, start=len(self._items())):
            yield {"type": "response.output_item.added", "output_index": number, "item": item}
            yield {"type": "response.output_item.done", "output_index": number, "item": item}
        yield terminal


def answer(*items: Any, counts: Json | None = COUNTS, **fields: Any) -> BilledAnswer:
    """An answer with an id of its own."""
    return BilledAnswer(("one ", "two "), counts, items=items, fields=fields)


def call_of(kind: str, **more: Any) -> Json:
    """An output item of this type."""
    return {"id": new_id("it"), "type": kind, "status": "completed", **more}


def tool_usage(*, searches: int = 0, image: tuple[int, int] = (0, 0)) -> Json:
    """The use of hosted tools in the API's own shape."""
    inputs, outputs = image
    return {
        "web_search": {"num_requests": searches},
        "image_gen": {
            "input_tokens": inputs,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": inputs},
            "output_tokens": outputs,
            "output_tokens_details": {"image_tokens": outputs, "text_tokens": 0},
            "total_tokens": inputs + outputs,
        },
    }


# What three kinds of tools did in one answer, and one of the application's, with what is billed for it.
TOOLS = answer(
    call_of("web_search_call", action={"type": "search", "query": "q"}),
    call_of("web_search_call", action={"type": "open_page", "url": "http://127.0.0.1/"}),
    call_of("file_search_call", queries=["q"]),
    call_of("image_generation_call", result="aW1hZ2U="),
    call_of("function_call", call_id="call_1", name="f", arguments="{}"),
    tool_usage=tool_usage(searches=3, image=(40, 1056)),
)
TOOL_CALLS = {"web_search_call": 2, "file_search_call": 1, "image_generation_call": 1}
TOOL_TOKENS = {"input": 40, "output": 1056}
SEARCHES = 3


def compaction(counts: Json | None = COUNTS, **fields: Any) -> Json:
    """The answer to a compaction."""
    return {
        "id": new_id(),
        "object": "response.compaction",
        "created_at": 1_790_000_000,
        "output": [
            {"id": new_id("msg"), "type": "message", "role": "user", "status": "completed", "content": []},
            {"id": new_id("cmp"), "type": "compaction", "encrypted_content": "canary-of-the-compaction"},
        ],
        "usage": counts,
        **fields,
    }


class BilledAPI:
    """The Responses API, its route for compactions, and headers of the test's own for every create."""

    def __init__(
        self,
        plan: Callable[[SeenRequest], Plan | Reply] | Plan | Reply | None = None,
        *,
        compact: Callable[[SeenRequest], Reply] | None = None,
        cancel: Callable[[str], Reply] | None = None,
        headers: Callable[[int], Mapping[str, str]] = lambda _: {},
    ) -> None:
        made = plan or Plan()
        self.api = ResponsesAPI(made if callable(made) else lambda _: made)
        self._compact = compact or (lambda _: Reply.json(compaction()))
        self._cancel = cancel
        self._headers = headers
        self._lock = threading.Lock()
        self.seen: Counter[str] = Counter()

    def __call__(self, request: SeenRequest) -> Reply:
        """What the service replies to this request."""
        with self._lock:
            self.seen[request.method] += 1
        if request.path.endswith("/responses/compact"):
            return self._compact(request)
        if self._cancel is not None and request.path.endswith("/cancel"):
            return self._cancel(request.path.split("/")[-2])
        reply = self.api(request)
        if request.method == "POST":
            reply = replace(reply, headers={**reply.headers, **self._headers(self.seen["POST"])})
        return reply


def counted(observed: Observed, name: str, *by: str) -> dict[Any, float]:
    """The values of a counter or gauge, summed by these attributes: by value if it is one attribute."""
    totals: dict[Any, float] = {}
    for point in observed.points(name):
        values = tuple(point.attributes.get(attribute) for attribute in by)
        key = values[0] if len(values) == 1 else values
        totals[key] = totals.get(key, 0) + point.value
    return totals


def tool_calls(observed: Observed) -> dict[Any, float]:
    """Items that hosted tools made, by type."""
    return counted(observed, "openai_responses.tool.calls", "openai_responses.tool.type")


def tool_tokens(observed: Observed) -> dict[Any, float]:
    """Tokens of hosted tools, by token type."""
    return counted(observed, "openai_responses.tool.tokens", "gen_ai.token.type")


def searches(observed: Observed) -> float:
    """Web searches that are billed."""
    return sum(counted(observed, "openai_responses.tool.web_search.requests").values())


def late(observed: Observed) -> dict[Any, float]:
    """Calls counted late, by the reason that they had."""
    return counted(observed, "openai_responses.late_usage", "openai_responses.usage.missing_reason")


def assert_tools_once(observed: Observed, times: int = 1) -> None:
    """Check that the tools of `TOOLS` were counted so often, exactly."""
    assert tool_calls(observed) == {kind: count * times for kind, count in TOOL_CALLS.items()}
    assert tool_tokens(observed) == {kind: count * times for kind, count in TOOL_TOKENS.items()}
    assert searches(observed) == SEARCHES * times


def tool_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a span that say what hosted tools did, without their common prefix."""
    prefix = "openai_responses.tool."
    return {name.removeprefix(prefix): value for name, value in attributes.items() if name.startswith(prefix)}


TOOL_ATTRIBUTES = {
    **{f"calls.{kind}": count for kind, count in TOOL_CALLS.items()},
    "web_search.requests": SEARCHES,
    "image_generation.input_tokens": TOOL_TOKENS["input"],
    "image_generation.output_tokens": TOOL_TOKENS["output"],
}
