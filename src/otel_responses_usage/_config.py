"""The settings of the instrumentation and their environment variables."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

if TYPE_CHECKING:
    from ._call_record import CallRecord

_PREFIX: Final = "OTEL_RESPONSES_USAGE_"
_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})

_TOKEN_SIGNS: Final = frozenset("!#$%&'*+-.^_`|~")

# Whether a call gets a `chat` span of its own.
Spans = Literal["auto", "always", "never"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Config:
    """The settings. Each has an environment variable `OTEL_RESPONSES_USAGE_<NAME>`.

    Attributes:
        retrieval: Whether to look usage up that the stream did not deliver.
        retrieval_timeout: Seconds from the end of a stream until its look-up stops.
        background_timeout: The same for calls with `background=True`.
        max_concurrency: Maximum number of look-up requests at the same time.
        max_pending: Maximum number of spans that stay open until their usage is known. Further spans end at
            once, with the missing reason `overload`.
        exit_timeout: Seconds that a process exit or `uninstrument()` waits for pending look-ups. It waits
            half of this time for streams that are read on.
        flush_timeout: Seconds that a `force_flush()` of the SDK's providers waits for pending look-ups, no
            longer than its own timeout and not for background responses; 0 is not at all.
        grace_timeout: Seconds to continue reading after the application closed a stream whose output is
            complete: only the terminal event is due then; 0 is off.
        tail_timeout: Seconds to continue reading after the application closed a stream; 0 is off. Costs the
            tokens that are generated during this time.
        spans: Whether a call gets a `chat` span. `"auto"`: not if another instrumentation has a span of the
            call; then only what that span lacks is recorded. `"always"`: every call. `"never"`: no call.
        baggage_keys: Baggage entries of the caller's context that become attributes of the span and of every
            metric, under their own names. Values are cut at 128 characters. On metrics each key has at most
            100 values; further ones are `other`.
        input_count: Whether to ask the API for the input tokens of calls whose usage cannot be known. It
            sends the content of the call once more, and holds it until then. It generates nothing.
        on_call: A function that is called with a `CallRecord` once per call, when its usage is known or given
            up on. It runs on a thread of this package, for one call after the other. What it raises is
            counted. In the environment it is named as `package.module:function`. It may be part of the
            application's own program: the program is not imported a second time. An exit keeps a tenth of
            `exit_timeout` for it.

    Raises:
        ValueError: A value is out of range.

    """

    retrieval: bool = True
    retrieval_timeout: float = 10.0
    background_timeout: float = 300.0
    max_concurrency: int = 8
    max_pending: int = 2048
    exit_timeout: float = 5.0
    flush_timeout: float = 1.0
    grace_timeout: float = 0.25
    tail_timeout: float = 0.0
    spans: Spans = "auto"
    baggage_keys: tuple[str, ...] = ()
    input_count: bool = False
    on_call: Callable[[CallRecord], object] | None = None

    def __post_init__(self) -> None:
        for name in (
            "retrieval_timeout",
            "background_timeout",
            "exit_timeout",
            "flush_timeout",
            "grace_timeout",
            "tail_timeout",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of seconds, 0 or more, not {value!r}")
        if self.max_concurrency < 1:
            raise ValueError(f"max_concurrency must be 1 or more, not {self.max_concurrency!r}")
        if self.max_pending < 0:
            raise ValueError(f"max_pending must be 0 or more, not {self.max_pending!r}")
        if self.spans not in get_args(Spans):
            raise ValueError(f"spans must be one of {get_args(Spans)}, not {self.spans!r}")
        keys = self.baggage_keys
        if isinstance(keys, str) or not all(isinstance(key, str) and _is_token(key) for key in keys):
            raise ValueError(f"baggage_keys must be names, not {keys!r}")
        if self.on_call is not None and not callable(self.on_call):
            raise ValueError(f"on_call must be a function, not {self.on_call!r}")
        if inspect.iscoroutinefunction(self.on_call):
            raise ValueError(f"on_call must not be a coroutine function, as {self.on_call!r} is")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Config:
        """Return the settings from the environment.

        An invalid value does not raise. One warning names all invalid variables, and their defaults are used.
        """
        values: dict[str, Any] = {}
        invalid: list[str] = []
        for field in fields(cls):
            variable = _PREFIX + field.name.upper()
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                value = _PARSERS[field.name if field.default is None else type(field.default)](text)
                cls(**{field.name: value})
                values[field.name] = value
            except ValueError:
                invalid.append(f"{variable} (using {field.default!r})")
        unknown = _unknown_variables(environ)
        if unknown:
            _logger.warning("These settings do not exist: %s", ", ".join(unknown))
        if invalid:
            _logger.warning("These settings have a value that cannot be used: %s", ", ".join(invalid))
        return cls(**values)


def _is_token(key: str) -> bool:
    """Whether the W3C allows this as a key of baggage."""
    return bool(key) and key.isascii() and all(letter.isalnum() or letter in _TOKEN_SIGNS for letter in key)


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables with our prefix that are no settings, each with the one that is most like it."""
    known = {_PREFIX + field.name.upper() for field in fields(Config)}
    unknown = sorted(name for name in environ if name.startswith(_PREFIX) and name not in known)
    return [f"{name}{most_like(name, known)}" for name in unknown]


def most_like(name: str, known: Iterable[str]) -> str:
    """Return ` (use ...)` with the name that is most like this one, or nothing if none is."""
    from difflib import get_close_matches  # only after a mistake

    matches = get_close_matches(name, known, n=1)
    return f" (use {matches[0]})" if matches else ""


def _parse_bool(text: str) -> bool:
    word = text.lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError(text)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class NamedFunction:
    """A function that is given by its name. It is imported when it is called first."""

    def __init__(self, name: str) -> None:
        module, _, path = (part.strip() for part in name.partition(":"))
        # The name of a module need not be an identifier: `my-app` can be imported.
        if not (all(module.split(".")) and all(map(str.isidentifier, path.split(".")))):
            raise ValueError(name)
        self.__module__, self.__qualname__ = module, path
        self._function: Callable[[CallRecord], object] | None = None
        self._failure: Exception | None = None

    def load(self) -> Callable[[CallRecord], object]:
        """Import the function, and return it. A module that cannot be imported is not tried again."""
        if self._function is None:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            try:
                function: Any = _module_with(self.__module__, self.__qualname__.partition(".")[0])
            except Exception as error:
                self._failure = error
                raise
            for name in self.__qualname__.split("."):
                function = getattr(function, name)
            self._function = function
        assert self._function is not None  # noqa: S101  # set above
        return self._function

    def __call__(self, record: CallRecord) -> object:
        return self.load()(record)


def _module_with(module: str, name: str) -> Any:
    """Return the module, with this name in it as soon as it has it."""
    loaded = sys.modules.get(module)
    if hasattr(loaded, name):
        return loaded  # its import may not have ended, and may even wait for this function
    if loaded is None:
        # Python calls the program that runs `__main__`. Imported by its name, it would run a second time.
        program = getattr(sys.modules.get("__main__"), "__file__", None)
        found = importlib.util.find_spec(module)
        if program and found and found.origin and os.path.realpath(program) == os.path.realpath(found.origin):
            return sys.modules["__main__"]
    return importlib.import_module(module)


# By the type of the default, or by the name of a setting without default.
_PARSERS: Final[dict[type | str, Callable[[str], Any]]] = {
    "on_call": NamedFunction,
    tuple: _parse_names,
    bool: _parse_bool,
    int: int,
    float: float,
    str: str.lower,
}
