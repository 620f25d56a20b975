"""One answer while it arrives: its pieces are read into facts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from .. import _fault
from .._facts.outcome import Ending, Outcome
from .body import BodyReader, DocumentReader, body_reader
from .state import AnswerState


class Reception:
    """Reads the pieces of one answer in the order in which they arrive.

    A piece is what the transport delivers at once. Of an HTTP body it is any number of bytes; a transport
    that delivers whole events gives the reader for them to the constructor. Nothing here raises.

    Attributes:
        state: The facts that have been read so far.
        read_fast: A fast path for most pieces: takes a piece and returns true, or returns false. A piece that
            it did not take goes to `read`.

    """

    __slots__ = ("_is_reading", "_reader", "_remainder", "read_fast", "state")

    def __init__(self, reader: BodyReader | None = None) -> None:
        self.state = AnswerState()
        self.read_fast = read_nothing if reader is None else reader.feed_repeat
        self._reader = reader  # `None`: chosen by the first bytes
        self._is_reading = True
        self._remainder = b""  # has arrived, but the application has not asked for it

    @property
    def ending(self) -> Ending | None:
        """How the response ended, once its terminal event or its whole body has been read."""
        return self.state.ending

    @property
    def stream_error(self) -> Ending | None:
        """The error that an event has told of; `None` if there was none."""
        code = self.state.stream_error
        return None if code is None else Ending(Outcome.ERROR, code)

    @property
    def is_done(self) -> bool:
        """Whether the answer has said that nothing follows."""
        return self._reader is not None and self._reader.done

    def read(self, piece: bytes) -> int:
        """Read the next piece.

        Returns:
            How many of its bytes were read, 0 for all. The others are held until `take_remainder`; see
            `EventReader.feed`.

        """
        if not self._is_reading:
            return 0
        try:
            if self._reader is None:
                self._reader = body_reader(piece, self.state)
                self.read_fast = self._reader.feed_repeat
            consumed = self._reader.feed(piece)
        except Exception:
            _fault.report("reading a stream")
            self.stop()  # what the stream would have told is looked up
            return 0
        self._remainder = piece[consumed:] if consumed else b""
        return consumed

    def take_remainder(self) -> bytes:
        """Return the bytes that are held, which are then to be read; empty if there are none."""
        remainder, self._remainder = self._remainder, b""
        return remainder

    def stop(self) -> None:
        """Read no further piece, except with `read_tail`."""
        self._is_reading = False
        self.read_fast = read_nothing

    def finish_document(self) -> None:
        """Read a body that is one JSON document and has arrived whole."""
        if isinstance(self._reader, DocumentReader):
            self._reader.finish()

    def contains_end(self, pieces: Sequence[bytes]) -> bool:
        """Whether these pieces, if they were read, would end the response."""
        reader, state = copy.deepcopy((self._reader, self.state))
        return bool(pieces) and _read_all(reader or body_reader(pieces[0], state), state, pieces)

    def begin_tail(self) -> None:
        """Count no further event: what is read from now on comes after the end of the call."""
        self.state.stop_counting()

    def read_tail(self, piece: bytes) -> bool:
        """Read bytes that came after the call had ended, and return whether nothing more is needed."""
        try:
            if self._reader is None:
                self._reader = body_reader(piece, self.state)
            return _read_all(self._reader, self.state, (piece,))
        except Exception:
            _fault.report("reading on")
            return True

    def release(self) -> None:
        """Release the reader: no further piece will come. Of an incomplete document the id is read."""
        if isinstance(self._reader, DocumentReader):
            self._reader.finish_incomplete()
        self._reader = None
        self._remainder = b""


def read_nothing(_: bytes) -> bool:
    """Take no piece: the fast path where there is none."""
    return False


def _read_all(reader: BodyReader, state: AnswerState, pieces: Iterable[bytes]) -> bool:
    for piece in pieces:
        consumed = reader.feed(piece)
        while consumed:
            piece = piece[consumed:]
            consumed = reader.feed(piece)
    return state.ending is not None
