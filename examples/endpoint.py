"""Why an OTLP endpoint does not accept what is sent to it: the likely cause, found by one connection."""

from __future__ import annotations

import socket
import ssl
from urllib.parse import urlsplit

TIMEOUT_S = 1.0
HTTP2_SETTINGS, TLS_ALERT = b"\x04", b"\x15\x03"


def likely_cause(endpoint: str, protocol: str) -> str:
    """Return a sentence that says what is wrong at the endpoint, and what to do if that is known.

    Args:
        endpoint: The value of `OTEL_EXPORTER_OTLP_ENDPOINT`.
        protocol: The value of `OTEL_EXPORTER_OTLP_PROTOCOL`, or its default.

    """
    if "://" not in endpoint:
        return f"The endpoint has no scheme: write http://{endpoint}."
    try:
        url = urlsplit(endpoint)
        port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    except ValueError as error:
        return f"The endpoint is no URL: {error}."
    host = url.hostname or ""
    try:
        said = _answer(host, port, f"{url.path.rstrip('/')}/v1/traces", tls=url.scheme == "https")
    except ConnectionRefusedError:
        hint = "" if url.port else " The endpoint has no port; OTLP's are 4317 for gRPC and 4318 for HTTP."
        return f"Nothing listens on port {port} of {host}. Is the receiver running?{hint}"
    except socket.gaierror:
        return f"There is no host {host}."
    except TimeoutError:
        return f"Port {port} of {host} did not answer within {TIMEOUT_S:.0f} s."
    except ssl.SSLCertVerificationError as error:
        return f"The certificate of {host} is not trusted: {error.verify_message}."
    except ssl.SSLError:
        return f"Port {port} of {host} does not speak TLS: write http:// instead of https://."
    except OSError as error:
        return f"The connection to port {port} of {host} failed: {error}."
    return _verdict(said, port, protocol)


def _answer(host: str, port: int, path: str, *, tls: bool) -> bytes:
    """The first bytes of the answer to an empty export over HTTP/1.1."""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-protobuf\r\n"
        "Content-Length: 0\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection((host, port), TIMEOUT_S) as plain:
        connection = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if tls else plain
        connection.settimeout(TIMEOUT_S)
        connection.sendall(request.encode())
        return connection.recv(64)


def _verdict(said: bytes, port: int, protocol: str) -> str:
    if said.startswith(TLS_ALERT):
        return f"Port {port} speaks TLS: write https:// instead of http://."
    if said[3:4] == HTTP2_SETTINGS:
        if protocol != "grpc":
            return f"Port {port} speaks gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use the port for HTTP."
        return f"Port {port} speaks gRPC, but no OTLP receiver answers there."
    if not said.startswith(b"HTTP/1."):
        return f"Port {port} speaks neither HTTP nor gRPC."
    if protocol == "grpc":
        advice = "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use the port for gRPC"
        return f"Port {port} speaks HTTP: {advice}."
    match said.split()[1].decode():
        case "401" | "403" as status:
            return f"The server wants credentials (HTTP {status}): see OTEL_EXPORTER_OTLP_HEADERS."
        case "404" | "405" as status:
            return f"There is no OTLP receiver at this address (HTTP {status})."
        case status:
            return f"The server answers with HTTP {status}."
