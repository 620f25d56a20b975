"""The part of a body that the application has not read when it closes the stream.

A server often sends the last delta and the terminal event together. If the application closes the stream
after the last delta, the terminal event with the usage is in a buffer of the HTTP library, or the kernel
has received it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

from .. import _fault
from ._wire import Wire, wire_of

# Attributes that lead from the HTTP library's stream to its parser. None of them is public.
_PARSER_ATTRIBUTES: Final = (
    "_h11_state",
    "_h2_state",
    "_aiohttp_response",
    "_connection",
    "_httpcore_stream",
    "_stream",
)
_MAX_DEPTH: Final = 8

# The bytes are parsed only if they contain one of these.
_END_MARKS: Final = (b"response.completed", b"response.incomplete", b"response.failed", b'"usage"')


class UnreadBody:
    """The unread part of the body of one response.

    Reading it changes nothing for the HTTP library: a copy of its parser reads.

    Attributes:
        ended: Whether nothing more can arrive.
        can_continue: Whether `keep` may succeed.

    """

    ended = False
    can_continue = False

    def read(self, *, any_content: bool) -> Iterator[bytes]:  # noqa: ARG002
        """Yield the pieces of the body that have arrived. Never waits.

        Args:
            any_content: Whether to yield pieces that cannot contain a terminal event, too.

        """
        return iter(())

    def keep(self) -> bool:
        """Keep the connection open after the HTTP library has closed it; return whether that succeeded."""
        return False

    def close(self) -> None:
        """Close the connection if it was kept."""


class _BufferedBody(UnreadBody):
    """A body whose unread pieces are in a buffer of the HTTP library."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def read(self, *, any_content: bool) -> Iterator[bytes]:  # noqa: ARG002
        pieces, self._pieces = self._pieces, []
        return iter(pieces)


class _Http11Body(UnreadBody):
    """A body over HTTP/1.1. Its connection serves no other request."""

    def __init__(self, parser: Any, wire: Wire | None) -> None:
        self._parser = parser
        self._is_copied = False
        self._wire = wire
        self.can_continue = wire is not None
        self._received = b""

    def read(self, *, any_content: bool) -> Iterator[bytes]:
        if self._wire is not None and not self.ended:
            self._received += self._wire.read()
            self.ended = self._wire.ended
        unread = self._received if self._is_copied else bytes(self._parser.trailing_data[0]) + self._received
        if not unread or not (any_content or any(mark in unread for mark in _END_MARKS)):
            return
        self._copy_parser()
        if self._received:
            self._parser.receive_data(self._received)
            self._received = b""
        while True:
            try:
                event = self._parser.next_event()
            except Exception:  # not HTTP any more
                self.ended = True
                return
            data = getattr(event, "data", None)
            if data is not None:
                yield bytes(data)
            else:
                # Either the parser needs more bytes, or the body is complete.
                self.ended = self.ended or getattr(event, "__name__", "") != "NEED_DATA"
                return

    def keep(self) -> bool:
        if self._wire is None or self.ended:
            return False
        try:
            self._copy_parser()
            self._wire.keep()
        except Exception:  # no file descriptor is left
            return False
        return True

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()

    def _copy_parser(self) -> None:
        if not self._is_copied:
            self._parser = _copy_of(self._parser)
            self._is_copied = True


def _copy_of(parser: Any) -> Any:
    """Return a copy of a parser that shares no mutable state with it.

    `copy.deepcopy` takes five times as long.
    """
    duplicate = copy.copy(parser)
    for name, part in vars(parser).items():
        if hasattr(part, "__dict__") and not isinstance(part, type):
            part_copy = copy.copy(part)
            for inner_name, inner in vars(part).items():
                if isinstance(inner, (bytearray, dict, set)):
                    setattr(part_copy, inner_name, copy.copy(inner))
            setattr(duplicate, name, part_copy)
    return duplicate


def unread_body(stream: Any) -> UnreadBody:
    """Return the unread part of the body that this stream of the HTTP library provides."""
    return _find_body(stream) or UnreadBody()


@_fault.catch_and_report("looking at what had arrived")
def _find_body(stream: Any) -> UnreadBody | None:
    for _ in range(_MAX_DEPTH):
        attributes = vars(stream) if hasattr(stream, "__dict__") else {}
        name = next((name for name in _PARSER_ATTRIBUTES if attributes.get(name) is not None), None)
        if name == "_h11_state":
            network_stream = attributes.get("_network_stream")
            return _Http11Body(attributes[name], None if network_stream is None else wire_of(network_stream))
        if name == "_aiohttp_response":
            return _BufferedBody(_aiohttp_pieces(attributes[name].content))
        if name is None or name == "_h2_state":
            break
        if "_stream_id" in attributes and hasattr(attributes[name], "_events"):
            return _BufferedBody(_http2_pieces(attributes[name], attributes["_stream_id"]))
        stream = attributes[name]
    return None


def _http2_pieces(connection: Any, stream_id: int) -> list[bytes]:
    """Return the data of one stream. Other streams use the same connection, so it is not read further."""
    events = list(connection._events.get(stream_id, ()))  # noqa: SLF001
    return [bytes(event.data) for event in events if getattr(event, "data", None)]


def _aiohttp_pieces(content: Any) -> list[bytes]:
    """Return the data that `aiohttp` has received and the HTTP library has not taken."""
    pieces = [bytes(piece) for piece in content._buffer]  # noqa: SLF001
    if pieces:
        pieces[0] = pieces[0][content._buffer_offset :]  # noqa: SLF001
    return pieces
