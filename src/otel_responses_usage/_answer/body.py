"""The body of an answer: an event stream, or one JSON document."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Final, Protocol

from .sse import EventReader
from .state import AnswerState

# An answer that comes in pieces is not collected beyond this size; its usage is looked up.
_MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024
# The id of a document, with nothing but simple members before it.
_ID_PATTERN: Final = (
    rb'\s*\{(?:\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[^\s"\[\]{},]+)\s*,)*?\s*"id"\s*:\s*"([^"\\]+)"'
)
_ID_SEARCH_BYTES: Final = 4096


class BodyReader(Protocol):
    """Reads a body in whatever pieces it arrives."""

    @property
    def done(self) -> bool:
        """Whether the body has said that nothing follows."""
        ...

    def feed_repeat(self, piece: bytes) -> bool:
        """Take a piece if that can be done in passing, and say whether it was taken."""
        ...

    def feed(self, piece: bytes) -> int:
        """Take the next bytes, and say how many of them, 0 for all; the rest is to be fed later."""
        ...


class DocumentReader:
    """Collects one JSON document: `finish` reads it, `finish_incomplete` what is there of it."""

    __slots__ = ("_is_too_large", "_pieces", "_size", "_state", "done")

    def __init__(self, state: AnswerState) -> None:
        self._state = state
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_too_large = False
        self.done = False

    def feed_repeat(self, piece: bytes) -> bool:  # noqa: ARG002
        """No piece of a document is like the one before."""
        return False

    def feed(self, piece: bytes) -> int:
        """Take the next bytes of the document."""
        self._size += len(piece)
        # One that comes whole is in memory anyway.
        if self._pieces and self._size > _MAX_DOCUMENT_BYTES:
            self._pieces = [self._first_bytes()]
            self._is_too_large = True
        else:
            self._pieces.append(piece)
        return 0

    def finish(self) -> None:
        """Read the document, which is whole; of one that is no JSON object only the id can be known."""
        document = None
        if not self._is_too_large:
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(b"".join(self._pieces))
        if isinstance(document, dict):
            self._pieces.clear()
            self._state.on_document(document)
        else:
            self._state.on_partial_document(self._find_id(), is_complete=self._is_too_large)

    def finish_incomplete(self) -> None:
        """Read the id of a document of which no more will come."""
        self._state.on_partial_document(self._find_id(), is_complete=False)

    def _find_id(self) -> str | None:
        match = re.match(_ID_PATTERN, self._first_bytes())  # compiled if there is ever need
        self._pieces.clear()
        return match[1].decode("utf-8", "replace") if match else None

    def _first_bytes(self) -> bytes:
        first_bytes = b""
        for piece in self._pieces:
            first_bytes += piece[:_ID_SEARCH_BYTES]
            if len(first_bytes) >= _ID_SEARCH_BYTES:
                break
        return first_bytes


def body_reader(first_bytes: bytes, state: AnswerState) -> BodyReader:
    """Return the reader for a body that begins like this.

    What the server calls it does not matter: the SDK, too, reads JSON that calls itself text.
    """
    return DocumentReader(state) if first_bytes.lstrip().startswith((b"{", b"[")) else EventReader(state)
