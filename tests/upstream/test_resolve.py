"""The resolver: cache, single flight, old answers, its own few threads, and nothing lost by a cancelled asker."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing
from kit import eventually

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.upstream.resolve import PATIENCE, RECHECK, Address, Resolver, system_lookup

ONE: list[Address] = [(socket.AF_INET, ("192.0.2.1", 80))]
TWO: list[Address] = [(socket.AF_INET, ("192.0.2.2", 80))]


class Lookup:
    """A resolver of the system's that a test holds in its hands. `gate` lets a lookup go on."""

    def __init__(self, answer: Callable[[str], list[Address]] = lambda _: ONE) -> None:
        self.answer = answer
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self, host: str, port: int) -> list[Address]:
        """As `system_lookup`, in its thread."""
        with self._lock:
            self.asked.append(host)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            assert self.gate.wait(20), "nobody opened the gate"
            return self.answer(host)
        finally:
            with self._lock:
                self.running -= 1

    @contextmanager
    def closed(self) -> Iterator[None]:
        """The resolver hangs for the block."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()


def failing(exc: Exception) -> Callable[[str], list[Address]]:
    """An answer that is an exception."""

    def answer(_: str) -> list[Address]:
        raise exc

    return answer


async def test_an_answer_is_kept_for_its_time(mock_clock: trio.testing.MockClock) -> None:
    """One lookup for as long as it is good, the next one after that."""
    lookup = Lookup()
    resolver = Resolver(ttl=30, lookup=lookup)
    for _ in range(3):
        assert await resolver.resolve("a.test", 80) == ONE
    mock_clock.jump(29.9)
    assert await resolver.resolve("a.test", 80) == ONE
    assert lookup.asked == ["a.test"]
    lookup.answer = lambda _: TWO
    mock_clock.jump(0.2)
    assert await resolver.resolve("a.test", 80) == TWO
    assert "1 names, 0 lookups" in repr(resolver)


async def test_a_port_is_part_of_the_question(mock_clock: trio.testing.MockClock) -> None:
    """The addresses hold the port, so another port is another answer."""
    resolver = Resolver(lookup=lambda host, port: [(socket.AF_INET, ("192.0.2.1", port))])
    assert await resolver.resolve("a.test", 80) == [(socket.AF_INET, ("192.0.2.1", 80))]
    assert await resolver.resolve("a.test", 81) == [(socket.AF_INET, ("192.0.2.1", 81))]


async def test_askers_of_one_name_share_one_lookup() -> None:
    """Single flight, and all get its answer."""
    lookup = Lookup()
    resolver = Resolver(lookup=lookup)
    answers: list[list[Address] | Failure] = []

    async def ask() -> None:
        answers.append(await resolver.resolve("a.test", 80))

    async with trio.open_nursery() as nursery:
        with lookup.closed():
            for _ in range(20):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
    assert answers == [ONE] * 20
    assert lookup.asked == ["a.test"]


async def test_a_failed_lookup_fails_for_all_who_waited_for_it() -> None:
    """Not one lookup after the other: a dead resolver would make the last one wait for all of them."""
    lookup = Lookup(failing(socket.gaierror(socket.EAI_NONAME, "Name or service not known")))
    resolver = Resolver(lookup=lookup)
    answers: list[list[Address] | Failure] = []

    async def ask() -> None:
        answers.append(await resolver.resolve("a.test", 80))

    async with trio.open_nursery() as nursery:
        with lookup.closed():
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
    expected = Failure(Side.UPSTREAM, Phase.DIAL, Kind.DNS, "a.test: Name or service not known.", Retry.UNSENT)
    assert answers == [expected] * 5
    assert lookup.asked == ["a.test"]
    assert await resolver.resolve("a.test", 80) == expected, "a failure is not kept"
    assert len(lookup.asked) == 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda _: [], "a.test: it has no address."),
        (failing(UnicodeError("label too long")), "a.test: this is not a host name."),
        (failing(OSError("odd")), "a.test: odd."),
    ],
)
async def test_whatever_is_wrong_with_a_name_is_a_failure(answer: Callable[[str], list[Address]], says: str) -> None:
    """Kind.DNS with a sentence."""
    failure = await Resolver(lookup=Lookup(answer)).resolve("a.test", 80)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.detail) == (Kind.DNS, says)


async def test_a_bug_in_the_lookup_is_raised_where_it_was_asked() -> None:
    """Not in Trio's own loop, where it would end everything."""
    with pytest.raises(ZeroDivisionError):
        await Resolver(lookup=Lookup(failing(ZeroDivisionError()))).resolve("a.test", 80)


