"""From a connection's reader to its driver: one exchange after the other, some of them begun already.

The reader makes the next exchange only when the one before is finished, so one slot is all there is to it. An exchange
that runs ahead (`relay.course`), in the steps of the poller, is no business of the driver's until it needs a task.
Invariants: an exchange that was put is taken, or its connection is over; the driver is not told that there is nothing
more, and is not cancelled in its wait, while one runs ahead: it gets that one first.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, final

import outcome
import trio

from canal_trio.errors import CanalError, Failure
from canal_trio.gateway.deliver import Delivery
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.pipeline import Pipeline
from canal_trio.relay.course import Course

__all__ = ["Handoff", "Work"]


@final
class Work:
    """One exchange, and how it is worked on. `pipeline` is None where there is nothing to do but to answer.

    With `own`, the whole answer, if the request ends here by its own wish; else with what was noted.
    """

    __slots__ = ("course", "delivery", "exchange", "keep", "own", "pipeline")

    def __init__(
        self,
        exchange: Exchange,
        delivery: Delivery,
        pipeline: Pipeline | None,
        *,
        keep: bool,
        own: bytes | None = None,
    ) -> None:
        self.exchange = exchange
        self.delivery = delivery
        self.pipeline = pipeline
        self.keep = keep  # the client keeps the connection open
        self.own = own
        self.course: Course[Failure | None] | None = None  # of the pipeline, if it has begun

    def run(self) -> Awaitable[Failure | None]:
        """The pipeline, or what is left of it; to be awaited at once."""
        assert self.pipeline is not None
        return self.pipeline.run() if self.course is None else self.course.finish()


@final
class Handoff:
    """`put`, `ahead` and `close` are the reader's, `take` is the driver's."""

    __slots__ = ("_closed", "_taker", "_work", "ahead")

    def __init__(self) -> None:
        self._work: Work | None = None
        self._taker: trio.lowlevel.Task | None = None
        self._closed = False
        self.ahead: Course[Failure | None] | None = None  # what runs without the driver: it is put when it needs it

    def put(self, work: Work) -> None:
        """Not a checkpoint. Raises CanalError if the exchange before was not taken."""
        if self._work is not None:
            raise CanalError("the exchange before was not taken")
        self._work = work
        self._wake()

    def close(self) -> None:
        """There will be no more; what was put, or runs ahead, is still taken. Not a checkpoint; idempotent."""
        self._closed = True
        self._summon()
        self._wake()

    async def take(self) -> Work | None:
        """The next exchange, None if there is none. A checkpoint only if it waits; cancelling it loses nothing."""
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._work is None and not self._closed:

                def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
                    self._taker = None
                    return trio.lowlevel.Abort.SUCCEEDED

                self._taker = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(abort)
        except trio.Cancelled:
            self._summon()
            if self._work is None or self._work.course is None:
                raise
            # What was begun is to be unwound, for which there must be a task: it meets the same cancellation there.
        work, self._work = self._work, None
        return work

    def _summon(self) -> None:
        if self.ahead is not None:
            self.ahead.summon()

    def _wake(self) -> None:
        task, self._taker = self._taker, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None))
