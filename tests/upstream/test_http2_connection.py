"""The HTTP/2 connection by itself: whose turn it is, what is left when it is cancelled, and the frames on their way.

Simulated network, virtual time.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from h2_stage import CHUNKED, DEADLINES, silence, stage
from hypothesis import given
from hypothesis import strategies as st
from peers import H2Peer

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.messages import End
from canal_trio.relay.flow import Aborted, Ended, open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.connect import Connector
from canal_trio.upstream.frames import FrameFault, FrameFilter


async def endless(peer: H2Peer) -> None:
    """A body without an end, as fast as the windows allow."""
    stream_id = await peer.request()
    await peer.head(stream_id)
    while not peer.ended:
        window = min(peer.h2.local_flow_control_window(stream_id), 16_384)
        if window:
            await peer.data(stream_id, b"x" * window)
        elif not await peer.more():
            return


# -- deadlines ---------------------------------------------------------------------------------------------------------


async def test_no_answer_within_the_first_byte_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """504, and it may have cost money."""
    async with stage(silence) as it:
        answer = it.start()
        await answer.rest()
        await trio.testing.wait_all_tasks_blocked()
        (failure,) = it.results
        assert failure is not None
        assert (failure.phase, failure.kind, failure.retry) == (Phase.FIRST_BYTE, Kind.TIMEOUT, Retry.SENT)
        assert trio.current_time() == pytest.approx(DEADLINES.first_byte, abs=0.01)
        assert answer.flow.ending == Aborted(failure)
        assert not it.connection.reusable


async def test_no_byte_within_the_idle_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """Counted from the last piece."""

    async def play(peer: H2Peer) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id)
        await trio.sleep(100)
        await peer.data(stream_id, b"x")
        await peer.gone()

    async with stage(play) as it:
        assert await it.start().rest() == b"x"
        await trio.testing.wait_all_tasks_blocked()
        (failure,) = it.results
        assert failure is not None
        assert (failure.phase, failure.kind) == (Phase.STREAM, Kind.STALLED)
        assert trio.current_time() == pytest.approx(100 + DEADLINES.upstream_idle, abs=0.01)


async def test_while_the_client_is_slow_the_upstream_has_no_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """The flow is full for an hour; then it goes on."""
    async with stage(endless) as it:
        answer = it.start()
        await trio.sleep(3600)
        assert it.results == []
        for _ in range(20):
            assert await answer.flow.take()
        assert it.results == []


@pytest.mark.parametrize("alone", [False, True], ids=["with-the-last-piece", "alone"])
async def test_while_the_client_uploads_slowly_the_upstream_has_no_deadline(
    alone: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """The body is awaited, not the upstream; so is its end, if that comes alone."""

    async def play(peer: H2Peer) -> None:
        stream_id = await peer.request()
        assert peer.bodies[stream_id] == b"one two"
        await peer.head(stream_id, status="204")
        peer.h2.end_stream(stream_id)
        await peer.flush()
        await peer.gone()

    async with stage(play) as it:
        sender, receiver = open_flow()
        answer = it.start(CHUNKED, receiver)
        for piece in (b"one ", b"two"):
            await trio.sleep(3600)
            await sender.put(piece)
        if alone:
            await trio.sleep(3600)
        sender.end(End())
        assert await answer.rest() == b""
        assert isinstance(answer.flow.ending, Ended)
        assert [head.status for head in answer.heads] == [204]


async def test_an_upstream_that_takes_no_byte_of_the_request(autojump_clock: trio.testing.MockClock) -> None:
    """Its window is full: stalled, in the phase of sending."""

    async def play(_peer: H2Peer) -> None:
        await trio.sleep_forever()

    async with stage(play) as it:
        sender, receiver = open_flow()
        answer = it.start(CHUNKED, receiver)
        await sender.put(b"x" * 16_384)
        await answer.rest()
        await trio.testing.wait_all_tasks_blocked()
        (failure,) = it.results
        assert failure is not None
        assert (failure.phase, failure.kind) == (Phase.SEND, Kind.STALLED)
        assert trio.current_time() == pytest.approx(DEADLINES.upstream_idle, abs=0.01)


# -- cancelled, given up -----------------------------------------------------------------------------------------------


async def test_cancelled_while_the_flow_is_full(autojump_clock: trio.testing.MockClock) -> None:
    """httpcore's generators are ended with us, not by the garbage collector, and the socket is closed."""
    async with stage(endless) as it:
        it.start()
        await trio.sleep(1)
        it.nursery.cancel_scope.cancel()
    assert it.near.closed


async def test_the_driver_takes_no_more(autojump_clock: trio.testing.MockClock) -> None:
    """The receiver was closed: the attempt returns, without a failure of its own, and cannot be reused."""
    async with stage(endless) as it:
        answer = it.start()
        await answer.flow.take()
        answer.flow.close()
        await trio.sleep(1)
        assert it.results == [None]
        assert not it.connection.reusable
        assert it.near.closed


async def test_abort_closes_in_its_very_step(autojump_clock: trio.testing.MockClock) -> None:
    """Mid-stream, from another task; the attempt sees a broken stream."""
    async with stage(endless) as it:
        answer = it.start()
        await answer.flow.take()
        it.connection.abort()
        assert it.near.closed
        await answer.rest()
        await trio.testing.wait_all_tasks_blocked()
        (failure,) = it.results
        assert failure is not None
        assert (failure.side, failure.kind) == (Side.UPSTREAM, Kind.CUT)


