"""A raw client of the gateway's tests: requests as bytes, and responses read strictly by rules of its own.

Nothing here uses `canal_trio.wire`: a test that shares the product's parser shares its mistakes.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import trio

__all__ = ["Client", "Ended", "Response", "ask", "chat", "request"]

# -- requests ----------------------------------------------------------------------------------------------------------


def request(
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: bytes | None = None,
    *fields: str,
    version: str = "1.1",
) -> bytes:
    """A request as bytes, with a content-length if there is a body."""
    lines = [f"{method} {path} HTTP/{version}", "Host: gw.test", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chat(
    *fields: str, model: str = "m", stream: bool = True, version: str = "1.1", path: str = "/v1/chat/completions"
) -> bytes:
    """A chat completion request."""
    body = json.dumps({"model": model, "stream": stream, "messages": []}).encode()
    return request("POST", path, body, "Content-Type: application/json", *fields, version=version)


def ask(**wish: Any) -> bytes:
    """A chat request that tells the upstream what to do."""
    return request("POST", "/v1/chat/completions", json.dumps(wish).encode(), "Content-Type: application/json")


# -- responses ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Response:
    """One response as the client saw it. `complete`: by its framing the message looks finished."""

    status: int
    version: str
    headers: list[tuple[str, str]]
    raw_head: bytes
    informational: list[Response] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    framing: str = ""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    ended_by: str | None = None  # "fin" or "reset" when the connection ended it

    def header(self, name: str) -> str | None:
        """The first value of a field by its lower-case name."""
        return next((value for key, value in self.headers if key == name), None)

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        return [value for key, value in self.headers if key == name]

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a local answer, its shape checked: OpenAI's, whole, as JSON."""
        assert self.header("content-type") == "application/json", self.headers
        value = self.json
        assert set(value) == {"error"}, value
        assert set(value["error"]) == {"message", "type", "param", "code"}, value
        assert isinstance(value["error"]["message"], str)
        assert value["error"]["message"]
        assert isinstance(value["error"]["type"], str)
        return value["error"]


class Ended(Exception):
    """The connection ended before the message did."""


class Client:
    """A raw client over any Trio stream. Reads by rules of its own, strictly."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = bytearray()
        self.ended_by: str | None = None
        self.seen = bytearray()  # every byte that arrived

    async def send(self, data: bytes) -> None:
        """Send; a gateway that closed already is no trouble, what it answered is what counts."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.stream.send_all(data)

    async def fill(self, size: int = 65536) -> bool:
        """Read once. False: the connection has ended, see `ended_by`."""
        if self.ended_by is not None:
            return False
        try:
            data = await self.stream.receive_some(size)
        except trio.BrokenResourceError:
            self.ended_by = "reset"
            return False
        if not data:
            self.ended_by = "fin"
            return False
        self.buffer += data
        self.seen += data
        return True

    async def until(self, mark: bytes) -> bytes:
        """Bytes up to and with `mark`; `Ended` if the connection ends before."""
        while mark not in self.buffer:
            if not await self.fill():
                raise Ended(self.ended_by)
        end = self.buffer.index(mark) + len(mark)
        data = bytes(self.buffer[:end])
        del self.buffer[:end]
        return data

    async def exactly(self, size: int) -> bytes:
        """This many bytes."""
        while len(self.buffer) < size:
            if not await self.fill():
                raise Ended(self.ended_by)
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    async def rest(self) -> bytes:
        """All that comes until the connection ends."""
        while await self.fill():
            pass
        data = bytes(self.buffer)
        self.buffer.clear()
        return data

    async def head(self) -> Response:
        """The next response head."""
        raw = await self.until(b"\r\n\r\n")
        lines = raw[:-4].decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/(1\.[01]) ([1-9][0-9]{2}) ([^\r\n\x00]*)", lines[0])
        assert match, f"not a status line: {lines[0]!r}"
        headers = []
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            assert colon, f"not a field: {line!r}"
            assert re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name), f"not a field name: {name!r}"
            assert not re.search(r"[\x00\r\n]", value), f"not a field value: {value!r}"
            headers.append((name.lower(), value.strip(" \t")))
        return Response(int(match[2]), match[1], headers, raw)

    async def final_head(self) -> Response:
        """The next final head, the informational ones before it in `informational`."""
        heads: list[Response] = []
        while True:
            head = await self.head()
            if head.status >= 200 or head.status == 101:
                return replace(head, informational=heads)
            heads.append(head)

    async def response(self, method: str = "GET", version: str = "1.1") -> Response:
        """A whole response; `Ended` if not even its head came. A body that breaks off leaves `complete` False."""
        head = await self.final_head()
        await self.body(head, method)
        return head

    async def body(self, head: Response, method: str = "GET") -> None:
        """Read the body of `head`, to its end or the connection's."""
        coding, length = head.all("transfer-encoding"), head.all("content-length")
        assert not (coding and length), head.headers
        if method == "HEAD" or head.status in (204, 304) or head.status < 200:
            head.framing, head.complete = "none", True
            return
        body = bytearray()
        try:
            if coding:
                assert coding == ["chunked"], coding
                head.framing = "chunked"
                await self._chunked(head, body)
            elif length:
                assert len(length) == 1, length
                head.framing = "length"
                await self._length(int(length[0]), body)
            else:
                head.framing = "close"
                body += await self.rest()
            head.complete = head.framing != "close" or self.ended_by == "fin"
        except Ended:
            pass
        finally:
            head.body = bytes(body)
        head.ended_by = self.ended_by

    async def _length(self, left: int, body: bytearray) -> None:
        while left:
            if not self.buffer and not await self.fill():
                raise Ended
            taken = self.buffer[:left]
            del self.buffer[: len(taken)]
            body += taken
            left -= len(taken)

    async def _chunked(self, head: Response, body: bytearray) -> None:
        while True:
            line = await self.until(b"\r\n")
            assert re.fullmatch(rb"[0-9a-fA-F]{1,16}\r\n", line), f"not a chunk size: {line!r}"
            size = int(line, 16)
            if size == 0:
                break
            await self._length(size, body)
            assert await self.exactly(2) == b"\r\n"
        while (line := await self.until(b"\r\n")) != b"\r\n":
            name, colon, value = line[:-2].decode("latin-1").partition(":")
            assert colon, line
            head.trailers.append((name.lower(), value.strip()))

    def fin(self) -> None:
        """Close in the usual way: FIN. (With unread input the kernel makes it a reset.)"""
        self._socket.close()

    def reset(self) -> None:
        """Close with a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def shutdown(self) -> None:
        """Half-close: our side only."""
        self._socket.shutdown(socket.SHUT_WR)

    @property
    def _socket(self) -> Any:
        assert isinstance(self.stream, trio.SocketStream)
        return self.stream.socket
