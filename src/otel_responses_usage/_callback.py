"""How a function of the application is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable


class CoroutineError(TypeError):
    """A function of the application is a coroutine function. Nothing can wait for it."""


def result_of(function: Callable[..., object], *args: object) -> object:
    """Call a function of the application, and return its result.

    Raises:
        CoroutineError: The result is a coroutine. Nothing would run it, and as an answer it is always true.

    """
    result = function(*args)
    if inspect.iscoroutine(result):
        result.close()  # else Python warns that it was never run
        raise CoroutineError(f"{function!r} is a coroutine function")
    return result
