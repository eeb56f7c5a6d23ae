"""One task that looks at all idle deadlines.

On the data path only "last moved at" is stored; here a check per watched thing turns that into a verdict, not before
it can be due. A check that finds nothing due answers when to look again, so a stream that never rests costs one look
per timeout, not one timer per piece.

Invariants: a check is called once per due time, never after `Watch.cancel()`, and never before the time it asked for;
what a check raises is a bug, is logged, drops that check and disturbs no other. Between two turns of everybody else at
most `BATCH` checks are called: a thousand connections that are due in one moment are ended one after the other, and the
others' bytes flow meanwhile. The heap holds at most twice as many entries as there are live watches (plus a constant):
cancelling only marks, and the marked are swept in bulk. A look that is late, because the process was held up, comes
after what arrived meanwhile: silence is the peer's, not ours.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import trio

__all__ = ["Check", "Reaper", "ReaperStatistics", "Watch", "clock_of_run"]

Check: TypeAlias = Callable[[float], float]
"""Gets the time (Trio's clock), acts if something is due, answers the time of the next look; `math.inf`: no more."""

BATCH = 16
GRAIN = 0.001  # seconds until the next look when a check asks for one at once: rounding must not become a busy loop
LATE = 0.01  # seconds after its time at which a look is late
CATCH_UP = 4  # passes of the scheduler that others get before a late look; the poller serves 256 events in each
SWEEP_AT = 64  # marked entries below this number are not worth a sweep

_log = logging.getLogger("canal_trio.relay")


def clock_of_run() -> Callable[[], float]:
    """`trio.current_time`, for as long as this run lasts, without looking for the run each time. Not a checkpoint.

    One for all: thousands of streams have two each."""
    try:
        return _clock.get()
    except LookupError:
        clock = trio.lowlevel.current_clock().current_time
        _clock.set(clock)
        return clock


_clock: trio.lowlevel.RunVar[Callable[[], float]] = trio.lowlevel.RunVar("canal_trio.relay.clock")


@dataclass(frozen=True, slots=True)
class ReaperStatistics:
    """Counts of one reaper."""

    watched: int  # checks that may still be called
    looks: int  # calls of checks so far
    faults: int  # checks that raised


@final
class Watch:
    """One check in a reaper's care. Made by `Reaper.add`."""

    __slots__ = ("_at", "_check", "_queued", "_reaper")

    def __init__(self, reaper: Reaper, check: Check, at: float) -> None:
        self._reaper = reaper
        self._check: Check | None = check
        self._at = at
        self._queued = False

    def __repr__(self) -> str:
        return f"<Watch {'over' if self._check is None else f'until {self._at:.3f}'}>"

    def cancel(self) -> None:
        """The check is not called again, not even if it is due in this very step. Idempotent, O(1) amortised."""
        if self._check is not None:
            self._check = None
            if self._queued:
                self._reaper._mark()


@final
class Reaper:
    """Calls checks when they are due. Checks are accepted before `run()` has started and after it has ended."""

    __slots__ = ("_faults", "_heap", "_looks", "_marked", "_numbers", "_running", "_scope")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Watch]] = []
        self._numbers = itertools.count()  # equal times are served in the order they were asked for
        self._marked = 0
        self._looks = self._faults = 0
        self._scope: trio.CancelScope | None = None  # of the present sleep
        self._running = False

    def __repr__(self) -> str:
        return f"<Reaper watching {len(self._heap) - self._marked}, {'running' if self._running else 'idle'}>"

    def add(self, check: Check, at: float) -> Watch:
        """Have `check(now)` called not before `at`, an absolute time on Trio's clock; in the past means at once.

        `check` is synchronous, acts by itself (notes the failure, cancels a scope) and answers when to look again. An
        answer that is not in the future is taken as a millisecond from now. Not a checkpoint, O(log n).
        """
        watch = Watch(self, check, at)
        self._push(watch)
        return watch

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after the checks until cancelled; they are kept for a later `run()`.

        Raises RuntimeError if it runs already.
        """
        if self._running:
            raise RuntimeError("this reaper runs already")
        self._running = True
        more = False  # a look has left some that are due for the next one: that is no hold-up
        try:
            task_status.started()
            while True:
                # Moving the deadline of the sleep is all that an earlier `add` has to do.
                with trio.CancelScope(deadline=self._heap[0][0] if self._heap else math.inf) as self._scope:
                    await trio.sleep_forever()
                self._scope = None
                if not more and self._heap and trio.current_time() > self._heap[0][0] + LATE:
                    await self._let_others_catch_up()
                now = trio.current_time()
                self._look(now)
                more = bool(self._heap) and self._heap[0][0] <= now
        finally:
            self._scope = None
            self._running = False

    async def _let_others_catch_up(self) -> None:
        """The whole process was held up: what has come meanwhile is read before anybody is called silent."""
        for _ in range(CATCH_UP):
            await trio.lowlevel.checkpoint()

    def statistics(self) -> ReaperStatistics:
        """A snapshot of the reaper's counters."""
        return ReaperStatistics(len(self._heap) - self._marked, self._looks, self._faults)

    def _look(self, now: float) -> None:
        due: list[Watch] = []  # collected first, so that a check which adds another due one cannot keep us here
        while self._heap and self._heap[0][0] <= now and len(due) < BATCH:
            watch = heapq.heappop(self._heap)[2]
            watch._queued = False
            if watch._check is None:
                self._marked -= 1
            else:
                due.append(watch)
        for watch in due:
            check = watch._check
            if check is None:
                continue  # cancelled by a check before it
            self._looks += 1
            try:
                again = check(now)
            except Exception:
                self._faults += 1
                watch._check = None
                _log.exception("an idle check raised and was dropped")
                continue
            if again == math.inf:
                watch._check = None
            if watch._check is not None:
                watch._at = again if again > now else now + GRAIN
                self._push(watch)

    def _push(self, watch: Watch) -> None:
        if watch._at == math.inf:
            return
        watch._queued = True
        heapq.heappush(self._heap, (watch._at, next(self._numbers), watch))
        if self._scope is not None and watch._at < self._scope.deadline:
            self._scope.deadline = watch._at

    def _mark(self) -> None:
        self._marked += 1
        if self._marked >= SWEEP_AT and self._marked * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2]._check is not None]
            heapq.heapify(self._heap)
            self._marked = 0
