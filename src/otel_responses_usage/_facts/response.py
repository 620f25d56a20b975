"""The facts in a response object of the API, without its content."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .tools import OutputFacts, ToolUsage
from .usage import Usage

_RUNNING_STATUSES: Final = frozenset({"queued", "in_progress"})
TERMINAL_STATUSES: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})

# Why the prompt cache was not used, in the words of the API.
_CACHE_MISS_REASONS: Final = frozenset(
    {
        "context_compacted",
        "input_changed",
        "model_changed",
        "prompt_cache_key_changed",
        "reasoning_effort_changed",
        "service_tier_changed",
        "text_format_changed",
        "tools_changed",
        "verbosity_changed",
    }
)
_OTHER_REASON: Final = "other"

_MAX_TEXT_LENGTH: Final = 128


class Response(NamedTuple):
    """The facts of a response object. A field that the API left out is `None`."""

    id: str | None = None
    model: str | None = None
    status: str | None = None
    service_tier: str | None = None
    usage: Usage | None = None
    incomplete_reason: str | None = None
    error_code: str | None = None
    calls_tools: bool = False
    is_background: bool = False
    is_not_stored: bool = False
    tools: ToolUsage | None = None
    is_compacted: bool = False
    cache_miss_reason: str | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether the status is final: the API does not change this response any more."""
        return self.status in TERMINAL_STATUSES

    @property
    def is_running(self) -> bool:
        """Whether the server still works on this response."""
        return self.status in _RUNNING_STATUSES

    @property
    def has_ended(self) -> bool:
        """Whether the response is final: by its status, or because it has usage and does not run.

        Some servers omit the status or send a status of their own.
        """
        return self.is_terminal or (self.usage is not None and not self.is_running)

    @classmethod
    def from_json(cls, response: Mapping[str, Any]) -> Response:
        """Return the facts of a decoded response object. A field of a wrong type counts as left out."""
        details, output = response.get("incomplete_details"), OutputFacts.from_response(response)
        return cls(
            id=_id(response.get("id")),
            model=_short_text(response.get("model")),
            status=_short_text(response.get("status")),
            service_tier=_short_text(response.get("service_tier")),
            usage=Usage.from_response(response),
            incomplete_reason=_short_text(details.get("reason")) if isinstance(details, dict) else None,
            error_code=error_code(response.get("error")),
            calls_tools=output.calls_application,
            is_background=response.get("background") is True,
            # Organisations without data retention get `false` here, whatever the request says.
            is_not_stored=response.get("store") is False,
            tools=output.tools,
            is_compacted=output.is_compacted,
            cache_miss_reason=_cache_miss_reason(response.get("prompt_cache_diagnostics")),
        )

    def without_usage(self) -> Response:
        """Return a copy without usage, also that of tools.

        The counts of a running response are not final.
        """
        has_usage = self.usage is not None or self.tools is not None
        return self._replace(usage=None, tools=None) if has_usage else self

    def merged_with(self, newer: Response) -> Response:
        """Return the newer facts of the same response. A field that is missing there keeps its old value."""
        return Response._make(new or old for new, old in zip(newer, self, strict=True))


def is_response_object(document: Mapping[str, Any]) -> bool:
    """Return whether a decoded JSON object is a response, and not an error, a list or another object."""
    kind = document.get("object")
    if kind is not None:
        return bool(kind == "response")
    # Some servers leave out the kind.
    return isinstance(document.get("id"), str) and bool(document.keys() & {"status", "usage", "output"})


def _cache_miss_reason(diagnostics: object) -> str | None:
    if not isinstance(diagnostics, dict) or diagnostics.get("type") != "cache_miss":
        return None
    reason = diagnostics.get("reason")
    return reason if isinstance(reason, str) and reason in _CACHE_MISS_REASONS else _OTHER_REASON


def error_code(error: object) -> str | None:
    """Return the `code` of an error object of the API, or else its `type`, or `None` if it has neither."""
    if not isinstance(error, dict):
        return None
    for name in ("code", "type"):
        value = error.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        # The type `error` is that of the event. It does not describe the error.
        if isinstance(value, str) and value and value != "error":
            return utf8_safe(value[:_MAX_TEXT_LENGTH])
    return None


def utf8_safe(text: str) -> str:
    """Return the text with lone surrogates replaced, so that it can be encoded as UTF-8.

    JSON escapes can contain lone surrogates.
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _id(value: object) -> str | None:
    return utf8_safe(value) if isinstance(value, str) and value else None


def _short_text(value: object) -> str | None:
    return _interned(value[:_MAX_TEXT_LENGTH]) if isinstance(value, str) and value else None


@functools.lru_cache(maxsize=128)  # open streams share one copy of each text
def _interned(text: str) -> str:
    return utf8_safe(text)
