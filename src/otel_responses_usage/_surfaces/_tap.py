"""The bytes of an answer, watched on their way to whoever reads them."""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, Final

from .. import _fault
from .._invocation import Invocation

# The SDK parses events here; an exception that begins in it is the SDK's own, not the application's.
_SDK_STREAMING: Final = "openai._streaming"


def tap(response: Any, invocation: Invocation) -> None:
    """Let `invocation` see the body of an HTTP response that has not been read.

    The body is watched where it leaves the transport: every way of reading it passes there, and so
    does every way of closing it.
    """
    stream = response.stream
    for base in type(stream).__mro__:
        if base.__name__ in _TAPS:
            response.stream = _tap_class(base)(stream, invocation, _decoder(response))
            return


class _Tap:
    """What the sync and the async tap share."""

    def __init__(self, stream: Any, invocation: Invocation, decode: Callable[[bytes], bytes] | None) -> None:
        self._stream = stream
        self._invocation = invocation
        self._decode = decode
        self._reading: Any = None  # the generator that hands the bytes on
        self._closed_in_read = False
        self._held = b""  # has arrived, but its reader has not asked for it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _feed(self) -> Callable[[bytes], int]:
        return self._invocation.on_bytes if self._decode is None else self._feed_decoded

    def _feed_decoded(self, piece: bytes) -> int:
        assert self._decode is not None  # noqa: S101
        try:
            plain = self._decode(piece)
        except Exception:
            _fault.report("decoding a stream")
            return 0
        # What the reader gets is the encoded piece, which cannot be divided where the plain one can.
        taken = self._invocation.on_bytes(plain)
        if taken:
            self._invocation.on_bytes(plain[taken:])
        return 0

    def _on_raise(self, error: BaseException) -> None:
        self._invocation.on_read_error(error, closed=self._closed_in_read)

    def _on_close(self, *, reading: bool) -> None:
        if reading:
            # The read under way will tell how the stream ended: a transport that breaks closes first.
            self._closed_in_read = True
            return
        if self._held:
            self._invocation.on_bytes(self._held)
        self._invocation.on_close(_raised_by_sdk())


class _SyncTap(_Tap):
    def __iter__(self) -> Iterator[bytes]:
        self._reading = self._read()
        return self._reading  # type: ignore[no-any-return]

    def _read(self) -> Iterator[bytes]:
        feed = self._feed()
        try:
            for piece in self._stream:
                taken = feed(piece)
                if taken:
                    self._held = piece[taken:]
                    yield piece[:taken]
                    piece, self._held = self._held, b""
                    feed(piece)
                yield piece
        except GeneratorExit:
            raise  # the reader is gone; whether the stream is closed is said by `close`
        except BaseException as error:
            self._on_raise(error)
            raise
        self._invocation.on_body_end()

    def close(self) -> None:
        self._on_close(reading=self._reading is not None and self._reading.gi_running)
        self._stream.close()


class _AsyncTap(_Tap):
    def __aiter__(self) -> AsyncIterator[bytes]:
        self._reading = self._read()
        return self._reading  # type: ignore[no-any-return]

    async def _read(self) -> AsyncGenerator[bytes, None]:
        feed = self._feed()
        stream = self._stream.__aiter__()
        try:
            async for piece in stream:
                taken = feed(piece)
                if taken:
                    self._held = piece[taken:]
                    yield piece[:taken]
                    piece, self._held = self._held, b""
                    feed(piece)
                yield piece
        except GeneratorExit:
            raise
        except BaseException as error:
            self._on_raise(error)
            raise
        finally:
            # Left to the garbage collector it would be closed by another task.
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()
        self._invocation.on_body_end()

    async def aclose(self) -> None:
        self._on_close(reading=self._reading is not None and self._reading.ag_running)
        await self._stream.aclose()


_TAPS: Final = {"SyncByteStream": _SyncTap, "AsyncByteStream": _AsyncTap}


@functools.lru_cache(maxsize=8)
def _tap_class(base: type) -> Callable[..., Any]:
    """Return the tap as a subclass of the HTTP library's own stream class, which that library insists on."""
    tap_class = _TAPS[base.__name__]
    return type(tap_class.__name__, (tap_class, base), {})


def _decoder(response: Any) -> Callable[[bytes], bytes] | None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() == "identity":
        return None
    # A second decoder of the library's own, since the one of this response must see each byte once.
    twin = type(response)(200, headers={"content-encoding": encoding}, content=b"")
    decoder = twin._get_content_decoder()  # noqa: SLF001

    def decode(piece: bytes) -> bytes:
        plain = decoder.decode(piece)
        return plain if isinstance(plain, bytes) else b"".join(plain)

    return decode


def _raised_by_sdk() -> BaseException | None:
    """Return what the SDK is raising right now, if it closes the stream because of that.

    `finally: response.close()` runs with the exception in flight. One of the application's own, from
    its loop body, has begun in the application's frame.
    """
    error = sys.exc_info()[1]
    traceback = error.__traceback__ if error is not None else None
    if traceback is None or isinstance(error, GeneratorExit):
        return None
    return error if traceback.tb_frame.f_globals.get("__name__") == _SDK_STREAMING else None
