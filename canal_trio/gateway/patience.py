"""How long a client may take, by what its reader waits for (design, section 8).

Only "since when" is stored; the reaper asks when something is due. Invariants: the head's deadline counts from its
first byte and is never extended; the body's run only while the client's bytes are awaited; none runs while it is not
the client's turn.
"""

from __future__ import annotations

import enum
import math
from typing import final

from canal_trio.relay.idle import clock_of_run
from canal_trio.settings import Deadlines

__all__ = ["Mode", "Patience"]


class Mode(enum.Enum):
    """What the reader of a connection waits for."""

    IDLE = enum.auto()  # between requests, nothing has arrived
    HEAD = enum.auto()  # a request head has begun
    BODY = enum.auto()  # body bytes are awaited
    WAIT = enum.auto()  # the client has no turn: flow full, response running


@final
class Patience:
    """Of one connection. `since`: when the mode began, or when a body byte last arrived. Made inside `trio.run`."""

    __slots__ = ("_body_waited", "_clock", "_deadlines", "body_bytes", "mode", "period", "since")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._clock = clock_of_run()
        self._body_waited = 0.0
        self.body_bytes = 0
        self.mode = Mode.IDLE
        self.since = self._clock()
        # How often to look: no deadline is shorter, so none is ever seen late.
        self.period = min(deadlines.keep_alive, deadlines.request_head, deadlines.body_idle)

    def enter(self, mode: Mode) -> None:
        """From now on it is `mode`."""
        self.mode = mode
        self.since = self._clock()

    def begin_body(self) -> None:
        """A new request: nothing of its body has come."""
        self.body_bytes, self._body_waited = 0, 0.0

    def waited(self, started: float) -> None:
        """Body bytes were awaited from `started` until the present mode began."""
        self._body_waited += self.since - started

    def due(self, idle: float | None) -> float:
        """When the present wait is too long (Trio's clock), infinity if none runs. `idle`: since when, if it is so."""
        deadlines = self._deadlines
        if self.mode is Mode.IDLE:
            return math.inf if idle is None else idle + deadlines.keep_alive
        if self.mode is Mode.HEAD:
            return self.since + deadlines.request_head
        if self.mode is Mode.BODY:
            return self.since + min(deadlines.body_idle, self._credit() - self._body_waited)
        return math.inf

    def _credit(self) -> float:
        """Seconds that may be spent on waiting for the body bytes that came so far."""
        rate = self._deadlines.body_rate
        return max(self._deadlines.body_idle, self.body_bytes / rate if rate else math.inf)
