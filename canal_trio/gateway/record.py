"""What an exchange leaves behind: its one record, made of what it knows when it is over."""

from __future__ import annotations

from canal_trio.gateway.exchange import GENERATING, Exchange
from canal_trio.hooks import ExchangeRecord, Usage, UsageSource
from canal_trio.policy.estimate import estimated
from canal_trio.policy.prices import Prices

__all__ = ["record_of"]


def record_of(exchange: Exchange, prices: Prices | None = None) -> ExchangeRecord:
    """The record of an exchange that is over, with its cost by `prices`. Called once for each."""
    scanner = exchange.scanner
    if exchange.failure is None and scanner is not None and not scanner.terminal and scanner.legible:
        exchange.flags |= {"no_terminal_event"}
    usage, source = _used(exchange)
    upstream_model = (exchange.upstream_model or exchange.model) if exchange.upstream is not None else None
    events = exchange.scanner.events if exchange.scanner else 0
    if exchange.draining and exchange.drain is not None:
        events = exchange.drain.finish()
    return ExchangeRecord(  # by position, in the order of the fields: by name it takes twice as long
        exchange.id,
        exchange.started_at,
        exchange.client,
        exchange.facts.method if exchange.facts is not None else "",
        exchange.path,
        exchange.outcome(),
        exchange.failure.phase if exchange.failure else exchange.phase,
        exchange.status,
        exchange.failure,
        exchange.certificate,
        exchange.principal.name if exchange.principal else None,
        exchange.principal.key if exchange.principal else None,
        exchange.model,
        exchange.upstream,
        upstream_model,
        exchange.attempts,
        exchange.tried,
        exchange.scanner is not None,
        exchange.request_bytes,
        exchange.response_bytes,
        events,
        None if exchange.first_piece is None else exchange.first_piece - exchange.headed,
        exchange.finished_at - exchange.started,
        exchange.longest_gap,
        (exchange.last_piece - exchange.first_piece) / (exchange.pieces - 1)
        if exchange.first_piece is not None and exchange.pieces > 1
        else 0.0,
        exchange.cancel_latency,
        exchange.handed_over,
        exchange.queued,
        exchange.waits,
        tuple(sorted(exchange.flags)) if exchange.flags else (),
        usage,
        source,
        None
        if usage is None or prices is None
        else prices.charge(usage, exchange.upstream, upstream_model, exchange.model),
    )


def _used(exchange: Exchange) -> tuple[Usage | None, UsageSource]:
    """The tokens, and who says so."""
    if not exchange.accounted:
        return None, UsageSource.NONE
    usage = None if exchange.account is None else exchange.account.usage
    if usage is not None:
        late = exchange.draining and exchange.drain is not None and not exchange.drain.told
        return usage, UsageSource.DRAINED if late else UsageSource.UPSTREAM
    events = exchange.scanner.events - exchange.scanner.terminal if exchange.scanner else 0
    guess = estimated(
        request_bytes=exchange.request_bytes,
        events=max(events, 0),
        streamed=exchange.scanner is not None and exchange.first_piece is not None,
        generates=exchange.model is not None or exchange.path.endswith(GENERATING),
        whole=exchange.failure is None,
        phase=exchange.failure.phase if exchange.failure else exchange.phase,
        status=exchange.status,
    )
    return guess, UsageSource.NONE if guess is None else UsageSource.ESTIMATED
