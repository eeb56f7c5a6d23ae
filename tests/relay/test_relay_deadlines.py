"""relay(): its deadlines, exact under virtual time, and any schedule at all."""

from __future__ import annotations

import contextlib
import math

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_kit import PATHS, Running, Tap, all_of
from trio.testing import MockClock

from canal_trio.relay import Direction, OnEof, Reaper, RelayFailure, RelayLimits, Trouble
from canal_trio.testing.simstream import Fault, FaultKind, SimLink

# -- deadlines ---------------------------------------------------------------------------------------------------------


@PATHS
async def test_idle_is_exact_and_counts_both_directions(handover, autojump_clock):
    """It begins anew whenever anything moves either way, and is over to the second."""
    run = Running(handover=handover, limits=RelayLimits(idle_timeout=10))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        for stream in (run.left, run.right, run.left):
            await trio.sleep(7)
            await stream.send_all(b"x")
    assert run.over_at == 31
    assert run.report.failure == RelayFailure(Trouble.IDLE, "nothing moved for 10 s", "")


@PATHS
async def test_a_stream_that_takes_nothing_runs_into_the_write_deadline_not_the_idle_one(handover, autojump_clock):
    """While a write waits no idle timer runs; a byte taken begins the write's time anew."""
    limits = RelayLimits(idle_timeout=3, write_timeout=10)
    run = Running(handover=handover, limits=limits, to_b=SimLink(buffer=10))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await trio.sleep(1)
        await run.left.send_all(bytes(100))
        await trio.sleep(7)
        if handover:  # of the plain path only a whole send_all is seen
            await run.right.receive_some(1)
    begun = 8 if handover else 1
    assert run.over_at == begun + 10
    assert run.report.failure == RelayFailure(Trouble.WRITE, "no byte taken for 10 s", "b")
    assert run.report.a_to_b.lost == 100


@PATHS
async def test_idle_begins_when_the_write_is_done(handover, autojump_clock):
    """The time a write waited does not count as idle."""
    limits = RelayLimits(idle_timeout=5, write_timeout=100)
    run = Running(handover=handover, limits=limits, to_b=SimLink(buffer=10))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_all(bytes(20))
        await trio.sleep(50)
        await run.right.receive_some(10)
    assert run.over_at == 55
    assert run.report.failure.trouble is Trouble.IDLE


