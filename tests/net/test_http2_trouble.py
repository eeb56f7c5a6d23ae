"""An upstream that speaks HTTP/2 and breaks off, refuses or lies: a scripted one, behind the whole gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from kit import RunningGateway, ask, data_of, eventually, request, running_gateway, settings_for
from peers import H2Peer, http2_upstream, scripted_h2, token

from canal_trio.errors import Kind, Side
from canal_trio.hooks import Outcome
from canal_trio.settings import Deadlines, Upstream


@asynccontextmanager
async def gateway_before(
    play: Callable[[H2Peer], Awaitable[None]], **more: Any
) -> AsyncIterator[tuple[RunningGateway, list[H2Peer]]]:
    """An upstream that plays `play` on each connection, and a gateway before it."""
    async with (
        scripted_h2(play) as (url, peers),
        running_gateway(settings_for(Upstream("u0", url, http2=True), **more)) as gateway,
    ):
        yield gateway, peers


CUTS = ["fin", "tcp-reset", "rst-stream", "goaway", "garbage", "silence"]


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("where", ["between", "inside"])
async def test_a_cut_upstream_never_looks_finished(how: str, where: str) -> None:
    """However HTTP/2 ends without END_STREAM, the client's body stays unterminated, and no `[DONE]` is made up."""

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id, ("content-type", "text/event-stream"))
        await peer.data(stream_id, token(0) + (b'data: {"ha' if where == "inside" else b""))
        await seen.wait()
        if how == "tcp-reset":
            peer.reset()
        elif how == "rst-stream":
            peer.h2.reset_stream(stream_id, 2)
            await peer.flush()
            await peer.gone()
        elif how == "goaway":
            peer.h2.close_connection(error_code=2)
            await peer.flush()
            await peer.gone()
        elif how == "garbage":
            await peer.stream.send_all(b"\xff" * 64)
            await peer.gone()
        elif how == "silence":
            await peer.gone()

    seen = trio.Event()
    deadlines = Deadlines(upstream_idle=0.3 if how == "silence" else 120)
    async with gateway_before(play, deadlines=deadlines) as (gateway, _peers):
        client = await gateway.connect()
        await client.send(ask(stream=True))
        head = await client.final_head()
        assert head.status == 200
        while token(0) not in bytes(client.seen):
            assert await client.fill()
        seen.set()
        with trio.fail_after(5):
            await client.body(head, "POST")
        assert not head.complete
        assert "[DONE]" not in data_of(head.body)
        assert (b"upstream_error" in head.body) == (where == "between")
        record = await gateway.records.one()
        assert record.outcome is Outcome.UPSTREAM_FAILED
        assert record.failure is not None
        assert record.failure.side is Side.UPSTREAM
        expected = {"garbage": Kind.MALFORMED, "silence": Kind.STALLED, "rst-stream": Kind.RESET}
        assert record.failure.kind is expected.get(how, Kind.CUT)


async def test_done_then_silence_ends_the_body_over_http2_too() -> None:
    """A stream without END_STREAM for `after_done` behind its last event is ended for it, and the upstream closed."""

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id, ("content-type", "text/event-stream"))
        await peer.data(stream_id, token(0) + b"data: [DONE]\n\n")
        await peer.gone()

    async with gateway_before(play, deadlines=Deadlines(after_done=0.1)) as (gateway, peers):
        client = await gateway.connect()
        await client.send(ask(stream=True))
        response = await client.response()
        assert response.complete
        assert response.body == token(0) + b"data: [DONE]\n\n"
        record = await gateway.records.one()
        assert record.outcome is Outcome.COMPLETED
        assert record.flags == ("late_body_end",)
        await eventually(lambda: peers[0].ended)


async def test_a_graceful_restart_of_the_upstream_cuts_nothing() -> None:
    """GOAWAY without an error and with our stream in it: the stream is relayed to its end, the next request dials."""

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id, ("content-type", "text/event-stream"))
        await peer.data(stream_id, token(0))
        peer.h2.close_connection(last_stream_id=stream_id)  # h2 sends no more after it, so by hand from here
        await peer.flush()
        rest = token(1) + b"data: [DONE]\n\n"
        frame = len(rest).to_bytes(3, "big") + b"\0\1" + stream_id.to_bytes(4, "big") + rest
        for start in range(0, len(frame), 7):
            await peer.stream.send_all(frame[start : start + 7])
        with trio.move_on_after(5):
            await peer.stream.receive_some()

    async with gateway_before(play) as (gateway, peers):
        client = await gateway.connect()
        for _ in range(2):
            await client.send(ask(stream=True))
            response = await client.response()
            assert response.complete
            assert response.body == token(0) + token(1) + b"data: [DONE]\n\n"
        assert len(peers) == 2


