"""Leases: a pool of connections to one upstream, around the pure book of `policy.pool`.

A lease is a connection in use, or a slot in which one is being dialled. Invariants: whatever cancels or fails, the slot
goes back to the book exactly once, and with it to the next waiter; `release()` and `abort()` are synchronous and
idempotent, and after `abort()` the socket is closed. An idle connection whose peer hangs up leaves the pool in the step
that saw it, and one is used again only after a zero-time look that finds it quiet.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, final

import outcome
import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.policy.pace import Pace
from canal_trio.policy.pool import Dial, Full, Grant, PoolCore, Reuse
from canal_trio.relay.course import checkpoint_if_cancelled, current_course, in_task
from canal_trio.relay.idle import Reaper, clock_of_run
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.upstream.interface import Connection

__all__ = ["Connect", "Lease", "Pool", "PoolStatistics"]

Connect = Callable[[Upstream], Awaitable[Connection | Failure]]
"""Makes a connection. Cancelled, it leaves no socket."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A pool's state now (idle, used, waiting) and its counts since it was made."""

    idle: int
    used: int
    waiting: int
    dialled: int
    reused: int
    failed: int  # dials that came to nothing
    stale: int  # idle connections found dead
    timeouts: int  # waits that took too long
    refused: int  # waits that were not begun: the queue was full


@final
class Lease:
    """A connection in use. Give it back with `release()`, or close it with `abort()`; the first call counts."""

    __slots__ = ("_over", "_pool", "_since", "connection", "reused")

    def __init__(self, pool: Pool, connection: Connection, *, reused: bool) -> None:
        self._pool = pool
        self._over = False
        self._since = pool._clock()
        self.connection = connection
        self.reused = reused

    def __repr__(self) -> str:
        return f"<Lease of {self.connection!r}{', over' if self._over else ''}>"

    def release(self) -> None:
        """The exchange is over and the connection can be used again. Not a checkpoint."""
        if not self._over:
            self._over = True
            self._pool._released(self.connection, self._since)

    async def unless_cancelled(self) -> None:
        """Give it back, unused, if the task was cancelled after it was woken with it. A checkpoint only then.

        From here on there is a task.
        """
        try:
            await in_task()
            await checkpoint_if_cancelled()
        except trio.Cancelled:
            self.release() if self.reused else self.abort()  # a dial that is cancelled leaves nothing either
            raise

    def abort(self) -> None:
        """Close the connection in this very step and give its slot back. Not a checkpoint."""
        if not self._over:
            self._over = True
            self.connection.abort()
            self._pool._aborted(self._since)


class _Ticket:
    """A place in the queue, and the task that sleeps there."""

    __slots__ = ("task",)
    task: trio.lowlevel.Task


