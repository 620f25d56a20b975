"""What a call costs besides its events: with an SDK that listens, and with none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import pieces, standin
from .clock import added, paired
from .row import Row

AT_START = 9  # attributes that the span of the stand-in's call has from the start


def rows(*, quick: bool) -> list[Row]:
    """Measure a call of a short stream against the same span and the same points by hand."""
    standin.install()
    from .telemetry import deaf, unsampled

    calls, rounds = (20, 3) if quick else (100, 21)
    ours_ns, by_hand_ns, events = _heard(calls, rounds)
    told = f"a call of {events} events, against its span and points by hand ({by_hand_ns / 1000:.0f} us)"
    per_call = {}
    per_event = {}
    for name, providers in (("no SDK", deaf), ("not sampled", unsampled)):
        per_call[name], per_event[name] = _unheard(providers, calls, rounds)
    return [
        Row(f"added per call: {told}", ours_ns / by_hand_ns, 2.0, "x", "1 x"),
        Row("added per call, no SDK configured", per_call["no SDK"] / 1000, 10, "us"),
        Row("added per call, not sampled and no metrics", per_call["not sampled"] / 1000, 10, "us"),
        # What is left of the difference between equal loops is the error of the measurement.
        Row("added per event, no SDK or not sampled", max(map(abs, per_event.values())), 5, "ns", "0 ns"),
    ]


def contenders() -> dict[str, Callable[[], None]]:
    """Return a call as it is observed, the same one unobserved, and its span and points by hand.

    The instrumentation must be on; it is left on.
    """
    from .instrumented import ResponsesUsageInstrumentor
    from .telemetry import Told, by_hand

    told = Told()
    ResponsesUsageInstrumentor().instrument(**told.providers)
    stream = pieces.whole(pieces.SHORT)
    plain, ours = standin.PlainSyncAPIClient(stream), standin.SyncAPIClient(stream)
    standin.drain(ours)
    return {
        "plain": lambda: standin.drain(plain),
        "ours": lambda: standin.drain(ours),
        "by hand": by_hand(told.attributes, told.points(), AT_START),
    }


def _heard(calls: int, rounds: int) -> tuple[float, float, int]:
    from .instrumented import ResponsesUsageInstrumentor

    works = {name: _times(calls, work) for name, work in contenders().items()}
    costs = paired({**works, "nothing": lambda: None}, rounds)
    ResponsesUsageInstrumentor().uninstrument()
    ours, by_hand = added(costs, "ours", "plain"), added(costs, "by hand", "nothing")
    return ours / calls, by_hand / calls, len(pieces.whole(pieces.SHORT))


def _unheard(providers: Callable[[], dict[str, Any]], calls: int, rounds: int) -> tuple[float, float]:
    from .instrumented import instrumented

    short, long = pieces.whole(pieces.SHORT), pieces.repeated(calls * 100)
    with instrumented(**providers()):
        costs = paired(
            {
                "plain": _times(calls * 10, lambda: standin.drain(standin.PlainSyncAPIClient(short))),
                "ours": _times(calls * 10, lambda: standin.drain(standin.SyncAPIClient(short))),
                "plain long": lambda: standin.drain(standin.PlainSyncAPIClient(long)),
                "ours long": lambda: standin.drain(standin.SyncAPIClient(long)),
            },
            rounds,
        )
    per_call = added(costs, "ours", "plain") / (calls * 10)
    return per_call, (added(costs, "ours long", "plain long") - per_call) / len(long)


def _times(number: int, work: Callable[[], object]) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(number):
            work()

    return repeat
