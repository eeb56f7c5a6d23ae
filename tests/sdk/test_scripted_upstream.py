"""The scripted upstream does what its scripts say: what other tests conclude from it must be true."""

from __future__ import annotations

import httpcore
import pytest
import trio

from canal_trio.testing.scripts import (
    Close,
    Cut,
    Echo,
    Forever,
    Reset,
    Script,
    Send,
    Stall,
    chat_stream,
    cut_after,
    cut_at,
    error_event,
    openai_error,
    reply,
    stream,
)
from canal_trio.testing.upstreams import ScriptedUpstream, by_model, in_order

REQUEST = b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n{"model":"plain"}'


async def converse(upstream: ScriptedUpstream, data: bytes = REQUEST) -> bytes:
    """Everything the upstream says until it ends the connection or says `[DONE]` and its last chunk."""
    received = b""
    async with await trio.open_tcp_stream(upstream.host, upstream.port) as client:
        await client.send_all(data)
        async for piece in client:
            received += piece
            if received.endswith(b"0\r\n\r\n"):
                break
    return received


async def test_every_framing_says_the_same() -> None:
    """A stream's payload is the same, whether chunked, with a length or close-delimited, as an independent client
    reads it."""
    pieces = [b"data: 1\n\n", b"data: two\r\n\r\n", b": x\n"]
    for framing in ("chunked", "length", "close"):
        async with (
            ScriptedUpstream(stream(pieces, framing=framing)) as upstream,
            httpcore.AsyncConnectionPool() as pool,
        ):
            response = await pool.request("POST", f"{upstream.base_url}/x", content=b"{}")
            assert response.content == b"".join(pieces) == upstream.answer.payload  # type: ignore[union-attr]  # a Script
            await upstream.until(lambda: upstream.requests[0].answered)
            assert (upstream.requests[0].tokens, upstream.requests[0].left) == (3, None)
            assert upstream.complaints == []


async def test_keep_alive_serves_the_next_request() -> None:
    """Two pipelined requests on one connection get two answers, in order, and are recorded on that connection."""
    async with ScriptedUpstream(in_order(reply({"n": 1}), chat_stream(2))) as upstream:
        received = await converse(upstream, REQUEST + REQUEST)
        assert received == reply({"n": 1}).wire + chat_stream(2).wire
        assert len(upstream.connections) == 1
        assert [request.body for request in upstream.connections[0].requests] == [b'{"model":"plain"}'] * 2
        assert upstream.requests[1].head + upstream.requests[1].body == REQUEST


async def test_by_model_chooses() -> None:
    """The model in the body chooses the script, and an unknown one is a 404 in OpenAI's shape."""
    async with ScriptedUpstream(by_model({"other": chat_stream(1)})) as upstream:
        client = await trio.open_tcp_stream(upstream.host, upstream.port)
        async with client:
            await client.send_all(REQUEST)
            assert (await client.receive_some()).startswith(b"HTTP/1.1 404 Not Found\r\n")


@pytest.mark.parametrize("ending", [Cut(), Reset()])
async def test_a_cut_ends_at_its_byte(ending: Cut | Reset) -> None:
    """Cut at any byte, the client gets exactly the bytes before it and then a FIN, or an RST."""
    whole = chat_stream(2)
    for byte in range(1, len(whole.wire), 37):
        async with ScriptedUpstream(cut_at(whole, byte, ending)) as upstream:
            received = b""
            async with await trio.open_tcp_stream(upstream.host, upstream.port) as client:
                await client.send_all(REQUEST)
                try:
                    async for piece in client:
                        received += piece
                    assert ending == Cut()
                except trio.BrokenResourceError:
                    assert ending == Reset()
            if ending == Cut():
                assert received == whole.wire[:byte]
            assert upstream.requests[0].left is None


async def test_cut_after_counts_tokens() -> None:
    """Broken off after a token, the answer holds that token and no later byte, and then what was asked for."""
    whole = chat_stream(4)
    for tokens in range(5):
        script = cut_after(whole, tokens, error_event(), Cut())
        async with ScriptedUpstream(script) as upstream:
            received = await converse(upstream)
        assert received.count(b"word") == tokens == upstream.requests[0].tokens
        assert received == script.wire
        assert received.endswith(error_event().data)
        assert b"[DONE]" not in received


