"""One exchange over HTTP/1.1 on one upstream connection: the hot path's upstream half.

The request head leaves with whatever of the body is ready in one write. From there an attempt goes one of two ways.
`run()` is for a task of its own: a body that still arrives is sent by another task, so that an answer which comes early
(a 413 while the client still uploads) is seen at once, and the response body goes through a flow. `ask()`, `pass_on()`
and `pass_rest()` are the same steps for a driver that has the whole request and needs no second task, until its client
blocks: then the rest of the body goes through a flow as well. In both, bytes go from the socket through the decoder on
to the client in the poller's step, for as long as it takes them (hand-over on the spot); otherwise a full flow stops
the reading.

Invariants: nothing after the end of the response is ever taken for a part of it, and a connection that shows such bytes
is not reused. A body that the framing does not prove complete never ends. The deadline that runs is that of the side
whose turn it is (`upstream.turns`): while the client is slow, the upstream has no deadline; one that passes closes the
connection.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, final

import trio
from trio.abc import Stream

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.messages import End, RequestHead, ResponseHead
from canal_trio.relay.course import in_task, later, parks
from canal_trio.relay.flow import Aborted, FlowSender
from canal_trio.relay.handover import Buffer, HandoverStream, can_hand_over
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Bounds, Deadlines
from canal_trio.upstream.idle import has_hung_up, is_quiet, watch_hangup
from canal_trio.upstream.interface import Answer, BodySource, Inform, Outlet
from canal_trio.upstream.response_body import ResponseBody
from canal_trio.upstream.switched import Tunnel
from canal_trio.upstream.turns import Turn, Turns
from canal_trio.wire.bodies import encode_chunk, encode_last_chunk, response_decoder
from canal_trio.wire.facts import response_facts
from canal_trio.wire.heads import ResponseHeadReader, write_request_head

__all__ = ["Http1Connection"]

_PEER_TROUBLE = (trio.BrokenResourceError, trio.ClosedResourceError)
_SLICE = 16 * 1024  # bytes per send where progress within one cannot be seen


@final
class Http1Connection:
    """A connection to one upstream. `stream` is ours to close; `raw` is its socket end, for a close in one step."""

    __slots__ = (
        "_answered",
        "_body",
        "_bounds",
        "_failure",
        "_heads",
        "_keeps",
        "_parks",
        "_raw",
        "_relaying",
        "_sent",
        "_stream",
        "_turns",
        "_unsent",
        "_used",
        "reusable",
    )

    def __init__(
        self, stream: Stream, raw: HandoverStream, *, reaper: Reaper, bounds: Bounds, deadlines: Deadlines
    ) -> None:
        self._stream = stream
        self._raw = raw
        self._parks = parks(stream)
        self._bounds = bounds
        self._turns = Turns(deadlines, reaper, self._expire)
        self._used = False
        self._heads = ResponseHeadReader(head_bytes=bounds.head_bytes, head_fields=bounds.head_fields)
        self._reset()
        self._sent = True  # nothing is on its way
        self._unsent: list[Buffer] | None = None  # `ask` has begun what `run` is to go on with

    def _reset(self) -> None:
        self.reusable = False
        self._turns.begin(Turn.SEND)
        self._answered = False  # a byte of the response has arrived
        self._sent = False  # the request left whole
        self._relaying = False  # the final head was passed on
        self._failure: Failure | None = None  # the first, unless the body has met one before
        self._keeps = False  # the final head is here, and says that the connection stays
        self._body: ResponseBody | None = None  # from the final head on

    def __repr__(self) -> str:
        return f"<Http1Connection {self._stream!r}, {self._turns.turn.name.lower()}>"

    @property
    def sent(self) -> bool:
        """See `canal_trio.upstream.interface.Connection`."""
        return self._sent

    def usable(self) -> bool:
        """Nothing has arrived and the peer has not hung up since the last exchange. One system call."""
        return is_quiet(self._raw)

    def watch_idle(self, died: Callable[[], None] | None) -> None:
        """See `canal_trio.upstream.interface.Connection`."""
        watch_hangup(self._raw, died)

    def ends(self) -> bool:
        """See `canal_trio.upstream.interface.Connection`."""
        return self.failure is not None or self.end is not None or has_hung_up(self._raw)

    def abort(self) -> None:
        """Close the socket in this very step. Idempotent.

        In the middle of an upload with a reset: a FIN would wait behind the bytes that the upstream does not read.
        """
        self._turns.stop()
        self._raw.disarm()
        if not self._sent:
            self._raw.reset()
        self._raw.close()

    async def run(self, head: RequestHead, body: BodySource | None, answer: Answer) -> Failure | None:
        """One attempt; see `canal_trio.upstream.interface.Connection`."""
        rest, self._unsent = self._unsent, None
        if rest is None:
            self._reset()
            fields, block = head.headers, write_request_head(head)
            chunked, upgrading = b"transfer-encoding" in fields, b"upgrade" in fields
            rest = await self._begin(block, body, chunked=chunked, upgrading=upgrading)
        await self._exchange(head, body, answer, rest)
        failure = self._over()
        if failure is not None:
            answer.body.abort(failure)
        return failure

    def _over(self) -> Failure | None:
        """The attempt is over: what became of it, and of the connection."""
        self._used = True
        self._turns.turn = Turn.NOBODY
        body, failure = self._body, self.failure
        self.reusable = (
            failure is None
            and self._sent
            and body is not None
            and body.end is not None
            and not body.rest
            and self._keeps
        )
        return failure

    def _expire(self, failure: Failure) -> None:
        """A deadline has passed: whoever waits for the upstream is woken by the close."""
        self._note(failure)
        self.abort()

    def _note(self, failure: Failure) -> None:
        if self.failure is None:
            self._failure = failure

    def _broken(self, detail: str) -> Failure:
        """What the end of the connection means before the final head, by how far the response had come."""
        if self._answered:
            return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT, "The response head is incomplete.", Retry.SENT)
        if self._used:
            return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.STALE, detail, Retry.FRESH)
        return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT, detail, Retry.SENT)

    # -- the exchange --------------------------------------------------------------------------------------------------

    async def _exchange(self, head: RequestHead, body: BodySource | None, answer: Answer, rest: list[Buffer]) -> None:
        if not rest and (body is None or self._sent):
            await self._receive(head, body, answer)
            return
        self._turns.begin(Turn.SEND if rest else Turn.CLIENT)
        chunked = b"transfer-encoding" in head.headers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._upload, rest, None if b"upgrade" in head.headers else body, chunked)
            await self._receive(head, body, answer)
            nursery.cancel_scope.cancel(reason="the upstream has answered")

    async def _begin(self, block: bytes, body: BodySource | None, *, chunked: bool, upgrading: bool) -> list[Buffer]:
        """Send the head with what is ready of the body. `_sent` afterwards: that was all, and it is gone.

        Returns what the upstream did not take at once: it may answer before it takes more (RFC 9110 10.1.1).
        """
        first: list[Buffer] = [block]
        if body is not None and not upgrading:
            first += _frame(body.take_nowait(), chunked)
            if body.ending is not None:
                first += self._last(body, chunked)
        rest: list[Buffer] = []
        try:
            if can_hand_over(self._stream):
                rest += self._stream.try_send_batch(first)
            elif body is None or upgrading:
                await self._send(first)
            else:
                rest = first
        except _PEER_TROUBLE:
            pass  # it may have answered before it stopped reading (RFC 9112 9.5): what we receive decides
        if not rest and (body is None or upgrading or body.ending is not None):
            self._sent = True
            self._turns.turn = Turn.ANSWER  # the turn that ends here began in this very step, or the send moved bytes
        return rest

    async def _upload(self, rest: list[Buffer], body: BodySource | None, chunked: bool) -> None:
        try:
            if rest:
                await self._send(rest)
            while body is not None and not _over(body):
                self._upload_turn(Turn.CLIENT)
                framed: list[Buffer] = [*_frame(await body.take(), chunked)]
                if _over(body):
                    framed += self._last(body, chunked)
                self._upload_turn(Turn.SEND)
                await self._send(framed)
        except _PEER_TROUBLE:
            pass  # as above
        else:
            self._sent = True
        if not self._relaying:
            self._turns.begin(Turn.ANSWER)

    def _upload_turn(self, turn: Turn) -> None:
        if not self._relaying:  # once the answer flows, its own deadlines count
            self._turns.begin(turn)

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

    async def _send(self, pieces: Sequence[Buffer]) -> None:
        """Pass `pieces` to the upstream's kernel, noting each progress: a body that was held can take minutes.

        A checkpoint only if it has to wait.
        """
        stream = self._stream
        if can_hand_over(stream):
            rest = stream.try_send_batch(pieces)
            while rest:
                self._turns.moved = trio.current_time()
                await stream.wait_send_all_might_not_block()
                rest = stream.try_send_batch(rest)
            return
        data = b"".join(pieces)
        for start in range(0, len(data), _SLICE):
            await stream.send_all(data[start : start + _SLICE])
            self._turns.moved = trio.current_time()

    async def _receive(self, request: RequestHead, body: BodySource | None, answer: Answer) -> None:
        try:
            await self._response(request, body, answer)
        except _PEER_TROUBLE as exc:
            self._note(self._broken(str(exc)))

    async def _response(self, request: RequestHead, body: BodySource | None, answer: Answer) -> None:
        head = await self._final_head(answer.head, upgrading=b"upgrade" in request.headers)
        if head is None:
            return
        if head.status == 101:
            await self._tunnel(self._heads.rest(), head, body, answer)
            return
        out = self._open(head, request.method)
        if out is not None:
            await answer.head(head)
            await out.into(answer.body, self._heads.rest())

    def _open(self, head: ResponseHead, method: bytes) -> ResponseBody | None:
        """The body of the final head that is here. None: its framing is in doubt."""
        decoder = response_decoder(head, method)
        if isinstance(decoder, Failure):
            self._note(decoder)
            return None
        self._body = body = ResponseBody(self._stream, decoder, self._turns, piece_bytes=self._bounds.piece_bytes)
        self._keeps = response_facts(head).keep_alive
        self._relaying = True
        self._turns.begin(Turn.BODY)
        return body

    async def _final_head(self, inform: Inform, *, upgrading: bool) -> ResponseHead | None:
        """Read heads, passing the informational ones on, up to the final one; None with a failure noted."""
        informational = 0
        data = b""
        reader = self._heads
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
                self._answered = True  # which moves no deadline: a head that comes byte by byte would never be late
                continue
            if verdict.status == 101 and not upgrading:
                self._note(Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED, "It switched protocols unasked."))
                return None
            if not verdict.informational or verdict.status == 101:
                return verdict
            informational += 1
            if informational > self._bounds.informational_heads:
                self._note(Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED, "Too many informational heads."))
                return None
            await inform(verdict)
            if self._turns.turn is Turn.ANSWER:
                self._turns.moved = trio.current_time()  # a sign of life, of which there are only so many
            data = reader.rest()

    # -- for a driver without a second task ----------------------------------------------------------------------------

    @property
    def straight(self) -> Http1Connection | None:
        """Itself, if it can serve an attempt without a task of its own; see `interface.StraightConnection`."""
        return self if can_hand_over(self._stream) else None

    async def ask(
        self, block: bytes, body: BodySource | None, inform: Inform, *, method: bytes, chunked: bool
    ) -> Failure | ResponseHead | None:
        """Send a whole request and wait for the final head. See `interface.StraightConnection`; so for what follows."""
        self._reset()
        if not self._parks:
            await in_task()
        await later()
        try:
            rest = await self._begin(block, body, chunked=chunked, upgrading=False)
            if rest:
                self._unsent = rest
                return None
            final = await self._final_head(inform, upgrading=False)
        except _PEER_TROUBLE as exc:
            self._note(self._broken(str(exc)))
        else:
            if final is not None and self._open(final, method) is not None:
                return final
        failure = self._over()
        assert failure is not None
        return failure

    def early(self) -> bytes:
        """The payload that came with the head."""
        assert self._body is not None
        return self._body.take(self._heads.rest())

    @property
    def end(self) -> End | None:
        """The end of the body, once it has come."""
        return self._body.end if self._body is not None else None

    @property
    def failure(self) -> Failure | None:
        """What went wrong, if anything has: the first that did."""
        failure, body = self._failure, self._body
        return body.failure if failure is None and body is not None else failure

    def pass_on(self, outlet: Outlet, most: int) -> Coroutine[Any, Any, bytes]:
        """Hand the body over to `outlet`, until it refuses or the body is over; the payload that came with the end."""
        assert self._body is not None
        self._heads.forget()
        return self._body.pass_on(outlet, most)

    async def pass_rest(self, sender: FlowSender) -> Failure | None:
        """The rest of the body through a flow, for a client that has blocked."""
        assert self._body is not None
        await self._body.into(sender, b"")
        failure = self._over()
        if failure is not None:
            sender.abort(failure)
        return failure

    def conclude(self) -> Failure | None:
        """Nothing more is wanted: what became of the attempt."""
        return self._over()

    # -- after 101 -----------------------------------------------------------------------------------------------------

    async def _tunnel(self, early: bytes, head: ResponseHead, body: BodySource | None, answer: Answer) -> None:
        await answer.head(head)
        self._turns.begin(Turn.TUNNEL)
        await Tunnel(self._stream, self._turns, self._bounds.piece_bytes, self._note, self.abort).run(
            early, self._send, body, answer.body
        )


def _over(body: BodySource) -> bool:
    return body.ending is not None


def _frame(pieces: list[bytes], chunked: bool) -> list[bytes]:
    return [encode_chunk(piece) for piece in pieces] if chunked else pieces
