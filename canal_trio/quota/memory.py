"""Counting in this machine's memory: alone, or together with the other workers.

The memory belongs to the process that made it; workers get its descriptor. The lock is a record lock on that
descriptor (fcntl): the kernel gives it back when its holder dies, however it dies. It is held for microseconds; a
holder that was stopped in the middle is waited for `PATIENCE` seconds, once, and then for none until it is back.

A worker that is alone has its table for itself: there the usual exchange is let in and settled in the states at hand,
without the table. Invariant: that comes to the same.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from typing import final

import trio

from canal_trio.policy.calendar import Calendar
from canal_trio.policy.ratelimit import Ask, begin_far, settle_back
from canal_trio.policy.scopes import Scope
from canal_trio.quota.admission import Verdict
from canal_trio.quota.table import WAYS, Counted, Table, table_bytes
from canal_trio.settings import Settings

__all__ = ["Busy", "MemoryStore", "SharedMemory", "memory_for"]

PATIENCE = 0.05  # seconds
_PAUSE = 50e-6
_LEAST_RECORDS = 16_384

_log = logging.getLogger("canal_trio.quota")


class Busy(Exception):
    """The lock was not to be had in time."""


@final
class SharedMemory:
    """Memory for the tables of `columns` workers. `fd` is what a worker needs of it."""

    def __init__(self, fd: int, size: int, columns: int) -> None:
        self.fd = fd
        self.columns = columns
        self.memory = mmap.mmap(fd, size)

    @classmethod
    def make(cls, records: int, columns: int) -> SharedMemory:
        """New memory, of which nothing is used yet: the kernel gives pages when they are written to."""
        size = table_bytes(records, columns)
        fd = os.memfd_create("canal-limits")
        os.ftruncate(fd, size)
        return cls(fd, size, columns)

    @classmethod
    def attach(cls, fd: int, columns: int) -> SharedMemory:
        """Memory that somebody else has made."""
        return cls(fd, os.fstat(fd).st_size, columns)

    def table(self, column: int) -> Table:
        """The view of one worker."""
        return Table(self.memory, column=column, columns=self.columns, lock=_FileLock(self.fd))

    def close(self) -> None:
        """Forget it; others keep theirs."""
        self.memory.close()
        os.close(self.fd)


def memory_for(settings: Settings) -> int:
    """How many records a table for these settings should have: with room for what a reload adds."""
    wanted = 4 * (len(settings.keys) + len(settings.models) + len(settings.limits))
    return max(_LEAST_RECORDS, -(-wanted // WAYS) * WAYS)


@final
class _FileLock:
    """Mutual exclusion of processes (not of threads) by a record lock on `fd`. Entering raises `Busy`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._patient = True

    def __enter__(self) -> None:
        deadline = None
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            except (BlockingIOError, PermissionError):
                now = time.perf_counter()
                deadline = deadline or now + (PATIENCE if self._patient else 0)
                if now >= deadline:
                    self._patient = False
                    raise Busy from None
                time.sleep(_PAUSE)
            else:
                self._patient = True
                return

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)


@final
class MemoryStore:
    """A `quota.admission.Store` over a table. `clock` gives seconds that all who share the table agree on."""

    away = False  # memory is always there

    def __init__(
        self, table: Table, *, clock: Callable[[], float] = trio.current_time, wall: Callable[[], float] = time.time
    ) -> None:
        self.table = table
        self._clock = clock
        self._calendar = Calendar(wall)
        self._unsettled: deque[tuple[Counted, Ask, Ask]] = deque()  # the lock was not to be had
        self._again = _Again(self, clock, self._calendar)
        self.errors = 0

    async def admit(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict | None:
        """As `admit_now`. Not a checkpoint."""
        return self.admit_now(scopes, ask)

    def admit_now(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict | None:
        """The verdict; None if the table cannot be had."""
        try:
            if self._unsettled:
                self._catch_up()
            counted, why = self.table.admit(scopes, ask, self._calendar.moment(self._clock()))
            alone = not self.table.shared and len(counted) == len(scopes)
            return Verdict(counted, why, self, self._again if alone else None)
        except Busy:
            self.errors += 1
            return None

    def settle(self, counted: Counted, ask: Ask, used: Ask) -> None:
        """Now, or before anything is let in again."""
        try:
            if self._unsettled:
                self._catch_up()
            self.table.settle(counted, ask, used, self._calendar.moment(self._clock()))
        except Busy:
            self._unsettled.append((counted, ask, used))
            self.errors += 1
            _log.warning("limits: another worker holds the lock: settling later")

    def _catch_up(self) -> None:
        while self._unsettled:
            self.table.settle(*self._unsettled[0], self._calendar.moment(self._clock()))
            self._unsettled.popleft()

    async def flush(self) -> None:
        """It is."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Nothing to do in the background."""
        task_status.started()


@final
class _Again:
    """The short way of `store`, whose table nobody else has: nothing has to be locked for those whose states are known,
    and no place looked at."""

    def __init__(self, store: MemoryStore, clock: Callable[[], float], calendar: Calendar) -> None:
        self._store = store
        self._table = store.table
        self._clock = clock
        self._calendar = calendar

    def begin(self, counted: Counted, ask: Ask) -> bool:
        """Let it in, in the states that a verdict had. False: one has given way, or the store has to think about it."""
        now = self._clock()
        if not begin_far(counted, ask, now, self._calendar.today(now)[0]):
            return False
        if ask.cost:
            self._table.spends = True
        return True

    def settle(self, counted: Counted, ask: Ask, used: Ask) -> None:
        """What `begin` has let in has ended. None of its states has given way meanwhile: it was in flight."""
        if not settle_back(counted, ask, used, self._calendar.today(self._clock())):
            self._store.settle(counted, ask, used)
        elif ask.cost or used.cost:
            self._table.spends = True
