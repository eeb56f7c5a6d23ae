"""The admin listener: `/livez`, `/readyz`, `/metrics`, `/streams`. GET and HEAD, nothing else.

A small HTTP/1.1 responder of its own on h11, apart from the gateway's pipeline, so that it answers while that one is
full, draining or broken. Invariants: a connection lives under deadlines at every step, holds at most one head, and
whatever a peer sends gets an answer that says what is wrong or a close, never an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, final

import h11
import msgspec
import trio

from canal_trio.observe.metrics import CONTENT_TYPE

__all__ = ["Admin"]

HEAD_BYTES = 16 * 1024
REQUESTS = 1000  # per connection
_PATHS = "/livez, /readyz, /metrics, /streams"
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"


class Shown(Protocol):
    """What the pages tell about: a gateway, or several as one."""

    @property
    def draining(self) -> bool:
        """Draining has begun."""

    def ready(self) -> bool:
        """New exchanges are welcome and an upstream is usable."""

    def exchanges(self) -> Iterable[object]:
        """The exchanges in flight, each a dataclass or a dictionary."""


class Page(Protocol):
    """What `/metrics` answers with."""

    def page(self) -> bytes:
        """The text for Prometheus. Not a checkpoint."""


@final
class Admin:
    """Answers on connections to the admin address. `deadline` is seconds for each step of a peer, `idle` between
    requests. `refresh`, if given, is awaited with the path before a page is read from `gateway` and `metrics`."""

    def __init__(
        self,
        gateway: Shown,
        metrics: Page,
        *,
        deadline: float = 10.0,
        idle: float = 75.0,
        refresh: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._refresh = refresh
        self._deadline = deadline
        self._idle = idle

    async def handle(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until it ends, then close it. Never raises for what the peer does."""
        try:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._serve(stream)
        finally:
            # Answers are small and were handed to the kernel: there is nothing to wait for.
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        for turn in range(REQUESTS):
            try:
                request = await self._request(stream, connection, first=turn == 0)
            except h11.RemoteProtocolError as exc:
                exc.__traceback__ = None  # it holds itself by h11's frame, and this connection with it
                status = exc.error_status_hint or 400
                await self._send(stream, connection, status, _TEXT, f"bad request: {exc}\n".encode(), close=True)
                await _linger(stream)
                return
            if request is None:
                return
            if self._refresh is not None:
                await self._refresh(request.target.partition(b"?")[0].decode("latin-1"))
            status, kind, body = self._answer(request)
            bodiless = request.method == b"HEAD"
            await self._send(stream, connection, status, kind, body, close=turn == REQUESTS - 1, bodiless=bodiless)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                await _linger(stream)
                return
            connection.start_next_cycle()

    async def _request(self, stream: trio.abc.Stream, connection: h11.Connection, *, first: bool) -> h11.Request | None:
        """The next request, its body (if any) refused unread; None when the peer left or took too long."""
        request: h11.Request | None = None
        started = False
        with trio.CancelScope(deadline=trio.current_time() + (self._deadline if first else self._idle)) as scope:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await stream.receive_some()
                    if not started and data:
                        started = True
                        scope.deadline = trio.current_time() + self._deadline
                    connection.receive_data(bytes(data))
                elif isinstance(event, h11.Request):
                    request = event
                    if _has_body(request):
                        return request
                elif isinstance(event, h11.EndOfMessage):
                    return request
                else:  # ConnectionClosed, PAUSED
                    return None
        return None

    async def _send(
        self,
        stream: trio.abc.Stream,
        connection: h11.Connection,
        status: int,
        kind: str,
        body: bytes,
        *,
        close: bool,
        bodiless: bool = False,
    ) -> None:
        headers = [("content-type", kind), ("content-length", str(len(body))), ("cache-control", "no-store")]
        if status == 405:
            headers.append(("allow", "GET, HEAD"))
        if close or connection.their_state is not h11.DONE:
            headers.append(("connection", "close"))
        head = connection.send(h11.Response(status_code=status, headers=headers)) or b""
        data = b"" if bodiless else connection.send(h11.Data(data=body)) or b""
        end = connection.send(h11.EndOfMessage()) or b""
        with trio.move_on_after(self._deadline) as scope:
            await stream.send_all(head + data + end)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the peer does not read")

    def _answer(self, request: h11.Request) -> tuple[int, str, bytes]:
        method, path = request.method, request.target.partition(b"?")[0]
        if request.http_version not in (b"1.0", b"1.1"):
            return 505, _TEXT, b"HTTP/1.1 or HTTP/1.0 is expected here\n"
        if method not in (b"GET", b"HEAD"):
            return 405, _TEXT, f"{method.decode()} is not allowed here; GET and HEAD are\n".encode()
        if _has_body(request):
            return 413, _TEXT, b"a request without a body is expected here\n"
        if path == b"/livez":
            return 200, _TEXT, b"alive\n"
        if path == b"/readyz":
            return self._ready()
        if path == b"/metrics":
            return 200, CONTENT_TYPE, self._metrics.page()
        if path == b"/streams":
            exchanges = list(self._gateway.exchanges())
            return 200, _JSON, msgspec.json.encode({"exchanges": exchanges}) + b"\n"
        return 404, _TEXT, f"nothing is here; there are {_PATHS}\n".encode()

    def _ready(self) -> tuple[int, str, bytes]:
        if self._gateway.draining:
            return 503, _TEXT, b"draining\n"
        if not self._gateway.ready():
            return 503, _TEXT, b"no usable upstream\n"
        return 200, _TEXT, b"ready\n"


def _has_body(request: h11.Request) -> bool:
    fields = dict(request.headers)
    return b"transfer-encoding" in fields or fields.get(b"content-length", b"0").strip(b"0") != b""


async def _linger(stream: trio.abc.Stream) -> None:
    """Let the answer arrive though something was left unread: closing now would send a reset (RFC 9112 9.6)."""
    with trio.move_on_after(1):
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
        for _ in range(16):
            if not await stream.receive_some(16 * 1024):
                return
