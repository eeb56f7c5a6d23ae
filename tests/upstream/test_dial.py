"""Dialling: addresses by turns, deadlines, the options really set, trust and names in TLS, and no socket left."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from kit import eventually, open_sockets
from peers import Certificates

from canal_trio.errors import CanalError, Failure, Kind, Phase, Retry, Side
from canal_trio.relay.streams import TcpStream, handover_end
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.upstream import dial
from canal_trio.upstream.dial import TcpDialer
from canal_trio.upstream.resolve import Address, Resolver

V4, V6 = socket.AF_INET, socket.AF_INET6


def dialer(*, bounds: Bounds | None = None, resolver: Resolver | None = None, **deadlines: float) -> TcpDialer:
    """A dialer with these deadlines."""
    return TcpDialer(bounds=bounds or Bounds(), deadlines=Deadlines(**deadlines), resolver=resolver)


def told(*addresses: Address) -> Resolver:
    """A resolver that says this."""
    return Resolver(lookup=lambda _host, _port: list(addresses))


def refused(result: Any) -> Failure:
    """It must be a failure of dialling: nothing was sent."""
    assert isinstance(result, Failure), result
    assert (result.phase, result.retry) == (Phase.DIAL, Retry.UNSENT)
    return result


@asynccontextmanager
async def listening(*, backlog: int | None = None, accept: bool = True) -> AsyncIterator[tuple[int, list[Any]]]:
    """A listener on loopback; its port and what it accepted. `accept=False` leaves them in the backlog."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=backlog)
    accepted: list[Any] = []

    async def keep() -> None:
        while True:
            accepted.append(await listener.accept())

    async with listener, trio.open_nursery() as nursery:
        if accept:
            nursery.start_soon(keep)
        yield listener.socket.getsockname()[1], accepted
        nursery.cancel_scope.cancel()
    for stream in accepted:
        stream.socket.close()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Network:
    """Replaces the one system call of a TCP connection: per address, what it does. Virtual time, no traffic."""

    def __init__(self, patch: pytest.MonkeyPatch, **behaviour: float | None) -> None:
        self.tried: list[tuple[float, str]] = []
        self.behaviour = behaviour  # seconds until it accepts; an errno (negative) until it fails at once; None: never
        network = self

        async def one(_self: TcpDialer, address: Address) -> TcpStream | Failure:
            host = address[1][0]
            network.tried.append((trio.current_time(), host))
            does = network.behaviour[host]
            if does is None:
                await trio.sleep_forever()
            if does is not None and does < 0:
                await trio.lowlevel.checkpoint()
                return dial._refused(address[1], OSError(-int(does), os.strerror(-int(does))))
            near, far = socket.socketpair()
            far.close()
            try:
                await trio.sleep(does or 0)
            except BaseException:
                near.close()
                raise
            return TcpStream(near)

        patch.setattr(TcpDialer, "_one", one)


# -- several addresses -------------------------------------------------------------------------------------------------


