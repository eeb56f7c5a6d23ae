"""Corners of dialling, leasing and tunnels: what comes together in one step, and what only a bug would bring."""

from __future__ import annotations

import socket
from typing import Any
from weakref import ref

import pytest
import trio
import trio.testing
from dial_kit import V4, dialer, told
from peers import Certificates
from test_leases import granted, pool_of

from canal_trio.errors import CanalError, Failure, Kind, Phase, Side
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.relay.flow import Ended, FlowReceiver, FlowSender, open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Bounds, Deadlines, Settings, Upstream
from canal_trio.testing.simstream import SimStream, sim_stream_pair
from canal_trio.upstream.connect import Connector
from canal_trio.upstream.forward import ForwardedConnection
from canal_trio.upstream.http1 import Http1Connection
from canal_trio.upstream.idle import has_hung_up
from canal_trio.upstream.tunnel import parse_proxy
from canal_trio.upstream.turns import Turns
from canal_trio.wire.targets import BaseUrl

# -- dialling ----------------------------------------------------------------------------------------------------------


async def test_two_addresses_accept_in_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is taken, and the other connection is closed, not lost."""
    connect = dialer()
    accept = trio.Event()
    made: list[TcpStream] = []
    others: list[socket.socket] = []

    async def both(_address: Any) -> TcpStream:
        await accept.wait()
        near, far = socket.socketpair()
        others.append(far)
        made.append(TcpStream(near))
        return made[-1]

    monkeypatch.setattr(connect, "_one", both)
    async with trio.open_nursery() as nursery:
        won: list[Any] = []

        async def dial() -> None:
            won.append(await connect._first([(V4, ("192.0.2.1", 1)), (V4, ("192.0.2.2", 1))]))

        nursery.start_soon(dial)
        await trio.sleep(0.3)  # beyond the head start of the first: both are trying
        accept.set()
    assert won == made[:1]
    assert len(made) == 2
    for far in others:
        far.setblocking(False)
    with pytest.raises(BlockingIOError):
        others[0].recv(1)
    assert others[1].recv(1) == b""
    won[0].close()
    for far in others:
        far.close()


async def test_two_dials_at_once_read_the_trust_store_once(certificates: Certificates) -> None:
    """The second one waits for what the first finds."""
    connect = dialer()
    found: list[Any] = []

    async def ask() -> None:
        found.append(await connect._context(certificates.ca_file, ("http/1.1",)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
    assert found[0] is found[1]
    assert len(connect._contexts) == 1


async def test_a_base_url_that_nobody_checked() -> None:
    """A bug of ours, not an upstream's trouble: it is raised."""
    upstream = Upstream("u", "ftp://upstream.test")
    with pytest.raises(CanalError, match="must begin with http"):
        await Connector(Settings(), Reaper()).connect(upstream)
    with pytest.raises(CanalError, match="must begin with http"):
        await dialer(resolver=told())(upstream)


async def test_a_dialler_whose_streams_cannot_be_closed_in_one_step() -> None:
    """Cancelling at once would be impossible, so such a dialler is a bug."""

    async def dial(_: Upstream) -> Any:
        return trio.testing.memory_stream_pair()[0]

    with pytest.raises(CanalError, match="cannot be closed in one step"):
        await Connector(Settings(), Reaper(), dial).connect(Upstream("u", "http://upstream.test"))


# -- leases ------------------------------------------------------------------------------------------------------------


async def test_a_hang_up_that_the_look_before_reuse_finds_is_counted_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Inside of TLS, looking is reading, and may be what shows the end: the connection has left the pool by then."""
    async with pool_of(1) as (pool, network):
        granted(await pool.lease()).release()
        first = network.made[0]

        def look() -> bool:
            first.hang_up()
            return False

        first.usable = look  # type: ignore[method-assign]  # the fake's own answer, for this once
        lease = granted(await pool.lease())
        assert lease.connection is network.made[1]  # type: ignore[comparison-overlap]  # a fake
        statistics = pool.statistics()
        assert (statistics.stale, statistics.used, statistics.idle) == (1, 1, 0)
        lease.abort()


# -- one connection ----------------------------------------------------------------------------------------------------


class Heads:
    """What came of an attempt."""

    def __init__(self) -> None:
        self.seen: list[ResponseHead] = []
        self.expired: list[Failure] = []
        self.body: FlowSender
        self.flow: FlowReceiver
        self.body, self.flow = open_flow(2)

    def expire(self, failure: Failure) -> None:
        """Keep that, too."""
        self.expired.append(failure)

    async def head(self, head: ResponseHead) -> None:
        """Keep it."""
        self.seen.append(head)
        await trio.lowlevel.checkpoint()


async def connection_on(nursery: trio.Nursery) -> tuple[Http1Connection, SimStream]:
    """A connection, and the upstream's end of it."""
    near, far = sim_stream_pair()
    reaper = Reaper()
    await nursery.start(reaper.run)
    raw: Any = near
    return Http1Connection(near, raw, reaper=reaper, bounds=Bounds(), deadlines=Deadlines()), far


