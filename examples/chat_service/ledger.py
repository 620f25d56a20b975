"""The ledger: the tokens of each user's calls, in SQLite."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from otel_responses_usage import CallRecord, Usage

USER_KEY = "enduser.id"

# One row per call.
SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id TEXT PRIMARY KEY,      -- the response id; a call without one gets an id from its time and span
    question TEXT,            -- the page's own id of the question
    user TEXT,
    model TEXT,
    started_at REAL NOT NULL, -- seconds since the epoch
    outcome TEXT,             -- as CallRecord.outcome, or 'killed'; empty while the call is open
    input_tokens INTEGER,
    cached_tokens INTEGER,
    output_tokens INTEGER,
    reasoning_tokens INTEGER,
    usage_source TEXT,        -- set if the tokens are known
    missing_reason TEXT,      -- set if the tokens are unknown and the call has ended
    look_up_seconds REAL
);
CREATE INDEX IF NOT EXISTS calls_by_user ON calls (user, started_at);
"""

BEGIN = """
INSERT INTO calls (id, question, user, model, started_at)
VALUES (:id, :question, :user, :model, :started_at)
ON CONFLICT (id) DO UPDATE SET question = excluded.question
"""

# A record sets values and adds nothing, so the same record can come twice. Known usage is never replaced by
# unknown usage, so records can come in any order.
RECORD = """
INSERT INTO calls (id, user, model, started_at, outcome, input_tokens, cached_tokens, output_tokens,
                   reasoning_tokens, usage_source, missing_reason, look_up_seconds)
VALUES (:id, :user, :model, :started_at, :outcome, :input_tokens, :cached_tokens, :output_tokens,
        :reasoning_tokens, :usage_source, :missing_reason, :look_up_seconds)
ON CONFLICT (id) DO UPDATE SET
    user = coalesce(excluded.user, user),
    model = coalesce(excluded.model, model),
    started_at = excluded.started_at,
    outcome = excluded.outcome,
    input_tokens = excluded.input_tokens,
    cached_tokens = excluded.cached_tokens,
    output_tokens = excluded.output_tokens,
    reasoning_tokens = excluded.reasoning_tokens,
    usage_source = excluded.usage_source,
    missing_reason = excluded.missing_reason,
    look_up_seconds = excluded.look_up_seconds
WHERE excluded.usage_source IS NOT NULL OR calls.usage_source IS NULL
"""

SETTLE = """
UPDATE calls SET outcome = 'killed', input_tokens = :input_tokens, cached_tokens = :cached_tokens,
    output_tokens = :output_tokens, reasoning_tokens = :reasoning_tokens, usage_source = :usage_source,
    missing_reason = :missing_reason
WHERE id = :id AND outcome IS NULL
"""

SUMS = """
SELECT count(*) AS calls, coalesce(sum(input_tokens), 0) AS input_tokens,
    coalesce(sum(output_tokens), 0) AS output_tokens,
    coalesce(sum(outcome IS NULL), 0) AS open, coalesce(sum(missing_reason IS NOT NULL), 0) AS unmetered
FROM calls WHERE user IS ?
"""

REASONS = """
SELECT missing_reason, count(*) FROM calls
WHERE user IS ? AND missing_reason IS NOT NULL GROUP BY missing_reason
"""

LATEST = "SELECT * FROM calls WHERE user IS ? ORDER BY started_at DESC LIMIT ?"
OF_QUESTION = "SELECT * FROM calls WHERE user = ? AND question = ? ORDER BY started_at DESC"

BY_USER = """
SELECT coalesce(user, '(unknown)') AS user, count(*) AS calls, coalesce(sum(input_tokens), 0) AS input_tokens,
    coalesce(sum(output_tokens), 0) AS output_tokens,
    coalesce(sum(missing_reason IS NOT NULL), 0) AS unmetered, coalesce(sum(outcome IS NULL), 0) AS open
FROM calls GROUP BY calls.user ORDER BY sum(output_tokens) DESC
"""


