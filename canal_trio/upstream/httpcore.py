"""One exchange over HTTP/2 on one upstream connection: httpcore's connection, our stream, our deadlines.

httpcore speaks HTTP/2 and nothing else here. HTTP/1.1 is `http1`'s on every route, through proxies as well: httpcore
1.0.9 takes bytes that follow a response for the next one's, which would hand one client's answer to another.

One httpcore object per connection and one exchange at a time, never its pool. It sends no RST_STREAM, so closing is
what stops a generation; `abort()` closes the socket in its very step. What it cannot do: it reads only after the whole
request is sent (an early answer waits), and drops 1xx heads and trailers.

Invariants: the head goes through the same checks as any other before a byte of it is passed on, since httpcore makes
none. A body that HTTP/2 does not declare complete aborts the flow. A connection on which anything waits when it is
wanted again is not reused, even if it may be harmless (a PING): there is no way to let httpcore look without waiting.
The deadline that runs is that of the side whose turn it is.
"""

from __future__ import annotations

import contextlib
import http
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Self, final

import h2.events
import h2.exceptions
import httpcore
import trio
from trio.abc import Stream

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.messages import End, Headers, RequestHead, ResponseHead
from canal_trio.relay.flow import Aborted, FlowSender
from canal_trio.relay.idle import Reaper
from canal_trio.relay.streams import HandoverStream
from canal_trio.settings import Bounds, Deadlines
from canal_trio.upstream.frames import FrameFault, NetworkStream
from canal_trio.upstream.idle import has_hung_up, is_quiet, watch_hangup
from canal_trio.upstream.interface import Answer, BodySource
from canal_trio.upstream.turns import Turn, Turns
from canal_trio.wire.heads import ResponseHeadReader
from canal_trio.wire.targets import BaseUrl

__all__ = ["Http2Connection"]

