"""Compares the two records, and says what explains the difference.

In each bucket the provider has P requests. Our counters have M calls with tokens, U calls whose usage was
unknown when they were recorded, and L calls whose usage became known later. The L calls are among the M. Each
request is one of these, or was never seen: P = M + U - L + unwatched. So the number of unwatched requests is
P - M - U + L. The tokens of a single missing request cannot be known. The sum of all missing tokens is known:
it is the difference. If only one kind of request is missing, the whole difference belongs to this kind.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from .reconcile_facts import NOTHING, CounterRow, Counts, ProviderRow, added

_SNAPSHOT: Final = re.compile(r"(?P<model>.+)-\d{4}-\d{2}-\d{2}")
_UNKNOWN_MODEL: Final = "unknown"


class Cause(str, Enum):
    """What kind of calls a difference in tokens belongs to."""

    UNMETERED = "unmetered"
    UNWATCHED = "unwatched"
    LATE = "late"
    SURPLUS = "surplus"
    SEVERAL = "several"
    NONE = "none"


@dataclass(frozen=True)
class Cell:
    """The two records of one model, in one bucket or over the whole range.

    Attributes:
        provider: The provider's record.
        prometheus: What the counters have.
        unmetered: Calls without usage, by missing reason.
        failed: Calls that failed without usage. Most of them cost nothing.
        late: Calls whose usage became known later, by the reason it was missing at first.
        input_count: Input tokens of calls without usage, as the API counted them at the request of the
            package (`Config.input_count`).

    """

    provider: Counts = NOTHING
    prometheus: Counts = NOTHING
    unmetered: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    late: Counter[str] = field(default_factory=Counter)
    input_count: int = 0

    def plus(self, other: Cell) -> Cell:
        """Return the sums."""
        return Cell(
            self.provider.plus(other.provider),
            self.prometheus.plus(other.prometheus),
            self.unmetered + other.unmetered,
            self.failed + other.failed,
            self.late + other.late,
            self.input_count + other.input_count,
        )

    @property
    def difference(self) -> Counts:
        """What the provider has and Prometheus has not."""
        return self.provider.minus(self.prometheus)

    @property
    def without_usage(self) -> int:
        """Unmetered calls, less those whose usage became known later.

        It is negative if usage became known of calls from before.
        """
        return self.unmetered.total() - self.late.total()

    @property
    def unwatched(self) -> int:
        """Requests that were never seen. Negative: calls that the provider does not have here."""
        return self.difference.requests - self.without_usage

    @property
    def cause(self) -> Cause:
        """The kind of calls that the difference in tokens belongs to."""
        causes = [
            cause
            for cause, is_there in (
                (Cause.UNMETERED, self.without_usage > 0),
                (Cause.LATE, self.without_usage < 0),
                (Cause.UNWATCHED, self.unwatched > 0),
                (Cause.SURPLUS, self.unwatched < 0),
            )
            if is_there
        ]
        if not causes:
            return Cause.NONE
        return causes[0] if len(causes) == 1 else Cause.SEVERAL


@dataclass(frozen=True)
class Explanation:
    """A part of the difference, and the kind of calls it belongs to.

    Attributes:
        cause: The kind of calls.
        tokens: Their tokens, input and output. Negative: Prometheus has more.
        calls: How many calls they are. For `several` and `none`, the difference in requests.
        reasons: For unmetered calls, how many there are of each missing reason.
        input_count: For unmetered calls, the input tokens that are known by `Config.input_count`.

    """

    cause: Cause
    tokens: int
    calls: int
    reasons: Mapping[str, int]
    input_count: int


@dataclass(frozen=True)
class Comparison:
    """The two records, side by side.

    Attributes:
        cells: By model and bucket.
        batch: What the provider's record has of batch jobs. They are not compared.

    """

    cells: Mapping[str, Mapping[int, Cell]]
    batch: Counts

    @property
    def models(self) -> dict[str, Cell]:
        """The whole range, by model."""
        return {model: total(cells.values()) for model, cells in self.cells.items()}

    @property
    def all(self) -> Cell:
        """The whole range, over all models."""
        return total(self.models.values())

    @property
    def missed(self) -> int:
        """The differences in input and in output of all models, added without their signs."""
        return sum(
            abs(cell.difference.input_tokens) + abs(cell.difference.output_tokens)
            for cell in self.models.values()
        )

    @property
    def share(self) -> float:
        """`missed` as a share of the larger record. 0 if both are empty."""
        everything = self.all
        larger = max(everything.provider.tokens, everything.prometheus.tokens)
        return self.missed / larger if larger else 0.0

    @property
    def explanations(self) -> list[Explanation]:
        """The difference in tokens, by the kind of calls it belongs to.

        A model is judged as a whole. If several kinds of calls are missing, it is judged bucket by bucket.
        """
        parts: dict[Cause, list[Cell]] = defaultdict(list)
        for model, cell in self.models.items():
            for part in [cell] if cell.cause is not Cause.SEVERAL else self.cells[model].values():
                parts[part.cause].append(part)
        found = [_explain(cause, total(parts[cause])) for cause in Cause if cause in parts]
        return [part for part in found if part.tokens or part.calls]

    def only(self, model: str) -> Comparison:
        """Return the comparison of one model, or of all its snapshots."""
        cells = {
            name: cells
            for name, cells in self.cells.items()
            if model in {name, _without_date(name), *_parts(name)}
        }
        return Comparison(cells, self.batch)


def _explain(cause: Cause, cell: Cell) -> Explanation:
    calls = {
        Cause.UNMETERED: cell.without_usage,
        Cause.LATE: -cell.without_usage,
        Cause.UNWATCHED: cell.unwatched,
        Cause.SURPLUS: -cell.unwatched,
    }.get(cause, cell.difference.requests)
    # Late usage is told with the reason that it was missing at first.
    reasons = cell.unmetered - cell.late if cause is Cause.UNMETERED else Counter[str]()
    input_count = cell.input_count if cause is Cause.UNMETERED else 0
    return Explanation(cause, cell.difference.tokens, calls, dict(sorted(reasons.items())), input_count)


def total(cells: Iterable[Cell]) -> Cell:
    """Return the sum of all cells."""
    found = Cell()
    for cell in cells:
        found = found.plus(cell)
    return found


def compare(provider: Iterable[ProviderRow], counters: Iterable[CounterRow]) -> Comparison:
    """Put the two records side by side, by model and bucket."""
    provider, counters = list(provider), list(counters)
    names = _Names(provider, counters)
    cells: dict[str, dict[int, Cell]] = defaultdict(lambda: defaultdict(Cell))

    def add(model: str, bucket: int, cell: Cell) -> None:
        cells[model][bucket] = cells[model][bucket].plus(cell)

    for row in provider:
        if not row.is_batch:
            add(names.of(row.model), row.bucket, Cell(provider=row.counts))
    for counter in counters:
        add(names.of_counter(counter), counter.bucket, _cell_of(counter))
    return Comparison(
        {model: dict(sorted(cells[model].items())) for model in sorted(cells)},
        added(row.counts for row in provider if row.is_batch),
    )


def _cell_of(row: CounterRow) -> Cell:
    reason = row.reason or "unknown"
    if row.kind == "unmetered":
        return Cell(unmetered=Counter({reason: row.growth}))
    if row.kind == "late":
        return Cell(late=Counter({reason: row.growth}))
    if row.kind == "input_count":
        return Cell(input_count=row.growth)
    if row.kind == "failed":
        return Cell(failed=row.growth)
    return Cell(prometheus=Counts(**{row.kind: row.growth}))


class _Names:
    """The name under which each model is compared.

    The provider names the model of the response, often a snapshot with a date. Some of our counters know only
    the model of the request. It stands for the response model that was seen with it. If several were seen,
    which a call belongs to is not known, and these models are compared together.
    """

    def __init__(self, provider: Iterable[ProviderRow], counters: Iterable[CounterRow]) -> None:
        self._provider_models = {row.model for row in provider}
        seen: dict[str, set[str]] = defaultdict(set)
        for row in counters:
            if row.request_model and row.response_model:
                seen[row.request_model].add(self._at_provider(row.response_model))
        self._responses: dict[str, str] = {}
        self._groups: dict[str, frozenset[str]] = {}
        # Only rows that say nothing of the response need the model of the request.
        for request in sorted(
            {row.request_model for row in counters if row.request_model and not row.response_model}
        ):
            candidates = seen.get(request) or self._snapshots_of(request)
            if candidates:
                self._responses[request] = min(candidates)
            if len(candidates) > 1:
                self._merge(candidates)

    def of(self, model: str) -> str:
        group = self._groups.get(model)
        return " + ".join(sorted(group)) if group else model

    def of_counter(self, row: CounterRow) -> str:
        if row.response_model:
            return self.of(self._at_provider(row.response_model))
        if row.request_model:
            return self.of(self._responses.get(row.request_model, row.request_model))
        return _UNKNOWN_MODEL

    def _merge(self, models: set[str]) -> None:
        group = frozenset(models).union(*(self._groups.get(model, frozenset()) for model in models))
        for model in group:
            self._groups[model] = group

    def _at_provider(self, model: str) -> str:
        """Return the provider's name of a response model. It may leave the date out."""
        bare = _without_date(model)
        is_bare = model not in self._provider_models and bare in self._provider_models
        return bare if is_bare else model

    def _snapshots_of(self, request: str) -> set[str]:
        if request in self._provider_models:
            return {request}
        return {model for model in self._provider_models if _without_date(model) == request}


def _without_date(model: str) -> str:
    found = _SNAPSHOT.fullmatch(model)
    return found["model"] if found else model


def _parts(name: str) -> list[str]:
    """Return the models that are compared under one name, with and without their dates."""
    parts = name.split(" + ")
    return [*parts, *map(_without_date, parts)]
