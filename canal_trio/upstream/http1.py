"""One exchange over HTTP/1.1 on one upstream connection: the hot path's upstream half.

The request head leaves with whatever of the body is ready in one write; a body that still arrives is sent by a task of
its own, so that an answer which comes early (a 413 while the client still uploads) is seen at once. The response body
goes straight from the socket through the decoder into the flow, in the poller's step, for as long as the flow takes it
(hand-over on the spot); otherwise this task reads piece by piece and the full flow stops it.

Invariants: nothing after the end of the response is ever taken for a part of it, and a connection that shows such bytes
is not reused. A body that the framing does not prove complete aborts the flow. The deadline that runs is that of the
side whose turn it is (`_Turn`): while the client is slow, the upstream has no deadline.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Callable
from typing import final

import trio
from trio.abc import HalfCloseableStream, Stream

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.messages import End, RequestHead, ResponseHead
from canal_trio.relay.flow import Aborted, FlowSender
from canal_trio.relay.handover import HandoverStream, can_hand_over
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Bounds, Deadlines
from canal_trio.upstream.idle import is_quiet, watch_hangup
from canal_trio.upstream.interface import Answer, BodySource
from canal_trio.wire.bodies import BodyDecoder, encode_chunk, encode_last_chunk, response_decoder
from canal_trio.wire.headers import keep_alive
from canal_trio.wire.heads import ResponseHeadReader, write_request_head

__all__ = ["Http1Connection"]

_PEER_TROUBLE = (trio.BrokenResourceError, trio.ClosedResourceError)
_SLICE = 16 * 1024  # bytes per send where progress within one cannot be seen


class _Turn(enum.Enum):
    """Whose turn it is, so whose deadline runs."""

    CLIENT = enum.auto()  # the request body is awaited, or the flow is full: nothing runs here
    SEND = enum.auto()  # the upstream's kernel does not take the request
    ANSWER = enum.auto()  # waiting for the response head
    BODY = enum.auto()  # waiting for response bytes
    TUNNEL = enum.auto()


@final
class Http1Connection:
    """A connection to one upstream. `stream` is ours to close; `raw` is its socket end, for a close in one step."""

    def __init__(
        self, stream: Stream, raw: HandoverStream, *, reaper: Reaper, bounds: Bounds, deadlines: Deadlines
    ) -> None:
        self._stream = stream
        self._raw = raw
        self._reaper = reaper
        self._bounds = bounds
        self._deadlines = deadlines
        self._used = False
        self._reset()

    def _reset(self) -> None:
        self.reusable = False
        self._turn = _Turn.SEND
        self._moved = trio.current_time()
        self._answered = False  # a byte of the response has arrived
        self._sent = False  # the request left whole
        self._relaying = False  # the final head was passed on
        self._failure: Failure | None = None
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Http1Connection {self._stream!r}, {self._turn.name.lower()}>"

    def usable(self) -> bool:
        """Nothing has arrived and the peer has not hung up since the last exchange. One system call."""
        return is_quiet(self._raw)

    def watch_idle(self, died: Callable[[], None] | None) -> None:
        """See `canal_trio.upstream.interface.Connection`."""
        watch_hangup(self._raw, died)

    def abort(self) -> None:
        """Close the socket in this very step. Idempotent."""
        self._raw.disarm()
        self._raw.close()

    async def run(self, head: RequestHead, body: BodySource | None, answer: Answer) -> Failure | None:
        """One attempt; see `canal_trio.upstream.interface.Connection`."""
        self._reset()
        with self._scope:
            watch = self._reaper.add(self._check, trio.current_time() + self._period())
            try:
                await self._exchange(head, body, answer)
            finally:
                watch.cancel()
        if self._failure is not None:
            answer.body.abort(self._failure)
            self.reusable = False
        self._used = True
        return self._failure

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _limit(self) -> float:
        limits = {
            _Turn.CLIENT: math.inf,
            _Turn.SEND: self._deadlines.upstream_idle,
            _Turn.ANSWER: self._deadlines.first_byte,
            _Turn.BODY: self._deadlines.upstream_idle,
            _Turn.TUNNEL: self._deadlines.tunnel_idle,
        }
        return limits[self._turn]

    def _period(self) -> float:
        """How often to look: no deadline is shorter, so none is ever seen late."""
        deadlines = self._deadlines
        return min(deadlines.upstream_idle, deadlines.first_byte, deadlines.tunnel_idle)

    def _check(self, now: float) -> float:
        due = self._moved + self._limit()
        if now < due:
            return min(due, now + self._period())
        turn = self._turn
        if turn is _Turn.TUNNEL:
            detail = f"No byte moved in either direction for {self._limit():g} s."
            failure = Failure(Side.GATEWAY, Phase.STREAM, Kind.TIMEOUT, detail)  # a silence has no author
        elif turn is _Turn.ANSWER:
            detail = f"No response within {self._deadlines.first_byte:g} s."
            failure = Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.TIMEOUT, detail, Retry.SENT)
        else:
            phase = Phase.SEND if turn is _Turn.SEND else Phase.STREAM
            detail = f"No byte moved for {self._limit():g} s."
            failure = Failure(Side.UPSTREAM, phase, Kind.STALLED, detail, Retry.SENT)
        self._note(failure)
        self._scope.cancel(reason=failure.detail)
        return math.inf

    def _pass_turn(self, turn: _Turn) -> None:
        self._turn = turn
        self._moved = trio.current_time()

    def _note(self, failure: Failure) -> None:
        if self._failure is None:
            self._failure = failure

    def _broken(self, detail: str) -> Failure:
        """What the end of the connection means, by how far the response had come."""
        if self._relaying:
            return Failure(Side.UPSTREAM, Phase.STREAM, Kind.RESET, detail)
        if self._answered:
            return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT, "The response head is incomplete.")
        if self._used:
            return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.STALE, detail, Retry.FRESH)
        return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT, detail, Retry.SENT)

    # -- the exchange --------------------------------------------------------------------------------------------------

    async def _exchange(self, head: RequestHead, body: BodySource | None, answer: Answer) -> None:
        upgrading = b"upgrade" in head.headers
        chunked = b"transfer-encoding" in head.headers
        first = [write_request_head(head)]
        if body is not None and not upgrading:
            first += _frame(body.take_nowait(), chunked)
            if body.ending is not None:
                first += self._last(body, chunked)
        # It may have answered before it stopped reading (RFC 9112 9.5): what we receive decides.
        with contextlib.suppress(*_PEER_TROUBLE):
            await self._send(first)
        if body is None or upgrading or body.ending is not None:
            self._sent = True
            self._pass_turn(_Turn.ANSWER)
            await self._receive(head, body, answer)
            return
        self._pass_turn(_Turn.CLIENT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._upload, body, chunked)
            await self._receive(head, body, answer)
            nursery.cancel_scope.cancel(reason="the upstream has answered")

    async def _upload(self, body: BodySource, chunked: bool) -> None:
        try:
            while not _over(body):
                self._upload_turn(_Turn.CLIENT)
                framed = _frame(await body.take(), chunked)
                if _over(body):
                    framed += self._last(body, chunked)
                self._upload_turn(_Turn.SEND)
                await self._send(framed)
        except _PEER_TROUBLE:
            pass  # as above
        else:
            self._sent = True
        if not self._relaying:
            self._pass_turn(_Turn.ANSWER)

    def _upload_turn(self, turn: _Turn) -> None:
        if not self._relaying:  # once the answer flows, its own deadlines count
            self._pass_turn(turn)

    def _last(self, body: BodySource, chunked: bool) -> list[bytes]:
        """What ends the request. A body that was cut must never look complete: the connection goes instead."""
        ending = body.ending
        if isinstance(ending, Aborted):
            cause = ending.failure
            self._note(cause if isinstance(cause, Failure) else Failure(Side.CLIENT, Phase.UPLOAD, Kind.CUT))
            self.abort()
            return []
        trailer = getattr(ending, "trailer", None)
        if not chunked:
            return []
        return [encode_last_chunk(trailer.trailers) if isinstance(trailer, End) else encode_last_chunk()]

    async def _send(self, pieces: list[bytes]) -> None:
        """Pass `pieces` to the upstream's kernel, noting each progress: a body that was held can take minutes."""
        stream = self._stream
        if can_hand_over(stream):
            rest = stream.try_send_batch(pieces)
            self._moved = trio.current_time()
            while rest:
                await stream.wait_send_all_might_not_block()
                rest = stream.try_send_batch(rest)
                self._moved = trio.current_time()
            await trio.lowlevel.checkpoint()
            return
        data = b"".join(pieces)
        for start in range(0, len(data), _SLICE):
            await stream.send_all(data[start : start + _SLICE])
            self._moved = trio.current_time()

    async def _receive(self, request: RequestHead, body: BodySource | None, answer: Answer) -> None:
        try:
            await self._response(request, body, answer)
        except _PEER_TROUBLE as exc:
            self._note(self._broken(str(exc)))

    async def _response(self, request: RequestHead, body: BodySource | None, answer: Answer) -> None:
        reader = ResponseHeadReader(head_bytes=self._bounds.head_bytes, head_fields=self._bounds.head_fields)
        head = await self._final_head(reader, request, answer)
        if head is None:
            return
        if head.status == 101:
            await self._tunnel(reader.rest(), head, body, answer)
            return
        decoder = response_decoder(head, request.method)
        if isinstance(decoder, Failure):
            self._note(decoder)
            return
        await answer.head(head)
        self._relaying = True
        self._pass_turn(_Turn.BODY)
        await self._body(decoder, reader.rest(), answer.body)
        if decoder.end is not None:
            self.reusable = self._sent and not decoder.rest and keep_alive(head.version, head.headers)

    async def _final_head(
        self, reader: ResponseHeadReader, request: RequestHead, answer: Answer
    ) -> ResponseHead | None:
        """Read heads, passing the informational ones on, up to the final one; None with a failure noted."""
        informational = 0
        data = b""
        while True:
            verdict = reader.feed(data)
            if isinstance(verdict, Failure):
                self._note(verdict)
                return None
            if verdict is None:
                data = bytes(await self._stream.receive_some(self._bounds.piece_bytes))
                if not data:
                    self._note(self._broken("The connection was closed before a response."))
                    return None
                self._answered = True
                if self._turn is _Turn.ANSWER:
                    self._moved = trio.current_time()
                continue
            if verdict.status == 101 and b"upgrade" not in request.headers:
                self._note(Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED, "It switched protocols unasked."))
                return None
            if not verdict.informational or verdict.status == 101:
                return verdict
            informational += 1
            if informational > self._bounds.informational_heads:
                self._note(Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED, "Too many informational heads."))
                return None
            await answer.head(verdict)
            data = reader.rest()

    # -- the response body ---------------------------------------------------------------------------------------------

    async def _body(self, decoder: BodyDecoder, data: bytes, sender: FlowSender) -> None:
        handover = self._stream if can_hand_over(self._stream) else None
        while not await self._finished(decoder, decoder.feed(data), sender):
            while handover is not None and sender.room:
                if await self._hand_over(handover, decoder, sender):
                    return
            # The flow is full (or the stream cannot hand over): one more piece in this hand, then wait for room.
            data = bytes(await self._stream.receive_some(self._bounds.piece_bytes))
            self._moved = trio.current_time()
            if not data:
                self._eof(decoder, sender)
                return

    async def _finished(self, decoder: BodyDecoder, payload: bytes, sender: FlowSender) -> bool:
        """Put `payload`, waiting for room, and the ending if this was it."""
        try:
            if payload:
                if decoder.end is not None and len(payload) <= sender.room:
                    sender.put_last(payload, decoder.end)
                    return True
                turn, self._turn = self._turn, _Turn.CLIENT
                await sender.put(payload)
                self._pass_turn(turn)
        except _PEER_TROUBLE:
            return True  # the driver takes no more; it has noted why
        if decoder.end is not None:
            sender.end(decoder.end)
            return True
        return self._faulty(decoder)

    def _faulty(self, decoder: BodyDecoder) -> bool:
        if decoder.fault is None:
            return False
        self._note(Failure(Side.UPSTREAM, Phase.STREAM, Kind.MALFORMED, decoder.fault))
        return True

    def _eof(self, decoder: BodyDecoder, sender: FlowSender) -> None:
        decoder.close()
        if decoder.end is not None:
            sender.end(decoder.end)
        else:
            self._note(Failure(Side.UPSTREAM, Phase.STREAM, Kind.CUT, "The response body is incomplete."))

    async def _hand_over(self, stream: HandoverStream, decoder: BodyDecoder, sender: FlowSender) -> bool:
        """Serve the body in the poller's step. True: the body is over; False: the flow is full."""
        over = False

        def sink() -> bool:
            nonlocal over
            room = sender.room
            if not room:
                return False
            try:
                data = stream.try_receive(room)
                if data is None:
                    return True
                self._moved = trio.current_time()
                if not data:
                    over = True
                    self._eof(decoder, sender)
                    return False
                payload = decoder.feed(data)
                if decoder.end is not None:
                    over = True
                    sender.put_last(payload, decoder.end) if payload else sender.end(decoder.end)
                    return False
                if payload:
                    sender.put_nowait(payload)
            except trio.BrokenResourceError as exc:
                # Either the upstream reset the connection, or the driver closed the flow and has noted why.
                over = True
                self._note(Failure(Side.UPSTREAM, Phase.STREAM, Kind.RESET, str(exc)))
                return False
            over = self._faulty(decoder)
            return not over

        stream.arm(sink)
        await stream.wait_disarmed()
        return over

    # -- after 101 -----------------------------------------------------------------------------------------------------

    async def _tunnel(self, early: bytes, head: ResponseHead, body: BodySource | None, answer: Answer) -> None:
        """Raw bytes both ways until both directions have ended; each flow's bound is its backpressure."""
        await answer.head(head)
        self._pass_turn(_Turn.TUNNEL)
        async with trio.open_nursery() as nursery:
            if body is not None:
                nursery.start_soon(self._tunnel_up, body)
            await self._tunnel_down(early, answer.body)
            if self._failure is not None:  # else the client's direction goes on to its own end
                nursery.cancel_scope.cancel(reason="the tunnel broke")

    async def _tunnel_down(self, data: bytes, sender: FlowSender) -> None:
        try:
            if data:
                await sender.put(data)
            while data := bytes(await self._stream.receive_some(self._bounds.piece_bytes)):
                self._moved = trio.current_time()
                await sender.put(data)
                self._moved = trio.current_time()
            sender.end(End())
        except _PEER_TROUBLE as exc:
            self._note(Failure(Side.UPSTREAM, Phase.STREAM, Kind.RESET, str(exc)))
            self.abort()

    async def _tunnel_up(self, body: BodySource) -> None:
        try:
            while body.ending is None:
                await self._send(await body.take())
            if isinstance(body.ending, Aborted):
                self.abort()
            elif isinstance(self._stream, HalfCloseableStream):
                await self._stream.send_eof()
            else:
                self._note(Failure(Side.CLIENT, Phase.STREAM, Kind.GONE, "The client ended its side of the tunnel."))
                self.abort()  # there is no other way to pass that on
        except _PEER_TROUBLE as exc:
            self._note(Failure(Side.UPSTREAM, Phase.STREAM, Kind.RESET, str(exc)))
            self.abort()


def _over(body: BodySource) -> bool:
    return body.ending is not None


def _frame(pieces: list[bytes], chunked: bool) -> list[bytes]:
    return [encode_chunk(piece) for piece in pieces] if chunked else pieces