@final
class Pool:
    """The connections to one upstream."""

    def __init__(
        self, upstream: Upstream, *, bounds: Bounds, deadlines: Deadlines, connect: Connect, reaper: Reaper
    ) -> None:
        self._upstream = upstream
        self._deadlines = deadlines
        self._connect = connect
        limit = bounds.upstream_connections if upstream.connections is None else upstream.connections
        self._core: PoolCore[Connection, _Ticket] = PoolCore(
            limit=limit, waiters=bounds.waiters, idle_seconds=deadlines.upstream_keep_alive
        )
        self._clock = clock_of_run()
        self._closed = False
        self._pace = Pace()  # of its leases
        self._dialled = self._reused = self._failed = self._stale = self._timeouts = self._refused = 0
        self._sweep = reaper.add(self._look, self._clock() + deadlines.upstream_keep_alive)

    def __repr__(self) -> str:
        core = self._core
        return f"<Pool {self._upstream.name}: {core.used} used, {core.idle} idle, {core.waiting} waiting>"

    async def lease(self, *, fresh: bool = False, dialling: Callable[[], None] | None = None) -> Lease | Failure:
        """A connection to the upstream, waiting for a free slot and dialling if need be; or why there is none.

        `fresh` refuses a connection that was used before. `dialling` is called when a dial begins. A checkpoint only if
        it waits or dials; cancelling it leaves nothing behind.
        """
        while True:
            ticket = _Ticket()
            verdict, expired = self._core.acquire(ticket, self._clock(), fresh=fresh)
            _close(expired)
            if isinstance(verdict, Reuse):
                if self._quiet(verdict.connection):
                    return self._reuse(verdict.connection)
                self._lost()
                continue
            if isinstance(verdict, Dial):
                return await self._dial(dialling)
            if isinstance(verdict, Full):
                return self.refuse()
            if current_course() is None:
                return await self._wait(ticket, dialling)
            self._core.abandon(ticket)  # nobody would be woken: come again as a task
            await in_task()

    async def _wait(self, ticket: _Ticket, dialling: Callable[[], None] | None) -> Lease | Failure:
        def abandon(_raise_cancel: Any) -> trio.lowlevel.Abort:
            self._core.abandon(ticket)
            return trio.lowlevel.Abort.SUCCEEDED

        ticket.task = trio.lowlevel.current_task()
        granted = False
        connection: Connection | None = None
        with trio.move_on_after(self._deadlines.lease):
            connection = await trio.lowlevel.wait_task_rescheduled(abandon)
            granted = True
        if not granted:
            self._timeouts += 1
            return self._unavailable(f"No connection became free within {self._deadlines.lease:g} s.")
        # The slot is ours, and no checkpoint lies between here and the lease or the dial.
        if connection is not None and self._quiet(connection):
            return self._reuse(connection)
        return await self._dial(dialling)

    async def _dial(self, dialling: Callable[[], None] | None) -> Lease | Failure:
        try:
            await in_task()
            if dialling is not None:
                dialling()
            self._dialled += 1
            connection = await self._connect(self._upstream)
        except BaseException:
            self._lost()
            raise
        if isinstance(connection, Failure):
            self._failed += 1
            self._lost()
            return connection
        return Lease(self, connection, reused=False)

    def _reuse(self, connection: Connection) -> Lease:
        self._reused += 1
        connection.watch_idle(None)
        return Lease(self, connection, reused=True)

    def _quiet(self, connection: Connection) -> bool:
        """Is it still what it was when it became idle? If not it is closed."""
        if connection.usable():
            return True
        self._stale += 1
        connection.abort()
        return False

    @property
    def crowded(self) -> bool:
        """A request that came now would be refused: every connection is in use, and the queue is full."""
        return self._core.crowded

    def refuse(self) -> Failure:
        """The refusal of a request that found the pool crowded; counted. Not a checkpoint."""
        self._refused += 1
        return self._unavailable("Too many requests wait for a connection.")

    def _unavailable(self, detail: str) -> Failure:
        after = self._pace.wait(self._core.used, self._core.waiting)
        return Failure(Side.GATEWAY, Phase.LEASE, Kind.UNAVAILABLE, detail, Retry.UNSENT, after)

    # -- what comes back -----------------------------------------------------------------------------------------------

    def _released(self, connection: Connection, since: float) -> None:
        if self._closed:
            connection.abort()
            self._lost()
            return
        now = self._clock()
        self._pace.ended(now - since)
        grant, superfluous = self._core.release(connection, now)
        _close(superfluous)
        if grant is None:
            connection.watch_idle(lambda: self._died(connection))
        else:
            _wake(grant)

    def _aborted(self, since: float) -> None:
        self._pace.ended(self._clock() - since)
        self._lost()

    def _lost(self) -> None:
        grant = self._core.lost()
        if grant is not None:
            _wake(grant)

    def _died(self, connection: Connection) -> None:
        """An idle connection's peer hung up."""
        if self._core.forget(connection):
            self._stale += 1
            connection.abort()

    def _look(self, now: float) -> float:
        _close(self._core.expire(now))
        return math.inf if self._closed else now + self._deadlines.upstream_keep_alive

    def statistics(self) -> PoolStatistics:
        """A snapshot."""
        core = self._core
        return PoolStatistics(
            idle=core.idle,
            used=core.used,
            waiting=core.waiting,
            dialled=self._dialled,
            reused=self._reused,
            failed=self._failed,
            stale=self._stale,
            timeouts=self._timeouts,
            refused=self._refused,
        )

    def close(self) -> None:
        """Close what is idle, and what comes back from now on. Leases in use are not touched. Idempotent."""
        self._closed = True
        self._sweep.cancel()
        _close(self._core.clear())


def _close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.abort()


def _wake(grant: Grant[Connection, _Ticket]) -> None:
    trio.lowlevel.reschedule(grant.ticket.task, outcome.Value(grant.connection))
