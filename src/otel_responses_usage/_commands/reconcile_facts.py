"""What the comparison works with: the time range, counts, and rows of the two records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final, NamedTuple

BUCKET_S: Final = {"1h": 3600, "1d": 86400}


class TimeRange(NamedTuple):
    """A time range of whole buckets. Times are Unix seconds, and buckets begin on the clock of UTC."""

    start: int
    end: int
    bucket_s: int

    @property
    def buckets(self) -> int:
        """The number of buckets."""
        return (self.end - self.start) // self.bucket_s

    def start_of(self, bucket: int) -> int:
        """Return the time at which a bucket begins."""
        return self.start + bucket * self.bucket_s

    def index_of(self, time_s: int) -> int | None:
        """Return the bucket that begins at this time, or `None` if none does."""
        bucket, rest = divmod(time_s - self.start, self.bucket_s)
        return bucket if not rest and 0 <= bucket < self.buckets else None


def utc(time_s: float) -> str:
    """Return a time as text, as in `2026-11-29 13:00`."""
    return f"{datetime.fromtimestamp(time_s, timezone.utc):%Y-%m-%d %H:%M}"


def plus(left: int | None, right: int | None) -> int | None:
    """Return the sum. Unknown plus a number is the number."""
    if left is None:
        return right
    return left if right is None else left + right


class Counts(NamedTuple):
    """The counts that both records have. `None` is unknown."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    web_searches: int | None = None

    @property
    def tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    def plus(self, other: Counts) -> Counts:
        """Return the sums."""
        return Counts(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            plus(self.cached_tokens, other.cached_tokens),
            plus(self.web_searches, other.web_searches),
        )

    def minus(self, other: Counts) -> Counts:
        """Return the differences. The difference to an unknown count is unknown."""
        return Counts(*(None if a is None or b is None else a - b for a, b in zip(self, other, strict=True)))  # type: ignore[arg-type]


NOTHING: Final = Counts()


@dataclass(frozen=True)
class ProviderRow:
    """What the provider's record has of one model in one bucket."""

    bucket: int
    model: str
    counts: Counts
    is_batch: bool = False


@dataclass(frozen=True)
class CounterRow:
    """How far one counter of Prometheus grew in one bucket.

    Attributes:
        bucket: The index of the bucket.
        kind: What was counted: a field of `Counts`, or `unmetered`, `failed`, `late` or `input_count`.
        growth: By how much the counter grew.
        request_model: The model that the request named, if the series has it.
        response_model: The model that the response named, if the series has it.
        reason: Why the usage is missing, for `unmetered` and `late`.

    """

    bucket: int
    kind: str
    growth: int
    request_model: str | None = None
    response_model: str | None = None
    reason: str | None = None


def added(rows: Iterator[Counts]) -> Counts:
    """Return the sum of all counts."""
    total = Counts()
    for row in rows:
        total = total.plus(row)
    return total
