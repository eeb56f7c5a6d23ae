"""A scripted upstream: a real server on loopback that says exactly what a test wrote, and remembers what it saw.

    from canal_trio.testing.scripts import chat_stream, cut_after
    from canal_trio.testing.upstreams import ScriptedUpstream, by_model

    async with ScriptedUpstream(chat_stream(20, gap=0.01)) as upstream:
        ...                              # point the gateway, or a client, at upstream.base_url
        await upstream.until(lambda: upstream.requests[0].tokens >= 3)
        ...                              # make the client leave
        await upstream.until(lambda: upstream.requests[0].left is not None)
        assert upstream.requests[0].tokens < 20
    assert upstream.complaints == []

The answer is one script for every request, `in_order(first, second, …)`, `by_model({"good": …, "cut": …})`, or any
function from the request seen to a script, which is asked when the body is complete (`early=True`: right after the
head). Requests are parsed by h11, each one by a fresh parser; one that breaks the
rules is answered 400 and noted in `complaints`. Times are seconds on Trio's clock.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeAlias, final

import h11
import trio

from canal_trio.testing.scripts import (
    Close,
    Echo,
    Forever,
    Pause,
    Reset,
    Script,
    Send,
    Stall,
    Step,
    WaitFor,
    openai_error,
)

__all__ = ["Answer", "ScriptedUpstream", "SeenConnection", "SeenRequest", "by_model", "in_order"]

READ_BYTES = 65536
SLICE_BYTES = 16384  # so that `sent` follows what the kernel took
LINGER = 2.0  # how long a `Cut` waits for the peer's own end, so that its FIN is not overtaken by an RST

Stream: TypeAlias = "trio.SocketStream | trio.SSLStream[trio.SocketStream]"


@dataclass(slots=True)
class SeenRequest:
    """One request as it arrived, and how far its answer came. Filled in while it happens."""

    connection: SeenConnection = field(repr=False)
    method: str
    target: str
    headers: list[tuple[str, str]]  # lower-case names, in order
    head: bytes = b""  # the raw head, blank line included
    pieces: list[bytes] = field(default_factory=list, repr=False)  # of the body, decoded, as they came
    complete: bool = False  # the body was read to its end
    tokens: int = 0  # tokens whose bytes the kernel took
    sent: int = 0  # bytes the kernel took
    answered: bool = False  # every step was played
    left: float | None = None  # when the peer was seen to leave before that

    def header(self, name: str) -> str | None:
        """The first value of a field, by its lower-case name."""
        return next((value for field_name, value in self.headers if field_name == name), None)

    @property
    def body(self) -> bytes:
        """What came of the body so far, decoded."""
        return b"".join(self.pieces)

    @property
    def json(self) -> dict[str, object]:
        """The body as a JSON object; empty if it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


@dataclass(slots=True)
class SeenConnection:
    """One accepted connection. `left` is when its FIN or RST was seen, `left_by` which of them it was."""

    number: int
    opened: float
    requests: list[SeenRequest] = field(default_factory=list)
    received: int = 0  # bytes
    left: float | None = None
    left_by: str | None = None  # "fin" or "reset"
    closed: bool = False


Answer: TypeAlias = "Script | Callable[[SeenRequest], Script]"


def in_order(*scripts: Script) -> Callable[[SeenRequest], Script]:
    """The first script for the first request, and so on; the last one for all that follow."""
    waiting = list(scripts)
    return lambda request: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def by_model(scripts: Mapping[str, Answer]) -> Callable[[SeenRequest], Script]:
    """The script named by the `model` of the request's JSON body; 404 for any other."""

    def choose(request: SeenRequest) -> Script:
        answer = scripts.get(str(request.json.get("model")))
        if answer is None:
            return openai_error(404, "no such script", code="model_not_found")
        return answer if isinstance(answer, Script) else answer(request)

    return choose


