"""A flow: one direction of a relay. A bounded Trio memory channel of pieces plus its ending.

Invariants:

* *Bounded.* At most `capacity` pieces of at most `piece_bytes` wait in the channel. With a batch being written, the
  refilled channel and one piece in each hand, a direction holds `(2·capacity + 2) · piece_bytes` at most, plus one
  remainder of a hand-over (`handover_bytes`, framed).
* *An end is a message.* `end()` says that everything was put. A sender that goes away without it has aborted, so a
  producer that dies can never be mistaken for one that finished.
* *Hand-over on the spot.* While the channel is empty and the receiver is parked in `take(sink)`, a put calls the sink
  in the same step and no task is woken. The sink takes the whole piece; when it could not pass all of it on it keeps
  the rest, answers False, and the receiver is woken to deal with it. Cancelling the parked receiver takes the sink
  away synchronously, inside `cancel()`. Everything else about the flow is the same with and without a sink.
* *A sink that raises is its receiver's bug.* The exception is raised there, the receiver is closed (a piece is lost, so
  nothing may follow it), and the sender sees no more than that: `trio.BrokenResourceError`.
* *What it holds is counted*, in bytes, in the `Meter` it was opened with: a piece from when it enters the channel or
  waits to, or was kept by a sink, until the receiver comes back for more or closes. So a counted flow's receiver has to
  be closed. A piece that goes straight through is not counted, and costs nothing.
* *A parked receiver never waits inside the channel.* A piece given to it directly would free a slot early, and a batch
  could then hold one piece more than the bound allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, final

import outcome
import trio

__all__ = ["Aborted", "Ended", "Ending", "FlowReceiver", "FlowSender", "FlowStatistics", "Meter", "Sink", "open_flow"]

Sink: TypeAlias = Callable[[bytes], bool]
"""Takes a whole piece at once, never blocks. True: all of it was passed on. False: the rest is kept, wake me."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The flow is complete. `trailer` is whatever the sender gave to `end()`; the relay does not look at it."""

    trailer: object = None


@dataclass(frozen=True, slots=True)
class Aborted:
    """The flow stopped short. `failure` says why; None if the sender just went away."""

    failure: object = None


Ending: TypeAlias = Ended | Aborted


@dataclass(frozen=True, slots=True)
class FlowStatistics:
    """Counts since the flow was opened, and what it holds now."""

    handed_over: int  # pieces that went straight through
    queued: int  # pieces that took the channel
    bytes: int
    waits: int  # puts that had to wait for room
    held: int  # pieces in the channel now
    peak: int  # the most pieces the channel ever held


