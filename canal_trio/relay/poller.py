"""The poller: one task per run that watches every socket through one persistent, edge-triggered epoll.

Trio re-arms its own epoll with a system call for each wait; here a socket is registered once, and a wake serves
whatever became ready since. For each ready stream the poller calls the sink armed on it (hand-over on the spot), or
wakes the task that waits for it.

A sink may answer with the rest of its step. Then a round first receives for all who are ready and sends for all of them
after that: a process at the other end is woken by the first of these sends and finds the others when it comes, where
it would have gone back to sleep between two sends with a receive in the middle. Measured with 250 streams: a fifth of
all CPU per event. It holds nothing back: both halves are one step of the poller, and `MAX_EVENTS` bounds it.

Invariants: a sink's exception is raised in the task that armed it, never here. One wake is bounded in rounds
(`ROUNDS`), and a sink's turn by what its flow takes, so that one busy stream cannot starve the others; after that the
scheduler gets its turn before the poller goes on.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Protocol

import trio

from canal_trio.relay.handover import Armed

__all__ = ["HANGUP", "Pollable", "Poller"]

ROUNDS = 8  # design, section 10: one round per wake cost 1.7 x nginx per event where eight cost 1.45
MAX_EVENTS = 32  # in one round: what is received first waits for so many others to be received before it is sent
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

    __slots__ = ("_again", "_epoll", "_newcomers", "_streams", "steps")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._streams: dict[int, Pollable] = {}
        self._again: dict[Pollable, None] = {}  # who wants another turn, in order
        self._newcomers: set[int] = set()  # descriptors registered since the last look at the epoll
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
        if self._streams.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    async def _run(self) -> None:
        fileno = self._epoll.fileno()
        try:
            while True:
                if self._again:
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.lowlevel.wait_readable(fileno)
                self._serve()
        finally:
            self._epoll.close()

    def _serve(self) -> None:
        poll, streams, newcomers, steps = self._epoll.poll, self._streams, self._newcomers, self.steps
        for _ in range(ROUNDS):
            turn, self._again = self._again, {}
            newcomers.clear()
            events = poll(0, MAX_EVENTS)
            for fd, mask in events:
                stream = streams.get(fd)
                # An earlier sink of this very round may have closed the stream, and another one may have been given
                # the number: what was reported is not about that one, whose own readiness the next look reports.
                if stream is None or fd in newcomers:
                    continue
                if turn:
                    turn.pop(stream, None)
                if stream.on_ready(mask):
                    self._again[stream] = None
            for stream in turn:
                if stream.on_ready(0):
                    self._again[stream] = None
            for stream, sink, step in steps:
                if stream.take_step(sink, step):
                    self._again[stream] = None
            steps.clear()
            if not events and not self._again:
                return


_current: trio.lowlevel.RunVar[Poller] = trio.lowlevel.RunVar("canal_trio.relay.poller")
