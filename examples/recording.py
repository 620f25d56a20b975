"""Telemetry in a file: OTLP as JSON, one request a line, as the Collector's file exporter writes it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict, ParseDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from embedded.otlp_receiver import ReceivedMetric, ReceivedSpan, metrics_of, spans_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from embedded.otlp_receiver import ExportRequest

# OTLP has these in hex, where JSON from Protobuf has bytes in Base64.
IDS = {"traceId", "spanId", "parentSpanId"}


@dataclass(frozen=True)
class Recording:
    """What was recorded: the spans, and each metric by name as it was last exported."""

    spans: list[ReceivedSpan]
    metrics: dict[str, ReceivedMetric]

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read a file."""
        spans: list[ReceivedSpan] = []
        metrics: dict[str, ReceivedMetric] = {}
        for line in path.read_text("utf-8").splitlines():
            told = _with_ids(json.loads(line), _base64_of)
            if "resourceSpans" in told:
                spans += spans_of(ParseDict(told, ExportTraceServiceRequest()))
            else:
                request = ParseDict(told, ExportMetricsServiceRequest())
                metrics.update((metric.name, metric) for metric in metrics_of(request))
        return cls(spans, metrics)


def write(path: Path, requests: Iterable[ExportRequest]) -> None:
    """Write a file with these exports."""
    lines = [
        json.dumps(
            _with_ids(MessageToDict(request, use_integers_for_enums=True), _hex_of), separators=(",", ":")
        )
        for request in requests
    ]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _with_ids(node: Any, convert: Callable[[str], str]) -> Any:
    """The same with each id converted."""
    if isinstance(node, list):
        return [_with_ids(item, convert) for item in node]
    if isinstance(node, dict):
        return {
            name: convert(item) if name in IDS else _with_ids(item, convert) for name, item in node.items()
        }
    return node


def _hex_of(text: str) -> str:
    return base64.b64decode(text).hex()


def _base64_of(text: str) -> str:
    return base64.b64encode(bytes.fromhex(text)).decode()
