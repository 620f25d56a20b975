"""The floor: the least that a reader of the bytes does for an event.

The floor reads behind the layer that an HTTP library has around a body, as the instrumentation does. Its
nanoseconds are the difference to a plain read through that layer. Its instructions are the difference to a
bare read behind the layer, so the reference of the ratios does not depend on the layer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from . import standin

_END = b"\n\n"
_HEAD = 75  # bytes at the start of an event that are the same for all deltas of text


class Floor:
    """Counts a piece that begins and ends like the event before it, and the ends of events in other pieces.

    It knows no types, notices no terminal event, measures no time, and misses an end that is in two pieces.
    A reader of the bytes cannot do much less.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        head = _END
        for piece in self._stream:
            if piece.startswith(head) and piece.endswith(_END):
                self.count += 1
            else:
                head = piece[:_HEAD]
                self.count += piece.count(_END)
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        head = _END
        async for piece in self._stream:
            if piece.startswith(head) and piece.endswith(_END):
                self.count += 1
            else:
                head = piece[:_HEAD]
                self.count += piece.count(_END)
            yield piece


def floor(pieces: list[bytes]) -> None:
    """Read a body to its end, and count."""
    _read(Floor(standin.SyncByteStream(pieces)))


def async_floor(pieces: list[bytes]) -> None:
    """Do the same as an async client does."""
    standin.run(_async_read(Floor(standin.AsyncByteStream(pieces))))


def bare(pieces: list[bytes]) -> None:
    """Read the same body to its end, and do nothing else."""
    _read(standin.SyncByteStream(pieces))


def async_bare(pieces: list[bytes]) -> None:
    """Do the same as an async client does."""
    standin.run(_async_read(standin.AsyncByteStream(pieces)))


def _read(stream: Any) -> None:
    for _ in stream:
        pass


async def _async_read(stream: Any) -> None:
    async for _ in stream:
        pass
