"""Days and months of the calendar (UTC) as numbers, for budgets. Pure, but for the clock it is given.

Worked out once a day: within a day only the seconds that are left change.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import final

from canal_trio.policy.ratelimit import Moment

__all__ = ["Calendar"]

_DAY = 86_400


@final
class Calendar:
    """`wall` gives Unix time in seconds."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._day = -1
        self._month = 0
        self._month_ends = 0.0

    def moment(self, now: float) -> Moment:
        """This moment, which a clock that only rises calls `now`."""
        wall = self._wall()
        day = int(wall // _DAY)
        if day != self._day:
            today = datetime.fromtimestamp(day * _DAY, UTC)
            self._day, self._month = day, today.year * 12 + today.month - 1
            year, month = divmod(self._month + 1, 12)
            self._month_ends = datetime(year, month + 1, 1, tzinfo=UTC).timestamp()
        return Moment(now, day, self._month, (day + 1) * _DAY - wall, self._month_ends - wall)
