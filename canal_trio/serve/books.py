"""The ledger in a serving process: made before anything is served, run beside it, closed behind the last exchange."""

from __future__ import annotations

from canal_trio.observe.ledger import Ledger
from canal_trio.observe.metrics import Metrics
from canal_trio.settings import Settings

__all__ = ["open_ledger", "show_ledger"]


def open_ledger(settings: Settings, worker: int = 0) -> Ledger | None:
    """The ledger that `settings` ask for, if they do. Raises `JournalError`."""
    return None if settings.ledger is None else Ledger(settings.ledger, worker=worker)


def show_ledger(metrics: Metrics, ledger: Ledger) -> None:
    """Have a scrape read the ledger's state."""
    state = ledger.statistics
    metrics.gauge("canal_ledger_backlog_bytes", "Bytes of the journal that the store has not.", lambda: state().backlog)
    metrics.gauge("canal_ledger_rows", "Rows that the store took since the start.", lambda: state().rows)
    metrics.gauge("canal_ledger_refused", "Exchanges refused: the journal was full.", lambda: state().refused)
    metrics.gauge("canal_ledger_interrupted", "Rows of dead processes that were closed.", lambda: state().interrupted)
    metrics.gauge("canal_ledger_store_errors", "Tries that the store failed.", lambda: state().store_errors)
