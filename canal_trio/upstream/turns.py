"""Whose turn it is in an attempt, and for how long: the deadlines of one upstream connection (design, section 8).

On the data path only "last moved at" is stored; the reaper looks when something could be due. One watch serves a
connection for all its life, so an attempt sets no timer. Invariant: a deadline runs only while it is that side's turn.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from typing import final

import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.relay.idle import Reaper, Watch, clock_of_run
from canal_trio.settings import Deadlines

__all__ = ["Turn", "Turns"]


class Turn(enum.Enum):
    """Whose deadline runs."""

    NOBODY = enum.auto()  # between two attempts
    CLIENT = enum.auto()  # the request body is awaited, or the flow is full: nothing runs here
    SEND = enum.auto()  # the upstream's kernel does not take the request
    ANSWER = enum.auto()  # waiting for the response head
    BODY = enum.auto()  # waiting for response bytes
    TUNNEL = enum.auto()


@functools.lru_cache(maxsize=8)  # one for each configuration at work, not for each connection
def _limits(deadlines: Deadlines) -> dict[Turn, float]:
    return {
        Turn.SEND: deadlines.upstream_idle,
        Turn.ANSWER: deadlines.first_byte,
        Turn.BODY: deadlines.upstream_idle,
        Turn.TUNNEL: deadlines.tunnel_idle,
    }


@final
class Turns:
    """`expire` gets the failure of the deadline that passed, once, in the reaper's step; it must not raise. `stop()`
    lets go of it, as it knows us: such a circle would wait for the garbage collector, which seldom looks.

    Whoever moves bytes sets `moved` to `clock()`; whoever passes the turn without moving any may set `turn` alone.
    """

    __slots__ = ("_deadlines", "_expire", "_limits", "_period", "_watch", "clock", "moved", "turn")

    def __init__(self, deadlines: Deadlines, reaper: Reaper, expire: Callable[[Failure], None]) -> None:
        self._deadlines = deadlines
        self._expire: Callable[[Failure], None] | None = expire
        self._limits = _limits(deadlines)
        self._period = min(self._limits.values())  # no deadline is shorter, so none is ever seen late
        self.clock = clock_of_run()
        self.turn = Turn.NOBODY
        self.moved = trio.current_time()  # when the turn began, or when a byte last moved
        self._watch: Watch = reaper.add(self._check, self.moved + self._period)

    def begin(self, turn: Turn) -> None:
        """From now on it is `turn`. Not a checkpoint."""
        self.turn = turn
        self.moved = self.clock()

    def stop(self) -> None:
        """The connection is closed: look no more. Idempotent."""
        self._watch.cancel()
        self._expire = None

    def _check(self, now: float) -> float:
        due = self.moved + self._limits.get(self.turn, math.inf)
        if now < due:
            return min(due, now + self._period)
        assert self._expire is not None  # nobody looks after `stop`
        self._expire(self._failure())
        return math.inf

    def _failure(self) -> Failure:
        turn, limit = self.turn, self._limits[self.turn]
        if turn is Turn.TUNNEL:
            detail = f"No byte moved in either direction for {limit:g} s."
            return Failure(Side.GATEWAY, Phase.STREAM, Kind.TIMEOUT, detail)  # a silence has no author
        if turn is Turn.ANSWER:
            detail = f"No response within {limit:g} s."
            return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.TIMEOUT, detail, Retry.SENT)
        if turn is Turn.SEND:  # bytes of a head may have come meanwhile
            detail = f"It took no byte of the request for {limit:g} s."
            return Failure(Side.UPSTREAM, Phase.SEND, Kind.STALLED, detail, Retry.SENT)
        return Failure(Side.UPSTREAM, Phase.STREAM, Kind.STALLED, f"It sent no byte for {limit:g} s.", Retry.SENT)
