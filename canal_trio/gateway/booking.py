"""Exchanges that are about to go upstream, noted in the books before anything of them does.

Those of one round of the poller wait together with what they send (`relay.course.before_sends`), and are noted together
at its end: for a ledger one write(2) instead of one for each. Invariants: nothing of an exchange that is not noted goes
upstream; an exchange that cannot be noted fails with the books' reason.
"""

from __future__ import annotations

import logging
from typing import final

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.exchange import Exchange
from canal_trio.hooks import Admitted, Bookkeeper
from canal_trio.relay.course import before_sends

__all__ = ["Booking"]

_log = logging.getLogger("canal_trio.gateway")


@final
class Booking:
    """Has exchanges noted in `books`, which are told of their ends, whatever others are kept by then."""

    def __init__(self, books: Bookkeeper) -> None:
        self.books = books
        self._waiting: list[tuple[Exchange, str]] = []

    def note(self, exchange: Exchange, upstream: str) -> None:
        """Have `exchange`, for which `upstream` is tried first, noted before it sends anything: at once, or together
        with others. Not a checkpoint."""
        self._waiting.append((exchange, upstream))
        if not before_sends(self.settle):
            self.settle()

    def settle(self) -> None:
        """Note those that wait for it. Not a checkpoint; idempotent.

        A bug of the books is logged, and ends those exchanges: the poller would end the run.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        books = self.books
        try:
            entries = books.admitted([_admitted(exchange, upstream) for exchange, upstream in waiting])
            if len(entries) != len(waiting):
                raise ValueError(f"{len(entries)} answers of the books for {len(waiting)} exchanges")
        except Exception:
            _log.exception("the books failed to note %d exchanges", len(waiting))
            entries = [Failure(Side.GATEWAY, Phase.ROUTE, Kind.INTERNAL)] * len(waiting)
        refused: list[tuple[Exchange, Failure]] = []
        for (exchange, _), entry in zip(waiting, entries, strict=True):
            if isinstance(entry, Failure):
                refused.append((exchange, entry))
            else:
                exchange.entry, exchange.books = entry, books
        for exchange, why in refused:
            exchange.fail(why)


def _admitted(exchange: Exchange, upstream: str) -> Admitted:
    principal, facts = exchange.principal, exchange.facts
    assert facts is not None
    name = key = None
    if principal is not None:
        name, key = principal.name, principal.key or principal.name
    fields = (exchange.id, exchange.started_at, facts.path, name, key, exchange.model, upstream)
    return tuple.__new__(Admitted, fields)  # as `Admitted`, in half the time
