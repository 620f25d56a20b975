"""What the model answers: one object that knows every event of its stream and the response they make."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Json: TypeAlias = dict[str, Any]
MODEL = "gpt-5.4-mini-2026-03-17"


def new_id(kind: str = "resp") -> str:
    """An id as the API makes them."""
    return f"{kind}_{secrets.token_hex(24)}"


def usage(
    input_tokens: int, output_tokens: int, *, cached: int = 0, cache_write: int = 0, reasoning: int = 0
) -> Json:
    """Token counts in the API's own shape; `reasoning` is part of `output_tokens`, as on the bill."""
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": cache_write},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": input_tokens + output_tokens,
    }


@dataclass(frozen=True)
class Ending:
    """How the model stopped: the response's last status, and the reason or error that goes with it."""

    status: Literal["completed", "incomplete", "failed"] = "completed"
    reason: str | None = None
    code: str | None = None
    message: str | None = None
    error_event: bool = False  # an `error` event goes before `response.failed`

    @property
    def error(self) -> Json | None:
        """The error as a response carries it."""
        return {"code": self.code, "message": self.message} if self.code else None


COMPLETED = Ending()
OUT_OF_TOKENS = Ending("incomplete", reason="max_output_tokens")
FILTERED = Ending("incomplete", reason="content_filter")
FAILED = Ending("failed", code="server_error", message="The server had an error processing your request.")
OUT_OF_QUOTA = Ending(
    "failed", code="insufficient_quota", message="You exceeded your current quota.", error_event=True
)


@dataclass(frozen=True)
class FunctionCall:
    """A call of one of the application's tools; `pieces` are its JSON arguments as they are streamed."""

    name: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One answer: `reasoning` summary, then the text of `pieces`, then `calls`, each a delta per piece.

    `asked`, where a method takes it, is the body of the request: a response repeats its settings.
    """

    pieces: tuple[str, ...] = ("Hello", ", ", "world", "!")
    usage: Mapping[str, Any] | None = field(default_factory=lambda: usage(11, 4))
    reasoning: tuple[str, ...] = ()
    calls: tuple[FunctionCall, ...] = ()
    ending: Ending = COMPLETED
    model: str = MODEL
    id: str = field(default_factory=new_id)
    created_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def text(self) -> str:
        """The whole text, as the application will have assembled it."""
        return "".join(self.pieces)

    def within(self, max_output_tokens: int | None) -> Answer:
        """As much of this answer as fits into so many tokens, billed as that many."""
        counts = self.usage
        if max_output_tokens is None or counts is None or counts["output_tokens"] <= max_output_tokens:
            return self
        reasoning = counts["output_tokens_details"]["reasoning_tokens"]
        # Reasoning comes first and is billed first; what is left of the limit goes to the text.
        left = max(0, max_output_tokens - reasoning) / (counts["output_tokens"] - reasoning)
        return replace(
            self,
            pieces=self.pieces[: int(len(self.pieces) * left)],
            calls=(),
            ending=OUT_OF_TOKENS,
            usage=usage(
                counts["input_tokens"],
                max_output_tokens,
                cached=counts["input_tokens_details"]["cached_tokens"],
                reasoning=min(reasoning, max_output_tokens),
            ),
        )

    def response(self, asked: Mapping[str, Any] | None = None, *, status: str | None = None) -> Json:
        """The response as it ended or, given a `status` on the way there, as it looked then."""
        body = self._shell(asked or {}, status or self.ending.status)
        if status is None:
            body["output"] = [item.done() for item in self._items()]
            body["usage"] = dict(self.usage) if self.usage is not None else None
            body["error"] = self.ending.error
            body["incomplete_details"] = {"reason": self.ending.reason} if self.ending.reason else None
        return body

    def compaction(self) -> Json:
        """What `POST /responses/compact` returns: one item in place of a conversation, and what it cost."""
        item = {"id": new_id("cmp"), "type": "compaction", "encrypted_content": secrets.token_urlsafe(48)}
        return {
            "id": self.id,
            "object": "response.compaction",
            "created_at": self.created_at,
            "output": [item],
            "usage": dict(self.usage) if self.usage is not None else None,
        }

    def events(self, asked: Mapping[str, Any] | None = None) -> list[Json]:
        """Every event of the stream, in order and numbered."""
        obfuscate = ((asked or {}).get("stream_options") or {}).get("include_obfuscation", True)
        events = []
        for number, event in enumerate(self._events(asked or {})):
            numbered = {"type": event.pop("type"), "sequence_number": number, **event}
            if obfuscate and "delta" in numbered:
                # The API pads deltas so that their lengths do not give the text away.
                numbered["obfuscation"] = secrets.token_hex(8)[: -len(numbered["delta"]) % 16]
            events.append(numbered)
        return events

    def _events(self, asked: Mapping[str, Any]) -> Iterator[Json]:
        if asked.get("background"):
            yield {"type": "response.created", "response": self.response(asked, status="queued")}
            yield {"type": "response.queued", "response": self.response(asked, status="queued")}
        else:
            yield {"type": "response.created", "response": self.response(asked, status="in_progress")}
        yield {"type": "response.in_progress", "response": self.response(asked, status="in_progress")}
        for index, item in enumerate(self._items()):
            yield {"type": "response.output_item.added", "output_index": index, "item": item.added()}
            for event in item.events():
                yield {**event, "output_index": index}
            yield {"type": "response.output_item.done", "output_index": index, "item": item.done()}
        if self.ending.error_event:
            error = {"type": self.ending.code, **(self.ending.error or {}), "param": None}
            yield {"type": "error", "error": error}
        yield {"type": f"response.{self.ending.status}", "response": self.response(asked)}

    def _items(self) -> list[_Message | _Reasoning | _Call]:
        body = self.id.partition("_")[2]
        items: list[_Message | _Reasoning | _Call] = []
        if self.reasoning:
            items.append(_Reasoning(f"rs_{body}", self.reasoning, self.ending))
        if self.pieces:
            items.append(_Message(f"msg_{body}", self.pieces, self.ending))
        for number, call in enumerate(self.calls):
            items.append(_Call(f"fc_{body[:-2]}{number:02x}", call.pieces, self.ending, call.name))
        return items

    def _shell(self, asked: Mapping[str, Any], status: str) -> Json:
        text = {"format": {"type": "text"}, "verbosity": "medium", **(asked.get("text") or {})}
        reasoning = {"effort": None, "summary": None, **(asked.get("reasoning") or {})}
        conversation = asked.get("conversation")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "background": bool(asked.get("background")),
            **({"conversation": {"id": conversation}} if isinstance(conversation, str) else {}),
            "error": None,
            "incomplete_details": None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "max_tool_calls": None,
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": asked.get("previous_response_id"),
            "prompt_cache_key": None,
            "reasoning": reasoning,
            "safety_identifier": None,
            "service_tier": "auto" if status in {"queued", "in_progress"} else "default",
            "store": asked.get("store", True),
            "temperature": asked.get("temperature", 1.0),
            "text": text,
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools", []),
            "top_logprobs": 0,
            "top_p": asked.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": asked.get("metadata") or {},
        }


@dataclass(frozen=True)
class _Streamed:
    """One entry of a response's output: what it looks like before and after, and the events between."""

    id: str
    pieces: tuple[str, ...]
    ending: Ending

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def status(self) -> str:
        return "completed" if self.ending.status == "completed" else "incomplete"


