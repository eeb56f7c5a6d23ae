"""Planted bugs: the simulation is worth as much as what it finds, and these it must find.

Each mutant is a small change of the product, made for the time of a block, as somebody might make it by mistake. `seed`
is where a hunt begins: the first one that killed it, counted from 0, so that a test is quick; when the product or the
generator changes, the hunt merely takes longer. A new mutant is a function that yields what to replace.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import trio

from canal_trio.errors import Failure, Retry, Side
from canal_trio.gateway import booking
from canal_trio.gateway.attempts import Attempts
from canal_trio.gateway.body import WholeBody
from canal_trio.gateway.connection import ClientConnection
from canal_trio.gateway.core import Gateway
from canal_trio.gateway.deliver import Delivery
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.record import record_of
from canal_trio.gateway.writer import BodyWriter
from canal_trio.hooks import Bookkeeper
from canal_trio.messages import End
from canal_trio.policy import exchange as exchange_policy
from canal_trio.policy.exchange import Step
from canal_trio.relay.flow import FlowReceiver, FlowSender, _State
from canal_trio.testing.simstream import SimStream
from canal_trio.upstream.http1 import Http1Connection
from canal_trio.upstream.pool import Lease, Pool
from canal_trio.upstream.response_body import ResponseBody
from canal_trio.upstream.turns import Turns
from canal_trio.wire.bodies import encode_last_chunk

__all__ = ["MUTANTS", "Mutant"]

Replaced = Iterator[tuple[Any, str, Any]]
"""Owner, attribute, and what stands there instead."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted bug."""

    name: str
    what: str
    seed: int
    _replaced: Callable[[], Replaced]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The product has this bug in the block."""
        with ExitStack() as stack:
            for owner, name, instead in self._replaced():
                stack.enter_context(mock.patch.object(owner, name, instead))
            yield


MUTANTS: dict[str, Mutant] = {}


def _mutant(seed: int) -> Callable[[Callable[[], Replaced]], Callable[[], Replaced]]:
    def keep(replaced: Callable[[], Replaced]) -> Callable[[], Replaced]:
        name = replaced.__name__
        MUTANTS[name] = Mutant(name, (replaced.__doc__ or "").strip(), seed, replaced)
        return replaced

    return keep


# -- flows and hand-over -----------------------------------------------------------------------------------------------


@_mutant(0)
def flow_drops_a_piece() -> Replaced:
    """Of a batch of several pieces the second one is lost."""
    drain = FlowReceiver._drain

    def lossy(self: FlowReceiver) -> list[bytes]:
        batch = drain(self)
        del batch[1:2]
        return batch

    yield FlowReceiver, "_drain", lossy


@_mutant(55)
def flow_without_a_bound() -> Replaced:
    """A flow takes as much as it is given."""
    init = _State.__init__

    def roomy(self: _State, capacity: int, *rest: Any, **named: Any) -> None:
        init(self, capacity * 1_000, *rest, **named)

    yield _State, "__init__", roomy


@_mutant(1955)
def sink_armed_after_cancel() -> Replaced:
    """A task that was cancelled while it was parked leaves its sink behind."""

    async def take(self: FlowReceiver, sink: Any = None) -> list[bytes]:
        await trio.lowlevel.checkpoint_if_cancelled()
        state = self._state
        batch = self._drain()
        if batch or self.ending is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return batch
        state.sink, state.refused, state.parked = sink, False, trio.lowlevel.current_task()

        def disarm(_raise_cancel: Any) -> trio.lowlevel.Abort:
            state.parked = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(disarm)
        return [] if state.refused else self._drain()

    yield FlowReceiver, "take", take


@_mutant(1)
def lost_remainder() -> Replaced:
    """What the client's kernel did not take of a piece is forgotten."""
    passed = BodyWriter._pass_framed

    def forgetful(self: BodyWriter) -> bool:
        done = passed(self)
        if not done:
            self._writer.unsent.clear()
        return done

    yield BodyWriter, "_pass_framed", forgetful


@_mutant(3)
def eof_lost_behind_a_short_read() -> Replaced:
    """An end that comes with the last bytes, in one edge, is not looked at again."""
    on_ready = SimStream.on_ready

    def once(self: SimStream) -> None:
        if self._sink is None or not self.incoming.end:
            on_ready(self)
            return
        with mock.patch.object(self.incoming, "nudge"):
            on_ready(self)

    yield SimStream, "on_ready", once


# -- endings -----------------------------------------------------------------------------------------------------------


@_mutant(9)
def close_taken_as_an_end() -> Replaced:
    """A body whose connection closes is complete, whatever its framing promised."""

    def lenient(self: ResponseBody) -> None:
        self._decoder.close()
        if self._decoder.end is None:
            self._decoder.end = End()  # type: ignore[misc]  # what the bug does

    yield ResponseBody, "_eof", lenient


@_mutant(7)
def made_up_done() -> Replaced:
    """A stream that breaks off is closed with a `[DONE]` of our own."""
    broken_off = Delivery.broken_off

    async def polite(self: Delivery, failure: Failure) -> None:
        await broken_off(self, failure)
        if self._body is not None:
            await self._body.inject(b"data: [DONE]\n\n")

    yield Delivery, "broken_off", polite


@_mutant(7)
def terminated_after_a_cut() -> Replaced:
    """A chunked body that breaks off gets its last chunk all the same."""
    broken_off = Delivery.broken_off

    async def tidy(self: Delivery, failure: Failure) -> None:
        await broken_off(self, failure)
        if self._body is not None and self._body.chunked:
            await self._writer.write([encode_last_chunk()])

    yield Delivery, "broken_off", tidy


