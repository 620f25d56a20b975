"""Checks of whether telemetry arrives: the address of the endpoint, and what the exporters delivered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

from .findings import Area, Finding, Level, find, fine
from .network import Answer, Service, ask
from .report import Export, Exporter
from .set_up import PROTOCOLS, SIGNALS, protocol_of
from .situation import Situation, clean_url, in_container

_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PORTS: Final = {"grpc": 4317, "http/protobuf": 4318}
_OTHER_PROTOCOL: Final = {4317: "http/protobuf", 4318: "grpc"}
_CODE: Final = re.compile(r"(?:code: |Transient error )(?:StatusCode\.)?([1-5]\d\d|[A-Z_]{5,})\b")
_UNAUTHORIZED: Final = frozenset({"401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED"})
_NOT_FOUND: Final = frozenset({"404", "405", "UNIMPLEMENTED"})
_NO_STATUS: Final = frozenset({"", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN"})
_MAX_MESSAGE: Final = 300


@dataclass(frozen=True)
class Destination:
    """Where a signal is sent to.

    Attributes:
        signal: `traces` or `metrics`.
        protocol: The protocol of OTLP.
        url: The endpoint as it is used.
        variable: The variable that it is from. `None` if it is the default, or from the code.

    """

    signal: str
    protocol: str
    url: str
    variable: str | None

    @property
    def has_scheme(self) -> bool:
        """Whether the address begins with a scheme."""
        return self.url.startswith(("http://", "https://"))

    @property
    def tls(self) -> bool:
        """Whether the exporter uses TLS."""
        return not self.url.startswith("http://")

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port. `None` if the address cannot be read."""
        default = _PORTS["grpc"] if self.protocol == "grpc" else (443 if self.tls else 80)
        try:
            parts = urlsplit(self.url if "://" in self.url else f"//{self.url}")
            port = parts.port or default
        except ValueError:
            return None
        return (parts.hostname, port) if parts.hostname else None

    @property
    def host(self) -> str:
        """Host and port, as a text."""
        return "{}:{}".format(*self.address) if self.address is not None else str(self)

    @property
    def written(self) -> str:
        """The address as it is in the variable."""
        added = (
            f"/v1/{self.signal}" if self.protocol == "http/protobuf" and self.variable == _ENDPOINT else ""
        )
        return clean_url(self.url.removesuffix(added))

    @property
    def path(self) -> str:
        """The path of the address."""
        try:
            return urlsplit(self.url if "://" in self.url else f"//{self.url}").path.rstrip("/")
        except ValueError:
            return ""

    def __str__(self) -> str:
        return clean_url(self.url)


def destinations(situation: Situation) -> list[Destination]:
    """Return where the signals are sent to: by the exporters of the process, else by the environment."""
    exporters = [one for one in situation.report.exporters if one.protocol is not None]
    if exporters:
        return [_of_exporter(situation, exporter) for exporter in exporters]
    found = []
    for signal in SIGNALS:
        if situation.zero_code and not _uses_otlp(situation, signal):
            continue
        protocol = protocol_of(situation, signal)
        if protocol in PROTOCOLS:
            found.append(_of_variables(situation, signal, protocol))
    return found


def _uses_otlp(situation: Situation, signal: str) -> bool:
    names = situation.value(f"OTEL_{signal.upper()}_EXPORTER").lower()
    return not names or any(name.strip().startswith("otlp") for name in names.split(","))


def _of_exporter(situation: Situation, exporter: Exporter) -> Destination:
    protocol = exporter.protocol or "grpc"
    by_variables = _of_variables(situation, exporter.signal, protocol)
    url = exporter.endpoint or by_variables.url
    if protocol == "grpc" and "://" not in url:  # this exporter keeps host and port only
        if urlsplit(by_variables.url).netloc == url or by_variables.url == url:
            return by_variables
        url = f"{'http' if exporter.insecure else 'https'}://{url}"
    is_same = url.startswith(by_variables.url.rstrip("/"))
    return Destination(exporter.signal, protocol, url, by_variables.variable if is_same else None)


def _of_variables(situation: Situation, signal: str, protocol: str) -> Destination:
    own = f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"
    variable = next((name for name in (own, _ENDPOINT) if situation.value(name)), None)
    default = f"http://localhost:{_PORTS[protocol]}"
    url = situation.value(variable) if variable is not None else default
    if protocol == "http/protobuf" and variable != own:
        url = f"{url.rstrip('/')}/v1/{signal}"
    return Destination(signal, protocol, url, variable)


# --- the address


