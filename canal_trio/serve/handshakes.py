"""Which TLS handshakes are at work, and which wait: a bound on their memory, and on how long they keep others waiting.

A handshake costs some tens of kilobytes for as long as its client likes, and up to a millisecond of signing in one
step. So there are at most so many at once; the rest wait in line, inside their own deadline. While somebody waits, a
handshake gets `HURRY` seconds instead of its whole deadline, so that those who stop half way cannot keep everybody else
out. And between two turns of everybody else (the streams, above all) at most `STEPS` handshakes begin.

Invariant: `end` is called once for each `begin` that returned, whatever happened in between.
"""

from __future__ import annotations

from typing import final

import trio

__all__ = ["HURRY", "STEPS", "Handshakes"]

HURRY = 1.0  # seconds: several round trips to the other side of the world
STEPS = 8


@final
class Handshakes:
    """Each is known by the scope that it runs in."""

    def __init__(self, most: int) -> None:
        self._places = trio.CapacityLimiter(most)
        self._steps = trio.CapacityLimiter(STEPS)
        self._running: dict[trio.CancelScope, float] = {}  # since when

    @property
    def running(self) -> int:
        """Handshakes at work."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Handshakes in line."""
        return self._places.statistics().tasks_waiting

    def resize(self, most: int) -> None:
        """Change the bound; what runs goes on."""
        self._places.total_tokens = most

    async def begin(self, scope: trio.CancelScope) -> None:
        """Wait for a place, and for one's turn. `scope` may get an earlier deadline. A checkpoint.

        Cancelled, there is nothing to be ended.
        """
        if not self.waiting and self._places.available_tokens <= 0:
            for other, since in self._running.items():
                other.deadline = min(other.deadline, since + HURRY)
        await self._places.acquire_on_behalf_of(scope)
        try:
            async with self._steps:
                await trio.lowlevel.checkpoint()  # everybody else gets a turn before this one makes room for the next
        except BaseException:
            self._places.release_on_behalf_of(scope)
            raise
        now = self._running[scope] = trio.current_time()
        if self.waiting:
            scope.deadline = min(scope.deadline, now + HURRY)

    def end(self, scope: trio.CancelScope) -> None:
        """It is over, however it ended. Not a checkpoint."""
        del self._running[scope]
        self._places.release_on_behalf_of(scope)
