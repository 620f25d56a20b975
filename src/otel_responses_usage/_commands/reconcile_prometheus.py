"""Reads from Prometheus how far our counters grew in each bucket.

`increase()` cannot be used: it extrapolates, and it does not count the first value of a new series. Here a
counter is read as what it is, a number that begins at zero in each process. The growth of a series in a
bucket is the last value in the bucket, minus the last value before. A series without an earlier value counts
from zero. A series that fell has been restarted, and counts from zero again.

Prometheus computes the last value, the smallest value and the number of resets of each bucket, so a long
range needs few numbers. Only a bucket with a reset inside needs its raw samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from .reconcile_facts import CounterRow, TimeRange
from .reconcile_http import CommandError, HTTPStatusError, JSONClient, Parameters

# How far to look back for the value that a counter had before the range.
_LOOKBACK: Final = "1d"

Labels = frozenset[tuple[str, str]]


class _Metric(NamedTuple):
    """A counter: its kind and its generation. A kind `None` depends on the token type."""

    kind: str | None
    is_next_generation: bool = False
    is_of_spans: bool = False


_TOKENS: Final = "gen_ai_client_token_usage"
_INFERENCE: Final = "gen_ai_client_inference"
_CALLS: Final = "openai_responses_calls"

# By name in Prometheus, without `_total`, which some set-ups leave out.
_METRICS: Final = {
    f"{_TOKENS}_sum": _Metric(None),
    f"{_TOKENS}_count": _Metric("requests"),
    f"{_INFERENCE}_operation_input_tokens_sum": _Metric("input_tokens", is_next_generation=True),
    f"{_INFERENCE}_operation_input_tokens_count": _Metric("requests", is_next_generation=True),
    f"{_INFERENCE}_operation_output_tokens_sum": _Metric("output_tokens", is_next_generation=True),
    f"{_INFERENCE}_usage_cache_read_input_tokens": _Metric("cached_tokens"),
    "openai_responses_spans_cached_input_tokens": _Metric("cached_tokens", is_of_spans=True),
    _CALLS: _Metric("calls"),
    "openai_responses_late_usage": _Metric("late"),
    "openai_responses_usage_input_count": _Metric("input_count"),
    "openai_responses_tool_web_search_requests": _Metric("web_searches"),
}
# Those that the windows at the borders of the range need.
_TOKEN_METRICS: Final = frozenset(
    name for name in _METRICS if name.startswith((_TOKENS, f"{_INFERENCE}_operation"))
)

# Labels that say what a call was. All other labels say which process made it.
_OF_CALLS: Final = ("gen_ai_", "openai_", "server_", "error_", "otel_scope_")
_TOKEN_TYPES: Final = {"input": "input_tokens", "output": "output_tokens"}
# Embeddings have a record of their own at the provider.
_OTHER_OPERATIONS: Final = frozenset({"embeddings"})


@dataclass(frozen=True)
class Filter:
    """Which series to compare.

    Attributes:
        provider: The value of `gen_ai.provider.name`. A series without it is compared, too.
        labels: Labels and their values, as in `job` and `shop`.

    """

    provider: str
    labels: Mapping[str, str]

    def takes(self, labels: Mapping[str, str]) -> bool:
        """Return whether a series with these labels is compared."""
        provider = labels.get("gen_ai_provider_name", labels.get("gen_ai_system", self.provider))
        return (
            provider == self.provider
            and labels.get("gen_ai_operation_name") not in _OTHER_OPERATIONS
            and all(labels.get(name, "") == value for name, value in self.labels.items())
        )


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        rows: The growth of the counters.
        has_earlier_samples: Whether any counter had a value before the range.
        has_cached_of_spans: Whether cached tokens come from spans, which can be sampled.

    """

    rows: list[CounterRow]
    has_earlier_samples: bool
    has_cached_of_spans: bool


class _Grown(NamedTuple):
    """The growth of one series, bucket by bucket."""

    metric: _Metric
    labels: dict[str, str]
    growth: list[float]

    @property
    def process(self) -> Labels:
        return frozenset(pair for pair in self.labels.items() if not pair[0].startswith(_OF_CALLS))