def check_endpoints(situation: Situation) -> Iterator[Finding]:
    """Check the addresses as they are written."""
    told = set()
    for destination in destinations(situation):
        for finding in _check_endpoint(situation, destination):
            if finding not in told:
                told.add(finding)
                yield finding
    for variable in (
        "OTEL_EXPORTER_OTLP_HEADERS",
        *(f"OTEL_EXPORTER_OTLP_{s.upper()}_HEADERS" for s in SIGNALS),
    ):
        parts = [part.strip() for part in situation.value(variable).split(",") if part.strip()]
        wrong = [number for number, part in enumerate(parts, 1) if not re.fullmatch(r"[^=\s:]+\s*=.*", part)]
        if wrong:
            numbers = ", ".join(map(str, wrong))
            yield find("headers-invalid", f"{variable}: part {numbers} of {len(parts)} is not name=value.")


def _check_endpoint(situation: Situation, destination: Destination) -> Iterator[Finding]:
    source, written = destination.variable or "The endpoint", destination.written
    if destination.address is None:
        yield find("endpoint-invalid", f"{source} is {written}.")
        return
    if not destination.has_scheme:
        yield find("endpoint-scheme", f"{source} is {written}, without http:// or https://.")
    elif destination.protocol == "grpc" and destination.path:
        yield find("endpoint-path-ignored", f"{source} is {written}, and the protocol is grpc.")
    expected = f"/v1/{destination.signal}"
    if destination.protocol == "http/protobuf" and destination.variable is not None:
        if destination.path.count("/v1/") > 1:
            yield find("endpoint-path", f"{source} is {written}: /v1/... is added to it once more.")
        elif destination.variable != _ENDPOINT and not destination.path:
            yield find("endpoint-path", f"{source} is {written}, and {expected} is not added to it.")
    is_secured = destination.url.startswith("https://")
    if is_secured and situation.value("OTEL_EXPORTER_OTLP_INSECURE").lower() == "true":
        yield find("insecure-ignored", f"OTEL_EXPORTER_OTLP_INSECURE is true, and {source} is https.")
    proxy = _proxy_of(situation, destination)
    if proxy is not None:
        yield find("proxy", f"Exports to {destination.host} go through the proxy of {proxy}.")


