"""The simulated connection: a proper Trio stream, bounded, and wrong exactly where it is told to be."""

from __future__ import annotations

import pytest
import trio
from trio.testing import check_half_closeable_stream, wait_all_tasks_blocked

from canal_trio.relay import HandoverStream
from canal_trio.testing.simstream import Fault, FaultKind, SimLink, SimStream, sim_stream_pair

LINK = SimLink(buffer=64)


async def clogged(*, handover: bool) -> tuple[SimStream, SimStream]:
    """A pair that takes no more in either direction."""
    pair = sim_stream_pair(a_to_b=LINK, b_to_a=LINK, handover=handover)
    for stream in pair:
        await stream.send_all(bytes(LINK.buffer))
    return pair


@pytest.mark.parametrize("handover", [True, False])
async def test_it_keeps_trios_contract(handover):
    """Trio's own contract suite for half-closeable streams passes, clogged in both directions too."""

    async def maker() -> tuple[SimStream, SimStream]:
        return sim_stream_pair(handover=handover)

    async def clogged_maker() -> tuple[SimStream, SimStream]:
        return await clogged(handover=handover)

    await check_half_closeable_stream(maker, clogged_maker)


def test_hand_over_can_be_switched_off():
    """With `handover=False` the streams are plain Trio streams, by the very check the relay makes."""

    async def main() -> None:
        assert all(isinstance(stream, HandoverStream) for stream in sim_stream_pair())
        assert not any(isinstance(stream, HandoverStream) for stream in sim_stream_pair(handover=False))

    trio.run(main)


async def test_a_direction_holds_only_so_many_bytes(autojump_clock):
    """A sender gets no further than the buffer, under way included, until the other end receives."""
    a, b = sim_stream_pair(a_to_b=SimLink(buffer=10, latency=1))
    assert a.try_send(bytes(25)) == 10
    assert a.try_send(b"x") == 0
    assert b.unread == 10
    assert b.try_receive(4) is None
    await trio.sleep(1.5)
    assert b.try_receive(4) == bytes(4)
    assert a.try_send(bytes(25)) == 4


async def test_latency_is_exact(autojump_clock):
    """Bytes and the end arrive one latency after they were sent, in order."""
    a, b = sim_stream_pair(a_to_b=SimLink(latency=2))
    await a.send_all(b"one")
    await trio.sleep(1)
    await a.send_all(b"two")
    await a.send_eof()
    seen = []
    while data := await b.receive_some():
        seen.append((trio.current_time(), data))
    assert seen == [(2, b"one"), (3, b"two")]
    assert trio.current_time() == 3


async def test_reset_breaks_both_directions_at_its_byte():
    """What came before the byte arrives; then both ends find both directions broken."""
    a, b = sim_stream_pair(a_to_b=SimLink(faults=[Fault(FaultKind.RESET, 3)]))
    await b.send_all(b"back")
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"abcdef")
    for stream, received in ((b, b"abc"), (a, b"back")):
        assert await stream.receive_some() == received
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")


async def test_a_fault_at_byte_0_is_there_from_the_start():
    """Nothing ever passes a connection that was reset before its first byte."""
    for stream in sim_stream_pair(b_to_a=SimLink(faults=[Fault(FaultKind.RESET, 0)])):
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_stall_swallows_everything_after_its_byte(autojump_clock):
    """After the byte nothing arrives, not even the end, and the sender fills its buffer and blocks."""
    a, b = sim_stream_pair(a_to_b=SimLink(buffer=8, faults=[Fault(FaultKind.STALL, 3)]))
    with trio.move_on_after(1000) as sending:
        await a.send_all(bytes(50))
    assert sending.cancelled_caught
    await a.send_eof()
    assert await b.receive_some() == bytes(3)
    with trio.move_on_after(1000) as receiving:
        await b.receive_some()
    assert receiving.cancelled_caught
    a.reset()
    with pytest.raises(trio.BrokenResourceError):
        await b.receive_some()


