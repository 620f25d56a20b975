"""A tap: replaces the body of an HTTP response, and reads its bytes while they pass."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from types import FunctionType, TracebackType
from typing import Any, Final

from .. import _fault
from .._answer.reception import read_nothing
from .._call.invocation import Invocation
from ._tail import Tail, end_after, read_tail_in_task
from ._unread import UnreadBody, unread_body

# If an exception starts in one of these modules, reading the stream raised it, not the application.
_SDK_STREAM_MODULES: Final = frozenset({"openai._streaming"})
_STREAM_MODULES: Final = frozenset({*_SDK_STREAM_MODULES, "httpx._models", "httpx2._models"})
_SDK_HELPERS: Final = "openai.lib.streaming."

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
            response.stream = _tap_class(base)(stream, invocation, _decoder(response))
            # This callback runs before the garbage collector closes the generators that read the body.
            # Their close would look like a close by the application.
            invocation.response_ref = weakref.ref(response, invocation.on_garbage_collected)
            return
    raise TypeError(f"the body of an answer is a {type(stream).__name__}")


class _Tap:
    """The common part of the sync and the async tap."""

    __slots__ = (
        "_closed_during_read",
        "_decoder",
        "_generator",
        "_invocation",
        "_source",
        "_stream",
        "_tail",
    )

    _drop_modules = _STREAM_MODULES
    _can_use_task = False  # whether a task of the application's event loop can read the tail

    def __init__(
        self,
        stream: Any,
        invocation: Invocation,
        decoder: Any,
    ) -> None:
        self._stream = stream
        self._invocation = invocation
        self._decoder = decoder  # `None` if the body is not compressed
        self._source: Any = None  # the iterator that provides the bytes
        self._generator: Any = None  # the generator that passes them on
        self._closed_during_read = False
        self._tail: object = None  # what reads the tail

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also if `_stream` is not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _feed_encoded(self, piece: bytes) -> int:
        # The application receives the encoded piece. It cannot be split where the decoded piece can.
        plain = None
        for plain in self._decoded(piece):
            if not self._invocation.read_fast(plain) and self._invocation.on_piece(plain):
                self._invocation.on_remainder()
        if plain is None and self._decoder is _NO_DECODER:
            self._invocation.on_reader_failed()  # at the first byte of this piece, which it gets now
        return 0

    def _decoded(self, piece: bytes) -> Iterator[bytes]:
        """Yield the decoded parts of a piece.

        If the decoder fails, the decoder of the application fails at the same byte. That is not a fault of
        the instrumentation. The application may already have read the parts before that byte.
        """
        if self._decoder is None:
            yield piece
            return
        try:
            yield from _parts(self._decoder.decode(piece))
        except Exception as error:
            self._on_decode_error(error)

    def _end_decoding(self) -> None:
        """Read what the decoder still holds when the body ends. Some decoders fail if the end is missing."""
        try:
            for plain in _parts(self._decoder.flush()):
                self._invocation.on_piece(plain)
                self._invocation.on_remainder()
        except Exception as error:
            self._on_decode_error(error)
            self._invocation.on_reader_gone()

    def _on_decode_error(self, error: Exception) -> None:
        self._decoder = _NO_DECODER
        self._invocation.on_decode_error(error)

    def _on_raise(self, error: BaseException) -> None:
        self._invocation.on_read_error(error, closed=self._closed_during_read)

    def _on_close(self, *, is_reading: bool) -> float:
        """Report a close. Returns for how many seconds a task is to read the tail before the close."""
        if is_reading:
            # The current read reports how the stream ended. A failing transport closes the stream first, and
            # then the read raises.
            self._closed_during_read = True
            return 0.0
        invocation = self._invocation
        if isinstance(sys.exc_info()[1], GeneratorExit):
            invocation.on_reader_gone()
        if invocation.ended:
            return 0.0
        invocation.on_leave()
        cause = _cause_of_close(self._drop_modules, invocation.response)
        if isinstance(cause, Exception):
            body = unread_body(self._stream)
            invocation.on_reader_error(cause, self._read_unread(body))
            body.close()
            return 0.0
        invocation.on_remainder()
        if invocation.ended:
            return 0.0
        tail_s = invocation.tail_s if cause is None else 0.0
        task_s = invocation.held_tail_s if tail_s and self._can_use_task and self._source is not None else 0.0
        body = unread_body(self._stream)
        pieces: list[bytes] = []
        # A decoder must receive each byte once, and the task reads these bytes again.
        if self._decoder is None or body.can_continue or not task_s:
            pieces = self._read_unread(body, any_content=bool(tail_s))
            invocation.on_buffered(pieces)
        if not invocation.ended and tail_s and body.keep():
            tail = Tail(body, pieces, self._decoded, invocation, tail_s)
            self._tail = tail
            invocation.begin_tail(tail.read_on, tail.close)
            return 0.0
        body.close()
        if task_s and not invocation.ended:
            return task_s
        invocation.on_close(cause)
        return 0.0

    def _read_unread(self, body: UnreadBody, *, any_content: bool = False) -> list[bytes]:
        """Return the decoded pieces that have arrived and that the application has not read."""
        any_content = any_content or self._decoder is not None
        try:
            pieces = body.read(any_content=any_content)
            return [plain for piece in pieces for plain in self._decoded(piece)]
        except Exception:
            _fault.report("looking at what had arrived")
            return []

    def _raise_closed(self) -> None:
        """Raise the error of a closed connection: its tail is being read."""
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
        invocation, is_plain = self._invocation, self._decoder is None
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
            invocation.on_reader_gone()
            raise  # `close` reports whether the stream is closed
        except BaseException as error:
            self._on_raise(error)
            raise
        if not is_plain:
            self._end_decoding()
        invocation.on_body_end()

    def close(self) -> None:
        self._on_close(is_reading=self._generator is not None and self._generator.gi_running)
        self._stream.close()


class _AsyncTap(_Tap):
    __slots__ = ()

    _can_use_task = True

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._generator = self._read()
        return self._generator  # type: ignore[no-any-return]

    async def _read(self) -> AsyncGenerator[bytes, None]:
        invocation, is_plain = self._invocation, self._decoder is None
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
            invocation.on_reader_gone()
            raise
        except BaseException as error:
            self._on_raise(error)
            raise
        finally:
            # Otherwise the garbage collector would close it in another task.
            if self._tail is None and isinstance(self._source, AsyncGenerator):
                await self._source.aclose()
        if not is_plain:
            self._end_decoding()
        invocation.on_body_end()

    async def aclose(self) -> None:
        task_s = self._on_close(is_reading=self._generator is not None and self._generator.ag_running)
        if task_s:
            invocation = self._invocation
            task = read_tail_in_task(self._source, self._stream.aclose, self._decoded, invocation, task_s)
            if task is not None:
                self._tail = task
                invocation.begin_tail(end_after(invocation, task_s), task.cancel)
                return
            invocation.on_close(None)
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


class _NoDecoder:
    """Replaces a decoder that has failed: the rest of the body cannot be decoded."""

    def decode(self, _: bytes) -> bytes:
        return b""

    def flush(self) -> bytes:
        return b""


_NO_DECODER: Final = _NoDecoder()


def _decoder(response: Any) -> Any:
    """Return a second decoder of the HTTP library, or `None` if the body is not compressed.

    The decoder of the response itself must receive each byte once, from the application's reader.
    """
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() == "identity":
        return None
    decoder_owner = type(response)(200, headers={"content-encoding": encoding}, content=b"")
    return decoder_owner._get_content_decoder()  # noqa: SLF001


def _parts(plain: Any) -> Iterator[bytes]:
    """Yield what a decoder returned: bytes, or an iterator of bytes in newer releases."""
    return iter((plain,)) if isinstance(plain, bytes) else iter(plain)


def _cause_of_close(drop_modules: frozenset[str], response: Any) -> BaseException | None:
    """Return the exception that led to this close, or `None` if the application closed the stream.

    `finally: response.close()` runs while an exception propagates. This is `GeneratorExit` for a dropped
    stream, an error that the SDK raised, or the cancellation of the reading task. An exception from the
    application's loop body starts in a frame of the application, and gives `None`.

    Args:
        drop_modules: The modules whose generators receive `GeneratorExit` when a stream is dropped.
        response: The HTTP response, to recognise its readers.

    """
    error = sys.exc_info()[1]
    traceback = error.__traceback__ if error is not None else None
    if traceback is None:
        return error
    if not isinstance(error, Exception) and type(error).__name__ in _CANCELLATIONS:
        return error
    reader = traceback.tb_frame.f_globals.get("__name__")
    modules = drop_modules if isinstance(error, GeneratorExit) else _STREAM_MODULES
    if reader in modules or (isinstance(error, Exception) and _is_raised_by_reader(traceback, response)):
        return error
    return None


def _is_raised_by_reader(traceback: TracebackType | None, response: Any) -> bool:
    """Whether an exception passed through the SDK's reader of this response on its way to the application.

    The application's `with` block closes the stream of an SDK that does not close it itself.
    """
    while traceback is not None and response is not None:
        frame = traceback.tb_frame
        module = frame.f_globals.get("__name__", "")
        if module in _STREAM_MODULES or module.startswith(_SDK_HELPERS):
            reader = frame.f_locals.get("self")
            owned = (getattr(reader, name, None) for name in ("response", "_response"))
            if reader is response or any(value is response for value in owned):
                return True
        traceback = traceback.tb_next
    return False
