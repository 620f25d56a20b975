"""How each neighbour is set up, switched on and off."""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recorder import Recorder

# The server holds the stream of a scenario with one of these words in its name open after some events.
EARLY_WORDS = ("closed", "left", "cancelled")


def is_early(scenario: str) -> bool:
    """Whether a stream ends early in this scenario."""
    return any(word in scenario for word in EARLY_WORDS)


class Neighbour:
    """One neighbour, or one variant of it."""

    distribution = ""
    other_name = ""  # what people call it, if that is another name
    also = ("openai", "opentelemetry-sdk")  # what else the versions are printed of
    instrumentor = ""  # module:class, where there is one
    entry_point = True  # `opentelemetry-instrument` switches it on
    theirs_first = True  # it makes a difference who is first
    can_be_off = False
    makes_spans = True
    makes_inferences = True  # it has spans of inferences
    async_only = False  # it sees no call of the sync client
    # Its inference span is current during every call. So it is known beside whose span a call is made.
    makes_current = False
    framework = ""  # its scenarios are in `frameworks`

    @classmethod
    def orders(cls) -> tuple[str, ...]:
        """The orders of switching on."""
        both = ("ours first", "theirs first") if cls.theirs_first else ("ours first",)
        return (*both, "zero-code") if cls.entry_point else both

    def __init__(self, recorder: Recorder, url: str) -> None:
        self.recorder = recorder
        self.url = url
        self.extra = ExitStack()
        self.clients: tuple[Any, ...] = ()  # used by all scenarios, instead of a client for each

    def set_up(self, **settings: bool) -> None:
        """Set providers, before anything is on."""
        self.recorder.set_providers(**settings)

    def on(self) -> None:
        """Switch it on."""
        if self.instrumentor:
            self._instrumentor().instrument()

    def off(self) -> None:
        """Switch it off."""
        if self.instrumentor:
            self._instrumentor().uninstrument()
        self.extra.close()

    def client(self, **options: Any) -> Any:
        """A client of the application."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="k", max_retries=0, **options)

    def async_client(self, **options: Any) -> Any:
        """An async client of the application."""
        import openai

        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="k", max_retries=0, **options)

    def _instrumentor(self) -> Any:
        module, _, name = self.instrumentor.partition(":")
        return getattr(importlib.import_module(module), name)()


class Nothing(Neighbour):
    distribution = "openai"
    makes_inferences = False
    can_be_off = True
    theirs_first = False
    makes_spans = False


class Genai(Neighbour):
    distribution = "opentelemetry-instrumentation-genai-openai"
    instrumentor = "opentelemetry.instrumentation.genai.openai:OpenAIInstrumentor"
    can_be_off = True
    makes_current = True


class OpenLLMetry(Neighbour):
    distribution = "opentelemetry-instrumentation-openai"
    other_name = "OpenLLMetry"
    instrumentor = "opentelemetry.instrumentation.openai:OpenAIInstrumentor"
    can_be_off = True


class OpenInference(Neighbour):
    distribution = "openinference-instrumentation-openai"
    instrumentor = "openinference.instrumentation.openai:OpenAIInstrumentor"
    can_be_off = True
    makes_current = True


class Httpx(Neighbour):
    distribution = "opentelemetry-instrumentation-httpx"
    makes_inferences = False
    instrumentor = "opentelemetry.instrumentation.httpx:HTTPX2ClientInstrumentor"
    can_be_off = True


class HttpxTransport(Neighbour):
    """The same package's transports, which the application gives to its clients."""

    distribution = "opentelemetry-instrumentation-httpx"
    entry_point = False
    theirs_first = False

    def client(self, **options: Any) -> Any:
        import httpx2
        from opentelemetry.instrumentation.httpx import SyncOpenTelemetryTransportHttpx2 as Transport

        return super().client(
            http_client=httpx2.Client(transport=Transport(httpx2.HTTPTransport())), **options
        )

    def async_client(self, **options: Any) -> Any:
        import httpx2
        from opentelemetry.instrumentation.httpx import AsyncOpenTelemetryTransportHttpx2 as Transport

        return super().async_client(
            http_client=httpx2.AsyncClient(transport=Transport(httpx2.AsyncHTTPTransport())), **options
        )


class Aiohttp(Neighbour):
    distribution = "opentelemetry-instrumentation-aiohttp-client"
    makes_inferences = False
    instrumentor = "opentelemetry.instrumentation.aiohttp_client:AioHttpClientInstrumentor"
    async_only = True

    def async_client(self, **options: Any) -> Any:
        import openai

        return super().async_client(http_client=openai.DefaultAioHttpClient(), **options)