@_mutant(7)
def abort_passed_on_as_an_end() -> Replaced:
    """A flow that stops short is a flow that has ended."""
    yield FlowSender, "abort", lambda self, _failure=None: self.end(End())


@_mutant(6)
def cut_upload_completed() -> Replaced:
    """A client that ends its side in the middle of an upload has said all it wanted to."""

    def last(_self: Http1Connection, _body: Any, chunked: bool) -> list[bytes]:
        return [encode_last_chunk()] if chunked else []

    yield Exchange, "client_eof", lambda self: None
    yield Http1Connection, "_last", last


@_mutant(7)
def comment_inside_an_event() -> Replaced:
    """Heartbeats do not wait for the end of an event."""

    async def beat(_self: Delivery, writer: BodyWriter, interval: float) -> float:
        await writer.inject(b": ping\n")
        return trio.current_time() + interval

    yield Delivery, "_heartbeat", beat


# -- attempts ----------------------------------------------------------------------------------------------------------


@_mutant(7)
def retry_after_relayed_bytes() -> Replaced:
    """An upstream that fails in the middle of its answer is asked again."""
    attempt = Attempts._attempt

    async def stubborn(self: Attempts, upstream: Any, index: int, *, fresh: bool) -> Failure | None:
        result = await attempt(self, upstream, index, fresh=fresh)
        failure = self._exchange.failure
        if result is None and failure is not None and failure.side is Side.UPSTREAM:
            self._exchange.failure, self._delivery.begun = None, False
            return await attempt(self, upstream, index, fresh=True)
        return result

    yield Attempts, "_attempt", stubborn


@_mutant(48)
def sent_twice() -> Replaced:
    """What may have been generated once already is sent to another upstream."""
    next_step = exchange_policy.next_step

    def eager(failure: Failure, **named: Any) -> Step:
        return Step.NEXT if failure.retry is Retry.SENT else next_step(failure, **named)

    yield sys.modules[Attempts.__module__], "next_step", eager


@_mutant(114)
def dirty_connection_reused() -> Replaced:
    """A connection goes back to the pool with a part of the last exchange still on it."""
    over = Http1Connection._over

    def careless(self: Http1Connection) -> Failure | None:
        failure = over(self)
        self.reusable = failure is None
        return failure

    yield Http1Connection, "_over", careless


# -- what is held ------------------------------------------------------------------------------------------------------


@_mutant(0)
def lease_returned_twice() -> Replaced:
    """A lease does not remember that it was given back."""

    def release(self: Lease) -> None:
        self._pool._released(self.connection, self._since)

    yield Lease, "release", release


@_mutant(6)
def slot_lost_by_a_failed_dial() -> Replaced:
    """A dial that comes to nothing keeps its slot."""
    dial = Pool._dial

    async def leaky(self: Pool, dialling: Any) -> Lease | Failure:
        lease = await dial(self, dialling)
        if isinstance(lease, Failure):
            self._core.used += 1
        return lease

    yield Pool, "_dial", leaky


@_mutant(0)
def held_body_never_freed() -> Replaced:
    """The budget of held bodies is taken from and not given back."""
    yield WholeBody, "stop_holding", lambda self: setattr(self, "replayable", False)


@_mutant(0)
def two_records() -> Replaced:
    """An exchange leaves its record twice."""
    end = Gateway.end

    def twice(self: Gateway, exchange: Exchange) -> None:
        was_there = exchange in self._exchanges
        end(self, exchange)
        if was_there:
            self._recorders[0].finished(record_of(exchange))

    yield Gateway, "end", twice


@_mutant(0)
def no_record_of_who_left() -> Replaced:
    """An exchange whose client has left leaves no record."""
    end = Gateway.end

    def silent(self: Gateway, exchange: Exchange) -> None:
        if exchange.left:
            self._exchanges.pop(exchange, None)
            exchange.finish()
        else:
            end(self, exchange)

    yield Gateway, "end", silent


# -- time --------------------------------------------------------------------------------------------------------------


@_mutant(5)
def shield_without_deadline() -> Replaced:
    """The lingering close waits for the client's end for as long as it takes."""

    async def linger(self: ClientConnection) -> None:
        with trio.CancelScope(shield=True), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._stream.receive_some(65_536):
                pass

    yield ClientConnection, "_linger", linger


@_mutant(5)
def upstream_closed_a_pass_later() -> Replaced:
    """A client that leaves has its exchange cancelled, and the upstream is closed when that unwinds."""

    def fail(self: Exchange, failure: Failure) -> None:
        if not self.finished:
            self.note(failure)
            self._unwind(str(failure))

    yield Exchange, "fail", fail


@_mutant(13)
def upstream_deadline_never_looked_at() -> Replaced:
    """Nobody notices that an upstream says nothing more."""
    yield Turns, "_check", lambda self, now: now + self._period


@_mutant(5)
def drain_cuts_at_once() -> Replaced:
    """A drain ends what runs instead of waiting for it."""
    drain = Gateway.drain

    yield Gateway, "drain", lambda self, _deadline: drain(self, trio.current_time())


@_mutant(15)
def old_books_are_forgotten() -> Replaced:
    """Who keeps other books forgets that some in flight are noted in the old ones."""
    keep = Gateway.keep_books

    def forgets(self: Gateway, books: Bookkeeper | None) -> None:
        self._bookings = ()
        keep(self, books)

    yield Gateway, "keep_books", forgets


@_mutant(0)
def noted_after_it_was_sent() -> Replaced:
    """What is to be noted before a round's sends waits for something else."""

    def forgets(_call: Callable[[], None]) -> bool:
        return True

    yield booking, "before_sends", forgets