@pytest.mark.parametrize("reset", [False, True])
async def test_leaving_is_seen(reset: bool) -> None:
    """A client that leaves in the middle, by FIN or by RST, is seen at once, and nothing more is sent."""
    async with (
        ScriptedUpstream(chat_stream(1000, gap=0.01)) as upstream,
        await trio.open_tcp_stream(upstream.host, upstream.port) as client,
    ):
        await client.send_all(REQUEST)
        await upstream.until(lambda: bool(upstream.requests) and upstream.requests[0].tokens >= 2)
        if reset:
            client.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SO_LINGER 0
            client.socket.close()
        else:
            await client.send_eof()
        await upstream.until(lambda: upstream.requests[0].left is not None, seconds=1)
        assert upstream.connections[0].left_by == ("reset" if reset else "fin")
        assert upstream.requests[0].tokens < 50
        await upstream.until(lambda: upstream.open_connections == 0)


async def test_an_early_answer_does_not_wait_for_the_body() -> None:
    """With `body="during"` the answer comes while the upload is still on its way, and the body is read all the same."""
    early = Script(openai_error(413).steps, body="during")
    async with ScriptedUpstream(early) as upstream, await trio.open_tcp_stream(upstream.host, upstream.port) as client:
        await client.send_all(REQUEST[:-5])
        assert (await client.receive_some()).startswith(b"HTTP/1.1 413 ")
        assert not upstream.requests[0].complete
        await client.send_all(REQUEST[-5:])
        await upstream.until(lambda: upstream.requests[0].complete and upstream.requests[0].answered)
        assert upstream.requests[0].json == {"model": "plain"}


async def test_an_upload_that_is_not_read_meets_a_full_socket() -> None:
    """With `body="never"` the peer's upload stops after some buffers' worth."""
    script = Script((Stall(),), body="never")
    async with (
        ScriptedUpstream(script, receive_buffer=8192) as upstream,
        await trio.open_tcp_stream(upstream.host, upstream.port) as client,
    ):
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
        with trio.move_on_after(0.5) as patience:
            await client.send_all(head + bytes(99_999_999))
        assert patience.cancelled_caught
        assert upstream.connections[0].received < 200_000


async def test_an_endless_answer_counts_what_the_kernel_took() -> None:
    """`Forever` sends until the socket is full, and `sent` says how much that was."""
    script = stream([b"x" * 10_000])
    script = Script((script.steps[0], Forever((Send(b"2710\r\n" + b"x" * 10_000 + b"\r\n", tokens=1),))))
    async with ScriptedUpstream(script, send_buffer=16384) as upstream:
        client = await trio.open_tcp_stream(upstream.host, upstream.port)
        async with client:
            await client.send_all(REQUEST)
            await upstream.until(lambda: bool(upstream.requests) and upstream.requests[0].tokens >= 3)
            taken = -1
            while taken != upstream.requests[0].sent:
                taken = upstream.requests[0].sent
                await trio.sleep(0.1)
            assert upstream.requests[0].tokens * 10_000 <= taken < 20_000_000


async def test_echo_is_a_tunnel() -> None:
    """After its 101 an `Echo` returns what comes, the bytes right behind the request included."""
    switch = Send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with (
        ScriptedUpstream(Script((switch, Echo()))) as upstream,
        await trio.open_tcp_stream(upstream.host, upstream.port) as client,
    ):
        await client.send_all(request + b"early ")
        received = b""
        while not received.endswith(b"early "):
            received += await client.receive_some()
        await client.send_all(b"late")
        assert await client.receive_some() == b"late"
        assert upstream.complaints == []


async def test_a_malformed_request_is_a_complaint() -> None:
    """What breaks HTTP is noted and answered 400, so that a test can demand that there was none."""
    async with ScriptedUpstream(chat_stream()) as upstream:
        received = await converse(upstream, b"POST / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 400 ")
        assert len(upstream.complaints) == 1


async def test_until_gives_up() -> None:
    """Waiting for what never happens fails within its deadline and shows what was seen."""
    async with ScriptedUpstream(chat_stream()) as upstream:
        with pytest.raises(AssertionError, match="not seen in"):
            await upstream.until(lambda: False, seconds=0.05)


async def test_tls_knows_a_cut_from_a_close(tls_contexts: tuple) -> None:
    """Over TLS a `Close` sends close_notify and a `Cut` does not, and both leave the same bytes before it."""
    server, client_context = tls_contexts
    for ending, proper in ((Close(), True), (Cut(), False)):
        script = cut_at(stream([b"abc"], framing="close"), 10_000, ending)
        script = Script((*[step for step in script.steps if isinstance(step, Send)], ending))
        async with ScriptedUpstream(script, ssl_context=server) as upstream:
            client = await trio.open_ssl_over_tcp_stream("127.0.0.1", upstream.port, ssl_context=client_context)
            await client.send_all(REQUEST)
            received = b""
            try:
                async for piece in client:
                    received += piece
                assert proper
            except trio.BrokenResourceError:
                assert not proper
            await trio.aclose_forcefully(client)
            assert received == script.wire
