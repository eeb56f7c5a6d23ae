"""Dialling: addresses by turns, deadlines, the options really set, and no socket left."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest
import trio
import trio.testing
from dial_kit import V4, V6, dialer, listening, refused, told
from kit import open_sockets

from canal_trio.errors import CanalError, Failure, Kind, Side
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Bounds, Upstream
from canal_trio.upstream import dial
from canal_trio.upstream.dial import TcpDialer
from canal_trio.upstream.resolve import Address


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
    with socket.socket() as bound:  # its port is taken, so nobody else can begin to listen there
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
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