class Ledger:
    """Calls and their tokens. Any thread of any process may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def begin(self, response_id: str, *, question: str, user: str, model: str) -> None:
        """Note that a call has begun. It stays open until `record` or `settle`."""
        row = {"id": response_id, "question": question, "user": user, "model": model}
        with self._database() as database:
            database.execute(BEGIN, {**row, "started_at": time.time()})

    def record(self, record: CallRecord) -> None:
        """Keep the tokens of an ended call. This is the `on_call` of the instrumentation."""
        row = {
            "id": record.response_id or id_without_response(record),
            "user": record.baggage.get(USER_KEY),
            "model": record.response_model or record.request_model,
            "started_at": record.start_time_ns / 1e9,
            "outcome": record.outcome.value,
            "usage_source": record.usage_source.value if record.usage_source else None,
            "missing_reason": record.missing_reason.value if record.missing_reason else None,
            "look_up_seconds": record.retrieval_duration_s,
        }
        with self._database() as database:
            database.execute(RECORD, {**row, **columns_of(record.usage)})

    def left_open(self) -> list[str]:
        """Return the ids of the calls that have not ended."""
        with self._database() as database:
            return [row["id"] for row in database.execute("SELECT id FROM calls WHERE outcome IS NULL")]

    def settle(self, response_id: str, usage: Usage | None, missing_reason: str | None = None) -> None:
        """Close a call that a killed process left open. Does nothing if the call is not open."""
        with self._database() as database:
            row = {"id": response_id, "missing_reason": None if usage else missing_reason}
            source = "retrieval" if usage else None
            database.execute(SETTLE, {**row, **columns_of(usage), "usage_source": source})

    def of_question(self, question: str, user: str) -> dict[str, Any] | None:
        """Return the call of a question of this user, or `None` if there is none (yet)."""
        with self._database() as database:
            row = database.execute(OF_QUESTION, (user, question)).fetchone()
        return dict(row) if row else None

    def of_user(self, user: str, latest: int = 20) -> dict[str, Any]:
        """Return the sums of a user, why tokens are unknown, and the latest calls."""
        with self._database() as database:
            sums = database.execute(SUMS, (user,)).fetchone()
            reasons = database.execute(REASONS, (user,)).fetchall()
            calls = database.execute(LATEST, (user, latest)).fetchall()
        return {
            "user": user,
            **dict(sums),
            "missing_reasons": dict(map(tuple, reasons)),
            "latest": [dict(call) for call in calls],
        }

    def by_user(self) -> list[dict[str, Any]]:
        """Return the sums of each user, the largest first."""
        with self._database() as database:
            return [dict(row) for row in database.execute(BY_USER)]

    def close(self) -> None:
        """Close the file. The next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction. `on_call` runs on changing threads, so a lock guards the one connection."""
        with self._lock:
            if self._connection is None:
                self._connection = self._connect()
            with self._connection:
                yield self._connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=10, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")  # readers and a writer do not wait for each other
        connection.executescript(SCHEMA)
        return connection


def columns_of(usage: Usage | None) -> dict[str, int | None]:
    """Return the token columns of a row."""
    usage = usage or Usage()
    return {
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cache_read_input_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_output_tokens,
    }


def id_without_response(record: CallRecord) -> str:
    """Return an id for a call without a response id. It is the same each time."""
    span = record.span_context
    return f"call_{record.start_time_ns}_{span.trace_id:032x}_{span.span_id:016x}"


LEDGER = Ledger(Path(os.environ.get("CHAT_LEDGER", Path(__file__).with_name("ledger.db"))))

if __name__ == "__main__":
    print(f"{'user':32} {'calls':>8} {'input':>12} {'output':>12} {'unmetered':>10} {'open':>6}")
    for row in LEDGER.by_user():
        print(
            f"{row['user']:32} {row['calls']:>8,} {row['input_tokens']:>12,} {row['output_tokens']:>12,} "
            f"{row['unmetered']:>10,} {row['open']:>6,}"
        )
