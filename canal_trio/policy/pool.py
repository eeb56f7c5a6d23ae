"""The book of a connection pool: who holds what, who waits, who is next. No I/O, no clock.

Invariants: *used + idle ≤ limit* (a connection being dialled is used); an idle connection and a waiter never exist at
the same time, nor does a waiter while there is room; nothing is in two places. Idle connections are taken newest first,
so that the rest can go cold, and handed to waiters oldest first, directly, without a scramble. Every operation is O(1)
(closing expired connections is paid for by those who opened them), hence `OrderedDict`: taking from the front of a
plain dict walks over all that was taken before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar, final

__all__ = ["Dial", "Full", "Grant", "PoolCore", "Reuse", "Wait"]

C = TypeVar("C")  # a connection
T = TypeVar("T")  # a waiter's ticket


@dataclass(frozen=True, slots=True)
class Reuse(Generic[C]):
    """Take this idle connection."""

    connection: C


@dataclass(frozen=True, slots=True)
class Dial:
    """Make a new one; its slot is yours."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Every slot is used: you are in the queue."""


@dataclass(frozen=True, slots=True)
class Full:
    """The queue is full, too."""


@dataclass(frozen=True, slots=True)
class Grant(Generic[C, T]):
    """A waiter's turn: with a connection, or with a slot to dial one (None)."""

    ticket: T
    connection: C | None


@final
class PoolCore(Generic[C, T]):
    """`limit` connections at most (may be infinite), `waiters` in the queue, idle ones kept for `idle_seconds`."""

    def __init__(self, *, limit: float, waiters: int, idle_seconds: float) -> None:
        self.limit = limit
        self.waiters = waiters
        self.idle_seconds = idle_seconds
        self.used = 0
        self._idle: OrderedDict[C, float] = OrderedDict()  # since when, oldest first
        self._queue: OrderedDict[T, bool] = OrderedDict()  # fresh?, first come first

    @property
    def idle(self) -> int:
        """Connections nobody uses."""
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return len(self._queue)

    @property
    def crowded(self) -> bool:
        """Nobody who came now would get a connection, or a place in the queue."""
        return self.used >= self.limit and len(self._queue) >= self.waiters

    def acquire(self, ticket: T, now: float, *, fresh: bool = False) -> tuple[Reuse[C] | Dial | Wait | Full, list[C]]:
        """What `ticket` gets, and which connections are to be closed. `fresh` refuses a used one."""
        expired = self.expire(now)
        if self._idle and not fresh:
            connection, _ = self._idle.popitem()
            self.used += 1
            return Reuse(connection), expired
        if self._idle and self.used + len(self._idle) >= self.limit:
            expired.append(self._idle.popitem(last=False)[0])  # the new one needs a slot
        if self.used + len(self._idle) < self.limit:
            self.used += 1
            return Dial(), expired
        if len(self._queue) >= self.waiters:
            return Full(), expired
        self._queue[ticket] = fresh
        return Wait(), expired

    def release(self, connection: C, now: float) -> tuple[Grant[C, T] | None, list[C]]:
        """A used connection can be used again: whose turn it is, and which connections are to be closed."""
        if not self._queue:
            self.used -= 1
            self._idle[connection] = now
            return None, []
        ticket, fresh = self._queue.popitem(last=False)
        if fresh:
            return Grant(ticket, None), [connection]
        return Grant(ticket, connection), []

    def lost(self) -> Grant[C, T] | None:
        """A used connection is gone, or a dial has failed: who may dial instead."""
        if self._queue:
            return Grant(self._queue.popitem(last=False)[0], None)
        self.used -= 1
        return None

    def abandon(self, ticket: T) -> None:
        """`ticket` waits no longer. Of no effect once it was granted."""
        self._queue.pop(ticket, None)

    def forget(self, connection: C) -> bool:
        """An idle connection has died. False if it was not idle."""
        return self._idle.pop(connection, None) is not None

    def expire(self, now: float) -> list[C]:
        """The idle connections that were idle for too long, no longer in the book."""
        expired: list[C] = []
        while self._idle and now - next(iter(self._idle.values())) >= self.idle_seconds:
            expired.append(self._idle.popitem(last=False)[0])
        return expired

    def clear(self) -> list[C]:
        """Every idle connection, no longer in the book."""
        idle = list(self._idle)
        self._idle.clear()
        return idle
