"""Drives many client connections from one epoll loop: closed-loop workers, open-loop arrivals, timers.

Invariants: an open-loop arrival happens on paper at its time whether or not we can start it then, and its latencies
count from there; a closed-loop worker starts its next exchange when its last one is over. `run` returns at its deadline
and never blocks longer than `TICK`.
"""

from __future__ import annotations

import heapq
import random
import select
import ssl
import time
from collections import deque
from collections.abc import Callable

from loadtest.link import Link
from loadtest.safety import Target
from loadtest.scenario import Part
from loadtest.tally import Tally

__all__ = ["Engine", "client_tls"]

TICK = 0.1
_now = time.monotonic_ns


def client_tls() -> ssl.SSLContext:
    """Encrypts, and believes any certificate: the target is on loopback, and it is speed that is measured."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Engine:
    """A load generator. `tally` may be exchanged at any time; what happens from then on is counted in the new one."""

    def __init__(self, target: Target, parts: tuple[Part, ...], seed: int = 1, read_size: int = 16384) -> None:
        self.target = target
        self.tls = client_tls() if target.tls else None
        self.parts = parts
        self.read_size = read_size
        self.tally = Tally()
        self.poll = select.epoll()
        self.links: dict[int, Link] = {}
        self.in_flight = 0
        self._idle: list[Link] = []
        self._timers: list[tuple[int, int, Callable[[int], None], int]] = []
        self._sequence = 0
        self._random = random.Random(seed)
        self._weights = [part.weight for part in parts]
        self._requests = {part: part.request(target.authority, target.path, "0") for part in parts if not part.leave}
        self._wanted = 0  # closed loop: exchanges at a time
        self._most_in_flight = 0
        self._arrivals: tuple[float, str] | None = None
        self._queue: deque[tuple[Part, int]] = deque()
        self._stopping = False

    # --- loads ---------------------------------------------------------------------------------------------------

    def closed(self, streams: int, over: float = 0.0) -> None:
        """From now on keep `streams` exchanges going; new ones start spread over `over` seconds."""
        more = streams - self._wanted
        self._wanted = streams
        for number in range(more):
            self.after(over * number / max(more, 1), lambda _serial: self._next(), 0)

    def open(self, rate: float, arrivals: str, most_in_flight: int) -> None:
        """From now on `rate` arrivals per second."""
        self._arrivals = (rate, arrivals)
        self._most_in_flight = most_in_flight
        self._arrive(_now())

    def _arrive(self, at: int) -> None:
        if self._arrivals is None or self._stopping:
            return
        rate, kind = self._arrivals
        part = self._choose()
        if self.in_flight >= self._most_in_flight:
            self.tally.held += 1
            self._queue.append((part, at))
        else:
            self._start(part, at)
        gap = self._random.expovariate(rate) if kind == "poisson" else 1 / rate
        following = at + int(gap * 1e9)
        self._at(following, lambda _serial: self._arrive(following), 0)

    def _next(self) -> None:
        if not self._stopping and self.in_flight < self._wanted:
            self._start(self._choose(), _now())

    def _choose(self) -> Part:
        return self.parts[0] if len(self.parts) == 1 else self._random.choices(self.parts, self._weights)[0]

    def _start(self, part: Part, intended: int) -> None:
        self._sequence += 1
        self.in_flight += 1
        self.begin(part, f"{self._sequence}", intended)

    def begin(self, part: Part, ident: str, intended: int) -> None:
        """Put an exchange on an idle connection, or on a new one."""
        link = self._idle.pop() if self._idle and part.keep_alive else None
        if link is None:
            try:
                link = Link(self)
            except OSError as exc:
                self.tally.errors[f"cannot dial: {exc.strerror or exc}"] += 1
                self.after(0.05, lambda _serial: self._lost(), 0)
                return
        request = self._requests.get(part) or part.request(self.target.authority, self.target.path, ident)
        link.begin(part, request, ident, intended)
        if part.leave == "random" and link.part is not None:
            lasting = part.upstream.lasting
            when = self._random.uniform(0, min(60, lasting))
            serial, one, how = link.serial, link, self._how(part)
            self.after(when, lambda _serial: one.leave(serial, how), 0)

    def leave_together(self) -> None:
        """All clients that wait for this leave now."""
        for link in list(self.links.values()):
            if link.part is not None and link.part.leave == "together":
                link.leave(link.serial, self._how(link.part))

    def _how(self, part: Part) -> str:
        return self._random.choice(("fin", "rst")) if part.leave_by == "both" else part.leave_by

    def _lost(self) -> None:
        self.in_flight -= 1
        self._next()

    def over(self, link: Link, pause: float) -> None:
        """An exchange of ours is over, and counted."""
        self.in_flight -= 1
        if link.fd >= 0:
            self._idle.append(link)
        if self._queue:
            part, at = self._queue.popleft()
            self._start(part, at)
        elif self._wanted:
            # On the next round at the earliest: a peer that answers at once must not make this recursive.
            self.after(pause, lambda _serial: self._next(), 0)

    # --- the loop ------------------------------------------------------------------------------------------------

    def after(self, seconds: float, call: Callable[[int], None], argument: int) -> None:
        """Call later, from the loop."""
        self._at(_now() + int(seconds * 1e9), call, argument)

    def _at(self, when: int, call: Callable[[int], None], argument: int) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, call, argument))

    def run(self, seconds: float, progress: Callable[[], None] | None = None) -> float:
        """Run for `seconds`; returns how long it really was."""
        began = _now()
        end = began + int(seconds * 1e9)
        links, timers, shown = self.links, self._timers, began
        while (now := _now()) < end:
            while timers and timers[0][0] <= now:
                _when, _seq, call, argument = heapq.heappop(timers)
                call(argument)
            until = min(timers[0][0], end) if timers else end
            for fd, events in self.poll.poll(min(max((until - now) / 1e9, 0), TICK), 512):
                link = links.get(fd)
                if link is not None:
                    link.on_events(events)
            if progress is not None and now - shown > 500_000_000:
                shown = now
                progress()
        return (_now() - began) / 1e9

    def forget(self, link: Link) -> None:
        """A connection is closed, or somebody else's business."""
        if link.fd >= 0:
            self.links.pop(link.fd, None)
            self.poll.unregister(link.fd)
            link.fd = -1
            if link.part is None and link in self._idle:
                self._idle.remove(link)

    def close(self) -> None:
        """Close all connections; what was in flight is not counted any more."""
        self._stopping = True
        self._timers.clear()
        for link in list(self.links.values()):
            link.part = None
            link.close()
        self.poll.close()