@final
class Meter:
    """Bytes that some flows hold together: in their channels, and in the hands of their receivers."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


_UNREAD = Meter()  # of flows that nobody counts


class _State:
    """What the two ends share. Only this module touches it."""

    __slots__ = (
        "bytes",
        "capacity",
        "ending",
        "handed_over",
        "handover_bytes",
        "held",
        "in_hand",
        "load",
        "meter",
        "parked",
        "peak",
        "piece_bytes",
        "queued",
        "receive",
        "refused",
        "send",
        "sink",
        "torn",
        "waiting",
        "waits",
    )

    def __init__(self, capacity: int, piece_bytes: int, handover_bytes: int, meter: Meter) -> None:
        self.send, self.receive = trio.open_memory_channel[bytes](capacity)
        self.capacity = capacity
        self.piece_bytes = piece_bytes
        self.handover_bytes = handover_bytes
        self.ending: Ending | None = None
        self.sink: Sink | None = None
        self.parked: trio.lowlevel.Task | None = None
        self.refused = False  # the sink answered False since the receiver was parked
        self.waiting = False  # a put waits for room
        self.torn = False  # a put is, or was interrupted, between the pieces it cut
        self.handed_over = self.queued = self.bytes = self.waits = self.held = self.peak = 0
        self.meter = meter
        self.load = 0  # bytes in the channel; as `held`, below 0 while a waiting put's piece has yet to be noted
        self.in_hand = 0  # bytes that the receiver has taken and not come back from

    def wake(self, fault: Exception | None = None) -> None:
        """Take the sink away and let the parked receiver run, or raise `fault` in it."""
        task, self.parked, self.sink = self.parked, None, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None) if fault is None else outcome.Error(fault))

    def enter(self, piece: bytes) -> None:
        """`piece` is in the channel."""
        size = len(piece)
        self.queued += 1
        self.bytes += size
        self.load += size
        self.meter.bytes += size
        self.held += 1
        self.peak = max(self.peak, self.held)

    def hand_over(self, sink: Sink, piece: bytes) -> None:
        try:
            taken = sink(piece)
        except Exception as exc:
            orphaned = self.parked is None  # its owner was cancelled or closed by what the sink did
            self.wake(exc)
            self.close_receiver()
            if orphaned:
                raise  # nobody else is left to hear of it
            raise trio.BrokenResourceError("the receiver's sink raised") from exc
        self.handed_over += 1
        self.bytes += len(piece)
        if not taken:
            self.in_hand += len(piece)
            self.meter.bytes += len(piece)
            self.refused = True
            self.wake()

    def close_receiver(self) -> None:
        self.receive.close()
        self.meter.bytes -= max(0, self.load) + self.in_hand
        self.load, self.in_hand = min(self.load, 0), 0
        self.held = min(self.held, 0)  # below 0: a waiting put's piece was taken, and is still to enter the books
        self.wake(trio.ClosedResourceError("this receiver was closed"))

    def statistics(self) -> FlowStatistics:
        # While a waiting put has moved up but not yet run, its piece has left the books before it entered them.
        return FlowStatistics(self.handed_over, self.queued, self.bytes, self.waits, max(0, self.held), self.peak)


@final
class FlowSender:
    """The end that puts pieces. One task (or the poller, on its behalf) uses it at a time."""

    __slots__ = ("_state",)

    def __init__(self, state: _State) -> None:
        self._state = state

    def __repr__(self) -> str:
        return f"<FlowSender holding {self._state.held}/{self._state.capacity}, ending {self._state.ending}>"

    @property
    def piece_bytes(self) -> int:
        """The size of the largest piece the channel takes."""
        return self._state.piece_bytes

    @property
    def room(self) -> int:
        """Bytes `put_nowait` takes right now: a hand-over's, a piece's, or 0 when the channel is full."""
        state = self._state
        if state.sink is not None:
            return state.handover_bytes
        return state.piece_bytes if state.held < state.capacity else 0

    async def put(self, piece: bytes) -> None:
        """Pass `piece` on, waiting for room; it is cut into pieces of `piece_bytes`. An empty one is a no-op.

        A checkpoint. Cancelled, one piece has not been passed on; of a larger one the pieces cut off so far have been,
        the rest has not, and the flow can only be aborted. Raises `trio.BrokenResourceError` once the receiver has
        closed and `trio.ClosedResourceError` after `end()` or `abort()`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        state = self._state
        limit = state.piece_bytes
        if len(piece) <= limit or (state.sink is not None and len(piece) <= state.handover_bytes):
            await self._put_one(piece)
        else:
            state.torn = True
            for start in range(0, len(piece), limit):
                await self._put_one(piece[start : start + limit])
            state.torn = False
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _put_one(self, piece: bytes) -> None:
        try:
            self.put_nowait(piece)
        except trio.WouldBlock:
            state = self._state
            state.waits += 1
            state.waiting = True
            state.meter.bytes += len(piece)
            try:
                await state.send.send(piece)
            finally:
                state.waiting = False
                state.meter.bytes -= len(piece)
            state.enter(piece)  # and wake nobody: it may have been taken since, and the receiver be parked for the next

    def put_nowait(self, piece: bytes) -> None:
        """Pass `piece` on at once: to the parked receiver's sink, or into the channel.

        An empty one is a no-op. Raises `trio.WouldBlock` when the channel is full, ValueError for a piece larger than
        `room` can be, and otherwise as `put`.
        """
        if not piece:
            return
        state = self._state
        sink = state.sink
        limit = state.piece_bytes if sink is None else state.handover_bytes
        if len(piece) > limit:
            raise ValueError(f"a piece of {len(piece)} bytes, where {limit} is the most; see room")
        if sink is not None:
            state.hand_over(sink, piece)
            return
        state.send.send_nowait(piece)
        state.enter(piece)
        if state.parked is not None:
            state.wake()

    def put_last(self, piece: bytes, trailer: object = None) -> None:
        """`put_nowait(piece)` and `end(trailer)` as one: where they fit the channel, one `take` gets both.

        So the receiver can pass them on with one write. Not a checkpoint; raises as `put_nowait`, and then the flow is
        not ended.
        """
        state = self._state
        if state.sink is not None and 0 < len(piece) <= state.piece_bytes:
            # The channel is empty while a sink is armed. Waking the receiver, which the end needs anyway, is cheaper
            # than a second system call for the end.
            state.send.send_nowait(piece)
            state.enter(piece)  # `end` wakes the receiver
        else:
            self.put_nowait(piece)
        self.end(trailer)

    def end(self, trailer: object = None) -> None:
        """Everything was put. Not a checkpoint; idempotent, and the first ending wins.

        While a put waits, or after one was cancelled half way, that is not so: then this is `abort()`.
        """
        state = self._state
        self._finish(Aborted() if state.waiting or state.torn else Ended(trailer))

    def abort(self, failure: object = None) -> None:
        """No more will come, and something is missing. Not a checkpoint; idempotent, and the first ending wins.

        Pieces already put are still delivered, then the receiver sees `Aborted(failure)`.
        """
        self._finish(Aborted(failure))

    def _finish(self, ending: Ending) -> None:
        state = self._state
        if state.ending is None:
            state.ending = ending
            state.send.close()
            state.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """A sender that goes away without an end has aborted."""
        self.abort()

    def statistics(self) -> FlowStatistics:
        """A snapshot of the flow's counters."""
        return self._state.statistics()


