"""The books of a simulated run: a `hooks.Bookkeeper` that complains where an exchange is not noted as it has to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from canal_trio.errors import Failure
from canal_trio.hooks import Admitted, ExchangeRecord

__all__ = ["SimBooks"]


@final
class SimBooks:
    """Remembers who was noted. `complaints` gets what is wrong. `before`: the books that these are kept instead of."""

    def __init__(self, complaints: list[str], before: SimBooks | None = None) -> None:
        self._complaints = complaints
        self._ids: list[str] = []  # by number
        self._noted: set[str] = set() if before is None else before._noted  # in any of them
        self.open: dict[int, str] = {}

    def admitted(self, exchanges: Sequence[Admitted]) -> Sequence[int | Failure]:
        """Each once."""
        first = len(self._ids)
        for exchange in exchanges:
            if exchange.request_id in self._noted:
                self._complaints.append(f"{exchange.request_id} is noted twice")
            self._noted.add(exchange.request_id)
            self.open[len(self._ids)] = exchange.request_id
            self._ids.append(exchange.request_id)
        return range(first, len(self._ids))

    def ended(self, endings: Sequence[tuple[int, ExchangeRecord]]) -> None:
        """Each once, with its own record."""
        for number, record in endings:
            begun = self.open.pop(number, None)
            if begun != record.request_id:
                self._complaints.append(f"{begun}, number {number} in the books, ended as {record.request_id}")

    def sent(self, request_id: str) -> None:
        """The first byte of an exchange goes upstream."""
        if request_id not in self._noted:
            self._complaints.append(f"{request_id} went upstream before it was noted")
