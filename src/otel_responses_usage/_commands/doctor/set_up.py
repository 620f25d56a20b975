"""Checks of how OpenTelemetry is set up: by the environment, and in the process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .findings import Area, Finding, find, fine
from .situation import Situation, entry_point_names, installed_version, nearest
from .versions import ENTRY_POINT, INSTRUMENTORS

SIGNALS: Final = ("traces", "metrics")
PROTOCOLS: Final = ("grpc", "http/protobuf")
_PACKAGES: Final = {
    "grpc": "opentelemetry-exporter-otlp-proto-grpc",
    "http/protobuf": "opentelemetry-exporter-otlp-proto-http",
}
_OTLP: Final = {"otlp": None, "otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}
_MAX_WARNINGS: Final = 5
# Warnings that have a finding of their own, or mean nothing.
_EXPECTED: Final = (
    "Configuration of",
    "These settings have a value",
    "These settings do not exist",
    "Attempting to instrument while already instrumented",
    "Exception while exporting",
    "Timeout was exceeded in force_flush",
)


def protocol_of(situation: Situation, signal: str) -> str:
    """Return the protocol of OTLP for a signal, as the environment chooses it."""
    by_exporter = _OTLP.get(situation.value(f"OTEL_{signal.upper()}_EXPORTER"))
    chosen = situation.first_of(
        f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    return by_exporter or chosen or "grpc"


def check_switches(situation: Situation) -> Iterator[Finding]:
    """Check what switches the SDK or this package off."""
    disabled = situation.value("OTEL_SDK_DISABLED").lower()
    if disabled == "true":
        yield find("sdk-disabled", "OTEL_SDK_DISABLED is true.")
    elif disabled not in {"", "false"}:
        yield find("sdk-disabled-unclear", "OTEL_SDK_DISABLED is neither true nor false.")
    if situation.value("OTEL_CONFIG_FILE"):
        yield find("config-file", "OTEL_CONFIG_FILE is set.")
    if not situation.zero_code:
        return
    known = entry_point_names(INSTRUMENTORS)
    names = [name.strip() for name in situation.value("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS").split(",")]
    for name in filter(None, names):
        if name in {"*", ENTRY_POINT}:
            yield find("instrumentation-disabled", f"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS has {name}.")
        elif name not in known:
            close = nearest(name.replace("-", "_"), known, 0.6)
            hint = f" The nearest name is {close}." if close else ""
            yield find("disabled-name-unknown", f"No instrumentation is named {name}.{hint}")
    yield from _check_distro(situation)


def _check_distro(situation: Situation) -> Iterator[Finding]:
    distros = entry_point_names("opentelemetry_distro")
    configurators = entry_point_names("opentelemetry_configurator")
    if not distros or not configurators:
        yield find("distro-missing", "opentelemetry-distro is not installed.")
    for variable, names in (("OTEL_PYTHON_DISTRO", distros), ("OTEL_PYTHON_CONFIGURATOR", configurators)):
        name = situation.value(variable)
        if name and name not in names:
            yield find(
                "distro-unknown", f"{variable} is {name}. Installed: {', '.join(sorted(names)) or 'none'}."
            )


def check_exporters(situation: Situation) -> Iterator[Finding]:
    """Check the variables that choose exporters and protocols."""
    for signal in SIGNALS:
        if situation.zero_code:
            yield from _check_exporter(situation, signal)
        yield from _check_protocol(situation, signal)


def _check_exporter(situation: Situation, signal: str) -> Iterator[Finding]:
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    value = situation.value(variable)
    if value.lower() == "none":
        yield find(f"{signal}-off", f"{variable} is none.")
        return
    known = entry_point_names(f"opentelemetry_{signal}_exporter") | {"otlp"}
    for name in (part.strip() for part in value.split(",")) if value else ():
        if name not in known:
            close = nearest(name.lower(), known, 0.5)
            hint = f" The nearest name is {close}." if close else ""
            yield find("exporter-unknown", f"{variable} has {name or 'an empty name'}.{hint}")
        elif name == "console":
            yield find("exporter-console", f"{variable} has console.")
        elif name == "prometheus":
            yield find("exporter-pull", f"{variable} has prometheus.")


def _check_protocol(situation: Situation, signal: str) -> Iterator[Finding]:
    variables = (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    variable = next((name for name in variables if situation.value(name)), None)
    protocol = protocol_of(situation, signal)
    if protocol not in PROTOCOLS:
        if signal == "traces" or variable == variables[0]:  # one finding for both signals
            yield find("protocol-unknown", f"{variable} is {protocol}.")
        return
    exporter = situation.value(f"OTEL_{signal.upper()}_EXPORTER")
    uses_otlp = situation.zero_code and (not exporter or "otlp" in exporter)
    package = _PACKAGES[protocol]
    if uses_otlp and installed_version(package) is None and signal == "traces":
        advice = f"Install {package}, or `otel-responses-usage[otlp]`."
        others = [other for other in PROTOCOLS if installed_version(_PACKAGES[other]) is not None]
        if others:
            advice = f"Install {package}, or set `OTEL_EXPORTER_OTLP_PROTOCOL={others[0]}`."
        yield find("exporter-missing", f"{package} is not installed, and the protocol is {protocol}.", advice)


def check_process(situation: Situation) -> Iterator[Finding]:
    """Check the providers of the process, and what was logged while they were set up."""
    report, state = situation.report, situation.state
    if situation.run is None or not report.all_processes:
        return
    for failure in report.all("failed"):
        if failure["step"] == "set up":
            yield find("set-up-failed", str(failure["message"]))
    others: list[str] = []
    twice: list[str] = []
    for warning in report.all("warning"):
        message = str(warning["message"])
        if message.startswith("Failed to auto initialize OpenTelemetry"):
            yield find("set-up-failed", message.partition(": ")[2] or message)
        elif message.startswith("Distribution ") and " configuration failed" in message:
            yield find("set-up-failed", message)
        elif message.startswith("Overriding of current"):
            twice.append(message.rpartition("current ")[2].partition(" ")[0])
        elif not message.startswith(_EXPECTED):
            others.append(f"{warning['logger']}: {message}")
    if twice:
        yield find("provider-twice", f"Set once more, and not used: {' and '.join(dict.fromkeys(twice))}.")
    if state:
        yield from _check_providers(situation)
    for message in list(dict.fromkeys(others))[:_MAX_WARNINGS]:
        yield find("log-warning", message)


def _check_providers(situation: Situation) -> Iterator[Finding]:
    state, report = situation.state, situation.report
    is_on = {
        "traces": _is_sdk(state.get("tracer")) or _is_sdk(state.get("tracer_provider"), "TracerProvider"),
        "metrics": _is_sdk(state.get("meter")) or _is_sdk(state.get("meter_provider"), "MeterProvider"),
    }
    if state.get("instrumented"):  # what counts is where our spans and points go
        is_on = {"traces": "span_exporters" in state, "metrics": "metric_exporters" in state}
    made = {signal: [one for one in report.exporters if one.signal == signal] for signal in SIGNALS}
    used = {"traces": state.get("span_exporters"), "metrics": state.get("metric_exporters")}
    if situation.value("OTEL_SDK_DISABLED").lower() == "true":
        return
    unused = [signal for signal in SIGNALS if state.get("instrumented") and made[signal] and not used[signal]]
    for signal in unused:
        yield find(
            "provider-unused", f"A provider for {signal} has an exporter, and gets nothing of this package."
        )
    if not any(is_on.values()):
        if not unused:
            yield find("no-sdk", "There is neither a tracer provider nor a meter provider of the SDK.")
        return
    for signal, name in (("traces", "no-tracer-provider"), ("metrics", "no-meter-provider")):
        if not is_on[signal] and signal not in unused:
            yield find(
                name, f"The {'tracer' if signal == 'traces' else 'meter'} provider is not one of the SDK."
            )
    pulls = [reader for reader in state.get("readers") or () if "Periodic" not in str(reader)]
    for signal in SIGNALS:
        is_off = situation.zero_code and situation.value(f"OTEL_{signal.upper()}_EXPORTER").lower() == "none"
        if (
            is_on[signal]
            and used[signal] == []
            and not made[signal]
            and not is_off
            and not (signal == "metrics" and pulls)
        ):
            yield find("no-exporter", f"The provider for {signal} has no exporter.")
    exporters = ", ".join(f"{one.name} ({one.signal})" for one in report.exporters)
    if exporters:
        yield fine(Area.SET_UP, "providers", f"The SDK is set up, with {exporters}.")


def _is_sdk(name: object, end: str = "") -> bool:
    return str(name).startswith("opentelemetry.sdk.") and str(name).endswith(end)
