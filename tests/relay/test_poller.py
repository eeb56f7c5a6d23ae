"""The poller: fair, bounded per wake, and never mistaken about whose readiness it reports."""

from __future__ import annotations

import contextvars
import os
import socket
from collections.abc import Callable

import pytest
import trio
from relay_pairs import local_pair, socket_pair, tcp_pair
from trio.testing import wait_all_tasks_blocked

from canal_trio.relay import TcpStream
from canal_trio.relay import poller as poller_module
from canal_trio.relay.course import Course, later
from canal_trio.relay.poller import HELD, LONG, MAX_EVENTS, ROUNDS, after_round

pytestmark = pytest.mark.usefixtures("waits")


async def test_steps_that_take_long_leave_the_scheduler_its_turn(monkeypatch):
    """A round whose steps took `LONG` is the last one of its wake, however much is ready: tasks run in between."""
    a, b = local_pair()
    rounds, stop, now = 0, False, 0.0

    def slow() -> bool:
        nonlocal rounds, now
        rounds += 1
        now += LONG * 1.01
        return not stop

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now

    monkeypatch.setattr(poller_module, "time", Clock)
    await a.send_all(b"never received, so always readable")
    b.arm(slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        while rounds < 3 * ROUNDS:  # its owner has had its own first turn
            await trio.lowlevel.checkpoint()
        for _ in range(20):
            before = rounds
            await trio.lowlevel.checkpoint()
            assert rounds - before <= 2  # the scheduler may run it last in one pass and first in the next
        stop = True
    for stream in (a, b):
        stream.close()


async def test_a_stream_that_is_always_ready_does_not_keep_others_waiting():
    """Another stream is served one round later at most, and other tasks run after `ROUNDS` rounds at most."""
    a, b = local_pair()
    c, d = local_pair()
    busy = 0
    served_at: list[int] = []
    stop = False

    def glutton() -> bool:
        nonlocal busy
        busy += 1
        return not stop

    def modest() -> bool:
        if d.try_receive(100):
            served_at.append(busy)
        return len(served_at) < 20

    await a.send_all(b"never received, so always readable")
    b.arm(glutton)
    d.arm(modest)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        nursery.start_soon(d.wait_disarmed)
        with trio.fail_after(10):
            while busy < 5 * ROUNDS:  # both owners have had their own first turn
                await trio.lowlevel.checkpoint()
            for number in range(20):
                before = busy
                c.try_send(b"x")
                while len(served_at) <= number:
                    await trio.lowlevel.checkpoint()
                assert served_at[-1] - before <= 2
            start = busy
            for _ in range(20):
                before = busy
                await trio.lowlevel.checkpoint()
                assert busy - before <= 2 * ROUNDS  # the scheduler may run it last in one pass and first in the next
            assert busy > start
        stop = True
    for stream in (a, b, c, d):
        stream.close()


async def test_one_wake_is_bounded_for_a_stream_that_is_fed_by_its_own_sink():
    """A sink whose doing makes its own stream readable again leaves the others their turn."""
    a, b = local_pair()
    calls = 0

    def echo_to_myself() -> bool:
        nonlocal calls
        if b.try_receive(100):
            calls += 1
            a.try_send(b"again")
        return True

    b.arm(echo_to_myself)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        a.try_send(b"once")
        for _ in range(20):
            before = calls
            await trio.lowlevel.checkpoint()
            assert calls - before <= 2 * ROUNDS
        assert calls
        nursery.cancel_scope.cancel()
    for stream in (a, b):
        stream.close()


async def test_courses_send_when_all_was_received_that_is_there_or_enough_of_them_wait():
    """One alone sends at once; of many that one look finds, `HELD` are received for, then sent for, and so on."""
    log: list[str] = []
    pairs = [local_pair() for _ in range(MAX_EVENTS - 3)]
    over = trio.Event()

    async def work(number: int, stream: TcpStream) -> None:
        for _ in range(2):
            await stream.receive_some(100)
            log.append(f"{number} received")
            await later()
            log.append(f"{number} sent")

    def ended() -> None:
        if len(log) == 2 + 2 * len(pairs):
            over.set()

    for number, (_, near) in enumerate(pairs):
        assert not Course(work(number, near), ended, contextvars.copy_context()).begin()
    await wait_all_tasks_blocked(0.01)
    pairs[7][0].try_send(b"x")
    await wait_all_tasks_blocked(0.01)
    assert log == ["7 received", "7 sent"]
    for number, (far, _) in enumerate(pairs):
        far.try_send(b"x" if number != 7 else b"y")
    await wait_all_tasks_blocked(0.01)
    way = [entry.split()[1] for entry in log[2:]]
    rest = len(pairs) - HELD
    assert way == ["received"] * HELD + ["sent"] * HELD + ["received"] * rest + ["sent"] * rest
    order = [entry.split()[0] for entry in log[2:]]
    assert order[:HELD] == order[HELD : 2 * HELD]
    for far, near in pairs:
        far.close()
        near.close()


async def test_what_is_reported_of_a_closed_stream_is_not_taken_for_news_of_the_next_with_its_number():
    """Two streams hang up in one look; the sink of the first closes the other, and the number is used again at once."""
    a, b = await tcp_pair()
    c, d = await tcp_pair()
    heirs: list[TcpStream] = []
    fresh, peer = socket_pair()

    def succeed(other: TcpStream) -> None:
        if not heirs:
            number = other.socket.fileno()
            other.close()
            os.dup2(fresh.fileno(), number)
            heirs.append(TcpStream(socket.socket(fileno=number)))

    b.watch(lambda: succeed(d))
    d.watch(lambda: succeed(b))
    await wait_all_tasks_blocked()
    a.close()
    c.close()
    with trio.fail_after(10):
        while not heirs:
            await trio.lowlevel.checkpoint()
    (heir,) = heirs
    fresh.close()
    await wait_all_tasks_blocked(0.01)
    assert not heir.hangup
    peer.sendall(b"news of its own")
    assert await heir.receive_some() == b"news of its own"
    peer.close()
    assert await heir.receive_some() == b""
    assert heir.hangup
    for stream in (b, d, heir):
        stream.close()


async def test_what_is_reported_of_a_stream_closed_in_this_look_is_dropped():
    """The sink of one ready stream closes another: nobody is called for it, and nothing breaks."""
    a, b = await tcp_pair()
    c, d = await tcp_pair()
    told: list[str] = []

    def tell(name: str, other: TcpStream) -> None:
        told.append(name)
        other.close()

    b.watch(lambda: tell("b", d))
    d.watch(lambda: tell("d", b))
    await wait_all_tasks_blocked()
    a.close()
    c.close()
    with trio.fail_after(10):
        while not told:
            await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked(0.01)
    assert len(told) == 1
    b.close()
    d.close()


async def test_a_stream_closed_while_it_waits_for_its_turn_gets_none():
    """Both want another turn; the one that is served first closes the other."""
    a, b = await tcp_pair()
    c, d = await tcp_pair()
    closed: list[TcpStream] = []
    calls = 0

    def rival(other: TcpStream) -> bool:
        nonlocal calls
        calls += 1
        assert not closed or other in closed
        if calls > 5 * ROUNDS and not closed:
            closed.append(other)
            other.close()
        return not closed

    async def own(stream: TcpStream, other: TcpStream) -> None:
        stream.arm(lambda: rival(other))
        try:
            await stream.wait_disarmed()
        except trio.ClosedResourceError:
            assert stream in closed

    await a.send_all(b"x")
    await c.send_all(b"x")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(own, b, d)
            nursery.start_soon(own, d, b)
    assert len(closed) == 1
    for stream in (a, b, c, d):
        stream.close()


async def test_what_is_left_to_do_is_done_at_the_end_of_the_round():
    """In a round a call is kept until all who are ready had their turn; outside of one it is not taken."""
    a, b = local_pair()
    c, d = local_pair()
    seen: list[str] = []

    def sink(name: str) -> Callable[[], bool]:
        def ready() -> bool:
            seen.append(name)
            assert after_round(lambda: seen.append(f"after {name}"))
            return False

        return ready

    assert not after_round(lambda: seen.append("never"))
    b.arm(sink("b"))
    d.arm(sink("d"))
    await a.send_all(b"x")
    await c.send_all(b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        nursery.start_soon(d.wait_disarmed)
    assert sorted(seen[:2]) == ["b", "d"]
    assert seen[2:] == [f"after {name}" for name in seen[:2]]
    assert not after_round(lambda: seen.append("never"))
    for stream in (a, b, c, d):
        stream.close()