class Prometheus:
    """The query API of a Prometheus, or of a server with the same API."""

    def __init__(self, client: JSONClient, note: Callable[[str], None]) -> None:
        self._client = client
        self._note = note

    def read(self, time_range: TimeRange, filter_: Filter, *, tokens_only: bool = False) -> Reading:
        """Return how far the counters grew in each bucket of the range.

        Args:
            time_range: The range. Its bounds need not be those of clock hours.
            filter_: Which series to read.
            tokens_only: Whether to read requests, input and output tokens only.

        """
        wanted = {
            name: metric for name, metric in _METRICS.items() if not tokens_only or name in _TOKEN_METRICS
        }
        # A dot matches any character, so that names are found with dots and with underscores.
        pattern = "|".join(name.replace("_", ".") + "(_total)?" for name in wanted)
        names = self._names(f'{{__name__=~"{pattern}"}}', time_range)
        has_earlier_samples, grown = False, []
        for name in names:
            metric = wanted.get(_plain(name).removesuffix("_total"))
            if metric is None:
                continue  # a server can ignore the selector, and return all names
            before = self._before(name, time_range)
            for raw_labels, growth in self._growth(name, before, time_range):
                labels = {_plain(label): value for label, value in raw_labels if label != "__name__"}
                if filter_.takes(labels):
                    has_earlier_samples |= raw_labels in before
                    grown.append(_Grown(metric, labels, growth))
        rows = [row for one in _one_generation(grown) for row in _rows(one)]
        has_cached_of_spans = any(one.metric.is_of_spans for one in grown)
        return Reading(rows, has_earlier_samples, has_cached_of_spans)

    def _names(self, selector: str, time_range: TimeRange) -> list[str]:
        parameters = [
            ("match[]", selector), ("start", str(time_range.start)), ("end", str(time_range.end)),
        ]  # fmt: skip
        path = "/api/v1/label/__name__/values"
        names = self._data(path, parameters)
        if not isinstance(names, list):
            raise CommandError(f"Prometheus: The answer of {path} has no list of names in `data`.")
        return sorted(str(name) for name in names)

    def _before(self, name: str, time_range: TimeRange) -> dict[Labels, float]:
        query = f"last_over_time({_selector(name)}[{_LOOKBACK}])"
        found = self._result("/api/v1/query", [("query", query), ("time", str(time_range.start))])
        return {
            labels: value
            for labels, series in found
            if (value := _number(series.get("value", (0, "NaN"))[1])) is not None
        }

    def _growth(
        self, name: str, before: Mapping[Labels, float], time_range: TimeRange
    ) -> Iterable[tuple[Labels, list[float]]]:
        bucket = f"{_selector(name)}[{time_range.bucket_s}s]"
        last = self._by_bucket(f"last_over_time({bucket})", time_range)
        smallest = self._by_bucket(f"min_over_time({bucket})", time_range)
        resets = self._by_bucket(f"resets({bucket})", time_range)
        for labels, values in last.items():
            reached = before.get(labels, 0.0)
            growth = [0.0] * time_range.buckets
            for index, value in sorted(values.items()):
                # No series falls below zero, so an unknown number means that it did not fall.
                if resets.get(labels, {}).get(index):
                    samples = self._samples(name, labels, time_range, index)
                    growth[index] = _growth_of(samples, reached)
                elif smallest.get(labels, {}).get(index, reached) < reached:
                    growth[index] = value  # restarted between the two buckets
                else:
                    growth[index] = value - reached
                reached = value
            yield labels, growth

    def _by_bucket(self, query: str, time_range: TimeRange) -> dict[Labels, dict[int, float]]:
        """Return the numbers of a query at the end of each bucket, by series and bucket."""
        first = time_range.start + time_range.bucket_s
        parameters = [
            ("query", query),
            ("start", str(first)),
            ("end", str(time_range.end)),
            ("step", str(time_range.bucket_s)),
        ]
        found: dict[Labels, dict[int, float]] = {}
        for labels, series in self._result("/api/v1/query_range", parameters):
            numbers = {
                round((float(time_s) - first) / time_range.bucket_s): number
                for time_s, text in series.get("values", ())
                if (number := _number(text)) is not None
            }
            found.setdefault(labels, {}).update(numbers)
        return found

    def _samples(self, name: str, labels: Labels, time_range: TimeRange, index: int) -> list[float]:
        query = f"{_selector(name, labels)}[{time_range.bucket_s}s]"
        end = str(time_range.start_of(index + 1))
        for other, series in self._result("/api/v1/query", [("query", query), ("time", end)]):
            if other == labels:  # a selector also finds series with more labels
                return [
                    number for _, text in series.get("values", ()) if (number := _number(text)) is not None
                ]
        raise CommandError(f"Prometheus: The samples of {name} changed during the comparison. Run it again.")

    def _result(self, path: str, parameters: Parameters) -> list[tuple[Labels, dict[str, Any]]]:
        data = self._data(path, parameters)
        try:
            return [
                (frozenset(pair for pair in series["metric"].items() if pair[0] != "__name__"), series)
                for series in data["result"]
            ]
        except (TypeError, KeyError, AttributeError):
            raise CommandError(
                f"Prometheus: The answer of {path} has no list of series in `data.result`."
            ) from None

    def _data(self, path: str, parameters: Parameters) -> Any:
        try:
            answer = self._client.get(path, parameters)
        except HTTPStatusError as error:
            if error.status == 404:
                raise CommandError(f"{error} Is this the address of a Prometheus?") from None
            raise
        if not isinstance(answer, dict) or answer.get("status") != "success":
            raise CommandError("Prometheus: The answer is none of the query API. Is the address right?")
        for warning in answer.get("warnings") or ():
            self._note(f"Prometheus warns: {warning}")
        return answer.get("data")


