"""Who is taken for hung, and when: a fake worker in virtual time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import trio

from canal_trio.serve.control import Accepting, Ask, Report
from canal_trio.serve.watchdog import STARTING, guard


class FakeWorker:
    """Answers as it is told to: True in time, False never; after the last one always in time."""

    def __init__(self, answers: Iterable[bool], accepts_after: float = 0.0) -> None:
        self.answers = iter(answers)
        self.accepting: Accepting | None = None if accepts_after else Accepting(1, 1, None)
        self.accepts_after = accepts_after
        self.complaint = ""
        self.asked = 0
        self.killed_at: float | None = None

    async def start(self) -> None:
        """It accepts, later."""
        await trio.sleep(self.accepts_after)
        self.accepting = Accepting(1, 1, None)

    async def ask(self, question: Ask, kind: type[Report], *, within: float) -> Report | None:
        """As told."""
        self.asked += 1
        if next(self.answers, True):
            await trio.sleep(within / 2)
            return Report(question.id, True, False)
        await trio.sleep(within)
        return None

    def kill(self) -> bool:
        """Noted."""
        self.killed_at = trio.current_time()
        return True


async def watched(worker: FakeWorker, seconds: float, patience: float = 30.0) -> float | None:
    """Seconds until it was killed, if it was."""
    began = trio.current_time()
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.start)
            await guard(worker, lambda: patience)
            nursery.cancel_scope.cancel()
    return None if worker.killed_at is None else worker.killed_at - began


async def test_a_worker_that_falls_silent(autojump_clock: trio.testing.MockClock) -> None:
    """It is killed as long after its last answer as it was given, and the complaint says so."""
    worker = FakeWorker([True, False, False])
    assert await watched(worker, 1000) == 10 + 5 + 10 + 10 + 10
    assert worker.complaint == "it hung: nothing was heard of it for 30 s"


async def test_one_missed_answer_is_forgiven(autojump_clock: trio.testing.MockClock) -> None:
    """A worker, or a supervisor, that was stopped for a moment costs nobody a stream."""
    worker = FakeWorker([False, True] * 20)
    assert await watched(worker, 1000) is None
    assert worker.asked > 40
    assert worker.complaint == ""


async def test_no_limit_asks_nobody(autojump_clock: trio.testing.MockClock) -> None:
    """An infinite patience turns the watchdog off."""
    worker = FakeWorker([False] * 9)
    assert await watched(worker, 10 * 86_400, math.inf) is None
    assert worker.asked == 0


async def test_a_worker_that_never_gets_ready(autojump_clock: trio.testing.MockClock) -> None:
    """It hangs before it accepts: it is killed, too. A slow one is not."""
    worker = FakeWorker([], accepts_after=math.inf)
    assert await watched(worker, 1000) == STARTING
    assert "did not accept" in worker.complaint
    assert await watched(FakeWorker([], accepts_after=STARTING - 2), 1000) is None
