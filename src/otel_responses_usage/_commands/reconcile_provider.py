"""Reads the provider's own usage record: `GET /organization/usage/completions` and `/web_search_calls`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from .reconcile_facts import Counts, ProviderRow, TimeRange, utc
from .reconcile_http import CommandError, HTTPStatusError, JSONClient

_COMPLETIONS: Final = "/organization/usage/completions"
_WEB_SEARCHES: Final = "/organization/usage/web_search_calls"

# The most buckets that one page can have.
_MAX_BUCKETS: Final = {3600: 168, 86400: 31}
_WIDTHS: Final = {3600: "1h", 86400: "1d"}
_MAX_PAGES: Final = 10_000
_UNKNOWN_MODEL: Final = "unknown"


class Provider:
    """The usage record of an organization."""

    def __init__(self, client: JSONClient, project_ids: Sequence[str], note: Callable[[str], None]) -> None:
        self._client = client
        self._project_ids = project_ids
        self._note = note

    def read(self, time_range: TimeRange) -> list[ProviderRow]:
        """Return what the record has of each model in each bucket."""
        rows = [
            ProviderRow(
                bucket,
                _model_of(result),
                Counts(
                    requests=_count(_COMPLETIONS, result, "num_model_requests"),
                    input_tokens=_count(_COMPLETIONS, result, "input_tokens"),
                    output_tokens=_count(_COMPLETIONS, result, "output_tokens"),
                    cached_tokens=_optional_count(result, "input_cached_tokens"),
                ),
                is_batch=result.get("batch") is True,
            )
            for bucket, result in self._results(_COMPLETIONS, time_range, ("model", "batch"))
        ]
        try:
            rows += [
                ProviderRow(
                    bucket,
                    _model_of(result),
                    Counts(web_searches=_count(_WEB_SEARCHES, result, "num_requests")),
                )
                for bucket, result in self._results(_WEB_SEARCHES, time_range, ("model",))
            ]
        except HTTPStatusError as error:
            if error.status != 404:
                raise
            self._note("The provider has no record of web searches. They are not compared.")
        return rows

    def _results(
        self, path: str, time_range: TimeRange, group_by: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        parameters = [
            ("start_time", str(time_range.start)),
            ("end_time", str(time_range.end)),
            ("bucket_width", _WIDTHS[time_range.bucket_s]),
            ("limit", str(min(time_range.buckets, _MAX_BUCKETS[time_range.bucket_s]))),
            *(("group_by[]", name) for name in group_by),
            *(("project_ids[]", project) for project in self._project_ids),
        ]
        cursor: str | None = None
        cursors: set[str] = set()
        seen: set[int] = set()
        while True:
            page = self._get(path, [*parameters, *([("page", cursor)] if cursor else [])])
            try:
                for bucket in page["data"]:
                    index = time_range.index_of(bucket["start_time"])
                    if index is None:
                        raise CommandError(
                            f"OpenAI API: The record has a bucket that was not asked for: it begins at "
                            f"{utc(bucket['start_time'])} UTC."
                        )
                    seen.add(index)
                    for result in bucket["results"]:
                        yield index, dict(result)
                cursor = page["next_page"] if page.get("has_more") else None
            except KeyError as error:
                raise CommandError(f"OpenAI API: The record of {path} has no `{error.args[0]}`.") from None
            except (TypeError, ValueError, AttributeError):
                raise CommandError(
                    f"OpenAI API: In the record of {path} `data` is no list of buckets with `start_time` and "
                    "`results`."
                ) from None
            if not cursor:
                break
            if cursor in cursors or len(cursors) >= _MAX_PAGES:
                raise CommandError("OpenAI API: The record does not end: a page comes again and again.")
            cursors.add(cursor)
        if len(seen) < time_range.buckets:
            self._note(
                f"The provider's record has {len(seen)} of {time_range.buckets} buckets ({path}). "
                "A missing bucket counts as zero."
            )

    def _get(self, path: str, parameters: Sequence[tuple[str, str]]) -> Any:
        try:
            return self._client.get(path, parameters)
        except HTTPStatusError as error:
            if error.status in {401, 403}:
                raise CommandError(
                    f"{error} The usage record needs an admin key of the organization in OPENAI_ADMIN_KEY. "
                    "A project key cannot read it."
                ) from None
            raise


def _model_of(result: dict[str, Any]) -> str:
    model = result.get("model")
    return model if isinstance(model, str) and model else _UNKNOWN_MODEL


def _count(path: str, result: dict[str, Any], name: str) -> int:
    count = _optional_count(result, name)
    if count is None:
        raise CommandError(f"OpenAI API: The record of {path} has no number `{name}`.")
    return count


def _optional_count(result: dict[str, Any], name: str) -> int | None:
    count = result.get(name)
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    return count if type(count) is int else None
