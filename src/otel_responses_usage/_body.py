"""The body of an answer: an event stream, or one JSON document."""

from __future__ import annotations

import json
from typing import Final, Protocol

from ._sse import EventReader
from ._state import AnswerState

# An answer beyond this size is not decoded here; its usage is looked up.
_LARGEST_DOCUMENT: Final = 16 * 1024 * 1024


class BodyReader(Protocol):
    """Reads a body in whatever pieces it arrives."""

    @property
    def done(self) -> bool:
        """Whether the body has said that nothing follows."""
        ...

    def repeats(self, piece: bytes) -> bool:
        """Take a piece if that can be done in passing, and say whether it was taken."""
        ...

    def feed(self, piece: bytes) -> int:
        """Take the next bytes, and say how many of them, 0 for all; the rest is to be fed later."""
        ...


class DocumentReader:
    """Collects one JSON document; `finish` reads it."""

    __slots__ = ("_pieces", "_size", "_state", "done")

    def __init__(self, state: AnswerState) -> None:
        self._state = state
        self._pieces: list[bytes] = []
        self._size = 0
        self.done = False

    def repeats(self, piece: bytes) -> bool:  # noqa: ARG002
        """No piece of a document is like the one before."""
        return False

    def feed(self, piece: bytes) -> int:
        """Take the next bytes of the document."""
        self._size += len(piece)
        if self._size > _LARGEST_DOCUMENT:
            self._pieces.clear()
        else:
            self._pieces.append(piece)
        return 0

    def finish(self) -> None:
        """Read the document; one that is no JSON object says nothing."""
        try:
            document = json.loads(b"".join(self._pieces))
        except (ValueError, RecursionError):
            document = None
        self._pieces.clear()
        if isinstance(document, dict):
            self._state.on_body(document)


def body_reader(beginning: bytes, state: AnswerState) -> BodyReader:
    """Return the reader for a body that begins like this.

    What the server calls it does not matter: the SDK, too, reads JSON that calls itself text.
    """
    return DocumentReader(state) if beginning.lstrip().startswith((b"{", b"[")) else EventReader(state)