@pytest.mark.parametrize("cause", [Failure(Side.CLIENT, Phase.UPLOAD, Kind.MALFORMED, "bad chunk"), None])
async def test_a_cut_upload_is_the_clients_fault(cause: Failure | None, autojump_clock: trio.testing.MockClock) -> None:
    """Its failure is returned, and the request never looks complete."""
    async with stage(silence) as it:
        sender, receiver = open_flow()
        answer = it.start(CHUNKED, receiver)
        await sender.put(b"half")
        sender.abort(cause)
        await answer.rest()
        await trio.testing.wait_all_tasks_blocked()
        assert it.results == [cause or Failure(Side.CLIENT, Phase.UPLOAD, Kind.CUT)]
        assert it.peer.complete == []


# -- reuse -------------------------------------------------------------------------------------------------------------


async def serve_ok(peer: H2Peer) -> None:
    """Answers every request."""
    while True:
        stream_id = await peer.request()
        await peer.head(stream_id, ("content-length", "2"))
        await peer.data(stream_id, b"ok", end=True)


async def test_one_exchange_after_the_other(autojump_clock: trio.testing.MockClock) -> None:
    """On the same connection, each with a stream of its own; idle in between it is usable."""
    async with stage(serve_ok) as it:
        assert "nobody" in repr(it.connection)
        for number in range(3):
            answer = it.start()
            assert await answer.rest() == b"ok"
            await trio.testing.wait_all_tasks_blocked()
            assert it.connection.reusable
            assert it.connection.usable()
            assert it.results == [None] * (number + 1)
            assert answer.heads[0].version == b"2"
        assert it.peer.complete == [1, 3, 5]


async def test_an_upstream_that_hangs_up_between_two_exchanges(autojump_clock: trio.testing.MockClock) -> None:
    """Told in the step that sees it; at once, if it was seen before there was a watch."""

    async def play(peer: H2Peer) -> None:
        stream_id = await peer.request()
        await peer.head(stream_id)
        await peer.data(stream_id, b"ok", end=True)

    async with stage(play) as it:
        assert await it.start().rest() == b"ok"
        await trio.testing.wait_all_tasks_blocked()
        died: list[str] = []
        it.connection.watch_idle(lambda: died.append("watched"))
        assert died == []
        it.peer.stream.close()
        await trio.testing.wait_all_tasks_blocked()
        assert died == ["watched"]
        it.connection.watch_idle(lambda: died.append("late"))
        assert died == ["watched", "late"]
        assert not it.connection.usable()


async def test_a_dialler_that_never_returns(autojump_clock: trio.testing.MockClock) -> None:
    """Whichever it is: given up after the deadlines of dialling."""

    async def dialler(_: Upstream) -> Any:
        await trio.sleep_forever()

    connector = Connector(Settings(), Reaper(), dialler)
    for url, seconds in (("http://u.test", 5), ("https://u.test", 10)):
        start = trio.current_time()
        failure = await connector.connect(Upstream("u", url))
        assert isinstance(failure, Failure)
        assert (failure.phase, failure.kind, failure.retry) == (Phase.DIAL, Kind.TIMEOUT, Retry.UNSENT)
        assert trio.current_time() - start == seconds


# -- frames ------------------------------------------------------------------------------------------------------------


def frame(kind: int, payload: bytes, stream_id: int = 0) -> bytes:
    """A frame by RFC 9113 4.1."""
    return len(payload).to_bytes(3, "big") + bytes((kind, 0)) + stream_id.to_bytes(4, "big") + payload


def goaway(last: int, code: int = 0, debug: bytes = b"") -> bytes:
    """A GOAWAY frame."""
    return frame(7, last.to_bytes(4, "big") + code.to_bytes(4, "big") + debug)


FRAMES = st.one_of(
    st.builds(frame, st.sampled_from([0, 1, 3, 4, 6, 8, 9, 250]), st.binary(max_size=40), st.integers(0, 9)),
    st.builds(goaway, st.integers(0, 2**31 - 1), st.sampled_from([0, 0, 2, 11]), st.binary(max_size=20)),
    st.builds(lambda payload: frame(7, payload), st.binary(max_size=7)),  # too short to be a GOAWAY: h2 refuses it
)


@given(frames=st.lists(FRAMES, max_size=12), cuts=st.lists(st.integers(1, 30)), stream_id=st.sampled_from([1, 3, 9]))
def test_only_graceful_goaways_are_taken_out_however_the_bytes_are_cut(
    frames: list[bytes], cuts: list[int], stream_id: int
) -> None:
    """Every other byte goes on, in order, and nothing is kept back once its frame is here."""

    def graceful(data: bytes) -> bool:
        if data[3] != 7 or len(data) < 17:
            return False
        last = int.from_bytes(data[9:13], "big") & 0x7FFFFFFF
        return last >= stream_id and data[13:17] == bytes(4)

    frames_filter = FrameFilter()
    frames_filter.stream_id = stream_id
    data = b"".join(frames)
    out = b""
    while data:
        size = cuts.pop(0) if cuts else len(data)
        out += frames_filter.feed(data[:size])
        data = data[size:]
    assert out == b"".join(it for it in frames if not graceful(it))
    assert frames_filter.going_away == any(map(graceful, frames))


def test_a_frame_that_is_too_large_is_refused_by_its_head() -> None:
    """16 MiB are not waited for."""
    frames = FrameFilter()
    assert frames.feed(frame(0, b"x" * 16_384)) == frame(0, b"x" * 16_384)
    with pytest.raises(FrameFault):
        frames.feed((16_385).to_bytes(3, "big") + b"\0\0\0\0\0\1")
