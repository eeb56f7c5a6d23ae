"""Course: a coroutine that begins in others' steps, sleeps for streams there, and is finished in a task."""

from __future__ import annotations

import contextvars
import gc
import weakref
from contextlib import suppress

import pytest
import trio
from course_kit import Begun
from relay_pairs import sim_pair, tcp_pair
from tls_pairs import shaken
from trio.testing import assert_checkpoints, assert_no_checkpoints, wait_all_tasks_blocked

from canal_trio.errors import CanalError
from canal_trio.relay.course import (
    Course,
    checkpoint_if_cancelled,
    current_course,
    in_task,
    later,
    parks,
    shielded_checkpoint,
)

pytestmark = pytest.mark.usefixtures("waits")


async def tls_pair():
    """TLS over TCP, after the handshake."""
    return await shaken(await tcp_pair())


@pytest.fixture(params=[tcp_pair, sim_pair, tls_pair], ids=["tcp", "sim", "tls"])
async def ends(request):
    """Two connected streams: what `far` sends, `near` receives."""
    near, far = await request.param()
    yield near, far
    near.close()
    far.close()


async def test_what_never_waits_is_over_at_once():
    """It runs to its end in the step that begins it, is called nobody for, and no task has to look again."""

    async def work() -> int:
        await checkpoint_if_cancelled()
        await shielded_checkpoint()
        return 7

    with assert_no_checkpoints():
        begun = Begun(work)
        assert begun.ended_at_once
        assert await begun.course.finish() == 7
    assert begun.calls == 0
    assert "over" in repr(begun.course)


async def test_what_it_raises_is_raised_where_it_is_finished():
    """An exception ends nobody's step; it is the task's that finishes the course."""

    async def work() -> None:
        raise ZeroDivisionError

    begun = Begun(work)
    assert begun.ended_at_once
    with pytest.raises(ZeroDivisionError):
        await begun.course.finish()


async def test_it_sleeps_for_a_stream_without_a_task(ends):
    """Parked at a stream, it is run on by the step that finds it readable, as often as that takes."""
    near, far = ends
    seen: list[object] = []

    async def work() -> bytes:
        got = b""
        while len(got) < 6:
            got += await near.receive_some(100)
            seen.append(current_course())
        return got

    begun = Begun(work)
    assert not begun.ended_at_once
    await far.send_all(b"abc")
    while len(seen) < 1:
        await trio.lowlevel.checkpoint()
    await far.send_all(b"def")
    with trio.fail_after(10):
        await begun.called.wait()
    assert begun.calls == 1
    assert set(seen) == {begun.course}
    with assert_no_checkpoints():
        assert await begun.course.finish() == b"abcdef"


async def test_what_is_there_already_is_taken_without_sleeping(ends):
    """Bytes that wait are received in the step itself; in a task the same receive is a checkpoint, as ever."""
    near, far = ends
    await far.send_all(b"ab")

    async def work() -> bytes:
        return bytes(await near.receive_some(1))

    begun = Begun(work)
    if not begun.ended_at_once:  # on their way still
        with trio.fail_after(10):
            await begun.called.wait()
    assert await begun.course.finish() == b"a"
    with assert_checkpoints():
        assert await near.receive_some(1) == b"b"


async def test_from_in_task_on_there_is_a_task():
    """It stands still until a task finishes it; there it may sleep, open scopes, and be cancelled as anything."""
    way: list[str] = []

    async def work() -> str:
        way.append("ahead")
        await in_task()
        await in_task()
        way.append("home")
        with trio.move_on_after(0):
            await trio.sleep_forever()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            way.append("cancelled")
            raise
        return "never"

    begun = Begun(work)
    assert begun.ended_at_once
    assert begun.course.result is None
    assert way == ["ahead"]

    async def task() -> None:
        await begun.course.finish()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            await wait_all_tasks_blocked()
            assert way == ["ahead", "home"]
            scope.cancel()
    assert way == ["ahead", "home", "cancelled"]
    assert begun.calls == 0


async def test_summoned_while_it_sleeps_it_goes_on_sleeping_in_its_task(ends):
    """It calls at once; the task takes over the very sleep, and nothing that arrives is lost."""
    near, far = ends

    begun = Begun(lambda: near.receive_some(100))
    begun.course.summon()
    begun.course.summon()
    assert begun.calls == 1
    got: list[bytes] = []

    async def finish() -> None:
        got.append(await begun.course.finish())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        await wait_all_tasks_blocked()
        await far.send_all(b"abc")
    assert got == [b"abc"]


async def test_what_arrives_before_the_task_comes_is_not_lost(ends):
    """Between the call and the task the stream may have news: readiness is passed on."""
    near, far = ends

    begun = Begun(lambda: near.receive_some(100))
    begun.course.summon()
    await far.send_all(b"abc")
    await wait_all_tasks_blocked(0.01)
    assert await begun.course.finish() == b"abc"


async def test_cancelled_in_its_sleep(ends):
    """The cancellation is raised where it sleeps, and the stream is as if it had never been waited for."""
    near, far = ends
    cancelled = False

    async def work() -> None:
        nonlocal cancelled
        try:
            await near.receive_some(100)
        except trio.Cancelled:
            cancelled = True
            raise

    begun = Begun(work)
    begun.course.summon()
    with trio.CancelScope() as scope:
        scope.cancel()
        await begun.course.finish()
    assert cancelled
    await far.send_all(b"abc")
    assert await near.receive_some(100) == b"abc"


