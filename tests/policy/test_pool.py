"""The pool's book: its invariants under any sequence of calls, against a plain model, and each rule by itself."""

from __future__ import annotations

import itertools
import math
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from canal_trio.policy.pool import Dial, Full, Grant, PoolCore, Reuse, Wait

IDLE_SECONDS = 10.0


def core(*, limit: float = math.inf, waiters: int = 100) -> PoolCore[str, str]:
    """A book of strings."""
    return PoolCore(limit=limit, waiters=waiters, idle_seconds=IDLE_SECONDS)


def dialled(book: PoolCore[str, str], *tickets: str) -> None:
    """As many dials as tickets."""
    for ticket in tickets:
        assert book.acquire(ticket, 0.0) == (Dial(), [])


def test_crowded_is_where_a_request_would_be_refused() -> None:
    """Not while a connection can be had, idle or new, and not while there is room in the queue."""
    book = core(limit=2, waiters=1)
    for number, crowded in enumerate((False, False, False, True)):
        assert book.crowded is crowded
        book.acquire(f"t{number}", 0.0)
    assert book.acquire("one too many", 0.0) == (Full(), [])
    book.abandon("t2")
    assert not book.crowded
    assert not core().crowded


class Book(RuleBasedStateMachine):
    """A pool's life: exchanges come, wait, give up, end well or badly; time passes; peers hang up on idle connections.

    The model keeps what a person would: lists, searched from end to end.
    """

    @initialize(limit=st.one_of(st.integers(1, 4), st.just(math.inf)), waiters=st.integers(0, 4))
    def begin(self, limit: float, waiters: int) -> None:
        """A pool of this size."""
        self.limit, self.most = limit, waiters
        self.book: PoolCore[int, str] = PoolCore(limit=limit, waiters=waiters, idle_seconds=IDLE_SECONDS)
        self.now = 0.0
        self.connections = itertools.count()
        self.names = itertools.count()
        self.used: list[int] = []  # connections in use
        self.dialling = 0
        self.idle: list[tuple[int, float]] = []  # oldest first
        self.queue: deque[tuple[str, bool]] = deque()

    def expected_expired(self) -> list[int]:
        """What the model closes now."""
        expired = [c for c, since in self.idle if self.now - since >= IDLE_SECONDS]
        self.idle = [(c, since) for c, since in self.idle if self.now - since < IDLE_SECONDS]
        return expired

    @rule(fresh=st.booleans())
    def acquire(self, fresh: bool) -> None:
        """An exchange wants a connection."""
        ticket = f"t{next(self.names)}"
        verdict, closing = self.book.acquire(ticket, self.now, fresh=fresh)
        expected = self.expected_expired()
        if self.idle and not fresh:
            newest, _ = self.idle.pop()
            self.used.append(newest)
            assert verdict == Reuse(newest)
        elif len(self.used) + self.dialling + len(self.idle) < self.limit or self.idle:
            if len(self.used) + self.dialling + len(self.idle) >= self.limit:
                expected.append(self.idle.pop(0)[0])
            self.dialling += 1
            assert verdict == Dial()
        elif len(self.queue) < self.most:
            self.queue.append((ticket, fresh))
            assert verdict == Wait()
        else:
            assert verdict == Full()
        assert closing == expected

    @precondition(lambda self: self.dialling)
    @rule(works=st.booleans())
    def dial(self, works: bool) -> None:
        """A dial comes to its end."""
        self.dialling -= 1
        if works:
            self.used.append(next(self.connections))
        else:
            self.slot_came_free(self.book.lost())

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """An exchange ended well."""
        connection = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        grant, closing = self.book.release(connection, self.now)
        if not self.queue:
            assert (grant, closing) == (None, [])
            self.idle.append((connection, self.now))
            return
        ticket, fresh = self.queue.popleft()
        if fresh:
            assert (grant, closing) == (Grant(ticket, None), [connection])
            self.dialling += 1
        else:
            assert (grant, closing) == (Grant(ticket, connection), [])
            self.used.append(connection)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """An exchange broke its connection."""
        self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        self.slot_came_free(self.book.lost())

    def slot_came_free(self, grant: Grant[int, str] | None) -> None:
        """Who gets it."""
        if self.queue:
            assert grant == Grant(self.queue.popleft()[0], None)
            self.dialling += 1
        else:
            assert grant is None

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        """A waiter gives up."""
        index = data.draw(st.integers(0, len(self.queue) - 1))
        ticket = self.queue[index][0]
        del self.queue[index]
        self.book.abandon(ticket)

    @rule()
    def abandon_a_stranger(self) -> None:
        """Of no effect."""
        self.book.abandon("nobody")

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        """A peer closes an idle connection."""
        connection, _ = self.idle.pop(data.draw(st.integers(0, len(self.idle) - 1)))
        assert self.book.forget(connection)
        assert not self.book.forget(connection)

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        """The reaper looks."""
        expected = self.expected_expired()
        assert self.book.expire(self.now) == expected

    @rule()
    def clear(self) -> None:
        """The pool is closed."""
        assert self.book.clear() == [connection for connection, _ in self.idle]
        self.idle = []

    @invariant()
    def the_book_is_right(self) -> None:
        """The invariants, and the counts of the model."""
        assert self.book.used == len(self.used) + self.dialling
        assert self.book.idle == len(self.idle)
        assert self.book.waiting == len(self.queue)
        assert self.book.used + self.book.idle <= self.limit
        assert self.book.waiting <= self.most
        if self.book.waiting:
            assert not self.book.idle, "somebody waits beside an idle connection"
            assert self.book.used == self.limit, "somebody waits although there is room"