async def test_a_cancelled_asker_hands_the_flight_over() -> None:
    """The lookup it began still answers those who came after it, and the cache."""
    lookup = Lookup()
    resolver = Resolver(lookup=lookup)
    answers: list[list[Address] | Failure] = []
    first = trio.CancelScope()

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            answers.append(await resolver.resolve("a.test", 80))

    async with trio.open_nursery() as nursery:
        with lookup.closed():
            nursery.start_soon(ask, first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert answers == []
    assert answers == [ONE]
    assert await resolver.resolve("a.test", 80) == ONE
    assert lookup.asked == ["a.test"]


async def test_a_lookup_nobody_waits_for_any_more_still_lands_in_the_cache() -> None:
    """The next one to ask gets it without a lookup."""
    lookup = Lookup()
    resolver = Resolver(lookup=lookup)
    with lookup.closed(), trio.move_on_after(0):
        await resolver.resolve("a.test", 80)
    assert lookup.asked == [], "cancelled before it began"
    async with trio.open_nursery() as nursery:
        with lookup.closed():
            nursery.start_soon(resolver.resolve, "a.test", 80)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    await eventually(lambda: resolver._entries)
    assert await resolver.resolve("a.test", 80) == ONE
    assert lookup.asked == ["a.test"]


async def test_an_old_answer_serves_while_there_is_no_new_one(mock_clock: trio.testing.MockClock) -> None:
    """The resolver fails: the old addresses are used, and it is asked again some seconds later."""
    lookup = Lookup()
    resolver = Resolver(ttl=30, stale=600, lookup=lookup)
    await resolver.resolve("a.test", 80)
    lookup.answer = failing(socket.gaierror(socket.EAI_AGAIN, "try again"))
    mock_clock.jump(31)
    assert await resolver.resolve("a.test", 80) == ONE
    assert await resolver.resolve("a.test", 80) == ONE
    assert len(lookup.asked) == 2, "asked again at once"
    mock_clock.jump(RECHECK + 0.1)
    lookup.answer = lambda _: TWO
    assert await resolver.resolve("a.test", 80) == TWO


async def test_an_answer_older_than_that_is_no_answer(mock_clock: trio.testing.MockClock) -> None:
    """Beyond `stale` a failure is a failure."""
    lookup = Lookup()
    resolver = Resolver(ttl=30, stale=600, lookup=lookup)
    await resolver.resolve("a.test", 80)
    lookup.answer = failing(OSError("down"))
    mock_clock.jump(631)
    failure = await resolver.resolve("a.test", 80)
    assert isinstance(failure, Failure)
    assert failure.kind is Kind.DNS


async def test_a_hanging_resolver_costs_little_patience_when_there_is_an_old_answer(
    mock_clock: trio.testing.MockClock,
) -> None:
    """RFC 8767: the old answer after 1.8 seconds; the new one lands when it comes."""
    lookup = Lookup()
    resolver = Resolver(ttl=30, lookup=lookup)
    await resolver.resolve("a.test", 80)
    lookup.answer = lambda _: TWO
    mock_clock.jump(31)
    answers: list[list[Address] | Failure] = []

    async def ask() -> None:
        answers.append(await resolver.resolve("a.test", 80))

    async with trio.open_nursery() as nursery:
        with lookup.closed():
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(PATIENCE + 0.01)
            await trio.testing.wait_all_tasks_blocked()
            assert answers == [ONE]
            assert await resolver.resolve("a.test", 80) == ONE, "asked for without waiting again"
            (flight,) = resolver._flights.values()
    await flight.landed.wait()
    assert await resolver.resolve("a.test", 80) == TWO


async def test_lookups_have_a_limiter_of_their_own() -> None:
    """Two threads: the third name waits, and threads for anything else are not touched."""
    lookup = Lookup()
    resolver = Resolver(threads=2, lookup=lookup)
    async with trio.open_nursery() as nursery:
        with lookup.closed():
            for number in range(6):
                nursery.start_soon(resolver.resolve, f"{number}.test", 80)
            nursery.start_soon(resolver.resolve, "5.test", 80)
            await eventually(lambda: len(lookup.asked) == 2)
            await trio.testing.wait_all_tasks_blocked()
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            await trio.to_thread.run_sync(lambda: None)
    assert sorted(lookup.asked) == [f"{number}.test" for number in range(6)], "one lookup each, for the shared one too"
    assert lookup.most == 2


async def test_who_waited_for_a_thread_takes_the_answer_that_came_meanwhile() -> None:
    """The one thread is taken, two wait with the same question: the second of them finds the first one's answer."""
    lookup = Lookup()
    resolver = Resolver(threads=1, lookup=lookup)
    answers: list[list[Address] | Failure] = []

    async def ask() -> None:
        answers.append(await resolver.resolve("b.test", 80))

    async with trio.open_nursery() as nursery:
        with lookup.closed():
            nursery.start_soon(resolver.resolve, "a.test", 80)
            await eventually(lambda: lookup.asked == ["a.test"])
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
    assert answers == [ONE, ONE]
    assert lookup.asked == ["a.test", "b.test"]


async def test_cancelled_while_waiting_for_a_thread_it_leaves_nothing() -> None:
    """No flight, no token."""
    lookup = Lookup()
    resolver = Resolver(threads=1, lookup=lookup)
    async with trio.open_nursery() as nursery:
        with lookup.closed():
            nursery.start_soon(resolver.resolve, "a.test", 80)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.01):
                await resolver.resolve("b.test", 80)
    assert await resolver.resolve("b.test", 80) == ONE
    assert lookup.asked == ["a.test", "b.test"]


