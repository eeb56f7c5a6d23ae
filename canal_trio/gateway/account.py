"""The account of one answer: what it used, read from its bytes, and the chunk that only we asked for taken out.

Made for an answer when accounting is on, never otherwise, and passed by every piece before the client's writer gets it,
on both ways. Invariants: what comes out is what went in, but for that one chunk; at most one event is held, and
`flush()` gives it out before any ending; what the tap has seen does not depend on whether the client took it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, final

from canal_trio.hooks import Usage
from canal_trio.relay.flow import Sink
from canal_trio.upstream.interface import Outlet
from canal_trio.wire.facts import ResponseFacts
from canal_trio.wire.usage import StreamUsage
from canal_trio.wire.usage_edit import UsageEdit

__all__ = ["Account", "OutletBehind", "account_for", "accounted", "sink_behind"]


class Account(Protocol):
    """One answer's. Where nothing is taken out of it that is the tap itself."""

    @property
    def usage(self) -> Usage | None:
        """What the upstream said that it used, once it did."""

    def passes(self, data: bytes, start: int, stop: int) -> bool:
        """May `data[start:stop]`, a piece that has come, go on as it is, with nothing in it to be noted? If not, `feed`
        has to see it. Not a checkpoint."""

    def feed(self, piece: bytes) -> bytes:
        """A piece has come: what of it, and of what was held, may go on now. Perhaps nothing. Not a checkpoint."""

    def flush(self) -> bytes:
        """What is held: nothing more will come."""


@final
class _Edited:
    """The account of a stream whose usage chunk is taken out."""

    __slots__ = ("_edit", "_tap")

    def __init__(self, held_bytes: int) -> None:
        self._tap = StreamUsage()
        self._edit = UsageEdit(held_bytes)

    @property
    def usage(self) -> Usage | None:
        return self._tap.usage

    def passes(self, data: bytes, start: int, stop: int) -> bool:
        return self._edit.idle and self._tap.passes(data, start, stop)

    def feed(self, piece: bytes) -> bytes:
        return self._edit.feed(self._tap.feed(piece))

    def flush(self) -> bytes:
        return self._edit.flush()


def account_for(facts: ResponseFacts, asked: bool, held_bytes: int) -> Account | None:
    """The account of the answer whose head has these `facts`; None where its bytes tell nothing (an image, gzip).

    `asked`: the gateway asked for the usage chunk, so the client gets none.
    """
    tap = facts.tap
    if asked and tap is StreamUsage:
        return _Edited(held_bytes)
    return None if tap is None else tap()


def accounted(account: Account, pieces: list[bytes], *, over: bool) -> list[bytes]:
    """As `feed`, for several pieces; `over`: they are the last ones."""
    passed = [account.feed(piece) for piece in pieces]
    if over:
        passed.append(account.flush())
    return [piece for piece in passed if piece]


def sink_behind(account: Account, sink: Sink) -> Sink:
    """`sink`, with the account in front of it."""
    feed = account.feed

    def accounted_sink(piece: bytes) -> bool:
        passed = feed(piece)
        return sink(passed) if passed else True

    return accounted_sink


@final
class OutletBehind:
    """An outlet with an account in front of it. What the account does not touch goes on as it came."""

    __slots__ = ("_feed", "_outlet", "_passes", "chunked")

    def __init__(self, account: Account, outlet: Outlet) -> None:
        self._feed = account.feed
        self._passes = account.passes
        self._outlet = outlet
        self.chunked = outlet.chunked

    def piece(self, payload: bytes, now: float) -> Callable[[], bool]:
        """What of `payload` may go on."""
        passed = self._feed(payload)
        return self._outlet.piece(passed, now) if passed else _nothing

    def whole(self, framed: bytes, start: int, stop: int, now: float) -> Callable[[], bool]:
        """The same of a whole chunk's payload: with its frame, if it is all of it."""
        if self._passes(framed, start, stop):
            return self._outlet.whole(framed, start, stop, now)
        payload = framed[start:stop]
        passed = self._feed(payload)
        if passed is payload:
            return self._outlet.whole(framed, start, stop, now)
        return self._outlet.piece(passed, now) if passed else _nothing


def _nothing() -> bool:
    return True
