"""What was read of an answer before it was decided whether the client gets it: a refusal kept for later, a first event.

A refusal (429, 503, …) that another upstream may make good is read to its end, if it is small and comes soon, so that
the client can have it when nobody else answers; so can its connection serve again. The first event of a stream is held
where the model says so, to see whether it is an error. Both are bounded, and both go through the same delivery as any
other answer. Invariant: what was read is given out once, whole and first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import trio

from canal_trio.errors import Failure
from canal_trio.messages import End, ResponseHead
from canal_trio.relay.course import in_task
from canal_trio.relay.flow import Aborted, Ended, Ending, FlowReceiver, FlowSender, FlowStatistics, Sink
from canal_trio.upstream.interface import AnswerBody, Outlet
from canal_trio.wire.sse import EventScanner

__all__ = ["HeldAnswer", "HeldFlow", "KeptAnswer", "hold_event", "hold_event_of_flow", "keep", "keep_from_flow"]

_KEPT_BYTES = 64 * 1024  # of a refusal
_KEPT_SECONDS = 1.0  # for it to come
_EVENT_BYTES = 16 * 1024  # of a first event; more is not held back


@final
class _Taken:
    """An `Outlet` that keeps what it gets, up to `most` bytes; with a `scanner`, up to the first event."""

    chunked = False

    def __init__(self, most: int, scanner: EventScanner | None = None) -> None:
        self._pieces: list[bytes] = []
        self._most = most
        self._scanner = scanner
        self.size = 0

    def take(self, piece: bytes) -> None:
        """Keep it."""
        self._pieces.append(piece)
        self.size += len(piece)
        if self._scanner is not None:
            self._scanner.feed(piece)

    def piece(self, payload: bytes, now: float) -> Callable[[], bool]:
        """See `upstream.interface.Outlet`."""
        self.take(payload)
        return self.more

    def whole(self, framed: bytes, start: int, stop: int, now: float) -> Callable[[], bool]:
        """See `upstream.interface.Outlet`."""
        return self.piece(framed[start:stop], now)

    def more(self) -> bool:
        """Is more to be taken?"""
        return self.size < self._most and not (self._scanner is not None and self._scanner.events)

    @property
    def error(self) -> bool:
        """There is an error among what was taken."""
        return self._scanner is not None and self._scanner.error

    def payload(self) -> bytes:
        """What was taken."""
        return b"".join(self._pieces)


@final
class KeptAnswer:
    """A whole answer, to be delivered as one that came straight. `upstream` is who gave it."""

    failure: None = None

    def __init__(self, head: ResponseHead, payload: bytes, end: End, upstream: str) -> None:
        self.head = head
        self.end = end
        self.upstream = upstream
        self._payload = payload

    def early(self) -> bytes:
        """All of it."""
        return self._payload

    async def pass_on(self, outlet: Outlet, most: int) -> bytes:
        """There is nothing more. A checkpoint."""
        await trio.lowlevel.checkpoint()
        return b""

    async def pass_rest(self, sender: FlowSender) -> None:
        """There is nothing more. A checkpoint."""
        await trio.lowlevel.checkpoint()
        sender.end(self.end)


async def keep(answer: AnswerBody, head: ResponseHead, upstream: str) -> KeptAnswer | None:
    """Read the rest of a refusal. None if it is too large, slow or broken. A checkpoint only if it has to wait."""
    taken = _Taken(_KEPT_BYTES + 1)
    taken.take(answer.early())
    await in_task()
    with trio.move_on_after(_KEPT_SECONDS):
        if answer.end is None and answer.failure is None and taken.more():
            taken.take(await answer.pass_on(taken, _KEPT_BYTES))
    if answer.end is None or taken.size > _KEPT_BYTES:
        return None
    return KeptAnswer(head, taken.payload(), answer.end, upstream)


async def keep_from_flow(flow: FlowReceiver, head: ResponseHead, upstream: str) -> KeptAnswer | None:
    """The same where an upstream task puts it into a flow."""
    pieces: list[bytes] = []
    with trio.move_on_after(_KEPT_SECONDS):
        while flow.ending is None and sum(map(len, pieces)) <= _KEPT_BYTES:
            pieces += await flow.take()
    payload = b"".join(pieces)
    if not isinstance(flow.ending, Ended) or len(payload) > _KEPT_BYTES:
        return None
    end = flow.ending.trailer
    return KeptAnswer(head, payload, end if isinstance(end, End) else End(), upstream)


# -- the first event ---------------------------------------------------------------------------------------------------


@final
class HeldAnswer:
    """An answer's body of which the beginning was read. `error`: it is an error that the upstream reports in band."""

    def __init__(self, body: AnswerBody, payload: bytes, *, error: bool) -> None:
        self._body = body
        self._payload = payload
        self.error = error

    @property
    def end(self) -> End | None:
        """As the body's."""
        return self._body.end

    @property
    def failure(self) -> Failure | None:
        """As the body's."""
        return self._body.failure

    def early(self) -> bytes:
        """What was read. Once."""
        payload, self._payload = self._payload, b""
        return payload

    async def pass_on(self, outlet: Outlet, most: int) -> bytes:
        """As the body's."""
        return await self._body.pass_on(outlet, most)

    async def pass_rest(self, sender: FlowSender) -> Failure | None:
        """As the body's."""
        return await self._body.pass_rest(sender)


async def hold_event(body: AnswerBody, most: int) -> HeldAnswer:
    """Read the first event of a stream, in reads of `most` bytes. A checkpoint only if it has to wait.

    Cancelled, the connection can only be aborted.
    """
    taken = _Taken(_EVENT_BYTES, EventScanner())
    taken.take(body.early())
    await in_task()
    if taken.more() and body.end is None and body.failure is None:
        taken.take(await body.pass_on(taken, most))
    return HeldAnswer(body, taken.payload(), error=taken.error)


@final
class HeldFlow:
    """A flow of which the beginning was taken; otherwise as its `FlowReceiver`."""

    def __init__(self, flow: FlowReceiver, pieces: list[bytes], *, error: bool) -> None:
        self._flow = flow
        self._pieces: list[bytes] | None = pieces
        self.error = error

    @property
    def ending(self) -> Ending | None:
        """None while what was taken is still here."""
        return None if self._pieces is not None else self._flow.ending

    @property
    def cut(self) -> object:
        """The failure with which the flow was aborted, if it was by now."""
        ending = self._flow.ending
        return ending.failure if isinstance(ending, Aborted) else None

    async def take(self, sink: Sink | None = None) -> list[bytes]:
        """What was taken before, then what comes. A checkpoint."""
        if self._pieces is not None:
            await trio.lowlevel.checkpoint()
            pieces, self._pieces = self._pieces, None
            return pieces
        return await self._flow.take(sink)

    def statistics(self) -> FlowStatistics:
        """Those of the flow."""
        return self._flow.statistics()


async def hold_event_of_flow(flow: FlowReceiver) -> HeldFlow:
    """Take pieces up to the first event of a stream. A checkpoint."""
    scanner = EventScanner()
    pieces: list[bytes] = []
    size = 0
    while flow.ending is None and not scanner.events and size < _EVENT_BYTES:
        for piece in await flow.take():
            scanner.feed(piece)
            pieces.append(piece)
            size += len(piece)
    return HeldFlow(flow, pieces, error=scanner.error)