async def test_families_take_turns(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    """RFC 8305 4: a family without a route costs one head start, not one per address."""
    network = Network(monkeypatch, a6=None, b6=None, c6=None, a4=0.0, b4=0.0)
    addresses = [(V6, ("a6", 1)), (V6, ("b6", 1)), (V6, ("c6", 1)), (V4, ("a4", 1)), (V4, ("b4", 1))]
    stream = await dialer()._first(dial._interleaved(addresses))
    assert isinstance(stream, TcpStream)
    stream.close()
    assert network.tried == [(0.0, "a6"), (dial.STAGGER, "a4")]
    assert [where[0] for _, where in dial._interleaved(addresses)] == ["a6", "a4", "b6", "b4", "c6"]


async def test_a_refusal_ends_the_head_start(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The next address is tried at once."""
    network = Network(monkeypatch, a=-errno.ECONNREFUSED, b=-errno.EHOSTUNREACH, c=0.0)
    stream = await dialer()._first([(V4, (host, 1)) for host in "abc"])
    assert isinstance(stream, TcpStream)
    stream.close()
    assert network.tried == [(0.0, "a"), (0.0, "b"), (0.0, "c")]


async def test_the_last_refusal_is_told_when_nobody_accepts(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """One failure, not a list."""
    Network(monkeypatch, a=-errno.ECONNREFUSED, b=-errno.ECONNREFUSED)
    failure = refused(await dialer()._first([(V4, ("a", 1)), (V4, ("b", 1))]))
    assert (failure.side, failure.kind, failure.detail) == (Side.UPSTREAM, Kind.REFUSED, "b:1: Connection refused.")


async def test_the_slower_of_two_that_accept_is_closed(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """One stream comes out, one socket is open."""
    before = open_sockets()
    Network(monkeypatch, a=dial.STAGGER + 0.1, b=0.1)
    stream = await dialer()._first([(V4, ("a", 1)), (V4, ("b", 1))])
    assert isinstance(stream, TcpStream)
    assert len(open_sockets() - before) == 1
    stream.close()


@pytest.mark.parametrize("at", [0.0, 0.1, dial.STAGGER, dial.STAGGER + 0.1])
async def test_cancelled_it_leaves_no_socket(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, at: float
) -> None:
    """At any moment: before, between, and in the very instant in which an address accepts."""
    before = open_sockets()
    Network(monkeypatch, a=dial.STAGGER + 0.1, b=0.1)
    with trio.move_on_after(at):
        stream = await dialer()._first([(V4, ("a", 1)), (V4, ("b", 1))])
        assert isinstance(stream, TcpStream)
        stream.close()
    assert not open_sockets() - before


async def test_cancelled_from_outside_in_the_step_in_which_an_address_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner's own cancel and the caller's meet: the caller gets nothing, so the socket must go."""
    before = open_sockets()
    outer = trio.CancelScope()
    original = TcpStream.__init__

    async def one(_self: TcpDialer, address: Address) -> TcpStream | Failure:
        if address[1][0] == "slow":
            await trio.sleep_forever()
        near, far = socket.socketpair()
        far.close()
        await trio.lowlevel.checkpoint()
        outer.cancel()
        return TcpStream(near)

    monkeypatch.setattr(TcpDialer, "_one", one)
    assert original is TcpStream.__init__
    with outer:
        stream = await dialer()._first([(V4, ("quick", 1)), (V4, ("slow", 1))])
        assert isinstance(stream, TcpStream)
        stream.close()
    assert not open_sockets() - before


# -- failures and deadlines --------------------------------------------------------------------------------------------


async def test_nobody_listens() -> None:
    """Refused, by the address that refused."""
    port = free_port()
    failure = refused(await dialer()(Upstream("u", f"http://127.0.0.1:{port}")))
    assert (failure.side, failure.kind) == (Side.UPSTREAM, Kind.REFUSED)
    assert failure.detail == f"127.0.0.1:{port}: Connection refused."


async def test_a_name_that_is_none() -> None:
    """DNS, from the resolver."""
    resolver = told()
    failure = refused(await dialer(resolver=resolver)(Upstream("u", "http://nowhere.test")))
    assert failure.kind is Kind.DNS


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL])
async def test_what_we_lack_ourselves_is_not_blamed_on_the_upstream(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """No descriptor, no local port: the gateway's own trouble, 503 and not 502."""

    def lacking(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(trio.socket, "socket", lacking)
    failure = refused(await dialer().connect("127.0.0.1", 1))
    assert (failure.side, failure.kind) == (Side.GATEWAY, Kind.UNAVAILABLE)
    assert os.strerror(number) in failure.detail


async def test_a_connect_that_the_kernel_gives_up_is_a_timeout(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """ETIMEDOUT is a 504, as our own deadline is."""
    Network(monkeypatch, a=-errno.ETIMEDOUT)
    failure = refused(await dialer()._first([(V4, ("a", 1))]))
    assert (failure.side, failure.kind) == (Side.UPSTREAM, Kind.TIMEOUT)


async def test_connecting_has_a_deadline(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Five seconds for all addresses together."""
    Network(monkeypatch, **{"127.0.0.1": None})
    failure = refused(await dialer(connect=5).connect("127.0.0.1", 80))
    assert failure.kind is Kind.TIMEOUT
    assert failure.detail == "127.0.0.1:80 did not answer within 5 s."
    assert trio.current_time() == 5


async def test_the_lookup_counts_as_connecting(autojump_clock: trio.testing.MockClock) -> None:
    """A resolver that hangs is a connect timeout."""

    class Hanging:
        async def resolve(self, host: str, port: int) -> list[Address]:
            """Never."""
            await trio.sleep_forever()
            raise AssertionError

    hanging: Any = Hanging()
    failure = refused(await dialer(resolver=hanging, connect=5)(Upstream("u", "http://[2001:db8::1]:81/")))
    assert (failure.kind, failure.detail) == (Kind.TIMEOUT, "[2001:db8::1]:81 did not answer within 5 s.")
    assert trio.current_time() == 5


async def test_cancelled_in_a_real_connect_it_leaves_no_socket() -> None:
    """The backlog is full, so the SYN waits; then the caller goes."""
    async with listening(backlog=1, accept=False) as (port, _):
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        before = open_sockets()
        with trio.move_on_after(0.2) as scope:
            await dialer(connect=60).connect("127.0.0.1", port)
        assert scope.cancelled_caught, "the connect did not hang"
        assert not open_sockets() - before
        for filler in fillers:
            filler.close()


async def test_a_configuration_that_was_never_checked_is_a_bug() -> None:
    """Not the peer's trouble."""
    with pytest.raises(CanalError):
        await dialer()(Upstream("u", "ftp://127.0.0.1"))


# -- the socket --------------------------------------------------------------------------------------------------------


async def test_the_options_are_really_set() -> None:
    """By asking the kernel: what the design promises of each upstream's socket."""
    async with listening() as (port, _):
        bounds = Bounds(upstream_receive_bytes=65_536)
        stream = await dialer(bounds=bounds, upstream_idle=120).connect("127.0.0.1", port)
        assert isinstance(stream, TcpStream)
        sock = stream.socket
        tcp = socket.IPPROTO_TCP
        assert sock.getsockopt(tcp, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 65_536  # socket(7): the kernel doubles it
        assert sock.getsockopt(tcp, socket.TCP_NOTSENT_LOWAT) == dial.UNSENT_BYTES
        assert sock.getsockopt(tcp, socket.TCP_KEEPIDLE) == dial.KEEP_IDLE
        assert sock.getsockopt(tcp, socket.TCP_KEEPINTVL) == dial.KEEP_INTERVAL
        assert sock.getsockopt(tcp, socket.TCP_KEEPCNT) == dial.KEEP_COUNT
        assert sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == 120_000
        stream.close()


async def test_without_an_idle_deadline_the_kernel_has_none_either() -> None:
    """TCP_USER_TIMEOUT stays the system's."""
    async with listening() as (port, _):
        stream = await dialer(upstream_idle=float("inf")).connect("127.0.0.1", port)
        assert isinstance(stream, TcpStream)
        assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        stream.close()


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One authority for these tests."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@asynccontextmanager
async def tls_listening(
    context: ssl.SSLContext, after: Callable[[trio.SSLStream[trio.SocketStream]], Any] | None = None
) -> AsyncIterator[int]:
    """A TLS server that shakes hands and waits."""

    async def serve(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, context, server_side=True)
        try:
            await secured.do_handshake()
            if after is not None:
                await after(secured)
            await stream.receive_some(1)
        except trio.BrokenResourceError:
            pass
        finally:
            stream.socket.close()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def asks_for(context: ssl.SSLContext) -> list[str | None]:
    """The names that clients ask `context` for."""
    names: list[str | None] = []
    context.sni_callback = lambda _connection, name, _context: names.append(name)
    return names


async def test_tls_with_the_authority_one_trusts(certificates: Certificates) -> None:
    """ca_file instead of the system's store; SNI without the trailing dot; ALPN as the upstream's settings say."""
    context = certificates.server("h2", "http/1.1")
    names = asks_for(context)
    async with tls_listening(context) as port:
        connect = dialer(resolver=told((V4, ("127.0.0.1", port))))
        for http2, chosen in ((False, "http/1.1"), (True, "h2"), (True, "h2")):
            upstream = Upstream("u", f"https://localhost.:{port}", http2=http2, ca_file=certificates.ca_file)
            stream: Any = await connect(upstream)
            assert not isinstance(stream, Failure), stream
            assert stream.selected_alpn_protocol() == chosen
            raw = handover_end(stream)
            assert raw is not None
            raw.close()
        assert names == ["localhost"] * 3
        assert len(connect._contexts) == 2, "the trust store is read once per kind"


async def test_an_authority_one_does_not_trust(certificates: Certificates) -> None:
    """The system's store does not know it: TLS, with the reason, and the socket closed."""
    async with tls_listening(certificates.server()) as port:
        failure = refused(await dialer()(Upstream("u", f"https://127.0.0.1:{port}")))
    assert (failure.side, failure.kind) == (Side.UPSTREAM, Kind.TLS)
    assert failure.detail.startswith("127.0.0.1: its certificate is not trusted: ")


async def test_another_name_than_the_certificates(certificates: Certificates) -> None:
    """A trusted authority is not enough."""
    async with tls_listening(certificates.server()) as port:
        connect = dialer(resolver=told((V4, ("127.0.0.1", port))))
        upstream = Upstream("u", f"https://other.test:{port}", ca_file=certificates.ca_file)
        failure = refused(await connect(upstream))
    assert failure.kind is Kind.TLS
    assert "other.test" in failure.detail


async def test_a_peer_that_speaks_no_tls(certificates: Certificates) -> None:
    """Plain text comes back: a TLS failure in a sentence."""

    async def shout(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, shout, listeners)
        port = listeners[0].socket.getsockname()[1]
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        failure = refused(await dialer()(upstream))
        nursery.cancel_scope.cancel()
    assert failure.kind is Kind.TLS


async def test_a_peer_that_leaves_during_the_handshake(certificates: Certificates) -> None:
    """TLS: the connection was closed."""

    async def leave(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, leave, listeners)
        port = listeners[0].socket.getsockname()[1]
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        failure = refused(await dialer()(upstream))
        nursery.cancel_scope.cancel()
    assert failure.kind is Kind.TLS
    assert "closed during the TLS handshake" in failure.detail


async def test_the_handshake_has_a_deadline(certificates: Certificates) -> None:
    """A peer that accepts and says nothing: `connect_tls` more than `connect`, then a timeout; no socket left."""
    before = open_sockets()
    async with listening() as (port, accepted):
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        start = trio.current_time()
        failure = refused(await dialer(connect=0.2, connect_tls=0.1)(upstream))
        assert failure.kind is Kind.TIMEOUT
        assert "TLS handshake" in failure.detail
        assert trio.current_time() - start >= 0.3
        with trio.fail_after(2):
            assert await accepted[0].receive_some() != b""  # the ClientHello
            assert await accepted[0].receive_some() == b""
    assert not open_sockets() - before


async def test_cancelled_in_the_handshake_it_leaves_no_socket(certificates: Certificates) -> None:
    """The stream is closed at once."""
    async with listening() as (port, accepted):
        before = open_sockets()
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialer(), upstream)
            await eventually(lambda: accepted)
            await accepted[0].receive_some()
            nursery.cancel_scope.cancel()
        accepted.pop().socket.close()
        assert not open_sockets() - before


async def test_a_trust_store_that_cannot_be_read_is_our_fault(
    certificates: Certificates, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The log names the file, the client's answer does not."""
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate")
    async with tls_listening(certificates.server()) as port:
        for path in (str(broken), str(tmp_path / "missing.pem")):
            failure = refused(await dialer()(Upstream("u", f"https://127.0.0.1:{port}", ca_file=path)))
            assert (failure.side, failure.kind) == (Side.GATEWAY, Kind.UNAVAILABLE)
            assert path not in failure.detail
            assert path in caplog.text


async def test_a_bare_fin_is_not_an_end(certificates: Certificates) -> None:
    """Whoever cuts the connection below TLS must not look as if the body had ended."""

    async def cut(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.send_all(b"half")
        await stream.transport_stream.send_eof()

    async with tls_listening(certificates.server(), cut) as port:
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        stream = await dialer()(upstream)
        assert not isinstance(stream, Failure)
        assert await stream.receive_some(100) == b"half"
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(100)
        raw = handover_end(stream)
        assert raw is not None
        raw.close()