async def test_half_close_ends_one_direction():
    """The receiver sees a clean end at the byte; the sender finds it broken; the way back works."""
    a, b = sim_stream_pair(a_to_b=SimLink(faults=[Fault(FaultKind.HALF_CLOSE, 3)]))
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"abcdef")
    assert await b.receive_some() == b"abc"
    assert await b.receive_some() == b""
    await b.send_all(b"back")
    assert await a.receive_some() == b"back"


async def test_truncate_ends_both_directions():
    """Both ends see a clean end after what had been sent, and neither can send."""
    a, b = sim_stream_pair(a_to_b=SimLink(faults=[Fault(FaultKind.TRUNCATE, 3)]))
    await b.send_all(b"back")
    for stream in (a, b):
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"abcdef")
    assert await b.receive_some() == b"abc"
    assert await b.receive_some() == b""
    assert await a.receive_some() == b"back"
    assert await a.receive_some() == b""


async def test_delay_holds_back_what_follows(autojump_clock):
    """Bytes after the byte arrive that much later, those before it at once."""
    a, b = sim_stream_pair(a_to_b=SimLink(faults=[Fault(FaultKind.DELAY, 3, seconds=5)]))
    await a.send_all(b"abcdef")
    assert (await b.receive_some(), trio.current_time()) == (b"abc", 0)
    assert (await b.receive_some(), trio.current_time()) == (b"def", 5)


async def test_closing_with_unread_bytes_resets_the_other_end():
    """As with TCP, whoever closes without having read what came makes the other end see a reset, after the bytes."""
    a, b = sim_stream_pair()
    await b.send_all(b"answer")
    await a.send_all(b"never read")
    b.close()
    assert b.closed
    assert await a.receive_some() == b"answer"
    with pytest.raises(trio.BrokenResourceError):
        await a.receive_some()


async def test_a_hang_up_is_watched_without_reading(autojump_clock):
    """The watcher is called when the end arrives, not before, with bytes still unread."""
    a, b = sim_stream_pair(a_to_b=SimLink(latency=2))
    seen = []
    b.watch(lambda: seen.append(trio.current_time()))
    await a.send_all(b"unread")
    a.close()
    await trio.sleep(1.5)
    assert not b.hangup
    await trio.sleep(1)
    assert b.hangup
    assert seen == [2]
    assert await b.receive_some() == b"unread"


@pytest.mark.parametrize("by", ["reset", "close"])
async def test_a_reset_behind_an_end_is_told_to_who_watches(autojump_clock, by):
    """As a kernel tells it: a read still says that it ended, the watch is called again, and it is seen to be broken.

    A close with bytes that were not received is one, too.
    """
    a, b = sim_stream_pair(a_to_b=SimLink(latency=2))
    told = []

    def watch():
        told.append((trio.current_time(), b.broken))
        b.watch(watch)

    b.watch(watch)
    await b.send_all(b"never received")
    await a.send_eof()
    await trio.sleep(1)
    getattr(a, by)()
    assert await b.receive_some() == b""
    await trio.sleep(5)
    assert told == [(2, False), (3, True)]
    assert await b.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await b.send_all(b"x")


async def test_an_armed_sink_is_never_called_from_inside_the_send():
    """What arrives is announced in a step of its own, as a poller would."""
    a, b = sim_stream_pair()
    calls = []

    def sink() -> bool:
        calls.append(b.try_receive(100))
        return len(calls) < 2

    async with trio.open_nursery() as nursery:
        b.arm(sink)
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        calls.clear()
        a.try_send(b"one")
        assert calls == []
        await wait_all_tasks_blocked()
        assert calls == [b"one"]
        a.try_send(b"two")
    assert calls == [b"one", b"two"]
    assert "open" in repr(b)


async def test_one_task_sends_at_a_time():
    """A second one is refused, by whichever method, while the first waits for room."""
    a, b = await clogged(handover=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_all, b"x")
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await a.send_all(b"y")
        with pytest.raises(trio.BusyResourceError):
            a.try_send(b"y")
        with pytest.raises(trio.BusyResourceError):
            a.try_send_batch([b"y"])
        await b.receive_some()
    assert await b.receive_some() == b"x"