UPGRADE = RequestHead(
    b"GET", b"/", Headers([(b"Host", b"u.test"), (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")])
)
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


async def test_a_tunnel_without_a_direction_up(autojump_clock: trio.testing.MockClock) -> None:
    """A request that has nothing to say: the upstream's bytes come, and its end."""
    async with trio.open_nursery() as nursery:
        connection, far = await connection_on(nursery)
        answer = Heads()
        results: list[Failure | None] = []

        async def run() -> None:
            results.append(await connection.run(UPGRADE, None, answer))

        nursery.start_soon(run)
        await far.send_all(SWITCHED + b"early")
        assert await answer.flow.take() == [b"early"]
        await far.send_eof()
        assert await answer.flow.take() == []
        assert isinstance(answer.flow.ending, Ended)
        await trio.testing.wait_all_tasks_blocked()
        assert results == [None]
        connection.abort()
        nursery.cancel_scope.cancel()


async def test_a_tunnel_whose_direction_up_was_aborted(autojump_clock: trio.testing.MockClock) -> None:
    """It is not ended as if all had been said: the connection breaks."""
    async with trio.open_nursery() as nursery:
        connection, far = await connection_on(nursery)
        answer = Heads()
        sender, receiver = open_flow()
        results: list[Failure | None] = []

        async def run() -> None:
            results.append(await connection.run(UPGRADE, receiver, answer))

        nursery.start_soon(run)
        await far.send_all(SWITCHED)
        await trio.testing.wait_all_tasks_blocked()
        assert [head.status for head in answer.seen] == [101]
        sender.abort(Failure(Side.CLIENT, Phase.STREAM, Kind.GONE))
        await trio.testing.wait_all_tasks_blocked()
        (failure,) = results
        assert failure is not None
        assert failure.kind is Kind.RESET
        assert (await far.receive_some(1000)).startswith(b"GET / HTTP/1.1\r\n")
        assert await far.receive_some(1000) == b""
        nursery.cancel_scope.cancel()


async def test_what_a_log_shows_of_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    """Whose turn it is and where it leads; never the credentials of a proxy."""
    async with trio.open_nursery() as nursery:
        connection, _ = await connection_on(nursery)
        base = BaseUrl("http", "u.test", 80, b"", b"u.test")
        forwarded = ForwardedConnection(connection, parse_proxy("http://me:hidden@proxy.test:3128"), base)
        text = repr(forwarded)
        assert text.startswith("<ForwardedConnection by http://proxy.test:3128: <Http1Connection ")
        assert text.endswith(", send>>")
        assert "hidden" not in text
        assert not forwarded.ends()
        connection.abort()
        nursery.cancel_scope.cancel()


async def test_a_closed_connection_waits_for_the_garbage_collector(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever is told of its deadlines knows them: from the moment it is closed they do not know it any longer."""
    heads = Heads()
    turns, freed = Turns(Deadlines(), Reaper(), heads.expire), ref(heads)
    turns.stop()
    del heads
    assert freed() is None
    turns.stop()


async def test_a_hangup_is_known_before_the_poller_has_heard_of_it() -> None:
    """By a zero-time look at the socket; a connection that we have closed is one that has ended, too."""
    near, far = socket.socketpair()
    stream = TcpStream(near)
    assert not has_hung_up(stream)
    far.close()
    assert has_hung_up(stream)
    await trio.testing.wait_all_tasks_blocked()
    assert stream.hangup
    assert has_hung_up(stream)
    stream.close()
    near, far = socket.socketpair()
    stream = TcpStream(near)
    stream.close()
    assert has_hung_up(stream)
    far.close()
