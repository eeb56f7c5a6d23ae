"""The record of an exchange: each field has what the exchange knows under its name."""

from __future__ import annotations

import pytest

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.record import record_of
from canal_trio.hooks import ExchangeRecord, Outcome, Principal, Tried, UsageSource
from canal_trio.messages import Headers, RequestHead
from canal_trio.wire.sse import EventScanner


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_every_field_of_a_record_is_the_one_of_its_name(pieces):
    """It is made by position, so two fields of one kind could change places without anybody noticing."""
    head = RequestHead(b"POST", b"/v1/chat/completions?secret", Headers([(b"X-Request-Id", b"an-id")]), b"1.1")
    times = iter([10.0, 20.0])
    exchange = Exchange(head, client="192.0.2.7", started=9.0, certificate="CN=alice", clock=lambda: next(times))
    failure = Failure(Side.UPSTREAM, Phase.STREAM, Kind.CUT)
    exchange.note(failure)
    exchange.started_at = 1_700_000_000.0
    exchange.status = 207
    exchange.principal = Principal("team", key="team-key")
    exchange.model, exchange.upstream, exchange.upstream_model = "asked", "there", "called"
    exchange.attempts, exchange.tried = 4, (Tried("elsewhere", "503"),)
    exchange.scanner = EventScanner()
    exchange.scanner.feed(b"data: a\n\ndata: b\n\n")
    exchange.request_bytes, exchange.response_bytes = 101, 102
    exchange.pieces, exchange.handed_over, exchange.queued, exchange.waits = pieces, 103, 104, 105
    exchange.longest_gap, exchange.cancel_latency = 1.5, 0.25
    exchange.flags = frozenset({"b", "a"})
    if pieces:
        exchange.first_piece, exchange.last_piece = 12.0, 16.0
    exchange.finish()
    assert record_of(exchange) == ExchangeRecord(
        request_id="an-id",
        started_at=1_700_000_000.0,
        client="192.0.2.7",
        method="POST",
        path="/v1/chat/completions",
        outcome=Outcome.UPSTREAM_FAILED,
        phase=Phase.STREAM,
        status=207,
        failure=failure,
        certificate="CN=alice",
        principal="team",
        key="team-key",
        model="asked",
        upstream="there",
        upstream_model="called",
        attempts=4,
        tried=(Tried("elsewhere", "503"),),
        streamed=True,
        request_bytes=101,
        response_bytes=102,
        events=2,
        first_byte=2.0 if pieces else None,
        duration=11.0,
        longest_gap=1.5,
        mean_gap=2.0 if pieces > 1 else 0.0,
        cancel_latency=0.25,
        handed_over=103,
        queued=104,
        waits=105,
        flags=("a", "b"),
        usage=None,
        usage_source=UsageSource.NONE,
    )
