"""When will a place be free? What `retry-after` is computed from: how long places are held, and how many there are.

Pure: durations come as arguments. Of `busy` places, each held for some mean time, one becomes free every `mean / busy`
seconds (Little's law); who has `ahead` others in front of them waits for that many and one more. Invariant: an answer
is never below `SHORTEST` or above `LONGEST`: what is promised beyond a minute is no knowledge.
"""

from __future__ import annotations

from typing import final

__all__ = ["LONGEST", "SHORTEST", "Pace"]

SHORTEST, LONGEST = 1.0, 60.0  # seconds
_WEIGHT = 1 / 16  # of the newest duration in the mean: some dozens of exchanges are remembered


@final
class Pace:
    """The mean time for which a place is held, lately."""

    __slots__ = ("mean",)

    def __init__(self) -> None:
        self.mean: float | None = None  # seconds; None: nothing is known yet

    def ended(self, seconds: float) -> None:
        """A place was held for so long. It runs for each exchange."""
        mean = self.mean
        self.mean = seconds if mean is None else mean + (seconds - mean) * _WEIGHT

    def wait(self, busy: int, ahead: int) -> float:
        """Seconds until a place will be free for somebody with `ahead` others in front, of `busy` that are taken."""
        mean = SHORTEST if self.mean is None else self.mean
        return min(LONGEST, max(SHORTEST, mean * (ahead + 1) / max(1, busy)))
