"""One direction of a relay in two halves: `pump` reads a stream into a flow, `deliver` writes a flow to a stream.

Invariants: pieces leave in the order they came; what could not be passed on at once is sent before anything else. Each
half owns its end of the flow and leaves it ended, aborted or closed, however it is left itself. What a peer does is
answered as a value, never raised. Streams are borrowed: neither half closes one.

Where a stream can hand over, both halves use it as a property of the stream and the flow: `pump` arms a sink on its
source, `deliver` takes with a sink into its own, and while both are parked a piece goes from socket to socket in the
poller's step. A full flow or a blocked stream falls back to the channel, and from there back again.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import trio
from trio.abc import ReceiveStream, SendStream

from canal_trio.relay.flow import Aborted, FlowReceiver, FlowSender
from canal_trio.relay.handover import HandoverStream, can_hand_over

__all__ = ["Progress", "RelayFailure", "Trouble", "deliver", "pump"]

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class Trouble(enum.Enum):
    """What kept a direction from ending properly."""

    RECEIVE = "receive"  # the stream we read from broke, or was closed under us
    SEND = "send"  # the stream we write to broke, or was closed under us
    REFUSED = "refused"  # the flow's receiver takes no more
    ABORTED = "aborted"  # the flow's sender gave up, without a word of why
    IDLE = "idle"  # nothing moved in either direction for too long
    WRITE = "write"  # a stream took no byte for too long
    TOTAL = "total"  # the relay's time was over


@dataclass(frozen=True, slots=True)
class RelayFailure:
    """What went wrong. `stream` is the one it went wrong on, "a" or "b" in a `relay`, "" where there is no telling."""

    trouble: Trouble
    detail: str
    stream: str = ""


@final
class Progress:
    """What moved in one direction so far. Written by `pump` and `deliver`, for others to look at."""

    __slots__ = ("blocked_since", "delivered", "moved_at", "peak", "pieces", "received")

    def __init__(self) -> None:
        self.received = 0  # bytes read from the source
        self.delivered = 0  # bytes of pieces which the sink took whole
        self.pieces = 0  # their number
        self.peak = 0  # the most bytes that were received and not delivered
        self.moved_at = trio.current_time()  # when bytes last moved
        self.blocked_since = math.inf  # since when the sink has taken no byte of what is waiting for it

    def took(self, size: int) -> None:
        """`size` bytes were read from the source."""
        self.received += size
        held = self.received - self.delivered
        if held > self.peak:
            self.peak = held
        self.moved_at = trio.current_time()


# -- a stream into a flow ----------------------------------------------------------------------------------------------


async def pump(source: ReceiveStream, sender: FlowSender, *, progress: Progress | None = None) -> RelayFailure | None:
    """Read `source` to its end into the flow. None: it ended and so did the flow.

    A failure (RECEIVE, REFUSED) has aborted the flow with itself; what was read before it is still in the flow. Holds
    one piece beside the flow. A checkpoint; cancelled, it leaves the flow aborted and `source` good to be read on,
    except for one piece that was waiting for room and is lost. Raises `trio.BusyResourceError` if another task reads.
    """
    progress = progress or Progress()
    spot = _Spot(source, sender, progress) if can_hand_over(source) else None
    with sender:
        failure = await _pump(source, sender, progress, spot)
        if failure is None:
            sender.end()
        else:
            sender.abort(failure)
    return failure


async def _pump(
    source: ReceiveStream, sender: FlowSender, progress: Progress, spot: _Spot | None
) -> RelayFailure | None:
    refused = RelayFailure(Trouble.REFUSED, "the flow takes no more")
    while True:
        try:
            while spot is not None and sender.room:
                await spot.serve()
                if spot.over:
                    return refused if spot.refused else None
            data = bytes(await source.receive_some(sender.piece_bytes))
        except _BROKEN as exc:
            return RelayFailure(Trouble.RECEIVE, str(exc))
        if not data:
            return None
        progress.took(len(data))
        try:
            await sender.put(data)
        except _BROKEN:
            return refused


@final
class _Spot:
    """The sink armed on a source: moves what is here into the flow, for as long as that takes it at once."""

    __slots__ = ("_progress", "_sender", "_stream", "over", "refused")

    def __init__(self, stream: HandoverStream, sender: FlowSender, progress: Progress) -> None:
        self._stream = stream
        self._sender = sender
        self._progress = progress
        self.over = False  # the source has ended, or the flow takes no more
        self.refused = False

    async def serve(self) -> None:
        self._stream.arm(self._move)
        await self._stream.wait_disarmed()

    def _move(self) -> bool:
        room = self._sender.room
        if not room:
            return False
        data = self._stream.try_receive(room)
        if data is None:
            return True
        if not data:
            self.over = True
            return False
        self._progress.took(len(data))
        try:
            self._sender.put_nowait(data)
        except _BROKEN:
            self.over = self.refused = True
            return False
        return True


# -- a flow into a stream ----------------------------------------------------------------------------------------------

Seen: TypeAlias = Callable[[bytes], None]
"""Told of each piece, once the sink has taken all of it. Must not raise."""


async def deliver(
    receiver: FlowReceiver, sink: SendStream, *, progress: Progress | None = None, seen: Seen | None = None
) -> RelayFailure | None:
    """Write the flow to `sink` until it is over. None: the flow has ended and `sink` took everything.

    Does not end `sink`: `send_eof` is the caller's to say. A failure is either SEND, and the flow is closed then, or
    what the flow was aborted with (ABORTED if that was not a `RelayFailure`). Holds one batch, at most capacity + 1
    pieces, or the rest of one hand-over. A checkpoint; cancelled, it leaves the flow closed, and if bytes were on
    their way `sink` is only good for closing. Raises `trio.BusyResourceError` if another task writes and
    `trio.ClosedResourceError` if another task closes `receiver`.
    """
    progress = progress or Progress()
    with receiver:
        direct = sink if can_hand_over(sink) else None
        out = _Out(sink, direct, progress, seen)
        while receiver.ending is None:
            batch = await receiver.take(out.take if direct is not None else None)
            try:
                await out.finish()
                await out.write(batch)
            except _BROKEN as exc:
                progress.blocked_since = math.inf  # it is over: no deadline waits for this sink any more
                return RelayFailure(Trouble.SEND, str(exc))
        if isinstance(receiver.ending, Aborted):
            cause = receiver.ending.failure
            return cause if isinstance(cause, RelayFailure) else RelayFailure(Trouble.ABORTED, str(cause or ""))
        return None


@final
class _Out:
    """Writes pieces to a sink; the flow's sink in hand-over."""

    __slots__ = ("_direct", "_fault", "_pieces", "_progress", "_rest", "_seen", "_sink")

    def __init__(self, sink: SendStream, direct: HandoverStream | None, progress: Progress, seen: Seen | None) -> None:
        self._sink = sink
        self._direct = direct
        self._progress = progress
        self._seen = seen
        self._rest: list[memoryview] = []  # of the last `_pieces`: begun, and to be sent before anything else
        self._pieces: list[bytes] = []  # shortened in place, so that a piece is freed when it has left
        self._fault: Exception | None = None

    def take(self, piece: bytes) -> bool:
        """The flow's sink: in the poller's step. False: a rest is kept, or the stream broke."""
        assert self._direct is not None
        try:
            sent = self._direct.try_send(piece)
        except _BROKEN as exc:
            self._fault = exc
            return False
        if sent < len(piece):
            self._rest = [memoryview(piece)[sent:]]
            self._pieces = [piece]
            return False
        self._done(piece)
        return True

    async def finish(self) -> None:
        """Send what `take` kept; raise what it met. A checkpoint only if it has to wait."""
        if self._fault is not None:
            raise self._fault
        while self._rest:
            progress, waiting = self._progress, sum(map(len, self._rest))
            if progress.blocked_since == math.inf:
                progress.blocked_since = trio.current_time()
            assert self._direct is not None
            await self._direct.wait_send_all_might_not_block()
            self._offer(self._direct, self._rest)
            if sum(map(len, self._rest)) < waiting:
                self._moved()

    async def write(self, batch: list[bytes]) -> None:
        """Send `batch` and empty it. A checkpoint only if it has to wait, or where the stream takes the plain path."""
        if self._direct is not None:
            if batch:
                self._pieces = batch
                self._offer(self._direct, batch)
                await self.finish()
            return
        batch.reverse()
        while batch:
            self._progress.blocked_since = trio.current_time()
            await self._sink.send_all(batch[-1])
            self._moved()
            self._done(batch.pop())

    def _offer(self, direct: HandoverStream, data: Sequence[bytes] | Sequence[memoryview]) -> None:
        self._rest = direct.try_send_batch(data)
        left = len(self._pieces) - len(self._rest)
        for piece in self._pieces[:left]:
            self._done(piece)
        del self._pieces[:left]

    def _moved(self) -> None:
        self._progress.moved_at = trio.current_time()
        self._progress.blocked_since = math.inf

    def _done(self, piece: bytes) -> None:
        progress = self._progress
        progress.delivered += len(piece)
        progress.pieces += 1
        if self._seen is not None:
            self._seen(piece)
