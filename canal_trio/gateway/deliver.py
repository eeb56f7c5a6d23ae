"""The driver's half of an answer: from the upstream task's heads and flow to the client, and its honest end.

`Port` is where the upstream task puts what the upstream said. `Delivery` takes it from there: informational heads are
passed on, the final head fixes the framing, the body goes batch by batch (or is handed over), and the ending of the
flow decides the ending of the message (design, section 6). A broken upstream message never becomes a well-formed one:
without `Ended` no terminator is ever written.
"""

from __future__ import annotations

import contextlib
import math
from email.utils import formatdate
from typing import final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.writer import BROKEN, BodyWriter, ClientWriter
from canal_trio.messages import End, ResponseHead
from canal_trio.policy.exchange import answer_for
from canal_trio.relay.flow import Aborted, Ended, FlowReceiver, FlowSender, open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Settings
from canal_trio.wire.bodies import content_length
from canal_trio.wire.error_bodies import error_event
from canal_trio.wire.headers import ForClient, for_client, is_event_stream
from canal_trio.wire.heads import write_response_head
from canal_trio.wire.sse import EventScanner

__all__ = ["Delivery", "Port"]


@final
class Port:
    """The upstream task's side is an `upstream.interface.Answer`; the driver takes heads and then the flow."""

    def __init__(self, settings: Settings) -> None:
        bounds = settings.bounds
        self._send, self._receive = trio.open_memory_channel[ResponseHead](1)
        self.body: FlowSender
        self.flow: FlowReceiver
        self.body, self.flow = open_flow(
            bounds.capacity, piece_bytes=bounds.piece_bytes, handover_bytes=bounds.handover_bytes
        )
        self._failure: Failure | None = None

    async def head(self, head: ResponseHead) -> None:
        """Pass a head on; a checkpoint, waits while the one before was not taken."""
        await self._send.send(head)

    def finish(self, failure: Failure | None) -> None:
        """The attempt is over. Not a checkpoint; idempotent."""
        self._failure = failure
        self._send.close()
        self.body.abort(failure)

    async def next_head(self) -> ResponseHead | Failure:
        """The next head, or the failure that came instead. A checkpoint."""
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            return self._failure or Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT)

    async def over(self) -> Failure | None:
        """Wait for the end of the attempt, whose heads were taken; its failure if it had one. A checkpoint."""
        with contextlib.suppress(trio.EndOfChannel):
            await self._receive.receive()
        return self._failure


