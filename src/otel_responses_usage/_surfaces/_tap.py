"""A tap: replaces the body of an HTTP response, and reads its bytes while they pass."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from types import FunctionType
from typing import Any, Final

from .. import _fault
from .._answer.reception import read_nothing
from .._call.invocation import Invocation
from ._buffered import buffered_pieces
from ._tail import read_tail_in_task, read_tail_in_thread

# If an exception starts in one of these modules, reading the stream raised it, not the application.
_SDK_STREAM_MODULES: Final = frozenset({"openai._streaming"})
_STREAM_MODULES: Final = frozenset({*_SDK_STREAM_MODULES, "httpx._models", "httpx2._models"})
# The helper behind `responses.stream()` raises on events that it cannot accumulate.
_SDK_HELPER_MODULES: Final = "openai.lib.streaming."

# Streams of the HTTP library that only measure the time, and the method that reads each of them.
_WRAPPER_STREAMS: Final = {"BoundSyncStream": "__iter__", "BoundAsyncStream": "__aiter__"}

# The cancellation exceptions of asyncio and trio.
_CANCELLATIONS: Final = frozenset({"CancelledError", "Cancelled"})


def tap(response: Any, invocation: Invocation) -> None:
    """Put a tap into an HTTP response whose body has not been read.

    The tap is at the transport: all ways to read or close the body go through it.
    """
    stream = response.stream
    for base in type(stream).__mro__:
        if base.__name__ in _TAPS:
            response.stream = _tap_class(base)(stream, invocation, _decoder(response), _socket(response))
            # This callback runs before the garbage collector closes the generators that read the body.
            # Their close would look like a close by the application.
            invocation.response_ref = weakref.ref(response, invocation.on_garbage_collected)
            return
    raise TypeError(f"the body of an answer is a {type(stream).__name__}")


class _Tap:
    """The common part of the sync and the async tap."""

    __slots__ = (
        "_closed_during_read",
        "_decode",
        "_generator",
        "_invocation",
        "_socket",
        "_source",
        "_stream",
        "_tail",
    )

    _drop_modules = _STREAM_MODULES

    def __init__(
        self,
        stream: Any,
        invocation: Invocation,
        decode: Callable[[bytes], bytes] | None,
        connection: Any,
    ) -> None:
        self._stream = stream
        self._invocation = invocation
        self._decode = decode
        self._socket = connection  # the socket, if no other request uses it
        self._source: Any = None  # the iterator that provides the bytes
        self._generator: Any = None  # the generator that passes them on
        self._closed_during_read = False
        self._tail: object = None  # the thread or task that reads the tail

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also if `_stream` is not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _feed_encoded(self, piece: bytes) -> int:
        # The application receives the encoded piece. It cannot be split where the decoded piece can.
        plain = self._decoded(piece)
        if not self._invocation.read_fast(plain) and self._invocation.on_piece(plain):
            self._invocation.on_remainder()
        return 0

    def _decoded(self, piece: bytes) -> bytes:
        if self._decode is None:
            return piece
        try:
            return self._decode(piece)
        except Exception:
            _fault.report("decoding a stream")
            self._decode = bytes.strip  # the rest cannot be decoded either: this decoder returns no events
            return b""

    def _on_raise(self, error: BaseException) -> None:
        self._invocation.on_read_error(error, closed=self._closed_during_read)

    def _on_close(self, *, is_reading: bool) -> float:
        """Report a close. Returns for how many seconds to read the tail."""
        if is_reading:
            # The current read reports how the stream ended. A failing transport closes the stream first, and
            # then the read raises.
            self._closed_during_read = True
            return 0.0
        invocation = self._invocation
        invocation.on_remainder()
        if invocation.ended:
            return 0.0
        # A decoder must receive each byte once. Bytes of the tail are decoded later.
        if self._source is not None and (self._decode is None or not invocation.needs_tail):
            invocation.on_buffered([self._decoded(piece) for piece in buffered_pieces(self._stream)])
        cause, is_readable = _cause_of_close(self._drop_modules, self), self._source is not None
        return invocation.on_close(cause, is_readable=is_readable) or 0.0

    def _raise_closed(self) -> None:
        """Raise the error of a closed connection.

        The connection is still open, because its tail is being read.
        """
        library = sys.modules[type(self._stream).__module__.partition(".")[0]]
        raise library.ReadError("[Errno 9] Bad file descriptor")


class _SyncTap(_Tap):
    __slots__ = ()

    # If the application leaves a loop over the bytes, the HTTP library of a sync client closes the stream.
    # That is a normal close. The generators of an async client are closed later, by the event loop.
    _drop_modules = _SDK_STREAM_MODULES

    def __iter__(self) -> Iterator[bytes]:
        self._generator = self._read()
        return self._generator  # type: ignore[no-any-return]

    def _read(self) -> Iterator[bytes]:
        invocation, is_plain = self._invocation, self._decode is None
        read_fast: Callable[[bytes], bool] = read_nothing
        try:
            self._source = iter(_inner_stream(self._stream))
            for piece in self._source:
                if not read_fast(piece):
                    consumed = invocation.on_piece(piece) if is_plain else self._feed_encoded(piece)
                    if consumed:
                        yield piece[:consumed]
                        piece = piece[consumed:]
                        invocation.on_remainder()
                    if is_plain:
                        read_fast = invocation.read_fast
                yield piece
                if self._tail is not None:
                    self._raise_closed()
        except GeneratorExit:
            raise  # `close` reports whether the stream is closed
        except BaseException as error:
            self._on_raise(error)
            raise
        invocation.on_body_end()

    def close(self) -> None:
        tail_s = self._on_close(is_reading=self._generator is not None and self._generator.gi_running)
        if tail_s:
            self._tail = read_tail_in_thread(
                self._source, self._stream.close, self._decoded, self._invocation, tail_s, self._socket
            )
        if self._tail is None:
            if tail_s:
                self._invocation.on_tail_end()
            self._stream.close()


class _AsyncTap(_Tap):
    __slots__ = ()

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._generator = self._read()
        return self._generator  # type: ignore[no-any-return]

    async def _read(self) -> AsyncGenerator[bytes, None]:
        invocation, is_plain = self._invocation, self._decode is None
        read_fast: Callable[[bytes], bool] = read_nothing
        try:
            self._source = _inner_stream(self._stream).__aiter__()
            async for piece in self._source:
                if not read_fast(piece):
                    consumed = invocation.on_piece(piece) if is_plain else self._feed_encoded(piece)
                    if consumed:
                        yield piece[:consumed]
                        piece = piece[consumed:]
                        invocation.on_remainder()
                    if is_plain:
                        read_fast = invocation.read_fast
                yield piece
                if self._tail is not None:
                    self._raise_closed()
        except GeneratorExit:
            raise
        except BaseException as error:
            self._on_raise(error)
            raise
        finally:
            # Otherwise the garbage collector would close it in another task.
            if self._tail is None and isinstance(self._source, AsyncGenerator):
                await self._source.aclose()
        invocation.on_body_end()

    async def aclose(self) -> None:
        tail_s = self._on_close(is_reading=self._generator is not None and self._generator.ag_running)
        if tail_s:
            self._tail = read_tail_in_task(
                self._source, self._stream.aclose, self._decoded, self._invocation, tail_s
            )
        if self._tail is None:
            if tail_s:
                self._invocation.on_tail_end()
            await self._stream.aclose()


_TAPS: Final = {"SyncByteStream": _SyncTap, "AsyncByteStream": _AsyncTap}


@functools.lru_cache(maxsize=8)
def _tap_class(base: type) -> Callable[..., Any]:
    """Return a tap class that inherits from `base`: the HTTP library requires its own stream class."""
    tap_class = _TAPS[base.__name__]
    return type(tap_class.__name__, (tap_class, base), {"__slots__": ()})


def _inner_stream(stream: Any) -> Any:
    """Return the stream inside the outermost stream of the HTTP library.

    The outermost stream only measures the time. If the tap reads from the inner stream, the body passes
    through as many layers as without a tap. The tap still closes the outermost stream. An outermost stream
    with a changed method is returned as it is.
    """
    stream_class = type(stream)
    read = vars(stream_class).get(_WRAPPER_STREAMS.get(stream_class.__name__, ""))
    module = sys.modules.get(stream_class.__module__)
    # Compare the exact type: isinstance() is also true for a wrapped function.
    is_unchanged = type(read) is FunctionType and read.__globals__ is getattr(module, "__dict__", None)
    return stream._stream if is_unchanged and hasattr(stream, "_stream") else stream  # noqa: SLF001


def _decoder(response: Any) -> Callable[[bytes], bytes] | None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() == "identity":
        return None
    # A second decoder of the HTTP library. The decoder of this response must receive each byte once.
    decoder_owner = type(response)(200, headers={"content-encoding": encoding}, content=b"")
    decoder = decoder_owner._get_content_decoder()  # noqa: SLF001

    def decode(piece: bytes) -> bytes:
        plain = decoder.decode(piece)
        return plain if isinstance(plain, bytes) else b"".join(plain)

    return decode


def _socket(response: Any) -> Any:
    network_stream = response.extensions.get("network_stream")
    if network_stream is None or response.http_version == "HTTP/2":
        return None
    try:
        return network_stream.get_extra_info("socket")
    except Exception:
        _fault.report("looking for a connection")
        return None


def _cause_of_close(drop_modules: frozenset[str], tap: _Tap) -> BaseException | None:
    """Return the exception that led to this close, or `None` if the application closed the stream.

    `finally: response.close()` runs while an exception propagates. This is `GeneratorExit` for a dropped
    stream, an error that the SDK raised, or the cancellation of the reading task. An exception from the
    application's loop body starts in a frame of the application, and gives `None`.

    Args:
        drop_modules: The modules whose generators receive `GeneratorExit` when a stream is dropped.
        tap: The tap that is closed.

    """
    error = sys.exc_info()[1]
    traceback = error.__traceback__ if error is not None else None
    if traceback is None:
        return error
    if not isinstance(error, Exception) and type(error).__name__ in _CANCELLATIONS:
        return error
    reader = traceback.tb_frame.f_globals.get("__name__")
    modules = drop_modules if isinstance(error, GeneratorExit) else _STREAM_MODULES
    return error if reader in modules or _is_raised_by_helper(error, tap) else None


def _is_raised_by_helper(error: BaseException | None, tap: _Tap) -> bool:
    """Whether an error was raised while the SDK's helper read this stream.

    The helper does not close the stream. The `with` block of the application does, so the traceback starts in
    a frame of the application.
    """
    traceback = error.__traceback__ if isinstance(error, Exception) else None
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        if str(frame.f_globals.get("__name__")).startswith(_SDK_HELPER_MODULES):
            response = getattr(frame.f_locals.get("self"), "_response", None)
            if getattr(response, "stream", None) is tap:
                return True
    return False
