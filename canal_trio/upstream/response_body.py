"""The body of one response on its way out of an upstream's stream: through the decoder, into a flow or an outlet.

In hand-over it moves in the poller's step; otherwise a task reads piece by piece, and a full flow stops it.

Invariants: payload before a fault or an end is passed on before it; a body that the framing does not prove complete
never ends, it is noted as a failure. While the flow is full it is the client's turn.
"""

from __future__ import annotations

from typing import final

import trio
from trio.abc import Stream

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import End
from canal_trio.relay.flow import FlowSender
from canal_trio.relay.handover import Answer, HandoverStream, can_hand_over
from canal_trio.upstream.interface import Outlet
from canal_trio.upstream.turns import Turn, Turns
from canal_trio.wire.bodies import BodyDecoder, ChunkedDecoder

__all__ = ["ResponseBody"]

_PEER_TROUBLE = (trio.BrokenResourceError, trio.ClosedResourceError)


@final
class ResponseBody:
    """`failure` is the first that it met."""

    __slots__ = (
        "_clock",
        "_decoder",
        "_direct",
        "_last",
        "_most",
        "_outlet",
        "_piece_bytes",
        "_stream",
        "_turns",
        "_whole",
        "failure",
    )

    def __init__(self, stream: Stream, decoder: BodyDecoder, turns: Turns, *, piece_bytes: int) -> None:
        self._stream = stream
        self._decoder = decoder
        self._turns = turns
        self._piece_bytes = piece_bytes
        self._clock = turns.clock
        self._last = b""  # the payload that came with the end, in hand-over
        self._most = 0
        self.failure: Failure | None = None

    @property
    def end(self) -> End | None:
        """The body's end, once it has come."""
        return self._decoder.end

    @property
    def rest(self) -> bytes:
        """What came behind the end."""
        return self._decoder.rest

    def take(self, data: bytes) -> bytes:
        """The payload in `data`; broken framing is noted. Not a checkpoint."""
        payload = self._decoder.feed(data)
        if self._decoder.fault is not None:
            self._fail(Kind.MALFORMED, self._decoder.fault)
        return payload

    def _fail(self, kind: Kind, detail: str) -> None:
        self.failure = self.failure or Failure(Side.UPSTREAM, Phase.STREAM, kind, detail)

    def _eof(self) -> None:
        self._decoder.close()
        if self._decoder.end is None:
            self._fail(Kind.CUT, "The response body is incomplete.")

    # -- into an outlet ------------------------------------------------------------------------------------------------

    async def pass_on(self, outlet: Outlet, most: int) -> bytes:
        """Hand over to `outlet`, in reads of up to `most` bytes, until it answers False or the body is over.

        Returns the payload that came with the end or before a failure, which the outlet has not seen. A checkpoint;
        only for a stream that can hand over.
        """
        stream, decoder = self._stream, self._decoder
        assert can_hand_over(stream)
        self._direct, self._most, self._outlet = stream, most, outlet
        self._whole = decoder.whole if outlet.chunked and isinstance(decoder, ChunkedDecoder) else _no_chunk
        try:
            stream.arm(self._move)
            await stream.wait_disarmed()
        except _PEER_TROUBLE as exc:
            self._fail(Kind.RESET, str(exc))
        finally:
            del self._outlet  # an idle connection keeps nothing of the exchange before alive
        last, self._last = self._last, b""
        return last

    def _move(self) -> Answer:
        """The sink. It runs for each event, so what is usual goes first: one whole chunk, passed on as it is."""
        try:
            data = self._direct.try_receive(self._most)
        except trio.BrokenResourceError as exc:
            self._fail(Kind.RESET, str(exc))
            return False
        if data is None:
            return True
        now = self._turns.moved = self._clock()
        start = self._whole(data)
        if start:
            return self._outlet.whole(data, start, len(data) - 2, now)
        if not data:
            self._eof()
            return False
        decoder = self._decoder
        payload = decoder.feed(data)
        if decoder.end is not None or decoder.fault is not None:
            self._last = payload + self.take(b"")  # which notes the fault
            return False
        return self._outlet.piece(payload, now) if payload else True

    # -- into a flow ---------------------------------------------------------------------------------------------------

    async def into(self, sender: FlowSender, data: bytes) -> None:
        """Put `data`, then what arrives, to the body's end, and end the flow with it. A checkpoint.

        A flow whose receiver has closed ends it as well: whoever closed it has noted why.
        """
        stream = self._stream
        direct = stream if can_hand_over(stream) else None
        try:
            while not await self._put(sender, self.take(data)):
                while direct is not None and sender.room:
                    if await self._hand_over(direct, sender):
                        return
                # The flow is full (or the stream cannot hand over): one more piece in this hand, then wait for room.
                data = bytes(await stream.receive_some(self._piece_bytes))
                self._turns.moved = trio.current_time()
                if not data:
                    self._eof()
                    if self._decoder.end is not None:
                        sender.end(self._decoder.end)
                    return
        except _PEER_TROUBLE as exc:
            self._fail(Kind.RESET, str(exc))

    async def _put(self, sender: FlowSender, payload: bytes) -> bool:
        """Put `payload`, waiting for room, and the ending if this was it. True: there is nothing more to put."""
        end = self._decoder.end
        try:
            if payload:
                if end is not None and len(payload) <= sender.room:
                    sender.put_last(payload, end)
                    return True
                turn, self._turns.turn = self._turns.turn, Turn.CLIENT
                await sender.put(payload)
                self._turns.begin(turn)
        except _PEER_TROUBLE:
            return True
        if end is not None:
            sender.end(end)
        return end is not None or self.failure is not None

    async def _hand_over(self, stream: HandoverStream, sender: FlowSender) -> bool:
        """Serve the flow in the poller's step. True: the body is over; False: the flow is full."""
        over = False

        def move() -> bool:
            nonlocal over
            room = sender.room
            if not room:
                return False
            try:
                data = stream.try_receive(room)
            except trio.BrokenResourceError as exc:
                self._fail(Kind.RESET, str(exc))
                return False
            if data is None:
                return True
            self._turns.moved = trio.current_time()
            if not data:
                self._eof()
                return False
            payload, end = self.take(data), self._decoder.end
            try:
                if end is not None:
                    sender.put_last(payload, end) if payload else sender.end(end)
                elif payload:
                    sender.put_nowait(payload)
            except trio.BrokenResourceError:
                over = True  # the driver takes no more
            return not (over or self.failure is not None or end is not None)

        try:
            stream.arm(move)
            await stream.wait_disarmed()
        except _PEER_TROUBLE as exc:
            self._fail(Kind.RESET, str(exc))
        end = self._decoder.end
        if end is not None:
            sender.end(end)  # of no effect unless the body ended with the connection
        return over or self.failure is not None or end is not None


def _no_chunk(_data: bytes) -> int:
    return 0
