"""How often another attempt may follow, and after what pause. No I/O; `now` and random numbers are arguments.

The budget is a bucket: each exchange puts a part of a retry in, and so does each second; each retry takes one out. So
in any stretch there are at most *share x exchanges + floor x seconds + burst* retries, whatever goes wrong: a fleet of
upstreams that is overloaded is not made to bear double the load.
"""

from __future__ import annotations

from typing import final

from canal_trio.settings import Retries

__all__ = ["RetryBudget", "pause"]


@final
class RetryBudget:
    """The retries of one model's exchanges. Begins full. `refused` counts those there was nothing left for."""

    __slots__ = ("_at", "_credit", "_options", "refused")

    def __init__(self, options: Retries, now: float) -> None:
        self._options = options
        self._credit = options.burst
        self._at = now
        self.refused = 0

    def exchange(self) -> None:
        """An exchange begins."""
        if self._credit < self._options.burst:  # seldom
            self._credit = min(self._credit + self._options.share, self._options.burst)

    def take(self, now: float) -> bool:
        """May there be a retry? If so it is counted."""
        options = self._options
        self._credit = min(self._credit + options.floor * max(now - self._at, 0.0), options.burst)
        self._at = now
        if self._credit < 1.0:
            self.refused += 1
            return False
        self._credit -= 1.0
        return True


def pause(retry: int, options: Retries, chance: float) -> float:
    """Seconds to wait before the `retry`th attempt after the first: a random part of what doubles each time."""
    return chance * min(options.backoff * 2.0 ** min(retry - 1, 64), options.backoff_most)
