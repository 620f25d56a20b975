"""What the instrumentation has told: spans and points, exactly as an exporter would get them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

# What is to happen soon: a busy machine may take many times as long as an idle one.
PATIENCE_S = 60.0
# A process that takes longer hangs.
HANGING_S = 300.0


def eventually(holds: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Wait until `holds()` is true and return it; fail after a while."""
    deadline = time.monotonic() + timeout_s
    while not (value := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s} s still not: {what}")
        time.sleep(0.002)
    return value


class Observed:
    """A pair of SDK providers that keep what they are given."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meter_provider = MeterProvider([self._metrics], shutdown_on_exit=False)

    def spans(self, count: int = 1, timeout_s: float = PATIENCE_S) -> list[ReadableSpan]:
        """Wait for `count` finished spans; more than that are a failure."""
        eventually(lambda: len(self._spans.get_finished_spans()) >= count, f"{count} spans", timeout_s)
        spans = list(self._spans.get_finished_spans())
        assert len(spans) == count, [span.name for span in spans]
        return spans

    def span(self, timeout_s: float = PATIENCE_S) -> ReadableSpan:
        """Wait for the one span there is."""
        return self.spans(1, timeout_s)[0]

    @property
    def finished(self) -> int:
        """Spans that have been exported so far."""
        return len(self._spans.get_finished_spans())

    def points(self, name: str) -> list[Any]:
        """The data points of one instrument, in the order in which the SDK lists them."""
        data = self._metrics.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def tokens(self) -> dict[str, tuple[int, int]]:
        """By token type: how many points were recorded, and their sum."""
        totals: dict[str, tuple[int, int]] = {}
        for point in self.points("gen_ai.client.token.usage"):
            kind = point.attributes["gen_ai.token.type"]
            count, total = totals.get(kind, (0, 0))
            totals[kind] = (count + point.count, total + point.sum)
        return totals

    def calls(self) -> dict[str, int]:
        """Calls counted, by where their usage came from or why it is missing."""
        counted: dict[str, int] = {}
        for point in self.points("openai_responses.calls"):
            known = point.attributes.get("openai_responses.usage.source")
            key = known or point.attributes["openai_responses.usage.missing_reason"]
            counted[key] = counted.get(key, 0) + point.value
        return counted

    def told(self) -> Iterator[tuple[str, str]]:
        """Everything that would be exported, as text."""
        for span in self._spans.get_finished_spans():
            yield span.name, span.to_json()
        data = self._metrics.get_metrics_data()
        if data is not None:
            yield "metrics", data.to_json()

    def pending(self) -> int:
        """Spans held open for their usage."""
        return sum(point.value for point in self.points("openai_responses.pending"))


def usage_attributes(usage: dict[str, Any]) -> dict[str, int]:
    """The span attributes that this usage, in the API's shape, stands for."""
    inputs = usage.get("input_tokens_details") or {}
    outputs = usage.get("output_tokens_details") or {}
    values = {
        "gen_ai.usage.input_tokens": usage.get("input_tokens"),
        "gen_ai.usage.output_tokens": usage.get("output_tokens"),
        "gen_ai.usage.cache_read.input_tokens": inputs.get("cached_tokens"),
        "gen_ai.usage.cache_write.input_tokens": inputs.get("cache_write_tokens"),
        "gen_ai.usage.reasoning.output_tokens": outputs.get("reasoning_tokens"),
    }
    main_names = ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
    # The conventions leave out a detail of zero.
    return {name: value for name, value in values.items() if value or (value == 0 and name in main_names)}


def token_attributes(span: ReadableSpan) -> dict[str, Any]:
    """The token counts on a span."""
    return {
        name: value for name, value in (span.attributes or {}).items() if name.startswith("gen_ai.usage.")
    }
