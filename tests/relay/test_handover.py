"""The hand-over protocol: what holds for every stream that has it, real sockets and simulated ones alike."""

from __future__ import annotations

import gc
import weakref

import pytest
import trio
from relay_kit import Catch, OfSink, arrives
from relay_pairs import tcp_pair
from trio.testing import assert_checkpoints, memory_stream_pair, wait_all_tasks_blocked

from canal_trio.relay import handover_end

pytestmark = pytest.mark.usefixtures("waits")

# -- being called ------------------------------------------------------------------------------------------------------


async def test_the_sink_is_called_while_its_owner_sleeps(pair):
    """Each arrival reaches it without waking the owner, until it answers False."""
    a, b = pair
    sink = Catch(b, calls=3)
    b.arm(sink)
    awake = False
    async with trio.open_nursery() as nursery:

        async def own() -> None:
            nonlocal awake
            await b.wait_disarmed()
            awake = True

        nursery.start_soon(own)
        for number in range(3):
            await wait_all_tasks_blocked()
            assert not awake
            a.try_send(b"%d" % number)
            await arrives(lambda number=number: len(sink.got) == number + 1)
    assert sink.got == [b"0", b"1", b"2"]
    a.try_send(b"later")
    await wait_all_tasks_blocked(0.01)
    assert sink.got == [b"0", b"1", b"2"]
    assert await b.receive_some() == b"later"


async def test_what_is_here_already_is_served_first(pair):
    """Bytes that came before the sink was armed do not wait for others to come."""
    a, b = pair
    await a.send_all(b"early")
    sink = Catch(b, calls=1)
    b.arm(sink)
    with trio.fail_after(10), assert_checkpoints():
        await b.wait_disarmed()
    assert sink.got == [b"early"]


async def test_a_sink_that_leaves_bytes_gets_another_turn(pair):
    """It is called again for what it did not receive, though nothing new arrives."""
    a, b = pair
    got = []

    def sink() -> bool:
        if data := b.try_receive(1):
            got.append(data)
        return len(got) < 100

    b.arm(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        a.try_send(b"x" * 100)
        await arrives(lambda: len(got) == 100)
    assert len(got) == 100


async def test_data_and_end_in_one_edge_reach_the_sink_both(pair):
    """A short read is not taken for drained when the peer has hung up with it."""
    a, b = pair
    sink = Catch(b)
    b.arm(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        a.try_send(b"data")
        a.close()
    assert sink.got == [b"data", b""]


async def test_a_sink_taken_away_is_not_called(pair):
    """After `disarm()` nothing reaches it, its owner sleeps on until it is cancelled, and still owns the stream."""
    a, b = pair
    sink = Catch(b)
    b.arm(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        b.disarm()
        a.try_send(b"x")
        await wait_all_tasks_blocked(0.01)
        assert sink.got == []
        with pytest.raises(trio.BusyResourceError):
            b.arm(sink)
        assert len(nursery.child_tasks) == 1
        nursery.cancel_scope.cancel()
    assert await b.receive_some() == b"x"


async def test_cancelling_the_owner_disarms_in_the_very_step(pair):
    """When `cancel()` returns, before any task has run, the sink is gone; no byte is lost."""
    a, b = pair
    sink = Catch(b)
    async with trio.open_nursery() as nursery:
        b.arm(sink)
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        other = Catch(b)
        b.arm(other)  # possible already: nobody owns the receiving side any more
        b.disarm()
    a.try_send(b"x")
    await wait_all_tasks_blocked(0.01)
    assert sink.got == other.got == []
    assert await b.receive_some() == b"x"


async def test_an_owner_cancelled_before_it_sleeps_leaves_no_sink(pair):
    """In a cancelled scope `wait_disarmed` disarms and serves nothing."""
    a, b = pair
    await a.send_all(b"x")
    sink = Catch(b)
    with trio.CancelScope() as scope:
        scope.cancel()
        b.arm(sink)
        await b.wait_disarmed()
    assert scope.cancelled_caught
    assert sink.got == []
    assert await b.receive_some() == b"x"


# -- watching for the hang-up ------------------------------------------------------------------------------------------


async def test_a_hang_up_is_told_once_without_reading(pair):
    """The callback is called when the peer leaves, with bytes still unread, and no second time."""
    a, b = pair
    told = []
    b.watch(lambda: told.append(b.hangup))
    await a.send_all(b"unread")
    await wait_all_tasks_blocked(0.01)
    assert not told
    assert not b.hangup
    a.close()
    await arrives(lambda: told)
    assert await b.receive_some() == b"unread"
    assert await b.receive_some() == b""
    assert told == [True]


async def test_a_watch_that_has_ended_is_not_called(pair):
    """`watch(None)` and `close()` both end it."""
    a, b = pair
    told = []
    b.watch(lambda: told.append("b"))
    b.watch(None)
    a.watch(lambda: told.append("a"))
    a.close()
    await arrives(lambda: b.hangup)
    b.close()
    await wait_all_tasks_blocked(0.01)
    assert told == []


@pytest.mark.parametrize("asleep", [True, False])
async def test_what_a_tcp_watch_raises_is_raised_in_the_receiver(asleep):
    """It must not raise; if it does, the poller goes on and the stream's user hears of it."""
    a, b = await tcp_pair()

    def watch() -> None:
        raise OfSink

    async def receive() -> None:
        with pytest.raises(OfSink):
            await b.receive_some()

    b.watch(watch)
    async with trio.open_nursery() as nursery:
        if asleep:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
        a.close()
        await arrives(lambda: b.hangup)
        if not asleep:
            await receive()
    assert await b.receive_some() == b""
    b.close()


# -- who can hand over -------------------------------------------------------------------------------------------------


async def test_the_end_that_can_hand_over_is_found_below_tls(pair):
    """The stream itself, the transport below, or none."""

    class Wrapper:
        def __init__(self, transport_stream: object) -> None:
            self.transport_stream = transport_stream

    stream = pair[0]
    assert handover_end(stream) is stream
    assert handover_end(Wrapper(Wrapper(stream))) is stream
    assert handover_end(Wrapper(memory_stream_pair()[0])) is None
    assert handover_end(None) is None


async def test_a_closed_stream_is_kept_by_nobody():
    """Neither the poller nor a sink armed and gone keeps a TcpStream in memory."""
    a, b = await tcp_pair()
    b.arm(Catch(b))
    with trio.move_on_after(0):
        await b.wait_disarmed()
    gone = weakref.ref(b)
    b.close()
    del b
    await trio.lowlevel.checkpoint()  # Trio keeps the Cancelled, and so its frames, until then
    gc.collect()
    assert gone() is None
    a.close()
