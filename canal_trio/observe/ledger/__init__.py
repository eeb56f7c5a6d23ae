"""What every admitted exchange leaves behind: one row, in SQLite or PostgreSQL, behind a journal on this machine."""

from canal_trio.observe.ledger.journal import JournalError
from canal_trio.observe.ledger.ledger import Ledger, LedgerStatistics
from canal_trio.observe.ledger.store import BY, Store, StoreError, Sums, open_store

__all__ = ["BY", "JournalError", "Ledger", "LedgerStatistics", "Store", "StoreError", "Sums", "open_store"]
