"""The reader: the only task that reads a client's connection, and it lives as long as the connection.

It cuts the bytes into request heads and bodies, puts bodies into request flows (a full flow stops the reading: that is
the backpressure of uploads) and, once a request is complete, reads on only to see the client leave. A client's EOF or
reset reaches the exchange in the step that sees it; where the socket can tell a hang-up without being read, that holds
while bytes wait unread, too.

Requests that come whole are served in the poller's step (`_turn`) while this task sleeps; it is woken for everything
else.

Invariants: one exchange at a time; of a pipelined request at most one read is held where the hang-up can be watched,
and `pipelined_bytes` where it cannot. The head's deadline counts from its first byte and is never extended; the body's
deadlines run only while the client's bytes are awaited.
"""

from __future__ import annotations

import math
import select
from typing import Protocol, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.patience import Mode, Patience
from canal_trio.gateway.writer import BROKEN
from canal_trio.messages import End, RequestHead
from canal_trio.relay.flow import FlowSender
from canal_trio.relay.handover import HandoverStream, can_hand_over, handover_end
from canal_trio.relay.idle import Reaper
from canal_trio.relay.tls import TlsStream
from canal_trio.settings import Bounds, Deadlines
from canal_trio.wire.bodies import BodyDecoder
from canal_trio.wire.heads import RequestHeadReader

__all__ = ["ClientReader", "Owner"]


class Owner(Protocol):
    """For whom it is read: the connection. None of this is a checkpoint."""

    def admit(self, head: RequestHead, started: float) -> tuple[Exchange, BodyDecoder]:
        """The exchange of a head that started to arrive at the given time, with its body's decoder."""

    def hold(self, exchange: Exchange, content: bytes, end: End) -> bool:
        """Hold a body that is here as a whole. False: it is more than may be held."""

    def open_upload(self, exchange: Exchange) -> FlowSender:
        """A flow for a body that is not here as a whole."""

    def refuse(self, failure: Failure, started: float) -> Exchange:
        """The exchange of a head that cannot be one."""

    def begin(self, exchange: Exchange, *, ahead: bool) -> None:
        """`exchange` is to be worked on. `ahead`: it is here as a whole, and nothing has to be awaited."""

    def done(self) -> None:
        """There will be no more."""


