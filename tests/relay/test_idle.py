"""The reaper: exact, cheap, undisturbed by a bad check."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from canal_trio.relay.idle import BATCH, CATCH_UP, GRAIN, LATE, SWEEP_AT, Reaper, Watch


def once(seen: list[float]) -> Callable[[float], float]:
    """A check that notes when it was called and asks for no more."""

    def check(now: float) -> float:
        seen.append(now)
        return math.inf

    return check


async def test_a_check_is_called_at_its_very_time(autojump_clock, nursery):
    """Under virtual time a check sees exactly the time it asked for, and the times its answers ask for."""
    reaper, seen = Reaper(), []

    def check(now: float) -> float:
        seen.append(now)
        return now + 5 if len(seen) < 3 else math.inf

    reaper.add(check, 10)
    await nursery.start(reaper.run)
    await trio.sleep(100)
    assert seen == [10, 15, 20]
    assert reaper.statistics().watched == 0
    assert reaper.statistics().looks == 3


async def test_an_earlier_entry_shortens_the_sleep(autojump_clock, nursery):
    """A check added while the reaper sleeps towards a later one is called in its own time."""
    reaper, seen = Reaper(), []
    await nursery.start(reaper.run)
    await wait_all_tasks_blocked()
    reaper.add(once(seen), 50)
    await wait_all_tasks_blocked()
    reaper.add(once(seen), 7)
    reaper.add(once(seen), 60)
    await trio.sleep(100)
    assert seen == [7, 50, 60]


async def test_what_is_due_already_is_looked_at_at_once(autojump_clock, nursery):
    """A time in the past is as good as now."""
    await trio.sleep(3)
    reaper, seen = Reaper(), []
    await nursery.start(reaper.run)
    await wait_all_tasks_blocked()
    reaper.add(once(seen), 1)
    await wait_all_tasks_blocked()
    assert seen == [3]


async def test_a_cancelled_watch_is_never_called(autojump_clock, nursery):
    """Cancel is final, idempotent, and holds even for a check that is due in the same step."""
    reaper, seen = Reaper(), []
    watches: list[Watch] = []

    def cancel_the_other(now: float) -> float:
        watches[1].cancel()
        watches[1].cancel()
        return math.inf

    watches.append(reaper.add(cancel_the_other, 5))
    watches.append(reaper.add(once(seen), 5))
    early = reaper.add(once(seen), 2)
    early.cancel()
    assert "over" in repr(early)
    await nursery.start(reaper.run)
    await trio.sleep(10)
    assert seen == []
    watches[0].cancel()  # over already: no effect


async def test_a_check_may_cancel_itself(autojump_clock, nursery):
    """A check that cancels its own watch is not called again, whatever it answers."""
    reaper, calls = Reaper(), []

    def check(now: float) -> float:
        calls.append(now)
        watch.cancel()
        return now + 1

    watch = reaper.add(check, 1)
    await nursery.start(reaper.run)
    await trio.sleep(10)
    assert calls == [1]


async def test_a_raising_check_is_logged_and_dropped(autojump_clock, nursery, caplog):
    """A bug in one check stops neither the reaper nor the checks that are due with it."""
    reaper, seen = Reaper(), []

    def broken(_now: float) -> float:
        raise RuntimeError("broken check")

    reaper.add(broken, 1)
    reaper.add(once(seen), 1)
    reaper.add(once(seen), 2)
    await nursery.start(reaper.run)
    with caplog.at_level(logging.ERROR, "canal_trio.relay"):
        await trio.sleep(10)
    assert seen == [1, 2]
    assert "broken check" in caplog.text
    assert reaper.statistics().faults == 1


async def test_an_answer_in_the_past_is_not_a_busy_loop(autojump_clock, nursery):
    """A check that keeps asking for now is looked at again a grain later, so time goes on."""
    reaper, seen = Reaper(), []

    def check(now: float) -> float:
        seen.append(now)
        return now if len(seen) < 3 else math.inf

    reaper.add(check, 1)
    await nursery.start(reaper.run)
    await trio.sleep(10)
    assert seen == pytest.approx([1, 1 + GRAIN, 1 + 2 * GRAIN])


async def test_never_is_never(autojump_clock, nursery):
    """A check added for `math.inf` holds nothing and is never called."""
    reaper, seen = Reaper(), []
    watch = reaper.add(once(seen), math.inf)
    await nursery.start(reaper.run)
    await trio.sleep(1000)
    watch.cancel()
    assert seen == []
    assert reaper.statistics().watched == 0


async def test_a_check_added_by_a_check_waits_for_the_next_look(autojump_clock, nursery):
    """A check that adds due checks for ever does not keep the reaper in one step."""
    reaper, seen = Reaper(), []

    def breed(now: float) -> float:
        seen.append(now)
        if len(seen) < 100:
            reaper.add(breed, now)
        return math.inf

    reaper.add(breed, 1)
    await nursery.start(reaper.run)
    passes = 0
    await trio.sleep(1)
    while len(seen) < 100:
        passes += 1
        await trio.lowlevel.checkpoint()
    assert passes > 10


async def test_it_runs_once_at_a_time_and_again_after_a_cancel(autojump_clock):
    """A second `run` is refused; after a cancelled one the checks are still there for the next."""
    reaper, seen = Reaper(), []
    reaper.add(once(seen), 10)
    assert "watching 1, idle" in repr(reaper)
    with trio.move_on_after(3):
        async with trio.open_nursery() as nursery:
            await nursery.start(reaper.run)
            assert "watching 1, running" in repr(reaper)
            with pytest.raises(RuntimeError):
                await reaper.run()
    with trio.move_on_after(20):
        await reaper.run()
    assert seen == [10]


@pytest.mark.parametrize("attempt", range(10))  # who goes first in one pass of the scheduler is drawn
async def test_a_peer_called_silent_by_a_process_that_was_held_up(nursery, attempt):
    """What arrived in time is read before a late look: a machine that stood still cuts nobody off."""
    reaper, seen, order = Reaper(), [], []
    ours, theirs = socket.socketpair()
    with ours, theirs:

        async def read() -> None:
            await trio.lowlevel.wait_readable(ours)
            order.append("read")

        def check(now: float) -> float:
            order.append("look")
            return once(seen)(now)

        nursery.start_soon(read)
        await nursery.start(reaper.run)
        await wait_all_tasks_blocked()
        reaper.add(check, trio.current_time() + 0.005)  # and no checkpoint before the hold-up: it must not be due yet
        theirs.send(b"x")
        time.sleep(LATE + 0.02)  # noqa: ASYNC251  # the whole process is held up
        await trio.sleep(0.05)
    assert order == ["read", "look"]


async def test_a_thousand_deadlines_in_one_moment_held_up_everybody(autojump_clock, nursery):
    """Between two turns of another task a bounded number of checks is called, and all of them at their time."""
    reaper, seen = Reaper(), []
    for _ in range(1000):
        reaper.add(once(seen), 5)
    await nursery.start(reaper.run)
    await trio.sleep_until(5)
    most, before = 0, len(seen)
    while len(seen) < 1000:
        await trio.lowlevel.checkpoint()
        most, before = max(most, len(seen) - before), len(seen)
    assert most <= 2 * BATCH  # of two turns, if a coin made the reaper the last one of one and the first of the next
    assert seen == [5] * 1000


async def test_cancelled_watches_do_not_pile_up():
    """However many are added and cancelled, the heap stays within twice the live ones and a constant."""
    reaper = Reaper()
    keep = [reaper.add(lambda _now: math.inf, 1e9) for _ in range(10)]
    for number in range(5_000):
        reaper.add(lambda _now: math.inf, 1e6 + number).cancel()
        assert len(reaper._heap) <= 2 * len(keep) + SWEEP_AT + 1
    assert reaper.statistics().watched == len(keep)
    assert "until" in repr(keep[0])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.booleans()), max_size=12))
def test_any_script_of_adds_and_cancels_is_exact(script):
    """Whenever checks are added and cancelled, each live one is called once, at max(asked, added), in order."""

    async def main() -> None:
        reaper, seen, expected = Reaper(), [], []
        async with trio.open_nursery() as nursery:
            await nursery.start(reaper.run)
            for added, at, cancelled in sorted(script):
                await trio.sleep_until(added)
                watch = reaper.add(once(seen), at)
                if cancelled:
                    watch.cancel()
                else:
                    expected.append(max(added, at))
            await trio.sleep_until(50)
            nursery.cancel_scope.cancel()
        assert sorted(seen) == seen == sorted(expected)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_many_deadlines_in_one_moment_are_late_by_seconds(nursery):
    """Each batch of those who are due waits for one pass of the scheduler, not for several: a flood is soon gone."""
    reaper, seen, passes = Reaper(), [], 0
    await nursery.start(reaper.run)
    for _ in range(20 * BATCH):
        reaper.add(once(seen), trio.current_time() - 5)
    with trio.fail_after(20):
        while len(seen) < 20 * BATCH:
            passes += 1
            await trio.lowlevel.checkpoint()
    assert passes <= 20 + CATCH_UP + 5
