"""pump and deliver: the same bytes and the same endings, whichever path they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_pairs import reset, socket_pair
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from canal_trio.relay import Aborted, Ended, Progress, RelayFailure, TcpStream, Trouble, deliver, open_flow, pump
from canal_trio.testing.simstream import Fault, FaultKind, SimLink, sim_stream_pair


def held_at_most(capacity: int, piece_bytes: int, handover_bytes: int) -> int:
    """The bound of docs/relay.md: batch, channel and both hands, or a hand-over's rest instead of the batch."""
    return max((2 * capacity + 2) * piece_bytes, max(piece_bytes, handover_bytes) + (capacity + 1) * piece_bytes)


# -- any schedule ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """One direction from end to end, and what happens on the way."""

    puts: list[tuple[int, int]]  # bytes the peer sends, seconds it rests before
    gulps: list[tuple[int, int]]  # the most bytes the reader takes at once, seconds it rests before
    capacity: int
    piece_bytes: int
    handover_bytes: int
    before: SimLink
    behind: SimLink

    @property
    def data(self) -> bytes:
        """What the peer sends, if nothing breaks: no two places of it look alike."""
        size = sum(size for size, _ in self.puts)
        return b"".join(b"%05d" % number for number in range(size // 5 + 1))[:size]


def links(*kinds: FaultKind) -> st.SearchStrategy[SimLink]:
    """Links with at most one fault that ends them, and perhaps a delay."""
    faults = st.builds(Fault, st.sampled_from(kinds), st.integers(0, 60))
    delays = st.builds(Fault, st.just(FaultKind.DELAY), st.integers(0, 60), st.integers(1, 3))
    return st.builds(
        lambda buffer, latency, fault, delay: SimLink(buffer, latency, (*fault, *delay)),
        st.integers(1, 40),
        st.sampled_from([0, 1]),
        st.lists(faults, max_size=1),
        st.lists(delays, max_size=1),
    )


SCRIPTS = st.builds(
    Script,
    puts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=6),
    gulps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), max_size=6),
    capacity=st.integers(1, 3),
    piece_bytes=st.integers(1, 9),
    handover_bytes=st.integers(1, 18),
    before=links(FaultKind.RESET, FaultKind.HALF_CLOSE, FaultKind.TRUNCATE),
    behind=links(FaultKind.RESET, FaultKind.HALF_CLOSE),
)


@dataclass(frozen=True)
class Outcome:
    """What the reader got and saw in the end, and what both halves said."""

    received: bytes
    broken: bool
    pumped: Trouble | None
    delivered: Trouble | None


async def play(script: Script, *, source_hands_over: bool, sink_hands_over: bool) -> Outcome:
    """Run the script through a flow."""
    peer, source = sim_stream_pair(a_to_b=script.before, handover=source_hands_over)
    sink, reader = sim_stream_pair(a_to_b=script.behind, handover=sink_hands_over)
    sender, receiver = open_flow(script.capacity, piece_bytes=script.piece_bytes, handover_bytes=script.handover_bytes)
    progress = Progress()
    bound = held_at_most(script.capacity, script.piece_bytes, script.handover_bytes)
    results: dict[str, Trouble | None] = {}
    got = bytearray()
    broken = False
    seen: list[bytes] = []

    async def send() -> None:
        data = script.data
        try:
            for size, rest in script.puts:
                await trio.sleep(rest)
                await peer.send_all(data[:size])
                data = data[size:]
            await peer.send_eof()
        except trio.BrokenResourceError:
            pass

    async def read() -> None:
        nonlocal broken
        gulps = list(script.gulps)
        try:
            while True:
                size, rest = gulps.pop() if gulps else (1000, 0)
                await trio.sleep(rest)
                data = await reader.receive_some(size)
                if not data:
                    return
                got.extend(data)
        except trio.BrokenResourceError:
            broken = True

    async def pumped() -> None:
        failure = await pump(source, sender, progress=progress)
        results["pump"] = failure and failure.trouble
        source.close()

    async def delivered() -> None:
        failure = await deliver(receiver, sink, progress=progress, seen=seen.append)
        results["deliver"] = failure and failure.trouble
        if failure is None:
            await sink.send_eof()
        elif failure.trouble is not Trouble.SEND:
            sink.reset()

    async with trio.open_nursery() as nursery:
        for task in (send, read, pumped, delivered):
            nursery.start_soon(task)
    assert progress.peak <= bound
    assert b"".join(seen) == script.data[: progress.delivered]
    assert len(seen) == progress.pieces
    assert progress.delivered <= len(got) if script.behind.faults else progress.delivered == len(got)
    assert progress.blocked_since == math.inf
    statistics = receiver.statistics()
    if not (source_hands_over and sink_hands_over):
        assert sink_hands_over or statistics.handed_over == 0
    assert statistics.held == 0
    return Outcome(bytes(got), broken, results["pump"], results["deliver"])


