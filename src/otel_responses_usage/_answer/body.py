"""Readers for the body of an answer: an event stream or one JSON document."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from typing import Final, Protocol

from .sse import EventReader
from .state import AnswerState

# A document that arrives in pieces is not kept beyond this size. Its usage is looked up.
_MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024
# Finds the id of a document if only strings, numbers and literals precede it.
_ID_PATTERN: Final = (
    rb'\s*\{(?:\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[^\s"\[\]{},]+)\s*,)*?\s*"id"\s*:\s*"([^"\\]+)"'
)
_ID_SEARCH_BYTES: Final = 4096

_UTF8_BOM: Final = b"\xef\xbb\xbf"
_JSON_WHITE_SPACE: Final = b" \t\r\n"
# `n` is for `null`, and the last three for UTF-16 and UTF-32, which JSON parsers read, too.
_DOCUMENT_STARTS: Final = (b"{", b"[", b"n", b"\0", b"\xfe", b"\xff")


class BodyReader(Protocol):
    """Reads a body in pieces of any size."""

    @property
    def done(self) -> bool:
        """Whether the end marker of the body has been read."""
        ...

    def feed_repeat(self, piece: bytes) -> bool:
        """Read a piece with the fast path, and return true if that was possible.

        After false, `feed` must read the piece.
        """
        ...

    def feed(self, piece: bytes) -> int:
        """Read the next bytes.

        Returns:
            The number of bytes that were read, 0 for all. The caller must feed the remainder later.

        """
        ...

    def copied(self, state: AnswerState) -> BodyReader:
        """Return a copy that adds to the given facts. What it reads does not change this reader."""
        ...


class DocumentReader:
    """Collects one JSON document.

    `finish` parses a complete document. `finish_incomplete` reads only the id.

    Attributes:
        is_null: Whether the complete document is `null`.

    """

    __slots__ = ("_is_too_large", "_pieces", "_size", "_state", "done", "is_null")

    def __init__(self, state: AnswerState) -> None:
        self._state = state
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_too_large = False
        self.done = False
        self.is_null = False

    def feed_repeat(self, piece: bytes) -> bool:  # noqa: ARG002
        """Return false: a document has no fast path."""
        return False

    def feed(self, piece: bytes) -> int:
        """Collect the next bytes of the document."""
        self._size += len(piece)
        # A document that arrives in one piece is in memory already.
        if self._pieces and self._size > _MAX_DOCUMENT_BYTES:
            self._pieces = [self._first_bytes()]
            self._is_too_large = True
        else:
            self._pieces.append(piece)
        return 0

    def copied(self, state: AnswerState) -> DocumentReader:
        """Return a copy that adds to the given facts."""
        duplicate = copy.copy(self)
        duplicate._state = state  # noqa: SLF001  # of this class
        duplicate._pieces = self._pieces.copy()  # noqa: SLF001
        return duplicate

    def finish(self) -> None:
        """Parse the complete document.

        If it is too large or not a JSON object, only its id is read.
        """
        document: object = ()
        if not self._is_too_large:
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(b"".join(self._pieces))
        if isinstance(document, dict):
            self._pieces.clear()
            self._state.on_document(document)
        else:
            self.is_null = self.is_null or document is None
            self._state.on_partial_document(self._find_id(), is_complete=self._is_too_large)

    def finish_incomplete(self) -> None:
        """Read the id of a document that broke off."""
        self._state.on_partial_document(self._find_id(), is_complete=False)

    def _find_id(self) -> str | None:
        match = re.match(_ID_PATTERN, self._first_bytes())  # compiled on first use, which is rare
        self._pieces.clear()
        return match[1].decode("utf-8", "replace") if match else None

    def _first_bytes(self) -> bytes:
        first_bytes = b""
        for piece in self._pieces:
            first_bytes += piece[:_ID_SEARCH_BYTES]
            if len(first_bytes) >= _ID_SEARCH_BYTES:
                break
        return first_bytes


def without_blank_start(first_bytes: bytes) -> bytes:
    """Return the bytes without leading white space and byte order marks.

    Servers send white space to keep a connection open until the document is ready.
    """
    length = 0
    while len(first_bytes) != length:
        length = len(first_bytes)
        first_bytes = first_bytes.lstrip(_JSON_WHITE_SPACE).removeprefix(_UTF8_BOM)
    return first_bytes


def body_reader(first_bytes: bytes, state: AnswerState) -> BodyReader | None:
    """Return the reader for a body that starts with these bytes, or `None` if they do not decide it yet.

    The content type is ignored: servers send JSON as text, and the SDK parses it all the same.

    Args:
        first_bytes: The result of `without_blank_start`.
        state: Receives the facts.

    """
    if _UTF8_BOM.startswith(first_bytes):
        return None  # nothing, or the first bytes of a byte order mark
    return DocumentReader(state) if first_bytes.startswith(_DOCUMENT_STARTS) else EventReader(state)
