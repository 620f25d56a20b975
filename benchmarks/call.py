"""What a call costs besides its events: with an SDK that listens, and with none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import pieces, standin
from .clock import added, alternating, paired
from .row import Row

LONG = 95  # pieces of text, of whose gaps 23 are told: never are more of a call
AT_START = 9  # attributes that the span of the stand-in's call has from the start
# In multiples of the work by hand, by the number of events; 2 for all others.
_GOALS = {"one event": 1.6, "103 events": 1.3}


def rows(*, quick: bool) -> list[Row]:
    """Measure a call of a short stream against the same span and the same points by hand."""
    standin.install()
    from .telemetry import deaf, unsampled

    rounds = 100 if quick else 3_000
    ratios = _heard(rounds)
    per_call, per_event = {}, {}
    for name, providers in (("no SDK", deaf), ("not sampled", unsampled)):
        per_call[name], per_event[name] = _unheard(providers, *((20, 3) if quick else (100, 21)))
    return [
        *(
            Row(
                f"added per call of {events.removesuffix(', async')}",
                ratio,
                _GOALS.get(events, 2.0),
                "x",
                f"by hand {by_hand_us:.0f} us",
                "async" if events.endswith("async") else "sync",
            )
            for events, (ratio, by_hand_us) in ratios.items()
        ),
        Row("added per call, no SDK configured", per_call["no SDK"] / 1000, 2, "us"),
        Row("added per call, not sampled and no metrics", per_call["not sampled"] / 1000, 8, "us"),
        # What is left of the difference between equal loops is the error of the measurement.
        Row("added per event, no SDK or not sampled", max(map(abs, per_event.values())), 5, "ns"),
    ]


def contenders() -> dict[str, Callable[[], None]]:
    """Return each kind of call unobserved, as it is observed, and its span and points by hand.

    One is a stream of its last event alone, others have all events of a short answer, sync and async, and of
    a longer one. The instrumentation is on from now on.
    """
    from .instrumented import ResponsesUsageInstrumentor
    from .telemetry import Told, by_hand

    told = Told()
    ResponsesUsageInstrumentor().instrument(**told.providers)
    short, long = pieces.whole(pieces.SHORT), pieces.whole(LONG)
    plain, plain_async = standin.PlainSyncAPIClient, standin.PlainAsyncAPIClient
    works: dict[str, Callable[[], None]] = {}
    for kind, unobserved, observed in (
        ("one event", _drain(plain(short[-1:])), _drain(standin.SyncAPIClient(short[-1:]))),
        (f"{len(short)} events", _drain(plain(short)), _drain(standin.SyncAPIClient(short))),
        (
            f"{len(short)} events, async",
            _async_drain(plain_async(short)),
            _async_drain(standin.AsyncAPIClient(short)),
        ),
        (f"{len(long)} events", _drain(plain(long)), _drain(standin.SyncAPIClient(long))),
    ):
        observed()
        works[f"{kind}, plain"] = unobserved
        works[f"{kind}, ours"] = observed
        works[f"{kind}, by hand"] = by_hand(told.attributes, told.points(), AT_START)
    return works


def _drain(client: standin.PlainSyncAPIClient) -> Callable[[], None]:
    return lambda: standin.drain(client)


def _async_drain(client: standin.PlainAsyncAPIClient) -> Callable[[], None]:
    return lambda: standin.run(standin.async_drain(client))


def _heard(rounds: int) -> dict[str, tuple[float, float]]:
    """Return how often the work by hand fits into ours, and that work in us, for each kind of call."""
    from .instrumented import ResponsesUsageInstrumentor

    costs = alternating({**contenders(), "nothing": lambda: None}, rounds)
    ResponsesUsageInstrumentor().uninstrument()
    found = {}
    for kind in [name.removesuffix(", ours") for name in costs if name.endswith(", ours")]:
        by_hand = added(costs, f"{kind}, by hand", "nothing")
        found[kind] = added(costs, f"{kind}, ours", f"{kind}, plain") / by_hand, by_hand / 1000
    return found


def _unheard(providers: Callable[[], dict[str, Any]], calls: int, rounds: int) -> tuple[float, float]:
    from .instrumented import instrumented

    short, long = pieces.whole(pieces.SHORT), pieces.repeated(calls * 100)
    with instrumented(**providers()):
        costs = paired(
            {
                "plain": _times(calls * 10, _drain(standin.PlainSyncAPIClient(short))),
                "ours": _times(calls * 10, _drain(standin.SyncAPIClient(short))),
                "plain long": _drain(standin.PlainSyncAPIClient(long)),
                "ours long": _drain(standin.SyncAPIClient(long)),
            },
            rounds,
        )
    per_call = added(costs, "ours", "plain") / (calls * 10)
    per_event = (min(costs["ours long"]) - min(costs["plain long"]) - per_call) / len(long)
    return per_call, per_event


def _times(number: int, work: Callable[[], object]) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(number):
            work()

    return repeat
