"""The bytes of an answer, watched on their way to whoever reads them."""

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

# Where an exception begins that the reading of a stream itself has raised, and not the application.
_SDK_STREAM_MODULES: Final = frozenset({"openai._streaming"})
_STREAM_MODULES: Final = frozenset({*_SDK_STREAM_MODULES, "httpx._models", "httpx2._models"})

# The streams that only count the time, and how each is read.
_WRAPPER_STREAMS: Final = {"BoundSyncStream": "__iter__", "BoundAsyncStream": "__aiter__"}

# Of asyncio and of trio.
_CANCELLATIONS: Final = frozenset({"CancelledError", "Cancelled"})


def tap(response: Any, invocation: Invocation) -> None:
    """Let `invocation` see the body of an HTTP response that has not been read.

    The body is watched where it leaves the transport: every way of reading it passes there, and so
    does every way of closing it.
    """
    stream = response.stream
    for base in type(stream).__mro__:
        if base.__name__ in _TAPS:
            response.stream = _tap_class(base)(stream, invocation, _decoder(response), _socket(response))
            # Told before the collector closes the generators that read the body, whose close would
            # otherwise pass for the application's.
            invocation.response_ref = weakref.ref(response, invocation.on_garbage_collected)
            return
    raise TypeError(f"the body of an answer is a {type(stream).__name__}")


class _Tap:
    """What the sync and the async tap share."""

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
        self._socket = connection  # the socket, where it carries this answer alone
        self._source: Any = None  # where the bytes come from
        self._generator: Any = None  # the generator that hands them on
        self._closed_during_read = False
        self._tail: object = None  # reads on after the application has closed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while there is no `_stream` yet, as in a copy
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _feed_encoded(self, piece: bytes) -> int:
        # What the reader gets is the encoded piece, which cannot be divided where the plain one can.
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
            self._decode = bytes.strip  # what follows cannot be decoded either, and says nothing
            return b""

    def _on_raise(self, error: BaseException) -> None:
        self._invocation.on_read_error(error, closed=self._closed_during_read)

    def _on_close(self, *, is_reading: bool) -> float:
        """Tell of a close; return for how many seconds the stream is to be read on."""
        if is_reading:
            # The read under way will tell how the stream ended: a transport that breaks closes first.
            self._closed_during_read = True
            return 0.0
        invocation = self._invocation
        invocation.on_remainder()
        if invocation.ended:
            return 0.0
        # A decoder takes each byte once: what is read on is not to be decoded before.
        if self._source is not None and (self._decode is None or not invocation.needs_tail):
            invocation.on_buffered([self._decoded(piece) for piece in buffered_pieces(self._stream)])
        return (
            invocation.on_close(_cause_of_close(self._drop_modules), is_readable=self._source is not None)
            or 0.0
        )

    def _raise_closed(self) -> None:
        """Raise what a closed connection raises, though in truth it is being read on."""
        library = sys.modules[type(self._stream).__module__.partition(".")[0]]
        raise library.ReadError("[Errno 9] Bad file descriptor")


class _SyncTap(_Tap):
    __slots__ = ()

    # Who leaves a loop over the bytes has the HTTP library close them there and then, which is a close like
    # another. The generators of an async client are closed later, by its event loop and at the end of it.
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
            raise  # the reader is gone; whether the stream is closed is said by `close`
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
            # Left to the garbage collector it would be closed by another task.
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
    """Return the tap as a subclass of the HTTP library's own stream class, which that library insists on."""
    tap_class = _TAPS[base.__name__]
    return type(tap_class.__name__, (tap_class, base), {"__slots__": ()})


def _inner_stream(stream: Any) -> Any:
    """Return what the HTTP library's outermost stream hands on piece by piece, doing nothing else.

    The tap stands in that one's place: then a watched body passes no more hands than another. It is still
    closed through it. One that somebody else has changed is left where it is.
    """
    stream_class = type(stream)
    read, module = (
        vars(stream_class).get(_WRAPPER_STREAMS.get(stream_class.__name__, "")),
        sys.modules.get(stream_class.__module__),
    )
    # Asked by its type: a wrapped function passes for one.
    is_unchanged = type(read) is FunctionType and read.__globals__ is getattr(module, "__dict__", None)
    return stream._stream if is_unchanged and hasattr(stream, "_stream") else stream  # noqa: SLF001


def _decoder(response: Any) -> Callable[[bytes], bytes] | None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() == "identity":
        return None
    # A second decoder of the library's own, since the one of this response must see each byte once.
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


def _cause_of_close(drop_modules: frozenset[str]) -> BaseException | None:
    """Return the exception because of which the stream is being closed, if that is not the application's.

    `finally: response.close()` runs with the exception in flight: `GeneratorExit` where nobody will read
    on, an error of the SDK's, or the cancellation of the task that reads. An exception of the
    application's own, from its loop body, has begun in a frame of the application. `drop_modules` are the
    readers whose `GeneratorExit` says that the stream was dropped.
    """
    error = sys.exc_info()[1]
    traceback = error.__traceback__ if error is not None else None
    if traceback is None:
        return error
    if not isinstance(error, Exception) and type(error).__name__ in _CANCELLATIONS:
        return error
    reader = traceback.tb_frame.f_globals.get("__name__")
    return (
        error if reader in (drop_modules if isinstance(error, GeneratorExit) else _STREAM_MODULES) else None
    )
