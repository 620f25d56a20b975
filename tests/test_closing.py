"""How a call ends when its stream is left early, or when the reader of the stream raises."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from calls import entered, items, settle
from conftest import Serve
from embedded.http_server import Hold, Reply, SeenRequest, Send, frame
from embedded.responses_api import error
from observed import Observed, token_attributes, usage_attributes
from test_endings import (
    ANSWER,
    ASKED,
    both,
    client_of,
    encoded,
    faults,
    looked_up,
    runtimes,
    take,
    told,
    untidy,
)
from test_matrix import Runtime

pytestmark = pytest.mark.usefixtures("quick_collections")

EVENTS = [frame(event) for event in ANSWER.events()]


def pieces(*data: bytes, encoding: str | None = None) -> Reply:
    """A stream with one HTTP chunk for each piece."""
    reply = Reply.sse(list(data))
    return replace(reply, headers={**reply.headers, "content-encoding": encoding}) if encoding else reply


def stored(reply: Reply) -> Callable[[SeenRequest], Reply]:
    """A server that replies so to a call, and keeps the response."""
    return lambda request: reply if request.method == "POST" else Reply.json(ANSWER.response())


def not_stored(reply: Reply) -> Callable[[SeenRequest], Reply]:
    """A server that replies so to a call, and does not keep the response."""
    return lambda request: reply if request.method == "POST" else error(404, "not found")


# Errors of the client's decoder


def brotli_per_event(events: list[bytes]) -> Reply:
    brotli = pytest.importorskip("brotli")
    return pieces(*map(brotli.compress, events), encoding="br")


def broken_gzip(events: list[bytes]) -> Reply:
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    first = compressor.compress(events[0]) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return pieces(first, b"\xff" * 50, *events[1:], encoding="gzip")


def broken_deflate(events: list[bytes]) -> Reply:
    reply = encoded(pieces(*events), zlib.MAX_WBITS)
    first, *rest = reply.steps
    return replace(reply, steps=(first, Send(b"\xff" * 50), *rest))


@pytest.mark.parametrize("reader", ["events", "bytes"])
@pytest.mark.parametrize("body", [brotli_per_event, broken_gzip, broken_deflate])
@runtimes
@untidy
def test_a_body_that_cannot_be_decoded_is_an_error(
    runtime: Runtime, body: Callable[[list[bytes]], Reply], reader: str, observed: Observed, serve: Serve
) -> None:
    """The call ends as `error` with the name of the decoder's exception. That is no fault of this package."""
    server = serve(stored(body(EVENTS)))

    async def main() -> None:
        client = client_of(runtime, server)
        called = client.responses
        if reader == "bytes":
            async with entered(called.with_streaming_response.create(**ASKED)) as response:
                with pytest.raises(Exception, match=r"."):
                    async for _ in items(response.iter_bytes()):
                        pass
        else:
            stream = await settle(called.create(**ASKED))
            with pytest.raises(Exception, match=r"."):
                await take(stream, 3)
            await settle(stream.close())
        await settle(client.close())

    runtime.drive(main)
    assert told(observed.span()) == looked_up("error", "DecodingError", events=1)
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
    assert faults(observed) == 0


# Errors of the SDK, with the rest of the stream unread

BAD_EVENTS = {
    "bad json": b"data: {\n\n",
    "comment": b"data: : keepalive\n\n",
    "no data": b"event: ping\ndata: \n\n",
    "event alone": b"event: ping\n\n",
}


def in_one_piece(events: list[bytes]) -> Reply:
    return replace(pieces(b"".join(events)), steps=(Send(b"".join(events)), Hold()))


def in_one_segment(events: list[bytes]) -> Reply:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    headers = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
    return Reply(headers=headers, steps=(Send(chunks), Hold()), chunked=False)


@pytest.mark.parametrize("arrive", [in_one_piece, in_one_segment])
@pytest.mark.parametrize("bad", BAD_EVENTS)
@runtimes
@untidy
def test_an_event_on_which_the_sdk_raises_is_an_error_though_the_terminal_event_has_arrived(
    runtime: Runtime, bad: str, arrive: Callable[[list[bytes]], Reply], observed: Observed, serve: Serve
) -> None:
    """The application got an exception, so the call did not complete. The usage is known nevertheless."""
    server = serve(not_stored(arrive([*EVENTS[:4], BAD_EVENTS[bad], *EVENTS[4:]])))
    raised: list[str] = []

    async def main() -> None:
        client = client_of(runtime, server)
        try:
            async with entered(await settle(client.responses.create(**ASKED))) as stream:
                await take(stream, len(EVENTS) + 1)
        except (StopIteration, StopAsyncIteration):
            raised.append("")
        except Exception as caught:
            raised.append(type(caught).__name__)
        await settle(client.close())

    runtime.drive(main)
    span = observed.span()
    known = told(span)
    if raised == [""]:  # this release of the SDK skips the event
        assert known == {"outcome": "completed", "source": "stream", "events": len(EVENTS)}
    else:
        del known["events"]
        assert known == {"outcome": "error", "error": "JSONDecodeError", "source": "stream"}
    assert token_attributes(span) == usage_attributes(ANSWER.usage)
    assert faults(observed) == 0


@both
def test_an_error_of_another_stream_closes_this_one(
    runtime: Runtime, observed: Observed, serve: Serve
) -> None:
    """If the body of the loop reads a second stream and that one raises, the first is closed."""
    bad = in_one_piece([*EVENTS[:3], b"data: {\n\n"])
    held = replace(pieces(), steps=(*map(Send, EVENTS[:3]), Hold()))
    replies = [held, bad]
    server = serve(
        lambda request: replies.pop(0) if request.method == "POST" else Reply.json(ANSWER.response())
    )

    async def main() -> None:
        client = client_of(runtime, server)

        async def read_both() -> None:
            async with entered(await settle(client.responses.create(**ASKED))) as stream:
                await take(stream, 3)
                async with entered(await settle(client.responses.create(**ASKED))) as other:
                    await take(other, 9)

        with pytest.raises(ValueError, match="line 1"):
            await read_both()
        await settle(client.close())

    runtime.drive(main)
    outcomes = sorted(told(span)["outcome"] for span in observed.spans(2))
    assert outcomes == ["closed", "error"]
