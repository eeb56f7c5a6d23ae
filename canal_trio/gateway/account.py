"""The account of one answer: what it used, read from its bytes, and the chunk that only we asked for taken out.

Made for an answer when accounting is on, never otherwise, and passed by every piece before the client's writer gets it,
on both ways. Invariants: what comes out is what went in, but for that one chunk; at most one event is held, and
`flush()` gives it out before any ending; what the tap has seen does not depend on whether the client took it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from canal_trio.hooks import Usage
from canal_trio.relay.flow import Sink
from canal_trio.upstream.interface import Outlet
from canal_trio.wire.facts import ResponseFacts
from canal_trio.wire.usage import BodyUsage, StreamUsage
from canal_trio.wire.usage_edit import UsageEdit

__all__ = ["Account", "account_for"]


@final
class Account:
    """One answer's."""

    __slots__ = ("_edit", "_tap")

    def __init__(self, tap: BodyUsage | StreamUsage, edit: UsageEdit | None) -> None:
        self._tap = tap
        self._edit = edit

    @property
    def usage(self) -> Usage | None:
        """What the upstream said that it used, once it did."""
        return self._tap.usage

    @property
    def removed(self) -> bool:
        """The chunk that we asked for was taken out."""
        return self._edit is not None and self._edit.removed

    def feed(self, piece: bytes) -> bytes:
        """A piece has come: what of it, and of what was held, may go on now. Perhaps nothing. Not a checkpoint."""
        self._tap.feed(piece)
        return piece if self._edit is None else self._edit.feed(piece)

    def flush(self) -> bytes:
        """What is held: nothing more will come."""
        return b"" if self._edit is None else self._edit.flush()

    def batch(self, pieces: list[bytes], *, over: bool) -> list[bytes]:
        """The same for several pieces; `over`: they are the last ones."""
        if self._edit is None:
            for piece in pieces:
                self._tap.feed(piece)
            return pieces
        passed = [self.feed(piece) for piece in pieces]
        if over:
            passed.append(self._edit.flush())
        return [piece for piece in passed if piece]

    def before(self, sink: Sink) -> Sink:
        """`sink`, with the account in front of it."""
        feed = self.feed

        def accounted(piece: bytes) -> bool:
            passed = feed(piece)
            return sink(passed) if passed else True

        return accounted

    def outlet(self, outlet: Outlet) -> Outlet:
        """`outlet`, with the account in front of it."""
        return _Accounted(self, outlet)


@final
class _Accounted:
    """An outlet behind an account. What the account does not touch goes on as it came."""

    __slots__ = ("_feed", "_outlet", "chunked")

    def __init__(self, account: Account, outlet: Outlet) -> None:
        self._feed = account.feed
        self._outlet = outlet
        self.chunked = outlet.chunked

    def piece(self, payload: bytes, now: float) -> Callable[[], bool]:
        passed = self._feed(payload)
        return self._outlet.piece(passed, now) if passed else _nothing

    def whole(self, framed: bytes, start: int, stop: int, now: float) -> Callable[[], bool]:
        payload = framed[start:stop]
        passed = self._feed(payload)
        if passed is payload:
            return self._outlet.whole(framed, start, stop, now)
        return self._outlet.piece(passed, now) if passed else _nothing


def _nothing() -> bool:
    return True


def account_for(facts: ResponseFacts, *, streamed: bool, asked: bool, held_bytes: int) -> Account | None:
    """The account of the answer whose head has these `facts`; None where its bytes tell nothing (an image, gzip).

    `asked`: the gateway asked for the usage chunk, so the client gets none.
    """
    if facts.coded:
        return None
    if streamed:
        return Account(StreamUsage(), UsageEdit(held_bytes) if asked else None)
    return Account(BodyUsage(), None) if facts.json else None
