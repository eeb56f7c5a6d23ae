"""Course: before it sends, it waits for the end of the poller's round."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import outcome
import pytest
import trio
from course_kit import Begun, a_round
from relay_pairs import sim_pair, tcp_pair

from canal_trio.relay.course import before_sends, checkpoint_if_cancelled, current_course, later


@pytest.fixture(params=[tcp_pair, sim_pair], ids=["tcp", "sim"])
async def ends(request):
    """Two connected streams: what `far` sends, `near` receives."""
    near, far = await request.param()
    yield near, far
    near.close()
    far.close()


async def test_what_sends_waits_for_the_end_of_the_round(ends):
    """It stands still where it says that it sends, as often as it says so; each time the round's end runs it on."""
    near, far = ends
    way: list[str] = []

    async def work() -> bytes:
        await later()
        way.append("sent")
        await later()
        way.append("sent again")
        return bytes(await near.receive_some(100))

    with a_round() as held:
        begun = Begun(work)
        assert not begun.ended_at_once
        assert way == []
        for past in (["sent"], ["sent", "sent again"]):
            held.courses.pop().go_on()
            assert way == past
        assert held.courses == []
    assert begun.calls == 0
    await far.send_all(b"abc")
    with trio.fail_after(10):
        await begun.called.wait()
    assert await begun.course.finish() == b"abc"


async def test_at_the_end_of_the_round_it_may_be_over():
    """It calls then, as after any other wait."""

    async def work() -> int:
        await later()
        return 7

    with a_round() as held:
        begun = Begun(work)
        assert not begun.ended_at_once
    held.go_on()
    assert begun.calls == 1
    assert await begun.course.finish() == 7


async def test_outside_of_a_round_nobody_waits_for_its_end():
    """What begins in a task's step has nobody to wait for."""

    async def work() -> int:
        await later()
        return 7

    assert Begun(work).ended_at_once


@pytest.mark.parametrize("where", ["before", "while it waits"])
async def test_summoned_before_it_sends_it_sends_in_its_task_or_never(where):
    """Whoever wants it cancelled, in the very round, keeps it from sending; the round's end means nothing to it."""
    way: list[str] = []

    async def work() -> None:
        if where == "before":
            course = current_course()
            assert course is not None
            course.summon()
        await later()
        way.append("sent")
        await checkpoint_if_cancelled()
        way.append("too far")

    scopes = []
    for _ in range(2):
        with a_round() as held:
            begun = Begun(work)
            assert begun.ended_at_once == (where == "before")
            if where == "while it waits":
                begun.course.summon()
                assert begun.calls == 1
        held.go_on()
        assert way == []
        with trio.CancelScope() as scope:
            if not scopes:
                scope.cancel()
            await begun.course.finish()
        scopes.append(scope)
        assert way == ([] if len(scopes) == 1 else ["sent", "too far"])
    assert [scope.cancelled_caught for scope in scopes] == [True, False]


async def test_what_has_to_be_done_before_they_send_is_done_once_for_all():
    """Called before the first of them goes on; again for one that begins in the step of another."""
    way: list[str] = []

    def work(name: str, then: str | None = None) -> Callable[[], Awaitable[None]]:
        async def one() -> None:
            assert before_sends(lambda: way.append(f"call for {name}"))
            await later()
            way.append(name)
            if then is not None:
                Begun(work(then))

        return one

    with a_round() as held:
        for name in ("a", "b"):
            Begun(work(name, "c" if name == "a" else None))
        assert way == []
        held.go_on()
    assert way == ["call for a", "call for b", "a", "call for c", "b", "c"]
    assert (held.courses, held.calls) == ([], {})


async def test_who_does_not_wait_has_nothing_done_for_it():
    """Neither a course outside of a round nor a task: they do it themselves."""

    async def work() -> bool:
        return before_sends(lambda: None)

    assert Begun(work).course.result == outcome.Value(False)  # what it gives
    with a_round() as held:
        assert not before_sends(lambda: None)
    assert held.calls == {}
