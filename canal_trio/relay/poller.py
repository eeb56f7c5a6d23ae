"""The poller: one task per run that watches every socket through one persistent, edge-triggered epoll.

Trio re-arms its own epoll with a system call for each wait; here a socket is registered once, and a wake serves
whatever became ready since. For each ready stream the poller calls the sink armed on it (hand-over on the spot), or
wakes the task that waits for it. Who calls it is a task of its own (`_run`), or the run's own wait
(`wait_in_poller`, waiting.py).

A sink may answer with the rest of its step. Then a round first receives for all who are ready and sends for all of them
after that: a process at the other end is woken by the first of these sends and finds the others when it comes, where
it would have gone back to sleep between two sends with a receive in the middle. Measured with 250 streams: a fifth of
all CPU per event. It holds nothing back: both halves are one step of the poller, and `MAX_EVENTS` bounds it. So it is
with exchanges that run ahead (course.py), whose steps are longer: of them no more than `HELD` wait for one another.

What many exchanges leave to do that nobody waits for is done for all of them at the end of the round (`after_round`),
with no system call in between, so that its code and data stay in the processor's caches.

Invariants: a sink's exception is raised in the task that armed it, never here. While a task can run, one wake is
bounded in rounds (`ROUNDS`) and in time (`LONG`), and a sink's turn by what its flow takes, so that one busy stream
cannot starve the others; after that the scheduler gets its turn before the poller goes on.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import trio

from canal_trio.relay.course import Held, hold_back
from canal_trio.relay.handover import Armed

__all__ = ["HANGUP", "ROUNDS", "Pollable", "Poller", "after_round"]

ROUNDS = 8  # design, section 10: one round per wake cost 1.7 x nginx per event where eight cost 1.45
LONG = 0.005  # seconds: no further round after them, where steps are more than pieces (a whole exchange runs in one)
MAX_EVENTS = 32  # in one round: what is received first waits for so many others to be received before it is sent
HELD = 16  # courses that wait to send; per small exchange 4 cost 11 %, 8 cost 4 % more, and 32 as much
HANGUP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET  # HUP and ERR are always reported


class Pollable(Protocol):
    """What the poller serves."""

    def on_ready(self, mask: int) -> bool:
        """`mask` became true (0: nothing new). True asks for another turn in the next round."""

    def take_step(self, sink: Armed, step: Callable[[], bool]) -> bool:
        """Take the rest of the step that `sink` began in `on_ready`, if it is still armed. Answers as `on_ready`."""


class Poller:
    """The epoll of this run. Use `Poller.current()`; it is started by the first stream and ends with the run."""

    __slots__ = (
        "_after",
        "_again",
        "_epoll",
        "_held",
        "_led",
        "_newcomers",
        "_release",
        "_streams",
        "_under_way",
        "outside",
        "steps",
    )

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._streams: dict[int, Pollable] = {}
        self._again: dict[Pollable, None] = {}  # who wants another turn, in order
        self._held = Held()  # who is to send at the end of the round
        self._newcomers: set[int] = set()  # descriptors registered since the last look at the epoll
        self._led = False
        self._release = trio.Event()
        self._under_way = False  # a round is
        self._after: list[Callable[[], object]] = []  # to be done at its end
        self.outside = False  # the last round found something that is no stream's: `watch_outside`
        self.steps: list[tuple[Pollable, Armed, Callable[[], bool]]] = []  # begun in this round: `on_ready` adds to it

    @classmethod
    def current(cls) -> Poller:
        """The poller of the running `trio.run`, started if there is none yet. Not a checkpoint."""
        try:
            return _current.get()
        except LookupError:
            poller = cls()
            _current.set(poller)
            trio.lowlevel.spawn_system_task(poller._run, name="canal_trio poller")
            return poller

    def register(self, fd: int, stream: Pollable) -> None:
        """Watch `fd` until `unregister`; readiness that exists already is reported as a first edge."""
        self._streams[fd] = stream
        self._newcomers.add(fd)
        self._epoll.register(fd, _EVENTS)

    def rearm(self, fd: int) -> None:
        """Report the readiness of `fd` once more, if it is ready."""
        self._epoll.modify(fd, _EVENTS)

    def unregister(self, fd: int) -> None:
        """Stop watching. Must be called before the descriptor is closed, for its number will be used again."""
        if self._streams.pop(fd, None) is not None and not self.over:
            self._epoll.unregister(fd)

    # -- who waits -----------------------------------------------------------------------------------------------------

    def lead(self) -> bool:
        """From now on the caller calls `round`, and nobody else; until `unlead`. False: somebody does already."""
        if self._led:
            return False
        self._led = True
        self._release = trio.Event()
        # Trio goes on watching what it once was made to wait for, and two epolls that watch each other are an error.
        watched_by_trio, self._epoll = self._epoll, select.epoll()
        for fd, stream in self._streams.items():
            self.register(fd, stream)
        trio.lowlevel.notify_closing(watched_by_trio)
        watched_by_trio.close()
        return True

    def unlead(self) -> None:
        """The poller's own task waits again."""
        self._led = False
        self._release.set()

    def watch_outside(self, fd: int) -> None:
        """Notice in `outside` whenever `fd`, which is no stream's, is readable. Raises OSError."""
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch_outside(self, fd: int) -> None:
        """No longer; harmless once the run is over."""
        if not self.over:
            self._epoll.unregister(fd)

    def after_round(self, call: Callable[[], object]) -> bool:
        """Have `call` called at the end of the round that is under way. False: none is, and it is not called."""
        if self._under_way:
            self._after.append(call)
        return self._under_way

    @property
    def over(self) -> bool:
        """The run is ending: nothing is watched any more."""
        return self._epoll.closed

    @property
    def hungry(self) -> bool:
        """A stream waits for another turn: the next round must not wait."""
        return bool(self._again)

    async def _run(self) -> None:
        try:
            while True:
                if self._led:
                    await self._release.wait()
                elif self._again:
                    await trio.lowlevel.checkpoint()
                else:
                    with suppress(trio.ClosedResourceError):  # by `lead`
                        await trio.lowlevel.wait_readable(self._epoll)
                if not self._led:
                    self.serve()
        finally:
            self._epoll.close()

    def serve(self) -> None:
        """Rounds without waiting, until nothing is ready, there were `ROUNDS`, or it took `LONG`."""
        until = time.perf_counter() + LONG
        for _ in range(ROUNDS):
            if not self.round(0) or time.perf_counter() > until:
                return

    def round(self, timeout: float) -> bool:
        """One look at who is ready, after at most `timeout` seconds, and a turn for each. False: nobody was.

        Not a checkpoint: with a timeout it blocks the thread.
        """
        turn, self._again = self._again, {}
        self._newcomers.clear()
        self.outside = False
        events = self._epoll.poll(timeout, MAX_EVENTS)
        self._under_way = True
        try:
            self._receive(events, turn)
            self._send()
        finally:
            self._under_way = False
        if self._after:
            after, self._after = self._after, []
            for call in after:
                call()
        return len(events) > self.outside or bool(self._again)

    def _receive(self, events: list[tuple[int, int]], turn: dict[Pollable, None]) -> None:
        streams, newcomers, held = self._streams, self._newcomers, self._held
        if len(events) + len(turn) > 1:
            hold_back(held)
        try:
            for fd, mask in events:
                stream = streams.get(fd)
                # An earlier sink of this very round may have closed the stream, and another one may have been given
                # the number: what was reported is not about that one, whose own readiness the next look reports.
                if stream is None or fd in newcomers:
                    self.outside |= stream is None
                    continue
                if turn:
                    turn.pop(stream, None)
                if stream.on_ready(mask):
                    self._again[stream] = None
                if len(held.courses) >= HELD:
                    held.go_on()
            for stream in turn:
                if stream.on_ready(0):
                    self._again[stream] = None
        finally:
            hold_back(None)

    def _send(self) -> None:
        for stream, sink, step in self.steps:
            if stream.take_step(sink, step):
                self._again[stream] = None
        self.steps.clear()
        self._held.go_on()


def after_round(call: Callable[[], object]) -> bool:
    """`Poller.after_round` of the running `trio.run`; False if it has no poller."""
    try:
        return _current.get().after_round(call)
    except LookupError:
        return False


_current: trio.lowlevel.RunVar[Poller] = trio.lowlevel.RunVar("canal_trio.relay.poller")