def expected(script: Script) -> Outcome:
    """What must come out, from the script alone."""
    data, pumped = script.data, None
    for fault in script.before.faults:
        if fault.kind is not FaultKind.DELAY and fault.at <= len(data):
            data = data[: fault.at]
            pumped = Trouble.RECEIVE if fault.kind is FaultKind.RESET else None
    for fault in script.behind.faults:
        if fault.kind is not FaultKind.DELAY and fault.at <= len(data):
            # At the very last byte the sink has taken all of it: nobody writes any more, so nobody is told.
            delivered = Trouble.SEND if fault.at < len(data) else pumped
            return Outcome(data[: fault.at], fault.kind is FaultKind.RESET, pumped, delivered)
    return Outcome(data, pumped is not None, pumped, pumped)


@settings(deadline=None)  # virtual time is what counts here
@given(SCRIPTS)
def test_every_path_gives_the_same_bytes_and_endings(script):
    """Plain, handed over, or either half alone: what the script says comes out, and the bound is never passed."""

    async def main() -> None:
        want = expected(script)
        for source_hands_over in (False, True):
            for sink_hands_over in (False, True):
                got = await play(script, source_hands_over=source_hands_over, sink_hands_over=sink_hands_over)
                assert (got.received, got.broken, got.delivered) == (want.received, want.broken, want.delivered)
                if want.delivered is Trouble.SEND:
                    assert got.pumped in {want.pumped, Trouble.REFUSED}  # it may have read all of it before
                else:
                    assert got.pumped is want.pumped

    trio.run(main, clock=MockClock(autojump_threshold=0))


# -- over real sockets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["end", "reset"])
@pytest.mark.parametrize("sink_hands_over", [True, False])
@pytest.mark.parametrize("source_hands_over", [True, False])
async def test_real_sockets_on_every_path(source_hands_over, sink_hands_over, ending):
    """Bytes beyond every buffer arrive whole, with a proper end or a failure, by either path of either half."""
    ends = [socket_pair(), socket_pair(small=True)]
    (peer, source), (sink, reader) = [
        [TcpStream(sock) if ours else trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock, ours in pair]
        for pair in [
            [(ends[0][0], True), (ends[0][1], source_hands_over)],
            [(ends[1][0], sink_hands_over), (ends[1][1], True)],
        ]
    ]
    sender, receiver = open_flow(2, piece_bytes=1000, handover_bytes=3000)
    data = b"".join(b"%07d" % number for number in range(30_000))
    results: dict[str, RelayFailure | None] = {}

    async def send() -> None:
        await peer.send_all(data)
        if ending == "end":
            await peer.send_eof()
        else:
            while results.get("received", 0) < len(data):
                await trio.lowlevel.checkpoint()
            reset(peer)

    async def pumped() -> None:
        results["pump"] = await pump(source, sender)

    async def delivered() -> None:
        results["deliver"] = await deliver(receiver, sink)
        await sink.send_eof()

    got = bytearray()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for task in (send, pumped, delivered):
                nursery.start_soon(task)
            while piece := await reader.receive_some():
                got += piece
                results["received"] = len(got)
    assert got == data
    assert results["pump"] == results["deliver"]
    if ending == "end":
        assert results["pump"] is None
    else:
        assert results["pump"].trouble is Trouble.RECEIVE
        assert "reset" in results["pump"].detail
    for stream in (peer, source, sink, reader):
        await stream.aclose()


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
        nursery.start_soon(lambda: pump(source, sender, progress=progress))
        nursery.start_soon(lambda: deliver(receiver, sink, progress=progress))
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