class _Message(_Streamed):
    def added(self) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "status": "in_progress",
            "content": [],
            "role": "assistant",
        }

    def done(self) -> Json:
        return {**self.added(), "status": self.status, "content": [_text_part(self.text)]}

    def events(self) -> Iterator[Json]:
        place = {"item_id": self.id, "content_index": 0}
        yield {"type": "response.content_part.added", **place, "part": _text_part("")}
        for piece in self.pieces:
            yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
        # A model that failed half-way never gets to say what the whole text was.
        if self.ending.status != "failed":
            yield {"type": "response.output_text.done", **place, "text": self.text, "logprobs": []}
            yield {"type": "response.content_part.done", **place, "part": _text_part(self.text)}


class _Reasoning(_Streamed):
    def added(self) -> Json:
        return {"id": self.id, "type": "reasoning", "summary": []}

    def done(self) -> Json:
        return {**self.added(), "summary": [_summary_part(self.text)]}

    def events(self) -> Iterator[Json]:
        kind, place = "response.reasoning_summary", {"item_id": self.id, "summary_index": 0}
        yield {"type": f"{kind}_part.added", **place, "part": _summary_part("")}
        for piece in self.pieces:
            yield {"type": f"{kind}_text.delta", **place, "delta": piece}
        yield {"type": f"{kind}_text.done", **place, "text": self.text}
        yield {"type": f"{kind}_part.done", **place, "part": _summary_part(self.text)}


@dataclass(frozen=True)
class _Call(_Streamed):
    name: str

    def added(self) -> Json:
        return {
            "id": self.id,
            "type": "function_call",
            "status": "in_progress",
            "arguments": "",
            "call_id": f"call_{self.id.partition('_')[2]}",
            "name": self.name,
        }

    def done(self) -> Json:
        return {**self.added(), "status": self.status, "arguments": self.text}

    def events(self) -> Iterator[Json]:
        kind = "response.function_call_arguments"
        for piece in self.pieces:
            yield {"type": f"{kind}.delta", "item_id": self.id, "delta": piece}
        yield {"type": f"{kind}.done", "item_id": self.id, "arguments": self.text}


def _text_part(text: str) -> Json:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _summary_part(text: str) -> Json:
    return {"type": "summary_text", "text": text}