async def test_the_memory_is_bounded(mock_clock: trio.testing.MockClock) -> None:
    """The oldest answer goes first."""
    lookup = Lookup()
    resolver = Resolver(names=2, lookup=lookup)
    for host in ("a.test", "b.test", "c.test", "b.test", "c.test", "a.test"):
        await resolver.resolve(host, 80)
    assert lookup.asked == ["a.test", "b.test", "c.test", "a.test"]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", (socket.AF_INET, ("127.0.0.1", 80))),
        ("::1", (socket.AF_INET6, ("::1", 80, 0, 0))),
    ],
)
async def test_a_number_is_not_looked_up(host: str, address: Address) -> None:
    """No thread for what needs none."""
    lookup = Lookup()
    assert await Resolver(lookup=lookup).resolve(host, 80) == [address]
    assert lookup.asked == []


async def test_an_address_with_a_zone_is_the_systems_to_understand() -> None:
    """`fe80::1%eth0`: the number of the interface is not ours to know."""
    lookup = Lookup()
    await Resolver(lookup=lookup).resolve("fe80::1%lo", 80)
    assert lookup.asked == ["fe80::1%lo"]


def test_the_systems_answer_has_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """getaddrinfo may repeat itself; the order stays."""
    rows = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 80, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 80, 0, 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_more: rows)
    assert system_lookup("localhost", 80) == [
        (socket.AF_INET6, ("::1", 80, 0, 0)),
        (socket.AF_INET, ("127.0.0.1", 80)),
    ]


def test_a_lookup_that_ends_after_the_run_disturbs_nobody() -> None:
    """The gateway is gone when the thread answers."""
    lookup = Lookup()
    ended = threading.Event()
    inner = lookup.answer

    def answer(host: str) -> list[Address]:
        try:
            return inner(host)
        finally:
            ended.set()

    lookup.answer = answer

    async def main() -> None:
        with trio.move_on_after(0.05):
            await Resolver(lookup=lookup).resolve("a.test", 80)

    with lookup.closed():
        trio.run(main)
    assert ended.wait(5)
