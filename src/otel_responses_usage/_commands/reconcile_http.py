"""A small HTTP client for JSON, with retries. It needs only the standard library."""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import random
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

from .._version import __version__

_RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})
_MAX_ATTEMPTS: Final = 5
_FIRST_DELAY_S: Final = 0.5
_MAX_DELAY_S: Final = 30.0
_TIMEOUT_S: Final = 60.0
_MAX_BYTES: Final = 256 * 1024 * 1024
_MAX_MESSAGE: Final = 300

Parameters = Sequence[tuple[str, str]]


class CommandError(Exception):
    """The command cannot go on. The message is for the user."""


class HTTPStatusError(CommandError):
    """The server answered with an error status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    # urllib would send the credentials to any host that a redirect names.
    def redirect_request(self, *_: Any) -> None:
        return None


class JSONClient:
    """Sends GET requests to one server, and returns the decoded JSON.

    Error messages never contain credentials.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        bearer: str | None = None,
        basic: tuple[str, str] | None = None,
        needs_tls: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Check the address, and prepare the credentials.

        Args:
            name: What error messages call the server.
            url: The base address. A user and a password in it are used as `basic`.
            bearer: A token for the header `Authorization`.
            basic: A user and a password for the header `Authorization`.
            needs_tls: Whether credentials are sent over https only, except to this machine.
            sleep: Waits between two attempts.

        """
        parts, host = _split(name, url)
        if parts.username and bearer is None and basic is None:
            basic = (unquote(parts.username), unquote(parts.password or ""))
        self._name = name
        # Without user and password: the address is part of error messages.
        self._base = urlunsplit(
            (parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")
        )
        self._headers = {"Accept": "application/json", "User-Agent": f"otel-responses-usage/{__version__}"}
        self._secrets = [secret for secret in (bearer, *(basic or ()), parts.password) if secret]
        if bearer is not None:
            self._headers["Authorization"] = f"Bearer {bearer}"
        elif basic is not None:
            self._headers["Authorization"] = f"Basic {b64encode(':'.join(basic).encode()).decode()}"
        if needs_tls and parts.scheme == "http" and not _is_local(host):
            raise CommandError(f"{name}: {self._base} is not https. The key is not sent unencrypted.")
        if any(
            ord(letter) < ord(" ") or ord(letter) > ord("~") for letter in "".join(self._headers.values())
        ):
            raise CommandError(
                f"{name}: The credentials contain a character that an HTTP header cannot have."
            )
        self._sleep = sleep
        # A proxy cannot reach the loopback addresses of this machine.
        proxies = urllib.request.ProxyHandler({} if _is_local(host) else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirects)

    def get(self, path: str, parameters: Parameters) -> Any:
        """Return the decoded JSON of a GET request.

        It retries up to four times if the connection fails, or if the status is 408, 429 or 5xx. It waits
        as long as `Retry-After` says, at most 30 s.

        Raises:
            HTTPStatusError: The last answer had an error status.
            CommandError: There was no answer, or no JSON.

        """
        url = f"{self._base}{path}?{urlencode(parameters)}"
        delay_s = _FIRST_DELAY_S
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            is_last = attempt == _MAX_ATTEMPTS
            asked_for_s = None
            try:
                return self._send(url)
            except urllib.error.HTTPError as answer:
                with answer:
                    if is_last or answer.code not in _RETRIED:
                        raise self._status_error(answer, path) from None
                    asked_for_s = _retry_after_s(answer.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                if is_last:
                    reason = getattr(error, "reason", error)
                    what = f"{reason}" or type(reason).__name__
                    raise CommandError(
                        self._clean(f"{self._name}: No answer from {self._base}: {what}.")
                    ) from None
            if asked_for_s is None:
                asked_for_s = delay_s * random.uniform(0.75, 1.25)  # noqa: S311  # spreads load, no secret
            self._sleep(min(asked_for_s, _MAX_DELAY_S))
            delay_s *= 2
        raise AssertionError  # the last attempt returns or raises

    def _send(self, url: str) -> Any:
        request = urllib.request.Request(url, headers=self._headers)  # noqa: S310  # _split() checks the scheme
        with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
            body = answer.read(_MAX_BYTES + 1)
        if len(body) > _MAX_BYTES:
            raise CommandError(f"{self._name}: The answer of {self._base} is larger than 256 MiB.")
        try:
            return json.loads(body)
        except ValueError:
            raise CommandError(f"{self._name}: The answer of {self._base} is no JSON.") from None

    def _status_error(self, answer: urllib.error.HTTPError, path: str) -> HTTPStatusError:
        message = f"{self._name}: {self._base}{path} answered {answer.code} {answer.reason or ''}".rstrip()
        try:
            detail = _detail(json.loads(answer.read(_MAX_BYTES)))
        except (ValueError, OSError, http.client.HTTPException):
            detail = None
        # The text about a refused key can repeat a part of the key.
        if detail and answer.code not in {401, 403}:
            message = f"{message}: {detail[:_MAX_MESSAGE]}"
        return HTTPStatusError(self._clean(f"{message.rstrip('.')}."), answer.code)

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return "".join(letter if letter.isprintable() else " " for letter in text)


def _split(name: str, url: str) -> tuple[Any, str]:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"http", "https"}:
        raise CommandError(f"{name}: The address must begin with http:// or https:// and name a host.")
    return parts, host


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _detail(answer: Any) -> str | None:
    """Return the text of an error, as the OpenAI API or Prometheus write it."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else None


def _retry_after_s(value: str | None) -> float | None:
    """Return the seconds that the header `Retry-After` asks for: a number, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def basic_from(environ: Mapping[str, str], user_name: str, password_name: str) -> tuple[str, str] | None:
    """Return the user and the password from two environment variables, or `None` without the first."""
    user = environ.get(user_name)
    return (user, environ.get(password_name, "")) if user else None
