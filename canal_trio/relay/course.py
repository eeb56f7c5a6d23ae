"""A coroutine that begins without a task: in steps of others, until it needs a task of its own.

Waking a task for each of two short steps costs more than the steps: a pass of Trio's loop, a rescheduling, a cancel
scope entered and left (measured: a seventh of the CPU of a small exchange). A `Course` runs the coroutine in the step
that begins it. Where it sleeps for a stream it is parked there, and the step that finds the stream readable runs it on.
As soon as it has to do what only a task can, which it says with `in_task()`, it stands still until a task takes it over
with `finish()`; from then on it runs there as any coroutine, in the scopes and nurseries of that task.

Before it sends it waits with `later()` for the end of the poller's round, as the sinks do that answer with the rest of
their step (poller.py), and for the same reason: sends that follow one another wake the process at the other end once.
Measured with 64 small exchanges at a time: a fifth of all CPU. What many have to have done before they send may then be
done for all of them together: `before_sends()`.

Invariants: until then it has entered no cancel scope and no nursery, and has asked for no task. It cannot be cancelled
without a task: whoever wants that cancels the scope in which it is to be finished, and calls `summon()`. News that is
no readiness (the stream was closed) is never dealt with in the step that brings it, which may be in the midst of
something: a task gets it. `call` is called once at most, and only if it did not end in `begin()`.
"""

from __future__ import annotations

import enum
import threading
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context
from typing import Any, Generic, TypeAlias, TypeVar, final

import outcome
import trio

from canal_trio.errors import CanalError

__all__ = [
    "Course",
    "Held",
    "Sleeper",
    "before_sends",
    "checkpoint_if_cancelled",
    "current_course",
    "hold_back",
    "in_task",
    "later",
    "parks",
    "shielded_checkpoint",
    "sleep",
    "sleeper",
    "wake",
]

T = TypeVar("T")


class _State(enum.Enum):
    STEPS = enum.auto()  # runs, in somebody's step
    PARKED = enum.auto()  # sleeps, without a task
    LATER = enum.auto()  # waits for the end of the round
    CALLING = enum.auto()  # waits for a task
    TASK = enum.auto()  # has one
    OVER = enum.auto()


_WAITS = (_State.PARKED, _State.LATER)


class _Here(threading.local):
    """What runs in this thread's present step."""

    course: Course[Any] | None = None
    held: Held | None = None  # who waits for the end of the round; None: nobody has to


_here = _Here()
_PARKS = object()
_LATER = object()
_NEEDS_TASK = object()


def current_course() -> Course[Any] | None:
    """The course whose step this is; None in a task. Not a checkpoint."""
    return _here.course


async def in_task() -> None:
    """From here on there is a task. A checkpoint only if there was none."""
    if _here.course is not None:
        await _give(_NEEDS_TASK)


async def later() -> None:
    """What follows sends: a course waits until all was received that is there in this round. In a task: nothing."""
    course, held = _here.course, _here.held
    if course is not None and held is not None:
        held.courses.append(course)
        await _give(_LATER)


def before_sends(call: Callable[[], None]) -> bool:
    """Have `call` called, once for all who ask for it, before anything is sent by this step, which waits with that for
    the end of the round. It must not raise. False: this step does not wait, and it is not called. Not a checkpoint."""
    held = _here.held
    if held is None or _here.course is None:
        return False
    held.calls[call] = None
    return True


@final
class Held:
    """Those whom a round holds back, and what is to be done before they go on."""

    __slots__ = ("calls", "courses")

    def __init__(self) -> None:
        self.courses: list[Course[Any]] = []
        self.calls: dict[Callable[[], None], None] = {}  # in order

    def call(self) -> None:
        """What has to be done before any of them goes on. Not a checkpoint."""
        calls, self.calls = self.calls, {}
        for call in calls:
            call()

    def go_on(self) -> None:
        """All of them go on, and who comes to `later` once more meanwhile. Not a checkpoint."""
        self.call()
        for course in self.courses:
            if self.calls:  # of one that begins in the step of another
                self.call()
            course.go_on()
        self.courses.clear()


def hold_back(held: Held | None) -> None:
    """A round begins: who comes to `later` is added to `held`, and waits for its end. None: it is over."""
    _here.held = held


async def checkpoint_if_cancelled() -> None:
    """As `trio.lowlevel.checkpoint_if_cancelled`; a course that is wanted in its task goes there."""
    course = _here.course
    if course is None:
        await trio.lowlevel.checkpoint_if_cancelled()
    elif course.summoned:
        await _give(_NEEDS_TASK)


async def shielded_checkpoint() -> None:
    """As `trio.lowlevel.cancel_shielded_checkpoint`; nothing where the step of another is under way, which is short."""
    if _here.course is None:
        await trio.lowlevel.cancel_shielded_checkpoint()


def sleeper() -> Sleeper:
    """Who is about to `sleep` here: the course whose step this is, or the task. Not a checkpoint."""
    return _here.course or trio.lowlevel.current_task()


def sleep(abort: Callable[[Any], trio.lowlevel.Abort]) -> Awaitable[None]:
    """To be awaited at once: until `wake` is called with the `sleeper()`. `abort` as in
    `trio.lowlevel.wait_task_rescheduled`. Two sleep for each stream, so there is no coroutine of its own for that."""
    course = _here.course
    if course is None:
        return trio.lowlevel.wait_task_rescheduled(abort)  # noqa: ASYNC105  # whoever sleeps awaits it
    course._abort = abort
    return _give(_PARKS)


