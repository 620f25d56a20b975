"""A response to look up: who asks for it, where it is asked for, and what comes of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .. import _fault
from .._facts.request import Server
from .._facts.response import Response
from .._facts.usage import MissingReason, Usage, UsageSource


class Target(Protocol):
    """How to ask for a response: the retriever's business, but for whose response it is."""

    @property
    def tenant(self) -> int:
        """A number that stands for the credentials, and tells nothing of them."""
        ...


class Place(NamedTuple):
    """Where look-ups go that share their luck.

    A server may keep background responses and no others, and may know one key and not another.
    """

    address: str
    port: int | None
    background: bool
    tenant: int


class Aim(NamedTuple):
    """Where a response is asked for, and how."""

    place: Place
    target: Target


class Retrieved(NamedTuple):
    """What a look-up came to: usage, or the reason why there is none."""

    usage: Usage | None = None
    reason: MissingReason | None = None
    response: Response | None = None


class Asker(Protocol):
    """Who wants to know of a response."""

    def on_begin(self, job: Job) -> Aim | MissingReason:
        """Say where the response is asked for and how, or why it cannot be. Called by the worker, if at all.

        Working it out when a call ends would be on the application's time.
        """
        ...

    def on_result(self, job: Job, result: Retrieved, source: UsageSource) -> None:
        """Take the result, and where it was read. Called once, on any thread."""
        ...


class Job:
    """A response to look up.

    Attributes:
        server: The server that the application's call went to.
        response_id: The response asked for.
        deadline: When to give up, by `time.monotonic`.
        asker: Who is told of the result.
        attempts: Requests made so far.
        held: The asker's own note: one element while its span is counted as held.

    """

    __slots__ = ("_open", "asker", "attempts", "deadline", "held", "response_id", "server")

    def __init__(self, server: Server, response_id: str, deadline: float, asker: Asker) -> None:
        self.server = server
        self.response_id = response_id
        self.deadline = deadline
        self.asker = asker
        self.attempts = 0
        self.held: list[None] = []
        self._open: list[None] = [None]

    @property
    def is_open(self) -> bool:
        """Whether nobody has settled the job yet."""
        return bool(self._open)

    def finish(self, result: Retrieved, source: UsageSource) -> None:
        """Settle the job, unless somebody else has."""
        try:
            self._open.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return
        try:
            self.asker.on_result(self, result, source)
        except Exception:
            _fault.report("settling a look-up")
