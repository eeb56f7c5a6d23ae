"""One direction of a simulated connection: how much it holds, how long it takes, what goes wrong. See `simstream`.

Time is Trio's, so virtual under a `MockClock`. Arrivals are announced by one task per run, the wheel.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import trio

from canal_trio.relay.course import Course, Held, hold_back
from canal_trio.relay.handover import Buffer
from canal_trio.relay.idle import Reaper

__all__ = ["End", "Fault", "FaultKind", "Pipe", "SimLink", "current_wheel"]


class FaultKind(enum.Enum):
    """What goes wrong. The bytes before it still arrive."""

    RESET = "reset"  # the connection breaks, both ways, for both ends
    STALL = "stall"  # nothing arrives any more in this direction, not even an end; the sender's buffer fills up
    HALF_CLOSE = "half_close"  # this direction ends; the sender finds it broken
    TRUNCATE = "truncate"  # both directions end, as when the sender's process is gone
    DELAY = "delay"  # what follows arrives `seconds` later


@dataclass(frozen=True, slots=True)
class Fault:
    """Happens once `at` bytes were sent in its direction; 0 is from the start."""

    kind: FaultKind
    at: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SimLink:
    """One direction: bytes it holds that were sent and not yet received, seconds a byte takes, what goes wrong."""

    buffer: int = 4096
    latency: float = 0.0
    faults: Sequence[Fault] = ()


class End(enum.Enum):
    """How a direction can be over."""

    EOF = enum.auto()
    BROKEN = enum.auto()


class Stand(Protocol):
    """What a pipe needs of the streams at its ends."""

    outgoing: Pipe

    def on_ready(self) -> None:
        """Something has arrived: bytes, or an end."""

    def on_room(self) -> None:
        """There is room again, or there never will be."""


class Pipe:
    """One direction. `reader` and `writer` are set once both streams exist."""

    reader: Stand
    writer: Stand

    def __init__(self, link: SimLink, wheel: Reaper) -> None:
        self.link = link
        self._wheel = wheel
        self._faults = deque(sorted(link.faults, key=lambda fault: fault.at))
        self._sent = 0
        self._taken = 0
        self._flight: deque[tuple[float, bytes | End]] = deque()
        self._not_before = 0.0  # when the next bytes may arrive at the earliest
        self._stalled = False
        self._announced = False
        self._arrived = bytearray()
        self.end: End | None = None  # has arrived behind `_arrived`
        self.broken = False  # a reset has arrived, behind an end perhaps, which is all that a read still tells then
        self.sealed: End | None = None  # the writer's view: EOF, it said so itself; BROKEN, nobody will receive

    @property
    def room(self) -> int:
        """Bytes it takes now."""
        return self.link.buffer - (self._sent - self._taken)

    @property
    def unread(self) -> int:
        """Bytes that were sent and not received."""
        return self._sent - self._taken

    @property
    def readable(self) -> bool:
        """Bytes or an end have arrived."""
        return bool(self._arrived) or self.end is not None

    def start(self) -> None:
        """Both ends exist: what goes wrong at byte 0 goes wrong now."""
        self._fire()

    def nudge(self) -> None:
        """Announce to the reader, in a step to come, what is here already."""
        self._land(b"")

    def send(self, data: Buffer) -> int:
        """Take what fits; the number of bytes taken."""
        view, total = memoryview(data).cast("B"), 0
        while total < len(view) and self.sealed is None:
            size = min(len(view) - total, self.room)
            if self._faults:
                size = min(size, self._faults[0].at - self._sent)
            if not size:
                break
            self._sent += size
            self._launch(bytes(view[total : total + size]))
            total += size
            self._fire()
        return total

    def receive(self, max_bytes: int) -> bytes:
        """What has arrived, perhaps nothing."""
        data = bytes(self._arrived[:max_bytes])
        del self._arrived[:max_bytes]
        self._taken += len(data)
        if data:
            self.writer.on_room()
        return data

    def finish(self, end: End) -> None:
        """The writer says nothing more; `end` travels behind what it said."""
        if self.sealed is None or (self.sealed is End.EOF and end is End.BROKEN):
            self.sealed = end
            self._launch(end)

    def abandon(self) -> None:
        """The reader has closed: what is under way is lost, and the writer finds the pipe broken."""
        self.sealed = End.BROKEN
        self._flight.clear()
        self._arrived.clear()
        self._taken = self._sent
        self.writer.on_room()

    def snap(self) -> None:
        """The connection breaks. What has arrived can be received, what is under way arrives if it can."""
        self.sealed = End.BROKEN
        if self._stalled:
            self._stalled = False
            self._flight.clear()
        if not self.broken:
            self._launch(End.BROKEN)
        self.writer.on_room()

    def _fire(self) -> None:
        while self._faults and self._faults[0].at <= self._sent:
            fault = self._faults.popleft()
            if fault.kind is FaultKind.STALL:
                self._stalled = True
            elif fault.kind is FaultKind.DELAY:
                self._not_before = max(self._not_before, trio.current_time() + fault.seconds)
            elif fault.kind is FaultKind.RESET:
                self.snap()
                self.reader.outgoing.snap()
            else:
                self.finish(End.EOF)
                self.sealed = End.BROKEN
                if fault.kind is FaultKind.TRUNCATE:
                    self.reader.outgoing.finish(End.EOF)
                    self.reader.outgoing.sealed = End.BROKEN
                    self.reader.on_room()
                self.writer.on_room()

    def _launch(self, item: bytes | End) -> None:
        now = trio.current_time()
        self._not_before = max(self._not_before, now + self.link.latency)
        if self._stalled or self._flight or self._not_before > now:
            self._flight.append((self._not_before, item))
            if len(self._flight) == 1 and not self._stalled:
                self._wheel.add(self._land_due, self._not_before)
        else:
            self._land(item)

    def _land_due(self, now: float) -> float:
        while self._flight and self._flight[0][0] <= now and not self._stalled:
            self._land(self._flight.popleft()[1])
        return self._flight[0][0] if self._flight and not self._stalled else math.inf

    def _land(self, item: bytes | End) -> None:
        if isinstance(item, End):
            self.end = self.end or item
            self.broken = self.broken or item is End.BROKEN
        else:
            self._arrived += item
        if not self._announced:
            self._announced = True
            self._wheel.add(self._announce, trio.current_time())

    def _announce(self, _now: float) -> float:
        self._announced = False
        held = Held()  # as in a round of the poller, only that others may have their turn before its end
        hold_back(held)
        try:
            self.reader.on_ready()
        finally:
            hold_back(None)
        held.call()
        for course in held.courses:
            self._wheel.add(partial(_go_on, course), trio.current_time())
        return math.inf


def _go_on(course: Course[Any], _now: float) -> float:
    course.go_on()
    return math.inf


_wheel: trio.lowlevel.RunVar[Reaper] = trio.lowlevel.RunVar("canal_trio.testing.simstream")


def current_wheel() -> Reaper:
    """The task of this run that announces what arrives, started if there is none yet."""
    try:
        return _wheel.get()
    except LookupError:
        wheel = Reaper()
        _wheel.set(wheel)
        trio.lowlevel.spawn_system_task(wheel.run, name="simulated connections")
        return wheel
