"""Switches the instrumentation on and off."""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import wrapt
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]

from . import _fault
from ._call.hooks import Hooks
from ._call.ledger import Ledger
from ._config import Config, most_like
from ._lookup.recovery import Recovery
from ._surfaces import Patches, make_retriever
from ._telemetry import semconv
from ._telemetry.telemetry import Telemetry
from ._version import __version__

SCOPE: Final = "otel_responses_usage"

# The supported versions of the SDK: from the first, below the second.
_MIN_VERSION: Final = (1, 66)
_END_VERSION: Final = (4,)

# Some distributions give all instrumentations a logger provider. This one has no use for it.
_ARGUMENTS: Final = frozenset(
    {
        "config",
        "exclude",
        "logger_provider",
        "meter_provider",
        "request_hook",
        "response_hook",
        "tracer_provider",
    }
)

_HOOKS: Final = frozenset({"exclude", "request_hook", "response_hook"})

_logger = logging.getLogger("otel_responses_usage")


class ResponsesUsageInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # the base class is untyped
    """Instruments the openai SDK: one span per Responses call, with its exact usage.

    `instrument()` has these optional arguments:

    - `tracer_provider`: an `opentelemetry.trace.TracerProvider`. The default is the global one.
    - `meter_provider`: an `opentelemetry.metrics.MeterProvider`. The default is the global one.
    - `config`: a `Config`. The default is read from the environment.
    - `request_hook`: called with the span and a mapping of all parameters of a call, when it begins. The
      parameters contain the prompt.
    - `response_hook`: called with the span and a `CallRecord`, before the span ends.
      If the call has no span of this package, both hooks get a span that is not recorded.
    - `exclude`: called with the mapping of all parameters. If it returns true, the call is not recorded.

    What these functions raise is contained and counted. They run on the threads of the calls. A coroutine
    function is a `ValueError`.

    `uninstrument()` removes the instrumentation. It waits for pending look-ups, up to
    `Config.exit_timeout`. Calling either method twice is allowed. Clients that exist before
    `instrument()` are instrumented, too.
    """

    _ledger: Ledger | None = None
    _patches: Patches | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the supported versions of the SDK."""
        major, minor = _MIN_VERSION
        return (f"openai >= {major}.{minor}, < {_END_VERSION[0]}",)

    def _check_dependency_conflicts(self) -> Any:
        # A fast check of the version. The base class parses all metadata of the SDK, which takes 3 ms.
        version = str(getattr(sys.modules.get("openai"), "__version__", "")).split(".")[:2]
        if all(map(str.isdecimal, version)) and _MIN_VERSION <= tuple(map(int, version)) < _END_VERSION:
            return None
        return super()._check_dependency_conflicts()

    def _instrument(self, **kwargs: Any) -> None:
        _warn_of_unknown(kwargs)
        _refuse_coroutine_functions(kwargs)
        config = kwargs.get("config") or Config.from_env()
        tracer = trace.get_tracer(SCOPE, __version__, kwargs.get("tracer_provider"), semconv.SCHEMA_URL)
        meter = metrics.get_meter(SCOPE, __version__, kwargs.get("meter_provider"), semconv.SCHEMA_URL)
        telemetry = Telemetry(
            tracer, meter, semconv.generations(), config.baggage_keys, kwargs.get("response_hook")
        )
        recovery = Recovery(
            config,
            make_retriever,
            lambda endpoint, change: telemetry.count_circuit(endpoint.address, endpoint.port, change),
        )
        _fault.set_counter(telemetry.count_fault)
        hooks = Hooks(kwargs.get("request_hook"), kwargs.get("exclude"))
        ledger = self._ledger = Ledger(config, telemetry, recovery, hooks)
        patches = self._patches = Patches(ledger, tracer, meter, config.spans)
        for module in patches.modules:
            # Do not import the SDK here: the import takes a second, and not every application needs it.
            wrapt.register_post_import_hook(_import_hook(self, patches), module)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until the usage of every ended call is known or given up on.

        Spans and points are with the providers then. Call `force_flush()` of the providers to export them.

        Args:
            timeout_s: The longest wait, in seconds.

        Returns:
            Whether no usage is pending any more; true if the instrumentation is off.

        """
        return self._ledger is None or self._ledger.flush(timeout_s)

    def _uninstrument(self, **kwargs: Any) -> None:  # noqa: ARG002  # the base class's signature
        patches, self._patches = self._patches, None
        if patches is not None:
            patches.remove()
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.close()
        _fault.set_counter(None)


def _warn_of_unknown(arguments: Collection[str]) -> None:
    unknown = sorted(set(arguments) - _ARGUMENTS)
    if unknown:
        names = ", ".join(f"{name}{most_like(name, _ARGUMENTS)}" for name in unknown)
        _logger.warning("instrument() has no such arguments: %s", names)


def _refuse_coroutine_functions(arguments: Mapping[str, Any]) -> None:
    for name in sorted(_HOOKS & arguments.keys()):
        if inspect.iscoroutinefunction(arguments[name]):
            raise ValueError(f"{name} must not be a coroutine function, as {arguments[name]!r} is")


def _import_hook(instrumentor: ResponsesUsageInstrumentor, patches: Patches) -> Callable[[Any], None]:
    # Import hooks cannot be removed. One of an earlier `instrument()` does nothing, and keeps nothing alive.
    patches_ref = weakref.ref(patches)

    def on_import(module: Any) -> None:
        patches = patches_ref()
        if patches is not None and instrumentor._patches is patches:  # noqa: SLF001
            patches.apply(module.__name__)

    return on_import