@final
class Delivery:
    """One exchange's answer on its way to the client. `begun`: the final head was written, there is no other answer."""

    def __init__(self, exchange: Exchange, writer: ClientWriter, settings: Settings, reaper: Reaper) -> None:
        self._exchange = exchange
        self._writer = writer
        self._settings = settings
        self._reaper = reaper
        self._body: BodyWriter | None = None
        self._port: Port | None = None
        self.begun = False
        self.close = False  # the connection cannot carry another response
        self.complete = False  # the message was ended as its framing demands

    async def informational(self, head: ResponseHead) -> None:
        """Pass a 1xx head on, to those who know them (RFC 9110 15.2). A 100 is ours to send, and was sent."""
        request = self._exchange.head
        assert request is not None
        if request.version == b"1.0" or head.status == 100:
            return
        await self._write_head(head, body=0, close=False)

    async def final(self, head: ResponseHead, *, close: bool) -> None:
        """Write the final head and fix the framing of the body."""
        exchange = self._exchange
        request = exchange.head
        assert request is not None
        streamed = is_event_stream(head.headers)
        length = content_length(head.headers)
        bodyless = request.method == b"HEAD" or head.status in (204, 304)
        known = length if isinstance(length, int) and b"transfer-encoding" not in head.headers else None
        modern = request.version == b"1.1"
        chunked = modern and not bodyless and (streamed or known is None)
        if streamed and not bodyless:
            known = None
            exchange.scanner = EventScanner()
        self.close = close or (not modern and known is None and not bodyless)
        self._body = BodyWriter(self._writer, exchange, chunked=chunked, length=known, on_terminal=self._terminal)
        exchange.phase = Phase.FIRST_EVENT
        self.begun = True
        exchange.status = head.status
        await self._write_head(head, body=known, close=self.close, whole=bodyless or known == 0)

    async def upgraded(self, head: ResponseHead) -> None:
        """Write the 101; from here on bytes are raw."""
        exchange = self._exchange
        self.begun = self.close = True
        exchange.status = head.status
        exchange.phase = Phase.STREAM
        self._body = BodyWriter(self._writer, exchange, chunked=False, on_terminal=self._terminal)
        await self._write_head(head, body=0, close=False)

    async def _write_head(self, head: ResponseHead, *, body: int | None, close: bool, whole: bool = False) -> None:
        """`whole`: with this head the client has all there is."""
        exchange = self._exchange
        request = exchange.head
        assert request is not None
        options = ForClient(
            request_version=request.version,
            request_method=request.method,
            request_id=exchange.id.encode("ascii"),
            pseudonym=self._settings.pseudonym,
            body=body,
            close=close,
            event_stream=exchange.scanner is not None,
            upgrade=exchange.upgrade if head.status == 101 else None,
            date=formatdate(usegmt=True).encode("ascii"),
        )
        taken = exchange.has_answer if whole else None
        if not await self._writer.write([write_response_head(for_client(head, options))], taken):
            self._lost()

    # -- the body ------------------------------------------------------------------------------------------------------

    async def body(self, port: Port, heartbeat: float | None) -> None:
        """Relay the body to its ending; a client's trouble is noted in the exchange."""
        writer, flow, exchange = self._body, port.flow, self._exchange
        assert writer is not None
        self._port = port
        sink = writer.sink if writer.can_hand_over else None
        beat = trio.current_time() + (heartbeat or math.inf)
        while flow.ending is None:
            batch: list[bytes] | None = None
            with trio.move_on_at(beat):
                batch = await flow.take(sink)
            if not await writer.flush():
                break
            if batch is None:
                beat = await self._heartbeat(writer, heartbeat or math.inf)
                continue
            end = flow.ending.trailer if isinstance(flow.ending, Ended) else None
            if not await writer.write(batch, end if isinstance(end, End) else None):
                break
        exchange.flow = flow.statistics()
        if flow.ending is not None and self._writer.trouble is None:
            self._ended(flow.ending)
        else:
            self._lost()

    async def _heartbeat(self, writer: BodyWriter, interval: float) -> float:
        """A comment between events, after silence (design, section 6: one newline, openai-python 2722).

        Answers when to look again: pieces that were handed over have not moved that time.
        """
        exchange, now = self._exchange, trio.current_time()
        due = exchange.last_piece + interval if exchange.first_piece is not None else now
        if due > now:
            return due
        scanner = exchange.scanner
        if scanner is not None and scanner.at_boundary and not scanner.terminal:
            await writer.inject(b": ping\n")
        return trio.current_time() + interval

    def _ended(self, ending: Ended | Aborted) -> None:
        exchange = self._exchange
        if isinstance(ending, Ended):
            self.complete = True
            exchange.phase = Phase.DELIVER
            return
        self.close = True
        if exchange.terminal:
            exchange.flags.add("cut_after_terminal")
            return
        cause = ending.failure
        exchange.note(cause if isinstance(cause, Failure) else Failure(Side.UPSTREAM, Phase.STREAM, Kind.CUT))

    def _terminal(self) -> None:
        """The last event was delivered: the upstream has `after_done` seconds to end its body (gateways.md C28)."""
        self._reaper.add(self._late_end, trio.current_time() + self._settings.deadlines.after_done)

    def _late_end(self, now: float) -> float:
        exchange, port = self._exchange, self._port
        if port is not None and not exchange.finished.is_set() and port.flow.ending is None:
            exchange.flags.add("late_body_end")
            port.body.end(End())
            if exchange.lease is not None:
                exchange.lease.abort()
        return math.inf

    # -- endings -------------------------------------------------------------------------------------------------------

    async def broken_off(self, failure: Failure) -> None:
        """Tell the client of an event stream why it ends, if that can be told: between events, and never `[DONE]`."""
        exchange, writer = self._exchange, self._body
        scanner = exchange.scanner
        if writer is None or scanner is None or not scanner.at_boundary or exchange.terminal or scanner.error:
            return
        if self._writer.unsent or self._writer.trouble is not None:
            return
        request = exchange.head
        if request is None or request.version == b"1.0":
            return  # a close-delimited body cannot tell a failure but by a reset
        answer = answer_for(failure)
        responses_api = request.target.partition(b"?")[0].endswith(b"/responses")
        await writer.inject(error_event(answer.message, answer.type, answer.code, responses_api=responses_api))

    def _lost(self) -> None:
        """The last write failed: the client stalled, or is gone."""
        exchange = self._exchange
        if self._writer.trouble is Kind.STALLED:
            detail = f"The client took no byte for {self._settings.deadlines.client_write:g} s."
            exchange.fail(Failure(Side.CLIENT, exchange.phase, Kind.STALLED, detail))
        else:
            exchange.leave(BROKEN)