@PATHS
async def test_total_is_extended_by_nothing(handover, autojump_clock):
    """Though bytes move all the time, it is over when its time is."""
    run = Running(handover=handover, limits=RelayLimits(total_timeout=10, idle_timeout=3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        for _ in range(9):
            await trio.sleep(1)
            await run.left.send_all(b"x")
    assert run.over_at == 10
    assert run.report.failure == RelayFailure(Trouble.TOTAL, "the relay took longer than 10 s", "")


@PATHS
async def test_a_relay_was_cut_by_the_write_deadline_of_a_sink_that_had_broken_long_ago(handover, autojump_clock):
    """Once a sink broke nothing waits for it: the answer that still comes has the idle timeout's time."""
    run = Running(
        handover=handover,
        limits=RelayLimits(write_timeout=5, idle_timeout=60),
        to_b=SimLink(buffer=4, faults=[Fault(FaultKind.HALF_CLOSE, 6)]),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_all(b"0123456789")
        await trio.sleep(1)
        assert await all_of(run.right) == b"012345"
        for _ in range(5):
            await trio.sleep(10)
            await run.right.send_all(b"x")
        await run.right.send_eof()
        assert await all_of(run.left) == b"xxxxx"
    assert run.report.failure.trouble is Trouble.SEND
    assert run.report.b_to_a.complete


@PATHS
async def test_a_stalled_connection_ends_by_the_idle_deadline(handover, autojump_clock):
    """A peer that vanished without a word is not waited for for ever; what it had said was delivered."""
    run = Running(
        handover=handover, limits=RelayLimits(idle_timeout=10), from_b=SimLink(faults=[Fault(FaultKind.STALL, 3)])
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.right.send_all(b"abcdef")
        assert await run.left.receive_some() == b"abc"
    assert run.over_at == 10
    assert run.report.failure.trouble is Trouble.IDLE


async def test_many_relays_share_a_reaper(autojump_clock, nursery):
    """Each has its own deadlines, and none is looked at any more once it is over."""
    reaper = Reaper()
    await nursery.start(reaper.run)
    runs = [Running(limits=RelayLimits(idle_timeout=10 + number), reaper=reaper) for number in range(5)]
    async with trio.open_nursery() as relays:
        for run in runs:
            relays.start_soon(run.run)
        await runs[0].left.send_eof()
        await runs[0].right.send_eof()
    assert [run.over_at for run in runs] == [0, 11, 12, 13, 14]
    assert reaper.statistics().watched == 0


@PATHS
async def test_without_deadlines_it_waits_for_ever(handover, autojump_clock):
    """`math.inf` means never."""
    limits = RelayLimits(idle_timeout=math.inf, write_timeout=math.inf)
    run = Running(handover=handover, limits=limits)
    with trio.move_on_after(1_000_000):
        await run.run()
    assert trio.current_time() == 1_000_000


# -- any schedule ------------------------------------------------------------------------------------------------------

PUTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=5)
KINDS = st.sampled_from([kind for kind in FaultKind if kind is not FaultKind.DELAY])
LINKS = st.builds(
    lambda buffer, latency, faults: SimLink(buffer, latency, faults),
    st.integers(1, 40),
    st.sampled_from([0, 1]),
    st.lists(st.builds(Fault, KINDS, st.integers(0, 60)), max_size=1),
)


@settings(deadline=None)  # virtual time is what counts here
@given(
    puts=st.tuples(PUTS, PUTS),
    ways=st.tuples(LINKS, LINKS, LINKS, LINKS),
    limits=st.builds(
        RelayLimits,
        capacity=st.integers(1, 3),
        piece_bytes=st.integers(1, 9),
        handover_bytes=st.integers(1, 18),
        idle_timeout=st.just(20),
        write_timeout=st.just(10),
    ),
    on_eof=st.sampled_from(OnEof),
    handover=st.booleans(),
)
def test_any_relay_ends_with_an_honest_report(puts, ways, limits, on_eof, handover):
    """Whatever breaks: it ends, a prefix of what was sent arrived, complete means all of it, no bound is passed."""
    data = tuple(b"".join(b"%04d" % number for number in range(40)) for _ in puts)

    async def main() -> None:
        from_a, to_b, from_b, to_a = ways
        tap = Tap()
        run = Running(
            handover=handover, from_a=from_a, to_b=to_b, from_b=from_b, to_a=to_a, limits=limits, on_eof=on_eof, tap=tap
        )
        sent, got = [0, 0], [bytearray(), bytearray()]

        async def send(number: int, stream) -> None:
            for size, rest in puts[number]:
                await trio.sleep(rest)
                await stream.send_all(data[number][sent[number] : sent[number] + size])
                sent[number] += size
            await stream.send_eof()

        async def receive(number: int, stream) -> None:
            while piece := await stream.receive_some(7):
                got[number].extend(piece)

        async def tolerant(work, number: int, stream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await work(number, stream)

        with trio.fail_after(1000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tolerant, send, 0, run.left)
                nursery.start_soon(tolerant, send, 1, run.right)
                nursery.start_soon(tolerant, receive, 0, run.right)
                nursery.start_soon(tolerant, receive, 1, run.left)
                await run.run()
                run.a.close()
                run.b.close()
                nursery.cancel_scope.deadline = trio.current_time() + 100
        bound = (2 * limits.capacity + 2) * limits.piece_bytes + max(limits.handover_bytes, limits.piece_bytes)
        directions = (Direction.A_TO_B, Direction.B_TO_A)
        for number, report in enumerate((run.report.a_to_b, run.report.b_to_a)):
            seen = b"".join(piece for direction, piece in tap.pieces if direction is directions[number])
            assert data[number].startswith(bytes(got[number]))
            assert data[number].startswith(seen)
            assert report.bytes == len(seen)
            assert report.peak_bytes <= bound
            assert report.peak_pieces <= limits.capacity
            if report.complete:
                assert report.lost == 0
                source = ((from_a, to_a), (from_b, to_b))[number]
                if not any(link.faults for link in source):
                    assert report.bytes == sum(size for size, _ in puts[number])
        both = run.report.a_to_b.complete and run.report.b_to_a.complete
        assert both or run.report.failure is not None or on_eof is OnEof.STOP
        assert not (both and run.report.failure)
        assert tap.reports == [run.report]

    trio.run(main, clock=MockClock(autojump_threshold=0))