def _selector(name: str, labels: Iterable[tuple[str, str]] = ()) -> str:
    pairs = [("__name__", name), *sorted(labels)]
    return "{" + ",".join(f"{_quoted_label(label)}={_quoted(value)}" for label, value in pairs) + "}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _quoted_label(label: str) -> str:
    """Quote a label that is no plain word. Prometheus 3 has such labels, and reads them in quotes."""
    return label if label.isascii() and label.replace("_", "a").isalnum() else _quoted(label)


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _growth_of(samples: Iterable[float], reached: float) -> float:
    """Return how far a counter grew over its samples. A fall is a restart from zero."""
    growth = 0.0
    for value in samples:
        growth += value - reached if value >= reached else value
        reached = value
    return growth


def _one_generation(grown: list[_Grown]) -> Iterable[_Grown]:
    """Leave out the next generation of names where a process has today's names, too.

    A process can send both generations, and both have the same tokens. It is decided bucket by bucket.
    The cached tokens have one counter in the next generation and one made of spans. The second is left out
    for a job that has the first.
    """
    current: dict[Labels, set[int]] = defaultdict(set)
    jobs_with_cached: dict[str, set[int]] = defaultdict(set)
    for one in grown:
        buckets = {index for index, growth in enumerate(one.growth) if growth}
        if one.metric.kind in {None, "requests"} and not one.metric.is_next_generation:
            current[one.process] |= buckets
        if one.metric.kind == "cached_tokens" and not one.metric.is_of_spans:
            jobs_with_cached[one.labels.get("job", "")] |= buckets
    for one in grown:
        left_out: set[int] = set()
        if one.metric.is_next_generation:
            left_out = current[one.process]
        elif one.metric.is_of_spans:
            left_out = jobs_with_cached[one.labels.get("job", "")]
        yield one._replace(
            growth=[0.0 if index in left_out else growth for index, growth in enumerate(one.growth)]
        )


def _rows(one: _Grown) -> Iterable[CounterRow]:
    labels = one.labels
    kind = one.metric.kind or _TOKEN_TYPES.get(labels.get("gen_ai_token_type", ""))
    if one.metric.kind == "requests" and labels.get("gen_ai_token_type", "input") != "input":
        kind = None  # a call has one point for input and one for output
    if kind == "calls":
        kind = _kind_of_call(labels)
    if kind is None:
        return
    for index, growth in enumerate(one.growth):
        if growth or kind in {"cached_tokens", "web_searches"}:  # there a zero is not the same as unknown
            yield CounterRow(
                bucket=index,
                kind=kind,
                growth=round(growth),
                request_model=labels.get("gen_ai_request_model") or None,
                response_model=labels.get("gen_ai_response_model") or None,
                reason=labels.get("openai_responses_usage_missing_reason") or None,
            )


def _kind_of_call(labels: Mapping[str, str]) -> str | None:
    """Return the kind of a call that has no usage, or `None` if it has."""
    if labels.get("openai_responses_usage_source"):
        return None
    return "failed" if labels.get("openai_responses_stream_outcome") == "error" else "unmetered"
