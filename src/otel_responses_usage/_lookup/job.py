"""A look-up of one response: its request, its result, and the call that gets the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from .. import _fault
from .._facts.request import Server
from .._facts.response import Response
from .._facts.usage import MissingReason, Usage, UsageSource
from .._story import Story


class LookupTarget(Protocol):
    """How to ask for one response. Only the retriever reads the rest of it."""

    @property
    def tenant(self) -> int:
        """A number that differs with the credentials. It does not reveal them."""
        ...


class Endpoint(NamedTuple):
    """Look-ups with the same endpoint share one circuit breaker.

    A server may store background responses and no others, and may accept one key and refuse another. It may
    lack one route.
    """

    address: str
    port: int | None
    background: bool
    tenant: int
    route: str = "responses"


class LookupRequest(NamedTuple):
    """Where a response is asked for, and how. With content it is a POST, and otherwise a GET."""

    endpoint: Endpoint
    target: LookupTarget
    content: bytes = b""


class LookupResult(NamedTuple):
    """The result of a look-up: the usage, or the reason why it is not known; or a count of input tokens."""

    usage: Usage | None = None
    reason: MissingReason | None = None
    response: Response | None = None
    input_tokens: int | None = None


class LookupListener(Protocol):
    """The call whose usage is looked up."""

    def on_accept(self) -> None:
        """Note that the job has been accepted: `on_result` will be called. Called by `submit`."""
        ...

    def on_begin(self, job: Job) -> LookupRequest | MissingReason:
        """Return what to ask for, or the reason why it cannot be asked.

        Called before the first request, on a thread of the look-ups, because it takes some time.
        """
        ...

    def on_result(self, job: Job, result: LookupResult, source: UsageSource) -> None:
        """Take the result and the source of the usage. Called once, on any thread."""
        ...

    def leave_to_parent(self) -> Callable[[], object]:
        """Return a function that takes back what `on_accept` counted.

        Called in a forked child. The function is called before the next call of the child.
        """
        ...


class Job:
    """One response to look up.

    Attributes:
        server: The server that the application's call went to.
        response_id: The response to ask for.
        timeout_s: The time limit. Time before the first request does not count.
        listener: The call that gets the result.
        is_background: Whether the response may take minutes.
        asks_once: Whether to send one request only. Its failure says nothing about the server.
        counts_input: Whether to ask for a count of input tokens instead of the response.
        story: Logs the steps of the call; `None` if that is off.
        attempts: Requests made so far.
        shown: The response, as the application was shown it during the look-up, or just after.

    """

    __slots__ = (
        "_open",
        "asks_once",
        "attempts",
        "counts_input",
        "is_background",
        "listener",
        "response_id",
        "server",
        "shown",
        "story",
        "timeout_s",
    )

    def __init__(
        self,
        server: Server,
        response_id: str,
        timeout_s: float,
        listener: LookupListener,
        *,
        is_background: bool = False,
        asks_once: bool = False,
        counts_input: bool = False,
        story: Story | None = None,
    ) -> None:
        self.server = server
        self.response_id = response_id
        self.timeout_s = timeout_s
        self.listener = listener
        self.is_background = is_background
        self.asks_once = asks_once
        self.counts_input = counts_input
        self.story = story
        self.attempts = 0
        self.shown: Response | None = None
        self._open: list[None] = [None]

    @property
    def is_open(self) -> bool:
        """Whether the job has no result yet."""
        return bool(self._open)

    def finish(self, result: LookupResult, source: UsageSource) -> bool:
        """Give the result to the listener, and return true, unless the job has one already."""
        try:
            self._open.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return False
        try:
            self.listener.on_result(self, result, source)
        except Exception:
            _fault.report("settling a look-up")
        return True
