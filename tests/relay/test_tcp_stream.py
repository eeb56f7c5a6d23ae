"""TcpStream: Trio's stream contract over a real socket, and the `try_` methods beside it."""

from __future__ import annotations

import socket

import pytest
import trio
from relay_pairs import clog, clogged_tcp_pair, reset, socket_pair, tcp_pair
from trio.testing import (
    assert_checkpoints,
    assert_no_checkpoints,
    check_half_closeable_stream,
    check_one_way_stream,
    check_two_way_stream,
    wait_all_tasks_blocked,
)

from canal_trio.relay import HandoverStream, TcpStream
from canal_trio.relay.streams import GATHER

pytestmark = pytest.mark.usefixtures("waits")


async def receive_exactly(stream: TcpStream, size: int) -> bytes:
    """`size` bytes, or what came before the end."""
    got = bytearray()
    while len(got) < size and (data := await stream.receive_some()):
        got += data
    return bytes(got)


async def hang_up_seen(stream: TcpStream) -> None:
    """Wait until the poller has told `stream` that its peer hung up."""
    seen = trio.Event()
    if not stream.hangup:
        stream.watch(seen.set)
        with trio.fail_after(10):
            await seen.wait()


# -- Trio's contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_one_way_stream, check_two_way_stream, check_half_closeable_stream])
async def test_it_keeps_trios_contract(check):
    """Trio's own contract suites pass, clogged in both directions too."""
    await check(tcp_pair, clogged_tcp_pair)


async def test_async_methods_always_checkpoint():
    """Also where the system call succeeds at once, or there is nothing to do."""
    a, b = await tcp_pair()
    with assert_checkpoints():
        await a.send_all(b"one")
    with assert_checkpoints():
        await a.send_all(b"")
    with assert_checkpoints():
        await a.send_batch([b"two", b"three"])
    with assert_checkpoints():
        await a.send_batch([])
    with assert_checkpoints():
        await a.wait_send_all_might_not_block()
    with assert_checkpoints():
        await receive_exactly(b, 11)
    a.try_send(b"x")
    b.arm(lambda: b.try_receive(1) is None)
    with assert_checkpoints():
        await b.wait_disarmed()
    for _ in range(2):
        with assert_checkpoints():
            await a.send_eof()
    with assert_checkpoints():
        assert await b.receive_some() == b""
    for stream in (a, b):
        for _ in range(2):
            with assert_checkpoints():
                await stream.aclose()


async def test_try_methods_never_checkpoint():
    """Whether they find bytes, none, the end, room or no room."""
    a, b = await tcp_pair(small=True)
    with assert_no_checkpoints():
        assert b.try_receive(10) is None
        assert a.try_send(b"one") == 3
        assert a.try_send_batch([b"two"]) == []
        b.arm(lambda: True)
        b.disarm()
        b.disarm()
    assert await receive_exactly(b, 6) == b"onetwo"
    await clog(a)
    with assert_no_checkpoints():
        assert a.try_send(b"x") == 0
        assert a.try_send_batch([b"x", b"yz"]) == [b"x", b"yz"]
        a.close()
        with pytest.raises(trio.ClosedResourceError):
            a.try_send(b"x")
        with pytest.raises(trio.ClosedResourceError):
            a.try_send_batch([b"x"])
        with pytest.raises(trio.ClosedResourceError):
            a.try_receive(1)
        with pytest.raises(trio.ClosedResourceError):
            a.arm(lambda: True)
    b.close()


async def test_a_cancelled_scope_lets_nothing_begin():
    """In a cancelled scope nothing is sent, received or ended."""
    a, b = await tcp_pair()
    await a.send_all(b"x")
    with trio.CancelScope() as scope:
        scope.cancel()
        await a.send_all(b"never")
    with trio.CancelScope() as scope:
        scope.cancel()
        await a.send_eof()
    with trio.CancelScope() as scope:
        scope.cancel()
        await b.receive_some()
    a.close()
    assert await receive_exactly(b, 100) == b"x"
    b.close()


