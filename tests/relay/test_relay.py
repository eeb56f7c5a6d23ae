"""relay(): two streams joined, every way it can end, and its report."""

from __future__ import annotations

import logging
import math

import pytest
import trio
from relay_kit import PATHS, Running, Tap, all_of
from relay_pairs import reset, tcp_pair
from trio.testing import assert_checkpoints, memory_stream_pair, wait_all_tasks_blocked

from canal_trio.relay import Direction, OnEof, RelayFailure, RelayLimits, Trouble, relay
from canal_trio.testing.simstream import Fault, FaultKind, SimLink

# -- ends --------------------------------------------------------------------------------------------------------------


@PATHS
async def test_each_end_is_passed_on_and_the_other_direction_goes_on(handover):
    """A half-close on one side becomes one on the other; the relay is over when both have ended."""
    run = Running(handover=handover)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_all(b"question")
        await run.left.send_eof()
        assert await all_of(run.right) == b"question"
        await run.right.send_all(b"answer, later")
        await run.right.send_eof()
        assert await all_of(run.left) == b"answer, later"
    report = run.report
    assert report.failure is None
    assert (report.a_to_b.complete, report.a_to_b.bytes, report.a_to_b.lost) == (True, 8, 0)
    assert (report.b_to_a.complete, report.b_to_a.bytes, report.b_to_a.lost) == (True, 13, 0)


@PATHS
async def test_the_streams_are_left_open(handover):
    """They are borrowed: not closed, and where nothing ended they can be used on."""
    run = Running(handover=handover, on_eof=OnEof.FINISH)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_eof()
        await run.right.send_eof()
    assert not run.a.closed
    assert not run.b.closed
    await run.a.send_all(b"still there")
    assert await run.left.receive_some() == b"still there"


@PATHS
async def test_finish_keeps_the_end_to_itself(handover):
    """The other side is not told of it, and can still be sent to afterwards."""
    run = Running(handover=handover, on_eof=OnEof.FINISH)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_all(b"all of it")
        await run.left.send_eof()
        assert await run.right.receive_some() == b"all of it"
        await wait_all_tasks_blocked()
        assert not run.right.hangup
        await run.right.send_eof()
    assert run.report.a_to_b.complete
    assert run.report.b_to_a.complete
    assert not run.left.hangup