def wake(one: Sleeper | None, news: outcome.Outcome[None]) -> None:
    """`one`, if there is one, sleeps no longer. Not a checkpoint, raises nothing."""
    if isinstance(one, Course):
        one._resume(news)
    elif one is not None:
        trio.lowlevel.reschedule(one, news)


def parks(stream: object) -> bool:
    """May a course receive from `stream`: does that sleep by `sleep`? Ours do; for any other there must be a task."""
    return bool(getattr(stream, "parks", False))


@types.coroutine
def _give(message: object) -> Generator[object, Any, Any]:
    return (yield message)


@final
class Course(Generic[T]):
    """Runs `coroutine`, in steps within `context`, which nobody else may be using then: a copy of that of its task.

    `call` is told, in a step, when it is over or needs a task; it must not raise.
    """

    __slots__ = ("_abort", "_call", "_context", "_coroutine", "_error", "_state", "_task", "result", "summoned")

    def __init__(self, coroutine: Coroutine[Any, Any, T], call: Callable[[], None], context: Context) -> None:
        self._coroutine = coroutine
        self._context = context
        self._call: Callable[[], None] | None = call
        self._state = _State.STEPS
        self._abort: Callable[[Any], trio.lowlevel.Abort] | None = None  # of its sleep; None: it does not sleep
        self._error: BaseException | None = None  # what ended its sleep, for the task to deal with
        self._task: trio.lowlevel.Task | None = None  # sleeps in its place
        self.summoned = False  # it is wanted in its task
        self.result: outcome.Outcome[T] | None = None  # how it ended, if that was without a task

    def __repr__(self) -> str:
        name = getattr(self._coroutine, "__qualname__", "of something")
        return f"<Course {name}, {self._state.name.lower()}>"

    # -- without a task ------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Run it as far as it goes. False: it waits, and `call` follows. Call it once. Not a checkpoint."""
        self._step()
        if self._state in _WAITS:
            return False
        self._call = None
        return True

    def summon(self) -> None:
        """It is wanted in its task. Not a checkpoint; idempotent, of no effect once it is there or over."""
        self.summoned = True
        if self._state in _WAITS:
            self._needs_task()

    def go_on(self) -> None:
        """What it waited for in `later` has come. Of no effect if it was summoned meanwhile. Not a checkpoint."""
        if self._state is _State.LATER:
            self._run_on()

    def _resume(self, news: outcome.Outcome[None]) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task, news)
        elif self._state is _State.PARKED and isinstance(news, outcome.Value):
            self._abort = None
            self._run_on()
        else:
            self._abort = None
            if isinstance(news, outcome.Error):
                self._error = news.error
            if self._state is _State.PARKED:
                self._needs_task()

    def _run_on(self) -> None:
        self._state = _State.STEPS
        self._step()
        if self._state not in _WAITS:
            self._tell()

    def _needs_task(self) -> None:
        self._state = _State.CALLING
        self._tell()

    def _tell(self) -> None:
        call, self._call = self._call, None  # it may know us: a circle would wait for the garbage collector
        assert call is not None  # it calls once: then it waits no longer, and never again
        call()

    def _step(self) -> None:
        before, _here.course = _here.course, self
        try:
            message = self._context.run(self._coroutine.send, None)
        except StopIteration as stop:
            self._over(outcome.Value(stop.value))
        except BaseException as exc:
            self._over(outcome.Error(exc))
        else:
            if message is _NEEDS_TASK or (self.summoned and (message is _PARKS or message is _LATER)):
                self._state = _State.CALLING
            elif message is _PARKS:
                self._state = _State.PARKED
            elif message is _LATER:
                self._state = _State.LATER
            else:  # what it waits for knows whom to wake, and that is not us
                with suppress(RuntimeError):  # it waits again, in a `finally`
                    self._coroutine.close()
                self._over(outcome.Error(CanalError("a course waited for something that needs a task")))
        finally:
            _here.course = before

    def _over(self, result: outcome.Outcome[T]) -> None:
        self._state = _State.OVER
        self.result = result

    # -- in a task -----------------------------------------------------------------------------------------------------

    @types.coroutine
    def finish(self) -> Generator[Any, Any, T]:
        """To be awaited: run the rest of it in this task. What it returns or raises. A checkpoint, unless it is over.

        From where it stands on, which is what `await` cannot do: that begins one. What is passed on is kept in no
        frame: Trio's value may hold an error, which with its traceback and such a frame would be a circle, and wait
        for the garbage collector, which seldom looks.
        """
        if self.result is not None:
            ended, self.result = self.result, None
            try:
                return ended.unwrap()
            finally:
                del ended  # as what is passed on
        self._state = _State.TASK
        try:
            if self._abort is not None:
                abort, self._abort = self._abort, None
                self._task = trio.lowlevel.current_task()
                yield from trio.lowlevel.wait_task_rescheduled(abort)  # noqa: ASYNC105  # `yield from` awaits
                del abort  # a stream goes on for long
            else:
                yield from trio.lowlevel.checkpoint_if_cancelled()  # noqa: ASYNC105  # the same
        except BaseException as exc:
            self._error = exc
        self._task = None
        coroutine = self._coroutine
        value: Any = None
        error, self._error = self._error, None
        while True:
            try:
                message = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                value = error = None
            try:
                value = yield message
            except BaseException as exc:
                error = exc


Sleeper: TypeAlias = trio.lowlevel.Task | Course[Any]
"""Who sleeps for a stream."""
