"""Hand-over on the spot as a property of a flow."""

from __future__ import annotations

import pytest
import trio
from relay_kit import take_all
from trio.testing import wait_all_tasks_blocked

from canal_trio.relay import Ended, open_flow


async def test_a_put_reaches_the_sink_in_the_same_step():
    """While the receiver is parked with a sink, put_nowait calls it before it returns, and wakes no task."""
    sender, receiver = open_flow(1)
    seen: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_all, receiver, lambda piece: seen.append(piece) or True)
        await wait_all_tasks_blocked()
        for number in range(5):
            sender.put_nowait(b"%d" % number)
            assert seen[-1] == b"%d" % number
        await sender.put(b"5")
        assert receiver.statistics().handed_over == 6
        assert receiver.statistics().queued == 0
        sender.end()


async def test_a_sink_that_keeps_a_rest_is_taken_away_and_its_owner_woken():
    """What follows goes through the channel, behind what the sink kept."""
    sender, receiver = open_flow(2)
    kept: list[bytes] = []
    results: list[list[bytes]] = []

    async def take() -> None:
        results.append(await receiver.take(lambda piece: bool(kept.append(piece))))
        results.append(await receiver.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        sender.put_nowait(b"one")
        sender.put_nowait(b"two")
        assert kept == [b"one"]
    assert results == [[], [b"two"]]
    assert receiver.ending is None


async def test_cancelling_disarms_in_the_very_step():
    """After `cancel()` returns, before any task has run, a put no longer reaches the sink."""
    sender, receiver = open_flow(2)
    seen: list[bytes] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver.take, lambda piece: seen.append(piece) or True)
            await wait_all_tasks_blocked()
            scope.cancel()
            sender.put_nowait(b"late")
    assert seen == []
    assert receiver.take_nowait() == [b"late"]


async def test_a_raising_sink_ends_its_owner_and_the_flow():
    """The receiver's task gets the exception, the sender sees a broken flow, and nothing follows the lost piece."""
    sender, receiver = open_flow(2)

    def sink(_piece: bytes) -> bool:
        raise RuntimeError("a bug in the sink")

    async def take() -> None:
        with pytest.raises(RuntimeError, match="a bug in the sink"):
            await receiver.take(sink)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            sender.put_nowait(b"lost")
        with pytest.raises(trio.BrokenResourceError):
            await sender.put(b"next")


async def test_a_sink_that_cancels_its_owner_and_raises_is_heard_by_the_sender():
    """With nobody parked any more, the bug comes out where the put was made."""
    sender, receiver = open_flow(2)
    scope = trio.CancelScope()

    def sink(_piece: bytes) -> bool:
        scope.cancel()
        raise RuntimeError("a bug in the sink")

    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver.take, sink)
            await wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match="a bug in the sink"):
                sender.put_nowait(b"lost")
    with pytest.raises(trio.BrokenResourceError):
        sender.put_nowait(b"next")


@pytest.mark.parametrize("answer", [True, False])
async def test_a_sink_may_close_its_own_receiver(answer):
    """Closing inside the sink wakes the owner with ClosedResourceError and breaks the puts that follow."""
    sender, receiver = open_flow(2)

    def sink(_piece: bytes) -> bool:
        receiver.close()
        return answer

    async def take() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await receiver.take(sink)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        sender.put_nowait(b"one")
        with pytest.raises(trio.BrokenResourceError):
            sender.put_nowait(b"two")


async def test_the_last_piece_and_the_end_come_with_one_take():
    """`put_last` bypasses an armed sink, so that piece and end can leave in one write."""
    sender, receiver = open_flow(2)
    seen: list[bytes] = []
    results: list[list[bytes]] = []

    async def take() -> None:
        results.append(await receiver.take(lambda piece: seen.append(piece) or True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        sender.put_last(b"last", "trailer")
    assert (seen, results, receiver.ending) == ([], [[b"last"]], Ended("trailer"))


async def test_a_last_piece_too_large_for_the_channel_is_handed_over_first():
    """Then the end comes by itself."""
    sender, receiver = open_flow(2, piece_bytes=2, handover_bytes=8)
    seen: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_all, receiver, lambda piece: seen.append(piece) or True)
        await wait_all_tasks_blocked()
        sender.put_last(b"large")
    assert (seen, receiver.ending) == ([b"large"], Ended())


async def test_a_last_piece_that_does_not_fit_does_not_end_the_flow():
    """The caller has to wait for room, so nothing has happened yet."""
    sender, receiver = open_flow(1)
    sender.put_nowait(b"one")
    with pytest.raises(trio.WouldBlock):
        sender.put_last(b"two")
    assert await receiver.take() == [b"one"]
    assert receiver.ending is None


async def test_a_put_that_waited_does_not_wake_the_next_take_for_nothing():
    """Its piece may have been taken, and the receiver be parked again, before the putting task runs."""
    sender, receiver = open_flow(1)
    batches: list[list[bytes]] = []
    sender.put_nowait(b"one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.put, b"two")
        await wait_all_tasks_blocked()

        async def take() -> None:
            while receiver.ending is None:
                batches.append(await receiver.take(lambda _piece: True))

        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        sender.end()
    assert batches == [[b"one", b"two"], []]
