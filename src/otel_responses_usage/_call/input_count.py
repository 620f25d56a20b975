"""Input tokens of a call whose usage cannot be known, as the API counts them beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Final

from .. import _fault
from .._facts.request import Server
from .._facts.usage import MissingReason, UsageSource
from .._lookup.job import Endpoint, Job, LookupRequest, LookupResult, LookupTarget
from .._telemetry.neighbour import CallSpan
from .services import Services

_ROUTE: Final = "input_tokens"
# The parameters of a call that the API takes for a count.
PARAMETERS: Final = frozenset(
    {
        "conversation",
        "input",
        "instructions",
        "model",
        "parallel_tool_calls",
        "personality",
        "previous_response_id",
        "reasoning",
        "text",
        "tool_choice",
        "tools",
        "truncation",
    }
)
# The usage comes later, there is no time, or there are too many calls.
_NOT_COUNTED: Final = frozenset({MissingReason.DEFERRED, MissingReason.OVERLOAD, MissingReason.SHUTDOWN})


class InputCount:
    """Asks the API once for the input tokens of one call. The span of the call stays open until then."""

    def __init__(
        self,
        server: Server,
        content: bytes,
        make_target: Callable[[str], LookupTarget | MissingReason],
        call_span: CallSpan,
        services: Services,
        on_end: Callable[[Job, LookupResult, UsageSource], object],
    ) -> None:
        """Ask nothing yet.

        Args:
            server: The server of the call.
            content: The body of its request.
            make_target: Returns the target below the route of responses.
            call_span: Its span.
            services: What asks, and counts the span as pending.
            on_end: Called once with the job and its result: with `input_tokens`, with the usage if the
                application was shown the response meanwhile, or with neither.

        """
        self._server = server
        self._content = content
        self._make_target = make_target
        self._call_span = call_span
        self._services = services
        self._on_end = on_end

    def begin(self, response_id: str | None, reason: MissingReason) -> bool:
        """Ask in the background; return false if that is of no use, or not possible."""
        if reason in _NOT_COUNTED:
            return False
        timeout_s = self._services.config.retrieval_timeout
        job = Job(self._server, response_id or "", timeout_s, self, counts_input=True)
        return self._services.recovery.submit(job) is None

    def on_accept(self) -> None:
        """Count the span as pending."""
        self._services.telemetry.add_pending(self._call_span, 1)

    def on_begin(self, job: Job) -> LookupRequest | MissingReason:  # noqa: ARG002
        """Return what to ask."""
        target: LookupTarget | MissingReason = MissingReason.TRANSPORT_ERROR
        content = None
        try:
            target, content = self._make_target(_ROUTE), _count_content(self._content)
        except Exception:
            _fault.report("preparing a count of input tokens")
        if isinstance(target, MissingReason) or content is None:
            return MissingReason.UNSUPPORTED
        # This route has a circuit breaker of its own.
        endpoint = Endpoint(self._server.address or "", self._server.port, False, target.tenant, _ROUTE)
        return LookupRequest(endpoint, target, content)

    def leave_to_parent(self) -> Callable[[], object]:
        """Return a function that counts the span as pending no more: the parent process ends it."""
        return partial(self._services.telemetry.add_pending, self._call_span, -1)

    def on_result(self, job: Job, result: LookupResult, source: UsageSource) -> None:
        """Have the call recorded."""
        self._services.telemetry.add_pending(self._call_span, -1)
        self._on_end(job, result, source)


def _count_content(content: bytes) -> bytes | None:
    """Return the body of the request for a count, or `None` if the call cannot be counted."""
    body = json.loads(content)
    # The API takes no stored prompt for a count. Without the prompt the count would be too low.
    if not isinstance(body, dict) or body.get("prompt"):
        return None
    return json.dumps({name: value for name, value in body.items() if name in PARAMETERS}).encode()