def _proxy_of(situation: Situation, destination: Destination) -> str | None:
    """Return the variable of the proxy that an exporter uses."""
    assert destination.address is not None  # noqa: S101  # checked before
    host, port = destination.address
    lowered = {name.lower(): value for name, value in situation.environ.items() if value}
    names = ["https_proxy" if destination.tls else "http_proxy", "all_proxy"]
    if destination.protocol == "grpc":
        names = ["grpc_proxy", "https_proxy", "http_proxy"]
    proxy = next((name for name in names if lowered.get(name)), None)
    if proxy is None:
        return None
    return None if _is_exempt(host, port, lowered.get("no_proxy", "")) else proxy


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Whether a list of hosts that need no proxy has this one, or a domain that it belongs to."""
    for entry in (part.strip().lower().lstrip(".") for part in no_proxy.split(",")):
        if entry and (entry in {"*", host, f"{host}:{port}"} or host.endswith(f".{entry}")):
            return True
    return False


# --- the exports


def check_delivery(situation: Situation) -> Iterator[Finding]:
    """Check what the exporters delivered. Where they failed, find out why."""
    if situation.run is None or not situation.report.all_processes:
        return
    asked: dict[tuple[object, ...], Service] = {}
    found: dict[str, list[tuple[str, Finding]]] = {}
    for signal in SIGNALS:
        for finding in _check_signal(situation, signal, asked):
            name = f"delivered-{signal}" if finding.level is Level.OK else finding.name
            found.setdefault(name, []).append((signal, finding))
    for same in found.values():
        signals = " and ".join(signal for signal, _ in same).capitalize()
        finding = same[0][1]
        yield finding if finding.level is Level.OK else replace(finding, found=f"{signals}: {finding.found}")


def _check_signal(
    situation: Situation, signal: str, asked: dict[tuple[object, ...], Service]
) -> Iterator[Finding]:
    export = situation.report.exports(signal)
    exporters = [one for one in situation.report.exporters if one.signal == signal]
    if export is None:
        if not situation.report.exporters:  # nothing is set up: at least say whether there is an endpoint
            yield from _diagnose(situation, signal, None, asked)
        elif exporters and situation.is_trial and not (signal == "traces" and _is_unsampled(situation)):
            causes = list(_diagnose(situation, signal, None, asked))  # the exporter has not given up yet
            yield from causes or [find("delivery-late", "The export was not over in time.")]
        elif exporters and not situation.is_trial:
            yield find("delivery-untried", "Nothing was exported.")
        return
    if export.delivered and not export.failed:
        name = "span" if signal == "traces" else "metric"
        where = ", ".join(sorted({str(one) for one in destinations(situation) if one.signal == signal}))
        what = f"A test {name} was" if situation.is_trial else f"{signal.capitalize()} were"
        is_otlp = any(one.protocol for one in exporters)
        yield fine(Area.DELIVERY, signal, f"{what} delivered to {where if is_otlp else exporters[0].name}.")
        return
    yield from _diagnose(situation, signal, export, asked)


def _is_unsampled(situation: Situation) -> bool:
    return any(not facts["recorded"] for facts in situation.report.all("span"))


def _diagnose(
    situation: Situation, signal: str, export: Export | None, asked: dict[tuple[object, ...], Service]
) -> Iterator[Finding]:
    """Find out why a signal is not delivered."""
    status = _status_of(export)
    for destination in (one for one in destinations(situation) if one.signal == signal):
        if destination.address is None:
            continue
        if status not in _NO_STATUS and export is not None:
            yield from _explain_status(destination, export, status)
            continue
        key = (*destination.address, destination.tls)
        if key not in asked:
            certificate = situation.first_of(
                f"OTEL_EXPORTER_OTLP_{signal.upper()}_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"
            )
            asked[key] = ask(*destination.address, prefers_tls=destination.tls, authority=certificate or None)
        causes = list(_explain_service(destination, asked[key]))
        proxy = _proxy_of(situation, destination)
        if not causes and export is not None:
            message = (export.messages or ("It gave no message.",))[0][:_MAX_MESSAGE]
            if proxy is not None:
                told = f"{destination.host} answers, and through the proxy of {proxy} it is not reached."
                causes.append(find("proxy-failed", told))
            else:
                causes.append(find("delivery-failed", f"{destination}. {message}"))
        yield from causes


def _status_of(export: Export | None) -> str:
    """Return the last status that the endpoint answered with, if there was one."""
    messages = export.messages if export is not None else ()
    codes = [code for message in messages for code in _CODE.findall(message)]
    # An exporter over HTTP that tries again logs the words of the status only.
    phrases = {f"Transient error {status.phrase} ": str(status.value) for status in HTTPStatus}
    codes += [code for phrase, code in phrases.items() if any(phrase in message for message in messages)]
    known = [code for code in codes if code not in _NO_STATUS]
    return str(known[-1]) if known else ""


def _explain_status(destination: Destination, export: Export, status: str) -> Iterator[Finding]:
    told = f"{destination}: {_with_article(status)}."
    if status in _UNAUTHORIZED:
        yield find("delivery-unauthorized", told)
    elif status in _NOT_FOUND:
        yield find("delivery-not-found", told)
    else:
        message = (export.messages or ("",))[-1]
        yield find("delivery-rejected", f"{told} {message[:_MAX_MESSAGE]}".rstrip())


def _with_article(status: str) -> str:
    return f"HTTP status {status}" if status.isdecimal() else f"gRPC status {status}"


def _explain_service(destination: Destination, service: Service) -> Iterator[Finding]:
    assert destination.address is not None  # noqa: S101  # checked before
    host, port = destination.address
    where, answer = destination.host, service.answer
    if answer is Answer.UNRESOLVED:
        yield find("endpoint-unresolved", f"The host name {host} is not known.")
    elif answer is Answer.REFUSED:
        is_own = host in {"localhost", "127.0.0.1", "::1"}
        hint = " This process runs in a container." if is_own and in_container() else ""
        yield find("endpoint-refused", f"Nothing listens at {where}.{hint}")
    elif answer is Answer.UNREACHABLE:
        yield find("endpoint-silent", f"There is no connection to {where}.")
    elif service.tls and not destination.tls:
        yield find("tls-expected", f"{where} speaks TLS, and the endpoint is {destination}.")
    elif destination.tls and not service.tls and answer in {Answer.HTTP1, Answer.HTTP2}:
        yield find("tls-unexpected", f"{where} does not speak TLS, and the endpoint is {destination}.")
    elif service.certificate_error:
        yield find("certificate", f"The certificate of {where}: {service.certificate_error}.")
    elif answer is Answer.SILENT:
        yield find("endpoint-silent", f"{where} takes connections, and does not answer.")
    if answer is Answer.HTTP1 and destination.protocol == "grpc":
        yield _mismatch(destination, "http/protobuf")
    elif answer is Answer.HTTP2 and destination.protocol == "http/protobuf" and not service.tls:
        yield _mismatch(destination, "grpc")
    elif answer not in {Answer.HTTP1, Answer.HTTP2} and _OTHER_PROTOCOL.get(port) == destination.protocol:
        protocol = destination.protocol
        yield find(
            "protocol-mismatch", f"The protocol is {protocol}, and {port} is the port of the other one."
        )


def _mismatch(destination: Destination, spoken: str) -> Finding:
    told = f"The protocol is {destination.protocol}, and {destination.host} speaks {spoken}."
    return find("protocol-mismatch", told)