class Logfire(Neighbour):
    """Logfire's instrumentation of the SDK's classes."""

    distribution = "logfire"
    entry_point = False
    can_be_off = True
    makes_current = True
    settings: dict[str, Any] = {}  # noqa: RUF012  # never changed

    def set_up(self, **settings: bool) -> None:
        self._given = settings  # Logfire makes the providers, in `on`

    def on(self) -> None:
        self._configure()
        self.extra.enter_context(self._logfire.instrument_openai(**self.settings))

    def _configure(self) -> None:
        import logfire

        self._logfire = logfire
        given = self._given
        logfire.configure(
            send_to_logfire=False,
            console=False,
            inspect_arguments=False,
            additional_span_processors=[self.recorder.processor] if given.get("spans", True) else None,
            metrics=logfire.MetricsOptions(additional_readers=[self.recorder.reader])
            if given.get("points", True)
            else False,
            sampling=logfire.SamplingOptions(head=1.0 if given.get("sampled", True) else 0.0),
        )


class LogfireOpen(Logfire):
    """Logfire without its suppression of other instrumentations."""

    settings = {"suppress_other_instrumentation": False}  # noqa: RUF012


class LogfirePlain(Logfire):
    """Logfire as an exporter, with no instrumentation of its own."""

    can_be_off = False
    makes_spans = False
    makes_current = False

    def on(self) -> None:
        self._configure()


class LogfireClient(Logfire):
    """Logfire's instrumentation of single clients. They exist before anything is on."""

    def set_up(self, **settings: bool) -> None:
        super().set_up(**settings)
        self.clients = super().client(), super().async_client()
        for client in self.clients:
            assert client.responses is not None  # it keeps the client's methods of this moment

    def on(self) -> None:
        self._configure()
        for client in self.clients:
            self.extra.enter_context(self._logfire.instrument_openai(client))

    def client(self, **_options: Any) -> Any:
        return self.clients[0]

    def async_client(self, **_options: Any) -> Any:
        return self.clients[1]


class Langfuse(Neighbour):
    distribution = "langfuse"
    entry_point = False

    def on(self) -> None:
        os.environ |= {"LANGFUSE_PUBLIC_KEY": "pk-lf-k", "LANGFUSE_SECRET_KEY": "sk-lf-k"}
        os.environ |= {"LANGFUSE_BASE_URL": self.url, "LANGFUSE_HOST": self.url}
        from langfuse import Langfuse as Client
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        Client(span_exporter=InMemorySpanExporter())
        importlib.import_module("langfuse.openai")


class Agents(Neighbour):
    distribution = "openinference-instrumentation-openai-agents"
    also = ("openai", "opentelemetry-sdk", "openai-agents")
    instrumentor = "openinference.instrumentation.openai_agents:OpenAIAgentsInstrumentor"
    framework = "agents"


class PydanticAi(Neighbour):
    distribution = "pydantic-ai-slim"
    entry_point = False
    framework = "pydantic_ai"

    def on(self) -> None:
        from pydantic_ai import Agent

        Agent.instrument_all()


class AgentFramework(Neighbour):
    distribution = "agent-framework-core"
    entry_point = False
    framework = "agent_framework"

    def on(self) -> None:
        from agent_framework.observability import enable_instrumentation

        enable_instrumentation()


class Ddtrace(Neighbour):
    distribution = "ddtrace"
    makes_inferences = False
    entry_point = False

    def on(self) -> None:
        os.environ |= {
            "DD_TRACE_STARTUP_LOGS": "false",
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
            "DD_REMOTE_CONFIGURATION_ENABLED": "false",
            "DD_TRACE_AGENT_URL": self.url,
            "DD_APM_TRACING_ENABLED": "true",
        }
        import ddtrace
        from ddtrace.trace import TraceFilter, tracer

        others = self.recorder.others

        class Keep(TraceFilter):
            def process_trace(self, trace: Any) -> None:
                """Note the spans. They are not sent."""
                others.extend(f"ddtrace: {span.name} {span.resource}" for span in trace)

        # There is no agent to send anything to.
        logging.getLogger("ddtrace.internal.writer").setLevel(logging.CRITICAL)
        tracer.configure(trace_processors=[Keep()])
        ddtrace.patch(openai=True)


NEIGHBOURS: dict[str, type[Neighbour]] = {
    "none": Nothing,
    "genai": Genai,
    "openinference": OpenInference,
    "logfire": Logfire,
    "logfire/open": LogfireOpen,
    "logfire/plain": LogfirePlain,
    "logfire/client": LogfireClient,
    "openllmetry": OpenLLMetry,
    "langfuse": Langfuse,
    "agents": Agents,
    "pydantic-ai": PydanticAi,
    "agent-framework": AgentFramework,
    "httpx": Httpx,
    "httpx/transport": HttpxTransport,
    "aiohttp": Aiohttp,
    "ddtrace": Ddtrace,
}
