"""Reads the part of a body that has arrived but is still in the buffer of the HTTP library.

A server often sends the last delta and the terminal event together. If the application closes the stream
after the last delta, the terminal event with the usage is in this buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

# Attributes that lead from the HTTP library's stream to its parser. None of them is public.
_PARSER_ATTRIBUTES: Final = ("_h11_state", "_connection", "_httpcore_stream", "_stream")
_MAX_DEPTH: Final = 8

# The buffer is parsed only if it contains one of these.
_TERMINAL_SIGNS: Final = (b"response.completed", b"response.incomplete", b"response.failed", b'"usage"')


def buffered_pieces(stream: Any) -> Iterator[bytes]:
    """Yield the pieces of the body that can be read without the network.

    A copy of the parser reads them, so the connection does not change.
    """
    parser = _parser(stream)
    unread = bytes(parser.trailing_data[0]) if parser is not None else b""
    if any(sign in unread for sign in _TERMINAL_SIGNS):
        parser_copy = copy.deepcopy(parser)
        while True:
            event = parser_copy.next_event()
            data = getattr(event, "data", None)
            if data is None:  # the end of the body or of the buffer
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
