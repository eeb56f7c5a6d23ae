"""What the promises share: verdicts, the site under test, and a blocking client that tells how things ended."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtest.behaviour import Behaviour
from loadtest.peers import Gateway
from loadtest.processes import UpstreamProcess
from loadtest.wire import Malformed, Response

__all__ = ["Client", "Site", "Verdict", "until"]

_numbers = itertools.count(1)
PATIENCE = 20.0  # seconds a blocking client waits for bytes that must come


@dataclass(slots=True)
class Verdict:
    """One number. `kept` is None for what could not be judged; `note` says why, or under which circumstances."""

    promise: str
    what: str
    measured: str
    limit: str
    kept: bool | None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Site:
    """What is measured: a gateway in front of our upstream, in their own processes."""

    gateway: Gateway
    upstream: UpstreamProcess
    say: Callable[[str], None]
    quick: bool = False

    @property
    def direct(self) -> Gateway:
        """The same upstream without the gateway."""
        return Gateway("direct", self.upstream.host, self.upstream.port, None)


def until(condition: Callable[[], bool], seconds: float, every: float = 0.005) -> bool:
    """Poll `condition`; whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


class Client:
    """One connection and one request at a time. `ident` names the last request at the upstream."""

    def __init__(self, gateway: Gateway, receive_buffer: int = 0) -> None:
        self.gateway = gateway
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect((gateway.host, gateway.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.response = Response()
        self.ident = ""
        self.received = 0  # bytes on the wire

    def ask(
        self, behaviour: Behaviour, *, streamed: bool = True, upload: int = 0, part: float = 1.0, tag: str = "p"
    ) -> None:
        """Send a request; with `part` below 1 only that share of its body (padded to `upload` bytes)."""
        self.ident = f"{tag}{next(_numbers)}"
        document: dict[str, Any] = {"user": behaviour.encode(self.ident), "model": "m", "stream": streamed}
        document["messages"] = [{"role": "user", "content": "Stream a haiku." + "x" * upload}]
        body = json.dumps(document).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.gateway.host}:{self.gateway.port}\r\n"
            f"Authorization: Bearer sk-test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.response = Response()
        self.sock.sendall(head.encode() + body[: int(len(body) * part)])

    def read(self, most: int = 65536) -> bytes | None:
        """The next payload, possibly empty; None at the end of the message or of the connection, or after a reset."""
        if self.response.done:
            return None
        try:
            data = self.sock.recv(most)
        except TimeoutError:
            raise
        except OSError:
            return None
        if not data:
            self.response.eof()
            return None
        self.received += len(data)
        return self.response.feed(data)

    def rest(self, most: int = 1 << 27) -> bytes:
        """Everything up to the end (or `most` bytes); afterwards `response.done` tells whether it was a proper one."""
        pieces = []
        size = 0
        try:
            while (piece := self.read(1 << 18)) is not None and size < most:
                pieces.append(piece)
                size += len(piece)
        except Malformed as exc:
            pieces.append(f"<malformed: {exc}>".encode())
        return b"".join(pieces)

    def read_until(self, words: bytes) -> bytes:
        """Read until the payload holds `words`; raises `RuntimeError` if it ends before."""
        payload = b""
        while words not in payload:
            piece = self.read()
            if piece is None:
                raise RuntimeError(f"{self.gateway.name}: the answer ended before {words!r}: {payload[-200:]!r}")
            payload += piece
        return payload

    def read_head(self) -> None:
        """Read until the response's head is here."""
        while not self.response.headed:
            if self.read() is None:
                raise RuntimeError(f"{self.gateway.name}: no response head")

    def leave(self, how: str) -> int:
        """Leave with a `fin` or an `rst`; the monotonic nanosecond right before."""
        if how == "rst":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            at = time.monotonic_ns()
            self.sock.close()
        else:
            at = time.monotonic_ns()
            self.sock.shutdown(socket.SHUT_RDWR)  # close() would send RST if unread bytes were waiting
        return at

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()