async def test_a_reused_connection_that_died_is_replaced_once() -> None:
    """The second request meets a connection on which the upstream hangs up instead of answering: sent again, fresh."""

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id, ("content-length", "2"))
        await peer.data(stream_id, b"ok", end=True)
        await peer.request()

    async with gateway_before(play) as (gateway, peers):
        client = await gateway.connect()
        for _ in range(2):
            await client.send(ask(stream=False))
            response = await client.response()
            assert (response.status, response.body) == (200, b"ok")
        records = await gateway.records.wait(2)
        assert [record.attempts for record in records] == [1, 2]
        assert len(peers) == 2


REFUSALS = ["refused-stream", "goaway-unseen", "goaway-zero"]


@pytest.mark.parametrize("how", REFUSALS)
async def test_a_request_that_the_upstream_did_not_look_at_goes_to_the_next(how: str) -> None:
    """RFC 9113 8.7: REFUSED_STREAM, and GOAWAY below our stream, promise that nothing was done."""

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        if how == "refused-stream":
            peer.h2.reset_stream(stream_id, 7)
        else:
            peer.h2.close_connection(last_stream_id=0)
        await peer.flush()
        await peer.gone()

    async with scripted_h2(play) as (refusing, _), http2_upstream() as good:
        upstreams = (Upstream("u0", refusing, http2=True), Upstream("u1", good.url, http2=True))
        async with running_gateway(settings_for(*upstreams)) as gateway:
            response = await gateway.ask(ask(tokens=1))
            assert (response.status, response.complete) == (200, True)
            record = await gateway.records.one()
            assert (record.attempts, record.upstream) == (2, "u1")


async def test_a_fresh_connection_that_dies_after_the_request_is_not_asked_again() -> None:
    """A generation may have begun, and cost money."""

    async def play(peer: Any) -> None:
        await peer.request()

    async with scripted_h2(play) as (url, peers):
        upstreams = (Upstream("u0", url, http2=True), Upstream("u1", url, http2=True))
        async with running_gateway(settings_for(*upstreams)) as gateway:
            response = await gateway.ask(ask(tokens=1))
            assert (response.status, response.error["code"]) == (502, "upstream_disconnected")
            assert response.header("x-should-retry") == "false"
            assert len(peers) == 1


@pytest.mark.parametrize(
    "fields",
    [
        [(":status", "200"), ("x-split", "a\r\nset-cookie: b")],
        [(":status", "200"), ("x-nul", "a\0b")],
        [(":status", "200"), ("x:colon", "b")],
        [(":status", "200"), ("bad name", "b")],
        [(":status", "200"), ("x\r\ny", "b")],
        [(":status", "999")],
        [(":status", "2 0")],
        [(":status", "zero")],
        [(":status", "200"), *[(f"x-{number}", "y") for number in range(200)]],
        [(":status", "200"), ("x-long", "y" * 40_000)],
    ],
    ids=["crlf", "nul", "colon", "space", "crlf-name", "999", "2 0", "words", "many", "long"],
)
async def test_a_head_that_would_not_pass_in_http_1_1_does_not_pass_here(fields: list[tuple[str, str]]) -> None:
    """httpcore does not look at what arrives; whoever relays it into HTTP/1.1 must (response splitting)."""

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        peer.h2.config.validate_outbound_headers = peer.h2.config.normalize_outbound_headers = False
        try:
            peer.h2.send_headers(stream_id, fields)
        except Exception as exc:
            raise AssertionError(f"the test's own h2 refuses: {exc}") from exc
        await peer.flush()
        await peer.gone()

    async with gateway_before(play) as (gateway, _peers):
        client = await gateway.connect()
        await client.send(ask(tokens=1))
        response = await client.response()
        assert (response.status, response.error["code"]) == (502, "upstream_malformed")
        assert b"set-cookie" not in bytes(client.seen).lower()


