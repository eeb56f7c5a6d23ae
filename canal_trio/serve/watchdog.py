"""Our own watchdog: the supervisor asks each worker how it is, and kills one that does not answer.

A loop that hangs serves nobody, holds its streams and still has its share of new connections: only its end helps them.
Invariant: two answers in a row have to be missed, so that a supervisor that was itself stopped for a while (its
timers are all due when it wakes, before it has read a word) takes nobody for dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import trio

from canal_trio.serve.control import Accepting, Ask, Report

__all__ = ["Guarded", "guard"]

STARTING = 120.0  # seconds from the start of a process until it accepts
OFTEN = 1.0  # seconds between two looks whether it does
A_DAY = 86_400.0


class Guarded(Protocol):
    """What is needed of a `Worker`."""

    accepting: Accepting | None
    complaint: str

    async def ask(self, question: Ask, kind: type[Report], *, within: float) -> Report | None:
        """Its answer, or None."""

    def kill(self) -> bool:
        """End it."""


async def guard(worker: Guarded, patience: Callable[[], float]) -> None:
    """Kill one process of `worker` when it hangs, saying so in `complaint`; runs until then, or until cancelled.

    It hangs when it does not accept after `STARTING` seconds, or when, later, nothing is heard of it for `patience()`
    seconds, in which it is asked twice; infinite: never.
    """
    since = trio.current_time()
    while worker.accepting is None:
        if trio.current_time() - since >= STARTING:
            worker.complaint = f"it hung: it did not accept connections within {STARTING:g} s"
            worker.kill()
            return
        await trio.sleep(OFTEN)
    missed = 0
    while missed < 2:
        limit = patience()
        if not missed:
            await trio.sleep(min(limit / 3, A_DAY))
        if math.isfinite(limit):
            answer = await worker.ask(Ask(0, "state"), Report, within=limit / 3)
            missed = missed + 1 if answer is None else 0
    worker.complaint = f"it hung: nothing was heard of it for {patience():g} s"
    worker.kill()
