"""What the probe in a child process has written, read back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Facts = dict[str, Any]


@dataclass(frozen=True)
class Exporter:
    """An exporter of a process.

    Attributes:
        signal: `traces` or `metrics`.
        module: The module of its class.
        name: The name of its class.
        endpoint: Where it sends to, if it says so.
        insecure: Of an exporter over gRPC: whether it does not use TLS.

    """

    signal: str
    module: str
    name: str
    endpoint: str | None
    insecure: bool | None

    @property
    def protocol(self) -> str | None:
        """The protocol of OTLP. `None` for other exporters."""
        if ".otlp.proto.grpc" in self.module:
            return "grpc"
        return "http/protobuf" if ".otlp.proto.http" in self.module else None

    @classmethod
    def from_facts(cls, facts: Facts) -> Exporter:
        """Return the exporter that the probe described."""
        return cls(*(facts.get(name) for name in ("signal", "module", "name", "endpoint", "insecure")))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Export:
    """The exports of one signal.

    Attributes:
        delivered: How many were accepted.
        failed: How many were not.
        has_ours: Whether spans or points of this package were among those accepted.
        messages: What the exporter logged about those that were not.

    """

    delivered: int
    failed: int
    has_ours: bool
    messages: tuple[str, ...]


@dataclass
class Process:
    """The events of one process. A program that replaces itself (`exec`) begins anew."""

    pid: int
    events: list[Facts] = field(default_factory=list)

    def all(self, event: str) -> list[Facts]:
        """Return all events of this kind."""
        return [facts for facts in self.events if facts["event"] == event]

    @property
    def state(self) -> Facts:
        """The state at the first call; what later changes, as at the exit."""
        states = self.all("state")
        merged: Facts = {}
        for facts in states:
            merged = {**{key: value for key, value in facts.items() if value is not None}, **merged}
        for key in ("calls", "opened", "ended", "suppressed", "green"):
            merged[key] = states[-1].get(key) if states else None
        return merged

    @property
    def has_ended(self) -> bool:
        """Whether its exit handlers ran."""
        return any(facts["at"] == "exit" for facts in self.all("state"))

    @property
    def is_of_interest(self) -> bool:
        """Whether it has anything to do with telemetry or the SDK."""
        return any(facts["event"] in {"openai", "exporter", "call", "opened"} for facts in self.events)


class Report:
    """What all processes have written."""

    def __init__(self, lines: list[str]) -> None:
        """Read the lines of the file. A line that was cut is left out."""
        processes: dict[int, Process] = {}
        for line in lines:
            try:
                facts = json.loads(line)
            except ValueError:
                continue
            pid = facts["pid"]
            if facts["event"] == "start":
                processes[pid] = Process(pid)
            processes.setdefault(pid, Process(pid)).events.append(facts)
        self.all_processes = list(processes.values())
        self.processes = [one for one in self.all_processes if one.is_of_interest] or self.all_processes

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read the file."""
        return cls(path.read_text("utf-8", "replace").splitlines() if path.exists() else [])

    def all(self, event: str) -> list[Facts]:
        """Return all events of this kind, of all processes."""
        return [facts for process in self.processes for facts in process.all(event)]

    @property
    def main(self) -> Process | None:
        """The process that made calls; else the one with exporters; else the first."""
        return max(
            self.processes,
            key=lambda one: (len(one.all("call")), len(one.all("exporter")), len(one.all("openai"))),
            default=None,
        )

    @property
    def exporters(self) -> list[Exporter]:
        """The exporters that were made, each once."""
        found = {Exporter.from_facts(facts): None for facts in self.all("exporter")}
        return list(found)

    def exports(self, signal: str) -> Export | None:
        """Return what came of the exports of a signal. `None` if there was none."""
        facts = [one for one in self.all("export") if one["signal"] == signal]
        if not facts:
            return None
        delivered = [one for one in facts if one["delivered"]]
        failed = [one for one in facts if not one["delivered"]]
        messages = [message for one in failed for message in one["messages"]]
        is_ours = any(one["ours"] for one in delivered)
        return Export(len(delivered), len(failed), is_ours, tuple(dict.fromkeys(messages)))

    @property
    def reasons(self) -> Counter[str]:
        """How many calls ended without usage, by the reason."""
        return Counter(one["reason"] for one in self.all("ended") if one["reason"])

    @property
    def calls_made(self) -> int:
        """Responses calls that the application made."""
        return len(self.all("call"))

    def count(self, event: str) -> int:
        """Count the events of this kind."""
        return len(self.all(event))


NO_REPORT: Final = Report([])
