"""Too many connections: of one client address, of one listener, or in all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import socket
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from serve_fakes import Running, eventually, read_all, serving, settings
from tls_kit import Authority, fronting

from canal_trio.relay.streams import TcpStream
from canal_trio.serve.crowd import PARTING, Crowd, Partings, refusal
from canal_trio.serve.listen import Acceptor, Slots, open_listeners
from canal_trio.settings import Bounds
from canal_trio.testing.scripts import chat_stream

# -- counting ----------------------------------------------------------------------------------------------------------


async def test_each_address_has_its_own_count() -> None:
    """Two of each, whoever else is there; who leaves makes room; who has left is forgotten."""
    causes: list[int] = []
    crowd = Crowd(2, (), lambda: causes.append(1))
    marks = [crowd.enter(peer) for peer in ("192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.2")]
    assert None not in marks
    assert crowd.enter("192.0.2.1") is None
    assert crowd.enter("192.0.2.3") is not None
    assert len(causes) == 1
    crowd.leave(marks[0])
    assert crowd.enter("192.0.2.1") == marks[0]
    for mark in marks:
        crowd.leave(mark)
    assert len(crowd) == 1


async def test_a_network_of_64_bits_is_one_client() -> None:
    """Whoever has IPv6 has more addresses than we have memory."""
    crowd = Crowd(2, ())
    assert crowd.enter("2001:db8::1") == crowd.enter("2001:db8::ffff:1")
    assert crowd.enter("2001:db8:0:0:9::") is None
    assert crowd.enter("2001:db8:0:1::") is not None
    assert len(crowd) == 2


async def test_trusted_proxies_speak_for_many() -> None:
    """They are never refused, whatever they have."""
    crowd = Crowd(1, ("10.0.0.0/8", "2001:db8::/32"))
    for peer in ("10.1.2.3", "2001:db8::7"):
        marks = [crowd.enter(peer) for _ in range(5)]
        assert None not in marks
        for mark in marks:
            crowd.leave(mark)
    assert crowd.enter("192.0.2.1") is not None
    assert crowd.enter("192.0.2.1") is None


async def test_a_changed_bound_keeps_the_books() -> None:
    """Whoever came while nothing was counted leaves uncounted; whoever was counted is, until the end."""
    crowd = Crowd(float("inf"), ())
    uncounted = crowd.enter("192.0.2.1")
    assert uncounted is not None
    crowd.configure(1, ())
    counted = crowd.enter("192.0.2.1")
    assert crowd.enter("192.0.2.1") is None
    crowd.configure(float("inf"), ())
    crowd.leave(uncounted)
    crowd.leave(counted)
    assert len(crowd) == 0


async def test_refusals_are_told_rarely(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A line per half a minute, with the number of those since the last one."""
    crowd = Crowd(1, ())
    crowd.enter("192.0.2.1")
    with caplog.at_level(logging.WARNING, "canal_trio.serve"):
        for _ in range(100):
            await trio.sleep(0.5)
            assert crowd.enter("192.0.2.1") is None
    assert caplog.messages == [
        f"refusing connections of 192.0.2.1, which has 1 already ({count} times since the last such line)"
        for count in (1, 60)
    ]


# -- farewell ----------------------------------------------------------------------------------------------------------


def pair() -> tuple[socket.socket, socket.socket]:
    """A refused socket, and its client's end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


async def test_a_refusal_is_a_whole_answer() -> None:
    """503 in OpenAI's shape, with retry-after, and `connection: close`."""
    head, _, body = refusal().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert fields[b"retry-after"] == b"5"
    assert fields[b"connection"] == b"close"
    assert fields[b"content-length"] == b"%d" % len(body)
    assert fields[b"x-request-id"].startswith(b"req_")
    assert msgspec.json.decode(body)["error"]["code"] == "gateway_overloaded"


async def test_the_refused_linger_for_a_second(autojump_clock: trio.testing.MockClock) -> None:
    """The words and the end come at once; the socket is closed a second later, what was asked meanwhile is dropped."""
    partings = Partings()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partings.run)
        for _ in range(2):
            ours, theirs = pair()
            partings.part(ours, b"no")
            assert (theirs.recv(10), theirs.recv(10)) == (b"no", b"")
            theirs.send(b"GET / HTTP/1.1\r\n\r\n")
            start = trio.current_time()
            while ours.fileno() >= 0:  # noqa: ASYNC110  # virtual time
                await trio.sleep(0.01)
            assert trio.current_time() - start == pytest.approx(1, abs=0.02)
            theirs.close()
        kept, theirs = pair()
        partings.part(kept, b"no")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert kept.fileno() == -1
    theirs.close()


async def test_few_linger(autojump_clock: trio.testing.MockClock) -> None:
    """Beyond the bound the oldest goes; who is gone already, and who gets no words, does not linger at all."""
    partings = Partings()
    pairs = [pair() for _ in range(PARTING + 3)]
    for ours, _ in pairs:
        partings.part(ours, b"no")
    assert len(partings) == PARTING
    assert [ours.fileno() for ours, _ in pairs[:3]] == [-1, -1, -1]
    assert pairs[3][0].fileno() >= 0
    gone, theirs = pair()
    theirs.close()
    partings.part(gone, b"no")
    silent, other = pair()
    partings.part(silent, b"")
    assert (gone.fileno(), silent.fileno(), len(partings)) == (-1, -1, PARTING)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partings.run)
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert len(partings) == 0
    for _, theirs in [*pairs, (None, other)]:
        theirs.close()


