"""Measuring what something costs in a process that is not alone on its machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median

Work = Callable[[], object]


def paired(contenders: Mapping[str, Work], rounds: int) -> dict[str, list[int]]:
    """Return the CPU nanoseconds of each contender, a number per round.

    The contenders take turns, each round in the other direction, so what slows the machine down slows
    them all. CPU time of the thread is counted: what other processes do is only felt through caches.
    """
    for work in contenders.values():
        work()
    costs: dict[str, list[int]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            gc.collect()
            began = time.thread_time_ns()
            contenders[name]()
            costs[name].append(time.thread_time_ns() - began)
    return costs


def alternating(contenders: Mapping[str, Work], rounds: int) -> dict[str, list[int]]:
    """Return the same where each contender does its work once in its turn.

    In an application a call comes between other work, and finds the processor's caches filled with that.
    """
    costs: dict[str, list[int]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            began = time.thread_time_ns()
            work()
            costs[name].append(time.thread_time_ns() - began)
    return costs


def added(costs: Mapping[str, list[int]], name: str, without: str) -> float:
    """Return the median of what a contender takes longer than another one in the same round."""
    return median(mine - theirs for mine, theirs in zip(costs[name], costs[without], strict=True))


def percentile(values: list[float], percent: float) -> float:
    """Return the value that so many percent of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]
