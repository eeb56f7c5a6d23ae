"""One answer of the upstream: plays a behaviour on a connection.

Invariants: `advance` makes at most one send beyond what the socket took; `written` counts bytes the kernel took;
a token counts as sent when its bytes were handed to the socket; `sent_at` remembers when, for the last 256 sends.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

from loadtest import bodies
from loadtest.behaviour import Behaviour, BehaviourError, parse, split_user

if TYPE_CHECKING:
    from loadtest.connection import Connection

__all__ = ["Answer"]

_BURST = 1 << 18  # bytes sent to one socket before the others get their turn
_now = time.monotonic_ns


class Answer:
    """One answer, from the request's head on."""

    __slots__ = (
        "_close", "_cut", "_framed", "_head", "_make", "_next", "_pieces", "_random",
        "behaviour", "broken_off", "conn", "due", "ident", "known", "phase", "sent", "sent_at", "started", "written",
    )  # fmt: skip

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.behaviour: Behaviour = conn.upstream.default
        self.ident = ""
        self.known = False
        self.started = False
        self.broken_off = False  # by us, as asked
        self.phase = "upload"
        self.due = 0
        self.sent = 0  # tokens
        self.written = 0  # bytes the kernel took
        self.sent_at: deque[int] = deque(maxlen=256)

    def know(self, user: str) -> None:
        """The request says who it is and what it wants."""
        self.known = True
        self.ident, rest = split_user(user)
        try:
            self.behaviour = parse(rest, self.conn.upstream.default)
        except BehaviourError:
            self.conn.refuse()

    def start(self, streamed: bool, keep_alive: bool) -> None:
        """The request is complete."""
        self.started = True
        self.phase = "head"
        behaviour = self.behaviour
        events = streamed and behaviour.status == 200
        framing = behaviour.framing if events else "length"
        self._close = framing == "close" or not keep_alive
        self._framed = framing == "chunked"
        self._make = bodies.event_maker(behaviour.size, behaviour.stamp, self._framed)
        self._random = random.Random(self.ident) if behaviour.jitter else None
        self._cut = min((limit for limit in (behaviour.cut, behaviour.stall) if limit >= 0), default=-1)
        self._pieces = self._known_in_advance(streamed, framing)
        length = sum(map(len, self._pieces or ()))
        self._head = bodies.head(
            behaviour.status, framing, "text/event-stream" if events else "application/json", length
        )
        if self._pieces is not None and not events:  # a document leaves in one send with its head
            self._head += b"".join(self._pieces)
            self._pieces.clear()
        if self._pieces is not None and self._framed:
            self._pieces = deque([*(bodies.frame(piece) for piece in self._pieces if piece), bodies.LAST])
        self._next = _now() + int(behaviour.head * 1e9)
        if behaviour.head:
            self.conn.upstream.schedule(self, self._next)
        else:
            self.advance(self._next)

    def _known_in_advance(self, streamed: bool, framing: str) -> deque[bytes] | None:
        """The payload, where it does not depend on when it is sent; None for live tokens."""
        behaviour = self.behaviour
        if behaviour.status != 200:
            return deque([bodies.error_event()[6:-2]])
        if behaviour.body:
            return deque(bodies.canned(behaviour.body))
        if not streamed:
            return deque([bodies.whole_reply(behaviour.tokens, behaviour.size)])
        if framing == "length":
            make = bodies.event_maker(behaviour.size, behaviour.stamp, False)
            return deque([make(0, number) for number in range(max(behaviour.tokens, 0))] + [bodies.DONE])
        return None

    def advance(self, now: int) -> None:
        """Go on as far as time and the socket allow."""
        conn = self.conn
        if not self.started:
            self._read_slowly()
            return
        if conn.out and not conn.write(conn.out):
            return
        budget = _BURST
        while conn.answer is self and not self.due and budget > 0:
            data = self._piece(now)
            if data is None:
                return
            if self.behaviour.split:
                data = self._split(data)
            if self._cut >= 0 and not self._within(data):
                return
            budget -= len(data)
            if not conn.write(data):
                return
            if self.phase == "done":
                self._finish()
                return
        if conn.answer is self and not self.due:
            conn.upstream.schedule(self, now)  # a burst: let the others have their turn

    def _piece(self, now: int) -> bytes | None:
        """The next bytes to send, or None if it is not time yet (it is scheduled then)."""
        behaviour = self.behaviour
        if self.phase == "head":
            self.phase = "done" if self._pieces is not None and not self._pieces else "first"
            self._next = now + int(behaviour.first * 1e9)
            return self._head
        if self._next > now:
            self.conn.upstream.schedule(self, self._next)
            return None
        self.phase = "stream"
        if gap := behaviour.interval:
            if self._random:
                gap *= 1 + behaviour.jitter * (2 * self._random.random() - 1)
            self._next += int(gap * 1e9)
        if self._pieces is None:
            return self._tokens()
        piece = self._pieces.popleft()
        if not self._pieces:
            self.phase = "done"
        return piece

    def _tokens(self) -> bytes:
        behaviour = self.behaviour
        stamp = _now()
        sent = self.sent
        wanted = behaviour.tokens
        if wanted < 0 or sent < wanted:
            if behaviour.error_after >= 0 and sent >= behaviour.error_after:
                self.phase = "done"
                return self._frame(bodies.error_event()) + (bodies.LAST if self._framed else b"")
            count = behaviour.batch if wanted < 0 else min(behaviour.batch, wanted - sent)
            self.sent = sent + count
            self.conn.upstream.totals["tokens"] += count
            self.sent_at.append(stamp)
            first = self._make(stamp, sent)
            return first if count == 1 else first + bodies.more_events(count - 1, behaviour.size, self._framed)
        self.phase = "done"
        usage = self._frame(bodies.usage_event(sent)) if behaviour.usage else b""
        return usage + self._frame(bodies.DONE) + (bodies.LAST if self._framed else b"")

    def _frame(self, piece: bytes) -> bytes:
        return bodies.frame(piece) if self._framed else piece

    def _split(self, data: bytes) -> bytes:
        """Send all but the last part in writes of their own (as far as the socket takes them whole)."""
        size = self.behaviour.split
        at = 0
        while len(data) - at > size and (self._cut < 0 or self.written + size < self._cut):
            if not self.conn.write(data[at : at + size]):
                if self.conn.fd < 0:
                    return b""
                rest = bytes(self.conn.out) + data[at + size :]
                self.conn.out = b""
                return rest
            at += size
        return data[at:]

    def _within(self, data: bytes) -> bool:
        """Is all of `data` before the break? If not, send what is, and break."""
        room = self._cut - self.written
        if len(data) < room:
            return True
        if room > 0:
            self.conn.write(data[:room])
            if self.conn.fd < 0 or self.conn.out:
                self._cut = self.written + len(self.conn.out)
                return False
        if self._cut == self.behaviour.cut:
            self._break_off()
        else:
            self.phase = "stall"
            self.due = 0
        return False

    def _break_off(self) -> None:
        self.broken_off = True
        self.conn.upstream.totals["cut"] += 1
        if self.behaviour.reset:
            self.conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.conn.close()
            return
        try:
            self.conn.sock.shutdown(socket.SHUT_WR)  # the socket stays until the peer closes: no RST overtakes the FIN
        except OSError:
            self.conn.close()

    def _finish(self) -> None:
        self.conn.upstream.totals["finished"] += 1
        if self._close:
            self.broken_off = True
            self.conn.close()
        else:
            self.conn.next_request()

    def _read_slowly(self) -> None:
        conn = self.conn
        most = max(self.behaviour.read_rate // 100, 1)
        if conn.read(most) >= 0 and conn.answer is self and not self.started:
            conn.upstream.schedule(self, _now() + 10_000_000)
        elif conn.fd >= 0:
            conn.parked = False
