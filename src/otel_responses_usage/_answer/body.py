"""The body of an answer: an event stream, or one JSON document."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Final, Protocol

from .sse import EventReader
from .state import AnswerState

# An answer that comes in pieces is not collected beyond this size; its usage is looked up.
_LARGEST_DOCUMENT: Final = 16 * 1024 * 1024
# The id of a document, with nothing but simple members before it.
_LEADING_ID: Final = (
    rb'\s*\{(?:\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[^\s"\[\]{},]+)\s*,)*?\s*"id"\s*:\s*"([^"\\]+)"'
)
_LONGEST_LEAD: Final = 4096


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
    """Collects one JSON document: `finish` reads it, `give_up` what is there of it."""

    __slots__ = ("_is_too_large", "_pieces", "_size", "_state", "done")

    def __init__(self, state: AnswerState) -> None:
        self._state = state
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_too_large = False
        self.done = False

    def repeats(self, piece: bytes) -> bool:  # noqa: ARG002
        """No piece of a document is like the one before."""
        return False

    def feed(self, piece: bytes) -> int:
        """Take the next bytes of the document."""
        self._size += len(piece)
        # One that comes whole is in memory anyway.
        if self._pieces and self._size > _LARGEST_DOCUMENT:
            self._pieces = [self._beginning()]
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
            self._state.on_body(document)
        else:
            self._state.on_beginning(self._leading_id(), is_whole=self._is_too_large)

    def give_up(self) -> None:
        """Read the id of a document of which no more will come."""
        self._state.on_beginning(self._leading_id(), is_whole=False)

    def _leading_id(self) -> str | None:
        lead = re.match(_LEADING_ID, self._beginning())  # compiled if there is ever need
        self._pieces.clear()
        return lead[1].decode("utf-8", "replace") if lead else None

    def _beginning(self) -> bytes:
        beginning = b""
        for piece in self._pieces:
            beginning += piece[:_LONGEST_LEAD]
            if len(beginning) >= _LONGEST_LEAD:
                break
        return beginning


def body_reader(beginning: bytes, state: AnswerState) -> BodyReader:
    """Return the reader for a body that begins like this.

    What the server calls it does not matter: the SDK, too, reads JSON that calls itself text.
    """
    return DocumentReader(state) if beginning.lstrip().startswith((b"{", b"[")) else EventReader(state)