@final
class FlowReceiver:
    """The end that takes pieces, in batches. `ending` is None until the last piece was taken."""

    __slots__ = ("_state", "ending")

    def __init__(self, state: _State) -> None:
        self._state = state
        self.ending: Ending | None = None

    def __repr__(self) -> str:
        return f"<FlowReceiver holding {self._state.held}/{self._state.capacity}, ending {self.ending}>"

    async def take(self, sink: Sink | None = None) -> list[bytes]:
        """All the pieces that are ready, at least one; or `[]`. With the last piece `ending` is set at once.

        `[]` means that the flow is over (`ending` is set then), or that `sink` answered False and holds a rest. What
        the sink holds was put first, so look at it first, in both cases. A checkpoint; cancelling it loses no piece and
        disarms the sink in the very step of the `cancel()`. While it is parked with a sink, pieces bypass this call.

        Raises what the sink raised, `trio.ClosedResourceError` once the receiver is closed (in a parked one too), and
        `trio.BusyResourceError` while another task is parked here.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        state = self._state
        if state.parked is not None:
            raise trio.BusyResourceError("another task is taking from this flow")
        batch = self._drain()
        if batch or self.ending is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return batch
        state.sink = sink
        state.refused = False
        state.parked = trio.lowlevel.current_task()

        def disarm(_raise_cancel: Any) -> trio.lowlevel.Abort:
            state.sink = state.parked = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(disarm)
        return [] if state.refused else self._drain()

    def take_nowait(self) -> list[bytes]:
        """What is ready now, perhaps nothing; `ending` is set when that was the last. Not a checkpoint.

        Raises `trio.ClosedResourceError` once the receiver is closed.
        """
        return self._drain()

    def _drain(self) -> list[bytes]:
        """What the channel holds now. A putter that waits moves up as we take, so at most capacity + 1 pieces."""
        state = self._state
        batch: list[bytes] = []
        try:
            while True:
                batch.append(state.receive.receive_nowait())
        except trio.WouldBlock:
            pass
        except trio.EndOfChannel:
            self.ending = state.ending
        if batch or state.in_hand:
            size = sum(map(len, batch))
            state.held -= len(batch)
            state.load -= size
            state.meter.bytes -= state.in_hand  # what was taken before has gone on by now
            state.in_hand = size
        return batch

    def close(self) -> None:
        """Take no more. Not a checkpoint; idempotent.

        What the channel held is dropped, puts raise `trio.BrokenResourceError`, and a task parked in `take` is woken
        with `trio.ClosedResourceError`.
        """
        self._state.close_receiver()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def statistics(self) -> FlowStatistics:
        """A snapshot of the flow's counters."""
        return self._state.statistics()


def open_flow(
    capacity: int = 4, *, piece_bytes: int = 16_384, handover_bytes: int = 32_768, meter: Meter = _UNREAD
) -> tuple[FlowSender, FlowReceiver]:
    """The two ends of a new flow.

    `capacity` (pieces) and `piece_bytes` bound the channel; `handover_bytes` bounds one hand-over, which may always be
    as large as a piece. What the flow holds is counted in `meter`. Raises ValueError for anything smaller than 1.
    """
    if min(capacity, piece_bytes, handover_bytes) < 1:
        raise ValueError("capacity, piece_bytes and handover_bytes are at least 1")
    state = _State(capacity, piece_bytes, max(piece_bytes, handover_bytes), meter)
    return FlowSender(state), FlowReceiver(state)