_TROUBLE = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ConnectionNotAvailable,
    h2.exceptions.H2Error,  # httpcore lets some of them through
)
_FORBIDDEN = frozenset(
    {b"connection", b"http2-settings", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"}
)  # RFC 9113 8.2.2
_UNFIT = re.compile(rb"[\x00\r\n]")
_REFUSED_STREAM = 7  # RFC 9113 7: the upstream has done nothing for it
_UNWIND = 1.0  # seconds for httpcore to see that its socket is closed; it takes no time at all
_REASONS = {status.value: status.phrase.encode("ascii") for status in http.HTTPStatus}


class _UploadCut(Exception):
    """The client's body was cut: httpcore must not complete the request."""


@final
class Http2Connection:
    """A connection to one upstream. `stream` is ours to close; `raw` is its socket end, for a close in one step."""

    def __init__(
        self,
        stream: Stream,
        raw: HandoverStream,
        base: BaseUrl,
        *,
        reaper: Reaper,
        bounds: Bounds,
        deadlines: Deadlines,
    ) -> None:
        self._raw = raw
        self._base = base
        self._bounds = bounds
        self._turns = Turns(deadlines, reaper, self._expire)
        self._network = NetworkStream(
            stream, raw, piece_bytes=bounds.piece_bytes, early_bytes=bounds.upstream_receive_bytes
        )
        self._http = httpcore.AsyncHTTP2Connection(self._url(b"/").origin, self._network)
        self._used = False
        self._reset()

    def _reset(self) -> None:
        self.reusable = False
        self._relaying = False  # the final head was passed on
        self._failure: Failure | None = None
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Http2Connection to {self._base.host}, {self._turns.turn.name.lower()}>"

    @property
    def sent(self) -> bool:
        """See `canal_trio.upstream.interface.Connection`. Known when the answer comes: it is not read before."""
        return self._relaying

    def usable(self) -> bool:
        """Nothing has arrived and the peer has not hung up since the last exchange. One system call."""
        return self._http.is_available() and not self._network.frames.going_away and is_quiet(self._raw)

    def watch_idle(self, died: Callable[[], None] | None) -> None:
        """See `canal_trio.upstream.interface.Connection`."""
        watch_hangup(self._raw, died)

    def ends(self) -> bool:
        """See `canal_trio.upstream.interface.Connection`."""
        return self._failure is not None or has_hung_up(self._raw)

    def abort(self) -> None:
        """Close the socket in this very step. Idempotent."""
        self._turns.stop()
        self._network.close()

    straight: None = None  # what it does needs a task of its own

    async def run(self, head: RequestHead, body: BodySource | None, answer: Answer) -> Failure | None:
        """One attempt; see `canal_trio.upstream.interface.Connection`. A request to upgrade goes without the wish."""
        self._reset()
        self._turns.begin(Turn.SEND)
        with self._scope:
            await self._exchange(head, body, answer)
        self._turns.begin(Turn.NOBODY)
        if self._failure is not None:
            answer.body.abort(self._failure)
            self.reusable = False
        self._used = True
        return self._failure

    def _expire(self, failure: Failure) -> None:
        """A deadline has passed."""
        self._note(failure)
        self._scope.cancel(reason=failure.detail)

    def _note(self, failure: Failure) -> None:
        self._failure = self._failure or failure  # the first one counts

    async def _trace(self, name: str, _info: dict[str, Any]) -> None:
        """httpcore's report of its steps; these few are all that is asked of it."""
        if name == "http2.receive_response_headers.started":
            self._network.uploading = False
            self._turns.begin(Turn.ANSWER)

    # -- the exchange --------------------------------------------------------------------------------------------------

    def _url(self, target: bytes) -> httpcore.URL:
        base = self._base
        return httpcore.URL(scheme=base.scheme, host=base.host, port=base.port, target=target)

    async def _exchange(self, head: RequestHead, body: BodySource | None, answer: Answer) -> None:
        has_body = b"content-length" in head.headers or b"transfer-encoding" in head.headers
        dropped = _FORBIDDEN - {b"transfer-encoding"}  # that one tells httpcore of a body, and goes no further
        request = httpcore.Request(
            head.method,
            self._url(head.target),
            headers=[(name, value) for name, lower, value in head.headers.lowered() if lower not in dropped],
            content=_Upload(self._turns, body if has_body else None),
            extensions={"trace": self._trace},
        )
        self._network.begin()
        try:
            response = await self._http.handle_async_request(request)
        except _UploadCut:
            cause = body.ending.failure if body is not None and isinstance(body.ending, Aborted) else None
            self._note(cause if isinstance(cause, Failure) else Failure(Side.CLIENT, Phase.UPLOAD, Kind.CUT))
            return
        except _TROUBLE as exc:
            self._note(self._verdict(exc))
            return
        except ValueError:  # httpcore reads `:status` as a number without looking at it
            self._note(_malformed("The status code is not one of HTTP."))
            return
        final = _response_head(response, self._bounds)
        if isinstance(final, Failure):
            self._note(final)
            return
        await answer.head(final)
        self._relaying = True
        self._turns.begin(Turn.BODY)
        bodyless = head.method == b"HEAD" or final.status in (204, 304)
        await self._body(response, answer.body, bodyless=bodyless)

    async def _body(self, response: httpcore.Response, sender: FlowSender, *, bodyless: bool) -> None:
        pieces = aiter(response.stream)  # type: ignore[arg-type]  # the async kind, from an async connection
        try:
            if not await self._relay(pieces, sender, bodyless=bodyless):
                return
            await response.aclose()
        except _TROUBLE as exc:
            self._note(self._verdict(exc))
            return
        finally:
            await self._unwind(pieces)
        # No checkpoint from here on: whoever hears the end does not wait for us.
        self.reusable = self._http.is_idle() and self._http.is_available() and not self._network.frames.going_away
        sender.end(End())

    async def _relay(self, pieces: AsyncIterator[bytes], sender: FlowSender, *, bodyless: bool) -> bool:
        """Put the pieces, waiting for room. False: there is no clean end, or nobody takes it."""
        async for piece in pieces:
            if bodyless and piece:
                self._note(_malformed("It sent a body where there is none.", Phase.STREAM))
                return False
            self._turns.begin(Turn.CLIENT)
            try:
                await sender.put(piece)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False  # the driver takes no more; it has noted why
            self._turns.begin(Turn.BODY)
        return True

    async def _unwind(self, pieces: AsyncIterator[bytes]) -> None:
        """Let httpcore's generators end here and not in the garbage collector's hands. At once, if they have ended.

        Otherwise the connection can only be closed, and that is what ends them: the next step of theirs fails.
        """
        if not self._ended(pieces):
            self.abort()
            with (
                trio.CancelScope(shield=True, deadline=trio.current_time() + _UNWIND),
                contextlib.suppress(*_TROUBLE, StopAsyncIteration),
            ):
                await anext(pieces)

    @staticmethod
    def _ended(pieces: AsyncIterator[bytes]) -> bool:
        return getattr(pieces, "ag_frame", None) is None

    # -- what went wrong -----------------------------------------------------------------------------------------------

    def _verdict(self, exc: Exception) -> Failure:
        """What httpcore's exception means, by how far the response had come."""
        event = exc.args[0] if exc.args else None
        phase = Phase.STREAM if self._relaying else Phase.FIRST_BYTE
        if isinstance(event, h2.events.StreamReset):
            detail = f"It reset the stream (HTTP/2 error {int(event.error_code)})."
            if not self._relaying and event.error_code == _REFUSED_STREAM:
                return Failure(Side.UPSTREAM, phase, Kind.REFUSED, detail, Retry.UNSENT)
            return Failure(Side.UPSTREAM, phase, Kind.RESET, detail, Retry.NO if self._relaying else Retry.SENT)
        if isinstance(exc, h2.exceptions.H2Error | httpcore.LocalProtocolError | FrameFault):
            return _malformed(f"It breaks the rules of HTTP/2: {event}.", phase)
        goaway = event if isinstance(event, h2.events.ConnectionTerminated) else None
        # RFC 9113 6.8: a stream above the last one that GOAWAY names was not looked at.
        unseen = isinstance(exc, httpcore.ConnectionNotAvailable) or (goaway is not None and not goaway.last_stream_id)
        if unseen or goaway is not None:
            detail = "It takes no more requests on this connection (GOAWAY)."
        else:
            detail = f"The connection ended: {str(event).removesuffix('.')}."
        if self._relaying:
            return Failure(Side.UPSTREAM, phase, Kind.CUT, detail)
        if self._used:
            return Failure(Side.UPSTREAM, phase, Kind.STALE, detail, Retry.FRESH)
        if unseen:
            return Failure(Side.UPSTREAM, phase, Kind.REFUSED, detail, Retry.UNSENT)
        return Failure(Side.UPSTREAM, phase, Kind.CUT, detail, Retry.SENT)


@final
class _Upload:
    """The request body as httpcore takes it. Not an async generator: nothing of it outlives a cancelled request."""

    def __init__(self, turns: Turns, body: BodySource | None) -> None:
        self._turns = turns
        self._body = body

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        body = self._body
        if body is None:
            raise StopAsyncIteration
        if body.ending is None:
            self._turns.begin(Turn.CLIENT)
            pieces = await body.take()
            self._turns.begin(Turn.SEND)
            if pieces:
                return b"".join(pieces)
        if isinstance(body.ending, Aborted):
            raise _UploadCut
        raise StopAsyncIteration


def _malformed(detail: str, phase: Phase = Phase.FIRST_BYTE) -> Failure:
    return Failure(Side.UPSTREAM, phase, Kind.MALFORMED, detail)


def _response_head(response: httpcore.Response, bounds: Bounds) -> ResponseHead | Failure:
    """The head without what HTTP/2 forbids, judged as one that came over HTTP/1.1: by the same reader."""
    if response.status < 200:
        return _malformed("The status code is not one of HTTP.")
    lines = [b"HTTP/1.1 %d %b\r\n" % (response.status, _REASONS.get(response.status, b""))]
    for name, value in response.headers:
        if b":" in name or _UNFIT.search(name) or _UNFIT.search(value):
            return _malformed("A field holds a byte that does not belong there.")
        if name.lower() not in _FORBIDDEN:
            lines.append(b"%b: %b\r\n" % (name, value))
    reader = ResponseHeadReader(head_bytes=bounds.head_bytes, head_fields=bounds.head_fields)
    head = reader.feed(b"".join([*lines, b"\r\n"]))
    if head is None or isinstance(head, Failure):
        return head or _malformed("The head is not complete.")
    return replace(head, headers=Headers(head.headers), version=b"2")
