"""What most tests need: providers that keep what they get, the instrumentation on, and a server."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embedded.http_server import ScriptedServer, SeenRequest
from embedded.responses_api import ResponsesAPI
from observed import PATIENCE_S, Observed
from otel_responses_usage import Config, ResponsesUsageInstrumentor

# A shell that runs the tests in the background ignores Ctrl-C, and the processes that they start would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

Instrument = Callable[..., Observed]
Serve = Callable[..., ScriptedServer]


@pytest.fixture
def instrument() -> Iterator[Instrument]:
    """Switch the instrumentation on, with settings of the test's own; it is off again afterwards.

    On a busy machine many look-ups may take longer than the default allows.
    """
    on = []

    def switch_on(observed: Observed | None = None, **settings: Any) -> Observed:
        observed = observed or Observed()
        ResponsesUsageInstrumentor().instrument(
            tracer_provider=observed.tracer_provider,
            meter_provider=observed.meter_provider,
            config=Config(**{"exit_timeout": 0.5, "retrieval_timeout": PATIENCE_S, **settings}),
        )
        on.append(observed)
        return observed

    yield switch_on
    if ResponsesUsageInstrumentor().is_instrumented_by_opentelemetry:
        ResponsesUsageInstrumentor().uninstrument()


@pytest.fixture
def observed(instrument: Instrument) -> Observed:
    """The instrumentation on."""
    return instrument()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server for a handler, or for a plan of the Responses API."""
    servers: list[ScriptedServer] = []

    def start(handler: Callable[[SeenRequest], Any], **how: Any) -> ScriptedServer:
        server = ScriptedServer(handler, **how)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """What was there before the first test of a module is not searched at every collection.

    What its tests have dropped half-used is closed at the end, and not during a test of another module. What
    the interpreter says of that is not about us.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook


@pytest.fixture
def api() -> Callable[..., ResponsesAPI]:
    """The Responses API with plans of the test's own: one for all calls, or one for each in turn."""

    def make(*plans: Any, key: str | None = None) -> ResponsesAPI:
        left = list(plans)
        return ResponsesAPI(lambda _: left.pop(0) if len(left) > 1 else left[0], key=key)

    return make