# -- at the door -------------------------------------------------------------------------------------------------------


async def shed(server: Running, cause: str) -> float:
    """How many connections were refused or closed for it."""
    line = f'canal_connections_shed_total{{cause="{cause}"}} '.encode()
    page = (await server.page("/metrics"))[1]
    return float(page.partition(line)[2].split(b"\n")[0] or 0)


async def test_one_address_has_too_many() -> None:
    """The fourth gets 503 before it has asked, is counted, and costs no slot; when one leaves, another one may come."""
    async with serving(settings(bounds=Bounds(address_connections=3))) as server:
        stays = [await server.connect(b"stay") for _ in range(3)]
        for client in stays:
            assert await client.receive_some() == b"hello\n"
        refused = await server.connect(b"echo me")
        assert (await read_all(refused)).startswith(b"HTTP/1.1 503 ")
        assert await shed(server, "address") == 1
        assert len(server.gateway.streams) == 3
        await stays[0].send_all(b"end\n")
        assert await read_all(stays[0]) == b"bye\n"
        await eventually(lambda: len(server.gateway.streams) == 2)
        assert await read_all(await server.connect(b"hi")) == b"echo hi\n"


async def test_over_tls_the_refused_are_just_closed(tmp_path: Path) -> None:
    """No handshake is spent on saying no."""
    bounds = Bounds(address_connections=1)
    async with fronting(Authority(tmp_path), chat_stream(1), bounds=bounds) as (_, server):
        await server.secure()
        refused = await server.connect()
        assert await read_all(refused) == b""
        assert await shed(server, "address") == 1
        assert await server.shaken("ok") == 1


async def test_a_reload_changes_the_bounds() -> None:
    """Of addresses and listeners, without cutting anybody off."""
    first = settings(bounds=Bounds(address_connections=1))
    second = dataclasses.replace(first, bounds=Bounds(address_connections=9, listener_connections=2))
    async with serving(first, config_loader=lambda: second) as server:
        stays = [await server.connect(b"stay")]
        assert await stays[0].receive_some() == b"hello\n"
        assert (await read_all(await server.connect(b"x"))).startswith(b"HTTP/1.1 503 ")
        signal.raise_signal(signal.SIGHUP)
        await server.logged("reloaded the configuration")
        stays.append(await server.connect(b"stay"))
        assert await stays[1].receive_some() == b"hello\n"
        waits = await server.connect(b"x")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert len(server.gateway.streams) == 2
        await stays[0].send_all(b"end\n")
        assert await read_all(stays[0]) == b"bye\n"
        assert await read_all(waits) == b"echo x\n"


async def test_each_listener_may_have_a_bound_of_its_own() -> None:
    """At it this listener accepts nobody; the other one does, within the bound of all; each end lets one in."""
    listeners = await open_listeners([("127.0.0.1", 0)] * 2)
    whole = Slots(5)
    slots = [Slots(2, whole), Slots(9, whole)]

    async def keep(stream: TcpStream, _peer: str) -> None:
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        acceptors = [Acceptor(sock, own, keep, nursery) for sock, own in zip(listeners, slots, strict=True)]
        for acceptor in acceptors:
            nursery.start_soon(acceptor.run)
        first = [await trio.open_tcp_stream(*acceptors[0].address) for _ in range(4)]
        await eventually(lambda: slots[0].used == 2)
        second = [await trio.open_tcp_stream(*acceptors[1].address) for _ in range(4)]
        await eventually(lambda: whole.used == 5)
        assert [own.used for own in slots] == [2, 3]
        await first[0].aclose()
        await eventually(lambda: whole.used == 5 and slots[0].used + slots[1].used == 5)
        slots[0].resize(9)
        for client in second:
            await client.aclose()
        await eventually(lambda: [own.used for own in slots] == [3, 0])
        for client in first:
            await client.aclose()
        await eventually(lambda: whole.used == 0)
        nursery.cancel_scope.cancel()
    for sock in listeners:
        sock.close()


async def test_a_full_door_asks_for_room_only_when_somebody_knocks(autojump_clock: trio.testing.MockClock) -> None:
    """Once a second, for as long as it is full and a client waits; never while nobody does."""
    [listener] = await open_listeners([("127.0.0.1", 0)])
    slots, asked = Slots(1), 0
    served: list[TcpStream] = []

    def make_room() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            served[0].close()

    async def keep(stream: TcpStream, _peer: str) -> None:
        served.append(stream)
        with contextlib.suppress(trio.ClosedResourceError):
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        acceptor = Acceptor(listener, slots, keep, nursery, make_room=make_room)
        nursery.start_soon(acceptor.run)
        async with await trio.open_tcp_stream(*acceptor.address):
            await eventually(lambda: served, 1000)
            await trio.sleep(100)
            assert asked == 0
            async with await trio.open_tcp_stream(*acceptor.address):
                start = trio.current_time()
                await eventually(lambda: len(served) == 2, 1000)
                assert trio.current_time() - start == pytest.approx(2, abs=0.1)
                assert asked == 3
        nursery.cancel_scope.cancel()
    listener.close()
