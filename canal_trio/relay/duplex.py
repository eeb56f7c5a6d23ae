"""`relay`: joins two Trio streams until both directions have ended, and says how it went.

Each direction is a flow with a `pump` before it and a `deliver` behind it; the calling task looks at the deadlines.

Invariants: the streams are borrowed, `relay` never closes them, and no task of it outlives it. The first failure wins
and is noted before anything is cancelled. What was read before a failure is still delivered where it can be: a source
that broke ends the relay once what came before is delivered; a sink that broke stops only the reading for it, because
the peer may have answered before it stopped reading (RFC 9112 9.5), and what we receive decides. Deadlines end the
relay at once. A timer runs only while it is that side's turn: no idle timer while a write waits.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol, final

import trio
from trio.abc import HalfCloseableStream, Stream

from canal_trio.relay.flow import open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.relay.pump import Progress, RelayFailure, Trouble, deliver, pump

__all__ = ["Direction", "DirectionReport", "OnEof", "RelayLimits", "RelayReport", "RelayTap", "relay"]

_log = logging.getLogger("canal_trio.relay")


class OnEof(enum.Enum):
    """What the end of one direction means, once all of it was delivered."""

    HALF_CLOSE = "half_close"  # pass it on with `send_eof` where the stream has it; the other direction goes on
    FINISH = "finish"  # keep it to ourselves; the other direction goes on
    STOP = "stop"  # the relay is over, and the other direction is left where it is


class Direction(enum.Enum):
    """One of the two ways through a relay."""

    A_TO_B = "a_to_b"
    B_TO_A = "b_to_a"


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """The bounds of one relay. Bytes per direction: `(2·capacity + 2) · piece_bytes` and one hand-over's rest at most.

    Times are seconds, `math.inf` for never. Raises ValueError for a size below 1 or a time that is not positive.
    """

    capacity: int = 4  # pieces
    piece_bytes: int = 16_384
    handover_bytes: int = 32_768
    idle_timeout: float = 75.0  # nothing moved in either direction, and no write waits
    write_timeout: float = 30.0  # a stream took not one byte of what waits for it
    total_timeout: float = math.inf  # from the start to the end; extended by nothing

    def __post_init__(self) -> None:
        if min(self.capacity, self.piece_bytes, self.handover_bytes) < 1:
            raise ValueError("capacity, piece_bytes and handover_bytes are at least 1")
        if not all(seconds > 0 for seconds in (self.idle_timeout, self.write_timeout, self.total_timeout)):  # nor NaN
            raise ValueError("idle_timeout, write_timeout and total_timeout are more than 0")


@dataclass(frozen=True, slots=True)
class DirectionReport:
    """One direction of a relay that is over."""

    complete: bool  # its source ended, all of it was delivered, and the end was passed on if it was to be
    bytes: int  # delivered: of pieces which the sink took whole
    lost: int  # bytes that were read and not delivered
    pieces: int  # delivered
    handed_over: int  # of the pieces, those which went straight through
    queued: int  # and those which took the channel
    waits: int  # how often reading waited for room
    peak_pieces: int  # the most pieces the channel held
    peak_bytes: int  # the most bytes that were read and not delivered


@dataclass(frozen=True, slots=True)
class RelayReport:
    """How a relay went. `failure` is the first thing that went wrong, if anything did."""

    a_to_b: DirectionReport
    b_to_a: DirectionReport
    failure: RelayFailure | None
    duration: float  # seconds


class RelayTap(Protocol):
    """Sees what a relay delivers and cannot change it. Synchronous; if it raises, that is logged and it is let go."""

    def piece(self, direction: Direction, data: bytes) -> None:
        """`data` was taken whole by the stream it was meant for."""

    def done(self, report: RelayReport) -> None:
        """The relay is over, also when it was cancelled."""


async def relay(
    a: Stream,
    b: Stream,
    *,
    limits: RelayLimits = RelayLimits(),
    on_eof: OnEof = OnEof.HALF_CLOSE,
    tap: RelayTap | None = None,
    reaper: Reaper | None = None,
) -> RelayReport:
    """Join `a` and `b` until both directions have ended; see `OnEof` for what an end does.

    Whatever the peers do is told in the report; only bugs (in an ExceptionGroup) and `Cancelled` are raised. The
    streams are borrowed: they are open, or half-closed, when this returns, and the caller's to close. A checkpoint;
    cancelled, it stops at once, and a stream that was being written to is only good for closing. `reaper`, if it runs
    already, looks after the deadlines; otherwise the calling task does.
    """
    return await _Relay(a, b, limits, on_eof, tap).run(reaper)


@final
class _Lane:
    """One direction: its streams, its flow, and how far it is."""

    def __init__(self, way: Direction, source: Stream, sink: Stream, limits: RelayLimits) -> None:
        self.way = way
        self.source_name, self.sink_name = ("a", "b") if way is Direction.A_TO_B else ("b", "a")
        self.source = source
        self.sink = sink
        self.sender, self.receiver = open_flow(
            limits.capacity, piece_bytes=limits.piece_bytes, handover_bytes=limits.handover_bytes
        )
        self.progress = Progress()
        self.reading = trio.CancelScope()
        self.complete = False

    def report(self) -> DirectionReport:
        progress, flow = self.progress, self.sender.statistics()
        return DirectionReport(
            complete=self.complete,
            bytes=progress.delivered,
            lost=progress.received - progress.delivered,
            pieces=progress.pieces,
            handed_over=flow.handed_over,
            queued=flow.queued,
            waits=flow.waits,
            peak_pieces=flow.peak,
            peak_bytes=progress.peak,
        )


@final
class _Relay:
    """A relay in progress."""

    def __init__(self, a: Stream, b: Stream, limits: RelayLimits, on_eof: OnEof, tap: RelayTap | None) -> None:
        self._lanes = (_Lane(Direction.A_TO_B, a, b, limits), _Lane(Direction.B_TO_A, b, a, limits))
        self._limits = limits
        self._on_eof = on_eof
        self._tap = tap
        self._failure: RelayFailure | None = None
        self._started = trio.current_time()
        self._scope = trio.CancelScope()  # everything
        self._watching = trio.CancelScope()  # the calling task, while it looks at the deadlines
        self._left = 2 * len(self._lanes)  # tasks that are not done

    async def run(self, reaper: Reaper | None) -> RelayReport:
        looker = reaper or Reaper()
        watch = looker.add(self._check, self._next_look(self._started, math.inf))
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for lane in self._lanes:
                        nursery.start_soon(self._half, self._read, lane)
                        nursery.start_soon(self._half, self._write, lane)
                    with self._watching:
                        if reaper is None:
                            await looker.run()
                        else:
                            await trio.sleep_forever()
        finally:
            watch.cancel()
            report = self._report()
            self._tell(lambda tap: tap.done(report))
        return report

    async def _half(self, work: Callable[[_Lane], Awaitable[None]], lane: _Lane) -> None:
        await work(lane)
        self._left -= 1
        if not self._left:
            self._watching.cancel(reason="both directions have ended")

    async def _read(self, lane: _Lane) -> None:
        with lane.reading:
            failure = await pump(lane.source, lane.sender, progress=lane.progress)
            if failure is not None and failure.trouble is Trouble.RECEIVE:
                self._note(failure, lane.source_name)  # `_write` ends the relay once what came before is delivered

    async def _write(self, lane: _Lane) -> None:
        seen = None if self._tap is None else lambda piece: self._tell(lambda tap: tap.piece(lane.way, piece))
        failure = await deliver(lane.receiver, lane.sink, progress=lane.progress, seen=seen)
        if failure is None:
            failure = await self._pass_end(lane)
        if failure is None:
            lane.complete = True
            if self._on_eof is OnEof.STOP:
                self._scope.cancel(reason="one direction has ended")
        elif failure.trouble is Trouble.SEND:
            self._note(failure, lane.sink_name)
            lane.reading.cancel(reason=failure.detail)
        else:
            self._scope.cancel(reason=failure.detail)

    async def _pass_end(self, lane: _Lane) -> RelayFailure | None:
        if self._on_eof is OnEof.HALF_CLOSE and isinstance(lane.sink, HalfCloseableStream):
            lane.progress.blocked_since = trio.current_time()
            try:
                await lane.sink.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                return RelayFailure(Trouble.SEND, str(exc))
            finally:
                lane.progress.blocked_since = math.inf
        return None

    def _note(self, failure: RelayFailure, stream: str) -> None:
        if self._failure is None:
            self._failure = replace(failure, stream=stream)

    def _check(self, now: float) -> float:
        """The reaper's look: what is due ends the relay, else when to look again."""
        limits = self._limits
        end = self._started + limits.total_timeout
        if now >= end:
            return self._expire(Trouble.TOTAL, f"the relay took longer than {limits.total_timeout:g} s", "")
        due = end
        idle = True
        for lane in self._lanes:
            since = lane.progress.blocked_since
            if since < math.inf:
                idle = False
                due = min(due, since + limits.write_timeout)
                if now >= since + limits.write_timeout:
                    return self._expire(Trouble.WRITE, f"no byte taken for {limits.write_timeout:g} s", lane.sink_name)
        if idle:
            moved = max(lane.progress.moved_at for lane in self._lanes)
            due = min(due, moved + limits.idle_timeout)
            if now >= moved + limits.idle_timeout:
                return self._expire(Trouble.IDLE, f"nothing moved for {limits.idle_timeout:g} s", "")
        return self._next_look(now, due)

    def _next_look(self, now: float, due: float) -> float:
        """No deadline that begins later can be due before this."""
        limits = self._limits
        return min(due, now + min(limits.idle_timeout, limits.write_timeout, limits.total_timeout))

    def _expire(self, trouble: Trouble, detail: str, stream: str) -> float:
        self._note(RelayFailure(trouble, detail), stream)
        self._scope.cancel(reason=detail)
        return math.inf

    def _tell(self, what: Callable[[RelayTap], None]) -> None:
        if self._tap is not None:
            try:
                what(self._tap)
            except Exception:
                self._tap = None
                _log.exception("a tap raised and was let go")

    def _report(self) -> RelayReport:
        there, back = self._lanes
        return RelayReport(there.report(), back.report(), self._failure, trio.current_time() - self._started)
