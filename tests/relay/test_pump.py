"""pump and deliver: cancelled, broken, closed; and their bound, reached."""

from __future__ import annotations

import math

import pytest
import trio
from relay_kit import held_at_most
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from canal_trio.relay import Aborted, Ended, Progress, RelayFailure, Trouble, deliver, open_flow, pump
from canal_trio.testing.simstream import SimLink, sim_stream_pair

# -- the half that reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handover", [True, False])
async def test_a_pump_that_is_cancelled_has_aborted_the_flow(handover):
    """The receiver sees an abort, and the source can be read on from where the pump was."""
    peer, source = sim_stream_pair(handover=handover)
    sender, receiver = open_flow(4)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump, source, sender)
            await peer.send_all(b"one")
            await wait_all_tasks_blocked()
            scope.cancel()
    assert await receiver.take() == [b"one"]
    assert receiver.ending == Aborted(None)
    await peer.send_all(b"two")
    assert await source.receive_some() == b"two"


@pytest.mark.parametrize("handover", [True, False])
async def test_a_flow_that_takes_no_more_stops_the_pump(handover):
    """REFUSED, at the first piece that cannot be put; the bytes of it are lost, and are counted as received."""
    peer, source = sim_stream_pair(handover=handover)
    sender, receiver = open_flow(4)
    progress = Progress()
    receiver.close()
    await peer.send_all(b"x")
    assert await pump(source, sender, progress=progress) == RelayFailure(Trouble.REFUSED, "the flow takes no more")
    assert progress.received == 1


@pytest.mark.parametrize("handover", [True, False])
async def test_a_source_closed_under_the_pump(handover):
    """RECEIVE, and the flow is aborted with that very failure."""
    _, source = sim_stream_pair(handover=handover)
    sender, receiver = open_flow(4)
    results = []

    async def pumped() -> None:
        results.append(await pump(source, sender))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pumped)
        await wait_all_tasks_blocked()
        source.close()
    assert results == [RelayFailure(Trouble.RECEIVE, "this stream was closed")]
    assert await receiver.take() == []
    assert receiver.ending == Aborted(results[0])


async def test_a_source_whose_pieces_are_no_bytes():
    """What a foreign stream gives as a bytearray arrives as bytes: a piece cannot change any more."""
    peer, source = memory_stream_pair()
    sender, receiver = open_flow(4)
    await peer.send_all(b"one")
    await peer.send_eof()
    assert await pump(source, sender) is None
    (piece,) = await receiver.take()
    assert type(piece) is bytes
    assert receiver.ending == Ended()


async def test_a_stream_that_is_read_by_another_task_is_a_bug():
    """BusyResourceError is raised, and the flow is aborted."""
    _, source = sim_stream_pair()
    sender, receiver = open_flow(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.receive_some)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await pump(source, sender)
        nursery.cancel_scope.cancel()
    await receiver.take()
    assert receiver.ending == Aborted(None)


# -- the half that writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (None, RelayFailure(Trouble.ABORTED, "")),
        ("a word of why", RelayFailure(Trouble.ABORTED, "a word of why")),
        (RelayFailure(Trouble.RECEIVE, "cut"), RelayFailure(Trouble.RECEIVE, "cut")),
    ],
)
@pytest.mark.parametrize("handover", [True, False])
async def test_deliver_says_why_the_flow_was_aborted(handover, cause, told):
    """After it has written what was put before."""
    sink, reader = sim_stream_pair(handover=handover)
    sender, receiver = open_flow(4)
    await sender.put(b"before")
    sender.abort(cause)
    assert await deliver(receiver, sink) == told
    assert await reader.receive_some() == b"before"


@pytest.mark.parametrize("handover", [True, False])
async def test_a_sink_that_broke_closes_the_flow(handover):
    """SEND, and whoever puts is told; nothing waits for that sink any more."""
    sink, reader = sim_stream_pair(a_to_b=SimLink(buffer=4), handover=handover)
    sender, receiver = open_flow(4)
    progress = Progress()
    results = []

    async def delivered() -> None:
        results.append(await deliver(receiver, sink, progress=progress))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(delivered)
        await wait_all_tasks_blocked()
        await sender.put(b"too much for it")
        await wait_all_tasks_blocked()
        assert progress.blocked_since < math.inf
        reader.close()
    assert [failure.trouble for failure in results] == [Trouble.SEND]
    assert progress.blocked_since == math.inf
    assert progress.delivered == 0
    with pytest.raises(trio.BrokenResourceError):
        sender.put_nowait(b"x")


