"""Prometheus metrics: what each exchange left behind, and the state of the gateway when it is asked.

Invariants: an exchange is observed once, when its record arrives, never per piece; state (connections, pools, held
bytes) is read from `gateway.statistics()` during a scrape and costs nothing in between. Label values are bounded by the
configuration and by our own enumerations: nothing a client sends (model, path, method) becomes a label. Every family
lives in a registry of its own, so that two gateways in one process do not meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, final

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from canal_trio import __version__
from canal_trio.hooks import ExchangeRecord
from canal_trio.observe.standings import UpstreamNumbers, standings
from canal_trio.observe.tally import Tallies

__all__ = ["CONTENT_TYPE", "Metrics", "Statistics", "Watched"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. The first-byte buckets are OpenTelemetry's for gen_ai.server.time_to_first_token, widened at the long end.
_FIRST_BYTE = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 300)
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300, 1200)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30, 120)
_CANCEL = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Statistics(Protocol):
    """What `gateway.statistics()` answers. Each pool's statistics are a record of numbers."""

    @property
    def connections(self) -> int:
        """Client connections open now."""

    @property
    def in_flight(self) -> int:
        """Exchanges in flight now."""

    @property
    def pools(self) -> Mapping[str, object]:
        """Per upstream, a dataclass of numbers."""

    @property
    def waiting(self) -> int:
        """Exchanges that wait for a place."""

    @property
    def upstreams(self) -> Mapping[str, UpstreamNumbers]:
        """How each upstream stands."""

    @property
    def retries_refused(self) -> int:
        """Attempts that there was no budget for."""

    @property
    def held_bytes(self) -> int:
        """Bytes of request bodies held for routing or replay."""

    @property
    def flow_bytes(self) -> int:
        """Bytes on their way in flows: read, and not taken by the other side yet."""

    @property
    def memory_limit(self) -> float:
        """Bytes of both, beyond which no new exchange is taken."""


class Watched(Protocol):
    """The part of a gateway that is looked at from outside."""

    @property
    def draining(self) -> bool:
        """Draining has begun."""

    def ready(self) -> bool:
        """New exchanges are welcome and an upstream is usable."""

    def exchanges(self) -> Iterable[object]:
        """The exchanges in flight, each a dataclass."""

    def statistics(self) -> Statistics:
        """Counts of now."""


# field of a pool's statistics -> metric, help, does it count? A field that is not here is a gauge by its own name.
_POOL: dict[str, tuple[str, str, bool]] = {
    "idle": ("canal_pool_idle", "Upstream connections that wait for reuse.", False),
    "used": ("canal_pool_used", "Upstream connections in use, or being made.", False),
    "waiting": ("canal_pool_waiters", "Exchanges that wait for an upstream connection.", False),
    "dialled": ("canal_pool_dialled", "Upstream connections made.", True),
    "reused": ("canal_pool_reused", "Leases of a connection that had served before.", True),
    "failed": ("canal_pool_dials_failed", "Dials that came to nothing.", True),
    "stale": ("canal_pool_stale", "Idle connections found dead.", True),
    "timeouts": ("canal_pool_wait_timeouts", "Waits for a connection that took too long.", True),
    "refused": ("canal_pool_waits_refused", "Waits for a connection that were not begun: the queue was full.", True),
}

_LIMIT_REJECTIONS = (
    "canal_limit_rejections",
    "Exchanges that a limit did not let in: whose it was, and which.",
    ("scope", "limit"),
)


