"""The same work in several processes that take turns on one core.

All processes are forks of one. They differ only in what each of them has prepared. A turn takes some tens of
milliseconds. So whatever slows the core down slows all of them down.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Pause = Callable[[], None]
# Does the work of a task. It calls the pause after each turn. JSON must be able to hold what it returns.
Worker = Callable[[Any, Pause], Any]


class Child:
    """A process that works in turns.

    Attributes:
        result: What the worker returned for the last task.
        failed: Whether the worker has raised an exception. Then there are no more turns.

    """

    def __init__(self, prepare: Callable[[], Worker]) -> None:
        """Fork. The worker is prepared in the new process."""
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self.result: Any = None
        self.failed = False
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._commands)
            os.close(self._answers)
            status = 1
            try:
                with open(commands) as source, open(answers, "w") as sink:  # noqa: PTH123
                    _serve(prepare(), source, sink)
                status = 0
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(commands)
        os.close(answers)
        self._sink = open(self._commands, "w")  # noqa: PTH123, SIM115
        self._source = open(self._answers)  # noqa: PTH123, SIM115

    def begin(self, task: Any) -> None:
        """Have it begin a task, with its first turn still to come."""
        self._tell(json.dumps(task))
        self._next()

    def turn(self) -> int | None:
        """Have it work for one turn. Returns the CPU nanoseconds of the process, or `None` if it is done."""
        self._tell("")
        answer = self._next()
        if isinstance(answer, dict):
            self.result = answer["result"]
            return None
        return int(answer)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._sink.close()
        os.waitpid(self._pid, 0)
        self._source.close()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has failed, which is noticed when it is to answer
            self._sink.write(line + "\n")
            self._sink.flush()

    def _next(self) -> Any:
        line = self._source.readline()
        self.failed = self.failed or not line
        return json.loads(line or '{"result": null}')


def run(children: Sequence[Child], tasks: Sequence[Any]) -> list[list[int]]:
    """Have each child do its task. Returns, for each turn, the CPU nanoseconds of each child.

    The tasks have the same number of turns. The result is empty if a child fails.
    """
    for child, task in zip(children, tasks, strict=True):
        child.begin(task)
    turns: list[list[int]] = []
    while True:
        indices = range(len(children))
        order = indices if len(turns) % 2 else reversed(indices)
        costs = {index: children[index].turn() for index in order}
        done = [cost for cost in costs.values() if cost is not None]
        if len(done) < len(children):
            return [] if done or any(child.failed for child in children) else turns
        turns.append([costs[index] or 0 for index in indices])


@contextlib.contextmanager
def children(*workers: Callable[[], Worker]) -> Iterator[list[Child]]:
    """Fork a child for each worker, all on the last core that this process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    forked: list[Child] = []
    try:
        # One after the other: none inherits the pipes of a later one, and each sees the end of its own.
        forked += (Child(worker) for worker in workers)
        yield forked
    finally:
        for child in reversed(forked):
            child.close()


def _serve(work: Worker, source: Any, sink: Any) -> None:
    """Do tasks until there are no more."""
    # What has been made so far is not looked at by the garbage collector: it differs between the processes.
    gc.collect()
    gc.freeze()
    mark = 0

    def answer(what: Any) -> None:
        sink.write(json.dumps(what) + "\n")
        sink.flush()
        source.readline()

    def pause() -> None:
        nonlocal mark
        # What other threads of this process do between its turns belongs to the next turn.
        before, mark = mark, time.process_time_ns()
        answer(mark - before)

    for line in iter(source.readline, ""):
        gc.collect()
        mark = time.process_time_ns()
        answer(None)
        result = work(json.loads(line), pause)
        sink.write(json.dumps({"result": result}) + "\n")
        sink.flush()
