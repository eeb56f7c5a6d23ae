"""`TlsStream`: Trio's stream contract, the hand-over contract, and honest ends, over real and simulated transports."""

from __future__ import annotations

import ssl

import pytest
import trio
from relay_pairs import clog, tcp_pair
from tls_pairs import read_all, shaken, sim_tls, wrapped
from trio.testing import check_half_closeable_stream

from canal_trio.relay.handover import HandoverStream, handover_end
from canal_trio.relay.tls import RECORDS, TlsStream
from canal_trio.testing.simstream import SimLink, sim_stream_pair

# -- Trio's contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_it_keeps_trios_contract_over_tcp(latest):
    """Trio's own contract suite for half-closeable streams passes over real sockets, clogged ones too."""

    async def maker():
        return await shaken(await tcp_pair(), latest=latest)

    async def clogged():
        client, server = await shaken(await tcp_pair(small=True), latest=latest)
        await clog(client, server)
        return client, server

    await check_half_closeable_stream(maker, clogged)


async def test_it_keeps_trios_contract_over_a_simulated_stream():
    """The same over simulated streams, so that nothing in it depends on sockets."""

    async def maker():
        return await shaken(sim_stream_pair())

    await check_half_closeable_stream(maker, None)


def test_it_can_hand_over():
    """It is found by the check that the relay makes, and is its own end: bytes must not go around it."""

    async def main():
        client, server = wrapped(sim_stream_pair())
        assert isinstance(client, HandoverStream)
        assert handover_end(client) is client
        assert client.socket is None
        client.close()
        server.close()

    trio.run(main)


async def test_socket_is_the_transports():
    """Options and addresses are those of the TCP socket below."""
    below = await tcp_pair()
    client, server = await shaken(below)
    assert client.socket is below[0].socket
    assert client.selected_alpn_protocol() == "http/1.1"
    assert "TLSv1.3" in repr(client)
    assert client.hangup is False
    await client.aclose()
    await server.aclose()


# -- the handshake -----------------------------------------------------------------------------------------------------


async def test_a_certificate_that_is_not_trusted():
    """The client says what is wrong, and the server hears it by an alert; the reason is the cause."""
    client, server = wrapped(sim_stream_pair())
    stranger = TlsStream(client.transport_stream, ssl.create_default_context(), server_hostname="gw.test")
    assert "before the handshake" in repr(stranger)
    async with trio.open_nursery() as nursery:

        async def serve():
            try:
                await server.do_handshake()
                await server.receive_some()  # a server of TLS 1.3 may be done before it hears of the alert
            except trio.BrokenResourceError as exc:
                heard.append(str(exc))
        heard: list[str] = []
        nursery.start_soon(serve)
        with pytest.raises(trio.BrokenResourceError, match="CERTIFICATE_VERIFY_FAILED") as trouble:
            await stranger.do_handshake()
        assert isinstance(trouble.value.__cause__, ssl.SSLCertVerificationError)
    assert "ALERT_UNKNOWN_CA" in heard[0]
    stranger.close()
    server.close()


async def test_a_peer_that_goes_away_during_the_handshake():
    """An end in the middle of the handshake is a broken connection."""
    client, server = wrapped(sim_stream_pair())
    server.close()
    with pytest.raises(trio.BrokenResourceError):
        await client.do_handshake()
    client.close()


async def test_a_handshake_through_a_straw():
    """A transport that takes a few bytes at a time makes the handshake wait, not fail."""
    client, server = await shaken(sim_stream_pair(a_to_b=SimLink(buffer=7), b_to_a=SimLink(buffer=7)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"hello")
        assert await server.receive_some() == b"hello"
    client.close()
    server.close()


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["receive_some", "try_receive"])
async def test_an_end_without_close_notify_is_no_end(how):
    """A transport that just ends leaves the message broken (RFC 8446 6.1): truncation is never taken for an end."""
    async with sim_tls() as (client, server):
        await server.send_all(b"half")
        server.close()
        assert await client.receive_some() == b"half"
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError, match="close_notify"):
            await client.receive_some() if how == "receive_some" else client.try_receive(10)


async def test_aclose_says_goodbye():
    """`aclose` is an end for the peer, and stays one."""
    async with sim_tls() as (client, server):
        await server.send_all(b"all")
        await server.aclose()
        await server.aclose()
        assert await client.receive_some() == b"all"
        assert await client.receive_some() == b""
        assert client.try_receive(10) == b""


async def test_an_unsent_rest_is_not_followed_by_an_end():
    """Where ciphertext could not leave, `aclose` must not make what was cut look whole."""
    async with sim_tls(b_to_a=SimLink(buffer=2000)) as (client, server):
        assert server.try_send(b"x" * 10_000) == 0
        await server.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await read_all(client)


