"""The hand-over protocol: what holds for every stream that has it, real sockets and simulated ones alike."""

from __future__ import annotations

import gc
import weakref

import pytest
import trio
from relay_pairs import reset, tcp_pair
from trio.testing import assert_checkpoints, memory_stream_pair, wait_all_tasks_blocked

from canal_trio.relay import HandoverStream, TcpStream, handover_end
from canal_trio.testing.simstream import sim_stream_pair


async def sim_pair():
    """Two connected SimStreams with hand-over."""
    return sim_stream_pair()


@pytest.fixture(params=[tcp_pair, sim_pair], ids=["tcp", "sim"])
async def pair(request):
    """Two connected streams that can hand over, closed in the end."""
    streams = await request.param()
    yield streams
    for stream in streams:
        stream.close()


class Catch:
    """A sink that keeps what it receives, and asks to be disarmed after `calls` of them."""

    def __init__(self, stream: HandoverStream, calls: int = 1000) -> None:
        self.stream = stream
        self.calls = calls
        self.got: list[bytes | None] = []

    def __call__(self) -> bool:
        """Called by the stream."""
        data = self.stream.try_receive(100)
        if data is not None:
            self.got.append(data)
        return len(self.got) < self.calls and data != b""


async def arrives(condition) -> None:
    """Wait, with the kernel and the poller at work, until `condition()` is true."""
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()


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


# -- exceptions, resets, closing ---------------------------------------------------------------------------------------


class OfSink(Exception):
    """Raised by a sink on purpose."""


@pytest.mark.parametrize("exception", [OfSink, KeyError, SystemExit], ids=lambda kind: kind.__name__)
async def test_what_a_sink_raises_is_raised_in_its_owner_alone(pair, exception):
    """The owner gets the exception; others on the same poller are served as if nothing had been."""
    a, b = pair
    c, d = await (tcp_pair() if isinstance(a, TcpStream) else sim_pair())
    calm = Catch(d, calls=2)

    def sink() -> bool:
        if b.try_receive(100):
            raise exception("one bad chunk size")
        return True

    async def own() -> None:
        with pytest.raises(exception, match="one bad chunk size"):
            await b.wait_disarmed()

    b.arm(sink)
    d.arm(calm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(own)
        nursery.start_soon(d.wait_disarmed)
        await wait_all_tasks_blocked()
        c.try_send(b"1")
        a.try_send(b"x")
        await arrives(lambda: calm.got == [b"1"] and len(nursery.child_tasks) == 1)
        c.try_send(b"2")
    assert calm.got == [b"1", b"2"]
    a.try_send(b"after")
    assert await b.receive_some() == b"after"
    for stream in (c, d):
        stream.close()


async def test_a_sink_that_raises_at_once_raises_in_its_owner(pair):
    """Also when it is served with what is here already."""
    a, b = pair
    await a.send_all(b"x")

    def sink() -> bool:
        raise OfSink

    b.arm(sink)
    with trio.fail_after(10), pytest.raises(OfSink):
        await b.wait_disarmed()
    assert await b.receive_some() == b"x"


@pytest.mark.parametrize("use", ["receive_some", "wait_disarmed"])
async def test_what_a_sink_raised_while_nobody_slept_is_not_lost(pair, use):
    """It is raised where the stream is used next, once."""
    a, b = pair
    raised = []

    def sink() -> bool:
        raised.append(b.try_receive(100))
        raise OfSink

    b.arm(sink)
    a.try_send(b"x")
    await arrives(lambda: raised)
    with pytest.raises(OfSink):
        await getattr(b, use)()
    a.try_send(b"y")
    assert await b.receive_some() == b"y"


async def test_a_sink_that_closes_its_stream_and_raises_raises_in_its_owner(pair):
    """The exception is the bug and is what the owner sees, not that the stream was closed."""
    a, b = pair

    def sink() -> bool:
        if not b.try_receive(100):
            return True
        b.close()
        raise OfSink

    async def own() -> None:
        with pytest.raises(OfSink):
            await b.wait_disarmed()

    b.arm(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(own)
        await wait_all_tasks_blocked()
        a.try_send(b"x")


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("early", [True, False])
async def test_a_sink_may_close_its_own_stream(pair, answer, early):
    """Its owner gets ClosedResourceError, whatever the sink answers and whoever called it."""
    a, b = pair

    def sink() -> bool:
        if not b.try_receive(100):
            return True
        b.close()
        return answer

    async def own() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await b.wait_disarmed()

    if early:
        await a.send_all(b"x")
        await wait_all_tasks_blocked()
    b.arm(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(own)
        await wait_all_tasks_blocked()
        if not early:
            a.try_send(b"x")


async def test_closing_wakes_the_owner(pair):
    """With ClosedResourceError, in the step of the close, and the sink is not called any more."""
    a, b = pair
    sink = Catch(b)
    b.arm(sink)
    async with trio.open_nursery() as nursery:

        async def own() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await b.wait_disarmed()

        nursery.start_soon(own)
        await wait_all_tasks_blocked()
        a.try_send(b"x")
        b.close()
    assert sink.got == []


async def test_a_reset_reaches_the_sink_as_an_exception_of_its_receive(pair):
    """What came before it is received first; then `try_receive` raises, and so does the owner's wait."""
    a, b = pair
    sink = Catch(b)
    b.arm(sink)
    async with trio.open_nursery() as nursery:

        async def own() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await b.wait_disarmed()

        nursery.start_soon(own)
        await wait_all_tasks_blocked()
        a.try_send(b"before")
        await arrives(lambda: sink.got == [b"before"])
        if isinstance(a, TcpStream):
            reset(a)
        else:
            a.reset()
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError):
            b.try_receive(1)


async def test_a_sink_that_disarms_itself_leaves_its_owner_asleep(pair):
    """`disarm()` from within wakes nobody, whatever is answered."""
    a, b = pair
    calls = []

    def sink() -> bool:
        if data := b.try_receive(100):
            calls.append(data)
            b.disarm()
        return True

    b.arm(sink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.wait_disarmed)
        await wait_all_tasks_blocked()
        a.try_send(b"x")
        await arrives(lambda: calls)
        a.try_send(b"y")
        await wait_all_tasks_blocked(0.01)
        assert calls == [b"x"]
        assert len(nursery.child_tasks) == 1
        nursery.cancel_scope.cancel()


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
