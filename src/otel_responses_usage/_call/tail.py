"""The tail of a call: what is read of its stream after the application has closed it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .. import _fault
from .._facts.request import Server
from .._facts.usage import MissingReason, UsageSource
from .._lookup.job import Job, LookupResult
from .._lookup.recovery import Recovery
from .._telemetry.neighbour import CallSpan
from .._telemetry.telemetry import Telemetry


class CallTail:
    """Settles one tail, and counts its span as pending until then."""

    def __init__(
        self,
        server: Server,
        call_span: CallSpan,
        telemetry: Telemetry,
        recovery: Recovery,
        close: Callable[[], object],
        on_end: Callable[[bool], object],
    ) -> None:
        """Take a tail over.

        Args:
            server: The server of the call.
            call_span: The span of the call.
            telemetry: Counts the span.
            recovery: Has the tail read, and waits for it at exit.
            close: Called once when the tail has ended.
            on_end: Called after that, with whether the tail was cut off by an exit.

        """
        self._job = Job(server, "", 0.0, self)
        self._call_span = call_span
        self._telemetry = telemetry
        self._recovery = recovery
        self._close = close
        self._on_end = on_end

    def begin(self, read_on: Callable[[], float | None]) -> bool:
        """Have the tail read, and return whether that is possible."""
        return self._recovery.begin_tail(self._job, read_on)

    def end(self) -> None:
        """Note that the tail has been read. Acts only once."""
        self._recovery.end_tail(self._job)

    def on_accept(self) -> None:
        """Count the span as pending."""
        self._telemetry.add_pending(self._call_span, 1)

    def on_begin(self, job: Job) -> MissingReason:  # noqa: ARG002
        """Ask for nothing: a tail is read."""
        return MissingReason.SHUTDOWN

    def leave_to_parent(self) -> Callable[[], object]:
        """Return a function that counts the span as pending no more: the parent process ends it."""
        return partial(self._telemetry.add_pending, self._call_span, -1)

    def on_result(self, job: Job, result: LookupResult, source: UsageSource) -> None:  # noqa: ARG002
        """Close the connection, and have the call recorded or looked up."""
        try:
            self._close()
        except Exception:
            _fault.report("closing a stream that was read on")
        self._telemetry.add_pending(self._call_span, -1)
        self._on_end(result.reason is MissingReason.SHUTDOWN)
