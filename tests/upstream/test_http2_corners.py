"""The corners of the HTTP/2 connection: heads that HTTP/2 forbids, frames that come alone, pieces that nobody takes.

Simulated network, virtual time.
"""

from __future__ import annotations

import pytest
import trio
import trio.testing
from h2_stage import CHUNKED, GET, silence, stage
from peers import H2Peer

from canal_trio.errors import Kind, Phase, Retry
from canal_trio.messages import Headers, RequestHead
from canal_trio.relay.flow import Ended, open_flow


def lenient(peer: H2Peer) -> None:
    """Let the upstream say what its library would refuse to send."""
    peer.h2.config.validate_outbound_headers = False
    peer.h2.config.normalize_outbound_headers = False


async def test_fields_that_http2_forbids_go_no_further(autojump_clock: trio.testing.MockClock) -> None:
    """Connection, TE and the like mean nothing in HTTP/2 and everything in HTTP/1.1, where the client is."""

    async def play(peer: H2Peer) -> None:
        lenient(peer)
        stream_id = await peer.request()
        await peer.head(stream_id, ("connection", "close"), ("te", "trailers"), ("x-a", "b"))
        await peer.data(stream_id, b"ok", end=True)
        await peer.gone()

    async with stage(play) as it:
        answer = it.start()
        assert await answer.rest() == b"ok"
        assert list(answer.heads[0].headers) == [(b"x-a", b"b")]


@pytest.mark.parametrize("status", ["099", "7"])
async def test_a_status_below_100_is_malformed(status: str, autojump_clock: trio.testing.MockClock) -> None:
    """No status of HTTP: a failure, and no head for the client."""

    async def play(peer: H2Peer) -> None:
        lenient(peer)
        await peer.head(await peer.request(), status=status)
        await peer.gone()

    async with stage(play) as it:
        answer = it.start()
        assert await answer.rest() == b""
        await trio.testing.wait_all_tasks_blocked()
        (failure,) = it.results
        assert failure is not None
        assert (failure.phase, failure.kind) == (Phase.FIRST_BYTE, Kind.MALFORMED)
        assert answer.heads == []


async def test_a_request_with_an_empty_body(autojump_clock: trio.testing.MockClock) -> None:
    """Content-Length: 0 announces a body of which nothing is to be sent: the request is complete all the same."""

    async def play(peer: H2Peer) -> None:
        stream_id = await peer.request()
        assert peer.bodies[stream_id] == b""
        await peer.head(stream_id)
        await peer.data(stream_id, b"ok", end=True)
        await peer.gone()

    head = RequestHead(b"POST", b"/", Headers([(b"Host", b"upstream.test"), (b"Content-Length", b"0")]))
    async with stage(play) as it:
        assert await it.start(head).rest() == b"ok"


async def test_a_graceful_goaway_that_comes_alone(autojump_clock: trio.testing.MockClock) -> None:
    """Nothing is left of that read, so another one follows, and the response goes on to its end."""

    async def play(peer: H2Peer) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id)
        await trio.sleep(1)
        await peer.stream.send_all(b"\0\0\x08\7\0\0\0\0\0" + stream_id.to_bytes(4, "big") + bytes(4))
        await trio.sleep(1)
        await peer.data(stream_id, b"ok", end=True)
        await peer.gone()

    async with stage(play) as it:
        answer = it.start(GET)
        assert await answer.rest() == b"ok"
        assert isinstance(answer.flow.ending, Ended)
        await trio.testing.wait_all_tasks_blocked()
        assert it.results == [None]
        assert not it.connection.reusable


async def test_an_upstream_that_resets_during_the_upload(autojump_clock: trio.testing.MockClock) -> None:
    """The next write shows it: the connection ended, and what was sent may have been acted upon."""
    async with stage(silence) as it:
        sender, receiver = open_flow()
        answer = it.start(CHUNKED, receiver)
        await sender.put(b"one")
        await trio.testing.wait_all_tasks_blocked()
        it.peer.stream.reset()  # type: ignore[attr-defined]  # a simulated stream
        await sender.put(b"two")
        await answer.rest()
        await trio.testing.wait_all_tasks_blocked()
        (failure,) = it.results
        assert failure is not None
        assert (failure.phase, failure.kind, failure.retry) == (Phase.FIRST_BYTE, Kind.CUT, Retry.SENT)
        assert not it.connection.reusable


async def test_pieces_that_are_here_when_nobody_takes_them(autojump_clock: trio.testing.MockClock) -> None:
    """Several frames came in one read and the driver has gone: httpcore's generators end at once, and so does all."""

    async def play(peer: H2Peer) -> None:
        stream_id = await peer.request()
        peer.h2.send_headers(stream_id, [(":status", "200")])
        for _ in range(6):
            peer.h2.send_data(stream_id, b"piece")
        await peer.flush()
        await peer.gone()

    async with stage(play) as it:
        answer = it.start()
        await trio.sleep(1)
        before = trio.current_time()
        answer.flow.close()
        await trio.testing.wait_all_tasks_blocked()
        assert it.results == [None]
        assert it.near.closed
        assert trio.current_time() == before
