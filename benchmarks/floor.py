"""The least one can do for an event: count it, if it looks like one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any


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


def read(stream: Any) -> None:
    """Take every piece, and do nothing with it."""
    for _ in stream:
        pass


async def async_read(stream: Any) -> None:
    """Take every piece, and do nothing with it."""
    async for _ in stream:
        pass