@pytest.mark.parametrize("summoned", [False, True])
async def test_a_stream_that_is_closed_under_it(ends, summoned):
    """Whoever closes the stream only has the task called: what follows from it happens there, not in that step."""
    near, _ = ends
    way: list[str] = []

    async def work() -> str:
        try:
            await near.receive_some(100)
        except trio.ClosedResourceError:
            way.append("closed")
        return "over"

    begun = Begun(work)
    if summoned:
        begun.course.summon()
    near.close()
    assert begun.calls == 1
    assert way == []
    assert await begun.course.finish() == "over"
    assert way == ["closed"]


@pytest.mark.parametrize("rest", [checkpoint_if_cancelled, "receive"])
async def test_summoned_in_its_own_step_it_goes_no_further(ends, rest):
    """What it calls itself may want it cancelled: from its next wait on it is in its task, and cancelled there."""
    near, _ = ends
    way: list[str] = []

    async def work() -> None:
        course = current_course()
        assert course is not None
        scope.cancel()
        course.summon()
        way.append("goes on for now")
        await (near.receive_some(100) if rest == "receive" else rest())
        way.append("too far")

    scope = trio.CancelScope()
    begun = Begun(work)
    assert begun.ended_at_once
    assert begun.course.result is None
    with scope:
        await begun.course.finish()
    assert scope.cancelled_caught
    assert way == ["goes on for now"]


async def test_a_task_that_is_dropped_ends_it_too():
    """A coroutine that is closed, not finished, closes what it was running."""
    way: list[str] = []

    async def work() -> None:
        await in_task()
        try:
            await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            way.append("closed")

    finishing = Begun(work).course.finish()
    finishing.send(None)
    assert way == []
    finishing.close()
    assert way == ["closed"]


@pytest.mark.parametrize("ends", [sim_pair], ids=["sim"], indirect=True)
@pytest.mark.parametrize("where", ["in its task", "asleep at a stream", "in a step"])
async def test_memory_grew_with_each_client_that_left_while_it_blocked(ends, where):
    """What ends with an error is freed when it has unwound, without the garbage collector, wherever it was.

    The error, its traceback, and a frame that had passed on what held it were a circle.
    """
    near, _ = ends

    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    async def work() -> None:
        thing = Held()
        held.append(weakref.ref(thing))
        if where == "in a step":
            raise ZeroDivisionError
        if where == "in its task":
            await in_task()
            await trio.sleep_forever()
        await near.receive_some(100)

    async def finish(course: Course[None]) -> None:
        with suppress(ZeroDivisionError):
            await course.finish()

    gc.disable()
    try:
        begun = Begun(work)
        begun.course.summon()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish, begun.course)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert [one() for one in held] == [None]
    finally:
        gc.enable()


async def test_to_be_summoned_when_it_is_over_means_nothing():
    """It calls nobody."""

    async def work() -> None:
        pass

    begun = Begun(work)
    begun.course.summon()
    assert begun.calls == 0
    assert await begun.course.finish() is None


async def test_a_wait_for_what_needs_a_task_is_a_bug_and_says_so():
    """Trio would wake a task that has nothing to do with it, so the course is ended with an error."""

    @trio.lowlevel.enable_ki_protection
    async def work() -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    begun = Begun(work)
    assert begun.ended_at_once
    with pytest.raises(CanalError, match="needs a task"):
        await begun.course.finish()


async def test_one_that_waits_again_while_it_is_ended_is_ended_all_the_same():
    """The bug may have a `finally` that waits, too: still nothing is raised in the step, which is another one's."""

    async def work() -> None:
        try:
            await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            await trio.lowlevel.cancel_shielded_checkpoint()

    begun = Begun(work)
    assert begun.ended_at_once
    with pytest.raises(CanalError, match="needs a task"):
        await begun.course.finish()


async def test_it_runs_in_the_context_that_it_was_given(ends):
    """What its task has set is seen in each step, whoever's step that is, and what it sets stays with it."""
    near, far = ends
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")
    name.set("its task")
    seen: list[str] = []

    async def work() -> None:
        seen.append(name.get())
        name.set("itself")
        await near.receive_some(100)
        seen.append(name.get())

    begun = Begun(work)
    await far.send_all(b"a")
    with trio.fail_after(10):
        await begun.called.wait()
    assert seen == ["its task", "itself"]
    assert name.get() == "its task"


async def test_in_a_task_the_questions_are_trios_own():
    """Outside of a course there is a task already, and the checkpoints are Trio's."""
    assert current_course() is None
    with assert_no_checkpoints():
        await in_task()
        await later()
    with assert_checkpoints():
        await checkpoint_if_cancelled()
        await shielded_checkpoint()
    with trio.CancelScope() as scope:
        scope.cancel()
        await checkpoint_if_cancelled()
    assert scope.cancelled_caught


async def test_which_streams_a_course_may_receive_from(ends):
    """Ours; another one, which knows nothing of courses, would wake a task that is not there."""
    near, _ = ends
    assert parks(near)
    ordinary, _ = trio.testing.memory_stream_pair()
    assert not parks(ordinary)
