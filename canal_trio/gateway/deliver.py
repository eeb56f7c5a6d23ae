"""The driver's half of an answer: from what the upstream said to the client, and its honest end.

Informational heads are passed on, the final head fixes the framing, and the body's ending decides the ending of the
message (design, section 6). The body comes in one of two ways. `body` takes it from the flow of an upstream task,
batch by batch, or handed over. `straight` is for a driver that has no such task: it goes along with the connection
itself, parked while pieces are handed over; when the client blocks, the rest comes through a flow, from a task that is
started then. A broken upstream message never becomes a well-formed one: without an end no terminator is ever written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.account import OutletBehind, account_for, accounted, sink_behind
from canal_trio.gateway.answers import with_fields, without_fields
from canal_trio.gateway.early import EarlyHead
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.kept import HeldFlow
from canal_trio.gateway.remembered import Remembered
from canal_trio.gateway.respond import http_date
from canal_trio.gateway.writer import BROKEN, BodyWriter, ClientWriter
from canal_trio.messages import End, Headers, ResponseHead
from canal_trio.policy.exchange import answer_for
from canal_trio.relay.course import in_task
from canal_trio.relay.flow import Aborted, Ended, FlowReceiver, FlowSender, Meter, Sink, open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Settings
from canal_trio.upstream.interface import AnswerBody, Outlet
from canal_trio.wire.error_bodies import error_event, event_of_error
from canal_trio.wire.facts import ResponseFacts, response_facts
from canal_trio.wire.headers import ForClient

__all__ = ["Delivery"]

_PING = b": ping\n"  # one newline: two break openai-python (openai-python 2722)
_EARLY = ResponseHead(200, Headers([(b"Content-Type", b"text/event-stream; charset=utf-8")]), b"OK")


@final
class Delivery:
    """One exchange's answer on its way to the client.

    `begun`: the final head was written, the status is told. `bound`: and it is the one of the answer that is relayed.
    """

    __slots__ = (
        "_block", "_body", "_exchange", "_memory", "_relaying", "_sender", "_settings", "_writer", "begun", "bound",
        "close", "complete", "early", "meter", "reaper", "refusal"
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        writer: ClientWriter,
        settings: Settings,
        reaper: Reaper,
        memory: Remembered,
        meter: Meter,
    ) -> None:
        self._exchange = exchange
        self._writer = writer
        self._settings = settings
        self.reaper = reaper
        self._memory = memory
        self.meter = meter  # of the flows that this answer goes through
        self._body: BodyWriter | None = None
        self._sender: FlowSender | None = None  # what the body comes through, if it is a flow
        self._relaying = False
        self._block = b""  # the final head, begun and not written
        self.begun = self.bound = False
        self.early: EarlyHead | None = None  # what writes a head when an answer takes too long
        self.refusal: bytes | None = None  # the upstream's error, where the head was too early to tell its status
        self.close = False  # the connection cannot carry another response
        self.complete = False  # the message was ended as its framing demands

    def drop_all(self, swallow: Callable[[bytes], int]) -> None:
        """The client is gone, and the answer goes on without it: `swallow` gets what is sent. Not a checkpoint."""
        self._writer.drop_all(swallow)
        if self._body is not None:
            self._body.drop_all()

    async def informational(self, head: ResponseHead) -> None:
        """Pass a 1xx head on, to those who know them (RFC 9110 15.2). A 100 is ours to send, and was sent.

        Not where a head may be sent early: there the driver is not the only one to write.
        """
        request = self._exchange.head
        assert request is not None
        if request.version == b"1.0" or head.status == 100 or self.early is not None:
            return
        if not await self._writer.write([self._head(head, None, body=0, close=False)]):
            self.lost()

    # -- a head before its time ----------------------------------------------------------------------------------------

    async def early_head(self) -> bool:
        """Write the head of an event stream of which nothing is known yet. False: the client is gone, or stalled."""
        exchange = self._exchange
        phase = exchange.phase
        block, _ = self._begin(_EARLY, close=self.close)
        self.bound = False
        exchange.phase = phase
        written = await self._writer.write([block])
        if not written:
            self.lost()
        return written

    async def ping(self) -> bool:
        """A comment behind such a head. False: as above."""
        writer = self._body
        assert writer is not None
        written = await writer.inject(_PING)
        if not written:
            self.lost()
        return written

    async def no_longer_early(self) -> bool:
        """An answer is here, or will not come. True: its status can no longer be told. A checkpoint if it waits."""
        if self.early is not None:
            await self.early.stop()
        return self.begun

    # -- the head ------------------------------------------------------------------------------------------------------

    async def final(self, head: ResponseHead, *, close: bool) -> None:
        """Write the final head and fix the framing of the body. Behind an early one only the latter."""
        written = self.begun
        block, whole = self._begin(head, close=close)
        if written:
            return
        if not await self._writer.write([block], self._exchange.has_answer if whole else None):
            self.lost()

    async def own(self, head: ResponseHead, body: bytes, *, close: bool) -> None:
        """Write a whole answer that the gateway makes itself."""
        block, bodyless = self._begin(head, close=close)
        writer = self._body
        assert writer is not None
        self._exchange.phase = Phase.DELIVER
        if await writer.write([] if bodyless else [body], End(), block):
            self.complete = True
        else:
            self.lost()

    def begin(self, head: ResponseHead, *, close: bool) -> None:
        """For `straight`: the final head, which is on its way from here on. Not a checkpoint."""
        self._block, _ = self._begin(head, close=close)

    def _begin(self, head: ResponseHead, *, close: bool) -> tuple[bytes, bool]:
        """The final head, on its way from here on; and is it all there is?"""
        exchange = self._exchange
        request = exchange.head
        assert request is not None
        facts = response_facts(head)
        streamed, known = facts.event_stream, facts.known
        bodyless = facts.bodyless or request.method == b"HEAD"
        modern = request.version == b"1.1"
        chunked = modern and not bodyless and (streamed or known is None)
        if streamed and not bodyless:
            known = None
            exchange.scanner = facts.scanner()
        if exchange.accounted and not bodyless:
            held_bytes = self._settings.bounds.usage_event_bytes
            exchange.account = account_for(facts, exchange.asked_usage, held_bytes)
        self.close = close or self._writer.closing or (not modern and known is None and not bodyless)
        self._body = BodyWriter(self._writer, exchange, chunked=chunked, length=known, on_terminal=self._terminal)
        exchange.phase = Phase.FIRST_EVENT
        self.begun = self.bound = True
        exchange.status = head.status
        return self._head(head, facts, body=known, close=self.close), bodyless or known == 0

    async def upgraded(self, head: ResponseHead) -> None:
        """Write the 101; from here on bytes are raw."""
        exchange = self._exchange
        self.begun = self.bound = self.close = True
        exchange.status = head.status
        exchange.phase = Phase.STREAM
        self._body = BodyWriter(self._writer, exchange, chunked=False, on_terminal=self._terminal)
        if not await self._writer.write([self._head(head, None, body=0, close=False)]):
            self.lost()

    def _head(self, head: ResponseHead, facts: ResponseFacts | None, *, body: int | None, close: bool) -> bytes:
        """As bytes. `facts`: those of a final one."""
        exchange = self._exchange
        request = exchange.head
        assert request is not None
        options = ForClient(  # by position, as there is one for each answer
            exchange.id.encode("ascii"),
            request.version,
            request.method,
            self._settings.pseudonym,
            body,
            close,
            exchange.scanner is not None,
            exchange.upgrade if head.status == 101 else None,
            http_date(),
        )
        fields = exchange.fields
        if not fields or facts is None or head.status == 429:  # its own limit, and its own word for it
            return self._memory.answers.block(head, options)
        shown = without_fields(head, fields) if facts.tells_limits else head
        return with_fields(self._memory.answers.block(shown, options), fields)

    # -- the body ------------------------------------------------------------------------------------------------------

    async def body(self, sender: FlowSender, flow: FlowReceiver | HeldFlow, heartbeat: float | None = None) -> None:
        """Relay the body from a flow to its ending; a client's trouble is noted in the exchange.

        `sender` is the flow's other end, for a body that is ended by us.
        """
        writer, exchange = self._body, self._exchange
        assert writer is not None
        self._sender, self._relaying = sender, True
        sink: Sink | None = writer.sink if writer.can_hand_over else None
        account = exchange.account
        if account is not None and sink is not None:
            sink = sink_behind(account, sink)
        beat = trio.current_time() + (heartbeat or math.inf)
        while flow.ending is None:
            batch: list[bytes] | None = None
            if heartbeat is None:
                batch = await flow.take(sink)
            else:
                with trio.move_on_at(beat):
                    batch = await flow.take(sink)
            if not await writer.flush():
                break
            if batch is None:
                beat = await self._heartbeat(writer, heartbeat or math.inf)
                continue
            if account is not None:
                batch = accounted(account, batch, over=flow.ending is not None)
            end = flow.ending.trailer if isinstance(flow.ending, Ended) else None
            if not await writer.write(batch, end if isinstance(end, End) else None):
                break
        counts = flow.statistics()
        exchange.handed_over += counts.handed_over
        exchange.queued += counts.queued
        exchange.waits += counts.waits
        if flow.ending is not None and self._writer.trouble is None:
            self._ended(flow.ending)
        else:
            self.lost()

    async def straight(self, connection: AnswerBody, *, settle: Callable[[], None]) -> None:
        """Relay the whole answer without an upstream task, as long as the client takes what comes.

        `begin` comes first. `settle` gives the connection back; it is called once the upstream has nothing more to say.
        A client's trouble is noted in the exchange.
        """
        exchange = self._exchange
        writer, block = self._body, self._block
        self._block = b""
        assert writer is not None
        account = exchange.account
        last = connection.early()
        if account is not None:
            last = account.feed(last)
        if connection.end is None and connection.failure is None:
            self._relaying = True
            free = writer.open(block, last)
            block = last = b""
            self._memory.forget()
            exchange.lasts()
            await in_task()
            if free:
                outlet: Outlet = writer if account is None else OutletBehind(account, writer)
                last = await connection.pass_on(outlet, self._settings.bounds.handover_bytes)
                if account is not None:
                    last = account.feed(last)
            exchange.handed_over = exchange.pieces
            if (exchange.left or exchange.failure is not None) and not exchange.draining:
                return  # noted by whoever saw it
            if connection.end is None and connection.failure is None:
                await self._rest(connection, settle)
                return
        await self._finish(connection, block, last, settle)

    async def _finish(self, connection: AnswerBody, block: bytes, last: bytes, settle: Callable[[], None]) -> None:
        """The upstream is done: write what came last, and the end, if it is one."""
        writer, end = self._body, connection.end
        assert writer is not None
        if end is None and "late_body_end" in self._exchange.flags:
            end = End()  # ours
        failure = connection.failure
        if self._exchange.account is not None:
            last += self._exchange.account.flush()
        self._relaying = False
        settle()
        if not await writer.write([last] if last else [], end, block):
            self.lost()
            return
        self._exchange.handed_over += bool(last)
        self._ended(Ended(end) if end is not None else Aborted(failure))

    async def _rest(self, connection: AnswerBody, settle: Callable[[], None]) -> None:
        """The client has blocked, or is gone: from here on a task of its own reads the upstream, into a flow."""
        writer, bounds = self._body, self._settings.bounds
        assert writer is not None
        sender, flow = open_flow(
            bounds.capacity, piece_bytes=bounds.piece_bytes, handover_bytes=bounds.handover_bytes, meter=self.meter
        )
        self._sender = sender

        async def upstream_task() -> None:
            with sender:
                await connection.pass_rest(sender)
            settle()

        with flow:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upstream_task)
                if await self._flushed(writer):
                    await self.body(sender, flow)
                else:
                    self.lost()
                nursery.cancel_scope.cancel(reason="the answer was delivered or given up")

    async def _flushed(self, writer: BodyWriter) -> bool:
        """Pass on what the sink kept, counted as long as it takes; the flow counts what comes behind it."""
        kept = sum(map(len, self._writer.unsent))
        self.meter.bytes += kept
        try:
            return await writer.flush()
        finally:
            self.meter.bytes -= kept

    async def _heartbeat(self, writer: BodyWriter, interval: float) -> float:
        """A comment between events, after silence (design, section 6: one newline, openai-python 2722).

        Answers when to look again: pieces that were handed over have not moved that time.
        """
        exchange, now = self._exchange, trio.current_time()
        due = exchange.last_piece + interval if exchange.first_piece is not None else now
        if due > now:
            return due
        scanner = exchange.scanner
        speaks = scanner is not None and scanner.at_boundary and not scanner.terminal
        if speaks and not await writer.inject(_PING):
            self.lost()  # now, and not at the upstream's next word
        return trio.current_time() + interval

    def _ended(self, ending: Ended | Aborted) -> None:
        exchange = self._exchange
        self._relaying = False
        if isinstance(ending, Ended):
            self.complete = True
            exchange.phase = Phase.DELIVER
            return
        self.close = True
        if exchange.terminal:
            exchange.flags |= {"cut_after_terminal"}
            return
        cause = ending.failure
        exchange.note(cause if isinstance(cause, Failure) else Failure(Side.UPSTREAM, Phase.STREAM, Kind.CUT))

    def _terminal(self) -> None:
        """The last event was delivered: the upstream has `after_done` seconds to end its body (gateways.md C28)."""
        if self._relaying:
            self.reaper.add(self._late_end, trio.current_time() + self._settings.deadlines.after_done)

    def _late_end(self, now: float) -> float:
        exchange, lease = self._exchange, self._exchange.lease
        if self._relaying and not exchange.finished:
            if lease is not None and lease.connection.ends():
                return math.inf  # what ended it, a cut perhaps, came in time: whoever reads it next tells which
            exchange.flags |= {"late_body_end"}
            if self._sender is not None:
                self._sender.end(End())
            if lease is not None:
                lease.abort()
        return math.inf

    def partly(self) -> int:
        """Bytes of a piece that was begun and not finished (`BodyWriter.partly`). Not a checkpoint."""
        return 0 if self._body is None else self._body.partly()

    def forget(self) -> None:
        """It is over: count what was begun, and let go of the body, which knows us (see `ClientConnection.run`)."""
        self._exchange.response_bytes += self.partly()
        self._body = None

    # -- endings -------------------------------------------------------------------------------------------------------

    async def broken_off(self, failure: Failure) -> None:
        """Tell the client of an event stream why it ends, if that can be told: between events, and never `[DONE]`."""
        exchange, writer = self._exchange, self._body
        scanner = exchange.scanner
        held = exchange.account.flush() if exchange.account is not None else b""
        if held and writer is not None and not self._writer.unsent:
            await writer.write([held], None)
        if writer is None or scanner is None or not scanner.at_boundary or exchange.terminal or scanner.error:
            return
        if self._writer.unsent or self._writer.trouble is not None:
            return
        request = exchange.head
        if request is None or request.version == b"1.0":
            return  # a close-delimited body cannot tell a failure but by a reset
        responses_api = request.target.partition(b"?")[0].endswith(b"/responses")
        refusal = None if self.refusal is None else event_of_error(self.refusal, responses_api=responses_api)
        if refusal is not None:
            await writer.inject(refusal)
            return
        answer = answer_for(failure)
        await writer.inject(error_event(answer.message, answer.type, answer.code, responses_api=responses_api))

    def lost(self) -> None:
        """The last write failed: the client stalled, or is gone. Not a checkpoint."""
        exchange = self._exchange
        if self._writer.trouble is Kind.STALLED:
            detail = f"The client took no byte for {self._settings.deadlines.client_write:g} s."
            exchange.fail(Failure(Side.CLIENT, exchange.phase, Kind.STALLED, detail))
        else:
            exchange.leave(BROKEN)
