"""The check of `--api`: one small call of the real API, left early, and its look-up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Final

from opentelemetry import metrics

from ..._config import Config
from ..._instrumentor import ResponsesUsageInstrumentor
from .findings import Area, Finding, find, fine
from .situation import Situation, clean_url

_MAX_OUTPUT: Final = 16  # the least that the API allows
_PROMPT: Final = "Say: one two three four five six seven eight nine ten."
_LAST_EVENTS: Final = ("response.completed", "response.incomplete", "response.failed")
_LOOK_UP_S: Final = 20.0
_CALL_TIMEOUT_S: Final = 30.0


def announce(situation: Situation, model: str) -> str:
    """Return what the check will do and cost, to be said before it is done."""
    url = clean_url(situation.value("OPENAI_BASE_URL")) or "https://api.openai.com/v1"
    return (
        f"--api sends one request to {url} with the model {model}: about 20 input tokens and at most "
        f"{_MAX_OUTPUT} output tokens are billed. The response is stored (store=True) and looked up."
    )


def check_api(situation: Situation, model: str) -> Iterator[Finding]:
    """Make one streamed call, close it at its first text, and see whether its usage is looked up."""
    if not situation.value("OPENAI_API_KEY"):
        yield find("api-key-missing", "OPENAI_API_KEY is not set.")
        return
    openai = import_module("openai")
    spans: list[Any] = []
    with _instrumented(spans.append):
        try:
            client = openai.OpenAI(max_retries=0, timeout=_CALL_TIMEOUT_S)
            response_id = _call(client, model)
            ResponsesUsageInstrumentor().flush(_LOOK_UP_S)
        except openai.OpenAIError as error:
            yield find("api-failed", _described(error))
            return
    attributes = dict(spans[-1].attributes) if spans else {}
    source = attributes.get("openai_responses.usage.source")
    reason = attributes.get("openai_responses.usage.missing_reason")
    if source == "retrieval":
        yield fine(Area.API, "api", "A stream was closed early, and its usage was looked up.")
    elif source is not None:  # it was over before it could be closed
        yield from _look_up(openai, client, response_id)
    elif reason in {"not_found", "unsupported", "not_stored"}:
        yield find("api-not-stored", f"The look-up ended with {reason}.")
    elif reason == "unauthorized":
        yield find("api-look-up-refused", "The look-up ended with unauthorized.")
    else:
        yield find("api-no-usage", f"The look-up ended with {reason or 'nothing'}.")


def _call(client: Any, model: str) -> str:
    response_id = ""
    with client.responses.create(
        model=model, input=_PROMPT, max_output_tokens=_MAX_OUTPUT, store=True, stream=True
    ) as stream:
        for event in stream:
            if event.type == "response.created":
                response_id = str(event.response.id)
            if event.type.endswith(".delta") or event.type in _LAST_EVENTS:
                break
    return response_id


def _look_up(openai: Any, client: Any, response_id: str) -> Iterator[Finding]:
    try:
        response = client.responses.retrieve(response_id)
    except openai.OpenAIError as error:
        status = getattr(error, "status_code", None)
        name = "api-look-up-refused" if status in {401, 403} else "api-not-stored"
        yield find(name, _described(error))
        return
    if getattr(response, "usage", None) is None:
        yield find("api-no-usage", "The response has no usage.")
    else:
        yield fine(Area.API, "api", "The stream was over at once. Its response can be looked up.")


def _described(error: Exception) -> str:
    """Describe an error of the SDK without its message, which can have a part of the key."""
    status, code = getattr(error, "status_code", None), getattr(error, "code", None)
    told = type(error).__name__ + (f", HTTP status {status}" if status else "")
    return told + (f", {code}" if isinstance(code, str) else "") + "."


@contextlib.contextmanager
def _instrumented(on_span: Callable[[Any], object]) -> Iterator[None]:
    """Instrument this process, with spans that are exported nowhere."""
    sdk = import_module("opentelemetry.sdk.trace")

    class Keeper(sdk.SpanProcessor):  # type: ignore[misc, name-defined]
        def on_end(self, span: Any) -> None:
            on_span(span)

    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Keeper())
    instrumentor = ResponsesUsageInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:  # `doctor` runs under `opentelemetry-instrument`
        instrumentor.uninstrument()
    config = Config(retrieval_timeout=_LOOK_UP_S, grace_timeout=0.0)
    instrumentor.instrument(
        tracer_provider=provider, meter_provider=metrics.NoOpMeterProvider(), config=config
    )
    try:
        yield
    finally:
        instrumentor.uninstrument()
