"""Checks of variables: those of this package, and those of OpenTelemetry that change what arrives."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import pkgutil
from collections.abc import Iterator
from dataclasses import fields
from typing import Final

from ..._config import Config
from .findings import Finding, find
from .situation import Situation, nearest

_PREFIX: Final = "OTEL_RESPONSES_USAGE_"
_CONVENTIONS: Final = frozenset({"gen_ai_latest_experimental", "gen_ai_latest_experimental/dup"})
_SAMPLERS: Final = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "parentbased_")
    for name in ("always_on", "always_off", "traceidratio")
)
_TEMPORALITIES: Final = frozenset({"cumulative", "delta", "lowmemory"})
_LOWEST_COUNT: Final = 64
_LOWEST_LENGTH: Final = 128
_SHORT_INTERVAL_MS: Final = 500
_LONG_INTERVAL_MS: Final = 120_000
_LONG_TIMEOUT_S: Final = 1000
# Variables of OpenTelemetry that no installed module has to name.
_KNOWN: Final = frozenset(
    {
        "OTEL_SERVICE_NAME",
        "OTEL_SEMCONV_STABILITY_OPT_IN",
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT",
        "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST",
        "OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH",
        "OTEL_PYTHON_EXCLUDED_URLS",
        "OTEL_PYTHON_LOG_CORRELATION",
        "OTEL_PYTHON_LOG_LEVEL",
        "OTEL_PYTHON_LOG_FORMAT",
        "OTEL_PYTHON_LOGGING_AUTO_INSTRUMENTATION_ENABLED",
        "OTEL_LOG_LEVEL",
    }
)
_VARIABLE_MODULES: Final = (
    "opentelemetry.environment_variables",
    "opentelemetry.sdk.environment_variables",
    "opentelemetry.instrumentation.environment_variables",
)


def check_own_settings(situation: Situation) -> Iterator[Finding]:
    """Check the variables of this package."""
    known = {_PREFIX + field.name.upper(): field for field in fields(Config)}
    logger = logging.getLogger("otel_responses_usage._config")
    for name in sorted(situation.environ):
        if not name.startswith(_PREFIX) and not name.startswith("OTEL_RESPONSE_USAGE_"):
            continue
        if name not in known:
            close = nearest(name, known)
            hint = f" The nearest name is {close}." if close else ""
            yield find("setting-unknown", f"There is no setting {name}.{hint}")
            continue
        logger.disabled = True  # its warning is the finding
        value = getattr(Config.from_env({name: situation.environ[name]}), known[name].name)
        logger.disabled = False
        if value == known[name].default and not _is_default(situation.value(name), value):
            yield find(
                "setting-invalid", f"{name} has a value that cannot be used. The default is {value!r}."
            )
        elif name == f"{_PREFIX}ON_CALL" and not _has_module(situation.value(name)):
            yield find("setting-invalid", f"{name} names a module that is not there.")
        elif name == f"{_PREFIX}RETRIEVAL" and value is False:
            yield find("look-up-off", f"{name} is false.")


def _has_module(name: str) -> bool:
    """Whether the module of a function is there. Only its package is imported."""
    try:
        return not name or importlib.util.find_spec(name.partition(":")[0]) is not None
    except (ImportError, ValueError):
        return False


def _is_default(text: str, value: object) -> bool:
    """Whether a text is empty, or means the default."""
    if not text:
        return True
    if isinstance(value, bool):
        return text.lower() in ({"true", "1", "yes", "on"} if value else {"false", "0", "no", "off"})
    with contextlib.suppress(ValueError):
        if isinstance(value, int):
            return int(text) == value
        if isinstance(value, float):
            return float(text) == value
    return text.lower() == str(value)


def check_names(situation: Situation) -> Iterator[Finding]:
    """Check the names of the variables of OpenTelemetry, and whether a value is in quotation marks."""
    known = set(_KNOWN)
    for module in _variable_modules():
        known |= {name for name in vars(module) if name.startswith("OTEL_")}
        known |= {str(value) for name, value in vars(module).items() if name.startswith("_OTEL_")}
    for name in sorted(situation.environ):
        value = situation.value(name)
        if name.startswith(("OTEL_", "OPENAI_")) and value[:1] in {'"', "'"}:
            yield find("variable-quoted", f"The value of {name} begins with a quotation mark.")
        if (
            name in known
            or not name.startswith(("OTEL", "OLTP_", "OTLP_"))
            or name.startswith("OTEL_RESPONSE")
        ):
            continue
        close = nearest(name, known, 0.9)
        if close is not None and not _is_another(name, close):
            yield find("variable-unknown", f"{name} is no variable of OpenTelemetry. {close} is one.")


def _is_another(name: str, close: str) -> bool:
    """Whether two names differ by a word, as variables of two packages do, and not by some letters."""
    ours, theirs = name.split("_"), close.split("_")
    if len(ours) != len(theirs):
        return abs(len("".join(ours)) - len("".join(theirs))) > 1
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if one != other]
    return len(pairs) > 1 or any(nearest(one, [other], 0.6) is None for one, other in pairs)


def _variable_modules() -> Iterator[object]:
    for name in _VARIABLE_MODULES:
        with contextlib.suppress(ImportError):
            yield importlib.import_module(name)
    # Instrumentations have their own. Only modules that do nothing else are imported.
    with contextlib.suppress(Exception):
        package = importlib.import_module("opentelemetry.instrumentation")
        for found in pkgutil.iter_modules(package.__path__, "opentelemetry.instrumentation."):
            with contextlib.suppress(ImportError):
                yield importlib.import_module(f"{found.name}.environment_variables")


def check_conventions(situation: Situation) -> Iterator[Finding]:
    """Check which generation of names is chosen."""
    variable = "OTEL_SEMCONV_STABILITY_OPT_IN"
    for value in filter(None, (part.strip().lower() for part in situation.value(variable).split(","))):
        if value in _CONVENTIONS:
            yield find("conventions-next", f"{variable} has {value}.")
        elif value.startswith(("gen", "ai")):
            yield find("conventions-unknown", f"{variable} has {value}.")


def check_service(situation: Situation) -> Iterator[Finding]:
    """Check that the service has a name."""
    resource = str(situation.state.get("resource") or "")
    if resource and not resource.startswith("unknown_service"):
        return
    if not situation.value("OTEL_SERVICE_NAME") and "service.name=" not in situation.value(
        "OTEL_RESOURCE_ATTRIBUTES"
    ):
        yield find(
            "service-name", "Neither OTEL_SERVICE_NAME nor OTEL_RESOURCE_ATTRIBUTES has a service name."
        )


def check_sampling(situation: Situation) -> Iterator[Finding]:
    """Check how many traces are kept: by the environment, and by the sampler in the process."""
    name = situation.value("OTEL_TRACES_SAMPLER").lower()
    argument = situation.value("OTEL_TRACES_SAMPLER_ARG")
    custom = [] if name in _SAMPLERS or not name else _custom_samplers()
    if name and name not in _SAMPLERS and name not in custom:
        close = nearest(name, _SAMPLERS, 0.6)
        yield find(
            "sampler-unknown",
            f"OTEL_TRACES_SAMPLER is {name}." + (f" {close} is a sampler." if close else ""),
        )
    elif name.endswith("traceidratio"):
        try:
            if not 0 <= float(argument) <= 1:
                raise ValueError(argument)  # noqa: TRY301  # the same as no number
        except ValueError:
            yield find("sampler-unknown", "OTEL_TRACES_SAMPLER_ARG is not a number from 0 to 1.")
            return
    told = str(situation.state.get("sampler") or "")
    share = _share_of(told) if told else _share_of_variables(name, argument)
    if share == 0:
        yield find("sampling-off", f"The sampler is {told or name}.")
    elif share is not None and share < 1:
        yield find("sampling-part", f"The sampler keeps {share:.2%} of the traces.")


def _custom_samplers() -> list[str]:
    from importlib import metadata

    return [entry.name for entry in metadata.entry_points(group="opentelemetry_traces_sampler")]


def _share_of_variables(name: str, argument: str) -> float | None:
    if name.endswith("always_off"):
        return 0.0
    if name.endswith("traceidratio"):
        with contextlib.suppress(ValueError):
            return float(argument)
    return None


def _share_of(described: str) -> float | None:
    """Return the share of root spans that a sampler keeps, by its description."""
    root = described.partition("{root:")[2].partition(",")[0] or described
    if root.startswith("AlwaysOffSampler"):
        return 0.0
    if root.startswith("TraceIdRatioBased{"):
        with contextlib.suppress(ValueError):
            return float(root.partition("{")[2].rstrip("}"))
    return None


def check_metrics(situation: Situation) -> Iterator[Finding]:
    """Check when and how metrics are sent."""
    variable = "OTEL_METRIC_EXPORT_INTERVAL"
    if value := situation.value(variable):
        interval_ms = _number(value)
        if interval_ms is None or interval_ms <= 0:
            yield find("interval-invalid", f"{variable} is not a number above 0.")
        elif interval_ms < _SHORT_INTERVAL_MS:
            yield find("interval-short", f"{variable} is {value}: an export each {interval_ms:g} ms.")
        elif interval_ms > _LONG_INTERVAL_MS:
            yield find("interval-long", f"{variable} is {value}: an export each {interval_ms / 1000:g} s.")
    temporality = situation.value("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE").lower()
    if temporality and temporality not in _TEMPORALITIES:
        close = nearest(temporality, _TEMPORALITIES, 0.5)
        hint = f" The nearest value is {close}." if close else ""
        yield find("temporality-unknown", f"The preference of temporality is {temporality}.{hint}")
    elif temporality in {"delta", "lowmemory"}:
        yield find("temporality-delta", f"The preference of temporality is {temporality}.")
    if "exponential" in situation.value("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION").lower():
        yield find("histogram-exponential", "Histograms are exponential.")
    if situation.value("OTEL_METRICS_EXEMPLAR_FILTER").lower() == "always_off":
        yield find("exemplars-off", "OTEL_METRICS_EXEMPLAR_FILTER is always_off.")


def check_limits(situation: Situation) -> Iterator[Finding]:
    """Check the limits of the SDK for spans, and the timeout of the exporters."""
    for kind, lowest in (("COUNT", _LOWEST_COUNT), ("VALUE_LENGTH", _LOWEST_LENGTH)):
        for variable in (f"OTEL_SPAN_ATTRIBUTE_{kind}_LIMIT", f"OTEL_ATTRIBUTE_{kind}_LIMIT"):
            limit = _number(situation.value(variable))
            if limit is not None and limit < lowest:
                yield find("span-limits", f"{variable} is {limit:g}.")
    for signal in ("", "TRACES_", "METRICS_"):
        timeout_s = _number(situation.value(f"OTEL_EXPORTER_OTLP_{signal}TIMEOUT"))
        if timeout_s is not None and timeout_s >= _LONG_TIMEOUT_S:
            yield find("timeout-unit", f"OTEL_EXPORTER_OTLP_{signal}TIMEOUT is {timeout_s:g} seconds.")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
