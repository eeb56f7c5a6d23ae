"""Days and months of the calendar (UTC) as numbers, for budgets. Pure, but for the clock it is given.

Worked out once a day: within a day only the seconds that are left change. `today` does not even look at that: it looks
at the clock once a second, so that one that somebody sets is noticed a second later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import final

from canal_trio.policy.ratelimit import Moment

__all__ = ["Calendar"]

_DAY = 86_400
_LOOKS = 1.0  # seconds


@final
class Calendar:
    """`wall` gives Unix time in seconds."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._day = self._month = 0
        self._begins, self._ends = math.inf, 0.0  # the day
        self._month_ends = 0.0
        self._looks = -math.inf  # when `today` looks again
        self._today = 0, 0

    def today(self, now: float) -> tuple[int, int]:
        """The day and the month of this moment, which a clock that only rises calls `now`."""
        if now >= self._looks:
            moment = self.moment(now)
            self._looks, self._today = now + min(_LOOKS, moment.day_left), (moment.day, moment.month)
        return self._today

    def moment(self, now: float) -> Moment:
        """This moment, which a clock that only rises calls `now`."""
        wall = self._wall()
        if not self._begins <= wall < self._ends:
            self._turn(int(wall // _DAY))
        fields = (now, self._day, self._month, self._ends - wall, self._month_ends - wall)
        return tuple.__new__(Moment, fields)  # as `Moment`, in half the time

    def _turn(self, day: int) -> None:
        self._begins, self._ends = day * _DAY, (day + 1) * _DAY
        today = datetime.fromtimestamp(day * _DAY, UTC)
        self._day, self._month = day, today.year * 12 + today.month - 1
        year, month = divmod(self._month + 1, 12)
        self._month_ends = datetime(year, month + 1, 1, tzinfo=UTC).timestamp()
