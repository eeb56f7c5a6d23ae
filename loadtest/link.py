"""One client connection of a load: sends a request, reads its answer, counts events, and may leave or read slowly.

Invariants: at most one exchange at a time; whatever happens to the connection, the exchange it carried is counted
exactly once (finished, left, or one kind of error) and the engine is told once. The path of an event is short on
purpose: one receive, one unframing, a count and two increments.
"""

from __future__ import annotations

import random
import select
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING

from loadtest.scenario import Part
from loadtest.wire import Malformed, Response, stamps

if TYPE_CHECKING:
    from loadtest.engine import Engine

__all__ = ["Link"]

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_ZEROS = memoryview(bytes(1 << 18))
_AFTER_FAILURE = 0.02  # seconds, so that a dead target is not dialled as fast as we can
_SLICE = 0.05  # seconds between the reads of a slow reader
_MOST_STAMPS = 8  # per read: in a burst a sample is enough
_now = time.monotonic_ns


class Link:
    """A connection and the exchange on it."""

    __slots__ = (
        "_events", "_handshake", "_last", "_mask", "_newline", "_out", "_tail", "_upload", "_waiting", "engine", "fd",
        "first", "ident", "intended", "part", "reads", "response", "serial", "sock", "used",
    )  # fmt: skip

    def __init__(self, engine: Engine) -> None:
        """Dials; raises `OSError` if that fails at once."""
        self.engine = engine
        target = engine.target
        sock: socket.socket = socket.socket(socket.AF_INET6 if ":" in target.address else socket.AF_INET)
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex((target.address, target.port))
            if code not in {0, 115}:
                raise OSError(code, "connect")
            if engine.tls is not None:
                sock = engine.tls.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
        except OSError:
            sock.close()
            raise
        self.sock = sock
        self.fd = sock.fileno()
        self._mask = _IN | _OUT
        self._handshake = engine.tls is not None
        self._waiting = True  # the dial
        self._out: bytes | memoryview = b""
        self._upload = 0
        self.used = False
        self.serial = 0
        self.part: Part | None = None
        engine.poll.register(self.fd, self._mask)
        engine.links[self.fd] = self

    def _want(self, mask: int) -> None:
        if mask != self._mask:
            self._mask = mask
            self.engine.poll.modify(self.fd, mask)

    # --- an exchange ---------------------------------------------------------------------------------------------

    def begin(self, part: Part, request: bytes, ident: str, intended: int) -> None:
        """Start an exchange; `intended` is when it should have started (monotonic ns)."""
        self.part = part
        self.ident = ident
        self.intended = intended
        self.response = Response(part.method)
        self.first = True
        self.serial += 1
        self._last = 0
        self._events = 0
        self._newline = False
        self._tail = b""
        self._out = request
        self._upload = part.upload
        self.reads = part.read == "full"
        self.engine.tally.started += 1
        if not self._waiting and not self._handshake:
            self._write()
        if part.read == "slow":
            self.engine.after(_SLICE * random.random(), self._read_slowly, self.serial)

    def on_events(self, events: int) -> None:
        """What epoll saw."""
        if self._waiting or self._handshake:
            self._connect()
            return
        if events & _OUT and (self._out or self._upload):
            self._write()
        if self.fd >= 0 and events & ~_OUT and (self.reads or self.part is None or events & (8 | 16)):
            self.read(self.engine.read_size)

    def _connect(self) -> None:
        if self._waiting:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self.fail("connect failed")
                return
            self._waiting = False
        if self._handshake:
            assert isinstance(self.sock, ssl.SSLSocket)
            try:
                self.sock.do_handshake()
            except ssl.SSLWantReadError:
                self._want(_IN)
                return
            except ssl.SSLWantWriteError:
                self._want(_OUT)
                return
            except OSError:
                self.fail("TLS handshake failed")
                return
            self._handshake = False
        self._write()

    def _write(self) -> None:
        tally = self.engine.tally
        try:
            while self._out:
                sent = self.sock.send(self._out)
                tally.sent_bytes += sent
                self._out = b"" if sent == len(self._out) else memoryview(self._out)[sent:]
            while self._upload:
                sent = self.sock.send(_ZEROS[: min(self._upload, len(_ZEROS))])
                tally.sent_bytes += sent
                self._upload -= sent
        except (BlockingIOError, ssl.SSLWantWriteError):
            self._want((_IN if self.reads else 0) | _OUT)
            return
        except OSError:
            self._retry_or_fail("send failed")
            return
        self._want(_IN if self.reads else 0)

    def read(self, most: int) -> int:
        """Read once (over TLS: until there is no more) and count what came; the bytes read."""
        total = 0
        while self.fd >= 0:
            try:
                data = self.sock.recv(most)
            except (BlockingIOError, ssl.SSLWantReadError):
                break
            except OSError:
                self._retry_or_fail("reset")
                break
            if not data:
                self._eof()
                break
            total += len(data)
            self._received(data)
            if self.engine.tls is None or not self.reads:
                break
        return total

    def _received(self, data: bytes) -> None:
        now = _now()
        if self.part is None:
            self.close()  # bytes nobody asked for
            return
        tally = self.engine.tally
        tally.bytes += len(data)
        response = self.response
        try:
            payload = response.feed(data)
        except Malformed:
            self.fail("malformed response")
            return
        if payload:
            if self.first:
                self.first = False
                tally.first.counts[(now - self.intended) // 1000] += 1
            count = payload.count(b"\n\n")
            if self._newline and payload[0] == 10:
                count += 1
            self._newline = payload[-1] == 10 and payload[-2:] != b"\n\n"
            self._tail = payload[-16:] if len(payload) > 15 else self._tail[-16:] + payload
            if count:
                self._count(payload, count, now)
        if response.done:
            self._finish(now)

    def _count(self, payload: bytes, count: int, now: int) -> None:
        tally = self.engine.tally
        tally.events += count
        self._events += count
        if not self.reads:
            return  # what a slow reader sees is its own doing
        if self._last:
            tally.gap.counts[(now - self._last) // 1000] += 1
            if count > 1:
                tally.gap.counts[0] += count - 1
        self._last = now
        counts = tally.event.counts
        for stamp in stamps(payload if count <= _MOST_STAMPS else payload[:2048]):
            counts[(now - stamp) // 1000] += 1

    def _finish(self, now: int) -> None:
        tally = self.engine.tally
        tally.finished += 1
        tally.statuses[self.response.status] += 1
        tally.whole.counts[(now - self.intended) // 1000] += 1
        part = self.part
        assert part is not None
        if self.response.status != 200:
            tally.errors[f"status {self.response.status}"] += 1
        elif self._events:
            if b"[DONE]" in self._tail:
                tally.events -= 1  # the terminal event is no token
            else:
                tally.errors["ended without [DONE]"] += 1
        elif part.streamed and part.method == "POST" and not part.upload:
            tally.errors["no events"] += 1
        if self.response.close or not part.keep_alive or self._out or self._upload:
            self.close()
        self._over()

    def _over(self, pause: float = 0.0) -> None:
        """The exchange is counted; tell the engine, once. A closed loop goes on after `pause` seconds."""
        self.part = None
        self.used = True
        self.serial += 1
        if self.fd >= 0:
            self.reads = True
            self._want(_IN)
        self.engine.over(self, pause)

    def _eof(self) -> None:
        if self.part is None:
            self.close()
        elif self.response.eof():
            self.close()
            self._finish(_now())
        else:
            self._retry_or_fail("cut")

    def _retry_or_fail(self, kind: str) -> None:
        """A kept connection may die between two requests: that is nobody's error, the request goes again."""
        if self.part is not None and self.used and not self.response.headed and self.first:
            part, ident, intended = self.part, self.ident, self.intended
            self.part = None
            self.close()
            self.engine.tally.started -= 1
            self.engine.tally.errors["kept connection was closed (sent again)"] += 1
            self.engine.begin(part, ident, intended)
            return
        self.fail(kind)

    def fail(self, kind: str) -> None:
        """Count an error, and close."""
        part = self.part
        self.close()
        if part is not None:
            if self.response.headed and self.response.status != 200:
                kind = f"status {self.response.status}, {kind}"
            self.engine.tally.errors[kind] += 1
            self._over(_AFTER_FAILURE)

    # --- misbehaving on purpose ----------------------------------------------------------------------------------

    def leave(self, serial: int, how: str) -> None:
        """Leave now, if the exchange is still the one that was meant."""
        if self.serial != serial or self.part is None or self._waiting or self._handshake:
            return
        if how == "rst":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            at = _now()
            self.close()
        else:
            self.engine.forget(self)
            at = _now()
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                at = 0
            sock = self.sock
            self.engine.after(0.5, lambda _serial: sock.close(), 0)  # not at once: unread bytes would make it an RST
        if at:
            self.engine.tally.left[self.ident] = at
        self._over()

    def _read_slowly(self, serial: int) -> None:
        if serial != self.serial or self.part is None or self.fd < 0:
            return
        if not self._waiting and not self._handshake:
            self.read(max(int(self.part.read_rate * _SLICE), 1))
        self.engine.after(_SLICE, self._read_slowly, serial)

    def close(self) -> None:
        """Close the socket."""
        self.engine.forget(self)
        self.sock.close()
