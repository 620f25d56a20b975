"""Keeps what the look-up of a call needs until it is known whether there is a look-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._facts.usage import MissingReason
from .._lookup.imports import late_import

if TYPE_CHECKING:
    from ._target import Target


class TargetFactory:
    """Makes the look-up target for a response id. Each open stream has one, and each WebSocket.

    It keeps no reference to the clients: a dropped client must close its connections at once, in its own
    thread. It keeps no reference to the request, which contains the prompt. The default headers belong to
    the clients, and all their streams share them.
    """

    __slots__ = ("_client_class", "_client_headers", "_default_headers", "_headers", "_transport", "_url")

    def __init__(self, client: Any, url: Any, headers: Any) -> None:
        """Keep the URL and the headers of a request, and the transport of its client."""
        http_client = client._client  # noqa: SLF001
        choose = getattr(http_client, "_transport_for_url", None)
        self._transport = choose(url) if choose is not None else None
        self._client_class = type(http_client)
        self._url = url
        self._headers = headers
        self._default_headers = getattr(client, "_custom_headers", ())
        self._client_headers = getattr(http_client, "headers", ())

    def __call__(self, response_id: str) -> Target | MissingReason:
        with late_import:
            from ._target import make_target
        default_names = (*self._default_headers, *self._client_headers)
        return make_target(
            self._transport, self._client_class, self._url, self._headers, default_names, response_id
        )


def no_target(response_id: str) -> MissingReason:  # noqa: ARG001  # called like a `TargetFactory`
    """Return the reason for an answer whose connection or client is not known."""
    return MissingReason.TRANSPORT_ERROR
