"""The run's own wait, in the poller's epoll: Trio misses nothing by it, and its ordinary wait comes back."""

from __future__ import annotations

import math
import os
import socket

import pytest
import trio
from relay_pairs import local_pair, tcp_pair
from trio.testing import wait_all_tasks_blocked

from canal_trio.relay import TcpStream, wait_in_poller, waiting
from canal_trio.relay.poller import ROUNDS, Poller


class Passes(trio.abc.Instrument):
    """Counts the passes of Trio's loop."""

    def __init__(self) -> None:
        self.count = 0

    def after_io_wait(self, timeout: float) -> None:
        """Trio's hook."""
        self.count += 1


async def echo(stream: TcpStream) -> None:
    """Sends back what comes, in the poller's step, until the peer ends."""

    def sink() -> bool:
        data = stream.try_receive(100)
        if data:
            stream.try_send(data)
        return data != b""

    stream.arm(sink)
    await stream.wait_disarmed()


def there_and_back(peer: socket.socket, times: int) -> None:
    """In a thread: so many pieces, each after the one before it has come back."""
    for _ in range(times):
        peer.sendall(b"piece")
        assert peer.recv(100) == b"piece"


def blocking_pair() -> tuple[socket.socket, TcpStream]:
    """A socket for a thread, and the stream at its other end."""
    one, other = socket.socketpair()
    return one, TcpStream(other)


async def passes_of(pieces: int) -> int:
    """How many passes of Trio's loop so many pieces take, one after the other."""
    peer, stream = blocking_pair()
    counter = Passes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, stream)
        await wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(counter)
        await trio.to_thread.run_sync(there_and_back, peer, pieces)
        trio.lowlevel.remove_instrument(counter)
        nursery.cancel_scope.cancel()
    stream.close()
    peer.close()
    return counter.count


async def test_pieces_that_go_straight_through_cost_no_pass_of_trios_loop(nursery, monkeypatch):
    """Ordinarily a pass serves `ROUNDS` at most; where the poller waits there are two or three for all of them."""
    ordinarily = await passes_of(200)
    monkeypatch.setattr(waiting, "STAY", math.inf)
    await nursery.start(wait_in_poller)
    assert await passes_of(200) <= 10 < 200 // ROUNDS <= ordinarily


async def test_trio_looks_at_its_deadlines_while_pieces_flow(nursery, monkeypatch):
    """A sink may bring a deadline forward without a task being scheduled: Trio gets to know of it within `STAY`."""
    monkeypatch.setattr(waiting, "STAY", 0)
    await nursery.start(wait_in_poller)
    peer, stream = blocking_pair()
    scope = trio.CancelScope()

    def sink() -> bool:
        stream.try_receive(100)
        scope.deadline = trio.current_time()
        return True

    stream.arm(sink)
    nursery.start_soon(stream.wait_disarmed)
    await wait_all_tasks_blocked()
    with trio.fail_after(10), scope:
        peer.sendall(b"x")
        await trio.sleep_forever()
    assert scope.cancelled_caught
    nursery.cancel_scope.cancel()
    stream.close()
    peer.close()


async def test_deadlines_are_kept(nursery):
    """A sleep is neither cut short nor doubled for want of other events."""
    await nursery.start(wait_in_poller)
    for seconds in (0.0, 0.001, 0.02):
        with trio.CancelScope(relative_deadline=seconds) as scope:
            began = trio.current_time()
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() - began >= seconds
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline > 1