async def test_sizes_must_make_sense():
    """What is not a positive number of bytes is refused, and the stream can still be received from."""
    a, b = await tcp_pair()
    for wrong, error in ((0, ValueError), (-1, ValueError), ("1", TypeError)):
        with pytest.raises(error):
            await a.receive_some(wrong)
    await b.send_all(b"abc")
    assert await a.receive_some(2) == b"ab"
    assert await a.receive_some(2) == b"c"
    for stream in (a, b):
        stream.close()


async def test_one_task_sends_and_one_receives():
    """A second one is refused with BusyResourceError, whichever method it uses, and the first goes on undisturbed."""
    a, b = await tcp_pair(small=True)
    await clog(a)
    c, d = await tcp_pair()
    async with trio.open_nursery() as nursery:

        async def send_when_possible() -> None:
            await a.wait_send_all_might_not_block()
            a.close()

        nursery.start_soon(send_when_possible)
        nursery.start_soon(c.receive_some)
        await wait_all_tasks_blocked()
        for send in (a.send_all, a.send_batch):
            with pytest.raises(trio.BusyResourceError):
                await send(b"")
        for try_send in (a.try_send, a.try_send_batch):
            with pytest.raises(trio.BusyResourceError):
                try_send(b"")
        with pytest.raises(trio.BusyResourceError):
            await a.send_eof()
        with pytest.raises(trio.BusyResourceError):
            await c.receive_some()
        with pytest.raises(trio.BusyResourceError):
            c.arm(lambda: True)
        await d.send_all(b"x")
        while await b.receive_some():
            pass
    c.arm(lambda: True)
    with pytest.raises(trio.BusyResourceError):
        await c.receive_some()
    for stream in (a, b, c, d):
        stream.close()


# -- sending -----------------------------------------------------------------------------------------------------------


async def test_a_batch_is_sent_in_order_whatever_the_kernel_takes():
    """More pieces than one sendmsg takes, and more bytes than the buffers hold, arrive whole and in order."""
    a, b = await tcp_pair(small=True)
    pieces = [b"%d," % number * 9 for number in range(2 * GATHER)]
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await a.send_batch(pieces)
            await a.send_eof()

        nursery.start_soon(send)
        assert await receive_exactly(b, 10_000_000) == b"".join(pieces)
    for stream in (a, b):
        stream.close()


async def test_the_rest_of_a_batch_is_what_was_not_taken():
    """try_send_batch answers the untaken bytes, the first of them perhaps within a piece."""
    a, b = await tcp_pair(small=True)
    pieces = [bytes([number]) * 5_000 for number in range(16)]
    rest = a.try_send_batch(pieces)
    taken = b"".join(pieces)[: 80_000 - sum(map(len, rest))]
    assert 0 < len(taken) < 80_000
    assert taken + b"".join(rest) == b"".join(pieces)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_batch, rest)
        assert await receive_exactly(b, 80_000) == b"".join(pieces)
    for stream in (a, b):
        stream.close()


async def test_after_send_eof_nothing_is_sent():
    """The peer sees the end after what came before, may go on sending, and we may not."""
    a, b = await tcp_pair()
    await a.send_all(b"last")
    await a.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await a.send_all(b"more")
    with pytest.raises(trio.BrokenResourceError):
        a.try_send(b"more")
    assert await receive_exactly(b, 100) == b"last"
    await b.send_all(b"answer")
    assert await a.receive_some() == b"answer"
    for stream in (a, b):
        stream.close()


# -- endings -----------------------------------------------------------------------------------------------------------


async def test_data_and_end_in_one_edge_lose_neither():
    """Bytes and FIN that are there before anybody looks are both received, though a read was short."""
    for order in ("asleep", "late"):
        a, b = await tcp_pair()
        got: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def receive(stream: TcpStream = b, got: list[bytes] = got) -> None:
                while data := await stream.receive_some(1000):
                    got.append(data)
                got.append(b"end")

            if order == "asleep":
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
            a.try_send(b"data")
            a.close()
            if order == "late":
                await hang_up_seen(b)
                nursery.start_soon(receive)
        assert got == [b"data", b"end"]
        b.close()


