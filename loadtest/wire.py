"""Reads HTTP/1.1 responses and bodies piece by piece: just enough for a load generator, and strict about endings.

Pure. Invariants: the payload does not depend on how the bytes were split; `done` only after a complete message;
`eof()` on anything less leaves `done` false. A chunked body is complete only with its last chunk *and* the blank line.
Bounds: a head of 64 KiB, a chunk-size line of 64 bytes; beyond, `Malformed`.
"""

from __future__ import annotations

import re

__all__ = ["BodyDecoder", "Malformed", "Response", "stamps"]

MOST_HEAD = 65536
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)
_STAMP = re.compile(rb'(?:"t": ?| @)(\d{9,19})(?=\D)')
_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}\Z")

_SIZE_LINE, _DATA, _DATA_END, _TRAILER, _COUNTED, _UNTIL_CLOSE = range(6)


class Malformed(Exception):
    """The peer's bytes are no HTTP; the text says which."""


def stamps(payload: bytes) -> list[int]:
    """The monotonic nanoseconds that complete stamps in `payload` carry."""
    return [int(digits) for digits in _STAMP.findall(payload)]


def _whole_chunks(data: bytes, out: list[bytes]) -> int:
    """Take the chunks that lie whole at the beginning of `data`, none of them the last; where they end."""
    at, length, find, known = 0, len(data), data.find, _known_sizes
    while (end := find(b"\r\n", at, at + 18)) > 0:
        line = data[at:end]
        size = known.get(line)
        if size is None:
            if not _SIZE.match(line) or not (size := int(line, 16)):
                break
            if len(known) < 4096:
                known[line] = size
        after = end + 2 + size
        if after + 2 > length or data[after : after + 2] != b"\r\n":
            break
        out.append(data[end + 2 : after])
        at = after + 2
    return at


_known_sizes: dict[bytes, int] = {}


class BodyDecoder:
    """One body: `feed` takes wire bytes and gives payload; what follows the body is left in `rest`."""

    __slots__ = ("_buffer", "_state", "done", "left", "rest")

    def __init__(self, length: int | None) -> None:
        """`length` bytes, or chunked (-1), or until the end of the connection (None)."""
        self.left = max(length or 0, 0)
        self._state = _UNTIL_CLOSE if length is None else _SIZE_LINE if length == -1 else _COUNTED
        self.done = length == 0
        self._buffer = b""
        self.rest = b""

    @property
    def until_close(self) -> bool:
        """Only the end of the connection ends this body."""
        return self._state == _UNTIL_CLOSE

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`; raises `Malformed`."""
        state = self._state
        if state < _COUNTED:
            return self._chunked(data)
        return self._counted(data) if state == _COUNTED else data

    def _counted(self, data: bytes) -> bytes:
        if self.done:
            self.rest += data
            return b""
        if len(data) > self.left:
            self.rest = data[self.left :]
            data = data[: self.left]
        self.left -= len(data)
        self.done = self.left == 0
        return data

    def _chunked(self, data: bytes) -> bytes:
        if self.done:
            self.rest += data
            return b""
        if self._state == _SIZE_LINE and not self._buffer:
            # The usual case: one read is exactly one chunk.
            end = data.find(b"\r\n", 1, 18)
            if end > 0 and _SIZE.match(data, 0, end):
                size = int(data[:end], 16)
                if size and len(data) == end + size + 4 and data.endswith(b"\r\n"):
                    return data[end + 2 : -2]
        return self._slow(data)

    def _slow(self, data: bytes) -> bytes:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        out: list[bytes] = []
        at, length = 0, len(data)
        if self._state == _SIZE_LINE:
            at = _whole_chunks(data, out)
        while at < length and not self.done:
            if self._state == _DATA:
                piece = data[at : at + self.left]
                out.append(piece)
                at += len(piece)
                self.left -= len(piece)
                if not self.left:
                    self._state = _DATA_END
                continue
            end = data.find(b"\r\n", at, at + 66)
            if end < 0:
                if length - at > 64:
                    raise Malformed(f"a chunk-size line of {length - at} bytes")
                self._buffer = data[at:]
                return b"".join(out)
            self._line(data[at:end])
            at = end + 2
        if self.done:
            self.rest += data[at:]
        return b"".join(out)

    def _line(self, line: bytes) -> None:
        if self._state == _SIZE_LINE:
            size = line.partition(b";")[0].rstrip(b" \t")
            if not _SIZE.match(size):
                raise Malformed(f"not a chunk size: {line[:40]!r}")
            self.left = int(size, 16)
            self._state = _DATA if self.left else _TRAILER
        elif self._state == _DATA_END:
            if line:
                raise Malformed(f"bytes after a chunk: {line[:40]!r}")
            self._state = _SIZE_LINE
        elif not line:  # the blank line after the last chunk and its trailers
            self.done = True


class Response:
    """One response to one request: `feed` takes wire bytes, gives payload."""

    __slots__ = ("_body", "_head", "close", "head", "headed", "method", "status")

    def __init__(self, method: str = "POST") -> None:
        self.method = method
        self.status = 0
        self.head = b""
        self.close = False
        self.headed = False
        self._head = b""
        self._body: BodyDecoder | None = None

    @property
    def done(self) -> bool:
        """The message is complete."""
        return self._body is not None and self._body.done

    @property
    def rest(self) -> bytes:
        """What came after the message."""
        return self._body.rest if self._body is not None else b""

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`; raises `Malformed`."""
        if self._body is not None:
            return self._body.feed(data)
        data = self._head + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MOST_HEAD:
                raise Malformed("a head without an end")
            self._head = data
            return b""
        head = data[: end + 4]
        found = _STATUS.match(head)
        if not found:
            raise Malformed(f"not a status line: {head[:60]!r}")
        self._head = b""
        status = int(found[1])
        if 100 <= status < 200 and status != 101:
            return self.feed(data[end + 4 :])
        self.status, self.head, self.headed = status, head, True
        self._body = BodyDecoder(self._length(head))
        self.close = self.close or bool(_CLOSE.search(head)) or head.startswith(b"HTTP/1.0")
        return self._body.feed(data[end + 4 :]) if end + 4 < len(data) else b""

    def _length(self, head: bytes) -> int | None:
        if self.method == "HEAD" or self.status in {204, 304}:
            return 0
        if _CHUNKED.search(head):
            return -1
        if found := _LENGTH.search(head):
            return int(found[1])
        self.close = True
        return None

    def eof(self) -> bool:
        """The connection has ended: is the message complete? Only a close-delimited one becomes so by this."""
        if self._body is not None and self._body.until_close:
            self._body.done = True
        return self.done
