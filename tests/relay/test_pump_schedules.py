"""pump and deliver under any schedule and over real sockets: the same bytes and endings, whichever path they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_kit import held_at_most
from relay_pairs import reset, socket_pair
from trio.testing import MockClock

from canal_trio.relay import Progress, RelayFailure, TcpStream, Trouble, deliver, open_flow, pump
from canal_trio.testing.simstream import Fault, FaultKind, SimLink, sim_stream_pair

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
