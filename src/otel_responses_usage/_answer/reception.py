"""Reads one answer while it arrives, and collects its facts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from .. import _fault
from .._facts.outcome import Ending, Outcome
from .body import BodyReader, DocumentReader, body_reader, without_blank_start
from .message import MessageReader
from .state import AnswerState


class Reception:
    """Reads the pieces of one answer in the order in which they arrive.

    The transport decides the size of a piece. A piece of an HTTP body is any number of bytes. A transport
    with whole events passes its own kind of reader to the constructor. No method raises.

    Attributes:
        state: The facts that have been read so far.
        read_fast: A fast path that can read most pieces. It returns false for any other piece, which must
            then be passed to `read`.

    """

    __slots__ = ("_first_bytes", "_is_reading", "_reader", "_remainder", "read_fast", "state")

    def __init__(self, make_reader: Callable[[AnswerState], BodyReader] | None = None) -> None:
        self.state = AnswerState()
        reader = None if make_reader is None else make_reader(self.state)
        self.read_fast = read_nothing if reader is None else reader.feed_repeat
        self._reader = reader  # `None` until the first bytes decide the type of the body
        self._first_bytes = b""  # the first bytes of a byte order mark
        self._is_reading = True
        self._remainder = b""  # bytes that have arrived before the application asked for them

    @property
    def ending(self) -> Ending | None:
        """How the response ended; `None` before its terminal event or complete document."""
        return self.state.ending

    @property
    def stream_error(self) -> Ending | None:
        """The ending for an error event; `None` if there was no such event."""
        code = self.state.stream_error
        return None if code is None else Ending(Outcome.ERROR, code)

    @property
    def is_empty(self) -> bool:
        """Whether the whole answer is white space, or the JSON document `null`."""
        reader = self._reader
        return reader.is_null if isinstance(reader, DocumentReader) else reader is None

    @property
    def is_done(self) -> bool:
        """Whether the end marker of the answer has been read."""
        return self._reader is not None and self._reader.done

    def read_fast_of(self, end: bytes) -> Callable[[bytes], bool]:
        """Return a `read_fast` for an answer in whole messages. It reads only messages with this end."""
        reader = self._reader
        if not self._is_reading or not isinstance(reader, MessageReader):
            return read_nothing
        return reader.feed_repeat_of(end)

    def read(self, piece: bytes) -> int:
        """Read the next piece.

        Returns:
            The number of bytes that were read, 0 for all. `take_remainder` returns the other bytes. See
            `EventReader.feed`.

        """
        if not self._is_reading:
            return 0
        try:
            if self._reader is not None:
                consumed = self._reader.feed(piece)
            else:
                consumed = self._feed_first(piece)
                if self._reader is not None:
                    self.read_fast = self._reader.feed_repeat
        except Exception:
            _fault.report("reading a stream")
            self.stop()  # the usage is looked up instead
            return 0
        self._remainder = piece[consumed:] if consumed else b""
        return consumed

    def take_remainder(self) -> bytes:
        """Return the bytes of the last piece that have not been read, and forget them."""
        remainder, self._remainder = self._remainder, b""
        return remainder

    def stop(self) -> None:
        """Ignore all further pieces, except those of `read_tail`."""
        self._is_reading = False
        self.read_fast = read_nothing

    def stop_timing(self) -> None:
        """Record no times of events: the whole body is there."""
        self.state.stop_timing()

    def finish_document(self) -> None:
        """Parse a JSON document that is complete. Does nothing for an event stream."""
        if isinstance(self._reader, DocumentReader):
            self._reader.finish()

    def contains_end(self, pieces: Sequence[bytes]) -> bool:
        """Whether the response would end with these pieces. A copy reads them."""
        if not pieces:
            return False
        # `copy.deepcopy` takes twenty times as long.
        duplicate = copy.copy(self)
        duplicate.state = self.state.copied()
        if self._reader is not None:
            duplicate._reader = self._reader.copied(duplicate.state)  # noqa: SLF001  # of this class
        return duplicate.read_all(pieces)

    def begin_tail(self) -> None:
        """Stop counting events: the call has ended, and all further pieces are its tail."""
        self.state.stop_counting()

    def read_tail(self, piece: bytes) -> bool:
        """Read a piece of the tail, and return whether the tail can stop."""
        try:
            return self.read_all((piece,))
        except Exception:
            _fault.report("reading on")
            return True

    def release(self) -> None:
        """Release the reader after the last piece, and count no more events.

        The id of an incomplete document is read first. The application may read on, with a `read_fast` that
        it was given before.
        """
        if isinstance(self._reader, DocumentReader):
            self._reader.finish_incomplete()
        self.state.stop_counting()
        self._reader = None
        self._remainder = b""

    def read_all(self, pieces: Iterable[bytes]) -> bool:
        """Read complete pieces, and return whether the response has ended."""
        for piece in pieces:
            consumed = self._feed(piece)
            while consumed:
                piece = piece[consumed:]
                consumed = self._feed(piece)
        return self.state.ending is not None

    def _feed(self, piece: bytes) -> int:
        return self._feed_first(piece) if self._reader is None else self._reader.feed(piece)

    def _feed_first(self, piece: bytes) -> int:
        """Read a piece at the start of the body. The first byte with content decides the reader."""
        content = without_blank_start(self._first_bytes + piece)
        self._reader = body_reader(content, self.state)
        if self._reader is None:
            self._first_bytes = content
            return 0
        consumed = self._reader.feed(content)
        return consumed and consumed + len(piece) - len(content)


def read_nothing(_: bytes) -> bool:
    """Return false. Used as the fast path of an answer that has none."""
    return False
