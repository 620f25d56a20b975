"""Notes when the application has read the body of an HTTP response that the SDK left to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _fault


def call_when_read(response: Any, callback: Callable[[], None]) -> None:
    """Call back once when the application has read the whole body at once: what `parse()` and `json()` do.

    A body that it reads in pieces is not noticed.
    """
    read, aread = response.read, response.aread

    @_fault.catch_and_report("looking at an answer")
    def on_read() -> None:
        # Removed first: a response with functions of its own cannot be pickled.
        if response.__dict__.pop("read", None) is not None:
            del response.aread
            callback()

    def read_and_call() -> Any:
        content = read()
        on_read()
        return content

    async def aread_and_call() -> Any:
        content = await aread()
        on_read()
        return content

    response.read, response.aread = read_and_call, aread_and_call
