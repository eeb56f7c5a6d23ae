"""The client's side of an answer: the only writer of a client connection.

`ClientWriter` hands bytes to the client's kernel. A write may stall for `client_write` seconds without a byte moving;
then the client has stalled. `BodyWriter` frames one response body on it, and is the sink of the response flow: in
hand-over it runs in the poller's step and keeps what the kernel did not take in one slot, which goes out before
anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import trio
from trio.abc import HalfCloseableStream, Stream

from canal_trio.errors import Kind, Phase
from canal_trio.gateway.exchange import Exchange
from canal_trio.messages import End
from canal_trio.relay.course import checkpoint_if_cancelled, in_task, later
from canal_trio.relay.handover import Buffer, HandoverStream, can_hand_over
from canal_trio.wire.bodies import encode_chunk, encode_last_chunk

__all__ = ["BROKEN", "BodyWriter", "ClientWriter"]

BROKEN = "The connection to the client broke."

_COPIED = 2048  # bytes: up to here a copy costs less than two more buffers
_SLICE = 16 * 1024  # bytes per write where progress cannot be seen: a slow client must not be taken for a stalled one


@final
class ClientWriter:
    """Writes to one client. `trouble` is None until the client stalled or its connection broke."""

    __slots__ = (
        "_direct",
        "_patience",
        "_stall",
        "_stream",
        "_swallow",
        "closing",
        "trouble",
        "unsent",
    )

    def __init__(self, stream: Stream, *, stall: float) -> None:
        self._stream = stream
        self._stall = stall
        self._direct = stream if can_hand_over(stream) else None
        self.trouble: Kind | None = None
        self.closing = False  # the connection ends with the answer that is next: its head says so
        self._swallow: Callable[[bytes], int] | None = None  # what takes everything, once the client is to get no more
        self._patience: trio.CancelScope | None = None  # of a write that waits
        self.unsent: list[Buffer] = []  # begun and not finished: nothing may be written after it but itself

    @property
    def direct(self) -> HandoverStream | None:
        """The stream, where it takes bytes without waiting."""
        return self._direct

    @property
    def send(self) -> Callable[[bytes], int] | None:
        """What takes bytes without waiting, if there is anything."""
        if self._direct is None:
            return None
        return self._swallow or self._direct.try_send

    @property
    def dropping(self) -> bool:
        """`drop_all` was called."""
        return self._swallow is not None

    def drop_all(self, swallow: Callable[[bytes], int]) -> None:
        """The client is gone: from now on every write succeeds, and `swallow` gets to know of it. Not a checkpoint."""
        self._swallow = swallow
        self.trouble = None
        self.unsent = []
        if self._patience is not None:
            self._patience.cancel(reason="nobody is left to wait for")

    async def write(self, pieces: Sequence[bytes], taken: Callable[[int], None] | None = None) -> bool:
        """Pass `pieces` to the client's kernel, after what is unsent. False: see `trouble`.

        `taken` is told, in the step in which it happens, how many of `pieces` the kernel has taken so far: a client
        that has read them may be seen to leave before the caller runs again. A checkpoint only if it has to wait, or
        where the stream takes the plain path. Cancelled, what was not taken is left in `unsent`.
        """
        await later()
        if self._swallow is not None:
            await checkpoint_if_cancelled()
            self._swallow(b"")
            if taken is not None:
                taken(len(pieces))
            return True
        if self.trouble is not None:
            return False
        self.unsent += pieces
        await checkpoint_if_cancelled()
        report = _Report(len(pieces), taken)
        try:
            if self._direct is not None:
                self.unsent = [*self._direct.try_send_batch(self.unsent)]
                report.left(len(self.unsent))
                if self.unsent:
                    await self._write_direct(self._direct, report)
            else:
                await self._write_plain(report)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.trouble = Kind.GONE
        self._patience = None
        if self.dropping:  # it left meanwhile
            self.unsent, self.trouble = [], None
        return self.trouble is None

    async def send_eof(self) -> bool:
        """End this direction alone. False: the stream cannot do that, or see `trouble`. A checkpoint."""
        if self.trouble is None and isinstance(self._stream, HalfCloseableStream):
            try:
                with trio.move_on_after(self._stall) as patience:
                    await self._stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.trouble = Kind.GONE
            else:
                return not patience.cancelled_caught
        await trio.lowlevel.checkpoint()
        return False

    async def _write_direct(self, stream: HandoverStream, report: _Report) -> None:
        await in_task()
        while self.unsent:
            with trio.move_on_after(self._stall) as self._patience:
                await stream.wait_send_all_might_not_block()
            if self._patience.cancelled_caught:
                self.trouble = Kind.STALLED
                return
            self.unsent = [*stream.try_send_batch(self.unsent)]
            report.left(len(self.unsent))

    async def _write_plain(self, report: _Report) -> None:
        await in_task()
        while self.unsent:
            count = _group(self.unsent)
            with trio.move_on_after(self._stall) as self._patience:
                await self._stream.send_all(b"".join(self.unsent[:count]))
            if self._patience.cancelled_caught:
                self.trouble = Kind.STALLED
                return
            del self.unsent[:count]
            report.left(len(self.unsent))


class _Report:
    """Tells how many pieces of one write were taken, whenever that has changed."""

    __slots__ = ("_count", "_taken", "_told")

    def __init__(self, count: int, taken: Callable[[int], None] | None) -> None:
        self._count = count
        self._taken = taken
        self._told = 0

    def left(self, unsent: int) -> None:
        """So many are unsent, those of an earlier write among them, which go first."""
        count = self._count - unsent
        if count > self._told and self._taken is not None:
            self._told = count
            self._taken(count)


def _group(pieces: Sequence[Buffer]) -> int:
    """How many of `pieces` to send at once where progress cannot be seen."""
    size = 0
    for count, piece in enumerate(pieces, 1):
        size += len(piece)
        if size >= _SLICE:
            return count
    return len(pieces)


@final
class BodyWriter:
    """One response body on its way to one client. `on_terminal` is called once, when its last event was delivered.

    An `upstream.interface.Outlet`; `sink` is the same for a flow.
    """

    __slots__ = (
        "_begun",
        "_exchange",
        "_framed",
        "_length",
        "_now",
        "_on_terminal",
        "_send",
        "_start",
        "_stop",
        "_writer",
        "chunked",
    )

    def __init__(
        self,
        writer: ClientWriter,
        exchange: Exchange,
        *,
        chunked: bool,
        on_terminal: Callable[[], None],
        length: int | None = None,
    ) -> None:
        self._writer = writer
        self._exchange = exchange
        self.chunked = chunked
        self._length = length  # announced to the client: with its last byte the answer is whole
        self._on_terminal: Callable[[], None] | None = on_terminal
        self._send = writer.send
        # What is about to be sent, or whose rest is unsent: `_framed[_start:_stop]` is its payload, read at `_now`.
        self._framed = b""
        self._start = self._stop = 0
        self._now = 0.0
        self._begun: tuple[bytes, list[bytes], list[bytes]] | None = None  # what `write` is at: head, batch, all framed

    @property
    def can_hand_over(self) -> bool:
        """The client's stream takes bytes without waiting."""
        return self._send is not None

    def sink(self, piece: bytes) -> bool:
        """Take a whole piece in the poller's step; False: the kernel did not take all of it, or the client is gone."""
        return self.piece(piece, self._exchange.clock())()

    def piece(self, payload: bytes, now: float) -> Callable[[], bool]:
        """See `upstream.interface.Outlet`."""
        if not self.chunked:
            return self.whole(payload, 0, len(payload), now)
        framed = encode_chunk(payload)
        return self.whole(framed, len(framed) - len(payload) - 2, len(framed) - 2, now)

    def whole(self, framed: bytes, start: int, stop: int, now: float) -> Callable[[], bool]:
        """See `upstream.interface.Outlet`."""
        self._framed = framed
        self._start = start
        self._stop = stop
        self._now = now
        return self._pass_framed

    def _pass_framed(self) -> bool:
        """The rest of the step. Written out, as it runs for each event."""
        framed = self._framed
        try:
            sent = self._send(framed)  # type: ignore[misc]  # only armed when can_hand_over
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return self._failed()
        if sent < len(framed):
            self._writer.unsent.append(memoryview(framed)[sent:])
            return False
        self._framed = b""
        self._delivered(framed, self._start, self._stop, self._now)
        return True

    def open(self, head: bytes, piece: bytes) -> bool:
        """Write the response head, and with it the piece that is here already, if any. Otherwise as `sink`."""
        if piece:
            self.piece(piece, self._exchange.clock())
        block = head + self._framed
        try:
            sent = self._send(block)  # type: ignore[misc]  # only called when can_hand_over
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return self._failed()
        if sent < len(block):
            self._writer.unsent.append(memoryview(block)[sent:])
            return False
        self._taken()
        return True

    def _failed(self) -> bool:
        """A send met nobody. True: the answer goes on without a client, from what was not sent here on."""
        self._writer.trouble = Kind.GONE
        if not self._left():
            self._framed = b""
            return False
        self._taken()
        return True

    def _taken(self) -> None:
        """The client's kernel has all of `_framed`, if there is any."""
        framed, self._framed = self._framed, b""
        if framed:
            self._delivered(framed, self._start, self._stop, self._now)

    def _delivered(self, data: bytes, start: int, stop: int, now: float) -> None:
        """`data[start:stop]` was accepted by the client's kernel. In one place, as it runs for each event."""
        exchange = self._exchange
        exchange.response_bytes += stop - start
        exchange.pieces += 1
        gap = now - exchange.last_piece
        exchange.last_piece = now
        if exchange.first_piece is None:
            exchange.first_piece = now
            exchange.phase = Phase.STREAM
            if exchange.first_seen is not None:
                exchange.first_seen(now)
        elif gap > exchange.longest_gap:
            exchange.longest_gap = gap
        scanner = exchange.scanner
        if scanner is None:
            if exchange.response_bytes == self._length:
                exchange.has_answer()
            return
        scanner.feed_part(data, start, stop)
        # Not before its blank line: until then the client's parser has not seen the event.
        if scanner.terminal and scanner.at_boundary and self._on_terminal is not None:
            notify, self._on_terminal = self._on_terminal, None
            notify()

    async def flush(self) -> bool:
        """Pass on what the sink kept. False: the client stalled or is gone."""
        if not await self._writer.write(()) and not self._left():
            return False
        self._now = self._exchange.clock()
        self._taken()
        return True

    async def write(self, batch: list[bytes], end: End | None, head: bytes = b"") -> bool:
        """Pass on `batch`, and with the last piece the end of the body, in one write. False: see the writer.

        `head`: the response's, where it was not written before.
        """
        framed: list[bytes] = [head] if head else []
        ends: list[int] = []  # how many of `framed` there are with each piece of the batch
        for piece in batch:
            framed += _gathered(piece) if self.chunked else (piece,)
            ends.append(len(framed))
        if end is not None and self.chunked:
            framed.append(encode_last_chunk(end.trailers))
        total, done = len(framed), 0

        def taken(count: int) -> None:
            nonlocal done
            now = self._exchange.clock()
            while done < len(ends) and ends[done] <= count:
                self._delivered(batch[done], 0, len(batch[done]), now)
                done += 1
            if end is not None and count == total:
                self._exchange.has_answer()

        self._begun = head, batch, framed
        if not await self._writer.write(framed, taken):
            return self._left()
        self._begun = None
        if end is not None:
            self._exchange.has_answer()  # there may have been nothing left to write
        return True

    def partly(self) -> int:
        """How many bytes the client's kernel took of a piece that it did not take whole: no other count has them yet.

        What an answer that ends here has delivered besides. Where progress within a write cannot be seen (the plain
        path), it may have been more. Not a checkpoint.
        """
        left = sum(map(len, self._writer.unsent))
        if not left:
            return 0
        if self._framed:
            return max(0, min(len(self._framed) - left, self._stop) - self._start)
        if self._begun is None:
            return 0  # it was a head, or an event of the gateway's own
        head, batch, framed = self._begun
        sent = sum(map(len, framed)) - left - len(head)
        for piece in batch:
            before, behind = (len(b"%x\r\n" % len(piece)), 2) if self.chunked else (0, 0)
            if sent < before + len(piece) + behind:
                return min(max(0, sent - before), len(piece))
            sent -= before + len(piece) + behind
        return 0

    def _left(self) -> bool:
        """A write failed. True: the client is gone, and the answer is taken to its end all the same."""
        if self._writer.trouble is Kind.GONE:
            self._exchange.leave(BROKEN)
        return self._exchange.draining

    def drop_all(self) -> None:
        """From now on the writer's `send` takes everything. Not a checkpoint."""
        self._send = self._writer.send

    async def inject(self, event: bytes) -> bool:
        """Pass on an event of the gateway's own: an error or a heartbeat. Not counted as the upstream's."""
        return await self._writer.write([encode_chunk(event) if self.chunked else event])


def _gathered(piece: bytes) -> tuple[bytes, ...]:
    """`piece` as a chunk, in buffers to send together. A large one is not copied: the flow's bound counts it once."""
    if len(piece) <= _COPIED:
        return (encode_chunk(piece),)
    return b"%x\r\n" % len(piece), piece, b"\r\n"
