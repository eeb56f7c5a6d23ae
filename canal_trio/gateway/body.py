"""The request body of an exchange: taken once from the client, given to as many attempts as it takes, with its edits.

Pieces are held while an attempt may still have to be repeated, within a bound per exchange and a budget for the whole
process. Beyond the bound the body streams on and can no longer be replayed. Everything is freed at the response's head.
A body that came with its head, in one read, is held without a flow (`WholeBody`): that is the usual request.
"""

from __future__ import annotations

from typing import final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import End
from canal_trio.relay.flow import Ended, Ending, FlowReceiver
from canal_trio.wire.splice import Edit, splice, spliced

__all__ = ["Budget", "HeldBody", "WholeBody", "too_large"]


def too_large(most: int) -> Failure:
    """A body that has to be held whole is larger than `most` bytes."""
    detail = f"Bodies that name a model are read whole, up to {most} bytes."
    return Failure(Side.CLIENT, Phase.UPLOAD, Kind.BODY_TOO_LARGE, detail)


@final
class Budget:
    """Bytes of held bodies, all exchanges of this process together."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; False if that would pass the limit."""
        if self.held + size > self.limit:
            return False
        self.held += size
        return True

    def give(self, size: int) -> None:
        """Return what was taken."""
        self.held -= size


@final
class HeldBody:
    """One request body. `source()` starts it from the beginning, for as long as it is `replayable`."""

    def __init__(self, receiver: FlowReceiver, budget: Budget, limit: int) -> None:
        self._receiver = receiver
        self._budget = budget
        self._limit = limit
        self._pieces: list[bytes] = []
        self._held = 0
        self._holding = True
        self._touched = False  # a source has taken a piece that is no longer held
        self._newest: _Source | None = None  # the only one that gets anything
        self.edits: tuple[Edit, ...] = ()  # what the next attempt sends otherwise; only of a body that is here whole

    @property
    def replayable(self) -> bool:
        """Another attempt can have the whole body."""
        return not self._touched

    @property
    def ending(self) -> Ending | None:
        """How the client ended it; None while more may come."""
        return self._receiver.ending

    def _hold(self, batch: list[bytes]) -> bool:
        size = sum(map(len, batch))
        if self._held + size > self._limit or not self._budget.take(size):
            return False
        self._held += size
        self._pieces += batch
        return True

    def hold_anyway(self, batch: list[bytes]) -> None:
        """One batch for the next source, beyond the bounds if need be. Not a checkpoint."""
        size = sum(map(len, batch))
        if self._holding:
            self._held += size
            self._budget.held += size
            self._pieces += batch

    async def hold_all(self) -> Failure | None:
        """Read the body to its end before it is routed. The failure if it is larger than may be held, or was cut."""
        while self.ending is None:
            batch = await self._receiver.take()
            if not self._hold(batch):
                size = self._held + sum(map(len, batch))
                if size > self._limit:
                    return too_large(self._limit)
                return Failure(Side.GATEWAY, Phase.UPLOAD, Kind.BUFFERS_FULL)
        if isinstance(self.ending, Ended):
            return None
        failure = self.ending.failure
        return failure if isinstance(failure, Failure) else Failure(Side.CLIENT, Phase.UPLOAD, Kind.CUT)

    def beginning(self, most: int) -> bytes | None:
        """The whole body if it is here, held and no longer than `most` bytes."""
        if not self._holding or not isinstance(self.ending, Ended) or self._held > most:
            return None
        return b"".join(self._pieces)

    def source(self) -> _Source | _WholeSource:
        """The body from its beginning, edited. Only the newest source gets anything, the others wait."""
        if self.edits:
            return _WholeSource(splice(self._pieces, self.edits), self.ending)
        self._newest = _Source(self)
        return self._newest

    def keep_back(self) -> None:
        """Another attempt will follow: what is still to come is for the next source. Not a checkpoint."""
        self._newest = None

    def last_attempt(self, most: int) -> None:
        """Only one more source will be asked for: what comes beyond `most` bytes need not be held."""
        self._limit = min(self._limit, most)

    def stop_holding(self) -> None:
        """No further attempt will be made: free what is held and what comes. Idempotent."""
        if self._holding:
            self._holding = False
            self._budget.give(self._held)
            self._held = 0
            self._pieces = []
            self._touched = True

    def close(self) -> None:
        """The exchange is over: free everything and stop the client's upload. Idempotent."""
        self.stop_holding()
        self._newest = None  # it knows us: a circle would wait for the garbage collector
        self._receiver.close()


@final
class _Source:
    """A `BodySource` over a held body: what is held first, then what arrives. Superseded, it never ends."""

    __slots__ = ("_body", "_next")

    def __init__(self, body: HeldBody) -> None:
        self._body = body
        self._next = 0

    @property
    def ending(self) -> Ending | None:
        body = self._body
        return body.ending if body._newest is self and self._next >= len(body._pieces) else None

    def take_nowait(self) -> list[bytes]:
        body = self._body
        if body._newest is not self:
            return []
        held = body._pieces[self._next :]
        if body.ending is None:
            held += self._arrived(body._receiver.take_nowait())
        self._next = len(body._pieces)
        return held

    async def take(self) -> list[bytes]:
        await trio.lowlevel.checkpoint_if_cancelled()
        batch = self.take_nowait()
        if batch or self.ending is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return batch
        body = self._body
        if body._newest is self:
            arrived = await body._receiver.take()
            if body._newest is self:
                batch = self._arrived(arrived)
                self._next = len(body._pieces)
                return batch
            body.hold_anyway(arrived)  # superseded while it was woken with this
        return await trio.sleep_forever()

    def _arrived(self, batch: list[bytes]) -> list[bytes]:
        body = self._body
        if batch and not (body._holding and body._hold(batch)):
            body.stop_holding()
            body._touched = True
        return batch


@final
class WholeBody:
    """A request body of one read at most, all of it here and taken from `budget`. Otherwise as `HeldBody`."""

    __slots__ = ("_budget", "_content", "edits", "ending", "replayable")

    def __init__(self, content: bytes, end: End, budget: Budget) -> None:
        self._content = content
        self._budget = budget
        self.ending: Ending | None = Ended(end)
        self.replayable = True  # and held
        self.edits: tuple[Edit, ...] = ()

    def keep_back(self) -> None:
        """Of no effect: nothing is to come."""

    async def hold_all(self) -> Failure | None:
        """It is here. Not a checkpoint."""
        return None

    def beginning(self, most: int) -> bytes | None:
        """The body, if it is still held and no longer than `most` bytes."""
        return self._content if self.replayable and len(self._content) <= most else None

    def source(self) -> _WholeSource:
        """The body from its beginning, edited."""
        if self.edits:
            return _WholeSource([spliced(self._content, self.edits)], self.ending)
        return _WholeSource([self._content] if self._content else [], self.ending)

    def last_attempt(self, most: int) -> None:
        """Of no effect: it is one read at most."""

    def stop_holding(self) -> None:
        """No further attempt will be made. Idempotent."""
        self.replayable = False
        self._budget.give(len(self._content))
        self._content = b""

    def close(self) -> None:
        """The exchange is over. Idempotent."""
        if self.replayable:
            self.stop_holding()


@final
class _WholeSource:
    """A `BodySource` that gives everything at once."""

    __slots__ = ("_ending", "_pieces", "ending")

    def __init__(self, pieces: list[bytes], ending: Ending | None) -> None:
        self._pieces = pieces
        self._ending = ending
        self.ending = None if pieces else ending

    def take_nowait(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        self.ending = self._ending
        return pieces

    async def take(self) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return self.take_nowait()
