"""One accepted connection of the upstream: reads requests one after another, keeps what its socket did not take.

Invariant: a peer's FIN or RST is seen in every state, while a request is read slowly too, and noted exactly once.
"""

from __future__ import annotations

import fcntl
import json
import re
import select
import socket
import sys
import termios
import time
import urllib.parse
from typing import TYPE_CHECKING

from loadtest import bodies
from loadtest.answer import Answer
from loadtest.wire import BodyDecoder, Malformed

if TYPE_CHECKING:
    from loadtest.upstream import Upstream

__all__ = ["Connection"]

_READ = select.EPOLLIN | select.EPOLLRDHUP
_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_USER = re.compile(rb'"user"\s*:\s*"([^"\\]{0,400})"')
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_OWN = re.compile(rb"GET (/_loadtest/|/v1/models |/models )")
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)
_KEPT = 65536  # of a request's body, where `user` and `stream` are looked for
_now = time.monotonic_ns


class Connection:
    """One accepted socket: requests one after another."""

    __slots__ = ("answer", "body", "decoder", "fd", "head", "out", "parked", "sock", "tail", "upstream", "writing")

    def __init__(self, upstream: Upstream, sock: socket.socket) -> None:
        self.upstream = upstream
        self.sock = sock
        self.fd = sock.fileno()
        self.head = b""
        self.body = b""
        self.tail = b""
        self.decoder: BodyDecoder | None = None
        self.answer: Answer | None = None
        self.out: memoryview | bytes = b""  # what the socket did not take
        self.writing = False
        self.parked = False  # a slow reader of requests waits for its time

    # --- reading -------------------------------------------------------------------------------------------------

    def on_events(self, events: int) -> None:
        """What epoll saw."""
        if events & select.EPOLLOUT and self.answer is not None and not events & _GONE:
            self.answer.advance(_now())
            if self.fd < 0:
                return
        if events & (select.EPOLLIN | _GONE) and not (self.parked and not events & _GONE):
            self.read(65536)

    def read(self, most: int) -> int:
        """Take what is there; returns the bytes taken, -1 if the peer has gone."""
        try:
            data = self.sock.recv(most)
        except BlockingIOError:
            return 0
        except OSError:
            self.gone("reset")
            return -1
        if not data:
            self.gone("fin")
            return -1
        if self.decoder is None:
            self._on_head(self.head + data)
        else:
            self._on_body(data)
        return len(data)

    def _on_head(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.head = data
            if len(data) > 65536:
                self.refuse()
            return
        self.head = data[: end + 4]
        length = _LENGTH.search(self.head)
        self.decoder = BodyDecoder(-1 if _CHUNKED.search(self.head) else int(length[1]) if length else 0)
        self.body = self.tail = b""
        if self.head.startswith(b"GET ") and _OWN.match(self.head):
            self._control()  # our own business is not load
            return
        self.upstream.totals["requests"] += 1
        self.answer = Answer(self)
        self._on_body(data[end + 4 :])

    def _on_body(self, data: bytes) -> None:
        assert self.decoder is not None
        if data:
            try:
                payload = self.decoder.feed(data)
            except Malformed:
                self.refuse()
                return
            self.upstream.totals["body_bytes"] += len(payload)
            if len(self.body) < _KEPT:
                self.body += payload[: _KEPT - len(self.body)]
            self.tail = payload[-4096:] if len(payload) >= 4096 else (self.tail + payload)[-4096:]
        answer = self.answer
        if answer is None or answer.started:
            return
        if not answer.known and (found := _USER.search(self.body)):
            answer.know(found[1].decode("latin-1"))
        if self.decoder.done:
            self._whole(answer)
        elif answer.behaviour.read_rate and not self.parked:
            self.parked = True
            self.upstream.schedule(answer, _now() + 10_000_000)

    def _whole(self, answer: Answer) -> None:
        if not answer.known:
            target = self.head.split(b" ", 2)[1].decode("latin-1")
            query = urllib.parse.parse_qs(target.partition("?")[2])
            found = _USER.search(self.tail)
            answer.know(found[1].decode("latin-1") if found else query.get("user", [""])[0])
        if self.fd >= 0 and self.answer is answer:
            streamed = bool(_STREAM.search(self.body) or _STREAM.search(self.tail))
            answer.start(streamed, not _CLOSE.search(self.head))

    def _control(self) -> None:
        status, document = self.upstream.control(self.head.split(b" ", 2)[1].decode("latin-1"))
        body = json.dumps(document).encode()
        self.sock.setblocking(True)
        self.sock.settimeout(5)
        try:
            self.sock.sendall(bodies.head(status, "length", "application/json", len(body)) + body)
        except OSError:
            self.close()
            return
        self.sock.setblocking(False)
        self.next_request()

    def refuse(self) -> None:
        """What came is no request we can answer."""
        self.upstream.totals["bad_requests"] += 1
        self.close()

    def next_request(self) -> None:
        """The answer is complete: ready for the next one, which may be here already."""
        rest = self.decoder.rest if self.decoder else b""
        self.decoder, self.answer, self.head, self.body = None, None, b"", b""
        if rest:
            self._on_head(rest)

    # --- writing and the end -------------------------------------------------------------------------------------

    def write(self, data: bytes | memoryview) -> bool:
        """Hand `data` to the socket, keep what it does not take; False if something is kept or the peer is gone."""
        try:
            taken = self.sock.send(data)
        except BlockingIOError:
            taken = 0
        except OSError:
            self.gone("reset")
            return False
        if self.answer is not None:
            self.answer.written += taken
        self.upstream.totals["bytes"] += taken
        if taken == len(data):
            if self.writing:
                self.writing = False
                self.upstream.poll.modify(self.fd, _READ)
            self.out = b""
            return True
        self.out = memoryview(data)[taken:]
        if not self.writing:
            self.writing = True
            self.upstream.poll.modify(self.fd, _READ | select.EPOLLOUT)
        return False

    def unacknowledged(self) -> int:
        """Bytes that still lie in our own kernel's send queue: the peer has not taken them."""
        return int.from_bytes(fcntl.ioctl(self.fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def gone(self, how: str) -> None:
        """The peer has left."""
        answer = self.answer
        if answer is not None and not answer.broken_off:
            self.upstream.note_left(answer, how)
        self.close()

    def close(self) -> None:
        """Close the socket and forget it."""
        if self.fd < 0:
            return
        self.upstream.connections.pop(self.fd, None)
        self.upstream.poll.unregister(self.fd)
        self.fd = -1
        if self.answer is not None:
            self.answer.due = 0
        self.sock.close()
