"""What one response object of the API says about itself, without its content."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .usage import Usage

_RUNNING_STATUSES: Final = frozenset({"queued", "in_progress"})
TERMINAL_STATUSES: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})

# Output items that ask the application to act; calls that the service runs itself are not among them.
_TOOL_CALL_ITEMS: Final = frozenset(
    {
        "apply_patch_call",
        "computer_call",
        "custom_tool_call",
        "function_call",
        "local_shell_call",
        "shell_call",
    }
)

_MAX_TEXT_LENGTH: Final = 128


class Response(NamedTuple):
    """The facts of a response object. What the API left out is `None`."""

    id: str | None = None
    model: str | None = None
    status: str | None = None
    service_tier: str | None = None
    usage: Usage | None = None
    incomplete_reason: str | None = None
    error_code: str | None = None
    calls_tools: bool = False

    @property
    def is_terminal(self) -> bool:
        """Whether the API will not change this response any more."""
        return self.status in TERMINAL_STATUSES

    @property
    def is_running(self) -> bool:
        """Whether the API says that it is still at work on this response."""
        return self.status in _RUNNING_STATUSES

    @classmethod
    def from_json(cls, response: Mapping[str, Any]) -> Response:
        """Read a decoded response object; fields of an unexpected type count as left out."""
        output, details = response.get("output"), response.get("incomplete_details")
        return cls(
            id=_id(response.get("id")),
            model=_short_text(response.get("model")),
            status=_short_text(response.get("status")),
            service_tier=_short_text(response.get("service_tier")),
            usage=Usage.from_response(response),
            incomplete_reason=_short_text(details.get("reason")) if isinstance(details, dict) else None,
            error_code=error_code(response.get("error")),
            calls_tools=isinstance(output, list)
            and any(isinstance(item, dict) and item.get("type") in _TOOL_CALL_ITEMS for item in output),
        )

    def without_usage(self) -> Response:
        """Return the same without counts: those of a response under way are not those of its bill."""
        return self._replace(usage=None) if self.usage is not None else self

    def merged_with(self, newer: Response) -> Response:
        """Combine with a later sight of the same response: what it left out is kept from before."""
        return Response._make(new or old for new, old in zip(newer, self, strict=True))


def error_code(error: object) -> str | None:
    """Return the code of an error object of the API, else its type; `None` where it names neither."""
    if not isinstance(error, dict):
        return None
    for name in ("code", "type"):
        value = error.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        # `error` is the type of the event that carries the error and says nothing about it.
        if isinstance(value, str) and value and value != "error":
            return utf8_safe(value[:_MAX_TEXT_LENGTH])
    return None


def utf8_safe(text: str) -> str:
    """Return a text that can be written as UTF-8: JSON can smuggle in halves of characters that cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _id(value: object) -> str | None:
    return utf8_safe(value) if isinstance(value, str) and value else None


def _short_text(value: object) -> str | None:
    return _interned(value[:_MAX_TEXT_LENGTH]) if isinstance(value, str) and value else None


@functools.lru_cache(maxsize=128)  # open streams hold the same few words; let it be the same objects
def _interned(text: str) -> str:
    return utf8_safe(text)
