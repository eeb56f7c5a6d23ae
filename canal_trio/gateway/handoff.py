"""From a connection's reader to its driver: one exchange after the other.

The reader makes the next exchange only when the one before is finished, so one slot is all there is to it. Invariant:
an exchange that was put is taken, or its connection is over.
"""

from __future__ import annotations

from typing import Any, final

import outcome
import trio

from canal_trio.errors import CanalError
from canal_trio.gateway.exchange import Exchange

__all__ = ["Handoff"]


@final
class Handoff:
    """`put` and `close` are the reader's, `take` is the driver's."""

    __slots__ = ("_closed", "_exchange", "_taker")

    def __init__(self) -> None:
        self._exchange: Exchange | None = None
        self._taker: trio.lowlevel.Task | None = None
        self._closed = False

    def put(self, exchange: Exchange) -> None:
        """Not a checkpoint. Raises CanalError if the exchange before was not taken."""
        if self._exchange is not None:
            raise CanalError("the exchange before was not taken")
        self._exchange = exchange
        self._wake()

    def close(self) -> None:
        """There will be no more; what was put is still taken. Not a checkpoint; idempotent."""
        self._closed = True
        self._wake()

    async def take(self) -> Exchange | None:
        """The next exchange, None if there is none. A checkpoint only if it waits; cancelling it loses nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._exchange is None and not self._closed:

            def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
                self._taker = None
                return trio.lowlevel.Abort.SUCCEEDED

            self._taker = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)
        exchange, self._exchange = self._exchange, None
        return exchange

    def _wake(self) -> None:
        task, self._taker = self._taker, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None))
