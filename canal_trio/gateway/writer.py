"""The client's side of an answer: the only writer of a client connection.

`ClientWriter` hands bytes to the client's kernel. A write may stall for `client_write` seconds without a byte moving;
then the client has stalled. `BodyWriter` frames one response body on it, and is the sink of the response flow: in
hand-over it runs in the poller's step and keeps what the kernel did not take in one slot, which goes out before
anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast, final

import trio
from trio.abc import Stream

from canal_trio.errors import Kind
from canal_trio.gateway.exchange import Exchange
from canal_trio.messages import End
from canal_trio.relay.streams import HandoverStream
from canal_trio.wire.bodies import encode_chunk, encode_last_chunk

__all__ = ["BROKEN", "BodyWriter", "ClientWriter"]

BROKEN = "The connection to the client broke."

_GATHER = 256 * 1024  # bytes per write where progress cannot be seen, lest a slow client be taken for a stalled one


class DirectStream(HandoverStream, Protocol):
    """A stream that takes bytes at once, or can be waited for."""

    async def wait_send_all_might_not_block(self) -> None:
        """As `trio.abc.SendStream.wait_send_all_might_not_block`."""


@final
class ClientWriter:
    """Writes to one client. `trouble` is None until the client stalled or its connection broke."""

    def __init__(self, stream: Stream, *, stall: float) -> None:
        self._stream = stream
        self._stall = stall
        self._direct = cast("DirectStream", stream) if isinstance(stream, HandoverStream) else None
        self.trouble: Kind | None = None
        self.unsent: list[memoryview] = []  # begun and not finished: nothing may be written after it but itself

    @property
    def direct(self) -> DirectStream | None:
        """The stream, where it takes bytes without waiting."""
        return self._direct

    async def write(self, pieces: Sequence[bytes], accepted: Callable[[], None] | None = None) -> bool:
        """Pass `pieces` to the client's kernel, after what is unsent. False: see `trouble`.

        `accepted` is called in the step in which the kernel took the last byte: a client that has read it may be seen
        to leave before the caller runs again. A checkpoint. Cancelled, what was not taken is left in `unsent`.
        """
        if self.trouble is not None:
            return False
        self.unsent += [memoryview(piece) for piece in pieces]
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            if self._direct is not None:
                await self._write_direct(self._direct)
            else:
                await self._write_plain()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.trouble = Kind.GONE
        if self.trouble is None and accepted is not None:
            accepted()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self.trouble is None

    async def _write_direct(self, stream: DirectStream) -> None:
        self.unsent = _send_now(stream, self.unsent)
        while self.unsent:
            with trio.move_on_after(self._stall) as patience:
                await stream.wait_send_all_might_not_block()
            if patience.cancelled_caught:
                self.trouble = Kind.STALLED
                return
            self.unsent = _send_now(stream, self.unsent)

    async def _write_plain(self) -> None:
        data = b"".join(self.unsent)
        for start in range(0, len(data), _GATHER):
            with trio.move_on_after(self._stall) as patience:
                await self._stream.send_all(data[start : start + _GATHER])
            if patience.cancelled_caught:
                self.trouble = Kind.STALLED
                return
        self.unsent = []


def _send_now(stream: DirectStream, pieces: list[memoryview]) -> list[memoryview]:
    """Pass on as much of `pieces` as the stream takes now; what it did not take."""
    gathered = getattr(stream, "try_send_batch", None)
    if gathered is not None:
        return cast("list[memoryview]", gathered(pieces))
    rest = list(pieces)
    while rest:
        sent = stream.try_send(rest[0])
        if sent < len(rest[0]):
            rest[0] = rest[0][sent:]
            return rest
        del rest[0]
    return rest


@final
class BodyWriter:
    """One response body on its way to one client. `on_terminal` is called once, when its last event was delivered."""

    def __init__(
        self, writer: ClientWriter, exchange: Exchange, *, chunked: bool, on_terminal: Callable[[], None]
    ) -> None:
        self._writer = writer
        self._exchange = exchange
        self._chunked = chunked
        self._on_terminal: Callable[[], None] | None = on_terminal
        self._send = writer.direct.try_send if writer.direct is not None else None
        self._pending = b""  # the piece whose rest is unsent

    @property
    def can_hand_over(self) -> bool:
        """The client's stream takes bytes without waiting."""
        return self._send is not None

    def sink(self, piece: bytes) -> bool:
        """Take a whole piece in the poller's step; False: the kernel did not take all of it, or the client is gone."""
        framed = encode_chunk(piece) if self._chunked else piece
        try:
            sent = self._send(framed)  # type: ignore[misc]  # only armed when can_hand_over
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._writer.trouble = Kind.GONE
            self._exchange.leave(BROKEN)
            return False
        if sent < len(framed):
            self._writer.unsent.append(memoryview(framed)[sent:])
            self._pending = piece
            return False
        self._delivered(piece, trio.current_time())
        return True

    def _delivered(self, piece: bytes, now: float) -> None:
        exchange = self._exchange
        exchange.delivered(len(piece), now)
        scanner = exchange.scanner
        if scanner is not None:
            scanner.feed(piece)
            if scanner.terminal and self._on_terminal is not None:
                notify, self._on_terminal = self._on_terminal, None
                notify()

    async def flush(self) -> bool:
        """Pass on what the sink kept. False: the client stalled or is gone."""
        if not await self._writer.write(()):
            return False
        if self._pending:
            piece, self._pending = self._pending, b""
            self._delivered(piece, trio.current_time())
        return True

    async def write(self, batch: list[bytes], end: End | None) -> bool:
        """Pass on `batch`, and with the last piece the end of the body, in one write. False: see the writer."""
        framed = [encode_chunk(piece) for piece in batch] if self._chunked else list(batch)
        if end is not None and self._chunked:
            framed.append(encode_last_chunk(end.trailers))

        def accepted() -> None:
            now = trio.current_time()
            for piece in batch:
                self._delivered(piece, now)
            self._exchange.answered = end is not None

        return await self._writer.write(framed, accepted)

    async def inject(self, event: bytes) -> bool:
        """Pass on an event of the gateway's own: an error or a heartbeat. Not counted as the upstream's."""
        return await self._writer.write([encode_chunk(event) if self._chunked else event])
