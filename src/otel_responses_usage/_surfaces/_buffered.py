"""What has arrived of a body when it is closed, but lies unread in the HTTP library's buffer.

A server often sends the last delta and the terminal event in one go. An application that closes at the
last delta leaves the terminal event, with the usage, behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

# From the library's stream down to the parser that it reads through; none of it is public.
_PARSER_ATTRIBUTES: Final = ("_h11_state", "_connection", "_httpcore_stream", "_stream")
_MAX_DEPTH: Final = 8

# Without one of these there is nothing to find, and a buffer full of deltas is not worth parsing.
_TERMINAL_TYPES: Final = (b"response.completed", b"response.incomplete", b"response.failed")


def buffered_pieces(stream: Any) -> Iterator[bytes]:
    """Give the pieces that could be read without asking the network.

    A copy of the parser is asked, so nothing changes for the connection.
    """
    parser = _parser(stream)
    unread = bytes(parser.trailing_data[0]) if parser is not None else b""
    if any(event_type in unread for event_type in _TERMINAL_TYPES):
        parser_copy = copy.deepcopy(parser)
        while True:
            event = parser_copy.next_event()
            data = getattr(event, "data", None)
            if data is None:  # the end of the body, or of what has arrived
                return
            yield bytes(data)


def _parser(stream: Any) -> Any:
    for _ in range(_MAX_DEPTH):
        attributes = vars(stream) if hasattr(stream, "__dict__") else {}
        name = next((name for name in _PARSER_ATTRIBUTES if attributes.get(name) is not None), None)
        if name is None:
            return None
        if name == "_h11_state":
            return attributes[name]
        stream = attributes[name]
    return None
