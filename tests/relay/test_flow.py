"""A flow: bounded, its ending a message, whatever the schedule."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from relay_kit import take_all
from trio.testing import MockClock, assert_checkpoints, assert_no_checkpoints, wait_all_tasks_blocked

from canal_trio.relay import Aborted, Ended, open_flow

# -- endings -----------------------------------------------------------------------------------------------------------


async def test_the_end_is_a_message_that_comes_with_the_last_piece():
    """`end(trailer)` reaches the receiver after every piece, and with the last one."""
    sender, receiver = open_flow(4)
    await sender.put(b"one")
    await sender.put(b"two")
    sender.end("trailer")
    assert await receiver.take() == [b"one", b"two"]
    assert receiver.ending == Ended("trailer")
    with assert_checkpoints():
        assert await receiver.take() == []


async def test_a_sender_that_goes_away_has_aborted():
    """Leaving a sender without an end is an abort, never an end."""
    sender, receiver = open_flow(4)
    with sender:
        await sender.put(b"one")
    assert await receiver.take() == [b"one"]
    assert receiver.ending == Aborted(None)


async def test_an_abort_delivers_what_was_put_first():
    """Pieces before the abort arrive, then the receiver learns of it and why."""
    sender, receiver = open_flow(4)
    sender.put_nowait(b"one")
    sender.abort("reset")
    sender.abort("later")
    sender.end()
    assert await receiver.take() == [b"one"]
    assert receiver.ending == Aborted("reset")


async def test_the_first_ending_wins():
    """After an end neither an abort nor another end changes anything, and puts are refused."""
    sender, receiver = open_flow(1)
    sender.end(1)
    sender.abort("no")
    sender.end(2)
    with pytest.raises(trio.ClosedResourceError):
        sender.put_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await sender.put(b"x")
    assert await receiver.take() == []
    assert receiver.ending == Ended(1)


@pytest.mark.parametrize("sink", [None, lambda _piece: True])
async def test_an_ending_wakes_a_parked_receiver(sink):
    """A receiver that waits learns of the ending at once, with a sink or without."""
    sender, receiver = open_flow(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_all, receiver, sink)
        await wait_all_tasks_blocked()
        sender.end()
    assert receiver.ending == Ended()


async def test_an_end_while_a_put_waits_is_an_abort():
    """Not everything was put then, so nobody may take it for complete."""
    sender, receiver = open_flow(1)
    sender.put_nowait(b"one")
    async with trio.open_nursery() as nursery:

        async def put() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await sender.put(b"two")

        nursery.start_soon(put)
        await wait_all_tasks_blocked()
        sender.end()
    assert await receiver.take() == [b"one"]
    assert receiver.ending == Aborted(None)


async def test_an_end_after_half_a_put_is_an_abort():
    """A large piece of which a cancel let only a part through cannot be called complete afterwards."""
    sender, receiver = open_flow(1, piece_bytes=2)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.put, b"abcdef")
            await wait_all_tasks_blocked()
            scope.cancel()
    sender.end()
    assert await receiver.take() == [b"ab"]
    assert receiver.ending == Aborted(None)


async def test_a_cancelled_put_of_one_piece_did_not_happen():
    """It can be tried again, and the flow can end properly."""
    sender, receiver = open_flow(1)
    sender.put_nowait(b"one")
    with trio.move_on_after(0):
        await sender.put(b"two")
    assert await receiver.take() == [b"one"]
    await sender.put(b"two")
    sender.end()
    assert await receiver.take() == [b"two"]
    assert receiver.ending == Ended()


# -- bounds and waiting ------------------------------------------------------------------------------------------------


async def test_put_waits_for_room_and_cuts_to_size():
    """A put larger than a piece arrives in pieces, one slot after the other, and counts as having waited."""
    sender, receiver = open_flow(1, piece_bytes=2)
    got: list[bytes] = []

    async def put() -> None:
        await sender.put(b"abcde")
        sender.end()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put)
        await wait_all_tasks_blocked()
        assert sender.room == 0
        got += await take_all(receiver)
    assert got == [b"ab", b"cd", b"e"]
    statistics = receiver.statistics()
    assert (statistics.queued, statistics.bytes, statistics.held) == (3, 5, 0)
    assert statistics.waits >= 1
    assert sender.statistics() == statistics


async def test_a_batch_never_holds_more_than_capacity_and_one():
    """Also when the receiver was parked: a piece given to it directly would free a slot early (2·capacity + 3)."""
    sender, receiver = open_flow(2, piece_bytes=1)
    batches: list[list[bytes]] = []

    async def take() -> None:
        batches.append(await receiver.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        sender.put_nowait(b"1")
        sender.put_nowait(b"2")
        assert sender.room == 0
        with pytest.raises(trio.WouldBlock):
            sender.put_nowait(b"3")
        await sender.put(b"3")
    assert len(batches[0]) <= 3


async def test_room_says_what_a_put_takes_at_once():
    """A hand-over's size while a sink is armed, a piece's while there is a slot, else nothing."""
    sender, receiver = open_flow(1, piece_bytes=10, handover_bytes=20)
    assert (sender.room, sender.piece_bytes) == (10, 10)
    with pytest.raises(ValueError, match="10 is the most"):
        sender.put_nowait(bytes(11))
    sender.put_nowait(bytes(10))
    assert sender.room == 0
    await receiver.take()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.take, lambda _piece: True)
        await wait_all_tasks_blocked()
        assert sender.room == 20
        with pytest.raises(ValueError, match="20 is the most"):
            sender.put_nowait(bytes(21))
        sender.put_nowait(bytes(20))
        sender.end()


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_flow_without_room_cannot_be_opened(sizes):
    """Every bound is at least 1."""
    with pytest.raises(ValueError, match="at least 1"):
        open_flow(sizes[0], piece_bytes=sizes[1], handover_bytes=sizes[2])


async def test_an_empty_piece_is_nothing():
    """It enters neither the channel nor a sink: a chunked coding would take it for the end."""
    sender, receiver = open_flow(1)
    seen: list[bytes] = []
    await sender.put(b"")
    assert receiver.take_nowait() == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.take, lambda piece: seen.append(piece) or True)
        await wait_all_tasks_blocked()
        sender.put_nowait(b"")
        await sender.put(b"")
        sender.end()
    assert seen == []


async def test_who_checkpoints():
    """put and take always do, everything else never."""
    sender, receiver = open_flow(2)
    with assert_checkpoints():
        await sender.put(b"x")
    with assert_checkpoints():
        await sender.put(b"")
    with assert_checkpoints():
        await receiver.take()
    with assert_no_checkpoints():
        sender.put_nowait(b"y")
        assert receiver.take_nowait() == [b"y"]
        sender.end()
        assert receiver.take_nowait() == []
        receiver.close()
    assert "ending" in repr(sender)
    assert "ending" in repr(receiver)


# -- the receiver goes away --------------------------------------------------------------------------------------------


async def test_closing_the_receiver_breaks_puts():
    """The waiting one and those to come; what the channel held is dropped."""
    sender, receiver = open_flow(1)
    sender.put_nowait(b"one")

    async def put() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await sender.put(b"two")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put)
        await wait_all_tasks_blocked()
        with receiver:
            pass
    receiver.close()
    with pytest.raises(trio.BrokenResourceError):
        sender.put_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await receiver.take()
    assert receiver.statistics().held == 0


async def test_a_closed_flow_seemed_to_hold_a_piece():
    """A waiting put whose piece was taken just before the receiver closed leaves nothing behind in the books."""
    sender, receiver = open_flow(1)
    sender.put_nowait(b"one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.put, b"two")
        await wait_all_tasks_blocked()
        assert receiver.take_nowait() == [b"one", b"two"]
        receiver.close()
    assert sender.statistics().held == 0
    assert sender.statistics().queued == 2


@pytest.mark.parametrize("sink", [None, lambda _piece: True])
async def test_closing_by_another_task_wakes_the_parked_owner(sink):
    """It is woken with ClosedResourceError, and no put reaches its sink any more."""
    sender, receiver = open_flow(1)

    async def take() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await receiver.take(sink)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        receiver.close()
        with pytest.raises(trio.BrokenResourceError):
            sender.put_nowait(b"x")


async def test_one_task_takes_at_a_time():
    """A second one is told, instead of leaving the first asleep for ever."""
    sender, receiver = open_flow(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.take)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await receiver.take()
        sender.end()


async def test_a_cancelled_take_loses_nothing():
    """Before it parked and while it is parked: the pieces are there for the next take."""
    sender, receiver = open_flow(4)
    sender.put_nowait(b"one")
    with trio.CancelScope() as scope:
        scope.cancel()
        await receiver.take()
    assert receiver.take_nowait() == [b"one"]
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver.take)
            await wait_all_tasks_blocked()
            scope.cancel()
            sender.put_nowait(b"two")
    assert await receiver.take() == [b"two"]


async def test_a_piece_put_before_the_cancel_arrives_is_taken():
    """Woken and cancelled in the same step, the take still answers with the piece."""
    sender, receiver = open_flow(4)
    got: list[bytes] = []

    async def take() -> None:
        got.extend(await receiver.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        sender.put_nowait(b"one")
        nursery.cancel_scope.cancel()
    assert got == [b"one"]


# -- any schedule ------------------------------------------------------------------------------------------------------


@given(
    capacity=st.integers(1, 3),
    piece_bytes=st.integers(1, 8),
    handover_bytes=st.integers(1, 16),
    puts=st.lists(st.binary(max_size=24), max_size=12),
    sink_room=st.lists(st.integers(0, 20), max_size=8),
    naps=st.lists(st.integers(0, 2), max_size=8),
    complete=st.booleans(),
    use_sink=st.booleans(),
)
def test_any_schedule_delivers_the_bytes_in_order_with_their_ending(
    capacity, piece_bytes, handover_bytes, puts, sink_room, naps, complete, use_sink
):
    """Whatever the sizes, naps and refusing sinks: the same bytes, the same ending, and never more than the bound."""

    async def main() -> None:
        sender, receiver = open_flow(capacity, piece_bytes=piece_bytes, handover_bytes=handover_bytes)
        got, rest, rooms, pauses = bytearray(), bytearray(), list(sink_room), list(naps)

        def sink(piece: bytes) -> bool:
            room = rooms.pop() if rooms else 1000
            got.extend(piece[:room])
            rest.extend(piece[room:])
            return not rest

        async def produce() -> None:
            for data in puts:
                await sender.put(data)
            sender.end("all") if complete else sender.abort("cut")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(produce)
            while receiver.ending is None:
                batch = await receiver.take(sink if use_sink else None)
                assert len(batch) <= capacity + 1
                assert all(0 < len(piece) <= piece_bytes for piece in batch)
                got += rest
                rest.clear()
                await trio.sleep(pauses.pop() if pauses else 0)
                for piece in batch:
                    got += piece
        assert bytes(got) == b"".join(puts)
        assert receiver.ending == (Ended("all") if complete else Aborted("cut"))
        statistics = receiver.statistics()
        assert statistics.bytes == len(got)
        assert statistics.peak <= capacity
        assert statistics.held == 0

    trio.run(main, clock=MockClock(autojump_threshold=0))
