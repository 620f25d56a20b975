"""The least one can do for an event: count it, if it looks like one.

Like ours, the floor reads behind the layer that an HTTP library puts around a body, and so in its place. In
nanoseconds it is told as ours is, over a plain read through that layer. As a reference to which ratios are
made it is told over a bare read behind the layer: so it is the counting and an iterator, whatever the layer
may cost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from . import standin


class Floor:
    """Counts the pieces that begin as the first one did and end as events end.

    It knows no kinds, notices no terminal event, measures no time and trusts its pieces to be whole. No
    observer of bytes can do less.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        head = None
        for piece in self._stream:
            if head is None:
                head = piece[:75]
            if piece.startswith(head) and piece.endswith(b"\n\n"):
                self.count += 1
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        head = None
        async for piece in self._stream:
            if head is None:
                head = piece[:75]
            if piece.startswith(head) and piece.endswith(b"\n\n"):
                self.count += 1
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
