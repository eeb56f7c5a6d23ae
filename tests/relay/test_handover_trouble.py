"""The hand-over protocol in trouble: what sinks raise, resets, streams closed under a sink."""

from __future__ import annotations

import pytest
import trio
from relay_kit import Catch, OfSink, arrives
from relay_pairs import reset, sim_pair, tcp_pair
from trio.testing import wait_all_tasks_blocked

from canal_trio.relay import TcpStream

pytestmark = pytest.mark.usefixtures("waits")


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
