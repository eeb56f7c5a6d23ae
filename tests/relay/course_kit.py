"""Courses for tests: one that has begun, and a round that holds them back."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from canal_trio.relay.course import Course, Held, hold_back


class Begun:
    """A course of `function()`, and how often it has called."""

    def __init__(self, function: Callable[[], Awaitable[Any]]) -> None:
        self.calls = 0
        self.called = trio.Event()
        self.course: Course[Any] = Course(function(), self._call, contextvars.copy_context())  # type: ignore[arg-type]
        self.ended_at_once = self.course.begin()

    def _call(self) -> None:
        self.calls += 1
        self.called.set()


@contextmanager
def a_round() -> Iterator[Held]:
    """As a round of the poller's: those whom it holds back."""
    held = Held()
    hold_back(held)
    try:
        yield held
    finally:
        hold_back(None)
