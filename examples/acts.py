"""Twelve calls, each with its own way to end, and what the service really answers to each."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import openai

from embedded.answer import Answer, usage
from embedded.http_server import Cut, Hold, Pause
from embedded.responses_api import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import Stream
    from openai.types.responses import ResponseStreamEvent

PACE = 0.03
# Events that two applications wait for before they go. The service sends no more until then, so that each run
# counts the same.
LEFT_AFTER = 16
CANCELLED_AFTER = 19


@dataclass(frozen=True)
class Stage:
    """Where a call is played: the service's addresses for HTTP and WebSocket, and what watches the events."""

    base_url: str
    socket_url: str
    watch: Callable[[Any], None]

    @property
    def client(self) -> dict[str, Any]:
        """What a client is made with."""
        return {"base_url": self.base_url, "api_key": "sk-demo", "max_retries": 0}


@dataclass(frozen=True)
class Act:
    """One call: what the application does, and what the service has planned for it."""

    title: str
    play: Callable[[Stage], None]
    plan: Plan
    by_websocket: bool = False


def read_all(stage: Stage, **more: Any) -> None:
    """Reads to the end, as most do."""
    with openai.OpenAI(**stage.client) as client, _create(client, **more) as stream:
        for event in stream:
            stage.watch(event)


def lose_connection(stage: Stage, **more: Any) -> None:
    """Reads until the network fails."""
    with suppress(openai.APIConnectionError):
        read_all(stage, **more)


def compact(stage: Stage) -> None:
    """Replaces a long conversation by a short item. The API bills this like an answer."""
    with openai.OpenAI(**stage.client) as client:
        client.responses.compact(model="gpt-5.4-mini", input="Everything that was said so far.")


def stop_at_the_last_word(stage: Stage) -> None:
    """Closes the stream when the text is complete, just before the event that has the usage."""
    with openai.OpenAI(**stage.client) as client, _create(client) as stream:
        for event in stream:
            stage.watch(event)
            if event.type == "response.output_text.done":
                return


def lose_interest(stage: Stage) -> None:
    """Closes the stream after some words."""
    with openai.OpenAI(**stage.client) as client, _create(client) as stream:
        for event in islice(stream, LEFT_AFTER):
            stage.watch(event)


def lose_patience(stage: Stage) -> None:
    """Cancels the task that reads."""

    async def read(enough: asyncio.Event) -> None:
        async with openai.AsyncOpenAI(**stage.client) as client:
            stream = await client.responses.create(model="gpt-5.4-mini", input="?", stream=True)
            async for event in stream:
                stage.watch(event)
                if event.sequence_number == CANCELLED_AFTER - 1:
                    enough.set()

    async def main() -> None:
        enough = asyncio.Event()
        task = asyncio.create_task(read(enough))
        await enough.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())


def talk(stage: Stage) -> None:
    """Gets an answer over a WebSocket."""
    with (
        openai.OpenAI(**stage.client, websocket_base_url=stage.socket_url) as client,
        client.responses.connect() as connection,
    ):
        connection.response.create(model="gpt-5.4-mini", input="?")
        for event in connection:
            stage.watch(event)
            if event.type == "response.completed":
                return


def resume(stage: Stage) -> None:
    """Picks a background response up where the network failed."""
    with openai.OpenAI(**stage.client) as client:
        response_id, cursor = "", 0
        try:
            for event in _create(client, background=True):
                stage.watch(event)
                cursor = event.sequence_number
                if event.type == "response.created":
                    response_id = event.response.id
        except openai.APIConnectionError:
            for event in client.responses.retrieve(response_id, stream=True, starting_after=cursor):
                stage.watch(event)


def _create(client: openai.OpenAI, **more: Any) -> Stream[ResponseStreamEvent]:
    stream: Stream[ResponseStreamEvent] = client.responses.create(
        model="gpt-5.4-mini", input="?", stream=True, **more
    )
    return stream


def _words(text: str) -> tuple[str, ...]:
    return tuple(f"{word} " for word in text.split())


# The counts are made up, but in proportion: an emoji with a skin tone and a profession is some ten tokens,
# and yet one delta, since the service holds back what is not yet a whole character.
CREW = ("👩🏽‍🚀", "👨🏻‍🔬", "🧑🏿‍🍳", "👩🏼‍🚒", "🧑🏾‍🌾", "👨🏽‍⚖️", "👩🏿‍🎨", "🧑🏻‍💻", "👩🏽‍🏫", "👨🏾‍🔧")

ACTS = (
    Act(
        "a crew of emoji",
        read_all,
        Plan(Answer(CREW * 2, usage(34, 213)), pace=PACE),
    ),
    Act(
        "a thinker",
        read_all,
        Plan(
            Answer(
                _words("After all that, the answer is 42."),
                usage(1840, 969, cached=1664, reasoning=960),
                reasoning=_words("Weighing life, the universe, and everything else that could matter here"),
            ),
            pace=PACE,
        ),
    ),
    Act(
        "out of tokens",
        partial(read_all, max_output_tokens=48),
        Plan(Answer(_words("Once upon a time there was a story " * 6), usage(21, 96)), pace=PACE),
    ),
    Act(
        "over a WebSocket",
        talk,
        Plan(
            Answer(_words("One connection carries many responses, one after the other."), usage(16, 133)),
            pace=PACE,
        ),
        by_websocket=True,
    ),
    Act("a compaction", compact, Plan(Answer(usage=usage(3120, 187)), before=(Pause(12 * PACE),))),
    Act(
        "closed at the end",
        stop_at_the_last_word,
        Plan(Answer(_words("That is all there is to say about it. " * 2), usage(29, 154)), pace=2 * PACE),
    ),
    Act(
        "closed half-way",
        lose_interest,
        Plan(
            Answer(_words("Let me begin at the very beginning, which is " * 5), usage(18, 441)),
            cut_after=LEFT_AFTER,
            end=Hold(),
            pace=PACE,
        ),
    ),
    Act(
        "a cancelled task",
        lose_patience,
        Plan(
            Answer(_words("In no hurry, one word after another " * 6), usage(27, 305)),
            cut_after=CANCELLED_AFTER,
            end=Hold(),
            pace=PACE,
        ),
    ),
    Act(
        "cut by network",
        lose_connection,
        Plan(
            Answer(_words("The last thing anybody heard of the expedition was " * 4), usage(52, 388)),
            cut_after=20,
            end=Cut(),
            pace=PACE,
            get_replies=("in_progress",),
        ),
    ),
    Act(
        "cut and resumed",
        resume,
        Plan(
            Answer(_words("Where were we? Ah, yes, the rest " * 4), usage(64, 276, reasoning=192)),
            cut_after=16,
            end=Cut(),
            pace=PACE,
            get_replies=("in_progress",) * 100,  # until the application has fetched it
        ),
    ),
    Act(
        "cut, store=False",
        partial(lose_connection, store=False),
        Plan(
            Answer(_words("What is said here is kept by nobody, and so " * 4), usage(40, 120)),
            cut_after=18,
            end=Cut("rst"),
            pace=PACE,
        ),
    ),
    Act(
        "cut and forgotten",
        lose_connection,
        Plan(
            Answer(_words("Who is there? I cannot remember what I was about to say " * 3), usage(33, 210)),
            cut_after=17,
            end=Cut(),
            pace=PACE,
            fate="lost",
        ),
    ),
)
