"""A head before the upstream has said anything: for clients, and for what lies between, that give up on silence.

`early_head_after` seconds after a streaming request was read, a 200 of an event stream goes out, and from then on a
comment after each `heartbeat` of silence, until an upstream's answer is there. The price is that the true status can no
longer be told: whatever fails behind it is an error in the stream. It does not end the attempts: no byte of an answer
was relayed. Invariant: only one of the two writes to the client, this task or the driver: `stop()` waits until this one
has ended.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import trio

if TYPE_CHECKING:
    from canal_trio.gateway.deliver import Delivery

__all__ = ["EarlyHead"]


@final
class EarlyHead:
    """For one exchange. `after` is on Trio's clock, `heartbeat` in seconds, if there are any."""

    def __init__(self, delivery: Delivery, after: float, heartbeat: float | None) -> None:
        self._delivery = delivery
        self._after = after
        self._heartbeat = heartbeat or math.inf
        self._stop = trio.Event()
        self._ended = trio.Event()

    async def run(self) -> None:
        """Until `stop()`, or until the client is gone. Cancelled, a write may be left half done, in the writer."""
        try:
            with trio.move_on_at(self._after):
                await self._stop.wait()
            if not self._stop.is_set() and await self._delivery.early_head():
                await self._beat()
        finally:
            self._ended.set()

    async def _beat(self) -> None:
        while not self._stop.is_set():
            with trio.move_on_after(self._heartbeat):
                await self._stop.wait()
            if not self._stop.is_set() and not await self._delivery.ping():
                return

    async def stop(self) -> None:
        """The answer is here. A checkpoint."""
        self._stop.set()
        await self._ended.wait()