async def test_a_body_where_there_is_none_reaches_nobody() -> None:
    """DATA behind a 204 would be read as the next response by an HTTP/1.1 client."""

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id, status="204")
        await peer.data(stream_id, b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.gone()

    async with gateway_before(play) as (gateway, _peers):
        client = await gateway.connect()
        await client.send(ask(tokens=1))
        head = await client.final_head()
        assert head.status == 204
        assert await client.rest() == b""


async def test_a_body_of_another_length_than_announced_is_a_cut() -> None:
    """Too short by one byte, with END_STREAM: not complete."""
    seen = trio.Event()

    async def play(peer: Any) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id, ("content-length", "3"))
        await peer.data(stream_id, b"ok")
        await seen.wait()
        await peer.stream.send_all(b"\0\0\0\0\1" + stream_id.to_bytes(4, "big"))
        await peer.gone()

    async with gateway_before(play) as (gateway, _peers):
        client = await gateway.connect()
        await client.send(ask(tokens=1))
        head = await client.final_head()
        assert await client.exactly(2) == b"ok"
        seen.set()
        assert await client.rest() == b""
        assert head.header("content-length") == "3"
        record = await gateway.records.one()
        assert record.failure is not None
        assert record.failure.kind is Kind.MALFORMED


async def test_no_answer_in_time() -> None:
    """PINGs are no answer: the first-byte deadline is not moved by them."""

    async def play(peer: Any) -> None:
        await peer.request()
        with trio.move_on_after(5):
            while True:
                peer.h2.ping(b"12345678")
                await peer.flush()
                await trio.sleep(0.05)

    deadlines = Deadlines(first_byte=0.4)
    async with gateway_before(play, deadlines=deadlines) as (gateway, _peers):
        with trio.fail_after(5):
            response = await gateway.ask(ask(tokens=1))
        assert (response.status, response.error["code"]) == (504, "upstream_timeout")


async def test_an_upstream_that_does_not_take_the_request() -> None:
    """No window is opened: stalled, and the connection closed."""

    async def play(peer: Any) -> None:
        with trio.move_on_after(10):
            await trio.sleep_forever()

    deadlines = Deadlines(upstream_idle=0.4)
    async with gateway_before(play, deadlines=deadlines) as (gateway, _peers):
        with trio.fail_after(5):
            response = await gateway.ask(request("POST", "/v1/files", b"x" * 200_000))
        assert (response.status, response.error["code"]) == (504, "upstream_stalled")


async def test_an_answer_at_length_instead_of_reading_the_request_is_cut_short() -> None:
    """httpcore keeps what comes early; that has a bound, too."""

    async def play(peer: Any) -> None:
        while not peer.heads:
            assert await peer.more()
        (stream_id,) = peer.heads
        await peer.head(stream_id)
        sent = 0
        while sent < 4_000_000 and not peer.ended:
            window = min(peer.h2.local_flow_control_window(stream_id), 16_384)
            if not window:
                assert not await peer.more()
                break
            await peer.data(stream_id, b"z" * window)
            sent += window
            with trio.move_on_after(0):
                await peer.more()
        assert sent < 3_000_000

    async with gateway_before(play) as (gateway, _peers):
        client = await gateway.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 4000000"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, b"x" * 4_000_000)
            with trio.fail_after(8):
                response = await client.response("POST")
            assert (response.status, response.error["code"]) == (502, "upstream_disconnected")
            nursery.cancel_scope.cancel()


async def test_an_upload_that_is_cut_never_looks_complete() -> None:
    """The client leaves in the middle of its body: no END_STREAM, the connection goes."""

    async def play(peer: Any) -> None:
        with trio.move_on_after(5):
            await peer.gone()
        gone.set()

    gone = trio.Event()
    async with gateway_before(play) as (gateway, peers):
        client = await gateway.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 100") + b"half of it")
        await eventually(lambda: peers and peers[0].bodies.get(1))
        client.fin()
        with trio.fail_after(5):
            await gone.wait()
        assert peers[0].bodies == {1: b"half of it"}
        assert peers[0].complete == []
