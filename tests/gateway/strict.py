"""A recording upstream that forgives nothing: what it flags as garbage, no gateway may ever send."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

__all__ = ["Recorded", "StrictUpstream", "Unfit", "strict_upstream"]

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_START = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) (HTTP/1\.1)")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok"


class Unfit(Exception):
    """The bytes break a rule."""


@dataclass(slots=True)
class Recorded:
    """One request, in the order of its bytes. `complete`: to the last byte of its body."""

    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    connection: int
    body: bytes = b""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    complete: bool = False

    def all(self, name: str) -> list[str]:
        """Every value of a field, by its lower-case name."""
        return [value for key, value in self.headers if key == name]


class StrictUpstream:
    """What was received: `requests` in order, `raw` bytes of each connection, and `garbage`, which must stay empty."""

    def __init__(self, port: int = 0, answer: Callable[[Recorded], bytes] = lambda _: OK) -> None:
        self.port = port
        self.answer = answer
        self.url = f"http://127.0.0.1:{port}"
        self.requests: list[Recorded] = []
        self.raw: list[bytearray] = []
        self.garbage: list[str] = []
        self.open = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection, to its end."""
        number = len(self.raw)
        self.raw.append(bytearray())
        reader = _Reader(stream, self.raw[number])
        self.open += 1
        try:
            async with stream:
                while True:
                    request = await _request(reader, self, number)
                    await stream.send_all(self.answer(request))
        except Unfit as exc:
            self.garbage.append(str(exc))
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.open -= 1

    @property
    def complete(self) -> list[Recorded]:
        """The requests that arrived whole."""
        return [request for request in self.requests if request.complete]

    @property
    def received(self) -> str:
        """Everything received, as latin-1."""
        return b"\n--\n".join(bytes(raw) for raw in self.raw).decode("latin-1")


class _Reader:
    def __init__(self, stream: trio.abc.Stream, raw: bytearray) -> None:
        self.stream = stream
        self.raw = raw
        self.at = 0

    async def more(self) -> bool:
        try:
            data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            return False
        self.raw += data
        return bool(data)

    async def line(self) -> str:
        while b"\n" not in self.raw[self.at :]:
            if not await self.more():
                raise EOFError
        end = self.raw.index(b"\n", self.at) + 1
        line = bytes(self.raw[self.at : end])
        self.at = end
        if not line.endswith(b"\r\n"):
            raise Unfit(f"a bare LF: {line!r}")
        return line[:-2].decode("latin-1")

    async def take(self, size: int) -> bytes:
        while len(self.raw) - self.at < size:
            if not await self.more():
                raise EOFError
        data = bytes(self.raw[self.at : self.at + size])
        self.at += size
        return data

    async def fields(self) -> list[tuple[str, str]]:
        found = []
        while line := await self.line():
            found.append(_field(line))
        return found


def parse_head(lines: list[str], connection: int = 0) -> Recorded:
    """The head in these lines, as a gateway may send it. Raises Unfit, for framing that is in doubt, too."""
    match = _START.fullmatch(lines[0])
    if match is None:
        raise Unfit(f"not a request line: {lines[0]!r}")
    request = Recorded(match[1], match[2], match[3], [_field(line) for line in lines[1:]], connection)
    if len(request.all("host")) != 1:
        raise Unfit(f"Host: {request.all('host')}")
    coding, length = request.all("transfer-encoding"), request.all("content-length")
    if coding and length:
        raise Unfit("content-length beside transfer-encoding")
    if coding and [value.lower() for value in coding] != ["chunked"]:
        raise Unfit(f"transfer-encoding {coding}")
    if length and (len(length) != 1 or not re.fullmatch(r"[0-9]+", length[0])):
        raise Unfit(f"content-length {length}")
    return request


def _field(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not re.fullmatch(_TOKEN, name):
        raise Unfit(f"not a field: {line!r}")
    if not _VALUE.fullmatch(value):
        raise Unfit(f"not a value: {line!r}")
    return name.lower(), value.strip(" \t")


async def _request(reader: _Reader, owner: StrictUpstream, connection: int) -> Recorded:
    lines = [await reader.line()]
    while line := await reader.line():
        lines.append(line)
    request = parse_head(lines, connection)
    owner.requests.append(request)
    coding, length = request.all("transfer-encoding"), request.all("content-length")
    if coding:
        while True:
            size = await reader.line()
            if not re.fullmatch(r"[0-9a-fA-F]{1,16}", size):
                raise Unfit(f"not a chunk size: {size!r}")
            if int(size, 16) == 0:
                break
            request.body += await reader.take(int(size, 16))
            if await reader.take(2) != b"\r\n":
                raise Unfit("no CRLF after a chunk")
        request.trailers = await reader.fields()
    elif length:
        request.body = await reader.take(int(length[0]))
    request.complete = True
    return request


@asynccontextmanager
async def strict_upstream(answer: Callable[[Recorded], bytes] = lambda _: OK) -> AsyncIterator[StrictUpstream]:
    """A strict upstream on loopback for the block."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=64)
    owner = StrictUpstream(listeners[0].socket.getsockname()[1], answer)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, owner.serve, listeners)
        try:
            yield owner
        finally:
            nursery.cancel_scope.cancel()
