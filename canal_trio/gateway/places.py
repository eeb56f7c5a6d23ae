"""Overload: how many exchanges may be at work at once, who waits for a place, and how much the process may hold.

Asked once per exchange, before its body is read. Invariants: at most `limit` places are taken (but for a limit that was
lowered meanwhile); at most `waiters` wait, first come first served, none longer than `patience`; a place that comes
back goes to the first waiter in that very step. Whoever is refused is told when to come back, from how long places are
held.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, final

import outcome
import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.gateway.body import Budget
from canal_trio.policy.pace import Pace
from canal_trio.relay.flow import Meter
from canal_trio.settings import Settings

__all__ = ["Places"]


@final
class Places:
    """The places of one gateway, and its ceiling of memory: what `budget` and `meter` count."""

    __slots__ = ("_ceiling", "_limit", "_pace", "_patience", "_queue", "_waiters", "budget", "meter", "used")

    def __init__(self, settings: Settings) -> None:
        self.budget = Budget(settings.bounds.held_total_bytes)
        self.meter = Meter()
        self.used = 0
        self._pace = Pace()
        self._queue: OrderedDict[trio.lowlevel.Task, None] = OrderedDict()
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use other bounds from now on. Who is in stays; who waits may get in at once. Not a checkpoint."""
        bounds = settings.bounds
        self.budget.limit = bounds.held_total_bytes
        self._limit = bounds.exchanges
        self._waiters = bounds.waiters
        self._patience = settings.deadlines.lease
        self._ceiling = math.inf if bounds.memory_bytes is None else bounds.memory_bytes
        while self._queue and self.used < self._limit:
            self.used += 1
            self._wake()

    @property
    def waiting(self) -> int:
        """Exchanges in the queue."""
        return len(self._queue)

    @property
    def ceiling(self) -> float:
        """Bytes of bodies and flows, beyond which no new exchange is taken."""
        return self._ceiling

    @property
    def held(self) -> int:
        """Bytes of bodies and flows now."""
        return self.budget.held + self.meter.bytes

    def take_nowait(self) -> bool:
        """Take a place if nothing stands in the way; else ask `take`. It runs for each exchange."""
        if self.used >= self._limit or self.budget.held + self.meter.bytes >= self._ceiling:
            return False
        self.used += 1
        return True

    async def take(self) -> Failure | None:
        """Where `take_nowait` just said no: wait for a place if there may be one soon; the failure if not.

        A checkpoint if it waits; cancelling it leaves nothing behind.
        """
        if self.held >= self._ceiling:
            return self._refusal("It holds as many bytes as it may.")
        if len(self._queue) >= self._waiters:
            return self._refusal(f"All {self._limit:.0f} places are taken, and enough requests wait for one.")
        task = trio.lowlevel.current_task()
        self._queue[task] = None

        def abandon(_raise_cancel: Any) -> trio.lowlevel.Abort:
            del self._queue[task]
            return trio.lowlevel.Abort.SUCCEEDED

        granted = False
        with trio.move_on_after(self._patience):
            await trio.lowlevel.wait_task_rescheduled(abandon)
            granted = True  # the place is ours: no checkpoint lies between here and the caller
        return None if granted else self._refusal(f"No place became free within {self._patience:g} s.")

    def give(self, seconds: float) -> None:
        """Give a place back that was held for so long. Not a checkpoint."""
        self._pace.ended(seconds)
        if self._queue and self.used <= self._limit:
            self._wake()
        else:
            self.used -= 1

    def _wake(self) -> None:
        task, _ = self._queue.popitem(last=False)
        trio.lowlevel.reschedule(task, outcome.Value(None))

    def _refusal(self, detail: str) -> Failure:
        after = self._pace.wait(self.used, len(self._queue))
        return Failure(Side.GATEWAY, Phase.ROUTE, Kind.OVERLOADED, detail, Retry.NO, after)