async def test_a_reset_is_never_taken_for_an_end():
    """It breaks the stream for the receiver, now and from then on, also where the sending side heard of it first."""
    a, b = await tcp_pair()
    reset(a)
    for _ in range(3):
        with pytest.raises(trio.BrokenResourceError):
            await b.receive_some()
    b.close()
    a, b = await tcp_pair()
    reset(a)
    await hang_up_seen(b)
    with pytest.raises(trio.BrokenResourceError):
        await b.send_all(b"x")  # the kernel tells each error once: here
    for _ in range(3):
        with pytest.raises(trio.BrokenResourceError):
            await b.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        b.try_receive(1)
    b.close()


async def test_a_reset_wakes_who_waits():
    """A receiver and a blocked sender are both told."""
    a, b = await tcp_pair(small=True)
    await clog(b)

    async def broken(call, *args) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await call(*args)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(broken, b.receive_some)
        nursery.start_soon(broken, b.send_all, bytes(1000))
        await wait_all_tasks_blocked()
        reset(a)
    b.close()


async def test_an_answer_sent_before_we_were_refused_is_received():
    """EPIPE says only that nobody reads us: what the peer had sent, and its proper end, still arrive."""
    a, b = await tcp_pair()
    await b.send_all(b"answer")
    b.close()  # nothing of ours is unread: a FIN, not a reset
    await hang_up_seen(a)
    await a.send_all(b"x")  # provokes the reset

    async def send_for_ever() -> None:
        while True:
            await a.send_all(b"x")

    with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
        await send_for_ever()
    with pytest.raises(trio.BrokenResourceError):
        await a.send_eof()
    assert await receive_exactly(a, 100) == b"answer"
    a.close()


async def test_close_wakes_every_sleeper():
    """The receiver, the sender and an armed owner get ClosedResourceError, and the peer sees the close at once."""

    async def closed(call, *args) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await call(*args)

    a, b = await clogged_tcp_pair()
    c, d = await tcp_pair()
    e, f = await tcp_pair()
    e.arm(lambda: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(closed, a.send_all, b"x")
        nursery.start_soon(closed, c.receive_some)
        nursery.start_soon(closed, e.wait_disarmed)
        await wait_all_tasks_blocked()
        for stream in (a, c, e):
            stream.close()
            stream.close()
            assert "closed" in repr(stream)
    assert await d.receive_some() == b""
    assert await f.receive_some() == b""
    for method in (a.receive_some, a.wait_send_all_might_not_block, a.send_eof):
        await closed(method)
    await closed(a.send_all, b"x")
    for stream in (b, d, f):
        stream.close()


async def test_closing_during_the_checkpoint_of_send_eof():
    """Who is closed while it yields before the FIN is told so."""
    a, b = await tcp_pair()
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await a.send_eof()

        nursery.start_soon(end)
        nursery.start_soon(a.aclose)
    b.close()


# -- taking over -------------------------------------------------------------------------------------------------------


async def test_adopt_takes_a_trio_stream_over():
    """The connection goes on with the options Trio gave it; the Trio stream is empty and harmless."""
    one, other = socket_pair()
    theirs = trio.SocketStream(trio.socket.from_stdlib_socket(one))
    ours = TcpStream.adopt(theirs)
    assert isinstance(ours, HandoverStream)
    assert ours.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await theirs.aclose()
    other.sendall(b"hello")
    assert await ours.receive_some() == b"hello"
    assert "open" in repr(ours)
    other.close()
    assert await ours.receive_some() == b""
    assert "hung up" in repr(ours)
    ours.arm(lambda: False)
    assert "armed" in repr(ours)
    ours.close()


async def test_reset_is_seen_behind_bytes_that_nobody_reads():
    """A FIN would wait behind them for ever; a reset is seen at once, and closes this end as `close` does."""
    ours, theirs = await clogged_tcp_pair()
    seen = trio.Event()
    theirs.watch(seen.set)
    ours.reset()
    ours.reset()
    with pytest.raises(trio.ClosedResourceError):
        ours.try_send(b"x")
    with trio.fail_after(5):
        await seen.wait()
    with pytest.raises(trio.BrokenResourceError):
        theirs.try_send(b"x")
    theirs.close()