Book.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestBook = Book.TestCase


def test_the_newest_idle_connection_is_taken_first() -> None:
    """LIFO: the rest goes cold."""
    book = core()
    dialled(book, "a", "b")
    book.release("old", 1.0)
    book.release("new", 2.0)
    assert book.acquire("t", 3.0) == (Reuse("new"), [])
    assert book.acquire("u", 3.0) == (Reuse("old"), [])


def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    """FIFO, and the slot never leaves the book in between."""
    book = core(limit=1)
    dialled(book, "a")
    for ticket in ("first", "second", "third"):
        assert book.acquire(ticket, 0.0)[0] == Wait()
    book.abandon("second")
    assert book.release("x", 0.0) == (Grant("first", "x"), [])
    assert book.lost() == Grant("third", None)
    assert book.used == 1
    assert book.lost() is None
    assert book.used == 0


@pytest.mark.parametrize("waiters", [0, 2])
def test_the_queue_has_a_bound(waiters: int) -> None:
    """The one beyond is told at once, and nothing of it is kept."""
    book = core(limit=1, waiters=waiters)
    dialled(book, "a")
    for number in range(waiters):
        assert book.acquire(f"w{number}", 0.0)[0] == Wait()
    assert book.acquire("beyond", 0.0)[0] == Full()
    assert book.waiting == waiters


def test_a_fresh_one_takes_the_slot_of_the_coldest_idle_connection() -> None:
    """A retry on a fresh connection must not be given another old one, nor wait beside idle ones."""
    book = core(limit=2)
    dialled(book, "a", "b")
    book.release("cold", 0.0)
    book.release("warm", 1.0)
    assert book.acquire("t", 2.0, fresh=True) == (Dial(), ["cold"])
    assert (book.used, book.idle) == (1, 1)


def test_a_waiter_that_needs_a_fresh_one_is_given_the_slot_and_not_the_connection() -> None:
    """The connection that came back is closed for it."""
    book = core(limit=1)
    dialled(book, "a")
    assert book.acquire("t", 0.0, fresh=True)[0] == Wait()
    assert book.release("used", 0.0) == (Grant("t", None), ["used"])
    assert (book.used, book.idle) == (1, 0)


def test_what_was_idle_for_too_long_is_closed_before_anything_else() -> None:
    """At exactly the limit it is too old."""
    book = core()
    dialled(book, "a", "b")
    book.release("old", 0.0)
    book.release("new", 5.0)
    assert book.acquire("t", IDLE_SECONDS) == (Reuse("new"), ["old"])
    book.release("new", IDLE_SECONDS)
    assert book.expire(2 * IDLE_SECONDS - 0.1) == []
    assert book.expire(2 * IDLE_SECONDS) == ["new"]
