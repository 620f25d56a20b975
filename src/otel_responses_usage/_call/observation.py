"""Responses that the application itself fetches: their usage counts if it is not known yet."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from .._facts.request import Server
from .._facts.response import Response
from .._lookup.job import Job
from .._lookup.recovery import Recovery
from .._telemetry.telemetry import Telemetry
from .._telemetry.uncounted import UncountedCall

if TYPE_CHECKING:
    from .delivery import CallRecords

_MAX_CALLS: Final = 10_000
_KEPT_S: Final = 24 * 3600.0


class Observation:
    """Uses the responses that the application fetches, resumes or cancels.

    If a call waits for such a response, it gets the usage. If the call was recorded without usage, its
    points are recorded now, once. For that some facts of such calls are kept: no content, no credentials.
    Any thread may call any method. Only single operations touch the table, so it needs no lock.

    A call may move from the look-ups to the table at any time, and never back. So the look-ups are always
    asked first.
    """

    def __init__(self, recovery: Recovery, telemetry: Telemetry) -> None:
        self._recovery = recovery
        self._telemetry = telemetry
        # The oldest is the first. The number is when it is dropped, by `time.monotonic`. A `dict` would need
        # longer and longer to find its first key.
        self._uncounted: OrderedDict[tuple[Server, str], tuple[float, UncountedCall, CallRecords | None]] = (
            OrderedDict()
        )

    @property
    def is_useful(self) -> bool:
        """Whether any call lacks its usage."""
        return self._recovery.is_waiting or bool(self._uncounted)

    def awaits(self, server: Server, response_id: str) -> bool:
        """Whether a call lacks the usage of this response of this server."""
        return self._recovery.awaits(server, response_id) or (server, response_id) in self._uncounted

    def observe(self, server: Server, response: Response) -> None:
        """Use a response that the application was shown, if it has ended and tells its usage."""
        if response.id is None or response.usage is None or not response.has_ended:
            return
        if not self._recovery.observe(server, response):
            self._count_late(server, response)

    def keep(
        self, response_id: str, call: UncountedCall, *jobs: Job | None, records: CallRecords | None = None
    ) -> None:
        """Keep a call that was recorded without usage.

        Args:
            response_id: The id of its response.
            call: What is needed to count it later.
            jobs: Its look-ups, as far as there were any.
            records: Tell the application of the call, if it has asked for that.

        """
        now_s = time.monotonic()
        self._make_room(now_s)
        self._uncounted.setdefault((call.server, response_id), (now_s + _KEPT_S, call, records))
        # The application may have been shown the response while a look-up ended.
        for job in jobs:
            if job is not None and job.shown is not None:
                self._count_late(call.server, job.shown)

    def clear(self) -> None:
        """Forget all calls. In a forked child: the parent process counts them."""
        self._uncounted = OrderedDict()

    def _count_late(self, server: Server, response: Response) -> None:
        # Only one thread gets the entry.
        entry = self._uncounted.pop((server, str(response.id)), None)
        if entry is None:
            return
        drop_at_s, call, records = entry
        if time.monotonic() < drop_at_s:
            self._telemetry.record_late_usage(call, response)
            if records is not None:
                records.put_late(response)

    def _make_room(self, now_s: float) -> None:
        # Another thread may change the table meanwhile. Then the next call drops what is left.
        with contextlib.suppress(RuntimeError, StopIteration, KeyError):
            while True:
                key = next(iter(self._uncounted))
                drop_at_s, *_ = self._uncounted[key]
                if len(self._uncounted) < _MAX_CALLS and now_s < drop_at_s:
                    break
                self._uncounted.pop(key, None)
