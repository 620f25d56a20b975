"""What the tools of one response did: those that the server runs, and those that the application runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .usage import MAX_COUNT, reported_count

# Calls that the application itself has to run.
_APPLICATION_CALLS: Final = frozenset(
    {
        "apply_patch_call",
        "computer_call",
        "custom_tool_call",
        "function_call",
        "local_shell_call",
    }
)
_CALL: Final = "_call"
_COMPACTION: Final = "compaction"
_COMPACTED_CONVERSATION: Final = "response.compaction"

# Bounds of what a server can make us keep and write.
_MAX_TYPE_LENGTH: Final = 64
_MAX_TYPES: Final = 16
_OTHER_TYPE: Final = "other"


class ToolUsage(NamedTuple):
    """The use of hosted tools in one response, as the API reported it.

    A count that the API did not report is `None`. A reported zero stays zero.

    Attributes:
        calls: The types of output items that hosted tools made, each with the number of items.
        web_search_requests: Web searches that are billed.
        image_input_tokens: Input tokens of image generation. They are not part of the usage of the response.
        image_output_tokens: Output tokens of image generation.

    """

    calls: tuple[tuple[str, int], ...] = ()
    web_search_requests: int | None = None
    image_input_tokens: int | None = None
    image_output_tokens: int | None = None

    def without(self, counted: ToolUsage) -> ToolUsage:
        """Return the use beyond that of an earlier state of the same response."""
        before = dict(counted.calls)
        more = ((kind, count - before.get(kind, 0)) for kind, count in self.calls)
        return ToolUsage(
            tuple((kind, count) for kind, count in more if count > 0),
            _difference(self.web_search_requests, counted.web_search_requests),
            _difference(self.image_input_tokens, counted.image_input_tokens),
            _difference(self.image_output_tokens, counted.image_output_tokens),
        )


class OutputFacts(NamedTuple):
    """The facts in the output and in the tool usage of a response.

    Attributes:
        tools: The use of hosted tools; `None` if there was none and the API reports none.
        calls_application: Whether the application has to run a tool.
        is_compacted: Whether the output has a compaction of the conversation.

    """

    tools: ToolUsage | None = None
    calls_application: bool = False
    is_compacted: bool = False

    @classmethod
    def from_response(cls, response: Mapping[str, Any]) -> OutputFacts:
        """Return the facts of a decoded response object."""
        calls: dict[str, int] = {}
        calls_application = is_compacted = False
        reported = response.get("tool_usage")
        images = reported.get("image_gen") if isinstance(reported, dict) else None
        searches = reported.get("web_search") if isinstance(reported, dict) else None
        inputs, outputs = reported_count(images, "input_tokens"), reported_count(images, "output_tokens")
        output = response.get("output")
        for item in output if isinstance(output, list) else ():
            kind = item.get("type") if isinstance(item, dict) else None
            if not isinstance(kind, str):
                continue
            if not kind.endswith(_CALL):
                is_compacted = is_compacted or kind == _COMPACTION
            elif _is_hosted(kind, item):
                kind = _bounded(kind, calls)
                calls[kind] = calls.get(kind, 0) + 1
                # Images in SVG are made by a model of their own, whose tokens are in the item only.
                svg = item.get("svg_usage")
                if isinstance(svg, dict):
                    inputs = _sum(inputs, reported_count(svg, "input_tokens"))
                    outputs = _sum(outputs, reported_count(svg, "output_tokens"))
            else:
                calls_application = True
        tools = ToolUsage(tuple(calls.items()), reported_count(searches, "num_requests"), inputs, outputs)
        if response.get("object") == _COMPACTED_CONVERSATION:
            tools = _NOTHING  # earlier calls made these items
        return cls(tools if tools != _NOTHING else None, calls_application, is_compacted)


_NOTHING: Final = ToolUsage()


def _is_hosted(kind: str, item: Mapping[str, Any]) -> bool:
    """Whether the server has run this call. A type that is not known here is one of a hosted tool."""
    if kind == "shell_call":
        environment = item.get("environment")
        return isinstance(environment, dict) and environment.get("type") != "local"
    if kind == "tool_search_call":
        return item.get("execution") != "client"
    return kind not in _APPLICATION_CALLS


def _bounded(kind: str, calls: Mapping[str, int]) -> str:
    if kind in calls:
        return kind
    is_name = kind.isascii() and kind.isidentifier() and len(kind) <= _MAX_TYPE_LENGTH
    return kind if is_name and len(calls) < _MAX_TYPES else _OTHER_TYPE


def _difference(count: int | None, counted: int | None) -> int | None:
    return None if count is None else max(0, count - (counted or 0))


def _sum(count: int | None, more: int | None) -> int | None:
    return more if count is None else min(count + (more or 0), MAX_COUNT)
