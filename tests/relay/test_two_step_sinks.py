"""Sinks that answer with the rest of their step: a round receives for all who are ready, then sends for all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from relay_pairs import local_pair
from trio.testing import wait_all_tasks_blocked

from canal_trio.relay import TcpStream
from canal_trio.relay.handover import settled
from canal_trio.relay.poller import MAX_EVENTS


class TwoSteps:
    """Receives in the first half and does `rest` in the second; both are noted in `log`."""

    def __init__(self, name: str, stream: TcpStream, log: list[str], rest: Callable[[], bool]) -> None:
        self.name, self.stream, self.log, self.rest = name, stream, log, rest

    def sink(self) -> Callable[[], bool] | bool:
        """The first half."""
        if not self.stream.try_receive(100):
            return True
        self.log.append(f"{self.name} received")
        return self.second

    def second(self) -> bool:
        """The second half."""
        self.log.append(f"{self.name} sent")
        return self.rest()


async def parked(nursery: trio.Nursery, *sinks: TwoSteps) -> list[trio.CancelScope]:
    """Each sink armed, and its owner asleep."""

    async def own(one: TwoSteps, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            one.stream.arm(one.sink)
            task_status.started(scope)
            await one.stream.wait_disarmed()
            one.log.append(f"{one.name} disarmed")

    scopes = [await nursery.start(own, one) for one in sinks]
    await wait_all_tasks_blocked()
    return scopes


async def test_who_has_more_to_receive_after_its_step_gets_another_turn():
    """The first half receives a part of what is there, and no further edge will report the rest."""
    a, b = local_pair()
    taken: list[bytes] = []

    def sink() -> Callable[[], bool] | bool:
        data = b.try_receive(1)
        if data is None:
            return True  # arming is news, too
        taken.append(data)
        return lambda: len(taken) < 3

    b.arm(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        a.try_send(b"abc")
        with trio.fail_after(10):
            while len(taken) < 3:
                await trio.lowlevel.checkpoint()
    assert taken == [b"a", b"b", b"c"]
    a.close()
    b.close()


async def test_a_round_receives_for_all_before_it_sends_for_any():
    """All who are ready are received from first, and sent for in the same order, in one step of the poller."""
    log: list[str] = []
    (a, b), (c, d) = local_pair(), local_pair()
    async with trio.open_nursery() as nursery:
        await parked(nursery, TwoSteps("b", b, log, lambda: True), TwoSteps("d", d, log, lambda: True))
        a.try_send(b"x")
        c.try_send(b"x")
        await wait_all_tasks_blocked()
        assert log == ["b received", "d received", "b sent", "d sent"]
        a.try_send(b"x")
        await wait_all_tasks_blocked()
        assert log[4:] == ["b received", "b sent"]
        nursery.cancel_scope.cancel()
    for stream in (a, b, c, d):
        stream.close()


async def test_no_send_waits_for_more_than_a_round():
    """Of more streams than a round looks at, the first are sent for before the last are received from."""
    log: list[str] = []
    pairs = [local_pair() for _ in range(MAX_EVENTS + 1)]
    async with trio.open_nursery() as nursery:
        await parked(nursery, *(TwoSteps(str(k), b, log, lambda: True) for k, (_, b) in enumerate(pairs)))
        for a, _ in pairs:
            a.try_send(b"x")
        await wait_all_tasks_blocked()
        assert len(log) == 2 * len(pairs)
        assert [entry.split()[1] for entry in log] == (
            ["received"] * MAX_EVENTS + ["sent"] * MAX_EVENTS + ["received", "sent"]
        )
        nursery.cancel_scope.cancel()
    for a, b in pairs:
        a.close()
        b.close()


async def test_who_was_closed_between_the_two_halves_is_not_sent_for():
    """A step that closes another stream takes the rest of that one's step away, whatever it has received."""
    log: list[str] = []
    (a, b), (c, d) = local_pair(), local_pair()

    def close_the_other() -> bool:
        d.close()
        return True

    with pytest.RaisesGroup(trio.ClosedResourceError):
        async with trio.open_nursery() as nursery:
            await parked(nursery, TwoSteps("b", b, log, close_the_other), TwoSteps("d", d, log, lambda: True))
            a.try_send(b"x")
            c.try_send(b"x")
            await wait_all_tasks_blocked()
    assert log == ["b received", "d received", "b sent"]
    for stream in (a, b, c):
        stream.close()


async def test_the_second_half_ends_the_watch_as_the_first_one_can():
    """False from the rest of a step disarms the sink and wakes its owner; so does a close from inside it."""
    log: list[str] = []
    a, b = local_pair()
    async with trio.open_nursery() as nursery:
        await parked(nursery, TwoSteps("b", b, log, lambda: False))
        a.try_send(b"x")
        await wait_all_tasks_blocked()
        assert log == ["b received", "b sent", "b disarmed"]

    def close_myself() -> bool:
        b.close()
        return True

    with pytest.RaisesGroup(trio.ClosedResourceError):
        async with trio.open_nursery() as nursery:
            await parked(nursery, TwoSteps("b", b, log, close_myself))
            a.try_send(b"x")
            await wait_all_tasks_blocked()
    a.close()


async def test_what_the_second_half_raises_is_raised_in_its_owner():
    """A bug in the rest of a step ends the task that armed the sink, and nobody else."""
    log: list[str] = []
    (a, b), (c, d) = local_pair(), local_pair()

    def burst() -> bool:
        raise ZeroDivisionError

    async with trio.open_nursery() as nursery:
        await parked(nursery, TwoSteps("d", d, log, lambda: True))
        with pytest.RaisesGroup(ZeroDivisionError):
            async with trio.open_nursery() as inner:
                await parked(inner, TwoSteps("b", b, log, burst))
                a.try_send(b"x")
                await wait_all_tasks_blocked()
        c.try_send(b"x")
        await wait_all_tasks_blocked()
        assert log == ["b received", "b sent", "d received", "d sent"]
        nursery.cancel_scope.cancel()
    for stream in (a, b, c, d):
        stream.close()


async def test_what_was_here_before_the_owner_slept_is_sent_too():
    """The first look, in the owner's own step, does both halves at once."""
    log: list[str] = []
    a, b = local_pair()
    await a.send_all(b"x")
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        await parked(nursery, TwoSteps("b", b, log, lambda: True))
        assert log == ["b received", "b sent"]
        nursery.cancel_scope.cancel()
    a.close()
    b.close()


def test_an_answer_is_settled_by_doing_what_is_left():
    """True and False stand for themselves, a callable for what it answers."""
    assert settled(True) is True
    assert settled(False) is False
    assert settled(lambda: True) is True
    assert settled(lambda: False) is False