async def test_a_sleep_in_vain_is_not_waited_for_twice(nursery, monkeypatch):
    """When a deadline is due Trio is told, and does not begin the same wait anew."""
    waits: list[float] = []

    class Look(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            waits.append(timeout)

    await nursery.start(wait_in_poller)
    await wait_all_tasks_blocked()
    written: list[int] = []
    write = os.eventfd_write

    def noted(fd: int, value: int) -> None:
        written.append(fd)
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", noted)
    trio.lowlevel.add_instrument(Look())
    await trio.sleep(0.01)
    assert len(written) == 1
    assert 0 < waits[0] <= 0.01


async def test_what_trio_itself_waits_for_is_not_missed(nursery):
    """A thread that comes back, a socket of Trio's own, a task woken by a sink: each in the midst of a long wait."""
    await nursery.start(wait_in_poller)
    with trio.fail_after(10):
        assert await trio.to_thread.run_sync(lambda: "back") == "back"
        one, other = trio.socket.socketpair()
        with one, other:
            nursery.start_soon(one.send, b"hello")
            assert await other.recv(10) == b"hello"
        a, b = local_pair()
        heard = trio.Event()

        def sink() -> bool:
            a.try_receive(10)
            heard.set()
            return True

        a.arm(sink)
        nursery.start_soon(a.wait_disarmed)
        await wait_all_tasks_blocked()
        b.try_send(b"x")
        await heard.wait()
    nursery.cancel_scope.cancel()
    a.close()
    b.close()


async def test_streams_that_are_always_ready_do_not_keep_trio_from_its_own(nursery):
    """A sink that is never satisfied, and a thread that wants to come back."""
    await nursery.start(wait_in_poller)
    a, b = local_pair()
    a.try_send(b"never received")
    b.arm(lambda: True)
    nursery.start_soon(b.wait_disarmed)
    with trio.fail_after(10):
        for _ in range(10):
            await trio.to_thread.run_sync(int)
    nursery.cancel_scope.cancel()
    a.close()
    b.close()


async def test_nothing_happens_is_still_noticed(nursery):
    """`wait_all_tasks_blocked` with a cushion ends, as it does in the ordinary way."""
    await nursery.start(wait_in_poller)
    with trio.fail_after(10):
        await wait_all_tasks_blocked(0.002)


async def test_only_one_task_leads_and_another_may_follow(nursery):
    """A second call returns at once; once the first is cancelled the ordinary way is back, and a third can begin."""
    a, b = await tcp_pair()
    async with trio.open_nursery() as first:
        await first.start(wait_in_poller)
        await wait_in_poller()
        first.cancel_scope.cancel()
    b.try_send(b"x")
    assert await a.receive_some(10) == b"x"
    await nursery.start(wait_in_poller)
    b.try_send(b"y")
    assert await a.receive_some(10) == b"y"
    nursery.cancel_scope.cancel()
    a.close()
    b.close()


@pytest.mark.parametrize("folder", ["absent", "empty", "without_ours"])
async def test_where_trios_epoll_cannot_be_found_the_ordinary_way_stays(folder, tmp_path, monkeypatch):
    """No procfs, or nothing in it: the call returns and streams are served as ever."""
    info = tmp_path / "fdinfo"
    if folder != "absent":
        info.mkdir()
    if folder == "without_ours":
        (info / "7").write_text("pos:\t0\ntfd: 100000 events: 19\n")
        (info / "8").symlink_to(info / "gone")
    monkeypatch.setattr(waiting, "FDINFO", str(info))
    with trio.fail_after(10):
        await wait_in_poller()
        a, b = await tcp_pair()
        b.try_send(b"x")
        assert await a.receive_some(10) == b"x"
    a.close()
    b.close()


def test_a_bug_while_waiting_ends_the_run_instead_of_leaving_it_deaf():
    """What the round raises is raised in the task; Trio would only log it and drop the hook."""

    async def main() -> None:
        def broken(poller: Poller, timeout: float) -> bool:
            patch.undo()
            raise ZeroDivisionError

        with pytest.MonkeyPatch.context() as patch:
            async with trio.open_nursery() as nursery:
                await nursery.start(wait_in_poller)
                await trio.testing.wait_all_tasks_blocked()
                patch.setattr(Poller, "round", broken)
                await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(main)
    assert caught.group_contains(ZeroDivisionError)


def test_a_run_that_ends_while_it_is_led_ends_quietly():
    """Led by a system task which outlives the poller's own: nothing is watched any more, and Trio waits by itself."""

    async def main() -> None:
        async def lead() -> None:
            await trio.lowlevel.checkpoint()
            with trio.CancelScope(shield=True) as scope:
                cut.append(scope)
                await wait_in_poller()

        cut: list[trio.CancelScope] = []
        trio.lowlevel.spawn_system_task(lead)
        await wait_all_tasks_blocked(0.001)  # a wait, and not only a look: now it leads
        a, b = await tcp_pair()
        b.try_send(b"x")
        assert await a.receive_some(10) == b"x"
        a.close()
        b.close()

        async def outlive() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await wait_all_tasks_blocked()
                    await trio.to_thread.run_sync(int)
                    cut[0].cancel(reason="that will do")

        trio.lowlevel.spawn_system_task(outlive)
        await wait_all_tasks_blocked()

    trio.run(main)


def test_a_run_has_one_poller_and_takes_it_along():
    """The same within a run, another one in the next, its descriptor closed in the end; too late is harmless."""
    pollers: list[Poller] = []

    async def main() -> None:
        pollers.append(Poller.current())
        assert Poller.current() is pollers[-1]
        for stream in await tcp_pair():
            stream.close()
        one, other = socket.socketpair()
        pollers[-1].register(one.fileno(), StandIn())
        left.append(one.fileno())
        one.close()
        other.close()

    left: list[int] = []
    for _ in range(2):
        trio.run(main)
    assert pollers[0] is not pollers[1]
    for poller, fd in zip(pollers, left, strict=True):
        assert poller._epoll.closed
        poller.unregister(fd)
        poller.unregister(fd)


class StandIn:
    """A Pollable that is never called."""

    def take_step(self, sink: object, step: object) -> bool:
        """Not expected."""
        pytest.fail(f"{sink} called with {step}")

    def on_ready(self, mask: int) -> bool:
        """Not expected."""
        pytest.fail(f"called with {mask}")