async def test_a_wake_that_brought_no_room_does_not_begin_the_write_anew(autojump_clock):
    """A sink that says "perhaps now" and takes nothing is blocked since the first time; a byte taken begins anew."""
    sink, reader = sim_stream_pair(a_to_b=SimLink(buffer=1))
    sink.try_send(b"x")  # full
    sender, receiver = open_flow(1)
    progress = Progress()
    looks: list[float] = []

    async def perhaps_now() -> None:
        looks.append(progress.blocked_since)
        await trio.sleep(5)
        if len(looks) == 3:
            await reader.receive_some()

    sink.wait_send_all_might_not_block = perhaps_now
    sender.put_nowait(b"12")
    sender.end()
    with trio.move_on_after(18):
        await deliver(receiver, sink, progress=progress)
    assert looks == [0, 0, 0, 15]
    assert progress.moved_at == 15


async def test_a_sink_found_broken_in_a_hand_over():
    """The poller's step only keeps the news; the owner says SEND, and the source's sink is not disturbed by it."""
    sink, reader = sim_stream_pair()
    sender, receiver = open_flow(4)
    results = []

    async def delivered() -> None:
        results.append(await deliver(receiver, sink))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(delivered)
        await wait_all_tasks_blocked()
        reader.close()
        sender.put_nowait(b"x")
        sender.put_nowait(b"into the channel")
    assert [failure.trouble for failure in results] == [Trouble.SEND]


async def test_what_an_observer_raises_is_raised_by_deliver():
    """`seen` must not raise; if it does, that is raised in its own task, and the putting side sees a closed flow."""
    sink, _ = sim_stream_pair()
    sender, receiver = open_flow(4)

    def seen(_piece: bytes) -> None:
        raise KeyError("a bug")

    async def delivered() -> None:
        with pytest.raises(KeyError, match="a bug"):
            await deliver(receiver, sink, seen=seen)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(delivered)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            sender.put_nowait(b"x")


@pytest.mark.parametrize("handover", [True, False])
async def test_a_cancelled_deliver_has_closed_the_flow(handover):
    """While it waits for a piece, and while it waits for the sink."""
    for blocked in (False, True):
        sink, _ = sim_stream_pair(a_to_b=SimLink(buffer=1), handover=handover)
        sender, receiver = open_flow(4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver, receiver, sink)
            await wait_all_tasks_blocked()
            if blocked:
                await sender.put(b"more than one")
                await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError):
            sender.put_nowait(b"x")


# -- the bound, reached ------------------------------------------------------------------------------------------------

CAPACITY, PIECE = 4, 100


async def fill(sink, reader, source, *, handover_bytes: int, drain_first: int) -> Progress:
    """Run a direction against a reader that takes `drain_first` bytes and then none, until nothing moves any more."""
    sender, receiver = open_flow(CAPACITY, piece_bytes=PIECE, handover_bytes=handover_bytes)
    progress = Progress()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: deliver(receiver, sink, progress=progress))
        await wait_all_tasks_blocked()  # parked before anything comes: the first piece is handed over
        nursery.start_soon(lambda: pump(source, sender, progress=progress))
        await wait_all_tasks_blocked()
        left = drain_first
        while left:
            left -= len(await reader.receive_some(left))
            await wait_all_tasks_blocked()
        held = progress.received - progress.delivered
        assert held == progress.peak
        nursery.cancel_scope.cancel()
    return progress


@pytest.mark.parametrize("handover", [True, False])
async def test_the_bound_is_reached_by_batch_channel_and_both_hands(handover):
    """(2·capacity + 2)·piece_bytes exactly: a batch of capacity + 1, the channel full again, and a piece in hand."""
    peer, source = sim_stream_pair(a_to_b=SimLink(buffer=1_000_000), handover=handover)
    sink, reader = sim_stream_pair(a_to_b=SimLink(buffer=PIECE), handover=handover)
    await peer.send_all(bytes(100_000))
    # With hand-over the first piece takes the spot; the next one begins the first batch.
    progress = await fill(sink, reader, source, handover_bytes=PIECE, drain_first=PIECE)
    assert progress.peak == (2 * CAPACITY + 2) * PIECE == held_at_most(CAPACITY, PIECE, PIECE)


async def test_the_bound_is_reached_by_the_rest_of_a_hand_over():
    """A large hand-over of which nothing leaves, the channel behind it and a piece in hand: there is no batch then."""
    large = 50 * PIECE
    peer, source = sim_stream_pair(a_to_b=SimLink(buffer=1_000_000))
    sink, reader = sim_stream_pair(a_to_b=SimLink(buffer=1))
    sink.try_send(b"x")  # full
    await peer.send_all(bytes(100_000))
    progress = await fill(sink, reader, source, handover_bytes=large, drain_first=0)
    assert progress.peak == large + (CAPACITY + 1) * PIECE == held_at_most(CAPACITY, PIECE, large)
    assert progress.peak <= (2 * CAPACITY + 2) * PIECE + large
