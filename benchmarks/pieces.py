"""The bytes of an answer, and the pieces in which they arrive."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable
from typing import Final

from embedded.answer import Answer, FunctionCall, usage
from embedded.http_server import frame

_ID = "resp_" + "0123456789abcdef" * 3
SHORT = 1
USAGE = (31_337, 4_243)  # token counts that occur nowhere else
SEGMENT = 1_460  # bytes of an answer in a TCP segment of Ethernet

# Tokens as long as those of English text.
_TOKENS = (" the", " stream", " of", " events", " is", " divided", ",", " and", " each", " piece", ".", " It")


def answer(deltas: int) -> Answer:
    """An answer of so many pieces of text."""
    return Answer(pieces=(" token",) * deltas, id=_ID, created_at=1_700_000_000)


def whole(deltas: int) -> list[bytes]:
    """Every event of a stream, from `response.created` to `response.completed`."""
    return [
        frame(event) for event in answer(deltas).events({"stream_options": {"include_obfuscation": False}})
    ]


def padded(deltas: int, first: str = _TOKENS[0]) -> list[bytes]:
    """Every event of a stream as the API sends it by default: a delta is padded, and some 260 bytes long."""
    tokens = (first, *itertools.islice(itertools.cycle(_TOKENS[1:]), max(0, deltas - 1)))
    made = Answer(pieces=tokens[:deltas], id=_ID, created_at=1_700_000_000, usage=usage(*USAGE))
    events = made.events({})
    for event in events:
        if "obfuscation" in event:  # the same in each run
            padding = hashlib.sha256(str(event["sequence_number"]).encode()).hexdigest()
            event["obfuscation"] = padding[: len(event["obfuscation"])]
    return [frame(event) for event in events]


def mixed(deltas: int) -> list[bytes]:
    """A stream whose deltas hardly ever repeat the type of the one before."""
    call = FunctionCall("find", ("x",))
    events = Answer(pieces=("x",), calls=(call,), id=_ID, created_at=1_700_000_000).events({})
    text, arguments = (frame(event) for event in events if event["type"].endswith(".delta"))
    return [text, arguments] * (deltas // 2)


def repeated(deltas: int) -> list[bytes]:
    """The deltas of one answer alone, each an object of its own as it comes off a socket."""
    return [piece for piece in whole(deltas) if b'.delta"' in piece]


def cut(events: Iterable[bytes], size: int) -> list[bytes]:
    """The same bytes in pieces of this size. An event may begin in one and end in another."""
    body = b"".join(events)
    return [body[start : start + size] for start in range(0, len(body), size)]


def compressed(events: Iterable[bytes]) -> list[bytes]:
    """The body as gzip, in segments. The server flushes after each event, as one that streams has to."""
    compressor = zlib.compressobj(wbits=31)
    parts = [compressor.compress(event) + compressor.flush(zlib.Z_SYNC_FLUSH) for event in events]
    return cut([*parts, compressor.flush()], SEGMENT)


def decompressed(events: Iterable[bytes]) -> list[bytes]:
    """What an HTTP library makes of the segments of a compressed body."""
    decompressor = zlib.decompressobj(wbits=31)
    return [plain for segment in compressed(events) if (plain := decompressor.decompress(segment))]


ONE_EVENT: Final = "1 event a piece"
FOUR_KIB: Final = "4,096 bytes"
GZIP: Final = "gzip"
# How the bytes of a stream may be divided.
DIVISIONS: Final[dict[str, Callable[[list[bytes]], list[bytes]]]] = {
    ONE_EVENT: list,
    "1,460 bytes": lambda events: cut(events, SEGMENT),
    FOUR_KIB: lambda events: cut(events, 4_096),
    "65,536 bytes": lambda events: cut(events, 65_536),
    GZIP: decompressed,
}


def divided(division: str, deltas: int) -> list[bytes]:
    """Return the pieces of a padded stream."""
    return DIVISIONS[division](padded(deltas))