@final
class Metrics:
    """A `hooks.Recorder`, and the page that `/metrics` answers with."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        build = Gauge("canal_build_info", "Always 1; the version is in the label.", ["version"], registry=registry)
        build.labels(__version__).set(1)
        # What most counters are made of, added up by what their labels are made of; poured in when they are asked.
        self._rows: dict[tuple[str, str | None, bool, int | None, str], list[int]] = {}
        tallies = Tallies(self._pour)
        registry.register(tallies)
        self._exchanges = tallies.count("canal_exchanges", "Exchanges that ended.", ["outcome", "upstream", "streamed"])
        self._responses = tallies.count("canal_responses", "Answers by status; 'none' if there was none.", ["status"])
        self._failures = tallies.count(
            "canal_failures",
            "What ended an exchange early: who, in which phase, how.",
            ["side", "phase", "kind", "upstream"],
        )
        self._flags = tallies.count(
            "canal_exchange_flags", "Remarks on exchanges, such as no_terminal_event.", ["flag"]
        )
        self._attempts = tallies.count("canal_attempts", "Tries at an upstream, the first one included.", ["upstream"])
        self._first_byte = tallies.spread(
            "canal_first_byte_seconds",
            "From the end of the request head to the first body byte in the client's kernel.",
            _FIRST_BYTE,
            ["streamed"],
        )
        self._duration = tallies.spread(
            "canal_exchange_duration_seconds",
            "From the first byte of a request to the end of its exchange.",
            _DURATION,
            ["streamed"],
        )
        self._longest_gap = tallies.spread(
            "canal_event_gap_longest_seconds", "The longest silence within a stream, once per exchange.", _GAP
        )
        self._mean_gap = tallies.spread(
            "canal_event_gap_mean_seconds", "The mean time between the pieces of a stream, once per exchange.", _GAP
        )
        self._cancel = tallies.spread(
            "canal_cancel_latency_seconds",
            "From seeing the client leave to the upstream's socket being closed.",
            _CANCEL,
        )
        self._request_bytes = tallies.count("canal_request_bytes", "Body bytes read from clients.")
        self._response_bytes = tallies.count("canal_response_bytes", "Body bytes accepted by clients' kernels.")
        self._events = tallies.count("canal_events", "Events delivered.")
        self._pieces = tallies.count(
            "canal_pieces",
            "Pieces that went straight through (handed_over) or took the channel (queued).",
            ["path"],
        )
        self._waits = tallies.count(
            "canal_flow_waits", "Times the reading of an upstream stopped until its client had taken more."
        )
        self.limit_rejections = tallies.count(*_LIMIT_REJECTIONS)
        self._tokens = tallies.count(
            "canal_tokens", "Tokens, by where the number comes from.", ["type", "source", "upstream"]
        )
        self.internal_errors = self._counter(
            "canal_internal_errors", "Bugs: exceptions that reached a connection's boundary."
        )
        self.accept_errors = self._counter(
            "canal_accept_errors", "Connections that could not be accepted, by cause.", "cause"
        )
        self.shed = self._counter("canal_connections_shed", "Client connections refused, or closed for room.", "cause")
        self.tls_handshakes = self._counter(
            "canal_tls_handshakes", "Handshakes of clients: ok, or how they ended.", "result"
        )
        self.reloads = self._counter("canal_reloads", "Reloads of the configuration.", "result")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def finished(self, record: ExchangeRecord) -> None:
        """Observe one exchange. A few microseconds in all (see `observe.tally`), not a checkpoint."""
        source = record.usage_source._value_  # .value is a Python call or two
        key = record.outcome._value_, record.upstream, record.streamed, record.status, source
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = [0] * 10
        row[0] += 1
        row[1] += record.attempts - len(record.tried)  # those at other upstreams are added below
        row[2] += record.request_bytes
        row[3] += record.response_bytes
        row[4] += record.events
        row[5] += record.handed_over
        row[6] += record.queued
        row[7] += record.waits
        streamed = "true" if record.streamed else "false"
        for before in record.tried:
            self._attempts.add(1, before.upstream)
        if (failure := record.failure) is not None:
            self._failures.add(1, failure.side.value, failure.phase.value, failure.kind.value, record.upstream or "")
        for flag in record.flags:
            self._flags.add(1, flag)
        if record.first_byte is not None:
            self._first_byte.observe(record.first_byte, streamed)
        self._duration.observe(record.duration, streamed)
        if record.streamed and record.events > 1:
            self._longest_gap.observe(record.longest_gap)
            self._mean_gap.observe(record.mean_gap)
        if record.cancel_latency is not None:
            self._cancel.observe(record.cancel_latency)
        if (usage := record.usage) is not None:
            row[8] += usage.prompt
            row[9] += usage.completion

    def _pour(self) -> None:
        """Add the rows to the counters they are made of."""
        rows, self._rows = self._rows, {}
        for (outcome, name, streamed, status, source), row in rows.items():
            exchanges, attempts, request_bytes, response_bytes, events, handed_over, queued, waits, *tokens = row
            upstream = name or ""
            self._exchanges.add(exchanges, outcome, upstream, "true" if streamed else "false")
            self._responses.add(exchanges, "none" if status is None else str(status))
            if attempts:
                self._attempts.add(attempts, upstream)
            self._request_bytes.add(request_bytes)
            self._response_bytes.add(response_bytes)
            self._events.add(events)
            self._pieces.add(handed_over, "handed_over")
            self._pieces.add(queued, "queued")
            self._waits.add(waits)
            if any(tokens):
                self._tokens.add(tokens[0], "prompt", source, upstream)
                self._tokens.add(tokens[1], "completion", source, upstream)

    def watch(self, gateway: Watched) -> None:
        """Read the state of `gateway` at every scrape."""
        self.registry.register(_State(gateway))

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read at every scrape."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def page(self) -> bytes:
        """The text for Prometheus (`CONTENT_TYPE`). Not a checkpoint."""
        return generate_latest(self.registry)


@final
class _State(Collector):
    """The gateway's state as metric families, read when asked."""

    def __init__(self, gateway: Watched) -> None:
        self._gateway = gateway

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: asking for the names must not read the gateway."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families of now."""
        gateway, now = self._gateway, self._gateway.statistics()
        yield GaugeMetricFamily("canal_ready", "1 if new exchanges are welcome.", float(gateway.ready()))
        yield GaugeMetricFamily("canal_draining", "1 while draining.", float(gateway.draining))
        yield GaugeMetricFamily("canal_connections", "Client connections open.", now.connections)
        yield GaugeMetricFamily("canal_exchanges_in_flight", "Exchanges in flight.", now.in_flight)
        yield GaugeMetricFamily("canal_exchanges_waiting", "Exchanges that wait for a place.", now.waiting)
        yield GaugeMetricFamily("canal_held_bytes", "Request body bytes held for routing or replay.", now.held_bytes)
        yield GaugeMetricFamily("canal_flow_bytes", "Bytes read and not taken by the other side yet.", now.flow_bytes)
        yield GaugeMetricFamily(
            "canal_memory_limit_bytes", "Held and flow bytes beyond which requests get a 503.", now.memory_limit
        )
        yield from _pools(now.pools)
        yield from standings(now.upstreams, now.retries_refused)


def _pools(pools: Mapping[str, object]) -> Iterator[Metric]:
    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for upstream, pool in pools.items():
        if not dataclasses.is_dataclass(pool):
            continue
        for field in dataclasses.fields(pool):
            value = getattr(pool, field.name)
            if not isinstance(value, int | float):
                continue
            plain = (f"canal_pool_{field.name}", f"The pool's {field.name.replace('_', ' ')}.", False)
            name, text, counts = _POOL.get(field.name, plain)
            if name not in families:
                family = CounterMetricFamily if counts else GaugeMetricFamily
                families[name] = family(name, text, labels=["upstream"])
            families[name].add_metric([upstream], value)
    yield from families.values()