@final
class ScriptedUpstream:
    """A server on loopback that plays scripts. Use it as an async context manager; leaving it closes everything.

    `base_url` ends in `/v1`, as one gives it to an SDK; `url` is the bare root. `ssl_context` makes it speak TLS.
    `receive_buffer` and `send_buffer` (bytes) shrink its sockets' kernel buffers, for tests that count bytes.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        early: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        receive_buffer: int | None = None,
        send_buffer: int | None = None,
    ) -> None:
        self.answer = answer  # may be exchanged at any time; the next request gets it
        self.connections: list[SeenConnection] = []
        self.requests: list[SeenRequest] = []
        self.complaints: list[str] = []
        self.host = host
        self.port = port
        self.early = early
        self._ssl_context = ssl_context
        self._buffers = {socket.SO_RCVBUF: receive_buffer, socket.SO_SNDBUF: send_buffer}
        self._changed = trio.lowlevel.ParkingLot()
        self._running: AbstractAsyncContextManager[None] | None = None

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self._ssl_context else 'http'}://{self.host}:{self.port}"

    @property
    def base_url(self) -> str:
        """What one gives to an OpenAI SDK."""
        return f"{self.url}/v1"

    @property
    def open_connections(self) -> int:
        """Connections that neither side has left."""
        return sum(seen.left is None and not seen.closed for seen in self.connections)

    async def __aenter__(self) -> Self:
        self._running = self._run()
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not told of the caller's own exception, which would come back to it wrapped in a group.
        assert self._running is not None
        await self._running.__aexit__(None, None, None)

    async def until(self, condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
        """Wait until `condition()` holds; it is looked at whenever this upstream saw or did something.

        Raises AssertionError after `seconds`.
        """
        with trio.move_on_after(seconds):
            while not condition():
                await self._changed.park()
        if not condition():
            raise AssertionError(f"not seen in {seconds} s; requests: {self.requests}; complaints: {self.complaints}")

    def note(self) -> None:
        """Something changed: let `until` look again."""
        self._changed.unpark_all()

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        listeners = await trio.open_tcp_listeners(self.port, host=self.host, backlog=1024)
        for listener in listeners:
            for option, size in self._buffers.items():
                if size is not None:
                    listener.socket.setsockopt(socket.SOL_SOCKET, option, size)  # accepted sockets inherit it
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, listeners)
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, raw: trio.SocketStream) -> None:
        stream: Stream = raw
        if self._ssl_context is not None:
            stream = trio.SSLStream(raw, self._ssl_context, server_side=True)
        seen = SeenConnection(len(self.connections), trio.current_time())
        self.connections.append(seen)
        try:
            if isinstance(stream, trio.SSLStream):
                await stream.do_handshake()
            await _Conversation(self, seen, raw, stream).run()
        except* h11.RemoteProtocolError as group:
            self.complaints.append(f"malformed request: {group.exceptions[0]}")
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.send_all(openai_error(400, "malformed request").wire)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as group:
            if seen.left is None:
                seen.left, seen.left_by = trio.current_time(), "reset"
            causes = [error.__cause__ for error in group.exceptions]
            self.complaints += [f"TLS: {cause}" for cause in causes if isinstance(cause, ssl.SSLError)]
        finally:
            seen.closed = True
            raw.socket.close()
            self.note()


@final
class _Conversation:
    """One connection: a reader that never rests (so that leaving is seen at once) and the player of scripts."""

    def __init__(self, owner: ScriptedUpstream, seen: SeenConnection, raw: trio.SocketStream, stream: Stream) -> None:
        self._upstream = owner
        self._seen = seen
        self._raw = raw
        self._stream = stream
        self._unused = bytearray()
        self._moved = trio.lowlevel.ParkingLot()  # `_unused` grew or shrank, or the peer left
        self._current: SeenRequest | None = None
        self._lingering = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, nursery.cancel_scope)
            while await self._exchange():
                pass
            nursery.cancel_scope.cancel()

    async def _read(self, scope: trio.CancelScope) -> None:
        seen = self._seen
        while True:
            try:
                await self._room()
                data = await self._stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                data, seen.left_by = b"", "reset"
            except trio.ClosedResourceError:
                return  # a `Reset` of our own
            if not data:
                break
            seen.received += len(data)
            if not self._lingering:
                self._unused += data
                self._moved.unpark_all()
                self._upstream.note()
        seen.left = trio.current_time()
        seen.left_by = seen.left_by or "fin"
        if self._current is not None and not self._current.answered:
            self._current.left = seen.left
        self._upstream.note()
        scope.cancel()

    async def _room(self) -> None:
        """Wait until the script has taken what was read, seeing the peer break the connection meanwhile."""
        poll = select.poll()
        poll.register(self._raw.socket.fileno(), 0)  # errors and hang-ups are always reported
        while len(self._unused) >= READ_BYTES:
            with trio.move_on_after(0.02):
                await self._moved.park()
            if poll.poll(0):
                raise trio.BrokenResourceError("the peer broke the connection")

    async def _more(self) -> bytes:
        """What arrived since; waits for it. The reader ends the conversation when nothing comes any more."""
        while not self._unused:
            await self._moved.park()
        data = bytes(self._unused)
        self._unused.clear()
        self._moved.unpark_all()
        return data

    async def _exchange(self) -> bool:
        """Read one request and answer it. False: nothing follows on this connection."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        request = await self._head(parser)
        answer = self._upstream.answer
        if not isinstance(answer, Script):
            if not self._upstream.early:
                await self._body(parser, request)
            answer = answer(request)
        if answer.body == "before" and not request.complete:
            await self._body(parser, request)
        async with trio.open_nursery() as nursery:
            if answer.body == "during":
                nursery.start_soon(self._body, parser, request)
            again = await self._play(request, answer.steps)
            if not again:
                nursery.cancel_scope.cancel()
        request.answered = True
        self._current = None
        self._upstream.note()
        return again and request.complete

    async def _head(self, parser: h11.Connection) -> SeenRequest:
        raw = bytearray()
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Request):
                break
            data = await self._more()
            raw += data
            parser.receive_data(data)
        end = min((raw.find(mark) + len(mark) for mark in (b"\r\n\r\n", b"\n\n") if mark in raw), default=len(raw))
        request = SeenRequest(
            self._seen,
            event.method.decode("ascii"),
            event.target.decode("latin-1"),
            [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers],
            bytes(raw[:end]),
        )
        self._seen.requests.append(request)
        self._upstream.requests.append(request)
        self._current = request
        self._upstream.note()
        return request

    async def _body(self, parser: h11.Connection, request: SeenRequest) -> None:
        while not request.complete:
            event = parser.next_event()
            if isinstance(event, h11.EndOfMessage):
                request.complete = True
            elif isinstance(event, h11.Data):
                request.pieces.append(bytes(event.data))
            elif event is h11.NEED_DATA:
                if parser.they_are_waiting_for_100_continue:
                    await self._stream.send_all(parser.send(h11.InformationalResponse(status_code=100, headers=[])))
                parser.receive_data(await self._more())
            self._upstream.note()
        if parser.their_state is not h11.SEND_BODY and (rest := parser.trailing_data[0]):
            self._unused[:0] = rest
            self._moved.unpark_all()

    async def _play(self, request: SeenRequest, steps: tuple[Step, ...]) -> bool:
        """Play the steps. False when one of them ended the connection."""
        for step in steps:
            match step:
                case Send():
                    await self._send(request, step)
                case Pause(seconds):
                    await trio.sleep(seconds)
                case WaitFor(event):
                    await event.wait()
                case Stall():
                    await trio.sleep_forever()
                case Echo():
                    while True:
                        await self._send(request, Send(await self._more()))
                case Forever(inner):
                    while True:
                        await self._play(request, inner)
                case _:
                    await self._break_off(request, step)
                    return False
        return True

    async def _send(self, request: SeenRequest, step: Send) -> None:
        view = memoryview(step.data)
        for start in range(0, len(view), SLICE_BYTES):
            piece = view[start : start + SLICE_BYTES]
            await self._stream.send_all(piece)
            request.sent += len(piece)
            self._upstream.note()
        request.tokens += step.tokens
        self._upstream.note()

    async def _break_off(self, request: SeenRequest, step: Step) -> None:
        request.answered = True
        if isinstance(step, Reset):
            self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._raw.socket.close()
            return
        if isinstance(step, Close) and isinstance(self._stream, trio.SSLStream):
            with trio.move_on_after(LINGER):
                await self._stream.aclose()
            return
        self._raw.socket.shutdown(socket.SHUT_WR)
        self._lingering = True
        with trio.move_on_after(LINGER):
            await trio.sleep_forever()  # the reader ends it when the peer has closed as well
