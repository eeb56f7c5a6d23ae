"""Attackers: connections that send a request's head one byte per second, and come again when they are thrown out.

They come spread over a second, and each drips by a clock of its own, as strangers do; all in one tick would be a load
of a thousand requests a second in a single moment, which is another question.

One epoll loop in a process of its own. Invariant: every connection that was opened is accounted for: how long it lived
from its first byte on, or that it was still there at the end.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from loadtest.processes import ROOT, Process, started

__all__ = ["Attack", "attack", "attacking"]

_HEAD = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"a" * 2000
_FAST = 40  # bytes of it that are sent at once
_OPENING = 50  # connections that may be opened in one round of the loop
_COMING = 1.0  # seconds over which they come at first
_DRIP = 1.0  # seconds between two bytes of one


@final
class Attack:
    """`count` connections at a time to `address`, for `seconds`; then until all are gone, or `grace` has passed."""

    def __init__(self, address: tuple[str, int], count: int, seconds: float, grace: float) -> None:
        self.address = address
        self.count = count
        self.end = time.monotonic() + seconds
        self.last = self.end + grace
        self.poll = select.epoll()
        self.open: dict[int, _Slow] = {}
        self.drips: deque[tuple[float, _Slow]] = deque()  # who sends the next byte when, in order
        self.began = time.monotonic()
        self.opened = self.refused = 0
        self.lives: list[float] = []
        self.answers: Counter[str] = Counter()
        self.full_at: float | None = None
        self.late = 0.0  # seconds: the longest round of our own loop, so how far our clock can be trusted

    def run(self) -> dict[str, Any]:
        """Attack; what came of it."""
        before = time.monotonic()
        while (now := time.monotonic()) < self.last and (now < self.end or self.open):
            self.late, before = max(self.late, now - before), now
            if now < self.end:
                self._open()
            for fd, events in self.poll.poll(0.01, 512):
                slow = self.open[fd]
                if slow.connected:
                    self._heard(slow)
                elif events & select.EPOLLOUT:
                    self._begin(slow)
            while self.drips and self.drips[0][0] <= now:
                slow = self.drips.popleft()[1]
                if self.open.get(slow.fd) is slow:
                    self._drip(slow)
        left = len(self.open)
        for slow in list(self.open.values()):
            self._close(slow)
        return {
            "opened": self.opened, "refused": self.refused, "thrown_out": len(self.lives), "still_there": left,
            "worst_s": max(self.lives, default=0.0), "answers": dict(self.answers),
            "late_s": self.late,
        }  # fmt: skip

    def _open(self) -> None:
        come = min(self.count, int(self.count * (time.monotonic() - self.began) / _COMING))
        for _ in range(min(come - len(self.open), _OPENING)):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(self.address)
            self.opened += 1
            slow = self.open[sock.fileno()] = _Slow(sock)
            self.poll.register(slow.fd, select.EPOLLOUT)
        if len(self.open) == self.count and self.full_at is None:
            self.full_at = time.monotonic()
            print("all are there", file=sys.stderr, flush=True)

    def _begin(self, slow: _Slow) -> None:
        if slow.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.refused += 1
            self._close(slow)
            return
        slow.connected = True
        self.poll.modify(slow.fd, select.EPOLLIN)
        slow.began = time.monotonic()
        self._drip(slow, _FAST)

    def _drip(self, slow: _Slow, size: int = 1) -> None:
        try:
            slow.sent += slow.sock.send(_HEAD[slow.sent : slow.sent + size])
        except OSError:
            self._gone(slow)
        else:
            self.drips.append((time.monotonic() + _DRIP, slow))

    def _heard(self, slow: _Slow) -> None:
        try:
            data = slow.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data and not slow.answer:
            slow.answer = data[9:12].decode("latin-1")
        elif not data:
            self._gone(slow)

    def _gone(self, slow: _Slow) -> None:
        if slow.fd in self.open:
            self.lives.append(time.monotonic() - slow.began)
            self.answers[slow.answer or "none"] += 1
            self._close(slow)

    def _close(self, slow: _Slow) -> None:
        del self.open[slow.fd]
        slow.sock.close()


class _Slow:
    """One attacker."""

    __slots__ = ("answer", "began", "connected", "fd", "sent", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.connected = False
        self.began = 0.0
        self.sent = 0
        self.answer = ""


def attack(address: tuple[str, int], count: int, seconds: float, grace: float) -> None:
    """Attack, and print what came of it as one line of JSON."""
    print(json.dumps(Attack(address, count, seconds, grace).run()), flush=True)


@contextmanager
def attacking(port: int, count: int, seconds: float, grace: float) -> Iterator[Process]:
    """Attackers in a process of their own, once all of them are connected or a deadline has passed."""
    argv = [sys.executable, "-m", "loadtest", "slowheads", "--port", str(port), "--count", str(count)]
    argv += ["--seconds", str(seconds), "--grace", str(grace)]
    with started("attackers", argv, cwd=ROOT) as process:
        yield process