@PATHS
async def test_stop_ends_with_the_first_end(handover):
    """Once all of that direction was delivered; the other is left where it is, its bytes unread or counted as lost."""
    run = Running(handover=handover, on_eof=OnEof.STOP, to_a=SimLink(buffer=3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.right.send_all(b"more than fits")
        await wait_all_tasks_blocked()
        await run.left.send_all(b"last")
        await run.left.send_eof()
    assert await run.right.receive_some() == b"last"
    report = run.report
    assert report.failure is None
    assert report.a_to_b.complete
    assert not report.b_to_a.complete
    assert (report.b_to_a.bytes, report.b_to_a.lost) == (0, 14)


async def test_streams_that_cannot_be_half_closed():
    """Where there is no `send_eof` the end stays here, and the relay still ends with both."""

    class Plain(trio.abc.Stream):
        """A stream without send_eof."""

        def __init__(self, inner: trio.abc.Stream) -> None:
            self.inner = inner

        async def send_all(self, data) -> None:
            """As the inner one."""
            await self.inner.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            """As the inner one."""
            await self.inner.wait_send_all_might_not_block()

        async def receive_some(self, max_bytes=None) -> bytes:
            """As the inner one."""
            return await self.inner.receive_some(max_bytes)

        async def aclose(self) -> None:
            """As the inner one."""
            await self.inner.aclose()

    left, a = memory_stream_pair()
    b, right = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        reports = []

        async def run() -> None:
            reports.append(await relay(Plain(a), Plain(b)))

        nursery.start_soon(run)
        await left.send_all(b"there")
        await left.send_eof()
        assert await right.receive_some() == b"there"
        await right.send_eof()
    assert reports[0].failure is None
    assert reports[0].a_to_b.complete
    assert reports[0].b_to_a.complete


async def test_real_sockets():
    """Bytes beyond every buffer, both ways at once, between four sockets."""
    left, a = await tcp_pair(small=True)
    b, right = await tcp_pair(small=True)
    there, back = b"there " * 20_000, b"back " * 20_000
    reports, got = [], {}

    async def run() -> None:
        reports.append(await relay(a, b))

    async def send(stream, data: bytes) -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async def receive(name: str, stream) -> None:
        got[name] = await all_of(stream)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            nursery.start_soon(send, left, there)
            nursery.start_soon(send, right, back)
            nursery.start_soon(receive, "right", right)
            nursery.start_soon(receive, "left", left)
    assert got == {"right": there, "left": back}
    assert reports[0].failure is None
    assert reports[0].a_to_b.bytes == len(there)
    assert reports[0].a_to_b.peak_bytes <= 10 * 16_384 + 32_768
    for stream in (left, a, b, right):
        stream.close()


# -- failures ----------------------------------------------------------------------------------------------------------


@PATHS
async def test_what_was_read_before_a_source_broke_is_delivered(handover):
    """Then the relay is over, the failure names the stream, and the sink is not told of an end."""
    run = Running(handover=handover, from_a=SimLink(faults=[Fault(FaultKind.RESET, 5)]), to_b=SimLink(buffer=2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        assert run.left.incoming  # the pair exists
        with pytest.raises(trio.BrokenResourceError):
            await run.left.send_all(b"12345 and never more")
        got = b""
        while len(got) < 5:
            got += await run.right.receive_some()
    assert got == b"12345"
    assert run.report.failure == RelayFailure(Trouble.RECEIVE, "the simulated connection was reset", "a")
    assert not run.report.a_to_b.complete
    assert run.report.a_to_b.lost == 0
    assert not run.right.hangup


@PATHS
async def test_a_sink_that_broke_does_not_stop_what_it_still_says(handover):
    """The other direction goes on to its end: the peer may have answered before it stopped reading."""
    run = Running(handover=handover, to_b=SimLink(faults=[Fault(FaultKind.HALF_CLOSE, 2)]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_all(b"12345")
        assert await all_of(run.right) == b"12"
        await run.right.send_all(b"too large, because")
        await run.right.send_eof()
        assert await all_of(run.left) == b"too large, because"
    assert run.report.failure.trouble is Trouble.SEND
    assert run.report.failure.stream == "b"
    assert not run.report.a_to_b.complete
    assert run.report.a_to_b.lost == 5
    assert run.report.b_to_a.complete


@PATHS
async def test_an_end_that_cannot_be_passed_on_is_a_failure(handover):
    """All bytes were delivered, but the sink never learns that they are all: the direction is not complete."""
    run = Running(handover=handover)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_all(b"all")
        assert await run.right.receive_some() == b"all"
        await run.right.send_eof()
        assert await all_of(run.left) == b""
        run.b.close()  # by somebody else, with nothing more to receive from it
        await run.left.send_eof()
    assert run.report.failure == RelayFailure(Trouble.SEND, "this stream was closed", "b")
    assert not run.report.a_to_b.complete
    assert run.report.a_to_b.bytes == 3
    assert run.report.b_to_a.complete


@PATHS
async def test_the_first_failure_wins(handover):
    """What goes wrong because of it, or after it, does not replace it."""
    run = Running(handover=handover, to_b=SimLink(faults=[Fault(FaultKind.HALF_CLOSE, 2)]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await run.left.send_all(b"12345")
        await wait_all_tasks_blocked()
        run.right.reset()
    assert (run.report.failure.trouble, run.report.failure.stream) == (Trouble.SEND, "b")


async def test_a_reset_over_real_sockets():
    """RECEIVE, named, and the other stream is left open for its owner to close as it sees fit."""
    left, a = await tcp_pair()
    b, right = await tcp_pair()
    reports = []

    async def run() -> None:
        reports.append(await relay(a, b))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await left.send_all(b"half a ques")
            assert await right.receive_some() == b"half a ques"
            reset(left)
    assert (reports[0].failure.trouble, reports[0].failure.stream) == (Trouble.RECEIVE, "a")
    assert not right.hangup
    for stream in (a, b, right):
        stream.close()


@PATHS
async def test_a_bug_is_raised(handover):
    """Somebody else reads the same stream: no failure of a peer, so no report, and no task is left."""
    run = Running(handover=handover)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.a.receive_some)
        await wait_all_tasks_blocked()
        with pytest.raises(ExceptionGroup) as caught:
            await run.run()
        assert caught.group_contains(trio.BusyResourceError)
        assert len(nursery.child_tasks) == 1
        nursery.cancel_scope.cancel()


@PATHS
async def test_cancelling_leaves_no_task_and_no_sink(handover):
    """At once, whatever it was doing; the streams can be read on afterwards."""
    run = Running(handover=handover, to_a=SimLink(buffer=2))
    tap = Tap()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            run.options["tap"] = tap
            nursery.start_soon(run.run)
            await run.right.send_all(b"12345")
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert not hasattr(run, "report")
    assert tap.reports[0].b_to_a.lost == 5
    await run.left.send_all(b"on")
    assert await run.a.receive_some() == b"on"
    await run.right.send_all(b"and on")
    assert await run.b.receive_some() == b"and on"


async def test_it_is_a_checkpoint():
    """Also when both directions have ended before it began."""
    run = Running()
    await run.left.send_eof()
    await run.right.send_eof()
    with assert_checkpoints():
        await run.run()
    assert run.report.failure is None


@PATHS
async def test_a_tap_sees_every_piece_and_the_report(handover):
    """In order, by direction, once each, and the very report that is returned."""
    tap = Tap()
    run = Running(handover=handover, tap=tap)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        for piece in (b"one", b"two"):
            await run.left.send_all(piece)
            assert await run.right.receive_some() == piece
        await run.right.send_all(b"back")
        assert await run.left.receive_some() == b"back"
        await run.left.send_eof()
        await run.right.send_eof()
    assert tap.pieces == [(Direction.A_TO_B, b"one"), (Direction.A_TO_B, b"two"), (Direction.B_TO_A, b"back")]
    assert tap.reports == [run.report]


@PATHS
async def test_a_tap_that_raises_is_let_go(handover, caplog):
    """The bytes go on as if nothing had been, it is told nothing more, and the log says so once."""
    tap = Tap(raises=True)
    run = Running(handover=handover, tap=tap)
    with caplog.at_level(logging.ERROR, "canal_trio.relay"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.run)
            for piece in (b"one", b"two"):
                await run.left.send_all(piece)
                assert await run.right.receive_some() == piece
            await run.left.send_eof()
            await run.right.send_eof()
    assert run.report.a_to_b.bytes == 6
    assert tap.pieces == [(Direction.A_TO_B, b"one")]
    assert tap.reports == []
    assert [record.message for record in caplog.records] == ["a tap raised and was let go"]


@PATHS
async def test_the_reports_numbers(handover, autojump_clock):
    """Bytes, pieces, the path they took, how often reading waited, and the peaks."""
    limits = RelayLimits(capacity=1, piece_bytes=2, handover_bytes=2)
    run = Running(handover=handover, limits=limits, to_b=SimLink(buffer=2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        await trio.sleep(1)
        await run.left.send_all(b"112233445566")
        await run.left.send_eof()
        await trio.sleep(2)
        got = await all_of(run.right)
        await run.right.send_eof()
    assert got == b"112233445566"
    there, back = run.report.a_to_b, run.report.b_to_a
    assert run.report.duration == 3
    assert (there.bytes, there.lost, there.pieces) == (12, 0, 6)
    assert there.handed_over + there.queued == 6
    assert (there.handed_over > 0) is handover
    assert there.waits >= 1
    assert there.peak_pieces == 1
    assert there.peak_bytes <= 8
    assert (back.bytes, back.pieces, back.waits, back.peak_pieces, back.peak_bytes) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("wrong", ["capacity", "piece_bytes", "handover_bytes"])
def test_a_size_is_at_least_1(wrong):
    """A relay without room cannot be asked for."""
    with pytest.raises(ValueError, match="at least 1"):
        RelayLimits(**{wrong: 0})


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize("wrong", ["idle_timeout", "write_timeout", "total_timeout"])
def test_a_time_is_more_than_0(wrong, value):
    """Nor one that is over before it begins; what is not a number is refused as well."""
    with pytest.raises(ValueError, match="more than 0"):
        RelayLimits(**{wrong: value})
