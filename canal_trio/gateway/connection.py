"""One client connection: the driver, its reader, and the boundary that no exception passes.

The driver is the only writer. It takes one exchange after the other from the reader, runs its pipeline inside the
exchange's scope, writes what remains to be said outside of it, and leaves exactly one record. Invariant: whatever
happens in here, the stream is closed at the end and no other connection notices.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import socket
import struct
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, final

import trio
from outcome import Error, Value
from trio.abc import HalfCloseableStream, Stream

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.body import HeldBody, WholeBody
from canal_trio.gateway.deliver import Delivery
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.handoff import Handoff, Work
from canal_trio.gateway.pipeline import Pipeline
from canal_trio.gateway.reader import ClientReader
from canal_trio.gateway.remembered import Remembered
from canal_trio.gateway.respond import error_response, own_answer
from canal_trio.gateway.writer import ClientWriter
from canal_trio.messages import End, RequestHead
from canal_trio.relay.course import Course
from canal_trio.relay.flow import FlowSender, open_flow
from canal_trio.relay.handover import can_hand_over, handover_end
from canal_trio.relay.streams import TcpStream
from canal_trio.wire.bodies import BodyDecoder, NoBody, framed_decoder
from canal_trio.wire.headers import client_address

if TYPE_CHECKING:
    from canal_trio.gateway.core import Gateway

__all__ = ["ClientConnection"]

_log = logging.getLogger("canal_trio.gateway")

_NOBODY_THERE = (Kind.GONE, Kind.STALLED)
_READER = "canal_trio.gateway.reader.ClientReader.run"  # Trio would make such a text for each task
_LINGER_BYTES = 1024 * 1024  # read and dropped at most before closing on unread input


@final
class ClientConnection:
    """Serves one client until it leaves, misbehaves, or asks for the end. `gateway` owns what connections share."""

    __slots__ = (
        "_bounds", "_broken_off", "_certificate", "_clean", "_context", "_gateway", "_handoff", "_peer", "_reader",
        "_remembered", "_reset", "_stream", "_unread", "_writer", "current"
    )  # fmt: skip

    def __init__(
        self, gateway: Gateway, stream: Stream, *, peer: str, scheme: str, certificate: str | None = None
    ) -> None:
        self._gateway = gateway
        self._stream = stream
        self._peer = peer
        self._certificate = certificate
        self._handoff = Handoff()
        self._context = contextvars.copy_context()
        self._writer = ClientWriter(stream, stall=gateway.settings.deadlines.client_write)
        self._bounds = gateway.settings.bounds  # of its reads; a reload is for the connections after it
        self._remembered = Remembered(self._bounds, peer=peer, scheme=scheme)
        self._reader: ClientReader | None = None
        self._reset = False  # close so that the client sees an error
        self._unread = False  # the client may still be sending
        self._broken_off = False  # the last answer is not whole
        self._clean = False  # every answer was, and the connection is
        self.current: Exchange | None = None

    async def run(self) -> None:
        """Serve, then close the stream. Raises nothing but `Cancelled`."""
        self._gateway.connections.add(self)
        try:
            self._reader = reader = self._new_reader()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.run, name=_READER)
                await self._exchanges()
                nursery.cancel_scope.cancel(reason="the connection is over")
            self._clean = not self._broken_off and self._writer.trouble is None
            if (self._unread or reader.superfluous) and self._clean:
                await self._linger()
        except* Exception as group:
            self._gateway.bug(group, self.current)
        finally:
            self._reader = None  # it knows us: left so, both would wait for the garbage collector, which seldom looks
            if self.current is not None and not self.current.finished:  # admitted, its turn never came
                self.current.note(_stopped(self.current))
                self._finish(self.current)
            try:
                await self._close()
            finally:
                self._gateway.connections.discard(self)

    async def _close(self) -> None:
        if self._reset or self._writer.trouble is Kind.STALLED:
            _reset_on_close(self._stream)
        elif self._clean and not isinstance(self._stream, TcpStream):
            # TLS has something to say at the end, and a body that ends there needs it.
            with trio.move_on_after(self._gateway.settings.deadlines.linger, shield=True):
                await self._stream.aclose()
        end = handover_end(self._stream)
        if end is not None:
            end.close()  # without a word: what was cut must look cut inside of TLS, too
        if not can_hand_over(self._stream):
            await trio.aclose_forcefully(self._stream)

    def drain(self) -> None:
        """Take no new request. An answer that has not begun says that the connection ends with it."""
        self._writer.closing = True
        if self._reader is not None:
            self._reader.stop_if_idle()

    def idle_since(self) -> float | None:
        """Since when the client has asked for nothing; None while it is served."""
        return None if self._reader is None else self._reader.idle_since()

    def _new_reader(self) -> ClientReader:
        settings = self._gateway.settings
        deadlines = settings.deadlines
        if self._gateway.draining:  # it came late; if it says nothing it must not hold up the end
            deadlines = replace(deadlines, keep_alive=min(deadlines.keep_alive, deadlines.linger))
        return ClientReader(
            self._stream,
            self,
            self._remembered.heads,
            reaper=self._gateway.reaper,
            bounds=self._bounds,
            deadlines=deadlines,
        )

    async def _exchanges(self) -> None:
        while True:
            work = await self._handoff.take()
            if work is None:
                return
            exchange, again = work.exchange, False
            try:
                again = await self._exchange(work) and not self._gateway.draining
                if not again:
                    return
            except Exception as exc:
                self._bug(exchange, exc)
                raise
            except BaseException:  # the whole connection was cancelled: the gateway stops now (nurseries make a group)
                exchange.note(_stopped(exchange))
                self._break(exchange)
                raise
            finally:
                if not again and self._reader is not None:
                    self._reader.stop()
                self._finish(exchange)

    # -- the reader's questions ----------------------------------------------------------------------------------------

    def admit(self, head: RequestHead, started: float) -> tuple[Exchange, BodyDecoder]:
        """See `reader.Owner`; so for those that follow. The exchange is registered from here on."""
        gateway = self._gateway
        bounds = gateway.settings.bounds
        client = client_address(head.headers, self._peer, gateway.trusts) if gateway.trusts_any else self._peer
        exchange = Exchange(head, client=client, started=started, certificate=self._certificate, clock=gateway.clock)
        if gateway.settings.deadlines.exchange != math.inf:
            exchange.in_scope().deadline = trio.current_time() + gateway.settings.deadlines.exchange
        self.current = exchange
        gateway.begin(exchange)
        facts = exchange.facts
        assert facts is not None
        framing, length = facts.framing, facts.length
        decoder: BodyDecoder = NoBody() if isinstance(framing, Failure) else framed_decoder(framing)
        if isinstance(framing, Failure):
            exchange.note(framing)
        elif isinstance(length, int) and length > bounds.body_bytes:
            detail = f"The limit is {bounds.body_bytes:.0f} bytes."
            exchange.note(Failure(Side.CLIENT, Phase.HEAD, Kind.BODY_TOO_LARGE, detail))
        if decoder.end is not None and exchange.upgrade is None:
            exchange.received = exchange.failure is None
        else:
            exchange.received = exchange.upgrade is not None
        return exchange, decoder

    def hold(self, exchange: Exchange, content: bytes, end: End) -> bool:
        """Hold a body that is here as a whole. False: it is more than may be held."""
        budget = self._gateway.places.budget
        if len(content) > self._gateway.settings.bounds.held_body_bytes or not budget.take(len(content)):
            return False
        exchange.body = WholeBody(content, end, budget)
        return True

    def open_upload(self, exchange: Exchange) -> FlowSender:
        """A flow for a body that is not here as a whole."""
        places, bounds = self._gateway.places, self._bounds
        sender, receiver = open_flow(
            bounds.capacity, piece_bytes=bounds.piece_bytes, handover_bytes=bounds.handover_bytes, meter=places.meter
        )
        exchange.body = HeldBody(receiver, places.budget, bounds.held_body_bytes)
        return sender

    def refuse(self, failure: Failure, started: float) -> Exchange:
        """The exchange of a head that cannot be one."""
        exchange = Exchange(None, client=self._peer, started=started, certificate=self._certificate)
        exchange.note(failure)
        exchange.received = False
        self.current = exchange
        self._gateway.begin(exchange)
        return exchange

    # -- one exchange --------------------------------------------------------------------------------------------------

    def _work(self, exchange: Exchange) -> Work:
        """How `exchange` is to be worked on."""
        gateway, head = self._gateway, exchange.head
        generation = gateway.generation
        places = gateway.places
        memory = self._remembered
        delivery = Delivery(exchange, self._writer, generation.settings, gateway.reaper, memory, places.meter)
        if gateway.draining:
            exchange.note(Failure(Side.GATEWAY, Phase.ROUTE, Kind.DRAINING))
        if head is None or exchange.failure is not None:
            return Work(exchange, delivery, None, keep=False)
        assert exchange.facts is not None
        keep = exchange.facts.keep_alive and not gateway.draining
        own = own_answer(head, request_id=exchange.id, close=not keep)
        if own is not None:
            exchange.status = own[0]
            return Work(exchange, delivery, None, keep=keep, own=own[1])
        trusted = gateway.trusts_any and gateway.trusts(self._peer)
        pipeline = Pipeline(exchange, generation, places, self._writer, delivery, memory.requests, trusted=trusted)
        pipeline.close = not keep
        return Work(exchange, delivery, pipeline, keep=keep)

    def begin(self, exchange: Exchange, *, ahead: bool) -> None:
        """See `reader.Owner`. `ahead`: it begins in this very step, before its driver wakes.

        It goes on in steps until it needs a task, and if it needs none, the driver sleeps through it.
        """
        try:
            work = self._work(exchange)
        except Exception as exc:
            self._bug(exchange, exc)
            raise
        pipeline = work.pipeline
        if not ahead or pipeline is None or exchange.scope is not None or self._writer.direct is None:
            self._handoff.put(work)
            return
        work.course = course = Course(pipeline.run(), partial(self._called, work), self._context)
        self._handoff.ahead, exchange.summon = course, course.summon
        if course.begin():
            self._called(work)

    def done(self) -> None:
        """See `reader.Owner`."""
        self._handoff.close()

    def _called(self, work: Work) -> None:
        """An exchange that ran ahead needs a task, or has ended: if so and all is well, the driver need not know."""
        exchange, course = work.exchange, work.course
        assert course is not None
        self._handoff.ahead = exchange.summon = None
        try:
            if self._is_whole(work) and not self._gateway.draining:
                work.delivery.forget()
                self._finish(exchange)
                return
        except Exception as exc:  # the step is another one's: raised by the driver
            course.result = Error(exc)
        self._handoff.put(work)

    def _is_whole(self, work: Work) -> bool:
        """It ended without a task, its answer was delivered, and the connection can go on."""
        assert work.course is not None
        result, exchange, delivery = work.course.result, work.exchange, work.delivery
        return (
            isinstance(result, Value)
            and result.value is None
            and exchange.failure is None
            and not exchange.left
            and delivery.complete
            and work.keep
            and not delivery.close
            and exchange.received
        )

    async def _exchange(self, work: Work) -> bool:
        """Run it to its end. True: the connection can carry another request."""
        exchange, delivery, keep = work.exchange, work.delivery, work.keep
        if work.own is not None:
            return await self._writer.write([work.own], exchange.has_answer) and keep and exchange.received
        if work.pipeline is None:
            return await self._conclude(exchange, delivery, keep=False)
        try:
            scope = exchange.in_scope()
            try:
                with scope:
                    failure = await work.run()
                    if failure is not None:
                        exchange.note(failure)
            except Exception as exc:
                keep = False
                exchange.note(Failure(Side.GATEWAY, exchange.phase, Kind.INTERNAL))
                self._gateway.bug(ExceptionGroup("in the pipeline", [exc]), exchange)
            if scope.cancelled_caught and exchange.failure is None and not exchange.left:
                exchange.note(Failure(Side.GATEWAY, exchange.phase, Kind.TIMEOUT, "Its own deadline has passed."))
            return await self._conclude(exchange, delivery, keep=keep and not delivery.close)
        finally:
            delivery.forget()

    async def _conclude(self, exchange: Exchange, delivery: Delivery, *, keep: bool) -> bool:
        """Say what remains to be said, outside of the exchange's scope. True: the connection can go on."""
        failure = exchange.failure
        if exchange.left or (failure is not None and failure.side is Side.CLIENT and failure.kind in _NOBODY_THERE):
            self._reset = failure is not None and failure.kind is Kind.STALLED
            self._broken_off = True  # nothing is left to be said
            return False
        # A reset in place of that close, which what the client sends after it would bring about, takes the end away.
        self._unread = not exchange.received or _may_end_by_close(exchange)
        if failure is None:
            if delivery.begun and not delivery.complete:  # cut after its last event
                self._break(exchange)
            return keep and delivery.complete and exchange.received
        if delivery.begun:
            await delivery.broken_off(failure)
            self._break(exchange)
            return False
        keep = keep and exchange.received and exchange.head is not None and not self._writer.closing
        status, response = error_response(
            failure, request_id=exchange.id, head=exchange.head, close=not keep, more=exchange.fields
        )
        exchange.status = status

        return await self._writer.write([response], exchange.has_answer) and keep

    def _break(self, exchange: Exchange) -> None:
        """Close so that the body looks broken: enough for a framed one, a close-delimited one needs a reset."""
        if exchange.answered:
            return
        self._broken_off = True
        if _may_end_by_close(exchange):
            self._reset = True

    def _bug(self, exchange: Exchange, exc: Exception) -> None:
        exchange.note(Failure(Side.GATEWAY, exchange.phase, Kind.INTERNAL, type(exc).__name__))
        self._break(exchange)

    def _finish(self, exchange: Exchange) -> None:
        if exchange.body is not None:
            exchange.body.close()
        if exchange.upgraded is not None:
            exchange.upgraded.set()
        self._gateway.end(exchange)
        placed, exchange.placed = exchange.placed, None
        if placed is not None:
            self._gateway.places.give(exchange.finished_at - placed)

    async def _linger(self) -> None:
        """Close without losing the answer: a close on unread input would reset the connection (RFC 9112 9.6)."""
        with trio.move_on_after(self._gateway.settings.deadlines.linger, shield=True):
            try:
                if isinstance(self._stream, HalfCloseableStream):
                    await self._stream.send_eof()
                dropped = 0
                while dropped < _LINGER_BYTES and (data := await self._stream.receive_some(65_536)):
                    dropped += len(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass


def _may_end_by_close(exchange: Exchange) -> bool:
    """The answer may have no end but that of the connection: HTTP/1.0 knows no chunks."""
    return exchange.head is not None and exchange.head.version == b"1.0"


def _stopped(exchange: Exchange) -> Failure:
    return Failure(Side.GATEWAY, exchange.phase, Kind.DRAINING, "The gateway stopped.")


def _reset_on_close(stream: Stream) -> None:
    """Make the coming close a reset, inside of TLS too, where there is a socket. A simulated stream has its own way."""
    end = handover_end(stream) or stream
    sock = getattr(end, "socket", None)
    if sock is None:
        getattr(end, "reset", _nothing)()
    else:
        with contextlib.suppress(OSError):  # closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _nothing() -> None:
    pass
