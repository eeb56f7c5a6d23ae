"""A client that leaves where the route drains: the answer is taken to its end and dropped, not cancelled.

What is wanted is the usage that comes last, or a generation that is paid for anyway. It begins only when the request
was sent whole; then the driver goes on as before, in its own nursery, and whatever it writes is dropped. It keeps all
that the exchange holds: its upstream connection, its place, its slots. Invariants: it ends by itself, at its limits in
seconds and events, or when the gateway stops; what the record tells of the client is as it was when the client left.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, final

import trio

from canal_trio.errors import Failure, Kind, Side
from canal_trio.settings import Drain

if TYPE_CHECKING:
    from canal_trio.gateway.deliver import Delivery
    from canal_trio.gateway.exchange import Exchange

__all__ = ["Draining", "Drains"]


@final
class Drains:
    """How many exchanges drain now, by whose limits."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()

    def begin(self, owner: str, most: int) -> bool:
        """One more for `owner`, if there may be."""
        if self._running[owner] >= most:
            return False
        self._running[owner] += 1
        return True

    def end(self, owner: str) -> None:
        """One less."""
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]

    @property
    def count(self) -> int:
        """All of them."""
        return self._running.total()


@final
class Draining:
    """What becomes of one exchange when its client leaves. `owner` names the key or route whose limits these are."""

    __slots__ = (
        "_delivery",
        "_drains",
        "_events",
        "_exchange",
        "_limits",
        "_owner",
        "_was",
        "told",
        "until",
    )

    def __init__(self, exchange: Exchange, limits: Drain, owner: str, drains: Drains, delivery: Delivery) -> None:
        self._exchange = exchange
        self._limits = limits
        self._owner = owner
        self._drains = drains
        self._delivery = delivery
        self._events = 0  # delivered when the client left
        self._was: tuple[int | None, int, int, float | None, float, float] | None = None  # the same, of the record
        self.told = False  # the upstream had said what it used before that
        self.until = math.inf  # when it is ended, on Trio's clock

    def begin(self, detail: str) -> bool:
        """The client leaves. True: let it go, the answer is taken to its end. Not a checkpoint."""
        exchange, lease = self._exchange, self._exchange.lease
        if lease is None or not exchange.received or not lease.connection.sent or exchange.upgrade is not None:
            return False
        if not self._drains.begin(self._owner, self._limits.at_once):
            exchange.flags |= {"drain_refused"}
            return False
        exchange.note(Failure(Side.CLIENT, exchange.phase, Kind.GONE, detail))
        exchange.draining = True
        self.told = exchange.account is not None and exchange.account.usage is not None
        self._events = exchange.scanner.events if exchange.scanner is not None else 0
        self._was = (
            exchange.status,
            exchange.response_bytes + self._delivery.partly(),
            exchange.pieces,
            exchange.first_piece,
            exchange.last_piece,
            exchange.longest_gap,
        )
        self._delivery.drop_all(self._swallow)
        if self._limits.seconds != math.inf:
            self.until = trio.current_time() + self._limits.seconds
            self._delivery.reaper.add(self._late, self.until)
        return True

    def _swallow(self, data: bytes) -> int:
        """Instead of sending: all of it is gone. 0 when it has been enough."""
        exchange = self._exchange
        scanner = exchange.scanner
        if scanner is not None and scanner.events - self._events >= self._limits.tokens:
            self.stop()
            return 0
        return len(data)

    def _late(self, _now: float) -> float:
        if not self._exchange.finished:
            self.stop()
        return math.inf

    def stop(self) -> None:
        """It has been enough: close the upstream and unwind. Not a checkpoint."""
        exchange = self._exchange
        exchange.flags |= {"drain_cut"}
        exchange.fail(Failure(Side.CLIENT, exchange.phase, Kind.GONE))  # noted already, by the one that left

    def finish(self) -> int:
        """The exchange is over: what the client had got, as it was. The number of its events."""
        exchange = self._exchange
        self._drains.end(self._owner)
        exchange.flags |= {"drained"}
        assert self._was is not None
        exchange.status, exchange.response_bytes, exchange.pieces = self._was[:3]
        exchange.first_piece, exchange.last_piece, exchange.longest_gap = self._was[3:]
        return self._events
