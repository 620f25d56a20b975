"""The bytes of an answer as a server writes them: one event a piece."""

from __future__ import annotations

from embedded.answer import Answer, FunctionCall
from embedded.http_server import frame

_ID = "resp_" + "0123456789abcdef" * 3
SHORT = 1


def answer(deltas: int) -> Answer:
    """An answer of so many pieces of text."""
    return Answer(pieces=(" token",) * deltas, id=_ID, created_at=1_700_000_000)


def whole(deltas: int) -> list[bytes]:
    """Every event of a stream, from `response.created` to `response.completed`."""
    return [
        frame(event) for event in answer(deltas).events({"stream_options": {"include_obfuscation": False}})
    ]


def mixed(deltas: int) -> list[bytes]:
    """A stream whose deltas hardly ever repeat the type of the one before."""
    call = FunctionCall("find", ("x",))
    events = Answer(pieces=("x",), calls=(call,), id=_ID, created_at=1_700_000_000).events({})
    text, arguments = (frame(event) for event in events if event["type"].endswith(".delta"))
    return [text, arguments] * (deltas // 2)


def repeated(deltas: int) -> list[bytes]:
    """The deltas of one answer alone, each an object of its own as it comes off a socket."""
    return [piece for piece in whole(deltas) if b'.delta"' in piece]