@final
class ClientReader:
    """Reads one client connection for its `owner`. The next exchange is made only when the one before is finished."""

    __slots__ = (
        "_active", "_bounds", "_careful", "_decoder", "_direct", "_heads", "_held", "_owner", "_patience", "_reaper",
        "_socket", "_stopped", "_stream", "_upload", "superfluous"
    )  # fmt: skip

    def __init__(
        self,
        stream: trio.abc.Stream,
        owner: Owner,
        heads: RequestHeadReader,
        *,
        reaper: Reaper,
        bounds: Bounds,
        deadlines: Deadlines,
    ) -> None:
        self._stream = stream
        end = handover_end(stream)
        self._socket = end.transport_stream if isinstance(end, TlsStream) else end  # where a hang-up is seen
        self._direct = stream if can_hand_over(stream) else None
        self._owner = owner
        self._heads = heads
        self._reaper = reaper
        self._bounds = bounds
        self._patience = Patience(deadlines)
        self._active: Exchange | None = None
        self._held = b""  # read, not parsed yet
        self._careful: Exchange | None = None  # accepted in the poller's step, to be put by the task
        self._stopped = False
        self.superfluous = False  # when it was stopped the client had sent more than will be looked at

    async def run(self) -> None:
        """Read until the client leaves, breaks the rules or takes too long, or until cancelled."""
        watch = self._reaper.add(self._check, trio.current_time() + self._patience.period)
        try:
            while (exchange := await self._next()) is not None:
                refused = exchange.failure is not None  # asked now: the driver may have it fail for its own reasons
                self._owner.begin(exchange, ahead=False)
                if refused:
                    break
                del exchange
        finally:
            watch.cancel()
            self._owner.done()

    def stop(self) -> None:
        """Begin no other request, whatever was read already (RFC 9112 9.6)."""
        self._stopped = True
        self.superfluous = bool(self._held)

    def stop_if_idle(self) -> None:
        """Draining, or others need the room: no new request on this connection."""
        if self.idle_since() is not None:
            self._end()

    def _end(self) -> None:
        """Nothing more will come of this connection: its driver ends it, and this task with it."""
        self._stopped = True
        self._owner.done()

    def idle_since(self) -> float | None:
        """Since when nothing was asked for, if nothing is now."""
        active = self._active
        if self._patience.mode is not Mode.IDLE or (active is not None and not active.finished):
            return None
        return max(self._patience.since, active.finished_at if active is not None else 0.0)

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _check(self, now: float) -> float:
        due = self._patience.due(self.idle_since() if self._patience.mode is Mode.IDLE else None)
        if now < due:
            return min(due, now + self._patience.period)
        self._expire()
        return math.inf

    def _expire(self) -> None:
        if self._patience.mode is Mode.IDLE:
            self._end()
            return
        self._stopped = True
        phase = Phase.HEAD if self._patience.mode is Mode.HEAD else Phase.UPLOAD
        failure = Failure(Side.CLIENT, phase, Kind.TIMEOUT, f"The request {phase.value} stopped arriving.")
        if self._patience.mode is Mode.BODY and self._active is not None:
            self._active.fail(failure)
        else:
            self._active = None
            self._owner.begin(self._owner.refuse(failure, self._patience.since), ahead=False)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _next(self) -> Exchange | None:
        """The next request, its body still to come; None when there is none."""
        if self._active is not None and not await self._rest_of(self._active):
            return None
        if self._held and self._active is not None and not await self._pipelined(self._active, self._held):
            return None
        self._patience.enter(Mode.IDLE)
        data, self._held = self._held, b""
        while not self._stopped:
            if data:
                if self._patience.mode is Mode.IDLE:
                    self._patience.enter(Mode.HEAD)
                verdict = self._heads.feed(data)
                if isinstance(verdict, Failure):
                    return self._owner.refuse(verdict, self._patience.since)
                if isinstance(verdict, RequestHead):
                    return self._accept(verdict)
            if self._direct is not None and self._patience.mode is Mode.IDLE:
                # Requests that come whole are served in the poller's step, without this task being woken, until there
                # is one that needs more care, or bytes are left in `_held`.
                try:
                    self._direct.arm(self._turn)
                    await self._direct.wait_disarmed()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass  # `_receive` will meet it
                if self._careful is not None:
                    exchange, self._careful = self._careful, None
                    return exchange
            data, self._held = self._held, b""
            data = data or await self._receive()
            if data and self._active is not None and not self._active.finished:
                if not await self._pipelined(self._active, data):
                    return None
                data, self._held = self._held, b""
            if not data:
                cut = self._heads.close()
                return self._owner.refuse(cut, self._patience.since) if cut is not None else None
        return None

    def _turn(self) -> bool:
        direct = self._direct
        assert direct is not None
        data = direct.try_receive(self._bounds.piece_bytes)
        if data is None:
            return True
        active = self._active
        if not data or self._stopped or (active is not None and not active.finished):
            self._held = data
            return False
        if self._patience.mode is Mode.IDLE:
            self._patience.enter(Mode.HEAD)
        verdict = self._heads.feed(data)
        if verdict is None:
            return True  # a head that comes in drips must not wake a task for each of them
        if isinstance(verdict, Failure):
            self._held = data  # it is given again
            return False
        exchange = self._accept(verdict)
        if self._held or exchange.failure is not None or exchange.upgrade is not None or not exchange.received:
            self._careful = exchange
            return False
        self._patience.mode = Mode.IDLE  # since when, is for the end of this exchange to say
        self._owner.begin(exchange, ahead=True)
        return True

    def _accept(self, head: RequestHead) -> Exchange:
        exchange, decoder = self._owner.admit(head, self._patience.since)
        self._active = exchange
        self._held = self._heads.rest()
        self._patience.begin_body()
        self._begin_body(exchange, decoder)
        if self._socket is not None and exchange.failure is None:
            self._socket.watch(self._hung_up)
            if self._socket.hangup:
                self._hung_up()
        self._patience.mode = Mode.WAIT  # in the step that began the head: no need to look at the clock again
        return exchange

    def _hung_up(self) -> None:
        """The poller's step: the client has ended its side, or broke the connection, which a tunnel must tell apart."""
        if self._socket is None or self._active is None:
            return
        self._active.hangup_seen()
        if _is_broken(self._socket):
            self._active.leave(BROKEN)
        elif not self._active.left:
            self._socket.watch(self._hung_up)  # what follows an end can only be worse

    async def _receive(self) -> bytes:
        """The next bytes; `b""` when the client's side has ended, of which the exchange knows by then."""
        try:
            data = await self._stream.receive_some(self._bounds.piece_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if self._active is not None:
                self._active.leave(BROKEN)
            return b""
        if not data and self._active is not None:
            self._active.client_eof()
            if self._socket is not None:
                self._socket.watch(self._reset_after_eof)
        return bytes(data)

    def _reset_after_eof(self) -> None:
        if self._active is not None:
            self._active.leave(BROKEN)

    async def _pipelined(self, active: Exchange, data: bytes) -> bool:
        """Hold `data` until the response before it is done. False: nothing more is to be read."""
        self._held = data
        self._patience.enter(Mode.WAIT)
        return await self._hold_until(active.end(), active)

    async def _hold_until(self, event: trio.Event, active: Exchange) -> bool:
        """Wait for `event`, seeing the client leave meanwhile. False: nothing more is to be read."""
        if self._socket is None:
            return await self._read_ahead(event, active)
        await event.wait()
        self._patience.enter(Mode.IDLE)
        return True

    async def _read_ahead(self, event: trio.Event, active: Exchange) -> bool:
        """No hang-up can be watched here: read on, within a bound, to see the end."""
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                while data := await self._receive():
                    self._held += data
                    if len(self._held) > self._bounds.pipelined_bytes:
                        active.leave("The client pipelined more than is read ahead.")
                        return

            nursery.start_soon(read)
            await event.wait()
            nursery.cancel_scope.cancel(reason="no longer awaited")
        self._patience.enter(Mode.IDLE)
        return not active.left

    # -- the body ------------------------------------------------------------------------------------------------------

    def _begin_body(self, exchange: Exchange, decoder: BodyDecoder) -> None:
        """Pass on what came with the head before anybody looks at the exchange: a small body is here as a whole.

        So it leaves with the head in one write, and a refusal knows that the connection can go on.
        """
        if exchange.failure is not None or (exchange.received and exchange.upgrade is None):
            return
        held, payload = self._held, b""
        if exchange.upgrade is None and held and len(held) <= self._bounds.piece_bytes:
            payload, self._held = decoder.feed(held), b""
            exchange.request_bytes += len(payload)
            if self._objection(exchange, decoder) is not None:
                payload = b""  # raised in its turn, by `_body`
            elif decoder.end is not None and self._owner.hold(exchange, payload, decoder.end):
                exchange.uploaded()
                self._held = decoder.rest
                return
        self._decoder, self._upload = decoder, self._owner.open_upload(exchange)
        self._upload.put_nowait(payload)

    async def _rest_of(self, exchange: Exchange) -> bool:
        """Read the request's body to its end. False: the connection cannot carry another request."""
        if exchange.upgraded is not None:
            if not await self._hold_until(exchange.upgraded, exchange):
                return False
            if exchange.tunnel:
                await self._tunnel(exchange)
                return False
        if exchange.received:
            return True
        return await self._body(exchange)

    async def _body(self, exchange: Exchange) -> bool:
        decoder, upload = self._decoder, self._upload
        data, self._held = self._held, b""
        while True:
            payload = decoder.feed(data)
            exchange.request_bytes += len(payload)
            failure = self._objection(exchange, decoder)
            if failure is not None:
                upload.abort(failure)
                exchange.fail(failure)
                return False
            if not await self._put(upload, payload):
                return False
            if decoder.end is not None:
                exchange.uploaded()
                upload.end(decoder.end)
                self._held = decoder.rest
                del self._decoder, self._upload  # the answer may go on for long
                return True
            data = self._at_hand(upload) or await self._awaited()
            self._patience.body_bytes += len(data)
            if not data or self._stopped:  # it came too late
                upload.abort(exchange.failure)
                return False

    def _at_hand(self, upload: FlowSender) -> bytes | None:
        """What of a body is here already, for as long as the flow takes it: one wake for several pieces."""
        if self._direct is None or not upload.room:
            return None
        try:
            return self._direct.try_receive(self._bounds.piece_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return None  # `_receive` will meet it

    async def _awaited(self) -> bytes:
        """The next bytes of a body, whose deadlines run while they are awaited."""
        self._patience.enter(Mode.BODY)
        started = self._patience.since
        data = await self._receive()
        self._patience.enter(Mode.WAIT)
        self._patience.waited(started)
        return data

    def _objection(self, exchange: Exchange, decoder: BodyDecoder) -> Failure | None:
        if decoder.fault is not None:
            return Failure(Side.CLIENT, Phase.UPLOAD, Kind.MALFORMED, decoder.fault)
        if exchange.request_bytes > self._bounds.body_bytes:
            detail = f"The limit is {self._bounds.body_bytes:.0f} bytes."
            return Failure(Side.CLIENT, Phase.UPLOAD, Kind.BODY_TOO_LARGE, detail)
        return None

    async def _put(self, upload: FlowSender, payload: bytes) -> bool:
        try:
            if len(payload) <= upload.room:
                upload.put_nowait(payload)
            else:
                await upload.put(payload)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False  # the exchange is over and wants no more of its body
        return True

    async def _tunnel(self, exchange: Exchange) -> None:
        """After 101: raw bytes, half-close included."""
        data, self._held = self._held, b""
        exchange.request_bytes += len(data)
        while True:
            if data and not await self._put(self._upload, data):
                return
            try:
                data = bytes(await self._stream.receive_some(self._bounds.piece_bytes))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                exchange.leave(BROKEN)
                self._upload.abort()
                return
            exchange.request_bytes += len(data)
            if not data:
                self._upload.end()
                return


def _is_broken(end: HandoverStream) -> bool:
    """Was the connection reset, as far as the kernel tells without being read?"""
    sock = getattr(end, "socket", None)
    if sock is None:
        return bool(getattr(end, "broken", False))  # a simulated stream says so itself
    poll = select.poll()
    poll.register(sock, 0)  # errors are always reported
    return any(mask & select.POLLERR for _, mask in poll.poll(0))
