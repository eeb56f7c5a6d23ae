"""HTTP/1.1 read strictly, by rules of its own: what simulated peers make of the gateway's bytes.

Nothing here uses `canal_trio.wire`: a judge that shares the product's parser shares its mistakes. `feed` takes bytes
however they are cut. Invariant: whatever a careful recipient could read in two ways raises `Unfit`.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import final

__all__ = ["Message", "StrictReader", "Unfit"]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_FIELD = rb"(%b):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*\r\n" % _TOKEN
_FIELDS = re.compile(rb"(?:%b:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n" % _TOKEN)
_EACH = re.compile(_FIELD)
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2}) [\t\x20-\x7e\x80-\xff]*\r\n")
_REQUEST = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/1\.1\r\n" % _TOKEN)
_SIZE = re.compile(rb"[0-9a-fA-F]{1,16}\r\n")
_HEAD_BYTES = 65_536


class Unfit(Exception):
    """The bytes break a rule. The text says which."""


@dataclass(slots=True)
class Message:
    """One message as far as it has come. `complete`: to the last byte, as its framing tells."""

    start: tuple[bytes, ...]  # (method, target) or (status,)
    fields: dict[bytes, list[bytes]]  # by lower-case name
    framing: str = "none"  # "none", "length", "chunked", "close", "tunnel"
    body: bytearray = field(default_factory=bytearray)
    trailers: dict[bytes, list[bytes]] = field(default_factory=dict)
    complete: bool = False
    begun: float = 0.0  # for whoever reads: when the head was whole
    informational: int = 0  # heads of 1xx before it

    @property
    def status(self) -> int:
        """Of a response."""
        return int(self.start[0])

    def get(self, name: bytes) -> bytes | None:
        """The first value of a field by its lower-case name."""
        values = self.fields.get(name)
        return values[0] if values else None


@final
class StrictReader:
    """Requests, or with `responses` the responses to the methods that are appended to `asked`."""

    def __init__(self, *, responses: bool = False) -> None:
        self.messages: list[Message] = []
        self.asked: deque[bytes] = deque()
        self._responses = responses
        self._buffer = bytearray()
        self._left = 0  # bytes of the present length, or chunk
        self._state = self._head
        self._informational = 0

    @property
    def current(self) -> Message | None:
        """The message that has begun and is not complete."""
        return self.messages[-1] if self.messages and not self.messages[-1].complete else None

    @property
    def pending(self) -> int:
        """Bytes that belong to no message yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """More bytes have come."""
        self._buffer += data
        while self._state():
            pass

    def eof(self) -> None:
        """The connection ended in the proper way: the end of a body that nothing else delimits."""
        current = self.current
        if current is not None and current.framing in ("close", "tunnel"):
            current.complete = True

    # -- states: True if there may be more to do -----------------------------------------------------------------------

    def _head(self) -> bool:
        buffer = self._buffer
        if not buffer:
            return False
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > _HEAD_BYTES:
                raise Unfit("a head without an end")
            return False
        head = bytes(buffer[: end + 4])
        del buffer[: end + 4]
        start = (_STATUS if self._responses else _REQUEST).match(head)
        if start is None:
            raise Unfit(f"not a start line: {head[:80]!r}")
        if not _FIELDS.fullmatch(head, start.end()):
            raise Unfit(f"not fields: {head[start.end() :]!r}")
        message = Message(start.groups(), _fields(head, start.end()))
        if self._responses:
            return self._response(message)
        if len(message.fields.get(b"host", ())) != 1:
            raise Unfit(f"Host: {message.fields.get(b'host')}")
        self.messages.append(message)
        self._frame(message, until_close=False)
        return True

    def _response(self, message: Message) -> bool:
        status = message.status
        if status < 200 and status != 101:
            if message.get(b"content-length") or message.get(b"transfer-encoding"):
                raise Unfit("framing in an informational head")
            self._informational += 1
            return True
        if not self.asked:
            raise Unfit(f"a response nobody asked for: {message.start}")
        method = self.asked.popleft()
        message.informational, self._informational = self._informational, 0
        self.messages.append(message)
        if status == 101:
            message.framing, self._state = "tunnel", self._raw
        elif method == b"HEAD" or status in (204, 304):
            message.complete = True
            if status == 204 and (message.get(b"content-length") or message.get(b"transfer-encoding")):
                raise Unfit("framing in a 204")
        else:
            self._frame(message, until_close=True)
        return True

    def _frame(self, message: Message, *, until_close: bool) -> None:
        coding, length = message.fields.get(b"transfer-encoding"), message.fields.get(b"content-length")
        if coding and length:
            raise Unfit("content-length beside transfer-encoding")
        if coding:
            if [value.lower() for value in coding] != [b"chunked"]:
                raise Unfit(f"transfer-encoding: {coding}")
            message.framing, self._state = "chunked", self._size
        elif length:
            if len(length) != 1 or not length[0].isdigit():
                raise Unfit(f"content-length: {length}")
            message.framing, self._left, self._state = "length", int(length[0]), self._length
        elif until_close:
            message.framing, self._state = "close", self._raw
        else:
            message.complete = True

    def _take(self) -> None:
        message, size = self.messages[-1], min(self._left, len(self._buffer))
        message.body += self._buffer[:size]
        del self._buffer[:size]
        self._left -= size

    def _length(self) -> bool:
        self._take()
        if self._left:
            return False
        self.messages[-1].complete = True
        self._state = self._head
        return True

    def _raw(self) -> bool:
        self._left = len(self._buffer)
        self._take()
        return False

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def _size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        if not _SIZE.fullmatch(line):
            raise Unfit(f"not a chunk size: {line[:40]!r}")
        self._left = int(line, 16)
        self._state = self._chunk if self._left else self._trailer
        return True

    def _chunk(self) -> bool:
        self._take()
        if self._left or len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise Unfit("no CRLF after a chunk")
        del self._buffer[:2]
        self._state = self._size
        return True

    def _trailer(self) -> bool:
        line = self._line()
        if line is None:
            return False
        message = self.messages[-1]
        if line == b"\r\n":
            message.complete = True
            self._state = self._head
            return True
        if not _EACH.fullmatch(line):
            raise Unfit(f"not a trailer: {line!r}")
        message.trailers.update(_fields(line, 0))
        return True


def _fields(raw: bytes, at: int) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for match in _EACH.finditer(raw, at):
        found.setdefault(match[1].lower(), []).append(match[2])
    return found
