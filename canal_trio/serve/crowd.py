"""How many connections one client address may have, and the short, cheap farewell of those beyond.

An IPv6 client owns a network of 64 bits at least, so those count as one address. Trusted proxies speak for many clients
and are not counted. Refused over plain HTTP, a client gets its 503 before it has asked; over TLS it would first have to
shake hands, which is the very work to be saved, so that the connection just closes.

Invariants: who is not counted any more is forgotten; at most `PARTING` refused sockets linger so that their answer
arrives, none longer than `PARTING_SECONDS`; a refusal is a handful of system calls, no task and no log line of its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.respond import error_response
from canal_trio.messages import Headers
from canal_trio.wire.headers import request_id

__all__ = ["PARTING", "Crowd", "Partings", "refusal"]

PARTING = 32  # refused sockets that are kept open for a moment; `limits.RESERVE` has room for them
PARTING_SECONDS = 1.0
TELL_EVERY = 30.0  # seconds between two log lines about it
_RETRY_AFTER = 5.0  # seconds: who has too many connections has to end some, and only they know when

_log = logging.getLogger("canal_trio.serve")


@final
class Crowd:
    """Counts connections by client address. `refused` is called for each that is one too many."""

    def __init__(self, most: float, trusted: Sequence[str], refused: Callable[[], None] = lambda: None) -> None:
        self._counts: dict[object, int] = {}
        self._refused = refused
        self._tell_at = -TELL_EVERY
        self._untold = 0
        self.configure(most, trusted)

    def configure(self, most: float, trusted: Sequence[str]) -> None:
        """Change the bound; who is in stays."""
        self._most = most
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in trusted]

    def __len__(self) -> int:
        return len(self._counts)

    def enter(self, peer: str) -> object | None:
        """Count a connection of `peer`: what `leave` wants to know, or None if it is one too many."""
        if self._most == math.inf:
            return ""
        key: object = peer
        if ":" in peer:
            key = int(ipaddress.IPv6Address(peer)) >> 64
        count = self._counts.get(key, 0)
        if count >= self._most and not self._trusts(peer):
            self._refuse(peer)
            return None
        self._counts[key] = count + 1
        return key

    def leave(self, key: object) -> None:
        """A connection that was counted has ended."""
        if key == "":
            return
        count = self._counts.pop(key) - 1
        if count:
            self._counts[key] = count

    def _trusts(self, peer: str) -> bool:
        address = ipaddress.ip_address(peer)
        return any(address in network for network in self._trusted)

    def _refuse(self, peer: str) -> None:
        self._refused()
        self._untold += 1
        now = trio.current_time()
        if now >= self._tell_at:
            text = "refusing connections of %s, which has %.0f already (%d times since the last such line)"
            _log.warning(text, peer, self._most, self._untold)
            self._tell_at = now + TELL_EVERY
            self._untold = 0


def refusal() -> bytes:
    """503, for a client that has not asked yet."""
    detail = "There are too many connections of this address."
    failure = Failure(Side.GATEWAY, Phase.ACCEPT, Kind.OVERLOADED, detail, retry_after=_RETRY_AFTER)
    return error_response(failure, request_id=request_id(Headers()).decode("ascii"), head=None, close=True)[1]


@final
class Partings:
    """Refused sockets on their way out. `run` must be running; without it none is kept longer than others need it."""

    def __init__(self) -> None:
        self._sockets: deque[tuple[float, socket.socket]] = deque()  # oldest first, with the time to close
        self._more = trio.Event()

    def __len__(self) -> int:
        return len(self._sockets)

    def part(self, sock: socket.socket, words: bytes) -> None:
        """Say `words`, if there are any, and close soon. Takes the socket, which does not block. Not a checkpoint."""
        if not words:
            sock.close()
            return
        try:
            sock.send(words)
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # gone already
            sock.close()
            return
        if len(self._sockets) >= PARTING:
            _close(self._sockets.popleft()[1])
        self._sockets.append((trio.current_time() + PARTING_SECONDS, sock))
        self._more.set()

    async def run(self) -> None:
        """Close what has lingered, until cancelled; then close everything."""
        try:
            while True:
                if not self._sockets:
                    self._more = trio.Event()
                    await self._more.wait()
                await trio.sleep_until(self._sockets[0][0])
                while self._sockets and self._sockets[0][0] <= trio.current_time():
                    _close(self._sockets.popleft()[1])
        finally:
            while self._sockets:
                _close(self._sockets.popleft()[1])


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.recv(65_536)  # a close on unread input would be a reset, which may overtake the answer
    sock.close()
