"""The command `reconcile`: compares token totals in Prometheus with the provider's own usage record."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Final

from .reconcile_compare import Comparison, compare
from .reconcile_facts import BUCKET_S, TimeRange, utc
from .reconcile_http import CommandError, JSONClient, basic_from
from .reconcile_prometheus import Filter, Prometheus, Reading
from .reconcile_provider import Provider
from .reconcile_report import Border, Bound, Report

_ABOVE_BOUND: Final = 1
_FAILED: Final = 2

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_MAX_BUCKETS: Final = 10_000  # Prometheus answers a query with at most 11,000 points

_EPILOG: Final = """\
environment:
  OPENAI_ADMIN_KEY           an admin key of the organization, never printed
  PROMETHEUS_URL             the default of --prometheus
  PROMETHEUS_BEARER_TOKEN    a token for Prometheus
  PROMETHEUS_USERNAME, PROMETHEUS_PASSWORD
                             or a user and a password

exit code:
  0  the difference is within the bound
  1  the difference is above the bound
  2  a wrong option, no answer, or nothing to compare
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--prometheus", metavar="URL", help="where Prometheus is (http://localhost:9090)")
    parser.add_argument(
        "--base-url",
        metavar="URL",
        default="https://api.openai.com/v1",
        help="where the API is (%(default)s)",
    )
    when = parser.add_argument_group("time range, in UTC")
    when.add_argument(
        "--last", metavar="TIME", type=_duration, help="up to the last whole bucket: 6h, 1d, 2w (1d)"
    )
    when.add_argument(
        "--from", metavar="TIME", dest="start", type=_time, help="2026-11-29 or 2026-11-29T13:00"
    )
    when.add_argument("--to", metavar="TIME", dest="end", type=_time, help="the first time after the range")
    when.add_argument("--bucket", choices=BUCKET_S, default="1h", help="length of a bucket (%(default)s)")
    when.add_argument(
        "--border",
        metavar="TIME",
        type=_duration,
        default=120,
        help="how long after a call its tokens can arrive in Prometheus (2m)",
    )
    which = parser.add_argument_group("what is compared")
    which.add_argument("--model", help="one model, with all its snapshots")
    which.add_argument(
        "--project-id",
        metavar="ID",
        action="append",
        default=[],
        help="a project at the provider; repeatable",
    )
    which.add_argument(
        "--match",
        metavar="LABEL=VALUE",
        action="append",
        default=[],
        type=_label,
        help="a label of the series in Prometheus, as in job=shop; repeatable",
    )
    which.add_argument(
        "--provider",
        metavar="NAME",
        default="openai",
        help="gen_ai.provider.name of the series (%(default)s)",
    )
    parser.add_argument(
        "--max-difference",
        metavar="BOUND",
        type=_bound,
        default="1%",
        help="1%% or a number of tokens (%(default)s%%)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the report, and return the exit code."""
    return run_with(arguments, os.environ, time.time(), time.sleep)


def run_with(
    arguments: argparse.Namespace,
    environ: Mapping[str, str],
    now_s: float,
    sleep: Callable[[float], None],
) -> int:
    """Do the same with another environment, clock and sleep."""
    try:
        report = _report(arguments, environ, now_s, sleep)
    except CommandError as error:
        print(f"otel-responses-usage reconcile: {error}", file=sys.stderr)  # noqa: T201
        return _FAILED
    output = json.dumps(report.json(), indent=2) if arguments.json else report.text()
    print(output)  # noqa: T201
    return 0 if report.bound.holds(report.comparison) else _ABOVE_BOUND


def _report(
    arguments: argparse.Namespace,
    environ: Mapping[str, str],
    now_s: float,
    sleep: Callable[[float], None],
) -> Report:
    time_range = _time_range(arguments, now_s)
    key = environ.get("OPENAI_ADMIN_KEY", "").strip()
    if not key:
        raise CommandError(
            "OPENAI_ADMIN_KEY is not set. The usage record needs an admin key of the organization."
        )
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)

    prometheus = Prometheus(
        JSONClient(
            "Prometheus",
            arguments.prometheus or environ.get("PROMETHEUS_URL") or "http://localhost:9090",
            bearer=environ.get("PROMETHEUS_BEARER_TOKEN") or None,
            basic=basic_from(environ, "PROMETHEUS_USERNAME", "PROMETHEUS_PASSWORD"),
            sleep=sleep,
        ),
        note,
    )
    provider = Provider(
        JSONClient("OpenAI API", arguments.base_url, bearer=key, needs_tls=True, sleep=sleep),
        arguments.project_id,
        note,
    )
    filter_ = Filter(arguments.provider, dict(arguments.match))
    reading = prometheus.read(time_range, filter_)
    comparison = compare(provider.read(time_range), reading.rows)
    if arguments.model:
        comparison = comparison.only(arguments.model)
    if not comparison.all.provider.requests and not comparison.all.prometheus.requests:
        raise CommandError(
            f"Neither record has a call from {utc(time_range.start)} to {utc(time_range.end)} UTC"
            f"{f' of the model {arguments.model}' if arguments.model else ''}. Nothing was compared."
        )
    _add_notes(note, reading, comparison, time_range, now_s)
    borders = _borders(prometheus, filter_, arguments, time_range, now_s)
    return Report(time_range, comparison, borders, arguments.max_difference, notes)


def _borders(
    prometheus: Prometheus,
    filter_: Filter,
    arguments: argparse.Namespace,
    time_range: TimeRange,
    now_s: float,
) -> list[Border]:
    """Return what was counted just after the bounds of the range. A model is found by its name alone."""
    borders = []
    for bound in (time_range.start, time_range.end):
        window_s = min(arguments.border, int(now_s) - bound)
        if window_s <= 0:
            continue
        rows = prometheus.read(TimeRange(bound, bound + window_s, window_s), filter_, tokens_only=True).rows
        counted = compare([], rows)
        everything = (counted.only(arguments.model) if arguments.model else counted).all.prometheus
        borders.append(Border(bound, window_s, everything.requests, everything.tokens))
    return borders


def _add_notes(
    note: Callable[[str], None],
    reading: Reading,
    comparison: Comparison,
    time_range: TimeRange,
    now_s: float,
) -> None:
    everything = comparison.all
    if not everything.prometheus.requests:
        note(
            "Prometheus has no tokens in this range. Check the address, --match and --provider, and whether "
            "the services export metrics."
        )
    elif not reading.has_earlier_samples:
        note(
            "Prometheus has no sample of these counters in the day before the range, so each counter is read "
            "from zero. If a process had counted before Prometheus knew it, this is included."
        )
    if reading.has_cached_of_spans:
        note("Cached tokens come from spans. Their number is exact only if no span is sampled out.")
    if everything.provider.cached_tokens and everything.prometheus.cached_tokens is None:
        note("Prometheus has no cached tokens. docs/reconcile.md says what records them.")
    if now_s - time_range.end < BUCKET_S["1h"]:
        minutes = max(0, int(now_s - time_range.end)) // 60
        note(f"The range ended {minutes} min ago. The provider's record may not be complete yet.")


def _time_range(arguments: argparse.Namespace, now_s: float) -> TimeRange:
    bucket_s = BUCKET_S[arguments.bucket]
    last_whole = int(now_s) // bucket_s * bucket_s
    if arguments.last is not None and arguments.start is not None:
        raise CommandError("Use --last or --from, not both.")
    end = arguments.end if arguments.end is not None else last_whole
    start = arguments.start if arguments.start is not None else end - (arguments.last or 86400)
    for option, bound in (("--from", start), ("--to", end)):
        if bound % bucket_s:
            raise CommandError(
                f"{option}: {utc(bound)} UTC is not the beginning of a bucket of {arguments.bucket}."
            )
    if end > last_whole:
        raise CommandError(f"--to: The bucket that ends at {utc(end)} UTC is not over.")
    if start >= end:
        raise CommandError("--from must be before --to.")
    time_range = TimeRange(start, end, bucket_s)
    if time_range.buckets > _MAX_BUCKETS:
        raise CommandError(
            f"The range has {time_range.buckets:,} buckets. At most {_MAX_BUCKETS:,} are possible."
        )
    return time_range


def _duration(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time, as 30m, 6h, 1d or 2w")
    return int(found[1]) * _UNITS[found[2]]


def _time(text: str) -> int:
    try:
        # Python 3.10 does not know the Z.
        moment = datetime.fromisoformat(re.sub(r"[Zz]$", "+00:00", text))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return int(moment.timestamp())
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(f"{text!r} is no date, as 2026-11-29 or 2026-11-29T13:00") from None


def _label(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LABEL=VALUE")
    return name.replace(".", "_"), value


def _bound(text: str) -> Bound:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if found:
        return Bound(share=float(found[1]) / 100)
    if re.fullmatch(r"\d+", text):
        return Bound(tokens=int(text))
    raise argparse.ArgumentTypeError(f"{text!r} is neither a percentage, as 1%, nor a number of tokens")