async def test_aclose_of_a_broken_connection():
    """Being polite to nobody raises nothing."""
    async with sim_tls() as (client, server):
        client.transport_stream.reset()
        await server.aclose()


async def test_half_close_lets_the_answer_through():
    """After `send_eof` the other direction goes on to its own end."""
    async with sim_tls() as (client, server):
        await client.send_all(b"question")
        await client.send_eof()
        await client.send_eof()
        assert await read_all(server) == b"question"
        await server.send_all(b"answer")
        await server.aclose()
        assert await read_all(client) == b"answer"
        with pytest.raises(trio.ClosedResourceError):
            client.try_send(b"more")


async def test_plain_text_is_told():
    """What is no TLS breaks the stream with a reason."""
    async with sim_tls() as (client, server):
        await server.transport_stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError, match="no proper TLS"):
            await client.receive_some()


async def test_closed_streams_give_nothing():
    """After `close()` not even what was decrypted already is handed out."""
    async with sim_tls() as (client, server):
        await server.send_all(b"abcdef")
        assert await client.receive_some(3) == b"abc"
        client.close()
        for use in (lambda: client.try_receive(3), lambda: client.try_send(b"x"), lambda: client.arm(bool)):
            with pytest.raises(trio.ClosedResourceError):
                use()


@pytest.mark.parametrize("bad", [0, -1])
async def test_receive_some_checks_its_argument(bad):
    """At least one byte, and an integer, is asked for."""
    async with sim_tls() as (client, _):
        with pytest.raises(ValueError, match="at least 1"):
            await client.receive_some(bad)
        with pytest.raises(TypeError):
            await client.receive_some(1.5)


# -- taken means in the transport --------------------------------------------------------------------------------------


async def test_taken_means_that_the_ciphertext_has_left():
    """While the transport takes nothing, nothing is reported as taken, however much was encrypted."""
    async with sim_tls(b_to_a=SimLink(buffer=3000)) as (client, server):
        assert server.try_send(b"a" * 5000) == 0
        assert server.try_send(b"a" * 5000) == 0
        received = b""
        rest = memoryview(b"a" * 5000)
        while rest:
            await trio.testing.wait_all_tasks_blocked()
            received += client.try_receive(5000) or b""
            rest = rest[server.try_send(rest) :]
        await trio.testing.wait_all_tasks_blocked()
        while data := client.try_receive(5000):
            received += data
        assert received == b"a" * 5000


async def test_what_is_held_is_bounded():
    """Offered a megabyte, the stream encrypts no more of it than one step beyond what the transport took."""
    async with sim_tls(b_to_a=SimLink(buffer=10_000)) as (_, server):
        rest = server.try_send_batch([bytes(16_384)] * 64)
        assert sum(map(len, rest)) == 64 * 16_384
        assert len(server._pending) + server._outgoing.pending < RECORDS + 1024


async def test_a_batch_is_cut_where_the_transport_was_full():
    """Pieces already taken are gone from the rest, and of the one that was begun only what is missing is left."""
    async with sim_tls(b_to_a=SimLink(buffer=40_000)) as (client, server):
        pieces = [b"a" * 100, b"b" * 90_000, b"c" * 10]
        rest = server.try_send_batch(pieces)
        assert [len(piece) for piece in rest] == [90_000 - RECORDS, 10]
        received = b""
        while rest or len(received) < 90_110:
            received += await client.receive_some()
            rest = server.try_send_batch(rest)
        assert received == b"".join(pieces)


async def test_a_session_that_the_peer_broke_cannot_send():
    """Where TLS itself refuses to send, the stream is broken."""
    async with sim_tls() as (_, server):
        server._say_goodbye()
        server._eof_sent = False
        with pytest.raises(trio.BrokenResourceError, match="cannot send"):
            server.try_send(b"x")


async def test_a_sender_at_work_is_not_interrupted(autojump_clock):
    """While a task sends, `try_send` and other tasks are refused; the bytes stay in order."""
    async with sim_tls(b_to_a=SimLink(buffer=2000)) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.send_all, b"z" * 20_000)
        await trio.testing.wait_all_tasks_blocked()
        for use in (lambda: server.try_send(b"x"), lambda: server.try_send_batch([b"x"])):
            with pytest.raises(trio.BusyResourceError):
                use()
        with pytest.raises(trio.BusyResourceError):
            await server.send_all(b"x")
        received = b""
        while len(received) < 20_000:
            received += await client.receive_some()
        assert received == b"z" * 20_000


async def test_reset_breaks_the_transport():
    """The peer finds a broken connection, and this end is closed."""
    async with sim_tls() as (client, server):
        client.reset()
        client.reset()
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            client.try_receive(1)
