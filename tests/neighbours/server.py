"""The loopback server of the scenarios. It knows the true token counts of every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scenarios import OWN, REFUSED

from embedded.answer import Answer, usage
from embedded.http_server import Hold, Pause, Reply, ScriptedServer
from embedded.responses_api import Plan, ResponsesAPI, error
from neighbours import is_early

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedded.http_server import SeenRequest

CHAT_TOKENS = 11
SLOW_S = 0.4  # before the answer to a model with `slow` in its name


class Api(ResponsesAPI):
    """Answers as the model of the request is named. Every answer has another number of input tokens.

    A look-up of a model with `hanging` in its name has no answer.
    """

    def __init__(self) -> None:
        super().__init__(self._plan_of)
        self.calls = 0
        self.tokens: dict[str, int] = {}

    def __call__(self, request: SeenRequest) -> Reply:
        if request.path.endswith("/chat/completions"):
            return Reply.json(_chat_completion(request.json["model"]))
        if not request.path.startswith("/v1/responses"):
            return Reply.json({})  # a neighbour's own traffic
        return super().__call__(request)

    def _plan_of(self, request: SeenRequest) -> Plan | Reply:
        model = request.json["model"]
        self.calls += 1
        if model == REFUSED:
            return error(401, "Incorrect API key provided.", code="invalid_api_key")
        tokens = 1000 + self.calls * self.calls
        self.tokens[model] = self.tokens.get(model, 0) + tokens
        answer = Answer(
            pieces=tuple(f"piece {n} " for n in range(12)), usage=usage(tokens, 40 + self.calls), model=model
        )
        before = (Pause(SLOW_S),) if "slow" in model else ()
        if is_early(model):
            hanging = (Reply(before=(Hold(),)),) if "hanging" in model else ()
            return Plan(answer, cut_after=10, end=Hold(), get_replies=hanging, before=before)
        return Plan(answer, before=before)


def gets(server: ScriptedServer) -> Iterator[tuple[bool, SeenRequest]]:
    """Look-ups and fetches so far: whether it is the application's own, and the request."""
    for request in server.requests:
        if request.method == "GET" and request.path.startswith("/v1/responses"):
            yield next(iter(OWN)) in request.headers, request


def _chat_completion(model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": "A span."}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": CHAT_TOKENS, "completion_tokens": 4, "total_tokens": CHAT_TOKENS + 4},
    }
