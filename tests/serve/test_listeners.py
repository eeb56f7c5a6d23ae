"""Listening sockets and the accept loop: options, bounds, shortages, and addresses that are taken."""

from __future__ import annotations

import errno
import logging
import socket

import pytest
import trio
from serve_fakes import eventually

from canal_trio.relay.streams import TcpStream
from canal_trio.serve.limits import RESERVE, capacity_of
from canal_trio.serve.listen import Acceptor, ListenError, Slots, open_listeners, set_options
from canal_trio.settings import Bounds, Deadlines, Settings, Upstream

LOOPBACK = ("127.0.0.1", 0)


async def _keep(stream: TcpStream, _peer: str) -> None:
    """A handler that serves until its client says something."""
    await stream.receive_some()


async def test_accepted_sockets_have_their_options() -> None:
    """Every accepted connection is non-blocking, flushes at once, is kept alive, and bounds its unsent bytes."""
    [listener] = await open_listeners([LOOPBACK])
    set_options(listener, Bounds(client_unsent_bytes=12_345), Deadlines(client_write=7))
    got: list[TcpStream] = []

    async def handler(stream: TcpStream, peer: str) -> None:
        assert peer == "127.0.0.1"
        got.append(stream)
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        acceptor = Acceptor(listener, Slots(5), handler, nursery)
        nursery.start_soon(acceptor.run)
        async with await trio.open_tcp_stream(*acceptor.address):
            await eventually(lambda: got)
            sock, tcp = got[0].socket, socket.IPPROTO_TCP
            assert not sock.getblocking()
            assert sock.getsockopt(tcp, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(tcp, socket.TCP_KEEPIDLE) == 60
            assert sock.getsockopt(tcp, socket.TCP_KEEPINTVL) == 15
            assert sock.getsockopt(tcp, socket.TCP_KEEPCNT) == 4
            assert sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == 37_000
            assert sock.getsockopt(tcp, socket.TCP_NOTSENT_LOWAT) == 12_345
        nursery.cancel_scope.cancel()
    listener.close()


async def test_an_endless_write_deadline_is_no_overflow() -> None:
    """A write deadline of years still fits into the kernel's option."""
    [listener] = await open_listeners([LOOPBACK])
    set_options(listener, Bounds(), Deadlines(client_write=1e12))
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 86_400_000
    listener.close()


async def test_connections_beyond_the_bound_wait() -> None:
    """At the bound nobody is accepted; each connection that ends lets one in; two listeners share the bound."""
    listeners = await open_listeners([LOOPBACK, LOOPBACK])
    slots = Slots(3)
    async with trio.open_nursery() as nursery:
        acceptors = [Acceptor(sock, slots, _keep, nursery) for sock in listeners]
        for acceptor in acceptors:
            nursery.start_soon(acceptor.run)
        clients = [await trio.open_tcp_stream(*acceptors[number % 2].address) for number in range(8)]
        await eventually(lambda: slots.used == 3)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert slots.used == 3
        for client in clients[:5]:
            await client.send_all(b"x")
        await eventually(lambda: slots.used == 3)
        for client in clients:
            await client.aclose()
        await eventually(lambda: slots.used == 0)
        nursery.cancel_scope.cancel()
    for listener in listeners:
        listener.close()


async def test_the_bound_can_change() -> None:
    """Raising the bound lets the waiting in; lowering it cuts nobody off and lets nobody in."""
    [listener] = await open_listeners([LOOPBACK])
    slots = Slots(1)
    async with trio.open_nursery() as nursery:
        acceptor = Acceptor(listener, slots, _keep, nursery)
        nursery.start_soon(acceptor.run)
        clients = [await trio.open_tcp_stream(*acceptor.address) for _ in range(4)]
        await eventually(lambda: slots.used == 1)
        slots.resize(3)
        await eventually(lambda: slots.used == 3)
        slots.resize(1)
        assert (slots.used, slots.free) == (3, -2)
        await clients[0].aclose()
        await eventually(lambda: slots.used == 2)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert slots.used == 2
        for client in clients[1:]:
            await client.aclose()
        nursery.cancel_scope.cancel()
    listener.close()


class _Flaky:
    """A listening socket whose accept fails as it is told to before it works."""

    def __init__(self, sock: socket.socket, faults: list[int]) -> None:
        self.sock = sock
        self.faults = faults

    def fileno(self) -> int:
        """The real one's."""
        return self.sock.fileno()

    def getsockname(self) -> object:
        """The real one's."""
        return self.sock.getsockname()

    def accept(self) -> tuple[socket.socket, object]:
        """The next fault, or the real one's."""
        if self.faults:
            raise OSError(self.faults.pop(0), "planted")
        return self.sock.accept()


async def test_a_shortage_backs_off_and_is_told_rarely(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of descriptors or memory, accepting pauses for longer and longer, says so now and then, and recovers."""
    [listener] = await open_listeners([LOOPBACK])
    flaky = _Flaky(listener, [errno.EMFILE] * 50 + [errno.ENOBUFS])
    causes: list[str] = []
    slots = Slots(5)
    async with trio.open_nursery() as nursery:
        acceptor = Acceptor(flaky, slots, _keep, nursery, trouble=causes.append)  # type: ignore[arg-type]
        nursery.start_soon(acceptor.run)
        client = await trio.open_tcp_stream(*acceptor.address)
        with caplog.at_level(logging.ERROR, "canal_trio.serve"):
            await eventually(lambda: slots.used, 1000)
        assert causes == ["EMFILE"] * 50 + ["ENOBUFS"]
        assert 45 < trio.current_time() < 60
        assert len(caplog.messages) == 2
        assert caplog.messages[0].endswith(": planted (1 times); trying again")
        await client.aclose()
        nursery.cancel_scope.cancel()
    listener.close()


async def test_what_concerns_one_connection_only_is_skipped() -> None:
    """A connection that was reset before it was accepted costs nobody anything."""
    [listener] = await open_listeners([LOOPBACK])
    flaky = _Flaky(listener, [errno.ECONNABORTED, errno.EPROTO])
    slots = Slots(5)
    async with trio.open_nursery() as nursery:
        acceptor = Acceptor(flaky, slots, _keep, nursery)  # type: ignore[arg-type]
        nursery.start_soon(acceptor.run)
        async with await trio.open_tcp_stream(*acceptor.address):
            await eventually(lambda: slots.used == 1)
        nursery.cancel_scope.cancel()
    listener.close()


async def test_any_other_fault_is_a_bug() -> None:
    """An error that makes no sense is raised, not swallowed."""
    [listener] = await open_listeners([LOOPBACK])
    flaky = _Flaky(listener, [errno.EBADF])
    async with trio.open_nursery() as connections:
        acceptor = Acceptor(flaky, Slots(5), _keep, connections)  # type: ignore[arg-type]
        async with await trio.open_tcp_stream(*acceptor.address):
            with pytest.raises(OSError, match="planted"):
                await acceptor.run()
    listener.close()


async def test_closing_takes_in_what_waits() -> None:
    """A connection that the kernel had accepted before the listener closed is served, not reset."""
    [listener] = await open_listeners([LOOPBACK])
    served: list[str] = []

    async def handler(stream: TcpStream, peer: str) -> None:
        served.append(peer)
        await stream.send_all(b"late but served")

    async with trio.open_nursery() as nursery:
        acceptor = Acceptor(listener, Slots(5), handler, nursery)
        async with await trio.open_tcp_stream(*acceptor.address) as client:
            acceptor.close()
            assert await client.receive_some() == b"late but served"
    assert listener.fileno() == -1


@pytest.mark.parametrize("share", [False, True], ids=["plain", "with SO_REUSEPORT"])
async def test_a_taken_address_is_refused(share: bool) -> None:
    """Where another program serves, even one that would share the port, listening is refused, nothing left open."""
    with socket.socket() as other:
        if share:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(LOOPBACK)
        other.listen()
        port = other.getsockname()[1]
        [free] = await open_listeners([LOOPBACK])
        chosen = free.getsockname()[:2]
        free.close()
        with pytest.raises(ListenError) as caught:
            await open_listeners([chosen, ("127.0.0.1", port)])
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: the address is in use; another program serves there"
    )
    [again] = await open_listeners([chosen])  # the first one was closed again
    again.close()


async def test_an_address_of_another_machine() -> None:
    """An address this machine does not have, or a name that does not exist, is named with the reason."""
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1:80: this machine has no such address"):
        await open_listeners([("192.0.2.1", 80)])
    with pytest.raises(ListenError, match=r"cannot listen on no-such-host\.invalid:80: "):
        await open_listeners([("no-such-host.invalid", 80)])


async def test_a_name_with_two_addresses_gets_one_port() -> None:
    """localhost:0 listens on one port, on each of its addresses that this machine has."""
    sockets = await open_listeners([("localhost", 0)])
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


def _capacity(descriptors: int, connections: float = float("inf"), wanted: int | None = None):
    bounds = Bounds(upstream_connections=connections, client_connections=wanted, admin_connections=64)
    return capacity_of(Settings(bounds=bounds, upstreams=(Upstream("a", "http://a"),)), descriptors)


def test_capacity_follows_the_descriptors() -> None:
    """Each client may need an upstream's descriptor too, unless upstreams are bounded; more than that is told."""
    reserve = RESERVE + 64
    assert _capacity(10_000 + reserve).connections == 5000
    assert _capacity(10_000 + reserve, connections=100).connections == 9900
    assert _capacity(10_000 + reserve, connections=9000).connections == 5000
    assert _capacity(10_000 + reserve, wanted=7).connections == 7
    asked = _capacity(10_000 + reserve, wanted=6000)
    assert (asked.connections, asked.wanted) == (5000, 6000)
    assert _capacity(20).connections == 1
